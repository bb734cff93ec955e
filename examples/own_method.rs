//! A method of one's own: a depthwise convolution beside each MLP, written from the public interface
//! alone. It trains on synthetic images, is saved, loaded and audited.
//!
//! `cargo run --release --example own_method`

use std::sync::Arc;

use convpass::petl::{ActsFrom, Init, Params, PetlMethod};
use convpass::seam::{BackboneShape, Beside, Place, Seam, Site, SubLayer};
use convpass::{Error, FrozenViT, Method, PetlConfig, PetlModel, Result, ViTConfig, audit};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

/// `X + MLP(LN(X)) + s * up(conv(down(LN(X))))`, where `conv` is a depthwise 3x3 convolution on the
/// patch grid.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Depthwise {
    /// h, the channels of the convolution.
    bottleneck_dim: i64,
    /// s, the factor on the output.
    scale: f64,
}

impl PetlMethod for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({ "bottleneck_dim": self.bottleneck_dim, "scale": self.scale })
    }

    fn validate(&self) -> Result<()> {
        if (1..=4096).contains(&self.bottleneck_dim) {
            return Ok(());
        }
        let (field, found) = ("bottleneck_dim".to_owned(), self.bottleneck_dim.to_string());
        Err(Error::Config { field, expected: "within 1..=4096".to_owned(), found })
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        true // `up` starts at zero.
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Block(0)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        let (h, mut blocks) = (self.bottleneck_dim, Vec::new());
        for (block, &c) in shape.block_dims.iter().enumerate() {
            let mut params = params.at(format_args!("blocks.{block}.depthwise"));
            blocks.push(Branch {
                down: params.get("down", &[h, c], Init::XavierUniform)?,
                kernel: params.get("kernel", &[h, 1, 3, 3], Init::IdentityKernel)?,
                up: params.get("up", &[c, h], Init::Constant(0.0))?,
            });
        }
        Ok(Box::new(Branches { blocks, scale: self.scale }))
    }
}

/// The weights of one block: `[h, C]`, `[h, 1, 3, 3]` and `[C, h]`.
#[derive(Debug)]
struct Branch {
    down: Tensor,
    kernel: Tensor,
    up: Tensor,
}

#[derive(Debug)]
struct Branches {
    blocks: Vec<Branch>,
    scale: f64,
}

impl Seam for Branches {
    fn is_beside(&self, site: Site) -> bool {
        site.sub_layer == SubLayer::Mlp && site.block < self.blocks.len()
    }

    fn beside(&self, at: &Beside, residual: Tensor) -> Result<Tensor> {
        if !self.is_beside(at.site) {
            return Ok(residual);
        }
        let Branch { down, kernel, up } = &self.blocks[at.site.block];
        let (prefix, (rows, cols)) = (at.layout.prefix, at.layout.grid);
        // The samples that drop path keeps: [K, P + N, C] -> [K, P + N, h].
        let tokens = at.branch.select(at.normed)?;
        let hidden = tokens.f_linear(down, None::<&Tensor>)?;
        // Patches are an image [K, h, rows, cols]; prefix tokens pass as they are.
        let mut parts = vec![hidden.f_narrow(1, 0, prefix)?];
        if rows * cols > 0 {
            let grid = hidden.f_narrow(1, prefix, rows * cols)?.f_unflatten(1, [rows, cols])?;
            let (grid, groups) = (grid.f_permute([0, 3, 1, 2])?, kernel.size()[0]);
            let grid = grid.f_conv2d(kernel, None::<&Tensor>, [1; 2], [1; 2], [1; 2], groups)?;
            parts.push(grid.f_flatten(2, 3)?.f_transpose(1, 2)?);
        }
        let mixed = Tensor::f_cat(&parts, 1)?;
        let output = mixed.f_linear(up, None::<&Tensor>)?.f_mul_scalar(self.scale)?;
        at.branch.add(&residual, &output)
    }
}

/// Images of stripes across and stripes down, and which of the two each is.
fn stripes(count: i64) -> Result<(Tensor, Tensor)> {
    let waves = Tensor::f_arange(16, (Kind::Float, Device::Cpu))?.f_mul_scalar(1.6)?.f_sin()?;
    let across = waves.f_view([1, 16, 1])?.f_expand([3, 16, 16], false)?;
    let down = across.f_transpose(1, 2)?;
    let labels = Tensor::f_arange(count, (Kind::Int64, Device::Cpu))?.f_remainder(2)?;
    let images = Tensor::f_stack(&[&across, &down], 0)?.f_index_select(0, &labels)?;
    let noise = Tensor::f_randn([count, 3, 16, 16], (Kind::Float, Device::Cpu))?;
    Ok((images.f_add(&noise)?, labels))
}

fn main() -> anyhow::Result<()> {
    tch::manual_seed(0);
    // A real backbone comes from `FrozenViT::open("vit.safetensors", device)`.
    let vit =
        ViTConfig { image_size: (16, 16), patch_size: 4, embed_dim: 64, ..Default::default() };
    let vit = ViTConfig { depth: 3, num_heads: 4, mlp_dim: 128, ..vit };
    let backbone = FrozenViT::random(&vit, 0, Device::Cpu)?;

    let method = Method::custom(Depthwise { bottleneck_dim: 8, scale: 1.0 });
    let row = audit(&vit, &method)?;
    println!("{}: {} weights, {:.2} % of the backbone", method.name(), row.params, row.percent);

    let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, 2))?;
    let mut optimizer = nn::AdamW::default().build(model.var_store(), 5e-3)?;
    for step in 0..=40 {
        let (images, labels) = stripes(32)?;
        let loss = model.forward(&images, true)?.cross_entropy_for_logits(&labels);
        optimizer.backward_step(&loss);
        if step % 10 == 0 {
            println!("step {step}: loss {:.3}", loss.f_double_value(&[])?);
        }
    }

    let folder = std::env::temp_dir().join(format!("own_method_{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("depthwise.safetensors");
    model.save_adapter(&path)?;
    let bytes = std::fs::metadata(&path)?.len();
    let loaded = PetlModel::load_adapter_with(backbone, &path, &|name, config| match name {
        "depthwise" => {
            let method: Arc<dyn PetlMethod> =
                Arc::new(serde_json::from_value::<Depthwise>(config.clone())?);
            Ok(method)
        }
        other => Err(format!("{other} is not known here").into()),
    })?;
    std::fs::remove_dir_all(&folder)?;

    let (images, labels) = stripes(200)?;
    let logits = |model: &PetlModel| tch::no_grad(|| model.forward(&images, false));
    let correct = logits(&loaded)?.f_argmax(1, false)?.f_eq_tensor(&labels)?;
    let accuracy = correct.f_to_kind(Kind::Float)?.f_mean(Kind::Float)?.f_double_value(&[])?;
    anyhow::ensure!(logits(&loaded)? == logits(&model)?, "the loaded model is another one");
    println!(
        "saved {bytes} bytes and loaded the same model: {:.0} % of new images",
        100.0 * accuracy
    );
    Ok(())
}
