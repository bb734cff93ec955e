//! The images of a run: those of a task, or a person's own.

use std::path::Path;

use anyhow::{Context, Result, bail};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{FileList, Splits};

use super::args::{FinetuneArgs, Select};
use crate::failure::chain_of;
use crate::files::write_atomically;
use crate::flags::data_name;
use crate::run_folder::class_names;
use crate::survey;

/// The lists of a run, and the names of its classes.
pub struct RunLists {
    /// The name of the task or of the folder of the images.
    pub name: String,
    pub num_classes: i64,
    /// The names in the order of the labels; empty if they are not known.
    pub class_names: Vec<String>,
    pub train: FileList,
    /// The images that the model is measured on after epochs.
    pub val: Option<FileList>,
    pub test: Option<FileList>,
    /// The number of images that cannot be read and are skipped.
    pub skipped: usize,
    /// The images of a person's own in three parts, which are written down.
    own: Option<Splits>,
}

impl RunLists {
    /// Reads the lists of `--images`, else of `--task`. Prints what is odd about them, and looks at
    /// the images.
    pub fn read(args: &FinetuneArgs) -> Result<Self> {
        match (&args.images.images, &args.task) {
            (Some(images), _) => Self::of_images(args, images)?.selected(args.select),
            (None, Some(task)) => Self::of_task(args, task),
            (None, None) => bail!("--images or --task is needed"),
        }
    }

    fn of_task(args: &FinetuneArgs, task: &str) -> Result<Self> {
        let folder = VtabFolder::open(args.data.folder(), task)?;
        let list = |split| folder.split(split).clone();
        let train = match args.select {
            Select::Last => list(VtabSplit::Train800Val200),
            Select::Val | Select::Trial => list(VtabSplit::Train800),
        };
        survey::say(train.warnings(), &[]);
        let file = folder.path().join("classes.txt");
        let mut names = class_names(&file)?;
        if !names.is_empty()
            && let Err(error) = train.clone().with_class_names(names.clone())
        {
            // The results do not depend on the names, so wrong names are no error.
            eprintln!("warning: {}: {}", file.display(), chain_of(error));
            names.clear();
        }
        let val = (args.select != Select::Last).then(|| list(VtabSplit::Val200));
        let test = (args.select != Select::Trial).then(|| list(VtabSplit::Test));
        let mut lists = ([Some(train), val, test], 0);
        // A sweep has many runs on the same images, at which it looks once. Its runs leave out the
        // same images.
        if args.spec.is_none() || args.survey.skip_unreadable {
            lists = survey::readable_parts(lists.0, args.survey, args.threads)?;
        }
        let ([train, val, test], skipped) = lists;
        if args.spec.is_none() {
            survey::say_overlaps(&[
                ("training", train.as_ref()),
                ("validation", val.as_ref()),
                ("test", test.as_ref()),
            ]);
        }
        Ok(Self {
            name: folder.name().to_owned(),
            num_classes: folder.num_classes(),
            class_names: names,
            train: train.context("there are no training images")?,
            val,
            test,
            skipped,
            own: None,
        })
    }

    fn of_images(args: &FinetuneArgs, images: &Path) -> Result<Self> {
        let flags = &args.images;
        let mut splits = Splits::open(images, flags.root.as_deref())?;
        if splits.train.num_classes() < 2 {
            bail!(
                "{}: expected two classes or more, found only {}",
                images.display(),
                splits.train.class_name(0)
            );
        }
        survey::say(&splits.warnings, &splits.left_out);
        splits.warnings.clear();
        let lists = [Some(splits.train), splits.val, splits.test];
        let ([train, val, test], skipped) =
            survey::readable_parts(lists, args.survey, args.threads)?;
        splits.train = train.context("there are no training images")?;
        (splits.val, splits.test) = (val, test);
        // Only images that can be read are drawn.
        let splits = splits.complete(flags.fractions(), flags.split_seed.unwrap_or(0));
        let splits = splits.context("--val-fraction, --test-fraction")?;
        survey::say(&splits.warnings, &[]);
        survey::say_overlaps(&[
            ("training", Some(&splits.train)),
            ("validation", splits.val.as_ref()),
            ("test", splits.test.as_ref()),
        ]);
        let train = splits.train.clone();
        Ok(Self {
            name: data_name(images),
            num_classes: train.num_classes(),
            class_names: train.class_names().to_vec(),
            train,
            val: splits.val.clone(),
            test: splits.test.clone(),
            skipped,
            own: Some(splits),
        })
    }

    /// Returns the lists of `--images` that a run trains and is measured on.
    fn selected(mut self, select: Select) -> Result<Self> {
        match (select, &self.val) {
            (Select::Last, Some(val)) => {
                self.train = self.train.joined(val)?;
                self.val = None;
            }
            (Select::Last, None) => {}
            (Select::Val | Select::Trial, None) => {
                bail!("--select needs validation images; give --val-fraction above 0")
            }
            (Select::Val, Some(_)) => {}
            (Select::Trial, Some(_)) => self.test = None,
        }
        Ok(self)
    }

    /// Writes the lists of `--images` and the names of the classes into `out`, and prints the
    /// number of images of each class.
    pub fn write_down(&self, out: &Path) -> Result<()> {
        let Some(own) = &self.own else { return Ok(()) };
        let parts =
            [("train", Some(&own.train)), ("val", own.val.as_ref()), ("test", own.test.as_ref())];
        let count = |list: Option<&FileList>| {
            list.map_or_else(|| vec![0; self.num_classes as usize], FileList::class_counts)
        };
        println!("{:>6} {:>6} {:>6}  class", "train", "val", "test");
        let counts = parts.map(|(_, list)| count(list));
        for label in 0..self.num_classes {
            let [train, val, test] = [0, 1, 2].map(|part: usize| counts[part][label as usize]);
            println!("{train:>6} {val:>6} {test:>6}  {}", own.train.class_name(label));
        }
        let [train, val, test] = counts.map(|counts| counts.iter().sum::<usize>());
        println!("{train:>6} {val:>6} {test:>6}  all {} classes", self.num_classes);
        for (name, list) in parts {
            if let Some(list) = list {
                list.save(out.join(format!("{name}.csv")))?;
            }
        }
        if !self.class_names.is_empty() {
            let names = self.class_names.join("\n") + "\n";
            write_atomically(&out.join("classes.txt"), names.as_bytes())?;
        }
        println!(
            "the lists are in {}; --images with that folder and --root {} reads them again",
            out.display(),
            own.train.root().display()
        );
        Ok(())
    }
}
