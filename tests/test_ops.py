"""ops.py: every function against torchvision's, or against its formula written out by hand, on
random tensors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection._utils import BoxCoder, Matcher

import ops
from ops import IGNORE, NEGATIVE

CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def random_boxes(*shape, seed=0, low=4.0, high=40.0, area=64.0):
    """(*shape, 4) xyxy with sides in low..high and centres anywhere in an area x area square."""
    g = generator(seed)
    centre = torch.rand(*shape, 2, generator=g) * area
    half = (low + (high - low) * torch.rand(*shape, 2, generator=g)) / 2
    return torch.cat([centre - half, centre + half], -1)


# ---- anchors -------------------------------------------------------------------------------------


def test_anchors_of_one_place_are_those_computed_by_hand():
    got = ops.make_anchors(8, 8, (3, 3), 4.0)  # centre (4, 4), smallest side 4 * 8 = 32
    root = math.sqrt(2)
    rows = []
    for side in (32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)):
        for w, h in ((side, side), (side * root, side / root), (side / root, side * root)):
            rows.append([4 - w / 2, 4 - h / 2, 4 + w / 2, 4 + h / 2])
    assert torch.allclose(got, torch.tensor(rows), atol=1e-5)


def test_anchors_of_a_level_tile_row_major_and_scale_with_the_stride():
    got = ops.make_anchors(40, 70, (4, 4), 3.0)  # stride 16: 3 rows, 5 columns
    centres = ((got[:, :2] + got[:, 2:]) / 2).reshape(3, 5, 9, 2)
    for y in range(3):
        for x in range(5):
            want = torch.tensor([8.0 + 16 * x, 8.0 + 16 * y])
            assert torch.allclose(centres[y, x], want.expand(9, 2), atol=1e-4)
    assert (got[0, 2:] - got[0, :2]).tolist() == [48.0, 48.0]


@pytest.mark.parametrize("h, w, levels", [(96, 160, (3, 7)), (97, 131, (3, 6)), (1, 300, (4, 5))])
def test_anchors_are_nine_a_place_of_every_level_rounded_up_finest_first(h, w, levels):
    got = ops.make_anchors(h, w, levels)
    strides = [2**level for level in range(levels[0], levels[1] + 1)]
    count = sum(math.ceil(h / s) * math.ceil(w / s) * 9 for s in strides)
    assert got.shape == (count, 4) and got.dtype == torch.float32
    row = ops.make_anchors(1, w, (levels[0], levels[0]))
    assert torch.allclose(got[: len(row)], row)


# ---- boxes ---------------------------------------------------------------------------------------


def test_box_iou_equals_torchvision_one_by_one_and_in_a_batch():
    a = random_boxes(3, 30, seed=1)
    b = random_boxes(3, 50, seed=2)
    got = ops.box_iou(a, b)
    assert got.shape == (3, 30, 50) and (got > 0.3).sum() > 20 and (got == 0).any()
    for i in range(3):
        assert torch.allclose(got[i], torchvision.ops.box_iou(a[i], b[i]), atol=1e-7)


@pytest.mark.parametrize("n, m", [(0, 4), (4, 0), (0, 0)])
def test_box_iou_without_boxes_is_an_empty_matrix(n, m):
    assert ops.box_iou(random_boxes(n), random_boxes(m)).shape == (n, m)
    assert ops.box_iou(random_boxes(2, n), random_boxes(2, m)).shape == (2, n, m)


def test_box_iou_of_degenerate_boxes_is_zero_not_nan():
    rows = [[5.0, 5, 5, 5], [5, 5, 9, 5], [5, 9, 5, 5], [9, 9, 5, 5], [0, 0, 0, 0]]
    empty = torch.tensor(rows)
    whole = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    assert ops.box_iou(empty, torch.cat([empty, whole])).eq(0).all()
    assert ops.box_iou(whole, whole).item() == 1


def test_encode_and_decode_equal_torchvisions_box_coder_and_invert_each_other():
    boxes = random_boxes(200, seed=1)
    anchors = random_boxes(200, seed=2)
    deltas = randn(200, 4, seed=3)
    deltas[:20, 2:] += 6  # beyond the clip at ln(1000/16) = 4.13
    assert torch.allclose(
        ops.encode(boxes, anchors), CODER.encode_single(boxes, anchors), atol=1e-5
    )
    want = CODER.decode_single(deltas, anchors)
    assert torch.allclose(ops.decode(deltas, anchors), want, rtol=1e-5, atol=1e-3)
    batch = random_boxes(2, 200, seed=3)  # (B, A, 4) against (A, 4)
    assert torch.allclose(ops.decode(ops.encode(batch, anchors), anchors), batch, atol=1e-4)


def test_decode_clips_log_ratios_at_1000_over_16_and_nothing_else():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    huge = ops.decode(torch.tensor([[0.0, 0.0, 50.0, 1e9]]), anchor)
    assert torch.allclose(huge[:, 2:] - huge[:, :2], torch.tensor([[1000.0, 1000.0]]))
    far = ops.decode(torch.tensor([[100.0, -100.0, -50.0, 0.0]]), anchor)
    assert torch.allclose(far, torch.tensor([[1608.0, -1600.0, 1608.0, -1584.0]]))
    assert ops.encode(far, anchor).isfinite().all()  # though one side is nothing


# ---- matching ------------------------------------------------------------------------------------

ANCHORS = ops.make_anchors(64, 64, (3, 5), 2.0)


def all_valid(boxes):
    return torch.ones(boxes.shape[:2], dtype=torch.bool)


def undisputed(iou):
    """Whether each box has one best anchor, which overlaps it and likes it best."""
    top, anchor = iou.max(1)
    alone = ((iou == top[:, None]).sum(1) == 1) & (top > 0)
    return bool((alone & (iou.max(0).indices[anchor] == torch.arange(len(iou)))).all())


@pytest.mark.parametrize("negative", [0.5, 0.4])
def test_match_equals_torchvisions_matcher_where_boxes_do_not_compete(negative):
    matcher = Matcher(0.5, negative, allow_low_quality_matches=True)
    agreed = forced = ignored = 0
    for seed in range(150):
        boxes = random_boxes(1, 1 + seed % 5, seed=seed, low=3, high=60)
        iou = torchvision.ops.box_iou(boxes[0], ANCHORS)
        if undisputed(iou):
            got = ops.match(ANCHORS, boxes, all_valid(boxes), 0.5, negative)
            assert got.dtype == torch.int64 and torch.equal(got[0], matcher(iou)), f"seed {seed}"
            agreed += 1
            forced += int((iou.max(1).values < 0.5).sum())
            ignored += int((got == IGNORE).sum())
    assert agreed > 50 and forced > 20 and (ignored > 0) == (negative < 0.5)  # they did occur


def test_match_keeps_the_first_of_equally_good_anchors_where_torchvision_keeps_all():
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [40, 40, 50, 50]])
    boxes = torch.tensor([[[7.0, 0, 13, 10]]])  # the same small overlap with the first two
    assert ops.match(anchors, boxes, all_valid(boxes)).tolist() == [[0, NEGATIVE, NEGATIVE]]
    matcher = Matcher(0.5, 0.5, allow_low_quality_matches=True)
    assert matcher(torchvision.ops.box_iou(boxes[0], anchors)).tolist() == [0, 0, NEGATIVE]


def test_match_gives_a_disputed_anchor_to_the_later_box_where_torchvision_asks_the_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]])
    boxes = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 5, 5]]])  # IoU 0.9 and 0.25 with the first
    for rows in (boxes, boxes.flip(1)):
        assert ops.match(anchors, rows, all_valid(rows)).tolist() == [[1, NEGATIVE]]
    matcher = Matcher(0.5, 0.5, allow_low_quality_matches=True)
    assert matcher(torchvision.ops.box_iou(boxes[0], anchors)).tolist() == [0, NEGATIVE]


def test_match_gives_each_box_its_best_anchor_however_small_the_overlap():
    boxes = random_boxes(40, 4, seed=5, low=1, high=6)  # far smaller than any anchor
    matched = ops.match(ANCHORS, boxes, all_valid(boxes))
    for i in range(40):
        best = torchvision.ops.box_iou(boxes[i], ANCHORS).max(1).indices  # (M,)
        distinct = len(best.unique())
        assert (matched[i][best] >= 0).all() and (matched[i] >= 0).sum() == distinct
        if distinct == 4:
            assert matched[i][best].tolist() == [0, 1, 2, 3]


def test_match_without_boxes_or_with_boxes_that_overlap_nothing_is_all_negative():
    none = torch.zeros(2, 0, 4)
    no_columns = ops.match(ANCHORS, none, all_valid(none))
    padding = ops.match(ANCHORS, random_boxes(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5, 0.4)
    far = random_boxes(2, 3) + 900
    for matched in (no_columns, padding, ops.match(ANCHORS, far, all_valid(far))):
        assert matched.shape == (2, len(ANCHORS)) and (matched == NEGATIVE).all()


def test_match_of_a_padded_batch_equals_its_images_one_by_one():
    boxes = random_boxes(4, 6, seed=7)  # what lies in the padding must not matter
    valid = torch.rand(4, 6, generator=generator(0)) < 0.5  # it may be anywhere
    valid[1] = False
    batched = ops.match(ANCHORS, boxes, valid, 0.5, 0.4)
    for i in range(4):
        keep = valid[i].nonzero()[:, 0]
        alone = boxes[i : i + 1, keep]
        want = ops.match(ANCHORS, alone, all_valid(alone), 0.5, 0.4)[0]
        if len(keep):
            want = torch.where(want >= 0, keep[want.clamp(min=0)], want)
        assert torch.equal(batched[i], want)


# ---- losses of boxes -----------------------------------------------------------------------------


def random_classes(b, a, k, seed=0):
    """(B, A): mostly negative, a fifth each positive and ignored."""
    g = generator(seed)
    draw = torch.rand(b, a, generator=g)
    label = torch.randint(0, k, (b, a), generator=g)
    return torch.where(draw < 0.2, label, torch.where(draw < 0.4, IGNORE, NEGATIVE))


def reference_focal(logits, classes, alpha=0.25, gamma=1.5):
    """torchvision's loss, summed over the anchors of each image that are not ignored -> (B,)."""
    target = F.one_hot(classes.clamp(min=0), logits.shape[-1]) * (classes >= 0)[..., None]
    loss = torchvision.ops.sigmoid_focal_loss(logits, target.to(logits), alpha, gamma)
    return (loss * (classes != IGNORE)[..., None]).sum((1, 2))


def both_focal(x, classes, scale=1.0, **settings):
    """Our loss and gradient, and torchvision's in float64."""
    leaf = x.clone().requires_grad_()
    double = x.double().clone().requires_grad_()
    got = ops.focal_loss(leaf, classes, **settings)
    want = reference_focal(double, classes, **settings)
    (got * scale).sum().backward()
    (want * scale).sum().backward()
    return got, leaf.grad, want, double.grad


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("settings", [{}, dict(gamma=2.0), dict(alpha=0.6)])
def test_focal_loss_and_its_gradient_equal_torchvision(settings, spread):
    x = randn(3, 60, 7, seed=1) * spread
    scale = torch.tensor([1.0, 0.1, 3.0])
    classes = random_classes(3, 60, 7)
    classes[1] = NEGATIVE
    got, grad, want, want_grad = both_focal(x, classes, scale, **settings)
    assert got.shape == (3,) and got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-5)
    assert torch.allclose(grad.double(), want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
@pytest.mark.parametrize("k", [0, NEGATIVE])
def test_focal_loss_is_exact_and_finite_at_extreme_logits(gamma, k):
    for value in (-100.0, -30.0, -21.0, -19.0, 0.0, 19.0, 21.0, 30.0, 100.0):  # not as one sum
        x = torch.full((1, 1, 1), value)
        got, grad, want, want_grad = both_focal(x, torch.tensor([[k]]), gamma=gamma)
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5), value
        assert torch.allclose(grad.double(), want_grad, rtol=1e-5, atol=1e-6), value


def test_focal_loss_of_ignored_anchors_is_nothing_and_so_is_their_gradient():
    x = randn(2, 50, 4, seed=5)
    classes = random_classes(2, 50, 4)
    ignored = classes == IGNORE
    got, grad, _, _ = both_focal(x, classes)
    changed = torch.where(ignored[..., None], 17.0, x)
    assert ignored.any() and torch.equal(ops.focal_loss(changed, classes), got)
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).all()
    assert (ops.focal_loss(x, torch.full_like(classes, IGNORE)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_focal_loss_is_computed_in_float32_and_leaves_the_callers_logits_alone(dtype):
    x = (randn(2, 80, 6, seed=7) * 3).to(dtype)
    before = x.clone()
    classes = random_classes(2, 80, 6)
    got, grad, _, _ = both_focal(x, classes)
    want, want_grad, _, _ = both_focal(x.float(), classes)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-6)
    assert grad.dtype == dtype  # only the gradient is rounded
    assert torch.allclose(grad.float(), want_grad, rtol=1e-2, atol=1e-6)
    assert torch.equal(x, before)


def test_box_loss_and_its_gradient_equal_torch_huber_on_the_positives():
    anchors = random_boxes(50, seed=1)
    boxes = random_boxes(3, 4, seed=2)
    matched = random_classes(3, 50, 4, seed=3)
    matched[2] = NEGATIVE
    b, a = (matched >= 0).nonzero(as_tuple=True)
    target = CODER.encode_single(boxes[b, matched[b, a]], anchors[a])
    deltas = randn(3, 50, 4, seed=4)
    deltas[b, a] = target + randn(len(b), 4, seed=5) * 0.15  # both sides of delta 0.1
    leaf = deltas.clone().requires_grad_()
    copy = deltas.clone().requires_grad_()
    got = ops.box_loss(leaf, boxes, anchors, matched)
    rows = F.huber_loss(copy[b, a], target, reduction="none", delta=0.1).sum(1)
    want = torch.stack([rows[b == i].sum() for i in range(3)])
    assert torch.allclose(got, want, rtol=1e-4) and got[0] > 0 and got[2] == 0
    scale = torch.tensor([1.0, 2.0, 3.0])
    (got * scale).sum().backward()
    (want * scale).sum().backward()
    assert torch.allclose(leaf.grad, copy.grad, atol=1e-5)
    assert (leaf.grad[matched < 0] == 0).all()
    half = deltas.bfloat16()
    got = ops.box_loss(half, boxes, anchors, matched)
    assert torch.equal(got, ops.box_loss(half.float(), boxes, anchors, matched))


def test_box_loss_without_any_box_is_zero_and_differentiable():
    deltas = randn(2, 5, 4).requires_grad_()
    matched = torch.full((2, 5), NEGATIVE)
    loss = ops.box_loss(deltas, torch.zeros(2, 0, 4), random_boxes(5), matched)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and (deltas.grad == 0).all()


# ---- losses of a task ----------------------------------------------------------------------------


def labelled_boxes():
    labels = torch.randint(0, 5, (4, 3), generator=generator(3))
    for i, n in enumerate([3, 1, 0, 2]):
        labels[i, n:] = -1
    return {"boxes": random_boxes(4, 3, seed=3, low=8, high=24), "labels": labels}


def test_an_anchor_has_the_class_of_its_box_and_without_boxes_all_are_background():
    batch = labelled_boxes()
    net = SimpleNamespace(anchors=ANCHORS)
    targets, count = ops.match_anchors(batch, net)
    matched, classes = targets["matched"], targets["classes"]
    for i in range(4):
        for a in range(len(ANCHORS)):
            m = int(matched[i, a])
            assert classes[i, a] == (batch["labels"][i, m] if m >= 0 else m)
    assert count.tolist() == (matched >= 0).sum(1).tolist() and count[2] == 0 < count[0]
    empty = {"boxes": torch.zeros(9, 0, 4), "labels": torch.zeros(9, 0, dtype=torch.int64)}
    targets, count = ops.match_anchors(empty, net)
    assert targets["classes"].shape == (9, len(ANCHORS)) and count.tolist() == [0] * 9
    assert (targets["classes"] == NEGATIVE).all()


def test_box_losses_are_divided_by_the_positives_of_the_images_part_plus_one():
    batch = labelled_boxes()
    net = SimpleNamespace(anchors=ANCHORS)
    targets, _ = ops.match_anchors(batch, net)
    logits, deltas = randn(4, len(ANCHORS), 5), randn(4, len(ANCHORS), 4, seed=1)
    got = ops.box_losses((logits, deltas), targets, torch.tensor([7.0, 0.0, 2.0, 7.0]), net)
    focal = ops.focal_loss(logits, targets["classes"])
    box = ops.box_loss(deltas, batch["boxes"], ANCHORS, targets["matched"])
    for i, n in enumerate([7, 0, 2, 7]):
        assert torch.allclose(got[i], torch.stack([focal[i] / (n + 1), 50 / 4 * box[i] / (n + 1)]))


@pytest.mark.parametrize("stride", [1, 4])
def test_pixel_losses_are_the_mean_cross_entropy_over_the_labelled_pixels(stride):
    mask = torch.randint(0, 4, (6, 32, 32), generator=generator(0)).byte()
    mask[randn(6, 32, 32) < -0.5] = 255
    mask[2] = 255
    logits = randn(6, 4, 32 // stride, 32 // stride, seed=1)
    net = SimpleNamespace(stride=stride)
    targets, count = ops.pixel_targets({"mask": mask}, net)
    got = ops.pixel_losses(logits, targets, count.sum().expand(6), net)
    small = mask.long() if stride == 1 else mask[:, 2::4, 2::4].long()
    want = F.cross_entropy(logits, small, ignore_index=255)
    assert got.shape == (6, 1) and got.sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert got[2] == 0 and count[2] == 0
    nothing = {"mask": torch.full_like(small, 255)}
    assert ops.pixel_losses(logits, nothing, torch.zeros(6), net).sum() == 0


def test_class_losses_are_the_mean_cross_entropy_over_the_images_with_a_class():
    label = torch.tensor([0, 3, -1, 2, 1])
    logits = randn(5, 4)
    targets, count = ops.class_targets({"image_class": label}, None)
    assert count.tolist() == [1, 1, 0, 1, 1]
    got = ops.class_losses(logits, targets, count.sum().expand(5), None)
    want = F.cross_entropy(logits, label, ignore_index=-1)
    assert got.shape == (5, 1) and got[2] == 0
    assert got.sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert ops.class_losses(logits[2:3], {"class": label[2:3]}, torch.zeros(1), None) == 0


# ---- the joint loss ------------------------------------------------------------------------------


def joint_after(*steps, alpha=1.0, decay=0.99, normalised=True):
    joint = ops.JointLoss(len(steps[0]), alpha, normalised, decay)
    for losses in steps:
        joint.update(torch.tensor(losses))
    return joint


def test_averages_are_the_weighted_means_computed_by_hand():
    joint = joint_after((1.0, 10.0), (2.0, 30.0), decay=0.9)
    want = [(0.9 * 1 + 2) / 1.9, (0.9 * 10 + 30) / 1.9]
    assert joint.average.tolist() == pytest.approx(want)
    assert joint.ratio.tolist() == pytest.approx([want[0] / want[1]])


@pytest.mark.parametrize("updates", [1, 2, 50, 2000])
def test_averages_of_constant_losses_are_these_after_any_number_of_steps(updates):
    joint = joint_after(*[(3.0, 0.7)] * updates)
    assert joint.average.dtype == torch.float64
    assert joint.average.tolist() == pytest.approx([3.0, 0.7], rel=1e-6)
    resumed = ops.JointLoss(2)
    resumed.load_state_dict(joint.state_dict())
    assert torch.equal(resumed.average, joint.average)


def test_joint_loss_is_the_formula_computed_by_hand():
    human, pseudo, classified = losses = torch.tensor([3.0, 4.0, 5.0])
    averages = (2.0, 8.0, 0.5)
    assert joint_after((2.0,), alpha=0.5)(losses[:1]) == 3
    two = joint_after(averages[:2], alpha=0.5)(losses[:2])
    assert two.item() == pytest.approx((3 + 0.5 * (2 / 8) * 4) / 1.5)
    three = joint_after(averages, alpha=0.5)(losses)
    assert three.item() == pytest.approx((3 + 0.5 * (2 / 8) * 4 + 0.5 * (2 / 0.5) * 5) / 2)
    plain = joint_after(averages, alpha=0.5, normalised=False)
    assert plain(losses).item() == 3 + 0.5 * (4 + 5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 4.0])
def test_joint_loss_of_constant_losses_is_the_human_loss_for_every_alpha(alpha):
    joint = joint_after(*[(3.0, 0.2, 7.0)] * 7, alpha=alpha)
    assert joint(torch.tensor([3.0, 0.2, 7.0])).item() == pytest.approx(3.0)


def test_joint_loss_starts_with_ratios_of_one():
    joint = ops.JointLoss(3, 0.5)
    assert joint.ratio.tolist() == [1, 1]
    got = joint(torch.tensor([3.0, 5.0, 7.0]))
    assert got.item() == pytest.approx((3 + 0.5 * 5 + 0.5 * 7) / 2)


def test_joint_loss_lets_gradient_through_the_losses_but_not_through_the_averages():
    losses = torch.tensor([2.0, 8.0], requires_grad=True)
    joint = ops.JointLoss(2, 0.5)
    joint.update(losses)
    assert not joint.average.requires_grad
    joint(losses).backward()
    assert losses.grad.tolist() == pytest.approx([1 / 1.5, 0.5 * (2 / 8) / 1.5])


def test_a_part_without_labels_leaves_the_averages_alone():
    joint = joint_after((3.0, 6.0), (9.0, 0.0), (0.0, 9.0))
    assert joint.average.tolist() == pytest.approx([3.0, 6.0])
    assert joint(torch.tensor([3.0, 0.0])).item() == pytest.approx(1.5)


# ---- decoding ------------------------------------------------------------------------------------


def naive_detect(logits, deltas, anchors, window, min_score, nms_iou, limit):
    """One image, one class at a time, as one would write it down."""
    boxes, scores, labels = [], [], []
    for k in range(logits.shape[1]):
        p = torch.sigmoid(logits[:, k])
        rows = p > min_score
        box = CODER.decode_single(deltas[rows], anchors[rows])
        box = torchvision.ops.clip_boxes_to_image(box, tuple(window.tolist()))
        solid = ((box[:, 2:] - box[:, :2]) > 1e-2).all(1)
        box, p = box[solid], p[rows][solid]
        keep = torchvision.ops.nms(box, p, nms_iou)
        boxes.append(box[keep])
        scores.append(p[keep])
        labels.append(torch.full((len(keep),), k))
    order = torch.cat(scores).argsort(descending=True)[:limit]
    rows = {"boxes": boxes, "scores": scores, "labels": labels}
    return {name: torch.cat(value)[order] for name, value in rows.items()}


def random_outputs(b, k, seed=0):
    logits = randn(b, len(ANCHORS), k, seed=seed) * 1.5 - 2
    return logits, randn(b, len(ANCHORS), 4, seed=seed + 100) * 0.3


WINDOWS = torch.tensor([[64, 64], [40, 64], [64, 33]])


@pytest.mark.parametrize("limit", [5, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_detect_equals_a_loop_over_images_and_classes(seed, limit):
    logits, deltas = random_outputs(3, 4, seed)
    answers = ops.detect(logits, deltas, ANCHORS, WINDOWS, 0.3, 0.5, limit=limit)
    assert len(answers) == 3
    for i, got in enumerate(answers):
        want = naive_detect(logits[i], deltas[i], ANCHORS, WINDOWS[i], 0.3, 0.5, limit)
        suppressed = (logits[i].sigmoid() > 0.3).sum() - len(want["scores"])
        assert suppressed > 50 and want["labels"].unique().numel() > 1  # else it tests nothing
        assert len(got["scores"]) <= limit and got["scores"].min() > 0.3
        assert torch.equal(got["labels"], want["labels"])
        assert torch.allclose(got["scores"], want["scores"])
        assert torch.allclose(got["boxes"], want["boxes"], atol=1e-4)


def test_detect_clips_to_each_images_window_and_drops_what_lies_outside():
    answers = ops.detect(*random_outputs(3, 2), ANCHORS, WINDOWS, 0.2, 0.5, limit=10_000)
    for answer, (h, w) in zip(answers, WINDOWS.tolist()):
        x1, y1, x2, y2 = answer["boxes"].T
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= w).all() and (y2 <= h).all()
        assert (x2 > x1).all() and (y2 > y1).all() and (x2 == w).any() and (y2 == h).any()


def test_detect_without_candidates_is_empty_but_shaped():
    logits = torch.full((2, len(ANCHORS), 3), -10.0)
    logits[1, 50, 2] = 5.0  # an empty image beside one that is not
    empty, one = ops.detect(logits, torch.zeros(2, len(ANCHORS), 4), ANCHORS, WINDOWS[:2])
    assert [tuple(v.shape) for v in empty.values()] == [(0, 4), (0,), (0,)]
    assert one["labels"].tolist() == [2] and one["boxes"].shape == (1, 4)


def test_detect_considers_only_the_best_candidates_of_each_image():
    logits, deltas = random_outputs(2, 3)
    logits[1] += 3  # a confident image must not eat the other's share
    windows = WINDOWS[[0, 0]]
    answers = ops.detect(logits, deltas * 0, ANCHORS, windows, 0.05, 1.0, candidates=20)
    for i, answer in enumerate(answers):
        want = logits[i].sigmoid().flatten().sort(descending=True).values[:20]
        assert torch.allclose(answer["scores"], want)


def test_detect_of_a_large_batch_equals_its_images_one_by_one():
    """Many images, classes and pixels: keeping classes apart by shifting boxes would cost float32
    its fractions."""
    g = generator(0)
    B, K, pairs = 16, 90, 12
    first = random_boxes(B, pairs, seed=1, low=25, high=50, area=1200.0).abs()
    side = first[..., 2] - first[..., 0]
    shift = side * (0.30 + 0.07 * torch.rand(B, pairs, generator=g))  # IoU 0.46..0.54
    second = first + torch.stack([shift, torch.zeros_like(shift)] * 2, -1)
    anchors = torch.cat([first, second], 1).reshape(-1, 4)  # image i uses the i-th share of them
    logits = torch.full((B, len(anchors), K), -10.0)
    labels = torch.randint(0, K, (B, pairs), generator=g).repeat(1, 2)
    for i in range(B):
        rows = torch.arange(2 * pairs) + i * 2 * pairs
        logits[i, rows, labels[i]] = torch.rand(2 * pairs, generator=g)
    deltas = torch.zeros(B, len(anchors), 4)
    windows = torch.full((B, 2), 1280)
    kept = 0
    for i, got in enumerate(ops.detect(logits, deltas, anchors, windows, limit=1000)):
        want = naive_detect(logits[i], deltas[i], anchors, windows[i], 0.05, 0.5, 1000)
        kept += len(want["scores"])
        assert len(got["scores"]) == len(want["scores"]), f"image {i}"
        assert torch.allclose(got["boxes"], want["boxes"]), f"image {i}"
    assert B * pairs * 1.2 < kept < B * pairs * 1.8  # some pairs are merged, some are not
