//! Resource usage of a container, from the files of its cgroup.

use bulkhead_agent_protocol::messages::{IoStats, StatsResponse};

use super::cgroup::{Cgroup, keyed_value};
use crate::error::{Attempt, Result};

/// Reads the statistics. Controllers that the guest kernel lacks leave zeros.
pub(super) fn read(cgroup: &Cgroup) -> Result<StatsResponse> {
    let cpu = cgroup.read("cpu.stat").or_cannot(|| "read cpu.stat")?;
    let of_cpu = |key| keyed_value(&cpu, key).unwrap_or(0);
    let memory = cgroup.read("memory.stat").unwrap_or_default();
    Ok(StatsResponse {
        cpu_usage_us: of_cpu("usage_usec"),
        cpu_user_us: of_cpu("user_usec"),
        cpu_system_us: of_cpu("system_usec"),
        cpu_periods: of_cpu("nr_periods"),
        cpu_throttled_periods: of_cpu("nr_throttled"),
        cpu_throttled_us: of_cpu("throttled_usec"),
        memory_current: number(cgroup, "memory.current"),
        memory_limit: number(cgroup, "memory.max"),
        memory_swap_current: number(cgroup, "memory.swap.current"),
        memory_oom_kills: cgroup.keyed("memory.events", "oom_kill").unwrap_or(0),
        memory_stat: memory
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
            .collect(),
        pids_current: number(cgroup, "pids.current"),
        pids_limit: number(cgroup, "pids.max"),
        io: io(&cgroup.read("io.stat").unwrap_or_default()),
        ..Default::default()
    })
}

/// A file with one number, or "max".
fn number(cgroup: &Cgroup, file: &str) -> u64 {
    match cgroup.read(file).as_deref().map(str::trim) {
        Ok("max") => u64::MAX,
        Ok(text) => text.parse().unwrap_or(0),
        Err(_) => 0,
    }
}

/// Lines such as "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0".
fn io(text: &str) -> Vec<IoStats> {
    text.lines().filter_map(io_line).collect()
}

fn io_line(line: &str) -> Option<IoStats> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let value = |key: &str| {
        let found = rest
            .split(' ')
            .find_map(|p| p.strip_prefix(key)?.strip_prefix('='));
        found.and_then(|v| v.parse().ok()).unwrap_or(0)
    };
    Some(IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: value("rbytes"),
        written_bytes: value("wbytes"),
        reads: value("rios"),
        writes: value("wios"),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_lines() {
        let stats = io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 \nbroken\n");
        assert_eq!(stats.len(), 2);
        assert_eq!((stats[0].major, stats[0].minor), (254, 0));
        assert_eq!((stats[0].read_bytes, stats[0].writes), (1, 4));
        assert_eq!(stats[1].read_bytes, 0);
    }
}
