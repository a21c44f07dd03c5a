//! Carries connections of containers to Unix sockets of the host. The guest's kernel has asked the
//! host for the connection when a process connected to a socket on the share that nobody in the
//! guest listens on, and hands us the guest's half (guest-kernel/patches); the mark on it is the
//! vsock port of the host's half.
//!
//! Streams only. Descriptors that one side sends (SCM_RIGHTS) have no meaning on the other and are
//! closed.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener as Listener},
    },
    sync::Arc,
    time::Duration,
};

use rustix::net::{Shutdown, shutdown};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::{
    error::{Attempt, Result},
    sys,
};

/// Abstract name that the guest's kernel knows us by.
const NAME: &[u8] = b"host-sockets";
/// Connections at a time, about half of those that the vsock device has; more wait to be accepted.
const MOST: usize = 512;
/// Bytes on their way in each direction.
const BUFFER: usize = 16 << 10;

/// Begins to listen; connections wait until [`serve`] runs.
pub fn listen() -> Result<UnixListener> {
    SocketAddr::from_abstract_name(NAME)
        .and_then(|address| Listener::bind_addr(&address))
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .and_then(UnixListener::from_std)
        .or_cannot(|| "listen for connections to the host's sockets")
}

/// Carries connections, for ever.
pub async fn serve(listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MOST));
    loop {
        // Nobody closes the semaphore.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(async move {
                    if let Err(error) = carry(client).await {
                        tracing::debug!(%error, "a connection to a socket of the host broke");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to a socket of the host");
                // For want of descriptors or memory, which others must give back first.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Carries both directions until both have ended. Each ends by itself: what one side has sent before
/// it went is still read by the other.
async fn carry(mut client: UnixStream) -> io::Result<()> {
    let port = sys::socket_mark(client.as_fd())?;
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await?;
    let ends = (
        client.as_fd().try_clone_to_owned()?,
        host.as_fd().try_clone_to_owned()?,
    );
    let (from_client, to_client) = client.split();
    let (from_host, to_host) = host.split();
    tokio::join!(
        carry_one_way(from_client, to_host, &ends.0, &ends.1),
        carry_one_way(from_host, to_client, &ends.1, &ends.0),
    );
    Ok(())
}

async fn carry_one_way(
    from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    source: &OwnedFd,
    target: &OwnedFd,
) {
    let mut from = BufReader::with_capacity(BUFFER, from);
    let copied = tokio::io::copy_buf(&mut from, &mut to).await;
    // Fail only where the other side is gone altogether.
    let _ = shutdown(target, Shutdown::Write);
    if copied.is_err() {
        // Who writes on hears that nobody reads.
        let _ = shutdown(source, Shutdown::Read);
    }
}
