"""models.py: parity with torchvision's RetinaNet and its COCO weights, what is shared and what is not, losses in pieces."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import (RetinaNet_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn,
                                          retinanet_resnet50_fpn_v2)
from torchvision.transforms.functional import to_tensor

import detect
import models
import ops
import st
from util import UserError


def tiny(classes=5, seed=0, backbone="resnet10", levels=(3, 6), width=32, depth=2, norm="gn"):
    torch.manual_seed(seed)
    return models.RetinaNet(backbone, classes, levels, width, depth, norm=norm, backbone_norm=norm if norm != "none" else "gn")


def images(b, h=64, w=64, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


# ---- parity with torchvision -------------------------------------------------------------------------------------

def random_coco_state():
    """A state dict like the COCO file's, with random numbers chosen so that every one matters: signals neither vanish
    nor explode, and variances are small enough for eps to show."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the convolutions of the backbone are drawn by torchvision
        state = retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}  # batch norm is frozen in the file
    for key in [k for k in state if k.endswith("running_var")]:
        layer = key.removesuffix("running_var")
        var = 10 ** (-4 + 2 * torch.rand(state[key].shape, generator=g))  # 1e-4 .. 1e-2
        gain = 0.3 if layer.endswith(("bn3.", "downsample.1.")) else 1.0
        state[key], state[layer + "weight"] = var, var.sqrt() * gain * (0.5 + torch.rand(var.shape, generator=g))
        state[layer + "bias"] = torch.randn(var.shape, generator=g) * 0.1
        state[layer + "running_mean"] = torch.randn(var.shape, generator=g) * 0.1
    for key in [k for k in state if k.startswith(("head.", "backbone.fpn."))]:
        if key.endswith("bias"):
            state[key] = torch.randn(state[key].shape, generator=g) * 0.1
        else:
            fan_in = state[key][0].numel()
            gain = {"head.regression_head.bbox_reg.weight": 0.1}.get(key, 1.4 if key.startswith("head.") else 0.7)
            state[key] = torch.randn(state[key].shape, generator=g) * gain / math.sqrt(fan_in)
    return state


def first_release_names(state):
    """The same under the names from before torchvision had (conv, norm, relu) blocks, which it still takes."""
    out = {}
    for key, value in state.items():
        for i in range(4):
            if f"_head.conv.{i}.0." in key:
                key = key.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.")
                break
            key = key.replace(f"_blocks.{i}.0.", f"_blocks.{i}.")
        out[key] = value
    return out


@pytest.fixture(scope="module")
def pair():
    """(torchvision's network built as for its COCO weights, ours with these weights, the weights), in eval mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: first_release_names(random_coco_state()))
        theirs = retinanet_resnet50_fpn(weights=RetinaNet_ResNet50_FPN_Weights.COCO_V1, weights_backbone=None, min_size=160,
                                        max_size=224, topk_candidates=5000, detections_per_img=300).eval()
    ours = models.RetinaNet("resnet50", 91, norm="none", backbone_norm="frozen").eval()
    ours.load_state_dict(models.from_torchvision(theirs.state_dict()), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def outputs(pair):
    """Both networks' raw outputs on one batch of two images of different width: (images, batch, theirs, ours)."""
    theirs, ours = pair
    g = torch.Generator().manual_seed(1)
    pictures = [torch.rand(3, 160, 224, generator=g), torch.rand(3, 160, 180, generator=g)]  # no resizing at this size
    batch = theirs.transform(pictures)[0].tensors
    assert batch.shape == (2, 3, 160, 224)
    with torch.no_grad():
        raw = theirs.head(list(theirs.backbone(batch).values()))
        return pictures, batch, (raw["cls_logits"], raw["bbox_regression"]), ours(batch)


def test_raw_outputs_equal_torchvisions_with_its_coco_weights(outputs):
    for name, theirs, ours in zip(("logits", "deltas"), *outputs[2:]):
        assert ours.shape == theirs.shape and 0.05 < theirs.std() < 5, (name, theirs.std())  # neither zero nor huge
        assert (ours - theirs).abs().max() < 1e-4, name


def test_detections_equal_torchvisions_with_its_coco_weights(pair, outputs):
    net, _ = pair
    pictures, batch, (their_logits, _), (logits, deltas) = outputs
    # A bias for all classes that lifts some hundred entries over the score threshold, where there is a wide gap.
    top = their_logits.flatten().sort(descending=True).values[100:600]
    gap = (top[:-1] - top[1:]).argmax()
    lift = math.log(0.05 / 0.95) - (top[gap] + top[gap + 1]).item() / 2
    with torch.no_grad():
        net.head.classification_head.cls_logits.bias += lift
        want = net(pictures)
        net.head.classification_head.cls_logits.bias -= lift
    anchors, windows = ops.torchvision_anchors(*batch.shape[2:]), torch.tensor([p.shape[1:] for p in pictures])
    got = ops.detect(logits + lift, deltas, anchors, windows, min_score=0.05, nms_iou=0.5, limit=300)
    assert 24 < sum(len(w["scores"]) for w in want) < 600 and all(len(w["labels"].unique()) > 1 for w in want)
    for ours, theirs in zip(got, want):
        assert len(ours["scores"]) == len(theirs["scores"])
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4)
        same = (ours["boxes"][:, None] - theirs["boxes"][None]).abs().amax(2) < 0.05  # (n, n): free order among near ties
        same &= ours["labels"][:, None] == theirs["labels"][None]
        same &= (ours["scores"][:, None] - theirs["scores"][None]).abs() < 1e-4
        assert same.any(0).all() and same.any(1).all()


def test_from_torchvision_takes_the_first_releases_names_as_torchvision_does(pair):
    theirs, _ = pair  # which was filled under those names, by torchvision itself
    new = theirs.state_dict()
    old = first_release_names(new)
    assert len(old) == len(new) and len(old.keys() - new.keys()) == 2 * (3 + 3 + 4 + 4)
    want, got = models.from_torchvision(new), models.from_torchvision(old)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_from_torchvision_refuses_a_key_it_does_not_know():
    with pytest.raises(KeyError, match="head.mask_head.weight"):
        models.from_torchvision({"head.mask_head.weight": torch.zeros(1)})


def test_from_torchvision_with_a_variance_near_zero_is_finite():
    state = {f"backbone.body.bn1.{k}": torch.full((2,), v) for k, v in (("weight", 1e-9), ("running_var", 5.6e-45))}
    scale = models.from_torchvision(state)["backbone.bn1.weight"] / math.sqrt(5.6e-45 + 1e-5)
    assert scale.isfinite().all() and torch.allclose(scale, torch.tensor(1e-9 / math.sqrt(5.6e-45)), rtol=1e-2)


def test_from_torchvision_leaves_the_tensors_it_is_given_alone():
    state = random_coco_state()
    before = {k: v.clone() for k, v in state.items()}
    assert not torch.equal(models.from_torchvision(state)["backbone.bn1.weight"], before["backbone.body.bn1.weight"])
    assert all(torch.equal(state[k], before[k]) for k in before)


# ---- torchvision's COCO weights as a ready teacher ---------------------------------------------------------------

NO_CLASS = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # torchvision's outputs that are no category of COCO
SEEN = (0, 1, 3, 12, 13, 44, 77, 90)  # outputs made to find something: the first and the last class, and two that are none


@pytest.fixture(scope="module")
def coco_teacher(tmp_path_factory):
    """torchvision's detector as it comes with its COCO weights, its state dict in a file, a landscape and a portrait image,
    and what it finds on each: (file, folder of images, {name: detections})."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "images").mkdir()
    for name, (w, h) in (("landscape", (120, 100)), ("portrait", (80, 240))):  # the second at the limit of 1333 pixels
        rough = rng.integers(0, 256, (h // 20, w // 20, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((w, h), Image.Resampling.BICUBIC).save(root / "images" / f"{name}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: random_coco_state())
        net = retinanet_resnet50_fpn(weights=RetinaNet_ResNet50_FPN_Weights.COCO_V1, weights_backbone=None).eval()
    pictures = {path.stem: to_tensor(Image.open(path)) for path in sorted((root / "images").iterdir())}
    with torch.no_grad():
        logits = []
        for picture in pictures.values():
            batch = net.transform([picture])[0].tensors
            assert batch.shape[2:] == {120: (800, 960), 80: (1344, 448)}[picture.shape[2]]  # padded to multiples of 32
            logits.append(net.head(list(net.backbone(batch).values()))["cls_logits"][0])
        logits, lift = torch.cat(logits), torch.full((91,), -30.0)
        for k in SEEN:  # some dozens of entries over the score threshold, where there is a wide gap
            top = logits[:, k].topk(60).values[20:]
            gap = (top[:-1] - top[1:]).argmax()
            lift[k] = math.log(0.05 / 0.95) - (top[gap] + top[gap + 1]) / 2
        net.head.classification_head.cls_logits.bias += lift.repeat(9)
        torch.save(net.state_dict(), root / "retinanet.pth")
        return root / "retinanet.pth", root / "images", {k: net([picture])[0] for k, picture in pictures.items()}


@pytest.fixture(scope="module")
def labelled(coco_teacher, tmp_path_factory):
    file, folder, _ = coco_teacher
    out = tmp_path_factory.mktemp("labels") / "out"
    st.main(["--mode", "pseudo", "--ckpt", str(file), "--unlabeled", str(folder), "--out", str(out), "--threshold", "0.05",
             "--precision", "fp32", "--workers", "0"])
    return json.loads((out / "pseudo.json").read_text())


def test_torchvisions_coco_weights_label_a_folder_as_torchvision_does(coco_teacher, labelled):
    names = {im["id"]: im["file_name"].partition(".")[0] for im in labelled["images"]}
    assert sorted(names.values()) == ["landscape", "portrait"]
    for image, name in names.items():
        theirs = coco_teacher[2][name]
        real = torch.tensor([label not in NO_CLASS for label in theirs["labels"].tolist()])
        assert 0 < (~real).sum() and len(theirs["labels"][real].unique()) > 3 and 24 < real.sum() and len(real) < 300
        theirs = {k: v[real] for k, v in theirs.items()}
        rows = [a for a in labelled["annotations"] if a["image_id"] == image]
        assert len(rows) == len(theirs["scores"])
        boxes = torch.tensor([a["bbox"] for a in rows])
        boxes[:, 2:] += boxes[:, :2]
        same = (boxes[:, None] - theirs["boxes"][None]).abs().amax(2) < 1e-3  # (n, n): free order among near ties
        same &= torch.tensor([a["category_id"] for a in rows])[:, None] == theirs["labels"][None]
        same &= (torch.tensor([a["score"] for a in rows])[:, None] - theirs["scores"][None]).abs() < 1e-3
        assert same.any(0).all() and same.any(1).all()


def test_torchvisions_coco_weights_bring_the_80_categories_of_coco(labelled):
    categories = {c["id"]: c["name"] for c in labelled["categories"]}
    assert list(categories) == [i for i in range(91) if i not in NO_CLASS]
    assert len(set(categories.values())) == 80 and "N/A" not in categories.values()
    assert [categories[i] for i in (1, 11, 13, 44, 90)] == ["person", "fire hydrant", "stop sign", "bottle", "toothbrush"]


def test_torchvisions_coco_weights_are_scored_on_a_coco_file(coco_teacher, labelled, tmp_path, capsys):
    shutil.copytree(coco_teacher[1], tmp_path / "images")
    for split in ("train", "val"):  # its own detections as the truth
        (tmp_path / f"{split}.json").write_text(json.dumps({**labelled, "info": {}}))
    st.main(["--mode", "eval", "--ckpt", str(coco_teacher[0]), "--data", "coco", "--root", str(tmp_path), "--precision", "fp32",
             "--workers", "0"])
    printed = capsys.readouterr().out
    scores = json.loads(printed[printed.index("{"):])
    assert "torchvision's COCO detector" in printed and scores["AP"] > 0.999 and scores["AR100"] > 0.999


def test_a_checkpoint_of_torchvisions_training_script_is_read_like_the_bare_weights(coco_teacher, tmp_path):
    bare = torch.load(coco_teacher[0], weights_only=True)
    torch.save({"model": bare, "optimizer": {}, "epoch": 25}, tmp_path / "model_25.pth")
    want, got = st.read_checkpoint(coco_teacher[0])["model"], st.read_checkpoint(tmp_path / "model_25.pth")["model"]
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def hollow(build, **options):
    """The state dict of a network in all but its values, small and quickly made."""
    with torch.device("meta"):
        state = build(weights=None, **options).state_dict()
    return {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}


def retinanet_state(**options):
    return hollow(retinanet_resnet50_fpn, weights_backbone=None, **options)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("given, match", [
    (lambda _: retinanet_state(num_classes=21), "has 21 class outputs; only COCO's 91"),
    (lambda _: dict([*retinanet_state().items()][::2]), "missing [0-9]+ \\(|0 class outputs"),
    (lambda _: {k: v for k, v in retinanet_state().items() if "fpn" not in k}, "missing 16 \\(fpn.lateral.0.weight"),
    (lambda _: {**retinanet_state(), "head.mask.weight": torch.zeros(1)}, "head.mask.weight"),
    (lambda _: {**retinanet_state(), "backbone.body.conv2.weight": torch.zeros(1)}, "unexpected 1 \\(backbone.conv2.weight\\)"),
    (lambda _: {**retinanet_state(), "backbone.body.conv1.weight": torch.zeros(1)}, "conv1.weight is \\(1,\\) in the file"),
    (lambda _: hollow(retinanet_resnet50_fpn_v2, weights_backbone=None), "retinanet_resnet50_fpn"),
    (lambda _: hollow(fasterrcnn_resnet50_fpn, weights_backbone=None), "neither a checkpoint of st.py nor"),
    (lambda _: hollow(torchvision.models.resnet50), "neither a checkpoint of st.py nor"),
    (lambda _: {"model": retinanet_state(num_classes=21), "epoch": 3}, "has 21 class outputs"),
    (lambda _: {"class_ids": [1]}, "neither a checkpoint of st.py nor"),
    (lambda _: torch.zeros(3), "neither a checkpoint of st.py nor"),
    (lambda _: nn.Linear(2, 2), "unsafe unpickling is refused"),
    (lambda mark: {"head.weight": Payload(mark)}, "unsafe unpickling is refused"),
    (None, "is not a checkpoint|more than plain tensors"), ("nowhere", "does not exist")], ids=[
        "21 classes", "every other key", "no pyramid", "a key more", "a layer more", "another shape", "retinanet v2",
        "faster r-cnn", "resnet50", "training checkpoint",
        "class ids", "tensor", "module", "code", "garbage", "nowhere"])
def test_what_are_not_torchvisions_coco_weights_is_refused_in_one_line(given, match, tmp_path):
    file = tmp_path / "given.pth"
    if callable(given):
        torch.save(given(str(tmp_path / "ran")), file)
    elif given is None:
        file.write_bytes(b"garbage" * 99)
    for mode in ("pseudo", "eval"):
        with pytest.raises(UserError, match=f"--ckpt.*given.pth.*({match})") as error:
            st.main(["--mode", mode, "--ckpt", str(file), "--unlabeled", str(tmp_path), "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


# ---- shapes and layout -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, levels", [("resnet10", (3, 7)), ("resnet10", (3, 6)), ("resnet10", (4, 5)),
                                              ("efficientnet_b0", (3, 7))])
@pytest.mark.parametrize("h, w", [(64, 64), (96, 160), (97, 131), (33, 65)])
def test_outputs_have_one_row_per_anchor_for_any_size(backbone, levels, h, w):
    net = tiny(5, backbone=backbone, levels=levels, width=16, depth=1).eval()
    with torch.no_grad():
        pyramid = net.fpn(net.backbone(images(2, h, w)))
        logits, deltas = net(images(2, h, w))
    strides = [2 ** l for l in range(levels[0], levels[1] + 1)]
    assert [tuple(p.shape[2:]) for p in pyramid] == [(math.ceil(h / s), math.ceil(w / s)) for s in strides]
    A = len(ops.make_anchors(h, w, levels))
    assert logits.shape == (2, A, 5) and deltas.shape == (2, A, 4) and len(ops.torchvision_anchors(h, w, levels)) == A


def test_rows_of_a_tower_stand_at_the_places_of_the_anchors():
    """Maps that hold their own x, y and level, and a last convolution that copies them and adds the anchor's number."""
    levels, (H, W) = (3, 5), (64, 96)
    tower = models.Tower(3, 3, 0, 9, 4, "none", 3, 0.0, 0.0)
    with torch.no_grad():
        for a in range(9):
            for c in range(3):
                tower.final.weight[a * 4 + c, c, 1, 1] = 1
            tower.final.bias[a * 4 + 3] = a
        maps = []
        for level in range(3, 6):
            y, x = torch.meshgrid(torch.arange(H >> level), torch.arange(W >> level), indexing="ij")
            maps.append(torch.stack([x, y, torch.full_like(x, level)]).float()[None])
        x, y, level, a = tower(maps)[0].T  # (A,) each
    anchors, stride = ops.make_anchors(H, W, levels), 2 ** level
    assert torch.allclose((anchors[:, 0] + anchors[:, 2]) / 2, (x + 0.5) * stride, atol=1e-3)
    assert torch.allclose((anchors[:, 1] + anchors[:, 3]) / 2, (y + 0.5) * stride, atol=1e-3)
    side = ((anchors[:, 2:] - anchors[:, :2]).prod(1)).sqrt()
    assert torch.allclose(side, 4 * stride * 2 ** ((a // 3) / 3), rtol=1e-4)  # scale-major, ratio within


# ---- what is shared, what is separate ----------------------------------------------------------------------------

@pytest.mark.parametrize("norm, kind", [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm), ("none", nn.Identity)])
def test_towers_share_convolutions_and_have_a_norm_per_level_and_layer(norm, kind):
    net = tiny(levels=(3, 7), depth=3, norm=norm)
    for tower in (net.classes, net.boxes):
        assert len([m for m in tower.modules() if isinstance(m, nn.Conv2d)]) == 3 + 1
        norms = [m for m in tower.modules() if isinstance(m, kind)]
        assert len(norms) == len({id(m) for m in norms}) == 5 * 3
        assert all((c.bias is not None) == (norm == "none") for c in tower.convs)
    assert len([m for m in net.fpn.modules() if isinstance(m, kind)]) == 5


def test_tower_norm_of_one_level_acts_on_that_level_only_while_a_convolution_acts_on_all():
    net, x = tiny(levels=(3, 6), norm="bn").eval(), images(1)
    rows = [(64 >> l) ** 2 * 9 for l in range(3, 7)]

    def changed_levels(parameter):
        with torch.no_grad():
            before = net(x)[0]
            parameter += 0.5
            after = net(x)[0]
            parameter -= 0.5
        return [bool((a != b).any()) for a, b in zip(before.split(rows, 1), after.split(rows, 1))]
    assert changed_levels(net.classes.norms[1][0].bias) == [False, True, False, False]
    assert changed_levels(net.classes.convs[0].weight) == [True] * 4
    assert changed_levels(net.boxes.convs[0].weight) == [False] * 4  # the towers share nothing


def test_top_down_path_reaches_every_finer_level_and_no_coarser_one():
    net = tiny(levels=(3, 6), norm="none").eval()
    feats = {l: torch.randn(1, c, 64 >> l, 64 >> l) for l, c in net.backbone.channels.items()}
    with torch.no_grad():
        base = net.fpn(feats)
        reached = {l: [bool((a != b).any()) for a, b in zip(base, net.fpn({**feats, l: feats[l] + 1}))] for l in feats}
    assert reached == {2: [False] * 4, 3: [True, False, False, False], 4: [True, True, False, False], 5: [True] * 4}


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
def test_initial_scores_are_the_prior(norm):
    net = tiny(norm=norm)
    with torch.no_grad():
        logits, deltas = net(images(2))
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)
    assert logits.sigmoid().min() > 0.008 and logits.sigmoid().max() < 0.0125 and deltas.abs().max() < 0.3


@pytest.mark.parametrize("backbone_norm, frozen", [("bn", False), ("gn", False), ("frozen", False), ("bn", True)])
def test_weight_decay_groups_partition_the_trainable_parameters_into_kernels_and_the_rest(backbone_norm, frozen):
    net = models.RetinaNet("resnet10", 5, (3, 6), 32, 2, norm="bn", backbone_norm=backbone_norm)
    if frozen:
        net.backbone.requires_grad_(False)
    decayed, free = models.weight_decay_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    kernels = {id(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad}
    listed = [id(p) for group in (decayed, free) for p in group["params"]]
    assert {id(p) for p in decayed["params"]} == kernels
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad) and len(listed) == len(set(listed))
    assert 0 < len(free["params"])


def test_with_group_norm_images_of_a_batch_do_not_see_each_other():
    x = images(2)
    other = torch.cat([x[:1], images(1, seed=9) * 3])
    for norm, independent in (("gn", True), ("bn", False)):  # batch norm shows that the test can tell
        net = tiny(norm=norm).train()
        with torch.no_grad():
            nn.init.normal_(net.classes.final.weight, std=0.1)
            same = torch.allclose(net(x)[0][0], net(other)[0][0], atol=1e-5)
        assert same == independent, norm


# ---- a step in pieces --------------------------------------------------------------------------------------------

def labelled_batch():
    """Four images: two human (one of them empty), two pseudo-labelled, with different numbers of boxes."""
    g = torch.Generator().manual_seed(3)
    low = torch.rand(4, 3, 2, generator=g) * 40
    labels = torch.randint(0, 5, (4, 3), generator=g)
    for i, n in enumerate([3, 1, 0, 2]):
        labels[i, n:] = -1
    boxes = torch.cat([low, low + 8 + 16 * torch.rand(4, 3, 2, generator=g)], -1)
    return {"images": images(4), "boxes": boxes, "labels": labels, "part": torch.tensor([0, 1, 0, 1])}


def gradients(pieces, averages):
    """Gradients of a step of st.train, the batch cut into `pieces`; averages: None for human labels only."""
    net, batch, anchors = tiny(), labelled_batch(), ops.make_anchors(64, 64, (3, 6), 2.0)
    with torch.no_grad():
        for tower in (net.classes, net.boxes):
            nn.init.normal_(tower.final.weight, std=0.05)  # from 1e-5 hardly any gradient would reach the rest
    if averages is None:
        batch["part"] = torch.zeros(4, dtype=torch.int64)
    targets, positives = detect.assign(batch, anchors)
    total = 0.0
    for rows in torch.arange(4).chunk(pieces):
        part = batch["part"][rows]
        each = detect.losses_of(net(batch["images"][rows]), {k: v[rows] for k, v in targets.items()}, part, positives, anchors)
        human, pseudo = each[part == 0].sum(), each[part == 1].sum()
        loss = human if averages is None else ops.joint_loss([human, pseudo], averages, 0.7)
        loss.backward()
        total += loss.item()
    return total, {k: p.grad for k, p in net.named_parameters()}


@pytest.mark.parametrize("averages", [None, (0.0, 0.0, 0.0), (0.5, 2.0, 0.1)], ids=["human", "joint first step", "joint"])
def test_a_step_in_pieces_has_the_gradients_of_the_whole(averages):
    averages = None if averages is None else torch.tensor(averages, dtype=torch.float64)
    loss, whole = gradients(1, averages)
    assert all(g is not None for g in whole.values()) and sum(g.abs().max() > 1e-3 for g in whole.values()) > len(whole) / 2
    for pieces in (2, 4):
        split_loss, split = gradients(pieces, averages)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for k in whole:
            assert (split[k] - whole[k]).abs().max() <= 1e-5 * max(1, whole[k].abs().max()), k


def test_losses_are_divided_by_the_positives_of_their_own_part_plus_one():
    batch, anchors = labelled_batch(), ops.make_anchors(64, 64, (3, 6), 2.0)
    targets, positives = detect.assign(batch, anchors)
    matched, classes = targets["matched"], targets["classes"]
    count = [int((matched[batch["part"] == p] >= 0).sum()) for p in (0, 1, 2)]
    assert positives.tolist() == count and count[0] != count[1] and min(count[:2]) > 0
    logits, deltas = torch.randn(4, len(anchors), 5), torch.randn(4, len(anchors), 4)
    got = detect.losses_of((logits, deltas), targets, batch["part"], positives, anchors)
    focal, box = ops.focal_loss(logits, classes), ops.box_loss(deltas, batch["boxes"], anchors, matched)
    for i, p in enumerate(batch["part"].tolist()):
        want = torch.stack([focal[i] / (count[p] + 1), 50 * box[i] / (4 * (count[p] + 1))])
        assert torch.allclose(got[i], want)


def test_assign_names_the_class_of_each_positive_anchors_box():
    batch, anchors = labelled_batch(), ops.make_anchors(64, 64, (3, 6), 2.0)
    matched, classes = (detect.assign(batch, anchors)[0][k] for k in ("matched", "classes"))
    for i in range(4):
        for a in range(len(anchors)):
            m = int(matched[i, a])
            assert classes[i, a] == (batch["labels"][i, m] if m >= 0 else m)
    assert (matched[2] == ops.NEGATIVE).all() and (classes[0] >= 0).any()
    empty = {**batch, "boxes": torch.zeros(4, 0, 4), "labels": torch.zeros(4, 0, dtype=torch.int64)}
    targets, positives = detect.assign(empty, anchors)
    assert (targets["classes"] == ops.NEGATIVE).all() and positives.tolist() == [0, 0, 0]
