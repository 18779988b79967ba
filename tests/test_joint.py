"""Joint training: detection or segmentation and classification on one backbone; the validation curve of a stage."""
import json

import pytest
import torch
import torch.nn.functional as F

import classify
import models
import runs
import segment
import st
import world
from conftest import killed, records, start
from test_classify import class_folders
from test_segment import voc_folder
from util import UserError

TINY = ["--task", "seg", "--recipe", "seg-fine", "--data", "voc", "--image-size", "64", "--batch", "4", "--steps", "8",
        "--student-steps", "8", "--norm", "gn", "--precision", "fp32", "--threshold", "0.0", "--labeled", "0.5", "--lr", "1e-3",
        "--save-every", "4", "--eval-every", "3"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags of a run with three classes of pixels and three of images."""
    folder = tmp_path_factory.mktemp("joint")
    return [*TINY, "--root", str(voc_folder(folder / "squares", 24, 8)), "--joint", str(class_folders(folder / "colours", 8, 2))]


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start(*given, "--out", out, "--workers", "1", "--control")
    assert done.returncode == 0, done.stderr
    return out


def root_of(flags):
    return flags[flags.index("--root") + 1]


def batch(size=32):
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (6, size, size), generator=g, dtype=torch.uint8)
    masks[4:] = 255  # what data.collate gives an image that has a class but no mask
    return {"images": torch.randn(6, 3, size, size, generator=g), "masks": masks, "part": torch.tensor([0, 0, 1, 1, 2, 2]),
            "image_class": torch.tensor([-1, -1, -1, -1, 3, 0])}


def joint_net():
    torch.manual_seed(0)
    net = models.Segmenter("resnet10", 3, (2, 5), 16, 1, "fpn", 4, "gn", "gn")
    net.joint = torch.nn.Linear(net.backbone.channels[5], 5)
    return net


def test_each_loss_is_that_of_its_task_alone():
    b, net = batch(), joint_net().eval()
    prepare, losses = segment.criterion({"stride": 4}, torch.device("cpu"))
    targets, counts = classify.joined(prepare, losses)[0](b)
    each = classify.joined(prepare, losses)[1](models.Joint(net)(b["images"], b["part"]), targets, b["part"], counts)
    assert each.shape == (6, 2) and counts[2] == 2
    masks = b["masks"][:4, 2::4, 2::4].long()
    for part, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
        assert each[rows, 0].sum().item() == pytest.approx(F.cross_entropy(net(b["images"])[rows], masks[rows]).item(), rel=1e-5)
    logits = net.joint(net.backbone(b["images"])[5].mean((2, 3)))[4:]
    assert each[4:, 1].sum().item() == pytest.approx(F.cross_entropy(logits, b["image_class"][4:]).item(), rel=1e-5)
    assert not each[:4, 1].any() and not each[4:, 0].any()


def test_classification_reaches_the_backbone_and_no_head_but_its_own():
    b, net = batch(), joint_net()
    prepare, losses = classify.joined(*segment.criterion({"stride": 4}, torch.device("cpu")))
    targets, counts = prepare(b)
    losses(models.Joint(net)(b["images"], b["part"]), targets, b["part"], counts)[:, 1].sum().backward()
    reached = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"backbone", "joint"}


def test_every_stage_sees_the_classification_set_(finished):
    for stage in ("teacher", "student", "control"):
        log = records(finished, stage)
        assert log[8]["class_joint"] > 0 and ("ce_pseudo" in log[1]) == (stage == "student")
    teacher, state = (runs.load_checkpoint(finished / stage) for stage in ("teacher", "student"))
    assert not torch.equal(teacher["model"]["joint.weight"], state["model"]["joint.weight"])
    assert state["model"]["joint.weight"].shape[0] == 3 == state["config"]["joint_classes"] and len(state["averages"]) == 4
    assert json.loads((finished / "control/stage.json").read_text())["deps"]["images_per_step"] == [8, 0, 4]


def test_the_curve_of_a_stage_is_its_score_on_the_way(finished, given):
    curve = json.loads((finished / "results.json").read_text())["teacher"]["curve"]
    assert [step for step, _ in curve] == [3, 6, 8] and runs.load_checkpoint(finished / "teacher")["curve"] == curve[:2]
    scored = start("--task", "seg", "--mode", "eval", "--ckpt", finished / "teacher", "--data", "voc", "--root", root_of(given),
                   "--precision", "fp32")
    assert scored.returncode == 0 and f"{curve[-1][1]}" in scored.stdout


def test_killed_and_run_again_it_ends_with_the_same_bits(given, finished, tmp_path):
    args = [*given, "--out", str(tmp_path / "run"), "--workers", "1", "--control"]
    assert killed(tmp_path, ("torch.optim.AdamW.step",), 6, *args)
    assert killed(tmp_path, ("torch.optim.AdamW.step",), 9, *args)
    assert start(*args).returncode == 0
    whole, got = (json.loads((run / "results.json").read_text()) for run in (finished, tmp_path / "run"))
    for stage in ("teacher", "student", "control"):
        assert {**got[stage], "seconds": 0} == {**whole[stage], "seconds": 0}


def test_two_processes_train_as_one(given, finished, tmp_path):
    done = start(*given, "--out", tmp_path / "two", "--workers", "0", "--mode", "train", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (records(run, "teacher") for run in (finished, tmp_path / "two"))
    for step in (1, 4, 8):
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)
        assert two[step]["class_joint"] == pytest.approx(one[step]["class_joint"], rel=1e-3)


def test_detection_trains_jointly_too(tmp_path):
    world.build(tmp_path / "world", "det", {"train": 8, "val": 2})
    world.build(tmp_path / "world", "single", {"train": 12, "extra": 12, "val": 12})
    st.main(["--data", "coco", "--root", str(tmp_path / "world/det"), "--joint", str(tmp_path / "world/single"), "--out",
             str(tmp_path / "run"), "--mode", "train", "--labeled", "1", "--image-size", "64", "--batch", "4", "--steps", "3",
             "--workers", "0", "--precision", "fp32", "--norm", "gn", "--threshold", "0.5"])
    log = records(tmp_path / "run", "teacher")
    assert log[3]["class_joint"] > 0 and log[3]["box"] > 0 and "box_joint" not in log[3] and "class" not in log[3]


def test_a_loss_that_is_not_finite_is_reported_for_every_part(tmp_path):
    b = {"image_id": torch.arange(3), "part": torch.arange(3), "boxes": torch.zeros(3, 0, 4), "labels": torch.zeros(3, 0)}
    with pytest.raises(UserError, match="loss is not finite at step 7"):
        runs.fail_nonfinite(tmp_path, 7, b, torch.full((3, 2), torch.nan), 0)
    assert [row["part"] for row in json.loads(next(tmp_path.glob("*.json")).read_text())] == ["human", "pseudo", "joint"]


def test_classification_weighs_the_same_with_and_without_pseudo_labels():
    c, (h, p, k) = {"alpha": 0.5, "loss_norm": "on"}, torch.tensor([3.0, 4.0, 5.0])
    averages = torch.tensor([3.0, 8.0, 0.5, 1.0], dtype=torch.float64)
    assert st.combined([h, k], averages[[0, 2, 3]], c, True).item() == pytest.approx((3 + 3 / 0.5 * 5) / 2)
    assert st.combined([h, p, k], averages, c, True).item() == pytest.approx(((3 + 0.5 * 3 / 8 * 4) / 1.5 + 3 / 0.5 * 5) / 2)
    assert st.combined([h, p], averages[[0, 1, 3]], c, False).item() == pytest.approx((3 + 0.5 * 3 / 8 * 4) / 1.5)


@pytest.mark.parametrize("flags, match", [
    (("--task", "cls", "--joint", "shapes"), "--joint adds classification to --task det or seg"),
    (("--joint", "nowhere"), "no folder nowhere/train")])
def test_what_cannot_be_joined_is_refused(given, tmp_path, flags, match):
    task = flags[1] if flags[0] == "--task" else "seg"
    data = ["--data", "shapes", "--root", str(tmp_path / "w")] if task == "cls" else ["--data", "voc", "--root", root_of(given)]
    with pytest.raises(UserError, match=match):
        st.main(["--task", task, *data, *flags[-2:], "--out", str(tmp_path / "run"), "--workers", "0"])
