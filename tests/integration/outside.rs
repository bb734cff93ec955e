//! A method that the crate does not know, from the public interface alone.

use std::sync::Arc;

use convpass::petl::{ActsFrom, Init, LowBitConfig, Params, PetlMethod};
use convpass::seam::{BackboneShape, Layer, Place, Seam};
use convpass::testing::{self, check_method};
use convpass::{
    Error, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel, Result, ViTConfig, audit,
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::child;
use crate::support::{device, waves};

/// A matrix after the second layer of the MLPs from a block on.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Gate {
    first: usize,
    scale: f64,
}

impl PetlMethod for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn config(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap()
    }

    fn validate(&self) -> Result<()> {
        if self.scale.is_finite() {
            return Ok(());
        }
        let (field, found) = ("scale".to_owned(), self.scale.to_string());
        Err(Error::config(field, "finite", found))
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Block(self.first)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        let mut gates = Vec::new();
        for (block, &c) in shape.block_dims.iter().enumerate().skip(self.first) {
            let mut params = params.at(format_args!("blocks.{block}.gate"));
            let weight = params.get("weight", &[c, c], Init::Constant(0.0))?;
            gates.push((block, weight));
        }
        Ok(Box::new(Gates { gates, scale: self.scale }))
    }
}

#[derive(Debug)]
struct Gates {
    gates: Vec<(usize, Tensor)>,
    scale: f64,
}

impl Seam for Gates {
    fn after_layer(&self, layer: Layer, _: &Tensor, output: Tensor, _: bool) -> Result<Tensor> {
        let Layer::Fc2(block) = layer else { return Ok(output) };
        let Some((_, weight)) = self.gates.iter().find(|gate| gate.0 == block) else {
            return Ok(output);
        };
        let update = output.f_linear(weight, None::<&Tensor>)?.f_mul_scalar(self.scale)?;
        Ok(output.f_add(&update)?)
    }
}

fn gate() -> Method {
    Method::custom(Gate { first: 1, scale: 0.5 })
}

fn vit() -> ViTConfig {
    ViTConfig {
        image_size: (8, 8),
        patch_size: 4,
        embed_dim: 16,
        depth: 3,
        num_heads: 2,
        mlp_dim: 32,
        ..ViTConfig::default()
    }
}

fn backbone() -> FrozenViT {
    FrozenViT::random(&vit(), 1, device()).unwrap()
}

fn images() -> Tensor {
    waves(&[4, 3, 8, 8])
}

fn read(
    name: &str,
    config: &serde_json::Value,
) -> Result<Arc<dyn PetlMethod>, Box<dyn std::error::Error + Send + Sync>> {
    match name {
        "gate" => Ok(Arc::new(serde_json::from_value::<Gate>(config.clone())?)),
        other => Err(format!("{other} is not known here").into()),
    }
}

/// In a process of its own, as `testing` says.
#[test]
fn keeps_the_contract_alone_in_a_list_and_at_few_bits() {
    if !child::is_alone("outside::keeps_the_contract_alone_in_a_list_and_at_few_bits") {
        return;
    }
    tch::set_num_threads(1);
    let lora = Method::Lora(LoraConfig::default());
    let low_bit = Method::LowBit(LowBitConfig { bits: 4, method: Box::new(gate()) });
    for method in [gate(), Method::Compose { methods: vec![lora, gate()] }, low_bit] {
        check_method(&method, &backbone(), &images()).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn a_file_of_it_is_read_by_who_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(gate(), 3) };
    let model = PetlModel::new(backbone(), &config).unwrap();
    assert_eq!(model.frozen_blocks(), Some(1));
    testing::disturb(&model).unwrap();
    model.save_adapter(&path).unwrap();
    let again = PetlModel::load_adapter_with(backbone(), &path, &read).unwrap();
    assert_eq!(again.config(), model.config());
    let refused = PetlModel::load_adapter(backbone(), &path).unwrap_err();
    assert!(matches!(&refused, Error::OutsideMethod { name, .. } if name == "gate"), "{refused}");
    assert!(refused.to_string().contains("load_adapter_with"), "{refused}");
    let unknown = PetlModel::load_adapter_with(backbone(), &path, &|_, _| Err("no".into()));
    assert!(matches!(unknown, Err(Error::OutsideMethod { reason, .. }) if reason == "no"));
    assert_eq!(audit(&vit(), &gate()).unwrap().params, 2 * 16 * 16);
}

#[test]
fn json_keeps_name_and_config_and_a_typo_is_told() {
    let text = serde_json::to_string(&gate()).unwrap();
    let expected = r#"{"name":"custom","method":"gate","config":{"first":1,"scale":0.5}}"#;
    assert_eq!(text, expected);
    // Without its code it is equal, has its name, and is no model.
    let unread: Method = serde_json::from_str(&text).unwrap();
    assert_eq!((&unread, unread.name()), (&gate(), "gate"));
    let error = PetlModel::new(backbone(), &PetlConfig::new(unread, 3)).unwrap_err();
    assert!(error.to_string().contains("gate"), "{error}");
    assert_ne!(gate(), Method::custom(Gate { first: 2, scale: 0.5 }));
    let typo = serde_json::from_str::<Method>(r#"{"name":"lorra"}"#).unwrap_err().to_string();
    assert!(typo.contains("lorra") && typo.contains("`lora`"), "{typo}");
    let wrong = PetlConfig::new(Method::custom(Gate { first: 0, scale: f64::NAN }), 3);
    assert!(matches!(PetlModel::new(backbone(), &wrong), Err(Error::Config { .. })));
}

/// What enters a model from outside is checked once, at the door.
#[test]
fn tokens_that_their_layout_does_not_describe_are_refused() {
    let config = PetlConfig::new(Method::ConvBypass(Default::default()), 3);
    let model = PetlModel::new(backbone(), &config).unwrap();
    let mut stream = model.frozen_prefix(&images()).unwrap();
    stream.layout.grid = (1, 1);
    let error = model.forward_from(stream, false).unwrap_err();
    assert!(matches!(error, Error::Input { argument: "tokens", .. }), "{error}");
}
