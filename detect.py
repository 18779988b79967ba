"""What detection plugs into st.py: data, network, losses, scores, pseudo-labels. segment.py has the same functions. What is said
of a network is said of RetinaNet; rcnn.py has R-CNN's own network, losses and decoding.

The loss is that of the TensorFlow TPU detection code in which Zoph et al. 2020 released their checkpoints (ops.py); pseudo-labels
are hard boxes over a score threshold (0.5 in the paper: recalled), or over one chosen on held-out labels (ours).
"""
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import models
import ops
import rcnn
import recipes
import runs
import util
from util import UserError

TERMS = ["cls", "box"]
CHECK = "python data.py check"
METRICS = ["AP", "AP50", "AP75", "AR100"]
BOX_WEIGHT = 50.0  # of the Huber loss next to the focal loss (TPU detection code)
FLOOR = 0.05  # detections under this score are not stored, unless the threshold is lower


def load(flags):
    """-> (training set, validation set) as data.Detections, of the same classes."""
    train_json, train_dir, val_json, val_dir = util.rank0_first(lambda: locate(flags))
    train = data.load_coco(train_json, train_dir, with_masks=recipes.RECIPES.get(flags.recipe, {}).get("instances", False))
    return train, data.load_coco(val_json, val_dir, train.class_ids, train.class_names)


def load_val(flags, class_ids, class_names):
    _, _, val_json, val_dir = util.rank0_first(lambda: locate(flags))
    return data.load_coco(val_json, val_dir, class_ids, class_names)


def locate(flags):
    return data.coco_layout(flags.root if flags.data == "coco" else data.embedded(flags.root, "det"))


def data_deps(train, val):
    return {}  # the annotation files, which st.py hashes, say it all


def network(c, classes, norm, backbone_norm):
    if c.get("model") == "rcnn-c4":
        return rcnn.network(c, classes, norm, backbone_norm)
    return models.RetinaNet(c["backbone"], classes, c["levels"], c["width"], c["depth"], norm=norm, backbone_norm=backbone_norm,
                            act=c["act"])


def anchors_for(c, device):
    """(A, 4) for the recipe's canvas; None for torchvision's detector, whose canvas follows the image, and for R-CNN, which has
    its own."""
    if c["image_size"] is None or c.get("model") == "rcnn-c4":
        return None
    return ops.make_anchors(c["image_size"], c["image_size"], c["levels"], c["anchor_base"], device=device)


# ---- losses ------------------------------------------------------------------------------------------------------

def criterion(c, device):
    """-> prepare(batch) -> (targets {name: (B, ...)}, counts (3,)), losses(outputs, targets, part, counts) -> (B, 2)."""
    if c.get("model") == "rcnn-c4":
        return rcnn.criterion(c, device)
    anchors = anchors_for(c, device)
    return lambda batch: assign(batch, anchors), lambda *args: losses_of(*args, anchors)


def assign(batch, anchors):
    """What every anchor of a batch should answer -> {"matched" (B, A) as from ops.match, "classes" (B, A) likewise but with
    class indices, "boxes" (B, M, 4)}, and positives (3,): positive anchors in each of data.PARTS, over all processes."""
    matched = torch.cat([ops.match(anchors, boxes, labels >= 0) for boxes, labels in zip(
        batch["boxes"].split(8), batch["labels"].split(8))])  # 8 images at a time: all IoUs of a large batch are gigabytes
    labels = F.pad(batch["labels"], (0, 1), value=-1)  # (B, M+1): gather needs a column if M is 0
    classes = torch.where(matched >= 0, labels.gather(1, matched.clamp(min=0)), matched)
    positives = torch.zeros(len(data.PARTS), device=anchors.device).index_add(0, batch["part"], (matched >= 0).sum(1).float())
    return {"matched": matched, "classes": classes, "boxes": batch["boxes"]}, util.all_sum(positives)


def losses_of(outputs, targets, part, positives, anchors):
    """Focal and weighted box loss of each image (B, 2), divided by the positives + 1 of its part of the *whole* step,
    so that the pieces of a step, on any number of processes, add up to the same loss. outputs: RetinaNet's."""
    logits, deltas = outputs  # (B, A, K), (B, A, 4)
    focal = ops.focal_loss(logits, targets["classes"])
    box = BOX_WEIGHT / 4 * ops.box_loss(deltas, targets["boxes"], anchors, targets["matched"])
    return torch.stack([focal, box], 1) / (positives[part] + 1)[:, None]


# ---- scores ------------------------------------------------------------------------------------------------------

def evaluate(net, c, val, run, log):
    return evaluation.evaluate(net, anchors_for(c, run[2]), val, c["image_size"], c["workers"], run, log)


# ---- pseudo-labels -----------------------------------------------------------------------------------------------

def about(labelled):
    """What a checkpoint remembers of the labelled set, to compare its pseudo-labels with."""
    return {"boxes_per_image": len(labelled.boxes) / len(labelled)}


def label(folder, net, state, paths, held, labelled, c, run, log):
    """Choose the threshold, detect on `paths`, write folder/pseudo.json -> {"threshold", "images", "with_boxes", "boxes", ...}.

    held: labelled images kept from training, to choose by; labelled: the teacher's training set, to see what is kept of which
    class, or None; state: the teacher's checkpoint.
    """
    asked, (_, _, device, dtype) = c["threshold"], run
    floor, curve = FLOOR if asked == "auto" else min(FLOOR, float(asked)), []
    if len(held):
        found = evaluation.detect_all(net, anchors_for(c, device), held, c["image_size"], device, dtype, c["workers"])
        curve = evaluation.precision_recall(*evaluation.match_detections(found, held), evaluation.THRESHOLDS)
    best = evaluation.best_threshold(curve)
    if asked == "auto" and best is None:
        raise UserError(f"the teacher finds none of the objects of the {len(held)} held-out images, so there is no threshold to "
                        "choose; train it longer, or raise --labeled")
    threshold = best if asked == "auto" else float(asked)
    pseudo_label(folder, net, paths, floor, c, run, log)
    info = {"teacher": state["path"], "teacher_weights": runs.digest_weights(state["model"]), "teacher_step": state["step"],
            "classes": state["class_names"]}
    result = util.rank0_first(lambda: {"threshold": threshold, "held_out": curve, **merge(
        folder, Path(folder) / "pseudo.json", threshold, state["class_ids"], state["class_names"], info)})
    kept = result["boxes"] / max(result["images"], 1)
    log.say(f"{folder}: threshold {threshold:.2f} ({asked}) keeps {result['boxes']} boxes, {kept:.2f} an image (labelled "
            f"images have {state['boxes_per_image']:.2f}); {1 - result['with_boxes'] / max(result['images'], 1):.0%} of "
            f"{result['images']} images keep none and are left out; {result['bad']} unusable images")
    counts = np.bincount(labelled.labels, minlength=len(labelled.class_names)) if labelled else []
    shares = dict(zip(labelled.class_names, counts / max(counts.sum(), 1))) if labelled else {}
    often = sorted(result["per_class"].items(), key=lambda row: -row[1])
    log.say("  share per class, labelled share in brackets: " + ", ".join(
        f"{k} {v / max(result['boxes'], 1):.0%}" + (f" ({shares[k]:.0%})" if shares else "") for k, v in often[:20])
        + (f", {len(often) - 20} rarer classes" if len(often) > 20 else ""))
    if kept < 0.02 * state["boxes_per_image"] or not result["boxes"]:
        raise UserError(f"{folder} is (almost) empty: {result['boxes']} boxes on {result['images']} images at threshold "
                        f"{threshold:.2f}. The teacher is too weak: train it longer, or "
                        + ("raise --labeled" if asked == "auto" else "lower --threshold"))
    return result


def load_pseudo(folder, result, labelled):
    return data.load_coco(folder / "pseudo.json", result["root"], labelled.class_ids)


def pseudo_label(folder, net, paths, floor, c, run, log):
    """Detects on the images `paths` and appends what scores above floor to folder/part_*.jsonl; images done before are
    skipped. The floor lies under the threshold so that the audit can show what the threshold leaves out."""
    rank, ranks, device, dtype = run
    done = util.rank0_first(lambda: data.finished_images(folder, len(paths), floor))
    todo = [i for i in range(rank, len(paths), ranks) if not done[i]]
    began, anchors = time.time(), anchors_for(c, device)
    with open(Path(folder) / f"part_{rank}_of_{ranks}.jsonl", "a", buffering=1) as part:
        for n, (i, d) in enumerate(evaluation.detections(net, anchors, paths, todo, c["image_size"], device, dtype,
                                                         c["workers"], floor)):
            row = {"i": i, "file": os.fsdecode(bytes(paths[i]))}
            if "bad" not in d:
                xywh = np.concatenate([d["boxes"][:, :2], d["boxes"][:, 2:] - d["boxes"][:, :2]], 1)
                row.update(size=d["size"], boxes=xywh.astype(float).round(4).tolist(), labels=d["labels"].tolist(),
                           scores=d["scores"].astype(float).round(5).tolist())
            part.write(json.dumps({**row, **({"bad": d["bad"]} if "bad" in d else {})}) + "\n")
            if (n + 1) % 200 == 0:
                log.progress("pseudo", n + 1, len(todo), began, 0, images_s=(n + 1) / (time.time() - began))
    if ranks > 1:
        torch.distributed.barrier()


def merge(folder, out, threshold, class_ids, class_names, info):
    """Writes the boxes with score >= threshold as a COCO json with a score per annotation. Images that keep no box
    stay out: from a weak teacher they are mostly misses, and trained on they would teach the student to miss too.
    Returns {"images", "with_boxes", "boxes", "bad", "per_class": {name: count}}."""
    stats, per_class = Counter(), Counter({name: 0 for name in class_names})
    folders = {os.path.dirname(row["file"]) for row in data.read_parts(folder)}
    root = os.path.commonpath(folders) if folders else os.getcwd()

    def kept(row):
        return [j for j, s in enumerate(row["scores"]) if s >= threshold]

    def write(path):
        with open(path, "w") as f:  # two passes over the parts, so that memory does not grow with their number
            categories = [{"id": c, "name": n} for c, n in zip(class_ids, class_names)]
            f.write('{"info": ' + json.dumps({**info, "threshold": threshold, "root": root}))
            f.write(',\n"categories": ' + json.dumps(categories) + ',\n"images": [')
            comma = "\n"
            for row in data.read_parts(folder):
                stats["images"] += 1
                stats["bad"] += "bad" in row
                if "bad" in row or not kept(row):
                    continue
                stats["with_boxes"] += 1
                f.write(comma + json.dumps({"id": row["i"] + 1, "file_name": os.path.relpath(row["file"], root),
                                            "height": row["size"][0], "width": row["size"][1]}))
                comma = ",\n"
            f.write('],\n"annotations": [')
            comma = "\n"
            for row in data.read_parts(folder):
                for j in kept(row) if "bad" not in row else ():
                    stats["boxes"] += 1
                    per_class[class_names[row["labels"][j]]] += 1
                    x, y, w, h = row["boxes"][j]
                    f.write(comma + json.dumps({
                        "id": stats["boxes"], "image_id": row["i"] + 1, "category_id": class_ids[row["labels"][j]],
                        "bbox": [x, y, w, h], "area": round(w * h, 2), "iscrowd": 0, "score": row["scores"][j]}))
                    comma = ",\n"
            f.write("]}\n")
    runs.write_atomic(out, write)
    return {**{k: stats[k] for k in ("images", "with_boxes", "boxes", "bad")}, "per_class": dict(per_class), "root": root}
