//! A run on several machines one of which is cut off in mid-step: each process ends with an error
//! that names a rank behind the cut, and the run goes on from its state to the same bytes.
//!
//! The machines are network namespaces on one bridge. Where the system gives none, or has no `ip`,
//! nothing is tested.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::faults::{LIMIT, SIZE, STEPS, TIMEOUT, member, wait_for};
use crate::team::{Team, is_member, place, said};

const NAME: &str = "hosts::a_machine_that_is_cut_off_is_named_and_the_run_goes_on";
/// Set in the process that has namespaces of its own.
const INSIDE: &str = "CONVPASS_TEST_HOSTS";
const PORT: u16 = 29500;

/// Runs a script of the shell.
fn shell(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Machines with one network interface each, and a switch between them.
struct Network {
    name: String,
}

impl Network {
    fn new(name: String) -> Self {
        shell(&format!(
            "ip netns add {name}switch
             ip -n {name}switch link add bridge type bridge
             ip -n {name}switch link set bridge up"
        ));
        for rank in 0..SIZE {
            let (host, address) = (format!("{name}{rank}"), Self::address(rank));
            shell(&format!(
                "ip netns add {host}
                 ip -n {host} link set lo up
                 ip -n {host} link add eth0 type veth peer name port{rank} netns {name}switch
                 ip -n {host} address add {address}/24 dev eth0
                 ip -n {host} link set eth0 up
                 ip -n {name}switch link set port{rank} master bridge
                 ip -n {name}switch link set port{rank} up"
            ));
        }
        Network { name }
    }

    fn address(rank: usize) -> String {
        format!("10.7.0.{}", rank + 1)
    }

    /// Connects a machine to the switch, or not: then its packets are lost without an error.
    fn connect(&self, rank: usize, connected: bool) {
        let state = if connected { "up" } else { "down" };
        shell(&format!("ip -n {}switch link set port{rank} {state}", self.name));
    }

    /// Starts a process on each machine.
    fn start(&self, folder: &Path, case: &str) -> Team {
        let command = |rank: usize| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{}{rank}", self.name));
            command.arg(std::env::current_exe().unwrap()).args(["--exact", NAME]);
            place(&mut command, rank, SIZE, (&Self::address(0), PORT));
            command.env("GLOO_SOCKET_IFNAME", "eth0");
            Some(command)
        };
        Team::start_commands((0..SIZE).map(command), folder, case)
    }
}

/// Cuts `victim` off in mid-step. Returns the seconds to the end of the last process.
fn cut(victim: usize, expected: &[u8]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let network = Network::new(format!("cut{victim}"));
    let case = format!("Cut {victim} {}", STEPS / 2 + victim);
    let team = network.start(folder, &case);
    wait_for(&folder.join("ready"));
    network.connect(victim, false);
    let started = Instant::now();
    team.wait(LIMIT, |_| true);
    let took = started.elapsed().as_secs_f64();
    for rank in 0..SIZE {
        let said = said(folder, rank);
        // A machine that is cut off sees the others vanish.
        let behind: Vec<usize> = (0..SIZE).filter(|&r| (r == victim) != (rank == victim)).collect();
        let names = behind.iter().any(|other| said.contains(&format!("failed: rank {other}: ")));
        assert!(names, "rank {rank} of a run in which {victim} is cut off: {said}");
    }
    network.connect(victim, true);
    network.start(folder, "None 0 0").finish(LIMIT, folder, &case);
    assert!(std::fs::read(folder.join("adapter.safetensors")).unwrap() == expected, "{case}");
    took
}

/// In namespaces of its own, the test may make networks.
fn inside() {
    shell("mount -t tmpfs tmpfs /run && mkdir /run/netns");
    let folder = tempfile::tempdir().unwrap();
    let whole = Network::new("whole".to_owned()).start(folder.path(), "None 0 0");
    whole.finish(LIMIT, folder.path(), "no cut");
    let expected = std::fs::read(folder.path().join("adapter.safetensors")).unwrap();
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|victim| {
            let expected = &expected;
            (victim, scope.spawn(move || cut(victim, expected)))
        });
        for (victim, thread) in threads {
            let seconds = thread.join().unwrap();
            println!("rank {victim} is cut off: all processes ended within {seconds:.1} s");
            assert!(Duration::from_secs_f64(seconds) < 6 * TIMEOUT, "rank {victim}: {seconds} s");
        }
    });
}

#[test]
fn a_machine_that_is_cut_off_is_named_and_the_run_goes_on() {
    if let Some((folder, case)) = is_member() {
        return member(&folder, &case);
    }
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let probe = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add probe \
                 && ip -n probe link add bridge type bridge && ip -n probe link add eth0 type veth peer name port0";
    let namespaces = ["--user", "--map-root-user", "--net", "--mount"];
    let probe = Command::new("unshare").args(namespaces).args(["sh", "-c", probe]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        let why = probe.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
        eprintln!("left out: this system gives no network namespaces ({why:?})");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(namespaces).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", NAME, "--nocapture"]).env(INSIDE, "").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    print!("{text}");
}
