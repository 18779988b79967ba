"""The networks of Zoph et al. 2020. RetinaNet (Lin et al. 2017): backbone -> FPN -> shared class
and box towers. Segmenter: backbone -> NAS-FPN (Ghiasi et al. 2019) or FPN -> sum of the levels ->
class of every pixel. Classifier: backbone -> mean -> class. Joint: two of them on one backbone.

From the TPU detection code (tensorflow/tpu, models/official/detection: heads.py, fpn.py): FPN with
batch norm after P3-P7, towers whose convolutions are shared over levels while their batch norms are
not. SpineNet is a pyramid itself (Du et al. 2020): its levels go straight into the towers, which
then use swish.

Networks map normalised images to logits and box deltas; losses and decoding are in ops.py. inputs:
what forward() needs of the targets besides the images. norm: bn | gn of all but the backbone, whose
backbone_norm: bn | gn | frozen.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import ops
from util import UserError

PRIOR = 0.01  # every anchor starts with this foreground probability: class bias -ln((1 - p) / p)
ANCHORS = 9  # at each place: 3 scales, 3 ratios


def make_norm(kind, channels):
    """eps 1e-3 is the self-training configurations'. In a group norm images do not see each other,
    so that N processes equal one."""
    return backbones.make_norm(kind, channels, eps=1e-3, momentum=0.01)


# ---- boxes ---------------------------------------------------------------------------------------


class FPN(nn.Module):
    """Feature pyramid: {3: C3, 4: C4, 5: C5} -> [P3, ..., P7], each (B, width, H/2^l, W/2^l)."""

    def __init__(self, channels, levels, width, norm):
        super().__init__()
        self.inputs = range(levels[0], min(levels[1], 5) + 1)
        self.extras = range(6, levels[1] + 1)
        self.lateral = nn.ModuleList(nn.Conv2d(channels[l], width, 1) for l in self.inputs)
        self.post = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.inputs)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, padding=1) for _ in self.extras)
        self.norm = nn.ModuleList(make_norm(norm, width) for _ in [*self.inputs, *self.extras])
        for conv in [*self.lateral, *self.post, *self.down]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, feats):
        pyramid = []
        above = None
        for level, lateral, post in reversed(list(zip(self.inputs, self.lateral, self.post))):
            here = lateral(feats[level])
            if above is not None:  # to its size, not by 2: odd maps round up
                here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            pyramid.insert(0, post(here))
            above = here
        for level, down in zip(self.extras, self.down):  # P6 from P5, P7 from ReLU(P6)
            below = pyramid[-1]
            pyramid.append(down(below if level == 6 else F.relu(below)))
        return [norm(p) for norm, p in zip(self.norm, pyramid)]


class Tower(nn.Module):
    """`depth` 3x3 convolutions shared over `levels` levels, a norm of each level behind each, then
    the predicting one: [P3, ..., P7] -> (B, A, out), in the order of ops.make_anchors."""

    def __init__(self, c_in, width, depth, out, norm, levels, bias=0.0, act=F.relu):
        super().__init__()
        self.out = out
        self.act = act
        widths = [c_in, *[width] * depth]
        self.convs = nn.ModuleList()
        for c, c_out in zip(widths, widths[1:]):
            self.convs.append(nn.Conv2d(c, c_out, 3, padding=1, bias=False))
        self.norms = nn.ModuleList()
        for _ in range(levels):
            self.norms.append(nn.ModuleList(make_norm(norm, width) for _ in range(depth)))
        self.final = nn.Conv2d(widths[-1], ANCHORS * out, 3, padding=1)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.normal_(self.final.weight, std=1e-5)  # TPU code
        nn.init.constant_(self.final.bias, bias)

    def forward(self, pyramid):
        rows = []
        for p, norms in zip(pyramid, self.norms):
            for conv, norm in zip(self.convs, norms):
                p = self.act(norm(conv(p)), inplace=True)
            p = self.final(p)  # (B, a*out, H, W)
            rows.append(p.permute(0, 2, 3, 1).reshape(len(p), -1, self.out))  # (B, H*W*a, out)
        return torch.cat(rows, 1)  # (B, A, out)


class RetinaNet(nn.Module):
    """images (B, 3, S, S) -> class logits (B, A, K), box deltas (B, A, 4).

    size: S, which anchors (A, 4) belong to; levels: first and last of the pyramid; width, depth: of
    the towers (256 and 4 in the papers; backbones.SPINENETS has theirs); anchor_base: side of the
    smallest anchor in strides; act: relu | swish, of the towers.
    """

    inputs = ()

    def __init__(
        self,
        backbone,
        classes,
        size,
        levels=(3, 7),
        width=256,
        depth=4,
        anchor_base=4.0,
        norm="bn",
        backbone_norm="bn",
        act="relu",
    ):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        self.levels = range(levels[0], levels[1] + 1)
        self.fpn = None
        c_in = self.backbone.channels[levels[0]]
        if backbone not in backbones.SPINENETS:
            self.fpn = FPN(self.backbone.channels, levels, width, norm)
            c_in = width
        act = {"relu": F.relu, "swish": F.silu}[act]
        bias = -math.log((1 - PRIOR) / PRIOR)
        self.classes = Tower(c_in, width, depth, classes, norm, len(self.levels), bias, act)
        self.boxes = Tower(c_in, width, depth, 4, norm, len(self.levels), 0.0, act)
        anchors = ops.make_anchors(size, size, levels, anchor_base)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, images):
        return self.heads(self.backbone(images), images)

    def heads(self, feats, images):
        if self.fpn:
            pyramid = self.fpn(feats)
        else:
            pyramid = [feats[level] for level in self.levels]
        return self.classes(pyramid), self.boxes(pyramid)

    def answers(self, images, windows, floor, limit=100):
        """Boxes that score above `floor`, the best `limit`, as of ops.detect. windows (B, 2):
        height and width of the unpadded part."""
        logits, deltas = self(images)
        return ops.detect(logits, deltas, self.anchors, windows, floor, limit=limit)


# ---- pixels --------------------------------------------------------------------------------------

# fmt: off
NASFPN_CELL = (  # nodes 0..4 are P3..P7; tensorflow/tpu modeling/architecture/nasfpn.py
    # level, how, of nodes, a node added as it is (its level's, used by nobody)
    (4, "attention", 1, 3, None),
    (4, "sum",       1, 5, None),
    (3, "sum",       0, 6, None),    # node 7 -> P3
    (4, "sum",       6, 7, None),    # node 8 -> P4
    (5, "attention", 7, 8, 2),       # node 9 -> P5
    (7, "attention", 6, 9, 4),       # node 10 -> P7
    (6, "attention", 9, 10, None),   # node 11 -> P6
)
NASFPN_OUTPUTS = (7, 8, 9, 11, 10)   # P3..P7
# fmt: on


class NASFPN(nn.Module):
    """{3: C3, 4: C4, 5: C5} -> [P3, ..., P7], each (B, width, H/2^l, W/2^l): `repeats` cells of
    NASFPN_CELL, whose 3x3 convolutions are separable as in the segmentation configurations."""

    def __init__(self, channels, width, norm, repeats=7):
        super().__init__()
        self.lateral = nn.ModuleList()
        for level in (3, 4, 5):
            conv = nn.Conv2d(channels[level], width, 1, bias=False)
            self.lateral.append(nn.Sequential(conv, make_norm(norm, width)))
        self.cells = nn.ModuleList()
        for _ in range(repeats):
            self.cells.append(nn.ModuleList(separable(width, norm) for _ in NASFPN_CELL))
        backbones.init_convs(self)

    def forward(self, feats):
        pyramid = [lateral(feats[level]) for level, lateral in zip((3, 4, 5), self.lateral)]
        for _ in (6, 7):
            pyramid.append(backbones.max_pool_same(pyramid[-1], 2, 2))
        sizes = {level: p.shape[-2:] for level, p in zip(range(3, 8), pyramid)}
        for blocks in self.cells:
            pyramid = self.cell(pyramid, blocks, sizes)
        return pyramid

    def cell(self, pyramid, blocks, sizes):
        nodes = list(pyramid)
        levels = [3, 4, 5, 6, 7]  # of the nodes
        for (level, how, a, b, extra), block in zip(NASFPN_CELL, blocks):
            if how == "attention" and levels[a] < levels[b]:
                a, b = b, a  # the coarser says where the finer matters
            x = resample(nodes[a], levels[a], level, sizes[level])
            y = resample(nodes[b], levels[b], level, sizes[level])
            if how == "attention":
                y = y * x.amax((2, 3), keepdim=True).sigmoid()
            x = x + y
            if extra is not None:
                x = x + nodes[extra]
            nodes.append(block(F.relu(x)))
            levels.append(level)
        return [nodes[n] for n in NASFPN_OUTPUTS]


def separable(width, norm):
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(width, width, 1, bias=False), make_norm(norm, width))


def resample(x, level, wanted, size):
    """A node of a level at the resolution of the level `wanted`, which is `size`."""
    if wanted > level:
        stride = 2 ** (wanted - level)
        return backbones.max_pool_same(x, stride, stride)
    if wanted < level:
        return F.interpolate(x, size, mode="nearest")
    return x


def conv_layers(k, widths, norm):
    layers = nn.Sequential()
    for c_in, c_out in zip(widths, widths[1:]):
        layers.append(nn.Conv2d(c_in, c_out, k, padding=k // 2, bias=False))
        layers.append(make_norm(norm, c_out))
        layers.append(nn.ReLU(inplace=True))
    return layers


class Segmenter(nn.Module):
    """images (B, 3, H, W) -> class logits (B, K, H/stride, W/stride).

    Levels levels[0]..levels[1] of the pyramid are enlarged to stride 4 and summed, then `depth` 3x3
    convolutions of `width` channels and a 1x1 (TPU code: use_pyramid_fusion,
    heads.SegmentationHead). neck: nasfpn (levels 3..7) | fpn. stride: 4 as in the paper's code; 1
    (ours) adds a shallow branch that sees single pixels, for what is only pixels wide.
    """

    inputs = ()

    def __init__(
        self,
        backbone,
        classes,
        levels=(3, 7),
        width=256,
        depth=3,
        neck="nasfpn",
        stride=4,
        norm="bn",
        backbone_norm="bn",
    ):
        super().__init__()
        self.stride = stride
        self.backbone = backbones.build(backbone, backbone_norm)
        if neck == "nasfpn":
            self.fpn = NASFPN(self.backbone.channels, width, norm)
        else:
            self.fpn = FPN(self.backbone.channels, levels, width, norm)
        self.head = conv_layers(3, [width] * (depth + 1), norm)
        layers = [self.head]
        if stride == 4:
            self.final = nn.Conv2d(width, classes, 1)
        else:
            half = width // 2
            self.detail = conv_layers(3, [3 * 2 * 2, half], norm)  # of 2 x 2 pixels at each place
            self.reduce = conv_layers(1, [width, half], norm)
            self.merge = conv_layers(3, [half + half, half], norm)
            layers += [self.detail, self.reduce, self.merge]
            self.final = nn.Conv2d(half, classes * 2 * 2, 1)
        if neck == "nasfpn":
            for conv in [*self.head[::3], self.final]:
                nn.init.normal_(conv.weight, std=0.01)
        else:  # from 0.01 it took hundreds of steps of AdamW to leave "background everywhere"
            for part in layers:
                backbones.init_convs(part)
            nn.init.normal_(self.final.weight, std=0.1)
        nn.init.zeros_(self.final.bias)

    def forward(self, images):
        return self.heads(self.backbone(images), images)

    def heads(self, feats, images):
        size = [-(-n // 4) for n in images.shape[-2:]]
        levels = []
        for p in self.fpn(feats):
            levels.append(F.interpolate(p, size, mode="bilinear", align_corners=False))
        x = self.head(sum(levels))  # (B, width, H/4, W/4)
        if self.stride == 4:
            return self.final(x)
        pixels = self.detail(F.pixel_unshuffle(images, 2))  # (B, width/2, H/2, W/2)
        size = pixels.shape[-2:]
        x = F.interpolate(self.reduce(x), size, mode="bilinear", align_corners=False)
        x = self.final(self.merge(torch.cat([x, pixels], 1)))  # (B, 4*K, H/2, W/2)
        return F.pixel_shuffle(x, 2)  # (B, K, H, W)


# ---- classes -------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """images (B, 3, H, W) -> class logits (B, K), from the mean over C5: padding counts as any
    other place does."""

    inputs = ()

    def __init__(self, backbone, classes, backbone_norm="bn"):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        self.final = nn.Linear(self.backbone.channels[5], classes)
        nn.init.normal_(self.final.weight, std=0.01)
        nn.init.zeros_(self.final.bias)

    def forward(self, images):
        return self.final(self.backbone(images)[5].mean((2, 3)))


# ---- joint training ------------------------------------------------------------------------------


class Joint(nn.Module):
    """RetinaNet or Segmenter `net` in joint training (Zoph et al., Table 7): images (B, 3, H, W),
    classified (B,) bool -> (net's outputs for the others, class logits (n, K) of the n classified,
    from the linear layer net.joint on the mean over C5). The backbone sees all of them in one
    batch, so that its batch norm does. It has no weights of its own: save those of `net`."""

    inputs = ("classified",)

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, classified):
        feats = self.net.backbone(images)
        logits = self.net.joint(feats[5][classified].mean((2, 3)))
        others = {level: f[~classified] for level, f in feats.items()}
        return self.net.heads(others, images[~classified]), logits


def joined(targets_of, losses_of):
    """Targets and losses of another task for joint training: the images of a step's last part are
    classified. Their loss stands in column 0, as they cost nothing else.

    As many of them as labelled ones and the normalised loss are the paper's (recalled). Its head is
    unknown, and so is a step's make-up with pseudo-labels (there the same images carry both labels,
    here they are a part of their own). net: the one within Joint.
    """

    def targets(batch, net):
        rows, count = targets_of(batch, net)  # nothing but classes is known of the classified
        classes, images = ops.class_targets(batch, net)
        part = batch["part"]
        classified = part == part.max()  # of which every process has a share
        count = torch.where(classified, images, count)
        return {**rows, **classes, "classified": classified}, count

    def losses(outputs, targets, count, net):
        outputs, logits = outputs
        classified = targets["classified"]
        rows = {name: value[~classified] for name, value in targets.items()}
        others = losses_of(outputs, rows, count[~classified], net)
        rows = {name: value[classified] for name, value in targets.items()}
        terms = others.new_zeros(len(classified), others.shape[1])
        terms[~classified] = others
        terms[classified, :1] = ops.class_losses(logits, rows, count[classified], net)
        return terms

    return targets, losses


def weight_decay_groups(model, decay):
    """Decay on convolution and dense kernels only: neither norms nor biases (TPU code)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def initialise(backbone, source, proc):
    """Fills a backbone from --init -> one line that says what was loaded."""
    try:
        if source == "imagenet":  # fetched once, not by every process
            proc.first(lambda: backbones.imagenet_file(backbone.name))
        return backbones.load_backbone(backbone, source)
    except ValueError as error:
        raise UserError(f"--init {source}: {error}") from None
