//! `check`: whether this host can run guests, and what to do if not. The decisive part is a trial:
//! some hosts have a /dev/kvm that opens and answers and yet emulates every instruction of a
//! guest, so the VMM runs a tiny guest and measures it.

use std::{
    fs, io,
    path::Path,
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use super::{Context, Error, print, table};
use crate::{
    cgroup::{Cgroup, Driver},
    cli::{Check, Format},
};

/// Memory that must be free for one guest of the default size and what serves it, in MiB.
const MEMORY_NEEDED: u64 = 320;

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    ok: bool,
    message: String,
}

#[derive(Debug, Serialize)]
struct Report {
    usable: bool,
    checks: Vec<Finding>,
}

/// What `bulkhead-vmm --probe` prints.
#[derive(Debug, Deserialize)]
struct Probe {
    usable: bool,
    message: String,
}

pub(super) fn check(context: &Context, options: &Check) -> Result<u8, Error> {
    let checks = vec![
        finding("kvm device", kvm_device(Path::new("/dev/kvm"))),
        finding("kvm trial", probe(&context.vmm()?)),
        finding("guest kernel", kernel(&context.kernel()?)),
        finding("guest root image", root_image(&context.root_image(false)?)),
        finding("cgroups", cgroups()),
        finding("memory", memory("/proc/meminfo")),
        finding("privileges", privileges()),
    ];
    let report = Report {
        usable: checks.iter().all(|finding| finding.ok),
        checks,
    };
    match options.format {
        Format::Json => {
            let json = serde_json::to_string_pretty(&report)
                .map_err(|error| Error::Io("show the judgement", error.into()))?;
            print(&format!("{json}\n"))?;
        }
        Format::Table => print(&people(&report))?,
    }
    Ok(u8::from(!report.usable))
}

fn people(report: &Report) -> String {
    let rows: Vec<_> = report
        .checks
        .iter()
        .map(|finding| {
            let judgement = if finding.ok { "ok" } else { "FAILED" };
            vec![
                finding.check.to_owned(),
                judgement.to_owned(),
                finding.message.clone(),
            ]
        })
        .collect();
    let verdict = if report.usable {
        "This host can run guests."
    } else {
        "This host cannot run guests: see what is marked FAILED."
    };
    format!("{}{verdict}\n", table(&rows))
}

fn finding(check: &'static str, result: Result<String, String>) -> Finding {
    let (ok, message) = match result {
        Ok(message) => (true, message),
        Err(message) => (false, message),
    };
    Finding { check, ok, message }
}

fn kvm_device(path: &Path) -> Result<String, String> {
    let show = path.display();
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(format!("{show} opens")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "{show} is missing: enable virtualisation in the firmware (or nested virtualisation \
             where this host is a virtual machine) and load the module kvm_intel or kvm_amd"
        )),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(format!("{show} may not be opened: run as root"))
        }
        Err(error) => Err(format!("{show} does not open: {error}")),
    }
}

fn probe(vmm: &Path) -> Result<String, String> {
    let output = Command::new(vmm)
        .arg("--probe")
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {} --probe: {error}", vmm.display()))?;
    let line = output
        .stdout
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    match serde_json::from_slice::<Probe>(line) {
        Ok(Probe {
            usable: true,
            message,
        }) => Ok(message),
        Ok(Probe {
            usable: false,
            message,
        }) => Err(message),
        Err(_) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().last().unwrap_or("nothing");
            Err(format!(
                "the trial gave no result ({}); it said: {said}",
                output.status
            ))
        }
    }
}

fn kernel(path: &Path) -> Result<String, String> {
    let mut magic = [0; 4];
    let read =
        fs::File::open(path).and_then(|mut file| io::Read::read_exact(&mut file, &mut magic));
    match read {
        Ok(()) if magic == *b"\x7fELF" => Ok(path.display().to_string()),
        Ok(()) => Err(format!(
            "{} is no ELF image: give an uncompressed vmlinux with --kernel",
            path.display()
        )),
        Err(error) => Err(format!(
            "cannot read {}: {error}; install the guest kernel or give its path with --kernel",
            path.display()
        )),
    }
}

fn root_image(path: &Path) -> Result<String, String> {
    fs::File::open(path).map(|_| path.display().to_string()).map_err(|error| {
        format!(
            "cannot read {}: {error}; install the root image or give its path with --root-image",
            path.display()
        )
    })
}

fn cgroups() -> Result<String, String> {
    match Cgroup::locate(None, "check", Driver::Cgroupfs) {
        Ok(cgroup) => Ok(cgroup.describe()),
        Err(error) => Err(crate::error::chain(&error)),
    }
}

fn memory(meminfo: &str) -> Result<String, String> {
    let text = fs::read_to_string(meminfo).map_err(|error| format!("{meminfo}: {error}"))?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .ok_or_else(|| format!("{meminfo} does not tell the available memory"))?
        / 1024;
    if available < MEMORY_NEEDED {
        return Err(format!(
            "{available} MiB are available, one guest needs {MEMORY_NEEDED} MiB"
        ));
    }
    Ok(format!(
        "{available} MiB are available, {MEMORY_NEEDED} MiB a guest"
    ))
}

fn privileges() -> Result<String, String> {
    if rustix::process::geteuid().is_root() {
        return Ok("running as root".to_owned());
    }
    Err("running as an ordinary user: the virtual machine's jail is set up by root".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_a_way_out() {
        let missing = Path::new("/does/not/exist");
        assert!(kvm_device(missing).unwrap_err().contains("firmware"));
        assert!(kernel(missing).unwrap_err().contains("--kernel"));
        assert!(
            kernel(Path::new("/etc/passwd"))
                .unwrap_err()
                .contains("no ELF")
        );
        assert!(root_image(missing).unwrap_err().contains("--root-image"));
        assert!(probe(missing).unwrap_err().contains("--probe"));
        assert!(
            probe(Path::new("/bin/true"))
                .unwrap_err()
                .contains("no result")
        );
        assert!(memory("/proc/meminfo").is_ok());
    }

    #[test]
    fn one_failure_makes_the_host_unusable() {
        let report = Report {
            usable: false,
            checks: vec![finding("memory", Err("too little".to_owned()))],
        };
        let text = people(&report);
        assert!(
            text.contains("FAILED") && text.ends_with("marked FAILED.\n"),
            "{text}"
        );
    }
}
