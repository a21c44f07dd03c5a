//! `update`: changes what a running container may use, in the guest and on the host. What holds
//! afterwards is kept with the container, since settings depend on each other: a new quota counts
//! for the period that was set before.

use bulkhead_agent_protocol::messages::{Empty, UpdateContainerRequest};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Context, Error, ask, require};
use crate::{
    cgroup::{Cgroup, Limits},
    cli::{Update, UpdateLimits},
    guest_size::GuestSize,
    spec::{self, Loaded},
    state::ContainerStatus::{Created, Paused, Running},
};

const MIB: u64 = 1 << 20;

pub(super) fn update(context: &Context, options: &Update) -> Result<u8, Error> {
    let container = context.root.open(&options.id)?;
    let locked = container.lock()?;
    let record = container.record()?;
    require(
        &container,
        record.current_status(),
        &[Created, Running, Paused],
        "container not running",
    )?;
    let wanted = wanted(context, &record.oci_version, options)?;
    judge(&wanted, record.guest)?;
    let changes = serde_json::to_value(&wanted).map_err(|error| unreadable(error.into()))?;
    let mut config: Value =
        serde_json::from_slice(&container.config()?).map_err(|error| unreadable(error.into()))?;
    merge(&mut config["linux"]["resources"], &changes);
    let bytes = config.to_string().into_bytes();
    let merged = Loaded::parse(record.bundle.clone(), bytes)?;

    // The host first: it is what more often refuses, and what can be put back.
    let cgroup = Cgroup::at(&record.cgroup)?;
    let undo = cgroup.change(&Limits::of(&merged.spec, record.guest))?;
    let told = tell_guest(&container, &changes);
    if told.is_err() {
        undo.put_back();
    }
    told?;
    locked.write_config(&merged.bytes)?;
    Ok(0)
}

fn unreadable(error: std::io::Error) -> Error {
    Error::Io("read the container's configuration", error)
}

fn tell_guest(container: &crate::state::Container, changes: &Value) -> Result<(), Error> {
    let request = UpdateContainerRequest {
        container_id: container.id().to_owned(),
        resources: changes.to_string().into_bytes(),
        ..Default::default()
    };
    let _: Empty = ask(container, "UpdateContainer", &request)?;
    Ok(())
}

/// What the command line asks for.
fn wanted(context: &Context, version: &str, options: &Update) -> Result<LinuxResources, Error> {
    if let Some(file) = &options.resources {
        return Ok(spec::read_resources(
            file,
            version,
            context.unknown_properties(),
        )?);
    }
    refuse(&options.limits)?;
    let json = from_options(&options.limits)?;
    if json.as_object().is_none_or(Map::is_empty) {
        return Err(Error::Usage(
            "nothing to update: give --resources or one of the limits (see update --help)"
                .to_owned(),
        ));
    }
    serde_json::from_value(json).map_err(|error| unreadable(error.into()))
}

fn refuse(limits: &UpdateLimits) -> Result<(), Error> {
    let realtime = "guests have no groups of realtime processes";
    let kernel = "kernels do not limit it any more; leave it out";
    let rdt = "a guest cannot partition the host's caches and memory bandwidth";
    let given = [
        ("--cpu-rt-period", limits.cpu_rt_period.is_some(), realtime),
        (
            "--cpu-rt-runtime",
            limits.cpu_rt_runtime.is_some(),
            realtime,
        ),
        ("--kernel-memory", limits.kernel_memory.is_some(), kernel),
        (
            "--kernel-memory-tcp",
            limits.kernel_memory_tcp.is_some(),
            kernel,
        ),
        ("--l3-cache-schema", limits.l3_cache_schema.is_some(), rdt),
        ("--mem-bw-schema", limits.mem_bw_schema.is_some(), rdt),
    ];
    match given.into_iter().find(|(_, given, _)| *given) {
        Some((option, _, reason)) => Err(Error::Option { option, reason }),
        None => Ok(()),
    }
}

/// The options as a `linux.resources` object.
fn from_options(limits: &UpdateLimits) -> Result<Value, Error> {
    let bytes = |option: &str, text: &Option<String>| -> Result<Value, Error> {
        text.as_ref().map_or(Ok(Value::Null), |text| {
            Ok(json!(parse_bytes(option, text)?))
        })
    };
    let mut resources = json!({
        "cpu": {
            "shares": limits.cpu_share,
            "quota": limits.cpu_quota,
            "burst": limits.cpu_burst,
            "period": limits.cpu_period,
            "idle": limits.cpu_idle,
            "cpus": limits.cpuset_cpus,
            "mems": limits.cpuset_mems,
        },
        "memory": {
            "limit": bytes("--memory", &limits.memory)?,
            "reservation": bytes("--memory-reservation", &limits.memory_reservation)?,
            "swap": bytes("--memory-swap", &limits.memory_swap)?,
        },
        "pids": {"limit": limits.pids_limit},
        "blockIO": {"weight": limits.blkio_weight},
    });
    let unlimited = json!(-1);
    // As in runc: no limit of memory means none of memory and swap together.
    if resources["memory"]["limit"] == unlimited && resources["memory"]["swap"].is_null() {
        resources["memory"]["swap"] = unlimited;
    }
    if let Value::Object(parts) = &mut resources {
        for part in parts.values_mut().filter_map(Value::as_object_mut) {
            part.retain(|_, value| !value.is_null());
        }
        parts.retain(|_, part| part.as_object().is_some_and(|part| !part.is_empty()));
    }
    Ok(resources)
}

/// A number of bytes as runc and Docker take it: with b, k, m, g, t or p (powers of 1024, each also
/// as kb or kib), or -1.
fn parse_bytes(option: &str, text: &str) -> Result<i64, Error> {
    if text == "-1" {
        return Ok(-1);
    }
    let wrong = || {
        Error::Usage(format!(
            "{option}: {text:?} must be a number of bytes such as 67108864, 64m or 1g, or -1"
        ))
    };
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let unit = unit.trim();
    let unit = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(unit);
    let power = match unit {
        "" => 0,
        unit => {
            1 + "kmgtp"
                .find(unit)
                .filter(|_| unit.len() == 1)
                .ok_or_else(wrong)?
        }
    };
    let factor = 1_i64 << (10 * power);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 9 || number.is_empty() {
        return Err(wrong());
    }
    let whole: i64 = whole.parse().map_err(|_| wrong())?;
    let part = match fraction {
        "" => 0,
        digits => {
            let scale = 10_i128.pow(u32::try_from(digits.len()).map_err(|_| wrong())?);
            let digits: i128 = digits.parse().map_err(|_| wrong())?;
            i64::try_from(digits * i128::from(factor) / scale).map_err(|_| wrong())?
        }
    };
    whole
        .checked_mul(factor)
        .and_then(|whole| whole.checked_add(part))
        .ok_or_else(wrong)
}

/// What only the host can know to be impossible.
fn judge(wanted: &LinuxResources, guest: GuestSize) -> Result<(), Error> {
    let limit = wanted
        .memory()
        .as_ref()
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .unwrap_or(0);
    let most = u64::from(guest.memory_mib);
    if limit > most * MIB {
        return Err(Error::Usage(format!(
            "memory limit: {} MiB do not fit into the container's guest, whose memory was fixed at \
             {most} MiB when it was made; make the container anew with a larger \
             linux.resources.memory.limit, or with a larger guest.memory_mib in {}",
            limit.div_ceil(MIB),
            crate::config::DEFAULT_PATH,
        )));
    }
    let cpu = wanted.cpu().as_ref();
    if let Some(quota) = cpu.and_then(|cpu| cpu.quota())
        && let Ok(quota) = u64::try_from(quota)
        && let Some(period) = cpu
            .and_then(|cpu| cpu.period())
            .filter(|period| *period > 0)
        && quota.div_ceil(period) > u64::from(guest.cpus)
    {
        tracing::warn!(
            "the CPU quota asks for more than the guest's {} virtual CPUs, whose number was fixed \
             when it was made: they are all that the container can use",
            guest.cpus
        );
    }
    Ok(())
}

/// Lays the changes over what holds: objects part by part, everything else as a whole.
fn merge(holds: &mut Value, changes: &Value) {
    match (holds, changes) {
        (Value::Object(holds), Value::Object(changes)) => {
            for (name, change) in changes {
                merge(holds.entry(name.clone()).or_insert(Value::Null), change);
            }
        }
        (holds, changes) => *holds = changes.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn options(line: &str) -> Update {
        let line = format!("bulkhead update {line}");
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Update(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_become_resources() {
        let options = options(
            "one --memory 64m --memory-swap -1 --pids-limit -1 --cpu-quota -1 --cpu-period 50000 \
             --cpu-share 512 --cpuset-cpus 0 --blkio-weight 100 --cpu-idle 1 --cpu-burst 5",
        );
        assert_eq!(
            from_options(&options.limits).unwrap(),
            json!({
                "memory": {"limit": 64 << 20, "swap": -1}, "pids": {"limit": -1},
                "cpu": {"quota": -1, "period": 50_000, "shares": 512, "cpus": "0", "idle": 1,
                    "burst": 5},
                "blockIO": {"weight": 100}})
        );
        let unlimited = self::options("one --memory -1");
        assert_eq!(
            from_options(&unlimited.limits).unwrap(),
            json!({"memory": {"limit": -1, "swap": -1}})
        );
    }

    #[test]
    fn options_that_cannot_be_are_refused_by_name() {
        for line in [
            "one --cpu-rt-period 5",
            "one --cpu-rt-runtime -1",
            "one --kernel-memory 5",
            "one --l3-cache-schema L3:0=f",
        ] {
            let error = refuse(&options(line).limits).unwrap_err().to_string();
            let option = line.split(' ').nth(1).unwrap();
            assert!(error.starts_with(option), "{error}");
        }
        let both = "bulkhead update one --resources - --memory 5";
        assert!(Cli::try_parse_from(both.split(' ')).is_err());
    }

    #[test]
    fn bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("5", 5),
            ("64m", 64 << 20),
            ("64M", 64 << 20),
            ("1.5g", 3 << 29),
            ("1kb", 1024),
            ("1KiB", 1024),
            ("-1", -1),
            ("3b", 3),
        ] {
            assert_eq!(parse_bytes("--memory", text).unwrap(), bytes, "{text}");
        }
        for text in [
            "", "m", "-2", "5x", "5mm", "5kg", "1e5", "9999999p", ".", "1.1.1g",
        ] {
            let error = parse_bytes("--memory", text);
            assert!(error.is_err(), "{text}: {error:?}");
        }
    }

    #[test]
    fn a_guest_does_not_grow() {
        let guest = GuestSize {
            cpus: 1,
            memory_mib: 256,
        };
        let wanted =
            |mib: i64| serde_json::from_value(json!({"memory": {"limit": mib << 20}})).unwrap();
        assert!(judge(&wanted(256), guest).is_ok());
        let error = judge(&wanted(257), guest).unwrap_err().to_string();
        assert!(error.contains("fixed at 256 MiB"), "{error}");
    }

    #[test]
    fn changes_lie_over_what_holds() {
        let mut holds = json!({"cpu": {"quota": 5, "period": 9}, "devices": [1]});
        merge(
            &mut holds,
            &json!({"cpu": {"quota": 7}, "pids": {"limit": 3}}),
        );
        assert_eq!(
            holds,
            json!({"cpu": {"quota": 7, "period": 9}, "devices": [1], "pids": {"limit": 3}})
        );
        let mut nothing = Value::Null;
        merge(&mut nothing, &json!({"cpu": {"quota": 7}}));
        assert_eq!(nothing, json!({"cpu": {"quota": 7}}));
    }
}
