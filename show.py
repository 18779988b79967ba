"""What the data and a run look like: pictures with boxes or masks, and one self-contained report.html per run.

    python show.py augment [--image FILE --json train.json]     one image under Augment-S1..S4 -> augment.png
    python show.py augment --mask [FILE.png --image FILE]       the same with its segmentation mask
    python show.py run runs/default                             builds report.html of a run again, finished or not

The report holds its images and curves inside itself, has no scripts and fetches nothing: it can be mailed as one file.
Its numbers were computed by st.py. What a run does not have (yet) is left out. In masks, class 0 shows the image as it is and 255
(ignored) is white.
"""
import argparse
import base64
import html
import io
import json
import math
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

import augment
import data
import runs
import util
import voc
import world

HUMAN, PSEUDO, OTHER = "#1f6fb4", "#d9660d", "#5b6470"  # the same in sheets and curves
CLASS_COLOURS = ["#e6194b", "#ffe119", "#4363d8", "#3cb44b", "#f032e6", "#42d4f4", "#f58231", "#bfef45", "#911eb4",
                 "#fabed4", "#469990", "#9a6324", "#dcbeff", "#800000", "#aaffc3", "#000075"]  # class k: k modulo 16
COLUMNS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
SCORES = {  # by a metric that tells: columns, what they are, scores class by class
    "mIoU": (["mIoU", "accuracy"], "IoU of pixels, its mean over classes, and the share of pixels that are right,", "IoU"),
    "balanced": (["accuracy", "balanced"], "Share of images whose likeliest class is right, its mean over classes, and of each "
                 "class (the first 30),", "per_class"),
    "AP": (COLUMNS, "COCO metrics", "")}
CURVES = [  # title, y label, [(name, colour, opacity, what of the log is added up)]
    ("loss: single steps (pale), running average", "classes + boxes", [
        ("", HUMAN, .35, ["cls", "box"]), ("", PSEUDO, .35, ["cls_pseudo", "box_pseudo"]),
        ("human", HUMAN, 1, ["avg"]), ("pseudo", PSEUDO, 1, ["avg_pseudo"]), ("joint", OTHER, 1, ["avg_joint"])]),
    ("its terms, single steps", "loss", [("cls", HUMAN, 1, ["cls"]), ("box", HUMAN, .4, ["box"]),
        ("cls pseudo", PSEUDO, 1, ["cls_pseudo"]), ("box pseudo", PSEUDO, .4, ["box_pseudo"])]),
    ("learning rate", "lr", [("", OTHER, 1, ["lr"])]),
]
MASK_CURVES = [("loss: single steps (pale), running average", "cross-entropy", [
    ("", HUMAN, .35, ["ce"]), ("", PSEUDO, .35, ["ce_pseudo"]), *CURVES[0][2][2:]]), CURVES[2]]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1c2126;max-width:1180px;margin:2em auto;padding:0 1.2em}
h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid #dde1e5}.row{display:flex;flex-wrap:wrap;gap:14px}
td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #eceff1}tr.chosen{background:#fdeede;font-weight:600}
tr>:first-child{text-align:left}pre{background:#f4f6f8;white-space:pre-wrap;overflow-wrap:anywhere}.columns{columns:3}
.note{color:#5b6470}table{border-collapse:collapse}img{max-width:100%}figure{margin:0;width:380px;max-width:100%}
polyline{fill:none;stroke-width:1.7}text{font:11px sans-serif;fill:#3c444c}.t{font-weight:600}.c{text-anchor:middle}
.e{text-anchor:end}.a{stroke:#8b949d}.g{stroke:#e6e9ec}path.m{stroke:#b3261e;stroke-dasharray:4}text.m{fill:#b3261e}"""


# ---- pictures and curves -----------------------------------------------------------------------------------------

def draw_mask(image, mask):
    """The PIL image under its mask (h, w) uint8: class k > 0 in half of its colour, 255 in white."""
    colours = np.array([(0, 0, 0)] + [ImageColor.getrgb(CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)]) for k in range(1, 255)]
                       + [(255, 255, 255)])
    share = np.where(mask == 0, 0, np.where(mask == 255, .7, .5))[..., None]
    return Image.fromarray((np.asarray(image.convert("RGB")) * (1 - share) + colours[mask] * share).astype(np.uint8))


def draw_boxes(image, target, class_names, scale=1, faint=()):
    """A copy of the PIL image, enlarged by `scale`, with every box of target, its class and its score where below 1, over
    the mask of target if it has one. faint: boxes (M, 4) xyxy to be drawn in thin white and grey."""
    image = image.convert("RGB").resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.LANCZOS)
    if "mask" in target:
        image = draw_mask(image, np.asarray(Image.fromarray(target["mask"]).resize(image.size, Image.Resampling.NEAREST)))
    pen, font, tags = ImageDraw.Draw(image), ImageFont.load_default(12), []
    for x0, y0, x1, y1 in np.asarray(faint, float).reshape(-1, 4) * scale:  # two lines, to be seen on any ground
        pen.rectangle((x0, y0, x1, y1), outline="#f4f4f4")
        pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline="#444444")
    for box, k, score in zip(target["boxes"], target["labels"], target.get("scores", np.ones(len(target["boxes"])))):
        x0, y0, x1, y1 = (float(v) * scale for v in box)
        colour = CLASS_COLOURS[int(k) % len(CLASS_COLOURS)]
        pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)  # the far edge is exclusive
        tags.append((-score, x0, y0, str(class_names[int(k)])[:20] + (f" {score:.2f}" if score < 1 else ""), colour))
    taken = []
    for _, x, y, text, colour in sorted(tags):  # after all boxes, so that no line crosses a name; the surest first
        w = font.getlength(text) + 4
        x, y = max(0, min(x, image.width - w)), y - 14 if y >= 14 else y
        for _ in range(4):  # a name moves down while another is in its place
            y += 14 if any(abs(y - v) < 13 and x < u + n and u < x + w for u, v, n in taken) else 0
        taken.append((x, y, w))
        pen.rectangle((x, y, x + w, y + 14), fill=colour)
        r, g, b = ImageColor.getrgb(colour)
        pen.text((x + 2, y), text, fill="white" if 0.3 * r + 0.59 * g + 0.11 * b < 120 else "black", font=font)
    return image


def save_sheet(path, tiles, class_names, columns=4):
    """Writes tiles [(image, target, caption, colour of the frame)] as a PNG; target["faint"] as in draw_boxes. Pictures
    are shown 256 px wide; those that are larger, and tend to hold more, 384."""
    images = [draw_boxes(image, target, class_names, (256 if max(image.size) <= 256 else 384) / max(image.size),
                         target.get("faint", ())) for image, target, _, _ in tiles]
    w, h = max(image.width for image in images) + 10, max(image.height for image in images) + 26
    columns, font = min(columns, len(tiles)), ImageFont.load_default(12)
    sheet = Image.new("RGB", (columns * w + 6, math.ceil(len(tiles) / columns) * h + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, (_, _, caption, colour)) in enumerate(zip(images, tiles)):
        x, y = 6 + i % columns * w, 6 + i // columns * h
        pen.rectangle((x, y, x + image.width + 3, y + image.height + 19), fill=colour)
        pen.text((x + 4, y + 2), caption, fill="white", font=font)  # if too long: cut by the next tile
        sheet.paste(image, (x + 2, y + 18))
    runs.write_atomic(path, lambda p: sheet.save(p, "PNG"))


def batch_sheet(batch, class_names, path):
    """One training batch of data.train_loader as a PNG: up to 24 images, as augmented, its parts told apart."""
    human, pseudo, joint = ((batch["part"] == p).nonzero().flatten().tolist() for p in (0, 1, 2))
    rows = human[:max(8, 16 - len(pseudo))] + pseudo[:max(8, 16 - len(human))]  # half each, unless one has less to show
    rows += joint[:8]
    tiles = []
    for i in rows:
        real = batch["labels"][i] >= 0  # -1 is padding
        target = {"boxes": batch["boxes"][i][real].numpy(), "labels": batch["labels"][i][real].numpy()}
        if "masks" in batch:
            target["mask"] = batch["masks"][i].numpy()
        name, colour = [("human", HUMAN), ("pseudo", PSEUDO), ("joint", OTHER)][int(batch["part"][i])]
        k = int(batch["image_class"][i]) if "image_class" in batch else -1  # -1: it has boxes or a mask
        what = f"image {int(batch['image_id'][i])}" if k < 0 else f"class {k}" if name == "joint" else class_names[k]
        tiles.append((Image.fromarray(batch["images"][i].permute(1, 2, 0).contiguous().numpy()), target,
                      f"{name}, {what}", colour))
    save_sheet(path, tiles, class_names)


def ticks(low, high):
    """About five round numbers within [low, high]."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if m * unit >= (high - low) / 5.5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, lines, x_label, y_label, log=False, mark=None):
    """Inline SVG. lines: [(name, colour, opacity, [(x, y)])], a y not finite is left out; the y axis starts at 0, or
    with log at one half, so that a count of 1 can be seen. mark: (x, text) of a vertical line."""
    left, right, top, bottom = 58, 368, 40, 188
    lines = [(*look, [(x, max(y, .5) if log else y) for x, y in points if math.isfinite(y)]) for *look, points in lines]
    xs, ys = ([point[axis] for *_, points in lines for point in points] for axis in (0, 1))
    x0, x1, height = min(xs), max([*xs, min(xs) + 1]), max(ys) or 1

    def at(x, y):
        y = math.log(2 * y) / math.log(4 * height) if log else y / height
        return round(left + (x - x0) / (x1 - x0) * (right - left), 1), round(bottom - y * (bottom - top), 1)

    def text(kind, x, y, words):
        return f'<text class="{kind}" x="{x}" y="{y}">{html.escape(words)}</text>'

    out = [text("t", left, 14, title), text("c", (left + right) / 2, 222, x_label),
           f'<g transform="translate(11 114) rotate(-90)">{text("c", 0, 0, y_label)}</g>']
    for y in [10 ** e for e in range(int(math.log10(max(height, 1))) + 1)] if log else ticks(0, height):
        at_y = at(x0, y)[1]
        out += [f'<path class="g" d="M{left} {at_y}H{right}"/>', text("e", left - 5, at_y + 4, f"{y:.6g}")]
    out += [text("c", at(x, height)[0], bottom + 16, f"{x:.6g}") for x in ticks(x0, x1)]
    for i, (name, colour, opacity, points) in enumerate(line for line in lines if line[3]):
        points = points[::max(1, len(points) // 800)] + points[-1:]  # a long run has more points than there are pixels
        pen = f'stroke="{colour}" stroke-opacity="{opacity}"'
        out.append(f'<polyline points="{" ".join("%s,%s" % at(*point) for point in points)}" {pen}/>')
        if name:
            x = left + 75 * i
            out += [f'<polyline points="{x},26 {x + 12},26" {pen}/>', text("", x + 16, 30, name)]
    if mark:
        x, (kind, gap) = at(mark[0], height)[0], ("m e", -4) if mark[0] > (x0 + x1) / 2 else ("m", 4)
        out += [f'<path class="m" d="M{x} {top}V{bottom}"/>', text(kind, x + gap, top + 10, mark[1])]
    return '<figure><svg viewBox="0 0 380 230">' + "\n".join(out) + '<path class="a" d="M58 188H368"/></svg></figure>'


def outline(counts, low, width):
    """Points along the top of a histogram's bars, from the ground and back to it."""
    edges = [low + width * i for i in range(len(counts) + 1)]
    return [(edges[0], 0), *((x, n) for i, n in enumerate(counts) for x in edges[i:i + 2]), (edges[-1], 0)]


# ---- the report --------------------------------------------------------------------------------------------------

def stored(path):
    """The json object in a file; {} when there is none or not yet a whole one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def read_log(path):
    """{stage: [line]} by step. A resumed or restarted stage goes back, and what it logged beyond is void; torn lines are
    passed over."""
    log = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            rows = log.setdefault(line["stage"], [])
            while rows and rows[-1]["step"] >= line["step"]:
                rows.pop()
            rows.append(line)
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            continue
    return log


def labelled_counts(run, config):
    """{class name: boxes} in the labelled images of the run; {} where its data set is not to be found."""
    try:
        root = Path(config["root"]) / "det" if config["data"] == "shapes" else config["root"]
        train = data.load_coco(*data.coco_layout(root)[:2])
        part = train.subset(np.flatnonzero(np.isin(train.ids, stored(run / "split.json")["labeled"])))
    except (util.UserError, KeyError):
        return {}
    return dict(zip(part.class_names, np.bincount(part.labels, minlength=len(part.class_names)).tolist()))


def table(head, rows, chosen=None):  # the first cell of the row to be marked
    out = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    for row in rows:
        out += '</tr>\n<tr class="chosen">' if row[0] == chosen else "</tr>\n<tr>"
        out += "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
    return f"<table><tr>{out}</tr></table>"


def note(text):
    return f'<p class="note">{html.escape(text)}</p>'


def picture(path, alt):
    """The image inside the page. JPEG: a fraction of the PNG's size, and only to be looked at."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def results_html(results):
    if not results:
        return "<h2>Results</h2>" + note("No stage has been scored yet.")

    def cells(values, form):  # NaN: no object of that size in the data set
        return ["-" if math.isnan(v) else format(v, form) for v in values]

    first = next(iter(results.values()))
    columns, text, classes = next(row for key, row in SCORES.items() if key in first)
    columns = columns + list(first.get(classes, ()))[:30]
    values = {name: {**{k: math.nan if v is None else v for k, v in r.get(classes, {}).items()}, **r}
              for name, r in results.items()}
    scores = {name: np.array([math.nan if r[m] < 0 else r[m] for m in columns]) for name, r in values.items()}
    rows = [[name, *cells(scores[name], ".3f"), f"{r['seconds']:.0f}"] for name, r in results.items()]
    for name in [name for name in results if name.startswith("student")]:
        for other in [o for o in ("teacher", name.replace("student", "control")) if o in results]:
            rows.append([f"{name} − {other}", *cells(scores[name] - scores[other], "+.3f"), ""])
    text += " on the validation set, 0 to 1, of one seed: how much they vary from seed to seed is unknown. "
    if any(name.startswith("control") for name in results):
        text += ("The control trains on from the student's start for as many steps and images per step, on human labels"
                 " only: student − control, not student − teacher, speaks for or against the pseudo-labels.")
    elif len(results) > 1:
        text += ("The student has trained for longer than the teacher, so this difference alone does not show that "
                 "pseudo-labels helped; --control trains the comparison that does.")
    return "<h2>Results</h2>" + table(["", *columns, "seconds"], rows) + note(text)


def training_html(stage, lines, first_batch, result):
    last = lines[-1]
    text = f"step {last['step']} of {last['of']}, {last['images_s']:.1f} images/s"
    text += f", {last['waiting']:.0%} of the time waiting for data" if "waiting" in last else ""
    out = [f"<h3>{html.escape(stage)}</h3>", note(text), '<div class="row">']
    for title, label, curves in CURVES if "cls" in last else MASK_CURVES if "ce" in last else ():  # labelling has no loss
        out.append(chart(title, [(*look, [(row["step"], sum(row.get(k, math.nan) for k in keys)) for row in lines])
                                 for *look, keys in curves], "step", label))
    if len(curve := (result or {}).get("curve", [])) > 1:  # --eval-every
        metric = next(m for m in result if result[m] == curve[-1][1])
        out.append(chart(f"{metric} on the validation set", [("", HUMAN, 1, curve)], "step", metric))
    out += ["</div>", picture(first_batch, "first batch") if first_batch.exists() else ""]
    return "".join(out)


def audit_html(folder, sheet_path, labelled):
    """What the teacher has labelled. labelled: {class: boxes} of the human labels, {} if unknown."""
    out = [f"<h2>Pseudo-labels: {html.escape(folder.name)}</h2>"]
    result = stored(folder / "stage.json").get("result")
    if result and "kept" in result:
        return out[0] + (masks_html if "with_pixels" in result else classes_html)(folder, sheet_path, result)
    pseudo = data.load_coco(folder / "pseudo.json", result["root"]) if result else ()
    n, threshold = (max(result["images"], 1), result["threshold"]) if result else (1, 0)
    scores, kept, faint = np.zeros(20, dtype=np.int64), Counter(), {}
    shown = np.unique(np.linspace(0, len(pseudo) - 1, 20).astype(int)).tolist() if len(pseudo) else []
    shown = {int(pseudo.ids[k]) - 1: k for k in shown}  # the ids are positions in the list of images, plus 1
    try:
        for row in (row for row in data.read_parts(folder) if "bad" not in row):
            if "scores" not in row:  # masks or classes, of an unfinished stage
                kept[0] += 1
                continue
            scores += np.histogram(row["scores"], bins=20, range=(0, 1))[0]
            kept[min(sum(s >= threshold for s in row["scores"]), 20)] += 1
            if row["i"] in shown:
                faint[row["i"]] = [(x, y, x + w, y + h) for (x, y, w, h), s in zip(row["boxes"], row["scores"])
                                   if threshold / 2 <= s < threshold]
    except ValueError:  # parts of an unfinished stage may end within a line
        pass
    scores_seen = scores.sum() > 0
    scores = "scores of all stored boxes", [("", HUMAN, 1, outline(scores.tolist(), 0, .05))], "score", "boxes"
    if not result:
        unfinished = note(f"Not finished: {sum(kept.values())} images labelled so far.")
        return out[0] + unfinished + (chart(*scores, log=True) if scores_seen else "")

    out.append(f"<p>Threshold {threshold:.2f} keeps {result['boxes']} boxes, {result['boxes'] / n:.2f} an image; "
               f"{1 - result['with_boxes'] / n:.1%} of {result['images']} images keep no box and are not trained on; "
               f'{result["bad"]} are unusable.</p><div class="row">')
    counts = [kept[b] for b in range(max(kept, default=0) + 1)]
    out += [chart(*scores, log=True, mark=(threshold, f"threshold {threshold:.2f}")),
            chart("boxes kept (20: or more)", [("", PSEUDO, 1, outline(counts, -.5, 1))], "boxes", "images"), "</div>"]
    if held := [[f"{r['threshold']:.2f}", *(f"{r[k]:.3f}" for k in ("precision", "recall", "f1")), r["kept"]]
                for r in result["held_out"] if r["kept"]]:
        out += [table(["threshold", "precision", "recall", "F1", "boxes kept"], held, chosen=f"{threshold:.2f}"), note(
            "Measured on labelled images that the teacher was not trained on.")]
    else:
        out.append(note("No labels were held out, so precision and recall of these boxes are unknown; --threshold auto "
                        "holds out a tenth of the labels."))
    total, human = max(result["boxes"], 1), max(sum(labelled.values()), 1)
    out.append(table(["class", "pseudo-labels", "share", "share of human labels"], [
        [name, count, f"{count / total:.1%}", f"{labelled.get(name, 0) / human:.1%}" if labelled else "unknown"]
        for name, count in result["per_class"].items()]))
    tiles = []
    for i, k in shown.items():
        path, target = Path(pseudo.path(k)), {**pseudo.target(k), "faint": faint.get(i, ())}
        try:
            tiles.append((data.read_image(path, target["size"]), target, path.name, OTHER))
        except data.BadImage:  # moved or damaged since
            continue
    return "".join(out) + sheet_html(sheet_path, tiles, pseudo.class_names, f"{len(tiles)} of the {len(pseudo)} images that keep "
                                     "a box, evenly spread. Thin and grey: boxes under the threshold, down to half of it.")


def sheet_html(path, tiles, class_names, text):
    if not tiles:
        return note("No contact sheet: there is no image to show, or it is no longer where it was.")
    save_sheet(path, tiles, class_names)
    return picture(path, "pseudo-labelled images") + note(text)


def masks_html(folder, sheet_path, result):
    """What the teacher has labelled, pixel by pixel."""
    names = list(result["per_class"])
    out = [f"<p>Threshold {result['threshold']:.2f} keeps {result['kept']:.1%} of the pixels; {result['with_pixels']} of "
           f"{result['images']} images keep some and are trained on; {result['bad']} are unusable.</p>",
           table(["class", "share of the kept pixels"], [[k, f"{v:.1%}"] for k, v in result["per_class"].items()]),
           '<p class="note">' + " ".join(f'<span style="background:{CLASS_COLOURS[k % len(CLASS_COLOURS)]}">&emsp;</span> '
                                         f"{html.escape(name)}" for k, name in enumerate(names[1:])) + "</p>"]
    pseudo, tiles = voc.load_pseudo_masks(folder / "pseudo.json", names), []
    for k in np.unique(np.linspace(0, len(pseudo) - 1, 20).astype(int)).tolist():
        try:
            image, target = pseudo.read(k)
        except data.BadImage:  # moved or damaged since
            continue
        bare = {key: v for key, v in target.items() if key != "mask"}
        tiles += [(image, bare, Path(pseudo.path(k)).name, OTHER), (image, target, "pseudo-label", PSEUDO)]
    return "".join(out) + sheet_html(sheet_path, tiles, names, f"{len(tiles) // 2} of the {len(pseudo)} images that keep some "
                                     "pixels, evenly spread. White: ignored.")


def classes_html(folder, sheet_path, result):
    """What the teacher has labelled, image by image."""
    out = [f"<p>Threshold {result['threshold']:.2f} keeps {result['kept']} of {result['images']} images; {result['bad']} are "
           "unusable.</p>", table(["class", "images", "share"], [[k, n, f"{n / result['kept']:.1%}"] for k, n in
                                                                 result["per_class"].items()])]
    rows, tiles = data.read_json(folder / "pseudo.json", "list of pseudo-labels", ["images"])["images"], []
    for k in np.unique(np.linspace(0, len(rows) - 1, 20).astype(int)).tolist():
        try:
            image, text = data.read_image(rows[k]["file"]), f"{rows[k]['label']} {rows[k]['score']:.2f}"
            tiles.append((image, data.nothing(k), text, PSEUDO))
        except data.BadImage:  # moved or damaged since
            continue
    return "".join(out) + sheet_html(sheet_path, tiles, [], f"{len(tiles)} of the {len(rows)} images that are kept, evenly "
                                     "spread, with the probability of their class.")


def report(run):
    """Writes run/report.html and, per pseudo-label stage, run/pseudo_sheet.png -> path of the report."""
    run = Path(run)
    folders = sorted((p for p in run.glob("pseudo*") if p.is_dir()), key=lambda p: (len(p.name), p.name))  # 2 before 10
    folders += [run] if data.pseudo_parts(run) else []  # st.py --mode pseudo: the directory is the stage
    config, log, name = stored(run / "config.json"), read_log(run / "log.jsonl"), html.escape(run.resolve().name)
    if not (config or log or folders):
        raise util.UserError(f"{run} is not a run of st.py (no config.json, no log.jsonl); give what --out named")
    settings = "".join(f"<div>{html.escape(f'{k} = {v}')}</div>" for k, v in config.items() if k != "command")
    results = {stage: stored(run / stage / "stage.json").get("result") for stage in log}
    body = [f"<h1>{name}</h1><pre>{html.escape(shlex.join(config.get('command', [])))}</pre>"
            f'<details><summary>Settings</summary><div class="columns">{settings}</div></details>',
            results_html({stage: r for stage, r in results.items() if r and "seconds" in r}), "<h2>Training</h2>"]
    body += [training_html(k, log[k], run / k / "first_batch.png", results[k]) for k in log] or [note("Nothing was logged yet.")]
    labelled = labelled_counts(run, config) if folders and config.get("task", "det") == "det" else {}
    for folder in folders:
        sheet = run / ("pseudo_sheet.png" if folder == run else f"{folder.name}_sheet.png")
        body.append(audit_html(folder, sheet, labelled))
    body += [] if folders else ["<h2>Pseudo-labels</h2>", note("None yet.")]
    for path in sorted(run.glob("*/quarantine.txt")):
        body.append(note(f"{path.parent.name}: {sum(1 for _ in open(path))} unusable images, listed in {path}."))
    page = (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
            "</head><body>" + "\n".join(body) + "</body></html>\n")
    runs.write_atomic(run / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    return run / "report.html"


# ---- command line ------------------------------------------------------------------------------------------------

def annotated(image_file, json_file):
    """(image, target, class names) of a file, its boxes taken from a COCO json, or without boxes."""
    target, names, file = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}, [], Path(image_file)
    if json_file:
        found = data.load_coco(json_file, file.parent)
        at = [i for i in range(len(found)) if Path(found.path(i)).name == file.name]
        if not at:
            raise util.UserError(f"{json_file} lists no image named {file.name}; give the one that does")
        target, names = found.target(at[0]), found.class_names
    try:
        return data.read_image(image_file, target.get("size")), target, names
    except data.BadImage as error:
        raise util.UserError(f"{error}; give another --image")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("run", help="report of a run directory").add_argument("run")
    p = sub.add_parser("augment", help="one image under S1..S4: a row per policy, a column per draw")
    p.add_argument("--image", help="default: an image of the embedded world")
    p.add_argument("--json", help="COCO annotation file with its boxes")
    p.add_argument("--mask", nargs="?", const="", help="index mask of --image; without a file, of the embedded world's image")
    p.add_argument("--size", type=int, help="training canvas; default: the image's longer side, 384 at most")
    p.add_argument("--draws", type=int, default=6)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="augment.png")
    args = parser.parse_args(argv)
    if args.command == "run":
        path = report(args.run)
        return print(path, *sorted(path.parent.glob("pseudo*_sheet.png")), sep="\n")
    if bool(args.mask) != bool(args.image) and args.mask is not None:
        raise util.UserError("--mask FILE and --image belong together; --mask alone shows the embedded world's")
    if args.json and not args.image or args.draws < 1 or args.seed < 0 or (args.size or 1) < 1:
        raise util.UserError("--json needs --image; --draws and --size must be 1 or more, --seed not negative")
    if args.image:
        image, target, names = annotated(args.image, args.json)
    else:
        image, boxes, labels, mask = world.draw(world.SEED, "train", args.seed)
        target, names = {"boxes": boxes, "labels": labels}, world.ALL_CLASSES
    if args.mask is not None:
        try:
            mask = voc.read_mask(args.mask, 256, (image.height, image.width)) if args.mask else mask
        except data.BadImage as error:
            raise util.UserError(f"{error}; give a --mask that belongs to --image")
        target = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "mask": mask}
    size, target, tiles = args.size or min(max(image.size), 384), {**target, "size": (image.height, image.width)}, []
    for policy, (low, high) in list(augment.JITTER.items())[:4]:
        tiles.append((*augment.fit(image, target, size)[:2], f"original | {policy}: scale {low} to {high}", OTHER))
        for k in range(args.draws):  # a column draws from the same seed in every row
            out = augment.augment(image, target, policy, size, np.random.default_rng((args.seed, k)))
            tiles.append((*out, f"{policy}, draw {k + 1}", HUMAN))
    save_sheet(args.out, tiles, names, args.draws + 1)
    print(args.out)


if __name__ == "__main__":
    util.run(main)
