"""The results of bench_peers.py as a table with passes and failures, and as pictures."""
import math
import statistics
import sys
from dataclasses import dataclass

import chart
from machine import ROOT

DOCUMENT = ROOT / "docs/PERFORMANCE.md"
FOLDER = ROOT / "docs/performance"
BEGIN, END = "<!-- bench-peers: begin -->", "<!-- bench-peers: end -->"
NAMES = {"smollm2": "SmolLM2 Q4_0", "v3": "V3-shaped Q4_0"}


class Results:
    """Medians over the runs that count; all runs where none does, which the table then says."""

    def __init__(self, results):
        self.all = results
        self.limit = results["others_max"]

    def runs(self, name):
        runs = self.all["runs"].get(name, [])
        return [run for run in runs if run["others"] < self.limit] or runs

    def n_clean(self, name):
        return sum(run["others"] < self.limit for run in self.all["runs"].get(name, []))

    def median(self, name, key):
        values = [run[key] for run in self.runs(name) if key in run]
        return statistics.median(values) if values else None

    def read_rate(self, n_bytes):
        """Bytes a second from a working set of this size, between the measured ones by the logarithm of the size."""
        sets = [(s["bytes"], s["gb_s"] * 1e9) for s in self.all["ceilings"]["read"]]
        for (small, fast), (large, slow) in zip(sets, sets[1:]):
            if n_bytes <= large:
                share = max(0.0, math.log(n_bytes / small) / math.log(large / small))
                return fast + (slow - fast) * share
        return sets[-1][1]

    def decode_ceiling(self, model):
        n_bytes = self.all["sizes"][model]["token_bytes"]
        return self.read_rate(n_bytes) / n_bytes

    def prefill_ceiling(self, model, unit):
        """Prompt tokens a second if `unit`, the vector instructions or the matrix unit, did nothing else."""
        rate = self.all["ceilings"][unit]
        return rate and rate * 1e9 / self.all["sizes"][model]["prompt_token_ops"]


@dataclass
class Row:
    """A line of the table. `ours` and `limits` are numbers; where less is better, `falls` is set."""
    work: str
    ours: float | None
    n: int
    peers: list
    bar: float | None
    aim: float | None
    unit: str = "tok/s"
    ceiling: float | None = None
    bar_text: str = ""
    falls: bool = False

    def verdict(self):
        if self.ours is None or self.bar is None:
            return "not measured"
        def met(limit):
            return limit is not None and (self.ours <= limit if self.falls else limit <= self.ours)
        if not met(self.bar):
            return "**FAIL**"
        return "**aim**" if met(self.aim) else "pass"


def show(value, unit=""):
    if value is None:
        return "-"
    text = f"{value:,.0f}" if 100 <= abs(value) or value == 0 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def times(value, factor):
    return None if value is None else value * factor


def rows(r):
    """The lines of the table, in its order."""
    def best_of(peer, key):
        """The names and figures of a peer's builds, the best one first."""
        found = [(label, r.median(name, key)) for name, label in ((peer, "llama.cpp"), (f"{peer}-amx", "with AMX"))]
        return sorted((item for item in found if item[1] is not None), key=lambda item: -item[1]) or [("llama.cpp", None)]

    def decode_row(model, bar, aim, aim_of_ceiling=None):
        ours, found = f"offline {model} dsd", best_of(f"offline {model} llama.cpp", "decode")
        ceiling = r.decode_ceiling(model)
        others = [("OpenVINO", r.median(f"offline {model} openvino", "decode"))]
        return Row(f"{NAMES[model]} decode, 1 stream", r.median(ours, "decode"), r.n_clean(ours), found + others, times(found[0][1], bar),
                   aim or ceiling * aim_of_ceiling, ceiling=ceiling, bar_text=f"{bar:g}x llama.cpp")

    def prefill_row(model, n, bar, aim, aim_of_ceiling=None):
        ours, found = f"offline {model} dsd", best_of(f"offline {model} llama.cpp", "prefill")
        vectors, matrix_unit = (r.prefill_ceiling(model, unit) for unit in ("int8_gop_s", "int8_matrix_unit_gop_s"))
        return Row(f"{NAMES[model]} prefill {n}", r.median(ours, "prefill"), r.n_clean(ours), found, times(found[0][1], bar),
                   aim or vectors * aim_of_ceiling, ceiling=matrix_unit or vectors, bar_text=f"{bar:g}x llama.cpp")

    def http_row(model, bar, aim):
        ours, found = f"http {model} dsd", best_of(f"http {model} llama-server", "output_16")
        return Row(f"{NAMES[model]} over HTTP, 16 clients, 32 out", r.median(ours, "output_16"), r.n_clean(ours), found,
                   times(found[0][1], bar), times(found[0][1], aim), bar_text=f"{bar:g}x llama-server")

    many_ours = "offline smollm2 dsd"
    openvino = r.median("offline smollm2 openvino", "many_output")
    many = Row("SmolLM2 Q4_0, 16 prompts at once, 64 in / 32 out, whole run", r.median(many_ours, "many_output"), r.n_clean(many_ours),
               [("OpenVINO", openvino), *best_of("offline smollm2 llama.cpp", "many_output")], times(openvino, 2), 1200, bar_text="2x OpenVINO")
    v3_many_peer = r.median("offline v3 llama.cpp", "many_decode")
    v3_many = Row("V3-shaped Q4_0, 16 streams decoding", r.median("offline v3 dsd", "many_decode"), r.n_clean("offline v3 dsd"),
                  [("llama.cpp", v3_many_peer)], times(v3_many_peer, 3), 500, bar_text="3x llama.cpp")

    def ranks_row(key, name):
        return Row(f"2 ranks, a thread each, to 1 rank, 1 thread: {name}", r.median(f"ranks {key}", "ratio"), r.n_clean(f"ranks {key}"),
                   [("1 rank, 2 threads", r.median(f"ranks {key}", "threads_ratio"))], 1.85, 1.95, "x", 2.0, "1.85x")

    fall = Row("another program on one of the two cores: decode falls by", r.median("shared-core dsd", "fall"), r.n_clean("shared-core dsd"),
               [("llama.cpp", r.median("shared-core llama.cpp", "fall"))], 3, 2.2, "x", None, "3x", falls=True)
    ready = Row("READY from a SmolLM2 pack in page cache", r.median("pack ready", "ready_s"), r.n_clean("pack ready"),
                [("llama-server", r.median("http smollm2 llama-server", "ready_s")), ("OpenVINO", r.median("offline smollm2 openvino", "load_s"))],
                0.5, None, "s", None, "0.5 s", falls=True)
    plan = [r.median("pack ready", key) for key in ("pack_mib", "kv_plan_mib", "pss_mib")]
    over = None if None in plan else plan[2] - plan[0] - plan[1]
    memory = Row("memory beyond pack and KV plan, all processes", over, r.n_clean("pack ready"), [], 150, None, "MB", None, "150 MB", falls=True)
    again = Row("kill -9 of a rank to READY again", r.median("pack killed-rank", "again_s"), r.n_clean("pack killed-rank"), [], 2, None, "s", None,
                "2 s", falls=True)
    fetched = Row("bytes read from disks for it", r.median("pack killed-rank", "read_bytes"), r.n_clean("pack killed-rank"), [], 0, None, "B", None,
                  "0", falls=True)
    return [decode_row("smollm2", 2, None, 0.85), prefill_row("smollm2", 512, 3, None, 0.4), many, http_row("smollm2", 4, 8),
            decode_row("v3", 1.6, 150), prefill_row("v3", 256, 3, 960), v3_many, http_row("v3", 3, 6), ranks_row("llama", "dense 0.9 B"),
            ranks_row("v3", "MLA and experts"), fall, ready, memory, again, fetched]


def table(r):
    out = [f"Commit {r.all['commit']}, {r.all['date']}, {r.all['machine']}; 2 threads. Medians of the runs (their number behind ours) during which "
           f"other programs took less than {r.limit} cores; programs took turns.", ""]
    c = r.all["ceilings"]
    reads = ", ".join(f"{s['gb_s']:.0f} GB/s from {s['bytes'] / 2**20:g} MiB" for s in c["read"])
    unit = c["int8_matrix_unit_gop_s"]
    matrix_unit = f", matrix unit (AMX) {unit:,.0f} Gop/s" if unit else ""
    out += [f"Ceilings measured beside it: int8 dot product {c['int8_gop_s']:,.0f} Gop/s{matrix_unit}, f32 {c['f32_gop_s']:,.0f} Gop/s, reading {reads}.", "",
            "| work | dsd (runs) | peers | ratio | ceiling | of it | bar | aim | |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows(r):
        peers = ", ".join(f"{name} {show(value)}" for name, value in row.peers if value is not None) or "-"
        first = row.peers[0][1] if row.peers else None
        ratio = None
        if first and row.ours:
            ratio = first / row.ours if row.falls else row.ours / first
        share = f"{100 * row.ours / row.ceiling:.0f} %" if row.ceiling and row.ours else "-"
        runs = f" ({row.n})" if row.ours is not None else ""
        bar = row.bar_text if row.bar is None or row.bar_text == show(row.bar, row.unit) or row.falls else f"{row.bar_text} = {show(row.bar)}"
        out.append(f"| {row.work} | {show(row.ours, row.unit)}{runs} | {peers} | {f'{ratio:.2f}x' if ratio else '-'} | {show(row.ceiling)} | {share} | "
                   f"{bar} | {show(row.aim)} | {row.verdict()} |")
    return "\n".join(out + [""])


def memory_table(r):
    """What memory gave between the runs, and how much of it decoding takes and the bars would take."""
    rates = {n: r.median("reading", f"read_2_{n}") for n in (128, 512)}
    if None in rates.values():
        return ""
    def line(n):
        one, two = (r.median("reading", f"read_{threads}_{n}") for threads in (1, 2))
        return f"{two:.1f} GB/s from {n} MiB, {two / one:.2f}x what one thread gets"
    out = [f"Between the runs ({r.n_clean('reading')} times, a second each) two threads that did nothing but read got {line(128)}, and {line(512)}.", "",
           "| decoding | bytes a step | dsd takes | the bar would take | reading alone | bar to reading |", "|---|---|---|---|---|---|"]
    by_work = {row.work: row for row in rows(r)}
    for work, model, key, tokens, n in (("SmolLM2 Q4_0 decode, 1 stream", "smollm2", "token_bytes", 1, 128), ("V3-shaped Q4_0 decode, 1 stream", "v3", "token_bytes", 1, 512),
                                        ("V3-shaped Q4_0, 16 streams decoding", "v3", "step_16_bytes", 16, 512)):
        row, n_bytes = by_work[work], r.all["sizes"][model][key]
        if row.ours is None or row.bar is None:
            continue
        ours, bar = (rate / tokens * n_bytes / 1e9 for rate in (row.ours, row.bar))
        out.append(f"| {work} | {n_bytes / 1e6:,.0f} MB | {ours:.1f} GB/s | {bar:.1f} GB/s | {rates[n]:.1f} GB/s | {100 * bar / rates[n]:.0f} % |")
    return "\n".join(out + [""])


def http_table(r):
    """Everything measured over HTTP."""
    out = ["| model | clients | server | output tokens/s | first token p50 / p95 | between tokens p50 | end to end p95 |", "|---|---|---|---|---|---|---|"]
    for model, title in NAMES.items():
        for clients in (1, 2, 4, 8, 16, 32):
            for server in ("dsd", "llama-server"):
                name = f"http {model} {server}"
                rate = r.median(name, f"output_{clients}")
                if rate is None:
                    continue
                p50, p95, itl, e2e = (r.median(name, f"{key}_{clients}") for key in ("ttft_p50", "ttft_p95", "itl_p50", "e2e_p95"))
                out.append(f"| {title} | {clients} | {server} | {rate:,.0f} | {p50:,.0f} / {p95:,.0f} ms | {itl:,.1f} ms | {e2e:,.0f} ms |")
    return "\n".join(out + [""])


def pictures(r):
    """Writes throughput and time to first token against the number of clients; the Markdown that shows them."""
    shown = []
    for model, title in NAMES.items():
        rates, waits = [], []
        for colour, server in enumerate(("dsd", "llama-server")):
            name = f"http {model} {server}"
            def points(key):
                found = ((clients, r.median(name, f"{key}_{clients}")) for clients in (1, 2, 4, 8, 16, 32))
                return [(clients, value) for clients, value in found if value is not None]
            if len(points("output")) < 2:
                continue
            rates.append(chart.Line(server, points("output"), colour))
            for key, p, dashed in (("ttft_p50", "p50", False), ("ttft_p95", "p95", True)):
                waits.append(chart.Line(f"{server} {p}", [(x, y / 1e3) for x, y in points(key)], colour, dashed))
        if not rates:
            continue
        for kind, label, curves in (("throughput", "output tokens per second", rates), ("latency", "seconds to the first token", waits)):
            path = FOLDER / f"{kind}-{model}.svg"
            path.write_text(chart.lines(f"{title} over HTTP", "clients at once", label, curves))
            shown.append(f"![{title}: {label} against clients](performance/{path.name})")
    return "\n".join(shown + [""])


def kernels(r):
    """Every case of `make bench` that was timed in this run."""
    out = ["# Kernels", "", f"`make bench`: commit {r.all['commit']}, {r.all['date']}, {r.all['machine']}; {r.all['isa']}, {r.all['threads']} threads. "
           "Fastest of several runs, and the share of what the binding ceiling, reading or arithmetic, allows. A case ends with the arithmetic of "
           "its activations.", "", "| case | us | GB/s | Gop/s | % of ceiling | bound by |", "|---|---|---|---|---|---|"]
    for case in r.all["cases"]:
        out.append(f"| {case['case']} | {case['us']:,.1f} | {case['gb_s']:.1f} | {case['gop_s']:,.0f} | {case['percent_of_ceiling']:.0f} | "
                   f"{case['bound_by']} |")
    return "\n".join(out + [""])


def write(results):
    """Replaces the part of docs/PERFORMANCE.md between the marks, and prints it."""
    r = Results(results)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "kernels.md").write_text(kernels(r))
    text = "\n".join((table(r), memory_table(r), http_table(r), pictures(r)))
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{DOCUMENT} lacks the marks {BEGIN} and {END}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}")
    print(text)
    for name, runs in results["runs"].items():
        if r.n_clean(name) < len(runs):
            print(f"{name}: {r.n_clean(name)} of {len(runs)} runs count", file=sys.stderr)
