//! Labels of Linux security modules, and what becomes of them
//! (docs/decisions/0006-lsm-labels.md): a profile or label is a name in the policy of the host's
//! kernel, under which nothing of the container runs.

use oci_spec::runtime::{Process, Spec};
use serde::Deserialize;
use thiserror::Error;

/// What becomes of labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LsmLabels {
    /// An error that names them.
    Refuse,
    /// No effect, which a warning tells.
    #[default]
    Warn,
}

/// Labels are refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{0}: the guest's kernel has no such security module; remove it, or set lsm_labels = \"warn\" \
     in {path}",
    path = crate::config::DEFAULT_PATH
)]
pub struct LabelError(String);

/// Labels that ask for something, as `where it stands "what it says"`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Labels(Vec<String>);

impl Labels {
    /// Those of a configuration.
    pub fn of_spec(spec: &Spec) -> Self {
        let process = spec.process().as_ref();
        let linux = spec.linux().as_ref();
        Self::default()
            .with(
                "process.apparmorProfile",
                process.and_then(|process| process.apparmor_profile().as_deref()),
            )
            .with(
                "process.selinuxLabel",
                process.and_then(|process| process.selinux_label().as_deref()),
            )
            .with(
                "linux.mountLabel",
                linux.and_then(|linux| linux.mount_label().as_deref()),
            )
    }

    /// Those of a process that `exec` is given as a file.
    pub fn of_process(process: &Process) -> Self {
        Self::default()
            .with("apparmorProfile", process.apparmor_profile().as_deref())
            .with("selinuxLabel", process.selinux_label().as_deref())
    }

    /// One more, if it asks for anything: what runs in a guest is unconfined, so that wish is
    /// granted.
    pub fn with(mut self, place: &str, label: Option<&str>) -> Self {
        if let Some(label) = label.filter(|label| !matches!(*label, "" | "unconfined")) {
            self.0.push(format!("{place} {label:?}"));
        }
        self
    }

    /// Refuses them, or warns.
    pub fn judge(&self, rule: LsmLabels) -> Result<(), LabelError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let labels = self.0.join(", ");
        match rule {
            LsmLabels::Refuse => Err(LabelError(labels)),
            LsmLabels::Warn => {
                tracing::warn!(
                    "{labels}: no effect, since the guest's kernel has no such security module; \
                     what it guards against, the virtual machine does"
                );
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels(process: serde_json::Value, linux: serde_json::Value) -> Labels {
        let spec = json!({"ociVersion": "1.2.0", "process": process, "linux": linux});
        Labels::of_spec(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn the_administrator_decides() {
        let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0},
            "apparmorProfile": "docker-default", "selinuxLabel": "a:b:c:s0"});
        let all = labels(process, json!({"mountLabel": "m"}));
        assert_eq!(all.judge(LsmLabels::Warn), Ok(()));
        let error = all.judge(LsmLabels::Refuse).unwrap_err().to_string();
        for named in [
            "process.apparmorProfile \"docker-default\"",
            "process.selinuxLabel \"a:b:c:s0\"",
            "linux.mountLabel \"m\"",
            "lsm_labels = \"warn\"",
        ] {
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_no_label() {
        for profile in ["", "unconfined"] {
            let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0},
                "apparmorProfile": profile, "selinuxLabel": ""});
            let none = labels(process, json!({"mountLabel": ""}));
            assert_eq!(none.judge(LsmLabels::Refuse), Ok(()));
        }
    }
}
