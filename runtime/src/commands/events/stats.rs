//! A container's figures in the shape that runc's `events` has, which is cgroup v1's: times in
//! nanoseconds, swap as memory and swap together.

use bulkhead_agent_protocol::messages::{IoStats, Pressure, PressureLine, StatsResponse};
use serde_json::{Map, Value, json};

/// The agent's word for "no limit".
const UNLIMITED: u64 = u64::MAX;

/// The `data` of an event.
pub(super) fn shape(stats: &StatsResponse) -> Value {
    let mut shaped = json!({
        "cpu": cpu(stats),
        "cpuset": {
            "cpus": numbers(&stats.cpus),
            "mems": numbers(&stats.memory_nodes),
        },
        "memory": memory(stats),
        "pids": pids(stats),
        "blkio": {
            "ioServiceBytesRecursive": io(&stats.io, |io| {
                [io.read_bytes, io.written_bytes, io.discarded_bytes]
            }),
            "ioServicedRecursive": io(&stats.io, |io| [io.reads, io.writes, io.discards]),
        },
        "hugetlb": huge_pages(stats),
        "intel_rdt": {},
        "network_interfaces": null,
    });
    for (name, pressure) in [
        ("cpu", stats.cpu_pressure.as_ref()),
        ("memory", stats.memory_pressure.as_ref()),
        ("blkio", stats.io_pressure.as_ref()),
    ] {
        if let Some(pressure) = pressure {
            shaped[name]["psi"] = psi(pressure);
        }
    }
    shaped
}

fn nanoseconds(microseconds: u64) -> u64 {
    microseconds.saturating_mul(1000)
}

fn cpu(stats: &StatsResponse) -> Value {
    json!({
        "usage": {
            "total": nanoseconds(stats.cpu_usage_us),
            "kernel": nanoseconds(stats.cpu_system_us),
            "user": nanoseconds(stats.cpu_user_us),
        },
        "throttling": {
            "periods": stats.cpu_periods,
            "throttledPeriods": stats.cpu_throttled_periods,
            "throttledTime": nanoseconds(stats.cpu_throttled_us),
        },
    })
}

fn memory(stats: &StatsResponse) -> Value {
    let count = |name: &str| stats.memory_events.get(name).copied().unwrap_or(0);
    let entry = |limit: u64, usage: u64, peak: u64, failures: u64| json!({"limit": limit, "usage": usage, "max": peak, "failcnt": failures});
    // saturating: no limit of either is none of both.
    let swap_limit = stats.memory_limit.saturating_add(stats.memory_swap_limit);
    let swap_usage = stats
        .memory_current
        .saturating_add(stats.memory_swap_current);
    let swap_peak = stats.memory_peak.saturating_add(stats.memory_swap_peak);
    let of_stat = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    json!({
        "cache": of_stat("file"),
        "usage": entry(
            stats.memory_limit,
            stats.memory_current,
            stats.memory_peak,
            count("max"),
        ),
        "swap": entry(swap_limit, swap_usage, swap_peak, 0),
        "kernel": entry(UNLIMITED, of_stat("kernel"), 0, 0),
        "kernelTCP": entry(UNLIMITED, of_stat("sock"), 0, 0),
        "raw": stats.memory_stat,
    })
}

fn pids(stats: &StatsResponse) -> Value {
    let mut pids = json!({"current": stats.pids_current});
    // runc leaves a limit out that is none.
    if stats.pids_limit != UNLIMITED {
        pids["limit"] = json!(stats.pids_limit);
    }
    pids
}

fn io(devices: &[IoStats], values: impl Fn(&IoStats) -> [u64; 3]) -> Vec<Value> {
    let entry = |device: &IoStats, op: &str, value: u64| json!({"major": device.major, "minor": device.minor, "op": op, "value": value});
    devices
        .iter()
        .flat_map(|device| {
            let [read, write, discard] = values(device);
            [
                entry(device, "Read", read),
                entry(device, "Write", write),
                entry(device, "Discard", discard),
            ]
        })
        .collect()
}

fn huge_pages(stats: &StatsResponse) -> Value {
    let mut sizes = Map::new();
    for pages in &stats.huge_pages {
        let entry = json!({"usage": pages.current, "failcnt": pages.failures});
        sizes.insert(pages.page_size.clone(), entry);
    }
    Value::Object(sizes)
}

/// The numbers of a list such as `0-1,4`; a guest's, so not without end.
fn numbers(list: &str) -> Vec<u16> {
    const MOST: usize = 1024;
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<u16>().ok()?..=last.trim().parse().ok()?)
        })
        .flatten()
        .take(MOST)
        .collect()
}

fn psi(pressure: &Pressure) -> Value {
    let line = |line: Option<&PressureLine>| {
        let line = line.cloned().unwrap_or_default();
        json!({"avg10": line.avg10, "avg60": line.avg60, "avg300": line.avg300,
            "total": line.total_us})
    };
    json!({"some": line(pressure.some.as_ref()), "full": line(pressure.full.as_ref())})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_in_runcs_units() {
        let mut stats = StatsResponse {
            cpu_usage_us: 5,
            memory_current: 100,
            memory_limit: UNLIMITED,
            memory_swap_current: 7,
            memory_swap_limit: 9,
            pids_current: 3,
            pids_limit: UNLIMITED,
            cpus: "0-1,3".to_owned(),
            ..Default::default()
        };
        stats.memory_events.insert("max".to_owned(), 4);
        stats.io.push(IoStats {
            major: 8,
            read_bytes: 11,
            writes: 2,
            ..Default::default()
        });
        let shaped = shape(&stats);
        for (pointer, value) in [
            ("/cpu/usage/total", json!(5000)),
            ("/memory/usage/usage", json!(100)),
            ("/memory/usage/limit", json!(u64::MAX)),
            ("/memory/usage/failcnt", json!(4)),
            ("/memory/swap/usage", json!(107)),
            ("/memory/swap/limit", json!(u64::MAX)),
            ("/pids", json!({"current": 3})),
            ("/cpuset/cpus", json!([0, 1, 3])),
            (
                "/blkio/ioServiceBytesRecursive/0",
                json!({"major": 8, "minor": 0, "op": "Read", "value": 11}),
            ),
            ("/blkio/ioServicedRecursive/1/value", json!(2)),
            ("/hugetlb", json!({})),
        ] {
            assert_eq!(shaped.pointer(pointer), Some(&value), "{pointer}");
        }
    }

    #[test]
    fn a_hostile_list_of_cpus_ends() {
        assert_eq!(numbers("0-65535,0-65535,5").len(), 1024);
        assert!(numbers("5-1,x,-").is_empty());
    }
}
