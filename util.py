"""Shared plumbing: errors for users, torchrun set-up, devices, the log, flags from a dataclass."""
import argparse
import ctypes
import dataclasses
import errno
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
    """Runs a script's main(): what a user can mend ends in one line and exit code 2; the process group always ends."""
    try:
        return main()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes"
    except torch.OutOfMemoryError as error:
        message = (f"out of memory ({str(error).split('.')[0]}): raise --accumulate (same result, less memory), or lower "
                   "--image-size or --batch")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---- processes and devices ---------------------------------------------------------------------------------------

def setup(device="auto", workers=0):
    """Joins torchrun's process group when there is one -> (rank, world, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ:  # a loader competing for a core holds up the whole team of threads
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    if sys.platform == "linux":  # keep freed memory: handing it back and forth each step costs a tenth of a CPU step
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc; other C libraries ignore the call
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, 2 ** 30)
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


# ---- log ---------------------------------------------------------------------------------------------------------

class Log:
    """One progress line on the terminal, the same as one json object per line in `path`, and TensorBoard curves if
    that package is installed. Silent on ranks other than 0."""

    def __init__(self, path, rank):
        self.file = open(path or os.devnull, "a", buffering=1) if rank == 0 else None
        self.tensorboard, self.line_open = None, False
        if rank == 0 and path:
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
