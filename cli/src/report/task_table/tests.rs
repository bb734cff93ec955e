use super::*;

fn run(task: &str, method: &str, seed: i64, top1: f64) -> SeedRun {
    let params = TrainableParams::new(27_680, 1_290, 1_000_000);
    let (task, method) = (task.to_owned(), method.to_owned());
    SeedRun { task, method, seed, top1, best_on_test: None, params, seconds: 2.0 }
}

fn table(tasks: &[&str], methods: &[&str], seeds: &[i64], runs: Vec<SeedRun>) -> TaskTable {
    let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    TaskTable { tasks: owned(tasks), methods: owned(methods), seeds: seeds.to_vec(), runs }
}

fn all_tasks() -> Vec<&'static str> {
    vtab::TASKS.iter().map(|task| task.name).collect()
}

fn close(found: Option<Spread>, mean: f64, deviation: Option<f64>) {
    let found = found.unwrap();
    assert!((found.mean - mean).abs() < 0.006, "{found:?}");
    match (found.deviation, deviation) {
        (Some(a), Some(b)) => assert!((a - b).abs() < 1e-9, "{found:?}"),
        pair => assert_eq!(pair.0, pair.1),
    }
}

#[test]
fn the_published_figures_give_the_published_averages() {
    // Seeds 1 and 2 are one point apart on every task, and so are their averages.
    let of_seed = |seed: i64| {
        let top1 = move |row: &VtabTask| row.convpass_top1 + (seed - 1) as f64;
        vtab::TASKS.iter().map(move |row| run(row.name, "Convpass", seed, top1(row)))
    };
    let runs = (0..3).flat_map(of_seed).collect();
    let table = table(&all_tasks(), &["Convpass"], &[0, 1, 2], runs);
    close(table.average("Convpass", Average::G, Figure::Top1), 76.56, Some(1.0));
    close(table.average("Convpass", Average::A, Figure::Top1), 74.44, Some(1.0));
    assert_eq!(table.average("Convpass", Average::Other, Figure::Top1), None);
    close(table.cell("kitti", "Convpass", Figure::Top1), 80.03, Some(1.0));
    let text = table.to_string();
    assert!(!text.contains("subset") && !text.contains("best-on-test"), "{text}");
    assert!(
        text.contains("76.56 ± 1.00   76.56") && text.contains("74.44 ± 1.00   74.44"),
        "{text}"
    );
}

#[test]
fn a_subset_says_so_and_has_g_only_with_every_group() {
    let runs = vec![
        run("cifar", "m", 0, 50.0),
        run("svhn", "m", 0, 70.0),
        run("eurosat", "m", 0, 90.0),
        run("count", "m", 0, 10.0),
    ];
    let mut table = table(&[&all_tasks()[..], &["count"]].concat(), &["m"], &[0], runs);
    assert_eq!(table.average("m", Average::G, Figure::Top1), None);
    close(table.average("m", Average::A, Figure::Top1), 70.0, None);
    close(table.average("m", Average::Other, Figure::Top1), 10.0, None);
    table.runs.push(run("kitti", "m", 0, 30.0));
    close(table.average("m", Average::G, Figure::Top1), 60.0, None);
    close(table.average("m", Average::A, Figure::Top1), 60.0, None);
    let text = table.to_string();
    let expected = "4 of its 19 tasks (natural 2 of 7, specialized 1 of 4, structured 1 of 8)";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("in neither G nor A: count"), "{text}");
}

#[test]
fn an_average_is_over_seeds_that_have_every_task() {
    let mut runs = vec![run("cifar", "a", 0, 10.0), run("svhn", "a", 0, 20.0)];
    runs.extend([run("cifar", "a", 1, 90.0), run("cifar", "b", 0, 30.0)]);
    let table = table(&["cifar", "svhn"], &["a", "b", "c"], &[0, 1], runs);
    let average = |method| table.average(method, Average::A, Figure::Top1);
    assert_eq!(average("a"), Some(Spread { mean: 15.0, deviation: None, seeds: 1 }));
    assert_eq!((average("b"), average("c")), (None, None));
    assert_eq!(table.cell("cifar", "a", Figure::Top1).unwrap().seeds, 2);
    assert!(table.to_string().contains("15.00*"));
}

#[test]
fn best_on_test_stands_under_its_own_name_alone() {
    let mut chosen = run("cifar", "a", 0, 10.0);
    chosen.best_on_test = Some(99.0);
    let table = table(&["cifar"], &["a"], &[0], vec![chosen]);
    let text = table.to_string();
    let (honest, chosen) = text.split_once("The best epoch on the test images").unwrap();
    assert!(!honest.contains("99.00") && chosen.contains("best-on-test"), "{text}");
    assert!(chosen.contains("99.00"), "{text}");
    close(table.average("a", Average::A, Figure::BestOnTest), 99.0, None);
}

#[test]
fn nothing_to_show_is_no_panic() {
    assert!(TaskTable::default().to_string().contains("one seed"));
    assert_eq!(Spread::of(&[]), None);
}
