//! Is this host's KVM usable? Some hosts have a /dev/kvm that opens and emulates each instruction
//! of a 64-bit kernel, a thousand times slower than the CPU, and fails on some of them. This runs
//! a guest of a few instructions and takes the time.

use std::hint::black_box;
use std::time::Instant;

use kvm_ioctls::VcpuExit;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::{BootError, tables};
use crate::failure::Chain;
use crate::kvm::KvmError;
use crate::kvm::cpuid::CpuModel;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::{self, Vm};
use crate::machine::MachineError;
use crate::{layout, memory};

/// The finding, printed as one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether guests can run.
    pub usable: bool,
    /// For people: what was measured, what to do.
    pub message: String,
}

/// Where the guest's code lies.
const CODE: u64 = layout::HIGH_MEMORY;
/// Rounds of the timed loop, two instructions each.
const ROUNDS: u32 = 20_000;
/// Slower than the host's own loop by more than this is emulation. Real KVM is at 1, nested KVM
/// below 3.
const TOO_SLOW: u128 = 50;
/// The guest's port that tells us where it is.
const PORT: u16 = 0x10;

/// What kernels do early; each step ends by writing its number to the port.
///
/// In 64-bit mode, at ring 0, without a stack: the loop (step 1), SSE (2), CPUID, a model-specific
/// register and the time stamp counter (3), a locked 16-byte exchange and XMM stores to memory (4).
#[rustfmt::skip]
fn code() -> Vec<u8> {
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    let mut code = vec![
        0xb0, 0, 0xe6, 0x10,                // mov al, 0; out 0x10, al: the clock starts
        0xb9, a, b, c, d,                   // mov ecx, ROUNDS
        0xff, 0xc9, 0x75, 0xfc,             // 1: dec ecx; jnz 1b
        0xb0, 1, 0xe6, 0x10,
        0x0f, 0x20, 0xe0,                   // mov rax, cr4
        0x0d, 0, 2, 0, 0,                   // or eax, OSFXSR
        0x0f, 0x22, 0xe0,                   // mov cr4, rax
        0x66, 0x0f, 0xef, 0xc0,             // pxor xmm0, xmm0
        0x66, 0x0f, 0x6f, 0xc8,             // movdqa xmm1, xmm0
        0xb0, 2, 0xe6, 0x10,
        0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2, // xor eax, eax; xor ecx, ecx; cpuid
        0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, // mov ecx, IA32_EFER; rdmsr
        0x0f, 0x31,                         // rdtsc
        0xb0, 3, 0xe6, 0x10,
        0xbf, 0, 0, 0x20, 0,                // mov edi, 0x20_0000
        0xf0, 0x48, 0x0f, 0xc7, 0x0f,       // lock cmpxchg16b [rdi]
        0xf3, 0x0f, 0x7f, 0x07,             // movdqu [rdi], xmm0
    ];
    code.extend([0xb0, 4, 0xe6, 0x10, 0xf4]); // …; hlt
    code
}
const LAST_STEP: u8 = 4;

/// Runs the guest and judges.
pub fn probe() -> Finding {
    match measure() {
        Ok(Outcome::Ran {
            guest_ns,
            native_ns,
        }) => judge(guest_ns, native_ns),
        Ok(Outcome::Stopped { after, why }) => Finding {
            usable: false,
            message: format!(
                "/dev/kvm opens, but cannot run a guest: {why} after step {after} of {LAST_STEP}; \
                 {ADVICE}"
            ),
        },
        Err(error) => Finding {
            usable: false,
            message: Chain(&error).to_string(),
        },
    }
}

const ADVICE: &str = "use a host with hardware virtualisation, or a virtual machine with nested \
                      virtualisation enabled";

fn judge(guest_ns: u128, native_ns: u128) -> Finding {
    let ratio = guest_ns / native_ns.max(1);
    let per_instruction = guest_ns / (2 * u128::from(ROUNDS));
    let usable = ratio <= TOO_SLOW;
    let message = if usable {
        format!("KVM runs guests: a loop took {guest_ns} ns in a guest, {native_ns} ns outside")
    } else {
        format!(
            "/dev/kvm opens, but emulates guests: an instruction takes {per_instruction} ns, a loop \
             {ratio} times as long as outside; {ADVICE}"
        )
    };
    Finding { usable, message }
}

enum Outcome {
    Ran { guest_ns: u128, native_ns: u128 },
    Stopped { after: u8, why: String },
}

fn measure() -> Result<Outcome, MachineError> {
    let kvm = vm::open()?;
    let memory = memory::create(layout::MIN_MEMORY_MIB)?;
    let cpuid = CpuModel::new(&kvm, 1)?.for_cpu(0)?;
    let vm = Vm::new(kvm, 1)?;
    vm.set_memory(&memory)?;
    let mut vcpu = Vcpu::new(0, vm.create_vcpu(0)?, &cpuid)?;
    write_code(&memory)?;
    vcpu.prepare(CODE)?;
    let native_ns = native();
    let mut step = 0;
    let mut started = Instant::now();
    let mut guest_ns = 0;
    loop {
        let why = match vcpu.enter() {
            Ok(VcpuExit::IoOut(PORT, &[number])) => {
                match number {
                    0 => started = Instant::now(),
                    1 => guest_ns = started.elapsed().as_nanos(),
                    LAST_STEP => {
                        return Ok(Outcome::Ran {
                            guest_ns,
                            native_ns,
                        });
                    }
                    _ => {}
                }
                step = number;
                continue;
            }
            Ok(VcpuExit::InternalError) => None,
            Ok(VcpuExit::Shutdown) => Some("the guest met an exception (triple fault)".to_owned()),
            Ok(exit) => Some(format!("KVM reports {exit:?}")),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => return Err(KvmError::during("run a guest")(error).into()),
        };
        let why = why.unwrap_or_else(|| vcpu.internal_error());
        return Ok(Outcome::Stopped { after: step, why });
    }
}

fn write_code(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    tables::write(memory)?;
    memory
        .write_slice(&code(), GuestAddress(CODE))
        .map_err(|source| BootError::Write {
            what: "the probe's code",
            source,
        })
}

/// The same loop outside of the guest.
fn native() -> u128 {
    let started = Instant::now();
    let mut left = ROUNDS;
    while black_box(left) != 0 {
        left -= 1;
    }
    started.elapsed().as_nanos()
}
