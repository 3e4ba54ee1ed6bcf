//! What the probe finds on this host.

fn main() {
    let start = std::time::Instant::now();
    let probe = zygote_vmm::probe::probe();
    println!("{probe:?} in {:?}", start.elapsed());
}
