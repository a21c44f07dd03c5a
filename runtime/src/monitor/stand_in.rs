//! The thread that engines see behind a container's pid.
//!
//! Namespaces and the root directory belong to threads, and what `/proc/PID/ns` and `/proc/PID/root`
//! show of a process are those of its first one. Engines enter them: `podman cp` copies in the mount
//! namespace of the container's process, CNI plugins and Docker's hook take its network namespace.
//! So the monitor's first thread sits where the container's process would, and does nothing else;
//! all work is done by a second one, which stays in the runtime's own namespaces.

use std::{io, panic, sync::mpsc, thread};

/// Something for the first thread to do.
type Task = Box<dyn FnOnce() + Send>;

/// The first thread, as the one that works sees it.
#[derive(Debug)]
pub struct StandIn {
    tasks: mpsc::Sender<Task>,
}

impl StandIn {
    /// Has the first thread do something, and waits for the result.
    ///
    /// # Panics
    ///
    /// When the task panics.
    pub fn run<R: Send + 'static>(&self, task: impl FnOnce() -> R + Send + 'static) -> R {
        let (sender, result) = mpsc::sync_channel(1);
        let task = Box::new(move || {
            // Whoever asked waits for it.
            let _ = sender.send(task());
        });
        // Fails only with the first thread, which then says why.
        let _ = self.tasks.send(task);
        result
            .recv()
            .expect("the first thread does what it is given")
    }
}

/// Does the work in a thread of its own. To be called by the process's first thread, which stands in
/// until that is done.
pub fn beside<R: Send>(work: impl FnOnce(&StandIn) -> R + Send) -> io::Result<R> {
    let (tasks, asked) = mpsc::channel::<Task>();
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("monitor".to_owned())
            .spawn_scoped(scope, move || work(&StandIn { tasks }))?;
        // Ends with the worker, which holds the only sender.
        for task in asked {
            task();
        }
        worker
            .join()
            .or_else(|payload| panic::resume_unwind(payload))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_done_by_the_calling_thread() {
        let first = thread::current().id();
        let (there, here) = beside(|stand_in| {
            let there = stand_in.run(|| thread::current().id());
            (there, thread::current().id())
        })
        .unwrap();
        assert_eq!(there, first);
        assert_ne!(here, first);
    }
}
