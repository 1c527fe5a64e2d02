//! Grammars are compiled on a thread of their own, where nobody's step waits for them.
//!
//! Invariant: a request that came in goes on to the engine, or gets its end.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
};

use super::{Arrival, Mailbox, shared::Shared};
use crate::{
    flow::{FinishReason, StreamItem},
    grammar::{Constraint, GrammarError, Vocabulary},
    runtime::thread,
};

/// Compiled grammars that are kept for the next request with the same one: choices of one request, and
/// programs that always ask for the same.
const KEPT_MAX: usize = 16;

/// Makes a model's vocabulary; called once, when the first grammar comes.
#[derive(Clone)]
pub struct VocabularySource(Arc<dyn Fn() -> Result<Vocabulary, GrammarError> + Send + Sync>);

impl VocabularySource {
    /// From a function, which may take its time.
    pub fn new(
        make: impl Fn() -> Result<Vocabulary, GrammarError> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(make))
    }
}

impl std::fmt::Debug for VocabularySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VocabularySource")
    }
}

/// The way to the thread. Dropping it ends the thread behind what it has to do.
#[derive(Debug)]
pub(super) struct Compiler(SyncSender<Arrival>);

impl Compiler {
    /// Starts the thread; `capacity` requests wait for it at most.
    pub(super) fn start(
        source: VocabularySource,
        mailbox: Arc<Mailbox>,
        shared: Arc<Shared>,
        capacity: usize,
    ) -> std::io::Result<Self> {
        let (tx, rx) = mpsc::sync_channel(capacity);
        thread::spawn("dsd-grammar", move || run(&source, &rx, &mailbox, &shared))?;
        Ok(Self(tx))
    }

    /// Hands a request over; it comes back where there is no thread or no room.
    pub(super) fn send(&self, arrival: Arrival) -> Result<(), Box<Arrival>> {
        self.0.try_send(arrival).map_err(|e| match e {
            TrySendError::Full(arrival) | TrySendError::Disconnected(arrival) => Box::new(arrival),
        })
    }
}

fn run(
    source: &VocabularySource,
    arrivals: &Receiver<Arrival>,
    mailbox: &Mailbox,
    shared: &Shared,
) {
    let mut vocabulary = None;
    let mut kept = Kept::default();
    while let Ok(mut arrival) = arrivals.recv() {
        if arrival.request.sink.is_cancelled() {
            shared.release_place();
            continue;
        }
        match constraint_of(&arrival, source, &mut vocabulary, &mut kept) {
            Ok(constraint) => {
                arrival.constraint = Some(constraint);
                if let Err(arrival) = mailbox.send(arrival) {
                    end(&arrival, FinishReason::Stopped, shared);
                }
            }
            Err(e) => end(&arrival, FinishReason::Failed(e.to_string()), shared),
        }
    }
}

fn end(arrival: &Arrival, reason: FinishReason, shared: &Shared) {
    shared.release_place();
    arrival.request.sink.send(StreamItem::Finished(reason));
}

fn constraint_of(
    arrival: &Arrival,
    source: &VocabularySource,
    vocabulary: &mut Option<Vocabulary>,
    kept: &mut Kept,
) -> Result<Constraint, GrammarError> {
    let request = &arrival.request;
    let grammar = request.grammar.as_deref().unwrap_or_default();
    let stop_tokens = &request.stop_tokens;
    let mut constraint = match kept.get(grammar) {
        Some(constraint) => constraint.fresh(stop_tokens),
        None => {
            if vocabulary.is_none() {
                *vocabulary = Some((source.0)()?);
            }
            let Some(vocabulary) = vocabulary else {
                unreachable!("it was made above");
            };
            let constraint = vocabulary.compile(grammar, stop_tokens)?;
            kept.put(grammar, constraint.fresh(stop_tokens));
            constraint
        }
    };
    // What an engine that was lost has given already.
    request
        .output
        .iter()
        .try_for_each(|token| constraint.advance(*token))?;
    Ok(constraint)
}

/// The grammars that came last, the latest at the end.
#[derive(Default)]
struct Kept(VecDeque<(String, Constraint)>);

impl Kept {
    fn get(&mut self, grammar: &str) -> Option<&Constraint> {
        let at = self.0.iter().position(|(known, _)| known == grammar)?;
        let found = self.0.remove(at)?;
        self.0.push_back(found);
        self.0.back().map(|(_, constraint)| constraint)
    }

    fn put(&mut self, grammar: &str, constraint: Constraint) {
        if self.0.len() == KEPT_MAX {
            self.0.pop_front();
        }
        self.0.push_back((grammar.to_owned(), constraint));
    }
}
