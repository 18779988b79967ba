"""show.py on run directories written here: nothing is trained, nothing is fetched."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import detect
import runs
import show
import util

NAMES = ["ring", "a<b & c>"]
VOID = {"img", "meta", "br"}


def scores(ap):
    return {"AP": ap, "AP50": ap + .2, "AP75": ap / 2, "APs": ap, "APm": ap, "APl": -1.0, "AR100": .5, "seconds": 61.0}


def log_line(stage, step, cls=1.0, pseudo=False, of=60):
    more = dict(cls_pseudo=.7, box_pseudo=.2, avg_pseudo=.9, ratio=1.1) if pseudo else {}
    return json.dumps(dict(stage=stage, step=step, of=of, cls=cls, box=.5, avg=1.4, lr=.01, images_s=50.0, waiting=.1, **more))


def write_parts(run, images=6, threshold=.3):
    """An unfinished pseudo-label stage: in every image one box of score 0.9 and one of 0.2, the last image without any."""
    folder = run / "pseudo"
    (run / "pool").mkdir(parents=True)
    folder.mkdir()
    with open(folder / "part_0_of_1.jsonl", "w") as f:
        for i in range(images):
            path = run / "pool" / f"{i}.jpg"
            Image.new("RGB", (64, 48), (60, 90, 120)).save(path)
            found = dict(boxes=[[8, 20, 20, 20], [40 + i, 20, 16, 16]], labels=[0, 1], scores=[.9, .2])
            empty = dict(boxes=[], labels=[], scores=[])
            f.write(json.dumps({"i": i, "file": str(path), "size": [48, 64], **(found if i < images - 1 else empty)}) + "\n")
        f.write(json.dumps({"i": images, "file": str(run / "pool" / "broken.jpg"), "bad": "cannot identify"}) + "\n")
    return folder


def complete_run(run, control=False):
    run.mkdir()
    results = {"teacher": scores(.1234), "student": scores(.2345), **({"control": scores(.2)} if control else {})}
    for stage, result in results.items():
        (run / stage).mkdir()
        runs.write_json(run / stage / "stage.json", {"deps": {}, "result": result})
    runs.write_json(run / "config.json", {"command": ["st.py", "--out", "a <b>"], "data": "coco", "root": str(run / "set"), "lr": .002})
    lines = [log_line("teacher", s) for s in (20, 40, 60)] + ['{"stage": "pseudo", "step": 6, "of": 6, "images_s": 9.0}']
    lines += [log_line("student", s, pseudo=True) for s in (20, 40, 60)] + [log_line("control", 60)] * control
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    folder = write_parts(run)
    result = detect.merge(folder, folder / "pseudo.json", .3, [1, 7], NAMES, {})
    held = [{"threshold": t, "precision": .8125, "recall": .4375, "f1": .5625, "kept": 13} for t in (.25, .3, .35)]
    runs.write_json(folder / "stage.json", {"deps": {}, "result": {"threshold": .3, **result, "held_out": held}})
    for stage in ("teacher", "student"):
        Image.new("RGB", (30, 20), "red").save(run / stage / "first_batch.png")
    (run / "student" / "quarantine.txt").write_text("x.jpg: broken\ny.jpg: broken\n")
    # the labelled set: three boxes of the first class in the labelled image, one of the second elsewhere
    (run / "set").mkdir()
    annotations = [dict(id=k, image_id=1 + (k > 2), category_id=1 if k < 3 else 7, bbox=[1, 1, 9, 9]) for k in range(4)]
    runs.write_json(run / "set" / "train.json", {
        "images": [dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in (1, 2)], "annotations": annotations,
        "categories": [dict(id=1, name=NAMES[0]), dict(id=7, name=NAMES[1])]})
    runs.write_json(run / "split.json", {"labeled": [1], "rest": [2]})
    return run


class Page(HTMLParser):
    """Checks that every element is closed in order; collects attributes, table rows and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.rows, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text):
        self.words.append(text)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(text)

    @property
    def text(self):
        return " ".join(self.words)


def page_of(run):
    return Page(show.report(run).read_text())


# ---- report ------------------------------------------------------------------------------------------------------

def test_report_shows_results_differences_and_audit(tmp_path):
    run = complete_run(tmp_path / "run")
    assert show.report(run) == run / "report.html"
    page = page_of(run)
    rows = {row[0]: row for row in page.rows if row}
    assert rows["teacher"][1:4] == ["0.123", "0.323", "0.062"] and rows["student"][1] == "0.234"
    assert rows["teacher"][6] == "-"  # COCO's -1 is no score
    assert rows["student − teacher"][1:3] == ["+0.111", "+0.111"] and rows["student − teacher"][6] == "-"
    assert rows["0.30"] == ["0.30", "0.812", "0.438", "0.562", "13"]
    assert rows["ring"] == ["ring", "5", "100.0%", "100.0%"]  # of the labelled image only
    assert rows[NAMES[1]] == [NAMES[1], "0", "0.0%", "0.0%"]
    assert "Threshold 0.30 keeps 5 boxes" in page.text and "28.6% of 7 images keep no box" in page.text
    assert "threshold 0.30" in page.words  # the mark in the curves
    assert "student: 2 unusable images" in page.text
    assert "st.py --out 'a <b>'" in page.text and "lr = 0.002" in page.text


def test_only_the_row_of_the_chosen_threshold_is_marked(tmp_path):
    text = show.report(complete_run(tmp_path / "run")).read_text()
    assert re.findall(r'<tr class="chosen"><td>([\d.]+)', text) == ["0.30"]


def test_comparison_needs_a_control(tmp_path):
    without, with_control = (page_of(complete_run(tmp_path / str(c), control=c)) for c in (False, True))
    assert "trained for longer" in without.text and "--control" in without.text
    assert "trained for longer" not in with_control.text
    assert "+0.034" in next(row for row in with_control.rows if row[0] == "student − control")


def test_report_is_one_file_without_scripts(tmp_path):
    page = page_of(complete_run(tmp_path / "run"))
    links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
    assert len(links) == 3 and all(v.startswith("data:image/jpeg;base64,") for v in links)  # two batches, one sheet
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", (tmp_path / "run" / "report.html").read_text())


def test_class_names_are_escaped(tmp_path):
    text = show.report(complete_run(tmp_path / "run")).read_text()
    assert "a&lt;b &amp; c&gt;" in text and "a<b" not in text and "a <b>" not in text


def test_report_of_a_half_finished_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    runs.write_json(run / "config.json", {"command": ["st.py"]})
    assert "No stage has been scored yet" in page_of(run).text
    (run / "log.jsonl").write_text(log_line("teacher", 20) + "\n")  # a curve of one point
    (run / "teacher").mkdir()
    runs.write_json(run / "teacher" / "stage.json", {"deps": {}, "result": scores(.1234)})
    folder = write_parts(run)
    runs.write_json(folder / "stage.json", {"deps": {"threshold": "auto"}})
    with open(folder / "part_0_of_1.jsonl", "a") as f:
        f.write('{"i": 7, "file": "x.jpg", "si')  # killed here
    page = page_of(run)
    assert ["teacher", "0.123"] in [row[:2] for row in page.rows]
    assert "Not finished: 6 images labelled so far" in page.text
    assert not (run / "pseudo_sheet.png").exists()


def test_later_lines_of_a_resumed_log_win_and_a_torn_line_is_passed_over(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [log_line("teacher", s, cls=c) for s, c in ((20, 5.0), (40, 99.0), (20, 1.5), (40, 2.5), (60, 3.5))]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n" + log_line("teacher", 80)[:30])
    log = show.read_log(run / "log.jsonl")
    assert [(row["step"], row["cls"]) for row in log["teacher"]] == [(20, 1.5), (40, 2.5), (60, 3.5)]
    assert "step 60 of 60" in page_of(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(util.UserError, match="not a run"):
        show.report(tmp_path)


def test_contact_sheet_shows_kept_boxes_in_colour_and_missed_ones_in_grey(tmp_path):
    run = complete_run(tmp_path / "run")
    show.report(run)
    sheet = np.asarray(Image.open(run / "pseudo_sheet.png")).astype(int)
    # first tile: 6 px margin, 2 px frame, 18 px to the picture, which is 64x48 shown at 4
    tile = sheet[24:24 + 192, 8:8 + 256]
    assert abs(tile[150, 4 * 8] - [230, 25, 75]).max() == 0  # left edge of the kept box, class 0
    assert (tile[120, 4 * 40] == 0xf4).all() and (tile[120, 4 * 40 + 1] == 0x44).all()  # left edge of the missed one
    assert abs(tile[150, 100] - [60, 90, 120]).max() < 12
    assert sheet.shape[0] == 2 * (192 + 26) + 6  # five images kept a box: two rows of four columns


# ---- curves ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("low, high", [(0, 1), (0, .002), (20, 900), (0, 120_000), (3, 4), (0, 7.3)])
def test_ticks_are_few_even_and_inside(low, high):
    at = show.ticks(low, high)
    assert 3 <= len(at) <= 7 and low - 1e-9 <= at[0] and at[-1] <= high * (1 + 1e-9)
    assert np.allclose(np.diff(at), at[1] - at[0])


def test_curve_goes_through_its_points_and_leaves_out_what_is_not_finite():
    svg = show.chart("t", [("n", "red", 1, [(0, 0), (5, float("nan")), (10, 2.0)])], "x", "y")
    first, last = (tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()[::2])
    assert svg.count("nan") == 0 and first[0] == 58 and first[1] == 188  # the axes' origin
    assert last == (368, 40)  # the upper right corner


def test_log_chart_tells_one_from_none():
    svg = show.chart("t", [("", "red", 1, show.outline([0, 1, 1000], 0, 1))], "x", "y", log=True)
    ys = [float(p.split(",")[1]) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert ys[0] == ys[2] == 188 and 40 <= ys[5] < ys[3] < 188


# ---- pictures ----------------------------------------------------------------------------------------------------

def batch(parts, size=128):
    B = len(parts)
    boxes, labels = torch.zeros(B, 2, 4), torch.full((B, 2), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([20., 40., 60., 100.]), 1
    boxes[:, 1] = torch.tensor([70., 10., 120., 30.])  # padding: must not be drawn
    return {"images": torch.full((B, 3, size, size), 128, dtype=torch.uint8), "boxes": boxes, "labels": labels,
            "part": torch.tensor(parts), "image_id": torch.arange(B)}


def test_batch_sheet_draws_real_boxes_only(tmp_path):
    show.batch_sheet(batch([0, 1]), NAMES, tmp_path / "b.png")
    sheet = np.asarray(Image.open(tmp_path / "b.png")).astype(int)
    tile = sheet[24:24 + 256, 8:8 + 256]  # shown at 2
    for y, x in ((140, 40), (140, 41), (199, 80), (150, 119)):  # left edge (two pixels), bottom, right
        assert (tile[y, x] == [255, 225, 25]).all(), (y, x)
    for y, x in ((140, 44), (140, 36), (204, 80), (140, 80)):  # inside and outside
        assert (tile[y, x] == 128).all(), (y, x)
    assert (tile[20:60, 140:240] == 128).all()  # where the padding points
    second = sheet[24:24 + 256, 8 + 266:8 + 266 + 256]
    assert second.shape == (256, 256, 3) and (second == 128).all()  # an image without boxes
    human, pseudo = sheet[10, 200], sheet[10, 470]  # caption bars
    assert human[2] > human[0] and pseudo[0] > pseudo[2]


def test_batch_sheet_without_any_box(tmp_path):
    empty = {**batch([0, 0]), "boxes": torch.zeros(2, 0, 4), "labels": torch.zeros(2, 0, dtype=torch.long)}
    show.batch_sheet(empty, NAMES, tmp_path / "b.png")
    assert (np.asarray(Image.open(tmp_path / "b.png"))[24:280, 8:264] == 128).all()


@pytest.mark.parametrize("human, pseudo, shown", [(20, 20, (8, 8)), (30, 0, (16, 0)), (20, 3, (13, 3)), (2, 20, (2, 14))])
def test_batch_sheet_shows_sixteen_images_of_both_kinds(tmp_path, human, pseudo, shown):
    show.batch_sheet(batch([0] * human + [1] * pseudo, size=16), NAMES, tmp_path / "b.png")
    sheet = np.asarray(Image.open(tmp_path / "b.png")).astype(int)
    bars = [sheet[8 + 282 * (i // 4), 200 + 266 * (i % 4)].tolist() for i in range(16)]
    assert (bars.count([31, 111, 180]), bars.count([217, 102, 13])) == shown


def test_draw_boxes_leaves_its_input_alone_and_names_scores():
    image = Image.new("RGB", (100, 60), "grey")
    target = {"boxes": np.array([[10., 30, 90, 50]], np.float32), "labels": np.array([0]), "scores": np.array([.5], np.float32)}
    out = show.draw_boxes(image, target, NAMES)
    sure = show.draw_boxes(image, {**target, "scores": np.array([1.])}, NAMES)
    assert np.asarray(image).std() == 0 and out.size == (100, 60)
    width = [(np.asarray(im)[20] != 128).any(1).sum() for im in (out, sure)]  # of the name's background
    assert width[0] > width[1] + 15


def test_names_of_equal_boxes_do_not_cover_each_other():
    boxes = np.array([[10., 30, 90, 80]] * 2, np.float32)
    out = np.asarray(show.draw_boxes(Image.new("RGB", (100, 100)), {"boxes": boxes, "labels": np.array([0, 1])}, ["aa", "bb"]))
    assert (out[18, 11] == [230, 25, 75]).all() and (out[32, 13] == [255, 225, 25]).all()


# ---- command line ------------------------------------------------------------------------------------------------

def test_augment_writes_a_row_per_policy(tmp_path):
    out = tmp_path / "a.png"
    done = subprocess.run([sys.executable, show.__file__, "augment", "--draws", "2", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    sheet = Image.open(out)
    assert sheet.size == (3 * 266 + 6, 4 * 282 + 6)


def test_augment_takes_boxes_from_a_coco_file(tmp_path):
    run, name = complete_run(tmp_path / "run"), tmp_path / "1.jpg"
    Image.new("RGB", (64, 48), (128, 128, 128)).save(name)
    image, target, names = show.annotated(name, run / "set" / "train.json")
    assert image.size == (64, 48) and target["boxes"].tolist() == [[1, 1, 10, 10]] * 3 and names == NAMES
    show.main(["augment", "--image", str(name), "--json", str(run / "set" / "train.json"), "--draws", "1", "--out", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").format == "PNG"
    (tmp_path / "3.jpg").write_bytes(name.read_bytes())
    for bad, message in (("3.jpg", "lists no image"), ("4.jpg", "lists no image")):
        with pytest.raises(util.UserError, match=message):
            show.annotated(tmp_path / bad, run / "set" / "train.json")
    with pytest.raises(util.UserError, match="give another --image"):
        show.annotated(tmp_path / "none.jpg", None)


def test_run_prints_what_it_wrote(tmp_path, capsys):
    run = complete_run(tmp_path / "run")
    show.main(["run", str(run)])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "pseudo_sheet.png")]
