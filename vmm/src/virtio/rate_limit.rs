//! Bounds how much a guest can make us log.

use std::time::{Duration, Instant};

/// Messages in one period.
const MOST: u32 = 10;
/// How long a period lasts.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets the first few messages of each period through.
#[derive(Debug, Default)]
pub struct RateLimit {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl RateLimit {
    /// Whether one more may be logged; if so, with how many were left out since the last that was.
    pub fn allows(&mut self) -> Option<u64> {
        self.allows_at(Instant::now())
    }

    fn allows_at(&mut self, now: Instant) -> Option<u64> {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= PERIOD)
        {
            self.since = Some(now);
            self.said = 0;
        }
        if self.said == MOST {
            self.unsaid = self.unsaid.saturating_add(1);
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_so_many_messages() {
        let mut limit = RateLimit::default();
        let start = Instant::now();
        let said = (0..100)
            .filter(|_| limit.allows_at(start).is_some())
            .count();
        assert_eq!(said, 10);
        assert_eq!(limit.allows_at(start + PERIOD), Some(90));
        assert_eq!(limit.allows_at(start + PERIOD), Some(0));
    }
}
