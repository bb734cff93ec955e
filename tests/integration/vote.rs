//! The vote of an ensemble against scipy's mode.

use convpass::Error;
use convpass::eval::{predictions, vote};
use serde::Deserialize;
use tch::Tensor;

#[derive(Deserialize)]
struct Case {
    votes: Vec<Vec<Option<i64>>>,
    answers: Vec<Option<i64>>,
}

#[test]
fn the_vote_is_scipys_mode() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("fixtures/vote/vote.json")).unwrap();
    assert_eq!(cases.len(), 5);
    for case in &cases {
        assert_eq!(vote(&case.votes).unwrap(), case.answers);
        // The order of the members does not matter.
        let turned: Vec<_> = case.votes.iter().rev().collect();
        assert_eq!(vote(&turned).unwrap(), case.answers);
    }
    assert!(cases.iter().any(|case| case.answers.contains(&None)));
}

#[test]
fn ties_go_to_the_smallest_class() {
    let votes = [[2, 1], [1, 1], [2, 0], [0, 0]].map(|votes| votes.map(Some));
    assert_eq!(vote(&votes).unwrap(), [Some(2), Some(0)]);
    let votes = [3, 0, 3, 0, 1].map(|class| [Some(class)]);
    assert_eq!(vote(&votes).unwrap(), [Some(0)]);
}

#[test]
fn what_is_no_vote_counts_for_no_class() {
    let logits = [
        [0.0, 2.0, 1.0],
        [1.0, 1.0, 0.0],
        [f64::NAN, 5.0, 0.0],
        [0.0, f64::INFINITY, 0.0],
        [-1.0, -2.0, f64::NEG_INFINITY],
    ];
    let found = predictions(&Tensor::from_slice2(&logits)).unwrap();
    assert_eq!(found, [Some(1), Some(0), None, None, None]);
    let votes = [[None, None], [Some(4), None], [None, None]];
    assert_eq!(vote(&votes).unwrap(), [Some(4), None]);
    assert_eq!(vote(&[[]; 3]).unwrap(), []);
}

#[test]
fn votes_that_do_not_fit_are_refused() {
    let refused = |votes: &[Vec<Option<i64>>]| match vote(votes) {
        Err(Error::Input { argument: "members", found, .. }) => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[]), "none");
    assert_eq!(refused(&[vec![Some(0)], vec![]]), "0 of member 1");
    assert_eq!(refused(&[vec![Some(0)], vec![Some(-1)]]), "-1 of member 1");
    for shape in [&[4][..], &[2, 0], &[1, 2, 2]] {
        let logits = Tensor::zeros(shape, (tch::Kind::Float, tch::Device::Cpu));
        assert!(matches!(predictions(&logits), Err(Error::Input { .. })), "{shape:?}");
    }
    assert!(matches!(predictions(&Tensor::new()), Err(Error::Input { .. })));
}
