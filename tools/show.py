"""What the data and a run look like: pictures with boxes or masks, one self-contained report.

    python -m tools.show run runs/demo          first batches, pseudo-labels, curves, report.html
    python -m tools.show augment [--image FILE --json train.json | --image FILE --mask FILE.png]
    python -m tools.show figure runs/demo --out figure.jpg      teacher, pseudo-labels, student

The report can be mailed as one file: no scripts, nothing fetched. Its numbers were computed by
st.py. In masks class 0 shows the image as it is, and 255 (ignored) is white.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

import answers
import augment
import data
import recipes
import st
import util
from util import need

HUMAN, PSEUDO, NEUTRAL = "#1f6fb4", "#d9660d", "#5b6470"  # one meaning everywhere
# fmt: off
COLOURS = [  # of class k: k modulo 16
    "#e6194b", "#ffe119", "#4363d8", "#3cb44b", "#f032e6", "#42d4f4", "#f58231", "#bfef45",
    "#911eb4", "#fabed4", "#469990", "#9a6324", "#dcbeff", "#800000", "#aaffc3", "#000075"]
# fmt: on
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1c2126;max-width:1100px;margin:2em auto;
padding:0 1em}h2{margin-top:2em;border-bottom:1px solid #dde1e5}img{max-width:100%}
table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right}
tr>:first-child{text-align:left}pre{background:#f4f6f8;white-space:pre-wrap}.note{color:#5b6470}
svg{max-width:100%}text{font:11px sans-serif;fill:#3c444c}polyline{fill:none;stroke-width:1.7}
@media(prefers-color-scheme:dark){body{background:#16191d;color:#e4e7ea}pre{background:#23282e}
text{fill:#c3c9cf}}"""

# ---- pictures ------------------------------------------------------------------------------------


def draw_mask(image, mask):
    """The PIL image under its mask (h, w) uint8: class k > 0 in half of its colour, 255 white."""
    table = [(0, 0, 0)]
    table += [ImageColor.getrgb(COLOURS[(k - 1) % len(COLOURS)]) for k in range(1, 255)]
    colours = np.array([*table, (255, 255, 255)])
    share = np.full(mask.shape, 0.5)
    share[mask == 0] = 0
    share[mask == augment.IGNORE] = 0.7
    share = share[..., None]
    pixels = np.asarray(image.convert("RGB")) * (1 - share) + colours[mask] * share
    return Image.fromarray(pixels.astype(np.uint8))


def draw_boxes(image, target, class_names, scale=1):
    """A copy of the PIL image, enlarged by `scale`, over the mask of target if it has one, with
    every box, its class and its score where below 1."""
    size = [max(1, round(n * scale)) for n in image.size]
    image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if "mask" in target:
        mask = Image.fromarray(target["mask"]).resize(size, Image.Resampling.NEAREST)
        image = draw_mask(image, np.asarray(mask))
    pen = ImageDraw.Draw(image)
    tags = []
    scores = target.get("scores", np.ones(len(target["boxes"])))
    for box, k, score in zip(target["boxes"], target["labels"], scores):
        x0, y0, x1, y1 = (float(v) * scale for v in box)
        colour = COLOURS[int(k) % len(COLOURS)]
        far = (max(x1 - 1, x0), max(y1 - 1, y0))  # the far edge is exclusive
        pen.rectangle((x0, y0, *far), outline=colour, width=2)
        text = str(class_names[int(k)])[:20]
        if score < 1:
            text += f" {score:.2f}"
        tags.append((-score, x0, y0, text, colour))
    draw_tags(image, sorted(tags))
    return image


def draw_tags(image, tags):
    """Names on boxes, after all boxes so that no line crosses one, the surest first; a name moves
    down while another is in its place."""
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    taken = []
    for _, x, y, text, colour in tags:
        width = font.getlength(text) + 4
        x = max(0, min(x, image.width - width))
        y = y - 14 if y >= 14 else y
        for _ in range(4):
            if any(abs(y - v) < 13 and x < u + n and u < x + width for u, v, n in taken):
                y += 14
        taken.append((x, y, width))
        pen.rectangle((x, y, x + width, y + 14), fill=colour)
        r, g, b = ImageColor.getrgb(colour)
        ink = "white" if 0.3 * r + 0.59 * g + 0.11 * b < 120 else "black"
        pen.text((x + 2, y), text, fill=ink, font=font)


def sheet(tiles, class_names, columns=4):
    """Tiles [(image, target, caption, colour of the frame)] as one picture; small images are shown
    256 px wide, larger ones 384."""
    images = []
    for image, target, _, _ in tiles:
        side = 256 if max(image.size) <= 256 else 384
        images.append(draw_boxes(image, target, class_names, side / max(image.size)))
    w = max(image.width for image in images) + 10
    h = max(image.height for image in images) + 26
    columns = min(columns, len(tiles))
    size = (columns * w + 6, math.ceil(len(tiles) / columns) * h + 6)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for i, (image, (_, _, caption, colour)) in enumerate(zip(images, tiles)):
        x, y = 6 + i % columns * w, 6 + i // columns * h
        pen.rectangle((x, y, x + image.width + 3, y + image.height + 19), fill=colour)
        pen.text((x + 4, y + 2), caption, fill="white", font=font)
        picture.paste(image, (x + 2, y + 18))
    return picture


def save(picture, path):
    kind = "JPEG" if str(path).endswith((".jpg", ".jpeg")) else "PNG"
    util.write_atomic(path, lambda p: picture.save(p, kind, quality=85))


def batch_sheet(batch, parts, class_names):
    """A training batch, up to 24 images as augmented, its parts told apart."""
    tiles = []
    part = batch["part"].tolist()
    shown = [i for p in range(len(parts)) for i in range(len(part)) if part[i] == p]
    shown = [i for i in shown if sum(part[i] == part[j] for j in shown[: shown.index(i)]) < 12]
    for i in shown:
        real = batch["labels"][i] >= 0  # -1 is padding
        name = list(parts)[part[i]]
        target = {
            "boxes": batch["boxes"][i][real].numpy(),
            "labels": batch["labels"][i][real].numpy(),
        }
        caption = f"{name}, image {batch['image_id'][i]}"
        if "mask" in batch:
            target["mask"] = batch["mask"][i].numpy()
        if "image_class" in batch and batch["image_class"][i] >= 0:
            names = parts[name][0].class_names
            caption = f"{name}, {names[int(batch['image_class'][i])]}"
        colour = {"human": HUMAN, "pseudo": PSEUDO}.get(name, NEUTRAL)
        pixels = batch["images"][i].permute(1, 2, 0).contiguous().numpy()
        tiles.append((Image.fromarray(pixels), target, caption, colour))
    return sheet(tiles, class_names, 6)


# ---- a run, read back ----------------------------------------------------------------------------


def settings_of(run):
    """(Plan, Method) of a run of st.py."""
    path = Path(run, "config.json")
    need(path.exists(), f"{run} is no run of st.py: it has no config.json; give what --out named")
    config = json.loads(path.read_text())
    both = []
    for kind in (st.Plan, recipes.Method):
        names = {f.name for f in dataclasses.fields(kind)}
        both.append(kind(**{k: v for k, v in config.items() if k in names}))
    plan, c = both
    plan.out = str(run)
    plan.until = "teacher"  # st.load then passes over the unlabelled images
    return plan, c


def read_log(path):
    """{stage: [line]} by step; what a resumed stage logged twice is taken once."""
    log = {}
    if not path.exists():
        return log
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        rows = log.setdefault(line["stage"], [])
        while rows and rows[-1]["step"] >= line["step"]:
            rows.pop()
        rows.append(line)
    return log


def first_batches(run, plan, c, proc):
    """Draws the first batch of every training stage anew: a pure function of seed and step."""
    human, _, _, classified, _ = st.load(plan, c, proc)
    n = recipes.student_batch(c)
    paths = []
    stages = [p.parent for p in sorted(Path(run).glob("*/stage.json"))]
    for stage in stages:
        role = stage.name.rstrip("0123456789")
        if role not in ("teacher", "student", "control"):
            continue
        parts = {"human": (human, {"teacher": c.batch, "student": n, "control": 2 * n}[role])}
        if role == "student":
            store = stage.with_name(stage.name.replace("student", "pseudo"))
            store = Path(plan.pseudo) if plan.pseudo else store
            threshold = threshold_of(store, c)
            parts["pseudo"] = (answers.confident(store, threshold, human), n)
        if classified:
            parts["classified"] = (classified, c.batch if role == "teacher" else n)
        policy = c.aug if role == "teacher" else c.student_aug
        seed = st.stage_seed(c.seed, stage)
        batch = next(data.batches(parts, range(1), policy, c.image_size, seed, proc))
        paths.append(stage / "first_batch.png")
        save(batch_sheet(batch, parts, human.class_names), paths[-1])
    return paths


def threshold_of(store, c):
    if c.threshold == "auto":
        return util.read_stage(store)["result"]["threshold"]
    return float(c.threshold)


def pseudo_sheet(store, c, human, count=20):
    """Some of the images that keep a label, evenly spread."""
    pseudo = answers.confident(store, threshold_of(store, c), human)
    tiles = []
    for i in np.unique(np.linspace(0, len(pseudo) - 1, count).astype(int)).tolist():
        image, target = data.read(pseudo, i)
        caption = Path(pseudo.path(i)).name
        if "image_class" in target:
            caption = pseudo.class_names[target["image_class"]]
        tiles.append((image, target, caption, PSEUDO))
    return sheet(tiles, human.class_names, 5)


# ---- the report ----------------------------------------------------------------------------------


def chart(title, lines, x_label="step"):
    """Inline SVG from 0 up. lines: [(name, colour, [(x, y)])]."""
    points = [p for _, _, row in lines for p in row]
    if not points:
        return ""
    x1 = max(max(x for x, _ in points), 1)
    y1 = max(max(y for _, y in points), 1e-9)
    out = [f'<text x="40" y="14">{html.escape(title)}</text>']
    for share in (0, 0.5, 1):
        y = 190 - 150 * share
        out.append(f'<path stroke="#8885" d="M40 {y}H500"/>')
        out.append(f'<text x="36" y="{y + 4}" text-anchor="end">{y1 * share:.3g}</text>')
    out.append(f'<text x="500" y="206" text-anchor="end">{x_label} {x1:g}</text>')
    for k, (name, colour, row) in enumerate(lines):
        row = row[:: max(1, len(row) // 400)] + row[-1:]
        path = " ".join(f"{40 + 460 * x / x1:.1f},{190 - 150 * y / y1:.1f}" for x, y in row)
        out.append(f'<polyline stroke="{colour}" points="{path}"/>')
        out.append(
            f'<text x="{60 + 110 * k}" y="30" style="fill:{colour}">{html.escape(name)}</text>'
        )
    return f'<svg viewBox="0 0 520 214" width="520">{"".join(out)}</svg>'


def table(head, rows):
    out = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    for row in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        out += f"</tr>\n<tr>{cells}"
    return f"<table><tr>{out}</tr></table>"


def embedded(path):
    """A picture inside the page, as JPEG: a fraction of a PNG's size, and only to be looked at."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=85)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/jpeg;base64,{text}">'


def scores_html(results, metrics):
    rows = []
    for stage, result in results.items():
        rows.append([stage, *(f"{result[m]:.3f}" for m in metrics), f"{result['seconds']:.0f} s"])
    for stage in [s for s in results if s.startswith("student")]:
        for rival in ("teacher", stage.replace("student", "control")):
            if rival in results:
                gains = [f"{results[stage][m] - results[rival][m]:+.3f}" for m in metrics]
                rows.append([f"{stage} − {rival}", *gains, ""])
    note = (
        "On the validation set, one seed: how much they vary from seed to seed is unknown. The "
        "student trains for longer than its teacher: only student − control (--control) speaks for "
        "or against pseudo-labels."
    )
    return table(["", *metrics, ""], rows) + f'<p class="note">{note}</p>'


def report(run):
    """Writes RUN/report.html and the pictures in it -> their paths."""
    run = Path(run)
    plan, c = settings_of(run)
    proc = util.Proc()
    proc.log.quiet = True
    log = read_log(run / "log.jsonl")
    metrics = st.TASKS[c.task].metrics
    records = {p.parent.name: util.read_stage(p.parent) for p in run.glob("*/stage.json")}
    finished = {name: r["result"] for name, r in records.items() if "result" in r}
    scored = {name: finished[name] for name in log if metrics[0] in finished.get(name, {})}
    config = json.loads((run / "config.json").read_text())
    page = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f"<pre>{html.escape(config['command'])}</pre>",
    ]
    page += ["<h2>Scores</h2>", scores_html(scored, metrics) if scored else "<p>None yet.</p>"]
    colours = {"teacher": NEUTRAL, "student": PSEUDO, "control": HUMAN}
    losses = []
    curves = []
    for name, rows in log.items():
        colour = colours.get(name.rstrip("0123456789"), NEUTRAL)
        losses.append((name, colour, [(row["step"], row["loss"]) for row in rows if "loss" in row]))
        if len(scored.get(name, {}).get("curve", ())) > 1:
            curves.append((name, colour, scored[name]["curve"]))
    page += ["<h2>Training</h2>", chart("loss", [row for row in losses if row[2]])]
    page.append(chart(f"{metrics[0]} on the validation set", curves))
    pictures = first_batches(run, plan, c, proc)
    human = st.load(plan, c, proc)[0]
    for name in sorted(n for n in finished if n.startswith("pseudo")):
        page.append(f"<h2>Pseudo-labels: {name}</h2>")
        pictures.append(run / f"{name}_sheet.png")
        save(pseudo_sheet(run / name, c, human), pictures[-1])
        page.append(embedded(pictures[-1]))
        rows = [row for row in finished[name].get("held_out", ()) if row["kept"]]
        if rows:
            head = ["threshold", "precision", "recall", "f1", "kept"]
            page.append(table(head, [[f"{row[k]:.3g}" for k in head] for row in rows]))
            page.append('<p class="note">On labelled images held out of training.</p>')
    page.append("<h2>First batches</h2>")
    for path in pictures:
        if path.name == "first_batch.png":
            page += [f"<h3>{path.parent.name}</h3>", embedded(path)]
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{run.name}</title>'
    head += f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    text = head + "\n".join(page) + "</html>\n"
    util.write_atomic(run / "report.html", lambda p: p.write_text(text, encoding="utf-8"))
    return [run / "report.html", *pictures]


# ---- other pictures ------------------------------------------------------------------------------


def figure(run, path, count=4):
    """A row of `count` unlabelled images each for all that the teacher answers, what of it becomes
    pseudo-labels, and what the student answers over the same threshold."""
    run = Path(run)
    plan, c = settings_of(run)
    proc = util.Proc()
    human = st.load(plan, c, proc)[0]
    threshold = threshold_of(run / "pseudo", c)
    pseudo = answers.confident(run / "pseudo", threshold, human)
    every = answers.confident(run / "pseudo", threshold / 3, human)
    chosen = np.unique(np.linspace(0, len(pseudo) - 1, count).astype(int))
    pseudo = pseudo.subset(chosen)
    every = every.subset([every.ids.tolist().index(i) for i in pseudo.ids.tolist()])
    net, _ = st.restore(run / "student", proc)
    how = recipes.answering(c)
    task = st.TASKS[c.task]
    found = dict(task.answers(net, pseudo, range(len(pseudo)), c.image_size, proc, **how))
    tiles = []
    for i in range(len(pseudo)):
        tiles.append((*data.read(every, i), f"teacher, over {threshold / 3:.2f}", NEUTRAL))
    for i in range(len(pseudo)):
        tiles.append((*data.read(pseudo, i), f"pseudo-labels, over {threshold:.2f}", PSEUDO))
    for i in range(len(pseudo)):
        image, _ = data.read(pseudo, i)
        tiles.append((image, sure(found[i], threshold), "student", HUMAN))
    picture = sheet(tiles, human.class_names, count)
    if picture.width > 900:
        picture = picture.resize((900, round(picture.height * 900 / picture.width)))
    save(picture, path)


def sure(answer, threshold):
    """An answer as the target dict that draw_boxes shows."""
    if "mask" in answer:
        mask = np.where(answer["sure"] >= 200 * threshold, answer["mask"], augment.IGNORE)
        return {**data.nothing(0), "mask": mask.astype(np.uint8)}
    keep = answer["scores"] >= threshold
    return {name: answer[name][keep] for name in ("boxes", "labels", "scores")}


def augmented(args):
    """A sheet of one image under S1..S4: a row per policy, a column per draw."""
    target = {**data.nothing(0)}
    names = []
    if args.json:
        images = data.read_coco(args.json, Path(args.image).parent)
        at = [i for i in range(len(images)) if Path(images.path(i)).name == Path(args.image).name]
        need(at, f"{args.json} lists no image named {Path(args.image).name}")
        image, target = data.read(images, at[0])
        names = images.class_names
    elif args.image:
        image = data.read_image(args.image)
        if args.mask:
            target["mask"] = data.read_mask(args.mask, 255)
    else:
        images = data.coco("datasets/shapes/det", "train")
        image, target = data.read(images, args.seed)
        names = images.class_names
    size = args.size or min(max(image.size), 384)
    tiles = []
    for policy in ("s1", "s2", "s3", "s4"):
        low, high = augment.JITTER[policy]
        fitted = augment.fit(image, target, size)[:2]
        tiles.append((*fitted, f"original | {policy}: scale {low} to {high}", NEUTRAL))
        for k in range(args.draws):  # a column draws from the same seed in every row
            rng = np.random.default_rng((args.seed, k))
            out = augment.augment(image, target, policy, size, rng)
            tiles.append((*out, f"{policy}, draw {k + 1}", HUMAN))
    return sheet(tiles, names, args.draws + 1)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("run", usage=argparse.SUPPRESS).add_argument("run")
    p = sub.add_parser("figure", usage=argparse.SUPPRESS)
    p.add_argument("run")
    p.add_argument("--out", default="figure.jpg")
    p.add_argument("--images", type=int, default=4)
    p = sub.add_parser("augment", usage=argparse.SUPPRESS)
    p.add_argument("--image", help="[one of the embedded world's]")
    p.add_argument("--json", help="COCO annotation file with its boxes")
    p.add_argument("--mask", help="its index mask")
    p.add_argument("--size", type=int, help="training canvas [the longer side, 384 at most]")
    p.add_argument("--draws", type=int, default=6)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="augment.png")
    args = parser.parse_args(argv)
    if args.command == "run":
        print(*report(args.run), sep="\n")
    elif args.command == "figure":
        figure(args.run, args.out, args.images)
        print(args.out)
    else:
        need(args.image or not (args.json or args.mask), "--json and --mask need --image")
        try:
            save(augmented(args), args.out)
        except data.BadImage as error:
            raise util.UserError(f"{error}; give another file") from None
        print(args.out)


if __name__ == "__main__":
    util.run(main)
