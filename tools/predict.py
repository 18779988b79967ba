"""Labels images with a trained network.

    python -m tools.predict runs/x/student IMAGES --out labels [--threshold 0.4]

IMAGES: a folder, glob, .txt list or COCO json. labels/ becomes a store of all answers, which
st.py --pseudo takes, and what is over the threshold in a common format: pseudo.json (COCO, with
scores), masks/ as index PNGs in labels/, or classes.csv. The same command resumes.

The network may also be torchvision's COCO detector, retinanet_resnet50_fpn_coco-eeacb38b.pth, at
torchvision's own resolution: a ready teacher for 80 classes.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, retinanet_resnet50_fpn

import answers
import augment
import backbones
import data
import recipes
import st
import util
from tools.shapes import save_mask
from util import need

# ---- torchvision's detector ----------------------------------------------------------------------


def coco_detector(path, floor):
    """torchvision's retinanet_resnet50_fpn with the weights in a file, None if it holds others."""
    if not Path(path).is_file():
        return None
    try:
        state = backbones.read_file(str(path))
    except ValueError as error:
        raise util.UserError(str(error)) from None
    state = state.get("model", state)
    if not any(k.startswith("head.classification_head") for k in state):
        return None
    net = retinanet_resnet50_fpn(weights=None, weights_backbone=None, score_thresh=floor)
    try:
        net.load_state_dict(state)
    except RuntimeError:
        raise util.UserError(f"{path} is not torchvision's retinanet_resnet50_fpn") from None
    return net.eval()


def coco_classes():
    """The 80 categories that have a name: {COCO's id: name}."""
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")}


@torch.no_grad()
def coco_boxes(net, images, index, proc):
    """As answers.boxes, each image by itself."""
    position = {i: k for k, i in enumerate(coco_classes())}
    for i in index:
        image, target = data.read(images, i)
        if not target["usable"]:
            yield i, None
            continue
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        found = {k: v.cpu() for k, v in net([pixels.to(proc.device)])[0].items()}
        named = [k for k, label in enumerate(found["labels"].tolist()) if label in position]
        labels = [position[label] for label in found["labels"][named].tolist()]
        yield (
            i,
            {
                "boxes": found["boxes"][named].numpy(),
                "scores": found["scores"][named].numpy(),
                "labels": np.array(labels, dtype=np.int64),
                "size": (image.height, image.width),
            },
        )


# ---- common formats ------------------------------------------------------------------------------


def write_coco(out, threshold, class_ids, class_names):
    """pseudo.json: every image, and the boxes over the threshold with their scores."""
    images = []
    boxes = []
    for row in answers.read_answers(out):
        if "bad" in row:
            continue
        height, width = row["size"]
        name = {"id": row["i"] + 1, "file_name": Path(row["file"]).name}
        images.append({**name, "path": row["file"], "height": height, "width": width})
        for xywh, k, score in zip(row["boxes"], row["labels"], row["scores"]):
            if score >= threshold:
                box = {"id": len(boxes) + 1, "image_id": row["i"] + 1, "bbox": xywh, "iscrowd": 0}
                area = round(xywh[2] * xywh[3], 2)
                boxes.append({**box, "category_id": class_ids[k], "area": area, "score": score})
    categories = [{"id": i, "name": name} for i, name in zip(class_ids, class_names)]
    value = {"images": images, "annotations": boxes, "categories": categories}
    util.write_json(out / "pseudo.json", value)
    return out / "pseudo.json", f"{len(boxes)} boxes on {len(images)} images"


def write_masks(out, threshold, classes):
    """labels/NAME.png: index masks with VOC's palette, 255 where the network is not sure."""
    (out / "labels").mkdir(exist_ok=True)
    count = 0
    for row in answers.read_answers(out):
        if "mask" in row:
            mask = data.read_mask(out / "masks" / row["mask"], len(classes), threshold)
            path = out / "labels" / row["mask"]
            util.write_atomic(path, lambda p, mask=mask: save_mask(mask.astype(np.uint8), p))
            count += 1
    return out / "labels", f"{count} masks; {augment.IGNORE}: under the threshold"


def write_classes(out, threshold, classes):
    """classes.csv: image, class, probability; the class is empty under the threshold."""
    rows = []
    for row in answers.read_answers(out):
        if "label" in row:
            name = classes[row["label"]] if row["score"] >= threshold else ""
            rows.append((row["file"], name, row["score"]))

    def write(path):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "class", "probability"), *rows])

    util.write_atomic(out / "classes.csv", write)
    named = sum(name != "" for _, name, _ in rows)
    return out / "classes.csv", f"{named} of {len(rows)} images have a class"


# ---- the command ---------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    parser.add_argument("network", help="stage folder, checkpoint, or torchvision's weights")
    parser.add_argument("images", help="folder, glob, .txt list or COCO json")
    parser.add_argument("--out", required=True, help="folder of the answers")
    parser.add_argument("--threshold", type=float, default=0.5, help="[0.5; 0.3 for classes]")
    args = parser.parse_args(argv)
    need(0 <= args.threshold < 1, f"--threshold {args.threshold}: give a number from 0 to below 1")
    proc = util.start(util.Machine())
    out = Path(args.out)
    images = data.listed(args.images, "IMAGES")
    floor = min(recipes.FLOOR, args.threshold)
    net = coco_detector(args.network, floor)
    if net:
        class_ids, class_names = list(coco_classes()), list(coco_classes().values())
        task = "det"
        answering = coco_boxes
        how = {"floor": floor}
        net = net.to(proc.device)
        size = 0
    else:
        net, about = st.restore(args.network, proc)
        class_ids, class_names = about["class_ids"], about["class_names"]
        c = recipes.Method(**about["config"])
        c.threshold = str(args.threshold)
        task, size = c.task, c.image_size
        how = recipes.answering(c)
        if task == "seg":
            how = {}  # one scale, as in evaluation

        def answering(net, images, index, proc):
            return st.TASKS[task].answers(net, images, index, size, proc, **how)

    inputs = {"weights": util.digest_weights(net.state_dict()), "images": images.digest()}
    inputs |= {"names": class_names, "size": size, **how}
    proc.first(lambda: util.claim(out))
    if not proc.first(lambda: util.finished(out, inputs)):
        store = answers.Answers(out, images, proc)
        meter = util.Meter(proc.log, "answers", 0, len(store.missing), proc.world)
        for n, (i, answer) in enumerate(answering(net, images, store.missing, proc), 1):
            store.add(i, answer)
            if n % 200 == 0:
                meter.line(n)
        proc.gather(None)  # wait until all processes are done
        result = {"images": len(images), "classes": class_names}
        proc.first(lambda: util.finish(out, inputs, result))
    if proc.rank == 0:
        if task == "seg":
            path, what = write_masks(out, args.threshold, class_names)
        elif task == "cls":
            path, what = write_classes(out, args.threshold, class_names)
        else:
            path, what = write_coco(out, args.threshold, class_ids, class_names)
        print(f"{path}: {what}, at threshold {args.threshold:g}", file=sys.stdout)


if __name__ == "__main__":
    util.run(main)
