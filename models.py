"""The networks of Zoph et al. 2020. RetinaNet (Lin et al. 2017): backbone -> FPN -> shared class and box towers. Segmenter:
backbone -> NAS-FPN (Ghiasi et al. 2019) or FPN -> sum of the levels -> class per pixel. Classifier: backbone -> mean -> class.

Facts from the TPU detection code (tensorflow/tpu, models/official/detection: heads.py, fpn.py): FPN with batch norm
after P3-P7, towers whose convolutions are shared over levels while their batch norm is separate per level.
norm="none" drops all of that and is torchvision's layout, so its COCO weights fit (see coco_teacher).
SpineNet is a pyramid itself (Du et al. 2020): its levels go straight into the towers, which then use swish.

The network only maps images to raw class logits and box deltas; losses and decoding are in ops.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

import backbones

PRIOR = 0.01  # every anchor starts with this foreground probability: class bias -ln((1 - prior) / prior)


def make_norm(kind, channels):
    """bn: batch norm (eps 1e-3 as in the self-training configs); gn: group norm, where images do not see each other,
    so that N processes equal one; none: nothing."""
    return nn.Identity() if kind == "none" else backbones.make_norm(kind, channels, eps=1e-3, momentum=0.01)


class FPN(nn.Module):
    """Feature pyramid: {3: C3, 4: C4, 5: C5} -> [P3, ..., P7], each (B, width, H/2^l, W/2^l)."""

    def __init__(self, channels, levels, width, norm):
        super().__init__()
        self.inputs = range(levels[0], min(levels[1], 5) + 1)
        self.extras = range(6, levels[1] + 1)
        self.lateral = nn.ModuleList(nn.Conv2d(channels[l], width, 1) for l in self.inputs)
        self.post = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.inputs)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in self.extras)
        self.norm = nn.ModuleList(make_norm(norm, width) for _ in [*self.inputs, *self.extras])
        for conv in [*self.lateral, *self.post, *self.down]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, feats):
        pyramid, above = [], None
        for level, lateral, post in reversed(list(zip(self.inputs, self.lateral, self.post))):
            here = lateral(feats[level])
            if above is not None:  # nearest x2; interpolate to the size because odd maps round up
                here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            pyramid.insert(0, post(here))
            above = here
        for i, down in enumerate(self.down):  # P6 from P5, P7 from ReLU(P6)
            pyramid.append(down(pyramid[-1] if i == 0 else F.relu(pyramid[-1])))
        return [norm(p) for norm, p in zip(self.norm, pyramid)]


class Tower(nn.Module):
    """`depth` 3x3 convolutions shared over the levels, a norm per level, then the predicting convolution.
    Forward: [P3..P7] -> (B, A, out), anchors in the order of ops.make_anchors."""

    def __init__(self, c_in, width, depth, anchors, out, norm, levels, bias, final_std, act=F.relu):
        super().__init__()
        self.out, self.act = out, act
        self.convs = nn.ModuleList(nn.Conv2d(c_in if i == 0 else width, width, 3, padding=1, bias=norm == "none")
                                   for i in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(make_norm(norm, width) for _ in range(depth)) for _ in range(levels))
        self.final = nn.Conv2d(width, anchors * out, 3, padding=1)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.normal_(self.final.weight, std=final_std)
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
    """images (B, 3, H, W), normalised -> class logits (B, A, K), box deltas (B, A, 4).

    backbone: name in backbones.py; levels: first and last pyramid level; width, depth: of the towers (256 and 4 in
    the papers; see backbones.SPINENETS for theirs); norm: bn | gn | none for FPN and towers; backbone_norm: bn | gn |
    frozen; act: relu | swish, of the towers.
    """

    def __init__(self, backbone, classes, levels=(3, 7), width=256, depth=4, anchors=9, norm="bn", backbone_norm="bn",
                 act="relu"):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        self.levels, n = range(levels[0], levels[1] + 1), levels[1] - levels[0] + 1
        pyramid = backbone in backbones.SPINENETS
        self.fpn = None if pyramid else FPN(self.backbone.channels, levels, width, norm)
        c_in = self.backbone.channels[levels[0]] if pyramid else width
        act = {"relu": F.relu, "swish": F.silu}[act]
        std = 0.01 if norm == "none" else 1e-5  # torchvision starts the class convolution at 0.01, the TPU code at 1e-5
        self.classes = Tower(c_in, width, depth, anchors, classes, norm, n, -math.log((1 - PRIOR) / PRIOR), std, act)
        self.boxes = Tower(c_in, width, depth, anchors, 4, norm, n, 0.0, std, act)

    def forward(self, images):
        return self.heads(self.backbone(images), images)

    def heads(self, feats, _):
        pyramid = self.fpn(feats) if self.fpn else [feats[l] for l in self.levels]
        return self.classes(pyramid), self.boxes(pyramid)


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


class NASFPN(nn.Module):
    """{3: C3, 4: C4, 5: C5} -> [P3, ..., P7], each (B, width, H/2^l, W/2^l): `repeats` cells of NASFPN_CELL, whose 3x3
    convolutions are separable (depthwise, then 1x1) as in the segmentation configurations."""

    def __init__(self, channels, width, norm, repeats=7):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(channels[l], width, 1, bias=False), make_norm(norm, width))
                                     for l in (3, 4, 5))
        self.cells = nn.ModuleList(nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.Conv2d(width, width, 1, bias=False),
            make_norm(norm, width)) for _ in NASFPN_CELL) for _ in range(repeats))
        backbones.init_convs(self)

    def forward(self, feats):
        nodes = [lateral(feats[level]) for level, lateral in zip((3, 4, 5), self.lateral)]
        for _ in (6, 7):
            nodes.append(backbones.max_pool_same(nodes[-1], 2, 2))
        sizes = dict(zip(range(3, 8), [n.shape[-2:] for n in nodes]))
        for cell in self.cells:
            levels = [3, 4, 5, 6, 7]
            for (level, how, a, b, extra), block in zip(NASFPN_CELL, cell):
                if how == "attention" and levels[a] < levels[b]:
                    a, b = b, a  # a: the coarser
                x, y = (self.resample(nodes[n], levels[n], level, sizes[level]) for n in (a, b))
                x = x + y if how == "sum" else x + y * x.amax((2, 3), keepdim=True).sigmoid()
                nodes.append(block(F.relu(x if extra is None else x + nodes[extra])))
                levels.append(level)
            nodes = [nodes[n] for n in NASFPN_OUTPUTS]
        return nodes

    @staticmethod
    def resample(x, level, wanted, size):
        if wanted > level:
            return backbones.max_pool_same(x, 2 ** (wanted - level), 2 ** (wanted - level))
        return F.interpolate(x, size, mode="nearest") if wanted < level else x


class Segmenter(nn.Module):
    """images (B, 3, H, W), normalised -> class logits (B, K, H/stride, W/stride).

    Levels levels[0]..levels[1] of the pyramid are enlarged to stride 4 and summed, then `depth` 3x3 convolutions of `width`
    channels and a 1x1 (TPU code: use_pyramid_fusion, heads.SegmentationHead). neck: nasfpn (levels 3..7) | fpn.
    stride: 4 as in the paper's code; 1 (ours) adds a shallow branch that sees single pixels, for what is only pixels wide.
    """

    def __init__(self, backbone, classes, levels=(3, 7), width=256, depth=3, neck="nasfpn", stride=4, norm="bn",
                 backbone_norm="bn"):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        channels = self.backbone.channels
        self.fpn = NASFPN(channels, width, norm) if neck == "nasfpn" else FPN(channels, levels, width, norm)

        def layers(k, *widths):
            return nn.Sequential(*[layer for c_in, c_out in zip(widths, widths[1:]) for layer in (
                nn.Conv2d(c_in, c_out, k, padding=k // 2, bias=False), make_norm(norm, c_out), nn.ReLU(inplace=True))])
        self.head = layers(3, *[width] * (depth + 1))
        self.stride, half = stride, width // 2
        if stride == 1:
            self.detail, self.reduce, self.merge = layers(3, 3 * 4, half), layers(1, width, half), layers(3, 2 * half, half)
        self.final = nn.Conv2d(half if stride == 1 else width, classes * (4 if stride == 1 else 1), 1)
        if neck == "nasfpn":
            for conv in [*self.head[::3], self.final]:
                nn.init.normal_(conv.weight, std=0.01)
        else:  # from 0.01 it took hundreds of steps of AdamW to leave "background everywhere"
            for part in (self.head, self.detail, self.reduce, self.merge) if stride == 1 else (self.head,):
                backbones.init_convs(part)
            nn.init.normal_(self.final.weight, std=0.1)
        nn.init.zeros_(self.final.bias)

    def forward(self, images):
        return self.heads(self.backbone(images), images)

    def heads(self, feats, images):
        size, pyramid = [-(-n // 4) for n in images.shape[-2:]], self.fpn(feats)
        x = self.head(sum(F.interpolate(p, size, mode="bilinear", align_corners=False) for p in pyramid))  # (B, width, H/4, W/4)
        if self.stride == 4:
            return self.final(x)
        pixels = self.detail(F.pixel_unshuffle(images, 2))  # (B, width/2, H/2, W/2)
        x = F.interpolate(self.reduce(x), pixels.shape[-2:], mode="bilinear", align_corners=False)
        return F.pixel_shuffle(self.final(self.merge(torch.cat([x, pixels], 1))), 2)  # 2 x 2 pixels at each place


class Classifier(nn.Module):
    """images (B, 3, H, W), normalised -> class logits (B, K), from the mean over C5: padding counts as any other place does."""

    def __init__(self, backbone, classes, backbone_norm="bn"):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        self.final = nn.Linear(self.backbone.channels[5], classes)
        nn.init.normal_(self.final.weight, std=0.01)
        nn.init.zeros_(self.final.bias)

    def forward(self, images):
        return self.final(self.backbone(images)[5].mean((2, 3)))


class Joint(nn.Module):
    """RetinaNet or Segmenter `net` in joint training: images (B, 3, H, W), part (B,) -> (net's outputs for parts 0 and 1, class
    logits (n, K) of part 2 from the linear layer net.joint on the mean over C5). The backbone sees all in one batch, so that its
    batch norm does; it has no weights of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, part):
        classified, feats = part == 2, self.net.backbone(images)
        logits = self.net.joint(feats[5][classified].mean((2, 3)))
        return self.net.heads({level: f[~classified] for level, f in feats.items()}, images[~classified]), logits


def weight_decay_groups(model, decay):
    """Decay on convolution and dense kernels only: neither norms nor biases (spec of the TPU code)."""
    kernels = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


# torchvision.models.detection.retinanet_resnet50_fpn -> RetinaNet(norm="none", backbone_norm="frozen"), by key prefix;
# the first that fits holds. The last rows are the names in older files, which torchvision still translates on loading.
TORCHVISION_KEYS = [
    ("backbone.body.", "backbone."),
    *[(f"backbone.fpn.inner_blocks.{i}.0.", f"fpn.lateral.{i}.") for i in range(3)],
    *[(f"backbone.fpn.layer_blocks.{i}.0.", f"fpn.post.{i}.") for i in range(3)],
    ("backbone.fpn.extra_blocks.p6.", "fpn.down.0."),
    ("backbone.fpn.extra_blocks.p7.", "fpn.down.1."),
    *[(f"head.classification_head.conv.{i}.0.", f"classes.convs.{i}.") for i in range(4)],
    ("head.classification_head.cls_logits.", "classes.final."),
    *[(f"head.regression_head.conv.{i}.0.", f"boxes.convs.{i}.") for i in range(4)],
    ("head.regression_head.bbox_reg.", "boxes.final."),
    *[(f"backbone.fpn.inner_blocks.{i}.", f"fpn.lateral.{i}.") for i in range(3)],
    *[(f"backbone.fpn.layer_blocks.{i}.", f"fpn.post.{i}.") for i in range(3)],
    *[(f"head.classification_head.conv.{2 * i}.", f"classes.convs.{i}.") for i in range(4)],
    *[(f"head.regression_head.conv.{2 * i}.", f"boxes.convs.{i}.") for i in range(4)],
]


def from_torchvision(state):
    """torchvision's retinanet_resnet50_fpn COCO state dict with our key names. KeyError on a key the table does not know.

    torchvision runs these weights with a batch-norm eps of 0 (overwrite_eps), we with 1e-5: the norms' weights are rescaled so
    that the network stays the same.
    """
    out = {}
    for key, value in state.items():
        old, new = next(((o, n) for o, n in TORCHVISION_KEYS if key.startswith(o)), (None, None))
        if old is None:
            raise KeyError(key)
        out[new + key[len(old):]] = value
    for key in [k for k in out if k.endswith("running_var")]:
        weight, var = key.replace("running_var", "weight"), out[key].double()  # dead channels have variances near 1e-45
        out[weight] = (out[weight] * ((var + 1e-5) / var).sqrt()).to(out[key].dtype)
    return out


def coco_teacher(state, path="state"):
    """A ready teacher in the form of our checkpoints from torchvision's retinanet_resnet50_fpn trained on COCO: the same
    network, its 91 outputs cut down to the 80 that are classes (output = COCO's category id; 0 and ten more have no
    class). Detecting as torchvision does is what "image_size": None asks for. ValueError if state is anything else.
    """
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [i for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    outputs = state.get("head.classification_head.cls_logits.bias", torch.zeros(0)).numel() // 9
    if outputs != len(names):
        raise ValueError(f"'{path}' has {outputs} class outputs; only COCO's {len(names)} have known names. Give torchvision's "
                         "retinanet_resnet50_fpn COCO weights, or a checkpoint of st.py")
    try:
        model = from_torchvision(state)
    except KeyError as key:
        raise ValueError(f"'{path}' has {key}, which retinanet_resnet50_fpn lacks; give torchvision's COCO weights of that")
    config = dict(task="det", backbone="resnet50", levels=(3, 7), width=256, depth=4, act="relu", norm="torchvision",
                  momentum=0.1, image_size=None, seed=0, gradient_checkpointing=False)
    with torch.device("meta"):
        net = RetinaNet("resnet50", len(names), norm="none", backbone_norm="frozen")
    net.name, net.norm = "torchvision's retinanet_resnet50_fpn", "frozen"
    backbones.check_fit(net, model, path)
    for key in ("classes.final.weight", "classes.final.bias"):
        model[key] = model[key].unflatten(0, (9, len(names)))[:, ids].flatten(0, 1)  # (9 * 80, ...)
    return {"model": model, "config": config, "class_ids": ids, "class_names": [names[i] for i in ids], "step": 0,
            "role": "torchvision's COCO detector", "boxes_per_image": 860_001 / 118_287}  # of COCO train2017
