"""Self-training for object detection and segmentation: teacher -> pseudo-labels -> student (Zoph et al. 2020, "Rethinking
Pre-training and Self-training").

    python st.py                                                    the embedded world, a few minutes on two cores
    python st.py --task seg                                         the same for segmentation (cls: classification)
    python st.py --model rcnn-c4                                    the same with Faster R-CNN, HPT's detector (rcnn.py)
    torchrun --nproc_per_node 8 st.py --data coco --root COCO --labeled 0.2 --aug s4 --recipe coco-r50
    python st.py --mode pseudo --ckpt runs/x/student --unlabeled DIR --out labels     label a folder for use elsewhere
    python st.py --mode pseudo --ckpt retinanet_resnet50_fpn_coco-eeacb38b.pth ...    with torchvision's COCO detector
    python st.py --mode eval   --ckpt runs/x/student --data coco --root COCO          score a checkpoint

1. train a teacher on the labelled images          -> OUT/teacher/
2. keep its confident answers on unlabelled images -> OUT/pseudo/pseudo.json (COCO with scores; masks; classes)
3. train a student on both, with the joint loss    -> OUT/student/
and score both on the validation set               -> OUT/results.json, OUT/report.html
Running the same command again resumes where it stopped, bit for bit on CPU. What differs between the tasks is in detect.py,
segment.py and classify.py, function by function.
"""
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import backbones
import classify
import data
import detect
import eval as evaluation
import models
import ops
import recipes
import runs
import segment
import show
import util
import voc
from recipes import HELP, Config
from util import UserError


TASKS = {"det": detect, "seg": segment, "cls": classify}


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


def train(folder, net, parts, counts, steps, c, val, run, log):
    """Trains net for `steps` steps, resuming from the newest checkpoint in `folder` and leaving its own there.

    parts: data sets in the order of data.PARTS; counts: images of each in a step, over all processes, 0 for those not used.
    -> scores on val on the way, every c["eval_every"] steps but the last: [[step, metric], ...]; when it would have begun had
    it never been interrupted.
    """
    (rank, ranks, device, dtype), task = run, TASKS[c["task"]]
    prepare, losses = task.criterion(c, device)
    used, names = [k for k, count in enumerate(counts) if count], task.TERMS + ["class"] * (len(counts) > 2)
    if joint := len(counts) > 2:
        prepare, losses = classify.joined(prepare, losses)
    inputs = ("part",) if joint else getattr(net, "inputs", ())  # of a batch, that the network needs besides the images
    optimizer, averages, start, curve, began = make_optimizer(net, c), torch.zeros(len(used) + 1).double(), 0, [], time.time()
    if state := runs.load_latest(folder):
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averages, start, curve, began = state["averages"], state["step"], state.get("curve", []), began - state.get("spent", 0)
    ddp, seed = distribute(models.Joint(net) if joint else net, device, ranks), stage_seed(c["seed"], Path(folder).name)
    forward = compiled(ddp, device) if c["compile"] else ddp
    loader = data.train_loader(parts, counts, start, steps, c["accumulate"], rank, ranks, c["aug"], c["image_size"], seed,
                               c["workers"])
    stop, meter, quarantine = runs.Stop(), Meter(log, Path(folder).name, start, steps, sum(counts), names), set()
    net.train()
    for step, batch in zip(range(start, steps), meter.timed(loader)):
        if step == 0 and rank == 0:
            show.batch_sheet(batch, parts[0].class_names, Path(folder) / "first_batch.png")
        runs.note_bad(folder, batch["bad"], quarantine)
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # for stochastic depth
        lr = lr_at(step, steps, scaled_lr(c), min(c["warmup"], steps // 10), c["warmup_from"], c["drops"])
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        targets, normaliser = prepare(batch)  # {name: (B, ...)}, (3,) what the losses of each part are divided by
        per_image, objective = [], torch.zeros((), device=device)
        for k, rows in enumerate(torch.arange(len(batch["part"]), device=device).chunk(c["accumulate"])):
            part = batch["part"][rows]
            with ddp.no_sync() if ranks > 1 and k < c["accumulate"] - 1 else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    outputs = forward(evaluation.normalise(batch["images"][rows], device), *[batch[k][rows] for k in inputs])
                each = losses(outputs, {name: v[rows] for name, v in targets.items()}, part, normaliser)  # (B, terms)
                loss = combined([each[part == k].sum() for k in used], averages, c, joint)
                (loss * ranks).backward()  # DDP averages gradients, but the loss is already a sum over processes
            per_image.append(each.detach())
            objective += loss.detach()
        per_image = torch.cat(per_image)
        total = torch.zeros(len(data.PARTS), len(names), device=device).index_add(0, batch["part"], per_image)[used].flatten()
        notes = torch.tensor([float(stop.asked), float(len(quarantine))], device=device)
        total = util.all_sum(torch.cat([total, objective[None], notes]))
        *terms, objective, stopping, unusable = total.tolist()  # waits for the device
        if not math.isfinite(sum(terms)):
            runs.fail_nonfinite(folder, step, batch, per_image, rank)
        terms = [terms[i:i + len(names)] for i in range(0, len(terms), len(names))]  # of each used part
        unusable /= ranks  # each process meets most of them sooner or later
        if unusable > max(20, sum(map(len, parts)) // 100):
            raise UserError(f"{math.ceil(unusable)} unusable images (limit: 1%, at least 20), listed in {folder}/quarantine.txt; "
                            f"run {task.CHECK} on the data")
        if c["clip"]:
            torch.nn.utils.clip_grad_norm_(net.parameters(), c["clip"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if all(map(sum, terms)):  # a part without a single label says nothing about its usual loss
            averages = ops.update_averages(averages, torch.tensor([sum(some) for some in terms]))
        meter.step(step + 1, lr, objective, dict(zip([data.PARTS[k] for k in used], terms)), averages)
        if c["eval_every"] and (step + 1) % c["eval_every"] == 0 and step + 1 < steps:
            share_buffers(net, ranks)
            curve.append([step + 1, task.evaluate(net, c, val, run, log)[task.METRICS[0]]])
            net.train()
        last = step + 1 == steps or stopping
        if rank == 0 and (last or (step + 1) % (c["save_every"] or max(1, steps // 10)) == 0):
            runs.save_checkpoint(folder, {
                "model": net.state_dict(), "optimizer": optimizer.state_dict(), "averages": averages, "curve": curve,
                "spent": time.time() - began, "step": step + 1, "samples": (step + 1) * sum(counts), "config": c,
                "role": Path(folder).name, "class_ids": parts[0].class_ids, "class_names": parts[0].class_names,
                **task.about(parts[0])})
        if stopping:
            log.say(f"SIGTERM: saved {folder} at step {step + 1}; the same command resumes")
            raise SystemExit(143)
    share_buffers(net, ranks)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return curve, began


def combined(sums, averages, c, joint):
    """Loss of a step from the sums of its used parts. Classification joins, in equal parts, what human and pseudo-labels make:
    so it weighs the same with and without pseudo-labels, in student and control (how the paper does both is unknown)."""
    n, normalise = len(sums) - joint, c["loss_norm"] == "on"
    loss = ops.joint_loss(sums[:n], averages[[*range(n), -1]], c["alpha"], normalise)
    return ops.joint_loss([loss, sums[-1]], averages[[0, -2, -1]], 1.0, normalise) if joint else loss


# ---- what the algorithm is made of -------------------------------------------------------------------------------

def build(c, classes):
    """The network of settings c, on the CPU, weights drawn from c["seed"]. A backbone that starts from given weights
    stays trainable, batch norm included, as in the paper."""
    torch.manual_seed(c["seed"])
    norm, backbone_norm = {"frozen": ("bn", "frozen"), "torchvision": ("none", "frozen")}.get(c["norm"], (c["norm"], c["norm"]))
    net = TASKS[c["task"]].network(c, classes, norm, backbone_norm)
    if "joint_classes" in c:
        net.joint = torch.nn.Linear(net.backbone.channels[5], c["joint_classes"])
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


def share_buffers(net, ranks):
    """Batch-norm averages: those of rank 0 are what is saved, and what every process scores."""
    for buffer in net.buffers() if ranks > 1 else ():
        torch.distributed.broadcast(buffer, 0)


def compiled(net, device):
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))  # fails here, not in the middle of the first step
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"--compile: this machine cannot compile ({reason}); install a C++ compiler, or leave the flag out")
    return torch.compile(net)


class Meter:
    """Times the loader and writes the progress line: raw losses of this step, their averages, speed, ETA."""

    def __init__(self, log, stage, start, steps, images, terms):
        self.log, self.stage, self.start, self.steps, self.images, self.terms = log, stage, start, steps, images, terms
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

    def step(self, step, lr, objective, terms, averages):
        """terms: {part: value of each loss term}."""
        if step > 10 and step % 20 and step != self.steps:
            return
        spent, means, values = time.time() - self.began, ops.average_losses(averages).tolist(), {"loss": objective}
        for (part, row), mean in zip(terms.items(), means):
            end = "" if part == "human" else f"_{part}"
            values.update({f"{name}{end}": v for name, v in zip(self.terms, row) if (name == "class") == (part == "joint")})
            values[f"avg{end}"] = mean
            if end:
                values["ratio" + end.replace("_pseudo", "")] = means[0] / max(mean, 1e-6)
        self.log.progress(self.stage, step, self.steps, self.began, self.start, **values, lr=lr,
                          images_s=(step - self.start) * self.images / spent, waiting=self.waited / spent)


# ---- stages ------------------------------------------------------------------------------------------------------

def trained(folder, parts, start_from, c, deps, val, run, log):
    """A training stage: train, score on the validation set, remember -> {metric: ..., "seconds", "weights": hash}.

    deps: all it depends on, among them "steps" and "images_per_step" (one number per part).
    """
    task = TASKS[c["task"]]
    if result := util.rank0_first(lambda: runs.stage(folder, deps)):
        log.say(f"{folder}: finished before, {task.METRICS[0]} {result[task.METRICS[0]]:.3f}")
        return result
    steps, counts = deps["steps"], deps["images_per_step"]
    _, ranks, device, dtype = run
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
    curve, began = train(folder, net, parts, counts, steps, c, val, run, log)
    metrics = task.evaluate(net, c, val, run, log)
    curve.append([steps, metrics[task.METRICS[0]]])
    result = {**metrics, "curve": curve, "seconds": round(time.time() - began, 1),
              "weights": runs.digest_weights(net.state_dict())}
    log.say(f"{folder}: " + " ".join(f"{m} {result[m]:.3f}" for m in task.METRICS[:2]) + f" on {len(val)} validation images "
            f"({result['seconds']:.0f} s)")
    return util.rank0_first(lambda: runs.finish(folder, deps, result))


def labelled_by(folder, teacher, c, paths, held, labelled, deps, run, log):
    """The pseudo-label stage: teacher's answers on `paths` into folder/pseudo.json -> {"asked", "threshold", "images", ...}.

    held, labelled: see detect.label. deps leave the threshold out, but for masks: choosing another one costs no new prediction.
    """
    result = util.rank0_first(lambda: runs.stage(folder, deps))
    if result and result["asked"] == c["threshold"]:
        return result
    state, task = {**read_checkpoint(teacher), "path": str(teacher)}, TASKS[c["task"]]
    net = restored(state, c, teacher)
    util.rank0_first(lambda: runs.write_json(Path(folder) / "stage.json", {"deps": deps}))  # no longer what it was
    result = task.label(folder, net.to(run[2]), state, paths, held, labelled, c, run, log)
    return util.rank0_first(lambda: runs.finish(folder, deps, {"asked": c["threshold"], **result}))


# ---- the pipeline ------------------------------------------------------------------------------------------------

def main(argv=None):
    flags = util.parse_flags(Config, __doc__, HELP, argv)
    rank, ranks, device, flags.workers = util.setup(flags.device, flags.workers)
    run = (rank, ranks, device, util.precision(flags.precision, device))
    if flags.mode in ("pseudo", "eval"):
        return use_checkpoint(flags, run)
    c, out = recipes.settings(flags, ranks), Path(flags.out)
    if flags.dry_run:
        classes = recipes.CLASSES[c["task"]]
        with torch.device("meta"):
            net = build(c, classes)
        if rank == 0:
            print(recipes.dry_run(net, flags, c, classes, ranks, run[3], scaled_lr(c)))
        return
    util.rank0_first(lambda: runs.claim(out))
    log = util.Log(out / "log.jsonl", rank)

    task = TASKS[c["task"]]
    train_set, val = task.load(flags)
    split = data.read_split(flags.split, train_set.annotation_file) if flags.split else data.make_split(
        train_set.annotation_file, train_set.ids, flags.labeled, flags.seed)
    human, held, rest = data.apply_split(split, train_set, hold_out=c["threshold"] == "auto")
    paths = util.rank0_first(lambda: unlabelled_paths(flags, human, held, rest, val, log)) if flags.mode == "run" else []
    joint = classify.load_folder(util.rank0_first(lambda: joint_root(flags)), "train") if flags.joint else []
    if flags.joint:
        c["joint_classes"] = len(joint.class_names)
        log.say(f"joint training with {len(joint)} images of {c['joint_classes']} classes in {joint.root}")
    if rank == 0 and not (out / "config.json").exists():  # a command that is refused further on leaves no trace
        runs.write_json(out / "config.json", {"command": sys.argv, **asdict(flags), **c})
        runs.write_json(out / "split.json", split)
    log.say(f"{out}: {len(human)} labelled images to train on, {len(held)} held out, {len(paths)} unlabelled, {len(val)} "
            f"for validation; classes {', '.join(train_set.class_names[:100])}")
    for found in (train_set, val):
        for reason, n in found.dropped.items():
            log.say(f"warning: {n} boxes of {found.annotation_file} dropped: {reason}")
    results = pipeline(flags, c, out, human, held, joint, paths, val, {
        "annotations": split["annotations_sha256"], "validation": data.file_digest(val.annotation_file),
        "split": runs.digest(split["labeled"]), "held_out": len(held),
        **({"classified": data.file_digest(joint.root), "loss_norm": c["loss_norm"]} if flags.joint else {}),
        **util.rank0_first(lambda: task.data_deps(train_set, val))}, run, log)
    if rank == 0:
        runs.write_json(out / "config.json", {"command": sys.argv, **asdict(flags), **c})
        runs.write_json(out / "split.json", split)
        runs.write_json(out / "results.json", {**results, "command": " ".join(sys.argv), "seed": flags.seed})
        show.report(out)
        print(table(results, task.METRICS), f"written: {out}/results.json, {out}/report.html", sep="\n")


def pipeline(flags, c, out, human, held, joint, paths, val, data_deps, run, log):
    """Teacher, pseudo-labels, student, for as many rounds as asked -> {stage: result}."""
    # What a stage depends on. How fast images are read, how often is saved and what cuts a step into pieces do not
    # matter, unless a batch norm sees the pieces or stochastic depth is drawn for each.
    free = ["workers", "save_every", "eval_every", "steps", "student_steps", "alpha", "loss_norm", "threshold", "student_aug",
            "student_batch", "flip", "soft", "scales", "gradient_checkpointing"]
    free += ["accumulate"] * (c["norm"] == "gn" and c["backbone"] in backbones.RESNETS)
    same = {**{k: v for k, v in c.items() if k not in free}, **data_deps, "precision": str(run[3])}
    if c["init"] not in ("random", "imagenet"):
        simclr, path = backbones.split_source(c["init"])
        same["init"] = "simclr:" * simclr + data.file_digest(path)
    def counts(human, pseudo, classified):  # of the images in a step
        return [human, pseudo, classified] if flags.joint else [human, pseudo][:1 + bool(pseudo)]
    results = {"teacher": trained(out / "teacher", [human, [], joint], "", c, {
        **same, "steps": c["steps"], "images_per_step": counts(c["batch"], 0, c["batch"])}, val, run, log)}
    teacher, control, task = "teacher", "teacher", TASKS[c["task"]]
    for k in range(flags.rounds if flags.mode == "run" else 0):
        suffix = "" if k == 0 else str(k + 1)
        source = {"teacher": results[teacher]["weights"], "unlabeled": hashlib.sha256(paths.tobytes()).hexdigest()}
        source = label_deps(c, source, run)
        labels = labelled_by(out / f"pseudo{suffix}", out / teacher, c, paths, held, human, source, run, log)
        pseudo = task.load_pseudo(out / f"pseudo{suffix}", labels, human)
        c_student = {**c, "aug": c["student_aug"]}
        after = {**same, "aug": c["student_aug"], "steps": c["student_steps"], "student_init": flags.student_init}
        start, start_control = (out / teacher, out / control) if flags.student_init == "teacher" else ("", "")
        n = c["student_batch"]
        results[f"student{suffix}"] = trained(out / f"student{suffix}", [human, pseudo, joint], start, c_student, {
            **after, **source, "threshold": labels["threshold"], "alpha": c["alpha"], "loss_norm": c["loss_norm"],
            "images_per_step": counts(n, n, n)}, val, run, log)
        if flags.control:  # as many steps and images per step, but no pseudo-label ever
            results[f"control{suffix}"] = trained(out / f"control{suffix}", [human, [], joint], start_control, c_student, {
                **after, "teacher": results[control]["weights"], "images_per_step": counts(2 * n, 0, n)}, val, run, log)
        teacher, control = f"student{suffix}", f"control{suffix}"
    return results


def label_deps(c, source, run):
    """What pseudo-labels depend on. A mask holds its threshold and scales; boxes and classes are stored with scores, under
    any threshold."""
    source = {**source, "image_size": c["image_size"], "precision": str(run[3])}
    if c["task"] == "seg":
        source.update(threshold=float(c["threshold"]), flip=c["flip"], soft=c["soft"], scales=recipes.scales(c["scales"]))
    return source


def table(results, metrics):
    rows = [f"{'':10s}" + "".join(f"{m:>10s}" for m in metrics)]
    for name, r in results.items():
        rows.append(f"{name:10s}" + "".join(f"{r[m]:10.3f}" for m in metrics))
    return "\n".join(rows)


def unlabelled_paths(flags, human, held, rest, val, log):
    """Paths of the unlabelled images (n,): --unlabeled, else the embedded world's own for segmentation, else the training images
    whose labels are not used, else the embedded world's own. Labelled and validation images among them are left out."""
    if flags.unlabeled:
        paths = given_images(flags, flags.task)
    elif flags.data == "shapes" and flags.task == "seg":  # where few images have labels to begin with
        paths = voc.images_of(segment.locate(flags), "aug")
    elif len(rest):
        paths = np.array([os.fsencode(os.path.abspath(rest.path(i))) for i in range(len(rest))], dtype=np.bytes_)
    elif flags.data == "shapes":
        paths = data.list_images(str(data.embedded(flags.root, "unlabeled")))
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


def joint_root(flags):
    """The class folders of --joint: DIR with train/CLASS/*.jpg, or the embedded world's single objects."""
    if flags.joint != "shapes":
        return flags.joint
    return classify.locate(replace(flags, data="shapes", root=flags.root if flags.data == "shapes" else Config.root))


def given_images(flags, task):
    """Paths of --unlabeled: the images of a named list of a VOC folder, or whatever data.list_images takes."""
    # the embedded world is drawn only for what can be one of its lists; a folder of that name comes first
    if task == "seg" and (flags.data == "voc" or flags.unlabeled.isidentifier() and not os.path.exists(flags.unlabeled)):
        root = util.rank0_first(lambda: segment.locate(flags))
        if voc.list_file(root, flags.unlabeled).exists():
            return voc.images_of(root, flags.unlabeled)
    return data.list_images(flags.unlabeled)


def use_checkpoint(flags, run):
    """--mode pseudo: labels a folder of images with --ckpt. --mode eval: scores --ckpt on the validation set."""
    ignored = [f for f in ("model", "backbone", "image_size", "aug", "batch", "steps", "student_steps", "lr", "optimizer")
               if getattr(flags, f) is not None] + [f for f in ("dry_run", "joint", "eval_every") if getattr(flags, f)]
    if ignored:
        raise UserError(f"--mode {flags.mode} takes the network and its settings from --ckpt; leave out "
                        + ", ".join("--" + f.replace("_", "-") for f in ignored))
    if not flags.ckpt:
        raise UserError(f"--mode {flags.mode} needs --ckpt, a checkpoint file or a stage folder such as runs/x/student")
    state = read_checkpoint(flags.ckpt)
    c = {"task": "det", **state["config"], "workers": flags.workers, "gradient_checkpointing": False,
         "flip": flags.flip, "soft": flags.soft, "scales": flags.scales}
    recipes.check_data(flags.data, c["task"])
    if flags.mode == "eval":
        net, log, task = restored(state, c, flags.ckpt), util.Log(None, run[0]), TASKS[c["task"]]
        val = task.load_val(flags, state["class_ids"], state["class_names"])
        metrics = task.evaluate(net.to(run[2]), c, val, run, log)
        log.say(f"{state['role']} after {state['step']} steps, {flags.ckpt}, on {val.annotation_file}\n"
                + json.dumps(metrics, indent=1))
        return
    out, threshold = Path(flags.out), flags.threshold or ("0.3" if c["task"] == "cls" else "0.5")  # the papers' (recalled)
    if not flags.unlabeled:
        raise UserError("--mode pseudo needs --unlabeled: a folder, glob, .txt list or COCO json of images")
    if not recipes.is_score(threshold):
        raise UserError(f"--threshold {threshold} is not a number between 0 and 1; for boxes, the report of the run that trained "
                        "--ckpt shows precision and recall for each")
    if flags.out == Config.out or (out / "config.json").exists():
        raise UserError(f"--mode pseudo needs an --out of its own; {out} is for training runs")
    util.rank0_first(lambda: runs.claim(out))
    log, paths = util.Log(out / "log.jsonl", run[0]), given_images(flags, c["task"])
    c["threshold"] = threshold
    deps = label_deps(c, {"teacher": runs.digest_weights(state["model"]),
                          "unlabeled": hashlib.sha256(paths.tobytes()).hexdigest()}, run)
    labelled_by(out, flags.ckpt, c, paths, [], None, deps, run, log)
    log.say(f"written: {out}/pseudo.json")


if __name__ == "__main__":
    util.run(main)
