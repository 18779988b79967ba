"""Self-training for object detection: teacher -> pseudo-labels -> student (Zoph et al. 2020, "Rethinking Pre-training
and Self-training").

    python st.py                                                    the embedded world, a few minutes on two cores
    torchrun --nproc_per_node 8 st.py --data coco --root COCO --labeled 0.2 --aug s4 --recipe coco-r50
    python st.py --mode pseudo --ckpt runs/x/student --unlabeled DIR --out labels     label a folder for use elsewhere
    python st.py --mode pseudo --ckpt retinanet_resnet50_fpn_coco-eeacb38b.pth ...    with torchvision's COCO detector
    python st.py --mode eval   --ckpt runs/x/student --data coco --root COCO          score a checkpoint

1. train a teacher on the labelled images          -> OUT/teacher/
2. keep its confident boxes on unlabelled images   -> OUT/pseudo/pseudo.json (COCO, with scores)
3. train a student on both, with the joint loss    -> OUT/student/
and score both on the validation set               -> OUT/results.json, OUT/report.html
Running the same command again resumes where it stopped, bit for bit on CPU.
"""
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import backbones
import data
import eval as evaluation
import models
import ops
import recipes
import runs
import show
import util
import world
from recipes import HELP, Config
from util import UserError


BOX_WEIGHT = 50.0  # of the Huber loss next to the focal loss (TPU detection code)
FLOOR = 0.05  # detections under this score are not stored, unless the threshold is lower


# ---- the algorithm -----------------------------------------------------------------------------------------------

def lr_at(step, steps, peak, warmup, warmup_from=0.01, drops=()):
    """Linear warm-up from that share of the peak, then a cosine to 0 (TPU code, modeling/learning_rates.py), or a tenth
    from each of the `drops` (shares of all steps) on."""
    if step < warmup:
        return peak * (warmup_from + (1 - warmup_from) * step / warmup)
    if drops:
        return peak * 0.1 ** sum(step >= round(d * steps) for d in drops)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def stage_seed(seed, stage):
    """Every stage draws its own images and augmentations. If the student saw its teacher's draws again, its human half
    would teach it less than the control's fresh ones do."""
    return seed if stage == "teacher" else int(runs.digest([seed, stage]), 16) % 2 ** 31


def assign(batch, anchors):
    """What every anchor of a batch should answer -> matched (B, A) as from ops.match, classes (B, A) likewise but with
    class indices, positives (2,): positive anchors under human and under pseudo labels, over all processes."""
    matched = torch.cat([ops.match(anchors, boxes, labels >= 0) for boxes, labels in zip(
        batch["boxes"].split(8), batch["labels"].split(8))])  # 8 images at a time: all IoUs of a large batch are gigabytes
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-1)  # (B, M+1): gather needs a column if M is 0
    classes = torch.where(matched >= 0, labels.gather(1, matched.clamp(min=0)), matched)
    positives = torch.zeros(2, device=anchors.device).index_add(0, batch["part"], (matched >= 0).sum(1).float())
    return matched, classes, util.all_sum(positives)


def losses_of(logits, deltas, anchors, boxes, matched, classes, part, positives):
    """Focal and weighted box loss of each image (B, 2), divided by the positives + 1 of its part of the *whole* step,
    so that the pieces of a step, on any number of processes, add up to the same loss."""
    focal = ops.focal_loss(logits, classes)
    box = BOX_WEIGHT / 4 * ops.box_loss(deltas, boxes, anchors, matched)
    return torch.stack([focal, box], 1) / (positives[part] + 1)[:, None]


def train(folder, net, parts, counts, steps, c, run, log):
    """Trains net for `steps` steps, resuming from the newest checkpoint in `folder` and leaving its own there.

    parts: [human] or [human, pseudo] Detections; counts: images of each in a step, over all processes.
    """
    rank, ranks, device, dtype = run
    anchors, optimizer, averages, start = anchors_for(c, device), make_optimizer(net, c), torch.zeros(3).double(), 0
    if state := runs.load_latest(folder):
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averages, start = state["averages"], state["step"]
    ddp, seed = distribute(net, device, ranks), stage_seed(c["seed"], Path(folder).name)
    forward = compiled(ddp, device) if c["compile"] else ddp
    loader = data.train_loader(parts, counts, start, steps, c["accumulate"], rank, ranks, c["aug"], c["image_size"], seed,
                               c["workers"])
    stop, meter, quarantine = runs.Stop(), Meter(log, Path(folder).name, start, steps, sum(counts)), set()
    net.train()
    for step, batch in zip(range(start, steps), meter.timed(loader)):
        if step == 0 and rank == 0:
            show.batch_sheet(batch, parts[0].class_names, Path(folder) / "first_batch.png")
        runs.note_bad(folder, batch["bad"], quarantine)
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # for stochastic depth
        lr = lr_at(step, steps, scaled_lr(c), min(c["warmup"], steps // 10), c["warmup_from"], c["drops"])
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        matched, classes, positives = assign(batch, anchors)
        per_image, objective = [], torch.zeros((), device=device)
        for k, rows in enumerate(torch.arange(len(matched), device=device).chunk(c["accumulate"])):
            part = batch["part"][rows]
            with ddp.no_sync() if ranks > 1 and k < c["accumulate"] - 1 else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits, deltas = forward(evaluation.normalise(batch["images"][rows], device))  # (B, A, K), (B, A, 4)
                each = losses_of(logits, deltas, anchors, batch["boxes"][rows], matched[rows], classes[rows], part,
                                 positives)
                human, pseudo = each[part == 0].sum(), each[part == 1].sum()
                loss = human if len(parts) == 1 else ops.joint_loss(human, pseudo, averages, c["alpha"])
                (loss * ranks).backward()  # DDP averages gradients, but the loss is already a sum over processes
            per_image.append(each.detach())
            objective += loss.detach()
        per_image = torch.cat(per_image)
        total = torch.zeros(2, 2, device=device).index_add(0, batch["part"], per_image).flatten()
        notes = torch.tensor([float(stop.asked), float(len(quarantine))], device=device)
        total = util.all_sum(torch.cat([total, objective[None], notes]))
        cls_h, box_h, cls_p, box_p, joint, stopping, unusable = total.tolist()  # waits for the device
        if not math.isfinite(cls_h + box_h + cls_p + box_p):
            runs.fail_nonfinite(folder, step, batch, per_image, rank)
        unusable /= ranks  # each process meets most of them sooner or later
        if unusable > max(20, sum(map(len, parts)) // 100):
            raise UserError(f"{math.ceil(unusable)} unusable images (limit: 1%, at least 20), listed in {folder}/quarantine.txt; "
                            "run python data.py check on the annotation file")
        if c["clip"]:
            torch.nn.utils.clip_grad_norm_(net.parameters(), c["clip"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages = ops.update_averages(averages, total[0:2].sum().cpu(), total[2:4].sum().cpu())
        meter.step(step + 1, lr, joint, cls_h, box_h, cls_p, box_p, averages, len(parts))
        last = step + 1 == steps or stopping
        if rank == 0 and (last or (step + 1) % (c["save_every"] or max(1, steps // 10)) == 0):
            runs.save_checkpoint(folder, {
                "model": net.state_dict(), "optimizer": optimizer.state_dict(), "averages": averages, "step": step + 1,
                "samples": (step + 1) * sum(counts), "config": c, "role": Path(folder).name,
                "class_ids": parts[0].class_ids, "class_names": parts[0].class_names,
                "boxes_per_image": len(parts[0].boxes) / len(parts[0])})
        if stopping:
            log.say(f"SIGTERM: saved {folder} at step {step + 1}; the same command resumes")
            raise SystemExit(143)
    for buffer in net.buffers() if ranks > 1 else ():  # batch-norm averages: those of rank 0 are what is saved
        torch.distributed.broadcast(buffer, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pseudo_label(folder, net, paths, floor, c, run, log):
    """Detects on the images `paths` and appends what scores above floor to folder/part_*.jsonl; images done before are
    skipped. The floor lies under the threshold so that the audit can show what the threshold leaves out."""
    rank, ranks, device, dtype = run
    done = util.rank0_first(lambda: data.finished_images(folder, len(paths), floor))
    todo = [i for i in range(rank, len(paths), ranks) if not done[i]]
    began, anchors = time.time(), anchors_for(c, device)
    with open(Path(folder) / f"part_{rank}_of_{ranks}.jsonl", "a", buffering=1) as part:
        for n, (i, d) in enumerate(evaluation.detections(net, anchors, paths, todo, c["image_size"], device, dtype,
                                                         c["workers"], floor)):
            row = {"i": i, "file": os.fsdecode(bytes(paths[i]))}
            if "bad" not in d:
                xywh = np.concatenate([d["boxes"][:, :2], d["boxes"][:, 2:] - d["boxes"][:, :2]], 1)
                row.update(size=d["size"], boxes=xywh.astype(float).round(4).tolist(), labels=d["labels"].tolist(),
                           scores=d["scores"].astype(float).round(5).tolist())
            part.write(json.dumps({**row, **({"bad": d["bad"]} if "bad" in d else {})}) + "\n")
            if (n + 1) % 200 == 0:
                log.progress("pseudo", n + 1, len(todo), began, 0, images_s=(n + 1) / (time.time() - began))
    if ranks > 1:
        torch.distributed.barrier()


# ---- what the algorithm is made of -------------------------------------------------------------------------------

def build(c, classes):
    """The network of settings c, on the CPU, weights drawn from c["seed"]. A backbone that starts from given weights
    stays trainable, batch norm included, as in the paper."""
    torch.manual_seed(c["seed"])
    norm, backbone_norm = {"frozen": ("bn", "frozen"), "torchvision": ("none", "frozen")}.get(c["norm"], (c["norm"], c["norm"]))
    net = models.RetinaNet(c["backbone"], classes, c["levels"], c["width"], c["depth"], norm=norm, backbone_norm=backbone_norm,
                           act=c["act"])
    for name, module in net.named_modules():  # EfficientNet keeps its own momentum, as in the TPU code
        if isinstance(module, torch.nn.BatchNorm2d) and not (name.startswith("backbone.") and "efficientnet" in c["backbone"]):
            module.momentum = c["momentum"]
    if c["gradient_checkpointing"]:
        backbones.recompute(net, (*backbones.BLOCKS, models.Tower))
    return net.to(memory_format=torch.channels_last)


def initialise(backbone, source):
    try:
        if source == "imagenet":
            util.rank0_first(lambda: backbones.imagenet_file(backbone.name) and None)  # fetched once, not by every process
        return backbones.load_backbone(backbone, source)
    except ValueError as error:
        raise UserError(f"--init {source}: {error}")


def check_trainable(net, c):
    """What trains is decided by the init: everything; or with --norm frozen, which wants given weights, everything but the
    backbone's batch norms. A network from scratch with frozen norms or a frozen stem never learns."""
    frozen = [m for m in net.modules() if isinstance(m, backbones.FrozenBatchNorm2d)]
    assert all(p.requires_grad for p in net.parameters()) and bool(frozen) == (c["norm"] == "frozen")
    assert not frozen or c["init"] != "random"
    assert not frozen or not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.backbone.modules())


def read_checkpoint(path):
    """A checkpoint of ours (file, or the newest in a stage's folder), or torchvision's COCO detector as one."""
    if not os.path.exists(path):
        raise UserError(f"--ckpt {path} does not exist; give a step_*.pt file, the folder that holds it, or torchvision's "
                        "retinanet_resnet50_fpn weights")
    if os.path.isdir(path):
        return runs.load_checkpoint(path)
    try:
        state = backbones.read_file(os.fspath(path))
        theirs = state.get("model", state) if isinstance(state, dict) and "class_ids" not in state else None
        if isinstance(theirs, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in theirs.items()) \
                and any(k.startswith("head.") for k in theirs):  # bare, or as torchvision's training script saves it
            return models.coco_teacher(theirs, path)
    except ValueError as error:
        raise UserError(f"--ckpt: {error}")
    if not isinstance(state, dict) or not {"class_ids", "class_names", "model", "config", "step"} <= state.keys():
        raise UserError(f"--ckpt {path} is neither a checkpoint of st.py nor torchvision's retinanet_resnet50_fpn weights; give "
                        "a step_*.pt file, the folder that holds it, or those weights")
    return state


def restored(state, c, path):
    """The network of a checkpoint."""
    try:
        net = build(c, len(state["class_ids"]))
        net.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the network its settings describe ({str(error).splitlines()[0][:80]}); it is "
                        "damaged, or was written by another version")
    return net


def anchors_for(c, device):
    """(A, 4) for the recipe's canvas; None for torchvision's detector, whose canvas follows the image."""
    if c["image_size"] is None:
        return None
    return ops.make_anchors(c["image_size"], c["image_size"], c["levels"], c["anchor_base"], device=device)


def scaled_lr(c):
    """lr is given for ref_batch human images a step. The student's pseudo half does not count: the paper keeps the
    teacher's lr (recalled)."""
    ratio = c["batch"] / c["ref_batch"]
    return c["lr"] * (ratio if c["optimizer"] == "sgd" else math.sqrt(ratio))


def make_optimizer(net, c):
    groups = models.weight_decay_groups(net, c["weight_decay"])
    if c["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.0)


def distribute(net, device, ranks):
    if ranks == 1:
        return net
    if device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)


def compiled(net, device):
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))  # fails here, not in the middle of the first step
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"--compile: this machine cannot compile ({reason}); install a C++ compiler, or leave the flag out")
    return torch.compile(net)


class Meter:
    """Times the loader and writes the progress line: raw losses of this step, their averages, speed, ETA."""

    def __init__(self, log, stage, start, steps, images):
        self.log, self.stage, self.start, self.steps, self.images = log, stage, start, steps, images
        self.began, self.waited = time.time(), 0.0

    def timed(self, loader):
        loader = iter(loader)
        while True:
            clock = time.time()
            batch = next(loader, None)
            self.waited += time.time() - clock
            if batch is None:
                return
            yield batch

    def step(self, step, lr, joint, cls_h, box_h, cls_p, box_p, averages, parts):
        if step > 10 and step % 20 and step != self.steps:
            return
        spent, (avg_h, avg_p) = time.time() - self.began, ops.average_losses(averages)
        pseudo = {"cls_pseudo": cls_p, "box_pseudo": box_p, "avg": float(avg_h), "avg_pseudo": float(avg_p),
                  "ratio": float(avg_h / avg_p.clamp(min=1e-6))} if parts > 1 else {"avg": float(avg_h)}
        self.log.progress(self.stage, step, self.steps, self.began, self.start, loss=joint, cls=cls_h, box=box_h, **pseudo,
                          lr=lr, images_s=(step - self.start) * self.images / spent, waiting=self.waited / spent)


# ---- stages ------------------------------------------------------------------------------------------------------

def trained(folder, parts, start_from, c, deps, val, run, log):
    """A training stage: train, score on the validation set, remember -> {"AP": ..., "seconds", "weights": hash}.

    deps: all it depends on, among them "steps" and "images_per_step" (one number per part).
    """
    if result := util.rank0_first(lambda: runs.stage(folder, deps)):
        log.say(f"{folder}: finished before, AP {result['AP']:.3f}")
        return result
    steps, counts = deps["steps"], deps["images_per_step"]
    rank, ranks, device, dtype = run
    net = build(c, len(val.class_ids))
    if start_from:
        net.load_state_dict(runs.load_checkpoint(start_from)["model"])
    elif c["init"] != "random":
        log.say(initialise(net.backbone, c["init"]))
    check_trainable(net, c)
    net.to(device)
    log.say(f"{folder}: {steps} steps of {' + '.join(map(str, counts))} images in {c['accumulate']} pieces on {ranks} "
            f"processes, {c['optimizer']} lr {scaled_lr(c):.4g} (given {c['lr']:g} at batch {c['ref_batch']}), "
            f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}M parameters, {str(dtype)[6:]} on {device}")
    if ranks > 1 and device.type == "cpu" and c["norm"] == "bn":
        log.say("note: on CPU, batch norm sees one process's images only; --norm gn gives what one process would")
    began = time.time()
    train(folder, net, parts, counts, steps, c, run, log)
    metrics = evaluation.evaluate(net, anchors_for(c, device), val, c["image_size"], c["workers"], run, log)
    result = {**metrics, "seconds": round(time.time() - began, 1), "weights": runs.digest_weights(net.state_dict())}
    log.say(f"{folder}: AP {result['AP']:.3f} AP50 {result['AP50']:.3f} on {len(val)} validation images "
            f"({result['seconds']:.0f} s)")
    return util.rank0_first(lambda: runs.finish(folder, deps, result))


def labelled_by(folder, teacher, c, paths, held, boxes_per_image, class_share, deps, run, log):
    """The pseudo-label stage: choose the threshold, label, count -> {"threshold", "images", "with_boxes", "boxes", ...}.

    boxes_per_image, class_share {name: share}: of the labelled set, to see what is kept of which. deps leave the
    threshold out, since choosing another one costs no new detection.
    """
    asked, (rank, ranks, device, dtype) = c["threshold"], run
    floor = FLOOR if asked == "auto" else min(FLOOR, float(asked))
    result = util.rank0_first(lambda: runs.stage(folder, deps))
    if result and result["asked"] == asked:
        return result
    state = read_checkpoint(teacher)
    net = restored(state, c, teacher).to(device)
    curve = []
    if len(held):
        found = evaluation.detect_all(net, anchors_for(c, device), held, c["image_size"], device, dtype, c["workers"])
        curve = evaluation.precision_recall(*evaluation.match_detections(found, held), evaluation.THRESHOLDS)
    best = evaluation.best_threshold(curve)
    if asked == "auto" and best is None:
        raise UserError(f"{teacher} finds none of the objects of the {len(held)} held-out images, so there is no threshold to "
                        "choose; train it longer, or raise --labeled")
    threshold = best if asked == "auto" else float(asked)
    util.rank0_first(lambda: runs.write_json(Path(folder) / "stage.json", {"deps": deps}))  # no longer what it was
    pseudo_label(folder, net, paths, floor, c, run, log)
    info = {"teacher": str(teacher), "teacher_weights": runs.digest_weights(state["model"]), "teacher_step": state["step"],
            "classes": state["class_names"]}
    result = util.rank0_first(lambda: {"asked": asked, "threshold": threshold, "held_out": curve, **data.merge_pseudo(
        folder, Path(folder) / "pseudo.json", threshold, state["class_ids"], state["class_names"], info)})
    kept = result["boxes"] / max(result["images"], 1)
    log.say(f"{folder}: threshold {threshold:.2f} ({asked}) keeps {result['boxes']} boxes, {kept:.2f} an image (labelled "
            f"images have {boxes_per_image:.2f}); {1 - result['with_boxes'] / max(result['images'], 1):.0%} of "
            f"{result['images']} images keep none and are left out; {result['bad']} unusable images")
    often = sorted(result["per_class"].items(), key=lambda row: -row[1])
    log.say("  share per class, labelled share in brackets: " + ", ".join(
        f"{k} {v / max(result['boxes'], 1):.0%}" + (f" ({class_share[k]:.0%})" if class_share else "") for k, v in often[:20])
        + (f", {len(often) - 20} rarer classes" if len(often) > 20 else ""))
    if kept < 0.02 * boxes_per_image or not result["boxes"]:
        raise UserError(f"{folder} is (almost) empty: {result['boxes']} boxes on {result['images']} images at threshold "
                        f"{threshold:.2f}. The teacher is too weak: train it longer, or "
                        + ("raise --labeled" if asked == "auto" else "lower --threshold"))
    return util.rank0_first(lambda: runs.finish(folder, deps, result))


# ---- the pipeline ------------------------------------------------------------------------------------------------

def main(argv=None):
    flags = util.parse_flags(Config, __doc__, HELP, argv)
    rank, ranks, device, flags.workers = util.setup(flags.device, flags.workers)
    run = (rank, ranks, device, util.precision(flags.precision, device))
    if flags.mode in ("pseudo", "eval"):
        return use_checkpoint(flags, run)
    c, out = recipes.settings(flags, ranks), Path(flags.out)
    if flags.dry_run:
        with torch.device("meta"):
            net = build(c, 80)
        if rank == 0:
            print(recipes.dry_run(net, flags, c, 80, ranks, run[3], scaled_lr(c)))
        return
    util.rank0_first(lambda: runs.claim(out))
    log = util.Log(out / "log.jsonl", rank)

    train_json, train_dir, val_json, val_dir = util.rank0_first(lambda: locate(flags))
    train_set = data.load_coco(train_json, train_dir)
    val = data.load_coco(val_json, val_dir, train_set.class_ids, train_set.class_names)
    split = data.read_split(flags.split, train_json) if flags.split else data.make_split(
        train_json, train_set.ids, flags.labeled, flags.seed)
    human, held, rest = data.apply_split(split, train_set, hold_out=c["threshold"] == "auto")
    paths = util.rank0_first(lambda: unlabelled_paths(flags, human, held, rest, val, log)) if flags.mode == "run" else []
    if rank == 0 and not (out / "config.json").exists():  # a command that is refused further on leaves no trace
        runs.write_json(out / "config.json", {"command": sys.argv, **asdict(flags), **c})
        runs.write_json(out / "split.json", split)
    log.say(f"{out}: {len(human)} labelled images to train on, {len(held)} held out, {len(paths)} unlabelled, {len(val)} "
            f"for validation; classes {', '.join(train_set.class_names)}")
    for found in (train_set, val):
        for reason, n in found.dropped.items():
            log.say(f"warning: {n} boxes of {found.annotation_file} dropped: {reason}")
    results = pipeline(flags, c, out, human, held, paths, val, {
        "annotations": split["annotations_sha256"], "validation": data.file_digest(val_json),
        "split": runs.digest(split["labeled"]), "held_out": len(held)}, run, log)
    if rank == 0:
        runs.write_json(out / "config.json", {"command": sys.argv, **asdict(flags), **c})
        runs.write_json(out / "split.json", split)
        runs.write_json(out / "results.json", {**results, "command": " ".join(sys.argv), "seed": flags.seed})
        show.report(out)
        print(table(results), f"written: {out}/results.json, {out}/report.html", sep="\n")


def pipeline(flags, c, out, human, held, paths, val, data_deps, run, log):
    """Teacher, pseudo-labels, student, for as many rounds as asked -> {stage: result}."""
    # What a stage depends on. How fast images are read, how often is saved and what cuts a step into pieces do not
    # matter, unless a batch norm sees the pieces or stochastic depth is drawn for each.
    free = ["workers", "save_every", "steps", "student_steps", "alpha", "threshold", "student_aug",
            "gradient_checkpointing"] + ["accumulate"] * (c["norm"] == "gn" and c["backbone"] in backbones.RESNETS)
    same = {**{k: v for k, v in c.items() if k not in free}, **data_deps, "precision": str(run[3])}
    if c["init"] not in ("random", "imagenet"):
        simclr, path = backbones.split_source(c["init"])
        same["init"] = "simclr:" * simclr + data.file_digest(path)
    results = {"teacher": trained(out / "teacher", [human], "", c, {
        **same, "steps": c["steps"], "images_per_step": [c["batch"]]}, val, run, log)}
    teacher, control = "teacher", "teacher"
    counts = np.bincount(human.labels, minlength=len(human.class_names)) / max(len(human.labels), 1)
    class_share = dict(zip(human.class_names, counts.tolist()))
    for k in range(flags.rounds if flags.mode == "run" else 0):
        suffix = "" if k == 0 else str(k + 1)
        source = {"teacher": results[teacher]["weights"], "unlabeled": hashlib.sha256(paths.tobytes()).hexdigest()}
        labels = labelled_by(out / f"pseudo{suffix}", out / teacher, c, paths, held, len(human.boxes) / len(human),
                             class_share, {**source, "image_size": c["image_size"], "precision": str(run[3])}, run, log)
        pseudo = data.load_coco(out / f"pseudo{suffix}/pseudo.json", labels["root"], human.class_ids)
        c_student = {**c, "aug": c["student_aug"]}
        after = {**same, "aug": c["student_aug"], "steps": c["student_steps"], "student_init": flags.student_init}
        start, start_control = (out / teacher, out / control) if flags.student_init == "teacher" else ("", "")
        results[f"student{suffix}"] = trained(out / f"student{suffix}", [human, pseudo], start, c_student, {
            **after, **source, "threshold": labels["threshold"], "alpha": c["alpha"],
            "images_per_step": [c["batch"], c["batch"]]}, val, run, log)
        if flags.control:  # as many steps and images per step, but no pseudo-label ever
            results[f"control{suffix}"] = trained(out / f"control{suffix}", [human], start_control, c_student, {
                **after, "teacher": results[control]["weights"], "images_per_step": [2 * c["batch"]]}, val, run, log)
        teacher, control = f"student{suffix}", f"control{suffix}"
    return results


def table(results):
    rows = [f"{'':10s}" + "".join(f"{m:>8s}" for m in ("AP", "AP50", "AP75", "AR100"))]
    for name, r in results.items():
        rows.append(f"{name:10s}" + "".join(f"{r[m]:8.3f}" for m in ("AP", "AP50", "AP75", "AR100")))
    return "\n".join(rows)


def locate(flags):
    if flags.data == "coco":
        return data.coco_layout(flags.root)
    try:
        return data.coco_layout(world.build(flags.root, "det"))
    except FileExistsError as error:
        raise UserError(f"{error}; give another --root for the embedded world")


def unlabelled_paths(flags, human, held, rest, val, log):
    """Paths of the unlabelled images (n,): --unlabeled, else the training images whose labels are not used, else the
    embedded world's own unlabelled set. Labelled and validation images among them are left out."""
    if flags.unlabeled:
        paths = data.list_images(flags.unlabeled)
    elif len(rest):
        paths = np.array([os.fsencode(os.path.abspath(rest.path(i))) for i in range(len(rest))], dtype=np.bytes_)
    elif flags.data == "shapes":
        paths = data.list_images(str(world.build(flags.root, "unlabeled")))
    else:
        raise UserError("--labeled 1 leaves no image to pseudo-label; give --unlabeled DIR, or --mode train to stop after "
                        "the teacher")
    paths, leaks = data.without_leaks(paths, human, held, val)
    if leaks:
        log.say(f"warning: {leaks} unlabelled images are labelled or validation images; left out")
    if not len(paths):
        raise UserError("every unlabelled image is also a labelled or a validation image; give other images by --unlabeled")
    _, leaks = data.without_leaks(np.array([os.fsencode(human.path(i)) for i in range(len(human))], dtype=np.bytes_), val)
    if leaks:
        log.say(f"warning: {leaks} labelled images are also validation images; scores will be too high")
    return paths


def use_checkpoint(flags, run):
    """--mode pseudo: labels a folder of images with --ckpt. --mode eval: scores --ckpt on the validation set."""
    ignored = [f for f in ("backbone", "image_size", "aug", "batch", "steps", "student_steps", "lr", "optimizer")
               if getattr(flags, f) is not None] + ["dry_run"] * flags.dry_run
    if ignored:
        raise UserError(f"--mode {flags.mode} takes the network and its settings from --ckpt; leave out "
                        + ", ".join("--" + f.replace("_", "-") for f in ignored))
    if not flags.ckpt:
        raise UserError(f"--mode {flags.mode} needs --ckpt, a checkpoint file or a stage folder such as runs/x/student")
    state = read_checkpoint(flags.ckpt)
    c = {**state["config"], "workers": flags.workers, "gradient_checkpointing": False}
    if flags.mode == "eval":
        net, log = restored(state, c, flags.ckpt), util.Log(None, run[0])
        _, _, val_json, val_dir = util.rank0_first(lambda: locate(flags))
        val = data.load_coco(val_json, val_dir, state["class_ids"], state["class_names"])
        metrics = evaluation.evaluate(net.to(run[2]), anchors_for(c, run[2]), val, c["image_size"], c["workers"], run, log)
        log.say(f"{state['role']} after {state['step']} steps, {flags.ckpt}, on {val_json}\n{json.dumps(metrics, indent=1)}")
        return
    out, threshold = Path(flags.out), flags.threshold or "0.5"  # the paper's (recalled)
    if not flags.unlabeled:
        raise UserError("--mode pseudo needs --unlabeled: a folder, glob, .txt list or COCO json of images")
    if not recipes.is_score(threshold):
        raise UserError(f"--threshold {threshold} is not a number between 0 and 1; the report of the run that trained --ckpt "
                        "shows precision and recall for each")
    if flags.out == Config.out or (out / "config.json").exists():
        raise UserError(f"--mode pseudo needs an --out of its own; {out} is for training runs")
    util.rank0_first(lambda: runs.claim(out))
    log, paths = util.Log(out / "log.jsonl", run[0]), data.list_images(flags.unlabeled)
    deps = {"teacher": runs.digest_weights(state["model"]), "unlabeled": hashlib.sha256(paths.tobytes()).hexdigest(),
            "precision": str(run[3])}
    labelled_by(out, flags.ckpt, {**c, "threshold": threshold}, paths, [], state["boxes_per_image"], {}, deps, run, log)
    log.say(f"written: {out}/pseudo.json")


if __name__ == "__main__":
    util.run(main)
