"""MME: its two updates against the formula, what lambda = 0 leaves of it, which images it is given, what a run remembers."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapt
import backbones
import hpt
import probe
import runs
import util
from test_hpt import CPU, PIXELS, TINY, folders
from util import UserError

C = {**hpt.RECIPES["tiny"], "recipe": "tiny", "image_size": 32, "workers": 0, "seed": 0}
SHORT = dict(steps=4, every=2, lr=0.03, slow=0.5, batch=4)
QUIET = util.Log(None, 1)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    root = tmp_path_factory.mktemp("domains")
    return [folders(root / name, {"train": n, "val": 4, "test": 5}) for name, n in (("source", 6), ("target", 9))]


def load(domains, budgets="2", seed=0):
    return adapt.load(str(domains[0]), probe.load(str(domains[1]), 0), budgets, seed)


def network(name="resnet10"):
    torch.manual_seed(0)
    return adapt.Cosine(backbones.build(name), 3, PIXELS, torch.float32).train()


def images(n, seed=1):
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, 64, mode="bilinear") * 255).to(torch.uint8)


# ---- the algorithm -----------------------------------------------------------------------------------------------

def test_reversal_keeps_values_and_turns_gradients_exactly():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(1e3).requires_grad_()
    assert torch.equal(adapt.reverse(x), x)
    gradient, = torch.autograd.grad((adapt.reverse(x) ** 3).sum(), x)
    assert torch.equal(gradient, -torch.autograd.grad((x ** 3).sum(), x)[0])


@pytest.mark.parametrize("name, width", [("resnet10", 512), ("resnet50", 512), ("efficientnet_b2", 352)])
def test_the_classifier_is_a_cosine_over_t_but_for_the_length_of_its_rows(name, width):
    net = network(name).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS)
    f = net.backbone((images(4) / 255 - mean) / std)[5].mean((2, 3))
    if name.startswith("resnet"):
        f = f @ net.deep.weight.T + net.deep.bias
    expected = (f / f.norm(dim=1, keepdim=True)) @ net.final.weight.T / 0.05
    assert net.final.weight.shape == (3, width) and net.final.bias is None
    assert torch.allclose(net(images(4)), expected, rtol=1e-4, atol=1e-5)


def forward_by_hand(net, x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS)
    f = net.deep(net.backbone(((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last))[5].mean((2, 3)))
    return net.final(f / f.norm(dim=1, keepdim=True)) / 0.05


def sgd_by_hand(net, gradients, momenta, lr):
    """Nesterov's momentum, with weight decay, the backbone at a tenth."""
    with torch.no_grad():
        for (name, p), g in zip(net.named_parameters(), gradients):
            g = g + 5e-4 * p
            momenta[name] = g if name not in momenta else 0.9 * momenta[name] + g
            p -= lr * (0.1 if name.startswith("backbone") else 1) * (g + 0.9 * momenta[name])


def test_an_iteration_is_two_updates_by_the_formula():
    net, labels, lam = network(), torch.tensor([0, 1, 2, 2, 1, 0]), 0.7
    reference, optimizer, momenta = copy.deepcopy(net), adapt.optimizer_of(net, slow=0.1), {}
    for step in range(2):
        labelled, unlabelled = images(6, 2 * step), images(8, 2 * step + 1)
        loss, entropy = adapt.iteration(net, optimizer, labelled, labels, unlabelled, lam, 0.02)

        logits, parameters = forward_by_hand(reference, labelled), list(reference.parameters())
        expected = (logits.logsumexp(1) - logits[range(6), labels]).mean()
        sgd_by_hand(reference, torch.autograd.grad(expected, parameters), momenta, 0.02)
        p = forward_by_hand(reference, unlabelled).softmax(1)
        h = -(p * (p + 1e-5).log()).sum(1).mean()
        raised = torch.autograd.grad(h, parameters)  # lowered by all but the last layer, raised by that one
        signs = [-1 if name == "final.weight" else 1 for name, _ in reference.named_parameters()]
        sgd_by_hand(reference, [lam * sign * g for sign, g in zip(signs, raised)], momenta, 0.02)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and entropy.item() == pytest.approx(h.item(), rel=1e-4)
    before = network().state_dict()
    for (name, a), b in zip(net.state_dict().items(), reference.state_dict().values()):
        if a.is_floating_point():
            assert not torch.equal(a, before[name]), name
            assert (a - b).norm() < 2e-2 * (b - before[name]).norm(), name  # up to rounding


def test_lr_falls_as_in_the_released_code():
    assert adapt.lr_at(0, 0.01) == 0.01 and adapt.lr_at(10_000, 0.01) == pytest.approx(0.01 * 2 ** -0.75)
    groups = adapt.optimizer_of(network(), 0.1).param_groups
    assert [g["factor"] for g in groups] == [0.1, 1.0] and [len(g["params"]) for g in groups][1] == 3


# ---- images ------------------------------------------------------------------------------------------------------

def test_few_labels_are_as_many_of_every_class_and_nested(domains):
    few = load(domains, "5,1,2")["few"]
    assert list(few) == [1, 2, 5]
    for n, ((paths, labels), (others, _)) in few.items():
        assert np.bincount(labels).tolist() == [n] * 3 and len(others) == 27 - 3 * n and not set(paths) & set(others)
    assert set(few[1][0][0]) < set(few[2][0][0]) < set(few[5][0][0])
    assert set(few[2][0][0]) != set(load(domains, "2", seed=1)["few"][2][0][0])


def test_training_sees_neither_the_test_part_nor_labels_that_it_should_not(domains):
    found = load(domains)
    few, rest = found["few"][2]
    trained = {p.decode() for part in (found["source"], few, rest) for p in part[0].tolist()}
    assert all("/train/" in p for p in trained) and all(b"/test/" in p for p in found["test"][0].tolist())
    assert np.bincount(found["val"][1]).tolist() == [3] * 3 and all(b"/val/" in p for p in found["val"][0].tolist())
    honest = list(adapt.batches(found["source"], few, rest, 0, 3, 4, 0.1, C))
    turned = list(adapt.batches(found["source"], few, (rest[0], (rest[1] + 1) % 3), 0, 3, 4, 0.1, C))
    assert all(torch.equal(a, b) for one, two in zip(honest, turned) for a, b in zip(one, two))
    assert [len(v) for v in honest[0]] == [8, 8, 8] and all((labels >= 0).all() for _, labels, _ in honest)


def test_batches_are_a_function_of_seed_and_step(domains):
    found = load(domains)
    few, rest = found["few"][2]
    drawn = lambda start, lam=0.1, **c: list(adapt.batches(found["source"], few, rest, start, 4, 4, lam, {**C, **c}))
    whole = drawn(0)
    assert all(torch.equal(a, b) for one, two in zip(whole[2:], drawn(2, workers=1)) for a, b in zip(one, two))
    assert all(torch.equal(one[0], two[0]) and not len(two[2]) for one, two in zip(whole, drawn(0, lam=0)))  # S+T sees the same
    assert not torch.equal(whole[0][0], drawn(0, seed=1)[0][0])


def test_squares_are_seven_eighths_of_the_stretched_image():
    ramp = np.zeros((80, 160, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(160), np.arange(80)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe.data, "read_image", lambda _: adapt.Image.fromarray(ramp))
        squares = adapt.Squares([(np.array([b"unused"]), np.array([1]))], 70, 0)
        middle, label, _ = squares[0, 0]
        corners = [squares[0, 0, step, 0][0] for step in range(40)]
    assert label == 1 and middle.shape == (70, 70, 3)
    assert np.allclose(middle[0, :, 0], 10.5 + 2 * np.arange(70), atol=1)
    assert np.allclose(middle[:, 0, 1], 5 + np.arange(70), atol=1)
    mirrored = [c[0, 0, 0] > c[0, -1, 0] for c in corners]
    left = [min(c[0, 0, 0], c[0, -1, 0]) for c in corners]
    assert 5 < sum(mirrored) < 35 and min(left) < 4 and max(left) > 16 and max(left) < 22


def test_an_unreadable_image_is_not_scored(domains, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths, labels = load(domains)["test"]
    net = network()
    some = adapt.accuracy(net, (np.append(paths, str(tmp_path / "bad.png").encode()), np.append(labels, 0)), C, CPU, QUIET)
    assert some == adapt.accuracy(net, (paths, labels), C, CPU, QUIET) and net.training


# ---- runs --------------------------------------------------------------------------------------------------------

def trained(domains, folder, lam, s=SHORT):
    found = load(domains)
    few, rest = found["few"][2]
    folder.mkdir(parents=True, exist_ok=True)
    net = network()
    result = adapt.train(folder, net, found["source"], few, rest, found["val"], lam, s, C, CPU, QUIET)
    state = runs.load_latest(folder)
    assert state["spent"] > 0 and result.pop("seconds") >= round(state["spent"], 1)  # of all sessions together
    return result, net


def test_lambda_0_is_source_and_target_training_bit_for_bit(domains, tmp_path):
    result, _ = trained(domains, tmp_path, 0.0)
    net, found = network(), load(domains)
    optimizer = adapt.optimizer_of(net, SHORT["slow"])
    for step, (x, y, none) in enumerate(adapt.batches(found["source"], *found["few"][2], 0, 4, 4, 0.0, C)):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * 0.03 * (1 + 1e-4 * step) ** -0.75
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    last = runs.load_latest(tmp_path)["model"]
    assert all(torch.equal(v, last[k]) for k, v in net.state_dict().items()) and result["steps"] == 4


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_resumed_training_ends_with_the_same_bits(domains, tmp_path, lam):
    result, net = trained(domains, tmp_path / "whole", lam)
    trained(domains, tmp_path / "cut", lam, {**SHORT, "steps": 2})
    again, other = trained(domains, tmp_path / "cut", lam)
    assert again == result and all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


def test_the_best_validation_counts_and_six_worse_ones_end_training(domains, tmp_path):
    scores = iter([0.5, 0.6, 0.6, *[0.1] * 20])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "accuracy", lambda *_: next(scores))
        result, net = trained(domains, tmp_path, 0.0, {**SHORT, "steps": 30, "every": 1})
        assert result == {"validation": 0.6, "step": 3, "steps": 9}  # of equals the last; six worse than it
        assert trained(domains, tmp_path, 0.0, {**SHORT, "steps": 30, "every": 1})[0] == result  # nor does it go on when resumed
    shorter = trained(domains, tmp_path / "short", 0.0, {**SHORT, "steps": 3, "every": 3})[1]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in shorter.state_dict().items())


def test_the_command_reports_every_budget_and_remembers(domains, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(adapt.SETTINGS, "tiny", SHORT)
    argv = [*TINY, "--eval", "mme", "--source", str(domains[0]), "--data", str(domains[1]), "--budgets", "1,2", "--out",
            str(tmp_path)]
    hpt.main(argv)
    rows = json.loads((tmp_path / "results.json").read_text())["mme"]["budgets"]
    assert [(row["budget"], row["labels"]) for row in rows] == [(1, 3), (2, 6)] and all(0 <= row["MME"] <= 1 for row in rows)
    monkeypatch.setattr(adapt, "train", None)  # nothing is trained again
    hpt.main(argv)
    assert json.loads((tmp_path / "results.json").read_text())["mme"]["budgets"] == rows
    with pytest.raises(UserError, match="begun with other settings .*seed: 0 -> 1"):
        hpt.main([*argv, "--seed", "1"])


def test_what_does_not_fit_is_refused_in_one_line(domains, tmp_path):
    other = folders(tmp_path / "other", {"train": 2, "val": 1})
    (other / "train/red").rename(other / "train/pink")
    linked = folders(tmp_path / "linked", {"train": 2})
    (linked / "train/red/x.png").symlink_to(domains[1] / "test/red/0.png")
    s, t, argv = *map(str, domains), [*TINY, "--eval", "mme", "--out", str(tmp_path)]
    for source, target, budgets, text in (
            (other, t, "1", "other classes .*pink, red"), (t, t, "1", "27 images of --source"),
            (linked, t, "1", "1 images of --source .* are also images of --data"),
            (s, t, "1,x", "--budgets 1,x is no list"), (s, t, "9", "--budgets 9 is too large.* 9 training images of blue"),
            (s + "/none", t, "1", "no folder .*none/train")):
        with pytest.raises(UserError, match=text) as refused:
            hpt.main([*argv, "--source", str(source), "--data", target, "--budgets", budgets])
        assert "\n" not in str(refused.value)
    for odd in (["--eval", "mme"], ["--eval", "knn", "--source", s]):
        with pytest.raises(UserError, match="^--eval mme and --source go together"):
            hpt.main([*TINY, *odd, "--data", t, "--out", str(tmp_path)])
