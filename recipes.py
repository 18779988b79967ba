"""The papers' settings as rows of literal tables, and how flags are laid over a row.

[code] is the TensorFlow TPU detection code (tensorflow/tpu, models/official/detection); [recalled]
is a paper's text from memory, not checked against a copy. lr is for ref_batch human-labelled images
a step and scales with --batch (see scaled_lr).
"""

import dataclasses
import math
import os

import backbones
import util
from util import flag, need

FLOOR = 0.05  # answers of a lower score are not stored

# What the COCO recipes share: size, batch, lr and its warm-up, weight decay and threshold are
# Zoph et al. 2020's for EfficientNet-B7 [recalled]; optimiser, levels, heads, anchors and momentum
# (0.997 in TensorFlow's counting) are [code].
# fmt: off
COCO = dict(
    task="det", image_size=640, batch=256, ref_batch=256, optimizer="sgd", warmup=1000,
    warmup_from=0.01, weight_decay=1e-4, clip=0.0, threshold="0.5", aug="s4", levels=(3, 7),
    width=256, depth=4, anchor_base=4.0, act="relu", momentum=0.003)
# Released configurations of SpineNet: lr drops by 10 twice [code: configs/spinenet,
# projects/self_training/configs]. Conflicts:
#  - batch and lr: these rows follow the released 256 and 0.28 (190: 0.30). The paper halves both
#    for want of memory [recalled], which is --batch 128 here. Its number of steps is unknown.
#  - augmentation: 143 and 190 follow the paper's Table 5, S3 for the student and not for the
#    baseline. The teacher's flip + scale 0.1 .. 1.9 is the self-training configuration's (given
#    for evaluation); configs/spinenet has 0.5 .. 2.0 for all sizes, and so have 49 and 96 here.
#  - drop-connect 0.16 for 143, and lr and length of 190, are the self-training configuration's;
#    configs/spinenet has 0.2, 0.28 and 231,500 steps. Soft-NMS (Table 5) is not here.
# Head width and depth, anchors and swish belong to the backbone: backbones.SPINENETS.
SPINENET = dict(
    COCO, lr=0.28, steps=231_500, student_steps=231_500, warmup=2000, warmup_from=0.0067 / 0.28,
    drops=(217_610 / 231_500, 226_870 / 231_500), weight_decay=4e-5, clip=10.0)
# PASCAL segmentation: size, lr, warm-up, weight decay, clipping, momentum, NAS-FPN with 7 separable
# cells and a head of 3 x 256 are the released configurations' [code: projects/self_training/
# configs/pascal_seg_*]; the paper's init is ImageNet++ (Table 6), for --init to give. Conflicts:
#  - steps of B7: these rows follow the paper's 40k [recalled]; the configuration has 20k, as L2.
#  - augmentation: S4 as in Table 8's best column; the configuration (used for evaluation) has
#    flip + scale 0.2 .. 1.5 and no policy.
#  - L2's student sees 128 + 128 images a step, B7's 256 + 256 [recalled].
PASCAL = dict(
    task="seg", image_size=512, batch=256, ref_batch=256, optimizer="sgd", warmup=500,
    warmup_from=0.001 / 0.08, weight_decay=1e-5, clip=10.0, threshold="0.5", aug="s4",
    neck="nasfpn", levels=(3, 7), width=256, depth=3, stride=4, momentum=0.003)
SEG = dict(
    task="seg", backbone="resnet10", batch=8, ref_batch=8, steps=5000, student_steps=1200,
    optimizer="adamw", lr=1.5e-3, warmup=50, weight_decay=0.05, clip=10.0, threshold="0.5",
    aug="s4", neck="fpn", levels=(2, 5), depth=1, momentum=0.1)
# Detection transfer of HPT and MoCo: R50-C4 (rcnn.py; instances: Mask R-CNN), read: [moco] MoCo's
# detection/configs, [hpt] HPT's OpenSelfSup/benchmarks/detection/configs, [d2] detectron2's
# defaults. Batch 16, lr 0.02, VOC's steps and warm-up are [moco]'s, BDD's steps and sizes [hpt]'s;
# warm-up from 0.001, weight decay, anchors, regions, proposals and crop [d2]'s. Conflicts:
#  - HPT ran at batch 8 and lr 0.01 for as many steps [hpt]: bdd-c4 follows that, for the others it
#    is --batch 8 (lr follows).
#  - COCO's 90k steps are the 1x of HPT's table; [moco]'s file has 2x: --steps 180000.
#  - the longer side fits image_size where detectron2's shorter one has its test size (800: 1067 px
#    at 4:3; BDD's 512: 910 at 16:9); the policies shrink it as the shorter training sides do.
#    Pixels are normalised as ImageNet's, HPT's BDD by BDD's own.
C4 = dict(
    task="rcnn", backbone="resnet50", image_size=1088, batch=16, ref_batch=16, optimizer="sgd",
    lr=0.02, warmup=1000, warmup_from=0.001, weight_decay=1e-4, clip=0.0, threshold="0.5",
    momentum=0.1, anchors=(32, 64, 128, 256, 512), regions=512, crop=14,
    proposals=(12000, 2000, 6000, 1000), instances=False)
RECIPES = {
    # ours. Objects of 22-72 px on a 128 px canvas want small anchors; few steps want AdamW and
    # quicker batch-norm averages; and a teacher worth learning from wants most of them (with
    # 1500 + 1500 steps it was too weak to help).
    "tiny": dict(
        task="det", backbone="resnet10", image_size=128, batch=16, ref_batch=16, steps=2500,
        student_steps=800, optimizer="adamw", lr=2e-3, warmup=50, weight_decay=0.05, clip=10.0,
        threshold="auto", aug="s4", levels=(3, 6), width=64, depth=2, anchor_base=2.0, act="relu",
        momentum=0.1),
    # The B7 recipe on Table 4's ResNet-50, whose own lr and length are unknown.
    "coco-r50": dict(COCO, backbone="resnet50", lr=0.32, steps=120_000, student_steps=120_000),
    # 120k steps are for random init with S4; S1 took 45k [recalled]. Every other cell's length, the
    # student's too, is unknown. The weights of its ImageNet and ImageNet++ inits are what timm
    # calls tf_efficientnet_b7.aa_in1k and .ns_jft_in1k.
    "coco-b7": dict(
        COCO, backbone="tf_efficientnet_b7", lr=0.32, steps=120_000, student_steps=120_000),
    "coco-spinenet49": dict(SPINENET, backbone="spinenet49", aug="s1-large"),
    "coco-spinenet96": dict(SPINENET, backbone="spinenet96", aug="s1-large", image_size=1024),
    "coco-spinenet143": dict(
        SPINENET, backbone="spinenet143", aug="s1-wide", student_aug="s3", image_size=1280),
    "coco-spinenet190": dict(
        SPINENET, backbone="spinenet190", aug="s1-wide", student_aug="s3", image_size=1280,
        lr=0.30, steps=185_200, student_steps=185_200, warmup_from=0.0067 / 0.30,
        drops=(171_310 / 185_200, 180_570 / 185_200)),
    "voc-c4": dict(
        C4, steps=24_000, student_steps=24_000, warmup=100, drops=(18 / 24, 22 / 24),
        aug="s1-voc"),
    "bdd-c4": dict(
        C4, steps=90_000, student_steps=90_000, drops=(6 / 9, 8 / 9), image_size=928, batch=8,
        aug="s1-bdd"),
    "coco-c4": dict(
        C4, instances=True, steps=90_000, student_steps=90_000, drops=(6 / 9, 8 / 9),
        aug="s1-coco"),
    # ours: the same in minutes on a CPU, everything smaller. Chosen by speed; how it learns has
    # been looked at for 400 steps only (AP50 0.16 on the embedded world with all labels).
    "tiny-c4": dict(
        C4, backbone="resnet10", image_size=128, batch=8, ref_batch=8, steps=1200,
        student_steps=400, optimizer="adamw", lr=7e-4, warmup=50, warmup_from=0.01,
        weight_decay=0.05, clip=10.0, threshold="auto", aug="s1", student_aug="s4",
        anchors=(20, 36, 64), regions=64, crop=8, proposals=(1000, 300, 1000, 150)),
    # ours: a plain FPN down to stride 4. seg-tiny: lr and steps (with the size of the objects, and
    # how many have labels) by one criterion, that labels are what limits a supervised net.
    # seg-fine: a class for every single pixel, for objects and outlines a few pixels wide.
    "seg-tiny": dict(
        SEG, image_size=64, batch=16, ref_batch=16, steps=3000, student_steps=800, lr=4.2e-3,
        width=64, stride=4),
    "seg-fine": dict(SEG, image_size=256, width=32, stride=1),
    "pascal-b7": dict(
        PASCAL, backbone="tf_efficientnet_b7", lr=0.08, steps=40_000, student_steps=40_000),
    "pascal-l2": dict(
        PASCAL, backbone="tf_efficientnet_l2", lr=0.2, steps=20_000, student_steps=20_000,
        student_share=0.5, warmup_from=0.001 / 0.2),
    # ours: flip and crop for the teacher, and for the student noise (Noisy Student; its threshold,
    # 0.3, is recalled).
    "cls-tiny": dict(
        task="cls", backbone="resnet10", image_size=96, batch=32, ref_batch=32, steps=1500,
        student_steps=1500, optimizer="adamw", lr=3e-3, warmup=50, weight_decay=0.05, clip=10.0,
        threshold="0.3", aug="s1", student_aug="s4", momentum=0.1),
}
# fmt: on


@dataclasses.dataclass
class Method:
    """what decides the result: compared when a stage is resumed; [recipe's] unless given"""

    recipe: str = flag("tiny", "row of recipes.py: " + ", ".join(RECIPES))
    seed: int = flag(0, "of weights, label split, image order and augmentation")
    aug: str = flag(
        None, "Augment-S1 (flip, crop) .. S4 (RandAugment, large jitter)", ("s1", "s2", "s3", "s4")
    )
    alpha: float = flag(1.0, "weight of the pseudo-labels in the joint loss")
    loss_norm: str = flag("on", "off: the plain sum instead of the normalised loss", ("on", "off"))
    threshold: str = flag(
        None,
        "score from which an answer is a pseudo-label; auto (boxes): best F1 on a held-out tenth",
    )
    student_init: str = flag(
        "teacher", "from the teacher's weights, or as the teacher started", ("teacher", "same")
    )
    scales: str = flag("0.5,0.75,1,1.25,1.5,1.75", "seg: pseudo-labels are averaged over these")
    flip: bool = flag(False, "seg: ... and over the mirrored image as well")
    backbone: str = flag(None, "one of " + ", ".join(backbones.NAMES))
    init: str = flag(
        "random", "of the backbone: random, imagenet, a stage's folder, or a file (see README)"
    )
    norm: str = flag(
        "bn", "batch norm; group norm; batch norm, the backbone's as given", ("bn", "gn", "frozen")
    )
    image_size: int = flag(None, "side of the square canvas, a multiple of 32")
    batch: int = flag(None, "human-labelled images a step; the student sees as many pseudo-labels")
    steps: int = flag(None, "of the teacher")
    student_steps: int = flag(None, "of the student and the control; --steps if that is given")
    lr: float = flag(None, "peak, at the recipe's batch; scaled with --batch (adamw: its root)")
    accumulate: int = flag(1, "pieces of a step: less memory, same loss (batch norm sees a piece)")
    eval_every: int = flag(0, "steps between scores while training; 0: only in the end")
    # of the recipe alone
    task: str = ""  # a row of st.TASKS
    ref_batch: int = 0
    student_aug: str = None
    student_share: float = 1.0  # of --batch, for the student's human and pseudo-labels each
    optimizer: str = ""
    warmup: int = 0  # steps
    warmup_from: float = 0.01  # share of the peak
    drops: tuple = ()  # shares of all steps from which on lr is a tenth
    weight_decay: float = 0.0
    clip: float = 0.0  # of the gradient's norm, 0: not
    momentum: float = 0.1  # of batch norms' averages
    levels: tuple = (2, 5)  # of the pyramid
    width: int = 0
    depth: int = 0
    anchor_base: float = 0.0
    act: str = "relu"
    neck: str = ""
    stride: int = 4  # of the logits
    anchors: tuple = ()  # from here on: rcnn.py
    regions: int = 0
    crop: int = 0
    proposals: tuple = ()
    instances: bool = False


def method(recipe="tiny", **given):
    """The recipe's row with what is given laid over it. UserError for what cannot work."""
    need(recipe in RECIPES, f"--recipe {recipe} does not exist; there are {', '.join(RECIPES)}")
    row = RECIPES[recipe]
    c = Method(**{**row, **given, "recipe": recipe})
    # 1) What is given holds for the student too, 2) then the recipe's own, 3) then the teacher's.
    c.student_aug = given.get("aug", row.get("student_aug", c.aug))
    c.student_steps = given.get("student_steps", given.get("steps", c.student_steps))
    if c.backbone in backbones.SPINENETS:  # it is its own pyramid, and its head belongs to it
        *_, c.width, c.depth, c.anchor_base = backbones.SPINENETS[c.backbone]
        c.levels = (3, 7)
        c.act = "swish"
    c.init = util.weights_of(c.init)
    check(c)
    return c


def check(c):
    sizes = {"steps": c.steps, "student-steps": c.student_steps, "batch": c.batch}
    for name, value in {**sizes, "accumulate": c.accumulate}.items():
        need(value >= 1, f"--{name} {value} is too small; give 1 or more")
    sentence = "--seed, --alpha and --eval-every must not be below 0"
    need(min(c.seed, c.alpha, c.eval_every) >= 0, sentence)
    need(c.lr > 0, f"--lr {c.lr} must be above 0")
    need(c.image_size % 32 == 0 < c.image_size, "--image-size must be a multiple of 32")
    sentence = f"--backbone {c.backbone} does not exist; there are {', '.join(backbones.NAMES)}"
    need(c.backbone in backbones.NAMES, sentence)
    pyramid = c.backbone in backbones.SPINENETS
    need(c.task == "det" or not pyramid, f"--backbone {c.backbone} is for RetinaNet; give another")
    resnet = c.backbone in backbones.RESNETS
    need(c.task != "rcnn" or resnet, f"--recipe {c.recipe} needs a ResNet, not {c.backbone}")
    boxes = c.task in ("det", "rcnn")
    need(
        is_share(c.threshold) or (c.threshold == "auto" and boxes),
        f"--threshold {c.threshold} is no number from 0 to below 1, nor (for boxes) auto",
    )
    random = c.init == "random"
    need(c.norm != "frozen" or not random, "--norm frozen keeps given weights: give --init, too")
    known = c.init in ("random", "imagenet")
    need(
        known or os.path.isfile(backbones.split_source(c.init)[1]),
        f"--init {c.init} is no file of weights, nor a stage's folder such as runs/x/student",
    )
    scales(c.scales)


def is_share(text):
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def scales(text):
    """'0.5,1' -> (0.5, 1.0)."""
    try:
        values = tuple(float(number) for number in text.split(","))
    except ValueError:
        values = (math.nan,)
    fits = all(0.1 <= value <= 4 for value in values)
    need(fits, f"--scales {text} is no list of numbers from 0.1 to 4 such as 0.5,1,1.5")
    return values


def answering(c):
    """What the task's function of answers takes besides: how pseudo-labels are made."""
    if c.task == "seg":
        return {"scales": scales(c.scales), "flip": c.flip}
    if c.task == "cls":
        return {}
    floor = FLOOR
    if c.threshold != "auto":
        floor = min(floor, float(c.threshold))
    return {"floor": floor}


def student_batch(c):
    """Human-labelled images of the student's steps, and pseudo-labelled ones."""
    return round(c.student_share * c.batch)


def scaled_lr(c):
    """lr is given for ref_batch human-labelled images. The student's pseudo half does not count:
    the paper keeps the teacher's lr [recalled]."""
    ratio = c.batch / c.ref_batch
    if c.optimizer == "adamw":
        ratio = math.sqrt(ratio)
    return c.lr * ratio


# ---- what a stage is made from: compared when it is resumed --------------------------------------

# fmt: off
STUDENT = (  # what a teacher does not depend on
    "alpha", "loss_norm", "threshold", "student_init", "student_aug", "student_steps",
    "student_share", "scales", "flip")
# fmt: on


def training_inputs(c, parts, steps, start, val, dtype):
    """Of a stage that trains: the method, its images, the weights it starts from."""
    inputs = dataclasses.asdict(c)
    del inputs["eval_every"]
    if "pseudo" not in parts and not start:
        for name in STUDENT:
            if "classified" not in parts or name not in ("alpha", "loss_norm"):
                del inputs[name]
    inputs["init"] = init_digest(c.init)
    for name, (images, count) in parts.items():
        inputs[name] = f"{count} a step of {images.digest()}"
    if start:
        inputs["start"] = weights_digest(start)
    return {**inputs, "steps": steps, "validation": val.digest(), "precision": str(dtype)}


def labelling_inputs(c, net, images, held_out, dtype):
    """Of a store of answers: the network's weights and the images."""
    inputs = {
        "weights": util.digest_weights(net.state_dict()),
        "images": util.digest([images.path(i) for i in range(len(images))]),
        "image_size": c.image_size,
        "precision": str(dtype),
    }
    if c.threshold == "auto":
        inputs["held_out"] = held_out.digest()
    return inputs


def init_digest(init):
    """What tells one --init from another: what is in the file, wherever that lies."""
    if init in ("random", "imagenet"):
        return init
    simclr, path = backbones.split_source(init)
    return util.digest([simclr, util.digest_file(path)])


def weights_digest(folder):
    """Of the weights in a stage's folder."""
    result = util.read_stage(folder).get("result", {})
    return result.get("weights") or util.digest_weights(util.stage_state(folder)["model"])
