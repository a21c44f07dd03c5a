//! The program `bulkhead`.

use std::process::ExitCode;

use bulkhead::{
    cgroup::out_of_memory,
    cli::{Cli, Command},
    commands,
    config::{Config, ConfigError},
    error, log,
    monitor::stand_in,
    timeline::Moment,
};
use clap::{Parser, error::ErrorKind};

fn main() -> ExitCode {
    let began = Moment::now();
    if stand_in::is_called() {
        return stand_in::stand();
    }
    if out_of_memory::is_called(std::env::args_os()) {
        return out_of_memory::take_memory();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => {
            // A reader that is gone needs no usage.
            let _ = refusal.print();
            let asked = matches!(
                refusal.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return ExitCode::from(if asked { 0 } else { error::FAILURE });
        }
    };
    let (cli, config) = match settings(cli) {
        Ok(settings) => settings,
        Err(failure) => {
            eprintln!("{}", error::chain(&failure));
            return ExitCode::from(error::FAILURE);
        }
    };
    let global = &cli.global;
    let to_file = global.log.is_some();
    if let Err(failure) = log::begin(
        global.log.as_deref(),
        global.log_format.unwrap_or_default(),
        global.debug,
    ) {
        let path = cli.global.log.unwrap_or_default();
        eprintln!("cannot open the log {}: {failure}", path.display());
        return ExitCode::from(error::FAILURE);
    }
    match commands::run(cli, config, began) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            error::print(&failure, to_file);
            ExitCode::from(error::exit_code(&failure))
        }
    }
}

/// The configuration file, and the command line completed by it.
fn settings(mut cli: Cli) -> Result<(Cli, Config), ConfigError> {
    // A monitor is told all that it needs.
    let config = if matches!(cli.command, Command::Monitor) {
        Config::default()
    } else {
        match Config::load(cli.global.config.as_deref()) {
            // What ends or shows containers works whatever was written there since they were made.
            Err(error) if !cli.command.makes() => {
                eprintln!(
                    "warning: the configuration is not used: {}",
                    error::chain(&error)
                );
                Config::default()
            }
            config => config?,
        }
    };
    let global = &mut cli.global;
    global.debug |= config.log.debug;
    global.log_format = global.log_format.or(Some(config.log.format));
    global.log = global.log.take().or_else(|| config.log.file.clone());
    let rule = config.unknown_properties;
    global.unknown_properties = global.unknown_properties.or(Some(rule));
    Ok((cli, config))
}
