//! Volumes, single files, `cp`, `diff`, `commit`, `export`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};

super::engine_cases!(files;
    [both quick] copy_while_running, volumes;
    [both] single_file, named_volume, copy_while_stopped, copy_of_a_volume, changes_are_kept, commit, export,
        missing_source, volumes_from, nested_mounts;
    [podman] owner_of_a_volume, volume_of_the_image);

fn volumes(engine: &Engine) -> Result<()> {
    let directory = engine.path("data");
    fs::create_dir(&directory)?;
    fs::write(format!("{directory}/from-host"), "hello\n")?;
    let volume = format!("{directory}:/data");
    engine
        .script(
            &["--volume", &volume],
            "cat /data/from-host; echo back >/data/from-container",
        )?
        .ok()?
        .says(&["hello\n"])?;
    ensure!(
        fs::read_to_string(format!("{directory}/from-container"))? == "back\n",
        "content"
    );
    let output = engine
        .script(
            &["--volume", &format!("{volume}:ro")],
            "cat /data/from-host; touch /data/x",
        )?
        .expect(1)?;
    ensure!(
        output.text() == "hello\n" && output.errors().contains("Read-only"),
        "{output}"
    );
    Ok(())
}

fn single_file(engine: &Engine) -> Result<()> {
    let file = engine.path("file");
    fs::write(&file, "one\n")?;
    engine
        .script(
            &["--volume", &format!("{file}:/etc/made.conf")],
            "cat /etc/made.conf; echo two >>/etc/made.conf",
        )?
        .ok()?
        .says(&["one\n"])?;
    ensure!(fs::read_to_string(&file)? == "one\ntwo\n", "content");
    engine
        .script(
            &["--volume", &format!("{file}:/etc/made.conf:ro")],
            "echo three >/etc/made.conf",
        )?
        .expect(1)?;
    Ok(())
}

fn named_volume(engine: &Engine) -> Result<()> {
    engine.call(&["volume", "create", "made-volume"])?.ok()?;
    engine
        .script(&["--volume", "made-volume:/home"], "echo kept >/home/file")?
        .ok()?;
    engine
        .script(
            &["--mount", "type=volume,source=made-volume,target=/v"],
            "cat /v/file",
        )?
        .ok()?
        .says(&["kept\n"])?;
    // One that is made with the container: with --rm it goes, too, if it has no name.
    engine
        .script(&["--volume", "/anonymous"], "echo x >/anonymous/x")?
        .ok()?;
    engine.call(&["volume", "rm", "made-volume"])?.ok()?;
    Ok(())
}

fn volumes_from(engine: &Engine) -> Result<()> {
    engine.call(&["volume", "create", "made-shared"])?.ok()?;
    engine.start(
        "made-first",
        &[
            "--volume",
            "made-shared:/shared",
            IMAGE,
            "sh",
            "-c",
            "echo first >/shared/x; echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-first", "ready")?;
    // Two machines use it at a time.
    engine
        .script(
            &["--volumes-from", "made-first"],
            "cat /shared/x; echo second >/shared/y",
        )?
        .ok()?
        .says(&["first"])?;
    engine
        .exec("made-first", "cat /shared/y")?
        .ok()?
        .says(&["second"])?;
    engine.remove(&["made-first"])?;
    engine.call(&["volume", "rm", "made-shared"])?.ok()?;
    Ok(())
}

fn nested_mounts(engine: &Engine) -> Result<()> {
    let (outer, inner) = (engine.path("outer"), engine.path("inner"));
    fs::create_dir(&outer)?;
    fs::create_dir(&inner)?;
    fs::write(format!("{inner}/x"), "inner\n")?;
    let options = [
        "--volume",
        &format!("{outer}:/o"),
        "--volume",
        &format!("{inner}:/o/a/i"),
        "--tmpfs",
        "/o/a/i/t",
    ];
    engine
        .script(&options, "cat /o/a/i/x; touch /o/a/i/t/x /o/y; ls /o/a/i/t")?
        .ok()?
        .says(&["inner\nx\n"])?;
    ensure!(
        fs::exists(format!("{outer}/y"))? && !fs::exists(format!("{outer}/a/i/x"))?,
        "mounts lie wrong"
    );
    Ok(())
}

fn missing_source(engine: &Engine) -> Result<()> {
    let missing = engine.path("missing");
    let output = engine.script(
        &["--mount", &format!("type=bind,source={missing},target=/m")],
        "true",
    )?;
    let why = output.fails()?;
    ensure!(why.contains("missing"), "{why}");
    Ok(())
}

fn copy_while_running(engine: &Engine) -> Result<()> {
    let file = engine.path("file");
    fs::write(&file, "copied\n")?;
    engine.start(
        "made-cp",
        &[
            IMAGE,
            "sh",
            "-c",
            "echo inside >/etc/inside; echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-cp", "ready")?;
    engine
        .call(&["cp", &file, "made-cp:/root/made-copied"])?
        .ok()?;
    ensure!(
        !fs::exists("/root/made-copied")?,
        "it went to the host's /root"
    );
    engine
        .exec("made-cp", "cat /root/made-copied")?
        .ok()?
        .says(&["copied\n"])?;
    let back = engine.path("back");
    engine.call(&["cp", "made-cp:/etc/inside", &back])?.ok()?;
    ensure!(fs::read_to_string(&back)? == "inside\n", "content");
    engine.call(&["cp", "made-cp:/etc/passwd", &back])?.ok()?;
    ensure!(
        fs::read_to_string(&back)?.contains("/home:/bin/sh"),
        "it is the host's file"
    );
    // Whole directories; links are not followed out of the container.
    engine
        .exec(
            "made-cp",
            "mkdir /tmp/d && cd /tmp/d && echo 1 >a && ln -s a b && ln -s /etc/made-nowhere c",
        )?
        .ok()?;
    engine
        .call(&["cp", "made-cp:/tmp/d", &engine.path("d")])?
        .ok()?;
    ensure!(
        fs::read_link(engine.path("d/b"))?.to_str() == Some("a"),
        "the link"
    );
    ensure!(
        engine.call(&["cp", "made-cp:/nowhere", &back])?.code() != 0,
        "what is not there was copied"
    );
    engine.remove(&["made-cp"])
}

fn copy_while_stopped(engine: &Engine) -> Result<()> {
    let file = engine.path("file");
    fs::write(&file, "copied\n")?;
    engine
        .call(&[
            "create",
            "--network",
            "none",
            "--name",
            "made-cs",
            IMAGE,
            "cat",
            "/root/x",
        ])?
        .ok()?;
    engine.call(&["cp", &file, "made-cs:/root/x"])?.ok()?;
    engine
        .call(&["start", "--attach", "made-cs"])?
        .ok()?
        .says(&["copied\n"])?;
    engine.remove(&["made-cs"])
}

fn copy_of_a_volume(engine: &Engine) -> Result<()> {
    let (directory, file) = (engine.path("data"), engine.path("file"));
    fs::create_dir(&directory)?;
    fs::write(&file, "copied\n")?;
    engine.start(
        "made-cv",
        &[
            "--volume",
            &format!("{directory}:/data"),
            IMAGE,
            "sleep",
            "1000",
        ],
    )?;
    engine.call(&["cp", &file, "made-cv:/data/x"])?.ok()?;
    ensure!(
        fs::read_to_string(format!("{directory}/x"))? == "copied\n",
        "not in the volume"
    );
    engine
        .exec("made-cv", "cat /data/x")?
        .ok()?
        .says(&["copied\n"])?;
    engine.remove(&["made-cv"])
}

fn changes_are_kept(engine: &Engine) -> Result<()> {
    engine.start(
        "made-df",
        &[
            IMAGE,
            "sh",
            "-c",
            "echo x >/root/new; rm /etc/group; echo y >>/etc/passwd; echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-df", "ready")?;
    engine.call(&["diff", "made-df"])?.ok()?.says(&[
        "A /root/new",
        "D /etc/group",
        "C /etc/passwd",
    ])?;
    engine.remove(&["made-df"])
}

fn commit(engine: &Engine) -> Result<()> {
    engine.start(
        "made-cm",
        &[
            IMAGE,
            "sh",
            "-c",
            "echo x >/root/new; chown 12:34 /root/new; echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-cm", "ready")?;
    engine
        .call(&["commit", "made-cm", "localhost/made-image"])?
        .ok()?;
    engine.remove(&["made-cm"])?;
    engine
        .run(&[
            "localhost/made-image",
            "stat",
            "-c",
            "%u:%g %s",
            "/root/new",
        ])?
        .ok()?
        .says(&["12:34 2\n"])?;
    engine.call(&["rmi", "localhost/made-image"])?.ok()?;
    Ok(())
}

fn export(engine: &Engine) -> Result<()> {
    engine.start(
        "made-ex",
        &[
            IMAGE,
            "sh",
            "-c",
            "echo x >/root/new; echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-ex", "ready")?;
    let archive = engine.path("archive.tar");
    engine
        .call(&["export", "--output", &archive, "made-ex"])?
        .ok()?;
    let mut list = std::process::Command::new("tar");
    list.args(["-tf", &archive]);
    crate::process::Process::spawn(list)?
        .finish()?
        .ok()?
        .says(&["root/new\n"])?;
    engine.remove(&["made-ex"])
}

fn owner_of_a_volume(engine: &Engine) -> Result<()> {
    let directory = engine.path("data");
    fs::create_dir_all(format!("{directory}/sub"))?;
    engine
        .script(
            &[
                "--user",
                "user",
                "--volume",
                &format!("{directory}:/data:U"),
            ],
            "touch /data/sub/x; stat -c %u /data/sub",
        )?
        .ok()?
        .says(&["1000\n"])?;
    let owner = fs::metadata(format!("{directory}/sub/x"))?.uid();
    ensure!(owner == 1000, "the owner is {owner}");
    Ok(())
}

fn volume_of_the_image(engine: &Engine) -> Result<()> {
    // An image as a read-only volume.
    engine
        .script(
            &[
                "--mount",
                &format!("type=image,source={IMAGE},target=/image"),
            ],
            "cat /image/etc/group; touch /image/x || echo read-only",
        )?
        .ok()?
        .says(&["extra:x:2000", "read-only"])?;
    Ok(())
}
