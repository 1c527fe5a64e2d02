#!/usr/bin/env python3
"""A node that is offered more than it can do, and one that loses parts of itself: goodput, first tokens, refusals, fairness, losses.

    tests/python/overload.py [--rounds 3] [--minutes 90] [WORD...]     measure all, or what has a WORD in its name; one line per figure
    tests/python/overload.py --quick [WORD...]                         the same in a few minutes, with figures that say less
    tests/python/overload.py --more WORD...                            measure these anew, of the same commit, and write the report with them
    tests/python/overload.py --report                                  write the report from the last results

Starts `dsd dev` by itself, with its default configuration and a fresh state folder. Every round runs every measurement once, so that a slow
spell of the machine falls on all alike; a figure is the median of its rounds, printed as `name value unit` on standard output. A full run, or
one with --more, writes docs/performance/overload.json, the pictures beside it and the section in docs/PERFORMANCE.md.
"""
import argparse
import asyncio
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import machine
import overload_bench
import overload_load
import overload_losses
import overload_report
import serving
from overload_bench import Bench, Served, say
from overload_report import RESULTS
from serving import Failed

MODEL = machine.ROOT / "target/test-data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
N_THREADS_OF_PEER = 2
# A measurement that takes longer has failed, whatever it waits for.
CASE_S_MAX = 900


def measurements(arguments):
    """Name to coroutine, in the order of a round."""
    found = overload_load.cases() | overload_losses.cases()
    if arguments.llama_server:
        found["llama-server load"] = overload_load.peer_load
    words = arguments.words + [word for words in arguments.only for word in words.split(",")]
    return {name: case for name, case in found.items() if not words or any(word in name for word in words)}


async def one_round(index, chosen, arguments, lengths, results, progress):
    """Every chosen measurement once; a failed one is told and left out."""
    bench = Bench(arguments, lengths, arguments.seed + index)
    bench.peer = Served("llama-server", lambda: serving.llama_server(arguments.llama_server, arguments.model, N_THREADS_OF_PEER))
    try:
        for name, case in chosen.items():
            left = progress.end - time.monotonic()
            if left <= 0:
                say(f"no time left for {name} of round {index + 1}")
                continue
            say(f"round {index + 1} of {lengths.rounds}: {name} ({progress.said()})")
            start = time.monotonic()
            try:
                async with asyncio.timeout(min(left, CASE_S_MAX)):
                    figures = await case(bench)
            except Exception as failure:
                # Whatever it is, it must not cost the figures of an hour.
                if not isinstance(failure, (Failed, OSError, TimeoutError)):
                    traceback.print_exc()
                say(f"  FAILED: {type(failure).__name__} {failure}")
                results["failures"].append(f"{name}: {type(failure).__name__} {failure}"[:300])
                bench.served.stop()
                bench.peer.stop()
                continue
            finally:
                progress.took(name, time.monotonic() - start)
            for figure, (value, unit) in figures.items():
                if value is None:
                    continue
                entry = results["figures"].setdefault(figure, {"unit": unit, "values": []})
                entry["values"].append(value)
    finally:
        bench.close()
        bench.peer.stop()


class Progress:
    """How long the rest takes, by what measurements took so far."""

    def __init__(self, names, rounds, minutes):
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        self.n_left, self.seconds = len(names) * rounds, {}
        self.names = names

    def took(self, name, seconds):
        self.n_left -= 1
        self.seconds.setdefault(name, []).append(seconds)

    def said(self):
        if not self.seconds:
            return f"at most {(self.end - self.start) / 60:.0f} minutes in all"
        done = [s for each in self.seconds.values() for s in each]
        rest = min(statistics.mean(done) * self.n_left, self.end - time.monotonic())
        return f"about {rest / 60:.0f} minutes left"


def measure(arguments, lengths):
    """The results; those of an interrupted run are what was measured."""
    results = {"commit": machine.commit(), "machine": machine.describe(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "is_quick": arguments.quick,
               "step_target_ms": arguments.step_target_ms, "baseline": bool(arguments.baseline), "n_rounds": lengths.rounds, "figures": {}, "failures": []}
    chosen = measurements(arguments)
    results["measured"] = list(chosen)
    if not chosen:
        raise SystemExit("no measurement has one of these words in its name: " + ", ".join(measurements(argparse.Namespace(**vars(arguments) | {"words": [], "only": []}))))
    progress = Progress(list(chosen), lengths.rounds, arguments.minutes or lengths.minutes)
    try:
        for index in range(lengths.rounds):
            asyncio.run(one_round(index, chosen, arguments, lengths, results, progress))
    finally:
        for name, figure in results["figures"].items():
            print(f"{name} {statistics.median(figure['values']):.6g} {figure['unit']}", flush=True)
    return results


def added(last, results):
    """The last results with figures, and failures, of these in their place."""
    measured = {failure.partition(":")[0] for failure in results["failures"]}
    failures = [f for f in last["failures"] if f.partition(":")[0] not in measured | set(results["measured"])]
    return last | {"figures": last["figures"] | results["figures"], "failures": failures + results["failures"]}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="measurements whose name holds one of these")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="the same, words separated by commas")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, help="time for all; what is not measured then is left out")
    parser.add_argument("--quick", action="store_true", help="one short round, without a report")
    parser.add_argument("--more", action="store_true", help="figures of this run take the place of those in the last results, of the same commit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dsd", type=Path, default=serving.DSD, metavar="PATH", help="the program that is measured")
    parser.add_argument("--baseline", type=Path, metavar="PATH", help="another dsd, whose throughput is measured in turn with ours")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server, as `make bench-peers` builds it, under the same load")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--step-target-ms", type=float, default=100, help="engine.step_target_ms that bars are multiples of")
    parser.add_argument("--body-budget-mb", type=float, default=268.435456, help="http.body_budget_bytes, in 10^6 bytes")
    parser.add_argument("--report", action="store_true", help="only write the report from the last results")
    parser.add_argument("--no-report", action="store_true", help="measure only")
    return parser.parse_args()


def main():
    arguments = parse()
    serving.end_in_order()
    if arguments.report:
        overload_report.write(json.loads(RESULTS.read_text()))
        return 0
    for path in filter(None, (arguments.dsd, arguments.model, arguments.baseline, arguments.llama_server)):
        if not path.exists():
            raise SystemExit(f"{path} is missing")
    if arguments.more and (arguments.quick or json.loads(RESULTS.read_text())["commit"] != machine.commit()):
        raise SystemExit("figures of another commit, or of a quick run, do not stand beside the last ones")
    lengths = overload_bench.lengths(arguments.quick, arguments.rounds)
    results = measure(arguments, lengths)
    is_whole = not (arguments.quick or arguments.words or arguments.only)
    if arguments.more:
        results = added(json.loads(RESULTS.read_text()), results)
    if (is_whole or arguments.more) and not arguments.no_report:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        overload_report.write(results)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
