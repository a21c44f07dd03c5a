//! Input that cannot be used: each refusal is one line that names what is wrong, and leaves
//! nothing behind. Of other runtimes only the refusal is expected, not its wording.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::process::{Output, Process};
use crate::runtime::Runtime;
use crate::scene::Scene;

super::cases!(bad_input;
    common: bundle_missing, not_json, wrong_types, oci_version, container_names, rootfs_missing,
        program_missing, hostile_links, bind_source_missing, arguments;
    vm: unknown_fields, unreadable_bundle, guest_too_large);

/// Words of Rust's own in a message for people.
pub(super) const DEBUG_WORDS: [&str; 8] = [
    "Err(",
    "Ok(",
    "Some(",
    "None",
    "panicked",
    "Error {",
    "Os {",
    "RUST_BACKTRACE",
];

/// Checks that it was refused, in one line that names these.
fn refused(scene: &Scene, output: Output, needles: &[&str]) -> Result<()> {
    ensure!(output.code() != 0, "expected a refusal of {output}");
    let errors = output.errors();
    ensure!(!errors.trim().is_empty(), "no reason given by {output}");
    if scene.runtime == Runtime::Bulkhead {
        ensure!(
            errors.trim_end().lines().count() == 1,
            "not one line: {output}"
        );
        ensure!(output.stdout.is_empty(), "on standard output: {output}");
        for word in DEBUG_WORDS {
            ensure!(
                !errors.contains(word),
                "{word:?} is for programmers: {output}"
            );
        }
        for needle in needles {
            ensure!(
                errors.contains(needle),
                "the error does not name {needle:?}: {output}"
            );
        }
    }
    scene.expect_nothing_left()
}

fn refused_spec(scene: &Scene, change: impl FnOnce(&mut Value), needles: &[&str]) -> Result<()> {
    let bundle = scene.bundle()?.with(change);
    refused(scene, scene.run(&bundle)?, needles)
}

/// Both ways into a container.
fn refused_bundle(scene: &Scene, bundle: &Path, needles: &[&str]) -> Result<()> {
    for command in ["create", "run"] {
        let args = [command.as_ref(), "--bundle".as_ref(), bundle.as_os_str()];
        let mut command = scene.command(&args);
        command.arg(scene.id());
        refused(scene, Process::spawn(command)?.finish()?, needles)?;
    }
    Ok(())
}

fn bundle_missing(scene: &Scene) -> Result<()> {
    refused_bundle(scene, Path::new("/no/such/bundle"), &["/no/such/bundle"])?;
    let bundle = scene.bundle()?;
    fs::remove_file(bundle.path.join("config.json"))?;
    refused_bundle(scene, &bundle.path, &["config.json"])?;
    fs::create_dir(bundle.path.join("config.json"))?;
    refused_bundle(scene, &bundle.path, &["config.json"])
}

fn unreadable_bundle(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    let config = bundle.path.join("config.json");
    fs::remove_file(&config)?;
    symlink("config.json", &config)?;
    refused_bundle(scene, &bundle.path, &["config.json"])?;
    fs::remove_file(&config)?;
    // A pipe that nobody writes to must not stop the runtime for ever.
    let made = Process::spawn({
        let mut command = std::process::Command::new("mkfifo");
        command.arg(&config);
        command
    })?;
    made.finish()?.ok()?;
    refused_bundle(scene, &bundle.path, &["config.json"])?;
    fs::remove_file(&config)?;
    symlink("/dev/zero", &config)?;
    refused_bundle(scene, &bundle.path, &["config.json"])
}

fn not_json(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    for text in [
        "",
        "{",
        "[]",
        "null",
        "{\"ociVersion\": \"1.0.2\"",
        "\0\0\0",
    ] {
        fs::write(bundle.path.join("config.json"), text)?;
        refused_bundle(scene, &bundle.path, &["config.json"])?;
    }
    let deep = "[".repeat(100_000);
    fs::write(bundle.path.join("config.json"), deep)?;
    refused_bundle(scene, &bundle.path, &["config.json"])
}

fn wrong_types(scene: &Scene) -> Result<()> {
    let strict = scene.runtime == Runtime::Bulkhead;
    refused_spec(
        scene,
        |spec| spec["process"]["args"] = json!("a string"),
        &["args"],
    )?;
    refused_spec(scene, |spec| spec["process"]["args"] = json!([]), &["args"])?;
    if strict {
        refused_spec(
            scene,
            |spec| spec["process"]["user"] = json!([0, 0]),
            &["process.user"],
        )?;
        refused_spec(
            scene,
            |spec| spec["linux"]["namespaces"][0] = json!(["pid"]),
            &["linux.namespaces[0]"],
        )?;
        refused_spec(
            scene,
            |spec| spec["process"]["cwd"] = json!("relative"),
            &["cwd"],
        )?;
        refused_spec(scene, |spec| spec["process"]["cwd"] = json!(""), &["cwd"])?;
        refused_spec(
            scene,
            |spec| spec["process"]["user"]["uid"] = json!(-1),
            &["uid"],
        )?;
        refused_spec(
            scene,
            |spec| spec["mounts"] = json!({ "a": 1 }),
            &["mounts"],
        )?;
        refused_spec(
            scene,
            |spec| spec["linux"]["namespaces"] = json!([{ "type": "x" }]),
            &["x"],
        )?;
        // Capabilities that nobody knows are a warning from version 1.1 of the runtime-spec on (config
        // "Linux Process").
        let bundle = scene.bundle()?.with(|spec| {
            spec["ociVersion"] = json!("1.1.0");
            spec["process"]["capabilities"]["bounding"] = json!(["CAP_NO_SUCH"]);
        });
        let output = scene.run(&bundle)?.ok()?;
        ensure!(output.errors().contains("CAP_NO_SUCH"), "{output}");
        let rlimit = json!([{ "type": "RLIMIT_NO_SUCH", "soft": 1, "hard": 1 }]);
        refused_spec(
            scene,
            |spec| spec["process"]["rlimits"] = rlimit,
            &["RLIMIT_NO_SUCH"],
        )?;
        let action = json!({ "defaultAction": "SCMP_ACT_NO_SUCH" });
        refused_spec(
            scene,
            |spec| spec["linux"]["seccomp"] = action,
            &["SCMP_ACT_NO_SUCH"],
        )?;
    }
    let without = |field: &'static str| {
        move |spec: &mut Value| {
            if let Some(spec) = spec.as_object_mut() {
                spec.remove(field);
            }
        }
    };
    refused_spec(scene, without("process"), &["process"])?;
    refused_spec(scene, without("root"), &["root"])
}

/// What the specification does not know, and what it knows and Bulkhead cannot do, is refused by
/// name (docs/decisions/0004-unknown-properties.md).
fn unknown_fields(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.with(|spec| {
        spec["org.example.unknown"] = json!({ "a": [1, 2] });
        spec["process"]["unknown"] = json!(true);
    });
    refused(
        scene,
        scene.run(&bundle)?,
        &["org.example.unknown", "process.unknown", "remove them"],
    )?;
    refused_spec(
        scene,
        |spec| spec["linux"]["intelRdt"] = json!({ "closID": "x" }),
        &["intelRdt"],
    )?;
    refused_spec(
        scene,
        |spec| spec["vm"] = json!({ "kernel": { "path": "/boot/vmlinuz" } }),
        &["vm"],
    )
}

fn oci_version(scene: &Scene) -> Result<()> {
    refused_spec(
        scene,
        |spec| spec["ociVersion"] = json!("2.0.0"),
        &["2.0.0"],
    )
    .or_else(|error| {
        // crun and older runc do not look at the version.
        if scene.runtime == Runtime::Bulkhead {
            Err(error)
        } else {
            Ok(())
        }
    })?;
    if scene.runtime == Runtime::Bulkhead {
        refused_spec(
            scene,
            |spec| spec["ociVersion"] = json!("latest"),
            &["latest"],
        )?;
        refused_spec(scene, |spec| spec["ociVersion"] = json!(1), &["ociVersion"])?;
    }
    Ok(())
}

fn container_names(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    let long = "x".repeat(1100);
    let mut names = vec!["with/slash", "../up", "..", ".", ""];
    if scene.runtime != Runtime::Crun {
        names.extend(["/absolute", long.as_str()]);
    }
    for name in names {
        let args = [
            "create".as_ref(),
            "--bundle".as_ref(),
            bundle.as_os_str(),
            name.as_ref(),
        ];
        refused(scene, scene.call(&args)?, &[])?;
    }
    if scene.runtime == Runtime::Bulkhead {
        for name in ["with space", "new\nline", "a\u{1b}[31mred", "ünïcode"] {
            let args = [
                "create".as_ref(),
                "--bundle".as_ref(),
                bundle.as_os_str(),
                name.as_ref(),
            ];
            refused(scene, scene.call(&args)?, &[])?;
            refused(scene, scene.call(&["state", name])?, &[])?;
        }
        for command in ["state", "kill", "delete", "start"] {
            refused(scene, scene.call(&[command, "../../etc"])?, &["../../etc"])?;
        }
    }
    Ok(())
}

fn rootfs_missing(scene: &Scene) -> Result<()> {
    refused_spec(
        scene,
        |spec| spec["root"]["path"] = json!("no-such-rootfs"),
        &["no-such-rootfs"],
    )?;
    let bundle = scene
        .bundle()?
        .with(|spec| spec["root"]["path"] = json!("file"));
    fs::write(bundle.path.join("file"), "not a directory")?;
    refused(scene, scene.run(&bundle)?, &["file"])
}

fn program_missing(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.args(&["no-such-program", "argument"]);
    refused(scene, scene.run(&bundle)?, &["no-such-program"])?;
    let bundle = scene.bundle()?.args(&["/etc/passwd"]);
    refused(scene, scene.run(&bundle)?, &["/etc/passwd"])?;
    let bundle = scene.bundle()?.args(&["/bin/broken"]);
    fs::write(
        bundle.rootfs().join("bin/broken"),
        "\x7fELF but nothing more",
    )?;
    let broken = bundle.rootfs().join("bin/broken");
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
    // Not before exec is it known to be broken: by then the container runs.
    let output = scene.run(&bundle)?;
    ensure!(output.code() != 0, "a broken program ran: {output}");
    scene.expect_nothing_left()
}

fn bind_source_missing(scene: &Scene) -> Result<()> {
    let missing = scene.path("no-such-volume");
    let bundle = scene.bundle()?.bind(&missing, "/data", &["rbind"]);
    refused(scene, scene.run(&bundle)?, &["no-such-volume"])?;
    let bundle = scene
        .bundle()?
        .bind(&scene.directory, "/data", &["rbind", "no-such-option"]);
    if scene.runtime == Runtime::Bulkhead {
        refused(scene, scene.run(&bundle)?, &["no-such-option"])?;
    }
    Ok(())
}

fn arguments(scene: &Scene) -> Result<()> {
    for args in [
        vec!["no-such-command"],
        vec!["create"],
        vec!["state", "--no-such-flag", "x"],
    ] {
        let output = scene.call(&args)?;
        let errors = format!("{}{}", output.errors(), output.text());
        ensure!(!errors.trim().is_empty(), "no reason given by {output}");
        ensure!(output.code() != 0, "expected a refusal of {output}");
    }
    scene.expect_nothing_left()
}

/// Every path that a runtime creates, opens or mounts over is a link out of the root filesystem.
fn hostile_links(scene: &Scene) -> Result<()> {
    let outside = scene.path("outside");
    fs::create_dir(&outside)?;
    fs::write(outside.join("file"), "untouched\n")?;
    let source = scene.path("source");
    fs::create_dir(&source)?;
    let far = format!(
        "{}{}",
        "../".repeat(20),
        outside.strip_prefix("/")?.display()
    );
    let links: [(&str, Box<Change>); 9] = [
        ("proc", Box::new(|bundle| bundle)),
        ("sys", Box::new(|bundle| bundle)),
        ("dev", Box::new(|bundle| bundle)),
        (
            "data",
            Box::new(|bundle| bundle.bind(&source, "/data/new/deep", &["rbind"])),
        ),
        (
            "data",
            Box::new(|bundle| bundle.bind(&source, "/data", &["rbind"])),
        ),
        (
            "made",
            Box::new(|bundle| bundle.with(|spec| spec["process"]["cwd"] = json!("/made/it"))),
        ),
        (
            "mask",
            Box::new(|bundle| {
                bundle.with(|spec| spec["linux"]["maskedPaths"] = json!(["/mask", "/mask/file"]))
            }),
        ),
        (
            "fixed",
            Box::new(|bundle| {
                bundle
                    .with(|spec| spec["linux"]["readonlyPaths"] = json!(["/fixed", "/fixed/file"]))
            }),
        ),
        (
            "odd",
            Box::new(|bundle| {
                bundle.with(|spec| {
                    let device =
                        json!({ "path": "/odd/device", "type": "c", "major": 1, "minor": 3 });
                    spec["linux"]["devices"] = json!([device]);
                })
            }),
        ),
    ];
    for (name, change) in links {
        if name == "dev" && scene.runtime == Runtime::Runc {
            continue; // runc 1.1.5 follows this one and writes outside.
        }
        for target in [outside.display().to_string(), far.clone()] {
            let bundle = change(scene.bundle()?.args(&["/bin/true"]));
            let link = bundle.rootfs().join(name);
            if link.is_dir() {
                fs::remove_dir(&link)?;
            }
            symlink(&target, &link)?;
            // Either it is refused, or the link led to a place inside the root filesystem.
            let output = scene.run(&bundle)?;
            if output.code() != 0 {
                refused(scene, output, &[])?;
            }
            untouched(&outside).with_context(|| format!("/{name} is a link to {target}"))?;
        }
    }
    Ok(())
}

type Change<'a> = dyn Fn(Bundle) -> Bundle + 'a;

fn untouched(outside: &Path) -> Result<()> {
    let entries = crate::leftovers::entries(outside);
    ensure!(
        entries == ["file"],
        "outside the root filesystem: {entries:?}"
    );
    let text = fs::read_to_string(outside.join("file"))?;
    ensure!(
        text == "untouched\n",
        "a file outside the root filesystem holds {text:?}"
    );
    Ok(())
}

fn guest_too_large(scene: &Scene) -> Result<()> {
    refused_spec(
        scene,
        |spec| spec["linux"]["resources"]["memory"] = json!({ "limit": 1_i64 << 46 }),
        &["memory"],
    )?;
    // Far too small for a process to start in.
    let bundle = scene.bundle()?.with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 4096 });
    });
    let output = scene.run(&bundle)?;
    ensure!(
        output.code() != 0,
        "a container in 4096 bytes of memory: {output}"
    );
    scene.expect_nothing_left()
}
