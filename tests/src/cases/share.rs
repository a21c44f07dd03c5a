//! Files of the host in a container do what POSIX and Linux promise: the same program, with the
//! same expectations, with every runtime.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::inside::{FILE_CHECKS, HELD, MANY};
use crate::scene::Scene;

super::cases!(share;
    common: files_of_a_volume, files_of_the_root, large_directory, changes_of_the_host, two_containers,
        nothing_left_of_unnamed_files;
    vm: );

/// All that the checks do as root.
const CAPABILITIES: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_KILL",
];

/// Runs every check in a directory of a container, and tells all that fail.
fn check(scene: &Scene, place: &str) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777))?;
    let checks = FILE_CHECKS.join(" ");
    let script = format!(
        "for check in {checks}; do /bin/inside --inside files $check {place} || echo failed; done"
    );
    let bundle = scene
        .bundle()?
        .inside(&[])?
        .shell(&script)
        .bind(&data, "/data", &["rbind"])
        .with(|spec| {
            spec["process"]["capabilities"] = json!({
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            });
        });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(!output.text().contains("failed"), "{output}");
    Ok(())
}

fn files_of_a_volume(scene: &Scene) -> Result<()> {
    check(scene, "/data")
}

fn files_of_the_root(scene: &Scene) -> Result<()> {
    check(scene, "/var/data")
}

fn large_directory(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    for number in 0..MANY {
        fs::File::create(data.join(format!("entry-{number}")))?;
    }
    let bundle = scene
        .bundle()?
        .inside(&["files", "large-directory", "/data"])?
        .bind(&data, "/data", &["rbind"]);
    let mut process = scene.start_run(&bundle)?;
    process.close_stdin();
    // The guest takes a look at each of them, which an emulated CPU feels.
    process.wait_within(Duration::from_secs(200))?;
    process
        .output_at_end()?
        .ok()?
        .says(&["all 50000 were there\n"])?;
    Ok(())
}

/// Seen within the time that docs/sharing.md gives: at once what was not looked at before, else
/// after a second.
fn changes_of_the_host(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::write(data.join("file"), "old")?;
    let script = "cd /data; while read wanted; do n=0; \
        until [ \"$(cat file 2>&1)\" = \"$wanted\" ] || [ $n = 30 ]; do usleep 50000; n=$((n+1)); done; \
        [ $n = 30 ] && echo too late || echo seen $wanted; done";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind"]);
    let mut container = scene.start(&bundle)?;
    container.streams.send(b"old\n")?;
    container.streams.wait_for("seen old\n")?;
    // In place and of the same length, replaced, gone and made anew.
    fs::write(data.join("file"), "new")?;
    container.streams.send(b"new\n")?;
    container.streams.wait_for("seen new\n")?;
    fs::write(data.join("next"), "next")?;
    fs::rename(data.join("next"), data.join("file"))?;
    container.streams.send(b"next\n")?;
    container.streams.wait_for("seen next\n")?;
    fs::remove_file(data.join("file"))?;
    fs::write(data.join("file"), "last")?;
    container.streams.send(b"last\n")?;
    container.streams.wait_for("seen last\n")?;
    scene.destroy(&container.id)
}

/// What one container has written, another reads.
fn two_containers(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let reader =
        "until [ \"$(cat /data/answer 2>/dev/null)\" = done ]; do usleep 50000; done; echo got it";
    let bundle = scene
        .bundle()?
        .shell(reader)
        .bind(&data, "/data", &["rbind"]);
    let mut reading = scene.start(&bundle)?;
    let bundle = scene
        .bundle()?
        .shell("echo done >/data/answer")
        .bind(&data, "/data", &["rbind"]);
    scene.run(&bundle)?.ok()?;
    reading.streams.wait_for("got it\n")?;
    scene.destroy(&reading.id)
}

/// The space of a file that never had a name is free again when it is closed.
fn nothing_left_of_unnamed_files(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    // A file system of this test's own.
    let free = || -> Result<(u64, u64)> {
        let known = rustix::fs::statvfs(&data)?;
        Ok((known.f_bfree * known.f_frsize, known.f_ffree))
    };
    let bundle = scene
        .bundle()?
        .inside(&["files", "unnamed-held", "/data"])?
        .bind(&data, "/data", &["rbind"])
        .bind(&data, "/read-only", &["rbind", "ro"]);
    let mut holder = scene.create(&bundle)?;
    let before = free()?;
    scene.call(&["start", &holder.id])?.ok()?;
    holder.streams.wait_for("held\n")?;
    let held = free()?;
    let taken = before.0.saturating_sub(held.0);
    ensure!(taken >= HELD as u64, "{taken} bytes are taken");
    ensure!(fs::read_dir(&data)?.next().is_none(), "it has a name");
    holder.streams.send(b"close\n")?;
    holder.streams.wait_for("closed\n")?;
    // The guest forgets it with one of its next requests.
    let mut looked = String::from("closed\n");
    for _ in 0..50 {
        if free()?.0 >= held.0 + HELD as u64 && free()?.1 > held.1 {
            return scene.destroy(&holder.id);
        }
        looked.push_str("looked\n");
        holder.streams.send(b"look\n")?;
        holder.streams.wait_for(&looked)?;
    }
    bail!(
        "of {held:?} free before it was closed, {:?} are now",
        free()?
    );
}
