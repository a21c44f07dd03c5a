//! Work on files of the host in a container: unpacking and removing a source tree, large reads and
//! writes one after the other, small ones anywhere. The data lies in memory on the host, so that what is
//! compared is the way there.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::scene::Scene;

use super::figures::Figures;
use super::{Options, finish, program};

pub(super) fn measure(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let data = scene.path("shared");
    fs::create_dir(&data)?;
    let bundle = scene
        .bundle()?
        .inside(&["load", "/data"])?
        .bind(&data, "/data", &["rbind"]);
    bundle.write()?;
    for round in 0..=options.runs {
        for runtime in &options.runtimes {
            let mut command = program(*runtime, scene);
            let id = scene.id();
            command
                .arg("run")
                .arg("--bundle")
                .arg(&bundle.path)
                .arg(&id);
            command.stdout(Stdio::piped());
            for line in String::from_utf8(finish(command)?)?.lines() {
                let (name, ms) = line.split_once(' ').context("a line without a figure")?;
                let ms = ms.parse().with_context(|| line.to_owned())?;
                if round > 0 {
                    figures.add(&format!("share_{name}"), *runtime, "ms", ms);
                }
            }
        }
    }
    Ok(())
}
