#!/usr/bin/env python3
"""Formats of weights and of the KV cache on one real model: size, perplexity and tokens per second, into docs/QUANTIZATION.md.

    tests/python/quantization_table.py [--model FILE] [--rounds 3] [--llama-quantize PROGRAM] [--print]

The model is SmolLM2-135M-Instruct (tests/setup.py), whose published file is Q4_1: other rows are its numbers rounded once more, by `dsd eval
--weights` or by llama-quantize. The text is the language reference that comes with Python (pydoc_data), its first characters. Speeds
are taken in rounds over all rows, and the median counts.
"""
import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pydoc_data import topics

ROOT = Path(__file__).resolve().parent.parent.parent
DSD = ROOT / "target/release/dsd"
MODEL = ROOT / "target/test-data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENT = ROOT / "docs/QUANTIZATION.md"
KEPT = ROOT / "target/quantization-table.json"
# About 8,500 tokens.
TEXT_CHARACTERS = 36_000
SPEED = ["--prompt", "512", "--output", "64", "--runs", "3"]
LONG = ["--prompt", "1920", "--output", "64", "--runs", "1"]
MARKS = ("<!-- made by tests/python/quantization_table.py -->", "<!-- end -->")


class Results:
    """What `dsd eval` printed, kept in a file: a run that was interrupted goes on where it was, as long as the program is the same."""

    def __init__(self):
        program = hashlib.sha256(DSD.read_bytes()).hexdigest()
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        self.kept = kept if kept.get("program") == program else {"program": program, "commit": commit()}

    def dsd(self, command, model, *more, times=0):
        """The JSON line of one `dsd eval`, of run number `times`."""
        key = " ".join([command, Path(model).name, *(word for word in more if "/" not in word), str(times)])
        if key not in self.kept:
            ran = subprocess.run([DSD, "eval", command, "--model", model, *more], capture_output=True, text=True, timeout=900, check=False)
            if ran.returncode != 0:
                raise SystemExit(f"dsd eval {command} {' '.join(more)} ended with {ran.returncode}: {ran.stderr[-1000:]}")
            self.kept[key] = json.loads(ran.stdout.strip().splitlines()[-1])
            KEPT.write_text(json.dumps(self.kept))
            print(key, file=sys.stderr)
        return self.kept[key]


def weight_rows(model, quantize, folder):
    """Name, file, arguments and activations of every row."""
    both, exact = ("f32", "int8"), ("f32",)
    rows = [("Q4_1, the published file", model, (), both)]
    for name, weights, activations in [("f32", "f32", exact), ("bf16", "bf16", exact), ("FP8, 128x128 tiles", "fp8", exact),
                                       ("INT8 per output", "int8", both), ("INT4, groups of 32", "int4", both)]:
        rows.append((f"{name} (`--weights {weights}`)", model, ("--weights", weights), activations))
    for kind in ("Q8_0", "Q4_0") if quantize else ():
        file = Path(folder) / f"{kind}.gguf"
        command = [quantize, "--allow-requantize", model, file, kind]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise SystemExit(f"{quantize} made no {kind}")
        rows.append((f"{kind} (llama-quantize)", file, (), ("int8",)))
    return rows


def machine():
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} threads"


def commit():
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "daemon")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def percent(value, base):
    return f"{100 * (value / base - 1):+.2f} %"


def measure(arguments):
    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))[:TEXT_CHARACTERS]
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    results = Results()
    dsd = results.dsd
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text)
        runs = [(name, model, more, ("--activations", activations)) for name, model, more, all_activations
                in weight_rows(arguments.model, arguments.llama_quantize, folder) for activations in all_activations]
        found = [dsd("perplexity", model, *more, *act, "--text", str(file)) for _, model, more, act in runs]
        caches = [("--activations", "int8", "--kv-type", kv_type) for kv_type in ("f32", "bf16", "int8")]
        # The first is the published file with int8 activations.
        of_caches = [found[1], *(dsd("perplexity", arguments.model, *cache, "--text", str(file)) for cache in caches[1:])]
        speeds, cache_speeds = [[] for _ in runs], [[] for _ in caches]
        for index in range(arguments.rounds):
            for speed, (_, model, more, act) in zip(speeds, runs):
                speed.append(dsd("speed", model, *more, *act, *SPEED, times=index))
            for speed, cache in zip(cache_speeds, caches):
                speed.append(dsd("speed", arguments.model, *cache, *LONG, times=index))

    def rates(speed):
        """Cells of prefill and decode; none without rounds."""
        return [f"{statistics.median(run[what]['median'] for run in speed):,.0f}" for what in ("prefill", "decode") if speed]

    def row(*cells):
        return f"| {' | '.join(cells)} |"

    def table(*heads):
        return ["", row(*heads), "|" + "---|" * len(heads)]

    base = found[0]["perplexity"]
    speed_heads = ["prefill 512, tokens/s", "decode 64 behind 512, tokens/s"] if arguments.rounds else []
    long_heads = ["prefill 1,920, tokens/s", "decode 64 behind 1,920, tokens/s"] if arguments.rounds else []
    lines = [
        MARKS[0], "",
        f"Commit {results.kept['commit']}; {machine()}; {found[0]['scored']:,} tokens scored in windows of {found[0]['window']} of the first {TEXT_CHARACTERS:,} characters of Python "
        f"{platform.python_version()}'s `pydoc_data.topics` (sha256 {digest}..)" + (f"; speeds are medians of {arguments.rounds} rounds over all rows." if arguments.rounds else ". No speeds were taken."),
        *table("weights of linear layers", "activations", "weights, MB", "perplexity", "against the file in f32", *speed_heads),
    ]
    for (name, _, _, act), result, speed in zip(runs, found, speeds):
        value = result["perplexity"]
        lines.append(row(name, act[1], f"{result['weight_bytes'] / 1e6:.1f}", f"{value:.3f}", percent(value, base), *rates(speed)))
    lines += table("KV cache of the published file, int8 activations", "bytes a token", "perplexity", "against f32", *long_heads)
    for cache, result, speed in zip(caches, of_caches, cache_speeds):
        value = result["perplexity"]
        lines.append(row(cache[3], f"{result['kv_bytes_per_token']:,}", f"{value:.3f}", percent(value, of_caches[0]["perplexity"]), *rates(speed)))
    return "\n".join([*lines, "", MARKS[1]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="GGUF file to start from")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of speeds; 0 leaves them out")
    parser.add_argument("--llama-quantize", metavar="PROGRAM", help="adds rows of files that it makes")
    parser.add_argument("--print", action="store_true", help="to standard output, and leave the document alone")
    arguments = parser.parse_args()
    for needed in (DSD, Path(arguments.model)):
        if not needed.exists():
            raise SystemExit(f"{needed} is missing: make release test-setup")
    table = measure(arguments)
    if arguments.print:
        print(table)
        return 0
    document = DOCUMENT.read_text()
    before, rest = document.split(MARKS[0], 1)
    DOCUMENT.write_text(before + table + rest.split(MARKS[1], 1)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
