//! `kill`: sends a signal to the container's process, or to all.

use bulkhead_agent_protocol::messages::{Empty, SignalProcessRequest};

use super::{CALL_LIMIT, Context, Error, ask, living};
use crate::{
    agent::{AgentError, connect::ConnectError, rpc::RpcError},
    cli::Kill,
    signal,
    state::{ContainerStatus, Record},
};

pub(super) fn kill(context: &Context, options: &Kill) -> Result<u8, Error> {
    let signal = signal::parse(&options.signal)?;
    // runc: all processes of a container that has stopped are none, and that is no error.
    if options.all {
        let record = context.root.open(&options.id)?.record()?;
        if record.current_status() == ContainerStatus::Stopped {
            return Ok(0);
        }
    }
    let (container, record) = living(context, &options.id)?;
    let request = SignalProcessRequest {
        container_id: options.id.clone(),
        signal,
        all: options.all,
        ..Default::default()
    };
    let asked = ask(&container, "SignalProcess", &request);
    if is_out_of_reach(&asked) && ends(&record) {
        // It ended by itself a moment ago: as if it had been seen before.
        if options.all {
            return Ok(0);
        }
        living(context, &options.id)?;
    }
    sent(asked, &record)
}

/// Whether nobody was there to take the signal, as while the virtual machine is taken down.
fn is_out_of_reach(asked: &Result<Empty, Error>) -> bool {
    use ConnectError::{Handshake, Socket};
    matches!(
        asked,
        Err(Error::Agent(AgentError::Connect(
            Socket(_) | Handshake { .. }
        )))
    )
}

/// What became of the signal.
fn sent(asked: Result<Empty, Error>, record: &Record) -> Result<u8, Error> {
    match asked {
        Ok(_) => Ok(0),
        // One that ends the container may end the guest before the agent's answer has left it.
        Err(Error::Agent(AgentError::Rpc(RpcError::Closed | RpcError::Io(_)))) if ends(record) => {
            Ok(0)
        }
        Err(error) => Err(error),
    }
}

/// Whether the container comes to its end now.
fn ends(record: &Record) -> bool {
    record
        .monitor
        .is_none_or(|monitor| monitor.ends_within(CALL_LIMIT))
}

#[cfg(test)]
mod tests {
    use std::{path::Path, process::Command};

    use super::*;
    use crate::state::ProcessIdentity;

    fn lost() -> Result<Empty, Error> {
        Err(Error::Agent(RpcError::Closed.into()))
    }

    #[test]
    fn an_answer_that_the_guests_end_has_swallowed_is_not_missed() {
        let mut monitor = Command::new("sleep").arg("1000").spawn().expect("spawn");
        let own = ProcessIdentity::own().expect("own");
        let mut record = Record::new("c", Path::new("/b"), "1.2.0", own);
        record.monitor = Some(ProcessIdentity::of(monitor.id()).expect("identity"));
        monitor.kill().expect("kill");
        assert!(matches!(sent(lost(), &record), Ok(0)));
        monitor.wait().expect("wait");
        assert!(matches!(sent(lost(), &record), Ok(0)));
    }

    #[test]
    fn a_machine_that_is_taken_down_is_out_of_reach() {
        let refused = || std::io::ErrorKind::ConnectionRefused.into();
        let unreachable = ConnectError::Socket(refused());
        assert!(is_out_of_reach(&Err(Error::Agent(unreachable.into()))));
        let source = refused();
        let unreachable = ConnectError::Handshake { port: 1, source };
        assert!(is_out_of_reach(&Err(Error::Agent(unreachable.into()))));
        assert!(!is_out_of_reach(&lost()));
        assert!(!is_out_of_reach(&Ok(Empty::default())));
    }

    #[test]
    fn a_refusal_stays_one() {
        let own = ProcessIdentity::own().expect("own");
        let record = Record::new("c", Path::new("/b"), "1.2.0", own);
        let refused = Err(Error::Agent(RpcError::TimedOut("SignalProcess").into()));
        assert!(sent(refused, &record).is_err());
    }
}
