//! Reading documents from files that someone else may have put there.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use rustix::fs::{Mode, OFlags};

/// What fits into one request to the agent, with room for the rest of it.
const LONGEST: u64 = (4 << 20) - (64 << 10);

/// Reads a file: a FIFO must not hold us up, nor may a device give without end.
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
