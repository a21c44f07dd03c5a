//! The block device as its transport sees it: features, configuration space, activation, state.

use std::io;

use tracing::warn;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use super::disk::{Disk, Serial};
use super::handler::BlockHandler;
use super::request::{MOST_SECTORS, MOST_SEGMENTS, Server};
use crate::threads::Role;
use crate::virtio::config_space;
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::state::BlockState;
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, DeviceKind, DeviceState, StateError, VirtioDevice};

const QUEUE_SIZE: u16 = 128;
/// Buffers of data in a request: a chain as long as the queue, but for header and status.
const SEG_MAX: u32 = 126;

// Feature bits (virtio 1.2 §5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// A virtio-blk device.
pub struct Block {
    index: u16,
    features: u64,
    config: [u8; CONFIG_SIZE],
    geometry: BlockState,
    state: State,
}

enum State {
    Idle(Box<Server>),
    Active(Worker<BlockHandler>),
    /// Its thread could not be started or panicked; the disk is gone with it.
    Lost,
}

impl Block {
    /// `index` is for the names of threads, and for messages.
    pub fn new(index: u16, serial: Serial, disk: Disk) -> Self {
        Self {
            index,
            features: features(&disk),
            config: config(&disk),
            geometry: BlockState {
                sectors: disk.sectors(),
                read_only: disk.read_only(),
            },
            state: State::Idle(Box::new(Server {
                disk,
                serial,
                write_through: false,
            })),
        }
    }
}

fn features(disk: &Disk) -> u64 {
    let mut features = F_SEG_MAX
        | F_BLK_SIZE
        | F_FLUSH
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    if disk.read_only() {
        features |= F_RO;
    } else {
        features |= F_WRITE_ZEROES;
    }
    if disk.can_discard() {
        features |= F_DISCARD;
    }
    features
}

/// Bytes of `struct virtio_blk_config` up to the fields of the features offered.
const CONFIG_SIZE: usize = 60;

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4).
fn config(disk: &Disk) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &disk.sectors().to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &disk.block_size().to_le_bytes());
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &MOST_SEGMENTS.to_le_bytes());
    put(44, &(disk.block_size() / 512).to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &MOST_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let (State::Idle(mut server), Some(queue)) = (
            std::mem::replace(&mut self.state, State::Lost),
            activation.queues.pop(),
        ) else {
            return Err(ActivateError::Backend {
                what: format!("disk {}", self.index),
                source: io::Error::other("an earlier start of the device failed"),
            });
        };
        server.write_through = activation.features & F_FLUSH == 0;
        let handler = BlockHandler {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt.clone(),
            server: *server,
            log: RateLimit::default(),
        };
        let worker = Worker::spawn(Role::Block(self.index), handler, activation.interrupt)?;
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
            warn!(disk = self.index, "the thread of a disk has panicked");
            return Vec::new();
        };
        self.state = State::Idle(Box::new(handler.server));
        vec![handler.queue.queue]
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Block(self.geometry.clone()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else {
            return Err(StateError::WrongDevice {
                expected: self.kind(),
                found: state.kind(),
            });
        };
        if state != self.geometry {
            return Err(StateError::Mismatch(format!(
                "disk {} was {}, it is {}",
                self.index,
                describe(&state),
                describe(&self.geometry)
            )));
        }
        Ok(())
    }
}

fn describe(state: &BlockState) -> String {
    let access = if state.read_only {
        "read-only"
    } else {
        "writable"
    };
    format!("{access} with {} sectors", state.sectors)
}
