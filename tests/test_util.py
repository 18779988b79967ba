"""util.py: files that survive a kill, stages, processes, flags, and errors in one line."""

import dataclasses
import errno
import json
import os
import resource
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import forked, free_port, kill_at

import util
from util import Proc, UserError, flag

# ---- a stage that is killed ----------------------------------------------------------------------


class Part:
    """A part of a stage's state, of some size: it depends on every step there was."""

    def __init__(self):
        self.values = torch.zeros(1000, dtype=torch.float64)

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = state["values"]


def stage(folder, steps=6, inputs=("lr 1",), **more):
    """In the place of a stage of training."""
    if result := util.finished(folder, {"inputs": inputs}):
        return result
    part = Part()
    ckpt = util.Checkpoint(folder, Proc(), part=part, **more)
    for step in range(ckpt.step, steps):
        torch.manual_seed(step)
        part.values = part.values.cos() + torch.rand(1000, dtype=torch.float64)
        ckpt.notes.setdefault("curve", []).append(step)
        ckpt.step_done(steps)
    notes, _ = ckpt.close()
    return util.finish(folder, {"inputs": inputs}, {"sum": part.values.sum().item(), **notes})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}


WRITES = 1 + 6 + 1  # stage.json, the checkpoint of every step, stage.json with the result


@pytest.mark.parametrize("count", range(1, 3 * WRITES + 1))
def test_killed_at_any_flush_or_rename_a_stage_ends_with_the_same_bits(tmp_path, count):
    def killed():
        kill_at(count, os, "fsync", "replace")
        stage(tmp_path / "run")

    assert forked(killed) == [-signal.SIGKILL]
    result = stage(tmp_path / "run")
    assert result == stage(tmp_path / "whole") and result["curve"] == list(range(6))
    run, whole = (contents(tmp_path / name) for name in ("run", "whole"))
    names = {name for name in run if not name.endswith(".tmp")}  # a kill may leave half a file
    assert names == whole.keys() and all(run[name] == whole[name] for name in names)
    states = [util.newest(tmp_path / name)[1]["part"]["values"] for name in ("run", "whole")]
    assert torch.equal(*states)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:3000], "empty": b"", "flipped": content}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, how, capsys):
    whole = stage(tmp_path)
    (tmp_path / "stage.json").write_text(json.dumps({"inputs": {"inputs": ["lr 1"]}}))
    older, newest = util.checkpoints(tmp_path)
    assert (older.name, newest.name) == ("step_00000005.pt", "step_00000006.pt")  # the last two
    damage(newest, how)
    assert util.newest(tmp_path)[1]["step"] == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is damaged" in line and "falling back" in line
    assert stage(tmp_path) == whole
    damage(newest, how)
    damage(older, how)
    assert util.newest(tmp_path) == (None, None)


def test_state_beside_the_parts_is_kept_and_saved_now_and_then(tmp_path, monkeypatch):
    saved = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda s, path: saved.append(s["step"]) or save(s, path))
    before = []
    stage(tmp_path / "a", steps=50, about={"name": "x"}, before=lambda: before.append(1))
    assert saved == list(range(5, 51, 5)) and len(before) == 10
    monkeypatch.setattr(util.Checkpoint, "EVERY", 3)
    stage(tmp_path / "b", steps=50)
    assert saved[10:] == [*range(3, 50, 3), 50]
    state = util.newest(tmp_path / "a")[1]
    assert state["name"] == "x" and state["notes"]["curve"][-1] == 49 and state["spent"] > 0


def test_sigterm_saves_and_exits_143_and_the_same_command_goes_on(tmp_path, capfd):
    def terminated():
        step_done = util.Checkpoint.step_done

        def asked(self, steps):
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            step_done(self, steps)

        util.Checkpoint.step_done = asked
        util.Checkpoint.EVERY = 10**6
        stage(tmp_path / "run", steps=1000)

    assert forked(terminated) == [143]
    assert "saved" in capfd.readouterr().out and util.newest(tmp_path / "run")[1]["step"] == 4
    assert stage(tmp_path / "run", steps=30) == stage(tmp_path / "whole", steps=30)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (tmp_path / "run/stage.json").unlink()  # as if killed after the last step
    stage(tmp_path / "run", steps=30)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_is_one_line_and_costs_nothing_but_the_checkpoint_being_written(
    tmp_path, capfd
):
    """A limit on the size of files stands in for it: the kernel refuses the write half way."""

    def fill_up():
        if util.checkpoints(tmp_path / "run")[1:]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        util.run(lambda: stage(tmp_path / "run", before=fill_up))

    assert forked(full) == [2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: cannot write") and "step_00000003.pt: " in line
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["stage.json", "step_00000001.pt", "step_00000002.pt"]
    assert stage(tmp_path / "run") == stage(tmp_path / "whole")


# ---- stages and run directories ------------------------------------------------------------------


def test_a_finished_stage_is_not_run_again_and_has_its_result(tmp_path):
    assert util.read_stage(tmp_path) == {}
    result = stage(tmp_path, inputs=("lr 1", ("s4", 0.5)))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert stage(tmp_path, inputs=["lr 1", ["s4", 0.5]]) == result  # as json sees them
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert util.read_stage(tmp_path)["result"] == result


def test_other_inputs_are_refused_by_name_once_work_was_done(tmp_path):
    assert util.finished(tmp_path, {"lr": 1, "aug": "s4"}) is None
    assert util.finished(tmp_path, {"lr": 2, "aug": "s4"}) is None  # nothing was done yet
    (tmp_path / "part_0_of_1.jsonl").touch()
    assert util.finished(tmp_path, {"lr": 2, "aug": "s4"}) is None
    words = "with other settings .lr: 2 -> 3; aug: s4 -> None; new: None -> 1.; give another --out"
    with pytest.raises(UserError, match=words):
        util.finished(tmp_path, {"lr": 3, "new": 1})
    util.finish(tmp_path, {"lr": 2}, {"AP": 0.5})
    with pytest.raises(UserError, match="lr: 2 -> 3"):
        util.finished(tmp_path, {"lr": 3})
    assert util.finished(tmp_path, {"lr": 2}) == {"AP": 0.5}


def test_a_run_directory_is_one_processs_until_that_ends(tmp_path):
    def claims():
        util._held.clear()  # those of this process
        util.run(lambda: util.claim(tmp_path))

    assert forked(claims) == [0]
    util.claim(tmp_path)
    util.claim(tmp_path / ".." / tmp_path.name)  # again, by the same process
    assert forked(claims) == [2]
    os.close(util._held.pop(tmp_path.resolve()))
    assert forked(claims) == [0]
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="cannot be used as run directory"):
            util.claim(place)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_what_is_no_checkpoint_of_a_stage_is_refused_and_code_in_it_never_runs(tmp_path):
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 99)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save({"model": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    (tmp_path / "empty").mkdir()
    for name in ("garbage.pt", "foreign.pt", "evil.pt", "empty", "nowhere"):
        with pytest.raises(UserError, match=f"{name} (holds no checkpoint|does not exist)"):
            util.stage_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    state = {"model": {}, "config": {}, "class_names": []}
    torch.save(state, tmp_path / "empty/step_00000007.pt")
    for place in ("empty", "empty/step_00000007.pt"):
        assert util.stage_state(tmp_path / place) == state


def test_digests_follow_names_and_bits():
    weights = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(3, dtype=torch.int64)}
    digests = {util.digest_weights(weights), util.digest_weights({**weights, "c": weights["a"]})}
    digests.add(util.digest_weights({"a": weights["a"]}))
    digests.add(util.digest_weights({**weights, "a": torch.tensor([-0.0, 1.0])}))
    bits = weights["a"].bfloat16().expand(2, 2).t()  # any type and layout
    assert len(digests) == 4 and len(util.digest_weights({"a": bits})) == 16
    assert util.digest({"a": 1, "b": (2,)}) == util.digest({"b": [2], "a": 1})


def test_a_loss_that_is_not_finite_ends_the_stage_and_names_the_images_and_boxes(tmp_path):
    batch = {
        "image_id": [7, 8, 9],
        "part": torch.tensor([0, 0, 1]),
        "boxes": torch.arange(24.0).view(3, 2, 4),
        "labels": torch.tensor([[1, 0], [2, -1], [-1, -1]]),
    }
    terms = torch.tensor([[0.5, 0.5], [torch.nan, 0.5], [0.5, torch.inf]])
    util.assert_finite(torch.ones(2, 2), terms, batch, tmp_path, 3)
    with pytest.raises(UserError, match=r"not finite at step 4; images \[8, 9\] .*Lower --lr"):
        util.assert_finite(terms.sum(0), terms, batch, tmp_path, 4)
    rows = json.loads((tmp_path / "nonfinite_step4.json").read_text())
    assert rows[0] == {"image_id": 8, "part": 0, "boxes": [[8.0, 9.0, 10.0, 11.0]]}
    assert rows[1] == {"image_id": 9, "part": 1, "boxes": []}


# ---- errors and flags ----------------------------------------------------------------------------


def fails(error):
    def main():
        raise error

    return main


# fmt: off
@pytest.mark.parametrize("error, code, words", [
    (UserError("no data at x; give --root"), 2, "error: no data at x; give --root"),
    (OSError(errno.ENOSPC, "No space left", "out/a.pt"), 2, "the disk is full (out/a.pt)"),
    (OSError(errno.EDQUOT, "Quota"), 2, "the disk is full (while writing)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "raise --accumulate, or lower"),
    (KeyboardInterrupt(), 130, "")])
# fmt: on
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(error, code, words, capsys):
    with pytest.raises(SystemExit) as end:
        util.run(fails(error))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code and len(lines) == (code == 2) and words in "".join(lines)


def test_other_errors_keep_their_traceback():
    for error in (OSError(errno.EACCES, "denied"), ValueError("a bug")):
        with pytest.raises(type(error)):
            util.run(fails(error))
    with pytest.raises(UserError, match="^no$"):
        util.need([], "no")
    assert util.need([0], "no") is None


@dataclasses.dataclass
class Plan:
    """what is done

    More of it."""

    out: str = flag("runs/default", "run directory, 100% yours")
    until: str = flag("student", "the last stage", ("teacher", "student"))
    eval_every: int = flag(0, "steps")
    stage: list = flag((), "may be given several times")
    hidden: int = 3  # no flag


@dataclasses.dataclass
class Method:
    """what decides"""

    lr: float = flag(None, "peak")
    flip: bool = flag(False, "mirrored")


def test_flags_given_come_back_by_dataclass_and_no_others():
    argv = "--eval-every 5 --lr 1e-3 --stage a --stage b:2 --flip".split()
    plan, method = util.parse("doc", Plan, Method, argv=argv)
    assert plan == {"eval_every": 5, "stage": ["a", "b:2"]} and method == {"lr": 1e-3, "flip": True}
    assert util.parse("doc", Plan, Method, argv=[]) == [{}, {}]


@pytest.mark.parametrize(
    "argv", ["--lr much", "--until pseudo", "--eval 3", "--hidden 4", "--lr", "--flip 1", "x"]
)
def test_flags_that_do_not_exist_are_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        util.parse("doc", Plan, Method, argv=argv.split())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines


# ---- the log -------------------------------------------------------------------------------------


def test_the_log_is_rank_0s_on_screen_and_as_json_lines(tmp_path, capsys):
    log = util.Log(tmp_path / "log.jsonl")
    util.Log(tmp_path / "log.jsonl", rank=1).say("of another process")
    for _ in range(2):
        log.say("twice")
    meter = util.Meter(log, "teacher", 0, 45, 16)
    assert list(meter.timed([1, 2])) == [1, 2]
    assert [s for s in range(1, 46) if meter.due(s)] == [*range(1, 11), 20, 40, 45]
    meter.began -= 10  # seconds
    meter.waited = 5.0
    meter.line(20, loss=0.123456)
    line = "teacher 20/45 loss 0.1235 images_s 32 waiting 0.5 eta 0:12"
    assert capsys.readouterr().out.splitlines() == ["twice", "twice", line]
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert (record["stage"], record["step"], record["loss"]) == ("teacher", 20, 0.123456)


# ---- processes and devices -----------------------------------------------------------------------


def test_one_process_is_rank_0_of_1():
    proc = util.start(util.Machine(device="cpu", precision="fp32", workers=-1))
    assert (proc.rank, proc.world, proc.workers, proc.dtype) == (0, 1, 1, torch.float32)
    assert proc.sum(3) == 3 and proc.gather("a") == ["a"] and proc.first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        proc.first(lambda: 1 / 0)
    assert [list(Proc(rank=r, world=3).share(6)) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert util.precision("bf16", proc.device) is torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            util.start(util.Machine(device="cuda"))


def test_two_processes_agree_and_end_together(tmp_path, capfd):
    """Everything that is said between processes; gloo, forked."""
    port = free_port()

    def main():
        proc = util.start(util.Machine(device="cpu", precision="fp32", workers=0))
        assert dist.get_world_size() == proc.world == 2
        assert proc.sum(torch.tensor([1.0, proc.rank])).tolist() == [2, 1]
        assert proc.gather({"rank": proc.rank}) == [{"rank": 0}, {"rank": 1}]
        assert proc.first(lambda: f"of rank {proc.rank}") == "of rank 0"
        with pytest.raises(UserError, match="ZeroDivisionError"):  # on every rank
            proc.first(lambda: 1 / 0)
        net = torch.nn.BatchNorm1d(2)
        net.running_mean += proc.rank + 1
        proc.share_buffers(net)
        assert net.running_mean.tolist() == [1, 1]
        terminated(proc, tmp_path)
        proc.first(lambda: util.need(False, "no data; give --root"))

    def rank(number):
        def process():
            places = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({k: str(v) for k, v in {**places, "MASTER_PORT": port}.items()})
            util.run(main)

        return process

    assert forked(rank(0), rank(1)) == [2, 2]
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == ["error: no data; give --root"] * 2
    assert not [line for line in lines if "Traceback" in line]


def terminated(proc, folder):
    """All processes stop at the same step, though one alone was asked to; rank 0 saves."""
    part = Part()
    ckpt = util.Checkpoint(folder, proc, part=part)
    ckpt.EVERY = 10**6
    ckpt.asked = proc.rank == 1
    with pytest.raises(SystemExit):
        for _ in range(1000):
            ckpt.step_done(10**6)
    assert ckpt.step == 10
    proc.gather(None)
    assert util.newest(folder)[1]["step"] == 10
