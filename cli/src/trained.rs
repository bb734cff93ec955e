//! A trained adapter on the disk, with what its run recorded beside it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use convpass::model::AdapterInfo;
use convpass::train::RunRecord;

use crate::few_shot::{ENSEMBLE, MEMBERS};
use crate::flags::{BackboneFlags, Size};
use crate::run_folder::{adapter_file, is_adapter_of, precision_of};

/// An adapter file, its metadata, and the record of its run if there is one.
pub struct TrainedAdapter {
    pub file: PathBuf,
    /// The path of `run.json` beside the adapter, whether or not the file exists.
    pub beside: PathBuf,
    pub record: Option<RunRecord>,
    pub info: AdapterInfo,
}

impl TrainedAdapter {
    /// Reads the metadata of the adapter at `path`, which is its file or the folder of its run.
    pub fn read(path: &Path) -> Result<Self> {
        let file = adapter_file(path);
        if file.extension().is_some_and(|extension| extension == "json") {
            bail!(
                "{}: expected the file of an adapter or the folder of its run, found a JSON file",
                file.display()
            );
        }
        if path.join(ENSEMBLE).exists() && !file.exists() {
            bail!(
                "{} holds an ensemble; give the folder of one of its members, which are in {}",
                path.display(),
                path.join(MEMBERS).display()
            );
        }
        let beside = file.with_file_name("run.json");
        let record = if beside.exists() { Some(RunRecord::load(&beside)?) } else { None };
        if let Some(record) = &record
            && !is_adapter_of(record, &file)?
        {
            bail!(
                "{} is not the adapter that {} describes: another run may have been killed while \
                 it replaced this one; train again, or name a copy of the adapter outside this \
                 folder",
                file.display(),
                beside.display()
            );
        }
        let info = AdapterInfo::read(&file)?;
        Ok(TrainedAdapter { file, beside, record, info })
    }

    /// Returns the checkpoint of the flag, else that of the run.
    pub fn checkpoint(&self, flags: &BackboneFlags) -> Result<PathBuf> {
        let of_run = self.record.as_ref().map(|record| PathBuf::from(&record.backbone));
        let Some(file) = flags.backbone.clone().or(of_run) else {
            bail!("--backbone is needed: there is no {}", self.beside.display());
        };
        Ok(file)
    }

    /// Returns the flags of the backbone. If the image size or the precision is not given, it is
    /// that of the run.
    pub fn flags(&self, flags: &BackboneFlags) -> Result<BackboneFlags> {
        let (record, backbone) = (self.record.as_ref(), self.info.backbone.as_ref());
        let size = record.and_then(|record| record.image_size);
        let size = size.or(backbone.and_then(|backbone| backbone.image_size));
        let size = size.map(|(height, width)| Size { height, width });
        let precision = match record {
            Some(record) => Some(precision_of(record)?),
            None => backbone.and_then(|backbone| backbone.precision),
        };
        Ok(BackboneFlags {
            image_size: flags.image_size.or(size),
            precision: flags.precision.or(precision),
            ..flags.clone()
        })
    }
}
