"""models.py: parity with torchvision's pyramid and heads, the published NAS-FPN, what is shared and
what is not, joint training, a step in pieces."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import models
import ops


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(backbone="resnet10", levels=(3, 6), width=32, depth=2, norm="gn", size=64, seed=0):
    torch.manual_seed(seed)
    return models.RetinaNet(backbone, 5, size, levels, width, depth, 2.0, norm, norm)


def tiny_segmenter(neck="fpn", levels=(2, 5), stride=4, norm="gn", seed=0):
    torch.manual_seed(seed)
    return models.Segmenter("resnet10", 5, levels, 16, 1, neck, stride, norm, norm)


def without_norms(net):
    """Parity is with torchvision's first layout, which has none."""
    for name, module in list(net.named_children()):
        if isinstance(module, nn.GroupNorm):
            setattr(net, name, nn.Identity())
        else:
            without_norms(module)
    return net


# ---- RetinaNet -----------------------------------------------------------------------------------


def same_weights(convs, copies):
    """Random ones; no biases where ours have none, before a norm."""
    assert len(convs) == len(copies)
    for a, b in zip(convs, copies):
        nn.init.normal_(a.weight, std=1 / math.sqrt(a.weight[0].numel()))
        nn.init.zeros_(a.bias)
        b.weight = a.weight
        if b.bias is not None:
            nn.init.normal_(a.bias)
            b.bias = a.bias


def test_pyramid_and_towers_equal_torchvisions():
    net = without_norms(tiny(levels=(3, 7), width=16).eval())
    channels = [64, 128, 256]  # of C3..C5
    pyramid = FeaturePyramidNetwork(channels, 16, LastLevelP6P7(16, 16))
    head = RetinaNetHead(16, 9, 5)
    blocks = [*pyramid.inner_blocks, *pyramid.layer_blocks]
    extra = [pyramid.extra_blocks.p6, pyramid.extra_blocks.p7]
    convs = [*net.fpn.lateral, *net.fpn.post, *net.fpn.down]
    same_weights([block[0] for block in blocks] + extra, convs)
    of_classes, of_boxes = head.classification_head, head.regression_head
    for tower, reference, final in (
        (net.classes, of_classes, of_classes.cls_logits),
        (net.boxes, of_boxes, of_boxes.bbox_reg),
    ):
        reference.conv = reference.conv[:2]
        convs = [block[0] for block in reference.conv]
        same_weights([*convs, final], [*tower.convs, tower.final])
    feats = {}
    for level, c in zip((3, 4, 5), channels):
        feats[level] = randn(2, c, -(-96 >> level), -(-130 >> level), seed=level)  # odd maps too
    maps = pyramid({str(level): f for level, f in feats.items()})
    raw = head(list(maps.values()))
    logits, deltas = net.heads(feats, None)
    assert 0.1 < logits.std() < 10 and 0.1 < deltas.std() < 10  # neither nothing nor huge
    assert torch.allclose(logits, raw["cls_logits"], atol=1e-4)
    assert torch.allclose(deltas, raw["bbox_regression"], atol=1e-4)


@pytest.mark.parametrize(
    "backbone, levels",
    [
        ("resnet10", (3, 7)),
        ("resnet10", (4, 5)),
        ("efficientnet_b0", (3, 6)),
        ("spinenet49S", (3, 7)),
    ],
)
def test_outputs_have_one_row_per_anchor(backbone, levels):
    net = tiny(backbone, levels, 16, 1, size=96).eval()
    strides = [2**level for level in range(levels[0], levels[1] + 1)]
    A = sum(9 * math.ceil(96 / s) ** 2 for s in strides)
    with torch.no_grad():
        logits, deltas = net(randn(2, 3, 96, 96))
    assert logits.shape == (2, A, 5) and deltas.shape == (2, A, 4) and net.anchors.shape == (A, 4)
    assert "anchors" not in net.state_dict() and net.inputs == ()


@pytest.mark.parametrize("h, w", [(97, 131), (33, 65)])
def test_a_pyramid_has_every_size_rounded_up(h, w):
    net = tiny(levels=(3, 7), width=16).eval()
    maps = net.fpn(net.backbone(randn(1, 3, h, w)))
    sizes = [(math.ceil(h / 2**level), math.ceil(w / 2**level)) for level in range(3, 8)]
    assert [tuple(p.shape[2:]) for p in maps] == sizes


def test_rows_of_a_tower_stand_at_the_places_of_the_anchors():
    """Maps that hold their own x, y and level, and a last convolution that copies them and adds the
    anchor's number."""
    levels, (H, W) = (3, 5), (64, 96)
    tower = models.Tower(3, 3, 0, 4, "gn", 3)
    maps = []
    with torch.no_grad():
        tower.final.weight.zero_()
        for a in range(9):
            for c in range(3):
                tower.final.weight[a * 4 + c, c, 1, 1] = 1
            tower.final.bias[a * 4 + 3] = a
        for level in range(3, 6):
            y, x = torch.meshgrid(torch.arange(H >> level), torch.arange(W >> level), indexing="ij")
            maps.append(torch.stack([x, y, torch.full_like(x, level)]).float()[None])
        x, y, level, a = tower(maps)[0].T  # (A,) each
    anchors = ops.make_anchors(H, W, levels)
    stride = 2**level
    assert torch.allclose((anchors[:, 0] + anchors[:, 2]) / 2, (x + 0.5) * stride, atol=1e-3)
    assert torch.allclose((anchors[:, 1] + anchors[:, 3]) / 2, (y + 0.5) * stride, atol=1e-3)
    side = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    assert torch.allclose(side, 4 * stride * 2 ** ((a // 3) / 3), rtol=1e-4)  # scale, then ratio


@pytest.mark.parametrize("norm, kind", [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm)])
def test_towers_share_convolutions_and_have_a_norm_per_level_and_layer(norm, kind):
    net = tiny(levels=(3, 7), depth=3, norm=norm)
    for tower in (net.classes, net.boxes):
        assert len([m for m in tower.modules() if isinstance(m, nn.Conv2d)]) == 3 + 1
        assert len({id(m) for m in tower.modules() if isinstance(m, kind)}) == 5 * 3
        assert all(conv.bias is None for conv in tower.convs)
    assert len([m for m in net.fpn.modules() if isinstance(m, kind)]) == 5


@torch.no_grad()
def test_a_towers_norm_acts_on_one_level_and_its_convolutions_on_all():
    net = tiny(norm="bn").eval()
    x = randn(1, 3, 64, 64)
    rows = [(64 >> level) ** 2 * 9 for level in range(3, 7)]

    def changed_levels(parameter):
        before = net(x)[0].split(rows, 1)
        parameter += 0.5
        after = net(x)[0].split(rows, 1)
        return [not torch.equal(a, b) for a, b in zip(after, before)]

    nn.init.normal_(net.classes.final.weight, std=0.1)
    assert changed_levels(net.classes.norms[1][0].bias) == [False, True, False, False]
    assert changed_levels(net.classes.convs[0].weight) == [True] * 4
    assert changed_levels(net.boxes.convs[0].weight) == [False] * 4  # the towers share nothing


@torch.no_grad()
def test_the_top_down_path_reaches_every_finer_level_and_no_coarser_one():
    fpn = without_norms(tiny().fpn)
    feats = {}
    for level, c in ((2, 32), (3, 64), (4, 128), (5, 256)):
        feats[level] = randn(1, c, 64 >> level, 64 >> level)
    base = fpn(feats)
    reached = {}
    for level in feats:
        maps = fpn({**feats, level: feats[level] + 1})
        reached[level] = [not torch.equal(a, b) for a, b in zip(maps, base)]
    assert reached[2] == [False] * 4 and reached[5] == [True] * 4
    assert reached[3] == [True, False, False, False] and reached[4] == [True, True, False, False]


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_initial_scores_are_the_prior(norm):
    with torch.no_grad():
        logits, deltas = tiny(norm=norm)(randn(2, 3, 64, 64))
    scores = logits.sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.05)
    assert scores.min() > 0.008 and scores.max() < 0.0125 and deltas.abs().max() < 0.3


@torch.no_grad()
def test_answers_are_the_networks_outputs_decoded_and_clipped():
    net = tiny().eval()
    nn.init.normal_(net.classes.final.weight, std=0.3)
    images = randn(2, 3, 64, 64)
    windows = torch.tensor([[64.0, 20.0], [30.0, 64.0]])
    logits, deltas = net(images)
    want = ops.detect(logits, deltas, net.anchors, windows, 0.02, limit=30)
    for got, rows, (h, w) in zip(net.answers(images, windows, 0.02, 30), want, windows.tolist()):
        assert all(torch.equal(got[name], rows[name]) for name in rows)
        assert len(got["scores"]) == 30 and (got["boxes"][:, 2:] <= torch.tensor([w, h])).all()


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
def test_weight_decay_is_for_the_trained_kernels_alone(norm):
    net = models.RetinaNet("resnet10", 5, 64, (3, 6), 32, 2, 2.0, "bn", norm)
    net.backbone.conv1.weight.requires_grad_(False)
    decayed, free = models.weight_decay_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    kernels = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in kernels if p.requires_grad}
    listed = [id(p) for p in [*decayed["params"], *free["params"]]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_with_group_norm_images_of_a_batch_do_not_see_each_other():
    x = randn(2, 3, 64, 64)
    changed = torch.cat([x[:1], 3 * randn(1, 3, 64, 64, seed=9)])
    for norm, independent in (("gn", True), ("bn", False)):  # bn shows that the test can tell
        net = tiny(norm=norm).train()
        with torch.no_grad():
            nn.init.normal_(net.classes.final.weight, std=0.1)
            same = torch.allclose(net(x)[0][0], net(changed)[0][0], atol=1e-5)
        assert same == independent, norm


# ---- Segmenter, Classifier -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, millions, gflops", [("tf_efficientnet_b7", 71, 60), ("tf_efficientnet_l2", 485, 229)]
)
def test_nasfpn_segmenters_have_the_published_size(name, millions, gflops):
    """Zoph et al., Table 6. Its parameters are those of the whole EfficientNet, the classifier that
    a segmenter leaves out included."""
    with torch.device("meta"):
        net = models.Segmenter(name, 21).eval()
        classifier = timm.create_model(name)
        with FlopCounterMode(display=False) as counter:
            assert net(torch.zeros(1, 3, 512, 512)).shape == (1, 21, 128, 128)

    def size(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    whole = size(net) - size(net.backbone) + size(classifier)
    assert whole == pytest.approx(millions, rel=0.02)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.02)


def test_a_nasfpn_cell_is_the_published_graph():
    """Written out node by node, from the figure's list, with the network's own convolutions."""
    torch.manual_seed(0)
    net = models.NASFPN({3: 8, 4: 12, 5: 16}, 8, "gn", repeats=1).eval()
    feats = {3: randn(1, 8, 32, 32), 4: randn(1, 12, 16, 16), 5: randn(1, 16, 8, 8)}
    p3, p4, p5 = (lateral(feats[level]) for level, lateral in zip((3, 4, 5), net.lateral))
    p6 = F.max_pool2d(p5, 2)
    p7 = F.max_pool2d(p6, 2)

    def up(x, like):
        return F.interpolate(x, like.shape[-2:], mode="nearest")

    def down(x, levels):
        return F.max_pool2d(x, 2**levels)

    def attend(coarse, fine):
        peak = coarse.flatten(2).max(2).values[..., None, None]
        return coarse + fine * torch.sigmoid(peak)

    def conv(k, x):
        return net.cells[0][k](x.clamp(min=0))

    n5 = conv(0, attend(up(p6, p4), p4))
    n6 = conv(1, p4 + n5)
    n7 = conv(2, p3 + up(n6, p3))
    n8 = conv(3, n6 + down(n7, 1))
    n9 = conv(4, attend(down(n8, 1), down(n7, 2)) + p5)
    n10 = conv(5, attend(down(n9, 2), down(n6, 3)) + p7)
    n11 = conv(6, attend(up(n10, p6), down(n9, 1)))
    for got, want in zip(net(feats), (n7, n8, n9, n11, n10)):
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("neck, levels", [("fpn", (2, 5)), ("nasfpn", (3, 7))])
@pytest.mark.parametrize("stride, h, w", [(4, 64, 96), (4, 65, 47), (1, 64, 96), (1, 66, 46)])
def test_logits_of_pixels_are_at_the_stride_for_any_size(neck, levels, stride, h, w):
    net = tiny_segmenter(neck, levels, stride).eval()
    want = (2, 5, math.ceil(h / stride), math.ceil(w / stride))
    assert net(torch.zeros(2, 3, h, w)).shape == want


@torch.no_grad()
def test_at_stride_1_a_pixel_is_seen_by_its_own_logits_first():
    net = tiny_segmenter(stride=1).eval()
    nn.init.zeros_(net.reduce[0].weight)  # the shallow branch alone
    x = randn(1, 3, 64, 64)
    changed = x.clone()
    changed[..., 21, 40] += 9
    moved = (net(x) - net(changed)).abs().amax((0, 1)) > 0.2  # group norm moves all a little
    y, x = moved.nonzero(as_tuple=True)
    assert len(y) and (y - 21).abs().max() <= 6 and (x - 40).abs().max() <= 6


@torch.no_grad()
def test_logits_of_images_are_linear_in_the_mean_of_the_last_level():
    net = models.Classifier("resnet10", 5, "gn").eval()
    x = randn(2, 3, 64, 96)
    want = net.backbone(x)[5].flatten(2).mean(2) @ net.final.weight.T + net.final.bias
    assert want.shape == (2, 5) and torch.allclose(net(x), want, atol=1e-6)


# ---- joint training ------------------------------------------------------------------------------


def joint_batch():
    """Two human-labelled, two pseudo-labelled and two classified images."""
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (6, 64, 64), generator=g, dtype=torch.uint8)
    mask[4:] = 255  # as of data.collate
    low = 40 * torch.rand(6, 2, 2, generator=g)
    labels = torch.tensor([[0, 4], [2, -1], [1, 3], [-1, -1], [-1, -1], [-1, -1]])
    return {
        "images": randn(6, 3, 64, 64),
        "part": torch.tensor([0, 0, 1, 1, 2, 2]),
        "mask": mask,
        "boxes": torch.cat([low, low + 16], 2),
        "labels": labels,
        "image_class": torch.tensor([-1, -1, -1, -1, 3, 0]),
    }


def of_parts(values, part):
    """Sums of each part, for each image of it."""
    return torch.zeros(3).index_add(0, part, values)[part]


JOINT = {  # network, its targets and losses
    "seg": (tiny_segmenter, ops.pixel_targets, ops.pixel_losses),
    "det": (tiny, ops.match_anchors, ops.box_losses),
}


def joint_losses(task):
    build, targets_of, losses_of = JOINT[task]
    net = build()
    net.joint = nn.Linear(256, 5)
    batch = joint_batch()
    targets, losses = models.joined(targets_of, losses_of)
    wanted, count = targets(batch, net)
    model = models.Joint(net)
    outputs = model(batch["images"], *[wanted[name] for name in model.inputs])
    return net, batch, losses(outputs, wanted, of_parts(count, batch["part"]), net)


@pytest.mark.parametrize("task", JOINT)
def test_each_loss_of_joint_training_is_that_of_its_task_alone(task):
    net, batch, terms = joint_losses(task)
    _, targets_of, losses_of = JOINT[task]
    wanted, count = targets_of(batch, net)
    want = losses_of(net(batch["images"]), wanted, of_parts(count, batch["part"]), net)
    assert torch.allclose(terms[:4], want[:4], rtol=1e-4) and (want[:4, 0] > 0).all()
    logits = net.joint(net.backbone(batch["images"])[5].mean((2, 3)))[4:]
    want = F.cross_entropy(logits, batch["image_class"][4:])
    assert terms[4:, 0].sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert not terms[4:, 1:].any()


@pytest.mark.parametrize("task", JOINT)
def test_classification_reaches_the_backbone_and_no_head_but_its_own(task):
    net, _, terms = joint_losses(task)
    terms[4:].sum().backward()
    reached = set()
    for name, p in net.named_parameters():
        if p.grad is not None and p.grad.any():
            reached.add(name.partition(".")[0])
    assert reached == {"backbone", "joint"}


# ---- a step in pieces ----------------------------------------------------------------------------


def gradients(pieces, joint):
    """Gradients of a step of two parts that is cut into so many pieces."""
    net = tiny()
    batch = {name: value[:4] for name, value in joint_batch().items()}
    part = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        for tower in (net.classes, net.boxes):  # from 1e-5 hardly any gradient would pass
            nn.init.normal_(tower.final.weight, std=0.05)
    targets, count = ops.match_anchors(batch, net)
    count = of_parts(count, part)
    total = 0.0
    for rows in torch.arange(4).chunk(pieces):
        wanted = {name: value[rows] for name, value in targets.items()}
        terms = ops.box_losses(net(batch["images"][rows]), wanted, count[rows], net)
        loss = joint(torch.zeros(2).index_add(0, part[rows], terms.sum(1)))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("losses", [(), (0.5, 2.0)], ids=["first step", "later"])
def test_a_step_in_pieces_has_the_gradients_of_the_whole(losses):
    joint = ops.JointLoss(2, 0.7)
    if losses:
        joint.update(torch.tensor(losses))
    loss, whole = gradients(1, joint)
    assert sum(g.abs().max() > 1e-3 for g in whole.values()) > len(whole) / 2
    for pieces in (2, 4):
        total, split = gradients(pieces, joint)
        assert total == pytest.approx(loss, rel=1e-5)
        for name, g in whole.items():
            assert (split[name] - g).abs().max() <= 1e-5 * max(1, g.abs().max()), name
