"""
Backbones: image -> feature maps. One file, no local imports: copy it into any project.

    net = build("tf_efficientnet_b7", norm="bn")                 # or 'gn', 'frozen'; NAMES lists all
    print(load_backbone(net, "tf_efficientnet_b7_ns.pth"))       # or 'random', 'imagenet', or a file listed at SOURCES
    feats = net(x)                                               # x (B, 3, H, W) -> {l: (B, net.channels[l], H/2^l, W/2^l)}

    resnet10..101              C2..C5   He et al. 2016, v1.5 (stride on the 3x3) [recalled]; Zoph et al. 2020 Table 4, and HPT
    efficientnet_b0..b7        C2..C5   Tan & Le 2019, padded symmetrically as torchvision does: for torchvision's weights
    tf_efficientnet_b0..b8,l2  C2..C5   the same padded as TensorFlow does ('same'): the paper's own nets, timm's tf_ weights
    spinenet49S..190           P3..P7   Du et al. 2020, equal channels at all levels: needs no feature pyramid on top

Names       modules of ResNet and EfficientNet are called what torchvision calls them, so its state dicts load key by key.
Source      EfficientNet and SpineNet follow tensorflow/tpu (models/official: efficientnet/efficientnet_builder.py,
            detection/modeling/architecture/{spinenet,nn_blocks,nn_ops}.py).
Differs     BN of ResNet keeps torchvision's eps 1e-5; SpineNet has 1e-3, the self-training configurations' (SpineNet's own
            leave the code's 1e-4). The last BN of a residual branch starts at 1, not at 0.
Input       normalised images; H and W divisible by 2^level for exact strides, otherwise each level is ceil(half of the one
            above).
Left out    classifier heads; SpineNet's published weights (TensorFlow checkpoints only); weight EMA (the caller's).
"""
import contextlib
import importlib
import math
import os
import pickle
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model_weights
from torchvision.ops import StochasticDepth

LEVELS = (2, 3, 4, 5)  # of ResNet and EfficientNet

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
    #     width depth  eps that torchvision's weights were trained with (ours: EFFICIENTNET_EPS); None: it has no weights
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
EFFICIENTNET_EPS = 1e-3  # of its BatchNorms, whatever the detector around it uses; their momentum likewise
EFFICIENTNET_MOMENTUM = 0.01  # 0.99 in TensorFlow's way of counting
STOCHASTIC_DEPTH = 0.2   # drop rate of block i of N is 0.2 * i/N

SPINENETS = {
    # name        filters resample repeats endpoint  drop-    |  of the RetinaNet around it
    #             scale   alpha            channels  connect  |  tower width, depth  anchor base (strides)
    "spinenet49S": (0.65, 0.5,     1,      256,      0.2,        128,         4,     3.0),
    "spinenet49":  (1.0,  0.5,     1,      256,      0.2,        256,         4,     3.0),
    "spinenet96":  (1.0,  0.5,     2,      256,      0.2,        256,         4,     3.0),
    "spinenet143": (1.0,  1.0,     3,      256,      0.16,       256,         4,     4.0),
    "spinenet190": (1.3,  1.0,     4,      512,      0.2,        512,         7,     4.0),
}   # 49S: the released code has 128 endpoint channels, which gives 11.3M parameters and 30.8 GFLOPs. Published are 11.9M and
    # 33.8, and 256 gives 11.9M and 33.7 (derived), so 256 is what stands here.
SPINENET_WIDTHS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # of each level, before the scale
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
    (5, "bottleneck", 8, 10, None),   # node 11: nobody takes it, so it is added into the output at its level
    (4, "bottleneck", 5, 10, None),   # node 12 -> P4
    (3, "bottleneck", 4, 10, None),   # node 13 -> P3
    (5, "bottleneck", 7, 12, 11),     # node 14 -> P5
    (7, "bottleneck", 5, 14, None),   # node 15 -> P7
    (6, "bottleneck", 12, 14, None),  # node 16 -> P6
)
SPINENET_OUTPUTS = {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}

NAMES = [*RESNETS, *(f"efficientnet_{k}" for k, (_, _, eps) in EFFICIENTNETS.items() if eps),
         *(f"tf_efficientnet_{k}" for k in EFFICIENTNETS), *SPINENETS]


# ---- layers --------------------------------------------------------------------------------------------------------

def conv(c_in, c_out, k, stride=1, groups=1, bias=False, same=False):
    kind = SameConv2d if same and stride > 1 else nn.Conv2d  # at stride 1 both pad alike
    return kind(c_in, c_out, k, stride, padding=k // 2, groups=groups, bias=bias)


def pad_same(x, k, stride, value=0.0):
    """TensorFlow's 'same': ceil(size / stride) outputs, an odd number of missing pixels padded at bottom and right."""
    missing = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[-2:]]
    return F.pad(x, [missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2], value=value)


def max_pool_same(x, k, stride):
    return F.max_pool2d(pad_same(x, k, stride, float("-inf")), k, stride)


class SameConv2d(nn.Conv2d):
    def forward(self, x):
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


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
    """basic: 3x3, 3x3. bottleneck: 1x1, 3x3 (has the stride: v1.5), 1x1 to 4x width. Dropped per image at rate `drop`."""
    def __init__(self, block, c_in, width, stride, make, act=F.relu, drop=0.0):
        super().__init__()
        c_out, rows = {  # rows: c_in, c_out, kernel, stride of each conv
            "basic":      (width,     ((c_in, width, 3, stride), (width, width, 3, 1))),
            "bottleneck": (width * 4, ((c_in, width, 1, 1), (width, width, 3, stride), (width, width * 4, 1, 1))),
        }[block]
        self.depth, self.c_out, self.act = len(rows), c_out, act
        for i, row in enumerate(rows, 1):
            self.add_module(f"conv{i}", conv(*row))
            self.add_module(f"bn{i}", make(row[1]))
        self.stochastic_depth = StochasticDepth(drop, "row")
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), make(c_out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = self.act(y, inplace=True)
        y = self.stochastic_depth(y)
        y += x if self.downsample is None else self.downsample(x)  # in place: no norm needs its output for backward
        return self.act(y, inplace=True)


class ResNet(nn.Module):
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

    def forward(self, x, levels=LEVELS):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, C, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)               # (B, C, H/4, W/4)
        feats = {}
        for level in levels:
            x = feats[level] = getattr(self, f"layer{level - 1}")(x)
        return feats


# ---- EfficientNet --------------------------------------------------------------------------------------------------

def round_width(channels, width):
    """To a multiple of 8, but never below 90% of what was asked for."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def conv_norm(c_in, c_out, k, stride, groups, make, act=True, same=False):
    return nn.Sequential(conv(c_in, c_out, k, stride, groups, same=same), make(c_out), *[nn.SiLU(inplace=True)] * act)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = conv(channels, squeezed, 1, bias=True), conv(squeezed, channels, 1, bias=True)

    def forward(self, x):
        s = F.silu(self.fc1(x.mean((2, 3), keepdim=True)))  # (B, squeezed, 1, 1)
        return x * torch.sigmoid(self.fc2(s))


class MBConv(nn.Module):
    """1x1 expand, depthwise k x k, squeeze-excite, 1x1 project without activation; dropped at rate `drop` if residual."""
    def __init__(self, c_in, c_out, k, stride, expand, drop, make, same):
        super().__init__()
        mid = c_in * expand
        layers = [conv_norm(c_in, mid, 1, 1, 1, make)] if expand != 1 else []
        layers += [conv_norm(mid, mid, k, stride, mid, make, same=same),
                   SqueezeExcite(mid, max(1, c_in // 4)),  # a quarter of the block's INPUT, not of the expanded width
                   conv_norm(mid, c_out, 1, 1, 1, make, act=False)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out
        self.stochastic_depth = StochasticDepth(drop, "row")  # per image; divides by survival in training, nothing in eval

    def forward(self, x):
        return x + self.stochastic_depth(self.block(x)) if self.residual else self.block(x)


class EfficientNet(nn.Module):
    def __init__(self, width, depth, norm, same):
        super().__init__()
        make = partial(make_norm, norm, eps=EFFICIENTNET_EPS, momentum=EFFICIENTNET_MOMENTUM)
        repeats = [math.ceil(row[0] * depth) for row in EFFICIENTNET_STAGES]
        c = round_width(EFFICIENTNET_STEM, width)
        stages, level, block_id = [conv_norm(3, c, 3, 2, 1, make, same=same)], 1, 0
        self.channels, self.stage_of = {}, {}
        for n, (_, k, stride, expand, c_out) in zip(repeats, EFFICIENTNET_STAGES):
            blocks = []
            for i in range(n):
                drop = STOCHASTIC_DEPTH * block_id / sum(repeats)
                s, c_next = (stride if i == 0 else 1), round_width(c_out, width)
                blocks.append(MBConv(c, c_next, k, s, expand, drop, make, same))
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


# ---- SpineNet ------------------------------------------------------------------------------------------------------

class Resample(nn.Module):
    """A node's output at the resolution and width another node wants: squeeze to `mid` channels, resize, expand.
    down: levels to go down (in resolution); negative: up."""
    def __init__(self, c_in, mid, c_out, down, make):
        super().__init__()
        self.down = down
        self.squeeze = conv_norm(c_in, mid, 1, 1, 1, make)
        if down > 0:
            self.halve = conv_norm(mid, mid, 3, 2, 1, make)
        self.expand = conv_norm(mid, c_out, 1, 1, 1, make, act=False)

    def forward(self, x, size):
        x = self.squeeze(x)
        if self.down > 0:
            x = self.halve(x)
        if self.down > 1:
            x = max_pool_same(x, 3 if self.down == 2 else 5, 2 ** (self.down - 1))
        return self.expand(F.interpolate(x, size, mode="nearest") if self.down < 0 else x)  # (B, c_out, *size)


class SpineNet(nn.Module):
    def __init__(self, scale, alpha, repeats, endpoint, drop, norm):
        super().__init__()
        make = partial(make_norm, norm, eps=1e-3, momentum=0.003)  # 0.997 in TensorFlow's way of counting
        inner = {level: int(c * scale) for level, c in SPINENET_WIDTHS.items()}

        def group(c_in, level, block, drop):  # `repeats` blocks; only the first may have to project its shortcut
            blocks = []
            for _ in range(repeats):
                blocks.append(Residual(block, c_in, inner[level], 1, make, F.silu, drop))
                c_in = blocks[-1].c_out
            return nn.Sequential(*blocks)

        self.stem = conv_norm(3, 64, 7, 2, 1, make)
        self.groups = nn.ModuleList([group(64, 2, "bottleneck", 0.0), group(4 * inner[2], 2, "bottleneck", 0.0)])
        nodes = [(2, inner[2], 4 * inner[2])] * 2  # level, inner width, channels of each node so far
        self.resample = nn.ModuleList()
        for i, (level, block, *parents, _) in enumerate(SPINENET_NODES):
            c = inner[level] * (4 if block == "bottleneck" else 1)
            self.resample.append(nn.ModuleList(
                Resample(nodes[p][2], int(nodes[p][1] * alpha), c, level - nodes[p][0], make) for p in parents))
            self.groups.append(group(c, level, block, drop * (i + 1) / len(SPINENET_NODES)))
            nodes.append((level, inner[level], c))
        self.channels = dict.fromkeys(SPINENET_OUTPUTS, endpoint)
        self.endpoints = nn.ModuleDict({str(l): conv_norm(nodes[n][2], endpoint, 1, 1, 1, make)
                                        for l, n in SPINENET_OUTPUTS.items()})
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # TensorFlow's variance scaling: a normal cut off at two of its deviations
                std = 1 / math.sqrt(m.weight[0].numel()) / 0.8796  # 0.8796: what the cut leaves of the deviation
                nn.init.trunc_normal_(m.weight, 0.0, std, -2 * std, 2 * std)

    def forward(self, x):
        sizes = {level: [-(-n // 2 ** level) for n in x.shape[-2:]] for level in SPINENET_WIDTHS}
        x = max_pool_same(self.stem(x), 3, 2)  # (B, 64, H/4, W/4)
        nodes = [self.groups[0](x)]
        nodes.append(self.groups[1](nodes[0]))
        for (level, _, a, b, extra), resample, group in zip(SPINENET_NODES, self.resample, self.groups[2:]):
            x = resample[0](nodes[a], sizes[level]) + resample[1](nodes[b], sizes[level])
            nodes.append(group(F.silu(x if extra is None else x + nodes[extra])))
        return {level: self.endpoints[str(level)](nodes[n]) for level, n in SPINENET_OUTPUTS.items()}


def build(name, norm="bn"):
    """Randomly initialised backbone: forward(x) -> {level: (B, channels[level], H/2^level, W/2^level)}."""
    if name not in NAMES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(NAMES)}")
    kind = name.rpartition("_")[2]
    if name in RESNETS:
        net = ResNet(*RESNETS[name][:3], norm)
    elif name in SPINENETS:
        net = SpineNet(*SPINENETS[name][:5], norm)
    else:
        net = EfficientNet(*EFFICIENTNETS[kind][:2], norm, same=name.startswith("tf_"))
    net.name, net.norm = name, norm
    return net


BLOCKS = (Residual, MBConv, Resample)


def recompute(net, kinds=BLOCKS):
    """Gradient checkpointing (Chen et al. 2016): the blocks of `kinds` keep only their input and compute the rest again in
    the backward pass. Same outputs, gradients and batch-norm averages, for less memory and about a third more time."""
    for block in net.modules():
        if isinstance(block, kinds):
            block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block, forward, *args):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _statistics_at_rest(block)))


@contextlib.contextmanager
def _statistics_at_rest(block):
    """The second time a batch norm sees a batch, its running averages must not move again."""
    norms = [(m, m.momentum, m.num_batches_tracked.clone()) for m in block.modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m, *_ in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum, batches in norms:
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


# ---- weights from elsewhere ----------------------------------------------------------------------------------------

TIMM_KEYS = [  # timm's (tf_)efficientnet_* -> ours; its first stage has no expansion, hence other numbers for the same names
    (r"conv_stem\.", "features.0.0."), (r"bn1\.", "features.0.1."),
    *[(rf"blocks\.0\.(\d+)\.{theirs}\.", rf"features.1.\1.block.{ours}.") for theirs, ours in (
        ("conv_dw", "0.0"), ("bn1", "0.1"), (r"se\.conv_reduce", "1.fc1"), (r"se\.conv_expand", "1.fc2"),
        ("conv_pw", "2.0"), ("bn2", "2.1"))],
    *[(rf"blocks\.{s}\.(\d+)\.{theirs}\.", rf"features.{s + 1}.\1.block.{ours}.") for s in range(1, 7) for theirs, ours in (
        ("conv_pw", "0.0"), ("bn1", "0.1"), ("conv_dw", "1.0"), ("bn2", "1.1"),
        (r"se\.conv_reduce", "2.fc1"), (r"se\.conv_expand", "2.fc2"), ("conv_pwl", "3.0"), ("bn3", "3.1"))],
]
SOURCES = {  # of the keys without a 'module.' that all of them may begin with (DataParallel, DDP)
    # what it is    a key that tells      (pattern, our name), first that fits  left out on purpose
    "ours":        (r"backbone\.",        [(r"backbone\.", "")],                r"(?!backbone\.)"),
    "MoCo":        (r"encoder_q\.",       [(r"encoder_q\.", "")],               r"encoder_(q\.fc|k)\.|queue"),
    "timm":        (r"conv_stem\.",       TIMM_KEYS,                            r"(conv_head|bn2|classifier)\."),
    "torchvision": (r"(fc|classifier)\.", [("", "")],                           r"(fc|classifier|features\.8)\."),
    "bare":        ("",                   [("", "")],                           r"$."),  # nothing is
}
TIMM_EPS = 1e-5  # of its efficientnet_* weights; its tf_ ones have TensorFlow's 1e-3


def load_backbone(model, source):
    """
    Fill `model` (from build) from `source` and return one line saying what was loaded and what was not.
    source: 'random' (leave it) | 'imagenet' (torchvision's published weights, in torch.hub's cache or fetched) | path of a
    .pth (or .safetensors, if that package is installed) in one of the namings of SOURCES: our checkpoints, bare backbones,
    torchvision's and timm's classifiers, MoCo's training checkpoints | 'simclr:' + path of a ResNet converted from SimCLR
    (torchvision's names, but trained on pixels in 0..1: that is folded into the first layer).
    Anything but a complete, exact fit is a one-line ValueError and leaves the model as it was.
    """
    if source == "random":
        return f"{model.name}: random initialisation, nothing loaded"
    simclr, path = split_source(source)
    path = imagenet_file(model.name) if source == "imagenet" else path
    found, config, about = read_file(path), {}, {}  # config: of st.py's checkpoints; about: of hpt.py's backbones
    if isinstance(found, dict):
        config, about = (v if isinstance(v := found.get(k), dict) else {} for k in ("config", "about"))
        found = next((found[k] for k in ("model", "state_dict") if isinstance(found.get(k), dict)), found)
    if not (isinstance(found, dict) and found and
            all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items())):
        raise ValueError(f"'{path}' is not a checkpoint: give a dict of name -> tensor, bare or as its 'model' or 'state_dict'")
    if all(k.startswith("module.") for k in found):
        found = {k.removeprefix("module."): v for k, v in found.items()}
    kind, (_, table, left_out) = next(row for row in SOURCES.items() if any(re.match(row[1][0], k) for k in found))
    saved_from = (config if kind == "ours" else about).get("backbone", model.name)
    check_origin(model.name, saved_from, kind, simclr, path)
    state = {}
    for key, value in found.items():
        if not re.match(left_out, key):
            pattern, ours = next(((p, o) for p, o in table if re.match(p, key)), ("", ""))  # else its own name: unexpected
            state[re.sub(pattern, ours, key, count=1)] = value
    ignored = len(found) - len(state)
    # The batch counter is used by no norm here, and old torchvision files lack it: neither required nor refused.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if model.norm == "gn" and any(k.endswith("running_mean") for k in state):
        raise ValueError(f"'{path}' holds BatchNorm weights, which do not fit norm 'gn': build with norm 'bn' or 'frozen'")
    check_fit(model, state, path)
    note, eps = kind, EFFICIENTNET_EPS
    if "efficientnet" in model.name and kind == "bare" and not about:
        note = "bare; its padding and BN eps are taken to be this network's"
    elif "efficientnet" in model.name and kind in ("torchvision", "timm"):
        timm_eps = EFFICIENTNET_EPS if model.name.startswith("tf_") else TIMM_EPS
        eps = timm_eps if kind == "timm" else EFFICIENTNETS[model.name.rpartition("_")[2]][2]
    if eps != EFFICIENTNET_EPS:
        refold_eps(state, eps, EFFICIENTNET_EPS)
        note += f"; BN eps {eps:g} -> {EFFICIENTNET_EPS:g} folded into the BN weights"
    if simclr:
        fold_pixels(state)
        note = "SimCLR; pixels in 0..1 -> normalised ones folded into the first layer"
    model.load_state_dict(state, strict=False)  # not strict for the counter only: check_fit has compared the rest
    return (f"{model.name}: all {len(state)} tensors loaded from '{path}' ({note}), none left random, "
            f"{ignored} others in it ignored")


def split_source(source):
    """An --init that is a file -> (does it say simclr:, path)."""
    source = os.fspath(source)
    simclr = source.startswith("simclr:") and not os.path.exists(source)
    return simclr, source.removeprefix("simclr:") if simclr else source


def check_origin(name, saved_from, kind, simclr, path):
    """What the tensors do not tell. The two paddings of EfficientNet have the same ones: only the file's origin speaks, for
    timm's two kinds no more than its name."""
    file, efficientnet = os.path.basename(path), "efficientnet" in name
    if saved_from != name:
        raise ValueError(f"'{path}' was saved from {saved_from}, this is {name}: build {saved_from}")
    if simclr and (name not in RESNETS or kind not in ("torchvision", "bare")):
        raise ValueError(f"'{path}' is no ResNet converted from SimCLR ({kind} names, for {name}): give it without 'simclr:'")
    if efficientnet and kind == "timm" and not name.startswith("tf_") and "tf_" in file:
        raise ValueError(f"'{path}' is one of timm's tf_ weights, which want TensorFlow's padding: build tf_{name}")
    if name.startswith("tf_") and (kind == "torchvision" or kind == "timm" and re.search(r"(?<!tf_)efficientnet_", file)):
        raise ValueError(f"'{path}' has {kind}'s weights for symmetric padding: build {name[3:]}")
    if efficientnet and kind == "timm" and re.search(r"[_.]ap[-_.]", file):
        raise ValueError(f"'{path}' has AdvProp weights, made for images normalised by mean and deviation 0.5: not supported")


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


def fold_pixels(state):
    """A network trained on pixels in 0..1, for images normalised by ImageNet's mean and std: its first convolution scaled,
    its first BN shifted. Exact but at the image border, where padding meant black and now means the mean colour."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    w = state["conv1.weight"]  # (C, 3, 7, 7)
    state["bn1.running_mean"] = state["bn1.running_mean"] - (w * mean.view(3, 1, 1)).sum((1, 2, 3))
    state["conv1.weight"] = w * std.view(3, 1, 1)


def imagenet_file(name):
    """Path of torchvision's weights in torch.hub's cache, fetched first if need be."""
    if name.startswith("tf_"):
        raise ValueError(f"torchvision's weights want symmetric padding: use {name[3:]} with them, or give a file of timm's "
                         f"{name} weights" if EFFICIENTNETS[name.rpartition("_")[2]][2] else
                         f"torchvision has no weights for {name}: give a file of timm's")
    weights = RESNETS[name][3] if name in RESNETS else None if name in SPINENETS else "IMAGENET1K_V1"
    if weights is None:
        raise ValueError(f"torchvision has no ImageNet weights for {name}: use 'random' or a path")
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
    """torch.load that never runs code from the file, or safetensors; failures told in one line."""
    if not os.path.isfile(path):
        raise ValueError(f"'{path}' is not a file: give 'random', 'imagenet' or the path of a .pth state dict")
    try:
        if path.endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ValueError(f"'{path}' needs the package safetensors: pip install safetensors, or torch.save the state dict "
                         "as a .pth where it is installed") from None
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, KeyError...: it depends on how the file is broken
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        with open(path, "rb") as f:  # a pickle or a zip archive of one; a web page saved as .pth is neither
            pickled = f.read(1) == b"\x80" or name
        if isinstance(e, pickle.UnpicklingError) and pickled or "TorchScript" in str(e):
            raise ValueError(f"'{path}' holds more than plain tensors{f' ({name[1]})' if name else ''}; unsafe unpickling is "
                             "refused: load it where you trust it, torch.save its state_dict(), and give that file") from None
        reason = type(e).__name__
        raise ValueError(f"'{path}' is not a checkpoint, or a damaged one ({reason}): fetch or save it again") from None
