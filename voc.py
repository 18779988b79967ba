"""PASCAL VOC's files: an index mask per image, lists of images, class names. What data.py is for COCO, in its target dict.

    python voc.py DIR [--masks SegmentationClass3] [--lists train val]     what is wrong with such a folder
"""
import argparse
import hashlib
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

import augment
import data
from util import UserError, run


@dataclass
class Masks:
    """Images with a class index per pixel, as paths in flat arrays."""
    root: str               # folder that every path is relative to
    files: np.ndarray       # (n,) bytes
    masks: np.ndarray       # (n,) bytes
    ids: np.ndarray         # (n,) str
    rows: np.ndarray        # (n,) int64, position in the sorted list: the number an image is reported by
    class_ids: list         # 0..K-1
    class_names: list
    annotation_file: str    # the list
    dropped = {}            # nothing is left out at load
    soft: bool = False      # whether next to a mask MASK.png lie probabilities in MASK.npz, "soft" (K, H, W) uint8

    def __len__(self):
        return len(self.ids)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def mask_path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.masks[i])))

    def read(self, i):
        """(image, target with "mask"); data.BadImage if either file cannot be used, or they differ in size."""
        mask = read_mask(self.mask_path(i), len(self.class_names))
        soft = {"soft": read_soft(Path(self.mask_path(i)).with_suffix(".npz"), mask.shape)} if self.soft else {}
        return data.read_image(self.path(i), mask.shape), {
            **data.nothing(int(self.rows[i])), "size": mask.shape, "mask": mask, **soft}

    def subset(self, index):
        index = np.asarray(index, dtype=np.int64)
        return replace(self, files=self.files[index], masks=self.masks[index], ids=self.ids[index], rows=self.rows[index])

    def digest(self):
        """Of what the masks hold and mean."""
        masks = hashlib.sha256()
        for i in range(len(self)):
            masks.update(Path(self.mask_path(i)).read_bytes())
        return hashlib.sha256(repr((self.class_names, masks.hexdigest())).encode()).hexdigest()[:16]


IMAGES = (".jpg", ".png", ".jpeg")
VOC_CLASSES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]


def load_voc(root, name, mask_folder="SegmentationClass"):
    """The images that ImageSets/Segmentation/NAME.txt of a PASCAL VOC folder lists, as Masks.

    Masks are MASK_FOLDER/ID.png, or for training where SegmentationClass lacks one SegmentationClassAug/ID.png (the SBD masks of
    `aug`, as usually distributed). Class names are the lines of classes.txt (of classes3.txt for SegmentationClass3, and so on),
    VOC's 21 without such a file. UserError for missing lists, images and masks.
    """
    root, ids = Path(root), listed(root, name)
    files = found(root, ids, ["JPEGImages"], IMAGES)
    aug = ["SegmentationClassAug"] if mask_folder == "SegmentationClass" and name != "val" else []
    masks = found(root, ids, [mask_folder, *aug], [".png"])
    names = root / f"classes{mask_folder.removeprefix('SegmentationClass')}.txt"
    classes = [line.strip() for line in names.read_text().splitlines() if line.strip()] if names.exists() else VOC_CLASSES
    if len(set(classes)) < len(classes) or not 2 <= len(classes) <= 255:
        raise UserError(f"{names} must name 2 to 255 different classes, the background first")
    return Masks(str(root), files, masks, np.array(ids), np.arange(len(ids)), list(range(len(classes))), classes,
                 str(list_file(root, name)))


def list_file(root, name):
    return Path(root) / f"ImageSets/Segmentation/{name}.txt"


def listed(root, name):
    """The image names in ImageSets/Segmentation/NAME.txt, sorted."""
    path = list_file(root, name)
    if not path.exists():
        raise UserError(f"no list at {path}; --root must be a PASCAL VOC folder with JPEGImages/, SegmentationClass/ and "
                        "ImageSets/Segmentation/")
    ids = sorted({line.strip() for line in path.read_text().splitlines() if line.strip()})
    odd = [i for i in ids if "\t" in i or " /" in i or i.endswith((".jpg", ".png"))]
    if odd:
        raise UserError(f"{path} has the line '{odd[0][:60]}'; give one image name a line, without folder and suffix")
    if not ids:
        raise UserError(f"{path} is empty; nothing can be trained or scored with it")
    data.stay_inside(ids, path, root)
    return ids


def found(root, ids, folders, suffixes):
    """The first file FOLDER/ID+SUFFIX that exists for each id, as (n,) bytes relative to root. UserError if one has none."""
    names = ([f"{folder}/{i}{suffix}" for folder in folders for suffix in suffixes] for i in ids)
    files = [next((f for f in some if (Path(root) / f).exists()), None) for some in names]
    missing = [f"{folders[0]}/{i}{suffixes[0]}" for i, f in zip(ids, files) if f is None]
    if missing:
        raise UserError(f"{len(missing)} of {len(ids)} listed files do not exist in {root}, first {missing[0]}; add them, or "
                        "take their lines out of the list")
    return np.array([os.fsencode(f) for f in files], dtype=np.bytes_)


def images_of(root, name):
    """Absolute paths (n,) of the images that a list names; they need no masks."""
    return np.array([os.fsencode(os.path.abspath(root)) + b"/" + bytes(f)
                     for f in found(root, listed(root, name), ["JPEGImages"], IMAGES)], dtype=np.bytes_)


def load_pseudo_masks(path, class_names):
    """pseudo.json of segment.py as Masks."""
    found = data.read_json(path, "list of pseudo-labels", ["images"])
    rows, soft = found["images"], found.get("info", {}).get("soft", False)
    folder = os.path.dirname(os.path.abspath(path))
    files = [os.fsencode(os.path.abspath(row["file"])) for row in rows]
    return Masks(folder, np.array(files, dtype=np.bytes_), np.array([os.fsencode(row["mask"]) for row in rows], dtype=np.bytes_),
                 np.arange(len(rows)).astype(str), np.arange(len(rows)), list(range(len(class_names))), list(class_names),
                 str(path), soft)


def read_mask(path, classes, size=None):
    """(H, W) uint8 class indices, 255 = ignore. data.BadImage unless it is an 8-bit palette or greyscale file of that size (h, w)
    with indices under `classes`."""
    try:
        with Image.open(path) as image:
            image.load()
            mode, mask = image.mode, np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise data.BadImage(f"{path}: {str(error) or type(error).__name__}")
    if mode not in ("P", "L"):
        raise data.BadImage(f"{path}: is a {mode} image; a mask holds class indices, as a palette or 8-bit greyscale PNG")
    if size is not None and mask.shape != tuple(size):
        raise data.BadImage(f"{path}: is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}")
    wrong = mask[(mask >= classes) & (mask != augment.IGNORE)]
    if wrong.size:
        raise data.BadImage(f"{path}: holds class {wrong.max()}, but there are only {classes} (0 to {classes - 1}; 255: ignore)")
    return mask


def read_soft(path, size):
    """(K, H, W) uint8 probabilities of a soft label; data.BadImage unless it is a file of segment.save_soft of that size."""
    try:
        with np.load(path) as file:
            soft = file["soft"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise data.BadImage(f"{path}: {str(error) or type(error).__name__}")
    if soft.shape[1:] != size:
        raise data.BadImage(f"{path}: is of another size than its mask")
    return soft


# ---- command line ------------------------------------------------------------------------------------------------

def check(root, mask_folder, lists):
    """Reads every image and mask of the lists and prints what is wrong. Returns the number of problems."""
    problems = 0
    for name in lists:
        part, pixels = load_voc(root, name, mask_folder), Counter()
        for i in range(len(part)):
            try:
                for k, n in zip(*np.unique(part.read(i)[1]["mask"], return_counts=True)):
                    pixels[int(k)] += int(n)
            except data.BadImage as error:
                problems += 1
                print(f"  {error}")
        names = dict(enumerate(part.class_names)) | {augment.IGNORE: "ignored"}
        print(f"{part.annotation_file}: {len(part)} images; share of pixels: " + ", ".join(
            f"{names[k]} {n / pixels.total():.1%}" for k, n in sorted(pixels.items())))
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    parser.add_argument("root")
    parser.add_argument("--masks", default="SegmentationClass")
    parser.add_argument("--lists", nargs="+", default=["train", "val"])
    args = parser.parse_args()
    if problems := check(args.root, args.masks, args.lists):
        raise UserError(f"{problems} unusable images or masks in {args.root}; training replaces what is listed above")


if __name__ == "__main__":
    run(main)
