//! Where every thread of the monitor begins.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// What threads share. A panic of one that held it can only be a test's: the program aborts.
pub fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a virtual CPU, by index.
    Vcpu(u8),
    /// Serves a virtio-blk device, by index.
    Block(u16),
    /// Serves a pair of queues of a virtio-net device, by index of both.
    Network(u16, u16),
    /// Serves virtio-rng.
    Entropy,
    /// Serves virtio-vsock.
    Vsock,
    /// Serves virtio-fs.
    Filesystem,
}

impl Role {
    /// The thread's name as `ps -L` shows it (15 characters at most).
    fn name(self) -> String {
        match self {
            Self::Vcpu(index) => format!("vcpu{index}"),
            Self::Block(index) => format!("blk{index}"),
            Self::Network(index, pair) => format!("net{index}.{pair}"),
            Self::Entropy => "rng".into(),
            Self::Vsock => "vsock".into(),
            Self::Filesystem => "fs".into(),
        }
    }
}

/// Starts a thread.
///
/// This is the one place where a thread's seccomp filter belongs: keyed by `role`, installed on the
/// new thread before `body` runs. The main thread's belongs at the end of `jail::enter`.
pub fn spawn<T: Send + 'static>(
    role: Role,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new()
        .name(role.name())
        .stack_size(STACK)
        .spawn(body)
}

/// Touched pages count, not this; the file server's path walks are the deepest.
const STACK: usize = 1 << 20;
