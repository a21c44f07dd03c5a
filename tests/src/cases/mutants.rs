//! Hundreds of hostile configurations, always the same: each ends in success or in one line that
//! says why not, and leaves nothing behind.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::Case;
use super::bad_input::DEBUG_WORDS;
use crate::bundle::Bundle;
use crate::mutation::{Mutant, mutate};
use crate::process::Output;
use crate::scene::Scene;

/// How many there are.
const MUTANTS: u64 = 550;
/// So many at a time keep one test well within its time.
const BATCH: u64 = 25;

pub(crate) fn cases() -> Vec<Case> {
    let batches = (0..MUTANTS / BATCH).map(|batch| {
        let first = batch * BATCH;
        Case {
            name: format!("mutants::from_{first:03}"),
            vm: true,
            run: Box::new(move |scene| survive(scene, first..first + BATCH)),
        }
    });
    batches.collect()
}

fn survive(scene: &Scene, seeds: Range<u64>) -> Result<()> {
    let bundle = rich_bundle(scene)?;
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == "ran\n", "the good one: {output}");
    for seed in seeds {
        let mutant = mutate(&bundle.spec, seed);
        fs::write(bundle.path.join("config.json"), &mutant.bytes)?;
        let told = || format!("mutant {seed} ({})", mutant.story);
        let output = scene.run_as_it_is(&bundle).with_context(told)?;
        judge(&mutant, &output).with_context(told)?;
        scene.expect_nothing_left().with_context(told)?;
    }
    Ok(())
}

/// Success, the failure of a container's own process, or one line of the runtime's.
fn judge(mutant: &Mutant, output: &Output) -> Result<()> {
    let errors = output.errors();
    let told: Vec<_> = errors
        .lines()
        .filter(|line| line.starts_with("time=") && line.contains(" level=error "))
        .collect();
    match (output.code(), told.as_slice()) {
        (0, []) => return Ok(()),
        // A process that was made to fail says so itself, or was ended by a signal.
        (code, []) if code >= 128 || mutant.story.contains("/process/") => return Ok(()),
        (0, _) => bail!("an error, and yet success: {output}"),
        (_, [_]) => {}
        (_, []) => bail!("failed without a word: {output}"),
        _ => bail!("more than one error: {output}"),
    }
    for word in DEBUG_WORDS {
        ensure!(
            !told[0].contains(word),
            "{word:?} is for programmers: {output}"
        );
    }
    for crash in ["by itself", "was lost", "panic", "internal error"] {
        ensure!(!told[0].contains(crash), "something broke: {output}");
    }
    Ok(())
}

/// A bundle that uses much of what a configuration can say, and whose process says "ran".
fn rich_bundle(scene: &Scene) -> Result<Bundle> {
    let volume = scene.path("volume");
    fs::create_dir_all(&volume)?;
    let bundle = scene
        .bundle()?
        .shell("echo ran")
        .bind(&volume, "/var/data", &["rbind", "rw", "nosuid"])
        .mount(json!({
            "destination": "/scratch/deep", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "size=1m", "mode=1777"],
        }))
        .with(|spec| {
            let process = &mut spec["process"];
            process["user"] = json!({
                "uid": 1000, "gid": 1001, "umask": 18, "additionalGids": [2002, 2003],
            });
            process["oomScoreAdj"] = json!(100);
            process["rlimits"] = json!([
                { "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512 },
                { "type": "RLIMIT_CORE", "hard": 0, "soft": 0 },
            ]);
            spec["domainname"] = json!("example.org");
            spec["annotations"] = json!({ "org.example.key": "value" });
            spec["hooks"] = json!({
                "prestart": [{ "path": "/bin/true", "args": ["true"], "timeout": 10 }],
                "poststop": [{ "path": "/bin/true", "env": ["A=b"] }],
            });
            let linux = &mut spec["linux"];
            linux["rootfsPropagation"] = json!("private");
            linux["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel.shmmax": "65536" });
            linux["devices"] = json!([{
                "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
                "fileMode": 438, "uid": 0, "gid": 0,
            }]);
            linux["resources"] = json!({
                "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
                ],
                "memory": { "limit": 67_108_864, "reservation": 33_554_432, "swap": 67_108_864 },
                "cpu": { "shares": 512, "quota": 50000, "period": 100_000, "cpus": "0" },
                "pids": { "limit": 64 },
                "unified": { "memory.high": "60000000" },
            });
            linux["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [
                    { "names": ["swapon", "reboot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
                    { "names": ["personality"], "action": "SCMP_ACT_ERRNO",
                      "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                ],
            });
        });
    for (link, target) in [("to-root", "/"), ("to-host", "../../.."), ("loop", "loop")] {
        symlink(target, bundle.rootfs().join(link))?;
    }
    Ok(bundle)
}
