//! Carrying a process's stdio between the host's descriptors and the guest's streams.

mod endpoint;
mod relay;
mod signals;
mod terminal;

pub use relay::{Relay, RelayError};
pub use signals::{Caught, Signals};
pub use terminal::{Console, RawTerminal, TerminalError, send_master, size};
