//! Several processes of this program that work together on loopback.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::child;

const FOLDER: &str = "CONVPASS_TEST_TEAM_IN";
const CASE: &str = "CONVPASS_TEST_TEAM_CASE";

/// The folder and the case of a process that [`Team::start`] started; `None` in the test itself.
pub fn is_member() -> Option<(std::path::PathBuf, String)> {
    let folder = std::env::var_os(FOLDER)?;
    Some((folder.into(), std::env::var(CASE).unwrap()))
}

/// A port that no program listened on a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Sets the variables that a launcher sets; the store is at `address`:`port`.
pub fn place(command: &mut Command, rank: usize, size: usize, (address, port): (&str, u16)) {
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
    command.env("MASTER_ADDR", address).env("MASTER_PORT", port.to_string());
    command.env("OMP_NUM_THREADS", "1");
}

/// Processes by rank; a rank that was not started is `None`.
pub struct Team(pub Vec<Option<Child>>);

impl Team {
    /// Starts the test `name` once for each rank that `starts`, each of which finds itself a member.
    pub fn start(
        name: &str,
        folder: &Path,
        case: &str,
        size: usize,
        starts: impl Fn(usize) -> bool,
    ) -> Self {
        let port = free_port();
        let command = |rank: usize| {
            let mut command = child::test(name);
            place(&mut command, rank, size, ("127.0.0.1", port));
            starts(rank).then_some(command)
        };
        Self::start_commands((0..size).map(command), folder, case)
    }

    /// Starts the members by their commands, in the order of their ranks.
    pub fn start_commands(
        commands: impl Iterator<Item = Option<Command>>,
        folder: &Path,
        case: &str,
    ) -> Self {
        let start = |(rank, command): (usize, Option<Command>)| {
            let mut command = command?;
            let log = fs::File::create(folder.join(format!("{rank}.log"))).unwrap();
            command.env(FOLDER, folder).env(CASE, case).stdout(Stdio::null()).stderr(log);
            Some(command.spawn().unwrap())
        };
        Team(commands.enumerate().map(start).collect())
    }

    /// Waits for the ranks that `ends` and returns whether each succeeded. Kills all others then.
    ///
    /// # Panics
    /// If one of them is still there after `limit`.
    pub fn wait(mut self, limit: Duration, ends: impl Fn(usize) -> bool) -> Vec<bool> {
        let started = Instant::now();
        let mut outcomes = vec![false; self.0.len()];
        for (rank, outcome) in outcomes.iter_mut().enumerate().filter(|(rank, _)| ends(*rank)) {
            let Some(child) = &mut self.0[rank] else { continue };
            *outcome = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status.success();
                }
                assert!(started.elapsed() < limit, "rank {rank} hangs");
                std::thread::sleep(Duration::from_millis(5));
            };
        }
        outcomes
    }

    /// Waits for all ranks, each of which has to succeed and to say that it is done.
    pub fn finish(self, limit: Duration, folder: &Path, case: &str) {
        for (rank, outcome) in self.wait(limit, |_| true).into_iter().enumerate() {
            let said = said(folder, rank);
            assert!(outcome && said == "done", "{case}: rank {rank}: {said}");
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        for child in self.0.iter_mut().flatten() {
            let _ended_before = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// Writes what a member has to say for the test.
pub fn say(folder: &Path, rank: usize, text: &str) {
    fs::write(folder.join(format!("{rank}.txt")), text).unwrap();
}

/// What a member said; nothing if it did not come to it.
pub fn said(folder: &Path, rank: usize) -> String {
    fs::read_to_string(folder.join(format!("{rank}.txt"))).unwrap_or_default()
}
