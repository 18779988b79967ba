"""The embedded world: small drawn pictures that play the data sets of both papers, so that everything runs offline.

    python world.py ROOT                 # draws all parts (about a minute on one core) and prints what is there

part         plays the role of                       what is in it
`det`        COCO: the labelled target task          128 px, 0-5 objects of 8 classes, exact boxes
`seg`        PASCAL VOC: segmentation                64 px, 0-2 objects of 4 classes, a mask each, in VOC's layout;
                                                     `train` is small, `aug` as large as a pool for pseudo-labels must be
`single`     ImageNet: pre-training, joint training  96 px, one large object of 12 classes (4 are new), class folders;
                                                     `extra` is JFT's: more of the same, used without labels
`unlabeled`  Open Images: pool for pseudo-labels     128 px, those 4 classes mixed in, more empty images
`photo`, `sketch`, `strokes`, `aerial`: HPT's domains     64 px, the 12 classes in four styles, class folders with a test split

A class is an outline and its parts (holes, bars, teeth); colour, texture, size, pose and viewpoint are drawn at random
and say nothing about it. Each part has its own mix of backgrounds: pools related to the target, but not copies of it.
Object sizes, rotations, fills and contrast were set once, by how fast a purely supervised detector learns on `det` in a
few minutes of CPU: three settings were tried, on supervised AP alone, before any self-training result was looked at.
They have been frozen since, and are not tuned to make a method win. Those of `seg` are by another criterion, that labels and not
steps limit a supervised net (see studies.SETTINGS); students were trained in some of these trials, and seen.

An image is a function of (seed, split, index) alone; another Pillow or numpy release may move a few pixels. What is
written is plain JPEG, COCO json and PASCAL VOC masks, which are read by the same code as the real data sets. Not imitated:
long-tailed class frequencies, crowd regions, annotation errors, perspective between objects.
"""
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 3  # raise it with any change that alters an image: caches are then drawn afresh
SEED = 2020


# ---- Outlines: polygons (N, 2) in about [-1, 1]; the first of a list is filled, the others are holes in it -----------

def polar(radii):
    t = np.arange(len(radii)) * (math.tau / len(radii))
    return np.c_[radii * np.cos(t), radii * np.sin(t)]


def circle(r=1.0, x=0.0, y=0.0, n=28):
    return polar(np.full(n, r)) + (x, y)


def panes(*gaps):
    return [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, x1 in gaps for y0, y1 in gaps]


# name: (category id with gaps, as in COCO (None: never annotated), largest rotation in degrees, ranges of the outline's
# parameters, parameters -> polygons)
CAST = {
    "ring":      (1,   180, [(.42, .68)], lambda r: [circle(), circle(r)]),
    "button":    (2,   180, [(.30, .40), (.15, .20)],
                  lambda d, r: [circle(), *(circle(r, x, y, 10) for x in (-d, d) for y in (-d, d))]),
    "triangle":  (3,    30, [(-.6, .6)], lambda x: [[(x, -1), (1, .8), (-1, .8)]]),
    "star":      (5,    30, [(.36, .50)], lambda r: [polar(np.tile([1, r], 5))]),
    "cross":     (8,    30, [(.20, .36)], lambda a: [[(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a),
                                                     (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a)]]),
    "crescent":  (13,   30, [(.78, .95), (.45, .62)], lambda r, x: [circle(), circle(r, x)]),
    "window":    (21,   30, [(.68, .80), (.09, .15)], lambda e, b: panes((-1, 1)) + panes((-e, -b), (b, e))),
    "arrow":     (34,   30, [(.14, .28), (.60, .80), (-.15, .25)],
                  lambda a, h, neck: [[(-1, -a), (neck, -a), (neck, -h), (1, 0), (neck, h), (neck, a), (-1, a)]]),
    # from here on: known to `single`, unknown to `det`
    "heart":     (None, 60, [(1, 3)], lambda k, t=np.arange(32) * (math.tau / 32): [np.c_[
                  np.sin(t) ** 3, (13 * np.cos(t) - 5 * np.cos(2 * t) - k * np.cos(3 * t) - np.cos(4 * t)) / -15]]),
    "hourglass": (None, 180, [(.06, .16), (.65, .90)],
                  lambda a, b: [[(-b, -1), (b, -1), (a, 0), (b, 1), (-b, 1), (-a, 0)]]),
    "frame":     (None, 30, [(.68, .80), (.09, .15)], lambda e, _: panes((-1, 1)) + panes((-e, e))),
    "gear":      (None, 180, [(.70, .80), range(8, 11), (.20, .38)],
                  lambda r, teeth, hole: [polar(np.tile([1, 1, r, r], teeth)), circle(hole, n=16)]),
}
THINGS = {   # of no class
    "polygon": (None, 180, [range(4, 8)], lambda radii: [polar(radii)]),   # never 3 corners: that would be a triangle
    "blob":    (None, 180, [(0, .15), (0, 6), (0, .12), (0, 6)], lambda a, p, b, q, t=np.arange(24) * (math.tau / 24): [
                  polar(.75 + a * np.cos(2 * t + p) + b * np.cos(3 * t + q))]),
    "stroke":  (None, 180, [(.03, .08), (-.4, .4)], lambda a, bend, x=np.linspace(-1, 1, 9): [
                  np.r_[np.c_[x, bend * x ** 2 - a], np.c_[x, bend * x ** 2 + a][::-1]]]),
}
ALL_CLASSES = list(CAST)
CLASSES = [name for name, (category, *_) in CAST.items() if category]
CATEGORY_IDS = [CAST[name][0] for name in CLASSES]

# px: image side; splits: name -> (random stream, images); classes: how many of CAST may appear; objects, side: ranges
# (the side in px, log-uniform); under, over: ranges of things of no class behind and in front; then the background mix
PARTS = {
    "det": dict(px=128, splits=dict(train=(0, 2000), val=(1, 500)), classes=8, objects=(1, 5), side=(22, 72), empty=.03,
                under=(1, 3), over=(0, 1), ground=dict(clouds=3, ramp=2, fabric=2, grass=2, quilt=1)),
    "seg": dict(px=64, splits=dict(train=(5, 300), aug=(7, 2000), val=(6, 400)), classes=4, objects=(1, 2), side=(32, 56),
                empty=.03, under=(0, 0), over=(0, 0), ground=dict(clouds=3, ramp=2, fabric=2, grass=2, quilt=1)),
    "single": dict(px=96, splits=dict(train=(2, 3000), extra=(8, 3000), val=(3, 600)), classes=12, objects=(1, 1), side=(40, 80),
                   empty=0, under=(0, 3), over=(0, 1), ground=dict(clouds=1, ramp=2, tiles=3, quilt=2)),
    "unlabeled": dict(px=128, splits=dict(train=(4, 4000)), classes=12, objects=(1, 5), side=(22, 72), empty=.10,
                      under=(1, 3), over=(0, 1), ground=dict(clouds=2, ramp=1, fabric=1, grass=1, quilt=2, tiles=2)),
}
# Domains of the second paper: how the classes look, the rest as in `single`. Written down once, before any result was looked at.
#   photo    textured and shaded, as `single`           sketch   pencil outlines on paper
#   strokes  a thick pen, black on white, nothing else  aerial   one to three small ones of a class from above, turned anyhow
DOMAINS = {
    "photo": dict(side=(26, 52), under=(0, 2), over=(0, 1), ground=dict(clouds=1, ramp=2, tiles=3, quilt=2)),
    "sketch": dict(side=(30, 56), under=(0, 1), over=(0, 0)),
    "strokes": dict(side=(36, 58), under=(0, 0), over=(0, 0)),
    "aerial": dict(side=(14, 24), objects=(1, 3), under=(0, 2), over=(0, 0), ground=dict(grass=3, fabric=1, quilt=2, clouds=1)),
}
for stream, name in enumerate(DOMAINS):
    PARTS[name] = {**PARTS["single"], "px": 64, **DOMAINS[name], "splits": {
        split: (10 + 3 * stream + k, n) for k, (split, n) in enumerate(dict(train=1500, val=300, test=300).items())}}
ALIKE = ["single", *DOMAINS]   # all objects of an image are of one class, which is its folder
FILES = {"seg": "JPEGImages/{split}_{i:05d}.jpg",
         "det": "images/{split}_{i:05d}.jpg", "single": "{split}/{name}/{i:05d}.jpg", "unlabeled": "{i:05d}.jpg",
         **dict.fromkeys(DOMAINS, "{split}/{name}/{i:05d}.jpg"), "strokes": "{split}/{name}/{i:05d}.png"}
THING_SIDE = (22, 60)   # px, things of no class; in domains two thirds of it
SEEN = 0.4       # an object keeps at least this share of its pixels in view, else the newcomer is placed anew
SMALLEST = 6     # and what is in view is at least this wide and high, in pixels
CONTRAST = 60    # smallest difference in brightness, of 255, between an object's colours and the mean of what it covers
FILLS = ["plain", "plain", "plain", "ramp", "ramp", "ramp", "stripes", "clouds", "tiles", "dots"]
OVERSAMPLE = 3   # outlines are filled at this multiple and averaged down


# ---- Scene: what is where --------------------------------------------------------------------------------------------

def cut_out(name, side, rng, above=False):
    """A random member of a class, posed so that its longer side is `side` pixels -> (h, w) uint8 coverage, contours. above: seen
    from there, so turned anyhow, but not foreshortened."""
    _, turn, ranges, polygons = (CAST | THINGS)[name]
    turn = 180 if above else turn
    t, flip = rng.uniform(-turn, turn) * math.pi / 180, rng.choice([-1, 1])
    squeeze, shear = rng.uniform(.65, 1), rng.uniform(-.15, .15)
    tilt = rng.uniform(-.15, .15, 2)   # perspective: one end nearer than the other
    squeeze, shear, tilt = (1, 0, tilt * 0) if above else (squeeze, shear, tilt)
    turned = np.array([(math.cos(t), -math.sin(t)), (math.sin(t), math.cos(t))]) @ [(flip, shear), (0, squeeze)]
    values = [rng.integers(r.start, r.stop) if isinstance(r, range) else rng.uniform(*r) for r in ranges]
    if name == "polygon":
        values = [rng.uniform(.5, 1, values)]   # as many radii
    shapes = [p / (1 + p @ tilt)[:, None] @ turned.T for p in map(np.array, polygons(*values))]
    low, extent = shapes[0].min(0), np.ptp(shapes[0], 0)
    scale = side / extent.max()
    w, h = (math.ceil(e * scale) + 2 for e in extent)
    at = rng.uniform(.5, 1.5, 2)   # a sub-pixel position, with room for a soft edge
    shapes = [((p - low) * scale + at) * OVERSAMPLE for p in shapes]
    cover = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
    for i, p in enumerate(shapes):
        ImageDraw.Draw(cover).polygon(p.ravel().tolist(), fill=0 if i else 255)
    return np.asarray(cover.reduce(OVERSAMPLE)), shapes


def overlap(x, y, shape, px):
    """A patch of `shape` at (x, y) of a px x px canvas -> where it lies on it, and which part of the patch that is."""
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
    """-> items in the order they are painted, dict(label, cover, shapes, x, y) with label -1 for things of no class;
    owner (px, px) uint8: 1 + position in `items` of the object seen at each pixel, 0 where there is none."""
    spec, px = PARTS[part], PARTS[part]["px"]
    count = 0 if rng.random() < spec["empty"] else rng.integers(*spec["objects"], endpoint=True)
    labels = rng.integers(spec["classes"], size=count).tolist()
    labels = [index % spec["classes"]] * len(labels) if part in ALIKE else labels   # in turn: equally full folders
    under = rng.choice(["polygon", "blob", "stroke"], rng.integers(*spec["under"], endpoint=True)).tolist()
    todo = [(-1, name) for name in under] + [(k, ALL_CLASSES[k]) for k in labels]
    todo += [(-1, "stroke")] * rng.integers(*spec["over"], endpoint=True)

    items, owner = [], np.zeros((px, px), np.uint8)
    own = {}   # position in `items` + 1 -> pixels of that object, those outside the image included
    for label, name in todo:
        small, large = spec["side"] if label >= 0 else THING_SIDE if part not in DOMAINS else [n * 2 / 3 for n in THING_SIDE]
        for _ in range(8):
            cover, shapes = cut_out(name, math.exp(rng.uniform(math.log(small), math.log(large))), rng, part == "aerial")
            h, w = cover.shape
            if part in ALIKE and part != "aerial" and label >= 0:
                x, y = (int((px - n) / 2 + rng.uniform(-.12, .12) * px) for n in (w, h))
            else:   # up to 15% of either side may lie outside
                x, y = (int(rng.uniform(-.15 * n, px - .85 * n)) for n in (w, h))
            solid, canvas, inside = cover >= 128, *overlap(x, y, cover.shape, px)
            trial, pixels = owner.copy(), dict(own)
            trial[canvas][solid[inside]] = len(items) + 1 if label >= 0 else 0
            if label >= 0:
                pixels[len(items) + 1] = np.count_nonzero(solid)
            # Every object must stay recognisable, the newcomer included: so all that are painted are annotated.
            if all(fits(trial == i, n) for i, n in pixels.items()):
                items.append(dict(label=label, cover=cover, shapes=shapes, x=x, y=y))
                owner, own = trial, pixels
                break   # after eight failures it is too crowded, and the image has one thing fewer
    return items, owner


# ---- Paint: how it looks ---------------------------------------------------------------------------------------------

def pattern(kind, rng, shape, period):
    """Blend map (h, w) float32, about 0..1, between two colours."""
    h, w = shape
    if kind == "plain":
        return np.zeros(shape, np.float32)
    if kind in ("clouds", "grass"):   # a coarse grid, smoothly enlarged; for grass a fine one, drawn out along one axis
        n = rng.integers(3, 8, 2) if kind == "clouds" else int(rng.integers(2, 6))
        if kind == "grass":
            n = (h // n + 1, w // 2) if rng.random() < .5 else (h // 2, w // n + 1)
        return np.asarray(Image.fromarray(rng.random(n).astype(np.float32)).resize((w, h), Image.Resampling.BICUBIC))
    if kind == "quilt":
        return np.kron(rng.random((8, 8), np.float32), np.ones((h // 8, w // 8), np.float32))
    # a, b: phases of two waves at right angles, in a random direction
    t, k, (pa, pb) = rng.uniform(0, math.pi), 2 * math.pi / period, rng.uniform(0, 6, 2)
    y, x = (k * np.arange(h, dtype=np.float32))[:, None], k * np.arange(w, dtype=np.float32)
    a, b = x * math.cos(t) + y * math.sin(t) + float(pa), y * math.cos(t) - x * math.sin(t) + float(pb)
    return {
        "ramp": lambda: .5 + (a - a.mean()) / np.ptp(a),
        "stripes": lambda: np.clip(.5 + 1.5 * np.sin(a), 0, 1),
        "dots": lambda: np.clip(2 * np.cos(a) * np.cos(b) - .3, 0, 1),
        "fabric": lambda: .5 + .25 * np.sin(a + np.sin(b * .3)) + .25 * np.sin(b + np.sin(a * .3)),
        "tiles": lambda: np.clip(.5 + 3 * np.sin(a) * np.sin(b), 0, 1),
    }[kind]()


def slope(light, h, w):
    """Brightness (h, w, 1) float32, from about 1 on the side of the light to about -1."""
    x, y = (np.arange(n, dtype=np.float32) * 2 / n - 1 for n in (w, h))
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
    """-> PIL RGB image: textured ground, textured and shaded items, some with shadows and edges; light, noise, blur."""
    px, mix = PARTS[part]["px"], PARTS[part]["ground"]
    kind = str(rng.choice([kind for kind, weight in mix.items() for _ in range(weight)]))
    first = colour(rng)
    second = (first + rng.normal(0, 45, 3)).clip(0, 255).astype(np.float32)
    canvas = first + pattern(kind, rng, (px, px), rng.uniform(8, 40))[..., None] * (second - first)   # (px, px, 3)
    light = rng.uniform(-1, 1, 2)   # towards it

    for item in items:
        soft = item["cover"][..., None] / np.float32(255)   # (h, w, 1)
        h, w = item["cover"].shape
        if rng.random() < .4:   # shadow: the same cover, away from the light, under the item itself
            at, inside = overlap(item["x"] - round(3 * light[0]), item["y"] - round(3 * light[1]), (h, w), px)
            canvas[at] *= 1 - float(rng.uniform(.2, .5)) * soft[inside]
        at, inside = overlap(item["x"], item["y"], (h, w), px)
        ground = canvas[at]     # a view: painting on it paints on the canvas
        first, second = (colour(rng, float(ground.mean())) for _ in range(2))
        kind = FILLS[rng.integers(len(FILLS))]
        kind = "plain" if kind == "dots" and item["label"] < 0 else kind   # a dotted blob would look like a button
        period = max(4, max(h, w) * rng.uniform(.12, .4))
        look = first + pattern(kind, rng, (h, w), period)[..., None] * (second - first) * float(rng.uniform(.4, 1))
        if rng.random() < .35:
            edge = Image.new("L", (w * OVERSAMPLE, h * OVERSAMPLE))
            pen, width = ImageDraw.Draw(edge), int(rng.integers(3, 7))
            for p in item["shapes"]:
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


def lines(rng, part, items):
    """-> PIL RGB image: the outlines of the items, drawn by hand. `sketch`: a pencil, once or twice along each, on paper of some
    grain; `strokes`: a pen, pixels black or white."""
    px, sketch = PARTS[part]["px"], part == "sketch"
    strength, width = (int(rng.integers(150, 256)), int(rng.integers(3, 7))) if sketch else (255, int(rng.integers(7, 14)))
    ink = np.zeros((px, px), np.uint8)
    for item in items:
        drawn, near = Image.new("L", (px * OVERSAMPLE, px * OVERSAMPLE)), Image.new("L", (px, px))
        pen = ImageDraw.Draw(drawn)
        for p in item["shapes"]:
            p = p + np.array([item["x"], item["y"]]) * OVERSAMPLE
            for _ in range(rng.integers(1, 3) if sketch else 1):   # a shaky hand: corners are missed, ends do not quite meet
                hand = p + rng.normal(0, .015 * np.ptp(p, 0).max(), p.shape)
                hand = np.concatenate([hand, hand[:1] + rng.normal(0, 2, 2)])
                pen.line(hand.ravel().tolist(), fill=strength, width=width, joint="curve")
        near.paste(Image.fromarray(item["cover"]), (item["x"], item["y"]))   # a hole may reach out of what it is cut from
        near = np.asarray(near.filter(ImageFilter.MaxFilter(7))) >= 128
        ink = np.maximum(ink, np.asarray(drawn.reduce(OVERSAMPLE)) * near)
    ink = ink[..., None] / np.float32(255)   # (px, px, 1)
    if not sketch:
        return Image.fromarray((255 * (ink < .5)).astype(np.uint8).repeat(3, 2))
    paper, lead = rng.uniform(205, 255) + rng.normal(0, 6, 3), rng.uniform(20, 110)
    canvas = paper + rng.uniform(2, 6) * rng.standard_normal((px, px, 1)) - 20 * pattern("clouds", rng, (px, px), 0)[..., None]
    return Image.fromarray((canvas + ink * (lead - canvas)).clip(0, 255).astype(np.uint8))


def draw(seed, split, index, part="det"):
    """-> PIL RGB image; boxes (N, 4) float32 xyxy of the visible pixels; labels (N,) int64 into ALL_CLASSES, of which
    CLASSES is the beginning; mask (H, W) uint8 with 0 = background and k + 1 = class k. N may be 0."""
    stream, _ = PARTS[part]["splits"][split]
    items, owner = scene(np.random.default_rng((seed, stream, index)), part, index)
    image = (lines if part in ("sketch", "strokes") else paint)(np.random.default_rng((seed, stream, index, 1)), part, items)
    labels = np.array([item["label"] for item in items], np.int64)
    mask = np.concatenate([[0], labels + 1]).astype(np.uint8)[owner]
    objects = np.flatnonzero(labels >= 0)
    boxes = np.array([tight_box(owner == i + 1) for i in objects], np.float32).reshape(-1, 4)
    return image, boxes, labels[objects], mask


# ---- Files -----------------------------------------------------------------------------------------------------------

def write(folder, part, sizes, seed):
    """The images, in class folders for `single` and the domains; for `det` also a COCO json per split."""
    for split, count in sizes.items():
        for name in ALL_CLASSES:   # folders also of classes without an image: class numbers never depend on the sizes
            (folder / FILES[part].format(split=split, name=name, i=0)).parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        first = 1 + 1_000_000 * PARTS[part]["splits"][split][0]   # ids are unique across splits
        for index in range(count):
            image, boxes, labels, mask = draw(seed, split, index, part)
            path = folder / FILES[part].format(split=split, name=ALL_CLASSES[labels.max(initial=0)], i=index)
            image.save(path, quality=90)
            if part == "seg":
                (folder / "SegmentationClass").mkdir(exist_ok=True)
                save_mask(mask, folder / "SegmentationClass" / f"{path.stem}.png")
            images.append(dict(id=first + index, file_name=path.name, width=image.width, height=image.height))
            for (x0, y0, x1, y1), k in zip(boxes.tolist(), labels.tolist()) if part == "det" else ():
                # (pixels of an overlapping neighbour of the same class count too: `area` only sorts objects by size)
                area = int(np.count_nonzero(mask[int(y0):int(y1), int(x0):int(x1)] == k + 1))
                annotations.append(dict(
                    id=first + len(annotations), image_id=first + index, category_id=CATEGORY_IDS[k],
                    bbox=[x0, y0, x1 - x0, y1 - y0], area=area, iscrowd=0))
        if part == "seg":
            (folder / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
            names = [Path(im["file_name"]).stem for im in images]
            for listed in (split, *["trainaug"] * (split in ("train", "aug"))):
                with open(folder / f"ImageSets/Segmentation/{listed}.txt", "a") as f:
                    f.writelines(f"{name}\n" for name in names)
            (folder / "classes.txt").write_text("\n".join(["background", *CLASSES[:PARTS[part]["classes"]]]) + "\n")
        if part == "det":
            (folder / f"{split}.json").write_text(json.dumps(dict(
                info=dict(description="embedded world", version=VERSION), images=images, annotations=annotations,
                categories=[dict(id=i, name=name, supercategory="shape") for i, name in zip(CATEGORY_IDS, CLASSES)])))


def save_mask(mask, path):
    """(H, W) uint8 class indices as a PNG with PASCAL VOC's palette: the bits of an index, three at a time, are the highest bits
    of red, green and blue."""
    palette = [sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for k in range(256) for channel in range(3)]
    image = Image.fromarray(mask)
    image.putpalette(palette)  # makes it a palette image of the same indices
    image.save(path, "PNG")


def build(root, part="det", sizes=None, seed=SEED):
    """Draws one part below `root` unless it is there with the same version, seed and sizes -> its folder.
    sizes, e.g. {"train": 20, "val": 10}, overrides the number of images of the splits it names."""
    sizes = {split: count for split, (_, count) in PARTS[part]["splits"].items()} | (sizes or {})
    assert sizes.keys() == PARTS[part]["splits"].keys(), f"part {part} has no such split: {list(sizes)}"
    wanted = dict(version=VERSION, seed=seed, part=part, sizes=sizes)
    folder = Path(root) / part
    if present(folder) == wanted:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder of this name is either complete or not ours: the files are drawn next to it and moved there in one step.
    with tempfile.TemporaryDirectory(prefix=f".{part}-", dir=root) as work:
        new = Path(work) / "new"   # not `work` itself, which only its owner may read
        new.mkdir()
        write(new, part, sizes, seed)
        (new / "world.json").write_text(json.dumps(wanted))
        there = present(folder)
        if there not in (None, wanted):
            folder.rename(Path(work) / "old")
        if there != wanted:   # else another process was faster: keep its copy, someone may be reading it
            new.rename(folder)
    return folder


def present(folder):
    """What the folder holds, None if there is none; refuses a folder this file did not make, rather than replace it."""
    if folder.exists() and not (folder / "world.json").exists():
        raise FileExistsError(f"{folder} has no world.json, so it is not ours: move it or choose another root")
    return json.loads((folder / "world.json").read_text()) if folder.exists() else None


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python world.py ROOT")
    for part in PARTS:
        folder = build(sys.argv[1], part)
        print(f"{folder}: {present(folder)['sizes']}")


if __name__ == "__main__":
    main()
