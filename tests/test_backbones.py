"""backbones.py: published sizes, parity with torchvision and timm, SpineNet's graph, norms,
initialisation, recomputing, and every way of loading (or refusing) a file."""

import copy
import functools
import itertools
import os
import pickle
import re
import sys
import urllib.error

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter

import backbones
import models

# fmt: off
BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
EFFICIENT = {
    "b0": (24, 40, 112, 320), "b1": (24, 40, 112, 320), "b2": (24, 48, 120, 352),
    "b3": (32, 48, 136, 384), "b4": (32, 56, 160, 448), "b5": (40, 64, 176, 512),
    "b6": (40, 72, 200, 576), "b7": (48, 80, 224, 640), "b8": (56, 88, 248, 704),
    "l2": (104, 176, 480, 1376),
}
CHANNELS = {  # of every level, literal, so that a slip in a table shows
    "resnet10": (32, 64, 128, 256), "resnet18": BASIC, "resnet34": BASIC,
    "resnet50": BOTTLENECK, "resnet101": BOTTLENECK,
    **{f"efficientnet_{k}": c for k, c in EFFICIENT.items() if k not in ("b8", "l2")},
    **{f"tf_efficientnet_{k}": c for k, c in EFFICIENT.items()},
    "spinenet49S": (256,) * 5, "spinenet49": (256,) * 5, "spinenet96": (256,) * 5,
    "spinenet143": (256,) * 5, "spinenet190": (512,) * 5,
}
PUBLISHED = list(CHANNELS)[1:13]  # torchvision has weights of
GRAPH = {  # SpineNet, Du et al. 2020: node: level, the nodes it takes
    2: (2, 0, 1), 3: (4, 0, 1), 4: (3, 2, 3), 5: (4, 2, 4), 6: (6, 3, 5), 7: (4, 3, 5),
    8: (5, 6, 7), 9: (7, 6, 8), 10: (5, 8, 9), 11: (5, 8, 10), 12: (4, 5, 10), 13: (3, 4, 10),
    14: (5, 7, 11, 12), 15: (7, 5, 14), 16: (6, 12, 14),
}
# fmt: on
FAMILIES = ["resnet10", "resnet50", "efficientnet_b0", "tf_efficientnet_b0", "spinenet49S"]


def on_meta(make, *args, **kwargs):
    """Shapes and counts only: the largest nets cost nothing."""
    with torch.device("meta"), torch.no_grad():
        return make(*args, **kwargs)


@functools.cache
def built(name, norm):
    torch.manual_seed(0)
    return backbones.build(name, norm)


def build(name, norm="bn"):
    """A fresh one each time, drawn once: SpineNet takes a second."""
    return copy.deepcopy(built(name, norm))


def randomise_norms(net):
    """Fresh BN is (almost) the identity: parity would say nothing about statistics or eps."""
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.uniform_(-0.5, 0.5, generator=g)
            m.running_mean.uniform_(-0.3, 0.3, generator=g)
            m.running_var.uniform_(0.01, 2.0, generator=g)  # at 0.01 eps 1e-5 and 1e-3 differ by 5%
    return net


@functools.cache
def classifier(name):
    """Of torchvision, or of timm if its name says tf_ or timm_."""
    torch.manual_seed(0)
    make = timm.create_model if name.startswith(("tf_", "timm_")) else get_model
    return randomise_norms(make(name.removeprefix("timm_"))).eval()


def weights(name):
    return dict(classifier(name).state_dict())


def levels_of(net, x):
    """A classifier's feature maps."""
    if hasattr(net, "forward_intermediates"):
        how = dict(indices=(1, 2, 3, 4), intermediates_only=True)
        return dict(zip(backbones.LEVELS, net.forward_intermediates(x, **how)))
    if hasattr(net, "features"):
        return {l: net.features[:n](x) for l, n in zip(backbones.LEVELS, (3, 4, 6, 8))}
    return IntermediateLayerGetter(net, {f"layer{l - 1}": l for l in backbones.LEVELS})(x)


def images(b=2, h=64, w=96):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(1))


def assert_close(maps, wanted):
    """To 1e-4 of the map's largest value; the map must not be trivial."""
    assert list(maps) == list(wanted)
    for a, b in zip(maps.values(), wanted.values()):
        scale = b.abs().max()
        assert b.std() > 1e-3 and torch.isfinite(scale)
        assert (a - b).abs().max() <= 1e-4 * max(1.0, scale.item())


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(net, before):
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def drops(net):
    return [m for m in net.modules() if isinstance(m, torchvision.ops.StochasticDepth)]


# ---- architecture --------------------------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("name, size, params, multiply_adds", [  # in millions, in billions
    ("resnet50",    640,  34.0,  97.0),
    ("spinenet49S", 640,  11.9,  33.8),
    ("spinenet49",  640,  28.5,  85.4),
    ("spinenet96",  1024, 43.0,  265.4),
    ("spinenet143", 1280, 67.0,  524.0),
    ("spinenet190", 1280, 163.6, 1885.0),
])
# fmt: on
def test_detectors_have_the_published_size_and_cost(name, size, params, multiply_adds):
    head = {}
    if name in backbones.SPINENETS:
        *_, width, depth, _ = backbones.SPINENETS[name]
        head = dict(width=width, depth=depth, act="swish")
    net = on_meta(models.RetinaNet, name, 91, size, **head).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, size, size, device="meta"))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("name", backbones.NAMES)
def test_channels_strides_and_parameters_are_the_published_ones(name):
    assert backbones.NAMES == list(CHANNELS)
    net, first = on_meta(backbones.build, name).eval(), 2
    if name in backbones.SPINENETS:
        first = 3
    assert net.channels == dict(enumerate(CHANNELS[name], first))
    for h, w in ((97, 331), (128, 256)) if name in FAMILIES else ((97, 331),):
        feats = on_meta(net, torch.zeros(1, 3, h, w, device="meta"))
        assert list(feats) == list(net.channels)
        for l, f in feats.items():
            assert f.shape == (1, net.channels[l], -(-h // 2**l), -(-w // 2**l))
    head, make = ("fc.", "classifier.", "features.8."), get_model
    if name.startswith("tf_"):
        head, make = ("classifier.", "conv_head.", "bn2."), timm.create_model
    elif name not in PUBLISHED:
        return
    whole = on_meta(make, name)
    body = {k: p.shape for k, p in whole.named_parameters() if not k.startswith(head)}
    shapes = {k: p.shape for k, p in net.named_parameters()}
    assert sum(s.numel() for s in shapes.values()) == sum(s.numel() for s in body.values())
    if name in PUBLISHED:  # also called the same
        assert shapes == body
        eps = backbones.EFFICIENTNETS[name[-2:]][2] if "efficientnet" in name else 1e-5
        assert {m.eps for m in whole.modules() if isinstance(m, nn.BatchNorm2d)} == {eps}
    if name in PUBLISHED and "efficientnet" in name:
        assert [m.p for m in drops(net)] == [m.p for m in drops(whole)]


# fmt: off
@pytest.mark.parametrize("name, norm", [
    ("resnet18", "bn"), ("resnet18", "frozen"), ("resnet50", "bn"), ("efficientnet_b0", "bn"),
    ("efficientnet_b0", "frozen"), *(pytest.param(name, "bn", marks=pytest.mark.slow)
                                     for name in ("resnet101", "efficientnet_b7")),
])
# fmt: on
def test_same_maps_as_torchvision(name, norm, tmp_path):
    source, x, net = classifier(name), images(), build(name, norm).eval()
    torch.save(source.state_dict(), tmp_path / "tv.pth")
    with torch.no_grad():
        wanted, before = levels_of(source, x), net(x)
        line = backbones.load_backbone(net, tmp_path / "tv.pth")
        assert_close(net(x), wanted)
        channels_last = net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
        assert_close(channels_last, wanted)
    for l, f in channels_last.items():
        assert f.is_contiguous(memory_format=torch.channels_last)
        assert not torch.allclose(before[l], wanted[l], atol=1e-2)  # the loading made them equal
    folded = name == "efficientnet_b0"  # up to B4 they were trained with another eps
    assert unchanged(net, source.state_dict()) == (not folded)
    assert ("BN eps 1e-05 -> 0.001 folded" in line) == folded


@pytest.mark.parametrize("file", ["timm.pth", "timm.safetensors"])
def test_tf_efficientnet_gives_timms_maps_at_even_and_odd_sizes(file, tmp_path):
    source, net = classifier("tf_efficientnet_b0"), build("tf_efficientnet_b0").eval()
    save = torch.save if file.endswith(".pth") else safetensors.torch.save_file
    save(source.state_dict(), tmp_path / file)
    backbones.load_backbone(net, tmp_path / file)
    symmetric = build("efficientnet_b0").eval()
    symmetric.load_state_dict(net.state_dict())
    for size in ((64, 96), (75, 98), (65, 97)):
        x = images(2, *size)
        with torch.no_grad():
            wanted, maps, others = levels_of(source, x), net(x), symmetric(x)
        assert_close(maps, wanted)
        odd = size == (65, 97)  # at every stride: both pad alike
        assert all(torch.allclose(others[l], wanted[l], atol=1e-2) == odd for l in wanted)


def test_timms_symmetric_weights_compute_what_timm_does(tmp_path):
    source, net = classifier("timm_efficientnet_b0"), build("efficientnet_b0").eval()
    torch.save(source.state_dict(), tmp_path / "efficientnet_b0.pth")
    assert "eps" in backbones.load_backbone(net, tmp_path / "efficientnet_b0.pth")
    with torch.no_grad():
        assert_close(net(images()), levels_of(source, images()))


@pytest.mark.slow
def test_tf_efficientnet_l2_gives_timms_maps(tmp_path, monkeypatch):
    source = on_meta(timm.create_model, "tf_efficientnet_l2").to_empty(device="cpu")
    for p in source.parameters():  # uniform, as there is half a billion to draw
        nn.init.uniform_(p, -((3 / p[0].numel()) ** 0.5), (3 / p[0].numel()) ** 0.5)
    randomise_norms(source).eval()
    (tmp_path / "l2.pth").touch()
    monkeypatch.setattr(backbones, "read_file", lambda _: source.state_dict())  # not 2 GB of disk
    net = on_meta(backbones.build, "tf_efficientnet_l2").to_empty(device="cpu").eval()
    backbones.load_backbone(net, tmp_path / "l2.pth")
    with torch.no_grad():
        assert_close(net(images(1, 64, 64)), levels_of(source, images(1, 64, 64)))


@torch.no_grad()
@pytest.mark.parametrize("k, stride", [(3, 2), (5, 2), (5, 4), (3, 4), (5, 16), (1, 2)])
def test_same_padding_is_tensorflows_definition(k, stride):
    def windows(n):  # the inputs that each of the ceil(n / stride) outputs sees
        missing = max((-(-n // stride) - 1) * stride + k - n, 0)
        return [range(i - missing // 2, i - missing // 2 + k) for i in range(0, n, stride)]

    torch.manual_seed(0)
    conv = backbones.conv(1, 1, k, stride, same=True)
    for h, w in ((n, 3 * n % 19 + 1) for n in range(1, 19)):
        x = -1 - torch.rand(1, 1, h, w)  # below zero: padding a maximum with zeros would show
        sums, maxima = [], []
        for rows, cols in itertools.product(windows(h), windows(w)):
            cells = itertools.product(enumerate(rows), enumerate(cols))
            inside = [(a, b, r, c) for (a, r), (b, c) in cells if 0 <= r < h and 0 <= c < w]
            sums.append(sum(x[0, 0, r, c] * conv.weight[0, 0, a, b] for a, b, r, c in inside))
            maxima.append(max([x[0, 0, r, c] for _, _, r, c in inside], default=-torch.inf))
        pooled = backbones.max_pool_same(x, k, stride)
        for out, want in ((conv(x), sums), (pooled, maxima)):
            assert out.shape[2:] == (len(windows(h)), len(windows(w)))
            assert torch.allclose(out.flatten(), torch.tensor(want), atol=1e-5)


def test_spinenet_takes_just_the_papers_parents_at_the_papers_levels():
    net, (h, w) = build("spinenet49S", "frozen").eval(), (97, 131)
    taken, outputs, endpoints = [], [], {}

    def cut_off(_, args, out):  # every node's output becomes a leaf: gradients then tell parents
        taken.append(args[0])
        outputs.append(out.detach().requires_grad_())
        return outputs[-1]

    def met(m, args, out):  # halving meets the wanted size, without broadcasting
        assert list(out.shape[2:]) == list(args[1])

    for m in net.modules():
        if isinstance(m, backbones.Resample):
            m.register_forward_hook(met)
    for group in net.groups:
        group.register_forward_hook(cut_off)
    for level, m in net.endpoints.items():
        m.register_forward_pre_hook(lambda _, args, l=int(level): endpoints.update({l: args[0]}))
    net(images(1, h, w))
    assert len(outputs) == 17 and taken[1] is outputs[0]
    for node, (level, *parents) in GRAPH.items():
        how = dict(allow_unused=True, retain_graph=True)
        grads = torch.autograd.grad(taken[node].sum(), outputs, **how)
        assert [i for i, g in enumerate(grads) if g is not None and g.any()] == parents
        assert outputs[node].shape[2:] == (-(-h // 2**level), -(-w // 2**level))
    ends = {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}
    assert all(endpoints[l] is outputs[node] for l, node in ends.items())
    ways = zip(net.resample[12], (7, 12))
    into_14 = sum(way(outputs[p], outputs[11].shape[2:]) for way, p in ways)
    assert torch.allclose(taken[14], F.silu(into_14 + outputs[11]), atol=1e-5)  # 11 as it is


@pytest.mark.parametrize("name", backbones.SPINENETS)
def test_spinenet_block_kinds_and_drop_rates(name):
    repeats = dict(spinenet96=2, spinenet143=3, spinenet190=4).get(name, 1)
    rate = 0.16 if name == "spinenet143" else 0.2
    for node, group in enumerate(on_meta(backbones.build, name).groups):
        assert len(group) == repeats
        for block in group:
            assert block.depth == (2 if node in (3, 6, 8, 9) else 3)  # basic, else bottleneck
            assert block.act is F.silu
            assert block.stochastic_depth.p == pytest.approx(rate * max(node - 1, 0) / 15)


# ---- initialisation and training -----------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("name, eps, momentum", [
    ("resnet10", 1e-5, 0.1), ("efficientnet_b0", 1e-3, 0.01), ("tf_efficientnet_b0", 1e-3, 0.01),
    ("spinenet49S", 1e-3, 0.003),
])
# fmt: on
def test_initialisation(name, eps, momentum):
    spinenet = name == "spinenet49S"
    for m in build(name).modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.weight[0, 0].numel() * (1 if m.groups > 1 else m.out_channels)
            std = (1 / m.weight[0].numel() if spinenet else 2 / fan_out) ** 0.5
            error = 1 / (2 * m.weight.numel()) ** 0.5
            assert abs(m.weight.std().item() / std - 1) < 5 * error
            assert not spinenet or m.weight.abs().max() < 2.274 * std  # cut off
            assert m.bias is None or not m.bias.any()
        if isinstance(m, nn.BatchNorm2d):  # also the last of a branch: not zeroed
            assert (m.weight == 1).all() and not m.bias.any()
            assert (m.eps, m.momentum) == (eps, momentum)


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_reaches_every_parameter(name, norm):
    net = build(name, norm)
    for m in drops(net):
        m.p = 0.0  # a dropped branch rightly has no gradient
    feats = net(images(4).contiguous(memory_format=torch.channels_last))
    sum(f.square().mean() for f in feats.values()).backward()
    for k, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), k


@pytest.mark.parametrize("kind", ["MBConv", "Residual"])
def test_stochastic_depth_drops_whole_images_in_training_only_and_keeps_the_mean(kind):
    torch.manual_seed(0)
    make = functools.partial(backbones.make_norm, "frozen")
    if kind == "MBConv":
        block = backbones.MBConv(8, 8, 3, 1, 6, 0.2, make, False)
        branch_of = block.block
    else:
        block = backbones.Residual("basic", 8, 8, 1, make, lambda x, inplace: x, 0.2)
        branch_of = nn.Sequential(block.conv1, block.bn1, block.conv2, block.bn2)
    x = images()[:1, :1, :4, :4].expand(4000, 8, 4, 4)
    with torch.no_grad():
        branch = branch_of(x)
        assert torch.equal(block.eval()(x), x + branch)
        kept = block.train()(x) - x
    dropped = (kept == 0).flatten(1).all(1)
    assert torch.allclose(kept[~dropped], branch[~dropped] / 0.8, atol=1e-5)
    assert abs(dropped.float().mean() - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    down = backbones.MBConv(8, 8, 3, 2, 6, 0.999, make, False).train()
    assert torch.equal(down(x[:8]), down.block(x[:8]))  # not residual: never dropped


def training_step(net, x):
    """Outputs, gradients and the bytes saved for the backward pass, but for parameters and what
    recomputed blocks keep: their input."""
    held, parameters = {}, {p.data_ptr() for p in net.parameters()}

    def hold(t):
        if t.data_ptr() not in parameters:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(5)  # of the stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        outputs = net.train()(x)
    outputs = outputs if isinstance(outputs, tuple) else tuple(outputs.values())
    sum(f.square().mean() for f in outputs).backward()
    return outputs, {k: p.grad for k, p in net.named_parameters()}, sum(held.values())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_b0", "spinenet49S", "RetinaNet"])
def test_recomputing_changes_nothing_but_the_memory_held(name):
    kinds, x = backbones.BLOCKS, images(2, 128, 128)
    if name == "RetinaNet":
        kinds = (*kinds, models.Tower)
        plain = models.RetinaNet("resnet10", 3, 128, width=16, depth=2)
    else:
        plain = build(name)
    saving = copy.deepcopy(plain)
    backbones.recompute(saving, kinds)
    saving = copy.deepcopy(saving)  # as a teacher's average is made
    for _ in range(2):
        outputs, grads, held = training_step(plain, x)
        outputs2, grads2, held2 = training_step(saving, x)
        assert all(map(torch.equal, outputs2, outputs))
        assert all(torch.equal(grads2[k], g) for k, g in grads.items())
        assert unchanged(saving, plain.state_dict())  # averages too
        assert held2 < 0.66 * held
    assert list(saving.state_dict()) == list(plain.state_dict())


# ---- norms and pixels ----------------------------------------------------------------------------


def test_groupnorm_groups_and_nets_without_batchnorm():
    # fmt: off
    groups = {16: 2, 24: 3, 32: 4, 40: 5, 64: 8, 112: 14, 256: 32, 320: 32, 2048: 32, 4: 1, 17: 1}
    # fmt: on
    for channels, n in groups.items():
        assert backbones.make_norm("gn", channels).num_groups == n
    for name in FAMILIES:
        assert not list(on_meta(backbones.build, name, "gn").buffers())


def test_frozen_norms_never_move_and_others_do():
    for norm, moves in (("frozen", False), ("bn", True)):
        net = build("resnet10", norm)
        before, optimizer = snapshot(net), torch.optim.SGD(net.parameters(), lr=0.1)
        sum(f.mean() for f in net.train()(images()).values()).backward()
        optimizer.step()
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert "conv1.weight" in moved and moves == any("bn" in k for k in moved)
        assert moves == ("bn1.running_mean" in moved)


def test_frozen_norm_equals_batchnorm_in_eval_and_keeps_bf16():
    norm, frozen = randomise_norms(nn.BatchNorm2d(6)).eval(), backbones.make_norm("frozen", 6)
    frozen.load_state_dict(norm.state_dict())
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(frozen.train()(x), norm(x))
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_normalise_takes_lists_and_gives_channels_last():
    pixels = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.1])  # as json has them
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in pixels)
    assert torch.allclose(backbones.normalise(x, pixels), (x / 255 - mean) / std, atol=1e-5)
    assert backbones.normalise(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(backbones.normalise(x), backbones.normalise(x, list(backbones.IMAGENET)))


# ---- loading -------------------------------------------------------------------------------------


def prefixed(prefix, state, without=()):
    return {prefix + k: v for k, v in state.items() if not k.startswith(without)}


def moco(state):
    """The key encoder's weights differ; both project by an MLP instead of the classifier."""
    tensors = {"queue": torch.ones(128, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    for encoder, sign in (("q", 1), ("k", -1)):
        own = {k: sign * v for k, v in state.items()}
        tensors |= prefixed(f"encoder_{encoder}.", own, "fc.")
        mlp = [f"fc.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")]
        tensors |= {f"encoder_{encoder}.{k}": torch.ones(8) for k in mlp}
    return prefixed("module.", tensors)


def ours(state):
    return {**prefixed("backbone.", state, "fc."), "head.weight": torch.ones(2)}


def old_torchvision(state):  # its oldest files
    return backbones.without_counters(state)


# fmt: off
FILES = {
    # kind: backbone, file, a classifier's tensors -> the file's, around them, others, an extra key
    "torchvision":  ("resnet18", "tv.pth", dict, None, 2, "extra.weight"),
    "no counters":  ("resnet18", "old.pth", old_torchvision, None, 2, "extra.weight"),
    "DataParallel": ("resnet18", "dp.pth.tar", functools.partial(prefixed, "module."),
                     {"epoch": 90}, 2, "module.extra.weight"),
    "MoCo":         ("resnet18", "moco.pth.tar", moco, {"epoch": 200, "arch": "resnet18"}, 130,
                     "module.encoder_q.extra.weight"),
    "SimCLR":       ("resnet18", "simclr.pth", dict, {}, 2, "extra.weight"),
    "ours":         ("resnet18", "ours.pt", ours, {"config": {"backbone": "resnet18"}, "step": 7},
                     1, "backbone.extra.weight"),
    "bare":         ("resnet18", "bare.pth", lambda s: prefixed("", s, "fc."), None, 0,
                     "extra.weight"),
    "timm":         ("tf_efficientnet_b0", "timm.pth", dict, None, 8, "blocks.1.0.extra.weight"),
    "safetensors":  ("tf_efficientnet_b0", "timm.safetensors", dict, None, 8, "extra.weight"),
}
NOTES = {
    "SimCLR": "SimCLR; pixels in 0..1 -> normalised ones folded into the first layer",
    "safetensors": "timm", "no counters": "torchvision", "DataParallel": "torchvision",
}  # of the others: what they are called above
# fmt: on


def write(kind, folder, change=dict):
    """A file as such checkpoints come, its tensors changed by `change` -> the source to give."""
    name, file, convert, around, _, _ = FILES[kind]
    state = change(convert(weights(name)))
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(state, folder / file)
    elif around is None:
        torch.save(state, folder / file)
    else:
        torch.save({**around, "model" if kind == "ours" else "state_dict": state}, folder / file)
    return ("simclr:" if kind == "SimCLR" else "") + str(folder / file)


def refused(net, source, *words):
    """load_backbone must raise a ValueError of one line with the words, and leave the net alone."""
    before = snapshot(net)
    with pytest.raises(ValueError) as caught:
        backbones.load_backbone(net, source)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    assert all(word in text for word in words), text
    assert unchanged(net, before)
    return text


@pytest.mark.parametrize("kind", FILES)
def test_every_source_fills_the_net_and_half_or_more_than_it_is_refused(kind, tmp_path):
    name, file, _, _, others, extra = FILES[kind]
    source = write(kind, tmp_path)
    for norm in ("bn", "frozen"):
        net = build(name, norm)
        tensors = backbones.without_counters(net.state_dict())
        assert backbones.load_backbone(net, source) == (
            f"{name}: all {len(tensors)} tensors loaded from '{tmp_path / file}' "
            f"({NOTES.get(kind, kind)}), none left random, {others} others in it ignored"
        )
        if name == "resnet18":  # timm's are compared by their maps
            differ = {k for k, v in tensors.items() if not torch.equal(v, weights(name)[k])}
            folded = {"conv1.weight", "bn1.running_mean"}
            assert differ == (folded if kind == "SimCLR" else set())
    half = write(kind, tmp_path, lambda state: dict(list(state.items())[::2]))
    text = refused(net, half, name, "unexpected none", "build what the file was saved from")
    number, names = re.search(r"missing (\d+) \((.*), \.\.\.\)", text).groups()
    assert set(names.split(", ")) < set(tensors) and 0.4 <= int(number) / len(tensors) <= 0.6
    more = write(kind, tmp_path, lambda state: {**state, extra: torch.ones(2)})
    extra = re.sub(r"^(module\.|encoder_q\.|backbone\.)+", "", extra)
    refused(net, more, f"missing none, unexpected 1 ({extra})")


def test_simclr_weights_see_normalised_images_as_they_saw_pixels(tmp_path):
    source, net = copy.deepcopy(classifier("resnet18")), build("resnet18").eval()
    backbones.load_backbone(net, write("SimCLR", tmp_path))
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in backbones.IMAGENET)
    pixels = images().sigmoid()
    x = (pixels - mean) / std
    with torch.no_grad():
        maps, wanted = net.bn1(net.conv1(x)), source.bn1(source.conv1(pixels))
        assert_close({1: maps[..., 2:-2, 2:-2]}, {1: wanted[..., 2:-2, 2:-2]})
        source.conv1.padding = 0  # the border in the mean colour: now all of it is the same
        assert_close(net(x), levels_of(source, F.pad(pixels - mean, [3] * 4) + mean))


@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0", "spinenet49S"])
def test_our_checkpoints_and_bare_state_dicts_round_trip_bit_for_bit(name, tmp_path):
    """Also: EfficientNet's eps folding is for files of others only."""
    for norm in ("bn", "gn", "frozen"):
        state = randomise_norms(build(name, norm)).state_dict()
        torch.save({"model": ours(state)}, tmp_path / "ours.pt")
        about = {"backbone": name, "mean": [0.5] * 3, "std": [0.5] * 3}
        torch.save({"model": state, "about": about}, tmp_path / "bare.pth")
        for file, note in (("ours.pt", "(ours)"), ("bare.pth", "(bare)")):
            net = build(name, norm)
            assert note in backbones.load_backbone(net, tmp_path / file)
            tensors = backbones.without_counters(net.state_dict())
            assert all(torch.equal(v, state[k]) for k, v in tensors.items())


def test_files_that_say_little_are_taken_as_the_network_has_it(tmp_path):
    plain, tf = build("efficientnet_b0"), build("tf_efficientnet_b0")
    assert "nothing loaded" in backbones.load_backbone(plain, "random")
    assert unchanged(plain, built("efficientnet_b0", "bn").state_dict())
    torch.save(weights("tf_efficientnet_b0"), tmp_path / "model.pth")
    assert "(timm)" in backbones.load_backbone(tf, tmp_path / "model.pth")
    torch.save(plain.state_dict(), tmp_path / "bare.pth")
    line = backbones.load_backbone(plain, tmp_path / "bare.pth")
    assert "padding and BN eps are taken to be this network's" in line


def saved(name, prefix=""):  # of a network with one more tensor
    return {"model": {prefix + "x": torch.ones(1)}, "config": {"backbone": name}}


def wider():
    return {**weights("resnet18"), "layer1.0.conv1.weight": torch.ones(128, 64, 1, 1)}


# fmt: off
TF, PLAIN, RESNET = (functools.partial(weights, name)
                     for name in ("tf_efficientnet_b0", "efficientnet_b0", "resnet18"))
REFUSED = {
    # file: of the backbone, bytes in it, or what torch.save takes, or what makes that; the words
    "none.pth":  ("resnet10", None, ["is not a file"]),
    "empty":     ("resnet10", b"", ["is not a checkpoint"]),
    "page":      ("resnet10", b"<html>404</html>", ["is not a checkpoint"]),
    "tensor":    ("resnet10", torch.ones(3), ["is not a checkpoint", "name -> tensor"]),
    "numbers":   ("resnet10", {"a": 1}, ["is not a checkpoint", "name -> tensor"]),
    "ids":       ("resnet10", {0: torch.ones(1)}, ["is not a checkpoint", "name -> tensor"]),
    "nothing":   ("resnet10", {"model": {}}, ["is not a checkpoint", "name -> tensor"]),
    "module":    ("resnet10", nn.Linear(2, 2), ["nn.modules.linear.Linear", "state_dict()"]),
    "foreign":   ("resnet10", saved("resnet10"), ["unexpected 1 (x)"]),
    "ours":      ("resnet10", saved("resnet34", "backbone."),
                  ["was saved from resnet34, this is resnet10: build resnet34"]),
    "shallower": ("resnet34", RESNET,
                  ["missing 80 (layer1.2.conv1.weight, ", ", ...)", "unexpected none"]),
    "another":   ("resnet18", PLAIN,
                  ["missing 100 (conv1.weight, ", "unexpected 304 (features.0.0.weight, "]),
    "wider":     ("resnet18", wider, ["layer1.0.conv1.weight is (128, 64, 1, 1) in the file, "
                                      "(64, 64, 3, 3) in the model"]),
    "gn":        ("resnet18", lambda: built("resnet18", "gn").state_dict(),
                  ["missing 40 (bn1.running_mean, "]),
    "tf_efficientnet_b0_ns.pth":
        ("efficientnet_b0", TF, ["TensorFlow's padding: build tf_efficientnet_b0"]),
    "efficientnet_b0_ra.pth":
        ("tf_efficientnet_b0", TF, ["timm's weights for symmetric padding: build efficientnet_b0"]),
    "tf_efficientnet_b0_ap-f262efe1.pth": ("tf_efficientnet_b0", TF, ["AdvProp"]),
    "tv.pth": ("tf_efficientnet_b0", PLAIN, ["torchvision's weights for symmetric padding"]),
    "simclr:b0": ("efficientnet_b0", PLAIN, ["no ResNet converted from SimCLR"]),
    "simclr:moco": ("resnet18", lambda: moco(weights("resnet18")),
                    ["MoCo names", "give it without 'simclr:'"]),
}
# fmt: on


@pytest.mark.parametrize("file", REFUSED)
def test_what_does_not_fit_is_refused(file, tmp_path):
    name, content, words = REFUSED[file]
    path = tmp_path / file.removeprefix("simclr:")
    if callable(content) and file != "module":
        content = content()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    source = f"simclr:{path}" if "simclr:" in file else path
    refused(build(name), source, str(path), *words)


def test_damaged_files_and_folders_are_refused(tmp_path):
    torch.save(weights("resnet18"), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    refused(build("resnet18"), tmp_path / "half.pth", "half.pth' is not a checkpoint")
    refused(build("resnet18"), tmp_path, "is not a file")
    refused(
        build("resnet18", "gn"), tmp_path / "whole.pth", "BatchNorm weights", "'bn' or 'frozen'"
    )


def test_safetensors_without_its_package_says_so(tmp_path, monkeypatch):
    file = write("safetensors", tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(build("tf_efficientnet_b0"), file, "needs the package safetensors: pip install")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_file_is_refused_and_never_runs(protocol, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"conv1.weight": Payload(str(mark))}
    if protocol:
        file.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, file)
    refused(build("resnet10"), file, str(file), "unsafe unpickling is refused", "state_dict()")
    assert not mark.exists()
    if protocol:
        pickle.loads(file.read_bytes())["conv1.weight"].close()
    else:
        torch.load(file, weights_only=False)["conv1.weight"].close()
    assert mark.exists()  # the payload was live: the test could have failed


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash")])
def test_imagenet_without_network_says_so_in_one_line(error, tmp_path, monkeypatch):
    def fail(url, dst, hash_prefix, progress):
        assert url.startswith("https://") and hash_prefix in url and len(hash_prefix) == 8
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    words = ("cannot fetch", "https://", str(tmp_path), "resnet18-f37072fd.pth")
    refused(build("resnet18"), "imagenet", *words)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_imagenet_is_fetched_once_and_is_torchvisions_first_set(name, tmp_path, monkeypatch):
    def fetch(url, path, *_, **__):
        urls.append(url)
        torch.save(weights(name), path)

    urls = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        line = backbones.load_backbone(build(name), "imagenet")
        file = os.path.basename(get_model_weights(name).IMAGENET1K_V1.url)
        assert f"loaded from '{tmp_path / 'hub/checkpoints' / file}' (torchvision" in line
    assert urls == [get_model_weights(name).IMAGENET1K_V1.url]


def test_imagenet_is_refused_where_torchvision_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: None)
    net = build("resnet10")
    for net.name in backbones.NAMES:
        if net.name in PUBLISHED:
            assert backbones.imagenet_file(net.name).endswith(".pth")
        else:
            refused(net, "imagenet", "torchvision has weights for resnet18, ", f"for {net.name}")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet99.*resnet10.*efficientnet_b7, tf_.*spinenet190"):
        backbones.build("resnet99")
    with pytest.raises(ValueError, match="'bn', 'gn' or 'frozen'"):
        backbones.build("resnet10", norm="batch")
