//! The five capability sets of a process (capabilities(7)).

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

use crate::error::{Attempt, Result};

/// The sets, a bit per capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Capabilities {
    /// The spec's sets; without any, a process has none (as with runc).
    pub(super) fn of(sets: Option<&LinuxCapabilities>) -> Self {
        let Some(sets) = sets else {
            return Self::default();
        };
        Self {
            bounding: bits(sets.bounding().as_ref()),
            effective: bits(sets.effective().as_ref()),
            inheritable: bits(sets.inheritable().as_ref()),
            permitted: bits(sets.permitted().as_ref()),
            ambient: bits(sets.ambient().as_ref()),
        }
    }

    /// Takes what is not in the bounding set out of the caller's. Needs CAP_SETPCAP, so it goes
    /// before the change of user.
    pub(super) fn limit_bounding_set(&self) -> Result<()> {
        for number in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            // An error says that the kernel knows no capabilities from here on.
            let Ok(present) = capability_is_in_bounding_set(one) else {
                break;
            };
            if present && self.bounding & 1 << number == 0 {
                remove_capability_from_bounding_set(one)
                    .or_cannot(|| format!("drop capability {number} from the bounding set"))?;
            }
        }
        Ok(())
    }

    /// Sets the other four, after the change of user.
    pub(super) fn apply(&self) -> Result<()> {
        let sets = CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective),
            permitted: CapabilitySet::from_bits_retain(self.permitted),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        set_capabilities(None, sets).or_cannot(|| "set the capabilities (process.capabilities)")?;
        clear_ambient_capability_set().or_cannot(|| "clear the ambient capabilities")?;
        for number in (0..64).filter(|number| self.can_be_ambient() & 1 << number != 0) {
            let one = CapabilitySet::from_bits_retain(1 << number);
            configure_capability_in_ambient_set(one, true).or_cannot(|| {
                format!("raise ambient capability {number} (process.capabilities.ambient)")
            })?;
        }
        Ok(())
    }

    /// Only what is permitted and inheritable can be ambient (capabilities(7)). The rest is left
    /// out, as by runc and crun: the configuration that `runc spec` writes has such a rest.
    fn can_be_ambient(&self) -> u64 {
        self.ambient & self.permitted & self.inheritable
    }
}

fn bits(set: Option<&HashSet<Capability>>) -> u64 {
    set.into_iter()
        .flatten()
        .fold(0, |bits, c| bits | 1 << number(*c))
}

/// Numbers of include/uapi/linux/capability.h.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_become_bits() {
        let sets: LinuxCapabilities = serde_json::from_value(serde_json::json!({
            "bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"],
            "effective": ["CAP_KILL"],
            "permitted": [],
        }))
        .expect("sets");
        let capabilities = Capabilities::of(Some(&sets));
        assert_eq!(capabilities.bounding, 1 | 1 << 40);
        assert_eq!(capabilities.effective, 1 << 5);
        assert_eq!(capabilities.permitted, 0);
        assert_eq!(Capabilities::of(None), Capabilities::default());
    }

    #[test]
    fn ambient_is_what_can_be() {
        let sets: LinuxCapabilities = serde_json::from_value(serde_json::json!({
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "inheritable": ["CAP_CHOWN", "CAP_SETUID"],
            "ambient": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"],
        }))
        .expect("sets");
        assert_eq!(Capabilities::of(Some(&sets)).can_be_ambient(), 1);
    }
}
