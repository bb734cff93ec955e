//! Starts each run of a plan as a process of this program, unless its record exists.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use convpass::data::vtab::VtabSplit;
use convpass::train::RunRecord;

use super::claim::Claim;
use super::side_by_side::side_by_side;
use super::{Board, SweepRun, adapter};
use crate::failure;
use crate::finetune::RunSpec;
use crate::plan::PlannedRun;
use crate::run_folder::{Diverged, FolderLock, digest, orientation_difference, recorded};

/// How long a process waits before it looks again at the runs that other processes make.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What became of an attempt to make a run.
enum Step {
    Ended {
        outcome: Came,
        is_new: bool,
    },
    /// Another process makes the run.
    Elsewhere,
}

/// What the folder of a run tells of it.
enum Known {
    Done(Box<RunRecord>),
    /// Its numbers became NaN or infinite, as the text says.
    Diverged(String),
    /// It is not finished.
    Nothing,
}

/// The record of a run, or the reason why there is none.
type Came = Result<Box<RunRecord>, Failure>;

/// Why a run has no record.
pub(super) struct Failure {
    reason: String,
    /// Whether its numbers became NaN or infinite. Such a trial was tried, and is never selected.
    diverged: bool,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure { reason: failure::chain(&error), diverged: failure::is_not_finite(&error) }
    }
}

impl Board<'_> {
    /// Makes the runs that are not done yet, and waits for those that other processes make. Returns
    /// all runs that succeeded, with their records. With `--status` it only looks.
    pub(super) fn execute<'r>(
        &mut self,
        runs: &'r [SweepRun<'r>],
    ) -> Result<Vec<(&'r SweepRun<'r>, RunRecord)>> {
        if self.args.status {
            return self.look(runs);
        }
        let count = AtomicUsize::new(0);
        let mut outcomes = BTreeMap::new();
        let mut open: Vec<usize> = (0..runs.len()).collect();
        let mut waits_for = 0;
        loop {
            let steps = side_by_side(self.jobs, &open, self.stop, |&index| {
                let run = &runs[index];
                let step = self.attempt(run)?;
                if let Some(Step::Ended { outcome, is_new }) = &step {
                    let number = 1 + count.fetch_add(1, Ordering::SeqCst);
                    self.say(run, outcome, *is_new, format!("[{number}/{}]", runs.len()));
                }
                Ok(step)
            })?;
            let mut elsewhere = Vec::new();
            for (at, step) in steps {
                match step {
                    Step::Ended { outcome, .. } => _ = outcomes.insert(open[at], outcome),
                    Step::Elsewhere => elsewhere.push(open[at]),
                }
            }
            if elsewhere.is_empty() || self.stop.is_asked() {
                break;
            }
            if waits_for != elsewhere.len() {
                waits_for = elsewhere.len();
                println!("{waits_for} runs are made by other processes; waiting for them");
            }
            open = elsewhere;
            sleep(LOOK_AGAIN);
        }
        let mut done = Vec::new();
        for (index, outcome) in outcomes {
            match outcome {
                Ok(record) => done.push((&runs[index], *record)),
                Err(Failure { reason, diverged }) => {
                    if diverged {
                        self.diverged.insert(runs[index].out.clone());
                    } else if let Ok(Known::Done(record)) = self.known(&runs[index]) {
                        // It failed here, and another process made it since.
                        done.push((&runs[index], *record));
                        continue;
                    }
                    self.results.failed.push((runs[index].label(), reason));
                }
            }
        }
        Ok(done)
    }

    /// Takes the record of a run, or makes the run unless another process does. Returns `None` after
    /// Ctrl-C.
    fn attempt(&self, run: &SweepRun) -> Result<Option<Step>> {
        let Some(_claim) = Claim::take(self.out, &run.out)? else {
            return Ok(Some(Step::Elsewhere));
        };
        // The process of a run lives on for a step if the one that started it was killed.
        if FolderLock::is_held(&run.out)? {
            return Ok(Some(Step::Elsewhere));
        }
        let (outcome, is_new) = match self.known(run) {
            Ok(Known::Done(record)) => (Ok(record), false),
            Ok(Known::Diverged(reason)) => (Err(Failure { reason, diverged: true }), false),
            Ok(Known::Nothing) => match self.spawn(run) {
                Ok(None) => return Ok(None),
                Ok(Some(record)) => (Ok(record.into()), true),
                Err(error) => (Err(error), true),
            },
            Err(error) => (Err(error.into()), true),
        };
        Ok(Some(Step::Ended { outcome, is_new }))
    }

    /// Counts the runs by their state, and returns those that are done.
    fn look<'r>(&mut self, runs: &'r [SweepRun<'r>]) -> Result<Vec<(&'r SweepRun<'r>, RunRecord)>> {
        let mut done = Vec::new();
        for run in runs {
            if let Some(holder) = Claim::holder(self.out, &run.out)? {
                self.status.claimed.push((run.label(), holder));
                continue;
            }
            match self.known(run) {
                Ok(Known::Done(record)) => {
                    self.status.done += 1;
                    done.push((run, *record));
                }
                Ok(Known::Diverged(_)) => {
                    self.diverged.insert(run.out.clone());
                    self.status.diverged.push(run.label());
                }
                Ok(Known::Nothing) => {}
                Err(error) => self.status.refused.push((run.label(), failure::chain(&error))),
            }
        }
        Ok(done)
    }

    /// Returns what the folder of the run tells of it.
    ///
    /// # Errors
    /// If the folder holds another run.
    fn known(&self, run: &SweepRun) -> Result<Known> {
        if let Some(record) = self.done_before(run)? {
            return Ok(Known::Done(record.into()));
        }
        // Without the folder, the head that the run starts from may not be there yet.
        if !run.out.exists() {
            return Ok(Known::Nothing);
        }
        match Diverged::before(&run.out, &self.planned(run)?) {
            Ok(diverged) => Ok(diverged.map_or(Known::Nothing, Known::Diverged)),
            Err(_) if self.args.set_aside => {
                set_aside(&run.out)?;
                Ok(Known::Nothing)
            }
            Err(error) => Err(error.context("use --set-aside to move it, or another --out")),
        }
    }

    fn say(&self, run: &SweepRun, outcome: &Came, is_new: bool, number: String) {
        match outcome {
            Ok(record) => {
                let figure = run.figure(record).unwrap_or(f64::NAN);
                let on = if run.is_trial { "val" } else { "top-1" };
                let when = if is_new {
                    format!("{:.1} s", record.fit.seconds)
                } else {
                    "done before".to_owned()
                };
                println!("{number} {}: {on} {figure:.2} %, {when}", run.label());
            }
            Err(failure) => eprintln!("{number} {}: {}", run.label(), failure.reason),
        }
    }

    /// Returns the fields that the record of the run must have.
    fn planned(&self, run: &SweepRun) -> Result<PlannedRun> {
        let (task, classes) = (run.task.name(), run.task.num_classes());
        let (model, mut train) =
            self.plan.run(run.method, &run.setting, task, classes, run.seed)?;
        train.validate_every = match self.args.looks.also_best_on_test {
            Some(every) if !run.is_trial => every.get(),
            _ => train.epochs.max(1),
        };
        let hash = |split| run.task.split(split).split_hash();
        let (train_split, val_split, test_split) = if run.is_trial {
            (VtabSplit::Train800, Some(VtabSplit::Val200), None)
        } else {
            (VtabSplit::Train800Val200, None, Some(VtabSplit::Test))
        };
        let head_digest = match &run.head {
            Some(file) => Some(digest(file).context("the run that the head comes from")?),
            None => None,
        };
        Ok(PlannedRun {
            task: task.to_owned(),
            model,
            train,
            backbone_digest: self.facts.digest.clone(),
            precision: recorded(self.args.backbone.precision()),
            image_size: self.facts.image_size,
            test_shorter_side: None,
            train_split: hash(train_split),
            val_split: val_split.map(hash),
            test_split: test_split.map(hash),
            head_digest,
            cross_validation: None,
        })
    }

    /// Returns the record in the run's folder if this run is finished, or `None` if it has to be
    /// started, also if it was started before and not finished.
    ///
    /// # Errors
    /// If the folder holds a run with other settings. Such a run is never used or overwritten;
    /// `--set-aside` moves it.
    fn done_before(&self, run: &SweepRun) -> Result<Option<RunRecord>> {
        let file = run.out.join("run.json");
        if !file.exists() {
            return Ok(None);
        }
        let mut planned = self.planned(run)?;
        let differences = match RunRecord::load(&file) {
            Ok(record) => {
                let is_finished = run.figure(&record).is_some();
                if !is_finished {
                    planned.test_split.clone_from(&record.test_split);
                }
                let mut differences = planned.differences(&record);
                let orientation = self.args.orientation.orientation();
                differences.extend(orientation_difference(&record, orientation));
                let wanted =
                    self.args.looks.also_best_on_test.filter(|_| !run.is_trial && is_finished);
                if wanted.is_some() && record.best_on_test.is_none() {
                    differences.push("best_on_test: there is none".to_owned());
                }
                if differences.is_empty() {
                    let is_done = is_finished && adapter(&run.out).exists();
                    return Ok(is_done.then_some(record));
                }
                differences
            }
            Err(error) => vec![failure::chain_of(error)],
        };
        if self.args.set_aside {
            set_aside(&run.out)?;
            return Ok(None);
        }
        bail!(
            "{} holds a run with other settings and is left as it is ({}); use --set-aside to move it, or another --out",
            run.out.display(),
            differences.join("; ")
        )
    }

    /// Runs a process and waits for it. The process ends early when its standard input is closed:
    /// on Ctrl-C, or because this process ends.
    fn wait(&self, command: &mut Command) -> Result<ExitStatus> {
        let mut process = command.stdin(Stdio::piped()).spawn()?;
        let mut held = process.stdin.take();
        loop {
            if let Some(status) = process.try_wait()? {
                return Ok(status);
            }
            if self.stop.is_asked() {
                drop(held.take());
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Starts this program on the run and waits for it. Returns the record, or `None` after Ctrl-C.
    fn spawn(&self, run: &SweepRun) -> Result<Option<RunRecord>, Failure> {
        let (status, log) = self.run_process(run)?;
        match status.code() {
            Some(0) => {
                let record = RunRecord::load(run.out.join("run.json"));
                Ok(Some(record.map_err(anyhow::Error::from)?))
            }
            Some(130) => Ok(None),
            None if self.stop.is_asked() => Ok(None),
            code => {
                let text = fs::read_to_string(&log).unwrap_or_default();
                let said = text.lines().rev().find(|line| !line.trim().is_empty());
                let said = said.unwrap_or_default().trim_start_matches("error: ");
                let reason = format!("{status}: {said} ({})", log.display());
                let diverged = code == Some(failure::NOT_FINITE.into());
                if diverged {
                    let planned = self.planned(run)?;
                    Diverged { run: planned, reason: reason.clone() }.save(&run.out)?;
                }
                Err(Failure { reason, diverged })
            }
        }
    }

    /// Runs the process of a run. Returns its exit status and the file of its output.
    fn run_process(&self, run: &SweepRun) -> Result<(ExitStatus, PathBuf)> {
        let PlannedRun { model, train, .. } = self.planned(run)?;
        fs::create_dir_all(&run.out).with_context(|| run.out.display().to_string())?;
        let log = run.out.join("run.log");
        let output = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("finetune").arg("--data").arg(self.data).args([
            "--task",
            run.task.name(),
            "--backbone",
        ]);
        command.arg(self.file).arg("--spec").arg(serde_json::to_string(&RunSpec { model, train })?);
        command.args(["--select", if run.is_trial { "trial" } else { "last" }]);
        command.args(["--threads", &self.threads.to_string()]).args(self.args.backbone.repeated());
        let (survey, orientation) = (self.args.survey, self.args.orientation);
        for (flag, is_given) in [
            ("--skip-unreadable", survey.skip_unreadable),
            ("--verify-images", survey.verify_images && survey.skip_unreadable),
            ("--ignore-exif", orientation.ignore_exif),
        ] {
            command.args(is_given.then_some(flag));
        }
        if let Some(every) = self.args.looks.also_best_on_test.filter(|_| !run.is_trial) {
            command.args(["--also-best-on-test", &every.to_string()]);
        }
        if let Some(head) = &run.head {
            command.arg("--head").arg(head);
        }
        command.arg("--out").arg(&run.out);
        let status = self.wait(command.stdout(output.try_clone()?).stderr(output))?;
        Ok((status, log))
    }
}

/// Renames a folder to `.NAME.before-N` with the first free N. Reports skip hidden folders.
fn set_aside(folder: &Path) -> Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = (1..).map(|n| folder.with_file_name(format!(".{name}.before-{n}")));
    let free = aside.into_iter().find(|path| !path.exists()).context("a free name")?;
    fs::rename(folder, &free).with_context(|| folder.display().to_string())?;
    println!("{} is now {}", folder.display(), free.display());
    Ok(())
}
