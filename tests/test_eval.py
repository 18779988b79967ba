"""eval.py: AP against pycocotools, other scores against scikit-learn; on one process or several."""

import contextlib
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import turns
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import answers
import data
import eval
from util import Proc

CLASS_IDS = [2, 3, 7, 40]  # as in COCO, not contiguous
IMAGE_IDS = [4, 9, 17, 25, 31, 1000]


def random_truth(seed):
    """A COCO json: six images, four classes, boxes of all three COCO sizes, a few crowds, one image
    without boxes."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in IMAGE_IDS[:-1]:
        for _ in range(rng.integers(3, 9)):
            w, h = rng.choice([12, 50, 150]) * rng.uniform(0.7, 1.4, 2)
            bbox = [rng.uniform(0, 300 - w), rng.uniform(0, 300 - h), w, h]
            row = {"id": len(rows) + 1, "image_id": image, "bbox": bbox, "area": w * h}
            row["category_id"] = int(rng.choice(CLASS_IDS))
            row["iscrowd"] = int(rng.random() < 0.15)
            rows.append(row)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300} for i in IMAGE_IDS]
    categories = [{"id": c, "name": str(c)} for c in CLASS_IDS]
    return {"images": images, "annotations": rows, "categories": categories}


def random_detections(truth, seed):
    """{i: detections}: the truth with noise, some of it twice, of a wrong class or missing, and
    some of nothing."""
    rng = np.random.default_rng(seed)
    detected = {}
    for i, image in enumerate(IMAGE_IDS):
        boxes = []
        labels = []
        for row in truth["annotations"]:
            for _ in range(rng.choice([0, 1, 1, 1, 2]) if row["image_id"] == image else 0):
                x, y, w, h = row["bbox"]
                dx, dy, dw, dh = rng.normal(0, 0.08, 4)
                boxes.append([x + dx * w, y + dy * h, x + w * (1 + dw), y + h * (1 + dh)])
                right = rng.random() < 0.85
                labels.append(CLASS_IDS.index(row["category_id"]) if right else rng.integers(4))
        for _ in range(2):
            x, y, w, h = rng.uniform(0, 150, 4)
            boxes.append([x, y, x + w, y + h])
            labels.append(rng.integers(4))
        detected[i] = {
            "boxes": np.array(boxes, np.float32),
            "scores": rng.random(len(boxes)).astype(np.float32),
            "labels": np.array(labels, np.int64),
        }
    return detected


def pycocotools_ap(truth, detected, ids=IMAGE_IDS):
    """The twelve numbers by pycocotools alone."""
    truth = copy.deepcopy(truth)
    for n, row in enumerate(truth["annotations"]):
        row["id"] = n + 1
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    results = []
    for i, d in detected.items():
        for (x0, y0, x1, y1), score, k in zip(d["boxes"].tolist(), d["scores"], d["labels"]):
            bbox = [x0, y0, x1 - x0, y1 - y0]
            row = {"image_id": IMAGE_IDS[i], "category_id": CLASS_IDS[k], "bbox": bbox}
            results.append({**row, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.params.imgIds = sorted(ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


@pytest.fixture
def written(tmp_path):
    def write(truth):
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        return data.read_coco(tmp_path / "truth.json", tmp_path)

    return write


# ---- AP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_equals_pycocotools(written, seed):
    truth = random_truth(seed)
    detected = random_detections(truth, seed + 10)
    metrics = eval.coco_ap(written(truth), detected)
    assert list(metrics) == eval.METRICS and all(type(v) is float for v in metrics.values())
    assert list(metrics.values()) == pytest.approx(pycocotools_ap(truth, detected), abs=1e-6)
    # a case with something to get wrong
    assert 0.1 < metrics["AP"] < metrics["AP50"] < 0.95 and metrics["AR1"] < metrics["AR100"]
    assert len({round(metrics[name], 6) for name in ("APs", "APm", "APl")}) == 3


def test_ap_of_a_subset_leaves_the_other_images_out(written):
    truth = random_truth(3)
    detected = random_detections(truth, 1)
    val = written(truth).subset([1, 2, 3])
    part = {i: detected[k] for i, k in enumerate([1, 2, 3])}
    want = pycocotools_ap(truth, {k: detected[k] for k in (1, 2, 3)}, IMAGE_IDS[1:4])
    assert list(eval.coco_ap(val, part).values()) == pytest.approx(want, abs=1e-6)


# pycocotools takes id 0 for "unmatched" and loses boxes that share an id; exports have both.
@pytest.mark.parametrize("ids", ["from zero", "all alike", "missing, as are area and iscrowd"])
def test_ap_does_not_depend_on_fields_that_simple_exports_lack_or_give_badly(written, ids):
    truth = random_truth(5)
    if ids.startswith("missing"):
        for row in truth["annotations"]:
            del row["area"], row["iscrowd"], row["id"]
    detected = random_detections(truth, 1)
    want = pycocotools_ap(truth, detected)
    for n, row in enumerate(truth["annotations"]):
        if not ids.startswith("missing"):
            row["id"] = n if ids == "from zero" else 5
    assert list(eval.coco_ap(written(truth), detected).values()) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("bbox", [[], None, [1, 2, None, 4], [float("nan"), 1, 2, 3], [9, 9, 0, 0]])
def test_boxes_that_were_dropped_at_load_do_not_end_the_scoring(written, bbox):
    truth = random_truth(4)
    detected = random_detections(truth, 1)
    truth["annotations"].append({"image_id": 4, "category_id": 2, "bbox": bbox})
    metrics = eval.coco_ap(written(truth), detected)
    assert 0.1 < metrics["AP"] < 1


def test_ap_without_any_detection_is_zero_and_an_unreadable_image_is_one_without(written):
    truth = random_truth(7)
    val = written(truth)
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int64)}
    for detected in ({}, {0: nothing, 1: nothing}, {0: None}):
        metrics = eval.coco_ap(val, detected)
        assert list(metrics) == eval.METRICS and set(metrics.values()) == {0.0}
    detected = random_detections(truth, 1)
    missed = {i: d for i, d in detected.items() if i != 2}
    metrics = eval.coco_ap(val, {**detected, 2: None})
    assert list(metrics.values()) == pytest.approx(pycocotools_ap(truth, missed), abs=1e-6)
    assert metrics["AR100"] < eval.coco_ap(val, detected)["AR100"]


def test_ap_of_the_truth_is_one_for_boxes_and_masks(coco_root, tmp_path):
    val = data.coco(coco_root, "val")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(val.source)
    detected = {}
    for i in range(len(val)):
        target = val.target(i)
        human = ~target["crowd"]
        rows = coco.loadAnns(coco.getAnnIds(int(val.ids[i])))
        rles = [coco.annToRLE(row) for row, is_human in zip(rows, human) if is_human]
        detected[i] = {"boxes": target["boxes"][human], "labels": target["labels"][human]}
        detected[i] |= {"scores": target["scores"][human], "rles": rles}
    metrics = eval.coco_ap(val, detected)
    assert len(metrics) == 24
    for name in ("AP", "AR100", "mask AP", "mask AR100"):
        assert metrics[name] == pytest.approx(1), name
    detected[2]["rles"] = detected[2]["rles"][::-1]  # those of other objects: boxes are still right
    metrics = eval.coco_ap(val, detected)
    assert metrics["mask AP"] < 0.99 < metrics["AP"]
    truth = json.loads((coco_root / "val.json").read_text())
    del truth["annotations"][2]["segmentation"]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    metrics = eval.coco_ap(data.read_coco(tmp_path / "val.json", tmp_path), detected)
    assert list(metrics) == eval.METRICS  # not all objects have one: masks are not scored


# ---- from the network on, by one process and by several ------------------------------------------


class Stub(torch.nn.Module):
    """Answers that depend on the pixels of an image alone: boxes; logits of two or three classes a
    pixel, or an image."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, images):
        grey = images.mean(1, keepdim=True)  # (B, 1, S, S)
        logits = torch.cat([-grey.abs(), -grey, grey], 1)
        return logits if self.task == "seg" else logits.mean((2, 3))

    def answers(self, images, windows, floor):
        mean = images.mean((1, 2, 3))
        boxes = [torch.stack([8 + 2 * m, 8 - m, 40 + m, 44 + m])[None] for m in mean]
        rows = []
        for box, m in zip(boxes, mean):
            rows.append({"boxes": box, "scores": m.sigmoid()[None], "labels": (m > 0).long()[None]})
        return rows


ASKED = {eval.ap: answers.boxes, eval.mean_iou: answers.masks, eval.accuracy: answers.classes}


def scored(score, net, val, proc):
    found = ASKED[score](net, val, answers.share(val, proc), 64, proc)
    return score(found, val, proc)


# fmt: off
@pytest.mark.parametrize("task, score, load", [
    ("det", eval.ap, data.coco), ("seg", eval.mean_iou, data.voc),
    ("cls", eval.accuracy, data.folder)])
# fmt: on
def test_every_number_of_processes_gives_the_same_scores(
    coco_root, voc_root, class_root, task, score, load
):
    root = {"det": coco_root, "seg": voc_root, "cls": class_root}[task]
    val = load(root, "train").subset(range(6, 24))  # more than a batch
    net = Stub(task).train()
    whole = scored(score, net, val, Proc())
    assert not net.training
    for world in (2, 3):
        for proc in turns(world):
            metrics = scored(score, net, val, proc)
        assert metrics == whole


@pytest.mark.parametrize("score, load", [(eval.mean_iou, data.voc), (eval.accuracy, data.folder)])
def test_images_that_cannot_be_read_are_not_scored(voc_root, class_root, score, load, tmp_path):
    val = load(voc_root if load is data.voc else class_root, "val")
    keep = [0, 1, 2, 4, 5, 6]
    net = Stub("seg" if load is data.voc else "cls")
    whole = scored(score, net, val.subset(keep), Proc())
    files = val.files.astype("S60")
    files[3] = b"gone.png"
    damaged = dataclasses.replace(val, files=files, source=str(tmp_path))
    assert scored(score, net, damaged.subset([3, *keep]), Proc()) == whole


def test_a_set_without_objects_has_no_ap_and_the_log_says_so(coco_root, tmp_path, capsys):
    truth = json.loads((coco_root / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**truth, "annotations": []}))
    val = data.read_coco(tmp_path / "val.json", coco_root / "images")
    assert scored(eval.ap, Stub("det"), val, Proc())["AP"] == -1
    assert "AP is undefined" in capsys.readouterr().out
    assert eval.coco_ap(val, {})["AP"] == -1  # nor where nothing is detected


# ---- masks and classes ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_equals_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    K = 5
    truth, predicted = rng.integers(0, K, (2, 40, 50)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, predicted)
    truth[rng.random(truth.shape) < 0.1] = 255
    pair = truth[truth != 255], predicted[truth != 255]
    confusion = eval.confusion_matrix(predicted, truth, K).numpy()
    assert (confusion == sklearn.metrics.confusion_matrix(*pair, labels=range(K))).all()
    scores = eval.iou_of(confusion, list("abcde"))
    per_class = sklearn.metrics.jaccard_score(*pair, average=None)
    assert list(scores["IoU"].values()) == pytest.approx(per_class)
    assert scores["mIoU"] == pytest.approx(per_class.mean())
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*pair))


def test_a_class_that_is_neither_there_nor_predicted_does_not_count():
    confusion = eval.confusion_matrix(np.array([[0, 1, 1, 2]]), np.array([[0, 0, 1, 255]]), 3)
    scores = eval.iou_of(confusion.numpy(), list("abc"))
    assert scores["IoU"] == {"a": 0.5, "b": 0.5, "c": None} and scores["mIoU"] == 0.5
    assert eval.iou_of(np.zeros((3, 3), int), list("abc"))["mIoU"] == 0


def test_accuracies_equal_scikit_learns(class_root):
    val = data.folder(class_root, "train").subset(range(5, 20))  # 3 images, 8 and 4
    predicted = [a["label"] for _, a in answers.classes(Stub("cls"), val, range(15), 64, Proc())]
    scores = scored(eval.accuracy, Stub("cls"), val, Proc())
    pair = val.image_class, predicted
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*pair))
    assert scores["balanced"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(*pair))
    recall = sklearn.metrics.recall_score(*pair, average=None, zero_division=0)
    assert list(scores["per_class"].values()) == pytest.approx(recall)
    without = scored(eval.accuracy, Stub("cls"), val.subset(range(11)), Proc())
    assert without["per_class"]["square"] is None and without["balanced"] == pytest.approx(
        np.mean([v for v in without["per_class"].values() if v is not None])
    )


@pytest.mark.parametrize("ties", [2, 7, 10**6])
def test_auroc_equals_scikit_learns_also_with_ties_and_leaves_out_what_is_undefined(ties):
    rng = np.random.default_rng(0)
    scores = rng.integers(ties, size=(40, 5)) / 7
    labels = rng.integers(2, size=(40, 5))
    labels[:, 1] = 0
    labels[:, 3] = 1
    metrics = eval.mean_auroc(scores, labels, "abcde")
    assert metrics["undefined"] == ["b", "d"]
    areas = sklearn.metrics.roc_auc_score(labels[:, [0, 2, 4]], scores[:, [0, 2, 4]], average=None)
    assert [metrics["per_class"][name] for name in "abcde"] == pytest.approx(
        [areas[0], None, areas[1], None, areas[2]]
    )
    assert metrics["mAUROC"] == pytest.approx(areas.mean())
    assert eval.mean_auroc(np.zeros((3, 1)), np.zeros((3, 1)), ["a"])["mAUROC"] is None
