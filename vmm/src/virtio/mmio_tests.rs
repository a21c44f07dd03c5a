//! Drives the registers as drivers do, good ones and others.

use std::sync::Mutex;

use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::registers::RegisterPages;
use crate::virtio::state::BlockState;
use crate::virtio::{ActivateError, DeviceKind, DeviceState, StateError};

/// What the device has seen.
#[derive(Default)]
struct Seen {
    activations: Vec<(u64, Vec<u16>)>,
    deactivations: u32,
    config: Vec<u8>,
    notified: Vec<u16>,
}

struct Fake {
    seen: Arc<Mutex<Seen>>,
    queues: Vec<Queue>,
    interrupt: Option<Arc<dyn crate::virtio::Interrupt>>,
}

impl VirtioDevice for Fake {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn features(&self) -> u64 {
        FEATURE_EVENT_INDEX | 0b101
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::config_space::read(&[1, 2, 3, 4, 5], offset, data);
    }
    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.seen.lock().expect("lock").config.extend(data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.interrupt = Some(activation.interrupt);
        self.queues = activation
            .queues
            .into_iter()
            .map(|active| active.queue)
            .collect();
        let sizes = self.queues.iter().map(QueueT::size).collect();
        self.seen
            .lock()
            .expect("lock")
            .activations
            .push((activation.features, sizes));
        Ok(())
    }
    fn notified_on_vcpu(&self, queue: u16) -> bool {
        queue == 1
    }
    fn notify(&mut self, queue: u16) {
        self.seen.lock().expect("lock").notified.push(queue);
    }
    fn deactivate(&mut self) -> Vec<Queue> {
        self.seen.lock().expect("lock").deactivations += 1;
        self.queues
            .iter_mut()
            .for_each(|queue| queue.set_next_avail(3));
        std::mem::take(&mut self.queues)
    }
    fn save(&mut self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Block(BlockState {
            sectors: 7,
            read_only: true,
        }))
    }
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Block(_) => Ok(()),
            other => Err(StateError::WrongDevice {
                expected: self.kind(),
                found: other.kind(),
            }),
        }
    }
}

struct Bench {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
    irq: EventFd,
}

const STEP_1: u32 = status::ACKNOWLEDGE;
const STEP_2: u32 = STEP_1 | status::DRIVER;
const STEP_3: u32 = STEP_2 | status::FEATURES_OK;
const STEP_4: u32 = STEP_3 | status::DRIVER_OK;

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let event = || EventFd::new(EFD_NONBLOCK).expect("event");
        let irq = event();
        let line = irq.try_clone().expect("clone");
        let interrupt = MmioInterrupt::new(
            Box::new(move || line.write(1)),
            RegisterPages::new().expect("pages").page(3),
        );
        let seen = Arc::<Mutex<Seen>>::default();
        let device = Fake {
            seen: seen.clone(),
            queues: vec![],
            interrupt: None,
        };
        let notifications = vec![event(), event()];
        let transport = MmioTransport::new(
            Box::new(device),
            Memory::new(memory),
            interrupt,
            notifications,
        );
        Self {
            transport,
            seen,
            irq,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.interrupt.page().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(register::STATUS)
    }

    fn negotiate(&mut self, low: u32, high: u32) {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, STEP_1);
        self.write(register::STATUS, STEP_2);
        for (half, value) in [(0, low), (1, high)] {
            self.write(register::DRIVER_FEATURES_SELECT, half);
            self.write(register::DRIVER_FEATURES, value);
        }
        self.write(register::STATUS, STEP_3);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        self.write(register::QUEUE_SELECT, index);
        self.write(register::QUEUE_SIZE, size);
        for (place, offset) in (0u32..).zip([0x80u64, 0x90, 0xa0]) {
            self.write(offset, 0x1000 + index * 0x4000 + place * 0x1000);
            self.write(offset + 4, 0);
        }
        self.write(register::QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.negotiate(1, 1);
        self.set_up_queue(0, 4);
        self.set_up_queue(1, 8);
        self.write(register::STATUS, STEP_4);
    }

    fn activations(&self) -> usize {
        self.seen.lock().expect("lock").activations.len()
    }
}

#[test]
fn shows_what_it_is() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0x00).to_le_bytes(), *b"virt");
    assert_eq!(bench.read(0x04), 2);
    assert_eq!(bench.read(0x08), 2);
    assert_eq!(bench.read(register::DEVICE_FEATURES), 0b101 | 1 << 29);
    bench.write(register::DEVICE_FEATURES_SELECT, 1);
    assert_eq!(bench.read(register::DEVICE_FEATURES), 1);
    bench.write(register::DEVICE_FEATURES_SELECT, 2);
    assert_eq!(bench.read(register::DEVICE_FEATURES), 0);
    assert_eq!(bench.read(register::SHARED_MEMORY_LENGTH), u32::MAX);
    bench.write(register::QUEUE_SELECT, 1);
    assert_eq!(bench.read(register::QUEUE_SIZE_MAX), 8);
    bench.write(register::QUEUE_SELECT, 2);
    assert_eq!(bench.read(register::QUEUE_SIZE_MAX), 0);
}

#[test]
fn a_good_driver_gets_its_device() {
    let mut bench = Bench::new();
    bench.start();
    assert_eq!(bench.status(), STEP_4);
    assert!(bench.transport.is_active());
    let seen = bench.seen.lock().expect("lock");
    assert_eq!(seen.activations, [(1 | 1 << 32, vec![4, 8])]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (low, high) in [(0b10, 1), (1, 0), (1, 0b11)] {
        let mut bench = Bench::new();
        bench.negotiate(low, high);
        assert_eq!(bench.status(), STEP_2, "{low:#x} {high:#x}");
    }
}

#[test]
fn steps_out_of_turn_are_ignored() {
    let mut bench = Bench::new();
    for (written, expected) in [
        (status::DRIVER, 0),
        (STEP_4, 0),
        (STEP_1, STEP_1),
        (STEP_1 | status::FEATURES_OK, STEP_1),
        (STEP_2, STEP_2),
        (STEP_1, STEP_2),
        (STEP_2 | status::DRIVER_OK, STEP_2),
        (STEP_2 | 0x10, STEP_2),
        (STEP_2 | status::FAILED, STEP_2 | status::FAILED),
        (STEP_3 | status::FAILED, STEP_2 | status::FAILED),
        (0, 0),
    ] {
        bench.write(register::STATUS, written);
        assert_eq!(bench.status(), expected, "{written:#x}");
    }
    assert_eq!(bench.activations(), 0);
}

#[test]
fn features_do_not_change_after_features_ok() {
    let mut bench = Bench::new();
    bench.negotiate(1, 1);
    bench.write(register::DRIVER_FEATURES_SELECT, 0);
    bench.write(register::DRIVER_FEATURES, 0b100);
    bench.set_up_queue(0, 4);
    bench.set_up_queue(1, 8);
    bench.write(register::STATUS, STEP_4);
    assert_eq!(
        bench.seen.lock().expect("lock").activations[0].0,
        1 | 1 << 32
    );
}

#[test]
fn queues_do_not_change_once_ready_or_running() {
    let mut bench = Bench::new();
    bench.negotiate(1, 1);
    bench.set_up_queue(0, 4);
    bench.write(register::QUEUE_SIZE, 8);
    bench.write(0x80, 0xdead_0000);
    assert_eq!(bench.transport.queues[0].size, 4);
    assert_eq!(bench.transport.queues[0].descriptors, 0x1000);
    bench.set_up_queue(1, 8);
    bench.write(register::STATUS, STEP_4);
    let before = bench.transport.queues.clone();
    bench.write(register::QUEUE_READY, 0);
    bench.set_up_queue(0, 2);
    assert_eq!(bench.transport.queues, before);
}

#[test]
fn queues_are_not_set_up_before_features_ok() {
    let mut bench = Bench::new();
    bench.write(register::STATUS, STEP_1);
    bench.write(register::STATUS, STEP_2);
    bench.set_up_queue(0, 4);
    assert_eq!(bench.transport.queues[0], QueueRegisters::new(16));
}

#[test]
fn bad_sizes_are_ignored() {
    let mut bench = Bench::new();
    bench.negotiate(1, 1);
    for size in [0, 3, 32, 0x1_0004, u32::MAX] {
        bench.write(register::QUEUE_SIZE, size);
        assert_eq!(bench.transport.queues[0].size, 16, "{size:#x}");
    }
}

/// What only DRIVER_OK can find out.
#[test]
fn unusable_queues_need_a_reset() {
    for (offset, value) in [
        (0x80u64, 0x1008u32), // descriptors not aligned
        (0x80, 0xffff_f000),  // outside of memory
        (0x84, 1),
        (0x94, u32::MAX),
        (0xa0, (1 << 20) - 4),
        (register::QUEUE_READY, 0),
    ] {
        let mut bench = Bench::new();
        bench.negotiate(1, 1);
        bench.set_up_queue(0, 4);
        bench.set_up_queue(1, 8);
        bench.write(register::QUEUE_READY, 0);
        bench.write(offset, value);
        if offset != register::QUEUE_READY {
            bench.write(register::QUEUE_READY, 1);
        }
        bench.write(register::STATUS, STEP_4);
        assert_eq!(bench.status(), STEP_4 | status::NEEDS_RESET, "{offset:#x}");
        assert_eq!(bench.read(register::INTERRUPT_STATUS), 2);
        assert_eq!(bench.irq.read().expect("interrupt"), 1);
        assert_eq!(bench.activations(), 0);
        bench.start();
        assert_eq!(bench.status(), STEP_4, "after a reset");
    }
}

#[test]
fn reset_forgets_everything() {
    let mut bench = Bench::new();
    bench.start();
    bench.transport.interrupt.mark_broken();
    assert_eq!(bench.status(), STEP_4 | status::NEEDS_RESET);
    bench.write(register::STATUS, 0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.read(register::INTERRUPT_STATUS), 0);
    assert_eq!(bench.transport.queues[0], QueueRegisters::new(16));
    assert_eq!(bench.transport.driver_features, 0);
    assert_eq!(bench.seen.lock().expect("lock").deactivations, 1);
    bench.start();
    assert_eq!(bench.activations(), 2);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    use crate::virtio::Interrupt;
    let mut bench = Bench::new();
    bench
        .transport
        .interrupt
        .used_buffers(0)
        .expect("interrupt");
    bench
        .transport
        .interrupt
        .configuration_changed(1, &[7])
        .expect("interrupt");
    assert_eq!(bench.irq.read().expect("interrupt"), 2);
    assert_eq!(bench.read(register::INTERRUPT_STATUS), 3);
    assert_eq!(bench.read(register::CONFIG_GENERATION), 1);
    bench.write(register::INTERRUPT_ACK, 1);
    assert_eq!(bench.read(register::INTERRUPT_STATUS), 2);
    bench.write(register::INTERRUPT_ACK, 0xff);
    assert_eq!(bench.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn some_notifications_come_by_the_vcpu() {
    let mut bench = Bench::new();
    bench.write(register::QUEUE_NOTIFY, 1);
    bench.start();
    for queue in [0, 1, 2, 0x1_0001, u32::MAX, 1] {
        bench.write(register::QUEUE_NOTIFY, queue);
    }
    bench.transport.pause();
    bench.write(register::QUEUE_NOTIFY, 1);
    assert_eq!(bench.seen.lock().expect("lock").notified, [1, 1]);
    // Once at the start, once by the driver.
    let waited_for = &bench.transport.notifications[0];
    assert_eq!(waited_for.read().expect("an event"), 2);
}

#[test]
fn the_configuration_has_any_width() {
    let mut bench = Bench::new();
    let mut byte = [0];
    bench.transport.interrupt.page().read(0x101, &mut byte);
    assert_eq!(byte, [2]);
    let mut long = [0xff; 8];
    bench.transport.interrupt.page().read(0x102, &mut long);
    assert_eq!(long, [3, 4, 5, 0, 0, 0, 0, 0]);
    bench.transport.write(0x100, &[9]);
    assert!(
        bench.seen.lock().expect("lock").config.is_empty(),
        "no driver yet"
    );
    bench.write(register::STATUS, STEP_1);
    bench.write(register::STATUS, STEP_2);
    bench.transport.write(0x100, &[9]);
    assert_eq!(bench.seen.lock().expect("lock").config, [9]);
}

#[test]
fn registers_are_written_with_one_width() {
    let mut bench = Bench::new();
    for length in [1, 2, 3, 8] {
        bench.transport.write(register::STATUS, &vec![1; length]);
    }
    bench.transport.write(register::STATUS + 2, &[1; 4]);
    assert_eq!(bench.status(), 0);
}

/// No sequence of accesses panics or activates a device without a negotiation.
#[test]
fn random_accesses_are_survived() {
    let mut bench = Bench::new();
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..200_000 {
        let offset = next() % 0x120;
        let small = next() % 16;
        let value = if next() % 2 == 0 { small } else { next() };
        if next() % 8 == 0 {
            let mut data = [0; 4];
            bench
                .transport
                .interrupt
                .page()
                .read(offset & !3, &mut data);
        } else {
            bench
                .transport
                .write(offset & !3, &value.to_le_bytes()[..4]);
        }
    }
    for (features, _) in &bench.seen.lock().expect("lock").activations {
        assert_ne!(features & FEATURE_VERSION_1, 0);
    }
}

#[test]
fn a_saved_transport_goes_on() {
    let mut first = Bench::new();
    first.start();
    first.transport.pause();
    let state = serde_json::to_string(&first.transport.save().expect("save")).expect("json");
    let mut second = Bench::new();
    second
        .transport
        .restore(serde_json::from_str(&state).expect("json"))
        .expect("restore");
    assert!(!second.transport.is_active());
    second.transport.resume();
    assert!(second.transport.is_active());
    assert_eq!(second.status(), STEP_4);
    assert_eq!(second.transport.queues[0].next_available, 3);
    assert_eq!(
        second.seen.lock().expect("lock").activations,
        [(1 | 1 << 32, vec![4, 8])]
    );
}

#[test]
fn state_of_another_device_is_refused() {
    let mut bench = Bench::new();
    let mut state = serde_json::to_value(bench.transport.save().expect("save")).expect("json");
    state["device"] = serde_json::json!({ "device": "entropy" });
    let foreign = serde_json::from_value(state.clone()).expect("json");
    assert!(bench.transport.restore(foreign).is_err());
    state["device"] = serde_json::json!({"device": "block", "sectors": 7, "read_only": true});
    state["driver_features"] = serde_json::json!(2);
    let impossible = serde_json::from_value(state.clone()).expect("json");
    assert!(bench.transport.restore(impossible).is_err());
    state["driver_features"] = serde_json::json!(0);
    state["queues"] = serde_json::json!([]);
    let queueless = serde_json::from_value(state).expect("json");
    assert!(bench.transport.restore(queueless).is_err());
}
