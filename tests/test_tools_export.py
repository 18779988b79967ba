"""tools.score and tools.export: the numbers of the run, the names of others."""

import json

import pytest
import torch
import torchvision

import backbones
import st
import util
from tools import export, score

TINY = ["--steps", "4", "--batch", "4", "--image-size", "64", "--norm", "gn", "--labeled", "0.5"]
TINY += ["--until", "teacher", "--threshold", "0.5", "--precision", "fp32", "--workers", "0"]


def test_a_score_is_that_of_the_run(coco_root, tmp_path, capsys):
    st.main([*TINY, "--root", str(coco_root), "--out", str(tmp_path)])
    capsys.readouterr()
    score.main([str(tmp_path / "teacher"), "--precision", "fp32", "--workers", "0"])
    out = capsys.readouterr().out
    metrics = json.loads(out[out.index("{") :])
    teacher = json.loads((tmp_path / "results.json").read_text())["teacher"]
    assert {name: teacher[name] for name in metrics} == metrics
    with pytest.raises(util.UserError, match="give a stage's folder"):
        score.main([])


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
