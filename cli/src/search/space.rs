//! The space of a search: a width for each method in each block.

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use convpass::model::audit_shape;
use convpass::petl::{
    AdaptFormerConfig, AdapterConfig, ConvBypassVariant, LoraConfig, Method, VptConfig,
};
use convpass::seam::BackboneShape;

/// A method of the mix and the widths (bottleneck, rank, prompts) that it may have in a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchModule {
    /// Adapter, AdaptFormer, Convpass, LoRA or VPT. The width in its config is not read. The
    /// exception is LoRA: its factor is `alpha / rank` of this config at every width, so that a
    /// narrower LoRA is a slice of a wider one.
    pub method: Method,
    /// The widths to choose from; with 0 a block does not have the method.
    pub widths: Vec<i64>,
}

impl SearchModule {
    /// Returns the space of NOAH: Adapter after the MLP, LoRA with a factor of 1 on queries and
    /// values, and deep prompts. The widths are those of the subnets that its authors released for
    /// VTAB-1k.
    ///
    /// The authors' space does not have the width 0; there a module is in the first 3, 6, 9 or 12
    /// blocks. A 0 in any block allows more than that. Their LoRA also acts on the keys.
    pub fn noah() -> Vec<Self> {
        let lora = LoraConfig { rank: 1, alpha: 1.0, ..LoraConfig::default() };
        [Method::Adapter(Default::default()), Method::Lora(lora), Method::Vpt(Default::default())]
            .map(|method| SearchModule { method, widths: vec![0, 1, 5, 10] })
            .into()
    }

    /// Returns the method with one width for each block, as a list of methods: none if all widths
    /// are 0, and one for each rank in use for LoRA.
    fn with_widths(&self, blocks: &[i64]) -> Result<Vec<Method>> {
        let own = Some(blocks.to_vec());
        let method = match &self.method {
            Method::Adapter(config) => {
                Method::Adapter(AdapterConfig { blocks: own, ..config.clone() })
            }
            Method::AdaptFormer(config) => {
                Method::AdaptFormer(AdaptFormerConfig { blocks: own, ..config.clone() })
            }
            Method::ConvBypass(config) => Method::ConvBypassVariant(ConvBypassVariant {
                blocks: own,
                ..config.clone().into()
            }),
            Method::ConvBypassVariant(config) => {
                Method::ConvBypassVariant(ConvBypassVariant { blocks: own, ..config.clone() })
            }
            Method::Vpt(config) => Method::Vpt(VptConfig { blocks: own, ..config.clone() }),
            Method::Lora(config) => return Ok(lora_by_rank(config, blocks)),
            other => {
                let expected = "methods with a width for each block \
                                (adapter, adapt_former, conv_bypass, lora, vpt)";
                return Err(Error::config("modules", expected, other.name()));
            }
        };
        let empty = blocks.iter().all(|&width| width == 0);
        Ok(if empty { Vec::new() } else { vec![method] })
    }
}

/// Returns one LoRA for each rank in use, so that the factor `alpha / r` is the same in every
/// block.
fn lora_by_rank(config: &LoraConfig, blocks: &[i64]) -> Vec<Method> {
    let mut ranks: Vec<i64> = blocks.iter().copied().filter(|&rank| rank != 0).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let factor = config.alpha / config.rank as f64;
    let of_rank = |rank| {
        let own = blocks.iter().map(|&width| if width == rank { rank } else { 0 }).collect();
        let (alpha, blocks) = (factor * rank as f64, Some(own));
        Method::Lora(LoraConfig { rank, alpha, blocks, ..config.clone() })
    };
    ranks.into_iter().map(of_rank).collect()
}

/// A point of a [`SearchSpace`]: for each of its modules, in order, the width in each block.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Widths(pub Vec<Vec<i64>>);

/// Every mix of some methods beside one backbone, with the cost of each in weights.
#[derive(Clone, Debug)]
pub struct SearchSpace {
    modules: Vec<SearchModule>,
    blocks: usize,
    /// The weights of module m in block b with its width of index k, as `[m][b][k]`. The cost of a
    /// mix is their sum, because no method here shares weights between blocks.
    costs: Vec<Vec<Vec<i64>>>,
}

impl SearchSpace {
    /// Returns the mixes of `modules` beside a backbone of this shape ([`Backbone::shape`]).
    ///
    /// # Errors
    /// [`Error::Config`] if there is no module, a module has no widths, or a method does not
    /// support a width for each block or does not support this backbone.
    ///
    /// [`Backbone::shape`]: convpass::Backbone::shape
    pub fn new(mut modules: Vec<SearchModule>, shape: &BackboneShape) -> Result<Self> {
        if modules.is_empty() {
            return Err(Error::config("modules", "at least one", 0));
        }
        for module in &mut modules {
            module.method.validate()?;
            module.widths.sort_unstable();
            module.widths.dedup();
            if module.widths.is_empty() {
                return Err(Error::config("widths", "at least one", 0));
            }
        }
        let costs = modules.iter().map(|module| costs(module, shape)).collect::<Result<_>>()?;
        Ok(SearchSpace { modules, blocks: shape.block_dims.len(), costs })
    }

    /// Returns the methods with their widths in ascending order.
    pub fn modules(&self) -> &[SearchModule] {
        &self.modules
    }

    /// Returns the largest width of each module in every block: the widths of the supernet.
    pub fn widest(&self) -> Widths {
        self.each(|module| module.widths.last())
    }

    /// Returns the smallest width of each module in every block.
    pub fn narrowest(&self) -> Widths {
        self.each(|module| module.widths.first())
    }

    fn each<'a>(&'a self, width: impl Fn(&'a SearchModule) -> Option<&'a i64>) -> Widths {
        let block = |module| vec![width(module).copied().unwrap_or_default(); self.blocks];
        Widths(self.modules.iter().map(block).collect())
    }

    /// Returns the method of these widths: a [`Method::Compose`], or the linear probe if all are 0.
    ///
    /// # Errors
    /// [`Error::Config`] if they are not of this space.
    pub fn method(&self, widths: &Widths) -> Result<Method> {
        self.choices(widths)?;
        let parts = self.modules.iter().zip(&widths.0);
        let parts = parts.map(|(module, blocks)| module.with_widths(blocks));
        let methods: Vec<Method> =
            parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        if methods.is_empty() { Ok(Method::LinearProbe) } else { Ok(Method::Compose { methods }) }
    }

    /// Returns the number of weights that the method of these widths trains, without the head.
    ///
    /// # Errors
    /// [`Error::Config`] if they are not of this space.
    pub fn num_params(&self, widths: &Widths) -> Result<i64> {
        Ok(self.cost(&self.choices(widths)?))
    }

    /// Checks that a mix within `budget` weights exists.
    ///
    /// # Errors
    /// [`Error::Config`] if the narrowest mix has more.
    pub fn check_budget(&self, budget: i64) -> Result<()> {
        let least = self.num_params(&self.narrowest())?;
        if budget < least {
            let expected = format!("at least {least}, which the narrowest mix trains");
            return Err(Error::config("budget", expected, budget));
        }
        Ok(())
    }

    /// Returns each width as its index in the list of its module.
    fn choices(&self, widths: &Widths) -> Result<Choices> {
        let (modules, blocks) = (self.modules.len(), self.blocks);
        if widths.0.len() != modules || widths.0.iter().any(|module| module.len() != blocks) {
            let expected = format!("{modules} lists of {blocks}");
            return Err(Error::config("widths", expected, format!("{:?}", widths.0)));
        }
        let index = |module: &SearchModule, width: &i64| {
            module.widths.binary_search(width).map_err(|_| {
                let expected = format!("among {:?} for {}", module.widths, module.method.name());
                Error::config("widths", expected, width)
            })
        };
        let choices = self.modules.iter().zip(&widths.0);
        let choices = choices.map(|(m, blocks)| blocks.iter().map(|w| index(m, w)).collect());
        choices.collect::<Result<_>>().map(Choices)
    }

    fn cost(&self, choices: &Choices) -> i64 {
        self.places().map(|(m, b)| self.costs[m][b][choices.0[m][b]]).fold(0, i64::saturating_add)
    }

    /// Returns every pair of a module and a block.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (modules, blocks) = (self.modules.len(), self.blocks);
        (0..modules).flat_map(move |module| (0..blocks).map(move |block| (module, block)))
    }

    fn widths(&self, choices: &Choices) -> Widths {
        let of = |(m, blocks): (&SearchModule, &Vec<usize>)| {
            blocks.iter().map(|&choice| m.widths[choice]).collect()
        };
        Widths(self.modules.iter().zip(&choices.0).map(of).collect())
    }

    /// Draws each width uniformly from its list, regardless of the cost.
    pub(super) fn sample(&self, rng: &mut impl Rng) -> Widths {
        let mut draw = |module: &SearchModule| {
            (0..self.blocks)
                .map(|_| module.widths.choose(rng).copied().unwrap_or_default())
                .collect()
        };
        Widths(self.modules.iter().map(&mut draw).collect())
    }

    /// Returns `parent` with each width drawn anew with probability `rate`.
    pub(super) fn mutate(&self, parent: &Widths, rate: f64, rng: &mut impl Rng) -> Widths {
        let mut child = parent.clone();
        for (m, b) in self.places() {
            if rng.random_bool(rate) {
                child.0[m][b] = self.modules[m].widths.choose(rng).copied().unwrap_or_default();
            }
        }
        child
    }

    /// Returns widths that are each drawn from one of the two parents.
    pub(super) fn cross(&self, [a, b]: [&Widths; 2], rng: &mut impl Rng) -> Widths {
        let mut child = a.clone();
        for (module, block) in self.places().filter(|_| rng.random_bool(0.5)) {
            child.0[module][block] = b.0[module][block];
        }
        child
    }

    /// Returns `widths` within `budget`: while the cost is too high, a random width is replaced by
    /// the next smaller one. The narrowest widths must not cost more than `budget`.
    pub(super) fn within(
        &self,
        budget: i64,
        widths: &Widths,
        rng: &mut impl Rng,
    ) -> Result<Widths> {
        let mut choices = self.choices(widths)?;
        let mut cost = self.cost(&choices);
        while cost > budget {
            let wide: Vec<_> = self.places().filter(|&(m, b)| choices.0[m][b] > 0).collect();
            let Some(&(m, b)) = wide.choose(rng) else {
                return Err(Error::config("budget", format!("at least {cost}"), budget));
            };
            let choice = &mut choices.0[m][b];
            cost -= self.costs[m][b][*choice] - self.costs[m][b][*choice - 1];
            *choice -= 1;
        }
        Ok(self.widths(&choices))
    }
}

/// [`Widths`] as indices into the modules' lists.
struct Choices(Vec<Vec<usize>>);

/// Returns the number of weights of a module in each block with each of its widths.
fn costs(module: &SearchModule, shape: &BackboneShape) -> Result<Vec<Vec<i64>>> {
    let count = shape.block_dims.len();
    let cost = |block: usize, width: i64| {
        let mut blocks = vec![0; count];
        blocks[block] = width;
        module.with_widths(&blocks)?.iter().try_fold(0i64, |sum, method| {
            method.validate()?;
            Ok(sum.saturating_add(audit_shape(shape, method)?.params))
        })
    };
    let widths = |block| module.widths.iter().map(|&width| cost(block, width)).collect();
    (0..count).map(widths).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use convpass::backbone::{BackboneConfig, ViTConfig};
    use convpass::model::audit;
    use convpass::petl::{ConvBypassConfig, SsfConfig};

    fn vit() -> ViTConfig {
        ViTConfig { embed_dim: 24, depth: 3, num_heads: 2, mlp_dim: 40, ..ViTConfig::default() }
    }

    /// Every method with a width for each block.
    fn every_module() -> Vec<SearchModule> {
        let convpass = Method::ConvBypass(ConvBypassConfig::default());
        let more = [Method::AdaptFormer(AdaptFormerConfig::default()), convpass];
        let more = more.map(|method| SearchModule { method, widths: vec![6, 0, 2, 2] });
        SearchModule::noah().into_iter().chain(more).collect()
    }

    #[test]
    fn what_widths_cost_is_what_the_audit_counts() {
        let space = SearchSpace::new(every_module(), &vit().shape().unwrap()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn = (0..20).map(|_| space.sample(&mut rng));
        for widths in drawn.chain([space.widest(), space.narrowest()]) {
            let method = space.method(&widths).unwrap();
            let params = audit(&vit(), &method).unwrap().params;
            assert_eq!(space.num_params(&widths).unwrap(), params, "{widths:?}");
            let text = serde_json::to_string(&method).unwrap();
            assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method);
        }
        assert_eq!(space.method(&space.narrowest()).unwrap(), Method::LinearProbe);
        assert_eq!(space.modules()[3].widths, [0, 2, 6]);
    }

    #[test]
    fn noahs_space_beside_a_vit_b() {
        let shape = ViTConfig::preset("vit_base_patch16_224").unwrap().shape().unwrap();
        let space = SearchSpace::new(SearchModule::noah(), &shape).unwrap();
        // Adapter 2hC + h + C, LoRA 2 * 2rC, prompts C each; 12 blocks of 10.
        let expected = 12 * ((20 * 768 + 10 + 768) + 40 * 768 + 10 * 768);
        assert_eq!(space.num_params(&space.widest()).unwrap(), expected);
    }

    #[test]
    fn loras_factor_is_the_same_at_every_rank() {
        let method = Method::Lora(LoraConfig { rank: 4, alpha: 2.0, ..LoraConfig::default() });
        let modules = vec![SearchModule { method, widths: vec![0, 1, 3, 8] }];
        let space = SearchSpace::new(modules, &vit().shape().unwrap()).unwrap();
        let method = space.method(&Widths(vec![vec![8, 0, 1]])).unwrap();
        let Method::Compose { methods } = method else { panic!("{method:?}") };
        let found = methods.into_iter().map(|method| match method {
            Method::Lora(config) => (config.alpha / config.rank as f64, config.blocks.unwrap()),
            other => panic!("{other:?}"),
        });
        assert_eq!(found.collect::<Vec<_>>(), [(0.5, vec![0, 0, 1]), (0.5, vec![8, 0, 0])]);
    }

    #[test]
    fn spaces_and_widths_that_cannot_be_are_refused() {
        let refused = |modules: Vec<SearchModule>| {
            let error = SearchSpace::new(modules, &vit().shape().unwrap()).unwrap_err();
            assert!(error.is_config(), "{error}");
        };
        let module = |method, widths: &[i64]| vec![SearchModule { method, widths: widths.into() }];
        let lora = |rank| Method::Lora(LoraConfig { rank, ..LoraConfig::default() });
        refused(Vec::new());
        refused(module(lora(8), &[]));
        refused(module(lora(8), &[0, -1]));
        refused(module(lora(8), &[0, i64::MAX]));
        refused(module(lora(0), &[0, 1]));
        refused(module(Method::Ssf(SsfConfig::default()), &[0, 1]));
        refused(module(Method::Vpt(VptConfig { deep: false, ..VptConfig::default() }), &[0, 1]));

        let space = SearchSpace::new(module(lora(8), &[0, 4]), &vit().shape().unwrap()).unwrap();
        for widths in [vec![vec![0, 4]], vec![vec![0, 4, 2]], vec![vec![0; 3]; 2], Vec::new()] {
            let error = space.method(&Widths(widths.clone())).unwrap_err();
            assert!(matches!(&error, Error::Config { field, .. } if field == "widths"), "{error}");
            space.num_params(&Widths(widths)).unwrap_err();
        }
    }
}
