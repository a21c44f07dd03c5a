//! bulkhead-config.toml(5), made from the commented configuration file that is installed: its
//! comments are the text, its keys the entries.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

/// The file; a test of the runtime proves that it has every key.
const DOCUMENTED: &str = include_str!("../../runtime/config.toml");

/// A part of the file.
#[derive(Debug, PartialEq, Eq)]
enum Part<'t> {
    /// `[name]`
    Section(&'t str),
    /// Lines of a comment.
    Text(Vec<&'t str>),
    /// A key with its value, and whether the value is an example rather than the default.
    Key(&'t str, &'t str, bool),
}

fn parts(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    for line in text.lines() {
        let comment = line
            .strip_prefix('#')
            .map(|rest| rest.strip_prefix(' ').unwrap_or(rest));
        let content = comment.unwrap_or(line);
        if let Some((key, value)) = content.split_once(" = ").filter(|(key, _)| is_key(key)) {
            parts.push(Part::Key(key, value, comment.is_some()));
        } else if let Some(text) = comment {
            match parts.last_mut() {
                Some(Part::Text(lines)) => lines.push(text),
                _ => parts.push(Part::Text(vec![text])),
            }
        } else if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            parts.push(Part::Section(name));
        } else {
            // What comes after an empty line is another comment.
            parts.push(Part::Text(Vec::new()));
        }
    }
    parts.retain(|part| !matches!(part, Part::Text(lines) if lines.is_empty()));
    parts
}

fn is_key(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// The page.
pub(crate) fn page() -> String {
    let mut roff = Roff::new();
    let source = concat!("bulkhead ", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["bulkhead-config.toml", "5", "", source, "Bulkhead"]);
    roff.control("SH", ["NAME"]);
    roff.text(vec![roman(
        "bulkhead-config.toml - what an administrator decides for all containers of a host",
    )]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text(vec![bold("/etc/bulkhead/config.toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    let mut parts = parts(DOCUMENTED).into_iter();
    if let Some(Part::Text(lines)) = parts.next() {
        paragraphs(&mut roff, &lines);
    }
    roff.control("SH", ["KEYS"]);
    let mut comment = Vec::new();
    for part in parts {
        match part {
            Part::Section(name) => {
                roff.control("SS", [format!("[{name}]").as_str()]);
            }
            Part::Text(lines) => comment = lines,
            Part::Key(key, value, example) => {
                roff.control("TP", []);
                roff.text(entry(key, value, example));
                paragraphs(&mut roff, &comment);
                comment.clear();
            }
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text(vec![bold("bulkhead"), roman("(1)")]);
    roff.render()
}

fn entry(key: &str, value: &str, example: bool) -> Vec<Inline> {
    let kind = if example { "for example" } else { "default" };
    vec![
        bold(key),
        roman(format!(" ({kind}: ")),
        italic(value),
        roman(")"),
    ]
}

/// Lines of a comment; those that are indented stay lines.
fn paragraphs(roff: &mut Roff, lines: &[&str]) {
    for line in lines {
        match line.strip_prefix("  ") {
            _ if line.is_empty() => {
                roff.control("PP", []);
            }
            Some(line) => {
                roff.control("br", []);
                roff.text(vec![roman(line)]);
            }
            None => {
                roff.text(vec![roman(*line)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_belong_to_the_key_that_follows() {
        let text = "# About.\n#\n# More.\n\n# Of a.\na = 1\n\n[s]\n# Of b.\n# b = \"/x\"\n";
        assert_eq!(
            parts(text),
            [
                Part::Text(vec!["About.", "", "More."]),
                Part::Text(vec!["Of a."]),
                Part::Key("a", "1", false),
                Part::Section("s"),
                Part::Text(vec!["Of b."]),
                Part::Key("b", "\"/x\"", true),
            ]
        );
    }

    #[test]
    fn every_key_is_on_the_page() {
        let page = page();
        for key in ["unknown_properties", "lsm_labels", "memory_mib", "max_cpus"] {
            assert!(page.contains(&format!("\\fB{key}\\fR")), "{key}: {page}");
        }
        assert!(page.contains(".SS [guest]"), "{page}");
    }
}
