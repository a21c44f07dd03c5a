//! One connection between a guest port and a Unix socket on the host: its states, its half-closes
//! and what the guest has yet to hear of it.
//!
//! ```text
//!  host asks:  Requested ──RESPONSE──▶ Established ──RST with bytes held──▶ Draining ──▶ gone
//!  guest asks: ───────────────────────▶     │ both sides closed, or RST              ▲
//!                                           └────────────────────────────────────────┘
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use vm_memory::VolatileSlice;

use super::backlog::Backlog;
use super::credit::Credit;
use super::packet::{
    HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::sys::guest_io;
use crate::virtio::chain;
use crate::virtio::worker::EventSet;

/// What tells one connection from another: the ports of its two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// What becomes of a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// It is over and the guest knows.
    Remove,
    /// It is over and the guest must be told with RST.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A client on the host asked for the guest's port; the guest has not answered.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest has forgotten the connection; what it sent before still goes to the host.
    Draining,
}

/// Packets without data that the guest must get, soonest first.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// SHUTDOWN flags not told yet.
    shutdown: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    socket: OwnedFd,
    state: State,
    credit: Credit,
    backlog: Backlog,
    owed: Owed,
    /// The guest was told that it is being waited for, and has given no credit since.
    credit_requested: bool,
    /// The socket may hold bytes, or its end.
    readable: bool,
    /// No more bytes for the guest: the host ended its stream or the guest takes no more.
    input_over: bool,
    /// The host takes no more bytes; what the guest still sends is dropped.
    output_over: bool,
    /// The host has closed its end altogether.
    hung_up: bool,
    /// SHUTDOWN flags that the guest was told.
    told_shutdown: u32,
    /// SHUTDOWN flags that the guest sent.
    guest_shutdown: u32,
    /// The host was told that the guest sends no more.
    passed_end: bool,
}

impl Connection {
    /// A client on the host asks for a guest port.
    pub(super) fn to_guest(key: Key, socket: OwnedFd, window: u32) -> Self {
        let mut connection = Self::new(key, socket, window, State::Requested);
        connection.owed.request = true;
        connection
    }

    /// The guest asked for a port on which a host socket listens, and got through to it.
    pub(super) fn from_guest(key: Key, socket: OwnedFd, window: u32, request: &Header) -> Self {
        let mut connection = Self::new(key, socket, window, State::Established);
        connection.owed.response = true;
        connection.readable = true;
        connection.credit.hear(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(key: Key, socket: OwnedFd, window: u32, state: State) -> Self {
        Self {
            key,
            socket,
            state,
            credit: Credit::new(window),
            backlog: Backlog::new(usize::try_from(window).unwrap_or(usize::MAX)),
            owed: Owed::default(),
            credit_requested: false,
            readable: false,
            input_over: false,
            output_over: false,
            hung_up: false,
            told_shutdown: 0,
            guest_shutdown: 0,
            passed_end: false,
        }
    }

    /// The host's end.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Room that it offers the guest.
    pub(super) fn window(&self) -> u32 {
        self.credit.window()
    }

    /// Whether the guest still knows it, so that its ports are taken.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.state != State::Draining
    }

    /// What to wait for on the socket.
    pub(super) fn interest(&self) -> EventSet {
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.backlog.is_empty() {
            events
        } else {
            events | EventSet::OUT
        }
    }

    /// Takes a packet of the guest. `payload` holds as many bytes as the header says.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        operation: Operation,
        payload: &[VolatileSlice<'_>],
    ) -> Verdict {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        if self.credit.may_send() > 0 {
            self.credit_requested = false;
        }
        match (self.state, operation) {
            (State::Requested, Operation::Response) => return self.accepted(),
            (_, Operation::Reset) => return self.forgotten(),
            (State::Established, Operation::ReadWrite) => {
                if !self.take_data(header.len, payload) {
                    return Verdict::Reset;
                }
            }
            (State::Established, Operation::Shutdown) => self.take_shutdown(header.flags),
            (State::Established, Operation::CreditUpdate) => {}
            (State::Established, Operation::CreditRequest) => self.owed.credit_update = true,
            // A second REQUEST or RESPONSE, or anything but an answer to our REQUEST.
            _ => return Verdict::Reset,
        }
        self.settle()
    }

    /// Takes an event of the socket.
    pub(super) fn socket_event(&mut self, events: EventSet) -> Verdict {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            if self.state == State::Requested {
                // Without REQUEST sent the guest knows nothing of it.
                return if self.owed.request {
                    Verdict::Remove
                } else {
                    Verdict::Reset
                };
            }
            self.stop_output();
        }
        if !self.input_over {
            self.readable = true;
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        self.settle()
    }

    /// Whether there is something for the guest.
    pub(super) fn has_work(&self) -> bool {
        self.owes_control()
            || self.may_read() && (self.credit.may_send() > 0 || !self.credit_requested)
            || self.owed.shutdown != 0
    }

    /// Whether there is a packet without data for the guest.
    pub(super) fn owes_control(&self) -> bool {
        let owed = self.owed;
        owed.request
            || owed.response
            || owed.credit_update
            || owed.credit_request
            || self.owes_shutdown()
    }

    /// A SHUTDOWN waits for the data that can be sent before it.
    fn owes_shutdown(&self) -> bool {
        self.owed.shutdown != 0 && !(self.may_read() && self.credit.may_send() > 0)
    }

    /// The next packet without data that the guest must get, as if it were sent.
    pub(super) fn next_control(&mut self, guest_cid: u64) -> Option<Header> {
        let owes_shutdown = self.owes_shutdown();
        let owed = &mut self.owed;
        let mut flags = 0;
        let operation = if std::mem::take(&mut owed.request) {
            Operation::Request
        } else if std::mem::take(&mut owed.response) {
            Operation::Response
        } else if std::mem::take(&mut owed.credit_request) {
            Operation::CreditRequest
        } else if owes_shutdown {
            flags = self.told_shutdown | std::mem::take(&mut owed.shutdown);
            self.told_shutdown = flags;
            Operation::Shutdown
        } else if owed.credit_update {
            Operation::CreditUpdate
        } else {
            return None;
        };
        Some(self.header(guest_cid, operation, flags, 0))
    }

    /// Bytes that may be read from the socket for the guest now. Notes that the guest must be asked
    /// for credit if it gave none.
    pub(super) fn readable_bytes(&mut self) -> usize {
        if !self.may_read() {
            return 0;
        }
        let credit = self.credit.may_send();
        if credit == 0 && !self.credit_requested {
            self.credit_requested = true;
            self.owed.credit_request = true;
        }
        usize::try_from(credit).unwrap_or(usize::MAX)
    }

    /// Reads from the socket straight into guest memory. 0 means that there is nothing now, or no
    /// more.
    pub(super) fn read(&mut self, pieces: &[VolatileSlice<'_>]) -> usize {
        match guest_io::receive(self.socket.as_fd(), pieces) {
            Ok(0) => self.input_ended(),
            Ok(count) => return count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // The host's end broke: there is nothing more to come.
            Err(_) => self.input_ended(),
        }
        0
    }

    /// The header of a packet with `len` bytes that were read for it.
    pub(super) fn data_header(&mut self, guest_cid: u64, len: u32) -> Header {
        self.credit.sent(len);
        self.header(guest_cid, Operation::ReadWrite, 0, len)
    }

    fn header(&mut self, guest_cid: u64, operation: Operation, flags: u32, len: u32) -> Header {
        self.owed.credit_update = false;
        let (buf_alloc, fwd_cnt) = self.credit.tell();
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            socket_type: TYPE_STREAM,
            op: operation.number(),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn may_read(&self) -> bool {
        self.state == State::Established && self.readable && !self.input_over
    }

    /// The guest answered a client on the host: the client hears it on its socket.
    fn accepted(&mut self) -> Verdict {
        let line = format!("OK {}\n", self.key.host_port);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // The first bytes on a new socket always fit; if not, its client is not there any more.
        match send(&self.socket, line.as_bytes(), flags) {
            Ok(count) if count == line.len() => {
                self.state = State::Established;
                self.readable = true;
                Verdict::Keep
            }
            Ok(_) | Err(_) => Verdict::Reset,
        }
    }

    /// The guest reset the connection. Linux does so eight seconds after a close that was not
    /// answered: what it had sent must reach a slow reader all the same.
    fn forgotten(&mut self) -> Verdict {
        if self.backlog.is_empty() {
            return Verdict::Remove;
        }
        self.state = State::Draining;
        self.owed = Owed::default();
        self.guest_shutdown = SHUTDOWN_BOTH;
        self.input_over = true;
        Verdict::Keep
    }

    /// False if the guest broke the rules.
    fn take_data(&mut self, len: u32, payload: &[VolatileSlice<'_>]) -> bool {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || !self.credit.receive(len) {
            return false;
        }
        if self.output_over {
            self.forward(chain::length(payload));
            return true;
        }
        let mut sent = 0;
        if self.backlog.is_empty() {
            sent = match guest_io::send(self.socket.as_fd(), payload) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.forward(chain::length(payload));
                    self.stop_output();
                    return true;
                }
            };
            self.forward(sent);
        }
        if sent == chain::length(payload) {
            return true;
        }
        let mut rest = payload.to_vec();
        chain::advance(&mut rest, sent);
        // Fits: the ring is as large as the credit that was just checked.
        self.backlog.push(&rest)
    }

    fn take_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && !self.input_over {
            self.input_over = true;
            // Writers on the host get EPIPE. Fails only if the host is gone already.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
    }

    /// The host's stream to the guest has ended and all of it was read.
    fn input_ended(&mut self) {
        self.input_over = true;
        self.owe_shutdown(SHUTDOWN_SEND);
        if self.hung_up {
            self.owe_shutdown(SHUTDOWN_RECEIVE);
        }
    }

    /// The host takes no more.
    fn stop_output(&mut self) {
        self.output_over = true;
        self.forward(self.backlog.length());
        self.backlog.clear();
        self.owe_shutdown(SHUTDOWN_RECEIVE);
    }

    fn owe_shutdown(&mut self, flags: u32) {
        self.owed.shutdown |= flags & !self.told_shutdown;
    }

    fn flush(&mut self) {
        match self.backlog.send(self.socket.as_fd()) {
            Ok(count) => self.forward(count),
            Err(_) => self.stop_output(),
        }
    }

    fn forward(&mut self, count: usize) {
        // A window is 32 bits, and no more than a window is held.
        self.credit
            .forward(u32::try_from(count).unwrap_or(u32::MAX));
        if self.credit.owes_update() {
            self.owed.credit_update = true;
        }
    }

    /// Passes the guest's end on once everything before it went out, and ends what is over.
    fn settle(&mut self) -> Verdict {
        if !self.backlog.is_empty() {
            return Verdict::Keep;
        }
        if self.state == State::Draining {
            return Verdict::Remove;
        }
        if self.guest_shutdown == SHUTDOWN_BOTH {
            return Verdict::Reset;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.passed_end {
            self.passed_end = true;
            // Fails only if the host is gone already.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        Verdict::Keep
    }
}

impl Drop for Connection {
    /// A Unix socket closed with unread bytes makes its peer's next read fail with ECONNRESET; the
    /// peer shall see the end of the stream instead.
    fn drop(&mut self) {
        // Fails only if the host is gone already; from here on the host cannot write.
        let _ = shutdown(&self.socket, Shutdown::Both);
        let mut scratch = [0; 4096];
        for _ in 0..MOST_DISCARDED / scratch.len() {
            match recv(&self.socket, &mut scratch, RecvFlags::DONTWAIT) {
                Ok((count, _)) if count > 0 => {}
                _ => break,
            }
        }
    }
}

/// Several times what a socket buffer holds by default.
const MOST_DISCARDED: usize = 1 << 20;
