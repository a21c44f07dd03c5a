//! Starts the service in namespaces of its own and speaks to it.

mod container;
mod serve;

use std::{
    cell::Cell,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::{fs::symlink, net::UnixStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio as Standard},
    thread,
};

pub(crate) use self::container::Container;
use bulkhead_agent_protocol::{
    client::AgentClient,
    messages::{CreateContainerRequest, SetNetworkRequest, Stdio, WaitProcessRequest},
};
use serde_json::{Value, json};
use ttrpc::context::with_timeout;

/// How long any request may take, nanoseconds.
const DEADLINE: i64 = 30_000_000_000;

/// A name, the controllers of cgroup v2 that it needs, and what it checks.
pub(crate) type Case = (&'static str, &'static [&'static str], fn(&Fixture));

/// Runs the cases whose names contain the arguments, or serves.
pub(crate) fn main(cases: &[Case]) {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [mode, directory] = arguments.as_slice()
        && mode == "serve-requests"
    {
        serve::run(Path::new(directory));
    }
    if arguments == ["print-ids"] {
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let line = status.lines().find(|line| line.starts_with("Uid:"));
        println!("{}", line.expect("ids"));
        return;
    }
    let missing = [
        (!rustix::process::getuid().is_root()).then_some("root"),
        (!Path::new("/bin/busybox").exists()).then_some("/bin/busybox (package busybox-static)"),
    ];
    if let Some(missing) = missing.into_iter().flatten().next() {
        println!("skipped: needs {missing}");
        println!(
            "test result: ok. 0 passed; 0 failed; {} ignored",
            cases.len()
        );
        return;
    }
    let wanted: Vec<_> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str()));
    let chosen: Vec<_> = cases.iter().filter(|(name, ..)| chosen(name)).collect();
    let controllers = controllers();
    let (mut failed, mut skipped) = (0, 0);
    for (name, needs, case) in &chosen {
        let lacking = |need: &&&str| !controllers.iter().any(|have| have == **need);
        if let Some(missing) = needs.iter().find(lacking) {
            println!("skipped {name}: needs the controller {missing} of cgroup v2");
            skipped += 1;
            continue;
        }
        let fixture = Fixture::new();
        let outcome = catch_unwind(AssertUnwindSafe(|| case(&fixture)));
        println!(
            "{} {name}",
            if outcome.is_ok() { "ok    " } else { "FAILED" }
        );
        failed += usize::from(outcome.is_err());
    }
    // As the standard harness closes, for whoever counts.
    println!(
        "test result: {}. {} passed; {failed} failed; {skipped} ignored; 0 measured; {} filtered out",
        if failed == 0 { "ok" } else { "FAILED" },
        chosen.len() - failed - skipped,
        cases.len() - chosen.len(),
    );
    assert_eq!(failed, 0, "{failed} cases failed");
}

/// What cgroup v2 has on this machine.
fn controllers() -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let mounted = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    let Some(place) = mounted.and_then(|line| line.split(' ').nth(4)) else {
        return Vec::new();
    };
    let file = Path::new(place).join("cgroup.controllers");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// A minimal spec that runs the arguments.
pub(crate) fn spec(arguments: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_DAC_OVERRIDE"
    ]);
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "hostname": "inside",
        "process": {
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": arguments,
            "env": ["PATH=/bin:/sbin"],
            // Machines that run tests may not let anybody have more.
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1000, "hard": 1000}],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
        ]},
    })
}

/// Adds a mount and returns its index.
pub(crate) fn add_mount(spec: &mut Value, mount: Value) -> u32 {
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.push(mount);
    u32::try_from(mounts.len() - 1).expect("few")
}

/// Writes all.
pub(crate) fn write(stream: &mut UnixStream, data: &[u8]) {
    stream.write_all(data).expect("written");
}

/// Reads to the end.
pub(crate) fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A served agent with a share of its own.
pub(crate) struct Fixture {
    directory: PathBuf,
    server: Child,
    client: AgentClient,
    next_stream: Cell<u64>,
}

/// Answer to the creation of a container.
pub(crate) enum Reply {
    Created(i32),
    Refused(String, String),
}

/// What a process left.
pub(crate) struct Run {
    pub(crate) stdout: String,
    pub(crate) raw_stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) status: i32,
}

fn shell(directory: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-ec", script])
        .current_dir(directory)
        .status();
    assert!(status.expect("sh").success(), "{script}");
}

impl Fixture {
    fn new() -> Self {
        let name = format!("bulkhead-agent-{}-{:p}", std::process::id(), &DEADLINE);
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&directory);
        let rootfs = directory.join("share/rootfs");
        std::fs::create_dir_all(rootfs.join("bin")).expect("made");
        std::fs::create_dir_all(directory.join("outside")).expect("made");
        shell(&rootfs, "mkdir etc sbin proc sys dev; cp /bin/busybox bin/");
        let list = Command::new("/bin/busybox").arg("--list").output();
        let list = String::from_utf8(list.expect("busybox").stdout).expect("names");
        for applet in list.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", rootfs.join("bin").join(applet)).expect("linked");
        }
        let program = std::env::current_exe().expect("own path");
        let mut server = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--uts",
                "--net",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private", "--"])
            .arg(program)
            .arg("serve-requests")
            .arg(&directory)
            .stdout(Standard::piped())
            .spawn()
            .expect("unshare");
        // The server says a word when its sockets are there.
        let mut line = String::new();
        BufReader::new(server.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("read");
        assert_eq!(line, "ready\n");
        let address = format!("unix://{}", directory.join("rpc").display());
        let client = AgentClient::new(ttrpc::Client::connect(&address).expect("connected"));
        Self {
            directory,
            server,
            client,
            next_stream: Cell::new(1),
        }
    }

    /// Where nothing may appear.
    pub(crate) fn outside(&self) -> PathBuf {
        self.directory.join("outside")
    }

    /// The root filesystem of every container, as it is outside.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.join("share/rootfs")
    }

    pub(crate) fn in_share(&self, script: &str) {
        shell(&self.directory.join("share"), script);
    }

    pub(crate) fn in_rootfs(&self, script: &str) {
        shell(&self.directory.join("share/rootfs"), script);
    }

    /// Runs a script in the agent's network namespace.
    pub(crate) fn in_network(&self, script: &str) {
        let namespace = format!("--net=/proc/{}/ns/net", self.server.id());
        let status = Command::new("nsenter")
            .args([&namespace, "sh", "-ec", script])
            .status();
        assert!(status.expect("nsenter").success(), "{script}");
    }

    /// Pretends that the VMM has put an interface of that name into a place.
    pub(crate) fn add_device(&self, device: &str, interface: &str) {
        let script = format!(
            "mkdir -p devices/{device}/virtio5/net/{interface} drivers/virtio-mmio; \
            touch drivers/virtio-mmio/bind drivers/virtio-mmio/unbind"
        );
        self.in_sysfs("bus/platform", &script);
    }

    fn in_sysfs(&self, directory: &str, script: &str) {
        let directory = self.directory.join("sys").join(directory);
        std::fs::create_dir_all(&directory).expect("made");
        shell(&directory, script);
    }

    /// Pretends that a block device is a disk with this serial number.
    pub(crate) fn add_disk(&self, serial: &str, device: &str, read_only: bool) {
        let read_only = u8::from(read_only);
        let script = format!("echo {serial} > serial; echo {read_only} > ro");
        self.in_sysfs(&format!("block/{device}"), &script);
    }

    /// The last device that was unbound.
    pub(crate) fn unbound_device(&self) -> String {
        let file = self
            .directory
            .join("sys/bus/platform/drivers/virtio-mmio/unbind");
        std::fs::read_to_string(file).expect("read")
    }

    pub(crate) fn try_set_network(
        &self,
        request: &SetNetworkRequest,
    ) -> Result<(), (String, String)> {
        self.client
            .set_network(with_timeout(DEADLINE), request)
            .map(drop)
            .map_err(status)
    }

    pub(crate) fn set_network(&self, request: &SetNetworkRequest) {
        self.try_set_network(request).expect("set");
    }

    /// Waits for a container's end as its monitor does, then breaks the connection.
    pub(crate) fn stand_for_and_leave(&self, id: &str) {
        let address = format!("unix://{}", self.directory.join("rpc").display());
        let client = AgentClient::new(ttrpc::Client::connect(&address).expect("connected"));
        let request = WaitProcessRequest {
            container_id: id.to_owned(),
            stands_for_container: true,
            ..Default::default()
        };
        let moment = std::time::Duration::from_millis(500);
        let timeout = i64::try_from(moment.as_nanos()).expect("short");
        let answer = client.wait_process(with_timeout(timeout), &request);
        answer.expect_err("nobody has waited so long");
    }

    /// Connects a stream and returns its number.
    pub(crate) fn stream(&self) -> (u64, UnixStream) {
        let number = self.next_stream.replace(self.next_stream.get() + 1);
        let mut stream = UnixStream::connect(self.directory.join("stdio")).expect("connected");
        stream.write_all(&number.to_le_bytes()).expect("written");
        (number, stream)
    }

    pub(crate) fn container(&self, id: &str) -> Container<'_> {
        Container {
            fixture: self,
            id: id.to_owned(),
        }
    }

    fn create(&self, id: &str, spec: &Value, binds: &[(u32, &str)], stdio: Stdio) -> Reply {
        let binds = binds.iter().map(|(i, s)| (*i, (*s).to_owned()));
        self.create_with(id, spec, stdio, |request| {
            request.bind_sources = binds.collect();
        })
    }

    /// Creates with namespaces of other containers, by kind.
    pub(crate) fn create_joining(
        &self,
        id: &str,
        spec: &Value,
        others: &[(&str, &str)],
        stdio: Stdio,
    ) -> Reply {
        let others = others.iter();
        let others = others.map(|(kind, id)| ((*kind).to_owned(), (*id).to_owned()));
        self.create_with(id, spec, stdio, |request| {
            request.join_namespaces = others.collect();
        })
    }

    /// Creates by a request that is completed here.
    pub(crate) fn create_with(
        &self,
        id: &str,
        spec: &Value,
        stdio: Stdio,
        complete: impl FnOnce(&mut CreateContainerRequest),
    ) -> Reply {
        let mut request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(spec).expect("JSON"),
            rootfs: "rootfs".to_owned(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        complete(&mut request);
        self.send_create(&request)
    }

    fn send_create(&self, request: &CreateContainerRequest) -> Reply {
        match self
            .client
            .create_container(with_timeout(DEADLINE), request)
        {
            Ok(response) => Reply::Created(response.pid),
            Err(error) => {
                let (code, message) = status(error);
                Reply::Refused(code, message)
            }
        }
    }

    pub(crate) fn try_create(&self, id: &str, spec: &Value, binds: &[(u32, &str)]) -> Reply {
        self.create(id, spec, binds, Stdio::new())
    }

    pub(crate) fn create_only(&self, id: &str, spec: &Value, stdio: Stdio) -> Container<'_> {
        match self.create(id, spec, &[], stdio) {
            Reply::Created(pid) => assert!(pid > 0),
            Reply::Refused(code, message) => panic!("{code}: {message}"),
        }
        self.container(id)
    }

    /// Creates and starts.
    pub(crate) fn start(&self, id: &str, spec: &Value, stdio: Stdio) -> Container<'_> {
        let container = self.create_only(id, spec, stdio);
        container.try_start().expect("started");
        container
    }

    /// Creates, starts, waits and removes.
    pub(crate) fn run(&self, id: &str, arguments: &[&str]) -> Run {
        self.run_spec(id, &spec(arguments), b"")
    }

    pub(crate) fn run_spec(&self, id: &str, spec: &Value, input: &[u8]) -> Run {
        self.run_all(id, spec, &[], input)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn run_with_binds(&self, id: &str, spec: &Value, binds: &[(u32, &str)]) -> Run {
        self.run_all(id, spec, binds, b"")
            .unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn try_run(&self, id: &str, spec: &Value) -> Result<(), String> {
        self.run_all(id, spec, &[], b"").map(drop)
    }

    fn run_all(
        &self,
        id: &str,
        spec: &Value,
        binds: &[(u32, &str)],
        input: &[u8],
    ) -> Result<Run, String> {
        let streams = Streams::new(self, input);
        if let Reply::Refused(code, message) = self.create(id, spec, binds, streams.stdio()) {
            return Err(format!("{code}: {message}"));
        }
        let container = self.container(id);
        let started = container.try_start();
        if let Err((code, message)) = started {
            container.remove_by_force();
            return Err(format!("{code}: {message}"));
        }
        let run = streams.collect(|| container.wait());
        container.remove();
        Ok(run)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Three connected streams; input is written by a thread.
pub(crate) struct Streams {
    numbers: [u64; 3],
    input: thread::JoinHandle<()>,
    stdout: UnixStream,
    stderr: UnixStream,
}

impl Streams {
    pub(crate) fn new(fixture: &Fixture, input: &[u8]) -> Self {
        let ((first, mut stdin), (second, stdout), (third, stderr)) =
            (fixture.stream(), fixture.stream(), fixture.stream());
        let input = input.to_vec();
        let input = thread::spawn(move || {
            // A process that does not read its input is no error.
            let _ = stdin.write_all(&input);
            let _ = stdin.shutdown(Shutdown::Write);
            let _ = stdin.read_to_end(&mut Vec::new());
        });
        Self {
            numbers: [first, second, third],
            input,
            stdout,
            stderr,
        }
    }

    pub(crate) fn stdio(&self) -> Stdio {
        let [stdin, stdout, stderr] = self.numbers;
        Stdio {
            stdin,
            stdout,
            stderr,
            ..Default::default()
        }
    }

    pub(crate) fn collect(mut self, wait: impl FnOnce() -> i32) -> Run {
        let stderr = thread::spawn(move || read_all(&mut self.stderr));
        let mut raw_stdout = Vec::new();
        self.stdout.read_to_end(&mut raw_stdout).expect("read");
        let status = wait();
        self.input.join().expect("input");
        Run {
            stdout: String::from_utf8_lossy(&raw_stdout).into_owned(),
            raw_stdout,
            stderr: stderr.join().expect("stderr"),
            status,
        }
    }
}

fn status(error: ttrpc::Error) -> (String, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let code = status.code.enum_value().expect("known");
            (format!("{code:?}"), status.message)
        }
        other => panic!("{other}"),
    }
}
