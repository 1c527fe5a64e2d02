//! Memory that may still be taken: what the system reports, and what the limits of this process's
//! control groups leave.
//!
//! A plan that exceeds either is refused while it is a plan; the kernel would answer it by killing
//! the process in the middle of a load.

use std::{
    fmt, fs,
    path::{Component, Path, PathBuf},
};

/// Limits of version 1 from here on mean that there is none: the kernel's largest counter, in pages.
const UNLIMITED_V1: u64 = i64::MAX as u64 / 4096 * 4096;

/// Memory that may be taken now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// How much.
    pub bytes: u64,
    /// What bounds it.
    pub bound: MemoryBound,
    /// Already taken off `bytes`: what others have been promised and not taken yet.
    pub promised: u64,
}

/// What bounds the memory that may be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryBound {
    /// The machine: `MemAvailable` of `/proc/meminfo`.
    System,
    /// A control group of this process.
    Group {
        /// The file that holds the limit.
        file: PathBuf,
        /// The limit.
        limit: u64,
        /// What the group uses, without pages of files that can be given back.
        used: u64,
    },
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => write!(f, "on this machine"),
            Self::Group { file, limit, used } => {
                write!(f, "in `{}`: {used} of {limit} are used", file.display())
            }
        }
    }
}

impl fmt::Display for Available {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes are available {}", self.bytes, self.bound)?;
        if 0 < self.promised {
            let promised = self.promised;
            write!(f, ", {promised} more are promised to other models")?;
        }
        Ok(())
    }
}

impl Available {
    /// As of now; `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        Self::under(Path::new("/"))
    }

    /// As the files below `root` say it: `proc/meminfo`, `proc/self/cgroup`, `proc/self/mountinfo` and
    /// the mounts named there.
    pub fn under(root: &Path) -> Option<Self> {
        let system = mem_available(root).map(|bytes| Self {
            bytes,
            bound: MemoryBound::System,
            promised: 0,
        });
        let groups = group_folders(root);
        let groups = groups.iter().flat_map(|(version, folder)| {
            version
                .limits()
                .iter()
                .filter_map(|name| group(root, *version, folder, name))
        });
        system.into_iter().chain(groups).min_by_key(|a| a.bytes)
    }

    /// Less what others have been promised.
    #[must_use]
    pub fn less(self, promised: u64) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(promised),
            promised: self.promised + promised,
            ..self
        }
    }
}

fn mem_available(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    kib.checked_mul(1024)
}

/// Versions of the control groups' interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// Files that hold limits. Above `memory.high` a group is not killed but throttled until it
    /// hardly moves, which is no way to serve.
    fn limits(self) -> &'static [&'static str] {
        match self {
            Self::V1 => &["memory.limit_in_bytes"],
            Self::V2 => &["memory.max", "memory.high"],
        }
    }

    fn usage(self) -> &'static str {
        match self {
            Self::V1 => "memory.usage_in_bytes",
            Self::V2 => "memory.current",
        }
    }

    /// Lines of `memory.stat` that count the pages of files, descendants included.
    fn file_pages(self) -> [&'static str; 2] {
        match self {
            Self::V1 => ["total_inactive_file", "total_active_file"],
            Self::V2 => ["inactive_file", "active_file"],
        }
    }
}

/// What one limit of one group leaves; `None` without a limit.
fn group(root: &Path, version: Version, folder: &Path, name: &str) -> Option<Available> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let limit = number(name).filter(|limit| *limit < UNLIMITED_V1)?;
    let usage = number(version.usage())?;
    let stat = read("memory.stat").unwrap_or_default();
    // The group reclaims pages of files before it is out of memory, as the system does; locked ones
    // are counted elsewhere.
    let file_pages = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| version.file_pages().contains(key))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum::<u64>();
    let used = usage.saturating_sub(file_pages);
    let file = folder.join(name);
    let file = file
        .strip_prefix(root)
        .map_or_else(|_| file.clone(), |below| Path::new("/").join(below));
    Some(Available {
        bytes: limit.saturating_sub(used),
        bound: MemoryBound::Group { file, limit, used },
        promised: 0,
    })
}

/// The folders of this process's groups that may limit memory, own ones first, up to the mounts.
fn group_folders(root: &Path) -> Vec<(Version, PathBuf)> {
    let read = |name| fs::read_to_string(root.join(name)).unwrap_or_default();
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut folders = Vec::new();
    for line in groups.lines() {
        // `id:controllers:path`; version 2 has id 0 and no controllers.
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let version = match (id, controllers) {
            ("0", "") => Version::V2,
            (_, list) if list.split(',').any(|name| name == "memory") => Version::V1,
            _ => continue,
        };
        let Some((mount_root, mount_point)) = mounts.lines().find_map(|line| mount(line, version))
        else {
            continue;
        };
        let top = root.join(below(Path::new(mount_point)));
        // In a container the mount may begin at the group, which `/proc/self/cgroup` names in full.
        let own = Path::new(path)
            .strip_prefix(mount_root)
            .map(|own| top.join(below(own)))
            .unwrap_or_else(|_| top.clone());
        let up_to_top = own
            .ancestors()
            .take_while(|folder| folder.starts_with(&top));
        folders.extend(up_to_top.map(|folder| (version, folder.to_owned())));
    }
    folders
}

/// Root and place of a mount of this version: fields 4 and 5 of a line of `mountinfo`, whose type
/// and options stand behind ` - `.
fn mount(line: &str, version: Version) -> Option<(&str, &str)> {
    let (place, kind) = line.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let is_it = match version {
        Version::V2 => kind.next() == Some("cgroup2"),
        Version::V1 => {
            kind.next() == Some("cgroup")
                && kind
                    .nth(1)
                    .is_some_and(|options| options.split(',').any(|o| o == "memory"))
        }
    };
    let mut place = place.split(' ').skip(3);
    is_it.then_some((place.next()?, place.next()?))
}

/// A path without its root and without steps upwards, to be joined to another.
fn below(path: &Path) -> PathBuf {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A tree of files below a temporary folder.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n",
    );
    const MOUNT_V2: &str = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";

    fn check(files: &[(&str, &str)], bytes: u64, bound: &str) {
        let root = tree(files);
        let found = Available::under(root.path()).unwrap();
        assert_eq!(
            (found.bytes, found.bound.to_string().as_str()),
            (bytes, bound)
        );
    }

    #[test]
    fn without_groups_the_machine_is_the_bound() {
        check(&[MEMINFO], 1024 * MIB, "on this machine");
        assert_eq!(Available::under(Path::new("/nonexistent")), None);
    }

    #[test]
    fn the_tightest_group_on_the_way_up_is_the_bound() {
        let files = |own_max, own_high, parent_max| {
            [
                MEMINFO,
                ("proc/self/cgroup", "0::/system.slice/dsd.service\n"),
                ("proc/self/mountinfo", MOUNT_V2),
                ("sys/fs/cgroup/system.slice/dsd.service/memory.max", own_max),
                (
                    "sys/fs/cgroup/system.slice/dsd.service/memory.high",
                    own_high,
                ),
                (
                    "sys/fs/cgroup/system.slice/dsd.service/memory.current",
                    "31457280\n",
                ),
                (
                    "sys/fs/cgroup/system.slice/dsd.service/memory.stat",
                    "anon 1\nfile 20971520\ninactive_file 15728640\nactive_file 5242880\n",
                ),
                ("sys/fs/cgroup/system.slice/memory.max", parent_max),
                ("sys/fs/cgroup/system.slice/memory.current", "104857600\n"),
                // Not on the way up.
                ("sys/fs/cgroup/user.slice/memory.max", "1\n"),
                ("sys/fs/cgroup/user.slice/memory.current", "0\n"),
            ]
        };
        let own = "in `/sys/fs/cgroup/system.slice/dsd.service/memory";
        // 30 MiB in use, 20 of them pages of files.
        check(
            &files("209715200\n", "max\n", "max\n"),
            190 * MIB,
            &format!("{own}.max`: 10485760 of 209715200 are used"),
        );
        check(
            &files("209715200\n", "104857600\n", "max\n"),
            90 * MIB,
            &format!("{own}.high`: 10485760 of 104857600 are used"),
        );
        check(
            &files("max\n", "max\n", "157286400\n"),
            50 * MIB,
            "in `/sys/fs/cgroup/system.slice/memory.max`: 104857600 of 157286400 are used",
        );
        check(
            &files("max\n", "max\n", "max\n"),
            1024 * MIB,
            "on this machine",
        );
        check(
            &files("max\n", "max\n", "1048576\n"),
            0,
            "in `/sys/fs/cgroup/system.slice/memory.max`: 104857600 of 1048576 are used",
        );
    }

    #[test]
    fn groups_of_version_1_are_read_and_their_largest_number_is_no_limit() {
        let files = |limit| {
            [
                MEMINFO,
                ("proc/self/cgroup", "5:devices:/\n4:cpu,memory:/a/b\n0::/\n"),
                (
                    "proc/self/mountinfo",
                    "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                     32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
                ),
                ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", limit),
                (
                    "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes",
                    "2097152\n",
                ),
                (
                    "sys/fs/cgroup/memory/a/b/memory.stat",
                    "inactive_file 0\ntotal_inactive_file 1048576\ntotal_active_file 0\n",
                ),
            ]
        };
        check(
            &files("10485760\n"),
            9 * MIB,
            "in `/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes`: 1048576 of 10485760 are used",
        );
        check(
            &files("9223372036854771712\n"),
            1024 * MIB,
            "on this machine",
        );
    }

    #[test]
    fn a_mount_that_begins_at_the_group_is_its_folder() {
        check(
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/docker/abc/inner\n"),
                (
                    "proc/self/mountinfo",
                    "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
                ),
                ("sys/fs/cgroup/inner/memory.max", "max\n"),
                ("sys/fs/cgroup/inner/memory.current", "5\n"),
                ("sys/fs/cgroup/memory.max", "1048576\n"),
                ("sys/fs/cgroup/memory.current", "0\n"),
            ],
            MIB,
            "in `/sys/fs/cgroup/memory.max`: 0 of 1048576 are used",
        );
    }

    #[test]
    fn promises_are_taken_off() {
        let available = Available {
            bytes: 100,
            bound: MemoryBound::System,
            promised: 0,
        };
        assert_eq!(
            available.clone().less(30).to_string(),
            "70 bytes are available on this machine, 30 more are promised to other models"
        );
        assert_eq!(available.less(101).bytes, 0);
    }
}
