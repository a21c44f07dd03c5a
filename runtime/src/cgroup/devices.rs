//! `linux.resources.devices` in the `devices` hierarchy of cgroup v1. What the container may use is
//! decided in the guest, whose devices these are; on the host the same rules hold for the processes
//! of the sandbox, which have opened what they need before they enter the cgroup. Version 2 has no
//! file for such rules, and there the guest's are all.

use std::{fs, io, path::Path};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

/// One line for one of the hierarchy's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    line: String,
}

/// After the container's own, as in the guest: any node may be made (the guest decides first, and
/// what it makes on the share is made here).
const ALWAYS: [&str; 2] = ["c *:* m", "b *:* m"];

/// The lines for a configuration's rules, in their order. Rules that make no sense are left to the
/// guest, which refuses them by name.
pub(super) fn rules(devices: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let mut rules: Vec<Rule> = devices.iter().flat_map(lines).collect();
    if !rules.is_empty() {
        rules.extend(ALWAYS.map(|line| Rule {
            allow: true,
            line: line.to_owned(),
        }));
    }
    rules
}

fn lines(device: &LinuxDeviceCgroup) -> Vec<Rule> {
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Some("*".to_owned()),
        Some(number) => u32::try_from(number).ok().map(|number| number.to_string()),
    };
    let access = device
        .access()
        .as_deref()
        .filter(|access| !access.is_empty());
    let access = access.unwrap_or("rwm");
    let known = access.chars().all(|letter| "rwm".contains(letter));
    let (Some(major), Some(minor), true) = (number(device.major()), number(device.minor()), known)
    else {
        return Vec::new();
    };
    // Whatever follows an `a`, the kernel takes it for every access to every device.
    let everything = (major.as_str(), minor.as_str(), access.len()) == ("*", "*", 3);
    let kinds: &[&str] = match device.typ() {
        Some(LinuxDeviceType::B) => &["b"],
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => &["c"],
        Some(LinuxDeviceType::P) => &[],
        None | Some(LinuxDeviceType::A) if everything => &["a"],
        None | Some(LinuxDeviceType::A) => &["b", "c"],
    };
    let rule = |kind: &&str| Rule {
        allow: device.allow(),
        line: format!("{kind} {major}:{minor} {access}"),
    };
    kinds.iter().map(rule).collect()
}

/// Writes the rules into a cgroup.
pub(super) fn write(place: &Path, rules: &[Rule]) -> Result<(), CgroupError> {
    for rule in rules {
        let file = ["devices.deny", "devices.allow"][usize::from(rule.allow)];
        let path = place.join(file);
        match fs::write(&path, &rule.line) {
            // A cgroup cannot allow what the one above it does not: nothing of the sandbox needs
            // the host's device, and in the guest the rule holds.
            Err(error) if rule.allow && error.kind() == io::ErrorKind::PermissionDenied => {}
            result => result.map_err(|source| CgroupError::Limit {
                value: rule.line.clone(),
                path,
                source,
            })?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn shown(devices: Value) -> Vec<String> {
        let devices: Vec<LinuxDeviceCgroup> = serde_json::from_value(devices).unwrap();
        let show = |rule: Rule| format!("{}{}", if rule.allow { '+' } else { '-' }, rule.line);
        rules(&devices).into_iter().map(show).collect()
    }

    #[test]
    fn rules_keep_their_order() {
        let shown = shown(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": -1, "access": "rw"},
            {"allow": true, "type": "u", "major": 4},
            {"allow": false, "type": "a", "major": 1, "minor": 3},
        ]));
        assert_eq!(
            shown[..6],
            [
                "-a *:* rwm",
                "+c 10:229 rwm",
                "+b 8:* rw",
                "+c 4:* rwm",
                "-b 1:3 rwm",
                "-c 1:3 rwm"
            ]
        );
        assert_eq!(shown[6..], ALWAYS.map(|line| format!("+{line}")));
    }

    #[test]
    fn what_the_guest_refuses_is_not_written() {
        for device in [
            json!({"allow": true, "type": "p"}),
            json!({"allow": true, "type": "c", "major": -2}),
            json!({"allow": true, "access": "x\nc 1:1 r"}),
        ] {
            assert!(shown(json!([device])).is_empty());
        }
        assert!(shown(json!([])).is_empty());
    }

    #[test]
    fn lines_go_where_they_belong() {
        let directory = tempfile::tempdir().unwrap();
        let devices: Vec<LinuxDeviceCgroup> =
            serde_json::from_value(json!([{"allow": false, "access": "rwm"}])).unwrap();
        write(directory.path(), &rules(&devices)).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("devices.deny"), "a *:* rwm");
        assert_eq!(read("devices.allow"), ALWAYS[1]);
        let error = write(&directory.path().join("gone"), &rules(&devices)).unwrap_err();
        assert!(error.to_string().contains("devices.deny"), "{error}");
    }
}
