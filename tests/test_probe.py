"""Probes find what is there to find, leave the backbone alone, and choose without looking at what they report on."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
import eval as evaluation
import hpt
import probe
import sources
import util
from test_hpt import CPU, folders
from util import UserError

C = {**hpt.RECIPES["tiny"], "image_size": 32, "workers": 0, "seed": 0, "labels": 12, "augmented": False, "probe_steps": 60,
     "tune_steps": 30, "tune_batch": 16}
QUIET = util.Log(None, 1)
PLAIN = ((0, 0, 0), (1, 1, 1))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("probe") / "colours", {"train": 12, "val": 4, "test": 8})


def backbone():
    torch.manual_seed(0)
    return backbones.build("resnet10")


@pytest.mark.parametrize("name, more", [("linear", {}), ("linear", {"augmented": True, "probe_steps": 20}), ("knn", {}),
                                        ("finetune", {})])
def test_what_is_separable_is_separated(colours, tmp_path, name, more):
    net, sets = backbone(), probe.load(str(colours), 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = probe.evaluated(name, tmp_path / name, net, "random", sets, {**C, **more}, CPU, QUIET)
    assert result["accuracy"] >= 0.95 and result["images"] == {"train": 36, "val": 12, "test": 24}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # running statistics too
    assert probe.evaluated(name, tmp_path / name, net, "random", sets, {**C, **more}, CPU, QUIET) == result  # remembered


def test_fine_tuning_is_tried_for_steps_and_for_epochs(colours, tmp_path):
    """Twelve labels in batches of 16: five epochs are four steps."""
    sets = probe.load(str(colours), 0)
    result = probe.finetune(backbone(), sets, PLAIN, {**C, "tune_steps": 2, "tune_epochs": 5}, CPU, QUIET)
    assert [row[:2] for row in result["grid"]] == [[lr, steps] for lr in probe.TUNE_LRS for steps in (2, 4)]
    assert result["validation"] == max(row[2] for row in result["grid"]) and [result["lr"], result["steps"]] in [
        row[:2] for row in result["grid"] if row[2] == result["validation"]]


def test_learning_rates_fall_to_a_tenth_from_each_third_and_the_new_layer_has_a_hundred_times_more(colours, monkeypatch):
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self)))
    probe.finetune(backbone(), probe.load(str(colours), 0), PLAIN, {**C, "tune_steps": 6, "tune_epochs": 0}, CPU, QUIET)
    assert np.allclose(seen, [[lr * drop * k for k in (1, 100)] for lr in (0.01, 0.001) for drop in (1, 1, .1, .1, .01, .01)])
    seen.clear()
    probe.linear(backbone(), probe.load(str(colours), 0), PLAIN, {**C, "probe_steps": 3, "augmented": False}, CPU, QUIET)
    assert np.allclose(seen, [[lr * drop for _ in range(2) for lr in (0.3, 3, 30)] for drop in (1, .1, .01)])


def test_another_drawing_of_the_same_files_is_not_taken_for_it(colours, tmp_path):
    folder, c = shutil.copytree(colours, tmp_path / "copy"), C
    (folder / "world.json").write_text('{"version": 3}')
    args = "knn", tmp_path / "knn", backbone(), "random", probe.load(str(folder), 0), c, CPU, QUIET
    assert probe.evaluated(*args) == probe.evaluated(*args)
    (folder / "world.json").write_text('{"version": 4}')
    with pytest.raises(UserError, match="begun with other settings .data:"):
        probe.evaluated(*args)


def test_what_hardly_varies_is_not_blown_up(monkeypatch):
    """The third feature is constant but for rounding, and a little off in what is scored."""
    def features(backbone, sets, part, *_):
        y = torch.arange(300) % 3
        x = torch.randn(300, 3, generator=torch.Generator().manual_seed(len(part))) * torch.tensor([0.5, 0.5, 1e-5])
        x[:, :2] += torch.tensor([[3.0, 0], [0, 3], [-3, -3]])[y]
        x[:, 2] += 0.0 if part == "train" else 0.01
        return x, y
    monkeypatch.setattr(probe, "features", features)
    result = probe.linear(None, {"names": "abc", "parts": ""}, PLAIN, C, CPU, QUIET)
    assert min(row[3] for row in result["grid"] if row[0] == "standardised") > 0.9


def test_broken_training_images_are_named_once(colours, tmp_path, capsys):
    folder = shutil.copytree(colours, tmp_path / "copy")
    (folder / "train/red/0.png").write_bytes(b"no image")
    log = util.Log(tmp_path / "log.jsonl", 0)
    probe.finetune(backbone(), probe.load(str(folder), 0), PLAIN, {**C, "labels": 36, "tune_steps": 5}, CPU, log)
    lines = [line for line in capsys.readouterr().out.splitlines() if "red/0.png" in line]
    assert len(lines) == 1 and "replaced by the next image" in lines[0]


def test_images_of_one_colour_have_a_deviation(tmp_path):
    for i, grey in enumerate((0, 77, 79, 83, 151, 255)):
        Image.new("RGB", (33, 35), (grey,) * 3).save(tmp_path / f"{i}.png")
        _, deviation = probe.measure(np.array([str(tmp_path / f"{i}.png").encode()]))
        assert all(0 < d < 0.01 for d in deviation), grey


def test_random_weights_come_from_the_seed(colours, tmp_path):
    argv = ["--recipe", "tiny", "--image-size", "32", "--eval", "knn", "--data", str(colours), "--workers", "0", "--device", "cpu"]
    seen = []
    real = probe.evaluated
    for seed in (1, 1, 2):
        torch.manual_seed(len(seen))  # what was drawn before does not matter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "evaluated", lambda *a: (seen.append(a[2].state_dict()["layer1.0.conv1.weight"].clone()), real(*a))[1])
            hpt.main([*argv, "--seed", str(seed), "--out", str(tmp_path / str(len(seen)))])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_the_winner_is_chosen_on_the_validation_part(colours):
    """With labels of the test part turned round, accuracy there is nothing, and the choice the same."""
    sets, net = probe.load(str(colours), 0), backbone()
    pixels = probe.measure(sets["train"][0])
    honest = probe.linear(net, sets, pixels, C, CPU, QUIET)
    turned = probe.linear(net, {**sets, "test": (sets["test"][0], (sets["test"][1] + 1) % 3)}, pixels, C, CPU, QUIET)
    assert (honest["lr"], honest["features"], honest["validation"]) == (turned["lr"], turned["features"], turned["validation"])
    assert turned["accuracy"] < 0.05 and len(honest["grid"]) == 6
    assert honest["validation"] == max(row[2] for row in honest["grid"])


def test_without_a_test_folder_a_tenth_of_train_chooses(colours, tmp_path):
    shutil.copytree(colours, tmp_path / "two", ignore=shutil.ignore_patterns("test"))
    sets = probe.load(str(tmp_path / "two"), 0)
    assert [len(sets[k][1]) for k in ("train", "val", "test")] == [33, 3, 12] and "a tenth of train/" in sets["parts"]
    assert sorted(sets["val"][1].tolist()) == [0, 1, 2] and not set(sets["val"][0]) & set(sets["train"][0])
    assert all(b"/val/" in p for p in sets["test"][0].tolist())


def test_few_labels_hold_every_class_and_are_nested(colours):
    paths, labels = probe.load(str(colours), 0)["train"]
    keep = np.r_[0:12, 12:14, 24:36]  # two green ones
    chosen = [probe.few_labels((paths[keep], labels[keep]), n, 0) for n in (3, 5, 12, 26)]
    for (some, theirs), n in zip(chosen, (3, 5, 12, 26)):
        assert len(some) == n and set(theirs.tolist()) == {0, 1, 2}
        assert all(os_class(p) == k for p, k in zip(some.tolist(), theirs.tolist()))
    assert all(set(a[0]) < set(b[0]) for a, b in zip(chosen, chosen[1:]))
    order = np.random.default_rng(0).permutation(len(keep))
    again = probe.few_labels((paths[keep][order], labels[keep][order]), 12, 0)[0]
    assert set(again) == set(chosen[2][0]) != set(probe.few_labels((paths[keep], labels[keep]), 12, 1)[0])
    with pytest.raises(UserError, match="--labels 2"):
        probe.few_labels((paths, labels), 2, 0)
    twice = np.stack([labels == 0, labels == 0], 1).astype(np.int64)  # an image may stand for several classes
    assert probe.few_labels((paths, twice), 1, 0)[1].tolist() == [[1, 1]]


def os_class(path):
    return ["blue", "green", "red"].index(path.decode().split("/")[-2])


def test_mean_and_deviation_are_those_of_all_pixels(colours):
    paths = probe.load(str(colours), 0)["val"][0]
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in map(bytes.decode, paths.tolist())]) / 255
    mean, std = probe.measure(paths)
    assert np.allclose(mean, pixels.mean(0)) and np.allclose(std, pixels.std(0))
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    white = torch.tensor([(1 - m) / s for m, s in zip(mean, std)])
    assert torch.allclose(evaluation.normalise(images, images.device, (mean, std))[0, :, 0, 0], white)


def test_the_centre_is_seven_eighths_of_the_shorter_side():
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[5:75, 25:95] = 200  # 70 x 70 in the middle
    path = "unused"
    crops = probe.Crops((np.array([path.encode()]), np.array([1])), 35, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe.data, "read_image", lambda _: Image.fromarray(pixels))
        crop, label, bad = crops[0]
    assert crop.shape == (35, 35, 3) and label == 1 and not bad
    assert (crop[1:-1, 1:-1] == 200).all() and (crop > 100).all()  # bilinear: the border mixes with what lies outside


def lists(root, tmp_path, test=True):
    """The colours as a multi-label set: red, or not blue; nothing is violet. Some marks are blank, -1 or u."""
    folder, rng = shutil.copytree(root, tmp_path / "lists"), np.random.default_rng(0)
    marks = {"red": ("1", "1.0"), "green": ("", "1"), "blue": ("-1", "U")}
    for part in ("train", "val", "test")[:2 + test]:
        files = sorted((folder / part).rglob("*.png"))
        rows = [f"{p.relative_to(folder)},{','.join(marks[p.parent.name])},0" for p in files]
        (folder / f"{part}.csv").write_text("\n".join(["path,red,warm,violet", *rng.permutation(rows)]))
    return folder


@pytest.mark.parametrize("name, more", [("linear", {}), ("linear", {"augmented": True, "probe_steps": 10}), ("finetune", {})])
def test_several_classes_an_image_are_told_apart(colours, tmp_path, name, more):
    folder = lists(colours, tmp_path)
    sets, log = probe.load(str(folder), 0), util.Log(tmp_path / "log.jsonl", 0)
    assert sets["names"] == ["red", "warm", "violet"] and sets["train"][1].shape == (36, 3)
    for path, row in zip(*sets["train"]):
        colour = path.decode().split("/")[-2]
        assert row.tolist() == [colour == "red", colour != "blue", 0]
    result = probe.evaluated(name, tmp_path / name, backbone(), "random", sets, {**C, **more}, CPU, log)
    assert result["mAUROC"] >= 0.95 and result["undefined"] == ["violet"] and result["per_class"]["violet"] is None
    assert "accuracy" not in result and json.loads((tmp_path / name / "stage.json").read_text())["result"] == result


def test_lists_of_labels_hold_out_a_tenth_and_keep_what_is_reported_on_apart(colours, tmp_path):
    folder = lists(colours, tmp_path, test=False)
    sets = probe.load(str(folder), 0)
    assert [len(sets[k][1]) for k in ("train", "val", "test")] == [32, 4, 12]
    assert not set(sets["val"][0]) & set(sets["train"][0])
    of = lambda: {p.decode().split("/")[-3] for p in hpt.image_paths(str(folder), "").tolist()}
    assert of() == {"train"}
    shutil.copy(folder / "val.csv", folder / "test.csv")
    assert of() == {"train", "val"}


def test_one_class_an_image_may_be_listed_too(colours, tmp_path):
    folder, sets = tmp_path / "listed", probe.load(str(colours), 0)
    folder.mkdir()
    for part in ("train", "val", "test"):  # absolute paths, as sources.py writes them
        rows = [f"{os.fsdecode(p)},{sets['names'][k]}" for p, k in zip(sets[part][0].tolist(), sets[part][1])]
        (folder / f"{part}.csv").write_text("\n".join(["path,label", *rows]))
    listed = probe.load(str(folder), 0)
    assert listed["names"] == sets["names"] and listed["train"][1].ndim == 1
    for part in ("train", "val", "test"):
        assert all((a == b).all() for a, b in zip(listed[part], sets[part]))
    assert len(hpt.image_paths(str(folder), "")) == len(sets["train"][1]) + len(sets["val"][1])
    (folder / "pretrain.txt").write_text("\n".join(map(os.fsdecode, sets["train"][0][:5].tolist())))
    assert len(hpt.image_paths(str(folder), "")) == 5


def test_the_papers_datasets_are_read_as_sources_writes_them(tmp_path):
    for part, count in (("train", 40), ("test", 4)):
        names = [f"clipart/{kind}/{part}_{i:03d}.jpg" for i in range(count) for kind in ("cat", "dog")]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / f"clipart_{part}.txt").write_text("".join(f"{n} {n.split('/')[1] == 'dog':d}\n" for n in names))
    sources.convert("domain_net_clipart", tmp_path, tmp_path / "out")
    sets, stage = probe.load(str(tmp_path / "out"), 0), hpt.image_paths(str(tmp_path / "out"), "").tolist()
    assert sets["names"] == ["cat", "dog"] and len(sets["test"][1]) == 8
    assert sum(len(sets[k][1]) for k in ("train", "val")) == 80 == len(stage)
    for path, label in (row for part in ("train", "val", "test") for row in zip(*sets[part])):
        assert os.fsdecode(path).split("/")[-2] == sets["names"][label]
    probe.check(["linear"], sets, 10, 0, [("out", hpt.image_paths(str(tmp_path / "out"), ""))])


@pytest.mark.parametrize("text, match", [
    ("", "train.csv cannot be read as csv"), ("file,a\nx.png,1", "begins with file,a; it wants path"),
    ("path", "begins with path"), ("path,a,a\nx.png,1,1", "begins with path,a,a"), ("path,a\nx.png,2", "line 2 .x.png.: it wants a path and 1 values"),
    ("path,a,b\nx.png,1", "it wants a path and 2 values"),
    ("path,b\nx.png,1", "val.csv begins with other columns than train.csv"), ("path,label\n,cat", "line 2 .*the name of a class"),
    ("path,a", "train.csv lists no image"),
    ("path,red,warm,violet\nx.png,1,0,0", None)])
def test_bad_lists_are_one_line(colours, tmp_path, text, match):
    folder = lists(colours, tmp_path, test=False)
    (folder / "train.csv").write_text(text)
    if match is None:  # a part in which no class is told from its absence
        (folder / "val.csv").write_text("path,red,warm,violet\nx.png,1,0,0")
        (folder / "test.csv").write_text("path,red,warm,violet\nx.png,1,0,0")
        match = "no class with and without images in the train part, 1 images"
    with pytest.raises(UserError, match=match) as error:
        probe.load(str(folder), 0)
    assert "\n" not in str(error.value)


def test_neighbours_want_one_class_an_image(colours, tmp_path):
    with pytest.raises(UserError, match="--eval knn wants one class an image"):
        hpt.main(["--stage", f"{colours}:9999", "--eval", "linear,knn", "--data", str(lists(colours, tmp_path)), "--batch", "8",
                  "--queue", "16", "--device", "cpu", "--out", str(tmp_path / "run")])


def test_unreadable_images_are_not_scored(colours, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(colours, folder)
    (folder / "test/red/0.png").write_bytes(b"no image")
    sets = probe.load(str(folder), 0)
    x, y = probe.features(backbone(), sets, "test", evaluation.IMAGENET, C, CPU, QUIET)
    assert len(x) == len(y) == 23 and (y >= 0).all()
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="no folder"):
        probe.load(str(folder), 0)
