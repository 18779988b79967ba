"""recipes.py: rows have the published numbers, flags lie over them, what cannot work is refused."""

import dataclasses
import json

import pytest
import torch

import data
import recipes
import st
from recipes import RECIPES, method
from util import UserError

DROPS = (217_610, 226_870)
# fmt: off
COCO_ROWS = {
    # name            backbone              px    lr    steps    warm-up from      lr drops by 10 at
    #                 decay clip act      anchor  width, depth  of teacher, student
    "coco-r50":      ("resnet50",           640, 0.32, 120_000, 1000, 0.0032, (),
                      1e-4, 0,   "relu",  4.0,    256, 4,       "s4", "s4"),
    "coco-b7":       ("tf_efficientnet_b7", 640, 0.32, 120_000, 1000, 0.0032, (),
                      1e-4, 0,   "relu",  4.0,    256, 4,       "s4", "s4"),
    "coco-spinenet49":  ("spinenet49",      640, 0.28, 231_500, 2000, 0.0067, DROPS,
                      4e-5, 10,  "swish", 3.0,    256, 4,       "s1-large", "s1-large"),
    "coco-spinenet96":  ("spinenet96",     1024, 0.28, 231_500, 2000, 0.0067, DROPS,
                      4e-5, 10,  "swish", 3.0,    256, 4,       "s1-large", "s1-large"),
    "coco-spinenet143": ("spinenet143",    1280, 0.28, 231_500, 2000, 0.0067, DROPS,
                      4e-5, 10,  "swish", 4.0,    256, 4,       "s1-wide", "s3"),
    "coco-spinenet190": ("spinenet190",    1280, 0.30, 185_200, 2000, 0.0067, (171_310, 180_570),
                      4e-5, 10,  "swish", 4.0,    512, 7,       "s1-wide", "s3"),
}
SEG_ROWS = {
    # name         backbone              lr    steps   human images of a student's step
    "pascal-b7": ("tf_efficientnet_b7", 0.08, 40_000, 256),
    "pascal-l2": ("tf_efficientnet_l2", 0.2, 20_000, 128),
}
C4_ROWS = {
    # name       px    batch steps   warm-up lr drops by 10 at  teacher's aug  masks
    "voc-c4":  (1088, 16,   24_000, 100,    (18_000, 22_000),  "s1-voc",      False),
    "bdd-c4":  (928,  8,    90_000, 1000,   (60_000, 80_000),  "s1-bdd",      False),
    "coco-c4": (1088, 16,   90_000, 1000,   (60_000, 80_000),  "s1-coco",     True),
}
OURS = {"tiny": "det", "tiny-c4": "rcnn", "seg-tiny": "seg", "seg-fine": "seg", "cls-tiny": "cls"}
# fmt: on


def values(c, names):
    return tuple(getattr(c, name) for name in names.split())


# ---- the rows ------------------------------------------------------------------------------------


def test_the_table_has_the_rows_tested_here():
    assert RECIPES.keys() == {*COCO_ROWS, *SEG_ROWS, *C4_ROWS, *OURS}


@pytest.mark.parametrize("name", COCO_ROWS)
def test_a_coco_recipe_has_the_published_settings(name):
    c = method(name)
    backbone, size, lr, steps, warmup, start, drops, *head = COCO_ROWS[name]
    names = "backbone image_size lr steps student_steps warmup"
    assert values(c, names) == (backbone, size, lr, steps, steps, warmup)
    names = "weight_decay clip act anchor_base width depth aug student_aug"
    assert values(c, names) == tuple(head)
    names = "task batch ref_batch optimizer levels momentum threshold norm init"
    want = ("det", 256, 256, "sgd", (3, 7), 0.003, "0.5", "bn", "random")
    assert values(c, names) == want
    assert lr_of(c, 0) == pytest.approx(start)
    assert tuple(round(drop * steps) for drop in c.drops) == drops


@pytest.mark.parametrize("name", SEG_ROWS)
def test_a_pascal_recipe_has_the_published_settings(name):
    c = method(name)
    backbone, lr, steps, student = SEG_ROWS[name]
    assert values(c, "backbone lr steps student_steps") == (backbone, lr, steps, steps)
    assert recipes.student_batch(c) == student
    names = "task image_size batch ref_batch warmup weight_decay clip threshold aug student_aug"
    assert values(c, names) == ("seg", 512, 256, 256, 500, 1e-5, 10, "0.5", "s4", "s4")
    names = "neck levels width depth stride momentum drops"
    assert values(c, names) == ("nasfpn", (3, 7), 256, 3, 4, 0.003, ())
    assert lr_of(c, 0) == pytest.approx(0.001) and lr_of(c, 500) == pytest.approx(lr)


@pytest.mark.parametrize("name", C4_ROWS)
def test_a_c4_recipe_has_the_settings_of_moco_and_hpt(name):
    c = method(name)
    size, batch, steps, warmup, drops, aug, instances = C4_ROWS[name]
    names = "image_size batch steps student_steps warmup aug instances"
    assert values(c, names) == (size, batch, steps, steps, warmup, aug, instances)
    names = "task backbone ref_batch optimizer lr weight_decay anchors regions crop proposals"
    want = ("rcnn", "resnet50", 16, "sgd", 0.02, 1e-4, (32, 64, 128, 256, 512), 512, 14)
    assert values(c, names) == (*want, (12000, 2000, 6000, 1000))
    assert tuple(round(drop * steps) for drop in c.drops) == drops
    assert recipes.scaled_lr(c) == pytest.approx(0.02 * batch / 16)
    assert lr_of(c, 0) == pytest.approx(0.001 * recipes.scaled_lr(c))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_the_network_of_its_task(name):
    c = method(name)
    with torch.device("meta"):
        net = st.build(c, 5)
    st.check_trainable(net, c)
    assert c.task in st.TASKS and OURS.get(name, c.task) == c.task
    assert lr_of(c, min(c.warmup, c.steps // 10)) == recipes.scaled_lr(c)
    momenta = {m.momentum for n, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    # EfficientNets keep theirs, 0.01
    assert momenta == ({c.momentum, 0.01} if "efficientnet" in c.backbone else {c.momentum})


# ---- the learning rate ---------------------------------------------------------------------------


def lr_of(c, step):
    return st.lr_at(step, c.steps, c)


@pytest.mark.parametrize("name", COCO_ROWS)
def test_the_learning_rate_is_the_published_one_at_the_published_steps(name):
    c = method(name)
    _, _, peak, steps, warmup, start, drops, *_ = COCO_ROWS[name]
    assert lr_of(c, 0) == pytest.approx(start)
    assert lr_of(c, warmup // 2) == pytest.approx((start + peak) / 2)
    assert start < lr_of(c, 1) < lr_of(c, warmup - 1) < lr_of(c, warmup) == pytest.approx(peak)
    for k, step in enumerate(drops):
        assert lr_of(c, step - 1) == pytest.approx(peak / 10**k)
        assert lr_of(c, step) == pytest.approx(peak / 10 ** (k + 1))
    if not drops:  # a cosine
        assert lr_of(c, warmup + (steps - warmup) // 3) == pytest.approx(peak * 0.75, rel=1e-4)
        assert lr_of(c, (warmup + steps) // 2) == pytest.approx(peak / 2)
        assert lr_of(c, steps) == pytest.approx(0, abs=1e-12)


def test_warm_up_and_drops_keep_their_place_in_a_shorter_training():
    c = method("coco-spinenet49", steps=2315, batch=128)
    rates = [lr_of(c, step) for step in range(2315)]
    assert rates[0] == pytest.approx(0.0067 / 2) and rates[230] < rates[231]  # a tenth of the steps
    assert rates[231] == pytest.approx(0.14) == rates[2175]
    assert rates[2176] == pytest.approx(0.014) == rates[2268]
    assert rates[2269] == rates[-1] == pytest.approx(0.0014)
    rates = [lr_of(method(steps=5), step) for step in range(5)]  # too short to warm up
    assert rates[0] == 2e-3 and sorted(rates)[::-1] == rates


def test_the_learning_rate_follows_the_batch():
    assert recipes.scaled_lr(method("coco-r50", batch=128)) == pytest.approx(0.16)
    assert recipes.scaled_lr(method("coco-r50", batch=128, lr=1.0)) == pytest.approx(0.5)
    # the paper's
    assert recipes.scaled_lr(method("coco-spinenet49", batch=128)) == pytest.approx(0.14)
    assert recipes.scaled_lr(method("tiny", batch=4)) == pytest.approx(1e-3)  # AdamW: square root
    c = method("pascal-l2", batch=16)
    assert recipes.student_batch(c) == 8 and recipes.scaled_lr(c) == pytest.approx(0.2 / 16)


# ---- flags over a row ----------------------------------------------------------------------------


def test_flags_lie_over_the_row():
    given = {"image_size": 256, "batch": 8, "lr": 0.1, "backbone": "resnet10", "threshold": "0.3"}
    c = method("coco-spinenet143", **given, alpha=2.0)
    assert {name: getattr(c, name) for name in given} == given
    row = dataclasses.asdict(method("coco-spinenet143"))
    after = dataclasses.asdict(c)
    different = {name for name in row if row[name] != after[name]}
    assert different - {"width", "depth", "anchor_base", "act", "levels"} == {*given, "alpha"}


# fmt: off
@pytest.mark.parametrize("given, steps, student_steps", [
    ({}, 2500, 800), ({"steps": 90}, 90, 90), ({"student_steps": 40}, 2500, 40),
    ({"steps": 90, "student_steps": 40}, 90, 40)])
# fmt: on
def test_steps_given_are_the_students_too_unless_it_has_its_own(given, steps, student_steps):
    assert values(method("tiny", **given), "steps student_steps") == (steps, student_steps)


@pytest.mark.parametrize("name", RECIPES)
def test_an_augmentation_given_is_the_teachers_and_the_students(name):
    assert values(method(name, aug="s2"), "aug student_aug") == ("s2", "s2")
    c = method(name)
    assert c.student_aug == RECIPES[name].get("student_aug", c.aug)


@pytest.mark.parametrize("recipe", ["tiny", "coco-r50", "coco-spinenet190"])
@pytest.mark.parametrize("backbone", ["spinenet49S", "spinenet190"])
def test_a_spinenet_brings_its_own_head_into_any_recipe(recipe, backbone):
    c = method(recipe, backbone=backbone)
    head = {"spinenet49S": (128, 4, 3), "spinenet190": (512, 7, 4)}[backbone]
    assert values(c, "width depth anchor_base levels act") == (*head, (3, 7), "swish")
    for name in ("lr", "steps", "optimizer", "image_size", "weight_decay", "warmup", "aug"):
        assert getattr(c, name) == RECIPES[recipe][name]


def test_an_init_is_a_file_or_a_stage_whose_weights_it_names(tmp_path):
    torch.save({}, tmp_path / "step_00000003.pt")
    assert method(init=str(tmp_path)).init == str(tmp_path / "step_00000003.pt")
    (tmp_path / "backbone.pt").touch()
    assert method(init=str(tmp_path)).init == str(tmp_path / "backbone.pt")
    assert method(init="imagenet", norm="frozen").init == "imagenet"


# fmt: off
REFUSED = {
    "--recipe coco": "--recipe coco does not exist; there are tiny, coco-r50, ",
    "--backbone resnet51": "--backbone resnet51 does not exist; there are resnet10, .*resnet50",
    "--recipe seg-tiny --backbone spinenet49": "--backbone spinenet49 is for RetinaNet",
    "--recipe tiny-c4 --backbone tf_efficientnet_b0": "--recipe tiny-c4 needs a ResNet",
    "--image-size 100": "--image-size must be a multiple of 32",
    "--image-size 0": "--image-size must be a multiple of 32",
    "--steps 0": "--steps 0 is too small",
    "--student-steps -1": "--student-steps -1 is too small",
    "--batch 0": "--batch 0 is too small",
    "--accumulate 0": "--accumulate 0 is too small",
    "--batch 3 --accumulate 2": "3 images a step do not divide by 1 processes x --accumulate 2",
    "--recipe pascal-l2 --batch 2 --accumulate 2": "1 images a step do not divide",
    "--seed -1": "--seed.* must not be below 0",
    "--alpha -1": "--alpha.* must not be below 0",
    "--eval-every -1": "--eval-every.* must not be below 0",
    "--lr 0": "--lr 0.0 must be above 0",
    "--lr nan": "--lr nan must be above 0",
    "--threshold 1.5": "--threshold 1.5 is no number from 0 to below 1",
    "--threshold nan": "--threshold nan is no number",
    "--threshold high": "--threshold high is no number",
    "--recipe seg-tiny --threshold auto": "--threshold auto is no number .*for boxes",
    "--norm frozen": "--norm frozen keeps given weights: give --init",
    "--init nowhere.pth": "--init nowhere.pth is no file of weights",
    "--scales 1,big": "--scales 1,big is no list of numbers",
    "--labeled 0": "--labeled 0.0 must be above 0",
    "--labeled 1.1": "--labeled 1.1 must be above 0 and up to 1",
    "--rounds 0": "--rounds must be 1 or more",
    "--rounds 2 --pseudo runs/x/pseudo": "--pseudo is for one round",
    "--recipe cls-tiny --joint shapes": "--joint is for RetinaNet and segmentation",
    "--recipe tiny-c4 --joint shapes": "--joint is for RetinaNet and segmentation",
}
# fmt: on


@pytest.mark.parametrize("argv", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(argv, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=REFUSED[argv]) as error:
        st.main([*argv.split(), "--out", str(out), "--device", "cpu"])
    assert "\n" not in str(error.value) and not out.exists()


# ---- what a stage is made from -------------------------------------------------------------------


def test_a_stage_is_compared_by_what_decides_its_result_and_by_nothing_else(coco_root, tmp_path):
    human = data.coco(coco_root, "train")
    val = data.coco(coco_root, "val")

    def inputs(images=human, part="human", count=16, start=None, **given):
        parts = {part: (images, count)}
        return recipes.training_inputs(method(**given), parts, 12, start, val, torch.float32)

    teacher = inputs()
    same = ({"alpha": 2.0}, {"threshold": "0.3"}, {"student_steps": 7}, {"eval_every": 5})
    assert all(inputs(**given) == teacher for given in same)
    student = inputs(part="pseudo")
    for given in ({"lr": 0.1}, {"seed": 1}, {"norm": "gn"}, {"accumulate": 2}, {"batch": 8}):
        assert {k for k, v in inputs(**given).items() if v != teacher[k]} == given.keys()
    for given in ({"alpha": 2.0}, {"student_init": "same"}):
        different = inputs(part="pseudo", **given)
        assert {k for k, v in different.items() if v != student[k]} == given.keys()
    for given in ({"count": 32}, {"images": human.subset(range(23))}):
        assert {k for k, v in inputs(**given).items() if v != teacher[k]} == {"human"}
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    given = inputs(init=str(tmp_path / "a.pth"))
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")  # what is in the file decides
    assert given == inputs(init=str(tmp_path / "b.pth")) != teacher
    json.dumps(given)


def test_another_threshold_asks_for_the_same_answers_unless_it_is_below_the_floor():
    for threshold in ("auto", "0.05", "0.9"):
        assert recipes.answering(method(threshold=threshold)) == {"floor": 0.05}
    assert recipes.answering(method("tiny-c4", threshold="0.01")) == {"floor": 0.01}
    how = recipes.answering(method("seg-tiny", threshold="0.3", flip=True))
    assert how == {"scales": (0.5, 0.75, 1, 1.25, 1.5, 1.75), "flip": True}  # the paper's
    assert not recipes.answering(method("cls-tiny"))


def test_a_teacher_depends_on_alpha_only_in_joint_training(voc_root, class_root):
    images, classified = data.voc(voc_root, "train"), data.folder(class_root, "train")
    c = recipes.method("seg-tiny")
    parts = {"human": (images, 4)}
    alone = recipes.training_inputs(c, parts, 1, None, images, torch.float32)
    assert not {"alpha", "loss_norm", "threshold", "student_steps"} & set(alone)
    parts["classified"] = (classified, 4)
    joint = recipes.training_inputs(c, parts, 1, None, images, torch.float32)
    assert {"alpha", "loss_norm"} <= set(joint) and "threshold" not in joint
