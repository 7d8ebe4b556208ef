//! Numbers for people: at most three digits and a unit, so that columns keep their width.
//!
//! Exact numbers are in the JSON document.

/// Decimal prefixes, each 1000 times the one before.
const PREFIXES: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];

/// Counts below this are shown in full.
const EXACT_BELOW: u64 = 100_000;

/// A count: `99999`, `123 k`, `1.23 M`.
pub(super) fn count(number: u64) -> String {
    if number < EXACT_BELOW { number.to_string() } else { rate(approximate(number)) }
}

/// A size: `999 B`, `1.23 GB` (10^9 bytes).
pub(super) fn bytes(number: u64) -> String {
    let (digits, prefix) = scaled(approximate(number));
    format!("{} {prefix}B", if number < 1000 { number.to_string() } else { digits })
}

/// Something per second: `0`, `0.25`, `12.3`, `1.23 M`.
pub(super) fn rate(number: f64) -> String {
    match scaled(number) {
        (digits, "") => digits,
        (digits, prefix) => format!("{digits} {prefix}"),
    }
}

/// A part of a whole in percent. A little is never shown as nothing, nor almost all as all.
pub(super) fn share(part: u64, whole: u64) -> String {
    const SHOWN: f64 = 0.1;
    if whole == 0 {
        return "-".to_owned();
    }
    let percent = approximate(part) / approximate(whole) * 100.0;
    match part {
        0 => "0 %".to_owned(),
        _ if part == whole => "100 %".to_owned(),
        _ if percent < SHOWN => format!("<{SHOWN} %"),
        _ if percent > 100.0 - SHOWN => format!(">{} %", 100.0 - SHOWN),
        _ => format!("{percent:.1} %"),
    }
}

/// Three digits and a prefix.
fn scaled(mut number: f64) -> (String, &'static str) {
    // What would be rounded to four digits belongs under the next prefix.
    const ROUNDS_UP: f64 = 999.5;
    let mut chosen = "";
    for (place, prefix) in PREFIXES.iter().enumerate() {
        chosen = prefix;
        if number < ROUNDS_UP || place + 1 == PREFIXES.len() {
            break;
        }
        number /= 1000.0;
    }
    let decimals = match number {
        0.0 => 0,
        _ if number < 9.995 => 2,
        _ if number < 99.95 => 1,
        _ => 0,
    };
    (format!("{number:.decimals$}"), chosen)
}

/// The number as a float: 53 bits are more than the three digits that are shown.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) const fn approximate(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_their_unit() {
        let counts = [0, 7, 99_999, 100_000, 1_234_567, 999_499_999, 999_500_000, u64::MAX].map(count);
        assert_eq!(counts, ["0", "7", "99999", "100 k", "1.23 M", "999 M", "1.00 G", "18.4 E"]);
        let sizes = [0, 64, 999, 1000, 1_234_567_890, 999_999].map(bytes);
        assert_eq!(sizes, ["0 B", "64 B", "999 B", "1.00 kB", "1.23 GB", "1.00 MB"]);
        let rates = [0.0, 0.25, 12.34, 999.4, 999.6, 14_880_952.0].map(rate);
        assert_eq!(rates, ["0", "0.25", "12.3", "999", "1.00 k", "14.9 M"]);
    }

    #[test]
    fn a_share_is_nothing_or_all_only_when_it_is() {
        assert_eq!(share(0, 0), "-");
        assert_eq!(share(0, 5), "0 %");
        assert_eq!(share(1, 1_000_000), "<0.1 %");
        assert_eq!(share(1, 8), "12.5 %");
        assert_eq!(share(999_999, 1_000_000), ">99.9 %");
        assert_eq!(share(5, 5), "100 %");
    }
}
