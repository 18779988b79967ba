"""What every script needs: errors for users, processes and devices, the log, flags, files that
survive a kill.

A run directory holds a folder per stage (teacher/, pseudo/, student/). A stage's stage.json says
what it was made from and, once it is finished, its result: the same command again skips finished
stages and goes on inside unfinished ones. Random numbers need no saving: each comes from a
generator seeded by (seed, part, step, slot), so a resumed run draws what an uninterrupted one
would have drawn.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# ---- errors for users ----------------------------------------------------------------------------


class UserError(Exception):
    """A failure the user can mend: one line with what was wrong, where, and what to do."""


def need(condition, sentence):
    """UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def run(main):
    """Runs a script's main(): what a user can mend ends in one line and exit code 2."""
    try:
        main()
    except UserError as error:
        leave(str(error))
    except torch.OutOfMemoryError as error:
        leave(f"out of memory ({str(error)[:60]}): raise --accumulate, or lower --batch")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "while writing"
        leave(f"the disk is full ({where}); free some space and run the same command again")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] in (None, SystemExit):
            dist.destroy_process_group()  # without it gloo may abort at exit


def leave(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(2)  # others may wait for this process: leaving the group in order would wait too
    sys.exit(2)


# ---- flags ---------------------------------------------------------------------------------------


def flag(default, help, choices=()):
    """A field of a dataclass that is also a flag of the command line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def parse(doc, *configs, argv=None):
    """The command line -> for each dataclass in `configs` a dict of its flags that were given."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
        allow_abbrev=False,
    )
    for config in configs:
        group = parser.add_argument_group(config.__doc__.partition("\n")[0])
        for f in dataclasses.fields(config):
            if "help" in f.metadata:
                add_flag(group, f)
    given = vars(parser.parse_args(argv))
    names = [{f.name for f in dataclasses.fields(config)} for config in configs]
    return [{k: v for k, v in given.items() if k in own} for own in names]


def add_flag(group, f):
    name = "--" + f.name.replace("_", "-")
    text = f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        group.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
    elif f.type is list:  # may be given several times
        group.add_argument(name, action="append", default=argparse.SUPPRESS, help=text)
    else:
        if f.default not in (None, ""):
            text += f" [{f.default}]"
        kind = {"choices": f.metadata["choices"]}
        if not f.metadata["choices"]:
            kind = {"metavar": f.type.__name__}
        group.add_argument(name, type=f.type, default=argparse.SUPPRESS, help=text, **kind)


@dataclasses.dataclass
class Machine:
    """what computes: decides how fast, never (but for rounding) what comes out"""

    device: str = flag("auto", "auto: the GPU if there is one", ("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto",
        "auto: bf16 where the hardware multiplies it natively; losses are always fp32",
        ("auto", "bf16", "fp32"),
    )
    workers: int = flag(-1, "loader processes a process; -1: 1 on a CPU, up to 8 with a GPU")
    gradient_checkpointing: bool = flag(
        False, "keep less for the backward pass and compute it again: less memory, slower"
    )


# ---- the log -------------------------------------------------------------------------------------


class Log:
    """Rank 0's words and progress line; the latter also as json lines in `path` and, if that
    package is installed, as TensorBoard curves beside it."""

    def __init__(self, path=None, rank=0):
        self.quiet = rank > 0
        self.file = None
        self.tensorboard = None
        self.line_open = False
        if path and not self.quiet:
            self.file = open(path, "a", buffering=1)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(Path(path).parent / "tensorboard"))

    def say(self, text):
        if self.quiet:
            return
        print(("\n" if self.line_open else "") + text, flush=True)
        self.line_open = False

    def progress(self, stage, step, steps, seconds_left, **values):
        """One line for `step` of `steps`, with values by name."""
        if self.quiet:
            return
        shown = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        eta = f"{int(seconds_left // 60)}:{int(seconds_left % 60):02d}"
        line = f"{stage} {step}/{steps} {shown} eta {eta}"
        self.line_open = sys.stdout.isatty()
        if self.line_open:  # a terminal: over the line before
            print("\r\033[K" + line, end="", flush=True)
        else:
            print(line, flush=True)
        if self.file:
            record = {"stage": stage, "step": step, "of": steps, **values}
            self.file.write(json.dumps(record) + "\n")
        if self.tensorboard:
            for key, value in values.items():
                self.tensorboard.add_scalar(f"{stage}/{key}", value, step)


class Meter:
    """Times the loader and the steps of a stage, and writes its progress line now and then."""

    def __init__(self, log, stage, start, steps, images):
        self.log = log
        self.stage = stage
        self.start = start
        self.steps = steps
        self.images = images  # of a step, over all processes
        self.began = time.time()
        self.waited = 0.0

    def timed(self, batches):
        """The batches, counting the time spent waiting for them."""
        batches = iter(batches)
        while True:
            clock = time.time()
            batch = next(batches, None)
            self.waited += time.time() - clock
            if batch is None:
                return
            yield batch

    def due(self, step):
        """Whether a line is written for the step-th step (from 1)."""
        return step <= 10 or step % 20 == 0 or step == self.steps

    def line(self, step, **values):
        spent = time.time() - self.began
        done = step - self.start
        speed = {"images_s": done * self.images / spent, "waiting": self.waited / spent}
        left = spent / max(done, 1) * (self.steps - step)
        self.log.progress(self.stage, step, self.steps, left, **values, **speed)


# ---- processes and devices -----------------------------------------------------------------------


@dataclasses.dataclass
class Proc:
    """This process among torchrun's: who it is, what it computes with. One process alone is rank 0
    of a world of 1."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32  # of autocast
    workers: int = 0
    gradient_checkpointing: bool = False
    log: Log = dataclasses.field(default_factory=Log)

    def sum(self, tensor):
        """The tensor added up over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """Every process's value (anything pickle takes), a list on all of them."""
        shares = [value]
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, value)
        return shares

    def union(self, pairs):
        """Every process's (key, value) as one dict, sorted by key."""
        shares = self.gather(dict(pairs))
        return dict(sorted(pair for share in shares for pair in share.items()))

    def first(self, action):
        """action() of rank 0, its result on all ranks; a failure there is raised on every rank."""
        if self.world == 1:
            return action()
        box = [None, None]  # result, error
        if self.rank == 0:
            try:
                box[0] = action()
            except Exception as error:  # of any kind: the others must not be left waiting
                box[1] = str(error) if isinstance(error, UserError) else repr(error)
        dist.broadcast_object_list(box)
        need(box[1] is None, box[1])
        return box[0]

    def share(self, count):
        """This process's slots of the `count` in a step."""
        own = count // self.world
        return range(self.rank * own, (self.rank + 1) * own)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def cat(self, tensor):
        """(B, ...) of every process -> (N, ...) on all of them, in their order, no gradient."""
        if self.world == 1:
            return tensor
        tensor = tensor.contiguous()
        shares = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(shares, tensor)
        return torch.cat(shares)

    def wrap(self, net, sync=True):
        """DDP. sync: batch norm is synchronised on GPUs (PyTorch has none for the CPU); else its
        running statistics stay each process's own."""
        if self.world == 1:
            return net
        devices = None
        if self.device.type == "cuda":
            devices = [self.device.index]
            if sync:
                net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        model = DistributedDataParallel(net, device_ids=devices)
        if not sync:  # as an argument it is deprecated, and its successor is not in every release
            model.broadcast_buffers = False
        return model

    def no_sync(self, model, last):
        """For all pieces of a step but the last: gradients are exchanged once."""
        if self.world == 1 or last:
            return contextlib.nullcontext()
        return model.no_sync()

    def share_buffers(self, net):
        """Batch-norm averages: those of rank 0 are saved, and are what every process scores."""
        if self.world > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)


def start(machine):
    """Joins torchrun's processes, if there are any -> Proc."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = machine.device == "cuda" or (machine.device == "auto" and torch.cuda.is_available())
    workers = machine.workers
    if cuda:
        sentence = "--device cuda, but PyTorch sees no GPU; check the driver, or give --device cpu"
        need(torch.cuda.is_available(), sentence)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are fixed
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(8, cores - 1)) if workers < 0 else workers
    else:
        device = torch.device("cpu")
        workers = 1 if workers < 0 else workers
        if "OMP_NUM_THREADS" not in os.environ:  # a loader that competes for a core holds up all
            torch.set_num_threads(max(1, torch.get_num_threads() - workers))
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():  # rank 0 may score for long while others wait
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    dtype = precision(machine.precision, device)
    return Proc(rank, world, device, dtype, workers, machine.gradient_checkpointing, Log(rank=rank))


def keep_freed_memory():
    """glibc hands freed memory back to the system and asks for it again, in every step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            if mallopt:
                mallopt(parameter, 2**30)


def precision(name, device):
    """The autocast dtype for auto | bf16 | fp32. auto: bf16 where the hardware multiplies it."""
    if name != "auto":
        native = name == "bf16"
    elif device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = Path("/proc/cpuinfo")
        known = cpu.read_text() if cpu.exists() else ""
        native = "avx512_bf16" in known or "amx_bf16" in known
    return torch.bfloat16 if native else torch.float32


# ---- files ---------------------------------------------------------------------------------------


def write_atomic(path, write):
    """write(temporary path), flush to disk, rename: a reader never sees half a file, whenever the
    process or the machine dies."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # else a crash may undo the rename
    except OSError as error:  # a full disk, usually; what was saved before is untouched
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; free some space and run the same command again"
        ) from None


def flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def save_tensors(path, state):
    """torch.save, atomically."""

    def write(temporary):
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch reports a failed write (disk full) as RuntimeError
            raise OSError(str(error).split("\n")[0]) from None

    write_atomic(path, write)


def digest(value):
    """A short hash of anything json can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_weights(state):
    """A short hash of a state dict."""
    rows = []
    for name, value in state.items():
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        rows.append((name, hashlib.sha256(content.numpy().tobytes()).hexdigest()))
    return digest(rows)


def digest_file(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def assert_finite(losses, terms, batch, folder, step):
    """Ends the run, naming the images and boxes that made the loss infinite or NaN. Checkpoints
    are as they were."""
    if losses.isfinite().all():  # waits for the device
        return
    report = []
    for i in (~terms.isfinite().all(1)).nonzero().flatten().tolist():
        boxes = batch["boxes"][i][batch["labels"][i] >= 0].tolist()
        report.append(
            {"image_id": batch["image_id"][i], "part": int(batch["part"][i]), "boxes": boxes}
        )
    path = folder / f"nonfinite_step{step}.json"
    write_json(path, report)
    names = [row["image_id"] for row in report[:5]]
    raise UserError(
        f"loss is not finite at step {step}; images {names} and their boxes are in {path}. Lower "
        "--lr, or check the data with python -m tools.check"
    )


# ---- checkpoints ---------------------------------------------------------------------------------


class Checkpoint:
    """The state of a training stage in folder/step_N.pt, the newest two: one may be damaged.

    parts: objects with state_dict and load_state_dict, by name; what is there is resumed at once.
    about: values stored beside them. before: called on every process before saving.
    """

    EVERY = 5000  # steps at most between two saves

    def __init__(self, folder, proc, about=None, before=None, **parts):
        self.folder = Path(folder)
        self.proc = proc
        self.about = about or {}
        self.before = before
        self.parts = parts
        self.step = 0
        self.notes = {}  # what the loop wants back besides: the curve so far, ...
        self.began = time.time()
        _, state = newest(folder)
        if state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            self.notes = state["notes"]
            self.began -= state["spent"]
        self.asked = False  # to stop, by SIGTERM
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        self.asked = True

    def step_done(self, steps, every=None):
        """After every step of `steps`: saves now and then (or every `every` steps); after SIGTERM
        saves and exits 143."""
        self.step += 1
        stopping = self.asked
        if self.proc.world > 1:  # all or none: they agree every ten steps
            stopping = self.step % 10 == 0 and self.anyone_asked()
        every = every or max(1, min(self.EVERY, steps // 10))
        if self.step == steps or stopping or self.step % every == 0:
            self.save()
        if stopping:
            log = self.proc.log
            log.say(f"SIGTERM: saved {self.folder} at step {self.step}; the same command resumes")
            raise SystemExit(143)

    def close(self):
        """After the last step -> notes, seconds. SIGTERM ends the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.notes, self.seconds()

    def anyone_asked(self):
        asked = torch.tensor(float(self.asked), device=self.proc.device)
        return self.proc.sum(asked).item() > 0

    def save(self):
        if self.before:
            self.before()
        if self.proc.rank > 0:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state.update(self.about, step=self.step, notes=self.notes, spent=self.seconds())
        save_tensors(self.folder / f"step_{self.step:08d}.pt", state)
        for old in checkpoints(self.folder)[:-2]:
            old.unlink()

    def seconds(self):
        """Since the stage began, had it never been interrupted."""
        return time.time() - self.began


def checkpoints(folder):
    return sorted(Path(folder).glob("step_*.pt"))


def newest(folder):
    """(path, state) of the newest checkpoint that can be read, or (None, None). Damaged ones are
    named and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            damaged = zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
            if damaged:
                raise ValueError(f"{damaged} has another checksum")
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # truncated zip, bad crc, missing record: torch raises many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            line = f"warning: {path} is damaged ({reason}); falling back to the one before it"
            print(line, file=sys.stderr, flush=True)
    return None, None


def stage_state(path):
    """The checkpoint of st.py at `path`: a step_*.pt file, or the newest in a stage's folder."""
    if os.path.isdir(path):
        state = newest(path)[1]
    else:
        need(os.path.exists(path), f"{path} does not exist; give a stage's folder or a step_*.pt")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises many kinds
            state = None
    fits = isinstance(state, dict) and {"model", "config", "class_names"} <= state.keys()
    need(fits, f"{path} holds no checkpoint of st.py; give a stage's folder such as runs/x/student")
    return state


def weights_of(path):
    """Path of the weights in a stage's folder: backbone.pt of hpt.py, or the newest checkpoint of
    st.py. Of anything else itself."""
    backbone = Path(path) / "backbone.pt"
    if backbone.exists():
        return str(backbone)
    return str(newest(path)[0] or path)


# ---- stages --------------------------------------------------------------------------------------

_held = {}  # locks of this very process


def claim(folder):
    """Locks a run directory for this process; the lock goes with it, however it ends."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() in _held:
            return
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used as run directory ({error.strerror}); give another --out"
        ) from None
    try:
        # not flock, which forked loader workers would keep alive
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{folder} is in use by another process; wait for it, or give another --out"
        ) from None
    _held[folder.resolve()] = lock


def finished(folder, inputs):
    """Opens a stage's folder -> its result if it is finished, None if it is to be run or resumed.

    inputs: all it is made from, as json can hold it. UserError naming the differences when work
    was done in that folder from other inputs.
    """
    folder = Path(folder)
    inputs = json.loads(json.dumps(inputs))
    record = read_stage(folder)
    before = record.get("inputs", {})
    changed = [k for k in {**before, **inputs} if before.get(k) != inputs.get(k)]
    if record and not changed:
        return record.get("result")
    begun = "result" in record or checkpoints(folder) or any(folder.glob("part_*"))
    if record and begun:
        what = "; ".join(f"{k}: {before.get(k)} -> {inputs.get(k)}" for k in changed)
        raise UserError(
            f"{folder} was begun with other settings ({what}); give another --out, or delete that "
            "folder and those after it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stage.json", {"inputs": inputs})
    return None


def finish(folder, inputs, result):
    """Marks a stage as finished -> result."""
    write_json(Path(folder) / "stage.json", {"inputs": inputs, "result": result})
    return result


def read_stage(folder):
    """{"inputs", "result" once it is finished} of a stage's folder, {} without a stage.json."""
    path = Path(folder) / "stage.json"
    return json.loads(path.read_text()) if path.exists() else {}
