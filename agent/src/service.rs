//! The ttrpc service: turns requests into calls of the sandbox and their results into responses.

use std::{future::Future, os::fd::OwnedFd, sync::Arc};

use async_trait::async_trait;
use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{
        CloseStdinRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse,
        Empty, ExecProcessRequest, ExecProcessResponse, ListProcessesResponse,
        RemoveContainerRequest, ResizeTerminalRequest, SetClockRequest, SetUpSandboxRequest,
        SetUpSandboxResponse, ShutdownRequest, SignalProcessRequest, StartContainerRequest,
        StatsResponse, UpdateContainerRequest, WaitOutOfMemoryRequest, WaitOutOfMemoryResponse,
        WaitProcessRequest, WaitProcessResponse,
    },
    server::{Agent, create_agent},
};
use rustix::{
    system::{sethostname, uname},
    time::{ClockId, Timespec, clock_settime},
};
use ttrpc::{r#async::TtrpcContext, asynchronous::transport::Listener};

use crate::{
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

/// Runs a step to its end even if the caller's connection breaks, which drops the handler.
async fn to_the_end<T: Send + 'static>(
    step: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(step).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            Err(Error::new(ErrorKind::Internal, format!("the agent failed: {error}")).into())
        }
    }
}

/// Signals are named by number, real-time ones included.
fn signal(number: i32) -> Result<i32> {
    let valid = (1..=64).contains(&number);
    valid
        .then_some(number)
        .ok_or_else(|| Error::invalid("signal", format!("{number} is no signal")))
}

fn set_clock(realtime_ns: i64) -> Result<()> {
    let time = Timespec {
        tv_sec: realtime_ns.div_euclid(1_000_000_000),
        tv_nsec: realtime_ns.rem_euclid(1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time)
        .or_cannot(|| format!("set the clock to {realtime_ns} ns since the epoch"))
}

fn cells(name: &str, value: u32) -> Result<u16> {
    u16::try_from(value).map_err(|_| Error::invalid(name, format!("{value} is above 65535")))
}

type Context = TtrpcContext;

#[async_trait]
impl Agent for Service {
    async fn set_up_sandbox(
        &self,
        _: &Context,
        request: SetUpSandboxRequest,
    ) -> ttrpc::Result<SetUpSandboxResponse> {
        if request.realtime_ns != 0 {
            set_clock(request.realtime_ns)?;
        }
        if !request.hostname.is_empty() {
            sethostname(request.hostname.as_bytes())
                .or_cannot(|| format!("set the guest's host name {:?}", request.hostname))?;
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
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let pid = to_the_end(self.sandbox.clone().create(request)).await?;
        Ok(CreateContainerResponse {
            pid: pid.as_raw_nonzero().get(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &Context,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        to_the_end(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &Context,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let pid = to_the_end(self.sandbox.clone().exec(request)).await?;
        Ok(ExecProcessResponse {
            pid: pid.as_raw_nonzero().get(),
            ..Default::default()
        })
    }

    async fn remove_container(
        &self,
        _: &Context,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(sandbox.remove(request.container_id, request.force)).await?;
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _: &Context,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let signal = signal(request.signal)?;
        if request.all {
            self.sandbox
                .container(&request.container_id)?
                .signal_all(signal)
                .await?;
        } else {
            let process = self
                .sandbox
                .process(&request.container_id, &request.exec_id)?;
            process.signal(signal)?;
        }
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &Context,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let process = self
            .sandbox
            .process(&request.container_id, &request.exec_id)?;
        let ended = process.wait().await;
        Ok(WaitProcessResponse {
            status: ended.status,
            out_of_memory: ended.out_of_memory,
            ..Default::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &Context,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self
            .sandbox
            .process(&request.container_id, &request.exec_id)?;
        process.resize(
            cells("rows", request.rows)?,
            cells("columns", request.columns)?,
        )?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &Context, request: CloseStdinRequest) -> ttrpc::Result<Empty> {
        self.sandbox
            .process(&request.container_id, &request.exec_id)?
            .close_stdin();
        Ok(Empty::new())
    }

    async fn pause_container(
        &self,
        _: &Context,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.sandbox
            .container(&request.container_id)?
            .freeze(true)
            .await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &Context,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.sandbox
            .container(&request.container_id)?
            .freeze(false)
            .await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &Context,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.sandbox
            .container(&request.container_id)?
            .update(&request.resources)?;
        Ok(Empty::new())
    }

    async fn wait_out_of_memory(
        &self,
        _: &Context,
        request: WaitOutOfMemoryRequest,
    ) -> ttrpc::Result<WaitOutOfMemoryResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let (kills, gone) = container.wait_out_of_memory(request.seen).await?;
        Ok(WaitOutOfMemoryResponse {
            kills,
            gone,
            ..Default::default()
        })
    }

    async fn stats(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.sandbox.container(&request.container_id)?.stats()?)
    }

    async fn list_processes(
        &self,
        _: &Context,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let proc = self.sandbox.surroundings().proc.try_clone();
        let proc = proc.or_cannot(|| "reach /proc")?;
        let container = self.sandbox.container(&request.container_id)?;
        Ok(ListProcessesResponse {
            processes: container.processes(std::os::fd::AsFd::as_fd(&proc))?,
            ..Default::default()
        })
    }

    async fn set_clock(&self, _: &Context, request: SetClockRequest) -> ttrpc::Result<Empty> {
        set_clock(request.realtime_ns)?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &Context, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move {
            sandbox.end().await;
            guest::reset()
        })
        .await?;
        Ok(Empty::new())
    }
}
