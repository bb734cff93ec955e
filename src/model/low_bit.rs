//! Variables with few bits, and how an adapter file packs them.

use std::collections::BTreeMap;

use safetensors::Dtype;
use tch::{Kind, Tensor};

use super::adapter_file::Bytes;
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};
use crate::petl::{Coded, Coding, pack, unpack};

/// The codes of all low-bit variables in the order of their names. The codes of each variable start
/// at a new byte.
pub(super) const CODES: &str = "low_bit.codes";
/// Mean and standard deviation of each low-bit variable, `[variables, 2]`.
pub(super) const STATISTICS: &str = "low_bit.statistics";

/// The variables that a method uses with few bits.
#[derive(Debug)]
pub(super) struct LowBit {
    /// The coding of each variable by name.
    codings: BTreeMap<String, Coding>,
    /// The variables that were loaded from a file.
    loaded: BTreeMap<String, Loaded>,
}

/// A variable that was loaded from a file. Its values are already levels; coding them again would
/// give another mean and standard deviation.
#[derive(Debug)]
struct Loaded {
    coded: Coded,
    /// libtorch's count of writes to the variable when the values of the file had been written.
    version: i64,
}

impl LowBit {
    pub(super) fn new(codings: BTreeMap<String, Coding>) -> Self {
        LowBit { codings, loaded: BTreeMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.codings.is_empty()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.codings.contains_key(name)
    }

    /// Returns whether the variable still has the values that were loaded from a file.
    pub(super) fn is_coded(&self, name: &str, variable: &Tensor) -> Result<bool> {
        match self.loaded.get(name) {
            Some(loaded) => Ok(variable.f_internal_version()? == loaded.version),
            None => Ok(false),
        }
    }

    /// Returns the two tensors to store, [`CODES`] and [`STATISTICS`], with their names.
    pub(super) fn encode(
        &self,
        variables: &BTreeMap<String, Tensor>,
    ) -> Result<[(&'static str, Bytes); 2]> {
        let (mut codes, mut statistics) = (Vec::new(), Vec::new());
        for (name, &coding) in &self.codings {
            let variable = &variables[name];
            let fresh;
            let coded = match self.loaded.get(name) {
                Some(loaded) if self.is_coded(name, variable)? => &loaded.coded,
                _ => {
                    fresh = coding.code(variable)?;
                    &fresh
                }
            };
            let each = coded.codes.f_flatten(0, -1)?.f_to_kind(Kind::Uint8)?;
            codes.extend(pack(&Vec::<u8>::try_from(&each)?, coding.bits));
            for value in [&coded.mean, &coded.std] {
                statistics.extend((value.f_double_value(&[])? as f32).to_le_bytes());
            }
        }
        let codes = Bytes { dtype: Dtype::U8, shape: vec![codes.len()], data: codes };
        let shape = vec![self.codings.len(), 2];
        let statistics = Bytes { dtype: Dtype::F32, shape, data: statistics };
        Ok([(CODES, codes), (STATISTICS, statistics)])
    }

    /// Reads the codes and statistics of each variable from a file with [`CODES`].
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the file has more or fewer codes than `variables` need;
    /// [`Error::MissingTensor`] if it has no [`STATISTICS`].
    pub(super) fn decode(
        &self,
        file: &TensorFile,
        variables: &BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<String, Coded>> {
        let codes = file.bytes(CODES)?;
        let statistics = self.statistics(file)?;
        let size =
            |(name, coding): (&String, &Coding)| coding.code_bytes(variables[name].numel() as i64);
        let sizes: Vec<i64> = self.codings.iter().map(size).collect();
        let (expected, found) = (sizes.iter().sum::<i64>(), codes.len() as i64);
        if expected != found {
            return Err(mismatch(file, CODES, vec![expected], vec![found]));
        }
        let mut rest = &codes[..];
        let mut coded = BTreeMap::new();
        for (index, ((name, coding), size)) in self.codings.iter().zip(sizes).enumerate() {
            let (bytes, after) = rest.split_at(size as usize);
            rest = after;
            let variable = &variables[name];
            let codes = Tensor::f_from_slice(&unpack(bytes, coding.bits, variable.numel()))?;
            let codes = codes.f_to_kind(Kind::Int64)?.f_reshape(variable.size())?;
            let statistic = |column: i64| statistics.f_select(0, index as i64)?.f_get(column);
            let on = |tensor: Tensor| tensor.f_to_device(variable.device());
            let (mean, std) = (on(statistic(0)?)?, on(statistic(1)?)?);
            coded.insert(name.clone(), Coded { mean, std, codes: on(codes)? });
        }
        Ok(coded)
    }

    fn statistics(&self, file: &TensorFile) -> Result<Tensor> {
        let expected = vec![self.codings.len() as i64, 2];
        match file.shape(STATISTICS) {
            Some(found) if found == expected => file.tensor(STATISTICS),
            Some(found) => Err(mismatch(file, STATISTICS, expected, found.to_vec())),
            None => Err(Error::MissingTensor {
                file: file.path().to_path_buf(),
                name: STATISTICS.to_owned(),
                expected,
            }),
        }
    }

    /// Returns the values of the variables that [`LowBit::decode`] returned.
    pub(super) fn values(
        &self,
        coded: &BTreeMap<String, Coded>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let value =
            |(name, coded): (&String, &Coded)| Ok((name.clone(), self.codings[name].value(coded)?));
        coded.iter().map(value).collect()
    }

    /// Records that `variables` now hold `coded`.
    pub(super) fn set_loaded(
        &mut self,
        coded: BTreeMap<String, Coded>,
        variables: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let loaded = coded.into_iter().map(|(name, coded)| {
            let version = variables[&name].f_internal_version()?;
            Ok((name, Loaded { coded, version }))
        });
        self.loaded = loaded.collect::<Result<_>>()?;
        Ok(())
    }
}

fn mismatch(file: &TensorFile, name: &str, expected: Vec<i64>, found: Vec<i64>) -> Error {
    let (file, name) = (file.path().to_path_buf(), name.to_owned());
    Error::ShapeMismatch { file, name, expected, found }
}
