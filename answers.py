"""What a network answers: boxes, masks, classes; the store of answers, and the pseudo-labels in it.

A pseudo-label is a target dict that a teacher wrote; training does not look at its scores. A store
keeps all answers above a low floor, with their scores; the threshold is applied on reading.
"""

import heapq
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import backbones
import data
import ops
from util import need, write_atomic

THRESHOLDS = np.arange(0.05, 0.96, 0.05)

# ---- each yields (position, answer; None for an image that cannot be read) ----------------------


@torch.no_grad()
def boxes(net, images, index, size, proc, floor=0.05):
    """Detections on the images at the positions `index`, resized to a canvas of side `size`, in
    order: {"boxes" (n, 4) xyxy in the file's pixels, "scores", "labels", "size" (h, w)} in numpy;
    of Mask R-CNN also "rles"."""
    net.eval()
    for rows, batch in data.eval_batches(images, index, size, proc):
        with proc.autocast():
            pixels = backbones.normalise(batch["images"])
            answers = net.answers(pixels, batch["window"], floor)
        for i, answer, batch_row in zip(rows, answers, range(len(rows))):
            if not batch["usable"][batch_row]:
                yield i, None
                continue
            h, w = batch["original"][batch_row].tolist()
            xyxy = answer["boxes"].cpu().numpy() / float(batch["scale"][batch_row])
            detections = {
                "boxes": xyxy.clip(0, [w, h, w, h]),
                "scores": answer["scores"].cpu().numpy(),
                "labels": answer["labels"].cpu().numpy(),
                "size": (h, w),
            }
            if "masks" in answer:
                crops = answer["masks"].cpu()
                detections["rles"] = ops.encode_masks(crops, detections["boxes"], (h, w))
            yield i, detections


@torch.no_grad()
def masks(net, images, index, size, proc, scales=(1.0,), flip=False):
    """{"mask": the likeliest class (H, W) uint8 of every pixel of the file, "sure": floor(200 p) of
    it (H, W) uint8, "size"}; p averaged over scales, and over mirrored images with flip."""
    net.eval()
    for rows, batch in data.eval_batches(images, index, size, proc):
        pixels = backbones.normalise(batch["images"])
        mean = probabilities(net, pixels, size, proc, scales, flip)  # (B, K, S, S)
        windows = batch["window"].int().tolist()
        for j, i in enumerate(rows):
            if not batch["usable"][j]:
                yield i, None
                continue
            h, w = windows[j]  # the unpadded part of the canvas
            file = tuple(batch["original"][j].tolist())
            sure, likeliest = decide(mean[j, :, :h, :w], file)
            yield (
                i,
                {
                    "mask": likeliest.byte().cpu().numpy(),
                    "sure": (200 * sure.double()).floor().byte().cpu().numpy(),
                    "size": file,
                },
            )


def probabilities(net, images, size, proc, scales, flip):
    """Class probabilities (B, K, S, S) of normalised images (B, 3, S, S), averaged."""
    mirrors = [False]
    if flip:
        mirrors.append(True)
    mean = 0
    for scale in scales:
        side = max(32, round(scale * size / 4) * 4)
        x = images
        if side != size:
            x = F.interpolate(images, (side, side), mode="bilinear", antialias=side < size)
        for mirror in mirrors:
            with proc.autocast():
                logits = net(x.flip(3) if mirror else x).float()
            logits = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
            p = logits.softmax(1)
            if mirror:
                p = p.flip(3)
            mean = mean + p / (len(scales) * len(mirrors))
    return mean


def decide(p, size):
    """Probabilities (K, h, w) -> the largest and its class (float32, int64; H, W) at the file's
    size; class by class, since all of a large file's at once would be gigabytes."""
    sure = torch.full(size, -1.0, device=p.device)
    likeliest = torch.zeros(size, dtype=torch.int64, device=p.device)
    for k in range(len(p)):
        here = F.interpolate(p[None, k : k + 1], size, mode="bilinear", align_corners=False)[0, 0]
        likeliest = torch.where(here > sure, k, likeliest)
        sure = torch.maximum(sure, here)
    return sure, likeliest


@torch.no_grad()
def classes(net, images, index, size, proc):
    """{"label": the likeliest class of the image, "score": its probability}."""
    net.eval()
    for rows, batch in data.eval_batches(images, index, size, proc):
        with proc.autocast():
            logits = net(backbones.normalise(batch["images"]))
        scores, labels = logits.float().softmax(1).max(1)
        for i, score, label, usable in zip(
            rows, scores.tolist(), labels.tolist(), batch["usable"].tolist()
        ):
            yield i, {"label": label, "score": round(score, 5)} if usable else None


def share(images, proc):
    """Positions of the images that this process looks at."""
    return list(range(proc.rank, len(images), proc.world))


# ---- the store of a network's answers ------------------------------------------------------------


class Answers:
    """What a network says of images: part_RANK_of_WORLD.jsonl in a folder, a line an image, and a
    PNG in masks/ for a mask. All answers above a low floor are kept, with their scores: choosing
    another threshold costs no new pass. The same call resumes."""

    def __init__(self, place, images, proc):
        self.place = Path(place)
        self.images = images
        done = proc.first(lambda: answered(place, len(images)))
        self.missing = [i for i in range(proc.rank, len(images), proc.world) if not done[i]]
        (self.place / "masks").mkdir(parents=True, exist_ok=True)
        part = self.place / f"part_{proc.rank}_of_{proc.world}.jsonl"
        self.file = open(part, "a", buffering=1)

    def add(self, i, answer):
        """answer: as yielded above, {"boxes" xyxy, "labels", "scores", "size"}, {"mask", "sure",
        "size"} or {"label", "score"}; None for an image that could not be read."""
        path = os.path.abspath(self.images.path(i))
        row = {"i": i, "file": path}
        if answer is None:
            row["bad"] = True
        elif "boxes" in answer:
            boxes = answer["boxes"]
            xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            row["size"] = answer["size"]
            row["boxes"] = xywh.astype(float).round(4).tolist()
            row["labels"] = answer["labels"].tolist()
            row["scores"] = answer["scores"].astype(float).round(5).tolist()
        elif "mask" in answer:
            name = f"{i:07d}_{Path(path).stem[:80]}.png"
            picture = Image.fromarray(np.stack([answer["mask"], answer["sure"]], 2), "LA")
            write_atomic(self.place / "masks" / name, lambda p: picture.save(p, "PNG"))
            row["size"] = answer["size"]
            row["mask"] = name
            row["top"] = int(answer["sure"].max())  # the surest pixel, in 200ths
        else:
            row.update(answer)
        self.file.write(json.dumps(row) + "\n")


def answer_parts(place):
    return sorted(Path(place).glob("part_*.jsonl"))


def answered(place, n):
    """Which of n images have an answer (n,) bool. A line cut off by a kill is removed."""
    done = np.zeros(n, dtype=bool)
    for part in answer_parts(place):
        whole = 0
        with open(part, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                done[json.loads(line)["i"]] = True
        os.truncate(part, whole)
    return done


def read_answers(place):
    """All lines of a store in the order of its images. Every part is in order already, so merging
    holds one line of each in memory."""
    streams = [map(json.loads, open(part)) for part in answer_parts(place)]
    return heapq.merge(*streams, key=lambda row: row["i"])


def confident(place, threshold, like):
    """The answers in a store with a score of at least `threshold`, as labelled Images with the
    classes of `like`. Images that keep nothing are left out: from a weak teacher they are mostly
    misses, and trained on they would teach the student to miss too."""
    rows = []
    for row in read_answers(place):
        if "boxes" in row:
            sure = [k for k, score in enumerate(row["scores"]) if score >= threshold]
            for name in ("boxes", "labels", "scores"):
                row[name] = [row[name][k] for k in sure]
            keep = len(sure) > 0
        elif "mask" in row:
            keep = row["top"] >= round(200 * threshold)
        else:
            keep = row.get("score", -1) >= threshold
        if keep and "bad" not in row:
            rows.append(row)
    files = data.as_bytes([row["file"] for row in rows])
    ids = np.array([row["i"] for row in rows], dtype=np.int64)
    images = data.Images("", files, ids, str(place), like.class_names, like.class_ids)
    if like.boxes is not None:
        return with_boxes(images, rows)
    if like.masks is not None:
        masks = data.as_bytes([os.path.abspath(Path(place, "masks", row["mask"])) for row in rows])
        return replace(images, masks=masks, certainty=threshold)
    return replace(images, image_class=np.array([row["label"] for row in rows], dtype=np.int64))


def with_boxes(images, rows):
    sizes = np.array([row["size"] for row in rows], np.int32).reshape(-1, 2)
    image = np.repeat(np.arange(len(rows)), [len(row["boxes"]) for row in rows])
    xywh = np.array([box for row in rows for box in row["boxes"]], np.float64).reshape(-1, 4)
    boxes, broken = data.corners(xywh, sizes[image])
    keep, _ = data.count_dropped(broken)
    labels = np.array([k for row in rows for k in row["labels"]], dtype=np.int64)
    scores = np.array([s for row in rows for s in row["scores"]], dtype=np.float32)
    count = np.bincount(image[keep], minlength=len(rows))
    return replace(
        images,
        sizes=sizes,
        start=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        boxes=boxes[keep].astype(np.float32),
        labels=labels[keep],
        scores=scores[keep],
        crowd=np.zeros(keep.sum(), bool),
    )


# ---- the threshold -------------------------------------------------------------------------------


def best_f1(net, held_out, size, proc):
    """--threshold auto: the score with the best F1 at IoU 0.5 on held-out labels, the highest of
    equals, so that about as many boxes are kept as there are objects -> (threshold, None if nothing
    is right at any; [{"threshold", "precision", "recall", "f1", "kept"}])."""
    detected = proc.union(boxes(net, held_out, share(held_out, proc), size, proc))
    rows = precision_recall(*match_detections(detected, held_out), THRESHOLDS)
    top = max(row["f1"] for row in rows)
    best = max(row["threshold"] for row in rows if row["f1"] >= top - 1e-9)
    return (best if top > 0 else None), rows


def match_detections(detected, truth, min_iou=0.5):
    """Greedy matching by score within image and class, as COCO does at one IoU -> scores (n,),
    correct (n,) bool, and the number of true boxes in those images, crowds left out."""
    scores = []
    correct = []
    total = 0
    for i, d in detected.items():
        target = truth.target(i)
        human = ~target["crowd"]
        total += int(human.sum())
        if d is None:
            continue
        found = torch.from_numpy(np.asarray(d["boxes"], np.float32))
        iou = ops.box_iou(found, torch.from_numpy(target["boxes"][human])).numpy()
        iou = np.where(d["labels"][:, None] == target["labels"][human][None], iou, 0)  # (n, M)
        for j in np.argsort(-d["scores"], kind="stable"):
            hit = False
            if iou.shape[1]:
                best = iou[j].argmax()
                hit = bool(iou[j, best] >= min_iou)
            if hit:
                iou[:, best] = 0  # each box is found once
            scores.append(float(d["scores"][j]))
            correct.append(hit)
    return np.array(scores), np.array(correct, dtype=bool), total


def precision_recall(scores, correct, total, thresholds):
    """A row per threshold, for keeping the detections of at least that score."""
    rows = []
    for t in thresholds:
        kept = int((scores >= t).sum())
        hits = int(correct[scores >= t].sum())
        precision = hits / max(kept, 1)
        recall = hits / max(total, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        row = {"threshold": round(float(t), 2), "precision": precision, "recall": recall}
        rows.append({**row, "f1": f1, "kept": kept})
    return rows


# ---- what a threshold leaves ---------------------------------------------------------------------


def audit(pseudo, human, asked):
    """What a threshold left of the answers on `asked` images -> {"images", "kept": images that keep
    a label, "share" of labels by class, ...}. UserError if that is (almost) nothing, or (but
    for boxes) of one class only: training a student on it is worse than not training one."""
    names = human.class_names
    counts = {"images": asked, "kept": len(pseudo)}
    if human.boxes is not None:
        per_class = np.bincount(pseudo.labels, minlength=len(names))
        counts["boxes"] = len(pseudo.boxes)
        usual = len(human.boxes) / len(human)
        enough = len(pseudo.boxes) >= 0.02 * usual * asked and len(pseudo.boxes)
    elif human.masks is not None:
        per_class, counts["pixels"] = pixels_per_class(pseudo, asked, len(names))
        enough = counts["pixels"] >= 0.02
    else:
        per_class = np.bincount(pseudo.image_class, minlength=len(names))
        enough = len(pseudo) >= 0.02 * asked and len(pseudo)
    share = per_class / max(per_class.sum(), 1)
    counts["share"] = dict(zip(names, share.tolist()))
    need(
        enough,
        f"{pseudo.source} is (almost) empty at this threshold: {counts}. The teacher is too weak: "
        "train it longer, raise --labeled, or lower --threshold",
    )
    several = human.boxes is not None or (share > 0.0005).sum() >= 2
    need(
        several,
        f"{pseudo.source} holds (almost) nothing but {names[share.argmax()]}: the teacher cannot "
        "tell classes apart yet. Give it more --steps, another --lr or a weaker --aug",
    )
    return counts


def pixels_per_class(pseudo, asked, K, sample=500):
    """Kept pixels of each class (K,) in up to `sample` masks, and their share of all pixels of the
    images asked about (those that keep none have no mask here, and count as of mean size)."""
    chosen = np.unique(np.linspace(0, len(pseudo) - 1, min(len(pseudo), sample)).astype(int))
    pixels = np.zeros(256, np.int64)
    for i in chosen:
        pixels += np.bincount(pseudo.read_mask(i).ravel(), minlength=256)
    share = pixels[:K].sum() / max(pixels.sum(), 1) * len(pseudo) / asked
    return pixels[:K], float(share)


def shares(images):
    """{class: its share of the labels (boxes, pixels of a sample, images)} of a labelled set."""
    K = len(images.class_names)
    if images.boxes is not None:
        count = np.bincount(images.labels, minlength=K)
    elif images.masks is not None:
        count, _ = pixels_per_class(images, len(images), K)
    else:
        count = np.bincount(images.image_class, minlength=K)
    return dict(zip(images.class_names, (count / max(count.sum(), 1)).tolist()))
