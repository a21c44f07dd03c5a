//! What one chain asks a disk for (virtio 1.2 §5.2.6), and the doing of it.

use vm_memory::VolatileSlice;

use super::disk::{AccessError, Disk, ID_SIZE, Serial};
use crate::virtio::chain::{self, Chain, ChainError};

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_SIZE: usize = 16;
/// Bytes of a `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_SIZE: usize = 16;
/// Segments in a discard or write-zeroes request.
pub(super) const MOST_SEGMENTS: u32 = 32;
/// Sectors of a discard or write-zeroes segment: bounds how long one takes.
pub(super) const MOST_SECTORS: u32 = 1 << 17;

/// What a request came to.
#[derive(Debug)]
pub(super) struct Done {
    /// Bytes written to the chain's buffers.
    pub(super) written: u32,
    /// For the log: why it failed.
    pub(super) error: Option<AccessError>,
}

/// How requests of a driver are to be carried out.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) disk: Disk,
    pub(super) serial: Serial,
    /// The driver cannot flush: every write must be durable when it is answered
    /// (virtio 1.2 §5.2.6.2).
    pub(super) write_through: bool,
}

impl Server {
    /// Carries out what a chain asks for. An error means that the chain has no place for an answer.
    pub(super) fn serve<'m>(&self, chain: Chain<'m>) -> Result<Done, ChainError> {
        let mut parts = Parts::of(chain)?;
        let mut header = [0; HEADER_SIZE];
        if chain::copy_out(&parts.readable, &mut header) < HEADER_SIZE {
            return Err(ChainError::TooShort);
        }
        chain::advance(&mut parts.readable, HEADER_SIZE);
        let (kind, sector) = (number(&header, 0), long(&header, 8));
        let room = chain::length(&parts.writable);
        let outcome = self.carry_out(kind, sector, &mut parts);
        let (status, error) = match outcome {
            Ok(status) => (status, None),
            Err(error) => (STATUS_IOERR, Some(error)),
        };
        parts.status.copy_from(&[status]);
        let data = match kind {
            TYPE_IN if status == STATUS_OK => room,
            TYPE_GET_ID if status == STATUS_OK => room.min(ID_SIZE),
            _ => 0,
        };
        Ok(Done {
            written: u32::try_from(data).unwrap_or(u32::MAX).saturating_add(1),
            error,
        })
    }

    fn carry_out(&self, kind: u32, sector: u64, parts: &mut Parts<'_>) -> Result<u8, AccessError> {
        match kind {
            TYPE_IN => self.disk.read(sector, &mut parts.writable)?,
            TYPE_OUT => {
                self.disk.write(sector, &mut parts.readable)?;
                self.written()?;
            }
            TYPE_FLUSH => self.disk.flush()?,
            TYPE_GET_ID => {
                chain::copy_in(&parts.writable, self.serial.bytes());
            }
            TYPE_DISCARD if self.disk.can_discard() => return self.segments(kind, parts),
            TYPE_WRITE_ZEROES if !self.disk.read_only() => return self.segments(kind, parts),
            _ => return Ok(STATUS_UNSUPP),
        }
        Ok(STATUS_OK)
    }

    /// A discard or write-zeroes request: a list of ranges.
    fn segments(&self, kind: u32, parts: &mut Parts<'_>) -> Result<u8, AccessError> {
        let length = chain::length(&parts.readable);
        let most = SEGMENT_SIZE * MOST_SEGMENTS as usize;
        if length == 0 || length > most || !length.is_multiple_of(SEGMENT_SIZE) {
            return Ok(STATUS_UNSUPP);
        }
        // All are looked at before the first is carried out.
        let mut segments = Vec::with_capacity(length / SEGMENT_SIZE);
        while !parts.readable.is_empty() {
            let mut bytes = [0; SEGMENT_SIZE];
            chain::copy_out(&parts.readable, &mut bytes);
            chain::advance(&mut parts.readable, SEGMENT_SIZE);
            let (sector, count, flags) = (long(&bytes, 0), number(&bytes, 8), number(&bytes, 12));
            let unmap = flags & 1 != 0;
            // Unmap has no meaning in a discard, other flags have none at all
            // (virtio 1.2 §5.2.6.2).
            if flags > 1 || unmap && kind == TYPE_DISCARD {
                return Ok(STATUS_UNSUPP);
            }
            if count > MOST_SECTORS {
                return Err(AccessError::OutOfRange {
                    sector,
                    count: u64::from(count),
                });
            }
            segments.push((sector, u64::from(count), unmap));
        }
        for (sector, count, unmap) in segments {
            if count == 0 {
                continue;
            }
            if kind == TYPE_DISCARD {
                self.disk.discard(sector, count)?;
            } else {
                self.disk.write_zeroes(sector, count, unmap)?;
            }
        }
        self.written()?;
        Ok(STATUS_OK)
    }

    fn written(&self) -> Result<(), AccessError> {
        if self.write_through {
            self.disk.flush()?;
        }
        Ok(())
    }
}

/// A chain taken apart: what the device reads, what it writes, and the last writable byte.
struct Parts<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
}

impl<'m> Parts<'m> {
    fn of(chain: Chain<'m>) -> Result<Self, ChainError> {
        let (mut readable, mut writable) = (Vec::new(), Vec::<VolatileSlice<'m>>::new());
        chain.walk(|piece, may_write| {
            if may_write {
                writable.push(piece);
            } else if writable.is_empty() {
                readable.push(piece);
            } else {
                // Readable buffers come first (virtio 1.2 §2.7.4.2).
                return Err(ChainError::WrongDirection);
            }
            Ok(())
        })?;
        let last = writable.pop().ok_or(ChainError::TooShort)?;
        // Pieces are never empty.
        let (data, status) = last
            .len()
            .checked_sub(1)
            .and_then(|end| Some((last.subslice(0, end).ok()?, last.offset(end).ok()?)))
            .ok_or(ChainError::TooShort)?;
        if !data.is_empty() {
            writable.push(data);
        }
        Ok(Self {
            readable,
            writable,
            status,
        })
    }
}

fn number(bytes: &[u8; 16], offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}

fn long(bytes: &[u8; 16], offset: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}
