//! `dsd dev`: a node for one person, without a configuration file.

use std::{
    env,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use dsd::{
    catalog::{Catalog, store},
    config::{Activations, Config, KvType, ModelConfig},
    node::{Node, NodeAddresses, models_dir},
    telemetry,
};

use super::{ActivationsArg, KvTypeArg, serve::warn_of_variables};

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Checkpoint folder, GGUF file or pack [default: the only model in the state folder's `models`].
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Address of the OpenAI API.
    #[arg(long, default_value = "127.0.0.1:8000")]
    http: SocketAddr,
    /// Address for dsctl.
    #[arg(long, default_value = "127.0.0.1:7600")]
    quic: SocketAddr,
    /// Folder for certificates and models [default: $XDG_STATE_HOME/dsd, or ~/.local/state/dsd].
    #[arg(long, env = "DSD_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
    /// Ranks that share the model (tensor parallelism), each a process.
    #[arg(long, default_value_t = 1, value_name = "N")]
    tp: usize,
    /// Arithmetic of block-quantized layers.
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// How keys and values are stored.
    #[arg(long, value_enum, default_value = "f32")]
    kv_type: KvTypeArg,
    /// Seconds within which the first token of a request is to come [default: 2].
    #[arg(long, value_name = "SECONDS")]
    ttft_target: Option<f64>,
}

impl Dev {
    pub(crate) fn run(self) -> Result<()> {
        let state = match self.state {
            Some(state) => state,
            None => default_state()?,
        };
        let mut config = Config::dev(state, Vec::new())?;
        config.http.listen = self.http;
        config.quic.listen = self.quic;
        config.engine.activations = match self.activations {
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::Int8 => Activations::Int8,
        };
        config.engine.kv_type = match self.kv_type {
            KvTypeArg::F32 => KvType::F32,
            KvTypeArg::Bf16 => KvType::Bf16,
            KvTypeArg::Int8 => KvType::Int8,
        };
        config.engine.tp = self.tp;
        if let Some(seconds) = self.ttft_target {
            let seconds = seconds.to_string();
            config.set_from_flag("--ttft-target", "service", "ttft_target_s", &seconds)?;
        }
        config.apply_env(env::vars())?;
        telemetry::install_logs(&config.log)?;
        warn_of_variables();
        let path = match self.model {
            Some(path) => path,
            None => only_model(&models_dir(&config))?,
        };
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot open model `{}`", path.display()))?;
        let name = store::name_of(&path)
            .with_context(|| format!("`{}` has no name to serve it under", path.display()))?;
        config.models.push(ModelConfig::new(name.clone(), path));
        let state = config.node.state_dir.clone();
        let node = Node::bind(config, None)?;
        let addresses = node.addresses();
        node.run(|_: &Catalog| {
            // A closed standard output must not end the node.
            let _ = io::stdout().write_all(banner(&name, addresses, &state).as_bytes());
        })?;
        Ok(())
    }
}

/// What to do next, ready to be copied.
fn banner(model: &str, addresses: NodeAddresses, state: &Path) -> String {
    let NodeAddresses { http, quic } = addresses;
    let state = state.display();
    format!(
        "\
{model} is ready on http://{http}/v1

  curl -N http://{http}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello!\"}}]}}'
  dsctl --node {quic} --state {state} status
  dsctl --node {quic} --state {state} chat

stop with Ctrl-C
"
    )
}

/// The model store's single entry.
fn only_model(folder: &Path) -> Result<PathBuf> {
    let mut stored = store::scan(folder)
        .with_context(|| format!("cannot read the model store `{}`", folder.display()))?;
    match (stored.pop(), stored.len()) {
        (Some(model), 0) => Ok(model.path),
        (None, _) => bail!(
            "there is no model in `{}`; put a checkpoint folder or GGUF file there, or give --model PATH",
            folder.display()
        ),
        (Some(_), n) => bail!(
            "there are {} models in `{}`; choose one with --model PATH",
            n + 1,
            folder.display()
        ),
    }
}

fn default_state() -> Result<PathBuf> {
    let non_empty = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    match (non_empty("XDG_STATE_HOME"), non_empty("HOME")) {
        (Some(state), _) => Ok(state.join("dsd")),
        (None, Some(home)) => Ok(home.join(".local/state/dsd")),
        (None, None) => bail!("neither XDG_STATE_HOME nor HOME is set; give --state DIR"),
    }
}
