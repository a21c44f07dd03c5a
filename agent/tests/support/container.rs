//! Requests about one container.

use bulkhead_agent_protocol::{
    client::AgentClient,
    messages::{
        ContainerRequest, ExecProcessRequest, RemoveContainerRequest, ResizeTerminalRequest,
        SignalProcessRequest, StartContainerRequest, StatsResponse, Stdio, UpdateContainerRequest,
        WaitOutOfMemoryRequest, WaitProcessRequest,
    },
};
use serde_json::Value;
use ttrpc::context::with_timeout;

use super::{DEADLINE, Fixture, Run, Streams, spec, status};

/// A container by its id.
pub(crate) struct Container<'f> {
    pub(super) fixture: &'f Fixture,
    pub(super) id: String,
}

impl Container<'_> {
    fn client(&self) -> &AgentClient {
        &self.fixture.client
    }

    fn request(&self) -> ContainerRequest {
        ContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        }
    }

    pub(crate) fn try_start(&self) -> Result<(), (String, String)> {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        self.client()
            .start_container(with_timeout(DEADLINE), &request)
            .map(drop)
            .map_err(status)
    }

    fn send(&self, signal: i32, all: bool) {
        let request = SignalProcessRequest {
            container_id: self.id.clone(),
            signal,
            all,
            ..Default::default()
        };
        self.client()
            .signal_process(with_timeout(DEADLINE), &request)
            .expect("signalled");
    }

    pub(crate) fn signal(&self, signal: i32) {
        self.send(signal, false);
    }

    pub(crate) fn signal_all(&self, signal: i32) {
        self.send(signal, true);
    }

    pub(crate) fn wait(&self) -> i32 {
        self.wait_for("")
    }

    fn wait_for(&self, exec_id: &str) -> i32 {
        let request = WaitProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.client()
            .wait_process(with_timeout(DEADLINE), &request)
            .expect("waited")
            .status
    }

    pub(crate) fn resize(&self, rows: u32, columns: u32) {
        let request = ResizeTerminalRequest {
            container_id: self.id.clone(),
            rows,
            columns,
            ..Default::default()
        };
        self.client()
            .resize_terminal(with_timeout(DEADLINE), &request)
            .expect("resized");
    }

    pub(crate) fn pause(&self) {
        self.client()
            .pause_container(with_timeout(DEADLINE), &self.request())
            .expect("paused");
    }

    pub(crate) fn resume(&self) {
        self.client()
            .resume_container(with_timeout(DEADLINE), &self.request())
            .expect("resumed");
    }

    pub(crate) fn stats(&self) -> StatsResponse {
        self.client()
            .stats(with_timeout(DEADLINE), &self.request())
            .expect("statistics")
    }

    pub(crate) fn update(&self, resources: &Value) -> Result<(), (String, String)> {
        let request = UpdateContainerRequest {
            container_id: self.id.clone(),
            resources: serde_json::to_vec(resources).expect("JSON"),
            ..Default::default()
        };
        self.client()
            .update_container(with_timeout(DEADLINE), &request)
            .map(drop)
            .map_err(status)
    }

    /// How many processes have been ended, and whether the container has.
    pub(crate) fn wait_out_of_memory(&self, seen: u64) -> (u64, bool) {
        let request = WaitOutOfMemoryRequest {
            container_id: self.id.clone(),
            seen,
            ..Default::default()
        };
        let response = self
            .client()
            .wait_out_of_memory(with_timeout(DEADLINE), &request)
            .expect("waited");
        (response.kills, response.gone)
    }

    pub(crate) fn processes(&self) -> Vec<String> {
        let list = self
            .client()
            .list_processes(with_timeout(DEADLINE), &self.request());
        list.expect("list")
            .processes
            .into_iter()
            .map(|process| process.command)
            .collect()
    }

    pub(crate) fn exec(&self, exec_id: &str, arguments: &[&str], input: &[u8]) -> Run {
        self.exec_process(exec_id, &spec(arguments)["process"], input)
    }

    /// Runs what a `process` object says.
    pub(crate) fn exec_process(&self, exec_id: &str, process: &Value, input: &[u8]) -> Run {
        let streams = Streams::new(self.fixture, input);
        self.start_exec(exec_id, process, streams.stdio())
            .expect("started");
        streams.collect(|| self.wait_for(exec_id))
    }

    pub(crate) fn try_exec(&self, exec_id: &str, arguments: &[&str]) -> Result<(), String> {
        self.start_exec(exec_id, &spec(arguments)["process"], Stdio::new())
            .map_err(|(_, message)| message)
    }

    fn start_exec(
        &self,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> Result<(), (String, String)> {
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            process: serde_json::to_vec(process).expect("JSON"),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client()
            .exec_process(with_timeout(DEADLINE), &request)
            .map(drop)
            .map_err(status)
    }

    fn removal(&self, force: bool) -> Result<(), (String, String)> {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
            force,
            ..Default::default()
        };
        self.client()
            .remove_container(with_timeout(DEADLINE), &request)
            .map(drop)
            .map_err(status)
    }

    pub(crate) fn try_remove(&self) -> Result<(), (String, String)> {
        self.removal(false)
    }

    pub(crate) fn remove(&self) {
        self.removal(false).expect("removed");
    }

    pub(crate) fn remove_by_force(&self) {
        self.removal(true).expect("removed");
    }
}
