"""What study.py writes: cells from runs, intervals, a table as Markdown and as a picture, verdicts on the paper's findings.

Numbers are percent. A result is what study.py puts into results/NAME.json: {"rows": [name], "columns": [name], "cells": [{"row",
"column", "paper", "seeds", "values", "n", "mean", "sd", "rising"}], "differences": [{"what", "at", **interval()}], ...}.
"""
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np

import studies


def read_json(path):
    """None if there is none, or half of one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


# ---- numbers -----------------------------------------------------------------------------------------------------

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5%, of 1 to 9 degrees of freedom


def t_quantile(df):
    """97.5% quantile of Student's t; from 10 on Fisher's expansion around the normal one, right to 0.0003."""
    if df <= len(T975):
        return T975[df - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2) \
        + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * df ** 3)


def interval(values):
    """-> {"values", "n", "mean", "low", "high"}: the mean with its 95% t-interval, which wants two values or more."""
    n, mean = len(values), statistics.fmean(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"values": [round(v, 4) for v in values], "n": n, "mean": round(mean, 4),
            "low": round(mean - half, 4) if n > 1 else None, "high": round(mean + half, 4) if n > 1 else None}


# A cosine schedule spends its last fifth at under a tenth of the peak lr. What still gains a hundredth there was cut short, and a
# comparison of such cells says who is faster, not who is better.
RISING = 0.01


def rise(curve):
    """What a stage gained in the last fifth of its steps. curve: [[step, metric], ...] with the last step."""
    steps, values = np.array(curve, float).T
    return values[-1] - np.interp(0.8 * steps[-1], steps, values)


def contrast(cells, plus, minus=()):
    """Sum of the cells `plus` less those of `minus` for every seed they all have -> [...]. Cells are (row, column); column *
    is the spread, highest less lowest, over all columns."""
    table = {(c["row"], c["column"]): dict(zip(c["seeds"], c["values"])) for c in cells}

    def by_seed(row, column):
        many = [v for (r, c), v in table.items() if r == row and column in (c, "*")]
        return {s: max(v[s] for v in many) - min(v[s] for v in many) if column == "*" else many[0][s]
                for s in (set.intersection(*map(set, many)) if many else ())}
    terms = [(sign, by_seed(*cell)) for sign, group in ((1, plus), (-1, minus)) for cell in group]
    return [sum(sign * v[s] for sign, v in terms) for s in sorted(set.intersection(*(set(v) for _, v in terms)))]


# ---- results -----------------------------------------------------------------------------------------------------

def read_cell(out, cell, metric, seeds):
    """The cell with its numbers in percent: "seeds", "values", "mean", "sd" (n - 1), "n", "steps", "rising" (None: unknown)."""
    stages = {}
    for seed in range(seeds):
        results = read_json(out / cell.get("run", "") / f"seed{seed}" / "results.json") if "run" in cell else None
        if results and cell["stage"] in results:
            stages[seed] = results[cell["stage"]]
    values = [round(100 * r[metric], 4) for r in stages.values()]
    curves = [r["curve"] for r in stages.values() if len(r.get("curve") or ()) > 1]
    why = {} if values else {"empty": cell.get("empty", "not run")}
    return {**{k: v for k, v in cell.items() if k != "empty"}, **why, "seeds": list(stages), "values": values, "n": len(values),
            "mean": round(statistics.fmean(values), 4) if values else None,
            "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            "steps": curves[0][-1][0] if curves else None,
            "rising": bool(statistics.fmean(map(rise, curves)) > RISING) if curves else None}


def differences(study, cells):
    """The differences that the study asks for, paired by seed: [{"what", "plus", "minus", ...interval()}]."""
    found = []
    for a, b in study["compare"]:
        by_row = a in study["rows"]
        for other in study["columns"] if by_row else study["rows"]:
            plus, minus = ((a, other), (b, other)) if by_row else ((other, a), (other, b))
            if values := contrast(cells, [plus], [minus]):
                found.append({"what": f"{a} - {b}", "at": other, **interval(values)})
    return found


def spent(out, found, seeds):
    """Hours of training and evaluation in all stages of the runs, each adopted stage once; machines and versions."""
    seconds, notes = {}, []
    for name in found:
        for seed in range(seeds):
            folder = out / name / f"seed{seed}"
            results, note = read_json(folder / "results.json"), read_json(folder / "run.json")
            for stage, r in (results or {}).items():
                if isinstance(r, dict) and "seconds" in r:
                    seconds[r.get("weights") or f"{folder}/{stage}"] = r["seconds"]
            notes += [note] * bool(results and note)
    return round(sum(seconds.values()) / 3600, 2), *(sorted({n[k] for n in notes}) for k in ("machine", "versions"))


def without_folders(text):
    """The same without absolute folders: results say nothing about the machine's disk."""
    return re.sub(r"(?<![\w.~*])[/~](?:[^/\s]*/)*", "", text)


def signed(d):
    """A difference for readers: +1.3 (+0.4 to +2.2)."""
    return f"{d['mean']:+.1f} " + ("(one seed)" if d["low"] is None else f"({d['low']:+.1f} to {d['high']:+.1f})")


def markdown(r):
    """The result as Markdown: table, differences, why cells are empty, what it took."""
    cells = {(c["row"], c["column"]): c for c in r["cells"]}

    def text(c):
        unknown = c["n"] and c["rising"] is None and r["task"] != "hpt"
        curve = "still rising" if c["rising"] else "convergence unknown" if unknown else ""
        ours = (f"{c['mean']:.1f}" + (f" ± {c['sd']:.1f}" if c["n"] > 1 else "") + f" ({c['n']})") if c["n"] else ""
        return ", ".join(filter(None, [ours, curve, f"paper {c['paper']}" if c["paper"] else ""]))
    lines = [f"# {r['title']}", "",
             f"{r['metric']} in percent, mean ± standard deviation (seeds), of {r['world']}, {r['task']}."
             + " The paper's are of other data and networks: compare differences." * any(c["paper"] for c in r["cells"]), "",
             "| |" + "".join(f" {c} |" for c in r["columns"]), "|" + "---|" * (len(r["columns"]) + 1)]
    lines += [f"| {row} |" + "".join(f" {text(cells[row, c])} |" for c in r["columns"]) for row in r["rows"]]
    lines += ["", "longer: the control, trained on labels alone for as many steps, and images a step, as the student. still "
              "rising: gained more than a point in the last fifth of its steps, so it was cut short."] * (r["task"] != "hpt")
    names = dict.fromkeys(c["run"] for c in r["cells"] if c.get("run") in r["runs"])
    flags = [f" {r['runs'][name]}".split(" --")[1:] for name in names]
    if shared := [f for f in (flags or [[]])[0] if all(f in other for other in flags)]:
        lines += ["", f"Flags that every cell has (all flags: see the .json): `--{' --'.join(shared)}`"]
    if r["differences"]:
        lines += ["", "| difference, paired by seed | at | mean (95% interval) | seeds |", "|---|---|---|---|"]
        lines += [f"| {d['what']} | {d['at']} | {signed(d)} | {d['n']} |" for d in r["differences"]]
    lines += [""] + [f"- empty: {c['row']}, {c['column']}: {c['empty']}" for c in r["cells"] if "empty" in c]
    lines += [""] + ([r["verdict"], ""] if "verdict" in r else [])
    return "\n".join([*lines, f"`{r['command']}`", "", f"{r['hours']['runs']} hours of runs, {r['hours']['wall']} by the clock; "
                      f"{'; '.join([*r['machines'], *r['versions']])}", ""])


COLOURS = ("#1f6fb4", "#8b949d", "#d9660d", "#0f8a5f", "#b3261e", "#7b4fb5", "#b08900", "#2aa7b8", "#1c2126",
           "#c2469a", "#6b4423", "#7fa51d")


def svg(r):
    """The results as a picture: a group of points per column, a colour per row, bars of one standard deviation."""
    shown = [c for c in r["cells"] if c["n"]]
    ends = [c["mean"] + sign * (c["sd"] or 0) for c in shown for sign in (-1, 1)] or [0, 1]
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if (max(ends) - min(ends)) / s <= 8 or s == 50)
    low, high = math.floor(min(ends) / step) * step, (math.floor(max(ends) / step) + 1) * step
    w, h, left, top, rows = 640, 300, 48, 34, r["rows"]

    def at(column, row, value):
        group = (w - left) / len(r["columns"])
        x = left + group * (r["columns"].index(column) + 0.15 + 0.7 * (rows.index(row) + 0.5) / len(rows))
        return x, top + h * (high - value) / (high - low)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {top + h + 36 + 18 * len(rows)}" '
             'font-family="sans-serif" font-size="12" fill="#1c2126"><rect width="100%" height="100%" fill="#fff"/>',
             f'<text x="8" y="18" font-weight="600">{escape(r["title"])}: {r["metric"]} in percent</text>']
    for k in range(round((high - low) / step) + 1):
        y = at(r["columns"][0], rows[0], low + k * step)[1]
        lines += [f'<path d="M{left} {y:.1f}H{w - 8}" stroke="#dde1e5"/>',
                  f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{low + k * step:g}</text>']
    for k, column in enumerate(r["columns"]):
        x = left + (w - left) * (k + 0.5) / len(r["columns"])
        lines.append(f'<text x="{x:.1f}" y="{top + h + 18}" text-anchor="middle">{escape(column)}</text>')
    for c in shown:
        (x, y), sd, colour = at(c["column"], c["row"], c["mean"]), c["sd"] or 0, COLOURS[rows.index(c["row"]) % len(COLOURS)]
        lines += [f'<path d="M{x:.1f} {at(c["column"], c["row"], c["mean"] - sd)[1]:.1f}V'
                  f'{at(c["column"], c["row"], c["mean"] + sd)[1]:.1f}" stroke="{colour}" stroke-width="2"/>',
                  f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{"#fff" if c["rising"] else colour}" stroke="{colour}" '
                  'stroke-width="2"/>']
    for k, row in enumerate(rows):
        y, colour = top + h + 42 + 18 * k, COLOURS[k % len(COLOURS)]
        lines += [f'<circle cx="{left + 6}" cy="{y - 4}" r="4" fill="{colour}"/>', f'<text x="{left + 18}" y="{y}">{escape(row)}'
                  + (" (hollow: still rising)" if any(c["rising"] and c["row"] == row for c in shown) else "") + "</text>"]
    return "\n".join([*lines, "</svg>", ""])


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def helped(r):
    """One plain sentence: what helped on the user's data."""
    what = {"random, self-trained - random, longer": "self-training from random weights (against longer training)",
            "pre-trained, self-trained - pre-trained, longer": "self-training from pre-trained ones (against longer training)",
            "pre-trained - random": "pre-trained weights (against random ones)"}
    texts = {what[d["what"]] + f": {signed(d)}": d for d in r["differences"] if d["what"] in what}
    good = [text for text, d in texts.items() if verdict(d) == "holds"]
    others = "; ".join(text for text in texts if text not in good)
    if max((d["n"] for d in texts.values()), default=0) < 3:
        return f"Fewer than three seeds cannot say what helps here, in {r['metric']}: {others or 'no run has finished'}."
    return (f"What helped here, in {r['metric']} with its 95% interval, is {' and '.join(good)}"
            + (f"; not shown to help: {others}." if others else ".")) if good else \
        f"Nothing was shown to help here, in {r['metric']} with 95% intervals: {others}."


# ---- findings ----------------------------------------------------------------------------------------------------

def verdict(d):
    """Whether a difference is above 0, from its 95% interval over three seeds or more."""
    if d is None:
        return "not run"
    if d["n"] < 3:
        return "unclear"
    return "holds" if d["low"] > 0 else "does not hold" if d["high"] < 0 else "unclear"


def findings(folder):
    """Verdicts from the studies' results in `folder` -> Markdown. A finding holds where all its contrasts do."""
    names = {study for _, contrasts in studies.FINDINGS.values() for study, *_ in contrasts}
    results, notes = {n: r for n in sorted(names) if (r := read_json(Path(folder) / f"{n}.json"))}, []
    lines = ["# Do the paper's findings hold?", "", "From 95% intervals, in percent, paired by seed. holds: every one lies above "
             "0; does not hold: one lies below; unclear: neither, or fewer than three seeds.", "",
             "| finding | verdict | contrasts |", "|---|---|---|"]
    for key, (sentence, contrasts) in studies.FINDINGS.items():
        verdicts, texts = [], []
        for study, plus, minus in contrasts:
            cells = results.get(study, {"cells": []})["cells"]
            values = contrast(cells, plus, minus)
            d = interval(values) if values else None
            named = {(c["row"], c["column"]): c["rising"] for c in cells
                     if {(c["row"], c["column"]), (c["row"], "*")} & {*plus, *minus}}
            rising, unknown = ([" ".join(cell) for cell, r in named.items() if r is value] for value in (True, None))
            # (0) claims convergence; elsewhere it is a remark
            verdicts.append("unclear" if (rising or unknown) and key == "0" and verdict(d) == "holds" else verdict(d))
            name = " + ".join(map(" ".join, plus)) + "".join(" - " + " ".join(cell) for cell in minus)
            texts.append(f"{study}: {name.replace('*', '(spread)')}: " + (f"{signed(d)}, n = {d['n']}" if d else "not run"))
            notes += [f"- ({key}) {study}, still rising: {', '.join(rising)}"] * bool(rising)
            notes += [f"- (0) {study}, convergence unknown: {', '.join(unknown)}"] * bool(unknown and d and key == "0")
        both = verdicts[0] if len(set(verdicts)) == 1 else "does not hold" if "does not hold" in verdicts else "unclear"
        lines.append(f"| ({key}) {sentence} | **{both}** | {'<br>'.join(texts)} |")
    lines += ["", *(f"- {n}: {r['world']}, {r['task']}, {r['metric']}, {r['seeds']} seeds" for n, r in results.items()), *notes]
    return "\n".join([*lines, ""])
