//! inotify in a container: what others change on the host is heard, what the container changes
//! itself is heard once.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};

use crate::inside::LAST;
use crate::scene::Scene;

super::cases!(inotify;
    common: changes_in_a_directory, changes_of_a_file, own_changes_once, watched_from_two_sides,
        many_watches;
    vm: );

/// The lines that a watcher printed.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim_end).collect()
}

fn changes_in_a_directory(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir_all(data.join("sub"))?;
    let bundle = scene
        .bundle()?
        .inside(&["watch", "/data", "/data/sub"])?
        .bind(&data, "/data", &["rbind"]);
    let mut watcher = scene.start(&bundle)?;
    watcher.streams.wait_for("watching\n")?;
    fs::write(data.join("new"), "first")?;
    watcher.streams.wait_for("content first\n")?;
    // As long as the old content, and at once.
    fs::write(data.join("new"), "again")?;
    watcher.streams.wait_for("content again\n")?;
    fs::set_permissions(data.join("new"), fs::Permissions::from_mode(0o600))?;
    fs::rename(data.join("new"), data.join("sub/moved"))?;
    fs::create_dir(data.join("directory"))?;
    fs::remove_dir(data.join("directory"))?;
    fs::remove_file(data.join("sub/moved"))?;
    std::os::unix::fs::symlink("x", data.join("link"))?;
    fs::write(data.join(LAST), "")?;
    watcher.streams.wait_for(&format!("CREATE {LAST}\n"))?;
    let text = watcher.streams.stdout();
    let expected = "\
watching
/data CREATE new
/data MODIFY new
/data CLOSE_WRITE new
content first
/data MODIFY new
/data CLOSE_WRITE new
content again
/data ATTRIB new
/data MOVED_FROM new move 0
/data/sub MOVED_TO moved move 0
/data CREATE|ISDIR directory
/data DELETE|ISDIR directory
/data/sub DELETE moved
/data CREATE link
/data CREATE last
";
    // Truncating and writing may be one event or two.
    let mut got = lines(&text);
    got.dedup();
    ensure!(got == lines(expected), "{text}");
    scene.destroy(&watcher.id)
}

fn changes_of_a_file(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let file = data.join("file");
    fs::write(&file, "old")?;
    let bundle = scene
        .bundle()?
        .inside(&["watch", "/data/file", "/data"])?
        .bind(&data, "/data", &["rbind"]);
    let mut watcher = scene.start(&bundle)?;
    watcher.streams.wait_for("watching\n")?;
    let mut open = fs::OpenOptions::new().append(true).open(&file)?;
    open.write_all(b", newer")?;
    drop(open);
    watcher.streams.wait_for("content old, newer\n")?;
    fs::rename(&file, data.join("other"))?;
    watcher.streams.wait_for("/data/file MOVE_SELF")?;
    fs::remove_file(data.join("other"))?;
    watcher.streams.wait_for("/data/file DELETE_SELF")?;
    watcher.streams.wait_for("/data/file IGNORED")?;
    fs::write(data.join(LAST), "")?;
    watcher.streams.wait_for(&format!("CREATE {LAST}\n"))?;
    scene.destroy(&watcher.id)
}

fn own_changes_once(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["watch-own-changes", "/data"])?
        .bind(&data, "/data", &["rbind"]);
    let mut watcher = scene.start(&bundle)?;
    watcher.streams.wait_for("changed\n")?;
    fs::write(data.join(LAST), "")?;
    watcher.streams.wait_for(&format!("CREATE {LAST}\n"))?;
    let text = watcher.streams.stdout();
    let expected = "\
changed
/data CREATE file
/data MODIFY file
/data CLOSE_WRITE file
content
/data MOVED_FROM file move 0
/data MOVED_TO renamed move 0
/data CREATE|ISDIR directory
/data ATTRIB renamed
/data CREATE link
/data DELETE renamed
/data DELETE|ISDIR directory
/data CREATE last
";
    ensure!(lines(&text) == lines(expected), "{text}");
    scene.destroy(&watcher.id)
}

/// A directory that is bound twice, and a container that changes what another watches.
fn watched_from_two_sides(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["watch", "/one", "/two"])?
        .bind(&data, "/one", &["rbind"])
        .bind(&data, "/two", &["rbind", "ro"]);
    let mut watcher = scene.start(&bundle)?;
    watcher.streams.wait_for("watching\n")?;
    let writer =
        scene
            .bundle()?
            .shell("echo x >/data/from-another")
            .bind(&data, "/data", &["rbind"]);
    scene.run(&writer)?.ok()?;
    watcher.streams.wait_for("CLOSE_WRITE from-another\n")?;
    fs::write(data.join(LAST), "")?;
    watcher.streams.wait_for(&format!("CREATE {LAST}\n"))?;
    scene.destroy(&watcher.id)
}

fn many_watches(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["watch-many", "/data", "500"])?
        .bind(&data, "/data", &["rbind"]);
    scene.run(&bundle)?.ok()?.says(&["watched 500 files\n"])?;
    Ok(())
}
