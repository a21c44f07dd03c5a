//! The host's memory that one idle sandbox takes, as proportional set size: what several
//! processes share is divided among them (proc_pid_smaps(5)).

use std::fs;

use anyhow::{Context, Result};

use crate::leftovers::{command_line, descendants};
use crate::runtime::Runtime;
use crate::scene::Scene;

use super::figures::Figures;

/// Proportional set size of one process in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
struct Size {
    total: u64,
    /// Of it, the guest's memory.
    guest: u64,
}

pub(super) fn measure(scene: &Scene, runs: usize, figures: &mut Figures) -> Result<()> {
    let bundle = scene.bundle()?.shell("sleep 100000");
    for round in 0..=runs {
        let id = super::start_idle(scene, Runtime::Bulkhead, &bundle)?;
        // An exec has come and gone: the container's process runs, all is in place.
        let mut command = super::program(Runtime::Bulkhead, scene);
        command.args(["exec", &id, "/bin/true"]);
        super::timed(command)?;
        let mut all = Size::default();
        let mut vmm = 0;
        for pid in descendants()? {
            let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
                .with_context(|| format!("reading the memory map of process {pid}"))?;
            let size = size(&smaps);
            if command_line(pid).contains("bulkhead-vmm") {
                vmm += size.total - size.guest;
            }
            all.total += size.total;
            all.guest += size.guest;
        }
        super::remove(scene, Runtime::Bulkhead, &id)?;
        if round > 0 {
            for (measure, kib) in [
                ("idle_pss_total", all.total),
                ("idle_pss_vmm", vmm),
                ("guest_memory_touched", all.guest),
            ] {
                let mib = f64::from(u32::try_from(kib)?) / 1024.0;
                figures.add(measure, Runtime::Bulkhead, "MiB", mib);
            }
        }
    }
    Ok(())
}

/// Adds up an smaps file: a header line per mapping, then its fields. The guest's memory, with the
/// kernel image that is mapped over a part of it, is what is kept out of core dumps (flag `dd`,
/// proc_pid_smaps(5)); the flags are a mapping's last line.
fn size(smaps: &str) -> Size {
    let mut size = Size::default();
    let mut mapping = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") => {
                mapping = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                size.total += mapping;
            }
            Some("VmFlags:") if words.any(|flag| flag == "dd") => size.guest += mapping,
            _ => {}
        }
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 12 /memfd:guest-memory (deleted)
Size:             262144 kB
Pss:               30000 kB
Pss_Dirty:         30000 kB
VmFlags: rd wr sh dd
7f0000200000-7f0000c00000 rw-p 00200000 fe:00 98 /opt/bulkhead/share/bulkhead/vmlinux
Pss:                4000 kB
VmFlags: rd wr mr mw me dd
55d000000000-55d000001000 r-xp 00000000 fe:00 99 /opt/bulkhead/bin/bulkhead-vmm
Pss:                1500 kB
VmFlags: rd ex mr mw me
";
        assert_eq!(
            size(smaps),
            Size {
                total: 35_500,
                guest: 34_000
            }
        );
    }
}
