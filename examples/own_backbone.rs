//! A backbone of another crate: an MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) under Convpass.
//!
//! ```text
//! $ cargo run --release --example own_backbone
//! ```
//!
//! A config, its layers and three functions are the whole backbone. `Frozen<MixerConfig>` then does
//! what every backbone does. The program trains, saves and loads it under Convpass.

use convpass::backbone::{
    BackboneConfig, BlockPass, Frozen, Hooks, ImageSize, Linear, Network, Norm, PatchEmbed, Stream,
    Weights,
};
use convpass::checkpoint::TensorFile;
use convpass::seam::{BackboneShape, Layer, LayerShape, SubLayer};
use convpass::{
    Backbone, ConvBypassConfig, Error, Method, PetlConfig, PetlModel, Result, TokenLayout,
};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

/// The shape of a mixer.
#[derive(Clone, Debug)]
struct MixerConfig {
    /// Patches along each side of an image, and pixels along each side of a patch.
    grid: i64,
    patch_size: i64,
    /// C, and the width between the layers of both MLPs.
    embed_dim: i64,
    hidden: i64,
    depth: i64,
}

impl BackboneConfig for MixerConfig {
    fn validate(&self) -> Result<()> {
        let fields = [self.grid, self.patch_size, self.embed_dim, self.hidden, self.depth];
        if fields.iter().all(|value| (1..=4096).contains(value)) {
            return Ok(());
        }
        let (field, expected) = ("mixer".to_owned(), "fields within 1..=4096".to_owned());
        Err(Error::config(field, expected, format!("{self:?}")))
    }

    /// What methods find here: blocks of one width, and these layers run through `Hooks`.
    fn shape(&self) -> Result<BackboneShape> {
        self.validate()?;
        let (c, hidden, patches) = (self.embed_dim, self.hidden, self.grid * self.grid);
        let pixels = 3 * self.patch_size * self.patch_size;
        let mut layers = vec![LayerShape::linear(Layer::PatchEmbed, pixels, c, true)];
        for block in 0..self.depth as usize {
            layers.extend([
                LayerShape::norm(Layer::Norm1(block), c),
                LayerShape::norm(Layer::Norm2(block), c),
                LayerShape::linear(Layer::Fc1(block), c, hidden, true),
                LayerShape::linear(Layer::Fc2(block), hidden, c, true),
            ]);
        }
        layers.push(LayerShape::norm(Layer::FinalNorm, c));
        // The layers that mix tokens are listed nowhere: no method acts on them.
        let mixing = self.depth * (2 * patches * hidden + hidden + patches);
        let num_params = mixing + layers.iter().map(LayerShape::num_params).sum::<i64>();
        let block_dims = vec![c; self.depth as usize];
        Ok(BackboneShape::new(Self::FAMILY, block_dims, layers, num_params))
    }
}

/// The layers over their weights; `Clone` shares those.
#[derive(Clone, Debug)]
struct Mixer {
    patch_embed: PatchEmbed,
    blocks: Vec<MixerBlock>,
    norm: Norm,
}

#[derive(Clone, Debug)]
struct MixerBlock {
    norm1: Norm,
    tokens: [Linear; 2],
    norm2: Norm,
    channels: [Linear; 2],
}

impl Network for MixerConfig {
    const FAMILY: &'static str = "MLP-Mixer";

    type Layers = Mixer;

    fn layers(&self, weights: &mut Weights) -> Result<Mixer> {
        let (c, hidden, patches) = (self.embed_dim, self.hidden, self.grid * self.grid);
        let block = |index: i64| {
            let name = |part: &str| format!("blocks.{index}.{part}");
            Ok(MixerBlock {
                norm1: weights.norm(&name("norm1"), c, 1e-6)?,
                tokens: [
                    weights.linear(&name("mlp_tokens.fc1"), patches, hidden, true)?,
                    weights.linear(&name("mlp_tokens.fc2"), hidden, patches, true)?,
                ],
                norm2: weights.norm(&name("norm2"), c, 1e-6)?,
                channels: [
                    weights.linear(&name("mlp_channels.fc1"), c, hidden, true)?,
                    weights.linear(&name("mlp_channels.fc2"), hidden, c, true)?,
                ],
            })
        };
        let blocks = (0..self.depth).map(block).collect::<Result<_>>()?;
        let patch_embed = weights.patch_embed("stem.proj", c, self.patch_size, true)?;
        Ok(Mixer { blocks, patch_embed, norm: weights.norm("norm", c, 1e-6)? })
    }

    fn num_blocks(&self) -> usize {
        self.depth as usize
    }

    fn embed(&self, layers: &Mixer, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        let tokens = hooks.patch_embed(&layers.patch_embed, images)?;
        Ok(Stream { tokens, layout: TokenLayout { prefix: 0, grid: (self.grid, self.grid) } })
    }

    fn block(&self, layers: &Mixer, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let block = &layers.blocks[pass.block];
        let stream = pass.enter(stream)?;
        // Where a transformer attends, a mixer runs an MLP over the patches: [B, N, C] -> [B, C, N].
        let stream = pass.sub_layer(SubLayer::Attention, &block.norm1, stream, |x| {
            let [fc1, fc2] = &block.tokens;
            let x = fc2.forward(&fc1.forward(&x.f_transpose(1, 2)?)?.f_gelu("none")?)?;
            Ok(x.f_transpose(1, 2)?)
        })?;
        pass.sub_layer(SubLayer::Mlp, &block.norm2, stream, |x| {
            let ([fc1, fc2], hooks) = (&block.channels, &pass.hooks);
            let x = hooks.linear(Layer::Fc1(pass.block), fc1, &x)?.f_gelu("none")?;
            hooks.linear(Layer::Fc2(pass.block), fc2, &x)
        })
    }

    fn pool(&self, layers: &Mixer, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let map = self.patch_map(layers, stream, hooks)?;
        Ok(map.f_mean_dim([2i64, 3].as_slice(), false, map.kind())?)
    }

    fn patch_map(&self, layers: &Mixer, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let tokens = hooks.norm(Layer::FinalNorm, &layers.norm, &stream.tokens)?;
        Stream { tokens, layout: stream.layout }.patches()
    }

    fn feature_dim(&self) -> i64 {
        self.embed_dim
    }

    fn image_size(&self) -> ImageSize {
        let side = self.grid * self.patch_size;
        ImageSize::Fixed(side, side)
    }

    fn choices(&self) -> String {
        "mixer eps=1e-6 gelu mean".to_owned()
    }
}

/// Noise in which one colour is a little brighter, and which: images `[B, 3, 32, 32]`, labels `[B]`.
fn batch(size: i64) -> (Tensor, Tensor) {
    let labels = Tensor::randint(3, [size], (Kind::Int64, Device::Cpu));
    let noise = Tensor::randn([size, 3, 32, 32], (Kind::Float, Device::Cpu));
    (noise + labels.one_hot(3).view([size, 3, 1, 1]) * 0.2, labels)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let config = MixerConfig { grid: 4, patch_size: 8, embed_dim: 48, hidden: 96, depth: 3 };
    let backbone = Frozen::random(&config, 0, Device::Cpu)?;
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, 3))?;
    println!("{:?}", model.trainable_params());

    tch::manual_seed(0);
    let mut optimizer = nn::AdamW::default().build(model.var_store(), 3e-3)?;
    for step in 1..=60 {
        let (images, labels) = batch(32);
        let loss = model.forward(&images, true)?.cross_entropy_for_logits(&labels);
        optimizer.backward_step(&loss);
        if step % 20 == 0 {
            println!("step {step}: loss {:.3}", loss.double_value(&[]));
        }
    }

    let folder = tempfile::tempdir()?;
    let [weights, adapter] = ["mixer.safetensors", "adapter"].map(|name| folder.path().join(name));
    Tensor::write_safetensors(backbone.named_weights(), &weights)?;
    model.save_adapter(&adapter)?;
    let file = TensorFile::open(&weights)?;
    let reopened = Frozen::from_source(&config, &mut |name, _| file.tensor(name))?;
    let loaded = PetlModel::load_adapter(reopened, &adapter)?;

    let (images, labels) = batch(200);
    let logits = loaded.forward(&images, false)?;
    assert_eq!(logits, model.forward(&images, false)?);
    println!("accuracy {:.1} %", 100.0 * logits.accuracy_for_logits(&labels).double_value(&[]));
    println!("patch features {:?}", loaded.patch_features(&images)?.size());
    Ok(())
}
