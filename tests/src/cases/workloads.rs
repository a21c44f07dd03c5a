//! Real programs of a Debian in containers, each of which checks its own data. Their image is large,
//! so it is there only where `tests/workloads/run` (`make workloads`) has put it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::process::{Output, Process};
use crate::scene::{Scene, skip};

use super::network::{Wire, networked};

super::cases!(workloads;
    common: postgresql, redis, nginx, web_from_the_host, python, compile, sqlite, systemd, containers_inside;
    vm:);

/// Where the image and the scripts are in the test host.
const FILES: &str = "/opt/bulkhead/share/workloads";
/// For one test: these do real work, under an emulated CPU.
pub(crate) const LONGEST: Duration = Duration::from_secs(1200);
/// For one step of it.
const LONG: Duration = Duration::from_secs(900);
/// What engines give a container that is to be as it wishes (`--privileged`), of what these need.
const PRIVILEGED: [&str; 5] = [
    "CAP_DAC_READ_SEARCH",
    "CAP_NET_ADMIN",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
];

fn postgresql(scene: &Scene) -> Result<()> {
    killed_and_started_again(scene, "postgresql")
}

fn redis(scene: &Scene) -> Result<()> {
    killed_and_started_again(scene, "redis")
}

fn nginx(scene: &Scene) -> Result<()> {
    to_its_end(scene, "nginx")
}

fn python(scene: &Scene) -> Result<()> {
    to_its_end(scene, "python")
}

fn compile(scene: &Scene) -> Result<()> {
    to_its_end(scene, "compile")
}

fn sqlite(scene: &Scene) -> Result<()> {
    to_its_end(scene, "sqlite")
}

/// A server in the container, its load from the host.
fn web_from_the_host(scene: &Scene) -> Result<()> {
    let debian = Debian::mount(scene)?;
    let wire = Wire::new()?;
    let bundle = debian.bundle(scene, &["nginx", "serve"])?;
    let mut container =
        scene.start(&bundle.with(|spec| networked(spec, &wire.path().display().to_string())))?;
    container.streams.wait_for_within("serving\n", LONG)?;
    let mut load = Command::new("chroot");
    load.arg(&debian.image).args([
        "ab",
        "-q",
        "-n",
        "400",
        "-c",
        "8",
        "http://10.77.0.2:8080/file",
    ]);
    let mut load = Process::spawn(load)?;
    load.wait_within(LONG)?;
    let report = load.finish()?.ok()?;
    for line in [
        "Complete requests:      400\n",
        "Failed requests:        0\n",
    ] {
        ensure!(report.text().contains(line), "{report}");
    }
    scene.call(&["kill", &container.id, "TERM"])?.ok()?;
    container.process()?.wait()?;
    let log = fs::read_to_string(debian.data.join("access.log"))?;
    ensure!(log.lines().count() == 400, "{log}");
    scene.destroy(&container.id)?;
    debian.unmount()?;
    wire.untouched(scene)
}

/// systemd starts all that a Debian starts, runs a unit, and ends at its signal.
fn systemd(scene: &Scene) -> Result<()> {
    let debian = Debian::mount(scene)?;
    // They want rights or places that a plain container has not.
    for unit in [
        "nginx",
        "podman",
        "podman-auto-update",
        "podman-restart",
        "postgresql",
        "redis-server",
    ] {
        let place = debian.root.join("etc/systemd/system");
        fs::remove_file(place.join(format!("{unit}.service"))).ok();
        symlink("/dev/null", place.join(format!("{unit}.service")))?;
    }
    let bundle = debian.bundle(scene, &["systemd"])?.args(&["/sbin/init"]);
    let bundle = with_own_cgroup(bundle)
        .mount(tmpfs("/run"))
        // Without it systemd would mount one, which it may not, and give up.
        .mount(tmpfs("/run/lock"))
        .with(|spec| {
            spec["process"]["env"] = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=oci"]);
        });
    let container = scene.start(&bundle)?;
    let inside = |args: &[&str]| -> Result<Output> {
        let mut exec = scene.command(&["exec", &container.id]);
        exec.args(args);
        let mut exec = Process::spawn(exec)?;
        exec.wait_within(LONG)?;
        exec.finish()
    };
    let manager = "until [ -S /run/systemd/private ]; do sleep 0.1; done; exec systemctl is-system-running --wait";
    let state = inside(&["sh", "-c", manager])?;
    let failed = inside(&["systemctl", "--failed", "--no-legend"])?;
    ensure!(state.text() == "running\n", "{state} {failed}");
    inside(&["systemctl", "is-active", "graphical.target"])?.ok()?;
    inside(&[
        "systemd-run",
        "--quiet",
        "--wait",
        "--property=MemoryMax=32M",
        "true",
    ])?
    .ok()?;
    // What systemd takes for "power off" in a container (systemd(1), "Signals").
    scene.call(&["kill", &container.id, "RTMIN+4"])?.ok()?;
    container.process()?.wait()?;
    scene.destroy(&container.id)?;
    debian.unmount()
}

fn containers_inside(scene: &Scene) -> Result<()> {
    let debian = Debian::mount(scene)?;
    let bundle = debian.bundle(scene, &["podman"])?;
    let bundle = with_own_cgroup(bundle)
        .mount(tmpfs("/run"))
        .mount(tmpfs("/var/lib/containers"))
        .with(|spec| {
            for set in ["bounding", "effective", "permitted"] {
                if let Some(set) = spec["process"]["capabilities"][set].as_array_mut() {
                    set.extend(PRIVILEGED.map(|capability| json!(capability)));
                }
            }
            for paths in ["maskedPaths", "readonlyPaths"] {
                spec["linux"][paths] = json!([]);
            }
            spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        });
    let mut process = scene.start_run(&bundle)?;
    process.close_stdin();
    process.wait_within(LONG)?;
    process.finish()?.ok()?.says(&["ok\n"])?;
    debian.unmount()
}

/// The container may make cgroups below its own.
fn with_own_cgroup(bundle: Bundle) -> Bundle {
    bundle.with(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["type"] == "cgroup" {
                mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
            }
        }
    })
}

fn tmpfs(destination: &str) -> Value {
    json!({
        "destination": destination, "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "nodev", "mode=755"],
    })
}

/// Runs a script until it says that all is well.
fn to_its_end(scene: &Scene, script: &str) -> Result<()> {
    let debian = Debian::mount(scene)?;
    let mut process = scene.start_run(&debian.bundle(scene, &[script])?)?;
    process.close_stdin();
    process.wait_within(LONG)?;
    process.finish()?.ok()?.says(&["ok\n"])?;
    debian.unmount()
}

/// Kills a container under load, and has another one look at what it has left in its volume.
fn killed_and_started_again(scene: &Scene, script: &str) -> Result<()> {
    let debian = Debian::mount(scene)?;
    let bundle = debian.bundle(scene, &[script, "first"])?;
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for_within("under load\n", LONG)?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    container.process()?.wait()?;
    scene.destroy(&container.id)?;
    let mut process = scene.start_run(&debian.bundle(scene, &[script, "again"])?)?;
    process.close_stdin();
    process.wait_within(LONG)?;
    process.finish()?.ok()?.says(&["ok\n"])?;
    debian.unmount()
}

/// A root filesystem as engines make them: an overlay of an image and what is written.
struct Debian {
    root: PathBuf,
    image: PathBuf,
    data: PathBuf,
}

impl Debian {
    fn mount(scene: &Scene) -> Result<Self> {
        let packed = Path::new(FILES).join("root.erofs");
        if !packed.exists() {
            return skip("the workloads' image is not here (make workloads)");
        }
        let debian = Self {
            root: scene.path("root"),
            image: scene.path("image"),
            data: scene.path("data"),
        };
        for directory in ["root", "image", "data", "upper", "work"] {
            fs::create_dir(scene.path(directory))?;
        }
        mount(&["-t", "erofs", "-o", "loop,ro"], &packed, &debian.image)?;
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            debian.image.display(),
            scene.path("upper").display(),
            scene.path("work").display()
        );
        mount(
            &["-t", "overlay", "-o", &layers],
            Path::new("overlay"),
            &debian.root,
        )?;
        Ok(debian)
    }

    /// A container of it, with the rights that engines give by default.
    fn bundle(&self, scene: &Scene, script: &[&str]) -> Result<Bundle> {
        let program = format!("/workloads/{}", script[0]);
        let args: Vec<&str> = std::iter::once(program.as_str())
            .chain(script[1..].iter().copied())
            .collect();
        let capabilities = json!([
            "CAP_AUDIT_WRITE",
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_NET_BIND_SERVICE",
            "CAP_NET_RAW",
            "CAP_SETFCAP",
            "CAP_SETGID",
            "CAP_SETPCAP",
            "CAP_SETUID",
            "CAP_SYS_CHROOT"
        ]);
        let tmp = json!({
            "destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1777"],
        });
        Ok(scene
            .bundle()?
            .args(&args)
            .bind(&self.data, "/data", &["rbind"])
            .bind(Path::new(FILES), "/workloads", &["rbind", "ro"])
            .mount(tmp)
            .with(|spec| {
                spec["root"]["path"] = json!(self.root);
                spec["linux"]["resources"]["memory"] = json!({ "limit": 768 << 20 });
                for set in ["bounding", "effective", "permitted"] {
                    spec["process"]["capabilities"][set] = capabilities.clone();
                }
            }))
    }

    fn unmount(&self) -> Result<()> {
        for path in [&self.root, &self.image] {
            let mut command = Command::new("umount");
            command.arg(path);
            Process::spawn(command)?.finish()?.ok()?;
        }
        Ok(())
    }
}

fn mount(options: &[&str], what: &Path, place: &Path) -> Result<()> {
    let mut command = Command::new("mount");
    command.args(options).arg(what).arg(place);
    let mounted = Process::spawn(command)?.finish()?;
    ensure!(mounted.code() == 0, "{mounted}");
    Ok(())
}
