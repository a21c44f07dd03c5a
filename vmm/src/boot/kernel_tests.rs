//! Images made on the spot.

use std::io::Write;
use std::os::fd::AsRawFd;

use vm_memory::Bytes;

use super::*;

/// An ELF file with one executable segment at `address` that holds `content`, file offset
/// `offset`.
pub(crate) fn image(
    offset: usize,
    address: u64,
    content: &[u8],
    memory_size: u64,
    entry: u64,
) -> Vec<u8> {
    let mut bytes = vec![0; offset];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&entry.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    let header = &mut bytes[64..120];
    header[0] = 1;
    header[4] = 5;
    header[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
    header[24..32].copy_from_slice(&address.to_le_bytes());
    header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
    header[40..48].copy_from_slice(&memory_size.to_le_bytes());
    bytes.extend(content);
    bytes
}

pub(crate) fn open(bytes: &[u8]) -> Result<Kernel, KernelError> {
    let file = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = File::from(file);
    file.write_all(bytes).expect("write the image");
    Kernel::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
}

fn why(bytes: &[u8]) -> Unusable {
    match open(bytes) {
        Err(KernelError::Unusable { why, .. }) => why,
        other => panic!("not refused: {other:?}"),
    }
}

fn load_and_compare(offset: usize, address: u64) {
    let content: Vec<u8> = (1..=251u8).cycle().take(20_000).collect();
    let kernel = open(&image(offset, address, &content, 30_000, address)).expect("open");
    let memory = memory::create(8).expect("memory");
    assert_eq!(kernel.load(&memory).expect("load"), address);
    let mut loaded = vec![1; 30_000];
    memory
        .read_slice(&mut loaded, GuestAddress(address))
        .expect("read");
    assert_eq!(loaded[..20_000], content);
    assert!(loaded[20_000..].iter().all(|byte| *byte == 0));
    let before: u8 = memory.read_obj(GuestAddress(address - 1)).expect("read");
    assert_eq!(before, 0);
}

#[test]
fn aligned_segments_are_mapped() {
    load_and_compare(4096, 0x20_0000);
}

#[test]
fn what_the_guest_writes_to_is_its_own() {
    let content: Vec<u8> = (1..=251u8).cycle().take(20_000).collect();
    let mut bytes = image(4096, 0x20_0000, &content, 3 << 20, 0x20_0000);
    // Readable, writable, executable.
    bytes[68] = 7;
    let memory = memory::create(8).expect("memory");
    open(&bytes).expect("open").load(&memory).expect("load");
    let mut loaded = vec![1; 30_000];
    memory
        .read_slice(&mut loaded, GuestAddress(0x20_0000))
        .expect("read");
    assert_eq!(loaded[..20_000], content);
    assert!(loaded[20_000..].iter().all(|byte| *byte == 0));
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let region = memory.iter().next().expect("a region");
    let start = region.as_ptr() as usize + 0x20_0000;
    // Nothing of the file lies over it.
    let holds = |line: &&str| {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let (first, end) = range.expect("a range");
        let number = |text| usize::from_str_radix(text, 16).expect("an address");
        (number(first)..number(end)).contains(&start)
    };
    let line = maps.lines().find(holds).expect("a mapping");
    assert!(!line.contains("memfd"), "{line}");
}

#[test]
fn ragged_segments_are_mapped_and_copied() {
    load_and_compare(4096 + 100, 0x20_0064);
}

#[test]
fn unaligned_segments_are_copied() {
    load_and_compare(4096 + 100, 0x20_0000);
}

#[test]
fn refuses_what_is_no_kernel() {
    assert_eq!(why(b""), Unusable::NotElf);
    assert_eq!(why(b"#!/bin/sh\n"), Unusable::NotElf);
    let good = image(4096, 0x20_0000, b"x", 1, 0x20_0000);
    let mut wrong = good.clone();
    wrong[18] = 183;
    assert_eq!(why(&wrong), Unusable::WrongMachine);
    let mut wrong = good.clone();
    wrong[4] = 1;
    assert_eq!(why(&wrong), Unusable::WrongMachine);
}

#[test]
fn every_truncation_is_refused() {
    let good = image(4096, 0x20_0000, b"content", 7, 0x20_0000);
    open(&good).expect("the whole image is good");
    for length in [
        1,
        3,
        4,
        5,
        6,
        18,
        63,
        64,
        65,
        100,
        119,
        120,
        4095,
        4096,
        good.len() - 1,
    ] {
        why(&good[..length]);
    }
}

#[test]
fn refuses_contradictions() {
    let short = image(4096, 0x20_0000, b"content", 3, 0x20_0000);
    assert_eq!(why(&short), Unusable::Damaged);
    let overflow = image(4096, u64::MAX - 2, b"content", 7, u64::MAX - 2);
    assert_eq!(why(&overflow), Unusable::Damaged);
    let outside = image(4096, 0x20_0000, b"content", 7, 0x30_0000);
    assert_eq!(why(&outside), Unusable::NoEntry(0x30_0000));
}

#[test]
fn refuses_what_does_not_fit() {
    let memory = memory::create(8).expect("memory");
    for address in [0x1000, 8 << 20, (8 << 20) - 3] {
        let kernel = open(&image(4096, address, b"content", 7, address)).expect("open");
        let error = kernel.load(&memory).expect_err("does not fit");
        let text = error.to_string();
        assert!(text.contains("give the guest more memory"), "{text}");
    }
}

#[test]
fn refuses_a_directory() {
    let error = Kernel::open(Path::new("/")).expect_err("no file");
    assert!(matches!(
        error,
        KernelError::Unusable {
            why: Unusable::NotAFile,
            ..
        }
    ));
}
