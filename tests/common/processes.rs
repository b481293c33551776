//! The program in several processes at once.
#![allow(dead_code, missing_docs)]

use std::{
    ffi::OsStr,
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
};

/// How a process ended: exit code, stdout, stderr.
pub type Ended = (Option<i32>, String, String);

fn ended(output: Output) -> Ended {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The program on one thread, not yet started.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relora-kit"));
    command.args(["--progress", "never", "--threads", "1"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Lets a process believe that torchrun started it.
pub fn as_rank(command: &mut Command, rank: usize, world_size: usize, port: u16) {
    let numbers = [("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world_size)];
    command.envs(numbers.map(|(name, number)| (name, number.to_string())));
    command.envs([("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", port.to_string())]);
    command.env("RELORA_KIT_JOIN_SECONDS", "20");
}

/// Runs the program as torchrun does, once per rank; `change` may change what a rank gets.
pub fn together<S: AsRef<OsStr>>(world_size: usize, args: &[S], change: impl Fn(usize, &mut Command)) -> Vec<Ended> {
    let port = free_port();
    let start = |rank| {
        let mut command = program();
        as_rank(command.args(args), rank, world_size, port);
        change(rank, &mut command);
        command.spawn().unwrap()
    };
    let children: Vec<_> = (0..world_size).map(start).collect();
    children.into_iter().map(|child| ended(child.wait_with_output().unwrap())).collect()
}

/// `mpirun` with this many processes of the program, not yet started.
pub fn mpirun<S: AsRef<OsStr>>(world_size: usize, args: &[S]) -> Command {
    let mut command = Command::new("mpirun");
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.args(["--oversubscribe", "-n", &world_size.to_string()]);
    command.arg(program().get_program()).args(program().get_args()).args(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `mpirun` to its end.
pub fn run_mpi(command: &mut Command) -> Ended {
    ended(command.output().expect("mpirun starts: install openmpi-bin (tools/test does)"))
}

/// The process of this rank among those whose arguments name `path`.
pub fn process_of(rank: usize, path: &Path) -> Option<i32> {
    let (path, variable) = (path.as_os_str().as_encoded_bytes(), format!("OMPI_COMM_WORLD_RANK={rank}"));
    std::fs::read_dir("/proc").unwrap().find_map(|entry| {
        let folder = entry.unwrap().path();
        let pid = folder.file_name()?.to_str()?.parse().ok()?;
        let has = |file: &str, wanted: &[u8]| {
            let bytes = std::fs::read(folder.join(file)).unwrap_or_default();
            bytes.split(|byte| *byte == 0).any(|word| word == wanted)
        };
        (has("cmdline", path) && has("environ", variable.as_bytes())).then_some(pid)
    })
}
