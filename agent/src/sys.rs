//! Every `unsafe` block of the agent: system calls that neither std nor rustix wraps safely.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::process::Pid;
use tokio::io::{Interest, unix::AsyncFd};

/// In which of the two processes [`fork`] returned.
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The caller, with the new process's id and pidfd.
    Parent(Pid, OwnedFd),
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Forks into the new namespaces of `namespaces` (CLONE_NEW*) and, if given, into a cgroup
/// (clone3(2)). Signal handlers are reset in the child; ignored signals stay ignored.
///
/// The caller must have one thread only, as the child goes on in ordinary Rust code.
pub(crate) fn fork(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data for which zero is a valid value of every field.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    arguments.pidfd = ptr::from_mut(&mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or(u64::MAX);
    }
    // SAFETY: `arguments` is valid for its size; without CLONE_VM the child has its own copy of
    // this memory and stack, and with one thread no lock is held by a thread that it lacks.
    let pid = check(unsafe {
        libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>())
    })?;
    match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        None => Ok(Forked::Child),
        // SAFETY: the kernel has stored a new file descriptor that nobody else owns.
        Some(pid) => Ok(Forked::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Ends the process at once: no destructor runs, no buffer is written.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Closes every file descriptor above 2 but those of `keep`.
///
/// For a new process that never returns to code that owns the others (see [`fork`]).
pub(crate) fn close_all_but(keep: &mut [RawFd]) {
    keep.sort_unstable();
    let mut first = 3;
    for &kept in keep.iter() {
        if kept > first {
            close_range(first, kept - 1);
        }
        first = first.max(kept + 1);
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    // SAFETY: close_range touches no memory; the callers own the whole range. The result is of no
    // use: descriptors that are not open are no error, and the arguments are in order.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Moves the calling process into new namespaces (unshare(2)).
pub(crate) fn unshare(namespaces: i32) -> io::Result<()> {
    // SAFETY: the flags are of namespaces only; memory and descriptors are not affected.
    check(unsafe { libc::unshare(namespaces) }.into()).map(drop)
}

/// Replaces the program (execve(2)): comes back only with an error.
pub(crate) fn execute(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let vector = |strings: &[CString]| {
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(ptr::null());
        pointers
    };
    let (arguments, environment) = (vector(arguments), vector(environment));
    // SAFETY: both vectors end with a null pointer, and all strings outlive the call.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Gives every signal its default action and blocks none. By system calls: libc keeps two signals
/// for itself.
pub(crate) fn reset_signals() {
    /// Size of the kernel's `sigset_t`.
    const SET: usize = 8;
    // The kernel's `struct sigaction` for SIG_DFL, and an empty set.
    let default = [0u64; 4];
    let none = [0u64; 1];
    for signal in 1..=64 {
        // SAFETY: the action is valid for its size, and installs no handler. Errors (SIGKILL,
        // SIGSTOP) are expected and change nothing.
        unsafe {
            let former = ptr::null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, signal, &default, former, SET);
        }
    }
    // SAFETY: the set is valid for its size.
    unsafe {
        let former = ptr::null_mut::<u64>();
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &none,
            former,
            SET,
        );
    }
}

/// Registers a descriptor that does not block with the runtime's event queue.
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is returned, which gives out shared references
    // only, so it stays open and the same until it is deregistered.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// The mark of a socket (SO_MARK, socket(7)).
pub(crate) fn socket_mark(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut mark = 0u32;
    let mut length = libc::socklen_t::try_from(size_of_val(&mark)).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes to `mark`, which has as many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            ptr::from_mut(&mut mark).cast(),
            &mut length,
        )
    };
    check(result.into()).map(|_| mark)
}

/// Sends a signal of any number to the process of a pidfd.
pub(crate) fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo_t is allowed (pidfd_send_signal(2)).
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            none,
            0,
        )
    })
    .map(drop)
}

/// Sends a signal of any number to a process.
pub(crate) fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill touches no memory.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }.into()).map(drop)
}

/// What [`set_mount_attributes`] changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    /// MOUNT_ATTR_* to set.
    pub set: u64,
    /// MOUNT_ATTR_* to clear.
    pub clear: u64,
    /// MS_SHARED, MS_PRIVATE, MS_SLAVE, MS_UNBINDABLE, or 0 to leave it.
    pub propagation: u64,
}

/// Changes the attributes of the mount whose root `mount` is, of those below it too if
/// `recursive` (mount_setattr(2)).
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    mount_setattr(mount, recursive, &attributes)
}

/// Gives a detached mount the id maps of a user namespace, those below it too if `recursive`.
pub(crate) fn map_mount_ids(
    mount: BorrowedFd<'_>,
    recursive: bool,
    user_namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(raw_unsigned(user_namespace)),
    };
    mount_setattr(mount, recursive, &attributes)
}

fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and the structure is valid for the size given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Installs a seccomp filter, an array of `struct sock_filter` in memory order (seccomp(2)).
pub(crate) fn install_seccomp_filter(program: &[u8], flags: u64) -> io::Result<()> {
    let instructions: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(|_| io::ErrorKind::FileTooLarge)?,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: the program points to `len` instructions that live through the call; the kernel
    // only reads them.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &program,
        )
    })
    .map(drop)
}

/// One eBPF instruction (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpfInstruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low, source register in the high four bits.
    pub registers: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Immediate operand.
    pub immediate: i32,
}

/// What a program that is attached to a cgroup decides: BPF_PROG_TYPE_… and BPF_CGROUP_… of
/// include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfHook(u32, u32);

impl BpfHook {
    /// Accesses to devices.
    pub(crate) const DEVICE: Self = Self(15, 6);
    /// Where connect(2) leads, IPv4.
    pub(crate) const CONNECT: Self = Self(18, 10);
    /// Where sendmsg(2) of a UDP socket that is not connected leads, IPv4.
    pub(crate) const SEND: Self = Self(18, 14);
    /// Whence recvmsg(2) of a UDP socket says that a datagram came, IPv4.
    pub(crate) const RECEIVE: Self = Self(18, 19);
}

/// Loads a program and attaches it to a cgroup, in place of an earlier one if given. It stays attached
/// when what is returned is closed.
pub(crate) fn attach_program(
    hook: BpfHook,
    cgroup: BorrowedFd<'_>,
    program: &[BpfInstruction],
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_PROG_ATTACH: i32 = 8;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    const BPF_F_REPLACE: u32 = 4;
    #[repr(C)]
    struct Load {
        program_type: u32,
        instructions: u32,
        instruction_pointer: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
        replaced: u32,
    }
    let load = Load {
        program_type: hook.0,
        instructions: u32::try_from(program.len()).map_err(|_| io::ErrorKind::FileTooLarge)?,
        instruction_pointer: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach_type: hook.1,
    };
    // SAFETY: `load` begins like `union bpf_attr` for BPF_PROG_LOAD and is valid for its size; its
    // pointers are valid for the call.
    let descriptor =
        check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &load, size_of::<Load>()) })?;
    let descriptor = RawFd::try_from(descriptor).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let attach = Attach {
        target: raw_unsigned(cgroup),
        program: raw_unsigned(descriptor.as_fd()),
        attach_type: hook.1,
        flags: BPF_F_ALLOW_MULTI | replaced.map_or(0, |_| BPF_F_REPLACE),
        replaced: replaced.map_or(0, raw_unsigned),
    };
    // SAFETY: `attach` is laid out as BPF_PROG_ATTACH expects and valid for its size.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attach, size_of::<Attach>()) })?;
    Ok(descriptor)
}

fn raw_unsigned(descriptor: BorrowedFd<'_>) -> u32 {
    u32::try_from(descriptor.as_raw_fd()).unwrap_or(u32::MAX)
}

/// Sets the loopback interface up in the caller's network namespace.
pub(crate) fn raise_loopback() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    // IFF_UP and IFF_RUNNING fit into 16 bits.
    request.ifr_ifru.ifru_flags = 0x41;
    // SAFETY: the request is a valid ifreq with a terminated name.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }.into()).map(drop)
}

/// Joins a new session keyring of the given name (keyctl(2)).
pub(crate) fn join_new_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: the name is a C string.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })
        .map(drop)
}

/// Sets the execution domain (personality(2)).
pub(crate) fn set_personality(domain: u64) -> io::Result<()> {
    // SAFETY: personality touches no memory.
    check(unsafe { libc::syscall(libc::SYS_personality, domain) }).map(drop)
}

/// Sets the I/O priority of the calling process (ioprio_set(2)).
pub(crate) fn set_io_priority(class: u16, priority: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    let value = i32::from(class) << 13 | i32::from(priority);
    // SAFETY: ioprio_set touches no memory.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// `struct sched_attr` of sched_setattr(2), first version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub(crate) struct SchedulingAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Sets the scheduling policy of the calling thread; `size` is filled in here.
pub(crate) fn set_scheduling(mut attributes: SchedulingAttributes) -> io::Result<()> {
    attributes.size = 48;
    // SAFETY: the structure is valid for the size that it states.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attributes, 0) }).map(drop)
}

/// A replacement for the program of this process whose type says that it does not come back.
pub(crate) type Never = Infallible;
