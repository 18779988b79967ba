"""answers.py: what a network answers, its store and the pseudo-labels in it, and the threshold."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import forked, kill_at, turns
from PIL import Image

import answers
import augment
import backbones
import data
from util import Proc, UserError

# ---- from a network ------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """A detector that always finds one thing: class 1 at this box of the canvas."""

    def answers(self, images, windows, floor):
        answer = {"boxes": torch.tensor([[8.0, 4.0, 60.0, 24.0]]), "labels": torch.tensor([1])}
        return [{**answer, "scores": torch.tensor([0.9])} for _ in images]


def pool(folder, *sizes):
    """Images without labels of these sizes (h, w); None: a file that is no image."""
    for i, size in enumerate(sizes):
        path = folder / f"{i}.png"
        if size:
            rng = np.random.default_rng(i)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        else:
            path.write_bytes(b"no image")
    return data.listed(folder)


def test_boxes_are_in_pixels_of_the_file_and_inside_it_in_the_order_asked_for(tmp_path):
    sizes = [(100, 200), (64, 32), (128, 128), None]  # shown to the network at 64 px
    images = pool(tmp_path, *sizes)
    net = Echo().train()
    detected = list(answers.boxes(net, images, [2, 0, 3, 1], 64, Proc()))
    assert [i for i, _ in detected] == [2, 0, 3, 1] and not net.training
    for i, answer in detected:
        if sizes[i] is None:
            assert answer is None
            continue
        h, w = sizes[i]
        scale = 64 / max(h, w)
        want = np.array([8, 4, min(60, w * scale), min(24, h * scale)]) / scale
        assert answer["size"] == (h, w) and answer["labels"].tolist() == [1]
        assert answer["boxes"][0] == pytest.approx(want, abs=1e-3)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    smooth = torch.nn.Conv2d(3, 3, 5, stride=4, padding=2)
    return torch.nn.Sequential(smooth, torch.nn.Tanh(), torch.nn.Conv2d(3, 3, 3, padding=1)).eval()


def canvas(images, i, size=64):
    image, _, _ = augment.fit(images.read(i)[0], data.nothing(i), size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return backbones.normalise(pixels)


@torch.no_grad()
def test_masks_hold_the_likeliest_class_and_its_probability_at_the_files_size(net, tmp_path):
    images = pool(tmp_path, (64, 48), (90, 150), None)
    (_, small), (_, large), (_, bad) = answers.masks(net, images, [0, 1, 2], 64, Proc())
    assert bad is None and small["size"] == (64, 48) and large["size"] == (90, 150)
    for i, answer, window in ((0, small, (64, 48)), (1, large, (38, 64))):
        logits = F.interpolate(net(canvas(images, i)), (64, 64), mode="bilinear")
        p = logits.softmax(1)[:, :, : window[0], : window[1]]
        p = F.interpolate(p, answer["size"], mode="bilinear", align_corners=False)[0]
        assert (answer["mask"] == p.argmax(0).numpy()).mean() > 0.999  # but for rounding
        sure = (200 * p.max(0).values).floor().numpy()
        assert np.abs(answer["sure"] - sure).max() <= 1 and (answer["sure"] == sure).mean() > 0.99
        assert answer["mask"].dtype == answer["sure"].dtype == np.uint8


@torch.no_grad()
def test_probabilities_are_averaged_over_scales_and_mirrored_images(net, tmp_path):
    x = canvas(pool(tmp_path, (64, 64)), 0)

    def p(*scales, flip=False, of=x):
        return answers.probabilities(net, of, 64, Proc(), scales, flip)

    assert torch.allclose(p(1.0, 1.0), p(1.0), atol=1e-6)
    assert torch.allclose(p(0.5, 1.0, 1.5), (p(0.5) + p(1.0) + p(1.5)) / 3, atol=1e-6)
    assert torch.allclose(p(1.0, flip=True), (p(1.0) + p(1.0, of=x.flip(3)).flip(3)) / 2, atol=1e-6)
    assert torch.allclose(p(0.5, 1.5, flip=True).sum(1), torch.ones(1, 64, 64), atol=1e-5)
    assert not torch.allclose(p(0.5), p(1.0), atol=1e-3)


@torch.no_grad()
def test_classes_are_the_likeliest_with_its_probability(net, tmp_path):
    images = pool(tmp_path, (64, 64), None, (50, 64))
    classifier = torch.nn.Sequential(net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    (_, first), (_, bad), (_, last) = answers.classes(classifier, images, [0, 1, 2], 64, Proc())
    assert bad is None
    for i, answer in ((0, first), (2, last)):
        score, label = classifier(canvas(images, i)).softmax(1)[0].max(0)
        assert answer["label"] == label and answer["score"] == pytest.approx(score.item(), abs=1e-5)


# ---- the store -----------------------------------------------------------------------------------


def boxes_of(i):
    """What a detector says of image i: nothing of a bad one, no box, or boxes of three scores."""
    if i % 7 == 3:
        return None
    n = 0 if i % 7 == 5 else 3
    xyxy = np.random.default_rng(i).uniform([0, 0, 20, 15], [9, 9, 40, 30], (n, 4))
    return {
        "boxes": xyxy.astype(np.float32),
        "labels": np.arange(n) % 2,
        "scores": np.array([0.3, 0.5, 0.7], np.float32)[:n],
        "size": (30, 40),
    }


def mask_of(i):
    """Image 0 is sure of nothing; others of a left part of the pixels, by columns, ever less."""
    sure = np.tile(np.linspace(200, 60, 40).astype(np.uint8), (30, 1))
    if i == 0:
        sure[:] = 50
    mask = np.random.default_rng(i).integers(0, 3, (30, 40)).astype(np.uint8)
    return {"mask": mask, "sure": sure, "size": (30, 40)}


def class_of(i):
    return {"label": i % 3, "score": round(0.1 * i, 5)}


def fill(place, images, answer_of, processes=1):
    for proc in turns(processes):
        store = answers.Answers(place, images, proc)
        for i in store.missing:
            store.add(i, answer_of(i))
    return place


def contents(place):
    return {path.name: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def fourteen(tmp_path_factory):
    return pool(tmp_path_factory.mktemp("fourteen"), *[(30, 40)] * 14)


@pytest.fixture(scope="module")
def human(coco_root, voc_root, class_root):
    roots = {"det": (data.coco, coco_root), "seg": (data.voc, voc_root)}
    roots["cls"] = (data.folder, class_root)
    return {task: load(root, "train") for task, (load, root) in roots.items()}


def test_several_processes_write_the_store_of_one(fourteen, tmp_path):
    places = [fill(tmp_path / str(n), fourteen, boxes_of, n) for n in (1, 2, 3)]
    assert len(list(places[2].glob("part_*_of_3.jsonl"))) == 3
    rows = [list(answers.read_answers(place)) for place in places]
    assert rows[0] == rows[1] == rows[2] and [row["i"] for row in rows[0]] == list(range(14))
    assert rows[0][3] == {"i": 3, "file": fourteen.path(3), "bad": True}


def test_a_line_cut_off_by_a_kill_is_removed_and_its_image_answered_again(fourteen, tmp_path):
    place = fill(tmp_path / "pseudo", fourteen, boxes_of, 2)
    whole = contents(place)
    part = place / "part_1_of_2.jsonl"
    for cut in (1, 9, 500):
        part.write_bytes(whole[part.name][:-cut])
        rank0, rank1 = (answers.Answers(place, fourteen, proc) for proc in turns(2))
        assert rank0.missing == [] and rank1.missing[-1] == 13
        assert whole[part.name].startswith(part.read_bytes()) and part.read_bytes()[-1:] == b"\n"
        fill(place, fourteen, boxes_of, 2)
        assert contents(place) == whole
    part.write_bytes(whole[part.name][:-9])
    assert fill(place, fourteen, boxes_of, 3) and answers.answered(place, 14).all()  # by others


@pytest.mark.parametrize("count", range(1, 10))
def test_killed_at_any_moment_a_store_of_masks_ends_with_the_same_bytes(fourteen, tmp_path, count):
    images = fourteen.subset(range(3))
    place = tmp_path / "pseudo"

    def killed():
        kill_at(count, os, "fsync", "replace")
        fill(place, images, mask_of)

    assert forked(killed) == [-9]
    fill(place, images, mask_of)
    names = contents(place)
    assert names == contents(fill(tmp_path / "whole", images, mask_of)) and len(names) == 4


def test_names_that_are_no_unicode_survive_the_store(tmp_path, human):
    name = b"odd \xff\xe9.png"
    (tmp_path / "pool").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path / "pool"), name))
    images = data.listed(tmp_path / "pool")
    pseudo = answers.confident(fill(tmp_path / "det", images, boxes_of), 0.5, human["det"])
    assert pseudo.read(0)[0].size == (40, 30) and os.fsencode(pseudo.path(0)).endswith(name)
    place = fill(tmp_path / "seg", images, lambda i: mask_of(1))
    assert answers.confident(place, 0.5, human["seg"]).read(0)[1]["mask"].shape == (30, 40)


# ---- pseudo-labels: the threshold is applied on reading ------------------------------------------


@pytest.mark.parametrize("threshold, kept", [(0.0, 3), (0.5, 2), (0.51, 1), (0.7, 1), (0.71, 0)])
def test_exactly_the_boxes_from_the_threshold_on_are_labels(
    fourteen, tmp_path, human, threshold, kept
):
    place = fill(tmp_path, fourteen, boxes_of)
    pseudo = answers.confident(place, threshold, human["det"])
    labelled = [i for i in range(14) if i % 7 not in (3, 5)] if kept else []
    assert pseudo.ids.tolist() == labelled  # images that keep nothing are left out
    assert [pseudo.path(k) for k in range(len(pseudo))] == [fourteen.path(i) for i in labelled]
    assert pseudo.class_names == ["square", "disc"] and pseudo.class_ids == [3, 7]
    for k, i in enumerate(labelled):
        target = pseudo.read(k)[1]
        want = boxes_of(i)
        assert target["scores"] == pytest.approx(want["scores"][3 - kept :])
        assert target["labels"].tolist() == want["labels"][3 - kept :].tolist()
        assert np.abs(target["boxes"] - want["boxes"][3 - kept :]).max() <= 1e-4
        assert not target["crowd"].any() and target["size"] == (30, 40)


def test_boxes_are_stored_to_four_decimals_as_coco_does_and_unusable_ones_dropped(
    fourteen, tmp_path, human
):
    answer = boxes_of(0)
    answer["boxes"] = np.array(
        [[1.23456789, 2, 3, 4], [5, 5, 5, 9], [35, 25, 44, 39]], np.float32
    )  # the second is empty, the third reaches over the border
    images = fourteen.subset([0])
    place = fill(tmp_path, images, lambda i: answer)
    (row,) = answers.read_answers(place)
    assert row["boxes"][0] == [1.2346, 2, 1.7654, 2] and row["scores"] == [0.3, 0.5, 0.7]
    target = answers.confident(place, 0.0, human["det"]).target(0)
    assert target["boxes"][0] == pytest.approx([1.2346, 2, 3, 4])
    assert target["boxes"][1].tolist() == [35, 25, 40, 30] and len(target["boxes"]) == 2
    assert target["labels"].tolist() == [0, 0]


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.4, 0.7, 1.0])
def test_pixels_below_the_threshold_are_ignored(fourteen, tmp_path, human, threshold):
    images = fourteen.subset(range(3))
    place = fill(tmp_path, images, mask_of)
    before = contents(place)
    pseudo = answers.confident(place, threshold, human["seg"])
    assert pseudo.ids.tolist() == ([0, 1, 2] if threshold <= 0.25 else [1, 2])
    for k, i in enumerate(pseudo.ids):
        answer = mask_of(i)
        want = np.where(answer["sure"] / 200 >= threshold - 1e-9, answer["mask"], 255)
        assert np.array_equal(pseudo.read(k)[1]["mask"], want)
    assert contents(place) == before  # another threshold costs no new answers


def test_classes_from_the_threshold_on_are_labels(fourteen, tmp_path, human):
    place = fill(tmp_path, fourteen.subset(range(9)), lambda i: class_of(i) if i != 7 else None)
    pseudo = answers.confident(place, 0.5, human["cls"])
    assert pseudo.ids.tolist() == [5, 6, 8] and pseudo.image_class.tolist() == [2, 0, 2]
    assert pseudo.read(0)[1]["image_class"] == 2 and pseudo.class_names == human["cls"].class_names


# ---- the threshold -------------------------------------------------------------------------------


def truth(*images):
    """In the place of Images: targets of rows (x1, y1, x2, y2, label, crowd)."""

    def target(i):
        rows = np.array(images[i], np.float32).reshape(-1, 6)
        labels = rows[:, 4].astype(np.int64)
        return {"boxes": rows[:, :4], "labels": labels, "crowd": rows[:, 5].astype(bool)}

    return SimpleNamespace(target=target)


def detections(*rows):
    """Of rows (x1, y1, x2, y2, label, score)."""
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].astype(np.int64), "scores": rows[:, 5]}


BOX = (0, 0, 10, 10)
FAR = (50, 50, 60, 60)
# fmt: off
MATCHES = {  # name: (true boxes of each image), detections, {score: correct}, number of boxes
    "a box found twice counts once, for the better score": (
        [[(*BOX, 1, 0)]], {0: [(*BOX, 1, .3), (0, 0, 10, 9, 1, .8)]}, {.8: True, .3: False}, 1),
    "a second detection takes the box next best to it": (
        [[(*BOX, 1, 0), (3, 0, 13, 10, 1, 0)]], {0: [(*BOX, 1, .8), (1, 0, 11, 10, 1, .3)]},
        {.8: True, .3: True}, 2),
    "the class must be right": ([[(*BOX, 1, 0)]], {0: [(*BOX, 2, .9)]}, {.9: False}, 1),
    "an IoU of 0.5 is enough": ([[(*BOX, 1, 0)]], {0: [(0, 0, 10, 5, 1, .9)]}, {.9: True}, 1),
    "less is not": ([[(*BOX, 1, 0)]], {0: [(0, 0, 10, 4.9, 1, .9)]}, {.9: False}, 1),
    "only within an image": (
        [[(*BOX, 1, 0)], [(*FAR, 1, 0)]], {0: [(*FAR, 1, .9)], 1: [(*FAR, 1, .5)]},
        {.9: False, .5: True}, 2),
    "crowds need not be found": (
        [[(*BOX, 1, 1), (*FAR, 1, 0)]], {0: [(*FAR, 1, .9)]}, {.9: True}, 1),
    "an image without boxes": ([[]], {0: [(*BOX, 1, .9)]}, {.9: False}, 0),
    "boxes of an unreadable image are missed": ([[(*BOX, 1, 0)]], {0: None}, {}, 1)}
# fmt: on


@pytest.mark.parametrize("name", MATCHES)
def test_matching(name):
    images, detected, want, total = MATCHES[name]
    given = {i: None if rows is None else detections(*rows) for i, rows in detected.items()}
    scores, correct, count = answers.match_detections(given, truth(*images))
    assert dict(zip(scores.round(3).tolist(), correct.tolist())) == want and count == total
    assert scores.shape == correct.shape and correct.dtype == bool


def test_precision_and_recall_are_what_counting_gives():
    scores = np.array([0.9, 0.8, 0.5, 0.3])
    correct = np.array([True, False, True, False])
    rows = answers.precision_recall(scores, correct, 4, [0.2, 0.5, 0.85, 0.95])
    assert [row["threshold"] for row in rows] == [0.2, 0.5, 0.85, 0.95]
    assert [row["kept"] for row in rows] == [4, 3, 1, 0]  # a score equal to the threshold is kept
    assert [row["precision"] for row in rows] == pytest.approx([2 / 4, 2 / 3, 1, 0])
    assert [row["recall"] for row in rows] == pytest.approx([2 / 4, 2 / 4, 1 / 4, 0])
    assert [row["f1"] for row in rows] == pytest.approx([1 / 2, 4 / 7, 2 / 5, 0])
    (row,) = answers.precision_recall(np.zeros(0), np.zeros(0, bool), 0, [0.5])
    assert row == {"threshold": 0.5, "precision": 0, "recall": 0, "f1": 0, "kept": 0}


def test_the_best_threshold_is_the_highest_of_those_with_the_best_f1(monkeypatch):
    labels = truth([(*BOX, 1, 0), (*FAR, 1, 0)])
    rows = [(*BOX, 1, 0.92), (*FAR, 1, 0.63), (20, 20, 30, 30, 1, 0.31)]
    monkeypatch.setattr(answers, "share", lambda *args: [0])
    monkeypatch.setattr(answers, "boxes", lambda *args: [(0, detections(*rows))])
    best, curve = answers.best_f1(None, labels, 64, Proc())
    assert best == 0.6  # as good as 0.35, and anything between
    assert max(row["f1"] for row in curve) == 1 and len(curve) == 19
    monkeypatch.setattr(answers, "boxes", lambda *args: [(0, detections(rows[2]))])
    assert answers.best_f1(None, labels, 64, Proc())[0] is None  # nothing is right at any


# ---- what a threshold leaves ---------------------------------------------------------------------


def refused(words, place, threshold, human, asked):
    with pytest.raises(UserError, match=words):
        answers.audit(answers.confident(place, threshold, human), human, asked)


def test_the_audit_of_boxes_counts_them_and_refuses_next_to_none(fourteen, tmp_path, human):
    human = human["det"]
    place = fill(tmp_path, fourteen, boxes_of)
    counts = answers.audit(answers.confident(place, 0.5, human), human, 14)
    assert counts == {"images": 14, "kept": 10, "boxes": 20, "share": {"square": 0.5, "disc": 0.5}}
    refused("almost. empty .*lower --threshold", place, 0.8, human, 14)  # none at all
    refused("almost. empty", place, 0.7, human, 1000)  # ten boxes


def test_the_audit_of_masks_refuses_next_to_no_pixels_and_a_single_class(fourteen, tmp_path, human):
    def half(i, classes=3):  # known in the left half of every second image
        sure = np.where((np.arange(40) < 20) & (i % 2 > 0), 200, 60)
        answer = {"sure": np.tile(sure, (30, 1)).astype(np.uint8), "size": (30, 40)}
        return answer | {"mask": (np.arange(1200).reshape(30, 40) // 40 % classes).astype(np.uint8)}

    human = human["seg"]
    place = fill(tmp_path / "three", fourteen, half)
    counts = answers.audit(answers.confident(place, 0.5, human), human, 14)
    assert counts["kept"] == 7 and counts["pixels"] == pytest.approx(1 / 4)
    assert counts["share"] == pytest.approx(dict.fromkeys(human.class_names, 1 / 3))
    refused("almost. empty", place, 0.5, human, 1000)
    place = fill(tmp_path / "one", fourteen, lambda i: half(i, classes=1))
    refused("nothing but background: .*cannot tell classes apart", place, 0.5, human, 14)


def test_the_audit_of_classes_refuses_next_to_none_and_a_single_class(fourteen, tmp_path, human):
    human = human["cls"]
    place = fill(tmp_path, fourteen.subset(range(9)), class_of)
    counts = answers.audit(answers.confident(place, 0.5, human), human, 9)
    assert counts["kept"] == 4 and counts["share"] == {"both": 0.25, "disc": 0.25, "square": 0.5}
    refused("almost. empty", place, 0.9, human, 9)
    refused("nothing but square", place, 0.8, human, 9)


def test_shares_of_human_labels_are_of_boxes_pixels_and_images(human):
    count = np.bincount(human["det"].labels)
    assert list(answers.shares(human["det"]).values()) == pytest.approx(count / count.sum())
    pixels = [human["seg"].read_mask(i).ravel() for i in range(24)]
    count = np.bincount(np.concatenate(pixels), minlength=3)[:3]
    assert list(answers.shares(human["seg"]).values()) == pytest.approx(count / count.sum())
    assert answers.shares(human["cls"].subset([0, 8, 9])) == pytest.approx(
        {"both": 1 / 3, "disc": 2 / 3, "square": 0}
    )
