//! Makes hostile configurations out of a good one, the same for the same seed: values of other
//! types, sizes out of range, paths that lead astray, entries twice, and texts that are no JSON.

use fastrand::Rng;
use serde_json::{Map, Value, json};

/// A hostile configuration.
pub(crate) struct Mutant {
    /// What was done, for messages.
    pub(crate) story: String,
    /// The bytes of its config.json.
    pub(crate) bytes: Vec<u8>,
}

/// Makes the mutant that this seed stands for.
pub(crate) fn mutate(good: &Value, seed: u64) -> Mutant {
    let mut rng = Rng::with_seed(seed);
    if rng.u32(..12) == 0 {
        return mutate_text(good, &mut rng);
    }
    let mut value = good.clone();
    let mut stories = Vec::new();
    for _ in 0..rng.u32(1..=2) {
        let pointers = pointers(&value);
        let pointer = &pointers[rng.usize(..pointers.len())];
        stories.push(mutate_value(&mut value, pointer, &mut rng));
    }
    Mutant {
        story: stories.join(", then "),
        bytes: serde_json::to_vec(&value).unwrap_or_default(),
    }
}

/// Where everything below the root of a document is.
fn pointers(value: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, found: &mut Vec<String>) {
        let mut step = |key: &str, below: &Value| {
            let key = key.replace('~', "~0").replace('/', "~1");
            let at = format!("{at}/{key}");
            found.push(at.clone());
            walk(below, &at, found);
        };
        match value {
            Value::Object(map) => map.iter().for_each(|(key, below)| step(key, below)),
            Value::Array(list) => {
                for (index, below) in list.iter().enumerate() {
                    step(&index.to_string(), below);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(value, "", &mut found);
    found
}

/// Changes one place.
fn mutate_value(document: &mut Value, pointer: &str, rng: &mut Rng) -> String {
    let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", pointer));
    match rng.u32(..10) {
        0 => {
            remove(document, parent, key);
            return format!("{pointer} removed");
        }
        1 => {
            if let Some(Value::Object(map)) = document.pointer_mut(parent) {
                map.insert("bulkheadKnowsNoSuchThing".to_owned(), json!([1, "x"]));
                return format!("something unknown beside {pointer}");
            }
        }
        2 | 3 => {
            if let Some(Value::Array(list)) = document.pointer_mut(parent)
                && let Some(entry) = key.parse::<usize>().ok().and_then(|at| list.get(at))
            {
                let entry = entry.clone();
                let again = if rng.bool() { 1 } else { 300 };
                list.extend(std::iter::repeat_n(entry, again));
                return format!("{pointer} again, {again} times");
            }
        }
        4 => {
            if let Some(Value::Array(list)) = document.pointer_mut(parent) {
                list.reverse();
                return format!("{parent} backwards");
            }
        }
        _ => {}
    }
    let Some(place) = document.pointer_mut(pointer) else {
        return String::new();
    };
    let new = match place {
        Value::Number(_) if rng.u32(..4) > 0 => number(rng),
        Value::String(text) if rng.u32(..4) > 0 => Value::String(hostile_text(text, rng)),
        _ => other_type(rng),
    };
    *place = new.clone();
    let mut shown = new.to_string();
    if shown.len() > 80 {
        shown = format!("{} bytes of {:.20}…", shown.len(), shown);
    }
    format!("{pointer} = {shown}")
}

fn remove(document: &mut Value, parent: &str, key: &str) {
    match document.pointer_mut(parent) {
        Some(Value::Object(map)) => drop(map.remove(&key.replace("~1", "/").replace("~0", "~"))),
        Some(Value::Array(list)) => {
            if let Ok(index) = key.parse()
                && index < list.len()
            {
                list.remove(index);
            }
        }
        _ => {}
    }
}

/// Numbers at and beyond the ends of every type that a field may have.
fn number(rng: &mut Rng) -> Value {
    let numbers = [
        json!(0),
        json!(-1),
        json!(1),
        json!(i32::MAX),
        json!(i64::from(i32::MAX) + 1),
        json!(u32::MAX),
        json!(u64::from(u32::MAX) + 1),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1e300),
        json!(0.5),
    ];
    numbers[rng.usize(..numbers.len())].clone()
}

fn other_type(rng: &mut Rng) -> Value {
    match rng.u32(..9) {
        0 => Value::Null,
        1 => json!(true),
        2 => number(rng),
        3 => json!(""),
        4 => json!("text"),
        5 => json!([]),
        6 => json!({}),
        7 => json!([[[[]]], {"a": null}]),
        _ => Value::Object(Map::from_iter([("path".to_owned(), json!("/"))])),
    }
}

/// Texts that lead astray wherever a path, a name or an option stands.
fn hostile_text(old: &str, rng: &mut Rng) -> String {
    match rng.u32(..16) {
        0 => String::new(),
        1 => format!("../../../../../..{old}"),
        2 => format!("{old}/../../../.."),
        3 => "/".to_owned(),
        4 => format!("{old}\0"),
        5 => format!("{old}\nlevel=error msg=forged"),
        6 => "x".repeat(5000),
        7 => "/a".repeat(40_000),
        8 => "/proc/self/root/etc".to_owned(),
        // Links that the bundle's root filesystem holds.
        9 => "/to-root/etc".to_owned(),
        10 => "/to-host/etc".to_owned(),
        11 => "/loop/x".to_owned(),
        12 => old.to_uppercase(),
        13 => format!("{old}\u{202e}ünï\u{1b}[2J"),
        14 => "-1".to_owned(),
        _ => "no-such-thing".to_owned(),
    }
}

/// Changes the text, so that it may be JSON no more.
fn mutate_text(good: &Value, rng: &mut Rng) -> Mutant {
    let mut bytes = serde_json::to_vec_pretty(good).unwrap_or_default();
    let at = rng.usize(1..bytes.len());
    let story = match rng.u32(..6) {
        0 => {
            bytes.truncate(at);
            format!("cut after {at} bytes")
        }
        1 => {
            bytes[at] ^= 1 << rng.u32(..8);
            format!("one bit of byte {at} turned")
        }
        2 => {
            bytes[at] = 0xff;
            format!("byte {at} is no UTF-8")
        }
        3 => {
            bytes.splice(0..0, *b"\xef\xbb\xbf");
            "a byte order mark first".to_owned()
        }
        4 => {
            let deep = rng.usize(100..200_000);
            bytes = "{\"linux\":".repeat(deep).into_bytes();
            format!("{deep} levels deep")
        }
        _ => {
            bytes.pop();
            bytes.extend(br#","process":{"args":["/bin/false"],"cwd":"/"}}"#);
            "the process twice".to_owned()
        }
    };
    Mutant { story, bytes }
}
