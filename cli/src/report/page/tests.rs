//! The page is read back as a browser would read it.

use scraper::{ElementRef, Html, Selector};

use super::super::folder_report::Report;
use super::super::predictions::Predictions;
use super::super::predictions::tests::of;
use super::super::runs::FoundRun;
use super::super::testing::run;
use super::STYLE;
use crate::error::Error;
use convpass::data::vtab::TASKS;

fn read(report: &Report) -> Html {
    let html = Html::parse_document(&report.html().unwrap());
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    html
}

fn all<'a>(html: &'a Html, selector: &str) -> Vec<ElementRef<'a>> {
    html.select(&Selector::parse(selector).unwrap()).collect()
}

fn text(element: ElementRef) -> String {
    element.text().collect::<String>().trim().to_owned()
}

/// Of each table its head and its rows, as text; a row starts with its label.
fn tables(html: &Html) -> Vec<Vec<Vec<String>>> {
    let (row, cell) = (Selector::parse("tr").unwrap(), Selector::parse("th, td").unwrap());
    let cells = |row: ElementRef| row.select(&cell).map(text).collect::<Vec<_>>();
    all(html, "table").into_iter().map(|table| table.select(&row).map(cells).collect()).collect()
}

fn row<'a>(table: &'a [Vec<String>], label: &str) -> &'a [String] {
    table.iter().find(|row| row[0] == label).unwrap()
}

/// Nothing is asked for from elsewhere and nothing is run.
fn is_harmless(html: &Html) {
    assert!(all(html, "script, iframe, object, link, base, form").is_empty());
    for element in all(html, "*") {
        for (name, value) in element.value().attrs() {
            assert!(!name.starts_with("on"), "{name}");
            if ["src", "href", "srcset", "xlink:href", "action"].contains(&name) {
                assert!(value.starts_with('#') || value.starts_with("data:image/"), "{value}");
            }
        }
    }
    assert!(!STYLE.contains("url(") && !STYLE.contains("@import"));
}

#[test]
fn the_tables_have_the_records_numbers() {
    let top1 = |index: usize, seed: i64| 40.0 + 1.37 * index as f64 + seed as f64;
    let runs: Vec<FoundRun> = TASKS
        .iter()
        .enumerate()
        .flat_map(|(i, task)| [0, 1].map(|seed| run(task.name, "conv_bypass", seed, top1(i, seed))))
        .chain([run("mine", "vpt", 0, 12.345)])
        .collect();
    let html = read(&Report::of(runs));
    let tables = tables(&html);
    let [vtab, own, list] = &tables[..] else { panic!("{} tables", tables.len()) };
    let own_row = row(vtab, "Convpass");
    for (index, task) in TASKS.iter().enumerate() {
        let at = vtab[0].iter().position(|head| head == task.name).unwrap();
        let mean = (top1(index, 0) + top1(index, 1)) / 2.0;
        assert_eq!(own_row[at], format!("{mean:.2}±0.71"));
    }
    let paper = vtab.iter().rev().find(|row| row[0] == "Convpass" && row[1] == "76.56").unwrap();
    assert_eq!(paper[vtab[0].iter().position(|head| head == "G").unwrap()], "76.56");
    assert_eq!(paper[vtab[0].iter().position(|head| head == "A").unwrap()], "74.44");
    assert_eq!((&own[0][1][..], &row(own, "VPT-deep")[1][..]), ("mine", "12.35"));
    assert_eq!(list.len(), 1 + 2 * TASKS.len() + 1);
    assert_eq!(row(list, "mine-vpt-0")[8], "12.35");
    is_harmless(&html);
}

#[test]
fn what_a_user_names_is_text() {
    const EVIL: &str = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>";
    let mut evil = run(EVIL, "conv_bypass", 0, 50.0);
    evil.name = EVIL.into();
    evil.record.backbone = EVIL.to_owned();
    evil.record.backbone_digest = EVIL.to_owned();
    let mut predictions: Predictions = of(&[(0, 0, 0.9), (0, 1, 0.8), (1, 1, 0.7)], 2);
    predictions.class_names = vec![EVIL.to_owned(), "ok".to_owned()];
    predictions.images[1].path = EVIL.to_owned();
    evil.predictions = Some(predictions);
    let html = read(&Report::of(vec![evil, run("plain", "lora", 0, 40.0)]));
    is_harmless(&html);
    let heads: Vec<String> = all(&html, "th").into_iter().map(text).collect();
    assert!(heads.iter().any(|head| head.starts_with("<script>alert(1)</script>")));
    let labels: Vec<String> = all(&html, "svg text").into_iter().map(text).collect();
    assert!(labels.iter().any(|label| label.starts_with("<script>")), "{labels:?}");
}

#[test]
fn one_run_of_one_epoch_has_a_page() {
    let mut only = run("mine", "lora", 0, 50.0);
    only.record.fit.epochs.truncate(1);
    let html = read(&Report::of(vec![only.clone()]));
    assert!(!all(&html, "#curves svg circle").is_empty());
    // Without a test, and ended before the first epoch was over.
    only.record.fit.epochs.clear();
    only.record.test_top1 = None;
    let html = read(&Report::of(vec![only]));
    assert!(all(&html, "#curves").is_empty() && all(&html, "#accuracy").is_empty());
    assert!(text(all(&html, "#tables")[0]).contains("No run has a result"));
}

#[test]
fn a_run_that_diverged_is_read_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let mut found = run("mine", "lora", 0, 10.0);
    found.record.fit.epochs.iter_mut().for_each(|epoch| epoch.loss = f64::NAN);
    found.record.save(folder.path().join("run.json")).unwrap();
    let report = Report::read(folder.path()).unwrap();
    assert!(report.runs()[0].record.fit.epochs[0].loss.is_nan());
    let html = read(&report);
    assert!(text(all(&html, "#curves")[0]).contains("The loss is not a number in any epoch."));
}

#[test]
fn a_broken_record_is_named_and_the_others_are_shown() {
    let root = tempfile::tempdir().unwrap();
    let save = |name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(root.path().join(name)).unwrap();
        std::fs::write(root.path().join(name).join("run.json"), bytes).unwrap();
    };
    let none = Report::read(root.path()).unwrap_err();
    assert!(
        matches!(&none, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    let reason = std::error::Error::source(&none).unwrap().to_string();
    assert!(reason.contains("run.json"), "{reason}");
    let nowhere = Report::read(root.path().join("nowhere")).unwrap_err();
    assert!(matches!(nowhere, Error::Io { .. }));

    let good = serde_json::to_vec(&run("mine", "lora", 0, 50.0).record).unwrap();
    save("cut", &good[..good.len() / 2]);
    assert!(matches!(
        Report::read(root.path()),
        Err(Error::Library(convpass::Error::CorruptFile { .. }))
    ));
    let mut impossible = run("mine", "lora", 0, 50.0).record;
    impossible.test_top1 = Some(1e300);
    save("deep/er/impossible", &serde_json::to_vec(&impossible).unwrap());
    save("good", &good);
    save(".hidden", &good);
    std::fs::write(root.path().join("good").join(Predictions::FILE), b"{").unwrap();
    let report = Report::read(root.path()).unwrap();
    assert_eq!(report.runs().len(), 1);
    let html = read(&report);
    let warned = text(all(&html, ".warn")[0]);
    for name in ["cut/run.json", "deep/er/impossible/run.json", "good/predictions.json"] {
        assert!(warned.contains(name), "{warned}");
    }
    assert!(report.summary(80, false).contains("not read: cut/run.json"));
}

#[test]
fn many_runs_make_a_page_that_can_be_sent() {
    let methods = [
        "linear_probe",
        "bit_fit",
        "vpt",
        "lora",
        "adapter",
        "adapt_former",
        "ssf",
        "conv_bypass",
        "fact",
    ];
    let mut runs = Vec::new();
    for (task, method) in TASKS.iter().flat_map(|task| methods.map(|method| (task, method))) {
        for seed in 0..3 {
            let mut found = run(task.name, method, seed, 50.0 + seed as f64);
            let first = found.record.fit.epochs[0];
            let epoch = |epoch| convpass::train::EpochReport {
                epoch,
                loss: 1.0 / (1.0 + epoch as f64),
                ..first
            };
            found.record.fit.epochs = (0..100).map(epoch).collect();
            let image = |i: i64| (i % 300, (i * 7) % 300, 0.5);
            found.predictions = Some(of(&(0..2_000).map(image).collect::<Vec<_>>(), 300));
            runs.push(found);
        }
    }
    assert_eq!(runs.len(), 513);
    let page = Report::of(runs).html().unwrap();
    assert!(page.len() < 3_000_000, "{}", page.len());
}
