//! Collects measured values, and presents their medians as a table and as JSON.

use std::fmt;

use serde_json::{Value, json};

use crate::runtime::Runtime;

/// All values of one measure of one runtime.
struct Figure {
    measure: String,
    runtime: Runtime,
    unit: &'static str,
    values: Vec<f64>,
}

impl Figure {
    fn sorted(&self) -> Vec<f64> {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        values
    }

    fn summary(&self) -> (f64, f64, f64) {
        let values = self.sorted();
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        (median, values[0], values[values.len() - 1])
    }
}

/// Values in the order in which their measures first came.
#[derive(Default)]
pub(super) struct Figures(Vec<Figure>);

impl Figures {
    pub(super) fn add(&mut self, measure: &str, runtime: Runtime, unit: &'static str, value: f64) {
        let known = self
            .0
            .iter_mut()
            .find(|known| known.measure == measure && known.runtime == runtime);
        match known {
            Some(figure) => figure.values.push(value),
            None => self.0.push(Figure {
                measure: measure.to_owned(),
                runtime,
                unit,
                values: vec![value],
            }),
        }
    }

    /// `{"results": [{"measure", "runtime", "unit", "median", "min", "max", "n"}, …]}`.
    pub(super) fn results(&self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        let results: Vec<Value> = self
            .0
            .iter()
            .map(|figure| {
                let (median, min, max) = figure.summary();
                json!({
                    "measure": figure.measure,
                    "runtime": figure.runtime.program(),
                    "unit": figure.unit,
                    "median": round(median),
                    "min": round(min),
                    "max": round(max),
                    "n": figure.values.len(),
                })
            })
            .collect();
        json!({ "results": results })
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<24} {:<10} {:>10} {:>10} {:>10} {:>4}  unit",
            "measure", "runtime", "median", "min", "max", "n"
        )?;
        for figure in &self.0 {
            let (median, min, max) = figure.summary();
            writeln!(
                f,
                "{:<24} {:<10} {median:>10.2} {min:>10.2} {max:>10.2} {:>4}  {}",
                figure.measure,
                figure.runtime.program(),
                figure.values.len(),
                figure.unit
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_extremes() {
        let mut figures = Figures::default();
        for value in [3.0, 1.0, 10.0, 2.0] {
            figures.add("x", Runtime::Crun, "ms", value);
        }
        figures.add("x", Runtime::Runc, "ms", 7.0);
        let results = figures.results();
        assert_eq!(
            results["results"][0],
            json!({ "measure": "x", "runtime": "crun", "unit": "ms", "median": 2.5, "min": 1.0,
                "max": 10.0, "n": 4 })
        );
        assert_eq!(results["results"][1]["median"], 7.0);
    }
}
