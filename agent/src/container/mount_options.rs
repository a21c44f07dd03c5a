//! The options of an OCI mount (runtime-spec config.md "Linux mount options"): which are flags of
//! the mount, which of the superblock, and which are the filesystem's own. Pure.

use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
};

use crate::{
    error::{Error, Result},
    sys::MountAttributes,
};

/// The options, sorted by who takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// Whether this is a bind mount, and whether with the mounts below its source.
    pub bind: Option<Bind>,
    /// Flags of the mount itself.
    pub attributes: MountAttributes,
    /// Flags of the mount and all below it (the `r…` options).
    pub recursive_attributes: MountAttributes,
    /// MS_SHARED and its like, each with "recursive".
    pub propagation: Vec<(u64, bool)>,
    /// Flags of the superblock.
    pub superblock: Vec<&'static str>,
    /// The filesystem's own, `key` or `key=value`.
    pub data: Vec<String>,
    /// Fill the new tmpfs with what the mount point held (`tmpcopyup`).
    pub copy_up: bool,
    /// `idmap` (false) or `ridmap` (true: with the mounts below).
    pub id_map: Option<bool>,
}

/// The two kinds of bind mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bind {
    /// `bind`
    Single,
    /// `rbind`
    Recursive,
}

/// Flags of a mount: name, attributes to set, attributes to clear.
const ATTRIBUTES: [(&str, u64, u64); 19] = [
    ("ro", MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, MOUNT_ATTR_RDONLY),
    ("nosuid", MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, MOUNT_ATTR_NOSUID),
    ("nodev", MOUNT_ATTR_NODEV, 0),
    ("dev", 0, MOUNT_ATTR_NODEV),
    ("noexec", MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, MOUNT_ATTR_NOEXEC),
    ("nodiratime", MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, MOUNT_ATTR_NOSYMFOLLOW),
    // The access-time attributes are one field of which relatime is the zero.
    ("relatime", 0, MOUNT_ATTR__ATIME),
    ("norelatime", 0, MOUNT_ATTR__ATIME),
    ("noatime", MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME),
    ("atime", 0, MOUNT_ATTR__ATIME),
    ("strictatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME),
    ("nostrictatime", 0, MOUNT_ATTR__ATIME),
    ("defaults", 0, 0),
];

/// Propagation: name, flag, recursive.
const PROPAGATION: [(&str, u64, bool); 8] = [
    ("private", libc::MS_PRIVATE, false),
    ("rprivate", libc::MS_PRIVATE, true),
    ("shared", libc::MS_SHARED, false),
    ("rshared", libc::MS_SHARED, true),
    ("slave", libc::MS_SLAVE, false),
    ("rslave", libc::MS_SLAVE, true),
    ("unbindable", libc::MS_UNBINDABLE, false),
    ("runbindable", libc::MS_UNBINDABLE, true),
];

/// Flags of a superblock that the kernel takes as they are, and their opposites, which are the
/// default.
const SUPERBLOCK: [(&str, &str); 4] = [
    ("sync", "async"),
    ("dirsync", ""),
    ("lazytime", "nolazytime"),
    ("mand", "nomand"),
];

/// Options without any effect on a new mount: `silent` and `loud` concern the kernel's log only.
const WITHOUT_EFFECT: [&str; 3] = ["silent", "loud", "rdefaults"];

/// Sorts the options of the mount that `field` names.
pub(super) fn parse(field: &str, options: &[String]) -> Result<MountOptions> {
    let mut parsed = MountOptions::default();
    for option in options {
        parse_one(field, option, &mut parsed)?;
    }
    if let (Some(_), Some(flag)) = (parsed.bind, parsed.superblock.first()) {
        let reason = "a bind mount shares its source's superblock; remove the option";
        return Err(Error::unsupported(
            format!("{field}.options {flag}"),
            reason,
        ));
    }
    Ok(parsed)
}

fn parse_one(field: &str, option: &str, parsed: &mut MountOptions) -> Result<()> {
    match option {
        "bind" => parsed.bind = parsed.bind.or(Some(Bind::Single)),
        "rbind" => parsed.bind = Some(Bind::Recursive),
        "tmpcopyup" => parsed.copy_up = true,
        "idmap" => parsed.id_map = parsed.id_map.or(Some(false)),
        "ridmap" => parsed.id_map = Some(true),
        "remount" => {
            let reason = "every entry makes a mount of its own; give that one the options it needs";
            return Err(Error::unsupported(
                format!("{field}.options {option}"),
                reason,
            ));
        }
        _ if WITHOUT_EFFECT.contains(&option) => {}
        _ => {
            let superblock = SUPERBLOCK
                .iter()
                .find(|(on, off)| option == *on || option == *off);
            if let Some(&(name, _, _)) = PROPAGATION.iter().find(|p| p.0 == option) {
                let found = PROPAGATION.iter().find(|p| p.0 == name);
                parsed
                    .propagation
                    .extend(found.map(|&(_, flag, all)| (flag, all)));
            } else if let Some((on, _)) = superblock {
                parsed.superblock.retain(|flag| flag != on);
                if option == *on {
                    parsed.superblock.push(on);
                }
            } else if !parse_attribute(option, parsed) {
                parsed.data.push(option.to_owned());
            }
        }
    }
    Ok(())
}

fn parse_attribute(option: &str, parsed: &mut MountOptions) -> bool {
    let find = |name: &str| ATTRIBUTES.iter().find(|a| a.0 == name);
    let (attributes, found) = match find(option) {
        Some(found) => (&mut parsed.attributes, found),
        // "relatime" and "rw" begin with r as well: whole names go first.
        None => match option.strip_prefix('r').and_then(find) {
            Some(found) => (&mut parsed.recursive_attributes, found),
            None => return false,
        },
    };
    // The last of contradicting options wins.
    let (_, set, clear) = *found;
    attributes.set = attributes.set & !clear | set;
    attributes.clear = attributes.clear & !(set & !MOUNT_ATTR__ATIME) | clear;
    true
}

/// `rootfsPropagation`, or the propagation of one mount, as a flag and "recursive".
pub(super) fn propagation(name: &str) -> Option<(u64, bool)> {
    PROPAGATION
        .iter()
        .find(|p| p.0 == name)
        .map(|&(_, flag, recursive)| (flag, recursive))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> MountOptions {
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        parse("mounts[0]", &options).expect("valid")
    }

    #[test]
    fn everyday_options() {
        let options = parsed(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(
            options.attributes.set,
            MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME
        );
        assert_eq!(options.attributes.clear, MOUNT_ATTR__ATIME);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
    }

    #[test]
    fn the_last_option_wins() {
        let options = parsed(&["ro", "rw"]);
        assert_eq!(options.attributes.set, 0);
        assert_eq!(options.attributes.clear, MOUNT_ATTR_RDONLY);
        let options = parsed(&["rw", "ro"]);
        assert_eq!(options.attributes.set, MOUNT_ATTR_RDONLY);
        assert_eq!(options.attributes.clear, 0);
        let options = parsed(&["noatime", "strictatime"]);
        assert_eq!(options.attributes.set, MOUNT_ATTR_STRICTATIME);
        let options = parsed(&["sync", "async"]);
        assert!(options.superblock.is_empty());
    }

    #[test]
    fn recursive_options_are_kept_apart() {
        let options = parsed(&["rbind", "rro", "rprivate", "relatime", "rnosuid"]);
        assert_eq!(options.bind, Some(Bind::Recursive));
        assert_eq!(options.attributes.set, 0);
        assert_eq!(
            options.recursive_attributes.set,
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
        );
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert!(options.data.is_empty());
    }

    #[test]
    fn refusals_name_field_and_option() {
        let error = parse("mounts[3]", &["remount".to_string()]).expect_err("refused");
        assert!(
            error
                .to_string()
                .starts_with("mounts[3].options remount is not supported")
        );
        let bind = ["bind".to_string(), "sync".to_string()];
        assert!(parse("mounts[3]", &bind).is_err());
    }

    #[test]
    fn every_option_of_the_spec_is_known() {
        for &flag in bulkhead_agent_protocol::oci::MOUNT_OPTIONS {
            assert!(parsed(&[flag]).data.is_empty(), "{flag}");
        }
        for flag in ["rnoatime", "rstrictatime", "rrelatime"] {
            let attributes = parsed(&[flag]).recursive_attributes;
            assert_eq!(attributes.clear & MOUNT_ATTR__ATIME, MOUNT_ATTR__ATIME);
        }
    }

    #[test]
    fn propagation_names() {
        assert_eq!(propagation("rslave"), Some((libc::MS_SLAVE, true)));
        assert_eq!(propagation("rshared"), Some((libc::MS_SHARED, true)));
        assert_eq!(propagation("none"), None);
    }
}
