"""Data: COCO files, PASCAL VOC folders, class folders and lists of images, as one class Images;
label splits, and batches that do not depend on who loads them.

The target dict, everywhere in this project (in numpy; collate makes tensors of what is trained on):
    boxes  float32 (N, 4)  xyxy in pixels             labels  int64 (N,)  0..K-1, remapped at load
    scores float32 (N,)    1 for human labels         crowd   bool (N,)   COCO's iscrowd
    mask   uint8 (H, W)    class of every pixel, 255 = ignore (segmentation)
    image_class  int       class of the image as a whole, -1 for none (classification)
    image_id, size (h, w)                             N = 0 is an ordinary image
"""

import filecmp
import functools
import glob
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import augment
import ops
from util import UserError, need

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VOC_SUFFIXES = (".jpg", ".png", ".jpeg")
# fmt: off
VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]
# fmt: on
PARTS = ("human", "pseudo", "classified")  # of a step: who labelled; for joint training classes
HOLD_OUT = 10  # every 10th labelled image may be held out to choose the threshold by
EVAL_BATCH = 16  # the same everywhere: the arithmetic of a batch may depend on its size


class BadImage(Exception):
    """An image file that cannot be used; the message holds the path and the reason."""


@dataclass
class Images:
    """A data set: image files, and what is known of them. Flat arrays, so that worker processes
    share the memory instead of copying it object by object."""

    root: str  # folder that every file name is relative to
    files: np.ndarray  # (n,) bytes
    ids: np.ndarray  # (n,) int64 or str, what a label split names an image by
    source: str  # the annotation file, list or folder it was read from
    class_names: list = field(default_factory=list)
    class_ids: list = field(default_factory=list)  # class k is category class_ids[k] of the file
    # detection: the boxes of image i are rows start[i]:start[i+1]
    sizes: np.ndarray = None  # (n, 2) int32 height, width
    start: np.ndarray = None  # (n + 1,) int64
    boxes: np.ndarray = None  # (total, 4) float32 xyxy
    labels: np.ndarray = None  # (total,) int64
    scores: np.ndarray = None  # (total,) float32
    crowd: np.ndarray = None  # (total,) bool
    outlines: np.ndarray = None  # objects' segmentations, for Mask R-CNN, see ops.pack_outlines
    places: np.ndarray = None  # (total, 2) where each is in it
    # segmentation
    masks: np.ndarray = None  # (n,) bytes, files of class indices
    certainty: float = None  # of a network's masks: below it a pixel is ignored
    # classification
    image_class: np.ndarray = None  # (n,) int64, or (n, K) 0 and 1 of several classes an image
    dropped: dict = field(default_factory=dict)  # reason -> number of boxes left out at load

    def __len__(self):
        return len(self.files)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def mask_path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.masks[i])))

    def target(self, i):
        """What is known of image i without opening a file."""
        target = nothing(self.ids[i].item())
        if self.boxes is not None:
            rows = slice(self.start[i], self.start[i + 1])
            for name in ("boxes", "labels", "scores", "crowd"):
                target[name] = getattr(self, name)[rows]
            target["size"] = tuple(self.sizes[i].tolist())
        if self.image_class is not None:
            target["image_class"] = self.image_class[i].tolist()
        return target

    def read(self, i):
        """(PIL image, target). BadImage if a file cannot be used or contradicts another."""
        target = self.target(i)
        if self.outlines is not None:
            rows = slice(self.start[i], self.start[i + 1])
            places = self.places[rows]
            target["mask"] = ops.draw_outlines(
                self.outlines, places, target["crowd"], target["size"]
            )
            target["number"] = ops.FIRST_OBJECT + np.arange(len(places))
        if self.masks is not None:
            target["mask"] = self.read_mask(i)
            target["size"] = target["mask"].shape
        image = read_image(self.path(i), target.get("size"))
        target["size"] = (image.height, image.width)
        return image, target

    def read_mask(self, i):
        return read_mask(self.mask_path(i), len(self.class_names), self.certainty)

    def subset(self, index):
        """The images at the positions `index`, in that order."""
        index = np.asarray(index, dtype=np.int64)
        parts = {}
        for name in ("files", "ids", "sizes", "masks", "image_class"):
            if getattr(self, name) is not None:
                parts[name] = getattr(self, name)[index]
        if self.boxes is not None:
            count = np.diff(self.start)[index]
            start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
            rows = np.arange(start[-1]) + np.repeat(self.start[index] - start[:-1], count)
            parts["start"] = start
            for name in ("boxes", "labels", "scores", "crowd", "places"):
                if getattr(self, name) is not None:
                    parts[name] = getattr(self, name)[rows]
        return replace(self, **parts)

    def without_labels(self):
        return Images(self.root, self.files, self.ids, self.source)

    def digest(self):
        """A short hash of the names of these images, of all that is known of them, and of what
        their masks hold; not of their pixels."""
        content = hashlib.sha256(repr((self.class_names, self.certainty)).encode())
        names = ("files", "sizes", "start", "boxes", "labels", "scores", "crowd", "outlines")
        for name in (*names, "places", "image_class"):
            if getattr(self, name) is not None:
                content.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        if self.masks is not None:
            for i in range(len(self)):
                content.update(Path(self.mask_path(i)).read_bytes())
        return content.hexdigest()[:16]


def nothing(image_id):
    """The target of an image of which nothing is known."""
    return {
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "scores": np.zeros(0, np.float32),
        "crowd": np.zeros(0, bool),
        "image_id": image_id,
    }


# ---- COCO ----------------------------------------------------------------------------------------


def coco(root, part, like=None, instances=False):
    """Images with boxes, of ROOT/annotations/instances_{train,val}2017.json and train2017/ (the
    official layout) or ROOT/{train,val}.json and images/. part: train | val. like: a set whose
    categories it must have. instances: also the objects' segmentations."""
    ensure(root)
    official = Path(root, f"annotations/instances_{part}2017.json")
    if official.exists():
        return read_coco(official, Path(root, f"{part}2017"), like, instances)
    simple = Path(root, f"{part}.json")
    need(
        simple.exists(),
        f"no data set at {root}: expected annotations/instances_{part}2017.json + {part}2017/, or "
        f"{part}.json + images/; check --root",
    )
    return read_coco(simple, Path(root, "images"), like, instances)


def read_coco(path, image_dir, like=None, instances=False):
    """A COCO detection json as Images. Boxes without area, outside of their image, or of unknown
    category or image are dropped and counted; those reaching over the border are clipped."""
    value = read_json(path, "annotation file")
    try:
        return parse_coco(value, path, image_dir, like, instances)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a COCO annotation file: an image, annotation or category lacks a field "
            f"or has one of the wrong kind ({type(error).__name__}: {error}); see COCO's format"
        ) from None


def parse_coco(value, path, image_dir, like, instances):
    categories = sorted(value["categories"], key=lambda c: c["id"])
    class_ids = [c["id"] for c in categories]
    class_names = [c.get("name", str(c["id"])) for c in categories]
    unique = len(set(class_ids)) == len(class_ids)
    need(unique and class_ids, f"{path} has no category, or two of the same id; mend 'categories'")
    if like is not None:
        same = (like.class_ids, like.class_names) == (class_ids, class_names)
        need(same, f"{path} has other categories than {like.source}: " + CLASSES_DIFFER)

    records = sorted(value["images"], key=lambda im: im["id"])
    ids = np.array([im["id"] for im in records], dtype=np.int64)
    need(len(ids), f"{path} lists no image; nothing can be trained or scored with it")
    need(len(np.unique(ids)) == len(ids), f"{path} gives an image id twice; ids must be unique")
    files = [im["file_name"] for im in records]
    stay_inside(files, path)
    sizes = np.array([[im["height"], im["width"]] for im in records], np.int32).reshape(-1, 2)

    rows = value["annotations"]
    nowhere = [np.nan] * 4
    xywh = [a["bbox"] if is_box(a["bbox"]) else nowhere for a in rows]
    image, image_known = look_up(ids, [a["image_id"] for a in rows])
    label, label_known = look_up(np.array(class_ids), [a["category_id"] for a in rows])
    reasons = {"unknown image id": ~image_known, "unknown category id": ~label_known}
    boxes, broken = corners(np.array(xywh, np.float64).reshape(-1, 4), sizes[image])
    keep, dropped = count_dropped(reasons | broken)
    order = np.flatnonzero(keep)[np.argsort(image[keep], kind="stable")]  # grouped by image

    outlines = places = None
    if instances:
        outlined = [rows[k].get("segmentation") for k in order]
        need(any(s not in (None, [], [[]]) for s in outlined), f"{path} has no segmentation, {ASK}")
        outlines, places = ops.pack_outlines(outlined, sizes[image[order]].tolist())
    count = np.bincount(image[order], minlength=len(ids))
    return Images(
        str(image_dir),
        as_bytes(files),
        ids,
        str(path),
        class_names,
        class_ids,
        sizes=sizes,
        start=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        boxes=boxes[order].astype(np.float32),
        labels=label[order],
        scores=np.array([a.get("score", 1.0) for a in rows], dtype=np.float32)[order],
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in rows], dtype=bool)[order],
        outlines=outlines,
        places=places,
        dropped=dropped,
    )


CLASSES_DIFFER = "use files that belong together"
ASK = "which a recipe with masks learns from; take one without"


def is_box(bbox):
    """Four finite numbers: some exports write [] or null."""
    return len(bbox or ()) == 4 and bool(np.isfinite(np.array(bbox, np.float64)).all())


def corners(xywh, sizes):
    """xywh (n, 4) float64 in images of `sizes` (n, 2) -> clipped xyxy, {reason: those unusable}."""
    limit = sizes[:, ::-1]  # w, h
    low = np.clip(xywh[:, :2], 0, limit)
    high = np.clip(xywh[:, :2] + xywh[:, 2:], 0, limit)
    broken = {
        "not four finite numbers": ~np.isfinite(xywh).all(1),
        "no area": (xywh[:, 2:] <= 0).any(1),
        "outside the image": (high - low <= 0).any(1),
    }
    return np.concatenate([low, high], 1), broken


def count_dropped(reasons):
    """{reason: (n,) bool} -> those to keep (n,), {first reason that holds: how many}."""
    keep = ~np.zeros_like(next(iter(reasons.values())))
    dropped = {}
    for reason, broken in reasons.items():
        if (broken & keep).any():
            dropped[reason] = int((broken & keep).sum())
        keep &= ~broken
    return keep, dropped


def look_up(table, values):
    """Position of each value in the sorted table (n,), and whether it is there (n,)."""
    values = np.array(values, dtype=np.int64)
    at = np.searchsorted(table, values).clip(0, len(table) - 1)
    return at, table[at] == values


def read_json(path, what, keys=("images", "annotations", "categories")):
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}; give another path") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as json ({error}); mend the {what}") from None
    for key in keys:
        fits = isinstance(value, dict) and isinstance(value.get(key), list)
        need(fits, f"{path} is no {what} of COCO: it has no list '{key}'; see COCO's format")
    return value


def as_bytes(names):
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def stay_inside(names, path):
    for name in names:
        inside = not os.path.isabs(name) and ".." not in Path(name).parts
        need(inside, f"{path} has the file name '{name}', which leaves its folder; mend it")


# ---- PASCAL VOC ----------------------------------------------------------------------------------


def voc(root, part, like=None):
    """Images with a class index per pixel: those that ROOT/ImageSets/Segmentation/PART.txt lists.

    Masks are SegmentationClass/ID.png or, but for val, SegmentationClassAug/ID.png (the SBD masks
    of `aug`, as usually distributed). Classes: the lines of classes.txt, else VOC's 21."""
    ensure(root)
    names = voc_list(root, part)
    folders = ["SegmentationClass"]
    if part != "val":
        folders.append("SegmentationClassAug")
    classes = VOC_CLASSES
    file = Path(root, "classes.txt")
    if file.exists():
        classes = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        fits = 2 <= len(set(classes)) == len(classes) <= 255
        need(fits, f"{file} must name 2 to 255 different classes, the background first")
    if like is not None:
        need(like.class_names == classes, f"{file} names other classes than {like.source}")
    return Images(
        str(root),
        as_bytes(voc_files(root, names, ["JPEGImages"], VOC_SUFFIXES)),
        np.array(names),
        str(voc_list_file(root, part)),
        classes,
        list(range(len(classes))),
        masks=as_bytes(voc_files(root, names, folders, [".png"])),
    )


def voc_images(root, part):
    """The images of a list, of which no masks need to exist."""
    names = voc_list(root, part)
    files = as_bytes(voc_files(root, names, ["JPEGImages"], VOC_SUFFIXES))
    return Images(str(root), files, np.array(names), str(voc_list_file(root, part)))


def voc_list_file(root, part):
    return Path(root, f"ImageSets/Segmentation/{part}.txt")


def voc_list(root, part):
    path = voc_list_file(root, part)
    need(
        path.exists(),
        f"no list at {path}; --root must be a PASCAL VOC folder with JPEGImages/, "
        "SegmentationClass/ and ImageSets/Segmentation/",
    )
    names = sorted({line.strip() for line in path.read_text().splitlines() if line.strip()})
    need(names, f"{path} is empty; nothing can be trained or scored with it")
    for name in names:
        plain = "\t" not in name and " /" not in name and not name.endswith((".jpg", ".png"))
        need(plain, f"{path} has the line '{name[:60]}'; give a name a line, without its suffix")
    stay_inside(names, path)
    return names


def voc_files(root, names, folders, suffixes):
    """The first FOLDER/NAME+SUFFIX that exists for each name."""
    files = []
    for name in names:
        places = [f"{folder}/{name}{suffix}" for folder in folders for suffix in suffixes]
        there = [place for place in places if Path(root, place).exists()]
        need(there, f"{root}/{places[0]} does not exist, but a list names it; add it, or mend that")
        files.append(there[0])
    return files


def read_mask(path, classes, certainty=None):
    """(H, W) uint8 class indices, 255 = ignore. BadImage unless it is an 8-bit palette or grey
    file with indices below `classes`. certainty: of a network's masks, whose second band is
    floor(200 p): pixels below it become 255."""
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            mask = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from None
    if mode == "LA" and certainty is not None:
        mask = np.where(mask[..., 1] >= round(200 * certainty), mask[..., 0], augment.IGNORE)
    elif mode not in ("P", "L"):
        raise BadImage(f"{path}: is a {mode} image; a mask is a palette or 8-bit grey PNG")
    wrong = mask[(mask >= classes) & (mask != augment.IGNORE)]
    if wrong.size:
        raise BadImage(f"{path}: holds class {wrong.max()}, but there are {classes} (255: ignore)")
    return mask


# ---- class folders -------------------------------------------------------------------------------


def folder(root, part, like=None):
    """Images with a class each: ROOT/PART/CLASS/*.jpg. In train every class must have one."""
    ensure(root)
    place = os.path.join(root, part)
    sentence = f"no folder {place}; there must be train/CLASS/*.jpg and val/CLASS/*.jpg"
    need(os.path.isdir(place), sentence)
    names = sorted(d.name for d in os.scandir(place) if d.is_dir() and d.name[0] != ".")
    if like is None:
        need(len(names) >= 2, f"{place} holds {len(names)} class folders; give it two or more")
    else:
        different = sorted(set(names) ^ set(like.class_names))
        need(
            not different,
            f"{place} has other classes than {like.source} (only in one: {different[:5]}); give "
            "both the same class folders, empty ones if need be",
        )
    files = images_below(place)
    for file in files:
        need("/" in file, f"{place}/{file} lies outside of the class folders; move it into one")
    number = {name: k for k, name in enumerate(names)}
    image_class = np.array([number[file.partition("/")[0]] for file in files], dtype=np.int64)
    need(len(files), f"{place} holds no image")
    if part == "train":
        for k, count in enumerate(np.bincount(image_class, minlength=len(names))):
            need(count, f"{place}/{names[k]} holds no image; add some, or remove that class")
    ids = np.arange(len(files))  # positions; the split stores the names' hash
    classes = list(range(len(names)))
    return Images(place, as_bytes(files), ids, place, names, classes, image_class=image_class)


def images_below(place):
    """Paths of the image files in a folder and those below it, relative to it, sorted; hidden ones
    are passed over."""
    paths = []
    for here, folders, files in os.walk(place, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "."]
        for file in files:
            if file[0] != "." and os.path.splitext(file)[1].lower() in SUFFIXES:
                paths.append(os.path.relpath(os.path.join(here, file), place))
    return sorted(paths)


# ---- images --------------------------------------------------------------------------------------


def ensure(path):
    """Draws a part of the embedded world when its folder, .../shapes/PART, is asked for and is not
    there: so that the first command works on a fresh clone. (The one import of tools.)"""
    for place in (Path(path), *Path(path).parents):
        if place.parent.name == "shapes" and not place.exists():
            from tools import shapes

            if place.name in shapes.PARTS:
                try:
                    shapes.build(place.parent, place.name)
                except OSError as error:
                    raise UserError(f"cannot draw the embedded world in {place}: {error}") from None


def listed(source, name="--unlabeled"):
    """Images without labels: a folder (and those below it), a glob, a .txt list or a COCO json."""
    path = Path(source)
    ensure(path)
    if path.is_dir():
        paths = [path / file for file in images_below(path)]
    elif path.suffix == ".json":
        place = folder_beside(path)
        records = read_json(path, f"image list for {name}", ["images"])["images"]
        names = [im["file_name"] for im in records if "file_name" in im]
        stay_inside(names, path)
        paths = [place / file for file in names]
    elif path.suffix == ".txt" and path.exists():
        lines = path.read_text().splitlines()
        paths = [path.parent / line.strip() for line in lines if line.strip()]
    else:
        paths = glob.glob(str(source), recursive=True)
    images = {os.path.abspath(p) for p in paths if Path(p).suffix.lower() in SUFFIXES}
    there = any(map(os.path.exists, images))
    need(there, f"no image at {name} {source}; give a folder, a glob, a .txt list or a COCO json")
    return of_paths(sorted(images), source)


def of_paths(paths, source):
    """Images of which nothing is known but where they are."""
    return Images("", as_bytes(paths), np.arange(len(paths)), str(source))


def folder_beside(path):
    """Where the images of an annotation file lie: images/, for instances_train2017.json
    train2017/ beside its folder, or here."""
    path = Path(path)
    places = path.parent / "images", path.parent.parent / path.stem.rpartition("_")[2]
    return next((place for place in places if place.is_dir()), path.parent)


def read_image(path, size=None):
    """The file as an RGB image. size: (h, w) that its annotations speak of; another size is a
    BadImage, since boxes would be wrong. EXIF rotation is applied unless that contradicts size."""
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            if size is None or turned.size == (size[1], size[0]):
                image = turned
            if image.mode.startswith("I") or image.mode == "F":  # convert() would clip at 255
                values = np.asarray(image).astype(np.float64)
                white = 65535.0 if values.max(initial=0) > 255 else 255.0
                image = Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")  # grey, palette, alpha and CMYK files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from None
    if size is not None and image.size != (size[1], size[0]):
        is_size = f"{image.size[0]}x{image.size[1]}"
        raise BadImage(f"{path}: is {is_size}, its annotations say {size[1]}x{size[0]}")
    return image


_unusable = {}  # of each set paths of files that could not be used, in this process


def read(images, i):
    """images.read(i); of a file that cannot be used a grey stand-in without labels, "usable"
    False. It is named once. UserError when that are more than 1% of a set, and more than 20."""
    try:
        image, target = images.read(i)
        return image, {**target, "usable": True}
    except BadImage as error:
        path = images.path(i)
        known = _unusable.setdefault((images.source, len(images)), set())
        if path not in known:
            known.add(path)
            print(f"warning: without its labels: {error}", file=sys.stderr, flush=True)
        few = len(known) <= max(20, len(images) // 100) and len(known) < len(images)
        need(
            few,
            f"{len(known)} of {len(images)} images are unusable, the last {error}; run "
            "python -m tools.check on the data",
        )
    image = Image.new("RGB", (32, 32), augment.FILL)
    target = {**nothing(images.ids[i].item()), "size": (32, 32), "usable": False}
    if images.masks is not None:
        target["mask"] = np.full((32, 32), augment.IGNORE, np.uint8)
    if images.outlines is not None:
        target["mask"] = np.zeros((32, 32), np.int32)
        target["number"] = np.zeros(0, np.int64)
    if images.image_class is not None:
        target["image_class"] = np.full_like(images.image_class[i], -1).tolist()
    return image, target


# ---- splits --------------------------------------------------------------------------------------


def file_digest(path):
    """sha256 of a file, or of the names of the images below a folder, which say its classes."""
    if os.path.isdir(path):
        return hashlib.sha256(os.fsencode("\n".join(images_below(path)))).hexdigest()
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def make_split(images, fraction, seed):
    """Which images count as labelled, as a dict for json. Nested: 20% lie within the 50% of the
    same seed. Ids, not positions, so that it survives another order."""
    order = np.random.default_rng(seed).permutation(np.sort(images.ids))
    count = max(1, round(fraction * len(order)))
    return {
        "annotations_sha256": file_digest(images.source),
        "fraction": fraction,
        "seed": seed,
        "labeled": order[:count].tolist(),
        "rest": order[count:].tolist(),
    }


def read_split(path, images):
    try:
        split = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        split = None
    keys = {"annotations_sha256", "labeled", "rest"}
    fits = isinstance(split, dict) and keys <= split.keys()
    need(fits, f"{path} is no label split; make one with python -m tools.check split")
    same = split["annotations_sha256"] == file_digest(images.source)
    need(same, f"{path} was made for another version of {images.source}; make it anew")
    return split


def apply_split(split, images, hold_out):
    """(labelled, held out, rest). hold_out: whether a tenth of the labelled ones is kept from
    training, to choose the threshold by."""
    position = {name: i for i, name in enumerate(images.ids.tolist())}
    labelled = [position[name] for name in split["labeled"]]
    held = []
    if hold_out:
        held = labelled[::HOLD_OUT]
        labelled = [i for k, i in enumerate(labelled) if k % HOLD_OUT]
    need(labelled, "no labelled image is left to train on: raise --labeled, or give --threshold")
    rest = [position[name] for name in split["rest"]]
    return images.subset(labelled), images.subset(held), images.subset(rest)


def without_leaks(images, *labelled):
    """`images` less those that are also among `labelled`: the same file, or the same bytes
    (compared where the size agrees) -> (Images, number left out)."""
    known = set()
    by_size = {}
    for others in labelled:
        for i in range(len(others)):
            path = os.path.realpath(others.path(i))
            known.add(path)
            if os.path.exists(path):
                by_size.setdefault(os.path.getsize(path), []).append(path)
    keep = []
    for i in range(len(images)):
        path = os.path.realpath(images.path(i))
        leak = path in known
        if not leak and os.path.exists(path):
            twins = by_size.get(os.path.getsize(path), ())
            leak = any(filecmp.cmp(path, twin, shallow=False) for twin in twins)
        if not leak:
            keep.append(i)
    return images.subset(keep), len(images) - len(keep)


# ---- batches -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def shuffled_index(position, n, seed):
    """Which of n images stands at `position` of endless shuffled passes: a pure function, so that
    a loader can start anywhere."""
    return int(shuffled(n, seed, position // n)[position % n])


class TrainImages(torch.utils.data.Dataset):
    """Augmented images of parts {name in PARTS: (Images, ...)}. Key: (part, step, slot, index), and
    the augmentation is drawn from (seed, part, step, slot), whatever process loads the image."""

    def __init__(self, parts, policy, size, seed):
        self.parts = parts
        self.policy = policy
        self.size = size
        self.seed = seed

    def __getitem__(self, key):
        part, step, slot, index = key
        image, target = read(self.parts[part][0], index)
        human = ~target["crowd"]  # crowd regions are not trained on
        for name in augment.PER_BOX:
            if name in target:
                target[name] = target[name][human]
        rng = np.random.default_rng((self.seed, PARTS.index(part), step, slot))
        image, target = augment.augment(image, target, self.policy, self.size, rng)
        return image, {**target, "part": list(self.parts).index(part)}


class EvalImages(torch.utils.data.Dataset):
    """Images resized to fit a square of side `size`, unaugmented. Key: position."""

    def __init__(self, images, size):
        self.images = images
        self.size = size

    def __getitem__(self, i):
        image, target = read(self.images, i)
        plain = {**nothing(i), "usable": target["usable"], "original": (image.height, image.width)}
        image, plain, plain["scale"] = augment.fit(image, plain, self.size)
        return image, plain


def collate(samples):
    """[(image, target)] -> dict of images uint8 (B, 3, S, S) in channels_last, boxes (B, M, 4),
    labels (B, M) with -1 for padding, image_id; where there are such mask (B, S, S) uint8,
    image_class (B,) with -1 for none, part (B,) position among the parts of the step, scale (B,)
    and original (B, 2) height, width of the file, usable (B,), number (B, M) and numbers (B, S, S)
    of ops.collate_outlines."""
    images, targets = zip(*samples)
    B = len(images)
    M = max(len(t["boxes"]) for t in targets)
    boxes = np.zeros((B, M, 4), np.float32)
    labels = np.full((B, M), -1, np.int64)
    for i, t in enumerate(targets):
        boxes[i, : len(t["boxes"])] = t["boxes"]
        labels[i, : len(t["labels"])] = t["labels"]
    pixels = np.stack([np.asarray(image) for image in images])  # (B, S, S, 3)
    batch = {
        "images": torch.from_numpy(pixels).permute(0, 3, 1, 2),  # channels_last, without a copy
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(labels),
        "image_id": [t["image_id"] for t in targets],
    }
    if any("number" in t for t in targets):
        batch.update(ops.collate_outlines(targets, pixels.shape[1:3]))
    elif any("mask" in t for t in targets):
        nowhere = np.full(pixels.shape[1:3], augment.IGNORE, np.uint8)
        masks = [t.get("mask", nowhere) for t in targets]
        batch["mask"] = torch.from_numpy(np.stack(masks))
    if any("image_class" in t for t in targets):
        batch["image_class"] = torch.tensor([t.get("image_class", -1) for t in targets])
    for name in ("part", "scale", "original", "usable"):
        if name in targets[0]:
            batch[name] = torch.tensor([t[name] for t in targets])
    return batch


def batches(parts, steps, policy, size, seed, proc):
    """The batches of `steps` (a range), on proc.device. parts: {name in PARTS: (Images, how many of
    them in a step over all processes)}. This process loads its share, part after part: so
    batch["images"][k::n] holds the same mixture for every k, if n divides the shares."""
    keys = (step_keys(parts, step, seed, proc) for step in steps)
    for batch in loader(TrainImages(parts, policy, size, seed), keys, proc.workers, collate):
        yield on_device(batch, proc.device)


def step_keys(parts, step, seed, proc):
    keys = []
    for part, (images, count) in parts.items():
        for slot in proc.share(count):
            index = shuffled_index(step * count + slot, len(images), seed + PARTS.index(part))
            keys.append((part, step, slot, index))
    return keys


def eval_batches(images, index, size, proc):
    """(positions, batch) of the images at the positions `index`, EVAL_BATCH at a time. The last
    batch is filled up by repeating: results must not depend on how many processes share them."""
    rows = [list(index[i : i + EVAL_BATCH]) for i in range(0, len(index), EVAL_BATCH)]
    keys = [row + row[:1] * (EVAL_BATCH - len(row)) for row in rows]
    loaded = loader(EvalImages(images, size), keys, proc.workers, collate)
    for row, batch in zip(rows, loaded):
        batch["window"] = (batch["original"] * batch["scale"][:, None]).round().clamp(min=1)
        yield row, on_device(batch, proc.device)


def on_device(batch, device):
    moved = {}
    for name, value in batch.items():
        moved[name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    return moved


def loader(dataset, keys, workers, collate=collate):
    """Batches of a dataset, each given as a list of its keys."""
    try:
        yield from torch.utils.data.DataLoader(
            dataset,
            batch_sampler=Given(keys),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=one_thread,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
    except UserError as error:  # from a worker it comes wrapped in the worker's traceback
        error.__traceback__ = None  # it holds the loader, whose workers would then never end
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class Given:
    def __init__(self, keys):
        self.keys = keys

    def __iter__(self):
        return iter(self.keys)


def one_thread(_):
    torch.set_num_threads(1)
