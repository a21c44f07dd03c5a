//! Files that a container makes, as others see them: what is done to them may wait in the guest, since nobody else
//! can have them (docs/decisions/0010), but never beyond the container's close, and never where that is seen.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::vm::vmm;
use crate::inside::{INSIDE, LAST, check_many, parts};
use crate::process::{Other, Process};
use crate::scene::{Created, Scene};

super::cases!(creations;
    common: many_files, opened_before_they_are_closed, hidden_before_they_are_written, renamed_while_open,
        linked_while_open, replaced, closed, set_id_bits_go, known_times_stay, killed_while_open, heard_by_others, disk_is_full;
    vm: vmm_is_killed);

/// A container that does what it is told in `/data`, which is at `/again` as well.
fn maker(scene: &Scene) -> Result<Maker> {
    let data = scene.path("data");
    fs::create_dir_all(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["make", "/data"])?
        .bind(&data, "/data", &["rbind"])
        .bind(&data, "/again", &["rbind"]);
    Ok(Maker(scene.start(&bundle)?, 0))
}

/// A container, and how many lines it was told.
struct Maker(Created, u32);

impl Maker {
    fn does(&mut self, lines: &[&str]) -> Result<()> {
        for line in lines {
            self.0.streams.send(format!("{line}\n").as_bytes())?;
            self.1 += 1;
            self.0.streams.wait_for(&format!("{} done\n", self.1))?;
        }
        Ok(())
    }
}

/// What is seen without opening the file.
fn is_long(path: &Path, count: usize) -> Result<()> {
    let length = fs::metadata(path)?.len();
    ensure!(length == parts(count).len() as u64, "{length} bytes");
    Ok(())
}

fn is_there(path: &Path, count: usize) -> Result<()> {
    let found = fs::read(path)?;
    ensure!(found == parts(count), "{} other bytes", found.len());
    Ok(())
}

fn many_files(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["many"])?;
    check_many(&scene.path("data"), true)?;
    maker.does(&["check /again", "check /data"])?;
    scene.destroy(&maker.0.id)
}

fn opened_before_they_are_closed(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    let path = scene.path("data/a");
    maker.does(&["create a"])?;
    is_there(&path, 0)?;
    maker.does(&["create b", "write b"])?;
    is_there(&scene.path("data/b"), 1)?;
    maker.does(&["write b", "write a"])?;
    is_there(&scene.path("data/b"), 2)?;
    is_there(&path, 1)?;
    maker.does(&["close b", "close a"])?;
    is_there(&scene.path("data/b"), 2)?;
    scene.destroy(&maker.0.id)
}

/// What is written to a file that is for its owner only is never in one that others may open.
fn hidden_before_they_are_written(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "hide a", "write a"])?;
    let mode = fs::metadata(scene.path("data/a"))?.mode() & 0o7777;
    ensure!(mode == 0o600, "mode {mode:o}");
    is_there(&scene.path("data/a"), 1)?;
    maker.does(&["create b", "write b", "hide b", "close b"])?;
    let mode = fs::metadata(scene.path("data/b"))?.mode() & 0o7777;
    ensure!(mode == 0o600, "mode {mode:o}");
    scene.destroy(&maker.0.id)
}

fn renamed_while_open(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    fs::write(scene.path("data/name"), "old")?;
    maker.does(&["create a", "write a", "rename a name"])?;
    is_long(&scene.path("data/name"), 1)?;
    is_there(&scene.path("data/name"), 1)?;
    scene.destroy(&maker.0.id)
}

fn linked_while_open(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "write a", "link a name"])?;
    is_long(&scene.path("data/name"), 1)?;
    is_there(&scene.path("data/name"), 1)?;
    scene.destroy(&maker.0.id)
}

fn replaced(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    let path = scene.path("data/name");
    for _ in 0..20 {
        fs::write(&path, "old")?;
        maker.does(&["replace name"])?;
        is_long(&path, 1)?;
        is_there(&path, 1)?;
    }
    scene.destroy(&maker.0.id)
}

fn closed(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    for number in 0..20 {
        let verbs = ["create", "write", "write", "close"];
        for verb in verbs {
            maker.does(&[&format!("{verb} {number}")])?;
        }
        is_long(&scene.path(&format!("data/{number}")), 2)?;
    }
    scene.destroy(&maker.0.id)
}

/// Naming the owner takes these bits away, also where it is the owner already.
fn set_id_bits_go(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "write a", "set-id a", "own a", "close a"])?;
    maker.does(&["create b", "own b", "hide b", "own b", "write b", "close b"])?;
    for (name, expected) in [("a", 0o755), ("b", 0o600)] {
        let path = scene.path("data").join(name);
        let mode = fs::metadata(&path)?.mode() & 0o7777;
        ensure!(mode == expected, "{name}: mode {mode:o}");
        is_long(&path, 1)?;
        is_there(&path, 1)?;
    }
    scene.destroy(&maker.0.id)
}

fn known_times_stay(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "write a", "steady a", "close a"])?;
    is_long(&scene.path("data/a"), 1)?;
    scene.destroy(&maker.0.id)
}

fn killed_while_open(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "write a", "hide a"])?;
    let process = maker.0.process()?;
    scene.call(&["kill", &maker.0.id, "KILL"])?.ok()?;
    process.wait()?;
    is_long(&scene.path("data/a"), 1)?;
    is_there(&scene.path("data/a"), 1)?;
    scene.destroy(&maker.0.id)
}

fn heard_by_others(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    let data = scene.path("data");
    let mut command = Command::new("/proc/self/exe");
    command.args([INSIDE, "watch"]).arg(&data);
    let mut watcher = Process::spawn(command)?;
    watcher.wait_for("watching\n")?;
    maker.does(&["create a", "write a", "hide a", "close a"])?;
    fs::write(data.join(LAST), "")?;
    let heard = watcher.finish()?.ok()?;
    heard.says(&["CREATE", "MODIFY", "ATTRIB", "CLOSE_WRITE"])?;
    scene.destroy(&maker.0.id)
}

fn disk_is_full(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir_all(&data)?;
    let shell = |script: String| -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-ec", &script]);
        Process::spawn(command)?.finish()?.ok()?;
        Ok(())
    };
    shell(format!(
        "mount -t tmpfs -o size=8m small {}",
        data.display()
    ))?;
    let told = (|| -> Result<()> {
        let mut maker = maker(scene)?;
        maker.0.streams.send(b"fill a\n")?;
        maker.0.streams.wait_for("full at write\n")?;
        scene.destroy(&maker.0.id)
    })();
    shell(format!("umount -l {}", data.display()))?;
    told
}

/// What was synced or closed is there.
fn vmm_is_killed(scene: &Scene) -> Result<()> {
    let mut maker = maker(scene)?;
    maker.does(&["create a", "write a", "hide a", "sync a"])?;
    maker.does(&["create b", "write b", "hide b", "close b", "create c"])?;
    let monitor = maker.0.process()?;
    Other::open(vmm()?)?.signal(Signal::KILL)?;
    monitor.wait()?;
    for name in ["data/a", "data/b"] {
        is_there(&scene.path(name), 1)?;
        let mode = fs::metadata(scene.path(name))?.mode() & 0o7777;
        ensure!(mode == 0o600, "mode {mode:o}");
    }
    scene.destroy(&maker.0.id)
}
