"""Probes find what is there to find, leave the backbone alone, and choose without looking at what
they report on; minimax entropy is two updates with opposite aims."""

import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import backbones
import data
import hpt
import transfer
import util
from util import Proc, UserError

SHORT = dict(image_size=32, labels=12, probe_steps=60, tune_steps=30, tune_batch=16, tune_epochs=0)
PLAIN = ((0, 0, 0), (1, 1, 1))
COLOURS = {"blue": (20, 20, 220), "green": (20, 200, 20), "red": (220, 20, 20)}


def settings(**more):
    return hpt.Method(**{**hpt.RECIPES["tiny"], **SHORT, **more})


def draw_colours(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for part, count in counts.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(colour, 25, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer") / "colours"
    return draw_colours(root, {"train": 12, "val": 4, "test": 8})


def backbone():
    torch.manual_seed(0)
    return backbones.build("resnet10")


# ---- labelled sets -------------------------------------------------------------------------------


def test_without_a_test_folder_a_tenth_of_train_chooses(colours, tmp_path):
    shutil.copytree(colours, tmp_path / "two", ignore=shutil.ignore_patterns("test"))
    sets = transfer.load(str(tmp_path / "two"), 0)
    assert [len(sets[part]) for part in ("train", "val", "test")] == [33, 3, 12]
    assert "a tenth of train/" in sets["parts"]
    assert sorted(sets["val"].image_class.tolist()) == [0, 1, 2]
    assert not set(sets["val"].files) & set(sets["train"].files)
    assert "/val/" in sets["test"].path(0)


def test_few_labels_hold_every_class_and_are_nested(colours):
    train = transfer.load(str(colours), 0)["train"]
    images = train.subset(np.r_[0:12, 12:14, 24:36])  # two green ones
    chosen = [transfer.few_labels(images, n, 0) for n in (3, 5, 12, 26)]
    for few, n in zip(chosen, (3, 5, 12, 26)):
        assert len(few) == n and set(few.image_class.tolist()) == {0, 1, 2}
    names = [set(few.files) for few in chosen]
    assert all(a < b for a, b in zip(names, names[1:]))
    order = np.random.default_rng(0).permutation(len(images))
    assert set(transfer.few_labels(images.subset(order), 12, 0).files) == names[2]
    assert set(transfer.few_labels(images, 12, 1).files) != names[2]
    with pytest.raises(UserError, match="--labels 2 is less than one for each of 3 classes"):
        transfer.few_labels(images, 2, 0)
    several = np.stack([train.image_class == 0] * 2, 1).astype(np.int64)
    train.image_class = several  # an image may stand for several classes
    assert transfer.few_labels(train, 1, 0).image_class.tolist() == [[1, 1]]


def test_fractions_are_nested_and_shots_are_of_every_class(colours):
    images = transfer.load(str(colours), 0)["train"]
    parts = [set(transfer.fraction_of(images, share, 4, 0).files) for share in (0.01, 0.5, 1)]
    assert list(map(len, parts)) == [4, 18, 36] and parts[0] < parts[1] < parts[2]
    for count in (1, 3):
        few, rest = transfer.shots(images, count, 0)
        assert np.bincount(few.image_class).tolist() == [count] * 3
        assert len(few) + len(rest) == 36 and not set(few.files) & set(rest.files)
    assert set(transfer.shots(images, 1, 0)[0].files) < set(few.files)


def listed(root, folder, test=True):
    """The colours with several classes an image: red, or not blue; nothing is violet."""
    shutil.copytree(root, folder)
    rng = np.random.default_rng(0)
    marks = {"red": ("1", "1.0"), "green": ("", "1"), "blue": ("-1", "U")}
    for part in ("train", "val", "test") if test else ("train", "val"):
        rows = []
        for path in sorted((folder / part).rglob("*.png")):
            rows.append(f"{path.relative_to(folder)},{','.join(marks[path.parent.name])},0")
        lines = ["path,red,warm,violet", *rng.permutation(rows)]
        (folder / f"{part}.csv").write_text("\n".join(lines))
    return folder


def test_lists_of_several_classes_an_image(colours, tmp_path):
    sets = transfer.load(str(listed(colours, tmp_path / "lists", test=False)), 0)
    assert [len(sets[part]) for part in ("train", "val", "test")] == [32, 4, 12]
    train = sets["train"]
    assert train.class_names == ["red", "warm", "violet"] and train.image_class.shape == (32, 3)
    for i in range(len(train)):
        colour = train.path(i).split("/")[-2]
        assert train.image_class[i].tolist() == [colour == "red", colour != "blue", 0]
    assert not set(sets["val"].files) & set(train.files)


def test_one_class_an_image_may_be_listed_too(colours, tmp_path):
    sets = transfer.load(str(colours), 0)
    for part in ("train", "val", "test"):
        images = sets[part]
        rows = [
            f"{images.path(i)},{images.class_names[k]}" for i, k in enumerate(images.image_class)
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *rows]))
    lists = transfer.load(str(tmp_path), 0)
    for part in ("train", "val", "test"):
        assert lists[part].class_names == sets[part].class_names
        assert lists[part].image_class.tolist() == sets[part].image_class.tolist()
    assert len(hpt.images_of(str(tmp_path))) == 36 + 12
    (tmp_path / "pretrain.txt").write_text("\n".join(sets["train"].path(i) for i in range(5)))
    assert len(hpt.images_of(str(tmp_path))) == 5


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "train.csv cannot be read as csv"),
        ("file,a\nx.png,1", "begins with file"),
        ("path", "begins with path"),
        ("path,a,a\nx.png,1,1", "begins with path"),
        ("path,a\nx.png,2", "line 2: it wants a path and 1 values"),
        ("path,a,b\nx.png,1", "it wants a path and 2 values"),
        ("path,b\nx.png,1", "val.csv begins with other columns than train.csv"),
        ("path,label\n,cat", "line 2: it wants a path and the name of a class"),
        ("path,a", "train.csv lists no image"),
    ],
)
def test_bad_lists_are_one_line(colours, tmp_path, text, words):
    folder = listed(colours, tmp_path / "lists", test=False)
    (folder / "train.csv").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        transfer.load(str(folder), 0)
    assert "\n" not in str(error.value)


def test_images_that_are_reported_on_are_never_trained_on(colours, tmp_path):
    sets = transfer.load(str(colours), 0)
    transfer.check(["linear", "knn"], sets, 12, 0, [("s", hpt.images_of(str(colours)))])
    with pytest.raises(UserError, match="--stage s has 24 images that --data reports on"):
        transfer.check(["linear"], sets, 12, 0, [("s", data.listed(str(colours / "test")))])
    os.symlink(colours / "test/red/0.png", tmp_path / "other.png")
    with pytest.raises(UserError, match="has 1 images that --data reports on"):
        transfer.check(["linear"], sets, 12, 0, [("s", data.listed(str(tmp_path)))])
    several = transfer.load(str(listed(colours, tmp_path / "lists")), 0)
    with pytest.raises(UserError, match="knn wants one class an image"):
        transfer.check(["knn"], several, 12, 0, [])


# ---- pixels --------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_all_pixels(colours, tmp_path):
    images = transfer.load(str(colours), 0)["val"]
    pixels = np.concatenate([np.asarray(images.read(i)[0]).reshape(-1, 3) for i in range(12)]) / 255
    mean, std = transfer.measure(images)
    assert np.allclose(mean, pixels.mean(0)) and np.allclose(std, pixels.std(0))
    Image.new("RGB", (33, 35), (79,) * 3).save(tmp_path / "grey.png")
    assert all(0 < d < 0.01 for d in transfer.measure(data.listed(str(tmp_path)))[1])


def test_the_centre_is_seven_eighths_of_the_shorter_side(tmp_path):
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[5:75, 25:95] = 200  # 70 x 70 in the middle
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/b").mkdir()
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"train/{name}/0.png")
    crop, label = transfer.Crops(data.folder(tmp_path, "train"), 35, 0)[1]
    assert crop.shape == (35, 35, 3) and label == 1
    assert (crop[1:-1, 1:-1] == 200).all() and (crop > 100).all()  # bilinear: the border mixes


# ---- evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, more",
    [
        ("linear", {}),
        ("linear", {"augmented": True, "probe_steps": 20}),
        ("knn", {}),
        ("finetune", {}),
    ],
)
def test_what_is_separable_is_separated(colours, tmp_path, name, more):
    net = backbone()
    sets = transfer.load(str(colours), 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    call = (name, tmp_path / name, net, "random", sets, settings(**more), Proc())
    result = transfer.evaluated(*call)
    assert result["accuracy"] >= 0.95 and result["images"] == {"train": 36, "val": 12, "test": 24}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert transfer.evaluated(*call) == result  # remembered
    with pytest.raises(UserError, match="weights: random -> other"):
        transfer.evaluated(name, tmp_path / name, net, "other", *call[4:])


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_several_classes_an_image_are_told_apart(colours, tmp_path, name):
    sets = transfer.load(str(listed(colours, tmp_path / "lists")), 0)
    call = (name, tmp_path / name, backbone(), "random", sets, settings(), Proc())
    result = transfer.evaluated(*call)
    assert result["mAUROC"] >= 0.95 and result["undefined"] == ["violet"]
    assert result["per_class"]["violet"] is None and "accuracy" not in result


def test_the_winner_is_chosen_on_the_validation_part(colours):
    """With labels of the test part turned round accuracy there is nothing, and the choice the
    same."""
    sets = transfer.load(str(colours), 0)
    pixels = transfer.measure(sets["train"])
    honest = transfer.linear(backbone(), sets, pixels, settings(), Proc())
    sets["test"].image_class = (sets["test"].image_class + 1) % 3
    turned = transfer.linear(backbone(), sets, pixels, settings(), Proc())
    for name in ("lr", "features", "validation"):
        assert honest[name] == turned[name]
    assert turned["accuracy"] < 0.05 and len(honest["grid"]) == 6
    assert honest["validation"] == max(row[2] for row in honest["grid"])


def test_learning_rates_fall_by_thirds_and_the_new_layer_has_a_hundred_times_more(
    colours, monkeypatch
):
    seen = []
    step = torch.optim.SGD.step

    def spied(self):
        seen.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spied)
    sets = transfer.load(str(colours), 0)
    c = settings(tune_steps=6, tune_epochs=0, probe_steps=3)
    transfer.finetune(backbone(), sets, PLAIN, c, Proc())
    drops = (1, 1, 0.1, 0.1, 0.01, 0.01)
    wanted = [[lr * drop, 100 * lr * drop] for lr in (0.01, 0.001) for drop in drops]
    assert np.allclose(seen, wanted)
    seen.clear()
    transfer.linear(backbone(), sets, PLAIN, c, Proc())
    assert np.allclose(seen, [[lr * drop for lr in (0.3, 3, 30)] * 2 for drop in (1, 0.1, 0.01)])


def test_fine_tuning_is_tried_for_steps_and_for_epochs(colours):
    """Twelve labels in batches of 16: five epochs are four steps."""
    sets = transfer.load(str(colours), 0)
    c = settings(tune_steps=2, tune_epochs=5)
    result = transfer.finetune(backbone(), sets, PLAIN, c, Proc())
    wanted = [[lr, steps] for lr in transfer.TUNE_LRS for steps in (2, 4)]
    assert [row[:2] for row in result["grid"]] == wanted


def test_neighbours_vote_by_cosine(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, query = torch.randn(30, 5, generator=generator), torch.randn(8, 5, generator=generator)
    y = torch.arange(30) % 3
    similar = F.normalize(query) @ F.normalize(x).T
    expected = []
    for row in similar:
        votes = [0.0] * 3
        for k in row.topk(20).indices.tolist():
            votes[int(y[k])] += float((row[k] / 0.07).exp())
        expected.append(int(np.argmax(votes)))
    found = {"train": (x, y), "test": (query, torch.tensor(expected))}
    monkeypatch.setattr(transfer, "features", lambda net, images, *rest: found[images.name])

    class Part:
        class_names = list("abc")

        def __init__(self, name):
            self.name = name

    sets = {part: Part(part) for part in found}
    assert transfer.knn(None, sets, PLAIN, settings(), Proc()) == {"accuracy": 1.0}


def test_unreadable_images_are_neither_scored_nor_learnt(colours, tmp_path):
    several = listed(colours, tmp_path / "lists")
    for folder in (shutil.copytree(colours, tmp_path / "copy"), several):
        for part in ("train", "test"):
            (folder / part / "red/0.png").write_bytes(b"no image")
        sets = transfer.load(str(folder), 0)
        x, y = transfer.features(backbone(), sets["test"], PLAIN, settings(), Proc())
        assert len(x) == len(y) == 23 and (y >= 0).all()
        c = settings(labels=36, tune_steps=3, probe_steps=1, augmented=True)
        for evaluate in (transfer.linear, transfer.finetune):  # the image is in their batches
            evaluate(backbone(), sets, PLAIN, c, Proc())
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, -1, 0, 1])
    expected = F.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]])
    assert torch.allclose(transfer.loss_of(logits, labels), expected)
    assert transfer.loss_of(logits, torch.full((4, 3), -1)) == 0


def test_draws_do_not_depend_on_how_a_folder_is_spelt(colours, monkeypatch):
    expected = transfer.few_labels(transfer.load(str(colours), 0)["train"], 6, 0)
    monkeypatch.chdir(colours.parent)
    for name in ("colours", "./colours", f"../{colours.parent.name}//colours"):
        few = transfer.few_labels(transfer.load(name, 0)["train"], 6, 0)
        assert few.files.tolist() == expected.files.tolist()


# ---- MME -----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A network of Cosine's parts whose backbone is one linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(6, 4)
        self.deep = nn.Identity()
        self.final = nn.Linear(4, 3, bias=False)

    def forward(self, x, turned=False):
        x = self.backbone(x)
        if turned:
            x = transfer.reverse(x)
        return self.final(F.normalize(x)) / transfer.T


def test_the_last_layer_raises_the_entropy_and_all_before_it_lowers_it():
    net, x = Tiny(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

    def entropy():
        p = net(x).softmax(1)
        return -(p * (p + 1e-5).log()).sum(1).mean()

    plain = torch.autograd.grad(entropy(), [net.backbone.weight, net.final.weight])
    labels = torch.tensor([0, 1, 2, 0, 1])
    gradients = []
    optimizer = transfer.mme_optimizer(net, 0.1)
    step = optimizer.step

    def spied():
        gradients.append([net.backbone.weight.grad.clone(), net.final.weight.grad.clone()])
        if len(gradients) == 2:
            step()

    optimizer.step = spied  # the first update is left out, so that both look at the same weights
    transfer.iteration(net, optimizer, x, labels, x, 0.1, 0.01)
    assert torch.allclose(gradients[1][0], 0.1 * plain[0], atol=1e-6)  # descent: entropy falls
    assert torch.allclose(gradients[1][1], -0.1 * plain[1], atol=1e-6)  # here it rises
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.01]
    gradients.clear()
    loss, nothing = transfer.iteration(net, optimizer, x, labels, x, 0.0, 0.01)
    assert len(gradients) == 1 and nothing == 0 and loss > 0  # S+T: one update


def test_the_cosine_classifier_is_the_formula():
    net = transfer.Cosine(backbone(), 3, PLAIN, torch.float32).eval()
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        x = net.deep(net.backbone(images / 255)[5].mean((2, 3)))
        logits = x / x.norm(dim=1, keepdim=True) @ net.final.weight.T / 0.05
        assert torch.allclose(net(images), logits, atol=1e-4)
        assert torch.equal(net(images, turned=True), net(images))


def test_mme_learns_resumes_and_is_remembered(colours, tmp_path, monkeypatch):
    target = draw_colours(tmp_path / "target", {"train": 6, "val": 4, "test": 5}, seed=1)
    sets = transfer.domains(str(colours), transfer.load(str(target), 0), "1,2", 0)
    assert [len(few) for few, _ in sets["few"].values()] == [3, 6] and len(sets["val"]) == 9
    short = dict(steps=20, every=5, lr=0.01, slow=1.0, batch=6)
    monkeypatch.setitem(transfer.SETTINGS, "tiny", short)
    c = settings()
    result = transfer.mme(tmp_path / "a", backbone(), "random", sets, c, Proc())
    assert [row["budget"] for row in result["budgets"]] == [1, 2]
    assert all(row["S+T"] > 0.8 and row["MME"] > 0.8 for row in result["budgets"])
    assert transfer.mme(tmp_path / "a", backbone(), "random", sets, c, Proc()) == result

    def stopped(self, steps, every=None):
        done(self, steps, every)
        if self.step == 12:
            raise KeyboardInterrupt

    done = util.Checkpoint.step_done
    monkeypatch.setattr(util.Checkpoint, "step_done", stopped)
    with pytest.raises(KeyboardInterrupt):
        transfer.mme(tmp_path / "b", backbone(), "random", sets, c, Proc())
    monkeypatch.setattr(util.Checkpoint, "step_done", done)
    transfer.mme(tmp_path / "b", backbone(), "random", sets, c, Proc())
    one, two = (util.newest(tmp_path / run / "1_S+T")[1]["model"] for run in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_domains_that_do_not_fit_are_refused(colours, tmp_path):
    target = transfer.load(str(colours), 0)
    with pytest.raises(UserError, match="are also images of --data"):
        transfer.domains(str(colours), target, "1", 0)
    other = draw_colours(tmp_path / "other", {"train": 2, "val": 1}, seed=2)
    with pytest.raises(UserError, match="a class has only 12 images"):
        transfer.domains(str(other), target, "12", 0)
    with pytest.raises(UserError, match="no list of numbers"):
        transfer.domains(str(other), target, "1,x", 0)
    (other / "train/red").rename(other / "train/crimson")
    with pytest.raises(UserError, match="have other classes"):
        transfer.domains(str(other), target, "1", 0)
