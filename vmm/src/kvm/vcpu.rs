//! A virtual CPU on a thread of its own.
//!
//! ```text
//! paused ──Run──▶ running ──Pause / the guest ends──▶ paused ──handle dropped──▶ gone
//! ```
//!
//! A paused vCPU has completed its last access to a device (KVM does that on the next KVM_RUN), so
//! that its state is whole. Commands reach a running vCPU by a signal; a flag in memory shared with
//! KVM closes the gap between looking for commands and entering the guest.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::KvmError;
use super::exits::{Bus, Ending, EndingSlot};
use super::state::{MsrList, VcpuState};
use crate::boot::tables;
use crate::failure::Chain;
use crate::sys::{self, ImmediateExit};
use crate::threads::{self, Role};

/// IA32_MISC_ENABLE: fast strings on, as firmware leaves it.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: enabled, write back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets and delivery modes of the local APIC's LINT0 and LINT1 (Intel SDM vol. 3, §11.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;
const APIC_MODES: u32 = 7 << 8;

/// A vCPU that no thread runs yet.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Wraps a new vCPU and gives it its CPUID.
    pub fn new(index: u8, fd: VcpuFd, cpuid: &CpuId) -> Result<Self, KvmError> {
        fd.set_cpuid2(cpuid)
            .map_err(KvmError::during("set CPUID"))?;
        Ok(Self { index, fd })
    }

    /// Prepares for a fresh start. The first vCPU begins at `entry` in 64-bit mode, the others wait
    /// for the first to start them.
    pub fn prepare(&self, entry: u64) -> Result<(), KvmError> {
        let msrs = [
            msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ];
        let msrs = Msrs::from_entries(&msrs).map_err(|_| no_memory("compose MSRs"))?;
        self.fd
            .set_msrs(&msrs)
            .map_err(KvmError::during("set MSRs"))?;
        self.connect_lint()?;
        if self.index != 0 {
            return Ok(());
        }
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(KvmError::during("read registers"))?;
        tables::enter_long_mode(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(KvmError::during("set segments and paging"))?;
        self.fd
            .set_regs(&tables::entry_registers(entry))
            .map_err(KvmError::during("set registers"))
    }

    /// LINT0 takes the PIC's interrupts, LINT1 is the NMI.
    fn connect_lint(&self) -> Result<(), KvmError> {
        let mut apic = self
            .fd
            .get_lapic()
            .map_err(KvmError::during("read the local APIC"))?;
        for (offset, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
            let mut bytes = [0; 4];
            for (byte, register) in bytes.iter_mut().zip(&apic.regs[offset..]) {
                *byte = register.cast_unsigned();
            }
            let value = u32::from_le_bytes(bytes) & !APIC_MODES | mode;
            for (register, byte) in apic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
                *register = byte.cast_signed();
            }
        }
        self.fd
            .set_lapic(&apic)
            .map_err(KvmError::during("set up the local APIC"))
    }

    /// Puts saved state back, instead of [`Self::prepare`].
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        state.restore(&self.fd)
    }

    /// Enters the guest once, without a thread of its own.
    pub(crate) fn enter(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run()
    }

    /// Says which internal error the last exit was.
    pub(crate) fn internal_error(&mut self) -> String {
        internal_error(sys::internal_error(self.fd.get_kvm_run()))
    }

    /// Gives the vCPU a thread, paused.
    pub fn start(
        self,
        bus: Arc<dyn Bus>,
        ending: Arc<EndingSlot>,
        msrs: Arc<MsrList>,
    ) -> Result<RunningVcpu, KvmError> {
        install_signal().map_err(|error| {
            KvmError::Operation("handle the signal that interrupts vCPUs", error)
        })?;
        let failed = |error| KvmError::Operation("start a vCPU's thread", error);
        let exit = Arc::new(ImmediateExit::of(&self.fd).map_err(failed)?);
        let (commands, receiver) = mpsc::channel();
        let index = self.index;
        let body = Body {
            fd: self.fd,
            index,
            commands: receiver,
            exit: exit.clone(),
            bus,
            ending,
        };
        let thread =
            threads::spawn(Role::Vcpu(index), move || body.serve(&msrs)).map_err(failed)?;
        Ok(RunningVcpu {
            commands: Some(commands),
            exit,
            thread: Some(thread),
        })
    }
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn no_memory(what: &'static str) -> KvmError {
    KvmError::Operation(what, io::ErrorKind::OutOfMemory.into())
}

/// Once a process.
fn install_signal() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| sys::handle_kicks().map_err(|error| error.raw_os_error().unwrap_or(0)))
        .map_err(io::Error::from_raw_os_error)
}

/// What a vCPU's thread is told.
enum Command {
    Run,
    Pause(Sender<()>),
    Save(Sender<Result<Box<VcpuState>, KvmError>>),
}

/// A vCPU with its thread. Dropping it ends the thread.
pub struct RunningVcpu {
    commands: Option<Sender<Command>>,
    exit: Arc<ImmediateExit>,
    thread: Option<JoinHandle<()>>,
}

impl RunningVcpu {
    /// Enters the guest.
    pub fn run(&self) -> Result<(), KvmError> {
        self.send(Command::Run)
    }

    /// Leaves the guest; returns once it has.
    pub fn pause(&self) -> Result<(), KvmError> {
        let (reply, done) = mpsc::channel();
        self.send(Command::Pause(reply))?;
        self.interrupt()?;
        done.recv().map_err(|_| gone())
    }

    /// Takes the state of a paused vCPU.
    pub fn save(&self) -> Result<Box<VcpuState>, KvmError> {
        let (reply, state) = mpsc::channel();
        self.send(Command::Save(reply))?;
        state.recv().map_err(|_| gone())?
    }

    fn send(&self, command: Command) -> Result<(), KvmError> {
        self.commands
            .as_ref()
            .and_then(|commands| commands.send(command).ok())
            .ok_or_else(gone)
    }

    /// Makes the thread look for commands.
    fn interrupt(&self) -> Result<(), KvmError> {
        self.exit.set(true);
        self.thread
            .as_ref()
            .map_or(Ok(()), sys::kick)
            .map_err(|error| KvmError::Operation("interrupt a vCPU", error))
    }
}

impl Drop for RunningVcpu {
    fn drop(&mut self) {
        self.commands = None;
        if let Err(error) = self.interrupt() {
            tracing::error!(error = %Chain(&error), "cannot end a vCPU's thread");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // An error is the panic of a test, which has been shown.
            let _ = thread.join();
        }
    }
}

fn gone() -> KvmError {
    KvmError::Operation("command a vCPU", io::ErrorKind::BrokenPipe.into())
}

fn not_paused() -> KvmError {
    KvmError::Operation(
        "save a vCPU that is not paused",
        io::ErrorKind::InvalidInput.into(),
    )
}

/// What the thread owns.
struct Body {
    fd: VcpuFd,
    index: u8,
    commands: Receiver<Command>,
    exit: Arc<ImmediateExit>,
    bus: Arc<dyn Bus>,
    ending: Arc<EndingSlot>,
}

impl Body {
    /// Paused: waits for commands. Returns when the handle is dropped.
    fn serve(mut self, msrs: &MsrList) {
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Run => {
                    if let Err(ending) = self.run() {
                        self.ending.put(ending);
                    }
                }
                // Whoever asked may have given up.
                Command::Pause(reply) => drop(reply.send(())),
                Command::Save(reply) => {
                    let _ = reply.send(VcpuState::take(&self.fd, msrs).map(Box::new));
                }
            }
        }
    }

    /// Runs until told to pause, or until the guest ends.
    fn run(&mut self) -> Result<(), Ending> {
        loop {
            match step(&mut self.fd, self.bus.as_ref()) {
                Ok(Step::Continue) => {}
                Ok(Step::Reset) => return Err(Ending::Reset),
                Ok(Step::Strange(what)) => return Err(self.broken(&what)),
                Ok(Step::Internal) => {
                    let what = internal_error(sys::internal_error(self.fd.get_kvm_run()));
                    let hint = "is this host's KVM a complete one (bulkhead check)?";
                    return Err(self.broken(&format!("{what}; {hint}")));
                }
                Err(libc::EINTR) => {
                    // Cleared before looking: a command that comes now sets it again.
                    self.exit.set(false);
                    match self.commands.try_recv() {
                        Ok(Command::Pause(reply)) => {
                            let _ = reply.send(());
                            return Ok(());
                        }
                        Ok(Command::Run) | Err(TryRecvError::Empty) => {}
                        Ok(Command::Save(reply)) => {
                            let _ = reply.send(Err(not_paused()));
                        }
                        Err(TryRecvError::Disconnected) => return Ok(()),
                    }
                }
                // A page that is being moved.
                Err(libc::EAGAIN) => {}
                Err(error) => {
                    let cause = io::Error::from_raw_os_error(error);
                    return Err(self.broken(&format!("it cannot enter the guest: {cause}")));
                }
            }
        }
    }

    fn broken(&self, what: &str) -> Ending {
        let at = match self.fd.get_regs() {
            Ok(regs) => format!("{:#x}", regs.rip),
            Err(_) => "an unknown address".into(),
        };
        Ending::Broken(format!("vCPU {} stopped at {at}: {what}", self.index))
    }
}

/// What came of one stay in the guest.
enum Step {
    Continue,
    Reset,
    Internal,
    Strange(String),
}

/// Enters the guest once and serves its exit. Fails with KVM_RUN's error number.
fn step(fd: &mut VcpuFd, bus: &dyn Bus) -> Result<Step, i32> {
    let step = match fd.run().map_err(|error| error.errno())? {
        VcpuExit::MmioRead(address, data) => {
            bus.read_memory(address, data);
            Step::Continue
        }
        VcpuExit::MmioWrite(address, data) => {
            bus.write_memory(address, data);
            Step::Continue
        }
        VcpuExit::IoIn(port, data) => {
            bus.read_port(port, data);
            Step::Continue
        }
        VcpuExit::IoOut(port, data) => match bus.write_port(port, data) {
            None => Step::Continue,
            Some(Ending::Reset) => Step::Reset,
            Some(Ending::Broken(what)) => Step::Strange(what),
        },
        // A triple fault: how the guest's kernel resets (`reboot=t`).
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => Step::Reset,
        VcpuExit::Intr => Step::Continue,
        VcpuExit::InternalError => Step::Internal,
        VcpuExit::FailEntry(reason, cpu) => Step::Strange(format!(
            "the CPU refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
        )),
        VcpuExit::MemoryFault { gpa, .. } => Step::Strange(format!(
            "the host could not provide guest memory at {gpa:#x}"
        )),
        exit => Step::Strange(format!("KVM reports something unexpected: {exit:?}")),
    };
    Ok(step)
}

/// Sub-errors of KVM_EXIT_INTERNAL_ERROR (linux/kvm.h).
fn internal_error(code: u32) -> String {
    match code {
        1 => "it met an instruction that KVM cannot emulate".into(),
        2 => "an exception came while another was delivered".into(),
        3 => "delivering an event caused an exit".into(),
        4 => "an exit for a reason that KVM does not know".into(),
        other => format!("internal error {other}"),
    }
}
