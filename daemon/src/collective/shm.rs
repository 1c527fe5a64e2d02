//! Ranks of one machine over a shared segment of memory.
//!
//! Every exchange has a number that all ranks count alike. A rank writes its part into one of its two
//! slots, by the number's parity, and publishes the number in its flag; others wait for the flag and
//! read. Before a slot is written again, everybody must have published the exchange in between, which
//! they do after reading.
//!
//! Waiting is a short spin and then a sleep on the flag (futex), so that a rank whose core another
//! program took is not starved by those that wait for it.

use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use memmap2::MmapRaw;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    thread::futex,
};

use super::{Missing, MissingReason, Site};
use crate::runtime::clock;

/// f32 elements of a slot: 1 MiB. Longer exchanges go in pieces.
const SLOT_LEN: usize = 1 << 18;
/// Checks of a flag before the waiting rank sleeps: long enough for ranks that are in step, short
/// enough that a preempted one gets the core.
const SPINS_BEFORE_SLEEP: usize = 1_000;
/// How long a sleep on a flag lasts at most before deaths are looked for again.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// Begins every segment, so that another file is not taken for one.
const MAGIC: u32 = u32::from_le_bytes(*b"dsdG");
/// A broadcast of so many words is the end of the group.
const END: u32 = u32::MAX;

/// A rank's flags, a cache line of their own.
#[repr(C, align(128))]
struct Line {
    /// The last exchange this rank has published.
    published: AtomicU32,
    /// Ranks that sleep on `published`, or are about to.
    n_sleeping: AtomicU32,
    /// Where the rank is ([`Site::to_word`]).
    site: AtomicU32,
}

/// What the segment begins with.
#[repr(C, align(128))]
struct Head {
    magic: AtomicU32,
    n_ranks: AtomicU32,
    /// A dead rank's number plus one, 0 while all live.
    dead: AtomicU32,
}

const SLOT_BYTES: usize = SLOT_LEN * size_of::<f32>();

/// Why a segment cannot be made or joined.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The system refused the memory.
    #[error("cannot make {bytes} bytes of memory shared between ranks")]
    Create {
        /// Size.
        bytes: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be opened or mapped.
    #[error("cannot map the ranks' shared memory `{}`", path.display())]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not one, or of another group.
    #[error("`{}` is not the shared memory of a group of {n_ranks} ranks", path.display())]
    Mismatch {
        /// What was opened.
        path: PathBuf,
        /// Ranks expected.
        n_ranks: usize,
    },
}

/// Memory that the ranks of one epoch of a group share. Whoever supervises them holds it to tell the
/// living of deaths.
#[derive(Debug, Clone)]
pub struct Segment {
    file: Arc<File>,
    mapping: Arc<MmapRaw>,
    n_ranks: usize,
}

impl Segment {
    /// Bytes of a segment for `n_ranks`.
    pub const fn bytes(n_ranks: usize) -> usize {
        size_of::<Head>() + n_ranks * (size_of::<Line>() + 2 * SLOT_BYTES)
    }

    /// Takes the memory; it lives as long as somebody maps it.
    ///
    /// # Errors
    /// [`SegmentError::Create`].
    pub fn create(n_ranks: usize) -> Result<Self, SegmentError> {
        let bytes = Self::bytes(n_ranks);
        let refused = |source: io::Error| SegmentError::Create { bytes, source };
        let fd = memfd_create("dsd-group", MemfdFlags::CLOEXEC).map_err(|e| refused(e.into()))?;
        ftruncate(&fd, bytes as u64).map_err(|e| refused(e.into()))?;
        let file = File::from(fd);
        let mapping = MmapRaw::map_raw(&file).map_err(refused)?;
        let segment = Self {
            file: Arc::new(file),
            mapping: Arc::new(mapping),
            n_ranks,
        };
        let head = segment.head();
        head.n_ranks.store(n_ranks as u32, Relaxed);
        head.magic.store(MAGIC, SeqCst);
        Ok(segment)
    }

    /// Where processes of the same user find it while this one lives.
    pub fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        let fd = self.file.as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// Maps the segment that another process made.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn open(path: &Path, n_ranks: usize) -> Result<Self, SegmentError> {
        let refused = |source| SegmentError::Open {
            path: path.to_owned(),
            source,
        };
        let mismatch = || SegmentError::Mismatch {
            path: path.to_owned(),
            n_ranks,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(refused)?;
        if file.metadata().map_err(refused)?.len() != Self::bytes(n_ranks) as u64 {
            return Err(mismatch());
        }
        let mapping = MmapRaw::map_raw(&file).map_err(refused)?;
        let segment = Self {
            file: Arc::new(file),
            mapping: Arc::new(mapping),
            n_ranks,
        };
        let head = segment.head();
        let found = (head.magic.load(SeqCst), head.n_ranks.load(Relaxed));
        match found == (MAGIC, n_ranks as u32) {
            true => Ok(segment),
            false => Err(mismatch()),
        }
    }

    /// Joins as a rank. `deadline` is how long others may be late, at most and until
    /// [`ShmMember::set_deadline`].
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn join(self, rank: usize, deadline: Duration) -> ShmMember {
        assert!(rank < self.n_ranks, "rank {rank} of {}", self.n_ranks);
        ShmMember {
            segment: self,
            rank,
            deadline,
            deadline_max: deadline,
            n_exchanges: 0,
        }
    }

    /// Tells all who wait that a rank's process has ended.
    pub fn mark_dead(&self, rank: usize) {
        self.head().dead.store(rank as u32 + 1, SeqCst);
        for rank in 0..self.n_ranks {
            let _ = futex::wake(&self.line(rank).published, futex::Flags::empty(), u32::MAX);
        }
    }

    /// The last exchange that a rank took part in, or is waiting in.
    pub fn last_site(&self, rank: usize) -> Site {
        Site::from_word(self.line(rank).site.load(Relaxed))
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping is as long as `bytes` says, page-aligned, and a head begins it; all
        // fields are atomics, valid for any bytes.
        unsafe { &*self.mapping.as_ptr().cast::<Head>() }
    }

    fn line(&self, rank: usize) -> &Line {
        assert!(rank < self.n_ranks, "rank {rank} of {}", self.n_ranks);
        // SAFETY: `n_ranks` lines follow the head inside the mapping, whose sizes are multiples of
        // their alignment; all fields are atomics.
        unsafe {
            let first = self.mapping.as_ptr().add(size_of::<Head>());
            &*first.cast::<Line>().add(rank)
        }
    }

    /// The slot of `rank` for exchange `number`: [`SLOT_LEN`] elements.
    fn slot(&self, rank: usize, number: u32) -> *mut f32 {
        assert!(rank < self.n_ranks, "rank {rank} of {}", self.n_ranks);
        let slots = size_of::<Head>() + self.n_ranks * size_of::<Line>();
        let index = 2 * rank + (number % 2) as usize;
        // SAFETY: two slots per rank follow the lines inside the mapping.
        unsafe {
            self.mapping
                .as_mut_ptr()
                .add(slots + index * SLOT_BYTES)
                .cast()
        }
    }
}

/// A rank's end of a [`Segment`].
#[derive(Debug)]
pub struct ShmMember {
    segment: Segment,
    rank: usize,
    deadline: Duration,
    /// The longest deadline.
    deadline_max: Duration,
    /// Exchanges so far; wraps.
    n_exchanges: u32,
}

/// What a follower is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// A message was received.
    Message,
    /// The group has come to its end.
    End,
}

impl ShmMember {
    /// From now on others may be late by `deadline`, and never more than was said when joining.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline.min(self.deadline_max);
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the group.
    pub fn n_ranks(&self) -> usize {
        self.segment.n_ranks
    }

    /// See [`super::Collective::all_reduce`].
    pub(super) fn all_reduce(&mut self, site: Site, values: &mut [f32]) -> Result<(), Missing> {
        for piece in values.chunks_mut(SLOT_LEN) {
            let number = self.begin(site)?;
            self.write(number, piece);
            self.publish(number);
            self.wait_for_all(number, site, Some(self.deadline))?;
            // SAFETY: every rank has published this exchange, so its slot holds a piece of this
            // length, and writes it again only after this rank has published the next one.
            unsafe {
                let first = self.segment.slot(0, number).cast_const();
                piece.copy_from_slice(std::slice::from_raw_parts(first, piece.len()));
                for rank in 1..self.segment.n_ranks {
                    let other = self.segment.slot(rank, number).cast_const();
                    let other = std::slice::from_raw_parts(other, piece.len());
                    piece.iter_mut().zip(other).for_each(|(sum, v)| *sum += v);
                }
            }
        }
        Ok(())
    }

    /// See [`super::Collective::gather_columns`].
    pub(super) fn gather_columns(
        &mut self,
        site: Site,
        local: &[f32],
        columns: &[Range<usize>],
        n_rows: usize,
        mut out: Option<&mut [f32]>,
    ) -> Result<(), Missing> {
        assert_eq!(columns.len(), self.segment.n_ranks, "columns of every rank");
        let stride = columns.last().map_or(0, |c| c.end);
        let len_of = |rank: usize| n_rows * columns[rank].len();
        let local = &local[..len_of(self.rank)];
        let len_max = (0..columns.len()).map(len_of).max().unwrap_or(0);
        for from in (0..len_max).step_by(SLOT_LEN) {
            let piece = |len: usize| from.min(len)..(from + SLOT_LEN).min(len);
            let number = self.begin(site)?;
            self.write(number, &local[piece(local.len())]);
            self.publish(number);
            let Some(out) = out.as_deref_mut() else {
                continue;
            };
            self.wait_for_all(number, site, Some(self.deadline))?;
            for (rank, columns) in columns.iter().enumerate() {
                let piece = piece(len_of(rank));
                // SAFETY: as in `all_reduce`.
                let values = unsafe {
                    let slot = self.segment.slot(rank, number).cast_const();
                    std::slice::from_raw_parts(slot, piece.len())
                };
                let mut at = piece.start;
                let mut values = values;
                while !values.is_empty() {
                    let (row, col) = (at / columns.len(), at % columns.len());
                    let n = (columns.len() - col).min(values.len());
                    let to = row * stride + columns.start + col;
                    out[to..to + n].copy_from_slice(&values[..n]);
                    values = &values[n..];
                    at += n;
                }
            }
        }
        Ok(())
    }

    /// Returns when all ranks have called it; they may be as late as `patience`.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn meet(&mut self, site: Site, patience: Duration) -> Result<(), Missing> {
        let number = self.begin(site)?;
        self.publish(number);
        self.wait_for_all(number, site, Some(patience))
    }

    /// Sends words from this rank to all others, who call [`ShmMember::receive`].
    ///
    /// # Errors
    /// [`Missing`].
    pub fn broadcast(&mut self, site: Site, words: &[u32]) -> Result<(), Missing> {
        assert!(words.len() < END as usize, "a message is no end");
        self.send(site, words.len() as u32, words)
    }

    /// Tells all others that nothing follows.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn broadcast_end(&mut self, site: Site) -> Result<(), Missing> {
        self.send(site, END, &[])
    }

    fn send(&mut self, site: Site, head: u32, words: &[u32]) -> Result<(), Missing> {
        let (mut head, mut words) = (Some(head), words);
        while head.is_some() || !words.is_empty() {
            let number = self.begin(site)?;
            let slot = self.segment.slot(self.rank, number).cast::<u32>();
            let at = usize::from(head.is_some());
            let (piece, rest) = words.split_at(words.len().min(SLOT_LEN - at));
            // SAFETY: the piece and the head fit the slot, which nobody reads now (`begin`).
            unsafe {
                if let Some(head) = head.take() {
                    slot.write(head);
                }
                slot.add(at)
                    .copy_from_nonoverlapping(piece.as_ptr(), piece.len());
            }
            words = rest;
            self.publish(number);
        }
        Ok(())
    }

    /// Waits for what rank `from` broadcasts, for as long as it takes, and puts it into `words`, at
    /// most `len_max` of them.
    ///
    /// # Errors
    /// [`Missing`] when a rank died.
    ///
    /// # Panics
    /// When the message is longer than both sides agreed on.
    pub fn receive(
        &mut self,
        from: usize,
        site: Site,
        words: &mut Vec<u32>,
        len_max: usize,
    ) -> Result<Told, Missing> {
        words.clear();
        let mut n_missing = None;
        while n_missing != Some(0) {
            let number = self.begin(site)?;
            let patience = n_missing.map(|_| self.deadline);
            self.wait_for(from, number, site, patience)?;
            let slot = self.segment.slot(from, number).cast::<u32>().cast_const();
            // SAFETY: the sender has published this exchange; the piece is inside its slot.
            unsafe {
                let (at, left) = match n_missing {
                    Some(left) => (0, left),
                    None => {
                        let head = slot.read();
                        if head == END {
                            self.publish(number);
                            return Ok(Told::End);
                        }
                        assert!(
                            head as usize <= len_max,
                            "{head} words of at most {len_max}"
                        );
                        (1, head as usize)
                    }
                };
                let n = left.min(SLOT_LEN - at);
                words.extend_from_slice(std::slice::from_raw_parts(slot.add(at), n));
                n_missing = Some(left - n);
            }
            self.publish(number);
        }
        Ok(Told::Message)
    }

    /// The number of the next exchange, once all ranks have read what its slots held before.
    fn begin(&mut self, site: Site) -> Result<u32, Missing> {
        let line = self.segment.line(self.rank);
        line.site.store(site.to_word(), Relaxed);
        let before = self.n_exchanges;
        // All have published the exchange before, so all have read the one before that.
        self.wait_for_all(before, site, Some(self.deadline))?;
        self.n_exchanges = before.wrapping_add(1);
        Ok(self.n_exchanges)
    }

    fn write(&self, number: u32, values: &[f32]) {
        assert!(values.len() <= SLOT_LEN, "a piece fits a slot");
        let slot = self.segment.slot(self.rank, number);
        // SAFETY: the piece fits, and nobody reads the slot now (`begin`).
        unsafe { slot.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }

    fn publish(&self, number: u32) {
        let line = self.segment.line(self.rank);
        line.published.store(number, SeqCst);
        // Either a rank on its way to sleep sees the number, or it is counted here.
        if line.n_sleeping.load(SeqCst) > 0 {
            let _ = futex::wake(&line.published, futex::Flags::empty(), u32::MAX);
        }
    }

    fn wait_for_all(
        &self,
        number: u32,
        site: Site,
        patience: Option<Duration>,
    ) -> Result<(), Missing> {
        (0..self.segment.n_ranks)
            .filter(|rank| *rank != self.rank)
            .try_for_each(|rank| self.wait_for(rank, number, site, patience))
    }

    /// Waits until `rank` has published exchange `number`; without `patience` for ever, unless a
    /// rank dies.
    fn wait_for(
        &self,
        rank: usize,
        number: u32,
        site: Site,
        patience: Option<Duration>,
    ) -> Result<(), Missing> {
        let line = self.segment.line(rank);
        // Numbers wrap; ranks are never more than two exchanges apart.
        let arrived = |published: u32| published.wrapping_sub(number) < u32::MAX / 2;
        for _ in 0..SPINS_BEFORE_SLEEP {
            if arrived(line.published.load(Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let since = clock::now();
        line.n_sleeping.fetch_add(1, SeqCst);
        let outcome = self.sleep_on(line, &arrived, since, patience);
        line.n_sleeping.fetch_sub(1, SeqCst);
        outcome.map_err(|reason| {
            let dead = self.segment.head().dead.load(SeqCst);
            let rank = match reason {
                MissingReason::Died => (dead as usize - 1).min(self.segment.n_ranks - 1),
                MissingReason::Late(_) => rank,
            };
            Missing {
                rank,
                site,
                last_site: self.segment.last_site(rank),
                reason,
            }
        })
    }

    fn sleep_on(
        &self,
        line: &Line,
        arrived: &impl Fn(u32) -> bool,
        since: Instant,
        patience: Option<Duration>,
    ) -> Result<(), MissingReason> {
        loop {
            let published = line.published.load(SeqCst);
            if arrived(published) {
                return Ok(());
            }
            if self.segment.head().dead.load(SeqCst) != 0 {
                return Err(MissingReason::Died);
            }
            let waited = clock::now().saturating_duration_since(since);
            let left = match patience {
                Some(patience) if patience <= waited => return Err(MissingReason::Late(waited)),
                Some(patience) => (patience - waited).min(SLEEP_MAX),
                None => SLEEP_MAX,
            };
            let timeout = futex::Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            // Woken, timed out, interrupted or too late: the loop looks again.
            let _ = futex::wait(
                &line.published,
                futex::Flags::empty(),
                published,
                Some(&timeout),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Op, *};

    const PATIENCE: Duration = Duration::from_secs(30);
    const SITE: Site = Site {
        layer: 3,
        op: Op::Attention,
    };

    /// Runs `body` as every rank of a group, each on a thread and with a mapping of its own.
    fn group<T: Send + 'static>(
        n_ranks: usize,
        body: impl Fn(ShmMember) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let segment = Segment::create(n_ranks).unwrap();
        let body = Arc::new(body);
        let threads = (0..n_ranks)
            .map(|rank| {
                let (path, body) = (segment.path(), Arc::clone(&body));
                let run = move || body(Segment::open(&path, n_ranks).unwrap().join(rank, PATIENCE));
                crate::runtime::thread::spawn("rank", run).unwrap()
            })
            .collect::<Vec<_>>();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    #[test]
    fn sums_are_those_in_the_order_of_ranks_on_every_rank() {
        for n_ranks in [1, 2, 3, 5] {
            for len in [0, 1, 100, SLOT_LEN, SLOT_LEN + 1, 2 * SLOT_LEN + 77] {
                let value = |rank: usize, i: usize| ((rank * 31 + i * 7) % 101) as f32 * 0.1 - 3.3;
                let sums = group(n_ranks, move |mut member| {
                    let rank = member.rank();
                    let mut values = (0..len).map(|i| value(rank, i)).collect::<Vec<_>>();
                    member.all_reduce(SITE, &mut values).unwrap();
                    // A second one finds the slots free again.
                    let mut ones = vec![1.0; 3];
                    member.all_reduce(SITE, &mut ones).unwrap();
                    assert_eq!(ones, [n_ranks as f32; 3]);
                    values
                });
                let expected = (0..len)
                    .map(|i| (1..n_ranks).fold(value(0, i), |sum, rank| sum + value(rank, i)))
                    .collect::<Vec<_>>();
                assert!(
                    sums.iter().all(|sum| *sum == expected),
                    "{n_ranks} ranks, {len}"
                );
            }
        }
    }

    #[test]
    fn columns_of_uneven_ranks_lie_side_by_side() {
        let columns = [0..3, 3..4, 4..70_000];
        let n_rows = 9;
        let value = |row: usize, col: usize| (row * 100_000 + col) as f32;
        let found = group(3, move |mut member| {
            let own = columns[member.rank()].clone();
            let local = (0..n_rows)
                .flat_map(|row| own.clone().map(move |col| value(row, col)))
                .collect::<Vec<_>>();
            let mut out = vec![0.0; n_rows * 70_000];
            let wanted = (member.rank() != 1).then_some(out.as_mut_slice());
            member
                .gather_columns(SITE, &local, &columns, n_rows, wanted)
                .unwrap();
            member
                .gather_columns(SITE, &local, &columns, n_rows, None)
                .unwrap();
            out
        });
        let expected = (0..n_rows)
            .flat_map(|row| (0..70_000).map(move |col| value(row, col)))
            .collect::<Vec<_>>();
        assert!(found[0] == expected && found[2] == expected);
    }

    #[test]
    fn messages_of_any_length_arrive_and_the_end_is_told() {
        group(3, |mut member| {
            let lengths = [0, 1, SLOT_LEN - 1, SLOT_LEN, 3 * SLOT_LEN + 5, 7];
            let mut words = Vec::new();
            for len in lengths {
                let message = (0..len as u32).collect::<Vec<_>>();
                if member.rank() == 0 {
                    member.broadcast(SITE, &message).unwrap();
                } else {
                    let told = member.receive(0, SITE, &mut words, 4 * SLOT_LEN).unwrap();
                    assert!(told == Told::Message && words == message, "{len} words");
                }
            }
            if member.rank() == 0 {
                member.broadcast_end(SITE).unwrap();
            } else {
                assert_eq!(member.receive(0, SITE, &mut words, 0).unwrap(), Told::End);
            }
        });
    }

    #[test]
    fn exchanges_after_pauses_of_all_lengths_are_not_missed() {
        group(2, |mut member| {
            for round in 0..600u64 {
                if round % 2 == member.rank() as u64 {
                    std::thread::sleep(Duration::from_micros(round % 150));
                }
                let mut one = [1.0];
                member.all_reduce(SITE, &mut one).unwrap();
            }
        });
    }

    #[test]
    fn a_late_rank_is_named_with_the_place_where_it_is_missing() {
        let segment = Segment::create(2).unwrap();
        let deadline = Duration::from_millis(50);
        let mut first = segment.join(0, deadline);
        let missing = first.all_reduce(SITE, &mut [1.0]).unwrap_err();
        assert_eq!((missing.rank, missing.site), (1, SITE));
        assert!(matches!(missing.reason, MissingReason::Late(after) if after >= deadline));
        let words = missing.to_string();
        assert!(words.contains("rank 1 did not arrive within 0."), "{words}");
        assert!(words.contains("at layer 3, attention output"), "{words}");
    }

    #[test]
    fn a_death_ends_every_wait_at_once() {
        let segment = Segment::create(3).unwrap();
        let mut waiting = segment.clone().join(0, Duration::from_secs(3600));
        let thread = crate::runtime::thread::spawn("rank", move || {
            waiting.all_reduce(SITE, &mut [1.0]).unwrap_err()
        });
        segment.mark_dead(2);
        let missing = thread.unwrap().join().unwrap();
        assert_eq!((missing.rank, missing.reason), (2, MissingReason::Died));
    }

    #[test]
    fn the_memory_of_another_group_is_refused() {
        let segment = Segment::create(2).unwrap();
        let error = Segment::open(&segment.path(), 3).unwrap_err();
        assert!(
            error.to_string().contains("of a group of 3 ranks"),
            "{error}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(Segment::bytes(2) as u64).unwrap();
        assert!(Segment::open(file.path(), 2).is_err());
    }
}
