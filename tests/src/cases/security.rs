//! Capabilities, seccomp, no_new_privs, masked and read-only paths, devices.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::scene::Scene;

super::cases!(security;
    common: capability_sets, capabilities_effective, seccomp, no_new_privileges, paths,
        read_only_root, default_devices, devices, setuid;
    vm: );

fn capability_sets(scene: &Scene) -> Result<()> {
    // CHOWN is bit 0, DAC_OVERRIDE 1, KILL 5, NET_BIND_SERVICE 10.
    let bundle = scene
        .bundle()?
        .args(&["grep", "^Cap", "/proc/self/status"])
        .with(|spec| {
            spec["process"]["capabilities"] = json!({
                "bounding": ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
                "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
                "effective": ["CAP_CHOWN", "CAP_KILL"],
                "inheritable": ["CAP_KILL"],
                "ambient": ["CAP_KILL"],
            });
            spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        });
    // Not root: what is left after exec is the ambient set (capabilities(7)).
    let output = scene.run(&bundle)?.ok()?;
    output.says(&[
        "CapInh:\t0000000000000020",
        "CapPrm:\t0000000000000020",
        "CapEff:\t0000000000000020",
        "CapBnd:\t0000000000000423",
        "CapAmb:\t0000000000000020",
    ])?;
    let none = scene
        .bundle()?
        .args(&["grep", "^Cap", "/proc/self/status"])
        .with(|spec| {
            spec["process"]["capabilities"] = json!({ "bounding": [] });
        });
    let text = scene.run(&none)?.ok()?.text();
    ensure!(
        text.matches("\t0000000000000000").count() == 5,
        "capabilities of nobody: {text}"
    );
    Ok(())
}

fn capabilities_effective(scene: &Scene) -> Result<()> {
    let script = "chown 1000 /etc/passwd && echo chown; mount -t tmpfs x /tmp && echo mount; \
        mknod /tmp/null c 1 3 && echo mknod; hostname x && echo hostname; \
        date -s 2000-01-01 >/dev/null; chroot / true && echo chroot; echo end";
    let output = scene.run_script(script)?.ok()?;
    ensure!(
        output.text() == "end\n",
        "with KILL, NET_BIND_SERVICE and AUDIT_WRITE only: {output}"
    );
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        let some = json!(["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_MKNOD"]);
        spec["process"]["capabilities"] =
            json!({ "bounding": some, "effective": some, "permitted": some });
    });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(
        output.text().starts_with("chown\nmount\n"),
        "with CHOWN and SYS_ADMIN: {output}"
    );
    ensure!(
        output.errors().contains("can't set date"),
        "without SYS_TIME: {output}"
    );
    Ok(())
}

fn seccomp(scene: &Scene) -> Result<()> {
    let profile = |rules: Value| {
        move |spec: &mut Value| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": rules,
            });
        }
    };
    // ENOTTY (25) can come from nowhere else here; umask(2) with one argument value only.
    let rules = json!([
        { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 25 },
        { "names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO" },
        { "names": ["umask"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
          "args": [{ "index": 0, "value": 7, "op": "SCMP_CMP_EQ" }] },
        { "names": ["no_such_system_call"], "action": "SCMP_ACT_ERRNO" },
    ]);
    let script = "mkdir /tmp/x; chmod 700 /tmp; umask 0022; umask 0007; umask; \
        grep Seccomp: /proc/self/status";
    let output = scene
        .run(&scene.bundle()?.shell(script).with(profile(rules)))?
        .ok()?;
    let errors = output.errors();
    ensure!(
        errors.contains("Inappropriate ioctl") || errors.contains("Not a tty"),
        "mkdir: {output}"
    );
    ensure!(
        errors.contains("Operation not permitted"),
        "chmod: {output}"
    );
    ensure!(
        output.text().contains("0022\n"),
        "umask 7 should have been refused: {output}"
    );
    ensure!(output.text().contains("Seccomp:\t2"), "{output}");

    let kill = json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL" }]);
    let script = "mkdir /tmp/x; echo $?";
    let output = scene
        .run(&scene.bundle()?.shell(script).with(profile(kill)))?
        .ok()?;
    ensure!(output.text() == "159\n", "SIGSYS is 31: {output}");
    Ok(())
}

fn no_new_privileges(scene: &Scene) -> Result<()> {
    for (wanted, line) in [(true, "NoNewPrivs:\t1"), (false, "NoNewPrivs:\t0")] {
        let bundle = scene
            .bundle()?
            .args(&["grep", "NoNewPrivs", "/proc/self/status"]);
        let bundle = bundle.with(|spec| spec["process"]["noNewPrivileges"] = json!(wanted));
        scene.run(&bundle)?.ok()?.says(&[line])?;
    }
    Ok(())
}

fn paths(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    fs::create_dir(bundle.rootfs().join("hidden"))?;
    fs::write(bundle.rootfs().join("hidden/file"), "seen")?;
    fs::write(bundle.rootfs().join("hidden-file"), "seen")?;
    fs::create_dir(bundle.rootfs().join("fixed"))?;
    let script = "cat /hidden/file /hidden-file; ls /hidden; echo x >/hidden/new && echo wrote; \
        echo x >/fixed/new && echo wrote; echo 1 >/proc/sys/vm/swappiness && echo wrote; \
        cat /proc/kcore | head -c 1; cat /proc/keys; echo b >/proc/sysrq-trigger && echo wrote; \
        ls /sys/firmware; mkdir /sys/x && echo wrote; echo end";
    let bundle = bundle.shell(script).with(|spec| {
        for (list, path) in [
            ("maskedPaths", "/hidden"),
            ("maskedPaths", "/hidden-file"),
            ("readonlyPaths", "/fixed"),
        ] {
            if let Some(paths) = spec["linux"][list].as_array_mut() {
                paths.push(json!(path));
                paths.push(json!("/no/such/path"));
            }
        }
    });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(
        output.text() == "end\n",
        "masked or read-only paths: {output}"
    );
    Ok(())
}

fn read_only_root(scene: &Scene) -> Result<()> {
    let script = "touch /new && echo wrote; rm /etc/passwd && echo wrote; touch /dev/shm/x && \
        touch /data/x && echo volumes; mount -o remount,rw / && echo remounted; echo end";
    let data = scene.path("data");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .shell(script)
        .bind(&data, "/data", &["rbind", "rw"]);
    fs::create_dir(bundle.rootfs().join("data"))?;
    let bundle = bundle.with(|spec| spec["root"]["readonly"] = json!(true));
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == "volumes\nend\n", "{output}");
    ensure!(
        output.errors().contains("Read-only file system"),
        "{output}"
    );
    ensure!(
        !bundle.rootfs().join("new").exists(),
        "the host's directory was written to"
    );
    Ok(())
}

fn default_devices(scene: &Scene) -> Result<()> {
    let script = "for d in null zero full random urandom tty; do \
        stat -c '%n %F %t:%T %a' /dev/$d; done; for l in ptmx fd stdin stdout stderr; do readlink /dev/$l; done; echo x >/dev/null && head -c 2 /dev/zero | od -An -tx1; \
        echo x >/dev/full; head -c 4 /dev/urandom | wc -c; ls /dev";
    let output = scene.run_script(script)?.ok()?.says(&[
        "/dev/null character special file 1:3 666",
        "/dev/zero character special file 1:5 666",
        "/dev/full character special file 1:7 666",
        "/dev/random character special file 1:8 666",
        "/dev/urandom character special file 1:9 666",
        "/dev/tty character special file 5:0 666",
        "pts/ptmx\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n",
        " 00 00\n",
        "4\n",
    ])?;
    ensure!(
        output.errors().contains("No space left"),
        "/dev/full: {output}"
    );
    for host in ["vda", "kvm", "mem", "vsock", "hvc0"] {
        ensure!(
            !output.text().lines().any(|line| line == host),
            "/dev/{host}: {output}"
        );
    }
    Ok(())
}

fn devices(scene: &Scene) -> Result<()> {
    // /dev/mem's numbers under another name: the node may be made, the device may not be used.
    let script = "mknod /tmp/mem c 1 1; head -c 1 /tmp/mem; head -c 1 /dev/odd | wc -c; \
        stat -c '%t:%T %a %u:%g' /dev/odd; mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero | wc -c";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        let some = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        spec["process"]["capabilities"] =
            json!({ "bounding": some, "effective": some, "permitted": some });
        spec["linux"]["devices"] = json!([{
            "path": "/dev/odd", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640,
            "uid": 7, "gid": 8,
        }]);
        spec["linux"]["resources"]["devices"] = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm" },
        ]);
    });
    let output = scene.run(&bundle)?;
    ensure!(
        output.errors().contains("Operation not permitted"),
        "/dev/mem: {output}"
    );
    output.says(&["1\n1:5 640 7:8\n1\n"])?;
    Ok(())
}

/// A program of the root file system with the setuid bit gives its owner's rights, unless
/// no_new_privs is set.
fn setuid(scene: &Scene) -> Result<()> {
    for (no_new_privileges, uid) in [(false, "0\n"), (true, "1000\n")] {
        let bundle = scene
            .bundle()?
            .args(&["/bin/who-am-i", crate::runner::EFFECTIVE_USER])
            .with(|spec| {
                spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001 });
                spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            });
        // This program is static, and busybox lets go of such rights.
        let program = bundle.rootfs().join("bin/who-am-i");
        fs::copy("/proc/self/exe", &program)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755))?;
        let output = scene.run(&bundle)?.ok()?;
        ensure!(output.text() == uid, "{no_new_privileges}: {output}");
    }
    Ok(())
}
