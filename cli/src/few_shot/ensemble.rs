//! `--select ensemble`: a model for each pair of rates of the grid, whose classes are voted on.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use convpass::eval::{predictions, vote};
use serde::{Deserialize, Serialize};

use super::draw::Draw;
use super::job::{DrawResult, FewShotJob, known_top1};
use super::measured::{Measured, MeasuredSet};
use super::rates::Rates;
use super::training::{SharedImages, Training, Trial};
use super::votes::Votes;
use crate::failure::{AllDiverged, answered};
use crate::files::{read_json, write_atomically};
use crate::run_folder::RECORD;

/// The folder of the members in that of a run.
pub const FOLDER: &str = "members";
/// The name of the record of an ensemble in the folder of a run.
pub const ENSEMBLE: &str = "ensemble.json";

/// The record of an ensemble: what its members are, and its result.
#[derive(Serialize, Deserialize)]
struct EnsembleRecord {
    version: String,
    task: String,
    /// How the learning rates were chosen.
    select: String,
    shots: usize,
    seed: i64,
    train_split: String,
    test_split: String,
    members: Vec<Member>,
    /// Top-1 of the vote on the test images in percent.
    test_top1: f64,
}

/// A model of an ensemble.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Member {
    /// The folder in that of the members.
    folder: String,
    lr: f64,
    head_lr: f64,
    /// SHA-256 of the adapter file; `None` if the member diverged and is left out.
    adapter_digest: Option<String>,
    /// Why the member is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    diverged: Option<String>,
}

impl FewShotJob<'_> {
    /// Trains the members of a draw and measures their vote, unless that was done before.
    pub fn ensemble(&self, draw: &Draw) -> Result<DrawResult> {
        let out = draw.out.as_path();
        if out.join(RECORD).exists() {
            return Err(holds(out, "one model"));
        }
        let earlier = EnsembleRecord::read(out)?;
        let grid = self.args.rates().grid(&self.method);
        if earlier.as_ref().is_some_and(|earlier| !earlier.is_of(&grid)) {
            return Err(holds(out, "an ensemble of other learning rates"));
        }
        let members = self.members(draw)?;
        let is_done = earlier.is_some();
        let mut known = match earlier {
            Some(earlier) if earlier.members != members => {
                return Err(holds(out, "an ensemble of other members"));
            }
            Some(_) => Measured::load(out)?,
            None => self.tested_vote(draw, &members)?,
        };
        let test_top1 = known_top1(&known, &self.test, out)?;
        let when = if is_done { ", done before" } else { "" };
        println!("{}: top-1 of the vote {test_top1:.2} %{when}", out.display());
        let mut targets = Vec::new();
        for target in &self.targets {
            let top1 = match known.top1(target) {
                Some(top1) => top1,
                None => self.voted(out, &members, target, &mut known)?,
            };
            println!("{}: {} {top1:.2} %", out.display(), target.name);
            targets.push(top1);
        }
        Ok(draw.result(test_top1, targets))
    }

    /// Measures the vote of the members on the test images, and writes the record.
    fn tested_vote(&self, draw: &Draw, members: &[Member]) -> Result<Measured> {
        let out = draw.out.as_path();
        clear(out)?;
        let mut known = Measured::none(out);
        let test_top1 = self.voted(out, members, &self.test, &mut known)?;
        let record = EnsembleRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: format!("{}, {} a class", self.args.data_name(), draw.shots),
            select: "ensemble".to_owned(),
            shots: draw.shots,
            seed: draw.seed,
            train_split: draw.list.split_hash(),
            test_split: self.test.images.split_hash().to_owned(),
            members: members.to_vec(),
            test_top1,
        };
        let mut text = serde_json::to_vec_pretty(&record)?;
        text.push(b'\n');
        write_atomically(&out.join(ENSEMBLE), &text)?;
        Ok(known)
    }

    /// Trains each member on all images of the draw, unless that was done before.
    ///
    /// # Errors
    /// [`AllDiverged`] if no member is left.
    pub(super) fn members(&self, draw: &Draw) -> Result<Vec<Member>> {
        let mut images = SharedImages::new(&draw.list, None);
        let member = |rates: Rates| {
            let training = Training {
                draw,
                rates,
                train: &draw.list,
                held_out: None,
                is_tested: false,
                cross_validation: None,
                out: draw.out.join(FOLDER).join(rates.folder()),
            };
            let (adapter_digest, diverged) = match self.trial(&training, &mut images)? {
                Trial::Trained(record) => (record.adapter_digest, None),
                Trial::Diverged(reason) => (None, Some(reason)),
            };
            if let Some(reason) = &diverged {
                let out = draw.out.display();
                eprintln!("warning: {out}: the member {rates} is left out: {reason}");
            }
            let Rates { lr, head_lr } = rates;
            Ok(Member { folder: rates.folder(), lr, head_lr, adapter_digest, diverged })
        };
        let grid = self.args.rates().grid(&self.method);
        let members = grid.into_iter().map(member).collect::<Result<Vec<_>>>()?;
        if members.iter().all(|member| member.diverged.is_some()) {
            let reason = members.iter().find_map(|member| member.diverged.clone());
            let (folder, reason) = (draw.out.clone(), reason.unwrap_or_default());
            return Err(AllDiverged { folder, count: members.len(), reason }.into());
        }
        Ok(members)
    }

    /// Returns top-1 in percent of the vote of the members on a set. Writes what each member
    /// predicts and what is answered.
    fn voted(
        &self,
        out: &Path,
        members: &[Member],
        set: &MeasuredSet,
        known: &mut Measured,
    ) -> Result<f64> {
        let voting = members.iter().filter(|member| member.diverged.is_none());
        let voting: Vec<&str> = voting.map(|member| member.folder.as_str()).collect();
        let mut classes = Vec::new();
        for folder in &voting {
            let model = self.adapted(&out.join(FOLDER).join(folder))?;
            let mut own = Vec::new();
            self.pass(&model, set, &mut |logits| {
                own.extend(predictions(logits)?);
                Ok(())
            })?;
            // In the classes of the model, in whose order ties are broken.
            let class = |label: Option<i64>| label.map(|label| set.class(label));
            classes.push(own.into_iter().map(class).collect::<Vec<_>>());
        }
        let answers = vote(&classes)?;
        answered(&answers, &set.name)?;
        let labels: Vec<i64> = set.images.labels().iter().map(|&label| set.class(label)).collect();
        let correct = labels.iter().zip(&answers).filter(|(label, a)| Some(**label) == **a).count();
        let top1 = 100.0 * correct as f64 / labels.len() as f64;
        let votes =
            Votes { members: &voting, labels: &labels, answers: &answers, classes: &classes };
        votes.write(out, set)?;
        known.add(set, top1)?;
        Ok(top1)
    }
}

impl EnsembleRecord {
    /// Reads the record in the folder of a run, if there is one.
    fn read(out: &Path) -> Result<Option<Self>> {
        let file = out.join(ENSEMBLE);
        Ok(file.exists().then(|| read_json(&file)).transpose()?)
    }

    /// Returns whether the members have exactly these rates.
    fn is_of(&self, grid: &[Rates]) -> bool {
        let rates = self.members.iter().map(|&Member { lr, head_lr, .. }| Rates { lr, head_lr });
        rates.eq(grid.iter().copied())
    }
}

/// Removes the record and the results of an ensemble from the folder of a run, but not its members.
pub fn clear(out: &Path) -> Result<()> {
    for name in [ENSEMBLE, Measured::FILE, Votes::FILE] {
        let file = out.join(name);
        if file.exists() {
            std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

/// Returns an error if the folder of a run holds an ensemble.
pub fn refuse(out: &Path) -> Result<()> {
    if out.join(ENSEMBLE).exists() { Err(holds(out, "an ensemble")) } else { Ok(()) }
}

/// Returns the error for a folder that holds another run.
pub fn holds(out: &Path, what: &str) -> anyhow::Error {
    anyhow!(
        "{} holds another run ({what}), which is left as it is; use --force to replace it, or \
         choose another --out",
        out.display()
    )
}
