//! Profiles in JSON, and what their programs answer.

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

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

const ALLOWED: u32 = 0x7fff_0000;
const KILLED: u32 = 0;
const KILLED_PROCESS: u32 = 0x8000_0000;
const TRAPPED: u32 = 0x0003_0000;
const TRACED: u32 = 0x7ff0_0000;
const LOGGED: u32 = 0x7ffc_0000;

fn refused(errno: i32) -> u32 {
    0x0005_0000 | errno.unsigned_abs()
}

/// Runs a program of classic BPF as the kernel would (linux/filter.h), on struct seccomp_data.
fn answer(filter: &Filter, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(architecture.to_ne_bytes());
    data.extend(0u64.to_ne_bytes());
    data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes[..4].try_into().expect("four"));
    let at = |value: u32| usize::try_from(value).expect("fits");
    let mut accumulator = 0;
    let mut memory = [0; 16];
    let mut next = 0;
    loop {
        let i = &filter.program[next * 8..][..8];
        let (code, value) = (u16::from_ne_bytes([i[0], i[1]]), word(&i[4..]));
        next += 1;
        let mut jump = |taken: bool| next += usize::from(if taken { i[2] } else { i[3] });
        match code {
            0x20 => accumulator = word(&data[at(value)..]),
            0x60 => accumulator = memory[at(value)],
            0x02 => memory[at(value)] = accumulator,
            0x54 => accumulator &= value,
            0x15 => jump(accumulator == value),
            0x25 => jump(accumulator > value),
            0x35 => jump(accumulator >= value),
            0x45 => jump(accumulator & value != 0),
            0x05 => next += at(value),
            0x06 => return value,
            code => panic!("unknown operation {code:#x}"),
        }
    }
}

fn answers(filter: &Filter, number: u32) -> u32 {
    answer(filter, X86_64, number, [0; 6])
}

// Numbers of x86-64.
const READ: u32 = 0;
const PERSONALITY: u32 = 135;
const FACCESSAT2: u32 = 439;

#[test]
fn every_action_answers() {
    for (action, expected) in [
        ("SCMP_ACT_KILL", KILLED),
        ("SCMP_ACT_KILL_THREAD", KILLED),
        ("SCMP_ACT_KILL_PROCESS", KILLED_PROCESS),
        ("SCMP_ACT_TRAP", TRAPPED),
        ("SCMP_ACT_ERRNO", refused(libc::EPERM)),
        ("SCMP_ACT_TRACE", TRACED | libc::EPERM.unsigned_abs()),
        ("SCMP_ACT_LOG", LOGGED),
    ] {
        let filter = compiled(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["personality"], "action": action}]}))
        .expect(action);
        assert_eq!(answers(&filter, PERSONALITY), expected, "{action}");
        assert_eq!(answers(&filter, READ), ALLOWED, "{action}");
        let filter = compiled(serde_json::json!({"defaultAction": action,
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}, {"names": ["faccessat2"], "action": "SCMP_ACT_ALLOW"}]}))
        .expect(action);
        assert_eq!(answers(&filter, PERSONALITY), expected, "{action}");
        assert_eq!(answers(&filter, READ), ALLOWED, "{action}");
    }
}

#[test]
fn errnos_are_the_specs() {
    let filter = compiled(
        serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5,
        "syscalls": [{"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7},
            {"names": ["faccessat2"], "action": "SCMP_ACT_ALLOW"}]}),
    )
    .expect("valid");
    assert_eq!(answers(&filter, PERSONALITY), refused(7));
    assert_eq!(answers(&filter, READ), refused(5));
    for (json, field) in [
        (
            serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
            "linux.seccomp.defaultAction (errnoRet): ",
        ),
        (
            serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]}),
            "linux.seccomp.syscalls[0].action (errnoRet): ",
        ),
        (
            serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 65_536}),
            "linux.seccomp.defaultAction (errnoRet): ",
        ),
    ] {
        let error = compiled(json).expect_err("refused").to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let profile = |default: &str| {
        serde_json::json!({"defaultAction": default,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["read", "faccessat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]})
    };
    let filter = compiled(profile("SCMP_ACT_ERRNO")).expect("valid");
    let newer = FACCESSAT2 + 1;
    assert_eq!(answers(&filter, FACCESSAT2), ALLOWED);
    assert_eq!(answers(&filter, PERSONALITY), refused(libc::EPERM));
    assert_eq!(answers(&filter, newer), refused(libc::ENOSYS));
    assert_eq!(answers(&filter, u32::MAX), refused(libc::EPERM));
    // i386 has the same number for this call, and 3 for read.
    assert_eq!(answer(&filter, I386, 3, [0; 6]), ALLOWED);
    assert_eq!(answer(&filter, I386, 5, [0; 6]), refused(libc::EPERM));
    assert_eq!(answer(&filter, I386, newer, [0; 6]), refused(libc::ENOSYS));
    // x32's read.
    assert_eq!(answers(&filter, 0x4000_0000), ALLOWED);
    assert_eq!(answers(&filter, 0x4000_0000 + newer), refused(libc::EPERM));
    let permissive = compiled(profile("SCMP_ACT_LOG")).expect("valid");
    assert_eq!(answers(&permissive, newer), LOGGED);
}

#[test]
fn arguments_decide() {
    let filter = compiled(serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 2, "value": 0xff00, "valueTwo": 0x1200, "op": "SCMP_CMP_MASKED_EQ"},
            {"index": 1, "value": 1u64 << 40, "op": "SCMP_CMP_GE"}]},
        {"names": ["faccessat2"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]},
    ]}))
    .expect("valid");
    let allows =
        |number, arguments: [u64; 6]| answer(&filter, X86_64, number, arguments) == ALLOWED;
    assert!(allows(PERSONALITY, [8, 0, 0, 0, 0, 0]));
    assert!(!allows(PERSONALITY, [9, 0, 0, 0, 0, 0]));
    assert!(allows(READ, [0, 1 << 40, 0x12ff, 0, 0, 0]));
    assert!(!allows(READ, [0, 1 << 39, 0x12ff, 0, 0, 0]));
    assert!(!allows(READ, [0, 1 << 40, 0x13ff, 0, 0, 0]));
    // Two conditions on one argument: either is enough.
    assert!(allows(FACCESSAT2, [1, 0, 0, 0, 0, 0]));
    assert!(allows(FACCESSAT2, [2, 0, 0, 0, 0, 0]));
    assert!(!allows(FACCESSAT2, [3, 0, 0, 0, 0, 0]));
}
