//! What a process is: scheduling, limits, signals, privileges; of the container's own and of exec.

use bulkhead_agent_protocol::messages::Stdio;
use serde_json::json;

use crate::support::{Fixture, spec};

pub(crate) fn attributes(fixture: &Fixture) {
    // Fields 19 (nice) and 41 (policy) of proc_pid_stat(5); the name has no spaces.
    let script = "cut -d' ' -f19,41 /proc/$$/stat; ionice -p $$; cat /proc/self/oom_score_adj; \
        uname -m; ulimit -c; echo $A$B";
    let mut spec = spec(&["sh", "-c", script]);
    let process = &mut spec["process"];
    process["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    process["oomScoreAdj"] = json!(77);
    process["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}, {"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]);
    process["env"] = json!(["PATH=/bin", "A=old", "B=b=c", "A=new"]);
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let run = fixture.run_spec("attributes", &spec, b"");
    let expected = "7 3\nbest-effort: prio 6\n77\ni686\n1\nnewb=c\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);
}

pub(crate) fn exec_in_full(fixture: &Fixture) {
    let container = fixture.start("exec-full", &spec(&["sleep", "1000"]), Stdio::new());
    let script = "id; umask; pwd; echo $X; grep -E 'Cap|NoNewPrivs' /proc/self/status; \
        cut -d' ' -f19,41 /proc/$$/stat; ulimit -n; cat /proc/self/oom_score_adj";
    let process = json!({
        "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6], "umask": 63},
        "cwd": "/proc", "env": ["PATH=/bin", "X=y"], "args": ["sh", "-c", script],
        "noNewPrivileges": true, "oomScoreAdj": 55,
        "scheduler": {"policy": "SCHED_BATCH", "nice": 7},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}],
        "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_OF_THE_FUTURE"],
            "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
    });
    let run = container.exec_process("one", &process, b"");
    let expected = "uid=1000 gid=100 groups=5,6\n0077\n/proc\ny\n\
        CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
        CapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n7 3\n99\n55\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);

    // What runc takes for root's.
    let process = json!({"cwd": "/", "env": ["PATH=/bin"], "args": ["id", "-u"],
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]});
    let run = container.exec_process("two", &process, b"");
    assert_eq!(run.stdout, "0\n", "{}", run.stderr);
    container.remove_by_force();
}

pub(crate) fn signals(fixture: &Fixture) {
    let show = ["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"];
    let none = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000000000\n";
    let run = fixture.run("signals-default", &show);
    assert_eq!(run.stdout, none, "{}", run.stderr);
    let container = fixture.start("signals-exec", &spec(&["sleep", "1000"]), Stdio::new());
    let run = container.exec("one", &show, b"");
    assert_eq!(run.stdout, none, "{}", run.stderr);
    // The reader has gone: the writer ends by SIGPIPE, quietly.
    let run = container.exec("two", &["sh", "-c", "yes | head -n 1; echo $?"], b"");
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("y\n0\n", ""));
    container.remove_by_force();
}

pub(crate) fn privileges_of_files(fixture: &Fixture) {
    // This program, as busybox gives such privileges up at once.
    let program = std::env::current_exe().expect("own path");
    std::fs::copy(program, fixture.rootfs().join("bin/raised")).expect("copied");
    fixture.in_rootfs("chmod 4755 bin/raised");
    for (no_new_privileges, expected) in [
        (false, "Uid:\t1000\t0\t0\t0\n"),
        (true, "Uid:\t1000\t1000\t1000\t1000\n"),
    ] {
        let mut spec = spec(&["raised", "print-ids"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let run = fixture.run_spec("raised", &spec, b"");
        assert_eq!(run.stdout, expected, "{}", run.stderr);
        let container = fixture.start("raised-exec", &spec_of_sleep(), Stdio::new());
        let run = container.exec_process("one", &spec["process"], b"");
        assert_eq!(run.stdout, expected, "{}", run.stderr);
        container.remove_by_force();
    }
}

fn spec_of_sleep() -> serde_json::Value {
    spec(&["sleep", "1000"])
}

pub(crate) fn capabilities_of_files(fixture: &Fixture) {
    // struct vfs_ns_cap_data (linux/capability.h), revisions 2 and 3: CAP_KILL (5) permitted and
    // effective; the third names the root user that it holds for.
    let attribute = |revision: u32, root: Option<u32>| {
        let words = [revision << 24 | 1, 1 << 5, 0, 0, 0]
            .into_iter()
            .chain(root);
        words.flat_map(u32::to_le_bytes).collect::<Vec<_>>()
    };
    let program = fixture.rootfs().join("bin/busybox-capable");
    let set = |value: &[u8]| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&program, "security.capability", value, flags)
    };
    fixture.in_rootfs("cp bin/busybox bin/busybox-capable");
    let script = "exec busybox-capable grep CapEff /proc/self/status";
    for (value, user_namespace, expected) in [
        (attribute(2, None), false, "0000000000000020"),
        (attribute(2, None), true, "0000000000000020"),
        (attribute(3, Some(100_000)), true, "0000000000000020"),
        // Another namespace's.
        (attribute(3, Some(200_000)), true, "0000000000000000"),
    ] {
        set(&value).expect("set");
        let mut spec = spec(&["sh", "-c", script]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        if user_namespace {
            crate::namespaces::add_user_namespace(&mut spec);
        }
        let run = fixture.run_spec("capable", &spec, b"");
        assert_eq!(
            run.stdout,
            format!("CapEff:\t{expected}\n"),
            "{value:?} {}",
            run.stderr
        );
    }
}
