//! A file that is written to while others look at it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, stdin};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail, ensure};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Pages written before anybody asks.
const PAGES: usize = 64;
/// Bytes that the file has at most in [`random`].
const MOST: usize = 256 << 10;
/// Steps there.
const STEPS: usize = 3000;

/// The content of so many pages.
pub(crate) fn pages(count: usize) -> Vec<u8> {
    (0..count * PAGE)
        .map(|at| (at / PAGE * 7 + at % 251).to_le_bytes()[0])
        .collect()
}

/// Writes pages, says so, and does what it is told, a line each.
pub(super) fn obey(path: &Path) -> Result<()> {
    let content = pages(2 * PAGES);
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut written = 0;
    let mut write = |until: usize| -> Result<()> {
        for page in written..until {
            let at = page * PAGE;
            file.write_all_at(&content[at..at + PAGE], at as u64)?;
        }
        written = until;
        println!("{until} pages");
        Ok(())
    };
    write(PAGES)?;
    for line in stdin().lock().lines() {
        match line?.as_str() {
            "more" => write(2 * PAGES)?,
            "first" => println!("{}", fs::read(path)?[0]),
            other => {
                let same = fs::read(other)? == content[..PAGES * PAGE];
                println!("{}", if same { "the same" } else { "another" });
            }
        }
    }
    Ok(())
}

/// Does this and that with a file, and knows all the time what must be in it. Leaves it there, and prints
/// its digest.
pub(super) fn random(path: &Path, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model: Vec<u8> = Vec::new();
    let open = |write_only: bool| -> Result<File> {
        let mut options = OpenOptions::new();
        Ok(options
            .read(!write_only)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?)
    };
    // Nobody else has it then: it is the guest's from the beginning.
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create_new(true).open(path)?;
    let mut readable = true;
    for step in 0..STEPS {
        match random.u32(..100) {
            // Mostly one after the other, as files are written.
            0..60 => {
                let at = if random.bool() {
                    model.len()
                } else {
                    random.usize(..=model.len().min(MOST - 1))
                };
                let length = random.usize(1..=8 << 10).min(MOST.saturating_sub(at));
                let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
                file.write_all_at(&bytes, at as u64)?;
                model.resize(model.len().max(at + length), 0);
                model[at..at + length].copy_from_slice(&bytes);
            }
            60..80 if readable && !model.is_empty() => {
                let at = random.usize(..model.len());
                let mut bytes = vec![0; random.usize(1..=16 << 10).min(model.len() - at)];
                file.read_exact_at(&mut bytes, at as u64)?;
                ensure!(
                    bytes == model[at..at + bytes.len()],
                    "step {step}: read at {at}"
                );
            }
            80..84 => {
                let length = random.usize(..=MOST);
                file.set_len(length as u64)?;
                model.resize(length, 0);
            }
            84..88 => file.sync_data()?,
            88..94 => {
                let size = file.metadata()?.len();
                ensure!(size == model.len() as u64, "step {step}: size {size}");
            }
            94..96 => {
                readable = random.bool();
                drop(file);
                file = open(!readable)?;
            }
            96..98 => {
                let found = fs::read(path)?;
                ensure!(found == model, "step {step}: the whole");
            }
            98 => {
                let next = path.with_extension("renamed");
                fs::rename(path, &next)?;
                fs::rename(next, path)?;
            }
            _ => {}
        }
    }
    let size = file.metadata()?.len();
    if size != model.len() as u64 {
        bail!("size {size} in the end");
    }
    drop(file);
    ensure!(fs::read(path)? == model, "the whole in the end");
    println!("{:016x}", digest(&model));
    Ok(())
}

/// FNV-1a.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
