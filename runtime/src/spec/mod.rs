//! The bundle's configuration: reading it with every error naming the field, and which of its
//! properties nobody knows. What the host side makes of it is in [`check`]; the guest's side is
//! judged by the agent, which gets the same bytes.

pub mod check;
mod file;
mod labels;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::oci::{self, ReadError};
use clap::ValueEnum;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::Deserialize;
use thiserror::Error;

pub use labels::{LabelError, Labels, LsmLabels};

/// Major and minor version of the runtime-spec that is implemented.
pub const VERSION: (u32, u32) = (1, 2);

/// What becomes of properties that the runtime-spec does not know
/// (docs/decisions/0004-unknown-properties.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum UnknownProperties {
    /// An error that names them.
    #[default]
    Refuse,
    /// Ignored, with a warning.
    Warn,
}

/// A configuration cannot be used.
#[derive(Debug, Error)]
pub enum SpecError {
    /// The bundle is not a directory that can be used.
    #[error("cannot use the bundle {path}")]
    Bundle {
        /// The bundle.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The beginning is runc's words.
    #[error("JSON specification file {0} not found; `bulkhead spec` makes one")]
    Missing(PathBuf),
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not JSON, or a value of the wrong type.
    #[error("{file}: {}{cause}", field_prefix(field))]
    Parse {
        /// The file.
        file: PathBuf,
        /// Path of the field, empty when the text is not JSON at all.
        field: String,
        /// What the parser says (its text is all there is to it).
        cause: String,
    },
    /// Properties that the runtime-spec does not know.
    #[error(
        "{file}: the runtime-spec knows no {}: remove {}, or pass --unknown-properties=warn",
        .fields.join(", "), if .fields.len() == 1 { "it" } else { "them" }
    )]
    Unknown {
        /// The file.
        file: PathBuf,
        /// Paths of the properties.
        fields: Vec<String>,
    },
    /// A value that cannot be used.
    #[error("config.json: {field}: {reason}")]
    Invalid {
        /// Path of the field.
        field: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A field that is understood but not supported.
    #[error("config.json: {field} is not supported: {reason}")]
    Unsupported {
        /// Path of the field.
        field: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The root filesystem or a mount's source; begins like runc's.
    #[error("config.json: {field}: cannot use {path}")]
    Path {
        /// Path of the field.
        field: String,
        /// The path that it names.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn field_prefix(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("{field}: ")
    }
}

/// A configuration that was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// config.json, byte for byte.
    pub bytes: Vec<u8>,
    /// The same, parsed.
    pub spec: Spec,
    /// Paths of properties that the runtime-spec does not know.
    pub unknown: Vec<String>,
    /// Names of capabilities that nobody knows, which count for nothing.
    pub unknown_capabilities: Vec<String>,
}

impl Loaded {
    /// Reads the bundle's config.json.
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let bundle_error = |source| SpecError::Bundle {
            path: bundle.to_owned(),
            source,
        };
        let bundle = fs::canonicalize(bundle).map_err(bundle_error)?;
        if !bundle.is_dir() {
            return Err(bundle_error(io::ErrorKind::NotADirectory.into()));
        }
        let file = bundle.join("config.json");
        let bytes = file::read_regular(&file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SpecError::Missing(file.clone()),
            _ => SpecError::Read {
                path: file.clone(),
                source,
            },
        })?;
        Self::parse(bundle, bytes)
    }

    /// Parses what was read from `<bundle>/config.json`.
    pub fn parse(bundle: PathBuf, bytes: Vec<u8>) -> Result<Self, SpecError> {
        let file = bundle.join("config.json");
        let mut read = oci::spec(&bytes).map_err(|error| malformed(&file, error))?;
        // The library knows these here, the runtime-spec only below `linux` and `mounts`.
        #[allow(deprecated)]
        let misplaced = [
            ("uidMappings", read.value.uid_mappings().is_some()),
            ("gidMappings", read.value.gid_mappings().is_some()),
        ];
        let misplaced = misplaced.into_iter().filter(|(_, given)| *given);
        read.unknown
            .extend(misplaced.map(|(name, _)| name.to_owned()));
        Ok(Self {
            bundle,
            bytes,
            spec: read.value,
            unknown: read.unknown,
            unknown_capabilities: read.unknown_capabilities,
        })
    }

    /// Judges properties that the runtime-spec does not know.
    pub fn judge_unknown(&self, rule: UnknownProperties) -> Result<(), SpecError> {
        let file = self.bundle.join("config.json");
        judge_unknown(&file, &self.unknown, self.spec.version(), rule)?;
        warn_of_capabilities(&file, &self.unknown_capabilities);
        Ok(())
    }
}

fn malformed(file: &Path, error: ReadError) -> SpecError {
    SpecError::Parse {
        file: file.to_owned(),
        field: error.field,
        cause: error.cause.to_string(),
    }
}

/// runtime-spec, config "Linux Process": capabilities that cannot be mapped are warned of.
fn warn_of_capabilities(file: &Path, names: &[String]) {
    if !names.is_empty() {
        let (file, names) = (file.display(), names.join(", "));
        tracing::warn!("{file}: unknown capabilities are left out: {names}");
    }
}

/// runtime-spec, "Extensibility", says that unknown properties are ignored; why they are not,
/// unless a newer version of it may know them, is told in
/// docs/decisions/0004-unknown-properties.md.
fn judge_unknown(
    file: &Path,
    fields: &[String],
    version: &str,
    rule: UnknownProperties,
) -> Result<(), SpecError> {
    if fields.is_empty() {
        return Ok(());
    }
    if rule == UnknownProperties::Refuse && !is_newer(version) {
        return Err(SpecError::Unknown {
            file: file.to_owned(),
            fields: fields.to_vec(),
        });
    }
    tracing::warn!(
        "{}: unknown properties are ignored: {}",
        file.display(),
        fields.join(", ")
    );
    Ok(())
}

/// Whether a configuration's version of the runtime-spec is newer than ours. Properties are added
/// with minor versions.
fn is_newer(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) > VERSION,
        _ => false,
    }
}

/// Reads a `process` object from a file, as `exec --process` takes it, for a container whose
/// configuration has this version.
pub fn read_process(
    file: &Path,
    version: &str,
    rule: UnknownProperties,
) -> Result<(Vec<u8>, Process), SpecError> {
    let bytes = file::read_regular(file).map_err(|source| SpecError::Read {
        path: file.to_owned(),
        source,
    })?;
    let read = oci::process(&bytes).map_err(|error| malformed(file, error))?;
    judge_unknown(file, &read.unknown, version, rule)?;
    warn_of_capabilities(file, &read.unknown_capabilities);
    Ok((bytes, read.value))
}

/// Reads a `linux.resources` object, as `update --resources` takes it: from a file, or from
/// standard input for `-`.
pub fn read_resources(
    file: &Path,
    version: &str,
    rule: UnknownProperties,
) -> Result<LinuxResources, SpecError> {
    let read = if file == Path::new("-") {
        file::read_bounded(io::stdin().lock())
    } else {
        file::read_regular(file)
    };
    let bytes = read.map_err(|source| SpecError::Read {
        path: file.to_owned(),
        source,
    })?;
    let read = oci::resources(&bytes).map_err(|error| malformed(file, error))?;
    judge_unknown(file, &read.unknown, version, rule)?;
    Ok(read.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(json: &str) -> Result<Loaded, SpecError> {
        Loaded::parse(PathBuf::from("/b"), json.as_bytes().to_vec())
    }

    #[test]
    fn errors_name_the_field() {
        let error =
            load(r#"{"ociVersion":"1.0.0","process":{"cwd":"/","args":["a",7],"user":{}}}"#)
                .unwrap_err()
                .to_string();
        assert!(error.contains("process.args[1]"), "{error}");
        let error = load(r#"{"linux":{"resources":{"memory":{"limit":"1G"}}}}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("linux.resources.memory.limit"), "{error}");
        for text in ["", "{", "[]", "nonsense", "{} {}"] {
            assert!(matches!(load(text), Err(SpecError::Parse { .. })), "{text}");
        }
    }

    #[test]
    fn unknown_properties_are_refused_by_name() {
        let text = r#"{"ociVersion":"1.0.0","x":1,"root":{"path":"r","y":{"z":2}}}"#;
        let loaded = load(text).unwrap();
        assert_eq!(loaded.unknown, ["root.y", "x"]);
        assert!(loaded.judge_unknown(UnknownProperties::Warn).is_ok());
        let error = loaded
            .judge_unknown(UnknownProperties::Refuse)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("root.y, x: remove them, or pass --unknown-properties=warn"),
            "{error}"
        );
        // A later version of the specification may know them.
        for (version, refused) in [
            ("1.2.1", true),
            ("1.2.0-rc.1", true),
            ("1.3.0", false),
            ("2.0.0", false),
            ("", true),
        ] {
            let loaded = load(&text.replace("1.0.0", version)).unwrap();
            let judged = loaded.judge_unknown(UnknownProperties::Refuse);
            assert_eq!(judged.is_err(), refused, "{version}");
        }
        let loaded = load(r#"{"ociVersion":"1.0.0","uidMappings":[]}"#).unwrap();
        assert_eq!(loaded.unknown, ["uidMappings"]);
    }

    #[test]
    fn a_process_without_a_user_is_roots() {
        for user in ["", r#","user":null"#] {
            let text = format!(r#"{{"ociVersion":"1.0.0","process":{{"cwd":"/"{user}}}}}"#);
            let loaded = load(&text).unwrap();
            assert_eq!(loaded.spec.process().as_ref().unwrap().user().uid(), 0);
        }
    }

    #[test]
    fn capabilities_that_nobody_knows_count_for_nothing() {
        let text = r#"{"ociVersion":"1.1.0","process":{"cwd":"/",
            "capabilities":{"bounding":["CAP_KILL","CAP_TELEPORT"]}}}"#;
        let loaded = load(text).unwrap();
        assert_eq!(loaded.unknown_capabilities, ["CAP_TELEPORT"]);
        assert!(loaded.judge_unknown(UnknownProperties::Refuse).is_ok());
    }

    #[test]
    fn a_list_in_place_of_an_object_is_refused_by_name() {
        for (text, field) in [
            (
                r#"{"ociVersion":"1.0.0","process":{"cwd":"/","user":[0,0]}}"#,
                "process.user",
            ),
            (r#"{"ociVersion":"1.0.0","root":["r",true]}"#, "root"),
            (
                r#"{"ociVersion":"1.0.0","linux":{"namespaces":[["pid"]]}}"#,
                "linux.namespaces[0]",
            ),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{field}: ")), "{error}");
        }
    }
}
