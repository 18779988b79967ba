"""How good is a backbone? HPT's evaluations on labelled images: linear probe, fine-tuning with few
labels, neighbours, and domain adaptation with MME. hpt.py --eval calls them:

    python hpt.py --init FILE --eval linear,finetune,knn --data DIR --out runs/probe
    python hpt.py --init FILE --eval mme --source DIR1 --data DIR2 --budgets 1,3,10 --out runs/mme

DIR has train/CLASS, val/CLASS and test/CLASS. Without test/, val/ is what accuracy is reported on,
and a tenth of train/, by a hash of the files' names, chooses among settings instead. Or DIR has
train.csv, val.csv and perhaps test.csv: the header path,label and a line an image, its path
(absolute or below DIR) and its class; or, for several classes an image, path,NAME1,NAME2,... and 1
or 0 for each. Blank, -1 and u (unknown, uncertain) count as 0, as HPT does it on CheXpert. Several
classes are learnt by binary cross-entropy and scored by the mean area under the ROC curve.

Fine-tuning follows HPT's released configurations: 2,500 steps and 90 epochs, a tenth of the lr from
each third on (there 833 and 1,667; its code, which accumulates over four pieces, reaches these
after a quarter of the steps), 256 images a step as in the code (the paper: 512). Its accuracy is
the best on the way, by validation; here it is that of the last step.

MME (Saito et al. 2019): all labels of a source domain, a few per class of the target, whose other
training images come without. S+T trains on the labels of both; MME as long, and the entropy of its
answers on unlabelled target images besides: the last layer is to raise it, all before it to lower
it. Settings are those of MME's released code. Which HPT used is unknown, as are its seven budgets
and its unlabelled images: here those are the target's train part, and accuracy is that on its test
part, which is never trained on (in MME's code one pool is both). A few images of val/ choose the
step. MME makes two updates where S+T makes one, and its batch norm sees unlabelled target images:
both belong to the method as released. HPT's EfficientNet-B2 ended in 1408 channels [recalled],
that of backbones.py ends in C5's 352. One process does the work; the others wait.
"""

import copy
import csv
import hashlib
import itertools
import math
import os
import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import augment
import backbones
import data
import models
import util
from eval import mean_auroc
from util import UserError, need

LRS = (0.3, 3, 30)  # of the linear probe, at 512 images a step; the best by validation counts
TUNE_LRS = (0.01, 0.001)  # of fine-tuning; a hundred times that for the new layer
LINEAR_BATCH = 512
NEIGHBOURS = 20  # weighted votes of Wu et al. 2018 [recalled], with fewer neighbours
NEIGHBOUR_T = 0.07
CROP = (0.08, 1)  # of a training image's area, when augmented
MARKS = {"1": 1, "0": 0, "": 0, "-1": 0, "u": 0}  # of a class in a csv file

# ---- labelled sets -------------------------------------------------------------------------------


def load(root, seed):
    """{"train", "val", "test": Images with classes, "root", "parts": what they are, in words}."""
    if has_lists(root):
        return load_csv(root, seed)
    train = data.folder(root, "train")
    val = data.folder(root, "val", train)
    parts = "chosen on val/, reported on test/"
    if os.path.isdir(os.path.join(root, "test")):
        test = data.folder(root, "test", train)
    else:
        test = val
        held = np.zeros(len(train), dtype=bool)
        order = np.array(hashed_order(train.files, seed), dtype=int)
        for k in range(len(train.class_names)):
            of_class = order[train.image_class[order] == k]
            if len(of_class) > 1:
                held[of_class[: max(1, round(0.1 * len(of_class)))]] = True
        val = train.subset(np.flatnonzero(held))
        train = train.subset(np.flatnonzero(~held))
        parts = "chosen on a tenth of train/, held out of training, reported on val/"
    need(len(val) and len(test), f"{root} leaves no image to validate with; give more images")
    return {"train": train, "val": val, "test": test, "root": root, "parts": parts}


def has_lists(root):
    return os.path.isfile(os.path.join(root, "train.csv"))


def load_csv(root, seed):
    """load() of ROOT/train.csv, val.csv and perhaps test.csv."""
    sets = {"train": read_csv(root, "train"), "val": read_csv(root, "val")}
    if os.path.exists(os.path.join(root, "test.csv")):
        sets["test"] = read_csv(root, "test")
    several = sets["train"].image_class.ndim == 2
    names = sets["train"].class_names
    if not several:
        names = sorted({name for images in sets.values() for name in images.class_names})
    for part, images in sets.items():
        same = images.image_class.ndim == (2 if several else 1)
        same = same and (images.class_names == names or not several)
        need(same, f"{root}/{part}.csv begins with other columns than train.csv")
        if not several:
            number = np.array([names.index(name) for name in images.class_names])
            classes = number[images.image_class]
            sets[part] = replace(images, class_names=names, image_class=classes)
    parts = "chosen on val.csv, reported on test.csv"
    if "test" not in sets:
        sets["test"] = sets["val"]
        order = np.array(hashed_order(below(sets["train"]), seed), dtype=int)
        held, kept = np.split(order, [max(1, round(0.1 * len(order)))])
        sets["val"] = sets["train"].subset(np.sort(held))
        sets["train"] = sets["train"].subset(np.sort(kept))
        parts = "chosen on a tenth of train.csv, held out of training, reported on val.csv"
    for part, images in sets.items():
        y = images.image_class
        scored = len(y) > 0 and (not several or (y.min(0) < y.max(0)).any())
        need(scored, f"{root} has no class with and without images in its {part} part")
    return {**sets, "root": root, "parts": parts}


def read_csv(root, part):
    """ROOT/PART.csv as Images with a class each, or 0 and 1 of several."""
    path = os.path.join(root, part + ".csv")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            (first, *names), *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as csv ({error})") from None
    fits = first == "path" and len(set(names)) == len(names) > 0
    need(fits, f"{path} begins with {first},...; it wants path,label or path,NAME1,NAME2,...")
    files = []
    labels = []
    for line, row in enumerate(rows, 2):
        if row:
            files.append(os.path.abspath(os.path.join(root, row[0])))
            labels.append(csv_label(f"{path}, line {line}", row, names))
    need(files, f"{path} lists no image; nothing can be learnt or scored")
    classes = names
    if names == ["label"]:
        classes, labels = np.unique(labels, return_inverse=True)
        classes = classes.tolist()
    ids = np.arange(len(files))
    image_class = np.array(labels, dtype=np.int64)
    return data.Images(
        "",
        data.as_bytes(files),
        ids,
        path,
        classes,
        [*range(len(classes))],
        image_class=image_class,
    )


def csv_label(place, row, names):
    if names == ["label"]:
        need(len(row) == 2 and row[0], f"{place}: it wants a path and the name of a class")
        return row[1]
    marks = [MARKS.get(value.strip().lower().removesuffix(".0")) for value in row[1:]]
    fits = len(marks) == len(names) and None not in marks and row[0]
    need(fits, f"{place}: it wants a path and {len(names)} values, each 1, 0, -1, u or blank")
    return marks


def check(evaluations, sets, count, seed, stages):
    """UserError if one of the evaluations cannot work on these sets with `count` labels for
    fine-tuning, or if images of a stage are among those reported on. stages: (source, Images)."""
    several = sets["train"].image_class.ndim == 2
    need("knn" not in evaluations or not several, "--eval knn wants one class an image")
    if "finetune" in evaluations:
        few_labels(sets["train"], min(count, len(sets["train"])), seed)
    tested = set(map(os.path.realpath, paths_of(sets["test"])))
    used = [(f"--stage {source}", images) for source, images in stages]
    used += [(f"the {part} part of {sets['root']}", sets[part]) for part in ("train", "val")]
    for what, images in used:
        shared = [path for path in paths_of(images) if os.path.realpath(path) in tested]
        need(
            not shared,
            f"{what} has {len(shared)} images that --data reports on, first "
            f"{os.fsdecode(shared[0]) if shared else ''}; give a folder or list without them",
        )


def digest(sets):
    """What tells one labelled set from others."""
    return util.digest([sets[part].digest() for part in ("train", "val", "test")])


def paths_of(images):
    """Absolute: what is drawn from their names must not depend on how a folder is spelt."""
    return [os.path.abspath(os.fsencode(images.path(i))) for i in range(len(images))]


def below(images):
    """Paths below the folder that holds all of them, wherever that is."""
    paths = paths_of(images)
    start = len(os.path.commonpath(paths)) + 1
    return [path[start:] for path in paths]


def hashed_order(names, seed):
    """Positions of the names in a random order that each name alone decides: others may come and
    go."""
    keys = [hashlib.sha256(b"%d/" % seed + bytes(name)).digest() for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)


def fraction_of(images, fraction, least, seed):
    """A random part of the images, at least `least`, in their order; those of a smaller fraction
    are among those of a larger."""
    order = hashed_order(below(images), seed)
    return images.subset(sorted(order[: max(least, round(fraction * len(images)))]))


def few_labels(images, count, seed):
    """`count` of the images, at random, with one or more of every class; those of a smaller count
    are among those of a larger."""
    order = hashed_order(below(images), seed)
    classes = images.image_class[order]
    if classes.ndim == 1:
        at = np.unique(classes, return_index=True)[1]  # where each class comes first
    else:
        at = classes.argmax(0)[classes.any(0)]
    first = dict.fromkeys(order[k] for k in at.tolist())
    sentence = f"--labels {count} is less than one for each of {len(at)} classes; give "
    need(count >= len(first), sentence + f"{len(first)} or more")
    chosen = list({**first, **dict.fromkeys(order)})[:count]
    return images.subset(sorted(chosen))


# ---- pixels --------------------------------------------------------------------------------------


def measure(images, sample=1000):
    """Mean and deviation of all pixels, RGB in 0..1, of up to `sample` images, evenly spread; every
    image weighs the same (as in the official script) -> two tuples of three."""
    sums = np.zeros((2, 3))
    spread = np.linspace(0, len(images) - 1, min(len(images), sample))
    chosen = np.unique(spread.astype(int)).tolist()
    for i in chosen:
        pixels = np.asarray(data.read(images, i)[0], dtype=np.float64).reshape(-1, 3) / 255
        sums += pixels.mean(0), (pixels**2).mean(0)
    mean, square = sums / len(chosen)
    deviation = np.sqrt((square - mean**2).clip(255**-2))  # of one colour: not 0
    return tuple(mean.tolist()), tuple(deviation.tolist())


class Crops(torch.utils.data.Dataset):
    """(S, S, 3) uint8 and label of Images with classes. Key: an index for the centre (7/8 of the
    shorter side: 224 of 256), label -1 if the file cannot be read; or (step, slot, index) for a
    random crop, mirrored or not."""

    def __init__(self, images, size, seed):
        self.images = images
        self.size = size
        self.seed = seed

    def __getitem__(self, key):
        if isinstance(key, tuple):
            step, slot, index = key
            image, target = data.read(self.images, index)
            rng = np.random.default_rng((self.seed, step, slot))
            image = augment.random_crop(image, self.size, CROP, rng)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            image, target = data.read(self.images, key)
            w, h = image.size
            side = min(image.size) * 7 / 8
            box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image), target["image_class"]


def collate(samples):
    """-> uint8 (B, 3, S, S) in channels_last, labels (B,) or (B, K)."""
    pixels, labels = zip(*samples)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def random_crops(images, batch, steps, c, proc):
    """Training batches of random crops (uint8 (B, 3, S, S), labels)."""
    keys = (
        [
            (step, slot, data.shuffled_index(step * batch + slot, len(images), c.seed))
            for slot in range(batch)
        ]
        for step in range(steps)
    )
    return data.loader(Crops(images, c.image_size, c.seed), keys, proc.workers, collate)


# ---- evaluations ---------------------------------------------------------------------------------


@torch.no_grad()
def embed(backbone, images, pixels, proc):
    """uint8 (B, 3, S, S) -> (B, C) float32: the mean over C5 of the backbone as it is."""
    backbone.eval()
    images = images.to(proc.device, non_blocking=True)
    with proc.autocast():
        feats = backbone(backbones.normalise(images, pixels))[5]
        return feats.mean((2, 3)).float()


def features(backbone, images, pixels, c, proc):
    """Features (n, C) and labels (n,) or (n, K) of centre crops; unreadable images are left out."""
    feats = []
    labels = []
    n = len(images)
    keys = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    for crops, y in data.loader(Crops(images, c.image_size, 0), keys, proc.workers, collate):
        feats.append(embed(backbone, crops, pixels, proc))
        labels.append(y)
    labels = torch.cat(labels).to(proc.device)
    usable = labels.flatten(1).amin(1) >= 0 if labels.ndim == 2 else labels >= 0
    return torch.cat(feats)[usable], labels[usable]


def loss_of(logits, labels):
    """labels (n,): a class each; (n, K): 1 for every class there is; -1: unknown."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=-1)
    known = (labels >= 0).float()
    labels = labels.clamp(min=0).float()
    loss = F.binary_cross_entropy_with_logits(logits, labels, weight=known, reduction="sum")
    return loss / known.sum().clamp(min=1)


def score(logits, labels, names):
    """{"accuracy"}, or what mean_auroc() says for labels (n, K); the first is what counts."""
    if labels.ndim == 1:
        return {"accuracy": (logits.argmax(1) == labels).float().mean().item()}
    result = mean_auroc(logits.float().cpu(), labels.cpu(), names)
    need(result["mAUROC"] is not None, "no class has images with and without it; give more images")
    return result


def best(scores):
    """{setting: scores of val, of test} -> the setting that is best on val (of equals the first),
    what is reported."""
    values = {k: [next(iter(s.values())) for s in both] for k, both in scores.items()}
    chosen = max(values, key=lambda k: values[k][0])
    grid = [[*k, *v] for k, v in values.items()]
    return chosen, {**scores[chosen][1], "validation": values[chosen][0], "grid": grid}


def set_lr(optimizer, peaks, step, steps):
    """A tenth from each third of the steps on."""
    for group, lr in zip(optimizer.param_groups, peaks):
        group["lr"] = lr * 0.1 ** (step * 3 // steps)


def linear(backbone, sets, pixels, c, proc):
    """A linear layer on the frozen backbone: SGD, lr x features as they are or standardised (ours),
    all heads at once."""
    names = sets["train"].class_names
    parts = ("train", "val", "test")
    found = {part: features(backbone, sets[part], pixels, c, proc) for part in parts}
    x, y = found["train"]
    crops = None
    where = "stored features of centre crops (--augmented: random crops, as in the paper, slower)"
    if c.augmented:
        where = "random crops and flips"
        crops = random_crops(sets["train"], LINEAR_BATCH, c.probe_steps, c, proc)
    proc.log.say(f"linear probe on {where}; {sets['parts']}")
    mean = x.mean(0)
    std = x.std(0)
    std = std.clamp(min=max(1e-6, 1e-3 * std.mean().item()))  # what hardly varies would be noise
    standard = {"raw": lambda v: v, "standardised": lambda v: (v - mean) / std}
    grid = {}
    generator = torch.Generator().manual_seed(c.seed)
    for kind, lr in itertools.product(standard, LRS):
        head = nn.Linear(x.shape[1], len(names)).to(proc.device)
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.data.zero_()
        grid[kind, lr] = head
    groups = [{"params": head.parameters()} for head in grid.values()]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    for step in range(c.probe_steps):
        if crops:
            images, labels = next(crops)
            batch = embed(backbone, images, pixels, proc)
            labels = labels.to(proc.device)
        else:
            slots = range(step * LINEAR_BATCH, (step + 1) * LINEAR_BATCH)
            rows = torch.tensor([data.shuffled_index(k, len(y), c.seed) for k in slots])
            rows = rows.to(proc.device)
            batch, labels = x[rows], y[rows]
        inputs = {kind: scale(batch) for kind, scale in standard.items()}
        set_lr(optimizer, [lr for _, lr in grid], step, c.probe_steps)
        optimizer.zero_grad()
        sum(loss_of(head(inputs[kind]), labels) for (kind, _), head in grid.items()).backward()
        optimizer.step()
    scores = {}
    with torch.no_grad():
        for (kind, lr), head in grid.items():
            both = [found["val"], found["test"]]
            scores[kind, lr] = [score(head(standard[kind](v)), labels, names) for v, labels in both]
    (kind, lr), result = best(scores)
    return {**result, "lr": lr, "features": kind}


def finetune(backbone, sets, pixels, c, proc):
    """The whole network on few labels, batch norm in training mode; lr, schedule by validation."""
    names = sets["train"].class_names
    images = few_labels(sets["train"], min(c.labels, len(sets["train"])), c.seed)
    schedules = [c.tune_steps]
    if c.tune_epochs:
        schedules.append(math.ceil(c.tune_epochs * len(images) / c.tune_batch))
    scores = {}
    for lr, steps in itertools.product(TUNE_LRS, schedules):
        torch.manual_seed(c.seed)
        net = models.Classifier(c.backbone, len(names))
        net = net.to(proc.device, memory_format=torch.channels_last).train()
        net.backbone.load_state_dict(backbone.state_dict())
        groups = [{"params": part.parameters()} for part in (net.backbone, net.final)]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        for step, (crops, labels) in enumerate(random_crops(images, c.tune_batch, steps, c, proc)):
            set_lr(optimizer, (lr, 100 * lr), step, steps)
            with proc.autocast():
                logits = net(backbones.normalise(crops.to(proc.device), pixels))
            optimizer.zero_grad()
            loss_of(logits.float(), labels.to(proc.device)).backward()
            optimizer.step()
        scores[lr, steps] = []
        for part in ("val", "test"):
            x, y = features(net.backbone, sets[part], pixels, c, proc)
            with torch.no_grad():
                scores[lr, steps].append(score(net.final(x), y, names))
    (lr, steps), result = best(scores)
    return {**result, "lr": lr, "steps": steps, "labels": len(images)}


def knn(backbone, sets, pixels, c, proc):
    """Votes of the nearest training images, by cosine: a quick look, with nothing to choose."""
    x, y = features(backbone, sets["train"], pixels, c, proc)
    query, truth = features(backbone, sets["test"], pixels, c, proc)
    x = F.normalize(x)
    query = F.normalize(query)
    right = 0
    for rows, labels in zip(query.split(1024), truth.split(1024)):
        near, at = (rows @ x.T).topk(min(NEIGHBOURS, len(x)))  # (B, k)
        votes = torch.zeros(len(rows), len(sets["train"].class_names), device=x.device)
        votes.scatter_add_(1, y[at], (near / NEIGHBOUR_T).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return {"accuracy": right / len(truth)}


EVALUATIONS = {  # the function, and the settings that matter to it
    "linear": (linear, ("probe_steps", "augmented")),
    "finetune": (finetune, ("tune_steps", "tune_epochs", "tune_batch", "labels")),
    "knn": (knn, ()),
}


def evaluated(name, folder, backbone, weights, sets, c, proc):
    """Runs one of EVALUATIONS, remembered in `folder` -> {"accuracy" (or "mAUROC") on the test
    part, how it was chosen, ...}. weights: what tells the backbone from others."""
    evaluate, matters = EVALUATIONS[name]
    inputs = {k: getattr(c, k) for k in ("backbone", "image_size", "pixels", "seed", *matters)}
    inputs |= {"weights": weights, "data": digest(sets), "precision": str(proc.dtype)}
    metric = "accuracy" if sets["train"].image_class.ndim == 1 else "mAUROC"
    if result := util.finished(folder, inputs):
        proc.log.say(f"{folder}: finished before, {metric} {result[metric]:.3f}")
        return result
    began = time.time()
    pixels = measure(sets["train"]) if c.pixels == "source" else backbones.IMAGENET
    backbone.to(proc.device, memory_format=torch.channels_last)
    result = evaluate(backbone, sets, pixels, c, proc)
    settings = ("lr", "features", "steps", "labels", "validation")
    chosen = ", ".join(f"{k} {result[k]}" for k in settings if k in result)
    proc.log.say(f"{folder}: {name} {metric} {result[metric]:.3f} on {len(sets['test'])} images")
    proc.log.say(f"  {len(sets['train'].class_names)} classes; {chosen}")
    if result.get("undefined"):
        names = ", ".join(result["undefined"])
        proc.log.say(f"note: not in the mean, since test has only images with, or without: {names}")
    result["parts"] = sets["parts"]
    result["images"] = {part: len(sets[part]) for part in ("train", "val", "test")}
    result["seconds"] = round(time.time() - began, 1)
    return util.finish(folder, inputs, result)


# ---- MME -----------------------------------------------------------------------------------------

T = 0.05
LAMBDA = 0.1
VALIDATION = 3  # images per class
PATIENCE = 5  # how often in a row validation may get worse before training ends
# lr: that of the classifier, the backbone's is `slow` times that; every: steps between validations;
# batch: source images, and at most as many labelled and twice as many unlabelled target images.
# "hpt" is MME's code, for ImageNet's weights. "tiny" is ours, for two CPU cores and random weights:
# lr 0.01, 0.03 and 0.1 were tried with S+T alone (photo -> strokes, 3 labels a class, seed 0;
# 0.530, 0.513 and 0.18 on all of val/, the last one after 200 steps); steps are what minutes allow,
# accuracy still rises.
SETTINGS = {  # of hpt.py's recipes; others as "hpt"
    "hpt": dict(steps=50_000, every=500, lr=0.01, slow=0.1, batch=24),
    "tiny": dict(steps=400, every=50, lr=0.01, slow=1.0, batch=24),
}


def reverse(x):
    """x, whose gradient is turned round (Ganin and Lempitsky 2015)."""
    return 2 * x.detach() - x


class Cosine(nn.Module):
    """images (B, 3, S, S) uint8 -> logits (B, K) float32 of a cosine classifier: the mean over C5,
    after ResNets a layer to 512 (as in MME's code), cut to unit length; a layer without bias, whose
    rows have any length; over T."""

    def __init__(self, backbone, classes, pixels, dtype):
        super().__init__()
        width = backbone.channels[5]
        self.backbone = backbone
        self.pixels = pixels
        self.dtype = dtype
        self.deep = nn.Identity()
        if backbone.name.startswith("resnet"):
            self.deep = nn.Linear(width, 512)
            width = 512
        self.final = nn.Linear(width, classes, bias=False)

    def forward(self, images, turned=False):
        """turned: what lowers a loss in `final` raises it in all before. (In MME's code,
        too, `deep` comes before the turn.)"""
        low = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=low):
            x = self.backbone(backbones.normalise(images, self.pixels))[5].mean((2, 3))
        x = self.deep(x.float())
        if turned:
            x = reverse(x)
        return self.final(F.normalize(x)) / T


def mme_optimizer(net, slow):
    """SGD for both updates of a step, with one momentum. A group's "factor" times lr is its lr."""
    head = [*net.deep.parameters(), *net.final.parameters()]
    groups = [
        {"params": net.backbone.parameters(), "factor": slow},
        {"params": head, "factor": 1.0},
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)


def update(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def iteration(net, optimizer, images, labels, unlabelled, lam, lr):
    """Two updates: by the labels of both domains, then by the entropy of the answers for
    `unlabelled`, which `final` raises and all before it lowers. lam = 0: only the first (S+T)."""
    loss = loss_of(net(images), labels)
    update(optimizer, loss, lr)
    if not lam:
        return loss.detach(), torch.zeros_like(loss)
    p = net(unlabelled, turned=True).softmax(1)  # (B, K)
    entropy = -(p * (p + 1e-5).log()).sum(1).mean()
    update(optimizer, -lam * entropy, lr)
    return loss.detach(), entropy.detach()


class Squares(torch.utils.data.Dataset):
    """(S, S, 3) uint8 and label of images of `parts`, stretched to a square of which 7/8 of a side
    are taken (MME's code: 224 of 256). Key (part, index): its middle, label -1 if it cannot be
    read; (part, index, step, slot): anywhere, mirrored or not."""

    def __init__(self, parts, size, seed):
        self.parts = parts
        self.size = size
        self.seed = seed

    def __getitem__(self, key):
        part, index, *draw = key
        image, target = data.read(self.parts[part], index)
        x, y, mirror = 0.5, 0.5, 1
        if draw:
            x, y, mirror = np.random.default_rng((self.seed, part, *draw)).random(3)
        w, h = (n / 8 for n in image.size)
        box = (x * w, y * h, (x + 7) * w, (y + 7) * h)
        pixels = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(pixels)
        if mirror < 0.5:
            pixels = pixels[:, ::-1]
        return pixels, target.get("image_class", -1)


def mme_batches(source, few, rest, steps, batch, lam, c, proc):
    """Of each of `steps`: images of source and `few`, their labels, and as many of `rest`; none of
    these if lam = 0."""
    parts = [source, few, rest.without_labels()]
    sizes = [batch, min(batch, len(few)), 0]
    if lam:
        sizes[2] = min(2 * batch, len(rest))
    labelled = sizes[0] + sizes[1]
    keys = (mme_keys(parts, sizes, step, c.seed) for step in steps)
    squares = Squares(parts, c.image_size, c.seed)
    for pixels, labels in data.loader(squares, keys, proc.workers, collate):
        yield pixels[:labelled], labels[:labelled], pixels[labelled:]


def mme_keys(parts, sizes, step, seed):
    keys = []
    for part, n in enumerate(sizes):
        for slot in range(n):
            index = data.shuffled_index(step * n + slot, len(parts[part]), 3 * seed + part)
            keys.append((part, index, step, slot))
    return keys


@torch.no_grad()
def accuracy(net, images, c, proc):
    """Share of right answers on the middles of images; unreadable ones are left out."""
    net.eval()
    n = len(images)
    keys = [[(0, k) for k in range(i, min(i + 256, n))] for i in range(0, n, 256)]
    right = []
    for pixels, labels in data.loader(
        Squares([images], c.image_size, 0), keys, proc.workers, collate
    ):
        answers = net(pixels.to(proc.device, non_blocking=True)).argmax(1).cpu()
        right.append((answers == labels)[labels >= 0])
    net.train()
    return torch.cat(right).float().mean().item()


def shots(images, count, seed):
    """`count` images of every class (or all, if fewer), at random -> (they, the others). Each
    file's name decides: those of a smaller count are among those of a larger."""
    names = [b"/".join(path.split(b"/")[-2:]) for path in paths_of(images)]
    chosen = np.zeros(len(images), dtype=bool)
    seen = Counter()
    for i in hashed_order(names, seed):
        k = images.image_class[i]
        chosen[i] = seen[k] < count
        seen[k] += 1
    return images.subset(np.flatnonzero(chosen)), images.subset(np.flatnonzero(~chosen))


def domains(source, target, budgets, seed):
    """source: a labelled folder; target: load()'s; budgets: "1,3,10" -> {"source", "val", "test":
    Images, "few": {budget: (labelled, unlabelled)}}. UserError where they do not fit."""
    several = "--eval mme wants one class an image; give linear or finetune"
    need(target["train"].image_class.ndim == 1, several)
    if has_lists(source):
        images = load(source, seed)["train"]
    else:
        images = data.folder(source, "train")
    need(images.image_class.ndim == 1, several)
    same = images.class_names == target["train"].class_names
    need(same, f"--source {source} and --data {target['root']} have other classes; give the same")
    reported = set()
    for part in ("train", "val", "test"):
        reported.update(map(os.path.realpath, paths_of(target[part])))
    shared = sum(os.path.realpath(path) in reported for path in paths_of(images))
    need(not shared, f"{shared} images of --source {source} are also images of --data")
    fits = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", budgets)
    need(fits, f"--budgets {budgets} is no list of numbers such as 1,3,10 (labels a class)")
    numbers = sorted(set(map(int, budgets.split(","))))
    fewest = np.bincount(target["train"].image_class, minlength=len(images.class_names)).min()
    need(max(numbers) < fewest, f"--budgets {max(numbers)}: a class has only {fewest} images")
    return {
        "source": images,
        "val": shots(target["val"], VALIDATION, seed)[0],
        "test": target["test"],
        "train": target["train"],
        "few": {n: shots(target["train"], n, seed) for n in numbers},
    }


def mme_train(folder, net, source, few, rest, val, lam, s, c, proc):
    """Trains net by settings s; leaves it as it was at the best validation -> {"validation", "step"
    of it, "steps" done, "seconds"}. The same call resumes."""
    optimizer = mme_optimizer(net, s["slow"])
    ckpt = util.Checkpoint(folder, proc, model=net, optimizer=optimizer)
    notes = ckpt.notes
    if not notes:
        notes.update(best=-1.0, at=0, worse=0, kept={})
    todo = range(ckpt.step, s["steps"])
    if notes["worse"] > PATIENCE:
        todo = range(0)
    meter = util.Meter(proc.log, folder.name, ckpt.step, s["steps"], s["batch"])
    batches = mme_batches(source, few, rest, todo, s["batch"], lam, c, proc)
    net.train()
    for step, (images, labels, unlabelled) in zip(todo, meter.timed(batches)):
        torch.manual_seed(c.seed * 1_000_003 + step + 1)  # for stochastic depth
        images, labels, unlabelled = (v.to(proc.device) for v in (images, labels, unlabelled))
        lr = s["lr"] * (1 + 1e-4 * step) ** -0.75
        values = iteration(net, optimizer, images, labels, unlabelled, lam, lr)
        if (step + 1) % s["every"] == 0 or step + 1 == s["steps"]:
            loss, entropy = torch.stack(values).tolist()
            finite = math.isfinite(loss + entropy)
            need(finite, f"{folder}: loss is not finite at step {step}; give --precision fp32")
            right = accuracy(net, val, c, proc)
            meter.line(step + 1, loss=loss, entropy=entropy, validation=right)
            notes["worse"] += 1
            if right >= notes["best"]:
                kept = {k: v.cpu().clone() for k, v in net.state_dict().items()}
                notes.update(best=right, at=step + 1, worse=0, kept=kept)
        ckpt.step_done(s["steps"], every=s["every"])
        if notes["worse"] > PATIENCE:
            break
    notes, seconds = ckpt.close()
    net.load_state_dict(notes["kept"])
    return {
        "validation": notes["best"],
        "step": notes["at"],
        "steps": ckpt.step,
        "seconds": round(seconds, 1),
    }


def mme(out, backbone, weights, sets, c, proc):
    """S+T and MME for every budget, each remembered in a folder of its own in `out` -> {"budgets":
    [{"budget", "labels", "S+T", "MME": accuracy on the test part, ...}], ...}. sets: of domains."""
    s = SETTINGS.get(c.recipe, SETTINGS["hpt"])
    source, val, test = sets["source"], sets["val"], sets["test"]
    pixels = backbones.IMAGENET
    if c.pixels == "source":
        pixels = measure(joined(source, sets["train"]))
    inputs = {k: getattr(c, k) for k in ("backbone", "image_size", "pixels", "seed")}
    inputs |= {**s, "T": T, "patience": PATIENCE, "validation": VALIDATION}
    inputs |= {k: sets[k].digest() for k in ("source", "train", "val", "test")}
    inputs |= {"weights": weights, "precision": str(proc.dtype)}
    rows = []
    seconds = 0.0
    for budget, (few, rest) in sets["few"].items():
        row = {"budget": budget, "labels": len(few), "validation": {}, "step": {}, "steps": {}}
        for way, lam in (("S+T", 0.0), ("MME", LAMBDA)):
            folder = out / f"{budget}_{way}"
            made_from = {**inputs, "budget": budget, "lambda": lam}
            if not (result := util.finished(folder, made_from)):
                torch.manual_seed(c.seed)  # the same classifier for both
                classes = len(source.class_names)
                net = Cosine(copy.deepcopy(backbone), classes, pixels, proc.dtype)
                net.to(proc.device, memory_format=torch.channels_last)
                result = mme_train(folder, net, source, few, rest, val, lam, s, c, proc)
                result["accuracy"] = accuracy(net, test, c, proc)
                util.finish(folder, made_from, result)
            row[way] = result["accuracy"]
            seconds += result["seconds"]
            for k in ("validation", "step", "steps"):
                row[k][way] = result[k]
        rows.append(row)
        proc.log.say(
            f"{out}: {budget} target labels a class ({len(few)}, and {len(source)} of the source), "
            f"test accuracy S+T {row['S+T']:.3f}, MME {row['MME']:.3f} on {len(test)} images"
        )
    images = {"source": len(source), "val": len(val), "test": len(test)}
    settings = {**s, "T": T, "lambda": LAMBDA}
    return {"budgets": rows, "settings": settings, "images": images, "seconds": round(seconds, 1)}


def joined(a, b):
    """The images of two sets, without labels."""
    paths = [os.fsdecode(path) for path in paths_of(a) + paths_of(b)]
    return data.of_paths(paths, f"{a.source} and {b.source}")
