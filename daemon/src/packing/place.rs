//! The folder a pack is written into, beside its name: taken by one writer, moved under the name at
//! the end, and taken away when anything goes wrong.
//!
//! A writer that was killed leaves its folder; the next one of the same name takes it away.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with, statvfs};

use super::PackingError;

/// A folder that nobody takes for a pack.
pub(super) struct Place {
    out: PathBuf,
    parent: PathBuf,
    folder: PathBuf,
    /// Locked while the writer lives.
    _held: File,
    is_published: bool,
}

impl Place {
    /// Makes the folder for a pack that will be called `out`.
    pub(super) fn take(out: &Path) -> Result<Self, PackingError> {
        let Some(name) = out.file_name() else {
            return Err(PackingError::Name {
                path: out.to_owned(),
            });
        };
        if out.symlink_metadata().is_ok() {
            return Err(PackingError::Exists {
                path: out.to_owned(),
            });
        }
        let parent = match out.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".packing");
        let folder = parent.join(hidden);
        if folder.symlink_metadata().is_ok() {
            // Whoever left it holds no lock any more.
            hold(&folder)?;
            fs::remove_dir_all(&folder).map_err(|e| refused(&folder, e))?;
        }
        fs::create_dir(&folder).map_err(|e| refused(&folder, e))?;
        let held = hold(&folder)?;
        Ok(Self {
            out: out.to_owned(),
            parent,
            folder,
            _held: held,
            is_published: false,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.folder
    }

    /// Refuses to begin what cannot end well.
    pub(super) fn refuse_if_full(&self, needed: u64) -> Result<(), PackingError> {
        let disk = statvfs(&self.folder).map_err(|e| refused(&self.folder, e.into()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        match needed <= free {
            true => Ok(()),
            false => Err(PackingError::Space {
                folder: self.parent.clone(),
                needed,
                free,
            }),
        }
    }

    /// Writes a small file and waits until it is on disk.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), PackingError> {
        let path = self.folder.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|e| refused(&path, e))
    }

    /// Gives the folder the pack's name.
    pub(super) fn publish(mut self) -> Result<PathBuf, PackingError> {
        let sync = |folder: &Path| File::open(folder)?.sync_all();
        sync(&self.folder).map_err(|e| refused(&self.folder, e))?;
        let cwd = rustix::fs::CWD;
        match renameat_with(cwd, &self.folder, cwd, &self.out, RenameFlags::NOREPLACE) {
            Ok(()) => self.is_published = true,
            Err(rustix::io::Errno::EXIST) => {
                return Err(PackingError::Exists {
                    path: self.out.clone(),
                });
            }
            Err(e) => return Err(refused(&self.out, e.into())),
        }
        sync(&self.parent).map_err(|e| refused(&self.parent, e))?;
        Ok(self.out.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_published {
            // What stays is taken away by the next writer of this name.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Opens a folder and locks it.
fn hold(folder: &Path) -> Result<File, PackingError> {
    let file = File::open(folder).map_err(|e| refused(folder, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(PackingError::Busy {
            folder: folder.to_owned(),
        }),
        Err(e) => Err(refused(folder, e.into())),
    }
}

pub(super) fn refused(file: &Path, source: io::Error) -> PackingError {
    PackingError::Write {
        file: file.to_owned(),
        source,
    }
}
