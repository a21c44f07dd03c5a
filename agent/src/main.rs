//! The program that the guest kernel starts as init.

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let started = bulkhead_agent::guest::monotonic_us();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(bulkhead_agent::guest::log_level())
        .without_time()
        .with_ansi(false)
        .init();
    // One thread, for the whole life of the process: it forks and goes on in ordinary code.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the runtime of the agent")?;
    runtime
        .block_on(bulkhead_agent::guest::run(started))
        .context("the agent ends, and the guest with it")
}
