//! Limits of containers: what is set, changed, and told. Each needs controllers of cgroup v2.

use bulkhead_agent_protocol::messages::Stdio;
use serde_json::json;

use crate::support::{self, Fixture, spec};

/// Reads files of its own cgroup, one per line of input, until the input ends.
const READER: &str = "while read file; do echo $file $(cat /sys/fs/cgroup/$file); done";

pub(crate) fn set_and_changed(fixture: &Fixture) {
    let mut spec = spec(&["sh", "-c", "sleep 1000"]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 1 << 20},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 10_000},
        "pids": {"limit": 50},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "77MB", "limit": 0}],
        "unified": {"memory.high": "60000000", "cgroup.max.depth": "7"},
    });
    support::add_mount(
        &mut spec,
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]}),
    );
    let container = fixture.start("limits", &spec, Stdio::new());
    let read = |files: &str| {
        let input = files.replace(' ', "\n") + "\n";
        let run = container.exec("read", &["sh", "-c", READER], input.as_bytes());
        assert_eq!(run.status, 0, "{}", run.stderr);
        run.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let files = "memory.max memory.swap.max memory.low memory.high cpu.weight cpu.max \
        cpu.max.burst pids.max hugetlb.2MB.max cgroup.max.depth";
    let expected = [
        "memory.max 67108864",
        "memory.swap.max 33554432",
        "memory.low 1048576",
        "memory.high 59998208",
        "cpu.weight 39",
        "cpu.max 50000 100000",
        "cpu.max.burst 10000",
        "pids.max 50",
        "hugetlb.2MB.max 0",
        "cgroup.max.depth 7",
    ];
    assert_eq!(read(files), expected);

    let changes = json!({"memory": {"limit": 80 << 20}, "cpu": {"quota": 5000, "burst": 1000},
        "pids": {"limit": -1}});
    container.update(&changes).expect("updated");
    let changed = [
        "memory.max 83886080",
        "memory.swap.max 16777216",
        "cpu.max 5000 100000",
        "cpu.max.burst 1000",
        "pids.max max",
        "memory.low 1048576",
    ];
    let files = "memory.max memory.swap.max cpu.max cpu.max.burst pids.max memory.low";
    assert_eq!(read(files), changed);

    // The third setting fails: the two before it are put back.
    let broken = json!({"memory": {"limit": 90 << 20}, "unified": {"memory.high": "nonsense"}});
    let (code, message) = container.update(&broken).expect_err("refused");
    assert_eq!(code, "INVALID_ARGUMENT", "{message}");
    assert!(
        message.contains("linux.resources.unified.memory.high"),
        "{message}"
    );
    assert_eq!(read(files), changed);
    let used = json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}});
    let (_, message) = container.update(&used).expect_err("refused");
    assert!(message.contains("rejecting memory limit 4096"), "{message}");

    let stats = container.stats();
    assert_eq!(stats.memory_limit, 80 << 20);
    assert_eq!(stats.memory_swap_limit, 16 << 20);
    assert_eq!(stats.pids_limit, u64::MAX);
    assert!(stats.memory_events.contains_key("oom_kill"));
    assert!(stats.memory_peak >= stats.memory_current);
    assert!(stats.huge_pages.iter().any(|page| page.page_size == "2MB"));
    assert!(!stats.cpus.is_empty());
    container.remove_by_force();
    let (code, _) = container.update(&changes).expect_err("gone");
    assert_eq!(code, "OUT_OF_RANGE");
}

pub(crate) fn device_rules(fixture: &Fixture) {
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    support::add_mount(&mut spec, json!({"destination": "/tmp", "type": "tmpfs"}));
    let container = fixture.start("rules", &spec, Stdio::new());
    // No driver has this number: once it is allowed, the kernel says so.
    let script = "mknod /tmp/own c 240 77 2>/dev/null; head -c 1 /tmp/own";
    let opened = || container.exec("open", &["sh", "-c", script], b"").stderr;
    let (denied, allowed) = ("Operation not permitted", "No such device or address");
    assert!(opened().contains(denied), "{}", opened());
    let update = |rules| container.update(&json!({"devices": rules}));
    let all = json!({"allow": true, "type": "c", "major": 240, "minor": 77, "access": "r"});
    update(json!([all])).expect("updated");
    assert!(opened().contains(allowed), "{}", opened());
    update(json!([])).expect("updated");
    assert!(opened().contains(allowed), "no rules leave the rules");
    update(json!([{"allow": false, "access": "rwm"}])).expect("updated");
    assert!(opened().contains(denied), "{}", opened());
    let (_, message) = update(json!([{"allow": true, "access": "x"}])).expect_err("refused");
    assert!(
        message.contains("linux.resources.devices[0].access"),
        "{message}"
    );
    container.remove_by_force();
}

pub(crate) fn out_of_memory(fixture: &Fixture) {
    let script = "while true; do sh -c 'x=0123456789abcdef; while true; do x=$x$x; done'; \
        read line; done";
    let mut spec = spec(&["sh", "-c", script]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    let (number, mut stdin) = fixture.stream();
    let stdio = Stdio {
        stdin: number,
        ..Default::default()
    };
    let container = fixture.start("oom", &spec, stdio);
    assert_eq!(container.wait_out_of_memory(0), (1, false));
    support::write(&mut stdin, b"once more\n");
    assert_eq!(container.wait_out_of_memory(1), (2, false));
    container.signal(9);
    assert_eq!(container.wait_out_of_memory(2), (2, true));
    assert_eq!(container.wait_out_of_memory(0), (2, true));
    container.wait();
    container.remove();
}
