//! The log in runc's two formats, which the tools above a runtime read: `text`
//! (`time="…" level=error msg="…"`) and `json`, to standard error or to a file.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    path::Path,
    sync::Arc,
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer, writer::BoxMakeWriter},
    registry::LookupSpan,
};

/// A format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `key=value`.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Begins logging: warnings and errors, or everything.
pub fn begin(file: Option<&Path>, format: LogFormat, debug: bool) -> io::Result<()> {
    let writer = match file {
        Some(path) => BoxMakeWriter::new(Arc::new(open(path)?)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Format(format))
        .with_writer(writer)
        .finish();
    // Only a second call fails, which leaves the first one's settings.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .open(path)
}

struct Format(LogFormat);

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let level = level_name(*event.metadata().level());
        writeln!(
            writer,
            "{}",
            line(self.0, level, &message.0, &crate::time::now())
        )
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    }
}

fn line(format: LogFormat, level: &str, message: &str, time: &str) -> String {
    // JSON's quoting serves for both: the text format's own is a subset of it.
    let quoted = serde_json::Value::from(message).to_string();
    match format {
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={quoted}"),
        LogFormat::Json => {
            format!("{{\"level\":\"{level}\",\"msg\":{quoted},\"time\":\"{time}\"}}")
        }
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write;
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let time = "2026-01-02T03:04:05Z";
        assert_eq!(
            line(LogFormat::Text, "error", "exec: \"a\"", time),
            r#"time="2026-01-02T03:04:05Z" level=error msg="exec: \"a\"""#
        );
        let json = line(LogFormat::Json, "warning", "two\nlines", time);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["msg"], "two\nlines");
        assert_eq!(value["level"], "warning");
        assert_eq!(value["time"], time);
    }
}
