//! What a run has made, as one page and as pictures: sizes against what they cost, losses, seconds. All of it comes from
//! the artifacts and their logs.

mod charts;
mod spread;
mod svg;

use self::svg::{STYLE, Svg, escape};
use crate::publish::Published;
use crate::table::{self, Row};

/// Names of the pictures' files that a card shows, with what they show.
pub const PICTURES: [(&str, &str); 2] = [
    ("size-and-divergence.svg", "Size against KL divergence of all branches"),
    ("size-and-perplexity.svg", "Size against perplexity of all branches"),
];

/// A picture and its file's name.
pub struct Picture {
    pub file: &'static str,
    svg: Svg,
}

impl Picture {
    /// A file by itself.
    pub fn to_svg(&self) -> String {
        self.svg.file()
    }
}

/// All pictures that the branches' logs have numbers for.
pub fn pictures(branches: &[Published]) -> Vec<Picture> {
    let of = |value: fn(&Row) -> Option<f64>| branches.iter().map(|p| value(&p.row)).collect::<Vec<_>>();
    let baseline = branches.iter().find_map(|published| published.row.baseline_perplexity);
    let main = branches.iter().find(|published| published.row.branch == "main").or(branches.first());
    let (divergences, perplexities) = (of(|row| row.kl_divergence), of(|row| row.perplexity));
    let title = "Size and KL divergence from the original";
    let divergence = charts::trade_off(branches, title, "nats a token", &divergences, None);
    let title = "Size and perplexity";
    let perplexity = charts::trade_off(branches, title, "perplexity", &perplexities, baseline);
    let made = [
        (PICTURES[0].0, divergence),
        (PICTURES[1].0, perplexity),
        ("agreement.svg", charts::agreement(branches)),
        ("loss-by-layer.svg", charts::loss_by_layer(branches)),
        ("loss-by-linear.svg", main.and_then(charts::loss_by_linear)),
        ("hessian-spread.svg", main.and_then(spread::spread)),
        ("seconds.svg", charts::seconds(branches)),
    ];
    made.into_iter().filter_map(|(file, svg)| Some(Picture { file, svg: svg? })).collect()
}

/// One page that needs nothing else. `title` is the model's name.
pub fn page(title: &str, branches: &[Published]) -> String {
    let figures: String = pictures(branches)
        .iter()
        .map(|picture| format!("<figure>{}</figure>\n", picture.svg.inline()))
        .collect();
    let rows: Vec<Row> = branches.iter().map(|published| published.row.clone()).collect();
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>{STYLE}{PAGE}</style>\n\
         <main>\n<h1>{title}</h1>\n{}{}\n{figures}{}</main>\n</html>\n",
        introduction(branches),
        html_table(&table::grid(&rows, false)),
        html_table(&engines(&rows)),
    )
}

const PAGE: &str = "\
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}\
main{max-width:800px;margin:0 auto;padding:24px 16px 64px}h1{font-size:26px;margin:0 0 8px}\
p{margin:0 0 16px;color:var(--faint)}figure{margin:28px 0;break-inside:avoid}svg{width:100%;height:auto}\
.wide{overflow-x:auto;margin:20px 0}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}\
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top;white-space:nowrap}\
th{color:var(--faint);font-weight:600}\
@media print{main{max-width:none;padding:0}.wide{overflow:visible}table{font-size:8px;width:100%}th,td{padding:2px 5px 2px 0;white-space:normal;overflow-wrap:anywhere}}";

fn introduction(branches: &[Published]) -> String {
    let logs: Vec<_> = branches.iter().filter_map(|published| published.log.as_ref()).collect();
    let mut lines = Vec::new();
    if let Some(log) = logs.first() {
        lines.push(format!("Made by {} on {}.", log.made_by, log.device));
    }
    if let Some(c) = logs.iter().find_map(|log| log.calibration.as_ref()) {
        lines.push(format!(
            "Calibrated on {} sequences of {} tokens from {}.",
            c.samples, c.seq_len, c.dataset
        ));
    }
    match logs.iter().find_map(|log| log.evaluation.as_ref()) {
        Some(e) => lines.push(format!(
            "Measured on {}, rows joined {}, {} windows of {} tokens.",
            e.protocol.dataset, e.protocol.join, e.protocol.windows, e.protocol.ctx
        )),
        None => lines.push("Nothing was measured: --eval-dataset does.".into()),
    }
    format!("<p>{}</p>\n", escape(&lines.join(" ")))
}

/// A row a program, a column a branch.
fn engines(rows: &[Row]) -> Vec<Vec<String>> {
    let Some(first) = rows.first() else { return Vec::new() };
    let head = ["Loads in".to_owned()].into_iter().chain(rows.iter().map(|row| row.branch.clone())).collect();
    let line = |(i, engine): (usize, &str)| {
        let cell = |row: &Row| if row.engines[i].loads { "yes" } else { "no" }.to_owned();
        [engine.to_owned()].into_iter().chain(rows.iter().map(cell)).collect()
    };
    let names = first.engines.iter().map(|verdict| verdict.engine).enumerate();
    [head].into_iter().chain(names.map(line)).collect()
}

fn html_table(grid: &[Vec<String>]) -> String {
    let row = |cells: &Vec<String>, tag: &str| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let Some((head, body)) = grid.split_first() else { return String::new() };
    let body: String = body.iter().map(|cells| row(cells, "td")).collect();
    format!("<div class=\"wide\"><table>\n{}{body}</table></div>\n", row(head, "th"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::testing;
    use crate::record::{LayerRecord, LinearRecord, QuantizeLog};

    fn branches() -> Vec<Published> {
        let linear = |loss: f64| -> LinearRecord {
            let hessian = serde_json::json!({"least": 0.01, "p5": 0.1, "median": 0.6, "p95": 3.0, "most": 80.0, "dead": 2});
            let record = serde_json::json!({"module": "mlp.<b>", "loss": loss, "damp_percent": 0.1, "hessian": hessian});
            serde_json::from_value(record).unwrap()
        };
        let layer = |layer| LayerRecord {
            layer,
            linears: vec![linear(1.0 + layer as f64)],
            ..LayerRecord::default()
        };
        let log = QuantizeLog { layers: (0..3).map(layer).collect(), ..QuantizeLog::default() };
        let mut branches = testing::branches(&log);
        for (i, published) in branches.iter_mut().enumerate() {
            published.row.kl_divergence = Some(0.1 / (1 + i) as f64);
            published.row.perplexity = Some(6.0 - 0.1 * i as f64);
        }
        branches
    }

    #[test]
    fn a_page_holds_every_branch_needs_nothing_else_and_runs_nothing() {
        let mut branches = branches();
        branches[1].row.branch = "<script>alert(1)</script>".into();
        let page = page("CausalLM-7B", &branches);
        assert!(branches.iter().all(|published| page.contains(&escape(&published.row.branch))));
        assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="), "{page}");
        assert_eq!(page.matches("<figure>").count(), 6);
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("@media print"));
    }

    #[test]
    fn what_was_not_measured_has_no_picture_and_files_stand_alone() {
        let mut branches = branches();
        for published in &mut branches {
            (published.row.kl_divergence, published.log) = (None, None);
        }
        let names: Vec<_> = pictures(&branches).iter().map(|picture| picture.file).collect();
        assert_eq!(names, ["size-and-perplexity.svg"]);
        let file = pictures(&branches)[0].to_svg();
        assert!(file.starts_with("<svg xmlns=") && file.contains("<style>") && file.ends_with("</svg>\n"));
    }
}
