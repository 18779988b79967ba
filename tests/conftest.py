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
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for tests that start scripts


def start(*args, processes=1, **environment):
    """st.py as a user starts it, on one thread a process; torchrun's for several."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(random.randint(20000, 60000))]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "st.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def records(run, stage):
    """The log lines of a stage by step."""
    lines = [json.loads(line) for line in open(run / "log.jsonl")]
    return {line["step"]: line for line in lines if line["stage"] == stage}


KILLER = '''
import os, signal, sys
import torch
sys.path.insert(0, {root!r})
import st, util, world
left = {count}
def counted(f):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            print("killed in", f.__name__, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return call
{place} = counted({place})
util.run(st.main)
'''


def killed(folder, place, count, *args):
    """st.py, killed at its count-th call of the function `place`; the script for that is written to `folder`."""
    (folder / "killer.py").write_text(KILLER.format(root=str(ROOT), place=place, count=count))
    ended = subprocess.run([sys.executable, str(folder / "killer.py"), *map(str, args)], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
