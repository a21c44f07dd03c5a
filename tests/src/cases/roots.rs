//! The roots of bind mounts (proc_pid_mountinfo(5), "root"): each ends in the last name of its source, and what
//! gives the source that name in a guest is not to be noticed otherwise.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::json;

use super::pods::joining;
use crate::bundle::Bundle;
use crate::process::Output;
use crate::runtime::Runtime;
use crate::scene::Scene;

super::cases!(roots;
    common: directories, files, odd_names, found_by_a_link, device_numbers, whole_host, of_a_member;
    vm: id_mapped, for_others_than_root);

const SHOW: &str = "cat /proc/self/mountinfo";

/// What a container's mountinfo says: roots by mount point. Space, tab, newline and backslash are octal there.
fn roots(output: &Output) -> HashMap<String, OsString> {
    let field = |text: &[u8]| {
        let mut bytes = Vec::new();
        let mut rest = text;
        while let Some((&first, more)) = rest.split_first() {
            let code = more.get(..3).filter(|_| first == b'\\');
            let code = code.and_then(|code| std::str::from_utf8(code).ok());
            match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
                Some(byte) => {
                    bytes.push(byte);
                    rest = &more[3..];
                }
                None => {
                    bytes.push(first);
                    rest = more;
                }
            }
        }
        OsString::from_vec(bytes)
    };
    let lines = output.stdout.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ').skip(3);
            let root = field(fields.next()?);
            Some((field(fields.next()?).into_string().ok()?, root))
        })
        .collect()
}

/// Checks the last name of a root. In a guest there is nothing before that of a directory.
fn expect(scene: &Scene, output: &Output, place: &str, name: &OsStr) -> Result<()> {
    let root = named(output, place, name)?;
    ensure!(
        scene.runtime != Runtime::Bulkhead || root == Path::new("/").join(name),
        "{place} has the root {root:?}, which tells more than {name:?}"
    );
    Ok(())
}

/// Checks the last name of a root, gives all of it.
fn named(output: &Output, place: &str, name: &OsStr) -> Result<PathBuf> {
    let root = roots(output)
        .remove(place)
        .with_context(|| format!("no mount at {place}: {output}"))?;
    let last = Path::new(&root).file_name().unwrap_or_default();
    ensure!(last == name, "{place} has the root {root:?}, not {name:?}");
    Ok(root.into())
}

fn directories(scene: &Scene) -> Result<()> {
    let (one, two) = (scene.path("one/etc"), scene.path("two/etc"));
    for (path, text) in [(&one, "one\n"), (&two, "two\n")] {
        fs::create_dir_all(path)?;
        fs::write(path.join("which"), text)?;
    }
    let script = format!("{SHOW}; cat /a/which /b/which /c/which; ls -a /a; ls /a/..");
    let bundle = scene
        .bundle()?
        .shell(&script)
        .bind(&one, "/a", &["bind"])
        .bind(&two, "/b", &["rbind", "ro"])
        .bind(&one, "/c", &["bind", "rslave"])
        .bind(&one.join("."), "/d", &["rbind", "rro"]);
    let bundle = match scene.runtime {
        // Debian's know no recursive read-only.
        Runtime::Runc => bundle.with(|spec| without(spec, "/d")),
        _ => bundle,
    };
    let output = scene
        .run(&bundle)?
        .ok()?
        .says(&["one\ntwo\none\n.\n..\nwhich\n", "\nproc\n"])?;
    for place in ["/a", "/b", "/c"] {
        expect(scene, &output, place, "etc".as_ref())?;
    }
    if scene.runtime != Runtime::Runc {
        expect(scene, &output, "/d", "etc".as_ref())?;
    }
    Ok(())
}

fn without(spec: &mut serde_json::Value, place: &str) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["destination"] != place);
    }
}

fn files(scene: &Scene) -> Result<()> {
    let (hosts, socket) = (scene.path("hosts"), scene.path("engine.sock"));
    fs::write(&hosts, "hosts\n")?;
    let _listening = std::os::unix::net::UnixListener::bind(&socket)?;
    let script = format!("{SHOW}; cat /again; echo more >>/etc/hosts; cat /etc/hosts");
    let bundle = scene
        .bundle()?
        .shell(&script)
        .bind(&hosts, "/etc/hosts", &["bind"])
        .bind(&hosts, "/again", &["bind", "ro"])
        .bind(&socket, "/run/socket", &["bind"]);
    let output = scene.run(&bundle)?.ok()?;
    let output = output.says(&["hosts\nhosts\nmore\n"])?;
    for (place, name) in [
        ("/etc/hosts", "hosts"),
        ("/again", "hosts"),
        ("/run/socket", "engine.sock"),
    ] {
        let root = named(&output, place, name.as_ref())?;
        ensure!(
            scene.runtime != Runtime::Bulkhead || !root.starts_with(&scene.directory),
            "{root:?} tells of the host"
        );
    }
    Ok(())
}

/// Names that are more than one word for somebody: for a shell, for mountinfo, for whoever joins paths.
fn odd_names(scene: &Scene) -> Result<()> {
    let long = "x".repeat(255);
    let names = [
        "two words",
        "two\nlines",
        "tab\t",
        "back\\slash",
        "\\040",
        "...",
        "-n",
        "*",
        "%s",
        "é",
        "rootfs",
        "0",
        "\u{1b}[1m",
        &long,
    ];
    let mut bundle = scene.bundle()?.shell(SHOW);
    for (index, name) in names.into_iter().enumerate() {
        let source = scene.path("odd").join(name);
        fs::create_dir_all(&source)?;
        bundle = bundle.bind(&source, &format!("/m{index}"), &["rbind"]);
    }
    let output = scene.run(&bundle)?.ok()?;
    for (index, name) in names.into_iter().enumerate() {
        expect(scene, &output, &format!("/m{index}"), name.as_ref())?;
    }
    Ok(())
}

/// What is mounted is what a link leads to, which need not be called by text.
fn found_by_a_link(scene: &Scene) -> Result<()> {
    let odd = OsStr::from_bytes(b"caf\xe9");
    for (link, name) in [("link", OsStr::new("real")), ("other", odd)] {
        fs::create_dir(scene.path("").join(name))?;
        fs::write(scene.path("").join(name).join("file"), format!("{link}\n"))?;
        symlink(name, scene.path(link))?;
    }
    let script = format!("{SHOW}; cat /a/file /b/file");
    let bundle = scene
        .bundle()?
        .shell(&script)
        .bind(&scene.path("link"), "/a", &["bind"])
        .bind(&scene.path("other"), "/b", &["bind"]);
    let output = scene.run(&bundle)?.ok()?.says(&["link\nother\n"])?;
    expect(scene, &output, "/a", "real".as_ref())?;
    match scene.runtime {
        // A name that is no text is not told.
        Runtime::Bulkhead => expect(scene, &output, "/b", "".as_ref()),
        _ => expect(scene, &output, "/b", odd),
    }
}

/// All that is on one file system of the host has one number, what is mounted below has another, and a directory
/// with the mode of those that give the names is one like others.
fn device_numbers(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    let (inside, below) = (data.join("inside"), data.join("below"));
    fs::create_dir_all(inside.join("etc"))?;
    fs::create_dir(&below)?;
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o1755))?;
    rustix::mount::mount("below", &below, "tmpfs", MountFlags::empty(), None)?;
    fs::create_dir(below.join("deep"))?;
    fs::set_permissions(below.join("deep"), fs::Permissions::from_mode(0o1755))?;
    let script = "cd /data && stat -c %d . inside inside/etc below/. below/deep /hosts; \
        rmdir inside/etc inside && grep -c ' /data' /proc/self/mountinfo; sync";
    let hosts = scene.path("hosts");
    fs::write(&hosts, "")?;
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind"])
        .bind(&hosts, "/hosts", &["bind"]);
    let output = scene.run(&bundle);
    rustix::mount::unmount(&below, UnmountFlags::empty())?;
    let output = output?.ok()?;
    let text = output.text();
    let numbers: Vec<_> = text.lines().collect();
    ensure!(numbers.len() == 7, "{output}");
    let [root, first, second, third, fourth] = [0, 1, 2, 3, 4].map(|index| numbers[index]);
    ensure!(root == first && root == second, "{output}");
    ensure!(third != root && third == fourth, "{output}");
    ensure!(numbers[6] == "2", "mounts at or below /data: {output}");
    Ok(())
}

/// The root of the host has no last name.
fn whole_host(scene: &Scene) -> Result<()> {
    let script = format!("{SHOW}; ls -d /host/bin");
    let options = ["bind", "ro"];
    let bundle = scene.bundle()?.shell(&script);
    let bundle = bundle.bind(Path::new("/"), "/host", &options);
    let output = scene.run(&bundle)?.ok()?.says(&["/host/bin\n"])?;
    expect(scene, &output, "/host", "".as_ref())
}

/// What is mounted into a machine that runs already.
fn of_a_member(scene: &Scene) -> Result<()> {
    let (data, note) = (scene.path("some data"), scene.path("note"));
    fs::create_dir(&data)?;
    fs::write(&note, "note\n")?;
    let with = |bundle: Bundle| {
        let bundle = bundle.bind(&data, "/data", &["rbind"]);
        bundle.bind(&note, "/note", &["bind", "ro"])
    };
    let script = "echo up; while :; do sleep 1; done";
    let mut first = scene.start(&with(scene.bundle()?).shell(script))?;
    first.streams.wait_for("up\n")?;
    for _ in 0..2 {
        let script = format!("{SHOW}; cat /note; stat -c %d /data");
        let bundle = joining(scene.bundle()?, first.pid, &["network", "ipc"]);
        let output = scene.run(&with(bundle).shell(&script))?.ok()?;
        let output = output.says(&["note\n"])?;
        expect(scene, &output, "/data", "some data".as_ref())?;
        named(&output, "/note", "note".as_ref())?;
    }
    scene.destroy(&first.id)?;
    scene.expect_nothing_left()
}

/// The agent makes these mounts itself, and keeps none of them.
fn id_mapped(scene: &Scene) -> Result<()> {
    let (data, note) = (scene.path("data"), scene.path("note"));
    fs::create_dir(&data)?;
    fs::write(&note, "note\n")?;
    let mapped = |source: &PathBuf, place: &str| {
        let mapping = json!([{ "containerID": 0, "hostID": 0, "size": 100 }]);
        json!({ "destination": place, "type": "bind", "source": source, "options": ["bind"],
            "uidMappings": mapping, "gidMappings": mapping })
    };
    let script = format!("{SHOW}; cat /note");
    let bundle = scene
        .bundle()?
        .shell(&script)
        .mount(mapped(&data, "/data"))
        .mount(mapped(&PathBuf::from("/"), "/host"))
        .mount(mapped(&note, "/note"));
    let output = scene.run(&bundle)?.ok()?.says(&["note\n"])?;
    expect(scene, &output, "/data", "data".as_ref())?;
    expect(scene, &output, "/host", "".as_ref())?;
    named(&output, "/note", "note".as_ref())?;
    Ok(())
}

/// A mapped root finds what is mounted, whatever the mask of who has started the container.
fn for_others_than_root(scene: &Scene) -> Result<()> {
    let data = scene.path("data");
    fs::create_dir(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let bundle = scene
        .bundle()?
        .shell(SHOW)
        .bind(&data, "/var/data", &["rbind"])
        .with(|spec| {
            if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
                namespaces.push(json!({ "type": "user" }));
            }
            spec["linux"]["uidMappings"] = mapping.clone();
            spec["linux"]["gidMappings"] = mapping;
        });
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let output = scene.run(&bundle);
    rustix::process::umask(mask);
    expect(scene, &output?.ok()?, "/var/data", "data".as_ref())
}
