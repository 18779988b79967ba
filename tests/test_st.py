"""The pipeline as a user starts it: it resumes exactly, stages are shared by path, pieces and
processes add up. Runs are of 64 px and a dozen steps: what is tested is sameness, not accuracy."""

import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, forked, kill_at, records, start
from PIL import Image

import answers
import backbones
import data
import models
import ops
import recipes
import st
import util

TINY = ["--steps", "12", "--student-steps", "8", "--batch", "4", "--image-size", "64"]
TINY += ["--norm", "gn", "--labeled", "0.5", "--precision", "fp32", "--workers", "0"]
TINY += ["--device", "cpu"]
KINDS = {
    "det": ["--recipe", "tiny", "--threshold", "0.005", "--lr", "1e-3"],
    "seg": ["--recipe", "seg-tiny", "--threshold", "0.3", "--scales", "0.5,1", "--lr", "1e-2"],
    "cls": ["--recipe", "cls-tiny", "--threshold", "0.3", "--steps", "40", "--aug", "s1"],
}
KINDS["seg"] += ["--steps", "60", "--aug", "s1"]
STAGES = ("teacher", "student", "control")


def run(out, *flags):
    """st.py in this process -> its results."""
    st.main([*TINY, *map(str, flags), "--out", str(out)])
    return results_of(out)


def results_of(out):
    return json.loads((out / "results.json").read_text())


def weights(folder):
    return util.newest(folder)[1]["model"]


def inputs(folder):
    return util.read_stage(folder)["inputs"]


def shared(out):
    """Flags that take the teacher and the pseudo-labels of another run."""
    return ["--teacher", out / "teacher", "--pseudo", out / "pseudo"]


def furthest(a, b):
    """The largest difference between two state dicts; 0 if they have the same bits."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def same_answers(a, b):
    """Two stores of answers on the same images: their lines, and the bytes of their masks."""
    lines = [list(answers.read_answers(store)) for store in (a, b)]
    masks = [{p.name: p.read_bytes() for p in (store / "masks").iterdir()} for store in (a, b)]
    return lines[0] == lines[1] != [] and masks[0] == masks[1]


def same_log(lines, expected):
    """Every number that is logged of a stage, but for how fast it was."""
    assert lines.keys() == expected.keys()
    for step, line in lines.items():
        for name in line.keys() - {"stage", "images_s", "waiting"}:
            assert line[name] == pytest.approx(expected[step][name], rel=1e-4), (step, name)


@pytest.fixture(scope="module")
def roots(coco_root, voc_root, class_root):
    return {"det": coco_root, "seg": voc_root, "cls": class_root}


@pytest.fixture(scope="module")
def given(roots):
    """{task: flags of its runs}."""
    return {task: [*flags, "--root", roots[task]] for task, flags in KINDS.items()}


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """{task: folder of a whole, uninterrupted run with its control}."""
    folders = {}
    for task, flags in given.items():
        folders[task] = tmp_path_factory.mktemp("whole") / task
        run(folders[task], *flags, "--control")
    return folders


# ---- teacher, pseudo-labels, student, control ----------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_results_name_every_stage_the_command_and_the_seed(whole, task):
    results = results_of(whole[task])
    assert list(results) == ["teacher", "pseudo", "student", "control", "command", "seed"]
    for stage in STAGES:
        assert all(0 <= results[stage][metric] <= 1 for metric in st.TASKS[task].metrics)
        assert results[stage]["weights"] == util.digest_weights(weights(whole[task] / stage))
    assert results["command"] and results["seed"] == 0
    assert 0 < results["pseudo"]["kept"] <= results["pseudo"]["images"]
    assert sum(results["pseudo"]["share"].values()) == pytest.approx(1)
    assert len(records(whole[task], "student")) == 8


@pytest.mark.parametrize("task", KINDS)
def test_the_control_differs_from_the_student_by_the_pseudo_labels_alone(whole, task):
    student, control = inputs(whole[task] / "student"), inputs(whole[task] / "control")
    different = {k for k in {**student, **control} if student.get(k) != control.get(k)}
    assert different == {"human", "pseudo"}
    assert student["human"].startswith("4 a step") and student["pseudo"].startswith("4 a step")
    assert control["human"] == student["human"].replace("4 a step", "8 a step")
    assert student["start"] == results_of(whole[task])["teacher"]["weights"]


@pytest.mark.parametrize("init", ["teacher", "same"])
def test_student_and_control_start_from_the_teachers_weights_or_as_it_did(
    whole, given, tmp_path, init
):
    flags = [*given["cls"], *shared(whole["cls"]), "--control", "--student-init", init]
    run(tmp_path / "run", *flags, "--student-steps", "1", "--lr", "1e-9")
    teacher = util.stage_state(whole["cls"] / "teacher")
    begun = teacher["model"]
    if init == "same":
        begun = st.build(recipes.Method(**teacher["config"]), 3).state_dict()
    for stage in ("student", "control"):
        assert furthest(weights(tmp_path / "run" / stage), begun) < 1e-6
        assert ("start" in inputs(tmp_path / "run" / stage)) == (init == "teacher")


def test_rounds_take_the_student_as_teacher_and_go_on_with_the_control(given, tmp_path):
    results = run(tmp_path / "run", *given["cls"], "--rounds", "2", "--control")
    stages = ["teacher", "pseudo", "student", "control", "pseudo2", "student2", "control2"]
    assert list(results)[:7] == stages
    assert inputs(tmp_path / "run/student2")["start"] == results["student"]["weights"]
    assert inputs(tmp_path / "run/control2")["start"] == results["control"]["weights"]
    assert inputs(tmp_path / "run/pseudo2")["weights"] == results["student"]["weights"]


@pytest.mark.parametrize("task", KINDS)
def test_a_student_of_shared_stages_is_that_of_the_run_they_are_from(whole, given, tmp_path, task):
    results = run(tmp_path / "run", *given[task], *shared(whole[task]))
    assert list(results) == ["pseudo", "student", "command", "seed"]
    assert results["student"]["weights"] == results_of(whole[task])["student"]["weights"]
    assert not (tmp_path / "run/teacher").exists() and not (tmp_path / "run/pseudo").exists()


def test_a_run_may_end_after_its_teacher_or_its_labels(whole, given, tmp_path):
    results = run(tmp_path / "a", *given["seg"], "--until", "teacher")
    assert list(results) == ["teacher", "command", "seed"]
    assert results["teacher"]["weights"] == results_of(whole["seg"])["teacher"]["weights"]
    file, _ = util.newest(tmp_path / "a/teacher")  # a file will do
    results = run(tmp_path / "b", *given["seg"], "--teacher", file, "--until", "labels")
    assert list(results) == ["command", "seed"]
    assert same_answers(tmp_path / "b/pseudo", whole["seg"] / "pseudo")


def test_another_threshold_or_alpha_needs_no_other_answers(whole, given, tmp_path):
    before = results_of(whole["seg"])
    flags = [*given["seg"], *shared(whole["seg"])]
    surer = run(tmp_path / "surer", *flags, "--threshold", "0.6")
    louder = run(tmp_path / "louder", *flags, "--alpha", "2")
    assert surer["pseudo"]["pixels"] < before["pseudo"]["pixels"]
    assert louder["pseudo"] == before["pseudo"]
    assert len({results["student"]["weights"] for results in (before, surer, louder)}) == 3


def test_with_alpha_0_pseudo_labels_teach_nothing(whole, given, tmp_path):
    scores = sorted(row["score"] for row in answers.read_answers(whole["cls"] / "pseudo"))
    for alpha in ("0", "1"):
        flags = [*given["cls"], *shared(whole["cls"]), "--alpha", alpha]
        few = run(tmp_path / f"few{alpha}", *flags, "--threshold", scores[4])["pseudo"]["kept"]
        many = run(tmp_path / f"many{alpha}", *flags)["pseudo"]["kept"]
        assert many == len(scores) > few
        students = [weights(tmp_path / f"{name}{alpha}/student") for name in ("few", "many")]
        assert (furthest(*students) < 1e-6) == (alpha == "0")


def test_auto_chooses_the_threshold_by_labels_that_are_not_learnt(
    whole, given, tmp_path, monkeypatch
):
    asked = []
    best = [0.004, None]

    def best_f1(net, held_out, size, proc):
        asked.append(len(held_out))
        return best.pop(0), []

    monkeypatch.setattr(answers, "best_f1", best_f1)
    monkeypatch.setattr(recipes, "FLOOR", 0.004)
    flags = [*given["det"], "--threshold", "auto", "--teacher", whole["det"] / "teacher"]
    for _ in range(2):  # the second time it is known
        results = run(tmp_path / "run", *flags)
        assert results["pseudo"]["threshold"] == 0.004
        assert asked == [2]  # of 12 labelled images
    human = [inputs(out / "student")["human"] for out in (tmp_path / "run", whole["det"])]
    assert human[0] != human[1]
    with pytest.raises(util.UserError, match="finds none of the objects of 2 held-out images"):
        run(tmp_path / "none", *flags)
    with pytest.raises(util.UserError, match="has no threshold chosen by auto"):
        run(tmp_path / "number", *flags, "--pseudo", whole["det"] / "pseudo")


def test_what_is_there_is_not_computed_again_and_other_settings_are_refused(whole, given, tmp_path):
    folder = shutil.copytree(whole["cls"], tmp_path / "run")
    files = [path for stage in (*STAGES, "pseudo") for path in (folder / stage).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    flags = [*given["cls"], "--control"]
    assert run(folder, *flags) == results_of(whole["cls"]) | {"command": shlex.join(sys.argv)}
    run(folder, *flags, "--eval-every", "3")  # what is finished is not scored again
    assert before == {path: path.stat().st_mtime_ns for path in files}
    for change, words in (
        (["--lr", "0.1"], "teacher was begun with other settings .lr: 0.003 -> 0.1"),
        (["--labeled", "0.4"], "teacher was begun .*human: 4 a step of .* -> 4 a step of"),
        (["--alpha", "0.5"], "student was begun .*alpha: 1.0 -> 0.5"),  # the teacher does not
        (["--threshold", "0.4"], "student was begun .*threshold: 0.3 -> 0.4"),  # depend on these
    ):
        with pytest.raises(util.UserError, match=words):
            run(folder, *flags, *change)


def test_curves_hold_the_scores_on_the_way(given, tmp_path):
    flags = [*given["cls"], "--until", "teacher", "--eval-every", "16"]
    teacher = run(tmp_path / "run", *flags)["teacher"]
    assert [step for step, _ in teacher["curve"]] == [16, 32, 40]
    assert teacher["curve"][-1][1] == teacher["accuracy"]


def test_an_init_is_a_stage_and_fills_the_backbone(whole, given, tmp_path):
    flags = [*given["seg"], "--until", "teacher", "--steps", "1", "--lr", "1e-9"]
    run(tmp_path / "run", *flags, "--init", whole["cls"] / "teacher")
    backbone = [
        {name: value for name, value in weights(stage).items() if name.startswith("backbone.")}
        for stage in (tmp_path / "run/teacher", whole["cls"] / "teacher")
    ]
    assert furthest(*backbone) < 1e-6


# ---- the joint loss, joint training --------------------------------------------------------------


def follow_the_loss(lines, others, alpha=1.0, normalised=True):
    """Holds what is logged of the first steps to the formula: L_h, the losses of the parts
    `others`, and averages over the steps before."""
    sums = np.zeros(1 + len(others))
    for step in range(1, 9):
        losses = np.array([lines[step][f"{part} ce"] for part in ("human", *others)])
        ratio = np.ones(len(others))
        if sums.any():
            ratio = sums[0] / sums[1:]
        want = losses[0] + alpha * losses[1:].sum()
        if normalised:
            want = losses[0] + alpha * (ratio * losses[1:]).sum()
            want /= 1 + alpha * len(others)
        assert [lines[step][f"ratio {part}"] for part in others] == pytest.approx(ratio, rel=1e-5)
        assert lines[step]["loss"] == pytest.approx(want, rel=1e-5)
        sums = 0.99 * sums + 0.01 * losses


@pytest.mark.parametrize("norm", ["on", "off"])
def test_the_loss_of_a_step_is_the_papers_or_the_plain_sum(whole, given, tmp_path, norm):
    flags = [*given["cls"], *shared(whole["cls"]), "--alpha", "0.5", "--loss-norm", norm]
    run(tmp_path / "run", *flags)
    follow_the_loss(records(tmp_path / "run", "student"), ["pseudo"], 0.5, norm == "on")


@pytest.fixture(scope="module")
def joint(given, roots, tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "run"
    run(out, *given["seg"], "--joint", roots["cls"], "--control", "--threshold", "0")
    return out


def test_joint_training_is_one_more_part_with_a_head_of_its_own(joint):
    parts = {stage: [k for k in inputs(joint / stage) if k in data.PARTS] for stage in STAGES}
    assert parts["teacher"] == parts["control"] == ["human", "classified"]
    assert parts["student"] == ["human", "pseudo", "classified"]
    heads = [weights(joint / stage)["joint.weight"] for stage in STAGES]
    assert heads[0].shape == (3, 256)
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    net, _ = st.restore(joint / "student", util.Proc())
    assert furthest(net.state_dict(), weights(joint / "student")) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_joint_training_is_that_of_all_its_parts(joint, stage):
    others = [part for part in data.PARTS[1:] if part in inputs(joint / stage)]
    follow_the_loss(records(joint, stage), others)


def test_a_teacher_in_joint_training_depends_on_alpha(joint, given, roots, tmp_path):
    folder = shutil.copytree(joint, tmp_path / "run")
    flags = [*given["seg"], "--joint", roots["cls"], "--control", "--threshold", "0"]
    with pytest.raises(util.UserError, match="teacher was begun .*alpha: 1.0 -> 0.5"):
        run(folder, *flags, "--alpha", "0.5")


def test_detection_trains_jointly_too(given, roots, tmp_path):
    flags = [*given["det"], "--joint", roots["cls"], "--until", "teacher", "--steps", "2"]
    run(tmp_path / "run", *flags)
    for line in records(tmp_path / "run", "teacher").values():
        assert min(line[name] for name in ("human cls", "human box", "classified cls")) > 0
        assert line["classified box"] == 0


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["det", "cls"])
def test_a_teacher_that_is_sure_of_nothing_ends_the_run(whole, given, tmp_path, task):
    flags = [*given[task], *shared(whole[task]), "--threshold", "0.9999"]
    with pytest.raises(util.UserError, match="almost. empty at this threshold"):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run/student").exists()


def test_a_teacher_that_says_the_same_of_everything_ends_the_run(whole, given, tmp_path):
    store = shutil.copytree(whole["cls"] / "pseudo", tmp_path / "pseudo")
    (part,) = answers.answer_parts(store)
    part.write_text(re.sub(r'"label": \d', '"label": 1', part.read_text()))
    flags = [*given["cls"], "--teacher", whole["cls"] / "teacher", "--pseudo", store]
    with pytest.raises(util.UserError, match="almost. nothing but disc"):
        run(tmp_path / "run", *flags)


def test_a_teacher_or_a_store_of_other_classes_is_refused(whole, given, roots, tmp_path):
    other = shutil.copytree(roots["cls"], tmp_path / "other")
    for part in ("train", "val"):
        (other / part / "disc").rename(other / part / "ring")
    for flags, task in ((given["det"], "seg"), ([*KINDS["cls"], "--root", other], "cls")):
        with pytest.raises(util.UserError, match="another task or other classes"):
            run(tmp_path / "a", *flags, "--teacher", whole[task] / "teacher")
    flags = ["--teacher", whole["det"] / "teacher", "--pseudo", whole["cls"] / "pseudo"]
    with pytest.raises(util.UserError, match="no finished store of answers with the classes"):
        run(tmp_path / "b", *given["det"], *flags)


def test_leaks_are_found_and_left_out(given, roots, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pool = tmp_path / "pool"
    pool.mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pool / f"{i}.png")
    shutil.copy(next((roots["cls"] / "val").rglob("*.png")), pool / "renamed.png")
    flags = [*given["cls"], "--unlabeled", pool, "--until", "labels", "--steps", "1"]
    run(tmp_path / "run", *flags)
    assert "1 unlabelled images are labelled or validation images" in capsys.readouterr().out
    files = [row["file"] for row in answers.read_answers(tmp_path / "run/pseudo")]
    assert files == [str(pool / f"{i}.png") for i in range(5)]
    flags = [*given["cls"], "--labeled", "1", "--unlabeled", roots["cls"] / "train/disc"]
    with pytest.raises(util.UserError, match="no unlabelled image is left"):
        run(tmp_path / "none", *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--labeled", "0"], "--labeled 0.0 must be above 0"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--rounds", "2", "--pseudo", "x"], "for one round"),
        (["--joint", "x", "--recipe", "cls-tiny"], "--joint is for"),
        (["--batch", "3", "--accumulate", "2"], "do not divide by 1 processes x --accumulate 2"),
        (["--root", "nowhere"], "no data set at nowhere"),
        (["--teacher", "nowhere"], "nowhere does not exist"),
        (["--unlabeled", "nowhere"], "no image at --unlabeled nowhere"),
        (["--joint", "nowhere"], "no folder nowhere/train"),
        (["--labeled", "1"], "--labeled 1 leaves no image"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, words, coco_root, tmp_path):
    argv = ["--recipe", "tiny", "--root", str(coco_root), "--image-size", "64", "--workers", "0"]
    argv += ["--out", str(tmp_path / "run")]
    with pytest.raises(util.UserError, match=words) as error:
        st.main([*argv, *flags])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))


# ---- resuming ------------------------------------------------------------------------------------


def signalled(argv, line, number, wait=0.0):
    """st.py as a user starts it, sent a signal some seconds after it has printed a line that begins
    like this -> exit code, its words, its errors."""
    command = [sys.executable, str(ROOT / "st.py"), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    next((text for text in process.stdout if text.startswith(line)), None)
    time.sleep(wait)
    process.send_signal(number)
    words, errors = process.communicate()
    return process.returncode, words, errors


def test_killed_at_many_moments_it_ends_with_the_same_bits(whole, given, tmp_path):
    out = tmp_path / "run"
    argv = [str(flag) for flag in [*TINY, *given["seg"], "--control", "--out", out]]
    draw = random.Random(time.time_ns())

    code, words, errors = signalled(argv, "teacher 2/60", signal.SIGTERM)
    assert code == 143 and not errors, errors
    last = words.splitlines()[-1]
    said = re.fullmatch(rf"SIGTERM: saved {out}/teacher at step (\d+); the same .* resumes", last)
    stopped = int(said[1])
    assert util.newest(out / "teacher")[1]["step"] == stopped

    def killed(count, module, *names):
        def action():
            kill_at(count, module, *names)
            util.run(lambda: st.main(argv))

        return action

    # Flushes of a run that goes on: two for config.json, two for split.json, then a checkpoint's.
    moments = [(draw.randint(1, 60 - stopped), torch.optim.AdamW, "step")]
    moments += [(5, os, "fsync"), (3, os, "replace"), (6, os, "fsync")]
    moments += [(draw.randint(1, 3), answers.Answers, "add"), (4, answers.Answers, "add")]
    moments += [(draw.randint(1, 8), torch.optim.AdamW, "step"), (1, st.eval, "iou_of")]
    for moment in moments:
        assert forked(killed(*moment)) == [-signal.SIGKILL], moment
    assert not (out / "control").exists()  # all that was before it
    code, _, errors = signalled(argv, "control 1/8", signal.SIGKILL, draw.uniform(0, 0.3))
    assert code in (-signal.SIGKILL, 0), errors

    done = start(*argv)
    assert done.returncode == 0, done.stderr
    results, at_once = results_of(out), results_of(whole["seg"])
    assert "st.py --steps 12" in results["command"]
    assert same_answers(out / "pseudo", whole["seg"] / "pseudo")
    assert results["pseudo"] == at_once["pseudo"]
    for stage in STAGES:
        assert {**results[stage], "seconds": 0} == {**at_once[stage], "seconds": 0}


# ---- pieces, workers, processes ------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_pieces_add_up_to_the_step(whole, given, tmp_path, monkeypatch, task):
    recipe = KINDS[task][1]  # with SGD: however small a gradient, AdamW's step is of one size
    monkeypatch.setitem(recipes.RECIPES, recipe, {**recipes.RECIPES[recipe], "optimizer": "sgd"})
    flags = [*given[task], *shared(whole[task]), "--lr", "0.01"]
    for pieces in ("1", "2", "4"):
        run(tmp_path / pieces, *flags, "--accumulate", pieces)
    at_once = weights(tmp_path / "1/student")
    assert furthest(at_once, weights(whole[task] / "teacher")) > 1e-3
    for pieces in ("2", "4"):
        same_log(records(tmp_path / pieces, "student"), records(tmp_path / "1", "student"))
        assert furthest(weights(tmp_path / pieces / "student"), at_once) < 1e-5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_results_do_not_depend_on_loader_processes(whole, given, tmp_path):
    run(tmp_path / "run", *given["det"], "--until", "labels", "--workers", "2")
    assert furthest(weights(tmp_path / "run/teacher"), weights(whole["det"] / "teacher")) == 0
    assert same_answers(tmp_path / "run/pseudo", whole["det"] / "pseudo")


def test_two_processes_are_one(joint, given, roots, tmp_path):
    """Under torchrun, from one teacher: its answers, then a student of three parts in two pieces on
    each process, and its scores. (The learning rate is small: rounding grows with the steps.)"""
    flags = [*given["seg"], "--joint", roots["cls"], "--teacher", joint / "teacher"]
    flags += ["--threshold", "0", "--lr", "1e-5"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    at_once = run(one, *flags)
    done = start(*TINY, *flags, "--accumulate", "2", "--out", two, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(answers.answer_parts(two / "pseudo")) == 2
    assert same_answers(two / "pseudo", one / "pseudo")
    assert results_of(two)["pseudo"] == at_once["pseudo"]
    same_log(records(two, "student"), records(one, "student"))
    # The mean gradients of all steps, as AdamW has them: its steps alone would hide a wrong factor.
    a, b = (util.newest(out / "student")[1]["optimizer"]["state"] for out in (two, one))
    for k in b:
        difference = (a[k]["exp_avg"] - b[k]["exp_avg"]).norm()
        assert difference <= 1e-3 * b[k]["exp_avg"].norm() + 1e-7
    assert results_of(two)["student"]["mIoU"] == pytest.approx(at_once["student"]["mIoU"], abs=1e-3)


# ---- what it is made of --------------------------------------------------------------------------


def shapes_of(recipe, net, batch):
    """What the docstrings say of a recipe's targets and outputs, for 4 images of 64 px."""
    M = batch["boxes"].shape[1]
    if recipe == "tiny":
        A = len(net.anchors)
        targets = {"matched": (4, A), "classes": (4, A), "boxes": (4, M, 4)}
        return targets, [(4, A, 2), (4, A, 4)]
    if recipe == "tiny-c4":
        return {"boxes": (4, M, 4), "labels": (4, M)}, None
    if recipe == "cls-tiny":
        return {"class": (4,)}, [(4, 3)]
    side = 64 // net.stride
    return {"mask": (4, side, side)}, [(4, 3, side, side)]


@pytest.mark.parametrize("recipe", ["tiny", "tiny-c4", "seg-tiny", "seg-fine", "cls-tiny"])
def test_the_columns_of_tasks_fit_together(recipe, coco_root, voc_root, class_root):
    c = recipes.method(recipe, image_size=64, batch=4, norm="gn")
    task = st.TASKS[c.task]
    root = {data.coco: coco_root, data.voc: voc_root, data.folder: class_root}[task.load]
    images = task.load(root, "train")
    proc = util.Proc()
    batch = next(data.batches({"human": (images, 4)}, range(1), "s1", 64, 0, proc))
    net = st.build(c, len(images.class_names)).train()
    targets, count = task.targets(batch, net)
    of_targets, of_outputs = shapes_of(recipe, net, batch)
    assert {name: target.shape for name, target in targets.items()} == of_targets
    assert count.shape == (4,) and count.dtype == torch.float32
    outputs = net(backbones.normalise(batch["images"]), *[targets[name] for name in net.inputs])
    if of_outputs:
        tensors = [outputs] if torch.is_tensor(outputs) else outputs
        assert [tensor.shape for tensor in tensors] == of_outputs
    losses = task.losses(outputs, targets, count.sum().expand(4), net)
    assert losses.shape == (4, len(task.terms)) and losses.dtype == torch.float32
    losses.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    pairs = list(task.answers(net, images, [2, 0], c.image_size, proc))
    assert [i for i, _ in pairs] == [2, 0] and not net.training
    metrics = task.score(zip([0, 1], dict(pairs).values()), images.subset([2, 0]), proc)
    assert set(task.metrics) <= set(metrics)


def test_learning_rates_are_those_of_the_formulas():
    c = recipes.method("tiny", lr=1.0, batch=16)
    c.warmup, c.warmup_from = 10, 0.1
    rates = [st.lr_at(step, 110, c) for step in range(110)]
    warm = [0.1 + 0.9 * step / 10 for step in range(10)]
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(100)]
    assert rates == pytest.approx(warm + cosine)
    assert st.lr_at(0, 20, c) < st.lr_at(2, 20, c) == 1  # never more than a tenth of the steps
    c.drops = (0.5, 0.9)
    rates = [st.lr_at(step, 100, c) for step in (0, 10, 49, 50, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_every_stage_draws_its_own_stream(tmp_path):
    seeds = [st.stage_seed(3, tmp_path / name) for name in (*STAGES, "student2", "control2")]
    assert seeds[0] == 3 and len(set(seeds)) == 5
    assert seeds[1] == st.stage_seed(3, tmp_path / "elsewhere/student")


def test_a_loss_that_is_not_finite_names_its_images_and_boxes(given, roots, tmp_path, monkeypatch):
    real = ops.box_loss

    def broken(deltas, boxes, *rest):
        loss = real(deltas, boxes, *rest)
        return loss + torch.where(boxes.sum((1, 2)) > 0, math.nan, 0.0)

    monkeypatch.setattr(ops, "box_loss", broken)
    with pytest.raises(util.UserError, match="loss is not finite at step 0; images") as error:
        run(tmp_path / "run", *given["det"], "--until", "teacher")
    report = json.loads((tmp_path / "run/teacher/nonfinite_step0.json").read_text())
    assert report and all(row["boxes"] and row["part"] == 0 for row in report)
    names = [row["image_id"] for row in report]
    assert set(names) <= set(data.coco(roots["det"], "train").ids.tolist())
    assert str(names) in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_frozen_norms_want_weights_and_stay(given, tmp_path):
    flags = [*given["cls"], "--until", "teacher", "--norm", "frozen"]
    with pytest.raises(util.UserError, match="give --init"):
        run(tmp_path / "a", *flags)
    torch.manual_seed(0)
    net = backbones.build("resnet10")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    run(tmp_path / "b", *flags, "--init", tmp_path / "net.pth")
    state = weights(tmp_path / "b/teacher")
    assert torch.equal(state["backbone.bn1.weight"], net.bn1.weight)
    assert not torch.equal(state["backbone.conv1.weight"], net.conv1.weight)


def test_gradient_checkpointing_changes_no_bit(whole, given, tmp_path):
    run(tmp_path / "run", *given["det"], "--until", "teacher", "--gradient-checkpointing")
    assert furthest(weights(tmp_path / "run/teacher"), weights(whole["det"] / "teacher")) == 0


def test_restored_networks_answer_as_trained_ones(whole, roots):
    net, about = st.restore(whole["cls"] / "student", util.Proc())
    assert about["class_names"] == ["both", "disc", "square"] and about["step"] == 8
    val = data.folder(roots["cls"], "val")
    pairs = answers.classes(net, val, range(len(val)), 64, util.Proc())
    right = np.mean([answer["label"] == val.image_class[i] for i, answer in pairs])
    assert right == pytest.approx(results_of(whole["cls"])["student"]["accuracy"])
    assert isinstance(st.restore(whole["det"] / "teacher", util.Proc())[0], models.RetinaNet)


def test_a_threshold_under_the_floor_of_a_store_is_refused(coco_root, tmp_path):
    human = data.coco(coco_root, "train")
    result = {"images": 1, "classes": human.class_names}
    util.finish(tmp_path, {"floor": 0.05}, result)
    c = recipes.method("tiny", threshold="0.01")
    with pytest.raises(util.UserError, match="holds no answers under 0.05: raise --threshold"):
        st.confident(tmp_path, c, human, util.Proc())
