//! A running program whose three streams the test holds, with a deadline on every wait.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Longest wait for one thing. Generous: an emulated CPU boots a guest in seconds.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// One of the program's output streams.
#[derive(Default)]
struct Stream {
    pipe: Option<std::fs::File>,
    bytes: Vec<u8>,
}

impl Stream {
    fn new(fd: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            pipe: Some(fd.into()),
            bytes: Vec::new(),
        })
    }

    /// Takes what is there; at the end of the stream the pipe is closed.
    fn read(&mut self) -> Result<()> {
        let Some(pipe) = &mut self.pipe else {
            return Ok(());
        };
        let mut buffer = vec![0; 256 << 10];
        match pipe.read(&mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(n) => self.bytes.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("reading the program's output"),
        }
        Ok(())
    }
}

/// What a program did.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    what: String,
}

impl Output {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code as a shell gives it: 128 + n for a signal.
    pub(crate) fn code(&self) -> i32 {
        shell_code(self.status)
    }

    /// Checks the exit code.
    pub(crate) fn expect(self, code: i32) -> Result<Self> {
        ensure!(self.code() == code, "expected exit code {code} of {self}");
        Ok(self)
    }

    /// Checks that it worked.
    pub(crate) fn ok(self) -> Result<Self> {
        self.expect(0)
    }

    /// Checks that it did not work, and gives its standard error.
    pub(crate) fn fails(self) -> Result<String> {
        ensure!(self.code() != 0, "expected a failure of {self}");
        Ok(self.errors())
    }

    /// Checks that standard output holds each of these.
    pub(crate) fn says(self, needles: &[&str]) -> Result<Self> {
        let text = self.text();
        for needle in needles {
            ensure!(
                text.contains(needle),
                "expected {needle:?} on the standard output of {self}"
            );
        }
        Ok(self)
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}`: exit code {}\nstdout: {}\nstderr: {}",
            self.what,
            self.code(),
            excerpt(&self.stdout),
            excerpt(&self.stderr)
        )
    }
}

/// The beginning of some output, for messages.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const LONGEST: usize = 3000;
    let mut text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]).into_owned();
    if bytes.len() > LONGEST {
        let _ = write!(text, " … ({} bytes)", bytes.len());
    }
    text
}

/// The exit code as a shell gives it.
pub(crate) fn shell_code(status: ExitStatus) -> i32 {
    match status.code() {
        Some(code) => code,
        None => 128 + status.signal().unwrap_or(0),
    }
}

/// A program that runs.
pub(crate) struct Process {
    child: Child,
    ended: OwnedFd,
    status: Option<ExitStatus>,
    input: Option<ChildStdin>,
    pending: VecDeque<u8>,
    close_input: bool,
    stdout: Stream,
    stderr: Stream,
    what: String,
}

impl Process {
    /// Starts a program with pipes for its three streams. Streams that the caller has set by
    /// [`Process::spawn_as_is`] are left alone.
    pub(crate) fn spawn(mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self::spawn_as_is(command)
    }

    /// Starts a program with the streams that the command has.
    pub(crate) fn spawn_as_is(mut command: Command) -> Result<Self> {
        let what = describe(&command);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting `{what}`"))?;
        let ended = pidfd_open(pid_of(child.id())?, PidfdFlags::empty())?;
        let input = child.stdin.take();
        if let Some(input) = &input {
            rustix::io::ioctl_fionbio(input, true)?;
        }
        let stdout = child
            .stdout
            .take()
            .map(|pipe| Stream::new(pipe.into()))
            .transpose()?;
        let stderr = child
            .stderr
            .take()
            .map(|pipe| Stream::new(pipe.into()))
            .transpose()?;
        Ok(Self {
            child,
            ended,
            status: None,
            input,
            pending: VecDeque::new(),
            close_input: false,
            stdout: stdout.unwrap_or_default(),
            stderr: stderr.unwrap_or_default(),
            what,
        })
    }

    pub(crate) fn pid(&self) -> Result<Pid> {
        pid_of(self.child.id())
    }

    /// Writes to standard input what it takes now; the rest flows during waits.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.pending.extend(bytes);
        self.write()
    }

    /// Closes standard input once what is queued has been written.
    pub(crate) fn close_stdin(&mut self) {
        self.close_input = true;
        if self.pending.is_empty() {
            self.input = None;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.ended, signal)
            .with_context(|| format!("signalling `{}`", self.what))
    }

    /// Waits until standard output holds this text.
    pub(crate) fn wait_for(&mut self, needle: &str) -> Result<()> {
        self.wait_for_within(needle, DEADLINE)
    }

    /// The same, with another deadline.
    pub(crate) fn wait_for_within(&mut self, needle: &str, time: Duration) -> Result<()> {
        let found = |process: &Self| contains(&process.stdout.bytes, needle.as_bytes());
        let over = |process: &Self| found(process) || process.stdout.pipe.is_none();
        self.pump(&format!("{needle:?} on its standard output"), time, over)?;
        ensure!(
            found(self),
            "standard output ended without {needle:?}: {}",
            self.so_far()
        );
        Ok(())
    }

    /// Waits for some time and tells whether standard output holds this text by then: for things
    /// that must not happen.
    pub(crate) fn says_within(&mut self, needle: &str, time: Duration) -> bool {
        let found = |process: &Self| contains(&process.stdout.bytes, needle.as_bytes());
        self.pump("nothing", time, found).is_ok()
    }

    /// Waits for the program's end; others may still hold its streams.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_within(DEADLINE)
    }

    /// The same, with another deadline.
    pub(crate) fn wait_within(&mut self, time: Duration) -> Result<ExitStatus> {
        self.pump("its end", time, |process| process.status.is_some())?;
        self.status.context("the program has ended")
    }

    /// Waits for the end of its output streams.
    pub(crate) fn drain(&mut self) -> Result<()> {
        self.pump("the end of its output", DEADLINE, |process| {
            process.stdout.pipe.is_none() && process.stderr.pipe.is_none()
        })
    }

    /// The end of the program and of its streams; standard input is closed first.
    pub(crate) fn finish(mut self) -> Result<Output> {
        self.close_stdin();
        self.wait()?;
        self.drain()?;
        self.into_output()
    }

    /// The end of the program, whoever still holds its streams.
    pub(crate) fn output_at_end(mut self) -> Result<Output> {
        self.wait()?;
        self.stdout.read()?;
        self.stderr.read()?;
        self.into_output()
    }

    fn into_output(mut self) -> Result<Output> {
        Ok(Output {
            status: self.status.context("the program has ended")?,
            stdout: std::mem::take(&mut self.stdout.bytes),
            stderr: std::mem::take(&mut self.stderr.bytes),
            what: std::mem::take(&mut self.what),
        })
    }

    /// What came on standard output so far.
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes).into_owned()
    }

    /// What came on standard error so far.
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes).into_owned()
    }

    fn so_far(&self) -> String {
        format!(
            "`{}`\nstdout: {}\nstderr: {}",
            self.what,
            excerpt(&self.stdout.bytes),
            excerpt(&self.stderr.bytes)
        )
    }

    /// Moves bytes until `done`, or fails after `time`.
    fn pump(&mut self, what: &str, time: Duration, done: impl Fn(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + time;
        while !done(self) {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                bail!("waited {} s for {what}: {}", time.as_secs(), self.so_far());
            };
            let ready = self.poll(left)?;
            self.stdout.read()?;
            self.stderr.read()?;
            self.write()?;
            if ready && self.status.is_none() {
                self.status = self.child.try_wait()?;
            }
        }
        Ok(())
    }

    /// Waits until something can be done; tells whether the program has ended.
    fn poll(&self, time: Duration) -> Result<bool> {
        let mut wanted: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        for stream in [&self.stdout, &self.stderr] {
            if let Some(pipe) = &stream.pipe {
                wanted.push((pipe.as_fd(), PollFlags::IN));
            }
        }
        if let (Some(input), false) = (&self.input, self.pending.is_empty()) {
            wanted.push((input.as_fd(), PollFlags::OUT));
        }
        if self.status.is_none() {
            wanted.push((self.ended.as_fd(), PollFlags::IN));
        }
        let mut fds: Vec<PollFd<'_>> = wanted
            .iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        let time = Timespec::try_from(time)?;
        match poll(&mut fds, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        Ok(self.status.is_none() && fds.last().is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn write(&mut self) -> Result<()> {
        let Some(input) = &mut self.input else {
            return Ok(());
        };
        while !self.pending.is_empty() {
            match input.write(self.pending.as_slices().0) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    self.pending.clear();
                    self.close_input = true;
                }
                Err(error) => return Err(error).context("writing the program's input"),
            }
        }
        if self.close_input {
            self.input = None;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A process that the test did not start itself: known by its id.
pub(crate) struct Other(OwnedFd);

impl Other {
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let pid = Pid::from_raw(pid).context("a process id above zero")?;
        let fd = pidfd_open(pid, PidfdFlags::empty())
            .with_context(|| format!("opening process {}", pid.as_raw_nonzero()))?;
        Ok(Self(fd))
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(pidfd_send_signal(&self.0, signal)?)
    }

    /// Waits for its end.
    pub(crate) fn wait(&self) -> Result<()> {
        self.wait_within(DEADLINE)
    }

    pub(crate) fn wait_within(&self, time: Duration) -> Result<()> {
        wait_readable(self.0.as_fd(), time).context("waiting for a process to end")
    }

    /// Waits until it has ended (true) or the descriptor is readable.
    pub(crate) fn either(&self, fd: BorrowedFd<'_>) -> Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        let ready = poll(&mut fds, Some(&Timespec::try_from(DEADLINE)?))?;
        ensure!(ready > 0, "nothing within {} s", DEADLINE.as_secs());
        Ok(fds[1].revents().is_empty())
    }

    /// Waits for the end of a process that has become a child of this one (its parent ended), and
    /// gives its exit code as a shell does.
    pub(crate) fn exit_code(&self) -> Result<i32> {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        self.wait()?;
        let status = waitid(WaitId::PidFd(self.0.as_fd()), WaitIdOptions::EXITED)?
            .context("the process has ended")?;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ok(code),
            (None, Some(signal)) => Ok(128 + signal),
            (None, None) => bail!("the process neither exited nor was killed"),
        }
    }
}

/// Waits until a descriptor is readable.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left)?;
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(0) => bail!("nothing within {} s", time.as_secs()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
}

pub(crate) fn pid_of(pid: u32) -> Result<Pid> {
    Pid::from_raw(i32::try_from(pid)?).context("a process id above zero")
}

fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}
