//! The operations of several processes.

use std::path::Path;
use std::time::{Duration, Instant};

use convpass::Error;
use convpass::distributed::{Launch, ProcessGroup};
use tch::{Device, Tensor};

use crate::team::{Team, is_member, said, say};

/// Long enough for processes that start on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(8);

fn connect() -> convpass::Result<ProcessGroup> {
    Ok(ProcessGroup::from_env(Device::Cpu, TIMEOUT)?.expect("the variables are set"))
}

/// What every process does, in the same order.
fn operations(folder: &Path) {
    let group = connect().unwrap();
    let (rank, size) = (group.rank(), group.world_size());
    assert_eq!((size, group.launch().local_rank, group.timeout()), (3, 0, TIMEOUT));
    let mut sum = Tensor::from_slice(&[rank as f32, 1.0]);
    group.all_reduce(&mut sum).unwrap();
    assert_eq!(sum, Tensor::from_slice(&[3f32, 3.0]));
    // A view that is not contiguous, of integers.
    let mut rows = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6]).view([2, 3]).transpose(0, 1);
    group.all_reduce(&mut rows).unwrap();
    assert_eq!(rows, Tensor::from_slice(&[3i64, 12, 6, 15, 9, 18]).view([3, 2]));
    for root in 0..size {
        let mut from = Tensor::from_slice(&[rank as f64]);
        group.broadcast(&mut from, root).unwrap();
        assert_eq!(f64::try_from(from).unwrap(), root as f64);
    }
    let mut none = Tensor::zeros([0], (tch::Kind::Float, Device::Cpu));
    group.all_reduce(&mut none).unwrap();
    let own: Vec<f64> = (0..rank).map(|number| number as f64 + 0.5).collect();
    let all = group.gather(&own).unwrap();
    assert_eq!(all, [vec![], vec![0.5], vec![0.5, 1.5]]);
    group.barrier().unwrap();
    let error = group.broadcast(&mut sum, 3).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
    group.agree("seed", "7").unwrap();
    let error = group.agree("backbone", if rank == 1 { "b" } else { "a" }).unwrap_err();
    say(folder, rank, &error.to_string());
}

#[test]
fn operations_of_three_processes() {
    if let Some((folder, _)) = is_member() {
        return operations(&folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let name = "distributed::operations_of_three_processes";
    let team = Team::start(name, folder.path(), "", 3, |_| true);
    let outcomes = team.wait(Duration::from_secs(120), |_| true);
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let said = said(folder.path(), rank);
        assert!(outcome, "rank {rank}: {said}");
        assert_eq!(said, "rank 1 differs from rank 0: its backbone is b instead of a");
    }
}

/// What a process says that waits for others in vain.
fn lonely(folder: &Path) {
    let launch = Launch::from_env().unwrap().unwrap();
    let started = Instant::now();
    let error = ProcessGroup::connect(&launch, Device::Cpu, TIMEOUT).unwrap_err();
    assert!(started.elapsed() < 3 * TIMEOUT, "{:?}", started.elapsed());
    say(folder, launch.rank, &error.to_string());
}

#[test]
fn a_rank_that_never_starts_is_named() {
    if let Some((folder, _)) = is_member() {
        return lonely(&folder);
    }
    for missing in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let name = "distributed::a_rank_that_never_starts_is_named";
        let team = Team::start(name, folder.path(), "", 3, |rank| rank != missing);
        let outcomes = team.wait(Duration::from_secs(120), |rank| rank != missing);
        for rank in (0..3).filter(|&rank| rank != missing) {
            let said = said(folder.path(), rank);
            assert!(outcomes[rank], "rank {rank}: {said}");
            assert!(said.contains(&format!("failed: rank {missing}: ")), "{said}");
        }
    }
}

#[test]
fn a_group_of_one_process_needs_nobody() {
    let launch = Launch {
        rank: 0,
        world_size: 1,
        local_rank: 0,
        address: "127.0.0.1".to_owned(),
        port: crate::team::free_port(),
        agent_store: false,
        restarts: 0,
    };
    let zero = ProcessGroup::connect(&launch, Device::Cpu, Duration::ZERO).unwrap_err();
    assert!(matches!(zero, Error::Config { .. }), "{zero}");
    let group = ProcessGroup::connect(&launch, Device::Cpu, TIMEOUT).unwrap();
    let mut sum = Tensor::from_slice(&[2f32]);
    group.all_reduce(&mut sum).unwrap();
    assert_eq!(sum, Tensor::from_slice(&[2f32]));
    assert_eq!(group.gather(&[1.0, 2.0]).unwrap(), [[1.0, 2.0]]);
    group.agree("seed", "7").unwrap();
    group.barrier().unwrap();
    group.leave("done");
}
