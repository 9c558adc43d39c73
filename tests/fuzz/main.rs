//! Feeds mutated golden files to everything that decodes bytes from outside.
//!
//! Every decoder must come back with an answer: no panic, no memory beyond a stated bound, and what it accepts must
//! encode again to what decodes the same. Checksums are made to fit, so that the code behind them is reached.
//! `BLOCKHOUSE_FUZZ_SECONDS` runs each decoder for longer, `BLOCKHOUSE_FUZZ_SEED` repeats one input. To add a
//! decoder, add a [`Target`] to [`targets`].
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod counting;
mod golden;
mod mutate;
mod nbd;
mod targets;

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// One decoder under test.
struct Target {
    name: &'static str,
    /// Inputs that are accepted.
    seeds: Vec<Vec<u8>>,
    /// Most memory that decoding an input of this length may hold at a time, on its own thread.
    heap_bytes_max: fn(usize) -> usize,
    /// Makes checksums fit, so that a mutated input gets behind them.
    fix: fn(&mut Vec<u8>),
    /// Decodes; panics if what was accepted does not encode to what decodes the same. Returns whether it was accepted.
    decode: fn(&[u8]) -> bool,
}

fn run_one(target: &Target, seed: u64, input: &[u8]) -> bool {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let (accepted, peak_bytes) = counting::peak_bytes(|| (target.decode)(input));
        let bound = (target.heap_bytes_max)(input.len());
        assert!(peak_bytes <= bound, "held {peak_bytes} bytes, more than {bound}");
        accepted
    }));
    outcome.unwrap_or_else(|panic| {
        let hex = input.iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        eprintln!("{}: failed with BLOCKHOUSE_FUZZ_SEED={seed}, input {hex}", target.name);
        std::panic::resume_unwind(panic)
    })
}

fn input(target: &Target, seed: u64) -> Vec<u8> {
    let mut input = mutate::mutated(&target.seeds, seed);
    (target.fix)(&mut input);
    input
}

fn run(name: &str) {
    let target = targets::all().into_iter().chain(nbd::targets()).find(|target| target.name == name).unwrap();
    for good in &target.seeds {
        assert!(run_one(&target, 0, good), "{name}: a seed is not accepted");
    }
    let number = |variable: &str| std::env::var(variable).ok().map(|value| value.parse::<u64>().unwrap());
    if let Some(seed) = number("BLOCKHOUSE_FUZZ_SEED") {
        run_one(&target, seed, &input(&target, seed));
        return;
    }
    let first: u64 = rand::random::<u64>() >> 16;
    let end = Instant::now() + Duration::from_secs(number("BLOCKHOUSE_FUZZ_SECONDS").unwrap_or(2));
    let (mut count, mut accepted) = (0u64, 0u64);
    while Instant::now() < end {
        let seed = first + count;
        accepted += u64::from(run_one(&target, seed, &input(&target, seed)));
        count += 1;
    }
    println!("{name}: {count} inputs from seed {first} on, {accepted} accepted");
}

#[test]
fn g19_pack_footers() {
    run("pack footer");
}

#[test]
fn g19_segments() {
    run("segment");
}

#[test]
fn g19_maps() {
    run("map");
}

#[test]
fn g19_map_references() {
    run("map reference");
}

#[test]
fn g19_blocks() {
    run("block");
}

#[test]
fn g19_heads() {
    run("head");
}

#[test]
fn g19_epoch_headers() {
    run("epoch header");
}

#[test]
fn g19_nbd_headers() {
    run("nbd headers");
}

#[test]
fn g19_nbd_handshakes() {
    run("nbd handshake");
}

#[test]
fn g19_nbd_requests() {
    run("nbd requests");
}

#[test]
fn g19_nbd_sessions() {
    run("nbd session");
}

#[test]
fn g19_qcow2_images() {
    run("qcow2");
}
