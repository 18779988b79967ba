"""What runs and augmentation policies look like.

    python -m tools.show run runs/demo                        its report.html and pictures
    python -m tools.show figure runs/demo --out figure.jpg    teacher, pseudo-labels, student
    python -m tools.show augment                              an image under Augment-S1 .. S4
    python -m tools.show augment --image FILE --json train.json | --mask FILE

The report is one file without scripts, of a finished run or not. Boxes under the threshold are thin
and grey. In masks, class 0 shows the image as it is, and 255 (no label) is white.
"""

import argparse
import base64
import dataclasses
import html
import json
import math
import tempfile
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

PART_COLOURS = {"human": "#1f6fb4", "pseudo": "#d9660d", "classified": "#5b6470"}
HUMAN, PSEUDO, GREY = PART_COLOURS.values()
# fmt: off
CLASS_COLOURS = [  # class k: k modulo 16
    "#e6194b", "#ffe119", "#4363d8", "#3cb44b", "#f032e6", "#42d4f4", "#f58231", "#bfef45",
    "#911eb4", "#fabed4", "#469990", "#9a6324", "#dcbeff", "#800000", "#aaffc3", "#000075"]
# fmt: on
SHOWN = 16  # images of a sheet
DRAWS = 5  # of each policy
LOW = 0.15  # score from which the figure shows the teacher's answers
QUIET = util.Proc(log=util.Log(rank=1))
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1090px; margin: 2em auto; padding: 0 8px }
img, svg { max-width: 100% } pre { overflow-wrap: anywhere }
td, th { padding: .15em .8em; text-align: right; border-bottom: 1px solid #e6e9ec }
tr > :first-child { text-align: left } table { border-collapse: collapse }
.chosen { background: #fdeede } svg { width: 500px; font: 12px sans-serif }
polyline { fill: none; stroke-width: 1.6 } pre { background: #f4f6f8; white-space: pre-wrap }"""

# ---- pictures ------------------------------------------------------------------------------------


def class_colour(k):
    return ImageColor.getrgb(CLASS_COLOURS[k % len(CLASS_COLOURS)])


def draw_mask(image, mask):
    """The PIL image under its mask (h, w) uint8: class k > 0 in half of its colour, 255 white."""
    colours = np.array([class_colour(k - 1) for k in range(256)], float)
    colours[augment.IGNORE] = 255
    cover = np.full(256, 0.5)
    cover[0] = 0
    cover[augment.IGNORE] = 0.7
    cover = cover[mask][..., None]  # (h, w, 1)
    pixels = np.asarray(image.convert("RGB")) * (1 - cover) + colours[mask] * cover
    return Image.fromarray(pixels.astype(np.uint8))


def draw_boxes(image, target, class_names, scale=1.0, sure=0.0, font_size=12):
    """A copy of the PIL image, enlarged, with the boxes of target, their classes and their scores
    below 1, over the mask of target if it has one. Boxes of a score below `sure` are faint."""
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if "mask" in target and target["mask"].dtype == np.uint8:  # else a map of objects
        mask = Image.fromarray(target["mask"]).resize(size, Image.Resampling.NEAREST)
        image = draw_mask(image, np.asarray(mask))
    pen = ImageDraw.Draw(image)
    names = []
    for k in np.argsort(target["scores"], kind="stable"):  # the surest on top
        score = target["scores"][k]
        x0, y0, x1, y1 = (target["boxes"][k] * scale).tolist()
        corners = [x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)]  # the far edge is exclusive
        if score < sure:
            pen.rectangle(corners, outline="#444444", width=2)
            pen.rectangle(corners, outline="#f4f4f4")  # two lines, to be seen on any ground
            continue
        label = int(target["labels"][k])
        pen.rectangle(corners, outline=class_colour(label), width=2)
        text = str(class_names[label])[:20]
        if score < 1:
            text += f" {score:.2f}"
        names.insert(0, (x0, y0, text, class_colour(label)))
    write_names(image, names, font_size)  # after all boxes, so that no line crosses a name
    return image


def write_names(image, names, font_size):
    """Names [(x, y, text, colour)] of boxes; one moves down while another is in its place."""
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(font_size)
    height = font_size + 2
    taken = []
    for x, y, text, colour in names:
        width = font.getlength(text) + 4
        x = max(0, min(x, image.width - width))
        if y >= height:
            y -= height
        for _ in range(4):
            if any(abs(y - v) < height and x < u + n and u < x + width for u, v, n in taken):
                y += height
        taken.append((x, y, width))
        pen.rectangle((x, y, x + width, y + height), fill=colour)
        bright = np.dot(colour, (0.30, 0.59, 0.11)) > 120
        pen.text((x + 2, y), text, fill="black" if bright else "white", font=font)


def grid(pictures, columns, gap=6, top=0):
    """Pictures in rows on white, under `top` free pixels."""
    columns = min(columns, len(pictures))
    w = max(picture.width for picture in pictures) + gap
    h = max(picture.height for picture in pictures) + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * w + gap, top + rows * h + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * w, top + gap + i // columns * h))
    return sheet


def save_sheet(path, tiles, class_names, columns=4, sure=0.0):
    """Writes tiles [(image, target, caption, colour of the frame)] as a PNG or JPEG. Pictures are
    shown 256 px wide; those that are larger, and tend to hold more, 384."""
    font = ImageFont.load_default(12)
    pictures = []
    for image, target, caption, colour in tiles:
        side = 256 if max(image.size) <= 256 else 384
        image = draw_boxes(image, target, class_names, side / max(image.size), sure)
        frame = Image.new("RGB", (image.width + 4, image.height + 20), colour)
        ImageDraw.Draw(frame).text((4, 2), caption, fill="white", font=font)
        frame.paste(image, (2, 18))
        pictures.append(frame)
    save(path, grid(pictures, columns))


def save(path, image):
    kind = "PNG" if Path(path).suffix == ".png" else "JPEG"
    util.write_atomic(path, lambda p: image.save(p, kind, quality=90, subsampling=0))


# ---- a run ---------------------------------------------------------------------------------------


def open_run(run):
    """-> config.json, the Plan and the Method in it, labelled and classified Images."""
    path = Path(run, "config.json")
    need(path.exists(), f"{run} is no run of st.py (no config.json); give what --out named")
    config = json.loads(path.read_text())
    parts = []
    for kind in (st.Plan, recipes.Method):
        names = {f.name for f in dataclasses.fields(kind)} & config.keys()
        parts.append(kind(**{name: config[name] for name in names}))
    plan, c = parts
    split = Path(run, "split.json")
    if split.exists():
        plan.split = str(split)
    load = dataclasses.replace(plan, out=str(run), until="teacher")  # no look at unlabelled images
    human, _, _, classified, _ = st.load(load, c, QUIET)
    return config, plan, c, human, classified


def read_log(path):
    """{stage: {step: line}} of stages that train. Steps that were repeated after a kill replace the
    first attempt."""
    log = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        if text.endswith("}") and '"loss"' in text:  # else cut off by a kill, or of labelling
            line = json.loads(text)
            log.setdefault(line["stage"], {})[line["step"]] = line
    return log


def first_batch(folder, plan, c, human, classified):
    """Tiles of the first step of the stage in `folder`, with the parts that st.self_train gives it.
    They are drawn again: a batch is a function of seed, part, step and slot."""
    n = recipes.student_batch(c)
    policy = c.student_aug
    parts = {"human": (human, n)}
    if folder.name == "teacher":
        parts = {"human": (human, c.batch)}
        policy = c.aug
    elif folder.name.startswith("control"):
        parts = {"human": (human, 2 * n)}
    else:
        store = plan.pseudo or folder.with_name(folder.name.replace("student", "pseudo"))
        parts["pseudo"] = st.confident(store, c, human, QUIET)[0], n
    if classified:
        parts["classified"] = classified, c.batch if folder.name == "teacher" else n
    seed = st.stage_seed(c.seed, folder)
    images = data.TrainImages(parts, policy, c.image_size, seed)
    keys = data.step_keys(parts, 0, seed, QUIET)
    tiles = []
    for part, (of_part, _) in parts.items():
        for key in [key for key in keys if key[0] == part][: SHOWN // len(parts)]:
            image, target = images[key]
            caption = f"{part}, image {target['image_id']}"
            if "image_class" in target:
                caption += f", {of_part.class_names[target['image_class']]}"
            tiles.append((image, target, caption, PART_COLOURS[part]))
    return tiles


def evenly(n, count):
    """Up to `count` of n positions, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def pseudo_tiles(store, threshold, pseudo, human):
    """Tiles of a store of answers; boxes down to half of the threshold."""
    images = pseudo
    if human.boxes is not None:
        images = answers.confident(store, threshold / 2, human)
    tiles = []
    for i in np.searchsorted(images.ids, pseudo.ids[evenly(len(pseudo), SHOWN)]):
        image, target = data.read(images, i)
        caption = Path(images.path(i)).name
        if "image_class" in target:
            caption = f"{images.class_names[target['image_class']]}, {caption}"
        if "mask" in target:
            tiles.append((image, data.nothing(0), caption, GREY))
        tiles.append((image, target, caption, PSEUDO))
    return tiles


# ---- the report ----------------------------------------------------------------------------------


def report(run):
    """Writes RUN/report.html and its pictures, RUN/STAGE.jpg -> their paths."""
    run = Path(run)
    config, plan, c, human, classified = open_run(run)
    log = read_log(run / "log.jsonl")
    name = html.escape(run.resolve().name)
    page = [
        f'<!DOCTYPE html><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>',
        f"<h1>{name}</h1><pre>{html.escape(config['command'])}</pre>",
    ]
    results = {stage: util.read_stage(run / stage).get("result", {}) for stage in log}
    page.append(scores(results, st.TASKS[c.task].metrics))
    losses = {stage: smooth(lines) for stage, lines in log.items()}
    page.append(chart("loss by step, mean over 11 lines of the log", losses))
    scored = {stage: result.get("curve", []) for stage, result in results.items()}
    page.append(chart("score by step, see --eval-every", scored))
    pictures = []
    for stage in log:
        pictures.append(run / f"{stage}.jpg")
        tiles = first_batch(run / stage, plan, c, human, classified)
        save_sheet(pictures[-1], tiles, human.class_names)
        page.append(f"<h2>First batch: {stage}</h2>{embedded(pictures[-1])}")
    stores = [Path(plan.pseudo)] if plan.pseudo else run.glob("pseudo*/")
    for store in sorted(stores, key=lambda store: (len(store.name), store.name)):
        pictures.append(run / f"{store.name}.jpg")
        page.append(f"<h2>Pseudo-labels: {store.name}</h2>")
        page += pseudo_labels(store, c, human, pictures[-1])
    text = "\n".join(page)
    util.write_atomic(run / "report.html", lambda p: p.write_text(text, encoding="utf-8"))
    return [path for path in (run / "report.html", *pictures) if path.exists()]


def table(head, rows, chosen=None):
    """chosen: the first cell of the row that is marked."""
    lines = ["<tr>" + "".join(f"<th>{cell}" for cell in head)]
    for row in rows:
        mark = ' class="chosen"' if row[0] == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}" for cell in row))
    return "<table>" + "\n".join(lines) + "</table>"


def embedded(path):
    code = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.name}" src="data:image/jpeg;base64,{code}">'


def scores(results, metrics):
    """The table of scores, and what the student gains over its teacher and its control."""
    done = {stage: result for stage, result in results.items() if metrics[0] in result}
    rows = []
    for stage, result in done.items():
        values = [f"{result[m]:.3f}" if result[m] >= 0 else "-" for m in metrics]  # -1: undefined
        rows.append([stage, *values, f"{result['seconds']:.0f}"])
    for stage in done:
        for base in ("teacher", stage.replace("student", "control")):
            if stage.startswith("student") and base in done:
                gains = [f"{done[stage][m] - done[base][m]:+.3f}" for m in metrics]
                rows.append([f"{stage} − {base}", *gains, ""])
    return (
        table(["validation", *metrics, "seconds"], rows) + "<p>Of one seed. Only student − control "
        "is what pseudo-labels did: student − teacher is longer training, too (see --control)."
    )


def smooth(lines):
    """[(step, mean loss of the lines around)]."""
    loss = np.array([line["loss"] for line in lines.values()])
    return [(step, loss[max(i - 5, 0) : i + 6].mean()) for i, step in enumerate(lines)]


def chart(title, lines):
    """Inline SVG of {name: [(x, y)]}, both axes from 0 on; nothing if no line has two points."""
    if max(map(len, lines.values()), default=0) < 2:
        return ""
    left, right, top, bottom = 50, 480, 40, 200
    xs, ys = np.array([point for points in lines.values() for point in points], float).T
    width, height = max(xs), np.quantile(ys, 0.98) * 1.1 or 1  # first losses may be far higher
    svg = [f'<text x="{left}" y="14">{title}</text>']
    for share in (0, 0.5, 1):
        x, y = left + share * (right - left), bottom - share * (bottom - top)
        svg.append(f'<path stroke="#d5dade" d="M{left} {y}H{right}"/>')
        svg.append(
            f'<text text-anchor="end" x="{left - 5}" y="{y + 4}">{share * height:.3g}</text>'
        )
        svg.append(f'<text text-anchor="middle" x="{x}" y="216">{share * width:.6g}</text>')
    for k, (name, points) in enumerate(lines.items()):
        colour = [HUMAN, PSEUDO, GREY, *CLASS_COLOURS][k % 19]
        x = left + np.array([x for x, _ in points]) / width * (right - left)
        y = bottom - np.clip([y / height for _, y in points], 0, 1) * (bottom - top)
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y))
        svg.append(f'<polyline stroke="{colour}" points="{path}"/>')
        svg.append(f'<text fill="{colour}" x="{left + 80 * k}" y="32">{name}</text>')
    return '<svg viewBox="0 0 500 224">' + "\n".join(svg) + "</svg>"


def pseudo_labels(store, c, human, path):
    """What the teacher says: how right it is, how much of it is kept, how it looks."""
    record = util.read_stage(store).get("result")
    if not record:
        count = sum(1 for part in answers.answer_parts(store) for _ in open(part))
        yield f"<p>Not finished: {count} images answered so far."
        return
    rows = []
    for row in record.get("held_out", ()):
        if row["kept"]:
            measured = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
            rows.append([f"{row['threshold']:.2f}", *measured, row["kept"]])
    if rows:
        yield "<p>Teacher on labelled images that it was not trained on:"
        head = ["threshold", "precision", "recall", "F1", "boxes kept"]
        yield table(head, rows, chosen=f"{record['threshold']:.2f}")
    try:
        pseudo, account = st.confident(store, c, human, QUIET)
    except util.UserError as error:  # too few labels, or of one class
        yield f"<p>{html.escape(str(error))}"
        return
    threshold = account["threshold"]
    yield f"<p>{len(pseudo)} of {account['images']} images have a label from {threshold:g} on.<p>"
    tiles = pseudo_tiles(store, threshold, pseudo, human)
    save_sheet(path, tiles, human.class_names, sure=threshold)
    yield embedded(path)


# ---- other pictures ------------------------------------------------------------------------------


def figure(run, out, count):
    """Teacher, pseudo-labels and student on unlabelled images, evenly spread over those with a
    pseudo-label, as one picture 900 px wide at most."""
    _, plan, c, human, _ = open_run(run)
    store = plan.pseudo or Path(run, "pseudo")
    pseudo, account = st.confident(store, c, human, QUIET)
    threshold = account["threshold"]
    low = min(LOW, threshold)
    teacher = answers.confident(store, low, human)
    chosen = pseudo.subset(evenly(len(pseudo), count))
    net, _ = st.restore(Path(run, "student"), QUIET)
    with tempfile.TemporaryDirectory() as place:
        found = answers.Answers(place, chosen, QUIET)
        task = st.TASKS[c.task]
        how = recipes.answering(c)
        for i, answer in task.answers(net, chosen, found.missing, c.image_size, QUIET, **how):
            found.add(i, answer)
        student = answers.confident(place, threshold, human)
        pictures = []
        for i, key in enumerate(chosen.ids):
            image, _ = data.read(chosen, i)
            scale = 286 / max(image.size)
            for images, wanted in ((teacher, key), (pseudo, key), (student, i)):
                target = data.nothing(0)
                for at in np.flatnonzero(images.ids == wanted):  # none if nothing is over it
                    target = images.read(at)[1]
                drawn = draw_boxes(image, target, human.class_names, scale, threshold, 14)
                if "image_class" in target:
                    name = human.class_names[target["image_class"]]
                    write_names(drawn, [(0, 0, name, ImageColor.getrgb(PSEUDO))], 14)
                pictures.append(drawn)
    sheet = grid(pictures, 3, gap=8, top=24)
    font = ImageFont.load_default(17)
    titles = (
        f"teacher: from {low:g} on",
        f"pseudo-labels: from {threshold:g} on",
        f"student: from {threshold:g} on",
    )
    for k, title in enumerate(titles):
        x = 8 + k * (sheet.width - 8) // 3
        ImageDraw.Draw(sheet).text((x, 5), title, fill="black", font=font)
    save(out, sheet)


def one_image(image_file, json_file, mask_file):
    """Images of one: a file with its boxes or its mask, or (None) one of the embedded world."""
    if not image_file:
        return data.coco(st.TASKS["det"].root, "train").subset([0])
    if json_file:
        images = data.read_coco(json_file, Path(image_file).parent)
        name = Path(image_file).name
        rows = [i for i in range(len(images)) if Path(images.path(i)).name == name]
        need(rows, f"{json_file} lists no image named {name}; give the one that does")
        return images.subset(rows[:1])
    images = data.listed(image_file, "--image")
    if mask_file:
        masks = data.as_bytes([Path(mask_file).resolve()])
        images = dataclasses.replace(images, masks=masks, class_names=[""] * augment.IGNORE)
    return images


def augment_sheet(out, images):
    """A row for each policy; a column draws from the same seed in every row."""
    try:
        image, target = images.read(0)
    except data.BadImage as error:
        raise util.UserError(f"{error}; give another file") from None
    size = min(max(image.size), 384)
    plain = augment.fit(image, target, size)[:2]
    tiles = []
    for policy in ("s1", "s2", "s3", "s4"):
        low, high = augment.JITTER[policy]
        tiles.append((*plain, f"original | {policy}: scale {low} to {high}", GREY))
        for k in range(DRAWS):
            rng = np.random.default_rng((0, k))
            drawn = augment.augment(image, target, policy, size, rng)
            tiles.append((*drawn, f"{policy}, draw {k + 1}", HUMAN))
    save_sheet(out, tiles, images.class_names, DRAWS + 1)


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["run", "figure", "augment"])
    parser.add_argument("run", nargs="?", help="run directory of st.py")
    parser.add_argument("--out", help="[figure.jpg, augment.png]")
    parser.add_argument("--images", type=int, default=4, help="of figure [4]")
    parser.add_argument("--image", help="of augment [one of the embedded world]")
    parser.add_argument("--json", help="COCO file with the boxes of --image")
    parser.add_argument("--mask", help="index PNG with the classes of --image")
    args = parser.parse_args(argv)
    need(args.run or args.what == "augment", f"{args.what} needs a run such as runs/demo")
    if args.what == "run":
        written = report(args.run)
    elif args.what == "figure":
        written = [args.out or "figure.jpg"]
        figure(args.run, written[0], args.images)
    else:
        written = [args.out or "augment.png"]
        augment_sheet(written[0], one_image(args.image, args.json, args.mask))
    print(*written, sep="\n")


if __name__ == "__main__":
    util.run(main)
