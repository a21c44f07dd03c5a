//! Options of `run` that set the container's surroundings.

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};

super::engine_cases!(options;
    [both quick] user;
    [both] names, environment, working_directory, entry_point, hostname, hosts, devices, sysctls, ulimits, shm, tmpfs,
        read_only, privileged, cgroup_parent, namespaces_of_the_host;
    [podman] umask, personality, systemd_mode, passwd_entry, rootfs, timeout);

fn user(engine: &Engine) -> Result<()> {
    engine
        .script(&["--user", "1000"], "id")?
        .ok()?
        .says(&["uid=1000(user) gid=1000(user) groups=1000(user)"])?;
    engine
        .script(
            &["--user", "user:extra", "--group-add", "5"],
            "id; touch /root/x || echo denied",
        )?
        .ok()?
        .says(&["uid=1000(user) gid=2000(extra)", "5", "denied"])?;
    engine.script(&["--user", "nobody-here"], "id")?.fails()?;
    Ok(())
}

fn names(engine: &Engine) -> Result<()> {
    engine.start("made-one", &[IMAGE, "sleep", "1000"])?;
    let again = engine
        .call(&[
            "run",
            "--network",
            "none",
            "--name",
            "made-one",
            IMAGE,
            "true",
        ])?
        .fails()?;
    ensure!(again.contains("in use"), "{again}");
    engine.remove(&["made-one"])
}

fn environment(engine: &Engine) -> Result<()> {
    let file = engine.path("env");
    std::fs::write(&file, "C=from file\n")?;
    engine
        .script(
            &["--env", "A=b c", "--env-file", &file],
            "echo \"$A|$C|$HOME|$PATH\"",
        )?
        .ok()?
        .says(&[
            "b c|from file|/root|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ])?;
    Ok(())
}

fn working_directory(engine: &Engine) -> Result<()> {
    engine
        .script(&["--workdir", "/tmp"], "pwd")?
        .ok()?
        .says(&["/tmp\n"])?;
    Ok(())
}

fn entry_point(engine: &Engine) -> Result<()> {
    engine
        .run(&["--entrypoint", "echo", IMAGE, "hello", "there"])?
        .ok()?
        .says(&["hello there\n"])?;
    Ok(())
}

fn hostname(engine: &Engine) -> Result<()> {
    engine
        .script(&["--hostname", "a-name"], "hostname; cat /etc/hostname")?
        .ok()?
        .says(&["a-name\na-name"])?;
    let own = engine.script(&[], "hostname")?.ok()?.text();
    ensure!(own.trim().len() == 12, "no id as host name: {own}");
    Ok(())
}

fn hosts(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--add-host", "some.where:192.0.2.7"],
            "cat /etc/hosts; ping -c1 -w1 some.where 2>&1 | head -1",
        )?
        .says(&["192.0.2.7\tsome.where", "PING some.where (192.0.2.7)"])?;
    Ok(())
}

fn devices(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--device", "/dev/null:/dev/nothing:rw"],
            "ls -l /dev/nothing; echo x >/dev/nothing",
        )?
        .ok()?
        .says(&["crw-rw-rw-", "1,   3"])?;
    engine.script(&[], "for d in full null random tty urandom zero; do [ -c /dev/$d ] || echo no $d; done; [ -e /dev/kvm ] && echo kvm; head -c 4 /dev/urandom | wc -c")?
        .ok()?.says(&["4\n"]).and_then(|output| {
            ensure!(output.text() == "4\n", "{output}");
            Ok(())
        })?;
    // The device rules allow nothing else.
    let output = engine.script(&["--cap-add", "MKNOD"], "mknod /tmp/m c 1 1 && cat /tmp/m")?;
    ensure!(
        output.code() != 0 && output.errors().contains("not permitted"),
        "{output}"
    );
    Ok(())
}

fn sysctls(engine: &Engine) -> Result<()> {
    let options = [
        "--sysctl",
        "kernel.msgmax=9000",
        "--sysctl",
        "net.ipv4.ip_forward=1",
    ];
    engine
        .script(
            &options,
            "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward",
        )?
        .ok()?
        .says(&["9000\n1\n"])?;
    Ok(())
}

fn ulimits(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--ulimit", "nofile=100:200", "--ulimit", "core=0"],
            "ulimit -n; ulimit -Hn; ulimit -c",
        )?
        .ok()?
        .says(&["100\n200\n0\n"])?;
    Ok(())
}

fn shm(engine: &Engine) -> Result<()> {
    let script = "df -k /dev/shm | tail -1; stat -c %a /dev/shm; dd if=/dev/zero of=/dev/shm/x bs=1M count=3";
    let output = engine
        .script(&["--shm-size", "2m"], script)?
        .expect(1)?
        .says(&[" 2048 ", "1777"])?;
    ensure!(output.errors().contains("No space left"), "{output}");
    Ok(())
}

fn tmpfs(engine: &Engine) -> Result<()> {
    let script = "stat -c %a /t; grep ' /t ' /proc/mounts; dd if=/dev/zero of=/t/x bs=1M count=3";
    let output = engine
        .script(&["--tmpfs", "/t:size=2m,mode=700,noexec"], script)?
        .expect(1)?;
    let output = output.says(&["700\n", "size=2048k", "noexec"])?;
    ensure!(output.errors().contains("No space left"), "{output}");
    Ok(())
}

fn read_only(engine: &Engine) -> Result<()> {
    let output = engine
        .script(
            &["--read-only", "--tmpfs", "/t"],
            "touch /t/x && echo t; touch /x",
        )?
        .expect(1)?;
    let output = output.says(&["t\n"])?;
    ensure!(
        output.errors().contains("Read-only file system"),
        "{output}"
    );
    Ok(())
}

fn privileged(engine: &Engine) -> Result<()> {
    let script = "grep CapEff /proc/self/status; mount -t tmpfs none /mnt 2>&1 || mkdir /m && mount -t tmpfs none /m && echo mounted";
    // Docker knows the capabilities of Linux 5.7.
    let all = if engine.podman() {
        "000001ffffffffff"
    } else {
        "0000003fffffffff"
    };
    engine
        .script(&["--privileged"], script)?
        .ok()?
        .says(&[all, "mounted"])?;
    Ok(())
}

fn cgroup_parent(engine: &Engine) -> Result<()> {
    engine.start(
        "made-cg",
        &[
            "--cgroup-parent",
            "/made-parent",
            IMAGE,
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-cg", "ready")?;
    let pid = engine.field("made-cg", "{{.State.Pid}}")?;
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(cgroup.contains("/made-parent/"), "{cgroup}");
    engine.remove(&["made-cg"])?;
    // Engines leave it to whoever named it, Podman with a cgroup of conmon's.
    for left in [
        "/sys/fs/cgroup/made-parent/conmon",
        "/sys/fs/cgroup/made-parent",
    ] {
        let _ = std::fs::remove_dir(left);
    }
    Ok(())
}

fn namespaces_of_the_host(engine: &Engine) -> Result<()> {
    for kind in ["--pid=host", "--ipc=host", "--uts=host"] {
        let output = engine.run(&[kind, IMAGE, "echo", "ok"])?;
        if engine.bulkhead() {
            let namespace = kind.trim_start_matches('-').trim_end_matches("=host");
            let why = output.fails()?;
            ensure!(
                why.contains(&format!("host's own {namespace} namespace")),
                "{why}"
            );
        } else {
            output.ok()?;
        }
    }
    Ok(())
}

fn umask(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--umask", "0077"],
            "umask; touch /root/x; stat -c %a /root/x",
        )?
        .ok()?
        .says(&["0077\n600\n"])?;
    Ok(())
}

fn personality(engine: &Engine) -> Result<()> {
    engine
        .run(&["--personality", "LINUX32", IMAGE, "uname", "-m"])?
        .ok()?
        .says(&["i686"])?;
    Ok(())
}

fn systemd_mode(engine: &Engine) -> Result<()> {
    let output = engine.script(&["--systemd", "always"], "cat /proc/mounts; touch /run/x /tmp/x /run/lock/x && echo writable; mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x && echo delegated; echo $container")?;
    output
        .ok()?
        .says(&[" /run ", " /tmp ", "writable", "delegated", "podman"])?;
    Ok(())
}

fn passwd_entry(engine: &Engine) -> Result<()> {
    // Podman writes an entry for a user that the image does not know.
    engine
        .script(&["--user", "4321"], "grep 4321 /etc/passwd; whoami; id -u")?
        .ok()?
        .says(&["4321"])?;
    Ok(())
}

fn rootfs(engine: &Engine) -> Result<()> {
    let root = engine.path("root");
    std::fs::create_dir_all(format!("{root}/bin"))?;
    std::fs::copy("/bin/busybox", format!("{root}/bin/busybox"))?;
    engine
        .run(&[
            "--rootfs",
            &root,
            "/bin/busybox",
            "echo",
            "from a directory",
        ])?
        .ok()?
        .says(&["from a directory"])?;
    Ok(())
}

fn timeout(engine: &Engine) -> Result<()> {
    let output = engine.run(&["--timeout", "2", IMAGE, "sleep", "1000"])?;
    ensure!(output.code() == 255 || output.code() == 137, "{output}");
    Ok(())
}
