//! The command line: runc's, and what is ours alone.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{cgroup::Driver, log::LogFormat, spec::UnknownProperties};

const VERSION: &str = concat!(
    "version ",
    env!("CARGO_PKG_VERSION"),
    "\nspec: 1.2.0\nsandbox: KVM microVM"
);

/// OCI runtime that runs every container in its own KVM microVM.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version = VERSION, max_term_width = 100)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Directory of the containers' state, on a tmpfs [default: /run/bulkhead, in a user namespace
    /// $XDG_RUNTIME_DIR/bulkhead]
    #[arg(long)]
    pub root: Option<PathBuf>,
    /// File for the log, instead of standard error
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// Format of the log
    #[arg(long)]
    pub log_format: Option<LogFormat>,
    /// Log everything
    #[arg(long)]
    pub debug: bool,
    /// Take linux.cgroupsPath for systemd's form, slice:prefix:name (the cgroup is made directly)
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Who makes the container's cgroup on the host, as in crun; "systemd" is --systemd-cgroup, with
    /// "disabled" there is none, and limits hold in the guest alone
    #[arg(long, value_name = "MANAGER", conflicts_with = "systemd_cgroup")]
    pub cgroup_manager: Option<Driver>,
    /// Configuration file, instead of /etc/bulkhead/config.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Whether to run without root: "false" and "auto" are accepted
    #[arg(long, default_value = "auto")]
    pub rootless: String,
    /// Accepted for runc's sake; checkpoints do not use CRIU
    #[arg(long, hide = true)]
    pub criu: Option<String>,
    /// What becomes of properties in config.json that the runtime-spec does not know
    #[arg(long, value_name = "RULE")]
    pub unknown_properties: Option<UnknownProperties>,
    /// Guest kernel, an uncompressed ELF image
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Guest root image
    #[arg(long, value_name = "FILE")]
    pub root_image: Option<PathBuf>,
    /// Program of the virtual machine monitor
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a container
    Create(Create),
    /// Let the process of a created container run
    Start(Id),
    /// Create and run a container
    Run(Run),
    /// Show the state of a container
    State(Id),
    /// Send a signal to the container's process
    Kill(Kill),
    /// Delete what a container holds
    Delete(Delete),
    /// Run one more process in a container
    Exec(Exec),
    /// Show the processes of a container
    Ps(Ps),
    /// List containers
    List(List),
    /// Change the resources that a container may use
    Update(Box<Update>),
    /// Show what a container uses, and when it runs out of memory
    Events(Events),
    /// Freeze the processes of a container
    Pause(Id),
    /// Thaw the processes of a container
    Resume(Id),
    /// Make a configuration to start from
    Spec(Spec),
    /// Show what this runtime supports
    Features,
    /// Tell whether this host can run guests, and what to do if not
    Check(Check),
    /// Open a shell in the guest of a container made with --guest-debug
    Console(Id),
    /// Stand for a process (started by the other commands)
    #[command(hide = true)]
    Monitor,
}

impl Command {
    /// Whether it makes something by the rules of the configuration file, so that mistakes in that
    /// file must be told.
    pub fn makes(&self) -> bool {
        matches!(
            self,
            Self::Create(_) | Self::Run(_) | Self::Exec(_) | Self::Update(_) | Self::Check(_)
        )
    }
}

/// A container.
#[derive(Args, Debug)]
pub struct Id {
    /// Its id
    pub id: String,
}

/// How a container is made.
#[derive(Args, Debug)]
pub struct Create {
    /// The container's id, unique on this host
    pub id: String,
    /// Directory of the bundle
    #[arg(long, short, default_value = ".")]
    pub bundle: PathBuf,
    /// Unix socket that receives the terminal of a process that has one
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the process id
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Not supported: the root is always entered by pivot_root, inside the guest
    #[arg(long)]
    pub no_pivot: bool,
    /// Make no session keyring for the container
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Descriptors to hand on: 0 only, since the guest cannot use the host's
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// File for the phases of the container's life, JSON
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// File for the guest kernel's log
    #[arg(long, value_name = "FILE")]
    pub guest_log: Option<PathBuf>,
    /// Boot the debug root image, for `console`
    #[arg(long)]
    pub guest_debug: bool,
}

/// How a container is made and run.
#[derive(Args, Debug)]
pub struct Run {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub create: Create,
    /// Return once the process runs
    #[arg(long, short)]
    pub detach: bool,
    /// Keep the container after its process has ended
    #[arg(long)]
    pub keep: bool,
    /// Accepted for runc's sake: nothing is reaped here but the runtime's own processes
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
}

/// Which signal for whom.
#[derive(Args, Debug)]
pub struct Kill {
    /// The container's id
    pub id: String,
    /// Name or number of the signal
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
    /// To every process of the container
    #[arg(long, short)]
    pub all: bool,
}

/// What to delete.
#[derive(Args, Debug)]
pub struct Delete {
    /// The container's id
    pub id: String,
    /// Even if it runs (it is killed), or is gone already
    #[arg(long, short)]
    pub force: bool,
}

/// A process to be run in a container.
#[derive(Args, Debug)]
pub struct Exec {
    /// The container's id
    pub id: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// Give the process a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// File with the process as JSON
    #[arg(long, short, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long)]
    pub cwd: Option<PathBuf>,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// User: UID or UID:GID
    #[arg(long, short)]
    pub user: Option<String>,
    /// One more group
    #[arg(long, short = 'g', value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// One more capability
    #[arg(long, short)]
    pub cap: Vec<String>,
    /// Forbid new privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// Return once the process runs
    #[arg(long, short)]
    pub detach: bool,
    /// File for the process id
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Unix socket that receives the process's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Descriptors to hand on: 0 only
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// AppArmor profile, which has no effect in a guest
    #[arg(long)]
    pub apparmor: Option<String>,
    /// SELinux label, which has no effect in a guest
    #[arg(long)]
    pub process_label: Option<String>,
    /// Not supported: a cgroup below the container's
    #[arg(long)]
    pub cgroup: Vec<String>,
    /// Even if the container is paused
    #[arg(long)]
    pub ignore_paused: bool,
}

/// A form of output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Whose processes to show.
#[derive(Args, Debug)]
pub struct Ps {
    /// The container's id
    pub id: String,
    /// Form of the output
    #[arg(long, short, default_value = "table")]
    pub format: Format,
    /// Options of ps(1): -e, -f, and -o with a list of columns
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<String>,
}

/// What to change; what is not given stays.
#[derive(Args, Debug, Default)]
pub struct Update {
    /// The container's id
    pub id: String,
    /// File with the resources as JSON (linux.resources of the runtime-spec), "-" for standard input
    #[arg(long, short, value_name = "FILE", conflicts_with = "limits")]
    pub resources: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub limits: UpdateLimits,
}

/// Limits one by one.
#[derive(Args, Debug, Default)]
#[group(id = "limits", multiple = true)]
#[allow(missing_docs)]
pub struct UpdateLimits {
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    pub blkio_weight: Option<u16>,
    /// Period of the CPU quota, in microseconds
    #[arg(long, value_name = "US")]
    pub cpu_period: Option<u64>,
    /// CPU time in each period, in microseconds; -1 for no limit
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    pub cpu_quota: Option<i64>,
    /// Unused CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "US")]
    pub cpu_burst: Option<u64>,
    /// Relative share of CPU time
    #[arg(long, value_name = "SHARES")]
    pub cpu_share: Option<u64>,
    /// Not supported: guests have no realtime groups
    #[arg(long, value_name = "US", hide = true)]
    pub cpu_rt_period: Option<u64>,
    /// Not supported: guests have no realtime groups
    #[arg(long, value_name = "US", allow_negative_numbers = true, hide = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// 1 to run only when the CPU is idle, 0 to run as usual
    #[arg(long, value_name = "0|1")]
    pub cpu_idle: Option<i64>,
    /// Not supported: kernels do not limit it any more
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, hide = true)]
    pub kernel_memory: Option<String>,
    /// Not supported: kernels do not limit it any more
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, hide = true)]
    pub kernel_memory_tcp: Option<String>,
    /// Memory limit: bytes, or with k, m, g; -1 for none
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    pub memory: Option<String>,
    /// Memory that is left alone while others have more than theirs
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    pub memory_reservation: Option<String>,
    /// Limit of memory and swap together; -1 for none
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    pub memory_swap: Option<String>,
    /// Number of processes; -1 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
    /// Not supported: a guest cannot partition the host's caches
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub l3_cache_schema: Option<String>,
    /// Not supported: a guest cannot partition the host's memory bandwidth
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub mem_bw_schema: Option<String>,
}

/// What to show.
#[derive(Args, Debug)]
pub struct Events {
    /// The container's id
    pub id: String,
    /// Time between two looks at what the container uses, such as 5s or 1m30s
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    pub interval: String,
    /// Show what the container uses, once
    #[arg(long)]
    pub stats: bool,
}

/// How to list.
#[derive(Args, Debug)]
pub struct List {
    /// Form of the output
    #[arg(long, short, default_value = "table")]
    pub format: Format,
    /// Ids only
    #[arg(long, short)]
    pub quiet: bool,
}

/// Where to put a configuration.
#[derive(Args, Debug)]
pub struct Spec {
    /// Directory of the bundle
    #[arg(long, short, default_value = ".")]
    pub bundle: PathBuf,
    /// Not supported: guests need no rootless configuration
    #[arg(long)]
    pub rootless: bool,
}

/// How to show the judgement.
#[derive(Args, Debug)]
pub struct Check {
    /// Form of the output
    #[arg(long, short, default_value = "table")]
    pub format: Format,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_may_follow_the_id_but_not_the_program() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap().command;
        let Command::Run(run) = parse("bulkhead --root /r run one -b /b -d --keep") else {
            panic!("not run")
        };
        assert_eq!(
            (run.create.id.as_str(), run.detach, run.keep),
            ("one", true, true)
        );
        let Command::Exec(exec) = parse("bulkhead exec -t one sh -c -t --cwd") else {
            panic!("not exec")
        };
        assert_eq!(exec.command, ["sh", "-c", "-t", "--cwd"]);
        assert!(exec.tty && exec.cwd.is_none());
        let Command::Kill(kill) = parse("bulkhead kill one 9 --all") else {
            panic!("not kill")
        };
        assert_eq!((kill.signal.as_str(), kill.all), ("9", true));
    }
}
