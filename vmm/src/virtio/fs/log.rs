//! Passes the messages of the file server's library on to our log.

use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};
use tracing::{debug, error, warn};

use crate::virtio::rate_limit::RateLimit;

/// The guest can provoke most of what the library says.
struct Bridge(Mutex<RateLimit>);

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let mut limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(unsaid) = limit.allows() else {
            return;
        };
        let (source, message) = (record.target(), record.args());
        match record.level() {
            Level::Error => error!(source, unsaid, "{message}"),
            Level::Warn => warn!(source, unsaid, "{message}"),
            _ => debug!(source, unsaid, "{message}"),
        }
    }

    fn flush(&self) {}
}

/// Begins to pass messages on: warnings and errors. A program that has set a logger keeps it.
pub(super) fn install() {
    static BRIDGE: std::sync::OnceLock<Bridge> = std::sync::OnceLock::new();
    let bridge = BRIDGE.get_or_init(|| Bridge(Mutex::default()));
    if log::set_logger(bridge).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
