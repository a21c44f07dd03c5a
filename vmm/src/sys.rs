//! The crate's only unsafe code: mappings laid over guest memory, memory slots, fork, the signal
//! that brings a vCPU out of the guest, the ioctls of taps.
#![allow(unsafe_code)]

pub(crate) mod guest_io;
pub(crate) mod guest_view;
pub(crate) mod held;
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
use vm_memory::{Address, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

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

/// Keeps part of a region out of core dumps.
pub(crate) fn exclude_from_dumps(
    region: &GuestRegionMmap,
    start: u64,
    length: u64,
) -> io::Result<()> {
    let end = start.checked_add(length);
    if length == 0 || end.is_none_or(|end| end > region.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let address = region
        .get_host_address(MemoryRegionAddress(start))
        .map_err(io::Error::other)?;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the range lies in the region's own mapping (checked above), and MADV_DONTDUMP
    // changes no content.
    if unsafe { libc::madvise(address.cast(), length, libc::MADV_DONTDUMP) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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
