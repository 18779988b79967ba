"""Do the findings of Zoph et al. 2020, "Rethinking Pre-training and Self-training", hold? Its tables, as grids of st.py runs.
And those of Reed et al. 2022 (HPT), as grids of hpt.py runs. What is run stands in studies.py, as literal tables.

    python study.py table3 --seeds 3                        labels x initialisation x self-training on the embedded world
    python study.py table2 --seeds 3 --task seg --only S1   the others: table4 table7 pascal alpha threshold student-init regime
    python study.py table3 --world coco --root COCO --unlabeled IMAGENET --init aa.pth pre++=ns.pth
    python study.py yours --data coco --root DIR --labeled 0.2 --init imagenet -- --backbone resnet18 --image-size 256
    python study.py hpt-linear --seeds 3                    also hpt-semi hpt-chain hpt-augment hpt-fraction hpt-detect hpt-mme
    python study.py hpt-yours --root DIR                    yours, in train/CLASS, val/CLASS; --unlabeled: for a base
    python study.py findings                                verdicts on the findings from the results of the studies

A cell of a table is one stage of one run: teacher (supervised), control (as many more steps as the student, without
pseudo-labels) or student. Cells share runs, runs share finished stages, and the same command resumes where it stopped:
runs in OUT/RUN/seedN with their run.log, tables in results/NAME.json, .md and .svg. Flags after -- go to every run of st.py,
those of the network and the machine to pre-training as well.
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
import hpt
import probe
import recipes
import runs
import studies
import tables
import util
import world
from util import UserError

PROGRAMS = {name: [sys.executable, str(Path(__file__).with_name(f"{name}.py"))] for name in ("st", "hpt")}
POLL = 0.2  # seconds between looks at the runs
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "pillow")
METRIC = {"det": "AP", "seg": "mIoU", "hpt": "accuracy"}
START = re.compile(r"(pre|pre\+\+|simclr|base|chain|target|hpt|hpt-bn)=")  # what --init may name

# Flags of st.py and hpt.py that pre-training shares with what starts from it; and those that are for studies alone to give.
NETWORK = ("backbone", "norm", "device", "precision", "workers", "compile")
OWN = ("program", "task", "data", "root", "out", "seed", "recipe", "labeled", "split", "unlabeled", "joint", "init", "ckpt",
       "mode", "control", "dry_run", "stage", "eval", "source", "budgets")


# ---- from a table to runs ----------------------------------------------------------------------------------------

class Missing(Exception):
    """What a cell needs and the command does not give."""


def ours(o):
    """The module whose flags and recipes a study is about."""
    rows = studies.STUDIES.get(o.name, {"rows": {}})["rows"].values()
    return hpt if any("--program hpt" in flags for _, flags, _ in rows) else recipes


def words(o):
    """What the {words} of the tables mean with options o. What is missing here leaves its cells empty."""
    usual = "base" if o.task == "hpt" else "pre"
    given = dict((text if START.match(text) else f"{usual}={text}").split("=", 1) for text in o.init)
    w = {"few": "--labeled 0.2", "all": "--labeled 1", "rest": "", "labeled": o.labeled}
    w.update({f"s{k}": f"--aug s{k}" for k in (1, 2, 3, 4)}, aug="--aug s4")
    w.update(studies.AUG.get((o.world, o.task), {}))
    if o.world == "shapes":
        folder = {k: "--unlabeled " + shlex.quote(f"{o.root}/{k}") for k in ("unlabeled", "single/extra")}
        w.update(pool=folder["unlabeled"], scenes=folder["unlabeled"], single=folder["single/extra"], joint="--joint shapes")
    if o.task == "seg":
        w.update(few="--labeled 1", rest="--unlabeled aug", all="--labeled 1 --train-list trainaug", pool="--unlabeled aug")
    if o.name == "yours":
        w.update(pool="")
    if o.name == "hpt-yours":
        w.update(yours=shlex.quote(o.root), **({"own": shlex.quote(o.unlabeled)} if o.unlabeled else {}))
    elif o.unlabeled:
        w.update(pool="--unlabeled " + shlex.quote(o.unlabeled), scenes="--unlabeled " + shlex.quote(o.unlabeled))
    if o.joint:
        w.update(joint="--joint " + shlex.quote(o.joint))
    if o.joint not in ("", "shapes"):
        w.update(single="--unlabeled " + shlex.quote(o.joint + "/train"))
    given |= {place: given["chain"] for place in ("source of sketch", "source of strokes") if "chain" in given}
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
    usual = {} if row is None else {"alpha": "1", "student_init": "teacher", "threshold": row.get("threshold"),
                                    "views": "baseline", "fraction": "1"}
    return {k: flags[k] for k in sorted(flags) if flags[k] != usual.get(k)}


def unparse(flags):
    """The words of a command line."""
    return [w for k, v in flags.items() for w in ["--" + k.replace("_", "-"), *([] if v is True else [v])]]


def source(value):
    """The (run, file or stage in it) that a flag's "@RUN/FILE" means; of any other value ("", "")."""
    name, _, place = value[1:].partition("/") if str(value).startswith("@") else ("", "", "")
    return name, place


def basis(flags):
    """Hash of what a run depends on besides its flags: the recipe's row and the embedded world as they stand in the code, the
    weights it starts from as they are on disk."""
    row = hpt.RECIPES[flags["recipe"]] if "program" in flags else \
        recipes.RECIPES.get(flags.get("recipe") or recipes.TASKS.get(flags["task"]))
    init = Path(runs.weights_of(backbones.split_source(flags.get("init", "random"))[1]))
    return runs.digest([row, world.VERSION if "program" in flags or flags["data"] == "shapes" else 0,
                        file_digest(init, init.stat().st_mtime_ns) if init.is_file() else 0])


@functools.cache
def file_digest(path, _):
    return data.file_digest(path)


def run_name(start, flags, frozen):
    """A folder's name: what is not frozen, to read, and a hash of all it depends on, to be sure."""
    shown = [k + ("" if v is True else "-" + (source(v)[0].split("_")[0] or Path(v).name))
             for k, v in flags.items() if frozen.get(k) != v and k not in ("program", "eval")]
    return re.sub(r"[^\w.+-]", "", "_".join([start, *shown])[:100]) + "_" + runs.digest([flags, basis(flags)])[:8]


def plan(study, o):
    """-> cells: [{"row", "column", "stage", "paper", "run" or "empty": why}]; runs: {name: flags}, what others start from first.

    flags: {flag of st.py without dashes: text or True}; "@NAME/STAGE" is that stage of another run, with the same seed.
    """
    word, cells, found, theirs = words(o), [], {}, parse(shlex.join(o.flags))

    def add(text, task, world_, start, mine=True):
        root = f"--root {shlex.quote(recipes.Config.root if o.name == 'hpt-yours' else o.root)}"
        if "program" in parse(text):
            common, known = f"{root} {studies.SETTINGS['hpt'] if mine else '--recipe tiny'}", hpt.Config.__dataclass_fields__
            common += f" --recipe {o.recipe}" * bool(o.recipe and o.task == "hpt" and not mine)
        else:
            frozen = studies.SETTINGS[o.name if o.name == "yours" else (world_, task)]
            common, known = f"--task {task} --data {world_} {root} {frozen}", recipes.Config.__dataclass_fields__
        if mine:
            common += f" --recipe {o.recipe}" * bool(o.recipe) + " " + shlex.join(o.flags)
            if both := parse(text).keys() & theirs.keys():
                raise UserError(f"--{min(both).replace('_', '-')} after -- is what {o.name} varies; leave it out")
        else:  # pre-training, of the same network
            network = {"backbone": ours(o).RECIPES[o.recipe]["backbone"]} if o.recipe else {}
            common += " " + shlex.join(unparse({k: v for k, v in {**network, **theirs}.items() if k in NETWORK and k in known}))
        row = recipes.RECIPES.get(parse(f"{common} {text}").get("recipe") or recipes.TASKS.get(task), {})
        flags = parse(f"{common} {text}", row)
        name = run_name(start, flags, parse(common, row))
        found[name] = flags
        return name

    def fill(text):
        for name in re.findall(r"{(.*?)}", text):
            if name not in word and name in studies.PRETRAINING and o.world == "shapes":
                place, flags = studies.PRETRAINING[name]
                word[name] = f"@{add(fill(flags), 'cls', 'shapes', name, False)}/{place.replace('{slug}', hpt.slug(o.unlabeled))}"
            if name not in word:
                how = {"pool": "--unlabeled", "scenes": "--unlabeled", "joint": "--joint", "single": "--joint DIR",
                       "own": "--unlabeled DIR, images for a base of your own", "pre": "weights: --init FILE"}
                raise Missing(f"needs {how.get(name, f'weights: --init {name}=FILE')}")
            text = text.replace("{" + name + "}", word[name])
        return text
    for row, (stage, flags, numbers) in study["rows"].items():
        for k, (column, more) in enumerate(study["columns"].items()):
            cell = {"row": row, "column": column, "stage": stage.replace("{column}", column),
                    "paper": numbers[k] if numbers else None}
            try:
                cell["run"] = add(fill(f"{flags} {more}".replace("{column}", column)), o.task, o.world, f"{o.task}-{o.world}")
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
    if "program" in flags:
        return runs.digest(flags)
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
    for stage in () if "program" in mine["flags"] else FREE:
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
    """Starts a run of st.py or hpt.py, its output going to run.log. It ignores ^C, which reaches a whole terminal: see execute().
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
    command = [*PROGRAMS[given.pop("program", "st")], *unparse({**given, "precision": precision})]
    with open(folder / "run.log", "a") as log:
        start = log.tell()
        process = subprocess.Popen(
            [*command, "--seed", str(seed), "--out", str(folder)],
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
    print(f"{total} runs, {jobs} side by side, in {out}", flush=True)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    add = parser.add_argument
    add("name", choices=[*studies.STUDIES, "findings"], metavar="NAME", help=", ".join([*studies.STUDIES, "findings"]))
    add("--seeds", type=int, default=3, help="runs of each cell, with seeds 0, 1, ... [3]")
    add("--task", choices=("det", "seg"), help="detection or segmentation [det; seg for voc]")
    add("--world", "--data", choices=("shapes", "coco", "voc"), default="shapes", help="data, as st.py's --data [shapes]")
    add("--root", default=recipes.Config.root, help="its folder, as st.py's --root")
    add("--unlabeled", default="", help="images for pseudo-labels, as st.py's --unlabeled; hpt-yours: for a base")
    add("--labeled", default="", help="yours: fraction of the labels to use [0.2]")
    add("--joint", default="", help="class folders (ImageNet) for joint training, as st.py's --joint")
    add("--init", nargs="+", default=[], metavar="[NAME=]WEIGHTS", help="for pre (where no name is given), pre++ and "
        "simclr, in hpt-* for base (the same) and chain, as st.py's --init; otherwise trained here, on the embedded world")
    add("--recipe", help="row of recipes.py for every run")
    add("--only", nargs="+", default=[], metavar="TEXT", help="start only the runs of these rows and columns; several of either")
    add("--jobs", type=int, default=0, help="runs side by side [one per GPU, or per core]")
    add("--out", default="runs/study", help="folder of the runs [runs/study]")
    add("--results", default="results", help="folder of the tables [results]")
    o = parser.parse_args(own.split("\0") if own else [])
    o.flags, program = passed.split("\0") if passed else [], ours(o)
    if program is hpt and (o.task or o.world != "shapes" or o.unlabeled and o.name != "hpt-yours" or o.joint):
        raise UserError(f"{o.name} runs hpt.py on the embedded domains; leave out --task, --world, --unlabeled and --joint, or "
                        "run hpt.py itself")
    if o.name == "hpt-yours" and not (Path(o.root) / "train").is_dir():
        raise UserError(f"hpt-yours is for your own images: --root {o.root} has no folder train/ with a folder for each class")
    o.task = "hpt" if program is hpt else o.task or ("seg" if o.world == "voc" else "det")
    starts = {"hpt-detect": ("base", "target", "hpt", "hpt-bn"), "hpt-chain": ("base", "chain"), "hpt-mme": ("base", "chain")}
    starts = starts.get(o.name, ("base",) if program is hpt else ("pre", "pre++", "simclr"))
    o.jobs = o.jobs or torch.cuda.device_count() or max(1, os.cpu_count() or 1)
    o.results, o.out = Path(o.results), Path(o.out)
    study, after = studies.STUDIES.get(o.name, {"rows": {}, "columns": {}}), parse(shlex.join(o.flags))
    for wrong, line in (
            (o.seeds < 1 or o.jobs < 1, f"--seeds {o.seeds} and --jobs {o.jobs} must be 1 or more"),
            (o.recipe and o.recipe not in program.RECIPES,
             f"--recipe {o.recipe} does not exist; there are {', '.join(program.RECIPES)}"),
            (o.recipe and any("--recipe" in flags for _, flags, _ in study["rows"].values()),
             f"--recipe {o.recipe}: {o.name} has its own; leave it out"),
            (o.labeled and o.name != "yours", f"--labeled is for yours; {o.name} says itself how many labels each cell has"),
            (o.name == "yours" and o.world == "shapes", "yours is for your own images: give --data coco or voc and --root DIR"),
            (other := [m[1] for text in o.init if (m := START.match(text)) and m[1] not in starts],
             f"--init {' '.join(other)}=...: {o.name} has no such start; it has {', '.join(starts)}"),
            (not all(text.rpartition("=")[2] for text in o.init), f"--init {' '.join(o.init)} lacks weights: NAME=FILE"),
            (own := [k for k in after if k in OWN],
             f"{' '.join(unparse(dict.fromkeys(own, True)))} after --: the study sets that, or its own flag before the -- does"),
            (odd := [k for k in after if k not in program.Config.__dataclass_fields__ or not after[k]],
             f"-- {shlex.join(o.flags)}: {'hpt' if program is hpt else 'st'}.py has no flag "
             f"--{''.join(odd[:1]).replace('_', '-')}, or it lacks its value"),
            (set(o.only) - {*study["rows"], *study["columns"]},
             f"--only {' '.join(o.only)}: {o.name} has only {'; '.join([*study['rows'], *study['columns']])}")):
        if wrong:
            raise UserError(line)
    o.labeled = o.labeled or "0.2"
    if program is recipes:
        recipes.check_data(o.world, o.task)
    return o


def make(folder, flag):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be made ({error.strerror}); give another folder")


def check(flags):
    """UserError for what the run would refuse, hours later if it starts late."""
    if "program" in flags:
        argv = unparse({k: v for k, v in flags.items() if k != "program"})
        parsed = util.parse_flags(hpt.Config, "", hpt.HELP, argv)
        c = hpt.settings(parsed, 1)
        if not source(parsed.init)[0]:
            hpt.load(backbones.build(c["backbone"]), parsed.init)
        return
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
    own = o.world == "shapes"
    root = o.root if own and o.name != "hpt-yours" else recipes.Config.root
    def named(flags):
        return [str(flags.get(k)).split(":")[0] for k in ("stage", "data", "source")]
    for part, task in (("det", "det"), ("seg", "seg"), ("single", "cls"), ("unlabeled", ""), *((d, "") for d in world.DOMAINS)):
        if any(own and (flags.get("task") == task or part in named(flags)
                        or f"{flags.get('unlabeled')}/".startswith(f"{root}/{part}/"))
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
    if o.name == "hpt-yours":  # what its base is trained on must not be what is reported on
        probe.check([], probe.load(o.root, 0), 0, 0, [(place, hpt.image_paths(place, recipes.Config.root))
                                                      for place in (f"{o.root}/train", o.unlabeled) if place])
    study = studies.STUDIES[o.name]
    cells, found = plan(study, o)
    rows, columns = (set(o.only) & set(study[k]) or set(study[k]) for k in ("rows", "columns"))
    chosen = [c["run"] for c in cells if "run" in c and c["row"] in rows and c["column"] in columns]
    for name in reversed(found):  # what others start from stands before them
        chosen += [source(v)[0] for v in found[name].values() if name in chosen]
    started = {name: flags for name, flags in found.items() if name in chosen}
    before = [flags for name, flags in started.items()
              if not all((o.out / name / f"seed{s}/results.json").exists() for s in range(o.seeds))]
    for flags in before:
        check(flags)
    for c in cells:  # a smaller command, or one whose runs lie elsewhere, must not empty a table
        has = o.seeds if c.get("run") in started else sum(
            (o.out / c.get("run", "") / f"seed{s}/results.json").exists() for s in range(o.seeds))
        if had := [k for k in old.get("cells", ()) if (k["row"], k["column"]) == (c["row"], c["column"]) and k["n"] > has]:
            raise UserError(f"{target} has {had[0]['n']} seeds of {c['row']}, {c['column']}, and this command would leave {has}; "
                            "give another --results, or --seeds, --only and --out as before")
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
