"""Pre-training: one step against the formulas, on one process and two; what each mode may change; exact resumption; views."""
import copy
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import augment
import backbones
import hpt
import probe
import runs
from conftest import ROOT, killed, records, start
from util import UserError

TINY = ["--image-size", "32", "--batch", "8", "--groups", "2", "--queue", "16", "--precision", "fp32", "--workers", "0"]
CPU = (0, 1, torch.device("cpu"), torch.float32)
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
N, K, M, T = 16, 64, 0.9, 0.2


def folders(root, counts):
    """Noisy images of 40 x 36 px, SPLIT/COLOUR/*.png; counts: images of a class in each split."""
    rng = np.random.default_rng(0)
    for split, n in counts.items():
        for name, colour in {"blue": (30, 60, 220), "green": (60, 220, 30), "red": (220, 30, 60)}.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = (rng.normal(0, 30, (36, 40, 3)) + colour).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("images") / "colours", {"train": 6, "val": 3, "test": 4})


def main(*args):
    hpt.main([*TINY, *map(str, args)])


# ---- settings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, groups, hue, steps, pixels", [("hpt", 4, 0.4, 5000, "source"), ("moco-v2", 8, 0.1, 200 * 5004, "imagenet")])
def test_a_recipe_has_the_published_settings(name, groups, hue, steps, pixels):
    c = hpt.RECIPES[name]
    assert (c["batch"], c["groups"], c["queue"], c["m"], c["steps"], c["lr"], c["weight_decay"], c["pixels"]) == (
        256, groups, 65536, 0.999, steps, 0.03, 1e-4, pixels)
    assert (c["crop"], c["jitter"], c["grey"], c["blur"], c["flip"]) == ((0.2, 1), (0.4, 0.4, 0.4, hue), 0.2, (0.1, 2), 0.5)
    assert (c["backbone"], c["image_size"], hpt.TEMPERATURE[c["method"]], hpt.DIM) == ("resnet50", 224, 0.2, 128)
    assert (c["probe_steps"], c["tune_steps"], c["tune_epochs"], c["tune_batch"], probe.LINEAR_BATCH, probe.LRS,
            probe.TUNE_LRS) == (5000, 2500, 90, 256, 512, (0.3, 3, 30), (0.01, 0.001))


# ---- one step ----------------------------------------------------------------------------------------------------

def moco(groups=1, rank=0, ranks=1):
    """An encoder whose key encoder lags behind, as after some steps."""
    torch.manual_seed(0)
    net = hpt.MoCo(hpt.Encoder("resnet10", PIXELS, torch.float32), K, M, T, groups, 5, rank, ranks).train()
    with torch.no_grad():
        for p in net.query.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net


def simclr(rank=0, ranks=1):
    torch.manual_seed(0)
    return hpt.SimCLR(hpt.Encoder("resnet10", PIXELS, torch.float32), T, rank, ranks).train()


def views():
    coarse = torch.rand(2 * N, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(coarse, 64, mode="bilinear") * 255).to(torch.uint8).unflatten(0, (2, N))


def embedded(encoder, images):
    """By hand, for a group of images that batch norm sees together."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS)
    pooled = encoder.backbone((images / 255 - mean) / std)[5].mean((2, 3))
    z = encoder.head[2](encoder.head[0](pooled).clamp(min=0))
    return z / z.norm(dim=1, keepdim=True)


def moco_by_hand(net, views, groups, order):
    """InfoNCE of query and positive key, and negatives of the queue -> loss, keys."""
    n = len(order) // groups
    q = torch.cat([embedded(net.query, views[0][g * n:(g + 1) * n]) for g in range(groups)])
    with torch.no_grad():
        for a, b in zip(net.query.parameters(), net.key.parameters()):
            b.copy_(M * b + (1 - M) * a)
        k = torch.zeros_like(q)
        for g in range(groups):
            rows = order[g * n:(g + 1) * n]
            k[rows] = embedded(net.key, views[1][rows])
    losses = [torch.cat([(q[i] @ k[i])[None], q[i] @ net.queue]) / T for i in range(len(order))]
    return torch.stack([row.logsumexp(0) - row[0] for row in losses]).mean(), k


def ntxent_by_hand(z):
    """z: (2N, D), row i and row i + N of one image."""
    losses = []
    for i in range(len(z)):
        similar, other = z @ z[i] / T, (i + len(z) // 2) % len(z)
        losses.append(torch.cat([similar[:i], similar[i + 1:]]).logsumexp(0) - similar[other])
    return torch.stack(losses).mean()


def same(gradients, reference):
    """Up to rounding, which now and then lets a ReLU fall on the other side of 0."""
    for g, (name, p) in zip(gradients, reference.named_parameters()):
        assert p.grad.norm() > 0 and (g - p.grad).norm() < 2e-2 * p.grad.norm(), name


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_of_moco_is_its_formula(groups):
    net = moco(groups)
    reference, order = copy.deepcopy(net), torch.randperm(N, generator=torch.Generator().manual_seed(5 * 1_000_003 + 3))
    loss, values = net(views(), 3)
    expected, keys = moco_by_hand(reference, views(), groups, order)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and values[0] == loss
    same([p.grad for p in net.query.parameters()], reference.query)
    assert torch.allclose(net.queue[:, 48:], keys.T, atol=1e-5)  # the fourth sixteen of 64
    assert torch.equal(net.queue[:, :48], reference.queue[:, :48])
    assert all(p.grad is None for p in net.key.parameters())


def test_the_queue_wraps_around_and_holds_the_last_keys():
    net = moco()
    with torch.no_grad():
        for step in range(K // N + 1):
            before = net.queue.clone()
            net(views(), step)
            changed = (net.queue != before).any(0).nonzero().flatten().tolist()
            assert changed == list(range(step * N % K, step * N % K + N))
    assert torch.allclose(net.queue.norm(dim=0), torch.ones(K))


def test_the_key_encoder_follows_by_m_alone():
    net = moco()
    before, buffers = copy.deepcopy(net.key), dict(net.query.named_buffers())
    net(views(), 0)[0].backward()
    torch.optim.SGD(net.query.parameters(), lr=1.0).step()
    keys, query = dict(net.key.named_parameters()), dict(net.query.named_parameters())
    start = dict(moco().query.named_parameters())  # before the step: the update comes before the key forward
    for name, old in before.named_parameters():
        assert torch.equal(keys[name], old.lerp(start[name], 1 - M)) and not torch.equal(keys[name], query[name])
    assert not any(torch.equal(b, dict(net.key.named_buffers())[name]) for name, b in buffers.items() if "running" in name)


def test_a_step_of_simclr_is_its_formula():
    net = simclr()
    reference = copy.deepcopy(net)
    loss, (_, positive, negative) = net(views(), 0)
    z = embedded(reference.query, views().flatten(0, 1))
    expected = ntxent_by_hand(z)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same([p.grad for p in net.query.parameters()], reference.query)
    pairs = z @ z.T
    assert positive.item() == pytest.approx(torch.cat([pairs.diagonal(N), pairs.diagonal(-N)]).mean().item(), abs=1e-5)
    off = ~(torch.eye(2 * N).bool() | torch.eye(2 * N).bool().roll(N, 0))
    assert negative.item() == pytest.approx(pairs[off].mean().item(), abs=1e-5)


TWO = '''
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
import test_hpt as t
import util
def main():
    rank, ranks, *_ = util.setup("cpu", 0)
    for name, net in dict(moco=t.moco(2, rank, ranks), simclr=t.simclr(rank, ranks)).items():
        ddp = DistributedDataParallel(net)
        ddp.broadcast_buffers = False
        share = t.views()[:, rank * t.N // 2:(rank + 1) * t.N // 2]
        loss, values = ddp(share, 3)
        loss.backward()
        torch.save(dict(values=values, model=net.state_dict(), grads=[p.grad for p in net.query.parameters()]),
                   f"{out}/{{name}}{{rank}}.pt")
    net = t.moco(4, rank, ranks)
    for step in range(3):
        net(share, step)
    torch.save(net.query.state_dict(), f"{out}/four{{rank}}.pt")
util.run(main)
'''


def test_two_processes_compute_the_step_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO.format(tests=str(ROOT / "tests"), out=tmp_path))
    done = start(processes=2, script=tmp_path / "two.py")
    assert done.returncode == 0, done.stderr
    found = {(name, r): torch.load(tmp_path / f"{name}{r}.pt", weights_only=True) for name in ("moco", "simclr") for r in (0, 1)}
    net = moco(groups=2)
    loss, values = net(views(), 3)
    loss.backward()
    one, other = found["moco", 0], found["moco", 1]
    assert torch.equal(one["model"]["queue"], other["model"]["queue"])
    assert torch.allclose(one["model"]["queue"], net.queue, atol=1e-5)
    assert torch.allclose((one["values"] + other["values"]) / 2, values, atol=1e-5)

    four, two = moco(groups=4), [torch.load(tmp_path / f"four{r}.pt", weights_only=True) for r in (0, 1)]
    for step in range(3):
        four(views(), step)
    for name, buffer in four.query.named_buffers():  # the same sums in another order
        if "running" in name:
            assert torch.allclose(buffer, (two[0][name] + two[1][name]) / 2, rtol=1e-4, atol=1e-5), name

    query = simclr().query
    half = [views()[:, r * N // 2:(r + 1) * N // 2] for r in (0, 1)]
    z = [embedded(query, v.flatten(0, 1)).chunk(2) for v in half]  # batch norm sees a process's own images
    expected = ntxent_by_hand(torch.cat([z[0][0], z[1][0], z[0][1], z[1][1]]))
    expected.backward()
    for process in (found["simclr", 0], found["simclr", 1]):
        assert process["values"][0].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, reference in (("moco", net.query), ("simclr", query)):
        for process in (0, 1):
            same(found[name, process]["grads"], reference)


# ---- views -------------------------------------------------------------------------------------------------------

def test_views_are_a_function_of_seed_step_and_slot(images):
    paths, c = hpt.image_paths(str(images), ""), {**hpt.RECIPES["tiny"], "image_size": 32, "batch": 6}

    def batches(start, rank=0, ranks=1, workers=0, seed=0):
        return [v for v, _ in hpt.view_loader(paths, start, 6, c, seed, rank, ranks, workers)]
    whole = batches(0)
    assert whole[0].shape == (2, 6, 3, 32, 32) and whole[0].dtype == torch.uint8
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in whole[0])
    assert all(map(torch.equal, whole[4:], batches(4, workers=2)))
    assert torch.equal(next(hpt.view_loader(paths, 0, 1, c, 0, 0, 1, 0, views=1))[0], whole[0][:1])
    assert torch.equal(torch.cat([batches(5, r, 3)[0] for r in range(3)], 1), whole[5])
    assert not (whole[0][0] == whole[0][1]).flatten(1).all(1).any()  # the two views of an image
    assert not torch.equal(whole[0], batches(0, seed=1)[0])
    firsts = np.concatenate([v.numpy() for v in whole], 1)[0].reshape(36, -1)
    assert len(np.unique(firsts, axis=0)) == 36  # the second pass over the images draws them anew


@pytest.mark.parametrize("name, grey, tinted, mirrored, blurred", [
    ("baseline", .2, .8, .5, .5), ("no-grey", 0, .8, .5, .5), ("no-colour", .2, 0, .5, .5), ("crop-blur", 0, 0, 0, .5),
    ("crop", 0, 0, 0, 0)])
def test_each_set_of_views_leaves_out_what_it_names(name, grey, tinted, mirrored, blurred):
    """How often each operation is seen on a picture whose left half is black."""
    c = hpt.settings(hpt.Config(recipe="hpt", views=name), 1)
    how = hpt.Views([], {**c, "image_size": 32, "crop": (1, 1), "blur": c["blur"] and (2, 2)}, 0, 1).how
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 200, 120, 40
    views = np.stack([np.asarray(augment.view(Image.fromarray(picture), rng=np.random.default_rng(i), **how)).astype(int)
                      for i in range(300)])
    ends = views[:, 16, [2, -3]]                                                        # (300, 2, 3)
    bright, row = ends[np.arange(300), ends.sum(2).argmax(1)], views[:, 16].sum(2)       # (300, 3), (300, 32)
    colourless = np.ptp(bright, axis=1) == 0
    changed = np.abs(bright - (200, 120, 40)).max(1)[~colourless] > 4
    assert colourless.mean() == pytest.approx(grey, abs=.09 * (grey > 0))
    assert changed.mean() == pytest.approx(tinted, abs=.09 * (tinted > 0))
    assert (row[:, 2] > row[:, -3]).mean() == pytest.approx(mirrored, abs=.09 * (mirrored > 0))
    soft = np.abs(np.diff(row, axis=1)).max(1) < 0.5 * np.ptp(row, axis=1)
    assert soft.mean() == pytest.approx(blurred, abs=.09 * (blurred > 0))


def test_a_fraction_is_nested_named_and_never_less_than_a_batch(images, tmp_path):
    paths = hpt.image_paths(str(images), "")
    some = [probe.fraction_of(paths, f, 2, 0).tolist() for f in (0.01, 0.3, 0.7, 1)]
    assert [len(s) for s in some] == [2, 8, 19, 27] and all(set(a) < set(b) for a, b in zip(some, some[1:]))
    assert some[3] == paths.tolist() and some[1] == sorted(some[1]) != probe.fraction_of(paths, 0.3, 2, 1).tolist()
    alike = np.array([b"/a/patient%03d/study/view.png" % i for i in range(100)])
    assert probe.fraction_of(alike, 0.1, 1, 0).tolist() != alike[:10].tolist()
    main("--stage", f"{images}:2", "--fraction", "0.01", "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run/1_all_colours/stage.json").read_text())
    assert record["result"]["images"] == 8 and record["deps"]["fraction"] == 0.01


def test_broken_images_are_named_and_replaced(images, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(b"no" if i == 4 else (images / f"train/red/{i % 6}.png").read_bytes())
    main("--stage", f"{folder}:4", "--out", tmp_path / "run")
    assert "4.png" in (tmp_path / "run/1_all_some/quarantine.txt").read_text()


def test_a_folder_of_splits_gives_only_what_is_not_reported_on(images, tmp_path):
    of = lambda root: {str(p).split("/")[-3] for p in map(bytes.decode, hpt.image_paths(str(root), "").tolist())}
    assert of(images) == {"train", "val"}
    assert of(folders(tmp_path / "two", {"train": 2, "val": 1})) == {"train"}
    assert len(hpt.image_paths(str(images / "test"), "")) == 12
    assert len(hpt.image_paths(str(images / "*/red/*.png"), "")) == 13


def test_images_that_are_reported_on_are_no_stage(images, tmp_path):
    (tmp_path / "linked").symlink_to(images / "test")
    (tmp_path / "some.txt").write_text("\n".join(map(str, [*(images / "train").rglob("*.png"), tmp_path / "linked/red/2.png"])))
    for source, count in ((tmp_path / "some.txt", 1), (images / "*/*/*.png", 12)):
        with pytest.raises(UserError, match=f"has {count} images that --data reports on, first .*png; take") as error:
            main("--stage", f"{source}:1", "--eval", "knn", "--data", images, "--out", tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---- stages ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The uninterrupted chain that others are compared with: everything, batch norm, statistics."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    main(*CHAIN, "--data", images, *stages(images), "--out", out)
    return out


CHAIN = ["--eval", "knn", "--save-every", "2"]
FOLDERS = ["1_all_colours", "2_bn_colours", "3_stats_colours"]


def stages(images):
    return ["--stage", f"{images}:5", "--stage", f"{images}:5:bn", "--stage", f"{images}:stats"]


def backbone(run, folder):
    return torch.load(run / folder / "backbone.pt", weights_only=True)


def test_each_mode_changes_what_it_should_and_no_other_bit(finished):
    norm = lambda name: "bn" in name or "downsample.1" in name
    trained, tuned, refreshed = (backbone(finished, f)["model"] for f in FOLDERS)
    for name, before in trained.items():
        if name.endswith("num_batches_tracked"):
            continue
        moved = not torch.equal(before, tuned[name])
        assert moved == norm(name), name                                            # affine and statistics, no convolution
        assert (not torch.equal(tuned[name], refreshed[name])) == ("running" in name), name


def test_frozen_convolutions_do_not_drift_in_the_key_encoder_either(finished):
    state, before = runs.load_latest(finished / FOLDERS[1])["model"], backbone(finished, FOLDERS[0])["model"]
    for name, value in before.items():
        if value.ndim == 4:
            assert torch.equal(state[f"key.backbone.{name}"], value) and torch.equal(state[f"query.backbone.{name}"], value)
    assert not torch.equal(state["key.head.0.weight"], state["query.head.0.weight"])


def test_statistics_are_the_average_over_the_groups(finished, images):
    tuned, refreshed = (backbone(finished, f) for f in FOLDERS[1:])
    paths, c = hpt.image_paths(str(images), ""), {**hpt.RECIPES["tiny"], "image_size": 32, "batch": 8}
    seed = int(runs.digest([0, FOLDERS[2]]), 16) % 2 ** 31
    mean, std = (torch.tensor(refreshed["about"][k]).view(3, 1, 1) for k in ("mean", "std"))
    found = []
    for (first, _), _ in hpt.view_loader(paths, 0, 4, c, seed, 0, 1, 0):  # 27 images: one pass is 4 steps
        for group in first.chunk(2):
            out = F.conv2d((group / 255 - mean) / std, tuned["model"]["conv1.weight"], stride=2, padding=3)
            found.append((out.mean((0, 2, 3)), out.transpose(0, 1).flatten(1).var(1)))
    for name, values in zip(("running_mean", "running_var"), zip(*found)):
        assert torch.allclose(refreshed["model"][f"bn1.{name}"], torch.stack(values).mean(0), atol=1e-5)


def test_only_the_backbone_passes_between_stages(finished):
    states = [runs.load_latest(finished / f)["model"] for f in FOLDERS[:2]]
    assert records(finished, FOLDERS[1])[1]["queue"] == 0.5 and states[0].keys() == states[1].keys()
    torch.manual_seed(int(runs.digest([0, FOLDERS[1]]), 16) % 2 ** 31)
    fresh = hpt.Encoder("resnet10", PIXELS, torch.float32).head[0].weight
    drift = (states[1]["key.head.0.weight"] - fresh).norm() / fresh.norm()  # five steps away from a new draw, not the old one
    assert drift < 0.1 < (states[0]["key.head.0.weight"] - fresh).norm() / fresh.norm()


def test_the_log_shows_the_loss_beside_chance(finished):
    line = records(finished, FOLDERS[0])[5]
    assert line["chance"] == pytest.approx(np.log(17)) and line["queue"] == 1 and -1 <= line["negative"] <= 1
    lr = hpt.RECIPES["tiny"]["lr"] * 8 / 256
    assert records(finished, FOLDERS[0])[1]["lr"] == pytest.approx(lr) and line["lr"] < lr / 5


def test_the_backbone_is_what_others_load(finished, images, tmp_path):
    net = backbones.build("resnet10")
    said = backbones.load_backbone(net, finished / FOLDERS[2] / "backbone.pt")
    assert "all 60 tensors" in said and torch.equal(net.conv1.weight, backbone(finished, FOLDERS[2])["model"]["conv1.weight"])
    about = backbone(finished, FOLDERS[2])["about"]
    assert about["mean"] == probe.measure(hpt.image_paths(str(images), ""))[0] and about["mode"] == "stats"
    main("--stage", f"{images}:1", "--backbone", "resnet18", "--out", tmp_path)
    theirs = torchvision.models.resnet18()
    state = backbone(tmp_path, FOLDERS[0])["model"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    x, ours = torch.randn(2, 3, 64, 64), backbones.build("resnet18").eval()
    ours.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    assert torch.allclose(theirs.eval()(x), ours(x)[5].mean((2, 3)), atol=1e-5)


def test_killed_and_run_again_it_ends_with_the_same_bits(finished, images, tmp_path):
    args = [*TINY, *CHAIN, "--data", str(images), *stages(images), "--out", str(tmp_path)]
    places = ("torch.optim.SGD.step", "os.fsync", "os.replace", "torch.load")
    where = [killed(tmp_path, places, count, *args, script="hpt") for count in (7, 11, 18)]
    assert all(where) and len(set(where)) > 1, where
    print(*where, sep="\n")
    hpt.main(args)
    for folder in FOLDERS:
        a, b = backbone(finished, folder)["model"], backbone(tmp_path, folder)["model"]
        assert all(torch.equal(a[k], b[k]) for k in a), folder
    knn = [json.loads((run / "results.json").read_text())["knn"] for run in (finished, tmp_path)]
    assert knn[0] == knn[1]


def test_sigterm_saves_and_exits_143(images, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "hpt.py"), *TINY, "--stage", f"{images}:100000", "--out",
                                str(tmp_path), "--save-every", "100000"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(f"{FOLDERS[0]} 2/"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143 and runs.load_latest(tmp_path / FOLDERS[0])["step"] >= 2


def test_only_what_is_trained_drops_layers(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hpt, "train", lambda folder, net, *a: (seen.append(copy.deepcopy(net)), ([0, 0, 0], 0))[1])
    main("--backbone", "efficientnet_b0", *(x for mode in ("all", "bn", "stats") for x in ("--stage", f"{images}:1:{mode}")),
         "--out", tmp_path)
    for net, mode in zip(seen, ("all", "bn", "stats")):
        drops = {m.training for m in net.modules() if isinstance(m, torchvision.ops.StochasticDepth)}
        assert drops == {mode == "all"} and all(m.training for m in hpt.norms(net))


def test_statistics_need_one_view(images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "view", lambda image, size, **_: drawn.append(0) or Image.new("RGB", (size, size)))
    main("--stage", f"{images}:2:stats", "--stage", f"{images}:2", "--out", tmp_path)
    assert len(drawn) == 2 * 8 + 2 * 16


def test_long_stages_save_more_often_than_ten_times(images, tmp_path, monkeypatch):
    saved, save = [], runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda folder, state: (saved.append(state["step"]), save(folder, state)))
    monkeypatch.setattr(hpt, "SAVE", 1)
    main("--stage", f"{images}:20:stats", "--batch", "4", "--out", tmp_path)
    assert saved == list(range(1, 21))


def test_bf16_learns_too(images, tmp_path):
    main("--stage", f"{images}:12", "--precision", "bf16", "--out", tmp_path / "run")
    values = [row["positive"] for row in records(tmp_path / "run", FOLDERS[0]).values()]
    state = backbone(tmp_path / "run", FOLDERS[0])["model"]
    assert len(values) > 5 and np.isfinite(values).all() and all(v.isfinite().all() for v in state.values())
    assert {v.dtype for k, v in state.items() if "num_batches" not in k} == {torch.float32}  # only arithmetic is bf16


def test_without_a_stage_the_four_ways_are_compared(images, tmp_path, monkeypatch, capsys):
    ways = {"Base": f"{images}:stats", "Target": f"{images}:3", "HPT": f"{images}:2", "HPT-BN": f"{images}:2:bn"}
    monkeypatch.setattr(hpt, "DEMO", (f"{images}:2", ways))
    monkeypatch.setitem(hpt.RECIPES, "tiny", {**hpt.RECIPES["tiny"], "probe_steps": 5})
    main("--out", tmp_path / "run")
    base = tmp_path / "run/source/1_all_colours/backbone.pt"
    inits = {way: torch.load(next((tmp_path / "run" / way).glob("1_*/backbone.pt")), weights_only=True)["about"]["init"] for way in ways}
    assert inits == {way: "random" if way == "Target" else str(base) for way in ways}
    found = json.loads((tmp_path / "run/results.json").read_text())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.split(" ")[0] in ways]
    assert len(rows) == 4 and all(r.endswith(f"{found[r.split(' ')[0]]['accuracy']:.3f}") for r in rows)


def test_an_efficientnet_keeps_its_padding(images, tmp_path):
    """Both paddings have the same tensors: only the file says which it is."""
    main("--backbone", "tf_efficientnet_b0", "--stage", f"{images}:1:stats", "--out", tmp_path)
    file = tmp_path / "1_stats_colours/backbone.pt"
    assert "all" in backbones.load_backbone(backbones.build("tf_efficientnet_b0"), file)
    with pytest.raises(ValueError, match="was saved from tf_efficientnet_b0, this is efficientnet_b0"):
        backbones.load_backbone(backbones.build("efficientnet_b0"), file)


def test_two_processes_train_as_one(images, tmp_path):
    args = [*TINY, "--stage", f"{images}:4", "--stage", f"{images}:2:bn", "--stage", f"{images}:stats"]
    for n in (1, 2):
        done = start(*args, "--out", tmp_path / str(n), script="hpt.py", processes=n)
        assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    one, two = (backbone(tmp_path / n, FOLDERS[2])["model"] for n in "12")
    assert all(torch.allclose(v, two[k], rtol=0.02, atol=2e-3) for k, v in one.items() if "running" in k)
    for folder, steps in zip(FOLDERS[:2], (4, 2)):
        one, two = (records(tmp_path / n, folder) for n in "12")
        for step in range(1, steps + 1):
            assert all(one[step][k] == pytest.approx(two[step][k], abs=2e-3) for k in ("loss", "positive", "negative")), step


@pytest.mark.parametrize("args, match", [
    (["--stage", "nowhere:5"], "no image found at --stage nowhere"),
    (["--stage", ":5:bn"], "names no source"),
    (["--stage", "{images}:0"], "names no source, step or mode"),
    (["--stage", "{images}:5:bm"], "step or mode; give SRC"), (["--stage", "{images}:-3"], "step or mode; give SRC"),
    (["--stage", "{images}:5", "--queue", "17"], "--queue 17 is no multiple of the batch, 8; give e.g. --queue 16"),
    (["--stage", "{images}:5", "--groups", "3"], "cannot be cut into 3 batch-norm groups"),
    (["--stage", "{images}:5", "--batch", "48", "--queue", "48"], "has 27 images, fewer than a batch of 48"),
    (["--stage", "{images}:5", "--init", "nothing.pth"], "--init nothing.pth"),
    (["--stage", "{images}:5", "--backbone", "vgg"], "--backbone vgg is unknown"),
    (["--stage", "{images}:5", "--backbone", "spinenet49"], "is a pyramid"), (["--data", "{images}"], "need a --stage"),
    (["--stage", "{images}:5", "--seed", "-1"], "--seed not below"),
    (["--stage", "{images}:5", "--lr", "-1"], "must be above 0"),
    (["--stage", "{images}:5", "--eval", "svm"], "--eval svm is unknown"),
    (["--eval", "knn"], "--eval needs --data"),
    (["--stage", "{images}:5", "--eval", "knn", "--data", "nowhere"], "no folder nowhere"),
    (["--eval", "finetune", "--data", "{images}", "--labels", "2"], "--labels 2 is less than one for each of 3"),
    (["--stage", "{images}:9999", "--eval", "finetune", "--labels", "2"], "--labels 2 is less than one for each of 3"),
    (["--stage", "{images}:5", "--fraction", "0"], "--fraction 0 is not a fraction"),
    (["--stage", "{images}:3", "--lr", "1e30"], "loss is not finite"),
])
def test_what_cannot_work_is_one_line(images, tmp_path, args, match):
    with pytest.raises(UserError, match=match) as error:
        main(*(a.format(images=images) for a in args), "--out", tmp_path / "run")
    assert "\n" not in str(error.value)


def test_bad_input_ends_with_exit_code_2(tmp_path):
    done = start("--stage", "nowhere", "--out", tmp_path / "run", script="hpt.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_a_run_begun_with_other_settings_is_refused(images, finished):
    with pytest.raises(UserError, match=f"lr: {hpt.RECIPES['tiny']['lr']} -> 0.1"):
        main(*CHAIN, "--data", images, *stages(images), "--out", finished, "--lr", "0.1")


def test_an_embedded_domain_drawn_anew_is_another_one(images, tmp_path, monkeypatch):
    monkeypatch.setattr(hpt, "folder_of", lambda source, root: str(images))
    main("--stage", "sketch:1", "--out", tmp_path)
    monkeypatch.setattr(hpt.world, "VERSION", 99)
    with pytest.raises(UserError, match="world: [0-9]+ -> 99"):
        main("--stage", "sketch:1", "--out", tmp_path)


def test_a_queue_larger_than_the_data_is_warned_of(images, tmp_path, capsys):
    main("--stage", f"{images}:1", "--queue", "32", "--out", tmp_path)
    assert "the queue holds 32 keys of 27 images" in capsys.readouterr().out
