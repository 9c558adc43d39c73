//! Mutates inputs, the same way for the same seed.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const INTERESTING: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x2000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// One of `seeds`, changed in a few places.
pub fn mutated(seeds: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut input = seeds[rng.random_range(0..seeds.len())].clone();
    for _ in 0..rng.random_range(1..=4) {
        if input.is_empty() {
            break;
        }
        // Headers are small and say most.
        let end = if rng.random_bool(0.5) { input.len().min(128) } else { input.len() };
        let at = rng.random_range(0..end);
        match rng.random_range(0..8) {
            0 => input[at] ^= 1 << rng.random_range(0..8),
            1 => input[at] = rng.random(),
            2 => input.truncate(at),
            3 => {
                let other = &seeds[rng.random_range(0..seeds.len())];
                let from = rng.random_range(0..other.len());
                let len = rng.random_range(0..=(other.len() - from).min(64));
                input.splice(at..at, other[from..from + len].iter().copied());
            }
            4 => {
                let len = rng.random_range(0..=(input.len() - at).min(64));
                input.drain(at..at + len);
            }
            5 => {
                let from = rng.random_range(0..input.len());
                let len = (input.len() - at.max(from)).min(rng.random_range(0..64));
                input.copy_within(from..from + len, at);
            }
            6 | 7 => {
                let value = INTERESTING[rng.random_range(0..INTERESTING.len())];
                let width = [1, 2, 4, 8][rng.random_range(0..4)].min(input.len() - at);
                let bytes = if rng.random_bool(0.5) { value.to_le_bytes() } else { value.to_be_bytes() };
                let start = rng.random_range(0..=8 - width);
                input[at..at + width].copy_from_slice(&bytes[start..start + width]);
            }
            _ => unreachable!("the range is smaller"),
        }
    }
    input
}
