//! A guest's driver as far as the tests need it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use vm_memory::GuestAddress;

use super::super::Vsock;
use super::super::packet::{HEADER_SIZE, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::virtio::VirtioDevice;
use crate::virtio::host_connections::HostConnections;
use crate::virtio::testing::{Directory, Driver, Random, readable, writable};

pub(super) const CID: u64 = 42;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
const RX_BUFFER: u32 = 4096 + 44;
const TX_BUFFER: u64 = 64 << 10;

pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) driver: Driver,
    directory: Directory,
    /// Where the buffer of each head of the receive queue lies.
    buffers: HashMap<u16, GuestAddress>,
    tx: GuestAddress,
    event: GuestAddress,
    window: u32,
    /// Bytes that each connection received and that the guest took.
    forwarded: HashMap<(u32, u32), u32>,
    automatic: bool,
    next_port: u32,
    first_port: u32,
    paused: Vec<virtio_queue::Queue>,
}

/// A client on the host that asks for a guest port.
pub(super) fn connect_to_guest(guest: &Guest, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(guest.listener_path()).expect("connect");
    client
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .expect("write");
    client
}

impl Guest {
    pub(super) fn new() -> Self {
        let directory = Directory::new();
        let listener = UnixListener::bind(directory.path().join("vsock.sock")).expect("bind");
        let device = Vsock::new(CID, listener, directory.path(), HostConnections::default())
            .expect("device");
        let mut driver = Driver::new(8 << 20, device.queue_sizes());
        let tx = driver.space.take(TX_BUFFER + 4096);
        let event = driver.space.take(4);
        let mut guest = Self {
            device,
            driver,
            directory,
            buffers: HashMap::new(),
            tx,
            event,
            window: 256 << 10,
            forwarded: HashMap::new(),
            automatic: true,
            next_port: 5000,
            first_port: 5000,
            paused: Vec::new(),
        };
        for _ in 0..64 {
            let address = guest.driver.space.take(RX_BUFFER.into());
            guest.post(address);
        }
        guest.driver.queues[2].add(&[writable(event, 4)]);
        let activation = guest.driver.activation(guest.device.features());
        guest.device.activate(activation).expect("activate");
        guest
    }

    /// With a connection that a client on the host made.
    pub(super) fn with_connection() -> (Self, UnixStream, Header) {
        let mut guest = Self::new();
        let mut client = connect_to_guest(&guest, 1024);
        let request = guest.expect(Operation::Request);
        guest.answer(&request, Operation::Response, 0, b"");
        let mut line = [0; 14];
        client.read_exact(&mut line).expect("read");
        assert_eq!(line[..3], *b"OK ");
        (guest, client, request)
    }

    pub(super) fn listener_path(&self) -> PathBuf {
        self.directory.path().join("vsock.sock")
    }

    pub(super) fn host_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("vsock.sock_{port}"))
    }

    fn post(&mut self, address: GuestAddress) {
        let head = self.driver.queues[RX].add(&[writable(address, RX_BUFFER)]);
        self.buffers.insert(head, address);
    }

    /// The next packet for the guest, whatever it is. Its bytes count as taken at once.
    pub(super) fn packet(&mut self) -> (Header, Vec<u8>) {
        let (head, length) = self.driver.wait_used(RX);
        let address = self
            .buffers
            .remove(&head)
            .expect("a buffer that was posted");
        let bytes = self.driver.space.read(address, length as usize);
        self.post(address);
        self.driver.queues[RX].kick();
        let (header, data) = bytes.split_at(HEADER_SIZE);
        let header = Header::parse(header.try_into().expect("a header"));
        assert_eq!(header.dst_cid, CID);
        // An RST comes from whomever the guest wrote to.
        assert!(header.src_cid == HOST_CID || header.op == Operation::Reset.number());
        assert_eq!(header.len as usize, data.len());
        if self.automatic {
            let taken = self.forwarded.entry(ports(&header)).or_default();
            *taken = taken.wrapping_add(header.len);
        }
        (header, data.to_vec())
    }

    /// The next packet, which must be this.
    pub(super) fn expect(&mut self, operation: Operation) -> Header {
        let (header, _) = self.packet();
        assert_eq!(header.op, operation.number(), "{header:?}");
        header
    }

    /// Skips packets until there is this.
    pub(super) fn expect_among_others(&mut self, operation: Operation) -> Header {
        loop {
            let (header, _) = self.packet();
            if header.op == operation.number() {
                return header;
            }
        }
    }

    /// Skips packets until a SHUTDOWN has said all of `flags`.
    pub(super) fn expect_shutdown(&mut self, flags: u32) -> Header {
        loop {
            let header = self.expect_among_others(Operation::Shutdown);
            if header.flags == flags {
                return header;
            }
        }
    }

    /// Asks for a host port from a new port of the guest's.
    pub(super) fn connect(&mut self, host_port: u32) -> u32 {
        let port = self.next_port;
        self.next_port += 1;
        self.request(host_port, port);
        port
    }

    pub(super) fn request(&mut self, host_port: u32, guest_port: u32) {
        let header = Header {
            dst_port: host_port,
            src_port: guest_port,
            op: Operation::Request.number(),
            ..self.header()
        };
        self.send(&header, b"");
    }

    /// Resets the first connection that the guest made to a host port.
    pub(super) fn reset_first(&mut self, host_port: u32) {
        let header = Header {
            dst_port: host_port,
            src_port: self.first_port,
            op: Operation::Reset.number(),
            ..self.header()
        };
        self.send(&header, b"");
    }

    /// Sends on the connection that a packet of the host belongs to.
    pub(super) fn answer(&mut self, to: &Header, operation: Operation, flags: u32, data: &[u8]) {
        let header = Header {
            dst_port: to.src_port,
            src_port: to.dst_port,
            op: operation.number(),
            flags,
            len: u32::try_from(data.len()).expect("small"),
            fwd_cnt: self.forwarded.get(&ports(to)).copied().unwrap_or(0),
            ..self.header()
        };
        self.send(&header, data);
    }

    fn header(&self) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            socket_type: TYPE_STREAM,
            buf_alloc: self.window,
            ..Header::default()
        }
    }

    /// Sends a packet and waits until the device has taken it.
    pub(super) fn send(&mut self, header: &Header, data: &[u8]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(data);
        self.driver.space.write(self.tx, &bytes);
        let length = u32::try_from(bytes.len()).expect("small");
        // Header and data apart, and the header cut in two, as drivers may.
        let pieces = [
            readable(self.tx, 20),
            readable(GuestAddress(self.tx.0 + 20), 24),
            readable(GuestAddress(self.tx.0 + 44), length - 44),
        ];
        let count = if data.is_empty() { 2 } else { 3 };
        let head = self.driver.queues[TX].add(&pieces[..count]);
        self.driver.queues[TX].kick();
        assert_eq!(self.driver.wait_used(TX), (head, 0));
    }

    /// From now on the guest takes nothing.
    pub(super) fn stop_credit(&mut self, request: &Header) {
        self.automatic = false;
        self.window = 0;
        self.answer(request, Operation::CreditUpdate, 0, b"");
    }

    /// From now on the guest has this much room, and does not take what comes by itself.
    pub(super) fn set_window(&mut self, window: u32) {
        self.automatic = false;
        self.window = window;
    }

    /// The guest takes bytes and says so.
    pub(super) fn forward(&mut self, request: &Header, count: u32) {
        *self.forwarded.entry(ports(request)).or_default() += count;
        self.answer(request, Operation::CreditUpdate, 0, b"");
    }

    pub(super) fn pause(&mut self) {
        let queues = self.device.deactivate();
        assert_eq!(queues.len(), 3);
        self.paused = queues;
    }

    pub(super) fn resume(&mut self) {
        let queues = std::mem::take(&mut self.paused);
        let activation = self.driver.again(self.device.features(), queues);
        self.device.activate(activation).expect("activate");
        for queue in &self.driver.queues {
            queue.kick();
        }
    }

    /// The next event of the event queue.
    pub(super) fn event(&mut self) -> Vec<u8> {
        let (_, length) = self.driver.wait_used(2);
        self.driver.space.read(self.event, length as usize)
    }

    /// Receives `total` bytes made by `Random::new(1)` while it sends as many made by
    /// `Random::new(2)`, in packets of `chunk`, each as its credit allows; then ends both ways.
    pub(super) fn echo_bulk(
        &mut self,
        request: &Header,
        total: usize,
        chunk: usize,
    ) -> (usize, usize) {
        let (mut theirs, mut ours) = (Random::new(1), Random::new(2));
        let mut expected = Vec::new();
        let mut bytes = vec![0; chunk];
        let (mut sent, mut received) = (0usize, 0usize);
        let (mut credit, mut ended) = (request.buf_alloc as usize, false);
        while !ended || sent + chunk <= total {
            if sent + chunk <= total && sent + chunk <= credit {
                ours.fill(&mut bytes);
                self.answer(request, Operation::ReadWrite, 0, &bytes);
                sent += chunk;
                if !self.driver_has_packet() {
                    continue;
                }
            }
            let (header, data) = self.packet();
            credit = header.fwd_cnt as usize + header.buf_alloc as usize;
            while expected.len() < data.len() {
                let mut more = vec![0; 48 << 10];
                theirs.fill(&mut more);
                expected.extend(more);
            }
            assert!(expected[..data.len()] == data, "after {received} bytes");
            expected.drain(..data.len());
            received += data.len();
            if received % (128 << 10) < data.len() {
                self.answer(request, Operation::CreditUpdate, 0, b"");
            }
            ended |= header.op == Operation::Shutdown.number();
        }
        self.answer(request, Operation::Shutdown, super::SHUTDOWN_BOTH, b"");
        self.expect_among_others(Operation::Reset);
        (sent, received)
    }

    fn driver_has_packet(&mut self) -> bool {
        self.driver.queues[RX].has_used()
    }
}

fn ports(header: &Header) -> (u32, u32) {
    if header.src_cid == HOST_CID {
        (header.src_port, header.dst_port)
    } else {
        (header.dst_port, header.src_port)
    }
}
