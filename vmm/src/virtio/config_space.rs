//! Reads of a device's configuration space (virtio 1.2 §2.5).

/// Copies from the space what a read at `offset` covers; the rest of `data` is left as it is.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests {
    use super::read;

    #[test]
    fn reads_stay_inside() {
        let space = [1, 2, 3, 4];
        for (offset, expected) in [
            (0, [1, 2, 3]),
            (2, [3, 4, 9]),
            (4, [9, 9, 9]),
            (u64::MAX, [9, 9, 9]),
        ] {
            let mut data = [9; 3];
            read(&space, offset, &mut data);
            assert_eq!(data, expected);
        }
    }
}
