"""Augment-S1..S4 of "Rethinking Pre-training and Self-training" (Zoph et al. 2020), section 3.1 and
Table 1, for boxes and masks at once, as pure functions (image, target) -> (image, target).

    image, target = augment(image, target, "s4", size=640, rng=np.random.default_rng(7))
    image, target, scale = fit(image, target, size=640)  # evaluation: nothing is drawn

    policy   composition                                              scale jitter
    s1       flip + crop                                              0.8 .. 1.2
    s2       AutoAugment (detection policy v0) + flip + crop          0.8 .. 1.2
    s3       AutoAugment (detection policy v0) + flip + crop          0.5 .. 2.0
    s4       RandAugment (N = 2, M = 10)       + flip + crop          0.5 .. 2.0

`image` is a PIL RGB uint8 image. `target` is a dict of numpy arrays:
    boxes  float32 (N, 4)  x0 y0 x1 y1 in pixels; continuous: one around pixels 3..5 is 3.0 .. 6.0
    labels int64   (N,)    }
    scores float32 (N,)    } follow their box: dropped when it is dropped
    crowd  bool    (N,)    }
    number int64   (N,)    }
    mask   uint8   (H, W)  optional; class index, 255 = ignore (int32 for other numbers per pixel)
    size   (h, w)          rewritten to that of the returned image
Any other key is handed through untouched. N = 0 is an ordinary case. The input dict and its arrays
are never changed.

What the paper leaves open, and what is done here:
 - Jitter ranges and M = 10 are RECALLED from the paper, not re-read. N is NOT STATED there; 2 is
   the default of both public code bases (the RandAugment paper is recalled to use N = 1 on COCO).
 - The AutoAugment policy is not named; v0 is INFERRED: the default, and the best on COCO, of the
   work the paper cites.
 - The authors' RandAugment op list for detection is UNKNOWN. RANDAUGMENT_OPS is the published
   classification pool with the five geometric ops made to move boxes.
 - Op details for segmentation are UNKNOWN. Here a mask moves exactly as its image does, by nearest
   neighbour, and whatever is no longer visible (moved in from outside, cut out, padding) becomes
   255: it cannot be learnt. The ops on single boxes (two of POLICY_V0's ten, in S2 and S3) do
   nothing where there are no boxes.
 - An image with a class as a whole (no boxes, no mask) goes through the same ops: detection's
   policies and scale jitter, not ImageNet's AutoAugment and random resized crop.
 - The published pixel constants (translate 250/100/120, cutout 100/40/50) presuppose COCO, whose
   longest side is 640. They are multiplied by longest_side/640: the same on COCO, in proportion
   elsewhere. This is our decision.

What differs from the TensorFlow original:
 - Padding: there 0 AFTER normalisation, here the ImageNet mean colour (rounded to uint8) BEFORE it,
   because images are normalised later, on the device. The result is the same to within half a grey
   level.
 - Resizing is Pillow's bilinear, which averages when it shrinks; TensorFlow's takes single samples
   and aliases.
 - Contrast pivots on the true mean grey (see OPS). Box corners stay fractional where the original
   truncates to pixels.
 - Not here: removal of crowd boxes, the limit of 100 instances, AutoAugment v1-v3.

Also here: the views of MoCo v2 and SimCLR (images without a target). Imports nothing local: copy
this one file into another project and it works.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

MEAN_COLOUR = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406), rounded: ~0 after normalisation
FILL = (128, 128, 128)  # what the policy ops put where no pixel is (uint8, before normalisation)
IGNORE = 255  # mask value of a pixel without a label
PER_BOX = ("boxes", "labels", "scores", "crowd", "number")
MIN_GAP = 0.05  # of the image side; see box_rule

# ---- the policies --------------------------------------------------------------------------------

# fmt: off
JITTER = {  # range of the target size's random factor
    # the paper's four, as recalled from its section 3.1
    "s1":       (0.8, 1.2),
    "s2":       (0.8, 1.2),
    "s3":       (0.5, 2.0),  # "large scale jittering"
    "s4":       (0.5, 2.0),
    # s1 but for the range: the flip + crop of released configurations (read in the code, where they
    # have no such names)
    "s1-large": (0.5, 2.0),  # SpineNet
    "s1-wide":  (0.1, 1.9),  # SpineNet-143 and 190 of Zoph et al.'s Table 5
    "s1-voc":   (0.6, 1.0),  # C4 of MoCo and HPT: the shorter side is 480..800,
    "s1-coco":  (0.8, 1.0),  # 640..800
    "s1-bdd":   (0.7, 1.0),  # or 362..512, here as shares of the largest
}

# AutoAugment for detection, policy v0. One row is drawn uniformly per image, its ops run left to
# right, each with its probability p. Sharpness has p = 0 and ShearX has L = 0 as published: idle,
# but kept so that the list can be checked.
POLICY_V0 = (
    # (op,                     p,   L)  (op,                      p,   L)
    (("TranslateX_BBox",        0.6, 4), ("Equalize",               0.8, 10)),
    (("TranslateY_Only_BBoxes", 0.2, 2), ("Cutout",                 0.8, 8)),
    (("Sharpness",              0.0, 8), ("ShearX_BBox",            0.4, 0)),
    (("ShearY_BBox",            1.0, 2), ("TranslateY_Only_BBoxes", 0.6, 6)),
    (("Rotate_BBox",            0.6, 10), ("Color",                 1.0, 6)),
)

# RandAugment: N times one op drawn uniformly, with replacement, always applied. (The original
# samples a probability and then does not use it; a later release added an identity branch. Neither
# is here.)
RANDAUGMENT_N = 2
RANDAUGMENT_M = 10
RANDAUGMENT_OPS = (
    "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness", "Cutout",
    "Rotate_BBox", "ShearX_BBox", "ShearY_BBox", "TranslateX_BBox", "TranslateY_BBox",
)

# Pixels at full magnitude (L = 10), for an image whose longest side is 640.
AUTOAUGMENT_PIXELS = {"translate": 250, "cutout": 100}
RANDAUGMENT_PIXELS = {"translate": 100, "cutout": 40}
ONLY_BBOXES_PIXELS = {"translate": 120, "cutout": 50}

# Magnitude L = 0..10 -> argument of the op. px: one of the three dicts above; u: longest_640(image)
# At M = 10 Solarize has threshold 256, i.e. does nothing: that is what the published code does on
# uint8, so one RandAugment draw in 16 is an identity.
ARGUMENT = {
    "Rotate":       lambda L, px, u: 3.0 * L,                              # degrees
    "ShearX":       lambda L, px, u: 0.03 * L,                             # slope
    "ShearY":       lambda L, px, u: 0.03 * L,
    "TranslateX":   lambda L, px, u: round(L / 10 * px["translate"] * u),  # whole pixels
    "TranslateY":   lambda L, px, u: round(L / 10 * px["translate"] * u),
    "Cutout":       lambda L, px, u: round(L / 10 * px["cutout"] * u),     # half the square's side
    "Posterize":    lambda L, px, u: int(0.4 * L),                         # bits kept
    "Solarize":     lambda L, px, u: int(25.6 * L),                        # threshold
    "SolarizeAdd":  lambda L, px, u: int(11 * L),                          # addition
    "Color":        lambda L, px, u: 0.18 * L + 0.1,                       # blend; 1 = unchanged
    "Contrast":     lambda L, px, u: 0.18 * L + 0.1,
    "Brightness":   lambda L, px, u: 0.18 * L + 0.1,
    "Sharpness":    lambda L, px, u: 0.18 * L + 0.1,
    "AutoContrast": lambda L, px, u: None,
    "Equalize":     lambda L, px, u: None,
    "Invert":       lambda L, px, u: None,
}
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")  # negated half of the time
# fmt: on


def longest_640(image):
    """Our unit for the published pixel constants: 1.0 on COCO, 0.2 on a 128-pixel image."""
    return max(image.size) / 640


# ---- geometric ops -------------------------------------------------------------------------------

# Forward maps (a, b, c, d, e, f): a point of the old image goes to x' = a x + b y + c,
# y' = d x + e y + f. Coordinates are continuous: a pixel's centre is at +0.5. One matrix moves
# pixels, mask and boxes, so they cannot disagree.
#   op          argument v > 0 means                                      fixed point
#   Rotate      v degrees counter-clockwise, as seen on the screen        image centre
#   ShearX      x' = x + v y: rows slide right, the lower the further     top-left corner, published
#   ShearY      y' = y + v x: columns slide down                          top-left corner, published
#   TranslateX  content moves right by v pixels                           -
#   TranslateY  content moves down by v pixels                            -
# (Signs are drawn at random in use, so the original's opposite signs for shear and translation are
# the same policy.)


def rotation(w, h, degrees):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = w / 2, h / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# fmt: off
MOTION = {  # (w, h, v) -> forward map
    "Rotate":     rotation,
    "ShearX":     lambda w, h, v: (1, v, 0, 0, 1, 0),
    "ShearY":     lambda w, h, v: (1, 0, 0, v, 1, 0),
    "TranslateX": lambda w, h, v: (1, 0, v, 0, 1, 0),
    "TranslateY": lambda w, h, v: (1, 0, 0, 0, 1, v),
}
# fmt: on


def warp(image, target, forward):
    """Moves image, mask and boxes by one forward map. Nearest neighbour; new pixels are FILL, new
    mask is IGNORE."""
    a, b, c, d, e, f = forward
    det = a * e - b * d
    back_x = (e / det, -b / det, (b * f - c * e) / det)  # Pillow asks where a pixel comes from
    back_y = (-d / det, a / det, (c * d - a * f) / det)
    back = back_x + back_y
    w, h = image.size
    target = dict(target)
    if "mask" in target:
        mask = Image.fromarray(target["mask"])
        mask = mask.transform((w, h), Image.Transform.AFFINE, back, fillcolor=IGNORE)
        target["mask"] = np.array(mask)
    image = image.transform((w, h), Image.Transform.AFFINE, back, fillcolor=FILL)

    x = target["boxes"][:, [0, 2, 2, 0]]  # (N, 4) the four corners
    y = target["boxes"][:, [1, 1, 3, 3]]
    x, y = a * x + b * y + c, d * x + e * y + f
    hull = np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], 1)  # (N, 4) axis-aligned again
    target["boxes"] = box_rule(hull, w, h)
    return image, target


def box_rule(boxes, w, h):
    """Clips to the image; a side that collapsed there is pulled open to MIN_GAP of the image side.

    That is the published rule: an object pushed out of the image is not removed but leaves a sliver
    at the border, with its label. Only the final crop drops boxes, those of zero area. A side that
    was flat before, away from the border, stays flat.
    """
    limit = np.array([w, h], np.float32)
    low = np.clip(boxes[:, :2], 0, limit)  # (N, 2)
    high = np.clip(boxes[:, 2:], 0, limit)
    flat = high <= low
    high = np.where(flat, np.maximum(high, MIN_GAP * limit), high)
    low = np.where(flat, np.minimum(low, (1 - MIN_GAP) * limit), low)
    return np.concatenate([low, high], 1).astype(np.float32)


# ---- other ops, and the table of them ------------------------------------------------------------


def solarize_add(image, addition):
    """Adds to the dark half only: pixels below 128, clipped at 255."""
    return image.point([min(i + addition, 255) if i < 128 else i for i in range(256)] * 3)


def cutout(image, target, half, rng):
    """Greys a square of side 2*half, its centre uniform over the image, clipped at the borders.
    Boxes stay as they are. Setting the mask to IGNORE there is our choice."""
    w, h = image.size
    x, y = int(rng.integers(w)), int(rng.integers(h))
    x0, x1 = max(x - half, 0), min(x + half, w)
    y0, y1 = max(y - half, 0), min(y + half, h)
    image, target = image.copy(), dict(target)
    image.paste(FILL, (x0, y0, x1, y1))
    if "mask" in target:
        target["mask"] = target["mask"].copy()
        target["mask"][y0:y1, x0:x1] = IGNORE
    return image, target


# (image, argument) -> image; boxes and mask not touched. The four blends are degenerate + factor *
# (image - degenerate), clipped to 0..255, with a degenerate that is black (Brightness), the grey
# version (Color), the mean grey (Contrast) or the image smoothed by (1 1 1; 1 5 1; 1 1 1)/13 but at
# its border (Sharpness). The TensorFlow original computes the mean grey wrongly, as pixels/256
# clipped to 255, i.e. white above 65k pixels, so that Contrast 1.9 darkens everything there. We use
# the true mean.
# fmt: off
OPS = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Equalize":     lambda image, v: ImageOps.equalize(image),
    "Invert":       lambda image, v: ImageOps.invert(image),
    "Posterize":    lambda image, v: ImageOps.posterize(image, v),
    "Solarize":     lambda image, v: ImageOps.solarize(image, v),  # 255 - pixel where pixel >= v
    "SolarizeAdd":  solarize_add,
    "Color":        lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast":     lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Brightness":   lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Sharpness":    lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
}
# fmt: on


def transform(image, target, op, value, rng):
    """One op on the whole image, by its name without suffix ("Rotate", "Cutout", "Equalize", ...),
    with its argument given."""
    if op in MOTION:
        return warp(image, target, MOTION[op](*image.size, value))
    if op == "Cutout":
        return cutout(image, target, value, rng)
    return OPS[op](image, value), dict(target)


def only_boxes(image, target, op, value, p, rng):
    """The op on the pixels inside a box, box by box, with probability p/3; boxes stay themselves.

    p/3 is the published reduction, so that not every object of an image is disturbed. The mask's
    pixels move with the image's. Overlapping boxes are worked on one after the other.
    """
    w, h = image.size
    image, target = image.copy(), dict(target)
    if "mask" in target:
        target["mask"] = target["mask"].copy()
    for box in target["boxes"]:
        if rng.random() >= p / 3:
            continue
        x0, y0, x1, y1 = np.clip(np.round(box), 0, [w, h, w, h]).astype(int).tolist()
        if x1 <= x0 or y1 <= y0:
            continue
        inside = {"boxes": np.zeros((0, 4), np.float32)}
        if "mask" in target:
            inside["mask"] = target["mask"][y0:y1, x0:x1]
        pixels, inside = transform(image.crop((x0, y0, x1, y1)), inside, op, value, rng)
        image.paste(pixels, (x0, y0))
        if "mask" in target:
            target["mask"][y0:y1, x0:x1] = inside["mask"]
    return image, target


def apply_op(image, target, name, level, rng, p=1.0, pixels=RANDAUGMENT_PIXELS):
    """One op of a policy by its published name, with probability p at magnitude `level`; `pixels`:
    see ARGUMENT.

    Names: "Equalize" (photometric), "Rotate_BBox" (whole image, boxes follow), "Rotate_Only_BBoxes"
    (only_boxes).
    """
    op, _, scope = name.partition("_")
    if scope == "Only_BBoxes":
        pixels = ONLY_BBOXES_PIXELS
    value = ARGUMENT[op](level, pixels, longest_640(image))
    if op in SIGNED and rng.random() < 0.5:
        value = -value
    if scope == "Only_BBoxes":
        return only_boxes(image, target, op, value, p, rng)  # its p is drawn per box
    if rng.random() >= p:
        return image, dict(target)
    return transform(image, target, op, value, rng)


def autoaugment(image, target, rng):
    """One uniformly drawn row of POLICY_V0."""
    for name, p, level in POLICY_V0[rng.integers(len(POLICY_V0))]:
        image, target = apply_op(image, target, name, level, rng, p, AUTOAUGMENT_PIXELS)
    return image, target


def randaugment(image, target, rng, n=RANDAUGMENT_N, m=RANDAUGMENT_M):
    """n uniformly drawn ops of RANDAUGMENT_OPS, all at magnitude m."""
    for i in rng.integers(len(RANDAUGMENT_OPS), size=n):
        image, target = apply_op(image, target, RANDAUGMENT_OPS[i], m, rng)
    return image, target


# ---- flip and crop -------------------------------------------------------------------------------


def hflip(image, target):
    """Mirrors left and right."""
    w = image.width
    target = dict(target)
    x0, y0, x1, y1 = target["boxes"].T
    target["boxes"] = np.stack([w - x1, y0, w - x0, y1], 1).astype(np.float32)
    if "mask" in target:
        target["mask"] = target["mask"][:, ::-1].copy()
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), target


def place(image, target, size, scaled, offset=(0, 0)):
    """Resizes to scaled = (w, h), cuts the size x size window at offset = (x, y), pads right and
    bottom. Only the window is ever computed: with jitter up to 2 that is a quarter of the work of
    resizing everything."""
    (w, h), (sw, sh), (ox, oy) = image.size, scaled, offset
    cw, ch = min(size, sw - ox), min(size, sh - oy)  # content of the canvas
    source = (ox * w / sw, oy * h / sh, (ox + cw) * w / sw, (oy + ch) * h / sh)
    canvas = Image.new("RGB", (size, size), MEAN_COLOUR)
    canvas.paste(image.resize((cw, ch), Image.Resampling.BILINEAR, box=source), (0, 0))

    target = dict(target)
    if "mask" in target:
        mask = np.full((size, size), IGNORE, target["mask"].dtype)
        content = Image.fromarray(target["mask"])
        content = content.resize((cw, ch), Image.Resampling.NEAREST, box=source)
        mask[:ch, :cw] = np.asarray(content)
        target["mask"] = mask
    ratio = np.array([sw / w, sh / h] * 2)  # as rounded: where the pixels went
    boxes = target["boxes"] * ratio - np.array([ox, oy] * 2)
    target["boxes"] = np.clip(boxes, 0, [cw, ch] * 2).astype(np.float32)
    target["size"] = (size, size)
    return canvas, drop_empty(target)


def drop_empty(target):
    """Removes boxes of zero area. There is no minimum-visibility rule: a sliver of an object stays
    an object."""
    x0, y0, x1, y1 = target["boxes"].T
    keep = (x1 > x0) & (y1 > y0)  # (N,)
    return {k: v[keep] if k in PER_BOX else v for k, v in target.items()}


def crop(image, target, size, jitter, rng):
    """Scale jitter: the image is fitted to a square of r * size, r ~ U(jitter); what exceeds `size`
    is cut off at a random place, what is missing is padded. A small image is NOT shifted, it sits
    in the top-left corner."""
    w, h = image.size
    scale = round(rng.uniform(*jitter) * size) / max(w, h)
    scaled = max(round(scale * w), 1), max(round(scale * h), 1)
    offset = [int(rng.random() * max(side - size, 0)) for side in scaled]
    return place(image, target, size, scaled, offset)


# ---- entry points --------------------------------------------------------------------------------


def augment(image, target, policy, size, rng):
    """Training path: policy ops at the original resolution, flip with p = 0.5, scale jitter, crop
    to size x size."""
    if policy not in JITTER:
        raise ValueError(f"unknown policy {policy!r}: use one of {', '.join(JITTER)}")
    if "mask" in target:
        assert target["mask"].shape == (image.height, image.width), "a mask of another size"
    if policy in ("s2", "s3"):
        image, target = autoaugment(image, target, rng)
    elif policy == "s4":
        image, target = randaugment(image, target, rng)
    if rng.random() < 0.5:
        image, target = hflip(image, target)
    return crop(image, target, size, JITTER[policy], rng)


def fit(image, target, size):
    """Evaluation path: the largest copy that fits size x size, top-left, padded -> image, target,
    scale. Predicted boxes / scale are boxes in the original image (exact along the longer side;
    within half a canvas pixel along the shorter, which is rounded)."""
    w, h = image.size
    scale = size / max(w, h)
    scaled = max(round(scale * w), 1), max(round(scale * h), 1)
    image, target = place(image, target, size, scaled)
    return image, target, scale


# ---- views of MoCo and SimCLR --------------------------------------------------------------------


def random_crop(image, size, scale, rng):
    """A random part of the image, its area within `scale` of the whole and its ratio within 3:4 and
    4:3, as size x size pixels. torchvision's RandomResizedCrop: ten tries, then the largest centred
    part of a legal ratio."""
    w, h = image.size
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        cw, ch = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            x, y = int(rng.integers(w - cw + 1)), int(rng.integers(h - ch + 1))
            break
    else:
        cw, ch = min(w, max(round(h * 4 / 3), 1)), min(h, max(round(w * 4 / 3), 1))
        x, y = (w - cw) // 2, (h - ch) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + cw, y + ch))


def view(image, size, crop, jitter, grey, blur, rng, flip=0.5):
    """One view for contrastive learning (MoCo v2's list of operations, in its order).

    crop: range of the area; jitter: largest change of brightness, contrast, saturation (as factors)
    and hue (of a full turn), in random order, p = 0.8; grey, flip: probabilities; blur: range of
    the Gaussian's deviation in pixels, p = 0.5. jitter, blur: 0 for none.
    """
    image = random_crop(image, size, crop, rng)
    if jitter and rng.random() < 0.8:
        for k in rng.permutation(4).tolist():
            if k == 3:
                image = turn_hue(image, round(rng.uniform(-jitter[3], jitter[3]) * 255))
            else:
                factor = rng.uniform(max(0, 1 - jitter[k]), 1 + jitter[k])
                image = BLENDS[k](image).enhance(factor)
    if rng.random() < grey:
        image = image.convert("L").convert("RGB")
    if blur and rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*blur)))
    if rng.random() < flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


BLENDS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def turn_hue(image, turn):
    """turn: in 256ths of a full one."""
    h, s, v = image.convert("HSV").split()
    h = h.point([(i + turn) % 256 for i in range(256)])
    return Image.merge("HSV", (h, s, v)).convert("RGB")
