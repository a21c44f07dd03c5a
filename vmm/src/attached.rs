//! Devices that the runtime attaches to a running VM and takes away again, by the names that it
//! gives them. Whatever is wrong with one is an answer; the VM goes on.

use std::collections::BTreeMap;

use tracing::{info, warn};

use crate::config::{VmCommand, VmEvent};
use crate::control::Received;
use crate::failure::Chain;
use crate::machine::{Machine, MachineError};

/// Characters of a name.
const LONGEST_ID: usize = 64;

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
    /// Not yet.
    #[error("this VMM cannot attach {0} yet")]
    NotYet(&'static str),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// What is attached: places by name.
#[derive(Debug, Default)]
pub struct Attached(BTreeMap<String, usize>);

impl Attached {
    /// Carries out a command about devices, gives the answer; gives other commands back.
    pub fn carry_out(
        &mut self,
        machine: &Machine,
        received: Received,
    ) -> Result<VmEvent, VmCommand> {
        let Received {
            command,
            descriptors,
        } = received;
        let (id, result) = match command {
            VmCommand::AttachNetwork { id, .. } => {
                let result = self
                    .check(&id)
                    .and(Err::<usize, _>(AttachError::NotYet("network interfaces")));
                (id, result)
            }
            VmCommand::AttachDisk { id, .. } => {
                let result = self
                    .check(&id)
                    .and(Err::<usize, _>(AttachError::NotYet("disks")));
                (id, result)
            }
            VmCommand::Detach { id } => return Ok(self.detach(machine, id)),
            command @ (VmCommand::Go | VmCommand::Stop) => return Err(command),
        };
        drop(descriptors);
        Ok(match result {
            Ok(place) => {
                info!(id, place, "a device was attached");
                self.0.insert(id.clone(), place);
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

    fn detach(&mut self, machine: &Machine, id: String) -> VmEvent {
        match self.0.remove(&id) {
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

    fn check(&self, id: &str) -> Result<(), AttachError> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(good) {
            return Err(AttachError::Id(id.to_owned()));
        }
        if self.0.contains_key(id) {
            return Err(AttachError::Taken(id.to_owned()));
        }
        Ok(())
    }
}
