//! The life of a container as runtime-spec "Lifecycle" and "State" describe it: the states, what
//! can happen in each, and nothing of how it is stored.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a container is in its life (runtime-spec, "State"; `paused` is runc's addition).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerStatus {
    /// Its sandbox is being made.
    Creating,
    /// Everything is there but its process has not been let run.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process has ended; only its directory is left.
    Stopped,
}

/// What can happen to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent has set the container up.
    Created,
    /// The process was let run.
    Started,
    /// The processes were frozen.
    Paused,
    /// The processes were thawed.
    Resumed,
    /// The process, the monitor or the VM ended.
    Ended,
}

impl ContainerStatus {
    /// The state after `event`, or `None` where that cannot happen.
    pub fn next(self, event: Event) -> Option<Self> {
        use ContainerStatus::{Created, Creating, Paused, Running, Stopped};
        match (self, event) {
            (Creating, Event::Created) => Some(Created),
            (Created, Event::Started) => Some(Running),
            // runc pauses a created container, too; resuming makes it "running" there as here
            // only if it had been, which a second state would have to remember: so it is refused.
            (Running, Event::Paused) => Some(Paused),
            (Paused, Event::Resumed) => Some(Running),
            (_, Event::Ended) => Some(Stopped),
            _ => None,
        }
    }
}

impl fmt::Display for ContainerStatus {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_and_event() {
        use ContainerStatus::{Created, Creating, Paused, Running, Stopped};
        let events = [
            Event::Created,
            Event::Started,
            Event::Paused,
            Event::Resumed,
            Event::Ended,
        ];
        let table = [
            (Creating, [Some(Created), None, None, None, Some(Stopped)]),
            (Created, [None, Some(Running), None, None, Some(Stopped)]),
            (Running, [None, None, Some(Paused), None, Some(Stopped)]),
            (Paused, [None, None, None, Some(Running), Some(Stopped)]),
            (Stopped, [None, None, None, None, Some(Stopped)]),
        ];
        for (status, expected) in table {
            for (event, next) in events.into_iter().zip(expected) {
                assert_eq!(status.next(event), next, "{status} after {event:?}");
            }
        }
    }
}
