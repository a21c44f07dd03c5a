//! Cases about namespaces beyond the usual ones, and about sharing the guest's.

use bulkhead_agent_protocol::messages::Stdio;
use serde_json::json;

use crate::support::{self, Fixture, Reply, spec};

pub(crate) fn user_namespace(fixture: &Fixture) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map | tr -s ' '; ls -ln /owned | tr -s ' ' | cut -d' ' -f3,4; \
        mount | grep -c -E ' /(proc|sys|dev|dev/pts|dev/mqueue) '; echo x > /dev/null && echo null; echo again > /dev/stdout; hostname; cat /proc/self/oom_score_adj; ulimit -n",
    ]);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("array")
        .push(json!({"type": "user"}));
    let mapping = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["process"]["oomScoreAdj"] = json!(5);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 500, "hard": 600}]);
    fixture.in_rootfs("touch owned && chown -R 200000:200000 .");
    let run = fixture.run_spec("user", &spec, b"");
    assert_eq!(
        run.stdout, "0\n 0 200000 65536\n0 0\n5\nnull\nagain\ninside\n5\n500\n",
        "{}",
        run.stderr
    );
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let container = fixture.start("user-exec", &spec, Stdio::new());
    let run = container.exec("one", &["sh", "-c", "id -u; echo again > /dev/stdout"], b"");
    assert_eq!(run.stdout, "0\nagain\n", "{}", run.stderr);
    container.remove_by_force();
}

pub(crate) fn shared_namespaces(fixture: &Fixture) {
    let mut spec = spec(&["sh", "-c", "sleep 1000 & test $$ -gt 1 && echo shared"]);
    spec["linux"]["namespaces"] =
        json!([{"type": "mount"}, {"type": "network", "path": "/host/ns"}]);
    spec.as_object_mut().expect("object").remove("hostname");
    // The process that stays behind ends with the first one, or the removal would fail.
    let run = fixture.run_spec("shared", &spec, b"");
    assert_eq!(run.stdout, "shared\n", "{}", run.stderr);
}

pub(crate) fn exec_beside_cgroups(fixture: &Fixture) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "mkdir /sys/fs/cgroup/below && echo $$ > /sys/fs/cgroup/below/cgroup.procs && sleep 1000",
    ]);
    support::add_mount(
        &mut spec,
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}),
    );
    let container = fixture.start("cgroups", &spec, Stdio::new());
    let run = container.exec("one", &["true"], b"");
    assert_eq!(run.status, 0);
    container.remove_by_force();
}

pub(crate) fn time_namespace(fixture: &Fixture) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "test $(cut -d. -f1 /proc/uptime) -gt 5000000 && echo shifted; sleep 1000",
    ]);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("array")
        .push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] =
        json!({"boottime": {"secs": 5_000_000, "nanosecs": 5}, "monotonic": {"secs": 5_000_000}});
    let (number, mut stream) = fixture.stream();
    let container = fixture.start(
        "time",
        &spec,
        Stdio {
            stdout: number,
            ..Default::default()
        },
    );
    let mut word = [0; 8];
    std::io::Read::read_exact(&mut stream, &mut word).expect("a word");
    assert_eq!(&word, b"shifted\n");
    let run = container.exec(
        "one",
        &[
            "sh",
            "-c",
            "test $(cut -d. -f1 /proc/uptime) -gt 5000000 && echo shifted",
        ],
        b"",
    );
    assert_eq!(run.stdout, "shifted\n", "{}", run.stderr);
    container.remove_by_force();
}

fn mapping(inside: u32, outside: u32, size: u32) -> serde_json::Value {
    json!([{"containerID": inside, "hostID": outside, "size": size}])
}

pub(crate) fn add_user_namespace(spec: &mut serde_json::Value) {
    let namespaces = &mut spec["linux"]["namespaces"];
    let namespaces = namespaces.as_array_mut().expect("array");
    namespaces.push(json!({"type": "user"}));
    for field in ["uidMappings", "gidMappings"] {
        spec["linux"][field] = mapping(0, 100_000, 65_536);
    }
}

pub(crate) fn devices_in_user_namespace(fixture: &Fixture) {
    let script = "stat -c '%n %a %t %T %u %g' /dev/null /dev/mine /dev/pipe; \
        head -c 2 /dev/mine | wc -c; echo x > /dev/null && echo written";
    let mut spec = spec(&["sh", "-c", script]);
    add_user_namespace(&mut spec);
    fixture.in_rootfs("chown -R 100000:100000 .");
    spec["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 384, "uid": 3, "gid": 4},
        {"path": "/dev/pipe", "type": "p", "fileMode": 420}]);
    let run = fixture.run_spec("user-devices", &spec, b"");
    let expected = "/dev/null 666 1 3 0 0\n/dev/mine 600 1 5 3 4\n/dev/pipe 644 0 0 0 0\n\
        2\nwritten\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);
}

pub(crate) fn everything_in_user_namespace(fixture: &Fixture) {
    let script = "awk '{print $5, $(NF-2)}' /proc/self/mountinfo | grep -E '^/(proc|sys|dev|tmp)' | sort; \
        cat /proc/sys/kernel/shmmni; test $(cut -d. -f1 /proc/uptime) -gt 5000000 && echo shifted; \
        mkdir /sys/fs/cgroup/below && echo 0 > /sys/fs/cgroup/below/cgroup.procs && echo made; \
        (echo 0 > /sys/fs/cgroup/cgroup.freeze) 2>/dev/null || echo kept; mkdir /tmp/x && stat -c %u /tmp/x; \
        cat /proc/self/oom_score_adj; ulimit -n; hostname";
    let mut spec = spec(&["sh", "-c", script]);
    add_user_namespace(&mut spec);
    fixture.in_rootfs("chown -R 100000:100000 .");
    let namespaces = &mut spec["linux"]["namespaces"];
    let namespaces = namespaces.as_array_mut().expect("array");
    namespaces.push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 5_000_000}});
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "77"});
    spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/sys/firmware"]);
    spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    spec["process"]["oomScoreAdj"] = json!(5);
    support::add_mount(
        &mut spec,
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup"}),
    );
    support::add_mount(&mut spec, json!({"destination": "/tmp", "type": "tmpfs"}));
    let run = fixture.run_spec("user-all", &spec, b"");
    for expected in [
        "/dev tmpfs",
        "/dev/mqueue mqueue",
        "/dev/pts devpts",
        "/dev/shm tmpfs",
        "/proc proc",
        "/sys/fs/cgroup cgroup2",
        "/tmp tmpfs",
        "\n77\nshifted\nmade\nkept\n0\n5\n1000\ninside\n",
    ] {
        assert!(
            run.stdout.contains(expected),
            "{expected}: {} {}",
            run.stdout,
            run.stderr
        );
    }
}

pub(crate) fn id_mapped_mounts(fixture: &Fixture) {
    fixture.in_share("mkdir -p owned && touch owned/root owned/other && chown 5:6 owned/other");
    let script = "cd /owned; stat -c '%n %u %g' root other; touch new 2>/dev/null || echo refused";
    let mount = json!({"destination": "/owned", "type": "bind", "source": "/o", "options": ["rbind"],
        "uidMappings": mapping(0, 1000, 100), "gidMappings": mapping(0, 2000, 100)});
    let mut own = spec(&["sh", "-c", script]);
    let index = support::add_mount(&mut own, mount.clone());
    let run = fixture.run_with_binds("id-mapped", &own, &[(index, "owned")]);
    // root of the container has no id on that filesystem.
    let expected = "root 1000 2000\nother 1005 2006\nrefused\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);

    // With the container's own maps, files keep their owners in the container.
    let mut mapped = spec(&["sh", "-c", script]);
    add_user_namespace(&mut mapped);
    fixture.in_rootfs("chown -R 100000:100000 .");
    let mut mount = mount;
    mount["options"] = json!(["rbind", "ridmap", "ro"]);
    for field in ["uidMappings", "gidMappings"] {
        mount.as_object_mut().expect("object").remove(field);
    }
    let index = support::add_mount(&mut mapped, mount.clone());
    let run = fixture.run_with_binds("id-mapped-user", &mapped, &[(index, "owned")]);
    assert_eq!(
        run.stdout, "root 0 0\nother 5 6\nrefused\n",
        "{}",
        run.stderr
    );

    let mut wrong = spec(&["true"]);
    support::add_mount(&mut wrong, mount);
    let refused = fixture.try_create("id-mapped-wrong", &wrong, &[(index, "owned")]);
    let Reply::Refused(_, message) = refused else {
        panic!("accepted")
    };
    assert!(message.contains(".options: idmap needs"), "{message}");
}
