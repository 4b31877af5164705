//! Charts as SVG text: points and lines over two axes, each linear or logarithmic.

use std::fmt::Write;

/// A point with its error bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Position on the horizontal axis.
    pub x: f64,
    /// Position on the vertical axis.
    pub y: f64,
    /// Half the length of the error bar; zero for none.
    pub error: f64,
    /// Text next to the point.
    pub label: String,
}

/// Points of one color.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// The points, in the order of the line.
    pub points: Vec<Point>,
    /// Whether a line connects the points.
    pub line: bool,
}

/// One chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// The title above the chart.
    pub title: String,
    /// The label of the horizontal axis.
    pub x_label: String,
    /// The label of the vertical axis.
    pub y_label: String,
    /// Whether the horizontal axis is logarithmic, which omits values that are not positive.
    pub log_x: bool,
    /// Whether the vertical axis is logarithmic, which omits values that are not positive.
    pub log_y: bool,
    /// The data.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// Left, right, top and bottom of the area with the points.
const AREA: [f64; 4] = [80.0, 730.0, 46.0, 400.0];
/// Colors that are distinguishable with any color vision (Okabe and Ito).
const COLORS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// An SVG document with the charts, one below the other.
#[must_use]
pub fn svg(charts: &[Chart]) -> String {
    let height = HEIGHT * charts.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (i, chart) in charts.iter().enumerate() {
        let _ = writeln!(out, "<g transform=\"translate(0 {})\">", HEIGHT * i as f64);
        chart.draw(&mut out);
        out += "</g>\n";
    }
    out + "</svg>\n"
}

/// A range of values and the pixels of its ends.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    pixels: [f64; 2],
}

impl Axis {
    /// An axis with some margin around all finite `values`; `None` if there are none.
    fn new(values: impl Iterator<Item = f64>, log: bool, pixels: [f64; 2]) -> Option<Self> {
        let (low, high) = values
            .filter(|v| v.is_finite() && (!log || *v > 0.0))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return None;
        }
        if log {
            // Margins, so that no point lies on the frame.
            let margin = ((high / low).ln() * 0.06).max(0.05).exp();
            return Some(Self { low: low / margin, high: high * margin, log, pixels });
        }
        let margin = ((high - low) * 0.06).max(high.abs() * 0.01).max(1e-9);
        let low = if low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
        Some(Self { low, high: high + margin, log, pixels })
    }

    /// The pixel of a value; values out of range are clamped.
    fn pixel(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.pixels[0] + share.clamp(0.0, 1.0) * (self.pixels[1] - self.pixels[0])
    }

    /// About six round values within the range.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (low, high) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
            let steps: &[f64] = match self.high / self.low {
                r if r > 1e5 => &[1.0],
                r if r > 50.0 => &[1.0, 2.0, 5.0],
                _ => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
            };
            return (low..=high)
                .flat_map(|power| steps.iter().map(move |s| s * 10f64.powi(power)))
                .filter(|v| (self.low..=self.high).contains(v))
                .collect();
        }
        let raw = (self.high - self.low) / 6.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= raw);
        let step = step.unwrap_or(raw);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|v| *v <= self.high).collect()
    }
}

impl Chart {
    fn draw(&self, out: &mut String) {
        let [left, right, top, bottom] = AREA;
        let points = || self.series.iter().flat_map(|s| &s.points);
        let middle = (left + right) / 2.0;
        text(out, middle, 24.0, "middle", "font-size=\"15\"", &self.title);
        let x = Axis::new(points().map(|p| p.x), self.log_x, [left, right]);
        let values = points().flat_map(|p| [p.y, p.y - p.error, p.y + p.error]);
        let y = Axis::new(values, self.log_y, [bottom, top]);
        let (Some(x), Some(y)) = (x, y) else {
            text(out, middle, (top + bottom) / 2.0, "middle", "", "nothing to show yet");
            return;
        };
        for tick in x.ticks() {
            let at = x.pixel(tick);
            line(out, [at, top, at, bottom], "#e4e4e4", 1.0);
            text(out, at, bottom + 18.0, "middle", "", &number(tick));
        }
        for tick in y.ticks() {
            let at = y.pixel(tick);
            line(out, [left, at, right, at], "#e4e4e4", 1.0);
            text(out, left - 8.0, at + 4.0, "end", "", &number(tick));
        }
        let _ = writeln!(
            out,
            "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{}\" fill=\"none\" \
             stroke=\"#555\"/>",
            right - left,
            bottom - top
        );
        text(out, middle, bottom + 42.0, "middle", "", &self.x_label);
        let turned = format!("transform=\"rotate(-90 20 {0})\"", (top + bottom) / 2.0);
        text(out, 20.0, (top + bottom) / 2.0, "middle", &turned, &self.y_label);
        let mut labels = Labels::default();
        for (series, color) in self.series.iter().zip(COLORS.into_iter().cycle()) {
            self.draw_series(out, series, color, &x, &y, &mut labels);
        }
        if self.series.len() > 1 {
            self.draw_legend(out, &x, &y);
        }
    }

    fn draw_series(
        &self,
        out: &mut String,
        series: &Series,
        color: &str,
        x: &Axis,
        y: &Axis,
        labels: &mut Labels,
    ) {
        let shown = |v: f64, log: bool| v.is_finite() && (!log || v > 0.0);
        let visible = |p: &&Point| shown(p.x, self.log_x) && shown(p.y, self.log_y);
        let pixels: Vec<(f64, f64)> =
            series.points.iter().filter(visible).map(|p| (x.pixel(p.x), y.pixel(p.y))).collect();
        if series.line {
            let path: Vec<String> = pixels.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>",
                path.join(" ")
            );
        }
        labels.taken.extend(pixels.iter().map(|(x, y)| [x - 4.0, y - 4.0, x + 4.0, y + 4.0]));
        for (point, (px, py)) in series.points.iter().filter(visible).zip(pixels) {
            if point.error > 0.0 {
                let (low, high) = (y.pixel(point.y - point.error), y.pixel(point.y + point.error));
                line(out, [px, low, px, high], color, 1.2);
            }
            let _ =
                writeln!(out, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.2\" fill=\"{color}\"/>");
            if !point.label.is_empty() {
                labels.write(out, px, py, &point.label);
            }
        }
    }

    /// Draws the legend in the corner with the fewest points.
    fn draw_legend(&self, out: &mut String, x: &Axis, y: &Axis) {
        let [left, right, top, bottom] = AREA;
        let longest = self.series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0);
        let (width, height) = (24.0 + longest as f64 * 6.6, 18.0 * self.series.len() as f64 + 8.0);
        let (high, low) = (top + 6.0, bottom - 6.0 - height);
        let corners = [
            (right - 6.0 - width, high),
            (left + 6.0, high),
            (left + 6.0, low),
            (right - 6.0 - width, low),
        ];
        let covered = |(l, t): &(f64, f64)| {
            let points = self.series.iter().flat_map(|s| &s.points);
            let pixels = points.map(|p| (x.pixel(p.x), y.pixel(p.y)));
            let inside = |(px, py): &(f64, f64)| {
                (*l..l + width).contains(px) && (*t..t + height).contains(py)
            };
            pixels.filter(inside).count()
        };
        let (left, top) = corners.into_iter().min_by_key(covered).unwrap_or(corners[0]);
        let _ = writeln!(
            out,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height}\" \
             fill=\"white\" fill-opacity=\"0.85\" stroke=\"#ccc\"/>"
        );
        for (i, (series, color)) in self.series.iter().zip(COLORS.into_iter().cycle()).enumerate() {
            let y = top + 14.0 + 18.0 * i as f64;
            let x = left + 12.0;
            let _ =
                writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\" fill=\"{color}\"/>");
            text(out, x + 9.0, y + 4.0, "start", "", &series.name);
        }
    }
}

/// Places labels so that they overlap neither each other nor points, if there is room.
#[derive(Default)]
struct Labels {
    /// Boxes in use: left, top, right, bottom.
    taken: Vec<[f64; 4]>,
}

impl Labels {
    fn write(&mut self, out: &mut String, x: f64, y: f64, label: &str) {
        let width = label.chars().count() as f64 * 5.6;
        let mut positions = Vec::new();
        // Next to the point, then at growing distances above and below.
        for step in 0..24 {
            let shift = f64::from((step + 1) / 2 * 11) * if step % 2 == 1 { -1.0 } else { 1.0 };
            positions.push((x + 7.0, y + 4.0 + shift));
            positions.push((x - 7.0 - width, y + 4.0 + shift));
        }
        let size = |(x, y): (f64, f64)| [x, y - 9.0, x + width, y + 2.0];
        let free = |position: &(f64, f64)| {
            let [l, t, r, b] = size(*position);
            let inside = l > AREA[0] && r < AREA[1] && t > AREA[2] && b < AREA[3];
            inside && self.taken.iter().all(|o| r < o[0] || l > o[2] || b < o[1] || t > o[3])
        };
        let position = positions.iter().copied().find(free).unwrap_or((x + 7.0, y + 4.0));
        if (position.1 - y - 4.0).abs() > 11.0 {
            let end = if position.0 > x { position.0 - 1.0 } else { position.0 + width + 1.0 };
            line(out, [x, y, end, position.1 - 4.0], "#aaa", 0.6);
        }
        self.taken.push(size(position));
        let look = "font-size=\"10.5\" fill=\"#333\"";
        // The width is an estimate, so anchor the text at the end near the point.
        match position.0 > x {
            true => text(out, position.0, position.1, "start", look, label),
            false => text(out, position.0 + width, position.1, "end", look, label),
        }
    }
}

fn line(out: &mut String, [x1, y1, x2, y2]: [f64; 4], color: &str, width: f64) {
    let _ = writeln!(
        out,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{color}\" \
         stroke-width=\"{width}\"/>"
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, attributes: &str, content: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {attributes}>{}</text>",
        escaped(content)
    );
}

/// The value of a tick without trailing zeros.
fn number(value: f64) -> String {
    if value != 0.0 && (value.abs() >= 1e6 || value.abs() < 1e-4) {
        return format!("{value:e}");
    }
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)], log_y: bool) -> Chart {
        let point = |(x, y): &(f64, f64)| Point { x: *x, y: *y, error: 0.1, label: "a<b".into() };
        Chart {
            title: "t & u".into(),
            x_label: "x".into(),
            y_label: "y".into(),
            log_x: log_y,
            log_y,
            series: vec![Series {
                name: "s".into(),
                points: points.iter().map(point).collect(),
                line: true,
            }],
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        for (values, log) in [
            (vec![0.0, 50.0], false),
            (vec![1.23, 1.31], false),
            (vec![-3.0, 7.0], false),
            (vec![5.0], false),
            (vec![12.0, 300.0], true),
            (vec![4.7, 6.1], true),
            (vec![2.0, 1e9], true),
        ] {
            let axis = Axis::new(values.iter().copied(), log, [0.0, 100.0]).unwrap();
            let ticks = axis.ticks();
            assert!((2..=20).contains(&ticks.len()), "{values:?}: {ticks:?}");
            assert!(ticks.iter().all(|t| (0.0..=100.0).contains(&axis.pixel(*t))));
            assert!(ticks.windows(2).all(|t| t[0] < t[1]), "{ticks:?}");
        }
        assert_eq!(number(0.30000000000000004), "0.3");
        assert_eq!(number(1200.0), "1200");
    }

    #[test]
    fn charts_are_well_formed_whatever_the_values() {
        for log in [false, true] {
            for points in [
                &[][..],
                &[(1.0, 2.0)],
                &[(1.0, 2.0), (2.0, f64::NAN), (3.0, f64::INFINITY), (4.0, -1.0), (5.0, 1e12)],
                &[(1.0, 5.0); 30],
            ] {
                let text = svg(&[chart(points, log), chart(points, log)]);
                assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"));
                assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
                assert!(text.contains("t &amp; u") && !text.contains("a<b"));
                for tag in ["g", "text", "svg"] {
                    let opened = text.matches(&format!("<{tag}")).count();
                    assert_eq!(opened, text.matches(&format!("</{tag}>")).count(), "{tag}");
                }
            }
        }
    }
}
