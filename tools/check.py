"""What is wrong with a data set, and which of its images count as labelled.

    python -m tools.check PATH [--images DIR]
    python -m tools.check split SOURCE --fraction 0.2 [--seed 0] --out split.json

PATH: a COCO json (--images: where its images are), a COCO or PASCAL VOC folder, a folder with
train/CLASS and val/CLASS, or a folder of images. Every file that training would read is read; exit
code 2 if there are problems. SOURCE: a COCO json, a list of PASCAL VOC (ImageSets/Segmentation/
NAME.txt), or a folder of class folders. st.py --split takes what is written.
"""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import augment
import data
import util
from util import need


def data_sets(path, image_dir):
    """The sets of images at a path, as Images."""
    path = Path(path)
    if path.suffix == ".json":
        return [data.read_coco(path, image_dir or data.folder_beside(path))]
    need(path.is_dir(), f"{path} is neither a .json file nor a folder")
    if (path / "ImageSets/Segmentation").is_dir():
        names = [name for name in ("train", "trainaug", "val") if has_list(path, name)]
        need(names, f"{path}/ImageSets/Segmentation has neither train.txt nor val.txt")
        return [data.voc(path, name) for name in names]
    if (path / "annotations").is_dir() or (path / "train.json").exists():
        return [data.coco(path, "train"), data.coco(path, "val")]
    if (path / "train").is_dir():
        parts = [part for part in ("train", "val", "test") if (path / part).is_dir()]
        train_set = data.folder(path, "train")
        return [train_set] + [data.folder(path, part, train_set) for part in parts[1:]]
    return [data.listed(path, "PATH")]


def has_list(root, name):
    return data.voc_list_file(root, name).exists()


def check(images):
    """Reads all images, and prints what they hold and what is wrong -> number of problems."""
    names = {**dict(enumerate(images.class_names)), augment.IGNORE: "ignored"}
    problems = Counter(images.dropped)
    pixels = np.zeros(256, np.int64)
    with ThreadPoolExecutor() as pool:
        for error, count in pool.map(lambda i: read(images, i), range(len(images))):
            pixels += count
            if error:
                problems["unusable file"] += 1
                print(f"  {error}")
    print(f"{images.source}: {len(images)} images" + boxes_of(images))
    if images.masks is not None:
        shares = [f"{names[k]} {pixels[k] / pixels.sum():.1%}" for k in np.flatnonzero(pixels)]
        print("  pixels: " + ", ".join(shares))
    elif images.boxes is not None or images.image_class is not None:
        labels = images.labels if images.boxes is not None else images.image_class
        count = np.bincount(labels, minlength=len(images.class_names))
        print("  " + ", ".join(f"{name} {n}" for name, n in zip(images.class_names, count)))
    for reason, n in problems.items():
        print(f"  {n} x {reason}")
    return sum(problems.values())


def read(images, i):
    """-> what is wrong with image i or None, how many pixels it has of each class (256,)."""
    try:
        _, target = images.read(i)
    except data.BadImage as error:
        return str(error), np.zeros(256, np.int64)
    return None, np.bincount(target.get("mask", np.zeros(0, int)).ravel(), minlength=256)


def boxes_of(images):
    if images.boxes is None:
        return ""
    empty = int((np.diff(images.start) == 0).sum())
    crowds = int(images.crowd.sum())
    return f" ({empty} without boxes), {len(images.boxes)} boxes ({crowds} of crowds)"


def labelled_set(source):
    """Images of what a label split is made for; their ids and source are as st.py finds them."""
    source = Path(source)
    if source.suffix == ".json":
        return data.read_coco(source, data.folder_beside(source))
    if source.suffix == ".txt":
        root = source.parents[2]
        need(has_list(root, source.stem), f"{source} is no ImageSets/Segmentation/NAME.txt")
        return data.voc_images(root, source.stem)
    need(source.is_dir(), f"{source} is neither a .json nor a .txt file, nor a folder")
    return data.folder(source.parent, source.name)


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("path", nargs="+", metavar="PATH | split SOURCE")
    parser.add_argument("--images", help="folder with the images of a COCO json")
    parser.add_argument("--fraction", type=float, help="of the images that count as labelled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="split.json")
    args = parser.parse_args(argv)
    if args.path[0] == "split" and len(args.path) == 2:
        fits = args.fraction is not None and 0 < args.fraction <= 1
        need(fits, "--fraction must be given, above 0 and up to 1")
        images = labelled_set(args.path[1])
        split = data.make_split(images, args.fraction, args.seed)
        util.write_json(args.out, split)
        print(f"{args.out}: {len(split['labeled'])} of {len(images)} images count as labelled")
        return
    need(len(args.path) == 1, "give one PATH, or: split SOURCE --fraction F --out FILE")
    path = args.path[0]
    problems = sum(check(images) for images in data_sets(path, args.images))
    need(not problems, f"{problems} problems in {path}; training leaves out what is listed above")


if __name__ == "__main__":
    util.run(main)
