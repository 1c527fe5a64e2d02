//! The cost model of a group, kept over restarts of the node.
//!
//! Whatever is wrong with the file, the group starts: step times are then measured anew.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{
    cost::{CostModel, SavedCost, SavedCostError},
    telemetry::chain,
};

/// How often the file is written at most.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);
/// Longest file read; a cost model takes about 1 KiB.
const FILE_LEN_MAX: u64 = 64 * 1024;
/// Characters of a model's name in the name of its file.
const NAME_LEN_MAX: usize = 64;

/// Where a cost model is kept, and what it is learnt on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CostFile {
    path: PathBuf,
    learnt_on: String,
    saved_at: Option<Instant>,
}

impl CostFile {
    /// The file of the model `name` in `folder`. `learnt_on` names all that changes step times.
    pub fn new(folder: &Path, name: &str, learnt_on: String) -> Self {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '_'
            }
        };
        let shown: String = name.chars().take(NAME_LEN_MAX).map(plain).collect();
        // Names that look alike in a file name are told apart.
        let digest = blake3::hash(name.as_bytes()).to_hex();
        Self {
            path: folder.join(format!("{shown}-{}.toml", &digest[..8])),
            learnt_on,
            saved_at: None,
        }
    }

    /// What was learnt before; `None` where there is nothing of use, which the log explains.
    pub(super) fn load(&self) -> Option<CostModel> {
        let text = match self.read() {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            Err(e) => {
                warn!(path = %self.path.display(), error = %e, "cannot read the cost model; step times are measured anew");
                return None;
            }
        };
        match SavedCost::model_of(&text, &self.learnt_on) {
            Ok(model) => Some(model),
            Err(e @ SavedCostError::Foreign { .. }) => {
                info!(path = %self.path.display(), reason = %e, "step times are measured anew");
                None
            }
            Err(e) => {
                warn!(path = %self.path.display(), error = %chain(&e), "the cost model is of no use; step times are measured anew");
                None
            }
        }
    }

    fn read(&self) -> io::Result<String> {
        let mut text = String::new();
        // Opened without waiting, should somebody have put a pipe there.
        let flags =
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, rustix::fs::Mode::empty())?;
        let file = File::from(file);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        file.take(FILE_LEN_MAX).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes what is known now, unless it was written a moment ago.
    pub(super) fn save_now_and_then(&mut self, model: &CostModel, now: Instant) {
        let at = *self.saved_at.get_or_insert(now);
        if SAVE_INTERVAL <= now.saturating_duration_since(at) {
            self.saved_at = Some(now);
            self.save(model);
        }
    }

    /// Writes what is known now.
    pub(super) fn save(&self, model: &CostModel) {
        if let Err(e) = self.write(model) {
            warn!(path = %self.path.display(), error = %e, "cannot keep the cost model");
        }
    }

    fn write(&self, model: &CostModel) -> io::Result<()> {
        let saved = SavedCost {
            learnt_on: self.learnt_on.clone(),
            model: model.clone(),
        };
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let new = self.path.with_extension("toml.new");
        File::create(&new)?.write_all(saved.to_text().as_bytes())?;
        fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_model_is_kept_and_whatever_else_lies_there_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let file = CostFile::new(folder.path(), "org/a model", "here".to_owned());
        assert_eq!(file.load(), None, "nothing yet");
        let mut model = CostModel::default();
        model.observe(crate::cost::StepShape::span(0, 10, 1), 0.1);
        file.save(&model);
        assert_eq!(file.load(), Some(model.clone()));
        let other = CostFile::new(folder.path(), "org/a model", "elsewhere".to_owned());
        assert_eq!((other.path == file.path, other.load()), (true, None));
        let alike = CostFile::new(folder.path(), "org_a model", "here".to_owned());
        assert_eq!(alike.load(), None, "another model");
        fs::write(&file.path, "parameters = [1").unwrap();
        assert_eq!(file.load(), None);
        fs::write(&file.path, [0xff; 100]).unwrap();
        assert_eq!(file.load(), None);
        fs::remove_file(&file.path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &file.path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        assert_eq!(file.load(), None, "a pipe does not hold the start up");
        file.save(&model);
        assert_eq!(file.load(), Some(model));
    }
}
