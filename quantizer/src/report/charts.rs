//! The pictures of a report.

use super::svg::{Anchor, Scale, Svg, colour, number};
use crate::publish::Published;
use crate::record::{LayerRecord, QuantizeLog};
use crate::sequential::Phases;
use crate::table::human_size;

pub(super) const WIDTH: f64 = 760.0;
/// Room for the axis on the left, for names on the right, and below.
pub(super) const LEFT: f64 = 70.0;
pub(super) const RIGHT: f64 = 24.0;
pub(super) const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
/// Height of a name below.
const LEGEND: f64 = 17.0;

/// Size of each branch against a measurement, of which less is better; a line joins the branches that no other beats in
/// both. `baseline` is the original's.
pub(super) fn trade_off(
    branches: &[Published],
    title: &str,
    unit: &str,
    values: &[Option<f64>],
    baseline: Option<f64>,
) -> Option<Svg> {
    let points: Vec<(usize, f64, f64)> = branches
        .iter()
        .zip(values)
        .enumerate()
        .filter_map(|(i, (published, value))| Some((i, published.row.size_bytes as f64, (*value)?)))
        .collect();
    if points.is_empty() {
        return None;
    }
    let height = 340.0;
    let mut svg = picture(title, LEFT, height + LEGEND * points.len() as f64);
    let scale_of = |sizes: f64| if sizes >= 1e9 { (1e9, "GB") } else { (1e6, "MB") };
    let (divisor, size_unit) = scale_of(points.iter().map(|point| point.1).fold(0.0, f64::max));
    let sizes: Vec<f64> = points.iter().map(|point| point.1 / divisor).collect();
    let measured: Vec<f64> = points.iter().map(|point| point.2).chain(baseline).collect();
    let x = Scale::of(&sizes, LEFT, WIDTH - RIGHT);
    let y = Scale::of(&measured, height - BOTTOM, TOP);
    axes(&mut svg, (&x, &y), height, size_unit, unit);
    if let Some(baseline) = baseline {
        svg.rule((LEFT, y.at(baseline)), (WIDTH - RIGHT, y.at(baseline)), true);
        let original = format!("original {}", number(baseline));
        svg.text((WIDTH - RIGHT, y.at(baseline) - 5.0), Anchor::End, "faint", &original);
    }
    let is_beaten = |point: &(usize, f64, f64)| {
        points
            .iter()
            .any(|other| other.1 <= point.1 && other.2 <= point.2 && (other.1 < point.1 || other.2 < point.2))
    };
    let mut best: Vec<_> = points.iter().filter(|point| !is_beaten(point)).collect();
    best.sort_by(|a, b| a.1.total_cmp(&b.1));
    let line: Vec<_> = best.iter().map(|point| (x.at(point.1 / divisor), y.at(point.2))).collect();
    svg.line(&line, "var(--faint)");
    // Names stand below: branches of one width lie close together.
    for (nth, (i, size, value)) in points.iter().enumerate() {
        let row = &branches[*i].row;
        let said = format!("{}: {}, {}", row.branch, human_size(row.size_bytes), number(*value));
        svg.dot((x.at(size / divisor), y.at(*value)), &colour(*i), &said);
        let place = height + 6.0 + LEGEND * nth as f64;
        svg.dot((LEFT + 6.0, place), &colour(*i), &row.branch);
        svg.text((LEFT + 18.0, place + 4.0), Anchor::Start, "", &said);
    }
    Some(svg)
}

/// A picture with its title.
pub(super) fn picture(title: &str, left: f64, height: f64) -> Svg {
    let mut svg = Svg::new(title, WIDTH, height);
    svg.text((left, 18.0), Anchor::Start, "", title);
    svg
}

/// At most so many values of the upright axis, with a line each.
pub(super) fn levels(svg: &mut Svg, y: &Scale, most: usize) {
    let ticks = y.ticks();
    for (value, text) in ticks.iter().step_by(ticks.len().div_ceil(most).max(1)) {
        svg.rule((LEFT, y.at(*value)), (WIDTH - RIGHT, y.at(*value)), false);
        svg.text((LEFT - 8.0, y.at(*value) + 4.0), Anchor::End, "faint", text);
    }
}

/// Numbers of layers up to the last, about twelve of them.
pub(super) fn layer_numbers(svg: &mut Svg, x: &Scale, last: usize, below: f64) {
    for layer in (0..=last).step_by(last / 12 + 1) {
        svg.text((x.at(layer as f64), below), Anchor::Middle, "faint", &layer.to_string());
    }
}

fn axes(svg: &mut Svg, (x, y): (&Scale, &Scale), height: f64, x_unit: &str, y_unit: &str) {
    levels(svg, y, usize::MAX);
    for (value, text) in x.ticks() {
        svg.rule((x.at(value), height - BOTTOM), (x.at(value), height - BOTTOM + 5.0), false);
        svg.text((x.at(value), height - BOTTOM + 19.0), Anchor::Middle, "faint", &text);
    }
    svg.text((WIDTH / 2.0, height - 8.0), Anchor::Middle, "", x_unit);
    svg.upright((16.0, height / 2.0), y_unit);
}

/// The loss of each layer, a line a branch.
pub(super) fn loss_by_layer(branches: &[Published]) -> Option<Svg> {
    let logs: Vec<_> = with_layers(branches);
    let sum = |layer: &LayerRecord| layer.linears.iter().map(|linear| linear.loss).sum::<f64>();
    let losses: Vec<f64> = logs.iter().flat_map(|(_, _, log)| log.layers.iter().map(sum)).collect();
    if losses.is_empty() {
        return None;
    }
    let height = 340.0 + LEGEND * logs.len() as f64;
    let mut svg = picture("Loss of each layer, all linears", LEFT, height);
    let bottom = height - LEGEND * logs.len() as f64;
    let last = logs.iter().map(|(_, _, log)| log.layers.len()).max().unwrap_or(1).saturating_sub(1);
    let x = Scale::of(&[0.0, last as f64], LEFT, WIDTH - RIGHT);
    let y = Scale::of(&losses, bottom - BOTTOM, TOP);
    levels(&mut svg, &y, usize::MAX);
    layer_numbers(&mut svg, &x, last, bottom - BOTTOM + 19.0);
    svg.text((WIDTH / 2.0, bottom - 8.0), Anchor::Middle, "", "layer");
    for (nth, (i, name, log)) in logs.iter().enumerate() {
        let points: Vec<_> =
            log.layers.iter().map(|layer| (x.at(layer.layer as f64), y.at(sum(layer)))).collect();
        svg.line(&points, &colour(*i));
        for (layer, at) in log.layers.iter().zip(&points) {
            svg.dot(*at, &colour(*i), &format!("{name}, layer {}: {}", layer.layer, number(sum(layer))));
        }
        let place = bottom + LEGEND * nth as f64;
        svg.block((LEFT, place - 2.0), (14.0, 4.0), &format!("fill=\"{}\"", colour(*i)), name);
        svg.text((LEFT + 20.0, place + 4.0), Anchor::Start, "", name);
    }
    Some(svg)
}

fn with_layers(branches: &[Published]) -> Vec<(usize, &str, &QuantizeLog)> {
    let logs = branches.iter().enumerate();
    let logs =
        logs.filter_map(|(i, published)| Some((i, published.row.branch.as_str(), published.log.as_ref()?)));
    logs.filter(|(_, _, log)| !log.layers.is_empty()).collect()
}

/// The loss of every linear of one branch: stronger is more, by factors.
pub(super) fn loss_by_linear(published: &Published) -> Option<Svg> {
    let log = published.log.as_ref().filter(|log| !log.layers.is_empty())?;
    let modules: Vec<&str> = log.layers[0].linears.iter().map(|linear| linear.module.as_str()).collect();
    let losses: Vec<f64> =
        log.layers.iter().flat_map(|l| l.linears.iter().map(|linear| linear.loss)).collect();
    let (low, high) = losses
        .iter()
        .filter(|loss| **loss > 0.0)
        .fold((f64::INFINITY, 0.0f64), |(low, high), loss| (low.min(*loss), high.max(*loss)));
    if low > high {
        return None;
    }
    let (left, row_height) = (130.0, 22.0);
    let height = TOP + row_height * modules.len() as f64 + 44.0;
    let title = format!("Loss of every linear, {}", published.row.branch);
    let mut svg = picture(&title, left, height);
    let width = (WIDTH - RIGHT - left) / log.layers.len() as f64;
    for (m, module) in modules.iter().enumerate() {
        let top = TOP + row_height * m as f64;
        let short = module.rsplit('.').next().unwrap_or(module);
        svg.text((left - 8.0, top + 15.0), Anchor::End, "faint", short);
        for (l, layer) in log.layers.iter().enumerate() {
            let Some(linear) = layer.linears.iter().find(|linear| linear.module == *module) else { continue };
            let share = match high > low && linear.loss > 0.0 {
                true => (linear.loss / low).ln() / (high / low).ln(),
                false => 0.0,
            };
            let fill = format!("fill=\"var(--s0)\" fill-opacity=\"{:.2}\"", 0.06 + 0.94 * share);
            let (loss, damp) = (number(linear.loss), linear.damp_percent);
            let tip = format!("layer {}, {module}: {loss} (damp {damp})", layer.layer);
            svg.block((left + width * l as f64, top), (width - 1.0, row_height - 2.0), &fill, &tip);
        }
    }
    let below = TOP + row_height * modules.len() as f64 + 16.0;
    let step = (log.layers.len() / 12 + 1).max(1);
    for (l, layer) in log.layers.iter().enumerate().step_by(step) {
        svg.text((left + width * (l as f64 + 0.5), below), Anchor::Middle, "faint", &layer.layer.to_string());
    }
    let legend = format!("layer; from {} (faint) to {} (strong), by factors", number(low), number(high));
    svg.text((WIDTH / 2.0, below + 20.0), Anchor::Middle, "", &legend);
    Some(svg)
}

/// Where the time went, a bar a branch.
pub(super) fn seconds(branches: &[Published]) -> Option<Svg> {
    let names = ["forward", "Hessians", "factors", "sweeps", "packing", "waiting for files"];
    let logs = with_layers(branches).into_iter();
    let bars: Vec<(&str, Vec<f64>)> = logs
        .map(|(_, name, log)| {
            let Phases { forward, hessian, factor, sweep, pack, wait, .. } = log.phases();
            (name, vec![forward, hessian, factor, sweep, pack, wait])
        })
        .collect();
    let totals: Vec<f64> = bars.iter().map(|(_, parts)| parts.iter().sum()).collect();
    stacked("Seconds, by phase", &bars, &names, &totals, "s")
}

/// How often a branch's first choice is the original's.
pub(super) fn agreement(branches: &[Published]) -> Option<Svg> {
    let bars: Vec<(&str, Vec<f64>)> = branches
        .iter()
        .filter_map(|published| {
            Some((published.row.branch.as_str(), vec![100.0 * published.row.top1_agreement?]))
        })
        .collect();
    stacked("Top-1 agreement with the original", &bars, &[""], &[100.0], "%")
}

fn stacked(
    title: &str,
    bars: &[(&str, Vec<f64>)],
    names: &[&str],
    totals: &[f64],
    unit: &str,
) -> Option<Svg> {
    if bars.is_empty() {
        return None;
    }
    let (left, row_height) = (240.0, 26.0);
    let legend = if names.len() > 1 { 24.0 } else { 0.0 };
    let height = TOP + row_height * bars.len() as f64 + 10.0 + legend;
    let mut svg = picture(title, left, height);
    let x = Scale::from_zero(totals, left, WIDTH - RIGHT - 60.0);
    for (b, (name, parts)) in bars.iter().enumerate() {
        let top = TOP + row_height * b as f64;
        svg.text((left - 8.0, top + 15.0), Anchor::End, "", name);
        let mut sum = 0.0;
        for (p, part) in parts.iter().enumerate() {
            let (from, to) = (x.at(sum), x.at(sum + part));
            sum += part;
            let tip = format!("{name}: {} {} {unit}", names[p], number(*part));
            svg.block((from, top), (to - from, row_height - 7.0), &format!("fill=\"{}\"", colour(p)), &tip);
        }
        svg.text((x.at(sum) + 6.0, top + 15.0), Anchor::Start, "faint", &format!("{} {unit}", number(sum)));
    }
    let mut place = left;
    for (p, name) in names.iter().enumerate().filter(|_| names.len() > 1) {
        let top = height - 14.0;
        svg.block((place, top - 8.0), (10.0, 10.0), &format!("fill=\"{}\"", colour(p)), name);
        svg.text((place + 14.0, top + 1.0), Anchor::Start, "", name);
        place += 30.0 + 7.0 * name.len() as f64;
    }
    Some(svg)
}
