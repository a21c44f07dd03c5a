//! The file system device as its transport sees it: configuration space, activation, state.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::warn;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::by_vcpu::{self, Patience};
use super::handler::FilesystemHandler;
use super::host::HostSide;
use super::library::Library;
use super::log;
use super::request::Requests;
use super::server::{self, FileServer, Share};
use super::service::{Service, SharedService};
use super::tree::Tree;
use crate::threads::Role;
use crate::virtio::config_space;
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::state::FilesystemState;
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, DeviceKind, DeviceState, StateError, VirtioDevice};

/// Urgent requests, and all others. Linux makes requests no longer than the queue, in pages: this
/// is enough for the largest, 1 MiB.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// Bytes of the tag in the configuration space (virtio 1.2 §5.11.4).
const TAG_SIZE: usize = 36;
const CONFIG_SIZE: usize = TAG_SIZE + 4;

/// Why there is no file system device.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// The tag does not fit the configuration space.
    #[error("the share's tag {tag:?} must have 1 to 36 bytes and no NUL")]
    Tag {
        /// As configured.
        tag: String,
    },
    /// The file server could not be made.
    #[error("cannot serve the share {tag:?}")]
    Server {
        /// The share's tag.
        tag: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A virtio-fs device.
pub struct Filesystem {
    tag: String,
    config: [u8; CONFIG_SIZE],
    server: Arc<FileServer>,
    /// While no thread has it.
    host: Option<HostSide>,
    tree: Tree,
    worker: Option<Worker<FilesystemHandler>>,
    /// While active: what vCPUs serve with, and the queues' events.
    pub(super) service: Option<(SharedService, Vec<EventFd>)>,
    /// State was saved or restored: the server goes on with it at the next activation.
    keep_state: bool,
}

impl Filesystem {
    /// The guest mounts the share by its tag.
    pub fn new(tag: &str, share: Share) -> Result<Self, FilesystemError> {
        let bytes = tag.as_bytes();
        if bytes.is_empty() || bytes.len() > TAG_SIZE || bytes.contains(&0) {
            return Err(FilesystemError::Tag { tag: tag.into() });
        }
        let mut config = [0; CONFIG_SIZE];
        config[..bytes.len()].copy_from_slice(bytes);
        // num_request_queues
        config[TAG_SIZE] = 1;
        log::install();
        let (server, tree, host) =
            server::new(share).map_err(|source| FilesystemError::Server {
                tag: tag.into(),
                source,
            })?;
        Ok(Self {
            tag: tag.into(),
            config,
            server: Arc::new(server),
            host: Some(host),
            tree,
            worker: None,
            service: None,
            keep_state: false,
        })
    }
}

impl VirtioDevice for Filesystem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Filesystem
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut host = self.host.take().ok_or_else(|| ActivateError::Backend {
            what: format!("the share {:?}", self.tag),
            source: io::Error::other("an earlier start of the device failed"),
        })?;
        if !std::mem::take(&mut self.keep_state) {
            // A driver that starts anew knows no inode and has no file open.
            self.server.destroy();
            host.reset();
        }
        let backend = |source| ActivateError::Backend {
            what: format!("memory for the share {:?}", self.tag),
            source,
        };
        let library = Library::new().map_err(|error| backend(io::Error::other(error)))?;
        let mut queues = Vec::with_capacity(activation.queues.len());
        let mut events = Vec::with_capacity(activation.queues.len());
        for active in activation.queues {
            queues.push(active.queue);
            events.push(active.notified);
        }
        let service = Arc::new(Mutex::new(Service {
            memory: activation.memory.memory(),
            queues,
            interrupt: activation.interrupt.clone(),
            server: self.server.clone(),
            tree: self.tree.clone(),
            host,
            requests: Requests::new(),
            library,
            answer: Vec::new(),
            patience: Patience::new(),
            broken: false,
            log: RateLimit::default(),
        }));
        let clones: io::Result<Vec<_>> = events.iter().map(EventFd::try_clone).collect();
        let handler = FilesystemHandler {
            service: service.clone(),
            notified: clones.map_err(ActivateError::Thread)?,
            settled: false,
        };
        let worker = Worker::spawn(Role::Filesystem, handler, activation.interrupt)?;
        self.worker = Some(worker);
        self.service = Some((service, events));
        Ok(())
    }

    /// A vCPU answers what is short by itself.
    fn notified_on_vcpu(&self, _queue: u16) -> bool {
        true
    }

    fn notify(&mut self, queue: u16) {
        if let Some((service, events)) = &self.service
            && let Some(event) = events.get(usize::from(queue))
        {
            by_vcpu::notified(service, event, queue);
        }
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(worker) = self.worker.take() else {
            return Vec::new();
        };
        // No vCPU comes here as long as we do.
        self.service = None;
        let service = worker
            .stop()
            .and_then(|handler| Arc::into_inner(handler.service));
        let Some(service) = service else {
            warn!(tag = self.tag, "the thread of the share has panicked");
            return Vec::new();
        };
        let mut service = service.into_inner().unwrap_or_else(PoisonError::into_inner);
        service.leave_nothing_waiting();
        self.host = Some(service.host);
        service.queues
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        let server = server::save(&self.server).map_err(|source| StateError::Server {
            what: "save the file server's state",
            source,
        })?;
        self.keep_state = true;
        Ok(DeviceState::Filesystem(FilesystemState {
            tag: self.tag.clone(),
            server,
            watches: self
                .host
                .as_ref()
                .map(HostSide::watches)
                .unwrap_or_default(),
            delegated: self
                .host
                .as_ref()
                .map(HostSide::delegated)
                .unwrap_or_default(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Filesystem(state) = state else {
            return Err(StateError::WrongDevice {
                expected: self.kind(),
                found: state.kind(),
            });
        };
        if state.tag != self.tag {
            return Err(StateError::Mismatch(format!(
                "the share was {:?}, it is {:?}",
                state.tag, self.tag
            )));
        }
        server::restore(&self.server, &state.server).map_err(|source| StateError::Server {
            what: "restore the file server's state",
            source,
        })?;
        if let Some(host) = &mut self.host {
            host.restore(state.watches, state.delegated);
        }
        self.keep_state = true;
        Ok(())
    }
}
