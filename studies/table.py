"""Results of runs -> a table with intervals as Markdown, a picture, verdicts on findings.

Numbers are percent. results/NAME.json holds {"rows": [name], "columns": [name], "cells": [{"row",
"column", "stage", "paper", "seeds", "values", "n", "mean", "sd", "steps", "rising"}],
"differences": [{"what", "at", **interval()}], "command", "commit", "machine", "hours", ...}.
"""

import html
import json
import math
import os
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np
import torch

import util
from util import need

# Student's t, 97.5%, of 1 to 9 degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# A cosine schedule spends its last fifth at under a tenth of the peak lr. What still gains a
# hundredth there was cut short, and a comparison of such cells says who is faster, not better.
RISING = 0.01

# ---- numbers -------------------------------------------------------------------------------------


def read_json(path):
    """None where there is none."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else None


def interval(values):
    """The mean with its 95% t-interval; of a single value there is none (low and high None)."""
    n = len(values)
    mean = statistics.fmean(values)
    low = high = None
    if n > 1:
        half = T975[n - 2] * statistics.stdev(values) / math.sqrt(n)
        low, high = round(mean - half, 4), round(mean + half, 4)
    values = [round(v, 4) for v in values]
    return {"values": values, "n": n, "mean": round(mean, 4), "low": low, "high": high}


def signed(d):
    """A difference for readers: +1.3 (+0.4 to +2.2)."""
    if d["low"] is None:
        return f"{d['mean']:+.1f} (one seed)"
    return f"{d['mean']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})"


def rise(curve):
    """What a stage gained in the last fifth of its steps. curve: [[step, metric], ...]."""
    steps, values = np.array(curve, float).T
    return values[-1] - np.interp(0.8 * steps[-1], steps, values)


def contrast(cells, plus, minus=()):
    """The sum of the cells `plus` less those of `minus`, for every seed they all have -> [...].
    A cell is (row, column); column * is the spread, highest less lowest, over all columns."""
    table = {(c["row"], c["column"]): dict(zip(c["seeds"], c["values"])) for c in cells}

    def by_seed(row, column):
        columns = [v for (r, c), v in table.items() if r == row and column in (c, "*")]
        if not columns:
            return {}
        seeds = set.intersection(*map(set, columns))
        if column == "*":
            return {s: max(v[s] for v in columns) - min(v[s] for v in columns) for s in seeds}
        return columns[0]

    signs = [1] * len(plus) + [-1] * len(minus)
    terms = [by_seed(*cell) for cell in (*plus, *minus)]
    seeds = sorted(set.intersection(*map(set, terms)))
    return [sum(sign * term[s] for sign, term in zip(signs, terms)) for s in seeds]


# ---- from runs to a result -----------------------------------------------------------------------


def collect(o, name, study, metric, grid):
    """The result of a study, from the results.json of its runs."""
    rows = list(dict.fromkeys(row for row, _ in grid.cells))
    columns = list(dict.fromkeys(column for _, column in grid.cells))
    cells = []
    for (row, column), places in grid.cells.items():
        numbers = study.get("paper", {}).get(row)
        paper = numbers[columns.index(column)] if numbers else None
        cells.append({"row": row, "column": column, "paper": paper, **read_cell(places, metric)})
    first = list(grid.commands)[: len(grid.commands) // o.seeds]  # the other seeds' are the same
    world = os.path.basename(o.root.rstrip("/")) or "shapes"
    result = {"study": name, "title": study["title"], "world": world, "task": o.task}
    result.update(metric=metric, seeds=o.seeds, command=without_folders(o.command))
    result.update(commit=commit(), machine=machine(), hours=hours(grid.commands))
    result["runs"] = {folder: without_folders(grid.commands[folder]) for folder in first}
    result.update(rows=rows, columns=columns, cells=cells)
    result["differences"] = differences(study["compare"], rows, columns, cells)
    if "helped" in study:
        result["verdict"] = helped(result, study["helped"])
    return result


def read_cell(places, metric):
    """places: {seed: (folder, stage)} -> the numbers of a cell. rising: None without curves."""
    stages = {}
    for seed, (folder, stage) in places.items():
        results = read_json(Path(folder, "results.json"))
        if results:
            stages[seed] = results[stage]
    values = [round(100 * result[metric], 4) for result in stages.values()]
    curves = [result["curve"] for result in stages.values() if len(result.get("curve", ())) > 1]
    return {
        "stage": stage,
        "seeds": list(stages),
        "values": values,
        "n": len(values),
        "mean": round(statistics.fmean(values), 4) if values else None,
        "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "steps": curves[0][-1][0] if curves else None,
        "rising": bool(statistics.fmean(map(rise, curves)) > RISING) if curves else None,
    }


def differences(compare, rows, columns, cells):
    """compare: pairs (a, b) of rows or of columns -> a - b at every column or row."""
    out = []
    for a, b in compare:
        for at in columns if a in rows else rows:
            plus, minus = ((a, at), (b, at)) if a in rows else ((at, a), (at, b))
            if values := contrast(cells, [plus], [minus]):
                out.append({"what": f"{a} - {b}", "at": at, **interval(values)})
    return out


def hours(folders):
    """Hours of training and scoring in all stages of the runs."""
    seconds = 0.0
    for folder in folders:
        results = read_json(Path(folder, "results.json")) or {}
        stages = [stage for stage in results.values() if isinstance(stage, dict)]
        seconds += sum(stage.get("seconds", 0) for stage in stages)
    return round(seconds / 3600, 2)


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = str(util.precision("auto", device))[6:]
    return f"{os.cpu_count()} cores, {gpu}, {precision}, torch {torch.__version__}"


def commit():
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def without_folders(text):
    """Without absolute folders: results say nothing about the disk of the machine."""
    return re.sub(r"(?<![\w.~*])[/~](?:[^/\s]*/)*", "", " ".join(text.split()))


def check_overwritten(target, counts):
    """A smaller command, or failed runs, must not empty a table. counts: {(row, column): seeds}."""
    before = read_json(f"{target}.json") or {"cells": []}
    for c in before["cells"]:
        cell = f"{c['row']}, {c['column']}"
        count = counts.get((c["row"], c["column"]), 0)
        sentence = f"{target}.json has {c['n']} seeds of {cell}, this would leave {count}"
        need(count >= c["n"], f"{sentence}; give another --results, or as many --seeds")


# ---- what is written -----------------------------------------------------------------------------


def write(target, result):
    """target.json, .md and .svg."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    picture = svg(result)
    util.write_json(f"{target}.json", result)
    util.write_atomic(f"{target}.md", lambda path: path.write_text(text))
    util.write_atomic(f"{target}.svg", lambda path: path.write_text(picture))
    print(f"{text}\nwritten: {target}.json, .md and .svg")


NOTE = """
longer: the control, trained on labels alone for as many steps, and images a step, as the student.
still rising: gained more than a point in the last fifth of its steps, so it was cut short. The
paper's numbers are of other data and networks: compare differences."""


def markdown(r):
    lines = [
        f"# {r['title']}",
        "",
        f"{r['metric']} in percent, mean ± standard deviation (seeds).",
        "",
    ]
    lines += [f"| | {' | '.join(r['columns'])} |", "|---" * (len(r["columns"]) + 1) + "|"]
    texts = {(c["row"], c["column"]): cell_text(c) for c in r["cells"]}
    for row in r["rows"]:
        lines.append(f"| {row} | {' | '.join(texts.get((row, c), '') for c in r['columns'])} |")
    if r["task"] != "hpt":
        lines.append(NOTE)
    lines += ["", "| difference, paired by seed | at | mean (95% interval) | seeds |"]
    lines += ["|---|---|---|---|"]
    for d in r["differences"]:
        lines.append(f"| {d['what']} | {d['at']} | {signed(d)} | {d['n']} |")
    lines += ["", r.get("verdict", ""), "", f"`{r['command']}`, at commit {r['commit']}", ""]
    return "\n".join([*lines, f"{r['hours']} hours of runs; {r['machine']}", ""])


def cell_text(c):
    text = f"{c['mean']:.1f}" if c["n"] else "not run"
    if c["n"] > 1:
        text += f" ± {c['sd']:.1f}"
    if c["n"]:
        text += f" ({c['n']})"
    if c["rising"]:
        text += ", still rising"
    if c["paper"]:
        text += f", paper {c['paper']}"
    return text


# fmt: off
COLOURS = (
    "#1f6fb4", "#8b949d", "#d9660d", "#0f8a5f", "#b3261e", "#7b4fb5",
    "#b08900", "#2aa7b8", "#1c2126", "#c2469a", "#6b4423", "#7fa51d",
)
# fmt: on


def svg(r):
    """A group of points a column, a colour a row, bars of one standard deviation."""
    rows, columns = r["rows"], r["columns"]
    shown = [c for c in r["cells"] if c["n"]]
    ends = [c["mean"] + sign * (c["sd"] or 0) for c in shown for sign in (-1, 1)] or [0]
    low, high = math.floor(min(ends)), math.floor(max(ends)) + 1
    left, right, top, bottom = 48, 632, 34, 334
    width = (right - left) / len(columns)

    def y(value):
        return top + (bottom - top) * (high - value) / (high - low)

    head = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    lines = [f'<svg viewBox="0 0 640 {bottom + 36 + 18 * len(rows)}" {head}>']
    lines.append('<rect width="100%" height="100%" fill="#fff"/>')
    lines.append(text(8, 18, f"{r['title']}: {r['metric']} in percent (hollow: still rising)"))
    for value in np.linspace(low, high, 6):
        lines.append(f'<path d="M{left} {y(value):.1f}H{right}" stroke="#dde1e5"/>')
        lines.append(text(left - 6, y(value) + 4, f"{value:.1f}", "end"))
    for k, column in enumerate(columns):
        lines.append(text(left + width * (k + 0.5), bottom + 18, column, "middle"))
    for c in shown:
        row = rows.index(c["row"])
        share = 0.15 + 0.7 * (row + 0.5) / len(rows)  # of the column's width
        x = left + width * (columns.index(c["column"]) + share)
        up, down = (y(c["mean"] + sign * (c["sd"] or 0)) for sign in (1, -1))
        lines.append(f'<path d="M{x:.1f} {up:.1f}V{down:.1f}" stroke="{COLOURS[row]}"/>')
        lines.append(dot(x, y(c["mean"]), COLOURS[row], hollow=c["rising"]))
    for k, row in enumerate(rows):
        lines.append(dot(left + 6, bottom + 38 + 18 * k, COLOURS[k]))
        lines.append(text(left + 18, bottom + 42 + 18 * k, row))
    return "\n".join([*lines, "</svg>", ""])


def text(x, y, words, anchor="start"):
    words = html.escape(words, quote=False)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def dot(x, y, colour, hollow=False):
    fill = "#fff" if hollow else colour
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'


# ---- verdicts ------------------------------------------------------------------------------------


def verdict(d):
    """Whether a difference is above 0, from its 95% interval over three seeds or more."""
    if d is None:
        return "not run"
    if d["n"] < 3 or d["low"] <= 0 <= d["high"]:
        return "unclear"
    return "holds" if d["low"] > 0 else "does not hold"


def helped(r, meaning):
    """One plain sentence about what helped. meaning: {difference: what that is in words}."""
    lines = {}
    for d in r["differences"]:
        if d["what"] in meaning:
            where = f", {d['at']}" if len(r["columns"]) > 1 else ""
            lines[f"{meaning[d['what']]}{where}: {signed(d)}"] = d
    good = [line for line, d in lines.items() if verdict(d) == "holds"]
    others = "; ".join(line for line in lines if line not in good)
    if max((d["n"] for d in lines.values()), default=0) < 3:
        others = others or "no run has finished"
        return f"Fewer than three seeds cannot say what helps here, in {r['metric']}: {others}."
    if not good:
        return f"Nothing was shown to help here, in {r['metric']} with 95% intervals: {others}."
    sentence = f"What helped here, in {r['metric']} with its 95% interval, is {' and '.join(good)}"
    return sentence + (f"; not shown to help: {others}." if others else ".")


HEAD = """# Do the paper's findings hold?

From 95% intervals, in percent, paired by seed. holds: every one lies above 0; does not hold: one \
lies below; unclear: neither, or fewer than three seeds.

| finding | verdict | contrasts |
|---|---|---|"""


def findings(folder, claims):
    """Verdicts from the results in `folder` -> Markdown. A finding holds where all its contrasts
    do. claims: {key: (sentence, [(study, cells added, cells taken away), ...])}."""
    names = {study for _, contrasts in claims.values() for study, _, _ in contrasts}
    results = {name: read_json(Path(folder, f"{name}.json")) for name in sorted(names)}
    lines = [HEAD]
    for key, (sentence, contrasts) in claims.items():
        verdicts = []
        texts = []
        for name, plus, minus in contrasts:
            cells = results[name]["cells"] if results[name] else []
            values = contrast(cells, plus, minus)
            d = interval(values) if values else None
            ended = all(
                c["rising"] is False for c in cells if (c["row"], c["column"]) in plus + minus
            )
            if key == "0" and verdict(d) == "holds" and not ended:
                verdicts.append("unclear")  # (0) claims convergence
            else:
                verdicts.append(verdict(d))
            words = " + ".join(map(" ".join, plus)) + "".join(f" - {' '.join(c)}" for c in minus)
            number = f"{signed(d)}, n = {d['n']}" if d else "not run"
            texts.append(f"{name}: {words.replace('*', '(spread)')}: {number}")
        lines.append(f"| ({key}) {sentence} | **{joined(verdicts)}** | {'<br>'.join(texts)} |")
    lines.append("")
    for name, r in results.items():
        if r:
            lines.append(f"- {name}: {r['world']}, {r['task']}, {r['metric']}, {r['seeds']} seeds")
    return "\n".join([*lines, ""])


def joined(verdicts):
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "does not hold" if "does not hold" in verdicts else "unclear"
