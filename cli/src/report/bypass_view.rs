//! A view of bypasses: the maps of their convolutions on an image, and the receptive field of a token
//! with and without the bypasses.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::picture::Thumbnail;
use crate::error::{Error, Result};
use crate::files::{read_json, write_json};
use convpass::backbone::{Backbone, Forward, Pass, Stream};
use convpass::data::{BatchConfig, Batches, ImageDataset, Normalization, Order, PartialBatch};
use convpass::model::PetlModel;
use convpass::petl::Bypasses;
use convpass::seam::{Beside, NoMethod, Seam, Site, SubLayer, TokenLayout};

/// The number of blocks that are shown.
const BLOCKS: usize = 4;
/// The number of bottleneck channels that are shown for each block.
const CHANNELS: usize = 8;
/// The largest grid that is shown, in patches.
const MAX_GRID: usize = 1 << 14;

/// Numbers on the patch grid, row by row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GridMap {
    /// Rows and columns.
    pub grid: (usize, usize),
    /// One value for each patch.
    pub values: Vec<f32>,
}

/// The convolution of one bypass on an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConvMaps {
    /// Index of the block, from 0.
    pub block: usize,
    /// The sub-layer of the block that has the bypass.
    pub sub_layer: SubLayer,
    /// The input of the convolution: a map for each of the first bottleneck channels.
    pub before: Vec<GridMap>,
    /// The output of the convolution before its activation, for the same channels.
    pub after: Vec<GridMap>,
}

/// The maps of the bypasses of a model, and the receptive field with and without them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BypassView {
    /// The image of the maps.
    pub picture: Thumbnail,
    /// The maps of a few blocks, in order.
    pub maps: Vec<ConvMaps>,
    /// The receptive field: the mean of |d norm / d pixel| over images, colours and the pixels of
    /// each patch. The norm is that of the token in the middle of the grid after the last block
    /// that outputs patches.
    pub field: GridMap,
    /// The receptive field of the frozen backbone alone.
    pub frozen_field: GridMap,
    /// The number of images that both fields are averaged over.
    pub images: usize,
}

impl BypassView {
    /// The file beside `run.json`.
    pub const FILE: &str = "bypass_view.json";

    /// Computes the view from the first `images` images of `dataset`.
    ///
    /// # Errors
    /// [`Error::Config`] if the model's method is not a convolutional bypass or there are no
    /// images; [`Error::Input`] if the images do not fit the backbone.
    pub fn compute<B: Backbone>(
        model: &PetlModel<B>,
        dataset: &ImageDataset,
        normalization: Normalization,
        images: usize,
    ) -> Result<Self> {
        let images = images.min(dataset.len());
        if images == 0 {
            return Err(Error::config("images", "at least 1", images));
        }
        let watched = Watched::new(model)?;
        let config = BatchConfig {
            batch_size: 1,
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization,
            device: model.var_store().device(),
        };
        let (mut field, mut frozen) = (None, None);
        for batch in Batches::new(dataset, config)?.take(images) {
            let image = &batch?.0;
            add(&mut field, receptive_field(model.backbone(), image, &watched)?)?;
            add(&mut frozen, receptive_field(model.backbone(), image, &NoMethod)?)?;
        }
        let mean = |sum: Option<Tensor>| match sum {
            Some(sum) => grid_map(&sum.f_div_scalar(images as f64)?),
            None => Err(Error::config("images", "at least 1", 0)),
        };
        let pixels = dataset.image(0)?;
        Ok(BypassView {
            picture: Thumbnail::new(pixels.view(), 224)?,
            maps: watched.maps()?,
            field: mean(field)?,
            frozen_field: mean(frozen)?,
            images,
        })
    }

    /// Writes the view as JSON. The file is written atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_json(path.as_ref(), self)
    }

    /// Reads a file of [`BypassView::save`].
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::CorruptFile`] if it is cut off or
    /// contradicts itself.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let view: BypassView = read_json(path)?;
        let maps = view.maps.iter().flat_map(|maps| maps.before.iter().chain(&maps.after));
        let wrong = maps.chain([&view.field, &view.frozen_field]).find(|map| !map.is_whole());
        match wrong {
            Some(map) => {
                let reason = format!("{} values on a grid of {:?}", map.values.len(), map.grid);
                Err(Error::corrupt(path, reason))
            }
            None => Ok(view),
        }
    }
}

impl GridMap {
    fn is_whole(&self) -> bool {
        let (rows, cols) = self.grid;
        let patches = rows.checked_mul(cols).filter(|patches| (1..=MAX_GRID).contains(patches));
        patches == Some(self.values.len())
    }

    /// Returns the largest magnitude.
    pub(super) fn peak(&self) -> f32 {
        self.values.iter().fold(0.0, |peak: f32, value| peak.max(value.abs()))
    }

    /// Returns the mean distance from the token in the middle in patches, weighted by the values;
    /// `None` if all values are zero.
    pub(super) fn reach(&self) -> Option<f64> {
        let (rows, cols) = self.grid;
        let (mut sum, mut total) = (0.0, 0.0);
        for (index, &value) in self.values.iter().enumerate() {
            let (row, col) = ((index / cols) as f64, (index % cols) as f64);
            let distance = (row - (rows / 2) as f64).hypot(col - (cols / 2) as f64);
            sum += distance * f64::from(value.abs());
            total += f64::from(value.abs());
        }
        Some(sum / total).filter(|reach| reach.is_finite())
    }
}

fn add(sum: &mut Option<Tensor>, next: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => sum.f_add(&next)?,
        None => next,
    });
    Ok(())
}

/// Returns a tensor `[rows, cols]` as a map.
fn grid_map(map: &Tensor) -> Result<GridMap> {
    let (rows, cols) = map.size2()?;
    let flat = map.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?;
    Ok(GridMap { grid: (rows as usize, cols as usize), values: Vec::<f32>::try_from(&flat)? })
}

/// Returns the patch grid `[rows, cols]` of the gradient of an image `[1, 3, H, W]`.
fn receptive_field<B: Backbone>(backbone: &B, image: &Tensor, method: &dyn Seam) -> Result<Tensor> {
    let image = image.f_detach()?.f_set_requires_grad(true)?;
    let pass = Pass::default();
    let first = backbone.run_embed(&image, method, pass)?;
    let (rows, cols) = first.layout.grid;
    let mut stream = first;
    for block in 0..backbone.num_blocks() {
        let kept = Stream { tokens: stream.tokens.shallow_clone(), layout: stream.layout };
        stream = backbone.run_block(block, stream, method, pass)?;
        // If only the class token is read, the last block does not output the patches.
        if !has_patches(&stream) {
            stream = kept;
            break;
        }
    }
    let (size, layout) = (stream.tokens.size(), stream.layout);
    if !has_patches(&stream) {
        let found = format!("{size:?}");
        return Err(Error::config("backbone", "one with tokens on a patch grid", found));
    }
    let centre = layout.prefix + layout.grid.0 / 2 * layout.grid.1 + layout.grid.1 / 2;
    let token = stream.tokens.f_select(1, centre)?.f_to_kind(Kind::Float)?;
    token.f_square()?.f_sum(None::<Kind>)?.f_sqrt()?.f_backward()?;
    // [1, 3, H, W] -> [1, 1, H, W] -> [rows, cols]
    let gradient = image.f_grad()?.f_abs()?.f_mean_dim(1i64, true, Kind::Float)?;
    Ok(gradient.f_adaptive_avg_pool2d([rows, cols])?.f_squeeze()?.f_view([rows, cols])?)
}

fn has_patches(stream: &Stream) -> bool {
    let size = stream.tokens.size();
    let layout = stream.layout;
    size.len() == 3 && layout.num_patches() > 0 && size[1] == layout.num_tokens()
}

/// The bypasses of a model. Each keeps the first tokens that it reads.
#[derive(Debug)]
struct Watched {
    bypasses: Bypasses,
    /// The tokens that each bypass read first, by its block and whether it is beside the MLP.
    seen: RefCell<BTreeMap<(usize, bool), Seen>>,
}

#[derive(Debug)]
struct Seen {
    site: Site,
    tokens: Tensor,
    layout: TokenLayout,
}

impl Watched {
    fn new<B: Backbone>(model: &PetlModel<B>) -> Result<Self> {
        Ok(Watched { bypasses: model.bypasses()?, seen: RefCell::default() })
    }

    fn keep(&self, site: Site, tokens: &Tensor, layout: &TokenLayout) -> convpass::Result<()> {
        if layout.num_patches() > 0 && self.bypasses.bypass(site).is_some() {
            let place = (site.block, site.sub_layer == SubLayer::Mlp);
            let seen = Seen { site, tokens: tokens.f_detach()?, layout: *layout };
            self.seen.borrow_mut().entry(place).or_insert(seen);
        }
        Ok(())
    }

    /// Returns the maps of a few evenly spread blocks. If a block has a bypass beside attention,
    /// the maps are of that one.
    fn maps(&self) -> Result<Vec<ConvMaps>> {
        let seen = self.seen.borrow();
        let mut sites: Vec<&Seen> = seen.values().collect();
        sites.dedup_by_key(|seen| seen.site.block);
        let count = sites.len().min(BLOCKS);
        let spread = |i: usize| i * (sites.len() - 1) / (count - 1).max(1);
        (0..count).filter_map(|i| sites.get(spread(i))).map(|seen| self.maps_at(seen)).collect()
    }

    fn maps_at(&self, Seen { site, tokens, layout }: &Seen) -> Result<ConvMaps> {
        let Some(bypass) = self.bypasses.bypass(*site) else {
            return Err(Error::config("method", "a bypass at each place", format!("{site:?}")));
        };
        let (before, after) = tch::no_grad(|| bypass.maps(tokens, layout))?;
        let maps = |maps: &Tensor| -> Result<Vec<GridMap>> {
            let channels = maps.size().get(1).copied().unwrap_or(0).min(CHANNELS as i64);
            (0..channels)
                .map(|channel| grid_map(&maps.f_select(0, 0)?.f_select(0, channel)?))
                .collect()
        };
        let (before, after) = (maps(&before)?, maps(&after)?);
        Ok(ConvMaps { block: site.block, sub_layer: site.sub_layer, before, after })
    }
}

impl Seam for Watched {
    fn is_beside(&self, site: Site) -> bool {
        self.bypasses.is_beside(site)
    }

    fn beside(&self, at: &Beside, residual: Tensor) -> convpass::Result<Tensor> {
        self.keep(at.site, at.normed, at.layout)?;
        self.bypasses.beside(at, residual)
    }

    fn after_sub_layer(
        &self,
        site: Site,
        output: Tensor,
        layout: &TokenLayout,
        train: bool,
    ) -> convpass::Result<Tensor> {
        if !self.is_beside(site) {
            self.keep(site, &output, layout)?;
        }
        self.bypasses.after_sub_layer(site, output, layout, train)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use convpass::backbone::{FrozenViT, Pooling, ViTConfig};
    use convpass::model::PetlConfig;
    use convpass::petl::{ConvBypassConfig, Method};
    use ndarray::Array4;
    use tch::Device;

    fn model(method: Method, pooling: Pooling) -> PetlModel {
        let vit = ViTConfig {
            image_size: (20, 12),
            patch_size: 4,
            embed_dim: 32,
            depth: 4,
            num_heads: 2,
            mlp_dim: 48,
            pooling,
            ..ViTConfig::default()
        };
        let backbone = FrozenViT::random(&vit, 3, Device::Cpu).unwrap();
        PetlModel::new(backbone, &PetlConfig::new(method, 3)).unwrap()
    }

    fn data() -> ImageDataset {
        let pixel =
            |(n, r, c, k): (usize, usize, usize, usize)| (37 * n + 11 * r + 5 * c * k) as u8;
        let images = Array4::from_shape_fn((3, 20, 12, 3), pixel);
        ImageDataset::from_arrays(images, vec![0, 1, 2], 3).unwrap()
    }

    fn view(model: &PetlModel, images: usize) -> Result<BypassView> {
        BypassView::compute(model, &data(), Normalization::Half, images)
    }

    #[test]
    fn an_untrained_bypass_sees_its_input_and_leaves_the_field_as_it_was() {
        for (pooling, blocks) in
            [(Pooling::ClassToken, vec![0, 1, 2, 3]), (Pooling::Average, vec![0, 1, 2, 3])]
        {
            let found = view(&model(Method::ConvBypass(Default::default()), pooling), 2).unwrap();
            let grids: Vec<_> = found.maps.iter().map(|maps| maps.block).collect();
            // The last block of a class token hands no patches to its bypass.
            let expected = if pooling == Pooling::ClassToken { &blocks[..3] } else { &blocks[..] };
            assert_eq!(grids, expected);
            for maps in &found.maps {
                assert_eq!((maps.before.len(), maps.before[0].grid), (8, (5, 3)));
                // The convolution starts as the identity, the up projection as zero.
                for (a, b) in maps.before.iter().zip(&maps.after) {
                    assert!(a.values.iter().zip(&b.values).all(|(a, b)| (a - b).abs() < 1e-6));
                }
            }
            assert_eq!(found.field, found.frozen_field);
            assert!(found.field.peak() > 0.0 && found.field.reach().unwrap() > 0.0);
            assert_eq!(found.images, 2);
        }
    }

    #[test]
    fn the_field_is_the_gradient_that_finite_differences_give() {
        let model = model(Method::ConvBypass(Default::default()), Pooling::Average);
        tch::no_grad(|| {
            let mut variables: Vec<_> = model.var_store().variables().into_iter().collect();
            variables.sort_by(|a, b| a.0.cmp(&b.0));
            for (seed, (_, mut variable)) in variables.into_iter().enumerate() {
                let count = variable.numel() as i64;
                let wave = Tensor::arange(count, (Kind::Float, Device::Cpu)) + seed as f64;
                variable.copy_(&(wave.sin() * 0.3).reshape(variable.size()));
            }
        });
        let found = view(&model, 1).unwrap();
        assert_ne!(found.field, found.frozen_field);
        // By hand, over the model's own forward pass.
        let batch = Normalization::Half
            .normalize(
                &Tensor::from_slice(data().images().unwrap().as_slice().unwrap())
                    .view([3, 20, 12, 3]),
            )
            .unwrap()
            .narrow(0, 0, 1);
        let watched = Watched::new(&model).unwrap();
        let norm = |image: &Tensor| {
            let backbone = model.backbone();
            let mut stream = backbone.run_embed(image, &watched, Pass::default()).unwrap();
            for block in 0..4 {
                stream = backbone.run_block(block, stream, &watched, Pass::default()).unwrap();
            }
            // Prefix 1; the middle of 5 x 3 is row 2, column 1.
            stream.tokens.select(1, 1 + 2 * 3 + 1).norm().double_value(&[])
        };
        let (patch_row, patch_col) = (1, 2);
        let mut sum = 0.0;
        for (channel, row, col) in (0..3).flat_map(|k| (0..16).map(move |i| (k, i / 4, i % 4))) {
            let at = |step: f64| {
                let moved = batch.copy();
                let (row, col) = (patch_row * 4 + row, patch_col * 4 + col);
                let pixel = moved.get(0).get(channel).get(row).get(col);
                let _moved = pixel.shallow_clone().fill_(pixel.double_value(&[]) + step);
                norm(&moved)
            };
            sum += ((at(0.02) - at(-0.02)) / 0.04).abs() / 48.0;
        }
        let value = f64::from(found.field.values[(patch_row * 3 + patch_col) as usize]);
        assert!((value - sum).abs() < 0.02 * sum, "{value} {sum}");
    }

    #[test]
    fn every_placement_is_seen_and_other_methods_are_refused() {
        use convpass::petl::{Placement, SubLayers};
        let sequential = ConvBypassConfig {
            placement: Placement::Sequential,
            sub_layers: SubLayers::Mlp,
            ..Default::default()
        };
        let found = view(&model(Method::ConvBypass(sequential), Pooling::Average), 1).unwrap();
        assert!(found.maps.iter().all(|maps| maps.sub_layer == SubLayer::Mlp));
        assert_eq!(found.maps.len(), 4);
        let refused = view(&model(Method::LinearProbe, Pooling::Average), 1);
        assert!(refused.unwrap_err().is_config());
        let none = view(&model(Method::ConvBypass(Default::default()), Pooling::Average), 0);
        assert!(none.unwrap_err().is_config());
    }

    #[test]
    fn a_file_is_read_back_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(BypassView::FILE);
        let mut found =
            view(&model(Method::ConvBypass(Default::default()), Pooling::Average), 1).unwrap();
        found.save(&path).unwrap();
        assert_eq!(BypassView::load(&path).unwrap(), found);
        found.field.grid = (usize::MAX, 2);
        found.save(&path).unwrap();
        assert!(matches!(BypassView::load(&path), Err(Error::CorruptFile { .. })));
    }
}
