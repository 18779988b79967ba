"""Masks of single objects, for Mask R-CNN: from COCO's files, through the augmentation as one map of numbers, back to COCO's RLE.

A map holds 256 + k where the k-th object of the image is seen, 0 where none is, 255 outside (augment.IGNORE): one picture for all
objects moves like any segmentation mask. What two objects claim goes to the smaller. Imports nothing local: copy this file.
"""
import json

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

FIRST = 256  # number of object 0 in a map


def usable(segmentation, size):
    """Whether a segmentation can be drawn: polygons of three points or more, or RLE of an image of that size (h, w)."""
    if isinstance(segmentation, dict):
        return "counts" in segmentation and list(segmentation.get("size", ())) == list(size)
    return isinstance(segmentation, list) and len(segmentation) > 0 and all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)


def pack(segmentations, sizes):
    """COCO's segmentations (polygons, RLE; None, [] or [[]] where there is none) of images of those sizes (n, 2), as json texts
    one after another, (bytes,) uint8, and where each is, (n, 2): flat arrays, which workers share. ValueError otherwise."""
    segmentations = [s if s and s != [[]] else None for s in segmentations]
    for s, size in zip(segmentations, sizes):
        if s and not usable(s, size):
            raise ValueError(f"segmentation {json.dumps(s)[:60]} is neither polygons of three points or more nor RLE of its "
                             f"image, {size[0]} high and {size[1]} wide")
    texts = [json.dumps(s).encode() if s else b"" for s in segmentations]
    ends = np.cumsum([0, *map(len, texts)])
    return np.frombuffer(b"".join(texts), np.uint8), np.stack([ends[:-1], ends[1:]], 1)


def draw(texts, places, crowd, size):
    """The map (h, w) int32 of an image's objects; those of a crowd, or without a segmentation, are not in it."""
    (h, w), out, found = size, np.zeros(size, np.int32), []
    for k, (begin, end) in enumerate(places):
        if begin < end and not crowd[k]:
            value = json.loads(texts[begin:end].tobytes())
            plain = isinstance(value, list) or isinstance(value["counts"], list)  # not compressed yet
            rle = coco_mask.frPyObjects(value, h, w) if plain else value
            found.append((k, coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)))
    for k, seen in sorted(found, key=lambda row: -row[1].sum()):
        out[seen] = FIRST + k
    return out


def collate(targets, size):
    """-> {"number" (B, M): each box's number in the map, -1 where padded or without a mask; "numbers" (B, S, S) int32}."""
    number = np.full((len(targets), max(len(t["boxes"]) for t in targets)), -1, np.int64)
    numbers = np.zeros((len(targets), *size), np.int32)
    for i, t in enumerate(targets):
        if "number" in t:
            numbers[i] = t["mask"]
            number[i, :len(t["number"])] = np.where(np.isin(t["number"], t["mask"]), t["number"], -1)
    return {"number": torch.from_numpy(number), "numbers": torch.from_numpy(numbers)}


def encode(masks, boxes, size):
    """Masks (n, m, m), probabilities inside their boxes (n, 4), as COCO's RLE in an image of that size (h, w)."""
    rles = []
    for one, box in zip(torch.as_tensor(masks).split(1), torch.as_tensor(boxes).split(1)):  # all at once would be gigabytes
        whole = paste_masks_in_image(one[:, None], box, size)[0, 0] > 0.5                       # (h, w)
        rles.append(coco_mask.encode(np.asfortranarray(whole.numpy().astype(np.uint8))))
    return rles
