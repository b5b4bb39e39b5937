//! The spread of the Hessians' diagonals, layer by layer: a panel for each input of a layer's linears.

use super::charts::{LEFT, RIGHT, TOP, WIDTH, layer_numbers, levels, picture};
use super::svg::{Anchor, Scale, Svg, number};
use crate::publish::Published;
use crate::record::{LayerRecord, LinearRecord, QuantizeLog};
use crate::spread::Spread;

/// Height of a panel, and of the room between two.
const PANEL: f64 = 92.0;
const BETWEEN: f64 = 26.0;

/// Linears that share their input, by their short names, and the spread in each layer.
struct Input<'a> {
    names: Vec<&'a str>,
    layers: Vec<(usize, Spread)>,
}

/// `None` where the log has no spreads, as logs of older versions and of rounding to nearest have none.
pub(super) fn spread(published: &Published) -> Option<Svg> {
    let log = published.log.as_ref()?;
    let inputs = inputs(log);
    let last = inputs.iter().flat_map(|input| &input.layers).map(|(layer, _)| *layer).max()?;
    let title = format!("Spread of the Hessian's diagonal, {}", published.row.branch);
    let height = TOP + 14.0 + (PANEL + BETWEEN) * inputs.len() as f64 + 34.0;
    let mut svg = picture(&title, LEFT, height);
    let ends = |spread: &Spread| [spread.least, spread.most, 1.0];
    let all: Vec<f64> =
        inputs.iter().flat_map(|input| &input.layers).flat_map(|(_, spread)| ends(spread)).collect();
    let x = Scale::of(&[0.0, last as f64], LEFT, WIDTH - RIGHT);
    for (nth, input) in inputs.iter().enumerate() {
        let top = TOP + 14.0 + (PANEL + BETWEEN) * nth as f64;
        panel(&mut svg, input, &x, &Scale::of(&all, top + PANEL, top));
    }
    let below = height - 30.0;
    layer_numbers(&mut svg, &x, last, below);
    let legend = "layer; line: median, band: 5 to 95 %, strokes: least to most, all as multiples of the mean";
    svg.text((WIDTH / 2.0, below + 20.0), Anchor::Middle, "", legend);
    Some(svg)
}

fn panel(svg: &mut Svg, input: &Input, x: &Scale, y: &Scale) {
    let (bottom, top) = y.ends();
    svg.text((LEFT, top - 5.0), Anchor::Start, "", &input.names.join(", "));
    // A wide span has more ticks than a panel has room for.
    levels(svg, y, 5);
    let places = |of: fn(&Spread) -> f64| -> Vec<(f64, f64)> {
        input.layers.iter().map(|(layer, spread)| (x.at(*layer as f64), y.at(of(spread)))).collect()
    };
    let mut band = places(|spread| spread.p95);
    band.extend(places(|spread| spread.p5).into_iter().rev());
    svg.area(&band, "fill=\"var(--s0)\" fill-opacity=\"0.18\"");
    for (most, least) in places(|spread| spread.most).into_iter().zip(places(|spread| spread.least)) {
        svg.rule(most, least, false);
    }
    let medians = places(|spread| spread.median);
    svg.line(&medians, "var(--s0)");
    for ((layer, spread), at) in input.layers.iter().zip(&medians) {
        let dead = if spread.dead > 0 { format!(", {} without input", spread.dead) } else { String::new() };
        let [least, p5, median, p95, most] =
            [spread.least, spread.p5, spread.median, spread.p95, spread.most].map(number);
        let tip = format!("layer {layer}: {least} {p5} {median} {p95} {most}{dead}");
        let width = 8.0;
        svg.block((at.0 - width / 2.0, top), (width, bottom - top), "fill-opacity=\"0\"", &tip);
    }
}

/// The spreads of a log by input: linears of one short name, such as experts, are taken together, and names whose spreads
/// are the same in every layer share an input.
fn inputs(log: &QuantizeLog) -> Vec<Input<'_>> {
    let mut names: Vec<&str> = Vec::new();
    for linear in log.layers.iter().flat_map(|layer| &layer.linears) {
        let name = short(linear);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let in_layer = |layer: &LayerRecord, name: &str| {
        let of_name = layer.linears.iter().filter(|linear| short(linear) == name);
        of_name.filter_map(|linear| linear.hessian).reduce(Spread::joined)
    };
    let mut inputs: Vec<Input> = Vec::new();
    for name in names {
        let layers: Vec<_> =
            log.layers.iter().filter_map(|layer| Some((layer.layer, in_layer(layer, name)?))).collect();
        match inputs.iter_mut().find(|input| input.layers == layers) {
            Some(input) => input.names.push(name),
            None if layers.is_empty() => {}
            None => inputs.push(Input { names: vec![name], layers }),
        }
    }
    inputs
}

fn short(linear: &LinearRecord) -> &str {
    linear.module.rsplit('.').next().unwrap_or(&linear.module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_that_share_an_input_share_a_panel_and_old_logs_have_none() {
        let log = |with: bool| -> QuantizeLog {
            let linear = |module: &str, median: f64| {
                let hessian = Spread { least: 0.1, p5: 0.2, median, p95: 3.0, most: 90.0, dead: 0 };
                let mut record = serde_json::json!({"module": module, "loss": 1.0, "damp_percent": 0.1});
                if with {
                    record["hessian"] = serde_json::json!(hessian);
                }
                record
            };
            let linears = [
                linear("self_attn.q_proj", 0.5),
                linear("self_attn.k_proj", 0.5),
                linear("mlp.experts.0.down_proj", 0.04),
                linear("mlp.experts.1.down_proj", 1.0),
            ];
            let layers: Vec<_> = (0..2)
                .map(|layer| {
                    let mut record =
                        serde_json::to_value(LayerRecord { layer, ..Default::default() }).unwrap();
                    record["linears"] = serde_json::json!(linears);
                    serde_json::from_value(record).unwrap()
                })
                .collect();
            QuantizeLog { layers, ..QuantizeLog::default() }
        };
        let found = log(true);
        let found: Vec<_> = inputs(&found)
            .into_iter()
            .map(|input| (input.names.join(" "), input.layers[1].1.median))
            .collect();
        assert_eq!(found, [("q_proj k_proj".to_owned(), 0.5), ("down_proj".to_owned(), 0.2)]);
        assert!(inputs(&log(false)).is_empty());
    }
}
