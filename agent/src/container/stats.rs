//! Resource usage of a container, from the files of its cgroup.

use bulkhead_agent_protocol::messages::{
    HugePageStats, IoStats, Pressure, PressureLine, StatsResponse,
};

use super::cgroup::{Cgroup, keyed_value};
use crate::error::{Attempt, Result};

/// Reads the statistics. Controllers that the guest kernel lacks leave zeros.
pub(super) fn read(cgroup: &Cgroup) -> Result<StatsResponse> {
    let cpu = cgroup.read("cpu.stat").or_cannot(|| "read cpu.stat")?;
    let of_cpu = |key| keyed_value(&cpu, key).unwrap_or(0);
    let text = |file: &str| cgroup.read(file).unwrap_or_default();
    let list = |file: &str| text(file).trim().to_owned();
    let pressure_of = |file: &str| pressure(&text(file)).into();
    Ok(StatsResponse {
        cpu_usage_us: of_cpu("usage_usec"),
        cpu_user_us: of_cpu("user_usec"),
        cpu_system_us: of_cpu("system_usec"),
        cpu_periods: of_cpu("nr_periods"),
        cpu_throttled_periods: of_cpu("nr_throttled"),
        cpu_throttled_us: of_cpu("throttled_usec"),
        cpu_bursts: of_cpu("nr_bursts"),
        cpu_burst_us: of_cpu("burst_usec"),
        memory_current: number(cgroup, "memory.current"),
        memory_peak: number(cgroup, "memory.peak"),
        memory_limit: number(cgroup, "memory.max"),
        memory_swap_current: number(cgroup, "memory.swap.current"),
        memory_swap_peak: number(cgroup, "memory.swap.peak"),
        memory_swap_limit: number(cgroup, "memory.swap.max"),
        memory_oom_kills: cgroup.out_of_memory_kills(),
        memory_stat: keyed(&text("memory.stat")).collect(),
        memory_events: keyed(&text("memory.events")).collect(),
        pids_current: number(cgroup, "pids.current"),
        pids_limit: number(cgroup, "pids.max"),
        pids_failures: cgroup.keyed("pids.events", "max").unwrap_or(0),
        io: io(&text("io.stat")),
        huge_pages: huge_pages(cgroup)?,
        cpus: list("cpuset.cpus.effective"),
        memory_nodes: list("cpuset.mems.effective"),
        cpu_pressure: pressure_of("cpu.pressure"),
        memory_pressure: pressure_of("memory.pressure"),
        io_pressure: pressure_of("io.pressure"),
        ..Default::default()
    })
}

/// Lines of "key value".
fn keyed(text: &str) -> impl Iterator<Item = (String, u64)> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
}

/// One per page size, from the names of files such as hugetlb.2MB.current.
fn huge_pages(cgroup: &Cgroup) -> Result<Vec<HugePageStats>> {
    let files = cgroup.files().or_cannot(|| "list the cgroup's files")?;
    let size = |file: &String| {
        let size = file.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<_> = files.iter().filter_map(size).collect();
    sizes.sort();
    let stats = sizes.into_iter().map(|size| HugePageStats {
        current: number(cgroup, &format!("hugetlb.{size}.current")),
        limit: number(cgroup, &format!("hugetlb.{size}.max")),
        failures: cgroup
            .keyed(&format!("hugetlb.{size}.events"), "max")
            .unwrap_or(0),
        page_size: size,
        ..Default::default()
    });
    Ok(stats.collect())
}

/// Lines such as "some avg10=0.00 avg60=0.00 avg300=0.00 total=0"; none where pressure is not
/// measured.
fn pressure(text: &str) -> Option<Pressure> {
    let line = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        let value = |key: &str| {
            let words = &mut rest.split_whitespace();
            words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        Some(PressureLine {
            avg10: value("avg10")?.parse().ok()?,
            avg60: value("avg60")?.parse().ok()?,
            avg300: value("avg300")?.parse().ok()?,
            total_us: value("total")?.parse().ok()?,
            ..Default::default()
        })
    };
    Some(Pressure {
        some: Some(line("some ")?).into(),
        full: line("full ").into(),
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
        discarded_bytes: value("dbytes"),
        discards: value("dios"),
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

    #[test]
    fn pressure_lines() {
        let text = "some avg10=1.50 avg60=0.20 avg300=0.00 total=77\n\
            full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        let both = pressure(text).expect("measured");
        assert!((both.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!((both.some.total_us, both.full.total_us), (77, 5));
        assert!(pressure("").is_none());
    }
}
