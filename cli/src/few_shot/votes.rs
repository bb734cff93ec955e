//! The votes of an ensemble, as a table for a person or another program.

use std::path::Path;

use anyhow::{Context, Result};

use super::measured::MeasuredSet;
use crate::files::write_atomically;

/// What the members of an ensemble predict on a set, as classes of the model.
pub struct Votes<'a> {
    /// The folders of the members.
    pub members: &'a [&'a str],
    pub labels: &'a [i64],
    pub answers: &'a [Option<i64>],
    /// For each member the class of each image; `None` if its logits are not finite.
    pub classes: &'a [Vec<Option<i64>>],
}

impl Votes<'_> {
    /// The name of the table in the folder of a run.
    pub const FILE: &'static str = "votes.csv";

    /// Writes the votes on a set. The rows of other sets in the table stay as they are.
    pub fn write(&self, out: &Path, set: &MeasuredSet) -> Result<()> {
        let file = out.join(Self::FILE);
        let named = || file.display().to_string();
        let mut table = csv::Writer::from_writer(Vec::new());
        let columns = ["set", "path", "label", "answer"].into_iter();
        table.write_record(columns.chain(self.members.iter().copied()))?;
        if file.exists() {
            for row in csv::Reader::from_path(&file).with_context(named)?.into_records() {
                let row = row.with_context(named)?;
                if row.get(0) != Some(&set.name) {
                    table.write_record(&row)?;
                }
            }
        }
        let text = |class: Option<i64>| class.map_or_else(String::new, |class| class.to_string());
        for (at, path) in set.paths.iter().enumerate() {
            let own = [set.name.clone(), path.clone(), self.labels[at].to_string()];
            let answer = [text(self.answers[at])];
            let votes = self.classes.iter().map(|classes| text(classes[at]));
            table.write_record(own.into_iter().chain(answer).chain(votes))?;
        }
        Ok(write_atomically(&file, &table.into_inner()?)?)
    }
}
