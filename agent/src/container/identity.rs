//! What a process is besides its program: user, groups, capabilities, limits, scheduling, seccomp.
//! [`Plan`] is the checked form of the spec's `process`; applying it is the last thing before
//! `execve`.

use std::{collections::HashSet, ffi::CString, os::fd::BorrowedFd, path::PathBuf};

use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType, Process, Scheduler,
};
use rustix::{
    process::{Gid, Pid, Resource, Rlimit, Uid, prlimit},
    thread::{
        set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use super::{capabilities::Capabilities, id_maps::write_of};
use crate::{
    error::{Attempt, Error, Result},
    sys,
};

/// A process to be started, checked.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Program and arguments, at least one.
    pub arguments: Vec<CString>,
    /// `name=value` each.
    pub environment: Vec<CString>,
    /// Working directory, absolute.
    pub directory: PathBuf,
    /// Owner of the process.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    capabilities: Capabilities,
    /// Whether execve may give no privileges; also when seccomp filters are installed.
    pub no_new_privileges: bool,
    rlimits: Vec<(Resource, Rlimit)>,
    oom_score_adjustment: Option<i32>,
    scheduling: Option<sys::SchedulingAttributes>,
    io_priority: Option<(u16, u16)>,
}

/// Checks a `process` object.
pub(super) fn plan(process: &Process) -> Result<Plan> {
    refuse(process)?;
    let arguments = strings(
        "process.args",
        process.args().as_deref().unwrap_or_default(),
    )?;
    if arguments.is_empty() {
        return Err(Error::invalid("process.args", "is empty; name a program"));
    }
    let directory = process.cwd().clone();
    if !directory.is_absolute() {
        let problem = format!(
            "{:?} is not an absolute path",
            directory.display().to_string()
        );
        return Err(Error::invalid("process.cwd", problem));
    }
    let adjustment = process.oom_score_adj();
    if adjustment.is_some_and(|a| !(-1000..=1000).contains(&a)) {
        return Err(Error::invalid(
            "process.oomScoreAdj",
            "is not in -1000 to 1000",
        ));
    }
    let user = process.user();
    let umask = user.umask().unwrap_or(0o022);
    if umask > 0o777 {
        return Err(Error::invalid(
            "process.user.umask",
            format!("{umask:#o} is more than 0777"),
        ));
    }
    Ok(Plan {
        arguments,
        environment: environment(process.env().as_deref().unwrap_or_default())?,
        directory,
        uid: id("process.user.uid", user.uid())?,
        gid: id("process.user.gid", user.gid())?,
        groups: user
            .additional_gids()
            .iter()
            .flatten()
            .map(|gid| id("process.user.additionalGids", *gid))
            .collect::<Result<_>>()?,
        umask,
        capabilities: Capabilities::of(process.capabilities().as_ref()),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(process)?,
        oom_score_adjustment: adjustment,
        scheduling: process.scheduler().as_ref().map(scheduling).transpose()?,
        io_priority: io_priority(process)?,
    })
}

/// -1 is "leave it" to the system calls that change users.
fn id(field: &str, id: u32) -> Result<u32> {
    if id == u32::MAX {
        return Err(Error::invalid(field, "4294967295 is no id"));
    }
    Ok(id)
}

fn strings(field: &str, strings: &[String]) -> Result<Vec<CString>> {
    let strings = strings.iter().enumerate().map(|(index, string)| {
        CString::new(string.as_str())
            .map_err(|_| Error::invalid(format!("{field}[{index}]"), "holds a null character"))
    });
    strings.collect()
}

/// Variables, each with a name; the last of several with one name counts, as with runc.
fn environment(entries: &[String]) -> Result<Vec<CString>> {
    let name = |entry: &str| entry.split_once('=').map(|(name, _)| name.to_owned());
    for (index, entry) in entries.iter().enumerate() {
        if name(entry).is_none_or(|name| name.is_empty()) {
            let problem = "is not of the form name=value";
            return Err(Error::invalid(format!("process.env[{index}]"), problem));
        }
    }
    let mut variables = strings("process.env", entries)?;
    let mut seen = HashSet::new();
    let mut latest: Vec<_> = entries.iter().rev().map(|e| seen.insert(name(e))).collect();
    variables.retain(|_| latest.pop().unwrap_or(false));
    Ok(variables)
}

fn refuse(process: &Process) -> Result<()> {
    let filled = |value: &Option<String>| value.as_ref().is_some_and(|v| !v.is_empty());
    // Labels of security modules are names in the host's policy: the runtime has judged them.
    if filled(process.command_line()) {
        return Err(Error::unsupported(
            "process.commandLine",
            "it is for Windows only; use args",
        ));
    }
    if filled(process.user().username()) {
        let reason = "it is for Windows only; use uid and gid";
        return Err(Error::unsupported("process.user.username", reason));
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    if affinity.is_some_and(|a| a.initial().is_some() || a.cpu_affinity_final().is_some()) {
        let reason = "CPU numbers of the host mean nothing in the guest; remove it";
        return Err(Error::unsupported("process.execCPUAffinity", reason));
    }
    Ok(())
}

fn rlimits(process: &Process) -> Result<Vec<(Resource, Rlimit)>> {
    let mut limits: Vec<(Resource, Rlimit)> = Vec::new();
    for (index, rlimit) in process.rlimits().iter().flatten().enumerate() {
        let field = format!("process.rlimits[{index}]");
        let resource = resource(rlimit.typ());
        if limits.iter().any(|(other, _)| *other == resource) {
            let problem = format!("{} is given twice", rlimit.typ());
            return Err(Error::invalid(format!("{field}.type"), problem));
        }
        if rlimit.soft() > rlimit.hard() {
            let problem = format!(
                "{} is more than the hard limit {}",
                rlimit.soft(),
                rlimit.hard()
            );
            return Err(Error::invalid(format!("{field}.soft"), problem));
        }
        let value = |limit| (limit != u64::MAX).then_some(limit);
        let limit = Rlimit {
            current: value(rlimit.soft()),
            maximum: value(rlimit.hard()),
        };
        limits.push((resource, limit));
    }
    // The agent's own limit of open files is for its own needs: without a word from the spec,
    // processes get what is usual.
    if !limits
        .iter()
        .any(|(resource, _)| *resource == Resource::Nofile)
    {
        let usual = Rlimit {
            current: Some(1024),
            maximum: Some(524_288),
        };
        limits.push((Resource::Nofile, usual));
    }
    Ok(limits)
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

fn scheduling(scheduler: &Scheduler) -> Result<sys::SchedulingAttributes> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
        LinuxSchedulerPolicy::SchedIso => {
            let reason = "Linux has no such policy";
            return Err(Error::unsupported(
                "process.scheduler.policy SCHED_ISO",
                reason,
            ));
        }
    };
    check_scheduling(scheduler)?;
    let mut flags = 0;
    for flag in scheduler.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin
            | LinuxSchedulerFlag::SchedFlagUtilClampMax => {
                let reason = "the spec has no field for its value; remove it";
                return Err(Error::unsupported(
                    format!("process.scheduler.flags {flag}"),
                    reason,
                ));
            }
        };
    }
    Ok(sys::SchedulingAttributes {
        size: 0,
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(scheduler.priority().unwrap_or(0))
            .map_err(|_| Error::invalid("process.scheduler.priority", "is negative"))?,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    })
}

/// The kernel takes no notice of values that do not belong to the policy (sched(7)).
fn check_scheduling(scheduler: &Scheduler) -> Result<()> {
    use LinuxSchedulerPolicy::{SchedBatch, SchedDeadline, SchedFifo, SchedOther, SchedRr};
    let policy = scheduler.policy();
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        let problem = format!("{nice} is not in -20 to 19");
        return Err(Error::invalid("process.scheduler.nice", problem));
    }
    let given = |value: &Option<u64>| value.is_some_and(|value| value != 0);
    let of_deadline = [
        ("runtime", given(scheduler.runtime())),
        ("deadline", given(scheduler.deadline())),
        ("period", given(scheduler.period())),
    ];
    let wrong = |field: &str, policies: &str| {
        let problem = format!("belongs to {policies}, not to {policy}");
        Err(Error::invalid(
            format!("process.scheduler.{field}"),
            problem,
        ))
    };
    if nice != 0 && ![SchedOther, SchedBatch].contains(policy) {
        return wrong("nice", "SCHED_OTHER and SCHED_BATCH");
    }
    if scheduler.priority().is_some_and(|p| p != 0) && ![SchedFifo, SchedRr].contains(policy) {
        return wrong("priority", "SCHED_FIFO and SCHED_RR");
    }
    match of_deadline.iter().find(|(_, given)| *given) {
        Some((field, _)) if *policy != SchedDeadline => wrong(field, "SCHED_DEADLINE"),
        _ => Ok(()),
    }
}

fn io_priority(process: &Process) -> Result<Option<(u16, u16)>> {
    let Some(priority) = process.io_priority() else {
        return Ok(None);
    };
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u16::try_from(priority.priority()).ok().filter(|p| *p < 8);
    let level =
        level.ok_or_else(|| Error::invalid("process.ioPriority.priority", "is not in 0 to 7"))?;
    Ok(Some((class, level)))
}

impl Plan {
    /// Grants a process of the container (or the caller, before it is one) what only the agent may: resource limits above its own,
    /// and protection from the kernel's choice when memory is short.
    pub(super) fn grant(&self, proc: BorrowedFd<'_>, pid: Option<Pid>) -> Result<()> {
        for (resource, limit) in &self.rlimits {
            prlimit(pid, *resource, *limit)
                .or_cannot(|| format!("set the limit {resource:?} (process.rlimits)"))?;
        }
        if let Some(adjustment) = self.oom_score_adjustment {
            write_of(proc, pid, "oom_score_adj", &adjustment.to_string())
                .or_cannot(|| format!("set oom_score_adj to {adjustment} (process.oomScoreAdj)"))?;
        }
        Ok(())
    }

    /// Applies what a process sets itself, still with the agent's privileges.
    pub(super) fn apply_limits(&self) -> Result<()> {
        if let Some(attributes) = self.scheduling {
            sys::set_scheduling(attributes)
                .or_cannot(|| "set the scheduling policy (process.scheduler)")?;
        }
        if let Some((class, level)) = self.io_priority {
            sys::set_io_priority(class, level)
                .or_cannot(|| "set the I/O priority (process.ioPriority)")?;
        }
        if self.no_new_privileges {
            set_no_new_privs(true).or_cannot(|| "set no_new_privs (process.noNewPrivileges)")?;
        }
        Ok(())
    }

    /// Becomes the user, with the capabilities of the spec.
    pub(super) fn become_user(&self) -> Result<()> {
        self.capabilities.limit_bounding_set()?;
        set_keep_capabilities(true).or_cannot(|| "keep capabilities over the change of user")?;
        let groups: Vec<_> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        set_thread_groups(&groups).or_cannot(|| "set the groups (process.user.additionalGids)")?;
        let gid = Gid::from_raw(self.gid);
        set_thread_res_gid(gid, gid, gid)
            .or_cannot(|| format!("become group {} (process.user.gid)", self.gid))?;
        let uid = Uid::from_raw(self.uid);
        set_thread_res_uid(uid, uid, uid)
            .or_cannot(|| format!("become user {} (process.user.uid)", self.uid))?;
        set_keep_capabilities(false).or_cannot(|| "stop keeping capabilities")?;
        self.capabilities.apply()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(changes: serde_json::Value) -> Result<Plan> {
        let mut process = serde_json::json!({
            "user": {"uid": 1, "gid": 2}, "args": ["sh"], "cwd": "/",
        });
        for (key, value) in changes.as_object().expect("object") {
            process[key] = value.clone();
        }
        plan(&serde_json::from_value(process).expect("process"))
    }

    #[test]
    fn defaults() {
        let plan = planned(serde_json::json!({})).expect("valid");
        assert_eq!((plan.uid, plan.gid, plan.umask), (1, 2, 0o022));
        assert!(!plan.no_new_privileges);
    }

    #[test]
    fn refusals_name_the_field() {
        for (changes, field) in [
            (serde_json::json!({"args": []}), "process.args"),
            (serde_json::json!({"args": ["a\0b"]}), "process.args[0]"),
            (serde_json::json!({"cwd": "x"}), "process.cwd"),
            (
                serde_json::json!({"oomScoreAdj": 2000}),
                "process.oomScoreAdj",
            ),
            (
                serde_json::json!({"user": {"uid": u32::MAX, "gid": 0}}),
                "process.user.uid",
            ),
            (
                serde_json::json!({"user": {"uid": 0, "gid": 0, "umask": 512}}),
                "process.user.umask",
            ),
            (
                serde_json::json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]}),
                "process.rlimits[0].soft",
            ),
            (
                serde_json::json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1},
                    {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]}),
                "process.rlimits[1].type",
            ),
            (
                serde_json::json!({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 9}}),
                "process.ioPriority.priority",
            ),
            (serde_json::json!({"env": ["A"]}), "process.env[0]"),
            (serde_json::json!({"env": ["A=", "=b"]}), "process.env[1]"),
            (
                serde_json::json!({"scheduler": {"policy": "SCHED_OTHER", "priority": 5}}),
                "process.scheduler.priority",
            ),
            (
                serde_json::json!({"scheduler": {"policy": "SCHED_FIFO", "nice": 5}}),
                "process.scheduler.nice",
            ),
            (
                serde_json::json!({"scheduler": {"policy": "SCHED_BATCH", "nice": 20}}),
                "process.scheduler.nice",
            ),
            (
                serde_json::json!({"scheduler": {"policy": "SCHED_RR", "period": 20}}),
                "process.scheduler.period",
            ),
            (
                serde_json::json!({"scheduler": {"policy": "SCHED_OTHER",
                    "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"]}}),
                "process.scheduler.flags SCHED_FLAG_UTIL_CLAMP_MIN",
            ),
            (
                serde_json::json!({"execCPUAffinity": {"initial": "0"}}),
                "process.execCPUAffinity",
            ),
        ] {
            let error = planned(changes).expect_err("refused").to_string();
            assert!(error.starts_with(field), "{error}");
        }
        for labels in [
            serde_json::json!({"apparmorProfile": "p"}),
            serde_json::json!({"selinuxLabel": "l"}),
        ] {
            assert!(planned(labels).is_ok());
        }
    }

    #[test]
    fn the_last_of_equal_variables_counts() {
        let env = ["A=1", "B=2", "A=3", "C=x=y", "B="];
        let plan = planned(serde_json::json!({"env": env})).expect("valid");
        let expected = [c"A=3", c"C=x=y", c"B="].map(ToOwned::to_owned);
        assert_eq!(plan.environment, expected);
    }
}
