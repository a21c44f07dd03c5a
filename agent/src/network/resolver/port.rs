//! Where processes find the name server: they ask at port 53, which must stay free for name servers
//! that run in containers and listen on every address. So the agent listens at another port, and
//! programs at the guest's cgroup root put one for the other, as Docker's NAT rules do on the host.

use std::{io, os::fd::AsFd, path::Path, sync::OnceLock};

use bulkhead_agent_protocol::RESOLVER_ADDRESS;
use rustix::fs::{Mode, OFlags, open};

use crate::bpf::{
    CONTEXT, EXIT, JUMP_IF_NOT_EQUAL, LOAD_WORD, MOVE_CONSTANT, RESULT, STORE_WORD, instruction,
};
use crate::sys::{self, BpfHook, BpfInstruction};

/// Where the agent listens: above the ports that the kernel gives out by itself.
pub(super) const PORT: u16 = 61_053;
/// RFC 1035.
const DOMAIN: u16 = 53;

/// The register that is ours.
const VALUE: u8 = 2;

/// Fields of `struct bpf_sock_addr`, both in the network's order of bytes.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// Programs that make ports of the name server's address those that the agent listens at, and back.
/// They stay for the guest's life: without a listener the address refuses either way.
pub(super) fn redirect(cgroups: &Path) -> io::Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_some() {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(cgroups, flags, Mode::empty())?;
    for (hook, from, to) in [
        (BpfHook::CONNECT, DOMAIN, PORT),
        (BpfHook::SEND, DOMAIN, PORT),
        (BpfHook::RECEIVE, PORT, DOMAIN),
    ] {
        sys::attach_program(hook, root.as_fd(), &program(from, to), None)?;
    }
    // The agent has one thread: nobody was quicker.
    DONE.get_or_init(|| ());
    Ok(())
}

fn program(from: u16, to: u16) -> [BpfInstruction; 8] {
    let address = i32::from_ne_bytes(RESOLVER_ADDRESS.octets());
    let port = |port: u16| i32::from(port.to_be());
    [
        // Let it go on, changed or not.
        instruction(MOVE_CONSTANT, RESULT, 0, 0, 1),
        instruction(LOAD_WORD, VALUE, CONTEXT, USER_IP4, 0),
        instruction(JUMP_IF_NOT_EQUAL, VALUE, 0, 4, address),
        instruction(LOAD_WORD, VALUE, CONTEXT, USER_PORT, 0),
        instruction(JUMP_IF_NOT_EQUAL, VALUE, 0, 2, port(from)),
        instruction(MOVE_CONSTANT, VALUE, 0, 0, port(to)),
        instruction(STORE_WORD, CONTEXT, VALUE, USER_PORT, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}
