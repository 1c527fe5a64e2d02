//! Philox4x32-10: random numbers as a function of a key and a counter (Salmon et al., "Parallel
//! random numbers: as easy as 1, 2, 3", SC 2011).

/// Multipliers of the two halves of the counter (table 2 of the paper).
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key between rounds: the golden ratio and the square root of 3, minus 1.
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const N_ROUNDS: usize = 10;

/// The 128 random bits of `counter` under `key`.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..N_ROUNDS {
        let [lo0, hi0] = multiply(MULTIPLIERS[0], counter[0]);
        let [lo1, hi1] = multiply(MULTIPLIERS[1], counter[2]);
        counter = [
            hi1 ^ counter[1] ^ key[0],
            lo1,
            hi0 ^ counter[3] ^ key[1],
            lo0,
        ];
        key = [
            key[0].wrapping_add(KEY_STEPS[0]),
            key[1].wrapping_add(KEY_STEPS[1]),
        ];
    }
    counter
}

/// A uniform number in `[0, 1)` with 53 random bits for the token at `position` under `seed`.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let [seed_lo, seed_hi] = halves(seed);
    let [position_lo, position_hi] = halves(position);
    let [a, b, ..] = philox4x32([position_lo, position_hi, 0, 0], [seed_lo, seed_hi]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn multiply(a: u32, b: u32) -> [u32; 2] {
    halves(u64::from(a) * u64::from(b))
}

/// Low half, high half.
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_known_answers_come_out() {
        // The philox4x32-10 lines of the authors' known-answer file: zeros, ones, digits of pi.
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected, "counter {counter:x?}");
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        const N: u64 = 64_000;
        let mut counts = [0u64; 64];
        for position in 0..N {
            let u = uniform(7, position);
            assert!((0.0..1.0).contains(&u));
            counts[(u * 64.0) as usize] += 1;
        }
        let expected = (N / 64) as f64;
        let chi2: f64 = counts
            .iter()
            .map(|&c| (c as f64 - expected).powi(2) / expected)
            .sum();
        // 63 degrees of freedom: the 0.1 % and 99.9 % points are 33 and 104.
        assert!((33.0..104.0).contains(&chi2), "chi-square {chi2}");
    }
}
