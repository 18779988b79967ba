"""transfer.py: probes find what is there to find, leave the backbone alone, and choose without
looking at what they report on; MME's two updates are its formula."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
import torch.nn.functional as F
from PIL import Image

import backbones
import data
import hpt
import transfer
import util
from util import Proc, UserError

PARTS = ("train", "val", "test")
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
TINY = "--image-size 32 --batch 8 --queue 16 --device cpu --precision fp32 --workers 0"
COLOURS = {"blue": (20, 20, 220), "green": (20, 200, 20), "red": (220, 20, 20)}


def settings(**more):
    short = dict(image_size=32, labels=12, probe_steps=60, tune_steps=30, tune_batch=16)
    return hpt.Method(**{**hpt.RECIPES["tiny"], **short, **more})


def backbone(name="resnet10"):
    torch.manual_seed(0)
    return backbones.build(name)


def draw_colours(root, counts, seed=0):
    """PART/COLOUR/*.png, noisy images of a colour, so many of a colour in each part."""
    rng = np.random.default_rng(seed)
    for part, count in counts.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(colour, 25, (36, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer") / "colours"
    return draw_colours(root, {"train": 12, "val": 4, "test": 8})


@pytest.fixture(scope="module")
def sets(colours):
    return transfer.load(str(colours), 0)


def names(images):
    return set(images.files.tolist())


# ---- labelled sets -------------------------------------------------------------------------------


def test_without_a_test_folder_a_tenth_of_train_chooses(colours, tmp_path):
    shutil.copytree(colours, tmp_path / "two", ignore=shutil.ignore_patterns("test"))
    sets = transfer.load(str(tmp_path / "two"), 0)
    assert [len(sets[part]) for part in PARTS] == [33, 3, 12]
    assert "a tenth of train/" in sets["parts"] and "/val/" in sets["test"].path(0)
    assert sets["val"].image_class.tolist() == [0, 1, 2]
    assert not names(sets["val"]) & names(sets["train"])


def test_few_labels_hold_every_class_and_smaller_sets_lie_in_larger(sets):
    images = sets["train"].subset(np.r_[0:12, 12:14, 24:36])  # two green ones
    chosen = [transfer.few_labels(images, count, 0) for count in (3, 5, 12, 26)]
    assert [len(few) for few in chosen] == [3, 5, 12, 26]
    assert all(set(few.image_class.tolist()) == {0, 1, 2} for few in chosen)
    assert all(names(a) < names(b) for a, b in zip(chosen, chosen[1:]))
    shuffled = images.subset(np.random.default_rng(0).permutation(26))
    assert names(transfer.few_labels(shuffled, 12, 0)) == names(chosen[2])
    assert names(transfer.few_labels(images, 12, 1)) != names(chosen[2])
    with pytest.raises(UserError, match="--labels 2 is less .* for each of 3 classes; give 3"):
        transfer.few_labels(images, 2, 0)
    both = np.stack([images.image_class == 0] * 2, 1).astype(int)  # one image for two classes
    images = dataclasses.replace(images, image_class=both)
    assert transfer.few_labels(images, 1, 0).image_class.tolist() == [[1, 1]]


def test_smaller_fractions_and_shots_lie_in_larger(sets):
    images = sets["train"]
    parts = [transfer.fraction_of(images, fraction, 4, 0) for fraction in (0.01, 0.3, 0.7, 1)]
    assert [len(part) for part in parts] == [4, 11, 25, 36]
    assert all(names(a) < names(b) for a, b in zip(parts, parts[1:]))
    assert parts[1].files.tolist() == sorted(parts[1].files.tolist())
    assert names(parts[1]) != names(transfer.fraction_of(images, 0.3, 4, 1))
    shots = [transfer.shots(images, count, 0) for count in (1, 3)]
    for count, (few, others) in zip((1, 3), shots):
        assert np.bincount(few.image_class).tolist() == [count] * 3
        assert names(few) | names(others) == names(images) and not names(few) & names(others)
    assert names(shots[0][0]) < names(shots[1][0])
    assert names(shots[0][0]) != names(transfer.shots(images, 1, 1)[0])


def test_draws_do_not_depend_on_how_a_folder_is_spelt(colours, sets, monkeypatch):
    expected = transfer.few_labels(sets["train"], 6, 0).files.tolist()
    monkeypatch.chdir(colours.parent)
    for name in ("colours", "./colours", f"../{colours.parent.name}//colours"):
        few = transfer.few_labels(transfer.load(name, 0)["train"], 6, 0)
        assert few.files.tolist() == expected


def write_lists(colours, folder, parts=PARTS):
    """The colours as csv of several classes: red, and not blue; nothing is violet."""
    shutil.copytree(colours, folder)
    marks = {"red": "1,1.0,0", "green": ",1,-1", "blue": "-1,U,"}
    for part in parts:
        paths = np.random.default_rng(0).permutation(sorted((folder / part).rglob("*.png")))
        lines = [f"{path.relative_to(folder)},{marks[path.parent.name]}" for path in paths]
        (folder / f"{part}.csv").write_text("\n".join(["path,red,warm,violet", *lines]))
    return folder


def test_lists_of_several_classes_an_image(colours, tmp_path):
    folder = write_lists(colours, tmp_path / "lists", ["train", "val"])
    sets = transfer.load(str(folder), 0)
    assert [len(sets[part]) for part in PARTS] == [32, 4, 12]
    assert not names(sets["val"]) & names(sets["train"])
    images = sets["train"]
    assert images.class_names == ["red", "warm", "violet"]
    for i, row in enumerate(images.image_class.tolist()):
        colour = images.path(i).split("/")[-2]
        assert row == [colour == "red", colour != "blue", 0] and images.read(i)


def test_lists_of_one_class_an_image_are_as_folders(sets, tmp_path):
    for part in PARTS:
        classes = [sets[part].class_names[k] for k in sets[part].image_class]
        lines = [f"{sets[part].path(i)},{name}" for i, name in enumerate(classes)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *lines]))
    listed = transfer.load(str(tmp_path), 0)
    for part in PARTS:
        assert transfer.paths_of(listed[part]) == transfer.paths_of(sets[part])
        assert listed[part].class_names == sets[part].class_names
        assert listed[part].image_class.tolist() == sets[part].image_class.tolist()


# fmt: off
@pytest.mark.parametrize("text, words", [
    ("", "train.csv cannot be read as csv"), ("file,a\nx.png,1", "begins with file,"),
    ("path", "it wants path,label or path,NAME1"), ("path,a,a\nx.png,1,1", "begins with path,"),
    ("path,a\nx.png,2", "train.csv, line 2: it wants a path and 1 values"),
    ("path,a,b\n\nx.png,1", "line 3: it wants a path and 2 values"),
    ("path,a\n,1", "line 2: it wants a path"), ("path,a", "train.csv lists no image"),
    ("path,label\n,cat", "line 2: it wants a path and the name of a class"),
    ("path,b\nx.png,1", "val.csv begins with other columns than train.csv"),
    ("path,label\nx.png,b", "val.csv begins with other columns than train.csv"),
    ("path,red,warm,violet\nx.png,1,0,0", "no class with and without images in its train part")])
# fmt: on
def test_bad_lists_are_refused_in_one_line(colours, tmp_path, text, words):
    folder = write_lists(colours, tmp_path / "lists")
    (folder / "train.csv").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        transfer.load(str(folder), 0)
    assert "\n" not in str(error.value)


def test_images_that_are_reported_on_are_in_no_stage_and_not_trained_on(colours, sets, tmp_path):
    stage = hpt.images_of(colours)
    transfer.check(["linear", "knn"], sets, 12, 0, [("DIR", stage)])
    (tmp_path / "linked.png").symlink_to(colours / "test/red/0.png")
    for place, count in ((colours / "test", 24), (tmp_path, 1)):
        words = f"--stage DIR has {count} images that --data reports on, first .*png; give"
        with pytest.raises(UserError, match=words):
            transfer.check(["linear"], sets, 12, 0, [("DIR", data.listed(place))])
    with pytest.raises(UserError, match="the val part of .* has 24 images that"):
        transfer.check(["linear"], {**sets, "val": sets["test"]}, 12, 0, [])
    several = transfer.load(str(write_lists(colours, tmp_path / "lists")), 0)
    with pytest.raises(UserError, match="--eval knn wants one class an image"):
        transfer.check(["linear", "knn"], several, 12, 0, [])


# ---- pixels --------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_all_pixels(sets, tmp_path):
    images = sets["val"]
    pixels = np.stack([np.asarray(images.read(i)[0]) for i in range(len(images))]) / 255
    mean, deviation = transfer.measure(images)
    assert np.allclose(mean, pixels.mean((0, 1, 2)))
    assert np.allclose(deviation, pixels.std((0, 1, 2)))
    for grey in (0, 77, 151, 255):  # where rounding might leave a variance below 0
        Image.new("RGB", (33, 35), (grey,) * 3).save(tmp_path / "grey.png")
        assert all(0 < d < 0.01 for d in transfer.measure(data.listed(tmp_path))[1])


def as_images(tmp_path, pixels):
    """One image, of class 1."""
    Image.fromarray(pixels).save(tmp_path / "0.png")
    return dataclasses.replace(data.listed(tmp_path), image_class=np.array([1]))


def test_the_centre_is_seven_eighths_of_the_shorter_side(tmp_path):
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[5:75, 25:95] = 200  # 70 x 70 in the middle
    crop, label = transfer.Crops(as_images(tmp_path, pixels), 35, 0)[0]
    assert crop.shape == (35, 35, 3) and label == 1
    assert (crop[1:-1, 1:-1] == 200).all() and (crop > 100).all()  # bilinear: the border mixes


def test_squares_are_seven_eighths_of_the_stretched_image(tmp_path):
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[..., 0] = np.arange(160)
    pixels[..., 1] = np.arange(80)[:, None]
    squares = transfer.Squares([as_images(tmp_path, pixels)], 70, 0)
    middle, label = squares[0, 0]
    assert label == 1 and middle.shape == (70, 70, 3)
    assert np.allclose(middle[0, :, 0], 10.5 + 2 * np.arange(70), atol=1)
    assert np.allclose(middle[:, 0, 1], 5 + np.arange(70), atol=1)
    ends = np.array([squares[0, 0, step, 0][0][0, [0, -1], 0] for step in range(40)])
    left = ends.min(1)  # from 0 to 20, an eighth
    assert 5 < (ends[:, 0] > ends[:, 1]).sum() < 35  # mirrored ones
    assert left.min() < 4 and 16 < left.max() < 22


# ---- evaluations ---------------------------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("name, more", [
    ("linear", {}), ("linear", {"augmented": True, "probe_steps": 8}), ("knn", {}),
    ("finetune", {})])
# fmt: on
def test_what_is_separable_is_separated_and_remembered(sets, tmp_path, name, more):
    net = backbone()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    call = (name, tmp_path, net, "random", sets, settings(**more), Proc())
    result = transfer.evaluated(*call)
    assert result["accuracy"] >= 0.95 and result["images"] == {"train": 36, "val": 12, "test": 24}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # statistics too
    assert transfer.evaluated(*call) == result
    with pytest.raises(UserError, match="begun with other settings .weights: random -> other"):
        transfer.evaluated(name, tmp_path, net, "other", *call[4:])


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_several_classes_an_image_are_told_apart(colours, tmp_path, name):
    sets = transfer.load(str(write_lists(colours, tmp_path / "lists")), 0)
    call = (name, tmp_path / name, backbone(), "random", sets, settings(), Proc())
    result = transfer.evaluated(*call)
    assert result["mAUROC"] >= 0.95 and result["undefined"] == ["violet"]
    assert result["per_class"]["violet"] is None and "accuracy" not in result


def given_features(monkeypatch, found):
    """{part: (features, labels)} in the place of a backbone's -> sets."""
    monkeypatch.setattr(transfer, "features", lambda net, images, *_: found[images.part])
    sets = {part: SimpleNamespace(part=part, class_names=["a", "b", "c"]) for part in found}
    return {**sets, "parts": ""}


@pytest.mark.parametrize("several", [False, True])
def test_a_linear_probe_is_logistic_regression_chosen_on_val(monkeypatch, several):
    rng = np.random.default_rng(0)
    found = {}
    for part, count in (("train", 600), ("val", 400), ("test", 2000)):
        y = rng.integers(0, 2, (count, 3)) if several else rng.integers(0, 3, count)
        targets = y if several else np.eye(3)[y]
        x = targets @ [[2, 0, 1, 0, 0], [0, 2, 0, 1, 0], [1, 0, 0, 2, 0]]
        x = (x + rng.normal(0, 1.2, x.shape)) * [1, 1, 2, 1, 3] + [0, 5, 0, 0, 1]  # they overlap
        found[part] = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    sets = given_features(monkeypatch, found)
    result = transfer.linear(None, sets, PIXELS, settings(probe_steps=400), Proc())
    (row,) = (row for row in result["grid"] if row[:2] == ["standardised", 0.3])
    x, y = found["train"]
    regression = sklearn.linear_model.LogisticRegression(C=1e6, max_iter=1000)
    for value, part in zip(row[2:], ("val", "test")):
        other_x, other_y = found[part]
        if several:
            scores = [regression.fit(x, y[:, k]).decision_function(other_x) for k in range(3)]
            expected = sklearn.metrics.roc_auc_score(other_y, np.stack(scores, 1))
        else:
            expected = regression.fit(x, y).score(other_x, other_y)
        assert value == pytest.approx(expected, abs=0.005) and expected < 0.97
    chosen = max(result["grid"], key=lambda row: row[2])
    metric = "mAUROC" if several else "accuracy"
    assert [result["features"], result["lr"], result["validation"], result[metric]] == chosen
    assert chosen[3] < max(row[3] for row in result["grid"])  # another one would have looked better


def test_what_hardly_varies_is_not_blown_up(monkeypatch):
    """The third feature is constant but for rounding, and a little off in what is scored."""
    y = torch.arange(300) % 3
    found = {}
    for part in PARTS:
        x = torch.randn(300, 3, generator=torch.Generator().manual_seed(len(part)))
        x = x * torch.tensor([0.5, 0.5, 1e-5])
        x[:, :2] += torch.tensor([[3.0, 0], [0, 3], [-3, -3]])[y]
        x[:, 2] += float(part != "train") / 100
        found[part] = x, y
    sets = given_features(monkeypatch, found)
    grid = transfer.linear(None, sets, PIXELS, settings(), Proc())["grid"]
    assert min(row[3] for row in grid if row[0] == "standardised") > 0.9


def test_lr_falls_by_thirds_and_fine_tuning_is_tried_for_steps_and_epochs(sets, monkeypatch):
    """Twelve labels in batches of 16: four epochs are three steps."""
    seen = []
    step = torch.optim.SGD.step

    def spied(self):
        seen.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spied)
    c = settings(tune_steps=6, tune_epochs=4, probe_steps=3)
    result = transfer.finetune(backbone(), sets, PIXELS, c, Proc())
    assert [row[:2] for row in result["grid"]] == [[0.01, 6], [0.01, 3], [0.001, 6], [0.001, 3]]
    drops = [1, 1, 0.1, 0.1, 0.01, 0.01, 1, 0.1, 0.01]  # of six steps, of three
    lrs = [lr * drop for lr in (0.01, 0.001) for drop in drops]
    assert np.allclose(seen, [[lr, 100 * lr] for lr in lrs])  # of the backbone, of the new layer
    seen.clear()
    transfer.linear(backbone(), sets, PIXELS, c, Proc())
    assert np.allclose(seen, [[lr * drop for lr in (0.3, 3, 30)] * 2 for drop in (1, 0.1, 0.01)])


def test_neighbours_vote_by_cosine(monkeypatch):
    torch.manual_seed(0)
    x, query = torch.randn(30, 5), torch.randn(8, 5)
    y = torch.arange(30) % 3
    expected = []
    for row in query:
        similar = x @ row / (x.norm(dim=1) * row.norm())
        votes = [0.0] * 3
        for k in similar.argsort()[-20:].tolist():
            votes[y[k]] += np.exp(similar[k].item() / 0.07)
        expected.append(int(np.argmax(votes)))
    expected[0] = (expected[0] + 1) % 3  # as if this one were wrong
    found = {"train": (x, y), "test": (query, torch.tensor(expected))}
    sets = given_features(monkeypatch, found)
    assert transfer.knn(None, sets, PIXELS, settings(), Proc()) == {"accuracy": 7 / 8}


def with_bad_file(colours, folder, name):
    shutil.copytree(colours, folder)
    (folder / name).write_bytes(b"no image")
    return transfer.load(str(folder), 0)


def test_unreadable_images_are_not_scored(colours, sets, tmp_path):
    images = with_bad_file(colours, tmp_path / "bad", "test/red/0.png")["test"]
    x, y = transfer.features(backbone(), images, PIXELS, settings(), Proc())
    assert x.shape == (23, 256) and np.bincount(y).tolist() == [8, 8, 7]
    net = classifier()
    good = sets["test"].subset([i for i in range(24) if not images.path(i).endswith("red/0.png")])
    right = transfer.accuracy(net, images, settings(), Proc())
    assert right == transfer.accuracy(net, good, settings(), Proc()) and net.training


@pytest.mark.parametrize("evaluate", [transfer.linear, transfer.finetune])
def test_unreadable_images_are_not_learnt_from(colours, tmp_path, evaluate):
    sets = with_bad_file(colours, tmp_path / "bad", "train/red/0.png")
    c = settings(augmented=True, labels=36, probe_steps=2, tune_steps=4)
    assert evaluate(backbone(), sets, PIXELS, c, Proc())["accuracy"] > 0
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, -1, 0, 1])
    expected = F.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]])
    assert torch.allclose(transfer.loss_of(logits, labels), expected)
    assert transfer.loss_of(logits, torch.full((4, 3), -1)) == 0


# ---- MME -----------------------------------------------------------------------------------------

MME = dict(steps=4, every=2, lr=0.03, slow=0.5, batch=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer") / "target"
    return draw_colours(root, {"train": 9, "val": 4, "test": 5}, seed=1)


@pytest.fixture(scope="module")
def domains(colours, target):
    return transfer.domains(str(colours), transfer.load(str(target), 0), "5,1,2", 0)


def classifier(name="resnet10"):
    return transfer.Cosine(backbone(name), 3, PIXELS, torch.float32).train()


def noise(count, seed):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, 64, mode="bilinear") * 255).to(torch.uint8)


def forward_by_hand(net, images):
    x = net.backbone(backbones.normalise(images, PIXELS))[5].mean((2, 3))
    if net.backbone.name.startswith("resnet"):
        x = x @ net.deep.weight.T + net.deep.bias
    return (x / x.norm(dim=1, keepdim=True)) @ net.final.weight.T / 0.05


def sgd_by_hand(net, gradients, momenta, lr):
    """Nesterov's momentum, with weight decay, the backbone at a tenth."""
    with torch.no_grad():
        for (name, p), g in zip(net.named_parameters(), gradients):
            g = g + 5e-4 * p
            momenta[name] = 0.9 * momenta[name] + g if name in momenta else g
            factor = 0.1 if name.startswith("backbone") else 1
            p -= lr * factor * (g + 0.9 * momenta[name])


def test_reversal_keeps_values_and_turns_gradients_exactly():
    x = (1e3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert torch.equal(transfer.reverse(x), x)
    (turned,) = torch.autograd.grad((transfer.reverse(x) ** 3).sum(), x)
    assert torch.equal(turned, -torch.autograd.grad((x**3).sum(), x)[0])


@pytest.mark.parametrize("name, width", [("resnet10", 512), ("efficientnet_b2", 352)])
def test_the_classifier_is_a_cosine_over_t_but_for_the_length_of_its_rows(name, width):
    net = classifier(name).eval()
    assert net.final.weight.shape == (3, width) and net.final.bias is None
    logits = forward_by_hand(net, noise(4, 1))
    for turned in (False, True):
        assert torch.allclose(net(noise(4, 1), turned), logits, rtol=1e-4, atol=1e-5)


def test_an_iteration_is_two_updates_by_the_formula():
    net = classifier()
    reference = copy.deepcopy(net)
    optimizer = transfer.mme_optimizer(net, slow=0.1)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    momenta = {}
    for step in range(2):
        images, unlabelled = noise(6, 2 * step), noise(8, 2 * step + 1)
        loss, entropy = transfer.iteration(net, optimizer, images, labels, unlabelled, 0.7, 0.02)
        logits = forward_by_hand(reference, images)
        expected = (logits.logsumexp(1) - logits[range(6), labels]).mean()
        parameters = dict(reference.named_parameters())
        gradients = torch.autograd.grad(expected, parameters.values())
        sgd_by_hand(reference, gradients, momenta, 0.02)
        p = forward_by_hand(reference, unlabelled).softmax(1)
        h = -(p * (p + 1e-5).log()).sum(1).mean()
        gradients = torch.autograd.grad(h, parameters.values())
        # the last layer raises the entropy, all before it lower it
        signs = [-1 if name == "final.weight" else 1 for name in parameters]
        gradients = [0.7 * sign * g for sign, g in zip(signs, gradients)]
        sgd_by_hand(reference, gradients, momenta, 0.02)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert entropy.item() == pytest.approx(h.item(), rel=1e-4)
    for name, before in classifier().named_parameters():
        a, b = net.get_parameter(name), reference.get_parameter(name)
        assert 0 < (a - before).norm() and (a - b).norm() < 1e-2 * (b - before).norm(), name


def test_training_sees_neither_the_test_part_nor_labels_it_should_not(domains):
    few, rest = domains["few"][2]
    assert list(domains["few"]) == [1, 2, 5] and len(few) == 6 and len(rest) == 21
    trained = [images.path(i) for images in (domains["source"], few, rest) for i in range(6)]
    assert all("/train/" in path for path in trained) and "/test/" in domains["test"].path(0)
    assert np.bincount(domains["val"].image_class).tolist() == [3] * 3
    turned = dataclasses.replace(rest, image_class=(rest.image_class + 1) % 3)

    def drawn(rest, steps=range(4), lam=0.1, seed=0, workers=0):
        call = (few, rest, steps, 4, lam, settings(seed=seed), Proc(workers=workers))
        return list(transfer.mme_batches(domains["source"], *call))

    whole = drawn(rest)
    for again in (drawn(turned), whole[:2] + drawn(rest, range(2, 4), workers=1)):
        for one, two in zip(whole, again):
            assert all(map(torch.equal, one, two))
    assert [len(values) for values in whole[0]] == [8, 8, 8] and min(whole[0][1]) >= 0
    for one, two in zip(whole, drawn(rest, lam=0)):  # S+T sees the same
        assert torch.equal(one[0], two[0]) and len(two[2]) == 0
    assert not torch.equal(whole[0][0], drawn(rest, seed=1)[0][0])


def trained(domains, folder, lam, **more):
    """The network and result of mme_train with 2 labels a class."""
    folder.mkdir(parents=True, exist_ok=True)
    net = classifier()
    call = (net, domains["source"], *domains["few"][2], domains["val"], lam, {**MME, **more})
    result = transfer.mme_train(folder, *call, settings(), Proc())
    assert result.pop("seconds") > 0
    return result, net


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_lambda_0_is_training_on_source_and_target_bit_for_bit(domains, tmp_path):
    result, _ = trained(domains, tmp_path, 0.0)
    net = classifier()
    optimizer = transfer.mme_optimizer(net, MME["slow"])
    call = (*domains["few"][2], range(4), 4, 0.0, settings(), Proc())
    batches = transfer.mme_batches(domains["source"], *call)
    for step, (images, labels, _) in enumerate(batches):
        for group, factor in zip(optimizer.param_groups, (0.5, 1)):
            group["lr"] = 0.03 * (1 + 1e-4 * step) ** -0.75 * factor
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert same(net.state_dict(), util.newest(tmp_path)[1]["model"]) and result["steps"] == 4


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_resumed_training_ends_with_the_same_bits(domains, tmp_path, lam):
    result, net = trained(domains, tmp_path / "whole", lam)
    trained(domains, tmp_path / "cut", lam, steps=2)
    again, resumed = trained(domains, tmp_path / "cut", lam)
    assert again == result and same(net.state_dict(), resumed.state_dict())


def test_the_best_validation_counts_and_six_worse_ones_end_training(domains, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, *[0.1] * 20])
    monkeypatch.setattr(transfer, "accuracy", lambda *_: next(scores))
    result, net = trained(domains, tmp_path / "whole", 0.0, steps=30, every=1)
    assert result == {"validation": 0.6, "step": 3, "steps": 9}  # of equals the last
    again, _ = trained(domains, tmp_path / "whole", 0.0, steps=30, every=1)
    assert again == result  # nor does it go on when it is resumed
    _, shorter = trained(domains, tmp_path / "short", 0.0, steps=3, every=3)
    assert same(shorter.state_dict(), net.state_dict())


def test_the_command_reports_every_budget_and_remembers(colours, target, tmp_path, monkeypatch):
    monkeypatch.setitem(transfer.SETTINGS, "tiny", MME)
    argv = f"{TINY} --eval mme --source {colours} --data {target} --budgets 1,2 --out {tmp_path}"
    results = []
    for _ in range(2):
        hpt.main(argv.split())
        results.append(json.loads((tmp_path / "results.json").read_text()))
        monkeypatch.setattr(transfer, "mme_train", None)  # nothing is trained again
    assert results[0] == results[1]
    rows = results[0]["mme"]["budgets"]
    assert [(row["budget"], row["labels"]) for row in rows] == [(1, 3), (2, 6)]
    assert results[0]["MME, 2"]["accuracy"] == rows[1]["MME"] <= 1
    with pytest.raises(UserError, match="begun with other settings .*seed: 0 -> 1"):
        hpt.main([*argv.split(), "--seed", "1"])


# fmt: off
@pytest.mark.parametrize("source, budgets, words", [
    ("pink", "1", "have other classes"), ("target", "1", "27 images of --source"),
    ("linked", "1", "1 images of --source .* are also images of --data"),
    ("colours", "1,x", "--budgets 1,x is no list"), ("colours", "0", "--budgets 0 is no list"),
    ("colours", "9", "--budgets 9: a class has only 9 images"),
    ("none", "1", "no folder .*none/train")])
# fmt: on
def test_domains_that_do_not_fit_are_refused(colours, target, tmp_path, source, budgets, words):
    places = {"colours": colours, "target": target, "none": tmp_path / "none"}
    for name in ("pink", "linked"):
        places[name] = draw_colours(tmp_path / name, {"train": 2})
    (tmp_path / "pink/train/red").rename(tmp_path / "pink/train/pink")
    (tmp_path / "linked/train/red/x.png").symlink_to(target / "test/red/0.png")
    with pytest.raises(UserError, match=words) as error:
        transfer.domains(str(places[source]), transfer.load(str(target), 0), budgets, 0)
    assert "\n" not in str(error.value)
