"""backbones.py: parity with torchvision, shapes, norms, initialisation, and every way of loading (or refusing) a file."""
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import zipfile

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import backbones

ALL = [*backbones.RESNETS, *backbones.EFFICIENTNETS]
SMALL = ["resnet10", "resnet18", "efficientnet_b0"]
CHANNELS = {  # literal, so that a slip in a table shows
    "resnet10":        {2: 32,  3: 64,  4: 128,  5: 256},
    "resnet18":        {2: 64,  3: 128, 4: 256,  5: 512},
    "resnet34":        {2: 64,  3: 128, 4: 256,  5: 512},
    "resnet50":        {2: 256, 3: 512, 4: 1024, 5: 2048},
    "resnet101":       {2: 256, 3: 512, 4: 1024, 5: 2048},
    "efficientnet_b0": {2: 24,  3: 40,  4: 112,  5: 320},
}


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


def torchvision_levels(net, name):
    if name.startswith("resnet"):
        return IntermediateLayerGetter(net, {f"layer{l - 1}": l for l in range(2, 6)})
    return create_feature_extractor(net, {f"features.{i}": str(l) for l, i in {2: 2, 3: 3, 4: 5, 5: 7}.items()})


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


# ---- architecture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["bn", "frozen"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0"])
def test_same_maps_as_torchvision(name, norm, tmp_path):
    theirs, x = torchvision_net(name), images()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = backbones.build(name, norm).eval()
    with torch.no_grad():
        wanted = torchvision_levels(theirs, name)(x)
        before = ours(x)
        backbones.load_backbone(ours, tmp_path / "tv.pth")
        got = ours(x)
        got_cl = ours.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for l in backbones.LEVELS:
        want = wanted[l] if l in wanted else wanted[str(l)]
        assert_close(got[l], want)
        assert_close(got_cl[l], want)
        assert got_cl[l].is_contiguous(memory_format=torch.channels_last)
        assert not torch.allclose(before[l], want, atol=1e-2)  # it was the loading that made them equal


@pytest.mark.parametrize("name", [n for n in ALL if n != "resnet10"])
def test_parameters_are_torchvisions_without_the_classifier(name):
    theirs, ours = get_model(name), backbones.build(name)
    head = ("fc.", "classifier.", "features.8.")
    assert ({k: v.shape for k, v in ours.state_dict().items()}
            == {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith(head)})
    assert (sum(p.numel() for p in ours.parameters())
            == sum(p.numel() for k, p in theirs.named_parameters() if not k.startswith(head)))


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
@pytest.mark.parametrize("name", ALL)
def test_strides_and_channels(name, size):
    net = backbones.build(name).eval()
    with torch.no_grad():
        feats = net(torch.zeros(1, 3, *size))
    assert list(feats) == [2, 3, 4, 5] and net.channels == CHANNELS[name]
    for l, f in feats.items():
        assert f.shape == (1, CHANNELS[name][l], size[0] >> l, size[1] >> l)


def test_odd_sizes_round_up():
    feats = backbones.build("resnet10").eval()(torch.zeros(1, 3, 65, 97))
    assert [tuple(f.shape[2:]) for f in feats.values()] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_resnet10_is_one_basic_block_per_stage():
    net = backbones.build("resnet10")
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1 + 4 * 2 + 3  # stem, blocks, projections of stages 2..4
    assert net.conv1.weight.shape == (32, 3, 7, 7)


def test_efficientnet_width_rounding_gives_the_papers_tables():
    stages = [row[4] for row in backbones.EFFICIENTNET_STAGES]
    b7 = [backbones.round_width(c, 2.0) for c in stages]
    l2 = [backbones.round_width(c, 4.3) for c in stages]
    assert b7 == [32, 48, 80, 160, 224, 384, 640] and l2 == [72, 104, 176, 344, 480, 824, 1376]


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet99.*resnet10.*resnet50.*efficientnet_b0"):
        backbones.build("resnet99")
    with pytest.raises(ValueError, match="'bn', 'gn' or 'frozen'"):
        backbones.build("resnet10", norm="batch")


# ---- initialisation and training ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_initialisation(name):
    torch.manual_seed(0)
    net = backbones.build(name)
    kinds = {1: 0, 2: 0}
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            depthwise = m.groups > 1
            fan_out = m.weight[0, 0].numel() * (1 if depthwise else m.out_channels)
            n = m.weight.numel()
            assert abs(m.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 5 / (2 * n) ** 0.5  # five standard errors
            assert m.bias is None or not m.bias.any()
            kinds[1 + depthwise] += 1
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()  # also the last of a branch: not zeroed
            assert (m.eps, m.momentum) == ((1e-3, 0.01) if name == "efficientnet_b0" else (1e-5, 0.1))
    assert kinds[1] > 0 and (kinds[2] == 16) == (name == "efficientnet_b0")


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
@pytest.mark.parametrize("name", SMALL)
def test_training_step_reaches_every_parameter(name, norm):
    torch.manual_seed(0)
    net = backbones.build(name, norm).train()
    for m in net.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0  # a dropped branch rightly has no gradient
    feats = net(images(4).contiguous(memory_format=torch.channels_last))
    sum(f.square().mean() for f in feats.values()).backward()
    for k, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), k
        assert p.grad.any(), k


def test_stochastic_depth_rates_grow_linearly_over_residual_blocks():
    net = backbones.build("efficientnet_b0")
    blocks = [m for m in net.modules() if isinstance(m, backbones.MBConv)]
    assert [b.stochastic_depth.p for b in blocks] == pytest.approx([0.2 * i / 16 for i in range(16)])
    residual = [i for i, b in enumerate(blocks) if b.residual]
    assert residual == [2, 4, 6, 7, 9, 10, 12, 13, 14]  # all but the first of each stage


def test_stochastic_depth_drops_whole_images_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    block = backbones.MBConv(8, 8, 3, 1, 6, 0.2, lambda c: backbones.make_norm("frozen", c))
    x = images()[:1, :1, :4, :4].expand(4000, 8, 4, 4)
    with torch.no_grad():
        branch = block.block(x)
        assert torch.equal(block.eval()(x), x + branch)
        got = block.train()(x) - x
    dropped = (got == 0).flatten(1).all(1)
    assert torch.allclose(got[~dropped], branch[~dropped] / 0.8, atol=1e-5)
    assert abs(dropped.float().mean() - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    down = backbones.MBConv(8, 8, 3, 2, 6, 0.999, lambda c: backbones.make_norm("frozen", c)).train()
    assert torch.equal(down(x[:8]), down.block(x[:8]))  # not residual: never dropped


# ---- norms -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0"])
def test_groupnorm_ignores_the_rest_of_the_batch_and_batchnorm_does_not(name):
    torch.manual_seed(0)
    x = images(3)
    for norm in ("gn", "bn"):
        net = backbones.build(name, norm).train()
        for m in net.modules():
            if isinstance(m, torchvision.ops.StochasticDepth):
                m.p = 0.0
        with torch.no_grad():
            together, alone = net(x), net(x[:1])
        same = [torch.allclose(together[l][:1], alone[l], atol=1e-4) for l in backbones.LEVELS]
        assert all(same) if norm == "gn" else not any(same)


@pytest.mark.parametrize("channels, groups", [(16, 2), (24, 3), (32, 4), (40, 5), (64, 8), (112, 14), (256, 32), (320, 32),
                                              (2048, 32), (4, 1), (17, 1)])
def test_groupnorm_groups(channels, groups):
    assert backbones.make_norm("gn", channels).num_groups == groups


@pytest.mark.parametrize("name", ALL)
def test_groupnorm_nets_hold_no_batchnorm(name):
    net = backbones.build(name, "gn")
    assert not any(isinstance(m, (nn.BatchNorm2d, backbones.FrozenBatchNorm2d)) for m in net.modules())
    assert not list(net.buffers())


@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0"])
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


def test_summary_names_file_and_counts(tmp_path):
    torch.save(get_model("resnet18").state_dict(), tmp_path / "tv.pth")
    line = backbones.load_backbone(backbones.build("resnet18"), str(tmp_path / "tv.pth"))
    assert "\n" not in line and "resnet18" in line and "tv.pth" in line and "100 tensors" in line and "2 others" in line


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen"])
@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0"])
def test_our_checkpoints_and_bare_state_dicts_round_trip_bit_for_bit(name, norm, tmp_path):
    """Also: EfficientNet's eps folding is for torchvision's files only."""
    torch.manual_seed(3)
    saved = randomise_norms(backbones.build(name, norm))
    model = {**{f"backbone.{k}": v for k, v in saved.state_dict().items()}, "head.weight": torch.ones(2)}
    torch.save({"model": model, "step": 7}, tmp_path / "ours.pt")
    torch.save(saved.state_dict(), tmp_path / "bare.pth")
    for file, ignored in (("ours.pt", "1 others"), ("bare.pth", "0 others")):
        net = backbones.build(name, norm)
        assert ignored in backbones.load_backbone(net, tmp_path / file)
        assert all(torch.equal(v, saved.state_dict()[k]) for k, v in net.state_dict().items() if "num_batches" not in k)


def test_batch_counters_are_optional(tmp_path):
    state = get_model("resnet18").state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.pth")  # as torchvision's oldest
    net = backbones.build("resnet18")
    backbones.load_backbone(net, tmp_path / "old.pth")
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


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
    refused(net, tmp_path / "page", tmp_path / "page")
    for name, obj in (("tensor", torch.ones(3)), ("list", [1, 2]), ("numbers", {"a": 1}), ("empty_dict", {}),
                      ("ids", {0: torch.ones(1)}), ("empty_model", {"model": {}})):
        torch.save(obj, tmp_path / name)
        refused(net, tmp_path / name, tmp_path / name, "is not a checkpoint", "name -> tensor")
    torch.save({"model": {"encoder.conv1.weight": torch.ones(1)}}, tmp_path / "other")
    refused(net, tmp_path / "other", "without 'backbone.' keys")


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
    refused(backbones.build("resnet50"), tmp_path / "wide_resnet50_2", "layer1.0.conv1.weight", "(128, 64, 1, 1)", "(64, 64, 1, 1)")
    one_less = {k: v for k, v in states["resnet18"].items() if k != "layer3.1.bn2.bias"}
    torch.save(one_less, tmp_path / "one_less")
    refused(backbones.build("resnet18"), tmp_path / "one_less", "missing 1 (layer3.1.bn2.bias)")
    torch.save({**states["resnet18"], "extra.weight": torch.ones(1)}, tmp_path / "one_more")
    refused(backbones.build("resnet18"), tmp_path / "one_more", "unexpected 1 (extra.weight)")


def test_batchnorm_and_groupnorm_files_do_not_mix(tmp_path):
    torch.save(get_model("resnet18").state_dict(), tmp_path / "bn.pth")
    torch.save(backbones.build("resnet18", "gn").state_dict(), tmp_path / "gn.pth")
    refused(backbones.build("resnet18", "gn"), tmp_path / "bn.pth", "BatchNorm", "'gn'", "bn.pth")
    refused(backbones.build("resnet18", "bn"), tmp_path / "gn.pth", "missing 40 (bn1.running_mean")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_imagenet_comes_from_the_local_cache(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("went to the network"))
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    file = tmp_path / "hub" / "checkpoints" / os.path.basename(url)
    file.parent.mkdir(parents=True)
    state = torchvision_net(name).state_dict()
    torch.save(state, file)
    net = backbones.build(name)
    assert os.path.basename(url) in backbones.load_backbone(net, "imagenet")
    first = next(k for k in state if k.endswith("running_var"))
    assert torch.equal(net.state_dict()[first], state[first])


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), RuntimeError("invalid hash value")])
def test_imagenet_without_network_says_so_in_one_line(error, tmp_path, monkeypatch):
    def fail(url, dst, hash_prefix, progress):
        assert url.startswith("https://") and hash_prefix in url and len(hash_prefix) == 8
        raise error
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    refused(backbones.build("resnet50"), "imagenet", "cannot fetch", "https://", tmp_path, "resnet50-0676ba61.pth")
    refused(backbones.build("resnet10"), "imagenet", "no published", "resnet10")


@pytest.mark.parametrize("name", [n for n in ALL if n != "resnet10"])
def test_published_weights_exist_in_torchvision(name):
    weights = backbones.RESNETS[name][3] if name in backbones.RESNETS else backbones.EFFICIENTNETS[name][2]
    assert weights in torchvision.models.get_model_weights(name).__members__


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
