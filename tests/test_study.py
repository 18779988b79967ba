"""Studies: what is shared runs once, a killed study ends with the same files, and the arithmetic of tables and verdicts.
Most tests put a stub in place of st.py: a few lines with the same flags, stages and results.json."""
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import hpt
import recipes
import studies
import study
import tables
import util
import world

STUB = '''
import fcntl, hashlib, json, os, signal, sys, time
from pathlib import Path
args = sys.argv[1:]
out = Path(args[args.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
lock = open(out / ".lock", "w")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(f"error: {out} is in use by another process; wait for it")
def note(*what):
    with open(os.environ["NOTES"], "a") as f:
        f.write(" ".join(map(str, what)) + "\\n")
    if os.environ.get("KILL") and len(open(os.environ["NOTES"]).readlines()) >= int(os.environ["KILL"]):
        os.killpg(0, signal.SIGKILL)  # the study with it
note("started", out, " ".join(args))
if os.environ.get("BUSY") and not Path("busy").exists():
    Path("busy").touch()
    sys.exit("error: this folder is in use by another process; wait for it\\nteacher 1/100 of that other one")
if os.environ.get("FAIL", "no such flag") in " ".join(args):
    sys.exit("progress 1\\rprogress 2\\nerror: the disk of this test is full")
if "--init" in args and "/seed" in args[args.index("--init") + 1]:
    start = Path(args[args.index("--init") + 1])
    assert start.is_file() if start.suffix else (start / "stage.json").exists()
results, seed = {}, int(args[args.index("--seed") + 1])
stages = ["teacher"] + ["pseudo", "student"] * ("train" not in args) + ["control"] * ("--control" in args)
if "--stage" in args:  # hpt.py
    source, _, mode = args[args.index("--stage") + 1].partition(":")
    folder = out / f"1_{mode if mode == 'stats' else 'bn' if mode.endswith('bn') else 'all'}_{source}"
    folder.mkdir(exist_ok=True)
    (folder / "backbone.pt").touch()
if "--stage" in args or "--eval" in args:
    stages = args[args.index("--eval") + 1].split(",") if "--eval" in args else []
    stages = [f"{way}, {n}" for n in (1, 3, 10) for way in ("S+T", "MME")] if stages == ["mme"] else stages
for stage in stages:
    path = out / stage / "stage.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        time.sleep(float(os.environ.get("SLOW", 0)))
        number = int(hashlib.sha256(f"{out.parent.name} {stage}".encode()).hexdigest()[:4], 16) % 100 / 1000 + 0.01 * seed
        result = {"AP": number, "mIoU": number, "accuracy": number, "seconds": 36.0, "weights": f"{out} {stage}",
                  "curve": [[80, number - 0.02 * (stage == "student")], [100, number]]}
        deps = {"teacher": results["teacher"]["weights"]} if "teacher" in results else {}
        path.with_suffix(".tmp").write_text(json.dumps({"deps": deps, "result": result}))
        note("computed", out, stage)
        os.replace(path.with_suffix(".tmp"), path)
    results[stage] = json.loads(path.read_text())["result"]
(out / "results.tmp").write_text(json.dumps(results))
os.replace(out / "results.tmp", out / "results.json")
'''

@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Calls study.main with the stub as st.py, results in tmp_path/results -> what the stub noted, as lists of words."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr(study, "PROGRAMS", dict.fromkeys(study.PROGRAMS, [sys.executable, "-IS", str(tmp_path / "stub.py")]))
    monkeypatch.setattr(study, "POLL", 0.01)
    monkeypatch.setattr(study.world, "build", lambda *_: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: None)

    def call(*args):
        study.main([args[0], "--jobs", "2", *map(str, args[1:])])
        return notes(tmp_path)
    return call


def notes(tmp_path):
    return [line.split() for line in (tmp_path / "notes").read_text().splitlines()] if (tmp_path / "notes").exists() else []


def computed(lines):
    """How often each stage of each run was computed, from end to end."""
    return Counter((w[1], w[2]) for w in lines if w[0] == "computed")


def files(folder, name):
    """Without the hours by the clock."""
    texts = {suffix: (folder / f"{name}{suffix}").read_text() for suffix in (".json", ".md", ".svg")}
    return {suffix: re.sub(r'"wall": [\d.]+|[\d.]+ by the clock', "", text) for suffix, text in texts.items()}


# ---- running -----------------------------------------------------------------------------------------------------

def test_what_studies_share_is_computed_once(stub, tmp_path):
    stub("table2", "--seeds", 2)
    lines = stub("table3", "--seeds", 2, "--only", "random", "random, self-trained")
    done = json.loads((tmp_path / "results/table3.json").read_text())
    first = {(c["row"], c["column"]): c for c in json.loads((tmp_path / "results/table2.json").read_text())["cells"]}
    third = {(c["row"], c["column"]): c for c in done["cells"]}
    assert third["random", "100%"]["run"] == first["random", "S4"]["run"]
    assert third["random, self-trained", "100%"]["values"] == first["random, self-trained", "S4"]["values"]
    starts = Counter(w[1] for w in lines if w[0] == "started")
    assert set(starts.values()) == {1} and len(starts) == 2 * (9 + 2)  # 4 + 4 + pre; 20% and 50%
    lines = stub("regime", "--seeds", 2)  # supervised runs take over the teachers that are there
    assert set(computed(lines).values()) == {1} and not any("mode-train" in run and "aug-s4" in run and "init" not in run
                                                            for run, _ in computed(lines))
    table, regime = (json.loads((tmp_path / f"results/{n}.json").read_text()) for n in ("table3", "regime"))
    assert [c["values"] for c in regime["cells"]] == [c["values"] for c in table["cells"][:3]] and regime["cells"][0]["n"] == 2


def test_alpha_shares_teacher_pseudo_labels_and_control(stub, tmp_path):
    did = computed(stub("alpha", "--seeds", 1))
    assert Counter(stage for _, stage in did) == {"teacher": 1, "pseudo": 1, "control": 1, "student": 10}
    did = computed(stub("threshold", "--task", "seg", "--results", "seg"))  # masks hold their threshold
    masks = Counter(stage for run, stage in did if "seg-" in run and "seed0" in run)
    assert masks == {"teacher": 1, "control": 1, "pseudo": 4, "student": 4}  # the recipe's is one of the four
    did = computed(stub("threshold", "--seeds", 1))  # auto holds labels out: another teacher than for a number
    boxes = Counter(stage for run, stage in did if "det-" in run and "threshold" in run)
    assert boxes == {"teacher": 1, "control": 1, "pseudo": 1, "student": 4}


def test_pre_training_comes_first_and_with_the_same_seed(stub):
    lines = stub("table4", "--seeds", 2)
    order = [w[1] for w in lines if w[0] == "started"]
    for w in lines:
        if "--init" in w:
            start = Path(w[w.index("--init") + 1])
            folder, = ({str(p) for p in start.parents} & set(order[:order.index(w[1])]))
            assert Path(folder).name == Path(w[1]).name  # the seed's
    assert sum("--init" in w for w in lines) == 4


def test_a_chain_of_hpt_is_shared_by_its_studies(stub, tmp_path):
    for name in ("hpt-linear", "hpt-semi", "hpt-chain", "hpt-fraction"):
        lines = stub(name, "--seeds", 1)
    starts = {w[1]: w for w in lines if w[0] == "started"}
    assert set(Counter(w[1] for w in lines if w[0] == "started").values()) == {1}
    first = {w[w.index("--stage") + 1] for w in starts.values() if "--eval" not in w}
    assert first == {"single:2000", "strokes:400", "sketch:400"}
    last = [w for w in starts.values() if w[w.index("--stage") + 1] == "sketch:400:bn" and "--fraction" not in w]
    assert {Path(w[w.index("--init") + 1]).parent.name for w in last} == {"1_all_single", "1_all_strokes"} and len(last) == 2
    cells = {n: json.loads((tmp_path / f"results/{n}.json").read_text())["cells"] for n in ("hpt-linear", "hpt-semi", "hpt-chain")}
    assert all(c["n"] == 1 for some in cells.values() for c in some)
    assert cells["hpt-linear"][0]["values"] != cells["hpt-semi"][0]["values"]
    hpt_400, chain = ({c["column"]: c["values"] for c in cells[n] if c["row"] == row}
                      for n, row in (("hpt-semi", "HPT, 400"), ("hpt-chain", "B+T")))
    assert hpt_400 == chain and "rising" not in (tmp_path / "results/hpt-linear.md").read_text()


def test_budgets_of_mme_are_columns_of_one_run(stub, tmp_path):
    lines = stub("hpt-mme", "--seeds", 1)
    assert len({w[1] for w in lines}) == 4  # base, chain, and both with its own start
    cells = {(c["row"], c["column"]): c for c in json.loads((tmp_path / "results/hpt-mme.json").read_text())["cells"]}
    assert len(cells) == 12 and all(c["n"] == 1 for c in cells.values())
    assert len({c["run"] for (row, _), c in cells.items() if row.startswith("HPT")}) == 1
    assert len({c["stage"] for c in cells.values()}) == 6


def test_failures_are_named_and_everything_else_is_carried_on(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "--task cls")
    with pytest.raises(util.UserError, match=r"2 of \d+ runs failed or were skipped"):
        stub("table4", "--seeds", 1)
    said = capsys.readouterr().out
    assert "failed (1): error: the disk of this test is full" in said and "skipped: pre_" in said
    cells = {c["row"]: c for c in json.loads((tmp_path / "results/table4.json").read_text())["cells"]}
    assert [cells[row]["n"] for row in ("random, self-trained", "SimCLR", "pre-trained")] == [1, 1, 0]
    assert cells["pre-trained"]["empty"] == "failed"
    monkeypatch.delenv("FAIL")
    stub("table4", "--seeds", 1)  # the same command tries again
    assert json.loads((tmp_path / "results/table4.json").read_text())["cells"][3]["n"] == 1


def fork(said, *args, **environment):
    """study.main(args) in a process group of its own, without the seconds that its imports take -> process id."""
    if pid := os.fork():
        return pid
    os.setsid()
    os.environ.update(environment)
    study.torch.cuda.device_count = lambda: 0  # CUDA does not survive a fork
    sys.stdout, code = open(said, "w", buffering=1), 1
    try:
        study.main([args[0], "--jobs", "2", *args[1:]])
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_moment_and_run_again_the_files_are_the_same(stub, tmp_path):
    stub("table4", "--seeds", 2, "--out", "whole", "--results", "whole-results")
    whole = files(tmp_path / "whole-results", "table4")
    (tmp_path / "notes").unlink()
    args = ("table4", "--seeds", "2", "--out", "killed", "--results", "killed-results")
    said, some = tmp_path / "said", {}
    for moment in (2, 5, 9, 12):  # as many starts and ends of stages, over all attempts
        assert ended(fork(said, *args, KILL=str(moment))) == -signal.SIGKILL
        assert len(some) <= len(computed(notes(tmp_path))) < 14
        some = computed(notes(tmp_path))
    assert len(some) > 1
    assert ended(fork(said, *args)) == 0
    did = computed(notes(tmp_path))
    assert len(did) == 14 and sum(did.values()) <= 14 + 4 * 2  # what the two runs at work had not yet kept at each kill
    again = files(tmp_path / "killed-results", "table4")
    assert {k: t.replace("killed", "whole") for k, t in again.items()} == whole
    count = len(notes(tmp_path))
    assert ended(fork(said, *args)) == 0 and len(notes(tmp_path)) == count  # nothing runs again
    assert files(tmp_path / "killed-results", "table4") == again


def test_sigterm_reaches_the_runs_and_the_line_says_how_to_go_on(stub, tmp_path):
    pid = fork(tmp_path / "said", "regime", SLOW="600")
    while not notes(tmp_path):
        time.sleep(0.01)
    began = time.time()
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143 and "the same command resumes" in (tmp_path / "said").read_text()
    assert time.time() - began < 500  # a stub by itself takes longer
    assert not any(study.taken(tmp_path / w[1]) for w in notes(tmp_path))  # no run is left behind


def test_two_studies_on_the_same_folder_share_the_work(stub, tmp_path):
    both = [fork(tmp_path / name, "table4", "--seeds", "2", "--results", f"{name}-results", SLOW="0.2")
            for name in ("one", "two")]
    assert [ended(pid) for pid in both] == [0, 0]
    assert set(computed(notes(tmp_path)).values()) == {1}
    one, two = (json.loads((tmp_path / f"{name}-results/table4.json").read_text())["cells"] for name in ("one", "two"))
    assert one == two and all(c["n"] == 2 for c in one)


def test_a_run_in_other_hands_is_waited_for(stub, tmp_path):
    stub("regime", "--seeds", 1)
    name = next(w[1] for w in notes(tmp_path))
    (tmp_path / name / "results.json").rename(tmp_path / "kept")
    lock = subprocess.Popen([sys.executable, "-ISc", f"""import fcntl, os, time
f = open({str(tmp_path / name / '.lock')!r}, "w")
fcntl.lockf(f, fcntl.LOCK_EX)
print("held", flush=True)
input()
os.rename({str(tmp_path / 'kept')!r}, {str(tmp_path / name / 'results.json')!r})"""],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert lock.stdout.readline() == "held\n"
    pid = fork(tmp_path / "said", "regime", "--seeds", "1")
    while not (tmp_path / "said").exists() or "being done elsewhere" not in (tmp_path / "said").read_text():
        time.sleep(0.01)
    count = len(notes(tmp_path))
    lock.communicate("go on\n")
    assert ended(pid) == 0 and len(notes(tmp_path)) == count


def test_one_that_was_slower_tries_again_whatever_the_other_has_logged_since(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("BUSY", "1")
    lines = stub("regime", "--seeds", 1, "--only", "20%")
    assert [w[0] for w in lines] == ["started", "started", "computed"]
    (tmp_path / lines[0][1] / "results.json").unlink()
    monkeypatch.setenv("FAIL", "--task det")
    with pytest.raises(util.UserError, match="1 of 1 runs failed"):  # what the log said before this start is past
        stub("regime", "--seeds", 1, "--only", "20%")


def test_a_failure_of_the_study_itself_leaves_no_run_behind(stub, monkeypatch):
    started, launch, write_json = [], study.launch, study.runs.write_json

    def once(*args):
        if started:
            raise OSError("the first error")
        started.append(launch(*args)[0])
        return started[0], 0

    def write(path, value):
        if "wall" in path.name:
            raise util.UserError("the second error")
        write_json(path, value)
    monkeypatch.setenv("SLOW", "600")
    monkeypatch.setattr(study, "launch", once)
    monkeypatch.setattr(study.runs, "write_json", write)
    with pytest.raises(OSError, match="the first error"):
        stub("regime", "--seeds", 1)
    assert started[0].poll() is not None


def test_a_run_keeps_the_precision_it_began_with_and_adopts_no_other(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(util, "precision", lambda *_: torch.bfloat16)
    first, _ = stub("regime", "--seeds", 1, "--only", "20%")
    monkeypatch.setattr(util, "precision", lambda *_: torch.float32)
    (tmp_path / first[1] / "results.json").unlink()
    again = stub("regime", "--seeds", 1, "--only", "20%")[-1]
    lines = stub("table3", "--seeds", 1, "--only", "20%", "random")
    other, = (w for w in lines if w[0] == "started" and "--control" in w)
    assert [w[w.index("--precision") + 1] for w in (first, again, other)] == ["bf16", "bf16", "fp32"]
    assert computed(lines)[other[1], "teacher"] == 1  # though that of the first run was there


def test_pseudo_labels_and_control_are_adopted_with_their_own_teacher_only(stub, tmp_path):
    stub("student-init", "--seeds", 1, "--only", "from its teacher")
    _, found = study.plan(studies.STUDIES["alpha"], study.arguments(["alpha"]))
    own, adopting = (f"runs/study/{next(n for n, f in found.items() if f.get('alpha') == a)}/seed0" for a in ("2", "4"))
    (tmp_path / own / "teacher").mkdir(parents=True)
    (tmp_path / own / "teacher/stage.json").write_text(json.dumps({"deps": {}, "result": {"AP": 0.5, "weights": "other"}}))
    did = computed(stub("alpha", "--seeds", 1, "--only", "2", "4", "self-trained"))
    assert [did[own, s] for s in ("pseudo", "control")] == [1, 1] and [did[adopting, s] for s in ("pseudo", "control")] == [0, 0]


def test_a_stage_that_cannot_be_copied_is_one_line_and_leaves_nothing(stub, tmp_path, monkeypatch):
    stub("regime", "--seeds", 1, "--only", "20%")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space here")
    with monkeypatch.context() as m, pytest.raises(util.UserError, match="cannot copy .*no space here"):
        m.setattr(study.shutil, "copytree", full)
        stub("table3", "--seeds", 1, "--only", "20%", "random")
    folder, = {p.parent for p in Path("runs/study").glob("*/seed0/run.json")} - {Path(notes(tmp_path)[0][1])}
    (folder / ".adopt-killed/teacher").mkdir(parents=True)
    did = computed(stub("table3", "--seeds", 1, "--only", "20%", "random"))
    assert not list(folder.glob(".adopt-*")) and [did[str(folder), s] for s in ("teacher", "control")] == [0, 1]


def test_the_world_is_drawn_once_beforehand_and_only_where_it_is_read(stub, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(world, "build", lambda root, part: drawn.append((root, part)))
    stub("table3", "--seeds", 1, "--only", "20%", "random", "pre-trained")
    assert drawn == [("datasets/shapes", part) for part in ("det", "single", "unlabeled")]
    stub("table2", "--seeds", 1, "--only", "S1", "random", "--world", "coco", "--root", "COCO", "--unlabeled",
         "COCO/unlabeled2017", "--results", "coco")
    assert len(drawn) == 3

    def full(*_):
        raise OSError("no such place")
    monkeypatch.setattr(world, "build", full)
    with pytest.raises(util.UserError, match="cannot draw the embedded world in datasets/shapes"):
        stub("regime", "--seeds", 1)


def test_results_do_not_name_the_machines_folders(stub, tmp_path):
    for name in ("x.pth", "s.pth"):
        (tmp_path / name).write_text(name)
    stub("table4", "--seeds", 1, "--root", tmp_path / "shapes", "--out", tmp_path / "runs", "--results", tmp_path / "results",
         "--init", f"pre++={tmp_path}/x.pth", f"simclr=simclr:{tmp_path}/s.pth")
    assert not any(str(tmp_path) in text for text in files(tmp_path / "results", "table4").values())


@pytest.mark.parametrize("other", [["--task", "seg"], ["--recipe", "coco-r50"], ["--root", "others"], ["--", "--steps", "5"]])
def test_results_of_something_else_are_not_overwritten(stub, tmp_path, other):
    stub("regime", "--seeds", 1, "--only", "20%")
    before = files(tmp_path / "results", "regime")
    line = f"results/regime.json is of .*; give another --results for '{' '.join(other[1:])}'"
    with pytest.raises(util.UserError, match=line):
        stub("regime", "--seeds", 1, "--only", "20%", *other)
    assert files(tmp_path / "results", "regime") == before
    stub("regime", "--seeds", 1, "--only", "20%", "--results", "others", *other)
    walls = {p.name for p in (tmp_path / "runs/study").glob("*.wall.json")}
    assert walls == {f"regime-{task}-shapes.wall.json" for task in ("det", *["seg"] * ("seg" in other))}


def test_a_smaller_command_does_not_empty_a_table(stub, tmp_path):
    stub("regime", "--seeds", 3)
    before = files(tmp_path / "results", "regime")
    with pytest.raises(util.UserError, match="results/regime.json has 3 seeds of random, 20%, and this command would leave 1"):
        stub("regime", "--seeds", 1)
    with pytest.raises(util.UserError, match="3 seeds of random, 50%, and this command would leave 0"):
        stub("regime", "--seeds", 3, "--only", "20%", "--out", "elsewhere")
    stub("regime", "--seeds", 3, "--only", "20%")  # the others lie where they did
    assert files(tmp_path / "results", "regime")[".svg"] == before[".svg"]


def test_folders_that_cannot_be_made_are_one_line(stub, tmp_path):
    (tmp_path / "file").write_text("")
    for flag, folder in (("--out", "file/runs"), ("--results", "file")):
        with pytest.raises(util.UserError, match=f"^{flag} {folder} cannot be made"):
            stub("regime", "--seeds", 1, flag, folder)


def test_yours_ends_in_a_sentence(stub, tmp_path, capsys):
    stub("yours", "--data", "coco", "--root", "DIR", "--init", "imagenet", "--", "--backbone", "resnet18", "--steps", "12")
    command = next(w for w in notes(tmp_path) if w[0] == "started")
    assert command[command.index("--steps") + 1] == "12" and "--labeled 0.2" in " ".join(command)
    said = capsys.readouterr().out
    assert "What helped here" in said or "Nothing was shown to help here" in said


@pytest.mark.parametrize("init, line", [("imagenet", "no ImageNet weights for resnet10"), ("nowhere.pth", "is not a file")])
def test_weights_that_are_not_there_are_named_before_anything_starts(stub, tmp_path, init, line):
    with pytest.raises(util.UserError, match=line):
        stub("yours", "--data", "coco", "--root", "DIR", "--init", init)
    with pytest.raises(util.UserError, match=f"^--init {init}: "):
        stub("hpt-linear", "--init", init)
    assert not notes(tmp_path)


# ---- flags -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in studies.STUDIES if n == "hpt-detect" or not n.startswith("hpt-")])
@pytest.mark.parametrize("world_, task", [("shapes", "det"), ("shapes", "seg"), ("coco", "det"), ("voc", "seg")])
def test_st_accepts_the_flags_of_every_study(name, world_, task):
    if name == "yours" and world_ == "shapes" or name == "hpt-detect" and task != "det":
        return
    init = ["base=", "target=", "hpt=", "hpt-bn="] if name == "hpt-detect" else ["", "pre++=", "simclr="]
    o = study.arguments([name, "--world", world_, "--task", task, "--root", "a folder", "--unlabeled", "others", "--joint",
                         "single", "--init", *(i + "imagenet" for i in init)])
    cells, found = study.plan(studies.STUDIES[name], o)
    assert found and all("run" in c for c in cells)
    for flags in found.values():
        argv = [w for k, v in flags.items() for w in ["--" + k.replace("_", "-")] + ([] if v is True else [v])]
        parsed = util.parse_flags(recipes.Config, "", recipes.HELP, argv)
        assert recipes.settings(parsed, 1)["aug"] in ("s1", "s2", "s3", "s4") and parsed.root == "a folder"


@pytest.mark.parametrize("name", [n for n in studies.STUDIES if n.startswith("hpt-") and n != "hpt-yours"] + ["table4"])  # and pre-training for st.py
def test_hpt_accepts_the_flags_of_every_study(name):
    cells, found = planned(name, "--root", "a folder", "--", "--backbone", "resnet18")
    some = [flags for flags in found.values() if "program" in flags]
    assert some and all("run" in c for c in cells)
    for flags in some:
        argv = [w for k, v in flags.items() if k != "program" for w in ["--" + k] + ([] if v is True else [v])]
        parsed = util.parse_flags(hpt.Config, "", hpt.HELP, argv)
        source, *_ = hpt.parse(*(parsed.stage or [parsed.data]))
        assert hpt.settings(parsed, 1)["backbone"] == "resnet18" and parsed.root == "a folder" and source in hpt.EMBEDDED


def test_a_cell_that_cannot_be_run_says_what_it_needs():
    cells, _ = study.plan(studies.STUDIES["table7"], study.arguments(["table7", "--world", "coco", "--root", "x"]))
    assert {c["empty"] for c in cells} >= {"needs --unlabeled"} and not any("run" in c for c in cells)


def planned(*args):
    return study.plan(studies.STUDIES[args[0]], study.arguments([*args]))


def test_yours_without_weights_leaves_their_cells_empty():
    cells, _ = planned("yours", "--data", "coco", "--root", "x")
    assert {c["row"][:6]: c.get("empty") for c in cells} == {"random": None, "pre-tr": "needs weights: --init FILE"}


def test_hpt_on_your_images_starts_from_the_embedded_base_and_from_one_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signs/train/a").mkdir(parents=True)
    cells, found = planned("hpt-yours", "--root", "signs")
    assert {c["column"] + c["row"] for c in cells if "empty" in c} == {"own base" + r for r in ("Base", "HPT", "HPT-BN")}
    assert "--unlabeled" in cells[1]["empty"] and {f["root"] for f in found.values()} == {recipes.Config.root}
    cells, found = planned("hpt-yours", "--root", "signs", "--unlabeled", "letters/train")
    run = {(c["row"], c["column"]): found[c["run"]] for c in cells}
    assert run["HPT", "base"]["stage"] == "signs/train:400" and run["HPT-BN", "own base"]["stage"] == "signs/train:400:bn"
    assert run["Target", "base"] == run["Target", "own base"] and "init" not in run["Target", "base"]
    assert run["HPT", "own base"]["init"].endswith("/1_all_train/backbone.pt") and {f["stage"] for f in found.values()} >= {
        "single:2000", "letters/train:2000"}
    with pytest.raises(util.UserError, match="elsewhere has no folder train/"):
        planned("hpt-yours", "--root", "elsewhere")


def test_what_a_base_of_ones_own_sees_is_not_what_is_reported_on(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "signs" / place).mkdir(parents=True)
        for k in range(3):
            PIL.Image.new("RGB", (8, 8)).save(tmp_path / "signs" / place / f"{k}.png")
    for unlabeled, match in (("signs", "has 6 images that --data reports on"), ("nowhere", "no image found at --stage nowhere")):
        if unlabeled == "signs":
            (tmp_path / "all.txt").write_text("\n".join(map(str, sorted((tmp_path / "signs").rglob("*.png")))))
            unlabeled = "all.txt"
        with pytest.raises(util.UserError, match=match):
            stub("hpt-yours", "--root", "signs", "--unlabeled", unlabeled)
    (tmp_path / "signs/val").rename(tmp_path / "gone")
    with pytest.raises(util.UserError, match="val"):
        stub("hpt-yours", "--root", "signs")
    assert not notes(tmp_path)


def test_joint_training_on_the_embedded_world_brings_no_folder_of_single_objects():
    assert "single" not in study.words(study.arguments(["table7", "--world", "coco", "--joint", "shapes"]))
    assert study.words(study.arguments(["table7", "--joint", "shapes"]))["single"].endswith("single/extra")


def test_pre_training_has_the_network_and_the_machine_of_what_starts_from_it():
    _, found = planned("table4", "--recipe", "coco-r50", "--", "--norm", "gn", "--device", "cpu", "--batch", "4")
    first, = (f for f in found.values() if f.get("task") == "cls")
    assert (first["backbone"], first["norm"], first["device"]) == ("resnet50", "gn", "cpu") and "batch" not in first
    _, found = planned("table4", "--recipe", "coco-r50", "--", "--backbone", "resnet18")
    assert {f["backbone"] for f in found.values()} == {"resnet18"}


def test_runs_of_hpt_depend_on_its_recipe_and_pre_training_on_no_flag_of_theirs(monkeypatch):
    flags = {"program": "hpt", "recipe": "tiny"}
    before = study.basis(flags)
    monkeypatch.setitem(recipes.RECIPES, "tiny", {})
    assert study.basis(flags) == before
    monkeypatch.setitem(hpt.RECIPES, "tiny", {})
    assert study.basis(flags) != before
    starts = [{n for n in planned("hpt-linear", "--", *more)[1] if n.startswith("base")} for more in ([], ["--lr", "0.1"])]
    assert starts[0] == starts[1] and starts[0]
    runs_ = [planned(name)[1] for name in ("hpt-linear", "hpt-augment", "hpt-fraction")]
    shared = set(runs_[0]) & set(runs_[1]) & set(runs_[2])
    assert len(shared) == 2  # base; HPT on all of sketch under the usual views


def test_what_a_run_starts_from_is_started_however_far_back(stub):
    lines = stub("hpt-chain", "--seeds", 1, "--only", "B+S+T", "sketch")
    assert len([w for w in lines if w[0] == "started"]) == 3  # base, chain, the cell


def test_other_weights_in_the_same_file_are_another_run(tmp_path):
    path, names = tmp_path / "x.pth", []
    for time_, text in enumerate("aab"):
        path.write_text(text)
        os.utime(path, (time_, time_))
        names.append(set(planned("table4", "--init", str(path))[1]))
    assert names[0] == names[1] and len(names[0] - names[2]) == 1


@pytest.mark.parametrize("args, line", [
    (["yours"], "give --data coco or voc"), (["table2", "--init", "pre="], "lacks weights"),
    (["table2", "--only", "S9"], "table2 has only random; "), (["table2", "--recipe", "x"], "--recipe x does not exist"),
    (["table2", "--seeds", "0"], "must be 1 or more"), (["table2", "--world", "voc", "--task", "det"], "not for --task det"),
    (["table2", "--", "--labeled", "1"], "^--labeled after --"), (["table2", "--", "--root", "x"], "^--root after --"),
    (["table2", "--", "--stepz", "1"], "no flag --stepz"), (["table2", "--", "steps"], "no flag"),
    (["regime", "--labeled", "0.1"], "^--labeled is for yours"),
    (["hpt-linear", "--task", "seg"], "leave out --task"), (["hpt-linear", "--init", "pre=x"], "it has base"), (["hpt-linear", "--init", "chain=x"], "it has base$"),
    (["hpt-detect", "--recipe", "voc-c4"], "hpt-detect has its own"), (["hpt-linear", "--recipe", "coco-b7"], "--recipe coco-b7 does not"),
    (["hpt-linear", "--", "--loss-norm", "off"], "hpt.py has no flag --loss-norm"),
    (["table2", "--", "--aug", "s1"], "^--aug after -- is what table2 varies"),
    (["alpha", "--", "--alpha", "1"], "^--alpha after -- is what alpha varies")])
def test_wrong_arguments_end_in_one_line(args, line):
    with pytest.raises(util.UserError, match=line):
        planned(*args)


# ---- numbers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("df", [1, 2, 3, 5, 9, 10, 14, 30, 200])
def test_t_quantiles_leave_a_fortieth_above(df):
    """Student's density is integrated numerically, in x = tan(angle)."""
    angle = np.linspace(0, math.atan(tables.t_quantile(df)), 20001)
    x = np.tan(angle)
    density = (1 + x ** 2 / df) ** (-(df + 1) / 2) * (1 + x ** 2)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert 0.5 + constant * np.trapezoid(density, angle) == pytest.approx(0.975, abs=2e-5)


def test_intervals():
    d = tables.interval([1.0, 2.0, 3.0])
    assert (d["mean"], d["n"]) == (2.0, 3) and d["high"] == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert d["low"] == pytest.approx(4 - d["high"]) and tables.interval([1.0])["low"] is None


def cell(row, column, values, seeds=None, rising=False):
    return {"row": row, "column": column, "values": values, "seeds": list(range(len(values))) if seeds is None else seeds,
            "rising": rising}


def test_differences_are_paired_by_seed():
    cells = [cell("a", "x", [10.0, 20.0, 30.0]), cell("b", "x", [29.0, 8.5], seeds=[2, 0]), cell("a", "y", [1.0]),
             cell("b", "y", []), cell("a", "z", [4.0, 1.0])]
    assert tables.contrast(cells, [("a", "x")], [("b", "x")]) == [1.5, 1.0]  # seeds 0 and 2
    assert tables.contrast(cells, [("a", "y")], [("b", "y")]) == [] == tables.contrast(cells, [("c", "x")], [("a", "x")])
    assert tables.contrast(cells, [("a", "*")]) == [9.0]  # only seed 0 is in every column
    table = {"rows": {"a": 0, "b": 0}, "columns": {"x": 0, "y": 0, "z": 0}, "compare": [("a", "b"), ("x", "z")]}
    found = tables.differences(table, cells)
    assert [(d["what"], d["at"], d["values"]) for d in found] == [("a - b", "x", [1.5, 1.0]), ("x - z", "a", [6.0, 19.0])]


def test_still_rising_is_a_gain_of_a_point_in_the_last_fifth(tmp_path):
    assert tables.rise([[50, 0.1], [100, 0.6]]) == pytest.approx(0.2)  # 80 lies between
    for gain, rising in ((0.012, True), (0.008, False)):
        (tmp_path / "r/seed0").mkdir(parents=True, exist_ok=True)
        stage = {"AP": 0.3, "curve": [[40, 0.0], [80, 0.3 - gain], [100, 0.3]]}
        (tmp_path / "r/seed0/results.json").write_text(json.dumps({"teacher": stage}))
        found = tables.read_cell(tmp_path, {"row": "a", "column": "b", "stage": "teacher", "run": "r"}, "AP", 2)
        assert found["rising"] is rising and found["steps"] == 100 and found["values"] == [30.0] and found["sd"] is None


def test_pictures_are_well_formed_and_escape_names(stub, tmp_path):
    stub("table4", "--seeds", 1)
    r = json.loads((tmp_path / "results/table4.json").read_text())
    shown = sum(c["n"] > 0 for c in r["cells"])
    assert shown == 5 and len(xml.dom.minidom.parseString(tables.svg(r)).getElementsByTagName("circle")) == shown + len(r["rows"])
    assert "still rising" in tables.markdown(r) and "paper 41.1" in tables.markdown(r)
    assert "convergence unknown" in tables.markdown({**r, "cells": [{**c, "rising": None} for c in r["cells"]]})
    r = {**r, "title": "a < b & c", "cells": [{**c, "n": 0} for c in r["cells"]]}
    xml.dom.minidom.parseString(tables.svg(r))  # nor does a table without numbers fail


def test_every_row_of_a_table_has_a_colour_of_its_own():
    assert max(len(s["rows"]) for s in studies.STUDIES.values()) <= len(set(tables.COLOURS))


# ---- findings ----------------------------------------------------------------------------------------------------

def test_verdicts_follow_the_intervals(tmp_path):
    def write(name, cells):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "world": "shapes", "task": "det", "metric": "AP", "seeds": 3, "cells": cells}))

    def verdicts():
        lines = [line.split("|") for line in tables.findings(tmp_path).splitlines() if line.startswith("| (")]
        return {w[1].split()[0].strip("()"): w[2].strip(" *") for w in lines}
    assert verdicts() == dict.fromkeys("0abcdefghijkl", "not run")
    regime = [cell("random", c, [v, v + 0.1, v - 0.1]) for c, v in (("20%", 10), ("50%", 20), ("100%", 30))]
    write("regime", regime)
    write("table3", [cell(r, c, [v, v + 1, v + 2]) for c in ("20%", "50%", "100%")
                     for r, v in (("random", 10), ("random, longer", 12), ("random, self-trained", 11))])
    write("alpha", [cell("self-trained", a, [10.0 + k, 10.1, 10.0]) for k, a in enumerate("124")]
          + [cell("self-trained, not normalised", a, [10.0 + 5 * k, 10.1 + 3 * k, 10 + 4 * k]) for k, a in enumerate("124")])
    assert verdicts() == {**dict.fromkeys("bcdeghijkl", "not run"), "0": "holds", "a": "does not hold", "f": "holds"}
    write("regime", [{**c, "rising": c["column"] == "100%"} for c in regime])
    assert verdicts()["0"] == "unclear" and "still rising: random 100%" in tables.findings(tmp_path)
    write("regime", [{**c, "rising": None} for c in regime])
    assert verdicts()["0"] == "unclear" and "convergence unknown: random 20%" in tables.findings(tmp_path)
    write("regime", [{**c, "values": c["values"][:2], "seeds": [0, 1]} for c in regime])
    assert verdicts()["0"] == "unclear"  # two seeds


def test_findings_name_only_cells_that_the_studies_have():
    for _, contrasts in studies.FINDINGS.values():
        for name, plus, minus in contrasts:
            assert all(row in studies.STUDIES[name]["rows"] and column in {*studies.STUDIES[name]["columns"], "*"}
                       for row, column in [*plus, *minus])


# ---- the real thing ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_study_of_the_real_program(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "SETTINGS", {("voc", "seg"): "--eval-every 2"})
    root = world.build(tmp_path, "seg", {"train": 10, "aug": 4, "val": 2})
    command = ["student-init", "--world", "voc", "--root", str(root), "--unlabeled", str(root / "JPEGImages"), "--seeds", "1",
               "--recipe", "seg-fine", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--jobs", "1",
               "--", "--image-size", "64", "--batch", "4", "--steps", "4", "--student-steps", "4", "--threshold", "0.01"]
    study.main(command)
    r = json.loads((tmp_path / "results/student-init.json").read_text())
    values = {(c["row"], c["column"]): c["values"] for c in r["cells"]}
    assert all(len(v) == 1 and 0 <= v[0] <= 100 for v in values.values()) and len(values) == 6
    assert values["random", "from its teacher"] == values["random", "as its teacher"]
    base, other = (tmp_path / "out" / name / "seed0" for name in r["runs"])
    assert "finished before" in (other / "run.log").read_text() and "finished before" not in (base / "run.log").read_text()
    for path in ("teacher/step_00000004.pt", "pseudo/pseudo.json"):
        assert (base / path).stat().st_ino == (other / path).stat().st_ino
    assert {c["steps"] for c in r["cells"]} == {4} and not any(c["rising"] is None for c in r["cells"])
    state = torch.load(base / "teacher/step_00000004.pt", weights_only=True)
    torch.save({**state, "spent": 1000.0}, base / "teacher/step_00000004.pt")  # as if it had been interrupted and resumed
    stage = json.loads((base / "teacher/stage.json").read_text())
    (base / "teacher/stage.json").write_text(json.dumps({"deps": stage["deps"]}))
    (base / "results.json").unlink()
    assert study.main(command) is None
    assert json.loads((base / "teacher/stage.json").read_text())["result"]["seconds"] > 1000 > stage["result"]["seconds"]
