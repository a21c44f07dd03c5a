//! docs/oci-support.md has one row for each field of config.json that the types of the runtime-spec
//! know, and no others; and `bulkhead features` says the same.

mod fields;

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/oci-support.md");
const REFUSED: &str = "refused";
const WITHOUT_EFFECT: &str = "no effect";
const NOT_LINUX: &str = "not Linux";

/// Fields that the library has where the runtime-spec has none: they are unknown properties.
const NEVER_SPECIFIED: [&str; 2] = ["uidMappings", "gidMappings"];

/// The document's rows: where a field takes effect, by its path.
fn rows() -> BTreeMap<String, String> {
    let text = fs::read_to_string(Path::new(DOCUMENT)).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, path, place, note, _] = cells[..] else {
            panic!("not three cells: {line}");
        };
        let path = path.trim_matches('`').to_owned();
        let known = ["guest", "host", "both", REFUSED, WITHOUT_EFFECT, NOT_LINUX];
        assert!(known.contains(&place), "{place:?} in: {line}");
        let reasoned = ![REFUSED, WITHOUT_EFFECT].contains(&place) || !note.is_empty();
        assert!(reasoned, "no reason: {line}");
        let before = rows.insert(path, place.to_owned());
        assert!(before.is_none(), "twice: {line}");
    }
    rows
}

/// A row that refuses something speaks for everything below it.
fn covers(row: &str, place: &str, field: &str) -> bool {
    let below = || {
        field
            .strip_prefix(row)
            .is_some_and(|rest| rest.starts_with('.') || rest.starts_with("[]"))
    };
    row == field || ((place == REFUSED || place == NOT_LINUX) && below())
}

#[test]
fn every_field_has_a_row_and_every_row_a_field() {
    let rows = rows();
    let fields: Vec<String> = fields::of_config()
        .into_iter()
        .filter(|field| {
            let first = field.split(['.', '[']).next().unwrap_or_default();
            !NEVER_SPECIFIED.contains(&first)
        })
        .collect();
    let missing: Vec<_> = fields
        .iter()
        .filter(|field| !rows.iter().any(|(row, place)| covers(row, place, field)))
        .collect();
    assert!(missing.is_empty(), "fields without a row: {missing:#?}");
    let stale: Vec<_> = rows
        .iter()
        .filter(|(row, place)| !fields.iter().any(|field| covers(row, place, field)))
        .collect();
    assert!(stale.is_empty(), "rows without a field: {stale:#?}");
}

#[test]
fn the_program_says_the_same() {
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .arg("features")
        .output()
        .unwrap();
    let features: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = rows();
    let works = |field: &str| {
        let mut covering = rows.iter().filter(|(row, place)| covers(row, place, field));
        let (_, place) = covering.next().unwrap_or_else(|| panic!("no row: {field}"));
        ![REFUSED, WITHOUT_EFFECT, NOT_LINUX].contains(&place.as_str())
    };
    for (pointer, field) in [
        ("/linux/intelRdt/enabled", "linux.intelRdt.closID"),
        ("/linux/netDevices/enabled", "linux.netDevices.*.name"),
        ("/linux/memoryPolicy/enabled", "linux.memoryPolicy.mode"),
        ("/linux/seccomp/enabled", "linux.seccomp.defaultAction"),
        ("/linux/apparmor/enabled", "process.apparmorProfile"),
        ("/linux/selinux/enabled", "process.selinuxLabel"),
        ("/linux/cgroup/rdma", "linux.resources.rdma.*.hcaHandles"),
    ] {
        let said = features.pointer(pointer).and_then(Value::as_bool);
        assert_eq!(said, Some(works(field)), "{pointer}, {field}");
    }
    let hooks = features["hooks"].as_array().unwrap();
    for kind in bulkhead::hooks::KINDS {
        let works = works(&format!("hooks.{kind}[].path"));
        assert_eq!(hooks.iter().any(|hook| hook == kind), works, "{kind}");
    }
}
