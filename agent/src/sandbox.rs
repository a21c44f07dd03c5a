//! The containers of this guest, by id.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{CreateContainerRequest, ExecProcessRequest},
};
use rustix::process::Pid;
use tokio::sync::watch;

use crate::{
    container::{self, Container, Others, Surroundings},
    error::{Error, Result},
    process::Process,
};

/// All containers, and the processes of the guest itself.
#[derive(Debug)]
pub struct Sandbox {
    surroundings: Arc<Surroundings>,
    containers: Mutex<HashMap<String, Slot>>,
    /// Processes of the debug console, by exec id.
    guest_processes: Mutex<HashMap<String, Arc<Process>>>,
}

/// What an id stands for.
#[derive(Debug)]
enum Slot {
    /// A set-up that runs, so that no other takes the id; closed when it is done.
    Creating(watch::Receiver<()>),
    Container(Arc<Container>),
}

impl Sandbox {
    /// Without containers.
    pub fn new(surroundings: Arc<Surroundings>) -> Self {
        Self {
            surroundings,
            containers: Mutex::default(),
            guest_processes: Mutex::default(),
        }
    }

    /// What containers are made with.
    pub fn surroundings(&self) -> &Arc<Surroundings> {
        &self.surroundings
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// If it is being created: what is closed then.
    fn creating(&self, id: &str) -> Option<watch::Receiver<()>> {
        match self.containers().get(id) {
            Some(Slot::Creating(done)) => Some(done.clone()),
            _ => None,
        }
    }

    /// The container of this id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers().get(id) {
            Some(Slot::Container(container)) => Ok(container.clone()),
            Some(Slot::Creating(_)) => {
                let text = format!("container {id} is being created: wait until it is");
                Err(Error::new(ErrorKind::WrongState, text))
            }
            None => Err(Error::new(
                ErrorKind::NoSuchProcess,
                format!("there is no container {id} in this guest"),
            )),
        }
    }

    /// A process of a container, or of the guest if the container's id is empty.
    pub fn process(&self, container: &str, exec_id: &str) -> Result<Arc<Process>> {
        if !container.is_empty() {
            return self.container(container)?.process(exec_id);
        }
        let processes = self
            .guest_processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        processes.get(exec_id).cloned().ok_or_else(|| {
            let text = format!("the guest has no process {exec_id}");
            Error::new(ErrorKind::NoSuchProcess, text)
        })
    }

    /// Creates a container. Runs as a task of its own: a caller that goes away leaves no half.
    pub async fn create(self: Arc<Self>, request: CreateContainerRequest) -> Result<Pid> {
        let id = request.container_id.clone();
        let (_until_done, done) = watch::channel(());
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => {
                let text = format!("container {id} exists already");
                return Err(Error::new(ErrorKind::WrongState, text));
            }
            Entry::Vacant(free) => free.insert(Slot::Creating(done)),
        };
        let (namespaces, mounts) = (&request.join_namespaces, &request.join_mounts);
        let others = Others::find(namespaces, mounts, |id| self.container(id));
        let created = match others {
            Ok(others) => Container::create(&self.surroundings, &request, &others).await,
            Err(error) => Err(error),
        };
        let mut containers = self.containers();
        match created {
            Ok(container) => {
                let pid = container.pid();
                containers.insert(id, Slot::Container(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                containers.remove(&id);
                Err(error)
            }
        }
    }

    /// Runs a process in a container or in the guest.
    pub async fn exec(self: Arc<Self>, request: ExecProcessRequest) -> Result<Pid> {
        let stdio = request.stdio.clone().unwrap_or_default();
        if !request.container_id.is_empty() {
            let container = self.container(&request.container_id)?;
            let exec_id = &request.exec_id;
            return container
                .exec(&self.surroundings, exec_id, &request.process, &stdio)
                .await;
        }
        let process =
            container::exec_in_guest(&self.surroundings, &request.process, &stdio).await?;
        let pid = process.pid();
        let mut processes = self
            .guest_processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        processes.retain(|_, process| !process.was_waited_for());
        processes.insert(request.exec_id, process);
        Ok(pid)
    }

    /// Removes a container. By force also one that is being created, by whom nobody waits for any more.
    pub async fn remove(self: Arc<Self>, id: String, force: bool) -> Result<()> {
        while force && let Some(mut creating) = self.creating(&id) {
            // Fails, as nothing is ever sent, once it is done.
            let _ = creating.changed().await;
        }
        self.container(&id)?
            .remove(&self.surroundings, force)
            .await?;
        self.containers().remove(&id);
        Ok(())
    }

    /// Ends every container.
    pub async fn end(&self) {
        let containers: Vec<_> = self
            .containers()
            .drain()
            .filter_map(|(_, slot)| match slot {
                Slot::Container(container) => Some(container),
                Slot::Creating(_) => None,
            })
            .collect();
        for container in containers {
            if let Err(error) = container.end().await {
                tracing::warn!(error = %error.chain(), "a container does not end");
            }
        }
    }
}
