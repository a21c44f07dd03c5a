//! `bulkhead-pages DIR`: writes what is made from the program's own definitions, so that it cannot
//! differ from them: a man page for each command, the page of the configuration file, and the
//! completions of bash, zsh and fish.

mod config_page;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use bulkhead::cli::Cli;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: bulkhead-pages DIR");
        return ExitCode::from(2);
    };
    match write_all(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-pages: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes `man/` and `completions/` below the directory.
fn write_all(directory: &Path) -> Result<()> {
    let man = directory.join("man");
    let completions = directory.join("completions");
    for directory in [&man, &completions] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command_pages(&command, &man)?;
    write(&man.join("bulkhead-config.toml.5"), &config_page::page())?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "bulkhead", &completions)
            .with_context(|| format!("cannot write the completions for {shell}"))?;
    }
    Ok(())
}

/// The page of a command and those of its subcommands.
fn command_pages(command: &Command, directory: &Path) -> Result<()> {
    let subcommands = || command.get_subcommands().filter(|one| !one.is_hide_set());
    for subcommand in subcommands() {
        command_pages(subcommand, directory)?;
    }
    let page = Man::new(command.clone())
        .source(concat!("bulkhead ", env!("CARGO_PKG_VERSION")))
        .manual("Bulkhead");
    let mut text = Vec::new();
    page.render(&mut text).context("cannot render a page")?;
    further_sections(subcommands().next().is_some(), &mut text)?;
    let text = String::from_utf8(text).context("a page is not UTF-8")?;
    write(&directory.join(page.get_filename()), &text)
}

/// What the command line's definition does not hold.
fn further_sections(is_program: bool, text: &mut Vec<u8>) -> Result<()> {
    let mut roff = Roff::new();
    if is_program {
        roff.control("SH", ["EXIT STATUS"]);
        roff.text(vec![roman(
            "run and exec end with the status of the container's process, 128 + N if signal N \
             ended it, 126 and 127 if its program cannot be executed or is not there. Other \
             commands end with 0, or with 1 and one line on standard error that says what failed, \
             on what, why, and what to do.",
        )]);
        roff.control("SH", ["FILES"]);
        for (path, meaning) in [
            (
                "/etc/bulkhead/config.toml",
                "The configuration file, bulkhead-config.toml(5). It need not exist.",
            ),
            (
                "/run/bulkhead",
                "The state of containers, unless --root names another directory.",
            ),
            (
                "../share/bulkhead/{vmlinux,rootfs.erofs}, ./bulkhead-vmm",
                "The guest's kernel and root image and the virtual machine monitor, relative to \
                 the program's directory, unless options or the configuration file name others.",
            ),
        ] {
            roff.control("TP", []);
            roff.text(vec![bold(path)]);
            roff.text(vec![roman(meaning)]);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text(vec![
        if is_program {
            bold("bulkhead-vmm")
        } else {
            bold("bulkhead")
        },
        roman(if is_program { "(8), " } else { "(1), " }),
        bold("bulkhead-config.toml"),
        roman("(5)"),
    ]);
    roff.to_writer(text).context("cannot render a page")
}

fn write(path: &Path, text: &str) -> Result<()> {
    let written = fs::File::create(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_is_completed() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let read = |path: &str| fs::read_to_string(directory.path().join(path)).unwrap();
        let bash = read("completions/bulkhead.bash");
        let fish = read("completions/bulkhead.fish");
        let zsh = read("completions/_bulkhead");
        for command in ["create", "exec", "update", "check", "features"] {
            let page = read(&format!("man/bulkhead-{command}.1"));
            assert!(page.contains(".SH OPTIONS"), "{page}");
            assert!(page.contains(".SH \"SEE ALSO\""), "{page}");
            for completions in [&bash, &fish, &zsh] {
                assert!(completions.contains(command), "{command}");
            }
        }
        assert!(read("man/bulkhead.1").contains(".SH \"EXIT STATUS\""));
        // Hidden commands are for the program itself.
        assert!(!directory.path().join("man/bulkhead-monitor.1").exists());
    }
}
