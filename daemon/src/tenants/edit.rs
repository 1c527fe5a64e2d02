//! Changes of the tenants' file that operators ask for: read, changed, checked, put in place whole.
//!
//! Keeps what the file says besides, comments included.
//!
//! Invariant: at every moment the file is the old one or the new one; both are valid.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, value};

use super::{
    Source, Tenants,
    file::{self, Now, TenantsError},
    file_of,
    keys::{self, KeyDigest},
};
use crate::flow::Class;

/// What to do with a setting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Change<T> {
    /// Leave it.
    #[default]
    Keep,
    /// Take it away.
    Clear,
    /// Give it this value.
    To(T),
}

/// Changes of one tenant's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// Its share.
    pub weight: Option<u32>,
    /// What its requests expect.
    pub class: Option<Class>,
    /// Choices at once.
    pub concurrency: Change<u64>,
    /// Requests a minute.
    pub requests_per_minute: Change<u64>,
    /// Tokens a minute.
    pub tokens_per_minute: Change<u64>,
    /// Models it may use.
    pub models: Change<Vec<String>>,
}

/// Why a change is not made. The file and the tenants are as they were.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// Tenants do not come from a file of tenants.
    #[error("this node has no file of tenants; set `service.tenants_file` in its configuration")]
    NoTenantsFile,
    /// The file as it lies there is wrong.
    #[error("the tenants' file must be put right first")]
    Old(#[source] TenantsError),
    /// The file would be wrong.
    #[error("the change is refused")]
    New(#[source] TenantsError),
    /// No tenant of that name.
    #[error("no tenant is called `{name}`")]
    Unknown {
        /// The name.
        name: String,
    },
    /// A tenant of that name.
    #[error("a tenant called `{name}` is there already")]
    Exists {
        /// The name.
        name: String,
    },
    /// A form of the file that cannot be changed in place.
    #[error("`{}` lists tenants otherwise than as `[[tenants]]`; change it by hand", path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else changed the file in the meantime.
    #[error("`{}` was changed while it was being changed; try again", path.display())]
    Raced {
        /// The file.
        path: PathBuf,
    },
    /// No new file.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No random bytes.
    #[error("the system gives no random bytes for a key")]
    Random(#[source] io::Error),
}

impl Tenants {
    /// Adds a tenant and returns its key, which is kept nowhere.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn add(&self, name: &str, patch: &Patch, now: Now) -> Result<String, EditError> {
        let key = keys::fresh().map_err(EditError::Random)?;
        self.edit(now, |tables| {
            if position(tables, name).is_some() {
                let name = name.to_owned();
                return Err(EditError::Exists { name });
            }
            let mut table = Table::new();
            table.insert("name", value(name));
            apply(&mut table, patch);
            table.insert("key_digests", digests(&[KeyDigest::of(&key).to_string()]));
            tables.push(table);
            Ok(())
        })?;
        Ok(key)
    }

    /// Changes a tenant's settings.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn set(&self, name: &str, patch: &Patch, now: Now) -> Result<(), EditError> {
        self.edit(now, |tables| {
            apply(table_of(tables, name)?, patch);
            Ok(())
        })
    }

    /// Gives a tenant a new key instead of all it had, and returns it. The old ones stay valid for
    /// `grace`, at most [`file::GRACE_MAX`].
    ///
    /// # Errors
    /// [`EditError`].
    pub fn rotate_key(&self, name: &str, grace: Duration, now: Now) -> Result<String, EditError> {
        let key = keys::fresh().map_err(EditError::Random)?;
        let until = now.unix_s + grace.min(file::GRACE_MAX).as_secs();
        self.edit(now, |tables| {
            let table = table_of(tables, name)?;
            let mut retiring = Array::new();
            if !grace.is_zero() {
                let replaced = texts(table.get("key_digests")).map(|digest| (digest, until));
                // Those that were retiring keep their end, unless it is past.
                let earlier = retiring_of(table).filter(|(_, end)| now.unix_s < *end);
                for (digest, until) in replaced.chain(earlier) {
                    let mut entry = InlineTable::new();
                    entry.insert("digest", digest.into());
                    entry.insert(
                        "until_unix_s",
                        i64::try_from(until).unwrap_or(i64::MAX).into(),
                    );
                    retiring.push(entry);
                }
            }
            table.insert("key_digests", digests(&[KeyDigest::of(&key).to_string()]));
            if retiring.is_empty() {
                table.remove("retiring_keys");
            } else {
                table.insert("retiring_keys", value(retiring));
            }
            Ok(())
        })?;
        Ok(key)
    }

    /// Removes a tenant. Its keys are refused at once; its requests end as they would.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn remove(&self, name: &str, now: Now) -> Result<(), EditError> {
        self.edit(now, |tables| {
            let idx = position(tables, name).ok_or_else(|| unknown(name))?;
            tables.remove(idx);
            Ok(())
        })
    }

    /// Makes one change: the file as it lies there, not as it was last read.
    fn edit(
        &self,
        now: Now,
        change: impl FnOnce(&mut ArrayOfTables) -> Result<(), EditError>,
    ) -> Result<(), EditError> {
        let _changing = self.lock_changes();
        let path = file_of(&self.source).ok_or(EditError::NoTenantsFile)?;
        // A link stays one; what it leads to is replaced.
        let path = &fs::canonicalize(path).map_err(|source| {
            EditError::Old(TenantsError::Read {
                path: path.to_owned(),
                source,
            })
        })?;
        let old = file::read_private(path).map_err(EditError::Old)?;
        file::parse(&old, path, now).map_err(EditError::Old)?;
        let form = || EditError::Form {
            path: path.to_owned(),
        };
        // It was just read as TOML, so only a form that the other reader takes is left to fail.
        let mut document: DocumentMut = old.parse().map_err(|_| form())?;
        let tables = document
            .get_mut("tenants")
            .and_then(Item::as_array_of_tables_mut)
            .ok_or_else(form)?;
        change(tables)?;
        let new = document.to_string();
        let tenants = file::parse(&new, path, now).map_err(EditError::New)?;
        replace_file(path, &old, &new)?;
        self.replace(tenants, now.instant);
        Ok(())
    }
}

impl Source {
    /// The source that two settings mean.
    pub fn new(tenants_file: Option<&Path>, keys_file: Option<&Path>) -> Self {
        match (tenants_file, keys_file) {
            (Some(path), _) => Self::File(path.to_owned()),
            (None, Some(path)) => Self::Keys(path.to_owned()),
            (None, None) => Self::Open,
        }
    }
}

fn unknown(name: &str) -> EditError {
    EditError::Unknown {
        name: name.to_owned(),
    }
}

fn position(tables: &ArrayOfTables, name: &str) -> Option<usize> {
    let is_it = |table: &Table| table.get("name").and_then(Item::as_str) == Some(name);
    tables.iter().position(is_it)
}

fn table_of<'t>(tables: &'t mut ArrayOfTables, name: &str) -> Result<&'t mut Table, EditError> {
    let idx = position(tables, name).ok_or_else(|| unknown(name))?;
    tables.get_mut(idx).ok_or_else(|| unknown(name))
}

fn digests(digests: &[String]) -> Item {
    value(digests.iter().collect::<Array>())
}

fn texts(list: Option<&Item>) -> impl Iterator<Item = String> + '_ {
    let list = list.and_then(Item::as_array).into_iter().flatten();
    list.filter_map(|item| item.as_str().map(str::to_owned))
}

/// Replaced keys and their ends, whichever way the list is written.
fn retiring_of(table: &Table) -> impl Iterator<Item = (String, u64)> + '_ {
    fn entry(table: &dyn TableLike) -> Option<(String, u64)> {
        let digest = table.get("digest")?.as_str()?.to_owned();
        let until = u64::try_from(table.get("until_unix_s")?.as_integer()?).ok()?;
        Some((digest, until))
    }
    let list = table.get("retiring_keys");
    let inline = list.and_then(Item::as_array).into_iter().flatten();
    let inline = inline.filter_map(|item| entry(item.as_inline_table()?));
    let tables = list.and_then(Item::as_array_of_tables).into_iter();
    inline.chain(tables.flatten().filter_map(|table| entry(table)))
}

fn apply(table: &mut Table, patch: &Patch) {
    if let Some(weight) = patch.weight {
        put(table, "weight", value(i64::from(weight)));
    }
    if let Some(class) = patch.class {
        let word = match class {
            Class::Interactive => "interactive",
            Class::Batch => "batch",
        };
        put(table, "class", value(word));
    }
    let caps = [
        ("concurrency", &patch.concurrency),
        ("requests_per_minute", &patch.requests_per_minute),
        ("tokens_per_minute", &patch.tokens_per_minute),
    ];
    for (key, change) in caps {
        match change {
            Change::Keep => {}
            Change::Clear => {
                if let Some(caps) = table.get_mut("caps").and_then(Item::as_table_like_mut) {
                    caps.remove(key);
                }
            }
            Change::To(cap) => {
                let empty = || value(InlineTable::new());
                let caps = table.entry("caps").or_insert_with(empty);
                // The file was valid, so that it is a table of either kind.
                if let Some(caps) = caps.as_table_like_mut() {
                    caps.insert(key, value(i64::try_from(*cap).unwrap_or(i64::MAX)));
                }
            }
        }
    }
    match &patch.models {
        Change::Keep => {}
        Change::Clear => {
            table.remove("models");
        }
        Change::To(models) => put(table, "models", value(models.iter().collect::<Array>())),
    }
}

/// Sets a key and keeps the comment behind the value that was there.
fn put(table: &mut Table, key: &str, mut item: Item) {
    let before = table.get(key).and_then(Item::as_value);
    if let (Some(before), Some(new)) = (before, item.as_value_mut()) {
        *new.decor_mut() = before.decor().clone();
    }
    table.insert(key, item);
}

/// Puts `new` in the place of `old`, whole and on disk, unless the file is not `old` any more.
fn replace_file(path: &Path, old: &str, new: &str) -> Result<(), EditError> {
    let failed = |source| EditError::Write {
        path: path.to_owned(),
        source,
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // One that a crash left; only one change is made at a time.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let written = write_new(&temporary, new)
        .map_err(failed)
        .and_then(|()| match file::read_private(path) {
            Ok(found) if found == old => Ok(()),
            _ => Err(EditError::Raced {
                path: path.to_owned(),
            }),
        })
        .and_then(|()| fs::rename(&temporary, path).map_err(failed));
    if let Err(e) = written {
        // What cannot be removed either is removed by the next change.
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    if let Err(e) = synced {
        // The new file is in place already; only a loss of power within seconds would undo it.
        tracing::warn!(folder = %folder.display(), error = %e, "cannot sync the folder of the tenants' file");
    }
    Ok(())
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
