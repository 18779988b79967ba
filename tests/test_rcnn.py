"""rcnn.py, export.py: parity with a Faster R-CNN of torchvision's own parts, what trains, the pipeline, names for others."""
import json

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import roi_align

import backbones
import data
import eval as evaluation
import export
import masks
import rcnn
import recipes
import runs
import st
import world
from conftest import records, start
from recipes import Config
from test_st import squares  # noqa: F401  a COCO folder of dark and bright squares
from util import UserError

CPU = torch.device("cpu")


def settings(recipe="tiny-c4", ranks=1, **flags):
    return recipes.settings(Config(recipe=recipe, **flags), ranks)


def sample(size=64, counts=(2, 0, 1), seed=0):
    """A batch as from the loader, with so many boxes in each image."""
    g, M = torch.Generator().manual_seed(seed), max(counts)
    low = torch.rand(len(counts), M, 2, generator=g) * size / 2
    boxes = torch.cat([low, low + size * (0.2 + 0.3 * torch.rand(len(counts), M, 2, generator=g))], 2)
    labels = torch.randint(0, 3, (len(counts), M), generator=g)
    labels[torch.arange(M) >= torch.tensor(counts)[:, None]] = -1
    images = torch.randint(0, 256, (len(counts), 3, size, size), generator=g, dtype=torch.uint8)
    return {"images": images, "boxes": boxes, "labels": labels, "part": torch.zeros(len(counts), dtype=torch.int64)}


def outline(seen):
    """A mask (h, w) as COCO's files have it."""
    rle = coco_mask.encode(np.asfortranarray(seen.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def losses_for(net, batch, c):
    prepare, losses = st.TASKS["det"].criterion(c, CPU)
    targets, images = prepare(batch)
    out = net(evaluation.normalise(batch["images"], CPU), *[batch[k] for k in net.inputs])
    return losses(out, targets, batch["part"], images)


# ---- parity with torchvision -------------------------------------------------------------------------------------

class AlignedCrop(nn.Module):
    def forward(self, features, regions, _):
        return roi_align(features["0"], regions, 14, 1 / 16, 0, aligned=True)


@pytest.fixture(scope="module")
def pair():
    """(torchvision's FasterRCNN around torchvision's resnet50, C4 as backbone, res5 + norm as head; ours with its weights)."""
    torch.manual_seed(0)
    body = torchvision.models.resnet50(weights=None)
    stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2, body.layer3)
    stem.out_channels = 1024
    theirs = FasterRCNN(
        stem, None, 96, 96, [0.0] * 3, [1.0] * 3, AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=30, rpn_pre_nms_top_n_test=80, rpn_post_nms_top_n_test=20,
        box_head=nn.Sequential(body.layer4, nn.BatchNorm2d(2048), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        box_predictor=FastRCNNPredictor(2048, 4))
    theirs.roi_heads.box_roi_pool = AlignedCrop()
    for m in theirs.modules():  # random numbers that matter: signals neither vanish nor explode, scores differ
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 0.6), nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1), nn.init.uniform_(m.running_var, 0.5, 2)
    for layer, std in ((theirs.rpn.head.cls_logits, 0.3), (theirs.rpn.head.bbox_pred, 0.1),
                       (theirs.roi_heads.box_predictor.cls_score, 0.2), (theirs.roi_heads.box_predictor.bbox_pred, 0.2)):
        nn.init.normal_(layer.weight, std=std), nn.init.normal_(layer.bias, std=0.1)
    ours = rcnn.RCNN("resnet50", 3, (16, 32, 64), 512, 14, (100, 30, 80, 20))
    state = {f"backbone.{k}": v for k, v in body.state_dict().items() if not k.startswith("fc.")}
    for prefix, part in (("rpn.", theirs.rpn), ("norm.", theirs.roi_heads.box_head[1]),
                         ("roi.box_predictor.", theirs.roi_heads.box_predictor)):
        state.update({prefix + k: v for k, v in part.state_dict().items()})
    ours.load_state_dict(state)
    return theirs.eval(), ours.eval()


@torch.no_grad()
def test_regions_and_detections_equal_torchvisions(pair):
    theirs, ours = pair
    images, kept = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)), {}
    hook = theirs.rpn.register_forward_hook(lambda *args: kept.update(regions=args[2][0]))
    want, out = theirs(list(images)), ours(images)
    hook.remove()
    assert torch.allclose(out["regions"], torch.cat(kept["regions"]), atol=1e-3)
    assert out["image"].tolist() == [i for i, r in enumerate(kept["regions"]) for _ in r] and len(out["image"]) > 20
    for mine, other in zip(ours.decode(out, torch.tensor([[96, 96], [96, 96]])), want):
        assert len(other["scores"]) > 5 and len(other["labels"].unique()) > 1
        assert torch.allclose(mine["boxes"], other["boxes"], atol=1e-2)
        assert torch.allclose(mine["scores"], other["scores"], atol=1e-4)
        assert torch.equal(mine["labels"], other["labels"] - 1)  # their class 0 is the background


@torch.no_grad()
def test_the_loss_of_an_image_is_torchvisions_for_it_alone(pair):
    theirs, ours = pair
    for net, roi in ((theirs, theirs.roi_heads), (ours, ours.roi)):
        for part in (net.rpn, roi):  # norms stay in eval mode: images do not see each other
            part.training = True
            part.fg_bg_sampler.batch_size_per_image = 10 ** 6  # all are drawn, so the draws do not matter
    theirs.training = True
    batch, c = sample(96), {**settings(), "anchors": (16, 32, 64), "proposals": (100, 30, 80, 20)}
    rows = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    prepare, _ = rcnn.criterion(c, CPU)
    targets, images = prepare(batch)
    rpn = rcnn.region_proposals(c["anchors"], c["proposals"])
    rpn.fg_bg_sampler.batch_size_per_image = 10 ** 6
    mine = rcnn.losses_of(ours(rows, batch["boxes"], batch["labels"]), targets, batch["part"], images, rpn)
    assert images.tolist() == [3, 0, 0]
    for i, (boxes, labels) in enumerate(zip(batch["boxes"], batch["labels"])):
        want = theirs([rows[i]], [{"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}])
        assert mine[i, 0] * 3 == pytest.approx(float(want["loss_objectness"] + want["loss_classifier"]), rel=1e-4)
        assert mine[i, 1] * 3 == pytest.approx(float(want["loss_rpn_box_reg"] + want["loss_box_reg"]), rel=1e-4, abs=1e-6)
    assert (mine[:, 1] > 0).tolist() == [True, False, True]  # the second image has no box


# ---- what trains -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)], ids=["boxes", "no boxes"])
def test_a_step_changes_every_parameter_and_its_loss_is_finite(counts):
    c = settings(image_size=64)
    net, batch = st.build(c, 3).train(), sample(64, counts)
    before, optimizer = {k: v.clone() for k, v in net.named_parameters()}, st.make_optimizer(net, {**c, "weight_decay": 0.0})
    losses = losses_for(net, batch, c)
    losses.sum().backward()
    assert losses.shape == (3, 2) and losses.isfinite().all() and (losses[:, 0] > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    untaught = ("bbox_pred",) if not any(counts) else ()  # nothing says what a box should be
    assert all(p.grad.any() or any(u in k for u in untaught) for k, p in net.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    assert all(not torch.equal(before[k], v) or any(u in k for u in untaught) for k, v in net.named_parameters())


def test_norms_are_trained_or_those_of_the_backbone_frozen_but_never_the_extra_one():
    for norm, of_backbone in (("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm), ("frozen", backbones.FrozenBatchNorm2d)):
        net = st.build({**settings(), "norm": norm, "init": "file"}, 3)
        own = {type(m) for m in net.backbone.modules() if "Norm" in type(m).__name__}
        assert own == {of_backbone} and isinstance(net.norm, nn.GroupNorm if norm == "gn" else nn.BatchNorm2d)
        assert net.norm.weight.shape == (net.backbone.channels[5],) and all(p.requires_grad for p in net.parameters())
        st.check_trainable(net, {"norm": norm, "init": "file"})


def test_the_extra_norm_follows_res5_and_precedes_the_mean():
    net, seen = st.build(settings(image_size=64), 3).eval(), {}
    hooks = [m.register_forward_hook(lambda _, args, out, k=k: seen.update({k: (args[0], out)}))
             for k, m in (("res5", net.backbone.layer4), ("norm", net.norm), ("score", net.roi.box_predictor))]
    with torch.no_grad():
        out = net(torch.randn(1, 3, 64, 64))
    assert seen["res5"][0].shape[1:] == (128, 8, 8) and seen["res5"][1].shape[1:] == (256, 4, 4)
    assert torch.equal(seen["norm"][0], seen["res5"][1]) and torch.equal(seen["score"][0], seen["norm"][1].mean((2, 3)))
    assert len(seen["norm"][0]) == len(out["regions"]) and len(hooks) == 3


def test_it_learns_one_image_of_the_embedded_world(tmp_path):
    image, boxes, labels, classes = world.draw(world.SEED, "train", 3)
    assert len(boxes) > 1 and image.size == (128, 128)
    batch = {"images": torch.from_numpy(np.array(image)).permute(2, 0, 1).repeat(2, 1, 1, 1),
             "part": torch.zeros(2, dtype=torch.int64), "boxes": torch.from_numpy(boxes).repeat(2, 1, 1),
             "labels": torch.from_numpy(labels).repeat(2, 1)}
    seen = [np.zeros_like(classes) for _ in boxes]
    for one, (x0, y0, x1, y1), k in zip(seen, boxes.astype(int), labels):  # its pixels: what is of its class inside its box
        one[y0:y1, x0:x1] = classes[y0:y1, x0:x1] == k + 1
    places = 256 + torch.arange(len(boxes))
    batch.update(number=places.repeat(2, 1),
                 numbers=torch.stack([n * torch.from_numpy(one).int() for n, one in zip(places, seen)]).amax(0).repeat(2, 1, 1))
    c = {**settings(norm="gn"), "instances": True}
    net, dtype = st.build(c, len(world.CLASSES)).train(), torch.bfloat16
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(120):
        with torch.autocast("cpu", dtype):
            loss = losses_for(net, batch, c).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
    image.save(tmp_path / "1.png")
    rows = [{"id": i + 1, "image_id": 1, "category_id": int(k), "bbox": np.concatenate([b[:2], b[2:] - b[:2]]).tolist(),
             "segmentation": outline(one)} for i, (b, k, one) in enumerate(zip(boxes, labels, seen))]
    (tmp_path / "val.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.png", "height": 128, "width": 128}], "annotations": rows,
        "categories": [{"id": k, "name": name} for k, name in enumerate(world.CLASSES)]}))
    val, log = data.load_coco(tmp_path / "val.json", tmp_path), st.util.Log(None, 0)
    scores = st.TASKS["det"].evaluate(net, {**c, "workers": 0}, val, (0, 1, CPU, torch.float32), log)
    assert scores["AP"] > 0.7 and scores["mask AP"] > 0.5, scores


# ---- the pipeline ------------------------------------------------------------------------------------------------

FLAGS = ["--model", "rcnn-c4", "--data", "coco", "--batch", "4", "--threshold", "0.0", "--labeled", "0.5", "--precision", "fp32",
         "--workers", "0", "--save-every", "1", "--steps", "3"]


def test_teacher_pseudo_labels_and_student_resume_with_the_same_bits(squares, tmp_path, monkeypatch):  # noqa: F811
    args = [*FLAGS, "--image-size", "64", "--root", str(squares)]
    st.main([*args, "--out", str(tmp_path / "whole")])
    step, left = torch.optim.AdamW.step, [5]  # killed in the student's second step

    def mortal(*a, **k):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(*a, **k)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", mortal)
        st.main([*args, "--out", str(tmp_path / "cut")])
    assert runs.load_latest(tmp_path / "cut/student")["step"] == 1
    st.main([*args, "--out", str(tmp_path / "cut")])
    whole, cut = (json.loads((tmp_path / k / "results.json").read_text()) for k in ("whole", "cut"))
    assert whole["student"]["weights"] == cut["student"]["weights"] and 0 <= whole["student"]["AP"] <= 1
    assert json.loads((tmp_path / "whole/pseudo/pseudo.json").read_text())["annotations"]


def test_two_processes_are_one_where_nothing_is_drawn(squares, tmp_path):  # noqa: F811
    """At 32 px there are fewer anchors and regions than would be sampled, so all are."""
    args = [*FLAGS, "--image-size", "32", "--root", squares, "--mode", "train", "--norm", "gn"]
    st.main([*map(str, args), "--out", str(tmp_path / "1")])
    done = start(*args, "--out", tmp_path / "2", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (records(tmp_path / k, "teacher") for k in "12")
    assert set(one) == set(two) == {1, 2, 3}
    assert all(two[k][name] == pytest.approx(one[k][name], rel=1e-4) for k in one for name in ("loss", "cls", "box"))


def test_a_backbone_of_hpt_fills_c4_and_the_head(tmp_path):
    given, net = backbones.build("resnet10"), st.build(settings(), 3)
    torch.save({"model": given.state_dict(), "about": {"backbone": "resnet10"}}, tmp_path / "backbone.pt")  # as hpt.py writes it
    assert not torch.equal(net.backbone.layer4[0].conv1.weight, given.layer4[0].conv1.weight)
    assert runs.weights_of(tmp_path) == str(tmp_path / "backbone.pt")  # as --init and export.py take a stage's folder
    st.initialise(net.backbone, str(tmp_path / "backbone.pt"))
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in net.backbone.state_dict().items())


def test_boxes_are_clipped_to_the_image_not_to_its_canvas():
    net = st.build(settings(image_size=64), 3).eval()
    with torch.no_grad():
        found = net.decode(net(torch.randn(2, 3, 64, 64)), torch.tensor([[64.0, 20.0], [30.0, 64.0]]), 0.0)
    for d, (h, w) in zip(found, ((64, 20), (30, 64))):
        assert len(d["boxes"]) and (d["boxes"] >= 0).all() and d["boxes"][:, 0::2].max() == w and d["boxes"][:, 1::2].max() == h
        assert set(d["labels"].tolist()) <= {0, 1, 2}


# ---- settings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, steps, drops, batch, lr, warmup", [
    ("voc-c4", 1088, 24_000, (18_000, 22_000), 16, 0.02, 100), ("bdd-c4", 928, 90_000, (60_000, 80_000), 8, 0.01, 1000),
    ("coco-c4", 1088, 90_000, (60_000, 80_000), 16, 0.02, 1000)])
def test_a_recipe_has_the_published_settings(name, size, steps, drops, batch, lr, warmup):
    c = settings(name)
    assert (c["backbone"], c["image_size"], c["steps"], c["batch"], c["warmup"], c["weight_decay"], c["regions"], c["crop"],
            c["anchors"], c["proposals"]) == ("resnet50", size, steps, batch, warmup, 1e-4, 512, 14, (32, 64, 128, 256, 512),
                                              (12000, 2000, 6000, 1000))
    rates = [st.lr_at(s, steps, st.scaled_lr(c), warmup, c["warmup_from"], c["drops"]) for s in (0, warmup, *drops)]
    assert rates == pytest.approx([lr / 1000, lr, lr / 10, lr / 100])
    assert st.lr_at(drops[0] - 1, steps, lr, warmup, drops=c["drops"]) == pytest.approx(lr)


def test_the_model_chooses_the_recipe_and_must_fit_it():
    assert [settings(f"{k}-c4")["instances"] for k in ("voc", "bdd", "coco", "tiny")] == [False, False, True, False]
    assert settings(None, model="rcnn-c4")["model"] == "rcnn-c4" and settings(None, model="rcnn-c4")["crop"] == 8
    assert "model" not in settings(None) and "model" not in settings("tiny", model="retinanet")
    for flags, match in ((dict(recipe="coco-b7", model="rcnn-c4"), "--recipe coco-b7 is for --model retinanet"),
                         (dict(recipe="voc-c4", model="retinanet"), "--recipe voc-c4 is for --model rcnn-c4"),
                         (dict(backbone="tf_efficientnet_b0"), "--model rcnn-c4 needs the last stage of a ResNet"),
                         (dict(backbone="spinenet49"), "--model rcnn-c4 needs the last stage of a ResNet"),
                         (dict(joint="shapes"), "--model rcnn-c4 works neither with --joint nor"),
                         (dict(compile=True), "--model rcnn-c4 works neither with --joint nor")):
        with pytest.raises(UserError, match=match):
            settings(**flags)


def test_a_dry_run_counts_what_the_head_keeps_for_its_regions():
    with torch.device("meta"):
        few, many = (recipes.memory(st.build(c, 3), c, 1, torch.float32)[1] for c in (
            {**settings(), "regions": n} for n in (64, 128)))
    # of each more region at least: its crop of C4, and both convolutions of res5 and their norms
    assert many - few > 64 * 4 * (128 * 8 * 8 + 4 * 256 * 4 * 4)


# ---- masks -------------------------------------------------------------------------------------------------------

def test_masks_of_files_are_drawn_as_pycocotools_does_and_the_smaller_of_two_lies_on_top():
    square = [[2.0, 2, 12, 2, 12, 12, 2, 12]]
    small = np.zeros((20, 30), bool)
    small[4:8, 6:25] = True
    plain = {"size": [20, 30], "counts": [0, 600]}  # not compressed: the whole image
    texts, places = masks.pack([square, None, outline(small), plain, plain], [(20, 30)] * 5)
    got = masks.draw(texts, places, np.array([False, False, False, False, True]), (20, 30))
    want = np.full((20, 30), 256 + 3, np.int32)
    want[coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(square, 20, 30))) > 0] = 256
    want[small] = 258
    assert np.array_equal(got, want) and got.dtype == np.int32 and (want == 256).sum() > 50


@pytest.mark.parametrize("bad", [[[1.0, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], {"size": [30, 20], "counts": [0, 600]}, {"size": [20, 30]}, "x"])
def test_segmentations_that_cannot_be_drawn_are_named_at_load_and_empty_ones_are_none(squares, tmp_path, bad):  # noqa: F811
    found = outlined(squares, tmp_path)
    text = json.loads((found / "train.json").read_text())
    text["annotations"][0]["segmentation"] = [[]]  # as exporters write it of plain boxes
    (found / "train.json").write_text(json.dumps(text))
    part = data.load_coco(found / "train.json", found / "images", with_masks=True)
    assert sum(begin == end for begin, end in part.places) == 1 and not masks.usable([[]], (64, 64))
    text["annotations"][1]["segmentation"] = bad
    (found / "train.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="train.json is not a COCO annotation file.*neither polygons") as error:
        data.load_coco(found / "train.json", found / "images", with_masks=True)
    assert "\n" not in str(error.value)


def test_masks_go_through_augmentation_with_their_boxes(squares, tmp_path):  # noqa: F811
    found = outlined(squares, tmp_path)
    train = data.load_coco(found / "train.json", found / "images", with_masks=True)
    loader = data.train_loader([train], [4], 0, 3, 1, 0, 1, "s4", 64, 0, 0)
    whole = 0
    for batch in loader:
        assert batch["numbers"].shape == (4, 64, 64) and batch["number"].shape == batch["labels"].shape and "masks" not in batch
        for boxes, number, numbers in zip(batch["boxes"], batch["number"], batch["numbers"]):
            for (x0, y0, x1, y1), k in zip(boxes, number):
                if k >= 0:
                    y, x = (numbers == k).nonzero(as_tuple=True)
                    assert x0 - 1 <= x.min() and x.max() <= x1 + 1 and y0 - 1 <= y.min() and y.max() <= y1 + 1
                    whole += len(x) > 0.8 * (x1 - x0) * (y1 - y0)
    assert whole > 5  # a square fills its box, unless it is turned, sheared, or under another


def outlined(squares, folder):  # noqa: F811
    """The squares with polygons, one object without."""
    (folder / "images").symlink_to(squares / "images")
    for split in ("train", "val"):
        value = json.loads((squares / f"{split}.json").read_text())
        for n, a in enumerate(value["annotations"]):
            x, y, w, h = a["bbox"]
            a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]] if n or split == "val" else None
        (folder / f"{split}.json").write_text(json.dumps(value))
    return folder


@torch.no_grad()
def test_the_mask_loss_is_torchvisions_and_objects_without_a_mask_cost_nothing():
    g = torch.Generator().manual_seed(0)
    regions = torch.tensor([[4.0, 4, 40, 40], [8, 8, 30, 50], [0, 0, 64, 64], [20, 2, 60, 33]])
    out = {"labels": torch.tensor([2, 1, 0, 3]), "match": torch.tensor([0, 1, 0, 2]), "regions": regions,
           "masks": torch.randn(3, 14, 14, generator=g)}
    numbers = torch.zeros(64, 64, dtype=torch.int32)
    numbers[5:35, 6:38], numbers[10:48, 9:20], numbers[3:30, 22:58] = 256, 257, 258
    mine, truth = torch.tensor([True] * 4), torch.stack([numbers == k for k in (256, 257, 258)])
    for number in ((256, 257, 258), (256, -1, 258)):
        rows = [k for k in range(3) if number[k] >= 0]
        logits = torch.zeros(len(rows), 4, 14, 14)
        logits[range(len(rows)), [(2, 1, 3)[k] for k in rows]] = out["masks"][rows]  # torchvision has one for every class
        want = maskrcnn_loss(logits, [regions[[0, 1, 3]][rows]], [truth], [torch.tensor([2, 1, 3])], [torch.tensor(rows)])
        assert torch.allclose(rcnn.mask_loss(out, mine, torch.tensor(number), numbers), want)
    assert rcnn.mask_loss(out, mine, torch.tensor([-1, -1, -1]), numbers) == 0
    assert rcnn.mask_loss(out, ~mine, torch.tensor([], dtype=torch.int64), numbers) == 0


def test_mask_rcnn_goes_through_the_pipeline_and_its_masks_are_scored(squares, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(recipes.RECIPES, "tiny-c4", {**recipes.RECIPES["tiny-c4"], "instances": True})
    args = [*FLAGS, "--image-size", "64", "--steps", "2", "--root", str(outlined(squares, tmp_path))]
    st.main([*args, "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert all(0 <= results[stage]["mask AP"] <= 1 for stage in ("teacher", "student"))
    train = json.loads((tmp_path / "train.json").read_text())
    for a in train["annotations"]:
        del a["segmentation"]
    (tmp_path / "train.json").write_text(json.dumps(train))
    with pytest.raises(UserError, match="without a segmentation only"):
        st.main([*args, "--out", str(tmp_path / "other")])


# ---- exports -----------------------------------------------------------------------------------------------------

def noisy(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return net.eval()


@pytest.fixture(scope="module")
def r50(tmp_path_factory):
    """A ResNet-50 and its file, as hpt.py writes it."""
    torch.manual_seed(0)
    net, path = noisy(backbones.build("resnet50")), tmp_path_factory.mktemp("r50") / "backbone.pt"
    about = {"backbone": "resnet50", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    torch.save({"model": net.state_dict(), "about": about}, path)
    return net, path


def test_torchvision_loads_the_export_and_computes_the_same(r50, tmp_path):
    net, path = r50
    line = export.export(str(path), "torchvision", str(tmp_path / "out.pth"))
    assert "mean [127.5, 102.0, 76.5], deviation [51.0, 51.0, 51.0]" in line
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(x), net(x)[5].mean((2, 3)), atol=1e-4)


def test_detectron2s_names_are_exactly_those_of_its_resnet50(r50, tmp_path):
    net, path = r50
    norm = ("weight", "bias", "running_mean", "running_var")
    want = {"stem.conv1.weight": "conv1.weight", **{f"stem.conv1.norm.{n}": f"bn1.{n}" for n in norm}}
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for b in range(blocks):
            ours = f"layer{stage - 1}.{b}."
            for k in (1, 2, 3):
                want[f"res{stage}.{b}.conv{k}.weight"] = f"{ours}conv{k}.weight"
                want.update({f"res{stage}.{b}.conv{k}.norm.{n}": f"{ours}bn{k}.{n}" for n in norm})
            if b == 0:
                want[f"res{stage}.0.shortcut.weight"] = f"{ours}downsample.0.weight"
                want.update({f"res{stage}.0.shortcut.norm.{n}": f"{ours}downsample.1.{n}" for n in norm})
    assert len(want) == 265  # 53 convolutions and their norms
    export.main([str(path), "detectron2", str(tmp_path / "out.pth")])
    got = torch.load(tmp_path / "out.pth", weights_only=True)
    assert got["matching_heuristics"] is True and got["__author__"] and set(got["model"]) == set(want)
    assert all(torch.equal(got["model"][k], net.state_dict()[v]) for k, v in want.items())


def test_the_backbone_of_a_detector_is_exported_alone(tmp_path):
    net = st.build(settings(), 3)
    torch.save({"model": net.state_dict(), "config": settings()}, tmp_path / "step_00000001.pt")
    export.export(str(tmp_path), "torchvision", str(tmp_path / "out.pth"))
    got = torch.load(tmp_path / "out.pth", weights_only=True)
    assert got.keys() == net.backbone.state_dict().keys()
    assert all(torch.equal(got[k], v) for k, v in net.backbone.state_dict().items() if "num_batches" not in k)


def test_what_cannot_be_exported_is_refused_in_one_line(r50, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "config": {"backbone": "spinenet49"}}, tmp_path / "spine.pt")
    for args, match in (((str(r50[1]), "detectron2", "out.pkl"), "does not end in .pth"),
                        ((str(tmp_path / "none.pt"), "detectron2", "out.pth"), "is not a file"),
                        ((str(tmp_path / "spine.pt"), "detectron2", "out.pth"), "only ResNets are exported, not spinenet49")):
        with pytest.raises(UserError, match=match) as error:
            export.export(*args)
        assert "\n" not in str(error.value)
