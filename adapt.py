"""Domain adaptation with few labels: MME (Saito et al. 2019), with which HPT judges a backbone on DomainNet. Of the source domain
all labels are known, of the target a few per class; its other training images come without labels.

    python hpt.py --init FILE --eval mme --source photo --data sketch --budgets 1,3,10 --out runs/mme
    python hpt.py --init imagenet --recipe hpt --eval mme --source REAL --data CLIPART          (folders with train/CLASS, ...)
    ... --stage both.txt:5000 --eval mme ...              HPT first, on the images of source and target together, as in the paper

S+T trains on the labels of both domains; MME as long, with the entropy of its answers on unlabelled target images besides: the
last layer is to raise it, all before it is to lower it (minimax entropy). Settings are those of MME's released code. Which ones
HPT used is unknown, as are its seven budgets (here --budgets, target labels per class) and its unlabelled images: here those are
the target's train part without its labels, and accuracy is that on its test part, which is never trained on (in MME's code, one
pool is both). A few images of val/ choose the step; the test part is looked at once, in the end.

Mind when comparing: MME makes two updates where S+T makes one, and its batch norm sees unlabelled target images; both belong to
the method as released. HPT's EfficientNet-B2 ended in 1408 channels [recalled], that of backbones.py ends in C5's 352. One
process does the work; the others wait.
"""
import copy
import math
import os
import re
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import classify
import data
import eval as evaluation
import probe
import runs
from augment import Image
from util import UserError

T, LAMBDA = 0.05, 0.1
VALIDATION, PATIENCE = 3, 5       # images per class; how often in a row they may get worse before training ends
# lr: that of the classifier, the backbone's is `slow` times that; every: steps between validations; batch: source images, and at
# most as many labelled and twice as many unlabelled target images. "hpt" is MME's code, for ImageNet's weights. "tiny" is ours,
# for two CPU cores and random weights: lr 0.01, 0.03 and 0.1 were tried with S+T alone (photo -> strokes, 3 labels a class, seed
# 0; 0.530, 0.513 and 0.18 on all of val/, the last one after 200 steps); steps are what minutes allow, accuracy still rises.
SETTINGS = {  # of hpt.py's recipes; others as "hpt"
    "hpt": dict(steps=50_000, every=500, lr=0.01, slow=0.1, batch=24),
    "tiny": dict(steps=400, every=50, lr=0.01, slow=1.0, batch=24),
}


# ---- the algorithm -----------------------------------------------------------------------------------------------

def reverse(x):
    """x, whose gradient is turned round (Ganin and Lempitsky 2015)."""
    return 2 * x.detach() - x


class Cosine(nn.Module):
    """images (B, 3, S, S) uint8 -> logits (B, K) float32 of a cosine classifier: the mean over C5, after ResNets a layer to 512
    (as in MME's code), cut to unit length; a layer without bias, whose rows have any length; over T."""

    def __init__(self, backbone, classes, pixels, dtype):
        super().__init__()
        width = backbone.channels[5]
        self.backbone, self.pixels, self.dtype = backbone, pixels, dtype
        self.deep = nn.Linear(width, 512) if backbone.name.startswith("resnet") else nn.Identity()
        self.final = nn.Linear(512 if backbone.name.startswith("resnet") else width, classes, bias=False)

    def forward(self, images, turned=False):
        """turned: what lowers a loss in `final` raises it in all before. (In MME's code, too, `deep` comes before the turn.)"""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.backbone(evaluation.normalise(images, images.device, self.pixels))[5].mean((2, 3))
        x = self.deep(x.float())
        return self.final(F.normalize(reverse(x) if turned else x)) / T


def lr_at(step, lr):
    return lr * (1 + 1e-4 * step) ** -0.75


def optimizer_of(net, slow):
    """SGD for both updates of a step, with one momentum. A group's "factor" times lr_at is its lr."""
    groups = [{"params": net.backbone.parameters(), "factor": slow},
              {"params": [*net.deep.parameters(), *net.final.parameters()], "factor": 1.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)


def update(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def iteration(net, optimizer, images, labels, unlabelled, lam, lr):
    """Two updates: by the labels of both domains, then by the entropy of the answers for `unlabelled`, which `final` raises and
    all before it lowers. lam = 0: only the first (S+T). -> loss, entropy."""
    loss = F.cross_entropy(net(images), labels)
    update(optimizer, loss, lr)
    if not lam:
        return loss.detach(), torch.zeros_like(loss)
    p = net(unlabelled, turned=True).softmax(1)                                              # (B, K)
    entropy = -(p * (p + 1e-5).log()).sum(1).mean()
    update(optimizer, -lam * entropy, lr)
    return loss.detach(), entropy.detach()


# ---- images ------------------------------------------------------------------------------------------------------

class Squares(torch.utils.data.Dataset):
    """Images of parts [(paths, labels), ...], stretched to a square of which 7/8 of a side are taken (MME's code: 224 of 256).
    Key (part, index): its middle, label -1 if it cannot be read; (part, index, step, slot): anywhere, mirrored or not ->
    (S, S, 3) uint8, label, reasons."""

    def __init__(self, parts, size, seed):
        self.parts, self.size, self.seed = parts, size, seed

    def __getitem__(self, key):
        part, index, *draw = key
        paths, labels = self.parts[part]
        if not draw:
            try:
                return self.square(data.read_image(os.fsdecode(bytes(paths[index]))), 0.5, 0.5), labels[index], []
            except data.BadImage as error:
                return np.zeros((self.size, self.size, 3), np.uint8), -1, [str(error)]
        image, index, bad = probe.read_usable(paths, index)
        x, y, mirror = np.random.default_rng((self.seed, part, *draw)).random(3)
        pixels = self.square(image, x, y)
        return pixels[:, ::-1] if mirror < 0.5 else pixels, labels[index], bad

    def square(self, image, x, y):
        w, h = (n / 8 for n in image.size)
        box = (x * w, y * h, (x + 7) * w, (y + 7) * h)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))


def batches(source, few, rest, start, steps, batch, lam, c):
    """Of each step: images of source and `few`, their labels, and as many of `rest`, without; none if lam = 0."""
    hidden = rest[0], np.full(len(rest[0]), -1)  # nothing below this line knows their labels
    parts, seed = [source, few, hidden], c["seed"]
    sizes = [batch, min(batch, len(few[0])), min(2 * batch, len(rest[0])) if lam else 0]
    keys = ([(part, data.shuffled_index(step * n + slot, len(parts[part][0]), 3 * seed + part), step, slot)
             for part, n in enumerate(sizes) for slot in range(n)] for step in range(start, steps))
    for pixels, labels, _ in data.loader(Squares(parts, c["image_size"], seed), keys, c["workers"], probe.collate):
        yield pixels[:sum(sizes[:2])], labels[:sum(sizes[:2])], pixels[sum(sizes[:2]):]


@torch.no_grad()
def accuracy(net, images, c, run, log, which="validation"):
    """Share of right answers on the middles of (paths, labels); unreadable images are left out."""
    n, right, bad = len(images[1]), [], []
    net.eval()
    keys = [[(0, k) for k in range(i, min(i + 256, n))] for i in range(0, n, 256)]
    for pixels, labels, reasons in data.loader(Squares([images], c["image_size"], 0), keys, c["workers"], probe.collate):
        answers = net(pixels.to(run[2], non_blocking=True)).argmax(1).cpu()
        right.append((answers == labels)[labels >= 0])
        bad += reasons
    net.train()
    evaluation.say_unusable(bad, n, "left out", probe.CHECK, log, which)
    return torch.cat(right).float().mean().item()


# ---- the two domains ---------------------------------------------------------------------------------------------

def shots(images, count, seed):
    """`count` images of every class (or all, if fewer), at random -> (they, the others). Each file's name decides: those of a
    smaller count are among those of a larger."""
    paths, labels = images
    order = probe.hashed_order([b"/".join(p.split(b"/")[-2:]) for p in paths.tolist()], seed)
    chosen, found = np.zeros(len(paths), dtype=bool), Counter()
    for i in order:
        chosen[i] = found[labels[i]] < count
        found[labels[i]] += 1
    return (paths[chosen], labels[chosen]), (paths[~chosen], labels[~chosen])


def load(source, target, budgets, seed):
    """source: a folder; target: probe.load's; budgets: "1,3,10", target labels per class -> {"source": its train part (paths,
    labels), "val", "test", "few": {budget: (labelled, unlabelled)}, "names", "pixels": paths to measure, "about": what tells the
    domains from others}. UserError where they do not fit together, or a budget is too large."""
    if target["train"][1].ndim == 2:
        raise UserError(f"--eval mme wants one class an image, {target['root']} has several; give linear or finetune")
    if probe.ending(source):
        sets = probe.load(source, seed)
        (given, labels), names = sets["train"], sets["names"]
        paths = [os.fsdecode(p) for p in given.tolist()]
    else:
        images = classify.load_folder(source, "train")
        labels, names, paths = images.labels, images.class_names, [images.path(i) for i in range(len(images))]
    if labels.ndim == 2:
        raise UserError(f"--eval mme wants one class an image, --source {source} has several; give another")
    if odd := sorted(set(names) ^ set(target["names"])):
        raise UserError(f"--source {source} and --data {target['root']} have other classes (in only one of them: "
                        f"{', '.join(odd[:5])}); give both the same class folders")
    theirs = {os.path.realpath(os.fsdecode(p)) for part in ("train", "val", "test") for p in target[part][0].tolist()}
    if shared := sum(os.path.realpath(p) in theirs for p in paths):
        raise UserError(f"{shared} images of --source {source} are also images of --data {target['root']}; give two domains")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", budgets):
        raise UserError(f"--budgets {budgets} is no list of numbers; give target labels per class, as in 1,3,10")
    few = {n: shots(target["train"], n, seed) for n in sorted(set(map(int, budgets.split(","))))}
    counts = np.bincount(target["train"][1], minlength=len(target["names"]))
    if max(few) >= counts.min():  # none would be left without label
        raise UserError(f"--budgets {max(few)} is too large: {target['root']} has {counts.min()} training images of "
                        f"{target['names'][counts.argmin()]}; lower it")
    labelled = np.array([os.fsencode(p) for p in paths]), labels
    return {"source": labelled, "val": shots(target["val"], VALIDATION, seed)[0], "test": target["test"], "few": few,
            "names": target["names"], "pixels": np.concatenate([labelled[0], target["train"][0]]),
            "about": {"source": probe.digest(source), "data": probe.digest(target["root"])}}


# ---- training, budgets -------------------------------------------------------------------------------------------

def train(folder, net, source, few, rest, val, lam, s, c, run, log):
    """Trains net by settings s, resuming from the newest checkpoint in `folder`; leaves it as it was at the best validation ->
    {"validation", "step" of it, "steps" done, "seconds"}."""
    optimizer, device, began = optimizer_of(net, s["slow"]), run[2], time.time()
    state = runs.load_latest(folder) or {"step": 0, "best": -1.0, "at": 0, "worse": 0, "kept": {}, "spent": 0.0}
    if start := state["step"]:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    best, at, worse, kept, step = (state[k] for k in ("best", "at", "worse", "kept", "step"))
    drawn = batches(source, few, rest, start, s["steps"] if worse <= PATIENCE else start, s["batch"], lam, c)
    net.train()
    for step, (images, labels, unlabelled) in enumerate(drawn, start + 1):
        torch.manual_seed(c["seed"] * 1_000_003 + step)  # for stochastic depth
        images, labels, unlabelled = (v.to(device, non_blocking=True) for v in (images, labels, unlabelled))
        values = iteration(net, optimizer, images, labels, unlabelled, lam, lr_at(step - 1, s["lr"]))
        if step % s["every"] and step < s["steps"]:
            continue
        loss, entropy = torch.stack(values).tolist()
        if not math.isfinite(loss + entropy):
            raise UserError(f"{folder}: loss is not finite at step {step}; give --precision fp32, or another --init")
        found = accuracy(net, val, c, run, log)
        log.progress(folder.name, step, s["steps"], began, start, loss=loss, entropy=entropy, validation=found)
        if found >= best:
            best, at, worse, kept = found, step, 0, {k: v.cpu().clone() for k, v in net.state_dict().items()}
        else:
            worse += 1
        runs.save_checkpoint(folder, {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
                                      "at": at, "worse": worse, "kept": kept, "spent": state["spent"] + time.time() - began})
        if worse > PATIENCE:
            break
    net.load_state_dict(kept)
    return {"validation": best, "step": at, "steps": step, "seconds": round(state["spent"] + time.time() - began, 1)}


def mme(out, backbone, weights, domains, c, run, log):
    """S+T and MME for every budget, each remembered in a folder of its own in `out`. backbone: left alone; weights: what tells it
    from others; domains: load's -> {"budgets": [{"budget": target labels per class, "labels", "S+T", "MME": accuracy on the test
    part, "validation", "step", "steps": {method: the best, where it was, when training ended}}], "settings", "images",
    "seconds"}."""
    s, rows, labelled, val = SETTINGS.get(c["recipe"], SETTINGS["hpt"]), [], domains["source"], domains["val"]
    pixels = probe.measure(domains["pixels"]) if c["pixels"] == "source" else evaluation.IMAGENET  # of both
    deps = {**{k: c[k] for k in ("backbone", "image_size", "pixels", "seed")}, **s, **domains["about"], "weights": weights,
            "precision": str(run[3])}
    seconds = []
    for budget, (few, rest) in domains["few"].items():
        row = {"budget": budget, "labels": len(few[0]), "S+T": 0.0, "MME": 0.0, "validation": {}, "step": {}, "steps": {}}
        for method, lam in (("S+T", 0.0), ("MME", LAMBDA)):
            folder, own = out / f"{budget}_{method}", {**deps, "budget": budget, "lambda": lam, "T": T, "patience": PATIENCE,
                                                              "validation": VALIDATION}
            if not (result := runs.stage(folder, own)):
                torch.manual_seed(c["seed"])  # the same classifier for both
                net = Cosine(copy.deepcopy(backbone), len(domains["names"]), pixels, run[3])
                net.to(run[2], memory_format=torch.channels_last)
                result = train(folder, net, labelled, few, rest, val, lam, s, c, run, log)
                result = runs.finish(folder, own, {**result, "accuracy": accuracy(net, domains["test"], c, run, log, "test")})
            row[method] = result["accuracy"]
            seconds.append(result["seconds"])
            for k in ("validation", "step", "steps"):
                row[k][method] = result[k]
        rows.append(row)
        log.say(f"{out}: {budget} target labels a class ({len(few[0])}, and {len(labelled[0])} of the source), test accuracy S+T "
                f"{row['S+T']:.3f}, MME {row['MME']:.3f} on {len(domains['test'][1])} images")
    sizes = {"source": len(labelled[0]), "val": len(val[0]), "test": len(domains["test"][0])}
    return {"budgets": rows, "settings": {**s, "T": T, "lambda": LAMBDA}, "images": sizes, "seconds": round(sum(seconds), 1)}
