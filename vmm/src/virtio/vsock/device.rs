//! The vsock device as its transport sees it: features, configuration space, activation, state.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tracing::warn;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use super::handler::VsockHandler;
use super::host::Host;
use super::muxer::Muxer;
use crate::threads::Role;
use crate::virtio::host_connections::HostConnections;
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::state::VsockState;
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, DeviceKind, DeviceState, StateError, VirtioDevice};

/// Receive, transmit and event queue. Linux fills the receive queue with buffers of 4 KiB at once,
/// so that its size is guest memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// VIRTIO_VSOCK_F_STREAM (virtio 1.2 §5.10.3).
const F_STREAM: u64 = 1;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Context ids 0, 1, 2 and 2^32-1 have other meanings, larger ones do not exist
    /// (virtio 1.2 §5.10.4).
    #[error("{0} is no context id for a guest, choose one from 3 to 4294967294")]
    ContextId(u64),
    /// The directory cannot hold the sockets.
    #[error("cannot serve vsock from {directory}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A virtio-vsock device.
pub struct Vsock {
    guest_cid: u64,
    state: State,
    owes_transport_reset: bool,
    /// State was saved: the connections live on if this device is activated again.
    saved: bool,
}

enum State {
    Idle(Box<Muxer>),
    Active(Worker<VsockHandler>),
    /// Its thread could not be started or panicked; the host's sockets are gone with it.
    Lost,
}

impl Vsock {
    /// `listener` is bound to [`super::LISTENER_NAME`] in `directory`, which is the path that leads there
    /// while the device runs. `connections` are those that the guest may come for.
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        directory: &Path,
        connections: HostConnections,
    ) -> Result<Self, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::ContextId(guest_cid));
        }
        let host = Host::new(listener, directory, connections).map_err(|source| {
            VsockError::Directory {
                directory: directory.into(),
                source,
            }
        })?;
        Ok(Self {
            guest_cid,
            state: State::Idle(Box::new(Muxer::new(guest_cid, host))),
            owes_transport_reset: false,
            saved: false,
        })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::config_space::read(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Ok(queues) = activation.queues.try_into() else {
            return Err(lost("the device has three queues"));
        };
        let State::Idle(mut muxer) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(lost("an earlier start of the device failed"));
        };
        if !std::mem::take(&mut self.saved) {
            // A driver that starts anew knows of no connection.
            muxer.clear();
        }
        let handler = VsockHandler {
            memory: activation.memory,
            queues,
            interrupt: activation.interrupt.clone(),
            muxer: *muxer,
            owes_transport_reset: std::mem::take(&mut self.owes_transport_reset),
            log: RateLimit::default(),
        };
        let worker = Worker::spawn(Role::Vsock, handler, activation.interrupt)?;
        self.state = State::Active(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let worker = match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(worker) => worker,
            state => {
                self.state = state;
                return Vec::new();
            }
        };
        let Some(handler) = worker.stop() else {
            warn!("the vsock thread has panicked");
            return Vec::new();
        };
        self.owes_transport_reset = handler.owes_transport_reset;
        self.state = State::Idle(Box::new(handler.muxer));
        handler
            .queues
            .into_iter()
            .map(|active| active.queue)
            .collect()
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        self.saved = true;
        Ok(DeviceState::Vsock(VsockState {
            guest_cid: self.guest_cid,
        }))
    }

    /// The context id may differ from the saved one: the driver reads it again after the transport
    /// reset (virtio 1.2 §5.10.6.7).
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(VsockState { guest_cid: _ }) = state else {
            return Err(StateError::WrongDevice {
                expected: self.kind(),
                found: state.kind(),
            });
        };
        self.owes_transport_reset = true;
        Ok(())
    }
}

fn lost(why: &'static str) -> ActivateError {
    ActivateError::Backend {
        what: "vsock".into(),
        source: io::Error::other(why),
    }
}
