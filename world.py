"""The embedded world: small drawn pictures that play the data sets of both papers, so that everything runs offline.

    python world.py ROOT                 # draws all parts (about half a minute on one core) and prints what is there

part         plays the role of                       what is in it
`det`        COCO: the labelled target task          128 px, 0-6 objects of 8 classes, exact boxes (and masks, by `draw`)
`single`     ImageNet: pre-training, joint training  96 px, one large object of 12 classes (the 8 and 4 more), class folders
`unlabeled`  Open Images: pool for pseudo-labels     128 px like `det`, the 4 unknown classes mixed in, more empty images

A class is an outline and its parts (holes, bars, teeth); colour, texture, size, pose and viewpoint are drawn at random and
say nothing about it. Each part has its own mix of backgrounds, so the pools are related to the target but not copies of it.

The numbers in the tables below were fixed before any training result was looked at, and are not tuned to make a method win.
The only criteria were that a person can name most objects at 128 px, and that an image takes about 3 ms to draw.

An image is a function of (seed, split, index) alone; another Pillow or numpy release may move a few pixels. A scene (what
is where) and its paint (how it looks) use separate random streams: a further visual style is a second `paint` on the same
`scene`. What is written is plain JPEG and COCO json, which `data.py` reads by the same code as the real data sets.
Not imitated: long-tailed class frequencies, crowd regions, annotation errors, perspective between objects.
"""
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # raise it with any change that alters an image: caches are then drawn afresh
SEED = 2020

# name, COCO-style category id (with gaps, as in COCO; None: never annotated), largest rotation in degrees.
CAST = [
    ("ring",        1, 180),
    ("button",      2, 180),   # a disc with four holes
    ("triangle",    3,  30),
    ("star",        5,  30),
    ("cross",       8,  30),
    ("crescent",   13,  30),
    ("window",     21,  30),   # a rectangle with 2 x 2 panes cut out
    ("arrow",      34,  30),
    ("heart",    None,  60),   # from here on: known to `single`, unknown to `det`
    ("hourglass", None, 180),
    ("frame",    None,  30),   # a window without bars
    ("gear",     None, 180),
]
ALL_CLASSES = [name for name, _, _ in CAST]
CLASSES = [name for name, category, _ in CAST if category is not None]
CATEGORY_IDS = [category for _, category, _ in CAST if category is not None]

# px: image side; splits: name -> (random stream, images); classes: how many of CAST may appear; objects, side: ranges (side
# in pixels, log-uniform); under, over: ranges of things of no class behind and in front; then the background mix.
PARTS = {
    "det": dict(px=128, splits={"train": (0, 2000), "val": (1, 500)}, classes=8, objects=(1, 5), empty=0.03, side=(22, 72),
                under=(1, 3), over=(0, 1), ground=dict(clouds=3, ramp=2, fabric=2, grass=2, quilt=1)),
    "single": dict(px=96, splits={"train": (2, 3000), "val": (3, 600)}, classes=12, objects=(1, 1), empty=0, side=(40, 80),
                   under=(0, 3), over=(0, 1), ground=dict(clouds=1, ramp=2, tiles=3, quilt=2)),
    "unlabeled": dict(px=128, splits={"train": (4, 4000)}, classes=12, objects=(1, 5), empty=0.10, side=(22, 72),
                      under=(1, 3), over=(0, 1), ground=dict(clouds=2, ramp=1, fabric=1, grass=1, quilt=2, tiles=2)),
}
THING_SIDE = (22, 60)   # px, things of no class
SEEN = 0.4       # an object keeps at least this share of its pixels in view, else its place, or its occluder's, is redrawn
SMALLEST = 6     # and what is in view is at least this wide and high, in pixels
CONTRAST = 60    # smallest difference in brightness, of 255, between an object's colours and the mean of what it covers
FILLS = ["plain", "plain", "plain", "ramp", "ramp", "ramp", "stripes", "clouds", "tiles", "dots"]
OVERSAMPLE = 3   # outlines are filled at this multiple and averaged down


# ---- Outlines: lists of (polygon (N, 2) in about [-1, 1], filled?); False cuts a hole -----------------------------------

def circle(r=1.0, x=0.0, y=0.0, n=28):
    t = np.arange(n) * (2 * math.pi / n)
    return np.stack([x + r * np.cos(t), y + r * np.sin(t)], 1)


def rectangle(x, y):
    return np.array([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])])


def polar(radii):
    t = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([radii * np.cos(t), radii * np.sin(t)], 1)


def outline(name, rng):
    """One random member of a class, or of the things of no class (polygon, blob, stroke)."""
    u = rng.uniform
    if name == "ring":
        return [(circle(), True), (circle(u(.42, .68)), False)]
    if name == "button":
        d, r = u(.30, .40), u(.15, .20)
        return [(circle(), True)] + [(circle(r, x, y, 10), False) for x in (-d, d) for y in (-d, d)]
    if name == "triangle":
        return [(np.array([(u(-.6, .6), -1), (1, .8), (-1, .8)]), True)]
    if name == "star":
        return [(polar(np.tile([1, u(.36, .50)], 5)), True)]
    if name == "cross":
        a = u(.20, .36)
        quarter = np.array([(a, a), (a, 1), (-a, 1)])
        turns = [np.array([(c, -d), (d, c)]) for c, d in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return [(np.concatenate([quarter @ turn.T for turn in turns]), True)]
    if name == "crescent":
        return [(circle(), True), (circle(u(.78, .95), u(.45, .62)), False)]
    if name in ("window", "frame"):
        e, b = u(.68, .80), u(.09, .15)   # inner edge, half width of the bars
        panes = [(-e, -b), (b, e)] if name == "window" else [(-e, e)]
        return [(rectangle((-1, 1), (-1, 1)), True)] + [(rectangle(x, y), False) for x in panes for y in panes]
    if name == "arrow":
        a, h, neck = u(.14, .28), u(.60, .80), u(-.15, .25)
        return [(np.array([(-1, -a), (neck, -a), (neck, -h), (1, 0), (neck, h), (neck, a), (-1, a)]), True)]
    if name == "heart":
        t = np.arange(32) * (math.pi / 16)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - u(1, 3) * np.cos(3 * t) - np.cos(4 * t)
        return [(np.stack([np.sin(t) ** 3, -y / 15], 1), True)]
    if name == "hourglass":
        a, b = u(.06, .16), u(.65, .9)
        return [(np.array([(-b, -1), (b, -1), (a, 0), (b, 1), (-b, 1), (-a, 0)]), True)]
    if name == "gear":
        r = u(.70, .80)
        return [(polar(np.tile([1, 1, r, r], rng.integers(8, 11))), True), (circle(u(.2, .38), n=16), False)]
    if name == "polygon":   # never three corners: that would be a triangle
        return [(polar(u(.5, 1, rng.integers(4, 8))), True)]
    if name == "blob":
        t = np.arange(24) * (math.pi / 12)
        return [(polar(.75 + u(0, .15) * np.cos(2 * t + u(0, 6)) + u(0, .12) * np.cos(3 * t + u(0, 6))), True)]
    assert name == "stroke", name
    x, a = np.linspace(-1, 1, 9), u(.03, .08)
    y = u(-.4, .4) * x ** 2
    return [(np.concatenate([np.stack([x, y - a], 1), np.stack([x, y + a], 1)[::-1]]), True)]


# ---- Scene: what is where -----------------------------------------------------------------------------------------------

def cut_out(name, turn, side, rng):
    """Pose an outline so that its longer side is `side` pixels -> (h, w) uint8 coverage, contours."""
    t, flip = rng.uniform(-turn, turn) * math.pi / 180, rng.choice([-1, 1])
    squeeze, shear = rng.uniform(.65, 1), rng.uniform(-.15, .15)
    tilt = rng.uniform(-.15, .15, 2)   # perspective: one end nearer than the other
    turned = np.array([(math.cos(t), -math.sin(t)), (math.sin(t), math.cos(t))]) @ np.array([(flip, shear), (0, squeeze)])
    shapes = [(p / (1 + p @ tilt)[:, None] @ turned.T, filled) for p, filled in outline(name, rng)]
    points = np.concatenate([p for p, filled in shapes if filled])
    low, extent = points.min(0), np.ptp(points, 0)
    scale = side / extent.max()
    w, h = (math.ceil(e * scale) + 2 for e in extent)
    at = rng.uniform(.5, 1.5, 2)   # a sub-pixel position, with room for a soft edge
    shapes = [(((p - low) * scale + at) * OVERSAMPLE, filled) for p, filled in shapes]
    cover = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
    pen = ImageDraw.Draw(cover)
    for p, filled in shapes:
        pen.polygon(p.ravel().tolist(), fill=255 if filled else 0)
    return np.asarray(cover.reduce(OVERSAMPLE)), shapes


def overlap(x, y, shape, px):
    """A patch of `shape` at (x, y) of a px x px canvas -> where it lies on the canvas, which part of the patch that is."""
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + shape[1], px), min(y + shape[0], px)
    return np.s_[y0:y1, x0:x1], np.s_[y0 - y:y1 - y, x0 - x:x1 - x]


def tight_box(visible):
    """Smallest (x0, y0, x1, y1) around the true pixels of (H, W); the far edges are exclusive, as in COCO."""
    xs, ys = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
    return (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1) if len(xs) else (0, 0, 0, 0)


def fits(visible, pixels):
    x0, y0, x1, y1 = tight_box(visible)
    return min(x1 - x0, y1 - y0) >= SMALLEST and np.count_nonzero(visible) >= SEEN * pixels


def scene(rng, part, index):
    """-> items in the order they are painted, each dict(label, cover, shapes, x, y) with label -1 for things of no class;
    owner (px, px) uint8: 1 + position in `items` of the object seen at each pixel, 0 where there is none."""
    spec = PARTS[part]
    px, known = spec["px"], CAST[:spec["classes"]]
    count = 0 if rng.random() < spec["empty"] else rng.integers(*spec["objects"], endpoint=True)
    labels = rng.integers(len(known), size=count).tolist()
    if part == "single":   # in turn: equally full folders
        labels = [index % len(known)]
    under = rng.choice(["polygon", "blob", "stroke"], rng.integers(*spec["under"], endpoint=True)).tolist()
    over = ["stroke"] * rng.integers(*spec["over"], endpoint=True)
    todo = [(k, known[k][0], known[k][2]) for k in labels]
    todo = [(-1, name, 180) for name in under] + todo + [(-1, name, 180) for name in over]

    items, owner = [], np.zeros((px, px), np.uint8)
    own = {}   # position in `items` + 1 -> pixels of that object, those outside the image included
    for step, (label, name, turn) in enumerate(todo):
        small, large = spec["side"] if label >= 0 else THING_SIDE
        for _ in range(8):
            cover, shapes = cut_out(name, turn, math.exp(rng.uniform(math.log(small), math.log(large))), rng)
            h, w = cover.shape
            if part == "single" and label >= 0:
                x, y = (int((px - n) / 2 + rng.uniform(-.12, .12) * px) for n in (w, h))
            else:   # up to 15% of either side may lie outside
                x, y = (int(rng.uniform(-.15 * n, px - .85 * n)) for n in (w, h))
            solid, canvas, inside = cover >= 128, *overlap(x, y, cover.shape, px)
            trial, pixels = owner, dict(own)
            if step >= len(under):
                trial = owner.copy()
                trial[canvas][solid[inside]] = len(items) + 1 if label >= 0 else 0
            if label >= 0:
                pixels[len(items) + 1] = np.count_nonzero(solid)
            # Whoever loses pixels to the newcomer, and the newcomer itself, must stay recognisable: so every object that is
            # painted is annotated, and no image holds one that the annotation passes over in silence.
            touched = set(owner[canvas][owner[canvas] != trial[canvas]].tolist()) - {0} | pixels.keys() - own.keys()
            if all(fits(trial == i, pixels[i]) for i in touched):
                items.append(dict(label=label, cover=cover, shapes=shapes, x=x, y=y))
                owner, own = trial, pixels
                break   # after eight failures it is too crowded, and the image has one thing fewer
    return items, owner


# ---- Paint: how it looks ------------------------------------------------------------------------------------------------

def blur_up(grid, shape):
    """A coarse random grid, smoothly enlarged to (h, w): cheap noise with a chosen grain."""
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC))


def pattern(kind, rng, shape, period):
    """Blend map (h, w) float32, about 0..1, between two colours."""
    h, w = shape
    if kind == "plain":
        return np.zeros(shape, np.float32)
    if kind == "clouds":
        return blur_up(rng.random(rng.integers(3, 8, 2)), shape)
    if kind == "grass":   # fine grain, drawn out along one axis
        n = int(rng.integers(2, 6))
        return blur_up(rng.random((h // n + 1, w // 2) if rng.random() < .5 else (h // 2, w // n + 1)), shape)
    if kind == "quilt":
        return np.kron(rng.random((8, 8), np.float32), np.ones((h // 8, w // 8), np.float32))
    # a, b: phases of two waves at right angles, in a random direction
    t, k, (pa, pb) = rng.uniform(0, math.pi), 2 * math.pi / period, rng.uniform(0, 6, 2)
    y, x = (k * np.arange(h, dtype=np.float32))[:, None], k * np.arange(w, dtype=np.float32)
    a, b = x * math.cos(t) + y * math.sin(t) + float(pa), y * math.cos(t) - x * math.sin(t) + float(pb)
    if kind == "ramp":
        return .5 + (a - a.mean()) / np.ptp(a)
    if kind == "stripes":
        return np.clip(.5 + 1.5 * np.sin(a), 0, 1)
    if kind == "dots":
        return np.clip(2 * np.cos(a) * np.cos(b) - .3, 0, 1)
    if kind == "fabric":
        return .5 + .25 * np.sin(a + np.sin(b * .3)) + .25 * np.sin(b + np.sin(a * .3))
    assert kind == "tiles", kind
    return np.clip(.5 + 3 * np.sin(a) * np.sin(b), 0, 1)


def slope(light, h, w):
    """Brightness (h, w, 1) float32, from about 1 on the side of the light to about -1."""
    x, y = np.arange(w, dtype=np.float32) * 2 / w - 1, np.arange(h, dtype=np.float32) * 2 / h - 1
    return (x * float(light[0]) + y[:, None] * float(light[1]))[..., None]


def colour(rng, away_from=None):
    """A random colour, (3,) float32; with `away_from`, a brightness, one that stands out from it."""
    for _ in range(20):
        r, g, b, vivid = rng.random(4).tolist()   # plain floats: this runs some twenty times an image
        grey, vivid = (r + g + b) / 3, .2 + .8 * vivid
        if away_from is None or abs(15 + 225 * grey - away_from) >= CONTRAST:
            return np.array([15 + 225 * (grey + vivid * (c - grey)) for c in (r, g, b)], np.float32)
    return np.full(3, 30 if away_from > 127 else 225, np.float32)


def paint(rng, part, items):
    """Photo-like: a textured ground, textured and shaded items, some with shadows and edges; then light, noise and blur.
    -> PIL RGB image"""
    px, mix = PARTS[part]["px"], PARTS[part]["ground"]
    kind = str(rng.choice([kind for kind, weight in mix.items() for _ in range(weight)]))
    first = colour(rng)
    second = (first + rng.normal(0, 45, 3)).clip(0, 255).astype(np.float32)
    canvas = first + pattern(kind, rng, (px, px), rng.uniform(8, 40))[..., None] * (second - first)   # (px, px, 3) float32
    light = rng.uniform(-1, 1, 2)   # towards it

    for item in items:
        soft = item["cover"][..., None] / np.float32(255)   # (h, w, 1)
        h, w = item["cover"].shape
        if rng.random() < .4:   # shadow: the same cover, away from the light, under the item itself
            at, inside = overlap(item["x"] - round(3 * light[0]), item["y"] - round(3 * light[1]), (h, w), px)
            canvas[at] *= 1 - float(rng.uniform(.2, .5)) * soft[inside]
        at, inside = overlap(item["x"], item["y"], (h, w), px)
        ground = canvas[at]     # a view: painting on it paints on the canvas
        behind = float(ground.mean())
        first, second = colour(rng, behind), colour(rng, behind)
        kind = FILLS[rng.integers(len(FILLS))]
        if kind == "dots" and item["label"] < 0:   # a dotted blob would look like a button
            kind = "plain"
        period = max(4, max(h, w) * rng.uniform(.12, .4))
        look = first + pattern(kind, rng, (h, w), period)[..., None] * (second - first) * float(rng.uniform(.4, 1))
        if rng.random() < .35:
            edge = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
            pen, width = ImageDraw.Draw(edge), int(rng.integers(3, 7))
            for p, _ in item["shapes"]:
                pen.line(np.concatenate([p, p[:1]]).ravel().tolist(), fill=255, width=width)
            line = np.asarray(edge.reduce(OVERSAMPLE))[..., None] / np.float32(255)
            look += line * (first * float(rng.choice([.35, 1.5])) - look)
        look *= 1 + .2 * slope(light, h, w)
        ground += soft[inside] * (look[inside] - ground)

    contrast = float(rng.uniform(.6, 1.1))
    canvas *= contrast + .15 * contrast * slope(light, px, px)
    canvas += 128 * (1 - contrast) + float(rng.uniform(-25, 25))
    if rng.random() < .6:
        canvas += float(rng.uniform(2, 12)) * rng.standard_normal((px, px, 1), np.float32)
    image = Image.fromarray(canvas.clip(0, 255, out=canvas).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(.4, .9))) if rng.random() < .25 else image


def draw(seed, split, index, part="det"):
    """-> PIL RGB image; boxes (N, 4) float32 xyxy of the visible pixels; labels (N,) int64 into ALL_CLASSES (CLASSES is its
    beginning); mask (H, W) uint8 with 0 = background and k + 1 = class k. N may be 0."""
    stream, _ = PARTS[part]["splits"][split]
    items, owner = scene(np.random.default_rng((seed, stream, index)), part, index)
    image = paint(np.random.default_rng((seed, stream, index, 1)), part, items)
    labels = np.array([item["label"] for item in items], np.int64)
    mask = np.concatenate([[0], labels + 1]).astype(np.uint8)[owner]
    objects = np.flatnonzero(labels >= 0)
    boxes = np.array([tight_box(owner == i + 1) for i in objects], np.float32).reshape(-1, 4)
    return image, boxes, labels[objects], mask


# ---- Files --------------------------------------------------------------------------------------------------------------

def write_det(folder, sizes, seed):
    (folder / "images").mkdir()
    categories = [dict(id=i, name=name, supercategory="shape") for i, name in zip(CATEGORY_IDS, CLASSES)]
    for split, count in sizes.items():
        info = dict(description="embedded world", version=VERSION)
        coco = dict(info=info, images=[], annotations=[], categories=categories)
        first = 1 + 1_000_000 * PARTS["det"]["splits"][split][0]   # ids are unique across splits
        for index in range(count):
            image, boxes, labels, mask = draw(seed, split, index)
            name = f"{split}_{index:05d}.jpg"
            image.save(folder / "images" / name, quality=90)
            coco["images"].append(dict(id=first + index, file_name=name, width=image.width, height=image.height))
            for (x0, y0, x1, y1), k in zip(boxes.tolist(), labels.tolist()):
                # (pixels of an overlapping neighbour of the same class count too: `area` only sorts objects by size)
                area = int(np.count_nonzero(mask[int(y0):int(y1), int(x0):int(x1)] == k + 1))
                coco["annotations"].append(dict(
                    id=first + len(coco["annotations"]), image_id=first + index, category_id=CATEGORY_IDS[k],
                    bbox=[x0, y0, x1 - x0, y1 - y0], area=area, iscrowd=0))
        (folder / f"{split}.json").write_text(json.dumps(coco))


def write_single(folder, sizes, seed):
    for split, count in sizes.items():
        for name in ALL_CLASSES:   # also those without an image, so that class numbers never depend on the size
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            image, _, labels, _ = draw(seed, split, index, "single")
            image.save(folder / split / ALL_CLASSES[labels[0]] / f"{index:05d}.jpg", quality=90)


def write_unlabeled(folder, sizes, seed):
    for index in range(sizes["train"]):
        draw(seed, "train", index, "unlabeled")[0].save(folder / f"{index:05d}.jpg", quality=90)


WRITERS = dict(det=write_det, single=write_single, unlabeled=write_unlabeled)


def build(root, part="det", sizes=None, seed=SEED):
    """Draws one part below `root` unless it is there with the same version, seed and sizes -> its folder.
    sizes, e.g. {"train": 20, "val": 10}, overrides the number of images of the splits it names."""
    sizes = {split: count for split, (_, count) in PARTS[part]["splits"].items()} | (sizes or {})
    assert sizes.keys() == PARTS[part]["splits"].keys(), f"part {part} has no such split: {list(sizes)}"
    wanted = dict(version=VERSION, seed=seed, part=part, sizes=sizes)
    root, folder = Path(root), Path(root) / part
    if present(folder) == wanted:
        return folder
    root.mkdir(parents=True, exist_ok=True)
    # A folder of this name is either complete or not ours: the files are drawn next to it and moved into place in one step.
    work = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=root))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()   # not `work` itself, which only its owner may read
        WRITERS[part](new, sizes, seed)
        (new / "world.json").write_text(json.dumps(wanted))
        if present(folder) == wanted:   # another process was faster: keep its copy, someone may be reading it
            return folder
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:                 # or it was faster by a hair
            if present(folder) != wanted:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def present(folder):
    """What the folder holds, None if there is none; refuses a folder this file did not make, rather than replace it."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / "world.json").read_text())
    except FileNotFoundError:
        raise FileExistsError(f"{folder} has no world.json, so it is not ours: move it or choose another root") from None


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python world.py ROOT")
    for part in PARTS:
        folder = build(sys.argv[1], part)
        print(f"{folder}: {present(folder)['sizes']}")


if __name__ == "__main__":
    main()
