//! Signal names and numbers of Linux on x86-64 (signal(7)).

use thiserror::Error;

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const REAL_TIME_MINIMUM: i32 = 34;
const REAL_TIME_MAXIMUM: i32 = 64;

/// Not a signal; runc's words.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown signal {0:?}")]
pub struct UnknownSignal(String);

/// A signal by its number or its name, with or without `SIG`, in any case.
pub fn parse(text: &str) -> Result<i32, UnknownSignal> {
    let unknown = || UnknownSignal(text.to_owned());
    if let Ok(number) = text.parse::<i32>() {
        // 0 only asks whether the process is there.
        return if (0..=REAL_TIME_MAXIMUM).contains(&number) {
            Ok(number)
        } else {
            Err(unknown())
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let alias = match name {
        "IOT" => "ABRT",
        "CLD" => "CHLD",
        "POLL" => "IO",
        name => name,
    };
    if let Some(index) = NAMES.iter().position(|known| *known == alias) {
        return i32::try_from(index + 1).map_err(|_| unknown());
    }
    let from = |base: i32, sign: i32, rest: &str| {
        let digits = match rest.strip_prefix(if sign > 0 { '+' } else { '-' }) {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits,
            None if rest.is_empty() => "0",
            _ => return None,
        };
        Some(base + sign * i32::from(digits.parse::<u8>().ok()?))
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        from(REAL_TIME_MINIMUM, 1, rest)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        from(REAL_TIME_MAXIMUM, -1, rest)
    } else {
        None
    };
    number
        .filter(|number| (REAL_TIME_MINIMUM..=REAL_TIME_MAXIMUM).contains(number))
        .ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("9", 9),
            ("0", 0),
            ("64", 64),
            ("USR1", 10),
            ("SIGWINCH", 28),
            ("SYS", 31),
            ("POLL", 29),
            ("IOT", 6),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("CHLD", 17),
            ("STOP", 19),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for text in [
            "",
            "SIG",
            "65",
            "-1",
            "NOPE",
            "RTMIN+40",
            "RTMAX+1",
            "SIGSIGTERM",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
