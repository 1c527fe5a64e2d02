#!/usr/bin/env python3
"""dsd beside the programs people use today: the same models and load, one after the other in rounds, on a quiet machine.

    tests/python/bench_peers.py [--rounds 5] [--minutes 40] [WORD...]    measure, then write the report
    tests/python/bench_peers.py --report                                 write the report from the last results

Every round runs every measurement once, so that a slow spell of the machine falls on all alike. A run counts where other programs took less
than 0.15 cores meanwhile; rounds go on until each measurement has `--rounds` of them or the time is over. WORDs choose measurements by
name. Writes docs/performance/peers.json, the pictures beside it and the table in docs/PERFORMANCE.md.
"""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import peers
import peers_report
import serving
from machine import ROOT
from serving import DSD, Failed

RESULTS = ROOT / "docs/performance/peers.json"
# Where the benchmarks of kernels lie once they are built.
KERNELS = ["cargo", "bench", "--locked", "-q", "-p", "dsd-kernels", "--bench", "kernels", "--"]
# Keys and values as llama.cpp keeps them by default, in two bytes.
KV_TYPE = ("--kv-type", "bf16")
# Cores that others may take in a run that counts.
OTHERS_MAX = 0.15
PROGRAM_S_MAX = 300
# With a build from nothing.
KERNELS_S_MAX = 1200
# Clients of the loads over HTTP, and requests of each load.
CLIENTS = {1: 6, 2: 8, 4: 12, 8: 24, 16: 48, 32: 64}
# Rounds that load servers with all numbers of clients; later ones only with the one that has a bar.
CURVE_ROUNDS = 1
CLIENTS_OF_BAR = 16

MODELS = {
    "smollm2": {"file": "smollm2-q4_0", "prompt": 512, "output": 64, "many": (64, 32)},
    "v3": {"file": "dsv3-q4_0", "prompt": 256, "output": 32, "many": (32, 16)},
}
STREAMS = 16


def checked(ran, what):
    if ran.status != 0:
        raise Failed(f"{what} ended with {ran.status}: {ran.out[-300:]}{ran.err[-700:]}")
    return ran


def dsd_speed(file, n_prompt, n_output, *more, threads=2, sequences=1, runs=3):
    """One process of `dsd eval speed`."""
    ran = checked(machine.run([DSD, "eval", "speed", "--model", file, "--activations", "int8", *KV_TYPE, "--threads", threads, "--prompt", n_prompt,
                               "--output", n_output, "--sequences", sequences, "--runs", runs, *more], PROGRAM_S_MAX), "dsd eval speed")
    rates = json.loads(ran.out.strip().splitlines()[-1])
    return {name: rates[name]["median"] for name in ("prefill", "decode", "output")}, ran


def llama_bench(file, n_prompt, n_output, threads=2, build="build"):
    """One process of llama-bench: prompt and generation, each from an empty context."""
    ran = checked(machine.run([peers.tool("llama-bench", build), "-m", file, "-o", "jsonl", "-t", threads, "-p", n_prompt, "-n", n_output, "-r", 3],
                              PROGRAM_S_MAX), "llama-bench")
    found = {}
    for line in ran.out.splitlines():
        if line.startswith("{"):
            test = json.loads(line)
            found["prefill" if test["n_prompt"] else "decode"] = statistics.median(test["samples_ts"])
    return found, ran


def offline_dsd(model):
    shape, file = MODELS[model], peers.model(MODELS[model]["file"])
    decode, first = dsd_speed(file, 1, shape["output"] + 1)
    prefill, second = dsd_speed(file, shape["prompt"], 1)
    many, third = dsd_speed(file, *shape["many"], sequences=STREAMS, runs=2)
    found = {"decode": decode["decode"], "prefill": prefill["prefill"], "many_decode": many["decode"], "many_output": many["output"]}
    return found, max(ran.others for ran in (first, second, third))


def offline_llama(model, build="build"):
    shape, file = MODELS[model], peers.model(MODELS[model]["file"])
    found, first = llama_bench(file, shape["prompt"], shape["output"], build=build)
    n_prompt, n_output = shape["many"]
    second = checked(machine.run([peers.tool("llama-batched-bench", build), "-m", file, "-t", 2, "-tb", 2, "-c", (n_prompt + n_output) * STREAMS + 256,
                                  "-b", 2048, "-ub", 512, "-npp", n_prompt, "-ntg", n_output, "-npl", STREAMS, "--output-format", "jsonl"],
                                 PROGRAM_S_MAX), "llama-batched-bench")
    for line in second.out.splitlines():
        if line.startswith("{"):
            test = json.loads(line)
            found |= {"many_decode": test["speed_tg"], "many_output": STREAMS * n_output / (test["t_pp"] + test["t_tg"])}
    return found, max(first.others, second.others)


def offline_openvino(model):
    n_prompt, n_output = MODELS[model]["many"]
    ran = checked(machine.run([peers.python(), ROOT / "tests/python/openvino_peer.py", peers.model(MODELS[model]["file"]), "--threads", 2,
                               "--sequences", STREAMS, "--prompt", n_prompt, "--output", n_output], PROGRAM_S_MAX), "openvino")
    found = json.loads(ran.out.strip().splitlines()[-1])
    return {"decode": found["decode"], "many_output": found["output"], "load_s": found["load_s"], "rss_mib": found["rss_mib"]}, ran.others


def over_http(server, round_index):
    """Loads of every number of clients; later rounds only of the one that has a bar."""
    others, found = 0.0, {}
    with server as running:
        found["ready_s"] = running.ready_s
        # What only the first request pays is not what is measured.
        running.load(1, 1, seed=99)
        for clients, requests in CLIENTS.items():
            if CURVE_ROUNDS <= round_index and clients != CLIENTS_OF_BAR:
                continue
            report = running.load(clients, requests, 64, 32, 1000 * round_index + clients)
            if report["n_failed"]:
                raise Failed(f"{report['n_failed']} requests failed: {report['errors']}")
            others = max(others, report["others"])
            found |= {f"output_{clients}": report["output_tokens_per_s"], f"ttft_p50_{clients}": report["ttft_ms"]["p50"],
                      f"ttft_p95_{clients}": report["ttft_ms"]["p95"], f"itl_p50_{clients}": report["itl_ms"]["p50"],
                      f"e2e_p95_{clients}": report["e2e_ms"]["p95"]}
        found["pss_mib"] = machine.pss_mib(running.pid)
    return found, others


def http_dsd(model, round_index):
    return over_http(serving.dsd(peers.model(MODELS[model]["file"]), *KV_TYPE), round_index)


def http_llama(model, round_index, build="build"):
    return over_http(serving.llama_server(peers.tool("llama-server", build), peers.model(MODELS[model]["file"]), 2), round_index)


def steady_reading():
    """What memory gives to one thread and to two that only read, over a second each."""
    found, others = {}, 0.0
    for threads in (1, 2):
        ran = checked(machine.run([*KERNELS, "--steady", "--threads", threads], KERNELS_S_MAX), "cargo bench")
        others = max(others, ran.others)
        for read in json.loads(ran.out.strip().splitlines()[-1])["read"]:
            found[f"read_{threads}_{read['bytes'] >> 20}"] = read["gb_s"]
    return found, others


def ranks(name):
    """Decoding of two ranks with a thread each, and of one rank with two threads, beside one rank with one thread."""
    file = peers.model(name)
    one, first = dsd_speed(file, 16, 33, threads=1)
    two, second = dsd_speed(file, 16, 33, "--tp", 2, threads=1)
    threads, third = dsd_speed(file, 16, 33, threads=2)
    found = {"one": one["decode"], "two": two["decode"], "ratio": two["decode"] / one["decode"],
             "prefill_ratio": two["prefill"] / one["prefill"], "threads_ratio": threads["decode"] / one["decode"]}
    return found, max(first.others, second.others, third.others)


class BusyLoop:
    """Another program that takes one core."""

    def __enter__(self):
        core = max(os.sched_getaffinity(0))
        self.process = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
        time.sleep(0.3)
        self.start, self.cpu = time.monotonic(), machine.cpu_of(self.process.pid)
        return self

    def cores(self):
        """What the loop took since it runs."""
        return (machine.cpu_of(self.process.pid) - self.cpu) / (time.monotonic() - self.start)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def shared_core_dsd():
    file = peers.model("smollm2-q4_0")
    alone, first = dsd_speed(file, 1, 33)
    with BusyLoop() as loop:
        beside, second = dsd_speed(file, 1, 33)
        others = second.others - loop.cores()
    return {"alone": alone["decode"], "beside": beside["decode"], "fall": alone["decode"] / beside["decode"]}, max(first.others, others)


def shared_core_llama():
    file = peers.model("smollm2-q4_0")
    alone, first = llama_bench(file, 0, 16)
    with BusyLoop() as loop:
        beside, second = llama_bench(file, 0, 16)
        others = second.others - loop.cores()
    return {"alone": alone["decode"], "beside": beside["decode"], "fall": alone["decode"] / beside["decode"]}, max(first.others, others)


def read_bytes(pids):
    """Bytes that each process had fetched from disks."""
    return {pid: machine.field_sum([pid], "io", "read_bytes") for pid in pids}


def pack():
    """From a SmolLM2 pack in page cache to READY, memory then, and from a killed rank to READY again."""
    with tempfile.TemporaryDirectory(prefix="dsd-pack-") as folder:
        packed = Path(folder) / "smollm2"
        checked(machine.run([DSD, "pack", "--model", peers.model("smollm2-q4_0"), "--out", packed], PROGRAM_S_MAX), "dsd pack")
        found = {"pack_mib": sum(f.stat().st_size for f in packed.rglob("*") if f.is_file()) / (1 << 20)}
        others = machine.Others()
        with serving.dsd(packed, *KV_TYPE) as running:
            found |= {"ready_s": running.ready_s, "pss_mib": machine.pss_mib(running.pid)}
            found["kv_plan_mib"] = kv_plan_mib(running)
            # The way up takes less than the grain of the processors' clocks: others are counted over a second more.
            time.sleep(1)
            own = machine.cpu_of(running.pid)
        return found, others.cores(own)


def kv_plan_mib(running):
    """The KV cache of the memory plans of all ranks, as the log has it."""
    units = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}
    found = re.findall(r"kv cache +([0-9.]+) (KiB|MiB|GiB)", running.whole_log())
    if not found:
        raise Failed(f"no memory plan in the log: {running.last_words()}")
    return sum(float(size) * units[unit] for size, unit in found)


def killed_rank():
    """From kill -9 of a rank to READY again, and what was read from disks for it."""
    with tempfile.TemporaryDirectory(prefix="dsd-pack-") as folder:
        packed = Path(folder) / "v3"
        checked(machine.run([DSD, "pack", "--model", peers.model("dsv3-q4_0"), "--out", packed, "--tp", 2],
                            PROGRAM_S_MAX), "dsd pack")
        with serving.dsd(packed, "--tp", 2, *KV_TYPE) as running:
            before, old = read_bytes(machine.tree(running.pid)), machine.rank_pids(running.pid)
            if not old:
                raise Failed("the node has no rank processes")
            # The way up takes a moment only: who else is there is seen before.
            others, own = machine.Others(), machine.cpu_of(running.pid)
            time.sleep(1)
            taken = others.cores(machine.cpu_of(running.pid) - own)
            start = time.monotonic()
            os.kill(old[-1], signal.SIGKILL)
            while not (old[-1] not in machine.rank_pids(running.pid) and len(machine.rank_pids(running.pid)) == len(old) and running.is_ready()):
                if start + serving.START_S_MAX < time.monotonic():
                    raise Failed(f"not ready again: {running.last_words()}")
                time.sleep(0.005)
            again = time.monotonic() - start
            after = read_bytes(machine.tree(running.pid))
            found = {"again_s": again, "read_bytes": sum(n - before.get(pid, 0) for pid, n in after.items())}
            return found, taken


def measurements():
    """Name to function of the round's index, in the order of a round."""
    found = {"reading": lambda _: steady_reading()}
    for model in MODELS:
        found[f"offline {model} dsd"] = lambda _, m=model: offline_dsd(m)
        found[f"offline {model} llama.cpp"] = lambda _, m=model: offline_llama(m)
        if model == "smollm2":
            found[f"offline {model} openvino"] = lambda _, m=model: offline_openvino(m)
        if model == "smollm2" and peers.has_amx():
            found[f"offline {model} llama.cpp-amx"] = lambda _, m=model: offline_llama(m, "build-amx")
            found[f"http {model} llama-server-amx"] = lambda i, m=model: http_llama(m, max(i, CURVE_ROUNDS), "build-amx")
        found[f"http {model} dsd"] = lambda i, m=model: http_dsd(m, i)
        found[f"http {model} llama-server"] = lambda i, m=model: http_llama(m, i)
    found["ranks llama"] = lambda _: ranks("llama09b-q4_0")
    found["ranks v3"] = lambda _: ranks("dsv3-q4_0")
    found["shared-core dsd"] = lambda _: shared_core_dsd()
    found["shared-core llama.cpp"] = lambda _: shared_core_llama()
    found["pack ready"] = lambda _: pack()
    found["pack killed-rank"] = lambda _: killed_rank()
    return found


def kernels():
    """What `make bench` says of this machine, ceilings and kernels, and what others took meanwhile."""
    ran = checked(machine.run([*KERNELS, "--threads", "2", "--json"], KERNELS_S_MAX), "cargo bench")
    return json.loads(ran.out.strip().splitlines()[-1]), ran.others


def kernels_alone(wait_s):
    """Kernels and ceilings of a run that others did not disturb; of the least disturbed one of three."""
    tries = []
    # The build is no part of what is timed.
    checked(machine.run(["cargo", "bench", "--locked", "-q", "--no-run", "-p", "dsd-kernels", "--bench", "kernels"], KERNELS_S_MAX), "cargo bench")
    for _ in range(3):
        machine.wait_until_quiet(wait_s)
        report, others = kernels()
        tries.append((others, report))
        print(f"kernels: others {others:.2f}", file=sys.stderr, flush=True)
        if others < OTHERS_MAX:
            break
    others, report = min(tries, key=lambda item: item[0])
    return {"ceilings": report["ceilings"], "cases": report["cases"], "isa": report["isa"], "threads": report["threads"], "kernels_others": others}


def measure(chosen, arguments):
    results = {"commit": machine.commit(), "machine": machine.describe(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
               "others_max": OTHERS_MAX, "sizes": {m: peers.sizes(MODELS[m]["file"]) for m in MODELS}, "runs": {}}
    if arguments.more:
        results = json.loads(RESULTS.read_text())
    machine.wait_until_quiet(arguments.wait)
    results |= kernels_alone(arguments.wait)
    runs = results["runs"]
    end = time.monotonic() + 60 * arguments.minutes
    def n_clean(name):
        return sum(run["others"] < OTHERS_MAX for run in runs.get(name, []))
    round_index = 0
    failures = {}
    while round_index < arguments.rounds_max and time.monotonic() < end:
        todo = [n for n in chosen if n_clean(n) < arguments.rounds and failures.get(n, 0) < 2]
        if not todo:
            break
        for name in todo:
            machine.wait_until_quiet(arguments.wait)
            start = time.monotonic()
            try:
                values, others = chosen[name](n_clean(name))
            except Failed as failure:
                failures[name] = failures.get(name, 0) + 1
                print(f"round {round_index + 1}: {name} FAILED: {failure}", file=sys.stderr, flush=True)
                continue
            runs.setdefault(name, []).append({"others": others, **values})
            said = ", ".join(f"{key} {value:.4g}" for key, value in list(values.items())[:6])
            print(f"round {round_index + 1}: {name}: {said} ({time.monotonic() - start:.0f} s, others {others:.2f})", file=sys.stderr, flush=True)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            if end < time.monotonic():
                break
        round_index += 1
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="measurements whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=5, help="runs wanted of each that count")
    parser.add_argument("--rounds-max", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--wait", type=float, default=30, help="seconds to wait for a quiet machine before a run")
    parser.add_argument("--more", action="store_true", help="add runs to the last results")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--no-report", action="store_true", help="measure only")
    arguments = parser.parse_args()
    serving.end_in_order()
    if not arguments.report:
        peers.install()
        peers.make_models()
        names = measurements()
        chosen = {n: f for n, f in names.items() if not arguments.words or any(w in n for w in arguments.words)}
        measure(chosen, arguments)
    if not arguments.no_report:
        peers_report.write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
