"""What makes a run resumable: atomic files, checkpoints that survive a kill, stages that know what they depend on.

A run directory holds one folder per stage (teacher/, pseudo/, student/). A stage's stage.json says what it depends on and,
once it is finished, its result; running the same command again skips finished stages and goes on inside unfinished ones.

Random numbers need no saving: each is drawn from a generator seeded with (seed, step, index), so a checkpoint holds no
generator state, and a resumed run draws what the uninterrupted one would have drawn.
"""
import fcntl
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from util import UserError


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


def digest(value):
    """A short hash of anything json can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_weights(state):
    """The same for a state dict."""
    return digest([(k, hashlib.sha256(v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
                   for k, v in ((k, v.reshape(-1)) for k, v in state.items())])


# ---- checkpoints -------------------------------------------------------------------------------------------------

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
    """The newest checkpoint that can be read, or None."""
    return newest(folder)[1]


def weights_of(folder):
    """Path of the weights in a stage's folder: hpt.py's backbone.pt, or the newest usable checkpoint; of anything else itself."""
    own = Path(folder) / "backbone.pt"
    return str(own if own.exists() else newest(folder)[0] or folder)


def newest(folder):
    """The same with its path, or (None, None); damaged ones are named and skipped."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated zip, bad crc, missing record: torch raises many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            print(f"warning: {path} is damaged ({reason}); falling back to the one before it", file=sys.stderr)
    return None, None


def load_checkpoint(folder):
    """The newest checkpoint in a stage's folder. UserError when there is none."""
    state = load_latest(folder)
    if not isinstance(state, dict) or "class_ids" not in state:
        raise UserError(f"no checkpoint of st.py in {folder}; give a folder that holds step_*.pt files, or such a file")
    return state


# ---- stages ------------------------------------------------------------------------------------------------------

_held = {}


def claim(folder):
    """Locks a run directory for this process; the lock goes with the process, however that ends."""
    if folder.resolve() in _held:  # by this very process
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(f"{folder} cannot be used as run directory ({error.strerror}); give another --out")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked loader workers would keep that one alive
    except OSError:
        raise UserError(f"{folder} is in use by another process; wait for it, or give another --out")
    _held[folder.resolve()] = lock


def stage(folder, deps):
    """Opens a stage's folder -> its result if it is finished, None if it is to be run or resumed.

    deps: what the stage depends on, as json can hold it. UserError naming the differences when work was done in that
    folder with other deps.
    """
    folder = Path(folder)
    deps, path = json.loads(json.dumps(deps)), folder / "stage.json"
    if path.exists():
        record = json.loads(path.read_text())
        changed = [f"{k}: {record['deps'].get(k)} -> {deps.get(k)}" for k in {**record["deps"], **deps}
                   if record["deps"].get(k) != deps.get(k)]
        if changed and ("result" in record or checkpoints(folder) or any(folder.glob("part_*"))):
            raise UserError(f"{folder} was begun with other settings ({'; '.join(changed)}); give another --out, or "
                            "delete that folder and those after it")
        if not changed:
            return record.get("result")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"deps": deps})
    return None


def finish(folder, deps, result):
    """Marks a stage as finished -> result."""
    write_json(Path(folder) / "stage.json", {"deps": deps, "result": result})
    return result


# ---- what happens on the way -------------------------------------------------------------------------------------

class Stop:
    """Set by SIGTERM: the training loop saves at the next step boundary and exits with 143."""
    asked = False

    def __init__(self):
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))


def note_bad(folder, bad, seen):
    """Unusable images, replaced by a neighbour, are named once and listed in quarantine.txt."""
    for _, text in bad:
        if text not in seen:
            seen.add(text)
            print(f"warning: skipping {text}", file=sys.stderr, flush=True)
            with open(Path(folder) / "quarantine.txt", "a") as f:
                f.write(text + "\n")


def fail_nonfinite(folder, step, batch, per_image, rank):
    """Saves which images and boxes made the loss infinite or NaN, then ends the run; checkpoints are untouched."""
    rows = (~per_image.isfinite().all(1)).nonzero().flatten().tolist()
    report = [{"image_id": int(batch["image_id"][i]), "part": ("human", "pseudo", "joint")[int(batch["part"][i])],
               "losses": [str(v) for v in per_image[i].tolist()],
               "boxes": batch["boxes"][i][batch["labels"][i] >= 0].tolist()} for i in rows]
    path = Path(folder) / f"nonfinite_step{step}_rank{rank}.json"
    write_json(path, report)
    raise UserError(f"loss is not finite at step {step}; images {[r['image_id'] for r in report][:5]} and their boxes "
                    f"are in {path}. Lower --lr, or check the data with python data.py check")
