//! Device access rules (`linux.resources.devices`) as an eBPF program of type
//! BPF_PROG_TYPE_CGROUP_DEVICE. The rules mean what they mean to the device controller of
//! cgroup v1: the last rule that speaks about an access (type, numbers, one of read, write and
//! mknod) decides it. Pure.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{
    bpf::{
        AND_CONSTANT, CONTEXT, EXIT, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, LOAD_WORD, MOVE_CONSTANT,
        MOVE_REGISTER, RESULT, SHIFT_RIGHT, instruction,
    },
    error::{Error, Result},
    sys::BpfInstruction,
};

/// Bits of `bpf_cgroup_dev_ctx.access_type` (include/uapi/linux/bpf.h): the device's type is in
/// the low half, the access in the high half.
const TYPE_BLOCK: i32 = 1;
const TYPE_CHARACTER: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const ACCESS_ALL: i32 = 7;

/// One rule; `None` stands for "any".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may use, whatever the spec says, as it has these devices by default:
/// making nodes is harmless, as using them is what the other rules decide.
const ALWAYS: [Rule; 10] = [
    allow(TYPE_CHARACTER, None, None, ACCESS_MKNOD),
    allow(TYPE_BLOCK, None, None, ACCESS_MKNOD),
    allow(TYPE_CHARACTER, Some(1), Some(3), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(1), Some(5), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(1), Some(7), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(1), Some(8), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(1), Some(9), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(5), Some(0), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(5), Some(2), ACCESS_ALL),
    allow(TYPE_CHARACTER, Some(136), None, ACCESS_ALL),
];

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// Checks the spec's rules and adds those that hold always.
pub(super) fn rules(devices: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut rules = Vec::with_capacity(devices.len() + ALWAYS.len());
    for (index, device) in devices.iter().enumerate() {
        rules.push(rule(&format!("linux.resources.devices[{index}]"), device)?);
    }
    rules.extend(ALWAYS);
    Ok(rules)
}

fn rule(field: &str, device: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |name: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(number) => i32::try_from(number)
            .ok()
            .filter(|n| *n >= 0)
            .map(Some)
            .ok_or_else(|| {
                let problem = format!("{number} is no number of a device");
                Error::invalid(format!("{field}.{name}"), problem)
            }),
    };
    let kind = match device.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(TYPE_BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(TYPE_CHARACTER),
        Some(LinuxDeviceType::P) => {
            let problem = "no rules exist for pipes; use a, b or c";
            return Err(Error::invalid(format!("{field}.type"), problem));
        }
    };
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => ACCESS_READ,
            'w' => ACCESS_WRITE,
            'm' => ACCESS_MKNOD,
            _ => {
                let problem = format!("{letter:?} is none of r, w and m");
                return Err(Error::invalid(format!("{field}.access"), problem));
            }
        };
    }
    Ok(Rule {
        allow: device.allow(),
        kind,
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        access: if access == 0 { ACCESS_ALL } else { access },
    })
}

// Registers of ours.
const KIND: u8 = 2;
/// The accesses that no rule has allowed yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// The program for the rules: the last rule is looked at first, each takes the accesses that it
/// decides out of those that are wanted.
pub(super) fn program(rules: &[Rule]) -> Vec<BpfInstruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, WANTED, KIND, 0, 0),
        instruction(AND_CONSTANT, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, WANTED, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(rule_instructions(rule));
    }
    program.extend(end(0));
    program
}

fn rule_instructions(rule: &Rule) -> Vec<BpfInstruction> {
    let verdict = if rule.allow {
        vec![
            instruction(AND_CONSTANT, WANTED, 0, 0, ACCESS_ALL & !rule.access),
            instruction(JUMP_IF_NOT_EQUAL, WANTED, 0, 2, 0),
        ]
    } else {
        vec![
            instruction(MOVE_REGISTER, SCRATCH, WANTED, 0, 0),
            instruction(AND_CONSTANT, SCRATCH, 0, 0, rule.access),
            instruction(JUMP_IF_EQUAL, SCRATCH, 0, 2, 0),
        ]
    };
    let body: Vec<_> = verdict.into_iter().chain(end(rule.allow.into())).collect();
    let conditions: Vec<_> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(register, value)| Some((register, value?)))
        .collect();
    let mut instructions = Vec::with_capacity(conditions.len() + body.len());
    for (index, &(register, value)) in conditions.iter().enumerate() {
        // Past the other conditions and the body: a handful of instructions.
        let distance = i16::try_from(conditions.len() - index - 1 + body.len()).unwrap_or(i16::MAX);
        instructions.push(instruction(JUMP_IF_NOT_EQUAL, register, 0, distance, value));
    }
    instructions.extend(body);
    instructions
}

fn end(result: i32) -> [BpfInstruction; 2] {
    [
        instruction(MOVE_CONSTANT, RESULT, 0, 0, result),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An access as the kernel describes it.
    #[derive(Clone, Copy, Debug)]
    struct Access {
        kind: i32,
        access: i32,
        major: i32,
        minor: i32,
    }

    /// Runs the few operations that programs here are made of.
    fn run(program: &[BpfInstruction], access: Access) -> i64 {
        let context = [
            access.access << 16 | access.kind,
            access.major,
            access.minor,
        ];
        let mut registers = [0i64; 11];
        let mut next = 0;
        loop {
            let i = program[next];
            let target = usize::from(i.registers & 0xf);
            let source = usize::from(i.registers >> 4);
            next += 1;
            let mut jump = |taken: bool| {
                if taken {
                    next += usize::try_from(i.offset).expect("forward");
                }
            };
            let immediate = i64::from(i.immediate);
            match i.code {
                LOAD_WORD => {
                    let word = usize::try_from(i.offset).expect("in context") / 4;
                    registers[target] = i64::from(context[word]);
                }
                MOVE_REGISTER => registers[target] = registers[source],
                MOVE_CONSTANT => registers[target] = immediate,
                AND_CONSTANT => registers[target] &= immediate,
                SHIFT_RIGHT => registers[target] >>= immediate,
                JUMP_IF_EQUAL => jump(registers[target] == immediate),
                JUMP_IF_NOT_EQUAL => jump(registers[target] != immediate),
                EXIT => return registers[0],
                code => panic!("unknown operation {code:#x}"),
            }
        }
    }

    /// What the rules mean, written down directly.
    fn allowed(rules: &[Rule], access: Access) -> bool {
        [ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE]
            .into_iter()
            .filter(|bit| access.access & bit != 0)
            .all(|bit| {
                let speaks = |rule: &&Rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|k| k == access.kind)
                        && rule.major.is_none_or(|m| m == access.major)
                        && rule.minor.is_none_or(|m| m == access.minor)
                };
                rules
                    .iter()
                    .rev()
                    .find(speaks)
                    .is_some_and(|rule| rule.allow)
            })
    }

    /// A small generator of repeatable numbers.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, bound: i32) -> i32 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            i32::try_from(self.0 >> 40).expect("24 bits") % bound
        }

        fn maybe(&mut self, bound: i32) -> Option<i32> {
            (self.below(3) > 0).then(|| self.below(bound))
        }
    }

    #[test]
    fn programs_mean_what_the_rules_mean() {
        let mut numbers = Numbers(1);
        for _ in 0..2000 {
            let rules: Vec<_> = (0..numbers.below(8))
                .map(|_| Rule {
                    allow: numbers.below(2) == 1,
                    kind: numbers.maybe(2).map(|k| k + 1),
                    major: numbers.maybe(3),
                    minor: numbers.maybe(3),
                    access: numbers.below(7) + 1,
                })
                .collect();
            let program = program(&rules);
            for _ in 0..20 {
                let access = Access {
                    kind: numbers.below(2) + 1,
                    access: numbers.below(7) + 1,
                    major: numbers.below(3),
                    minor: numbers.below(3),
                };
                let result = run(&program, access);
                assert_eq!(result == 1, allowed(&rules, access), "{rules:?} {access:?}");
            }
        }
    }

    fn from_json(json: serde_json::Value) -> Result<Vec<Rule>> {
        rules(&serde_json::from_value::<Vec<_>>(json).expect("rules"))
    }

    #[test]
    fn a_usual_spec() {
        let rules = from_json(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}
        ]))
        .expect("valid");
        let program = program(&rules);
        let access = |major, minor, access| {
            let kind = TYPE_CHARACTER;
            run(
                &program,
                Access {
                    kind,
                    access,
                    major,
                    minor,
                },
            )
        };
        assert_eq!(access(1, 3, ACCESS_READ | ACCESS_WRITE), 1, "/dev/null");
        assert_eq!(access(10, 229, ACCESS_READ), 1, "/dev/fuse");
        assert_eq!(access(136, 7, ACCESS_READ), 1, "a terminal");
        assert_eq!(access(1, 1, ACCESS_READ), 0, "/dev/mem");
        assert_eq!(access(1, 1, ACCESS_MKNOD), 1, "making a node");
    }

    #[test]
    fn wrong_rules_are_named() {
        for (wrong, field) in [
            (
                serde_json::json!([{"allow": true, "access": "x"}]),
                "access",
            ),
            (serde_json::json!([{"allow": true, "type": "p"}]), "type"),
            (serde_json::json!([{"allow": true, "major": -5}]), "major"),
        ] {
            let error = from_json(wrong).expect_err("refused").to_string();
            let expected = format!("linux.resources.devices[0].{field}:");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}
