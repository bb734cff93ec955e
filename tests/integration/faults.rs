//! A process that dies, panics, hangs or never starts ends the others with an error that names it,
//! and the run goes on from its state to the same bytes.
//!
//! `CONVPASS_TEST_FAULTS=20` has each fault happen 20 times.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use convpass::distributed::ProcessGroup;
use convpass::train::{FitOptions, Observer, RunCheckpoint, StepReport, fit_with};
use convpass::{ConvBypassConfig, Method, PetlConfig, PetlModel};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Device;

use crate::resume::bars;
use crate::support::{small_vit_on, train_config};
use crate::team::{Team, is_member, said, say};

const NAME: &str = "faults::a_lost_process_is_named_and_the_run_goes_on";
/// Long enough for processes that start on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(20);
pub const SIZE: usize = 3;
pub const STEPS: usize = 20;
/// The longest time that a test waits for a process.
pub const LIMIT: Duration = Duration::from_secs(240);

/// What happens to one process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Its machine is cut off from the others ([`crate::hosts`]).
    Cut,
    /// It is killed.
    Kill,
    /// It panics between two steps.
    Panic,
    /// It waits for ever between two steps.
    Hang,
    /// It is stopped with all its threads.
    Stop,
    /// It is not started.
    Absent,
}

const FAULTS: [Fault; 5] = [Fault::Kill, Fault::Panic, Fault::Hang, Fault::Stop, Fault::Absent];

/// Does to this process what happens after a step.
struct Strike<'a> {
    folder: &'a Path,
    fault: Fault,
    /// `None` in every process but one.
    after: Option<usize>,
}

impl Observer for Strike<'_> {
    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        if self.after == Some(step.steps_done()) {
            match self.fault {
                Fault::Panic => panic!("a panic for the test"),
                Fault::Hang => loop {
                    std::thread::sleep(Duration::from_secs(1));
                },
                // The test does it from outside, at some time in one of the next steps.
                _ => std::fs::write(self.folder.join("ready"), "").unwrap(),
            }
        }
        ControlFlow::Continue(())
    }
}

/// One process of a run; `case` is the fault, its rank and the step after which it comes.
pub fn member(folder: &Path, case: &str) {
    tch::set_num_threads(1);
    let mut words = case.split(' ');
    let fault = words.next().unwrap();
    let fault = [Fault::Cut].iter().chain(&FAULTS).find(|f| format!("{f:?}") == fault);
    let fault = *fault.unwrap_or(&Fault::None);
    let [rank, step] = [0, 1].map(|_| words.next().unwrap().parse::<usize>().unwrap());
    let own: usize = std::env::var("RANK").unwrap().parse().unwrap();
    let run = || -> convpass::Result<()> {
        let group = ProcessGroup::from_env(Device::Cpu, TIMEOUT)?.expect("the variables are set");
        let method = Method::ConvBypass(ConvBypassConfig::default());
        let petl = PetlConfig { seed: 5, ..PetlConfig::new(method, 3) };
        let mut model = PetlModel::new(small_vit_on(Device::Cpu), &petl)?;
        let checkpoint = RunCheckpoint { path: folder.join("run.state"), every: 3 };
        let options = FitOptions {
            group: Some(&group),
            checkpoint: Some(&checkpoint),
            ..FitOptions::default()
        };
        let mut strike = Strike { folder, fault, after: (rank == own).then_some(step) };
        let (train, config) = (bars(31, 16, 0), train_config(5, 7));
        fit_with(&mut model, &train, None, &config, options, &mut strike)?;
        if own == 0 {
            model.save_adapter(folder.join("adapter.safetensors"))?;
        }
        Ok(())
    };
    say(folder, own, &run().map_or_else(|error| error.to_string(), |()| "done".to_owned()));
}

/// Waits for a file that another process writes.
pub fn wait_for(file: &Path) {
    let started = Instant::now();
    while !file.exists() {
        assert!(started.elapsed() < LIMIT, "{} does not come", file.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets a fault happen, and then the run go on. Returns the seconds to the end of the last process,
/// from the fault, or from the start where the fault comes by itself.
fn strike(fault: Fault, number: usize, expected: &[u8]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut rng = ChaCha8Rng::seed_from_u64(number as u64);
    let (victim, step) = (number % SIZE, rng.random_range(1..STEPS - 3));
    let case = format!("{fault:?} {victim} {step}");
    let starts = |rank| fault != Fault::Absent || rank != victim;
    let mut team = Team::start(NAME, folder, &case, SIZE, starts);
    if matches!(fault, Fault::Kill | Fault::Stop) {
        wait_for(&folder.join("ready"));
        std::thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
        let child = team.0[victim].as_mut().unwrap();
        if fault == Fault::Kill {
            child.kill().unwrap();
        } else {
            let pid = child.id().to_string();
            assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
        }
    }
    let started = Instant::now();
    let outcomes = team.wait(LIMIT, |rank| rank != victim);
    let took = started.elapsed().as_secs_f64();
    for rank in (0..SIZE).filter(|&rank| rank != victim) {
        let said = said(folder, rank);
        assert!(outcomes[rank], "{case}: rank {rank}: {said}");
        let names = said.contains(&format!("failed: rank {victim}: "));
        // The last steps may have come before the fault.
        assert!(names || said == "done", "{case}: rank {rank}: {said}");
    }
    Team::start(NAME, folder, "None 0 0", SIZE, |_| true).finish(LIMIT, folder, &case);
    assert!(std::fs::read(folder.join("adapter.safetensors")).unwrap() == expected, "{case}");
    took
}

#[test]
fn a_lost_process_is_named_and_the_run_goes_on() {
    if let Some((folder, case)) = is_member() {
        return member(&folder, &case);
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = Team::start(NAME, folder.path(), "None 0 0", SIZE, |_| true);
    whole.finish(LIMIT, folder.path(), "no fault");
    let expected = std::fs::read(folder.path().join("adapter.safetensors")).unwrap();
    let times = std::env::var("CONVPASS_TEST_FAULTS").map_or(1, |times| times.parse().unwrap());
    std::thread::scope(|scope| {
        let each = |(first, fault): (usize, Fault)| {
            let expected = &expected;
            scope.spawn(move || {
                let seconds = (0..times).map(|time| strike(fault, first + time, expected));
                (fault, seconds.fold(0.0, f64::max))
            })
        };
        let threads: Vec<_> = FAULTS.into_iter().enumerate().map(each).collect();
        for (fault, seconds) in threads.into_iter().map(|thread| thread.join().unwrap()) {
            println!("{fault:?}, {times} times: the others ended within {seconds:.1} s");
            // The timeout, the time to find out which process it was, and the start on a busy machine.
            assert!(seconds < 6.0 * TIMEOUT.as_secs_f64(), "{fault:?}: {seconds} s");
        }
    });
}
