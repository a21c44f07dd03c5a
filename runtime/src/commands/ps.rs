//! `ps`: the processes of a container, as the guest's kernel sees them.

use bulkhead_agent_protocol::messages::{ContainerRequest, ListProcessesResponse, Process};

use super::{CALL_LIMIT, Context, Error, print, require};
use crate::{
    agent,
    cli::{Format, Ps},
    state::ContainerStatus::{Created, Paused, Running},
    wait::Deadline,
};

pub(super) fn ps(context: &Context, options: &Ps) -> Result<u8, Error> {
    if !options.options.is_empty() {
        tracing::warn!("options of ps are ignored: {}", options.options.join(" "));
    }
    let container = context.root.open(&options.id)?;
    let status = container.record()?.current_status();
    require(
        &container,
        status,
        &[Created, Running, Paused],
        "container not running",
    )?;
    let deadline = Deadline::after(CALL_LIMIT);
    let mut rpc = agent::connect(&container, deadline)?;
    let request = ContainerRequest {
        container_id: options.id.clone(),
        ..Default::default()
    };
    let response: ListProcessesResponse =
        agent::call(&mut rpc, "ListProcesses", &request, deadline)?;
    print(&match options.format {
        Format::Table => show(&response.processes),
        Format::Json => {
            let pids: Vec<_> = response
                .processes
                .iter()
                .map(|process| process.pid)
                .collect();
            format!("{}\n", serde_json::json!(pids))
        }
    })?;
    Ok(0)
}

/// The columns of `ps -ef`.
fn show(processes: &[Process]) -> String {
    let mut text = "UID          PID    PPID  C STIME TTY          TIME CMD\n".to_owned();
    for process in processes {
        let seconds = process.cpu_time_us / 1_000_000;
        let terminal = match process.terminal.as_str() {
            "" => "?".to_owned(),
            terminal => plain(terminal),
        };
        text.push_str(&format!(
            "{:<8} {:>7} {:>7}  0 {} {:<8} {:02}:{:02}:{:02} {}\n",
            process.uid,
            process.pid,
            process.parent_pid,
            crate::time::hour_and_minute(process.start_time),
            terminal,
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            plain(&process.command),
        ));
    }
    text
}

/// What the guest says is shown on a terminal: no control characters of its choice.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_like_ps() {
        let process = Process {
            pid: 7,
            parent_pid: 1,
            start_time: 1_700_000_000,
            cpu_time_us: 3_661_000_000,
            command: "sh -c \u{1b}[2J".to_owned(),
            ..Default::default()
        };
        let text = show(&[process]);
        let line = text.lines().nth(1).unwrap();
        assert_eq!(
            line,
            "0              7       1  0 22:13 ?        01:01:01 sh -c ?[2J"
        );
    }
}
