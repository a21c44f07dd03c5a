//! The name server that the host's network namespace has at 127.0.0.11 (Docker's), as processes of the
//! container reach it: queries are carried to the host, one vsock stream each (agent.proto,
//! `SetNetworkRequest.resolver`). What is asked and answered is the host's affair.

mod port;

use std::{
    io,
    net::{TcpListener, UdpSocket},
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_protocol::{RESOLVE_DATAGRAM, RESOLVE_STREAM, RESOLVER_ADDRESS, RESOLVER_PORT};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    sync::Semaphore,
    task::JoinHandle,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use self::port::PORT;
use super::{Host, within};
use crate::{
    container::CGROUP_MOUNT_POINT,
    error::{Attempt, Result},
};

/// Queries and connections at a time; more wait.
const MOST: usize = 32;
/// How long the host may take to answer: Docker asks three servers, four seconds each.
const PATIENCE: Duration = Duration::from_secs(15);

/// Takes queries until it is dropped.
#[derive(Debug)]
pub(super) struct Resolver {
    tasks: [JoinHandle<()>; 2],
}

impl Resolver {
    /// Begins to take queries in a network namespace.
    pub(super) fn start(namespace: BorrowedFd<'_>, host: &Host) -> Result<Self> {
        let action = || format!("take queries to the name server at {RESOLVER_ADDRESS}");
        let (datagrams, connections) = within(namespace, host, || listen().or_cannot(action))?;
        port::redirect(Path::new(CGROUP_MOUNT_POINT)).or_cannot(action)?;
        let places = Arc::new(Semaphore::new(MOST));
        let datagrams = tokio::net::UdpSocket::from_std(datagrams).or_cannot(action)?;
        let connections = tokio::net::TcpListener::from_std(connections).or_cannot(action)?;
        Ok(Self {
            tasks: [
                tokio::spawn(take_datagrams(Arc::new(datagrams), places.clone())),
                tokio::spawn(take_connections(connections, places)),
            ],
        })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn listen() -> io::Result<(UdpSocket, TcpListener)> {
    let datagrams = UdpSocket::bind((RESOLVER_ADDRESS, PORT))?;
    let connections = TcpListener::bind((RESOLVER_ADDRESS, PORT))?;
    datagrams.set_nonblocking(true)?;
    connections.set_nonblocking(true)?;
    Ok((datagrams, connections))
}

async fn take_datagrams(socket: Arc<tokio::net::UdpSocket>, places: Arc<Semaphore>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // Nobody closes the semaphore.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => {
                let (query, socket) = (buffer[..length].to_vec(), socket.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(PATIENCE, ask(&query)).await {
                        // Who has asked may be gone.
                        Ok(Ok(answer)) => drop(socket.send_to(&answer, from).await),
                        Ok(Err(error)) => {
                            tracing::debug!(%error, "a query to the host's name server failed");
                        }
                        Err(_) => {}
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take a query to the host's name server");
                // For want of memory, which others must give back first.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What the host answers.
async fn ask(query: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut message = vec![RESOLVE_DATAGRAM];
    message.extend(length.to_be_bytes());
    message.extend(query);
    let mut host = connect().await?;
    host.write_all(&message).await?;
    let length = host.read_u16().await?;
    let mut answer = vec![0; length.into()];
    host.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn take_connections(listener: tokio::net::TcpListener, places: Arc<Semaphore>) {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((mut client, _)) => {
                tokio::spawn(async move {
                    let carried = async {
                        let mut host = connect().await?;
                        host.write_all(&[RESOLVE_STREAM]).await?;
                        copy_bidirectional(&mut client, &mut host).await
                    };
                    if let Err(error) = carried.await {
                        tracing::debug!(%error, "a connection to the host's name server broke");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the host's name server");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connect() -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, RESOLVER_PORT)).await
}
