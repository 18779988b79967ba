"""hpt.py: a step against its formula, on one process and two; what each mode may change; stages
that are chained, killed, resumed or refused."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, records, start
from PIL import Image

import backbones
import hpt
import models
import recipes
import st
import transfer
import util
from util import Proc, UserError

TINY = "--image-size 32 --batch 8 --groups 2 --queue 16 --device cpu --precision fp32 --workers 0"
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
N, K, M, T = 16, 64, 0.9, 0.2


def main(*args):
    hpt.main([*TINY.split(), *map(str, args)])


# ---- recipes -------------------------------------------------------------------------------------

# fmt: off
PUBLISHED = dict(
    method="moco", backbone="resnet50", image_size=224, batch=256, groups=4, queue=65536, m=0.999,
    steps=5000, lr=0.03, weight_decay=1e-4, crop=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2,
    blur=(0.1, 2), flip=0.5, pixels="source", probe_steps=5000, tune_steps=2500, tune_epochs=90,
    tune_batch=256)
OFFICIAL = dict(
    PUBLISHED, groups=8, jitter=(0.4, 0.4, 0.4, 0.1), steps=200 * 5004, pixels="imagenet")
# fmt: on


@pytest.mark.parametrize("name, settings", [("hpt", PUBLISHED), ("moco-v2", OFFICIAL)])
def test_a_recipe_has_the_published_settings(name, settings):
    c = hpt.method(Proc(), name)
    assert {k: getattr(c, k) for k in settings} == settings
    assert hpt.TEMPERATURE["moco"] == 0.2 and hpt.DIM == 128


# fmt: off
@pytest.mark.parametrize("name, without", [
    ("baseline", []), ("no-grey", ["grey"]), ("no-colour", ["jitter"]),
    ("crop-blur", ["jitter", "grey", "flip"]), ("crop", ["jitter", "grey", "flip", "blur"])])
# fmt: on
def test_each_set_of_views_leaves_out_what_it_names(name, without):
    how = hpt.Views(None, hpt.method(Proc(), "hpt", views=name), 0, 1).how
    whole = hpt.Views(None, hpt.method(Proc(), "hpt"), 0, 1).how
    assert how == {**whole, **dict.fromkeys(without, 0)}


def test_batch_norm_groups_are_those_of_the_processes_or_more():
    assert hpt.method(Proc(world=8), "hpt").groups == 8
    assert hpt.method(Proc(world=2), "hpt").groups == 4
    with pytest.raises(UserError, match="into 4 batch-norm groups .* on 8 processes"):
        hpt.method(Proc(world=8), "hpt", groups=4)
    with pytest.raises(UserError, match="--eval mme runs on one process"):
        hpt.check(hpt.Plan(eval="mme", source="DIR"), Proc(world=2))


# ---- one step ------------------------------------------------------------------------------------


def encoder(name="resnet10"):
    torch.manual_seed(0)
    return hpt.Encoder(name, PIXELS, torch.float32).train()


def moco(groups=1):
    """An encoder whose key encoder lags behind, as after some steps."""
    net = hpt.MoCo(encoder(), K, M, T, groups, 5, Proc())
    with torch.no_grad():
        for p in net.query.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net


def views(seed=1):
    coarse = torch.rand(2 * N, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, 64, mode="bilinear") * 255).to(torch.uint8).unflatten(0, (2, N))


def embedded(encoder, images):
    """By hand, for images that batch norm sees together."""
    pooled = encoder.backbone(backbones.normalise(images, PIXELS))[5].mean((2, 3))
    z = encoder.head[2](encoder.head[0](pooled).clamp(min=0))
    return z / z.norm(dim=1, keepdim=True)


def moco_by_hand(net, views, groups, order):
    """InfoNCE of query, positive key and the queue -> loss, keys."""
    q = torch.cat([embedded(net.query, part) for part in views[0].chunk(groups)])
    k = torch.zeros_like(q)
    with torch.no_grad():
        for a, b in zip(net.query.parameters(), net.key.parameters()):
            b.copy_(M * b + (1 - M) * a)
        for rows in order.chunk(groups):
            k[rows] = embedded(net.key, views[1][rows])
    rows = [torch.cat([(q[i] @ k[i])[None], q[i] @ net.queue]) / T for i in range(N)]
    return torch.stack([row.logsumexp(0) - row[0] for row in rows]).mean(), k


def nt_xent_by_hand(z):
    """z: (2N, D), rows i and i + N of one image -> loss, mean similarity of pairs, of others."""
    similar = z @ z.T
    losses = []
    pairs = []
    others = []
    for i, row in enumerate(similar):
        other = (i + N) % (2 * N)
        known = [j for j in range(2 * N) if j != i]
        losses.append((row[known] / T).logsumexp(0) - row[other] / T)
        pairs.append(row[other])
        others += [row[j] for j in known if j != other]
    return (torch.stack(values).mean() for values in (losses, pairs, others))


def check_gradients(net, reference, factor=1):
    """Up to rounding, which now and then lets a ReLU fall on the other side of 0."""
    for (name, p), q in zip(net.named_parameters(), reference.parameters()):
        assert q.grad.norm() > 0, name
        assert (p.grad * factor - q.grad).norm() < 1e-2 * q.grad.norm(), name


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_of_moco_is_its_formula(groups):
    net = moco(groups)
    reference = copy.deepcopy(net)
    loss, values = net(views(), 3)
    # keys are computed in a random order, within random groups, and are back in their own order
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5 * 1_000_003 + 3))
    expected, keys = moco_by_hand(reference, views(), groups, order)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and values[0] == loss
    check_gradients(net.query, reference.query)
    assert all(p.grad is None for p in net.key.parameters())
    assert torch.allclose(net.queue[:, 48:], keys.T, atol=1e-5)  # the fourth sixteen of 64
    assert torch.equal(net.queue[:, :48], reference.queue[:, :48])


def test_keys_follow_by_m_alone_and_the_queue_wraps_around():
    net = moco()
    for step in range(K // N + 1):
        before = copy.deepcopy(net)
        with torch.no_grad():
            net(views(step), step)
        changed = (net.queue != before.queue).any(0).nonzero().flatten().tolist()
        assert changed == list(range(step * N % K, step * N % K + N))
        parameters = (part.parameters() for part in (net.key, before.key, before.query))
        for key, old, query in zip(*parameters):
            assert torch.equal(key, old.lerp(query, 1 - M)) and not torch.equal(key, query)
    assert torch.allclose(net.queue.norm(dim=0), torch.ones(K))
    pairs = zip(hpt.norms(net.query), hpt.norms(net.key))  # statistics do not follow
    assert not any(torch.equal(a.running_mean, b.running_mean) for a, b in pairs)


def test_a_step_of_simclr_is_nt_xent():
    net = hpt.SimCLR(encoder(), T, Proc())
    reference = copy.deepcopy(net)
    loss, values = net(views(), 0)
    expected = list(nt_xent_by_hand(embedded(reference.query, views().flatten(0, 1))))
    assert values.tolist() == pytest.approx([v.item() for v in expected], rel=1e-4, abs=1e-5)
    loss.backward()
    expected[0].backward()
    check_gradients(net.query, reference.query)


def test_processes_share_a_step_of_simclr(monkeypatch):
    """Two after each other in one; batch norm sees the images of one. Their gradients' mean is
    the loss's."""
    query = encoder()
    reference = copy.deepcopy(query)
    shares = views().chunk(2, 1)
    z = [embedded(reference, share.flatten(0, 1)) for share in shares]  # of both views
    z = [torch.cat(view) for view in zip(*(part.chunk(2) for part in z))]  # of both processes
    expected, *_ = nt_xent_by_hand(torch.cat(z))
    expected.backward()
    for rank, share in enumerate(shares):
        every = iter([view.detach() for view in z])
        monkeypatch.setattr(Proc, "cat", lambda self, x, every=every: next(every))
        loss, values = hpt.SimCLR(query, T, Proc(rank, 2))(share, 0)
        loss.backward()
        assert values[0].item() == pytest.approx(expected.item(), rel=1e-5)
    check_gradients(query, reference, 1 / 2)


def test_running_statistics_move_once_to_the_groups_mean():
    torch.manual_seed(0)
    x = torch.randn(12, 4, 5, 5) * torch.rand(12, 1, 1, 1) + torch.randn(12, 1, 1, 1)
    net = torch.nn.BatchNorm2d(4, momentum=0.3)
    old_mean = net.running_mean.normal_().clone()
    old_var = net.running_var.uniform_().clone()
    output = hpt.in_groups(net, x, 3)
    parts = x.chunk(3)
    alone = [F.batch_norm(part, None, None, training=True) for part in parts]
    assert torch.allclose(output, torch.cat(alone), atol=1e-6) and net.momentum == 0.3
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    var = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    assert torch.allclose(net.running_mean, 0.7 * old_mean + 0.3 * mean, atol=1e-6)
    assert torch.allclose(net.running_var, 0.7 * old_var + 0.3 * var, atol=1e-6)


def test_statistics_are_the_average_over_all_groups():
    query = encoder()
    net = hpt.Statistics(query, 4)
    stem = []
    for step in range(3):
        loss, _ = net(views(step)[:1], step)
        assert loss is None
        for part in views(step)[0].chunk(4):
            maps = query.backbone.conv1(backbones.normalise(part, PIXELS))
            stem.append((maps.mean((0, 2, 3)), maps.transpose(0, 1).flatten(1).var(1)))
    mean, var = (torch.stack(values).mean(0) for values in zip(*stem))
    assert torch.allclose(query.backbone.bn1.running_mean, mean, atol=1e-5)
    assert torch.allclose(query.backbone.bn1.running_var, var, rtol=1e-4)


@pytest.mark.parametrize("mode", ["all", "bn", "stats"])
def test_a_mode_trains_what_it_says_and_only_that_drops_layers(mode):
    net = encoder("efficientnet_b0")
    hpt.freeze(net.backbone, mode)
    hpt.set_training(net, mode)
    of_norms = {p for norm in hpt.norms(net) for p in norm.parameters()}
    for p in net.backbone.parameters():
        assert p.requires_grad == (mode == "all" or (mode == "bn" and p in of_norms))
    depths = [m for m in net.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert {m.training for m in depths} == {mode == "all"}
    assert all(norm.training for norm in hpt.norms(net))


# ---- images --------------------------------------------------------------------------------------


def test_views_are_a_function_of_seed_step_and_slot(class_root):
    images = hpt.images_of(class_root)
    c = hpt.method(Proc(), image_size=32, batch=6, queue=12)

    def drawn(steps, proc=None, seed=0, count=2):
        return list(hpt.view_batches(images, steps, c, seed, count, proc or Proc()))

    whole = drawn(range(6))
    assert whole[0].shape == (2, 6, 3, 32, 32) and whole[0].dtype == torch.uint8
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in whole[0])
    assert all(map(torch.equal, whole[4:], drawn(range(4, 6), Proc(workers=2))))
    shares = [drawn([5], Proc(rank, 3))[0] for rank in range(3)]
    assert torch.equal(torch.cat(shares, 1), whole[5])
    assert torch.equal(drawn([0], count=1)[0], whole[0][:1])
    assert not torch.equal(drawn([0], seed=1)[0], whole[0])
    pixels = torch.cat(whole, 1).flatten(0, 1).flatten(1)  # 24 images, the half of them twice
    assert len(pixels.unique(dim=0)) == 2 * 36


# fmt: off
@pytest.mark.parametrize("there, taken", [
    ("train val test", "train val"), ("train val", "train"), ("train test", "train"),
    ("val test", "test val"), ("train val test pretrain.txt", "train val"),
    ("train.csv val.csv test.csv", "train val"), ("train.csv val.csv", "train"),
    ("train.csv val.csv test.csv pretrain.txt", "pretrain")])
# fmt: on
def test_a_source_gives_no_image_that_an_evaluation_reports_on(tmp_path, there, taken):
    for name in there.split():
        part, _, ending = name.partition(".")
        file = tmp_path / (f"images/{part}.png" if ending else f"{part}/c/{part}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if ending:
            line = {"csv": f"path,label\nimages/{part}.png,c", "txt": f"images/{part}.png"}
            (tmp_path / name).write_text(line[ending])
    images = hpt.images_of(tmp_path)
    paths = [images.path(i) for i in range(len(images))]
    assert " ".join(sorted(os.path.basename(path)[:-4] for path in paths)) == taken
    assert all(map(os.path.exists, paths))


def test_a_stage_is_a_source_steps_and_a_mode(tmp_path):
    (tmp_path / "a:b.txt").touch()
    for text, parts in {
        "a/b": ("a/b", None, "all"),
        "a/b:7": ("a/b", 7, "all"),
        "a/b:stats": ("a/b", None, "stats"),
        "a/b:7:bn": ("a/b", 7, "bn"),
        f"{tmp_path}/a:b.txt:7": (f"{tmp_path}/a:b.txt", 7, "all"),
    }.items():
        assert hpt.parse(text) == parts


# ---- stages --------------------------------------------------------------------------------------

FOLDERS = ["1_all_classes", "2_bn_classes", "3_stats_classes"]


def chain(root, out):
    stages = [f"--stage={root}:5", f"--stage={root}:10:bn", f"--stage={root}:stats"]
    return [*stages, "--eval=knn", f"--data={root}", f"--out={out}"]


@pytest.fixture(scope="module")
def whole(class_root, tmp_path_factory):
    """A chain that nothing interrupted: everything, batch norm, statistics."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    main(*chain(class_root, out))
    return out


def backbone(folder):
    return torch.load(folder / "backbone.pt", weights_only=True)


def test_each_mode_changes_what_it_should_and_no_other_bit(whole):
    trained, tuned, refreshed = (backbone(whole / folder)["model"] for folder in FOLDERS)
    for name, value in trained.items():
        if not name.endswith("num_batches_tracked"):
            of_norm = "bn" in name or "downsample.1" in name
            assert torch.equal(value, tuned[name]) != of_norm, name
            assert torch.equal(tuned[name], refreshed[name]) != ("running" in name), name
    state = util.newest(whole / FOLDERS[1])[1]["model"]  # nor do frozen ones drift in the key
    for name, value in trained.items():
        if value.ndim == 4:
            assert torch.equal(state[f"key.backbone.{name}"], value), name
    assert not torch.equal(state["key.head.0.weight"], state["query.head.0.weight"])


def test_only_the_backbone_passes_from_stage_to_stage(whole):
    torch.manual_seed(int(util.digest([0, FOLDERS[1]]), 16) % 2**31)
    fresh = hpt.Encoder("resnet10", PIXELS, torch.float32).head[0].weight
    states = [util.newest(whole / folder)[1]["model"] for folder in FOLDERS[:2]]
    drifts = [(s["key.head.0.weight"] - fresh).norm() / fresh.norm() for s in states]
    assert drifts[1] < 0.1 < drifts[0]  # ten steps from the second stage's own draw
    assert records(whole, FOLDERS[1])[1]["queue"] == 0.5


def test_the_log_shows_the_loss_beside_chance_and_pictures_the_views(whole):
    lines = records(whole, FOLDERS[0])
    assert lines[5]["chance"] == pytest.approx(np.log(17)) and lines[5]["queue"] == 1
    assert -1 <= lines[5]["negative"] <= 1
    peak = hpt.RECIPES["tiny"]["lr"] * 8 / 256
    lrs = [0.5 * peak * (1 + np.cos(np.pi * step / 5)) for step in range(5)]
    assert [lines[step]["lr"] for step in range(1, 6)] == pytest.approx(lrs)
    rows = [Image.open(whole / folder / "first_batch.png").size for folder in FOLDERS]
    assert rows == [(8 * 32, 2 * 32), (8 * 32, 2 * 32), (8 * 32, 32)]  # statistics: one view


def test_the_backbone_is_what_others_load(whole, class_root):
    file = backbone(whole / FOLDERS[2])
    net = backbones.build("resnet10")
    assert file["model"].keys() == net.state_dict().keys()
    assert "all 60 tensors" in backbones.load_backbone(net, whole / FOLDERS[2] / "backbone.pt")
    mean, std = transfer.measure(hpt.images_of(class_root))
    about = {"backbone": "resnet10", "mean": mean, "std": std, "steps": 3, "mode": "stats"}
    about |= {"source": str(class_root), "init": str(whole / FOLDERS[1] / "backbone.pt")}
    assert file["about"] == about
    c = recipes.method("cls-tiny", init=str(whole / FOLDERS[2]))
    classifier = st.build(c, 3)
    models.initialise(classifier.backbone, c.init, Proc())
    for name, value in classifier.backbone.state_dict().items():
        counter = name.endswith("num_batches_tracked")
        assert counter or torch.equal(value, file["model"][name]), name


def test_a_run_starts_from_another_ones_stage_by_path(whole, class_root, tmp_path, capsys):
    args = ["--stage", f"{class_root}:2:bn", "--out", tmp_path / "run", "--init"]
    main(*args, whole / FOLDERS[0])
    result = util.read_stage(tmp_path / "run" / FOLDERS[1].replace("2", "1"))["result"]
    moved = shutil.copy(whole / FOLDERS[0] / "backbone.pt", tmp_path / "moved.pt")
    main(*args, moved)  # the same weights: nothing is done again
    assert "finished before" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["1_bn_classes"] == result and results["init"] == str(moved)
    with pytest.raises(UserError, match=r"begun with other settings \(init: \w+ -> \w+\)"):
        main(*args, whole / FOLDERS[2])
    with pytest.raises(UserError, match=r"\(lr: 0.6 -> 0.1\)"):
        main(*args, moved, "--lr", "0.1")
    with pytest.raises(UserError, match=r"\(images: \w+ -> \w+\)"):
        main(*args, moved, "--fraction", "0.4")
    main(*args, moved, "--labels", "5", "--augmented")  # matter to evaluations alone


def test_killed_and_run_again_it_ends_with_the_same_bits(whole, class_root, tmp_path):
    command = [sys.executable, ROOT / "hpt.py", *TINY.split(), *chain(class_root, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(f"{FOLDERS[1]} 2/"):
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert "result" not in util.read_stage(tmp_path / FOLDERS[1])
    main(*chain(class_root, tmp_path))
    for folder in FOLDERS:
        a, b = (backbone(run / folder)["model"] for run in (whole, tmp_path))
        assert all(torch.equal(a[name], b[name]) for name in a), folder
    runs = [json.loads((run / "results.json").read_text())["knn"] for run in (whole, tmp_path)]
    assert {**runs[0], "seconds": 0} == {**runs[1], "seconds": 0}


def test_gradient_checkpointing_changes_no_bit(whole, class_root, tmp_path):
    main(f"--stage={class_root}:5", "--gradient-checkpointing", "--out", tmp_path)
    states = [util.newest(run / FOLDERS[0])[1]["model"] for run in (whole, tmp_path)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_two_processes_train_as_one_of_two_groups(class_root, tmp_path):
    stages = [f"--stage={class_root}:2", f"--stage={class_root}:2:bn"]
    stages.append(f"--stage={class_root}:2:stats")
    main(*stages, "--out", tmp_path / "1")
    args = [*TINY.split(), *stages, "--out", tmp_path / "2"]
    done = start(*args, script="hpt.py", processes=2)
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    for folder in FOLDERS:
        for step in (1, 2):
            path = f"{folder}/step_{step:08d}.pt"
            one, two = (torch.load(tmp_path / n / path, weights_only=True)["model"] for n in "12")
            for name, value in one.items():
                if name == "queue" and (folder, step) == (FOLDERS[0], 1):
                    assert torch.equal(value, two[name])
                elif not name.endswith("num_batches_tracked"):  # it counts the groups
                    assert torch.allclose(value, two[name], rtol=1e-5, atol=1e-6), (path, name)


def test_bf16_trains_float32_weights_and_a_large_queue_is_warned_of(class_root, tmp_path, capsys):
    args = ("--stage", f"{class_root}:3", "--precision", "bf16", "--queue", "32")
    main(*args, "--out", tmp_path)
    sentence = "the queue holds 32 keys of 24 images"
    assert sentence in capsys.readouterr().out
    assert [line["queue"] for line in records(tmp_path, FOLDERS[0]).values()] == [0.25, 0.5, 0.75]
    state = backbone(tmp_path / FOLDERS[0])["model"]
    assert all(value.isfinite().all() for value in state.values())
    assert {v.dtype for k, v in state.items() if "num_batches" not in k} == {torch.float32}


def test_without_arguments_the_four_ways_are_compared(class_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = {"image_size": 32, "batch": 8, "queue": 16, "probe_steps": 5}
    monkeypatch.setitem(hpt.RECIPES, "tiny", {**hpt.RECIPES["tiny"], **tiny})
    monkeypatch.setattr(hpt, "BASE", f"{class_root}:2")
    for row, how in {"Base": "stats", "Target": "3", "HPT": "2", "HPT-BN": "2:bn"}.items():
        monkeypatch.setitem(hpt.DEMO, row, f"{class_root}:{how}")
    hpt.main([])
    results = json.loads((tmp_path / "runs/hpt/results.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    for row, how in hpt.DEMO.items():
        (path,) = (tmp_path / "runs/hpt" / row).glob("1_*")
        from_base = backbone(path)["about"]["init"] == "runs/hpt/source/1_all_classes/backbone.pt"
        assert from_base == (row != "Target")
        (line,) = (line for line in lines if line.startswith(f"{row} "))
        assert how in line and line.endswith(f" {results[row]['accuracy']:.3f}")


# fmt: off
@pytest.mark.parametrize("argv, words", [
    ("--stage nowhere:5", "no image at --stage nowhere"),
    ("--stage :5:bn", "--stage :5:bn is not SRC"), ("--stage {root}:0", ":0 is not SRC"),
    ("--stage {root}:5:bm", ":5:bm is not SRC"), ("--stage {root}:-3", ":-3 is not SRC"),
    ("--stage {root}:5 --queue 17", "--queue 17 is no multiple .* give e.g. --queue 16"),
    ("--stage {root}:5 --groups 3", "--batch 8 cannot be cut into 3 batch-norm groups"),
    ("--stage {root}:5 --groups 8", "groups of two or more images"),
    ("--stage {root}:5 --batch 32 --queue 32", "has 24 images, fewer than a batch of 32"),
    ("--stage {root}:5 --fraction 0", "--fraction 0 must be above 0"),
    ("--stage {root}:5 --lr -1", "--lr must be above 0"),
    ("--stage {root}:5 --init nothing.pth", "--init nothing.pth: "),
    ("--stage {root}:5 --backbone vgg", "--backbone vgg: give a ResNet"),
    ("--stage {root}:5 --backbone spinenet49", "--backbone spinenet49: give a ResNet"),
    ("--data {root}", "--data and --init need a --stage"),
    ("--init imagenet", "--data and --init need a --stage"),
    ("--stage {root}:5 --eval svm", "--eval svm is unknown; .* finetune, knn, linear, mme"),
    ("--eval knn", "--eval needs --data"),
    ("--stage {root}:5 --eval knn --data nowhere", "no folder nowhere"),
    ("--stage {root}:5 --eval mme --data {root}", "--eval mme and --source go together"),
    ("--eval knn --source {root} --data {root}", "--eval mme and --source go together"),
    ("--stage {root}:9999 --eval finetune --labels 2", "--labels 2 is less than one for each of 3"),
    ("--stage {root}/val:1 --eval knn --data {root}", "has 9 images that --data reports on"),
    ("--stage {root}:3 --lr 1e30", "loss is not finite at step [12]; lower --lr")])
# fmt: on
def test_what_cannot_work_is_refused_in_one_line(class_root, tmp_path, argv, words):
    with pytest.raises(UserError, match=words) as error:
        main(*argv.format(root=class_root).split(), "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run").exists() == ("1e30" in argv)  # before anything is written
