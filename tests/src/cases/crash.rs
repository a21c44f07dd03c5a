//! Any process dies at any point: `delete --force` then leaves nothing.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::Signal;

use crate::bundle::Bundle;
use crate::leftovers::{command_line, descendants, entries};
use crate::process::{Other, Process, wait_readable};
use crate::scene::{Created, Scene};

use super::{pods, vm::vmm};

super::cases!(crash;
    common: container_process_killed;
    vm: monitor_killed, behind_the_stand_in, vmm_killed, all_killed, runtime_killed_in_foreground, create_killed_by_events, create_of_a_member_killed_by_events,
        create_killed_by_time);

fn idle(scene: &Scene) -> Result<Created> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; sleep 1000"))?;
    container.streams.wait_for("up\n")?;
    Ok(container)
}

fn container_process_killed(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let process = container.process()?;
    process.signal(Signal::KILL)?;
    process.wait()?;
    scene.expect_status(&container.id, "stopped")?;
    scene.call(&["delete", &container.id])?.ok()?;
    scene.expect_nothing_left()
}

fn monitor_killed(scene: &Scene) -> Result<()> {
    for started in [false, true] {
        let container = if started {
            idle(scene)?
        } else {
            scene.create(&scene.bundle()?.shell("sleep 9"))?
        };
        let monitor = container.process()?;
        monitor.signal(Signal::KILL)?;
        monitor.wait()?;
        scene.expect_status(&container.id, "stopped")?;
        // Nobody holds the machine any more, so it ends by itself.
        for pid in descendants()? {
            if let Ok(process) = Other::open(pid) {
                process.wait().context("the VMM outlives its monitor")?;
            }
        }
        scene.destroy(&container.id)?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}

/// The monitor itself goes, rather than the process that stands for the container's.
fn behind_the_stand_in(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let stand_in = container.process()?;
    let is_monitor = |pid: &i32| command_line(*pid).trim_end().ends_with("monitor");
    let monitor = descendants()?.into_iter().find(is_monitor);
    let monitor = Other::open(monitor.context("no monitor")?)?;
    let machine = Other::open(vmm()?)?;
    monitor.signal(Signal::KILL)?;
    let code = stand_in.exit_code().context("it outlives the monitor")?;
    ensure!(code == 137, "exit code {code}");
    machine.wait().context("the VMM outlives its monitor")?;
    scene.expect_status(&container.id, "stopped")?;
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

fn vmm_killed(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let monitor = container.process()?;
    Other::open(vmm()?)?.signal(Signal::KILL)?;
    let code = monitor
        .exit_code()
        .context("the monitor outlives its VMM")?;
    ensure!(
        code != 0,
        "the monitor of a machine that broke ended with 0"
    );
    scene.expect_status(&container.id, "stopped")?;
    scene.call(&["exec", &container.id, "/bin/true"])?.fails()?;
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

fn all_killed(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let all: Vec<_> = descendants()?
        .into_iter()
        .filter_map(|pid| Other::open(pid).ok())
        .collect();
    for process in &all {
        process.signal(Signal::KILL)?;
    }
    for process in &all {
        process.wait()?;
    }
    scene.expect_status(&container.id, "stopped")?;
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

fn runtime_killed_in_foreground(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000");
    let (id, mut process) = scene.start_named(&bundle)?;
    process.wait_for("up\n")?;
    process.signal(Signal::KILL)?;
    process.wait()?;
    scene.destroy(&id)?;
    scene.expect_nothing_left()
}

/// Starts `create` and gives what is needed to kill it.
fn start_create(scene: &Scene, id: &str) -> Result<Process> {
    start_create_of(scene, id, scene.bundle()?)
}

fn start_create_of(scene: &Scene, id: &str, bundle: Bundle) -> Result<Process> {
    let bundle = bundle.shell("sleep 1000");
    bundle.write()?;
    let mut command = scene.command(&["create".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command.arg(id);
    Process::spawn(command)
}

/// Kills `create` at its first, second, third … change of the state directory, until it is done
/// before that.
fn create_killed_by_events(scene: &Scene) -> Result<()> {
    const MOST: u32 = 24;
    fs::create_dir_all(&scene.root)?;
    for count in 1..=MOST {
        let id = scene.id();
        let events = Events::new(scene)?;
        let mut process = start_create(scene, &id)?;
        let reached = events.wait_for(count, &process)?;
        process.signal(Signal::KILL)?;
        process.wait()?;
        scene.destroy(&id)?;
        let place = format!("killed at event {count} of the state directory");
        scene.expect_nothing_left().context(place)?;
        if !reached {
            return Ok(());
        }
    }
    Ok(())
}

/// The same with one that joins another's machine, which goes on.
fn create_of_a_member_killed_by_events(scene: &Scene) -> Result<()> {
    const MOST: u32 = 24;
    let first = idle(scene)?;
    let machine = vmm()?;
    for count in 1..=MOST {
        let id = scene.id();
        let events = Events::new(scene)?;
        let bundle = pods::joining(scene.bundle()?, first.pid, &pods::PODS);
        let mut process = start_create_of(scene, &id, bundle)?;
        let reached = events.wait_for(count, &process)?;
        process.signal(Signal::KILL)?;
        process.wait()?;
        scene.destroy(&id)?;
        let place = format!("killed at event {count} of the state directory");
        let left = pods::pieces(machine, &id)?;
        ensure!(left == 0, "{left} pieces of its files are left, {place}");
        let left: Vec<_> = entries(&scene.root)
            .into_iter()
            .filter(|name| *name != first.id)
            .collect();
        ensure!(left.is_empty(), "{left:?} is left, {place}");
        scene.call(&["exec", &first.id, "/bin/true"])?.ok()?;
        if !reached {
            break;
        }
    }
    ensure!(vmm()? == machine, "another machine");
    scene.destroy(&first.id)?;
    scene.expect_nothing_left()
}

/// Kills `create` after each eighth of the time that it takes.
fn create_killed_by_time(scene: &Scene) -> Result<()> {
    const PARTS: u32 = 8;
    let id = scene.id();
    let begun = Instant::now();
    start_create(scene, &id)?.output_at_end()?.ok()?;
    let whole = begun.elapsed();
    scene.destroy(&id)?;
    for part in 0..PARTS {
        let id = scene.id();
        let mut process = start_create(scene, &id)?;
        let _ = process.wait_within(whole * part / PARTS);
        let _ = process.signal(Signal::KILL);
        process.wait()?;
        scene.destroy(&id)?;
        let place = format!("killed after {part}/{PARTS} of {} ms", whole.as_millis());
        scene.expect_nothing_left().context(place)?;
    }
    Ok(())
}

/// Changes of the state directory and of those in it.
struct Events(rustix::fd::OwnedFd, std::path::PathBuf);

impl Events {
    const CHANGES: WatchFlags = WatchFlags::CREATE
        .union(WatchFlags::DELETE)
        .union(WatchFlags::MOVED_TO)
        .union(WatchFlags::CLOSE_WRITE);

    fn new(scene: &Scene) -> Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&fd, &scene.root, Self::CHANGES)?;
        Ok(Self(fd, scene.root.clone()))
    }

    /// Waits for so many changes; false when the process ended before them.
    fn wait_for(&self, count: u32, process: &Process) -> Result<bool> {
        let process = Other::open(process.pid()?.as_raw_nonzero().get())?;
        let mut seen = 0;
        while seen < count {
            if process.either(self.0.as_fd())? {
                return Ok(false);
            }
            seen += self.read()?;
        }
        Ok(true)
    }

    /// The number of changes that wait; directories that appear are watched from then on.
    fn read(&self) -> Result<u32> {
        wait_readable(self.0.as_fd(), Duration::ZERO)?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut count = 0;
        loop {
            match reader.next() {
                Ok(_) => count += 1,
                Err(rustix::io::Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error).context("reading inotify events"),
            }
        }
        for name in entries(&self.1) {
            let _ = inotify::add_watch(&self.0, self.1.join(name), Self::CHANGES);
        }
        Ok(count)
    }
}
