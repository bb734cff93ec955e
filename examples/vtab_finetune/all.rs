//! A plan's runs: trials, what is selected by them, and the runs on the 1,000.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{available_parallelism, sleep};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use convpass::bundled::{self, BundledTask};
use convpass::vtab::{VtabFolder, VtabSplit};
use convpass::{
    Backbone, Plan, PlanMethod, PlannedRun, RunRecord, SeedRun, Setting, TaskTable, Trial,
    best_trial,
};

use super::backbone::{Opened, Processor, Visit};
use super::demo::BUNDLED;
use super::results::{Results, Selected};
use super::side_by_side::side_by_side;
use super::{Args, Spec, file_digest};

/// A larger file is of a model that keeps every core busy by itself.
const SMALL_BACKBONE: u64 = 16 << 20;

/// Runs what is left of the plan, and prints and writes the table of what is there.
pub fn run(args: &Args, mut plan: Plan, stop: &Arc<AtomicBool>) -> Result<()> {
    let file = args.backbone.clone().or(plan.backbone.take()).unwrap_or(BUNDLED.into());
    let data = args.data.clone().or(plan.data.take()).unwrap_or("data".into());
    let out = args.out.clone().unwrap_or_else(|| args.all.out());
    let normalization = args.normalization.or(plan.train.normalization);
    let (facts, by_family) = args.source(&file).open(ReadFacts)?;
    plan.train.normalization = normalization.or(Some(by_family));
    let cores = available_parallelism().map_or(1, usize::from);
    let is_small = fs::metadata(&file).is_ok_and(|file| file.len() < SMALL_BACKBONE);
    let jobs = match args.all.jobs {
        Some(jobs) => jobs.get(),
        None if is_small && args.device == Processor::Cpu => cores,
        None => 1,
    };
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;

    let (tasks, missing) = open_tasks(&plan, &data, facts.image_size);
    let mut board = Board {
        threads: args.threads.map_or((cores / jobs).max(1), usize::from),
        results: Results { missing, ..Results::default() },
        args,
        plan: &plan,
        file: &file,
        data: &data,
        out: &out,
        facts,
        tasks,
        jobs,
        stop,
    };
    println!("{}: the progress of each run is in its run.log", out.display());
    board.run()?;
    let results = board.results;
    println!("\n{}", results.table);
    results.write(&out)?;
    let names = ["results.csv", "results.json"].map(|name| out.join(name).display().to_string());
    println!("{}", names.join(", "));
    results.check(stop.load(Ordering::SeqCst))
}

/// The task folders that are there, and what is said of the others. Bundled tasks are written.
fn open_tasks(
    plan: &Plan,
    data: &Path,
    image_size: (i64, i64),
) -> (Vec<VtabFolder>, Vec<(String, String)>) {
    let (mut tasks, mut missing) = (Vec::new(), Vec::new());
    for name in &plan.tasks {
        let written = match name.parse::<BundledTask>() {
            Ok(task) if !data.join(name).exists() => {
                bundled::write(data, task, image_size.0, 0).map(drop)
            }
            _ => Ok(()),
        };
        match written.and_then(|()| VtabFolder::open(data, name)) {
            Ok(folder) => tasks.push(folder),
            Err(error) => {
                eprintln!("{name} is left out: {error}");
                missing.push((name.clone(), error.to_string()));
            }
        }
    }
    (tasks, missing)
}

/// What the runs have to know of the backbone.
struct Facts {
    digest: String,
    image_size: (i64, i64),
}

struct ReadFacts;

impl Visit for ReadFacts {
    type Output = (Facts, convpass::Normalization);

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<Self::Output> {
        let digest = opened.backbone.digest()?;
        Ok((Facts { digest, image_size: opened.image_size }, opened.normalization))
    }
}

/// Everything that the runs share, and what has come of them.
struct Board<'a> {
    args: &'a Args,
    plan: &'a Plan,
    file: &'a Path,
    data: &'a Path,
    out: &'a Path,
    facts: Facts,
    tasks: Vec<VtabFolder>,
    jobs: usize,
    threads: usize,
    stop: &'a Arc<AtomicBool>,
    results: Results,
}

/// One run of the plan.
struct Run<'a> {
    task: &'a VtabFolder,
    method: &'a PlanMethod,
    setting: Setting,
    seed: i64,
    is_trial: bool,
    out: PathBuf,
    /// The adapter whose head it starts from.
    head: Option<PathBuf>,
}

impl Run<'_> {
    fn label(&self) -> String {
        let what = match self.is_trial {
            true => format!("trial {}", self.setting),
            false => format!("seed {} ({})", self.seed, self.setting),
        };
        format!("{} {}, {what}", self.task.name(), self.method.label)
    }

    /// The figure of a finished run: on the 200 for a trial, else on the test images.
    fn figure(&self, record: &RunRecord) -> Option<f64> {
        match self.is_trial {
            _ if record.fit.stopped => None,
            true => record.fit.epochs.last()?.val_top1,
            false => record.test_top1,
        }
    }
}

/// A run's record, or why there is none.
type Outcome = Result<RunRecord, String>;

impl Board<'_> {
    /// Methods that start from another's head come after it, and trials before what they select.
    fn run(&mut self) -> Result<()> {
        let seeds = self.plan.seeds.clone();
        self.results.table = TaskTable {
            tasks: self.plan.tasks.clone(),
            methods: self.plan.methods.iter().map(|method| method.label.clone()).collect(),
            seeds,
            runs: Vec::new(),
        };
        for takes_head in [false, true] {
            let methods: Vec<_> =
                self.plan.methods.iter().filter(|m| m.head.is_some() == takes_head).collect();
            let tasks = self.tasks.clone();
            let pairs: Vec<_> =
                tasks.iter().flat_map(|task| methods.iter().map(move |m| (task, *m))).collect();
            self.select(&pairs)?;
            self.finish(&pairs)?;
        }
        Ok(())
    }

    /// Runs the trials of each pair, and selects by them.
    fn select(&mut self, pairs: &[(&VtabFolder, &PlanMethod)]) -> Result<()> {
        let trial = |task, method, setting: &Setting| Run {
            task,
            method,
            setting: setting.clone(),
            seed: self.plan.seeds[0],
            is_trial: true,
            out: self.trial_folder(task, method, setting),
            head: self.trial_head(task, method),
        };
        let with_trials = |(_, method): &&(_, &PlanMethod)| self.plan.has_trials(method);
        let runs: Vec<_> = pairs
            .iter()
            .filter(with_trials)
            .flat_map(|&(task, method)| {
                method.settings().into_iter().map(move |setting| (task, method, setting))
            })
            .map(|(task, method, setting)| trial(task, method, &setting))
            .collect();
        let done = self.execute(&runs)?;
        for &(task, method) in pairs {
            let settings = method.settings();
            let trials: Vec<Trial> = done
                .iter()
                .filter(|(run, _)| run.task.name() == task.name() && run.method == method)
                .filter_map(|(run, record)| {
                    Some(Trial { setting: run.setting.clone(), val_top1: run.figure(record)? })
                })
                .collect();
            let setting = match self.plan.has_trials(method) {
                // Of fewer trials than planned nothing is selected: the budget is the same for all.
                true if trials.len() < settings.len() => {
                    let (done, all) = (trials.len(), settings.len());
                    let label = format!("{} {}", task.name(), method.label);
                    let reason = format!("nothing selected: {done} of {all} trials are there");
                    self.results.failed.push((label, reason));
                    continue;
                }
                true => best_trial(&trials).map(|trial| trial.setting.clone()),
                false => settings.into_iter().next(),
            };
            let Some(setting) = setting else { continue };
            let (task, method) = (task.name().to_owned(), method.label.clone());
            self.results.selected.push(Selected { task, method, setting, trials });
        }
        Ok(())
    }

    /// Runs each pair from each seed on the 1,000, with what was selected.
    fn finish(&mut self, pairs: &[(&VtabFolder, &PlanMethod)]) -> Result<()> {
        let mut runs = Vec::new();
        for &(task, method) in pairs {
            let Some(selected) = self.results.selected(task.name(), &method.label) else {
                continue;
            };
            for &seed in &self.plan.seeds {
                let head = method.head.as_ref().and_then(|label| self.method(label));
                runs.push(Run {
                    task,
                    method,
                    setting: selected.setting.clone(),
                    seed,
                    is_trial: false,
                    out: self.folder(task, method, seed),
                    head: head.map(|head| adapter(&self.folder(task, head, seed))),
                });
            }
        }
        for (run, record) in self.execute(&runs)? {
            let Some(top1) = run.figure(&record) else { continue };
            let wanted = self.args.also_best_on_test.is_some();
            self.results.table.runs.push(SeedRun {
                task: run.task.name().to_owned(),
                method: run.method.label.clone(),
                seed: run.seed,
                top1,
                best_on_test: record.best_on_test.filter(|_| wanted).map(|best| best.top1),
                params: record.trainable_params,
                seconds: record.fit.seconds + record.test_seconds.unwrap_or_default(),
            });
        }
        Ok(())
    }

    fn method(&self, label: &str) -> Option<&PlanMethod> {
        self.plan.methods.iter().find(|method| method.label == label)
    }

    /// Of a run on the 1,000.
    fn folder(&self, task: &VtabFolder, method: &PlanMethod, seed: i64) -> PathBuf {
        self.out.join(task.name()).join(method.folder()).join(format!("seed-{seed}"))
    }

    fn trial_folder(&self, task: &VtabFolder, method: &PlanMethod, setting: &Setting) -> PathBuf {
        let trials = self.out.join(task.name()).join(method.folder()).join("trials");
        trials.join(setting.folder())
    }

    /// The adapter of the selected trial of the method that heads come from, which saw the 800 alone: one that saw the
    /// 200 too would make them known to this trial.
    fn trial_head(&self, task: &VtabFolder, method: &PlanMethod) -> Option<PathBuf> {
        let head = self.method(method.head.as_ref()?)?;
        let setting = match self.results.selected(task.name(), &head.label) {
            Some(selected) => selected.setting.clone(),
            // Its run fails for want of the file, and says so.
            None => Setting::default(),
        };
        Some(adapter(&self.trial_folder(task, head, &setting)))
    }

    /// Runs what is not done yet; what came of those that succeeded.
    fn execute<'r>(&mut self, runs: &'r [Run<'r>]) -> Result<Vec<(&'r Run<'r>, RunRecord)>> {
        let count = AtomicUsize::new(0);
        let outcomes = side_by_side(self.jobs, runs, self.stop, |run| {
            let (outcome, is_new) = match self.done_before(run) {
                Ok(Some(record)) => (Ok(record), false),
                Ok(None) => match self.spawn(run) {
                    Ok(None) => return Ok(None),
                    Ok(Some(record)) => (Ok(record), true),
                    Err(error) => (Err(format!("{error:#}")), true),
                },
                Err(error) => (Err(format!("{error:#}")), true),
            };
            let number = 1 + count.fetch_add(1, Ordering::SeqCst);
            self.say(run, &outcome, is_new, format!("[{number}/{}]", runs.len()));
            Ok(Some(outcome))
        })?;
        let mut done = Vec::new();
        for (index, outcome) in outcomes {
            match outcome {
                Ok(record) => done.push((&runs[index], record)),
                Err(reason) => self.results.failed.push((runs[index].label(), reason)),
            }
        }
        Ok(done)
    }

    fn say(&self, run: &Run, outcome: &Outcome, is_new: bool, number: String) {
        match outcome {
            Ok(record) => {
                let figure = run.figure(record).unwrap_or(f64::NAN);
                let on = if run.is_trial { "val" } else { "top-1" };
                let when = match is_new {
                    true => format!("{:.1} s", record.fit.seconds),
                    false => "done before".to_owned(),
                };
                println!("{number} {}: {on} {figure:.2} %, {when}", run.label());
            }
            Err(reason) => eprintln!("{number} {}: {reason}", run.label()),
        }
    }

    /// What the run's record has to say.
    fn planned(&self, run: &Run) -> Result<PlannedRun> {
        let (task, classes) = (run.task.name(), run.task.num_classes());
        let (model, mut train) =
            self.plan.run(run.method, &run.setting, task, classes, run.seed)?;
        train.validate_every = match self.args.also_best_on_test {
            Some(every) if !run.is_trial => every.get(),
            _ => train.epochs.max(1),
        };
        let hash = |split| run.task.split(split).split_hash();
        let (train_split, val_split, test_split) = match run.is_trial {
            true => (VtabSplit::Train800, Some(VtabSplit::Val200), None),
            false => (VtabSplit::Train800Val200, None, Some(VtabSplit::Test)),
        };
        let head_digest = match &run.head {
            Some(file) => Some(file_digest(file).context("the run that its head is of")?),
            None => None,
        };
        Ok(PlannedRun {
            task: task.to_owned(),
            model,
            train,
            backbone_digest: self.facts.digest.clone(),
            image_size: self.facts.image_size,
            train_split: hash(train_split),
            val_split: val_split.map(hash),
            test_split: test_split.map(hash),
            head_digest,
        })
    }

    /// The record in the run's folder, if it is of this run and finished. What was begun is begun again; what is of
    /// another run is the user's, and is neither taken for this one nor written over.
    fn done_before(&self, run: &Run) -> Result<Option<RunRecord>> {
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
                let wanted = self.args.also_best_on_test.filter(|_| !run.is_trial && is_finished);
                if wanted.is_some() && record.best_on_test.is_none() {
                    differences.push("best_on_test: there is none".to_owned());
                }
                if differences.is_empty() {
                    let is_done = is_finished && adapter(&run.out).exists();
                    return Ok(is_done.then_some(record));
                }
                differences
            }
            Err(error) => vec![error.to_string()],
        };
        if self.args.all.set_aside {
            set_aside(&run.out)?;
            return Ok(None);
        }
        bail!(
            "{} is of another run and left as it is ({}); --set-aside moves it out of the way, --out goes elsewhere",
            run.out.display(),
            differences.join("; ")
        )
    }

    /// Waits for a process, which ends early when its standard input is closed: by this one on Ctrl-C, or with it.
    fn wait(&self, command: &mut Command) -> Result<ExitStatus> {
        let mut process = command.stdin(Stdio::piped()).spawn()?;
        let mut held = process.stdin.take();
        loop {
            if let Some(status) = process.try_wait()? {
                return Ok(status);
            }
            if self.stop.load(Ordering::SeqCst) {
                drop(held.take());
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// This program on the run; `None` after Ctrl-C.
    fn spawn(&self, run: &Run) -> Result<Option<RunRecord>> {
        let PlannedRun { model, train, .. } = self.planned(run)?;
        fs::create_dir_all(&run.out).with_context(|| run.out.display().to_string())?;
        let log = run.out.join("run.log");
        let output = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--data").arg(self.data).args(["--task", run.task.name(), "--backbone"]);
        command.arg(self.file).arg("--spec").arg(serde_json::to_string(&Spec { model, train })?);
        command.args(["--select", if run.is_trial { "trial" } else { "last" }]);
        let device = match self.args.device {
            Processor::Cpu => "cpu",
            Processor::Cuda => "cuda",
        };
        command.args(["--device", device, "--threads", &self.threads.to_string()]);
        command.args(["--precision", &self.args.precision.to_string()]);
        let numbers = [("--heads", self.args.heads), ("--image-size", self.args.image_size)];
        for (flag, number) in numbers.into_iter().filter_map(|(flag, n)| Some((flag, n?))) {
            command.args([flag, &number.to_string()]);
        }
        if let Some(every) = self.args.also_best_on_test.filter(|_| !run.is_trial) {
            command.args(["--also-best-on-test", &every.to_string()]);
        }
        if let Some(head) = &run.head {
            command.arg("--head").arg(head);
        }
        command.arg("--out").arg(&run.out);
        let status = self.wait(command.stdout(output.try_clone()?).stderr(output))?;
        match status.code() {
            Some(0) => Ok(Some(RunRecord::load(run.out.join("run.json"))?)),
            Some(130) => Ok(None),
            None if self.stop.load(Ordering::SeqCst) => Ok(None),
            _ => {
                let text = fs::read_to_string(&log).unwrap_or_default();
                let said = text.lines().rev().find(|line| !line.trim().is_empty());
                let said = said.unwrap_or_default().trim_start_matches("error: ");
                Err(anyhow!("{status}: {said} ({})", log.display()))
            }
        }
    }
}

fn adapter(folder: &Path) -> PathBuf {
    folder.join("adapter.safetensors")
}

/// Renames a folder to the first free name behind it.
fn set_aside(folder: &Path) -> Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = (1..).map(|n| folder.with_file_name(format!("{name}.before-{n}")));
    let free = aside.into_iter().find(|path| !path.exists()).context("a free name")?;
    fs::rename(folder, &free).with_context(|| folder.display().to_string())?;
    println!("{} is now {}", folder.display(), free.display());
    Ok(())
}
