//! An evolution over the widths of a space, within a parameter budget.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::ops::ControlFlow;

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::space::{SearchSpace, Widths};
use crate::error::{Error, Result};

/// The settings of an evolution. The default values are those of NOAH for VTAB-1k.
///
/// The first generation is drawn at random. The parents are the best candidates so far. In each
/// later generation, half of the candidates are mutants of a parent and half are crosses of two
/// parents. No candidate occurs twice. If a candidate is over the budget, random widths of it are
/// reduced until it fits. NOAH's own code differs: it draws such a candidate again, mutates only
/// the number of blocks that a method is in, and crosses all blocks of a method together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvolutionConfig {
    /// Number of generations, including the random one.
    pub generations: usize,
    /// Number of candidates in each generation.
    pub population: usize,
    /// Number of the best candidates so far that are parents.
    pub parents: usize,
    /// Probability that a width of a mutant is drawn anew.
    pub mutation_rate: f64,
    /// Seed of every draw.
    pub seed: i64,
}

impl Default for EvolutionConfig {
    fn default() -> Self {
        EvolutionConfig {
            generations: 15,
            population: 50,
            parents: 10,
            mutation_rate: 0.2,
            seed: 0,
        }
    }
}

impl EvolutionConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        let counts = [
            ("generations", self.generations),
            ("population", self.population),
            ("parents", self.parents),
        ];
        if let Some((field, _)) = counts.into_iter().find(|&(_, count)| count == 0) {
            return Err(Error::config(field, "1 or more", 0));
        }
        if (0.0..=1.0).contains(&self.mutation_rate) {
            Ok(())
        } else {
            Err(Error::config("mutation_rate", "within 0..=1", self.mutation_rate))
        }
    }
}

/// Widths and their score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The widths.
    pub widths: Widths,
    /// Number of weights that these widths train, without the head.
    pub params: i64,
    /// The score; higher is better.
    pub score: f64,
}

impl Candidate {
    /// Orders the higher score first, and fewer weights first if the scores are equal.
    fn rank(&self, other: &Candidate) -> Ordering {
        other.score.total_cmp(&self.score).then(self.params.cmp(&other.params))
    }
}

/// The candidates of an evolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evolution {
    /// The candidates of each generation, in the order in which they were scored.
    pub generations: Vec<Vec<Candidate>>,
    /// Whether the score function ended the evolution.
    pub stopped: bool,
}

impl Evolution {
    /// Returns the candidate with the highest score; with equal scores the one with the fewest
    /// weights, and then the first.
    pub fn best(&self) -> Option<&Candidate> {
        self.generations.iter().flatten().min_by(|a, b| a.rank(b))
    }
}

/// Searches `space` for the widths with the highest score among those with at most `budget`
/// weights.
///
/// If `score` returns `Break`, the search ends with the candidates so far. It also ends if it finds
/// no new candidate. The same seed and scores give the same candidates.
///
/// # Errors
/// [`Error::Config`] if the config is not valid or the narrowest widths exceed the budget;
/// [`Error::Input`] if a score is not a number; errors of `score`.
pub fn evolve(
    space: &SearchSpace,
    budget: i64,
    config: &EvolutionConfig,
    score: &mut dyn FnMut(&Widths) -> Result<ControlFlow<(), f64>>,
) -> Result<Evolution> {
    config.validate()?;
    space.check_budget(budget)?;
    let rng = ChaCha8Rng::seed_from_u64(config.seed as u64);
    let mut run =
        EvolutionRun { space, budget, config, rng, seen: HashSet::new(), parents: Vec::new() };
    let mut evolution = Evolution { generations: Vec::new(), stopped: false };
    for _ in 0..config.generations {
        let mut candidates = Vec::new();
        let flow = run.generation(&mut candidates, score)?;
        evolution.stopped = flow.is_break();
        if candidates.is_empty() {
            break;
        }
        run.select(&candidates);
        evolution.generations.push(candidates);
        if evolution.stopped {
            break;
        }
    }
    Ok(evolution)
}

struct EvolutionRun<'a> {
    space: &'a SearchSpace,
    budget: i64,
    config: &'a EvolutionConfig,
    rng: ChaCha8Rng,
    seen: HashSet<Widths>,
    /// The best candidates so far, the best first.
    parents: Vec<Candidate>,
}

impl EvolutionRun<'_> {
    fn generation(
        &mut self,
        candidates: &mut Vec<Candidate>,
        score: &mut dyn FnMut(&Widths) -> Result<ControlFlow<(), f64>>,
    ) -> Result<ControlFlow<()>> {
        for place in 0..self.config.population {
            let Some(widths) = self.unseen(place)? else { break };
            let ControlFlow::Continue(score) = score(&widths)? else {
                return Ok(ControlFlow::Break(()));
            };
            if score.is_nan() {
                let (expected, found) = ("a number".to_owned(), score.to_string());
                return Err(Error::Input { argument: "score", expected, found });
            }
            let params = self.space.num_params(&widths)?;
            candidates.push(Candidate { widths, params, score });
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Returns widths within the budget that were not a candidate before, or `None` if random draws
    /// find none.
    fn unseen(&mut self, place: usize) -> Result<Option<Widths>> {
        const TRIES: usize = 100;
        // If the parents have no new child, the widths are drawn from the whole space.
        for random in [self.parents.is_empty(), true] {
            for _ in 0..TRIES {
                let drawn =
                    if random { self.space.sample(&mut self.rng) } else { self.child(place) };
                let widths = self.space.within(self.budget, &drawn, &mut self.rng)?;
                if self.seen.insert(widths.clone()) {
                    return Ok(Some(widths));
                }
            }
        }
        Ok(None)
    }

    /// Returns a mutant in the first half of a generation and a cross in the second half.
    fn child(&mut self, place: usize) -> Widths {
        let EvolutionRun { space, config, rng, parents, .. } = self;
        let Some(a) = parents.choose(rng) else { return space.sample(rng) };
        match (place < config.population.div_ceil(2), parents.choose(rng)) {
            (false, Some(b)) => space.cross([&a.widths, &b.widths], rng),
            _ => space.mutate(&a.widths, config.mutation_rate, rng),
        }
    }

    fn select(&mut self, candidates: &[Candidate]) {
        self.parents.extend_from_slice(candidates);
        self.parents.sort_by(Candidate::rank);
        self.parents.truncate(self.config.parents);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::SearchModule;
    use convpass::backbone::{BackboneConfig, ViTConfig};

    fn space(widths: &[i64]) -> SearchSpace {
        let vit = ViTConfig { embed_dim: 12, depth: 4, num_heads: 1, ..ViTConfig::default() };
        let modules = SearchModule::noah().into_iter().take(2);
        let modules = modules.map(|module| SearchModule { widths: widths.into(), ..module });
        SearchSpace::new(modules.collect(), &vit.shape().unwrap()).unwrap()
    }

    /// The score is higher the nearer the widths are to the planted ones.
    fn score(widths: &Widths) -> Result<ControlFlow<(), f64>> {
        let planted = [[10, 0, 5, 1], [0, 5, 0, 10]];
        let gaps = planted.as_flattened().iter().zip(widths.0.iter().flatten());
        Ok(ControlFlow::Continue(-gaps.map(|(a, b)| (a - b).abs() as f64).sum::<f64>()))
    }

    #[test]
    fn the_planted_widths_are_found_within_their_own_budget() {
        let space = space(&[0, 1, 5, 10]);
        let planted = Widths(vec![vec![10, 0, 5, 1], vec![0, 5, 0, 10]]);
        let budget = space.num_params(&planted).unwrap();
        for seed in 0..4 {
            let config = EvolutionConfig { generations: 40, seed, ..EvolutionConfig::default() };
            let found = evolve(&space, budget, &config, &mut score).unwrap();
            assert_eq!(found.best().unwrap().widths, planted, "seed {seed}");
            let all: Vec<_> = found.generations.iter().flatten().collect();
            assert!(all.iter().all(|candidate| candidate.params <= budget));
            let params = |candidate: &&&Candidate| space.num_params(&candidate.widths).unwrap();
            assert!(all.iter().all(|candidate| params(&candidate) == candidate.params));
            let distinct: HashSet<_> = all.iter().map(|candidate| &candidate.widths).collect();
            assert_eq!((all.len(), distinct.len()), (40 * 50, all.len()));
        }
    }

    #[test]
    fn a_seed_repeats_a_search() {
        let space = space(&[0, 1, 5, 10]);
        let run = |seed| {
            let config = EvolutionConfig { generations: 3, seed, ..EvolutionConfig::default() };
            evolve(&space, 500, &config, &mut score).unwrap()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_small_space_is_seen_whole_and_no_more_than_once() {
        let (space, config) = (space(&[0, 1]), EvolutionConfig::default());
        let found = evolve(&space, i64::MAX, &config, &mut score).unwrap();
        assert_eq!(found.generations.iter().flatten().count(), 1 << 8);
        assert!(!found.stopped && found.generations.len() < config.generations);
        let found = evolve(&space, 0, &config, &mut score).unwrap();
        assert_eq!(found.best().unwrap().widths, space.narrowest());
        assert_eq!(found.best().unwrap().params, 0);
    }

    #[test]
    fn of_equal_scores_the_fewest_weights_win() {
        let (space, config) = (space(&[0, 1]), EvolutionConfig::default());
        let mut equal = |_: &Widths| Ok(ControlFlow::Continue(1.0));
        let found = evolve(&space, i64::MAX, &config, &mut equal).unwrap();
        assert_eq!(found.best().unwrap().widths, space.narrowest());
    }

    #[test]
    fn the_score_ends_a_search_and_what_was_scored_stays() {
        let (space, config) = (space(&[0, 1, 5, 10]), EvolutionConfig::default());
        let mut left = 60;
        let mut few = |widths: &Widths| match left {
            0 => Ok(ControlFlow::Break(())),
            _ => {
                left -= 1;
                score(widths)
            }
        };
        let found = evolve(&space, 900, &config, &mut few).unwrap();
        let sizes: Vec<_> = found.generations.iter().map(Vec::len).collect();
        assert_eq!((found.stopped, sizes), (true, vec![50, 10]));
        let none = evolve(&space, 900, &config, &mut few).unwrap();
        assert!(none.stopped && none.best().is_none());
    }

    #[test]
    fn searches_that_cannot_be_are_refused() {
        let (all, good) = (space(&[0, 1, 5, 10]), EvolutionConfig::default());
        let refused = |space, budget, config: EvolutionConfig| {
            let error = evolve(space, budget, &config, &mut score).unwrap_err();
            assert!(error.is_config(), "{error}");
        };
        refused(&all, -1, good.clone());
        let narrowest = space(&[1, 5]);
        let least = narrowest.num_params(&narrowest.narrowest()).unwrap();
        refused(&narrowest, least - 1, good.clone());
        let found = evolve(&narrowest, least, &good, &mut score).unwrap();
        assert_eq!(found.generations.iter().flatten().count(), 1);
        refused(&all, 900, EvolutionConfig { generations: 0, ..good.clone() });
        refused(&all, 900, EvolutionConfig { population: 0, ..good.clone() });
        refused(&all, 900, EvolutionConfig { parents: 0, ..good.clone() });
        refused(&all, 900, EvolutionConfig { mutation_rate: f64::NAN, ..good.clone() });
        let mut nan = |_: &Widths| Ok(ControlFlow::Continue(f64::NAN));
        let error = evolve(&all, 900, &good, &mut nan).unwrap_err();
        assert!(matches!(error, Error::Input { argument: "score", .. }), "{error}");
    }
}
