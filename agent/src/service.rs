//! The ttrpc service: turns requests into calls of the sandbox and their results into responses.

use std::{
    future::Future,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use async_trait::async_trait;
use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{
        CloseStdinRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse,
        Empty, ExecProcessRequest, ExecProcessResponse, ListProcessesResponse,
        RemoveContainerRequest, ResizeTerminalRequest, SetClockRequest, SetNetworkRequest,
        SetUpSandboxRequest, SetUpSandboxResponse, ShutdownRequest, SignalProcessRequest,
        StartContainerRequest, StatsResponse, UpdateContainerRequest, WaitOutOfMemoryRequest,
        WaitOutOfMemoryResponse, WaitProcessRequest, WaitProcessResponse,
    },
    server::{Agent, create_agent},
};
use rustix::{
    system::{sethostname, uname},
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};
use ttrpc::{r#async::TtrpcContext, asynchronous::transport::Listener};

use crate::{
    container::Container,
    error::{Attempt, Error, Result},
    guest,
    reaper::Reaper,
    sandbox::Sandbox,
};

/// Serves requests and streams, for ever.
pub async fn serve(sandbox: Arc<Sandbox>, rpc: RpcListener, stdio: OwnedFd) -> Result<()> {
    let signals = Reaper::signals()?;
    let surroundings = sandbox.surroundings().clone();
    let streams = tokio::spawn(surroundings.streams.clone().accept(stdio));
    let listener = rpc.listener()?;
    let service = Arc::new(Service { sandbox });
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(listener)
        .register_service(create_agent(service));
    server.start().await.map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            format!("cannot serve requests: {error}"),
        )
    })?;
    tokio::select! {
        () = surroundings.reaper.run(signals) => Ok(()),
        ended = streams => match ended {
            Ok(ended) => ended.or_cannot(|| "accept streams"),
            Err(error) => Err(Error::new(ErrorKind::Internal, format!("streams: {error}"))),
        },
    }
}

/// A listening socket that does not block.
pub enum RpcListener {
    /// In a guest.
    Vsock(OwnedFd),
    /// In tests.
    Unix(OwnedFd),
}

impl From<OwnedFd> for RpcListener {
    fn from(vsock: OwnedFd) -> Self {
        Self::Vsock(vsock)
    }
}

impl RpcListener {
    fn listener(self) -> Result<Listener> {
        Ok(match self {
            Self::Vsock(socket) => tokio_vsock::VsockListener::from(socket).into(),
            Self::Unix(socket) => {
                tokio::net::UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))
                    .or_cannot(|| "listen for requests")?
                    .into()
            }
        })
    }
}

struct Service {
    sandbox: Arc<Sandbox>,
}

impl Service {
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.sandbox.container(id)
    }
}

/// Runs a step to its end even if the caller's connection breaks, which drops the handler.
async fn to_the_end<T: Send + 'static>(
    step: impl Future<Output = Result<T>> + Send + 'static,
) -> Reply<T> {
    match tokio::spawn(step).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            Err(Error::new(ErrorKind::Internal, format!("the agent failed: {error}")).into())
        }
    }
}

/// A caller that waits for a container's end and stands for it. Dropped before that, as when the
/// caller's connection breaks, it removes the container: nobody would.
struct StandsFor {
    sandbox: Arc<Sandbox>,
    container: Option<String>,
}

impl Drop for StandsFor {
    fn drop(&mut self) {
        let Some(id) = self.container.take() else {
            return;
        };
        let sandbox = self.sandbox.clone();
        tokio::spawn(async move {
            if let Err(error) = sandbox.remove(id, true).await {
                tracing::warn!(error = %error.chain(), "a container without its monitor stays");
            }
        });
    }
}

/// The answer of requests that only succeed or fail.
fn done((): ()) -> Empty {
    Empty::new()
}

/// Signals are named by number, real-time ones included.
fn signal(number: i32) -> Result<i32> {
    let valid = (1..=64).contains(&number);
    valid
        .then_some(number)
        .ok_or_else(|| Error::invalid("signal", format!("{number} is no signal")))
}

/// Sets the clock, unless it is right: at boot the kernel takes the host's exact time from kvm-clock,
/// while the host's word is as old as its way here was long. Set to that, the guest would lag behind the
/// times that the host gives to files.
fn set_clock(realtime_ns: i64) -> Result<()> {
    if is_right(clock_gettime(ClockId::Realtime), realtime_ns) {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: realtime_ns.div_euclid(1_000_000_000),
        tv_nsec: realtime_ns.rem_euclid(1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time)
        .or_cannot(|| format!("set the clock to {realtime_ns} ns since the epoch"))
}

/// Whether the clock was read at most a second after the host sent its own time.
fn is_right(now: Timespec, sent_ns: i64) -> bool {
    let now_ns = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    (0..1_000_000_000).contains(&(now_ns - i128::from(sent_ns)))
}

fn cells(name: &str, value: u32) -> Result<u16> {
    u16::try_from(value).map_err(|_| Error::invalid(name, format!("{value} is above 65535")))
}

type Context = TtrpcContext;
type Reply<T> = ttrpc::Result<T>;

#[async_trait]
impl Agent for Service {
    async fn set_up_sandbox(
        &self,
        _: &Context,
        asked: SetUpSandboxRequest,
    ) -> Reply<SetUpSandboxResponse> {
        if asked.realtime_ns != 0 {
            set_clock(asked.realtime_ns)?;
        }
        if !asked.hostname.is_empty() {
            sethostname(asked.hostname.as_bytes())
                .or_cannot(|| format!("set the guest's host name {:?}", asked.hostname))?;
        }
        Ok(SetUpSandboxResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: uname().release().to_string_lossy().into_owned(),
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &Context,
        asked: CreateContainerRequest,
    ) -> Reply<CreateContainerResponse> {
        let pid = to_the_end(self.sandbox.clone().create(asked)).await?;
        Ok(CreateContainerResponse {
            pid: pid.as_raw_nonzero().get(),
            ..Default::default()
        })
    }

    async fn start_container(&self, _: &Context, asked: StartContainerRequest) -> Reply<Empty> {
        let container = self.container(&asked.container_id)?;
        let sandbox = self.sandbox.clone();
        to_the_end(async move { container.start(sandbox.surroundings()).await })
            .await
            .map(done)
    }

    async fn exec_process(
        &self,
        _: &Context,
        asked: ExecProcessRequest,
    ) -> Reply<ExecProcessResponse> {
        let pid = to_the_end(self.sandbox.clone().exec(asked)).await?;
        Ok(ExecProcessResponse {
            pid: pid.as_raw_nonzero().get(),
            ..Default::default()
        })
    }

    async fn remove_container(&self, _: &Context, asked: RemoveContainerRequest) -> Reply<Empty> {
        let removal = self.sandbox.clone().remove(asked.container_id, asked.force);
        to_the_end(removal).await.map(done)
    }

    async fn signal_process(&self, _: &Context, asked: SignalProcessRequest) -> Reply<Empty> {
        let signal = signal(asked.signal)?;
        let (container, process) = (&asked.container_id, &asked.exec_id);
        if asked.all {
            self.container(container)?.signal_all(signal).await?;
        } else {
            self.sandbox.process(container, process)?.signal(signal)?;
        }
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &Context,
        asked: WaitProcessRequest,
    ) -> Reply<WaitProcessResponse> {
        let process = self.sandbox.process(&asked.container_id, &asked.exec_id)?;
        let stands = asked.stands_for_container && asked.exec_id.is_empty();
        let guard = stands.then(|| StandsFor {
            sandbox: self.sandbox.clone(),
            container: Some(asked.container_id.clone()),
        });
        let ended = process.wait().await;
        if let Some(mut guard) = guard {
            guard.container = None;
        }
        Ok(WaitProcessResponse {
            status: ended.status,
            out_of_memory: ended.out_of_memory,
            ..Default::default()
        })
    }

    async fn resize_terminal(&self, _: &Context, asked: ResizeTerminalRequest) -> Reply<Empty> {
        let (rows, columns) = (cells("rows", asked.rows)?, cells("columns", asked.columns)?);
        let process = self.sandbox.process(&asked.container_id, &asked.exec_id)?;
        Ok(process.resize(rows, columns).map(done)?)
    }

    async fn close_stdin(&self, _: &Context, asked: CloseStdinRequest) -> Reply<Empty> {
        let process = self.sandbox.process(&asked.container_id, &asked.exec_id)?;
        process.close_stdin();
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &Context, asked: ContainerRequest) -> Reply<Empty> {
        let container = self.container(&asked.container_id)?;
        Ok(container.freeze(true).await.map(done)?)
    }

    async fn resume_container(&self, _: &Context, asked: ContainerRequest) -> Reply<Empty> {
        let container = self.container(&asked.container_id)?;
        Ok(container.freeze(false).await.map(done)?)
    }

    async fn update_container(&self, _: &Context, asked: UpdateContainerRequest) -> Reply<Empty> {
        let container = self.container(&asked.container_id)?;
        Ok(container.update(&asked.resources).map(done)?)
    }

    async fn wait_out_of_memory(
        &self,
        _: &Context,
        asked: WaitOutOfMemoryRequest,
    ) -> Reply<WaitOutOfMemoryResponse> {
        let container = self.container(&asked.container_id)?;
        let (kills, gone) = container.wait_out_of_memory(asked.seen).await?;
        Ok(WaitOutOfMemoryResponse {
            kills,
            gone,
            ..Default::default()
        })
    }

    async fn stats(&self, _: &Context, asked: ContainerRequest) -> Reply<StatsResponse> {
        Ok(self.container(&asked.container_id)?.stats()?)
    }

    async fn list_processes(
        &self,
        _: &Context,
        asked: ContainerRequest,
    ) -> Reply<ListProcessesResponse> {
        let container = self.container(&asked.container_id)?;
        Ok(ListProcessesResponse {
            processes: container.processes(self.sandbox.surroundings().proc.as_fd())?,
            ..Default::default()
        })
    }

    async fn set_network(&self, _: &Context, asked: SetNetworkRequest) -> Reply<Empty> {
        let container = self.container(&asked.container_id)?;
        let surroundings = self.sandbox.surroundings();
        Ok(container.set_network(surroundings, &asked).map(done)?)
    }

    async fn set_clock(&self, _: &Context, asked: SetClockRequest) -> Reply<Empty> {
        Ok(set_clock(asked.realtime_ns).map(done)?)
    }

    async fn shutdown(&self, _: &Context, _: ShutdownRequest) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        let end = async move {
            sandbox.end().await;
            guest::reset()
        };
        to_the_end(end).await.map(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        let now = Timespec {
            tv_sec: 1_000,
            tv_nsec: 500_000_000,
        };
        let at = |ms: i64| ms * 1_000_000;
        for (sent, right) in [
            (at(1_000_500), true),
            (at(1_000_400), true),
            (at(999_501), true),
            (at(999_500), false),
            (at(1_000_501), false),
            (0, false),
            (i64::MIN, false),
        ] {
            assert_eq!(is_right(now, sent), right, "{sent}");
        }
    }
}
