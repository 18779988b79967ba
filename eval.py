"""Scores: COCO AP of a detector, precision and recall of its boxes, the pseudo-label threshold; IoU of a segmenter; AUROC.

Every process detects on its share of the images; rank 0 scores with pycocotools (the reference implementation) and all
ranks get the same numbers. AP is COCO's: mean over IoU 0.5:0.05:0.95 and classes, in 0..1, -1 where undefined.
"""
import contextlib
import functools
import io

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import data
import masks
import ops
import util

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]  # COCOeval's order
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation of RGB in 0..1
TORCHVISION_SIDES = (800, 1333)  # its detectors' shorter side, and the most the longer may have
BATCH = 16  # images at a time; the same everywhere, since the arithmetic of a batch may depend on its size


def normalise(images, device, pixels=IMAGENET):
    """uint8 (B, 3, H, W) from the loader -> float32 on the device, by pixels = (mean, deviation), channels_last."""
    mean, std = _on_device(pixels, device)
    return (images.to(device, non_blocking=True).to(memory_format=torch.channels_last).float() - mean) / std


@functools.lru_cache
def _on_device(pixels, device):  # made once: creating a tensor on a GPU from numbers waits for it
    return [torch.tensor([255 * x for x in v], device=device).view(1, 3, 1, 1) for v in pixels]


@torch.no_grad()
def detections(model, anchors, source, index, size, device, dtype, workers=0, min_score=0.05, batch=BATCH):
    """Detects on images source[index]; yields (i, {"boxes" (n, 4) in the file's pixels, "scores", "labels", "size"})
    as numpy, in order, or (i, {"bad": reason}). model: the unwrapped module, left in eval mode. size, anchors: of the
    square canvas; both None: as torchvision's RetinaNet does it; only anchors None: the model decodes by itself (rcnn.py)."""
    model.eval()
    if size is None:
        yield from torchvision_detections(model, source, index, device, dtype, workers, min_score)
        return
    done = 0
    for rows in data.eval_loader(source, index, size, batch, workers):
        window = (rows["original"] * rows["scale"][:, None]).round().clamp(min=1)  # (B, 2) the unpadded part
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(normalise(rows["images"], device))
        found = ops.detect(*outputs, anchors, window.to(device), min_score=min_score) if anchors is not None else \
            model.decode(outputs, window, min_score)
        bad = dict(rows["bad"])
        for j in range(min(batch, len(index) - done)):  # the last batch is filled up with repeats
            i = index[done + j]
            if j in bad:
                yield i, {"bad": bad[j]}
                continue
            h, w = rows["original"][j].tolist()
            boxes = (found[j]["boxes"].cpu().numpy() / float(rows["scale"][j])).clip(0, [w, h, w, h])
            rles = {"rles": masks.encode(found[j]["masks"].cpu(), boxes, (h, w))} if "masks" in found[j] else {}
            yield i, {"boxes": boxes, "scores": found[j]["scores"].cpu().numpy(),
                      "labels": found[j]["labels"].cpu().numpy(), "size": (h, w), **rles}
        done += batch


def torchvision_detections(model, source, index, device, dtype, workers, min_score):
    """detections() for torchvision's COCO weights (models.coco_teacher): each image by itself, at the resolution, with the
    anchors and the 300 boxes that torchvision gives it."""
    torch.backends.cudnn.benchmark = False  # every image has a shape of its own
    prepare = GeneralizedRCNNTransform(*TORCHVISION_SIDES, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    for i, rows in zip(index, data.eval_loader(source, index, None, 1, workers)):
        if rows["bad"]:
            yield i, {"bad": rows["bad"][0][1]}
            continue
        batch, _ = prepare([rows["images"][0].to(device).float() / 255])
        (h, w), canvas = batch.image_sizes[0], batch.tensors.shape[-2:]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, deltas = model(batch.tensors.contiguous(memory_format=torch.channels_last))
        found = ops.detect(logits, deltas, ops.torchvision_anchors(*canvas, device=device),
                           torch.tensor([[h, w]], device=device), min_score=min_score, limit=300)[0]
        height, width = rows["original"][0].tolist()
        yield i, {"boxes": found["boxes"].cpu().numpy() * np.float32([width / w, height / h] * 2),
                  "scores": found["scores"].cpu().numpy(), "labels": found["labels"].cpu().numpy(), "size": (height, width)}


def detect_all(model, anchors, source, size, device, dtype, workers=0):
    """detections() over a whole set, shared among the processes -> {i: detections} on every rank."""
    rank, size_of_world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, len(source), size_of_world))
    found = dict(detections(model, anchors, source, mine, size, device, dtype, workers))
    return dict(sorted(item for share in gathered(found) for item in share.items()))


def gathered(value):
    """Every process's value, on all of them."""
    shares = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(shares) > 1:
        dist.all_gather_object(shares, value)
    return shares


def say_unusable(bad, images, meaning, check, log, which="validation"):
    """Names images of a set that could not be read (bad: reasons); UserError if they are many of all `images`."""
    for text in bad[:5]:
        log.say(f"warning: {meaning}: {text}", once=True)
    if len(bad) > max(20, images // 100) or len(bad) == images:
        raise util.UserError(f"{len(bad)} of {images} {which} images are unusable, first {bad[0]}; run {check} on the data")


def evaluate(model, anchors, val, size, workers, run, log):
    """COCO metrics of a detector on val (Detections), the same on every process. run: (rank, processes, device, dtype)."""
    found = detect_all(model, anchors, val, size, run[2], run[3], workers)
    bad = [d["bad"] for d in found.values() if "bad" in d]
    say_unusable(bad, len(val), "its objects count as missed", "python data.py check", log)
    metrics = util.rank0_first(lambda: coco_ap(val.annotation_file, found, val.ids, val.class_ids))
    if metrics["AP"] < 0:
        log.say(f"note: {val.annotation_file} has no object to find; AP is undefined and given as -1")
    elif metrics["AR100"] == 0:
        log.say("warning: nothing is found: scores have not left their starting value. Train longer, or look at "
                "first_batch.png to see whether the labels are right")
    return metrics


def coco_ap(annotation_file, detected, ids, class_ids):
    """COCO AP. detected: {i: {"boxes" xyxy, "scores", "labels"}} over positions in ids -> {metric: float}.

    ids: COCO image ids; class_ids: category id of each class. Without any detection all metrics are 0. Where the detections have
    "rles" and all objects segmentations, the same of masks, as "mask AP" and so on.
    UserError when ids are not those of the annotation file.
    """
    truth = data.read_json(annotation_file, "annotation file")
    known = {im["id"] for im in truth["images"]}
    strange = [int(i) for i in ids if int(i) not in known]
    if strange:
        raise util.UserError(f"{annotation_file} lacks {len(strange)} of the scored image ids, first {strange[:3]}; "
                             "score with the file the images came from")
    truth["annotations"] = [a for a in truth["annotations"] if len(a["bbox"] or ()) == 4]  # load_coco drops these too
    for n, a in enumerate(truth["annotations"]):  # fields that COCOeval needs and simple exports leave out
        a["id"] = n + 1  # whatever it was: COCOeval takes 0 for "unmatched" and loses boxes that share an id
        a["iscrowd"] = int(bool(a.get("iscrowd")))
        a["area"] = a["bbox"][2] * a["bbox"][3] if a.get("area") is None else a["area"]
    rows = [np.column_stack([np.full(len(d["scores"]), ids[i]), d["boxes"][:, :2], d["boxes"][:, 2:] - d["boxes"][:, :2],
                             d["scores"], np.asarray(class_ids)[d["labels"]]])
            for i, d in detected.items() if "bad" not in d and len(d["scores"])]
    if not rows:
        return dict.fromkeys(METRICS, 0.0)
    outlined = [{"image_id": int(ids[i]), "category_id": class_ids[k], "score": float(s), "segmentation": rle}
                for i, d in detected.items() for k, s, rle in zip(d.get("labels", ()), d.get("scores", ()), d.get("rles", ()))]
    metrics = scored(truth, np.concatenate(rows), ids, "bbox")
    sizes = {im["id"]: (im["height"], im["width"]) for im in truth["images"]}
    if outlined and all(masks.usable(a.get("segmentation"), sizes.get(a["image_id"], ())) for a in truth["annotations"]):
        metrics.update({f"mask {k}": v for k, v in scored(truth, outlined, ids, "segm").items()})
    return metrics


def scored(truth, results, ids, kind):
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


def match_detections(detected, truth, min_iou=0.5):
    """Greedy matching by score within image and class, as COCO does at one IoU.

    detected: {i: detections} over positions in truth (Detections). Returns scores (n,), correct (n,) bool, and the
    number of ground-truth boxes in those images (crowds left out).
    """
    scores, correct, boxes = [], [], 0
    for i, d in detected.items():
        target = truth.target(i)
        real = ~target["crowd"]
        boxes += int(real.sum())
        if "bad" in d:
            continue
        iou = ops.box_iou(torch.from_numpy(np.asarray(d["boxes"], np.float32)),
                          torch.from_numpy(target["boxes"][real])).numpy()
        iou = np.where(d["labels"][:, None] == target["labels"][real][None], iou, 0)  # (n, M)
        for j in np.argsort(-d["scores"], kind="stable"):
            best = iou[j].argmax() if iou.shape[1] else 0
            hit = bool(iou.shape[1] and iou[j, best] >= min_iou)
            if hit:
                iou[:, best] = 0  # each box is found once
            scores.append(float(d["scores"][j]))
            correct.append(hit)
    return np.array(scores), np.array(correct, dtype=bool), boxes


def precision_recall(scores, correct, boxes, thresholds):
    """[{"threshold", "precision", "recall", "f1", "kept"}] for keeping the detections with score >= threshold."""
    rows = []
    for t in thresholds:
        kept, hits = int((scores >= t).sum()), int(correct[scores >= t].sum())
        precision, recall = hits / max(kept, 1), hits / max(boxes, 1)
        rows.append({"threshold": round(float(t), 2), "precision": precision, "recall": recall,
                     "f1": 2 * precision * recall / max(precision + recall, 1e-9), "kept": kept})
    return rows


THRESHOLDS = np.arange(0.05, 0.96, 0.05)


def best_threshold(rows):
    """The rule behind --threshold auto: the highest threshold among those with the best F1 on held-out labels, None if
    nothing right is found at any. F1 keeps about as many boxes as there are objects, which is what a student's targets
    should look like."""
    top = max((row["f1"] for row in rows), default=0)
    return max(row["threshold"] for row in rows if row["f1"] >= top - 1e-9) if top > 0 else None


# ---- segmentation ------------------------------------------------------------------------------------------------

def confusion_matrix(predicted, truth, classes):
    """(K, K) int64 counts of pixels, row: truth, column: prediction; pixels of truth 255 are left out. Both (H, W) indices."""
    known = truth != 255
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return torch.from_numpy(np.bincount(pairs, minlength=classes ** 2).reshape(classes, classes))


def mean_iou(confusion, class_names):
    """{"mIoU", "accuracy", "IoU": {class: its own, None where it neither is nor was predicted}} of a confusion matrix. The mean
    is over the classes that have an IoU, 0 if none has."""
    hit, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    each = {name: float(h / u) if u else None for name, h, u in zip(class_names, hit, union)}
    defined = [v for v in each.values() if v is not None]
    return {"mIoU": float(np.mean(defined)) if defined else 0.0, "accuracy": float(hit.sum() / max(confusion.sum(), 1)),
            "IoU": each}


# ---- several classes an image --------------------------------------------------------------------------------------

def mean_auroc(scores, labels, class_names):
    """{"mAUROC", "per_class": {name: area under the ROC curve}, "undefined": [name]} of scores and labels (0 or 1), both (n, K).

    The area is the share of pairs of an image with the class and one without in which the former has the higher score, ties half
    (by ranks: Mann and Whitney). A class without such a pair is undefined, None, and not in the mean (HPT's code counts it as 0);
    mAUROC is None if all are.
    """
    each = {}
    for name, s, y in zip(class_names, np.asarray(scores).T, np.asarray(labels).T):
        _, at, count = np.unique(s, return_inverse=True, return_counts=True)
        ranks = (count.cumsum() - (count - 1) / 2)[at]  # from 1, equal scores share theirs
        p, n = int((y == 1).sum()), int((y == 0).sum())
        each[name] = float((ranks[y == 1].sum() - p * (p + 1) / 2) / (p * n)) if p and n else None
    defined = [v for v in each.values() if v is not None]
    return {"mAUROC": float(np.mean(defined)) if defined else None, "per_class": each,
            "undefined": [name for name, v in each.items() if v is None]}
