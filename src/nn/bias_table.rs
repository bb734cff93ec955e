//! Resampling of relative position bias tables.

use tch::Tensor;

use crate::error::Result;

/// Resamples a table `[(2 rows - 1) * (2 cols - 1), heads]` for windows of size `from` to one for
/// windows of size `to`, like timm's `resize_rel_pos_bias_table`. Along each axis, the positions of
/// the known offsets grow in a geometric progression that ends at the largest new offset. Values
/// between two known offsets are interpolated linearly.
pub(crate) fn resize_bias_table(
    table: &Tensor,
    from: (i64, i64),
    to: (i64, i64),
) -> Result<Tensor> {
    let heads = table.size()[1];
    let offsets = |side: i64| 2 * side - 1;
    // [rows, cols * heads] -> [rows', cols, heads] -> [cols, rows' * heads] -> [cols', rows', heads]
    let x = axis(from.0, to.0)?.f_matmul(&table.f_reshape([offsets(from.0), -1])?)?;
    let x = x.f_reshape([offsets(to.0), offsets(from.1), heads])?.f_transpose(0, 1)?;
    let x = axis(from.1, to.1)?.f_matmul(&x.f_reshape([offsets(from.1), -1])?)?;
    let x = x.f_reshape([offsets(to.1), offsets(to.0), heads])?.f_transpose(0, 1)?;
    Ok(x.f_reshape([-1, heads])?)
}

/// Returns the interpolation weights along one axis, `[2 to - 1, 2 from - 1]`: the share of each
/// known offset in each new offset.
fn axis(from: i64, to: i64) -> Result<Tensor> {
    let known = known_offsets(from, to);
    let mut shares = vec![0f32; known.len() * (2 * to - 1) as usize];
    for (row, offset) in shares.chunks_exact_mut(known.len()).zip(1 - to..) {
        let offset = offset as f32;
        let right = known.partition_point(|&known| known < offset).min(known.len() - 1);
        let left = right.saturating_sub(1);
        let (below, above) = ((offset - known[left]).max(0.0), (known[right] - offset).max(0.0));
        match below + above {
            0.0 => row[right] = 1.0,
            gap => {
                row[left] += above / gap;
                row[right] += below / gap;
            }
        }
    }
    Ok(Tensor::f_from_slice(&shares)?.f_reshape([-1, known.len() as i64])?)
}

/// Returns the positions of the offsets of a window of side `from` among the offsets of a window of
/// side `to`, in ascending order.
fn known_offsets(from: i64, to: i64) -> Vec<f32> {
    let count = (from - 1) as i32;
    let (mut low, mut high, mut ratio) = (1.01f64, 1.5f64, 1.01f64);
    while high - low > 1e-6 {
        ratio = (low + high) / 2.0;
        let last = (1.0 - ratio.powi(count)) / (1.0 - ratio);
        if last > (to - 1) as f64 { high = ratio } else { low = ratio }
    }
    let mut offset = 0.0;
    let positive: Vec<f32> = (0..count)
        .map(|step| {
            offset += ratio.powi(step);
            offset as f32
        })
        .collect();
    positive.iter().rev().map(|offset| -offset).chain([0.0]).chain(positive.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn a_constant_stays_and_one_offset_is_all() {
        for (from, to) in [((3, 3), (5, 2)), ((7, 7), (12, 12)), ((4, 4), (1, 3)), ((1, 1), (2, 3))]
        {
            let rows = (2 * from.0 - 1) * (2 * from.1 - 1);
            let table = Tensor::ones([rows, 2], (Kind::Float, Device::Cpu)) * 0.5;
            let resized = resize_bias_table(&table, from, to).unwrap();
            assert_eq!(resized.size(), [(2 * to.0 - 1) * (2 * to.1 - 1), 2]);
            assert!((resized - 0.5).abs().max().double_value(&[]) < 1e-6);
        }
    }

    #[test]
    fn offsets_end_where_the_new_ones_do() {
        let offsets = known_offsets(7, 12);
        assert_eq!((offsets.len(), offsets[6], offsets[7]), (13, 0.0, 1.0));
        assert!((offsets[12] - 11.0).abs() < 1e-4);
    }
}
