"""The pipeline as a user starts it: it resumes exactly, N processes are one process, and its pieces agree.
Runs are tiny (64 px, a dozen steps): what is tested is sameness, not accuracy."""
import json
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import models
import recipes
import runs
import st
from conftest import ROOT, killed, records, start

TINY = ["--data", "coco", "--image-size", "64", "--batch", "4", "--steps", "12", "--student-steps", "12", "--precision", "fp32",
        "--threshold", "0.0", "--labeled", "0.5", "--norm", "gn", "--lr", "1e-3", "--save-every", "4"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A COCO folder of 24 training and 8 validation images of dark and bright squares."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    (root / "images").mkdir()
    for split, n, first in (("train", 24, 1), ("val", 8, 101)):
        images, annotations = [], []
        for i in range(first, first + n):
            pixels = rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)
            for _ in range(2):
                x, y, side, bright = *rng.integers(0, 40, 2), rng.integers(12, 24), rng.integers(2)
                pixels[y:y + side, x:x + side] = 250 if bright else 5
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 3 + 4 * int(bright), "iscrowd": 0,
                                    "bbox": [int(x), int(y), int(side), int(side)], "area": int(side) ** 2})
            Image.fromarray(pixels).save(root / "images" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
        categories = [{"id": 3, "name": "dark"}, {"id": 7, "name": "bright"}]
        (root / f"{split}.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture(scope="module")
def finished(squares, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start(*TINY, "--root", squares, "--out", out, "--workers", "1", "--control")
    assert done.returncode == 0, done.stderr
    return out


def weights(run, stage):
    return runs.load_latest(run / stage)["model"]


def test_results_name_every_stage_and_the_command(finished):
    results = json.loads((finished / "results.json").read_text())
    assert {"teacher", "student", "control"} <= set(results) and "st.py" in results["command"]
    for stage in ("teacher", "student", "control"):
        assert 0 <= results[stage]["AP"] <= 1 and results[stage]["weights"]
    assert (finished / "report.html").stat().st_size > 1000


def test_control_sees_the_students_images_per_step_and_starts_where_it_does(finished):
    student, control = (json.loads((finished / s / "stage.json").read_text())["deps"] for s in ("student", "control"))
    assert sum(student["images_per_step"]) == sum(control["images_per_step"]) == 8
    assert student["steps"] == control["steps"] and student["teacher"] == control["teacher"]


def test_killed_at_random_moments_it_ends_with_the_same_bits(squares, finished, tmp_path):
    args = [*map(str, TINY), "--root", str(squares), "--out", str(tmp_path / "run"), "--workers", "1", "--control"]
    rng, where = random.Random(0), []
    for event in [14, 14, 3, *[rng.randint(1, 60) for _ in range(5)]]:  # in two saves and a step, as checked below; then anywhere
        places = ("torch.optim.AdamW.step", "os.fsync", "os.replace", "ops.detect")  # training, saving, detecting
        where.append(killed(tmp_path, places, event, *args))
    where = [line for line in where if line]
    assert len(where) >= 5 and sum("step_0" in w for w in where) >= 2 and any(w.split()[2] in ("step", "wrapper") for w in where), where
    print(*where, sep="\n")
    done = start(*args)
    assert done.returncode == 0, done.stderr
    for stage in ("teacher", "student", "control"):
        a, b = weights(finished, stage), weights(tmp_path / "run", stage)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), stage
    assert (finished / "pseudo/pseudo.json").read_text().replace(str(finished), "") == \
        (tmp_path / "run/pseudo/pseudo.json").read_text().replace(str(tmp_path / "run"), "")


def test_sigterm_saves_and_exits_143(squares, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "st.py"), *TINY, "--root", str(squares), "--out", str(out), "--workers",
                                "0", "--steps", "100000", "--save-every", "100000"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("teacher 2/"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert runs.load_latest(out / "teacher")["step"] >= 2


def test_two_processes_are_one(squares, finished, tmp_path):
    """Same split, the first ten losses to 1e-4; then, from one checkpoint, the same pseudo-labels and the same AP."""
    two = tmp_path / "two"
    done = start(*TINY, "--root", squares, "--out", two, "--workers", "0", "--mode", "train", processes=2)
    assert done.returncode == 0, done.stderr
    assert (two / "split.json").read_text() == (finished / "split.json").read_text()
    one, other = records(finished, "teacher"), records(two, "teacher")
    for step in range(1, 11):
        for term in ("cls", "box"):
            assert one[step][term] == pytest.approx(other[step][term], abs=1e-4), (step, term)

    scores, labels = [], []
    for n in (1, 2):
        done = start("--mode", "eval", "--ckpt", finished / "student", "--data", "coco", "--root", squares, "--workers", "0",
                     "--precision", "fp32", processes=n)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout[done.stdout.index("{"):]))
        out = tmp_path / f"labels{n}"
        done = start("--mode", "pseudo", "--ckpt", finished / "teacher", "--unlabeled", squares / "images", "--out", out,
                     "--threshold", "0.0", "--workers", "0", "--precision", "fp32", processes=n)
        assert done.returncode == 0, done.stderr
        labels.append((out / "pseudo.json").read_text())
    assert scores[0] == scores[1] and scores[0]["AP"] >= 0
    assert labels[0] == labels[1] and '"score"' in labels[0]


def test_student_losses_match_over_processes_and_pieces(squares, finished, tmp_path):
    """The joint loss (averages, normalisers, both halves) does not depend on how a step is spread: from the same teacher
    and pseudo-labels, two processes with two micro-batches each follow one process. (Rounding grows with the steps.)"""
    out = tmp_path / "two"
    for stage in ("teacher", "pseudo"):
        shutil.copytree(finished / stage, out / stage)
    done = start(*TINY, "--root", squares, "--out", out, "--workers", "0", "--accumulate", "2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "teacher: finished before" in done.stdout
    one, other = records(finished, "student"), records(out, "student")
    for step in range(1, 11):
        for term in ("loss", "cls", "box", "cls_pseudo", "box_pseudo", "ratio"):
            assert one[step][term] == pytest.approx(other[step][term], abs=1e-5 if step == 1 else 5e-4), (step, term)


def same_losses(run, other, steps, tolerance):
    one, two = records(run, "teacher"), records(other, "teacher")
    for step in range(1, steps + 1):
        for term in ("loss", "cls", "box", "lr"):
            assert one[step][term] == pytest.approx(two[step][term], abs=tolerance), (step, term)


def test_gradient_checkpointing_changes_no_loss(squares, finished, tmp_path):
    out = tmp_path / "run"
    done = start(*TINY, "--root", squares, "--out", out, "--workers", "0", "--mode", "train", "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr
    same_losses(finished, out, 10, 1e-6)
    a, b = weights(finished, "teacher"), weights(out, "teacher")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_losses(squares, tmp_path, monkeypatch):
    """One pyramid level and a thin head: what takes its time is the C++ compiler."""
    monkeypatch.setitem(recipes.RECIPES, "tiny", {**recipes.RECIPES["tiny"], "levels": (5, 5), "width": 16, "depth": 1})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    used, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: used.append(model) or compile(model))
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        st.main([*TINY, "--root", str(squares), "--out", str(tmp_path / name), "--workers", "0", "--mode", "train", "--steps", "3",
                 "--norm", "bn", *flags])
    assert isinstance(used[-1], models.RetinaNet) and list((tmp_path / "cache").rglob("*.so"))
    same_losses(tmp_path / "plain", tmp_path / "compiled", 3, 1e-4)
    a, b = (weights(tmp_path / name, "teacher") for name in ("plain", "compiled"))
    assert a.keys() == b.keys()  # no wrapper's prefix: --mode eval and the student can read it


def test_without_a_compiler_compile_is_one_line_and_leaving_it_out_goes_on(squares, tmp_path):
    args = [*TINY, "--root", squares, "--out", tmp_path / "run", "--workers", "0", "--mode", "train", "--steps", "1"]
    done = start(*args, "--compile", CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --compile") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((tmp_path / "run").rglob("*.pt"))
    st.main([*map(str, args)])


def test_batch_norm_on_two_processes_scores_what_it_saves(squares, tmp_path):
    """Each process has batch-norm averages of its own on CPU; those of rank 0 are saved, and must be those scored."""
    out = tmp_path / "run"
    done = start(*TINY, "--root", squares, "--out", out, "--workers", "0", "--mode", "train", "--norm", "bn", processes=2)
    assert done.returncode == 0, done.stderr
    done = start("--mode", "eval", "--ckpt", out / "teacher", "--data", "coco", "--root", squares, "--workers", "0",
                 "--precision", "fp32")
    again, before = json.loads(done.stdout[done.stdout.index("{"):]), json.loads((out / "results.json").read_text())["teacher"]
    assert {k: before[k] for k in again} == again


def test_stages_draw_their_own_images_and_augmentations(finished):
    first = {s: Image.open(finished / s / "first_batch.png").tobytes() for s in ("teacher", "student", "control")}
    assert len({st.stage_seed(0, s) for s in ("teacher", "student", "student2", "control")}) == 4
    assert len(set(first.values())) == 3


def test_lr_schedule_warms_up_and_ends_at_zero():
    values = [st.lr_at(s, 100, 1.0, 10) for s in range(101)]
    assert values[0] == pytest.approx(0.01) and max(values) == values[10] == 1.0 and values[100] == pytest.approx(0)
    assert all(a < b for a, b in zip(values[:10], values[1:11])) and all(a > b for a, b in zip(values[10:], values[11:]))


def test_lr_follows_the_batch():
    row = dict(lr=0.4, ref_batch=256, batch=64)
    assert st.scaled_lr({**row, "optimizer": "sgd"}) == pytest.approx(0.1)
    assert st.scaled_lr({**row, "optimizer": "adamw"}) == pytest.approx(0.2)


def test_installing_the_project_installs_no_module():
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == []
    names = {d.split(">")[0] for d in project["project"]["dependencies"]}
    assert names == {"torch", "torchvision", "numpy", "pycocotools", "pillow"}
