//! The crate's only unsafe code: mappings laid over guest memory, memory slots, fork, the signal
//! that brings a vCPU out of the guest, the ioctls of taps, leases on files.
#![allow(unsafe_code)]

pub(crate) mod guest_io;
pub(crate) mod held;
pub(crate) mod lease;
pub(crate) mod tun;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_MEM_READONLY, kvm_run, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::mount::MountAttrFlags;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vm_memory::{
    Address, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

/// linux/sched.h; the `libc` crate has it in a type that it does not fit into.
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// Of x86-64.
const PAGE: usize = 4096;

/// Gives the calling thread a working directory and a file mode mask of its own, which the file
/// server changes while it works.
pub(crate) fn leave_shared_fs_attributes() -> io::Result<()> {
    // SAFETY: with CLONE_FS alone, unshare(2) touches no memory and no descriptor; what it unshares
    // is per thread for the kernel, and nothing here relies on it being shared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    Ok(())
}

/// A descriptor of /dev/kvm as the type of the ioctls.
pub(crate) fn kvm_from(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor was owned and is given away; it may be any file as far as memory
    // safety goes, KVM's ioctls fail on others.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// An event's descriptor with a lifetime.
pub(crate) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Tells KVM that guest physical memory from the region's start is the region's mapping; with
/// `read_only`, what the guest writes there comes to us.
pub(crate) fn set_memory_slot(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap,
    read_only: bool,
) -> io::Result<()> {
    let address = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    let slot = kvm_userspace_memory_region {
        slot,
        flags: if read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: address as u64,
    };
    // SAFETY: address and size are those of the region's mapping. `Machine` owns the guest memory
    // and drops the VM's descriptors with it; guest memory is reached through vm-memory's volatile
    // accesses only, so that the guest writing to it at any time is expected.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Lays a private, writable mapping of `length` bytes of `file` over part of a guest memory
/// region. All but `file` are multiples of the page size; the caller has checked that.
pub(crate) fn map_over(
    region: &GuestRegionMmap,
    at: MemoryRegionAddress,
    file: &File,
    offset: i64,
    length: usize,
) -> io::Result<()> {
    let end = at.checked_add(length as u64);
    if length == 0 || end.is_none_or(|end| end.raw_value() > region.len()) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let address = region.get_host_address(at).map_err(io::Error::other)?;
    // SAFETY: the range lies inside the region's mapping (checked above), which nothing refers to
    // by reference, so that replacing its pages is no more than a write to guest memory. The
    // region unmaps the whole range when it is dropped, this mapping included.
    let mapped = unsafe {
        libc::mmap(
            address.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory of the guest from `start`: private, anonymous, and at an address that is a multiple of
/// `alignment`. It is never unmapped: a machine lives as long as its process.
pub(crate) fn map_memory(
    start: GuestAddress,
    length: u64,
    alignment: u64,
) -> io::Result<GuestRegionMmap> {
    let size = usize::try_from(length).map_err(io::Error::other)?;
    let alignment = usize::try_from(alignment).map_err(io::Error::other)?;
    let padded = size
        .checked_add(alignment)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // NORESERVE: the host gives pages as the guest touches them; cgroups hold the limit.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), padded, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let aligned = address.map_addr(|address| address.next_multiple_of(alignment));
    // SAFETY: the range lies in the mapping above, which stays: `size` bytes from an address less
    // than `alignment` after its beginning.
    let mapping = unsafe { MmapRegion::build_raw(aligned.cast(), size, protection, flags) }
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// madvise(2) for part of a region. Only advice that leaves the content alone.
pub(crate) fn advise(
    region: &GuestRegionMmap,
    start: u64,
    length: u64,
    advice: libc::c_int,
) -> io::Result<()> {
    let harmless = [
        libc::MADV_DONTDUMP,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
    ];
    if !harmless.contains(&advice) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (address, length) = part_of(region, start, length)?;
    // SAFETY: the range lies in the region's own mapping, and the advice changes no content (both
    // checked above).
    if unsafe { libc::madvise(address, length, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether nobody has touched part of a region yet.
pub(crate) fn is_untouched(region: &GuestRegionMmap, start: u64, length: u64) -> io::Result<bool> {
    let (address, length) = part_of(region, start, length)?;
    let mut pages = vec![0; length.div_ceil(PAGE)];
    // SAFETY: the range lies in the region's own mapping, and there is a byte for each of its pages.
    if unsafe { libc::mincore(address, length, pages.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.iter().all(|page| page & 1 == 0))
}

fn part_of(
    region: &GuestRegionMmap,
    start: u64,
    length: u64,
) -> io::Result<(*mut libc::c_void, usize)> {
    let end = start.checked_add(length);
    if end.is_none_or(|end| end > region.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let address = region
        .get_host_address(MemoryRegionAddress(start.min(region.len() - 1)))
        .map_err(io::Error::other)?;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    Ok((address.cast(), length))
}

/// Forks; `None` in the child. The caller must have no other thread.
pub(crate) fn fork() -> io::Result<Option<u32>> {
    // SAFETY: no other thread exists (the program forks before it starts any), so that the child
    // inherits no lock that is held.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(pid.unsigned_abs())),
    }
}

/// Forks into a cgroup, version 2: clone(2), `CLONE_INTO_CGROUP`; `None` in the child. The caller must
/// have no other thread.
pub(crate) fn fork_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let arguments = libc::clone_args {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        // SAFETY: numbers alone, of which zero is valid.
        ..unsafe { std::mem::zeroed() }
    };
    // SAFETY: as a fork, without a stack of its own; no other thread exists. What the C library
    // does besides for its threads' sake matters to robust mutexes alone, and there are none.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of_val(&arguments)) };
    match u32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) => Ok(Some(pid)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Makes KVM_RUN return at once on a vCPU: its `immediate_exit` flag, mapped a second time so that
/// it lives on its own.
pub(crate) struct ImmediateExit(NonNull<kvm_run>);

// SAFETY: the mapping belongs to this value and is touched through one atomic byte only.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the shared page of a vCPU.
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the vCPU's first page holds
        // `kvm_run` (KVM_GET_VCPU_MMAP_SIZE is never smaller).
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let run = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self(run))
    }

    /// Sets or clears the flag.
    pub(crate) fn set(&self, on: bool) {
        // SAFETY: points into the mapping that this value owns; a byte is always aligned.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `of` has mapped; nothing else holds its address.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// Writes the FPU's state.
pub(crate) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than this structure only if the process has asked for large dynamic
    // features (ARCH_REQ_XCOMP_GUEST_PERM), which this one does not.
    unsafe { vcpu.set_xsave(xsave) }
}

/// Which internal error KVM_EXIT_INTERNAL_ERROR was.
pub(crate) fn internal_error(run: &kvm_run) -> u32 {
    // SAFETY: every bit pattern is a valid u32; KVM has filled this member of the union.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the empty handler of the kick signal, without SA_RESTART.
pub(crate) fn handle_kicks() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is a valid value; the handler does nothing, which is
    // async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends the kick signal to a thread.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    // SAFETY: the thread is not joined as long as its handle exists, so its id is valid.
    match unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) } {
        // ESRCH: it has ended by itself.
        0 | libc::ESRCH => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Gives this process new namespaces. The caller must have no other thread, and not ask for
/// [`UnshareFlags::FILES`].
pub(crate) fn unshare(flags: UnshareFlags) -> Result<(), rustix::io::Errno> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the table of descriptors stays shared.
    unsafe { unshare_unsafe(flags) }
}

/// Closes every descriptor above standard error, whatever the starter has left open.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: called first of all, when no value of this process owns a descriptor above 2.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes a detached tree of mounts out of the host's propagation and forbids what the jail does
/// not need on all of it: set-user-id programs, devices, execution, and what `more` says.
pub(crate) fn restrict_mount(mount: BorrowedFd<'_>, more: MountAttrFlags) -> io::Result<()> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | more;
    set_mount_attributes(mount, attributes, libc::MS_PRIVATE, libc::AT_RECURSIVE)
}

/// Makes one mount read-only, not those below it.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_mount_attributes(mount, MountAttrFlags::MOUNT_ATTR_RDONLY, 0, 0)
}

fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    propagation: u64,
    flags: libc::c_int,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set.bits().into(),
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, the structure is passed with its own size; both
    // outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
