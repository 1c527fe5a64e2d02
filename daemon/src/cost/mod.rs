//! How long a step takes, learnt from the engine's own steps, and what follows from it: how long a
//! prompt takes, how many of its positions fit a step, and what a sequence used of one.
//!
//! Pure: told shapes and seconds, it predicts seconds. Knows no requests, queues or clock.
//!
//! A step's time is modelled as `speed * (rows(n_rows) + keys * n_keys + row_keys * n_row_keys +
//! logits * n_logits)`: `rows` is piecewise linear between powers of two, because a few rows cost as
//! much as one (their weights are read once) and many cost in proportion; the rest is attention and
//! the vocabulary projection. `speed` follows a machine that other programs share within a few
//! steps, the other parameters change slowly.
//!
//! Invariant: predictions are finite and positive, and never fall when a step grows.
//!
//! Called by scheduler, engine and admission.

mod saved;

pub use saved::{SavedCost, SavedCostError};

/// Knots of the piecewise linear part: 1, 2, 4, .. 2^20 rows.
const N_KNOTS: usize = 21;
/// How much of a step's error goes into the slow parameters.
const LEARNING_RATE: f64 = 0.2;
/// How much of a step's error, as an exponent of the ratio, goes into the speed.
const SPEED_RATE: f64 = 0.15;
/// The speed's way back to 1 in a step, so that the slow parameters take over what lasts.
const SPEED_DECAY: f64 = 0.995;
/// A step that took this many times longer or shorter than predicted says no more than this: it was
/// interrupted, or the model knows too little yet.
const SURPRISE_MAX: f64 = 4.0;
/// Steps in which everything predicted is scaled to what was seen.
const N_FIRST_STEPS: u64 = 6;
/// A step may take this many times as long as its decodes alone, whatever its target.
const STEP_OVER_DECODES: f64 = 3.0;
/// Parameters stay within these bounds, in seconds.
const PARAMETER_MIN: f64 = 1e-15;
const PARAMETER_MAX: f64 = 1e6;

/// What a step's time depends on. Shapes add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepShape {
    /// Positions computed.
    pub n_rows: usize,
    /// Positions whose keys are read, once for each sequence.
    pub n_keys: f64,
    /// Keys met by all rows together.
    pub n_row_keys: f64,
    /// Rows of logits.
    pub n_logits: usize,
}

impl StepShape {
    /// Positions `first..first + n` of one sequence.
    pub fn span(first: usize, n: usize, n_logits: usize) -> Self {
        Self {
            n_rows: n,
            n_keys: (first + n) as f64,
            n_row_keys: n as f64 * (first as f64 + (n as f64 + 1.0) / 2.0),
            n_logits,
        }
    }

    /// Both in one step.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            n_rows: self.n_rows + other.n_rows,
            n_keys: self.n_keys + other.n_keys,
            n_row_keys: self.n_row_keys + other.n_row_keys,
            n_logits: self.n_logits + other.n_logits,
        }
    }
}

/// The model: see the module.
#[derive(Debug, Clone, PartialEq)]
pub struct CostModel {
    speed: f64,
    /// Seconds of a step of `2^i` rows.
    rows: [f64; N_KNOTS],
    /// Bit `i`: a step next to knot `i` was seen.
    seen: u32,
    /// Seconds for a key read, for a row meeting a key, for a row of logits.
    per_key: f64,
    per_row_key: f64,
    per_logit: f64,
    /// Steps observed.
    n_steps: u64,
}

impl Default for CostModel {
    /// What is assumed before anything was seen: a small model on a few cores. The first steps
    /// scale it.
    fn default() -> Self {
        let mut rows = [0.0; N_KNOTS];
        for (i, seconds) in rows.iter_mut().enumerate() {
            *seconds = 2e-3 + 4e-4 * (1u64 << i) as f64;
        }
        Self {
            speed: 1.0,
            rows,
            seen: 0,
            per_key: 4e-7,
            per_row_key: 1e-7,
            per_logit: 1e-4,
            n_steps: 0,
        }
    }
}

impl CostModel {
    /// Takes in how long a step took.
    pub fn observe(&mut self, shape: StepShape, seconds: f64) {
        if shape.n_rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        let ratio = (seconds / self.seconds(shape)).clamp(1.0 / SURPRISE_MAX, SURPRISE_MAX);
        self.n_steps = self.n_steps.saturating_add(1);
        if self.n_steps <= N_FIRST_STEPS {
            self.scale(ratio);
        } else {
            let speed = self.speed.powf(SPEED_DECAY) * ratio.powf(SPEED_RATE);
            self.speed = speed.clamp(1.0 / SURPRISE_MAX, SURPRISE_MAX);
        }
        self.learn(shape, ratio);
        self.fill_unseen();
    }

    /// Seconds that a step takes.
    pub fn seconds(&self, shape: StepShape) -> f64 {
        let attention = self.per_key * shape.n_keys + self.per_row_key * shape.n_row_keys;
        let logits = self.per_logit * shape.n_logits as f64;
        self.speed * (self.of_rows(shape.n_rows) + attention + logits)
    }

    /// Seconds that are a span's part of a step of `n_rows` rows in all; the parts of a step's spans
    /// add up to the step.
    pub fn share(&self, span: StepShape, n_rows: usize) -> f64 {
        let of_rows = self.of_rows(n_rows) * span.n_rows as f64 / n_rows.max(1) as f64;
        let attention = self.per_key * span.n_keys + self.per_row_key * span.n_row_keys;
        let logits = self.per_logit * span.n_logits as f64;
        self.speed * (of_rows + attention + logits)
    }

    /// Seconds that positions `from..to` take in chunks of at most `chunk` rows, alone.
    pub fn prefill_seconds(&self, from: usize, to: usize, chunk: usize) -> f64 {
        let n = to.saturating_sub(from);
        if n == 0 {
            return 0.0;
        }
        let chunk = chunk.clamp(1, n);
        let n_chunks = n as f64 / chunk as f64;
        let all = StepShape::span(from, n, 0);
        // Each chunk reads the keys before it once.
        let n_keys = n_chunks * (from as f64 + (n + chunk) as f64 / 2.0);
        let attention = self.per_key * n_keys + self.per_row_key * all.n_row_keys;
        self.speed * (n_chunks * self.of_rows(chunk) + attention + self.per_logit)
    }

    /// How many positions, at most `n_max`, can be added to `base` within `seconds`; `span` is the shape
    /// of so many.
    pub fn rows_within(
        &self,
        seconds: f64,
        base: StepShape,
        span: impl Fn(usize) -> StepShape,
        n_max: usize,
    ) -> usize {
        let fits = |n| self.seconds(base.and(span(n))) <= seconds;
        if n_max == 0 || fits(n_max) {
            return n_max;
        }
        let (mut fitting, mut beyond) = (0, n_max);
        while fitting + 1 < beyond {
            let middle = fitting.midpoint(beyond);
            if fits(middle) {
                fitting = middle;
            } else {
                beyond = middle;
            }
        }
        fitting
    }

    /// Seconds that a step with these decodes may take where `target` are wanted. Prompts have two
    /// thirds of it at least: with less, few sequences run at once, and each costs more.
    pub fn step_seconds_max(&self, target: f64, decodes: StepShape) -> f64 {
        target.max(STEP_OVER_DECODES * self.seconds(decodes))
    }

    /// Steps observed.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// The parameters, for another process or a file; [`CostModel::from_parameters`] reads them.
    pub fn parameters(&self) -> Vec<f64> {
        let mut all = vec![
            self.speed,
            self.per_key,
            self.per_row_key,
            self.per_logit,
            f64::from(self.seen),
            self.n_steps as f64,
        ];
        all.extend(self.rows);
        all
    }

    /// The model with these parameters; `None` where they are not those of one.
    pub fn from_parameters(parameters: &[f64]) -> Option<Self> {
        let (head, rows) = parameters.split_at_checked(6)?;
        let rows: [f64; N_KNOTS] = rows.try_into().ok()?;
        let is_time = |x: &f64| (PARAMETER_MIN..=PARAMETER_MAX).contains(x);
        let are_times = rows.iter().chain(&head[1..4]).all(is_time) && rows.is_sorted();
        let is_count = |x: f64, max: f64| (0.0..=max).contains(&x) && x.fract() == 0.0;
        let is_speed = (1.0 / SURPRISE_MAX..=SURPRISE_MAX).contains(&head[0]);
        let seen_max = f64::from((1u32 << N_KNOTS) - 1);
        let n_steps_max = 2f64.powi(53);
        if !are_times
            || !is_speed
            || !is_count(head[4], seen_max)
            || !is_count(head[5], n_steps_max)
        {
            return None;
        }
        Some(Self {
            speed: head[0],
            per_key: head[1],
            per_row_key: head[2],
            per_logit: head[3],
            seen: head[4] as u32,
            n_steps: head[5] as u64,
            rows,
        })
    }

    /// The knots beside a number of rows and how near it is to the second one.
    fn knots(n_rows: usize) -> (usize, usize, f64) {
        let n = n_rows.clamp(1, 1 << (N_KNOTS - 1));
        let below = n.ilog2() as usize;
        let above = (below + 1).min(N_KNOTS - 1);
        let nearness = n as f64 / (1u64 << below) as f64 - 1.0;
        (below, above, if above == below { 0.0 } else { nearness })
    }

    fn of_rows(&self, n_rows: usize) -> f64 {
        if n_rows == 0 {
            return 0.0;
        }
        let (below, above, nearness) = Self::knots(n_rows);
        self.rows[below] * (1.0 - nearness) + self.rows[above] * nearness
    }

    fn scale(&mut self, ratio: f64) {
        let scaled = |x: f64| (x * ratio).clamp(PARAMETER_MIN, PARAMETER_MAX);
        self.rows = self.rows.map(scaled);
        self.per_key = scaled(self.per_key);
        self.per_row_key = scaled(self.per_row_key);
        self.per_logit = scaled(self.per_logit);
    }

    /// Normalised least mean squares on the contributions to the step's time, as factors, so that no
    /// parameter becomes negative and the largest contributions take most of the error.
    fn learn(&mut self, shape: StepShape, ratio: f64) {
        let (below, above, nearness) = Self::knots(shape.n_rows);
        let contributions = [
            self.rows[below] * (1.0 - nearness),
            self.rows[above] * nearness,
            self.per_key * shape.n_keys,
            self.per_row_key * shape.n_row_keys,
            self.per_logit * shape.n_logits as f64,
        ];
        let total: f64 = contributions.iter().sum();
        let squares: f64 = contributions.iter().map(|c| c * c).sum();
        let error = total * (ratio.clamp(0.5, 2.0) - 1.0);
        let factor = |c: f64| (1.0 + LEARNING_RATE * error * c / squares).clamp(0.5, 2.0);
        let parameters: [&mut f64; 3] = [
            &mut self.per_key,
            &mut self.per_row_key,
            &mut self.per_logit,
        ];
        for (parameter, c) in parameters.into_iter().zip(&contributions[2..]) {
            *parameter = (*parameter * factor(*c)).clamp(PARAMETER_MIN, PARAMETER_MAX);
        }
        for (knot, c) in [below, above].into_iter().zip(contributions) {
            let seconds = self.rows[knot] * factor(c);
            self.rows[knot] = seconds.clamp(PARAMETER_MIN, PARAMETER_MAX);
        }
        let nearer = if nearness < 0.5 { below } else { above };
        self.seen |= 1 << nearer;
        // More rows never take less time: the knots beside the one that knows best give way.
        for i in nearer..N_KNOTS - 1 {
            self.rows[i + 1] = self.rows[i + 1].max(self.rows[i]);
        }
        for i in (1..=nearer).rev() {
            self.rows[i - 1] = self.rows[i - 1].min(self.rows[i]);
        }
    }

    /// Gives knots that no step came near the values of a line through those that were seen: between
    /// two of them, along the last two beyond them, and that of the first below it.
    fn fill_unseen(&mut self) {
        let at = |i: usize| (1u64 << i) as f64;
        let seen = self.seen;
        let mut last: Option<usize> = None;
        let mut slope = None;
        for i in (0..N_KNOTS).filter(|i| seen & 1 << i != 0) {
            match last {
                None => {
                    let first = self.rows[i];
                    self.rows[..i].fill(first);
                }
                Some(before) => {
                    let line = (self.rows[i] - self.rows[before]) / (at(i) - at(before));
                    for between in before + 1..i {
                        self.rows[between] = self.rows[before] + line * (at(between) - at(before));
                    }
                    slope = Some(line);
                }
            }
            last = Some(i);
        }
        let Some(last) = last else { return };
        // One knot says nothing of the slope; rows beyond it then cost in proportion, as many do.
        let in_proportion = self.rows[last] / at(last);
        let slope = slope.unwrap_or(in_proportion).max(in_proportion / 4.0);
        for beyond in last + 1..N_KNOTS {
            let seconds = self.rows[last] + slope * (at(beyond) - at(last));
            self.rows[beyond] = seconds.min(PARAMETER_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A number in `[0, 1)` that follows from both: SplitMix64's finalizer.
    fn uniform(salt: u64, i: u64) -> f64 {
        let x = (salt << 40 ^ i).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A machine whose steps take what a formula says, with noise.
    fn machine(shape: StepShape, noise: f64) -> f64 {
        let n = shape.n_rows as f64;
        let of_rows = 3e-3
            + if n < 8.0 {
                1e-4 * n
            } else {
                8e-4 + 5e-4 * (n - 8.0)
            };
        let rest = 1e-6 * shape.n_keys + 6e-8 * shape.n_row_keys + 2e-4 * shape.n_logits as f64;
        (of_rows + rest) * (1.0 + noise)
    }

    /// Step `i` of a mixed load: decodes, and now and then a chunk of a prompt.
    fn step(i: u64) -> StepShape {
        let draw = |salt: u64, n: u64| (uniform(salt, i) * n as f64) as usize;
        let decodes = (0..draw(1, 20)).map(|k| StepShape::span(draw(9 + k as u64, 3000), 1, 1));
        let all = decodes.fold(StepShape::default(), StepShape::and);
        match draw(2, 3) {
            0 => all.and(StepShape::span(draw(3, 2000), 1 + draw(4, 200), 0)),
            _ => all.and(StepShape::span(draw(3, 100), 1, 1)),
        }
    }

    fn learnt(n_steps: u64, noise: f64, slower: f64) -> CostModel {
        let mut model = CostModel::default();
        for i in 0..n_steps {
            let shape = step(i);
            let noise = noise * (2.0 * uniform(77, i) - 1.0);
            model.observe(shape, slower * machine(shape, noise));
        }
        model
    }

    fn mean_error(model: &CostModel, slower: f64) -> f64 {
        let error = |i| {
            let seconds = slower * machine(step(i), 0.0);
            (model.seconds(step(i)) / seconds - 1.0).abs()
        };
        (10_000..10_500).map(error).sum::<f64>() / 500.0
    }

    #[test]
    fn it_learns_a_machine_within_a_few_hundred_steps() {
        for (slower, noise) in [(1.0, 0.0), (0.02, 0.1), (80.0, 0.1), (1.0, 0.3)] {
            let error = mean_error(&learnt(600, noise, slower), slower);
            assert!(error < 0.12 + noise / 2.0, "{slower} {noise}: {error}");
        }
    }

    #[test]
    fn a_machine_that_becomes_slower_is_followed_within_thirty_steps() {
        let mut model = learnt(600, 0.05, 1.0);
        for i in 600..630 {
            model.observe(step(i), 2.0 * machine(step(i), 0.0));
        }
        let error = mean_error(&model, 2.0);
        assert!(error < 0.2, "{error}");
    }

    #[test]
    fn one_interrupted_step_changes_little() {
        let model = learnt(600, 0.05, 1.0);
        let mut after = model.clone();
        after.observe(step(7), 100.0);
        let change = after.seconds(step(7)) / model.seconds(step(7));
        assert!((0.99..1.6).contains(&change), "{change}");
    }

    #[test]
    fn a_span_costs_its_share_and_rows_fit_what_is_left() {
        let model = learnt(600, 0.05, 1.0);
        let spans = [
            StepShape::span(100, 1, 1),
            StepShape::span(0, 50, 0),
            StepShape::span(900, 1, 1),
        ];
        let all = spans.into_iter().fold(StepShape::default(), StepShape::and);
        let shares: f64 = spans.iter().map(|s| model.share(*s, all.n_rows)).sum();
        assert!((shares / model.seconds(all) - 1.0).abs() < 1e-9);
        let span = |n| StepShape::span(64, n, 1);
        let n = model.rows_within(0.05, spans[0], span, 4096);
        let with = |n| model.seconds(spans[0].and(StepShape::span(64, n, 1)));
        assert!(with(n) <= 0.05 && 0.05 < with(n + 1), "{n}");
        assert_eq!(model.rows_within(1e9, spans[0], span, 300), 300);
        assert_eq!(model.rows_within(0.0, spans[0], span, 300), 0);
    }

    #[test]
    fn a_prompt_takes_what_its_chunks_take() {
        let model = learnt(600, 0.0, 1.0);
        let chunk = |first| model.seconds(StepShape::span(first, 100, 0));
        let steps: f64 = (0..10).map(|i| chunk(100 * i)).sum();
        let whole = model.prefill_seconds(0, 1000, 100);
        assert!((whole / steps - 1.0).abs() < 0.01, "{whole} {steps}");
        assert_eq!(model.prefill_seconds(5, 5, 100), 0.0);
    }

    proptest! {
        #[test]
        fn predictions_stay_finite_positive_and_monotonic(
            steps in prop::collection::vec((1usize..5000, 0usize..9000, 1e-7f64..1e4), 1..200),
        ) {
            let mut model = CostModel::default();
            for (n, first, seconds) in steps {
                model.observe(StepShape::span(first, n, 1), seconds);
                let again = CostModel::from_parameters(&model.parameters());
                prop_assert_eq!(again.as_ref(), Some(&model));
                let mut last = 0.0;
                for n in [1, 2, 3, 5, 8, 13, 100, 512, 513, 5000, 1 << 20, 1 << 22] {
                    let seconds = model.seconds(StepShape::span(10, n, 1));
                    prop_assert!(seconds.is_finite() && 0.0 < seconds && last <= seconds * 1.000001);
                    last = seconds;
                }
            }
        }

        #[test]
        fn parameters_of_nothing_are_refused(at in 0usize..27, value in prop::num::f64::ANY) {
            let mut parameters = CostModel::default().parameters();
            parameters[at] = value;
            if let Some(model) = CostModel::from_parameters(&parameters) {
                let seconds = model.seconds(StepShape::span(10, 100, 1));
                prop_assert!(seconds.is_finite() && 0.0 < seconds);
            }
            prop_assert_eq!(CostModel::from_parameters(&parameters[1..]), None);
        }
    }
}
