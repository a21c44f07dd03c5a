//! What a container writes to files of the host, as others see it: at once, also where the guest has the file for
//! itself and writes may wait.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::inside::{digest, pages};
use crate::scene::{Created, Scene};

super::cases!(writes;
    common: seen_by_who_opens, others_write, seen_before_long, at_another_mount, writer_is_killed, at_random,
        at_random_while_others_look;
    vm: );

/// Pages that the program in the container writes first.
const PAGES: usize = 64;

/// A container that has written [`PAGES`] pages to `/data/file`.
fn writer(scene: &Scene) -> Result<Created> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["write", "/data/file"])?
        .bind(&data, "/data", &["rbind"])
        .bind(&data, "/again", &["rbind"]);
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("64 pages\n")?;
    Ok(container)
}

fn is_there(path: &Path, count: usize) -> Result<()> {
    let found = fs::read(path)?;
    ensure!(
        found == pages(count),
        "{} bytes are there of {count} pages",
        found.len()
    );
    Ok(())
}

fn seen_by_who_opens(scene: &Scene) -> Result<()> {
    let mut container = writer(scene)?;
    let path = scene.path("data/file");
    is_there(&path, PAGES)?;
    container.streams.send(b"more\n")?;
    container.streams.wait_for("128 pages\n")?;
    is_there(&path, 2 * PAGES)?;
    scene.destroy(&container.id)
}

/// And the container sees what they write.
fn others_write(scene: &Scene) -> Result<()> {
    let mut container = writer(scene)?;
    let path = scene.path("data/file");
    let other = OpenOptions::new().write(true).open(&path)?;
    other.write_all_at(b"*", 0)?;
    container.streams.send(b"first\n")?;
    container.streams.wait_for("42\n")?;
    container.streams.send(b"more\n")?;
    container.streams.wait_for("128 pages\n")?;
    let mut expected = pages(2 * PAGES);
    expected[0] = b'*';
    ensure!(fs::read(&path)? == expected, "another content");
    scene.destroy(&container.id)
}

/// What docs/sharing.md promises to those who do not open the file.
fn seen_before_long(scene: &Scene) -> Result<()> {
    let container = writer(scene)?;
    let path = scene.path("data/file");
    let begun = Instant::now();
    while fs::metadata(&path)?.len() < pages(PAGES).len() as u64 {
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "{} bytes after 20 s",
            fs::metadata(&path)?.len()
        );
        thread::sleep(Duration::from_millis(20));
    }
    scene.destroy(&container.id)
}

/// One file at two places in one container.
fn at_another_mount(scene: &Scene) -> Result<()> {
    let mut container = writer(scene)?;
    container.streams.send(b"/again/file\n")?;
    container.streams.wait_for("the same\n")?;
    scene.destroy(&container.id)
}

fn writer_is_killed(scene: &Scene) -> Result<()> {
    let container = writer(scene)?;
    let process = container.process()?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.wait()?;
    is_there(&scene.path("data/file"), PAGES)?;
    scene.destroy(&container.id)
}

fn at_random(scene: &Scene) -> Result<()> {
    work_at_random(scene, "1", false)
}

fn at_random_while_others_look(scene: &Scene) -> Result<()> {
    work_at_random(scene, "2", true)
}

/// With `looked_at`, somebody opens the file again and again while the container works.
fn work_at_random(scene: &Scene, seed: &str, looked_at: bool) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let path = data.join("file");
    let bundle = scene
        .bundle()?
        .inside(&["write-randomly", "/data/file", seed])?
        .bind(&data, "/data", &["rbind"]);
    let over = AtomicBool::new(!looked_at);
    let output = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // It is there soon.
                let _ = fs::read(&path);
                thread::sleep(Duration::from_millis(3));
            }
        });
        let output = scene.run(&bundle);
        over.store(true, Ordering::Relaxed);
        output
    });
    let output = output?.ok()?;
    let left = format!("{:016x}\n", digest(&fs::read(&path)?));
    output.says(&[&left])?;
    Ok(())
}
