//! A virtual machine without a machine: its sockets are real, its guest is a few threads of the
//! test that speak the agent's protocol. What the guest does is set by [`Behaviour`].

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use bulkhead_agent_protocol::{
    Greeting, RPC_PORT,
    messages::{
        CreateContainerRequest, ExecProcessRequest, SignalProcessRequest, WaitProcessResponse,
    },
};
use bulkhead_vmm::config::{self, VmCommand, VmConfig, VmEvent};
use protobuf::Message;
use ttrpc::proto::{Code, MESSAGE_HEADER_LENGTH, MessageHeader, Request, Response, Status};

use super::{Stop, Vm, VmError};

/// What the fake's guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Its processes copy their input to their output, then end with this status.
    Copies(i32),
    /// Its processes end when they get a signal, with 128 + the signal.
    WaitsForSignal,
    /// It says that the program was not found.
    ProgramNotFound,
    /// It never says that it is ready; the VM reports a failure.
    FailsToBoot,
    /// The VM dies as soon as the process runs.
    DiesAtStart,
}

#[derive(Default)]
struct Guest {
    streams: HashMap<u64, UnixStream>,
    status: Option<i32>,
    started: bool,
    stdio: (u64, u64, u64),
    config: Option<Vec<u8>>,
}

type Shared = Arc<(Mutex<Guest>, Condvar)>;

/// The fake.
pub struct FakeVm {
    behaviour: Behaviour,
    ours: UnixStream,
    theirs: Option<UnixStream>,
    directory: Option<PathBuf>,
}

impl FakeVm {
    /// A VM that waits for its configuration.
    pub fn start(behaviour: Behaviour) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        Self {
            behaviour,
            ours,
            theirs: Some(theirs),
            directory: None,
        }
    }

    fn say(&self, event: &VmEvent) {
        let mut line = serde_json::to_vec(event).unwrap();
        line.push(b'\n');
        self.theirs.as_ref().unwrap().write_all(&line).unwrap();
    }
}

impl Vm for FakeVm {
    fn control(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    fn configure(&mut self, config: &VmConfig) -> Result<(), VmError> {
        let directory = config.vsock.as_ref().unwrap().directory.clone();
        if self.behaviour == Behaviour::FailsToBoot {
            self.say(&VmEvent::Failed {
                message: "no machine today".to_owned(),
            });
            return Ok(());
        }
        let listener = UnixListener::bind(directory.join("vsock.sock")).unwrap();
        self.say(&VmEvent::Running {
            timeline: config::Timeline::default(),
        });
        let (behaviour, control) = (self.behaviour, self.theirs.as_ref().unwrap().try_clone());
        let control = control.unwrap();
        greet(&directory);
        self.directory = Some(directory);
        thread::spawn(move || {
            let guest = Shared::default();
            while let Ok((socket, _)) = listener.accept() {
                let (guest, control) = (Arc::clone(&guest), control.try_clone().unwrap());
                thread::spawn(move || serve(socket, behaviour, &guest, &control));
            }
        });
        Ok(())
    }

    fn next_event(&mut self) -> Result<Option<VmEvent>, VmError> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match self.ours.read(&mut byte) {
                Ok(0) => return Err(VmError::Gone(String::new())),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => panic!("{error}"),
            }
        }
        match serde_json::from_slice(&line).unwrap() {
            VmEvent::Failed { message } => Err(VmError::Failed(message)),
            event => Ok(Some(event)),
        }
    }

    fn command_with(&mut self, _: VmCommand, _: &[BorrowedFd<'_>]) -> Result<(), VmError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<Stop, VmError> {
        self.theirs = None;
        Ok(Stop::Ended)
    }
}

fn greet(directory: &Path) {
    let mut socket = UnixStream::connect(directory.join("vsock.sock_1024")).unwrap();
    let greeting = Greeting {
        version: "fake".to_owned(),
        started_us: 5,
        ready_us: 9,
    };
    writeln!(socket, "{}", serde_json::to_string(&greeting).unwrap()).unwrap();
}

fn serve(socket: UnixStream, behaviour: Behaviour, guest: &Shared, control: &UnixStream) {
    // No byte more: what follows may be the stream's own.
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        (&socket).read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    let port: u32 = std::str::from_utf8(&line)
        .unwrap()
        .trim()
        .strip_prefix("CONNECT ")
        .unwrap()
        .parse()
        .unwrap();
    (&socket).write_all(b"OK 1\n").unwrap();
    if port == RPC_PORT {
        while answer_one(&socket, behaviour, guest, control).is_ok() {}
    } else {
        let mut number = [0; 8];
        (&socket).read_exact(&mut number).unwrap();
        let (state, changed) = &**guest;
        state
            .lock()
            .unwrap()
            .streams
            .insert(u64::from_le_bytes(number), socket);
        changed.notify_all();
    }
}

fn answer_one(
    mut socket: &UnixStream,
    behaviour: Behaviour,
    guest: &Shared,
    control: &UnixStream,
) -> io::Result<()> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    socket.read_exact(&mut header)?;
    let header = MessageHeader::from(header);
    let mut body = vec![0; usize::try_from(header.length).unwrap()];
    socket.read_exact(&mut body)?;
    let request = Request::parse_from_bytes(&body).unwrap();
    assert_eq!(request.service, "bulkhead.agent.v1.Agent");
    let socket = socket.try_clone()?;
    let answer = move |result: Result<Vec<u8>, Code>| {
        let mut response = Response::new();
        match result {
            Ok(payload) => response.payload = payload,
            Err(code) => {
                let mut status = Status::new();
                status.code = code.into();
                status.message = "exec: \"x\": executable file not found in $PATH".to_owned();
                response.status = Some(status).into();
            }
        }
        let body = response.write_to_bytes().unwrap();
        let length = u32::try_from(body.len()).unwrap();
        let frame: Vec<u8> = MessageHeader::new_response(header.stream_id, length).into();
        // Whoever asked may have gone.
        let _ = (&socket).write_all(&[frame, body].concat());
    };
    let (state, changed) = &**guest;
    match request.method.as_str() {
        "CreateContainer" if behaviour == Behaviour::ProgramNotFound => {
            answer(Err(Code::NOT_FOUND));
        }
        "CreateContainer" => {
            let create = CreateContainerRequest::parse_from_bytes(&request.payload).unwrap();
            let mut guest = state.lock().unwrap();
            guest.stdio = (create.stdio.stdin, create.stdio.stdout, create.stdio.stderr);
            guest.config = Some(create.spec);
            answer(Ok(Vec::new()));
        }
        "StartContainer" => {
            state.lock().unwrap().started = true;
            answer(Ok(Vec::new()));
            if behaviour == Behaviour::DiesAtStart {
                control.shutdown(std::net::Shutdown::Both).unwrap();
            } else {
                let guest = Arc::clone(guest);
                thread::spawn(move || run(behaviour, &guest));
            }
        }
        "ExecProcess" => {
            let exec = ExecProcessRequest::parse_from_bytes(&request.payload).unwrap();
            let mut inner = state.lock().unwrap();
            inner.status = None;
            inner.stdio = (exec.stdio.stdin, exec.stdio.stdout, exec.stdio.stderr);
            answer(Ok(Vec::new()));
            let guest = Arc::clone(guest);
            thread::spawn(move || run(behaviour, &guest));
        }
        "SignalProcess" => {
            let signal = SignalProcessRequest::parse_from_bytes(&request.payload)
                .unwrap()
                .signal;
            answer(Ok(Vec::new()));
            if behaviour == Behaviour::WaitsForSignal {
                let mut guest = state.lock().unwrap();
                guest.status = Some(128 + signal);
                guest.streams.clear();
                changed.notify_all();
            }
        }
        "WaitProcess" => {
            let guest = Arc::clone(guest);
            thread::spawn(move || {
                let (state, changed) = &*guest;
                let state =
                    changed.wait_while(state.lock().unwrap(), |guest| guest.status.is_none());
                let status = state.unwrap().status.unwrap();
                let response = WaitProcessResponse {
                    status,
                    ..Default::default()
                };
                answer(Ok(response.write_to_bytes().unwrap()));
            });
        }
        _ => answer(Ok(Vec::new())),
    }
    Ok(())
}

/// The process.
fn run(behaviour: Behaviour, guest: &Shared) {
    let Behaviour::Copies(status) = behaviour else {
        return;
    };
    let (state, changed) = &**guest;
    let (mut input, mut output) = {
        let guest = state.lock().unwrap();
        let (stdin, stdout, stderr) = guest.stdio;
        // Their threads take them in any order.
        let mut guest = changed
            .wait_while(guest, |guest| {
                [stdin, stdout, stderr]
                    .iter()
                    .any(|stream| !guest.streams.contains_key(stream))
            })
            .unwrap();
        (
            guest.streams.remove(&stdin).unwrap(),
            guest.streams.remove(&stdout).unwrap(),
        )
    };
    io::copy(&mut input, &mut output).unwrap();
    drop((input, output));
    let mut guest = state.lock().unwrap();
    guest.streams.clear();
    guest.status = Some(status);
    changed.notify_all();
}
