# The two commands of the README, and their parts.
.PHONY: demo test test-setup lint build release quant-table bench bench-peers bench-overload soak

STATE ?= $(CURDIR)/target/demo
DEMO_ARGS ?=

demo: release
	@STATE='$(STATE)' tests/demo.sh $(DEMO_ARGS)

release:
	cargo build --release --locked -p dsd -p dsctl

build:
	cargo build --locked --workspace

test-setup:
	python3 tests/setup.py checkpoints smollm2 tokenizers openai anthropic clients

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

test: test-setup lint build
	cargo test --locked --workspace

# Formats of weights and KV cache on one real model, into docs/QUANTIZATION.md. QUANT_ARGS: --rounds N, --llama-quantize PROGRAM.
QUANT_ARGS ?=

quant-table: release test-setup
	python3 tests/python/quantization_table.py $(QUANT_ARGS)

# Kernels beside the ceilings of this machine. BENCH_ARGS: words of cases, --threads N, --json.
BENCH_ARGS ?=

bench:
	cargo bench --locked -p dsd-kernels --bench kernels -- $(BENCH_ARGS)

# Beside llama.cpp and OpenVINO GenAI, which are fetched from PyPI and built on the first run; writes docs/PERFORMANCE.md.
# PEERS_DIR: where they are kept. PEERS_ARGS: words of measurements, --rounds N, --minutes N, --report.
PEERS_ARGS ?=

bench-peers: release
	python3 tests/python/bench_peers.py $(PEERS_ARGS)

# More load than a node can do, and losses; writes docs/PERFORMANCE.md, but not with --quick or words of measurements. OVERLOAD_ARGS: words of
# measurements, --quick, --rounds N, --minutes N, --baseline PROGRAM, --llama-server PROGRAM, --report.
OVERLOAD_ARGS ?=

bench-overload: release
	python3 tests/setup.py smollm2
	python3 tests/python/overload.py $(OVERLOAD_ARGS)

# Mixed load with cancels; memory and blocks must stay flat.
SOAK_MINUTES ?= 10

soak: release
	python3 tests/python/soak.py --minutes $(SOAK_MINUTES)
