"""A trained ResNet for other people's code: under torchvision's names, or detectron2's.

    python -m tools.export backbone.pt torchvision r50.pth
    python -m tools.export backbone.pt detectron2  r50.pth      (detectron2's MODEL.WEIGHTS)

The file is what st.py --init takes: our checkpoints, a stage's folder, backbone.pt of hpt.py, the
weights of others; of a detector the backbone alone is written. Which ResNet it is the file says, or
else --backbone.

torchvision  {name: tensor}, for resnet50().load_state_dict: strict, but for fc.*
detectron2   {"model": {name: tensor}, "__author__", "matching_heuristics": True}, names as
             stem.conv1.norm.*, res2.0.shortcut.*: its loader finds their places by the ends of the
             names. A .pth and not its model zoo's .pkl: DetectionCheckpointer (read) treats both
             alike, and a .pth is read without running code from the file. Its config wants
             MODEL.RESNETS.STRIDE_IN_1X1 False (torchvision's ResNet), INPUT.FORMAT RGB, and
             PIXEL_MEAN and PIXEL_STD as in pre-training; they are printed.
"""

import argparse
import re

import backbones
import util
from util import need


def detectron2_name(key):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight"""
    if not key.startswith("layer"):
        key = "stem." + key
    key = re.sub(r"bn(\d)", r"conv\1.norm", key)
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def export(source, naming, out, backbone="resnet50"):
    """Writes `source`'s backbone to `out` -> what was done, in two lines."""
    need(out.endswith(".pth"), f"{out} does not end in .pth, by which others know how to read it")
    source = util.weights_of(source)
    try:
        _, about = backbones.read_weights(backbones.split_source(source)[1])
        name = about.get("backbone", backbone)
        need(name in backbones.RESNETS, f"{source}: only ResNets are exported, not {name}")
        net = backbones.build(name)
        line = backbones.load_backbone(net, source)
    except ValueError as error:
        raise util.UserError(f"cannot export: {error}") from None
    state = net.state_dict()
    if naming == "detectron2":
        state = backbones.without_counters(state)
        state = {detectron2_name(k): v for k, v in state.items()}
        author = "self-training and HPT, in PyTorch"
        state = {"model": state, "__author__": author, "matching_heuristics": True}
    util.save_tensors(out, state)
    pixels = about.get("mean", backbones.IMAGENET[0]), about.get("std", backbones.IMAGENET[1])
    mean, std = ([round(255 * v, 3) for v in values] for values in pixels)
    return f"{line}\nwritten: {out}; pixels: RGB, 0..255, mean {mean}, deviation {std}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    parser.add_argument("file", help="weights, as for st.py --init")
    parser.add_argument("naming", choices=["torchvision", "detectron2"])
    parser.add_argument("out", help="the .pth to write")
    choices = list(backbones.RESNETS)
    parser.add_argument("--backbone", default="resnet50", choices=choices, help="if unsaid")
    args = parser.parse_args(argv)
    print(export(args.file, args.naming, args.out, args.backbone))


if __name__ == "__main__":
    util.run(main)
