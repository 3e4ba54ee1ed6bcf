//! What a hostile guest does to its devices: the stored corpus of the fuzz targets, then chance, for
//! a few seconds each. `cargo fuzz` goes on from the same corpus for as long as one likes.

#![allow(clippy::unwrap_used, reason = "a test")]

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zygote_vmm::fuzzing::{Kind, Machine, queues};

const CHANCE: Duration = Duration::from_millis(2500);
const SCRIPT_MAX_BYTES: usize = 2000;

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus for {target}");
    files
}

fn fuzz(target: &str, run: impl Fn(&[u8])) {
    let stored: Vec<Vec<u8>> = corpus(target)
        .iter()
        .map(|path| fs::read(path).unwrap())
        .collect();
    for script in &stored {
        run(script);
    }
    let seed = std::time::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_nanos()
        .to_le_bytes();
    let seed = [seed, seed].concat();
    println!("seed {seed:?}");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = (
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        prop::collection::vec(any::<u8>(), 0..SCRIPT_MAX_BYTES),
    );
    let begun = Instant::now();
    while begun.elapsed() < CHANCE {
        let (which, cut, noise) = strategy.new_tree(&mut runner).unwrap().current();
        // A good beginning, then noise.
        let good = which.get(&stored);
        let mut script = good[..cut.index(good.len() + 1)].to_vec();
        script.extend(noise);
        run(&script);
    }
}

#[test]
fn block_queues() {
    fuzz("block_queues", |script| {
        queues(Kind::Block, script).unwrap()
    });
}

#[test]
fn entropy_queues() {
    fuzz("entropy_queues", |script| {
        queues(Kind::Entropy, script).unwrap()
    });
}

#[test]
fn vsock_queues() {
    fuzz("vsock_queues", |script| {
        queues(Kind::Vsock, script).unwrap()
    });
}

#[test]
fn bus() {
    let machine = Machine::new().unwrap();
    fuzz("bus", |script| machine.run(script));
}
