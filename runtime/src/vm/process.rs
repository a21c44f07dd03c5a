//! A `bulkhead-vmm` process and the socket that it lives by.

use std::{
    fs::File,
    io::{self, IoSlice, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bulkhead_vmm::config::{CONTROL, VmCommand, VmConfig, VmEvent};
use rustix::{
    event::{PollFd, PollFlags},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions},
};

use super::{Stop, Vm, VmError};
use crate::{
    state::ProcessIdentity,
    wait::{Deadline, poll},
};

/// More than any event needs: a VMM that sends longer lines is not one.
const LONGEST_LINE: usize = 64 * 1024;
/// The most descriptors that a command brings.
const DESCRIPTORS: usize = 4;
/// How long a VM may take to end when told to, before it is killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// For a VM to say that somebody has joined.
const JOIN_LIMIT: Duration = Duration::from_secs(10);

/// A VM that is a process of this host.
#[derive(Debug)]
pub struct VmProcess {
    control: UnixStream,
    received: Vec<u8>,
    /// What it was started as, if by this process.
    starter: Option<Child>,
    /// The process that [`VmEvent::Forked`] named.
    process: Option<OwnedFd>,
    ended: bool,
}

fn control_error(operation: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Control { operation, source }
}

impl VmProcess {
    /// Starts the program; it waits for its configuration. Its log goes to `log`.
    pub fn start(program: &Path, log: File) -> Result<Self, VmError> {
        let failed = |source| VmError::Start {
            program: program.to_owned(),
            source,
        };
        let (control, theirs) = UnixStream::pair().map_err(failed)?;
        // The VM's process is the child of a child that ends at once: so that it becomes ours.
        rustix::process::set_child_subreaper(Some(Pid::INIT))
            .map_err(|error| failed(error.into()))?;
        let starter = Command::new(program)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .map_err(failed)?;
        control.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            control,
            received: Vec::new(),
            starter: Some(starter),
            process: None,
            ended: false,
        })
    }

    /// Becomes an owner of a VM that runs; `sockets` is the directory of its sockets.
    pub fn join(sockets: BorrowedFd<'_>, vmm: ProcessIdentity) -> Result<Self, VmError> {
        let failed = control_error("join");
        let process = match vmm.open() {
            Ok(Some(process)) => process,
            Ok(None) => return Err(VmError::Gone(String::new())),
            Err(error) => return Err(failed(error)),
        };
        // A socket's path has 107 bytes at most, so the directory goes by its number.
        let path = format!("/proc/self/fd/{}/{CONTROL}", sockets.as_raw_fd());
        let control = UnixStream::connect(path)
            .and_then(|control| control.set_nonblocking(true).map(|()| control))
            .map_err(failed)?;
        let mut joined = Self {
            control,
            received: Vec::new(),
            starter: None,
            process: Some(process.into()),
            ended: false,
        };
        let deadline = Deadline::after(JOIN_LIMIT);
        loop {
            match joined.next_event()? {
                Some(VmEvent::Joined) => return Ok(joined),
                Some(_) => {}
                None if joined.readable(deadline)? => {}
                None => return Err(control_error("join")(io::ErrorKind::TimedOut.into())),
            }
        }
    }

    fn readable(&self, deadline: Deadline) -> Result<bool, VmError> {
        let mut descriptors = [PollFd::new(&self.control, PollFlags::IN)];
        let ready = poll(&mut descriptors, Some(deadline));
        Ok(ready.map_err(control_error("wait for"))? > 0)
    }

    /// Descriptors go with the first byte that the socket takes.
    fn send(
        &mut self,
        message: &impl serde::Serialize,
        mut descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), VmError> {
        let mut line = serde_json::to_vec(message).map_err(VmError::Malformed)?;
        line.push(b'\n');
        let failed = control_error("write to");
        // The configuration can be longer than the socket's buffer.
        let mut rest = line.as_slice();
        let deadline = Deadline::after(END_LIMIT);
        loop {
            match self.write(rest, descriptors) {
                Ok(count) => (rest, descriptors) = (&rest[count..], &[]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut descriptors = [PollFd::new(&self.control, PollFlags::OUT)];
                    match poll(&mut descriptors, Some(deadline)) {
                        Ok(0) => return Err(failed(io::ErrorKind::TimedOut.into())),
                        Ok(_) => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
                Err(error) => return Err(failed(error)),
            }
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    fn write(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.control, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(sent)
    }

    /// The next whole line that was received; the error at the end of the socket.
    fn next_line(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.received, rest)));
            }
            if self.received.len() > LONGEST_LINE {
                return Err(VmError::TooLong(LONGEST_LINE));
            }
            let mut buffer = [0; 4096];
            match self.control.read(&mut buffer) {
                Ok(0) => return Err(VmError::Gone(self.reap())),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(VmError::Gone(self.reap()));
                }
                Err(error) => return Err(control_error("read from")(error)),
            }
        }
    }

    /// The pid is known: reads it while it certainly means that process, which waits for its Go.
    fn forked(&mut self, pid: u32) -> Result<(), VmError> {
        let failed = control_error("open the process of");
        let process = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        self.process = Some(process.map_err(|error| failed(error.into()))?);
        Ok(())
    }

    /// Waits for the end of what was started, killing it after a while; says how it ended.
    fn reap(&mut self) -> String {
        if self.ended {
            return String::new();
        }
        self.ended = true;
        let Some(process) = self.process.take() else {
            // It never forked. Its end of the socket is closed or about to be, so it ends.
            let Some(starter) = &mut self.starter else {
                return String::new();
            };
            let _ = starter.kill();
            return starter
                .wait()
                .map_or(String::new(), |status| format!(" ({status})"));
        };
        let mut descriptors = [PollFd::new(&process, PollFlags::IN)];
        if !matches!(
            poll(&mut descriptors, Some(Deadline::after(END_LIMIT))),
            Ok(1..)
        ) {
            let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        }
        let Some(starter) = &mut self.starter else {
            // Somebody else's child: how it ended is for that one to know.
            return String::new();
        };
        let _ = starter.wait();
        let how = rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
        match how.ok().flatten() {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (_, Some(signal)) => format!(" (killed by signal {signal})"),
                (Some(code), None) => format!(" (exit code {code})"),
                (None, None) => String::new(),
            },
            None => String::new(),
        }
    }
}

impl Vm for VmProcess {
    fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    fn configure(&mut self, config: &VmConfig) -> Result<(), VmError> {
        self.send(config, &[])
    }

    fn next_event(&mut self) -> Result<Option<VmEvent>, VmError> {
        let Some(line) = self.next_line()? else {
            return Ok(None);
        };
        match serde_json::from_slice(&line).map_err(VmError::Malformed)? {
            VmEvent::Forked { pid, in_cgroup } => {
                self.forked(pid)?;
                Ok(Some(VmEvent::Forked { pid, in_cgroup }))
            }
            VmEvent::Failed { message } => Err(VmError::Failed(message)),
            VmEvent::Exited => Err(VmError::GuestEnded),
            event => Ok(Some(event)),
        }
    }

    fn command_with(
        &mut self,
        command: VmCommand,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), VmError> {
        self.send(&command, descriptors)
    }

    fn stop(&mut self) -> Result<Stop, VmError> {
        if self.ended {
            return Ok(Stop::Ended);
        }
        // A VM that cannot be told has ended, or ends because the socket closes.
        if self.process.is_some() && self.send(&VmCommand::Stop, &[]).is_ok() {
            let deadline = Deadline::after(END_LIMIT);
            // What it says besides is of no interest any more. It ends, too, when it is not to wait
            // for anybody's Go.
            loop {
                match self.next_event() {
                    Ok(Some(VmEvent::Shared)) => return Ok(Stop::Shared),
                    Ok(Some(_)) => {}
                    Ok(None) if matches!(self.readable(deadline), Ok(true)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
        }
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        self.reap();
        Ok(Stop::Ended)
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        // Others may keep it: then it was only ours to leave.
        let _ = self.stop();
    }
}
