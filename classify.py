"""What classification plugs into st.py: data, network, loss, scores, pseudo-labels. detect.py has the same functions.

The paper's pre-training in this project's own loop. Its ImageNet init is a teacher of this task, its ImageNet++ init a student:
Noisy Student (Xie et al. 2020), a classifier that learns from its teacher's answers under stronger augmentation, from scratch.
--init takes either for a detector or segmenter:

    python st.py --task cls --labeled 1 --mode train --out runs/imagenet                       supervised
    python st.py --task cls --labeled 1 --student-init same --out runs/imagenet++              Noisy Student
    python st.py --task det --init runs/imagenet++/student

Pseudo-labels are hard, one an image, kept from a probability of 0.3 on [recalled]. Not here of Noisy Student: its soft labels,
its balancing (as many images of every class, surest first), dropout, a student larger than the teacher. No label smoothing.
"""
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import models
import runs
import util
from util import UserError

TERMS = ["ce"]
CHECK = "python data.py check"
METRICS = ["accuracy", "balanced"]


@dataclass
class Images:
    """Images with a class each, in flat arrays."""
    root: str               # folder that every path is relative to
    files: np.ndarray       # (n,) bytes
    labels: np.ndarray      # (n,) int64, 0..K-1
    ids: np.ndarray         # (n,) int64, position in the sorted list of files, whose hash a label split holds
    class_ids: list         # 0..K-1
    class_names: list       # the folders' names, sorted
    annotation_file: str    # the folder of class folders
    dropped = {}            # nothing is left out at load

    def __len__(self):
        return len(self.ids)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def read(self, i):
        """(image, target with "image_class"); data.BadImage if the file cannot be used."""
        image = data.read_image(self.path(i))
        return image, {**data.nothing(int(self.ids[i])), "size": (image.height, image.width), "image_class": int(self.labels[i])}

    def subset(self, index):
        index = np.asarray(index, dtype=np.int64)
        return replace(self, files=self.files[index], labels=self.labels[index], ids=self.ids[index])


def load_folder(root, split, class_names=None):
    """ROOT/SPLIT/CLASS/*.jpg as Images. class_names: the classes a network is trained on; others are refused.

    UserError for a folder that is missing, has fewer than two classes, or (but in val) a class without an image.
    """
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder}; there must be train/CLASS/*.jpg and val/CLASS/*.jpg, a folder for every class")
    names = sorted(d.name for d in os.scandir(folder) if d.is_dir() and not d.name.startswith("."))
    if class_names is None and len(names) < 2:
        raise UserError(f"{folder} holds {len(names)} class folders; give it two or more, each with the images of one class")
    if odd := sorted(set(names) ^ set(class_names or names)):
        raise UserError(f"{folder} has other classes than the network is trained on (in only one of them: {', '.join(odd[:5])}); "
                        "give train/ and val/ the same class folders, in val/ empty ones if need be")
    number, files = {name: k for k, name in enumerate(names)}, data.images_below(folder)
    if loose := [f for f in files if "/" not in f]:
        raise UserError(f"{folder} holds {len(loose)} images outside of its class folders, first {loose[0]}; move them into one")
    labels = np.array([number[f.partition("/")[0]] for f in files], dtype=np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty) and (split == "train" or not files):
        raise UserError(f"{folder}/{names[empty[0]]} holds no image; add some, or remove that class from train/ and val/")
    return Images(folder, np.array([os.fsencode(f) for f in files], dtype=np.bytes_), labels, np.arange(len(files)),
                  list(range(len(names))), names, folder)


def load(flags):
    """-> (training set, validation set) as Images, of the same classes."""
    root = util.rank0_first(lambda: locate(flags))
    train = load_folder(root, "train")
    return train, load_folder(root, "val", train.class_names)


def load_val(flags, class_ids, class_names):
    return load_folder(util.rank0_first(lambda: locate(flags)), "val", class_names)


def locate(flags):
    return flags.root if flags.data == "folder" else data.embedded(flags.root, "single")


def data_deps(train, val):
    return {}  # the list of files, which st.py hashes, has the classes in it


def network(c, classes, norm, backbone_norm):
    return models.Classifier(c["backbone"], classes, backbone_norm)


# ---- loss --------------------------------------------------------------------------------------------------------

def criterion(c, device):
    """-> prepare(batch) -> (targets {name: (B,)}, counts (3,)), losses(outputs, targets, part, counts) -> (B, 1)."""
    def prepare(batch):
        images = torch.bincount(batch["part"], minlength=len(data.PARTS)).float()
        return {"class": batch["image_class"]}, util.all_sum(images)

    def losses(logits, targets, part, images):
        each = F.cross_entropy(logits.float(), targets["class"], reduction="none")  # (B,)
        # Divided by the images of its part of the *whole* step, so that pieces and processes add up to one loss.
        return (each / images[part])[:, None]
    return prepare, losses


def joined(prepare, losses):
    """prepare and losses of another task for joint training: part 2 of a batch is classified, its loss a column of its own.
    Images 1:1 with the labelled ones and the normalised loss are the paper's [recalled]; its head and, with pseudo-labels beside
    it, the make-up of a step are unknown (there the same images carry both labels, here they are parts of their own)."""
    def prepare_all(batch):
        targets, counts = prepare(batch)  # images of part 2 have neither boxes nor labelled pixels
        images = util.all_sum((batch["part"] == 2).sum().float())
        return {**targets, "class": batch["image_class"]}, torch.cat([counts[:2], images[None]])

    def losses_all(outputs, targets, part, counts):  # -> (B, terms + 1)
        (found, logits), classified = outputs, part == 2
        others = losses(found, {k: v[~classified] for k, v in targets.items() if k != "class"}, part[~classified], counts)
        each = others.new_zeros(len(part), others.shape[1] + 1)
        each[~classified, :-1] = others
        each[classified, -1] = F.cross_entropy(logits.float(), targets["class"][classified], reduction="none") / counts[2]
        return each
    return prepare_all, losses_all


# ---- scores ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def probabilities(net, source, index, c, run):
    """Class probabilities of images source[index]; yields in order (i, (K,) float32 on the CPU, "") or (i, None, reason)."""
    (_, _, device, dtype), done = run, 0
    net.eval()
    for rows in data.eval_loader(source, index, c["image_size"], evaluation.BATCH, c["workers"]):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = net(evaluation.normalise(rows["images"], device))
        found, bad = logits.float().softmax(1).cpu(), dict(rows["bad"])
        for j in range(min(evaluation.BATCH, len(index) - done)):  # the last batch is filled up with repeats
            yield index[done + j], *((None, bad[j]) if j in bad else (found[j], ""))
        done += evaluation.BATCH


def evaluate(net, c, val, run, log):
    """Top-1 accuracy, its mean over the classes ("balanced"), and it for each class (None without images); the same on every
    process."""
    (rank, ranks, device, _), count, bad = run, torch.zeros(2, len(val.class_names), dtype=torch.int64), []  # right, all
    for i, found, reason in probabilities(net, val, list(range(rank, len(val), ranks)), c, run):
        if found is None:
            bad.append(reason)
            continue
        count[:, val.labels[i]] += torch.tensor([found.argmax() == val.labels[i], 1])
    (right, of), bad = util.all_sum(count.to(device)).cpu(), [text for share in evaluation.gathered(bad) for text in share]
    evaluation.say_unusable(bad, len(val), "not scored", CHECK, log)
    each = [r / n if n else None for r, n in zip(right.tolist(), of.tolist())]
    return {"accuracy": int(right.sum()) / int(of.sum()), "balanced": float(np.mean([v for v in each if v is not None])),
            "per_class": dict(zip(val.class_names, each))}


# ---- pseudo-labels -----------------------------------------------------------------------------------------------

def about(labelled):
    return {}


def label(folder, net, state, paths, held, labelled, c, run, log):
    """A class for each image of `paths` that has one above the threshold, in folder/pseudo.json -> {"threshold", "images",
    "kept", "bad", "per_class": {name: images}}. held: unused; labelled: the teacher's training set or None."""
    threshold = float(c["threshold"])
    pseudo_label(folder, net, paths, c, run, log)
    info = {"teacher": state["path"], "teacher_weights": runs.digest_weights(state["model"]), "teacher_step": state["step"],
            "threshold": threshold, "classes": state["class_names"]}
    result = util.rank0_first(lambda: {"threshold": threshold, **merge(folder, threshold, state["class_names"], info)})
    kept, often = result["kept"], Counter(result["per_class"]).most_common()
    log.say(f"{folder}: threshold {threshold:.2f} keeps {kept} of {result['images']} images; {result['bad']} unusable images\n"
            "  " + ", ".join(f"{k} {n}" for k, n in often[:20])
            + (f", {len(often) - 20} rarer classes" if len(often) > 20 else ""))
    if kept < 0.02 * (result["images"] - result["bad"]) or not kept:
        raise UserError(f"{folder} is (almost) empty: {kept} of {result['images'] - result['bad']} usable images reach the "
                        f"threshold {threshold:.2f}. Train the teacher longer, or lower --threshold")
    if often[0][1] == kept and labelled:
        raise UserError(f"{folder}: all {kept} kept images are labelled {often[0][0]}, which teaches nothing. Train the "
                        "teacher longer, or delete that folder and give other --unlabeled images")
    return result


def load_pseudo(folder, result, labelled):
    """pseudo.json as Images."""
    rows = data.read_json(folder / "pseudo.json", "list of pseudo-labels", ["images"])["images"]
    number = {name: k for k, name in enumerate(labelled.class_names)}
    return replace(labelled, root=str(folder), annotation_file=str(folder / "pseudo.json"), ids=np.arange(len(rows)),
                   files=np.array([os.fsencode(os.path.abspath(row["file"])) for row in rows], dtype=np.bytes_),
                   labels=np.array([number[row["label"]] for row in rows], dtype=np.int64))


def pseudo_label(folder, net, paths, c, run, log):
    """Appends the likeliest class of each image of `paths` and its probability to folder/part_*.jsonl; images done before are
    skipped. All are stored, whatever the threshold."""
    (rank, ranks, _, _), began = run, time.time()
    done = util.rank0_first(lambda: data.finished_images(folder, len(paths)))
    todo = [i for i in range(rank, len(paths), ranks) if not done[i]]
    with open(Path(folder) / f"part_{rank}_of_{ranks}.jsonl", "a", buffering=1) as part:
        for n, (i, found, reason) in enumerate(probabilities(net, paths, todo, c, run)):
            row = {"bad": reason} if found is None else {"label": int(found.argmax()), "score": round(float(found.max()), 5)}
            part.write(json.dumps({"i": i, "file": os.fsdecode(bytes(paths[i])), **row}) + "\n")
            if (n + 1) % 200 == 0:
                log.progress("pseudo", n + 1, len(todo), began, 0, images_s=(n + 1) / (time.time() - began))
    if ranks > 1:
        torch.distributed.barrier()


def merge(folder, threshold, names, info):
    """The parts as folder/pseudo.json: {"info", "images": [{"file", "label" (the class's name), "score"}]}."""
    stats, per_class = Counter(), Counter({name: 0 for name in names})

    def write(path):
        with open(path, "w") as f:
            f.write('{"info": ' + json.dumps(info) + ',\n"images": [')
            for row in data.read_parts(folder):
                stats["images"] += 1
                stats["bad"] += "bad" in row
                if row.get("score", -1) >= threshold:
                    name = names[row["label"]]
                    f.write(",\n" * bool(stats["kept"]) + json.dumps({"file": row["file"], "label": name, "score": row["score"]}))
                    stats["kept"] += 1
                    per_class[name] += 1
            f.write("]}\n")
    runs.write_atomic(Path(folder) / "pseudo.json", write)
    return {**{k: stats[k] for k in ("images", "kept", "bad")}, "per_class": dict(per_class)}
