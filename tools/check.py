"""What is wrong with a data set, before it is trained on; and label splits.

    python -m tools.check DIR                           whatever st.py --root or --unlabeled takes
    python -m tools.check train.json [--images DIR]     a COCO file
    python -m tools.check split DIR --fraction 0.2 --seed 0 --out split.json [--list train]

Every file that training would read is read. Exit code 2 if something is wrong.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import data
import util
from util import UserError, need


def sets_of(path, image_dir=None):
    """The sets that a path holds: [Images]."""
    root = Path(path)
    data.ensure(root)
    if root.suffix == ".json":
        return [data.read_coco(root, image_dir or data.folder_beside(root))]
    if (root / "ImageSets/Segmentation").is_dir():
        lists = sorted(p.stem for p in (root / "ImageSets/Segmentation").glob("*.txt"))
        labelled = [name for name in lists if name in ("train", "val", "trainval", "trainaug")]
        return [data.voc(root, name) for name in labelled]
    parts = ("train", "val", "test")
    if (root / "train.json").exists() or (root / "annotations").is_dir():
        return [data.coco(root, "train"), data.coco(root, "val")]
    if (root / "train").is_dir() and any(p.is_dir() for p in (root / "train").iterdir()):
        train = data.folder(root, "train")
        return [train, *(data.folder(root, p, train) for p in parts[1:] if (root / p).is_dir())]
    return [data.listed(path, "PATH")]


def check(images):
    """Reads all of a set and prints what is in it -> number of problems."""
    problems = Counter(images.dropped)
    pixels = np.zeros(256, np.int64)
    for i in range(len(images)):
        try:
            _, target = images.read(i)
            if images.masks is not None:
                pixels += np.bincount(target["mask"].ravel(), minlength=256)
        except data.BadImage as error:
            problems["unusable image"] += 1
            print(f"  {error}")
    print(f"{images.source}: {len(images)} images")
    K = len(images.class_names)
    if images.boxes is not None:
        count = np.bincount(images.labels, minlength=K).tolist()
        empty = int((np.diff(images.start) == 0).sum())
        crowds = int(images.crowd.sum())
        print(f"  {len(images.boxes)} boxes ({crowds} crowd), {empty} images without objects")
        print("  " + ", ".join(f"{n} {k}" for n, k in zip(images.class_names, count)))
    if images.masks is not None:
        share = pixels / max(pixels.sum(), 1)
        shares = [f"{name} {share[k]:.1%}" for k, name in enumerate(images.class_names)]
        print("  share of pixels: " + ", ".join([*shares, f"ignored {share[255]:.1%}"]))
    if images.image_class is not None:
        count = np.bincount(images.image_class, minlength=K).tolist()
        print("  " + ", ".join(f"{n} {k}" for n, k in zip(images.class_names, count)))
    for reason, n in problems.items():
        print(f"  {n} x {reason}")
    return problems.total()


def split_of(path, name, fraction, seed):
    """Which of the images of PATH's list `name` count as labelled."""
    root = Path(path)
    if root.suffix == ".json":
        images = data.read_coco(root, data.folder_beside(root))
    elif (root / "ImageSets/Segmentation").is_dir():
        images = data.voc(root, name)
    elif (root / "train.json").exists() or (root / "annotations").is_dir():
        images = data.coco(root, name)
    else:
        images = data.folder(root, name)
    need(0 < fraction <= 1, f"--fraction {fraction}: give a number above 0 and up to 1")
    return data.make_split(images, fraction, seed), len(images)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    if argv[:1] == ["split"]:
        parser.add_argument("path")
        parser.add_argument("--fraction", type=float, required=True)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--list", default="train")
        parser.add_argument("--out", required=True)
        args = parser.parse_args(argv[1:])
        split, n = split_of(args.path, args.list, args.fraction, args.seed)
        util.write_json(args.out, split)
        print(f"{args.out}: {len(split['labeled'])} of {n} images labelled")
        return
    parser.add_argument("path")
    parser.add_argument("--images", help="folder of the images of a COCO file")
    args = parser.parse_args(argv)
    problems = sum(check(images) for images in sets_of(args.path, args.images))
    if problems:
        raise UserError(f"{problems} problems in {args.path}; training leaves out what is listed")


if __name__ == "__main__":
    util.run(main)
