//! Bind mounts of host files and directories, tmpfs, options and propagation.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount_change};
use serde_json::json;

use crate::scene::Scene;

super::cases!(volumes;
    common: read_write, read_only, single_file, made_mount_points, options, recursive, one_in_another, later_changes,
        rootfs_is_written, bound_root_goes_away, data_on_a_bind_mount, shared_memory, overlay;
    vm: propagation, id_mapped);

/// The mount of the inner one is the container's, though the outer one lies on a mount that the host
/// shares with others.
fn one_in_another(scene: &Scene) -> Result<()> {
    let (shared, inner) = (scene.path("shared"), scene.path("inner"));
    fs::create_dir(&shared)?;
    fs::create_dir(&inner)?;
    rustix::mount::mount("shared", &shared, "tmpfs", MountFlags::empty(), None)?;
    mount_change(&shared, MountPropagationFlags::SHARED)?;
    let outer = shared.join("outer");
    fs::create_dir_all(outer.join("at"))?;
    fs::write(inner.join("x"), "inner\n")?;
    let bundle = scene
        .bundle()?
        .shell("cat /o/at/x; echo up; sleep 1000")
        .bind(&outer, "/o", &["rbind"])
        .bind(&inner, "/o/at", &["rbind"]);
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("inner\nup\n")?;
    ensure!(!outer.join("at/x").exists(), "it is mounted on the host");
    scene.destroy(&container.id)?;
    ensure!(!outer.join("at/x").exists(), "it is left on the host");
    rustix::mount::unmount(&shared, UnmountFlags::empty())?;
    Ok(())
}

/// Podman's volumes with the option `O`, and images as volumes: of directories of the host, mounted by the
/// runtime.
fn overlay(scene: &Scene) -> Result<()> {
    let place = |name: &str| scene.path(name).display().to_string();
    for name in ["one", "two", "upper", "work"] {
        fs::create_dir(scene.path(name))?;
        fs::write(scene.path(name).join(name), "here\n")?;
    }
    fs::remove_file(scene.path("work").join("work"))?;
    let lower = format!("lowerdir={}:{}", place("one"), place("two"));
    let upper = format!("upperdir={},workdir={}", place("upper"), place("work"));
    let changed = format!("{lower},{upper}");
    let script = "cd /changed && cat one two upper && echo new >new && rm two && ls; \
        cd /read && ls && echo x >x || echo no";
    let bundle = scene
        .bundle()?
        .shell(script)
        .mount(
            json!({ "destination": "/changed", "type": "overlay", "source": "overlay",
            "options": [changed, "volatile", "private"] }),
        )
        .mount(
            json!({ "destination": "/read", "type": "overlay", "source": "overlay",
            "options": [lower, "ro"] }),
        );
    let expected = "here\nhere\nhere\nnew\none\nupper\none\ntwo\nno\n";
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == expected, "{output}");
    ensure!(scene.path("upper").join("new").exists(), "the host's side");
    ensure!(scene.path("two").join("two").exists(), "the lower one");
    scene.expect_nothing_left()
}

/// Engines make a tmpfs for /dev/shm and name it as a bind mount's source.
fn shared_memory(scene: &Scene) -> Result<()> {
    let source = scene.path("engine").join("shm");
    fs::create_dir_all(&source)?;
    let size = Some(c"mode=1777,size=1m");
    rustix::mount::mount("shm", &source, "tmpfs", MountFlags::empty(), size)?;
    let script = "stat -c %a /dev/shm; dd if=/dev/zero of=/dev/shm/x bs=64k count=8 2>/dev/null && \
        echo fits; dd if=/dev/zero of=/dev/shm/y bs=64k count=16 2>/dev/null || echo full; \
        grep ' /dev/shm ' /proc/mounts";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == "/dev/shm" {
                let options = json!(["bind", "rprivate", "nosuid", "noexec", "nodev"]);
                *mount = json!({ "destination": "/dev/shm", "type": "bind", "source": source,
                    "options": options });
            }
        }
    });
    let output = scene
        .run(&bundle)?
        .ok()?
        .says(&["1777\n", "fits\n", "full\n"]);
    let left = fs::read_dir(&source)?.count();
    rustix::mount::unmount(&source, rustix::mount::UnmountFlags::empty())?;
    let output = output?;
    if scene.runtime == crate::runtime::Runtime::Bulkhead {
        // It is the guest's own memory, not the host's.
        ensure!(output.text().contains(" /dev/shm tmpfs "), "{output}");
        ensure!(left == 0, "{left} files on the host");
    }
    Ok(())
}

fn read_write(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::write(data.join("from-host"), "hello\n")?;
    let script = "cat /data/from-host; echo written >/data/from-container; mkdir -p /data/a/b; \
        ln -s ../x /data/a/link; mv /data/from-host /data/moved; chown 12:34 /data/moved; \
        chmod 4711 /data/moved; truncate -s 5000000000 /data/sparse 2>/dev/null || \
        dd if=/dev/null of=/data/sparse bs=1 seek=5000000000; mkfifo /data/fifo; sync";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind", "rw"])
        .with(|spec| {
            let some = json!(["CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE"]);
            spec["process"]["capabilities"] =
                json!({ "bounding": some, "effective": some, "permitted": some });
        });
    scene.run(&bundle)?.ok()?.says(&["hello\n"])?;
    ensure!(
        fs::read_to_string(data.join("from-container"))? == "written\n",
        "content"
    );
    let moved = fs::metadata(data.join("moved"))?;
    ensure!(
        (moved.uid(), moved.gid()) == (12, 34),
        "owner {}:{}",
        moved.uid(),
        moved.gid()
    );
    ensure!(moved.mode() & 0o7777 == 0o4711, "mode {:o}", moved.mode());
    ensure!(
        fs::read_link(data.join("a/link"))?.to_str() == Some("../x"),
        "symbolic link"
    );
    ensure!(
        fs::metadata(data.join("sparse"))?.len() == 5_000_000_000,
        "sparse file"
    );
    ensure!(
        data.join("a/b").is_dir() && data.join("fifo").exists(),
        "directory and pipe"
    );
    Ok(())
}

fn read_only(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::write(data.join("file"), "content\n")?;
    let script = "cat /data/file; echo x >/data/file; touch /data/new; rm /data/file; \
        mount -o remount,rw /data";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["bind", "ro"]);
    let output = scene.run(&bundle)?;
    ensure!(output.text() == "content\n", "{output}");
    ensure!(
        output.errors().matches("Read-only file system").count() >= 3,
        "{output}"
    );
    ensure!(
        fs::read_to_string(data.join("file"))? == "content\n",
        "the file was changed"
    );
    ensure!(
        crate::leftovers::entries(&data).len() == 1,
        "the directory was changed"
    );
    Ok(())
}

fn id_mapped(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir_all(data.join("below"))?;
    fs::write(data.join("below/file"), "content\n")?;
    std::os::unix::fs::chown(data.join("below"), Some(5), Some(6))?;
    // What is 0 on the host is 1000 in the container, and so on; nobody else has an id there.
    let script = "cd /data; stat -c '%n %u %g' . below below/file; id -u; echo x > new && mkdir made && \
        ln -s new link && mv new newer && chown 1003:1004 made && cat newer";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind"])
        .with(|spec| {
            spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
            let some = json!(["CAP_CHOWN"]);
            spec["process"]["capabilities"] = json!({ "bounding": some, "effective": some,
                "permitted": some, "inheritable": some, "ambient": some });
            let mapping = json!([{ "containerID": 0, "hostID": 1000, "size": 100 }]);
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                for mount in mounts
                    .iter_mut()
                    .filter(|mount| mount["destination"] == "/data")
                {
                    mount["uidMappings"] = mapping.clone();
                    mount["gidMappings"] = mapping.clone();
                }
            }
        });
    let expected = ". 1000 1000\nbelow 1005 1006\nbelow/file 1000 1000\n1000\nx\n";
    scene.run(&bundle)?.ok()?.says(&[expected])?;
    for (name, owner) in [("newer", (0, 0)), ("made", (3, 4)), ("link", (0, 0))] {
        let found = fs::symlink_metadata(data.join(name))?;
        let found = (found.uid(), found.gid());
        ensure!(found == owner, "{name} belongs to {found:?} on the host");
    }
    Ok(())
}

fn single_file(scene: &Scene) -> Result<()> {
    let (writable, fixed) = (scene.path("writable"), scene.path("fixed"));
    fs::write(&writable, "old\n")?;
    fs::write(&fixed, "fixed\n")?;
    let script = "cat /etc/writable /etc/passwd; echo new >/etc/writable; echo x >/etc/passwd";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&writable, "/etc/writable", &["bind"])
        .bind(&fixed, "/etc/passwd", &["bind", "ro"]);
    let output = scene.run(&bundle)?.says(&["old\nfixed\n"])?;
    ensure!(output.errors().contains("Read-only"), "{output}");
    ensure!(
        fs::read_to_string(&writable)? == "new\n",
        "the host's file has the old content"
    );
    ensure!(
        fs::read_to_string(&fixed)? == "fixed\n",
        "the read-only file was changed"
    );
    Ok(())
}

fn made_mount_points(scene: &Scene) -> Result<()> {
    let (data, file) = (scene.path("data"), scene.path("file"));
    fs::create_dir(&data)?;
    fs::write(&file, "in a file\n")?;
    fs::write(data.join("x"), "in a directory\n")?;
    let bundle = scene
        .bundle()?
        .shell("cat /a/deep/place/x /another/deep/file; echo t >/some/tmpfs/t && cat /some/tmpfs/t")
        .bind(&data, "/a/deep/place", &["rbind"])
        .bind(&file, "/another/deep/file", &["bind"])
        .mount(json!({ "destination": "/some/tmpfs", "type": "tmpfs", "source": "tmpfs" }));
    scene
        .run(&bundle)?
        .ok()?
        .says(&["in a directory\nin a file\nt\n"])?;
    Ok(())
}

fn options(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let script = "cp /bin/busybox /data/true; /data/true; cp /bin/busybox /tmpfs/true; /tmpfs/true; \
        grep -E ' /(data|tmpfs) ' /proc/self/mounts; stat -c %a /tmpfs";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind", "noexec", "nosuid", "nodev"])
        .mount(json!({
            "destination": "/tmpfs", "type": "tmpfs", "source": "tmpfs",
            "options": ["noexec", "nosuid", "nodev", "mode=1750", "size=8m"],
        }));
    let output = scene.run(&bundle)?.ok()?;
    ensure!(
        output.errors().matches("Permission denied").count() == 2,
        "noexec: {output}"
    );
    let text = output.text();
    for line in text.lines().filter(|line| line.contains(" /")) {
        for option in ["noexec", "nosuid", "nodev"] {
            ensure!(line.contains(option), "{option} is missing: {line}");
        }
    }
    ensure!(text.ends_with("1750\n"), "mode of the tmpfs: {output}");
    Ok(())
}

/// `rbind` brings mounts below the source along, `bind` does not.
fn recursive(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir_all(data.join("below"))?;
    let below = data.join("below");
    rustix::mount::mount("tests", &below, "tmpfs", MountFlags::empty(), None)?;
    let bound = (|| {
        fs::write(below.join("file"), "below\n")?;
        let bundle = scene
            .bundle()?
            .shell("cat /with/below/file; ls /without/below")
            .bind(&data, "/with", &["rbind", "rprivate"])
            .bind(&data, "/without", &["bind", "private"]);
        scene.run(&bundle)
    })();
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::empty())?;
    let output = bound?.ok()?;
    ensure!(output.text() == "below\n", "{output}");
    Ok(())
}

/// What the host changes while the container runs, the container sees (in a microVM soon, not at
/// once: the guest may trust what it has read for a moment), and the other way round.
fn later_changes(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::write(data.join("file"), "first\n")?;
    let script = "cat /data/file; while read x; do \
        until grep $x /data/file; do :; done; echo $x >/data/answer; echo done; done";
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind"]);
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("first\n")?;
    fs::write(data.join("file"), "second, longer\n")?;
    container.streams.send(b"second\n")?;
    container.streams.wait_for("second, longer\ndone\n")?;
    ensure!(
        fs::read_to_string(data.join("answer"))? == "second\n",
        "the container's answer"
    );
    fs::write(data.join("new"), "third\n")?;
    fs::rename(data.join("new"), data.join("file"))?;
    container.streams.send(b"third\n")?;
    container.streams.wait_for("third\ndone\n")?;
    scene.destroy(&container.id)
}

fn rootfs_is_written(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo kept >/etc/kept; rm /etc/group");
    scene.run(&bundle)?.ok()?;
    ensure!(
        fs::read_to_string(bundle.rootfs().join("etc/kept"))? == "kept\n",
        "what was written"
    );
    ensure!(
        !bundle.rootfs().join("etc/group").exists(),
        "what was removed"
    );
    Ok(())
}

/// What propagates is marked in the container's mount table (proc_pid_mountinfo(5), "optional
/// fields"). What peers show there depends on the host's own mounts.
fn propagation(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let show = "cat /proc/self/mountinfo";
    let bundle = scene
        .bundle()?
        .shell(show)
        .bind(&data, "/private", &["rbind", "rprivate"])
        .bind(&data, "/shared", &["rbind", "rshared"])
        .bind(&data, "/plain", &["rbind"]);
    let text = scene.run(&bundle)?.ok()?.text();
    let line = |text: &str, place: &str| {
        let line = text
            .lines()
            .find(|line| line.split(' ').nth(4) == Some(place));
        line.unwrap_or_default().to_owned()
    };
    ensure!(line(&text, "/shared").contains(" shared:"), "{text}");
    for place in ["/private", "/plain", "/"] {
        let line = line(&text, place);
        ensure!(
            !line.is_empty() && !line.contains(" shared:"),
            "{place}: {text}"
        );
    }
    for (name, shared) in [("shared", true), ("private", false), ("slave", false)] {
        let bundle = scene.bundle()?.shell(show).with(|spec| {
            spec["linux"]["rootfsPropagation"] = json!(name);
        });
        let text = scene.run(&bundle)?.ok()?.text();
        ensure!(
            line(&text, "/").contains(" shared:") == shared,
            "{name}: {text}"
        );
    }
    Ok(())
}

/// What a container unmounts is gone, and not just what lay on top of it.
fn bound_root_goes_away(scene: &Scene) -> Result<()> {
    let script = "mkdir /again && mount -o rbind / /again && umount -l /again && \
        grep -c ' /again ' /proc/self/mountinfo; ls /again | wc -l; rmdir /again";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        let some = json!(["CAP_SYS_ADMIN"]);
        spec["process"]["capabilities"] =
            json!({ "bounding": some, "effective": some, "permitted": some });
    });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == "0\n0\n", "{output}");
    Ok(())
}

/// Kernels ignore it, so engines do not bother to leave it out.
fn data_on_a_bind_mount(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let options = ["bind", "mode=755", "size=64k"];
    let bundle = scene
        .bundle()?
        .shell("echo ran")
        .bind(&data, "/data", &options);
    scene.run(&bundle)?.ok()?.says(&["ran\n"])?;
    Ok(())
}
