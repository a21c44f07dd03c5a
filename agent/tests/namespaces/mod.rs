//! Cases about namespaces beyond the usual ones, and about sharing the guest's.

use bulkhead_agent_protocol::messages::Stdio;
use serde_json::json;

use crate::support::{self, Fixture, spec};

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
