"""Shared plumbing: errors for users, torchrun set-up, devices, the log, flags from a dataclass."""
import argparse
import ctypes
import dataclasses
import datetime
import errno
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """A failure the user can mend: one line saying what was wrong, where, what to do. Printed without traceback."""


def run(main):
    """Runs a script's main(): what a user can mend ends in one line and exit code 2."""
    try:
        main()
    except (UserError, torch.OutOfMemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (f"out of memory ({str(error)[:60]}): raise --accumulate, or lower --batch or --image-size"
                   if isinstance(error, torch.OutOfMemoryError) else
                   f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
                   if isinstance(error, OSError) else str(error))
        print(f"error: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # other processes may be waiting for this one: to leave the group in order would wait for them
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] in (None, SystemExit):
            dist.destroy_process_group()


# ---- processes and devices ---------------------------------------------------------------------------------------

def setup(name="auto", workers=-1):
    """Joins torchrun's process group when there is one -> (rank, number of processes, device, loader workers)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, device = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.device("cpu")
    if name == "cuda" or name == "auto" and torch.cuda.is_available():
        if not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees no GPU; check the driver, or use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are fixed
    if workers < 0:
        workers = max(1, min(8, (os.cpu_count() or 1) // local - 1)) if device.type == "cuda" else 1
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # a loader competing for a core holds up the whole team of threads
            torch.set_num_threads(max(1, torch.get_num_threads() - workers))
        if sys.platform == "linux":  # keep freed memory: handing it back and forth each step costs a tenth of the step
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc; other C libraries ignore the call
                getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, 2 ** 30)
    if world > 1 and not dist.is_initialized():  # rank 0 may merge or score for long while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
    return rank, world, device, workers


def all_sum(tensor):  # over ranks, in place
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def rank0_first(action):
    """Runs action() on rank 0 and hands its result to all ranks; its failure is raised on every rank alike."""
    if not dist.is_initialized():
        return action()
    box = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:  # whatever it is: the others must not be left waiting
            box[1] = str(error) if isinstance(error, UserError) else repr(error)
    dist.broadcast_object_list(box)
    if box[1]:
        raise UserError(box[1])
    return box[0]


def precision(name, device):
    """The autocast dtype for 'auto' | 'bf16' | 'fp32'. auto: bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


# ---- log ---------------------------------------------------------------------------------------------------------
class Log:
    """Rank 0's progress line, the same as json lines in `path`, and TensorBoard curves if that package is installed."""

    def __init__(self, path, rank):
        self.file = open(path or os.devnull, "a", buffering=1) if rank == 0 else None
        self.tensorboard, self.line_open, self.said = None, False, set()
        if rank == 0 and path and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(Path(path).parent / "tensorboard"))

    def say(self, text, once=False):
        if self.file and not (once and text in self.said):
            self.said.add(text)
            print(("\n" if self.line_open else "") + text, flush=True)
            self.line_open = False

    def progress(self, stage, step, total, started, done_before, **values):
        if not self.file:
            return
        eta = (time.time() - started) / max(step - done_before, 1) * (total - step)
        text = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        line = f"{stage} {step}/{total} {text} eta {int(eta // 60)}:{int(eta % 60):02d}"
        self.line_open = sys.stdout.isatty()
        print("\r\033[K" + line if self.line_open else line, end="" if self.line_open else "\n", flush=True)
        self.file.write(json.dumps({"stage": stage, "step": step, "of": total, **values}) + "\n")
        for key, value in values.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(f"{stage}/{key}", value, step)


# ---- flags -------------------------------------------------------------------------------------------------------
def parse_flags(config, doc, comments, argv=None):
    """A flag for every field of the dataclass `config` -> an object of it. comments: {group: {field: help text}}; a text
    that starts with {a|b} lists the choices."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    fields = {f.name: f for f in dataclasses.fields(config)}
    for title, group in comments.items():
        section = parser.add_argument_group(title)
        for name, text in group.items():
            field, flag = fields.pop(name), "--" + name.replace("_", "-")
            if field.type in (bool, list):  # a list: the flag may be given several times
                section.add_argument(flag, action="store_true" if field.type is bool else "append", help=text)
                continue
            choices, _, rest = text[1:].partition("} ") if text.startswith("{") else ("", "", text)
            rest += f" [{field.default}]" if field.default not in ("", None) else ""
            section.add_argument(flag, type=field.type, default=field.default, help=rest,
                                 **({"choices": choices.split("|")} if choices else {"metavar": field.type.__name__}))
    assert not fields, f"fields without a comment: {list(fields)}"
    return config(**vars(parser.parse_args(argv)))
