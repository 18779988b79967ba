"""The pipeline as a user starts it: it resumes exactly, stages are shared by path, pieces and
processes add up. Runs are of 64 px and a dozen steps: what is tested is sameness, not accuracy."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import forked, kill_at, records, start
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
KINDS = {
    "det": ["--recipe", "tiny", "--threshold", "0.005", "--lr", "1e-3"],
    "seg": ["--recipe", "seg-tiny", "--threshold", "0.3", "--scales", "0.5,1", "--lr", "1e-2"],
    "cls": ["--recipe", "cls-tiny", "--threshold", "0.3", "--steps", "40", "--aug", "s1"],
}
KINDS["seg"] += ["--steps", "60", "--aug", "s1"]


def run(out, *flags):
    """st.py in this process -> its results."""
    st.main([*TINY, *map(str, flags), "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def weights(folder):
    return util.newest(folder)[1]["model"]


def inputs(folder):
    return util.read_stage(folder)["inputs"]


@pytest.fixture(scope="module")
def roots(coco_root, voc_root, class_root):
    return {"det": coco_root, "seg": voc_root, "cls": class_root}


@pytest.fixture(scope="module")
def whole(roots, tmp_path_factory):
    """{task: folder of a whole, uninterrupted run with its control}."""
    folders = {}
    for task, flags in KINDS.items():
        folders[task] = tmp_path_factory.mktemp("whole") / task
        run(folders[task], *flags, "--root", roots[task], "--control")
    return folders


# ---- teacher, pseudo-labels, student, control ----------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_results_name_every_stage_the_command_and_the_seed(whole, task):
    results = json.loads((whole[task] / "results.json").read_text())
    assert list(results) == ["teacher", "pseudo", "student", "control", "command", "seed"]
    metric = st.TASKS[task].metrics[0]
    for stage in ("teacher", "student", "control"):
        assert 0 <= results[stage][metric] <= 1
        assert results[stage]["weights"] == util.digest_weights(weights(whole[task] / stage))
    assert 0 < results["pseudo"]["kept"] <= results["pseudo"]["images"]
    assert sum(results["pseudo"]["share"].values()) == pytest.approx(1)
    assert len(records(whole[task], "student")) == 8


@pytest.mark.parametrize("task", KINDS)
def test_the_control_differs_from_the_student_by_the_pseudo_labels_alone(whole, task):
    student, control = inputs(whole[task] / "student"), inputs(whole[task] / "control")
    different = {k for k in {**student, **control} if student.get(k) != control.get(k)}
    assert different == {"human", "pseudo"}
    assert student["human"].startswith("4 a step") and student["pseudo"].startswith("4 a step")
    assert control["human"].startswith("8 a step")
    teacher = json.loads((whole[task] / "results.json").read_text())["teacher"]["weights"]
    assert student["start"] == teacher


def test_the_student_may_start_as_its_teacher_did(whole, roots, tmp_path):
    given = ["--teacher", whole["cls"] / "teacher", "--pseudo", whole["cls"] / "pseudo"]
    flags = [*KINDS["cls"], "--root", roots["cls"], *given, "--student-init", "same"]
    run(tmp_path / "same", *flags)
    assert "start" not in inputs(tmp_path / "same/student")


def test_rounds_take_the_student_as_teacher_and_go_on_with_the_control(roots, tmp_path):
    flags = [*KINDS["cls"], "--root", roots["cls"], "--rounds", "2", "--control"]
    results = run(tmp_path / "run", *flags)
    stages = ["teacher", "pseudo", "student", "control", "pseudo2", "student2", "control2"]
    assert list(results)[:7] == stages
    assert inputs(tmp_path / "run/student2")["start"] == results["student"]["weights"]
    assert inputs(tmp_path / "run/control2")["start"] == results["control"]["weights"]
    assert inputs(tmp_path / "run/pseudo2")["weights"] == results["student"]["weights"]


def test_stages_are_shared_by_path(whole, roots, tmp_path):
    root = ["--root", roots["seg"]]
    part = run(tmp_path / "a", *KINDS["seg"], *root, "--until", "teacher")
    assert "pseudo" not in part
    given = ["--teacher", tmp_path / "a/teacher"]
    run(tmp_path / "b", *KINDS["seg"], *root, *given, "--until", "labels")
    given += ["--pseudo", tmp_path / "b/pseudo"]
    results = run(tmp_path / "c", *KINDS["seg"], *root, *given)
    at_once = json.loads((whole["seg"] / "results.json").read_text())
    assert results["student"]["weights"] == at_once["student"]["weights"]
    flags = ["--threshold", "0.6", "--alpha", "2"]  # without another pass
    other = run(tmp_path / "d", *KINDS["seg"], *root, *given, *flags)
    assert other["pseudo"]["pixels"] < results["pseudo"]["pixels"]
    assert not (tmp_path / "d/pseudo").exists()


def test_what_is_there_is_not_computed_again_and_other_settings_are_refused(whole, roots, tmp_path):
    folder = shutil.copytree(whole["cls"], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("step_*.pt")}
    flags = [*KINDS["cls"], "--root", roots["cls"], "--control"]
    run(folder, *flags)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("step_*.pt")}
    run(folder, *flags, "--eval-every", "3")  # what is finished is not scored again
    with pytest.raises(util.UserError, match="teacher was begun with other settings .lr: 0.003 ->"):
        run(folder, *flags, "--lr", "0.1")
    with pytest.raises(util.UserError, match="student was begun .*alpha: 1.0 -> 0.5"):
        run(folder, *flags, "--alpha", "0.5")  # the teacher does not depend on it


def test_curves_hold_the_scores_on_the_way(roots, tmp_path):
    flags = [*KINDS["cls"], "--root", roots["cls"], "--until", "teacher", "--eval-every", "16"]
    teacher = run(tmp_path / "run", *flags)["teacher"]
    assert [step for step, _ in teacher["curve"]] == [16, 32, 40]
    assert teacher["curve"][-1][1] == teacher["accuracy"]


def test_an_init_is_a_stage_and_fills_the_backbone(whole, roots, tmp_path):
    flags = [*KINDS["seg"], "--root", roots["seg"], "--until", "teacher", "--steps", "1"]
    run(tmp_path / "run", *flags, "--init", whole["cls"] / "teacher", "--lr", "1e-9")
    given = weights(whole["cls"] / "teacher")["backbone.layer1.0.conv1.weight"]
    assert torch.allclose(
        weights(tmp_path / "run/teacher")["backbone.layer1.0.conv1.weight"], given
    )


# ---- joint training ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(roots, tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "run"
    flags = [*KINDS["seg"], "--root", roots["seg"], "--joint", roots["cls"], "--control"]
    run(out, *flags, "--threshold", "0")
    return out


def test_joint_training_is_one_more_part_with_a_head_of_its_own(joint):
    state = weights(joint / "student")
    assert state["joint.weight"].shape == (3, 256)
    assert not torch.equal(state["joint.weight"], weights(joint / "teacher")["joint.weight"])
    line = records(joint, "student")[8]
    assert {"human ce", "pseudo ce", "classified ce", "ratio pseudo", "ratio classified"} <= set(
        line
    )
    assert "pseudo ce" not in records(joint, "control")[8]
    parts = [k for k in inputs(joint / "student") if k in data.PARTS]
    assert parts == ["human", "pseudo", "classified"]


def test_the_loss_of_a_step_is_the_joint_loss_of_its_parts(joint):
    for line in records(joint, "student").values():
        others = line["pseudo ce"] * line["ratio pseudo"]
        others += line["classified ce"] * line["ratio classified"]
        assert line["loss"] == pytest.approx((line["human ce"] + others) / 3, rel=1e-5)


# ---- refusals ------------------------------------------------------------------------------------


def test_a_teacher_that_answers_nothing_or_one_class_ends_the_run(whole, roots, tmp_path):
    flags = [*KINDS["det"], "--root", roots["det"], "--teacher", whole["det"] / "teacher"]
    with pytest.raises(util.UserError, match="almost. empty at this threshold"):
        run(tmp_path / "a", *flags, "--threshold", "0.9")
    given = ["--teacher", whole["cls"] / "teacher", "--unlabeled", roots["cls"] / "train/disc"]
    for path in (roots["cls"] / "train/disc").iterdir():
        shutil.copy(path, tmp_path / f"copy_{path.name}")
    with pytest.raises(util.UserError):  # all of them are labelled images too, or of one class
        run(tmp_path / "b", *KINDS["cls"], "--root", roots["cls"], "--labeled", "1", *given)


def test_a_teacher_or_a_store_of_other_classes_is_refused(whole, roots, tmp_path):
    flags = [*KINDS["det"], "--root", roots["det"]]
    with pytest.raises(util.UserError, match="another task or other classes"):
        run(tmp_path / "a", *flags, "--teacher", whole["seg"] / "teacher")
    given = ["--teacher", whole["det"] / "teacher", "--pseudo", whole["cls"] / "pseudo"]
    with pytest.raises(util.UserError, match="no finished store of answers with the classes"):
        run(tmp_path / "b", *flags, *given)


def test_leaks_are_found_and_left_out(roots, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    shutil.copy(next((roots["cls"] / "val").rglob("*.png")), tmp_path / "renamed.png")
    flags = ["--root", roots["cls"], "--unlabeled", tmp_path, "--until", "labels", "--steps", "1"]
    run(tmp_path / "run", *KINDS["cls"], *flags)
    assert "1 unlabelled images are labelled or validation images" in capsys.readouterr().out
    assert util.read_stage(tmp_path / "run/pseudo")["result"]["images"] == 5


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
        (["--labeled", "1"], "--labeled 1 leaves no image"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, words, coco_root, tmp_path):
    argv = ["--recipe", "tiny", "--root", str(coco_root), "--image-size", "64", "--workers", "0"]
    argv += ["--out", str(tmp_path / "run")]
    with pytest.raises(util.UserError, match=words) as error:
        st.main([*argv, *flags])
    assert "\n" not in str(error.value)


# ---- resuming ------------------------------------------------------------------------------------


def test_killed_at_many_moments_it_ends_with_the_same_bits(whole, roots, tmp_path, capfd):
    out = tmp_path / "run"
    flags = [*TINY, *KINDS["seg"], "--root", roots["seg"], "--control", "--out", out]
    argv = [str(flag) for flag in flags]

    def killed(count, module, *names):
        def action():
            kill_at(count, module, *names)
            util.run(lambda: st.main(argv))

        return action

    moments = [(20, torch.optim.AdamW, "step"), (9, os, "fsync"), (4, os, "replace")]
    moments += [(3, answers.Answers, "add"), (3, torch.optim.AdamW, "step"), (1, st.eval, "iou_of")]
    for moment in moments:
        assert forked(killed(*moment)) == [-signal.SIGKILL], moment

    def terminated():
        step_done = util.Checkpoint.step_done

        def asked(self, steps, every=None):
            if self.folder.name == "control" and self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            step_done(self, steps, every)

        util.Checkpoint.step_done = asked
        util.run(lambda: st.main(argv))

    assert forked(terminated) == [143]
    assert "saved" in capfd.readouterr().out
    done = start(*argv)  # and for real
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    at_once = json.loads((whole["seg"] / "results.json").read_text())
    for stage in ("teacher", "student", "control"):
        assert results[stage]["weights"] == at_once[stage]["weights"]
        assert results[stage]["mIoU"] == at_once[stage]["mIoU"]


# ---- pieces, workers, processes ------------------------------------------------------------------


@pytest.mark.parametrize("task", ["det", "seg"])
def test_pieces_add_up_to_the_step(whole, roots, tmp_path, task):
    flags = [*KINDS[task], "--root", roots[task], "--until", "teacher", "--accumulate", "2"]
    run(tmp_path / "run", *flags, "--steps", "4")
    pieces, at_once = records(tmp_path / "run", "teacher"), records(whole[task], "teacher")
    assert pieces[1]["loss"] == pytest.approx(at_once[1]["loss"], rel=1e-5)


def test_results_do_not_depend_on_loader_processes(whole, roots, tmp_path):
    flags = [*KINDS["det"], "--root", roots["det"], "--until", "teacher", "--workers", "2"]
    run(tmp_path / "run", *flags)
    loaded, teacher = weights(tmp_path / "run/teacher"), weights(whole["det"] / "teacher")
    assert all(torch.equal(loaded[k], teacher[k]) for k in teacher)


def test_two_processes_are_one(joint, roots, tmp_path):
    """Three parts, two pieces, pseudo-labels and scores, under torchrun, from the same teacher."""
    flags = [*TINY, *KINDS["seg"], "--root", roots["seg"], "--joint", roots["cls"], "--control"]
    out = tmp_path / "run"
    flags += ["--threshold", "0", "--accumulate", "2", "--out", out, "--teacher", joint / "teacher"]
    done = start(*flags, processes=2)
    assert done.returncode == 0, done.stderr
    two, one = (json.loads((f / "results.json").read_text()) for f in (out, joint))
    for name in ("images", "kept", "pixels"):
        assert two["pseudo"][name] == one["pseudo"][name]
    for stage in ("student", "control"):
        a, b = records(out, stage), records(joint, stage)
        for step, rel in ((1, 1e-4), (2, 1e-2)):  # rounding grows from step to step
            for name in (k for k in a[step] if k.endswith(" ce") or k == "loss"):
                assert a[step][name] == pytest.approx(b[step][name], rel=rel), (stage, step, name)
        assert 0 <= two[stage]["mIoU"] <= 1


# ---- what it is made of --------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tiny", "tiny-c4", "seg-tiny", "seg-fine", "cls-tiny"])
def test_the_columns_of_tasks_fit_together(recipe, coco_root, voc_root, class_root):
    c = recipes.method(recipe, image_size=64, batch=4)
    task = st.TASKS[c.task]
    root = {data.coco: coco_root, data.voc: voc_root, data.folder: class_root}[task.load]
    images = task.load(root, "train")
    proc = util.Proc()
    batch = next(data.batches({"human": (images, 4)}, range(1), "s1", 64, 0, proc))
    net = st.build(c, len(images.class_names))
    targets, count = task.targets(batch, net)
    assert count.shape == (4,) and all(len(target) == 4 for target in targets.values())
    pixels = backbones.normalise(batch["images"])
    outputs = net.train()(pixels, *[targets[name] for name in net.inputs])
    losses = task.losses(outputs, targets, count.sum().expand(4), net)
    assert losses.shape == (4, len(task.terms)) and losses.dtype == torch.float32
    losses.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    found = dict(task.answers(net, images, [2, 0], c.image_size, proc))
    assert list(found) == [2, 0]
    val = images.subset([0, 2])
    metrics = task.score(task.answers(net, val, [0, 1], c.image_size, proc), val, proc)
    assert set(task.metrics) <= set(metrics)


def test_learning_rates_are_those_of_the_formulas():
    c = recipes.method("tiny", lr=1.0, batch=16)
    c.warmup, c.warmup_from = 10, 0.1
    rates = [st.lr_at(step, 110, c) for step in range(110)]
    assert rates[:2] == pytest.approx([0.1, 0.19]) and rates[10] == 1
    assert rates[60] == pytest.approx(0.5) and rates[85] == pytest.approx(
        0.5 + 0.5 * math.cos(0.75 * math.pi)
    )
    assert st.lr_at(0, 20, c) < st.lr_at(2, 20, c) == 1  # never more than a tenth of the steps
    c.drops = (0.5, 0.9)
    assert [st.lr_at(step, 100, c) for step in (49, 50, 89, 90)] == pytest.approx(
        [1, 0.1, 0.1, 0.01]
    )


def test_every_stage_draws_its_own_stream(tmp_path):
    seeds = [st.stage_seed(3, tmp_path / name) for name in ("teacher", "student", "control")]
    assert seeds[0] == 3 and len(set(seeds)) == 3
    assert seeds[1] == st.stage_seed(3, tmp_path / "elsewhere/student")


def test_a_loss_that_is_not_finite_names_its_images_and_boxes(roots, tmp_path, monkeypatch):
    real = ops.box_loss

    def broken(deltas, boxes, *rest):
        loss = real(deltas, boxes, *rest)
        return loss + torch.where(boxes.sum((1, 2)) > 0, math.nan, 0.0)

    monkeypatch.setattr(ops, "box_loss", broken)
    with pytest.raises(util.UserError, match="loss is not finite at step 0; images"):
        run(tmp_path / "run", *KINDS["det"], "--root", roots["det"], "--until", "teacher")
    report = json.loads((tmp_path / "run/teacher/nonfinite_step0.json").read_text())
    images = data.coco(roots["det"], "train")
    assert report and all(row["boxes"] for row in report)
    assert {row["image_id"] for row in report} <= set(images.ids.tolist())


def test_frozen_norms_want_weights_and_stay(whole, roots, tmp_path):
    flags = [*KINDS["cls"], "--root", roots["cls"], "--until", "teacher", "--norm", "frozen"]
    with pytest.raises(util.UserError, match="give --init"):
        run(tmp_path / "a", *flags)
    torch.manual_seed(0)
    net = backbones.build("resnet10")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    run(tmp_path / "b", *flags, "--init", tmp_path / "net.pth")
    state = weights(tmp_path / "b/teacher")
    assert torch.equal(state["backbone.bn1.weight"], net.bn1.weight)
    assert not torch.equal(state["backbone.conv1.weight"], net.conv1.weight)


def test_gradient_checkpointing_changes_no_bit(whole, roots, tmp_path):
    flags = [*KINDS["det"], "--root", roots["det"], "--until", "teacher"]
    run(tmp_path / "run", *flags, "--gradient-checkpointing")
    a, b = weights(tmp_path / "run/teacher"), weights(whole["det"] / "teacher")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert isinstance(st.restore(whole["det"] / "teacher", util.Proc())[0], models.RetinaNet)


def test_restored_networks_answer_as_trained_ones(whole, roots):
    net, about = st.restore(whole["cls"] / "student", util.Proc())
    assert about["class_names"] == ["both", "disc", "square"] and about["step"] == 8
    val = data.folder(roots["cls"], "val")
    found = answers.classes(net, val, range(len(val)), 64, util.Proc())
    right = np.mean([answer["label"] == val.image_class[i] for i, answer in found])
    results = json.loads((whole["cls"] / "results.json").read_text())
    assert right == pytest.approx(results["student"]["accuracy"])
