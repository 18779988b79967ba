"""recipes.py: every row has the published numbers, flags lie over it, its cost is what it says, every backbone trains by it."""
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torchvision.ops import StochasticDepth

import backbones
import detect
import eval as evaluation
import ops
import recipes
import st
from conftest import ROOT
from recipes import Config
from util import UserError

CPU = torch.device("cpu")
SLOW = ("resnet101", "b5", "b6", "b7", "b8", "l2", "spinenet143", "spinenet190")
ROWS = {
    # name            backbone              px   lr    steps    warm-up from    lr drops by 10 at   decay  clip  act      anchor
    "coco-r50":      ("resnet50",           640, 0.32, 120_000, 1000, 0.0032, (),                 1e-4,  0,  "relu",  4.0,
                      (256, 4), "s4", "s4"),  # tower width and depth, augmentation of teacher and student
    "coco-b7":       ("tf_efficientnet_b7", 640, 0.32, 120_000, 1000, 0.0032, (),                 1e-4,  0,  "relu",  4.0,
                      (256, 4), "s4", "s4"),
    "coco-spinenet49":  ("spinenet49",      640, 0.28, 231_500, 2000, 0.0067, (217_610, 226_870), 4e-5, 10,  "swish", 3.0,
                         (256, 4), "s1-large", "s1-large"),
    "coco-spinenet96":  ("spinenet96",     1024, 0.28, 231_500, 2000, 0.0067, (217_610, 226_870), 4e-5, 10,  "swish", 3.0,
                         (256, 4), "s1-large", "s1-large"),
    "coco-spinenet143": ("spinenet143",    1280, 0.28, 231_500, 2000, 0.0067, (217_610, 226_870), 4e-5, 10,  "swish", 4.0,
                         (256, 4), "s1-wide", "s3"),
    "coco-spinenet190": ("spinenet190",    1280, 0.30, 185_200, 2000, 0.0067, (171_310, 180_570), 4e-5, 10,  "swish", 4.0,
                         (512, 7), "s1-wide", "s3"),
}


SEG_ROWS = {
    # name         backbone              lr    steps   student's human images a step
    "pascal-b7": ("tf_efficientnet_b7", 0.08, 40_000, 256),
    "pascal-l2": ("tf_efficientnet_l2", 0.2, 20_000, 128),
}


def settings(recipe="tiny", ranks=1, **flags):
    task = recipes.RECIPES.get(recipe, {}).get("task", "det")
    return recipes.settings(Config(**{"task": task, "recipe": recipe, **flags}), ranks)


def lr_of(c, step):
    """As st.train asks for it."""
    return st.lr_at(step, c["steps"], st.scaled_lr(c), min(c["warmup"], c["steps"] // 10), c["warmup_from"], c["drops"])


# ---- the rows ----------------------------------------------------------------------------------------------------

def test_the_table_has_the_rows_tested_here():
    assert list(recipes.RECIPES) == ["tiny", *ROWS, "voc-c4", "bdd-c4", "coco-c4", "tiny-c4", "seg-tiny", "seg-fine",
                                           *SEG_ROWS, "cls-tiny"]


@pytest.mark.parametrize("name", SEG_ROWS)
def test_a_pascal_recipe_has_the_published_settings(name):
    c, (backbone, lr, steps, student) = settings(name, task="seg"), SEG_ROWS[name]
    assert (c["backbone"], c["lr"], c["steps"], c["student_steps"], c["student_batch"]) == (backbone, lr, steps, steps, student)
    assert (c["image_size"], c["batch"], c["ref_batch"], c["warmup"], c["weight_decay"], c["clip"], c["threshold"], c["aug"],
            c["neck"], c["levels"], c["width"], c["depth"], c["stride"], c["momentum"], c["drops"]) == (
                512, 256, 256, 500, 1e-5, 10, "0.5", "s4", "nasfpn", (3, 7), 256, 3, 4, 0.003, ())
    assert lr_of(c, 0) == pytest.approx(0.001) and lr_of(c, 500) == pytest.approx(lr) and lr_of(c, steps) == pytest.approx(0)


@pytest.mark.parametrize("name", ROWS)
def test_a_coco_recipe_has_the_published_settings(name):
    c, (backbone, size, lr, steps, warmup, _, _, decay, clip, act, base, tower, *augs) = settings(name), ROWS[name]
    assert (c["backbone"], c["image_size"], c["lr"], c["steps"], c["student_steps"], c["warmup"], c["weight_decay"], c["clip"],
            c["act"], c["anchor_base"], c["width"], c["depth"], c["aug"], c["student_aug"]) == (
                backbone, size, lr, steps, steps, warmup, decay, clip, act, base, *tower, *augs)
    assert (c["batch"], c["ref_batch"], c["optimizer"], c["levels"], c["momentum"], c["threshold"], c["norm"], c["init"]) == (
        256, 256, "sgd", (3, 7), 0.003, "0.5", "bn", "random")
    anchors = detect.anchors_for(c, CPU)
    assert len(anchors) == 9 * sum(math.ceil(size / 2 ** level) ** 2 for level in range(3, 8))
    assert (anchors[0, 2:] - anchors[0, :2]).tolist() == [8 * base] * 2  # the smallest, of ratio 1


def test_the_recipe_for_a_cpu():
    c = settings()
    want = dict(backbone="resnet10", image_size=128, batch=16, ref_batch=16, optimizer="adamw", lr=2e-3, steps=2500,
                student_steps=800, warmup=50, warmup_from=0.01, drops=(), weight_decay=0.05, clip=10.0, threshold="auto", aug="s4",
                student_aug="s4", levels=(3, 6), width=64, depth=2, anchor_base=2.0, act="relu", momentum=0.1)
    assert {k: c[k] for k in want} == want


@pytest.mark.parametrize("name", ROWS)
def test_the_learning_rate_is_the_published_one_at_the_published_steps(name):
    c, (_, _, peak, steps, warmup, start, drops, *_) = settings(name), ROWS[name]
    assert lr_of(c, 0) == pytest.approx(start) and lr_of(c, warmup // 2) == pytest.approx((start + peak) / 2)
    assert start < lr_of(c, 1) < lr_of(c, warmup - 1) < lr_of(c, warmup) == pytest.approx(peak)
    for k, step in enumerate(drops):
        assert lr_of(c, step - 1) == pytest.approx(peak / 10 ** k) and lr_of(c, step) == pytest.approx(peak / 10 ** (k + 1))
    if drops:
        assert lr_of(c, steps - 1) == pytest.approx(peak / 100)
    else:  # a cosine
        assert lr_of(c, (warmup + steps) // 2) == pytest.approx(peak / 2) and lr_of(c, steps) == pytest.approx(0, abs=1e-12)
        assert lr_of(c, warmup + (steps - warmup) // 3) == pytest.approx(peak * 0.75, rel=1e-4)


def test_drops_keep_their_place_in_a_shorter_training():
    c = settings("coco-spinenet49", steps=2315, batch=128)
    rates = [lr_of(c, step) for step in range(2315)]
    assert rates[231] == pytest.approx(0.14) == rates[2175] and rates[2176] == pytest.approx(0.014)
    assert rates[2268] == pytest.approx(0.014) and rates[2269] == rates[-1] == pytest.approx(0.0014)


# ---- flags over a row --------------------------------------------------------------------------------------------

def test_flags_override_the_fields_of_a_row():
    c = settings("coco-spinenet143", image_size=256, batch=8, lr=0.1, steps=90, backbone="resnet10", threshold="0.3")
    assert (c["image_size"], c["batch"], c["lr"], c["steps"], c["student_steps"], c["backbone"], c["threshold"]) == (
        256, 8, 0.1, 90, 90, "resnet10", "0.3")
    assert settings("coco-r50", steps=90, student_steps=40)["student_steps"] == 40
    assert settings("coco-r50", student_steps=40)["steps"] == 120_000


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_an_augmentation_given_is_the_teachers_and_the_students(name):
    c = settings(name, aug="s2")
    assert (c["aug"], c["student_aug"]) == ("s2", "s2")


@pytest.mark.parametrize("name, width, depth, base", [
    ("spinenet49S", 128, 4, 3.0), ("spinenet49", 256, 4, 3.0), ("spinenet96", 256, 4, 3.0), ("spinenet143", 256, 4, 4.0),
    ("spinenet190", 512, 7, 4.0)])
@pytest.mark.parametrize("recipe", ["tiny", "coco-r50", "coco-spinenet190"])
def test_a_spinenet_brings_its_own_head_into_any_recipe(recipe, name, width, depth, base):
    c, row = settings(recipe, backbone=name), recipes.RECIPES[recipe]
    assert (c["levels"], c["width"], c["depth"], c["anchor_base"], c["act"]) == ((3, 7), width, depth, base, "swish")
    assert all(c[k] == row[k] for k in ("lr", "steps", "optimizer", "image_size", "weight_decay", "warmup", "aug"))


def test_the_learning_rate_follows_the_batch():
    assert st.scaled_lr(settings("coco-r50", batch=128)) == pytest.approx(0.16)
    assert st.scaled_lr(settings("coco-spinenet49", batch=128)) == pytest.approx(0.14)  # the paper's
    assert lr_of(settings("coco-spinenet49", batch=128), 0) == pytest.approx(0.0067 / 2)
    assert st.scaled_lr(settings("coco-r50", batch=128, lr=1.0)) == pytest.approx(0.5)
    assert st.scaled_lr(settings("tiny", batch=4)) == pytest.approx(1e-3)  # AdamW: square root


@pytest.mark.parametrize("flags, match", [
    (dict(norm="frozen"), "--norm frozen .*--init random has none; use --norm bn or gn"),
    (dict(compile=True, gradient_checkpointing=True), "leave out --gradient-checkpointing, or --compile"),
    (dict(backbone="spinenet50"), "--backbone spinenet50 does not exist; there are resnet10, .*spinenet49, "),
    (dict(recipe="coco"), "--recipe coco does not exist; there are tiny, coco-r50, coco-b7, coco-spinenet49, "),
    (dict(backbone="spinenet49", image_size=64, batch=1), "a single value to average on the coarsest level"),
    (dict(recipe="coco-r50", optimizer="adamw"), "--optimizer adamw needs --lr: that of --recipe coco-r50 is for sgd")])
def test_what_does_not_go_together_is_refused_in_one_line(flags, match):
    with pytest.raises(UserError, match=match) as error:
        settings(**flags)
    assert "\n" not in str(error.value)


# ---- what it costs -----------------------------------------------------------------------------------------------

def batch_for(c, images=2):
    """Random images; in each, for every level a box that equals one of its anchors, so that no norm is left untaught."""
    anchors, g = detect.anchors_for(c, CPU), torch.Generator().manual_seed(0)
    cells = [math.ceil(c["image_size"] / 2 ** level) ** 2 for level in range(c["levels"][0], c["levels"][1] + 1)]
    boxes = anchors[[9 * (sum(cells[:i]) + n // 2) for i, n in enumerate(cells)]].expand(images, -1, 4)
    return {"images": torch.randint(0, 256, (images, 3, c["image_size"], c["image_size"]), generator=g, dtype=torch.uint8),
            "boxes": boxes, "labels": torch.randint(0, 5, boxes.shape[:2], generator=g),
            "part": torch.zeros(images, dtype=torch.int64)}, anchors


def loss_of(net, batch, anchors, dtype=torch.float32):
    targets, positives = detect.assign(batch, anchors)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = net(evaluation.normalise(batch["images"], CPU))
    return detect.losses_of(outputs, targets, batch["part"], positives, anchors).sum()


def kept_for_backward(c, dtype):
    """Bytes an image that autograd keeps in a real forward pass; parameters and their low-precision copies left out."""
    net, (batch, anchors), kept = st.build(c, 5).train(), batch_for(c), {}
    own, shapes = {p.untyped_storage()._cdata for p in net.parameters()}, {p.shape for p in net.parameters()}

    def keep(tensor):
        copy = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage()._cdata not in own and not copy:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(net, batch, anchors, dtype)
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values()) / len(batch["images"])


def estimate(c, dtype, ranks=1):
    with torch.device("meta"):
        net = st.build(c, 5)
    return recipes.memory(net, c, ranks, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["resnet50", "tf_efficientnet_b0", "spinenet49"])
def test_the_memory_of_an_image_is_what_autograd_keeps_and_less_with_checkpointing(backbone, dtype):
    flags = dict(backbone=backbone, image_size=128)
    plain, saving = settings("coco-r50", **flags), settings("coco-r50", **flags, gradient_checkpointing=True)
    each, less, kept = estimate(plain, dtype)[1], estimate(saving, dtype)[1], kept_for_backward(plain, dtype)
    assert kept <= each <= 1.35 * kept
    assert kept_for_backward(saving, dtype) <= less < 0.7 * each


def test_the_memory_that_does_not_depend_on_the_batch_is_a_few_copies_of_the_parameters():
    c = settings("coco-r50", image_size=128)
    n = sum(p.numel() for p in st.build(c, 5).parameters())
    assert estimate(c, torch.float32)[0] == n * (4 + 4 + 4)  # weights, gradients, momentum
    assert estimate(c, torch.bfloat16, ranks=2)[0] == n * (4 + 4 + 4 + 2 + 4)  # a bf16 copy, DDP's buckets
    assert estimate({**c, "optimizer": "adamw"}, torch.float32)[0] == n * (4 + 4 + 8)


def test_a_dry_run_prints_what_would_be_used_and_touches_nothing(tmp_path):
    flags = "--recipe coco-b7 --dry-run --data coco --root nowhere --out run --precision bf16 --accumulate 16".split()
    done = subprocess.run([sys.executable, ROOT / "st.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = {line[:24].strip(): line[24:] for line in lines[:lines.index("")]}
    c = settings("coco-b7", accumulate=16)
    assert shown.keys() == {**asdict(Config()), **c}.keys() and shown["lr"].startswith("0.32 ") and shown["root"] == "nowhere"
    assert all(shown[k] == str(v) for k, v in c.items() if k not in ("workers", "lr"))
    text = "\n".join(lines)
    for part in ("71.8 M with 80 classes (tf_efficientnet_b7)", "teacher 120,000 of 256 images, student 120,000 of 256 + 256",
                 "16 images (student: 32) on each of 1 processes, bfloat16", "memory, estimated"):
        assert part in text
    assert not list(tmp_path.iterdir()) and not done.stderr


# ---- every backbone ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n.endswith(SLOW) else n for n in backbones.NAMES])
def test_every_backbone_trains_two_steps_and_detects(name):
    c = settings(backbone=name, image_size=64, batch=2, optimizer="sgd", lr=0.01)  # momentum alone: L2 needs 7 GB
    net, (batch, anchors) = st.build(c, 5).train(), batch_for(c)
    for m in net.modules():
        if isinstance(m, StochasticDepth):
            m.p = 0.0  # a dropped branch rightly learns nothing
    optimizer, losses = st.make_optimizer(net, c), []
    for _ in range(2):
        loss = loss_of(net, batch, anchors)
        loss.backward()
        losses.append(loss.item())
        for k, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), k
        still = {k for k, p in net.named_parameters() if not p.grad.any()}
        torch.nn.utils.clip_grad_norm_(net.parameters(), c["clip"])  # two values a batch norm have gradients of 1e7
        for group in optimizer.param_groups:
            group["lr"] = st.scaled_lr(c)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
    # On a 1x1 map the batch norm that follows takes a shift away again.
    assert still <= {"fpn.norm.3.bias", "backbone.endpoints.7.1.bias"}
    windows = torch.tensor([[64, 64], [40, 64]])
    with torch.no_grad():
        logits, deltas = net.eval()(evaluation.normalise(batch["images"], CPU))
    for found, (h, w) in zip(ops.detect(logits, deltas, anchors, windows, min_score=0.0), windows.tolist()):
        x0, y0, x1, y1 = found["boxes"].T
        assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 0
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 > x0).all() and (y1 > y0).all() and (x1 <= w).all() and (y1 <= h).all()
        assert ((found["scores"] > 0) & (found["scores"] < 1)).all() and set(found["labels"].tolist()) <= set(range(5))
