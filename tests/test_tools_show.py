"""tools.show on runs of a few steps: pictures show what is there, at the right place, and a report
can be made of any run."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import answers
import data
import recipes
import st
import util
from tools import show

TINY = ["--steps", "6", "--student-steps", "6", "--batch", "4", "--image-size", "64"]
TINY += ["--norm", "gn", "--labeled", "0.5", "--precision", "fp32", "--workers", "0"]
NAMES = ["ring", "star"]


@pytest.fixture(scope="module")
def run(coco_root, tmp_path_factory):
    """A finished run of boxes."""
    out = tmp_path_factory.mktemp("runs") / "a<b>"
    given = ["--root", str(coco_root), "--out", str(out), "--threshold", "0.01", "--control"]
    st.main([*TINY, "--recipe", "tiny", "--eval-every", "3", *given])
    return out


@pytest.fixture(scope="module")
def masks_run(voc_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "masks"
    given = ["--root", str(voc_root), "--out", str(out), "--threshold", "0.2", "--scales", "1"]
    st.main([*TINY, "--recipe", "seg-tiny", "--aug", "s1", *given, "--steps", "40"])
    return out


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def boxes(*rows, scores=None):
    xyxy = np.array(rows, np.float32).reshape(-1, 4)
    labels = np.arange(len(rows))
    if scores is None:
        scores = np.ones(len(rows))
    return {**data.nothing(1), "boxes": xyxy, "labels": labels, "scores": np.array(scores)}


# ---- pictures ------------------------------------------------------------------------------------


def test_boxes_are_drawn_where_they_are_and_those_below_the_threshold_faintly():
    image = Image.new("RGB", (64, 48), (60, 90, 120))
    target = boxes([8, 20, 28, 40], [40, 20, 56, 36], scores=[0.9, 0.2])
    drawn = np.asarray(show.draw_boxes(image, target, NAMES, 4, sure=0.3)).astype(int)
    assert drawn.shape == (192, 256, 3)
    red = [230, 25, 75]
    for y, x in ((140, 32), (140, 33), (140, 111), (159, 80)):  # two pixels; the far edge is out
        assert drawn[y, x].tolist() == red, (y, x)
    for y, x in ((140, 36), (140, 112), (163, 80)):  # inside and outside
        assert abs(drawn[y, x] - [60, 90, 120]).max() < 3, (y, x)
    assert drawn[120, 160].tolist() == [0xF4] * 3 and drawn[120, 161].tolist() == [0x44] * 3
    assert np.asarray(image).std((0, 1)).max() == 0  # the input is as it was


def test_names_say_scores_below_one_and_do_not_cover_each_other():
    image = Image.new("RGB", (200, 100), "grey")
    sure, unsure = (
        np.asarray(show.draw_boxes(image, boxes([10, 30, 90, 50], scores=[score]), NAMES))
        for score in (1, 0.5)
    )
    widths = [(drawn[18] != 128).any(1).sum() for drawn in (sure, unsure)]
    assert widths[1] > widths[0] + 15
    twice = np.asarray(show.draw_boxes(image, boxes([10, 30, 90, 80], [10, 30, 90, 80]), NAMES))
    colours = {tuple(twice[y, 11]) for y in (18, 32)}
    assert colours == {(230, 25, 75), (255, 225, 25)}


def test_masks_show_class_0_as_it_is_and_what_is_ignored_white():
    image = Image.new("RGB", (30, 10), (10, 10, 10))
    mask = np.repeat([[0, 1, 255]], 10, 0).repeat(10, 1).astype(np.uint8)
    drawn = np.asarray(show.draw_boxes(image, {**boxes(), "mask": mask}, NAMES))
    assert drawn[5, 5].tolist() == [10, 10, 10]
    assert drawn[5, 15].tolist() == [120, 17, 42]
    assert drawn[5, 25].min() > 170


def test_a_sheet_has_a_framed_tile_for_each_image(tmp_path):
    image = Image.new("RGB", (128, 128), "grey")
    tiles = [(image, boxes(), "a", show.HUMAN)] * 3 + [(image, boxes(), "b", show.PSEUDO)] * 2
    show.save_sheet(tmp_path / "s.png", tiles, NAMES)
    sheet = pixels(tmp_path / "s.png")
    assert sheet.shape == (2 * 282 + 6, 4 * 266 + 6, 3)
    frames = [sheet[8 + 282 * (i // 4), 206 + 266 * (i % 4)].tolist() for i in range(6)]
    assert frames == [[31, 111, 180]] * 3 + [[217, 102, 13]] * 2 + [[255] * 3]


# ---- a run ---------------------------------------------------------------------------------------


def test_the_first_batch_is_the_one_that_was_trained_on(run):
    _, plan, c, human, classified = show.open_run(run)
    tiles = show.first_batch(run / "student", plan, c, human, classified)
    pseudo = answers.confident(run / "pseudo", 0.01, human)
    parts = {"human": (human, 4), "pseudo": (pseudo, 4)}
    seed = st.stage_seed(0, run / "student")
    batch = next(data.batches(parts, range(1), c.student_aug, 64, seed, util.Proc()))
    shown = np.stack([np.asarray(image) for image, *_ in tiles])
    assert (shown == batch["images"].permute(0, 2, 3, 1).numpy()).all()
    assert [colour for *_, colour in tiles] == [show.HUMAN] * 4 + [show.PSEUDO] * 4
    control = show.first_batch(run / "control", plan, c, human, classified)
    assert [caption[:5] for *_, caption, _ in control] == ["human"] * 8


def test_a_report_is_one_file_with_scores_curves_and_pictures(run, masks_run):
    for folder, metric, stages in ((run, "AP50", 4), (masks_run, "mIoU", 3)):
        paths = show.report(folder)
        page = paths[0].read_text()
        assert metric in page and page.count("data:image/jpeg") == stages == len(paths) - 1
        assert not re.search(r"https?:|<script|<link|@import", page)
        for path in paths[1:]:
            assert min(Image.open(path).size) > 200
    page = (run / "report.html").read_text()
    assert "a&lt;b&gt;" in page and "a<b>" not in page
    rows = dict(re.findall(r"<tr><td>([^<]*)<td>([^<]*)", page))
    results = json.loads((run / "results.json").read_text())
    gain = results["student"]["AP"] - results["control"]["AP"]
    assert rows["teacher"] == f"{results['teacher']['AP']:.3f}"
    assert rows["student − control"] == f"{gain:+.3f}"
    assert page.count("<svg") == 2  # loss, and score by --eval-every


def test_a_report_of_an_unfinished_run_shows_what_there_is(run, tmp_path):
    line = {"stage": "teacher", "step": 1, "of": 9, "loss": 1.0}
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + '\n{"stage": "tea')
    (tmp_path / "pseudo").mkdir()
    (tmp_path / "pseudo/part_0_of_1.jsonl").write_text('{"i": 0}\n{"i": 1}\n')
    assert show.report(tmp_path) == [tmp_path / "report.html", tmp_path / "teacher.jpg"]
    page = (tmp_path / "report.html").read_text()
    assert "Not finished: 2 images" in page and "<svg" not in page
    with pytest.raises(util.UserError, match="no config.json"):
        show.report(tmp_path / "nowhere")


def test_the_chosen_threshold_is_marked_and_a_useless_store_is_named(run, tmp_path):
    _, _, c, human, _ = show.open_run(run)
    c = recipes.Method(**{**vars(c), "threshold": "auto"})
    row = {"precision": 0.8125, "recall": 0.4375, "f1": 0.5625, "kept": 13}
    held_out = [{"threshold": t, **row} for t in (0.05, 0.9999)]
    result = {"images": 1000, "classes": human.class_names, "threshold": 0.9999}
    util.finish(tmp_path, {}, {**result, "held_out": held_out})
    page = "".join(show.pseudo_labels(tmp_path, c, human, tmp_path / "s.jpg"))
    assert re.findall(r'class="chosen"><td>([\d.]+)<td>0.812<td>0.438', page) == ["1.00"]
    assert "(almost) empty" in page and not (tmp_path / "s.jpg").exists()


def test_steps_that_a_resumed_stage_repeats_are_taken_once(tmp_path):
    losses = ((1, 5.0), (2, 9.0), (1, 1.5), (2, 2.5), (3, 3.5))
    lines = [json.dumps({"stage": "teacher", "step": s, "loss": loss}) for s, loss in losses]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    log = show.read_log(tmp_path / "log.jsonl")["teacher"]
    assert [(step, line["loss"]) for step, line in log.items()] == [(1, 1.5), (2, 2.5), (3, 3.5)]


def test_a_chart_goes_through_its_points():
    svg = show.chart("t", {"a": [(0, 0.0), (5, 1.0), (10, 1.0)], "b": [(10, 1.0)]})
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    assert points[0] == "50.0,200.0" and points[2].startswith("480.0,")
    assert 40 < float(points[1].split(",")[1]) < 60


# ---- other pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "masks_run"])
def test_the_figure_has_a_row_for_each_image(kind, request, tmp_path, capsys):
    folder = request.getfixturevalue(kind)
    show.main(["figure", str(folder), "--out", str(tmp_path / "f.jpg"), "--images", "2"])
    picture = Image.open(tmp_path / "f.jpg")
    assert picture.format == "JPEG" and 800 < picture.width <= 900
    assert picture.height == 24 + 8 + 2 * 294
    assert capsys.readouterr().out.strip().endswith("f.jpg")


def test_augment_shows_a_row_for_each_policy_and_takes_boxes_or_a_mask(
    coco_root, voc_root, tmp_path
):
    out = ["--out", str(tmp_path / "a.png")]
    boxed = ["--image", str(coco_root / "images/4.png")]
    show.main(["augment", *boxed, "--json", str(coco_root / "train.json"), *out])
    size = Image.open(tmp_path / "a.png").size
    assert size[0] == 6 * 266 + 6
    image = ["--image", str(voc_root / "JPEGImages/train_00.png")]
    show.main(["augment", *image, "--mask", str(voc_root / "SegmentationClass/train_00.png"), *out])
    assert Image.open(tmp_path / "a.png").format == "PNG"
    with pytest.raises(util.UserError, match="lists no image"):
        show.main(["augment", *image, "--json", str(coco_root / "train.json"), *out])
    with pytest.raises(util.UserError, match="a mask is"):
        show.main(["augment", *image, "--mask", str(coco_root / "images/4.png"), *out])
    with pytest.raises(util.UserError, match="needs a run"):
        show.main(["run"])
