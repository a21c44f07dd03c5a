//! The program `bulkhead`.

use std::process::ExitCode;

use bulkhead::{cli::Cli, commands, error, log, timeline::Moment};
use clap::{Parser, error::ErrorKind};

fn main() -> ExitCode {
    let began = Moment::now();
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
    let to_file = cli.global.log.is_some();
    if let Err(failure) = log::begin(
        cli.global.log.as_deref(),
        cli.global.log_format,
        cli.global.debug,
    ) {
        let path = cli.global.log.unwrap_or_default();
        eprintln!("cannot open the log {}: {failure}", path.display());
        return ExitCode::from(error::FAILURE);
    }
    match commands::run(cli, began) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            error::print(&failure, to_file);
            ExitCode::from(error::exit_code(&failure))
        }
    }
}
