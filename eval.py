"""How good a network's answers are: COCO AP, mIoU, accuracy, AUROC.

Every process answers on its share of the images, and all get the same numbers. AP is COCO's, by
pycocotools (the reference): the mean over IoU 0.5:0.05:0.95 and classes, in 0..1, -1 if undefined.
"""

import contextlib
import io

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import ops

# COCOeval's order
# fmt: off
METRICS = [
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
# fmt: on

# ---- boxes ---------------------------------------------------------------------------------------


def ap(found, val, proc):
    """COCO metrics of answers.boxes on `val`, this process's share, the same on every process."""
    detected = proc.union(found)
    metrics = proc.first(lambda: coco_ap(val, detected))
    if metrics["AP"] < 0:
        proc.log.say(f"note: {val.source} has no object to find; AP is undefined, and given as -1")
    elif metrics["AR100"] == 0:
        proc.log.say("warning: nothing is found. Train longer, or look whether labels are right")
    return metrics


def coco_ap(val, detected):
    """{metric: float} of {position in val: detections or None}. Where these have "rles" and all
    objects segmentations also the metrics of masks, as "mask AP" and so on."""
    truth = data.read_json(val.source, "annotation file")
    truth["annotations"] = [a for a in truth["annotations"] if data.is_box(a["bbox"])]
    for n, a in enumerate(truth["annotations"]):  # fields that simple exports leave out
        a["id"] = n + 1  # COCOeval takes 0 for "unmatched", and loses boxes that share an id
        a["iscrowd"] = int(bool(a.get("iscrowd")))
        if a.get("area") is None:
            a["area"] = a["bbox"][2] * a["bbox"][3]
    rows = []
    outlined = []
    for i, d in detected.items():
        if d is None or not len(d["scores"]):
            continue
        image = int(val.ids[i])
        category = np.asarray(val.class_ids)[d["labels"]]
        sides = d["boxes"][:, 2:] - d["boxes"][:, :2]
        columns = (np.full(len(sides), image), d["boxes"][:, :2], sides, d["scores"], category)
        rows.append(np.column_stack(columns))
        for k, score, rle in zip(category.tolist(), d["scores"].tolist(), d.get("rles", ())):
            entry = {"image_id": image, "category_id": k, "score": score, "segmentation": rle}
            outlined.append(entry)
    if not rows:
        return dict.fromkeys(METRICS, -1.0 if val.crowd.all() else 0.0)
    metrics = coco_metrics(truth, np.concatenate(rows), val.ids, "bbox")
    if outlined and all_outlined(truth):
        of_masks = coco_metrics(truth, outlined, val.ids, "segm")
        metrics.update({f"mask {name}": value for name, value in of_masks.items()})
    return metrics


def all_outlined(truth):
    sizes = {im["id"]: (im["height"], im["width"]) for im in truth["images"]}
    for a in truth["annotations"]:
        if not ops.is_outline(a.get("segmentation"), sizes.get(a["image_id"], ())):
            return False
    return True


def coco_metrics(truth, results, ids, kind):
    """COCOeval's metrics on the images `ids`, of boxes (kind bbox) or masks (segm)."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), kind)
        scorer.params.imgIds = sorted(int(i) for i in ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: float(value) for name, value in zip(METRICS, scorer.stats)}


# ---- masks ---------------------------------------------------------------------------------------


def mean_iou(found, val, proc):
    """mIoU, pixel accuracy and IoU of every class, at the files' resolution, of answers.masks on
    `val`; the same on every process. Images that cannot be read are not scored."""
    K = len(val.class_names)
    confusion = torch.zeros(K, K, dtype=torch.int64)
    for i, answer in found:
        if answer is not None:
            confusion += confusion_matrix(answer["mask"], val.read_mask(i), K)
    confusion = proc.sum(confusion.to(proc.device)).cpu().numpy()
    return iou_of(confusion, val.class_names)


def confusion_matrix(predicted, truth, K):
    """(K, K) int64 counts of pixels, row: truth, column: prediction; 255 of truth is left out."""
    known = truth != 255
    pairs = truth[known].astype(np.int64) * K + predicted[known]
    return torch.from_numpy(np.bincount(pairs, minlength=K * K).reshape(K, K))


def iou_of(confusion, class_names):
    """{"mIoU", "accuracy", "IoU": {class: None where it neither is nor was predicted}}; the mean is
    over the classes that have an IoU, 0 if none has."""
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    per_class = {}
    for name, h, u in zip(class_names, hit, union):
        per_class[name] = float(h / u) if u else None
    return {
        "mIoU": mean_of(per_class) or 0.0,
        "accuracy": float(hit.sum() / max(confusion.sum(), 1)),
        "IoU": per_class,
    }


def mean_of(per_class):
    """Mean of the values that are defined, None if none is."""
    defined = [value for value in per_class.values() if value is not None]
    return float(np.mean(defined)) if defined else None


# ---- classes -------------------------------------------------------------------------------------


def accuracy(found, val, proc):
    """Top-1 accuracy, its mean over the classes ("balanced"), and it for each class, of
    answers.classes on `val`."""
    K = len(val.class_names)
    count = torch.zeros(2, K, dtype=torch.int64)  # right answers, images
    for i, answer in found:
        if answer is not None:
            truth = int(val.image_class[i])
            count[0, truth] += int(answer["label"] == truth)
            count[1, truth] += 1
    right, images = proc.sum(count.to(proc.device)).cpu().tolist()
    per_class = {}
    for name, r, n in zip(val.class_names, right, images):
        per_class[name] = r / n if n else None
    return {
        "accuracy": sum(right) / max(sum(images), 1),
        "balanced": mean_of(per_class),
        "per_class": per_class,
    }


def mean_auroc(scores, labels, class_names):
    """{"mAUROC", "per_class", "undefined": [name]} of scores and labels (0 or 1), both (n, K).

    The area is the share of pairs of an image with the class and one without in which the former
    has the higher score, ties half (by ranks: Mann and Whitney). A class without such a pair is
    undefined, None, and not in the mean (HPT's code counts it as 0)."""
    per_class = {}
    for name, s, y in zip(class_names, np.asarray(scores).T, np.asarray(labels).T):
        _, at, count = np.unique(s, return_inverse=True, return_counts=True)
        ranks = (count.cumsum() - (count - 1) / 2)[at]  # from 1, equal scores share theirs
        p = int((y == 1).sum())
        n = int((y == 0).sum())
        area = None
        if p and n:
            area = float((ranks[y == 1].sum() - p * (p + 1) / 2) / (p * n))
        per_class[name] = area
    undefined = [name for name, value in per_class.items() if value is None]
    return {"mAUROC": mean_of(per_class), "per_class": per_class, "undefined": undefined}
