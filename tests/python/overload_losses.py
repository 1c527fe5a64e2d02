"""Measurements of a node that loses something: ranks, its agent, memory to bodies that do not end, its weights."""
import asyncio
import random
import resource
import signal
import socket
import tempfile
import time
import uuid
from pathlib import Path

import http_load
import machine
from http_load import HOST, ask, closed_loop, end_tasks, percentile
from overload_bench import alive_with, kill_all, outcomes, run_checked, say, start_detached
from serving import Failed

KILL_EVERY_S = 3
# Until tokens come again after a kill.
PAUSE_S_MAX = 60
KILLED_STREAM_OUTPUT = 7500
REFERENCE_S_MAX = 240
# Of a body, and what of it is not sent.
BODY_BYTES, BODY_REST_BYTES = 4_100_000, 100_000
BODIES_S_MAX = 30
PSS_EVERY_S = 0.5
# Files that this program needs beside the sockets of half-sent bodies.
FILES_SPARE = 200
# Agents that start at the same time, and the latest moment of a kill.
LANES, KILL_S_MAX = 4, 2.0
GONE_S, AGENT_S_MAX = 2, 60
TP_OF_STARTS = (1, 2, 4)
PACK_S_MAX = 120
SPOILED_S_MAX = 20
SPOILED_CLIENTS = 2
LOWEST_BIT_FLIPPED = bytes(i ^ 1 for i in range(256))


async def kills(bench):
    """A rank of two is killed every few seconds while one long greedy stream runs; the bytes beside those of a stream without kills."""
    draw = random.Random(bench.seed)
    with bench.node("--tp", 2) as node:
        request, streamed = bench.request(n_output=KILLED_STREAM_OUTPUT), []
        stream = asyncio.create_task(ask(node.port, request, REFERENCE_S_MAX + PAUSE_S_MAX * bench.lengths.n_kills, answers=streamed))
        killed_at, n_in_time = [], 0
        try:
            await asyncio.sleep(KILL_EVERY_S)
            for _ in range(bench.lengths.n_kills):
                pids = machine.rank_pids(node.pid)
                if stream.done() or not pids:
                    break
                kill_all([draw.choice(pids)])
                killed_at.append(time.monotonic())
                n_in_time += await tokens_again(stream, streamed[0], killed_at[-1])
            answer, end = streamed[0], time.monotonic()
        finally:
            await end_tasks([stream])
        times = [t for t in answer.times if t <= end]
        pauses = [longest_pause(times, start, stop) for start, stop in zip(killed_at, killed_at[1:] + [end])]
        text = "".join(answer.text)
        say(f"  {len(killed_at)} kills, {n_in_time} with tokens within {KILL_EVERY_S} s; pauses " + " ".join(f"{p:.2f}" for p in pauses) + f" s; {len(text)} bytes; "
            f"{answer.outcome} {answer.detail}")
        if not pauses:
            raise Failed(f"no rank could be killed: {answer.outcome} {answer.detail}")
        is_same = await begins_alike(node.port, request, text)
    return {"kills_same_bytes": (float(is_same), "bool"), "kills_pause_p50_s": (percentile(pauses, 50), "s"), "kills_pause_p95_s": (percentile(pauses, 95), "s"),
            "kills_survived_ratio": (n_in_time / bench.lengths.n_kills, "ratio")}


async def tokens_again(stream, answer, killed_at):
    """Waits for the next kill's moment, and until tokens came since the last one; whether they came before it."""
    await asyncio.sleep(KILL_EVERY_S)
    # Tokens on their way when the rank died say nothing.
    def has_tokens():
        return answer.times and killed_at + 0.1 < answer.times[-1]
    is_in_time = has_tokens()
    while not has_tokens() and not stream.done() and time.monotonic() < killed_at + PAUSE_S_MAX:
        await asyncio.sleep(0.02)
    return bool(is_in_time)


def longest_pause(times, start, stop):
    """Between tokens after a kill, the wait at its end included."""
    last = max((t for t in times if t < start), default=start)
    inside = [t for t in times if start <= t < stop]
    return max((b - a for a, b in zip([last, *inside], [*inside, stop])), default=stop - start)


async def begins_alike(port, request, text):
    """Whether an undisturbed stream of the same request begins with this text."""
    streamed = []
    task = asyncio.create_task(ask(port, request, REFERENCE_S_MAX, answers=streamed))
    try:
        end = time.monotonic() + REFERENCE_S_MAX
        while not task.done() and time.monotonic() < end:
            await asyncio.sleep(0.1)
            if len(text) <= sum(len(part) for part in streamed[0].text):
                break
    finally:
        await end_tasks([task])
    return "".join(streamed[0].text).startswith(text) and bool(text)


async def bodies(bench):
    """Connections that send most of a long body and then nothing."""
    n = bench.lengths.n_bodies
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + FILES_SPARE
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise Failed(f"{wanted} open files are needed, the hard limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    head = (f"POST {http_load.PATH} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {BODY_BYTES}\r\n\r\n").encode()
    part = memoryview(head + b'{"prompt": "' + b"x" * (BODY_BYTES - BODY_REST_BYTES))
    ends = {}
    with bench.node() as node:
        await ask(node.port, bench.request())
        before = machine.pss_mib(node.pid)
        senders = [asyncio.create_task(half_body(node.port, part, ends)) for _ in range(n)]
        try:
            most, end = before, time.monotonic() + BODIES_S_MAX
            short = asyncio.create_task(ask(node.port, bench.request(), BODIES_S_MAX))
            senders.append(short)
            while time.monotonic() < end and node.process.poll() is None:
                most = max(most, machine.pss_mib(node.pid))
                await asyncio.sleep(PSS_EVERY_S)
            is_answered = short.done() and short.result().is_whole
        finally:
            await end_tasks(senders)
        is_alive = node.process.poll() is None
    growth_mb = (most - before) * 1.048576
    say(f"  {n} bodies: grew by {growth_mb:.0f} MB; " + ", ".join(f"{end} {count}" for end, count in sorted(ends.items())) + f"; a short request: {short_end(short)}")
    if not is_alive:
        raise Failed("the node ended")
    return {"bodies_growth_mb": (growth_mb, "MB"), "bodies_growth_over_budget_mb": (growth_mb - bench.arguments.body_budget_mb, "MB"),
            "bodies_short_request_answered": (float(is_answered), "bool")}


def short_end(task):
    return f"{task.result().outcome} after {task.result().end - task.result().start:.2f} s" if task.done() and not task.cancelled() else "unanswered"


async def half_body(port, part, ends):
    """Sends the part and waits until the server says or does something; counts what that was."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        end = "held"
        try:
            await loop.sock_connect(sock, (HOST, port))
            await loop.sock_sendall(sock, part)
            answer = await loop.sock_recv(sock, 4096)
            end = answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/") else "closed"
        except OSError:
            end = "reset"
        finally:
            ends[end] = ends.get(end, 0) + 1


async def orphans(bench):
    """Agents are killed or stopped at seeded moments from their first instant on; what lives two seconds after each is counted."""
    lanes, counts = asyncio.Semaphore(LANES), []
    draw = random.Random(bench.seed)
    plans = [(TP_OF_STARTS[i % len(TP_OF_STARTS)], draw.uniform(0, KILL_S_MAX), signal.SIGTERM if i % 4 == 3 else signal.SIGKILL)
             for i in range(bench.lengths.n_starts)]

    async def one(tp, after_s, sign):
        async with lanes:
            counts.append(await orphans_of(bench, tp, after_s, sign))

    await asyncio.gather(*(one(*plan) for plan in plans))
    say(f"  {len(counts)} agents ended, {sum(n > 0 for n in counts)} left processes behind, at most {max(counts)}")
    return {"orphans_after_agent_kill": (float(sum(counts)), "processes"), "orphans_agents_killed": (float(len(counts)), "agents")}


async def orphans_of(bench, tp, after_s, sign):
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="dsd-overload-") as folder:
        agent = start_detached(bench.program, bench.model, Path(folder) / "state", mark, "--tp", tp)
        try:
            await asyncio.sleep(after_s)
            agent.send_signal(sign)
            end = time.monotonic() + AGENT_S_MAX
            while agent.poll() is None and time.monotonic() < end:
                await asyncio.sleep(0.01)
            await asyncio.sleep(GONE_S)
            left = alive_with(mark)
            if left:
                words = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:80].decode() for pid in left if Path(f"/proc/{pid}").exists()]
                say(f"  left by tp {tp}, {sign.name} after {after_s:.3f} s: {words}")
            return len(left)
        finally:
            kill_all(alive_with(mark))
            agent.wait()


def spoiled_weights(name, spoil):
    """A pack is overwritten while its node serves: seconds of traffic until `/ready` says 503."""
    async def measure(bench):
        with tempfile.TemporaryDirectory(prefix="dsd-overload-") as folder:
            pack = Path(folder) / "pack"
            run_checked([bench.program, "pack", "--model", bench.model, "--out", pack], PACK_S_MAX)
            node = bench.node()
            node.command[node.command.index("--model") + 1] = str(pack)
            with node:
                async with closed_loop(node.port, SPOILED_CLIENTS, lambda: bench.request(n_output=8)) as answers:
                    await asyncio.sleep(2)
                    if not any(a.is_whole for a in answers):
                        raise Failed(f"a pack is not served: {outcomes(answers)} {node.last_words()}")
                    overwrite(max((f for f in pack.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size), spoil)
                    start = time.monotonic()
                    while await asyncio.to_thread(node.is_ready):
                        if start + SPOILED_S_MAX < time.monotonic():
                            break
                        await asyncio.sleep(0.02)
                    seconds = time.monotonic() - start
                    after = [a for a in answers if start <= a.start]
        say(f"  not ready {seconds:.2f} s after the weights were {name}; meanwhile: {outcomes(after)}")
        return {f"{name}_weights_until_unready_s": (seconds, "s"), f"{name}_weights_answers": (float(sum(a.is_whole for a in after)), "answers")}
    return measure


def nudged(part):
    """The same numbers but for their lowest bits, so that answers stay text."""
    return part.translate(LOWEST_BIT_FLIPPED)


def noise(part):
    """Bytes that make sums infinite."""
    return random.Random(len(part)).randbytes(len(part))


def overwrite(path, spoil):
    """Other bytes over the middle half of a file, in place."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 4)
        part = file.read(size // 2)
        file.seek(size // 4)
        file.write(spoil(part))


def cases():
    """Name to coroutine, in the order of a round."""
    return {"kills": kills, "bodies": bodies, "orphans": orphans,
            "wrong-weights": spoiled_weights("wrong", nudged), "noise-weights": spoiled_weights("noise", noise)}
