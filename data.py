"""Data: COCO files, label splits, unlabelled images, the pseudo-label store, batches that do not depend on who loads them.

The target dict, everywhere in this project (numpy up to collate, torch after it):
    boxes  float32 (N, 4)  xyxy in absolute pixels          labels  int64 (N,)   contiguous 0..K-1, remapped at load
    scores float32 (N,)    1 for human labels               crowd   bool (N,)    COCO's iscrowd
    mask   uint8 (H, W)    class index, 255 = ignore (segmentation only)
    soft   uint8 (K, H, W) optional with a mask: class probabilities times 255, 0 where the mask is 255 (pseudo-labels)
    image_class  int       class index of the image as a whole, which has no boxes (classification only)
    image_id, size (h, w)                                    N = 0 is an ordinary image

Command line:
    python data.py check  train.json [--images DIR] [--strict]     what is wrong with an annotation file, or images of a folder
    python data.py split  train.json --fraction 0.2 --seed 0 --out split.json     (or a .txt list of VOC, or a folder of classes)
    python data.py export DIR                                      the embedded world as COCO files and folders
"""
import argparse
import filecmp
import functools
import glob
import hashlib
import heapq
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import augment
import masks
import world
from runs import write_json
from util import UserError, run

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class BadImage(Exception):
    """An image file that cannot be used; the message holds the path and the reason."""


# ---- annotation files --------------------------------------------------------------------------------------------

@dataclass
class Detections:
    """Images with boxes in flat arrays, so that worker processes share the memory instead of copying it object by
    object. Boxes of image i are rows start[i]:start[i+1]."""
    root: str               # folder that every file name is relative to
    files: np.ndarray       # (n,) bytes
    ids: np.ndarray         # (n,) int64, COCO image ids
    sizes: np.ndarray       # (n, 2) int32 height, width
    start: np.ndarray       # (n + 1,) int64
    boxes: np.ndarray       # (total, 4) float32 xyxy
    labels: np.ndarray      # (total,) int64
    scores: np.ndarray      # (total,) float32
    crowd: np.ndarray       # (total,) bool
    class_ids: list         # class k is category class_ids[k] of the file
    class_names: list
    annotation_file: str
    dropped: dict           # reason -> number of boxes left out at load
    texts: np.ndarray = None   # for Mask R-CNN: the objects' segmentations, and where each is (total, 2): see masks.pack
    places: np.ndarray = None

    def __len__(self):
        return len(self.ids)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def target(self, i):
        rows = slice(self.start[i], self.start[i + 1])
        return {"boxes": self.boxes[rows], "labels": self.labels[rows], "scores": self.scores[rows],
                "crowd": self.crowd[rows], "image_id": int(self.ids[i]), "size": tuple(int(v) for v in self.sizes[i])}

    def read(self, i):
        """(image, target); BadImage if the file cannot be used."""
        target = self.target(i)
        if self.texts is not None:
            rows = slice(self.start[i], self.start[i + 1])
            target.update(mask=masks.draw(self.texts, self.places[rows], self.crowd[rows], target["size"]),
                          number=masks.FIRST + np.arange(len(target["boxes"])))
        return read_image(self.path(i), target["size"]), target

    def subset(self, index):
        """The images at `index`, in that order."""
        index = np.asarray(index, dtype=np.int64)
        count = (self.start[1:] - self.start[:-1])[index]
        start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        rows = np.arange(start[-1]) + np.repeat(self.start[index] - start[:-1], count)
        return replace(self, files=self.files[index], ids=self.ids[index], sizes=self.sizes[index], start=start,
                       boxes=self.boxes[rows], labels=self.labels[rows], scores=self.scores[rows],
                       crowd=self.crowd[rows], places=None if self.places is None else self.places[rows])


def read_json(path, what, keys=("images", "annotations", "categories")):
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}; check --root")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as json ({error}); fix or re-download the {what}")
    missing = [k for k in keys if not isinstance(value.get(k), list)] if isinstance(value, dict) else ["images"]
    if missing:
        raise UserError(f"{path} is not a COCO {what}: it has no list '{missing[0]}'; see the COCO data format")
    return value


def load_coco(path, image_dir, class_ids=None, class_names=None, strict=False, with_masks=False):
    """A COCO detection json as Detections. class_ids, class_names: the categories a network is trained on; others are
    refused.

    Boxes with no area, outside the image or of unknown category or image are dropped and counted (strict: UserError);
    boxes reaching over the border are clipped. UserError also for files that are no COCO json.
    """
    try:
        return _load_coco(path, image_dir, class_ids, class_names, strict, with_masks)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a COCO annotation file: an image, annotation or category lacks a field or has one of "
                        f"the wrong kind ({type(error).__name__}: {error}); see the COCO data format")


def _load_coco(path, image_dir, class_ids, class_names, strict, with_masks):
    value = read_json(path, "annotation file")
    categories = sorted(value["categories"], key=lambda c: c["id"])
    own = [c["id"] for c in categories]
    if len(set(own)) != len(own) or not own:
        raise UserError(f"{path} has {'two categories of the same id' if own else 'no category'}; mend its 'categories'")
    if class_ids is not None and list(class_ids) != own:
        odd = sorted(set(class_ids) ^ set(own))
        raise UserError(f"{path} has other categories than the network is trained on (ids in only one of them: {odd[:5]}); "
                        "use annotation files that belong together")
    names = [c.get("name", str(c["id"])) for c in categories]
    odd = [f"{a} / {c['name']}" for a, c in zip(class_names or (), categories) if a != c.get("name", a)]
    if odd:
        raise UserError(f"{path} has other category names than the network is trained on ({', '.join(odd[:3])}); check --data "
                        "and --root")
    images = sorted(value["images"], key=lambda im: im["id"])
    ids = np.array([im["id"] for im in images], dtype=np.int64)
    if len(ids) == 0:
        raise UserError(f"{path} lists no image; nothing can be trained or scored with it")
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"{path} gives the image id {ids[:-1][ids[1:] == ids[:-1]][0]} twice; ids must be unique")
    files = [im["file_name"] for im in images]
    stay_inside(files, path, image_dir)
    sizes = np.array([[im["height"], im["width"]] for im in images], dtype=np.int32).reshape(-1, 2)

    rows = value["annotations"]
    nothing = [np.nan] * 4  # some exports write [] or null
    box = np.array([a["bbox"] if len(a["bbox"] or ()) == 4 else nothing for a in rows], np.float64).reshape(-1, 4)  # x, y, w, h
    where, known = _lookup(ids, np.array([a["image_id"] for a in rows], dtype=np.int64))
    label, named = _lookup(np.array(own, dtype=np.int64), np.array([a["category_id"] for a in rows], dtype=np.int64))
    limit = sizes[where][:, ::-1] if len(rows) else np.zeros((0, 2))  # w, h
    low, high = np.clip(box[:, :2], 0, limit), np.clip(box[:, :2] + box[:, 2:], 0, limit)
    finite = np.isfinite(box).all(1)
    reasons = [("unknown image id", ~known), ("unknown category id", ~named), ("not four finite numbers", ~finite),
               ("no area", (box[:, 2:] <= 0).any(1)), ("outside the image", (high - low <= 0).any(1))]
    keep, dropped = np.ones(len(rows), dtype=bool), {}
    for reason, bad in reasons:
        if (bad & keep).any():
            first = rows[int(np.flatnonzero(bad & keep)[0])]
            dropped[reason] = int((bad & keep).sum())
            if strict:
                raise UserError(f"{path}: {dropped[reason]} boxes with {reason}, first annotation {first.get('id')} "
                                f"{first.get('bbox')}; mend the file or leave out --strict to drop them")
        keep &= ~bad
    order = np.flatnonzero(keep)[np.argsort(where[keep], kind="stable")]  # boxes grouped by image
    if with_masks and all(a.get("segmentation") in (None, [], [[]]) for a in rows):
        raise UserError(f"{path} has boxes without a segmentation only, which a recipe with masks cannot learn; take one without")
    texts, places = masks.pack([rows[k].get("segmentation") for k in order], sizes[where[order]].tolist()) if with_masks else (
        None, None)
    return Detections(
        root=str(image_dir), files=np.array([os.fsencode(f) for f in files], dtype=np.bytes_), ids=ids, sizes=sizes,
        start=np.concatenate([[0], np.cumsum(np.bincount(where[order], minlength=len(ids)))]).astype(np.int64),
        boxes=np.concatenate([low, high], 1)[order].astype(np.float32), labels=label[order],
        scores=np.array([a.get("score", 1.0) for a in rows], dtype=np.float32)[order],
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in rows], dtype=bool)[order],
        class_ids=own, class_names=names, annotation_file=str(path),
        dropped=dropped, texts=texts, places=places)


def _lookup(table, values):
    """Position of each value in the sorted table, and whether it is there."""
    if len(table) == 0:
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=bool)
    at = np.searchsorted(table, values).clip(0, len(table) - 1)
    return at, table[at] == values


def stay_inside(names, path, image_dir):
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{path} has the file_name '{name}', which leaves the image folder {image_dir}; make it relative")


def _folder_beside(path):
    """Where the images of an annotation file lie: images/, for annotations/instances_train2017.json train2017/, or here."""
    path = Path(path)
    places = path.parent / "images", path.parent.parent / path.stem.rpartition("_")[2], path.parent
    return next((d for d in places if d.is_dir()), path.parent)


def embedded(root, part):
    """Folder of a part of the embedded world, drawn below root unless it is there."""
    try:
        return world.build(root, part)
    except OSError as error:
        raise UserError(f"cannot draw the embedded world in {root} ({error}); give another --root for it")


def coco_layout(root):
    """(train json, train images, val json, val images) under root: official COCO 2017 or the simple layout."""
    root = Path(root)
    for train, train_dir, val, val_dir in (
            ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"),
            ("train.json", "images", "val.json", "images")):
        if (root / train).exists():
            return root / train, root / train_dir, root / val, root / val_dir
    raise UserError(f"no dataset at {root}: expected annotations/instances_train2017.json + train2017/, or train.json + "
                    "images/; check --root")


# ---- images ------------------------------------------------------------------------------------------------------

def read_image(path, size=None):
    """The file as an RGB image. size: (h, w) the annotations speak of; another size is a BadImage, since the boxes
    would be wrong. EXIF rotation is applied unless the annotations were made without it."""
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            if size is None or turned.size == (size[1], size[0]):
                image = turned
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float files: convert() would clip at 255
                values = np.asarray(image).astype(np.float64)
                scale = 65535.0 if values.max(initial=0) > 255 else 255.0
                image = Image.fromarray((values / scale * 255).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")  # greyscale, palette, alpha and CMYK files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {str(error) or type(error).__name__}")
    if size is not None and image.size != (size[1], size[0]):
        raise BadImage(f"{path}: is {image.size[0]}x{image.size[1]}, its annotations say {size[1]}x{size[0]}")
    return image


def images_below(folder):
    """Paths of the image files in a folder and those below it, relative to it, sorted; hidden ones are passed over."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:], below = [f for f in folders if f[0] != "."], os.path.relpath(place, folder)
        found += [f if below == "." else f"{below}/{f}" for f in files
                  if f[0] != "." and os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


def list_images(source):
    """Paths of unlabelled images as a sorted flat array (n,) of bytes. source: a folder (searched recursively, so
    ImageNet-style class folders too), a glob, a .txt list, or a COCO json (its annotations are not read)."""
    path = Path(source)
    if path.is_dir():
        found = [os.path.join(path, f) for f in images_below(path)]
    elif path.suffix == ".json":
        value = read_json(path, "image list", ["images"])
        info = value["info"] if isinstance(value.get("info"), dict) else {}
        folder = info["root"] if os.path.isdir(info.get("root", "")) else _folder_beside(path)
        names = [im["file_name"] for im in value["images"] if "file_name" in im]
        stay_inside(names, path, folder)
        found = [os.path.join(folder, name) for name in names]
    elif path.suffix == ".txt" and path.exists():
        found = [os.path.join(path.parent, line.strip()) for line in path.read_text().splitlines() if line.strip()]
    else:
        found = glob.glob(str(source), recursive=True)
    found = sorted({os.path.abspath(f) for f in found if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES})
    if not any(map(os.path.exists, found)):
        raise UserError(f"no image found at --unlabeled {source}; give a folder, a glob, a .txt list or a COCO json")
    return np.array([os.fsencode(f) for f in found], dtype=np.bytes_)


def without_leaks(paths, *labelled):
    """Unlabelled paths less those that are also labelled or evaluation images: the same file, or the same bytes
    (compared only where the file size agrees). Returns (paths, number left out)."""
    known, by_size = set(), {}
    for detections in labelled:
        for i in range(len(detections)):
            path = os.path.realpath(detections.path(i))
            known.add(path)
            if os.path.exists(path):
                by_size.setdefault(os.path.getsize(path), []).append(path)

    def leaks(path):
        path = os.path.realpath(os.fsdecode(path))
        if path in known or not os.path.exists(path):
            return path in known
        return any(filecmp.cmp(path, other, shallow=False) for other in by_size.get(os.path.getsize(path), ()))
    keep = np.array([not leaks(bytes(p)) for p in paths], dtype=bool)
    return paths[keep], int((~keep).sum())


# ---- label splits ------------------------------------------------------------------------------------------------

HOLD_OUT = 10  # every 10th labelled image may be held out to choose the pseudo-label threshold


def file_digest(path):
    """sha256 of a file, or of the names of the images below a folder: class folders say all there is to say."""
    content = os.fsencode("\n".join(images_below(path))) if os.path.isdir(path) else Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()


def make_split(annotation_file, ids, fraction, seed):
    """Which images count as labelled: a dict for json. Nested: 20% is contained in 50% of the same seed, and the
    held-out tenth of the 20% in that of the 50%. Image ids, not positions, so that it survives re-ordering."""
    order = np.random.default_rng(seed).permutation(np.sort(np.asarray(ids)))
    count = max(1, round(fraction * len(order)))
    return {"annotations_sha256": file_digest(annotation_file),
            "fraction": fraction, "seed": seed, "labeled": order[:count].tolist(), "rest": order[count:].tolist()}


def read_split(path, annotation_file):
    try:
        split = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        split = None
    if not (isinstance(split, dict) and {"annotations_sha256", "labeled", "rest"} <= split.keys()):
        raise UserError(f"{path} is not a label split; make one with python data.py split")
    if split["annotations_sha256"] != file_digest(annotation_file):
        raise UserError(f"{path} was made for another version of {annotation_file}; make it anew with python data.py split")
    return split


def apply_split(split, train, hold_out):
    """(labelled, held-out, rest) as Detections. hold_out=False keeps all labelled images for training."""
    position = {v: i for i, v in enumerate(train.ids.tolist())}
    missing = [v for v in split["labeled"] + split["rest"] if v not in position]
    if missing:
        raise UserError(f"the split names image ids that {train.root} does not have, first {missing[:3]}; make it anew")
    labelled = [position[v] for v in split["labeled"]]
    held = labelled[::HOLD_OUT] if hold_out else []
    used = [i for k, i in enumerate(labelled) if not hold_out or k % HOLD_OUT]
    if not used:
        raise UserError(f"{len(labelled)} labelled images, of which {len(held)} held out to choose the threshold: none is left "
                        "to train on. Raise --labeled, or give --threshold a number")
    return train.subset(used), train.subset(held), train.subset([position[v] for v in split["rest"]])


# ---- batches -----------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def _shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def shuffled_index(position, n, seed):
    """Endless shuffled passes over n images: which image stands at `position`. A pure function, so a sampler can
    start anywhere."""
    return int(_shuffled(n, seed, position // n)[position % n])


def nothing(image_id):
    """The target of an image without boxes."""
    return {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "scores": np.zeros(0, np.float32),
            "crowd": np.zeros(0, bool), "image_id": image_id}


PARTS = ["human", "pseudo", "joint"]  # of a step: labelled by people, by a teacher; for joint training, with a class each


class TrainImages(torch.utils.data.Dataset):
    """parts: Detections, voc.Masks or classify.Images in the order of PARTS. Keys are (part, step, slot, index): the
    augmentation's random numbers come from (seed, part, step, slot), whatever process or worker draws the image."""

    def __init__(self, parts, policy, size, seed):
        self.parts, self.policy, self.size, self.seed = parts, policy, size, seed

    def __getitem__(self, key):
        part, step, slot, index = key
        images, bad = self.parts[part], []
        for attempt in range(20):
            i = (index + attempt) % len(images)  # a bad image is replaced by its neighbour
            try:
                image, target = images.read(i)
                break
            except BadImage as error:
                bad.append(str(error))
        else:
            raise UserError(f"20 images in a row are unusable, first {bad[0]}; run python data.py check (masks: voc.py)")
        human = ~target["crowd"]  # crowd regions are not trained on
        for field in augment.PER_BOX:
            if field in target:
                target[field] = target[field][human]
        soft, mask = target.pop("soft", None), target.get("mask")
        if soft is not None:  # it is moved as where each pixel comes from
            target["mask"] = 256 + np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
        image, target = augment.augment(image, target, self.policy, self.size,
                                        np.random.default_rng((self.seed, part, step, slot)))
        if soft is not None:
            index = np.where(target["mask"] == augment.IGNORE, 0, target["mask"] - 256)  # (S, S)
            target["mask"] = np.where(target["mask"] == augment.IGNORE, augment.IGNORE, mask.ravel()[index]).astype(np.uint8)
            target["soft"] = soft.reshape(len(soft), -1)[:, index] * (target["mask"] != augment.IGNORE)  # (K, S, S)
        return image, target, part, bad


class EvalImages(torch.utils.data.Dataset):
    """Images resized to fit a square of side `size` (None: as they are), unaugmented; boxes are not read. source:
    Detections, voc.Masks, classify.Images or an array of paths."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __getitem__(self, i):
        target = nothing(i)
        try:
            image = read_image(os.fsdecode(bytes(self.source[i]))) if isinstance(self.source, np.ndarray) \
                else self.source.read(i)[0]
            bad = []
        except BadImage as error:
            image, bad = Image.new("RGB", (self.size or 32, self.size or 32)), [str(error)]
        target.update(original=(image.height, image.width), size=(image.height, image.width), scale=1.0)
        if self.size:
            image, target, target["scale"] = augment.fit(image, target, self.size)
        return image, target, 0, bad


def collate(samples):
    """[(image, target, part, bad)] -> dict of tensors: images uint8 (B, 3, S, S) in channels_last, boxes (B, M, 4),
    labels (B, M) with -1 for padding, part (B,), image_id (B,); bad: [(row, reason)] of unusable files met on the way;
    for evaluation also scale (B,) and original (B, 2) height, width of the file."""
    images, targets, parts, bad = zip(*samples)
    B, M = len(images), max(len(t["boxes"]) for t in targets)
    boxes, labels = np.zeros((B, M, 4), np.float32), np.full((B, M), -1, np.int64)
    for i, t in enumerate(targets):
        boxes[i, :len(t["boxes"])], labels[i, :len(t["labels"])] = t["boxes"], t["labels"]
    pixels = np.stack([np.asarray(im) for im in images])  # (B, S, S, 3): permuting gives channels_last for free
    reasons = [(i, text) for i, some in enumerate(bad) for text in some]
    batch = {"images": torch.from_numpy(pixels).permute(0, 3, 1, 2), "boxes": torch.from_numpy(boxes),
             "labels": torch.from_numpy(labels), "part": torch.tensor(parts),
             "image_id": torch.tensor([t["image_id"] for t in targets]), "bad": reasons}
    if "number" in targets[0]:
        batch.update(masks.collate(targets, pixels.shape[1:3]))
    elif "mask" in targets[0]:
        nowhere = np.full(pixels.shape[1:3], augment.IGNORE, np.uint8)
        batch["masks"] = torch.from_numpy(np.stack([t.get("mask", nowhere) for t in targets]))  # (B, S, S) uint8
    if soft := [t["soft"] for t in targets if "soft" in t]:
        batch["soft"] = torch.from_numpy(np.stack([t.get("soft", np.zeros_like(soft[0])) for t in targets]))  # (B, K, S, S) uint8
    if "image_class" in targets[-1]:
        batch["image_class"] = torch.tensor([t.get("image_class", -1) for t in targets])  # (B,)
    if "scale" in targets[0]:
        batch["scale"] = torch.tensor([t["scale"] for t in targets])
        batch["original"] = torch.tensor([t["original"] for t in targets])  # (B, 2) h, w
    return batch


def train_loader(parts, counts, start, stop, chunks, rank, world_size, policy, size, seed, workers):
    """Batches for steps start..stop-1. Each holds counts[p] images of parts[p] over all ranks, this rank's share here,
    laid out as `chunks` equal micro-batches of the same mixture."""
    def batches():
        for step in range(start, stop):
            keys = []
            for part, (images, count) in enumerate(zip(parts, counts)):
                mine = count // world_size
                slots = range(rank * mine, (rank + 1) * mine)
                row = [(part, step, s, shuffled_index(step * count + s, len(images), seed + part)) for s in slots]
                keys.append(np.array_split(np.arange(mine), chunks))
                keys[-1] = [[row[i] for i in chunk] for chunk in keys[-1]]
            yield [key for chunk in zip(*keys) for some in chunk for key in some]
    return loader(TrainImages(parts, policy, size, seed), batches(), workers)


def eval_loader(source, index, size, batch, workers):
    """The images at `index` in batches of exactly `batch`: the last is filled up by repeating, since the arithmetic of
    a batch may depend on its size (and results must not depend on how many processes share the work)."""
    rows = [list(index[i:i + batch]) for i in range(0, len(index), batch)]
    return loader(EvalImages(source, size), [row + row[:1] * (batch - len(row)) for row in rows], workers)


def loader(dataset, batches, workers, collate=collate):
    """Batches of a dataset, given as lists of its keys."""
    try:
        yield from torch.utils.data.DataLoader(
            dataset, batch_sampler=_Given(batches), num_workers=workers, collate_fn=collate, worker_init_fn=_quiet_worker,
            pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)
    except UserError as error:  # from a worker it comes wrapped in the worker's traceback
        error.__traceback__ = None  # it holds the loader: the workers would be left to the garbage collector, which stalls
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class _Given:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def _quiet_worker(_):
    torch.set_num_threads(1)


# ---- pseudo-labels -----------------------------------------------------------------------------------------------

def pseudo_parts(folder):
    return sorted(Path(folder).glob("part_*.jsonl"))


def finished_images(folder, n, floor=0.0):
    """Which of n images the parts already hold, as (n,) bool; a line cut off by a kill is removed, and parts made when
    only higher scores were stored are made anew."""
    done, note = np.zeros(n, dtype=bool), Path(folder) / "floor.json"
    if note.exists() and json.loads(note.read_text()) > floor:
        for part in pseudo_parts(folder):
            part.unlink()
    if not pseudo_parts(folder):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, floor)
    for part in pseudo_parts(folder):
        whole = 0
        with open(part, "rb") as f:
            for line in f:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                done[json.loads(line)["i"]] = True
        os.truncate(part, whole)
    return done


def read_parts(folder):
    """All pseudo-labelled images in order, one at a time: {"i", "file", "size", "boxes" xywh, "labels", "scores"} (of masks
    and classes what segment.py and classify.py write) or {"i", "file", "bad"}. Every part is in order already, so merging
    holds one line per part in memory."""
    streams = [map(json.loads, open(part)) for part in pseudo_parts(folder)]
    return heapq.merge(*streams, key=lambda row: row["i"])


# ---- command line ------------------------------------------------------------------------------------------------

def check(path, images=None, strict=False):
    """Reads everything a training would and prints what is wrong. Returns the number of problems."""
    folder = os.path.isdir(path)
    found = list_images(path) if folder else load_coco(path, images or _folder_beside(path), strict=strict)
    problems = Counter({} if folder else found.dropped)
    for i in range(len(found)):
        try:
            read_image(os.fsdecode(found[i])) if folder else read_image(found.path(i), tuple(found.sizes[i]))
        except BadImage as error:
            problems["unusable image"] += 1
            print(f"  {error}")
    if folder:
        print(f"{path}: {len(found)} images, {problems['unusable image']} unusable")
        return problems["unusable image"]
    count = Counter(found.labels.tolist())
    empty = int((found.start[1:] == found.start[:-1]).sum())
    print(f"{path}: {len(found)} images ({empty} without objects), {len(found.boxes)} boxes ({int(found.crowd.sum())} crowd)")
    print("  " + ", ".join(f"{name} {count[k]}" for k, name in enumerate(found.class_names)))
    for reason, n in problems.items():
        print(f"  {n} x {reason}")
    return sum(problems.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    sub = parser.add_subparsers(dest="command", required=True, prog="data.py")
    parsers = {name: sub.add_parser(name, usage=argparse.SUPPRESS) for name in ("check", "split", "export")}
    for p in parsers.values():
        p.add_argument("path")
    parsers["check"].add_argument("--images")
    parsers["check"].add_argument("--strict", action="store_true")
    parsers["split"].add_argument("--fraction", type=float, required=True)
    parsers["split"].add_argument("--seed", type=int, default=0)
    parsers["split"].add_argument("--out", required=True)
    args = parser.parse_args()
    if args.command == "check":
        if problems := check(args.path, args.images, args.strict):
            raise UserError(f"{problems} problems in {args.path}; training drops what is listed above")
    elif args.command == "split":
        if args.path.endswith(".txt"):  # a list of PASCAL VOC
            ids = sorted({line.strip() for line in open(args.path) if line.strip()})
        elif os.path.isdir(args.path):
            ids = np.arange(len(images_below(args.path)))
        else:
            ids = load_coco(args.path, Path(args.path).parent).ids
        if not 0 < args.fraction <= 1:
            raise UserError(f"--fraction {args.fraction} is not a fraction; give a number above 0 and up to 1")
        split = make_split(args.path, ids, args.fraction, args.seed)
        write_json(args.out, split)
        print(f"{args.out}: {len(split['labeled'])} of {len(ids)} images labelled")
    else:
        for part in ("det", "seg", "single", "unlabeled"):
            print(world.build(args.path, part))


if __name__ == "__main__":
    run(main)
