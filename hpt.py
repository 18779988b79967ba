"""Hierarchical pre-training, HPT (Reed et al. 2022, "Self-Supervised Pretraining Improves
Self-Supervised Pretraining", arXiv 2103.12718): MoCo v2 (Chen et al. 2020), starting from a
backbone that is pre-trained already, on one set of images after another.

    python hpt.py                          Base, Target, HPT, HPT-BN on the embedded world's domains
    python hpt.py --recipe hpt --init moco_v2_800ep_pretrain.pth.tar --stage DIR:5000 \\
        --eval linear --data DIR --out runs/hpt
    python hpt.py --stage datasets/shapes/photo:600 --stage datasets/shapes/sketch:200:bn ...
    torchrun --nproc_per_node 4 hpt.py --recipe hpt ...

A stage is SRC[:STEPS[:MODE]]; SRC is a folder of images or a .txt list. MODE:
    all     everything is trained                          Target (from random), HPT (from a base)
    bn      batch norm's affine, and the projection; statistics move, convolutions stay     HPT-BN
    stats   batch norm's statistics are estimated anew, nothing is trained                    Base
Each is a run of its own, with its own cosine, in OUT/1_all_photo/ and so on; only the query's
backbone goes from one to the next, as backbone.pt (torchvision's names; st.py --init takes it).
Pixels are normalised by each source's own mean and deviation, which backbone.pt holds; st.py
normalises by ImageNet's. The same command resumes, bit for bit on CPU.

Facts are the released code's where it and the text disagree: HPT-BN trains affine and moves
statistics; the projection is drawn anew in every stage. Unlike there, gradients of HPT-BN and
running statistics are averaged over the processes, and batch-norm groups do not depend on their
number, up to that of groups. The paper's HPT-BN is the best of up to four learning rates (0.03,
0.003, 0.1, and 0.1 on crops and flips alone), here one run with the given --lr. How Base's
statistics are estimated is unknown: here as the average over groups of the views the others are
trained on. Not here: BYOL, LARS.
"""

import copy
import dataclasses
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import augment
import backbones
import data
import models
import recipes
import transfer
import util
from util import flag, need

# ---- recipes -------------------------------------------------------------------------------------

# MoCo v2 as in HPT's configurations: SGD, momentum 0.9, lr linear in the batch, cosine to 0, no
# warm-up. groups: into how many batch norm cuts a batch (there: GPUs); queue, m: keys and their
# encoder's momentum; crop .. flip: augment.view; tune_epochs: fine-tuning is also tried for so many
# passes over its labels.
# fmt: off
MOCO = dict(
    method="moco", backbone="resnet50", image_size=224, batch=256, groups=4, queue=65536, m=0.999,
    steps=5000, lr=0.03, weight_decay=1e-4, crop=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2,
    blur=(0.1, 2), flip=0.5, pixels="source", probe_steps=5000, tune_steps=2500, tune_epochs=90,
    tune_batch=256)
RECIPES = {
    "hpt": MOCO,  # hue 0.4, though its base was trained with 0.1
    # The official one: 200 epochs of ImageNet (per-epoch cosine there, per step here).
    "moco-v2": dict(
        MOCO, groups=8, jitter=(0.4, 0.4, 0.4, 0.1), steps=200 * 5004, pixels="imagenet"),
    # SimCLR (Chen et al. 2020), 100 epochs of ImageNet: views and batch theirs [recalled]. SGD as
    # above for want of LARS; no batch norm in the projection.
    "simclr": dict(
        MOCO, method="simclr", batch=4096, steps=100 * 313, crop=(0.08, 1),
        jitter=(0.8, 0.8, 0.8, 0.2), pixels="imagenet"),
    # Ours, for two CPU cores: keys that follow within hundreds of steps, few of them. lr: on
    # strokes, before any study.
    "tiny": dict(
        MOCO, backbone="resnet10", image_size=64, batch=64, groups=2, queue=1024, m=0.99,
        steps=400, lr=0.6, jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.1, 1), probe_steps=2000,
        tune_steps=200, tune_epochs=0, tune_batch=64),
}
VIEWS = {  # --views: what is not done to them, as in the released configurations; in the text,
    # always one thing more [recalled]
    "baseline": (), "no-grey": ("grey",), "no-colour": ("jitter",),
    "crop-blur": ("jitter", "grey", "flip"), "crop": ("jitter", "grey", "flip", "blur")}
# fmt: on
TEMPERATURE = {"moco": 0.2, "simclr": 0.1}
DIM = 128  # of the embedding
VALUES = ("loss", "positive", "negative")  # of a step: loss, mean similarity of pairs
WORLD = "datasets/shapes"
# The run without arguments: the base, and what follows it; Target starts from random weights.
BASE = f"{WORLD}/single:2000"
DEMO = {
    "Base": f"{WORLD}/sketch:stats",
    "Target": f"{WORLD}/sketch:1500",
    "HPT": f"{WORLD}/sketch:400",
    "HPT-BN": f"{WORLD}/sketch:400:bn",
}


@dataclasses.dataclass
class Plan:
    """what is done, with which images"""

    out: str = flag("runs/hpt", "run directory; the same command resumes it")
    init: str = flag("random", "backbone to start from: random, imagenet, a stage, a file")
    stage: list = flag(None, "SRC[:STEPS[:all|bn|stats]], any number of times")
    eval: str = flag("", "any of linear,finetune,knn,mme, of the last backbone")
    data: str = flag("", "labelled images (transfer.py) [those of the last stage]")
    source: str = flag("", "of mme: the labelled domain; --data is the target")
    budgets: str = flag("1,3,10", "of mme: target labels a class")


@dataclasses.dataclass
class Method:
    """what decides the result: compared when a stage is resumed; [recipe's] unless given"""

    recipe: str = flag("tiny", "row that sets what follows", tuple(RECIPES))
    seed: int = flag(0, "of weights, image order, views, probes")
    method: str = flag(None, "a queue of keys, or the batch's other views", ("moco", "simclr"))
    backbone: str = flag(None, "see backbones.py")
    image_size: int = flag(None, "of the views, pixels")
    batch: int = flag(None, "images of a step, over all processes")
    groups: int = flag(None, "of a batch that batch norm sees apart, over all processes")
    queue: int = flag(None, "K, keys in MoCo's queue, a multiple of the batch")
    lr: float = flag(None, "at batch 256; scaled with the batch")
    views: str = flag("baseline", "all the recipe does to them, or less", tuple(VIEWS))
    fraction: float = flag(1.0, "of every stage's images, nested, a batch or more")
    labels: int = flag(1000, "of finetune")
    augmented: bool = flag(False, "linear probe on random crops, as in the paper: slower")
    # of the recipe alone
    m: float = 0.0
    steps: int = 0
    weight_decay: float = 0.0
    crop: tuple = ()
    jitter: tuple = ()
    grey: float = 0.0
    blur: tuple = ()
    flip: float = 0.0
    pixels: str = ""  # normalised by the source's or by ImageNet's mean and deviation
    probe_steps: int = 0
    tune_steps: int = 0
    tune_epochs: int = 0
    tune_batch: int = 0


# of the method, what a stage does not depend on (its images tell the fraction)
# fmt: off
FREE = (
    "labels", "augmented", "probe_steps", "tune_steps", "tune_epochs", "tune_batch", "fraction")
# fmt: on

# ---- the method ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """images (B, 3, S, S) uint8 -> unit vectors (B, DIM) float32: backbone, mean over C5,
    Linear-ReLU-Linear without norm."""

    def __init__(self, name, pixels, dtype):
        super().__init__()
        self.backbone = backbones.build(name)
        self.pixels = pixels  # mean, deviation
        self.dtype = dtype
        c = self.backbone.channels[5]
        self.head = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, DIM))
        for layer in (self.head[0], self.head[2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, images):
        low = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=low):
            pixels = backbones.normalise(images, self.pixels)
            z = self.head(self.backbone(pixels)[5].mean((2, 3)))
        return F.normalize(z.float(), dim=1)


class MoCo(nn.Module):
    """MoCo v2 (He et al. 2020, Chen et al. 2020): query, key, queue of K keys, temperature T.

    groups: into how many batch norm cuts this process's images. Keys are computed in an order drawn
    at random, over all processes, so that a query cannot tell its key by the statistics of its
    group (shuffle-BN). Processes, and groups on one process, come to the same."""

    def __init__(self, query, K, m, T, groups, seed, proc):
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(DIM, K), dim=0))
        self.T = T
        self.groups = groups
        self.seed = seed
        self.proc = proc
        self.follow = get_ema_multi_avg_fn(m)  # key <- m key + (1 - m) query, all at once

    def forward(self, views, step):
        """views: uint8 (2, B, 3, S, S), this process's share of N images -> loss, [loss, positive,
        negative similarity]."""
        q = in_groups(self.query, views[0], self.groups)  # (B, D)
        with torch.no_grad():
            self.follow(list(self.key.parameters()), list(self.query.parameters()), None)
            keys = self.keys(views[1], step)  # (N, D)
        k = keys.chunk(self.proc.world)[self.proc.rank]  # (B, D)
        positive = (q * k).sum(1, keepdim=True)  # (B, 1)
        negative = q @ self.queue.clone()  # (B, K)
        logits = torch.cat([positive, negative], 1) / self.T  # (B, 1 + K)
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        at = step * len(keys) % self.queue.shape[1]  # the pointer; K is a multiple of N
        self.queue[:, at : at + len(keys)] = keys.T
        return loss, torch.stack([loss, positive.mean(), negative.mean()]).detach()

    def keys(self, images, step):
        """Keys of the whole batch, (N, D) in its order, each computed within a random group."""
        images = self.proc.cat(images)
        # drawn on the device: a copy would wait for it
        generator = torch.Generator(images.device).manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(images), generator=generator, device=images.device)
        share = images[order.chunk(self.proc.world)[self.proc.rank]]
        share = share.contiguous(memory_format=torch.channels_last)
        return self.proc.cat(in_groups(self.key, share, self.groups))[order.argsort()]

    def chance(self, batch):
        return math.log(1 + self.queue.shape[1])


class SimCLR(nn.Module):
    """NT-Xent: each of the 2N views of a step finds the other one of its image among all 2N - 1."""

    def __init__(self, query, T, proc):
        super().__init__()
        self.query = query
        self.T = T
        self.proc = proc

    def forward(self, views, step):
        """As MoCo's. Every process computes the loss of all views, in which its own carry gradient;
        times the processes, since DDP averages."""
        z = []
        for share in self.query(views.flatten(0, 1)).chunk(2):  # (B, D)
            shares = list(self.proc.cat(share.detach()).chunk(self.proc.world))
            shares[self.proc.rank] = share
            z += shares
        z = torch.cat(z)  # (2N, D)
        similar = z @ z.T  # (2N, 2N)
        other = torch.arange(len(z), device=z.device).roll(len(z) // 2)  # (2N,)
        loss = F.cross_entropy((similar / self.T).fill_diagonal_(-math.inf), other)
        positive = similar.gather(1, other[:, None]).mean()
        negative = (similar.sum() - len(z) * (1 + positive)) / (len(z) * (len(z) - 2))
        return loss * self.proc.world, torch.stack([loss, positive, negative]).detach()

    def chance(self, batch):
        return math.log(2 * batch - 1)


class Statistics(nn.Module):
    """Base: running statistics become the plain average over the batch-norm groups of the stage."""

    def __init__(self, query, groups):
        super().__init__()
        self.query = query
        self.groups = groups
        for norm in norms(query):
            norm.reset_running_stats()
            norm.momentum = None  # average, not moving average

    @torch.no_grad()
    def forward(self, views, step):
        for part in views[0].chunk(self.groups):
            self.query(part)
        return None, torch.zeros(len(VALUES), device=views.device)


def in_groups(net, images, groups):
    """net on each group of the images by itself, as on so many processes. Running statistics move
    once, to the groups' mean. (One forward over a batch reshaped to (B/g, g C, H, W) is slower on a
    CPU: it has to leave channels_last.)"""
    momenta = [(norm, norm.momentum) for norm in norms(net)]
    outputs = []
    for k, part in enumerate(images.chunk(groups)):
        for norm, momentum in momenta:
            # in the end 1 - momentum is left of the old value, momentum / groups of each group's
            norm.momentum = momentum / (groups - momentum * (groups - 1 - k))
        outputs.append(net(part))
    for norm, momentum in momenta:
        norm.momentum = momentum
    return torch.cat(outputs)


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze(backbone, mode):
    """Leaves trainable what the mode trains of a backbone."""
    backbone.requires_grad_(mode == "all")
    for norm in norms(backbone):
        norm.requires_grad_(mode != "stats")


def set_training(net, mode):
    """Stochastic depth is for what is trained; batch norm always goes by its batch."""
    net.train(mode == "all")
    for norm in norms(net):
        norm.train()


def train(folder, net, images, steps, c, seed, proc):
    """Trains net (MoCo, SimCLR or Statistics) for `steps` steps -> the last values of VALUES,
    seconds. The same call resumes."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained or [torch.zeros(1)], lr=0.0, momentum=0.9, weight_decay=c.weight_decay
    )
    parts = {"model": net, "optimizer": optimizer}
    ckpt = util.Checkpoint(folder, proc, before=lambda: average_statistics(net, proc), **parts)
    model = proc.wrap(net, sync=False) if trained else net
    count = 1 if isinstance(net, Statistics) else 2
    todo = range(ckpt.step, steps)
    meter = util.Meter(proc.log, folder.name, ckpt.step, steps, c.batch)
    batches = view_batches(images, todo, c, seed, count, proc)
    for step, views in zip(todo, meter.timed(batches)):
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + proc.rank)  # for stochastic depth
        if step == 0 and proc.rank == 0:
            save_views(views, folder / "first_batch.png")
        loss, values = model(views, step)
        lr = c.lr * c.batch / 256 * 0.5 * (1 + math.cos(math.pi * step / steps))
        if trained:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        values = (proc.sum(values) / proc.world).tolist()  # waits for the device
        finite = math.isfinite(sum(values))
        need(
            finite,
            f"{folder}: loss is not finite at step {step}; lower --lr, or give --precision fp32",
        )
        if meter.due(step + 1):
            meter.line(step + 1, **readings(net, values, step, c), lr=lr)
        ckpt.notes["values"] = values
        ckpt.step_done(steps)
    notes, seconds = ckpt.close()
    return notes["values"], seconds


def average_statistics(net, proc):
    if proc.world > 1:
        for norm in norms(net):
            for buffer in (norm.running_mean, norm.running_var):
                buffer.copy_(proc.sum(buffer.clone()) / proc.world)


def readings(net, values, step, c):
    """What the log shows of a step; chance: the loss of a network that knows nothing."""
    if isinstance(net, Statistics):
        return {}
    shown = dict(zip(VALUES, values), chance=net.chance(c.batch))
    if isinstance(net, MoCo):
        shown["queue"] = min(1, (step + 1) * c.batch / c.queue)  # how full of keys
    return shown


# ---- views ---------------------------------------------------------------------------------------


class Views(torch.utils.data.Dataset):
    """`count` views of an image, (count, S, S, 3) uint8. Key: (step, slot, index), and what is done
    to the image is drawn from (seed, step, slot)."""

    def __init__(self, images, c, seed, count):
        self.images = images
        self.seed = seed
        self.count = count
        self.how = {"size": c.image_size, "crop": c.crop, "jitter": c.jitter, "grey": c.grey}
        self.how.update(blur=c.blur, flip=c.flip)

    def __getitem__(self, key):
        step, slot, index = key
        image, _ = data.read(self.images, index)
        rng = np.random.default_rng((self.seed, step, slot))
        views = [augment.view(image, rng=rng, **self.how) for _ in range(self.count)]
        return np.stack([np.asarray(view) for view in views])


def collate(samples):
    """-> views uint8 (count, B, 3, S, S), each in channels_last."""
    return torch.from_numpy(np.stack(samples, 1)).permute(0, 1, 4, 2, 3)


def view_batches(images, steps, c, seed, count, proc):
    """This process's share of the batches of `steps`, of endless shuffled passes over images."""
    keys = (view_keys(len(images), step, c.batch, seed, proc) for step in steps)
    for views in data.loader(Views(images, c, seed, count), keys, proc.workers, collate):
        yield views.to(proc.device, non_blocking=True)


def view_keys(n, step, batch, seed, proc):
    slots = proc.share(batch)
    return [(step, slot, data.shuffled_index(step * batch + slot, n, seed)) for slot in slots]


def save_views(views, path, images=8):
    """The views of some images, a column each, as a PNG."""
    grid = views[:, :images].permute(0, 3, 1, 4, 2).cpu().numpy()  # (count, S, B, S, 3)
    count, S, B = grid.shape[:3]
    picture = Image.fromarray(grid.reshape(count * S, B * S, 3))
    util.write_atomic(path, lambda p: picture.save(p, "PNG"))


# ---- stages --------------------------------------------------------------------------------------


def images_of(source):
    """The images of a source. Of folders with train/ (or train.csv) only those, and those of val/
    if there is a test/ too: never what an evaluation reports on. Beside train.csv there may be a
    pretrain.txt that says which."""
    data.ensure(source)
    lists = transfer.has_lists(source)
    if lists and os.path.exists(f"{source}/pretrain.txt"):
        return data.listed(f"{source}/pretrain.txt", "--stage")
    ending = ".csv" if lists else ""
    there = [p for p in ("train", "val", "test") if os.path.exists(f"{source}/{p}{ending}")]
    if "train" not in there:
        return data.listed(source, "--stage")
    parts = [p for p in there if p == "train" or (p == "val" and "test" in there)]
    if lists:
        sets = [transfer.read_csv(source, part) for part in parts]
        return data.of_paths(sorted(set(paths_in(sets))), source)
    return data.of_paths(paths_in(data.listed(f"{source}/{p}", "--stage") for p in parts), source)


def paths_in(sets):
    return [images.path(i) for images in sets for i in range(len(images))]


def parse(text):
    """SRC[:STEPS[:MODE]] -> (SRC, STEPS or None, MODE)."""
    match = re.fullmatch(r"(.*?)(?::(\d+))?(?::(all|bn|stats))?", text)
    source, steps, mode = match.groups()
    fits = source and steps != "0" and (":" not in source or os.path.exists(source))
    need(fits, f"--stage {text} is not SRC[:STEPS[:all|bn|stats]], such as DIR:500:bn")
    return source, int(steps) if steps else None, mode or "all"


def slug(source):
    return re.sub(r"\W+", "-", Path(source).stem or "images")[:40]


def objective(query, mode, c, seed, proc):
    groups = c.groups // proc.world
    if mode == "stats":
        return Statistics(query, groups)
    if c.method == "moco":
        return MoCo(query, c.queue, c.m, TEMPERATURE["moco"], groups, seed, proc)
    net = SimCLR(query, TEMPERATURE["simclr"], proc)
    if proc.device.type == "cuda" and proc.world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # as SimCLR does
    return net


def pretrain(folder, source, images, steps, mode, init, init_digest, c, proc):
    """A stage: `init`, trained on images -> {"weights": hash, "mean", "std", ...}, and its
    folder/backbone.pt. The same call resumes, or refuses if it would be another stage."""
    inputs = {k: v for k, v in dataclasses.asdict(c).items() if k not in FREE}
    inputs.update(mode=mode, steps=steps, init=init_digest, precision=str(proc.dtype))
    inputs["images"] = images.digest()
    if result := proc.first(lambda: util.finished(folder, inputs)):
        proc.log.say(f"{folder}: finished before")
        return result
    mean, std = backbones.IMAGENET
    if c.pixels == "source":
        mean, std = proc.first(lambda: transfer.measure(images))
    seed = int(util.digest([c.seed, folder.name]), 16) % 2**31  # every stage draws its own views
    torch.manual_seed(seed)
    query = Encoder(c.backbone, (mean, std), proc.dtype)
    proc.log.say(models.initialise(query.backbone, str(init), proc))
    freeze(query.backbone, mode)
    query.head.requires_grad_(mode != "stats")
    before = {k: v.clone() for k, v in query.backbone.state_dict().items()}
    net = objective(query, mode, c, seed, proc)
    if proc.gradient_checkpointing:  # not before MoCo copies: its key would run the query's blocks
        backbones.recompute(net.query)
    net.to(proc.device, memory_format=torch.channels_last)
    set_training(net, mode)
    say_plan(folder, images, steps, mode, query, (mean, std), c, proc)
    values, seconds = train(folder, net, images, steps, c, seed, proc)
    state = {k: v.cpu() for k, v in net.query.backbone.state_dict().items()}
    frozen = [k for k, p in query.backbone.named_parameters() if not p.requires_grad]
    assert all(torch.equal(before[k], state[k]) for k in frozen), "frozen, but changed"
    about = dict(backbone=c.backbone, mean=mean, std=std, source=source, mode=mode, steps=steps)
    about["init"] = str(init)
    result = {"weights": util.digest_weights(state), "mean": mean, "std": std}
    result.update(images=len(images), steps=steps, mode=mode, seconds=round(seconds, 1))
    if mode != "stats":
        result.update(zip(VALUES, values))
    file = {"model": state, "about": about}
    proc.first(lambda: util.save_tensors(folder / "backbone.pt", file))
    return proc.first(lambda: util.finish(folder, inputs, result))


def say_plan(folder, images, steps, mode, query, pixels, c, proc):
    total = sum(p.numel() for p in query.parameters()) / 1e6
    trained = sum(p.numel() for p in query.parameters() if p.requires_grad) / 1e6
    mean, std = (np.round(values, 3) for values in pixels)
    proc.log.say(
        f"{folder}: {steps} steps of {c.batch} images out of {len(images)} (fraction "
        f"{c.fraction:g}), {c.method}, {mode}, views {c.views}, lr {c.lr * c.batch / 256:.4g} "
        f"({c.lr:g} at batch 256), {trained:.3g}M of {total:.3g}M parameters, "
        f"{str(proc.dtype)[6:]} on {proc.device}, {proc.world} processes; pixels: mean {mean}, "
        f"deviation {std}"
    )
    if c.method == "moco" and mode != "stats" and c.queue > len(images):
        proc.log.say(
            f"warning: the queue holds {c.queue} keys of {len(images)} images: an image's own old "
            "keys are among its negatives; --queue sets another size"
        )


# ---- the command ---------------------------------------------------------------------------------


def method(proc, recipe="tiny", **given):
    """The recipe's row with what is given laid over it. UserError for what cannot work."""
    c = Method(**{**RECIPES[recipe], **given, "recipe": recipe})
    for what in VIEWS[c.views]:
        setattr(c, what, 0)
    if "groups" not in given:
        c.groups = max(c.groups, proc.world)
    known = c.backbone in backbones.NAMES and c.backbone not in backbones.SPINENETS
    need(known, f"--backbone {c.backbone}: give a ResNet or an EfficientNet of backbones.py")
    need(c.seed >= 0, "--seed must not be below 0")
    positive = min(c.batch, c.groups, c.queue, c.image_size, c.labels, c.lr) > 0
    need(positive, "--batch, --groups, --queue, --image-size, --labels, --lr must be above 0")
    need(0 < c.fraction <= 1, f"--fraction {c.fraction:g} must be above 0 and up to 1")
    fits = c.groups % proc.world == 0 == c.batch % c.groups and c.batch >= 2 * c.groups
    need(
        fits,
        f"--batch {c.batch} cannot be cut into {c.groups} batch-norm groups of two or more images "
        f"on {proc.world} processes; give another --groups",
    )
    multiple = max(1, round(c.queue / c.batch)) * c.batch
    fits = c.method == "simclr" or c.queue % c.batch == 0
    need(fits, f"--queue {c.queue} is no multiple of the batch; give e.g. --queue {multiple}")
    return c


def check(plan, proc):
    known = {*transfer.EVALUATIONS, "mme"}
    for name in evaluations(plan):
        need(name in known, f"--eval {name} is unknown; give any of {', '.join(sorted(known))}")
    mme = "mme" in evaluations(plan)
    need(bool(plan.source) == mme, "--eval mme and --source go together")
    need(proc.world == 1 or not mme, "--eval mme runs on one process: leave out torchrun")
    alone = plan.stage or plan.eval or not (plan.data or plan.init != "random")
    need(alone, "--data and --init need a --stage or an --eval")


def evaluations(plan):
    return [name for name in plan.eval.split(",") if name]


def run(plan, c, proc):
    """The stages one after another, then the evaluations of the last backbone -> {what: result}."""
    out = Path(plan.out)
    init = util.weights_of(plan.init)
    stages = []
    for text in plan.stage or ():
        source, steps, mode = parse(text)
        images = proc.first(lambda source=source: images_of(source))
        enough = len(images) >= c.batch
        need(enough, f"--stage {source} has {len(images)} images, fewer than a batch of {c.batch}")
        images = transfer.fraction_of(images, c.fraction, c.batch, c.seed)
        stages.append((source, steps, mode, images))
    target = plan.data or (stages[-1][0] if stages else "")
    sets = domains = None
    if plan.eval:  # whatever cannot work fails now, not after the last stage
        need(target, "--eval needs --data, a folder with train/CLASS and val/CLASS")
        proc.first(lambda: data.ensure(target))
        sets = transfer.load(target, c.seed)
        used = [(source, images) for source, _, _, images in stages]
        transfer.check(evaluations(plan), sets, c.labels, c.seed, used)
    if plan.source:
        data.ensure(plan.source)
        domains = transfer.domains(plan.source, sets, plan.budgets, c.seed)
    models.initialise(backbones.build(c.backbone), init, proc)
    proc.first(lambda: util.claim(out))
    proc.log = util.Log(out / "log.jsonl", proc.rank)

    results = {}
    init_digest = recipes.init_digest(init)
    for number, (source, steps, mode, images) in enumerate(stages, 1):
        folder = out / f"{number}_{mode}_{slug(source)}"
        if not steps:
            steps = math.ceil(len(images) / c.batch) if mode == "stats" else c.steps
        result = pretrain(folder, source, images, steps, mode, init, init_digest, c, proc)
        results[folder.name] = result
        init, init_digest = folder / "backbone.pt", result["weights"]
    for name in evaluations(plan):
        torch.manual_seed(c.seed)
        backbone = backbones.build(c.backbone)
        models.initialise(backbone, str(init), proc)
        if name == "mme":
            folder = out / f"mme_{slug(plan.source)}_{slug(target)}"
            results[name] = transfer.mme(folder, backbone, init_digest, domains, c, proc)
            for row in results[name]["budgets"]:
                for way in ("S+T", "MME"):
                    results[f"{way}, {row['budget']}"] = {"accuracy": row[way]}
        else:
            call = (name, out / f"{name}_{slug(target)}", backbone, init_digest, sets, c, proc)
            results[name] = proc.first(lambda call=call: transfer.evaluated(*call))
    if proc.rank == 0:
        command = {"command": shlex.join(sys.argv), "init": plan.init, "data": target}
        util.write_json(out / "results.json", {**results, **command})
    proc.log.say(f"written: {out}/results.json")
    return results


def demo(plan, c, proc):
    """Base, Target, HPT and HPT-BN on the embedded world, and their linear probes."""
    out = Path(plan.out)
    began = time.time()
    first = run(dataclasses.replace(plan, out=str(out / "source"), stage=[BASE]), c, proc)
    base = str(out / "source" / next(iter(first)) / "backbone.pt")
    results = {}
    for row, stage in DEMO.items():
        init = "random" if row == "Target" else base
        of_row = Plan(str(out / row), init, [stage], "linear")
        results[row] = run(of_row, c, proc)["linear"]
    if proc.rank > 0:
        return
    util.write_json(out / "results.json", {**results, "seed": c.seed})
    print(f"{'':8}{'starts from':30} {'then':30} linear probe: test accuracy")
    for row, stage in DEMO.items():
        start = "random" if row == "Target" else BASE
        print(f"{row:8}{start:30} {stage:30} {results[row]['accuracy']:.3f}")
    print(
        f"One seed ({c.seed}): how much these vary from seed to seed is not shown. "
        f"{time.time() - began:.0f} s. Written: {out}/results.json"
    )


def main(argv=None):
    plan, given, machine = util.parse(__doc__, Plan, Method, util.Machine, argv=argv)
    plan = Plan(**plan)
    proc = util.start(util.Machine(**machine))
    c = method(proc, **given)
    check(plan, proc)
    if plan.stage or plan.eval:
        run(plan, c, proc)
    else:
        demo(plan, c, proc)


if __name__ == "__main__":
    util.run(main)
