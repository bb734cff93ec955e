//! Rotary position embeddings on a grid: queries and keys are rotated by angles that grow with the
//! row and the column of their patch (Su et al., arXiv 2104.09864).

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::Projected;
use crate::error::{Error, Result};
use crate::ffi::{Backward, attach};

/// The settings of a rotary position embedding. Prefix tokens are not rotated.
///
/// A head of width d has d/2 pairs of channels. The first d/4 pairs turn with one side of the grid,
/// the others with the other side; pair i of a side turns with the frequency `base^(-4i/d)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotary {
    /// The base of the frequencies: 100 in DINOv3, 10000 in EVA-02.
    pub base: f64,
    /// The channels that form a pair.
    pub pairs: RotaryPairs,
    /// The coordinates of a patch.
    pub coordinates: RotaryCoordinates,
}

/// The channels of a head that form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RotaryPairs {
    /// Channel i and channel i + d/2 (DINOv3).
    Halves,
    /// Channel 2i and channel 2i + 1 (EVA-02, Perception Encoder).
    Neighbours,
}

/// The coordinates of the patch in row r of R rows. Columns are treated in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RotaryCoordinates {
    /// `2 pi (2 (r + 0.5) / R - 1)`, rows before columns (DINOv3).
    Centered,
    /// `(r + offset) * reference / R`, or `r + offset` without a reference grid.
    Index {
        /// Added to the number of the row.
        offset: f64,
        /// Rows and columns of the grid that the model was trained with.
        reference: Option<(i64, i64)>,
        /// Whether the first pairs turn with the columns instead of the rows.
        columns_first: bool,
    },
}

impl Rotary {
    /// The rotary embedding of DINOv3.
    pub const DINOV3: Rotary = Rotary {
        base: 100.0,
        pairs: RotaryPairs::Halves,
        coordinates: RotaryCoordinates::Centered,
    };

    /// Checks the settings for heads of width `head_dim`.
    pub(crate) fn check(&self, head_dim: i64) -> Result<()> {
        if head_dim % 4 != 0 {
            let expected = "embed_dim / num_heads that 4 divides, for rotary positions";
            return Err(Error::config("num_heads", expected, format!("heads of {head_dim}")));
        }
        if !(self.base.is_finite() && self.base > 0.0) {
            return Err(Error::config("rotary.base", "a positive number", self.base));
        }
        let RotaryCoordinates::Index { offset, reference, .. } = self.coordinates else {
            return Ok(());
        };
        if !offset.is_finite() {
            return Err(Error::config("rotary.offset", "a finite number", offset));
        }
        match reference {
            Some((rows, cols)) if rows < 1 || cols < 1 => {
                let found = format!("{rows}x{cols}");
                Err(Error::config("rotary.reference", "a grid of at least 1x1", found))
            }
            _ => Ok(()),
        }
    }

    /// Describes the settings in the text that the digest of a backbone covers.
    pub(crate) fn describe(&self) -> String {
        let place = match self.coordinates {
            RotaryCoordinates::Centered => "centered".to_owned(),
            RotaryCoordinates::Index { offset, reference, columns_first } => {
                format!("index+{offset:e}/{reference:?}/{columns_first}")
            }
        };
        format!("rotary={:e}/{:?}/{place}", self.base, self.pairs)
    }

    /// Returns the angles of all patches, `[N, d / 2]` in f64.
    fn angles(&self, grid: (i64, i64), head_dim: i64) -> Result<Tensor> {
        let double = (Kind::Double, Device::Cpu);
        let side = |count: i64, offset: f64| -> Result<Tensor> {
            Ok(Tensor::f_arange(count, double)?.f_add_scalar(offset)?)
        };
        let (rows, cols) = match self.coordinates {
            RotaryCoordinates::Centered => {
                let place = |count: i64| -> Result<Tensor> {
                    let unit = side(count, 0.5)?.f_div_scalar(count)?;
                    Ok(unit.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?.f_mul_scalar(TAU)?)
                };
                (place(grid.0)?, place(grid.1)?)
            }
            RotaryCoordinates::Index { offset, reference, .. } => {
                let (high, wide) = reference.unwrap_or(grid);
                let place = |count: i64, trained: i64| -> Result<Tensor> {
                    Ok(side(count, offset)?.f_mul_scalar(trained as f64 / count as f64)?)
                };
                (place(grid.0, high)?, place(grid.1, wide)?)
            }
        };
        let per_side = head_dim / 4;
        let steps = Tensor::f_arange(per_side, double)?.f_mul_scalar(-4.0 / head_dim as f64)?;
        let frequencies = steps.f_mul_scalar(self.base.ln())?.f_exp()?;
        // [rows, cols, d / 4] each.
        let full = [grid.0, grid.1, per_side];
        let rows = rows.f_view([-1, 1, 1])?.f_mul(&frequencies)?.f_expand(full, false)?;
        let cols = cols.f_view([1, -1, 1])?.f_mul(&frequencies)?.f_expand(full, false)?;
        let columns_first =
            matches!(self.coordinates, RotaryCoordinates::Index { columns_first: true, .. });
        let parts = if columns_first { [cols, rows] } else { [rows, cols] };
        Ok(Tensor::f_cat(&parts, 2)?.f_flatten(0, 1)?)
    }
}

/// The cosines and sines of a grid of patches, with which [`RotaryTable::place`] rotates.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    /// `[N, d / 2]`, or `[N, heads, d / 2]` if the heads differ.
    cos: Tensor,
    /// Has the shape of `cos`.
    sin: Tensor,
    pairs: RotaryPairs,
    /// The frequencies, if they are weights, and libtorch's version counter of the weight when the
    /// table was computed. A pass computes another table if the weight is trained.
    learned: Option<(Frequencies, i64)>,
}

/// The frequencies of a block whose channels turn with rows and columns at once (Heo et al., arXiv
/// 2403.13298). The frequencies are weights of the model. The coordinates of a patch are the
/// numbers of its column and its row, and neighbouring channels form a pair.
#[derive(Debug)]
pub(crate) struct Frequencies {
    /// `[2, depth, heads, d / 2]`, for all blocks: those of columns, then those of rows.
    pub(crate) weight: Tensor,
    /// The number of the block.
    pub(crate) block: i64,
    /// Rows and columns of the patch grid.
    pub(crate) grid: (i64, i64),
}

impl Frequencies {
    /// Returns the cosines and sines, `[N, heads, d / 2]` each, in f64 if the weight is in f64, else
    /// in f32.
    fn table(&self) -> Result<(Tensor, Tensor)> {
        let kind = if self.weight.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let own = self.weight.f_select(1, self.block)?.f_to_kind(kind)?;
        let (rows, cols) = self.grid;
        let side = |count: i64| Tensor::f_arange(count, (kind, own.device()));
        // [rows or 1, cols or 1, 1, 1]
        let (row, col) = (side(rows)?.f_view([-1, 1, 1, 1])?, side(cols)?.f_view([1, -1, 1, 1])?);
        let (of_col, of_row) = (col.f_mul(&own.f_select(0, 0)?)?, row.f_mul(&own.f_select(0, 1)?)?);
        let angles = of_col.f_add(&of_row)?.f_flatten(0, 1)?;
        Ok((angles.f_cos()?, angles.f_sin()?))
    }
}

impl Clone for Frequencies {
    fn clone(&self) -> Self {
        Frequencies { weight: self.weight.shallow_clone(), ..*self }
    }
}

impl RotaryTable {
    /// Computes the table for heads of width `head_dim` beside the weight `like`: in f64 if it is
    /// in f64, else in f32.
    pub(crate) fn new(
        rotary: &Rotary,
        grid: (i64, i64),
        head_dim: i64,
        like: &Tensor,
    ) -> Result<Self> {
        let kind = if like.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let angles = rotary.angles(grid, head_dim)?;
        let stored = |x: Tensor| x.f_to_kind(kind)?.f_to_device(like.device());
        let (cos, sin) = (stored(angles.f_cos()?)?, stored(angles.f_sin()?)?);
        Ok(RotaryTable { cos, sin, pairs: rotary.pairs, learned: None })
    }

    /// Computes the table from the frequencies of a block.
    pub(crate) fn learned(frequencies: Frequencies) -> Result<Self> {
        let (cos, sin) = tch::no_grad(|| frequencies.table())?;
        let version = frequencies.weight.f_internal_version()?;
        let learned = Some((frequencies, version));
        Ok(RotaryTable { cos, sin, pairs: RotaryPairs::Neighbours, learned })
    }

    /// Returns the cosines and the sines, `[N, d / 2]` each.
    #[cfg(feature = "onnx")]
    pub(crate) fn values(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates queries and keys of the patches, which follow `prefix` other tokens. Fewer queries
    /// than keys are queries of prefix tokens.
    pub(crate) fn place(&self, projected: &Projected, prefix: i64) -> Result<Projected> {
        Ok(match projected {
            Projected::Fused(qkv) => {
                Projected::Fused(self.rotate(qkv, Parts { of: 3, count: 2 }, prefix)?)
            }
            Projected::Split(q, kv) => {
                let kv = self.rotate(kv, Parts { of: 2, count: 1 }, prefix)?;
                Projected::Split(q.shallow_clone(), kv)
            }
        })
    }

    /// Rotates the first parts of `x [B, T, parts * C]` and copies the others.
    fn rotate(&self, x: &Tensor, parts: Parts, prefix: i64) -> Result<Tensor> {
        if let Some((frequencies, version)) = &self.learned
            && (frequencies.weight.requires_grad()
                || frequencies.weight.f_internal_version()? != *version)
        {
            let (cos, sin) = frequencies.table()?;
            let table = RotaryTable { cos, sin, pairs: self.pairs, learned: None };
            return table.turn_with_gradient(x, parts, prefix);
        }
        let output = tch::no_grad(|| self.turn(x, parts, prefix))?;
        if !x.requires_grad() {
            return Ok(output);
        }
        let back = TurnBack { pairs: self.pairs, parts, prefix };
        attach(output, &[x], &[&self.cos, &self.sin], back)
    }

    /// Does the same as [`RotaryTable::rotate`] without a gradient.
    fn turn(&self, x: &Tensor, parts: Parts, prefix: i64) -> Result<Tensor> {
        let mut output = x.f_empty_like()?;
        output.f_copy_(x)?;
        let (count, half) = self.sizes();
        // [B, N, rotated parts, heads, d]
        let rotated = |t: &Tensor| -> Result<Tensor> {
            let heads = t.f_unflatten(-1, [parts.of, -1, 2 * half])?;
            Ok(heads.f_narrow(1, prefix, count)?.f_narrow(2, 0, parts.count)?)
        };
        let (from, into) = (rotated(x)?, rotated(&output)?);
        let [u, v] = self.turned(&from)?;
        self.pair(&into, 0)?.f_copy_(&u)?;
        self.pair(&into, 1)?.f_copy_(&v)?;
        Ok(output)
    }

    /// Does the same as [`RotaryTable::rotate`] in steps that libtorch differentiates, with respect
    /// to the table too.
    fn turn_with_gradient(&self, x: &Tensor, parts: Parts, prefix: i64) -> Result<Tensor> {
        let (count, half) = self.sizes();
        let heads = x.f_narrow(1, prefix, count)?.f_unflatten(-1, [parts.of, -1, 2 * half])?;
        let channels = self.turned(&heads.f_narrow(2, 0, parts.count)?)?;
        let turned = match self.pairs {
            RotaryPairs::Halves => Tensor::f_cat(&channels, -1)?,
            RotaryPairs::Neighbours => Tensor::f_stack(&channels, -1)?.f_flatten(-2, -1)?,
        };
        let others = heads.f_narrow(2, parts.count, parts.of - parts.count)?;
        let patches = Tensor::f_cat(&[turned.f_to_kind(x.kind())?, others], 2)?;
        Ok(Tensor::f_cat(&[x.f_narrow(1, 0, prefix)?, patches.f_flatten(2, 4)?], 1)?)
    }

    /// Returns N and d / 2.
    fn sizes(&self) -> (i64, i64) {
        let size = self.cos.size();
        (size[0], size[size.len() - 1])
    }

    /// Returns the first or the second channel of each pair of `t [.., d]`, `[.., d / 2]`.
    fn pair(&self, t: &Tensor, index: i64) -> Result<Tensor> {
        let (_, half) = self.sizes();
        Ok(match self.pairs {
            RotaryPairs::Halves => t.f_narrow(-1, index * half, half)?,
            RotaryPairs::Neighbours => t.f_unflatten(-1, [half, 2])?.f_select(-1, index)?,
        })
    }

    /// Returns the rotated channels of all pairs of `from [B, N, parts, heads, d]`.
    fn turned(&self, from: &Tensor) -> Result<[Tensor; 2]> {
        let (count, half) = self.sizes();
        // [N, 1, heads or 1, d / 2]
        let wide = |t: &Tensor| t.f_view([count, 1, -1, half]);
        let (cos, sin) = (wide(&self.cos)?, wide(&self.sin)?);
        let (u, v) = (self.pair(from, 0)?, self.pair(from, 1)?);
        let first = u.f_mul(&cos)?.f_sub(&v.f_mul(&sin)?)?;
        Ok([first, v.f_mul(&cos)?.f_add(&u.f_mul(&sin)?)?])
    }
}

impl Clone for RotaryTable {
    fn clone(&self) -> Self {
        let (cos, sin) = (self.cos.shallow_clone(), self.sin.shallow_clone());
        RotaryTable { cos, sin, pairs: self.pairs, learned: self.learned.clone() }
    }
}

/// The number of parts (queries, keys, values) of a projection, and of those that are rotated,
/// which are the first.
#[derive(Clone, Copy, Debug)]
struct Parts {
    of: i64,
    count: i64,
}

/// The backward half of [`RotaryTable::rotate`]: a rotation by the negative angles. It saves the
/// table.
struct TurnBack {
    pairs: RotaryPairs,
    parts: Parts,
    prefix: i64,
}

impl Backward for TurnBack {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        _wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [cos, sin] = saved else { return Ok(Vec::new()) };
        let (cos, sin, pairs) = (cos.shallow_clone(), sin.f_neg()?, self.pairs);
        let table = RotaryTable { cos, sin, pairs, learned: None };
        let turned = tch::no_grad(|| table.turn(gradient, self.parts, self.prefix))?;
        Ok(vec![Some(turned)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::InitRng;

    const INDEX: RotaryCoordinates =
        RotaryCoordinates::Index { offset: 1.0, reference: Some((7, 9)), columns_first: true };

    fn kinds() -> [Rotary; 3] {
        let eva = Rotary { base: 1e4, pairs: RotaryPairs::Neighbours, coordinates: INDEX };
        [Rotary::DINOV3, eva, Rotary { pairs: RotaryPairs::Neighbours, ..Rotary::DINOV3 }]
    }

    fn table(rotary: &Rotary, grid: (i64, i64), head_dim: i64) -> RotaryTable {
        let like = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        RotaryTable::new(rotary, grid, head_dim, &like).unwrap()
    }

    /// The product of a rotated query and a rotated key depends only on the distance between them.
    #[test]
    fn products_depend_on_the_distance_alone() {
        let (grid, d, prefix) = ((5, 7), 8, 2);
        let mut rng = InitRng::from_seed(2);
        let mut vector = || rng.normal(&[1, 1, d], 1.0).unwrap().to_kind(Kind::Double);
        let (q, k) = (vector(), vector());
        let tokens = prefix + grid.0 * grid.1;
        let qkv = Tensor::cat(&[&q, &k, &k], 2).expand([1, tokens, 3 * d], false).copy();
        for rotary in kinds() {
            let table = table(&rotary, grid, d);
            let Projected::Fused(placed) =
                table.place(&Projected::Fused(qkv.shallow_clone()), prefix).unwrap()
            else {
                panic!("a fused projection stays fused");
            };
            let at = |row: i64, col: i64| placed.get(0).get(prefix + row * grid.1 + col);
            let product = |a: (i64, i64), b: (i64, i64)| {
                let (a, b) = (at(a.0, a.1).narrow(0, 0, d), at(b.0, b.1).narrow(0, d, d));
                (a * b).sum(Kind::Double).double_value(&[])
            };
            let (near, far) = (product((0, 0), (1, 2)), product((3, 4), (4, 6)));
            assert!((near - far).abs() < 1e-12, "{rotary:?}: {near} {far}");
            let other = product((0, 0), (2, 1));
            assert!((near - other).abs() > 1e-3, "{rotary:?}: {near} {other}");
            // Prefix tokens and values stay unchanged.
            let prefix_tokens = |t: &Tensor| t.narrow(1, 0, prefix);
            assert_eq!(prefix_tokens(&placed), prefix_tokens(&qkv));
            assert_eq!(placed.narrow(2, 2 * d, d), qkv.narrow(2, 2 * d, d));
        }
    }

    /// Compares with the tables of timm, which have an entry for each channel.
    #[test]
    fn tables_are_timms() {
        let path = "tests/integration/fixtures/dinov3/rotary.safetensors";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let golden: std::collections::BTreeMap<_, _> =
            Tensor::read_safetensors(path).unwrap().into_iter().collect();
        let index = |base: f64, offset: f64, reference, columns_first| Rotary {
            base,
            pairs: RotaryPairs::Neighbours,
            coordinates: RotaryCoordinates::Index { offset, reference, columns_first },
        };
        let kinds = [
            ("dinov3", Rotary::DINOV3),
            ("eva02", index(1e4, 0.0, Some((16, 16)), false)),
            ("pe", index(1e4, 1.0, Some((24, 24)), true)),
            ("rope_vit", index(100.0, 0.0, None, true)),
        ];
        for (name, rotary) in kinds {
            for (rows, cols) in [(14, 14), (3, 5)] {
                let table = table(&rotary, (rows, cols), 64);
                let wide = |t: &Tensor| match rotary.pairs {
                    RotaryPairs::Halves => Tensor::cat(&[t, t], 1),
                    RotaryPairs::Neighbours => t.repeat_interleave_self_int(2, 1, None::<i64>),
                };
                for (part, found) in [("cos", &table.cos), ("sin", &table.sin)] {
                    let expected = &golden[&format!("{name}.{rows}x{cols}.{part}")];
                    let gap = (wide(found) - expected).abs().max().double_value(&[]);
                    assert!(gap < 3e-6, "{name} {rows}x{cols} {part}: {gap}");
                }
            }
        }
    }

    /// Compares forward and backward with `x cos + rotated(x) sin` on whole heads.
    #[test]
    fn equals_the_plain_formula_with_its_gradient() {
        let (grid, d, heads, prefix) = ((2, 3), 8, 2, 1);
        let mut rng = InitRng::from_seed(4);
        let shape = [2, prefix + 6, 3 * heads * d];
        let qkv = rng.normal(&shape, 1.0).unwrap().to_kind(Kind::Double);
        let probe = rng.normal(&shape, 1.0).unwrap().to_kind(Kind::Double);
        for rotary in kinds() {
            let table = table(&rotary, grid, d);
            let plain = |qkv: &Tensor| {
                let x = qkv.view([2, prefix + 6, 3, heads, d]);
                let patches = x.narrow(1, prefix, 6).narrow(2, 0, 2);
                let wide = |t: &Tensor| match rotary.pairs {
                    RotaryPairs::Halves => Tensor::cat(&[t, t], 1),
                    RotaryPairs::Neighbours => t.repeat_interleave_self_int(2, 1, None::<i64>),
                };
                let (u, v) = match rotary.pairs {
                    RotaryPairs::Halves => {
                        (patches.narrow(-1, 0, d / 2), patches.narrow(-1, d / 2, d / 2))
                    }
                    RotaryPairs::Neighbours => {
                        (patches.slice(-1, 0, d, 2), patches.slice(-1, 1, d, 2))
                    }
                };
                let other = match rotary.pairs {
                    RotaryPairs::Halves => Tensor::cat(&[-v, u], -1),
                    RotaryPairs::Neighbours => Tensor::stack(&[-v, u], -1).flatten(-2, -1),
                };
                let widened = |t: &Tensor| wide(t).view([6, 1, 1, d]);
                let turned = patches * widened(&table.cos) + other * widened(&table.sin);
                let turned = Tensor::cat(&[turned, x.narrow(1, prefix, 6).narrow(2, 2, 1)], 2);
                Tensor::cat(&[x.narrow(1, 0, prefix), turned], 1).view(shape)
            };
            let run = |f: &dyn Fn(&Tensor) -> Tensor| {
                let x = qkv.copy().set_requires_grad(true);
                let y = f(&x);
                (&y * &probe).sum(Kind::Double).backward();
                (y.detach(), x.grad())
            };
            let fast = run(&|x| table.rotate(x, Parts { of: 3, count: 2 }, prefix).unwrap());
            let naive = run(&plain);
            assert!(fast.0.allclose(&naive.0, 1e-12, 1e-12, false), "{rotary:?}");
            assert!(fast.1.allclose(&naive.1, 1e-12, 1e-12, false), "{rotary:?}");
        }
    }

    /// Compares the table of learned frequencies with a loop, and the pass that has a gradient for
    /// them with the one that has none.
    #[test]
    fn learned_frequencies_turn_with_columns_and_rows() {
        let (grid, d, heads, prefix, block) = ((2, 3), 8, 2, 1, 1);
        let mut rng = InitRng::from_seed(6);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap().to_kind(Kind::Double);
        let weight = normal(&[2, 3, heads, d / 2]);
        let x = normal(&[2, prefix + 6, 3 * heads * d]);
        let learned = |weight: Tensor| RotaryTable::learned(Frequencies { weight, block, grid });
        let frozen = learned(weight.copy()).unwrap();
        for (row, col) in (0..2).flat_map(|row| (0..3).map(move |col| (row, col))) {
            for (head, i) in (0..heads).flat_map(|head| (0..d / 2).map(move |i| (head, i))) {
                let of = |side: i64| weight.double_value(&[side, block, head, i]);
                let angle = col as f64 * of(0) + row as f64 * of(1);
                let place = [row * 3 + col, head, i];
                assert!((frozen.cos.double_value(&place) - angle.cos()).abs() < 1e-12);
                assert!((frozen.sin.double_value(&place) - angle.sin()).abs() < 1e-12);
            }
        }
        let parts = Parts { of: 3, count: 2 };
        let expected = frozen.rotate(&x, parts, prefix).unwrap();
        let weight = weight.set_requires_grad(true);
        let found = learned(weight.shallow_clone()).unwrap().rotate(&x, parts, prefix).unwrap();
        assert!(found.allclose(&expected, 1e-12, 1e-12, false));
        // A weight that was changed in place gives another table.
        let mut changed = weight.detach().copy();
        let table = learned(changed.shallow_clone()).unwrap();
        changed.f_add_scalar_(1.0).map(drop).unwrap();
        let other = table.rotate(&x, parts, prefix).unwrap();
        let expected = learned(changed).unwrap().rotate(&x, parts, prefix).unwrap();
        assert!(other.allclose(&expected, 1e-12, 1e-12, false));
        assert!(!other.allclose(&found, 1e-3, 1e-3, false));
        (&found * &found.detach().cos()).sum(Kind::Double).backward();
        let gradient = weight.grad();
        assert!(gradient.select(1, block).abs().min().double_value(&[]) > 0.0);
        assert_eq!(gradient.select(1, 0).abs().max().double_value(&[]), 0.0);
    }
}
