//! Counts of trainable weights.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Numbers of trainable weights and of the backbone's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainableParams {
    /// Weights of the method without the head. Papers report this number.
    pub method: usize,
    /// Weights of the classification head.
    pub head: usize,
    backbone: usize,
}

impl TrainableParams {
    /// Creates the counts of the method, the head and the backbone.
    pub fn new(method: usize, head: usize, backbone: usize) -> Self {
        TrainableParams { method, head, backbone }
    }

    /// Returns the sum of method and head.
    pub fn total(&self) -> usize {
        self.method + self.head
    }

    /// Returns the number of weights of the backbone. [`TrainableParams::total`] includes them only
    /// if the method trains them.
    pub fn backbone(&self) -> usize {
        self.backbone
    }

    /// Returns the weights of the method divided by those of the backbone, in percent.
    pub fn percent_of_backbone(&self) -> f64 {
        100.0 * self.method as f64 / self.backbone.max(1) as f64
    }
}

impl fmt::Display for TrainableParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} trainable ({} method + {} head); the method is {:.2} % of the backbone's {}",
            grouped(self.total()),
            grouped(self.method),
            grouped(self.head),
            self.percent_of_backbone(),
            grouped(self.backbone)
        )
    }
}

/// Groups digits by three: `327552` becomes `327,552`.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_groups_digits_and_gives_the_share() {
        let text = TrainableParams::new(327_552, 7_690, 85_798_656).to_string();
        let expected = "335,242 trainable (327,552 method + 7,690 head); \
                        the method is 0.38 % of the backbone's 85,798,656";
        assert_eq!(text, expected);
        assert_eq!([7, 123, 1234].map(grouped), ["7", "123", "1,234"]);
    }
}
