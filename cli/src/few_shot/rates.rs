//! The learning rates of a run, and the grid of rates around them.

use std::fmt;

use convpass::Method;

/// The step of the grid: a rate is divided by it, and multiplied by it.
const STEP: f64 = 5.0;

/// The peak learning rates of the method and of the head. `Display` writes `lr=0.001,
/// head_lr=0.005`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    pub lr: f64,
    pub head_lr: f64,
}

impl Rates {
    /// Returns the grid of FewTrans (arXiv 2603.00478) around these rates: each rate divided by 5,
    /// as it is, and times 5. The rate of the head changes fastest. A linear probe trains the head
    /// alone, so that its grid has only the three rates of the head.
    pub fn grid(self, method: &Method) -> Vec<Rates> {
        let axis = |centre: f64| vec![rounded(centre / STEP), centre, rounded(centre * STEP)];
        let lrs = if *method == Method::LinearProbe { vec![self.lr] } else { axis(self.lr) };
        let heads = axis(self.head_lr);
        let pairs = |lr| heads.iter().map(move |&head_lr| Rates { lr, head_lr });
        lrs.into_iter().flat_map(pairs).collect()
    }

    /// Returns the rate of the head divided by that of the method.
    pub fn head_lr_factor(self) -> f64 {
        if self.head_lr == self.lr { 1.0 } else { self.head_lr / self.lr }
    }

    /// Returns the name of the folder of these rates.
    pub fn folder(self) -> String {
        self.to_string().replace(", ", ",")
    }
}

/// Rounds to 12 digits, so that 1e-5 divided by 5 is 2e-6, which a person can give as a flag.
fn rounded(rate: f64) -> f64 {
    format!("{rate:.11e}").parse().unwrap_or(rate)
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As short as can be: 2e-6, not 0.000002.
        write!(f, "lr={:?}, head_lr={:?}", self.lr, self.head_lr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rates of FewTrans for LoRA.
    #[test]
    fn the_grid_is_that_of_fewtrans() {
        let centre = Rates { lr: 2e-3, head_lr: 1e-2 };
        let grid = centre.grid(&Method::BitFit);
        let expected = [4e-4, 2e-3, 1e-2].map(|lr| [2e-3, 1e-2, 5e-2].map(|h| (lr, h)));
        let found: Vec<_> = grid.iter().map(|rates| (rates.lr, rates.head_lr)).collect();
        assert_eq!(found, expected.concat());
        assert_eq!(grid[0].folder(), "lr=0.0004,head_lr=0.002");
        assert_eq!((grid[0].head_lr_factor(), grid[6].head_lr_factor()), (5.0, 0.2));
        let small = Rates { lr: 1e-5, head_lr: 1e300 }.grid(&Method::BitFit)[0];
        assert_eq!(small.folder(), "lr=2e-6,head_lr=2e299");
        let probe = centre.grid(&Method::LinearProbe);
        assert_eq!(probe.iter().map(|rates| rates.lr).collect::<Vec<_>>(), [2e-3; 3]);
        assert_eq!(
            probe.iter().map(|rates| rates.head_lr).collect::<Vec<_>>(),
            expected[0].map(|p| p.1)
        );
    }
}
