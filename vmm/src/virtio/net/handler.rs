//! The thread of a pair of queues; that of the first also serves the control queue.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::control::Control;
use super::receive::{self, Receive};
use super::ring::Ring;
use super::tap::Tap;
use super::transmit::{self, Transmit};
use crate::threads::locked;
use crate::virtio::Interrupt;
use crate::virtio::worker::{EventSet, Handler, HandlerError, Poll, signal};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CONTROL: u64 = 2;
const TAP: u64 = 3;
const TIMER: u64 = 4;

/// Where the link's status lies in the configuration space (virtio 1.2 §5.1.4).
const STATUS_OFFSET: u64 = 6;
/// Owns its queues while the device is active.
pub(super) struct PairHandler {
    pub(super) tap: Tap,
    pub(super) pair: usize,
    pub(super) receive: Receive,
    pub(super) transmit: SharedTransmit,
    pub(super) control: Option<Control>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) link: Arc<Link>,
    pub(super) receiving: Receiving,
    /// The tap takes no packets; it says when it does again.
    pub(super) full: bool,
    /// What the tap is watched for.
    pub(super) watched: EventSet,
    /// The tap is not watched any more.
    pub(super) forgotten: bool,
}

/// Shared with the vCPUs' threads.
pub(super) type SharedTransmit = Arc<Mutex<Transmit>>;

/// The driver has notified the transmitting queue, on a vCPU's thread.
pub(super) fn notified(transmit: &Mutex<Transmit>, event: &EventFd) {
    // If the device's thread is at it, it has to look again. Of an error it will hear, too.
    let done = match transmit.try_lock() {
        Ok(mut transmit) => transmit.run_on_vcpu().unwrap_or(false),
        Err(_) => false,
    };
    if !done {
        signal(event);
    }
}

/// Whether the interface is there, as the driver sees it.
pub(super) struct Link(AtomicBool);

impl Link {
    pub(super) fn up() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    pub(super) fn is_up(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn take_down(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}

/// What receiving waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiving {
    /// Nothing, or it is not known.
    Ready,
    /// A packet.
    Packet,
    /// The driver's buffers; there may be packets.
    Buffers,
    /// For good.
    Over,
}

impl Handler for PairHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_event(self.receive.ring().event(), RECEIVE)?;
        let transmit = locked(&self.transmit);
        poll.add_event(transmit.ring().event(), TRANSMIT)?;
        poll.add(transmit.timer(), TIMER, EventSet::IN)?;
        drop(transmit);
        if let Some(control) = &self.control {
            poll.add_event(control.ring().event(), CONTROL)?;
        }
        self.watched = EventSet::IN;
        poll.add(self.queue(), TAP, self.watched)
    }

    fn handle(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), HandlerError> {
        match token {
            RECEIVE => self.buffers_came()?,
            TRANSMIT if !self.full => self.send()?,
            CONTROL => self.control()?,
            TAP => self.tap_changed(events)?,
            TIMER => locked(&self.transmit).expired()?,
            _ => {}
        }
        Ok(self.watch(poll)?)
    }
}

impl PairHandler {
    fn queue(&self) -> BorrowedFd<'_> {
        self.tap.queue(self.pair)
    }

    /// Waits for no more than can be used: packets that nobody takes would come up again and again.
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        if self.receiving == Receiving::Over {
            // Its errors would never end.
            if !self.forgotten {
                self.forgotten = true;
                poll.remove(self.queue())?;
            }
            return Ok(());
        }
        let mut wanted = EventSet::empty();
        if self.receiving != Receiving::Buffers {
            wanted |= EventSet::IN;
        }
        if self.full {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            self.watched = wanted;
            poll.modify(self.queue(), TAP, wanted)?;
        }
        Ok(())
    }

    fn buffers_came(&mut self) -> Result<(), HandlerError> {
        match self.receiving {
            Receiving::Ready | Receiving::Buffers => self.receive(),
            Receiving::Packet | Receiving::Over => Ok(()),
        }
    }

    fn tap_changed(&mut self, events: EventSet) -> Result<(), HandlerError> {
        let failed = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        if self.full && (failed || events.contains(EventSet::OUT)) {
            self.full = false;
            self.send()?;
        }
        if failed && self.receiving == Receiving::Buffers {
            // Whether the driver has buffers or not.
            self.receiving = Receiving::Over;
            return self.tap_is_gone();
        }
        match self.receiving {
            Receiving::Ready | Receiving::Packet => self.receive(),
            Receiving::Buffers | Receiving::Over => Ok(()),
        }
    }

    fn receive(&mut self) -> Result<(), HandlerError> {
        let tap = self.tap.queue(self.pair);
        self.receiving = match self.receive.run(tap, self.interrupt.as_ref())? {
            receive::Stopped::Empty => Receiving::Packet,
            receive::Stopped::Starved => Receiving::Buffers,
            receive::Stopped::Budget => {
                ring_again(self.receive.ring())?;
                Receiving::Ready
            }
            receive::Stopped::Gone => {
                self.tap_is_gone()?;
                Receiving::Over
            }
        };
        Ok(())
    }

    fn send(&mut self) -> Result<(), HandlerError> {
        let mut transmit = locked(&self.transmit);
        match transmit.run()? {
            transmit::Stopped::Empty => {}
            transmit::Stopped::Full => self.full = true,
            transmit::Stopped::Budget => ring_again(transmit.ring())?,
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), HandlerError> {
        if let Some(control) = &mut self.control
            && control.run(self.interrupt.as_ref())?
        {
            ring_again(control.ring())?;
        }
        Ok(())
    }

    /// The host has taken the tap away, alone or with its namespace: to the guest, the cable.
    fn tap_is_gone(&self) -> Result<(), HandlerError> {
        if self.link.take_down() {
            warn!(tap = self.tap.name(), "the tap of an interface is gone");
            self.interrupt
                .configuration_changed(STATUS_OFFSET, &0u16.to_le_bytes())?;
        }
        Ok(())
    }
}

/// There is more to do after other events.
fn ring_again(ring: &Ring) -> io::Result<()> {
    ring.event().write(1)
}
