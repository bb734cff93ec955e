//! The section of the page with the maps and receptive fields of the bypasses of a run.

use maud::{Markup, html};

use super::super::bypass_view::{BypassView, ConvMaps, GridMap};
use super::super::palette::short;
use super::super::picture::heat_map;
use super::super::runs::FoundRun;
use super::{MOST_DETAILS, by_task, left_out, run_name};
use crate::error::Result;
use convpass::seam::SubLayer;

pub(super) fn section(runs: &[FoundRun]) -> Result<Option<Markup>> {
    let known = runs.iter().filter(|run| run.bypass_view.is_some()).collect();
    let (tasks, more) = by_task(known, MOST_DETAILS);
    let mut parts = Vec::new();
    for (index, run) in tasks.into_iter().flat_map(|(_, runs)| runs).enumerate() {
        if let Some(view) = &run.bypass_view {
            parts.push(details(run, view, index == 0)?);
        }
    }
    Ok((!parts.is_empty()).then(|| html! { @for part in parts { (part) } (left_out(more)) }))
}

fn details(run: &FoundRun, view: &BypassView, open: bool) -> Result<Markup> {
    let peak = view.field.peak().max(view.frozen_field.peak());
    let mut fields = Vec::new();
    for (map, name) in [(&view.frozen_field, "without the bypass"), (&view.field, "with it")] {
        let reach = map.reach().map_or("–".to_owned(), |reach| format!("{reach:.2}"));
        let caption = format!("{name}: mean distance {reach} patches");
        fields.push((map_picture(map, peak, true)?, caption));
    }
    let blocks = view.maps.iter().map(block).collect::<Result<Vec<_>>>()?;
    let (rows, cols) = view.field.grid;
    Ok(html! {
        details open[open] {
            summary { (short(&run.record.task, 60)) ": " (run_name(run)) }
            h3 { "How far the token in the middle looks" }
            p.pale {
                "Mean magnitude of the gradient of the token's norm, as it leaves the last block that keeps its patches, by the pixels of each of the "
                (rows) " x " (cols) " patches; over " (view.images) " image(s). Both maps have one scale, opacity goes with the square root."
            }
            div.fields {
                @for (uri, caption) in fields {
                    figure { img.map src=(uri) alt=(caption); figcaption { (caption) } }
                }
                figure { img.map src=(view.picture.uri()) alt="the image of the maps below"; figcaption { "the image of the maps below" } }
            }
            h3 { "What the 3x3 convolution makes of the image" }
            p.pale { "One map for each bottleneck channel; blue is above zero, orange below, each row of maps with a scale of its own." }
            @for block in blocks { (block) }
        }
    })
}

fn block(maps: &ConvMaps) -> Result<Markup> {
    let place = match maps.sub_layer {
        SubLayer::Attention => "attention",
        SubLayer::Mlp => "the MLP",
    };
    let row = |name: &str, maps: &[GridMap]| -> Result<Markup> {
        let peak = maps.iter().map(GridMap::peak).fold(0.0, f32::max);
        let pictures = maps.iter().map(|map| map_picture(map, peak, false));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        Ok(html! {
            small { (name) ", largest magnitude " (format!("{peak:.2}")) }
            div.maps {
                @for (channel, uri) in pictures.iter().enumerate() {
                    img.map src=(uri) alt={ (name) ", channel " (channel + 1) };
                }
            }
        })
    };
    let rows = [row("before", &maps.before)?, row("after", &maps.after)?];
    Ok(html! {
        figure {
            strong { "Block " (maps.block + 1) ", at " (place) }
            @for row in rows { (row) }
        }
    })
}

/// Returns a map as a picture whose opacity is proportional to the value divided by `peak`, or to the
/// square root of that if `root` is true.
fn map_picture(map: &GridMap, peak: f32, root: bool) -> Result<String> {
    let (rows, cols) = map.grid;
    heat_map((rows, cols), |row, col| {
        let value = map.values.get(row * cols + col).copied().unwrap_or(0.0);
        let share = f64::from(value.abs() / peak.max(f32::MIN_POSITIVE));
        (if root { share.sqrt() } else { share }, value < 0.0)
    })
}
