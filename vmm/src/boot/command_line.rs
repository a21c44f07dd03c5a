//! The kernel's command line.

use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::BootError;
use crate::config::VmConfig;
use crate::layout;

/// Why the command line is no good.
#[derive(Debug, thiserror::Error)]
pub enum CommandLineError {
    /// It does not fit.
    #[error("the kernel command line has {0} bytes, at most {max} are possible: pass fewer kernel arguments", max = layout::COMMAND_LINE_SIZE - 1)]
    TooLong(usize),
    /// An argument holds what the kernel cannot take.
    #[error(
        "kernel argument {0:?} is not printable ASCII, or holds a space outside of quotes or an unclosed quote"
    )]
    BadArgument(String),
}

/// What every guest gets: quick boot on this machine, and a reset (which the VMM sees) instead of
/// a halt when the kernel panics.
const ALWAYS: &[&str] = &[
    // There is no keyboard controller, no ACPI and no firmware: end by triple fault.
    "reboot=t",
    "panic=-1",
    // There is no PIT to test the timer with, and kvm-clock is good.
    "no_timer_check",
    "tsc=reliable",
    // Entropy came with boot_params; the CPU's instruction is a second source.
    "random.trust_bootloader=on",
    "random.trust_cpu=on",
    // No self-tests of crypto algorithms at boot.
    "cryptomgr.notests",
];

/// Composes the command line. `devices` are the interrupts of the virtio-mmio devices in order.
pub fn compose(config: &VmConfig, devices: &[u32]) -> Result<String, CommandLineError> {
    let mut line = ALWAYS.join(" ");
    let mut add = |argument: &str| {
        line.push(' ');
        line.push_str(argument);
    };
    if config.guest_log.is_some() {
        add("console=ttyS0 earlyprintk=serial,ttyS0,115200 8250.nr_uarts=1");
    } else {
        add("quiet loglevel=1 8250.nr_uarts=0");
    }
    if !config.disks.is_empty() {
        add("root=/dev/vda rootfstype=erofs ro");
    }
    check(&config.init)?;
    add(&format!("init={}", config.init));
    let mut address = layout::VIRTIO_MMIO;
    for gsi in devices {
        add(&format!("virtio_mmio.device=4K@{address:#x}:{gsi}"));
        address += layout::VIRTIO_MMIO_SIZE;
    }
    for argument in &config.kernel_arguments {
        check(argument)?;
        add(argument);
    }
    if line.len() >= layout::COMMAND_LINE_SIZE {
        return Err(CommandLineError::TooLong(line.len()));
    }
    Ok(line)
}

/// One argument must stay one argument: the kernel splits at spaces outside of double quotes.
fn check(argument: &str) -> Result<(), CommandLineError> {
    let mut quoted = false;
    let good = !argument.is_empty()
        && argument.bytes().all(|byte| {
            quoted ^= byte == b'"';
            byte.is_ascii_graphic() || (byte == b' ' && quoted)
        });
    if good && !quoted {
        Ok(())
    } else {
        Err(CommandLineError::BadArgument(argument.to_owned()))
    }
}

/// Writes it with its zero byte.
pub(super) fn write(memory: &GuestMemoryMmap, line: &str) -> Result<(), BootError> {
    let failed = |source| BootError::Write {
        what: "the command line",
        source,
    };
    let end = layout::COMMAND_LINE.unchecked_add(line.len() as u64);
    memory
        .write_slice(line.as_bytes(), layout::COMMAND_LINE)
        .map_err(failed)?;
    memory.write_obj(0u8, end).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            kernel: "/vmlinux".into(),
            kernel_arguments: vec![],
            init: "/init".into(),
            cpus: 1,
            memory_mib: 64,
            disks: vec![],
            share: None,
            vsock: None,
            guest_log: None,
            network_namespace: None,
            cgroup: None,
            spare_slots: 0,
        }
    }

    #[test]
    fn names_every_device() {
        let line = compose(&config(), &[5, 6]).expect("compose");
        assert!(
            line.contains("virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6")
        );
        assert!(line.contains(" init=/init"));
        assert!(!line.contains("root="));
    }

    #[test]
    fn callers_arguments_come_last() {
        let arguments = vec!["a=\"b c\"".to_owned(), "debug".to_owned()];
        let line = compose(
            &VmConfig {
                kernel_arguments: arguments,
                ..config()
            },
            &[],
        );
        assert!(line.expect("compose").ends_with(" a=\"b c\" debug"));
    }

    #[test]
    fn refuses_what_would_not_stay_one_argument() {
        for bad in ["", "a b", "a\nb", "a\0", "\"a", "é"] {
            let arguments = vec![bad.to_owned()];
            let error = compose(
                &VmConfig {
                    kernel_arguments: arguments,
                    ..config()
                },
                &[],
            );
            assert!(
                matches!(error, Err(CommandLineError::BadArgument(_))),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn refuses_too_long() {
        let arguments = vec!["x".repeat(2048)];
        let error = compose(
            &VmConfig {
                kernel_arguments: arguments,
                ..config()
            },
            &[],
        );
        assert!(matches!(error, Err(CommandLineError::TooLong(_))));
    }
}
