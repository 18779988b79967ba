"""What the data and a run look like: pictures with boxes, and one self-contained report.html per run.

    python show.py augment [--image FILE --json train.json]     one image under Augment-S1..S4 -> augment.png
    python show.py run runs/default                             builds report.html of a run again, finished or not

The report holds its images and curves inside itself, has no scripts and fetches nothing, so it can be mailed or archived
as one file. It is an audit, not a score: the numbers in it were computed by st.py and are only read here. Whatever a run
does not have (yet) is left out with a word. Not here: segmentation masks.
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
import world
from util import UserError

HUMAN, PSEUDO, OTHER = "#1f6fb4", "#d9660d", "#5b6470"  # the same in sheets and curves
CLASS_COLOURS = ["#e6194b", "#ffe119", "#4363d8", "#3cb44b", "#f032e6", "#42d4f4", "#f58231", "#bfef45", "#911eb4",
                 "#fabed4", "#469990", "#9a6324", "#dcbeff", "#800000", "#aaffc3", "#000075"]  # class k: k modulo 16
COLUMNS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
SHEET_IMAGES = 20  # pseudo-labelled images on the contact sheet


# ---- pictures ----------------------------------------------------------------------------------------------------

def draw_boxes(image, target, class_names, scale=1, faint=()):
    """A copy of the PIL image, enlarged by `scale`, with every box of target, its class and its score where below 1.
    faint: boxes (M, 4) xyxy to be dashed in grey."""
    if scale != 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    pen, font, tags = ImageDraw.Draw(image), ImageFont.load_default(12), []
    for box in faint:
        dashed(pen, [float(v) * scale for v in box])
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


def dashed(pen, box, dash=4):
    x0, y0, x1, y1 = box
    for ax, ay, bx, by in ((x0, y0, x1, y0), (x1, y0, x1, y1), (x1, y1, x0, y1), (x0, y1, x0, y0)):
        n = max(1, int(math.hypot(bx - ax, by - ay) / dash))
        for i in range(n):  # light and dark in turn, to be seen on any ground
            ends = [(ax + (bx - ax) * t / n, ay + (by - ay) * t / n) for t in (i, i + 1)]
            pen.line(ends, fill=("#f4f4f4", "#444444")[i % 2], width=1)


def tile_scale(image):
    """Pictures are shown 256 px wide; those that are larger, and tend to hold more, 384."""
    return (256 if max(image.size) <= 256 else 384) / max(image.size)


def contact_sheet(tiles, columns):
    """tiles: [(image, caption, colour)] -> one image; the colour is that of the tile's frame and caption bar."""
    w, h = max(im.width for im, _, _ in tiles) + 10, max(im.height for im, _, _ in tiles) + 26
    columns, font = min(columns, len(tiles)), ImageFont.load_default(12)
    sheet = Image.new("RGB", (columns * w + 6, math.ceil(len(tiles) / columns) * h + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption, colour) in enumerate(tiles):
        x, y = 6 + i % columns * w, 6 + i // columns * h
        pen.rectangle((x, y, x + image.width + 3, y + image.height + 19), fill=colour)
        while font.getlength(caption) > image.width - 4 and caption:
            caption = caption[:-1]
        pen.text((x + 4, y + 2), caption, fill="white", font=font)
        sheet.paste(image, (x + 2, y + 18))
    return sheet


def save_png(image, path):
    runs.write_atomic(path, lambda p: image.save(p, "PNG"))


def batch_sheet(batch, class_names, path):
    """One training batch of data.train_loader as a PNG: up to 16 images, as augmented, human and pseudo told apart."""
    human, pseudo = ((batch["part"] == p).nonzero().flatten().tolist() for p in (0, 1))
    rows = human[:max(8, 16 - len(pseudo))] + pseudo[:max(8, 16 - len(human))]  # half each, unless one has less to show
    tiles = []
    for i in rows:
        real = batch["labels"][i] >= 0  # -1 is padding
        target = {"boxes": batch["boxes"][i][real].numpy(), "labels": batch["labels"][i][real].numpy()}
        image = Image.fromarray(batch["images"][i].permute(1, 2, 0).contiguous().numpy())
        name, colour = [("human", HUMAN), ("pseudo", PSEUDO)][int(batch["part"][i])]
        caption = name + (f", image {int(batch['image_id'][i])}" if "image_id" in batch else "")
        tiles.append((draw_boxes(image, target, class_names, tile_scale(image)), caption, colour))
    save_png(contact_sheet(tiles, 4), path)


# ---- curves ------------------------------------------------------------------------------------------------------

def ticks(low, high):
    """About five round numbers within [low, high]."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if m * unit >= (high - low) / 5.5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, lines, x_label, y_label, log=False, mark=None, y_max=None):
    """Inline SVG. lines: [(name, colour, opacity, [(x, y)])], y None or infinite is left out; the y axis starts at 0, or
    with log at one half, so that a count of 1 can be seen. mark: (x, text) of a vertical line."""
    W, H, left, right, top, bottom = 380, 230, 58, 12, 40, 42
    lines = [(*rest, [(x, max(y, 0.5) if log else y) for x, y in points if y is not None and math.isfinite(y)])
             for *rest, points in lines]
    xs, ys = ([point[axis] for *_, points in lines for point in points] for axis in (0, 1))
    if not xs:
        return f"<figure><p>{html.escape(title)}: no values.</p></figure>"
    x0, x1, height = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, y_max or max(ys) or 1
    f = (lambda y: math.log(2 * y) / math.log(4 * height)) if log else (lambda y: y / height)

    def at_x(x):
        return round(left + (x - x0) / (x1 - x0) * (W - left - right), 1)

    def at_y(y):
        return round(H - bottom - f(y) * (H - top - bottom), 1)

    out = [f'<figure><svg viewBox="0 0 {W} {H}"><text x="{left}" y="14" class="t">{html.escape(title)}</text>']
    for y in [10 ** e for e in range(int(math.log10(max(height, 1))) + 1)] if log else ticks(0, height):
        out.append(f'<line x1="{left}" x2="{W - right}" y1="{at_y(y)}" y2="{at_y(y)}" class="g"/>'
                   f'<text x="{left - 5}" y="{at_y(y) + 4}" class="e">{y:.6g}</text>')
    out += [f'<text x="{at_x(x)}" y="{H - bottom + 16}" class="c">{x:.6g}</text>' for x in ticks(x0, x1)]
    out.append(f'<line x1="{left}" x2="{W - right}" y1="{H - bottom}" y2="{H - bottom}" class="a"/>'
               f'<text x="{(left + W - right) / 2}" y="{H - 8}" class="c">{html.escape(x_label)}</text>'
               f'<text transform="translate(11 {(top + H - bottom) / 2}) rotate(-90)" class="c">{html.escape(y_label)}</text>')
    key = left
    for name, colour, opacity, points in lines:
        points = points[::max(1, len(points) // 800)] + points[-1:]  # a long run has more points than the picture pixels
        paint = f'stroke="{colour}" stroke-opacity="{opacity}"'
        out.append(f'<polyline points="{" ".join(f"{at_x(x)},{at_y(y)}" for x, y in points)}" {paint}/>')
        if name and points:
            out.append(f'<polyline points="{key},26 {key + 12},26" {paint}/><text x="{key + 16}" y="30">{html.escape(name)}</text>')
            key += 30 + 5.6 * len(name)
    if mark:
        x, late = at_x(mark[0]), mark[0] > (x0 + x1) / 2
        out.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{H - bottom}" class="m"/><text x="{x + (-4 if late else 4)}" '
                   f'y="{top + 10}" class="m {"e" if late else ""}">{html.escape(mark[1])}</text>')
    return "\n".join(out) + "</svg></figure>"


def outline(edges, counts):
    """Points along the top of a histogram's bars, from the ground and back to it."""
    return [(edges[0], 0), *((x, n) for i, n in enumerate(counts) for x in edges[i:i + 2]), (edges[-1], 0)]


# ---- what a run has left -----------------------------------------------------------------------------------------

def stored(path):
    """The json object in a file; {} when there is none or not yet a whole one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def read_log(path):
    """{stage: [line]} by step. A resumed run repeats steps, then the later line counts; a line cut off by a kill is
    passed over."""
    log = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            log.setdefault(line["stage"], {})[line["step"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return {stage: [lines[step] for step in sorted(lines)] for stage, lines in log.items()}


def natural(path):
    return len(path.name), path.name  # pseudo, pseudo2, .., pseudo10


def stage_results(run):
    """{stage: scores}: those of results.json, then those of stages that have finished since."""
    found = stored(run / "results.json")
    for path in sorted(run.glob("*/stage.json"), key=lambda p: (p.parent.name != "teacher", natural(p.parent))):
        found.setdefault(path.parent.name, stored(path).get("result"))
    return {name: scores for name, scores in found.items() if isinstance(scores, dict) and "AP" in scores}


def labelled_counts(run, config):
    """{class name: boxes} in the labelled images of the run; {} where its data set is not to be found."""
    try:
        root = Path(config["root"]) / "det" if config["data"] == "shapes" else config["root"]
        train = data.load_coco(*data.coco_layout(root)[:2])
        part = train.subset(np.flatnonzero(np.isin(train.ids, stored(run / "split.json")["labeled"])))
    except (UserError, KeyError):
        return {}
    return dict(zip(part.class_names, np.bincount(part.labels, minlength=len(part.class_names)).tolist()))


def survey(folder, threshold, wanted):
    """One pass over a stage's parts, an image at a time -> scores (20,) counted in bins of 0.05; {boxes kept: images};
    {i: row} of the images in `wanted`. Parts of an unfinished stage may end within a line; reading stops there."""
    scores, kept, rows = np.zeros(20, dtype=np.int64), Counter(), {}
    try:
        for row in data.read_parts(folder):
            if "bad" not in row:
                scores += np.histogram(row["scores"], bins=20, range=(0, 1))[0]
                kept[sum(s >= threshold for s in row["scores"])] += 1
                rows.update({row["i"]: row} if row["i"] in wanted else {})
    except ValueError:
        pass
    return scores.tolist(), kept, rows


# ---- the report --------------------------------------------------------------------------------------------------

STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1c2126;background:#fff;max-width:1180px;margin:2em auto;padding:0 1.2em}
h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid #dde1e5}table{border-collapse:collapse;margin:.8em 0}
td,th{padding:.15em .8em;text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}
th{border-bottom:1px solid #b9c0c7}tr.chosen td{background:#fdeede;font-weight:600}.row{display:flex;flex-wrap:wrap;gap:14px}
pre{background:#f4f6f8;padding:.7em;white-space:pre-wrap;overflow-wrap:anywhere}.columns{columns:3;font-size:.85em}
.note{color:#5b6470}img{max-width:100%}figure{margin:0;width:380px;max-width:100%}polyline{fill:none;stroke-width:1.7;
stroke-linecap:round}text{font:11px system-ui,sans-serif;fill:#3c444c}.t{font-weight:600;font-size:12.5px}.c{text-anchor:middle}
.e{text-anchor:end}line.g{stroke:#e6e9ec}line.a{stroke:#8b949d}line.m{stroke:#b3261e;stroke-dasharray:4 3}text.m{fill:#b3261e}"""


def table(head, rows, chosen=None):
    lines = ["".join(f"<th>{html.escape(str(c))}</th>" for c in head)]
    lines += ["".join(f"<td>{html.escape(str(c))}</td>" for c in row) for row in rows]
    kind = {chosen + 1: ' class="chosen"'} if chosen is not None else {}
    return "<table>" + "\n".join(f"<tr{kind.get(i, '')}>{line}</tr>" for i, line in enumerate(lines)) + "</table>"


def note(text):
    return f'<p class="note">{html.escape(text)}</p>'


def picture(image, alt):
    """The image inside the page. JPEG: a fraction of the PNG's size, and only to be looked at."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def header_html(name, config):
    command = config.get("command", "No config.json in this directory.")
    command = shlex.join(command) if isinstance(command, list) else command
    settings = [f"<div>{html.escape(f'{k} = {v}')}</div>" for k, v in config.items()
                if k != "command" and v not in (None, "")]
    return (f"<h1>{html.escape(name)}</h1><pre>{html.escape(command)}</pre>"
            f'<details><summary>Settings</summary><div class="columns">{"".join(settings)}</div></details>')


def results_html(results):
    def known(v):  # COCO's -1: nothing of that size to be found
        return v is not None and v >= 0

    rows = [[name, *(f"{r[m]:.3f}" if known(r.get(m)) else "-" for m in COLUMNS), f"{r.get('seconds', 0):.0f}"]
            for name, r in results.items()]
    students = [name for name in results if name.startswith("student")]
    for name in students:
        for other in [o for o in ("teacher", name.replace("student", "control")) if o in results]:
            pairs = [(results[name].get(m), results[other].get(m)) for m in COLUMNS]
            rows.append([f"{name} − {other}", *(f"{a - b:+.3f}" if known(a) and known(b) else "-" for a, b in pairs), ""])
    if not results:
        return "<h2>Results</h2>" + note("No stage has been scored yet.")
    text = "COCO metrics on the validation set, 0 to 1, of one seed: how much they vary from seed to seed is not known here. "
    if any(name.startswith("control") for name in results):
        text += ("The control trains on from the student's start for as many steps and images per step, on human labels "
                 "only: student − control, not student − teacher, speaks for or against the pseudo-labels.")
    elif students:
        text += ("The student has trained for longer than the teacher, so this difference alone does not show that "
                 "pseudo-labels helped; --control trains the comparison that does.")
    return "<h2>Results</h2>" + table(["", *COLUMNS, "seconds"], rows) + note(text)


def curves_html(stage, lines):
    def line(name, colour, opacity, *keys):  # the sum of the keys at every step that has them all
        return name, colour, opacity, [(row["step"], sum(row[k] for k in keys)) for row in lines
                                       if all(row.get(k) is not None for k in keys)]
    last = lines[-1]
    text = [f"step {last['step']} of {last.get('of', '?')}"]
    text += [f"{last['images_s']:.1f} images/s"] if "images_s" in last else []
    text += [f"{last['waiting']:.0%} of the time waiting for data"] if "waiting" in last else []
    out = f"<h3>{html.escape(stage)}</h3>" + note(", ".join(text))
    if "cls" not in last:
        return out
    return out + '<div class="row">' + chart("loss: single steps (pale), running average", [
        line("", HUMAN, .35, "cls", "box"), line("", PSEUDO, .35, "cls_pseudo", "box_pseudo"),
        line("human", HUMAN, 1, "avg"), line("pseudo", PSEUDO, 1, "avg_pseudo")], "step", "classes + boxes"
    ) + chart("its terms, single steps", [
        line("cls", HUMAN, 1, "cls"), line("box", HUMAN, .4, "box"), line("cls pseudo", PSEUDO, 1, "cls_pseudo"),
        line("box pseudo", PSEUDO, .4, "box_pseudo")], "step", "loss"
    ) + chart("learning rate", [line("", OTHER, 1, "lr")], "step", "lr") + "</div>"


def audit_html(folder, sheet_path, labelled):
    """What the teacher has labelled. labelled: {class: boxes} of the human labels, {} if unknown."""
    out = [f"<h2>Pseudo-labels: {html.escape(folder.name)}</h2>"]
    result, pseudo = stored(folder / "stage.json").get("result"), None
    try:
        pseudo = data.load_coco(folder / "pseudo.json", result["root"]) if result else None
    except UserError as error:
        out.append(note(str(error)))
    shown = np.unique(np.linspace(0, len(pseudo) - 1, SHEET_IMAGES).astype(int)).tolist() if pseudo else []
    wanted = {int(pseudo.ids[k]) - 1: k for k in shown}  # the ids are positions in the list of images, plus 1
    scores, kept, rows = survey(folder, result["threshold"] if result else 0, wanted)
    scores = "scores of all stored boxes", [("", HUMAN, 1, outline([i / 20 for i in range(21)], scores))], "score", "boxes"
    if not result:
        return out[0] + note(f"Not finished: {sum(kept.values())} images labelled so far.") + chart(*scores, log=True)

    n, threshold, held = max(result["images"], 1), result["threshold"], result["held_out"]
    mark = threshold, f"threshold {threshold:.2f}"
    out.append(f"<p>Threshold {threshold:.2f} keeps {result['boxes']} boxes, {result['boxes'] / n:.2f} an image; "
               f"{1 - result['with_boxes'] / n:.1%} of {result['images']} images keep no box and are not trained on; "
               f'{result["bad"]} are unusable.</p><div class="row">')
    if held:
        out.append(chart("on held-out labels, at IoU 0.5", [
            (k, colour, 1, [(r["threshold"], r[k]) for r in held])
            for k, colour in (("precision", HUMAN), ("recall", PSEUDO), ("f1", OTHER))],
            "score threshold", "", mark=mark, y_max=1))
    most = min(max(kept, default=0), 20)
    counts = [sum(kept[k] for k in kept if min(k, 20) == b) for b in range(most + 1)]
    out += [chart(*scores, log=True, mark=mark),
            chart("boxes kept per image" + (" (20: or more)" if most == 20 else ""),
                  [("", PSEUDO, 1, outline([b - .5 for b in range(most + 2)], counts))], "boxes", "images"), "</div>"]
    if held := [r for r in held if r["kept"]]:
        out.append(table(["threshold", "precision", "recall", "F1", "boxes kept"], [
            [f"{r['threshold']:.2f}", f"{r['precision']:.3f}", f"{r['recall']:.3f}", f"{r['f1']:.3f}", r["kept"]] for r in held],
            chosen=min(range(len(held)), key=lambda i: abs(held[i]["threshold"] - threshold))))
    out.append(note("Measured on labelled images that the teacher was not trained on." if held else "No labels were held out, so "
                    "precision and recall of these boxes are unknown; --threshold auto holds out a tenth of the labels."))
    total, human = max(result["boxes"], 1), max(sum(labelled.values()), 1)
    out.append(table(["class", "pseudo-labels", "share", "share of human labels"], [
        [name, count, f"{count / total:.1%}", f"{labelled.get(name, 0) / human:.1%}" if labelled else "unknown"]
        for name, count in result["per_class"].items()]))
    tiles = []
    for i, k in wanted.items():
        target, row = pseudo.target(k), rows.get(i, {"boxes": [], "scores": []})
        missed = [(x, y, x + w, y + h) for (x, y, w, h), s in zip(row["boxes"], row["scores"])
                  if threshold / 2 <= s < threshold]
        try:
            image = data.read_image(pseudo.path(k), target["size"])
        except data.BadImage:  # moved since
            continue
        drawn = draw_boxes(image, target, pseudo.class_names, tile_scale(image), missed)
        tiles.append((drawn, Path(pseudo.path(k)).name, OTHER))
    if not tiles:
        return "".join(out) + note("No contact sheet: there is no image to show, or it is no longer where it was.")
    save_png(contact_sheet(tiles, 4), sheet_path)
    return "".join(out) + picture(Image.open(sheet_path), "pseudo-labelled images") + note(
        f"{len(tiles)} of the {len(pseudo)} images that keep a box, evenly spread. Dashed grey: boxes under the threshold, down "
        "to half of it.")


def report(run):
    """Writes run/report.html and, per pseudo-label stage, run/pseudo_sheet.png -> path of the report."""
    run = Path(run)
    folders = sorted((p for p in run.glob("pseudo*") if p.is_dir()), key=natural)
    folders += [run] if data.pseudo_parts(run) else []  # st.py --mode pseudo: the directory is the stage
    config, log, name = stored(run / "config.json"), read_log(run / "log.jsonl"), run.resolve().name
    if not (config or log or folders):
        raise UserError(f"{run} is not a run of st.py (no config.json, no log.jsonl); give the directory named by --out")
    body = [header_html(name, config), results_html(stage_results(run)), "<h2>Training</h2>"]
    body += [curves_html(stage, lines) for stage, lines in log.items()] or [note("Nothing was logged yet.")]
    body.append("<h2>First batches</h2>")
    first = [p for p in (run / stage / "first_batch.png" for stage in log) if p.exists()]
    for path in first:
        body += [f"<h3>{html.escape(path.parent.name)}</h3>", picture(Image.open(path), "first batch")]
    body += [] if first else [note("No first_batch.png was written yet.")]
    labelled = labelled_counts(run, config) if folders else {}
    for folder in folders:
        body.append(audit_html(folder, run / ("pseudo_sheet.png" if folder == run else f"{folder.name}_sheet.png"), labelled))
    body += [] if folders else ["<h2>Pseudo-labels</h2>", note("None yet.")]
    for path in sorted(run.glob("*/quarantine.txt")):
        body.append(note(f"{path.parent.name}: {len(path.read_text().splitlines())} unusable images, listed in {path}."))
    page = (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
            "</head><body>" + "\n".join(body) + "</body></html>\n")
    runs.write_atomic(run / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    return run / "report.html"


# ---- command line ------------------------------------------------------------------------------------------------

def annotated(image_file, json_file):
    """(image, target, class names) of a file, its boxes taken from a COCO json, or without boxes."""
    target, names = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}, []
    if json_file:
        found, wanted = data.load_coco(json_file, Path(image_file).parent), Path(image_file).name
        at = [i for i in range(len(found)) if Path(found.path(i)).name == wanted]
        if not at:
            raise UserError(f"{json_file} lists no image named {wanted}; give the file its annotations belong to")
        target, names = found.target(at[0]), found.class_names
    try:
        image = data.read_image(image_file, target.get("size"))
    except data.BadImage as error:
        raise UserError(f"{error}; give another --image")
    return image, {**target, "size": (image.height, image.width)}, names


def augment_sheet(image, target, class_names, size, draws, seed):
    """One row per policy: the image as it is, then `draws` outcomes; column k draws from the same seed in every row."""
    first, first_target, _ = augment.fit(image, target, size)
    tiles = []
    for policy, (low, high) in augment.JITTER.items():
        drawn = draw_boxes(first, first_target, class_names, tile_scale(first))
        tiles.append((drawn, f"original | {policy}: scale {low} to {high}", OTHER))
        for k in range(draws):
            out, boxes = augment.augment(image, target, policy, size, np.random.default_rng((seed, k)))
            tiles.append((draw_boxes(out, boxes, class_names, tile_scale(out)), f"{policy}, draw {k + 1}", HUMAN))
    return contact_sheet(tiles, draws + 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("augment", help="one image under S1..S4")
    p.add_argument("--image", help="default: an image of the embedded world")
    p.add_argument("--json", help="COCO annotation file with its boxes")
    p.add_argument("--size", type=int, help="training canvas; default: the image's longer side, 384 at most")
    p.add_argument("--draws", type=int, default=6)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="augment.png")
    p = sub.add_parser("run", help="report of a run directory")
    p.add_argument("run")
    args = parser.parse_args(argv)
    if args.command == "run":
        path = report(args.run)
        print(path, *sorted(path.parent.glob("pseudo*_sheet.png")), sep="\n")
        return
    if args.json and not args.image:
        raise UserError("--json alone does not say which image to show; give --image too")
    if args.draws < 1 or (args.size is not None and args.size < 1) or args.seed < 0:
        raise UserError("--draws and --size must be 1 or more and --seed not negative")
    if args.image:
        image, target, names = annotated(args.image, args.json)
    else:
        image, boxes, labels, _ = world.draw(world.SEED, "train", args.seed)
        target, names = {"boxes": boxes, "labels": labels, "size": (image.height, image.width)}, world.ALL_CLASSES
    sheet = augment_sheet(image, target, names, args.size or min(max(image.size), 384), args.draws, args.seed)
    save_png(sheet, args.out)
    print(args.out)


if __name__ == "__main__":
    util.run(main)
