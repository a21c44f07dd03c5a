//! The program `bulkhead-vmm`: one microVM, told what to do over its standard input
//! ([`bulkhead_vmm::config`]). With `--probe` it says whether this host's KVM can run guests.
//!
//! `BULKHEAD_LOG` sets how much goes to standard error: `error` (the VM cannot go on), `warn` (the
//! default: something is wrong, the VM goes on), `info` (an operator's view of its life), `debug`
//! (for those who work on guests and drivers), `trace`, `off`.

use std::process::ExitCode;

use bulkhead_vmm::config::VmEvent;
use bulkhead_vmm::control::Control;
use bulkhead_vmm::failure::Chain;
use bulkhead_vmm::monitor::{self, End};
use bulkhead_vmm::owners::Owners;
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    let started = monitor::now_us();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => run(started),
        [argument] if argument == "--probe" => probe(),
        _ => {
            eprintln!("bulkhead-vmm: the only argument is --probe; bulkhead starts VMs without");
            ExitCode::from(2)
        }
    }
}

/// Says whether this host's KVM is usable, as a line of JSON.
fn probe() -> ExitCode {
    match serde_json::to_string(&bulkhead_vmm::probe::probe()) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bulkhead-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(started: u64) -> ExitCode {
    if let Err(error) = bulkhead_vmm::close_inherited() {
        eprintln!("bulkhead-vmm: close inherited files: {error}");
        return ExitCode::from(2);
    }
    start_log();
    let mut owners = match Control::from_stdin() {
        Ok(control) => Owners::new(control),
        Err(error) => {
            eprintln!("bulkhead-vmm: {}", Chain(&error));
            return ExitCode::from(2);
        }
    };
    let (event, code) = match monitor::run(&mut owners, started) {
        Ok(End::HandedOver | End::Stopped) => (None, 0),
        Ok(End::Exited) => (Some(VmEvent::Exited), 0),
        Err(error) => {
            let message = Chain(&error).to_string();
            tracing::error!("{message}");
            (Some(VmEvent::Failed { message }), 1)
        }
    };
    if let Some(event) = event {
        owners.announce(&event);
    }
    // At once, with all threads as they are: the guest is of no interest any more.
    std::process::exit(code)
}

fn start_log() {
    let level = std::env::var("BULKHEAD_LOG").ok();
    let level = level
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::WARN);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
