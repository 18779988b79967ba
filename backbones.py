"""
Backbones: image -> feature maps C2..C5. One file, no local imports: copy it into any project.

    net = build("resnet50", norm="bn")                 # or 'gn', 'frozen'
    print(load_backbone(net, "imagenet"))              # or 'random', or a path to a .pth
    c2, c3, c4, c5 = net(x).values()                   # x (B, 3, H, W); c_l (B, net.channels[l], H/2^l, W/2^l)

Implements  ResNet (He et al. 2016) in its v1.5 form (stride on the 3x3) [recalled], used by Zoph et al. 2020 Table 4 and HPT;
            EfficientNet (Tan & Le 2019, Table 1), used by Zoph et al. 2020 in most tables.
Names       modules are called what torchvision calls them, so its state dicts load key by key; there is no classifier.
Differs     EfficientNet pads symmetrically (torchvision's weights want it; the TF original pads 'same', i.e. more at
            bottom/right when the stride is 2). ResNet keeps torchvision's BN eps 1e-5 / momentum 0.1.
            The last BN of a residual branch starts at 1, NOT at 0 (torchvision's default as well).
Input       normalised images; H and W divisible by 32 for exact strides, otherwise each level is ceil(half of the one above).
Left out    the classifier head; EfficientNet-B1..B8/L2 and SpineNet (rows to come); weight EMA (the caller's).
"""
import math
import os
import pickle
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model_weights
from torchvision.ops import StochasticDepth

LEVELS = (2, 3, 4, 5)

# 'weights' is the torchvision set behind load_backbone(net, "imagenet"): V1 everywhere, the plain recipe of the papers' era
# (V2 adds label smoothing, mixup, EMA and long training, which would blur a comparison of initialisations).
RESNETS = {
    # name      block         repeats        widths              weights            (stem width = first width)
    "resnet10":  ("basic",      (1, 1, 1, 1),  (32, 64, 128, 256),  None),  # ours: half width, for the miniature recipes
    "resnet18":  ("basic",      (2, 2, 2, 2),  (64, 128, 256, 512), "IMAGENET1K_V1"),
    "resnet34":  ("basic",      (3, 4, 6, 3),  (64, 128, 256, 512), "IMAGENET1K_V1"),
    "resnet50":  ("bottleneck", (3, 4, 6, 3),  (64, 128, 256, 512), "IMAGENET1K_V1"),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (64, 128, 256, 512), "IMAGENET1K_V1"),
}

EFFICIENTNETS = {
    # name            width depth  weights          eps those weights were trained with (ours: EFFICIENTNET_EPS)
    "efficientnet_b0": (1.0, 1.0, "IMAGENET1K_V1", 1e-5),
}
EFFICIENTNET_STAGES = (  # of B0; others scale channels by width, repeats by depth
    # repeats, kernel, stride, expand, channels; squeeze-excite ratio 0.25 throughout
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),   # -> C2
    (2, 5, 2, 6, 40),   # -> C3
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),  # -> C4
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),  # -> C5
)
EFFICIENTNET_STEM = 32
EFFICIENTNET_EPS = 1e-3  # of its BatchNorms, whatever the detector around it uses
STOCHASTIC_DEPTH = 0.2   # drop rate of block i of N is 0.2 * i/N


# ---- layers --------------------------------------------------------------------------------------------------------

def conv(c_in, c_out, k, stride=1, groups=1, bias=False):
    return nn.Conv2d(c_in, c_out, k, stride, padding=k // 2, groups=groups, bias=bias)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with constant statistics and affine, all buffers; same keys as nn.BatchNorm2d but num_batches_tracked."""
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.), ("bias", 0.), ("running_mean", 0.), ("running_var", 1.)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):  # F.batch_norm keeps x's dtype under autocast; x * scale + shift would promote bf16 to fp32
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def make_norm(norm, channels, eps=1e-5, momentum=0.1):
    if norm == "bn":
        return nn.BatchNorm2d(channels, eps, momentum)
    if norm == "frozen":
        return FrozenBatchNorm2d(channels, eps)
    if norm == "gn":  # per image, so 1 process == N processes: 32 groups, or the most that leave >= 8 channels in each
        groups = max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 8), default=1)
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"unknown norm {norm!r}: choose 'bn', 'gn' or 'frozen'")


def init_convs(model):
    """He normal over fan_out. A depthwise conv has fan_out k*k, as in the TF original; torchvision's counts all C of them."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ---- ResNet --------------------------------------------------------------------------------------------------------

class Residual(nn.Module):
    """basic: 3x3, 3x3. bottleneck: 1x1, 3x3 (has the stride: v1.5), 1x1 to 4x width."""
    def __init__(self, block, c_in, width, stride, make):
        super().__init__()
        c_out, rows = {  # rows: c_in, c_out, kernel, stride of each conv
            "basic":      (width,     ((c_in, width, 3, stride), (width, width, 3, 1))),
            "bottleneck": (width * 4, ((c_in, width, 1, 1), (width, width, 3, stride), (width, width * 4, 1, 1))),
        }[block]
        self.depth, self.c_out = len(rows), c_out
        for i, row in enumerate(rows, 1):
            self.add_module(f"conv{i}", conv(*row))
            self.add_module(f"bn{i}", make(row[1]))
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), make(c_out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y, inplace=True)
        y += x if self.downsample is None else self.downsample(x)  # in place: no norm needs its output for backward
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    classifier_keys = ("fc.",)

    def __init__(self, block, repeats, widths, norm):
        super().__init__()
        make = partial(make_norm, norm)
        c = widths[0]
        self.conv1, self.bn1 = conv(3, c, 7, 2), make(c)
        self.channels = {}
        for level, n, width in zip(LEVELS, repeats, widths):
            blocks = []
            for i in range(n):
                blocks.append(Residual(block, c, width, 2 if i == 0 and level > 2 else 1, make))
                c = blocks[-1].c_out
            self.add_module(f"layer{level - 1}", nn.Sequential(*blocks))
            self.channels[level] = c
        init_convs(self)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, C, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)               # (B, C, H/4, W/4)
        feats = {}
        for level in LEVELS:
            x = feats[level] = getattr(self, f"layer{level - 1}")(x)
        return feats


# ---- EfficientNet --------------------------------------------------------------------------------------------------

def round_width(channels, width):
    """To a multiple of 8, but never below 90% of what was asked for."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def conv_norm(c_in, c_out, k, stride, groups, make, act=True):
    return nn.Sequential(conv(c_in, c_out, k, stride, groups), make(c_out), *[nn.SiLU(inplace=True)] * act)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = conv(channels, squeezed, 1, bias=True), conv(squeezed, channels, 1, bias=True)

    def forward(self, x):
        s = F.silu(self.fc1(x.mean((2, 3), keepdim=True)))  # (B, squeezed, 1, 1)
        return x * torch.sigmoid(self.fc2(s))


class MBConv(nn.Module):
    """1x1 expand, depthwise k x k, squeeze-excite, 1x1 project without activation; dropped at rate `drop` if residual."""
    def __init__(self, c_in, c_out, k, stride, expand, drop, make):
        super().__init__()
        mid = c_in * expand
        layers = [conv_norm(c_in, mid, 1, 1, 1, make)] if expand != 1 else []
        layers += [conv_norm(mid, mid, k, stride, mid, make),
                   SqueezeExcite(mid, max(1, c_in // 4)),  # a quarter of the block's INPUT, not of the expanded width
                   conv_norm(mid, c_out, 1, 1, 1, make, act=False)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out
        self.stochastic_depth = StochasticDepth(drop, "row")  # per image; divides by survival in training, nothing in eval

    def forward(self, x):
        return x + self.stochastic_depth(self.block(x)) if self.residual else self.block(x)


class EfficientNet(nn.Module):
    classifier_keys = ("classifier.", "features.8.")  # features.8: the 1x1 to 1280 channels, of no use to a pyramid

    def __init__(self, width, depth, norm):
        super().__init__()
        make = partial(make_norm, norm, eps=EFFICIENTNET_EPS, momentum=0.01)  # momentum 0.99 in TF's way of counting
        repeats = [math.ceil(row[0] * depth) for row in EFFICIENTNET_STAGES]
        c = round_width(EFFICIENTNET_STEM, width)
        stages, level, block_id = [conv_norm(3, c, 3, 2, 1, make)], 1, 0
        self.channels, self.stage_of = {}, {}
        for n, (_, k, stride, expand, c_out) in zip(repeats, EFFICIENTNET_STAGES):
            blocks = []
            for i in range(n):
                drop = STOCHASTIC_DEPTH * block_id / sum(repeats)
                s, c_next = (stride if i == 0 else 1), round_width(c_out, width)
                blocks.append(MBConv(c, c_next, k, s, expand, drop, make))
                c, block_id = c_next, block_id + 1
            level += stride == 2
            self.channels[level], self.stage_of[level] = c, len(stages)  # the last stage at a stride stands
            stages.append(nn.Sequential(*blocks))
        self.channels = {l: self.channels[l] for l in LEVELS}
        self.features = nn.Sequential(*stages)
        init_convs(self)

    def forward(self, x):
        outs = []
        for stage in self.features:
            x = stage(x)
            outs.append(x)
        return {l: outs[self.stage_of[l]] for l in LEVELS}


def build(name, norm="bn"):
    """Randomly initialised backbone: forward(x) -> {level: (B, channels[level], H/2^level, W/2^level)} for levels 2..5."""
    if name in RESNETS:
        *row, _ = RESNETS[name]
        net = ResNet(*row, norm)
    elif name in EFFICIENTNETS:
        width, depth, *_ = EFFICIENTNETS[name]
        net = EfficientNet(width, depth, norm)
    else:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join([*RESNETS, *EFFICIENTNETS])}")
    net.name, net.norm = name, norm
    return net


# ---- weights from elsewhere ----------------------------------------------------------------------------------------

def load_backbone(model, source):
    """
    Fill `model` (from build) from `source` and return one line saying what was loaded and what was not.
    source: 'random' (leave it) | 'imagenet' (torchvision's published weights, in torch.hub's cache or fetched) | path of a
    torchvision classifier state dict, a bare backbone's state dict, or one of our checkpoints {'model': {'backbone.*': ...}}.
    Anything but a complete, exact fit is a one-line ValueError and leaves the model as it was.
    """
    if source == "random":
        return f"{model.name}: random initialisation, nothing loaded"
    path = imagenet_file(model.name) if source == "imagenet" else os.fspath(source)
    found = read_file(path)
    ours = isinstance(found, dict) and isinstance(found.get("model"), dict)
    found = found["model"] if ours else found
    if not (isinstance(found, dict) and found and
            all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items())):
        raise ValueError(f"'{path}' is not a checkpoint: give a dict of name -> tensor, or one of ours (with key 'model')")
    if ours:
        state = {k.removeprefix("backbone."): v for k, v in found.items() if k.startswith("backbone.")}
        if not state:
            raise ValueError(f"'{path}' has a 'model' without 'backbone.' keys: give one of our checkpoints, or a state dict")
    else:
        state = {k: v for k, v in found.items() if not k.startswith(model.classifier_keys)}
    ignored = len(found) - len(state)
    # The batch counter is used by no norm here, and old torchvision files lack it: neither required nor refused.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if model.norm == "gn" and any(k.endswith("running_mean") for k in state):
        raise ValueError(f"'{path}' holds BatchNorm weights, which do not fit norm 'gn': build with norm 'bn' or 'frozen'")
    check_fit(model, state, path)
    note = ""
    if ignored and not ours and model.name in EFFICIENTNETS:  # a classifier gives torchvision's own files away
        refold_eps(state, EFFICIENTNETS[model.name][3], EFFICIENTNET_EPS)
        note = f" (BN eps {EFFICIENTNETS[model.name][3]:g} -> {EFFICIENTNET_EPS:g} folded into the BN weights)"
    model.load_state_dict(state, strict=False)  # not strict for the counter only: check_fit has compared the rest
    return f"{model.name}: all {len(state)} tensors loaded from '{path}'{note}, none left random, {ignored} others in it ignored"


def check_fit(model, state, path):
    """Every key and every shape, compared before anything is copied."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    some = lambda keys: f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"
    if missing or unexpected:
        what = f"missing {some(missing)}, unexpected {some(unexpected)}"
    elif wrong:
        what = f"{wrong[0]} is {tuple(state[wrong[0]].shape)} in the file, {tuple(own[wrong[0]].shape)} in the model"
    else:
        return
    raise ValueError(f"'{path}' does not fit {model.name} with norm '{model.norm}': {what}; build what the file was saved from")


def refold_eps(state, eps_from, eps_to):
    """Rescale BN weights to keep w / sqrt(var + eps): a network trained with one eps, run with another, in eval exactly."""
    for k in [k for k in state if k.endswith("running_var")]:
        w = k.replace("running_var", "weight")
        state[w] = state[w] * ((state[k] + eps_to) / (state[k] + eps_from)).sqrt()


def imagenet_file(name):
    """Path of torchvision's weights in torch.hub's cache, fetched first if need be."""
    weights = RESNETS[name][3] if name in RESNETS else EFFICIENTNETS[name][2]
    if weights is None:
        raise ValueError(f"there are no published ImageNet weights for {name} (it is ours): use 'random' or a path")
    url = get_model_weights(name)[weights].url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            sha256 = path.rpartition("-")[2].removesuffix(".pth")  # its first digits; checked before the file gets its name
            torch.hub.download_url_to_file(url, path, sha256, progress=False)
    except (OSError, RuntimeError) as e:  # no network is a URLError, which is an OSError; a wrong hash is a RuntimeError
        raise ValueError(f"cannot fetch ImageNet weights for {name} ({type(e).__name__}): put {url} at '{path}', "
                         "or use 'random' or a path") from None
    return path


def read_file(path):
    """torch.load that never runs code from the file, with its failures told in one line."""
    if not os.path.isfile(path):
        raise ValueError(f"'{path}' is not a file: give 'random', 'imagenet' or the path of a .pth state dict")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, KeyError...: it depends on how the file is broken
        if isinstance(e, pickle.UnpicklingError) or "TorchScript" in str(e):
            name = re.search(r"GLOBAL ([\w.]+)", str(e))
            raise ValueError(f"'{path}' holds more than plain tensors{f' ({name[1]})' if name else ''}; unsafe unpickling is "
                             "refused: load it where you trust it, torch.save its state_dict(), and give that file") from None
        raise ValueError(f"'{path}' is not a checkpoint, or a damaged one ({type(e).__name__}): fetch or save it again") from None
