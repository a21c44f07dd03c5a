//! Moves bytes between the host's descriptors and the guest's streams, one flow for each
//! direction, all in the caller's poll loop.
//!
//! A flow waits either for input or for room at its output, never for both: what has not been
//! delivered is not read any further, so a slow reader slows its writer (backpressure). The end of
//! input is passed on as the end of output; when the output's reader is gone, that flow ends and
//! its input is let go, so that the writer hears of it, while the other flows go on.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
    pipe::SpliceFlags,
};
use thiserror::Error;

use super::endpoint::{Direction, Endpoint};
use crate::agent::Streams;

const BUFFER: usize = 64 * 1024;
/// Rounds before the other flows have their turn.
const ROUNDS: usize = 16;

/// A flow broke.
#[derive(Debug, Error)]
#[error("cannot carry the process's {stream}")]
pub struct RelayError {
    stream: &'static str,
    #[source]
    source: io::Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Input,
    Output,
}

/// Which of the runtime's own standard descriptors a flow uses, to be let go when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standard {
    Input,
    Output,
    Error,
}

#[derive(Debug)]
struct Flow {
    name: &'static str,
    from: Endpoint,
    to: Endpoint,
    wait: Wait,
    splice: bool,
    /// Empty until the first byte that splice(2) cannot move.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    input_ended: bool,
    /// Whether the end of input is told to the output (not for a terminal, where one stream goes
    /// both ways and its end means that the terminal hangs up).
    pass_end: bool,
    standard: Option<Standard>,
}

/// The flows of one process.
#[derive(Debug, Default)]
pub struct Relay {
    input: Option<Flow>,
    /// Nobody reads the input any more.
    input_unwanted: bool,
    outputs: Vec<Flow>,
}

impl Flow {
    fn new(name: &'static str, from: Endpoint, to: Endpoint) -> Self {
        let splice = from.is_pipe() || to.is_pipe();
        Self {
            name,
            from,
            to,
            wait: Wait::Input,
            splice,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            input_ended: false,
            pass_end: true,
            standard: None,
        }
    }

    fn poll_fds(&self) -> [PollFd<'_>; 2] {
        match self.wait {
            // The output is watched too, for its reader going away (POLLERR, POLLHUP).
            Wait::Input => [
                PollFd::new(&self.from, PollFlags::IN),
                PollFd::new(&self.to, PollFlags::empty()),
            ],
            Wait::Output => [
                PollFd::new(&self.to, PollFlags::OUT),
                PollFd::new(&self.to, PollFlags::empty()),
            ],
        }
    }

    /// Moves what can be moved; true when the flow has ended.
    fn advance(&mut self) -> Result<bool, RelayError> {
        for _ in 0..ROUNDS {
            let result = if self.start < self.end || self.input_ended {
                self.deliver()
            } else if self.splice {
                self.splice()
            } else {
                self.fetch()
            };
            match result {
                Ok(Step::Moved) | Err(Errno::INTR) => {}
                Ok(Step::Waits) => return Ok(false),
                Ok(Step::Ended) => return Ok(true),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(true),
                // The terminal that was written to has hung up.
                Err(Errno::IO) => return Ok(true),
                Err(error) => {
                    return Err(RelayError {
                        stream: self.name,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(false)
    }

    fn deliver(&mut self) -> rustix::io::Result<Step> {
        if self.start == self.end {
            if self.pass_end {
                self.to.end_writing();
            }
            return Ok(Step::Ended);
        }
        // What could not be opened again may block: only after poll has said that there is room.
        if matches!(self.to, Endpoint::Blocking(_)) && self.wait == Wait::Input {
            self.wait = Wait::Output;
            return Ok(Step::Waits);
        }
        match self.to.write(&self.buffer[self.start..self.end]) {
            Ok(count) => {
                self.start += count;
                self.wait = Wait::Input;
                Ok(Step::Moved)
            }
            Err(Errno::AGAIN) => {
                self.wait = Wait::Output;
                Ok(Step::Waits)
            }
            Err(error) => Err(error),
        }
    }

    fn fetch(&mut self) -> rustix::io::Result<Step> {
        if matches!(self.from, Endpoint::Blocking(_)) && !ready(&self.from, PollFlags::IN)? {
            self.wait = Wait::Input;
            return Ok(Step::Waits);
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER];
        }
        match self.from.read(&mut self.buffer) {
            Ok(0) => {
                self.input_ended = true;
                Ok(Step::Moved)
            }
            Ok(count) => {
                (self.start, self.end) = (0, count);
                Ok(Step::Moved)
            }
            Err(Errno::AGAIN) => {
                self.wait = Wait::Input;
                Ok(Step::Waits)
            }
            // The guest's side was cut off: nothing more comes.
            Err(Errno::CONNRESET) => {
                self.input_ended = true;
                Ok(Step::Moved)
            }
            Err(error) => Err(error),
        }
    }

    /// Moves pages from or into a pipe without copying them through here.
    fn splice(&mut self) -> rustix::io::Result<Step> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::pipe::splice(&self.from, None, &self.to, None, 1 << 20, flags) {
            Ok(0) => {
                self.input_ended = true;
                Ok(Step::Moved)
            }
            Ok(_) => Ok(Step::Moved),
            // Either side can be the reason.
            Err(Errno::AGAIN) => {
                let input = ready(&self.from, PollFlags::IN)?;
                self.wait = if input { Wait::Output } else { Wait::Input };
                if input && ready(&self.to, PollFlags::OUT)? {
                    // Both are ready and yet nothing moves, since splice(2) asks for more room
                    // than poll(2) does: copying always gets on.
                    return self.fetch();
                }
                Ok(Step::Waits)
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.splice = false;
                Ok(Step::Moved)
            }
            Err(Errno::CONNRESET) => {
                self.input_ended = true;
                Ok(Step::Moved)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets the runtime's own standard descriptor go, so that whoever is at its other end hears.
    fn release(&self) {
        let Some(standard) = self.standard else {
            return;
        };
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let Ok(null) = rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty()) else {
            return;
        };
        let _ = match standard {
            Standard::Input => rustix::stdio::dup2_stdin(&null),
            Standard::Output => rustix::stdio::dup2_stdout(&null),
            Standard::Error => rustix::stdio::dup2_stderr(&null),
        };
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Moved,
    Waits,
    Ended,
}

fn ready(endpoint: &Endpoint, flags: PollFlags) -> rustix::io::Result<bool> {
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut descriptors = [PollFd::new(endpoint, flags)];
    Ok(rustix::event::poll(&mut descriptors, Some(&now))? > 0)
}

impl Relay {
    /// Between these descriptors, the runtime's own standard ones, and the guest's streams.
    pub fn standard(streams: Streams) -> io::Result<Self> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let mut relay =
            Self::between(stdin.as_fd(), stdout.as_fd(), Some(stderr.as_fd()), streams)?;
        if let Some(input) = &mut relay.input {
            input.standard = Some(Standard::Input);
        }
        for output in &mut relay.outputs {
            output.standard = Some(if output.name == "stdout" {
                Standard::Output
            } else {
                Standard::Error
            });
        }
        Ok(relay)
    }

    /// Between these descriptors and the guest's streams.
    pub fn between(
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        stderr: Option<BorrowedFd<'_>>,
        streams: Streams,
    ) -> io::Result<Self> {
        let mut relay = Self::default();
        if let Some(stream) = streams.stdin {
            let from = Endpoint::of_shared(stdin, Direction::Read)?;
            relay.input = Some(Flow::new("stdin", from, guest_end(stream)?));
        }
        if let Some(stream) = streams.stdout {
            let to = Endpoint::of_shared(stdout, Direction::Write)?;
            relay
                .outputs
                .push(Flow::new("stdout", guest_end(stream)?, to));
        }
        if let (Some(stream), Some(stderr)) = (streams.stderr, stderr) {
            let to = Endpoint::of_shared(stderr, Direction::Write)?;
            relay
                .outputs
                .push(Flow::new("stderr", guest_end(stream)?, to));
        }
        Ok(relay)
    }

    /// Between a terminal, whose two descriptors may be the same, and the guest's one stream.
    pub fn terminal(
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        mut streams: Streams,
    ) -> io::Result<Self> {
        streams.stdout = streams
            .stdin
            .as_ref()
            .map(UnixStream::try_clone)
            .transpose()?;
        let mut relay = Self::between(input, output, None, streams)?;
        if let Some(input) = &mut relay.input {
            input.pass_end = false;
        }
        Ok(relay)
    }

    /// What to wait for. Each flow has two entries, in the order that `advance` expects.
    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.input
            .iter()
            .chain(&self.outputs)
            .flat_map(Flow::poll_fds)
    }

    /// Moves what can be moved, after a poll that gave these events for [`Relay::poll_fds`]. Flows go
    /// nowhere but here, so that each finds its own events.
    pub fn advance(&mut self, events: &[PollFlags]) -> Result<(), RelayError> {
        let mut events = events.chunks(2);
        if let Some(input) = &mut self.input {
            let events = events.next();
            if self.input_unwanted || step(input, events)? {
                self.input = None;
            }
        }
        let mut index = 0;
        while index < self.outputs.len() {
            if step(&mut self.outputs[index], events.next())? {
                self.outputs.remove(index);
            } else {
                index += 1;
            }
        }
        Ok(())
    }

    /// Whether all output has been delivered.
    pub fn outputs_ended(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Whether everything that the guest has sent is delivered.
    pub fn waits_for_guest(&self) -> bool {
        self.outputs.iter().all(|flow| flow.wait == Wait::Input)
    }

    /// The process has ended: nobody reads its input any more. It goes with the next
    /// [`Relay::advance`].
    pub fn end_input(&mut self) {
        self.input_unwanted = true;
    }
}

fn guest_end(stream: UnixStream) -> io::Result<Endpoint> {
    stream.set_nonblocking(true)?;
    Ok(Endpoint::Socket(OwnedFd::from(stream)))
}

fn step(flow: &mut Flow, events: Option<&[PollFlags]>) -> Result<bool, RelayError> {
    let Some([main, output]) = events else {
        return Ok(false);
    };
    let reader_gone = output.intersects(PollFlags::ERR | PollFlags::HUP)
        // What is no pipe, terminal or socket has no reader to lose.
        && !matches!(flow.to, Endpoint::File(_));
    let ended = if reader_gone {
        true
    } else if main.is_empty() {
        false
    } else {
        flow.advance()?
    };
    if ended {
        flow.release();
    }
    Ok(ended)
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
