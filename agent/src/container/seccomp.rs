//! The spec's seccomp profile as a program for the kernel, through libseccomp. It is made once per
//! container, in the agent; processes only install it.

use std::{
    io::{Read, Seek},
    os::fd::AsFd,
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    error::{Attempt, Error, Result},
    sys,
};
use bulkhead_agent_protocol::ErrorKind;

/// A compiled profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    program: Vec<u8>,
    flags: u64,
}

impl Filter {
    /// Installs the filter for the calling process.
    pub(super) fn install(&self) -> Result<()> {
        sys::install_seccomp_filter(&self.program, self.flags)
            .or_cannot(|| "install the seccomp filter (linux.seccomp)")
    }
}

/// Compiles a profile.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    if profile.listener_path().is_some() || profile.listener_metadata().is_some() {
        return Err(notify_refused("linux.seccomp.listenerPath"));
    }
    let default = action(
        "linux.seccomp.defaultAction",
        profile.default_action(),
        profile.default_errno_ret(),
    )?;
    let failed = |error| library("set up the filter", &error);
    let mut context = ScmpFilterContext::new(default).map_err(failed)?;
    // The program is installed by seccomp(2) as it stands; no_new_privs is the process's matter.
    context.set_ctl_nnp(false).map_err(failed)?;
    // A binary tree over the system calls: fewer instructions per call of the container.
    if profile.syscalls().as_ref().is_some_and(|s| s.len() > 1) {
        context.set_ctl_optimize(2).map_err(failed)?;
    }
    for architecture in profile.architectures().iter().flatten() {
        let architecture = architecture_of(*architecture)?;
        // An architecture that is there already (the native one) is no error.
        if !context.is_arch_present(architecture).map_err(failed)? {
            context.add_arch(architecture).map_err(failed)?;
        }
    }
    for (index, syscalls) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        add_syscalls(&mut context, &field, syscalls, default)?;
    }
    Ok(Filter {
        program: export(&context)?,
        flags: flags(profile)?,
    })
}

fn flags(profile: &LinuxSeccomp) -> Result<u64> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(notify_refused(
                    "linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ));
            }
        };
    }
    Ok(flags)
}

fn notify_refused(field: &str) -> Error {
    let reason = "no seccomp agent is reachable from inside of the guest; remove it";
    Error::unsupported(field, reason)
}

fn library(what: &str, error: &SeccompError) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("cannot {what} (linux.seccomp): {error}"),
    )
}

fn action(field: &str, action: LinuxSeccompAction, value: Option<u32>) -> Result<ScmpAction> {
    let errno = || {
        let value = value.unwrap_or(libc::EPERM.unsigned_abs());
        u16::try_from(value).map_err(|_| {
            let field = format!("{field} (errnoRet)");
            Error::invalid(field, format!("{value} is more than 65535"))
        })
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno()?.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno()?),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(notify_refused(field)),
    })
}

fn add_syscalls(
    context: &mut ScmpFilterContext,
    field: &str,
    syscalls: &LinuxSyscall,
    default: ScmpAction,
) -> Result<()> {
    let action = action(
        &format!("{field}.action"),
        syscalls.action(),
        syscalls.errno_ret(),
    )?;
    // libseccomp refuses rules that say what holds anyway.
    if action == default {
        return Ok(());
    }
    let arguments = syscalls.args().as_deref().unwrap_or_default();
    let comparisons: Vec<_> = arguments
        .iter()
        .map(|argument| comparison(field, argument))
        .collect::<Result<_>>()?;
    // Several conditions on one argument cannot be met by one rule of libseccomp: they become
    // rules of their own, any of which matches (as with runc).
    let repeated = arguments
        .iter()
        .enumerate()
        .any(|(i, a)| arguments[..i].iter().any(|b| a.index() == b.index()));
    for name in syscalls.names() {
        // Profiles name calls of other kernels and architectures; those that libseccomp does not
        // know cannot be made (as with runc).
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let rules: Vec<&[ScmpArgCompare]> = if repeated {
            comparisons.chunks(1).collect()
        } else {
            vec![&comparisons]
        };
        for rule in rules {
            context
                .add_rule_conditional(action, syscall, rule)
                .map_err(|e| library(&format!("add a rule for {name} ({field})"), &e))?;
        }
    }
    Ok(())
}

fn comparison(field: &str, argument: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| {
            let problem = format!("{} is not in 0 to 5", argument.index());
            Error::invalid(format!("{field}.args.index"), problem)
        })?;
    let value = argument.value();
    let (operator, datum) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // `value` is the mask, `valueTwo` what the masked argument must equal.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(value),
            argument.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, operator, datum))
}

fn architecture_of(architecture: Arch) -> Result<ScmpArch> {
    Ok(match architecture {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        other => {
            let field = format!("linux.seccomp.architectures {other}");
            return Err(Error::unsupported(field, "no guest runs on it; remove it"));
        }
    })
}

/// The program in the kernel's form.
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>> {
    let action = || "export the seccomp filter";
    let memory = memfd_create("seccomp", MemfdFlags::CLOEXEC).or_cannot(action)?;
    context
        .export_bpf(memory.as_fd())
        .map_err(|e| library("export the filter", &e))?;
    let mut file = std::fs::File::from(memory);
    let mut program = Vec::new();
    file.rewind().or_cannot(action)?;
    file.read_to_end(&mut program).or_cannot(action)?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(json: serde_json::Value) -> Result<Filter> {
        compile(&serde_json::from_value(json).expect("profile"))
    }

    #[test]
    fn a_usual_profile() {
        let filter = compiled(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 2_114_060_288u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
            ]
        }))
        .expect("valid");
        assert!(!filter.program.is_empty());
        assert_eq!(filter.program.len() % 8, 0);
        assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_LOG);
    }

    #[test]
    fn notifications_are_refused_by_name() {
        for (json, field) in [
            (
                serde_json::json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction ",
            ),
            (
                serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
                "linux.seccomp.listenerPath ",
            ),
            (
                serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390"]}),
                "linux.seccomp.architectures ",
            ),
        ] {
            let error = compiled(json).expect_err("refused").to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
