"""How good is a backbone? HPT's evaluations on folders with a class each: linear probe, fine-tuning with few labels, neighbours.

    python hpt.py --init FILE --eval linear,finetune,knn --data DIR --out runs/probe

DIR has train/CLASS, val/CLASS and test/CLASS. Without test/, val/ is what accuracy is reported on, and a tenth of train/, by a
hash of the files' names, chooses among settings instead. Settings follow HPT's released configurations, where accuracy is the
best on the way, by validation; here it is that of the last step. Not here: labels of several classes an image (AUROC), and
fine-tuning for 90 epochs. One process does the work; the others wait.
"""
import functools
import hashlib
import os

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

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation of RGB in 0..1
LRS = (0.3, 3, 30)            # of the linear probe, at 512 images a step; the best by validation counts, as in the paper
TUNE_LRS = (0.01, 0.001)      # of fine-tuning; a hundred times that for the new layer
LINEAR_BATCH = 512
NEIGHBOURS, NEIGHBOUR_T = 20, 0.07  # weighted votes of Wu et al. 2018 [recalled], with fewer neighbours
CROP = (0.08, 1)              # of a training image's area, when augmented
CHECK = "python data.py check"


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


def normalise(images, pixels):
    """uint8 (B, 3, H, W) -> float32 by pixels = (mean, deviation), channels_last."""
    mean, std = _on_device(pixels, images.device)
    return (images.to(memory_format=torch.channels_last).float() - mean) / std


@functools.lru_cache
def _on_device(pixels, device):  # made once: creating a tensor on a GPU from numbers waits for it
    return [255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in pixels]


class Crops(torch.utils.data.Dataset):
    """Images of a set (paths, labels). A key is an index: the centre of the image (7/8 of its shorter side: 224 of 256), label -1
    if it cannot be read; or (step, slot, index): a random crop, mirrored or not -> (S, S, 3) uint8, label, reasons."""

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
            return np.zeros((self.size, self.size, 3), np.uint8), -1, [str(error)]
        (w, h), side = image.size, min(image.size) * 7 / 8
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        return np.asarray(image.resize((self.size, self.size), augment.Image.Resampling.BILINEAR, box=box)), self.labels[key], []


def collate(samples):
    pixels, labels, bad = zip(*samples)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels), [text for some in bad for text in some]


def random_crops(images, batch, steps, c):
    """Training batches of random crops: (uint8 (B, 3, S, S), labels (B,))."""
    keys = ([(step, slot, data.shuffled_index(step * batch + slot, len(images[1]), c["seed"])) for slot in range(batch)]
            for step in range(steps))
    for pixels, labels, _ in data.loader(Crops(images, c["image_size"], c["seed"]), keys, c["workers"], collate):
        yield pixels, labels


# ---- labelled data -----------------------------------------------------------------------------------------------

def load(root, seed):
    """-> {"train", "val", "test": (paths (n,) bytes, labels (n,) int64), "names", "root", "parts": what they are, in words}."""
    train = classify.load_folder(root, "train")
    split = {name: classify.load_folder(root, name, train.class_names) for name in ("val", "test")
             if name == "val" or os.path.isdir(os.path.join(root, name))}
    parts = "chosen on val/, reported on test/"
    if "test" not in split:
        held = np.zeros(len(train), dtype=bool)
        for k in range(len(train.class_names)):
            own = [i for i in hashed_order(train.files, seed) if train.labels[i] == k]
            held[own[:max(1, round(0.1 * len(own))) if len(own) > 1 else 0]] = True
        split = {"val": train.subset(np.flatnonzero(held)), "test": split["val"]}
        train, parts = train.subset(np.flatnonzero(~held)), "chosen on a tenth of train/, held out of training, reported on val/"
    for name, images in split.items():
        if not len(images):
            raise UserError(f"{images.root} leaves no image for the {name} part; give more images")
    return {**{name: (np.array([os.fsencode(images.path(i)) for i in range(len(images))]), images.labels)
               for name, images in {"train": train, **split}.items()}, "names": train.class_names, "root": root, "parts": parts}


def hashed_order(files, seed):
    """Positions of the files in a random order that each file's name alone decides: others may come and go."""
    return sorted(range(len(files)), key=lambda i: hashlib.sha256(b"%d/" % seed + bytes(files[i])).digest())


def few_labels(images, count, seed):
    """`count` of the images, at random, with one or more of every class; those of a smaller count are among those of a larger."""
    paths, labels = images
    order = hashed_order([os.path.basename(os.path.dirname(p)) + b"/" + os.path.basename(p) for p in paths.tolist()], seed)
    first = {int(labels[i]): i for i in reversed(order)}  # of every class
    if count < len(first):
        raise UserError(f"--labels {count} is less than one for each of {len(first)} classes")
    chosen = [*first.values(), *(i for i in order if first[int(labels[i])] != i)][:count]
    return paths[sorted(chosen)], labels[sorted(chosen)]


# ---- evaluations -------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(backbone, images, pixels, run):
    """uint8 (B, 3, S, S) -> (B, C) float32: the mean over C5 of the backbone as it is."""
    _, _, device, dtype = run
    backbone.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return backbone(normalise(images.to(device, non_blocking=True), pixels))[5].mean((2, 3)).float()


def features(backbone, images, pixels, c, run, log):
    """Features (n, C) and labels (n,) of centre crops; unreadable images are left out."""
    n, found, labels, bad = len(images[1]), [], [], []
    keys = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    for crops, some, reasons in data.loader(Crops(images, c["image_size"], 0), keys, c["workers"], collate):
        found.append(embed(backbone, crops, pixels, run))
        labels.append(some)
        bad += reasons
    evaluation.say_unusable(bad, n, "left out", CHECK, log)
    labels = torch.cat(labels).to(run[2])
    return torch.cat(found)[labels >= 0], labels[labels >= 0]


def share(logits, labels):  # of right answers
    return (logits.argmax(1) == labels).float().mean().item()


def set_lr(optimizer, peaks, step, steps):
    """A tenth from each third of the steps on."""
    for group, lr in zip(optimizer.param_groups, peaks):
        group["lr"] = lr * 0.1 ** (step * 3 // steps)


def linear(backbone, sets, pixels, c, run, log):
    """A linear layer on the frozen backbone: SGD, lr x features as they are or standardised (ours), all heads at once."""
    device, steps = run[2], c["probe_steps"]
    found = {k: features(backbone, sets[k], pixels, c, run, log) for k in ("train", "val", "test")}
    x, y = found["train"]
    log.say("linear probe on " + ("random crops and flips" if c["augmented"] else "stored features of centre crops, not augmented"
                                  " (--augmented: on random crops, as in the paper, slower)") + f"; {sets['parts']}")
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    standard = {"raw": lambda v: v, "standardised": lambda v: (v - mean) / std}
    grid = {(kind, lr): nn.Linear(x.shape[1], len(sets["names"])).to(device) for kind in standard for lr in LRS}
    generator = torch.Generator().manual_seed(c["seed"])
    for head in grid.values():
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.data.zero_()
    optimizer = torch.optim.SGD([{"params": head.parameters()} for head in grid.values()], lr=0.0, momentum=0.9)
    crops = random_crops(sets["train"], LINEAR_BATCH, steps, c) if c["augmented"] else None
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
        sum(F.cross_entropy(head(inputs[kind]), labels) for (kind, _), head in grid.items()).backward()
        optimizer.step()
    with torch.no_grad():
        scores = {(kind, lr): [share(head(standard[kind](v)), labels) for v, labels in (found["val"], found["test"])]
                  for (kind, lr), head in grid.items()}
    kind, lr = max(scores, key=lambda k: scores[k][0])  # of equals the first
    return {"accuracy": scores[kind, lr][1], "validation": scores[kind, lr][0], "lr": lr, "features": kind,
            "grid": [[*k, *v] for k, v in scores.items()]}


def finetune(backbone, sets, pixels, c, run, log):
    """The whole network on few labels, batch norm in training mode; the lr by validation."""
    (_, _, device, dtype), steps, scores = run, c["tune_steps"], {}
    images = few_labels(sets["train"], min(c["labels"], len(sets["train"][1])), c["seed"])
    for lr in TUNE_LRS:
        torch.manual_seed(c["seed"])
        net = models.Classifier(c["backbone"], len(sets["names"])).to(device, memory_format=torch.channels_last).train()
        net.backbone.load_state_dict(backbone.state_dict())
        optimizer = torch.optim.SGD([{"params": m.parameters()} for m in (net.backbone, net.final)], lr=0.0, momentum=0.9)
        for step, (crops, labels) in enumerate(random_crops(images, c["tune_batch"], steps, c)):
            set_lr(optimizer, (lr, 100 * lr), step, steps)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(normalise(crops.to(device, non_blocking=True), pixels))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels.to(device)).backward()
            optimizer.step()
        with torch.no_grad():
            scores[lr] = [share(net.final(v), labels) for v, labels in (features(net.backbone, sets[k], pixels, c, run, log)
                                                                        for k in ("val", "test"))]
    lr = max(scores, key=lambda k: scores[k][0])
    return {"accuracy": scores[lr][1], "validation": scores[lr][0], "lr": lr, "labels": len(images[1]),
            "grid": [[k, *v] for k, v in scores.items()]}


def knn(backbone, sets, pixels, c, run, log):
    """Votes of the nearest training images, by cosine: a quick look, with nothing to choose."""
    (x, y), (query, truth) = (features(backbone, sets[k], pixels, c, run, log) for k in ("train", "test"))
    x, query, right = F.normalize(x), F.normalize(query), 0
    for rows, labels in zip(query.split(1024), truth.split(1024)):
        near, at = (rows @ x.T).topk(min(NEIGHBOURS, len(x)))                                 # (B, k)
        votes = torch.zeros(len(rows), len(sets["names"]), device=x.device)
        right += (votes.scatter_add(1, y[at], (near / NEIGHBOUR_T).exp()).argmax(1) == labels).sum().item()
    return {"accuracy": right / len(truth)}


EVALUATIONS = {"linear": linear, "finetune": finetune, "knn": knn}
MATTERS = {"linear": ["probe_steps", "augmented"], "finetune": ["tune_steps", "tune_batch", "labels"], "knn": []}


def evaluated(name, folder, backbone, weights, sets, c, run, log):
    """Runs one of EVALUATIONS, remembered in `folder` -> {"accuracy" on the test part, how it was chosen, ...}. weights: what
    tells the backbone from others."""
    deps = {k: c[k] for k in ("backbone", "image_size", "pixels", "seed", *MATTERS[name])}
    deps |= {"weights": weights, "data": data.file_digest(sets["root"]), "precision": str(run[3])}
    if result := runs.stage(folder, deps):
        log.say(f"{folder}: finished before, accuracy {result['accuracy']:.3f}")
        return result
    pixels = measure(sets["train"][0]) if c["pixels"] == "source" else IMAGENET
    backbone.to(run[2], memory_format=torch.channels_last)
    result = EVALUATIONS[name](backbone, sets, pixels, c, run, log)
    chosen = ", ".join(f"{k} {result[k]}" for k in ("lr", "features", "labels") if k in result)
    log.say(f"{folder}: {name} accuracy {result['accuracy']:.3f} on {len(sets['test'][1])} images of {len(sets['names'])} classes"
            + (f" ({chosen}; {result['validation']:.3f} on {len(sets['val'][1])} for validation)" if chosen else ""))
    return runs.finish(folder, deps, {**result, "parts": sets["parts"],
                                      "images": {k: len(sets[k][1]) for k in ("train", "val", "test")}})
