//! A ttrpc client that never blocks, so that the monitor can wait for the agent's answers in the
//! same poll(2) as for everything else (the library's client keeps two threads a connection and
//! waits without an eye on the VM). Framing is the protocol's: ten bytes of header, length and
//! stream id big-endian, then a protobuf `Request` or `Response`.
//!
//! The peer is the guest: lengths are checked before they are believed, and an answer to a
//! question that was not asked ends the connection.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use bulkhead_agent_protocol::ErrorKind;
use protobuf::Message;
use rustix::event::PollFlags;
use thiserror::Error;
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_RESPONSE, MessageHeader, Request,
    Response,
};

const SERVICE: &str = "bulkhead.agent.v1.Agent";

/// A call failed.
#[derive(Debug, Error)]
pub enum RpcError {
    /// The agent refused, in its own words.
    #[error("{message}")]
    Refused {
        /// What kind of refusal.
        kind: ErrorKind,
        /// For people.
        message: String,
    },
    /// The connection is no more.
    #[error("the connection to the guest's agent was closed")]
    Closed,
    /// The connection failed.
    #[error("the connection to the guest's agent failed")]
    Io(#[source] io::Error),
    /// What came is not an answer.
    #[error("the guest's agent sent a malformed answer: {0}")]
    Malformed(&'static str),
    /// A message cannot be encoded or decoded.
    #[error("cannot encode or decode a message of {0}")]
    Codec(&'static str, #[source] protobuf::Error),
    /// The request is too long for the protocol.
    #[error("the request {method} has {length} bytes, more than {MESSAGE_LENGTH_MAX}")]
    TooLong {
        /// Which request.
        method: &'static str,
        /// Its length.
        length: usize,
    },
    /// No answer in time.
    #[error("the guest's agent did not answer {0} in time")]
    TimedOut(&'static str),
}

/// A question that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(u32);

/// An answer to a question.
pub type Answer = (CallId, Result<Vec<u8>, RpcError>);

/// A connection to the agent's RPC port.
#[derive(Debug)]
pub struct RpcClient {
    socket: UnixStream,
    next_stream: u32,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    asked: HashMap<u32, &'static str>,
    /// Answers that came while another was waited for.
    kept: VecDeque<Answer>,
}

impl RpcClient {
    /// Speaks on a connected socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            next_stream: 1,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            asked: HashMap::new(),
            kept: VecDeque::new(),
        })
    }

    /// What to poll for now.
    pub fn interest(&self) -> PollFlags {
        if self.outgoing.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        }
    }

    /// Sends a request, as far as the socket takes it; [`RpcClient::progress`] sends the rest.
    pub fn send(
        &mut self,
        method: &'static str,
        message: &impl Message,
    ) -> Result<CallId, RpcError> {
        let payload = message
            .write_to_bytes()
            .map_err(|error| RpcError::Codec(method, error))?;
        let request = Request {
            service: SERVICE.to_owned(),
            method: method.to_owned(),
            payload,
            ..Request::default()
        };
        let body = request
            .write_to_bytes()
            .map_err(|error| RpcError::Codec(method, error))?;
        if body.len() > MESSAGE_LENGTH_MAX {
            return Err(RpcError::TooLong {
                method,
                length: body.len(),
            });
        }
        let length = u32::try_from(body.len()).map_err(|_| RpcError::TooLong {
            method,
            length: body.len(),
        })?;
        let stream = self.next_stream;
        // Clients use odd numbers. 2^31 calls on one connection are out of reach.
        self.next_stream = self.next_stream.wrapping_add(2);
        let header: Vec<u8> = MessageHeader::new_request(stream, length).into();
        self.outgoing.extend_from_slice(&header);
        self.outgoing.extend_from_slice(&body);
        self.asked.insert(stream, method);
        self.flush()?;
        Ok(CallId(stream))
    }

    fn flush(&mut self) -> Result<(), RpcError> {
        while !self.outgoing.is_empty() {
            match self.socket.write(&self.outgoing) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(closed(error)),
            }
        }
        Ok(())
    }

    /// Sends what is left and takes in one answer if a whole one is there. Call it until it
    /// returns `None`, then poll.
    pub fn progress(&mut self) -> Result<Option<Answer>, RpcError> {
        self.flush()?;
        if let Some(answer) = self.kept.pop_front() {
            return Ok(Some(answer));
        }
        loop {
            if let Some(answer) = self.next_answer()? {
                return Ok(Some(answer));
            }
            let mut buffer = [0; 16 * 1024];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(RpcError::Closed),
                Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(closed(error)),
            }
        }
    }

    /// Gives answers back, for `progress` to return them once more.
    pub fn keep(&mut self, answers: impl IntoIterator<Item = Answer>) {
        self.kept.extend(answers);
    }

    fn next_answer(&mut self) -> Result<Option<Answer>, RpcError> {
        if self.incoming.len() < MESSAGE_HEADER_LENGTH {
            return Ok(None);
        }
        let header = MessageHeader::from(&self.incoming[..MESSAGE_HEADER_LENGTH]);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > MESSAGE_LENGTH_MAX {
            return Err(RpcError::Malformed("it is too long"));
        }
        let end = MESSAGE_HEADER_LENGTH + length;
        if self.incoming.len() < end {
            return Ok(None);
        }
        if header.type_ != MESSAGE_TYPE_RESPONSE {
            return Err(RpcError::Malformed("it is not a response"));
        }
        let method = self
            .asked
            .remove(&header.stream_id)
            .ok_or(RpcError::Malformed("it answers no request"))?;
        let response = Response::parse_from_bytes(&self.incoming[MESSAGE_HEADER_LENGTH..end])
            .map_err(|error| RpcError::Codec(method, error))?;
        self.incoming.drain(..end);
        Ok(Some((CallId(header.stream_id), judge(response))))
    }
}

impl AsFd for RpcClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn closed(error: io::Error) -> RpcError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => RpcError::Closed,
        _ => RpcError::Io(error),
    }
}

fn judge(response: Response) -> Result<Vec<u8>, RpcError> {
    match response.status.into_option() {
        None => Ok(response.payload),
        Some(status) => match status.code.enum_value_or(Code::UNKNOWN) {
            Code::OK => Ok(response.payload),
            code => Err(RpcError::Refused {
                kind: ErrorKind::of(code),
                message: one_line(&status.message),
            }),
        },
    }
}

/// The guest's words on one line of printable text, not without end.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 4096;
    text.chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_agent_protocol::messages::{Empty, WaitProcessResponse};

    fn answer(peer: &mut UnixStream, stream: u32, response: &Response) {
        let body = response.write_to_bytes().unwrap();
        let header: Vec<u8> =
            MessageHeader::new_response(stream, u32::try_from(body.len()).unwrap()).into();
        peer.write_all(&header).unwrap();
        peer.write_all(&body).unwrap();
    }

    #[test]
    fn answers_come_in_any_order_and_in_pieces() {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let mut client = RpcClient::new(socket).unwrap();
        let first = client.send("Stats", &Empty::new()).unwrap();
        let second = client.send("WaitProcess", &Empty::new()).unwrap();
        let payload = WaitProcessResponse {
            status: 7,
            ..Default::default()
        }
        .write_to_bytes()
        .unwrap();
        answer(
            &mut peer,
            second.0,
            &Response {
                payload: payload.clone(),
                ..Default::default()
            },
        );
        let mut status = ttrpc::proto::Status::new();
        status.code = Code::NOT_FOUND.into();
        status.message = "exec: \"x\":\nnot found".to_owned();
        let refusal = Response {
            status: Some(status).into(),
            ..Default::default()
        };
        answer(&mut peer, first.0, &refusal);
        let (id, result) = client.progress().unwrap().unwrap();
        assert_eq!((id, result.unwrap()), (second, payload));
        let (id, result) = client.progress().unwrap().unwrap();
        assert_eq!(id, first);
        match result {
            Err(RpcError::Refused {
                kind: ErrorKind::ProgramNotFound,
                message,
            }) => {
                assert_eq!(message, "exec: \"x\": not found");
            }
            other => panic!("{other:?}"),
        }
        assert!(client.progress().unwrap().is_none());
        drop(peer);
        assert!(matches!(client.progress(), Err(RpcError::Closed)));
    }

    #[test]
    fn hostile_frames_end_the_connection() {
        let too_long = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0];
        let unasked = [0, 0, 0, 0, 0, 0, 0, 9, 2, 0];
        let not_a_response = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0];
        for frame in [too_long, unasked, not_a_response] {
            let (socket, mut peer) = UnixStream::pair().unwrap();
            let mut client = RpcClient::new(socket).unwrap();
            client.send("Stats", &Empty::new()).unwrap();
            peer.write_all(&frame).unwrap();
            assert!(
                matches!(client.progress(), Err(RpcError::Malformed(_))),
                "{frame:?}"
            );
        }
    }
}
