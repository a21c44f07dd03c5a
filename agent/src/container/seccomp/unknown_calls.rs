//! System calls that are newer than a profile. A profile refuses what it does not name, usually with
//! EPERM; but programs try new calls and fall back on older ones when they hear ENOSYS, which is
//! what they would hear from a kernel as old as the profile. So a call whose number is above all
//! that the profile names gets ENOSYS, as with runc. This makes the instructions that go in front
//! of libseccomp's program (linux/filter.h).

use libseccomp::{ScmpArch, ScmpSyscall};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

const LOAD: u16 = 0x20; // LD | W | ABS
const JUMP: u16 = 0x05; // JMP | JA
const JUMP_IF_EQUAL: u16 = 0x15; // JMP | JEQ | K
const JUMP_IF_ABOVE: u16 = 0x25; // JMP | JGT | K
const JUMP_IF_NOT_BELOW: u16 = 0x35; // JMP | JGE | K
const RETURN: u16 = 0x06; // RET | K

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// Calls of the x32 ABI have this bit and x86-64's architecture; nobody judges them here.
const X32: u32 = 0x4000_0000;
const REFUSE: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();

/// AUDIT_ARCH_* (linux/audit.h) of the architectures that a guest's programs can be of.
const ARCHITECTURES: [(ScmpArch, u32); 2] =
    [(ScmpArch::X8664, 0xc000_003e), (ScmpArch::X86, 0x4000_0003)];

/// The instructions, as bytes in memory order; none where the profile lets pass what it does not
/// name.
pub(super) fn refusal(profile: &LinuxSeccomp, architectures: &[ScmpArch]) -> Vec<u8> {
    use LinuxSeccompAction::{ScmpActAllow, ScmpActLog, ScmpActTrace};
    let permissive = [ScmpActAllow, ScmpActLog, ScmpActTrace].contains(&profile.default_action());
    if permissive || profile.default_errno_ret() == Some(libc::ENOSYS.unsigned_abs()) {
        return Vec::new();
    }
    let blocks: Vec<_> = ARCHITECTURES
        .iter()
        .filter(|(architecture, _)| architectures.contains(architecture))
        .filter_map(|&(architecture, token)| Some((token, last_call(profile, architecture)?)))
        .collect();
    if blocks.is_empty() {
        return Vec::new();
    }
    let mut program = vec![instruction(LOAD, 0, 0, ARCHITECTURE)];
    for (index, &(token, last)) in blocks.iter().enumerate() {
        // Each block is 6 long, and the accumulator holds the architecture before it.
        let behind = u32::try_from((blocks.len() - 1 - index) * 6).unwrap_or(0);
        program.extend([
            instruction(JUMP_IF_EQUAL, 0, 5, token),
            instruction(LOAD, 0, 0, NUMBER),
            instruction(JUMP_IF_NOT_BELOW, 2, 0, X32),
            instruction(JUMP_IF_ABOVE, 0, 1, last),
            instruction(RETURN, 0, 0, REFUSE),
            instruction(JUMP, 0, 0, behind),
        ]);
    }
    program.into_iter().flatten().collect()
}

/// The highest number that the profile names.
fn last_call(profile: &LinuxSeccomp, architecture: ScmpArch) -> Option<u32> {
    let rules = profile.syscalls().iter().flatten();
    let names = rules.flat_map(|rule| rule.names());
    // Negative numbers are libseccomp's own, for calls that the architecture does not have.
    let number = |name: &String| {
        let call = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
        u32::try_from(i32::from(call)).ok()
    };
    names.filter_map(number).max()
}

/// `struct sock_filter`.
fn instruction(code: u16, if_true: u8, if_false: u8, value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&code.to_ne_bytes());
    bytes[2] = if_true;
    bytes[3] = if_false;
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    bytes
}
