"""Properties of augment.py: photometric ops against torchvision, geometric ops against painted rectangles, policies."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

import augment as A

JITTER = {'s1': (0.8, 1.2), 's2': (0.8, 1.2), 's3': (0.5, 2.0), 's4': (0.5, 2.0), 's1-large': (0.5, 2.0),
          's1-wide': (0.1, 1.9), 's1-voc': (0.6, 1.0), 's1-coco': (0.8, 1.0), 's1-bdd': (0.7, 1.0)}
POLICIES = tuple(JITTER)
GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
PHOTOMETRIC = tuple(A.OPS)
ONLY = tuple(f'{op}_Only_BBoxes' for op in GEOMETRIC + ('Equalize', 'Cutout'))
ALL_OPS = PHOTOMETRIC + ('Cutout',) + tuple(f'{op}_BBox' for op in GEOMETRIC) + ONLY


def noise(w, h, seed=0):
    """Random but not white: a different range per channel, so that AutoContrast and Equalize have something to do."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(lo, hi, (h, w)) for lo, hi in ((20, 180), (60, 255), (0, 90))], 2).astype(np.uint8)


def make_target(boxes, **extra):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    return dict(boxes=boxes, labels=np.arange(n, dtype=np.int64), scores=(np.arange(n) / 100).astype(np.float32),
                crowd=np.arange(n) % 2 == 1, image_id=17, **extra)


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
    return None if len(xs) == 0 else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)


def red(image):
    pixels = np.asarray(image)
    return (pixels[..., 0] > 127) & (pixels[..., 2] < 64)                      # neither the fill nor the padding colour


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

# ----------------------------------------------------------------------------------------------------- photometric ops


@pytest.mark.parametrize('op, value, reference, tolerance', [
    ('AutoContrast', None, lambda t: F.autocontrast(t), 1),
    ('Equalize', None, lambda t: F.equalize(t), 0),
    ('Invert', None, lambda t: F.invert(t), 0),
    ('Posterize', 4, lambda t: F.posterize(t, 4), 0),
    ('Posterize', 2, lambda t: F.posterize(t, 2), 0),
    ('Solarize', 110, lambda t: F.solarize(t, 110), 0),
    ('Color', 1.9, lambda t: F.adjust_saturation(t, 1.9), 2),
    ('Color', 0.1, lambda t: F.adjust_saturation(t, 0.1), 2),
    ('Contrast', 1.9, lambda t: F.adjust_contrast(t, 1.9), 2),
    ('Contrast', 0.1, lambda t: F.adjust_contrast(t, 0.1), 2),
    ('Brightness', 1.9, lambda t: F.adjust_brightness(t, 1.9), 1),
    ('Brightness', 0.1, lambda t: F.adjust_brightness(t, 0.1), 1),
    ('Sharpness', 1.9, lambda t: F.adjust_sharpness(t, 1.9), 2),
    ('Sharpness', 0.1, lambda t: F.adjust_sharpness(t, 0.1), 2),
])
def test_photometric_ops_agree_with_torchvision(op, value, reference, tolerance):
    pixels = noise(41, 33)
    want = reference(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy().astype(int)
    got, _ = A.transform(Image.fromarray(pixels), make_target([]), op, value, None)
    assert np.abs(np.asarray(got).astype(int) - want).max() <= tolerance
    assert np.abs(want - pixels).max() > 5                                     # the op does something on this input


def test_photometric_ops_by_hand():
    row = np.array([0, 17, 127, 128, 200, 255], np.uint8)
    image = Image.fromarray(np.repeat(row[None, :, None], 3, 2))

    def result(op, value=None):
        return np.asarray(A.OPS[op](image, value))[0, :, 1].tolist()
    assert result('SolarizeAdd', 110) == [110, 127, 237, 128, 200, 255]
    assert result('SolarizeAdd', 200) == [200, 217, 255, 128, 200, 255]
    assert result('Solarize', 128) == [0, 17, 127, 127, 55, 0]
    assert result('Solarize', A.ARGUMENT['Solarize'](10, None, 1)) == row.tolist()      # magnitude 10: a no-op
    assert result('Invert') == [255, 238, 128, 127, 55, 0]
    assert result('Posterize', 4) == [0, 16, 112, 128, 192, 240]
    assert result('Brightness', 0.5) == [0, 8, 63, 64, 100, 127]


def test_sharpness_kernel_and_border_by_hand():
    pixels = np.full((5, 5, 3), 100, np.uint8)
    pixels[2, 2] = 113
    smooth = np.asarray(A.sharpness(Image.fromarray(pixels), 0.0))[..., 0]
    want = np.full((5, 5), 100)
    want[1:4, 1:4] = 101                                                       # 13 extra, 1/13 to each neighbour
    want[2, 2] = 105                                                           # 5/13 in the centre
    assert np.array_equal(smooth, want)
    pixels[0, 0] = 113                                                         # border pixels stay, whatever the factor
    assert np.asarray(A.sharpness(Image.fromarray(pixels), 0.0))[0, 0, 0] == 113


def test_contrast_pivots_on_the_true_mean_of_a_large_image():
    pixels = np.full((300, 300, 3), 50, np.uint8)                              # 90k: the TF quirk would pivot on 255
    assert np.array_equal(np.asarray(A.OPS['Contrast'](Image.fromarray(pixels), 1.9)), pixels)

# ------------------------------------------------------------------------------------------------------- geometric ops


@pytest.mark.parametrize('degrees', (30, -30, 11))
def test_rotate_turns_counter_clockwise_like_torchvision(degrees):
    pixels = noise(61, 47)
    want = F.rotate(torch.from_numpy(pixels).permute(2, 0, 1), degrees, InterpolationMode.NEAREST, fill=[128] * 3)
    got, _ = A.transform(Image.fromarray(pixels), make_target([]), 'Rotate', degrees, None)
    agree = (np.asarray(got) == want.permute(1, 2, 0).numpy()).all(2)
    assert agree.mean() > 0.99                                                 # but for ties of the nearest neighbour


@pytest.mark.parametrize('slope', (0.3, -0.3))
def test_shears_move_pixels_as_the_formula_says(slope):
    pixels = noise(40, 30)
    ys, xs = np.mgrid[:30, :40]
    sheared = {'ShearX': (ys, np.floor(xs + 0.5 - slope * (ys + 0.5)).astype(int)),
               'ShearY': (np.floor(ys + 0.5 - slope * (xs + 0.5)).astype(int), xs)}
    for op, (sy, sx) in sheared.items():
        inside = (sy >= 0) & (sy < 30) & (sx >= 0) & (sx < 40)
        want = np.where(inside[..., None], pixels[sy.clip(0, 29), sx.clip(0, 39)], 128)
        got, _ = A.transform(Image.fromarray(pixels), make_target([]), op, slope, None)
        assert (np.asarray(got) == want).all(2).mean() > 0.99, op


def test_translations_are_exact_and_fill_with_grey_and_ignore():
    pixels = noise(20, 12)
    mask = np.random.default_rng(1).integers(0, 5, (12, 20)).astype(np.uint8)
    image, target = A.transform(Image.fromarray(pixels), make_target([[2, 2, 6, 6]], mask=mask), 'TranslateX', 5, None)
    assert np.array_equal(np.asarray(image)[:, 5:], pixels[:, :-5]) and (np.asarray(image)[:, :5] == 128).all()
    assert np.array_equal(target['mask'][:, 5:], mask[:, :-5]) and (target['mask'][:, :5] == 255).all()
    assert target['boxes'].tolist() == [[7, 2, 11, 6]]
    image, target = A.transform(Image.fromarray(pixels), make_target([[2, 2, 6, 6]], mask=mask), 'TranslateY', -3, None)
    assert np.array_equal(np.asarray(image)[:-3], pixels[3:]) and (np.asarray(image)[-3:] == 128).all()
    assert np.array_equal(target['mask'][:-3], mask[3:]) and (target['mask'][-3:] == 255).all()
    assert target['boxes'].tolist() == [[2, 0, 6, 3]]                          # clipped at the top


@pytest.mark.parametrize('op', GEOMETRIC)
def test_geometric_ops_move_pixels_mask_and_boxes_together(op):
    image, target = painted(200, 160, (60, 50, 120, 90))
    directions = set()
    for seed in range(12):
        level = 2 + seed % 9
        moved, out = A.apply_op(image, target, f'{op}_BBox', level, np.random.default_rng(seed))
        assert np.abs(extent(red(moved)) - out['boxes'][0]).max() <= 1.5
        assert np.abs(extent(out['mask'] == 1) - out['boxes'][0]).max() <= 1.5
        assert np.array_equal(red(moved), out['mask'] == 1)
        assert np.array_equal(np.asarray(moved)[..., 1] == 128, out['mask'] == 255)
        assert np.abs(out['boxes'] - target['boxes']).max() > 1                # it did move
        shift = out['boxes'][0].reshape(2, 2).mean(0) - target['boxes'][0].reshape(2, 2).mean(0)
        directions.add(tuple(np.sign(shift.round(1))))
    assert len(directions) >= 2                                                # both signs were seen


def test_box_rule_clips_and_leaves_a_sliver_of_a_vanished_box():
    boxes = np.array([[-10, 5, 30, 20], [-30, 5, -10, 20], [110, 60, 130, 70], [20, -9, 40, 0]], np.float32)
    want = [[0, 5, 30, 20], [0, 5, 5, 20], [95, 47.5, 100, 50], [20, 0, 40, 2.5]]
    assert np.allclose(A.box_rule(boxes, 100, 50), want)
    assert A.box_rule(np.zeros((0, 4), np.float32), 100, 50).shape == (0, 4)


def test_a_flat_box_inside_the_image_stays_flat():
    assert np.allclose(A.box_rule(np.array([[50, 20, 50, 30]], np.float32), 100, 50), [[50, 20, 50, 30]])


@pytest.mark.parametrize('w, h, half', ((640, 480, 40), (128, 96, 8), (480, 640, 40)))
def test_cutout_greys_one_square_and_ignores_it(w, h, half):
    areas = []
    for seed in range(20):
        target = make_target([[1, 2, 30, 40]], mask=np.zeros((h, w), np.uint8))
        image, out = A.apply_op(Image.new('RGB', (w, h), (9, 9, 9)), target, 'Cutout', 10, np.random.default_rng(seed))
        grey = (np.asarray(image) == 128).all(2)
        x0, y0, x1, y1 = extent(grey).astype(int)
        assert grey[y0:y1, x0:x1].all() and max(x1 - x0, y1 - y0) <= 2 * half
        assert np.array_equal(out['mask'] == 255, grey)
        assert np.array_equal(out['boxes'], target['boxes'])
        areas.append(grey.sum())
    assert max(areas) == (2 * half) ** 2 and len(set(areas)) > 1               # whole, and cut by the border


def test_only_boxes_moves_the_inside_and_nothing_else():
    pixels = noise(40, 30)
    target = make_target([[5, 4, 25, 14], [30, 20, 30, 25]], mask=np.ones((30, 40), np.uint8))
    rng = np.random.default_rng(0)
    image, out = A.only_boxes(Image.fromarray(pixels), target, 'TranslateY', 3, 3.0, rng)        # p/3 = 1: every box
    want = pixels.copy()
    want[7:14, 5:25], want[4:7, 5:25] = pixels[4:11, 5:25], 128
    assert np.array_equal(np.asarray(image), want)
    assert extent(out['mask'] == 255).tolist() == [5, 4, 25, 7]
    assert (target['mask'] == 1).all()                                         # the input's own mask is not written to
    assert np.array_equal(out['boxes'], target['boxes'])


def test_only_boxes_translates_by_its_own_constant_of_the_whole_image():
    target = make_target([[100, 50, 300, 250]], mask=np.zeros((480, 640), np.uint8))
    image = Image.new('RGB', (640, 480))
    _, out = A.apply_op(image, target, 'TranslateY_Only_BBoxes', 6, np.random.default_rng(0), 3.0, A.AUTOAUGMENT_PIXELS)
    moved = extent(out['mask'] == 255)
    assert moved[3] - moved[1] == 72 and moved[2] - moved[0] == 200            # 0.6 * 120, not 0.6 * 250


def test_only_boxes_acts_on_a_third_of_p():
    boxes = [[10 * i, 0, 10 * i + 8, 8] for i in range(1000)]
    image = Image.new('RGB', (10000, 8), (1, 2, 3))
    out, _ = A.apply_op(image, make_target(boxes), 'Equalize_Only_BBoxes', 10, np.random.default_rng(0), p=0.6)
    assert np.array_equal(np.asarray(out), np.asarray(image))                  # one colour per box: nothing to equalize
    out, _ = A.only_boxes(image, make_target(boxes), 'Invert', None, 0.6, np.random.default_rng(0))
    share = (np.asarray(out)[0, ::10, 0] == 254).mean()
    assert 0.16 < share < 0.24


@pytest.mark.parametrize('name', ALL_OPS)
@pytest.mark.parametrize('w, h', ((64, 48), (1, 1), (8, 200), (200, 8), (3, 2)))
def test_every_op_takes_odd_sizes_no_boxes_and_degenerate_boxes(name, w, h):
    odd = [[0, 0, w, h], [0, 0, 0, 0], [w, h, w, h], [w / 2, 0, w / 2, h], [-5, -5, -1, -1], [0, 0, .2, .2]]
    for boxes in ([], odd):
        for seed in range(4):
            target = make_target(boxes, mask=np.zeros((h, w), np.uint8))
            image, out = A.apply_op(Image.fromarray(noise(w, h)), target, name, 10, np.random.default_rng(seed))
            assert image.size == (w, h) and image.mode == 'RGB'
            assert out['boxes'].shape == (len(boxes), 4) and out['boxes'].dtype == np.float32
            assert np.isfinite(out['boxes']).all() and len(out['labels']) == len(boxes)
            assert out['mask'].shape == (h, w) and out['mask'].dtype == np.uint8

# ------------------------------------------------------------------------------------------------- tables and policies


def test_magnitudes_are_the_published_ones_on_coco_sizes():
    at10 = {op: f(10, A.RANDAUGMENT_PIXELS, 1.0) for op, f in A.ARGUMENT.items()}
    assert at10 == {'Rotate': 30, 'ShearX': 0.3, 'ShearY': 0.3, 'TranslateX': 100, 'TranslateY': 100, 'Cutout': 40,
                    'Posterize': 4, 'Solarize': 256, 'SolarizeAdd': 110, 'Color': pytest.approx(1.9),
                    'Contrast': pytest.approx(1.9), 'Brightness': pytest.approx(1.9), 'Sharpness': pytest.approx(1.9),
                    'AutoContrast': None, 'Equalize': None, 'Invert': None}
    assert A.ARGUMENT['TranslateX'](4, A.AUTOAUGMENT_PIXELS, 1.0) == 100
    assert A.ARGUMENT['Cutout'](8, A.AUTOAUGMENT_PIXELS, 1.0) == 80
    assert A.ARGUMENT['TranslateY'](6, A.ONLY_BBOXES_PIXELS, 1.0) == 72
    assert A.ARGUMENT['TranslateX'](10, A.RANDAUGMENT_PIXELS, 0.2) == 20       # our rule: proportionate elsewhere
    assert A.longest_640(Image.new('RGB', (427, 640))) == 1.0


def recorded_ops(monkeypatch, policy, n):
    rows = []
    monkeypatch.setattr(A, 'apply_op', lambda image, target, *rest: (rows[-1].append(rest), (image, target))[1])
    rng, image, target = np.random.default_rng(0), Image.new('RGB', (8, 8)), make_target([])
    for _ in range(n):
        rows.append([])
        A.augment(image, target, policy, 8, rng)
    return rows


def test_randaugment_draws_two_of_sixteen_uniformly_at_magnitude_ten(monkeypatch):
    rows = recorded_ops(monkeypatch, 's4', 1600)
    assert all(len(row) == 2 and all(level == 10 for _, level, *_ in row) for row in rows)
    names = [name for row in rows for name, *_ in row]
    counts = [names.count(op) for op in A.RANDAUGMENT_OPS]
    assert len(set(A.RANDAUGMENT_OPS)) == 16 and sum(counts) == 3200
    assert 140 < min(counts) and max(counts) < 260                             # 200 expected, sigma 14
    assert any(row[0][0] == row[1][0] for row in rows)                         # with replacement


@pytest.mark.parametrize('policy', ('s2', 's3'))
def test_autoaugment_draws_whole_rows_of_v0(monkeypatch, policy):
    rows = recorded_ops(monkeypatch, policy, 500)
    drawn = [tuple((name, p, level) for name, level, _, p, _ in row) for row in rows]
    counts = [drawn.count(sub) for sub in A.POLICY_V0]
    assert sum(counts) == 500 and min(counts) > 60                             # 100 expected, sigma 9
    assert all(pixels is A.AUTOAUGMENT_PIXELS for row in rows for *_, pixels in row)


@pytest.mark.parametrize('policy', ('s1', 's1-large', 's1-wide'))
def test_s1_is_flip_and_crop_only(monkeypatch, policy):
    assert all(row == [] for row in recorded_ops(monkeypatch, policy, 20))


@pytest.mark.parametrize('policy', ('s1-large', 's1-wide'))
def test_the_wider_s1_are_s1_but_for_their_jitter(monkeypatch, policy):
    image, target = Image.fromarray(noise(80, 60)), painted(80, 60, (10, 10, 50, 40))[1]
    rngs = lambda: map(np.random.default_rng, range(8))
    wide, s1 = ([A.augment(image, target, name, 64, rng) for rng in rngs()] for name in (policy, 's1'))
    monkeypatch.setitem(A.JITTER, 's1', A.JITTER[policy])
    for (a, a_target), (b, b_target) in zip(wide, [A.augment(image, target, 's1', 64, rng) for rng in rngs()]):
        assert a.tobytes() == b.tobytes() and same(a_target, b_target)
    assert sum(a.tobytes() != c.tobytes() for (a, _), (c, _) in zip(wide, s1)) >= 6  # the same scale now and then


def test_an_op_is_applied_with_its_probability():
    image, rng = Image.new('RGB', (4, 4), (0, 0, 0)), np.random.default_rng(0)
    hits = sum(A.apply_op(image, make_target([]), 'Invert', 10, rng, p=0.6)[0].getpixel((0, 0))[0] == 255
               for _ in range(500))
    assert 250 < hits < 350
    assert not any(A.apply_op(image, make_target([]), 'Invert', 10, rng, p=0.0)[0].getpixel((0, 0))[0]
                   for _ in range(50))


def test_unknown_policy_names_the_four():
    with pytest.raises(ValueError, match=r"s5.*s1.*s2.*s3.*s4"):
        A.augment(Image.new('RGB', (8, 8)), make_target([]), 's5', 8, np.random.default_rng(0))


def test_a_mask_of_another_size_is_refused():
    target = make_target([], mask=np.zeros((8, 9), np.uint8))
    with pytest.raises(ValueError, match='mask'):
        A.augment(Image.new('RGB', (8, 8)), target, 's1', 8, np.random.default_rng(0))


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('w, h', ((60, 45), (1, 1), (8, 200), (200, 8)))
def test_policies_return_the_promised_shapes_for_any_input(policy, w, h):
    cases = [[], [[0, 0, w, h], [w / 4, h / 4, w / 2, h / 2], [0, 0, 0, 0], [w / 2, 0, w / 2, h], [w, h, w + 9, h + 9]]]
    for boxes in cases:
        for seed in range(12):
            target = make_target(boxes, mask=np.zeros((h, w), np.uint8), size=(h, w), note='kept')
            image, out = A.augment(Image.fromarray(noise(w, h)), target, policy, 48, np.random.default_rng(seed))
            n = len(out['boxes'])
            assert image.size == (48, 48) and image.mode == 'RGB' and out['size'] == (48, 48)
            assert out['mask'].shape == (48, 48) and out['mask'].dtype == np.uint8
            assert out['boxes'].shape == (n, 4) and out['boxes'].dtype == np.float32
            assert out['labels'].shape == out['scores'].shape == out['crowd'].shape == (n,)
            assert (out['labels'].dtype, out['scores'].dtype, out['crowd'].dtype) == (np.int64, np.float32, bool)
            assert n <= len(boxes) and (out['boxes'] >= 0).all() and (out['boxes'] <= 48).all()
            assert (out['boxes'][:, 2:] > out['boxes'][:, :2]).all()
            assert out['note'] == 'kept' and out['image_id'] == 17
            if policy.startswith('s1'):
                assert not {2, 3, 4} & set(out['labels'].tolist())             # the degenerate ones never survive


@pytest.mark.parametrize('policy', POLICIES)
def test_same_rng_same_result_other_rng_other_result(policy):
    image, target = Image.fromarray(noise(80, 60)), painted(80, 60, (10, 10, 50, 40))[1]
    results = [A.augment(image, target, policy, 64, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3, 4)]
    assert results[0][0].tobytes() == results[1][0].tobytes() and same(results[0][1], results[1][1])
    assert len({r[0].tobytes() for r in results}) == 5


@pytest.mark.parametrize('policy', POLICIES)
def test_the_input_is_never_written_to(policy):
    pixels, mask = noise(80, 60), np.ones((60, 80), np.uint8)
    target = make_target([[10, 10, 50, 40], [60, 5, 79, 59], [0, 0, 0, 0]], mask=mask, size=(60, 80))
    before = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in target.items()}
    for value in target.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)                                        # a write raises
    image = Image.fromarray(pixels)
    for seed in range(25):
        _, out = A.augment(image, target, policy, 64, np.random.default_rng(seed))
        for key in ('boxes', 'labels', 'scores', 'crowd', 'mask'):
            assert not np.shares_memory(out[key], target[key])
    assert same(target, before) and np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize('policy', POLICIES)
def test_labels_scores_and_crowd_follow_their_box(policy):
    boxes = [[x, y, x + 9, y + 9] for x in range(0, 90, 10) for y in range(0, 60, 10)]
    dropped = 0
    for seed in range(15):
        _, out = A.augment(Image.fromarray(noise(90, 60)), make_target(boxes), policy, 64, np.random.default_rng(seed))
        assert np.allclose(out['scores'], out['labels'] / 100)
        assert np.array_equal(out['crowd'], out['labels'] % 2 == 1)
        dropped += len(boxes) - len(out['boxes'])
    assert (dropped > 0) == (policy not in ('s1-voc', 's1-coco', 's1-bdd'))  # these only shrink: nothing is cut off


def test_drop_empty_keeps_the_right_rows():
    out = A.drop_empty(make_target([[0, 0, 0, 5], [1, 1, 2, 2], [3, 3, 9, 3], [4, 4, 5, 6]], size=(9, 9)))
    assert out['labels'].tolist() == [1, 3] and out['boxes'].tolist() == [[1, 1, 2, 2], [4, 4, 5, 6]]
    assert out['crowd'].tolist() == [True, True] and np.allclose(out['scores'], [0.01, 0.03])

# ------------------------------------------------------------------------------------------------------- flip and crop


def test_flip_moves_pixels_mask_and_boxes_together_and_twice_is_identity():
    image, target = painted(50, 30, (4, 6, 20, 25))
    flipped, out = A.hflip(image, target)
    assert out['boxes'].tolist() == [[30, 6, 46, 25]]
    assert extent(red(flipped)).tolist() == [30, 6, 46, 25] and np.array_equal(red(flipped), out['mask'] == 1)
    back, twice = A.hflip(flipped, out)
    assert back.tobytes() == image.tobytes() and same(twice, target)


def test_flip_happens_half_of_the_time(monkeypatch):
    flips = []
    monkeypatch.setattr(A, 'hflip', lambda image, target: (flips.append(1), (image, target))[1])
    for seed in range(400):
        A.augment(Image.new('RGB', (8, 8)), make_target([]), 's1', 8, np.random.default_rng(seed))
    assert 160 < len(flips) < 240                                              # 200 expected, sigma 10


@pytest.mark.parametrize('jitter', ((0.8, 1.2), (0.5, 2.0)))
def test_crop_moves_pixels_mask_and_boxes_together(jitter):
    image, target = painted(120, 90, (50, 30, 90, 70))
    seen = 0
    for seed in range(40):
        cropped, out = A.crop(image, target, 100, jitter, np.random.default_rng(seed))
        where = extent(red(cropped))
        if where is None:
            assert len(out['boxes']) == 0 or np.diff(out['boxes'].reshape(2, 2), axis=0).min() < 1.5
            continue
        seen += 1
        assert np.abs(where - out['boxes'][0]).max() <= 1.5
        assert np.abs(extent(out['mask'] == 1) - out['boxes'][0]).max() <= 1.5
        padding = (np.asarray(cropped) == A.MEAN_COLOUR).all(2)
        assert np.array_equal(padding, out['mask'] == 255)
        assert not padding[0, 0]                                               # content sits at the top-left
    assert seen > 25


def test_place_equals_resizing_everything_then_cropping():
    pixels, mask = noise(50, 40), np.random.default_rng(0).integers(0, 9, (40, 50)).astype(np.uint8)
    image, (ox, oy) = Image.fromarray(pixels), (31, 17)
    for scaled in ((96, 72), (104, 88)):                                       # ratios without nearest-neighbour ties
        got, out = A.place(image, make_target([[10, 10, 40, 30]], mask=mask), 48, scaled, (ox, oy))
        whole = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(np.asarray(got) - whole[oy:oy + 48, ox:ox + 48]).max() <= 1
        whole_mask = np.asarray(Image.fromarray(mask).resize(scaled, Image.Resampling.NEAREST))
        assert np.array_equal(out['mask'], whole_mask[oy:oy + 48, ox:ox + 48])
        sx, sy = scaled[0] / 50, scaled[1] / 40
        want = [10 * sx - ox, 10 * sy - oy, 40 * sx - ox, 30 * sy - oy]
        assert np.allclose(out['boxes'], [np.clip(want, 0, 48)], atol=1e-4)


@pytest.mark.parametrize('policy', POLICIES)
def test_scale_jitter_and_offsets_cover_their_published_range(monkeypatch, policy):
    calls = []
    monkeypatch.setattr(A, 'place', lambda image, target, size, scaled, offset: calls.append((scaled, offset)))
    rng, image = np.random.default_rng(0), Image.new('RGB', (40, 20))
    for _ in range(800):
        A.augment(image, make_target([]), policy, 400, rng)
    low, high = JITTER[policy]
    ratio = np.array([w / 400 for (w, h), _ in calls])
    span = high - low
    assert low <= ratio.min() < low + 0.05 * span and high - 0.05 * span < ratio.max() <= high
    assert abs(ratio.mean() - (low + high) / 2) < 0.04 * span                  # uniform: sigma of the mean is 0.01 span
    assert all(abs(w - 2 * h) <= 1 for (w, h), _ in calls)                     # aspect kept
    slack = np.array([max(w - 400, 0) for (w, h), _ in calls])
    x, y = np.array([offset for _, offset in calls]).T
    assert (x[slack == 0] == 0).all() and (y == 0).all()                       # smaller than the canvas: no shift
    roomy = slack >= 20
    share = x[roomy] / slack[roomy]
    assert high <= 1 or share.min() >= 0 and share.max() < 1 and 0.4 < share.mean() < 0.6


def test_policies_s2_and_s4_use_their_op_stage_before_the_crop(monkeypatch):
    sizes = []
    monkeypatch.setattr(A, 'apply_op', lambda image, target, *rest: (sizes.append(image.size), (image, target))[1])
    for policy in ('s2', 's4'):
        A.augment(Image.new('RGB', (30, 20)), make_target([]), policy, 64, np.random.default_rng(0))
    assert sizes == [(30, 20)] * 4                                             # at the original resolution


@pytest.mark.parametrize('policy', POLICIES)
def test_the_mask_stays_on_its_pixels_under_every_policy(policy):
    """Two-tone image: whatever the photometric ops did to the tones, well inside class 0 (or 1) only one is left."""
    h, w = 120, 160
    mask = np.zeros((h, w), np.uint8)
    mask[20:70, 15:90] = 1
    mask[60:115, 100:150] = 1
    pixels = np.where(mask[..., None] == 1, np.array([200, 90, 150]), np.array([60, 40, 30])).astype(np.uint8)
    target = make_target([[15, 20, 90, 70], [100, 60, 150, 115]], mask=mask)
    contrasted = 0
    for seed in range(40):
        image, out = A.augment(Image.fromarray(pixels), target, policy, 128, np.random.default_rng(seed))
        image = np.asarray(image).astype(int)
        means = []
        for index in (0, 1):
            inside = out['mask'] == index
            for _ in range(4):                                                 # erode: resizing blends near the edges
                inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
                inside[[0, -1]], inside[:, [0, -1]] = False, False
            if inside.sum() > 20:
                assert np.ptp(image[inside], axis=0).max() <= 3, (seed, index)
                means.append(image[inside].mean(0))
        contrasted += len(means) == 2 and np.abs(means[0] - means[1]).max() > 30
        padding = (image == A.MEAN_COLOUR).all(2)
        assert (out['mask'][padding] == 255).all()
    assert contrasted > 20                                                     # the check above had something to see

# ----------------------------------------------------------------------------------------------------- fit, copy-alone


def test_fit_scales_to_the_longer_side_and_pads_with_the_mean_colour():
    image, target = painted(80, 40, (20, 10, 60, 30))
    out_image, out, scale = A.fit(image, target, 120)
    pixels = np.asarray(out_image)
    assert scale == 1.5 and out_image.size == (120, 120) and out['size'] == (120, 120)
    assert np.allclose(out['boxes'], [[30, 15, 90, 45]])
    assert (pixels[60:] == A.MEAN_COLOUR).all() and (pixels[59] == 0).all()
    assert (out['mask'][60:] == 255).all() and (out['mask'][:60] < 2).all()
    assert np.abs(extent(red(out_image)) - out['boxes'][0]).max() <= 1


@pytest.mark.parametrize('w, h', ((97, 61), (61, 97), (1, 1), (8, 200), (640, 480)))
def test_fit_is_undone_by_dividing_boxes_by_the_scale(w, h):
    target = make_target([[0, 0, w, h]], mask=np.zeros((h, w), np.uint8))
    _, out, scale = A.fit(Image.fromarray(noise(w, h)), target, 64)
    assert np.abs(out['boxes'] - np.array([0, 0, w, h]) * scale).max() <= 0.5 + 1e-4
    assert np.abs(out['boxes'][0, 2:].max() - 64) < 1e-4


def test_mean_colour_is_zero_after_normalisation():
    normalised = (np.array(A.MEAN_COLOUR) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(normalised).max() < 0.01


def test_the_file_works_alone(tmp_path):
    shutil.copy(A.__file__, tmp_path / 'augment.py')
    code = ("import sys, numpy as np; from PIL import Image; import augment\n"
            "t = dict(boxes=np.array([[2, 2, 9, 9]], 'float32'), labels=np.zeros(1, 'int64'),\n"
            "         scores=np.ones(1, 'float32'), crowd=np.zeros(1, bool))\n"
            "for p in ('s1', 's2', 's3', 's4'):\n"
            "    image, out = augment.augment(Image.new('RGB', (20, 15)), t, p, 32, np.random.default_rng(0))\n"
            "    assert image.size == (32, 32)\n"
            "print(augment.__file__, 'torch' in sys.modules)\n")
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    where, torch_loaded = run.stdout.split()
    assert os.path.realpath(where) == os.path.realpath(tmp_path / 'augment.py') and torch_loaded == 'False'


# --- views of MoCo and SimCLR

def test_random_crops_have_torchvisions_areas_and_ratios():
    """Where a crop came from is read off an image whose pixels are their coordinates, enlarged so that the ends are exact."""
    h, w = 60, 90
    y, x = np.mgrid[:h, :w]
    image, rng, areas, ratios = Image.fromarray(np.stack([x, y, x * 0], 2).astype(np.uint8)), np.random.default_rng(0), [], []
    for _ in range(400):
        crop = np.asarray(A.random_crop(image, 180, (0.2, 1), rng)).astype(float)
        cw, ch = crop[..., 0].max() - crop[..., 0].min() + 1, crop[..., 1].max() - crop[..., 1].min() + 1
        assert crop.shape == (180, 180, 3) and crop[..., 0].max() < w and crop[..., 1].max() < h
        areas.append(cw * ch / (w * h))
        ratios.append(cw / ch)
    assert 0.18 < min(areas) < 0.25 and 0.85 < max(areas) <= 1 and 0.45 < np.mean(areas) < 0.62  # of 1 few fit: 3:2 is no ratio
    assert 0.72 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
    for size in ((400, 20), (20, 400), (1, 1)):  # no legal crop of such an area: the largest in the middle
        assert A.random_crop(Image.new("RGB", size), 8, (1, 1), rng).size == (8, 8)


def test_a_view_without_colour_changes_is_a_crop():
    image = Image.fromarray(noise(40, 40))
    for seed in range(20):
        view = A.view(image, 16, (1, 1), (0, 0, 0, 0), 0, (1e-9, 1e-9), np.random.default_rng(seed))
        whole = A.random_crop(image, 16, (1, 1), np.random.default_rng(seed))
        mirrored = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert min(np.abs(np.asarray(view).astype(int) - np.asarray(o)).max() for o in (whole, mirrored)) <= 4  # HSV and back


def test_the_hue_of_a_view_is_turned_as_torchvision_does(monkeypatch):
    image = Image.fromarray(noise(32, 32))
    monkeypatch.setattr(A, "random_crop", lambda image, *_: image)
    seen = set()
    for seed in range(40):
        view = np.asarray(A.view(image, 32, (1, 1), (0, 0, 0, 0.5), 0, (1e-9, 1e-9), np.random.default_rng(seed))).astype(int)
        turns = [np.asarray(F.adjust_hue(image, k / 20)).astype(int) for k in range(-10, 11)]
        near = min((np.abs(o - v).mean(), k) for k, o in enumerate(turns) for v in (view, view[:, ::-1]))
        assert near[0] < 12, seed
        seen.add(near[1])
    assert len(seen) > 12


def test_grey_blur_and_flip_of_views_are_as_frequent_as_they_should_be():
    image, draws = Image.fromarray(noise(32, 32)), 400
    views = [np.asarray(A.view(image, 32, (1, 1), (0, 0, 0, 0.5), 0.2, (2, 2), np.random.default_rng((1, k)))).astype(float)
             for k in range(draws)]
    grey = [np.ptp(v, 2).max() <= 3 for v in views]
    assert 0.14 < np.mean(grey) < 0.26
    rough = [np.abs(np.diff(v, axis=1)).mean() for v in views]
    assert 0.4 < np.mean([r < 12 for r in rough]) < 0.6 and np.mean([12 <= r < 14 for r in rough]) < 0.05
