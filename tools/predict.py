"""A trained network's answers on a folder of images, for self-training or for use elsewhere.

    python -m tools.predict runs/x/student IMAGES --out labels      a stage's folder, or a step_*.pt
    python -m tools.predict retinanet_resnet50_fpn_coco-eeacb38b.pth IMAGES --out labels

IMAGES: a folder, glob, .txt list or COCO json. The second network is torchvision's detector with
its weights for COCO. OUT is a store of answers, which st.py --pseudo OUT takes. Besides, from
--threshold on: boxes as OUT/pseudo.json (COCO's format with scores), masks as OUT/labels/*.png
(255 under the threshold), classes as OUT/classes.csv. The same command resumes.
"""

import csv
import dataclasses
import os
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import to_tensor

import answers
import augment
import data
import recipes
import st
import util
from tools import shapes
from util import flag, need

# answers: function of images and positions in them; inputs: what the answers depend on
Network = namedtuple("Network", "answers inputs class_names class_ids threshold")


@dataclasses.dataclass
class Plan:
    """what comes out"""

    out: str = flag("", "folder of the answers")
    threshold: float = flag(None, "least score of a label [the checkpoint's; for auto 0.5]")
    tta_free: bool = flag(False, "masks: of one scale and not mirrored, as in evaluation; faster")


# ---- networks ------------------------------------------------------------------------------------


def open_network(path, images, threshold, proc, tta_free=False):
    state = torchvision_state(path)
    if state:
        threshold = 0.5 if threshold is None else threshold
        return torchvision_detector(state, images, threshold, proc)
    net, about = st.restore(path, proc)
    c = recipes.Method(**about["config"])
    if threshold is None:
        threshold = 0.5 if c.threshold == "auto" else float(c.threshold)
    c.threshold = str(threshold)
    how = recipes.answering(c)
    if tta_free and c.task == "seg":
        how = {"scales": (1.0,), "flip": False}
    inputs = {**how, **recipes.labelling_inputs(c, net, images, None, proc.dtype)}
    answers_of = st.TASKS[c.task].answers

    def answer(index):
        return answers_of(net, images, index, c.image_size, proc, **how)

    return Network(answer, inputs, about["class_names"], about["class_ids"], threshold)


def torchvision_state(path):
    """The state dict in torchvision's weights file of a RetinaNet; None for anything else."""
    if not os.path.isfile(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)  # as its training script saves it
    except Exception:  # torch raises many kinds; st.restore says what is wrong
        return None
    return state if any(key.startswith("head.classification_head") for key in state) else None


def torchvision_detector(state, images, threshold, proc):
    """torchvision's network with its own resizing: 800 px, 1333 at most."""
    floor = min(recipes.FLOOR, threshold)
    categories = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    # retinanet_resnet50_fpn(weights=None) would not do: its batch norm has an eps of 1e-5,
    # and with these weights torchvision takes 0. Some channels have variances near 1e-45.
    pyramid = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, **pyramid)
    net = RetinaNet(backbone, len(categories), score_thresh=floor)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]
        raise util.UserError(
            f"not the weights of retinanet_resnet50_fpn on COCO: {reason}"
        ) from None
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    net.eval().to(proc.device)
    ids = [i for i, name in enumerate(categories) if name not in ("__background__", "N/A")]
    label_of = torch.full((len(categories),), -1)
    label_of[ids] = torch.arange(len(ids))

    @torch.no_grad()
    def answer(index):
        for i in index:
            image, target = data.read(images, i)
            if not target["usable"]:
                yield i, None
                continue
            (found,) = net([to_tensor(image).to(proc.device)])
            labels = label_of[found["labels"].cpu()]
            named = labels >= 0
            yield (
                i,
                {
                    "boxes": found["boxes"].cpu()[named].numpy(),
                    "scores": found["scores"].cpu()[named].numpy(),
                    "labels": labels[named].numpy(),
                    "size": target["size"],
                },
            )

    inputs = {"weights": util.digest_weights(net.state_dict()), "floor": floor}
    inputs["images"] = util.digest([images.path(i) for i in range(len(images))])
    return Network(answer, inputs, [categories[i] for i in ids], ids, threshold)


# ---- files for use elsewhere ---------------------------------------------------------------------


def write_labels(out, network):
    """The answers in a store from the threshold on, in the format of their kind -> its path."""
    rows = [row for row in answers.read_answers(out) if "bad" not in row]
    root = os.path.commonpath([os.path.dirname(row["file"]) for row in rows] or ["/"])
    names = [os.path.relpath(row["file"], root) for row in rows]
    if not rows or "boxes" in rows[0]:
        util.write_json(out / "pseudo.json", coco_labels(rows, names, network, root))
        return out / "pseudo.json"
    if "mask" in rows[0]:
        for row, name in zip(rows, names):
            with Image.open(out / "masks" / row["mask"]) as stored:
                mask, sure = np.asarray(stored).transpose(2, 0, 1)
            mask = np.where(sure >= round(200 * network.threshold), mask, augment.IGNORE)
            path = out / "labels" / Path(name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes.save_mask(mask, path)
        return out / "labels"
    with open(out / "classes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class", "score"])
        for row, name in zip(rows, names):
            if row["score"] >= network.threshold:
                table.writerow([name, network.class_names[row["label"]], row["score"]])
    return out / "classes.csv"


def coco_labels(rows, names, network, root):
    """COCO json of all images, those without a label too. Image ids are positions + 1."""
    images = []
    annotations = []
    for row, name in zip(rows, names):
        h, w = row["size"]
        images.append({"id": row["i"] + 1, "file_name": name, "height": h, "width": w})
        for box, label, score in zip(row["boxes"], row["labels"], row["scores"]):
            if score >= network.threshold:
                annotation = {"id": len(annotations) + 1, "image_id": row["i"] + 1}
                annotation["category_id"] = network.class_ids[label]
                annotation.update(bbox=box, area=box[2] * box[3], iscrowd=0, score=score)
                annotations.append(annotation)
    categories = [{"id": k, "name": n} for k, n in zip(network.class_ids, network.class_names)]
    info = {"description": f"labels of a network; file names are relative to {root}"}
    return {
        "info": {**info, "threshold": network.threshold},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    paths = argv[:2]
    if any(path.startswith("-") for path in paths):
        paths = []
    plan, machine = util.parse(__doc__, Plan, util.Machine, argv=argv[len(paths) :])
    need(len(paths) == 2, "give a checkpoint and its images, e.g. runs/x/student IMAGES")
    plan = Plan(**plan)
    out = Path(plan.out)
    need(plan.out, "--out is missing: a folder for the answers")
    least = plan.threshold or 0
    need(0 <= least < 1, f"--threshold {least:g}: give a number from 0 up to and without 1")
    need(not (out / "config.json").exists(), f"{out} is a run of st.py; give another --out")
    proc = util.start(util.Machine(**machine))
    proc.first(lambda: util.claim(out))
    images = data.listed(paths[1], "IMAGES")
    network = open_network(paths[0], images, plan.threshold, proc, plan.tta_free)
    if not proc.first(lambda: util.finished(out, network.inputs)):
        store = answers.Answers(out, images, proc)
        meter = util.Meter(proc.log, out.name, 0, len(store.missing), proc.world)
        for n, (i, answer) in enumerate(network.answers(store.missing), 1):
            store.add(i, answer)
            if n % 200 == 0:
                meter.line(n)
        proc.gather(None)  # wait until all processes are done
        result = {"images": len(images), "classes": network.class_names}
        proc.first(lambda: util.finish(out, network.inputs, result))
    written = proc.first(lambda: write_labels(out, network))
    proc.log.say(f"{len(images)} images; labels of at least {network.threshold:g}: {written}")


if __name__ == "__main__":
    util.run(main)
