# The two commands of the README, and their parts.
.PHONY: demo test test-setup lint build release bench

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

# Kernels beside the ceilings of this machine. BENCH_ARGS: words of cases, --threads N, --json.
BENCH_ARGS ?=

bench:
	cargo bench --locked -p dsd-kernels --bench kernels -- $(BENCH_ARGS)
