//! The agent's service over Unix sockets, with real containers: this program starts itself as PID 1
//! of new PID, mount, cgroup, IPC, UTS and network namespaces, where it serves as in a guest, and
//! drives it from outside. Needs root, cgroup v2 and a static busybox; says so if it must skip.

mod disks;
mod limits;
mod mounts;
mod namespaces;
mod network;
mod pods;
mod process;
mod support;

use bulkhead_agent_protocol::messages::Stdio;
use serde_json::json;
use support::{Case, Fixture, Reply, spec};

const CASES: &[Case] = &[
    ("output and exit code", &[], output_and_exit_code),
    ("input reaches the process and ends", &[], input),
    ("a large stream arrives whole", &[], large_stream),
    ("signals end with 128 + n", &[], signals),
    ("namespaces are the container's own", &[], namespaces),
    ("identity is what the spec says", &[], identity),
    ("read-only and masked paths hold", &[], protection),
    ("mounts of all kinds", &[], mounts::all_kinds),
    ("devices are there and filtered", &[], devices),
    ("terminal", &[], terminal),
    ("exec joins the container", &[], exec),
    (
        "exec does not wait for grandchildren",
        &[],
        exec_with_grandchildren,
    ),
    ("pause, list, statistics", &[], pause_and_lists),
    ("programs that cannot run", &[], missing_programs),
    ("hostile rootfs", &[], hostile_rootfs),
    ("seccomp", &[], seccomp),
    ("hooks run in the container", &[], hooks),
    ("refusals name the field", &[], refusals),
    ("user namespace", &[], namespaces::user_namespace),
    (
        "devices in a user namespace",
        &[],
        namespaces::devices_in_user_namespace,
    ),
    (
        "everything in a user namespace",
        &[],
        namespaces::everything_in_user_namespace,
    ),
    ("id-mapped mounts", &[], namespaces::id_mapped_mounts),
    (
        "namespaces of the guest",
        &[],
        namespaces::shared_namespaces,
    ),
    (
        "exec beside cgroups of the container's own",
        &[],
        namespaces::exec_beside_cgroups,
    ),
    ("time namespace", &[], namespaces::time_namespace),
    ("attributes of a process", &[], process::attributes),
    ("exec has attributes of its own", &[], process::exec_in_full),
    (
        "signals are as the kernel's defaults",
        &[],
        process::signals,
    ),
    ("set-user-id programs", &[], process::privileges_of_files),
    ("capabilities of files", &[], process::capabilities_of_files),
    ("propagation of the root", &[], mounts::propagation),
    ("attributes of mounts", &[], mounts::attributes),
    ("containers share namespaces", &[], pods::shared_namespaces),
    ("the end of one container of several", &[], pods::ends),
    ("containers that cannot be joined", &[], pods::refusals),
    ("mounts of another container", &[], pods::joined_mounts),
    ("a container whose monitor is lost", &[], pods::monitor_lost),
    (
        "want of memory beside another container",
        &["memory"],
        pods::out_of_memory,
    ),
    ("filesystems on disks", &[], disks::mounts),
    ("a root filesystem on a disk", &[], disks::root),
    ("disks that cannot be mounted", &[], disks::refusals),
    ("network", &[], network::everything),
    ("network changes", &[], network::changes),
    ("network requests that fail", &[], network::failures),
    ("parameters of interfaces", &[], network::parameters),
    ("states", &[], states),
    ("device rules change", &[], limits::device_rules),
    (
        "limits are set and changed",
        &["cpu", "memory", "pids", "hugetlb"],
        limits::set_and_changed,
    ),
    (
        "kills for want of memory are told",
        &["memory"],
        limits::out_of_memory,
    ),
];

fn main() {
    support::main(CASES);
}

fn output_and_exit_code(fixture: &Fixture) {
    let run = fixture.run("output", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(run.stdout, "out\n");
    assert_eq!(run.stderr, "err\n");
    assert_eq!(run.status, 7);
}

fn input(fixture: &Fixture) {
    let spec = spec(&["cat"]);
    let run = fixture.run_spec("input", &spec, b"to be read\n");
    assert_eq!(run.stdout, "to be read\n");
    assert_eq!(run.status, 0);
}

fn large_stream(fixture: &Fixture) {
    let mut data = vec![0u8; 8 << 20];
    let mut state = 1u32;
    for byte in &mut data {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    let run = fixture.run_spec("large", &spec(&["cat"]), &data);
    assert!(
        run.raw_stdout == data,
        "{} bytes came",
        run.raw_stdout.len()
    );
}

fn signals(fixture: &Fixture) {
    let container = fixture.start("signals", &spec(&["sh", "-c", "sleep 1000"]), Stdio::new());
    container.signal(9);
    assert_eq!(container.wait(), 137);
    container.remove();
    let run = fixture.run(
        "own-signal",
        &["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"],
    );
    assert_eq!(run.status, 143);
}

fn namespaces(fixture: &Fixture) {
    let script = "hostname; echo $$; ls /sys/class/net; grep ^0 /proc/self/cgroup; ps | wc -l";
    let run = fixture.run("namespaces", &["sh", "-c", script]);
    assert_eq!(run.stdout, "inside\n1\nlo\n0::/\n4\n");
    let run = fixture.run(
        "loopback",
        &["sh", "-c", "ping -c1 127.0.0.1 >/dev/null && echo up"],
    );
    assert_eq!(run.stdout, "up\n");
}

fn identity(fixture: &Fixture) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "id; umask; pwd; grep -E 'Cap|NoNewPrivs' /proc/self/status; ulimit -n; echo $HOME; touch /dev/stdout && echo reopened > /dev/stdout",
    ]);
    spec["process"]["user"] =
        json!({"uid": 1000, "gid": 100, "additionalGids": [5, 6], "umask": 63});
    spec["process"]["cwd"] = json!("/made/on/demand");
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]);
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
    });
    let run = fixture.run_spec("identity", &spec, b"");
    let expected = "uid=1000 gid=100 groups=5,6\n0077\n/made/on/demand\n\
        CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
        CapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n99\n/\nreopened\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);
}

fn protection(fixture: &Fixture) {
    let script = "cat /proc/timer_list /proc/kcore | wc -c; ls /masked | wc -l; \
        echo x > /proc/sys/kernel/shmmax || echo refused; touch /x || echo read-only; touch /tmp/x && echo writable";
    let mut spec = spec(&["sh", "-c", script]);
    spec["root"]["readonly"] = json!(true);
    spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/timer_list", "/masked", "/none"]);
    spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/nowhere/at/all"]);
    fixture.in_rootfs("mkdir -p masked && touch masked/secret");
    support::add_mount(
        &mut spec,
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
    );
    let run = fixture.run_spec("protection", &spec, b"");
    assert_eq!(
        run.stdout, "0\n0\nrefused\nread-only\nwritable\n",
        "{}",
        run.stderr
    );
}

fn devices(fixture: &Fixture) {
    let script = "for d in null zero full random urandom tty ptmx fd stdin stdout stderr; do test -e /dev/$d || test -L /dev/$d || echo no $d; done; \
        head -c 4 /dev/zero | wc -c; stat -c '%a %t %T %u' /dev/mine; mknod /tmp/kmsg c 1 11; head -c 1 /tmp/kmsg || echo denied";
    let mut spec = spec(&["sh", "-c", script]);
    spec["linux"]["devices"] = json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 384, "uid": 7}]);
    spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    support::add_mount(
        &mut spec,
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
    );
    let run = fixture.run_spec("devices", &spec, b"");
    assert_eq!(run.stdout, "4\n600 1 3 7\ndenied\n", "{}", run.stderr);
}

fn terminal(fixture: &Fixture) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "tty; stty size; read line; echo got $line; test -c /dev/console && echo console; exit 3",
    ]);
    spec["process"]["terminal"] = json!(true);
    let (number, mut stream) = fixture.stream();
    let stdio = Stdio {
        terminal: true,
        stdin: number,
        rows: 33,
        columns: 44,
        ..Default::default()
    };
    let container = fixture.start("terminal", &spec, stdio);
    container.resize(50, 60);
    support::write(&mut stream, b"line\n");
    let output = support::read_all(&mut stream);
    assert_eq!(container.wait(), 3);
    container.remove();
    let expected = [
        "/dev/pts/0\r\n33 44\r\nline\r\ngot line\r\nconsole\r\n",
        "/dev/pts/0\r\n50 60\r\nline\r\ngot line\r\nconsole\r\n",
    ];
    // The echo of the line may come before the rest.
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert!(
        expected.iter().any(|e| sorted(e) == sorted(&output)),
        "{output:?}"
    );
}

fn exec(fixture: &Fixture) {
    let container = fixture.start("exec", &spec(&["sleep", "1000"]), Stdio::new());
    let run = container.exec(
        "one",
        &[
            "sh",
            "-c",
            "hostname; cat; pidof sleep | wc -w; grep ^0 /proc/self/cgroup; exit 5",
        ],
        b"given\n",
    );
    assert_eq!(run.stdout, "inside\ngiven\n1\n0::/\n", "{}", run.stderr);
    assert_eq!(run.status, 5);
    let error = container
        .try_exec("two", &["no-such"])
        .expect_err("refused");
    assert!(
        error.contains(r#"exec: "no-such": executable file not found in $PATH"#),
        "{error}"
    );
    container.signal(9);
    assert_eq!(container.wait(), 137);
    container.remove();
}

fn exec_with_grandchildren(fixture: &Fixture) {
    let container = fixture.start("grandchildren", &spec(&["sleep", "1000"]), Stdio::new());
    let run = container.exec(
        "one",
        &["sh", "-c", "echo first; sleep 500 & echo second"],
        b"",
    );
    assert_eq!((run.stdout.as_str(), run.status), ("first\nsecond\n", 0));
    container.signal(9);
    container.wait();
    container.remove();
}

fn pause_and_lists(fixture: &Fixture) {
    let container = fixture.start("pause", &spec(&["sh", "-c", "sleep 1000"]), Stdio::new());
    container.pause();
    let state = container.processes();
    assert!(
        state
            .iter()
            .any(|command| command == "sleep 1000" || command == "sh -c sleep 1000"),
        "{state:?}"
    );
    container.resume();
    container.stats();
    container.signal_all(9);
    assert_eq!(container.wait(), 137);
    container.remove();
}

fn missing_programs(fixture: &Fixture) {
    fixture.in_rootfs("echo text > plain && chmod 644 plain && echo '#!/no/interpreter' > script && chmod 755 script");
    for (program, code, text) in [
        (
            "nothing",
            "NOT_FOUND",
            r#"exec: "nothing": executable file not found in $PATH"#,
        ),
        (
            "/no/thing",
            "NOT_FOUND",
            "stat /no/thing: no such file or directory",
        ),
        (
            "/plain",
            "PERMISSION_DENIED",
            r#"exec: "/plain": permission denied"#,
        ),
        ("/etc", "PERMISSION_DENIED", "is a directory"),
    ] {
        let reply = fixture.try_create("missing", &spec(&[program]), &[]);
        let Reply::Refused(actual, message) = reply else {
            panic!("{program} was accepted")
        };
        assert_eq!(actual, code);
        assert!(message.contains(text), "{message}");
    }
    let run = fixture
        .try_run("interpreter", &spec(&["/script"]))
        .expect_err("refused");
    assert!(run.contains("no such file or directory"), "{run}");
}

fn hostile_rootfs(fixture: &Fixture) {
    let outside = fixture.outside();
    for path in ["proc", "sys", "dev", "etc/hosts", "masked", "volume"] {
        fixture.in_rootfs(&format!(
            "mkdir -p etc; rm -rf {path}; ln -s {}/{path} {path}",
            outside.display()
        ));
    }
    fixture.in_share("echo data > one");
    let mut spec = spec(&["true"]);
    spec["linux"]["maskedPaths"] = json!(["/masked", "/proc/kcore"]);
    spec["linux"]["readonlyPaths"] = json!(["/masked/x"]);
    spec["process"]["cwd"] = json!("/volume/deep/below");
    let hosts = support::add_mount(
        &mut spec,
        json!({"destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["bind"]}),
    );
    let run = fixture.run_with_binds("hostile", &spec, &[(hosts, "one")]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let left = std::fs::read_dir(&outside).expect("read").count();
    assert_eq!(left, 0, "something was made outside of the rootfs");
}

fn seccomp(fixture: &Fixture) {
    for privileges in [true, false] {
        let mut spec = spec(&[
            "sh",
            "-c",
            "mkdir /tmp/x 2>/dev/null || echo refused; echo done",
        ]);
        spec["process"]["noNewPrivileges"] = json!(privileges);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]});
        let run = fixture.run_spec("seccomp", &spec, b"");
        assert_eq!(run.stdout, "refused\ndone\n", "{}", run.stderr);
    }
    // Filters that forbid what the agent itself would use after installing them: to look the program
    // up (profiles of before faccessat2), and to see where the working directory is.
    for (name, forbidden) in [
        ("echo", "faccessat2"),
        ("/bin/echo", "faccessat2"),
        ("echo", "getcwd"),
    ] {
        let mut spec = spec(&[name, "ran"]);
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": [forbidden], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]});
        let run = fixture.run_spec("seccomp-old", &spec, b"");
        assert_eq!(run.stdout, "ran\n", "{}", run.stderr);
    }
}

fn hooks(fixture: &Fixture) {
    let mut spec = spec(&["cat", "/tmp/state"]);
    support::add_mount(
        &mut spec,
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
    );
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state"], "timeout": 5}]});
    let run = fixture.run_spec("hooks", &spec, b"");
    assert!(
        run.stdout.contains(r#""id":"hooks""#),
        "{} {}",
        run.stdout,
        run.stderr
    );
    let script = "echo never mind; echo no >&2; echo thanks >&2; exit 3";
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/true"}, {"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    let error = fixture.try_run("hooks-fail", &spec).expect_err("refused");
    let expected = "/bin/sh (hooks.startContainer[1]) failed: exit status: 3: no; thanks";
    assert!(error.contains(expected), "{error}");
    spec["hooks"] =
        json!({"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]});
    let error = fixture.try_run("hooks-late", &spec).expect_err("refused");
    assert!(error.contains("timeout"), "{error}");
}

fn refusals(fixture: &Fixture) {
    let cases: Vec<(&str, serde_json::Value, &str, &str)> = vec![
        (
            "/linux/intelRdt",
            json!({}),
            "UNIMPLEMENTED",
            "linux.intelRdt",
        ),
        (
            "/linux/sysctl",
            json!({"vm.swappiness": "1"}),
            "UNIMPLEMENTED",
            "linux.sysctl vm.swappiness",
        ),
        (
            "/linux/rootfsPropagation",
            json!("odd"),
            "INVALID_ARGUMENT",
            "linux.rootfsPropagation",
        ),
        (
            "/process/args",
            json!([]),
            "INVALID_ARGUMENT",
            "process.args",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "x"}]}),
            "INVALID_ARGUMENT",
            "hooks.startContainer[0].path",
        ),
        (
            "/ociVersion",
            json!("2.0.0"),
            "INVALID_ARGUMENT",
            "ociVersion",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/x", "options": ["bind"]}]),
            "INVALID_ARGUMENT",
            "mounts[0].source",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/x", "options": ["rbind", "no-such-option"]}]),
            "INVALID_ARGUMENT",
            "no-such-option",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "nofs", "source": "x"}]),
            "UNIMPLEMENTED",
            "mounts[0].type nofs",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "tmpfs", "options": ["nonsense"]}]),
            "INVALID_ARGUMENT",
            "mounts[0].options",
        ),
        ("/process/cwd", json!(5), "INVALID_ARGUMENT", "process.cwd"),
        (
            "/process/user",
            json!([0, 0]),
            "INVALID_ARGUMENT",
            "process.user: ",
        ),
        (
            "/vm",
            json!({"kernel": {"path": "/k"}}),
            "UNIMPLEMENTED",
            "vm",
        ),
    ];
    for (pointer, value, code, text) in cases {
        let mut spec = spec(&["true"]);
        let (parent, key) = pointer.rsplit_once('/').expect("pointer");
        spec.pointer_mut(parent).expect("parent")[key] = value;
        let Reply::Refused(actual, message) = fixture.try_create(
            "refused",
            &spec,
            if text == "no-such-option" {
                &[(0, "rootfs")]
            } else {
                &[]
            },
        ) else {
            panic!("{pointer} was accepted")
        };
        assert_eq!(actual, code, "{message}");
        assert!(message.contains(text), "{message}");
    }
}

fn states(fixture: &Fixture) {
    let Reply::Refused(code, _) = fixture.try_create("../x", &spec(&["true"]), &[]) else {
        panic!("a path was accepted as an id")
    };
    assert_eq!(code, "INVALID_ARGUMENT");
    let container = fixture.start("states", &spec(&["sleep", "1000"]), Stdio::new());
    let Reply::Refused(code, _) = fixture.try_create("states", &spec(&["true"]), &[]) else {
        panic!("an id was taken twice")
    };
    assert_eq!(code, "FAILED_PRECONDITION");
    assert_eq!(
        container.try_remove().expect_err("running").0,
        "FAILED_PRECONDITION"
    );
    assert_eq!(
        container.try_start().expect_err("running").0,
        "FAILED_PRECONDITION"
    );
    container.remove_by_force();
    assert_eq!(container.try_remove().expect_err("gone").0, "OUT_OF_RANGE");
    // A container that never started is removed as well.
    let Reply::Created(_) = fixture.try_create("unstarted", &spec(&["true"]), &[]) else {
        panic!("refused")
    };
    fixture.container("unstarted").remove_by_force();
}
