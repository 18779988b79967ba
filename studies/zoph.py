"""The tables of Zoph et al. 2020 as commands of st.py, in miniature. What is run stands here.

    python -m studies.zoph table3 --seeds 3             labels x initialisation x self-training
    python -m studies.zoph findings                     verdicts from all results, HPT's included
    python -m studies.zoph table3 --recipe coco-b7 --root COCO --unlabeled IMAGENET \\
        --init pre=aa.pth pre++=ns.pth
    python -m studies.zoph yours --recipe tiny --root DIR --labeled 0.2 --init FILE \\
        -- --image-size 256

Without --recipe: segmentation on the embedded world. A cell is a stage of a run: teacher
(supervised), control (as many more steps as the student, without pseudo-labels) or student. Runs
lie in OUT/RECIPE, tables in RESULTS/NAME.json, .md and .svg; the same command resumes. Flags after
-- go to every run but pre-training: another backbone needs weights of its own, by --init.
"""

from pathlib import Path
from shlex import quote

import recipes
import util
from studies import reed, table
from studies.run import arguments, study
from util import need

# Those of seg-tiny, with the world's 300 labelled images, were settled on one seed by one
# criterion, that labels limit supervised training and steps do not, and frozen before any study was
# run: results/README.md. Weak augmentation needs fewer steps (45k and 120k in the paper: recalled).
# One scale: the paper's six reach beyond what S1 shows the net. tiny: PLACEHOLDERS, since steps
# limit detection on a CPU.
# fmt: off
SETTINGS = {  # flags of every run, the pool for pseudo-labels, the augmentation of most tables
    "seg-tiny":  ("--student-steps 800 --scales 1 --eval-every 300", "aug", "s1"),
    "tiny":      ("--steps 2000 --student-steps 700 --eval-every 100",
                  "datasets/shapes/unlabeled", "s4"),
    "coco-b7":   ("--eval-every 6000", "", "s4"),
    "pascal-b7": ("--eval-every 2000", "", "s4"),
}
STEPS = {  # of seg-tiny
    "s1": "--steps 1500", "s2": "--steps 1500", "s3": "--steps 3000", "s4": "--steps 3000"}
# fmt: on
METRIC = {"det": "AP", "rcnn": "AP", "seg": "mIoU", "cls": "accuracy"}
SINGLE = "datasets/shapes/single"


def settle(o):
    """What the recipe decides: o.task, o.runs, o.common, o.pool, o.aug."""
    need(o.recipe in recipes.RECIPES, f"--recipe {o.recipe}: no such row of recipes.py")
    o.task = recipes.RECIPES[o.recipe]["task"]
    flags, pool, o.aug = SETTINGS.get(o.recipe, SETTINGS["coco-b7"])
    o.runs = f"{o.out}/{o.recipe}"
    if o.name == "yours":
        flags, pool, o.aug = "--eval-every 200", "", ""  # the recipe's
        o.runs = f"{o.out}/yours-{o.recipe}"
    root = f"--root {quote(o.root)}" if o.root else ""
    o.common = f"--recipe {o.recipe} {root} {flags} {o.flags}"
    if o.unlabeled or o.root:
        pool = o.unlabeled
    o.pool = f"--unlabeled {quote(pool)}" if pool else ""


# ---- runs ----------------------------------------------------------------------------------------


def weights(g, o, seed, init):
    """The flag of an initialisation. Without a file of --init it is our own pre-training on the
    world's single objects, with the same seed: pre is the paper's ImageNet init; pre++ its
    ImageNet++ (Noisy Student), self-training for classification; simclr its SimCLR, which sees
    twice as many images as pre."""
    if init == "random":
        return ""
    if init in o.init:
        return f"--init {quote(o.init[init])}"
    need(o.recipe in ("seg-tiny", "tiny"), f"{o.name} needs weights: --init {init}=FILE")
    pre, plus, simclr = (f"{o.runs}/{name}/{seed}" for name in ("pre", "pre++", "simclr"))
    if init == "simclr":
        how = f"--recipe tiny --method simclr --lr 0.24 --stage {SINGLE}:1500"
        g.commands[simclr] = f"hpt.py {how} --seed {seed}"
        return f"--init {simclr}/1_all_single"
    how = "--recipe cls-tiny --image-size 64 --steps 1500 --student-steps 1500 --eval-every 500"
    cls = f"st.py {how} --labeled 1 --seed {seed}"
    g.commands[pre] = f"{cls} --until teacher"
    if init == "pre":
        return f"--init {pre}/teacher"
    noisy = f"--teacher {pre}/teacher --student-init same --unlabeled {SINGLE}/extra"
    g.commands[plus] = f"{cls} {noisy}"
    return f"--init {plus}/student"


def labelled(o, seed, aug, share):
    """The flags of runs on the same labels."""
    how = ""
    if aug:
        steps = STEPS[aug] if o.recipe == "seg-tiny" else ""
        how = f"--aug {aug} {steps}"
    return f"st.py {o.common} {how} --labeled {share:g} --seed {seed}"


def teacher(g, o, seed, name, aug, share, init="random", more=""):
    """Adds a supervised run -> its folder. Tables share those of the same name."""
    name = name.replace(", ", "-").replace(" ", "-")
    folder = f"{o.runs}/{aug or 'recipe'}-{share:g}/{name}/{seed}"
    start = weights(g, o, seed, init)
    g.commands[folder] = f"{labelled(o, seed, aug, share)} {start} {more} --until teacher"
    return folder


def student(g, o, seed, name, aug, share, init="random", more="", pool=None):
    """Adds a teacher, its student and the control -> the teacher's folder, that of the others."""
    first = teacher(g, o, seed, name, aug, share, init, more)
    second = first.removesuffix(f"/{seed}") + f"-student/{seed}"
    pool = o.pool if pool is None else pool
    start = weights(g, o, seed, init)
    shared = f"{labelled(o, seed, aug, share)} {start} {more}"
    g.commands[second] = f"{shared} --teacher {first}/teacher --control {pool}"
    return first, second


def supervised(g, o, seed, row, column, *how):
    """A teacher as a cell; how: as teacher() takes it, from aug on."""
    g.cell(row, column, seed, teacher(g, o, seed, row, *how), "teacher")


def trio(g, o, seed, row, column, *how):
    """A teacher, its control and its student as three rows; the paper has no control."""
    three(g, seed, row, column, *student(g, o, seed, row, *how))


def three(g, seed, row, column, first, second):
    g.cell(row, column, seed, first, "teacher")
    g.cell(f"{row}, longer", column, seed, second, "control")
    g.cell(f"{row}, self-trained", column, seed, second, "student")


# ---- the tables ----------------------------------------------------------------------------------


def table2(g, o, seed):
    for aug in ("s1", "s2", "s3", "s4"):
        trio(g, o, seed, "random", aug.upper(), aug, 1)
        supervised(g, o, seed, "pre-trained", aug.upper(), aug, 1, "pre")


def table2_20(g, o, seed):
    """Added after table3 had been seen: under S4 few labels go much further."""
    for aug in ("s1", "s4"):
        trio(g, o, seed, "random", aug.upper(), aug, 0.2)
        trio(g, o, seed, "pre-trained", aug.upper(), aug, 0.2, "pre")


def table3(g, o, seed):
    for column, share in (("20%", 0.2), ("50%", 0.5), ("100%", 1)):
        trio(g, o, seed, "random", column, o.aug, share)
        trio(g, o, seed, "pre-trained", column, o.aug, share, "pre")
        trio(g, o, seed, "pre-trained++", column, o.aug, share, "pre++")


def table4(g, o, seed):
    trio(g, o, seed, "random", "100%", o.aug, 1)
    supervised(g, o, seed, "pre-trained", "100%", o.aug, 1, "pre")
    supervised(g, o, seed, "SimCLR", "100%", o.aug, 1, "simclr")


def table7(g, o, seed):
    joint = f"--joint {quote(o.joint)}"
    for row, init in (("random", "random"), ("pre-trained", "pre")):
        trio(g, o, seed, row, "20%", o.aug, 0.2, init)
        trio(g, o, seed, f"{row}, joint", "20%", o.aug, 0.2, init, joint)


def pascal(g, o, seed):
    """The `aug` images: PASCAL's further ones, labelled more coarsely; of boxes the other 80%."""
    share, pool, both = 0.2, "", ""
    if o.task == "seg":
        share, pool, both = 1, "--unlabeled aug", "--train-list trainaug"
    scenes = o.unlabeled or "datasets/shapes/unlabeled"
    for aug in ("s1", "s4"):
        column = aug.upper()
        first, second = student(g, o, seed, "train", aug, share, "pre++", "", pool)
        three(g, seed, "train", column, first, second)
        supervised(g, o, seed, "train + aug labels", column, aug, 1, "pre++", both)
        shared = f"{labelled(o, seed, aug, share)} {weights(g, o, seed, 'pre++')}"
        for what, images in (("single objects", f"{SINGLE}/extra"), ("other scenes", scenes)):
            folder = f"{o.runs}/{aug}-{share:g}/{what.replace(' ', '-')}/{seed}"
            taught = f"--teacher {first}/teacher --unlabeled {quote(images)}"
            g.commands[folder] = f"{shared} {taught}"
            g.cell(f"self-trained on {what}", column, seed, folder, "student")


def again(g, o, seed, name, first, second, how):
    """Adds another student of the same teacher, from the same answers: a path -> its folder."""
    folder = f"{o.runs}/{name}/{seed}"
    given = f"--teacher {first}/teacher --pseudo {second}/pseudo"
    g.commands[folder] = f"{labelled(o, seed, o.aug, 0.2)} {given} {how}"
    return folder


def alpha(g, o, seed):
    first, second = student(g, o, seed, "random", o.aug, 0.2)
    for value in ("0.25", "0.5", "1", "2", "4"):
        g.cell("longer", value, seed, second, "control")
        for row, norm in (("self-trained", "on"), ("self-trained, not normalised", "off")):
            how = f"--alpha {value} --loss-norm {norm}"
            folder = again(g, o, seed, f"alpha-{value}-{norm}", first, second, how)
            g.cell(row, value, seed, folder, "student")


def threshold(g, o, seed):
    trio(g, o, seed, "random", "the recipe's", o.aug, 0.2)
    # `auto` holds labels out, which a number does not: for boxes that is another teacher.
    at = "--threshold 0.5"
    first, second = student(g, o, seed, "random at a number", o.aug, 0.2, "random", at)
    for value in ("0.3", "0.5", "0.7", "0.9"):
        three(g, seed, "random", value, first, second)
        how = f"--threshold {value}"
        folder = again(g, o, seed, f"threshold-{value}", first, second, how)
        g.cell("random, self-trained", value, seed, folder, "student")


def student_init(g, o, seed):
    first, second = student(g, o, seed, "random", o.aug, 0.2)
    three(g, seed, "random", "from its teacher", first, second)
    how = "--student-init same --control"
    folder = again(g, o, seed, "student-init-same", first, second, how)
    three(g, seed, "random", "as its teacher", first, folder)


def regime(g, o, seed):
    for column, share in (("20%", 0.2), ("50%", 0.5), ("100%", 1)):
        supervised(g, o, seed, "random", column, o.aug, share)


def yours(g, o, seed):
    trio(g, o, seed, "random", "your data", o.aug, o.labeled)
    if "pre" in o.init:
        trio(g, o, seed, "pre-trained", "your data", o.aug, o.labeled, "pre")


def gains(*rows):
    """What students are compared with: their control and their teacher."""
    return [(f"{r}, self-trained", other) for r in rows for other in (f"{r}, longer", r)]


# runs: the function above; compare: differences of rows, or of columns; paper: its numbers, COCO AP
# (Tables 2, 3, 4, 7) and PASCAL mIoU (6, 8, 13 of v1), a column each.
# fmt: off
STUDIES = {
    "table2": dict(
        runs=table2, title="Augmentation x method with all labels (Table 2)",
        compare=[*gains("random"), ("pre-trained", "random")],
        paper={"random": (39.2, 41.5, 43.9, 44.3), "random, self-trained": (40.9, 43.0, 45.4, 45.6),
               "pre-trained": (39.5, 40.7, 43.2, 43.3)}),
    "table2-20": dict(
        runs=table2_20, title="Augmentation x method with 20% of the labels",
        compare=[*gains("random", "pre-trained"), ("pre-trained", "random"), ("S4", "S1")]),
    "table3": dict(
        runs=table3, title="Labels x initialisation x self-training (Table 3)",
        compare=[*gains("random", "pre-trained", "pre-trained++"),
                 ("pre-trained", "random"), ("pre-trained++", "random")],
        paper={"random":                      (30.7, 39.6, 44.3),
               "random, self-trained":        (34.1, 41.4, 45.6),
               "pre-trained":                 (33.3, 38.8, 43.3),
               "pre-trained, self-trained":   (36.0, 40.5, 44.6),
               "pre-trained++":               (35.9, 39.9, 43.8),
               "pre-trained++, self-trained": (37.2, 41.5, 44.6)}),
    "table4": dict(
        runs=table4, title="Self-supervised pre-training, all labels (Table 4; a ResNet there)",
        compare=[*gains("random"), ("pre-trained", "random"), ("SimCLR", "random")],
        paper={"random": (41.1,), "random, self-trained": (41.9,), "pre-trained": (40.4,),
               "SimCLR": (40.4,)}),
    "table7": dict(
        runs=table7, title="Joint training and self-training, 20% of the labels (Table 7)",
        compare=[*gains("random", "random, joint", "pre-trained", "pre-trained, joint"),
                 ("pre-trained", "random"), ("random, joint", "random"),
                 ("random, joint, self-trained", "random, self-trained"),
                 ("pre-trained, joint", "pre-trained"),
                 ("pre-trained, joint, self-trained", "pre-trained, self-trained")],
        paper={"random": (30.7,), "random, self-trained": (34.1,),
               "random, joint": (33.6,), "random, joint, self-trained": (35.1,),
               "pre-trained": (33.3,), "pre-trained, self-trained": (36.0,),
               "pre-trained, joint": (34.0,), "pre-trained, joint, self-trained": (36.6,)}),
    "pascal": dict(
        runs=pascal,
        title="What to do with the aug images, and others to learn from (Tables 6, 8 and 13)",
        compare=[*gains("train"), ("train + aug labels", "train"),
                 ("self-trained on single objects", "train, longer"),
                 ("self-trained on other scenes", "train, longer")],
        paper={"train": (83.9, 85.2), "train, self-trained": (85.6, 86.7),
               "train + aug labels": (84.7, 84.8), "self-trained on single objects": (85.0, 86.0),
               "self-trained on other scenes": (85.3, 86.6)}),
    "alpha": dict(
        runs=alpha,
        title="Weight of the pseudo-labels and loss normalisation, 20% of the labels (appendix B)",
        compare=[("self-trained", "longer"), ("self-trained", "self-trained, not normalised")]),
    "threshold": dict(
        runs=threshold, title="Threshold of the pseudo-labels, 20% of the labels",
        compare=gains("random")),
    "student-init": dict(
        runs=student_init, title="Where the student starts, 20% of the labels",
        compare=[*gains("random"), ("from its teacher", "as its teacher")]),
    "regime": dict(
        runs=regime, title="Do labels limit supervised training?",
        compare=[("100%", "50%"), ("50%", "20%")], paper={"random": (30.7, 39.6, 44.3)}),
    "yours": dict(
        runs=yours, title="Pre-training and self-training on your data",
        compare=[*gains("random", "pre-trained"), ("pre-trained", "random"),
                 ("pre-trained, self-trained", "random, self-trained")],
        helped={
            "random, self-trained - random, longer":
                "self-training from random weights (against longer training)",
            "pre-trained, self-trained - pre-trained, longer":
                "self-training from pre-trained ones (against longer training)",
            "pre-trained - random": "pre-trained weights (against random ones)"}),
}

# What the paper found, as contrasts of cells that are to be above 0: (study, added, taken away).
FINDINGS = {
    "0": ("More labels help supervised training, which no longer rises at its end: labels are what "
          "limits it", [
        ("regime", [("random", "100%")], [("random", "50%")]),
        ("regime", [("random", "50%")], [("random", "20%")])]),
    "a": ("A student beats a control trained as long, with 20, 50 and 100% of the labels", [
        ("table3", [("random, self-trained", column)], [("random, longer", column)])
        for column in ("20%", "50%", "100%")]),
    "b": ("It does so under every augmentation", [
        (name, [("random, self-trained", column)], [("random, longer", column)])
        for name, columns in (("table2", ("S1", "S2", "S3", "S4")), ("table2-20", ("S1", "S4")))
        for column in columns]),
    "c": ("The gain of pre-training shrinks as augmentation and labels grow", [
        ("table2", [("pre-trained", "S1"), ("random", "S4")],
         [("random", "S1"), ("pre-trained", "S4")]),
        ("table2-20", [("pre-trained", "S1"), ("random", "S4")],
         [("random", "S1"), ("pre-trained", "S4")]),
        ("table3", [("pre-trained", "20%"), ("random", "100%")],
         [("random", "20%"), ("pre-trained", "100%")])]),
    "d": ("Self-training adds to pre-training", [
        ("table3", [("pre-trained, self-trained", column)], [("pre-trained, longer", column)])
        for column in ("20%", "50%", "100%")]),
    "e": ("Joint training and self-training together are best", [
        ("table7", [(f"{init}, joint, self-trained", "20%")], [(f"{init}, {other}", "20%")])
        for init in ("random", "pre-trained")
        for other in ("longer", "self-trained", "joint, longer")]),
    "f": ("Loss normalisation makes alpha matter less: scores spread less over the alphas", [
        ("alpha", [("self-trained, not normalised", "*")], [("self-trained", "*")])]),
}
# fmt: on


def main(argv=None):
    starts = ("pre", "pre++", "simclr")
    o = arguments(__doc__, [*STUDIES, "findings"], "seg-tiny", starts, argv)
    if o.name == "findings":
        text = table.findings(o.results, {**FINDINGS, **reed.FINDINGS})
        util.write_atomic(Path(o.results, "findings.md"), lambda path: path.write_text(text))
        print(text)
        return
    settle(o)
    study(o, o.name, STUDIES[o.name], METRIC[o.task])


if __name__ == "__main__":
    util.run(main)
