"""What segmentation plugs into st.py: data, network, loss, scores, pseudo-labels. detect.py has the same functions.

Softmax cross-entropy over pixels, 255 ignored (TensorFlow TPU code). Pseudo-labels are averaged over six scales, hard, and
ignored where the largest probability is under the threshold, 0.5 (Zoph et al. 2020: recalled). --soft keeps the probabilities
(ours): a class that is likely nowhere, such as an outline of one pixel, has no hard label at all, and a student unlearns it.
"""
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import models
import recipes
import runs
import util
import voc
import world
from augment import IGNORE
from util import UserError

TERMS = ["ce"]
CHECK = "python voc.py"
METRICS = ["mIoU", "accuracy"]


def load(flags):
    """-> (training set, validation set) as voc.Masks, of the same classes."""
    root = util.rank0_first(lambda: locate(flags))
    return voc.load_voc(root, flags.train_list, flags.masks), voc.load_voc(root, "val", flags.masks)


def load_val(flags, class_ids, class_names):
    val = voc.load_voc(util.rank0_first(lambda: locate(flags)), "val", flags.masks)
    if val.class_names != list(class_names):
        raise UserError(f"{flags.root} has other classes ({', '.join(val.class_names[:5])}) than the network was trained on "
                        f"({', '.join(class_names[:5])}); check --root and --masks")
    return val


def locate(flags):
    return flags.root if flags.data == "voc" else data.embedded(flags.root, "seg")


def data_deps(train, val):
    """Lists are hashed by st.py; this is for what they stand for."""
    return {"masks": [train.digest(), val.digest()]}


def network(c, classes, norm, backbone_norm):
    return models.Segmenter(c["backbone"], classes, c["levels"], c["width"], c["depth"], c["neck"], c["stride"], norm,
                            backbone_norm)


# ---- loss --------------------------------------------------------------------------------------------------------

def criterion(c, device):
    """-> prepare(batch) -> (targets {name: (B, ...)}, counts (3,)), losses(outputs, targets, part, counts) -> (B, 1).

    The loss is at the resolution of the logits, as in the TPU code; masks are reduced to it by nearest neighbour (there
    bilinearly, said to be for the TPU's sake).
    """
    stride = c["stride"]

    def prepare(batch):
        mask = batch["masks"][:, stride // 2::stride, stride // 2::stride].long()  # (B, H, W)
        labelled = (mask != IGNORE).sum((1, 2)).float()
        soft = {"soft": batch["soft"][:, :, stride // 2::stride, stride // 2::stride]} if "soft" in batch else {}  # (B, K, H, W)
        pixels = torch.zeros(len(data.PARTS), device=device).index_add(0, batch["part"], labelled)
        return {"mask": mask, **soft}, util.all_sum(pixels)

    def losses(logits, targets, part, pixels):
        each = F.cross_entropy(logits.float(), targets["mask"], ignore_index=IGNORE, reduction="none")  # (B, H, W)
        if "soft" in targets:  # all 0 where labels are hard, and where they are ignored
            share = targets["soft"].float()
            total = share.sum(1)  # 255 up to rounding
            mixed = -(share * logits.float().log_softmax(1)).sum(1) / total.clamp(min=1)
            each = torch.where(total > 0, mixed, each)
        # Divided by the labelled pixels of its part of the *whole* step, so that pieces and processes add up to one loss.
        return each.sum((1, 2))[:, None] / pixels[part].clamp(min=1)[:, None]
    return prepare, losses


# ---- scores ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def probabilities(net, source, index, c, run, scales=(1.0,), flip=False):
    """Class probabilities of images source[index], averaged over scales (and their mirror images with flip); yields in order
    (i, (K, h, w) float32 of the image as it lies on the canvas, on the device; (H, W) of the file), or (i, None, reason)."""
    (_, _, device, dtype), size, done = run, c["image_size"], 0
    net.eval()
    for rows in data.eval_loader(source, index, size, evaluation.BATCH, c["workers"]):
        images, mean = evaluation.normalise(rows["images"], device), 0
        for scale in scales:
            side = max(32, round(scale * size / 4) * 4)
            x = images if side == size else F.interpolate(images, (side, side), mode="bilinear", antialias=side < size)
            for mirror in (False, True)[:1 + flip]:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = net(x.flip(3) if mirror else x).float()
                found = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False).softmax(1)
                mean = mean + (found.flip(3) if mirror else found) / (len(scales) * (1 + flip))  # (B, K, S, S)
        window, bad = (rows["original"] * rows["scale"][:, None]).round().clamp(min=1).int().tolist(), dict(rows["bad"])
        for j in range(min(evaluation.BATCH, len(index) - done)):  # the last batch is filled up with repeats
            h, w = window[j]
            yield index[done + j], *((None, bad[j]) if j in bad else (mean[j, :, :h, :w], rows["original"][j].tolist()))
        done += evaluation.BATCH


def enlarged(found, size):
    """Probabilities (K, h, w) at the file's size (H, W), class by class: all of a large file's at once would be gigabytes."""
    return (F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0] for one in found)


def decide(found, size):
    """Probabilities (K, h, w) -> the largest and its class (float32, int64; H, W) at the file's size."""
    sure, index = torch.full(size, -1.0, device=found.device), torch.zeros(size, dtype=torch.int64, device=found.device)
    for k, here in enumerate(enlarged(found, size)):
        index = torch.where(here > sure, k, index)
        sure = torch.maximum(sure, here)
    return sure, index


def evaluate(net, c, val, run, log):
    """mIoU, accuracy and IoU per class at the files' resolution, one scale; the same on every process."""
    rank, ranks, device, _ = run
    confusion, bad = torch.zeros(len(val.class_names), len(val.class_names), dtype=torch.int64), []
    for i, found, size in probabilities(net, val, list(range(rank, len(val), ranks)), c, run):
        if found is None:
            bad.append(size)
            continue
        truth = voc.read_mask(val.mask_path(i), len(val.class_names), size)
        confusion += evaluation.confusion_matrix(decide(found, size)[1].cpu().numpy(), truth, len(val.class_names))
    confusion, bad = util.all_sum(confusion.to(device)).cpu(), [text for share in evaluation.gathered(bad) for text in share]
    evaluation.say_unusable(bad, len(val), "not scored", CHECK, log)
    return evaluation.mean_iou(confusion.numpy(), val.class_names)


# ---- pseudo-labels -----------------------------------------------------------------------------------------------

def about(labelled):
    return {}


def label(folder, net, state, paths, held, labelled, c, run, log):
    """A mask per image of `paths` in folder/masks, listed in folder/pseudo.json -> {"threshold", "images", "with_pixels",
    "kept": share of pixels over the threshold, "per_class": {name: share of those}, ...}. held: unused."""
    names, threshold = state["class_names"], float(c["threshold"])
    pseudo_label(folder, net, paths, threshold, c, run, log)
    info = {"teacher": state["path"], "teacher_weights": runs.digest_weights(state["model"]), "teacher_step": state["step"],
            "threshold": threshold, "classes": names, "scales": recipes.scales(c["scales"]), "flip": c["flip"],
            "soft": c["soft"]}
    result = util.rank0_first(lambda: {"threshold": threshold, **merge(folder, names, info)})
    log.say(f"{folder}: threshold {threshold:.2f} keeps {result['kept']:.0%} of the pixels, the others are ignored; "
            f"{result['images'] - result['with_pixels']} of {result['images']} images keep none and are left out; "
            f"{result['bad']} unusable images")
    log.say("  share of the kept pixels: " + ", ".join(f"{k} {v:.1%}" for k, v in result["per_class"].items()))
    if result["kept"] < 0.02:
        raise UserError(f"{folder} is (almost) empty: {result['kept']:.1%} of the pixels of {result['images'] - result['bad']} "
                        f"usable images reach the threshold {threshold:.2f}. Train the teacher longer, or delete that folder and "
                        "lower --threshold")
    if sum(v > 0.0005 for v in result["per_class"].values()) < 2:
        only = f"(almost) every kept pixel of {folder} is {max(result['per_class'], key=result['per_class'].get)}"
        if labelled is not None and not c["soft"]:
            raise UserError(f"{only}: the teacher has not learnt to tell classes apart, and a student would learn nothing. "
                            "Give the teacher more --steps, another --lr or a weaker --aug, in another --out")
        log.say(f"warning: {only}")
    return result


def load_pseudo(folder, result, labelled):
    return voc.load_pseudo_masks(folder / "pseudo.json", labelled.class_names)


def pseudo_label(folder, net, paths, threshold, c, run, log):
    """Writes masks/IMAGE.png, index masks with 255 where the teacher is not sure, with c["soft"] also the probabilities beside
    them, and a line per image in part_*.jsonl; images done before are skipped."""
    (rank, ranks, _, _), masks, began = run, Path(folder) / "masks", time.time()
    done = util.rank0_first(lambda: data.finished_images(folder, len(paths)))
    todo = [i for i in range(rank, len(paths), ranks) if not done[i]]
    masks.mkdir(exist_ok=True)
    with open(Path(folder) / f"part_{rank}_of_{ranks}.jsonl", "a", buffering=1) as part:
        for n, (i, found, size) in enumerate(probabilities(net, paths, todo, c, run, recipes.scales(c["scales"]), c["flip"])):
            row = {"i": i, "file": os.fsdecode(bytes(paths[i]))}
            if found is None:
                row["bad"] = size
            else:
                sure, index = decide(found, size)
                index = torch.where(sure >= threshold, index, IGNORE).byte().cpu().numpy()  # (H, W)
                row.update(mask=f"{i:07d}.png", size=index.shape,
                           pixels=np.bincount(index.ravel(), minlength=256)[[*range(len(found)), IGNORE]].tolist())
                if c["soft"]:
                    soft = np.stack([(255 * one).round().byte().cpu().numpy() for one in enlarged(found, size)])  # (K, H, W)
                    runs.write_atomic(masks / f"{i:07d}.npz", lambda path: save_soft(soft, path))
                runs.write_atomic(masks / row["mask"], lambda path: world.save_mask(index, path))
            part.write(json.dumps(row) + "\n")
            if (n + 1) % 200 == 0:
                log.progress("pseudo", n + 1, len(todo), began, 0, images_s=(n + 1) / (time.time() - began))
    if ranks > 1:
        torch.distributed.barrier()


def save_soft(soft, path):
    with open(path, "wb") as f:
        np.savez_compressed(f, soft=soft)


def merge(folder, names, info):
    """The parts as folder/pseudo.json: {"info", "images": [{"file", "mask" (relative to the json), "height", "width"}]}."""
    stats, pixels = {"images": 0, "with_pixels": 0, "bad": 0}, np.zeros(len(names) + 1, dtype=np.int64)

    def write(path):
        with open(path, "w") as f:
            f.write('{"info": ' + json.dumps(info) + ',\n"images": [')
            comma = "\n"
            for row in data.read_parts(folder):
                stats["images"] += 1
                stats["bad"] += "bad" in row
                pixels[:] += row.get("pixels", 0)
                if not sum(row.get("pixels", [0])[:-1]):
                    continue
                stats["with_pixels"] += 1
                f.write(comma + json.dumps({"file": row["file"], "mask": f"masks/{row['mask']}", "height": row["size"][0],
                                            "width": row["size"][1]}))
                comma = ",\n"
            f.write("]}\n")
    runs.write_atomic(Path(folder) / "pseudo.json", write)
    kept = pixels[:-1].sum()
    return {**stats, "kept": float(kept / max(pixels.sum(), 1)),
            "per_class": {k: float(v / max(kept, 1)) for k, v in zip(names, pixels)}}
