"""Measurements of a node that is offered more than it can do: what it answers, whom it refuses, who waits how long.

Each is a coroutine of the round; it returns the figures, name to value and unit. A request that was let in and has no first token when the
measurement ends counts as one that came then.
"""
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path

import http_load
import machine
from http_load import IMPATIENT_S_MAX, arrivals, ask, closed_loop, end_tasks, open_loop, percentile, pursue
from overload_bench import FACTORS_OF_BARS, N_OUTPUT, N_WORDS, Node, outcomes, run_checked, say
from serving import Failed

# Answers to what arrived in time are waited for this long.
DRAIN_S = 15
TRIES_MAX = 20
# Clients of the plain benchmark, and its prompts: words of clients, tokens of prompts without a server.
N_CLIENTS, PROMPT_TOKENS = 16, 64
SPEED_S_MAX = 300
# The light tenant's requests, and how long it rests between two.
LIGHT_WORDS, LIGHT_OUTPUT, LIGHT_PAUSE_S = 20, 16, 0.1
# Name, connections, words and tokens out of what runs beside it.
HEAVY = {"long_prompts": (64, 1000, 256), "long_outputs": (40, N_WORDS, 2000), "many_short": (200, N_WORDS, N_OUTPUT)}
HEAVY_HEAD_START_S = 3
# Two tenants and the digests of their keys (`printf %s KEY | b3sum`).
TENANTS = {"heavier": (3, "sk-overload-heavier-000000000000", "e862dfb39f42736ab24dd71f1bbb330010dc68c23f2d8fa1831bf9d36a984a9b"),
           "lighter": (1, "sk-overload-lighter-000000000000", "af1cc8c4790f6ab53bfa36cfc08042574192ef00791e4da22e168c62a14c7ff0")}
TENANT_CLIENTS = 32
SHARES_WARM_S = 5
N_LONG = 8
# The stream beside long prompts, and its tokens before they arrive. Its prompt and they fit into a context of 8,192.
STREAM_OUTPUT, STREAM_WARM_TOKENS = 6000, 50
SHORT_BEHIND_TOKENS, SHORT_BEHIND_S = 6000, 0.3
SHORT_S_MAX = 150
CHURN_LEAVE, CHURN_COME, CHURN_LONG = 128, 100, 4
CHURN_S_MAX = 90


async def throughput_over_http(node, bench):
    """Tokens a second of clients that ask again when they are answered."""
    await ask(node.port, bench.request())
    async with closed_loop(node.port, N_CLIENTS, bench.request) as answers:
        await asyncio.sleep(bench.lengths.warm_s)
        start = time.monotonic()
        await asyncio.sleep(bench.lengths.peak_s)
        end = time.monotonic()
    return http_load.rate([t for a in answers for t in a.times], start, end)


def throughput_of_prompts(program, model):
    """Tokens a second of as many prompts at once, without a server."""
    out = run_checked([program, "eval", "speed", "--model", model, "--prompt", PROMPT_TOKENS, "--output", N_OUTPUT, "--sequences", N_CLIENTS,
                       "--runs", 2], SPEED_S_MAX)
    return json.loads(out.strip().splitlines()[-1])["output"]["median"]


async def throughput(bench):
    """The plain benchmarks, beside the baseline's where there is one: each runs twice, in turn."""
    programs = {"ours": bench.program} | ({"baseline": bench.arguments.baseline} if bench.arguments.baseline else {})
    rates = {name: ([], []) for name in programs}
    for name in [*programs, *reversed(programs)] if 1 < len(programs) else programs:
        with Node(programs[name], bench.model) as node:
            rates[name][0].append(await throughput_over_http(node, bench))
        rates[name][1].append(throughput_of_prompts(programs[name], bench.model))
        say(f"  {name}: {rates[name][0][-1]:.0f} tok/s over HTTP, {rates[name][1][-1]:.0f} tok/s of {N_CLIENTS} prompts")
    found = {}
    for i, what in enumerate(("16_clients", "16_prompts")):
        means = {name: statistics.mean(both[i]) for name, both in rates.items()}
        found[f"throughput_{what}_tok_per_s"] = (means["ours"], "tok/s")
        if "baseline" in means:
            found[f"throughput_{what}_over_baseline"] = (means["ours"] / means["baseline"], "ratio")
    return found


async def closed_rate(port, n_clients, bench, seconds):
    """Requests a second that clients in a closed loop get answered."""
    async with closed_loop(port, n_clients, bench.request) as answers:
        await asyncio.sleep(bench.lengths.warm_s)
        start = time.monotonic()
        await asyncio.sleep(seconds)
        end = time.monotonic()
    return http_load.rate([a.end for a in answers if a.is_whole], start, end)


async def find_peak(served, bench):
    """The number of clients that get most, and what they get; measured again, for the best of many figures is too good."""
    rates = {}
    for n_clients in bench.lengths.sweep_clients:
        rates[n_clients] = await closed_rate(await served.idle_port(), n_clients, bench, bench.lengths.sweep_s)
    n_clients = max(rates, key=rates.get)
    peak = await closed_rate(await served.idle_port(), n_clients, bench, bench.lengths.peak_s)
    if not peak:
        raise Failed(f"{served.name} answers nobody: {rates}")
    say(f"  {served.name}: peak {peak:.2f} requests/s with {n_clients} clients (" + ", ".join(f"{n}: {r:.2f}" for n, r in rates.items()) + ")")
    return n_clients, peak


async def alone(port, n, make_request):
    """Seconds to the first token of requests that come one after the other."""
    found = []
    for _ in range(n):
        answer = await ask(port, make_request())
        if not answer.is_whole:
            raise Failed(f"a request alone: {answer.outcome} {answer.detail}")
        found.append(answer.ttft)
    return found


def waited(answers):
    """Seconds to the first token of what was let in; of those without one, how long they waited."""
    return [a.ttft if a.times else a.end - a.start for a in answers if not a.is_refusal]


async def at_rate(port, rate, seconds, bench):
    """Poisson arrivals: answers a second with all tokens, and every answer."""
    answers = []
    async with http_load.Lag() as lag:
        moments = arrivals(rate, seconds, bench.seed)
        start, _ = await open_loop(moments, lambda: ask(port, bench.request(), answers=answers), DRAIN_S)
    n_whole = sum(a.is_whole and start + bench.lengths.warm_s <= a.end < start + seconds for a in answers)
    return n_whole / (seconds - bench.lengths.warm_s), answers, lag.p99()


async def offered_load(served, bench):
    """Peak, first tokens without load, and both at multiples of the peak."""
    port = await served.idle_port()
    unloaded = await alone(port, bench.lengths.n_alone, bench.request)
    unloaded_p99 = percentile(unloaded, 99)
    n_clients, peak_before = await find_peak(served, bench)
    rates, loads = {}, {}
    for factor in bench.lengths.factors:
        seconds = bench.lengths.open_s if factor in FACTORS_OF_BARS else bench.lengths.open_s / 2
        rates[factor], answers, lag_p99 = loads[factor] = await at_rate(await served.idle_port(), factor * peak_before, seconds, bench)
        say(f"  {served.name} at {factor:g}x: {rates[factor]:.2f} answers/s, first token p99 {percentile(waited(answers), 99) or 0:.2f} s; "
            f"{outcomes(answers)}; clients' clock late by {1e3 * lag_p99:.1f} ms (p99)")
    peak_after = await closed_rate(await served.idle_port(), n_clients, bench, bench.lengths.peak_s)
    peak = (peak_before + peak_after) / 2
    say(f"  {served.name}: peak before {peak_before:.2f}, after {peak_after:.2f} requests/s")
    found = {"peak_requests_per_s": (peak, "requests/s"), "ttft_unloaded_p50_s": (percentile(unloaded, 50), "s"), "ttft_unloaded_p99_s": (unloaded_p99, "s")}
    for factor, (rate, answers, lag_p99) in loads.items():
        x, waits = f"{factor:g}x", waited(answers)
        if not waits:
            raise Failed(f"{served.name} lets nobody in at {x}: {outcomes(answers)}")
        found |= {f"goodput_{x}_of_peak": (rate / peak, "ratio"), f"ttft_{x}_p50_s": (percentile(waits, 50), "s"), f"ttft_{x}_p99_s": (percentile(waits, 99), "s"),
                  f"ttft_{x}_p99_over_unloaded": (percentile(waits, 99) / unloaded_p99, "ratio"), f"refused_{x}_ratio": (share(a.is_refusal for a in answers), "ratio")}
    _, answers, lag_p99 = loads[max(loads)]
    refusals = [a.end - a.start for a in answers if a.is_refusal]
    if refusals:
        found["refusal_p99_s"] = (percentile(refusals, 99), "s")
    failed = [a for _, answers, _ in loads.values() for a in answers if not (a.is_whole or a.is_refusal or a.outcome == "unfinished")]
    return found | {"load_failed_answers": (len(failed), "answers"), "generator_lag_10x_p99_s": (lag_p99, "s")}


def share(marks):
    marks = list(marks)
    return sum(marks) / max(1, len(marks))


async def load(bench):
    found = await offered_load(bench.served, bench)
    bench.peak = found["peak_requests_per_s"][0]
    return found


async def peer_load(bench):
    """The same for llama-server."""
    found = await offered_load(bench.peer, bench)
    return {f"llama_server_{name}": figure for name, figure in found.items() if "generator" not in name}


async def obey(bench):
    """A burst of clients that come back exactly when they are told."""
    if bench.peak is None:
        _, bench.peak = await find_peak(bench.served, bench)
    port, answers = await bench.served.idle_port(), []
    moments = arrivals(2 * bench.peak, bench.lengths.burst_s, bench.seed)
    work_s = len(moments) / bench.peak
    start, tasks = await open_loop(moments, lambda: pursue(port, bench.request(), TRIES_MAX, answers=answers), 8 * work_s)
    pursuits = [task.result() for task in tasks if not task.cancelled()]
    answered = [p for p in pursuits if p.last.is_whole]
    told = [a.retry_after or 0 for a in answers if a.is_refusal]
    say(f"  {len(answered)} of {len(moments)} answered, {len(answers)} tries: {outcomes(answers)}; told to wait p50 {percentile(told, 50) or 0:.0f} s, "
        f"at most {max(told, default=0):.0f} s; work for {work_s:.1f} s")
    end = max((p.last.end for p in pursuits), default=time.monotonic()) if len(pursuits) == len(tasks) else time.monotonic()
    ttfts = [p.last.ttft for p in answered]
    return {"obey_answered_ratio": (len(answered) / max(1, len(moments)), "ratio"), "obey_tries_p95": (percentile([p.n_tries for p in pursuits], 95), "tries"),
            "obey_time_over_work": ((end - start) / work_s, "ratio"), "obey_admitted_ttft_p99_s": (percentile(ttfts, 99), "s"),
            "obey_retry_after_max_s": (max(told, default=0), "s")}


async def light_tenant(port, seconds, bench, user):
    """One short request after the other: seconds from each one's first try to its first token, and all tries."""
    waits, answers, end = [], [], time.monotonic() + seconds

    async def client():
        while time.monotonic() < end:
            begun.append(time.monotonic())
            pursuit = await pursue(port, bench.request(LIGHT_WORDS, LIGHT_OUTPUT, user), TRIES_MAX, answers=answers)
            waits.append(pursuit.ttft or time.monotonic() - pursuit.start)
            await asyncio.sleep(LIGHT_PAUSE_S)

    begun = []
    task = asyncio.create_task(client())
    try:
        # One that waits at the end is given as long again.
        await asyncio.wait([task], timeout=2 * seconds)
        if task.done():
            task.result()
        elif len(waits) < len(begun):
            waits.append(time.monotonic() - begun[-1])
    finally:
        await end_tasks([task])
    return waits, answers


def light_beside(name):
    n_connections, n_words, n_output = HEAVY[name]

    async def measure(bench):
        port = await bench.served.idle_port()
        unloaded, _ = await light_tenant(port, bench.lengths.light_s / 2, bench, "light")
        async with closed_loop(port, n_connections, lambda: bench.request(n_words, n_output, "heavy")) as heavy:
            await asyncio.sleep(HEAVY_HEAD_START_S)
            start = time.monotonic()
            waits, answers = await light_tenant(port, bench.lengths.light_s, bench, "light")
            seconds = time.monotonic() - start
            n_heavy = sum(start < t for a in heavy for t in a.times)
        p95, alone_p95 = percentile(waits, 95), percentile(unloaded, 95)
        say(f"  {name}: light p50 {percentile(waits, 50):.3f} s, p95 {p95:.3f} s of {len(waits)}, alone {alone_p95:.3f} s; {outcomes(answers)}; "
            f"heavy {n_heavy / seconds:.0f} tok/s, {outcomes(heavy)}")
        return {f"light_unloaded_ttft_p95_s_{name}": (alone_p95, "s"), f"light_ttft_p50_s_{name}": (percentile(waits, 50), "s"), f"light_ttft_p95_s_{name}": (p95, "s"),
                f"light_ttft_p95_over_unloaded_{name}": (p95 / alone_p95, "ratio"), f"light_refused_{name}": (share(a.is_refusal for a in answers), "ratio"),
                f"heavy_tok_per_s_{name}": (n_heavy / seconds, "tok/s")}
    return measure


def write_tenants(folder):
    """The file of two tenants, as only its owner may read it."""
    text = "version = 1\n"
    for name, (weight, _, digest) in TENANTS.items():
        text += f'\n[[tenants]]\nname = "{name}"\nweight = {weight}\nkey_digests = ["blake3:{digest}"]\n'
    path = Path(folder) / "tenants.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


async def shares(bench):
    """Two tenants that take all they get, with weights of 3 and 1."""
    node = bench.node()
    node.env["DSD_SERVICE__TENANTS_FILE"] = str(write_tenants(node.folder.name))
    with node:
        async with contextlib.AsyncExitStack() as stack:
            loops = {name: await stack.enter_async_context(closed_loop(node.port, TENANT_CLIENTS, lambda key=key: bench.request(key=key)))
                     for name, (_, key, _) in TENANTS.items()}
            await asyncio.sleep(SHARES_WARM_S)
            start = time.monotonic()
            await asyncio.sleep(bench.lengths.shares_s)
            end = time.monotonic()
    tokens = {name: sum(start <= t < end for a in answers for t in a.times) for name, answers in loops.items()}
    say("  " + "; ".join(f"{name} {n} tokens, {outcomes(loops[name])}" for name, n in tokens.items()))
    weights, all_tokens = sum(w for w, _, _ in TENANTS.values()), sum(tokens.values())
    if not all_tokens:
        raise Failed("no tenant was answered")
    due = {name: weight / weights for name, (weight, _, _) in TENANTS.items()}
    return {"share_error_3_to_1": (max(abs(tokens[name] / all_tokens / due[name] - 1) for name in tokens), "ratio"),
            "share_of_heavier_3_to_1": (tokens["heavier"] / all_tokens, "ratio")}


async def stream_until(count, times, seconds):
    end = time.monotonic() + seconds
    while len(times) < count:
        if end < time.monotonic():
            raise Failed(f"a stream has {len(times)} tokens after {seconds} s")
        await asyncio.sleep(0.01)


def between_tokens(n_tokens):
    """Between the tokens of a stream while eight long prompts arrive."""
    async def measure(bench):
        port, streamed, long = await bench.served.idle_port(), [], []
        stream = asyncio.create_task(ask(port, bench.request(LIGHT_WORDS, STREAM_OUTPUT), answers=streamed))
        tasks = [stream]
        try:
            await asyncio.sleep(0.05)
            times = streamed[0].times
            await stream_until(STREAM_WARM_TOKENS, times, 30)
            alone_p50 = percentile(http_load.gaps(times, 0, time.monotonic()), 50)
            requests = [bench.long_request(n_tokens) for _ in range(N_LONG)]
            start = time.monotonic()
            arrivals_of_all = [asyncio.create_task(pursue(port, r, TRIES_MAX, answers=long)) for r in requests]
            tasks += arrivals_of_all
            done, _ = await asyncio.wait(arrivals_of_all, timeout=bench.lengths.prefill_s_max)
            end = time.monotonic()
            found = http_load.gaps(times, start, end)
            if not stream.done():
                found.append(end - times[-1])
            seconds = end - start
        finally:
            await end_tasks(tasks)
        n_whole = sum(a.is_whole for a in long)
        say(f"  {n_tokens} tokens: between tokens p50 {1e3 * percentile(found, 50):.1f}, p99 {1e3 * percentile(found, 99):.1f}, max {1e3 * max(found):.0f} ms; before "
            f"{1e3 * alone_p50:.1f} ms; {n_whole} of {N_LONG} prompts answered in {seconds:.1f} s; {outcomes(long)}")
        step_s = bench.arguments.step_target_ms / 1e3
        p99 = percentile(found, 99)
        return {"itl_alone_p50_s": (alone_p50, "s"), f"itl_p50_under_prefill_s_{n_tokens}": (percentile(found, 50), "s"),
                f"itl_p99_under_prefill_s_{n_tokens}": (p99, "s"), f"itl_p99_under_prefill_over_step_target_{n_tokens}": (p99 / step_s, "ratio"),
                f"prefill_answered_{n_tokens}": (n_whole, "prompts"), f"prefill_tok_per_s_{n_tokens}": (n_whole * n_tokens / seconds, "tok/s")}
    return measure


async def short_behind_long(bench):
    """A short request just behind eight long prompts."""
    waits, refused_short, refused_long = [], [], []
    for _ in range(bench.lengths.n_short):
        port, short, long = await bench.served.idle_port(), [], []
        requests = [bench.long_request(SHORT_BEHIND_TOKENS) for _ in range(N_LONG)]
        tasks = [asyncio.create_task(pursue(port, r, TRIES_MAX, answers=long)) for r in requests]
        try:
            await asyncio.sleep(SHORT_BEHIND_S)
            start = time.monotonic()
            pursuit = asyncio.create_task(pursue(port, bench.request(), TRIES_MAX, answers=short))
            tasks.append(pursuit)
            await asyncio.wait([pursuit], timeout=SHORT_S_MAX)
            waits.append((pursuit.done() and pursuit.result().ttft) or time.monotonic() - start)
        finally:
            await end_tasks(tasks)
        refused_short.append(sum(a.is_refusal for a in short))
        refused_long.append(sum(a.is_refusal for a in long))
        say(f"  short: {waits[-1]:.3f} s, {outcomes(short)}; long: {outcomes(long)}")
    return {"short_behind_long_ttft_s": (statistics.median(waits), "s"), "short_behind_long_refusals": (statistics.mean(refused_short), "refusals"),
            "long_refusals": (statistics.mean(refused_long), "refusals")}


async def churn(bench):
    """Clients that wait leave while long steps run, and new ones come at once: none may be told anything but "later"."""
    port, new = await bench.served.idle_port(), []
    long = [asyncio.create_task(ask(port, bench.long_request(SHORT_BEHIND_TOKENS))) for _ in range(CHURN_LONG)]
    leaving, coming, left = [], [], []
    try:
        await asyncio.sleep(SHORT_BEHIND_S)
        leaving = [asyncio.create_task(ask(port, bench.request(n_output=200), answers=left)) for _ in range(CHURN_LEAVE)]
        await asyncio.sleep(1)
        for task in leaving + long:
            task.cancel()
        coming = [asyncio.create_task(ask(port, bench.request(n_output=8), CHURN_S_MAX, answers=new)) for _ in range(CHURN_COME)]
        await asyncio.wait(coming)
    finally:
        await end_tasks(coming + leaving + long)
    unexpected = [a for a in new if not (a.is_whole or a.is_refusal)]
    say(f"  left: {outcomes(left)}; new: {outcomes(new)}")
    return {"cancel_churn_unexpected_errors": (len(unexpected), "answers"), "cancel_churn_answered": (sum(a.is_whole for a in new), "answers")}


def cases():
    """Name to coroutine, in the order of a round."""
    found = {"throughput": throughput, "load": load, "obey": obey}
    found |= {f"light {name}": light_beside(name) for name in HEAVY}
    found["shares"] = shares
    found |= {f"between-tokens {n}": between_tokens(n) for n in (1400, 6800)}
    return found | {"short-behind-long": short_behind_long, "churn": churn}
