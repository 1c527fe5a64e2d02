# The two commands of the README, and their parts.
.PHONY: demo test test-setup lint build release quant-table

STATE ?= $(CURDIR)/target/demo
DEMO_ARGS ?=

demo: release
	@STATE='$(STATE)' tests/demo.sh $(DEMO_ARGS)

release:
	cargo build --release --locked -p dsd -p dsctl

build:
	cargo build --locked --workspace

test-setup:
	python3 tests/setup.py checkpoints smollm2 tokenizers openai

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

test: test-setup lint build
	cargo test --locked --workspace

# Formats of weights and KV cache on one real model, into docs/QUANTIZATION.md. QUANT_ARGS: --rounds N, --llama-quantize PROGRAM.
QUANT_ARGS ?=

quant-table: release test-setup
	python3 tests/python/quantization_table.py $(QUANT_ARGS)
