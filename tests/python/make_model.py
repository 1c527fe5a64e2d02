#!/usr/bin/env python3
"""Write a GGUF file in BF16 with random weights, in the shape of a published architecture.

    tests/python/make_model.py v3    --vocabulary FILE.gguf OUT.gguf
    tests/python/make_model.py llama --vocabulary FILE.gguf OUT.gguf

Needs the packages numpy and gguf. Speed and memory traffic of such a model are those of its shape; its text means nothing. Weights are
normal with deviation 0.02, so that a router spreads tokens over all experts. Tokens and chat template are copied from another GGUF file.
"""
import argparse
import dataclasses
from pathlib import Path

import gguf
import numpy as np

DEVIATION = 0.02
# Elements drawn at a time: bounds the memory, a layer's experts are 34 million.
DRAW_MAX = 1 << 23


@dataclasses.dataclass(frozen=True)
class V3:
    """DeepSeek-V3 in small: MLA, one dense layer, then experts in groups behind a sigmoid router."""
    arch = "deepseek2"
    hidden: int = 1024
    layers: int = 16
    dense_layers: int = 1
    heads: int = 8
    ffn: int = 2816
    experts: int = 64
    top_k: int = 6
    expert_ffn: int = 512
    shared: int = 2
    groups: int = 8
    top_groups: int = 4
    q_lora: int = 384
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128

    def keys(self, writer):
        writer.add_head_count_kv(1)
        writer.add_leading_dense_block_count(self.dense_layers)
        writer.add_q_lora_rank(self.q_lora)
        writer.add_kv_lora_rank(self.kv_lora)
        writer.add_key_length(self.kv_lora + self.rope)
        writer.add_value_length(self.kv_lora)
        writer.add_key_length_mla(self.nope + self.rope)
        writer.add_value_length_mla(self.value)
        writer.add_rope_dimension_count(self.rope)
        writer.add_expert_feed_forward_length(self.expert_ffn)
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(self.top_k)
        writer.add_expert_shared_count(self.shared)
        writer.add_expert_group_count(self.groups)
        writer.add_expert_group_used_count(self.top_groups)
        writer.add_expert_weights_scale(2.5)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)

    def layer(self, index):
        h = self.hidden
        yield "attn_q_a.weight", (self.q_lora, h)
        yield "attn_q_a_norm.weight", (self.q_lora,)
        yield "attn_q_b.weight", (self.heads * (self.nope + self.rope), self.q_lora)
        yield "attn_kv_a_mqa.weight", (self.kv_lora + self.rope, h)
        yield "attn_kv_a_norm.weight", (self.kv_lora,)
        yield "attn_k_b.weight", (self.heads, self.kv_lora, self.nope)
        yield "attn_v_b.weight", (self.heads, self.value, self.kv_lora)
        yield "attn_output.weight", (h, self.heads * self.value)
        if index < self.dense_layers:
            yield from mlp("", h, self.ffn)
            return
        yield "ffn_gate_inp.weight", (self.experts, h)
        yield "exp_probs_b.bias", (self.experts,)
        yield "ffn_gate_exps.weight", (self.experts, self.expert_ffn, h)
        yield "ffn_up_exps.weight", (self.experts, self.expert_ffn, h)
        yield "ffn_down_exps.weight", (self.experts, h, self.expert_ffn)
        yield from mlp("_shexp", h, self.shared * self.expert_ffn)


@dataclasses.dataclass(frozen=True)
class Llama:
    """A dense model whose heads split over 2, 4 and 8 ranks."""
    arch = "llama"
    hidden: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    ffn: int = 5632

    def keys(self, writer):
        writer.add_head_count_kv(self.kv_heads)
        writer.add_rope_dimension_count(self.hidden // self.heads)

    def layer(self, _index):
        h, kv = self.hidden, self.kv_heads * self.hidden // self.heads
        yield "attn_q.weight", (h, h)
        yield "attn_k.weight", (kv, h)
        yield "attn_v.weight", (kv, h)
        yield "attn_output.weight", (h, h)
        yield from mlp("", h, self.ffn)


def mlp(suffix, hidden, ffn):
    yield f"ffn_gate{suffix}.weight", (ffn, hidden)
    yield f"ffn_up{suffix}.weight", (ffn, hidden)
    yield f"ffn_down{suffix}.weight", (hidden, ffn)


def tensors(shape, n_tokens):
    """(name, dimensions), slowest dimension first, in the order of the file."""
    yield "token_embd.weight", (n_tokens, shape.hidden)
    for index in range(shape.layers):
        yield f"blk.{index}.attn_norm.weight", (shape.hidden,)
        yield f"blk.{index}.ffn_norm.weight", (shape.hidden,)
        for name, dimensions in shape.layer(index):
            yield f"blk.{index}.{name}", dimensions
    yield "output_norm.weight", (shape.hidden,)
    yield "output.weight", (n_tokens, shape.hidden)


def is_f32(name, dimensions):
    """Programs that read GGUF want vectors and routers in F32."""
    return len(dimensions) == 1 or name.endswith("ffn_gate_inp.weight")


def values(name, dimensions, random):
    """The tensor's numbers, in pieces."""
    n = int(np.prod(dimensions))
    if len(dimensions) == 1:
        yield np.full(n, 0.0 if name.endswith(".bias") else 1.0, np.float32)
        return
    for at in range(0, n, DRAW_MAX):
        drawn = random.standard_normal(min(DRAW_MAX, n - at), np.float32) * np.float32(DEVIATION)
        # The upper half of an f32 is a bf16, rounded towards zero.
        yield drawn if is_f32(name, dimensions) else (drawn.view(np.uint32) >> 16).astype(np.uint16)


def copy_vocabulary(reader, writer):
    """Copies tokens, merges, ids and template; how many tokens there are."""
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=item)
    return len(reader.get_field("tokenizer.ggml.tokens").contents())


def write(out, shape, vocabulary, seed=1, context=8192):
    """Writes `out`; a half-written file never has that name."""
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, shape.arch)
    writer.add_name(f"random {shape.arch}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    shape.keys(writer)
    n_tokens = copy_vocabulary(gguf.GGUFReader(vocabulary), writer)
    writer.add_vocab_size(n_tokens)
    plan = list(tensors(shape, n_tokens))
    for name, dimensions in plan:
        kind = gguf.GGMLQuantizationType.F32 if is_f32(name, dimensions) else gguf.GGMLQuantizationType.BF16
        n_bytes = int(np.prod(dimensions)) * (4 if is_f32(name, dimensions) else 2)
        dtype = np.dtype(np.float32 if is_f32(name, dimensions) else np.uint16)
        writer.add_tensor_info(name, dimensions, dtype, n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    random = np.random.default_rng(seed)
    with open(part, "ab") as file:
        for name, dimensions in plan:
            file.write(b"\0" * (-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            for piece in values(name, dimensions, random):
                piece.tofile(file)
        file.write(b"\0" * (-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
    part.rename(out)
    return sum(int(np.prod(dimensions)) for _, dimensions in plan)


SHAPES = {"v3": V3(), "llama": Llama()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    n = write(arguments.out, SHAPES[arguments.shape], arguments.vocabulary, arguments.seed)
    print(f"{n / 1e9:.3f} billion parameters in {arguments.out}")


if __name__ == "__main__":
    main()
