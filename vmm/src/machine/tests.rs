//! Guests of a few instructions, where /dev/kvm opens.

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::kernel::tests as elf;
use crate::kvm::exits::Ending;
use crate::sys;
use crate::virtio::blk::{Block, Disk, Serial};
use crate::virtio::rng::Rng;

/// Where the guests' code and the byte that they wait for lie.
const CODE: u64 = layout::HIGH_MEMORY;
const FLAG: GuestAddress = GuestAddress(0x20_0000);

/// Says 'a', waits for the flag, says what it has kept in a register ('b'), resets.
#[rustfmt::skip]
const WAITING_GUEST: &[u8] = &[
    0xb3, b'b',                 // mov bl, 'b'
    0x66, 0xba, 0xf8, 0x03,     // mov dx, 0x3f8
    0xb0, b'a', 0xee,           // mov al, 'a'; out dx, al
    0xbf, 0, 0, 0x20, 0,        // mov edi, FLAG
    0x80, 0x3f, 0, 0x74, 0xfb,  // 1: cmp byte [rdi], 0; je 1b
    0x88, 0xd8, 0xee,           // mov al, bl; out dx, al
    0xb0, 0xfe, 0xe6, 0x64,     // mov al, 0xfe; out 0x64, al
    0xf4,                       // hlt
];

/// Reads what is not mapped, with no handler for any exception.
#[rustfmt::skip]
const FAULTING_GUEST: &[u8] = &[
    0xb8, 0, 0, 0xf0, 0x7f,     // mov eax, 0x7ff0_0000
    0x8a, 0x00,                 // mov al, [rax]
];

/// A machine whose serial port leads to the pipe; `None`, said aloud, without KVM.
fn assembly(cpus: u8) -> Option<(Assembly, PipeReader)> {
    let kvm = match crate::kvm::vm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let mut assembly = Assembly::new(kvm, cpus, 8).expect("assembly");
    let (read, write) = io::pipe().expect("pipe");
    let log = GuestLog::new(File::from(OwnedFd::from(write)));
    assembly.add_serial(log).expect("serial port");
    assembly
        .add_device(Box::new(Rng::default()))
        .expect("device");
    Some((assembly, read))
}

fn boot(assembly: Assembly, code: &[u8]) -> Machine {
    let kernel = elf::open(&elf::image(4096, CODE, code, 4096, CODE)).expect("kernel");
    assembly.boot(&kernel, "quiet").expect("boot")
}

fn said(pipe: &mut PipeReader) -> u8 {
    let mut byte = [0];
    pipe.read_exact(&mut byte).expect("read");
    byte[0]
}

fn ending(machine: &Machine) -> Ending {
    let minute = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let event = sys::event_fd(machine.ending().event());
    let mut events = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
    assert_eq!(
        poll(&mut events, Some(&minute)),
        Ok(1),
        "the guest does not end"
    );
    machine.ending().get().expect("ending")
}

fn set_flag(machine: &Machine) {
    machine.memory().write_obj(1u8, FLAG).expect("set the flag");
}

#[test]
fn a_guest_runs_and_resets() {
    let Some((assembly, mut pipe)) = assembly(1) else {
        return;
    };
    let machine = boot(assembly, WAITING_GUEST);
    machine.run().expect("run");
    assert_eq!(said(&mut pipe), b'a');
    set_flag(&machine);
    assert_eq!(said(&mut pipe), b'b');
    assert_eq!(ending(&machine), Ending::Reset);
}

#[test]
fn a_triple_fault_is_a_reset() {
    let Some((assembly, _pipe)) = assembly(1) else {
        return;
    };
    let machine = boot(assembly, FAULTING_GUEST);
    machine.run().expect("run");
    assert_eq!(ending(&machine), Ending::Reset);
}

#[test]
fn a_guest_pauses_and_goes_on() {
    let Some((assembly, mut pipe)) = assembly(2) else {
        return;
    };
    let machine = boot(assembly, WAITING_GUEST);
    machine.run().expect("run");
    assert_eq!(said(&mut pipe), b'a');
    for _ in 0..10 {
        machine.pause().expect("pause");
        machine.run().expect("run");
    }
    machine.pause().expect("pause");
    set_flag(&machine);
    machine.run().expect("run");
    assert_eq!(said(&mut pipe), b'b');
    assert_eq!(ending(&machine), Ending::Reset);
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    let Some((first, mut pipe)) = assembly(2) else {
        return;
    };
    let first = boot(first, WAITING_GUEST);
    first.run().expect("run");
    assert_eq!(said(&mut pipe), b'a');
    first.pause().expect("pause");
    let state = serde_json::to_string(&first.save().expect("save")).expect("serialise");
    let mut memory = vec![0; 8 << 20];
    first
        .memory()
        .read_slice(&mut memory, GuestAddress(0))
        .expect("read memory");
    drop(first);

    let Some((second, mut pipe)) = assembly(2) else {
        return;
    };
    let state = serde_json::from_str(&state).expect("deserialise");
    let second = second.restore(state).expect("restore");
    second
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .expect("write memory");
    set_flag(&second);
    second.run().expect("run");
    assert_eq!(said(&mut pipe), b'b');
    assert_eq!(ending(&second), Ending::Reset);
}

#[test]
fn state_of_another_shape_is_refused() {
    let Some((first, _pipe)) = assembly(1) else {
        return;
    };
    let state = boot(first, WAITING_GUEST).save().expect("save");
    let Some((second, _pipe)) = assembly(2) else {
        return;
    };
    let error = second.restore(state).err().expect("refused");
    assert_eq!(
        error.to_string(),
        "the saved machine has 1 vCPUs, this one has 2"
    );
}

#[test]
fn devices_come_and_go() {
    let Some((mut first, mut pipe)) = assembly(1) else {
        return;
    };
    first.add_spare_places(2).expect("spare places");
    assert_eq!(first.device_interrupts(), [5, 6, 7]);
    let error = first.add_spare_places(17).expect_err("too many");
    assert!(error.to_string().starts_with("20 devices"));
    let machine = boot(first, WAITING_GUEST);
    machine.run().expect("run");
    assert_eq!(said(&mut pipe), b'a');
    for _ in 0..3 {
        // The same place, with its notifications, is to be had again and again.
        assert_eq!(machine.attach(Box::new(Rng::default())).expect("attach"), 1);
        assert_eq!(machine.attach(Box::new(Rng::default())).expect("attach"), 2);
        let error = machine.attach(Box::new(Rng::default())).expect_err("full");
        assert!(matches!(error, MachineError::NoFreePlace));
        machine.detach(1).expect("detach");
        machine.detach(2).expect("detach");
        machine.detach(2).expect("once is enough");
        machine.detach(99).expect("there is none");
    }
    set_flag(&machine);
    assert_eq!(said(&mut pipe), b'b');
    assert_eq!(ending(&machine), Ending::Reset);
}

#[test]
fn the_guest_sees_placeholders() {
    let Some((mut assembly, _pipe)) = assembly(1) else {
        return;
    };
    assembly.add_spare_places(1).expect("spare place");
    let machine = boot(assembly, WAITING_GUEST);
    let read = |offset: u64| machine.backplane.registers().page(1).get(offset);
    assert_eq!([read(0), read(4), read(8)], [0x7472_6976, 2, 0]);
    assert_eq!([read(0x34), read(0x70), read(0x100)], [0; 3]);
    machine.attach(Box::new(Rng::default())).expect("attach");
    assert_eq!([read(4), read(8)], [2, 4]);
    machine.detach(1).expect("detach");
    assert_eq!([read(4), read(8)], [2, 0]);
}

#[test]
fn attached_devices_are_part_of_the_state() {
    let with_spare = || {
        let (mut assembly, pipe) = assembly(1)?;
        assembly.add_spare_places(2).expect("spare places");
        Some((assembly, pipe))
    };
    let Some((first, _pipe)) = with_spare() else {
        return;
    };
    let first = boot(first, WAITING_GUEST);
    assert_eq!(first.attach(Box::new(Rng::default())).expect("attach"), 1);
    let state = serde_json::to_string(&first.save().expect("save")).expect("serialise");
    drop(first);
    let read = || serde_json::from_str(&state).expect("deserialise");
    let (second, _pipe) = with_spare().expect("a second machine");
    let error = second.restore(read()).err().expect("refused");
    assert!(matches!(error, MachineError::DeviceState { index: 1, .. }));
    let (mut third, _pipe) = with_spare().expect("a third machine");
    third.attach(1, Box::new(Rng::default())).expect("attach");
    let third = third.restore(read()).expect("restore");
    assert_eq!(third.attach(Box::new(Rng::default())).expect("attach"), 2);
}

/// What the real guest runs: once a second a line, and a checksum of its disk past the page cache.
const TICKING_INIT: &str = "-c \"mount -t devtmpfs d /dev; mount -t proc p /proc; exec >/dev/ttyS0; \
     for i in 1 2 3 4 5 6; do echo 3 >/proc/sys/vm/drop_caches; \
     echo tick $i `md5sum </dev/vda` `head -c 16 /dev/hwrng | wc -c`; sleep 1; done; reboot -f\"";

/// A Linux guest from BULKHEAD_TEST_KERNEL and the debug root image BULKHEAD_TEST_ROOT.
fn linux(cpus: u8) -> Option<(Assembly, Kernel, BufReader<PipeReader>)> {
    let (Some(kernel), Some(root)) = (
        env::var_os("BULKHEAD_TEST_KERNEL"),
        env::var_os("BULKHEAD_TEST_ROOT"),
    ) else {
        eprintln!("skipped: BULKHEAD_TEST_KERNEL and BULKHEAD_TEST_ROOT name no guest");
        return None;
    };
    let kvm = crate::kvm::vm::open().expect("KVM");
    let mut assembly = Assembly::new(kvm, cpus, 128).expect("assembly");
    let (read, write) = io::pipe().expect("pipe");
    let log = GuestLog::new(File::from(OwnedFd::from(write)));
    assembly.add_serial(log).expect("serial port");
    let file = File::open(&root).expect("open the root image");
    let disk = Disk::new(Path::new(&root), file, true).expect("disk");
    assembly
        .add_device(Box::new(Block::new(
            0,
            Serial::new("disk0").expect("serial"),
            disk,
        )))
        .expect("disk");
    assembly
        .add_device(Box::new(Rng::default()))
        .expect("device");
    let kernel = Kernel::open(Path::new(&kernel)).expect("kernel");
    Some((assembly, kernel, BufReader::new(read)))
}

/// The guest's next tick: number, checksum, count of random bytes.
fn tick(log: &mut BufReader<PipeReader>) -> (u32, String, String) {
    loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).expect("read"), 0, "the log ends");
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["tick", number, sum, _, count] = words[..] {
            return (number.parse().expect("number"), sum.into(), count.into());
        }
    }
}

#[test]
fn a_saved_linux_goes_on_in_another_machine() {
    let Some((first, kernel, mut log)) = linux(2) else {
        return;
    };
    let devices: String = (0..)
        .zip(first.device_interrupts())
        .map(|(index, gsi)| {
            let address = layout::VIRTIO_MMIO + index * layout::VIRTIO_MMIO_SIZE;
            format!(" virtio_mmio.device=4K@{address:#x}:{gsi}")
        })
        .collect();
    let line = format!(
        "reboot=t panic=-1 no_timer_check quiet root=/dev/vda rootfstype=erofs ro{devices} \
         init=/bin/sh -- {TICKING_INIT}"
    );
    let first = first.boot(&kernel, &line).expect("boot");
    first.run().expect("run");
    let (_, sum, count) = tick(&mut log);
    assert_eq!(count, "16");
    assert_eq!(tick(&mut log).0, 2);
    first.pause().expect("pause");
    let state = serde_json::to_string(&first.save().expect("save")).expect("serialise");
    let mut memory = vec![0; 128 << 20];
    first
        .memory()
        .read_slice(&mut memory, GuestAddress(0))
        .expect("read memory");
    drop(first);

    let (second, _, mut log) = linux(2).expect("a second machine");
    let second = second
        .restore(serde_json::from_str(&state).expect("deserialise"))
        .expect("restore");
    second
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .expect("write memory");
    second.run().expect("run");
    for number in 3..=6 {
        assert_eq!(tick(&mut log), (number, sum.clone(), count.clone()));
    }
    assert_eq!(ending(&second), Ending::Reset);
}
