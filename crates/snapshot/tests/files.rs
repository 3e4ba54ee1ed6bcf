//! Snapshots on disk: what is written comes back, and whatever has happened to it is refused by
//! name.

#![allow(clippy::unwrap_used, reason = "a test")]

use proptest::prelude::*;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zygote_snapshot::state::*;
use zygote_snapshot::*;

fn state(fill: u8) -> MachineState {
    let vcpu = VcpuState {
        cpuid: vec![],
        msrs: vec![MsrEntry {
            index: 0x10,
            value: 7,
        }],
        regs: vec![fill; 144],
        sregs: vec![fill; 312],
        xsave: vec![fill; 100],
        xcrs: vec![],
        debug_regs: vec![],
        lapic: vec![fill; 1024],
        events: vec![],
        mp_state: 0,
        tsc_khz: 1,
    };
    MachineState {
        vcpus: vec![vcpu],
        clock: ClockState { clock_ns: 5 },
        ioapic: IoapicState {
            id: 0,
            select: 0,
            redirections: vec![1; 24],
            pending: 0,
        },
        serial: SerialState {
            baud_divisor_low: 0,
            baud_divisor_high: 0,
            interrupt_enable: 0,
            interrupt_identification: 0,
            line_control: 0,
            line_status: 0,
            modem_control: 0,
            modem_status: 0,
            scratch: 0,
            in_buffer: vec![],
        },
        devices: vec![],
        generation_id_address: 0x1000,
    }
}

fn origin() -> Origin {
    Origin {
        template: "t".into(),
        recipe_digest: "r".into(),
        replica: 0,
        created_unix_s: 0,
        zygote_version: "0".into(),
        protocol_version: 1,
        kernel_release: "6".into(),
        interpreter: "python".into(),
        cpu_vendor: "AuthenticAMD".into(),
    }
}

struct Fixture {
    folder: tempfile::TempDir,
    memory: Vec<u8>,
}

impl Fixture {
    fn snapshot(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn pieces(&self) -> PathBuf {
        self.folder.path().join("pieces")
    }

    fn open(&self) -> Result<Snapshot, OpenError> {
        Snapshot::open(&self.snapshot(), &self.pieces())
    }

    /// What a run does: everything is checked before it is used.
    fn load(&self) -> Result<MachineState, String> {
        let snapshot = self.open().map_err(|e| chain(&e))?;
        let stamps = self.folder.path().join("stamps");
        let verified = snapshot.verify_once(&stamps, &mut |_, _| true);
        verified.map_err(|e| chain(&e))?;
        snapshot.machine().map_err(|e| chain(&e))
    }
}

#[test]
fn what_was_verified_is_compared_again_once_it_is_doubted() {
    let fixture = write(vec![1; 1 << 20]);
    fixture.load().unwrap();
    let snapshot = fixture.open().unwrap();
    let stamps = fixture.folder.path().join("stamps");
    let compared = || {
        let mut count = 0;
        let mut progress = |_, _| {
            count += 1;
            true
        };
        snapshot.verify_once(&stamps, &mut progress).unwrap();
        count
    };
    assert_eq!(compared(), 0, "it was remembered");
    snapshot.forget(&stamps);
    assert!(compared() > 0);
    snapshot.forget(&stamps);
    let stopped = snapshot
        .verify_once(&stamps, &mut |_, _| false)
        .unwrap_err();
    assert!(stopped.to_string().contains("stopped"), "{stopped}");
    assert!(compared() > 0, "what was stopped is not remembered");
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn write(memory: Vec<u8>) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let pieces = folder.path().join("pieces");
    fs::create_dir(&pieces).unwrap();
    fs::write(pieces.join("new"), b"image").unwrap();
    let (bytes, digest) = file_digest(&File::open(pieces.join("new")).unwrap()).unwrap();
    fs::rename(pieces.join("new"), pieces.join(&digest)).unwrap();
    let mut writer = Writer::create(&folder.path().join("s")).unwrap();
    let at = memory.len().min(CHUNK_BYTES as usize);
    let (low, high) = memory.split_at(at);
    let ranges = [(0, low), (at as u64, high)];
    writer
        .memory(ranges.into_iter().filter(|(_, bytes)| !bytes.is_empty()))
        .unwrap();
    writer.machine(&state(3)).unwrap();
    writer.disk(DiskPiece { bytes, digest });
    writer.finish(origin()).unwrap();
    Fixture { folder, memory }
}

/// 5 MiB with islands of data between holes.
fn islands() -> Vec<u8> {
    let mut memory = vec![0; 5 << 20];
    memory[5000..9000].fill(1);
    memory[(4 << 20) + 100] = 9;
    memory
}

fn flip(path: &Path, at: u64) {
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn what_was_written_comes_back_and_zeros_stay_holes() {
    let fixture = write(islands());
    assert_eq!(fixture.load().unwrap(), state(3));
    let file = fs::metadata(fixture.snapshot().join(MEMORY_FILE)).unwrap();
    assert_eq!(
        fs::read(fixture.snapshot().join(MEMORY_FILE)).unwrap(),
        fixture.memory
    );
    assert!(file.blocks() * 512 < 64 * 1024, "{} blocks", file.blocks());
    let report = fixture.open().unwrap().verify(&mut |_, _| true).unwrap();
    assert!(report.read_bytes < report.total_bytes);
}

#[test]
fn a_flipped_bit_in_memory_is_named_by_its_place_even_after_a_good_load() {
    let fixture = write(islands());
    fixture.load().unwrap();
    fixture.load().unwrap();
    let memory = fixture.snapshot().join(MEMORY_FILE);
    flip(&memory, (4 << 20) + 5000);
    let sentence = fixture.load().unwrap_err();
    assert!(sentence.contains(MEMORY_FILE), "{sentence}");
    assert!(sentence.contains("4194304 to 5242880"), "{sentence}");
}

#[test]
fn data_in_what_was_a_hole_is_damage() {
    let fixture = write(islands());
    flip(&fixture.snapshot().join(MEMORY_FILE), 3 << 20);
    assert!(fixture.load().unwrap_err().contains("2097152 to 4194304"));
}

#[test]
fn restoring_the_modification_time_does_not_hide_a_change() {
    let fixture = write(islands());
    fixture.load().unwrap();
    let memory = fixture.snapshot().join(MEMORY_FILE);
    let before = fs::metadata(&memory).unwrap().modified().unwrap();
    flip(&memory, 6000);
    let file = OpenOptions::new().write(true).open(&memory).unwrap();
    file.set_modified(before).unwrap();
    assert!(fixture.load().is_err());
}

#[test]
fn every_byte_of_the_machine_state_counts() {
    let fixture = write(vec![1; 4096]);
    let machine = fixture.snapshot().join(MACHINE_FILE);
    let length = fs::metadata(&machine).unwrap().len();
    for at in 0..length {
        flip(&machine, at);
        let sentence = fixture.load().unwrap_err();
        assert!(sentence.contains(MACHINE_FILE), "{at}: {sentence}");
        flip(&machine, at);
    }
    fixture.load().unwrap();
}

#[test]
fn a_cut_or_missing_piece_is_named() {
    let names = [MACHINE_FILE, MEMORY_FILE, MANIFEST_FILE];
    for name in names {
        let fixture = write(vec![1; 8192]);
        let path = fixture.snapshot().join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        assert!(fixture.load().unwrap_err().contains(name));
        fs::remove_file(&path).unwrap();
        assert!(fixture.load().unwrap_err().contains(name));
    }
}

#[test]
fn a_damaged_or_missing_disk_image_is_named() {
    let fixture = write(vec![1; 8192]);
    let disk = fs::read_dir(fixture.pieces()).unwrap().next().unwrap();
    let path = disk.unwrap().path();
    flip(&path, 2);
    let digest = path.file_name().unwrap().to_str().unwrap();
    assert!(fixture.load().unwrap_err().contains(digest));
    fs::remove_file(&path).unwrap();
    assert!(fixture.load().unwrap_err().contains(digest));
}

#[test]
fn a_folder_whose_writer_was_killed_is_no_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("s");
    let mut writer = Writer::create(&directory).unwrap();
    let opens = || Snapshot::open(&directory, folder.path()).is_ok();
    assert!(!opens());
    writer.memory([(0, &[1_u8; 4096][..])]).unwrap();
    assert!(!opens());
    writer.machine(&state(1)).unwrap();
    assert!(!opens());
    writer.finish(origin()).unwrap();
    assert!(opens());
    assert!(Writer::create(&directory).is_err());
}

#[test]
fn a_stamp_that_is_nonsense_is_no_stamp() {
    let fixture = write(islands());
    fixture.load().unwrap();
    let stamps = fixture.folder.path().join("stamps");
    let stamp = fs::read_dir(&stamps).unwrap().next().unwrap().unwrap();
    File::create(stamp.path())
        .unwrap()
        .write_all(&[0xff; 100])
        .unwrap();
    flip(&fixture.snapshot().join(MEMORY_FILE), 6000);
    assert!(fixture.load().is_err());
}

/// Written by version 1 of the format, on 2026-11-23: what has been written once stays readable.
#[test]
fn the_golden_snapshot_of_version_1_still_loads() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let snapshot = Snapshot::open(&golden.join("s"), &golden.join("pieces")).unwrap();
    assert_eq!(snapshot.machine().unwrap(), state(3));
    snapshot.verify(&mut |_, _| true).unwrap();
    assert_eq!(snapshot.manifest().origin, origin());
    assert_eq!(snapshot.manifest().memory.chunks.len(), 1);
}

/// Written by version 4, on 2026-11-28: what differs from another one is of a machine that was held.
#[test]
fn the_golden_snapshot_of_version_4_that_differs_still_loads() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v4");
    let snapshot = Snapshot::open(&golden.join("s"), &golden.join("pieces")).unwrap();
    assert!(snapshot.manifest().is_held());
    assert_eq!(snapshot.machine().unwrap(), state(4));
    snapshot.verify(&mut |_, _| true).unwrap();
    let mut memory = fs::read(golden.join("base").join(MEMORY_FILE)).unwrap();
    let put = &mut |offset: u64, bytes: &[u8]| {
        memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        true
    };
    snapshot.read_delta(put).unwrap();
    let bytes = [5000, 8191, 8192, 12288].map(|at| memory[at]);
    assert_eq!(bytes, [0, 0, 1, 7]);
    let (whole, folder) = snapshot.into_whole("s".to_owned());
    assert_eq!(
        (folder.as_str(), whole.manifest().is_held()),
        ("base", false)
    );
}

#[test]
fn what_differs_says_whether_its_machine_was_held() {
    let fixture = write(islands());
    for is_held in [true, false] {
        let (base, folder) = fixture.open().unwrap().into_whole("s".to_owned());
        let name = format!("held-{is_held}");
        let mut writer = Writer::create(&fixture.folder.path().join(&name)).unwrap();
        let delta = writer.delta(&base, &folder, is_held).unwrap();
        delta.finish().unwrap();
        writer.machine(&state(1)).unwrap();
        writer.finish(origin()).unwrap();
        let path = fixture.folder.path().join(&name);
        let snapshot = Snapshot::open(&path, &fixture.pieces()).unwrap();
        assert_eq!(snapshot.manifest().is_held(), is_held);
        assert_eq!(snapshot.into_whole(name).1, "s");
    }
    assert!(!fixture.open().unwrap().manifest().is_held());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memory_with_any_islands_round_trips(
        islands in prop::collection::vec((0_usize..(3 << 20), 1_usize..20_000, any::<u8>()), 0..8),
        pages in 1_usize..1200,
    ) {
        let mut memory = vec![0; pages * 4096];
        for (at, length, value) in islands {
            let end = (at + length).min(memory.len());
            if at < end {
                memory[at..end].fill(value);
            }
        }
        let fixture = write(memory);
        fixture.load().unwrap();
        let back = fs::read(fixture.snapshot().join(MEMORY_FILE)).unwrap();
        prop_assert!(back == fixture.memory);
    }

    #[test]
    fn noise_is_refused_without_a_panic(
        header in any::<bool>(),
        noise in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut bytes = noise;
        if header {
            let digest = blake3::hash(&bytes).to_hex();
            let line = format!("zygote-snapshot 1 {digest}\n").into_bytes();
            bytes = [line, bytes].concat();
        }
        prop_assert!(Manifest::decode(&bytes).is_err());
    }

    #[test]
    fn a_machine_state_of_noise_is_refused_without_a_panic(
        noise in prop::collection::vec(any::<u8>(), 0..4000),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let _ = decode_machine(&noise, 1);
        let mut bytes = postcard::to_stdvec(&state(9)).unwrap();
        prop_assert_eq!(decode_machine(&bytes, 1), Some(state(9)));
        prop_assert_eq!(decode_machine(&bytes, 2), None);
        bytes.push(0);
        prop_assert_eq!(decode_machine(&bytes, 1), None, "bytes after the state");
        bytes.pop();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= value;
        }
        let _ = decode_machine(&bytes, 1);
    }
}
