//! `dsd eval`: numbers of one checkpoint, without a server.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use dsd::{
    eval::{Session, Sizes, Speed, SpeedCase, SpeedTest, write_logits},
    text::{PromptForm, TextModel},
    weights::Checkpoint,
};
use serde_json::json;

use super::{ComputeArgs, WeightsArg};

/// Tokens of a perplexity window unless the caller says otherwise.
const WINDOW_DEFAULT: usize = 1024;

/// A text that is scored is text, whatever it spells.
const PLAIN: PromptForm = PromptForm {
    add_special: true,
    parse_special: false,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Eval {
    /// Write the logits of all positions to a safetensors file (tensor `logits`, f32 [T, vocab]).
    Logits {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        tokens: TokenArgs,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Print the greedy continuation as one JSON line; end-of-text tokens do not end it.
    Greedy {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        tokens: TokenArgs,
        /// Tokens to generate.
        #[arg(long, value_name = "N")]
        max_new: usize,
    },
    /// Print the perplexity of a text file as one JSON line.
    Perplexity {
        #[command(flatten)]
        model: ModelArgs,
        /// UTF-8 text.
        #[arg(long, value_name = "FILE")]
        text: PathBuf,
        /// Tokens of one window; the first token of a window is not scored.
        #[arg(long, default_value_t = WINDOW_DEFAULT)]
        window: usize,
    },
    /// Time prompts and their continuation, without queue or network; print the rates (tokens per
    /// second, every run and the medians) as one JSON line.
    Speed {
        #[command(flatten)]
        model: ModelArgs,
        /// Tokens of a prompt.
        #[arg(long, default_value_t = 512, value_name = "N")]
        prompt: usize,
        /// Tokens generated per sequence.
        #[arg(long, default_value_t = 64, value_name = "N")]
        output: usize,
        /// Sequences at once.
        #[arg(long, default_value_t = 1, value_name = "N",
              value_parser = clap::value_parser!(u16).range(1..=1024))]
        sequences: u16,
        /// Runs that count, after one that does not.
        #[arg(long, default_value_t = 5, value_name = "N",
              value_parser = clap::value_parser!(u16).range(1..=1000))]
        runs: u16,
    },
    /// Print the token ids of a text file as a JSON list; special tokens in the text count.
    Tokenize {
        /// Checkpoint folder, GGUF file or pack.
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
        /// UTF-8 text.
        #[arg(long, value_name = "FILE")]
        text_file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint folder, GGUF file or pack.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Round linear layers to the nearest numbers of this format while loading, to compare formats
    /// on one model; embeddings, output layers and routers stay as stored [default: as stored].
    #[arg(long, value_enum)]
    weights: Option<WeightsArg>,
    #[command(flatten)]
    compute: ComputeArgs,
}

impl ModelArgs {
    fn checkpoint(&self) -> Result<Checkpoint> {
        let mut checkpoint = checkpoint(&self.model)?;
        if let Some(weights) = self.weights {
            // The other ranks open the checkpoint themselves.
            if 1 < self.compute.tp {
                bail!("--weights rounds for one rank, --tp is {}", self.compute.tp);
            }
            if checkpoint.pack().is_some() {
                bail!(
                    "--weights rounds a checkpoint, `{}` is a pack",
                    self.model.display()
                );
            }
            checkpoint.round_weights(weights.format());
        }
        Ok(checkpoint)
    }
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// Prompt token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, num_args = 1)]
    tokens: Vec<u32>,
}

impl Eval {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Logits { model, tokens, out } => {
                let mut session = open(&model, tokens.tokens.len())?;
                write_logits(&mut session, &tokens.tokens, &out)?;
                Ok(())
            }
            Self::Greedy {
                model,
                tokens,
                max_new,
            } => {
                let tokens = tokens.tokens;
                let tokens = open(&model, tokens.len() + max_new)?.greedy(&tokens, max_new)?;
                print_line(&json!({ "tokens": tokens }))
            }
            Self::Perplexity {
                model,
                text,
                window,
            } => {
                let checkpoint = model.checkpoint()?;
                let tokens = TextModel::from_checkpoint(&checkpoint)?.encode_prompt(
                    &read(&text)?,
                    PLAIN,
                    usize::MAX,
                )?;
                let window = window.min(tokens.len());
                let sizes = Sizes::of(&checkpoint, model.compute.ranks())?;
                let mut session = Session::open(&checkpoint, model.compute.ranks(), window)?;
                let (nll, n_scored) = session.mean_nll(&tokens, window)?;
                print_line(&json!({
                    "perplexity": nll.exp(),
                    "mean_nll": nll,
                    "tokens": tokens.len(),
                    "scored": n_scored,
                    "window": window,
                    "weight_bytes": sizes.weights,
                    "kv_bytes_per_token": sizes.kv_per_token,
                }))
            }
            Self::Speed {
                model,
                prompt,
                output,
                sequences,
                runs,
            } => {
                let case = SpeedCase {
                    n_prompt: prompt,
                    n_output: output,
                    n_sequences: usize::from(sequences),
                };
                let checkpoint = model.checkpoint()?;
                let mut test = SpeedTest::open(&checkpoint, model.compute.ranks(), case)?;
                test.run()?;
                let runs = (0..runs)
                    .map(|_| test.run())
                    .collect::<Result<Vec<_>, _>>()?;
                print_line(&json!({
                    "prefill": rates(&runs, |run| run.prefill),
                    "decode": rates(&runs, |run| run.decode),
                    "output": rates(&runs, |run| run.output),
                }))
            }
            Self::Tokenize { model, text_file } => {
                let text_model = TextModel::from_checkpoint(&checkpoint(&model)?)?;
                print_line(&json!(text_model.encode_trusted(&read(&text_file)?)?))
            }
        }
    }
}

fn open(model: &ModelArgs, n_tokens: usize) -> Result<Session> {
    Session::open(&model.checkpoint()?, model.compute.ranks(), n_tokens)
        .with_context(|| format!("cannot evaluate `{}`", model.model.display()))
}

fn checkpoint(path: &Path) -> Result<Checkpoint> {
    Checkpoint::open(path).with_context(|| format!("cannot open model `{}`", path.display()))
}

/// All runs of one rate, and their median.
fn rates(runs: &[Speed], rate: impl Fn(&Speed) -> f64) -> serde_json::Value {
    let mut rates = runs.iter().map(rate).collect::<Vec<_>>();
    let runs = rates.clone();
    rates.sort_by(f64::total_cmp);
    json!({ "median": rates[rates.len() / 2], "runs": runs })
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read text `{}`", path.display()))
}

fn print_line(value: &serde_json::Value) -> Result<()> {
    writeln!(io::stdout(), "{value}").context("cannot write to standard output")
}
