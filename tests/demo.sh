#!/usr/bin/env bash
# `make demo`: fetch a model, start a node, ask it something, and leave it running.
set -euo pipefail
cd "$(dirname "$0")/.."
state=${STATE:?}
mkdir -p "$state/models"

model="$state/models/SmolLM2-135M-Instruct.Q4_1.gguf"
if ! python3 tests/setup.py smollm2 --store "$state/models"; then
    echo "SmolLM2 cannot be fetched from here: using the tiny DeepSeek-V3 checkpoint of this tree." >&2
    echo "Its weights are random, so its answers mean nothing." >&2
    python3 tests/setup.py checkpoints
    model=target/test-data/reference/deepseek_v3
fi

log="$state/dsd.log"
target/release/dsd dev --model "$model" --state "$state" "$@" >"$state/ready" 2>"$log" &
node=$!
trap 'kill "$node" 2>/dev/null || true; wait "$node" || true' EXIT
trap 'exit 0' INT TERM
until grep -q 'is ready on' "$state/ready"; do
    if ! kill -0 "$node" 2>/dev/null; then
        cat "$log" >&2
        exit 1
    fi
    sleep 0.1
done

quic=$(sed -n 's/.*dsctl --node \([^ ]*\).* status/\1/p' "$state/ready")
question='What is the capital of France? Answer in one sentence.'
printf '> %s\n' "$question"
target/release/dsctl --node "$quic" --state "$state" generate --chat --temperature 0 --max-tokens 64 "$question"
printf '\n\n'
sed "s|  dsctl |  target/release/dsctl |" "$state/ready"
echo "log: $log"
wait "$node"
