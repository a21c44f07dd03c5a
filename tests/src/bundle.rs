//! OCI bundles made on the spot: busybox as root filesystem, and a configuration that tests change
//! as plain JSON.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// The statically linked busybox of the host.
const BUSYBOX: &str = "/bin/busybox";

/// Applets that containers use.
const APPLETS: &str = "[ awk cat chmod chown cp cut date dd df dmesg echo env expr false find grep \
    groups head hostname id ifconfig ip ipcs kill ln ls mkdir mkfifo mknod more mount mv nc nproc od \
    ping ps pwd readlink realpath rm rmdir sed seq setsid sh sha256sum sleep sort stat stty sync \
    tail tee test timeout top touch tr true tty umount uname unshare usleep wc which whoami xargs \
    yes";

/// A bundle directory and its configuration.
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    pub(crate) spec: Value,
}

impl Bundle {
    /// Makes a bundle in a new directory. Its container runs `true`.
    pub(crate) fn new(path: PathBuf, cgroup: &str) -> Result<Self> {
        let rootfs = path.join("rootfs");
        for directory in [
            "bin", "dev", "etc", "proc", "root", "sys", "tmp", "var/data",
        ] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        fs::copy(BUSYBOX, rootfs.join("bin/busybox"))
            .context("copying /bin/busybox (package busybox-static)")?;
        for applet in APPLETS.split_whitespace() {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        fs::write(rootfs.join("etc/passwd"), PASSWD)?;
        fs::write(rootfs.join("etc/group"), GROUP)?;
        let bundle = Self {
            path,
            spec: default_spec(cgroup),
        };
        bundle.write()?;
        Ok(bundle)
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// The container's process.
    pub(crate) fn args<S: AsRef<str>>(mut self, args: &[S]) -> Self {
        self.spec["process"]["args"] = args.iter().map(AsRef::as_ref).collect();
        self
    }

    /// The container's process is a shell with this script.
    pub(crate) fn shell(self, script: &str) -> Self {
        self.args(&["/bin/sh", "-c", script])
    }

    /// Changes the configuration.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self
    }

    /// Adds a mount.
    pub(crate) fn mount(mut self, mount: Value) -> Self {
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        self
    }

    /// Adds a bind mount of a host path.
    pub(crate) fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Self {
        self.mount(json!({
            "destination": destination, "type": "bind", "source": source, "options": options,
        }))
    }

    /// Writes config.json.
    pub(crate) fn write(&self) -> Result<()> {
        fs::write(
            self.path.join("config.json"),
            serde_json::to_vec_pretty(&self.spec)?,
        )?;
        Ok(())
    }

    pub(crate) fn as_os_str(&self) -> &OsStr {
        self.path.as_os_str()
    }
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001:Alice:/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nstaff:x:1001:alice\nextra:x:2002:alice\n";

/// What `runc spec` writes, without a terminal, and `true` as process.
fn default_spec(cgroup: &str) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/true"],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "tested",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" },
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

/// The text of a file, for messages that name it.
pub(crate) fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(!text.is_empty(), "{} is empty", path.display());
    Ok(text)
}
