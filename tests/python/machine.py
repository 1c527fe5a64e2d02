"""What a measurement needs to know of the machine: who else uses it, what a program used, what it is.

The load average lags and counts the measured program itself, so other programs' share is the busy time of /proc/stat less what the measured
ones used.
"""
import contextlib
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HZ = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).resolve().parent.parent.parent


def cpu_seconds():
    """(busy, idle, stolen) of all cores since boot."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, idle, iowait, irq, softirq, steal = (int(x) / HZ for x in file.readline().split()[1:9])
    return user + nice + system + irq + softirq, idle + iowait, steal


def wait_until_quiet(limit_s, idle_share=0.9):
    """Waits until the cores were idle for a second."""
    end = time.monotonic() + limit_s
    while True:
        busy, idle, steal = cpu_seconds()
        time.sleep(1.0)
        busy, idle, steal = (after - before for after, before in zip(cpu_seconds(), (busy, idle, steal)))
        if idle_share * (busy + idle + steal) <= idle or end < time.monotonic():
            return


class Others:
    """Cores that other programs, and the hypervisor, take while a measurement runs."""

    def __init__(self):
        self.start = time.monotonic()
        self.cpu = cpu_seconds()
        self.self_s = time.process_time()

    def cores(self, own_s):
        """Since the start, given the seconds of processor time that the measured programs used; this one's are known."""
        own_s += time.process_time() - self.self_s
        wall = time.monotonic() - self.start
        busy, _, steal = (after - before for after, before in zip(cpu_seconds(), self.cpu))
        return max(0.0, (busy - own_s) / wall) + steal / wall


@dataclass
class Ran:
    """A program that ran to its end."""
    status: int
    out: str
    err: str
    wall_s: float
    cpu_s: float
    rss_mib: float
    others: float


def run(command, timeout_s, env=None):
    """Runs a program; one that takes too long is killed and has a negative status."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        others, start = Others(), time.monotonic()
        child = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env)
        try:
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                if start + timeout_s < time.monotonic():
                    child.kill()
                time.sleep(0.01)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        own = usage.ru_utime + usage.ru_stime
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Ran(child.returncode, *texts, wall, own, usage.ru_maxrss / 1024, others.cores(own))


def tree(pid):
    """A process and all that descend from it."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def rank_pids(pid):
    """The rank processes below a node."""
    found = []
    for each in tree(pid):
        try:
            words = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 1 and words[1] == b"rank":
            found.append(each)
    return sorted(found)


def field_sum(pids, file, field):
    """Sum over processes of the number behind `field:` in a file of /proc; processes that ended count nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                name, _, value = line.partition(":")
                if name == field:
                    total += int(value.split()[0])
    return total


def pss_mib(pid):
    """Memory of a process and its descendants, pages that they share counted once."""
    return field_sum(tree(pid), "smaps_rollup", "Pss") / 1024


def cpu_of(pid):
    """Processor seconds of a process and its living descendants."""
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(int(x) for x in fields[11:13]) / HZ
    return total


def describe():
    """The machine in one line."""
    model, n = "unknown processor", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model, n = value.strip(), n + 1
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    has = [f for f in ("avx2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8") if f in flags]
    cache = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError):
            cache[(index / "level").read_text().strip()] = (index / "size").read_text().strip()
    with open("/proc/meminfo", encoding="ascii") as file:
        gib = int(file.readline().split()[1]) / (1 << 20)
    caches = ", ".join(f"L{level} {cache[level]}" for level in ("2", "3") if level in cache)
    return f"{n} x {model} ({', '.join(has)}; {caches}), {gib:.0f} GiB"


def commit():
    """Of the tree that is measured, `-dirty` with changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"
