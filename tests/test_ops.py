"""ops.py: every function against torchvision's, or against the formula written out by hand, on random tensors."""
import math

import pytest
import torch
import torchvision
from torchvision.models.detection import retinanet
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList

import ops
from ops import IGNORE, NEGATIVE


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_boxes(*shape, seed=0, low=4.0, high=40.0, area=64.0):
    """(*shape, 4) xyxy with sides in low..high and centres anywhere in an area x area square."""
    g = generator(seed)
    centre, half = torch.rand(*shape, 2, generator=g) * area, (low + (high - low) * torch.rand(*shape, 2, generator=g)) / 2
    return torch.cat([centre - half, centre + half], -1)


# ---- anchors -----------------------------------------------------------------------------------------------------

def test_anchors_of_one_location_are_those_computed_by_hand():
    got = ops.make_anchors(8, 8, levels=(3, 3), base=4.0)  # one location, centre (4, 4); smallest side 4 * 8 = 32
    root2 = math.sqrt(2)
    rows = []
    for side in (32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)):
        for w, h in ((side, side), (side * root2, side / root2), (side / root2, side * root2)):  # wide before tall
            rows.append([4 - w / 2, 4 - h / 2, 4 + w / 2, 4 + h / 2])
    assert torch.allclose(got, torch.tensor(rows), atol=1e-5)


def test_anchors_of_a_level_tile_row_major_and_scale_with_the_stride():
    got = ops.make_anchors(40, 70, levels=(4, 4), base=3.0)  # stride 16: ceil(40/16) = 3 rows, ceil(70/16) = 5 columns
    centres = ((got[:, :2] + got[:, 2:]) / 2).reshape(3, 5, 9, 2)
    for y in range(3):
        for x in range(5):
            assert torch.allclose(centres[y, x], torch.tensor([8.0 + 16 * x, 8.0 + 16 * y]).expand(9, 2), atol=1e-4)
    assert (got[0, 2:] - got[0, :2]).tolist() == [48.0, 48.0]


@pytest.mark.parametrize("height, width, levels", [(96, 160, (3, 7)), (64, 64, (3, 6)), (97, 131, (3, 7)), (1, 300, (4, 5))])
def test_anchor_count_is_nine_per_location_of_every_level_rounded_up(height, width, levels):
    count = sum(math.ceil(height / 2 ** l) * math.ceil(width / 2 ** l) * 9 for l in range(levels[0], levels[1] + 1))
    got = ops.make_anchors(height, width, levels)
    assert got.shape == (count, 4) and got.dtype == torch.float32
    assert torch.allclose(got[:9 * math.ceil(width / 2 ** levels[0])],  # finest level first
                          ops.make_anchors(1, width, (levels[0], levels[0])))


@pytest.mark.parametrize("height, width", [(256, 128), (96, 160), (160, 224), (800, 1344)])
def test_torchvision_anchors_equal_its_anchor_generator_exactly(height, width):
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (8, 16, 32, 64, 128)]
    images = ImageList(torch.empty(1, 3, height, width), [(height, width)])
    theirs, = retinanet._default_anchorgen()(images, [torch.empty(1, 1, *size) for size in sizes])
    assert torch.equal(ops.torchvision_anchors(height, width), theirs)


# ---- boxes -------------------------------------------------------------------------------------------------------

def test_box_iou_equals_torchvision():
    a, b = random_boxes(30, seed=1), random_boxes(50, seed=2)
    theirs = torchvision.ops.box_iou(a, b)
    assert (theirs > 0.3).sum() > 20 and (theirs == 0).any()
    assert torch.allclose(ops.box_iou(a, b), theirs, atol=1e-7)


def test_box_iou_of_a_batch_equals_its_images_one_by_one():
    a, b = random_boxes(3, 7, seed=1), random_boxes(3, 5, seed=2)
    batched = ops.box_iou(a, b)
    assert batched.shape == (3, 7, 5)
    for i in range(3):
        assert torch.equal(batched[i], torchvision.ops.box_iou(a[i], b[i]))


@pytest.mark.parametrize("n, m", [(0, 4), (4, 0), (0, 0)])
def test_box_iou_without_boxes_is_an_empty_matrix(n, m):
    assert ops.box_iou(random_boxes(n), random_boxes(m)).shape == (n, m)
    assert ops.box_iou(random_boxes(2, n), random_boxes(2, m)).shape == (2, n, m)


def test_box_iou_of_degenerate_boxes_is_zero_not_nan():
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0], [5, 5, 9, 5], [5, 9, 5, 5], [9, 9, 5, 5], [0, 0, 0, 0]])
    real = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    assert ops.box_iou(empty, torch.cat([empty, real])).eq(0).all()
    assert ops.box_iou(real, real).item() == 1


def test_encode_and_decode_equal_torchvisions_box_coder():
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(200, seed=1), random_boxes(200, seed=2)
    deltas = torch.randn(200, 4, generator=generator(3))
    deltas[:20, 2:] += 6  # beyond the clip at ln(1000/16) = 4.13
    assert torch.allclose(ops.encode(boxes, anchors), coder.encode_single(boxes, anchors), atol=1e-5)
    assert torch.allclose(ops.decode(deltas, anchors), coder.decode_single(deltas, anchors), rtol=1e-5, atol=1e-3)


def test_decode_inverts_encode():
    boxes, anchors = random_boxes(2, 100, seed=1), random_boxes(100, seed=2)  # (B, A, 4) against (A, 4)
    assert torch.allclose(ops.decode(ops.encode(boxes, anchors), anchors), boxes, atol=1e-4)


def test_decode_clips_log_ratios_at_1000_over_16_and_nothing_else():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    huge = ops.decode(torch.tensor([[0.0, 0.0, 50.0, 1e9]]), anchor)
    assert torch.allclose(huge[:, 2:] - huge[:, :2], torch.tensor([[1000.0, 1000.0]]))
    far = ops.decode(torch.tensor([[100.0, -100.0, -50.0, 0.0]]), anchor)  # offsets and shrinking are free
    assert torch.allclose(far, torch.tensor([[1608.0, -1600.0, 1608.0, -1584.0]]))


def test_encode_of_a_box_without_area_is_finite():
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    assert ops.encode(torch.tensor([[3.0, 3.0, 3.0, 3.0]]), anchors).isfinite().all()


# ---- matching ----------------------------------------------------------------------------------------------------

ANCHORS = ops.make_anchors(64, 64, levels=(3, 5), base=2.0)


def agreeable(iou):
    """True where ours and torchvision's must agree: each box has one best anchor, which overlaps it and likes it best."""
    top, anchor = iou.max(1)
    alone = ((iou == top[:, None]).sum(1) == 1) & (top > 0)
    return bool((alone & (iou.max(0).indices[anchor] == torch.arange(len(iou)))).all())


@pytest.mark.parametrize("negative", [0.5, 0.4])
def test_match_equals_torchvisions_matcher_where_boxes_do_not_compete(negative):
    matcher = Matcher(0.5, negative, allow_low_quality_matches=True)
    agreed = forced = ignored = 0
    for seed in range(150):
        boxes = random_boxes(1 + seed % 5, seed=seed, low=3, high=60)
        iou = torchvision.ops.box_iou(boxes, ANCHORS)
        if not agreeable(iou):
            continue
        theirs = matcher(iou)
        got = ops.match(ANCHORS, boxes[None], torch.ones(1, len(boxes), dtype=torch.bool), 0.5, negative)
        assert got.dtype == torch.int64 and torch.equal(got[0], theirs), f"seed {seed}"
        agreed, forced = agreed + 1, forced + int((iou.max(1).values < 0.5).sum())
        ignored += int((theirs == IGNORE).sum())
    assert agreed > 50 and forced > 20 and (ignored > 0) == (negative < 0.5)  # the cases that matter did occur


def test_match_keeps_the_first_of_equally_good_anchors_where_torchvision_keeps_all():
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [40, 40, 50, 50]])
    boxes = torch.tensor([[[7.0, 0, 13, 10]]])  # the same small overlap with the first two
    assert ops.match(anchors, boxes, torch.tensor([[True]])).tolist() == [[0, NEGATIVE, NEGATIVE]]
    matcher = Matcher(0.5, 0.5, allow_low_quality_matches=True)
    assert matcher(torchvision.ops.box_iou(boxes[0], anchors)).tolist() == [0, 0, NEGATIVE]


def test_match_gives_an_anchor_two_boxes_want_to_the_later_box_where_torchvision_asks_the_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]])
    boxes = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 5, 5]]])  # IoU 0.9 and 0.25, both with the first anchor only
    assert ops.match(anchors, boxes, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1, NEGATIVE]]
    assert ops.match(anchors, boxes.flip(1), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1, NEGATIVE]]
    matcher = Matcher(0.5, 0.5, allow_low_quality_matches=True)
    assert matcher(torchvision.ops.box_iou(boxes[0], anchors)).tolist() == [0, NEGATIVE]


def test_match_gives_each_box_its_best_anchor_however_small_the_overlap():
    boxes = random_boxes(40, 4, seed=5, low=1, high=6)  # far smaller than any anchor
    matched = ops.match(ANCHORS, boxes, torch.ones(40, 4, dtype=torch.bool))
    for i in range(40):
        best = torchvision.ops.box_iou(boxes[i], ANCHORS).max(1).indices  # (M,)
        assert set(matched[i][best].tolist()) <= set(range(4)) and (matched[i] >= 0).sum() == len(best.unique())
        if len(best.unique()) == 4:
            assert matched[i][best].tolist() == [0, 1, 2, 3]


def test_match_gives_no_anchor_to_a_box_that_overlaps_none():
    boxes = torch.tensor([[[900.0, 900, 910, 910], [20, 20, 40, 40]]])
    matched = ops.match(ANCHORS, boxes, torch.ones(1, 2, dtype=torch.bool))
    assert (matched != 0).all() and (matched == 1).any()


def test_match_without_boxes_is_all_negative():
    no_columns = ops.match(ANCHORS, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    only_padding = ops.match(ANCHORS, random_boxes(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5, 0.4)
    for matched in (no_columns, only_padding):
        assert matched.shape == (2, len(ANCHORS)) and (matched == NEGATIVE).all()


def test_match_of_a_padded_batch_equals_its_images_one_by_one():
    boxes = random_boxes(4, 6, seed=7)
    counts = [6, 0, 1, 3]  # what lies in the padding must not matter: it is random here
    valid = torch.arange(6) < torch.tensor(counts)[:, None]
    batched = ops.match(ANCHORS, boxes, valid, 0.5, 0.4)
    for i, n in enumerate(counts):
        assert torch.equal(batched[i], ops.match(ANCHORS, boxes[i:i + 1, :n], torch.ones(1, n, dtype=torch.bool), 0.5, 0.4)[0])


def test_match_ignores_padding_in_front_of_and_between_the_boxes():
    boxes, keep = random_boxes(1, 4, seed=3), torch.tensor([1, 3])
    valid = torch.tensor([[False, True, False, True]])
    full = ops.match(ANCHORS, boxes, valid)
    short = ops.match(ANCHORS, boxes[:, keep], torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(full, torch.where(short >= 0, keep[short.clamp(min=0)], short)) and (short >= 0).any()


# ---- losses ------------------------------------------------------------------------------------------------------

def random_classes(b, a, k, seed=0):
    """(B, A): mostly negative, some positive, some ignored."""
    g = generator(seed)
    draw, label = torch.rand(b, a, generator=g), torch.randint(0, k, (b, a), generator=g)
    return torch.where(draw < 0.2, label, torch.where(draw < 0.4, IGNORE, NEGATIVE))


def reference_focal(logits, classes, alpha, gamma):
    """torchvision's loss in float64, summed per image over anchors that are not ignored -> (B,)."""
    target = torch.nn.functional.one_hot(classes.clamp(min=0), logits.shape[-1]) * (classes >= 0)[..., None]
    loss = torchvision.ops.sigmoid_focal_loss(logits, target.to(logits), alpha, gamma)
    return (loss * (classes != IGNORE)[..., None]).sum((1, 2))


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 1.5), (0.25, 2.0), (0.6, 1.5)])
def test_focal_loss_and_its_gradient_equal_torchvision(alpha, gamma, spread):
    x = torch.randn(3, 60, 7, generator=generator(1)) * spread
    classes, scale = random_classes(3, 60, 7), torch.tensor([1.0, 0.1, 3.0])
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = ops.focal_loss(ours, classes, alpha, gamma), reference_focal(theirs, classes, alpha, gamma)
    assert got.shape == (3,) and got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-5)
    (got * scale).sum().backward()
    (want * scale).sum().backward()
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_default_gamma_is_the_tpu_codes():
    x, classes = torch.randn(2, 30, 5, generator=generator(2)), random_classes(2, 30, 5)
    assert torch.equal(ops.focal_loss(x, classes), ops.focal_loss(x, classes, 0.25, 1.5))
    assert not torch.allclose(ops.focal_loss(x, classes), ops.focal_loss(x, classes, 0.25, 2.0))


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_focal_loss_is_exact_and_finite_at_extreme_logits(gamma):
    values = torch.tensor([-100.0, -30.0, -21.0, -19.0, 0.0, 19.0, 21.0, 30.0, 100.0])
    x = values.repeat(2)[None, :, None]  # (1, 18, 1): each value once as foreground and once as background
    classes = torch.tensor([[0] * 9 + [NEGATIVE] * 9])
    for i in range(18):  # one by one: a sum would hide the small behind the large
        ours, theirs = x[:, i:i + 1].clone().requires_grad_(), x[:, i:i + 1].double().requires_grad_()
        got, want = ops.focal_loss(ours, classes[:, i:i + 1], 0.25, gamma), reference_focal(theirs, classes[:, i:i + 1], 0.25, gamma)
        got.sum().backward()
        want.sum().backward()
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5), (x[0, i], classes[0, i])
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6), (x[0, i], classes[0, i])


def test_focal_loss_gradient_equals_finite_differences():
    x, classes = torch.randn(1, 6, 3, generator=generator(4)), torch.tensor([[0, NEGATIVE, IGNORE, 2, 1, NEGATIVE]])
    leaf = x.clone().requires_grad_()
    ops.focal_loss(leaf, classes).sum().backward()
    for a in range(6):
        for k in range(3):
            step = torch.zeros_like(x)
            step[0, a, k] = 1e-2
            slope = (ops.focal_loss(x + step, classes) - ops.focal_loss(x - step, classes)).item() / 2e-2
            assert abs(slope - leaf.grad[0, a, k].item()) < 2e-4


def test_focal_loss_ignored_anchors_cost_nothing_and_get_no_gradient():
    x, classes = torch.randn(2, 50, 4, generator=generator(5)), random_classes(2, 50, 4)
    ignored = classes == IGNORE
    leaf = x.clone().requires_grad_()
    loss = ops.focal_loss(leaf, classes)
    loss.sum().backward()
    changed = torch.where(ignored[..., None], torch.full_like(x, 17.0), x)
    assert ignored.any() and torch.equal(ops.focal_loss(changed, classes), loss)
    assert (leaf.grad[ignored] == 0).all() and (leaf.grad[~ignored] != 0).all()
    assert (ops.focal_loss(x, torch.full_like(classes, IGNORE)) == 0).all()


def test_focal_loss_without_positives_equals_torchvision():
    x, classes = torch.randn(2, 40, 3, generator=generator(6)), torch.full((2, 40), NEGATIVE)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = ops.focal_loss(ours, classes), reference_focal(theirs, classes, 0.25, 1.5)
    got.sum().backward()
    want.sum().backward()
    assert torch.allclose(got.double(), want, rtol=1e-5) and (ours.grad > 0).all()
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_focal_loss_of_half_precision_logits_is_computed_in_float32(dtype):
    half = (torch.randn(2, 80, 6, generator=generator(7)) * 3).to(dtype)
    classes, before = random_classes(2, 80, 6), half.clone()
    low, full = half.clone().requires_grad_(), half.float().requires_grad_()
    got, want = ops.focal_loss(low, classes), ops.focal_loss(full, classes)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-6)  # only the gradient is rounded
    got.sum().backward()
    want.sum().backward()
    assert low.grad.dtype == dtype and torch.allclose(low.grad.float(), full.grad, rtol=1e-2, atol=1e-6)
    assert torch.equal(low.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_focal_loss_leaves_the_callers_logits_alone(dtype):
    x = torch.randn(1, 9, 3, generator=generator(8)).to(dtype)
    before = x.clone()
    ops.focal_loss(x, random_classes(1, 9, 3))
    assert torch.equal(x, before)


def test_box_loss_and_its_gradient_equal_torch_huber_on_the_positives():
    anchors, boxes = random_boxes(50, seed=1), random_boxes(3, 4, seed=2)
    matched = random_classes(3, 50, 4, seed=3)
    matched[2] = NEGATIVE
    b, a = (matched >= 0).nonzero(as_tuple=True)
    target = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(boxes[b, matched[b, a]], anchors[a])
    deltas = torch.randn(3, 50, 4, generator=generator(4))
    deltas[b, a] = target + torch.randn(len(b), 4, generator=generator(5)) * 0.15  # both sides of delta 0.1
    ours, theirs = deltas.clone().requires_grad_(), deltas.clone().requires_grad_()
    got = ops.box_loss(ours, boxes, anchors, matched)
    each = torch.nn.functional.huber_loss(theirs[b, a], target, reduction="none", delta=0.1).sum(1)
    want = torch.stack([each[b == i].sum() for i in range(3)])
    assert got.shape == (3,) and torch.allclose(got, want, rtol=1e-4) and got[0] > 0 and got[2] == 0
    (got * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    (want * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert (ours.grad[matched < 0] == 0).all()


def test_box_loss_without_any_box_is_zero_and_differentiable():
    deltas = torch.randn(2, 5, 4, requires_grad=True)
    loss = ops.box_loss(deltas, torch.zeros(2, 0, 4), random_boxes(5), torch.full((2, 5), NEGATIVE))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and (deltas.grad == 0).all()


def test_box_loss_of_bfloat16_deltas_is_float32():
    deltas, matched = torch.randn(2, 5, 4, generator=generator(1)).bfloat16(), torch.zeros(2, 5, dtype=torch.int64)
    args = random_boxes(2, 1, seed=2), random_boxes(5, seed=3), matched
    got = ops.box_loss(deltas, *args)
    assert got.dtype == torch.float32 and torch.equal(got, ops.box_loss(deltas.float(), *args))


# ---- the joint loss ----------------------------------------------------------------------------------------------

def averaged(*pairs, decay=0.99):
    averages = torch.zeros(3, dtype=torch.float64)
    for h, p in pairs:
        averages = ops.update_averages(averages, torch.tensor([h, p]), decay)
    return averages


def test_average_losses_are_the_weighted_means_computed_by_hand():
    averages = averaged((1.0, 10.0), (2.0, 30.0), decay=0.9)
    assert [x.item() for x in ops.average_losses(averages)] == pytest.approx([(0.9 * 1 + 2) / 1.9, (0.9 * 10 + 30) / 1.9])


@pytest.mark.parametrize("updates", [1, 2, 50, 2000])
def test_average_losses_of_constant_losses_are_these_after_any_number_of_updates(updates):
    averages = averaged(*[(3.0, 0.7)] * updates)
    assert averages.dtype == torch.float64
    assert [x.item() for x in ops.average_losses(averages)] == pytest.approx([3.0, 0.7], rel=1e-6)


def test_joint_loss_is_the_formula_computed_by_hand():
    averages = averaged((2.0, 8.0))  # ratio 1/4
    got = ops.joint_loss([torch.tensor(3.0), torch.tensor(4.0)], averages, alpha=0.5)
    assert got.item() == pytest.approx((3 + 0.5 * (2 / 8) * 4) / 1.5)
    assert ops.joint_loss([torch.tensor(3.0), torch.tensor(4.0)], averages, 0.5, normalise=False).item() == 3 + 0.5 * 4


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 4.0])
def test_joint_loss_of_constant_losses_is_the_human_loss_for_every_alpha(alpha):
    averages = averaged(*[(3.0, 0.2)] * 7)
    assert ops.joint_loss([torch.tensor(3.0), torch.tensor(0.2)], averages, alpha).item() == pytest.approx(3.0)


def test_joint_loss_starts_with_a_ratio_of_one():
    got = ops.joint_loss([torch.tensor(3.0), torch.tensor(5.0)], torch.zeros(3, dtype=torch.float64), alpha=0.5)
    assert got.item() == pytest.approx((3 + 0.5 * 5) / 1.5)


def test_joint_loss_lets_gradient_through_the_losses_but_not_the_averages():
    h, p = torch.tensor(2.0, requires_grad=True), torch.tensor(8.0, requires_grad=True)
    averages = ops.update_averages(torch.zeros(3, dtype=torch.float64), torch.stack([h, p]))
    assert not averages.requires_grad
    ops.joint_loss([h, p], averages, alpha=0.5).backward()
    assert h.grad.item() == pytest.approx(1 / 1.5) and p.grad.item() == pytest.approx(0.5 * (2 / 8) / 1.5)


def test_joint_loss_of_one_is_that_loss_and_of_three_gives_the_others_equal_shares():
    zeros = torch.zeros(2, dtype=torch.float64)
    assert ops.joint_loss([torch.tensor(3.0)], zeros, alpha=0.5).item() == 3
    averages = ops.update_averages(torch.zeros(4, dtype=torch.float64), torch.tensor([2.0, 8.0, 0.5]))
    got = ops.joint_loss([torch.tensor(3.0), torch.tensor(4.0), torch.tensor(5.0)], averages, alpha=0.5)
    assert got.item() == pytest.approx((3 + 0.5 * (2 / 8) * 4 + 0.5 * (2 / 0.5) * 5) / 2)


def test_joint_loss_stays_finite_when_pseudo_losses_were_zero():
    got = ops.joint_loss([torch.tensor(3.0), torch.tensor(0.0)], averaged((3.0, 0.0)), alpha=1.0)
    assert got.item() == pytest.approx(1.5)


# ---- decoding ----------------------------------------------------------------------------------------------------

def naive_detect(logits, deltas, anchors, window, min_score, nms_iou, limit):
    """One image, one class at a time, as one would write it down."""
    coder, boxes, scores, labels = BoxCoder((1.0, 1.0, 1.0, 1.0)), [], [], []
    for k in range(logits.shape[1]):
        p = torch.sigmoid(logits[:, k])
        mine = p > min_score
        box = torchvision.ops.clip_boxes_to_image(coder.decode_single(deltas[mine], anchors[mine]), tuple(window.tolist()))
        p, solid = p[mine], ((box[:, 2:] - box[:, :2]) > 1e-2).all(1)
        box, p = box[solid], p[solid]
        keep = torchvision.ops.nms(box, p, nms_iou)
        boxes.append(box[keep])
        scores.append(p[keep])
        labels.append(torch.full((len(keep),), k))
    order = torch.cat(scores).argsort(descending=True)[:limit]
    return {"boxes": torch.cat(boxes)[order], "scores": torch.cat(scores)[order], "labels": torch.cat(labels)[order]}


def random_outputs(b, k, seed=0, mean=-2.0):
    g = generator(seed)
    return torch.randn(b, len(ANCHORS), k, generator=g) * 1.5 + mean, torch.randn(b, len(ANCHORS), 4, generator=g) * 0.3


WINDOWS = torch.tensor([[64, 64], [40, 64], [64, 33]])


@pytest.mark.parametrize("limit", [5, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_detect_equals_a_loop_over_images_and_classes(seed, limit):
    logits, deltas = random_outputs(3, 4, seed)
    got = ops.detect(logits, deltas, ANCHORS, WINDOWS, 0.3, 0.5, limit=limit)
    assert len(got) == 3
    for i in range(3):
        want = naive_detect(logits[i], deltas[i], ANCHORS, WINDOWS[i], 0.3, 0.5, limit)
        suppressed = (logits[i].sigmoid() > 0.3).sum() - len(want["scores"])
        assert suppressed > 50 and want["labels"].unique().numel() > 1  # otherwise this would test nothing
        assert torch.equal(got[i]["labels"], want["labels"])
        assert torch.allclose(got[i]["scores"], want["scores"])
        assert torch.allclose(got[i]["boxes"], want["boxes"], atol=1e-4)


def test_detect_clips_to_each_images_window_and_drops_what_lies_outside():
    logits, deltas = random_outputs(3, 2)
    got = ops.detect(logits, deltas, ANCHORS, WINDOWS, 0.2, 0.5, limit=10_000)
    for found, (h, w) in zip(got, WINDOWS.tolist()):
        x1, y1, x2, y2 = found["boxes"].T
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= w).all() and (y2 <= h).all()
        assert (x2 > x1).all() and (y2 > y1).all() and (x2 == w).any() and (y2 == h).any()


def test_detect_without_candidates_is_empty_but_shaped():
    logits, deltas = torch.full((2, len(ANCHORS), 3), -10.0), torch.zeros(2, len(ANCHORS), 4)
    logits[1, 50, 2] = 5.0  # an empty image beside one that is not
    empty, one = ops.detect(logits, deltas, ANCHORS, WINDOWS[:2])
    assert empty["boxes"].shape == (0, 4) and empty["scores"].shape == (0,) and empty["labels"].shape == (0,)
    assert one["labels"].tolist() == [2] and one["boxes"].shape == (1, 4)


def test_detect_returns_at_most_limit_best_first_and_above_min_score():
    logits, deltas = random_outputs(3, 4)
    for limit in (1, 7, 100):
        for found in ops.detect(logits, deltas, ANCHORS, WINDOWS, 0.4, limit=limit):
            assert len(found["scores"]) == len(found["boxes"]) == len(found["labels"]) == limit
            assert (found["scores"][:-1] >= found["scores"][1:]).all() and (found["scores"] > 0.4).all()


def test_detect_considers_only_the_best_candidates_of_each_image():
    logits, deltas = random_outputs(2, 3)
    logits[1] += 3  # a confident image must not eat the other's share
    for i, found in enumerate(ops.detect(logits, deltas * 0, ANCHORS, WINDOWS[[0, 0]], 0.05, 1.0, candidates=20)):
        assert torch.allclose(found["scores"], logits[i].sigmoid().flatten().sort(descending=True).values[:20])


def test_detect_of_a_large_batch_equals_its_images_one_by_one():
    """Many images, classes and pixels: keeping classes apart by shifting boxes would cost float32 its fractions."""
    g, B, K, pairs = generator(0), 16, 90, 12
    first = random_boxes(B, pairs, seed=1, low=25, high=50, area=1200.0).abs()
    shift = (first[..., 2] - first[..., 0]) * (0.30 + 0.07 * torch.rand(B, pairs, generator=g))  # IoU 0.46..0.54
    second = first + torch.stack([shift, torch.zeros_like(shift)] * 2, -1)
    anchors = torch.cat([first, second], 1).reshape(-1, 4)  # (B * 2 * pairs, 4): image i uses the i-th share of them
    logits = torch.full((B, len(anchors), K), -10.0)
    labels = torch.randint(0, K, (B, pairs), generator=g).repeat(1, 2)
    for i in range(B):
        rows = torch.arange(2 * pairs) + i * 2 * pairs
        logits[i, rows, labels[i]] = torch.rand(2 * pairs, generator=g)
    deltas, windows = torch.zeros(B, len(anchors), 4), torch.full((B, 2), 1280)
    together = ops.detect(logits, deltas, anchors, windows, limit=1000)
    kept = 0
    for i in range(B):
        alone = naive_detect(logits[i], deltas[i], anchors, windows[i], 0.05, 0.5, 1000)
        kept += len(alone["scores"])
        assert len(together[i]["scores"]) == len(alone["scores"]), f"image {i}"
        assert torch.allclose(together[i]["boxes"], alone["boxes"]), f"image {i}"
    assert B * pairs * 1.2 < kept < B * pairs * 1.8  # some pairs are merged, some are not
