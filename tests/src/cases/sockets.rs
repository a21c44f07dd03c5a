//! Unix sockets of the host in a container: bound as a file, or in a directory that is bound.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::socket_peercred;
use serde_json::json;

use crate::scene::Scene;

super::cases!(sockets;
    common: as_a_file, in_a_directory, made_and_replaced_later, both_ways_at_once, many_at_once,
        nobody_listens, who_connects, the_other_end_goes, own_sockets, real_server;
    vm: datagrams_are_refused, gone_with_the_container);

/// Serves each connection on a thread of its own until the test ends.
fn serve(path: &Path, each: fn(UnixStream)) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || each(stream));
        }
    });
    Ok(())
}

/// Reads all, then answers with it.
fn answer(mut stream: UnixStream) {
    let mut question = String::new();
    if stream.read_to_string(&mut question).is_ok() {
        let _ = stream.write_all(format!("answer to {question}\n").as_bytes());
    }
}

/// Gives everything back as it comes.
fn echo(stream: UnixStream) {
    let _ = std::io::copy(&mut &stream, &mut &stream);
    let _ = stream.shutdown(Shutdown::Both);
}

fn as_a_file(scene: &Scene) -> Result<()> {
    let socket = scene.path("engine.sock");
    serve(&socket, answer)?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o660))?;
    std::os::unix::fs::chown(&socket, Some(0), Some(77))?;
    for options in [&["bind"][..], &["rbind", "ro"]] {
        let bundle = scene
            .bundle()?
            .inside(&["ask", "/run/engine.sock", "one"])?
            .bind(&socket, "/run/engine.sock", options);
        scene.run(&bundle)?.ok()?.says(&["answer to one\n"])?;
    }
    let bundle = scene
        .bundle()?
        .shell("stat -c '%F %u:%g %a' /run/engine.sock")
        .bind(&socket, "/run/engine.sock", &["bind"]);
    scene.run(&bundle)?.ok()?.says(&["socket 0:77 660\n"])?;
    Ok(())
}

fn in_a_directory(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir_all(data.join("below/deeper"))?;
    serve(&data.join("below/deeper/a socket with a name"), answer)?;
    let path = "/data/below/deeper/a socket with a name";
    let bundle =
        scene
            .bundle()?
            .inside(&["ask", path, "two"])?
            .bind(&data, "/data", &["rbind", "ro"]);
    scene.run(&bundle)?.ok()?.says(&["answer to two\n"])?;
    // In the root filesystem, too.
    let bundle = scene.bundle()?.inside(&["ask", "/var/data/s", "three"])?;
    serve(&data.join("s"), answer)?;
    fs::rename(data.join("s"), bundle.rootfs().join("var/data/s"))?;
    scene.run(&bundle)?.ok()?.says(&["answer to three\n"])?;
    Ok(())
}

fn made_and_replaced_later(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["ask", "/data/s", ""])?
        .shell("while read question; do /bin/inside --inside ask /data/s $question; done")
        .bind(&data, "/data", &["rbind"]);
    let mut container = scene.start(&bundle)?;
    serve(&data.join("s"), answer)?;
    container.streams.send(b"first\n")?;
    container.streams.wait_for("answer to first\n")?;
    fs::remove_file(data.join("s"))?;
    serve(&data.join("s"), |mut stream| {
        let _ = stream.write_all(b"another\n");
        answer(stream);
    })?;
    container.streams.send(b"second\n")?;
    container.streams.wait_for("another\nanswer to second\n")?;
    scene.destroy(&container.id)
}

fn both_ways_at_once(scene: &Scene) -> Result<()> {
    let socket = scene.path("echo.sock");
    serve(&socket, echo)?;
    let bundle =
        scene
            .bundle()?
            .inside(&["exchange", "/echo", "8"])?
            .bind(&socket, "/echo", &["bind"]);
    scene.run(&bundle)?.ok()?.says(&["all came back\n"])?;
    Ok(())
}

fn many_at_once(scene: &Scene) -> Result<()> {
    let socket = scene.path("echo.sock");
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )?;
    rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&socket)?)?;
    // So few that connections have to wait for the server.
    rustix::net::listen(&listener, 2)?;
    let listener = UnixListener::from(listener);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            thread::spawn(move || echo(stream));
            if number == 0 {
                // Until all the others have been told to come again.
                thread::sleep(Duration::from_millis(500));
            }
        }
    });
    let bundle =
        scene
            .bundle()?
            .inside(&["many", "/echo", "100"])?
            .bind(&socket, "/echo", &["bind"]);
    scene.run(&bundle)?.ok()?.says(&["100 at once\n"])?;
    Ok(())
}

fn nobody_listens(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    drop(UnixListener::bind(data.join("dead"))?);
    fs::set_permissions(data.join("dead"), fs::Permissions::from_mode(0o666))?;
    fs::write(data.join("file"), "")?;
    fs::set_permissions(data.join("file"), fs::Permissions::from_mode(0o666))?;
    serve(&data.join("private"), answer)?;
    fs::set_permissions(data.join("private"), fs::Permissions::from_mode(0o600))?;
    for (name, error) in [
        ("dead", "Connection refused"),
        ("file", "Connection refused"),
        ("none", "No such file"),
        ("private", "Permission denied"),
    ] {
        let bundle = scene
            .bundle()?
            .inside(&["ask", &format!("/data/{name}"), ""])?
            .with(|spec| spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 }))
            .bind(&data, "/data", &["rbind"]);
        let errors = scene.run(&bundle)?.fails()?;
        ensure!(errors.contains(error), "{name}: {errors}");
    }
    Ok(())
}

/// The server sees the user of the process in the container.
fn who_connects(scene: &Scene) -> Result<()> {
    let socket = scene.path("s");
    serve(&socket, |mut stream| {
        let _ = stream.read(&mut [0]);
        if let Ok(who) = socket_peercred(&stream) {
            let (uid, gid) = (who.uid.as_raw(), who.gid.as_raw());
            let _ = stream.write_all(format!("you are {uid}:{gid}\n").as_bytes());
        }
    })?;
    // Whoever is in the group may connect.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o660))?;
    std::os::unix::fs::chown(&socket, Some(0), Some(4242))?;
    let bundle = scene
        .bundle()?
        .inside(&["ask", "/s", "x"])?
        .with(|spec| {
            spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [4242] });
        })
        .bind(&socket, "/s", &["bind"]);
    scene.run(&bundle)?.ok()?.says(&["you are 1000:1001\n"])?;
    Ok(())
}

fn the_other_end_goes(scene: &Scene) -> Result<()> {
    let socket = scene.path("s");
    serve(&socket, |mut stream| {
        let _ = stream.write_all(b"bye");
    })?;
    let bundle = scene
        .bundle()?
        .inside(&["abandoned", "/s"])?
        .bind(&socket, "/s", &["bind"]);
    scene
        .run(&bundle)?
        .ok()?
        .says(&["read 3 bytes, then nobody was there\n"])?;
    Ok(())
}

fn own_sockets(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    for path in ["/data/own", "/var/data/own", "/dev/shm/own"] {
        let bundle =
            scene
                .bundle()?
                .inside(&["own-socket", path])?
                .bind(&data, "/data", &["rbind"]);
        scene
            .run(&bundle)?
            .ok()?
            .says(&["from the same container\n"])?;
        let _ = fs::remove_file(data.join("own"));
    }
    Ok(())
}

/// A server that is not ours.
fn real_server(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let address = format!("UNIX-LISTEN:{},fork", data.join("s").display());
    let mut server = Command::new("socat")
        .args([
            &address,
            "SYSTEM:'read a b c; echo HTTP/1.0 200 fine; echo; echo got $b'",
        ])
        .stdin(Stdio::null())
        .spawn()
        .context("starting socat")?;
    let question = "GET /containers/json HTTP/1.0\r\n\r\n";
    let bundle =
        scene
            .bundle()?
            .inside(&["ask", "/data/s", question])?
            .bind(&data, "/data", &["rbind"]);
    let output = scene.run(&bundle);
    server.kill()?;
    server.wait()?;
    output?
        .ok()?
        .says(&["HTTP/1.0 200 fine\n", "got /containers/json\n"])?;
    Ok(())
}

fn datagrams_are_refused(scene: &Scene) -> Result<()> {
    let socket = scene.path("log");
    let _server = UnixDatagram::bind(&socket)?;
    let bundle = scene.bundle()?.bind(&socket, "/dev/log", &["bind"]);
    let errors = scene.run(&bundle)?.fails()?;
    ensure!(
        errors.contains("mounts[7].source") && errors.contains("datagrams"),
        "{errors}"
    );
    Ok(())
}

/// A container that is killed leaves no connection open.
fn gone_with_the_container(scene: &Scene) -> Result<()> {
    let socket = scene.path("s");
    let listener = UnixListener::bind(&socket)?;
    let bundle = scene
        .bundle()?
        .inside(&["exchange", "/s", "1"])?
        .bind(&socket, "/s", &["bind"]);
    let container = scene.start(&bundle)?;
    let (told, heard) = mpsc::channel();
    thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            let _ = told.send(stream);
        }
    });
    let mut stream = heard.recv_timeout(crate::process::DEADLINE)?;
    scene.destroy(&container.id)?;
    let mut all = Vec::new();
    stream.set_read_timeout(Some(crate::process::DEADLINE))?;
    stream.read_to_end(&mut all)?;
    Ok(())
}
