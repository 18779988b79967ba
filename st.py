"""Self-training (Zoph et al. 2020, "Rethinking Pre-training and Self-training", arXiv 2006.06882):
a teacher learns from labelled images and answers on unlabelled ones; a student learns from both.

    python st.py                                    the embedded world, some minutes on two cores
    python st.py --recipe seg-tiny                  the same for segmentation (cls-tiny: classes)
    torchrun --nproc_per_node 8 st.py --recipe coco-r50 --root COCO --labeled 0.2 --aug s4
    python st.py --teacher runs/x/teacher --pseudo runs/x/pseudo --alpha 2 --out runs/y

OUT/teacher/, OUT/pseudo/ (its answers), OUT/student/ and OUT/control/ are stages: the same command
resumes them, bit for bit on CPU. Scores: OUT/results.json. Pictures: python -m tools.show run OUT.
"""

import dataclasses
import math
import shlex
import sys
from collections import namedtuple
from pathlib import Path

import torch

import answers
import backbones
import data
import eval
import models
import ops
import rcnn
import recipes
import util
from util import flag, need

# A row is a task, a column what is done (and its names); st.py never asks which task it is.
Task = namedtuple("Task", "load targets losses terms answers score metrics root")
# fmt: off
TASKS = {
    "det": Task(
        data.coco, ops.match_anchors, ops.box_losses, ("cls", "box"),
        answers.boxes, eval.ap, ("AP", "AP50", "AP75", "AR100"), "datasets/shapes/det"),
    "rcnn": Task(
        data.coco, rcnn.targets, rcnn.losses, ("cls", "box"),
        answers.boxes, eval.ap, ("AP", "AP50", "AP75", "AR100"), "datasets/shapes/det"),
    "seg": Task(
        data.voc, ops.pixel_targets, ops.pixel_losses, ("ce",),
        answers.masks, eval.mean_iou, ("mIoU", "accuracy"), "datasets/shapes/seg"),
    "cls": Task(
        data.folder, ops.class_targets, ops.class_losses, ("ce",),
        answers.classes, eval.accuracy, ("accuracy", "balanced"), "datasets/shapes/single"),
}
# fmt: on


# ---- the method ----------------------------------------------------------------------------------


def self_train(plan, c, proc):
    """Teacher -> pseudo-labels -> student, plan.rounds times -> {stage: scores}."""
    out = Path(plan.out)
    human, held_out, unlabelled, classified, val = load(plan, c, proc)
    labelled = {"human": (human, c.batch)}  # {part: (Images, how many of them in a step)}
    if classified:
        labelled["classified"] = (classified, c.batch)
    results = {}

    # 1. A teacher, from human labels alone.
    teacher = control = out / "teacher"  # control: the stage that the next control starts from
    if plan.teacher:
        teacher = control = given_teacher(plan.teacher, c, human)
    else:
        results["teacher"] = train(teacher, c, proc, labelled, c.steps, None, val)
    if plan.until == "teacher":
        return results

    # The student is noised like the teacher or more, and sees as many pseudo-labels as labels.
    c_student = dataclasses.replace(c, aug=c.student_aug)
    n = recipes.student_batch(c)
    more = {"classified": (classified, n)} if classified else {}
    for k in range(plan.rounds):
        suffix = str(k + 1) if k else ""

        # 2. Its answers on unlabelled images, without noise; those it is sure of are pseudo-labels.
        #    A pseudo-label is a target dict like a person's. Its scores decide, and weigh nothing.
        store = out / f"pseudo{suffix}"
        if plan.pseudo:
            store = Path(plan.pseudo)
        else:
            label(store, c, proc, teacher, unlabelled, held_out)
        if plan.until == "labels":
            return results
        pseudo, results[f"pseudo{suffix}"] = confident(store, c, human, proc)

        # 3. A student, from both, that starts where its teacher ended.
        student = out / f"student{suffix}"
        parts = {"human": (human, n), "pseudo": (pseudo, n), **more}
        start = teacher if c.student_init == "teacher" else None
        results[student.name] = train(student, c_student, proc, parts, c.student_steps, start, val)

        # 4. The control: the student's steps and images a step, but no pseudo-label ever. In the
        #    first round it starts where the student does, then from the control before it.
        #    student - teacher is longer training; only student - control is self-training.
        if plan.control:
            start = control if c.student_init == "teacher" else None
            control = out / f"control{suffix}"
            parts = {"human": (human, 2 * n), **more}
            results[control.name] = train(
                control, c_student, proc, parts, c.student_steps, start, val
            )
        teacher = student
    return results


def train(folder, c, proc, parts, steps, start, val):
    """A stage: `steps` steps on parts {name: (Images, how many of them in a step)} -> scores on
    val. start: folder of the stage whose weights it starts from, or None. The same call resumes,
    or refuses if it would be another stage."""
    inputs = recipes.training_inputs(c, parts, steps, start, val, proc.dtype)
    if result := proc.first(lambda: util.finished(folder, inputs)):
        return result
    net, about = network(folder, c, proc, parts, start)
    say_plan(folder, net, c, proc, parts, steps)
    notes, seconds = fit(net, folder, about, c, proc, parts, steps, val)
    metrics = score(net, c, val, proc, steps, notes)
    result = {**metrics, **notes, "seconds": round(seconds, 1)}
    result["weights"] = util.digest_weights(net.state_dict())
    shown = " ".join(f"{name} {metrics[name]:.3f}" for name in TASKS[c.task].metrics[:2])
    proc.log.say(f"{folder}: {shown} on {len(val)} validation images ({seconds:.0f} s)")
    return proc.first(lambda: util.finish(folder, inputs, result))


def fit(net, folder, about, c, proc, parts, steps, val):
    """The training loop -> notes of the checkpoint (the curve of scores), seconds."""
    task = TASKS[c.task]
    model, targets_of, losses_of = net, task.targets, task.losses
    if "classified" in parts:  # joint training: one more part, with a head of its own
        model = models.Joint(net)
        targets_of, losses_of = models.joined(task.targets, task.losses)
    inputs = model.inputs  # what it wants besides the images
    P = len(parts)
    joint = ops.JointLoss(P, c.alpha, c.loss_norm == "on").to(proc.device)
    optimizer = make_optimizer(net, c)
    ckpt = util.Checkpoint(folder, proc, about, model=net, optimizer=optimizer, joint=joint)
    model = proc.wrap(model)  # DDP, synchronised batch norm
    seed = stage_seed(c.seed, folder)
    todo = range(ckpt.step, steps)
    images_a_step = sum(count for _, count in parts.values())
    batches = data.batches(parts, todo, c.aug, c.image_size, seed, proc)
    meter = util.Meter(proc.log, folder.name, ckpt.step, steps, images_a_step)
    net.train()
    for step, batch in zip(todo, meter.timed(batches)):
        # for stochastic depth and R-CNN's samples, which differ from process to process
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + proc.rank)
        part = batch["part"]  # (B,) where each image is from
        targets, count = targets_of(batch, net)  # {name: (B, ...)}, (B,) anchors | pixels | images
        # What the loss of an image is divided by: the count of its part in the whole step, so that
        # the pieces of a step, and the processes, add up to one loss.
        count = proc.sum(ops.per_part(count, part, P))[part]  # (B,)
        terms = torch.zeros(len(part), len(task.terms), device=proc.device)  # (B, T)
        for k in range(c.accumulate):
            rows = slice(k, None, c.accumulate)  # every piece holds the same mixture of parts
            wanted = {name: target[rows] for name, target in targets.items()}
            with proc.no_sync(model, last=k == c.accumulate - 1):
                with proc.autocast():
                    pixels = backbones.normalise(batch["images"][rows])
                    outputs = model(pixels, *[wanted[name] for name in inputs])
                losses = losses_of(outputs, wanted, count[rows], net)  # (b, T) float32
                of_parts = ops.per_part(losses, part[rows], P).sum(1)  # (P,) L_h, L_p
                loss = joint(of_parts)  # App. B: (L_h + alpha avg L_h / avg L_p L_p) / (1 + alpha)
                (loss * proc.world).backward()  # DDP averages gradients; these already add up
            terms[rows] = losses.detach()
        losses = proc.sum(ops.per_part(terms, part, P))  # (P, T) of the whole step
        util.assert_finite(losses, terms, batch, folder, step)
        if c.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), c.clip)
        lr = lr_at(step, steps, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if meter.due(step + 1):
            meter.line(step + 1, **readings(losses, joint, parts, task), lr=lr)
        joint.update(losses.double().sum(1).float())  # the averages that the next step goes by
        if c.eval_every and (step + 1) % c.eval_every == 0 and step + 1 < steps:
            score(net, c, val, proc, step + 1, ckpt.notes)
            net.train()
        ckpt.step_done(steps)  # saves now and then; after SIGTERM saves and exits 143
    return ckpt.close()


def label(folder, c, proc, teacher, images, held_out):
    """A stage: the teacher's answers on `images`, without noise, into a store (answers.Answers).
    All above a low floor are kept: another threshold costs no new pass. The same call resumes."""
    net, about = restore(teacher, proc)
    how = recipes.answering(c)
    inputs = {**how, **recipes.labelling_inputs(c, net, images, held_out, proc.dtype)}
    if proc.first(lambda: util.finished(folder, inputs)):
        return
    result = {"images": len(images), "classes": about["class_names"]}
    if c.threshold == "auto":
        result["threshold"], result["held_out"] = answers.best_f1(net, held_out, c.image_size, proc)
        need(
            result["threshold"],
            f"{teacher} finds none of the objects of {len(held_out)} held-out images: there is no "
            "threshold to choose. Train it longer, or raise --labeled",
        )
    store = answers.Answers(folder, images, proc)
    meter = util.Meter(proc.log, folder.name, 0, len(store.missing), proc.world)
    found = TASKS[c.task].answers(net, images, store.missing, c.image_size, proc, **how)
    for n, (i, answer) in enumerate(found, 1):
        store.add(i, answer)
        if n % 200 == 0:
            meter.line(n)
    proc.gather(None)  # wait until all processes are done
    proc.first(lambda: util.finish(folder, inputs, result))


def confident(folder, c, human, proc):
    """The answers in a store over the threshold, as labelled Images; how many and of what class."""
    stage = util.read_stage(folder)
    record = stage.get("result", {})
    same = record.get("classes") == human.class_names
    need(same, f"{folder} is no finished store of answers with the classes of the labelled images")
    threshold = record.get("threshold") if c.threshold == "auto" else float(c.threshold)
    need(threshold is not None, f"{folder} has no threshold chosen by auto; give --threshold")
    floor = stage["inputs"].get("floor", 0.0)
    need(threshold >= floor, f"{folder} holds no answers under {floor:g}: raise --threshold")
    pseudo = answers.confident(folder, threshold, human)
    account = {"threshold": threshold, **answers.audit(pseudo, human, record["images"])}
    kept = f"labels on {len(pseudo)} of {record['images']} images"
    proc.log.say(f"{folder}: threshold {threshold:g} keeps {kept}, the others are left out")
    usual = answers.shares(human)
    for name, share in sorted(account["share"].items(), key=lambda row: -row[1])[:20]:
        proc.log.say(f"  {share:6.1%} {name} (of human labels {usual[name]:.1%})")
    return pseudo, account


def lr_at(step, steps, c):
    """The learning rate of a step: a pure function, so a resumed run has no schedule to restore."""
    peak = recipes.scaled_lr(c)
    warmup = min(c.warmup, steps // 10)
    if step < warmup:  # 1) linear warm-up, of a tenth of the steps at most
        return peak * (c.warmup_from + (1 - c.warmup_from) * step / warmup)
    if c.drops:  # 2) a tenth from each of the drops on
        return peak * 0.1 ** sum(step >= round(drop * steps) for drop in c.drops)
    progress = (step - warmup) / max(steps - warmup, 1)  # 3) a cosine to 0
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


# ---- what the method is made of ------------------------------------------------------------------


def stage_seed(seed, folder):
    """Every stage draws its own images and augmentations. If a student saw its teacher's draws
    again, its human half would teach it less than the control's fresh ones do."""
    if folder.name == "teacher":
        return seed
    return int(util.digest([seed, folder.name]), 16) % 2**31


def build(c, classes, joint_classes=0):
    """The network of method c, on the CPU, weights drawn from c.seed. A backbone that starts from
    given weights stays trainable, batch norm included (but with --norm frozen), as in the paper."""
    torch.manual_seed(c.seed)
    norm, backbone_norm = c.norm, c.norm
    if c.norm == "frozen":
        norm = "bn"
    norms = {"norm": norm, "backbone_norm": backbone_norm}
    if c.task == "det":
        head = (c.levels, c.width, c.depth, c.anchor_base)
        net = models.RetinaNet(c.backbone, classes, c.image_size, *head, **norms, act=c.act)
    elif c.task == "rcnn":
        sizes = (c.anchors, c.regions, c.crop, c.proposals, c.instances)
        net = rcnn.RCNN(c.backbone, classes, *sizes, **norms)
    elif c.task == "seg":
        head = (c.levels, c.width, c.depth, c.neck, c.stride)
        net = models.Segmenter(c.backbone, classes, *head, **norms)
    else:
        net = models.Classifier(c.backbone, classes, backbone_norm)
    if joint_classes:
        net.joint = torch.nn.Linear(net.backbone.channels[5], joint_classes)
    for name, module in net.named_modules():
        # EfficientNet keeps its own momentum, as in the TPU code
        keeps = name.startswith("backbone.") and "efficientnet" in c.backbone
        if isinstance(module, torch.nn.BatchNorm2d) and not keeps:
            module.momentum = c.momentum
    return net.to(memory_format=torch.channels_last)


def network(folder, c, proc, parts, start):
    """The network of a stage with the weights it starts from, and what its checkpoints say of it.

    Weights come from: 1) a checkpoint in `folder`, when it is resumed (util.Checkpoint), else
    2) the stage `start`, else 3) --init for the backbone, the rest drawn from --seed."""
    human = parts["human"][0]
    joint_classes = 0
    if "classified" in parts:
        joint_classes = len(parts["classified"][0].class_names)
    net = build(c, len(human.class_names), joint_classes)
    if start:
        net.load_state_dict(util.stage_state(start)["model"])
    elif c.init != "random":
        proc.log.say(models.initialise(net.backbone, c.init, proc))
    check_trainable(net, c)
    about = {
        "config": dataclasses.asdict(c),
        "class_ids": human.class_ids,
        "class_names": human.class_names,
        "joint_classes": joint_classes,
        "role": folder.name,
    }
    if proc.gradient_checkpointing:
        backbones.recompute(net, (*backbones.BLOCKS, models.Tower))
    return net.to(proc.device), about


def check_trainable(net, c):
    """A network from scratch with frozen norms or a frozen stem never learns."""
    assert all(p.requires_grad for p in net.parameters())
    frozen = any(isinstance(m, backbones.FrozenBatchNorm2d) for m in net.modules())
    assert frozen == (c.norm == "frozen")


def make_optimizer(net, c):
    groups = models.weight_decay_groups(net, c.weight_decay)
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.0)


def restore(path, proc):
    """A trained network, on proc.device, and its checkpoint. path: a stage's folder or a file."""
    state = util.stage_state(path)
    try:
        c = recipes.Method(**state["config"])
        net = build(c, len(state["class_names"]), state["joint_classes"])
        net.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:80]
        raise util.UserError(
            f"{path} does not hold the network its settings describe ({reason}); it is damaged, or "
            "was written by another version"
        ) from None
    return net.to(proc.device), state


def given_teacher(path, c, human):
    state = util.stage_state(path)
    same = (state["config"]["task"], state["class_names"]) == (c.task, human.class_names)
    need(same, f"--teacher {path} was trained for another task or other classes than these images")
    return Path(path)


def score(net, c, val, proc, step, notes):
    """Scores on val; the first of them also goes into the curve."""
    proc.share_buffers(net)
    task = TASKS[c.task]
    share = answers.share(val, proc)
    metrics = task.score(task.answers(net, val, share, c.image_size, proc), val, proc)
    notes.setdefault("curve", []).append([step, metrics[task.metrics[0]]])
    return metrics


def readings(losses, joint, parts, task):
    """What the log shows of a step: losses (P, T) by part and term, running averages and ratios."""
    shown = {"loss": joint(losses.sum(1)).item()}
    for p, part in enumerate(parts):
        for t, term in enumerate(task.terms):
            shown[f"{part} {term}"] = losses[p, t].item()
    for part, ratio in zip(list(parts)[1:], joint.ratio.tolist()):
        shown[f"ratio {part}"] = ratio
    return shown


# ---- the command ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """what is done, with which images"""

    out: str = flag("runs/default", "run directory; the same command resumes it")
    root: str = flag("", "COCO, PASCAL VOC (seg) or class (cls) folder [the embedded world's]")
    labeled: float = flag(0.2, "fraction of the training images whose labels are used")
    split: str = flag("", "label split by tools.check split, instead of --labeled and --seed")
    train_list: str = flag("train", "seg: list of the training images, e.g. trainaug")
    unlabeled: str = flag(
        "", "folder, glob, .txt, COCO json, (seg) list [those without labels, aug]"
    )
    joint: str = flag("", "joint training: every step also classifies images of DIR/train/CLASS")
    until: str = flag("student", "the last stage", ("teacher", "labels", "student"))
    teacher: str = flag("", "stage folder or checkpoint to take instead of training a teacher")
    pseudo: str = flag("", "folder of answers to take instead of labelling")
    rounds: int = flag(1, "repetitions of teacher <- student")
    control: bool = flag(False, "also train on without pseudo-labels, for as many steps and images")


def load(plan, c, proc):
    """-> labelled, held-out, unlabelled, classified (or None) and validation Images."""
    task = TASKS[c.task]
    root = plan.root or task.root
    proc.first(lambda: data.ensure(root))
    more = {"instances": True} if c.instances else {}
    train_set = task.load(root, plan.train_list, **more)
    val = task.load(root, "val", train_set)
    split = data.make_split(train_set, plan.labeled, c.seed)
    if plan.split:
        split = data.read_split(plan.split, train_set)
    human, held_out, rest = data.apply_split(split, train_set, hold_out=c.threshold == "auto")
    unlabelled = None
    if plan.until != "teacher" and not plan.pseudo:
        unlabelled = unlabelled_images(plan, c, root, rest)
        unlabelled, leaks = data.without_leaks(unlabelled, human, held_out, val)
        if leaks:
            sentence = f"warning: {leaks} unlabelled images are labelled or validation images"
            proc.log.say(f"{sentence}; they are left out")
        need(len(unlabelled), "no unlabelled image is left; give others by --unlabeled")
    proc.first(lambda: data.ensure(plan.joint))
    classified = data.folder(plan.joint, "train") if plan.joint else None
    say_data(proc.log, human, held_out, unlabelled, val)
    if proc.rank == 0:
        util.write_json(Path(plan.out, "split.json"), split)
    return human, held_out, unlabelled, classified, val


def unlabelled_images(plan, c, root, rest):
    name = plan.unlabeled
    if c.task == "seg" and not name and plan.train_list == "train":
        name = "aug" if data.voc_list_file(root, "aug").exists() else ""
    if c.task == "seg" and name and data.voc_list_file(root, name).exists():
        return data.voc_images(root, name)
    if name:
        return data.listed(name)
    need(len(rest), "--labeled 1 leaves no image to pseudo-label; give --unlabeled DIR")
    return rest.without_labels()


def say_data(log, human, held_out, unlabelled, val):
    log.say(
        f"{len(human)} labelled images, {len(held_out)} held out, {len(unlabelled or ())} "
        f"unlabelled, {len(val)} for validation; classes {', '.join(human.class_names[:50])}"
    )
    _, twice = data.without_leaks(human, val)
    if twice:
        log.say(f"warning: {twice} labelled images are also validation images")
    for images in (human, val):
        for reason, count in images.dropped.items():
            log.say(f"warning: {count} boxes of {images.source} dropped: {reason}")


def say_plan(folder, net, c, proc, parts, steps):
    size = sum(p.numel() for p in net.parameters()) / 1e6
    mixture = " + ".join(f"{count} {name}" for name, (_, count) in parts.items())
    proc.log.say(
        f"{folder}: {steps} steps of {mixture} images, {c.accumulate} pieces on {proc.world} "
        f"processes; {c.optimizer} lr {recipes.scaled_lr(c):.4g} ({c.lr:g} at batch "
        f"{c.ref_batch}); {size:.1f}M parameters, {str(proc.dtype)[6:]} on {proc.device}"
    )
    if proc.world > 1 and proc.device.type == "cpu" and c.norm == "bn":
        proc.log.say("note: on CPU batch norm sees one process's images; --norm gn does without")


def main(argv=None):
    plan, given, machine = util.parse(__doc__, Plan, recipes.Method, util.Machine, argv=argv)
    plan = Plan(**plan)
    proc = util.start(util.Machine(**machine))
    c = recipes.method(**given)
    check(plan, c, proc)
    out = Path(plan.out)
    proc.first(lambda: util.claim(out))
    proc.log = util.Log(out / "log.jsonl", proc.rank)
    command = {"command": shlex.join(sys.argv), "seed": c.seed}
    if proc.rank == 0:
        settings = {**command, **dataclasses.asdict(plan), **dataclasses.asdict(c)}
        util.write_json(out / "config.json", settings)
    results = self_train(plan, c, proc)
    if proc.rank == 0:
        util.write_json(out / "results.json", {**results, **command})
        print_table(results, TASKS[c.task].metrics)
        print(f"written: {out}/results.json; pictures: python -m tools.show run {out}")


def check(plan, c, proc):
    need(0 < plan.labeled <= 1, f"--labeled {plan.labeled} must be above 0 and up to 1")
    need(plan.rounds >= 1, "--rounds must be 1 or more")
    need(plan.rounds == 1 or not plan.pseudo, "--pseudo is for one round: leave out --rounds")
    need(not plan.joint or c.task in ("det", "seg"), "--joint is for RetinaNet and segmentation")
    pieces = proc.world * c.accumulate
    for count in (c.batch, recipes.student_batch(c)):
        fits = count >= pieces and count % pieces == 0
        sentence = f"{proc.world} processes x --accumulate {c.accumulate}; give another --batch"
        need(fits, f"{count} images a step do not divide by {sentence}")


def print_table(results, metrics):
    print(f"{'':10s}" + "".join(f"{name:>10s}" for name in metrics))
    for stage in [name for name in results if metrics[0] in results[name]]:
        print(f"{stage:10s}" + "".join(f"{results[stage][name]:10.3f}" for name in metrics))


if __name__ == "__main__":
    util.run(main)
