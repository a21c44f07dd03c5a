//! Capabilities, seccomp, masked paths, no_new_privs, user namespaces.

use anyhow::{Result, ensure};

use crate::engines::engine::Engine;

super::engine_cases!(security;
    [both quick] capabilities;
    [both] no_new_privileges, seccomp, own_seccomp_profile, masked_paths;
    [podman quick] user_namespace;
    [podman] unmask, user_namespace_auto, user_namespace_keeps_files);

fn capabilities(engine: &Engine) -> Result<()> {
    let show = "grep -E 'CapEff|CapBnd' /proc/self/status";
    engine
        .script(&["--cap-drop", "ALL"], show)?
        .ok()?
        .says(&["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"])?;
    engine
        .script(&["--cap-drop", "ALL", "--cap-add", "CHOWN"], show)?
        .ok()?
        .says(&["CapEff:\t0000000000000001"])?;
    engine
        .script(
            &["--cap-drop", "CHOWN"],
            "chown user /tmp 2>&1 || echo denied",
        )?
        .ok()?
        .says(&["denied"])?;
    // An ordinary user has none in effect.
    engine
        .script(&["--user", "user"], show)?
        .ok()?
        .says(&["CapEff:\t0000000000000000"])?;
    Ok(())
}

fn no_new_privileges(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--security-opt", "no-new-privileges"],
            "grep NoNewPrivs /proc/self/status",
        )?
        .ok()?
        .says(&["NoNewPrivs:\t1"])?;
    Ok(())
}

fn seccomp(engine: &Engine) -> Result<()> {
    let show = "grep Seccomp: /proc/self/status";
    engine.script(&[], show)?.ok()?.says(&["Seccomp:\t2"])?;
    engine
        .script(&["--security-opt", "seccomp=unconfined"], show)?
        .ok()?
        .says(&["Seccomp:\t0"])?;
    Ok(())
}

fn own_seccomp_profile(engine: &Engine) -> Result<()> {
    let file = engine.path("profile.json");
    let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}"#;
    std::fs::write(&file, profile)?;
    let output = engine
        .script(&["--security-opt", &format!("seccomp={file}")], "mkdir /x")?
        .expect(1)?;
    ensure!(output.errors().contains("not supported"), "{output}");
    Ok(())
}

fn masked_paths(engine: &Engine) -> Result<()> {
    let script = "wc -c </proc/timer_list; ls /sys/firmware | wc -l; echo x >/proc/sys/kernel/hostname || echo read-only";
    engine
        .script(&[], script)?
        .ok()?
        .says(&["0\n0\n", "read-only"])?;
    Ok(())
}

fn unmask(engine: &Engine) -> Result<()> {
    let options = [
        "--security-opt",
        "mask=/proc/meminfo",
        "--security-opt",
        "unmask=/proc/keys",
    ];
    let output = engine
        .script(
            &options,
            "wc -c </proc/meminfo; [ -r /proc/keys ] && grep keys /proc/mounts; true",
        )?
        .ok()?;
    ensure!(output.text() == "0\n", "{output}");
    Ok(())
}

fn user_namespace(engine: &Engine) -> Result<()> {
    // Nobody but a root may write to `/`, whose mode Podman makes 555.
    let script = "cat /proc/self/uid_map; id -u; touch /x /root/x && stat -c %u /root/x; chown 999 /root/x && stat -c %u /root/x";
    let output = engine
        .script(&["--uidmap", "0:100000:1000"], script)?
        .ok()?;
    let words: Vec<_> = output
        .stdout
        .split(|byte| byte.is_ascii_whitespace())
        .filter(|word| !word.is_empty())
        .collect();
    ensure!(
        words == [&b"0"[..], b"100000", b"1000", b"0", b"0", b"999"],
        "{output}"
    );
    Ok(())
}

fn user_namespace_auto(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--userns", "auto:size=2000"],
            "cat /proc/self/uid_map; touch /root/x",
        )?
        .ok()?
        .says(&["2000"])?;
    Ok(())
}

fn user_namespace_keeps_files(engine: &Engine) -> Result<()> {
    let directory = engine.path("data");
    std::fs::create_dir(&directory)?;
    // :U gives the volume to the container's root.
    let volume = format!("{directory}:/data:U");
    engine
        .script(
            &["--uidmap", "0:100000:1000", "--volume", &volume],
            "touch /data/x; stat -c %u /data /data/x",
        )?
        .ok()?
        .says(&["0\n0\n"])?;
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("{directory}/x"))?);
    ensure!(owner == 100_000, "on the host the file belongs to {owner}");
    Ok(())
}
