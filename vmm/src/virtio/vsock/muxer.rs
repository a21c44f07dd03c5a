//! Which connection a packet or a socket's event belongs to, and the making and ending of
//! connections: the host's side of the device. Knows no queues.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};

use tracing::{debug, warn};
use vm_memory::VolatileSlice;

use super::connection::{Connection, Key, Verdict};
use super::host::{self, Greeting, Host};
use super::packet::{HOST_CID, Header, Operation, TYPE_STREAM};
use crate::virtio::host_connections;
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::{EventSet, Poll};

/// Connections and greetings at a time.
const MOST_CONNECTIONS: usize = 1024;
/// RSTs that may wait for receive buffers; when there are more, no more packets are taken.
const MOST_RESETS: usize = 64;
/// Room offered to the guest on a connection while few are open, bytes.
const LARGE_WINDOW: u32 = 256 << 10;
/// How many connections get it: all backlogs together stay below 32 MiB.
const MOST_LARGE_WINDOWS: usize = 64;
/// Room on the others.
const SMALL_WINDOW: u32 = 16 << 10;
/// Host ports of connections that the host asks for begin here.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Token of the listener.
pub(super) const LISTENER: u64 = 3;
/// Tokens from here on are places in the table.
const FIRST_PLACE: u64 = 16;

/// What a place in the table holds.
#[derive(Debug)]
enum Entry {
    /// A client that has not yet named the port.
    Greeting(Greeting),
    Connection(Box<Connection>),
}

/// A place in the table. The generation tells the events of its earlier tenants.
#[derive(Debug)]
struct Place {
    generation: u32,
    entry: Option<Entry>,
    /// What the socket is watched for.
    watched: EventSet,
    /// In the list of those with something for the guest.
    queued: bool,
}

impl Place {
    fn new() -> Self {
        Self {
            generation: 0,
            entry: None,
            watched: EventSet::empty(),
            queued: false,
        }
    }
}

/// All connections.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    host: Host,
    places: Vec<Place>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    large_windows: usize,
    next_host_port: u32,
    /// A client could not be accepted; to be tried again when a place is free.
    accept_later: bool,
    log: RateLimit,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, host: Host) -> Self {
        Self {
            guest_cid,
            host,
            places: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            large_windows: 0,
            next_host_port: FIRST_HOST_PORT,
            accept_later: false,
            log: RateLimit::default(),
        }
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Ends every connection without a word to the guest.
    pub(super) fn clear(&mut self) {
        self.resets.clear();
        self.ready.clear();
        for index in 0..self.places.len() {
            if let Ok(index) = u32::try_from(index) {
                self.take_out(index);
            }
        }
    }

    /// Begins to watch the listener and the sockets of connections that live on.
    pub(super) fn register(&mut self, poll: &Poll) -> std::io::Result<()> {
        poll.add(
            self.host.listener.as_fd(),
            LISTENER,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        )?;
        for (index, place) in self.places.iter_mut().enumerate() {
            let Some(entry) = &place.entry else { continue };
            let (socket, events) = entry.interest();
            poll.add(socket, token(index as u64, place.generation), events)?;
            place.watched = events;
        }
        Ok(())
    }

    /// A client waits at the listener. All that wait are taken.
    pub(super) fn accept(&mut self, poll: &Poll) {
        self.accept_later = false;
        loop {
            if self.open() >= MOST_CONNECTIONS {
                self.accept_later = true;
                return;
            }
            match self.host.accept() {
                Ok(Some(socket)) => {
                    let entry = Entry::Greeting(Greeting::new(socket));
                    if let Err(error) = self.put_in(poll, entry) {
                        warn!(%error, "cannot serve a client of the vsock socket");
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    warn!(%error, "cannot accept a client of the vsock socket");
                    self.accept_later = true;
                    return;
                }
            }
        }
    }

    /// Something happened at the socket of the place that the token names, if it is still so.
    pub(super) fn socket_event(&mut self, poll: &Poll, token: u64, events: EventSet) {
        let Some(index) = self.find(token) else {
            return;
        };
        let place = &mut self.places[index as usize];
        match &mut place.entry {
            Some(Entry::Greeting(greeting)) => match greeting.read() {
                host::Read::More => {}
                host::Read::Refused => self.take_out_and_accept(poll, index),
                host::Read::Port(port) => self.request(poll, index, port),
            },
            Some(Entry::Connection(connection)) => {
                let verdict = connection.socket_event(events);
                self.judge(poll, index, verdict);
            }
            None => {}
        }
    }

    /// Takes a packet of the guest; `payload` holds as many bytes as the header says.
    pub(super) fn packet(&mut self, poll: &Poll, header: &Header, payload: &[VolatileSlice<'_>]) {
        if header.src_cid != self.guest_cid {
            // Not from this guest: there is no one to answer.
            self.complain("a packet with a foreign source", header);
            return;
        }
        let operation = Operation::from_number(header.op);
        let (Some(operation), HOST_CID, TYPE_STREAM) =
            (operation, header.dst_cid, header.socket_type)
        else {
            self.complain("a packet that is not for a stream to the host", header);
            self.refuse(header);
            return;
        };
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        match (self.by_key.get(&key).copied(), operation) {
            (Some(index), _) => {
                if let Some(Entry::Connection(connection)) = &mut self.places[index as usize].entry
                {
                    let verdict = connection.receive(header, operation, payload);
                    self.judge(poll, index, verdict);
                }
            }
            (None, Operation::Request) => self.connect(poll, key, header),
            (None, _) => self.refuse(header),
        }
    }

    /// Whether another packet may be taken: each may owe the guest an RST.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// Whether there is anything for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The RST that waits longest.
    pub(super) fn next_reset(&self) -> Option<&Header> {
        self.resets.front()
    }

    /// That RST was sent.
    pub(super) fn reset_sent(&mut self) {
        self.resets.pop_front();
    }

    /// The connection whose turn it is.
    pub(super) fn next_ready(&mut self) -> Option<&mut Connection> {
        let index = *self.ready.front()?;
        match &mut self.places[index as usize].entry {
            Some(Entry::Connection(connection)) => Some(connection),
            _ => None,
        }
    }

    /// The connection had its turn: it queues again if it has more.
    pub(super) fn turn_over(&mut self) {
        let Some(index) = self.ready.pop_front() else {
            return;
        };
        self.places[index as usize].queued = false;
        self.enqueue(index);
    }

    fn open(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// The client at `index` asked for a guest port.
    fn request(&mut self, poll: &Poll, index: u32, guest_port: u32) {
        let Some(Entry::Greeting(greeting)) = self.places[index as usize].entry.take() else {
            return;
        };
        let key = self.free_key(guest_port);
        let connection = Connection::to_guest(key, greeting.into_socket(), self.window());
        debug!(?key, "a client asks for a guest port");
        self.install(index, connection);
        self.judge(poll, index, Verdict::Keep);
    }

    /// The guest asked for a host port.
    fn connect(&mut self, poll: &Poll, key: Key, request: &Header) {
        if self.open() >= MOST_CONNECTIONS {
            self.complain("more connections than there may be", request);
            self.refuse(request);
            return;
        }
        let socket = match self.host.connect(key.host_port) {
            Ok(socket) => socket,
            Err(error) => {
                debug!(?key, %error, "the guest asks for a port where no one listens");
                self.refuse(request);
                return;
            }
        };
        debug!(?key, "the guest asks for a host port");
        let connection = Connection::from_guest(key, socket, self.window(), request);
        match self.put_in(poll, Entry::Connection(Box::new(connection))) {
            Ok(index) => {
                self.by_key.insert(key, index);
                self.enqueue(index);
            }
            Err(error) => {
                warn!(%error, "cannot serve a connection of the guest");
                self.refuse(request);
            }
        }
    }

    fn install(&mut self, index: u32, connection: Connection) {
        self.by_key.insert(connection.key, index);
        if connection.window() == LARGE_WINDOW {
            self.large_windows += 1;
        }
        self.places[index as usize].entry = Some(Entry::Connection(Box::new(connection)));
    }

    /// A host port that makes a key with the guest's port that is not in use.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_host_port;
            self.next_host_port = if host_port + 1 < host_connections::FIRST_PORT {
                host_port + 1
            } else {
                FIRST_HOST_PORT
            };
            let key = Key {
                host_port,
                guest_port,
            };
            // Ends, as there are fewer connections than ports.
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    fn window(&self) -> u32 {
        if self.large_windows < MOST_LARGE_WINDOWS {
            LARGE_WINDOW
        } else {
            SMALL_WINDOW
        }
    }

    /// Applies what an event made of the connection at `index`.
    fn judge(&mut self, poll: &Poll, index: u32, verdict: Verdict) {
        let place = &mut self.places[index as usize];
        let Some(Entry::Connection(connection)) = &mut place.entry else {
            return;
        };
        match verdict {
            Verdict::Keep => {
                if !connection.is_known_to_guest() {
                    self.by_key.remove(&connection.key);
                }
                let interest = connection.interest();
                if interest != place.watched {
                    place.watched = interest;
                    let token = token(index.into(), place.generation);
                    if let Err(error) = poll.modify(connection.socket(), token, interest) {
                        warn!(%error, "cannot watch a connection's socket");
                    }
                }
                self.enqueue(index);
            }
            Verdict::Remove => self.take_out_and_accept(poll, index),
            Verdict::Reset => {
                let header = reset(self.guest_cid, connection.key);
                self.resets.push_back(header);
                self.take_out_and_accept(poll, index);
            }
        }
    }

    /// Queues the connection if it has something for the guest and is not queued yet.
    fn enqueue(&mut self, index: u32) {
        let place = &mut self.places[index as usize];
        if let Some(Entry::Connection(connection)) = &place.entry
            && !place.queued
            && connection.has_work()
        {
            place.queued = true;
            self.ready.push_back(index);
        }
    }

    /// Answers a packet with RST. There is none for an RST (virtio 1.2 §5.10.6.6.1).
    fn refuse(&mut self, header: &Header) {
        if header.op == Operation::Reset.number() {
            return;
        }
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: self.guest_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            socket_type: header.socket_type,
            op: Operation::Reset.number(),
            ..Header::default()
        });
    }

    fn put_in(&mut self, poll: &Poll, entry: Entry) -> std::io::Result<u32> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.places.push(Place::new());
                u32::try_from(self.places.len() - 1).map_err(std::io::Error::other)?
            }
        };
        let place = &mut self.places[index as usize];
        let (socket, events) = entry.interest();
        if let Err(error) = poll.add(socket, token(index.into(), place.generation), events) {
            self.free.push(index);
            return Err(error);
        }
        place.watched = events;
        if let Entry::Connection(connection) = &entry
            && connection.window() == LARGE_WINDOW
        {
            self.large_windows += 1;
        }
        place.entry = Some(entry);
        Ok(index)
    }

    /// Empties a place; its socket is closed, which also ends watching it.
    fn take_out(&mut self, index: u32) {
        let place = &mut self.places[index as usize];
        let Some(entry) = place.entry.take() else {
            return;
        };
        place.generation = (place.generation + 1) & LAST_GENERATION;
        if std::mem::take(&mut place.queued) {
            self.ready.retain(|queued| *queued != index);
        }
        self.free.push(index);
        if let Entry::Connection(connection) = entry {
            if connection.is_known_to_guest() {
                self.by_key.remove(&connection.key);
            }
            if connection.window() == LARGE_WINDOW {
                self.large_windows -= 1;
            }
        }
    }

    fn take_out_and_accept(&mut self, poll: &Poll, index: u32) {
        self.take_out(index);
        if self.accept_later {
            self.accept(poll);
        }
    }

    fn find(&self, token: u64) -> Option<u32> {
        let (index, generation) = place_of(token)?;
        let place = self.places.get(index as usize)?;
        (place.generation == generation).then_some(index)
    }

    fn complain(&mut self, what: &str, header: &Header) {
        if let Some(unsaid) = self.log.allows() {
            warn!(?header, unsaid, "the guest sent {what}");
        }
    }
}

impl Entry {
    fn interest(&self) -> (BorrowedFd<'_>, EventSet) {
        match self {
            Self::Greeting(greeting) => (
                greeting.socket(),
                EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
            ),
            Self::Connection(connection) => (connection.socket(), connection.interest()),
        }
    }
}

fn reset(guest_cid: u64, key: Key) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: key.host_port,
        dst_port: key.guest_port,
        socket_type: TYPE_STREAM,
        op: Operation::Reset.number(),
        ..Header::default()
    }
}

/// Keeps tokens below the one that the worker reserves.
const LAST_GENERATION: u32 = (1 << 31) - 1;

fn token(index: u64, generation: u32) -> u64 {
    u64::from(generation) << 32 | (index + FIRST_PLACE)
}

fn place_of(token: u64) -> Option<(u32, u32)> {
    let index = (token & u64::from(u32::MAX)).checked_sub(FIRST_PLACE)?;
    Some((u32::try_from(index).ok()?, u32::try_from(token >> 32).ok()?))
}
