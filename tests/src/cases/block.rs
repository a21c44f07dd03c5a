//! Volumes and root filesystems on disks: raw images and block devices, attached by virtio-blk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::bundle::Bundle;
use crate::process::Process;
use crate::scene::Scene;

super::cases!(block;
    common: ;
    vm: volume, read_only, root, root_erofs, device, attached_once, no_filesystem, gone_under_the_guest);

/// Runs a program of the host.
fn host(args: &[&str]) -> Result<String> {
    let mut command = Command::new(args[0]);
    command.args(&args[1..]);
    Ok(Process::spawn(command)?.finish()?.ok()?.text())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}

/// An image with an ext4; what the directory holds is in it.
fn image(scene: &Scene, name: &str, from: Option<&Path>) -> Result<PathBuf> {
    let path = scene.path(name);
    let mut args = vec!["mke2fs", "-q", "-t", "ext4", "-F"];
    if let Some(from) = from {
        args.extend(["-d", text(from)?]);
    }
    args.extend([text(&path)?, "16M"]);
    host(&args)?;
    Ok(path)
}

fn with_disk(bundle: Bundle, source: &Path, options: &[&str]) -> Bundle {
    bundle.mount(json!({
        "destination": "/disk", "type": "ext4", "source": source, "options": options,
    }))
}

/// What one container writes the next one reads.
fn volume(scene: &Scene) -> Result<()> {
    let disk = image(scene, "disk.img", None)?;
    let script = "grep ' /disk ' /proc/mounts; echo kept >/disk/file; df -P /disk | tail -n 1";
    let output = scene
        .run(&with_disk(
            scene.bundle()?.shell(script),
            &disk,
            &["noatime"],
        ))?
        .ok()?;
    let shown = output.text();
    ensure!(
        shown.contains(" ext4 ") && shown.contains("noatime") && shown.contains("/dev/vd"),
        "{shown}"
    );
    let bundle = with_disk(scene.bundle()?.shell("cat /disk/file"), &disk, &[]);
    scene.run(&bundle)?.ok()?.says(&["kept\n"])?;
    // The file system was left whole.
    host(&["e2fsck", "-f", "-n", text(&disk)?])?;
    scene.expect_nothing_left()
}

/// "ro" holds in the guest and on the host, whatever the guest does.
fn read_only(scene: &Scene) -> Result<()> {
    let disk = image(scene, "disk.img", None)?;
    let before = fs::read(&disk)?;
    let script = "touch /disk/x 2>/dev/null && echo written; \
        mount -o remount,rw /disk 2>/dev/null; touch /disk/x 2>/dev/null && echo written; \
        cat /sys/block/vd*/ro";
    let bundle = with_disk(scene.bundle()?.shell(script), &disk, &["ro"]).with(|spec| {
        let all = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        spec["process"]["capabilities"] =
            json!({ "bounding": all, "effective": all, "permitted": all });
    });
    let shown = scene.run(&bundle)?.ok()?.text();
    ensure!(
        !shown.contains("written") && !shown.contains('0'),
        "{shown}"
    );
    ensure!(fs::read(&disk)? == before, "the image has changed");
    scene.expect_nothing_left()
}

/// The root filesystem is an image.
fn root(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("grep ' / ' /proc/mounts; echo made >/root/file");
    let disk = image(scene, "root.img", Some(&bundle.rootfs()))?;
    let mut bundle = bundle.with(|spec| spec["root"]["path"] = json!(disk));
    let shown = scene.run(&bundle)?.ok()?.text();
    ensure!(shown.contains(" / ext4 "), "{shown}");
    bundle = bundle
        .shell("cat /root/file; touch /root/more || echo held")
        .with(|spec| {
            spec["root"]["readonly"] = json!(true);
        });
    scene.run(&bundle)?.ok()?.says(&["made\n", "held\n"])?;
    scene.expect_nothing_left()
}

fn root_erofs(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("grep ' / ' /proc/mounts");
    let disk = scene.path("root.erofs");
    host(&[
        "mkfs.erofs",
        "--quiet",
        text(&disk)?,
        text(&bundle.rootfs())?,
    ])?;
    let bundle = bundle.with(|spec| spec["root"] = json!({ "path": disk, "readonly": true }));
    let shown = scene.run(&bundle)?.ok()?.text();
    ensure!(shown.contains(" / erofs ro"), "{shown}");
    scene.expect_nothing_left()
}

/// A block device of the host; one that is mounted there is refused.
fn device(scene: &Scene) -> Result<()> {
    let disk = image(scene, "disk.img", None)?;
    let device = host(&["losetup", "--find", "--show", text(&disk)?])?;
    let device = Path::new(device.trim());
    let bundle = with_disk(scene.bundle()?.shell("echo kept >/disk/file"), device, &[]);
    let result = scene.run(&bundle).and_then(|output| output.ok());
    let place = scene.path("place");
    fs::create_dir(&place)?;
    let mounted = host(&["mount", text(device)?, text(&place)?]);
    let kept = fs::read_to_string(place.join("file"));
    let refused = scene.run(&bundle).and_then(|output| output.fails());
    if mounted.is_ok() {
        host(&["umount", text(&place)?])?;
    }
    host(&["losetup", "--detach", text(device)?])?;
    result?;
    mounted?;
    ensure!(kept? == "kept\n", "what the container wrote");
    let refused = refused?;
    ensure!(
        refused.contains("mounts[7].source") && refused.contains("in use on this host"),
        "{refused}"
    );
    scene.expect_nothing_left()
}

/// A disk that is written to is attached once, one that is read any number of times.
fn attached_once(scene: &Scene) -> Result<()> {
    let disk = image(scene, "disk.img", None)?;
    let bundle = || -> Result<Bundle> { Ok(scene.bundle()?.shell("sleep 1000")) };
    let writer = scene.start(&with_disk(bundle()?, &disk, &[]))?;
    for options in [&[][..], &["ro"]] {
        let refused = scene.run(&with_disk(bundle()?, &disk, options))?.fails()?;
        ensure!(
            refused.contains("mounts[7].source") && refused.contains("in use by another container"),
            "{refused}"
        );
    }
    scene.call(&["kill", &writer.id, "KILL"])?.ok()?;
    writer.process()?.wait()?;
    scene.destroy(&writer.id)?;
    let readers = [
        scene.start(&with_disk(bundle()?, &disk, &["ro"]))?,
        scene.start(&with_disk(bundle()?, &disk, &["ro"]))?,
    ];
    scene.run(&with_disk(bundle()?, &disk, &[]))?.fails()?;
    for reader in readers {
        scene.destroy(&reader.id)?;
    }
    let bundle = with_disk(scene.bundle()?, &disk, &[]);
    scene.run(&bundle)?.ok()?;
    scene.expect_nothing_left()
}

/// What holds no filesystem, or only the beginning of one, is refused before a guest boots.
fn no_filesystem(scene: &Scene) -> Result<()> {
    let noise = scene.path("noise");
    fs::write(&noise, vec![0xa5; 1 << 20])?;
    let short = image(scene, "short.img", None)?;
    fs::File::options()
        .write(true)
        .open(&short)?
        .set_len(1 << 20)?;
    let broken = image(scene, "broken.img", None)?;
    let mut bytes = fs::read(&broken)?;
    // The superblock is there, and what it leads to is not.
    bytes[4096..256 << 10].fill(0xff);
    fs::write(&broken, bytes)?;
    for (source, word) in [
        (noise.as_path(), "neither ext4 nor erofs"),
        (short.as_path(), "truncated"),
        (broken.as_path(), "mounts[7]"),
        (Path::new("/nowhere.img"), "No such file"),
        (Path::new("/dev/null"), "a block device or an image"),
    ] {
        let refused = scene
            .run(&with_disk(scene.bundle()?, source, &[]))?
            .fails()?;
        ensure!(
            refused.contains("mounts[7]") && refused.contains(word),
            "{}: {refused}",
            source.display()
        );
        ensure!(refused.trim().lines().count() == 1, "{refused}");
    }
    let bundle = scene
        .bundle()?
        .with(|spec| spec["root"]["path"] = json!(noise));
    let refused = scene.run(&bundle)?.fails()?;
    ensure!(refused.contains("root.path"), "{refused}");
    scene.expect_nothing_left()
}

/// An image that is cut off or removed under the guest: errors in the guest, and nothing more.
fn gone_under_the_guest(scene: &Scene) -> Result<()> {
    let disk = image(scene, "disk.img", None)?;
    let script = "echo up; read x; dd if=/dev/zero of=/disk/file bs=64k count=64 2>/dev/null && \
        sync; dd if=/dev/vdb of=/dev/null bs=64k skip=128 count=1 2>/dev/null; echo alive";
    let mut process = scene.start_run(&with_disk(scene.bundle()?.shell(script), &disk, &[]))?;
    process.wait_for("up\n")?;
    fs::File::options().write(true).open(&disk)?.set_len(4096)?;
    fs::remove_file(&disk)?;
    process.send(b"\n")?;
    process.wait_for("alive\n")?;
    process.finish()?;
    scene.expect_nothing_left()
}
