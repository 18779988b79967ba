"""How good is a backbone? HPT's evaluations on labelled images: linear probe, fine-tuning with few labels, neighbours.

    python hpt.py --init FILE --eval linear,finetune,knn --data DIR --out runs/probe

DIR has train/CLASS, val/CLASS and test/CLASS. Without test/, val/ is what accuracy is reported on, and a tenth of train/, by a
hash of the files' names, chooses among settings instead.
Or DIR has train.csv, val.csv and perhaps test.csv (sources.py writes them for the paper's datasets): the header path,label and a
line for each image, its path (absolute or below DIR) and its class; or, for several classes an image, the header
path,NAME1,NAME2,... and 1 or 0 for each. Blank, -1 and u (unknown, uncertain) count as 0, as HPT does it on CheXpert. Several
classes are learnt by binary cross-entropy, the mean over images and classes, and scored by the mean area under the ROC curve.

Settings follow HPT's released configurations. Fine-tuning: 2,500 steps and 90 epochs, a tenth of the lr from each third on (their
833 and 1,667; their code, which accumulates over four pieces, reaches these after a quarter of the steps), 256 images a step as
in the code (the paper: 512). Their accuracy is the best on the way, by validation; here it is that of the last step. One process
does the work; the others wait.
"""
import csv
import hashlib
import itertools
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import augment
import classify
import data
import eval as evaluation
import models
import runs
from util import UserError

LRS = (0.3, 3, 30)            # of the linear probe, at 512 images a step; the best by validation counts (in their code, by test)
TUNE_LRS = (0.01, 0.001)      # of fine-tuning; a hundred times that for the new layer
LINEAR_BATCH = 512
NEIGHBOURS, NEIGHBOUR_T = 20, 0.07  # weighted votes of Wu et al. 2018 [recalled], with fewer neighbours
CROP = (0.08, 1)              # of a training image's area, when augmented
CHECK = "python data.py check"
MARKS = {"1": 1, "0": 0, "": 0, "-1": 0, "u": 0}  # of a class in a csv file


# ---- pixels ------------------------------------------------------------------------------------------------------

def read_usable(paths, index):
    """The image at `index`, or the next one that can be read -> (image, its index, reasons why others could not)."""
    bad = []
    for attempt in range(20):
        i = (index + attempt) % len(paths)
        try:
            return data.read_image(os.fsdecode(bytes(paths[i]))), i, bad
        except data.BadImage as error:
            bad.append(str(error))
    raise UserError(f"20 images in a row are unusable, first {bad[0]}; run {CHECK} on the images")


def measure(paths, sample=1000):
    """Mean and deviation of all pixels, RGB in 0..1, of up to `sample` images, evenly spread; every image weighs the same (as in
    the official script) -> two tuples of three."""
    sums = np.zeros((2, 3))
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), sample)).astype(int)).tolist()
    for i in chosen:
        pixels = np.asarray(read_usable(paths, i)[0], dtype=np.float64).reshape(-1, 3) / 255
        sums += pixels.mean(0), (pixels ** 2).mean(0)
    mean, square = sums / len(chosen)
    return tuple(mean.tolist()), tuple(np.sqrt((square - mean ** 2).clip(255 ** -2)).tolist())  # of one colour: not 0


class Crops(torch.utils.data.Dataset):
    """Images of a set (paths (n,), labels (n,) or (n, K)). A key is an index: the centre of the image (7/8 of its shorter side:
    224 of 256), label -1 if it cannot be read; or (step, slot, index): a random crop, mirrored or not -> (S, S, 3) uint8, label,
    reasons."""

    def __init__(self, images, size, seed):
        (self.paths, self.labels), self.size, self.seed = images, size, seed

    def __getitem__(self, key):
        if isinstance(key, tuple):
            image, i, bad = read_usable(self.paths, key[2])
            rng = np.random.default_rng((self.seed, *key[:2]))
            image = augment.random_crop(image, self.size, CROP, rng)
            image = image.transpose(0) if rng.random() < 0.5 else image  # FLIP_LEFT_RIGHT
            return np.asarray(image), self.labels[i], bad
        try:
            image = data.read_image(os.fsdecode(bytes(self.paths[key])))
        except data.BadImage as error:
            return np.zeros((self.size, self.size, 3), np.uint8), np.full_like(self.labels[key], -1), [str(error)]
        (w, h), side = image.size, min(image.size) * 7 / 8
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        return np.asarray(image.resize((self.size, self.size), augment.Image.Resampling.BILINEAR, box=box)), self.labels[key], []


def collate(samples):
    pixels, labels, bad = zip(*samples)
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.stack(labels)), [text for some in bad for text in some]


def random_crops(images, batch, steps, c, named, log):
    """Training batches of random crops: (uint8 (B, 3, S, S), labels (B,) or (B, K)). named: unusable images known already."""
    keys = ([(step, slot, data.shuffled_index(step * batch + slot, len(images[1]), c["seed"])) for slot in range(batch)]
            for step in range(steps))
    for pixels, labels, bad in data.loader(Crops(images, c["image_size"], c["seed"]), keys, c["workers"], collate):
        if new := sorted(set(bad) - named):
            named.update(new)
            evaluation.say_unusable(new, len(images[1]), "replaced by the next image", CHECK, log, "training")
        yield pixels, labels


# ---- labelled data -----------------------------------------------------------------------------------------------

def load(root, seed):
    """-> {"train", "val", "test": (paths (n,) bytes, labels int64 (n,), or (n, K) of several classes an image), "names", "root",
    "parts": what they are, in words}."""
    if ending(root):
        return load_csv(root, seed)
    train = classify.load_folder(root, "train")
    split = {name: classify.load_folder(root, name, train.class_names) for name in ("val", "test")
             if name == "val" or os.path.isdir(os.path.join(root, name))}
    parts = "chosen on val/, reported on test/"
    if "test" not in split:
        held, order = np.zeros(len(train), dtype=bool), np.array(hashed_order(train.files, seed), dtype=int)
        for k in range(len(train.class_names)):
            own = order[train.labels[order] == k]
            held[own[:max(1, round(0.1 * len(own))) if len(own) > 1 else 0]] = True
        split = {"val": train.subset(np.flatnonzero(held)), "test": split["val"]}
        train, parts = train.subset(np.flatnonzero(~held)), "chosen on a tenth of train/, held out of training, reported on val/"
    for name, images in split.items():
        if not len(images):
            raise UserError(f"{images.root} leaves no image for the {name} part; give more images")
    return {**{name: (np.array([os.fsencode(images.path(i)) for i in range(len(images))]), images.labels)
               for name, images in {"train": train, **split}.items()}, "names": train.class_names, "root": root, "parts": parts}


def ending(root):
    """What the parts of a labelled set end in: .csv, or nothing where they are folders."""
    return ".csv" if os.path.isfile(os.path.join(root, "train.csv")) else ""


def load_csv(root, seed):
    """load() of ROOT/train.csv, val.csv and perhaps test.csv."""
    found = {part: read_csv(root, part) for part in ("train", "val", "test")
             if part != "test" or os.path.exists(os.path.join(root, "test.csv"))}
    columns = found["train"][2]
    names = columns or sorted({v for _, labels, _ in found.values() for v in labels})
    for part, (paths, labels, own) in found.items():
        if own != columns:
            raise UserError(f"{root}/{part}.csv begins with other columns than train.csv; they must be the same")
        found[part] = paths, np.array(labels if own else [names.index(v) for v in labels], dtype=np.int64)
    train, split, parts = found.pop("train"), found, "chosen on val.csv, reported on test.csv"
    if "test" not in split:
        order = hashed_order(below(train[0]), seed)
        held, kept = (np.sort(rows) for rows in np.split(np.array(order, dtype=int), [max(1, round(0.1 * len(order)))]))
        split, parts = {"val": [v[held] for v in train], "test": split["val"]}, "chosen on a tenth of train.csv, held out of " \
            "training, reported on val.csv"
        train = [v[kept] for v in train]
    for name, (_, labels) in {"train": train, **split}.items():
        if not len(labels) or labels.ndim == 2 and not (labels.min(0) < labels.max(0)).any():
            raise UserError(f"{root} has no class with and without images in the {name} part, {len(labels)} images; nothing "
                            "could be scored. Give more of them")
    return {"train": tuple(train), **{k: tuple(v) for k, v in split.items()}, "names": names, "root": root, "parts": parts}


def read_csv(root, part):
    """ROOT/PART.csv -> paths (n,) bytes; classes, [name] of n or [[0 or 1]] of n x K; names of the K classes, or []."""
    path, paths, labels = os.path.join(root, part + ".csv"), [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            (first, *names), *rows = csv.reader(f)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as csv ({error}); it wants a header path,label or path,NAME1,NAME2,... and a "
                        "line an image")
    if first != "path" or not names or len(set(names)) < len(names):
        raise UserError(f"{path} begins with {','.join([first, *names])[:80]}; it wants path,label or path,NAME1,NAME2,...")
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        name, *values = row
        marks = values if names == ["label"] else [MARKS.get(v.strip().lower().removesuffix(".0")) for v in values]
        if None in marks or len(marks) != len(names) or not name:
            raise UserError(f"{path}, line {line} ({name}): it wants a path and " + (
                "the name of a class" if names == ["label"] else f"{len(names)} values, each 1, 0, -1, u or blank"))
        paths.append(os.fsencode(os.path.abspath(os.path.join(root, name))))
        labels.append(marks[0] if names == ["label"] else marks)
    if not paths:
        raise UserError(f"{path} lists no image; nothing can be learnt or scored")
    return np.array(paths, dtype=np.bytes_), labels, [] if names == ["label"] else names


def check(names, sets, count, seed, stages):
    """UserError if an evaluation of EVALUATIONS cannot work on these sets with `count` labels for fine-tuning, or if images of
    a stage are among those that are reported on. stages: (source, paths)."""
    if "knn" in names and sets["train"][1].ndim == 2:
        raise UserError(f"--eval knn wants one class an image, {sets['root']} has several; give linear or finetune")
    if "finetune" in names:
        few_labels(sets["train"], min(count, len(sets["train"][1])), seed)
    tested = set(map(os.path.realpath, sets["test"][0].tolist()))
    for source, paths in [*((f"--stage {source}", paths) for source, paths in stages),
                          *((f"the {part} part of {sets['root']}", sets[part][0]) for part in ("train", "val"))]:
        if found := [p for p in paths.tolist() if os.path.realpath(p) in tested]:
            raise UserError(f"{source} has {len(found)} images that --data reports on, first {os.fsdecode(found[0])}; "
                            "take them out of its list, or give a folder without them")


def digest(root):
    """What tells one labelled folder from another: the names of the files, what is in lists of labels, and for an embedded
    domain how it was drawn."""
    lists = [path for f in ("train.csv", "val.csv", "test.csv", "world.json") if os.path.isfile(path := os.path.join(root, f))]
    return runs.digest([data.file_digest(path) for path in (root, *lists)])


def hashed_order(files, seed):
    """Positions of the files in a random order that each file's name alone decides: others may come and go."""
    return sorted(range(len(files)), key=lambda i: hashlib.sha256(b"%d/" % seed + bytes(files[i])).digest())


def below(paths):
    """Their names below the folder that holds them all, wherever that is."""
    start = len(os.path.commonpath(paths.tolist())) + 1
    return [p[start:] for p in paths.tolist()]


def fraction_of(paths, fraction, least, seed):
    """A random part of the paths, at least so many, in their order; those of a smaller fraction are among those of a larger."""
    order = hashed_order(below(paths), seed)
    return paths[sorted(order[:max(least, round(fraction * len(paths)))])]


def few_labels(images, count, seed):
    """`count` of the images, at random, with one or more of every class; those of a smaller count are among those of a larger."""
    paths, labels = images
    order = hashed_order(below(paths), seed)
    own = labels[order]
    at = np.unique(own, return_index=True)[1] if own.ndim == 1 else own.argmax(0)[own.any(0)]  # where each class comes first
    first = dict.fromkeys(order[k] for k in at.tolist())
    if count < len(first):
        raise UserError(f"--labels {count} is less than one for each of {len(at)} classes; give {len(first)} or more")
    chosen = sorted(list({**first, **dict.fromkeys(order)})[:count])
    return paths[chosen], labels[chosen]


# ---- evaluations -------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(backbone, images, pixels, run):
    """uint8 (B, 3, S, S) -> (B, C) float32: the mean over C5 of the backbone as it is."""
    _, _, device, dtype = run
    backbone.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return backbone(evaluation.normalise(images, device, pixels))[5].mean((2, 3)).float()


def features(backbone, sets, part, pixels, c, run, log):
    """Features (n, C) and labels (n,) or (n, K) of centre crops of a part; unreadable images are left out."""
    images = sets[part]
    n, found, labels, bad = len(images[1]), [], [], []
    keys = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    for crops, some, reasons in data.loader(Crops(images, c["image_size"], 0), keys, c["workers"], collate):
        found.append(embed(backbone, crops, pixels, run))
        labels.append(some)
        bad += reasons
    evaluation.say_unusable(bad, n, "left out", CHECK, log, {"train": "training", "val": "validation"}.get(part, part))
    labels = torch.cat(labels).to(run[2])
    usable = labels.flatten(1).amin(1) >= 0 if labels.ndim == 2 else labels >= 0
    return torch.cat(found)[usable], labels[usable]


def loss(logits, labels):  # labels (n,): a class each; (n, K): 1 for every class there is
    return F.cross_entropy(logits, labels) if labels.ndim == 1 else F.binary_cross_entropy_with_logits(logits, labels.float())


def score(logits, labels, names):
    """{"accuracy"}, or what mean_auroc() says for labels (n, K); the first is what counts."""
    if labels.ndim == 2:
        result = evaluation.mean_auroc(logits.float().cpu(), labels.cpu(), names)
        if result["mAUROC"] is None:
            raise UserError(f"no class has readable images both with and without it among {len(labels)}; run {CHECK} on the "
                            "images")
        return result
    return {"accuracy": (logits.argmax(1) == labels).float().mean().item()}


def best(scores):
    """{setting: scores of val, of test} -> the setting that is best on val, what is reported. Of equals the first."""
    values = {k: [next(iter(s.values())) for s in both] for k, both in scores.items()}
    chosen = max(values, key=lambda k: values[k][0])
    return chosen, {**scores[chosen][1], "validation": values[chosen][0], "grid": [[*k, *v] for k, v in values.items()]}


def set_lr(optimizer, peaks, step, steps):
    """A tenth from each third of the steps on."""
    for group, lr in zip(optimizer.param_groups, peaks):
        group["lr"] = lr * 0.1 ** (step * 3 // steps)


def linear(backbone, sets, pixels, c, run, log):
    """A linear layer on the frozen backbone: SGD, lr x features as they are or standardised (ours), all heads at once."""
    device, steps = run[2], c["probe_steps"]
    found = {k: features(backbone, sets, k, pixels, c, run, log) for k in ("train", "val", "test")}
    x, y = found["train"]
    log.say("linear probe on " + ("random crops and flips" if c["augmented"] else "stored features of centre crops, not augmented"
                                  " (--augmented: on random crops, as in the paper, slower)") + f"; {sets['parts']}")
    mean, std = x.mean(0), x.std(0)
    std = std.clamp(min=max(1e-6, 1e-3 * std.mean().item()))  # what hardly varies would be noise, enlarged
    standard = {"raw": lambda v: v, "standardised": lambda v: (v - mean) / std}
    grid = {(kind, lr): nn.Linear(x.shape[1], len(sets["names"])).to(device) for kind in standard for lr in LRS}
    generator = torch.Generator().manual_seed(c["seed"])
    for head in grid.values():
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.data.zero_()
    optimizer = torch.optim.SGD([{"params": head.parameters()} for head in grid.values()], lr=0.0, momentum=0.9)
    crops = random_crops(sets["train"], LINEAR_BATCH, steps, c, set(), log) if c["augmented"] else None
    for step in range(steps):
        if crops:
            images, labels = next(crops)
            batch, labels = embed(backbone, images, pixels, run), labels.to(device)
        else:
            rows = torch.tensor([data.shuffled_index(step * LINEAR_BATCH + k, len(y), c["seed"]) for k in range(LINEAR_BATCH)])
            batch, labels = x[rows.to(device)], y[rows.to(device)]
        inputs = {kind: f(batch) for kind, f in standard.items()}
        set_lr(optimizer, [lr for _, lr in grid], step, steps)
        optimizer.zero_grad()
        sum(loss(head(inputs[kind]), labels) for (kind, _), head in grid.items()).backward()
        optimizer.step()
    with torch.no_grad():
        (kind, lr), result = best({(kind, lr): [score(head(standard[kind](v)), labels, sets["names"])
                                                for v, labels in (found["val"], found["test"])]
                                   for (kind, lr), head in grid.items()})
    return {**result, "lr": lr, "features": kind}


def finetune(backbone, sets, pixels, c, run, log):
    """The whole network on few labels, batch norm in training mode; lr and schedule by validation."""
    (_, _, device, dtype), scores, named = run, {}, set()
    images = few_labels(sets["train"], min(c["labels"], len(sets["train"][1])), c["seed"])
    passes = math.ceil(c["tune_epochs"] * len(images[1]) / c["tune_batch"])  # in steps
    for lr, steps in itertools.product(TUNE_LRS, [c["tune_steps"], *[passes] * (passes > 0)]):
        torch.manual_seed(c["seed"])
        net = models.Classifier(c["backbone"], len(sets["names"])).to(device, memory_format=torch.channels_last).train()
        net.backbone.load_state_dict(backbone.state_dict())
        optimizer = torch.optim.SGD([{"params": m.parameters()} for m in (net.backbone, net.final)], lr=0.0, momentum=0.9)
        for step, (crops, labels) in enumerate(random_crops(images, c["tune_batch"], steps, c, named, log)):
            set_lr(optimizer, (lr, 100 * lr), step, steps)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(evaluation.normalise(crops, device, pixels))
            optimizer.zero_grad()
            loss(logits.float(), labels.to(device)).backward()
            optimizer.step()
        with torch.no_grad():
            found = (features(net.backbone, sets, k, pixels, c, run, log) for k in ("val", "test"))
            scores[lr, steps] = [score(net.final(v), labels, sets["names"]) for v, labels in found]
    (lr, steps), result = best(scores)
    return {**result, "lr": lr, "steps": steps, "labels": len(images[1])}


def knn(backbone, sets, pixels, c, run, log):
    """Votes of the nearest training images, by cosine: a quick look, with nothing to choose."""
    (x, y), (query, truth) = (features(backbone, sets, k, pixels, c, run, log) for k in ("train", "test"))
    x, query, right = F.normalize(x), F.normalize(query), 0
    for rows, labels in zip(query.split(1024), truth.split(1024)):
        near, at = (rows @ x.T).topk(min(NEIGHBOURS, len(x)))                                 # (B, k)
        votes = torch.zeros(len(rows), len(sets["names"]), device=x.device)
        right += (votes.scatter_add(1, y[at], (near / NEIGHBOUR_T).exp()).argmax(1) == labels).sum().item()
    return {"accuracy": right / len(truth)}


EVALUATIONS = {"linear": linear, "finetune": finetune, "knn": knn}
MATTERS = {"linear": ["probe_steps", "augmented"], "finetune": ["tune_steps", "tune_epochs", "tune_batch", "labels"], "knn": []}


def evaluated(name, folder, backbone, weights, sets, c, run, log):
    """Runs one of EVALUATIONS, remembered in `folder` -> {"accuracy" (or "mAUROC") on the test part, how it was chosen,
    ...}. weights: what tells the backbone from others."""
    deps = {k: c[k] for k in ("backbone", "image_size", "pixels", "seed", *MATTERS[name])}
    deps |= {"weights": weights, "data": digest(sets["root"]), "precision": str(run[3])}
    metric = "mAUROC" if sets["train"][1].ndim == 2 else "accuracy"
    if result := runs.stage(folder, deps):
        log.say(f"{folder}: finished before, {metric} {result[metric]:.3f}")
        return result
    pixels, began = measure(sets["train"][0]) if c["pixels"] == "source" else evaluation.IMAGENET, time.time()
    backbone.to(run[2], memory_format=torch.channels_last)
    result = EVALUATIONS[name](backbone, sets, pixels, c, run, log)
    chosen = ", ".join(f"{k} {result[k]}" for k in ("lr", "features", "steps", "labels") if k in result)
    if result.get("undefined"):
        log.say("note: not in the mean, since the test part has only images with, or only without: "
                + ", ".join(result["undefined"]))
    log.say(f"{folder}: {name} {metric} {result[metric]:.3f} on {len(sets['test'][1])} images of {len(sets['names'])} classes"
            + (f" ({chosen}; {result['validation']:.3f} on {len(sets['val'][1])} for validation)" if chosen else ""))
    return runs.finish(folder, deps, {**result, "parts": sets["parts"], "seconds": round(time.time() - began, 1),
                                      "images": {k: len(sets[k][1]) for k in ("train", "val", "test")}})
