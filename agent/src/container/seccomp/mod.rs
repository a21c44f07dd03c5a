//! The spec's seccomp profile as a program for the kernel, through libseccomp. It is made once per
//! container, in the agent; processes only install it.

mod unknown_calls;

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
    let mut architectures = vec![ScmpArch::native()];
    for architecture in profile.architectures().iter().flatten() {
        architectures.push(add_architecture(&mut context, *architecture)?);
    }
    for (index, syscalls) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        add_syscalls(&mut context, &field, syscalls, default)?;
    }
    Ok(Filter {
        program: [
            unknown_calls::refusal(profile, &architectures),
            export(&context)?,
        ]
        .concat(),
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
    let number = || {
        let value = value.unwrap_or(libc::EPERM.unsigned_abs());
        u16::try_from(value).map_err(|_| {
            let field = format!("{field} (errnoRet)");
            Error::invalid(field, format!("{value} is more than 65535"))
        })
    };
    let plain = match action {
        LinuxSeccompAction::ScmpActErrno => return Ok(ScmpAction::Errno(number()?.into())),
        LinuxSeccompAction::ScmpActTrace => return Ok(ScmpAction::Trace(number()?)),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(notify_refused(field)),
    };
    // runtime-spec config-linux.md "Seccomp": an errno for an action that has none must fail.
    match value {
        None => Ok(plain),
        Some(_) => Err(Error::invalid(
            format!("{field} (errnoRet)"),
            format!("{action} returns no number; remove errnoRet"),
        )),
    }
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

/// Adds an architecture to those that the filter knows; one that is there already (the native one)
/// is no error.
fn add_architecture(context: &mut ScmpFilterContext, asked: Arch) -> Result<ScmpArch> {
    let refused = |why: String| {
        let reason = format!("{why}; remove it");
        Error::unsupported(format!("linux.seccomp.architectures {asked}"), reason)
    };
    let architecture = match asked {
        Arch::ScmpArchNative => Ok(ScmpArch::native()),
        named => named.to_string().parse::<ScmpArch>(),
    };
    let architecture =
        architecture.map_err(|_| refused("this build does not know it".to_owned()))?;
    let added = match context.is_arch_present(architecture) {
        Ok(false) => context.add_arch(architecture).map(drop),
        present => present.map(drop),
    };
    added.map_err(|error| refused(format!("the filter cannot hold it ({error})")))?;
    Ok(architecture)
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
mod tests;
