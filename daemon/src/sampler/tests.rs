//! Filters, penalties and draws, in tables and as properties.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn params(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    };
    change(&mut params);
    params
}

fn greedy(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    params(|p| {
        p.temperature = 0.0;
        change(p);
    })
}

fn ctx<'a>(params: &'a SamplingParams, prompt: &'a [u32], output: &'a [u32]) -> SampleContext<'a> {
    SampleContext {
        params,
        prompt,
        output,
        top_logprobs: None,
        allowed: None,
        sampleable_len: usize::MAX,
    }
}

fn choose(logits: &[f32], ctx: &SampleContext<'_>) -> Result<Sampled, SampleError> {
    sample(&mut Scratch::new(logits.len()), &mut logits.to_vec(), ctx)
}

fn check_greedy(logits: &[f32], params: &SamplingParams, output: &[u32], expected: u32) {
    let sampled = choose(logits, &ctx(params, &[0], output)).unwrap();
    assert_eq!(sampled.token, expected, "{logits:?} {params:?} {output:?}");
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_smallest_id() {
    check_greedy(&[1.0, 3.0, 2.0], &greedy(|_| {}), &[], 1);
    check_greedy(&[1.0, 3.0, 3.0, 3.0], &greedy(|_| {}), &[], 1);
    check_greedy(&[-0.0, 0.0], &greedy(|_| {}), &[], 0);
    check_greedy(&[f32::NAN, -5.0, f32::NAN], &greedy(|_| {}), &[], 1);
    check_greedy(&[f32::NEG_INFINITY, f32::MIN], &greedy(|_| {}), &[], 1);
    // No temperature at all is what a NaN says.
    check_greedy(&[1.0, 2.0], &params(|p| p.temperature = f32::NAN), &[], 1);
}

#[test]
fn penalties_and_bias_move_the_logits_as_their_definitions_say() {
    // The prompt of every case is token 0.
    let repetition = greedy(|p| p.repetition_penalty = 2.0);
    check_greedy(&[3.0, 2.0, 0.0], &repetition, &[], 1);
    check_greedy(&[-1.0, -1.5, -9.0], &repetition, &[], 1);
    // Once, however often the token occurs.
    check_greedy(&[0.0, 8.0, 3.0], &repetition, &[1, 1, 1], 1);

    let frequency = greedy(|p| p.frequency_penalty = 1.0);
    check_greedy(&[2.5, 3.0, 0.0], &frequency, &[1], 0);
    check_greedy(&[2.5, 4.0, 0.0], &frequency, &[1], 1);
    check_greedy(&[2.5, 4.0, 0.0], &frequency, &[1, 1], 0);

    let presence = greedy(|p| p.presence_penalty = 1.0);
    check_greedy(&[2.5, 4.0, 0.0], &presence, &[1, 1, 1], 1);
    // The prompt does not count for these two.
    check_greedy(&[2.5, 2.4, 0.0], &presence, &[], 0);
    check_greedy(&[2.5, 2.4, 0.0], &frequency, &[], 0);

    let bias = greedy(|p| p.logit_bias = vec![(2, 100.0), (1, -100.0), (99, 1e9)]);
    check_greedy(&[2.5, 50.0, 0.0], &bias, &[], 2);
    let twice = greedy(|p| p.logit_bias = vec![(2, 2.0), (2, 2.0)]);
    check_greedy(&[3.0, 0.0, 0.0], &twice, &[], 2);
    // The repetition penalty sees the model's own sign, before bias and the others.
    let order = greedy(|p| {
        p.repetition_penalty = 2.0;
        p.logit_bias = vec![(1, 3.0)];
    });
    check_greedy(&[-9.0, -1.0, 0.6], &order, &[1], 1);
}

#[test]
fn extreme_parameters_still_choose_a_token() {
    for extreme in [
        f32::MIN,
        -1.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::INFINITY,
        f32::NAN,
    ] {
        for field in 0..8 {
            let params = params(|p| match field {
                0 => p.temperature = extreme,
                1 => p.top_p = extreme,
                2 => p.min_p = extreme,
                3 => p.repetition_penalty = extreme,
                4 => p.frequency_penalty = extreme,
                5 => p.presence_penalty = extreme,
                6 => p.logit_bias = vec![(0, extreme)],
                _ => p.top_k = usize::MAX,
            });
            let sampled = choose(&[1.0, -2.0, 0.5], &ctx(&params, &[0], &[1])).unwrap();
            assert!(sampled.token < 3, "{params:?}");
        }
    }
}

#[test]
fn a_row_without_a_number_is_an_error() {
    for logit in [f32::NAN, f32::NEG_INFINITY] {
        let params = params(|_| {});
        let found = choose(&[logit; 3], &ctx(&params, &[0], &[]));
        assert_eq!(found, Err(SampleError::NoCandidate { n_logits: 3 }));
    }
}

#[test]
fn the_generator_is_keyed_by_seed_and_position_only() {
    let logits = [0.0; 1000];
    let token = |seed, prompt: &[u32], output: &[u32]| {
        let params = params(|p| p.seed = seed);
        choose(&logits, &ctx(&params, prompt, output))
            .unwrap()
            .token
    };
    // How the sequence splits into prompt and output does not matter: a resumed request goes on
    // alike.
    assert_eq!(token(1, &[1, 2, 3], &[]), token(1, &[1], &[2, 3]));
    assert_ne!(token(1, &[1, 2, 3], &[]), token(2, &[1, 2, 3], &[]));
    assert_ne!(token(1, &[1, 2, 3], &[]), token(1, &[1, 2, 3], &[4]));
}

/// The distribution by definition: sort everything, cut, normalise.
fn expected_distribution(logits: &[f32], params: &SamplingParams) -> BTreeMap<u32, f64> {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    // Rounded like the weights under test, so that no cut falls between two roundings.
    let weight = |l: f32| f64::from(((l - max) / params.temperature).exp());
    let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| weight(l))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k != 0 {
        all.truncate(params.top_k);
    }
    let total: f64 = all.iter().map(|(_, w)| w).sum();
    let mut mass = 0.0;
    let mut kept = Vec::new();
    for (id, w) in all {
        if kept.is_empty() || mass < f64::from(params.top_p) * total {
            kept.push((id, w));
        }
        mass += w;
    }
    kept.retain(|(_, w)| f64::from(params.min_p) <= *w);
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    kept.into_iter().map(|(id, w)| (id, w / total)).collect()
}

/// Draws at many positions of one seed and compares the frequencies by chi-square.
fn check_distribution(params: &SamplingParams) {
    const N: usize = 20_000;
    let logits: Vec<f32> = (0..40u64)
        .map(|i| (philox::uniform(3, i) * 5.0) as f32)
        .collect();
    let expected = expected_distribution(&logits, params);
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    let mut scratch = Scratch::new(logits.len());
    let tokens = vec![0; N];
    for position in 0..N {
        let ctx = ctx(params, &tokens[..position], &[]);
        let token = sample(&mut scratch, &mut logits.clone(), &ctx)
            .unwrap()
            .token;
        *counts.entry(token).or_default() += 1;
    }
    for id in counts.keys() {
        assert!(expected.contains_key(id), "{params:?} filters {id} away");
    }
    let chi2: f64 = expected
        .iter()
        .map(|(id, p)| {
            let expected = p * N as f64;
            (counts.get(id).copied().unwrap_or(0) as f64 - expected).powi(2) / expected
        })
        .sum();
    // Mean k, variance 2k for k degrees of freedom; four standard deviations, and the seeds are
    // fixed.
    let k = expected.len() as f64 - 1.0;
    assert!(
        chi2 <= k + 4.0 * (2.0 * k).sqrt() + 1e-9,
        "chi-square {chi2} for {k}: {params:?}"
    );
}

#[test]
fn draws_follow_the_softmax_and_its_filters() {
    check_distribution(&params(|p| p.seed = 11));
    check_distribution(&params(|p| p.temperature = 0.5));
    check_distribution(&params(|p| p.temperature = 3.0));
    check_distribution(&params(|p| p.top_k = 5));
    check_distribution(&params(|p| p.top_p = 0.7));
    check_distribution(&params(|p| p.min_p = 0.2));
    check_distribution(&params(|p| {
        p.top_k = 12;
        p.top_p = 0.9;
        p.min_p = 0.1;
        p.temperature = 1.5;
        p.seed = 99;
    }));
    check_distribution(&params(|p| p.top_k = 1));
    check_distribution(&params(|p| p.top_p = 0.0));
    check_distribution(&params(|p| p.min_p = 1.0));
}

#[test]
fn log_probabilities_are_those_of_the_unmodified_row() {
    let params = greedy(|p| p.logit_bias = vec![(3, 100.0)]);
    let mut ctx = ctx(&params, &[0], &[]);
    ctx.top_logprobs = Some(2);
    let sampled = choose(&[1.0, 2.0, 2.0, 0.0], &ctx).unwrap();
    let log_sum = (1f64.exp() + 2.0 * 2f64.exp() + 1.0).ln();
    let logprob = |l: f64| (l - log_sum) as f32;
    assert_eq!(sampled.token, 3);
    let logprobs = sampled.logprobs.unwrap();
    assert!((logprobs.chosen - logprob(0.0)).abs() < 1e-6);
    assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    assert!((logprobs.top[0].1 - logprob(2.0)).abs() < 1e-6);

    ctx.top_logprobs = Some(0);
    let none = choose(&[1.0, 2.0], &ctx).unwrap().logprobs.unwrap();
    assert_eq!(none.top, []);
    ctx.top_logprobs = Some(usize::MAX);
    let all = choose(&[1.0, 2.0], &ctx).unwrap().logprobs.unwrap();
    assert_eq!(all.top.len(), 2);
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let shape = (0.01f32..3.0, 0.0f32..1.2, 0usize..60, 0.0f32..1.0);
    let penalties = (0.5f32..2.0, -2.0f32..2.0, -2.0f32..2.0);
    let bias = prop::collection::vec((0u32..60, -5.0f32..5.0), 0..4);
    (shape, penalties, bias, any::<u64>()).prop_map(|(shape, penalties, logit_bias, seed)| {
        let (temperature, top_p, top_k, min_p) = shape;
        let (repetition_penalty, frequency_penalty, presence_penalty) = penalties;
        SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
        }
    })
}

fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -10.0f32..10.0,
        1 => Just(0.0f32),
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
    ]
}

proptest! {
    #[test]
    fn what_the_scratch_was_used_for_before_does_not_matter(
        logits in prop::collection::vec(any_logit(), 50),
        other in prop::collection::vec(any_logit(), 50),
        params in any_params(),
        other_params in any_params(),
        tokens in prop::collection::vec(0u32..60, 1..30),
    ) {
        let mut used = Scratch::new(50);
        let mut other_ctx = ctx(&other_params, &tokens, &tokens);
        other_ctx.top_logprobs = Some(5);
        let _ = sample(&mut used, &mut { other }, &other_ctx);
        let (prompt, output) = tokens.split_at(tokens.len() / 2);
        let mut ctx = ctx(&params, prompt, output);
        ctx.top_logprobs = Some(3);
        let fresh = choose(&logits, &ctx);
        prop_assert_eq!(sample(&mut used, &mut { logits }, &ctx), fresh);
    }

    #[test]
    fn neither_padding_nor_a_nan_is_ever_chosen_or_listed(
        logits in prop::collection::vec(any_logit(), 50),
        params in any_params(),
        sampleable_len in 1usize..50,
        tokens in prop::collection::vec(0u32..60, 1..30),
    ) {
        let mut ctx = ctx(&params, &tokens, &[]);
        ctx.sampleable_len = sampleable_len;
        ctx.top_logprobs = Some(50);
        let Ok(sampled) = choose(&logits, &ctx) else {
            let is_number = |l: &f32| !l.is_nan() && f32::NEG_INFINITY < *l;
            prop_assert!(!logits[..sampleable_len].iter().any(is_number));
            return Ok(());
        };
        let logprobs = sampled.logprobs.unwrap();
        for id in logprobs.top.iter().map(|t| t.0).chain([sampled.token]) {
            prop_assert!((id as usize) < sampleable_len);
            prop_assert!(!logits[id as usize].is_nan());
        }
    }

    #[test]
    fn partial_selection_keeps_what_a_full_sort_keeps(
        logits in prop::collection::vec((-40i32..40).prop_map(|l| l as f32 / 8.0), 300),
        top_k in 0usize..320,
        top_p in 0.0f32..1.1,
        min_p in 0.0f32..0.5,
        seed in any::<u64>(),
    ) {
        let params = params(|p| (p.top_k, p.top_p, p.min_p, p.seed) = (top_k, top_p, min_p, seed));
        let kept = expected_distribution(&logits, &params);
        for position in 1..20 {
            let tokens = vec![0; position];
            let token = choose(&logits, &ctx(&params, &tokens, &[])).unwrap().token;
            prop_assert!(kept.contains_key(&token), "{token} of {} kept", kept.len());
        }
    }
}

#[test]
fn weights_are_exponentials_to_a_few_units_in_the_last_place() {
    let mut x = 0.0f32;
    while -87.0 < x {
        let (found, expected) = (exp(x), f64::from(x).exp());
        let error = (f64::from(found) - expected).abs() / expected;
        assert!(error < 3.0 * f64::from(f32::EPSILON), "exp({x}) = {found}");
        x -= 0.003;
    }
    assert_eq!(exp(0.0), 1.0);
    for none in [-87.0, -88.0, -1e30, f32::NEG_INFINITY, f32::NAN] {
        assert_eq!(exp(none), 0.0, "exp({none})");
    }
}
