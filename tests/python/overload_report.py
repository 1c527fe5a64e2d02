"""The results of overload.py as a table with passes and failures, and as pictures."""
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import chart
from peers_report import DOCUMENT, FOLDER, show

RESULTS = FOLDER / "overload.json"
BEGIN, END = "<!-- bench-overload: begin -->", "<!-- bench-overload: end -->"
FACTORS = ("0.5", "1", "2", "5", "10")
# Connections of the heavy tenant, as overload_load.py opens them.
HEAVY = {"long_outputs": (40, "40 connections, 2,000 tokens out"), "long_prompts": (64, "64 connections, 1,000 words in, 256 tokens out"),
         "many_short": (200, "200 connections of short requests")}
PROMPTS = (1400, 6800)
TTFT_TARGET_S = 2


class Results:
    """Medians over rounds."""

    def __init__(self, results):
        self.all = results

    def median(self, name):
        figure = self.all["figures"].get(name)
        return statistics.median(figure["values"]) if figure else None

    def unit(self, name):
        return self.all["figures"][name]["unit"]

    @property
    def step_s(self):
        return self.all["step_target_ms"] / 1e3


@dataclass
class Row:
    """A figure with a bar. `falls`: less is better. `also` is a condition beside the bar."""
    work: str
    name: str
    bar: float | None
    aim: float | None
    bar_text: str
    aim_text: str
    falls: bool = True
    also: Callable = lambda r: True

    def verdict(self, r):
        value = r.median(self.name)
        if value is None:
            return "not measured"
        def met(limit):
            return limit is not None and (value <= limit if self.falls else limit <= value) and self.also(r)
        if not met(self.bar):
            return "**FAIL**"
        return "**aim**" if met(self.aim) else "pass"


def rows(r):
    """The lines of the table, in its order."""
    step_over = {name: r.step_s / (r.median(f"light_unloaded_ttft_p95_s_{name}") or 1) for name in HEAVY}
    found = [Row(f"goodput at {x}x the peak offered, of the peak", f"goodput_{x}x_of_peak", bar, aim, f"{bar:g}", f"{aim:g}", falls=False)
             for x, bar, aim in ((2, 0.95, 0.98), (10, 0.93, 0.97))]
    found += [Row("first token of what is let in at 10x, p99, over p99 without load", "ttft_10x_p99_over_unloaded", 5, 2, f"5, and {TTFT_TARGET_S} s", "2",
                  also=lambda r: (r.median("ttft_10x_p99_s") or 0) <= TTFT_TARGET_S),
              Row("refusals, p99", "refusal_p99_s", 0.02, 0.01, "0.02 s", "0.01 s"),
              Row("clients that obey `Retry-After`, a burst of 2x: answered", "obey_answered_ratio", 1, 1, "1", "1", falls=False),
              Row("their tries, p95", "obey_tries_p95", 3, 2, "3", "2"),
              Row("time until all are answered over work / capacity", "obey_time_over_work", 1.3, 1.15, "1.3", "1.15")]
    found += [Row(f"light tenant's first token beside {text}, p95 over p95 alone", f"light_ttft_p95_over_unloaded_{name}", 4 + step_over[name], 2,
                  "4 and a step", "2") for name, (_, text) in HEAVY.items()]
    found += [Row("shares of two greedy tenants, weights 3:1, error", "share_error_3_to_1", 0.05, 0.02, "0.05", "0.02")]
    found += [Row(f"between tokens, p99, while eight prompts of {n:,} tokens arrive, over the step target", f"itl_p99_under_prefill_over_step_target_{n}",
                  2.5, 1.5, "2.5", "1.5") for n in PROMPTS]
    found += [Row("short request behind eight of 6,000 tokens, first token", "short_behind_long_ttft_s", 1.5, 0.5, "1.5 s", "0.5 s"),
              Row("answers that are neither whole nor 429 after 128 left", "cancel_churn_unexpected_errors", 0, 0, "0", "0"),
              Row("throughput of 16 clients over HTTP, over the baseline's", "throughput_16_clients_over_baseline", 0.97, 1, "0.97", "1", falls=False),
              Row("throughput of 16 prompts, over the baseline's", "throughput_16_prompts_over_baseline", 0.97, 1, "0.97", "1", falls=False),
              Row("killed ranks, one each 3 s: same bytes", "kills_same_bytes", 1, 1, "1", "1", falls=False),
              Row("pause after a kill, p95", "kills_pause_p95_s", 1, 0.5, "1 s", "0.5 s"),
              Row("processes alive 2 s after their agent, all kills", "orphans_after_agent_kill", 0, 0, "0", "0"),
              Row("half-sent bodies of 4.1 MB: growth beyond the budget", "bodies_growth_over_budget_mb", 50, None, "50 MB", "-"),
              Row("wrong weights under load, until `/ready` is 503", "wrong_weights_until_unready_s", 2, 1, "2 s", "1 s"),
              Row("weights that make no numbers, until `/ready` is 503", "noise_weights_until_unready_s", 2, 1, "2 s", "1 s")]
    return found


def table(r):
    out = [f"Commit {r.all['commit']}, {r.all['date']}, {r.all['machine']}. Medians of {r.all['n_rounds']} rounds, their range behind them. Peak "
           f"{show(r.median('peak_requests_per_s'))} requests/s; first token without load {show(r.median('ttft_unloaded_p50_s'))} s (p50), "
           f"{show(r.median('ttft_unloaded_p99_s'))} s (p99). Step target {r.all['step_target_ms']:g} ms.", "",
           "| figure | measured | range | bar | aim | |", "|---|---|---|---|---|---|"]
    for row in rows(r):
        if r.median(row.name) is None:
            out.append(f"| {row.work} | - | - | {row.bar_text} | {row.aim_text} | not measured |")
            continue
        values = r.all["figures"][row.name]["values"]
        unit = {"s": "s", "MB": "MB"}.get(r.unit(row.name), "")
        out.append(f"| {row.work} | {exact(r.median(row.name), unit)} | {exact(min(values))} to {exact(max(values))} | {row.bar_text} | {row.aim_text} | {row.verdict(r)} |")
    for failure in r.all["failures"]:
        out += ["", f"Not measured in one round: {failure}."]
    return "\n".join(out + [""])


def exact(value, unit=""):
    """Three digits, and no sign of a small number's exponent."""
    text = f"{value:,.0f}" if 100 <= abs(value) else f"{float(f'{value:.3g}'):g}"
    return f"{text} {unit}".strip()


def load_table(r):
    """Answers and first tokens against offered load."""
    out = ["| offered, of the peak | server | answered, of the peak | refused | first token p50 / p99 |", "|---|---|---|---|---|"]
    for factor in FACTORS:
        for server, prefix in (("dsd", ""), ("llama-server", "llama_server_")):
            values = [r.median(f"{prefix}{name}") for name in (f"goodput_{factor}x_of_peak", f"refused_{factor}x_ratio", f"ttft_{factor}x_p50_s",
                                                               f"ttft_{factor}x_p99_s")]
            if None not in values:
                goodput, refused, p50, p99 = values
                out.append(f"| {factor} | {server} | {100 * goodput:.0f} % | {100 * refused:.0f} % | {exact(p50)} / {exact(p99)} s |")
    peak = r.median("llama_server_peak_requests_per_s")
    if peak:
        out += ["", f"llama-server's peak is {show(peak)} requests/s; what it has not begun when its clients leave, 15 s after the last arrival, counts with the time that it waited."]
    return "\n".join(out + [""])


def series(r, pattern, keys, factor=1):
    """Points of those that were measured; `pattern` has a place for the key."""
    found = ((key, r.median(pattern.format(name))) for name, key in keys)
    return [(x, factor * y) for x, y in found if y is not None]


def pictures(r):
    """Writes them; the Markdown that shows them."""
    factors = [(f, float(f)) for f in FACTORS]
    goodput, waits = [], []
    for colour, (server, prefix) in enumerate((("dsd", ""), ("llama-server", "llama_server_"))):
        goodput.append(chart.Line(server, series(r, prefix + "goodput_{}x_of_peak", factors, 100), colour))
        for p, dashed in (("p50", True), ("p99", False)):
            waits.append(chart.Line(f"{server} {p}", series(r, prefix + "ttft_{}x_" + p + "_s", factors), colour, dashed))
    unloaded = r.median("ttft_unloaded_p99_s")
    goodput.append(chart.Line("bar", [(2, 95), (10, 93)], 3, True))
    if unloaded:
        waits.append(chart.Line("bar at 10x", [(x, min(5 * unloaded, TTFT_TARGET_S)) for _, x in factors], 3, True))
    heavy = [(name, connections) for name, (connections, _) in sorted(HEAVY.items(), key=lambda item: item[1][0])]
    light = [chart.Line("beside, p95", series(r, "light_ttft_p95_s_{}", heavy), 0), chart.Line("beside, p50", series(r, "light_ttft_p50_s_{}", heavy), 0, True),
             chart.Line("alone, p95", series(r, "light_unloaded_ttft_p95_s_{}", heavy), 2),
             chart.Line("bar", [(x, 4 * y + r.step_s) for x, y in series(r, "light_unloaded_ttft_p95_s_{}", heavy)], 3, True)]
    prompts = [(n, n) for n in PROMPTS]
    alone = r.median("itl_alone_p50_s")
    before = [(0, 1e3 * alone)] if alone else []
    between = [chart.Line(p, before + series(r, f"itl_{p}_under_prefill_s_{{}}", prompts, 1e3), 0, p == "p50") for p in ("p99", "p50")]
    between += [chart.Line("bar", [(x, 2.5e3 * r.step_s) for x in (0, *PROMPTS)], 3, True)]
    shown = []
    for name, title, x_label, y_label, curves, scale in (
            ("goodput", "Answers against offered load", "arrivals, as a multiple of the peak", "answers with all tokens, % of the peak", goodput, chart.EVEN),
            ("ttft", "First token against offered load", "arrivals, as a multiple of the peak", "seconds to the first token of what was let in", waits, chart.LOGARITHMIC),
            ("light", "A light tenant beside a heavy one", "heavy connections: 40 with 2,000 tokens out, 64 with 1,000 words in, 200 short ones",
             "seconds to the light tenant's first token", light, chart.LOGARITHMIC),
            ("between-tokens", "A stream while eight long prompts arrive", "tokens of each prompt (0: none)", "milliseconds between tokens", between, chart.LOGARITHMIC)):
        curves = [curve for curve in curves if curve.points]
        if not any(curve.name != "bar" and 1 < len(curve.points) for curve in curves):
            continue
        path = FOLDER / f"overload-{name}.svg"
        path.write_text(chart.lines(title, x_label, y_label, curves, scale))
        shown.append(f"![{title}: {y_label}](performance/{path.name})")
    return "\n".join(shown + [""])


def write(results):
    """Replaces the part of docs/PERFORMANCE.md between the marks, and prints it."""
    r = Results(results)
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "\n".join((table(r), load_table(r), pictures(r)))
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{DOCUMENT} lacks the marks {BEGIN} and {END}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}")
