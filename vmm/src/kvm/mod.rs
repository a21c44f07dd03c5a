//! KVM: the virtual machine with its in-kernel interrupt controllers, its vCPUs and their state.

pub mod cpuid;
pub mod exits;
pub mod state;
pub mod vcpu;
pub mod vm;

/// Why KVM did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm is not there.
    #[error(
        "there is no /dev/kvm: load the module (modprobe kvm_intel or kvm_amd), and enable \
         virtualisation in the firmware or, in a virtual machine, nested virtualisation"
    )]
    Missing(#[source] std::io::Error),
    /// /dev/kvm may not be opened.
    #[error("/dev/kvm may not be opened: run as root or as a member of its group (often kvm)")]
    Permission(#[source] std::io::Error),
    /// Another reason.
    #[error("open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// Not the interface that has been stable since 2007.
    #[error("/dev/kvm speaks version {0} of its interface, 12 is needed: update the host's kernel")]
    Version(i32),
    /// Something that every KVM of the last ten years has.
    #[error("this host's KVM lacks {0}: update the host's kernel")]
    Capability(&'static str),
    /// More vCPUs than the host's KVM can.
    #[error("{asked} vCPUs, this host's KVM can {possible}")]
    TooManyCpus {
        /// Asked for.
        asked: u8,
        /// Possible.
        possible: usize,
    },
    /// An ioctl failed.
    #[error("{0} (KVM)")]
    Operation(&'static str, #[source] std::io::Error),
}

impl KvmError {
    /// For `map_err` after an ioctl.
    pub(crate) fn during(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Operation(operation, std::io::Error::from_raw_os_error(error.errno()))
    }
}
