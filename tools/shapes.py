"""The embedded world: small drawn pictures that play the data sets of both papers, so that
everything runs offline. What is written is plain JPEG, COCO json, VOC masks and class folders.

    python -m tools.shapes datasets/shapes     draws all parts (a minute) and says what is there

part         plays the role of                      what is in it
det          COCO: the labelled target task         128 px, 0-5 objects of 8 classes, exact boxes
seg          PASCAL VOC: segmentation               64 px, 0-2 objects of 4 classes, a mask each;
                                                    train is small, aug as large as a pool must be
single       ImageNet: pre-training, joint          96 px, one large object of 12 classes (4 are
             training                               new); extra is JFT's: more, without labels
unlabeled    Open Images: pool for pseudo-labels    128 px, those 4 mixed in, more empty images
photo, sketch, strokes, aerial: HPT's domains       64 px, the 12 classes in four styles

A class is an outline and its parts (holes, bars, teeth); colour, texture, size, pose and viewpoint
are drawn at random and say nothing about it. Each part has its own mix of backgrounds.

Object sizes, rotations, fills and contrast were set once, by how fast a purely supervised detector
learns on det in a few minutes of CPU: three settings were tried, on supervised AP alone, before any
self-training result was looked at. They are frozen, and not tuned to make a method win. Those of
seg are by another criterion, that labels and not steps limit a supervised net; students were
trained in some of these trials, and seen (results/README.md).

An image is a function of (seed, split, index) alone; another Pillow or numpy release may move a few
pixels. Not imitated: long-tailed class frequencies, crowds, annotation errors.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from util import UserError, run

VERSION = 3  # raise it with any change that alters an image: caches are then drawn afresh
SEED = 2020

# ---- outlines: polygons (N, 2) in about [-1, 1]; the first is filled, the others are holes -------


def polar(radii):
    """A closed line around the origin, through these radii at even angles."""
    t = np.arange(len(radii)) * (math.tau / len(radii))
    return np.c_[radii * np.cos(t), radii * np.sin(t)]


def circle(r=1.0, x=0.0, y=0.0, n=28):
    return polar(np.full(n, r)) + (x, y)


def panes(*gaps):
    """Rectangles between all pairs of gaps."""
    return [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, x1 in gaps for y0, y1 in gaps]


def ring(r):
    return [circle(), circle(r)]


def button(d, r):
    return [circle(), *(circle(r, x, y, 10) for x in (-d, d) for y in (-d, d))]


def triangle(x):
    return [[(x, -1), (1, 0.8), (-1, 0.8)]]


def star(r):
    return [polar(np.tile([1, r], 5))]


def cross(a):
    right = [(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
    return [[*right, (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a)]]


def crescent(r, x):
    return [circle(), circle(r, x)]


def window(e, b):
    return panes((-1, 1)) + panes((-e, -b), (b, e))


def arrow(a, h, neck):
    return [[(-1, -a), (neck, -a), (neck, -h), (1, 0), (neck, h), (neck, a), (-1, a)]]


def heart(k):
    t = np.arange(32) * (math.tau / 32)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - k * np.cos(3 * t) - np.cos(4 * t)
    return [np.c_[np.sin(t) ** 3, y / -15]]


def hourglass(a, b):
    return [[(-b, -1), (b, -1), (a, 0), (b, 1), (-b, 1), (-a, 0)]]


def frame(e, _):
    return panes((-1, 1)) + panes((-e, e))


def gear(r, teeth, hole):
    return [polar(np.tile([1, 1, r, r], teeth)), circle(hole, n=16)]


def polygon(radii):
    return [polar(radii)]


def blob(a, p, b, q):
    t = np.arange(24) * (math.tau / 24)
    return [polar(0.75 + a * np.cos(2 * t + p) + b * np.cos(3 * t + q))]


def stroke(a, bend):
    x = np.linspace(-1, 1, 9)
    return [np.r_[np.c_[x, bend * x**2 - a], np.c_[x, bend * x**2 + a][::-1]]]


# fmt: off
CAST = {
    # category id with gaps, as in COCO (None: never annotated); largest rotation in degrees;
    # ranges of the outline's parameters; the outline
    "ring":      (1,    180, [(.42, .68)], ring),
    "button":    (2,    180, [(.30, .40), (.15, .20)], button),
    "triangle":  (3,     30, [(-.6, .6)], triangle),
    "star":      (5,     30, [(.36, .50)], star),
    "cross":     (8,     30, [(.20, .36)], cross),
    "crescent":  (13,    30, [(.78, .95), (.45, .62)], crescent),
    "window":    (21,    30, [(.68, .80), (.09, .15)], window),
    "arrow":     (34,    30, [(.14, .28), (.60, .80), (-.15, .25)], arrow),
    # from here on: known to single, unknown to det
    "heart":     (None,  60, [(1, 3)], heart),
    "hourglass": (None, 180, [(.06, .16), (.65, .90)], hourglass),
    "frame":     (None,  30, [(.68, .80), (.09, .15)], frame),
    "gear":      (None, 180, [(.70, .80), range(8, 11), (.20, .38)], gear),
}
THINGS = {  # of no class
    "polygon":   (None, 180, [range(4, 8)], polygon),  # never 3 corners: that would be a triangle
    "blob":      (None, 180, [(0, .15), (0, 6), (0, .12), (0, 6)], blob),
    "stroke":    (None, 180, [(.03, .08), (-.4, .4)], stroke),
}
ALL_CLASSES = list(CAST)
CLASSES = [name for name, (category, *_) in CAST.items() if category]
CATEGORY_IDS = [CAST[name][0] for name in CLASSES]

# px: side of the image; splits: name -> (random stream, images); classes: how many of CAST may
# appear; objects: how many; side: of an object, px, log-uniform; empty: share of images without
# one; under, over: how many things of no class behind and in front; ground: backgrounds, weights
PARTS = {
    "det": dict(
        px=128, splits=dict(train=(0, 2000), val=(1, 500)), classes=8, objects=(1, 5),
        side=(22, 72), empty=.03, under=(1, 3), over=(0, 1),
        ground=dict(clouds=3, ramp=2, fabric=2, grass=2, quilt=1)),
    "seg": dict(
        px=64, splits=dict(train=(5, 300), aug=(7, 2000), val=(6, 400)), classes=4, objects=(1, 2),
        side=(32, 56), empty=.03, under=(0, 0), over=(0, 0),
        ground=dict(clouds=3, ramp=2, fabric=2, grass=2, quilt=1)),
    "single": dict(
        px=96, splits=dict(train=(2, 3000), extra=(8, 3000), val=(3, 600)), classes=12,
        objects=(1, 1), side=(40, 80), empty=0, under=(0, 3), over=(0, 1),
        ground=dict(clouds=1, ramp=2, tiles=3, quilt=2)),
    "unlabeled": dict(
        px=128, splits=dict(train=(4, 4000)), classes=12, objects=(1, 5), side=(22, 72), empty=.10,
        under=(1, 3), over=(0, 1),
        ground=dict(clouds=2, ramp=1, fabric=1, grass=1, quilt=2, tiles=2)),
}
# Domains of the second paper: how the classes look, the rest as in single. Written down once,
# before any result was looked at.
DOMAINS = {
    "photo": dict(  # textured and shaded, as single
        side=(26, 52), under=(0, 2), over=(0, 1), ground=dict(clouds=1, ramp=2, tiles=3, quilt=2)),
    "sketch": dict(side=(30, 56), under=(0, 1), over=(0, 0)),  # pencil outlines on paper
    "strokes": dict(side=(36, 58), under=(0, 0), over=(0, 0)),  # a thick pen, black on white
    "aerial": dict(  # one to three small ones of a class from above, turned anyhow
        side=(14, 24), objects=(1, 3), under=(0, 2), over=(0, 0),
        ground=dict(grass=3, fabric=1, quilt=2, clouds=1)),
}
for k, name in enumerate(DOMAINS):
    splits = dict(train=(10 + 3 * k, 1500), val=(11 + 3 * k, 300), test=(12 + 3 * k, 300))
    PARTS[name] = {**PARTS["single"], "px": 64, **DOMAINS[name], "splits": splits}
ALIKE = ["single", *DOMAINS]  # all objects of an image are of one class, which is its folder
FILES = {
    "det": "images/{split}_{i:05d}.jpg",
    "seg": "JPEGImages/{split}_{i:05d}.jpg",
    "unlabeled": "{i:05d}.jpg",
    **dict.fromkeys(ALIKE, "{split}/{name}/{i:05d}.jpg"),
    "strokes": "{split}/{name}/{i:05d}.png",
}
# fmt: on
THING_SIDE = (22, 60)  # px, things of no class; in domains two thirds of it
SEEN = 0.4  # an object keeps at least this share of its pixels in view, else the newcomer moves
SMALLEST = 6  # and what is in view is at least this wide and high, in pixels
CONTRAST = 60  # least difference in brightness, of 255, between an object and what it covers
FILLS = ["plain", "plain", "plain", "ramp", "ramp", "ramp", "stripes", "clouds", "tiles", "dots"]
OVERSAMPLE = 3  # outlines are filled at this multiple and averaged down

# ---- a scene: what is where ----------------------------------------------------------------------


def cut_out(name, side, rng, above=False):
    """A random member of a class, posed so that its longer side is `side` pixels -> (h, w) uint8
    coverage, contours. above: seen from there, so turned anyhow, but not foreshortened."""
    _, turn, ranges, outline = (CAST | THINGS)[name]
    if above:
        turn = 180
    t = rng.uniform(-turn, turn) * math.pi / 180
    flip = rng.choice([-1, 1])
    squeeze = rng.uniform(0.65, 1)
    shear = rng.uniform(-0.15, 0.15)
    tilt = rng.uniform(-0.15, 0.15, 2)  # perspective: one end nearer than the other
    if above:
        squeeze, shear, tilt = 1, 0, tilt * 0
    rotation = np.array([(math.cos(t), -math.sin(t)), (math.sin(t), math.cos(t))])
    turned = rotation @ [(flip, shear), (0, squeeze)]
    values = []
    for r in ranges:
        whole = isinstance(r, range)
        values.append(rng.integers(r.start, r.stop) if whole else rng.uniform(*r))
    if name == "polygon":
        values = [rng.uniform(0.5, 1, values)]  # as many radii
    shapes = [np.array(p) for p in outline(*values)]
    shapes = [p / (1 + p @ tilt)[:, None] @ turned.T for p in shapes]
    low = shapes[0].min(0)
    extent = np.ptp(shapes[0], 0)
    scale = side / extent.max()
    w, h = (math.ceil(e * scale) + 2 for e in extent)
    at = rng.uniform(0.5, 1.5, 2)  # a sub-pixel position, with room for a soft edge
    shapes = [((p - low) * scale + at) * OVERSAMPLE for p in shapes]
    cover = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
    for i, p in enumerate(shapes):
        ImageDraw.Draw(cover).polygon(p.ravel().tolist(), fill=0 if i else 255)
    return np.asarray(cover.reduce(OVERSAMPLE)), shapes


def overlap(x, y, shape, px):
    """A patch of `shape` at (x, y) of a px x px canvas -> where it lies on it, and which part of
    the patch that is."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + shape[1], px), min(y + shape[0], px)
    return np.s_[y0:y1, x0:x1], np.s_[y0 - y : y1 - y, x0 - x : x1 - x]


def tight_box(visible):
    """Smallest (x0, y0, x1, y1) around the true pixels of (H, W); far edges are exclusive, as in
    COCO."""
    xs = np.flatnonzero(visible.any(0))
    ys = np.flatnonzero(visible.any(1))
    if not len(xs):
        return 0, 0, 0, 0
    return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1


def recognisable(visible, pixels):
    """Whether enough of an object of so many pixels is in view (H, W)."""
    x0, y0, x1, y1 = tight_box(visible)
    return min(x1 - x0, y1 - y0) >= SMALLEST and np.count_nonzero(visible) >= SEEN * pixels


def cast_of(rng, part, index):
    """[(label, name)] of the things in an image, from back to front; label -1: of no class."""
    spec = PARTS[part]
    count = 0
    if rng.random() >= spec["empty"]:
        count = rng.integers(*spec["objects"], endpoint=True)
    labels = rng.integers(spec["classes"], size=count).tolist()
    if part in ALIKE:  # in turn: equally full folders
        labels = [index % spec["classes"]] * len(labels)
    kinds = ["polygon", "blob", "stroke"]
    under = rng.choice(kinds, rng.integers(*spec["under"], endpoint=True)).tolist()
    cast = [(-1, name) for name in under] + [(k, ALL_CLASSES[k]) for k in labels]
    return cast + [(-1, "stroke")] * rng.integers(*spec["over"], endpoint=True)


def scene(rng, part, index):
    """-> items in the order they are painted, dict(label, cover, shapes, x, y); owner (px, px)
    uint8: 1 + position in `items` of the object seen at each pixel, 0 where there is none."""
    px = PARTS[part]["px"]
    items = []
    owner = np.zeros((px, px), np.uint8)
    sizes = {}  # 1 + position in items -> pixels of that object, those outside the image included
    for label, name in cast_of(rng, part, index):
        small, large = PARTS[part]["side"]
        if label < 0:
            small, large = THING_SIDE
            if part in DOMAINS:
                small, large = small * 2 / 3, large * 2 / 3
        for _ in range(8):  # after eight failures it is too crowded: one thing fewer
            side = math.exp(rng.uniform(math.log(small), math.log(large)))
            cover, shapes = cut_out(name, side, rng, part == "aerial")
            x, y = position(rng, part, label, cover.shape, px)
            solid = cover >= 128
            canvas, inside = overlap(x, y, cover.shape, px)
            number = len(items) + 1
            trial = owner.copy()
            trial[canvas][solid[inside]] = number if label >= 0 else 0
            pixels = dict(sizes)
            if label >= 0:
                pixels[number] = np.count_nonzero(solid)
            # Every object must stay recognisable: so all that are painted are annotated.
            if all(recognisable(trial == i, n) for i, n in pixels.items()):
                items.append(dict(label=label, cover=cover, shapes=shapes, x=x, y=y))
                owner, sizes = trial, pixels
                break
    return items, owner


def position(rng, part, label, shape, px):
    h, w = shape
    if part in ALIKE and part != "aerial" and label >= 0:  # about the middle
        return tuple(int((px - n) / 2 + rng.uniform(-0.12, 0.12) * px) for n in (w, h))
    # up to 15% of either side may lie outside
    return tuple(int(rng.uniform(-0.15 * n, px - 0.85 * n)) for n in (w, h))


# ---- paint: how it looks -------------------------------------------------------------------------


def pattern(kind, rng, shape, period):
    """Blend map (h, w) float32, about 0..1, between two colours."""
    h, w = shape
    if kind == "plain":
        return np.zeros(shape, np.float32)
    if kind in ("clouds", "grass"):  # a coarse grid, smoothly enlarged; grass along one axis
        if kind == "clouds":
            n = rng.integers(3, 8, 2)
        else:
            n = int(rng.integers(2, 6))
            n = (h // n + 1, w // 2) if rng.random() < 0.5 else (h // 2, w // n + 1)
        grid = Image.fromarray(rng.random(n).astype(np.float32))
        return np.asarray(grid.resize((w, h), Image.Resampling.BICUBIC))
    if kind == "quilt":
        return np.kron(rng.random((8, 8), np.float32), np.ones((h // 8, w // 8), np.float32))
    t = rng.uniform(0, math.pi)
    k = 2 * math.pi / period
    pa, pb = rng.uniform(0, 6, 2)
    y = (k * np.arange(h, dtype=np.float32))[:, None]
    x = k * np.arange(w, dtype=np.float32)
    a = x * math.cos(t) + y * math.sin(t) + float(pa)  # phases of two waves at right angles, in a
    b = y * math.cos(t) - x * math.sin(t) + float(pb)  # random direction
    if kind == "ramp":
        return 0.5 + (a - a.mean()) / np.ptp(a)
    if kind == "stripes":
        return np.clip(0.5 + 1.5 * np.sin(a), 0, 1)
    if kind == "dots":
        return np.clip(2 * np.cos(a) * np.cos(b) - 0.3, 0, 1)
    if kind == "fabric":
        return 0.5 + 0.25 * np.sin(a + np.sin(b * 0.3)) + 0.25 * np.sin(b + np.sin(a * 0.3))
    return np.clip(0.5 + 3 * np.sin(a) * np.sin(b), 0, 1)  # tiles


def slope(light, h, w):
    """Brightness (h, w, 1) float32, from about 1 on the side of the light to about -1."""
    x, y = (np.arange(n, dtype=np.float32) * 2 / n - 1 for n in (w, h))
    return (x * float(light[0]) + y[:, None] * float(light[1]))[..., None]


def colour(rng, away_from=None):
    """A random colour (3,) float32; with `away_from`, a brightness, one that stands out from it."""
    for _ in range(20):
        r, g, b, vivid = rng.random(4).tolist()  # plain floats: this runs twenty times an image
        grey = (r + g + b) / 3
        vivid = 0.2 + 0.8 * vivid
        if away_from is None or abs(15 + 225 * grey - away_from) >= CONTRAST:
            channels = [15 + 225 * (grey + vivid * (c - grey)) for c in (r, g, b)]
            return np.array(channels, np.float32)
    return np.full(3, 30 if away_from > 127 else 225, np.float32)


def paint(rng, part, items):
    """-> PIL RGB image: textured ground, textured and shaded items, light, noise, blur."""
    px = PARTS[part]["px"]
    mix = PARTS[part]["ground"]
    kind = str(rng.choice([kind for kind, weight in mix.items() for _ in range(weight)]))
    first = colour(rng)
    second = (first + rng.normal(0, 45, 3)).clip(0, 255).astype(np.float32)
    blend = pattern(kind, rng, (px, px), rng.uniform(8, 40))[..., None]
    canvas = first + blend * (second - first)  # (px, px, 3)
    light = rng.uniform(-1, 1, 2)  # towards it
    for item in items:
        paint_item(rng, canvas, item, light)
    contrast = float(rng.uniform(0.6, 1.1))
    canvas *= contrast + 0.15 * contrast * slope(light, px, px)
    canvas += 128 * (1 - contrast) + float(rng.uniform(-25, 25))
    if rng.random() < 0.6:
        canvas += float(rng.uniform(2, 12)) * rng.standard_normal((px, px, 1), np.float32)
    image = Image.fromarray(canvas.clip(0, 255, out=canvas).astype(np.uint8))
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9)))
    return image


def paint_item(rng, canvas, item, light):
    """Paints an item on the canvas (px, px, 3), perhaps with a shadow and an edge."""
    px = len(canvas)
    h, w = item["cover"].shape
    soft = item["cover"][..., None] / np.float32(255)  # (h, w, 1)
    if rng.random() < 0.4:  # shadow: the same cover, away from the light, under the item itself
        x, y = item["x"] - round(3 * light[0]), item["y"] - round(3 * light[1])
        at, inside = overlap(x, y, (h, w), px)
        canvas[at] *= 1 - float(rng.uniform(0.2, 0.5)) * soft[inside]
    at, inside = overlap(item["x"], item["y"], (h, w), px)
    ground = canvas[at]  # a view: painting on it paints on the canvas
    first, second = (colour(rng, float(ground.mean())) for _ in range(2))
    kind = FILLS[rng.integers(len(FILLS))]
    if kind == "dots" and item["label"] < 0:  # a dotted blob would look like a button
        kind = "plain"
    period = max(4, max(h, w) * rng.uniform(0.12, 0.4))
    blend = pattern(kind, rng, (h, w), period)[..., None]
    look = first + blend * (second - first) * float(rng.uniform(0.4, 1))
    if rng.random() < 0.35:
        edge = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
        pen = ImageDraw.Draw(edge)
        width = int(rng.integers(3, 7))
        for p in item["shapes"]:
            pen.line(np.concatenate([p, p[:1]]).ravel().tolist(), fill=255, width=width)
        line = np.asarray(edge.reduce(OVERSAMPLE))[..., None] / np.float32(255)
        look += line * (first * float(rng.choice([0.35, 1.5])) - look)
    look *= 1 + 0.2 * slope(light, h, w)
    ground += soft[inside] * (look[inside] - ground)


def lines(rng, part, items):
    """-> PIL RGB image: the outlines of the items, drawn by hand. sketch: a pencil, once or twice
    along each, on paper of some grain; strokes: a pen, pixels black or white."""
    px = PARTS[part]["px"]
    sketch = part == "sketch"
    strength, width = 255, None
    if sketch:
        strength = int(rng.integers(150, 256))
        width = int(rng.integers(3, 7))
    else:
        width = int(rng.integers(7, 14))
    ink = np.zeros((px, px), np.uint8)
    for item in items:
        drawn = Image.new("L", (px * OVERSAMPLE, px * OVERSAMPLE))
        pen = ImageDraw.Draw(drawn)
        for p in item["shapes"]:
            p = p + np.array([item["x"], item["y"]]) * OVERSAMPLE
            times = rng.integers(1, 3) if sketch else 1
            for _ in range(times):  # a shaky hand: corners are missed, ends do not quite meet
                hand = p + rng.normal(0, 0.015 * np.ptp(p, 0).max(), p.shape)
                hand = np.concatenate([hand, hand[:1] + rng.normal(0, 2, 2)])
                pen.line(hand.ravel().tolist(), fill=strength, width=width, joint="curve")
        near = Image.new("L", (px, px))
        near.paste(Image.fromarray(item["cover"]), (item["x"], item["y"]))
        # a hole may reach out of what it is cut from
        near = np.asarray(near.filter(ImageFilter.MaxFilter(7))) >= 128
        ink = np.maximum(ink, np.asarray(drawn.reduce(OVERSAMPLE)) * near)
    ink = ink[..., None] / np.float32(255)  # (px, px, 1)
    if not sketch:
        return Image.fromarray((255 * (ink < 0.5)).astype(np.uint8).repeat(3, 2))
    paper = rng.uniform(205, 255) + rng.normal(0, 6, 3)
    lead = rng.uniform(20, 110)
    grain = rng.uniform(2, 6) * rng.standard_normal((px, px, 1))
    canvas = paper + grain - 20 * pattern("clouds", rng, (px, px), 0)[..., None]
    return Image.fromarray((canvas + ink * (lead - canvas)).clip(0, 255).astype(np.uint8))


def draw(seed, split, index, part="det"):
    """-> PIL RGB image; boxes (N, 4) float32 xyxy of the visible pixels; labels (N,) int64 into
    ALL_CLASSES; mask (H, W) uint8 with 0 = background and k + 1 = class k. N may be 0."""
    stream, _ = PARTS[part]["splits"][split]
    items, owner = scene(np.random.default_rng((seed, stream, index)), part, index)
    rng = np.random.default_rng((seed, stream, index, 1))
    image = lines(rng, part, items) if part in ("sketch", "strokes") else paint(rng, part, items)
    labels = np.array([item["label"] for item in items], np.int64)
    mask = np.concatenate([[0], labels + 1]).astype(np.uint8)[owner]
    objects = np.flatnonzero(labels >= 0)
    boxes = np.array([tight_box(owner == i + 1) for i in objects], np.float32).reshape(-1, 4)
    return image, boxes, labels[objects], mask


# ---- files ---------------------------------------------------------------------------------------


def build(root, part="det", sizes=None, seed=SEED):
    """Draws one part below `root`, unless it is there with the same version, seed and sizes -> its
    folder. sizes, e.g. {"train": 20, "val": 10}, overrides the number of images of some splits."""
    numbers = {split: count for split, (_, count) in PARTS[part]["splits"].items()}
    assert set(sizes or ()) <= set(numbers), f"part {part} has no such split: {list(sizes)}"
    numbers |= sizes or {}
    wanted = dict(version=VERSION, seed=seed, part=part, sizes=numbers)
    folder = Path(root) / part
    if present(folder) == wanted:
        return folder
    print(f"drawing {sum(numbers.values())} images into {folder}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder is either complete or not ours: files are drawn beside it and moved in one step.
    with tempfile.TemporaryDirectory(prefix=f".{part}-", dir=root) as work:
        new = Path(work) / "new"  # not `work` itself, which only its owner may read
        new.mkdir()
        for split, count in numbers.items():
            write_split(new, part, split, count, seed)
        (new / "world.json").write_text(json.dumps(wanted))
        there = present(folder)
        if there not in (None, wanted):
            folder.rename(Path(work) / "old")
        if there != wanted:  # else another process was faster: keep its copy, someone may read it
            new.rename(folder)
    return folder


def present(folder):
    """What the folder holds, None if there is none; refuses one that was not made here."""
    if not folder.exists():
        return None
    if not (folder / "world.json").exists():
        raise FileExistsError(f"{folder} has no world.json, so it is not ours: give another root")
    return json.loads((folder / "world.json").read_text())


def write_split(folder, part, split, count, seed):
    """The images of a split, in class folders or with COCO's or VOC's files beside them."""
    for name in ALL_CLASSES:  # also of classes without an image: class numbers stay the same
        path = folder / FILES[part].format(split=split, name=name, i=0)
        path.parent.mkdir(parents=True, exist_ok=True)
    images = []
    annotations = []
    first = 1 + 1_000_000 * PARTS[part]["splits"][split][0]  # ids are unique across splits
    for index in range(count):
        image, boxes, labels, mask = draw(seed, split, index, part)
        name = ALL_CLASSES[labels.max(initial=0)]
        path = folder / FILES[part].format(split=split, name=name, i=index)
        image.save(path, quality=90)
        size = dict(width=image.width, height=image.height)
        images.append(dict(id=first + index, file_name=path.name, **size))
        if part == "seg":
            (folder / "SegmentationClass").mkdir(exist_ok=True)
            save_mask(mask, folder / "SegmentationClass" / f"{path.stem}.png")
        if part == "det":
            for (x0, y0, x1, y1), k in zip(boxes.tolist(), labels.tolist()):
                # (pixels of a neighbour of the same class count too: area only sorts by size)
                pixels = mask[int(y0) : int(y1), int(x0) : int(x1)] == k + 1
                row = dict(id=first + len(annotations), image_id=first + index)
                row.update(category_id=CATEGORY_IDS[k], bbox=[x0, y0, x1 - x0, y1 - y0])
                row.update(area=int(np.count_nonzero(pixels)), iscrowd=0)
                annotations.append(row)
    if part == "seg":
        write_lists(folder, split, [Path(image["file_name"]).stem for image in images])
    if part == "det":
        names = zip(CATEGORY_IDS, CLASSES)
        categories = [dict(id=i, name=name, supercategory="shape") for i, name in names]
        value = dict(info=dict(description="embedded world", version=VERSION), images=images)
        value.update(annotations=annotations, categories=categories)
        (folder / f"{split}.json").write_text(json.dumps(value))


def write_lists(folder, split, names):
    """VOC's lists of a split (train and aug are also in trainaug), and the names of the classes."""
    place = folder / "ImageSets/Segmentation"
    place.mkdir(parents=True, exist_ok=True)
    lists = [split]
    if split in ("train", "aug"):
        lists.append("trainaug")
    for name in lists:
        with open(place / f"{name}.txt", "a") as file:
            file.writelines(f"{stem}\n" for stem in names)
    classes = ["background", *CLASSES[: PARTS["seg"]["classes"]]]
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")


def save_mask(mask, path):
    """(H, W) uint8 class indices as a PNG with PASCAL VOC's palette: the bits of an index, three at
    a time, are the highest bits of red, green and blue."""
    palette = []
    for k in range(256):
        for channel in range(3):
            palette.append(sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)))
    image = Image.fromarray(mask)
    image.putpalette(palette)  # makes it a palette image of the same indices
    image.save(path, "PNG")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    parser.add_argument("root", help="folder to draw the parts in, such as datasets/shapes")
    root = parser.parse_args(argv).root
    for part in PARTS:
        try:
            folder = build(root, part)
        except OSError as error:  # a folder that is not ours, no rights, a full disk
            raise UserError(f"cannot draw the embedded world in {root}: {error}") from None
        print(f"{folder}: {present(folder)['sizes']}")


if __name__ == "__main__":
    run(main)
