"""Segmentation: the arithmetic against references, the masks' files, and the same promises of the pipeline as for detection."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

import augment
import data
import eval as evaluation
import models
import recipes
import runs
import segment
import show
import st
import voc
import world
from conftest import ROOT, killed, records, start
from util import UserError

TINY = ["--task", "seg", "--recipe", "seg-fine", "--data", "voc", "--image-size", "64", "--batch", "4", "--steps", "12",
        "--student-steps", "12", "--norm", "gn", "--precision", "fp32", "--threshold", "0.0", "--labeled", "0.5", "--lr", "1e-3", "--save-every", "4"]
CPU = (0, 1, torch.device("cpu"), torch.float32)


def voc_folder(root, train=24, val=8, classes=("ground", "dark", "bright")):
    """Images of 64 x 48 to 48 x 64 px with a dark and a bright square; the border of each square is ignored."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, n in (("train", train), ("val", val)):
        names = [f"{split}_{i}" for i in range(n)]
        for i, name in enumerate(names):
            h, w = (48, 64) if i % 2 else (64, 48)
            pixels, mask = rng.integers(90, 160, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8)
            for k, grey in ((1, 5), (2, 250)):
                x, y, side = *rng.integers(0, 24, 2), rng.integers(12, 24)
                mask[y:y + side, x:x + side], pixels[y:y + side, x:x + side] = 255, grey
                mask[y + 1:y + side - 1, x + 1:x + side - 1] = k
            Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=95)
            world.save_mask(mask, root / f"SegmentationClass/{name}.png")
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("voc") / "squares")


@pytest.fixture
def copy(tmp_path):
    """A folder of its own, to be damaged."""
    return voc_folder(tmp_path / "copy", train=8, val=4)


def settings(**flags):
    return {**recipes.settings(st.Config(task="seg", image_size=64, norm="gn", **flags), 1), "workers": 0}


# ---- scores ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_mean_iou_equals_its_definition_and_scikit_learns(seed):
    rng, K = np.random.default_rng(seed), 5
    truth, predicted = rng.integers(0, K, (2, 40, 50)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < .6, truth, predicted)
    truth[rng.random(truth.shape) < .1] = 255
    confusion = evaluation.confusion_matrix(predicted, truth, K).numpy()
    known = truth != 255
    assert (confusion == confusion_matrix(truth[known], predicted[known], labels=range(K))).all()
    got = evaluation.mean_iou(confusion, list("abcde"))
    one_line = np.mean([((truth == k) & (predicted == k)).sum() / (((truth == k) | (predicted == k)) & known).sum() for k in range(K)])
    assert got["mIoU"] == pytest.approx(one_line) == pytest.approx(jaccard_score(truth[known], predicted[known], average="macro"))
    assert got["accuracy"] == pytest.approx((truth == predicted)[known].mean())

def test_the_embedded_worlds_lists_are_pools_by_name_and_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(world.PARTS, "seg", {**world.PARTS["seg"], "splits": dict(train=(5, 4), aug=(7, 6), val=(6, 2))})
    flags = recipes.Config(task="seg", data="shapes", root=str(tmp_path), labeled=0.5)
    train, val = segment.load(flags)
    assert (len(train), len(val), train.class_names) == (4, 2, ["background", *world.CLASSES[:4]])
    both, _ = segment.load(replace(flags, train_list="trainaug"))  # aug has labels too
    assert len(both) == 10
    for unlabeled in ("", "aug"):
        paths = st.unlabelled_paths(replace(flags, unlabeled=unlabeled), train, [], [], val, None)
        assert [os.path.basename(p) for p in paths.tolist()] == [b"aug_%05d.jpg" % i for i in range(6)]
    pseudo = replace(flags, task="det", mode="pseudo", unlabeled="aug")  # the task is the checkpoint's
    assert st.given_images(pseudo, "seg").tolist() == paths.tolist()
    with pytest.raises(UserError, match="no image found at --unlabeled aug"):
        st.given_images(pseudo, "det")
    (tmp_path / "elsewhere/aug").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no image found at --unlabeled aug"):  # the user's own folder, though empty
        st.given_images(pseudo, "seg")


def test_a_class_that_is_neither_there_nor_predicted_does_not_count():
    truth = np.array([[0, 0, 1, 255]])
    got = evaluation.mean_iou(evaluation.confusion_matrix(np.array([[0, 1, 1, 2]]), truth, 3).numpy(), list("abc"))
    assert got["IoU"] == {"a": 0.5, "b": 0.5, "c": None} and got["mIoU"] == 0.5
    assert evaluation.mean_iou(np.zeros((3, 3), int), list("abc"))["mIoU"] == 0


# ---- network -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, published, flops", [("tf_efficientnet_b7", 71, 60), ("tf_efficientnet_l2", 485, 229)])
def test_nasfpn_segmenters_have_the_published_size(name, published, flops):
    """Table 6. Its parameters are those of the whole EfficientNet, the classifier that a segmenter leaves out included."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        net, classifier, images = models.Segmenter(name, 21).eval(), timm.create_model(name), torch.zeros(1, 3, 512, 512)
        ours = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.backbone.parameters())
        with FlopCounterMode(display=False) as counter:
            assert net(images).shape == (1, 21, 128, 128)
    assert (ours + sum(p.numel() for p in classifier.parameters())) / 1e6 == pytest.approx(published, rel=0.02)
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.02)


def nasfpn(seed=0):
    torch.manual_seed(seed)
    return models.NASFPN({3: 8, 4: 12, 5: 16}, 8, "gn", repeats=1).eval()


def pyramid(size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {l: torch.randn(1, c, size >> l, size >> l, generator=g) for l, c in ((3, 8), (4, 12), (5, 16))}


def test_a_nasfpn_cell_is_the_published_graph():
    """Written out here node by node, from the figure's list, with the network's own convolutions."""
    net, feats = nasfpn(), pyramid(256)
    got = net(feats)
    p3, p4, p5 = (lateral(feats[l]) for l, lateral in zip((3, 4, 5), net.lateral))
    p6 = F.max_pool2d(p5, 2)
    p7 = F.max_pool2d(p6, 2)
    up = lambda x, like: F.interpolate(x, like.shape[-2:], mode="nearest")
    down = lambda x, n: F.max_pool2d(x, 2 ** n)
    attend = lambda coarse, fine: coarse + fine * torch.sigmoid(coarse.flatten(2).max(2).values[..., None, None])
    c = [lambda x, block=block: block(x.clamp(min=0)) for block in net.cells[0]]
    n5 = c[0](attend(up(p6, p4), p4))
    n6 = c[1](p4 + n5)
    n7 = c[2](p3 + up(n6, p3))
    n8 = c[3](n6 + down(n7, 1))
    n9 = c[4](attend(down(n8, 1), down(n7, 2)) + p5)
    n10 = c[5](attend(down(n9, 2), down(n6, 3)) + p7)
    n11 = c[6](attend(up(n10, p6), down(n9, 1)))
    for ours, theirs in zip(got, (n7, n8, n9, n11, n10)):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("neck, levels", [("fpn", (2, 5)), ("nasfpn", (3, 7))])
@pytest.mark.parametrize("stride, h, w", [(4, 64, 96), (4, 65, 47), (1, 64, 96), (1, 66, 46)])
def test_logits_are_at_the_stride_for_any_size(neck, levels, stride, h, w):
    net = models.Segmenter("resnet10", 5, levels, 16, 1, neck, stride, "gn", "gn").eval()
    assert net(torch.zeros(2, 3, h, w)).shape == (2, 5, math.ceil(h / stride), math.ceil(w / stride))


# ---- loss --------------------------------------------------------------------------------------------------------

def batch(stride, n=6, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 4, (n, size, size), generator=g).byte()
    masks[torch.rand(masks.shape, generator=g) < .3] = 255
    return {"masks": masks, "part": torch.tensor([0, 1] * (n // 2))}, torch.randn(n, 4, size // stride, size // stride, generator=g)


@pytest.mark.parametrize("stride", [1, 4])
def test_loss_is_the_mean_cross_entropy_over_labelled_pixels_of_each_part(stride):
    b, logits = batch(stride)
    prepare, losses = segment.criterion({"stride": stride}, torch.device("cpu"))
    targets, pixels = prepare(b)
    each = losses(logits, targets, b["part"], pixels)  # (B, 1)
    mask = b["masks"].long() if stride == 1 else b["masks"][:, 2::4, 2::4].long()
    for part in (0, 1):
        rows = b["part"] == part
        assert each[rows].sum() == pytest.approx(F.cross_entropy(logits[rows], mask[rows], ignore_index=255).item(), rel=1e-5)


def test_loss_in_pieces_is_the_whole_and_images_without_labels_cost_nothing():
    b, logits = batch(4)
    b["masks"][2] = 255
    prepare, losses = segment.criterion({"stride": 4}, torch.device("cpu"))
    targets, pixels = prepare(b)
    whole = losses(logits, targets, b["part"], pixels)
    pieces = torch.cat([losses(logits[r], {"mask": targets["mask"][r]}, b["part"][r], pixels) for r in (slice(0, 2), slice(2, 6))])
    assert torch.allclose(whole, pieces) and whole[2] == 0 and (whole[[0, 1, 3]] > 0).all()
    b["masks"][:] = 255
    targets, pixels = prepare(b)
    assert losses(logits, targets, b["part"], pixels).sum() == 0


def test_soft_loss_is_the_cross_entropy_with_probabilities_and_that_of_hard_labels_where_they_are_certain():
    (b, logits), p = batch(1), torch.rand(6, 4, 32, 32, generator=torch.Generator().manual_seed(1)).softmax(1)
    prepare, losses = segment.criterion({"stride": 1}, torch.device("cpu"))
    hard = losses(logits, *(lambda t, n: (t, b["part"], n))(*prepare(b)))
    known = (b["masks"] != 255)[:, None]
    b["soft"] = (255 * p).round().byte() * known
    b["soft"][0::2] = 0  # the human half
    each = losses(logits, *(lambda t, n: (t, b["part"], n))(*prepare(b)))
    assert torch.equal(each[0::2], hard[0::2])
    reference = F.cross_entropy(logits[1::2], b["soft"][1::2] / b["soft"][1::2].sum(1, keepdim=True).clamp(min=1), reduction="none")
    assert each[1::2].sum() == pytest.approx((reference[known[1::2, 0]].mean()).item(), rel=1e-5)
    b["soft"] = 255 * (F.one_hot(b["masks"].long().clamp(max=3)).permute(0, 3, 1, 2) * known).byte()
    assert torch.allclose(losses(logits, *(lambda t, n: (t, b["part"], n))(*prepare(b))), hard, rtol=1e-5)


@pytest.mark.parametrize("policy", ["s1", "s2", "s3", "s4"])
def test_soft_labels_move_as_their_mask_does(squares, tmp_path, policy):
    pseudo = replace(voc.load_voc(squares, "train"), soft=True)
    folder = tmp_path / "masks"
    folder.mkdir()
    for i in range(4):
        mask = voc.read_mask(pseudo.mask_path(i), 3)
        world.save_mask(mask, folder / f"{i}.png")
        segment.save_soft(np.stack([255 * (mask == k) for k in range(3)]).astype(np.uint8), folder / f"{i}.npz")
    pseudo.masks = np.array([os.fsencode(folder / f"{i}.png") for i in range(4)])
    hard, soft = (data.TrainImages([part], policy, 48, seed=3) for part in (replace(pseudo, soft=False), pseudo))
    for key in [(0, step, 0, step % 4) for step in range(12)]:
        (image, target, *_), (same, moved, *_) = hard[key], soft[key]
        assert image.tobytes() == same.tobytes() and moved["mask"].dtype == np.uint8
        assert np.array_equal(moved["mask"], target["mask"])
        assert np.array_equal(moved["soft"], np.stack([255 * (target["mask"] == k) for k in range(3)]))


# ---- prediction --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def net():
    return st.build(settings(), 3).eval()


def test_one_scale_is_multi_scale_with_that_scale_and_probabilities_are_the_networks(net, squares):
    c, val = settings(), voc.load_voc(squares, "val")
    (i, once, size), (_, twice, _) = (next(segment.probabilities(net, val, [3], c, CPU, scales)) for scales in ((1.0,), (1.0, 1.0)))
    assert i == 3 and torch.allclose(once, twice, atol=1e-6)
    sure, index = segment.decide(once, size)
    assert (index == once.argmax(0)).all() and torch.allclose(sure, once.max(0).values)
    image = val.read(3)[0]
    canvas, _, scale = augment.fit(image, data.nothing(3), 64)
    with torch.no_grad():
        logits = net(evaluation.normalise(torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)[None], torch.device("cpu")))
    want = F.interpolate(logits, (64, 64), mode="bilinear").softmax(1)[0, :, :image.height, :image.width]
    assert once.shape == (3, image.height, image.width) and scale == 1 and torch.allclose(once, want, atol=1e-5)
    assert torch.allclose(once.sum(0), torch.ones(()), atol=1e-5)


def test_scales_are_averaged_and_flip_makes_the_answer_symmetric(net, squares):
    c, val = settings(), voc.load_voc(squares, "val")
    several = next(segment.probabilities(net, val, [0], c, CPU, (0.5, 1.0, 1.5)))[1]
    mean = sum(next(segment.probabilities(net, val, [0], c, CPU, (s,)))[1] for s in (0.5, 1.0, 1.5)) / 3
    assert torch.allclose(several, mean, atol=1e-5)
    square = [np.zeros((64, 64, 3), np.uint8)]
    square[0][20:40, 28:36] = 255  # its own mirror image
    Image.fromarray(square[0]).save(squares / "mirror.png")
    paths = np.array([str(squares / "mirror.png").encode()])
    flipped = next(segment.probabilities(net, paths, [0], c, CPU, (1.0,), flip=True))[1]
    assert torch.allclose(flipped, flipped.flip(2), atol=1e-5)
    assert not torch.allclose(*(lambda p: (p, p.flip(2)))(next(segment.probabilities(net, paths, [0], c, CPU))[1]), atol=1e-4)


def test_images_larger_than_the_canvas_are_answered_at_their_own_size(net, tmp_path):
    Image.new("RGB", (150, 90)).save(tmp_path / "large.png")
    _, found, size = next(segment.probabilities(net, np.array([str(tmp_path / "large.png").encode()]), [0], settings(), CPU))
    assert found.shape == (3, 38, 64) and size == [90, 150]
    whole = F.interpolate(found[None], size, mode="bilinear", align_corners=False)[0]
    sure, index = segment.decide(found, size)
    assert (index == whole.argmax(0)).all() and torch.allclose(sure, whole.max(0).values)


# ---- files -------------------------------------------------------------------------------------------------------

def test_masks_survive_being_saved_with_vocs_palette(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    world.save_mask(mask, tmp_path / "m.png")
    assert (voc.read_mask(tmp_path / "m.png", 255) == mask).all()
    image = Image.open(tmp_path / "m.png")
    assert image.mode == "P" and image.getpalette()[3:9] == [128, 0, 0, 0, 128, 0] and image.getpalette()[45:48] == [192, 128, 128]


def test_lists_classes_and_other_mask_folders(squares, tmp_path):
    train = voc.load_voc(squares, "train")
    assert len(train) == 24 and train.class_names == ["ground", "dark", "bright"] and train.ids[0] == "train_0"
    image, target = train.subset([5, 1]).read(1)
    assert image.size == (target["mask"].shape[1], target["mask"].shape[0]) and set(np.unique(target["mask"])) == {0, 1, 2, 255}
    root = voc_folder(tmp_path / "plain", 2, 1)
    (root / "classes.txt").unlink()
    assert voc.load_voc(root, "val").class_names == voc.VOC_CLASSES and len(voc.VOC_CLASSES) == 21
    (root / "SegmentationClass").rename(root / "SegmentationClass7")
    (root / "classes7.txt").write_text("a\nb\nc\n")
    assert voc.load_voc(root, "val", "SegmentationClass7").class_names == ["a", "b", "c"]
    (root / "SegmentationClass7").rename(root / "SegmentationClassAug")
    assert "SegmentationClassAug" in voc.load_voc(root, "train").mask_path(0)


def test_aug_images_serve_as_labels_or_as_unlabelled_images(copy, tmp_path):
    lists = copy / "ImageSets/Segmentation"
    names = (lists / "train.txt").read_text().split()
    (lists / "train.txt").write_text("\n".join(names[:4]))
    (lists / "aug.txt").write_text("\n".join(names[4:]))
    (lists / "trainaug.txt").write_text("\n".join(names))
    for flags, labelled, unlabelled in ((("--train-list", "trainaug", "--mode", "train"), 8, 0), (("--unlabeled", "aug"), 4, 4)):
        out = tmp_path / str(labelled)
        st.main([*TINY, "--root", str(copy), "--out", str(out), "--labeled", "1", "--steps", "1", "--workers", "0", *flags])
        assert len(json.loads((out / "split.json").read_text())["labeled"]) == labelled
        if unlabelled:
            rows = json.loads((out / "pseudo/pseudo.json").read_text())["images"]
            assert sorted(row["file"].split("/")[-1][:-4] for row in rows) == sorted(names[4:])


def test_the_worlds_masks_are_those_of_its_objects(tmp_path):
    root = world.build(tmp_path, "seg", {"train": 6, "aug": 2, "val": 2})
    train = voc.load_voc(root, "train")
    assert train.class_names == ["background", *world.CLASSES[:4]] and len(voc.load_voc(root, "val")) == 2
    for i in range(6):
        image, boxes, labels, mask = world.draw(world.SEED, "train", i, "seg")
        got = train.read(i)[1]["mask"]
        assert (got == mask).all() and set(np.unique(got)) - {0} == {k + 1 for k in labels}


def test_train_batches_hold_masks_as_augmented(squares):
    train = voc.load_voc(squares, "train")
    b = next(iter(data.train_loader([train], [4], 0, 1, 1, 0, 1, "s4", 64, 0, 0)))
    assert b["masks"].shape == (4, 64, 64) and b["masks"].dtype == torch.uint8 and set(b["masks"].unique().tolist()) <= {0, 1, 2, 255}
    row = next(iter(data.train_loader([train], [4], 0, 1, 1, 0, 1, "s1", 64, 0, 0)))
    for image, mask in zip(row["images"], row["masks"]):  # dark is class 1 and bright class 2, after flip, crop and resizing too
        grey = image.float().mean(0)
        assert grey[mask == 1].median() < 60 and (not (mask == 2).any() or grey[mask == 2].median() > 190)


# ---- bad input ---------------------------------------------------------------------------------------------------

def damage(root, name, kind):
    path = root / f"SegmentationClass/{name}.png"
    if kind == "another size":
        world.save_mask(np.zeros((20, 30), np.uint8), path)
    elif kind == "a class too many":
        world.save_mask(np.full(voc.read_mask(path, 256).shape, 3, np.uint8), path)
    elif kind == "rgb":
        Image.open(path).convert("RGB").save(path)
    elif kind == "garbage":
        path.write_bytes(b"no image")
    else:
        path.unlink()


WRONG = [("another size", "30x20"), ("a class too many", "class 3, but there are only 3"), ("rgb", "RGB image; a mask holds"),
         ("garbage", "cannot identify")]


@pytest.mark.parametrize("kind, match", WRONG)
def test_a_bad_mask_is_named_and_replaced_and_many_stop_the_run_in_one_line(copy, tmp_path, kind, match, capsys):
    damage(copy, "train_0", kind)
    damage(copy, "val_0", kind)
    train = voc.load_voc(copy, "train")
    with pytest.raises(data.BadImage, match=match):
        train.read(0)
    out = tmp_path / "run"
    st.main([*TINY, "--root", str(copy), "--out", str(out), "--labeled", "1", "--mode", "train", "--steps", "3", "--workers", "0"])
    assert "train_0" in (out / "teacher/quarantine.txt").read_text() and "not scored" in capsys.readouterr().out
    for i in range(8):
        damage(copy, f"train_{i}", kind)
    with pytest.raises(UserError, match="unusable"):
        st.main([*TINY, "--root", str(copy), "--out", str(tmp_path / "two"), "--labeled", "1", "--mode", "train", "--workers", "0"])
    done = subprocess.run([sys.executable, ROOT / "voc.py", copy], capture_output=True, text=True)
    assert done.returncode == 2 and "9 unusable" in done.stderr and len(re.findall(match.split(",")[0], done.stdout)) == 9


@pytest.mark.parametrize("change, match", [
    (lambda root: damage(root, "train_1", "missing"), r"1 of 8 listed files .*SegmentationClass/train_1.png"),
    (lambda root: (root / "JPEGImages/val_2.jpg").unlink(), r"1 of 4 listed files .*JPEGImages/val_2.jpg"),
    (lambda root: (root / "ImageSets/Segmentation/val.txt").unlink(), "no list at .*val.txt"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text(""), "train.txt is empty"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("../../secret"), "leaves the image folder"),
])
def test_incomplete_folders_are_refused_in_one_line(copy, tmp_path, change, match):
    change(copy)
    with pytest.raises(UserError, match=match) as error:
        st.main([*TINY, "--root", str(copy), "--out", str(tmp_path / "run"), "--workers", "0"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, match", [
    (("--threshold", "auto"), "auto is for detection"), (("--scales", "1,big"), "--scales 1,big is not a list of numbers"),
    (("--task", "det", "--data", "shapes", "--recipe", "tiny", "--soft"), "are for --task seg"), (("--eval-every", "-1"), "too small"), (("--data", "coco"), "is not for --task seg"),
    (("--recipe", "coco-b7"), "is for --task det"), (("--backbone", "spinenet49"), "is for detection")])
def test_flags_of_the_other_task_are_refused(squares, tmp_path, flags, match):
    with pytest.raises(UserError, match=match):
        st.main([*TINY, "--root", str(squares), "--out", str(tmp_path / "run"), *flags])


# ---- the pipeline ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(squares, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start(*TINY, "--root", squares, "--out", out, "--workers", "1", "--control")
    assert done.returncode == 0, done.stderr
    return out


def test_pipeline_scores_every_stage_and_leaves_masks_and_a_report(finished):
    results = json.loads((finished / "results.json").read_text())
    for stage in ("teacher", "student", "control"):
        assert 0 <= results[stage]["mIoU"] <= 1 and set(results[stage]["IoU"]) == {"ground", "dark", "bright"}
    listed = json.loads((finished / "pseudo/pseudo.json").read_text())
    assert len(listed["images"]) == 12 and listed["info"]["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    pseudo = voc.load_pseudo_masks(finished / "pseudo/pseudo.json", ["ground", "dark", "bright"])
    image, target = pseudo.read(0)
    assert image.size[::-1] == target["mask"].shape and (target["mask"] < 3).all()  # threshold 0: every pixel is labelled
    assert "pseudo-labelled images" in (finished / "report.html").read_text() and (finished / "pseudo_sheet.png").exists()


def test_threshold_ignores_what_the_teacher_is_not_sure_of(finished, squares, tmp_path):
    out = tmp_path / "labels"
    st.main(["--mode", "pseudo", "--ckpt", str(finished / "teacher"), "--unlabeled", str(squares / "JPEGImages"), "--out", str(out),
             "--threshold", "0.45", "--workers", "0", "--precision", "fp32"])
    state = runs.load_checkpoint(finished / "teacher")
    net = st.build(state["config"], 3)
    net.load_state_dict(state["model"])
    rows = json.loads((out / "pseudo.json").read_text())["images"]
    kept = []
    for row in rows[:3]:
        _, found, size = next(segment.probabilities(net, np.array([row["file"].encode()]), [0], {**state["config"], "workers": 0},
                                                    CPU, (0.5, 0.75, 1, 1.25, 1.5, 1.75)))
        mask, (sure, index) = voc.read_mask(out / row["mask"], 3), segment.decide(found, size)
        assert (mask == torch.where(sure >= .45, index, 255).numpy()).mean() > .999  # but for ties of rounding between batches
        kept.append((mask != 255).mean())
    assert 0 < np.mean(kept) < 1


@pytest.mark.parametrize("content", [None, b"junk", b"PK\x03\x04 half a zip"])
def test_probabilities_that_cannot_be_read_are_a_bad_image(squares, tmp_path, content):
    part = replace(voc.load_voc(squares, "val"), soft=True)
    world.save_mask(voc.read_mask(part.mask_path(0), 3), tmp_path / "0.png")
    part.masks = np.array([os.fsencode(tmp_path / "0.png")])
    if content:
        (tmp_path / "0.npz").write_bytes(content)
    with pytest.raises(data.BadImage, match="0.npz"):
        part.read(0)


def test_a_student_of_soft_labels_and_what_they_are(finished, squares, tmp_path):
    out = tmp_path / "soft"
    shutil.copytree(finished / "teacher", out / "teacher")
    st.main([*TINY, "--root", str(squares), "--out", str(out), "--workers", "0", "--soft", "--threshold", "0.4"])
    rows = json.loads((out / "pseudo/pseudo.json").read_text())
    pseudo, kept = voc.load_pseudo_masks(out / "pseudo/pseudo.json", ["ground", "dark", "bright"]), []
    assert rows["info"]["soft"] and pseudo.soft
    for i in range(3):
        target = pseudo.read(i)[1]
        assert (abs(target["soft"].astype(int).sum(0) - 255) <= 2).all() and target["soft"].shape[1:] == target["mask"].shape
        known = target["mask"] != 255
        assert (target["soft"].argmax(0) == target["mask"])[known].mean() > .99 and (target["soft"].max(0)[known] >= 101).all()
        kept.append(known.mean())
    assert 0 < np.mean(kept) < 1 and records(out, "student")[12]["ce_pseudo"] > 0
    with pytest.raises(UserError, match="soft: True -> False"):
        st.main([*TINY, "--root", str(squares), "--out", str(out), "--workers", "0", "--threshold", "0.4"])


def test_killed_in_training_saving_and_labelling_it_ends_with_the_same_bits(squares, finished, tmp_path):
    args = [*TINY, "--root", str(squares), "--out", str(tmp_path / "run"), "--workers", "1", "--control"]
    for place, count in (("torch.optim.AdamW.step", 6), ("os.replace", 4), ("world.save_mask", 3), ("world.save_mask", 5),
                         ("torch.optim.AdamW.step", 7)):
        assert killed(tmp_path, (place,), count, *args)
    done = start(*args)
    assert done.returncode == 0, done.stderr
    for stage in ("teacher", "student", "control"):
        a, b = (runs.load_latest(run / stage)["model"] for run in (finished, tmp_path / "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), stage
    for mask in (finished / "pseudo/masks").iterdir():
        assert mask.read_bytes() == (tmp_path / "run/pseudo/masks" / mask.name).read_bytes()


def test_two_processes_are_one(squares, finished, tmp_path):
    """Same split and losses; then, from one checkpoint, the same masks and the same scores."""
    done = start(*TINY, "--root", squares, "--out", tmp_path / "two", "--workers", "0", "--mode", "train", processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two/split.json").read_text() == (finished / "split.json").read_text()
    one, other = records(finished, "teacher"), records(tmp_path / "two", "teacher")
    for step in range(1, 11):
        assert one[step]["ce"] == pytest.approx(other[step]["ce"], abs=1e-4), step
    scores, masks = [], []
    for n in (1, 2):
        done = start("--task", "seg", "--mode", "eval", "--ckpt", finished / "student", "--data", "voc", "--root", squares,
                     "--workers", "0", "--precision", "fp32", processes=n)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout[done.stdout.index("{"):]))
        out = tmp_path / f"labels{n}"
        done = start("--mode", "pseudo", "--ckpt", finished / "teacher", "--unlabeled", squares / "JPEGImages", "--out", out,
                     "--threshold", "0.4", "--workers", "0", "--precision", "fp32", processes=n)
        assert done.returncode == 0, done.stderr
        masks.append({p.name: p.read_bytes() for p in (out / "masks").iterdir()})
        assert (out / "pseudo.json").exists()
    assert scores[0] == scores[1] and masks[0] == masks[1] and len(masks[0]) == 32


def test_pseudo_labels_of_a_single_class_are_refused(copy, tmp_path):
    for path in (copy / "SegmentationClass").iterdir():
        world.save_mask(np.zeros((48, 64) if Image.open(path).size == (64, 48) else (64, 48), np.uint8), path)
    with pytest.raises(UserError, match="every kept pixel of .*pseudo is ground: the teacher has not learnt"):
        st.main([*TINY, "--root", str(copy), "--out", str(tmp_path / "run"), "--workers", "0", "--lr", "1e-2"])


def test_other_thresholds_and_classes_on_finished_labels_are_refused(finished, squares, tmp_path):
    with pytest.raises(UserError, match="threshold: 0.0 -> 0.3"):
        st.main([*TINY, "--root", str(squares), "--out", str(finished), "--control", "--threshold", "0.3", "--workers", "0"])
    other = voc_folder(tmp_path / "other", 2, 2, ("a", "b", "c"))
    with pytest.raises(UserError, match="other classes"):
        st.main(["--task", "seg", "--mode", "eval", "--ckpt", str(finished / "student"), "--data", "voc", "--root", str(other)])


def test_masks_of_other_meaning_are_other_data(squares, finished, tmp_path):
    """Same lists, other masks or names: not the run that was begun."""
    for change in (lambda root: (root / "classes.txt").write_text("ground\nblack\nwhite\n"),
                   lambda root: damage(root, "train_3", "another size")):
        root = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(squares, root)
        change(root)
        with pytest.raises(UserError, match="begun with other settings .*masks"):
            st.main([*TINY, "--root", str(root), "--out", str(finished), "--control", "--workers", "0"])


def test_a_half_without_labels_does_not_upset_the_joint_loss(copy, tmp_path):
    """Pseudo-labels of one pixel an image: most steps see none. The ratio of the losses must not explode."""
    out = tmp_path / "run"
    flags = [*TINY, "--root", str(copy), "--out", str(out), "--workers", "0"]
    st.main([*flags, "--mode", "train"])
    st.main(flags)  # to have the stage's record
    for path in (out / "pseudo/masks").iterdir():
        mask = np.full(voc.read_mask(path, 3).shape, 255, np.uint8)
        mask[0, 0] = 1
        world.save_mask(mask, path)
    shutil.rmtree(out / "student")
    st.main(flags)
    assert all(line["loss"] < 20 for line in records(out, "student").values())


@pytest.mark.parametrize("text, match", [("a\nb\na\n", "different classes"), ("a\n", "2 to 255"), ("\n".join(map(str, range(256))), "255")])
def test_class_lists_that_cannot_be_are_refused(copy, text, match):
    (copy / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=match):
        voc.load_voc(copy, "val")


def test_list_lines_with_folders_or_columns_are_refused(copy):
    for line in ("/JPEGImages/a.jpg /SegmentationClassAug/a.png", "a\t1", "train_0.jpg"):
        (copy / "ImageSets/Segmentation/train.txt").write_text(line)
        with pytest.raises(UserError, match="one image name a line"):
            voc.load_voc(copy, "train")


def test_the_data_must_fit_the_task_of_the_checkpoint(finished, squares):
    with pytest.raises(UserError, match="--data coco is not for --task seg"):
        st.main(["--mode", "eval", "--ckpt", str(finished / "student"), "--data", "coco", "--root", str(squares)])


def test_batch_scales_the_students_of_pascal_l2_as_well():
    c = recipes.settings(st.Config(task="seg", recipe="pascal-l2", batch=16), 1)
    assert (c["batch"], c["student_batch"]) == (16, 8) and st.scaled_lr(c) == pytest.approx(0.2 / 16)


def test_masks_are_drawn_over_their_image():
    image, mask = Image.new("RGB", (4, 1), (100, 100, 100)), np.array([[0, 1, 2, 255]], np.uint8)
    drawn = np.asarray(show.draw_mask(image, mask))[0]
    assert (drawn[0] == 100).all() and (drawn[3] > 200).all() and len({tuple(p) for p in drawn.tolist()}) == 4
