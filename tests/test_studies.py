"""Studies: commands in folders wait, are skipped, resumed and stopped; the arithmetic of tables and
verdicts. Stubs stand in place of st.py and hpt.py; nothing is trained."""

import json
import math
import os
import signal
import sys
import threading
import types
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import recipes
import st
import util
from studies import reed, run, table, zoph

STUB = """
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
out = Path(words[words.index("--out") + 1])
with open(os.environ["NOTES"], "a") as notes:
    notes.write(f"{out}\\n")
for flag in ("--teacher", "--pseudo", "--init"):
    if flag in words:
        assert Path(words[words.index(flag) + 1]).exists(), flag
time.sleep(float(os.environ.get("SLOW", 0)))
if os.environ.get("FAIL", "nothing") in " ".join(words):
    sys.exit("error: the disk of this test is full")
seed = int(words[words.index("--seed") + 1])
stages = ["teacher", "pseudo", "student", "control", "linear", "finetune", "1_all_single"]
scores = {"seconds": 36.0, "curve": [[80, 0.2], [100, 0.2 + 0.05 * ("--control" in words)]]}
for name in ("mIoU", "AP", "accuracy"):
    scores[name] = 0.3 + 0.01 * seed + 0.001 * len(" ".join(words))
for stage in stages:
    (out / stage).mkdir(exist_ok=True)
(out / "results.json").write_text(json.dumps(dict.fromkeys(stages, scores) | {"seed": seed}))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """-> what was started, in order (a function)."""
    for program in ("st.py", "hpt.py"):
        (tmp_path / program).write_text(STUB)
    notes = tmp_path / "notes"
    notes.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "POLL", 0.01)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield lambda: notes.read_text().split()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def planned(module, name, *args):
    """The grid of a study."""
    grid = run.Grid()

    def study(o, name, rows, metric):
        for seed in range(o.seeds):
            rows["runs"](grid, o, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "study", study)
        module.main([name, "--seeds", "1", *args])
    return grid


TABLES = [(m, name) for m in (zoph, reed) for name in m.STUDIES if name != "yours"]


# ---- running -------------------------------------------------------------------------------------


def test_a_command_that_names_another_folder_waits_for_it(stub):
    commands = {
        "runs/b/0": "st.py --seed 0 --teacher runs/a/0/teacher",
        "runs/c/0": "st.py --seed 0 --pseudo runs/b/0/pseudo",
        "runs/a/0": "st.py --seed 0",
    }
    assert run.run(commands, jobs=3) == {}
    assert stub() == ["runs/a/0", "runs/b/0", "runs/c/0"]
    assert run.run(commands) == {} and len(stub()) == 3  # finished ones are skipped
    with pytest.raises(util.UserError, match="of another command"):
        run.run({"runs/a/0": "st.py --seed 0 --steps 5"})


def test_a_failure_is_named_with_its_log_and_the_same_command_tries_again(stub, monkeypatch):
    commands = {
        "a": "st.py --seed 0 --bad",
        "b": "st.py --seed 0 --teacher a/teacher",
        "c": "st.py --seed 0",
    }
    monkeypatch.setenv("FAIL", "--bad")
    assert run.run(commands) == {"a": "failed, see a/run.log", "b": "not run, since a failed"}
    assert "the disk of this test is full" in Path("a/run.log").read_text()
    assert Path("c/results.json").exists()
    monkeypatch.delenv("FAIL")
    assert run.run(commands) == {} and stub() == ["a", "c", "a", "b"]


def test_sigterm_stops_the_runs_and_says_how_to_go_on(stub, monkeypatch, capsys):
    monkeypatch.setenv("SLOW", "600")
    processes = []
    start = run.start
    monkeypatch.setattr(run, "start", lambda *args: processes.append(start(*args)) or processes[-1])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as end:
        run.run({"a": "st.py --seed 0", "b": "st.py --seed 0"}, jobs=2)
    assert end.value.code == 143 and "the same command resumes" in capsys.readouterr().out
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2


def test_a_study_writes_its_table_and_a_smaller_one_leaves_it(stub, tmp_path):
    zoph.main(["table4", "--seeds", "2", "--init", f"pre={tmp_path}/st.py", "--jobs", "2"])
    r = json.loads(Path("results/table4.json").read_text())
    cells = {c["row"]: c for c in r["cells"]}
    assert list(cells) == r["rows"] and all(c["n"] == 2 for c in cells.values())
    assert cells["random"]["values"][1] - cells["random"]["values"][0] == pytest.approx(1)
    assert [cells[row]["rising"] for row in ("random", "random, longer")] == [False, True]
    assert r["hours"] == round(10 * 7 * 36 / 3600, 2) and str(tmp_path) not in json.dumps(r)
    text = Path("results/table4.md").read_text()
    assert "still rising" in text and "paper 41.1" in text and "SimCLR - random" in text
    dots = xml.dom.minidom.parse("results/table4.svg").getElementsByTagName("circle")
    assert len(dots) == 5 + 5
    with pytest.raises(util.UserError, match="2 seeds of random, 100%, this would leave 1"):
        zoph.main(["table4", "--seeds", "1", "--init", f"pre={tmp_path}/st.py"])


def test_yours_ends_in_one_sentence_of_what_helped(stub, monkeypatch):
    Path("mine/train").mkdir(parents=True)
    zoph.main(["yours", "--recipe", "tiny", "--root", "mine", "--jobs", "2"])
    start = "Nothing was shown to help here, in AP with 95% intervals: self-training from random"
    assert json.loads(Path("results/yours.json").read_text())["verdict"].startswith(start)
    monkeypatch.setitem(sys.modules, "hpt", types.SimpleNamespace(slug=lambda source: "single"))
    reed.main(["yours", "--root", "mine", "--unlabeled", "other", "--jobs", "2"])
    r = json.loads(Path("results/hpt-yours.json").read_text())
    assert r["columns"] == ["base", "own base"] and "HPT (against its base" in r["verdict"]
    r = {"metric": "AP", "columns": ["x"], "differences": []}
    for what, values in (("a - b", [1.0, 1.1, 1.2]), ("c - b", [-1.0, 0.0, 1.0])):
        r["differences"].append({"what": what, "at": "x", **table.interval(values)})
    sentence = table.helped(r, {"a - b": "tea", "c - b": "cake"})
    assert "is tea: +1.1 (+0.9 to +1.3); not shown to help: cake: +0.0" in sentence


# ---- the papers' tables --------------------------------------------------------------------------


@pytest.mark.parametrize("module, name", TABLES)
def test_a_tables_rows_columns_and_comparisons_fit_each_other(module, name):
    rows = module.STUDIES[name]
    grid = planned(module, name)
    names = {name for cell in grid.cells for name in cell}
    columns = {column for _, column in grid.cells}
    assert {name for pair in rows["compare"] for name in pair} <= names
    paper = rows.get("paper", {})
    assert all(row in names and len(paper[row]) == len(columns) for row in paper)
    assert len({row for row, _ in grid.cells}) <= len(set(table.COLOURS))
    folders = {folder for places in grid.cells.values() for folder, _ in places.values()}
    assert folders <= grid.commands.keys()


def test_what_tables_share_has_one_command():
    commands = {}
    for module, name in TABLES:
        for folder, command in planned(module, name).commands.items():
            assert commands.setdefault(folder, command) == command
    assert len([folder for folder in commands if "/s1-0.2/random/" in folder]) == 1


def test_st_accepts_the_flags_of_every_table():
    for module, name in TABLES:
        for command in planned(module, name).commands.values():
            program, *words = command.split()
            if program == "st.py":
                plan, method, _ = util.parse("", st.Plan, recipes.Method, util.Machine, argv=words)
                c = recipes.method(**{**method, "init": "random"})
                assert c.aug in ("s1", "s2", "s3", "s4") and 0 < plan["labeled"] <= 1


def test_a_large_recipe_needs_weights_and_takes_its_own_folder():
    with pytest.raises(util.UserError, match="needs weights: --init pre=FILE"):
        planned(zoph, "table4", "--recipe", "coco-b7", "--root", "COCO")
    files = ("--init", "a.pth", "simclr=b.pth")
    grid = planned(
        zoph, "table4", "--recipe", "coco-b7", "--root", "COCO", *files, "--", "--lr", "1"
    )
    assert not [folder for folder in grid.commands if not folder.startswith("runs/study/coco-b7/")]
    assert all("--root COCO" in c and "--lr 1" in c for c in grid.commands.values())


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", range(1, 10))
def test_t_quantiles_leave_a_fortieth_above(df):
    """Student's density is integrated numerically, in x = tan(angle)."""
    angle = np.linspace(0, math.atan(table.T975[df - 1]), 20001)
    x = np.tan(angle)
    density = (1 + x**2 / df) ** (-(df + 1) / 2) * (1 + x**2)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert 0.5 + constant * np.trapezoid(density, angle) == pytest.approx(0.975, abs=2e-5)


def cell(row, column, values, seeds=None, rising=False):
    seeds = list(range(len(values))) if seeds is None else seeds
    return {"row": row, "column": column, "values": values, "seeds": seeds, "rising": rising}


def test_differences_are_paired_by_seed():
    cells = [cell("a", "x", [10.0, 20.0, 30.0]), cell("b", "x", [29.0, 8.5], seeds=[2, 0])]
    cells += [cell("a", "z", [4.0, 1.0])]
    assert table.contrast(cells, [("a", "x")], [("b", "x")]) == [1.5, 1.0]  # seeds 0 and 2
    assert table.contrast(cells, [("c", "x")], [("a", "x")]) == []
    assert table.contrast(cells, [("a", "*")]) == [6.0, 19.0]
    rows = table.differences([("a", "b"), ("x", "z")], ["a", "b"], ["x", "z"], cells)
    shown = [(d["what"], d["at"], d["values"]) for d in rows]
    assert shown == [("a - b", "x", [1.5, 1.0]), ("x - z", "a", [6.0, 19.0])]
    assert table.rise([[50, 0.1], [100, 0.6]]) == pytest.approx(0.2)  # 80 lies between


# ---- findings ------------------------------------------------------------------------------------


def test_the_findings_are_those_of_the_committed_results():
    text = table.findings(ROOT / "results", {**zoph.FINDINGS, **reed.FINDINGS})
    assert text == (ROOT / "results/findings.md").read_text()


def test_findings_name_only_cells_that_the_tables_have():
    grids = {name if m is zoph else f"hpt-{name}": planned(m, name) for m, name in TABLES}
    for _, contrasts in [*zoph.FINDINGS.values(), *reed.FINDINGS.values()]:
        for name, plus, minus in contrasts:
            cells = grids[name].cells
            rows = {row for row, _ in cells}
            assert all(c in cells or (c[1] == "*" and c[0] in rows) for c in [*plus, *minus])


def test_verdicts_follow_the_intervals(tmp_path):
    claims = {"0": ("rises", [("x", [("a", "1")], [("b", "1")])])}

    def found(a, b, rising=False):
        cells = [cell("a", "1", a, rising=rising), cell("b", "1", b)]
        result = {"world": "", "task": "", "metric": "", "seeds": 3, "cells": cells}
        (tmp_path / "x.json").write_text(json.dumps(result))
        return table.findings(tmp_path, claims).split("**")[1]

    assert table.findings(tmp_path, claims).split("**")[1] == "not run"
    assert found([3.0, 3.1, 3.2], [1.0, 1.0, 1.0]) == "holds"
    assert found([3.0, 3.1, 3.2], [1.0, 1.0, 1.0], rising=True) == "unclear"
    assert found([3.0, 3.1, 3.2], [1.0, 1.0, 1.0], rising=None) == "unclear"
    assert found([3.0, 3.1], [1.0, 1.0]) == "unclear"  # two seeds
    assert found([1.0, 1.0, 1.0], [3.0, 3.1, 3.2]) == "does not hold"
    assert found([1.0, 3.0, 5.0], [3.0, 3.0, 3.0]) == "unclear"
