//! The monitor's whole way, with a fake VM: launch, start, stdio, exit status, signals, and what
//! goes wrong.

use std::{
    fs,
    io::{PipeReader, PipeWriter, Read, Write},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::Duration,
};

use serde_json::json;

use super::{ContainerOrder, ExecOrder, HostStdio, LaunchError, Sandbox, join, launch};
use crate::{
    cgroup::Driver,
    guest_size::GuestSize,
    spec::{
        Loaded,
        check::{self, Checked},
    },
    state::{Container, ContainerStatus, ProcessIdentity, Record, StateRoot},
    stdio::Signals,
    timeline::Moment,
    vm::fake::{Behaviour, FakeVm},
    wait::Deadline,
};

struct Scene {
    directory: tempfile::TempDir,
    order: ContainerOrder,
    loaded: Loaded,
    checked: Checked,
    container: Container,
    signals: Signals,
}

/// The host's ends of the stdio that a process is given.
struct Host {
    stdin: PipeWriter,
    stdout: PipeReader,
}

fn stdio() -> (HostStdio, Host) {
    let (input, stdin) = std::io::pipe().unwrap();
    let (stdout, output) = std::io::pipe().unwrap();
    let error = fs::File::options().write(true).open("/dev/null").unwrap();
    let ends = [
        OwnedFd::from(input),
        OwnedFd::from(output),
        OwnedFd::from(error),
    ];
    (HostStdio::Given(ends), Host { stdin, stdout })
}

fn scene() -> Scene {
    let directory = tempfile::tempdir().unwrap();
    let bundle = directory.path().join("bundle");
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let config = json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["cat"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}]},
    });
    let loaded = Loaded::parse(bundle.clone(), config.to_string().into_bytes()).unwrap();
    let checked = check::check(&loaded).unwrap();
    let container = StateRoot::new(directory.path().join("state"))
        .create("one")
        .unwrap();
    let own = ProcessIdentity::own().unwrap();
    let mut record = Record::new("one", &bundle, "1.2.0", own);
    record.monitor = Some(own);
    container.lock().unwrap().write(&record).unwrap();
    let file = directory.path().join("file");
    fs::write(&file, b"").unwrap();
    let order = ContainerOrder {
        id: "one".to_owned(),
        bundle,
        vmm: file.clone(),
        kernel: file.clone(),
        root_image: file,
        guest_log: None,
        debug: false,
        timeline: Some(directory.path().join("timeline.json")),
        began: Moment::now().microseconds(),
        no_new_keyring: false,
        guest: GuestSize {
            cpus: 1,
            memory_mib: 256,
        },
        spare_places: 0,
        pid: 0,
        cgroup_driver: Driver::Cgroupfs,
        joined: None,
    };
    let signals = Signals::catch().unwrap();
    Scene {
        directory,
        order,
        loaded,
        checked,
        container,
        signals,
    }
}

impl Scene {
    fn launch(
        &mut self,
        behaviour: Behaviour,
        host: HostStdio,
    ) -> Result<Sandbox<'_>, LaunchError> {
        launch(
            &self.order,
            (&self.loaded, &self.checked),
            &self.container,
            &move |_: &Path, _| Ok(Box::new(FakeVm::start(behaviour))),
            &mut self.signals,
            host,
            None,
        )
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

#[test]
fn input_output_and_status() {
    let mut scene = scene();
    let (ends, mut host) = stdio();
    let mut signals = Signals::catch().unwrap();
    let writer = thread::spawn(move || {
        host.stdin.write_all(b"hello guest").unwrap();
        drop(host.stdin);
        let mut text = String::new();
        host.stdout.read_to_string(&mut text).unwrap();
        text
    });
    let mut sandbox = scene.launch(Behaviour::Copies(7), ends).unwrap();
    assert_eq!(
        sandbox.container.record().unwrap().status,
        ContainerStatus::Created
    );
    sandbox.start(soon()).unwrap();
    let ended = sandbox.supervise(&mut signals);
    ended.record(&scene.container);
    assert_eq!(ended.finish(), 7);
    assert_eq!(writer.join().unwrap(), "hello guest");
    let record = scene.container.record().unwrap();
    assert_eq!(
        (record.status, record.exit_status),
        (ContainerStatus::Stopped, Some(7))
    );
    let timeline = fs::read_to_string(scene.directory.path().join("timeline.json")).unwrap();
    for phase in [
        "runtime",
        "vmm_setup",
        "kernel",
        "agent",
        "container",
        "process",
        "teardown",
    ] {
        assert!(timeline.contains(&format!("\"{phase}\"")), "{timeline}");
    }
}

#[test]
fn exec_uses_the_same_way() {
    let mut scene = scene();
    let (ends, _host) = stdio();
    let sandbox = scene.launch(Behaviour::Copies(3), ends).unwrap();
    let (ends, mut host) = stdio();
    let order = ExecOrder {
        id: "one".to_owned(),
        container_id: "one".to_owned(),
        exec_id: "x".to_owned(),
        process: "{}".to_owned(),
    };
    let mut process = join(sandbox.container, &order, ends).unwrap();
    host.stdin.write_all(b"more").unwrap();
    drop(host.stdin);
    assert_eq!(
        process.run(&mut Signals::catch().unwrap(), None).unwrap(),
        3
    );
    drop(process);
    let mut text = String::new();
    host.stdout.read_to_string(&mut text).unwrap();
    assert_eq!(text, "more");
}

#[test]
fn signals_are_forwarded() {
    let mut scene = scene();
    let (ends, _host) = stdio();
    let mut sandbox = scene.launch(Behaviour::WaitsForSignal, ends).unwrap();
    sandbox.start(soon()).unwrap();
    let mut signals = Signals::catch().unwrap();
    // SIGUSR2, to this very process; caught by every `Signals` there is.
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::USR2).unwrap();
    assert_eq!(sandbox.supervise(&mut signals).finish(), 128 + 12);
}

#[test]
fn a_program_that_is_missing_is_named() {
    let mut scene = scene();
    let Err(error) = scene.launch(Behaviour::ProgramNotFound, stdio().0) else {
        panic!("launched")
    };
    assert_eq!(
        crate::error::chain(&error),
        "unable to start container process: exec: \"x\": executable file not found in $PATH"
    );
    assert_eq!(crate::error::exit_code(&error), 127);
}

#[test]
fn the_vms_own_word_is_shown_when_it_fails() {
    let mut scene = scene();
    let Err(error) = scene.launch(Behaviour::FailsToBoot, stdio().0) else {
        panic!("launched")
    };
    assert_eq!(crate::error::chain(&error), "no machine today");
}

#[test]
fn a_vm_that_dies_ends_the_container_at_once() {
    let mut scene = scene();
    let (ends, _host) = stdio();
    let mut sandbox = scene.launch(Behaviour::DiesAtStart, ends).unwrap();
    sandbox.start(soon()).unwrap();
    assert_eq!(
        sandbox.supervise(&mut Signals::catch().unwrap()).finish(),
        137
    );
}

#[test]
fn a_container_that_was_deleted_meanwhile_is_not_made() {
    let mut scene = scene();
    scene.container.lock().unwrap().remove().unwrap();
    let Err(error) = scene.launch(Behaviour::Copies(0), stdio().0) else {
        panic!("launched")
    };
    assert!(!crate::error::chain(&error).contains('\n'));
}

#[test]
fn a_missing_installation_is_named() {
    let mut scene = scene();
    scene.order.kernel = "/does/not/exist".into();
    let Err(error) = scene.launch(Behaviour::Copies(0), stdio().0) else {
        panic!("launched")
    };
    let text = crate::error::chain(&error);
    assert!(
        text.contains("/does/not/exist") && text.contains("--kernel"),
        "{text}"
    );
}
