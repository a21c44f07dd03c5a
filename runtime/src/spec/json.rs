//! From JSON to the types of the runtime-spec, with every error naming the field: types that are
//! wrong, lists where objects belong, and which properties nobody knows. What the properties mean
//! is not judged here.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use rustix::fs::{Mode, OFlags};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::SpecError;

/// What fits into one request to the agent, with room for the rest of it.
const LONGEST: u64 = (4 << 20) - (64 << 10);

fn malformed(file: &Path, field: impl Into<String>, cause: impl ToString) -> SpecError {
    SpecError::Parse {
        file: file.to_owned(),
        field: field.into(),
        cause: cause.to_string(),
    }
}

/// Reads a file that someone else may have put there: a FIFO must not hold us up, nor may a device
/// give without end.
pub(super) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    read_bounded(file)
}

/// Reads to the end of what may not be longer than a configuration.
pub(super) fn read_bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
        return Err(io::Error::other(format!(
            "it has more than {LONGEST} bytes"
        )));
    }
    Ok(bytes)
}

/// The JSON without the types: an object, or an error.
pub(super) fn object(file: &Path, bytes: &[u8]) -> Result<Value, SpecError> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|cause| malformed(file, String::new(), cause))?;
    if !value.is_object() {
        return Err(malformed(file, "", "it is not a JSON object"));
    }
    Ok(value)
}

/// runc takes a process without a user for root's (the types of the specification in Go have no
/// optional objects). True when the user had to be added.
pub(super) fn complete_user(process: &mut Value) -> bool {
    let Some(process) = process.as_object_mut() else {
        return false;
    };
    let missing = process.get("user").is_none_or(Value::is_null);
    if missing {
        process.insert("user".to_owned(), serde_json::json!({"uid": 0, "gid": 0}));
    }
    missing
}

/// The typed value, and the paths of properties that the type does not have.
pub(super) fn typed<T: DeserializeOwned>(
    file: &Path,
    bytes: &[u8],
) -> Result<(T, Vec<String>), SpecError> {
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
    let mut track = serde_path_to_error::Track::new();
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let value = match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note)) {
        Ok(value) => value,
        Err(cause) => {
            let path = track.path().to_string();
            let path = if path == "." { String::new() } else { path };
            return Err(malformed(file, path, cause));
        }
    };
    json.end().map_err(|cause| malformed(file, "", cause))?;
    // A path element `?` stands for an optional value: it is not part of the field's name.
    for path in &mut unknown {
        *path = path.replace(".?", "");
    }
    Ok((value, unknown))
}

/// The parser takes a list for an object's fields in their order. Nobody writes that on purpose,
/// so it is refused: what was read as an object must have been one.
pub(super) fn check_shape(
    file: &Path,
    given: &Value,
    typed: &impl Serialize,
) -> Result<(), SpecError> {
    let understood = serde_json::to_value(typed).map_err(|cause| malformed(file, "", cause))?;
    match misshapen("", given, &understood) {
        None => Ok(()),
        Some(field) => Err(malformed(
            file,
            field,
            "it is a list, an object is expected",
        )),
    }
}

/// The first field that is a list and was understood as an object.
fn misshapen(path: &str, given: &Value, understood: &Value) -> Option<String> {
    match (given, understood) {
        (Value::Array(_), Value::Object(_)) => Some(path.to_owned()),
        (Value::Array(given), Value::Array(understood)) => given
            .iter()
            .zip(understood)
            .enumerate()
            .find_map(|(index, (given, understood))| {
                misshapen(&format!("{path}[{index}]"), given, understood)
            }),
        (Value::Object(given), Value::Object(understood)) => {
            given.iter().find_map(|(name, given)| {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                misshapen(&path, given, understood.get(name)?)
            })
        }
        _ => None,
    }
}
