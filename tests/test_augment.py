"""augment.py: photometric ops against torchvision, geometric ops against painted rectangles, the
policies, views; and that the three files without local imports work when copied alone."""

import ast
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

import augment as A

# fmt: off
JITTER = {
    "s1": (0.8, 1.2), "s2": (0.8, 1.2), "s3": (0.5, 2.0), "s4": (0.5, 2.0),
    "s1-large": (0.5, 2.0), "s1-wide": (0.1, 1.9),
    "s1-voc": (0.6, 1.0), "s1-coco": (0.8, 1.0), "s1-bdd": (0.7, 1.0),
}
# fmt: on
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
BOXED = [f"{op}_Only_BBoxes" for op in (*GEOMETRIC, "Equalize", "Cutout")]
ALL_OPS = [*A.OPS, "Cutout", *(f"{op}_BBox" for op in GEOMETRIC), *BOXED]


def rng_of(seed):
    return np.random.default_rng(seed)


def noise(w, h, seed=0):
    """Random but not white: a range per channel, something to do for AutoContrast and Equalize."""
    rng = rng_of(seed)
    ranges = ((20, 180), (60, 255), (0, 90))
    return np.stack([rng.integers(*ends, (h, w)) for ends in ranges], 2).astype(np.uint8)


def make_target(boxes, **extra):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(len(boxes), dtype=np.int64)
    scores = (labels / 100).astype(np.float32)
    rows = dict(boxes=boxes, labels=labels, scores=scores, crowd=labels % 2 == 1, number=labels + 5)
    return {**rows, "image_id": 17, **extra}


def painted(w, h, box):
    """Black image with one pure-red rectangle, its mask (1 inside, 0 outside), its target."""
    x0, y0, x1, y1 = box
    pixels, mask = np.zeros((h, w, 3), np.uint8), np.zeros((h, w), np.uint8)
    pixels[y0:y1, x0:x1, 0] = 255
    mask[y0:y1, x0:x1] = 1
    return Image.fromarray(pixels), make_target([box], mask=mask, size=(h, w))


def extent(inside):
    """Box around the True pixels, or None."""
    ys, xs = np.nonzero(inside)
    if len(xs) == 0:
        return None
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)


def red(image):  # neither the fill nor the padding colour
    pixels = np.asarray(image)
    return (pixels[..., 0] > 127) & (pixels[..., 2] < 64)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def instead(monkeypatch, name, note):
    """Replaces an op of augment.py by one that only takes notes."""

    def op(image, target, *args):
        note(image, *args)
        return image, target

    monkeypatch.setattr(A, name, op)


# ---- photometric ops -----------------------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("op, values, reference, tolerance", [
    ("AutoContrast", [None],     lambda image, _: F.autocontrast(image), 1),
    ("Equalize",     [None],     lambda image, _: F.equalize(image), 0),
    ("Invert",       [None],     lambda image, _: F.invert(image), 0),
    ("Posterize",    [4, 2],     F.posterize, 0),
    ("Solarize",     [110, 10],  F.solarize, 0),
    ("Color",        [1.9, 0.1], F.adjust_saturation, 2),
    ("Contrast",     [1.9, 0.1], F.adjust_contrast, 2),
    ("Brightness",   [1.9, 0.1], F.adjust_brightness, 1),
    ("Sharpness",    [1.9, 0.1], F.adjust_sharpness, 2),
])
# fmt: on
def test_photometric_ops_agree_with_torchvision(op, values, reference, tolerance):
    pixels = noise(41, 33)
    for value in values:
        want = reference(torch.from_numpy(pixels).permute(2, 0, 1), value)
        want = want.permute(1, 2, 0).numpy().astype(int)
        image, _ = A.transform(Image.fromarray(pixels), make_target([]), op, value, None)
        assert np.abs(np.asarray(image).astype(int) - want).max() <= tolerance
        assert np.abs(want - pixels).max() > 5  # the op does something on this input


def test_solarizing_by_hand():
    row = np.array([0, 17, 127, 128, 200, 255], np.uint8)
    image = Image.fromarray(np.repeat(row[None, :, None], 3, 2))
    level_10 = A.ARGUMENT["Solarize"](10, None, 1)
    for op, value, want in (
        ("SolarizeAdd", 110, [110, 127, 237, 128, 200, 255]),
        ("SolarizeAdd", 200, [200, 217, 255, 128, 200, 255]),
        ("Solarize", 128, [0, 17, 127, 127, 55, 0]),
        ("Solarize", level_10, row.tolist()),  # does nothing
    ):
        assert np.asarray(A.OPS[op](image, value))[0, :, 1].tolist() == want


def test_contrast_pivots_on_the_true_mean_of_a_large_image():
    pixels = np.full((300, 300, 3), 50, np.uint8)  # 90k: the TensorFlow quirk would pivot on 255
    assert np.array_equal(np.asarray(A.OPS["Contrast"](Image.fromarray(pixels), 1.9)), pixels)


# ---- geometric ops -------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", (30, -30, 11))
def test_rotate_turns_counter_clockwise_like_torchvision(degrees):
    pixels = noise(61, 47)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    want = F.rotate(tensor, degrees, InterpolationMode.NEAREST, fill=[128] * 3)
    image, _ = A.transform(Image.fromarray(pixels), make_target([]), "Rotate", degrees, None)
    agree = (np.asarray(image) == want.permute(1, 2, 0).numpy()).all(2)
    assert agree.mean() > 0.99  # but for ties of the nearest neighbour


@pytest.mark.parametrize("slope", (0.3, -0.3))
def test_shears_move_pixels_as_the_formula_says(slope):
    pixels = noise(40, 30)
    ys, xs = np.mgrid[:30, :40]
    back_x = np.floor(xs + 0.5 - slope * (ys + 0.5)).astype(int)
    back_y = np.floor(ys + 0.5 - slope * (xs + 0.5)).astype(int)
    for op, sy, sx in (("ShearX", ys, back_x), ("ShearY", back_y, xs)):
        inside = (sy >= 0) & (sy < 30) & (sx >= 0) & (sx < 40)
        want = np.where(inside[..., None], pixels[sy.clip(0, 29), sx.clip(0, 39)], 128)
        image, _ = A.transform(Image.fromarray(pixels), make_target([]), op, slope, None)
        assert (np.asarray(image) == want).all(2).mean() > 0.99, op


def test_translations_are_exact_and_fill_with_grey_and_ignore():
    pixels, mask = noise(20, 12), rng_of(1).integers(0, 5, (12, 20)).astype(np.uint8)
    given = Image.fromarray(pixels), make_target([[2, 2, 6, 6]], mask=mask)
    image, target = A.transform(*given, "TranslateX", 5, None)
    image = np.asarray(image)
    assert np.array_equal(image[:, 5:], pixels[:, :-5]) and (image[:, :5] == 128).all()
    assert np.array_equal(target["mask"][:, 5:], mask[:, :-5])
    assert (target["mask"][:, :5] == 255).all()
    assert target["boxes"].tolist() == [[7, 2, 11, 6]]
    image, target = A.transform(*given, "TranslateY", -3, None)
    image = np.asarray(image)
    assert np.array_equal(image[:-3], pixels[3:]) and (image[-3:] == 128).all()
    assert np.array_equal(target["mask"][:-3], mask[3:]) and (target["mask"][-3:] == 255).all()
    assert target["boxes"].tolist() == [[2, 0, 6, 3]]  # clipped at the top


@pytest.mark.parametrize("op", GEOMETRIC)
def test_geometric_ops_move_pixels_mask_and_boxes_together(op):
    image, target = painted(200, 160, (60, 50, 120, 90))
    directions = set()
    for seed in range(12):
        moved, out = A.apply_op(image, target, f"{op}_BBox", 2 + seed % 9, rng_of(seed))
        box = out["boxes"][0]
        assert np.abs(extent(red(moved)) - box).max() <= 1.5
        assert np.array_equal(red(moved), out["mask"] == 1)
        assert np.array_equal(np.asarray(moved)[..., 1] == 128, out["mask"] == 255)
        shift = box - target["boxes"][0]
        assert np.abs(shift).max() > 1  # it did move
        directions.add(tuple(np.sign(shift.reshape(2, 2).mean(0).round(1))))
    assert len(directions) >= 2  # both signs were seen


def test_box_rule_clips_and_leaves_a_sliver_of_a_vanished_box():
    # fmt: off
    boxes = [[-10, 5, 30, 20], [-30, 5, -10, 20], [110, 60, 130, 70], [20, -9, 40, 0],
             [50, 20, 50, 30]]
    want = [[0, 5, 30, 20], [0, 5, 5, 20], [95, 47.5, 100, 50], [20, 0, 40, 2.5],
            [50, 20, 50, 30]]  # flat, but inside: it stays flat
    # fmt: on
    assert np.allclose(A.box_rule(np.array(boxes, np.float32), 100, 50), want)
    assert A.box_rule(np.zeros((0, 4), np.float32), 100, 50).shape == (0, 4)


@pytest.mark.parametrize("w, h, half", ((640, 480, 40), (128, 96, 8), (480, 640, 40)))
def test_cutout_greys_one_square_and_ignores_it(w, h, half):
    areas = []
    image = Image.new("RGB", (w, h), (9, 9, 9))
    for seed in range(20):
        target = make_target([[1, 2, 30, 40]], mask=np.zeros((h, w), np.uint8))
        cut, out = A.apply_op(image, target, "Cutout", 10, rng_of(seed))
        grey = (np.asarray(cut) == 128).all(2)
        x0, y0, x1, y1 = extent(grey).astype(int)
        assert grey[y0:y1, x0:x1].all() and max(x1 - x0, y1 - y0) <= 2 * half
        assert np.array_equal(out["mask"] == 255, grey)
        assert np.array_equal(out["boxes"], target["boxes"])
        areas.append(grey.sum())
    assert max(areas) == (2 * half) ** 2 and len(set(areas)) > 1  # whole, and cut by the border


def test_only_boxes_moves_the_inside_and_nothing_else():
    pixels = noise(40, 30)
    target = make_target([[5, 4, 25, 14], [30, 20, 30, 25]], mask=np.ones((30, 40), np.uint8))
    image = Image.fromarray(pixels)
    image, out = A.only_boxes(image, target, "TranslateY", 3, 3.0, rng_of(0))  # p/3 = 1: every box
    want = pixels.copy()
    want[7:14, 5:25], want[4:7, 5:25] = pixels[4:11, 5:25], 128
    assert np.array_equal(np.asarray(image), want)
    assert extent(out["mask"] == 255).tolist() == [5, 4, 25, 7]
    assert (target["mask"] == 1).all()  # the input's own mask is not written to
    assert np.array_equal(out["boxes"], target["boxes"])


def test_only_boxes_translates_by_its_own_constant_of_the_whole_image():
    target = make_target([[100, 50, 300, 250]], mask=np.zeros((480, 640), np.uint8))
    image = Image.new("RGB", (640, 480))
    _, out = A.apply_op(image, target, "TranslateY_Only_BBoxes", 6, rng_of(0), p=3.0)
    moved = extent(out["mask"] == 255)
    assert moved[3] - moved[1] == 72 and moved[2] - moved[0] == 200  # 0.6 * 120


def test_only_boxes_acts_on_a_third_of_p():
    target = make_target([[10 * i, 0, 10 * i + 8, 8] for i in range(1000)])
    image = Image.new("RGB", (10000, 8), (1, 2, 3))
    image, _ = A.only_boxes(image, target, "Invert", None, 0.6, rng_of(0))
    assert 0.16 < (np.asarray(image)[0, ::10, 0] == 254).mean() < 0.24


@pytest.mark.parametrize("name", ALL_OPS)
def test_every_op_takes_odd_sizes_no_boxes_and_degenerate_boxes(name):
    for w, h in ((64, 48), (1, 1), (8, 200), (200, 8), (3, 2)):
        given = Image.fromarray(noise(w, h))
        flat = [[0, 0, 0, 0], [w, h, w, h], [w / 2, 0, w / 2, h]]
        for boxes in ([], [[0, 0, w, h], [-5, -5, -1, -1], [0, 0, 0.2, 0.2], *flat]):
            for seed in range(4):
                target = make_target(boxes, mask=np.zeros((h, w), np.uint8))
                image, out = A.apply_op(given, target, name, 10, rng_of(seed))
                assert image.size == (w, h) and image.mode == "RGB"
                assert out["boxes"].shape == (len(boxes), 4) and out["boxes"].dtype == np.float32
                assert np.isfinite(out["boxes"]).all() and len(out["labels"]) == len(boxes)
                assert out["mask"].shape == (h, w) and out["mask"].dtype == np.uint8


# ---- tables and policies -------------------------------------------------------------------------


def test_magnitudes_are_the_published_ones_on_coco_sizes():
    at10 = {op: f(10, A.RANDAUGMENT_PIXELS, 1.0) for op, f in A.ARGUMENT.items()}
    blends = dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), pytest.approx(1.9))
    nothing = dict.fromkeys(("AutoContrast", "Equalize", "Invert"))
    moves = dict(Rotate=30, ShearX=0.3, ShearY=0.3, TranslateX=100, TranslateY=100, Cutout=40)
    tones = dict(Posterize=4, Solarize=256, SolarizeAdd=110)
    assert at10 == {**moves, **tones, **blends, **nothing}
    assert A.ARGUMENT["TranslateX"](4, A.AUTOAUGMENT_PIXELS, 1.0) == 100
    assert A.ARGUMENT["Cutout"](8, A.AUTOAUGMENT_PIXELS, 1.0) == 80
    assert A.ARGUMENT["TranslateY"](6, A.ONLY_BBOXES_PIXELS, 1.0) == 72
    assert A.ARGUMENT["TranslateX"](10, A.RANDAUGMENT_PIXELS, 0.2) == 20  # in proportion elsewhere
    assert A.longest_640(Image.new("RGB", (427, 640))) == 1.0


def recorded_ops(monkeypatch, policy, n):
    """What is passed to apply_op, of n images."""
    rows = []
    instead(monkeypatch, "apply_op", lambda image, *args: rows[-1].append((image.size, *args)))
    rng = rng_of(0)
    for _ in range(n):
        rows.append([])
        A.augment(Image.new("RGB", (30, 20)), make_target([]), policy, 8, rng)
    assert all(size == (30, 20) for row in rows for size, *_ in row)  # before the crop
    return [[op[1:] for op in row] for row in rows]


def test_randaugment_draws_two_of_sixteen_uniformly_at_magnitude_ten(monkeypatch):
    rows = recorded_ops(monkeypatch, "s4", 1600)
    assert all(len(row) == 2 and all(level == 10 for _, level, *_ in row) for row in rows)
    names = [name for row in rows for name, *_ in row]
    counts = [names.count(op) for op in A.RANDAUGMENT_OPS]
    assert len(set(A.RANDAUGMENT_OPS)) == 16 and sum(counts) == 3200
    assert 140 < min(counts) and max(counts) < 260  # 200 expected, sigma 14
    assert any(row[0][0] == row[1][0] for row in rows)  # with replacement


@pytest.mark.parametrize("policy", ("s2", "s3"))
def test_autoaugment_draws_whole_rows_of_v0(monkeypatch, policy):
    rows = recorded_ops(monkeypatch, policy, 500)
    drawn = [tuple((name, p, level) for name, level, _, p, _ in row) for row in rows]
    counts = [drawn.count(sub) for sub in A.POLICY_V0]
    assert sum(counts) == 500 and min(counts) > 60  # 100 expected, sigma 9
    assert all(pixels is A.AUTOAUGMENT_PIXELS for row in rows for *_, pixels in row)


def test_s1_and_its_likes_are_flip_and_crop_only(monkeypatch):
    for policy in JITTER:
        assert policy in ("s2", "s3", "s4") or not any(recorded_ops(monkeypatch, policy, 20))


def test_an_op_is_applied_with_its_probability():
    image, rng = Image.new("RGB", (4, 4)), rng_of(0)
    for p, low, high in ((0.6, 250, 350), (0.0, 0, 0)):
        outs = [A.apply_op(image, make_target([]), "Invert", 10, rng, p)[0] for _ in range(500)]
        assert low <= sum(out.getpixel((0, 0))[0] == 255 for out in outs) <= high


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"s5.*s1.*s2.*s3.*s4"):
        A.augment(Image.new("RGB", (8, 8)), make_target([]), "s5", 8, rng_of(0))


@pytest.mark.parametrize("policy", JITTER)
def test_policies_return_the_promised_shapes_for_any_input(policy):
    for w, h in ((60, 45), (1, 1), (8, 200), (200, 8)):
        given = Image.fromarray(noise(w, h))
        flat = [[0, 0, 0, 0], [w / 2, 0, w / 2, h], [w, h, w + 9, h + 9]]
        for boxes in ([], [[0, 0, w, h], [w / 4, h / 4, w / 2, h / 2], *flat]):
            mask = np.zeros((h, w), np.uint8)
            target = make_target(boxes, mask=mask, size=(h, w), note="kept")
            for seed in range(8):
                image, out = A.augment(given, target, policy, 48, rng_of(seed))
                n = len(out["boxes"])
                assert image.size == (48, 48) and image.mode == "RGB" and out["size"] == (48, 48)
                assert out["mask"].shape == (48, 48) and out["mask"].dtype == np.uint8
                assert out["boxes"].shape == (n, 4) and n <= len(boxes)
                types = dict(boxes=np.float32, labels=np.int64, scores=np.float32, crowd=bool)
                assert all(len(out[k]) == n and out[k].dtype == t for k, t in types.items())
                assert (out["boxes"] >= 0).all() and (out["boxes"] <= 48).all()
                assert (out["boxes"][:, 2:] > out["boxes"][:, :2]).all()
                assert out["note"] == "kept" and out["image_id"] == 17
                if policy.startswith("s1"):  # flat boxes never survive
                    assert not {2, 3, 4} & set(out["labels"].tolist())


@pytest.mark.parametrize("policy", JITTER)
def test_same_rng_same_result_and_the_input_is_never_written_to(policy):
    boxes = [[10, 10, 50, 40], [60, 5, 79, 59], [0, 0, 0, 0]]
    target = make_target(boxes, mask=np.ones((60, 80), np.uint8), size=(60, 80))
    before = {k: np.copy(v) for k, v in target.items()}
    arrays = {k: v for k, v in target.items() if isinstance(v, np.ndarray)}
    for value in arrays.values():
        value.setflags(write=False)  # a write raises
    image = Image.fromarray(noise(80, 60))
    results = [A.augment(image, target, policy, 64, rng_of(seed)) for seed in (0, *range(25))]
    assert not any(np.shares_memory(out[k], v) for _, out in results for k, v in arrays.items())
    assert same(target, before) and np.array_equal(np.asarray(image), noise(80, 60))
    assert results[0][0].tobytes() == results[1][0].tobytes() and same(results[0][1], results[1][1])
    assert len({image.tobytes() for image, _ in results[:6]}) == 5


@pytest.mark.parametrize("policy", JITTER)
def test_labels_scores_and_crowd_follow_their_box(policy):
    boxes = [[x, y, x + 9, y + 9] for x in range(0, 90, 10) for y in range(0, 60, 10)]
    image, target = Image.fromarray(noise(90, 60)), make_target(boxes)
    dropped = 0
    for seed in range(15):
        _, out = A.augment(image, target, policy, 64, rng_of(seed))
        assert np.allclose(out["scores"], out["labels"] / 100)
        assert np.array_equal(out["crowd"], out["labels"] % 2 == 1)
        assert np.array_equal(out["number"], out["labels"] + 5)
        dropped += len(boxes) - len(out["boxes"])
    assert (dropped > 0) == (JITTER[policy][1] > 1)  # what only shrinks cuts nothing off


# ---- flip and crop -------------------------------------------------------------------------------


def test_half_are_flipped_with_mask_and_boxes_and_twice_is_identity(monkeypatch):
    image, target = painted(50, 30, (4, 6, 20, 25))
    flipped, out = A.hflip(image, target)
    assert out["boxes"].tolist() == [extent(red(flipped)).tolist()] == [[30, 6, 46, 25]]
    assert np.array_equal(red(flipped), out["mask"] == 1)
    back, twice = A.hflip(flipped, out)
    assert back.tobytes() == image.tobytes() and same(twice, target)
    flips = []
    instead(monkeypatch, "hflip", flips.append)
    for seed in range(400):
        A.augment(image, target, "s1", 8, rng_of(seed))
    assert 160 < len(flips) < 240  # 200 expected, sigma 10


@pytest.mark.parametrize("jitter", ((0.8, 1.2), (0.5, 2.0)))
def test_crop_moves_pixels_mask_and_boxes_together(jitter):
    image, target = painted(120, 90, (50, 30, 90, 70))
    seen = 0
    for seed in range(40):
        cropped, out = A.crop(image, target, 100, jitter, rng_of(seed))
        where = extent(red(cropped))
        if where is None:
            sizes = out["boxes"][:, 2:] - out["boxes"][:, :2]
            assert len(sizes) == 0 or sizes.min() < 1.5
            continue
        seen += 1
        assert np.abs(where - out["boxes"][0]).max() <= 1.5
        assert np.abs(extent(out["mask"] == 1) - out["boxes"][0]).max() <= 1.5
        padding = (np.asarray(cropped) == A.MEAN_COLOUR).all(2)
        assert np.array_equal(padding, out["mask"] == 255)
        assert not padding[0, 0]  # content sits at the top-left
    assert seen > 25


def test_place_equals_resizing_everything_then_cropping():
    mask = rng_of(0).integers(0, 9, (40, 50)).astype(np.uint8)
    image, x, y = Image.fromarray(noise(50, 40)), 31, 17
    for scaled in ((96, 72), (104, 88)):  # ratios without nearest-neighbour ties
        target = make_target([[10, 10, 40, 30]], mask=mask)
        canvas, out = A.place(image, target, 48, scaled, (x, y))
        whole = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(np.asarray(canvas) - whole[y : y + 48, x : x + 48]).max() <= 1
        whole_mask = np.asarray(Image.fromarray(mask).resize(scaled, Image.Resampling.NEAREST))
        assert np.array_equal(out["mask"], whole_mask[y : y + 48, x : x + 48])
        ratio = np.array([scaled[0] / 50, scaled[1] / 40] * 2)
        want = np.clip(target["boxes"] * ratio - [x, y, x, y], 0, 48)
        assert np.allclose(out["boxes"], want, atol=1e-4)


@pytest.mark.parametrize("policy", JITTER)
def test_scale_jitter_and_offsets_cover_their_published_range(monkeypatch, policy):
    calls = []
    instead(monkeypatch, "place", lambda _, size, scaled, offset: calls.append([*scaled, *offset]))
    image, rng = Image.new("RGB", (40, 20)), rng_of(0)
    for _ in range(800):
        A.augment(image, make_target([]), policy, 400, rng)
    w, h, x, y = np.array(calls).T
    low, high = JITTER[policy]
    ratio, span = w / 400, high - low
    assert low <= ratio.min() < low + 0.05 * span and high - 0.05 * span < ratio.max() <= high
    assert abs(ratio.mean() - (low + high) / 2) < 0.04 * span  # uniform: sigma is 0.01 span
    assert (abs(w - 2 * h) <= 1).all()  # aspect kept
    slack = np.maximum(w - 400, 0)
    assert (x[slack == 0] == 0).all() and (y == 0).all()  # smaller than the canvas: no shift
    if high > 1:
        share = x[slack >= 20] / slack[slack >= 20]
        assert share.min() >= 0 and share.max() < 1 and 0.4 < share.mean() < 0.6


@pytest.mark.parametrize("policy", JITTER)
def test_the_mask_stays_on_its_pixels_under_every_policy(policy):
    """Two-tone image: whatever the photometric ops did to the tones, well inside class 0 (or 1)
    only one is left."""
    mask = np.zeros((120, 160), np.uint8)
    mask[20:70, 15:90] = 1
    mask[60:115, 100:150] = 1
    tones = np.array([[60, 40, 30], [200, 90, 150]], np.uint8)
    target = make_target([[15, 20, 90, 70], [100, 60, 150, 115]], mask=mask)
    contrasted = 0
    for seed in range(40):
        image, out = A.augment(Image.fromarray(tones[mask]), target, policy, 128, rng_of(seed))
        image = np.asarray(image).astype(int)
        means = []
        for index in (0, 1):
            inside = np.pad(out["mask"] == index, 4)
            for axis in (0, 1):  # erode by 4: resizing blends near the edges
                inside = np.min([np.roll(inside, k, axis) for k in range(-4, 5)], 0)
            inside = inside[4:-4, 4:-4]
            if inside.sum() > 20:
                assert np.ptp(image[inside], axis=0).max() <= 3, (seed, index)
                means.append(image[inside].mean(0))
        contrasted += len(means) == 2 and np.abs(means[0] - means[1]).max() > 30
        assert (out["mask"][(image == A.MEAN_COLOUR).all(2)] == 255).all()
    assert contrasted > 20  # the check above had something to see


def test_fit_scales_to_the_longer_side_and_pads_with_the_mean_colour():
    given, target = painted(80, 40, (20, 10, 60, 30))
    image, out, scale = A.fit(given, target, 120)
    pixels = np.asarray(image)
    assert scale == 1.5 and image.size == (120, 120) and out["size"] == (120, 120)
    assert np.allclose(out["boxes"], [[30, 15, 90, 45]])
    assert (pixels[60:] == A.MEAN_COLOUR).all() and (pixels[59] == 0).all()
    assert (out["mask"][60:] == 255).all() and (out["mask"][:60] < 2).all()
    assert np.abs(extent(red(image)) - out["boxes"][0]).max() <= 1
    normalised = (np.array(A.MEAN_COLOUR) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(normalised).max() < 0.01
    for w, h in ((97, 61), (61, 97), (1, 1), (8, 200), (640, 480)):
        whole = make_target([[0, 0, w, h]])
        _, out, scale = A.fit(Image.fromarray(noise(w, h)), whole, 64)
        assert np.abs(out["boxes"] / scale - whole["boxes"]).max() <= 0.5 / scale + 1e-3
        assert np.abs(out["boxes"].max() - 64) < 1e-4


# ---- views of MoCo and SimCLR --------------------------------------------------------------------


def test_random_crops_have_torchvisions_areas_and_ratios():
    """Where a crop came from is read off an image whose pixels are their coordinates, enlarged so
    that the ends are exact."""
    h, w = 60, 90
    y, x = np.mgrid[:h, :w]
    image = Image.fromarray(np.stack([x, y, x * 0], 2).astype(np.uint8))
    rng, sizes = rng_of(0), []
    for _ in range(400):
        crop = np.asarray(A.random_crop(image, 180, (0.2, 1), rng)).astype(float)
        assert crop.shape == (180, 180, 3) and crop[..., 0].max() < w and crop[..., 1].max() < h
        sizes.append(np.ptp(crop, (0, 1))[:2] + 1)
    cw, ch = np.array(sizes).T
    area, ratio = cw * ch / (w * h), cw / ch
    assert 0.18 < area.min() < 0.25 and 0.85 < area.max() <= 1
    assert 0.45 < area.mean() < 0.62  # of area 1 few fit: 3:2 is no legal ratio
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    for size in ((400, 20), (20, 400), (1, 1)):  # no legal crop: the largest in the middle
        assert A.random_crop(Image.new("RGB", size), 8, (1, 1), rng).size == (8, 8)


def test_a_view_without_colour_changes_is_a_crop():
    image = Image.fromarray(noise(40, 40))
    for seed in range(20):
        view = A.view(image, 16, (0.2, 1), 0, 0, 0, rng_of(seed))
        whole = A.random_crop(image, 16, (0.2, 1), rng_of(seed))
        mirrored = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert view.tobytes() in (whole.tobytes(), mirrored.tobytes())


def test_the_hue_of_a_view_is_turned_as_torchvision_does(monkeypatch):
    image = Image.fromarray(noise(32, 32))
    monkeypatch.setattr(A, "random_crop", lambda image, *_: image)
    turns = [np.asarray(F.adjust_hue(image, k / 20)).astype(int) for k in range(-10, 11)]
    seen = set()
    for seed in range(40):
        view = np.asarray(A.view(image, 32, (1, 1), (0, 0, 0, 0.5), 0, 0, rng_of(seed), flip=0))
        apart = [np.abs(turn - view).mean() for turn in turns]
        assert min(apart) < 12, seed
        seen.add(np.argmin(apart))
    assert len(seen) > 12


def test_grey_blur_and_flip_of_views_are_as_frequent_as_they_should_be():
    image = Image.fromarray(noise(32, 32) // np.linspace(1, 4, 32, dtype=np.uint8)[:, None])
    how = dict(size=32, crop=(1, 1), jitter=(0, 0, 0, 0.5), grey=0.2, blur=(2, 2))
    views = [np.asarray(A.view(image, rng=rng_of((1, k)), **how)).astype(float) for k in range(400)]
    assert 0.14 < np.mean([np.ptp(v, 2).max() <= 3 for v in views]) < 0.26
    rough = np.array([np.abs(np.diff(v, axis=1)).mean() for v in views])
    assert 0.4 < np.mean(rough < 6) < 0.6
    assert 0.4 < np.mean([v[:, :8].mean() < v[:, -8:].mean() for v in views]) < 0.6


# ---- files that can be copied alone --------------------------------------------------------------

ALONE = """
import sys, numpy as np
from PIL import Image
import augment
boxes = np.array([[2, 2, 9, 9]], "float32")
target = dict(boxes=boxes, labels=np.zeros(1, "int64"))
for policy in augment.JITTER:
    rng = np.random.default_rng(0)
    image, out = augment.augment(Image.new("RGB", (20, 15)), target, policy, 32, rng)
    assert image.size == (32, 32)
assert "torch" not in sys.modules
import torch, ops, backbones
net = backbones.build("resnet10", "gn")
images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
assert net(backbones.normalise(images))[5].shape == (1, 256, 1, 1)
anchors = torch.tensor([[0.0, 0, 8, 8], [4, 4, 8, 8]])
assert torch.allclose(ops.decode(ops.encode(anchors, anchors), anchors), anchors)
print([module.__file__ for module in (augment, ops, backbones)])
"""


def test_augment_ops_and_backbones_import_nothing_local_and_work_alone(tmp_path):
    local = {path.stem for path in ROOT.glob("*.py")} | {"tools", "studies"}
    for name in ("augment.py", "ops.py", "backbones.py"):
        shutil.copy(ROOT / name, tmp_path)
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not local & {module.split(".")[0] for module in modules}, name
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(os.path.realpath(tmp_path)) == 3
