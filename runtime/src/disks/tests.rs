use super::*;
use serde_json::{Value, json};
use std::process::Command;

/// Makes an image with an ext4.
fn image(path: &Path) {
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-F"])
        .arg(path)
        .arg("2M")
        .status()
        .unwrap();
    assert!(made.success());
}

fn collected(bundle: &Path, root: Value, mounts: Value) -> Result<Disks, SpecError> {
    let rootfs = bundle.join(root["path"].as_str().unwrap());
    let spec = json!({"ociVersion": "1.0.0", "root": root, "mounts": mounts});
    collect(bundle, &rootfs, &serde_json::from_value(spec).unwrap())
}

fn refused(bundle: &Path, mount: Value) -> String {
    let root = json!({"path": "rootfs"});
    let error = collected(bundle, root, json!([mount])).unwrap_err();
    crate::error::chain(&error)
}

fn bundle() -> tempfile::TempDir {
    let bundle = tempfile::tempdir().unwrap();
    fs::create_dir(bundle.path().join("rootfs")).unwrap();
    image(&bundle.path().join("a.img"));
    bundle
}

#[test]
fn images_become_disks() {
    let bundle = bundle();
    let mounts = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/a", "type": "ext4", "source": "a.img", "options": ["rw", "ro"]},
    ]);
    let disks = collected(bundle.path(), json!({"path": "rootfs"}), mounts).unwrap();
    assert_eq!(disks.rootfs, None);
    let config = &disks.configs[0];
    assert_eq!(
        (config.id.as_deref(), config.read_only),
        (Some("mount1"), true)
    );
    let device = &disks.mounts[&1];
    assert_eq!(
        (device.serial.as_str(), device.filesystem.as_str()),
        ("mount1", "ext4")
    );
    assert!(device.options.is_empty());

    for (readonly, options) in [(false, vec![]), (true, vec!["ro".to_owned()])] {
        let root = json!({"path": "a.img", "readonly": readonly});
        let disks = collected(bundle.path(), root, json!([])).unwrap();
        assert_eq!(disks.configs[0].read_only, readonly);
        let device = disks.rootfs.unwrap();
        assert_eq!((device.serial.as_str(), device.options), ("root", options));
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name() {
    let bundle = bundle();
    let path = bundle.path();
    fs::write(path.join("text"), vec![b'x'; 8192]).unwrap();
    fs::write(path.join("empty"), b"").unwrap();
    image(&path.join("short.img"));
    let short = File::options()
        .write(true)
        .open(path.join("short.img"))
        .unwrap();
    short.set_len(1 << 20).unwrap();
    for (kind, source, word) in [
        ("ext4", "nowhere", "No such file"),
        ("ext4", "", "missing"),
        ("ext4", "rootfs", "block device or an image"),
        ("ext4", "/dev/null", "block device or an image"),
        ("ext4", "text", "neither ext4 nor erofs"),
        ("ext4", "empty", "neither ext4 nor erofs"),
        ("ext4", "short.img", "truncated"),
        ("erofs", "a.img", "holds ext4"),
    ] {
        let error = refused(
            path,
            json!({"destination": "/x", "type": kind, "source": source}),
        );
        let named = error.contains("mounts[0].source") && error.contains(word);
        assert!(named && !error.contains('\n'), "{source}: {error}");
    }
    let many: Vec<_> = (0..8)
        .map(|_| json!({"destination": "/x", "type": "ext4", "source": "a.img", "options": ["ro"]}))
        .collect();
    let error = collected(path, json!({"path": "rootfs"}), json!(many)).unwrap_err();
    assert!(error.to_string().contains("mounts[6]"), "{error}");
}

#[test]
fn a_disk_that_is_written_to_is_nobody_elses() {
    let bundle = bundle();
    let held = File::open(bundle.path().join("a.img")).unwrap();
    let mount = |options: Value| json!({"destination": "/x", "type": "ext4", "source": "a.img", "options": options});
    rustix::fs::flock(&held, FlockOperation::LockShared).unwrap();
    let error = refused(bundle.path(), mount(json!([])));
    assert!(error.contains("in use by another container"), "{error}");
    let root = json!({"path": "rootfs"});
    collected(bundle.path(), root, json!([mount(json!(["ro"]))])).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    let error = refused(bundle.path(), mount(json!(["ro"])));
    assert!(error.contains("in use by another container"), "{error}");
}
