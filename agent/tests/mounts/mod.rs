//! Mounts: kinds, options, propagation.

use serde_json::json;

use crate::support::{self, Fixture, spec};

pub(crate) fn all_kinds(fixture: &Fixture) {
    let script = "cat /volume/file; cat /etc/one; touch /volume/x 2>/dev/null || echo ro; \
        stat -c %a /scratch; ls /scratch; grep -E ' /(scratch|volume|dev/pts|sys|sys/fs/cgroup) ' /proc/self/mountinfo | cut -d' ' -f5,6,7";
    let mut spec = spec(&["sh", "-c", script]);
    fixture.in_share("mkdir -p volume && echo data > volume/file && echo one > one");
    fixture.in_rootfs("mkdir -p scratch && touch scratch/kept");
    let first = support::add_mount(
        &mut spec,
        json!({"destination": "/volume", "type": "bind", "source": "/host", "options": ["rbind", "ro", "rslave"]}),
    );
    let second = support::add_mount(
        &mut spec,
        json!({"destination": "/etc/one", "type": "bind", "source": "/host1", "options": ["bind"]}),
    );
    support::add_mount(
        &mut spec,
        json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=711", "noexec", "nosuid"]}),
    );
    support::add_mount(
        &mut spec,
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev", "relatime"]}),
    );
    let run = fixture.run_with_binds("mounts", &spec, &[(first, "volume"), (second, "one")]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let lines: Vec<_> = run.stdout.lines().collect();
    assert_eq!(
        &lines[..5],
        ["data", "one", "ro", "711", "kept"],
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("/volume ro,"), "{}", run.stdout);
    assert!(
        run.stdout.contains("/scratch rw,nosuid,noexec"),
        "{}",
        run.stdout
    );
    assert!(
        run.stdout.contains("/sys/fs/cgroup ro,nosuid,nodev,noexec"),
        "{}",
        run.stdout
    );
}

pub(crate) fn propagation(fixture: &Fixture) {
    // Optional fields of the root's line (proc_pid_mountinfo(5)).
    for (name, expected) in [
        ("private", "-"),
        ("rprivate", "-"),
        ("slave", "-"),
        ("rslave", "-"),
        ("shared", "shared"),
        ("rshared", "shared"),
        ("unbindable", "unbindable"),
        ("runbindable", "unbindable"),
    ] {
        let script = r#"awk '$5 == "/" {print $7}' /proc/self/mountinfo | cut -d: -f1"#;
        let mut spec = spec(&["sh", "-c", script]);
        spec["linux"]["rootfsPropagation"] = json!(name);
        let run = fixture.run_spec("propagation", &spec, b"");
        let words: Vec<_> = run.stdout.split_whitespace().collect();
        assert_eq!(words, [expected], "{name}: {}", run.stderr);
    }
}

pub(crate) fn attributes(fixture: &Fixture) {
    fixture.in_share("mkdir -p data/below && touch data/file");
    let script = "grep ' /bound ' /proc/self/mountinfo | cut -d' ' -f6; \
        grep ' /bound ' /proc/self/mountinfo | cut -d' ' -f7; df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2";
    for (options, expected) in [
        (
            json!([
                "rbind", "rro", "rnosuid", "rnodev", "rnoexec", "rnoatime", "rprivate"
            ]),
            "ro,nosuid,nodev,noexec,noatime",
        ),
        (
            json!(["bind", "ro", "rrw", "nosuid", "rsuid"]),
            "rw,relatime",
        ),
        (
            json!(["rbind", "nosymfollow", "nodiratime", "rshared"]),
            "rw,nodiratime,relatime,nosymfollow",
        ),
    ] {
        let mut spec = spec(&["sh", "-c", script]);
        let mount = json!({"destination": "/link/bound", "type": "bind", "source": "/d", "options": options});
        fixture.in_rootfs("rm -rf link; ln -s / link");
        let index = support::add_mount(&mut spec, mount);
        let run = fixture.run_with_binds("mount-attributes", &spec, &[(index, "data")]);
        let lines: Vec<_> = run.stdout.lines().collect();
        assert_eq!(lines[0], expected, "{}", run.stderr);
        let shared = options.to_string().contains("rshared");
        assert_eq!(lines[1].starts_with("shared:"), shared, "{lines:?}");
        assert_eq!(lines[2], "65536", "the size of /dev/shm");
    }
}
