//! The hooks of a container's creation.

use std::os::fd::AsFd;

use super::{Launch, LaunchError};
use crate::{
    hooks::{self, Namespaces},
    monitor::StandInError,
    state::ContainerStatus,
};

impl Launch<'_, '_> {
    /// runtime-spec, "Lifecycle" 3 to 5: what hooks find is the container's sandbox, before its
    /// root is entered. They run in the host's network namespace, and find the container's by the
    /// pid of the state (Docker's hook puts interfaces there).
    pub(super) fn create_hooks(&self) -> Result<(), LaunchError> {
        let Some(hooks) = self.spec.hooks() else {
            return Ok(());
        };
        let host = Namespaces {
            network: self.network.home(),
            process: None,
        };
        let mut view = self.container.record()?.view();
        // What they were made for (config "Prestart") comes between `create` and `start`.
        view.status = ContainerStatus::Created;
        hooks::run("prestart", hooks::prestart(hooks), &view, host)?;
        view.status = ContainerStatus::Creating;
        let list = hooks.create_runtime().as_deref();
        hooks::run("createRuntime", list, &view, host)?;
        Ok(())
    }

    /// runtime-spec, config "CreateContainer Hooks": the container is there, its process has not
    /// been let run. This thread's network namespace is the container's.
    pub(super) fn container_hooks(&mut self) -> Result<(), LaunchError> {
        let hooks = self.spec.hooks().as_ref();
        let Some(list) = hooks.and_then(|hooks| hooks.create_container().as_deref()) else {
            return Ok(());
        };
        self.stand_in_arrives()?;
        let record = self.container.record()?;
        let failed = |error| LaunchError::Io("find the container's process for hooks", error);
        let process = match record.process {
            Some(process) => Some(process.open().map_err(failed)?.ok_or(StandInError::Gone)?),
            None => None,
        };
        let mut view = record.view();
        view.status = ContainerStatus::Creating;
        let namespaces = Namespaces {
            network: None,
            process: process.as_ref().map(AsFd::as_fd),
        };
        Ok(hooks::run(
            "createContainer",
            Some(list),
            &view,
            namespaces,
        )?)
    }
}
