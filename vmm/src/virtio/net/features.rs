//! Feature bits of virtio-net (virtio 1.2 §5.1.3), and what they mean for a tap.

use libc::c_uint;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;
pub(super) const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What every tap can.
const ALWAYS: u64 = CSUM
    | GUEST_CSUM
    | CTRL_GUEST_OFFLOADS
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the guest can switch off and on (virtio 1.2 §5.1.6.5.6).
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
/// With one of these packets may come that are larger than the MTU.
const LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;

/// What a device offers with `pairs` pairs of queues, on a host that can segment UDP or not.
pub(super) fn offered(pairs: usize, udp_segmentation: bool) -> u64 {
    let mut features = ALWAYS;
    if pairs > 1 {
        features |= MQ;
    }
    if udp_segmentation {
        features |= GUEST_USO4 | GUEST_USO6 | HOST_USO;
    }
    features
}

/// Whether packets larger than the MTU may be given to the guest.
pub(super) fn large_packets(features: u64) -> bool {
    features & LARGE != 0
}

/// The tap's `TUN_F_*` for what the guest takes.
pub(super) fn tap_offloads(features: u64) -> c_uint {
    // Segmentation builds on checksums (§5.1.3.1), for the kernel too.
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    for (feature, offload) in [
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
    ] {
        if features & feature != 0 {
            offloads |= offload;
        }
    }
    if features & (GUEST_TSO4 | GUEST_TSO6) != 0 && features & GUEST_ECN != 0 {
        offloads |= libc::TUN_F_TSO_ECN;
    }
    // The kernel has the two as one.
    if features & GUEST_USO4 != 0 && features & GUEST_USO6 != 0 {
        offloads |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    offloads
}
