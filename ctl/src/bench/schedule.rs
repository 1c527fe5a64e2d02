//! When requests of an open loop arrive, and what they ask.

use std::time::Duration;

use crate::bench::random::Random;

/// Words of prompts. Short and common, so that most tokenizers make one or two tokens of each.
const WORDS: [&str; 32] = [
    "time", "water", "light", "house", "river", "stone", "green", "small", "night", "world",
    "paper", "music", "north", "table", "round", "seven", "winter", "garden", "simple", "market",
    "silver", "window", "number", "letter", "people", "summer", "bridge", "forest", "island",
    "machine", "question", "answer",
];

/// Arrival times of a Poisson process: gaps are exponential with mean `1 / rate` seconds.
pub(super) struct Arrivals {
    random: Random,
    rate: f64,
    at_s: f64,
    end_s: f64,
}

impl Arrivals {
    /// Arrivals at `rate` per second on average, up to `duration` after the start.
    pub(super) fn new(rate: f64, duration: Duration, seed: u64) -> Self {
        Self {
            random: Random::new(seed, 1),
            rate,
            at_s: 0.0,
            end_s: duration.as_secs_f64(),
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.at_s += -self.random.unit().ln() / self.rate;
        (self.at_s < self.end_s).then(|| Duration::from_secs_f64(self.at_s))
    }
}

/// The prompt of request number `idx`: `n_words` words that no other request begins with, so that
/// no prefix cache helps.
pub(super) fn prompt(n_words: u32, seed: u64, idx: u64) -> String {
    let mut random = Random::new(seed, idx + 2);
    let mut text = format!("{idx}");
    for _ in 0..n_words {
        text.push(' ');
        let word = random.below(WORDS.len() as u64) as usize;
        text.push_str(WORDS.get(word).copied().unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_and_spread_of_a_poisson_process() {
        let (rate, duration) = (50.0, Duration::from_secs(400));
        let at: Vec<f64> = Arrivals::new(rate, duration, 7)
            .map(|d| d.as_secs_f64())
            .collect();
        // 20,000 expected, standard deviation 141.
        assert!((19_300..20_700).contains(&at.len()), "{}", at.len());
        assert!(at.windows(2).all(|w| w[0] <= w[1]));
        // Gaps of an exponential distribution: mean equals standard deviation.
        let gaps: Vec<f64> = at.windows(2).map(|w| w[1] - w[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let var = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!(
            (0.95..1.05).contains(&(var.sqrt() / mean)),
            "{}",
            var.sqrt() / mean
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_load() {
        let times = |seed| Arrivals::new(10.0, Duration::from_secs(5), seed).collect::<Vec<_>>();
        assert_eq!(times(1), times(1));
        assert_ne!(times(1), times(2));
        assert_eq!(prompt(5, 1, 3), prompt(5, 1, 3));
        assert_ne!(prompt(5, 1, 3), prompt(5, 1, 4));
        assert_eq!(prompt(5, 1, 3).split(' ').count(), 6);
    }
}
