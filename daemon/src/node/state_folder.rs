//! The state folder: one daemon at a time, and nothing in it is written by anybody else.
//!
//! Does not know what lies in the folder besides the lock.
//!
//! Invariant: whoever holds a [`StateFolder`] is the only daemon that holds this one, until it is
//! dropped or the process ends in whatever way.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{Access, FlockOperation, Mode, OFlags, access, flock};

/// The file that is locked. It stays when its holder ends: removing it would let two daemons lock
/// two files of one name.
const LOCK_NAME: &str = "dsd.lock";
/// A process id and a line feed; more is not ours.
const LOCK_LEN_MAX: u64 = 32;
/// How often a lock that names no living process is tried again, and how long that is worth it:
/// its holder has just started and not written its id yet, or has just ended.
const RETRIES: u32 = 25;
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Why a state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFolderError {
    /// The folder cannot be made or written.
    #[error("cannot write the state folder `{}`; choose another with --state or node.state_dir", path.display())]
    Write {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another daemon lives in it.
    #[error(
        "the state folder `{}` is in use by another dsd ({}); stop that one, or give this one a \
         folder of its own with --state or node.state_dir",
        path.display(),
        pid_words(*pid)
    )]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Its process, where it could be told.
        pid: Option<u32>,
    },
}

fn pid_words(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "process not known".to_owned(),
        |pid| format!("pid {pid}"),
    )
}

/// A state folder that is ours.
#[derive(Debug)]
pub(super) struct StateFolder {
    /// Locked while open; closed on exec, so no rank keeps it.
    _lock: File,
}

impl StateFolder {
    /// Makes the folder where it is missing and locks it.
    ///
    /// # Errors
    /// [`StateFolderError`].
    pub(super) fn lock(path: &Path) -> Result<Self, StateFolderError> {
        let failed = |source| StateFolderError::Write {
            path: path.to_owned(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(path)
            .map_err(failed)?;
        let file = open_lock(&path.join(LOCK_NAME)).map_err(failed)?;
        let mut n_tries = 0;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(e) => return Err(failed(e.into())),
            }
            let pid = holder(&file);
            if pid.is_some() || RETRIES <= n_tries {
                let path = path.to_owned();
                return Err(StateFolderError::InUse { path, pid });
            }
            n_tries += 1;
            thread::sleep(RETRY_INTERVAL);
        }
        let id = format!("{}\n", std::process::id());
        file.set_len(0).map_err(failed)?;
        file.write_all_at(id.as_bytes(), 0).map_err(failed)?;
        probe_writable(path).map_err(failed)?;
        Ok(Self { _lock: file })
    }
}

/// Whether a start could have the folder, without touching it: who has it now, if anybody.
///
/// # Errors
/// [`StateFolderError::Write`], where it could be neither made nor written.
pub(super) fn look(path: &Path) -> Result<Option<StateFolderError>, StateFolderError> {
    let failed = |source| StateFolderError::Write {
        path: path.to_owned(),
        source,
    };
    // A start makes what is missing, in what is there.
    let is_there = |path: &&Path| path.symlink_metadata().is_ok();
    let there = path
        .ancestors()
        .find(is_there)
        .unwrap_or_else(|| Path::new("."));
    if !fs::metadata(there).map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    access(there, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| failed(e.into()))?;
    let lock = match File::open(path.join(LOCK_NAME)) {
        Ok(lock) => lock,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        // Closing it gives it back.
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(StateFolderError::InUse {
            path: path.to_owned(),
            pid: holder(&lock),
        })),
        Err(e) => Err(failed(e.into())),
    }
}

/// What to change about the folder's permissions, where others may write it: they could put their own
/// certificates there.
pub(super) fn exposure(path: &Path) -> Option<String> {
    let mode = fs::metadata(path).ok()?.mode() & 0o7777;
    (mode & 0o022 != 0).then(|| {
        format!(
            "others may write the state folder `{0}` (mode {mode:04o}); run `chmod go-w {0}`",
            path.display()
        )
    })
}

fn open_lock(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode((Mode::RUSR | Mode::WUSR).bits())
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other(format!(
            "`{}` is not a regular file",
            path.display()
        ))),
    }
}

/// The living process whose id is in the lock file.
fn holder(file: &File) -> Option<u32> {
    let mut text = String::new();
    let mut from_start = file.try_clone().ok()?;
    io::Seek::rewind(&mut from_start).ok()?;
    from_start
        .take(LOCK_LEN_MAX)
        .read_to_string(&mut text)
        .ok()?;
    // Without the line feed it is not written whole.
    let pid: u32 = text.strip_suffix('\n')?.parse().ok()?;
    Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
}

/// Makes a file in the folder and takes it away again.
fn probe_writable(folder: &Path) -> io::Result<()> {
    let probe = folder.join(".writable");
    File::create(&probe)?.write_all(b"dsd")?;
    fs::remove_file(probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_whose_process_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/state");
        let held = StateFolder::lock(&state).unwrap();
        let error = StateFolder::lock(&state).unwrap_err();
        let text = error.to_string();
        for expected in [
            format!("(pid {})", std::process::id()),
            state.display().to_string(),
            "--state".to_owned(),
        ] {
            assert!(text.contains(&expected), "{text}");
        }
        assert!(matches!(
            look(&state),
            Ok(Some(StateFolderError::InUse { .. }))
        ));
        drop(held);
        assert!(matches!(look(&state), Ok(None)));
        StateFolder::lock(&state).unwrap();
    }

    #[test]
    fn looking_at_a_folder_makes_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        assert!(matches!(look(&path), Ok(None)));
        assert!(!folder.path().join("a").exists());
        fs::write(folder.path().join("a"), b"").unwrap();
        let error = look(&path).unwrap_err();
        assert!(matches!(error, StateFolderError::Write { .. }), "{error}");
    }

    #[test]
    fn what_an_earlier_holder_wrote_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        for left in ["", "4294967294\n", "nonsense\n", "1", &"9".repeat(100)] {
            fs::write(folder.path().join(LOCK_NAME), left).unwrap();
            let held = StateFolder::lock(folder.path()).unwrap();
            let error = StateFolder::lock(folder.path()).unwrap_err();
            let own = std::process::id();
            assert!(
                matches!(error, StateFolderError::InUse { pid: Some(pid), .. } if pid == own),
                "{error}"
            );
            // Held by somebody who wrote nothing that can be used.
            fs::write(folder.path().join(LOCK_NAME), left).unwrap();
            let error = StateFolder::lock(folder.path()).unwrap_err();
            assert!(
                matches!(error, StateFolderError::InUse { pid: None, .. }),
                "{left:?}: {error}"
            );
            drop(held);
        }
    }

    #[test]
    fn a_folder_that_others_may_write_is_said() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert_eq!(exposure(&path), None);
        drop(StateFolder::lock(&path).unwrap());
        assert_eq!(exposure(&path), None);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        let said = exposure(&path).unwrap();
        let expected = format!("(mode 0770); run `chmod go-w {}`", path.display());
        assert!(said.ends_with(&expected), "{said}");
    }

    #[test]
    fn a_lock_that_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join(LOCK_NAME);
        std::os::unix::fs::symlink("/dev/null", &lock).unwrap();
        let error = StateFolder::lock(folder.path()).unwrap_err();
        assert!(matches!(error, StateFolderError::Write { .. }), "{error}");
        fs::remove_file(&lock).unwrap();
        let status = std::process::Command::new("mkfifo").arg(&lock).status();
        assert!(status.unwrap().success());
        let error = StateFolder::lock(folder.path()).unwrap_err();
        assert!(matches!(error, StateFolderError::Write { .. }), "{error}");
    }
}
