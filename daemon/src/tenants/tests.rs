//! Tenants as a whole: files read again, changed, and who is let in meanwhile.

use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::{flow::CacheOwner, runtime::clock};

const KEY_A: &str = "sk-0123456789abcdef-a";
const KEY_B: &str = "sk-0123456789abcdef-b";

struct Rig {
    folder: tempfile::TempDir,
    tenants: Tenants,
}

impl Rig {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("tenants.toml"), text);
        let source = Source::File(folder.path().join("tenants.toml"));
        let tenants = Tenants::read(source, Now::read()).unwrap();
        Self { folder, tenants }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tenants.toml")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    fn who(&self, key: &str) -> Result<String, KeyError> {
        let caller = self.tenants.admit(Some(key), clock::now())?;
        Ok(caller.tenant().name.to_string())
    }

    /// A file that was written by the node reads the same from disk.
    fn must_hold(&self) {
        let again = Tenants::read(self.tenants.source.clone(), Now::read()).unwrap();
        let set = |tenants: &Tenants| {
            let without_keys = |report: TenantReport| Tenant {
                keys: Vec::new(),
                ..report.tenant
            };
            let reports = tenants.reports(clock::now());
            reports.into_iter().map(without_keys).collect::<Vec<_>>()
        };
        assert_eq!(set(&again), set(&self.tenants));
        let mode = fs::metadata(self.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let files = fs::read_dir(self.folder.path()).unwrap().count();
        assert_eq!(files, 1, "something was left behind");
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn two() -> String {
    let (a, b) = (KeyDigest::of(KEY_A), KeyDigest::of(KEY_B));
    format!(
        "# who may call\nversion = 1\n\n[[tenants]]\nname = \"a\"\nweight = 3 # paid\nkey_digests = [\"{a}\"]\n\n\
         # on trial\n[[tenants]]\nname = \"b\"\nkey_digests = [\"{b}\"]\n[tenants.caps]\nconcurrency = 2 # small\n"
    )
}

#[test]
fn keys_lead_to_their_tenants_and_other_keys_nowhere() {
    let rig = Rig::new(&two());
    assert_eq!(rig.who(KEY_A).unwrap(), "a");
    assert_eq!(rig.who(KEY_B).unwrap(), "b");
    for wrong in [
        "",
        "sk-0123456789abcdef-A",
        &KeyDigest::of(KEY_A).to_string(),
    ] {
        assert_eq!(rig.who(wrong), Err(KeyError::Unknown), "{wrong}");
    }
    let nobody = rig.tenants.admit(None, clock::now());
    assert_eq!(nobody.unwrap_err(), KeyError::Missing);
}

#[test]
fn where_nothing_is_configured_everybody_is_let_in_as_nobody() {
    let tenants = Tenants::open(clock::now());
    for key in [None, Some(KEY_A)] {
        let caller = tenants.admit(key, clock::now()).unwrap();
        let account = caller.account(None, false);
        assert_eq!((account.tenant, account.user, account.weight), (0, 0, 1));
        assert_eq!(caller.cache_owner(None), CacheOwner::default());
    }
    let caller = tenants.admit(None, clock::now()).unwrap();
    let (a, b) = (
        caller.account(Some("a"), false),
        caller.account(Some("b"), true),
    );
    assert!(a.user != 0 && b.user != 0 && a.user != b.user);
    assert_eq!((a.class, b.class), (Class::Interactive, Class::Batch));
    assert_ne!(caller.cache_owner(Some("a")), caller.cache_owner(None));
    assert!(matches!(
        tenants.add("a", &Patch::default(), Now::read()),
        Err(EditError::NoTenantsFile)
    ));
}

#[test]
fn nothing_that_a_client_chooses_leads_into_another_tenants_cache() {
    let rig = Rig::new(&two());
    let caller = |key| rig.tenants.admit(Some(key), clock::now()).unwrap();
    let (a, b) = (caller(KEY_A), caller(KEY_B));
    let mut owners = BTreeSet::new();
    for caller in [&a, &b] {
        for user in [None, Some("a"), Some("b"), Some("ab")] {
            assert!(owners.insert(caller.cache_owner(user).0), "{user:?}");
        }
    }
    assert_eq!(a.cache_owner(Some("a")), a.cache_owner(Some("a")));
    assert_ne!(
        a.account(Some("u"), false).user,
        b.account(Some("u"), false).user
    );
}

#[test]
fn bare_keys_are_one_tenant_and_share_no_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    write(&path, &format!("{KEY_A}\n{KEY_B}\n"));
    let tenants = Tenants::read(Source::Keys(path.clone()), Now::read()).unwrap();
    let caller = |key| tenants.admit(Some(key), clock::now()).unwrap();
    let (a, b) = (caller(KEY_A), caller(KEY_B));
    assert_eq!(
        (&*a.tenant().name, &*b.tenant().name),
        ("default", "default")
    );
    assert_eq!(a.account(None, false), b.account(None, false));
    assert_ne!(a.cache_owner(None), b.cache_owner(None));
    write(&path, &format!("{KEY_A}\n"));
    let changed = tenants.reload(Now::read()).unwrap();
    assert_eq!((changed.n_tenants, changed.n_added), (1, 0));
    assert!(tenants.admit(Some(KEY_B), clock::now()).is_err());
}

#[test]
fn a_file_that_became_wrong_changes_nothing() {
    let rig = Rig::new(&two());
    for bad in [
        "",
        "version = 1",
        "version = 1\n[[tenants]]\nname = \"a\"\nweight = 0\n",
        "[[",
    ] {
        write(&rig.path(), bad);
        assert!(rig.tenants.reload(Now::read()).is_err(), "{bad}");
        assert_eq!(rig.who(KEY_A).unwrap(), "a");
        let edit = rig.tenants.set("a", &Patch::default(), Now::read());
        assert!(matches!(edit, Err(EditError::Old(_))), "{bad}");
        assert_eq!(rig.text(), bad);
    }
    fs::set_permissions(rig.path(), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(
        rig.tenants.reload(Now::read()),
        Err(TenantsError::Exposed { .. })
    ));
    fs::remove_file(rig.path()).unwrap();
    assert!(rig.tenants.reload(Now::read()).is_err());
    assert_eq!(rig.who(KEY_B).unwrap(), "b");
}

#[test]
fn counts_and_open_requests_outlive_a_change_and_a_removed_tenant() {
    let rig = Rig::new(&two());
    let now = clock::now();
    let b = rig.tenants.admit(Some(KEY_B), now).unwrap();
    let mut lease = b.take(2, 10, Some(5), now).unwrap();
    assert_eq!(
        b.take(1, 10, Some(5), now).unwrap_err().cap,
        Cap::Concurrency
    );
    rig.tenants.reload(Now::read()).unwrap();
    let again = rig.tenants.admit(Some(KEY_B), now).unwrap();
    assert_eq!(
        again.take(1, 10, Some(5), now).unwrap_err().cap,
        Cap::Concurrency
    );
    rig.tenants.remove("b", Now::read()).unwrap();
    assert_eq!(rig.who(KEY_B), Err(KeyError::Unknown));
    assert!(rig.tenants.report("b", now).is_none());
    lease.started(now);
    lease.used(10, 4, 3, 0.1);
    drop(lease);
    let usage = b.member.ledger.usage();
    assert_eq!(
        (usage.n_requests, usage.n_running, usage.n_waiting),
        (1, 0, 0)
    );
    assert_eq!((usage.n_prompt_tokens, usage.n_cached_tokens), (10, 4));
    rig.must_hold();
}

#[test]
fn leases_are_counted_from_queue_to_end() {
    let rig = Rig::new(&two());
    let now = clock::now();
    let report = |name| rig.tenants.report(name, clock::now()).unwrap();
    let a = rig.tenants.admit(Some(KEY_A), now).unwrap();
    let mut lease = a.take(3, 100, None, now).unwrap();
    assert_eq!(
        (report("a").usage.n_waiting, report("a").usage.n_running),
        (3, 0)
    );
    lease.started(now + Duration::from_millis(50));
    lease.started(now + Duration::from_millis(90));
    assert_eq!(
        (report("a").usage.n_waiting, report("a").usage.n_running),
        (0, 3)
    );
    lease.used(100, 20, 60, 1.0);
    drop(lease);
    a.take(1, 10, None, now).unwrap().void();
    let usage = report("a").usage;
    assert_eq!(
        (usage.n_waiting, usage.n_running, usage.n_requests),
        (0, 0, 1)
    );
    assert_eq!(usage.n_output_tokens, 60);
    assert_eq!(usage.queue_time(95), Some(Duration::from_millis(50)));
    assert_eq!((report("a").share, report("b").share), (1.0, 0.0));
    let b = rig.tenants.admit(Some(KEY_B), now).unwrap();
    let mut lease = b.take(1, 10, None, now).unwrap();
    lease.started(now);
    lease.used(10, 0, 1, 3.0);
    drop(lease);
    assert_eq!((report("a").share, report("b").share), (0.25, 0.75));
}

#[test]
fn tenants_are_added_changed_and_removed_in_the_file() {
    let rig = Rig::new(&two());
    let now = Now::read;
    let patch = Patch {
        weight: Some(5),
        class: Some(Class::Batch),
        concurrency: Change::To(7),
        models: Change::To(vec!["tiny".into()]),
        ..Patch::default()
    };
    let key = rig.tenants.add("c", &patch, now()).unwrap();
    assert_eq!(rig.who(&key).unwrap(), "c");
    assert!(!rig.text().contains(&key), "a key is in the file");
    rig.must_hold();
    let c = rig.tenants.report("c", clock::now()).unwrap().tenant;
    assert_eq!(
        (c.weight, c.class, c.caps.concurrency),
        (5, Class::Batch, Some(7))
    );
    assert!(matches!(
        rig.tenants.add("c", &patch, now()),
        Err(EditError::Exists { .. })
    ));

    let patch = Patch {
        weight: Some(4),
        concurrency: Change::Clear,
        requests_per_minute: Change::To(60),
        tokens_per_minute: Change::To(6000),
        ..Patch::default()
    };
    for name in ["a", "b", "c"] {
        rig.tenants.set(name, &patch, now()).unwrap();
        rig.must_hold();
        let tenant = rig.tenants.report(name, clock::now()).unwrap().tenant;
        let caps = Caps {
            concurrency: None,
            requests_per_minute: Some(60),
            tokens_per_minute: Some(6000),
        };
        assert_eq!((tenant.weight, tenant.caps), (4, caps), "{name}");
    }
    for comment in ["# who may call", "weight = 4 # paid", "# on trial"] {
        assert!(
            rig.text().contains(comment),
            "{comment} in:\n{}",
            rig.text()
        );
    }

    let before = rig.text();
    let bad = [
        Patch {
            weight: Some(0),
            ..Patch::default()
        },
        Patch {
            tokens_per_minute: Change::To(1),
            ..Patch::default()
        },
        Patch {
            concurrency: Change::To(u64::MAX),
            ..Patch::default()
        },
        Patch {
            models: Change::To(vec![]),
            ..Patch::default()
        },
        Patch {
            models: Change::To(vec!["a b\n".into()]),
            ..Patch::default()
        },
    ];
    for patch in bad {
        let error = rig.tenants.set("a", &patch, now()).unwrap_err();
        assert!(matches!(error, EditError::New(_)), "{error}");
    }
    for name in [
        "",
        "a b",
        "x\"]\n[[tenants]]",
        &"n".repeat(NAME_LEN_MAX + 1),
    ] {
        let error = rig.tenants.add(name, &Patch::default(), now()).unwrap_err();
        assert!(
            matches!(error, EditError::New(TenantsError::Name { .. })),
            "{error}"
        );
    }
    let unknown = rig.tenants.remove("nobody", now()).unwrap_err();
    assert!(matches!(unknown, EditError::Unknown { .. }));
    assert_eq!(rig.text(), before);

    rig.tenants.remove("a", now()).unwrap();
    rig.tenants.remove("b", now()).unwrap();
    assert_eq!(rig.who(KEY_A), Err(KeyError::Unknown));
    // Nobody left would lock everybody out.
    let last = rig.tenants.remove("c", now()).unwrap_err();
    assert!(matches!(last, EditError::New(_)), "{last}");
    assert_eq!(rig.who(&key).unwrap(), "c");
}

#[test]
fn a_replaced_key_lives_for_its_grace_and_no_longer() {
    let rig = Rig::new(&two());
    let start = Now::read();
    let after = |seconds: u64| Now {
        instant: start.instant + Duration::from_secs(seconds),
        unix_s: start.unix_s + seconds,
    };
    let is_known = |key: &str, at: Now| rig.tenants.admit(Some(key), at.instant).is_ok();
    let grace = Duration::from_secs(60);
    let second = rig.tenants.rotate_key("a", grace, start).unwrap();
    assert!(is_known(KEY_A, after(59)) && is_known(&second, after(59)));
    assert!(!is_known(KEY_A, after(60)) && is_known(&second, after(60)));
    // A wall clock that is set back does not make it live longer.
    let back = Now {
        unix_s: start.unix_s - 3600,
        ..after(30)
    };
    rig.tenants.reload(back).unwrap();
    assert!(is_known(KEY_A, after(59)) && !is_known(KEY_A, after(60)));
    // Nor does another rotation.
    let third = rig.tenants.rotate_key("a", grace, after(30)).unwrap();
    assert!(is_known(KEY_A, after(59)) && !is_known(KEY_A, after(61)));
    assert!(is_known(&second, after(89)) && !is_known(&second, after(91)));
    let fourth = rig
        .tenants
        .rotate_key("a", Duration::ZERO, after(31))
        .unwrap();
    for old in [KEY_A, &second, &third] {
        assert!(!is_known(old, after(31)), "{old}");
    }
    assert!(is_known(&fourth, after(31)));
    assert!(!rig.text().contains("retiring"), "{}", rig.text());
    rig.must_hold();
}

#[test]
fn a_file_that_cannot_be_changed_in_place_is_left_alone() {
    let digest = KeyDigest::of(KEY_A);
    let text =
        format!("version = 1\ntenants = [{{ name = \"a\", key_digests = [\"{digest}\"] }}]\n");
    let rig = Rig::new(&text);
    let error = rig
        .tenants
        .set("a", &Patch::default(), Now::read())
        .unwrap_err();
    assert!(matches!(error, EditError::Form { .. }), "{error}");
    assert_eq!(rig.text(), text);
}

#[test]
fn the_file_behind_a_link_is_changed_and_the_link_stays() {
    let rig = Rig::new(&two());
    let link = rig.folder.path().join("link.toml");
    std::os::unix::fs::symlink(rig.path(), &link).unwrap();
    let tenants = Tenants::read(Source::File(link.clone()), Now::read()).unwrap();
    tenants.remove("b", Now::read()).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(!rig.text().contains("\"b\""), "{}", rig.text());
}

#[test]
fn labels_of_metrics_are_bounded_whatever_comes_and_goes() {
    let tenants = Tenants::empty(Source::Open, clock::now());
    let label = |n: usize| tenants.label(&format!("t{n}").into());
    for n in 0..LABELS_MAX {
        assert_eq!(*label(n), *format!("t{n}"));
    }
    assert_eq!(&*label(LABELS_MAX), LABEL_OTHER);
    assert_eq!(&*label(0), "t0");
}
