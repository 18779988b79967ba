"""Tools on runs of a few steps: what they write can be read by those it is for."""

import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import draw_coco
from PIL import Image

import backbones
import data
import st
import util
from tools import bench, check, export, predict, score, show

TINY = ["--steps", "6", "--student-steps", "6", "--batch", "4", "--image-size", "64"]
TINY += ["--norm", "gn", "--labeled", "0.5", "--precision", "fp32", "--workers", "0"]


def trained(out, recipe, root, *more):
    st.main([*TINY, "--recipe", recipe, "--root", str(root), "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def boxes_run(coco_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "det"
    return trained(out, "tiny", coco_root, "--threshold", "0.01", "--control", "--eval-every", "3")


@pytest.fixture(scope="module")
def masks_run(voc_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "seg"
    more = ("--threshold", "0.2", "--scales", "1", "--lr", "0.01", "--aug", "s1", "--steps", "60")
    return trained(out, "seg-tiny", voc_root, *more)


@pytest.fixture(scope="module")
def classes_run(class_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cls"
    return trained(out, "cls-tiny", class_root, "--threshold", "0.1", "--until", "teacher")


# ---- pictures ------------------------------------------------------------------------------------


def test_a_report_holds_scores_curves_and_pictures_and_fetches_nothing(boxes_run, masks_run):
    for run, metric in ((boxes_run, "AP50"), (masks_run, "mIoU")):
        paths = show.report(run)
        page = paths[0].read_text()
        assert paths[0].name == "report.html" and metric in page and "http" not in page
        assert page.count("data:image/jpeg") == len(paths) - 1
        assert {path.name for path in paths[1:]} == {"first_batch.png", "pseudo_sheet.png"}
        assert all(min(Image.open(path).size) > 200 for path in paths[1:])
    assert "student − control" in show.report(boxes_run)[0].read_text()


def test_a_report_of_an_unfinished_run_says_what_there_is(boxes_run, tmp_path):
    (tmp_path / "config.json").write_text((boxes_run / "config.json").read_text())
    (tmp_path / "log.jsonl").write_text(
        '{"stage": "teacher", "step": 1, "of": 9, "loss": 1}\n{"sta'
    )
    assert "None yet" in show.report(tmp_path)[0].read_text()
    with pytest.raises(util.UserError, match="no config.json"):
        show.report(tmp_path / "nowhere")


def test_what_a_resumed_stage_logged_twice_is_taken_once(tmp_path):
    lines = [json.dumps({"stage": "teacher", "step": step}) for step in (1, 2, 3, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"cut o']))
    rows = show.read_log(tmp_path / "log.jsonl")["teacher"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_boxes_and_masks_are_drawn_where_they_are():
    image = Image.new("RGB", (40, 30), (10, 10, 10))
    target = {"boxes": np.array([[5, 6, 20, 21]], np.float32), "labels": np.array([3])}
    pixels = np.asarray(show.draw_boxes(image, {**target, "scores": np.array([0.5])}, "abcd", 2))
    assert pixels.shape == (60, 80, 3)
    colour = tuple(int(show.COLOURS[3][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(pixels[30, 10]) == colour and tuple(pixels[30, 39]) == colour  # exclusive far edge
    assert tuple(pixels[50, 70]) == (10, 10, 10)
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 1
    mask[:10] = 255
    pixels = np.asarray(show.draw_mask(image, mask))
    assert tuple(pixels[20, 5]) == (10, 10, 10) and pixels[5, 5].min() > 170
    assert pixels[20, 30, 0] > 100 > pixels[20, 30, 1]  # class 1 in half of its colour, a red


def test_the_figure_and_the_sheet_of_augmentations(boxes_run, coco_root, voc_root, tmp_path):
    show.main(["figure", str(boxes_run), "--out", str(tmp_path / "f.jpg"), "--images", "2"])
    assert Image.open(tmp_path / "f.jpg").width <= 900
    image = coco_root / "images/4.png"
    sheet = ["--draws", "2", "--out", str(tmp_path / "a.png")]
    show.main(["augment", "--image", str(image), "--json", str(coco_root / "train.json"), *sheet])
    size = Image.open(tmp_path / "a.png").size
    masked = ["--image", str(voc_root / "JPEGImages/train_00.png")]
    masked += ["--mask", str(voc_root / "SegmentationClass/train_00.png")]
    show.main(["augment", *masked, *sheet])
    assert Image.open(tmp_path / "a.png").size == size  # four rows of three
    with pytest.raises(util.UserError, match="need --image"):
        show.main(["augment", "--json", "x.json"])


# ---- predict, score ------------------------------------------------------------------------------


def test_predicted_boxes_are_coco_json_and_a_store_that_st_takes(boxes_run, coco_root, tmp_path):
    out = tmp_path / "labels"
    argv = [str(boxes_run / "teacher"), str(coco_root / "images"), "--out", str(out)]
    predict.main([*argv, "--threshold", "0.02"])
    value = json.loads((out / "pseudo.json").read_text())
    assert len(value["images"]) == 32 and [c["id"] for c in value["categories"]] == [3, 7]
    assert value["annotations"] and min(a["score"] for a in value["annotations"]) >= 0.02
    before = (out / "part_0_of_1.jsonl").stat().st_mtime_ns
    predict.main([*argv, "--threshold", "0.02"])  # nothing is predicted again
    assert (out / "part_0_of_1.jsonl").stat().st_mtime_ns == before
    given = ["--teacher", str(boxes_run / "teacher"), "--pseudo", str(out), "--threshold", "0.02"]
    run = trained(tmp_path / "run", "tiny", coco_root, *given)
    assert "student" in json.loads((run / "results.json").read_text())


def test_predicted_masks_are_index_pngs(masks_run, voc_root, tmp_path):
    out = tmp_path / "labels"
    images = tmp_path / "list.txt"
    images.write_text(str(voc_root / "JPEGImages/val_00.png"))
    predict.main([str(masks_run / "student"), str(images), "--out", str(out), "--threshold", "0.4"])
    (path,) = (out / "labels").iterdir()
    mask = np.asarray(Image.open(path))
    assert set(np.unique(mask)) <= {0, 1, 2, 255} and Image.open(path).mode == "P"
    assert mask.shape == np.asarray(Image.open(voc_root / "JPEGImages/val_00.png")).shape[:2]


def test_predicted_classes_are_a_table(classes_run, class_root, tmp_path):
    out = tmp_path / "labels"
    predict.main([str(classes_run / "teacher"), str(class_root / "val"), "--out", str(out)])
    rows = (out / "classes.csv").read_text().splitlines()
    assert rows[0] == "image,class,probability" and len(rows) == 10
    assert {row.split(",")[1] for row in rows[1:]} <= {"", "both", "disc", "square"}


def test_torchvisions_coco_weights_predict_as_torchvision_does(coco_root, tmp_path, monkeypatch):
    small = dict(min_size=64, max_size=64)
    build = torchvision.models.detection.retinanet_resnet50_fpn
    monkeypatch.setattr(predict, "retinanet_resnet50_fpn", lambda **how: build(**how, **small))
    torch.manual_seed(0)
    net = build(weights=None, weights_backbone=None, score_thresh=0.01, **small).eval()
    torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.05)
    torch.save(net.state_dict(), tmp_path / "coco.pth")
    images = data.listed(str(coco_root / "images")).subset([0, 1])
    detector = predict.coco_detector(tmp_path / "coco.pth", 0.01)
    assert len(predict.coco_classes()) == 80
    for i, answer in predict.coco_boxes(detector, images, [0, 1], util.Proc()):
        pixels = np.asarray(data.read_image(images.path(i)), np.float32).transpose(2, 0, 1) / 255
        with torch.no_grad():
            (found,) = net([torch.from_numpy(pixels)])
        named = [
            k
            for k in range(len(found["labels"]))
            if int(found["labels"][k]) in predict.coco_classes()
        ]
        assert len(named) and np.allclose(answer["boxes"], found["boxes"][named], atol=1e-4)
        assert np.allclose(answer["scores"], found["scores"][named], atol=1e-6)
    assert predict.coco_detector(coco_root, 0.05) is None
    torch.save({"head.classification_head.x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(util.UserError, match="is not torchvision's"):
        predict.coco_detector(tmp_path / "other.pth", 0.05)


def test_a_score_is_that_of_the_run(boxes_run, capsys):
    score.main([str(boxes_run / "student"), "--precision", "fp32", "--workers", "0"])
    metrics = json.loads(capsys.readouterr().out.partition("\n")[2])
    student = json.loads((boxes_run / "results.json").read_text())["student"]
    assert {name: student[name] for name in metrics} == metrics
    with pytest.raises(util.UserError, match="give a stage's folder"):
        score.main([])


# ---- check, split --------------------------------------------------------------------------------


def test_check_says_what_is_there(coco_root, voc_root, class_root, capsys):
    for root, words in (
        (coco_root, "24 images"),
        (coco_root / "train.json", "crowd"),
        (voc_root, "share of pixels: background"),
        (class_root, "both 8, disc 8, square 8"),
        (coco_root / "images", "32 images"),
    ):
        check.main([str(root)])
        assert words in capsys.readouterr().out


def test_check_names_what_is_wrong(tmp_path, capsys):
    root = draw_coco(tmp_path / "coco", 4, 2)
    value = json.loads((root / "train.json").read_text())
    value["annotations"][0]["bbox"] = [1, 2, 0, 5]
    (root / "train.json").write_text(json.dumps(value))
    (root / "images/3.png").write_bytes(b"no image")
    with pytest.raises(util.UserError, match="2 problems"):
        check.main([str(root)])
    out = capsys.readouterr().out
    assert "3.png" in out and "1 x no area" in out and "1 x unusable image" in out


def test_a_split_is_written_and_taken(coco_root, voc_root, class_root, tmp_path):
    for root, name in ((coco_root, "det"), (voc_root, "seg"), (class_root, "cls")):
        out = tmp_path / f"{name}.json"
        check.main(["split", str(root), "--fraction", "0.25", "--seed", "3", "--out", str(out)])
        assert len(json.loads(out.read_text())["labeled"]) == 6
    images = data.coco(coco_root, "train")
    assert data.read_split(tmp_path / "det.json", images)["seed"] == 3
    with pytest.raises(util.UserError, match="another version"):
        data.read_split(tmp_path / "seg.json", images)


# ---- export, bench -------------------------------------------------------------------------------


def test_exports_fit_torchvision_and_name_detectron2s_tensors(tmp_path):
    torch.manual_seed(0)
    net = backbones.build("resnet18")
    about = {"backbone": "resnet18", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    torch.save({"model": net.state_dict(), "about": about}, tmp_path / "backbone.pt")
    line = export.export(tmp_path, "torchvision", str(tmp_path / "tv.pth"))
    assert "mean [25.5, 51.0, 76.5]" in line
    other = torchvision.models.resnet18()
    missing = other.load_state_dict(
        torch.load(tmp_path / "tv.pth", weights_only=True), strict=False
    )
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys
    export.main([str(tmp_path), "detectron2", str(tmp_path / "d2.pth")])
    names = torch.load(tmp_path / "d2.pth", weights_only=True)["model"]
    for name in ("stem.conv1.weight", "stem.conv1.norm.running_var", "res3.0.shortcut.norm.bias"):
        assert name in names
    assert len(names) == len(backbones.without_counters(net.state_dict()))
    with pytest.raises(util.UserError, match="does not end in .pth"):
        export.export(tmp_path, "torchvision", "x.pt")
    torch.save({"model": {}, "about": {"backbone": "efficientnet_b0"}}, tmp_path / "e.pth")
    with pytest.raises(util.UserError):
        export.export(tmp_path / "e.pth", "torchvision", str(tmp_path / "y.pth"))


def test_bench_measures_recipes_and_rivals(capsys):
    for recipe in ("seg-tiny", "cls-tiny", "tiny", "tiny-c4"):
        bench.main(["recipe", "--recipe", recipe, "--size", "64", "--batch", "2", "--rounds", "1"])
        assert "images/s" in capsys.readouterr().out
    batch = bench.fake_batch(64, 2)
    step = bench.torchvision_step(batch, 64, torch.float32, False)
    step()
    with pytest.raises(util.UserError, match="multiple of 32"):
        bench.main(["train", "--size", "70"])
