"""Hierarchical pre-training: HPT (Reed et al. 2022, "Self-Supervised Pretraining Improves Self-Supervised Pretraining"), that is
MoCo v2 (Chen et al. 2020), starting from a backbone that is pre-trained already, on one set of images after another.

    python hpt.py                               on the embedded domains: Base, Target, HPT, HPT-BN; some minutes on two cores
    python hpt.py --recipe hpt --init moco_v2_800ep_pretrain.pth.tar --stage DIR:5000 --eval linear --out runs/hpt
    python hpt.py --init runs/base/1_all_photo/backbone.pt --eval mme --source photo --data sketch --out runs/mme    (adapt.py)
    python hpt.py --stage photo:600 --stage sketch:200:bn --eval linear,knn --out runs/chain          base, then target (HPT-BN)
    torchrun --nproc_per_node 4 hpt.py --recipe hpt ...

A stage is SRC[:STEPS[:MODE]]. SRC: a folder of images, a .txt list, or an embedded domain by name (world.py). MODE:
    all     everything is trained                                      Target (from random), HPT (from a base)
    bn      affine of every batch norm, and the projection; running statistics move, convolutions stay     HPT-BN
    stats   running statistics are re-estimated, nothing is trained (STEPS: one pass by default)           Base
Each stage is a run of its own, with its own cosine, in OUT/1_all_photo/ and so on; only the query backbone goes from one to the
next, as backbone.pt (torchvision's names; st.py --init takes it). Pixels are normalised by each source's own mean and deviation,
which backbone.pt holds, but st.py normalises by ImageNet's. The same command resumes where it stopped, bit for bit on CPU.

After facts of the released code, where it and the text disagree: HPT-BN trains affine and moves statistics; the projection is
drawn anew in every stage. Other than there: gradients of HPT-BN are averaged over the processes, so are running statistics;
MoCo's batch-norm groups do not depend on the number of processes, up to that of groups. The paper's HPT-BN is the best of up to
four learning rates (0.03, 0.003, 0.1, and 0.1 on crops and flips alone), here one run with the given --lr. Unknown is how Base's
statistics are estimated: here as the average over batch-norm groups of the views the others are trained on. Not here: BYOL, LARS.
"""
import copy
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import adapt
import augment
import backbones
import data
import eval as evaluation
import probe
import runs
import show
import util
import world
from util import UserError
from views import finish as finish_views

# ---- recipes -----------------------------------------------------------------------------------------------------

# MoCo v2 as in HPT's configurations: SGD, momentum 0.9, lr linear in the batch, cosine to 0, no warm-up. groups: into how many
# batch norm cuts a batch (there: GPUs); queue, m: keys and their encoder's momentum; crop .. flip: augment.view; tune_epochs:
# fine-tuning is also tried for so many passes over its labels.
MOCO = dict(method="moco", backbone="resnet50", image_size=224, batch=256, groups=4, queue=65536, m=0.999, steps=5000, lr=0.03,
            weight_decay=1e-4, crop=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2, blur=(0.1, 2), flip=0.5,
            pixels="source", probe_steps=5000, tune_steps=2500, tune_epochs=90, tune_batch=256)
RECIPES = {
    "hpt": MOCO,  # hue 0.4, though its base was trained with 0.1
    # The official one: 200 epochs of ImageNet (per-epoch cosine there, per step here).
    "moco-v2": {**MOCO, "groups": 8, "jitter": (0.4, 0.4, 0.4, 0.1), "steps": 200 * 5004, "pixels": "imagenet"},
    # SimCLR (Chen et al. 2020), 100 epochs of ImageNet: views and batch theirs [recalled]. SGD as above for want of LARS; no
    # batch norm in the projection.
    "simclr": {**MOCO, "method": "simclr", "batch": 4096, "steps": 100 * 313, "crop": (0.08, 1), "jitter": (0.8, 0.8, 0.8, 0.2),
               "pixels": "imagenet"},
    # Ours, for two CPU cores: keys that follow within hundreds of steps, few of them. lr: on strokes, before any study.
    "tiny": {**MOCO, "backbone": "resnet10", "image_size": 64, "batch": 64, "groups": 2, "queue": 1024, "m": 0.99, "steps": 400,
             "lr": 0.6, "jitter": (0.4, 0.4, 0.4, 0.1), "blur": (0.1, 1), "probe_steps": 2000, "tune_steps": 200,
             "tune_epochs": 0, "tune_batch": 64},
}
VIEWS = {  # --views: what is not done to them, as in the released configurations; in the text, always one thing more [recalled]
    "baseline": (), "no-grey": ("grey",), "no-colour": ("jitter",), "crop-blur": ("jitter", "grey", "flip"),
    "crop": ("jitter", "grey", "flip", "blur")}
EMBEDDED = [*world.DOMAINS, "single", "unlabeled"]  # sources by name
TEMPERATURE = {"moco": 0.2, "simclr": 0.1}
DIM = 128  # of the embedding
SAVE = 5000  # steps between checkpoints, at most
VALUES = "loss", "positive", "negative"  # what a step reports: its loss, mean similarity of positive and negative pairs
DEMO = "single:2000", {  # the run without arguments: the base, and what follows it; Target starts from random weights
    "Base": "sketch:stats", "Target": "sketch:1500", "HPT": "sketch:400", "HPT-BN": "sketch:400:bn"}


@dataclass
class Config:
    init: str = "random"
    stage: list = None
    out: str = "runs/hpt"
    seed: int = 0
    root: str = "datasets/shapes"
    recipe: str = "tiny"
    method: str = None
    backbone: str = None
    image_size: int = None
    batch: int = None
    groups: int = None
    queue: int = None
    lr: float = None
    views: str = "baseline"
    fraction: float = 1.0
    eval: str = ""
    data: str = ""
    labels: int = 1000
    augmented: bool = False
    source: str = ""
    budgets: str = "1,3,10"
    precision: str = "auto"
    device: str = "auto"
    workers: int = -1
    device_views: bool = False
    save_every: int = 0


HELP = {
    "stages": {
        "init": "backbone to start from: random, imagenet, or a file (see README, --init)",
        "stage": "SRC[:STEPS[:all|bn|stats]], any number of times; SRC: folder, .txt list, " + ", ".join(EMBEDDED),
        "out": "run directory; the same command resumes it",
        "seed": "of weights, image order, views, probes",
        "root": "where the embedded domains are drawn"},
    "training": {
        "recipe": f"{{{'|'.join(RECIPES)}}} row that sets what follows",
        "method": "{moco|simclr} contrastive loss: a queue of keys, or the other views of the batch",
        "backbone": "see backbones.py",
        "image_size": "of the views, pixels",
        "batch": "images of a step, over all processes",
        "groups": "of a batch that batch norm sees apart, over all processes (a multiple of them); keys are shuffled among them",
        "queue": "K, keys in MoCo's queue",
        "lr": "at batch 256; scaled with the batch",
        "views": f"{{{'|'.join(VIEWS)}}} all that the recipe does to them, or less: every crop stays random",
        "fraction": "of every stage's images to use, a batch or more; those of a smaller one are among those of a larger"},
    "evaluation": {
        "eval": "any of linear,finetune,knn,mme, of the last backbone, on --data",
        "data": "folder with train/CLASS, val/CLASS and perhaps test/CLASS, or with train.csv and so on (see probe.py), or an "
                "embedded domain; default: the last stage's",
        "labels": "of finetune",
        "augmented": "linear on random crops and flips, as in the paper, instead of on stored features: slower",
        "source": "of mme: the labelled domain, a folder with train/CLASS or an embedded one; --data is the target",
        "budgets": "of mme: target labels per class"},
    "machine": {
        "precision": "{auto|bf16|fp32} auto: bf16 where the hardware multiplies it natively",
        "device": "{auto|cpu|cuda}",
        "workers": "loader processes per process, -1 for automatic",
        "device_views": "loaders only crop; colours, blur and mirroring follow on the device, a batch at once: for a GPU that "
                        "waits for its loaders (`waiting` in the log); on a CPU it is no faster",
        "save_every": f"steps between checkpoints; 0: a tenth of the stage, at most {SAVE:,}"},
}


# ---- the algorithm -----------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """images (B, 3, S, S) uint8 -> unit vectors (B, DIM) float32: backbone, mean over C5, Linear-ReLU-Linear without norm."""

    def __init__(self, name, pixels, dtype):
        super().__init__()
        self.backbone, self.pixels, self.dtype = backbones.build(name), pixels, dtype  # pixels: mean, deviation
        c = self.backbone.channels[5]
        self.head = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, DIM))
        for layer in (self.head[0], self.head[2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, images):
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.head(self.backbone(evaluation.normalise(images, images.device, self.pixels))[5].mean((2, 3)))
        return F.normalize(z.float(), dim=1)


class MoCo(nn.Module):
    """MoCo v2. groups, over all processes: batch norm sees them apart; keys are shuffled among them, lest a query recognises its
    key by the statistics of its group (shuffle-BN). Processes and groups on one process come to the same."""

    def __init__(self, query, K, m, T, groups, seed, rank, ranks):
        super().__init__()
        self.query, self.key = query, copy.deepcopy(query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(DIM, K), dim=0))
        self.T, self.groups, self.seed, self.rank, self.ranks = T, groups // ranks, seed, rank, ranks
        self.follow = get_ema_multi_avg_fn(m)  # key <- m key + (1 - m) query, all tensors at once; leaves what is equal as it is

    def forward(self, views, step):
        """views: uint8 (2, B, 3, S, S), this process's share of N images -> loss, [loss, positive, negative similarity]."""
        q = in_groups(self.query, views[0], self.groups)                                     # (B, D)
        with torch.no_grad():
            self.follow(list(self.key.parameters()), list(self.query.parameters()), None)
            keys = self.keys(views[1], step)                                                 # (N, D)
        k = keys.chunk(self.ranks)[self.rank]                                                # (B, D)
        positive, negative = (q * k).sum(1, keepdim=True), q @ self.queue.clone()            # (B, 1), (B, K)
        logits = torch.cat([positive, negative], 1) / self.T                                 # (B, 1 + K)
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        at = step * len(keys) % self.queue.shape[1]  # the pointer; K is a multiple of N
        self.queue[:, at:at + len(keys)] = keys.T
        return loss, torch.stack([loss, positive.mean(), negative.mean()]).detach()

    def keys(self, images, step):
        """Keys of the whole batch, (N, D) in its order, each computed within a random group."""
        images = gathered(images)
        generator = torch.Generator(images.device).manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(images), generator=generator, device=images.device)  # made there: a copy would wait for a GPU
        mine = images[order.chunk(self.ranks)[self.rank]].contiguous(memory_format=torch.channels_last)
        return gathered(in_groups(self.key, mine, self.groups))[order.argsort()]

    def chance(self, batch):
        return math.log(1 + self.queue.shape[1])


class SimCLR(nn.Module):
    """NT-Xent: each of the 2N views of a step finds the other one of its image among all 2N - 1."""

    def __init__(self, query, T, rank, ranks):
        super().__init__()
        self.query, self.T, self.rank, self.ranks = query, T, rank, ranks

    def forward(self, views, step):
        """As MoCo's. Every process computes the loss of all views, in which its own carry gradient; times the processes, since
        DDP averages."""
        z = []
        for own in self.query(views.flatten(0, 1)).chunk(2):                                 # (B, D)
            every = list(gathered(own.detach()).chunk(self.ranks))
            every[self.rank] = own
            z += every
        z = torch.cat(z)                                                                     # (2N, D)
        similar, other = z @ z.T, torch.arange(len(z), device=z.device).roll(len(z) // 2)    # (2N, 2N), (2N,)
        loss = F.cross_entropy((similar / self.T).fill_diagonal_(-math.inf), other)
        positive = similar.gather(1, other[:, None]).mean()
        negative = (similar.sum() - len(z) * (1 + positive)) / (len(z) * (len(z) - 2))
        return loss * self.ranks, torch.stack([loss, positive, negative]).detach()

    def chance(self, batch):
        return math.log(2 * batch - 1)


class Statistics(nn.Module):
    """Base: running statistics become the plain average over the batch-norm groups of the stage."""

    def __init__(self, query, groups):
        super().__init__()
        self.query, self.groups = query, groups
        for m in norms(query):
            m.reset_running_stats()
            m.momentum = None  # average, not moving average

    @torch.no_grad()
    def forward(self, views, step):
        for part in views[0].chunk(self.groups):
            self.query(part)
        return None, torch.zeros(3, device=views.device)


def in_groups(net, images, groups):
    """net on each group by itself. Running statistics move once, to the mean of the groups, as they do on as many processes."""
    found, momenta = [], [(m, m.momentum) for m in norms(net)]
    for k, part in enumerate(images.chunk(groups)):
        for m, momentum in momenta:  # of the old value 1 - momentum is left in the end, and of each group momentum / groups
            m.momentum = momentum / (groups - momentum * (groups - 1 - k))
        found.append(net(part))
    for m, momentum in momenta:
        m.momentum = momentum
    return torch.cat(found)


def gathered(x):
    """(B, ...) -> (N, ...) of all processes, in their order, without gradient."""
    if not dist.is_initialized():
        return x
    every = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.contiguous())
    return torch.cat(every)


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze(backbone, mode):
    """Leaves trainable what the mode trains of a backbone."""
    backbone.requires_grad_(mode == "all")
    for m in norms(backbone):
        m.requires_grad_(mode != "stats")


def set_training(net, mode):
    """Stochastic depth is for what is trained; batch norm always goes by its batch."""
    net.train(mode == "all")
    for m in norms(net):
        m.train()


def train(folder, net, paths, steps, c, seed, flags, run, log):
    """Trains net (MoCo, SimCLR or Statistics) for `steps` steps, resuming from the newest checkpoint in `folder` and leaving its
    own there -> last [loss, positive, negative similarity], seconds."""
    (rank, ranks, device, _), batch, start, values, earlier = run, c["batch"], 0, [], 0.0
    trained, quarantine, stop = [p for p in net.parameters() if p.requires_grad], set(), runs.Stop()
    optimizer = torch.optim.SGD(trained or [torch.zeros(1)], lr=0.0, momentum=0.9, weight_decay=c["weight_decay"])
    if state := runs.load_latest(folder):
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, values, earlier = state["step"], state["values"], state.get("spent", 0.0)
    ddp = net
    if ranks > 1 and trained:
        ddp = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
        ddp.broadcast_buffers = False  # as an argument it is deprecated, and its successor is not in every release
    views = 1 if isinstance(net, Statistics) else 2
    batches = view_loader(paths, start, steps, c, seed, rank, ranks, flags.workers, views, device if flags.device_views else None)
    began, waited = time.time(), 0.0
    for step in range(start, steps):
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # for stochastic depth
        clock = time.time()
        views, bad = next(batches)
        waited += time.time() - clock
        if step == 0 and rank == 0:
            save_views(views, folder / "first_batch.png")
        runs.note_bad(folder, bad, quarantine)
        lr = c["lr"] * batch / 256 * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, values = ddp(views.to(device, non_blocking=True), step)
        if trained:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        notes = torch.tensor([float(stop.asked), float(len(quarantine))], device=device)
        *values, stopping, unusable = (util.all_sum(torch.cat([values, notes])) / ranks).tolist()  # waits for the device
        if not math.isfinite(sum(values)):
            raise UserError(f"{folder}: loss is not finite at step {step}; lower --lr, or give --precision fp32")
        if unusable > max(20, len(paths) // 100):
            raise UserError(f"{math.ceil(unusable)} unusable images (limit: 1%, at least 20), listed in {folder}/quarantine.txt; "
                            f"run {probe.CHECK} on the images")
        if step < 10 or (step + 1) % 20 == 0 or step + 1 == steps:
            spent, shown = time.time() - began, {}
            if trained:
                shown = dict(zip(VALUES, values), chance=net.chance(batch), lr=lr)
            if isinstance(net, MoCo):
                shown["queue"] = min(1, (step + 1) * batch / c["queue"])  # how full of keys
            log.progress(folder.name, step + 1, steps, began, start, **shown, images_s=(step + 1 - start) * batch / spent,
                         waiting=waited / spent)
        last = step + 1 == steps or stopping
        if last or (step + 1) % (flags.save_every or max(1, min(SAVE, steps // 10))) == 0:
            for buffer in (b for m in norms(net) for b in (m.running_mean, m.running_var) if ranks > 1):
                buffer.copy_(util.all_sum(buffer.clone()) / ranks)
            if rank == 0:
                runs.save_checkpoint(folder, {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                                              "values": values, "spent": earlier + time.time() - began})
        if stopping:
            log.say(f"SIGTERM: saved {folder} at step {step + 1}; the same command resumes")
            raise SystemExit(143)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return values, earlier + time.time() - began


# ---- views -------------------------------------------------------------------------------------------------------

class Views(torch.utils.data.Dataset):
    """Views of an image, (views, S, S, 3) uint8. Keys are (step, slot, index): random numbers come from (seed, step, slot).
    cropped: only the crops, and (views, 11) what is left to be done to them."""

    def __init__(self, paths, c, seed, views, cropped=False):
        self.paths, self.seed, self.views, self.cropped = paths, seed, views, cropped
        self.how = {"size": c["image_size"], **{k: c[k] for k in ("crop", "jitter", "grey", "blur", "flip")}}

    def __getitem__(self, key):
        step, slot, index = key
        image, _, bad = probe.read_usable(self.paths, index)
        how = {"image": image, "rng": np.random.default_rng((self.seed, step, slot)), **self.how}
        drawn = [augment.draw_view(**how) if self.cropped else (augment.view(**how), ()) for _ in range(self.views)]
        return np.stack([np.asarray(image) for image, _ in drawn]), np.stack([todo for _, todo in drawn]), bad


def collate(samples):
    """-> views uint8 (views, B, 3, S, S), each in channels_last; (views, B, 11 or 0); [(row, reason)] of unusable files."""
    views, todo, bad = zip(*samples)
    reasons = [(i, text) for i, some in enumerate(bad) for text in some]
    return torch.from_numpy(np.stack(views, 1)).permute(0, 1, 4, 2, 3), torch.from_numpy(np.stack(todo, 1)), reasons


def view_loader(paths, start, stop, c, seed, rank, ranks, workers, views=2, device=None):
    """This process's share of the batches of steps start..stop-1, of endless shuffled passes over the images: views, bad.
    device: where all that follows the crop is done, None for the loader."""
    batch, mine = c["batch"], c["batch"] // ranks
    keys = ([(step, slot, data.shuffled_index(step * batch + slot, len(paths), seed))
             for slot in range(rank * mine, (rank + 1) * mine)] for step in range(start, stop))
    for views, todo, bad in data.loader(Views(paths, c, seed, views, device is not None), keys, workers, collate):
        yield finish_views(views.to(device, non_blocking=True), todo) if device else views, bad


def save_views(views, path, images=8):
    """The views of some images, side by side, as a PNG."""
    n, pictures = len(views), views[:, :images].cpu().permute(1, 0, 3, 4, 2).flatten(0, 1).contiguous().numpy()
    show.save_sheet(path, [(Image.fromarray(p), data.nothing(i), f"image {i // n}, view {i % n + 1}", show.HUMAN)
                           for i, p in enumerate(pictures)], [])


# ---- stages ------------------------------------------------------------------------------------------------------

def folder_of(source, root):
    """A source by name, drawn if need be, or the path it is."""
    return str(data.embedded(root, source)) if source in EMBEDDED else source


def image_paths(source, root):
    """Paths (n,) of the images of a source. Of folders with train/ (or train.csv) only those, and those of val/ if there is a
    test/ too: never what an evaluation reports on. Beside train.csv there may be a pretrain.txt that says which."""
    place = folder_of(source, root)
    there = lambda part: os.path.exists(os.path.join(place, part + probe.ending(place)))
    parts = [p for p in ("train", "val")[:1 + there("test")] if there(p)] if there("train") else []
    listed = os.path.join(place, "pretrain.txt")
    if probe.ending(place) and not os.path.exists(listed):
        return np.unique(np.concatenate([probe.read_csv(place, part)[0] for part in parts]))
    try:
        return np.concatenate([*map(data.list_images, [listed] if probe.ending(place) else
                                    [os.path.join(place, part) for part in parts] or [place])])
    except UserError as error:
        raise UserError(str(error).replace("--unlabeled", "--stage") + f", or one of {', '.join(EMBEDDED)}")


def parse(text):
    """SRC[:STEPS[:MODE]] -> (SRC, STEPS or None, MODE)."""
    source, steps, mode = re.fullmatch(r"(.*?)(?::(\d+))?(?::(all|bn|stats))?", text).groups()
    if not source or steps and not int(steps) or ":" in source and not os.path.exists(source):
        raise UserError(f"--stage {text} names no source, step or mode; give SRC[:STEPS[:all|bn|stats]], e.g. sketch:500:bn")
    return source, int(steps) if steps else None, mode or "all"


def slug(source):
    return re.sub(r"\W+", "-", Path(source).stem or "images")[:40]


def digest(init):
    """What tells one --init from another: the hash of its file."""
    simclr, path = backbones.split_source(init)
    return "simclr:" * simclr + data.file_digest(path) if init not in ("random", "imagenet") else init


def load(backbone, init):
    try:
        if init == "imagenet":
            util.rank0_first(lambda: backbones.imagenet_file(backbone.name) and None)
        return backbones.load_backbone(backbone, init)
    except ValueError as error:
        raise UserError(f"--init {init}: {error}")


def objective(query, mode, c, seed, rank, ranks):
    if mode == "stats":
        return Statistics(query, c["groups"] // ranks)
    if c["method"] == "simclr":
        return SimCLR(query, TEMPERATURE["simclr"], rank, ranks)
    return MoCo(query, c["queue"], c["m"], TEMPERATURE["moco"], c["groups"], seed, rank, ranks)


def stage(folder, source, paths, steps, mode, init, init_digest, c, flags, run, log):
    """One run: `init`, trained on the images `paths` -> {"weights": hash, "mean", "std", ...}, and folder/backbone.pt."""
    rank, ranks, device, dtype = run
    deps = {**{k: v for k, v in c.items() if not k.startswith(("probe", "tune"))}, "mode": mode, "steps": steps,
            "init": init_digest, "images": runs.digest([os.fsdecode(p) for p in paths.tolist()]), "seed": flags.seed,
            "precision": str(dtype), "fraction": flags.fraction, "world": world.VERSION if source in EMBEDDED else 0,
            **({"device_views": True} if flags.device_views else {})}
    if result := util.rank0_first(lambda: runs.stage(folder, deps)):
        log.say(f"{folder}: finished before")
        return result
    mean, std = util.rank0_first(lambda: probe.measure(paths)) if c["pixels"] == "source" else evaluation.IMAGENET
    seed = int(runs.digest([flags.seed, folder.name]), 16) % 2 ** 31  # every stage draws its own images and views
    torch.manual_seed(seed)
    query = Encoder(c["backbone"], (mean, std), dtype)
    log.say(load(query.backbone, str(init)))
    freeze(query.backbone, mode)
    query.head.requires_grad_(mode != "stats")
    given = {k: v.clone() for k, v in query.backbone.state_dict().items()}
    net = objective(query, mode, c, seed, rank, ranks)
    if device.type == "cuda" and isinstance(net, SimCLR) and ranks > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # as SimCLR does; MoCo's groups must not know of each other
    net.to(device, memory_format=torch.channels_last)
    set_training(net, mode)
    trained, total = (sum(p.numel() for p in query.parameters() if p.requires_grad >= which) / 1e6 for which in (True, False))
    log.say(f"{folder}: {steps} steps of {c['batch']} images out of {len(paths)} (fraction "
            f"{flags.fraction:g}), {c['method']}, {mode}, views {flags.views}, lr "
            f"{c['lr'] * c['batch'] / 256:.4g} (given {c['lr']:g} at batch 256), {trained:.3g}M of {total:.3g}M parameters, "
            f"{str(dtype)[6:]} on {device}, {ranks} processes; pixels: mean {np.round(mean, 3)}, deviation {np.round(std, 3)}")
    if isinstance(net, MoCo) and c["queue"] > len(paths):
        log.say(f"warning: the queue holds {c['queue']} keys of {len(paths)} images: an image's own old keys are among its "
                "negatives; --queue sets another size")
    values, seconds = train(folder, net, paths, steps, c, seed, flags, run, log)
    state = {k: v.cpu() for k, v in net.query.backbone.state_dict().items()}
    moved = [k for k, p in query.backbone.named_parameters() if not p.requires_grad and not torch.equal(given[k], state[k])]
    assert not moved, f"frozen, but changed: {moved[:3]}"
    result = {"weights": runs.digest_weights(state), "mean": mean, "std": std, "images": len(paths), "steps": steps, "mode": mode,
              **(dict(zip(VALUES, values)) if mode != "stats" else {}), "seconds": round(seconds, 1)}
    about = dict(backbone=c["backbone"], mean=mean, std=std, source=source, mode=mode, steps=steps, init=str(init))

    def finish():
        runs.write_atomic(folder / "backbone.pt", lambda p: torch.save({"model": state, "about": about}, p))
        return runs.finish(folder, deps, result)
    return util.rank0_first(finish)


# ---- the pipeline ------------------------------------------------------------------------------------------------

def settings(flags, ranks):
    c, flags.init = {**RECIPES[flags.recipe]}, runs.weights_of(flags.init)
    c.update({k: v for k in c if (v := getattr(flags, k, None)) is not None}, **dict.fromkeys(VIEWS[flags.views], 0))
    if flags.groups is None:
        c["groups"] = max(c["groups"], ranks)
    if c["backbone"] not in backbones.NAMES:
        raise UserError(f"--backbone {c['backbone']} is unknown; give one of {', '.join(backbones.NAMES)}")
    if c["backbone"] in backbones.SPINENETS:
        raise UserError(f"--backbone {c['backbone']} is a pyramid, not all of which pre-training would reach; give another")
    if not flags.stage and not flags.eval and (flags.data or flags.init != "random"):
        raise UserError("--data and --init need a --stage or an --eval; without any of these, the embedded domains are run")
    if min(c["batch"], c["groups"], c["queue"], c["image_size"], flags.labels) < 1 or not c["lr"] > 0 or flags.seed < 0:
        raise UserError("--batch, --groups, --queue, --image-size, --labels and --lr must be above 0, --seed not below")
    if not 0 < flags.fraction <= 1:
        raise UserError(f"--fraction {flags.fraction:g} is not a fraction; give a number above 0 and up to 1")
    if c["groups"] % ranks or c["batch"] % c["groups"] or c["batch"] < 2 * c["groups"]:
        raise UserError(f"--batch {c['batch']} cannot be cut into {c['groups']} batch-norm groups of two or more images on"
                        f" {ranks} processes; give a --groups that divides the batch and is a multiple of the processes")
    if c["method"] == "moco" and c["queue"] % c["batch"]:
        raise UserError(f"--queue {c['queue']} is no multiple of the batch, {c['batch']}; give e.g. --queue "
                        f"{max(1, round(c['queue'] / c['batch'])) * c['batch']}")
    if odd := set(filter(None, flags.eval.split(","))) - {*probe.EVALUATIONS, "mme"}:
        raise UserError(f"--eval {sorted(odd)[0]} is unknown; give any of {','.join(probe.EVALUATIONS)},mme")
    if bool(flags.source) != (mme := "mme" in flags.eval.split(",")) or mme and ranks > 1:
        raise UserError("--eval mme and --source go together (the labelled domain, a folder with train/CLASS or an embedded "
                        "one), without torchrun")
    return c


def pipeline(out, init, stages, evals, target, c, flags, run):
    """The stages one after another, then the evaluations of the last backbone on the labelled data `target` -> {what: result}."""
    rank, out = run[0], Path(out)
    todo = [(*parse(text), util.rank0_first(lambda: image_paths(parse(text)[0], flags.root))) for text in stages]
    for source, _, _, paths in todo:
        if len(paths) < c["batch"]:
            raise UserError(f"--stage {source} has {len(paths)} images, fewer than a batch of {c['batch']}; lower --batch")
    todo = [(*how, probe.fraction_of(paths, flags.fraction, c["batch"], flags.seed)) for *how, paths in todo]
    target = target or (todo[-1][0] if todo else "")
    if evals and not target:
        raise UserError("--eval needs --data, a folder with train/CLASS and val/CLASS, or an embedded domain")
    if evals:  # whatever cannot work fails now, not after the last stage
        sets = probe.load(util.rank0_first(lambda: folder_of(target, flags.root)), flags.seed)
        probe.check(evals, sets, flags.labels, flags.seed, [(source, paths) for source, _, _, paths in todo])
    domains = adapt.load(util.rank0_first(lambda: folder_of(flags.source, flags.root)), sets, flags.budgets,
                         flags.seed) if "mme" in evals else None
    load(backbones.build(c["backbone"]), init)
    util.rank0_first(lambda: runs.claim(out))
    log, results, init_digest = util.Log(out / "log.jsonl", rank), {}, util.rank0_first(lambda: digest(init))
    for number, (source, steps, mode, paths) in enumerate(todo, 1):
        folder = out / f"{number}_{mode}_{slug(source)}"
        steps = steps or (math.ceil(len(paths) / c["batch"]) if mode == "stats" else c["steps"])
        results[folder.name] = stage(folder, source, paths, steps, mode, init, init_digest, c, flags, run, log)
        init, init_digest = folder / "backbone.pt", results[folder.name]["weights"]
    for name in evals:
        torch.manual_seed(flags.seed)
        backbone = backbones.build(c["backbone"])
        load(backbone, str(init))
        more = {**c, **{k: getattr(flags, k) for k in ("recipe", "labels", "augmented", "seed", "workers")}}
        results[name] = util.rank0_first(
            lambda: adapt.mme(out / f"mme_{slug(flags.source)}_{slug(target)}", backbone, init_digest, domains, more, run, log)
            if name == "mme" else
            probe.evaluated(name, out / f"{name}_{slug(target)}", backbone, init_digest, sets, more, run, log))
        results.update({f"{way}, {row['budget']}": {"accuracy": row[way]} for row in results[name].get("budgets", ())
                        for way in ("S+T", "MME")})
    if rank == 0:
        runs.write_json(out / "results.json", {**results, "command": " ".join(sys.argv), "init": flags.init, "data": target})
        log.say(f"written: {out}/results.json" + (f", {init}" if todo else ""))
    return results


def demo(c, flags, run):
    """Base, Target, HPT and HPT-BN on two embedded domains, and their linear probes."""
    out, (first, rows), found, began = Path(flags.out), DEMO, {}, time.time()
    base = str(out / "source" / next(iter(pipeline(out / "source", flags.init, [first], [], "", c, flags, run))) / "backbone.pt")
    for row, text in rows.items():
        init = "random" if row == "Target" else base
        found[row] = pipeline(out / row, init, [text], ["linear"], "", c, flags, run)["linear"]
    if run[0] == 0:
        runs.write_json(out / "results.json", {**found, "command": " ".join(sys.argv), "seed": flags.seed})
        print(f"{'':8}{'starts from':16}{'then':20}linear probe: test accuracy")
        for row, text in rows.items():
            print(f"{row:8}{'random' if row == 'Target' else first:16}{text:20}{found[row]['accuracy']:.3f}")
        print(f"One seed ({flags.seed}): how much these vary from seed to seed is not shown. {time.time() - began:.0f} s. "
              f"Written: {out}/results.json")


def main(argv=None):
    flags = util.parse_flags(Config, __doc__, HELP, argv)
    rank, ranks, device, flags.workers = util.setup(flags.device, flags.workers)
    run = (rank, ranks, device, util.precision(flags.precision, device))
    c = settings(flags, ranks)
    if not flags.stage and not flags.eval:
        return demo(c, flags, run)
    pipeline(flags.out, flags.init, flags.stage or [], list(filter(None, flags.eval.split(","))), flags.data, c, flags, run)


if __name__ == "__main__":
    util.run(main)
