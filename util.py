"""Shared plumbing: torchrun set-up, checkpoints that survive a kill, the log, flags from a dataclass.

Random numbers need no saving anywhere in this project: each is drawn from a generator seeded with (seed, step, index),
so a checkpoint holds no generator state and a resumed run draws what the uninterrupted one would have drawn.
"""
import argparse
import dataclasses
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """A failure the user can mend: one line saying what was wrong, where, what to do. Printed without traceback."""


def run(main):
    """Runs a script's main(): UserError -> one line, exit 2; SIGTERM -> exit 143; the process group always ends."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(error))
    except torch.OutOfMemoryError as error:
        sys.exit(_fail(f"out of memory: {str(error).split('.')[0]}. Lower --image-size or --batch, or raise "
                       "--accumulate (same result, less memory)"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


# ---- processes and devices ---------------------------------------------------------------------------------------

def setup(device="auto"):
    """Joins torchrun's process group when there is one -> (rank, world, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device)


def all_sum(tensor):
    """Sum over ranks, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def rank0_first(action):
    """Runs action() on rank 0 and hands its result to all ranks; its UserError is raised on every rank alike."""
    if not dist.is_initialized():
        return action()
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [("ok", action())]
        except UserError as error:
            box = [("error", str(error))]
    dist.broadcast_object_list(box)
    if box[0][0] == "error":
        raise UserError(box[0][1])
    return box[0][1]


def precision(name, device):
    """The autocast dtype for 'auto' | 'bf16' | 'fp32'. auto: bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


class Stop:
    """Set by SIGTERM: the training loop saves at the next step boundary and exits with 143."""
    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))


# ---- files -------------------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """write(temporary path), flush to disk, rename: a reader never sees half a file, whenever the process dies."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, usually; what was saved before is untouched
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space and run the same command again")


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def save_checkpoint(folder, state, keep=2):
    """Writes folder/step_N.pt and removes all but the last `keep`: one may be damaged, its predecessor is still there."""
    def write(path):
        try:
            torch.save(state, path)
        except RuntimeError as error:  # torch reports a failed write (disk full) as RuntimeError
            raise OSError(str(error).split("\n")[0])
    write_atomic(Path(folder) / f"step_{state['step']:08d}.pt", write)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def checkpoints(folder):
    return sorted(Path(folder).glob("step_*.pt"))


def load_latest(folder):
    """The newest checkpoint that can be read, or None; damaged ones are named and skipped."""
    for path in reversed(checkpoints(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated zip, bad crc, missing record: torch raises many kinds
            print(f"warning: {path} is damaged ({str(error).splitlines()[0][:80]}); falling back to the one before it",
                  file=sys.stderr)
    return None


def load_checkpoint(path):
    """A checkpoint file, or the newest in a stage's folder."""
    path = Path(path)
    state = load_latest(path) if path.is_dir() else None
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path} is no checkpoint that can be loaded safely ({str(error).splitlines()[0][:80]})")
    if not isinstance(state, dict) or "class_ids" not in state:
        raise UserError(f"no checkpoint of st.py at {path}; give a step_*.pt file or the folder that holds it")
    return state


def claim(folder):
    """Locks a run directory for this process; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder} is in use by another process; wait for it, or give another --out")


# ---- log ---------------------------------------------------------------------------------------------------------

class Log:
    """One progress line on the terminal, the same as one json object per line in `path`, and TensorBoard curves if
    that package is installed. Silent on ranks other than 0."""

    def __init__(self, path, rank):
        self.file = open(path, "a", buffering=1) if rank == 0 else None
        self.tensorboard, self.line_open = None, False
        if rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(str(Path(path).parent / "tensorboard"))
            except ImportError:
                pass

    def say(self, text):
        if self.file:
            print(("\n" if self.line_open else "") + text, flush=True)
            self.line_open = False

    def progress(self, stage, step, total, started, done_before, **values):
        """values are printed in the order given; ETA from the steps done in this process."""
        if not self.file:
            return
        eta = (time.time() - started) / max(step - done_before, 1) * (total - step)
        text = " ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        line = f"{stage} {step}/{total} {text} eta {int(eta // 60)}:{int(eta % 60):02d}"
        if sys.stdout.isatty():
            print("\r\033[K" + line, end="", flush=True)
            self.line_open = True
        else:
            print(line, flush=True)
        self.file.write(json.dumps({"stage": stage, "step": step, "of": total, **values}) + "\n")
        if self.tensorboard:
            for key, value in values.items():
                if value is not None:
                    self.tensorboard.add_scalar(f"{stage}/{key}", value, step)


# ---- flags -------------------------------------------------------------------------------------------------------

def parse_flags(config, doc, comments, argv=None):
    """A flag per field of the dataclass `config`. comments: {group: {field: help}}; the field's type parses the value.
    Returns (config object, set of the fields given on the command line)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {f.name: f for f in dataclasses.fields(config)}
    for title, group in comments.items():
        section = parser.add_argument_group(title)
        for name, text in group.items():
            f, flag = fields.pop(name), "--" + name.replace("_", "-")
            if isinstance(f.default, bool):
                section.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            else:
                kind = {"int": int, "float": float}.get(str(getattr(f.type, "__name__", f.type)).split(" ")[0], str)
                choices = text[1:text.index("}")].split("|") if text.startswith("{") else None
                section.add_argument(flag, type=kind, choices=choices, default=argparse.SUPPRESS, metavar=name.upper()
                                     if not choices else None, help=text if not choices else text[text.index("}") + 2:])
    assert not fields, f"fields without a comment: {list(fields)}"
    given = vars(parser.parse_args(argv))
    return config(**given), set(given)
