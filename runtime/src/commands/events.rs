//! `events`: what a container uses, again and again, and when the guest's kernel ends a process of
//! it for want of memory. One JSON object a line, in runc's shape.

mod stats;

use std::{io, time::Duration};

use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{ContainerRequest, StatsResponse, WaitOutOfMemoryRequest, WaitOutOfMemoryResponse},
};
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;
use serde_json::Value;

use super::{CALL_LIMIT, Context, Error, print};
use crate::{
    agent::{
        self,
        rpc::{CallId, RpcClient, RpcError},
    },
    cli::Events,
    state::{ContainerStatus, LiveProcess},
    wait::{Deadline, poll},
};

pub(super) fn events(context: &Context, options: &Events) -> Result<u8, Error> {
    let interval = parse_interval(&options.interval)?;
    let container = context.root.open(&options.id)?;
    let record = container.record()?;
    let status = record.current_status();
    let monitor = match record
        .monitor
        .filter(|_| status != ContainerStatus::Stopped)
    {
        Some(monitor) => monitor
            .open()
            .map_err(|error| Error::Io("open the monitor process", error))?,
        None => None,
    };
    let Some(monitor) = monitor else {
        return Err(Error::Status {
            id: options.id.clone(),
            status,
            wrong: "container not running",
        });
    };
    let deadline = Deadline::after(CALL_LIMIT);
    let mut rpc = agent::connect(&container, deadline)?;
    let request = of(&options.id);
    let first: StatsResponse = agent::call(&mut rpc, "Stats", &request, deadline)?;
    let shown = if options.stats {
        event("stats", &options.id, Some(stats::shape(&first))).and_then(|line| print(&line))
    } else {
        let stream = Stream {
            id: &options.id,
            seen: first.memory_oom_kills,
            rpc,
            monitor,
        };
        stream.run(interval)
    };
    match shown {
        // Whoever listened has heard enough.
        Err(Error::Io(_, error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        result => result.map(|()| 0),
    }
}

fn of(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

/// A line of output, its fields in runc's order.
#[derive(Serialize)]
struct Event<'a> {
    r#type: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn event(kind: &'static str, id: &str, data: Option<Value>) -> Result<String, Error> {
    let event = Event {
        r#type: kind,
        id,
        data,
    };
    let line =
        serde_json::to_string(&event).map_err(|error| Error::Io("show an event", error.into()))?;
    Ok(format!("{line}\n"))
}

struct Stream<'a> {
    id: &'a str,
    /// Kills that were told, or happened before we came.
    seen: u64,
    rpc: RpcClient,
    monitor: LiveProcess,
}

impl Stream<'_> {
    /// Until the container has ended.
    fn run(mut self, interval: Duration) -> Result<(), Error> {
        let mut kills = self.wait_for_kills()?;
        let mut asked: Option<CallId> = None;
        let mut tick = Deadline::after(interval);
        loop {
            loop {
                match self.rpc.progress() {
                    Ok(None) => break,
                    Ok(Some((call, answer))) if call == kills => {
                        if self.out_of_memory(answer)? {
                            return Ok(());
                        }
                        kills = self.wait_for_kills()?;
                    }
                    Ok(Some((call, answer))) if Some(call) == asked => {
                        asked = None;
                        let stats = agent::decode("Stats", &answer?)?;
                        print(&event("stats", self.id, Some(stats::shape(&stats)))?)?;
                    }
                    Ok(Some(_)) => {}
                    // The machine has been switched off.
                    Err(RpcError::Closed) => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
            let mut descriptors = [
                agent::poll_fd(&self.rpc),
                PollFd::new(&self.monitor, PollFlags::IN),
            ];
            let ready = poll(&mut descriptors, Some(tick))
                .map_err(|error| Error::Io("wait for events", error))?;
            let [heard, ended] = descriptors.map(|fd| !fd.revents().is_empty());
            if ended && !heard {
                return Ok(());
            }
            if ready == 0 || tick.has_passed() {
                tick = Deadline::after(interval);
                // An agent that has not answered yet is not asked again.
                if asked.is_none() {
                    asked = Some(self.rpc.send("Stats", &of(self.id))?);
                }
            }
        }
    }

    fn wait_for_kills(&mut self) -> Result<CallId, Error> {
        let request = WaitOutOfMemoryRequest {
            container_id: self.id.to_owned(),
            seen: self.seen,
            ..Default::default()
        };
        Ok(self.rpc.send("WaitOutOfMemory", &request)?)
    }

    /// Tells of kills; true when the container has ended.
    fn out_of_memory(&mut self, answer: Result<Vec<u8>, RpcError>) -> Result<bool, Error> {
        let payload = match answer {
            Err(RpcError::Refused {
                kind: ErrorKind::NoSuchProcess,
                ..
            }) => return Ok(true),
            answer => answer?,
        };
        let answer: WaitOutOfMemoryResponse = agent::decode("WaitOutOfMemory", &payload)?;
        if answer.kills > self.seen {
            self.seen = answer.kills;
            print(&event("oom", self.id, None)?)?;
        }
        Ok(answer.gone)
    }
}

/// A duration in Go's form, as runc takes it: `5s`, `1m30s`, `500ms`.
fn parse_interval(text: &str) -> Result<Duration, Error> {
    let wrong = || {
        Error::Usage(format!(
            "--interval: {text:?} must be a duration above zero such as 5s, 500ms or 1m30s"
        ))
    };
    let mut rest = text;
    let mut sum = 0.0;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let units = [
            ("ms", 1e-3),
            ("us", 1e-6),
            ("µs", 1e-6),
            ("ns", 1e-9),
            ("h", 3600.0),
            ("m", 60.0),
            ("s", 1.0),
        ];
        let (unit, seconds) = units
            .into_iter()
            .find(|(unit, _)| after.starts_with(unit))
            .ok_or_else(wrong)?;
        sum += number.parse::<f64>().map_err(|_| wrong())? * seconds;
        rest = &after[unit.len()..];
    }
    Duration::try_from_secs_f64(sum)
        .ok()
        // A point in time that far ahead must exist.
        .filter(|duration| !duration.is_zero() && duration.as_secs() < 1 << 32)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        for (text, milliseconds) in [
            ("5s", 5000),
            ("500ms", 500),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("2000us", 2),
        ] {
            let interval = parse_interval(text).unwrap();
            assert_eq!(interval.as_millis(), milliseconds, "{text}");
        }
        for text in ["", "0s", "5", "s", "-5s", "5x", "1..5s", "99999999999h"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lines_have_runcs_shape() {
        assert_eq!(
            event("oom", "one", None).unwrap(),
            "{\"type\":\"oom\",\"id\":\"one\"}\n"
        );
    }
}
