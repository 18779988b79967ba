"""What study.py runs, as literal tables: the studies of both papers, their settings, and what the papers found.

{words} in flags depend on the world and the options, see study.words(). A flag's "@NAME/FILE" is a file or stage of another run.
"""

# The flags of every run, by world and task (cls is the pre-training). Those of shapes, seg, with the world's 300 labelled images,
# were settled on one seed by one criterion, that labels limit supervised training and steps do not, and frozen before any study
# was run. Under S1, 1,500 steps do: mIoU 26, 52 from 20, 100 images, and less than 2 more after the control's further 800. Under
# S4 3,000 did not seem to (42, 68; 44, 70 after 800 more; 46, 72 after 2,000), so the paper's studies under S4 are done under S1
# here; over three seeds the control gains hardly more under S4 (2.4) than under S1 (1.9): see table2-20. One scale:
# the paper's six reach beyond what S1 shows the net. shapes, det: PLACEHOLDERS; steps limit it on a CPU.
SETTINGS = {
    ("shapes", "det"): "--steps 2000 --student-steps 700 --eval-every 100",
    ("shapes", "seg"): "--student-steps 800 --scales 1 --eval-every 300",
    ("shapes", "cls"): "--image-size 64 --steps 1500 --student-steps 1500 --eval-every 500",
    ("coco", "det"): "--recipe coco-b7 --eval-every 6000",
    ("voc", "seg"): "--recipe pascal-b7 --eval-every 2000",
    "yours": "--eval-every 200",
    "hpt": "--recipe tiny --labels 100",  # of fine-tuning: of 1,500 images, as the paper has 1,000 of many more
}
# Weak augmentation needs fewer steps (45k and 120k in the paper: recalled); aug: the one of the tables with a single one.
AUG = {("shapes", "seg"): {"s1": "--aug s1 --steps 1500", "s2": "--aug s2 --steps 1500", "s3": "--aug s3 --steps 3000",
                           "s4": "--aug s4 --steps 3000", "aug": "--aug s1 --steps 1500"}}
# Where weights come from if --init does not name a file: our own pre-training, with the same seed. On the world's single objects:
# pre is the paper's ImageNet init; pre++ its ImageNet++ (Noisy Student), self-training for classification; simclr its SimCLR,
# which sees twice as many images as pre. base: HPT's; source of ...: what it becomes on another source. Base and lr were
# settled with strokes as the target, one seed, before any of HPT's studies was run: 1,500 steps on photo gave less than `single`.
PRETRAINING = {
    "pre": ("teacher", "--mode train --labeled 1"), "pre++": ("student", "--labeled 1 {single} --student-init same"),
    "simclr": ("1_all_single/backbone.pt", "--program hpt --recipe tiny --method simclr --lr 0.24 --stage single:1500"),
    "base": ("1_all_single/backbone.pt", "--program hpt --stage single:2000"),
    "own base": ("1_all_{slug}/backbone.pt", "--program hpt --stage {own}:2000"),  # of hpt-yours: of --unlabeled
    "source of sketch": ("1_all_strokes/backbone.pt", "--program hpt --stage strokes:400 --init {base}"),
    "source of strokes": ("1_all_sketch/backbone.pt", "--program hpt --stage sketch:400 --init {base}"),
    # of hpt-detect, whose target are scenes such as the detector's
    "target": ("1_all_unlabeled/backbone.pt", "--program hpt --stage unlabeled:1500"),
    "hpt": ("1_all_unlabeled/backbone.pt", "--program hpt --stage unlabeled:400 --init {base}"),
    "hpt-bn": ("1_bn_unlabeled/backbone.pt", "--program hpt --stage unlabeled:400:bn --init {base}"),
}


def trio(name, flags, supervised=(), student=()):
    """The three stages of a run as rows; the paper has no control."""
    return {name: ("teacher", flags, supervised), f"{name}, longer": ("control", flags, ()),
            f"{name}, self-trained": ("student", flags, student)}


def steps(stage):
    """HPT's rows: what the backbone starts from and how many steps it is trained on the target, itself the column."""
    return {"Base": (stage, HPT + "stats --init {base}", ()),
            **{f"Target, {n}": (stage, HPT + str(n), ()) for n in (400, 1500)},
            **{f"HPT, {n}": (stage, f"{HPT}{n} --init {{base}}", ()) for n in (100, 400, 1500)},
            "HPT-BN, 400": (stage, HPT + "400:bn --init {base}", ())}


STEPS_COMPARED = [("HPT, 1500", "Base"), ("HPT-BN, 400", "Base"), ("HPT, 400", "Target, 400"),
                  *((f"HPT, {n}", "Target, 1500") for n in (1500, 400, 100)), ("HPT, 400", "HPT-BN, 400")]


def on_sketch(target):
    """HPT's rows where it is the columns that differ; target: steps of the one from random weights."""
    return {name: ("linear", HPT.replace("{column}", "sketch") + flags, ()) for name, flags in (
        ("Target", target), ("HPT", "400 --init {base}"), ("HPT-BN", "400:bn --init {base}"))}


def gains(*names):
    return [(f"{name}, self-trained", other) for name in names for other in (f"{name}, longer", name)]


ST = "{pool} --control"
HPT = "--program hpt --eval linear,finetune --stage {column}:"
# The second was aerial at first: with seed 0 Base, Target (400, 1500) and HPT (100, 400) all were at chance there, 0.09 to 0.12
# in the linear probe, so that it could tell nothing. Strokes it is then, though base and lr were chosen on it.
HPT_TARGETS = dict.fromkeys(("sketch", "strokes"), "")
FRACTIONS = {"20%": "--labeled 0.2 {aug}", "50%": "--labeled 0.5 {aug}", "100%": "--labeled 1 {aug}"}
# title; columns {name: flags}; rows {name: (stage, flags, the paper's numbers)}; compare [(a, b)]: a - b, of rows or of columns.
# {column}: the column's name. The paper's numbers are COCO AP (Tables 2, 3, 4, 7) and PASCAL mIoU (6, 8, 13 of v1).
STUDIES = {
    "table2": dict(
        title="Augmentation x method with all labels (Table 2)",
        columns={f"S{k}": f"--labeled 1 {{s{k}}}" for k in (1, 2, 3, 4)},
        rows={**trio("random", ST, (39.2, 41.5, 43.9, 44.3), (40.9, 43.0, 45.4, 45.6)),
              "pre-trained": ("teacher", "--mode train --init {pre}", (39.5, 40.7, 43.2, 43.3))},
        compare=[*gains("random"), ("pre-trained", "random")]),
    "table2-20": dict(  # added after table3 had been seen: under S4 few labels go much further
        title="Augmentation x method with 20% of the labels", columns={f"S{k}": f"--labeled 0.2 {{s{k}}}" for k in (1, 4)},
        rows={**trio("random", ST), **trio("pre-trained", ST + " --init {pre}")},
        compare=[*gains("random", "pre-trained"), ("pre-trained", "random"), ("S4", "S1")]),
    "table3": dict(
        title="Labels x initialisation x self-training (Table 3)", columns=FRACTIONS,
        rows={**trio("random", ST, (30.7, 39.6, 44.3), (34.1, 41.4, 45.6)),
              **trio("pre-trained", ST + " --init {pre}", (33.3, 38.8, 43.3), (36.0, 40.5, 44.6)),
              **trio("pre-trained++", ST + " --init {pre++}", (35.9, 39.9, 43.8), (37.2, 41.5, 44.6))},
        compare=[*gains("random", "pre-trained", "pre-trained++"), ("pre-trained", "random"), ("pre-trained++", "random")]),
    "table4": dict(
        title="Self-supervised pre-training, all labels (Table 4; a ResNet there)", columns={"100%": FRACTIONS["100%"]},
        rows={**trio("random", ST, (41.1,), (41.9,)), "pre-trained": ("teacher", "--mode train --init {pre}", (40.4,)),
              "SimCLR": ("teacher", "--mode train --init {simclr}", (40.4,))},
        compare=[*gains("random"), ("pre-trained", "random"), ("SimCLR", "random")]),
    "table7": dict(
        title="Joint training and self-training, 20% of the labels (Table 7)", columns={"20%": FRACTIONS["20%"]},
        rows={**trio("random", ST, (30.7,), (34.1,)), **trio("random, joint", ST + " {joint}", (33.6,), (35.1,)),
              **trio("pre-trained", ST + " --init {pre}", (33.3,), (36.0,)),
              **trio("pre-trained, joint", ST + " {joint} --init {pre}", (34.0,), (36.6,))},
        compare=[*gains("random", "random, joint", "pre-trained", "pre-trained, joint"), ("pre-trained", "random"),
                 *((f"{i}, joint{more}", f"{i}{more}") for i in ("random", "pre-trained") for more in ("", ", self-trained"))]),
    "pascal": dict(  # the `aug` images: PASCAL's further ones with coarser labels; with boxes the 80% not labelled
        title="What to do with the aug images, and others to learn from (Tables 6, 8 and 13)",
        columns={"S1": "{s1} --init {pre++}", "S4": "{s4} --init {pre++}"},
        rows={**trio("train", "{few} {rest} --control", (83.9, 85.2), (85.6, 86.7)),
              "train + aug labels": ("teacher", "{all} --mode train", (84.7, 84.8)),
              "self-trained on single objects": ("student", "{few} {single}", (85.0, 86.0)),
              "self-trained on other scenes": ("student", "{few} {scenes}", (85.3, 86.6))},
        compare=[*gains("train"), ("train + aug labels", "train"), ("self-trained on single objects", "train, longer"),
                 ("self-trained on other scenes", "train, longer")]),
    "alpha": dict(
        title="Weight of the pseudo-labels and loss normalisation, 20% of the labels (appendix B)",
        columns={a: FRACTIONS["20%"] + f" --alpha {a}" for a in ("0.25", "0.5", "1", "2", "4")},
        rows={"longer": ("control", ST, ()), "self-trained": ("student", ST, ()),
              "self-trained, not normalised": ("student", ST + " --loss-norm off", ())},
        compare=[("self-trained", "longer"), ("self-trained", "self-trained, not normalised")]),
    "threshold": dict(
        title="Threshold of the pseudo-labels, 20% of the labels",
        columns={"the recipe's": FRACTIONS["20%"],
                 **{t: FRACTIONS["20%"] + f" --threshold {t}" for t in ("0.3", "0.5", "0.7", "0.9")}},
        rows=trio("random", ST), compare=gains("random")),
    "student-init": dict(
        title="Where the student starts, 20% of the labels",
        columns={"from its teacher": FRACTIONS["20%"], "as its teacher": FRACTIONS["20%"] + " --student-init same"},
        rows=trio("random", ST), compare=[*gains("random"), ("from its teacher", "as its teacher")]),
    "regime": dict(
        title="Do labels limit supervised training?", columns=FRACTIONS,
        rows={"random": ("teacher", "--mode train", (30.7, 39.6, 44.3))}, compare=[("100%", "50%"), ("50%", "20%")]),
    "yours": dict(
        title="Pre-training and self-training on your data", columns={"your data": "--labeled {labeled}"},
        rows={**trio("random", ST), **trio("pre-trained", ST + " --init {pre}")},
        compare=[*gains("random", "pre-trained"), ("pre-trained", "random"),
                 ("pre-trained, self-trained", "random, self-trained")]),
    "hpt-linear": dict(
        title="HPT: steps on the target, linear probe", columns=HPT_TARGETS,
        rows=steps("linear"),
        compare=STEPS_COMPARED),
    "hpt-semi": dict(
        title="HPT: steps on the target, fine-tuning on 100 labels", columns=HPT_TARGETS,
        rows=steps("finetune"),
        compare=STEPS_COMPARED),
    "hpt-chain": dict(  # S: the other of the two, since both are drawings (in the paper by their linear probes)
        title="HPT: chains, fine-tuning on 100 labels", columns=HPT_TARGETS,
        rows={name: ("finetune", HPT + flags, ()) for name, flags in (
            ("B", "stats --init {base}"), ("T", "1500"), ("B+S", "stats --init {source of {column}}"),
            ("B+T", "400 --init {base}"), ("B+S+T", "400 --init {source of {column}}"),
            ("B+S+T-BN", "400:bn --init {source of {column}}"))},
        compare=[("B+T", "B"), ("B+T", "T"), ("B+S", "B"), ("B+S+T", "B+T"), ("B+S+T-BN", "B+S")]),
    "hpt-augment": dict(
        title="HPT: fewer augmentations on the target (sketch), 400 steps, linear probe",
        columns={"baseline": "--views baseline",  # the run of hpt-linear, fine-tuning and all
                 **{v: f"--views {v} --eval linear" for v in ("no-grey", "no-colour", "crop-blur", "crop")}},
        rows={name: row for name, row in on_sketch("400").items() if name != "HPT-BN"},
        compare=[("HPT", "Target"), ("crop", "baseline")]),
    "hpt-detect": dict(
        title="HPT: detection transfer, Faster R-CNN C4 on all labels (section 4.4)", columns={"100%": "--labeled 1"},
        rows={name: ("teacher", "--recipe tiny-c4 --steps 1200 --aug s1 --threshold 0.5 --mode train" + init, ())
              for name, init in (("random", ""), ("Base", " --init {base}"), ("Target", " --init {target}"),
                                 ("HPT", " --init {hpt}"), ("HPT-BN", " --init {hpt-bn}"))},
        compare=[("Base", "random"), ("HPT", "Base"), ("HPT", "Target"), ("HPT-BN", "Base")]),
    "hpt-mme": dict(  # the columns are target labels per class
        title="Domain adaptation with few labels, photo to strokes (section 4.6)", columns=dict.fromkeys(("1", "3", "10"), ""),
        rows={start + way: (f"{way}, {{column}}",
                            "--program hpt --eval mme --source photo --data strokes --budgets 1,3,10" + init, ())
              for start, init in (("", ""), ("HPT, ", " --init {source of sketch}")) for way in ("S+T", "MME")},
        compare=[("MME", "S+T"), ("HPT, MME", "HPT, S+T"), ("HPT, MME", "MME")]),
    "hpt-yours": dict(
        title="HPT on your images, linear probe", columns={"base": "", "own base": ""},
        rows={name: ("linear", "--program hpt --eval linear --data {yours} --stage {yours}/train:" + flags, ())
              for name, flags in (("Base", "stats --init {{column}}"), ("Target", "1500"), ("HPT", "400 --init {{column}}"),
                                  ("HPT-BN", "400:bn --init {{column}}"))},
        compare=[("HPT", "Base"), ("HPT", "Target"), ("HPT-BN", "Base"), ("HPT", "HPT-BN")]),
    "hpt-fraction": dict(  # the paper has 1% too: here 18 images, fewer than a batch
        title="HPT: a part of the target's images (sketch), linear probe",
        columns={**{f"{k}%": f"--fraction {k / 100:g} --eval linear" for k in (5, 10, 25)}, "100%": "--fraction 1"},
        rows=on_sketch("1500"),
        compare=[("HPT", "Target"), ("HPT-BN", "HPT")]),
}

# What the paper found, as contrasts of cells that are to be above 0: (study, added cells, cells taken away).
FINDINGS = {
    "0": ("More labels help supervised training, which no longer rises at its end: labels are what limits it",
          [("regime", [("random", a)], [("random", b)]) for a, b in (("100%", "50%"), ("50%", "20%"))]),
    "a": ("A student beats a control trained as long, with 20, 50 and 100% of the labels",
          [("table3", [("random, self-trained", c)], [("random, longer", c)]) for c in FRACTIONS]),
    "b": ("It does so under every augmentation",
          [(study, [("random, self-trained", c)], [("random, longer", c)])
           for study, few in (("table2", ("S1", "S2", "S3", "S4")), ("table2-20", ("S1", "S4"))) for c in few]),
    "c": ("The gain of pre-training shrinks as augmentation and labels grow",
          [*((study, [("pre-trained", "S1"), ("random", "S4")], [("random", "S1"), ("pre-trained", "S4")])
             for study in ("table2", "table2-20")),
           ("table3", [("pre-trained", "20%"), ("random", "100%")], [("random", "20%"), ("pre-trained", "100%")])]),
    "d": ("Self-training adds to pre-training",
          [("table3", [("pre-trained, self-trained", c)], [("pre-trained, longer", c)]) for c in FRACTIONS]),
    "e": ("Joint training and self-training together are best",
          [("table7", [(f"{i}, joint, self-trained", "20%")], [(i + other, "20%")])
           for i in ("random", "pre-trained") for other in (", longer", ", self-trained", ", joint, longer")]),
    "f": ("Loss normalisation makes alpha matter less: scores spread less over the alphas",
          [("alpha", [("self-trained, not normalised", "*")], [("self-trained", "*")])]),
    # of Reed et al.
    "g": ("HPT beats both Base and Target, trained as long, in the linear probe",
          [("hpt-linear", [(f"HPT, {n}", c)], [(other, c)]) for c in HPT_TARGETS
           for n in (400, 1500) for other in ("Base", f"Target, {n}")]),
    "h": ("It beats Target with a quarter of the steps on the target",
          [("hpt-linear", [("HPT, 400", c)], [("Target, 1500", c)]) for c in HPT_TARGETS]),
    "i": ("It does so with a fifteenth", [("hpt-linear", [("HPT, 100", c)], [("Target, 1500", c)]) for c in HPT_TARGETS]),
    "j": ("Batch norm alone (HPT-BN) helps the linear probe; for full fine-tuning all weights are better",
          [(study, [(a, c)], [(b, c)]) for c in HPT_TARGETS
           for study, a, b in (("hpt-linear", "HPT-BN, 400", "Base"), ("hpt-semi", "HPT, 400", "HPT-BN, 400"))]),
    "k": ("HPT loses less than Target when augmentations are taken away",
          [("hpt-augment", [("HPT", a), ("Target", "baseline")], [("HPT", "baseline"), ("Target", a)])
           for a in ("no-grey", "no-colour", "crop-blur", "crop")]),
    "l": ("A source on the way to the target adds to HPT (B+S+T against B+T), in fine-tuning",
          [("hpt-chain", [("B+S+T", c)], [("B+T", c)]) for c in HPT_TARGETS]),
}
