//! What virtio-queue does with a queue's rings (virtio 1.2 §2.7), for rings that lie in one region of guest
//! memory: found once for each step rather than once for each number, which took longer than many a request.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};

use super::chain::one_piece;

/// Flags and index, before the entries of either ring.
const HEADER: usize = 4;
const INDEX: usize = 2;
/// An entry of the available and of the used ring.
const AVAILABLE: usize = 2;
const USED: usize = 8;
/// The number behind the entries of either, by which notifications are asked for (§2.7.7, §2.7.10).
const EVENT: usize = 2;

fn available<'m>(queue: &Queue, memory: &'m GuestMemoryMmap) -> Option<VolatileSlice<'m>> {
    let length = HEADER + usize::from(queue.size()) * AVAILABLE + EVENT;
    one_piece(memory, GuestAddress(queue.avail_ring()), length)
}

fn used<'m>(queue: &Queue, memory: &'m GuestMemoryMmap) -> Option<VolatileSlice<'m>> {
    let length = HEADER + usize::from(queue.size()) * USED + EVENT;
    one_piece(memory, GuestAddress(queue.used_ring()), length)
}

fn load(ring: VolatileSlice<'_>, at: usize, order: Ordering) -> Option<u16> {
    ring.load(at, order).ok().map(u16::from_le)
}

/// The head of the next chain that the driver made available.
pub(super) fn next(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<Option<u16>, Error> {
    let (size, at) = (queue.size(), queue.next_avail());
    if !queue.ready() || queue.avail_ring() == 0 {
        return Err(Error::QueueNotReady);
    }
    let seen = || {
        let ring = available(queue, memory)?;
        let index = load(ring, INDEX, Ordering::Acquire)?;
        let entry = HEADER + usize::from(at.checked_rem(size)?) * AVAILABLE;
        Some((index, load(ring, entry, Ordering::Relaxed)?))
    };
    let Some((index, head)) = seen() else {
        let chain = queue.iter(memory)?.next();
        return Ok(chain.map(|chain| chain.head_index()));
    };
    let waiting = index.wrapping_sub(at);
    if waiting > size {
        return Err(Error::InvalidAvailRingIndex);
    }
    if waiting == 0 {
        return Ok(None);
    }
    queue.set_next_avail(at.wrapping_add(1));
    Ok(Some(head))
}

/// Gives a chain back, of which so many bytes were written; says whether the driver wants to be notified. To be used
/// alone, not along with the library's `add_used`, which counts.
pub(super) fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    written: u32,
) -> Result<bool, Error> {
    let (size, at) = (queue.size(), queue.next_used());
    if head >= size {
        return Err(Error::InvalidDescriptorIndex);
    }
    let next = at.wrapping_add(1);
    let store = || {
        let ring = used(queue, memory)?;
        let entry = HEADER + usize::from(at.checked_rem(size)?) * USED;
        ring.store(u32::from(head).to_le(), entry, Ordering::Relaxed)
            .ok()?;
        ring.store(written.to_le(), entry + 4, Ordering::Relaxed)
            .ok()?;
        ring.store(next.to_le(), INDEX, Ordering::Release).ok()
    };
    if store().is_none() {
        queue.add_used(memory, head, written)?;
        return queue.needs_notification(memory);
    }
    queue.set_next_used(next);
    // All that was stored is there before the driver's wish is read.
    fence(Ordering::SeqCst);
    if !queue.event_idx_enabled() {
        return queue.needs_notification(memory);
    }
    let wish = available(queue, memory)
        .and_then(|ring| load(ring, ring.len() - EVENT, Ordering::Relaxed))
        .ok_or(Error::AddressOverflow)?;
    Ok(wish == at)
}

/// Asks the driver to notify of the next chain; says whether there is one already.
pub(super) fn ask_for_notification(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
) -> Result<bool, Error> {
    let at = queue.next_avail();
    let ask = || {
        let ring = used(queue, memory).filter(|_| queue.event_idx_enabled())?;
        ring.store(at.to_le(), ring.len() - EVENT, Ordering::Relaxed)
            .ok()?;
        // Either the driver sees this, or its chain is seen here.
        fence(Ordering::SeqCst);
        load(available(queue, memory)?, INDEX, Ordering::Relaxed)
    };
    match ask() {
        Some(index) => Ok(index != at),
        None => queue.enable_notification(memory),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemory;

    use super::*;

    const AVAILABLE_AT: u64 = 0x1000;
    const USED_AT: u64 = 0x2000;
    const SIZE: u16 = 8;

    /// A queue, in memory of so many regions.
    fn queue(regions: &[(GuestAddress, usize)]) -> (Queue, GuestMemoryMmap) {
        use virtio_queue::QueueT;
        let memory = GuestMemoryMmap::from_ranges(regions).expect("memory");
        let mut queue = Queue::new(SIZE).expect("queue");
        queue.set_avail_ring_address(Some(0x1000), Some(0));
        queue.set_used_ring_address(Some(0x2000), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        (queue, memory)
    }

    fn put(memory: &GuestMemoryMmap, at: u64, value: u16) {
        memory.write_obj(value, GuestAddress(at)).expect("write");
    }

    fn get(memory: &GuestMemoryMmap, at: u64) -> u16 {
        memory.read_obj(GuestAddress(at)).expect("read")
    }

    /// In one region, and with a boundary within each ring, where the library does it.
    fn everywhere(test: impl Fn(Queue, GuestMemoryMmap)) {
        let whole = [(GuestAddress(0), 0x4000)];
        let parts = [(0, 0x1006), (0x1006, 0x1000), (0x2006, 0x1ffa)];
        let parts = parts.map(|(start, length)| (GuestAddress(start), length));
        for regions in [&whole[..], &parts[..]] {
            let (queue, memory) = queue(regions);
            test(queue, memory);
        }
    }

    #[test]
    fn chains_come_in_order_and_only_once() {
        everywhere(|mut queue, memory| {
            assert_eq!(next(&mut queue, &memory).expect("next"), None);
            for (index, head) in (0..).zip([5, 3, 5]) {
                put(&memory, AVAILABLE_AT + 4 + 2 * index, head);
            }
            put(&memory, AVAILABLE_AT + 2, 3);
            for head in [Some(5), Some(3), Some(5), None] {
                assert_eq!(next(&mut queue, &memory).expect("next"), head);
            }
        });
    }

    #[test]
    fn a_driver_that_claims_too_much_is_found_out() {
        everywhere(|mut queue, memory| {
            put(&memory, AVAILABLE_AT + 2, SIZE + 1);
            let error = next(&mut queue, &memory).expect_err("too many");
            assert!(matches!(error, Error::InvalidAvailRingIndex), "{error}");
            let error = give_back(&mut queue, &memory, SIZE, 0).expect_err("no such chain");
            assert!(matches!(error, Error::InvalidDescriptorIndex), "{error}");
            queue.set_ready(false);
            let error = next(&mut queue, &memory).expect_err("not ready");
            assert!(matches!(error, Error::QueueNotReady), "{error}");
        });
    }

    #[test]
    fn the_driver_is_notified_where_it_wishes() {
        everywhere(|mut queue, memory| {
            let wish = AVAILABLE_AT + 4 + 2 * u64::from(SIZE);
            put(&memory, wish, 1);
            let told: Vec<_> = (0..3)
                .map(|head| give_back(&mut queue, &memory, head, 7).expect("give back"))
                .collect();
            assert_eq!(told, [false, true, false]);
            assert_eq!(get(&memory, USED_AT + 2), 3);
            for head in 0..3 {
                let entry = USED_AT + 4 + 8 * u64::from(head);
                assert_eq!(get(&memory, entry), head);
                assert_eq!(get(&memory, entry + 4), 7);
            }
        });
    }

    #[test]
    fn what_came_meanwhile_is_not_missed() {
        everywhere(|mut queue, memory| {
            assert!(!ask_for_notification(&mut queue, &memory).expect("ask"));
            put(&memory, AVAILABLE_AT + 2, 1);
            assert!(ask_for_notification(&mut queue, &memory).expect("ask"));
            next(&mut queue, &memory).expect("next");
            assert!(!ask_for_notification(&mut queue, &memory).expect("ask"));
            let wish = USED_AT + 4 + 8 * u64::from(SIZE);
            assert_eq!(get(&memory, wish), 1);
            assert!(memory.check_range(GuestAddress(USED_AT), 0x100));
        });
    }
}
