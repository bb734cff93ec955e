//! A backbone of another crate keeps the promises of all backbones without a word about them.

use convpass::backbone::{
    BackboneConfig, BlockPass, Forward, Frozen, Hooks, ImageSize, Linear, Network, Norm,
    PatchEmbed, Stream, Weights,
};
use convpass::backbone::{Noise, Pass};
use convpass::seam::{BackboneShape, Layer, LayerShape, NoMethod, Place, SubLayer};
use convpass::testing::{Contract, check_backbone};
use convpass::{Error, LoraConfig, Method, PetlConfig, PetlModel, Result, TokenLayout};
use tch::{Kind, Tensor};

use crate::child;
use crate::support::device;

const C: i64 = 8;

/// Blocks of MLPs alone, and of noise in training.
#[derive(Clone, Debug)]
struct Mlps {
    depth: i64,
    /// How many weights the shape forgets.
    forgotten: i64,
    /// A rate of dropout in the frozen layers, which makes the draws of a block visible.
    dropout: f64,
    /// Whether the shape lists the mixing layers.
    lists_mix: bool,
}

const MLPS: Mlps = Mlps { depth: 4, forgotten: 0, dropout: 0.5, lists_mix: true };

#[derive(Clone, Debug)]
struct Layers {
    embed: PatchEmbed,
    blocks: Vec<(Norm, Linear, Norm, Linear)>,
}

impl BackboneConfig for Mlps {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn shape(&self) -> Result<BackboneShape> {
        let mut layers = vec![LayerShape::linear(Layer::PatchEmbed, 3 * 16, C, true)];
        for block in 0..self.depth as usize {
            layers.push(LayerShape::norm(Layer::Norm1(block), C));
            if self.lists_mix {
                layers.push(LayerShape::linear(Layer::Proj(block), C, C, true));
            }
            layers.push(LayerShape::norm(Layer::Norm2(block), C));
            layers.push(LayerShape::linear(Layer::Fc1(block), C, C, true));
        }
        let listed: i64 = layers.iter().map(LayerShape::num_params).sum();
        let mix = if self.lists_mix { 0 } else { self.depth * (C * C + C) };
        let count = listed + mix - self.forgotten;
        let shape = BackboneShape::new(Self::FAMILY, vec![C; self.depth as usize], layers, count);
        Ok(shape.lacking(&[(Place::Prefix, "its blocks mix no tokens")]))
    }
}

impl Network for Mlps {
    const FAMILY: &'static str = "MLPs";

    type Layers = Layers;

    fn layers(&self, weights: &mut Weights) -> Result<Layers> {
        let embed = weights.patch_embed("embed", C, 4, true)?;
        let block = |index: i64| {
            let name = |part: &str| format!("blocks.{index}.{part}");
            Ok((
                weights.norm(&name("norm1"), C, 1e-6)?,
                weights.linear(&name("mix"), C, C, true)?,
                weights.norm(&name("norm2"), C, 1e-6)?,
                weights.linear(&name("fc1"), C, C, true)?,
            ))
        };
        Ok(Layers { embed, blocks: (0..self.depth).map(block).collect::<Result<_>>()? })
    }

    fn num_blocks(&self) -> usize {
        self.depth as usize
    }

    fn embed(&self, layers: &Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        let tokens = hooks.patch_embed(&layers.embed, images)?;
        Ok(Stream { tokens, layout: TokenLayout { prefix: 0, grid: (2, 2) } })
    }

    fn block(&self, layers: &Layers, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let (norm1, mix, norm2, fc1) = &layers.blocks[pass.block];
        let stream = pass.enter(stream)?;
        let stream = pass.sub_layer(SubLayer::Attention, norm1, stream, |x| {
            let x = pass.hooks.linear(Layer::Proj(pass.block), mix, &x)?;
            Ok(x.f_dropout(self.dropout, pass.hooks.train())?)
        })?;
        pass.sub_layer(SubLayer::Mlp, norm2, stream, |x| {
            Ok(pass.hooks.linear(Layer::Fc1(pass.block), fc1, &x)?.f_gelu("none")?)
        })
    }

    fn pool(&self, _: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        Ok(stream.tokens.f_mean_dim(1i64, false, stream.tokens.kind())?)
    }

    fn patch_map(&self, _: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        stream.patches()
    }

    fn feature_dim(&self) -> i64 {
        C
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::Fixed(8, 8)
    }

    fn choices(&self) -> String {
        "mlps".to_owned()
    }
}

fn backbone() -> Frozen<Mlps> {
    Frozen::random(&MLPS, 1, device()).unwrap()
}

fn images() -> Tensor {
    let steps = Tensor::arange(6 * 3 * 64, (Kind::Float, device()));
    (steps * 12.9).sin().view([6, 3, 8, 8])
}

/// In a process of its own: libtorch's generator is the whole process's, and other tests draw from
/// it meanwhile.
#[test]
fn randomness_is_the_contracts() {
    if !child::is_alone("own_backbone::randomness_is_the_contracts") {
        return;
    }
    a_block_that_is_computed_again_draws_the_same();
    drop_path_follows_the_depth();
    recompute_and_kept_prefix_give_what_the_whole_pass_gives();
}

fn a_block_that_is_computed_again_draws_the_same() {
    let (backbone, images) = (backbone(), images());
    let run = |block: usize, seed: i64| {
        let pass = Pass { train: true, drop_path: 0.4, noise: Noise::from_seed(seed) };
        let stream = backbone.run_embed(&images, &NoMethod, pass).unwrap();
        backbone.run_block(block, stream, &NoMethod, pass).unwrap().tokens
    };
    assert_eq!(run(3, 7), run(3, 7));
    assert_ne!(run(3, 7), run(3, 8));
}

/// Drop path is linear over depth: none in the first block.
fn drop_path_follows_the_depth() {
    let (backbone, images) = (backbone(), images());
    let spread = |block: usize| {
        let pass = |drop_path, seed| Pass { train: true, drop_path, noise: Noise::from_seed(seed) };
        let run = |pass: Pass| {
            let stream = backbone.run_embed(&images, &NoMethod, pass).unwrap();
            backbone.run_block(block, stream, &NoMethod, pass).unwrap().tokens
        };
        (0..8).any(|seed| run(pass(0.9, seed)) != run(pass(0.0, seed)))
    };
    assert!(!spread(0) && spread(3));
}

fn recompute_and_kept_prefix_give_what_the_whole_pass_gives() {
    let lora =
        LoraConfig { targets: vec![convpass::petl::LinearTarget::Fc1], ..Default::default() };
    let config = PetlConfig { drop_path: 0.4, ..PetlConfig::new(Method::Lora(lora), 3) };
    let model = PetlModel::new(backbone(), &config).unwrap();
    let labels = Tensor::from_slice(&[0i64, 1, 2, 0, 1, 2]).to_device(device());
    let loss = |logits: &Tensor| Ok(logits.cross_entropy_for_logits(&labels));
    let gradients = |f: &dyn Fn()| {
        let mut variables: Vec<_> = model.var_store().variables().into_iter().collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        variables.iter_mut().for_each(|(_, variable)| variable.zero_grad());
        tch::manual_seed(5);
        f();
        variables.into_iter().map(|(_, variable)| variable.grad().copy()).collect::<Vec<_>>()
    };
    let whole = gradients(&|| loss(&model.forward(&images(), true).unwrap()).unwrap().backward());
    let again = gradients(&|| drop(model.backward_recomputed(&images(), loss).unwrap()));
    assert_eq!(whole, again);

    let still = PetlConfig { drop_path: 0.0, ..config };
    let model = PetlModel::new(backbone(), &still).unwrap();
    let prefix = model.frozen_prefix(&images()).unwrap();
    let logits = model.forward_from(prefix, false).unwrap();
    assert_eq!(logits, model.forward(&images(), false).unwrap());
}

#[test]
fn what_a_backbone_says_wrongly_of_itself_is_refused() {
    let error = Frozen::random(&Mlps { depth: 2, forgotten: 1, ..MLPS }, 1, device()).unwrap_err();
    assert!(error.to_string().contains("num_params"), "{error}");
    let partial = Frozen::random(&Mlps { lists_mix: false, ..MLPS }, 1, device()).unwrap();
    let error = PetlModel::new(partial, &PetlConfig::new(Method::BitFit, 3)).unwrap_err();
    assert!(error.to_string().contains("BackboneShape.layers must be every layer"), "{error}");
    // Nothing is folded into layers without names.
    let lora =
        LoraConfig { targets: vec![convpass::petl::LinearTarget::Fc1], ..Default::default() };
    let model = PetlModel::new(backbone(), &PetlConfig::new(Method::Lora(lora), 3)).unwrap();
    assert!(matches!(model.merged_backbone(), Err(Error::Config { .. })));
    // Images are checked before the backbone sees them.
    let wrong = Tensor::zeros([1, 3, 8, 9], (Kind::Float, device()));
    let refused = backbone().forward(&wrong, &NoMethod, Pass::default());
    assert!(matches!(refused, Err(Error::Input { argument: "images", .. })));
}

#[test]
fn it_keeps_the_contract_with_every_built_in_method_that_it_supports() {
    if !child::is_alone(
        "own_backbone::it_keeps_the_contract_with_every_built_in_method_that_it_supports",
    ) {
        return;
    }
    tch::set_num_threads(1);
    let still = Mlps { dropout: 0.0, ..MLPS };
    let still = Frozen::random(&still, 1, device()).unwrap();
    let images = images();
    // Without attention the sums of a gradient run in another order.
    let contract = Contract { recompute_gap: 1e-6, ..Contract::new(&images) };
    check_backbone(&still, &contract).unwrap_or_else(|failure| panic!("{failure}"));
    let failure = check_backbone(&backbone(), &contract).unwrap_err();
    assert!(failure.to_string().contains("kept prefix"), "{failure}");
}
