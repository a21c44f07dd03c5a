//! Devices that the runtime attaches to a running VM and takes away again, by the names that it
//! gives them. Whatever is wrong with one is an answer; the VM goes on.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use tracing::{info, warn};

use crate::config::{VmCommand, VmEvent};
use crate::control::Received;
use crate::failure::Chain;
use crate::machine::{Machine, MachineError};
use crate::owners::{OwnerId, Owners};
use crate::virtio::VirtioDevice;
use crate::virtio::blk::{Block, Disk, DiskError, Serial};
use crate::virtio::net::{MacAddress, MacError, Net, Tap, TapError};

/// Characters of a name.
const LONGEST_ID: usize = 64;
/// Of IPv4 (RFC 791), and of the driver (virtio 1.2 §5.1.4.1).
const SMALLEST_MTU: u16 = 68;

/// Why a device was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The name cannot be one.
    #[error(
        "the id {0:?} is no name for a device: give 1 to {most} of A-Z, a-z, 0-9, '.', '_', ':', '-'",
        most = LONGEST_ID
    )]
    Id(String),
    /// The name is taken.
    #[error("a device {0:?} is attached already: detach it first, or give another id")]
    Taken(String),
    /// An address that is none.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// An MTU that is none.
    #[error("an MTU of {0} is not possible: give one of {SMALLEST_MTU} to 65535")]
    Mtu(u16),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk is one descriptor.
    #[error("a disk came with {0} descriptors, it takes one")]
    DiskCount(usize),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// What is attached.
#[derive(Debug)]
pub struct Attached {
    /// Places by owner and name. What an owner who has gone leaves stays until the guest's driver has
    /// let it go, [`Attached::sweep`].
    places: BTreeMap<(OwnerId, String), usize>,
    /// For the names of the next device's threads.
    next: u16,
}

impl Attached {
    /// Nothing is attached to a VM with so many disks.
    pub fn after(disks: usize) -> Self {
        Self {
            places: BTreeMap::new(),
            next: u16::try_from(disks).unwrap_or(0),
        }
    }

    /// Carries out a command about devices, gives the answer; gives other commands back.
    pub fn carry_out(
        &mut self,
        machine: &Machine,
        owner: OwnerId,
        received: Received,
    ) -> Result<VmEvent, VmCommand> {
        let Received {
            command,
            descriptors,
        } = received;
        let (id, device) = match command {
            VmCommand::AttachNetwork { id, mac, mtu } => {
                let device = self
                    .check(owner, &id)
                    .and_then(|()| self.interface(&mac, mtu, descriptors));
                (id, device)
            }
            VmCommand::AttachDisk { id, read_only } => {
                let device = self
                    .check(owner, &id)
                    .and_then(|()| self.disk(&id, read_only, descriptors));
                (id, device)
            }
            VmCommand::Detach { id } => return Ok(self.detach(machine, owner, id)),
            command @ (VmCommand::Go | VmCommand::Booted | VmCommand::Stop) => return Err(command),
        };
        let place = device.and_then(|device| Ok(machine.attach(device)?));
        Ok(match place {
            Ok(place) => {
                info!(id, place, "a device was attached");
                self.places.insert((owner, id.clone()), place);
                VmEvent::Attached {
                    id,
                    // The guest's kernel counts them in the order of its command line.
                    device: format!("virtio-mmio.{place}"),
                }
            }
            Err(error) => VmEvent::AttachFailed {
                id,
                message: Chain(&error).to_string(),
            },
        })
    }

    fn interface(
        &mut self,
        mac: &str,
        mtu: u16,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Box<dyn VirtioDevice>, AttachError> {
        let mac: MacAddress = mac.parse()?;
        if mtu < SMALLEST_MTU {
            return Err(AttachError::Mtu(mtu));
        }
        let tap = Tap::new(descriptors)?;
        Ok(Box::new(Net::new(self.next_index(), tap, mac, mtu)))
    }

    fn disk(
        &mut self,
        id: &str,
        read_only: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Box<dyn VirtioDevice>, AttachError> {
        let serial = Serial::new(id)?;
        let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
            .map_err(|descriptors| AttachError::DiskCount(descriptors.len()))?;
        let disk = Disk::new(Path::new(id), descriptor.into(), read_only)?;
        Ok(Box::new(Block::new(self.next_index(), serial, disk)))
    }

    fn next_index(&mut self) -> u16 {
        let index = self.next;
        self.next = index.wrapping_add(1);
        index
    }

    fn detach(&mut self, machine: &Machine, owner: OwnerId, id: String) -> VmEvent {
        match self.places.remove(&(owner, id.clone())) {
            Some(place) => {
                if let Err(error) = machine.detach(place) {
                    // The device is gone all the same.
                    warn!(id, error = %Chain(&error), "an event of a device was not taken back");
                }
                info!(id, place, "a device was detached");
            }
            None => info!(id, "there is no such device to detach"),
        }
        VmEvent::Detached { id }
    }

    /// Takes away what was left by owners who have gone, as far as the guest does not use it.
    pub fn sweep(&mut self, machine: &Machine, owners: &Owners) {
        let left = self
            .places
            .iter()
            .filter(|((owner, _), place)| !owners.contains(*owner) && !machine.is_in_use(**place));
        let left: Vec<_> = left.map(|(key, _)| key.clone()).collect();
        for (owner, id) in left {
            self.detach(machine, owner, id);
        }
    }

    fn check(&self, owner: OwnerId, id: &str) -> Result<(), AttachError> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(good) {
            return Err(AttachError::Id(id.to_owned()));
        }
        if self.places.contains_key(&(owner, id.to_owned())) {
            return Err(AttachError::Taken(id.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::virtio::testing::Directory;

    #[test]
    fn names() {
        let mut attached = Attached::after(1);
        let (one, other) = (OwnerId::of(0), OwnerId::of(1));
        let long = "x".repeat(LONGEST_ID);
        for good in ["eth0", "a.b_c:d-e", long.as_str()] {
            attached.check(one, good).expect(good);
        }
        let longer = "x".repeat(LONGEST_ID + 1);
        for bad in ["", "a b", "a/b", "a\n", "é", "\0", longer.as_str()] {
            assert!(matches!(attached.check(one, bad), Err(AttachError::Id(_))));
        }
        attached.places.insert((one, "eth0".into()), 4);
        let error = attached.check(one, "eth0").expect_err("taken");
        assert!(matches!(error, AttachError::Taken(_)));
        attached.check(other, "eth0").expect("another owner's");
    }

    #[test]
    fn interfaces_are_looked_at_before_they_are_made() {
        let mut attached = Attached::after(1);
        let mut attach = |mac: &str, mtu| {
            let result = attached.interface(mac, mtu, vec![]);
            Chain(&result.err().expect("refused")).to_string()
        };
        assert!(attach("03:00:00:00:00:01", 1500).contains("no address of an interface"));
        assert_eq!(
            attach("02:00:00:00:00:01", 67),
            "an MTU of 67 is not possible: give one of 68 to 65535"
        );
        assert!(attach("02:00:00:00:00:01", 68).contains("0 descriptors of a tap"));
    }

    #[test]
    fn disks_are_looked_at_before_they_are_made() {
        let directory = Directory::new();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 1024]).expect("write");
        let open = || OwnedFd::from(File::open(&path).expect("open"));
        let mut attached = Attached::after(1);
        attached.disk("a", true, vec![open()]).expect("a disk");
        for (id, read_only, descriptors, reason) in [
            ("a", true, vec![], "0 descriptors, it takes one"),
            ("a", true, vec![open(), open()], "2 descriptors"),
            ("a", false, vec![open()], "the disk a is not open for"),
            ("aaaaaaaaaaaaaaaaaaaaa", true, vec![open()], "no serial"),
        ] {
            let result = attached.disk(id, read_only, descriptors);
            let message = Chain(&result.err().expect(reason)).to_string();
            assert!(message.contains(reason), "{message}");
        }
        let (pipe, _write) = std::io::pipe().expect("pipe");
        let result = attached.disk("a", true, vec![pipe.into()]);
        assert!(matches!(
            result.err(),
            Some(AttachError::Disk(DiskError::Type { .. }))
        ));
    }
}
