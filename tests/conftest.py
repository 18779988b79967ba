"""Tests import the flat modules from the repository root, wherever pytest was started."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on so many threads do scripts below add up, and so must what they are held to
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for tests that start scripts


def start(*args, processes=1, script="st.py", **environment):
    """A script as a user starts it, on one thread a process; torchrun's for several."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(random.randint(20000, 60000))]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def records(run, stage):
    """The log lines of a stage by step."""
    lines = [json.loads(line) for line in open(run / "log.jsonl")]
    return {line["step"]: line for line in lines if line["stage"] == stage}


KILLER = '''
import os, signal, sys
import torch
sys.path.insert(0, {root!r})
import {script}, ops, util, world
left = {count}
def counted(f):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            print("killed in", f.__name__, *[a for a in args if isinstance(a, (str, os.PathLike))], file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return call
{lines}
util.run({script}.main)
'''


def killed(folder, places, count, *args, script="st"):
    """A script, killed at the count-th call of any of the functions `places`; the script for that is written to `folder`. -> the
    line that says where, "" if it ended before."""
    lines = "\n".join(f"{place} = counted({place})" for place in places)
    (folder / "killer.py").write_text(KILLER.format(root=str(ROOT), script=script, lines=lines, count=count))
    ended = subprocess.run([sys.executable, str(folder / "killer.py"), *map(str, args)], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode in (-signal.SIGKILL, 0), ended.stderr
    return next((line for line in ended.stderr.splitlines() if line.startswith("killed in")), "")
