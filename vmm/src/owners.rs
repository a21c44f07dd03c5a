//! Those who own the VM: the process that has started it, and others that have joined it since, each
//! with a control connection of its own. The VM lives until the last of them has gone.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{SocketFlags, accept_with};
use tracing::{info, warn};

use crate::config::VmEvent;
use crate::control::{Control, ControlError, Received};
use crate::failure::Chain;

/// Owners at a time; a pod has a few containers.
const MOST_OWNERS: usize = 256;

/// Tells one owner from those before and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnerId(u64);

#[cfg(test)]
impl OwnerId {
    /// One of this number.
    pub fn of(number: u64) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
struct Owner {
    id: OwnerId,
    control: Control,
}

/// All owners.
#[derive(Debug)]
pub struct Owners {
    /// Never empty before the VM's end.
    owners: Vec<Owner>,
    /// Where others join.
    listener: Option<UnixListener>,
    next: u64,
}

impl Owners {
    /// The one who has started the VM.
    pub fn new(control: Control) -> Self {
        let id = OwnerId(0);
        Self {
            owners: vec![Owner { id, control }],
            listener: None,
            next: 1,
        }
    }

    /// The connection of the one who has started the VM; to be used before anybody can join.
    pub fn starter(&mut self) -> &mut Control {
        &mut self.owners[0].control
    }

    /// Lets others join.
    pub fn listen(&mut self, listener: UnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// What to wait for: each owner, then the listener. [`Owners::serve`] takes what is found.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        let owners = self.owners.iter().map(|owner| owner.control.as_fd());
        owners.chain(self.listener.iter().map(AsFd::as_fd))
    }

    /// Reads from those descriptors that are readable, given in the order of
    /// [`Owners::descriptors`]. Fails when the last owner has gone.
    pub fn serve(&mut self, readable: &[bool]) -> Result<(), ControlError> {
        let mut gone = Vec::new();
        for (owner, _) in self
            .owners
            .iter_mut()
            .zip(readable)
            .filter(|(_, readable)| **readable)
        {
            if let Err(error) = owner.control.fill() {
                gone.push((owner.id, error));
            }
        }
        // One who joins while the last other leaves keeps the VM alive.
        if readable.get(self.owners.len()) == Some(&true) {
            self.accept();
        }
        for (id, error) in gone {
            self.part(id, error)?;
        }
        Ok(())
    }

    /// The next command that was read already, and whose it is.
    pub fn next_command(&mut self) -> Result<Option<(OwnerId, Received)>, ControlError> {
        let mut index = 0;
        while let Some(owner) = self.owners.get_mut(index) {
            match owner.control.next_command() {
                Ok(Some(received)) => return Ok(Some((owner.id, received))),
                Ok(None) => index += 1,
                Err(error) => {
                    let id = owner.id;
                    self.part(id, error)?;
                }
            }
        }
        Ok(None)
    }

    /// Answers an owner. One who does not listen any more has gone.
    pub fn answer(&mut self, id: OwnerId, event: &VmEvent) -> Result<(), ControlError> {
        let Some(owner) = self.owners.iter_mut().find(|owner| owner.id == id) else {
            return Ok(());
        };
        match owner.control.send(event) {
            Ok(()) => Ok(()),
            Err(error) => self.part(id, error),
        }
    }

    /// Parts with an owner whose connection has failed. The error comes back if it was the last.
    pub fn part(&mut self, id: OwnerId, error: ControlError) -> Result<(), ControlError> {
        if self.is_last(id) {
            return Err(error);
        }
        match error {
            ControlError::Closed => info!("an owner has left"),
            error => warn!(error = %Chain(&error), "the connection of an owner is closed"),
        }
        self.owners.retain(|owner| owner.id != id);
        Ok(())
    }

    /// Whether there is no other owner.
    pub fn is_last(&self, id: OwnerId) -> bool {
        self.owners.iter().all(|owner| owner.id == id)
    }

    /// Whether this owner is still there.
    pub fn contains(&self, id: OwnerId) -> bool {
        self.owners.iter().any(|owner| owner.id == id)
    }

    /// Tells all owners of the VM's end.
    pub fn announce(&mut self, event: &VmEvent) {
        for owner in &mut self.owners {
            if let Err(error) = owner.control.send(event) {
                warn!(error = %Chain(&error), "cannot report the end of the VM");
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) if self.owners.len() < MOST_OWNERS => {
                let mut control = Control::new(UnixStream::from(socket));
                let id = OwnerId(self.next);
                self.next += 1;
                if control.send(&VmEvent::Joined).is_ok() {
                    info!("an owner has joined");
                    self.owners.push(Owner { id, control });
                }
            }
            Ok(_) => warn!("nobody else can join the VM: it has {MOST_OWNERS} owners"),
            // Whoever asked has gone.
            Err(error) => info!(%error, "nobody has joined"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::*;
    use crate::config::VmCommand;
    use crate::virtio::testing::Directory;

    struct Fixture {
        owners: Owners,
        starter: UnixStream,
        directory: Directory,
    }

    impl Fixture {
        fn new() -> Self {
            let (ours, starter) = UnixStream::pair().expect("pair");
            let directory = Directory::new();
            let mut owners = Owners::new(Control::new(ours));
            let listener = UnixListener::bind(directory.path().join("c")).expect("bind");
            owners.listen(listener).expect("listen");
            Self {
                owners,
                starter,
                directory,
            }
        }

        fn join(&mut self) -> UnixStream {
            let joined = UnixStream::connect(self.directory.path().join("c")).expect("connect");
            let mut readable = vec![false; self.owners.owners.len()];
            readable.push(true);
            self.owners.serve(&readable).expect("served");
            let mut line = String::new();
            BufReader::new(&joined).read_line(&mut line).expect("read");
            assert_eq!(line, "{\"event\":\"joined\"}\n");
            joined
        }
    }

    #[test]
    fn the_vm_lives_until_the_last_has_gone() {
        let mut fixture = Fixture::new();
        let second = fixture.join();
        let third = fixture.join();
        drop(fixture.starter);
        fixture.owners.serve(&[true, false, false]).expect("two");
        drop(third);
        fixture.owners.serve(&[false, true]).expect("one");
        assert!(fixture.owners.is_last(OwnerId(1)));
        drop(second);
        let end = fixture.owners.serve(&[true]).expect_err("none");
        assert!(matches!(end, ControlError::Closed));
    }

    #[test]
    fn commands_are_told_apart_and_answered() {
        let mut fixture = Fixture::new();
        let mut second = fixture.join();
        second
            .write_all(b"{\"command\":\"stop\"}\n")
            .expect("write");
        fixture.owners.serve(&[false, true]).expect("served");
        let (id, received) = fixture.owners.next_command().expect("ok").expect("one");
        assert_eq!((id, received.command), (OwnerId(1), VmCommand::Stop));
        assert!(!fixture.owners.is_last(id));
        fixture.owners.answer(id, &VmEvent::Shared).expect("answer");
        let mut line = String::new();
        BufReader::new(&second).read_line(&mut line).expect("read");
        assert_eq!(line, "{\"event\":\"shared\"}\n");
        // Nonsense ends the connection of whoever talks it, and nobody else's.
        second.write_all(b"nonsense\n").expect("write");
        fixture.owners.serve(&[false, true]).expect("served");
        assert!(fixture.owners.next_command().expect("ok").is_none());
        assert!(fixture.owners.is_last(OwnerId(0)));
        (&fixture.starter).write_all(b"\n").expect("write");
        fixture.owners.serve(&[true]).expect("served");
        let end = fixture.owners.next_command().expect_err("the last one");
        assert!(matches!(end, ControlError::Line { .. }));
    }
}
