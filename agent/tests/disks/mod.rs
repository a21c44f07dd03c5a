//! Cases about filesystems on disks. Loop devices stand for the disks of a guest.

use std::{path::PathBuf, process::Command};

use bulkhead_agent_protocol::messages::BlockDevice;
use serde_json::{Value, json};

use crate::support::{self, Fixture, Reply, Run, Streams, spec};

/// An image on a loop device.
struct Loop {
    image: PathBuf,
    device: String,
}

impl Loop {
    /// Makes an image by a script in the share, which calls it by its name, and a disk of it.
    fn new(fixture: &Fixture, serial: &str, read_only: bool, script: &str) -> Self {
        fixture.in_share(script);
        let image = fixture.rootfs().with_file_name(serial);
        let mode = if read_only { "-rf" } else { "-f" };
        let output = Command::new("losetup")
            .args([mode, "--show"])
            .arg(&image)
            .output();
        let output = output.expect("losetup");
        assert!(output.status.success(), "{output:?}");
        let path = String::from_utf8(output.stdout).expect("text");
        let device = path
            .trim()
            .strip_prefix("/dev/")
            .expect("a device")
            .to_owned();
        fixture.add_disk(serial, &device, read_only);
        Self { image, device }
    }

    /// What a file holds in the image, once nobody uses it any more.
    fn read(self, file: &str) -> String {
        let image = self.image.clone();
        drop(self);
        let check = Command::new("e2fsck").args(["-fn"]).arg(&image).output();
        let check = check.expect("e2fsck");
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
        let output = Command::new("debugfs")
            .args(["-R", &format!("cat {file}")])
            .arg(&image)
            .output();
        String::from_utf8_lossy(&output.expect("debugfs").stdout).into_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["-d", &format!("/dev/{}", self.device)])
            .status();
    }
}

fn disk(serial: &str) -> BlockDevice {
    BlockDevice {
        serial: serial.to_owned(),
        ..Default::default()
    }
}

/// Runs a container with these disks as mounts.
fn run(fixture: &Fixture, spec: &Value, disks: &[(u32, BlockDevice)]) -> Result<Run, String> {
    let streams = Streams::new(fixture, b"");
    let reply = fixture.create_with("disks", spec, streams.stdio(), |request| {
        request.block_mounts = disks.iter().cloned().collect();
    });
    finish(fixture, streams, reply)
}

fn finish(fixture: &Fixture, streams: Streams, reply: Reply) -> Result<Run, String> {
    if let Reply::Refused(_, message) = reply {
        return Err(message);
    }
    let container = fixture.container("disks");
    container.try_start().expect("started");
    let run = streams.collect(|| container.wait());
    container.remove();
    Ok(run)
}

fn mount(destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "ext4", "source": "/dev/sdx", "options": options})
}

pub(crate) fn mounts(fixture: &Fixture) {
    let script = "mkdir -p tree && echo old > tree/old && chown 1000:1000 tree/old; \
        truncate -s 8M data; mkfs.ext4 -q -F -d tree data; mkfs.erofs --quiet image tree > /dev/null";
    let data = Loop::new(fixture, "data", false, script);
    let image = Loop::new(fixture, "image", true, "true");
    let script = "cat /data/old /image/old; echo new > /data/new; stat -c %u /data/old; \
        grep -E ' /(data|image) ' /proc/self/mounts | cut -d' ' -f2-4 | sed 's/,seclabel//'; \
        echo x 2>/dev/null > /image/x || echo read-only";
    let mut spec = spec(&["sh", "-c", script]);
    let first = support::add_mount(&mut spec, mount("/data", &["noatime", "bind"]));
    let second = support::add_mount(&mut spec, json!({"destination": "/image", "source": "/x"}));
    let shown = run(
        fixture,
        &spec,
        &[(first, disk("data")), (second, disk("image"))],
    );
    let shown = shown.expect("ran");
    let lines: Vec<_> = shown.stdout.lines().collect();
    assert_eq!(lines[..3], ["old", "old", "1000"], "{}", shown.stderr);
    assert!(
        lines[3].starts_with("/data ext4 rw,noatime"),
        "{}",
        lines[3]
    );
    assert!(lines[4].starts_with("/image erofs ro"), "{}", lines[4]);
    assert_eq!(lines[5..], ["read-only"]);
    // It was unmounted in order, with all that was written.
    assert_eq!(data.read("new"), "new\n");
    drop(image);
}

pub(crate) fn root(fixture: &Fixture) {
    let script = "truncate -s 64M root; mkfs.ext4 -q -F -d rootfs root; mkfs.erofs --quiet readonly rootfs > /dev/null";
    let root = Loop::new(fixture, "root", false, script);
    let read_only = Loop::new(fixture, "readonly", true, "true");
    let run = |spec: &Value, device: BlockDevice| {
        let streams = Streams::new(fixture, b"");
        let reply = fixture.create_with("disks", spec, streams.stdio(), |request| {
            request.rootfs.clear();
            request.rootfs_device = Some(device).into();
        });
        finish(fixture, streams, reply)
    };
    let script = "echo new > /new && cut -d' ' -f2,3 /proc/mounts | head -n1; ls / | head -n2";
    let mut plain = spec(&["sh", "-c", script]);
    let shown = run(&plain, disk("root")).expect("ran");
    assert_eq!(shown.stdout, "/ ext4\nbin\ndev\n", "{}", shown.stderr);
    // In a user namespace, which is root of nothing on that disk, too.
    plain["process"]["args"] = json!(["sh", "-c", "cat /new; touch /x 2>/dev/null || echo kept"]);
    crate::namespaces::add_user_namespace(&mut plain);
    let shown = run(&plain, disk("root")).expect("ran");
    assert_eq!(shown.stdout, "new\nkept\n", "{}", shown.stderr);
    assert_eq!(root.read("new"), "new\n");

    let bare = spec(&["sh", "-c", "cut -d' ' -f2,3 /proc/mounts | head -n1"]);
    let mut device = disk("readonly");
    device.filesystem = "erofs".to_owned();
    device.options = vec!["ro".to_owned(), "nodev".to_owned()];
    let shown = run(&bare, device.clone()).expect("ran");
    assert_eq!(shown.stdout, "/ erofs\n", "{}", shown.stderr);
    device.options = vec!["rbind".to_owned()];
    let message = run(&bare, device).err().expect("refused");
    assert!(
        message.starts_with("root.path: an option is none"),
        "{message}"
    );
    drop(read_only);
}

pub(crate) fn refusals(fixture: &Fixture) {
    let script = "mkdir -p tree; truncate -s 8M whole; mkfs.ext4 -q -F -d tree whole; \
        head -c 1M whole > short; dd if=/dev/urandom of=garbage bs=64k count=1 2> /dev/null; \
        head -c 512 /dev/zero > tiny; \
        cp whole mixed; dd if=/dev/urandom of=mixed bs=1k seek=2 count=100 conv=notrunc 2> /dev/null";
    let whole = Loop::new(fixture, "whole", true, script);
    let others = ["short", "garbage", "tiny", "mixed"];
    let others = others.map(|name| Loop::new(fixture, name, false, "true"));
    let refused = |options: &[&str], device: BlockDevice| {
        let mut spec = spec(&["true"]);
        let index = support::add_mount(&mut spec, mount("/data", options));
        let message = run(fixture, &spec, &[(index, device)])
            .err()
            .expect("refused");
        assert!(message.contains(&format!("mounts[{index}]")), "{message}");
        assert!(!message.contains('\n'), "{message}");
        message
    };
    for (name, text) in [
        ("short", "cannot be mounted as ext4"),
        ("garbage", "holds neither ext4 nor erofs"),
        ("tiny", "holds neither ext4 nor erofs"),
        ("mixed", "cannot be mounted as ext4"),
        ("absent", "there is no disk absent"),
    ] {
        let message = refused(&[], disk(name));
        assert!(message.contains(text), "{message}");
        assert!(message.contains(name), "{message}");
    }
    let message = refused(&[], disk("whole"));
    assert!(message.contains("can only be read: add ro"), "{message}");
    let message = refused(&["ro", "nonsense"], disk("whole"));
    assert!(message.contains("nonsense"), "{message}");
    let message = refused(&["ro", "errors=panic"], disk("whole"));
    assert!(message.contains("must not end the guest"), "{message}");
    let mut wrong = disk("whole");
    wrong.filesystem = "erofs".to_owned();
    let message = refused(&["ro"], wrong);
    assert!(message.contains("holds ext4"), "{message}");
    // The guest has taken no harm.
    assert_eq!(fixture.run("after", &["echo", "fine"]).stdout, "fine\n");
    drop((whole, others));
}
