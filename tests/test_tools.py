"""tools.predict, check and bench: what they write is read by those it is for."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_coco
from PIL import Image
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_Weights, retinanet
from torchvision.transforms.functional import to_tensor

import answers
import data
import recipes
import st
import util
from tools import bench, check, predict

TINY = ["--steps", "6", "--student-steps", "6", "--batch", "4", "--image-size", "64"]
TINY += ["--norm", "gn", "--labeled", "0.5", "--precision", "fp32", "--workers", "0"]
FP32 = ["--precision", "fp32", "--workers", "0"]


def teacher(recipe, root, out, *more):
    given = ["--root", str(root), "--out", str(out), "--until", "teacher"]
    st.main([*TINY, "--recipe", recipe, *given, *more])
    return out / "teacher"


@pytest.fixture(scope="module")
def detector(coco_root, tmp_path_factory):
    longer = ("--steps", "40", "--aug", "s1", "--lr", "0.01")
    return teacher("tiny", coco_root, tmp_path_factory.mktemp("runs") / "det", *longer)


# ---- predict -------------------------------------------------------------------------------------


def test_boxes_become_coco_json_of_every_image_and_a_store_that_st_takes(
    detector, coco_root, tmp_path
):
    out = tmp_path / "labels"
    argv = [str(detector), str(coco_root / "images"), "--out", str(out), *FP32]
    predict.main([*argv, "--threshold", "0.05"])
    pseudo = data.read_coco(out / "pseudo.json", coco_root / "images")
    store = answers.confident(out, 0.05, pseudo)
    assert len(pseudo) == 32 and pseudo.class_ids == [3, 7] and not pseudo.dropped
    assert len(pseudo.boxes) == len(store.boxes) > 0 and pseudo.scores.min() >= 0.05
    for i in store.ids:  # as the network says it of that file
        path = pseudo.path(i)
        (at,) = [k for k in range(len(store)) if store.path(k) == path]
        assert np.allclose(store.target(at)["boxes"], pseudo.target(i)["boxes"], atol=1e-3)
    given = ["--teacher", str(detector), "--pseudo", str(out), "--threshold", "0.05"]
    st.main([*TINY, "--root", str(coco_root), "--out", str(tmp_path / "run"), *given])
    assert "student" in json.loads((tmp_path / "run/results.json").read_text())


def test_another_threshold_costs_no_new_pass(detector, coco_root, tmp_path, monkeypatch):
    argv = [str(detector), str(coco_root / "images"), "--out", str(tmp_path / "out"), *FP32]
    predict.main([*argv, "--threshold", "0.05"])
    before = json.loads((tmp_path / "out/pseudo.json").read_text())
    monkeypatch.setattr(data, "read", None)  # no image is looked at
    predict.main([*argv, "--threshold", "0.1"])
    after = json.loads((tmp_path / "out/pseudo.json").read_text())
    sure = [a["score"] for a in before["annotations"] if a["score"] >= 0.1]
    assert [a["score"] for a in after["annotations"]] == sure
    assert 0 < len(sure) < len(before["annotations"])
    assert len(after["images"]) == len(before["images"])


def test_masks_become_index_files_of_the_images_size(voc_root, tmp_path):
    network = teacher("seg-tiny", voc_root, tmp_path / "run", "--steps", "30", "--aug", "s1")
    argv = [str(network), str(voc_root / "JPEGImages/val_*.png"), "--out", str(tmp_path / "out")]
    predict.main([*argv, "--threshold", "0.6", *FP32])
    masks = sorted((tmp_path / "out/labels").iterdir())
    assert [path.name for path in masks] == [f"val_0{i}.png" for i in range(8)]
    seen = set()
    for path in masks:
        mask = data.read_mask(path, 3)
        assert mask.shape == data.read_mask(voc_root / "SegmentationClass" / path.name, 3).shape
        seen |= set(np.unique(mask).tolist())
    assert seen >= {0, 255}  # some pixels are under the threshold
    with pytest.raises(util.UserError, match="other settings"):  # scales are averaged as in st.py
        predict.main([*argv, "--threshold", "0.6", "--tta-free", *FP32])
    argv[-1] = str(tmp_path / "plain")
    predict.main([*argv, "--threshold", "0.6", "--tta-free", *FP32])
    images = data.listed(str(voc_root / "JPEGImages/val_*.png"))
    net, about = st.restore(network, util.Proc())
    size = about["config"]["image_size"]
    evaluated = dict(answers.masks(net, images, range(len(images)), size, util.Proc()))
    rows = list(answers.read_answers(tmp_path / "plain"))
    assert len(rows) == 8
    for row in rows:
        stored = np.asarray(Image.open(tmp_path / "plain/masks" / row["mask"]))
        assert (stored[..., 0] == evaluated[row["i"]]["mask"]).all()


def test_classes_become_a_table(class_root, tmp_path):
    network = teacher("cls-tiny", class_root, tmp_path / "run")
    argv = [str(network), str(class_root / "val"), "--out", str(tmp_path / "out"), *FP32]
    predict.main([*argv, "--threshold", "0"])
    rows = list(csv.DictReader(open(tmp_path / "out/classes.csv")))
    assert len(rows) == 9 and {row["class"] for row in rows} <= {"both", "disc", "square"}
    assert all((class_root / "val" / row["file"]).exists() for row in rows)
    predict.main([*argv, "--threshold", "0.99"])
    assert len((tmp_path / "out/classes.csv").read_text().splitlines()) == 1


def test_torchvisions_coco_weights_answer_as_torchvision_does(coco_root, tmp_path, monkeypatch):
    """As it builds the network for its weights: frozen batch norm with an eps of 0."""
    sizes = (64, 64, *RetinaNet.__init__.__defaults__[2:])
    monkeypatch.setattr(RetinaNet.__init__, "__defaults__", sizes)  # min_size, max_size
    torch.manual_seed(0)
    weights = RetinaNet_ResNet50_FPN_Weights.COCO_V1
    norm = retinanet.misc_nn_ops.FrozenBatchNorm2d
    backbone = retinanet.resnet50(weights=None, norm_layer=norm)
    extra = retinanet.LastLevelP6P7(256, 256)
    pyramid = retinanet._resnet_fpn_extractor(
        backbone, 5, returned_layers=[2, 3, 4], extra_blocks=extra
    )
    net = RetinaNet(pyramid, 91, score_thresh=0.05).eval()
    torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.05)
    for module in net.modules():
        if isinstance(module, norm):
            module.running_var.uniform_(1e-6, 2)
    torch.save(net.state_dict(), tmp_path / "coco.pth")
    retinanet.overwrite_eps(net, 0.0)
    images = data.listed(coco_root / "images").subset([3, 4])
    ours = predict.open_network(tmp_path / "coco.pth", images, 0.5, util.Proc())
    assert len(ours.class_ids) == 80 and ours.class_ids[-1] == 90
    assert [weights.meta["categories"][i] for i in ours.class_ids] == ours.class_names
    for i, answer in ours.answers([0, 1]):
        with torch.no_grad():
            (truth,) = net([to_tensor(images.read(i)[0])])
        named = np.isin(truth["labels"], ours.class_ids)
        assert named.sum() > 5 and np.allclose(answer["boxes"], truth["boxes"][named], atol=1e-3)
        assert np.allclose(answer["scores"], truth["scores"][named], atol=1e-6)
        ids = np.array(ours.class_ids)[answer["labels"]]
        assert (ids == truth["labels"][named].numpy()).all()
    torch.save({"head.classification_head.x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(util.UserError, match="not the weights of retinanet"):
        predict.open_network(tmp_path / "other.pth", images, 0.5, util.Proc())


def test_what_predict_cannot_use_is_one_sentence(detector, coco_root, tmp_path):
    images = str(coco_root / "images")
    with pytest.raises(util.UserError, match="give a checkpoint and its images"):
        predict.main(["--out", "x"])
    with pytest.raises(util.UserError, match="--out is missing"):
        predict.main([str(detector), images])
    with pytest.raises(util.UserError, match="--threshold 50"):
        predict.main([str(detector), images, "--out", "x", "--threshold", "50"])
    with pytest.raises(util.UserError, match="is a run of st.py"):
        predict.main([str(detector), images, "--out", str(detector.parent)])
    with pytest.raises(util.UserError, match="holds no checkpoint"):
        predict.main([f"{images}/1.png", images, "--out", str(tmp_path / "out")])


# ---- check ---------------------------------------------------------------------------------------


def test_check_says_what_a_data_set_holds(coco_root, voc_root, class_root, capsys):
    for root, words in (
        (coco_root, "24 images (6 without boxes), 36 boxes (1 of crowds)"),
        (coco_root / "val.json", "8 images"),
        (voc_root, "pixels: background"),
        (class_root, "both 8, disc 8, square 8"),
        (coco_root / "images", "32 images"),
    ):
        check.main([str(root)])
        assert words in capsys.readouterr().out


def test_check_names_what_is_wrong_and_fails(tmp_path, capsys):
    root = draw_coco(tmp_path / "coco", 4, 2)
    value = json.loads((root / "train.json").read_text())
    value["annotations"][0]["bbox"] = [1, 2, 0, 5]
    (root / "train.json").write_text(json.dumps(value))
    (root / "images/3.png").write_bytes(b"no image")
    with pytest.raises(util.UserError, match=r"^2 problems in .*coco; training leaves out"):
        check.main([str(root)])
    out = capsys.readouterr().out
    assert "3.png" in out and "1 x no area" in out and "1 x unusable file" in out
    command = [sys.executable, "-m", "tools.check", str(root / "train.json")]
    done = subprocess.run(command, cwd=Path(check.__file__).parents[1], capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


def test_a_mask_with_an_unknown_class_is_a_problem(voc_root, tmp_path, capsys):
    for folder in ("JPEGImages", "ImageSets"):
        (tmp_path / folder).symlink_to(voc_root / folder)
    (tmp_path / "SegmentationClass").mkdir()
    for path in (voc_root / "SegmentationClass").iterdir():
        (tmp_path / "SegmentationClass" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classes.txt").write_text("background\nsquare\ndisc\n")
    check.main([str(tmp_path)])
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / "SegmentationClass/val_00.png")
    with pytest.raises(util.UserError, match="1 problems"):
        check.main([str(tmp_path)])
    assert "holds class 9" in capsys.readouterr().out


def test_a_split_is_what_st_takes(coco_root, voc_root, class_root, tmp_path):
    train_list = voc_root / "ImageSets/Segmentation/train.txt"
    for name, source, root in (
        ("tiny", coco_root / "train.json", coco_root),
        ("seg-tiny", train_list, voc_root),
        ("cls-tiny", class_root / "train", class_root),
    ):
        out = tmp_path / f"{name}.json"
        argv = ["--fraction", "0.25", "--seed", "3", "--out", str(out)]
        check.main(["split", str(source), *argv])
        c = recipes.method(name, threshold="0.5")
        plan = st.Plan(root=str(root), split=str(out), out=str(tmp_path), until="teacher")
        human = st.load(plan, c, util.Proc())[0]
        assert human.ids.tolist() == json.loads(out.read_text())["labeled"]
        assert len(human) == 6
    with pytest.raises(util.UserError, match="--fraction"):
        check.main(["split", str(train_list), "--fraction", "2"])


# ---- bench ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-c4", "seg-tiny", "cls-tiny"])
def test_bench_measures_a_recipe(name, capsys):
    bench.main(["recipe", "--recipe", name, "--size", "64", "--batch", "2", "--rounds", "1"])
    assert "images/s" in capsys.readouterr().out


def test_the_rivals_train_on_the_same_images():
    batch = bench.fake_batch("det", 64, 2)
    assert batch["images"].shape == (2, 3, 64, 64) and batch["boxes"].max() <= 64
    bench.torchvision_step(batch, 64, util.Proc(), channels_last=True)()
    outlined = bench.fake_batch("rcnn", 64, 2, instances=True)
    assert (outlined["number"] >= 0).all() and outlined["numbers"].shape == (2, 64, 64)
    with pytest.raises(util.UserError, match="no multiple of 32"):
        bench.main(["train", "--size", "70"])
