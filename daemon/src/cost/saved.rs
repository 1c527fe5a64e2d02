//! The cost model as a file: text for a person to read, checked like anything from disk.

use serde::{Deserialize, Serialize};

use super::CostModel;

/// The one version of the format.
const VERSION: u32 = 1;

/// A cost model and what it was learnt on.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedCost {
    /// Whatever changes step times: build, model, device, ranks, threads, formats. A model learnt on
    /// something else is of no use.
    pub learnt_on: String,
    /// The model.
    pub model: CostModel,
}

/// Why a file is no cost model. It is then learnt anew.
#[derive(Debug, thiserror::Error)]
pub enum SavedCostError {
    /// No TOML, or other keys.
    #[error("not a cost model file")]
    Syntax(#[source] toml::de::Error),
    /// A later or earlier format.
    #[error("version {found} is not known, this program reads version {VERSION}")]
    Version {
        /// As written.
        found: u32,
    },
    /// Numbers that no engine can have measured.
    #[error("its parameters are damaged")]
    Damaged,
    /// Measured elsewhere.
    #[error("it was learnt on `{found}`, this is `{expected}`")]
    Foreign {
        /// As written.
        found: String,
        /// Wanted.
        expected: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    learnt_on: String,
    /// As [`CostModel::parameters`].
    parameters: Vec<f64>,
    /// Digest of the other lines.
    digest: String,
}

impl File {
    fn digest_of(learnt_on: &str, parameters: &[f64]) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("dsd cost model file");
        hasher.update(learnt_on.as_bytes());
        for parameter in parameters {
            hasher.update(&parameter.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl SavedCost {
    /// The file's text.
    pub fn to_text(&self) -> String {
        let parameters = self.model.parameters();
        let file = File {
            version: VERSION,
            digest: File::digest_of(&self.learnt_on, &parameters),
            learnt_on: self.learnt_on.clone(),
            parameters,
        };
        toml::to_string(&file).unwrap_or_default()
    }

    /// The cost model of a file that was learnt on `expected`.
    ///
    /// # Errors
    /// [`SavedCostError`].
    pub fn model_of(text: &str, expected: &str) -> Result<CostModel, SavedCostError> {
        let file: File = toml::from_str(text).map_err(SavedCostError::Syntax)?;
        if file.version != VERSION {
            return Err(SavedCostError::Version {
                found: file.version,
            });
        }
        if file.digest != File::digest_of(&file.learnt_on, &file.parameters) {
            return Err(SavedCostError::Damaged);
        }
        if file.learnt_on != expected {
            return Err(SavedCostError::Foreign {
                found: file.learnt_on,
                expected: expected.to_owned(),
            });
        }
        CostModel::from_parameters(&file.parameters).ok_or(SavedCostError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::StepShape;

    #[test]
    fn a_saved_model_comes_back_and_a_damaged_or_foreign_one_does_not() {
        let mut model = CostModel::default();
        for n in 1..100 {
            model.observe(StepShape::span(n, n, 1), 1e-3 * n as f64);
        }
        let saved = SavedCost {
            learnt_on: "0.1.0 tiny".to_owned(),
            model,
        };
        let text = saved.to_text();
        assert_eq!(
            SavedCost::model_of(&text, "0.1.0 tiny").unwrap(),
            saved.model
        );
        let refused = |text: &str| SavedCost::model_of(text, "0.1.0 tiny").unwrap_err();
        let foreign = SavedCost::model_of(&text, "0.2.0 tiny").unwrap_err();
        assert!(matches!(foreign, SavedCostError::Foreign { .. }));
        assert!(matches!(refused("{"), SavedCostError::Syntax(_)));
        assert!(matches!(refused(""), SavedCostError::Syntax(_)));
        let later = text.replace("version = 1", "version = 2");
        assert!(matches!(
            refused(&later),
            SavedCostError::Version { found: 2 }
        ));
        // Any digit that changes is noticed, unless it is beyond what a number holds.
        for (at, byte) in text.bytes().enumerate().filter(|(_, b)| b.is_ascii_digit()) {
            let mut other = text.clone().into_bytes();
            other[at] = b'0' + (byte - b'0' + 1) % 10;
            let other = String::from_utf8(other).unwrap();
            if let Ok(model) = SavedCost::model_of(&other, "0.1.0 tiny") {
                assert_eq!(model, saved.model, "{other}");
            }
        }
    }
}
