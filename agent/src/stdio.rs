//! Carries standard streams between processes and the host's connections, one connection per
//! stream (agent.proto, `Stdio`). Data moves by splice(2) where pipes are, without a copy here.

use std::{
    collections::HashMap,
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bulkhead_agent_protocol::{ErrorKind, messages::Stdio};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    net::{Shutdown, SocketFlags, accept_with, shutdown},
    pipe::{PipeFlags, SpliceFlags, pipe_with, splice},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{oneshot, watch},
};

use crate::{
    container::ChildIo,
    error::{Attempt, Error, Result},
    sys,
};

/// How long a stream that a request names may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(10);

/// Most that one step moves.
const CHUNK: usize = 64 << 10;

type Connection = AsyncFd<OwnedFd>;

/// Connections that have said their number, and requests that wait for one.
#[derive(Debug, Default)]
pub struct Streams {
    table: Mutex<HashMap<u64, Entry>>,
}

#[derive(Debug)]
enum Entry {
    Arrived(Connection),
    Awaited(oneshot::Sender<Connection>),
}

impl Streams {
    /// Accepts connections for ever.
    pub async fn accept(self: Arc<Self>, listener: OwnedFd) -> io::Result<()> {
        let listener = sys::watch(listener, Interest::READABLE)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let mut ready = listener.readable().await?;
            match ready.try_io(|listener| Ok(accept_with(listener, flags)?)) {
                Ok(Ok(connection)) => {
                    let streams = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = streams.register(connection).await {
                            tracing::warn!(%error, "a stream ended before it said its number");
                        }
                    });
                }
                Ok(Err(error)) => tracing::warn!(%error, "cannot accept a stream"),
                Err(_would_block) => {}
            }
        }
    }

    async fn register(&self, connection: OwnedFd) -> io::Result<()> {
        let connection = sys::watch(connection, Interest::READABLE | Interest::WRITABLE)?;
        let mut number = [0; 8];
        let mut have = 0;
        while have < number.len() {
            match read(&connection, &mut number[have..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => have += read,
            }
        }
        let number = u64::from_le_bytes(number);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        match table.remove(&number) {
            Some(Entry::Awaited(request)) => {
                // A request that has given up meanwhile wants no stream.
                let _ = request.send(connection);
            }
            Some(Entry::Arrived(_)) | None => {
                table.insert(number, Entry::Arrived(connection));
            }
        }
        Ok(())
    }

    async fn take(&self, number: u64) -> Result<Connection> {
        let awaited = {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Entry::Arrived(connection)) = table.remove(&number) {
                return Ok(connection);
            }
            let (sender, receiver) = oneshot::channel();
            table.insert(number, Entry::Awaited(sender));
            receiver
        };
        match tokio::time::timeout(ARRIVAL, awaited).await {
            Ok(Ok(connection)) => Ok(connection),
            _ => {
                let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
                table.remove(&number);
                let text = format!(
                    "stream {number} did not arrive within {} s: connect it before the request",
                    ARRIVAL.as_secs()
                );
                Err(Error::new(ErrorKind::Internal, text))
            }
        }
    }
}

/// The agent's side of a process's standard streams.
#[derive(Debug)]
pub struct AgentIo {
    stdin: Option<Pair>,
    stdout: Option<Pair>,
    stderr: Option<Pair>,
    terminal: Option<Arc<Connection>>,
}

/// The agent's end of a pipe, and the connection that goes with it.
#[derive(Debug)]
struct Pair {
    pipe: Option<Connection>,
    connection: Connection,
}

/// Pairs the streams that the host has connected with pipes for the process.
pub async fn connect(
    streams: &Streams,
    stdio: &Stdio,
    terminal: bool,
) -> Result<(ChildIo, AgentIo)> {
    let mut connections = Vec::with_capacity(3);
    for number in [stdio.stdin, stdio.stdout, stdio.stderr] {
        connections.push(match number {
            0 => None,
            number => Some(streams.take(number).await?),
        });
    }
    let mut connections = connections.into_iter().map(|connection| {
        connection.map(|connection| Pair {
            pipe: None,
            connection,
        })
    });
    let mut io = AgentIo {
        stdin: connections.next().flatten(),
        stdout: connections.next().flatten(),
        stderr: connections.next().flatten(),
        terminal: None,
    };
    if terminal {
        return Ok((ChildIo::Terminal, io));
    }
    let action = || "make the pipes of a process";
    let children = [
        child_end(io.stdin.as_mut(), true).or_cannot(action)?,
        child_end(io.stdout.as_mut(), false).or_cannot(action)?,
        child_end(io.stderr.as_mut(), false).or_cannot(action)?,
    ];
    Ok((ChildIo::Streams(children), io))
}

/// The process's end of a new pipe; the agent's end, which does not block, goes into the pair.
fn child_end(pair: Option<&mut Pair>, input: bool) -> io::Result<OwnedFd> {
    let Some(pair) = pair else {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        return Ok(rustix::fs::open("/dev/null", flags, Mode::empty())?);
    };
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (own, child) = if input {
        (writer, reader)
    } else {
        (reader, writer)
    };
    rustix::io::ioctl_fionbio(&own, true)?;
    let interest = if input {
        Interest::WRITABLE
    } else {
        Interest::READABLE
    };
    pair.pipe = Some(sys::watch(own, interest)?);
    Ok(child)
}

impl AgentIo {
    /// Adds the master of the process's terminal.
    pub fn with_terminal(mut self, master: Option<OwnedFd>) -> Result<Self> {
        let action = || "take over the terminal";
        if let Some(master) = master {
            rustix::io::ioctl_fionbio(&master, true).or_cannot(action)?;
            self.terminal = Some(Arc::new(
                sys::watch(master, Interest::READABLE | Interest::WRITABLE).or_cannot(action)?,
            ));
        }
        Ok(self)
    }

    /// The terminal's master, which stays open as long as it is carried.
    pub fn terminal(&self) -> Weak<Connection> {
        self.terminal
            .as_ref()
            .map(Arc::downgrade)
            .unwrap_or_default()
    }

    /// Carries the streams. The future ends when all output of the ended process is written out.
    pub fn carry(
        self,
        stdin_closed: watch::Receiver<bool>,
        ended: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> {
        let (stdin, terminal) = (self.stdin, self.terminal);
        let mut tasks = Vec::new();
        if let Some(master) = terminal {
            let connection = stdin.map(|pair| pair.connection);
            tasks.push(tokio::spawn(carry_terminal(
                master,
                connection,
                ended.clone(),
            )));
        } else if let Some(pair) = stdin {
            // Not awaited: what the process did not read is nobody's any more.
            tokio::spawn(carry_input(pair, stdin_closed, ended.clone()));
        }
        for pair in [self.stdout, self.stderr].into_iter().flatten() {
            tasks.push(tokio::spawn(carry_output(pair, ended.clone())));
        }
        async move {
            for task in tasks {
                // A task cannot fail: it holds no code that panics, and nobody aborts it.
                let _ = task.await;
            }
        }
    }
}

async fn carry_input(
    pair: Pair,
    mut closed: watch::Receiver<bool>,
    mut ended: watch::Receiver<bool>,
) {
    let Pair {
        pipe: Some(pipe),
        connection,
    } = pair
    else {
        return;
    };
    tokio::select! {
        moved = move_all(&connection, &pipe) => report("standard input", &moved),
        () = until(&mut ended) => {}
        () = until(&mut closed) => {
            report("standard input", &move_available(&connection, &pipe, usize::MAX).await);
        }
    }
    // Dropping the pipe is the end of file for the process.
}

async fn carry_output(pair: Pair, mut ended: watch::Receiver<bool>) {
    let Pair {
        pipe: Some(pipe),
        connection,
    } = pair
    else {
        return;
    };
    tokio::select! {
        moved = move_all(&pipe, &connection) => report("output", &moved),
        () = until(&mut ended) => {
            // A descendant that outlives the process may hold the pipe open, and even fill it:
            // what is there now is what the process has written.
            let left = rustix::io::ioctl_fionread(&pipe).unwrap_or(0);
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            report("output", &move_available(&pipe, &connection, left).await);
        }
    }
    let _ = shutdown(&connection, Shutdown::Both);
}

/// Both directions of a terminal over one connection.
async fn carry_terminal(
    master: Arc<Connection>,
    connection: Option<Connection>,
    mut ended: watch::Receiver<bool>,
) {
    let Some(connection) = connection else {
        // Nobody watches, but the terminal is there as long as the process.
        until(&mut ended).await;
        return;
    };
    let mut buffer = vec![0; CHUNK];
    let input = async {
        // The host's end of file does not hang the terminal up: the process may go on printing.
        report("terminal input", &copy(&connection, &master).await);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        moved = copy(&master, &connection) => report("terminal output", &moved),
        () = input => {}
        () = until(&mut ended) => {
            // Reading flushes what the process has printed into the master's buffer before it
            // says that there is no more (n_tty); its size bounds what descendants can add.
            for _ in 0..4 {
                match rustix::io::read(&*master, &mut buffer) {
                    Ok(read) if read > 0 => {
                        if write_all(&connection, &buffer[..read]).await.is_err() {
                            break;
                        }
                    }
                    _ => break,
                }
            }
        }
    }
    let _ = shutdown(&connection, Shutdown::Both);
}

/// Waits until the flag is set, or nobody can set it any more.
async fn until(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

/// Notes why a stream broke; its end by either side is no error.
fn report(what: &str, moved: &io::Result<()>) {
    if let Err(error) = moved {
        tracing::debug!(%error, "{what} ended early");
    }
}

/// Moves data until the source ends. One of the two is a pipe.
async fn move_all(source: &Connection, target: &Connection) -> io::Result<()> {
    while move_some(source, target, CHUNK, true).await? > 0 {}
    Ok(())
}

/// Moves what is there now, at most `limit` bytes.
async fn move_available(source: &Connection, target: &Connection, limit: usize) -> io::Result<()> {
    let mut left = limit;
    while left > 0 {
        match move_some(source, target, left.min(CHUNK), false).await? {
            0 => break,
            moved => left -= moved,
        }
    }
    Ok(())
}

/// Moves some data; 0 at the end, or, unless told to wait, when there is nothing to move.
async fn move_some(
    source: &Connection,
    target: &Connection,
    most: usize,
    wait: bool,
) -> io::Result<usize> {
    loop {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(source, None, target, None, most, flags) {
            Ok(moved) => return Ok(moved),
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // Either side may be the reason. The guard is taken before the look, so that readiness
        // that comes in between is not cleared.
        if !is_ready(source.as_fd(), PollFlags::IN)? {
            if !wait {
                return Ok(0);
            }
            await_ready(source, Interest::READABLE, PollFlags::IN).await?;
        }
        if !is_ready(target.as_fd(), PollFlags::OUT)? {
            await_ready(target, Interest::WRITABLE, PollFlags::OUT).await?;
        }
    }
}

/// Waits until the descriptor is ready by the kernel's word: events here are edges, and one that
/// was seen before may be out of date.
async fn await_ready(
    descriptor: &Connection,
    interest: Interest,
    flags: PollFlags,
) -> io::Result<()> {
    loop {
        let mut guard = descriptor.ready(interest).await?;
        if is_ready(descriptor.as_fd(), flags)? {
            return Ok(());
        }
        guard.clear_ready();
    }
}

fn is_ready(descriptor: BorrowedFd<'_>, flags: PollFlags) -> io::Result<bool> {
    let mut descriptors = [PollFd::new(&descriptor, flags)];
    poll(&mut descriptors, Some(&Timespec::default()))?;
    // Errors and hang-ups count: the next attempt reports them.
    Ok(!descriptors[0].revents().is_empty())
}

async fn read(from: &Connection, buffer: &mut [u8]) -> io::Result<usize> {
    let read = from.async_io(Interest::READABLE, |from| {
        Ok(rustix::io::read(from, &mut *buffer)?)
    });
    read.await
}

async fn write_all(to: &Connection, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let written = to.async_io(Interest::WRITABLE, |to| Ok(rustix::io::write(to, data)?));
        data = &data[written.await?..];
    }
    Ok(())
}

/// Copies until the source ends: terminals are no pipes.
async fn copy(from: &Connection, to: &Connection) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read(from, &mut buffer).await {
            Ok(0) => return Ok(()),
            Ok(read) => write_all(to, &buffer[..read]).await?,
            // The last slave of a terminal has closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
