//! What the OCI `process` object and its neighbours ask for.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::scene::Scene;

super::cases!(process;
    common: user, environment, groups_without_names, domain_name, oom_score;
    vm: program_not_found);

fn user(scene: &Scene) -> Result<()> {
    let script = "id -u; id -g; id -G; umask; pwd; touch /tmp/mine && stat -c %a:%u:%g /tmp/mine; \
        touch /etc/not-mine || echo denied";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        spec["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [2002, 3003], "umask": 0o027 });
        spec["process"]["cwd"] = json!("/var/data");
    });
    std::fs::set_permissions(
        bundle.rootfs().join("tmp"),
        std::os::unix::fs::PermissionsExt::from_mode(0o1777),
    )?;
    let output = scene.run(&bundle)?;
    let text = output.text();
    let mut lines = text.lines();
    ensure!(
        lines.next() == Some("1000") && lines.next() == Some("1001"),
        "{output}"
    );
    let mut groups: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
    groups.sort_unstable();
    ensure!(groups == ["1001", "2002", "3003"], "groups: {output}");
    let rest: Vec<_> = lines.collect();
    ensure!(
        rest == ["0027", "/var/data", "640:1000:1001", "denied"],
        "{output}"
    );
    Ok(())
}

fn environment(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.args(&["env"]).with(|spec| {
        spec["process"]["env"] = json!([
            "PATH=/bin",
            "EMPTY=",
            "SPACES=a  b",
            "EQUALS=a=b",
            "UNICODE=grün ☂",
            "LINES=one\ntwo",
        ]);
    });
    let output = scene.run(&bundle)?.ok()?;
    output.says(&[
        "PATH=/bin\n",
        "EMPTY=\n",
        "SPACES=a  b\n",
        "EQUALS=a=b\n",
        "UNICODE=grün ☂\n",
        "LINES=one\ntwo\n",
    ])?;
    // A directory that does not exist is made, as runc and Docker's WORKDIR have it.
    let bundle = scene.bundle()?.args(&["pwd"]).with(|spec| {
        spec["process"]["cwd"] = json!("/made/on/the/way");
    });
    scene.run(&bundle)?.ok()?.says(&["/made/on/the/way\n"])?;
    Ok(())
}

fn groups_without_names(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("id -u; id -g; grep Groups /proc/self/status")
        .with(|spec| {
            spec["process"]["user"] = json!({ "uid": 54321, "gid": 54322 });
        });
    let text = scene.run(&bundle)?.ok()?.text();
    ensure!(text.starts_with("54321\n54322\nGroups:"), "{text}");
    ensure!(
        !text.contains(" 0 ") && !text.contains("\t0 "),
        "root's group is left: {text}"
    );
    Ok(())
}

fn domain_name(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("hostname; cat /proc/sys/kernel/hostname")
        .with(|spec| {
            spec["hostname"] = json!("a-rather-long-but-valid-name.example.org");
        });
    let name = "a-rather-long-but-valid-name.example.org\n";
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == name.repeat(2), "{output}");
    Ok(())
}

fn oom_score(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .args(&["cat", "/proc/self/oom_score_adj"])
        .with(|spec| {
            spec["process"]["oomScoreAdj"] = json!(321);
        });
    scene.run(&bundle)?.ok()?.says(&["321\n"])?;
    Ok(())
}

fn program_not_found(scene: &Scene) -> Result<()> {
    for (program, code) in [
        ("no-such-program", 127),
        ("/etc/passwd", 126),
        ("/etc", 126),
    ] {
        let output = scene.run(&scene.bundle()?.args(&[program]))?.expect(code)?;
        let errors = output.errors();
        ensure!(
            errors.contains(program),
            "the error should name {program}: {errors}"
        );
        ensure!(errors.trim_end().lines().count() == 1, "one line: {errors}");
        scene.expect_nothing_left()?;
    }
    Ok(())
}
