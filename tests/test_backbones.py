"""backbones.py: published sizes, parity with torchvision and timm, SpineNet's graph, norms, initialisation, recomputing, and
every way of loading (or refusing) a file."""
import copy
import functools
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.error
import zipfile

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

SMALL = ["resnet10", "resnet18", "tf_efficientnet_b0", "spinenet49S"]
BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
CHANNELS = {  # of every level, literal, so that a slip in a table shows
    "resnet10": (32, 64, 128, 256), "resnet18": BASIC, "resnet34": BASIC, "resnet50": BOTTLENECK, "resnet101": BOTTLENECK,
    **{f"{tf}efficientnet_{k}": c for tf in ("", "tf_") for k, c in {
        "b0": (24, 40, 112, 320), "b1": (24, 40, 112, 320), "b2": (24, 48, 120, 352), "b3": (32, 48, 136, 384),
        "b4": (32, 56, 160, 448), "b5": (40, 64, 176, 512), "b6": (40, 72, 200, 576), "b7": (48, 80, 224, 640),
        "b8": (56, 88, 248, 704), "l2": (104, 176, 480, 1376)}.items() if tf or k not in ("b8", "l2")},
    "spinenet49S": (256,) * 5, "spinenet49": (256,) * 5, "spinenet96": (256,) * 5, "spinenet143": (256,) * 5,
    "spinenet190": (512,) * 5,
}
PUBLISHED = [n for n in CHANNELS if n != "resnet10" and not n.startswith(("tf_", "spinenet"))]  # torchvision has weights
HEAD = ("fc.", "classifier.", "features.8.", "conv_head.", "bn2.")  # what a backbone leaves out of torchvision's and timm's
GRAPH = {  # SpineNet, Du et al. 2020: node: level, the two nodes it takes; 14 also takes 11
    2: (2, 0, 1), 3: (4, 0, 1), 4: (3, 2, 3), 5: (4, 2, 4), 6: (6, 3, 5), 7: (4, 3, 5), 8: (5, 6, 7), 9: (7, 6, 8),
    10: (5, 8, 9), 11: (5, 8, 10), 12: (4, 5, 10), 13: (3, 4, 10), 14: (5, 7, 12), 15: (7, 5, 14), 16: (6, 12, 14)}


def on_meta(make, *args, **kwargs):
    """Shapes and counts only: the largest nets cost nothing."""
    with torch.device("meta"), torch.no_grad():
        return make(*args, **kwargs)


def randomise_norms(net, seed=0):
    """Fresh BN is (almost) the identity: parity would say nothing about statistics, affine or eps."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.uniform_(-0.5, 0.5, generator=g)
            m.running_mean.uniform_(-0.3, 0.3, generator=g)
            m.running_var.uniform_(0.01, 2.0, generator=g)  # down to 0.01, where eps 1e-5 and 1e-3 differ by 5%
    return net


def torchvision_net(name, seed=0):
    torch.manual_seed(seed)
    return randomise_norms(get_model(name), seed).eval()


def timm_net(name):
    net = on_meta(timm.create_model, name).to_empty(device="cpu")
    torch.manual_seed(0)
    for p in net.parameters():  # uniform, as the largest has half a billion to draw
        bound = (3 / p[0].numel()) ** 0.5
        nn.init.uniform_(p, -bound, bound)
    return randomise_norms(net).eval()


def their_levels(net, x):
    if hasattr(net, "forward_intermediates"):
        return dict(zip(backbones.LEVELS, net.forward_intermediates(x, indices=(1, 2, 3, 4), intermediates_only=True)))
    if hasattr(net, "features"):
        return {l: net.features[:n](x) for l, n in zip(backbones.LEVELS, (3, 4, 6, 8))}
    return IntermediateLayerGetter(net, {f"layer{l - 1}": l for l in backbones.LEVELS})(x)


def images(b=2, h=64, w=96, seed=1):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs):
    """To 1e-4 of the map's largest value; the map must not be trivial."""
    scale = theirs.abs().max()
    assert theirs.std() > 1e-3 and torch.isfinite(scale)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, scale.item())


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(net, before):
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def without_drops(net):
    for m in net.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0
    return net


# ---- architecture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, params, multiply_adds", [  # in millions, in billions
    ("resnet50", 640, 34.0, 97.0), ("spinenet49S", 640, 11.9, 33.8), ("spinenet49", 640, 28.5, 85.4),
    ("spinenet96", 1024, 43.0, 265.4), ("spinenet143", 1280, 67.0, 524.0), ("spinenet190", 1280, 163.6, 1885.0)])
def test_detectors_have_the_published_size_and_cost(name, size, params, multiply_adds):
    spine = dict(zip(("width", "depth"), backbones.SPINENETS[name][5:7]), act="swish") if name in backbones.SPINENETS else {}
    net = on_meta(models.RetinaNet, name, 91, **spine).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, size, size, device="meta"))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("name", [n for n in CHANNELS if n != "resnet10" and not n.startswith("spinenet")])
def test_parameters_are_those_of_torchvision_or_timm_without_the_classifier(name):
    theirs, ours = on_meta(timm.create_model if name.startswith("tf_") else get_model, name), on_meta(backbones.build, name)
    body = {k: p for k, p in theirs.named_parameters() if not k.startswith(HEAD if name.startswith("tf_") else HEAD[:3])}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in body.values())
    if name in PUBLISHED:  # also called the same
        assert {k: p.shape for k, p in ours.named_parameters()} == {k: p.shape for k, p in body.items()}
        eps = backbones.EFFICIENTNETS[name[-2:]][2] if "efficientnet" in name else 1e-5
        assert {m.eps for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)} == {eps}


@pytest.mark.parametrize("name, norm", [
    *((n, "bn") for n in ("resnet18", "resnet50", "resnet101", "efficientnet_b0", "efficientnet_b3", "efficientnet_b7")),
    *((n, "frozen") for n in ("resnet18", "resnet50", "efficientnet_b0"))])
def test_same_maps_as_torchvision(name, norm, tmp_path):
    theirs, x = torchvision_net(name), images()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = backbones.build(name, norm).eval()
    with torch.no_grad():
        wanted, before = their_levels(theirs, x), ours(x)
        line = backbones.load_backbone(ours, tmp_path / "tv.pth")
        got = ours(x)
        got_cl = ours.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for l in backbones.LEVELS:
        assert_close(got[l], wanted[l])
        assert_close(got_cl[l], wanted[l])
        assert got_cl[l].is_contiguous(memory_format=torch.channels_last)
        assert not torch.allclose(before[l], wanted[l], atol=1e-2)  # it was the loading that made them equal
    exact = unchanged(ours, theirs.state_dict())  # up to B4 they were trained with another eps, which is folded in
    assert exact == (name not in ("efficientnet_b0", "efficientnet_b3"))
    assert ("BN eps 1e-05 -> 0.001 folded" in line) == (not exact)


@pytest.mark.parametrize("file", ["timm.pth", "timm.safetensors"])
def test_tf_efficientnet_b0_gives_timms_maps_at_even_and_odd_sizes(file, tmp_path):
    theirs, ours = timm_net("tf_efficientnet_b0"), backbones.build("tf_efficientnet_b0").eval()
    save = torch.save if file.endswith(".pth") else safetensors.torch.save_file
    save(theirs.state_dict(), tmp_path / file)
    backbones.load_backbone(ours, tmp_path / file)
    symmetric = backbones.build("efficientnet_b0").eval()
    symmetric.load_state_dict(ours.state_dict())
    for size in ((64, 96), (75, 98), (65, 97)):
        x = images(2, *size)
        with torch.no_grad():
            wanted, got, other = their_levels(theirs, x), ours(x), symmetric(x)
        for l in backbones.LEVELS:
            assert_close(got[l], wanted[l])
            assert torch.allclose(other[l], wanted[l], atol=1e-2) == (size == (65, 97))  # odd at every stride: padded alike


@pytest.mark.slow
def test_tf_efficientnet_l2_gives_timms_maps(tmp_path, monkeypatch):
    theirs, x = timm_net("tf_efficientnet_l2"), images(1, 64, 64)
    (tmp_path / "l2.pth").touch()
    monkeypatch.setattr(backbones, "read_file", lambda path: theirs.state_dict())  # two gigabytes stay off the disk
    ours = on_meta(backbones.build, "tf_efficientnet_l2").to_empty(device="cpu").eval()
    backbones.load_backbone(ours, tmp_path / "l2.pth")
    with torch.no_grad():
        wanted, got = their_levels(theirs, x), ours(x)
    for l in backbones.LEVELS:
        assert_close(got[l], wanted[l])


@pytest.mark.parametrize("name", backbones.NAMES)
def test_strides_and_channels(name):
    net, first, resampled = on_meta(backbones.build, name).eval(), 3 if name.startswith("spinenet") else 2, []
    for m in net.modules():
        if isinstance(m, backbones.Resample):
            m.register_forward_hook(lambda m, args, out: resampled.append(list(out.shape[2:]) == list(args[1])))
    assert net.channels == dict(enumerate(CHANNELS[name], first)) and backbones.NAMES == list(CHANNELS)
    for size in ((128, 256), (97, 131), (65, 224), (333, 641)):
        feats = on_meta(net, torch.zeros(1, 3, *size, device="meta"))
        assert list(feats) == list(net.channels)
        for l, f in feats.items():
            assert f.shape == (1, net.channels[l], -(-size[0] // 2 ** l), -(-size[1] // 2 ** l))
    assert resampled == [True] * 4 * 30 * (first == 3)  # halving meets the wanted size, without broadcasting


@torch.no_grad()
@pytest.mark.parametrize("k, stride", [(3, 2), (5, 2), (5, 4), (3, 4), (5, 16), (1, 2)])
def test_same_padding_is_tensorflows_definition(k, stride):
    def windows(n):  # the inputs that each of the ceil(n / stride) outputs sees
        missing = max((-(-n // stride) - 1) * stride + k - n, 0)
        return [range(start - missing // 2, start - missing // 2 + k) for start in range(0, n, stride)]

    torch.manual_seed(0)
    conv = backbones.conv(1, 1, k, stride, same=True)
    for h, w in ((n, 3 * n % 19 + 1) for n in range(1, 19)):
        x = -1 - torch.rand(1, 1, h, w)  # below zero: padding a maximum with zeros would show
        outputs = []
        for rows, cols in itertools.product(windows(h), windows(w)):
            seen = [(x[0, 0, r, c], conv.weight[0, 0, a, b]) for a, r in enumerate(rows) for b, c in enumerate(cols)
                    if 0 <= r < h and 0 <= c < w]
            outputs.append((sum(v * u for v, u in seen), max((v for v, _ in seen), default=-torch.inf)))
        for got, want in zip((conv(x), backbones.max_pool_same(x, k, stride)), torch.tensor(outputs).T):
            assert got.shape[2:] == (len(windows(h)), len(windows(w))) and torch.allclose(got.flatten(), want, atol=1e-5)


def test_resnet10_is_one_basic_block_per_stage():
    net = backbones.build("resnet10")
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1 + 4 * 2 + 3  # stem, blocks, projections of stages 2..4
    assert net.conv1.weight.shape == (32, 3, 7, 7)


# ---- SpineNet ----------------------------------------------------------------------------------------------------------

def test_spinenet_takes_just_the_papers_parents_at_the_papers_levels():
    torch.manual_seed(0)
    net, size = backbones.build("spinenet49S", "frozen").eval(), (97, 131)
    taken, outputs, endpoints = [], [], {}

    def cut_off(_, args, out):  # every node's output becomes a leaf: gradients then tell the direct parents
        taken.append(args[0])
        outputs.append(out.detach().requires_grad_())
        return outputs[-1]

    for group in net.groups:
        group.register_forward_hook(cut_off)
    for level, m in net.endpoints.items():
        m.register_forward_pre_hook(lambda _, args, level=level: endpoints.update({int(level): args[0]}))
    net(images(1, *size))
    assert len(outputs) == 17 and taken[1] is outputs[0]
    for node, (level, *parents) in GRAPH.items():
        grads = torch.autograd.grad(taken[node].sum(), outputs, allow_unused=True, retain_graph=True)
        assert [i for i, g in enumerate(grads) if g is not None and g.any()] == sorted([*parents, *[11] * (node == 14)])
        assert list(outputs[node].shape[2:]) == [-(-n // 2 ** level) for n in size]
    assert all(endpoints[l] is outputs[n] for l, n in {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}.items())
    into_14 = sum(r(outputs[p], outputs[11].shape[2:]) for r, p in zip(net.resample[12], (7, 12)))
    assert torch.allclose(taken[14], F.silu(into_14 + outputs[11]), atol=1e-5)  # node 11 is added as it is


@pytest.mark.parametrize("name, repeats, rate", [("spinenet49S", 1, 0.2), ("spinenet49", 1, 0.2), ("spinenet96", 2, 0.2),
                                                 ("spinenet143", 3, 0.16), ("spinenet190", 4, 0.2)])
def test_spinenet_blocks_kinds_and_drop_rates(name, repeats, rate):
    net = on_meta(backbones.build, name)
    for node, group in enumerate(net.groups):
        assert len(group) == repeats
        for block in group:
            assert block.depth == (2 if node in (3, 6, 8, 9) else 3) and block.act is F.silu  # basic, else bottleneck
            assert block.stochastic_depth.p == pytest.approx(rate * (node - 1) / 15 if node > 1 else 0.0)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet99.*resnet10.*efficientnet_b7, tf_efficientnet_b0.*spinenet190"):
        backbones.build("resnet99")
    with pytest.raises(ValueError, match="'bn', 'gn' or 'frozen'"):
        backbones.build("resnet10", norm="batch")


# ---- initialisation and training ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, eps, momentum", [("resnet18", 1e-5, 0.1), ("efficientnet_b0", 1e-3, 0.01),
                                                 ("tf_efficientnet_b0", 1e-3, 0.01), ("spinenet49S", 1e-3, 0.003)])
def test_initialisation(name, eps, momentum):
    torch.manual_seed(0)
    depthwise = 0
    for m in backbones.build(name).modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.weight[0, 0].numel() * (1 if m.groups > 1 else m.out_channels)
            std = (1 / m.weight[0].numel() if name == "spinenet49S" else 2 / fan_out) ** 0.5
            assert abs(m.weight.std().item() / std - 1) < 5 / (2 * m.weight.numel()) ** 0.5  # five standard errors
            assert name != "spinenet49S" or m.weight.abs().max() < 2.274 * std  # cut off
            assert m.bias is None or not m.bias.any()
            depthwise += m.groups > 1
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()  # also the last of a branch: not zeroed
            assert (m.eps, m.momentum) == (eps, momentum)
    assert depthwise == (16 if "efficientnet" in name else 0)


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
@pytest.mark.parametrize("name", SMALL)
def test_training_step_reaches_every_parameter(name, norm):
    torch.manual_seed(0)
    net = without_drops(backbones.build(name, norm).train())  # a dropped branch rightly has no gradient
    feats = net(images(4).contiguous(memory_format=torch.channels_last))
    sum(f.square().mean() for f in feats.values()).backward()
    for k, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), k
        assert p.grad.any(), k


@pytest.mark.parametrize("name, n, residual", [  # all but the first of each stage are residual
    ("efficientnet_b0", 16, [2, 4, 6, 7, 9, 10, 12, 13, 14]),
    ("tf_efficientnet_b1", 23, [1, 3, 4, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 20, 22])])
def test_stochastic_depth_rates_grow_linearly_over_residual_blocks(name, n, residual):
    blocks = [m for m in on_meta(backbones.build, name).modules() if isinstance(m, backbones.MBConv)]
    assert [b.stochastic_depth.p for b in blocks] == pytest.approx([0.2 * i / n for i in range(n)])
    assert [i for i, b in enumerate(blocks) if b.residual] == residual


@pytest.mark.parametrize("kind", ["MBConv", "Residual"])
def test_stochastic_depth_drops_whole_images_in_training_only_and_keeps_the_mean(kind):
    torch.manual_seed(0)
    make = lambda c: backbones.make_norm("frozen", c)
    mbconv = lambda stride, drop: backbones.MBConv(8, 8, 3, stride, 6, drop, make, False)
    block = mbconv(1, 0.2) if kind == "MBConv" else backbones.Residual("basic", 8, 8, 1, make, lambda x, inplace: x, 0.2)
    x = images()[:1, :1, :4, :4].expand(4000, 8, 4, 4)
    with torch.no_grad():
        branch = block.block(x) if kind == "MBConv" else block.bn2(block.conv2(block.bn1(block.conv1(x))))
        assert torch.equal(block.eval()(x), x + branch)
        got = block.train()(x) - x
    dropped = (got == 0).flatten(1).all(1)
    assert torch.allclose(got[~dropped], branch[~dropped] / 0.8, atol=1e-5)
    assert abs(dropped.float().mean() - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    down = mbconv(2, 0.999).train()
    assert torch.equal(down(x[:8]), down.block(x[:8]))  # not residual: never dropped


def training_step(net, x):
    """Maps, gradients and the bytes held between forward and backward (parameters aside)."""
    held, parameters = {}, {p.data_ptr() for p in net.parameters()}

    def hold(t):
        if t.data_ptr() not in parameters:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    # a recomputed block hides what it saves from these hooks (that is, saves nothing), but it does keep its input
    inputs = [m.register_forward_pre_hook(lambda _, args: (hold(args[0]), None)[1])
              for m in net.modules() if isinstance(m, backbones.BLOCKS)]
    torch.manual_seed(5)  # of the stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        feats = net.train()(x)
    sum(f.square().mean() for f in feats.values()).backward()
    for handle in inputs:
        handle.remove()
    return feats, {k: p.grad for k, p in net.named_parameters()}, sum(held.values())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_b0", "spinenet49S"])
def test_recomputing_changes_nothing_but_the_memory_held(name):
    torch.manual_seed(0)
    plain, x = backbones.build(name), images(2, 128, 128)
    saving = copy.deepcopy(plain)
    backbones.recompute(saving)
    saving = copy.deepcopy(saving)  # as a teacher's average is made
    for _ in range(2):
        (feats, grads, held), (feats2, grads2, held2) = training_step(plain, x), training_step(saving, x)
        assert all(torch.equal(feats2[l], f) for l, f in feats.items())
        assert all(torch.allclose(grads2[k], g, rtol=1e-6, atol=1e-6 * g.abs().max().item()) for k, g in grads.items())
        assert list(saving.state_dict()) == list(plain.state_dict()) and unchanged(saving, plain.state_dict())  # averages too
        assert held2 < 0.6 * held
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(saving.eval()(x).values(), plain.eval()(x).values()))
    assert all(f.requires_grad for f in saving(x).values())  # in eval as well


# ---- norms -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0", "spinenet49S"])
def test_groupnorm_ignores_the_rest_of_the_batch_and_batchnorm_does_not(name):
    torch.manual_seed(0)
    x = images(3, 160, 96)
    for norm in ("gn", "bn"):
        net = without_drops(backbones.build(name, norm).train())
        with torch.no_grad():
            together, alone = net(x), net(x[:1])
        same = [torch.allclose(together[l][:1], alone[l], atol=1e-4) for l in net.channels]
        assert all(same) if norm == "gn" else not any(same)


@pytest.mark.parametrize("channels, groups", [(16, 2), (24, 3), (32, 4), (40, 5), (64, 8), (112, 14), (256, 32), (320, 32),
                                              (2048, 32), (4, 1), (17, 1)])
def test_groupnorm_groups(channels, groups):
    assert backbones.make_norm("gn", channels).num_groups == groups


@pytest.mark.parametrize("name", backbones.NAMES)
def test_groupnorm_nets_hold_no_batchnorm(name):
    net = on_meta(backbones.build, name, "gn")
    assert not any(isinstance(m, (nn.BatchNorm2d, backbones.FrozenBatchNorm2d)) for m in net.modules())
    assert not list(net.buffers())


@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0", "spinenet49S"])
def test_frozen_norms_have_no_parameters_and_never_move(name):
    frozen, free = backbones.build(name, "frozen"), backbones.build(name, "bn")
    assert not any(m._parameters for m in frozen.modules() if isinstance(m, backbones.FrozenBatchNorm2d))
    assert sum(isinstance(m, backbones.FrozenBatchNorm2d) for m in frozen.modules()) \
        == sum(isinstance(m, nn.BatchNorm2d) for m in free.modules())
    assert list(frozen.state_dict()) == [k for k in free.state_dict() if not k.endswith("num_batches_tracked")]
    for net, moves in ((frozen, False), (free, True)):
        before, opt = snapshot(net), torch.optim.SGD(net.parameters(), lr=0.1)
        sum(f.mean() for f in net.train()(images()).values()).backward()
        opt.step()
        stats = [k for k in before if k.endswith(("running_mean", "running_var"))]
        assert stats and any(not torch.equal(net.state_dict()[k], before[k]) for k in stats) == moves
        assert not unchanged(net, before)  # the convs did learn


def test_frozen_norm_equals_torchvisions_and_keeps_bf16():
    theirs, ours = torchvision.ops.FrozenBatchNorm2d(6), backbones.make_norm("frozen", 6)
    for i, k in enumerate(("weight", "bias", "running_mean", "running_var")):
        getattr(theirs, k).copy_(torch.rand(6, generator=torch.Generator().manual_seed(i)) + 0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


# ---- loading -----------------------------------------------------------------------------------------------------------

def refused(net, source, *words):
    """load_backbone must raise ValueError in one line that has all the words, and leave the net alone."""
    before = snapshot(net)
    with pytest.raises(ValueError) as e:
        backbones.load_backbone(net, source)
    text = str(e.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert str(word) in text, text
    assert unchanged(net, before)
    return text


def test_random_loads_nothing():
    net = backbones.build("resnet10")
    before = snapshot(net)
    assert "random" in backbones.load_backbone(net, "random") and unchanged(net, before)


def prefixed(prefix, state, without=()):
    return {prefix + k: v for k, v in state.items() if not k.startswith(without)}


def moco(state):
    """The key encoder's weights differ; both project by an MLP instead of the classifier."""
    files = {"module.queue": torch.ones(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    for encoder, sign in (("q", 1), ("k", -1)):
        files |= prefixed(f"module.encoder_{encoder}.", {k: sign * v for k, v in state.items()}, "fc.")
        files |= {f"module.encoder_{encoder}.fc.{i}.{k}": torch.ones(8) for i in (0, 2) for k in ("weight", "bias")}
    return files


FILES = {
    # kind: backbone, file, a classifier's state dict -> the file's flat one, what is around it, others in it, an extra key
    "torchvision":  ("resnet18", "tv.pth", dict, None, 2, "extra.weight"),
    "no counters":  ("resnet18", "old.pth", lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, None, 2,
                     "extra.weight"),  # as torchvision's oldest files
    "DataParallel": ("resnet18", "dp.pth.tar", lambda s: prefixed("module.", s), {"epoch": 90}, 2, "module.extra.weight"),
    "MoCo":         ("resnet18", "moco.pth.tar", moco, {"epoch": 200, "arch": "resnet18"}, 4 + 120 + 4 + 2,
                     "module.encoder_q.extra.weight"),
    "SimCLR":       ("resnet18", "simclr.pth", dict, {}, 2, "extra.weight"),
    "ours":         ("resnet18", "ours.pt", lambda s: {**prefixed("backbone.", s, "fc."), "head.weight": torch.ones(2)},
                     {"config": {"backbone": "resnet18"}, "step": 7}, 1, "backbone.extra.weight"),
    "bare":         ("resnet18", "bare.pth", lambda s: prefixed("", s, "fc."), None, 0, "extra.weight"),
    "timm":         ("tf_efficientnet_b0", "timm.pth", dict, None, 8, "blocks.1.0.extra.weight"),
    "safetensors":  ("tf_efficientnet_b0", "timm.safetensors", dict, None, 8, "extra.weight"),
}
NOTES = {"SimCLR": "SimCLR; pixels in 0..1 -> normalised ones folded into the first layer", "safetensors": "timm",
         "no counters": "torchvision", "DataParallel": "torchvision"}  # of the others: what they are called above


@functools.cache
def classifier(name):
    """Its whole state dict, randomised."""
    return (timm_net if name.startswith("tf_") else torchvision_net)(name).state_dict()


def write(kind, folder, change=dict):
    """A file as such checkpoints come, its flat dict changed by `change`; returns the source to give."""
    name, file, convert, around, _, _ = FILES[kind]
    state = change(convert(classifier(name)))
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(state, folder / file)
    else:
        torch.save(state if around is None else {**around, "model" if kind == "ours" else "state_dict": state}, folder / file)
    return ("simclr:" if kind == "SimCLR" else "") + str(folder / file)


def tensors(net):
    return {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("norm", ["bn", "frozen"])
@pytest.mark.parametrize("kind", FILES)
def test_every_source_fills_the_net_and_says_so_in_one_line(kind, norm, tmp_path):
    name, file, _, _, others, _ = FILES[kind]
    net, count = backbones.build(name, norm), 100 if name == "resnet18" else 304
    assert backbones.load_backbone(net, write(kind, tmp_path)) == (
        f"{name}: all {count} tensors loaded from '{tmp_path / file}' ({NOTES.get(kind, kind)}), none left random, "
        f"{others} others in it ignored")
    if name == "resnet18":  # timm's are compared by their maps
        differ = {k for k, v in tensors(net).items() if not torch.equal(v, classifier(name)[k])}
        assert differ == ({"conv1.weight", "bn1.running_mean"} if kind == "SimCLR" else set())


@pytest.mark.parametrize("kind", FILES)
def test_half_a_checkpoint_or_one_key_more_is_refused_in_our_names(kind, tmp_path):
    name, _, _, _, _, extra = FILES[kind]
    net = backbones.build(name)
    half = write(kind, tmp_path, lambda state: {k: v for i, (k, v) in enumerate(state.items()) if i % 2 == 0})
    text = refused(net, half, name, "unexpected none", "build what the file was saved from")
    number, names = re.search(r"missing (\d+) \((.*), \.\.\.\)", text).groups()
    assert set(names.split(", ")) < set(tensors(net)) and 0.4 <= int(number) / len(tensors(net)) <= 0.6
    one_more = write(kind, tmp_path, lambda state: {**state, extra: torch.ones(2)})
    extra = re.sub(r"^(module\.|encoder_q\.|backbone\.)+", "", extra)
    refused(net, one_more, f"missing none, unexpected 1 ({extra})")


def test_simclr_weights_see_normalised_images_as_they_saw_pixels(tmp_path):
    theirs, ours = torchvision_net("resnet18"), backbones.build("resnet18").eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "simclr.pth")
    backbones.load_backbone(ours, f"simclr:{tmp_path / 'simclr.pth'}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = images().sigmoid()
    x = (pixels - mean) / std
    with torch.no_grad():
        assert_close(ours.bn1(ours.conv1(x))[..., 2:-2, 2:-2], theirs.bn1(theirs.conv1(pixels))[..., 2:-2, 2:-2])
        theirs.conv1.padding = 0  # a border of the mean colour instead of a black one: now all of it is the same
        framed = F.pad(pixels - mean, [3] * 4) + mean
        for ours_l, theirs_l in zip(ours(x).values(), their_levels(theirs, framed).values()):
            assert_close(ours_l, theirs_l)


def test_files_of_the_other_padding_or_another_backbone_say_what_to_build(tmp_path):
    """timm's two kinds of EfficientNet differ in nothing but their names."""
    state = classifier("tf_efficientnet_b0")
    files = {name: tmp_path / name for name in ("tf_efficientnet_b0_ns.pth", "efficientnet_b0_ra.pth", "model.pth",
                                                "tf_efficientnet_b0_ap-f262efe1.pth", "tv.pth", "dp.pth", "ours.pt", "bare.pth")}
    for name in ("tf_efficientnet_b0_ns.pth", "efficientnet_b0_ra.pth", "model.pth", "tf_efficientnet_b0_ap-f262efe1.pth"):
        torch.save(state, files[name])
    torch.save(classifier("efficientnet_b0"), files["tv.pth"])
    torch.save({"state_dict": prefixed("module.", classifier("efficientnet_b0"))}, files["dp.pth"])
    plain, tf = backbones.build("efficientnet_b0"), backbones.build("tf_efficientnet_b0")
    refused(plain, files["tf_efficientnet_b0_ns.pth"], "timm's tf_ weights", "TensorFlow's padding: build tf_efficientnet_b0")
    refused(tf, files["efficientnet_b0_ra.pth"], "timm's weights for symmetric padding: build efficientnet_b0")
    refused(tf, files["tf_efficientnet_b0_ap-f262efe1.pth"], "AdvProp")
    refused(tf, files["tv.pth"], "torchvision's weights for symmetric padding: build efficientnet_b0")
    refused(tf, files["dp.pth"], "torchvision's weights for symmetric padding: build efficientnet_b0")
    assert "(timm)" in backbones.load_backbone(tf, files["model.pth"])
    assert "timm; BN eps 1e-05 -> 0.001" in backbones.load_backbone(plain, files["efficientnet_b0_ra.pth"])
    assert "torchvision; BN eps 1e-05 -> 0.001" in backbones.load_backbone(plain, files["dp.pth"])
    torch.save(plain.state_dict(), files["bare.pth"])
    assert "padding and BN eps are taken to be this network's" in backbones.load_backbone(plain, files["bare.pth"])
    torch.save({"model": prefixed("backbone.", plain.state_dict()), "config": {"backbone": "efficientnet_b0"}}, files["ours.pt"])
    for other in (tf, backbones.build("resnet10")):
        refused(other, files["ours.pt"], f"was saved from efficientnet_b0, this is {other.name}: build efficientnet_b0")


def test_simclr_is_for_resnets_with_torchvisions_names(tmp_path):
    torch.save(classifier("efficientnet_b0"), tmp_path / "b0.pth")
    refused(backbones.build("efficientnet_b0"), f"simclr:{tmp_path / 'b0.pth'}", "no ResNet converted from SimCLR")
    moco_file = write("MoCo", tmp_path)
    refused(backbones.build("resnet18"), f"simclr:{moco_file}", "MoCo names", "give it without 'simclr:'")


def test_timms_symmetric_weights_compute_what_timm_does(tmp_path):
    theirs = randomise_norms(timm.create_model("efficientnet_b0", features_only=True, out_indices=(1, 2, 3, 4)).eval())
    full = timm.create_model("efficientnet_b0").state_dict()
    torch.save({**full, **theirs.state_dict()}, tmp_path / "efficientnet_b0.pth")
    ours = backbones.build("efficientnet_b0").eval()
    backbones.load_backbone(ours, tmp_path / "efficientnet_b0.pth")
    with torch.no_grad():
        for a, b in zip(ours(images()).values(), theirs(images())):
            assert_close(a, b)


def test_safetensors_without_its_package_says_so(tmp_path, monkeypatch):
    file = write("safetensors", tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(backbones.build("tf_efficientnet_b0"), file, file, "needs the package safetensors: pip install safetensors")


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0", "spinenet49S"])
def test_our_checkpoints_and_bare_state_dicts_round_trip_bit_for_bit(name, norm, tmp_path):
    """Also: EfficientNet's eps folding is for torchvision's files only."""
    torch.manual_seed(3)
    saved = randomise_norms(backbones.build(name, norm))
    torch.save({"model": {**prefixed("backbone.", saved.state_dict()), "head.weight": torch.ones(2)}}, tmp_path / "ours.pt")
    torch.save(saved.state_dict(), tmp_path / "bare.pth")
    for file, ignored in (("ours.pt", "1 others"), ("bare.pth", "0 others")):
        net = backbones.build(name, norm)
        assert ignored in backbones.load_backbone(net, tmp_path / file)
        assert all(torch.equal(v, saved.state_dict()[k]) for k, v in tensors(net).items())



def test_files_that_are_not_there(tmp_path):
    refused(backbones.build("resnet10"), tmp_path / "none.pth", "none.pth", "is not a file")
    refused(backbones.build("resnet10"), tmp_path, tmp_path, "is not a file")


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save(torchvision_net("resnet18").state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    net = backbones.build("resnet18")
    for name, content in (("empty", b""), ("text", b"hello world, no weights here"), ("half", whole[:len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        refused(net, tmp_path / name, tmp_path / name, "is not a checkpoint")
    (tmp_path / "page").write_bytes(b"<html>404</html>")
    refused(net, tmp_path / "page", tmp_path / "page", "is not a checkpoint")
    for name, obj in (("tensor", torch.ones(3)), ("list", [1, 2]), ("numbers", {"a": 1}), ("empty_dict", {}),
                      ("ids", {0: torch.ones(1)}), ("empty_model", {"model": {}})):
        torch.save(obj, tmp_path / name)
        refused(net, tmp_path / name, tmp_path / name, "is not a checkpoint", "name -> tensor")
    torch.save({"model": {"encoder.conv1.weight": torch.ones(1)}}, tmp_path / "other")
    refused(net, tmp_path / "other", "unexpected 1 (encoder.conv1.weight)")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "pickle", "pickle2"])
def test_code_in_a_file_is_refused_and_never_runs(how, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"conv1.weight": Payload(str(mark))}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2 if how == "pickle2" else 4))
    refused(backbones.build("resnet10"), file, file, "unsafe unpickling is refused", "state_dict()")
    assert not mark.exists()
    if how == "torch":
        with zipfile.ZipFile(file) as archive:  # what an unsafe load would unpickle
            name, = [n for n in archive.namelist() if n.endswith("data.pkl")]
            pickle.loads(archive.read(name))["conv1.weight"].close()
    else:
        pickle.loads(file.read_bytes())["conv1.weight"].close()
    assert mark.exists()  # the payload was live: the test could have failed


def test_whole_modules_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    refused(backbones.build("resnet10"), tmp_path / "module.pth", "nn.modules.linear.Linear", "refused", "state_dict()")


def test_wrong_architectures_are_told_apart(tmp_path):
    states = {n: get_model(n).state_dict() for n in ("resnet18", "resnet34", "efficientnet_b0", "wide_resnet50_2")}
    for n, s in states.items():
        torch.save(s, tmp_path / n)
    net = backbones.build("resnet34")
    refused(net, tmp_path / "resnet18", "resnet34", "missing 80 (layer1.2.conv1.weight, ", ", ...)", "unexpected none")
    refused(backbones.build("resnet18"), tmp_path / "resnet34", "missing none", "unexpected 80 (layer1.2.conv1.weight, ")
    text = refused(net, tmp_path / "efficientnet_b0", "missing", "unexpected", "(conv1.weight, ", "(features.0.0.weight, ")
    assert text.count(".weight") + text.count(".bias") == 6  # three of each
    refused(backbones.build("resnet50"), tmp_path / "wide_resnet50_2",
            "layer1.0.conv1.weight is (128, 64, 1, 1) in the file, (64, 64, 1, 1) in the model")


def test_batchnorm_and_groupnorm_files_do_not_mix(tmp_path):
    torch.save(get_model("resnet18").state_dict(), tmp_path / "bn.pth")
    torch.save(backbones.build("resnet18", "gn").state_dict(), tmp_path / "gn.pth")
    refused(backbones.build("resnet18", "gn"), tmp_path / "bn.pth", "BatchNorm", "'gn'", "bn.pth")
    refused(backbones.build("resnet18", "bn"), tmp_path / "gn.pth", "missing 40 (bn1.running_mean")


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), RuntimeError("invalid hash value")])
def test_imagenet_without_network_says_so_in_one_line(error, tmp_path, monkeypatch):
    def fail(url, dst, hash_prefix, progress):
        assert url.startswith("https://") and hash_prefix in url and len(hash_prefix) == 8
        raise error
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    refused(backbones.build("resnet50"), "imagenet", "cannot fetch", "https://", tmp_path, "resnet50-0676ba61.pth")


@pytest.mark.parametrize("name", backbones.NAMES)
def test_imagenet_is_torchvisions_first_set_or_refused(name, tmp_path, monkeypatch):
    urls, net = [], backbones.build("resnet10")
    net.name = name  # all that counts here
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *a, **k: urls.append(url))
    if name in PUBLISHED:
        path, url = backbones.imagenet_file(name), get_model_weights(name).IMAGENET1K_V1.url
        assert urls == [url] and path == str(tmp_path / "hub" / "checkpoints" / os.path.basename(url))
        torch.save(classifier(name) if name in ("resnet18", "efficientnet_b0") else None, path)
        assert backbones.imagenet_file(name) == path and len(urls) == 1  # from the cache, not from the network
        if name in ("resnet18", "efficientnet_b0"):
            assert f"loaded from '{path}' (torchvision" in backbones.load_backbone(backbones.build(name), "imagenet")
    elif name.startswith("tf_") and name[3:] in PUBLISHED:
        refused(net, "imagenet", f"symmetric padding: use {name[3:]} with them", f"timm's {name} weights")
    else:
        refused(net, "imagenet", "torchvision has no", f"weights for {name}: ")


# ---- the file alone ----------------------------------------------------------------------------------------------------

def test_copied_alone_into_an_empty_folder_it_works(tmp_path):
    shutil.copy(backbones.__file__, tmp_path / "backbones.py")
    code = ("import torch, backbones\n"
            "net = backbones.build('resnet10', 'gn')\n"
            "print(backbones.__file__, [tuple(f.shape) for f in net(torch.zeros(1, 3, 32, 32)).values()])")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "(1, 256, 1, 1)" in done.stdout
