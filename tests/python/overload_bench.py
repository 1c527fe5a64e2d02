"""What the measurements of overload share: servers that are ended whatever happens, lengths of a run, prompts, figures."""
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import http_load
import machine
import serving
from serving import Failed

# In the environment of all that is started here: processes whose parents are gone are found by it.
MARK = "OVERLOAD_BENCH"
# Requests of the plain load.
N_WORDS, N_OUTPUT = 75, 32
IDLE_S_MAX = 15
# Seconds that a node has to end after SIGTERM; what still runs then is none of the measurement's business.
STOP_S_MAX = 3


@dataclass(frozen=True)
class Lengths:
    """Seconds and counts of a run."""
    rounds: int
    minutes: float
    # Requests one after the other.
    n_alone: int
    # Clients tried in search of the peak, and seconds for each number of them.
    sweep_clients: tuple
    sweep_s: float
    peak_s: float
    open_s: float
    # Seconds at the beginning of a load that do not count.
    warm_s: float
    # Multiples of the peak that are offered; those that have a bar are offered for `open_s`, others half as long.
    factors: tuple
    burst_s: float
    light_s: float
    shares_s: float
    prompt_tokens: tuple
    prefill_s_max: float
    n_short: int
    n_kills: int
    n_bodies: int
    n_starts: int


FULL = Lengths(rounds=3, minutes=90, n_alone=100, sweep_clients=(4, 8, 16, 32, 48), sweep_s=8, peak_s=20, open_s=60, warm_s=5, factors=(0.5, 1, 2, 5, 10),
               burst_s=30, light_s=30, shares_s=60, prompt_tokens=(1400, 6800), prefill_s_max=60, n_short=3, n_kills=10, n_bodies=1000, n_starts=60)
QUICK = Lengths(rounds=1, minutes=10, n_alone=20, sweep_clients=(8, 16, 32), sweep_s=4, peak_s=6, open_s=12, warm_s=2, factors=(2, 10), burst_s=8,
                light_s=10, shares_s=12, prompt_tokens=(1400, 6800), prefill_s_max=15, n_short=1, n_kills=3, n_bodies=200, n_starts=9)


def lengths(is_quick, rounds):
    """Of a full or a quick run, with this many rounds where that is said."""
    chosen = QUICK if is_quick else FULL
    return replace(chosen, rounds=rounds) if rounds else chosen


# Multiples of the peak that have bars.
FACTORS_OF_BARS = (2, 10)


def marked(value, env=None):
    """An environment that marks a process and all that descend from it."""
    return os.environ | {MARK: value} | (env or {})


def alive_with(value):
    """Processes that carry the mark and are no zombies."""
    found, wanted = [], f"{MARK}={value}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(folder.name))
    return found


def kill_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Node(serving.Server):
    """`dsd dev` with its default configuration and a state folder of its own; no process of it is left behind."""
    stop_s_max = STOP_S_MAX

    def __init__(self, program, model, *more, env=None):
        self.mark = uuid.uuid4().hex
        folder = tempfile.TemporaryDirectory(prefix="dsd-overload-")
        super().__init__([program, "dev", "--model", model, "--http", "127.0.0.1:{port}", "--quic", f"127.0.0.1:{serving.free_port()}", "--state",
                          Path(folder.name) / "state", *more], "/ready", folder, marked(self.mark, env))

    def stop(self):
        super().stop()
        kill_all(alive_with(self.mark))

    def metrics(self):
        """Sum over labels of every sample."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{", 1)[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def is_idle(self):
        now = self.metrics()
        return not any(now.get(name, 0.0) for name in ("dsd_sequences_running", "dsd_sequences_waiting", "dsd_http_streams"))


class Served:
    """A server for several measurements, one after the other, each of which finds it idle."""

    def __init__(self, name, start):
        self.name, self.start, self.running = name, start, None

    async def idle_port(self):
        """The port of a server without work: the one that runs, or another one if that does not come to rest."""
        end = time.monotonic() + IDLE_S_MAX
        while self.running and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if isinstance(self.running, Node) and self.running.is_idle() and self.running.is_ready():
                    return self.running.port
            if not isinstance(self.running, Node):
                break
            await asyncio.sleep(0.2)
        if isinstance(self.running, Node):
            say(f"{self.name} is not idle {IDLE_S_MAX} s after the last request; another one is started")
        self.stop()
        self.running = self.start().__enter__()
        prompts = http_load.Prompts(0)
        # What only the first requests pay is not what is measured.
        for _ in range(3):
            answer = await http_load.ask(self.running.port, http_load.Request(prompts.words(N_WORDS), N_OUTPUT))
            if not answer.is_whole:
                raise Failed(f"{self.name} does not answer: {answer.outcome} {answer.detail}")
        return self.running.port

    def stop(self):
        if self.running:
            self.running.stop()
            self.running = None


class Bench:
    """One round: its servers, prompts and what is known already."""

    def __init__(self, arguments, lengths, seed):
        self.arguments, self.lengths, self.seed = arguments, lengths, seed
        self.program, self.model = arguments.dsd, arguments.model
        self.prompts = http_load.Prompts(seed)
        self.served = Served("dsd", self.node)
        self.peak = None

    def node(self, *more, env=None):
        return Node(self.program, self.model, *more, env=env)

    def request(self, n_words=N_WORDS, n_output=N_OUTPUT, user=None, key=None):
        return http_load.Request(self.prompts.words(n_words), n_output, user, key)

    def long_request(self, n_tokens, n_output=4):
        return http_load.Request(self.prompts.tokens(n_tokens), n_output)

    def close(self):
        self.served.stop()


def say(text):
    print(text, file=sys.stderr, flush=True)


def outcomes(answers):
    """How often each outcome came, as text, with the words of those that nobody wants."""
    counts, words = {}, {}
    for answer in answers:
        counts[answer.outcome] = counts.get(answer.outcome, 0) + 1
        words.setdefault(answer.outcome, answer.detail)
    def told(outcome):
        return "" if outcome in ("ok", "429", "unfinished") or not words[outcome] else f" ({words[outcome][:200].strip()})"
    return ", ".join(f"{outcome} {n}{told(outcome)}" for outcome, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"


def run_checked(command, timeout_s):
    """The output of a program that must succeed."""
    ran = machine.run(command, timeout_s)
    if ran.status != 0:
        raise Failed(f"{' '.join(str(c) for c in command[:3])} ended with {ran.status}: {ran.out[-300:]}{ran.err[-700:]}")
    return ran.out


def start_detached(program, model, folder, mark, *more):
    """`dsd dev` that nobody waits for, with its log thrown away."""
    command = [program, "dev", "--model", model, "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--state", folder, *more]
    return subprocess.Popen([str(c) for c in command], env=marked(mark), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
