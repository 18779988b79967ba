"""eval.py: AP against pycocotools itself, matching and thresholds against cases worked out by hand."""
import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import functional as tvf

import data
import eval as evaluation
import util

CLASS_IDS = [2, 3, 7, 40]  # as in COCO, not contiguous
IMAGE_IDS = [9, 4, 1000, 17, 25, 31]


def random_truth(seed=0):
    """COCO json: six images, four classes, boxes of all three COCO sizes, a few crowds, one image without boxes."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in IMAGE_IDS[:-1]:
        for _ in range(rng.integers(3, 9)):
            w, h = rng.choice([12, 50, 150]) * rng.uniform(0.7, 1.4, 2)
            x, y = rng.uniform(0, 300 - w), rng.uniform(0, 300 - h)
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": int(rng.choice(CLASS_IDS)),
                                "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(rng.random() < 0.15)})
    return {"images": [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300} for i in IMAGE_IDS],
            "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in CLASS_IDS]}


def random_detections(truth, ids, seed=1):
    """{i: detections}: the truth with noise, some of it twice, with a wrong class or missing, and some of nothing."""
    rng, found = np.random.default_rng(seed), {}
    for i, image in enumerate(ids):
        boxes, labels = [], []
        for a in truth["annotations"]:
            if a["image_id"] == image:
                x, y, w, h = a["bbox"]
                for _ in range(rng.choice([0, 1, 1, 1, 2])):
                    dx, dy, dw, dh = rng.normal(0, 0.08, 4)
                    boxes.append([x + dx * w, y + dy * h, x + w * (1 + dw), y + h * (1 + dh)])
                    right = CLASS_IDS.index(a["category_id"])
                    labels.append(right if rng.random() < 0.85 else rng.integers(4))
        for _ in range(2):
            x, y, w, h = rng.uniform(0, 150, 4)
            boxes.append([x, y, x + w, y + h])
            labels.append(rng.integers(4))
        found[i] = {"boxes": np.array(boxes, np.float32), "scores": rng.random(len(boxes)).astype(np.float32),
                    "labels": np.array(labels, np.int64), "size": (300, 300)}
    return found


def pycocotools_ap(folder, truth, found, ids):
    """The twelve numbers by pycocotools alone, from files written as its users write them."""
    truth = copy.deepcopy(truth)
    for n, a in enumerate(truth["annotations"]):
        a.update(id=n + 1, area=a.get("area", a["bbox"][2] * a["bbox"][3]), iscrowd=a.get("iscrowd", 0))
    results = [{"image_id": ids[i], "category_id": CLASS_IDS[k], "score": float(s),
                "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]}
               for i, d in found.items() for b, s, k in zip(d["boxes"], d["scores"], d["labels"])]
    (folder / "reference.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "reference.json")
        scorer = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        scorer.params.imgIds = sorted(ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def written(folder, truth):
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder / "truth.json"


# ---- AP ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coco_ap_equals_pycocotools(tmp_path, seed):
    truth = random_truth(seed)
    found = random_detections(truth, IMAGE_IDS, seed + 10)
    want = pycocotools_ap(tmp_path, truth, found, IMAGE_IDS)
    got = evaluation.coco_ap(written(tmp_path, truth), found, IMAGE_IDS, CLASS_IDS)
    assert list(got) == evaluation.METRICS and all(type(v) is float for v in got.values())
    assert list(got.values()) == pytest.approx(want, abs=1e-6)
    assert 0.1 < got["AP"] < got["AP50"] < 0.95 and got["AR1"] < got["AR100"]  # a case with something to get wrong
    assert len({round(got[k], 6) for k in ("APs", "APm", "APl")}) == 3


def test_coco_ap_of_some_of_the_images_leaves_the_others_out(tmp_path):
    truth, some = random_truth(3), IMAGE_IDS[1:4]
    found = random_detections(truth, some)
    want = pycocotools_ap(tmp_path, truth, found, some)
    got = evaluation.coco_ap(written(tmp_path, truth), found, np.array(some), CLASS_IDS)
    assert list(got.values()) == pytest.approx(want, abs=1e-6)
    assert got["AR100"] > evaluation.coco_ap(written(tmp_path, truth), found, some + [9, 17], CLASS_IDS)["AR100"]


def test_coco_ap_fills_in_area_iscrowd_and_id_that_simple_exports_lack(tmp_path):
    truth = random_truth(4)
    for a in truth["annotations"]:
        del a["area"], a["iscrowd"], a["id"]
    found = random_detections(truth, IMAGE_IDS)
    got = evaluation.coco_ap(written(tmp_path, truth), found, IMAGE_IDS, CLASS_IDS)
    assert list(got.values()) == pytest.approx(pycocotools_ap(tmp_path, truth, found, IMAGE_IDS), abs=1e-6)


@pytest.mark.parametrize("renumber", [lambda n: n, lambda n: 5, lambda n: None if n % 2 else n + 2],
                         ids=["from zero", "all alike", "some missing"])
def test_coco_ap_does_not_depend_on_annotation_ids(tmp_path, renumber):
    """pycocotools takes id 0 for 'unmatched' and loses boxes that share an id; exports have both."""
    truth = random_truth(5)
    found = random_detections(truth, IMAGE_IDS)
    want = pycocotools_ap(tmp_path, truth, found, IMAGE_IDS)
    for n, a in enumerate(truth["annotations"]):
        a["id"] = renumber(n)
        if a["id"] is None:
            del a["id"]
    got = evaluation.coco_ap(written(tmp_path, truth), found, IMAGE_IDS, CLASS_IDS)
    assert list(got.values()) == pytest.approx(want, abs=1e-6)


def test_coco_ap_of_the_truth_itself_is_one(tmp_path):
    truth = random_truth(6)
    found = {}
    for i, image in enumerate(IMAGE_IDS):
        rows = [a for a in truth["annotations"] if a["image_id"] == image and not a["iscrowd"]]
        xywh = np.array([a["bbox"] for a in rows]).reshape(-1, 4)
        found[i] = {"boxes": np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), "scores": np.ones(len(rows)),
                    "labels": np.array([CLASS_IDS.index(a["category_id"]) for a in rows], np.int64)}
    got = evaluation.coco_ap(written(tmp_path, truth), found, IMAGE_IDS, CLASS_IDS)
    assert got["AP"] == pytest.approx(1) and got["AR100"] == pytest.approx(1)


def test_coco_ap_without_any_detection_is_all_zeros(tmp_path):
    none = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32), "labels": np.zeros(0, np.int64)}
    for found in ({}, {0: none, 1: none}, {0: {"bad": "damaged"}}):
        got = evaluation.coco_ap(written(tmp_path, random_truth()), found, IMAGE_IDS, CLASS_IDS)
        assert list(got) == evaluation.METRICS and set(got.values()) == {0.0}


def test_coco_ap_counts_a_bad_image_as_one_where_nothing_was_found(tmp_path):
    truth = random_truth(7)
    found = random_detections(truth, IMAGE_IDS)
    rest = {i: d for i, d in found.items() if i != 2}
    got = evaluation.coco_ap(written(tmp_path, truth), {**rest, 2: {"bad": "damaged"}}, IMAGE_IDS, CLASS_IDS)
    assert list(got.values()) == pytest.approx(pycocotools_ap(tmp_path, truth, rest, IMAGE_IDS), abs=1e-6)
    assert got["AR100"] < evaluation.coco_ap(written(tmp_path, truth), found, IMAGE_IDS, CLASS_IDS)["AR100"]


def test_coco_ap_refuses_image_ids_the_file_does_not_know(tmp_path):
    truth = random_truth()
    path = written(tmp_path, truth)
    with pytest.raises(util.UserError, match=r"lacks 2 of the scored image ids, first \[5, 77\]") as error:
        evaluation.coco_ap(path, random_detections(truth, IMAGE_IDS), IMAGE_IDS + [5, 77], CLASS_IDS)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- matching, precision, recall ---------------------------------------------------------------------------------

class Truth:
    """Stands in for data.Detections: target(i) of rows (x1, y1, x2, y2, label, crowd)."""

    def __init__(self, *images):
        self.images = images

    def target(self, i):
        rows = np.array(self.images[i], np.float32).reshape(-1, 6)
        return {"boxes": rows[:, :4], "labels": rows[:, 4].astype(np.int64), "crowd": rows[:, 5].astype(bool)}


def found(*rows):
    """Detections of rows (x1, y1, x2, y2, label, score)."""
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].astype(np.int64), "scores": rows[:, 5]}


def outcome(detected, truth, **k):
    """({score: correct}, number of boxes)"""
    scores, correct, boxes = evaluation.match_detections(detected, truth, **k)
    assert scores.shape == correct.shape and correct.dtype == bool
    return dict(zip(scores.round(3).tolist(), correct.tolist())), boxes


def test_match_detections_counts_a_box_found_twice_once_for_the_better_score():
    truth = Truth([(0, 0, 10, 10, 1, 0)])
    twice = found((0, 0, 10, 10, 1, 0.3), (0, 0, 10, 9, 1, 0.8))  # the exact one has the lower score
    assert outcome({0: twice}, truth) == ({0.8: True, 0.3: False}, 1)


def test_match_detections_lets_a_second_detection_take_the_box_next_best_to_it():
    truth = Truth([(0, 0, 10, 10, 1, 0), (3, 0, 13, 10, 1, 0)])
    near = found((0, 0, 10, 10, 1, 0.8), (1, 0, 11, 10, 1, 0.3))  # both closest to the first box
    assert outcome({0: near}, truth) == ({0.8: True, 0.3: True}, 2)


def test_match_detections_wants_the_class_right_and_the_overlap_large_enough():
    truth = Truth([(0, 0, 10, 10, 1, 0)])
    assert outcome({0: found((0, 0, 10, 10, 2, 0.9))}, truth) == ({0.9: False}, 1)
    assert outcome({0: found((0, 0, 10, 5, 1, 0.9))}, truth) == ({0.9: True}, 1)  # IoU exactly 0.5
    assert outcome({0: found((0, 0, 10, 4.9, 1, 0.9))}, truth) == ({0.9: False}, 1)
    assert outcome({0: found((0, 0, 10, 5, 1, 0.9))}, truth, min_iou=0.6) == ({0.9: False}, 1)


def test_match_detections_matches_within_an_image_only():
    truth = Truth([(0, 0, 10, 10, 1, 0)], [(50, 50, 60, 60, 1, 0)])
    assert outcome({0: found((50, 50, 60, 60, 1, 0.9)), 1: found((50, 50, 60, 60, 1, 0.5))}, truth) == (
        {0.9: False, 0.5: True}, 2)


def test_match_detections_leaves_crowds_out_of_the_boxes_to_find():
    truth = Truth([(0, 0, 10, 10, 1, 1), (20, 20, 30, 30, 1, 0)])
    assert outcome({0: found((20, 20, 30, 30, 1, 0.9))}, truth) == ({0.9: True}, 1)
    assert outcome({0: found((0, 0, 10, 10, 1, 0.9))}, truth) == ({0.9: False}, 1)


def test_match_detections_of_images_without_boxes_or_detections():
    truth = Truth([], [(0, 0, 10, 10, 1, 0)], [(0, 0, 10, 10, 1, 0)])
    assert outcome({0: found((0, 0, 10, 10, 1, 0.9))}, truth) == ({0.9: False}, 0)  # nothing there to find
    assert outcome({1: found()}, truth) == ({}, 1)
    assert outcome({2: {"bad": "damaged"}}, truth) == ({}, 1)  # its boxes are missed all the same
    assert outcome({}, truth) == ({}, 0)


def test_match_detections_at_one_iou_agrees_with_pycocotools(tmp_path):
    """Recall at IoU 0.5 is AR at that IoU, which COCOeval reports in its recall array; without crowds, one class."""
    truth = random_truth(8)
    for a in truth["annotations"]:
        a.update(category_id=2, iscrowd=0)
    found = random_detections(truth, IMAGE_IDS)
    for d in found.values():
        d["labels"][:] = 0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(written(tmp_path, truth))
        rows = np.concatenate([np.column_stack([np.full(len(d["scores"]), IMAGE_IDS[i]), d["boxes"][:, :2],
                                                d["boxes"][:, 2:] - d["boxes"][:, :2], d["scores"],
                                                np.full(len(d["scores"]), 2)]) for i, d in found.items()])
        scorer = COCOeval(coco, coco.loadRes(rows), "bbox")
        scorer.evaluate()
        scorer.accumulate()
    ours = data.load_coco(tmp_path / "truth.json", tmp_path)
    position = {int(image): i for i, image in enumerate(ours.ids)}
    scores, correct, boxes = evaluation.match_detections({position[IMAGE_IDS[i]]: d for i, d in found.items()}, ours)
    assert 0 < correct.sum() < len(correct)
    assert correct.sum() / boxes == pytest.approx(scorer.eval["recall"][0, 0, 0, 2])  # IoU 0.5, class 2, all sizes, 100


def test_precision_recall_is_what_counting_gives():
    scores, correct = np.array([0.9, 0.8, 0.5, 0.3]), np.array([True, False, True, False])
    rows = evaluation.precision_recall(scores, correct, 4, [0.2, 0.5, 0.85, 0.95])
    assert [r["threshold"] for r in rows] == [0.2, 0.5, 0.85, 0.95]
    assert [r["kept"] for r in rows] == [4, 3, 1, 0]  # a score equal to the threshold is kept
    assert [r["precision"] for r in rows] == pytest.approx([2 / 4, 2 / 3, 1, 0])
    assert [r["recall"] for r in rows] == pytest.approx([2 / 4, 2 / 4, 1 / 4, 0])
    assert [r["f1"] for r in rows] == pytest.approx([1 / 2, 4 / 7, 2 / 5, 0])


def test_precision_recall_of_nothing_is_zero_not_an_error():
    rows = evaluation.precision_recall(np.zeros(0), np.zeros(0, bool), 0, evaluation.THRESHOLDS)
    assert len(rows) == 19 and all(r["precision"] == r["recall"] == r["f1"] == r["kept"] == 0 for r in rows)
    assert [rows[0]["threshold"], rows[-1]["threshold"]] == [0.05, 0.95]


def test_best_threshold_is_the_highest_of_those_with_the_best_f1():
    def rows(*pairs):
        return [{"threshold": t, "f1": f} for t, f in pairs]
    assert evaluation.best_threshold(rows((0.1, 0.2), (0.3, 0.7), (0.5, 0.4))) == 0.3
    assert evaluation.best_threshold(rows((0.1, 0.7), (0.3, 0.7), (0.5, 0.4))) == 0.3
    assert evaluation.best_threshold(rows((0.5, 0.7), (0.3, 0.7 - 1e-12), (0.7, 0.7 - 1e-4))) == 0.5


# ---- images in, boxes out ----------------------------------------------------------------------------------------

def test_normalise_equals_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    want = torch.stack([tvf.normalize(tvf.to_tensor(p), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for p in pixels])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    got = evaluation.normalise(batch, torch.device("cpu"))
    assert got.dtype == torch.float32 and got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


class Echo(torch.nn.Module):
    """A detector that finds one thing: class 1 at its third anchor."""

    def forward(self, images):
        logits = torch.full((len(images), 4, 2), -10.0)
        logits[:, 2, 1] = 3.0
        return logits, torch.zeros(len(images), 4, 4)


def test_detections_are_in_pixels_of_the_file_and_inside_it_in_the_order_asked_for(tmp_path):
    sizes = [(100, 200), (64, 32), (128, 128)]  # height, width of files shown to the network at 64 px
    for i, (h, w) in enumerate(sizes):
        Image.new("RGB", (w, h), (90, 60, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_bytes(b"no image")
    paths = np.array([str(tmp_path / f"{i}.png").encode() for i in (0, 1, 2, 9)])
    anchors = torch.zeros(4, 4)
    anchors[2] = torch.tensor([8.0, 4.0, 60.0, 24.0])
    net = Echo().train()
    got = list(evaluation.detections(net, anchors, paths, [2, 0, 3, 1], 64, torch.device("cpu"), torch.float32, batch=3))
    assert [i for i, _ in got] == [2, 0, 3, 1] and not net.training
    found = dict(got)
    assert "9.png" in found[3]["bad"]
    for i, (h, w) in enumerate(sizes):
        scale = 64 / max(h, w)
        want = np.array([8, 4, min(60, w * scale), min(24, h * scale)]) / scale
        assert found[i]["size"] == (h, w) and found[i]["labels"].tolist() == [1]
        assert found[i]["boxes"][0] == pytest.approx(want, abs=1e-3)
        assert found[i]["scores"] == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())


def test_detect_all_finds_in_every_image_of_a_set_what_detections_finds_in_each(tmp_path):
    for i in range(3):
        Image.new("RGB", (64, 48), (0, 0, 90 * i)).save(tmp_path / f"{i}.png")
    paths = np.array([str(tmp_path / f"{i}.png").encode() for i in range(3)])
    args = Echo(), torch.tensor([[8.0, 4.0, 60.0, 24.0]] * 4), paths
    rest = 64, torch.device("cpu"), torch.float32
    found = evaluation.detect_all(*args, *rest)
    assert list(found) == [0, 1, 2]
    for i, d in evaluation.detections(*args, [0, 1, 2], *rest):
        assert np.array_equal(found[i]["boxes"], d["boxes"])


# ---- several classes an image --------------------------------------------------------------------------------------

def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    for ties in (2, 7, 10 ** 6):
        scores, labels = rng.integers(ties, size=(40, 5)) / 7, rng.integers(2, size=(40, 5))
        labels[:, 1], labels[:, 3], labels[0, 4] = 0, 1, 1
        found = evaluation.mean_auroc(scores, labels, "abcde")
        assert found["undefined"] == ["b", "d"]
        pairs = {}
        for name, s, y in zip("abcde", scores.T, labels.T):
            each = [(a > b) + 0.5 * (a == b) for a in s[y == 1] for b in s[y == 0]]
            pairs[name] = sum(each) / len(each) if each else None
        assert found["per_class"] == pytest.approx(pairs)
        assert found["mAUROC"] == pytest.approx(np.mean([pairs[k] for k in "ace"]))
    assert evaluation.mean_auroc(np.zeros((3, 1)), np.zeros((3, 1)), ["a"])["mAUROC"] is None
