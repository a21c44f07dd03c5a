//! The phases of a container's life as `--timeline FILE` shows them, in microseconds from the
//! start of the runtime. The guest's own times come from the agent's greeting.

use std::{fs, io, path::Path};

use bulkhead_agent_protocol::Greeting;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// A moment: microseconds of CLOCK_MONOTONIC, which the VMM uses, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment(u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Self(seconds * 1_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default() / 1000)
    }

    /// A moment that another process of this host has told.
    pub fn at(microseconds: u64) -> Self {
        Self(microseconds)
    }

    /// Its number, for another process of this host.
    pub fn microseconds(self) -> u64 {
        self.0
    }
}

/// What is known of a container's life.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Timeline {
    pub runtime_started: Moment,
    pub vmm_started: Option<Moment>,
    pub vm_running: Option<Moment>,
    pub greeting: Option<Greeting>,
    pub greeted: Option<Moment>,
    pub container_created: Option<Moment>,
    pub process_started: Option<Moment>,
    pub process_ended: Option<Moment>,
    pub torn_down: Option<Moment>,
}

#[derive(Serialize)]
struct Phase {
    name: &'static str,
    start_us: u64,
    duration_us: u64,
}

#[derive(Serialize)]
struct Phases {
    phases: Vec<Phase>,
}

impl Timeline {
    /// A life that begins now.
    pub fn begin() -> Self {
        Self {
            runtime_started: Moment::now(),
            ..Self::default()
        }
    }

    fn phases(&self) -> Vec<Phase> {
        let mut phases = Vec::new();
        let mut phase = |name, from: Option<Moment>, to: Option<Moment>| {
            if let (Some(from), Some(to)) = (from, to) {
                phases.push(Phase {
                    name,
                    start_us: from.0.saturating_sub(self.runtime_started.0),
                    duration_us: to.0.saturating_sub(from.0),
                });
            }
        };
        phase("runtime", Some(self.runtime_started), self.vmm_started);
        phase("vmm_setup", self.vmm_started, self.vm_running);
        // The guest's clock begins with its kernel. The agent's own share is measured by it; what
        // is before that until the VM ran is the kernel's, decompression and entry included.
        let agent_started = self
            .greeted
            .zip(self.greeting.as_ref())
            .map(|(greeted, greeting)| {
                let agent = greeting.ready_us.saturating_sub(greeting.started_us);
                let earliest = self.vm_running.map_or(0, |moment| moment.0);
                Moment(greeted.0.saturating_sub(agent).max(earliest))
            });
        phase("kernel", self.vm_running, agent_started);
        phase("agent", agent_started, self.greeted);
        phase("container", self.greeted, self.container_created);
        phase("process", self.process_started, self.process_ended);
        phase("teardown", self.process_ended, self.torn_down);
        phases
    }

    /// Writes the phases that are known.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let json = serde_json::to_string(&Phases {
            phases: self.phases(),
        })?;
        fs::write(path, json + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other() {
        let timeline = Timeline {
            runtime_started: Moment(1000),
            vmm_started: Some(Moment(1100)),
            vm_running: Some(Moment(1500)),
            greeting: Some(Greeting {
                version: String::new(),
                started_us: 300,
                ready_us: 350,
            }),
            greeted: Some(Moment(1900)),
            container_created: Some(Moment(2000)),
            process_started: Some(Moment(2001)),
            process_ended: Some(Moment(2101)),
            torn_down: Some(Moment(2111)),
        };
        let shown: Vec<_> = timeline
            .phases()
            .iter()
            .map(|phase| (phase.name, phase.start_us, phase.duration_us))
            .collect();
        assert_eq!(
            shown,
            [
                ("runtime", 0, 100),
                ("vmm_setup", 100, 400),
                ("kernel", 500, 350),
                ("agent", 850, 50),
                ("container", 900, 100),
                ("process", 1001, 100),
                ("teardown", 1101, 10),
            ]
        );
    }

    #[test]
    fn a_guest_that_lies_about_its_times_gives_no_nonsense() {
        let timeline = Timeline {
            runtime_started: Moment(1000),
            vm_running: Some(Moment(1500)),
            greeting: Some(Greeting {
                version: String::new(),
                started_us: 0,
                ready_us: u64::MAX,
            }),
            greeted: Some(Moment(1900)),
            ..Timeline::default()
        };
        let phases = timeline.phases();
        assert_eq!((phases[0].name, phases[0].duration_us), ("kernel", 0));
        assert_eq!((phases[1].name, phases[1].duration_us), ("agent", 400));
    }
}
