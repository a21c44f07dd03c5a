//! Whether we are root of the host, or of a user's own namespace.

use std::fs;

/// Whether this process is in a user namespace that somebody has made, where root has no rights to what is
/// the host's.
pub fn is_somebodys() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !maps_all(&map))
}

/// user_namespaces(7): so it looks in the first one.
fn maps_all(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_one_maps_all() {
        assert!(maps_all("         0          0 4294967295\n"));
        assert!(!maps_all(
            "         0       1000          1\n         1     100000      65536\n"
        ));
        assert!(!maps_all(""));
    }
}
