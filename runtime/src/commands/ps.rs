//! `ps`: the processes of a container, as the guest's kernel sees them. There is no ps(1) to be run
//! in a guest, so those of its options that choose columns are understood here.

use bulkhead_agent_protocol::messages::{ContainerRequest, ListProcessesResponse, Process};

use super::{Context, Error, ask, living, print};
use crate::cli::{Format, Ps};

pub(super) fn ps(context: &Context, options: &Ps) -> Result<u8, Error> {
    let columns = columns(&options.options)?;
    let (container, _) = living(context, &options.id)?;
    let request = ContainerRequest {
        container_id: options.id.clone(),
        ..Default::default()
    };
    let response: ListProcessesResponse = ask(&container, "ListProcesses", &request)?;
    let processes = &response.processes;
    print(&match options.format {
        Format::Table => show(&columns, processes),
        Format::Json => {
            let pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
            format!("{}\n", serde_json::json!(pids))
        }
    })?;
    Ok(0)
}

/// A column of the output.
#[derive(Debug)]
struct Column {
    header: String,
    /// The least width; below zero: to the left.
    width: isize,
    value: fn(&Process) -> String,
}

impl Column {
    /// A column by its name in ps(1), "STANDARD FORMAT SPECIFIERS".
    fn named(name: &str) -> Option<Self> {
        let (header, width, value): (&str, isize, fn(&Process) -> String) = match name {
            "uid" | "euid" => ("UID", -8, |process| process.uid.to_string()),
            "user" | "euser" | "uname" => ("USER", -8, |process| process.uid.to_string()),
            "pid" | "tgid" => ("PID", 7, |process| process.pid.to_string()),
            "ppid" => ("PPID", 7, |process| process.parent_pid.to_string()),
            "c" => ("C", 2, |_| "0".to_owned()),
            "stime" | "start" | "start_time" => ("STIME", -5, |process| {
                crate::time::hour_and_minute(process.start_time)
            }),
            "tty" | "tt" | "tname" => ("TTY", -8, |process| match process.terminal.as_str() {
                "" => "?".to_owned(),
                terminal => plain(terminal),
            }),
            "time" | "cputime" => ("TIME", 8, |process| {
                let seconds = process.cpu_time_us / 1_000_000;
                let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
                format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
            }),
            "cmd" | "args" | "command" => ("CMD", -1, |process| plain(&process.command)),
            _ => return None,
        };
        Some(Self {
            header: header.to_owned(),
            width,
            value,
        })
    }

    fn pad(&self, text: &str) -> String {
        let width = self.width.unsigned_abs();
        if self.width > 0 {
            format!("{text:>width$}")
        } else {
            format!("{text:<width$}")
        }
    }
}

/// What ps(1)'s options choose; `-ef` is runc's default.
fn columns(options: &[String]) -> Result<Vec<Column>, Error> {
    let mut lists = Vec::new();
    let mut options = options.iter().filter(|option| *option != "--");
    while let Some(option) = options.next() {
        let wrong = || {
            Error::Usage(format!(
                "ps: {option:?} is not supported for the processes of a guest: -e, -f and -o with \
                 the columns uid, user, pid, ppid, c, stime, tty, time and cmd are"
            ))
        };
        let letters = option.strip_prefix('-').ok_or_else(wrong)?;
        match letters.split_once('o') {
            Some((before, list)) if before.chars().all(|c| "eAf".contains(c)) => {
                let list = if list.is_empty() {
                    options.next().ok_or_else(wrong)?
                } else {
                    list
                };
                lists.push(list.to_owned());
            }
            None if !letters.is_empty() && letters.chars().all(|c| "eAf".contains(c)) => {}
            _ => return Err(wrong()),
        }
    }
    if lists.is_empty() {
        lists.push("uid,pid,ppid,c,stime,tty,time,cmd".to_owned());
    }
    let names = lists
        .iter()
        .flat_map(|list| list.split([',', ' ']))
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let (name, header) = match name.split_once('=') {
                Some((name, header)) => (name, Some(header)),
                None => (name, None),
            };
            let mut column = Column::named(name).ok_or_else(|| {
                Error::Usage(format!("ps: the column {name:?} is not known of guests"))
            })?;
            if let Some(header) = header {
                column.header = header.to_owned();
            }
            Ok(column)
        })
        .collect()
}

fn show(columns: &[Column], processes: &[Process]) -> String {
    let line = |cells: Vec<String>| format!("{}\n", cells.join(" ").trim_end());
    let header = columns
        .iter()
        .map(|column| column.pad(&column.header))
        .collect();
    let rows = processes.iter().map(|process| {
        line(
            columns
                .iter()
                .map(|column| column.pad(&(column.value)(process)))
                .collect(),
        )
    });
    std::iter::once(line(header)).chain(rows).collect()
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

    fn table(options: &[&str]) -> Result<String, Error> {
        let process = Process {
            pid: 7,
            parent_pid: 1,
            start_time: 1_700_000_000,
            cpu_time_us: 3_661_000_000,
            command: "sh -c \u{1b}[2J".to_owned(),
            ..Default::default()
        };
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        Ok(show(&columns(&options)?, &[process]))
    }

    #[test]
    fn lines_like_ps() {
        for options in [&[][..], &["-ef"], &["--", "-e", "-f"]] {
            assert_eq!(
                table(options).unwrap(),
                "UID          PID    PPID  C STIME TTY          TIME CMD\n\
                 0              7       1  0 22:13 ?        01:01:01 sh -c ?[2J\n"
            );
        }
    }

    #[test]
    fn columns_can_be_chosen() {
        for options in [
            &["-o", "pid,cmd=COMMAND"][..],
            &["-eopid,cmd=COMMAND"],
            &["-o", "pid", "-e", "-o", "cmd=COMMAND"],
        ] {
            assert_eq!(
                table(options).unwrap(),
                "    PID COMMAND\n      7 sh -c ?[2J\n"
            );
        }
        for options in [&["aux"][..], &["-o"], &["-o", "pid,rss"], &["-x"], &["-"]] {
            assert!(table(options).is_err(), "{options:?}");
        }
    }
}
