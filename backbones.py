"""Backbones: image -> feature maps. Imports nothing local: copy this file into any project.

    net = build("tf_efficientnet_b7", norm="bn")  # or "gn", "frozen"; NAMES lists all
    print(load_backbone(net, "tf_efficientnet_b7_ns.pth"))  # or "random", "imagenet"; see SOURCES
    maps = net(normalise(images))  # {l: (B, net.channels[l], H/2^l, W/2^l)}, sizes rounded up

resnet10..101              C2..C5  He et al. 2016, v1.5 (stride on the 3x3) [recalled]
efficientnet_b0..b7        C2..C5  Tan & Le 2019, padded symmetrically, for torchvision's weights
tf_efficientnet_b0..b8,l2  C2..C5  padded as in TensorFlow: the paper's networks, timm's tf_ weights
spinenet49S..190           P3..P7  Du et al. 2020, equal channels at all levels: needs no pyramid

Modules of ResNet and EfficientNet have torchvision's names. EfficientNet and SpineNet follow
tensorflow/tpu (models/official: efficientnet/efficientnet_builder.py,
detection/modeling/architecture/{spinenet,nn_blocks,nn_ops}.py). BN of ResNet keeps torchvision's
eps 1e-5; SpineNet has 1e-3, the self-training configurations' (SpineNet's own leave the code's
1e-4). The last BN of a residual branch starts at 1, not at 0. There are no classifier heads, and
no published weights of SpineNet (there are TensorFlow checkpoints only).
"""

import contextlib
import importlib
import math
import os
import re
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import SqueezeExcitation, StochasticDepth

# fmt: off
LEVELS = (2, 3, 4, 5)  # of ResNet and EfficientNet
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation of pixels in 0..1

RESNETS = {
    # name      block         repeats        widths (the stem is as wide as the first)
    "resnet10":  ("basic",      (1, 1, 1, 1),  (32, 64, 128, 256)),  # ours: half as wide
    "resnet18":  ("basic",      (2, 2, 2, 2),  (64, 128, 256, 512)),
    "resnet34":  ("basic",      (3, 4, 6, 3),  (64, 128, 256, 512)),
    "resnet50":  ("bottleneck", (3, 4, 6, 3),  (64, 128, 256, 512)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (64, 128, 256, 512)),
}

EFFICIENTNETS = {
    #     width depth  eps of torchvision's weights (ours: EFFICIENTNET_EPS); None: it has none
    "b0": (1.0, 1.0, 1e-5),
    "b1": (1.0, 1.1, 1e-5),
    "b2": (1.1, 1.2, 1e-5),
    "b3": (1.2, 1.4, 1e-5),
    "b4": (1.4, 1.8, 1e-5),
    "b5": (1.6, 2.2, 1e-3),
    "b6": (1.8, 2.6, 1e-3),
    "b7": (2.0, 3.1, 1e-3),
    "b8": (2.2, 3.6, None),
    "l2": (4.3, 5.3, None),
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
EFFICIENTNET_EPS = 1e-3  # of its norms, whatever detector is around it; their momentum likewise
EFFICIENTNET_MOMENTUM = 0.01  # 0.99 in TensorFlow's way of counting
STOCHASTIC_DEPTH = 0.2   # drop rate of block i of N is 0.2 * i/N

SPINENETS = {
    # name        filters resample repeats endpoint  drop-    |  of the RetinaNet around it
    #             scale   alpha            channels  connect  |  tower width, depth  anchor base
    "spinenet49S": (0.65, 0.5,     1,      256,      0.2,        128,         4,     3.0),
    "spinenet49":  (1.0,  0.5,     1,      256,      0.2,        256,         4,     3.0),
    "spinenet96":  (1.0,  0.5,     2,      256,      0.2,        256,         4,     3.0),
    "spinenet143": (1.0,  1.0,     3,      256,      0.16,       256,         4,     4.0),
    "spinenet190": (1.3,  1.0,     4,      512,      0.2,        512,         7,     4.0),
}   # 49S: the released code has 128 endpoint channels, which gives 11.3M parameters and 30.8
    # GFLOPs. Published are 11.9M and 33.8, and 256 gives 11.9M and 33.7 (derived): so 256.
SPINENET_WIDTHS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # of each level, before scaling
SPINENET_NODES = (  # nodes 0 and 1 are the stem's two bottleneck groups at level 2
    # level, block, the two nodes it takes, a node added as it is
    (2, "bottleneck", 0, 1, None),
    (4, "basic",      0, 1, None),
    (3, "bottleneck", 2, 3, None),
    (4, "bottleneck", 2, 4, None),
    (6, "basic",      3, 5, None),
    (4, "bottleneck", 3, 5, None),
    (5, "basic",      6, 7, None),
    (7, "basic",      6, 8, None),
    (5, "bottleneck", 8, 9, None),
    (5, "bottleneck", 8, 10, None),   # node 11: nobody takes it, so it is added into node 14
    (4, "bottleneck", 5, 10, None),   # node 12 -> P4
    (3, "bottleneck", 4, 10, None),   # node 13 -> P3
    (5, "bottleneck", 7, 12, 11),     # node 14 -> P5
    (7, "bottleneck", 5, 14, None),   # node 15 -> P7
    (6, "bottleneck", 12, 14, None),  # node 16 -> P6
)
SPINENET_OUTPUTS = {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}

PLAIN = [f"efficientnet_{size}" for size, (_, _, eps) in EFFICIENTNETS.items() if eps]
NAMES = [*RESNETS, *PLAIN, *(f"tf_efficientnet_{size}" for size in EFFICIENTNETS), *SPINENETS]
# fmt: on


def normalise(images, pixels=IMAGENET):
    """uint8 (B, 3, H, W) -> float32 where it lies, channels_last; pixels: (mean, deviation)."""
    mean, std = constants(tuple(map(tuple, pixels)), images.device)
    return (images.to(memory_format=torch.channels_last).float() - mean) / std


@lru_cache
def constants(pixels, device):  # made once: making a tensor on a GPU from numbers waits for it
    return [torch.tensor([255 * x for x in row], device=device).view(1, 3, 1, 1) for row in pixels]


def need(condition, sentence):
    if not condition:
        raise ValueError(sentence)


# ---- layers --------------------------------------------------------------------------------------


def conv(c_in, c_out, k, stride=1, groups=1, same=False):
    kind = SameConv2d if same and stride > 1 else nn.Conv2d  # at stride 1 both pad alike
    return kind(c_in, c_out, k, stride, padding=k // 2, groups=groups, bias=False)


def pad_same(x, k, stride, value=0.0):
    """TensorFlow's "same": ceil(size / stride) outputs, an odd pixel at the bottom and right."""
    h, w = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[-2:]]  # missing
    return F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2], value=value)


def max_pool_same(x, k, stride):
    return F.max_pool2d(pad_same(x, k, stride, float("-inf")), k, stride)


class SameConv2d(nn.Conv2d):
    def forward(self, x):
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """BatchNorm of constant statistics and affine, which are buffers under the usual names."""

    def forward(self, x):  # keeps bf16 under autocast; torchvision's x * scale + shift does not
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def make_norm(norm, channels, eps=1e-5, momentum=0.1):
    need(norm in ("bn", "gn", "frozen"), f"unknown norm {norm!r}: choose 'bn', 'gn' or 'frozen'")
    if norm == "bn":
        return nn.BatchNorm2d(channels, eps, momentum)
    if norm == "frozen":
        return FrozenBatchNorm2d(channels, eps)
    # of each image alone: 32 groups, or the most that leave at least 8 channels in each
    fitting = [g for g in range(1, 33) if channels % g == 0 and channels // g >= 8]
    return nn.GroupNorm(max(fitting, default=1), channels)


def conv_norm(c_in, c_out, k, stride, make, groups=1, same=False, act=True):
    layers = nn.Sequential(conv(c_in, c_out, k, stride, groups, same), make(c_out))
    if act:
        layers.append(nn.SiLU(inplace=True))
    return layers


def init_convs(model):
    """He normal; a depthwise conv's fan_out is k*k (TensorFlow), not k*k*channels (torchvision)."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ---- ResNet --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """basic: 3x3, 3x3. bottleneck: 1x1, 3x3 (has the stride: v1.5), 1x1 to 4 x width. `drop`: the
    rate at which images lose the branch in training."""

    def __init__(self, block, c_in, width, stride, make, act=F.relu, drop=0.0):
        super().__init__()
        if block == "basic":
            rows = ((c_in, width, 3, stride), (width, width, 3, 1))
        else:
            rows = ((c_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.depth = len(rows)
        self.c_out = rows[-1][1]
        self.act = act
        for i, row in enumerate(rows, 1):
            self.add_module(f"conv{i}", conv(*row))
            self.add_module(f"bn{i}", make(row[1]))
        self.stochastic_depth = StochasticDepth(drop, "row")
        self.downsample = None
        if stride != 1 or c_in != self.c_out:
            self.downsample = nn.Sequential(conv(c_in, self.c_out, 1, stride), make(self.c_out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = self.act(y, inplace=True)
        y = self.stochastic_depth(y)
        y += x if self.downsample is None else self.downsample(x)  # no norm needs its output
        return self.act(y, inplace=True)


def residuals(repeats, block, c_in, width, stride, *options):
    """Only the first block has the stride and may have to project its shortcut."""
    blocks = nn.Sequential(Residual(block, c_in, width, stride, *options))
    for _ in range(repeats - 1):
        blocks.append(Residual(block, blocks[0].c_out, width, 1, *options))
    return blocks


class ResNet(nn.Module):
    def __init__(self, block, repeats, widths, norm):
        super().__init__()
        make = partial(make_norm, norm)
        c = widths[0]
        self.conv1 = conv(3, c, 7, 2)
        self.bn1 = make(c)
        self.channels = {}
        for level, n, width in zip(LEVELS, repeats, widths):
            blocks = residuals(n, block, c, width, 1 if level == 2 else 2, make)
            self.add_module(f"layer{level - 1}", blocks)
            c = self.channels[level] = blocks[-1].c_out
        init_convs(self)

    def forward(self, x, levels=LEVELS):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, C, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)  # (B, C, H/4, W/4)
        feats = {}
        for level in levels:
            x = feats[level] = getattr(self, f"layer{level - 1}")(x)
        return feats


# ---- EfficientNet --------------------------------------------------------------------------------


def round_width(channels, width):
    """To a multiple of 8, but never below 90% of what was asked for."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class MBConv(nn.Module):
    """1x1 expand, depthwise k x k, squeeze-excite, 1x1 project without activation. `drop`: the rate
    at which images lose the branch in training, where the block is residual."""

    def __init__(self, c_in, c_out, k, stride, expand, drop, make, same):
        super().__init__()
        mid = c_in * expand
        squeezed = max(1, c_in // 4)  # of the block's INPUT, not of the expanded width
        self.block = nn.Sequential()
        if expand != 1:
            self.block.append(conv_norm(c_in, mid, 1, 1, make))
        self.block.append(conv_norm(mid, mid, k, stride, make, groups=mid, same=same))
        self.block.append(SqueezeExcitation(mid, squeezed, activation=nn.SiLU))
        self.block.append(conv_norm(mid, c_out, 1, 1, make, act=False))
        self.residual = stride == 1 and c_in == c_out
        self.stochastic_depth = StochasticDepth(drop, "row")

    def forward(self, x):
        return x + self.stochastic_depth(self.block(x)) if self.residual else self.block(x)


class EfficientNet(nn.Module):
    def __init__(self, width, depth, norm, same):
        super().__init__()
        make = partial(make_norm, norm, eps=EFFICIENTNET_EPS, momentum=EFFICIENTNET_MOMENTUM)
        repeats = [math.ceil(row[0] * depth) for row in EFFICIENTNET_STAGES]
        c = round_width(EFFICIENTNET_STEM, width)
        self.features = nn.Sequential(conv_norm(3, c, 3, 2, make, same=same))
        self.channels = {}
        self.last_stage = {}  # of each level
        level = 1
        block_id = 0
        for n, (_, k, stride, expand, c_out) in zip(repeats, EFFICIENTNET_STAGES):
            c_out = round_width(c_out, width)
            stage = nn.Sequential()
            for i in range(n):
                drop = STOCHASTIC_DEPTH * block_id / sum(repeats)
                s = stride if i == 0 else 1
                stage.append(MBConv(c, c_out, k, s, expand, drop, make, same))
                c = c_out
                block_id += 1
            if stride == 2:
                level += 1
            self.channels[level] = c
            self.last_stage[level] = len(self.features)
            self.features.append(stage)
        del self.channels[1]  # half the size: nobody takes it
        init_convs(self)

    def forward(self, x):
        outs = []
        for stage in self.features:
            x = stage(x)
            outs.append(x)
        return {level: outs[self.last_stage[level]] for level in LEVELS}


# ---- SpineNet ------------------------------------------------------------------------------------


class Resample(nn.Module):
    """A node's output at the resolution and width that another node wants: squeeze to `mid`
    channels, resize, expand. down: levels to go down in resolution; negative: up."""

    def __init__(self, c_in, mid, c_out, down, make):
        super().__init__()
        self.down = down
        self.squeeze = conv_norm(c_in, mid, 1, 1, make)
        if down > 0:
            self.halve = conv_norm(mid, mid, 3, 2, make)
        self.expand = conv_norm(mid, c_out, 1, 1, make, act=False)

    def forward(self, x, size):
        x = self.squeeze(x)
        if self.down > 0:
            x = self.halve(x)
        if self.down > 1:
            x = max_pool_same(x, 3 if self.down == 2 else 5, 2 ** (self.down - 1))
        if self.down < 0:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x)  # (B, c_out, *size)


class SpineNet(nn.Module):
    def __init__(self, scale, alpha, repeats, endpoint, drop, norm):
        super().__init__()
        make = partial(make_norm, norm, eps=1e-3, momentum=0.003)  # 0.997 as TensorFlow counts
        inner = {level: int(c * scale) for level, c in SPINENET_WIDTHS.items()}

        def group(block, c_in, level, rate):
            return residuals(repeats, block, c_in, inner[level], 1, make, F.silu, rate)

        c = 4 * inner[2]
        self.stem = conv_norm(3, 64, 7, 2, make)
        self.groups = nn.ModuleList([group("bottleneck", n, 2, 0.0) for n in (64, c)])
        self.resample = nn.ModuleList()
        nodes = [(2, c), (2, c)]  # level and channels of those so far
        for i, (level, block, *parents, _) in enumerate(SPINENET_NODES, 1):
            c = inner[level] if block == "basic" else 4 * inner[level]
            ways = nn.ModuleList()
            for above, c_in in (nodes[p] for p in parents):
                ways.append(Resample(c_in, int(inner[above] * alpha), c, level - above, make))
            self.resample.append(ways)
            self.groups.append(group(block, c, level, drop * i / len(SPINENET_NODES)))
            nodes.append((level, c))
        self.channels = dict.fromkeys(SPINENET_OUTPUTS, endpoint)
        self.endpoints = nn.ModuleDict()
        for level, node in SPINENET_OUTPUTS.items():
            self.endpoints[str(level)] = conv_norm(nodes[node][1], endpoint, 1, 1, make)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # TensorFlow: a normal cut off at two of its deviations,
                std = 1 / math.sqrt(m.weight[0].numel()) / 0.8796  # which leaves 0.8796 of it
                nn.init.trunc_normal_(m.weight, 0.0, std, -2 * std, 2 * std)

    def forward(self, x):
        sizes = {level: [-(-n // 2**level) for n in x.shape[-2:]] for level in SPINENET_WIDTHS}
        x = max_pool_same(self.stem(x), 3, 2)  # (B, 64, H/4, W/4)
        nodes = [self.groups[0](x)]
        nodes.append(self.groups[1](nodes[0]))
        for row, ways, group in zip(SPINENET_NODES, self.resample, self.groups[2:]):
            level, _, a, b, extra = row
            x = ways[0](nodes[a], sizes[level]) + ways[1](nodes[b], sizes[level])
            if extra is not None:
                x = x + nodes[extra]
            nodes.append(group(F.silu(x)))
        return {l: self.endpoints[str(l)](nodes[node]) for l, node in SPINENET_OUTPUTS.items()}


# ---- any of them ---------------------------------------------------------------------------------


def build(name, norm="bn"):
    """Randomly initialised: forward(x) -> {level: (B, channels[level], H/2^level, W/2^level)}."""
    need(name in NAMES, f"unknown backbone {name!r}: choose one of {', '.join(NAMES)}")
    if name in RESNETS:
        net = ResNet(*RESNETS[name], norm)
    elif name in SPINENETS:
        net = SpineNet(*SPINENETS[name][:5], norm)
    else:
        width, depth, _ = EFFICIENTNETS[name[-2:]]
        net = EfficientNet(width, depth, norm, same=name.startswith("tf_"))
    net.name = name
    net.norm = norm
    return net


BLOCKS = (Residual, MBConv, Resample)


def recompute(net, kinds=BLOCKS):
    """Gradient checkpointing (Chen et al. 2016): blocks of `kinds` keep only their input for the
    backward pass and run forward again then. Same outputs, gradients and batch-norm averages, for
    less memory and about a third more time."""
    for block in net.modules():
        if isinstance(block, kinds):
            twice = partial(checkpoint, use_reentrant=False, context_fn=partial(both_passes, block))
            block.forward = partial(twice, block.forward)  # goes before the forward of its class


def both_passes(block):
    """What surrounds the first forward pass, and what the second."""
    return contextlib.nullcontext(), averages_at_rest(block)


@contextlib.contextmanager
def averages_at_rest(block):
    """The second time a batch norm sees a batch, its running averages must not move again."""
    kind = nn.modules.batchnorm._BatchNorm  # SyncBatchNorm too
    averages = [b for m in block.modules() if isinstance(m, kind) for b in m.buffers()]
    before = [b.clone() for b in averages]
    try:
        yield
    finally:  # checkpoint() breaks off by an exception once it has all it needs
        for b, value in zip(averages, before):
            b.copy_(value)


# ---- weights from elsewhere ----------------------------------------------------------------------

# fmt: off
SOURCES = {  # of keys without the "module." that all of them may begin with (DataParallel, DDP)
    # what it is    a key that tells      taken off     left out on purpose
    "ours":        (r"backbone\.",        "backbone.",  r"(?!backbone\.)"),
    "MoCo":        (r"encoder_q\.",       "encoder_q.", r"encoder_(q\.fc|k)\.|queue"),
    "timm":        (r"conv_stem\.",       "",           r"(conv_head|bn2|classifier)\."),
    "torchvision": (r"(fc|classifier)\.", "",           r"(fc|classifier|features\.8)\."),
    "bare":        ("",                   "",           r"$."),  # nothing is
}
TIMM_EPS = 1e-5  # of its efficientnet_* weights; its tf_ ones have TensorFlow's 1e-3
TIMM_BLOCK = {  # parts of its blocks -> ours
    "conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "se.conv_reduce": "2.fc1",
    "se.conv_expand": "2.fc2", "conv_pwl": "3.0", "bn3": "3.1",
}
TIMM_FIRST = {  # the same of the first stage, which does not expand
    "conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2",
    "conv_pw": "2.0", "bn2": "2.1",
}
# fmt: on


def load_backbone(model, source):
    """Fills `model` (from build) from `source` -> one line saying what was loaded and what not.

    source: "random" (leaves it) | "imagenet" (torchvision's published weights, from torch.hub's
    cache or fetched) | path of a .pth (or .safetensors, if that package is installed) in one of the
    namings of SOURCES: our checkpoints, bare backbones, torchvision's and timm's classifiers,
    MoCo's training checkpoints | "simclr:" + path of a ResNet converted from SimCLR (torchvision's
    names, but trained on pixels in 0..1: that is folded into the first layer).
    Anything but a complete, exact fit is a one-line ValueError and leaves the model as it was.
    """
    if source == "random":
        return f"{model.name}: random initialisation, nothing loaded"
    simclr, path = split_source(source)
    if source == "imagenet":
        path = imagenet_file(model.name)
    tensors, about = read_weights(path)
    kind = next(k for k, row in SOURCES.items() if any(re.match(row[0], name) for name in tensors))
    check_origin(model.name, kind, about, simclr, path)
    _, prefix, left_out = SOURCES[kind]
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if not re.match(left_out, k)}
    ignored = len(tensors) - len(state)
    if kind == "timm":
        state = {timm_to_ours(k): v for k, v in state.items()}
    state = without_counters(state)
    mixed = model.norm == "gn" and any(k.endswith("running_mean") for k in state)
    need(not mixed, f"'{path}' holds BatchNorm weights, not 'gn': build with 'bn' or 'frozen'")
    check_fit(model, state, path)
    note = kind
    if "efficientnet" in model.name:
        note += refold_eps(state, trained_eps(model.name, kind))
        if kind == "bare" and not about:
            note += "; its padding and BN eps are taken to be this network's"
    if simclr:
        fold_pixels(state)
        note = "SimCLR; pixels in 0..1 -> normalised ones folded into the first layer"
    model.load_state_dict(state, strict=False)  # the counters lack; check_fit compared the others
    return (
        f"{model.name}: all {len(state)} tensors loaded from '{path}' ({note}), none left random, "
        f"{ignored} others in it ignored"
    )


def split_source(source):
    """An --init that is a file -> (whether it says simclr:, path)."""
    path = os.fspath(source)
    if path.startswith("simclr:") and not os.path.exists(path):
        return True, path.removeprefix("simclr:")
    return False, path


def read_weights(path):
    """-> {name: tensor}, what a checkpoint of st.py ("config") or hpt.py ("about") says of them."""
    content = read_file(path)
    parts = {}
    if isinstance(content, dict):
        parts = {k: v for k, v in content.items() if isinstance(v, dict)}
    tensors = parts.get("model", parts.get("state_dict", content))
    sound = isinstance(tensors, dict) and all(isinstance(k, str) for k in tensors)
    sound = sound and all(isinstance(v, torch.Tensor) for v in tensors.values())
    what = "give a dict of name -> tensor, bare or as its 'model' or 'state_dict'"
    need(sound and tensors, f"'{path}' is not a checkpoint: {what}")
    if all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors, parts.get("about", parts.get("config", {}))


def check_origin(name, kind, about, simclr, path):
    """What tensors do not tell. Those of both paddings of EfficientNet are alike: only the origin
    of the file speaks, and of timm's two kinds nothing but its name."""
    saved_from = about.get("backbone", name)
    same = saved_from == name or saved_from not in NAMES
    need(same, f"'{path}' was saved from {saved_from}, this is {name}: build {saved_from}")
    resnet = name in RESNETS and kind in ("torchvision", "bare")
    what = f"no ResNet converted from SimCLR ({kind} names, for {name})"
    need(resnet or not simclr, f"'{path}' is {what}: give it without 'simclr:'")
    if "efficientnet" not in name:
        return
    file = os.path.basename(path)
    timm = kind == "timm"
    advprop = timm and re.search(r"[_.]ap[-_.]", file)
    need(not advprop, f"'{path}' has AdvProp weights, trained on other pixels: not supported")
    symmetric = kind == "torchvision" or (timm and re.search(r"(?<!tf_)efficientnet_", file))
    tensorflow = timm and "tf_" in file
    if name.startswith("tf_"):
        what = f"{kind}'s weights for symmetric padding"
        need(not symmetric, f"'{path}' has {what}: build {name[3:]}")
    else:
        what = "timm's tf_ weights, which want TensorFlow's padding"
        need(not tensorflow, f"'{path}' has {what}: build tf_{name}")


def timm_to_ours(key):
    """What is not in timm's EfficientNets keeps its name, and will not fit."""
    key = re.sub(r"^conv_stem\.", "features.0.0.", key)
    key = re.sub(r"^bn1\.", "features.0.1.", key)
    match = re.fullmatch(r"blocks\.(\d)\.(\d+)\.(.+)\.(\w+)", key)
    if match:
        stage, block, part, tensor = match.groups()
        parts = TIMM_FIRST if stage == "0" else TIMM_BLOCK
        if part in parts:
            key = f"features.{int(stage) + 1}.{block}.block.{parts[part]}.{tensor}"
    return key


def without_counters(state):
    """num_batches_tracked is used by no norm here, and old torchvision files lack it."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def check_fit(model, state, path):
    """Every key and every shape, compared before anything is copied."""
    wanted = {k: tuple(v.shape) for k, v in without_counters(model.state_dict()).items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    if given == wanted:
        return
    missing = [k for k in wanted if k not in given]
    unexpected = [k for k in given if k not in wanted]
    what = f"missing {listed(missing)}, unexpected {listed(unexpected)}"
    if not missing and not unexpected:
        k = next(k for k in wanted if given[k] != wanted[k])
        what = f"{k} is {given[k]} in the file, {wanted[k]} in the model"
    net = f"{model.name} with norm '{model.norm}'"
    raise ValueError(f"'{path}' does not fit {net}: {what}; build what the file was saved from")


def listed(keys):
    names = keys[:3] + ["..."] if len(keys) > 3 else keys
    return f"{len(keys)} ({', '.join(names)})" if keys else "none"


def trained_eps(name, kind):
    """The eps of an EfficientNet's norms where weights of this kind were trained."""
    if kind == "torchvision":
        return EFFICIENTNETS[name[-2:]][2]
    if kind == "timm" and not name.startswith("tf_"):
        return TIMM_EPS
    return EFFICIENTNET_EPS


def refold_eps(state, eps):
    """Rescales BN weights to keep w / sqrt(var + eps), which is exact in eval -> a note of it."""
    if eps == EFFICIENTNET_EPS:
        return ""
    for k in [k for k in state if k.endswith("running_var")]:
        w = k.replace("running_var", "weight")
        state[w] = state[w] * ((state[k] + EFFICIENTNET_EPS) / (state[k] + eps)).sqrt()
    return f"; BN eps {eps:g} -> {EFFICIENTNET_EPS:g} folded into the BN weights"


def fold_pixels(state):
    """A network trained on pixels in 0..1, for normalised ones: its first conv scaled, its first BN
    shifted. Exact but at the border, where padding meant black and now means the mean colour."""
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in IMAGENET)
    w = state["conv1.weight"]  # (C, 3, 7, 7)
    state["bn1.running_mean"] = state["bn1.running_mean"] - (w * mean).sum((1, 2, 3))
    state["conv1.weight"] = w * std


def imagenet_file(name):
    """Path of torchvision's weights in torch.hub's cache, fetched first if need be: V1, the recipe
    of the papers' era. V2 adds label smoothing, mixup, EMA and long training, which would blur a
    comparison of initialisations."""
    known = [*RESNETS, *PLAIN][1:]  # without our resnet10
    need(name in known, f"torchvision has weights for {', '.join(known)}, none for {name}")
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    sha256 = path.rpartition("-")[2].removesuffix(".pth")  # its first digits
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            torch.hub.download_url_to_file(url, path, sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash
        what = f"cannot fetch ImageNet weights for {name} ({type(error).__name__})"
        raise ValueError(f"{what}: put {url} at '{path}', or use 'random' or a path") from None
    return path


def read_file(path):
    """torch.load that never runs code from the file, or safetensors; failures told in one line."""
    what = "give 'random', 'imagenet' or the path of a .pth state dict"
    need(os.path.isfile(path), f"'{path}' is not a file: {what}")
    try:
        if path.endswith(".safetensors"):
            # an extra package, for these files only
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        what = "pip install safetensors, or save it as .pth where it is installed"
        raise ValueError(f"'{path}' needs the package safetensors: {what}") from None
    except Exception as error:  # of many kinds, depending on how the file is broken
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = unsafe[1] if unsafe else type(error).__name__
        raise ValueError(
            f"'{path}' is not a checkpoint of plain tensors, or a damaged one ({reason}); unsafe "
            "unpickling is refused: fetch it again, or load it where you trust it, torch.save its "
            "state_dict() and give that file"
        ) from None
