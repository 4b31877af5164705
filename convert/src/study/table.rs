//! The results of a study as Markdown, SVG and CSV.

use std::fmt::Write;

use super::cell::{Cell, Measured};
use super::definition::Study;
use super::run::{CellOutcome, StudyCell, StudyTable};
use crate::plot::{Chart, Point, Series, svg};

impl StudyTable {
    /// One table per text with the models as columns, as in papers, then all figures.
    #[must_use]
    pub fn markdown(&self, study: &Study) -> String {
        let mut out = format!("# {}\n\n", study.title);
        if !study.description.is_empty() {
            let _ = writeln!(out, "{}\n", study.description.trim());
        }
        for text in &study.texts {
            let _ = writeln!(out, "## {}\n", text.name);
            let _ = writeln!(out, "{}\n", self.protocol(&text.name, &text.layout.describe()));
            self.pivot(&mut out, study, &text.name);
            self.figures(&mut out, study, &text.name);
        }
        out += "True bits: 8 × bytes of the whole file ÷ parameters. Decoder bits: stored bits per \
                weight of the decoder's linear layers. Nominal: what the paper counts, without masks, \
                regions, scales and embeddings; not a size. KL: nats per token from the dense \
                checkpoint. Same best token: share of tokens for which model and checkpoint think \
                the same token most likely. ± is one standard error over windows.\n";
        for line in &study.left_out {
            let _ = writeln!(out, "\nLeft out: {line}");
        }
        let builds = self.builds();
        let _ = writeln!(out, "\nMeasured by stb-convert {}.", builds.join(", "));
        out
    }

    /// The builds that measured the cells, sorted.
    #[must_use]
    pub fn builds(&self) -> Vec<String> {
        let mut builds: Vec<String> =
            self.cells().map(|(_, cell)| format!("{} ({})", cell.build, cell.isa)).collect();
        builds.sort();
        builds.dedup();
        builds
    }

    fn cells(&self) -> impl Iterator<Item = (&StudyCell, &Cell)> {
        self.entries.iter().filter_map(|entry| match &entry.outcome {
            CellOutcome::Done(cell) => Some((entry, &**cell)),
            CellOutcome::Failed(_) => None,
        })
    }

    fn find(&self, model: &str, recipe: &str, text: &str) -> Option<&StudyCell> {
        self.entries.iter().find(|e| e.model == model && e.recipe == recipe && e.text == text)
    }

    fn protocol(&self, text: &str, layout: &str) -> String {
        let mut models = Vec::new();
        for (entry, cell) in self.cells().filter(|(e, _)| e.text == text) {
            let line = format!(
                "{}: {} windows of {} tokens",
                entry.model, cell.windows, cell.inputs.context
            );
            if !models.contains(&line) {
                models.push(line);
            }
        }
        format!("Perplexity ({layout}; windows do not overlap; {}).", models.join(", "))
    }

    fn pivot(&self, out: &mut String, study: &Study, text: &str) {
        *out += "| recipe |";
        for model in &study.models {
            let _ = write!(out, " {} | true bits |", model.name);
        }
        *out += "\n|---|";
        *out += &"---|---|".repeat(study.models.len());
        *out += "\n";
        for recipe in &study.recipes {
            let _ = write!(out, "| {} |", recipe.label);
            for model in &study.models {
                let entry = self.find(&model.name, &recipe.label, text);
                match entry.map(|e| &e.outcome) {
                    Some(CellOutcome::Done(cell)) => {
                        let perplexity = plus_minus(cell.perplexity, 1.0);
                        let _ = write!(out, " {perplexity} | {:.3} |", cell.true_bits);
                    }
                    Some(CellOutcome::Failed(_)) => *out += " failed | |",
                    None => *out += " | |",
                }
            }
            *out += "\n";
        }
        *out += "\n";
    }

    fn figures(&self, out: &mut String, study: &Study, text: &str) {
        *out += "| model | recipe | true bits | decoder bits | nominal (paper) | perplexity | loss \
                 above dense | KL | same best token % | conversion s |\n";
        *out += "|---|---|---|---|---|---|---|---|---|---|\n";
        for model in &study.models {
            for recipe in &study.recipes {
                let Some(entry) = self.find(&model.name, &recipe.label, text) else { continue };
                let _ = write!(out, "| {} | {} |", model.name, recipe.label);
                match &entry.outcome {
                    CellOutcome::Done(cell) => {
                        let nominal =
                            cell.nominal_bits_paper.map_or(String::new(), |b| format!("{b:.3}"));
                        let _ = writeln!(
                            out,
                            " {:.3} | {:.3} | {nominal} | {} | {} | {} | {} | {:.1} |",
                            cell.true_bits,
                            cell.body_bits,
                            plus_minus(cell.perplexity, 1.0),
                            plus_minus(cell.nll_difference, 1.0),
                            plus_minus(cell.kl, 1.0),
                            plus_minus(cell.top1, 100.0),
                            cell.convert_seconds,
                        );
                    }
                    CellOutcome::Failed(why) => {
                        let why = why.replace('|', "/").replace('\n', " ");
                        let _ = writeln!(out, " failed: {why} | | | | | | | |");
                    }
                }
            }
        }
        *out += "\n";
    }

    /// All figures with all digits as CSV, one cell per line.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut out = String::from(
            "model,recipe,text,parameters,file_bytes,true_bits,body_bits,nominal_bits_paper,\
             perplexity,perplexity_se,dense_perplexity,nll_difference,nll_difference_se,kl,kl_se,\
             top1,top1_se,windows,context,convert_seconds,error\n",
        );
        for entry in &self.entries {
            let names = [&entry.model, &entry.recipe, &entry.text].map(|name| quoted(name));
            out += &names.join(",");
            match &entry.outcome {
                CellOutcome::Done(cell) => {
                    let _ = write!(
                        out,
                        ",{},{},{},{},{}",
                        cell.parameters,
                        cell.file_bytes,
                        cell.true_bits,
                        cell.body_bits,
                        cell.nominal_bits_paper.map_or(String::new(), |b| b.to_string()),
                    );
                    for (value, error) in [
                        (cell.perplexity, true),
                        (cell.dense_perplexity, false),
                        (cell.nll_difference, true),
                        (cell.kl, true),
                        (cell.top1, true),
                    ] {
                        let _ = write!(out, ",{}", value.value);
                        if error {
                            let error = value.standard_error.map(|e| e.to_string());
                            let _ = write!(out, ",{}", error.unwrap_or_default());
                        }
                    }
                    let (windows, context) = (cell.windows, cell.inputs.context);
                    let _ = writeln!(out, ",{windows},{context},{},", cell.convert_seconds);
                }
                CellOutcome::Failed(why) => {
                    let _ = writeln!(out, "{}{}", ",".repeat(18), quoted(why));
                }
            }
        }
        out
    }

    /// Perplexity against true bits, a chart for each text and model.
    #[must_use]
    pub fn svg(&self, study: &Study) -> String {
        let mut charts = Vec::new();
        for text in &study.texts {
            for model in &study.models {
                let point = |(entry, cell): (&StudyCell, &Cell)| Point {
                    x: cell.true_bits,
                    y: cell.perplexity.value,
                    error: cell.perplexity.standard_error.unwrap_or(0.0),
                    label: entry.recipe.clone(),
                };
                let mine =
                    |(e, _): &(&StudyCell, &Cell)| e.model == model.name && e.text == text.name;
                let points: Vec<Point> = self.cells().filter(mine).map(point).collect();
                charts.push(Chart {
                    title: format!("{}: {} on {}", study.title, model.name, text.name),
                    x_label: "true bits per parameter of the whole file".into(),
                    y_label: "perplexity".into(),
                    log_x: true,
                    log_y: true,
                    series: vec![Series { name: model.name.clone(), points, line: false }],
                });
            }
        }
        svg(&charts)
    }
}

/// Four significant digits; the error with the same number of decimals.
fn plus_minus(value: Measured, scale: f64) -> String {
    let (value, error) = (value.value * scale, value.standard_error.map(|e| e * scale));
    let size = value.abs().max(1e-3).log10().floor() as i32;
    let digits = (3 - size).clamp(0, 5) as usize;
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// A field of a CSV line.
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let with = |value, standard_error| plus_minus(Measured { value, standard_error }, 1.0);
        assert_eq!(with(12.263_4, Some(0.142_1)), "12.26 ± 0.14");
        assert_eq!(with(3130.7, Some(31.0)), "3131 ± 31");
        assert_eq!(with(0.012_345_6, Some(0.000_1)), "0.01235 ± 0.00010");
        assert_eq!(with(0.0, Some(0.0)), "0.00000 ± 0.00000");
        assert_eq!(with(1.5, None), "1.500");
    }

    #[test]
    fn csv_fields_are_quoted() {
        assert_eq!(quoted("a"), "a");
        assert_eq!(quoted("a, \"b\""), "\"a, \"\"b\"\"\"");
    }
}
