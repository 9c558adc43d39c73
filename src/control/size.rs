//! Sizes as people write them.
//!
//! Owns: `40G`, `1.5TiB`, `512` to bytes and back, exactly.
//! Does not own: which sizes make sense for what (a volume's is checked by the service).

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// A number of bytes in settings and on the command line.
///
/// `K`, `M`, `G`, `T`, `P`, `E` and `KiB`, `MiB`, … are powers of 1024, as in qemu-img; `KB`, `MB`, … powers of 1000; nothing
/// or `B` is bytes. Upper and lower case mean the same. A fraction is fine where the whole is a whole number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub u64);

/// Why a text is no size. Each names the text.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    #[error("a size is missing; write a number and a unit, like 40G")]
    Empty,
    #[error("\"{0}\" is no size: it does not begin with a number; write it like 40G, 1.5TiB or 512")]
    NoNumber(String),
    #[error(
        "\"{text}\" is no size: \"{unit}\" is no unit; use K, M, G, T, P, E (1024), KiB, …, or KB, … (1000)"
    )]
    UnknownUnit { text: String, unit: String },
    #[error("\"{0}\" is not a whole number of bytes")]
    NotWhole(String),
    #[error("\"{0}\" is too large: the limit is 16 EiB less a byte")]
    TooLarge(String),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(SizeError::Empty);
        }
        let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(number_len);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(SizeError::NoNumber(text.to_owned()));
        }
        let unit = unit.trim();
        let unit_bytes = unit_bytes(unit)
            .ok_or_else(|| SizeError::UnknownUnit { text: text.to_owned(), unit: unit.to_owned() })?;
        exact_product(whole, fraction.trim_end_matches('0'), unit_bytes, text).map(Self)
    }
}

/// Digits that a fraction of the largest unit can need: 2^60 divides 10^60, and no shorter power of ten.
const FRACTION_DIGITS_MAX: usize = 60;

fn exact_product(whole: &str, fraction: &str, unit_bytes: u64, text: &str) -> Result<u64, SizeError> {
    let too_large = || SizeError::TooLarge(text.to_owned());
    let not_whole = || SizeError::NotWhole(text.to_owned());
    if fraction.len() > FRACTION_DIGITS_MAX {
        return Err(not_whole());
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole_bytes = whole.checked_mul(unit_bytes).ok_or_else(too_large)?;

    // Every unit is a product of twos and fives: multiplied one at a time into the decimal digits, nothing is rounded.
    let mut digits: Vec<u8> = fraction.bytes().map(|digit| digit - b'0').collect();
    let mut fraction_bytes: u64 = 0;
    let mut rest = unit_bytes;
    while rest > 1 {
        let factor: u8 = if rest.is_multiple_of(2) { 2 } else { 5 };
        rest /= u64::from(factor);
        let mut carry = 0;
        for digit in digits.iter_mut().rev() {
            let product = *digit * factor + carry;
            *digit = product % 10;
            carry = product / 10;
        }
        fraction_bytes = fraction_bytes * u64::from(factor) + u64::from(carry);
    }
    if digits.iter().any(|&digit| digit != 0) {
        return Err(not_whole());
    }
    whole_bytes.checked_add(fraction_bytes).ok_or_else(too_large)
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if unit.is_empty() || unit == "b" {
        return Some(1);
    }
    let mut letters = unit.chars();
    let power = u32::try_from("kmgtpe".find(letters.next()?)?).ok()? + 1;
    match letters.as_str() {
        "" | "ib" => 1024u64.checked_pow(power),
        "b" => 1000u64.checked_pow(power),
        _ => None,
    }
}

const BINARY_UNITS: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];

impl fmt::Display for Size {
    /// Exact, in the largest binary unit that divides it: parses back to the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        let mut power = 0;
        while value != 0 && value.is_multiple_of(1024) && power + 1 < BINARY_UNITS.len() {
            value /= 1024;
            power += 1;
        }
        write!(f, "{value}{}", BINARY_UNITS[power])
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like \"40G\", or a number of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::custom("a size is not negative"))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(text: &str) -> u64 {
        text.parse::<Size>().unwrap().0
    }

    #[test]
    fn units_are_those_of_qemu_img_and_the_decimal_ones() {
        assert_eq!(bytes("512"), 512);
        assert_eq!(bytes("512B"), 512);
        assert_eq!(bytes("40G"), 40 << 30);
        assert_eq!(bytes("40g"), 40 << 30);
        assert_eq!(bytes("40 GiB"), 40 << 30);
        assert_eq!(bytes("40GB"), 40_000_000_000);
        assert_eq!(bytes("1.5TiB"), 3 << 39);
        assert_eq!(bytes("1.5kB"), 1500);
        assert_eq!(bytes("0.5K"), 512);
        assert_eq!(bytes("15.5E"), 31 << 59);
        assert_eq!(bytes("18446744073709551615"), u64::MAX);
    }

    #[test]
    fn errors_say_what_was_wrong() {
        let error = |text: &str| text.parse::<Size>().unwrap_err();
        assert_eq!(error(" "), SizeError::Empty);
        assert_eq!(error("G"), SizeError::NoNumber("G".into()));
        assert_eq!(error("-1G"), SizeError::NoNumber("-1G".into()));
        assert_eq!(error(".5G"), SizeError::NoNumber(".5G".into()));
        assert_eq!(error("1.G"), SizeError::NoNumber("1.G".into()));
        assert_eq!(error("1.2.3G"), SizeError::NoNumber("1.2.3G".into()));
        assert_eq!(error("1.5"), SizeError::NotWhole("1.5".into()));
        assert_eq!(error("0.3K"), SizeError::NotWhole("0.3K".into()));
        assert_eq!(error("16E"), SizeError::TooLarge("16E".into()));
        assert_eq!(error("99999999999999999999"), SizeError::TooLarge("99999999999999999999".into()));
        assert_eq!(error("40X"), SizeError::UnknownUnit { text: "40X".into(), unit: "X".into() });
        assert!(error("40Gb/s").to_string().contains("\"Gb/s\" is no unit"));
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back(value: u64, shift in 0u32..64) {
            let size = Size(value >> shift << shift);
            prop_assert_eq!(size.to_string().parse::<Size>(), Ok(size));
        }

        #[test]
        fn a_decimal_fraction_of_a_unit_is_exact(thousandths in 0u64..9_000_000, power in 1u32..6) {
            let text = format!("{}.{:03}{}B", thousandths / 1000, thousandths % 1000, ["K", "M", "G", "T", "P"][power as usize - 1]);
            prop_assert_eq!(text.parse::<Size>(), Ok(Size(thousandths * 1000u64.pow(power - 1))));
        }

        #[test]
        fn a_binary_fraction_is_exact_or_refused(thousandths in 0u64..9_000_000) {
            let text = format!("{}.{:03}M", thousandths / 1000, thousandths % 1000);
            let product = u128::from(thousandths) << 20;
            let expected = u64::try_from(product / 1000).ok().filter(|_| product.is_multiple_of(1000));
            prop_assert_eq!(text.parse::<Size>().ok(), expected.map(Size));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            if let Ok(size) = text.parse::<Size>() {
                prop_assert_eq!(size.to_string().parse::<Size>(), Ok(size));
            }
        }
    }
}
