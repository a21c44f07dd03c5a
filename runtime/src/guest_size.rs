//! How big a guest is for what its container may use.
//!
//! - Memory: `guest.memory_mib` of the configuration file (256 MiB), or, when the container's memory
//!   limit asks for more, the limit + 1/64 of it (the guest kernel's page tables of contents: 64
//!   bytes a page of 4 KiB) + 64 MiB (the guest's kernel, agent and their caches). The limit itself
//!   is enforced in the guest. A guest larger than the host's memory, or than
//!   `guest.max_memory_mib`, is refused.
//! - CPUs: as many as the quota can keep busy, rounded up; without a quota as many as the cpuset
//!   names; without either, `guest.cpus` (1). Never more than the host has or `guest.max_cpus` says.
//! - Annotations that the configuration file allows take the place of `guest.memory_mib` and of
//!   the whole rule for CPUs.

use std::collections::HashMap;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{Config, GuestRules};

/// What the guest needs beside its container, in MiB.
const GUEST_OVERHEAD: u64 = 64;
const MIB: u64 = 1 << 20;
/// Kernel's default of cpu.cfs_period_us.
const DEFAULT_PERIOD: u64 = 100_000;
/// The VMM's limit.
const MOST_CPUS: u8 = 254;

const MEMORY_ANNOTATION: &str = "org.bulkhead.guest.memory-mib";
const CPUS_ANNOTATION: &str = "org.bulkhead.guest.cpus";
/// The annotations that can be allowed.
pub const ANNOTATIONS: [&str; 2] = [MEMORY_ANNOTATION, CPUS_ANNOTATION];

/// Size of a guest; zeros where none is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSize {
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The guest cannot have the size that was asked for.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// More memory than the host has or the administrator allows.
    #[error(
        "config.json: {field}: a guest of {guest_mib} MiB of memory does not fit: {most_mib} MiB \
         is the most that {reason}; ask for less"
    )]
    TooLarge {
        /// Which field asks.
        field: String,
        /// For a guest of this size.
        guest_mib: u64,
        /// What there is.
        most_mib: u64,
        /// Says who.
        reason: &'static str,
    },
    /// An annotation's value.
    #[error(
        "config.json: annotations[{name:?}]: {value:?} must be a number from {least} to {most}"
    )]
    Annotation {
        /// Its key.
        name: &'static str,
        /// Its value.
        value: String,
        /// The smallest that can be used.
        least: u32,
        /// The largest that can be used.
        most: u32,
    },
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// This host.
    pub fn this() -> Self {
        let system = rustix::system::sysinfo();
        let memory = u64::from(system.mem_unit).saturating_mul(system.totalram);
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory / MIB,
        }
    }

    fn most_cpus(self, rules: &GuestRules) -> u8 {
        let host = u8::try_from(self.cpus.max(1)).unwrap_or(u8::MAX);
        host.min(rules.max_cpus.unwrap_or(MOST_CPUS)).min(MOST_CPUS)
    }
}

/// The size of the guest for a container.
pub fn of(spec: &Spec, config: &Config, host: Host) -> Result<GuestSize, SizeError> {
    let rules = &config.guest;
    let none = HashMap::new();
    let annotations = Allowed {
        all: spec.annotations().as_ref().unwrap_or(&none),
        allow: &config.annotations.allow,
    };
    annotations.warn_of_others();
    let most = host.most_cpus(rules);
    let wished = annotations.number(CPUS_ANNOTATION, 1, most.into())?;
    let cpus = match wished.and_then(|cpus| u8::try_from(cpus).ok()) {
        Some(cpus) => cpus,
        None => u8::try_from(cpus(spec, rules).clamp(1, most.into())).unwrap_or(most),
    };
    let (base, field) = match annotations.number(MEMORY_ANNOTATION, 96, u32::MAX)? {
        Some(memory) => (memory, format!("annotations[{MEMORY_ANNOTATION:?}]")),
        None => (rules.memory_mib, "the size of a guest".to_owned()),
    };
    Ok(GuestSize {
        cpus,
        memory_mib: memory(spec, (base, field), rules, host)?,
    })
}

/// `linux.resources.memory.limit` in bytes; none for none and for -1, which means none.
pub(crate) fn memory_limit(spec: &Spec) -> Option<u64> {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
}

fn memory(
    spec: &Spec,
    (base, base_field): (u32, String),
    rules: &GuestRules,
    host: Host,
) -> Result<u32, SizeError> {
    let limit = memory_limit(spec);
    let for_limit = limit.map_or(0, |limit| {
        let limit = limit.div_ceil(MIB);
        limit + limit / 64 + GUEST_OVERHEAD
    });
    let needed = for_limit.max(base.into());
    let too_large = |most_mib, reason| SizeError::TooLarge {
        field: if for_limit > u64::from(base) {
            "linux.resources.memory.limit".to_owned()
        } else {
            base_field.clone()
        },
        guest_mib: needed,
        most_mib,
        reason,
    };
    if let Some(most) = rules
        .max_memory_mib
        .filter(|most| needed > u64::from(*most))
    {
        let reason = "guest.max_memory_mib of the configuration file allows";
        return Err(too_large(most.into(), reason));
    }
    // The kernel gives memory when it is touched: a default for all that is more than a small host
    // has is no reason to refuse a container that asked for nothing.
    let asked = for_limit > u64::from(base) || base != rules.memory_mib;
    if asked && needed > host.memory_mib {
        return Err(too_large(host.memory_mib, "this host has"));
    }
    u32::try_from(needed).map_err(|_| too_large(host.memory_mib, "this host has"))
}

/// How many CPUs the container's limits can keep busy.
fn cpus(spec: &Spec, rules: &GuestRules) -> usize {
    let cpu = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.cpu().as_ref());
    let quota = cpu.and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?)
            .ok()
            .filter(|quota| *quota > 0)?;
        let period = cpu
            .period()
            .filter(|period| *period > 0)
            .unwrap_or(DEFAULT_PERIOD);
        Some(usize::try_from(quota.div_ceil(period)).unwrap_or(usize::MAX))
    });
    let set = cpu
        .and_then(|cpu| cpu.cpus().as_deref())
        .and_then(list_length);
    match (quota, set) {
        (Some(quota), Some(set)) => quota.min(set),
        (Some(count), None) | (None, Some(count)) => count,
        (None, None) => rules.cpus.into(),
    }
}

/// The annotations of a container, and which of them count.
struct Allowed<'a> {
    all: &'a HashMap<String, String>,
    allow: &'a [String],
}

impl Allowed<'_> {
    fn number(&self, name: &'static str, least: u32, most: u32) -> Result<Option<u32>, SizeError> {
        let Some(value) = self.all.get(name) else {
            return Ok(None);
        };
        if !self.allow.iter().any(|allowed| allowed == name) {
            return Ok(None);
        }
        match value.parse::<u32>() {
            Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(SizeError::Annotation {
                name,
                value: value.clone(),
                least,
                most,
            }),
        }
    }

    /// runtime-spec, config "Annotations": unknown ones are no error; but ours mean something.
    fn warn_of_others(&self) {
        for name in self.all.keys() {
            if !name.starts_with("org.bulkhead.") {
                continue;
            }
            if !ANNOTATIONS.contains(&name.as_str()) {
                tracing::warn!("the annotation {name:?} is unknown and has no effect");
            } else if !self.allow.contains(name) {
                tracing::warn!(
                    "the annotation {name:?} has no effect: annotations.allow in {} does not name it",
                    crate::config::DEFAULT_PATH
                );
            }
        }
    }
}

/// How many CPUs a list like `0-3,7` names (cpuset(7), "List format"); `None` when it names none.
fn list_length(list: &str) -> Option<usize> {
    let mut count = 0_usize;
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (
            first.trim().parse::<usize>().ok()?,
            last.trim().parse().ok()?,
        );
        count = count.saturating_add(usize::checked_sub(last, first)?.saturating_add(1));
    }
    (count > 0).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const HOST: Host = Host {
        cpus: 4,
        memory_mib: 2048,
    };

    fn try_size(value: Value, config: &Config) -> Result<(u8, u32), SizeError> {
        let mut spec = json!({"ociVersion": "1.0.0"});
        for (name, part) in value.as_object().unwrap() {
            spec[name] = part.clone();
        }
        let spec = serde_json::from_value(spec).unwrap();
        of(&spec, config, HOST).map(|size| (size.cpus, size.memory_mib))
    }

    fn size(resources: Value) -> (u8, u32) {
        let value = json!({"linux": {"resources": resources}});
        try_size(value, &Config::default()).unwrap()
    }

    #[test]
    fn a_guest_larger_than_the_host_is_refused() {
        let limit = json!({"linux": {"resources": {"memory": {"limit": 1_i64 << 46}}}});
        let error = try_size(limit, &Config::default()).unwrap_err();
        assert!(error.to_string().contains("memory.limit"), "{error}");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(json!({})), (1, 256));
        assert_eq!(size(json!({"memory": {"limit": 64 << 20}})), (1, 256));
        assert_eq!(size(json!({"memory": {"limit": -1}})), (1, 256));
        assert_eq!(
            size(json!({"memory": {"limit": 1_u64 << 30}})),
            (1, 1024 + 16 + 64)
        );
        assert_eq!(
            size(json!({"cpu": {"quota": 150_000, "period": 100_000}})),
            (2, 256)
        );
        assert_eq!(size(json!({"cpu": {"quota": 50_000}})), (1, 256));
        assert_eq!(size(json!({"cpu": {"quota": -1}})), (1, 256));
        assert_eq!(size(json!({"cpu": {"quota": 9_000_000}})), (4, 256));
        assert_eq!(size(json!({"cpu": {"cpus": "0-1,3"}})), (3, 256));
        assert_eq!(
            size(json!({"cpu": {"cpus": "0-1", "quota": 300_000}})),
            (2, 256)
        );
        assert_eq!(size(json!({"cpu": {"cpus": "3-1"}})), (1, 256));
    }

    #[test]
    fn the_administrator_decides() {
        let config = Config {
            guest: GuestRules {
                memory_mib: 128,
                max_memory_mib: Some(512),
                cpus: 2,
                max_cpus: Some(3),
                ..GuestRules::default()
            },
            ..Config::default()
        };
        assert_eq!(try_size(json!({}), &config).unwrap(), (2, 128));
        let resources = json!({"memory": {"limit": 256 << 20}, "cpu": {"quota": 900_000}});
        let value = json!({"linux": {"resources": resources}});
        assert_eq!(try_size(value, &config).unwrap(), (3, 256 + 4 + 64));
        let value = json!({"linux": {"resources": {"memory": {"limit": 1 << 30}}}});
        let error = try_size(value, &config).unwrap_err().to_string();
        assert!(error.contains("guest.max_memory_mib"), "{error}");
    }

    #[test]
    fn annotations_count_only_where_they_are_allowed() {
        let value = json!({"annotations": {MEMORY_ANNOTATION: "400", CPUS_ANNOTATION: "3"},
            "linux": {"resources": {"cpu": {"quota": 1000}}}});
        let mut config = Config::default();
        assert_eq!(try_size(value.clone(), &config).unwrap(), (1, 256));
        config.annotations.allow = vec![MEMORY_ANNOTATION.to_owned()];
        assert_eq!(try_size(value.clone(), &config).unwrap(), (1, 400));
        config.annotations.allow.push(CPUS_ANNOTATION.to_owned());
        assert_eq!(try_size(value, &config).unwrap(), (3, 400));
        for (name, bad) in [
            (MEMORY_ANNOTATION, "much"),
            (MEMORY_ANNOTATION, "64"),
            (MEMORY_ANNOTATION, "100000"),
            (CPUS_ANNOTATION, "0"),
            (CPUS_ANNOTATION, "5"),
            (CPUS_ANNOTATION, "-1"),
        ] {
            let error = try_size(json!({"annotations": {name: bad}}), &config).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(name), "{bad}: {text}");
        }
    }
}
