#!/usr/bin/env python3
"""Mixed load with cancels for a while: memory and block counts must stay flat.

    tests/python/soak.py [--minutes 10] [--model PATH] [--clients 12] [--seed 1] [-- ARGUMENTS OF dsd dev]

Clients send chats and completions of all lengths, streamed and whole, some alike in their beginning, some malformed, and leave a third of
them at some moment. Ten times on the way the load pauses until the node is idle; then no sequence and no block may be in use, and memory (PSS
over all processes of the node), open files and threads must be what they were after the first pauses. Ends with status 1 otherwise.
"""
import argparse
import contextlib
import http.client
import json
import random
import sys
import threading
import time
from pathlib import Path

import machine
import serving

PAUSES = 10
# Pauses until which caches, pools and histograms may still grow.
PAUSES_TO_WARM_UP = 3
# Growth after that which counts as none: samples of histograms and pages that the allocator keeps.
GROWTH_MIB_MAX = 8
FILES_MAX = 4
# Threads for short blocking work come and go.
THREADS_MAX = 8
IDLE_S_MAX = 60
SHARED_BEGINNING = "You are a patient assistant who answers in one sentence and never repeats the question. " * 4
WORDS = "time water light house river stone green small night world paper music north table round seven".split()


def text(draw, n_words):
    return " ".join(draw.choice(WORDS) for _ in range(n_words))


def body_of(draw):
    """A request: its path and body."""
    if draw.random() < 0.03:
        return "/v1/completions", draw.choice(['{"prompt": 7}', "{", '{"prompt": "x", "max_tokens": -1}', '{"model": "absent", "prompt": "x"}'])
    body = {"stream": draw.random() < 0.7, "max_tokens": draw.choice((1, 4, 16, 32, 64, 200)), "ignore_eos": draw.random() < 0.5,
            "temperature": draw.choice((0, 0.7, 1.2)), "seed": draw.randrange(1 << 30)}
    words = text(draw, draw.choice((2, 10, 60, 60, 200, 900)))
    beginning = SHARED_BEGINNING if draw.random() < 0.4 else ""
    if draw.random() < 0.5:
        return "/v1/chat/completions", json.dumps(body | {"messages": [{"role": "user", "content": beginning + words}]})
    return "/v1/completions", json.dumps(body | {"prompt": beginning + words, "n": draw.choice((1, 1, 1, 3))})


class Load:
    """Clients that can be paused."""

    def __init__(self, port, n_clients, seed):
        self.port = port
        self.go, self.stop = threading.Event(), threading.Event()
        self.counts, self.lock = {}, threading.Lock()
        self.n_busy = 0
        self.threads = [threading.Thread(target=self.client, args=(random.Random(seed * 1000 + i),), daemon=True) for i in range(n_clients)]
        for thread in self.threads:
            thread.start()

    def client(self, draw):
        while not self.stop.is_set():
            if not self.go.wait(0.2):
                continue
            with self.lock:
                self.n_busy += 1
            try:
                end = self.one(draw)
            except (OSError, http.client.HTTPException) as failure:
                end = type(failure).__name__
            with self.lock:
                self.n_busy -= 1
                self.counts[end] = self.counts.get(end, 0) + 1

    def one(self, draw):
        """One request; how it ended."""
        path, body = body_of(draw)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            leaves = draw.random() < 1 / 3
            if leaves and draw.random() < 0.3:
                time.sleep(draw.random() * 0.3)
                return "left before the answer"
            answer = connection.getresponse()
            if leaves:
                for _ in range(draw.randrange(12)):
                    if not answer.readline():
                        break
                return "left during the answer"
            answer.read()
            return str(answer.status)

    def pause(self):
        """No request is under way any more when this returns."""
        self.go.clear()
        while self.n_busy:
            time.sleep(0.05)


def metrics(server):
    """Sum over labels of every sample."""
    found = {}
    for line in server.get("/metrics").splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{", 1)[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def wait_until_idle(server):
    """Waits until nothing runs or waits; the canary may be seen on the way."""
    end = time.monotonic() + IDLE_S_MAX
    names = ("dsd_sequences_running", "dsd_sequences_waiting", "dsd_kv_blocks_used", "dsd_http_streams")
    while True:
        now = metrics(server)
        busy = {name: now.get(name, 0.0) for name in names if now.get(name, 0.0)}
        # One connection is the one that asks.
        if 1 < now.get("dsd_http_connections", 0.0):
            busy["dsd_http_connections"] = now["dsd_http_connections"]
        if not busy:
            return now
        if end < time.monotonic():
            raise serving.Failed(f"still in use {IDLE_S_MAX} s after the last request: {busy}")
        time.sleep(0.1)


def sample(server):
    pids = machine.tree(server.pid)
    files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    return {"pss_mib": machine.pss_mib(server.pid), "files": files, "threads": machine.field_sum(pids, "status", "Threads")}


def soak(server, arguments):
    """Samples of every pause."""
    load = Load(server.port, arguments.clients, arguments.seed)
    samples, blocks_max = [], 0.0
    print(f"{'minute':>6} {'requests':>9} {'tokens':>9} {'blocks':>7} {'preempted':>9} {'PSS MiB':>8} {'files':>6} {'threads':>7}", flush=True)
    start = time.monotonic()
    for pause in range(1, PAUSES + 1):
        load.go.set()
        while time.monotonic() - start < 60 * arguments.minutes * pause / PAUSES:
            time.sleep(min(1.0, 6 * arguments.minutes))
            blocks_max = max(blocks_max, metrics(server).get("dsd_kv_blocks_used", 0.0))
        load.pause()
        now = wait_until_idle(server)
        samples.append(sample(server))
        last = samples[-1]
        print(f"{(time.monotonic() - start) / 60:6.1f} {sum(load.counts.values()):9} {now.get('dsd_tokens_generated_total', 0):9.0f} {blocks_max:7.0f} "
              f"{now.get('dsd_preemptions_total', 0):9.0f} {last['pss_mib']:8.1f} {last['files']:6} {last['threads']:7}", flush=True)
        blocks_max = 0.0
    load.stop.set()
    print("ends:", ", ".join(f"{end} {n}" for end, n in sorted(load.counts.items(), key=lambda item: -item[1])))
    failed = metrics(server).get("dsd_engine_steps_failed_total", 0.0)
    return samples, load.counts, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", type=Path, default=machine.ROOT / "target/test-data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("node", nargs="*", help="further arguments of dsd dev")
    arguments = parser.parse_args()
    serving.end_in_order()
    with serving.dsd(arguments.model, *arguments.node) as server:
        samples, counts, failed = soak(server, arguments)
    faults = []
    warm, later = samples[:PAUSES_TO_WARM_UP], samples[PAUSES_TO_WARM_UP:]
    for key, allowed in (("pss_mib", GROWTH_MIB_MAX), ("files", FILES_MAX), ("threads", THREADS_MAX)):
        growth = max(s[key] for s in later) - max(s[key] for s in warm)
        print(f"{key}: {max(s[key] for s in warm):.1f} after warming up, grew by {growth:.1f} (at most {allowed})")
        if allowed < growth:
            faults.append(f"{key} grew by {growth:.1f}")
    unexpected = {end: n for end, n in counts.items() if end not in ("200", "400", "404", "429") and not end.startswith("left")}
    if unexpected:
        faults.append(f"answers nobody expected: {unexpected}")
    if failed:
        faults.append(f"{failed:.0f} steps failed")
    print("FAILED: " + "; ".join(faults) if faults else "flat")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
