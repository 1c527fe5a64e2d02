//! Opens and reads files that others may have put there.
//!
//! A pipe, device or socket in a file's place is never opened: opening one can wait for ever, reading
//! one need not end. Does not know what is in a file.
//!
//! Invariant: no more bytes are read than the caller allows, whatever length the system reports and
//! however the file grows meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A folder, pipe, device or socket.
    #[error("not a regular file")]
    NotRegular,
    /// More bytes than the caller wants.
    #[error("longer than {max} bytes")]
    TooLong {
        /// Bytes there, or as many as were seen.
        found: u64,
        /// Bytes allowed.
        max: u64,
    },
}

/// Why a file of secrets was not read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// As any other file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Whoever has an account on this machine may know the secrets, or put in their own.
    #[error(
        "others may {} it (mode {mode:04o}); run `chmod g-w,o-rwx {}`",
        exposure(*mode),
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// Permissions that a file of secrets must not give: anything to others, writing to its group. A
/// group may read it, as the service's own group does where root keeps the file.
const EXPOSED: u32 = 0o027;

fn exposure(mode: u32) -> &'static str {
    match (mode & 0o004 != 0, mode & 0o022 != 0) {
        (true, true) => "read and write",
        (false, true) => "write",
        (true, false) | (false, false) => "read",
    }
}

impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io(e) => e,
            FileError::NotRegular => Self::new(io::ErrorKind::InvalidInput, error),
            FileError::TooLong { .. } => Self::new(io::ErrorKind::FileTooLarge, error),
        }
    }
}

/// Opens a regular file, or what a link leads to, for reading.
///
/// # Errors
/// [`FileError`]; never waits.
pub fn open(path: &Path) -> Result<File, FileError> {
    // Asked before opening, because opening a device can set it going, ...
    if !fs::metadata(path)?.is_file() {
        return Err(FileError::NotRegular);
    }
    // ... and again after it, because another file may have taken the place. Without NONBLOCK a pipe
    // that did would wait for a writer; on a regular file it has no effect.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(FileError::NotRegular),
    }
}

/// Reads a regular file of at most `len_max` bytes.
///
/// # Errors
/// [`FileError`].
pub fn read(path: &Path, len_max: u64) -> Result<Vec<u8>, FileError> {
    let file = open(path)?;
    let too_long = |found| FileError::TooLong {
        found,
        max: len_max,
    };
    let len = file.metadata()?.len();
    if len_max < len {
        return Err(too_long(len));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    // One more than allowed shows that there are more.
    file.take(len_max.saturating_add(1))
        .read_to_end(&mut bytes)?;
    let found = bytes.len() as u64;
    match found <= len_max {
        true => Ok(bytes),
        false => Err(too_long(found)),
    }
}

/// Reads a regular file of at most `len_max` bytes as text.
///
/// # Errors
/// [`FileError`]; [`io::ErrorKind::InvalidData`] when it is not UTF-8.
pub fn read_text(path: &Path, len_max: u64) -> Result<String, FileError> {
    let bytes = read(path, len_max)?;
    let invalid = |e| FileError::Io(io::Error::new(io::ErrorKind::InvalidData, e));
    String::from_utf8(bytes).map_err(invalid)
}

/// Reads a file of secrets of at most `len_max` bytes as text, unless others may read or write it.
///
/// # Errors
/// [`SecretError`].
pub fn read_secret(path: &Path, len_max: u64) -> Result<String, SecretError> {
    let mode = open(path)?.metadata().map_err(FileError::Io)?.mode() & 0o7777;
    match mode & EXPOSED {
        0 => Ok(read_text(path, len_max)?),
        _ => Err(SecretError::Exposed {
            path: path.to_owned(),
            mode,
        }),
    }
}

/// Fills `buffer` from `offset` on and returns how many bytes were there: fewer only where the file
/// ends.
///
/// # Errors
/// The system's.
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut n_read = 0;
    while n_read < buffer.len() {
        match file.read_at(&mut buffer[n_read..], offset + n_read as u64) {
            Ok(0) => break,
            Ok(n) => n_read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n_read)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    /// Everything that can stand in the place of a file `name` without being one, each put there in
    /// turn. What is done with it must not wait, nor read without end.
    pub(crate) fn for_each_stranger(place: &Path, mut check: impl FnMut(&str)) {
        let clear = || {
            if fs::symlink_metadata(place).is_ok_and(|meta| meta.is_dir()) {
                fs::remove_dir(place).unwrap();
            } else {
                let _none = fs::remove_file(place);
            }
        };
        clear();
        let made = std::process::Command::new("mkfifo").arg(place).status();
        assert!(made.unwrap().success());
        check("a pipe");
        clear();
        let _socket = UnixListener::bind(place).unwrap();
        check("a socket");
        clear();
        fs::create_dir(place).unwrap();
        check("a folder");
        clear();
        for device in ["/dev/zero", "/dev/null", "/dev/tty"] {
            symlink(device, place).unwrap();
            check(device);
            clear();
        }
        symlink(place.with_extension("gone"), place).unwrap();
        check("a link to nothing");
        clear();
        symlink(place, place).unwrap();
        check("a link to itself");
        clear();
    }

    #[test]
    fn what_is_no_regular_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("file");
        for_each_stranger(&place, |what| {
            let error = read(&place, 100).unwrap_err();
            match what {
                "a link to nothing" | "a link to itself" => {
                    assert!(matches!(error, FileError::Io(_)), "{what}: {error}");
                }
                _ => assert!(matches!(error, FileError::NotRegular), "{what}: {error}"),
            }
        });
    }

    #[test]
    fn no_more_than_allowed_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("file");
        fs::write(&place, "12345").unwrap();
        assert_eq!(read_text(&place, 5).unwrap(), "12345");
        assert!(matches!(
            read(&place, 4),
            Err(FileError::TooLong { found: 5, max: 4 })
        ));
        // Reports a length of 0.
        assert!(read(Path::new("/proc/self/status"), 100_000).unwrap().len() > 100);
        assert!(matches!(
            read(Path::new("/proc/self/status"), 10),
            Err(FileError::TooLong { found: 11, max: 10 })
        ));
        fs::write(&place, [0xff]).unwrap();
        assert!(matches!(read_text(&place, 5), Err(FileError::Io(_))));
    }

    #[test]
    fn a_file_of_secrets_is_not_for_others() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("keys");
        fs::write(&place, "secret").unwrap();
        let read_with = |mode| {
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
            read_secret(&place, 100)
        };
        for mode in [0o600, 0o400, 0o640, 0o440] {
            assert_eq!(read_with(mode).unwrap(), "secret", "{mode:o}");
        }
        for (mode, what) in [
            (0o644, "read"),
            (0o604, "read"),
            (0o660, "write"),
            (0o602, "write"),
            (0o666, "read and write"),
        ] {
            let error = read_with(mode).unwrap_err().to_string();
            let expected = format!(
                "others may {what} it (mode 0{mode:o}); run `chmod g-w,o-rwx {}`",
                place.display()
            );
            assert_eq!(error, expected);
        }
    }

    /// A log that is written all the time, in a file's place.
    #[test]
    fn a_file_that_grows_is_read_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("file");
        fs::write(&place, "x").unwrap();
        let (stop, stopped) = std::sync::mpsc::sync_channel::<()>(0);
        let writing = place.clone();
        let writer = crate::runtime::thread::spawn("writer", move || {
            let mut file = OpenOptions::new().append(true).open(writing).unwrap();
            let mut n_bytes = 0;
            let disconnected = std::sync::mpsc::TryRecvError::Disconnected;
            while stopped.try_recv() != Err(disconnected) && n_bytes < 256 << 20 {
                io::Write::write_all(&mut file, &[b'x'; 4096]).unwrap();
                n_bytes += 4096;
            }
        });
        let mut n_refused = 0;
        while n_refused < 20 {
            match read(&place, 1 << 20) {
                Ok(bytes) => assert!(bytes.len() <= 1 << 20),
                Err(FileError::TooLong { found, .. }) => {
                    assert!(1 << 20 < found);
                    n_refused += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        drop(stop);
        writer.unwrap().join().unwrap();
    }

    #[test]
    fn reading_at_an_offset_ends_with_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("file");
        fs::write(&place, "0123456789").unwrap();
        let file = open(&place).unwrap();
        let mut buffer = [0; 4];
        assert_eq!(read_at(&file, &mut buffer, 3).unwrap(), 4);
        assert_eq!(&buffer, b"3456");
        assert_eq!(read_at(&file, &mut buffer, 8).unwrap(), 2);
        assert_eq!(read_at(&file, &mut buffer, 80).unwrap(), 0);
    }
}
