//! Reading OCI documents, the same on both sides of the contract: as tolerant as the spec and other
//! runtimes are, as strict as its schema is, and with the field's name in every error.

use std::collections::BTreeSet;

use oci_spec::runtime::{Capability, LinuxResources, Process, Spec};
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor},
    forward_to_deserialize_any,
};
use serde_json::{Value, json};

use crate::unique::Unique;

/// The options of mounts that are not a filesystem's data (runtime-spec config.md "Linux mount
/// options"): the agent honours each, and `features` lists them.
pub const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdefaults",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// A document that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Read<T> {
    /// What it says.
    pub value: T,
    /// Paths of properties that the spec does not know. They are to be ignored (runtime-spec
    /// config.md "Extensibility").
    pub unknown: Vec<String>,
    /// Names of capabilities that nobody knows. They are left out, with a warning (runtime-spec
    /// config.md "Linux Process", `capabilities`). In a `config.json` of version 1.0 they are an
    /// error, as that version says; 1.1 has changed it.
    pub unknown_capabilities: Vec<String>,
}

/// A document that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}{cause}", prefix(field))]
pub struct ReadError {
    /// Path of the field; empty where the text is not JSON at all.
    pub field: String,
    /// What is wrong with it. Not a source, as its text stands in the message.
    pub cause: serde_json::Error,
}

fn prefix(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("{field}: ")
    }
}

/// Reads a `config.json`.
pub fn spec(bytes: &[u8]) -> Result<Read<Spec>, ReadError> {
    let read: Read<Spec> = read(bytes, |document| document.get_mut("process"))?;
    match read.unknown_capabilities.first() {
        Some(name) if read.value.version().starts_with("1.0.") => Err(ReadError {
            field: "process.capabilities".to_owned(),
            cause: de::Error::custom(format!(
                "{name:?} is unknown, which is an error by version 1.0 of the specification \
                 (ociVersion): leave it out, or name version 1.1"
            )),
        }),
        _ => Ok(read),
    }
}

/// Reads a `process` object, as `exec` takes it.
pub fn process(bytes: &[u8]) -> Result<Read<Process>, ReadError> {
    read(bytes, whole)
}

fn whole(document: &mut Value) -> Option<&mut Value> {
    Some(document)
}

/// Reads a `linux.resources` object, as `update` takes it.
pub fn resources(bytes: &[u8]) -> Result<Read<LinuxResources>, ReadError> {
    read(bytes, |_| None)
}

fn read<T: DeserializeOwned>(
    bytes: &[u8],
    process: impl Fn(&mut Value) -> Option<&mut Value>,
) -> Result<Read<T>, ReadError> {
    let no_json = |cause| ReadError {
        field: String::new(),
        cause,
    };
    let Unique(mut document) = serde_json::from_slice(bytes).map_err(no_json)?;
    let mut unknown_capabilities = BTreeSet::new();
    if let Some(process) = process(&mut document).and_then(Value::as_object_mut) {
        // Without a user it is root, as with runc.
        if process.get("user").is_none_or(Value::is_null) {
            process.insert("user".to_owned(), json!({}));
        }
        let sets = process.get_mut("capabilities");
        for set in sets.and_then(Value::as_object_mut).into_iter().flatten() {
            let names = set.1.as_array_mut();
            names.into_iter().for_each(|names| {
                unknown_capabilities.extend(take_unknown_capabilities(names));
            });
        }
    }
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(path.to_string().replace(".?", ""));
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(Strict(document), &mut track);
    let value = T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note));
    let value = value.map_err(|cause| {
        let path = track.path().to_string();
        let field = if path == "." { String::new() } else { path };
        ReadError { field, cause }
    })?;
    Ok(Read {
        value,
        unknown,
        unknown_capabilities: unknown_capabilities.into_iter().collect(),
    })
}

/// Takes the texts that name no capability out of a list.
fn take_unknown_capabilities(names: &mut Vec<Value>) -> Vec<String> {
    let is_unknown = |name: &Value| name.is_string() && Capability::deserialize(name).is_err();
    let (unknown, known) = std::mem::take(names).into_iter().partition(is_unknown);
    *names = known;
    let unknown: Vec<Value> = unknown;
    let text = |name: Value| name.as_str().map(str::to_owned);
    unknown.into_iter().filter_map(text).collect()
}

/// A deserializer that takes an object where an object is due. Those that serde derives take a
/// list of its fields as well.
struct Strict<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(Strict(visitor))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(Strict(visitor))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_option(Strict(visitor))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        // The spec's enums are plain names.
        self.0.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map identifier ignored_any
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Strict<V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.expecting(formatter)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<V::Value, E> {
        self.0.visit_bool(value)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<V::Value, E> {
        self.0.visit_i64(value)
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<V::Value, E> {
        self.0.visit_u64(value)
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<V::Value, E> {
        self.0.visit_f64(value)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<V::Value, E> {
        self.0.visit_str(value)
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<V::Value, E> {
        self.0.visit_string(value)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Strict(value))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Strict(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Strict(list))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        self.0.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Strict(seed))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Strict(seed))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Strict<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Strict(deserializer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        spec(text.as_bytes()).expect_err("refused").to_string()
    }

    #[test]
    fn a_list_is_no_object() {
        for (text, field) in [
            (r#"["1.0.2"]"#, ""),
            (
                r#"{"ociVersion": "1.0.2", "root": ["rootfs", true]}"#,
                "root: ",
            ),
            (
                r#"{"ociVersion": "1.0.2", "process": {"cwd": "/", "user": [0, 0]}}"#,
                "process.user: ",
            ),
            (
                r#"{"ociVersion": "1.0.2", "linux": {"resources": {"pids": [5]}}}"#,
                "linux.resources.pids: ",
            ),
            (
                r#"{"ociVersion": "1.0.2", "mounts": [{"destination": "/a"}, ["/b"]]}"#,
                "mounts[1]: ",
            ),
        ] {
            let error = error(text);
            assert!(error.starts_with(field), "{error}");
            assert!(error.contains("invalid type: sequence"), "{error}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let text = r#"{"ociVersion": "1.0.2", "process": {"cwd": "/", "args": ["a", 7]}}"#;
        assert!(
            error(text).starts_with("process.args[1]: "),
            "{}",
            error(text)
        );
        let text = r#"{"ociVersion": "1.0.2", "linux": {"rootfsPropagation": {}}}"#;
        assert!(error(text).starts_with("linux.rootfsPropagation: "));
        assert!(error("{").contains("EOF"));
        assert!(error("{} {}").contains("trailing"));
    }

    #[test]
    fn a_process_without_user_is_root() {
        for user in ["", r#""user": null,"#, r#""user": {},"#] {
            let text = format!(r#"{{{user} "cwd": "/", "args": ["sh"]}}"#);
            let process = process(text.as_bytes()).expect("read").value;
            assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        }
        let text = r#"{"ociVersion": "1.0.2", "process": {"cwd": "/"}}"#;
        assert!(
            spec(text.as_bytes())
                .expect("read")
                .value
                .process()
                .is_some()
        );
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let text = r#"{"cwd": "/", "capabilities": {
            "bounding": ["CAP_KILL", "CAP_NOTHING"], "effective": ["CAP_NOTHING", ""]}}"#;
        let read = process(text.as_bytes()).expect("read");
        assert_eq!(read.unknown_capabilities, ["", "CAP_NOTHING"]);
        let sets = read.value.capabilities().clone().expect("sets");
        assert_eq!(sets.bounding().as_ref().map(|set| set.len()), Some(1));
        let text = r#"{"cwd": "/", "capabilities": {"bounding": [7]}}"#;
        let error = process(text.as_bytes()).expect_err("refused").to_string();
        assert!(error.starts_with("capabilities.bounding[0]: "), "{error}");
    }

    #[test]
    fn unknown_capabilities_are_an_error_by_version_1_0() {
        let text = |version: &str| {
            format!(
                r#"{{"ociVersion": "{version}", "process": {{"cwd": "/", "capabilities":
                {{"bounding": ["CAP_NOTHING"]}}}}}}"#
            )
        };
        for version in ["1.0.0", "1.0.2", "1.0.2-dev"] {
            let error = error(&text(version));
            let expected = "process.capabilities: \"CAP_NOTHING\" is unknown";
            assert!(error.starts_with(expected), "{error}");
        }
        for version in ["1.1.0", "1.1.0-rc.1", "1.2.0", "1.10.0"] {
            let read = spec(text(version).as_bytes()).expect("read");
            assert_eq!(read.unknown_capabilities, ["CAP_NOTHING"]);
        }
    }

    #[test]
    fn unknown_properties_are_told() {
        let text = r#"{"ociVersion": "1.0.2", "x": 1, "root": {"path": "r", "y": [2]}}"#;
        let mut unknown = spec(text.as_bytes()).expect("read").unknown;
        unknown.sort();
        assert_eq!(unknown, ["root.y", "x"]);
    }

    #[test]
    fn what_other_programs_write_is_read() {
        // `null` stands for "not there" in what Go writes.
        let text = r#"{"ociVersion": "1.0.2", "mounts": null, "hooks": null, "annotations": null,
            "process": {"cwd": "/", "args": null, "env": null, "rlimits": null, "capabilities": null},
            "linux": {"resources": {"memory": null, "devices": [{"allow": false, "access": "rwm"}],
            "cpu": {"shares": 1024, "quota": null}}, "namespaces": [{"type": "pid", "path": ""}]}}"#;
        assert!(spec(text.as_bytes()).expect("read").unknown.is_empty());
        let limits = r#"{"memory": {"limit": 5, "checkBeforeUpdate": true}}"#;
        let limits = resources(limits.as_bytes()).expect("read").value;
        assert_eq!(limits.memory().expect("memory").limit(), Some(5));
    }
}
