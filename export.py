"""A trained ResNet for other people's code: under torchvision's names, or detectron2's.

    python export.py backbone.pt torchvision r50.pth      torchvision.models.resnet50().load_state_dict: strict, but for fc.*
    python export.py backbone.pt detectron2  r50.pth      detectron2's MODEL.WEIGHTS

The file is what st.py --init takes: our checkpoints, a stage's folder, backbone.pt of hpt.py, the weights of others; of a
detector the backbone alone is written. Which ResNet it is the file says, or else --backbone.

torchvision  {name: tensor}, batch counters included.
detectron2   {"model": {name: tensor}, "__author__", "matching_heuristics": True} with stem.conv1.weight, stem.conv1.norm.*,
             res2.0.conv1.*, res2.0.shortcut.*, ...: its loader finds their places in a detector by the ends of the names. A .pth
             and not its model zoo's .pkl: DetectionCheckpointer (read) treats both alike, and a .pth is read without running
             code from the file. Its config wants MODEL.RESNETS.STRIDE_IN_1X1 False (torchvision's ResNet), INPUT.FORMAT RGB, and
             PIXEL_MEAN and PIXEL_STD as in pre-training; they are printed.
"""
import argparse
import os
import re

import torch

import backbones
import runs
from eval import IMAGENET  # what st.py trains with
from util import UserError, run


def detectron2_name(key):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight"""
    key = key if key.startswith("layer") else "stem." + key
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", re.sub(r"bn(\d)", r"conv\1.norm", key))
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def export(source, naming, out, backbone="resnet50"):
    """Writes `source`'s backbone to `out` -> what was done, in two lines. UserError if it is no ResNet with batch norm."""
    source = runs.weights_of(source)
    if not out.endswith(".pth"):
        raise UserError(f"{out} does not end in .pth, by which detectron2 and others know how to read a file; name it so")
    try:
        found = backbones.read_file(backbones.split_source(source)[1])
        found = found if isinstance(found, dict) else {}
        about = next((found[k] for k in ("config", "about") if isinstance(found.get(k), dict)), {})
        name = about.get("backbone", backbone)
        if name not in backbones.RESNETS:
            raise UserError(f"{source}: only ResNets are exported, not {name}; torchvision names EfficientNets as its file does")
        net = backbones.build(name)
        line = backbones.load_backbone(net, source)
    except ValueError as error:
        raise UserError(f"cannot export: {error}")
    state = net.state_dict()
    if naming == "detectron2":
        state = {detectron2_name(k): v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        state = {"model": state, "__author__": "self-training and HPT, in PyTorch", "matching_heuristics": True}
    runs.write_atomic(out, lambda path: torch.save(state, path))
    mean, std = ([round(255 * v, 3) for v in about.get(k, known)] for k, known in zip(("mean", "std"), IMAGENET))
    return f"{line}\nwritten: {out}; pixels in training: RGB, 0..255, mean {mean}, deviation {std}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    parser.add_argument("file", help="weights, as for st.py --init")
    parser.add_argument("naming", choices=["torchvision", "detectron2"])
    parser.add_argument("out", help="the .pth to write")
    parser.add_argument("--backbone", default="resnet50", choices=list(backbones.RESNETS), help="of a file that does not say")
    args = parser.parse_args(argv)
    print(export(args.file, args.naming, args.out, args.backbone))


if __name__ == "__main__":
    run(main)
