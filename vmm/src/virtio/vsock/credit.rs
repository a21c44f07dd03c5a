//! Flow control of one connection, both ways (virtio 1.2 §5.10.6.3). All counters are 32 bits and
//! wrap; the guest's may say anything.

/// What each side may still send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credit {
    /// Room that we offered the guest, bytes.
    window: u32,
    /// Bytes that came from the guest.
    received: u32,
    /// Bytes of those that the host took.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    told: u32,
    /// Bytes that we sent to the guest.
    sent: u32,
    /// The guest's `buf_alloc`.
    guest_window: u32,
    /// The guest's `fwd_cnt`.
    guest_forwarded: u32,
}

impl Credit {
    /// Nothing sent, nothing received; the guest has said nothing yet.
    pub(super) fn new(window: u32) -> Self {
        Self {
            window,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
        }
    }

    /// Takes what a packet of the guest says about its buffer.
    pub(super) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_window = buf_alloc;
        self.guest_forwarded = fwd_cnt;
    }

    /// Bytes that we may send. A guest that claims to have taken more than was sent gets nothing.
    pub(super) fn may_send(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_window.saturating_sub(in_flight)
    }

    /// `count` bytes were sent, no more than allowed.
    pub(super) fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// `count` bytes came. False if the guest had no credit for them.
    #[must_use]
    pub(super) fn receive(&mut self, count: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = held
            .checked_add(count)
            .is_some_and(|held| held <= self.window);
        if fits {
            self.received = self.received.wrapping_add(count);
        }
        fits
    }

    /// The host took `count` bytes of what came.
    pub(super) fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// Whether the guest should hear of the room it has: when it believes that less than half of
    /// the window is free while more is.
    pub(super) fn owes_update(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.window / 2
    }

    /// The fields `buf_alloc` and `fwd_cnt` of the packet that is about to be sent.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.window, self.forwarded)
    }

    /// Room offered to the guest.
    pub(super) fn window(&self) -> u32 {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_cannot_exceed_the_window() {
        let mut credit = Credit::new(100);
        assert!(credit.receive(60));
        assert!(!credit.receive(41));
        assert!(credit.receive(40));
        assert!(!credit.receive(1));
        assert!(!credit.receive(u32::MAX));
        credit.forward(50);
        assert!(credit.owes_update());
        assert_eq!(credit.tell(), (100, 50));
        assert!(!credit.owes_update());
        assert!(credit.receive(50));
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit::new(1000);
        credit.hear(4096, 0);
        let mut forwarded = 0u32;
        for _ in 0..2_000_000 {
            assert_eq!(credit.may_send(), 4096);
            credit.sent(4096);
            assert_eq!(credit.may_send(), 0);
            forwarded = forwarded.wrapping_add(4096);
            credit.hear(4096, forwarded);
        }
    }

    #[test]
    fn lies_of_the_guest_give_no_credit() {
        let mut credit = Credit::new(1000);
        credit.hear(4096, 1);
        assert_eq!(credit.may_send(), 0);
        credit.hear(u32::MAX, 1);
        assert_eq!(credit.may_send(), 0);
        credit.hear(10, 0);
        credit.sent(10);
        credit.hear(5, 0);
        assert_eq!(credit.may_send(), 0);
    }
}
