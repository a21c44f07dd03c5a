//! The network device as its transport sees it: features, configuration space, activation, state.

use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::warn;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::control::Control;
use super::features;
use super::handler::{self, Link, PairHandler, Receiving, SharedTransmit};
use super::receive::Receive;
use super::ring::Ring;
use super::tap::Tap;
use super::transmit::Transmit;
use crate::threads::Role;
use crate::virtio::config_space;
use crate::virtio::state::NetworkState;
use crate::virtio::worker::{EventSet, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceKind, DeviceState, StateError, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Queues of the first pair.
const FIRST_PAIR: usize = 2;
/// The second of them.
const TRANSMIT: usize = 1;

/// Bit of the configuration's status: the link is up (virtio 1.2 §5.1.4).
const LINK_UP: u16 = 1;

/// The address of an interface, that of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

/// Why a text is no address.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no address of an interface: give one like 02:00:00:00:00:01, neither a group's nor all zeroes"
)]
pub struct MacError(String);

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            *byte = part
                .filter(|part| part.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| MacError(text.to_owned()))?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(MacError(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

/// A virtio-net device.
pub struct Net {
    index: u16,
    tap: Tap,
    mac: MacAddress,
    mtu: u16,
    queue_sizes: Vec<u16>,
    pairs_in_use: Arc<AtomicU16>,
    guest_offloads: Option<u64>,
    link: Arc<Link>,
    workers: Vec<Worker<PairHandler>>,
    /// The transmitting queues of the pairs, with the events that their threads wait for.
    pub(super) transmits: Vec<(SharedTransmit, EventFd)>,
}

impl Net {
    /// `index` is for the names of threads.
    pub fn new(index: u16, tap: Tap, mac: MacAddress, mtu: u16) -> Self {
        let mut queue_sizes = vec![QUEUE_SIZE; FIRST_PAIR * tap.pairs()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Self {
            index,
            tap,
            mac,
            mtu,
            queue_sizes,
            pairs_in_use: Arc::new(AtomicU16::new(1)),
            guest_offloads: None,
            link: Link::up(),
            workers: Vec::new(),
            transmits: Vec::new(),
        }
    }

    fn failed(&self, source: io::Error) -> ActivateError {
        ActivateError::Backend {
            what: format!("the tap {}", self.tap.name()),
            source,
        }
    }

    /// Sets the tap up as the driver wants it.
    fn prepare_tap(&self, features: u64) -> io::Result<()> {
        let offloads = self.guest_offloads.unwrap_or(features);
        self.tap.set_offloads(features::tap_offloads(offloads))?;
        self.tap
            .use_queues(self.pairs_in_use.load(Ordering::SeqCst).into())
    }

    fn handler(
        &mut self,
        pair: usize,
        queues: [Ring; 2],
        activation: &Activation,
    ) -> io::Result<PairHandler> {
        let memory = activation.memory.memory().into_inner();
        let [receive, transmit] = queues;
        let event = transmit.event().try_clone()?;
        let interrupt = activation.interrupt.clone();
        let tap = self.tap.clone();
        let transmit = Transmit::new(transmit, memory.clone(), tap, pair, interrupt)?;
        let transmit = Arc::new(Mutex::new(transmit));
        self.transmits.push((transmit.clone(), event));
        Ok(PairHandler {
            tap: self.tap.clone(),
            pair,
            receive: Receive::new(receive, memory, activation.features, self.mtu),
            transmit,
            control: None,
            interrupt: activation.interrupt.clone(),
            link: self.link.clone(),
            receiving: Receiving::Ready,
            full: false,
            watched: EventSet::empty(),
            forgotten: false,
        })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        features::offered(self.tap.pairs(), self.tap.udp_segmentation())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The control queue comes after the pairs that there are (virtio 1.2 §5.1.2).
    fn needed_queues(&self, features: u64) -> usize {
        let pairs = if features & features::MQ != 0 {
            self.tap.pairs()
        } else {
            1
        };
        FIRST_PAIR * pairs + usize::from(features & features::CTRL_VQ != 0)
    }

    /// Several vCPUs with queues of their own must not wait for one another here.
    fn notified_on_vcpu(&self, queue: u16) -> bool {
        self.tap.pairs() == 1 && usize::from(queue) == TRANSMIT
    }

    fn notify(&mut self, _queue: u16) {
        if let Some((transmit, event)) = self.transmits.first() {
            handler::notified(transmit, event);
        }
    }

    /// `struct virtio_net_config` (virtio 1.2 §5.1.4) up to `mtu`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        let status = if self.link.is_up() { LINK_UP } else { 0 };
        let pairs = u16::try_from(self.tap.pairs()).unwrap_or(1);
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config_space::read(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.prepare_tap(activation.features)
            .map_err(|error| self.failed(error))?;
        let mut rings: Vec<Ring> = (0..)
            .zip(std::mem::take(&mut activation.queues))
            .map(|(index, queue): (u16, ActiveQueue)| Ring::new(queue, index))
            .collect();
        let control = (!rings.len().is_multiple_of(FIRST_PAIR)).then(|| rings.pop());
        let mut handlers = Vec::with_capacity(rings.len() / FIRST_PAIR);
        let mut rings = rings.into_iter();
        while let (Some(receive), Some(transmit)) = (rings.next(), rings.next()) {
            let handler = self.handler(handlers.len(), [receive, transmit], &activation);
            handlers.push(handler.map_err(ActivateError::Thread)?);
        }
        if let (Some(first), Some(Some(ring))) = (handlers.first_mut(), control) {
            let mut control = Control::new(
                ring,
                activation.memory.memory().into_inner(),
                self.tap.clone(),
                activation.features,
                self.pairs_in_use.clone(),
            );
            control.guest_offloads = self.guest_offloads;
            first.control = Some(control);
        }
        for (pair, handler) in (0..).zip(handlers) {
            let role = Role::Network(self.index, pair);
            match Worker::spawn(role, handler, activation.interrupt.clone()) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.deactivate();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let mut queues = Vec::new();
        let mut control = None;
        // No vCPU comes here as long as we do.
        self.transmits.clear();
        // All are stopped, whatever becomes of the first.
        let workers = std::mem::take(&mut self.workers).into_iter();
        let handlers: Vec<_> = workers.map(Worker::stop).collect();
        for handler in handlers {
            let Some(handler) = handler else {
                warn!(
                    interface = self.index,
                    "a thread of an interface has panicked"
                );
                return Vec::new();
            };
            queues.push(handler.receive.into_queue());
            let transmit = Arc::into_inner(handler.transmit).map(Mutex::into_inner);
            let Some(transmit) = transmit else {
                warn!(interface = self.index, "a queue of an interface is in use");
                return Vec::new();
            };
            let transmit = transmit.unwrap_or_else(PoisonError::into_inner);
            queues.push(transmit.into_queue());
            control = control.or(handler.control);
        }
        if let Some(control) = control {
            self.guest_offloads = control.guest_offloads;
            queues.push(control.into_queue());
        }
        queues
    }

    /// §5.1.6.5: what the driver has set up by the control queue does not outlive it.
    fn reset(&mut self) {
        self.deactivate();
        self.pairs_in_use.store(1, Ordering::SeqCst);
        self.guest_offloads = None;
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Network(NetworkState {
            mac: self.mac.0,
            mtu: self.mtu,
            pairs_in_use: self.pairs_in_use.load(Ordering::SeqCst),
            guest_offloads: self.guest_offloads,
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Network(state) = state else {
            return Err(StateError::WrongDevice {
                expected: self.kind(),
                found: state.kind(),
            });
        };
        let mismatch = |what: &str| Err(StateError::Mismatch(what.to_owned()));
        if state.mac != self.mac.0 || state.mtu != self.mtu {
            return mismatch("the interface had another address or MTU");
        }
        if state.pairs_in_use == 0 || usize::from(state.pairs_in_use) > self.tap.pairs() {
            return mismatch("the interface had more queues than the tap has");
        }
        let offloads = state.guest_offloads.unwrap_or(0);
        if offloads & !(self.features() & features::GUEST_OFFLOADS) != 0 {
            return mismatch("the guest uses offloads that the tap does not have");
        }
        self.pairs_in_use
            .store(state.pairs_in_use, Ordering::SeqCst);
        self.guest_offloads = state.guest_offloads;
        Ok(())
    }
}
