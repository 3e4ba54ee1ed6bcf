//! The store, on a disk.

use super::*;
use crate::Contents;
use std::os::unix::fs::symlink;

fn template(name: &str, digest: &str) -> Template {
    Template {
        name: name.into(),
        created_unix_s: 1,
        memory_bytes: 512 << 20,
        vcpus: 1,
        replicas: 0,
        kernel_release: "6".into(),
        interpreter: "python".into(),
        base: "bookworm".into(),
        packages: vec![],
        digest: digest.into(),
        disk_bytes: 0,
        protocol_version: 0,
        recipe: None,
        contents: Contents::default(),
        tenant: None,
        derived: None,
    }
}

fn publish(store: &Store, name: &str, unique: &str) {
    let fresh = store.begin(name, unique).unwrap();
    store.publish(fresh, &template(name, unique)).unwrap();
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_owned());
    (folder, store)
}

#[test]
fn publishing_replaces_and_the_old_generation_goes() {
    let (_folder, store) = store();
    assert!(matches!(
        store.inspect("a"),
        Err(StoreError::NotFound { .. })
    ));
    publish(&store, "a", "1");
    publish(&store, "b", "2");
    publish(&store, "a", "3");
    assert_eq!(store.inspect("a").unwrap().digest, "3");
    assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 2);
    store.remove("a", false).unwrap();
    assert!(matches!(
        store.remove("a", false),
        Err(StoreError::NotFound { .. })
    ));
    let names: Vec<String> = store.list().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["b"]);
    assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 1);
}

#[test]
fn what_a_killed_build_has_left_is_swept_and_a_live_one_is_not() {
    let (_folder, store) = store();
    publish(&store, "a", "1");
    let dead = store.generations().join(".new-a-dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("half"), "x").unwrap();
    symlink("nowhere", store.names().join(".new-a-dead")).unwrap();
    let live = store.begin("b", "live").unwrap();
    assert!(!dead.exists());
    assert!(fs::symlink_metadata(store.names().join(".new-a-dead")).is_err());
    let builds = store.lock_builds(&mut |_| {}).unwrap();
    store.remove("a", false).unwrap();
    assert!(live.path.exists());
    drop((live, builds));
    publish(&store, "a", "2");
    assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 1);
}

#[test]
fn what_a_paused_sandbox_differs_from_stays() {
    let (_folder, store) = store();
    publish(&store, "a", "1");
    let snapshot = store.sandboxes().join("id/snapshot");
    fs::create_dir_all(&snapshot).unwrap();
    let whole = store.generations().join("a-1/replica-0");
    fs::create_dir_all(store.pieces()).unwrap();
    write_snapshot(&whole, |writer| {
        writer.memory([(0, &[1; 4096][..])]).unwrap()
    });
    let base = Snapshot::open(&whole, &store.pieces()).unwrap();
    fs::remove_dir(&snapshot).unwrap();
    write_snapshot(&snapshot, |writer| {
        let folder = "generations/a-1/replica-0";
        writer.delta(&base, folder, true).unwrap().finish().unwrap();
    });
    assert_eq!(store.pieces_under(&snapshot), store.pieces());
    publish(&store, "a", "2");
    publish(&store, "a", "3");
    let left = |store: &Store| fs::read_dir(store.generations()).unwrap().count();
    assert_eq!(left(&store), 2);
    // One that cannot be read may need any of them.
    let manifest = snapshot.join(zygote_snapshot::MANIFEST_FILE);
    fs::remove_file(&manifest).unwrap();
    publish(&store, "a", "4");
    assert_eq!(left(&store), 3);
    fs::remove_dir_all(store.sandboxes()).unwrap();
    publish(&store, "a", "5");
    assert_eq!(left(&store), 1);
}

/// A template that differs from another one's snapshot.
fn derive(store: &Store, name: &str, unique: &str, from: &Path) {
    let fresh = store.begin(name, unique).unwrap();
    let base = Snapshot::open(from, &store.pieces()).unwrap();
    let folder = from.strip_prefix(store.state_dir()).unwrap();
    write_snapshot(&fresh.replica(0), |writer| {
        let folder = folder.to_str().unwrap();
        writer
            .delta(&base, folder, false)
            .unwrap()
            .finish()
            .unwrap();
    });
    let template = Template {
        replicas: 1,
        ..template(name, unique)
    };
    store.publish(fresh, &template).unwrap();
}

#[test]
fn what_a_derived_template_differs_from_stays_and_is_not_removed_without_it() {
    let (_folder, store) = store();
    publish(&store, "a", "1");
    fs::create_dir_all(store.pieces()).unwrap();
    let whole = store.generations().join("a-1/replica-0");
    write_snapshot(&whole, |writer| {
        writer.memory([(0, &[1; 4096][..])]).unwrap()
    });
    derive(&store, "b", "2", &whole);
    let refused = store.remove("a", false).unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("b is derived from a, and needs")
    );
    let left = |store: &Store| fs::read_dir(store.generations()).unwrap().count();
    // A new build of the base leaves the old one's files where they are.
    publish(&store, "a", "3");
    assert_eq!(left(&store), 3);
    assert!(store.verify("b", &mut |_, _| {}).is_ok());
    store.remove("a", false).unwrap();
    assert_eq!(left(&store), 2);
    store.remove("b", false).unwrap();
    assert_eq!(left(&store), 0);
    // With it, all go.
    publish(&store, "a", "4");
    let whole = store.generations().join("a-4/replica-0");
    write_snapshot(&whole, |writer| {
        writer.memory([(0, &[1; 4096][..])]).unwrap()
    });
    derive(&store, "b", "5", &whole);
    derive(&store, "c", "6", &whole);
    let refused = store.remove("a", false).unwrap_err().to_string();
    assert!(
        refused.starts_with("b, c are derived from a, and need its"),
        "{refused}"
    );
    store.remove("a", true).unwrap();
    assert_eq!((left(&store), store.known().len()), (0, 0));
}

fn write_snapshot(folder: &Path, memory: impl FnOnce(&mut zygote_snapshot::Writer)) {
    use zygote_snapshot::state::*;
    let mut writer = zygote_snapshot::Writer::create(folder).unwrap();
    memory(&mut writer);
    let state = MachineState {
        vcpus: vec![],
        clock: ClockState { clock_ns: 0 },
        ioapic: IoapicState {
            id: 0,
            select: 0,
            redirections: vec![],
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
        generation_id_address: 0,
    };
    writer.machine(&state).unwrap();
    writer
        .finish(zygote_snapshot::Origin {
            template: "a".into(),
            recipe_digest: String::new(),
            replica: 0,
            created_unix_s: 0,
            zygote_version: String::new(),
            protocol_version: 0,
            kernel_release: String::new(),
            interpreter: String::new(),
            cpu_vendor: String::new(),
        })
        .unwrap();
}

#[test]
fn a_template_may_be_called_new() {
    let (_folder, store) = store();
    publish(&store, "new-new-model", "1");
    publish(&store, "a", "2");
    store.remove("a", false).unwrap();
    let names: Vec<String> = store.list().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["new-new-model"]);
    store.inspect("new-new-model").unwrap();
}

#[test]
fn a_second_build_waits_and_says_so() {
    let (_folder, store) = store();
    let first = store.lock_builds(&mut |_| panic!("waited")).unwrap();
    let (told, heard) = std::sync::mpsc::channel();
    let other = store.clone();
    let second = std::thread::spawn(move || {
        let mut tell = |progress: Progress| told.send(progress.message).unwrap();
        other.lock_builds(&mut tell).unwrap()
    });
    assert!(heard.recv().unwrap().contains("waiting"));
    drop(first);
    second.join().unwrap();
}

#[test]
fn images_in_use_stay_and_others_go() {
    let (_folder, store) = store();
    let (kept, indexed, gone) = ("0a".repeat(32), "0b".repeat(32), "0c".repeat(32));
    fs::create_dir_all(store.pieces()).unwrap();
    for digest in [&kept, &indexed, &gone] {
        fs::write(store.pieces().join(digest), "x").unwrap();
    }
    fs::create_dir_all(store.cache().join("rootfs")).unwrap();
    fs::write(store.cache().join("rootfs/key"), format!("{indexed} 1\n")).unwrap();
    let fresh = store.begin("a", "1").unwrap();
    assert!(!store.pieces().join(&gone).exists());
    fs::write(store.pieces().join(&kept), "x").unwrap();
    fs::create_dir(fresh.replica(0)).unwrap();
    fs::write(
        fresh.replica(0).join("manifest"),
        format!("{{\"digest\": \"{kept}\"}}"),
    )
    .unwrap();
    store.publish(fresh, &template("a", "1")).unwrap();
    assert!(store.pieces().join(&kept).exists() && store.pieces().join(&indexed).exists());
}

#[test]
fn templates_of_another_store_can_be_run_and_not_removed_and_ones_own_come_first() {
    let (_ours, own) = store();
    let (_theirs, system) = store();
    publish(&system, "both", "1");
    publish(&system, "theirs", "2");
    let own = own.with_shared(Some(system.state_dir().to_owned()));
    publish(&own, "both", "3");
    assert_eq!(own.known(), ["both", "theirs"]);
    assert_eq!(own.inspect("both").unwrap().digest, "3");
    assert_eq!(own.inspect("theirs").unwrap().digest, "2");
    assert_eq!(own.current("theirs").unwrap(), "theirs-2");
    let snapshot = system.generations().join("theirs-2/replica-0");
    assert_eq!(own.pieces_of(&snapshot), system.pieces());
    let refused = own.remove("theirs", false);
    assert!(matches!(refused, Err(StoreError::Shared { .. })));
    own.remove("both", false).unwrap();
    assert_eq!(own.inspect("both").unwrap().digest, "1");
    assert!(own.replicas_of("theirs", "theirs-2").is_err());
}

#[test]
fn a_name_cannot_lead_out_of_the_store() {
    let (_folder, store) = store();
    for name in ["../x", "", "A", "a/b", ".hidden"] {
        assert!(matches!(store.inspect(name), Err(StoreError::Name { .. })));
        assert!(matches!(
            store.remove(name, false),
            Err(StoreError::Name { .. })
        ));
    }
}

#[test]
fn a_tenants_template_is_its_own_and_its_name_is_nobody_elses() {
    let (_folder, store) = store();
    publish(&store, "shared", "1");
    let derived = Derived {
        from: "shared".into(),
        build: "shared-1".into(),
        run: vec![],
        warm: String::new(),
        sandbox: Some("x".into()),
    };
    let own = Template {
        tenant: Some("acme".into()),
        derived: Some(derived),
        ..template("own", "2")
    };
    let fresh = store.begin("own", "2").unwrap();
    store.publish(fresh, &own).unwrap();
    let (acme, other) = (Some("acme"), Some("other"));
    assert!(store.may_derive("own", false, acme).is_ok());
    assert!(store.may_derive("new", false, other).is_ok());
    for (name, force, tenant) in [
        ("own", true, other),
        ("own", true, None),
        ("shared", true, acme),
    ] {
        let refused = store.may_derive(name, force, tenant).unwrap_err();
        assert!(matches!(refused, StoreError::Others { .. }), "{name}");
    }
    assert!(matches!(
        store.may_derive("shared", false, None),
        Err(StoreError::Taken { .. })
    ));
    assert!(own.is_for(acme) && !own.is_for(other) && own.is_for(None));
    let told = |tenant: &str| match store.none_for("x", tenant) {
        StoreError::NotFound { known, .. } => known,
        error => panic!("{error}"),
    };
    assert_eq!(told("acme"), ["own", "shared"]);
    assert_eq!(told("other"), ["shared"]);
}
