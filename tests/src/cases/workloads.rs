//! Real programs of a Debian in containers, each of which checks its own data. Their image is large,
//! so it is there only where `tests/workloads/run` (`make workloads`) has put it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::bundle::Bundle;
use crate::process::Process;
use crate::scene::{Scene, skip};

super::cases!(workloads;
    common: redis, nginx, python, compile, sqlite;
    vm:);

/// Where the image and the scripts are in the test host.
const FILES: &str = "/opt/bulkhead/share/workloads";
/// For one container: these do real work, under an emulated CPU.
const LONG: Duration = Duration::from_secs(280);

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
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_NET_BIND_SERVICE",
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
