//! `convpass sweep`: runs the trials of a plan, selects a setting by them, and runs it on the 1,000
//! images.

mod args;
mod claim;
mod execute;
mod results;
mod side_by_side;
mod status;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::Result;
use convpass::Backbone;
use convpass::data::bundled::{self, BundledTask};
use convpass::data::vtab::VtabFolder;
use convpass::train::RunRecord;
use sha2::{Digest, Sha256};

pub use args::SweepArgs;
use results::{Selected, SweepResults};
use status::Status;

use crate::Outcome;
use crate::failure::chain;
use crate::flags::{Processor, bundled_backbone};
use crate::plan::{PlanMethod, Setting, SweepPlan, Trial, best_trial};
use crate::report::{SeedRun, TaskTable};
use crate::run_folder::FolderLock;
use crate::stop::Stop;
use crate::survey;

/// The file size in bytes below which a backbone is small. A single run of a larger one keeps every
/// core busy.
const SMALL_BACKBONE: u64 = 16 << 20;

/// Names of tasks or runs, each with a reason.
type Named = Vec<(String, String)>;

/// Runs all runs of the plan that are not finished, and prints and writes the table of the results.
pub fn run(args: &SweepArgs) -> Result<Outcome> {
    let mut plan = args.plan()?;
    let stop = &Stop::on_ctrl_c("ending after this step; the same command continues from there")?;
    let data = args.data.data.clone().or(plan.data.take()).unwrap_or("data".into());
    let file = match args.backbone.backbone.clone().or(plan.backbone.take()) {
        Some(file) => file,
        None => {
            let _writing = if args.status { None } else { Some(FolderLock::wait(&data)?) };
            bundled_backbone(&data)?
        }
    };
    let out = args.out();
    let opened = args.backbone.open(&file)?;
    let normalization = args.input.images.normalization.or(plan.train.normalization);
    plan.train.normalization = Some(opened.normalization(normalization));
    let facts = Facts { digest: opened.backbone.digest()?, image_size: opened.image_size() };
    drop(opened);
    let cores = available_parallelism().map_or(1, usize::from);
    let is_small = fs::metadata(&file).is_ok_and(|file| file.len() < SMALL_BACKBONE);
    let jobs = match args.jobs {
        Some(jobs) => jobs.get(),
        None if is_small && args.backbone.device == Processor::Cpu => cores,
        None => 1,
    };
    let settings = (&plan, &facts.digest, args.backbone.precision().to_string(), facts.image_size);
    let digest = format!("{:x}", Sha256::digest(serde_json::to_vec(&settings)?));
    let _lock = if args.status { None } else { Some(claim::share(&out, &digest, args.set_aside)?) };
    let (mut tasks, missing) = open_tasks(&plan, &data, facts.image_size, args.status);
    // The records of runs without unreadable images are of shorter lists.
    if !args.status || args.survey.skip_unreadable {
        (tasks, _) = survey::readable_tasks(tasks, args.survey, args.threads)?;
    }
    let mut board = Board {
        threads: args.threads.threads.map_or((cores / jobs).max(1), usize::from),
        results: SweepResults { missing, ..SweepResults::default() },
        args,
        plan: &plan,
        file: &file,
        data: &data,
        out: &out,
        facts,
        tasks,
        jobs,
        stop,
        diverged: HashSet::new(),
        status: Status::default(),
    };
    if args.status {
        board.run()?;
        println!("{}", board.status);
        return Ok(Outcome::Done);
    }
    println!("{}: the progress of each run is in its run.log", out.display());
    board.run()?;
    let results = board.results;
    println!("\n{}", results.table);
    results.write(&out)?;
    let names = ["results.csv", "results.json"].map(|name| out.join(name).display().to_string());
    println!("{}", names.join(", "));
    results.check(stop.is_asked())?;
    Ok(Outcome::unless_stopped(stop))
}

/// Opens the folders of the tasks, and writes those of bundled tasks unless `only_read` is set.
/// Returns the tasks, and the name and the error of each task that cannot be opened.
fn open_tasks(
    plan: &SweepPlan,
    data: &Path,
    image_size: (i64, i64),
    only_read: bool,
) -> (Vec<VtabFolder>, Named) {
    let (mut tasks, mut missing) = (Vec::new(), Vec::new());
    for name in &plan.tasks {
        let written = match name.parse::<BundledTask>() {
            Ok(task) if !only_read => write_bundled(data, task, image_size.0),
            _ => Ok(()),
        };
        match written.and_then(|()| Ok(VtabFolder::open(data, name)?)) {
            Ok(folder) => tasks.push(folder),
            Err(error) => {
                let reason = chain(&error);
                eprintln!("{name} is left out: {reason}");
                missing.push((name.clone(), reason));
            }
        }
    }
    (tasks, missing)
}

/// Writes a bundled task into the folder of the data, unless it is there.
fn write_bundled(data: &Path, task: BundledTask, side: i64) -> Result<()> {
    let folder = data.join(task.name());
    // Another process may be writing it just now. Nobody writes to a folder that cannot be locked.
    let _writing = match FolderLock::wait(data) {
        Err(_) if folder.exists() => return Ok(()),
        lock => lock?,
    };
    if !folder.exists() {
        bundled::write(data, task, side, 0)?;
    }
    Ok(())
}

/// The facts of the backbone that the runs need.
struct Facts {
    digest: String,
    image_size: (i64, i64),
}

/// Everything that the runs share, and their results so far.
struct Board<'a> {
    args: &'a SweepArgs,
    plan: &'a SweepPlan,
    file: &'a Path,
    data: &'a Path,
    out: &'a Path,
    facts: Facts,
    tasks: Vec<VtabFolder>,
    jobs: usize,
    threads: usize,
    stop: &'a Stop,
    /// The folders of runs whose numbers became NaN or infinite.
    diverged: HashSet<PathBuf>,
    results: SweepResults,
    /// With `--status`, the state of the runs.
    status: Status,
}

/// One run of the plan.
struct SweepRun<'a> {
    task: &'a VtabFolder,
    method: &'a PlanMethod,
    setting: Setting,
    seed: i64,
    is_trial: bool,
    out: PathBuf,
    /// The adapter whose head the run starts from.
    head: Option<PathBuf>,
}

impl SweepRun<'_> {
    fn label(&self) -> String {
        let what = if self.is_trial {
            format!("trial {}", self.setting)
        } else {
            format!("seed {} ({})", self.seed, self.setting)
        };
        format!("{} {}, {what}", self.task.name(), self.method.label)
    }

    /// Returns top-1 in percent: on the 200 validation images for a trial, else on the test images.
    /// `None` if the run is not finished.
    fn figure(&self, record: &RunRecord) -> Option<f64> {
        if record.fit.stopped {
            None
        } else if self.is_trial {
            record.fit.epochs.last()?.val_top1
        } else {
            record.test_top1
        }
    }
}

impl Board<'_> {
    /// Runs the plan. A method that starts from the head of another method runs after it. The
    /// trials of a method run before its runs on the 1,000 images.
    fn run(&mut self) -> Result<()> {
        let seeds = self.plan.seeds.clone();
        self.results.table = TaskTable {
            tasks: self.plan.tasks.clone(),
            methods: self.plan.methods.iter().map(|method| method.label.clone()).collect(),
            seeds,
            runs: Vec::new(),
        };
        let settings = |method: &PlanMethod| {
            if self.plan.has_trials(method) { method.settings().len() } else { 0 }
        };
        let of_task: usize =
            self.plan.methods.iter().map(|m| settings(m) + self.plan.seeds.len()).sum();
        self.status.planned = of_task * self.tasks.len();
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

    /// Runs the trials of each pair, and selects the best setting.
    fn select(&mut self, pairs: &[(&VtabFolder, &PlanMethod)]) -> Result<()> {
        let trial = |task, method, setting: &Setting| SweepRun {
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
            let has_trials = self.plan.has_trials(method);
            // If a trial is missing, nothing is selected, because every method has the same budget. A
            // trial that diverged was tried.
            let of_pair = |run: &&SweepRun| run.task.name() == task.name() && run.method == method;
            let diverged = runs.iter().filter(of_pair);
            let diverged = diverged.filter(|run| self.diverged.contains(&run.out)).count();
            if has_trials && trials.len() + diverged < settings.len() {
                let (done, all) = (trials.len(), settings.len());
                let label = format!("{} {}", task.name(), method.label);
                let reason = format!("nothing selected: {done} of {all} trials are there");
                self.results.failed.push((label, reason));
                continue;
            }
            let setting = if has_trials {
                best_trial(&trials).map(|trial| trial.setting.clone())
            } else {
                settings.into_iter().next()
            };
            let Some(setting) = setting else { continue };
            let (task, method) = (task.name().to_owned(), method.label.clone());
            self.results.selected.push(Selected { task, method, setting, trials });
        }
        Ok(())
    }

    /// Runs each pair with the selected setting on the 1,000 images, once for each seed.
    fn finish(&mut self, pairs: &[(&VtabFolder, &PlanMethod)]) -> Result<()> {
        let mut runs = Vec::new();
        for &(task, method) in pairs {
            let Some(selected) = self.results.selected(task.name(), &method.label) else {
                continue;
            };
            for &seed in &self.plan.seeds {
                let head = method.head.as_ref().and_then(|label| self.method(label));
                runs.push(SweepRun {
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
            let wanted = self.args.looks.also_best_on_test.is_some();
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

    /// Returns the folder of a run on the 1,000 images.
    fn folder(&self, task: &VtabFolder, method: &PlanMethod, seed: i64) -> PathBuf {
        self.out.join(task.name()).join(method.folder()).join(format!("seed-{seed}"))
    }

    fn trial_folder(&self, task: &VtabFolder, method: &PlanMethod, setting: &Setting) -> PathBuf {
        let trials = self.out.join(task.name()).join(method.folder()).join("trials");
        trials.join(setting.folder())
    }

    /// Returns the adapter whose head a trial starts from: that of the selected trial of the head's
    /// method. That trial saw only the 800 images. An adapter that also saw the 200 would leak them
    /// into this trial.
    fn trial_head(&self, task: &VtabFolder, method: &PlanMethod) -> Option<PathBuf> {
        let head = self.method(method.head.as_ref()?)?;
        let setting = match self.results.selected(task.name(), &head.label) {
            Some(selected) => selected.setting.clone(),
            // Then the file does not exist, and the error of the run names it.
            None => Setting::default(),
        };
        Some(adapter(&self.trial_folder(task, head, &setting)))
    }
}

fn adapter(folder: &Path) -> PathBuf {
    folder.join("adapter.safetensors")
}
