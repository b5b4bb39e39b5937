//! Drawing: a few shapes, axes and scales, as SVG that reads in light and in dark.

use std::fmt::Write;

/// Colours of series and of text, for a page and for a picture by itself. The series' colours differ in lightness too.
pub(super) const STYLE: &str = "\
:root{--ink:#1b1f24;--faint:#6b7280;--rule:#d5d9e0;--paper:#ffffff;\
--s0:#1f5fbf;--s1:#c2410c;--s2:#0f766e;--s3:#9333a8;--s4:#a16207;--s5:#be185d;--s6:#4d7c0f;--s7:#475569}\
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ec;--faint:#9aa3b2;--rule:#39414d;--paper:#14171c;\
--s0:#7aa9f7;--s1:#fb923c;--s2:#4fd1c5;--s3:#d8a4ea;--s4:#eab308;--s5:#f472b6;--s6:#a3d65c;--s7:#a9b4c4}}\
@media print{:root{--ink:#000;--faint:#444;--rule:#bbb;--paper:#fff;\
--s0:#1f5fbf;--s1:#c2410c;--s2:#0f766e;--s3:#9333a8;--s4:#a16207;--s5:#be185d;--s6:#4d7c0f;--s7:#475569}}\
svg{font:12px system-ui,sans-serif}svg text{fill:var(--ink)}svg .faint{fill:var(--faint)}\
svg .rule{stroke:var(--rule);fill:none}svg .paper{fill:var(--paper)}svg .line{fill:none;stroke-width:1.8}";

/// Colours that series take in turn.
const COLOURS: usize = 8;

pub(super) fn colour(series: usize) -> String {
    format!("var(--s{})", series % COLOURS)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture of a width and a height, in pixels.
pub(super) struct Svg {
    width: f64,
    height: f64,
    title: String,
    body: String,
}

impl Svg {
    pub fn new(title: &str, width: f64, height: f64) -> Self {
        Self { width, height, title: title.to_owned(), body: String::new() }
    }

    fn push(&mut self, shape: std::fmt::Arguments) {
        // Writing to a text cannot fail.
        let _ = writeln!(self.body, "{shape}");
    }

    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        ));
    }

    /// A text from below to above.
    pub fn upright(&mut self, (x, y): (f64, f64), text: &str) {
        let text = escape(text);
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {x:.1} {y:.1})\">{text}</text>"
        ));
    }

    pub fn rule(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), dashed: bool) {
        let dashes = if dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        self.push(format_args!(
            "<line class=\"rule\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"{dashes}/>"
        ));
    }

    pub fn line(&mut self, points: &[(f64, f64)], colour: &str) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.push(format_args!(
            "<polyline class=\"line\" stroke=\"{colour}\" points=\"{}\"/>",
            points.join(" ")
        ));
    }

    /// A closed shape without an outline.
    pub fn area(&mut self, points: &[(f64, f64)], fill: &str) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.push(format_args!("<polygon {fill} points=\"{}\"/>", points.join(" ")));
    }

    /// `tip` is shown by browsers where a pointer rests.
    pub fn dot(&mut self, (x, y): (f64, f64), colour: &str, tip: &str) {
        let tip = escape(tip);
        self.push(format_args!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{colour}\"><title>{tip}</title></circle>"
        ));
    }

    pub fn block(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str, tip: &str) {
        let tip = escape(tip);
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" {fill}><title>{tip}</title></rect>",
            width.max(0.0)
        ));
    }

    /// For a page that has the style.
    pub fn inline(&self) -> String {
        self.element("")
    }

    /// A file by itself.
    pub fn file(&self) -> String {
        let paper = format!("<rect class=\"paper\" width=\"{}\" height=\"{}\"/>\n", self.width, self.height);
        self.element(&format!("<style>{STYLE}</style>\n{paper}"))
    }

    fn element(&self, before: &str) -> String {
        let Self { width, height, title, body } = self;
        let title = escape(title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{title}\">\n\
             <title>{title}</title>\n{before}{body}</svg>\n"
        )
    }
}

/// A text as it may stand in HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// From values to pixels.
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Scale {
    /// Of all these values with a margin, between two places. Logarithmic where all are positive and they span more than a
    /// factor of twenty.
    pub fn of(values: &[f64], from: f64, to: f64) -> Self {
        let finite = || values.iter().copied().filter(|value| value.is_finite());
        let (low, high) =
            (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let logarithmic = low > 0.0 && high / low > 20.0;
        let (low, high) = match logarithmic {
            true => (low / 1.4, high * 1.4),
            false => {
                let margin = match high > low {
                    true => 0.06 * (high - low),
                    false => (0.1 * high.abs()).max(1e-9),
                };
                (low - margin, high + margin)
            }
        };
        Self { low, high, from, to, logarithmic }
    }

    /// From nothing to the largest of them.
    pub fn from_zero(values: &[f64], from: f64, to: f64) -> Self {
        let high = values.iter().copied().filter(|value| value.is_finite()).fold(0.0, f64::max);
        Self { low: 0.0, high: if high > 0.0 { high } else { 1.0 }, from, to, logarithmic: false }
    }

    pub fn at(&self, value: f64) -> f64 {
        let share = match self.logarithmic {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// The places of the lowest and of the highest value.
    pub fn ends(&self) -> (f64, f64) {
        (self.from, self.to)
    }

    /// Round values, each with its text.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        let steps: Vec<f64> = match self.logarithmic {
            true => {
                let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
                decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade))).collect()
            }
            false => {
                let rough = (self.high - self.low) / 5.0;
                let decade = 10f64.powf(rough.log10().floor());
                let step =
                    [1.0, 2.0, 5.0, 10.0].iter().map(|digit| digit * decade).find(|step| *step >= rough);
                let step = step.unwrap_or(decade);
                let first = (self.low / step).ceil() as i64;
                (0..20).map(|i| (first + i) as f64 * step).collect()
            }
        };
        let inside = |value: &f64| *value >= self.low && *value <= self.high * (1.0 + 1e-9);
        let steps: Vec<f64> = steps.into_iter().filter(inside).collect();
        let text = |value: f64| match (self.logarithmic, &steps[..]) {
            // As many digits as tell one step from the next.
            (false, [first, second, ..]) => {
                let digits = (-(second - first).log10().floor()).max(0.0) as usize;
                format!("{value:.digits$}")
            }
            _ => number(value),
        };
        steps.iter().map(|value| (*value, text(*value))).collect()
    }
}

/// Four significant digits, without zeros at the end.
pub(super) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return "0".into();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if magnitude >= 6 {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.*}", usize::try_from(3 - magnitude).unwrap_or(0));
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_keep_order_and_ticks_are_round_and_inside() {
        for values in [vec![3.0, 9.0], vec![1e-4, 0.5], vec![5.0], vec![-2.0, 2.0], vec![]] {
            let scale = Scale::of(&values, 100.0, 0.0);
            let places: Vec<_> = values.iter().map(|value| scale.at(*value)).collect();
            assert!(places.iter().all(|place| (0.0..=100.0).contains(place)));
            assert!(places.is_sorted_by(|a, b| a > b) || places.len() < 2, "{places:?}");
            let ticks = scale.ticks();
            assert!((2..=20).contains(&ticks.len()), "{values:?}: {ticks:?}");
            assert!(
                ticks
                    .iter()
                    .all(|(value, text)| (text.parse::<f64>().unwrap() - value).abs() <= 1e-6 * value.abs())
            );
        }
        assert_eq!([0.05, 1234.0, 0.000125, 16.753].map(number), ["0.05", "1234", "0.000125", "16.75"]);
    }

    #[test]
    fn names_cannot_leave_their_place_in_a_page() {
        let mut svg = Svg::new("<script>", 10.0, 10.0);
        svg.text((0.0, 0.0), Anchor::Start, "", "a</text><script>alert(1)</script>");
        svg.dot((0.0, 0.0), "red", "\"><img src=x>");
        assert!(!svg.file().contains("<script") && !svg.file().contains("<img"), "{}", svg.file());
    }
}
