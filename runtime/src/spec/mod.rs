//! The bundle's configuration: reading it with every error naming the field, and which of its
//! properties nobody knows. What the host side makes of it is in [`check`]; the guest's side is
//! judged by the agent, which gets the same bytes.

pub mod check;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use thiserror::Error;

/// What fits into one request to the agent, with room for the rest of it.
const LONGEST: u64 = (4 << 20) - (64 << 10);

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
    /// Properties that the runtime-spec does not know, refused only because it was asked for.
    #[error("{file}: unknown properties {}; leave --strict out to ignore them", .fields.join(", "))]
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
        let bytes = read_regular(&file).map_err(|source| match source.kind() {
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
        let (spec, unknown) = parse(&bundle.join("config.json"), &bytes)?;
        Ok(Self {
            bundle,
            bytes,
            spec,
            unknown,
        })
    }

    /// runtime-spec, "Extensibility": unknown properties are ignored, with a warning; unless the
    /// user wants none.
    pub fn judge_unknown(&self, strict: bool) -> Result<(), SpecError> {
        if self.unknown.is_empty() {
            return Ok(());
        }
        let file = self.bundle.join("config.json");
        if strict {
            return Err(SpecError::Unknown {
                file,
                fields: self.unknown.clone(),
            });
        }
        tracing::warn!(
            "{}: unknown properties are ignored: {}",
            file.display(),
            self.unknown.join(", ")
        );
        Ok(())
    }
}

/// Reads a `process` object from a file, as `exec --process` takes it.
pub fn read_process(file: &Path) -> Result<(Vec<u8>, Process), SpecError> {
    let bytes = read_regular(file).map_err(|source| SpecError::Read {
        path: file.to_owned(),
        source,
    })?;
    let (process, unknown): (Process, _) = parse(file, &bytes)?;
    if !unknown.is_empty() {
        tracing::warn!(
            "{}: unknown properties are ignored: {}",
            file.display(),
            unknown.join(", ")
        );
    }
    Ok((bytes, process))
}

/// Reads a file that someone else may have put there: a FIFO must not hold us up, nor may a device
/// give without end.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
        return Err(io::Error::other(format!(
            "it has more than {LONGEST} bytes"
        )));
    }
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(file: &Path, bytes: &[u8]) -> Result<(T, Vec<String>), SpecError> {
    // The parser would take a list for an object's fields in order.
    if bytes
        .iter()
        .find(|byte| !byte.is_ascii_whitespace())
        .is_some_and(|byte| *byte != b'{')
    {
        return Err(SpecError::Parse {
            file: file.to_owned(),
            field: String::new(),
            cause: "it is not a JSON object".to_owned(),
        });
    }
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
    let mut track = serde_path_to_error::Track::new();
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let failed = |field: String, cause: serde_json::Error| SpecError::Parse {
        file: file.to_owned(),
        field,
        cause: cause.to_string(),
    };
    let value = match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note)) {
        Ok(value) => value,
        Err(cause) => {
            let path = track.path().to_string();
            return Err(failed(
                if path == "." { String::new() } else { path },
                cause,
            ));
        }
    };
    json.end().map_err(|cause| failed(String::new(), cause))?;
    // A path element `?` stands for an optional value: it is not part of the field's name.
    for path in &mut unknown {
        *path = path.replace(".?", "");
    }
    Ok((value, unknown))
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
    fn unknown_properties_are_named() {
        let loaded = load(r#"{"ociVersion":"1.0.0","x":1,"root":{"path":"r","y":{"z":2}}}"#);
        let loaded = loaded.unwrap();
        assert_eq!(loaded.unknown, ["x", "root.y"]);
        assert!(loaded.judge_unknown(false).is_ok());
        let error = loaded.judge_unknown(true).unwrap_err().to_string();
        assert!(error.contains("x, root.y"), "{error}");
    }
}
