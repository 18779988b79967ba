"""Commands in folders, and the command line that studies.zoph and studies.reed share.

A study is a list of command lines of st.py and hpt.py, each with a folder of its own. To start from
what another run has made is to name its folder: runs share a path, nothing else.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from studies import table
from util import need

ROOT = Path(__file__).parents[1]  # where st.py and hpt.py are
POLL = 0.5  # seconds between looks at the processes

# ---- commands in folders -------------------------------------------------------------------------


def run(commands, jobs=1):
    """Runs commands, `jobs` side by side -> {folder: why it failed}.

    commands: {folder: command line without --out}. A command that names another's folder waits for
    it. A folder with a results.json is finished; others are resumed, which st.py and hpt.py do by
    themselves. After ^C or SIGTERM the runs save and end, and so does this.
    """
    waiting = []
    for folder, command in commands.items():
        record = Path(folder, "command.txt")
        before = record.read_text() if record.exists() else command
        need(before == command, f"{folder} is of another command ({before}); give another --out")
        if not finished(folder):
            waiting.append(folder)
    sources = {f: [g for g in commands if f"{g}/" in commands[f]] for f in waiting}
    running = {}  # {folder: (process, slot)}
    failed = {}
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    say(f"{len(commands)} runs, {len(commands) - len(waiting)} of them finished before")
    try:
        while (waiting or running) and not signals:
            for folder, (process, _) in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    if process.returncode or not finished(folder):
                        failed[folder] = f"failed, see {folder}/run.log"
                    say(f"{folder} {failed.get(folder, 'finished')}; {len(waiting)} wait")
            for folder in list(waiting):
                slots = set(range(jobs)) - {slot for _, slot in running.values()}
                lost = [source for source in sources[folder] if source in failed]
                if lost:
                    failed[folder] = f"not run, since {lost[0]} failed"
                    waiting.remove(folder)
                elif slots and all(map(finished, sources[folder])):
                    running[folder] = start(folder, commands[folder], min(slots), jobs), min(slots)
                    waiting.remove(folder)
            time.sleep(POLL)
    finally:  # nothing outlives this, however it ends
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if signals:
        say("stopped; the same command resumes")
        sys.exit(128 + signals[0])
    return failed


def say(text):
    print(f"[{time.strftime('%X')}] {text}", flush=True)


def finished(folder):
    return Path(folder, "results.json").exists()


def start(folder, command, slot, jobs):
    """Starts a command, its output in folder/run.log -> the process. slot: which of the jobs."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "command.txt").write_text(command)
    program, *words = shlex.split(command)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    gpus = range(torch.cuda.device_count())
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, gpus))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % len(gpus)]
    with open(Path(folder, "run.log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / program), *words, "--out", folder],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # ^C reaches a whole terminal: it is for us to pass on
        )


# ---- the command line ----------------------------------------------------------------------------


class Grid:
    """What a study runs, and where the number of each of its cells will stand."""

    def __init__(self):
        self.commands = {}  # {folder: command line}
        self.cells = {}  # {(row, column): {seed: (folder, stage)}}

    def cell(self, row, column, seed, folder, stage):
        self.cells.setdefault((row, column), {})[seed] = (folder, stage)


def arguments(doc, names, recipe, weights, argv=None):
    """The options of a study -> o. o.flags: what stands after --, for every run; o.init: files by
    the names that `weights` lists, a file without a name being the first."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", choices=names, metavar="NAME", help=", ".join(names))
    add("--seeds", type=int, default=3, help="runs of a cell, with seeds 0, 1, ... [3]")
    add("--jobs", type=int, default=0, help="runs side by side [one a GPU, or one a core]")
    add("--recipe", default=recipe, help=f"of every run but pre-training [{recipe}]")
    add("--root", default="", help="a data set instead of the embedded world's")
    add("--labeled", type=float, default=0.2, help="yours: fraction of the labels [0.2]")
    add("--unlabeled", default="", help="images for pseudo-labels, or for a base of one's own")
    add("--joint", default="datasets/shapes/single", help="class folders for joint training")
    add("--init", nargs="+", default=[], metavar="[NAME=]FILE", help="weights; else trained here")
    add("--out", default="runs/study", help="folder of the runs [runs/study]")
    add("--results", default="results", help="folder of the tables [results]")
    o = parser.parse_args(argv[:cut])
    o.flags = shlex.join(argv[cut + 1 :])
    o.command = shlex.join(["python", "-m", f"studies.{Path(sys.argv[0]).stem}", *argv])
    o.jobs = o.jobs or torch.cuda.device_count() or os.cpu_count() or 1
    named = [text if "=" in text else f"{weights[0]}={text}" for text in o.init]
    o.init = dict(text.split("=", 1) for text in named)
    unknown = [name for name in o.init if name not in weights]
    need(not unknown, f"--init {unknown}: there are only {', '.join(weights)}")
    need(1 <= o.seeds <= 10 and o.jobs >= 1, "--seeds: give 1 to 10; --jobs: 1 or more")
    need(shlex.quote(o.out) == o.out, f"--out {o.out}: give a folder without spaces")
    need(o.name != "yours" or o.root, "yours is for your own images: give --root DIR")
    return o


def study(o, name, rows, metric):
    """Runs a study and writes its table. rows: its entry among STUDIES; name: of the files."""
    grid = Grid()
    for seed in range(o.seeds):
        rows["runs"](grid, o, seed)
    target = Path(o.results, name)
    table.check_overwritten(target, {cell: len(places) for cell, places in grid.cells.items()})
    failed = run(grid.commands, o.jobs)
    result = table.collect(o, name, rows, metric, grid)
    table.check_overwritten(target, {(c["row"], c["column"]): c["n"] for c in result["cells"]})
    table.write(target, result)
    lines = "".join(f"\n{folder}: {reason}" for folder, reason in failed.items())
    sentence = f"{len(failed)} of {len(grid.commands)} runs failed; the same command tries again"
    need(not failed, sentence + lines)
