"""Classification: files, arithmetic against references, and the same promises of the pipeline as for the other tasks."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import classify
import data
import models
import recipes
import runs
import show
import st
import world
from conftest import ROOT, killed, records, start
from util import UserError

TINY = ["--task", "cls", "--data", "folder", "--image-size", "32", "--batch", "8", "--steps", "12", "--student-steps", "12",
        "--norm", "gn", "--precision", "fp32", "--threshold", "0.0", "--labeled", "0.5", "--lr", "1e-2", "--save-every", "4"]
CPU = (0, 1, torch.device("cpu"), torch.float32)
COLOURS = {"blue": (20, 20, 230), "green": (20, 230, 20), "red": (230, 20, 20)}


def class_folders(root, train=16, val=4):
    """Noisy images of 40 x 32 to 32 x 40 px in three colours, train/COLOUR/*.jpg and val/COLOUR/*.jpg."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = (rng.normal(0, 20, (*((32, 40) if i % 2 else (40, 32)), 3)) + colour).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("folders") / "colours")


@pytest.fixture
def copy(tmp_path):
    """A folder of its own, to be damaged."""
    return class_folders(tmp_path / "copy", train=4, val=2)


@pytest.fixture(scope="module")
def finished(colours, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start(*TINY, "--root", colours, "--out", out, "--workers", "1", "--control", "--student-init", "same")
    assert done.returncode == 0, done.stderr
    return out


def main(root, out, *flags):
    st.main([*TINY, "--root", str(root), "--out", str(out), "--workers", "0", *map(str, flags)])
    return out


def answers(folder, paths):
    """Class and probability of each file, from the last checkpoint in `folder`, one image at a time."""
    state = runs.load_checkpoint(folder)
    net = st.build(state["config"], 3).eval()
    net.load_state_dict(state["model"])
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    out = []
    for path in paths:
        image = show.augment.fit(Image.open(path).convert("RGB"), data.nothing(0), 32)[0]
        x = (torch.from_numpy(np.asarray(image).copy()).float() - mean) / std
        with torch.no_grad():
            out.append(net(x.permute(2, 0, 1)[None]).softmax(1)[0].max(0))
    return [(int(k), float(p)) for p, k in out]


# ---- files -------------------------------------------------------------------------------------------------------

def test_classes_are_the_folders_sorted_and_images_carry_theirs(copy):
    (copy / "train/red/notes.txt").write_text("no image")
    (copy / "train/.cache").mkdir()
    Image.new("RGB", (9, 9)).save(copy / "train/.cache/0.jpg")
    Image.new("RGB", (9, 9)).save(copy / "train/red/._0.jpg")
    train = classify.load_folder(copy, "train")
    assert train.class_names == ["blue", "green", "red"] and len(train) == 12 and train.labels.tolist() == sorted([0, 1, 2] * 4)
    image, target = train.subset([11, 4]).read(1)
    assert image.size == (32, 40) and target["image_class"] == 1 and target["image_id"] == 4 and len(target["boxes"]) == 0
    assert train.path(11) == str(copy / "train/red/3.jpg")


def test_the_world_is_read_as_class_folders(tmp_path):
    root = world.build(tmp_path, "single", {"train": 12, "extra": 3, "val": 3})
    train = classify.load_folder(root, "train")
    assert train.class_names == sorted(world.ALL_CLASSES) and (np.bincount(train.labels) == 1).all()
    assert len(classify.load_folder(root, "val", train.class_names)) == 3  # in val, a class may lack images


@pytest.mark.parametrize("policy", ["s1", "s2", "s3", "s4"])
def test_batches_hold_classes_under_every_policy(colours, policy):
    train = classify.load_folder(colours, "train")
    b = next(iter(data.train_loader([train], [16], 0, 1, 1, 0, 1, policy, 32, 0, 0)))
    assert b["images"].shape == (16, 3, 32, 32) and b["image_class"].tolist() == [train.labels[i] for i in b["image_id"]]
    assert len(set(b["image_class"].tolist())) == 3


@pytest.mark.parametrize("change, match", [
    (lambda root: shutil.rmtree(root / "train"), "no folder .*train; there must be"),
    (lambda root: shutil.rmtree(root / "val"), "no folder .*val; there must be"),
    (lambda root: [shutil.rmtree(root / "train" / name) for name in ("red", "blue")], "holds 1 class folders"),
    (lambda root: [f.unlink() for f in (root / "train/green").iterdir()], "train/green holds no image"),
    (lambda root: [f.unlink() for f in root.glob("val/*/*")], "val/blue holds no image"),
    (lambda root: shutil.rmtree(root / "val/red"), r"val has other classes .*red"),
    (lambda root: (root / "val/violet").mkdir(), r"val has other classes .*violet"),
    (lambda root: (root / "val/red/0.jpg").rename(root / "val/0.jpg"), "val holds 1 images outside of")])
def test_incomplete_folders_are_refused_in_one_line(copy, tmp_path, change, match):
    change(copy)
    with pytest.raises(UserError, match=match) as error:
        main(copy, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_unreadable_images_are_named_replaced_and_found_by_check(copy, tmp_path, capsys):
    for path in ("train/red/0.jpg", "val/red/0.jpg", "val/red/1.jpg"):
        (copy / path).write_bytes(b"no image")
    out = main(copy, tmp_path / "run", "--labeled", 1, "--mode", "train", "--steps", 3)
    assert "red/0.jpg" in (out / "teacher/quarantine.txt").read_text() and capsys.readouterr().out.count("not scored") == 2
    assert json.loads((out / "results.json").read_text())["teacher"]["per_class"]["red"] is None
    done = subprocess.run([sys.executable, ROOT / "data.py", "check", copy], capture_output=True, text=True)
    assert done.returncode == 2 and "18 images, 3 unusable" in done.stdout and "val/red/1.jpg" in done.stdout
    for path in (copy / "val").glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="6 of 6 validation images are unusable"):
        main(copy, tmp_path / "two", "--labeled", 1, "--mode", "train", "--steps", 1)


def test_a_split_holds_for_the_files_it_was_made_for(copy, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data.py", "split", copy / "train", "--fraction", "0.5", "--out",
                           tmp_path / "split.json"], capture_output=True, text=True)
    assert done.returncode == 0 and "6 of 12 images labelled" in done.stdout, done.stderr
    out = main(copy, tmp_path / "run", "--split", tmp_path / "split.json", "--mode", "train", "--steps", 1)
    assert (out / "split.json").read_text() == (tmp_path / "split.json").read_text()
    shutil.copy(copy / "train/red/0.jpg", copy / "train/red/0a.jpg")
    with pytest.raises(UserError, match="made for another version"):
        main(copy, tmp_path / "two", "--split", tmp_path / "split.json", "--mode", "train")
    with pytest.raises(UserError, match="begun with other settings .*annotations"):
        main(copy, out, "--mode", "train", "--steps", 1)


@pytest.mark.parametrize("flags, match", [
    (("--threshold", "auto"), "auto is for detection"), (("--data", "voc"), "is not for --task cls; use shapes or folder"),
    (("--recipe", "seg-tiny"), "is for --task seg"), (("--backbone", "spinenet49"), "is for detection")])
def test_flags_of_other_tasks_are_refused(colours, tmp_path, flags, match):
    with pytest.raises(UserError, match=match):
        main(colours, tmp_path / "run", *flags)


# ---- network and loss --------------------------------------------------------------------------------------------

def test_logits_are_linear_in_the_mean_of_the_last_level():
    net = models.Classifier("resnet10", 5, "gn").eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = net.backbone(x)[5].flatten(2).mean(2) @ net.final.weight.T + net.final.bias
        assert torch.allclose(net(x), want, atol=1e-6) and want.shape == (2, 5)


def test_loss_is_the_mean_cross_entropy_of_each_part_and_pieces_add_up():
    g = torch.Generator().manual_seed(0)
    part, logits = torch.tensor([0, 1, 1, 0, 1, 1]), torch.randn(6, 4, generator=g)
    b = {"image_class": torch.randint(0, 4, (6,), generator=g), "part": part}
    prepare, losses = classify.criterion({}, torch.device("cpu"))
    targets, images = prepare(b)
    whole = losses(logits, targets, part, images)  # (B, 1)
    for rows in (part == 0, part == 1):
        assert whole[rows].sum() == pytest.approx(F.cross_entropy(logits[rows], b["image_class"][rows]).item(), rel=1e-5)
    pieces = [losses(logits[r], {"class": targets["class"][r]}, part[r], images) for r in (slice(0, 1), slice(1, 6))]
    assert torch.allclose(whole, torch.cat(pieces))


# ---- the pipeline ------------------------------------------------------------------------------------------------

def test_scores_are_those_of_the_networks_own_answers(finished, colours):
    val, results = classify.load_folder(colours, "val"), json.loads((finished / "results.json").read_text())
    for stage in ("teacher", "student", "control"):
        found = [k for k, _ in answers(finished / stage, [val.path(i) for i in range(len(val))])]
        assert results[stage]["accuracy"] == pytest.approx(accuracy_score(val.labels, found))
        few = val.subset([0, 1, 2, 3, 4, 8])  # of the classes 4, 1 and 1 images
        state = runs.load_checkpoint(finished / stage)
        net = st.build(state["config"], 3)
        net.load_state_dict(state["model"])
        got = classify.evaluate(net, {**state["config"], "workers": 0}, few, CPU, None)
        assert got["balanced"] == pytest.approx(balanced_accuracy_score(few.labels, np.array(found)[few.ids]))
        assert got["per_class"]["blue"] == np.mean(np.array(found)[:4] == 0)


def test_pseudo_labels_are_the_teachers_answers_over_the_threshold(finished, colours, tmp_path):
    rows = json.loads((finished / "pseudo/pseudo.json").read_text())["images"]
    scores = sorted(row["score"] for row in rows)
    threshold = (scores[11] + scores[12]) / 2
    assert len(rows) == 24 and scores[11] < threshold < scores[12]
    for row, (k, p) in zip(rows, answers(finished / "teacher", [row["file"] for row in rows])):
        assert row["label"] == list(COLOURS)[k] and row["score"] == pytest.approx(p, abs=1e-4)
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/student")
    shutil.rmtree(tmp_path / "run/control")
    parts = (finished / "pseudo/part_0_of_1.jsonl").read_text()
    main(colours, tmp_path / "run", "--student-init", "same", "--threshold", threshold)  # labels anew, by the scores it has
    kept = json.loads((tmp_path / "run/pseudo/pseudo.json").read_text())["images"]
    assert kept == [row for row in rows if row["score"] >= threshold]
    assert (tmp_path / "run/pseudo/part_0_of_1.jsonl").read_text() == parts
    pseudo = classify.load_pseudo(tmp_path / "run/pseudo", {}, classify.load_folder(colours, "train"))
    assert [(pseudo.path(i), pseudo.class_names[pseudo.read(i)[1]["image_class"]]) for i in range(12)] == \
        [(row["file"], row["label"]) for row in kept]


def test_a_report_shows_scores_classes_and_a_sheet(finished):
    page = (finished / "report.html").read_text()
    assert "balanced" in page and "keeps 24 of 24 images" in page and "pseudo-labelled images" in page and "first batch" in page
    assert (finished / "pseudo_sheet.png").exists() and "cross-entropy" in page
    (finished.parent / "unfinished/pseudo").mkdir(parents=True)
    shutil.copy(finished / "pseudo/part_0_of_1.jsonl", finished.parent / "unfinished/pseudo")
    assert "24 images labelled so far" in show.report(finished.parent / "unfinished").read_text()


def test_labels_that_teach_nothing_are_refused(colours, tmp_path):
    with pytest.raises(UserError, match=r"almost\) empty: 0 of 24 usable images reach the threshold 1.00"):
        main(colours, tmp_path / "run", "--threshold", 0.999999, "--steps", 1)
    (tmp_path / "blue").mkdir()
    for i in range(16):
        Image.new("RGB", (40, 40), (20 + i, 20, 230)).save(tmp_path / "blue" / f"{i}.png")
    with pytest.raises(UserError, match="all 16 kept images are labelled .*teaches nothing"):
        main(colours, tmp_path / "two", "--unlabeled", tmp_path / "blue")


def test_killed_in_training_saving_and_labelling_it_ends_with_the_same_bits(colours, finished, tmp_path):
    args = [*TINY, "--root", colours, "--out", tmp_path / "run", "--workers", "1", "--control", "--student-init", "same"]
    for place, count in (("torch.optim.AdamW.step", 10), ("st.evaluation.normalise", 7)):
        assert killed(tmp_path, (place,), count, *args)
    assert len((tmp_path / "run/pseudo/part_0_of_1.jsonl").read_text().splitlines()) == 16  # a batch of the 24
    done = start(*args)
    assert done.returncode == 0, done.stderr
    for stage in ("teacher", "student", "control"):
        a, b = (runs.load_latest(run / stage)["model"] for run in (finished, tmp_path / "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), stage
    one, other = (json.loads((run / "pseudo/pseudo.json").read_text())["images"] for run in (finished, tmp_path / "run"))
    assert one == other


def test_two_processes_are_one(colours, finished, tmp_path):
    done = start(*TINY, "--root", colours, "--out", tmp_path / "two", "--workers", "0", "--mode", "train", processes=2)
    assert done.returncode == 0, done.stderr
    one, other = records(finished, "teacher"), records(tmp_path / "two", "teacher")
    assert [one[step]["ce"] for step in range(1, 11)] == pytest.approx([other[step]["ce"] for step in range(1, 11)], abs=1e-3)
    same = ["--workers", "0", "--precision", "fp32"]
    done = start("--mode", "eval", "--ckpt", finished / "student", "--data", "folder", "--root", colours, *same, processes=2)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout[done.stdout.index("{"):])
    assert scores.items() <= json.loads((finished / "results.json").read_text())["student"].items()
    label = ["--mode", "pseudo", "--ckpt", finished / "teacher", "--unlabeled", colours / "train", *same]
    done = start(*label, "--out", tmp_path / "labels2", processes=2)
    assert done.returncode == 0, done.stderr
    st.main([*map(str, label), "--out", str(tmp_path / "labels1")])
    one, other = (json.loads((tmp_path / f"labels{n}/pseudo.json").read_text()) for n in (1, 2))
    assert one == other and one["info"]["threshold"] == 0.3 and len(one["images"]) > 24


def test_eval_refuses_other_classes(finished, copy):
    (copy / "val/red").rename(copy / "val/rouge")
    with pytest.raises(UserError, match="other classes .*red, rouge"):
        st.main(["--mode", "eval", "--ckpt", str(finished / "student"), "--data", "folder", "--root", str(copy)])


# ---- what it is for: --init --------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_its_backbone_starts_every_task_from_a_file_or_a_stage(finished, task):
    newest = runs.checkpoints(finished / "student")[-1]
    given = runs.load_checkpoint(finished / "student")["model"]
    for source in (newest, finished / "student"):
        c = recipes.settings(st.Config(task=task, init=str(source), norm="gn"), 1)
        net = st.build(c, 3)
        assert c["init"] == str(newest) and "none left random" in st.initialise(net.backbone, c["init"])
        own = {f"backbone.{k}": v for k, v in net.backbone.state_dict().items()}
        assert own.keys() == {k for k in given if k.startswith("backbone.")} and all(torch.equal(own[k], given[k]) for k in own)


def test_a_run_from_a_stage_resumes_unless_that_has_changed(finished, colours, tmp_path, capsys):
    shutil.copytree(finished / "student", tmp_path / "stage")
    flags = ["--init", tmp_path / "stage", "--mode", "train", "--steps", 2]
    out = main(colours, tmp_path / "run", *flags)
    (tmp_path / "stage").rename(tmp_path / "moved")
    main(colours, out, "--init", tmp_path / "moved", *flags[2:])
    assert "finished before" in capsys.readouterr().out
    newest = runs.checkpoints(tmp_path / "moved")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])  # damaged: the one before is another init
    with pytest.raises(UserError, match="begun with other settings .*init"):
        main(colours, out, "--init", tmp_path / "moved", *flags[2:])
    for path in runs.checkpoints(tmp_path / "moved"):
        path.unlink()
    with pytest.raises(UserError, match="--init .*moved is not a file, nor a folder with a usable"):
        main(colours, out, "--init", tmp_path / "moved", *flags[2:])
