//! The subcommands of `dsd`, one file each.

pub(crate) mod check_config;
pub(crate) mod dev;
pub(crate) mod eval;
pub(crate) mod pack;
pub(crate) mod rank;
pub(crate) mod serve;

use clap::ValueEnum;
use dsd::eval::Ranks;
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
    dtype::Format,
};

/// Arithmetic of block-quantized layers.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ActivationsArg {
    /// f32 products and sums.
    F32,
    /// int8 activations, integer products (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, int8 and int4 weights); over
    /// a bf16 KV cache, queries and softmax weights in bf16.
    Int8,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum KvTypeArg {
    /// As computed.
    F32,
    /// Half the bytes.
    Bf16,
    /// A quarter of the bytes, and a scale for every position and head.
    Int8,
}

/// What linear layers are rounded to when they are loaded.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum WeightsArg {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// FP8 e4m3 with a scale for every 128x128 tile.
    Fp8,
    /// int8 with a scale for every output.
    Int8,
    /// Four bits, with a scale and a zero for every 32 inputs.
    Int4,
}

impl WeightsArg {
    pub(crate) fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::Bf16 => Format::Bf16,
            Self::Fp8 => Format::F8E4m3,
            Self::Int8 => Format::Int8,
            Self::Int4 => Format::Int4,
        }
    }
}

/// Where tensors live.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum DeviceArg {
    /// Processor cores.
    Cpu,
}

/// How a command computes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ComputeArgs {
    /// Arithmetic of block-quantized layers.
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// How keys and values are stored.
    #[arg(long, value_enum, default_value = "f32")]
    kv_type: KvTypeArg,
    /// Device to run on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceArg,
    /// Instruction set of the kernels: amx, avx512, avx2, which compute the same bits, or portable,
    /// which does not [default: the first of them that this processor has].
    #[arg(long, value_name = "SET", value_parser = isa_named)]
    isa: Option<Isa>,
    /// Threads that compute at once, in each rank [default: the cores this process may use, dealt to
    /// the ranks].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Ranks that share the model (tensor parallelism), each a process.
    #[arg(long, default_value_t = 1, value_name = "N")]
    tp: usize,
}

impl ComputeArgs {
    pub(crate) fn ranks(&self) -> Ranks {
        Ranks {
            cpu: self.cpu(),
            n_ranks: self.tp,
        }
    }

    fn cpu(&self) -> CpuConfig {
        match self.device {
            DeviceArg::Cpu => {}
        }
        let activations = match self.activations {
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::Int8 => Activations::Int8,
        };
        let kv_type = match self.kv_type {
            KvTypeArg::F32 => KvType::F32,
            KvTypeArg::Bf16 => KvType::Bf16,
            KvTypeArg::Int8 => KvType::Int8,
        };
        let dealt = || (available_threads() / self.tp.max(1)).max(1);
        let n_threads = self.threads.map_or_else(dealt, usize::from);
        CpuConfig {
            n_threads,
            isa: self.isa.unwrap_or_else(|| Isa::available()[0]),
            activations,
            kv_type,
        }
    }
}

/// An instruction set of this processor by its name.
fn isa_named(name: &str) -> Result<Isa, String> {
    Isa::named(name).ok_or_else(|| {
        let names = Isa::available().into_iter().map(Isa::name);
        format!(
            "this processor has {}",
            names.collect::<Vec<_>>().join(", ")
        )
    })
}

/// Cores this process may use, by affinity and control group.
pub(crate) fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
