//! Rotary position embedding: frequencies and the factors that come with their scaling.
//!
//! Sources: RoFormer (Su et al. 2021); YaRN (Peng et al. 2023, sections 3.2-3.4); the Llama 3.1
//! release for `llama3`.

use std::f64::consts::PI;

use super::fields::{ConfigError, Fields, contradiction, unsupported};

/// Base of a configuration that names none: RoFormer's, and that of every line here.
const THETA_DEFAULT: f64 = 10_000.0;

/// Frequencies of one model's rotation.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Radians per position for every rotated pair.
    pub inverse_frequencies: Vec<f64>,
    /// Factor on cos and sin (YaRN's attention temperature).
    pub factor: f64,
    /// YaRN's `m(mscale_all_dim)`, whose square DeepSeek-V2 and V3 put on the softmax scale; 1
    /// where it does not apply.
    pub softmax_factor: f64,
}

impl RopeSpec {
    /// From `rope_theta` and `rope_scaling`, or from `rope_parameters`, for heads with `dim`
    /// rotated elements.
    pub(super) fn read(config: Fields<'_>, dim: usize) -> Result<Self, ConfigError> {
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(contradiction(format!(
                "rotated head dimension {dim} is not even"
            )));
        }
        if let Some(part) = config.number_opt("partial_rotary_factor")?
            && (part - 1.0).abs() > f64::EPSILON
        {
            return Err(unsupported("partial_rotary_factor", part, "only 1 is"));
        }
        let scaling = match config.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_scaling")?,
        };
        let theta = match scaling
            .map(|s| s.number_opt("rope_theta"))
            .transpose()?
            .flatten()
        {
            Some(theta) => theta,
            None => config.number_opt("rope_theta")?.unwrap_or(THETA_DEFAULT),
        };
        if theta <= 1.0 {
            return Err(unsupported("rope_theta", theta, "it must be above 1"));
        }
        let base = (0..dim / 2)
            .map(|i| theta.powf(-2.0 * i as f64 / dim as f64))
            .collect::<Vec<_>>();
        let Some(scaling) = scaling else {
            return Ok(Self::plain(base));
        };
        let kind = match scaling.text("rope_type")? {
            Some(kind) => kind,
            None => scaling.text("type")?.unwrap_or("default"),
        };
        match kind {
            "default" => Ok(Self::plain(base)),
            "linear" => {
                let factor = positive_factor(scaling)?;
                Ok(Self::plain(base.iter().map(|f| f / factor).collect()))
            }
            "llama3" => Ok(Self::plain(llama3(&base, scaling)?)),
            "yarn" => yarn(&base, theta, config, scaling),
            other => Err(unsupported(
                "rope_scaling.type",
                other,
                "default, linear, llama3 and yarn are",
            )),
        }
    }

    fn plain(inverse_frequencies: Vec<f64>) -> Self {
        Self {
            inverse_frequencies,
            factor: 1.0,
            softmax_factor: 1.0,
        }
    }

    /// Divides every frequency by its own factor (`rope_freqs.weight` of GGUF files).
    pub(super) fn divide(&mut self, factors: &[f32]) {
        for (frequency, factor) in self.inverse_frequencies.iter_mut().zip(factors) {
            *frequency /= f64::from(*factor);
        }
    }
}

fn positive_factor(scaling: Fields<'_>) -> Result<f64, ConfigError> {
    let factor = scaling.number("factor")?;
    if factor <= 0.0 {
        return Err(unsupported("factor", factor, "it must be positive"));
    }
    Ok(factor)
}

/// Low frequencies are divided by the factor, high ones stay, those between are blended.
fn llama3(base: &[f64], scaling: Fields<'_>) -> Result<Vec<f64>, ConfigError> {
    let factor = positive_factor(scaling)?;
    let low = scaling.number("low_freq_factor")?;
    let high = scaling.number("high_freq_factor")?;
    let original = scaling.number("original_max_position_embeddings")?;
    if high <= low {
        return Err(contradiction(format!(
            "high_freq_factor {high} <= low_freq_factor {low}"
        )));
    }
    let scaled = |frequency: f64| {
        let wavelength = 2.0 * PI / frequency;
        if original / low < wavelength {
            frequency / factor
        } else if wavelength < original / high {
            frequency
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    Ok(base.iter().copied().map(scaled).collect())
}

fn yarn(
    base: &[f64],
    theta: f64,
    config: Fields<'_>,
    scaling: Fields<'_>,
) -> Result<RopeSpec, ConfigError> {
    let factor = positive_factor(scaling)?;
    let original = match scaling.number_opt("original_max_position_embeddings")? {
        Some(original) => original,
        None => config.number("max_position_embeddings")?,
    };
    if original <= 0.0 {
        return Err(unsupported(
            "original_max_position_embeddings",
            original,
            "must be positive",
        ));
    }
    let dim = 2.0 * base.len() as f64;
    // The pair whose wavelength makes `turns` turns over the original context.
    let pair_of = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let mut low = pair_of(scaling.number_opt("beta_fast")?.unwrap_or(32.0));
    let mut high = pair_of(scaling.number_opt("beta_slow")?.unwrap_or(1.0));
    if scaling.flag_or("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    // dim - 1, not dim / 2 - 1: what every implementation of the released models does.
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    let width = if high == low { 0.001 } else { high - low };
    let blend = |(i, frequency): (usize, &f64)| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        frequency / factor * ramp + frequency * (1.0 - ramp)
    };
    let temperature = |scale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * scale * factor.ln() + 1.0
        }
    };
    let mscale = scaling.number_opt("mscale")?.filter(|m| *m != 0.0);
    let mscale_all_dim = scaling.number_opt("mscale_all_dim")?.filter(|m| *m != 0.0);
    let attention = match (
        scaling.number_opt("attention_factor")?,
        mscale,
        mscale_all_dim,
    ) {
        (Some(given), _, _) => given,
        (None, Some(m), Some(all)) => temperature(m) / temperature(all),
        // R1-0528-Qwen3-8B ships `attn_factor`, which multiplies and brings the product to 1.
        (None, _, _) => temperature(1.0) * scaling.number_opt("attn_factor")?.unwrap_or(1.0),
    };
    Ok(RopeSpec {
        inverse_frequencies: base.iter().enumerate().map(blend).collect(),
        factor: attention,
        softmax_factor: mscale_all_dim.map_or(1.0, temperature),
    })
}
