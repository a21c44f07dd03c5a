//! A host that cannot run guests: no KVM, none that works, no guest files. The error is one line.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use crate::process::Output;
use crate::scene::Scene;

super::cases!(broken_host;
    common: ;
    vm: kvm_missing, kvm_unusable, kernel_missing, kernel_not_elf, root_image_missing);

/// Checks that it failed, in one line that holds this word.
fn one_line(output: &Output, word: &str) -> Result<()> {
    ensure!(output.code() != 0, "expected a refusal of {output}");
    ensure!(
        output.errors().contains(word),
        "the error does not name {word:?}: {output}"
    );
    ensure!(
        output.errors().trim_end().lines().count() == 1,
        "not one line: {output}"
    );
    Ok(())
}

/// Puts something else over a path of the host, in the test's own mount namespace, for a time.
fn covered(path: &Path, with: &Path, action: impl FnOnce() -> Result<()>) -> Result<()> {
    mount_bind(with, path).with_context(|| format!("covering {}", path.display()))?;
    let result = action();
    unmount(path, UnmountFlags::DETACH)?;
    result
}

fn kvm_missing(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    let devices = scene.path("dev");
    fs::create_dir(&devices)?;
    mount("tests", &devices, "tmpfs", MountFlags::empty(), None)?;
    for name in ["null", "zero", "urandom", "random", "full", "tty", "ptmx"] {
        fs::write(devices.join(name), "")?;
        mount_bind(Path::new("/dev").join(name), devices.join(name))?;
    }
    rustix::mount::mount_bind_recursive(&devices, "/dev")?;
    let result = (|| {
        ensure!(!Path::new("/dev/kvm").exists(), "/dev/kvm is still there");
        let output = scene.run(&bundle)?;
        ensure!(output.errors().contains("/dev/kvm"), "{output}");
        let check = scene.call(&["check"])?;
        ensure!(
            check.code() != 0,
            "`check` passes without /dev/kvm: {check}"
        );
        let text = format!("{}{}", check.text(), check.errors());
        ensure!(text.contains("/dev/kvm"), "{check}");
        one_line(&output, "/dev/kvm")
    })();
    unmount("/dev", UnmountFlags::DETACH)?;
    unmount(&devices, UnmountFlags::DETACH)?;
    result?;
    scene.expect_nothing_left()
}

fn kvm_unusable(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    for pretender in ["/dev/null", "/dev/zero"] {
        covered(Path::new("/dev/kvm"), Path::new(pretender), || {
            let output = scene.run(&bundle)?;
            one_line(&output, "/dev/kvm")?;
            let check = scene.call(&["check"])?;
            ensure!(
                check.code() != 0,
                "`check` passes with {pretender} as /dev/kvm: {check}"
            );
            Ok(())
        })?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}

/// Where the guest's files are: beside the program, as installed.
fn guest_file(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    let program = std::env::split_paths(&path)
        .map(|directory| directory.join("bulkhead"))
        .find(|program| program.is_file())
        .context("bulkhead is not on the PATH")?;
    let prefix = fs::canonicalize(program)?;
    let prefix = prefix.ancestors().nth(2).context("bulkhead lies in bin")?;
    let file = prefix.join("share/bulkhead").join(name);
    ensure!(file.is_file(), "{} is missing", file.display());
    Ok(file)
}

fn kernel_missing(scene: &Scene) -> Result<()> {
    missing_guest_file(scene, "vmlinux")
}

fn root_image_missing(scene: &Scene) -> Result<()> {
    missing_guest_file(scene, "rootfs.erofs")
}

/// All guest files but one are there.
fn missing_guest_file(scene: &Scene, name: &str) -> Result<()> {
    let file = guest_file(name)?;
    let directory = file.parent().context("it lies in a directory")?;
    let partial = scene.path("partial");
    fs::create_dir(&partial)?;
    for other in crate::leftovers::entries(directory)
        .iter()
        .filter(|other| *other != name)
    {
        symlink(scene.path("all").join(other), partial.join(other))?;
    }
    fs::create_dir(scene.path("all"))?;
    mount_bind(directory, scene.path("all"))?;
    // Or what covers the one would cover the other too.
    mount_change(scene.path("all"), MountPropagationFlags::PRIVATE)?;
    let bundle = scene.bundle()?;
    let result = covered(directory, &partial, || {
        let output = scene.run(&bundle)?;
        one_line(&output, name)
    });
    unmount(scene.path("all"), UnmountFlags::DETACH)?;
    result?;
    scene.expect_nothing_left()
}

fn kernel_not_elf(scene: &Scene) -> Result<()> {
    let kernel = guest_file("vmlinux")?;
    let whole = fs::read(&kernel)?;
    let truncated = whole[..whole.len().min(100_000)].to_vec();
    let mut wild = whole[..whole.len().min(1 << 20)].to_vec();
    // Program headers whose sizes and addresses are nonsense (ELF-64: at offset 64).
    for byte in wild.iter_mut().skip(64).take(400) {
        *byte = 0xff;
    }
    for (name, bytes) in [
        ("empty", Vec::new()),
        ("text", b"this is no kernel\n".repeat(100)),
        ("truncated", truncated),
        ("wild", wild),
    ] {
        let path = scene.path(name);
        fs::write(&path, &bytes)?;
        let bundle = scene.bundle()?;
        covered(&kernel, &path, || {
            let output = scene.run(&bundle)?;
            one_line(&output, "vmlinux").context(name)
        })?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}
