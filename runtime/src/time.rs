//! Times as RFC 3339, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// Year, month, day, hour, minute, second of a time in seconds since the epoch.
fn civil(seconds: i64) -> (i64, i64, i64, i64, i64, i64) {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days are counted from 0000-03-01, so that leap days end a year; eras of 400 years are alike.
    let day = days + 719_468;
    let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    (
        year,
        month,
        day,
        second / 3600,
        second / 60 % 60,
        second % 60,
    )
}

/// A time in seconds since the epoch, to the second.
pub fn rfc3339(seconds: i64) -> String {
    let (year, month, day, hour, minute, second) = civil(seconds);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Now, to the second.
pub fn now() -> String {
    rfc3339(seconds_and_nanoseconds().0)
}

/// Now, to the nanosecond.
pub fn now_precise() -> String {
    let (seconds, nanoseconds) = seconds_and_nanoseconds();
    let text = rfc3339(seconds);
    format!("{}.{nanoseconds:09}Z", text.trim_end_matches('Z'))
}

/// Hour and minute of a time in seconds since the epoch.
pub fn hour_and_minute(seconds: i64) -> String {
    let (_, _, _, hour, minute, _) = civil(seconds);
    format!("{hour:02}:{minute:02}")
}

fn seconds_and_nanoseconds() -> (i64, u32) {
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (
        i64::try_from(time.as_secs()).unwrap_or_default(),
        time.subsec_nanos(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59Z");
        assert_eq!(hour_and_minute(1_700_000_000), "22:13");
    }
}
