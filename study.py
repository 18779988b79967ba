"""Do the findings of Zoph et al. 2020, "Rethinking Pre-training and Self-training", hold? Its tables, as grids of st.py runs.

    python study.py table3 --seeds 3                        labels x initialisation x self-training on the embedded world
    python study.py table2 --seeds 3 --task seg --only S1   the others: table4 table7 pascal alpha threshold student-init regime
    python study.py table3 --world coco --root COCO --unlabeled IMAGENET --init aa.pth pre++=ns.pth
    python study.py yours --data coco --root DIR --labeled 0.2 --init imagenet -- --backbone resnet18 --image-size 256
    python study.py findings                                verdicts on the findings from the results of the studies

A cell of a table is one stage of one run: teacher (supervised), control (as many more steps as the student, without
pseudo-labels) or student. Cells share runs, runs share finished stages, and the same command resumes where it stopped:
runs in OUT/RUN/seedN with their run.log, tables in results/NAME.json, .md and .svg. Flags after -- go to every run of st.py,
those of the network and the machine to pre-training as well.
SimCLR's cells take weights (--init simclr=simclr:FILE): nothing here trains them yet.
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import backbones
import data
import recipes
import runs
import tables
import util
import world
from util import UserError

PROGRAM = [sys.executable, str(Path(__file__).with_name("st.py"))]
POLL = 0.2  # seconds between looks at the runs
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "pillow")
METRIC = {"det": "AP", "seg": "mIoU"}

# ---- what is run -------------------------------------------------------------------------------------------------

# The flags of every run, by world and task (cls is the pre-training). Those of shapes, seg, with the world's 300 labelled images,
# were settled on one seed by one criterion, that labels limit supervised training and steps do not, and frozen before any study
# was run. Under S1, 1,500 steps do: mIoU 26, 52 from 20, 100 images, and less than 2 more after the control's further 800. Under
# S4 even 3,000 do not (42, 68; 44, 70 after 800 more; 46, 72 after 2,000), so the paper's studies under S4 are done under S1
# here. One scale: the paper's six reach beyond what S1 shows the net. shapes, det: PLACEHOLDERS; steps limit it on a CPU.
SETTINGS = {
    ("shapes", "det"): "--steps 2000 --student-steps 700 --eval-every 100",
    ("shapes", "seg"): "--student-steps 800 --scales 1 --eval-every 300",
    ("shapes", "cls"): "--image-size 64 --steps 1500 --student-steps 1500 --eval-every 500",
    ("coco", "det"): "--recipe coco-b7 --eval-every 6000",
    ("voc", "seg"): "--recipe pascal-b7 --eval-every 2000",
    "yours": "--eval-every 200",
}
# Weak augmentation needs fewer steps (45k and 120k in the paper: recalled); aug: the one of the tables with a single one.
AUG = {("shapes", "seg"): {"s1": "--aug s1 --steps 1500", "s2": "--aug s2 --steps 1500", "s3": "--aug s3 --steps 3000",
                           "s4": "--aug s4 --steps 3000", "aug": "--aug s1 --steps 1500"}}
# Where weights come from if --init does not name a file: our own pre-training on the world's single objects, with the same seed.
# pre is the paper's ImageNet init; pre++ its ImageNet++ (Noisy Student): self-training for classification.
PRETRAINING = {"pre": ("teacher", "--mode train --labeled 1"), "pre++": ("student", "--labeled 1 {single} --student-init same")}


def trio(name, flags, supervised=(), student=()):
    """The three stages of a run as rows; the paper has no control."""
    return {name: ("teacher", flags, supervised), f"{name}, longer": ("control", flags, ()),
            f"{name}, self-trained": ("student", flags, student)}


def gains(*names):
    return [(f"{name}, self-trained", other) for name in names for other in (f"{name}, longer", name)]


ST = "{pool} --control"
FRACTIONS = {"20%": "--labeled 0.2 {aug}", "50%": "--labeled 0.5 {aug}", "100%": "--labeled 1 {aug}"}
# title; columns {name: flags}; rows {name: (stage, flags, the paper's numbers)}; compare [(a, b)]: a - b, of rows or of columns.
# {words} depend on the world, see words(). The paper's numbers are COCO AP (Tables 2, 3, 4, 7) and PASCAL mIoU (6, 8, 13 of v1).
STUDIES = {
    "table2": dict(
        title="Augmentation x method with all labels (Table 2)",
        columns={f"S{k}": f"--labeled 1 {{s{k}}}" for k in (1, 2, 3, 4)},
        rows={**trio("random", ST, (39.2, 41.5, 43.9, 44.3), (40.9, 43.0, 45.4, 45.6)),
              "pre-trained": ("teacher", "--mode train --init {pre}", (39.5, 40.7, 43.2, 43.3))},
        compare=[*gains("random"), ("pre-trained", "random")]),
    "table3": dict(
        title="Labels x initialisation x self-training (Table 3)", columns=FRACTIONS,
        rows={**trio("random", ST, (30.7, 39.6, 44.3), (34.1, 41.4, 45.6)),
              **trio("pre-trained", ST + " --init {pre}", (33.3, 38.8, 43.3), (36.0, 40.5, 44.6)),
              **trio("pre-trained++", ST + " --init {pre++}", (35.9, 39.9, 43.8), (37.2, 41.5, 44.6))},
        compare=[*gains("random", "pre-trained", "pre-trained++"), ("pre-trained", "random"), ("pre-trained++", "random")]),
    "table4": dict(
        title="Self-supervised pre-training, all labels (Table 4; a ResNet there)", columns={"100%": FRACTIONS["100%"]},
        rows={**trio("random", ST, (41.1,), (41.9,)), "pre-trained": ("teacher", "--mode train --init {pre}", (40.4,)),
              "SimCLR": ("teacher", "--mode train --init {simclr}", (40.4,))},
        compare=[*gains("random"), ("pre-trained", "random"), ("SimCLR", "random")]),
    "table7": dict(
        title="Joint training and self-training, 20% of the labels (Table 7)", columns={"20%": FRACTIONS["20%"]},
        rows={**trio("random", ST, (30.7,), (34.1,)), **trio("random, joint", ST + " {joint}", (33.6,), (35.1,)),
              **trio("pre-trained", ST + " --init {pre}", (33.3,), (36.0,)),
              **trio("pre-trained, joint", ST + " {joint} --init {pre}", (34.0,), (36.6,))},
        compare=[*gains("random", "random, joint", "pre-trained", "pre-trained, joint"), ("pre-trained", "random"),
                 *((f"{i}, joint{more}", f"{i}{more}") for i in ("random", "pre-trained") for more in ("", ", self-trained"))]),
    "pascal": dict(  # the `aug` images: PASCAL's further ones with coarser labels; in other worlds the 80% not labelled
        title="What to do with the aug images, and others to learn from (Tables 6, 8 and 13)",
        columns={"S1": "{s1} --init {pre++}", "S4": "{s4} --init {pre++}"},
        rows={**trio("train", "{few} {rest} --control", (83.9, 85.2), (85.6, 86.7)),
              "train + aug labels": ("teacher", "{all} --mode train", (84.7, 84.8)),
              "self-trained on single objects": ("student", "{few} {single}", (85.0, 86.0)),
              "self-trained on other scenes": ("student", "{few} {scenes}", (85.3, 86.6))},
        compare=[*gains("train"), ("train + aug labels", "train"), ("self-trained on single objects", "train, longer"),
                 ("self-trained on other scenes", "train, longer")]),
    "alpha": dict(
        title="Weight of the pseudo-labels and loss normalisation, 20% of the labels (appendix B)",
        columns={a: FRACTIONS["20%"] + f" --alpha {a}" for a in ("0.25", "0.5", "1", "2", "4")},
        rows={"longer": ("control", ST, ()), "self-trained": ("student", ST, ()),
              "self-trained, not normalised": ("student", ST + " --loss-norm off", ())},
        compare=[("self-trained", "longer"), ("self-trained", "self-trained, not normalised")]),
    "threshold": dict(
        title="Threshold of the pseudo-labels, 20% of the labels",
        columns={"the recipe's": FRACTIONS["20%"],
                 **{t: FRACTIONS["20%"] + f" --threshold {t}" for t in ("0.3", "0.5", "0.7", "0.9")}},
        rows=trio("random", ST), compare=gains("random")),
    "student-init": dict(
        title="Where the student starts, 20% of the labels",
        columns={"from its teacher": FRACTIONS["20%"], "as its teacher": FRACTIONS["20%"] + " --student-init same"},
        rows=trio("random", ST), compare=[*gains("random"), ("from its teacher", "as its teacher")]),
    "regime": dict(
        title="Do labels limit supervised training?", columns=FRACTIONS,
        rows={"random": ("teacher", "--mode train", (30.7, 39.6, 44.3))}, compare=[("100%", "50%"), ("50%", "20%")]),
    "yours": dict(
        title="Pre-training and self-training on your data", columns={"your data": "--labeled {labeled}"},
        rows={**trio("random", ST), **trio("pre-trained", ST + " --init {pre}")},
        compare=[*gains("random", "pre-trained"), ("pre-trained", "random"),
                 ("pre-trained, self-trained", "random, self-trained")]),
}
# Flags of st.py that pre-training shares with what starts from it; and those that are for studies alone to give.
NETWORK = ("backbone", "norm", "device", "precision", "workers", "compile")
OWN = ("task", "data", "root", "out", "seed", "recipe", "labeled", "split", "unlabeled", "joint", "init", "ckpt", "mode",
       "control", "dry_run")


# ---- from a table to runs ----------------------------------------------------------------------------------------

class Missing(Exception):
    """What a cell needs and the command does not give."""


def words(o):
    """What the {words} of the tables mean with options o. What is missing here leaves its cells empty."""
    given = dict(("pre=" + text if not re.match(r"(pre|pre\+\+|simclr)=", text) else text).split("=", 1) for text in o.init)
    w = {"few": "--labeled 0.2", "all": "--labeled 1", "rest": "", "labeled": o.labeled}
    w.update({f"s{k}": f"--aug s{k}" for k in (1, 2, 3, 4)}, aug="--aug s4")
    w.update(AUG.get((o.world, o.task), {}))
    if o.world == "shapes":
        folder = {k: "--unlabeled " + shlex.quote(f"{o.root}/{k}") for k in ("unlabeled", "single/extra")}
        w.update(pool=folder["unlabeled"], scenes=folder["unlabeled"], single=folder["single/extra"], joint="--joint shapes")
    if o.task == "seg" and o.world != "coco":
        w.update(few="--labeled 1", rest="--unlabeled aug", all="--labeled 1 --train-list trainaug", pool="--unlabeled aug")
    if o.name == "yours":
        w.update(pool="")
    if o.unlabeled:
        w.update(pool="--unlabeled " + shlex.quote(o.unlabeled), scenes="--unlabeled " + shlex.quote(o.unlabeled))
    if o.joint:
        w.update(joint="--joint " + shlex.quote(o.joint))
    if o.joint not in ("", "shapes"):
        w.update(single="--unlabeled " + shlex.quote(o.joint + "/train"))
    return {**w, **{k: shlex.quote(v) for k, v in given.items()}}


def parse(text, row=None):
    """'--aug s4 --control' -> {"aug": "s4", "control": True}; later flags count. With a recipe's row, what row
    or st.py does anyway is left out of the flags that studies vary, so that the same run has one name."""
    flags, name = {}, ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value or True
        else:
            flags[name] = word
    usual = {} if row is None else {"alpha": "1", "student_init": "teacher", "threshold": row.get("threshold")}
    return {k: flags[k] for k in sorted(flags) if flags[k] != usual.get(k)}


def unparse(flags):
    """The words of a command line."""
    return [w for k, v in flags.items() for w in ["--" + k.replace("_", "-"), *([] if v is True else [v])]]


def source(value):
    """The (run, stage) that a flag's "@NAME/STAGE" means; of any other value ("", "")."""
    name, _, stage = value[1:].rpartition("/") if str(value).startswith("@") else ("", "", "")
    return name, stage


def basis(flags):
    """Hash of what a run depends on besides its flags: the recipe's row and the embedded world as they stand in the code, the
    weights it starts from as they are on disk."""
    row = recipes.RECIPES.get(flags.get("recipe") or recipes.TASKS.get(flags["task"]))
    init = Path(backbones.split_source(flags.get("init", "random"))[1])
    init = (runs.checkpoints(init) or [init])[-1] if init.is_dir() else init
    return runs.digest([row, world.VERSION if flags["data"] == "shapes" else 0,
                        file_digest(init, init.stat().st_mtime_ns) if init.is_file() else 0])


@functools.cache
def file_digest(path, _):
    return data.file_digest(path)


def run_name(start, flags, frozen):
    """A folder's name: what is not frozen, to read, and a hash of all it depends on, to be sure."""
    shown = [k + ("" if v is True else "-" + (source(v)[0].split("_")[0] or Path(v).name))
             for k, v in flags.items() if frozen.get(k) != v]
    return re.sub(r"[^\w.+-]", "", "_".join([start, *shown])[:100]) + "_" + runs.digest([flags, basis(flags)])[:8]


def plan(study, o):
    """-> cells: [{"row", "column", "stage", "paper", "run" or "empty": why}]; runs: {name: flags}, what others start from first.

    flags: {flag of st.py without dashes: text or True}; "@NAME/STAGE" is that stage of another run, with the same seed.
    """
    word, cells, found, theirs = words(o), [], {}, parse(shlex.join(o.flags))

    def add(text, task, data, start):
        frozen = SETTINGS[o.name if o.name == "yours" else (data, task)]
        common = f"--task {task} --data {data} --root {shlex.quote(o.root)} {frozen}"
        if task == o.task:
            common += f" {'--recipe ' + o.recipe if o.recipe else ''} {shlex.join(o.flags)}"
            if both := parse(text).keys() & theirs.keys():
                raise UserError(f"--{min(both).replace('_', '-')} after -- is what {o.name} varies; leave it out")
        else:  # pre-training, of the same network
            network = {"backbone": recipes.RECIPES[o.recipe]["backbone"]} if o.recipe else {}
            common += " " + shlex.join(unparse({**network, **{k: v for k, v in theirs.items() if k in NETWORK}}))
        row = recipes.RECIPES.get(parse(common).get("recipe") or recipes.TASKS.get(task), {})
        flags = parse(f"{common} {text}", row)
        name = run_name(start, flags, parse(common, row))
        found[name] = flags
        return name

    def fill(text):
        for name in re.findall(r"{(.*?)}", text):
            if name not in word and name in PRETRAINING and o.world == "shapes":
                stage, flags = PRETRAINING[name]
                word[name] = f"@{add(fill(flags), 'cls', 'shapes', name)}/{stage}"
            if name not in word:
                how = {"pool": "--unlabeled", "scenes": "--unlabeled", "joint": "--joint", "single": "--joint DIR",
                       "pre": "weights: --init FILE"}
                raise Missing(f"needs {how.get(name, f'weights: --init {name}=FILE')}")
            text = text.replace("{" + name + "}", word[name])
        return text
    for row, (stage, flags, numbers) in study["rows"].items():
        for k, (column, more) in enumerate(study["columns"].items()):
            cell = {"row": row, "column": column, "stage": stage, "paper": numbers[k] if numbers else None}
            try:
                cell["run"] = add(fill(f"{flags} {more}"), o.task, o.world, f"{o.task}-{o.world}")
            except Missing as error:
                cell["empty"] = str(error)
            cells.append(cell)
    return cells, found


# ---- running -----------------------------------------------------------------------------------------------------

# Which flags the stages of st.py do not depend on (st.pipeline has the other side of this). Boxes and classes are stored with
# their scores, so that another threshold relabels nothing; masks are not.
LATER = ("mode", "control", "alpha", "student_init", "student_steps", "loss_norm", "rounds")
FREE = {"teacher": (*LATER, "unlabeled", "threshold", "flip", "soft", "scales"), "pseudo": LATER,
        "control": ("alpha", "loss_norm", "unlabeled", "threshold", "flip", "soft", "scales")}


def stage_key(flags, stage):
    """Runs that agree in this have that stage in common, for the same seed."""
    free = {*FREE[stage], *["threshold"] * (stage == "pseudo" and flags["task"] != "seg")}
    free -= {"loss_norm"} if "joint" in flags else set()  # which classification has as well
    kept = {k: v for k, v in flags.items() if k not in free}
    row = recipes.RECIPES.get(flags.get("recipe") or recipes.TASKS.get(flags["task"]), {})
    return runs.digest([kept, (flags.get("threshold") or row.get("threshold")) == "auto"])  # auto holds labelled images out


def link(source, target):
    """Checkpoints and masks are never written in place, so two runs may share them; lists are appended to."""
    try:
        if source.endswith((".jsonl", ".txt")):
            raise OSError
        os.link(source, target)
    except OSError:  # or the file system has no links
        shutil.copy2(source, target)


def adopt(out, folder):
    """Gives a run the stages that another has finished and it would only repeat: st.py checks what they depend on. Pseudo-labels
    and control come with the very weights of the run's teacher, which not every teacher of the same flags has."""
    mine = tables.read_json(folder / "run.json")
    for stale in folder.glob(".adopt-*"):  # of a study killed in here
        shutil.rmtree(stale, ignore_errors=True)
    for stage in FREE:
        teacher = (tables.read_json(folder / "teacher/stage.json") or {}).get("result", {}).get("weights")
        for run in sorted(out.glob(f"*/{folder.name}")) if not (folder / stage).exists() else ():
            theirs, record = tables.read_json(run / "run.json"), tables.read_json(run / stage / "stage.json") or {}
            if theirs and "result" in record and (stage == "teacher" or record["deps"]["teacher"] == teacher) \
                    and all(theirs.get(k) == mine[k] for k in ("basis", "precision")) \
                    and stage_key(theirs["flags"], stage) == stage_key(mine["flags"], stage):
                try:
                    with tempfile.TemporaryDirectory(prefix=".adopt-", dir=folder) as work:
                        os.rename(shutil.copytree(run / stage, Path(work) / stage, copy_function=link), folder / stage)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another study was faster
                        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
                        raise UserError(f"cannot copy {run / stage} to {folder} ({reason}); the same command tries again")
                break


@contextlib.contextmanager
def alone(out):
    """Studies on the same folder write files of the same name one after another."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def launch(out, name, seed, flags, slot, jobs):
    """Starts a run of st.py, its output going to run.log. It ignores ^C, which reaches a whole terminal: see execute().
    -> the process, how long run.log was before."""
    folder = out / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus and flags.get("device") != "cpu" else "cpu")
    with alone(out):  # a run keeps the precision it began with, whatever the machine it goes on with would choose
        precision = (tables.read_json(folder / "run.json") or {}).get("precision") or (
            "bf16" if util.precision(flags.get("precision", "auto"), device) == torch.bfloat16 else "fp32")
        runs.write_json(folder / "run.json", {
            "flags": flags, "basis": basis(flags), "precision": precision,
            "versions": f"Python {sys.version.split()[0]}, {packages}",
            "machine": f"{os.cpu_count()} cores, {torch.cuda.get_device_name() if gpus else 'no GPU'}, {precision}"})
        adopt(out, folder)
    given = {k: str(out / source(v)[0] / folder.name / source(v)[1]) if source(v)[0] else v for k, v in flags.items()}
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    with open(folder / "run.log", "a") as log:
        start = log.tell()
        process = subprocess.Popen(
            [*PROGRAM, *unparse({**given, "precision": precision}), "--seed", str(seed), "--out", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    return process, start


def taken(folder):
    """Whether another study's run has this directory, see runs.claim()."""
    try:
        with open(folder / ".lock", "r+") as lock:  # closing it lets go at once
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def lines_since(path, start):
    """Of a log from that byte on, progress lines that overwrite each other included."""
    text = path.read_bytes()[start:].decode(errors="replace")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()] or ["nothing printed"]


def execute(out, found, seeds, jobs):
    """Runs every run of `found` for every seed, `jobs` at a time -> {(name, seed): why it failed or was skipped}.

    A run waits for those it starts from, and for an earlier one with the same teacher, whose stages it then adopts.
    """
    todo = [(name, seed) for seed in range(seeds) for name in found]
    first, began, bad, running, slots, elsewhere = {}, time.time(), {}, {}, list(range(jobs)), set()
    for name, seed in todo:
        first.setdefault((stage_key(found[name], "teacher"), seed), name)
    total, done, stop = len(todo), 0, []
    print(f"{total} runs of st.py, {jobs} side by side, in {out}", flush=True)
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def say(run, text):
        spent, left = time.time() - began, len(todo) + len(running)
        eta = f", about {clock(spent / done * left)} to go" if done and left else ""
        print(f"[{total - left}/{total} {clock(spent)}{eta}] {run[0]}/seed{run[1]}: {text}", flush=True)

    def finished(run):
        return (out / run[0] / f"seed{run[1]}" / "results.json").exists()

    try:
        while (todo or running) and not stop:
            for run, (slot, process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                slots.append(slot)
                lines = lines_since(out / run[0] / f"seed{run[1]}" / "run.log", start)
                if process.returncode == 0 and finished(run):
                    done += 1
                    say(run, "finished")
                elif any("is in use by another process" in line for line in lines):  # another study, at the same moment
                    todo.append(run)
                else:
                    bad[run] = f"failed ({process.returncode}): {lines[-1]}"
                    say(run, bad[run])
            for run in list(todo):
                name, seed = run
                sources = [(source(v)[0], seed) for v in found[name].values() if source(v)[0]]
                sooner = (first[stage_key(found[name], "teacher"), seed], seed)
                if finished(run):
                    todo.remove(run)
                elif lost := [s for s in sources if s in bad]:
                    todo.remove(run)
                    bad[run] = f"skipped: {lost[0][0]} failed"
                    say(run, bad[run])
                elif slots and all(map(finished, sources)) and (sooner == run or sooner not in todo and sooner not in running):
                    if not taken(out / name / f"seed{seed}") and not finished(run):  # it may have ended just now
                        running[run] = slots[0], *launch(out, name, seed, found[name], slots[0], jobs)
                        todo.remove(run)
                        del slots[0]
                        say(run, "started")
                    elif not finished(run) and run not in elsewhere:  # its result will do
                        elsewhere.add(run)
                        say(run, "being done elsewhere")
            time.sleep(POLL if running or todo else 0)
    finally:  # nothing outlives this, however it ends
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop:
        print(f"stopped after {clock(time.time() - began)}: {len(running)} runs told to save and end; the same command resumes")
        raise SystemExit(128 + stop[0])
    return bad


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


# ---- the command -------------------------------------------------------------------------------------------------

def arguments(argv):
    own, _, passed = "\0".join(argv).partition("\0--\0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=[*STUDIES, "findings"], metavar="NAME", help=", ".join([*STUDIES, "findings"]))
    add("--seeds", type=int, default=3, help="runs of each cell, with seeds 0, 1, ... [3]")
    add("--task", choices=METRIC, help="detection or segmentation [det; seg for voc]")
    add("--world", "--data", choices=("shapes", "coco", "voc"), default="shapes", help="data, as st.py's --data [shapes]")
    add("--root", default=recipes.Config.root, help="its folder, as st.py's --root")
    add("--unlabeled", default="", help="images for pseudo-labels, as st.py's --unlabeled")
    add("--labeled", default="0.2", help="yours: fraction of the labels to use [0.2]")
    add("--joint", default="", help="class folders (ImageNet) for joint training, as st.py's --joint")
    add("--init", nargs="+", default=[], metavar="[NAME=]WEIGHTS", help="for pre (where no name is given), pre++ and "
        "simclr, as st.py's --init; the embedded world's pre and pre++ are trained here otherwise")
    add("--recipe", help="row of recipes.py for every run")
    add("--only", nargs="+", default=[], metavar="TEXT", help="start only the runs of these rows and columns; several of either")
    add("--jobs", type=int, default=0, help="runs side by side [one per GPU, or per core]")
    add("--out", default="runs/study", help="folder of the runs [runs/study]")
    add("--results", default="results", help="folder of the tables [results]")
    o = parser.parse_args(own.split("\0") if own else [])
    o.task, o.flags = o.task or ("seg" if o.world == "voc" else "det"), passed.split("\0") if passed else []
    o.jobs = o.jobs or torch.cuda.device_count() or max(1, os.cpu_count() or 1)
    o.results, o.out = Path(o.results), Path(o.out)
    study, after = STUDIES.get(o.name, {"rows": {}, "columns": {}}), parse(shlex.join(o.flags))
    for wrong, line in (
            (o.seeds < 1 or o.jobs < 1, f"--seeds {o.seeds} and --jobs {o.jobs} must be 1 or more"),
            (o.recipe and o.recipe not in recipes.RECIPES,
             f"--recipe {o.recipe} does not exist; there are {', '.join(recipes.RECIPES)}"),
            (o.name == "yours" and o.world == "shapes", "yours is for your own images: give --data coco or voc and --root DIR"),
            (not all(text.rpartition("=")[2] for text in o.init), f"--init {' '.join(o.init)} lacks weights: NAME=FILE"),
            (ours := [k for k in after if k in OWN],
             f"{' '.join(unparse(dict.fromkeys(ours, True)))} after --: the study sets that, or its own flag before the -- does"),
            (odd := [k for k in after if k not in recipes.Config.__dataclass_fields__ or not after[k]],
             f"-- {shlex.join(o.flags)}: st.py has no flag --{''.join(odd[:1]).replace('_', '-')}, or it lacks its value"),
            (set(o.only) - {*study["rows"], *study["columns"]},
             f"--only {' '.join(o.only)}: {o.name} has only {'; '.join([*study['rows'], *study['columns']])}")):
        if wrong:
            raise UserError(line)
    recipes.check_data(o.world, o.task)
    return o


def make(folder, flag):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be made ({error.strerror}); give another folder")


def check(flags):
    """UserError for what st.py would refuse, hours later if that run starts late."""
    ours = source(flags.get("init"))[0]  # another run has yet to make these weights
    argv = unparse({**flags, "init": "imagenet"} if ours else flags)
    c = recipes.settings(util.parse_flags(recipes.Config, "", recipes.HELP, argv), 1)
    if c["init"] == "imagenet" and not ours:
        try:
            backbones.imagenet_file(c["backbone"])  # fetched once, not by several runs
        except ValueError as error:
            raise UserError(f"--init imagenet: {error}")


def draw(o, planned):
    """Draws what these runs read of the embedded world, once, before several look for it."""
    own, root = o.world == "shapes", o.root if o.world == "shapes" else recipes.Config.root
    for part, task in (("det", "det"), ("seg", "seg"), ("single", "cls"), ("unlabeled", "")):
        if any(own and (flags["task"] == task or f"{flags.get('unlabeled')}/".startswith(f"{root}/{part}/"))
               or part == "single" and flags.get("joint") == "shapes" for flags in planned):
            data.embedded(root, part)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    o = arguments(argv)
    make(o.results, "--results")
    target = o.results / f"{o.name}.json"
    if o.name == "findings":
        text = tables.findings(o.results)
        runs.write_atomic(target.with_suffix(".md"), lambda p: p.write_text(text))
        return print(text)
    what = {"world": o.world, "task": o.task, "recipe": o.recipe or "", "root": Path(o.root).name, "labeled": o.labeled,
            "flags": tables.without_folders(shlex.join(o.flags))}
    old = tables.read_json(target) or what
    if other := [k for k in what if old.get(k) != what[k]]:
        raise UserError(f"{target} is of " + ", ".join(f"{k} '{old.get(k)}'" for k in other) + "; give another --results for "
                        + ", ".join(f"'{what[k]}'" for k in other))
    study = STUDIES[o.name]
    cells, found = plan(study, o)
    rows, columns = (set(o.only) & set(study[k]) or set(study[k]) for k in ("rows", "columns"))
    chosen = [c["run"] for c in cells if "run" in c and c["row"] in rows and c["column"] in columns]
    sources = [source(v)[0] for name in chosen for v in found[name].values()]
    started = {name: flags for name, flags in found.items() if name in chosen or name in sources}
    before = [flags for name, flags in started.items()
              if not all((o.out / name / f"seed{s}/results.json").exists() for s in range(o.seeds))]
    for flags in before:
        check(flags)
    make(o.out, "--out")
    draw(o, before)
    wall, began = o.out / f"{o.name}-{o.task}-{o.world}.wall.json", time.time()
    try:
        bad = execute(o.out, started, o.seeds, o.jobs)
    finally:
        with contextlib.suppress(OSError, UserError), alone(o.out):  # what ended execute() is to be told, not this
            runs.write_json(wall, (tables.read_json(wall) or 0) + (time.time() - began if before else 0))
    lost = {name for name, _ in bad}
    cells = [tables.read_cell(o.out, {**c, "empty": "failed"} if c.get("run") in lost else c, METRIC[o.task], o.seeds)
             for c in cells]
    hours, machines, versions = tables.spent(o.out, found, o.seeds)
    results = {
        "study": o.name, "title": study["title"], **what, "metric": METRIC[o.task], "seeds": o.seeds,
        "command": tables.without_folders(shlex.join(["python", "study.py", *argv])), "machines": machines, "versions": versions,
        "hours": {"runs": hours, "wall": round((tables.read_json(wall) or 0) / 3600, 2)},
        "rows": list(study["rows"]), "columns": list(study["columns"]),
        "runs": {name: tables.without_folders(" ".join(unparse(flags))) for name, flags in found.items()},
        "cells": cells, "differences": tables.differences(study, cells)}
    if o.name == "yours":
        results["verdict"] = tables.helped(results)
    with alone(o.out):
        runs.write_json(target, results)
        for suffix, text in ((".md", tables.markdown(results)), (".svg", tables.svg(results))):
            runs.write_atomic(target.with_suffix(suffix), lambda p: p.write_text(text))
    print(tables.markdown(results), f"written: {target}, .md and .svg", sep="\n")
    if bad:
        raise UserError(f"{len(bad)} of {len(started) * o.seeds} runs failed or were skipped, see above and their run.log in "
                        f"{o.out}; the same command tries them again")


if __name__ == "__main__":
    util.run(main)
