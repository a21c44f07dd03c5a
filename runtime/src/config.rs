//! The configuration file, `/etc/bulkhead/config.toml`: what an administrator decides for all
//! containers of a host. `runtime/config.toml` documents every key and shows the defaults.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;

use crate::{
    log::LogFormat,
    spec::{LsmLabels, UnknownProperties},
};

/// Where it is unless the command line says otherwise.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";
/// Longer files are no configuration.
const LONGEST: u64 = 1 << 20;
/// The VMM has 19 places, of which a guest's own devices take four.
const MOST_SPARE_PLACES: u8 = 15;
/// Less, and a guest's kernel does not come up with room for a container.
const LEAST_MEMORY_MIB: u32 = 96;

/// The configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type (the parser's text names it).
    #[error("{path}, line {line}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A value that cannot be used.
    #[error("{path}: {key}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Dotted name of the key.
        key: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// The configuration file's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What becomes of properties that the runtime-spec does not know.
    pub unknown_properties: UnknownProperties,
    /// What becomes of labels of security modules.
    pub lsm_labels: LsmLabels,
    /// Where the installation lies.
    pub paths: Paths,
    /// How big guests are.
    pub guest: GuestRules,
    /// Which annotations have an effect.
    pub annotations: Annotations,
    /// The log.
    pub log: Log,
}

/// Files of the installation; `None` where they lie relative to this program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Paths {
    pub kernel: Option<PathBuf>,
    pub root_image: Option<PathBuf>,
    pub debug_root_image: Option<PathBuf>,
    pub vmm: Option<PathBuf>,
}

/// How big guests are; [`crate::guest_size`] has the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestRules {
    /// Memory of a guest that nobody asked anything of, in MiB.
    pub memory_mib: u32,
    /// The most memory, in MiB; `None` for the host's.
    pub max_memory_mib: Option<u32>,
    /// Virtual CPUs of a guest that nobody asked anything of.
    pub cpus: u8,
    /// The most virtual CPUs; `None` for the host's.
    pub max_cpus: Option<u8>,
    /// Places for devices that a guest is given while it runs: network interfaces.
    pub spare_places: u8,
}

impl Default for GuestRules {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            max_memory_mib: None,
            cpus: 1,
            max_cpus: None,
            spare_places: 8,
        }
    }
}

/// Which annotations have an effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Annotations {
    /// Their keys.
    pub allow: Vec<String>,
}

/// The log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Log everything.
    pub debug: bool,
    /// Its format.
    pub format: LogFormat,
    /// Its file; `None` for standard error.
    pub file: Option<PathBuf>,
}

impl Config {
    /// Reads the file that was named, or the default one, which need not exist.
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        match read(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start));
            ConfigError::Parse {
                path: path.to_owned(),
                line: before.map_or(1, |before| before.matches('\n').count() + 1),
                message: error.message().replace('\n', " "),
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let invalid = |key, reason: String| ConfigError::Invalid {
            path: path.to_owned(),
            key,
            reason,
        };
        let guest = &self.guest;
        if guest.memory_mib < LEAST_MEMORY_MIB {
            let reason = format!(
                "{} is too little: {LEAST_MEMORY_MIB} at least",
                guest.memory_mib
            );
            return Err(invalid("guest.memory_mib", reason));
        }
        if let Some(most) = guest.max_memory_mib.filter(|most| *most < guest.memory_mib) {
            let reason = format!("{most} is less than guest.memory_mib, {}", guest.memory_mib);
            return Err(invalid("guest.max_memory_mib", reason));
        }
        if guest.cpus == 0 {
            return Err(invalid("guest.cpus", "0 is too few: 1 at least".to_owned()));
        }
        if let Some(most) = guest.max_cpus.filter(|most| *most < guest.cpus) {
            let reason = format!("{most} is less than guest.cpus, {}", guest.cpus);
            return Err(invalid("guest.max_cpus", reason));
        }
        if guest.spare_places > MOST_SPARE_PLACES {
            let reason = format!(
                "{} is too many: {MOST_SPARE_PLACES} at most",
                guest.spare_places
            );
            return Err(invalid("guest.spare_places", reason));
        }
        let known = crate::guest_size::ANNOTATIONS;
        for name in &self.annotations.allow {
            if !known.contains(&name.as_str()) {
                let reason = format!("{name:?} is none of {}", known.join(", "));
                return Err(invalid("annotations.allow", reason));
            }
        }
        let paths = [
            ("paths.kernel", &self.paths.kernel),
            ("paths.root_image", &self.paths.root_image),
            ("paths.debug_root_image", &self.paths.debug_root_image),
            ("paths.vmm", &self.paths.vmm),
            ("log.file", &self.log.file),
        ];
        for (key, given) in paths {
            if let Some(given) = given.as_deref().filter(|given| !given.is_absolute()) {
                return Err(invalid(key, format!("{given:?} must be an absolute path")));
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if metadata.len() > LONGEST {
        return Err(io::Error::other(format!(
            "it has more than {LONGEST} bytes"
        )));
    }
    fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTED: &str = include_str!("../config.toml");

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("/c"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_documented_file_is_the_defaults() {
        assert_eq!(parse(DOCUMENTED).unwrap(), Config::default());
    }

    #[test]
    fn every_key_is_documented() {
        // With the keys that have no fixed default taken out of their comments.
        let uncommented: String = DOCUMENTED
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(key) if key.split_once(" = ").is_some_and(|(name, _)| is_key(name)) => key,
                _ => line,
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let config = parse(&uncommented).unwrap();
        // A key that is added to a struct does not compile here until it is documented.
        let Config {
            unknown_properties: _,
            lsm_labels: _,
            paths:
                Paths {
                    kernel: Some(_),
                    root_image: Some(_),
                    debug_root_image: Some(_),
                    vmm: Some(_),
                },
            guest:
                GuestRules {
                    memory_mib: _,
                    max_memory_mib: Some(_),
                    cpus: _,
                    max_cpus: Some(_),
                    spare_places: _,
                },
            annotations: Annotations { allow: _ },
            log:
                Log {
                    debug: _,
                    format: _,
                    file: Some(_),
                },
        } = config
        else {
            panic!("a key is missing: {config:?}");
        };
        for key in [
            "unknown_properties",
            "lsm_labels",
            "memory_mib",
            "cpus",
            "spare_places",
            "allow",
            "debug",
            "format",
        ] {
            assert!(DOCUMENTED.contains(&format!("\n{key} = ")), "{key}");
        }
    }

    fn is_key(name: &str) -> bool {
        name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    }

    #[test]
    fn mistakes_are_named_with_the_file() {
        for (text, named) in [
            ("memory = 5", "/c, line 1: unknown field `memory`"),
            (
                "[guest]\n\nmemroy_mib = 5",
                "/c, line 3: unknown field `memroy_mib`",
            ),
            ("[guest]\ncpus = \"two\"", "/c, line 2: invalid type"),
            ("[guest]\ncpus = 1000", "/c, line 2: "),
            ("[gest]", "unknown field `gest`"),
            ("[guest", "/c, line 1: "),
            (
                "[guest]\nmemory_mib = 10",
                "/c: guest.memory_mib: 10 is too little",
            ),
            (
                "[guest]\nmax_memory_mib = 128",
                "/c: guest.max_memory_mib: 128",
            ),
            ("[guest]\ncpus = 0", "/c: guest.cpus"),
            (
                "[guest]\nspare_places = 16",
                "/c: guest.spare_places: 16 is too many",
            ),
            ("[guest]\ncpus = 4\nmax_cpus = 2", "/c: guest.max_cpus"),
            ("[paths]\nkernel = \"vmlinux\"", "/c: paths.kernel"),
            (
                "[annotations]\nallow = [\"org.other\"]",
                "\"org.other\" is none of",
            ),
            ("unknown_properties = \"maybe\"", "unknown variant `maybe`"),
            ("lsm_labels = true", "/c, line 1: "),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn only_a_file_that_was_named_must_exist() {
        assert!(Config::load(Some(Path::new("/does/not/exist"))).is_err());
        assert!(Config::load(Some(Path::new("/dev/null"))).is_err());
    }
}
