"""Settings of st.py: its flags, the recipes of the papers as rows of one table, flags laid over a row, and what it costs.

[code] is the TensorFlow TPU detection code (tensorflow/tpu, models/official/detection), [recalled] is the paper's text from
memory, not checked against a copy. lr is for ref_batch human-labelled images a step and scales with --batch (see st.scaled_lr).

    python st.py --recipe coco-b7 --dry-run        prints the effective settings, parameters, steps and memory, and exits
"""
import math
import os
from dataclasses import asdict, dataclass

import torch

import backbones
import runs
from util import UserError

# What the COCO recipes share: size, batch, lr and its warm-up, weight decay and threshold are Zoph et al. 2020's for
# EfficientNet-B7 [recalled]; optimiser, levels, heads, anchors and momentum (0.997 in TensorFlow's counting) are [code].
COCO = dict(task="det", image_size=640, batch=256, ref_batch=256, optimizer="sgd", warmup=1000, warmup_from=0.01, drops=(),
            weight_decay=1e-4, clip=0.0, threshold="0.5", aug="s4", student_aug="s4", levels=(3, 7), width=256, depth=4,
            anchor_base=4.0, act="relu", momentum=0.003)
# Released configurations of SpineNet: lr drops by 10 twice [code: configs/spinenet, projects/self_training/configs]. Conflicts:
#  - batch and lr: these rows follow the released 256 and 0.28 (190: 0.30). The paper halves both for want of memory [recalled],
#    which is --batch 128 here: lr follows. Its number of steps is unknown.
#  - augmentation: 143 and 190 follow the paper's Table 5, S3 for the student and not for the baseline, which did not train with
#    it. The teacher's flip + scale 0.1 .. 1.9 is that of the self-training configuration (given for evaluation); in the versions
#    seen, configs/spinenet has 0.5 .. 2.0 for all sizes, and so have 49 and 96 here, which the paper does not use.
#  - drop-connect 0.16 for 143, and lr and length of 190, are the self-training configuration's; configs/spinenet has 0.2, 0.28
#    and 231,500 steps. Soft-NMS (Table 5) is not here.
# Head width and depth, anchors and swish belong to the backbone: backbones.SPINENETS.
SPINENET = dict(COCO, lr=0.28, steps=231_500, student_steps=231_500, warmup=2000, warmup_from=0.0067 / 0.28,
                drops=(217_610 / 231_500, 226_870 / 231_500), weight_decay=4e-5, clip=10.0)
# PASCAL segmentation: size, lr, warm-up, weight decay, clipping, momentum, NAS-FPN with 7 separable cells and a head of 3 x 256
# are the released configurations' [code: projects/self_training/configs/pascal_seg_*]; the paper's init is ImageNet++ (Table 6),
# which is for --init to give. Conflicts:
#  - steps of B7: these rows follow the paper's 40k [recalled]; the configuration has 20k, as for L2.
#  - augmentation: S4 as in Table 8's best column; the configuration (used for evaluation) has flip + scale 0.2 .. 1.5, no policy.
#  - L2's student sees 128 + 128 images a step, B7's 256 + 256 [recalled].
PASCAL = dict(task="seg", image_size=512, batch=256, ref_batch=256, optimizer="sgd", warmup=500,
              warmup_from=0.001 / 0.08, drops=(), weight_decay=1e-5, clip=10.0, threshold="0.5", aug="s4", student_aug="s4",
              neck="nasfpn", levels=(3, 7), width=256, depth=3, stride=4, momentum=0.003)
SEG = dict(task="seg", backbone="resnet10", batch=8, ref_batch=8, steps=5000, student_steps=1200, optimizer="adamw", lr=1.5e-3,
           warmup=50, warmup_from=0.01, drops=(), weight_decay=0.05, clip=10.0, threshold="0.5", aug="s4", student_aug="s4",
           neck="fpn", levels=(2, 5), depth=1, momentum=0.1)
# Detection transfer of HPT and MoCo: R50-C4 (rcnn.py; instances: Mask R-CNN), read: [moco] MoCo's detection/configs, [hpt] HPT's
# OpenSelfSup/benchmarks/detection/configs, [d2] detectron2's defaults. Batch 16, lr 0.02, VOC's steps and warm-up are [moco]'s,
# BDD's steps and sizes [hpt]'s; warm-up from 0.001, weight decay, anchors, regions, proposals and crop [d2]'s. Conflicts:
#  - HPT ran at batch 8 and lr 0.01 for as many steps [hpt]: bdd-c4 follows that, for the others it is --batch 8 (lr follows).
#  - COCO's 90k steps are the 1x of HPT's table; [moco]'s file has 2x: --steps 180000 (the drops keep their place).
#  - the longer side fits image_size where detectron2's shorter one has its test size (800: 1067 px at 4:3; BDD's 512: 910 at
#    16:9); the policies shrink it as the shorter training sides do. Pixels are normalised as ImageNet's, HPT's BDD by BDD's own.
C4 = dict(task="det", model="rcnn-c4", backbone="resnet50", image_size=1088, batch=16, ref_batch=16, optimizer="sgd", lr=0.02,
          warmup=1000, warmup_from=0.001, weight_decay=1e-4, clip=0.0, threshold="0.5", momentum=0.1,
          anchors=(32, 64, 128, 256, 512), regions=512, crop=14, proposals=(12000, 2000, 6000, 1000), instances=False)
RECIPES = {
    # ours. Objects of 22-72 px on a 128 px canvas want small anchors; few steps want AdamW and quicker batch-norm averages;
    # and a teacher worth learning from wants most of them (with 1500 + 1500 steps it was too weak to help).
    "tiny": dict(task="det", backbone="resnet10", image_size=128, batch=16, ref_batch=16, steps=2500, student_steps=800,
                 optimizer="adamw", lr=2e-3, warmup=50, warmup_from=0.01, drops=(), weight_decay=0.05, clip=10.0,
                 threshold="auto", aug="s4", student_aug="s4", levels=(3, 6), width=64, depth=2, anchor_base=2.0, act="relu",
                 momentum=0.1),
    # The B7 recipe on Table 4's ResNet-50, whose own lr and length are unknown.
    "coco-r50": dict(COCO, backbone="resnet50", lr=0.32, steps=120_000, student_steps=120_000),
    # 120k steps are for random init with S4; S1 took 45k [recalled]. Every other cell's length, the student's too, is unknown.
    # The weights of its ImageNet and ImageNet++ inits are what timm calls tf_efficientnet_b7.aa_in1k and .ns_jft_in1k.
    "coco-b7": dict(COCO, backbone="tf_efficientnet_b7", lr=0.32, steps=120_000, student_steps=120_000),
    "coco-spinenet49": dict(SPINENET, backbone="spinenet49", aug="s1-large", student_aug="s1-large"),
    "coco-spinenet96": dict(SPINENET, backbone="spinenet96", aug="s1-large", student_aug="s1-large", image_size=1024),
    "coco-spinenet143": dict(SPINENET, backbone="spinenet143", aug="s1-wide", student_aug="s3", image_size=1280),
    "coco-spinenet190": dict(SPINENET, backbone="spinenet190", aug="s1-wide", student_aug="s3", image_size=1280,
                             lr=0.30, steps=185_200, student_steps=185_200, warmup_from=0.0067 / 0.30,
                             drops=(171_310 / 185_200, 180_570 / 185_200)),
    "voc-c4": dict(C4, steps=24_000, student_steps=24_000, warmup=100, drops=(18 / 24, 22 / 24), aug="s1-voc",
                   student_aug="s1-voc"),
    "bdd-c4": dict(C4, steps=90_000, student_steps=90_000, drops=(6 / 9, 8 / 9), image_size=928, batch=8, aug="s1-bdd",
                   student_aug="s1-bdd"),
    "coco-c4": dict(C4, instances=True, steps=90_000, student_steps=90_000, drops=(6 / 9, 8 / 9), aug="s1-coco",
                    student_aug="s1-coco"),
    # ours: the same in minutes on a CPU, everything smaller. Chosen by speed; how it learns has been looked at for 400 steps only
    # (AP50 0.16 on the embedded world with all labels).
    "tiny-c4": dict(C4, backbone="resnet10", image_size=128, batch=8, ref_batch=8, steps=1200, student_steps=400,
                    optimizer="adamw", lr=7e-4, warmup=50, warmup_from=0.01, drops=(), weight_decay=0.05, clip=10.0,
                    threshold="auto", aug="s1", student_aug="s4", anchors=(20, 36, 64), regions=64, crop=8,
                    proposals=(1000, 300, 1000, 150)),
    # ours: a plain FPN down to stride 4. seg-tiny: lr and steps (with the size of the objects, and how many have labels) by one
    # criterion, that labels are what limits a supervised net; see studies.SETTINGS. seg-fine: a class for every single pixel, for
    # objects and outlines a few pixels wide.
    "seg-tiny": dict(SEG, image_size=64, batch=16, ref_batch=16, steps=3000, student_steps=800, lr=4.2e-3, width=64, stride=4),
    "seg-fine": dict(SEG, image_size=256, width=32, stride=1),
    "pascal-b7": dict(PASCAL, backbone="tf_efficientnet_b7", lr=0.08, steps=40_000, student_steps=40_000),
    "pascal-l2": dict(PASCAL, backbone="tf_efficientnet_l2", lr=0.2, steps=20_000, student_steps=20_000, student_batch=128,
                      warmup_from=0.001 / 0.2),
    # ours: flip and crop for the teacher, and for the student noise (Noisy Student; its threshold, 0.3, is recalled).
    "cls-tiny": dict(task="cls", backbone="resnet10", image_size=96, batch=32, ref_batch=32, steps=1500, student_steps=1500,
                     optimizer="adamw", lr=3e-3, warmup=50, warmup_from=0.01, drops=(), weight_decay=0.05, clip=10.0,
                     threshold="0.3", aug="s1", student_aug="s4", momentum=0.1),
}
TASKS = {"det": "tiny", "seg": "seg-tiny", "cls": "cls-tiny"}  # and the recipe of each when none is named
CLASSES = {"det": 80, "seg": 21, "cls": 1000}  # of COCO, PASCAL and ImageNet, for --dry-run
FILES = {"det": "coco", "seg": "voc", "cls": "folder"}  # what each reads besides the embedded world


@dataclass
class Config:
    mode: str = "run"
    task: str = "det"
    out: str = "runs/default"
    seed: int = 0
    data: str = "shapes"
    root: str = "datasets/shapes"
    labeled: float = 0.2
    split: str = ""
    unlabeled: str = ""
    train_list: str = "train"
    masks: str = "SegmentationClass"
    recipe: str = None
    model: str = None
    aug: str = None
    alpha: float = 1.0
    loss_norm: str = "on"
    threshold: str = None
    student_init: str = "teacher"
    rounds: int = 1
    control: bool = False
    joint: str = ""
    scales: str = "0.5,0.75,1,1.25,1.5,1.75"  # Zoph et al. [recalled]
    flip: bool = False
    soft: bool = False
    backbone: str = None
    init: str = "random"
    norm: str = "bn"
    ckpt: str = ""
    image_size: int = None
    batch: int = None
    steps: int = None
    student_steps: int = None
    lr: float = None
    optimizer: str = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: str = "auto"
    device: str = "auto"
    workers: int = -1
    save_every: int = 0
    eval_every: int = 0
    dry_run: bool = False


HELP = {
    "what to do": {
        "mode": "{run|train|pseudo|eval} run: the whole pipeline; train: the teacher only; pseudo: label --unlabeled "
                "with --ckpt; eval: score --ckpt",
        "task": "{det|seg|cls} detection (boxes), segmentation (a class per pixel) or classification (one per image)",
        "out": "run directory; the same command resumes it",
        "seed": "of initial weights, label split, image order and augmentation"},
    "data": {
        "data": "{shapes|coco|voc|folder} shapes: the embedded world; coco: COCO json files (det); voc: PASCAL VOC folders "
                "(seg); folder: class folders (cls)",
        "root": "coco: folder with annotations/ + train2017/ + val2017/, or train.json + val.json + images/; voc: folder with "
                "JPEGImages/, SegmentationClass/, ImageSets/Segmentation/{train,val}.txt and perhaps classes.txt; "
                "folder: train/CLASS/*.jpg and val/CLASS/*.jpg",
        "labeled": "fraction of the training images whose labels are used",
        "split": "label split written by 'data.py split' instead of --labeled and --seed",
        "unlabeled": "folder, glob, .txt list or COCO json of images, or (voc) the name of a list such as aug; default: the "
                     "training images not labelled; of the embedded world's segmentation, aug",
        "train_list": "voc: the list of training images, e.g. trainaug for train and aug with their labels",
        "masks": "voc: folder of the masks; SegmentationClassX goes with classesX.txt"},
    "method": {
        "recipe": "row of recipes.py, whose fields the flags override: " + ", ".join(RECIPES) + "; default: tiny, seg-tiny or "
                  "cls-tiny, which take minutes on a CPU",
        "model": "{retinanet|rcnn-c4} rcnn-c4: Faster R-CNN on C4 (rcnn.py), which its recipes name; alone it means tiny-c4",
        "aug": "{s1|s2|s3|s4} Augment-S1 (flip, crop) .. S4 (RandAugment, large scale jitter); default: the recipe's",
        "alpha": "weight of the pseudo-labels in the joint loss",
        "loss_norm": "{on|off} off: the plain sum of both losses instead of the paper's normalised one, for comparison",
        "threshold": "score from which a box becomes a pseudo-label; auto: best F1 on a held-out tenth of the labels; seg, "
                     "cls: the probability from which a pixel or image does",
        "student_init": "{teacher|same} student starts from the teacher's weights, or as the teacher did",
        "rounds": "repetitions of teacher <- student",
        "control": "also train without pseudo-labels from the student's start (in later rounds from the last control), for its "
                   "steps and images per step",
        "joint": "joint training: every step also classifies as many images of this set on the same backbone; shapes (the "
                 "embedded world's single objects) or a folder with train/CLASS/*.jpg",
        "scales": "seg: pseudo-labels are averaged over the image at these scales",
        "flip": "seg: average pseudo-labels over the mirrored image as well",
        "soft": "seg: the student learns the teacher's probabilities, not its likeliest class (ours; the paper's are hard)"},
    "network": {
        "backbone": "one of " + ", ".join(backbones.NAMES),
        "init": "of the backbone: random, imagenet (torchvision's weights), our checkpoint of any task (a file, or a stage's "
                "folder such as runs/x/student), torchvision's or timm's weights (.pth, .safetensors), MoCo's checkpoint, "
                "simclr:FILE for a converted ResNet",
        "norm": "{bn|gn|frozen} batch norm; group norm (independent of how images are spread over processes); or batch norm "
                "with the backbone's kept as --init has it",
        "ckpt": "for --mode pseudo and eval: checkpoint file or stage folder, or torchvision's retinanet_resnet50_fpn weights"},
    "training": {
        "image_size": "side of the square training canvas, a multiple of 32",
        "batch": "human-labelled images per step, over all processes; the student sees as many pseudo-labelled ones (pascal-l2: "
                 "half as many of each)",
        "steps": "of the teacher", "student_steps": "of the student (and the control)",
        "lr": "peak learning rate at the recipe's reference batch; scaled linearly with --batch (adamw: square root)",
        "optimizer": "{sgd|adamw} sgd: momentum 0.9",
        "accumulate": "cut each step's batch into this many pieces: less memory, same loss (batch norm sees one piece; "
                      "with --norm gn the same result, but for the draws of stochastic depth)",
        "gradient_checkpointing": "keep less for the backward pass and compute it again: less memory, same result, slower",
        "compile": "torch.compile the network for training (needs a C++ compiler on a CPU)",
        "precision": "{auto|bf16|fp32} auto: bf16 where the hardware has it; losses are always fp32",
        "device": "{auto|cpu|cuda} auto: the GPU if there is one",
        "workers": "loader processes per training process; -1: 1 on a CPU, up to 8 with a GPU",
        "save_every": "steps between checkpoints (0: a tenth of the stage)",
        "eval_every": "steps between scores on the validation set during training (0: only at its end; what is finished is not "
                      "scored again)",
        "dry_run": "print the effective settings, parameters, steps and memory, and exit"},
}


def settings(flags, ranks):
    """The recipe's row with the flags laid over it: every value that training uses."""
    recipe = flags.recipe = flags.recipe or ("tiny-c4" if flags.model == "rcnn-c4" else TASKS[flags.task])
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe} does not exist; there are {', '.join(RECIPES)}")
    c = dict(RECIPES[recipe])
    if c["task"] != flags.task:
        raise UserError(f"--recipe {recipe} is for --task {c['task']}; add that")
    own = c.get("model", "retinanet")
    if (flags.model or own) != own:
        raise UserError(f"--recipe {recipe} is for --model {own}; leave one of them out")
    c.update({k: v for k, v in asdict(flags).items() if k in c and v is not None})
    c.update({k: getattr(flags, k) for k in ("alpha", "loss_norm", "init", "norm", "seed", "accumulate", "gradient_checkpointing",
                                             "compile", "workers", "save_every", "eval_every", "flip", "soft", "scales")})
    scales(c["scales"])
    check_data(flags.data, flags.task)
    c["student_aug"] = flags.aug or c["student_aug"]
    if flags.student_steps is None and flags.steps is not None:
        c["student_steps"] = flags.steps
    if c["backbone"] in backbones.SPINENETS:  # it is its own pyramid, and its head belongs to it
        *_, c["width"], c["depth"], c["anchor_base"] = backbones.SPINENETS[c["backbone"]]
        c.update(levels=(3, 7), act="swish")
    c["student_batch"] = c.get("student_batch", RECIPES[recipe]["batch"]) * c["batch"] // RECIPES[recipe]["batch"]
    c["init"] = runs.weights_of(c["init"])
    row, pieces, size = RECIPES[recipe], ranks * max(c["accumulate"], 1), c["image_size"]
    coarsest = math.ceil(size / 2 ** c.get("levels", (2, 5))[1]) ** 2  # cells of the last level
    for name, least in (("steps", 1), ("student_steps", 1), ("batch", 1), ("accumulate", 1), ("seed", 0), ("alpha", 0),
                        ("eval_every", 0)):
        if not c[name] >= least:
            raise UserError(f"--{name.replace('_', '-')} {c[name]} is too small; give {least} or more")
    for wrong, line in (
            (not c["lr"] > 0 or flags.rounds < 1, f"--lr {c['lr']} and --rounds {flags.rounds} must be positive"),
            (c["backbone"] not in backbones.NAMES,
             f"--backbone {c['backbone']} does not exist; there are {', '.join(backbones.NAMES)}"),
            (size % 32 or size <= 0, f"--image-size {size} is not a multiple of 32; use {max(32, size // 32 * 32)}"),
            (c["batch"] % pieces, f"--batch {c['batch']} does not divide by {ranks} processes x --accumulate "
                                  f"{c['accumulate']}; use a multiple of {pieces}"),
            (c["student_batch"] % pieces or not c["student_batch"],
             f"the student's {c['student_batch']} labelled images a step (at --batch {c['batch']}) do not divide by {ranks} "
             f"processes x --accumulate {c['accumulate']}; use another --batch"),
            (c["norm"] != "gn" and c["batch"] // pieces * coarsest < 2,
             f"batch norm has a single value to average on the coarsest level at --batch {c['batch']}, --image-size {size}; "
             "raise either, or use --norm gn"),
            (c["task"] != "det" and c["backbone"] in backbones.SPINENETS,
             f"--backbone {c['backbone']} is for detection; --task {c['task']} takes a ResNet or an EfficientNet"),
            (c["task"] != "det" and c["threshold"] == "auto",
             "--threshold auto is for detection; give a probability, such as 0.5, from which a pixel or image is labelled"),
            ("model" in c and c["backbone"] not in backbones.RESNETS,
             f"--model rcnn-c4 needs the last stage of a ResNet as its head; --backbone {c['backbone']} has none such"),
            ("model" in c and (flags.joint or c["compile"]),
             "--model rcnn-c4 works neither with --joint nor with --compile; leave them out"),
            (c["norm"] == "frozen" and c["init"] == "random",
             "--norm frozen keeps the batch norms of given weights as they are, but --init random has none; use --norm bn or gn"),
            (flags.joint and c["task"] == "cls", "--joint adds classification to --task det or seg; leave it out"),
            (flags.joint and (c["compile"] or flags.dry_run),
             "--joint works neither with --compile nor with --dry-run, which would count too little; leave one out"),
            (c["task"] != "seg" and (flags.soft or flags.flip or flags.scales != Config.scales),
             "--soft, --flip and --scales are for --task seg; leave them out"),
            (c["compile"] and c["gradient_checkpointing"],
             "--compile decides by itself what to recompute; leave out --gradient-checkpointing, or --compile"),
            (flags.ckpt, "--ckpt is for --mode pseudo and eval; to start a backbone from weights use --init"),
            (c["init"] not in ("random", "imagenet") and not os.path.isfile(backbones.split_source(c["init"])[1]),
             f"--init {c['init']} is not a file, nor a folder with a usable step_*.pt file; give random, imagenet, a file of "
             "weights, or a stage's folder such as runs/x/student"),
            (not 0 < flags.labeled <= 1, f"--labeled {flags.labeled} is not a fraction; give a number above 0 and up to 1"),
            (c["threshold"] != "auto" and not is_score(c["threshold"]),
             f"--threshold {c['threshold']} is neither auto nor a number from 0 to below 1"),
            (c["optimizer"] != row["optimizer"] and flags.lr is None,
             f"--optimizer {c['optimizer']} needs --lr: that of --recipe {recipe} is for {row['optimizer']}")):
        if wrong:
            raise UserError(line)
    return c


def check_data(name, task):
    if name not in ("shapes", FILES[task]):
        raise UserError(f"--data {name} is not for --task {task}; use shapes or {FILES[task]}")


def scales(text):
    """'0.5,1' -> (0.5, 1.0). UserError for anything else."""
    try:
        found = tuple(map(float, text.split(",")))
        if all(0.1 <= s <= 4 for s in found):
            return found
    except ValueError:
        pass
    raise UserError(f"--scales {text} is not a list of numbers from 0.1 to 4 such as 0.5,1,1.5")


def is_score(text):
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def memory(net, c, ranks, dtype):
    """Bytes that training needs on a device, estimated: (whatever the batch, for each image of a piece).

    net: on the meta device, so nothing is computed: what autograd keeps is counted while shapes flow through. Left out are
    the libraries' work space and fragmentation.
    """
    parameters = sum(p.numel() for p in net.parameters())
    # weights, gradients, the optimiser's averages, the low-precision copy that autocast keeps, DDP's buckets
    fixed = parameters * (4 + 4 + (4 if c["optimizer"] == "sgd" else 8) + (2 if dtype != torch.float32 else 0) + 4 * (ranks > 1))
    images = torch.zeros(2, 3, c["image_size"], c["image_size"], device="meta", dtype=dtype)
    net = net.to(dtype).train()
    blocks, insides, kept = [b for b in net.modules() if "forward" in vars(b)], [0], {}  # blocks: of gradient checkpointing
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # holding it keeps the number from being given to another
        return tensor

    def total():
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    def forward(before, after=lambda *_: None):
        hooks = [h for b in blocks for h in (b.register_forward_pre_hook(before), b.register_forward_hook(after))]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = net(images)
        for hook in hooks:
            hook.remove()
        return outputs
    # A block holds its input, out of autograd's sight. In the backward pass one block at a time holds its inside as well.
    outputs = forward(lambda _, args: [keep(t) for t in (args[0] if isinstance(args[0], list) else args[:1])] and None)
    activations = total()
    for block in blocks:
        del block.forward
    if blocks:
        forward(lambda *_: insides.append(-total()), lambda *_: insides.append(insides.pop() + total()))
    outputs = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    outputs = sum(x.numel() for x in outputs)
    losses = 4 * 4 * outputs  # in fp32: outputs, their gradients, and the loss's own copies
    return fixed, (activations + max(insides) + losses) / len(images)


def dry_run(net, flags, c, classes, ranks, dtype, lr):
    """What --dry-run prints. net: as for memory(); lr: the scaled one."""
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    fixed, each = (x / 1e9 for x in memory(net, c, ranks, dtype))
    piece, pieces = c["batch"] // ranks // c["accumulate"], ranks * c["accumulate"]
    student = 2 * c["student_batch"] // pieces
    effective = {**asdict(flags), **c, "precision": str(dtype)[6:], "lr": f"{lr:.4g} ({c['lr']:g} at batch {c['ref_batch']})",
                 "warmup": min(c["warmup"], c["steps"] // 10)}
    return "\n".join([
        *(f"{k:24s}{v}" for k, v in effective.items()), "",
        f"parameters              {parameters:.1f} M with {classes} classes ({c['backbone']})",
        f"steps                   teacher {c['steps']:,} of {c['batch']} images, student {c['student_steps']:,} of "
        f"{c['student_batch']} + {c['student_batch']}",
        f"in pieces of            {piece} images (student: {student}) on each of {ranks} processes, {str(dtype)[6:]}",
        f"memory, estimated       {fixed:.1f} GB + {each:.2f} GB an image: teacher {fixed + piece * each:.0f} GB, student "
        f"{fixed + student * each:.0f} GB on each device; 80 GB fit about {max(0, int((72 - fixed) / each))} images",
        "                        more processes, --accumulate or --gradient-checkpointing make it less"])
