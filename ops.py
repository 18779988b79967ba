"""Arithmetic on tensors: anchors, box coding, matching, the losses of all tasks, the joint loss of
self-training, decoding. Imports nothing local: copy this file into any project.

Detection follows the RetinaNet that Zoph et al. 2020 trained (the configuration is that of the
TensorFlow TPU detection code, in which the authors released checkpoints). Not here: Soft-NMS (the
paper uses it for SpineNet only), anchors clipped to the image, per-class candidate limits.

Boxes are float32 xyxy in pixels. B images, A anchors, M (padded) true boxes, K classes.

A task's targets(batch, net) -> {name: (B, ...)}, count (B,): anchors, pixels or images of each
image that the loss is a mean over. Its losses(outputs, targets, count, net) -> (B, terms), where
count (B,) is that of the image's part of the *whole* step, so that the pieces of a step, on any
number of processes, add up to the same loss.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms

NEGATIVE = -1  # of match() besides the indices of boxes: background
IGNORE = -2  # of match(): neither background nor an object
UNLABELLED = 255  # of a mask
NO_CLASS = -1  # of an image
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clips log size ratios here, so exp() cannot overflow
FIRST_OBJECT = 256  # number of an image's object 0 in its map of objects
BOX_WEIGHT = 50.0  # of the Huber loss beside the focal loss (TPU code)

# ---- anchors -------------------------------------------------------------------------------------


def make_anchors(height, width, levels=(3, 7), base=4.0, scales=3, ratios=(1.0, 2.0, 0.5)):
    """Anchors of all levels, finest first, row-major, `scales * len(ratios)` a place -> (A, 4).

    base: side of the smallest anchor in strides (4 for ResNet and EfficientNet; 3 for
    SpineNet-49S/49/96). ratios are width / height. Centres lie at stride / 2 + k * stride.
    """
    anchors = []
    for level in range(levels[0], levels[1] + 1):
        stride = 2**level
        half = []  # width, height
        for i in range(scales):
            side = base * stride * 2 ** (i / scales)
            half += [[side * math.sqrt(r) / 2, side / math.sqrt(r) / 2] for r in ratios]
        half = torch.tensor(half)  # (a, 2)
        y = torch.arange(-(-height // stride)) * stride + stride / 2  # padded convolutions round up
        x = torch.arange(-(-width // stride)) * stride + stride / 2
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)  # (H*W, 1, 4)
        anchors.append((centre + torch.cat([-half, half], 1)).reshape(-1, 4))  # (H*W*a, 4)
    return torch.cat(anchors)


# ---- boxes ---------------------------------------------------------------------------------------


def box_iou(a, b):
    """Pairwise intersection over union of a (..., N, 4) and b (..., M, 4) -> (..., N, M); 0 where a
    box is empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)[..., :, None]
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)[..., None, :]
    return inter / (area_a + area_b - inter).clamp(min=1e-9)


def encode(boxes, anchors):
    """Boxes (..., 4) relative to anchors (..., 4) -> (..., 4): centre offset / anchor size, log
    size ratio; no variances. The original orders the four as (y, x, h, w), we as torchvision."""
    size_a = anchors[..., 2:] - anchors[..., :2]
    size_b = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    centre_a = (anchors[..., :2] + anchors[..., 2:]) / 2
    centre_b = (boxes[..., :2] + boxes[..., 2:]) / 2
    return torch.cat([(centre_b - centre_a) / size_a, torch.log(size_b / size_a)], -1)


def decode(deltas, anchors):
    """Inverse of encode -> boxes (..., 4)."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    centre = centre + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SIZE)) * size / 2
    return torch.cat([centre - half, centre + half], -1)


def match(anchors, boxes, valid, positive=0.5, negative=0.5):
    """Which true box each anchor answers for, for a whole batch at once.

    anchors (A, 4); boxes (B, M, 4) padded; valid (B, M) bool marks the real ones. M may be 0.
    -> (B, A) int64: index of a box, NEGATIVE (IoU < negative) or IGNORE (between). A valid box also
    takes the anchor it overlaps most, whatever that IoU (the first of equals; none if it overlaps
    none). torchvision's Matcher differs there: it keeps all ties, and gives the anchor to the box
    that the *anchor* prefers; of two boxes that want one anchor the TPU code lets the first have
    it, we the last.
    """
    B, M = valid.shape
    A = len(anchors)
    if M == 0:
        return torch.full((B, A), NEGATIVE, dtype=torch.int64, device=anchors.device)
    iou = box_iou(boxes, anchors.expand(B, A, 4)) * valid[..., None]  # (B, M, A)
    best, index = iou.max(1)  # (B, A) over the boxes
    background = torch.where(best < negative, NEGATIVE, IGNORE)
    index = torch.where(best >= positive, index, background)
    # Padding and boxes that overlap nothing write into an extra column. Of two boxes that want one
    # anchor the later has it on every device: amax over box indices does not depend on the order.
    top, anchor = iou.max(2)  # (B, M) over the anchors
    slot = torch.where(valid & (top > 0), anchor, A)
    forced = torch.full((B, A + 1), -1, dtype=torch.int64, device=anchors.device)
    forced.scatter_reduce_(1, slot, torch.arange(M, device=slot.device).expand(B, M), "amax")
    forced = forced[:, :A]
    return torch.where(forced >= 0, forced, index)


# ---- losses of boxes -----------------------------------------------------------------------------


class _FocalLoss(torch.autograd.Function):
    """Focal loss with its derivative written out: one pass in float32 that keeps one tensor of the
    logits' size, where torchvision's sigmoid_focal_loss keeps 8, in 0.7 of its time (one CPU core).

    With s = softplus(x), p = sigmoid(x) = exp(x - s), a background entry costs (1-alpha) p^gamma s,
    derivative (1-alpha) p^gamma (gamma (1-p) s + p). All entries are first taken as background. The
    few foreground ones (one a positive anchor) are the same formula at -x with weight alpha and
    opposite sign, and are patched in."""

    @staticmethod
    def forward(ctx, logits, classes, alpha, gamma):
        x = logits.float()  # (B, A, K)
        soft = F.softplus(x)
        if logits.dtype == torch.float32:
            log_p = x - soft  # x is the caller's own tensor, which must not be written into
        else:
            log_p = x.sub_(soft)
        p = log_p.exp()
        weight = log_p.mul_(gamma).exp_().mul_(1 - alpha)  # (1-alpha) p^gamma
        loss = (weight * soft).sum(-1)  # (B, A)
        grad = soft.mul_(1 - p).mul_(gamma).add_(p).mul_(weight)

        b, a = (classes >= 0).nonzero(as_tuple=True)  # (P,) each
        k = classes[b, a]
        x = -logits[b, a, k].float()
        soft = F.softplus(x)
        p = torch.exp(x - soft)
        weight = alpha * torch.exp(gamma * (x - soft))
        background = (1 - alpha) * torch.exp(-gamma * soft) * F.softplus(-x)  # as charged above
        loss[b, a] += weight * soft - background
        grad[b, a, k] = -weight * (gamma * (1 - p) * soft + p)

        ignored = classes == IGNORE
        loss = loss.masked_fill_(ignored, 0).sum(1)  # (B,)
        ctx.save_for_backward(grad.masked_fill_(ignored[..., None], 0).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx, scale):  # (B,)
        (grad,) = ctx.saved_tensors
        return grad * scale[:, None, None].to(grad.dtype), None, None, None


def focal_loss(logits, classes, alpha=0.25, gamma=1.5):
    """Sigmoid focal loss (Lin et al. 2017; gamma is the TPU code's), summed over anchors.

    logits (B, A, K) of any float type; classes (B, A) int64: 0..K-1, NEGATIVE, or IGNORE, which
    costs nothing -> (B,) float32, not yet divided by the number of positives.
    """
    return _FocalLoss.apply(logits, classes, alpha, gamma)


def box_loss(deltas, boxes, anchors, matched, delta=0.1):
    """Huber loss of the positive anchors' deltas against their boxes, summed over anchors and the 4
    components. deltas (B, A, 4); boxes (B, M, 4); matched (B, A) of match() -> (B,) float32."""
    b, a = (matched >= 0).nonzero(as_tuple=True)  # (P,)
    target = encode(boxes[b, matched[b, a]], anchors[a])  # (P, 4)
    error = (deltas[b, a].float() - target).abs()
    near = 0.5 * error**2
    far = delta * error - 0.5 * delta**2
    loss = torch.where(error <= delta, near, far).sum(1)  # (P,)
    return torch.zeros(len(deltas), device=loss.device).index_add(0, b, loss)


def match_anchors(batch, net):
    """Targets {"matched" (B, A) of match(), "classes" (B, A) likewise but with class indices,
    "boxes" (B, M, 4)}; count: positive anchors. net: anything with anchors (A, 4)."""
    matched = []
    for boxes, labels in zip(batch["boxes"].split(8), batch["labels"].split(8)):
        matched.append(match(net.anchors, boxes, labels >= 0))  # all IoUs at once are gigabytes
    matched = torch.cat(matched)
    labels = F.pad(batch["labels"], (0, 1), value=-1)  # (B, M+1): gather needs a column if M is 0
    classes = torch.where(matched >= 0, labels.gather(1, matched.clamp(min=0)), matched)
    targets = {"matched": matched, "classes": classes, "boxes": batch["boxes"]}
    return targets, (matched >= 0).sum(1).float()


def box_losses(outputs, targets, count, net):
    """Focal loss and weighted box loss (B, 2). The original divides by the positives + 1, too."""
    logits, deltas = outputs  # (B, A, K), (B, A, 4)
    focal = focal_loss(logits, targets["classes"])
    box = box_loss(deltas, targets["boxes"], net.anchors, targets["matched"])
    return torch.stack([focal, BOX_WEIGHT / 4 * box], 1) / (count + 1)[:, None]


# ---- losses of pixels and of classes -------------------------------------------------------------


def pixel_targets(batch, net):
    """Targets {"mask" (B, H, W) int64} at the stride of the logits; count: labelled pixels. The TPU
    code's loss is at that resolution as well, but it reduces masks bilinearly (for the TPU's sake,
    it says), we by nearest neighbour."""
    rows = slice(net.stride // 2, None, net.stride)
    mask = batch["mask"][:, rows, rows].long()  # (B, H, W)
    return {"mask": mask}, (mask != UNLABELLED).sum((1, 2)).float()


def pixel_losses(logits, targets, count, net):
    """Softmax cross-entropy (B, 1) of logits (B, K, H, W)."""
    mask = targets["mask"]
    loss = F.cross_entropy(logits.float(), mask, ignore_index=UNLABELLED, reduction="none")
    return loss.sum((1, 2))[:, None] / count.clamp(min=1)[:, None]


def class_targets(batch, net):
    """Targets {"class" (B,)}; count: 1, or 0 for an image without a class."""
    label = batch["image_class"]
    return {"class": label}, (label != NO_CLASS).float()


def class_losses(logits, targets, count, net):
    """Softmax cross-entropy (B, 1) of logits (B, K). No label smoothing."""
    label = targets["class"]
    loss = F.cross_entropy(logits.float(), label, ignore_index=NO_CLASS, reduction="none")
    return (loss / count.clamp(min=1))[:, None]


# ---- the joint loss ------------------------------------------------------------------------------


def per_part(values, part, P):
    """Sums (P, ...) of values (B, ...) over the images of each part of a step; part (B,)."""
    sums = torch.zeros(P, *values.shape[1:], device=values.device)
    return sums.index_add(0, part, values)


class JointLoss(nn.Module):
    """L = (L_h + sum_k alpha * (avg L_h / avg L_k) * L_k) / (1 + alpha * K)

    Zoph et al. 2020, App. B (recalled, not checked against its text), where K is 1: L_h on human
    labels, L_1 on pseudo-labels. In joint training the classification loss is one more, or the only
    one. The averages are those of the steps before this one, so the coefficients are constants
    without gradient and do not depend on how a step is cut into pieces; before the first step the
    ratios are 1. The decay is ours, the paper gives none (recalled).

    normalised=False: the plain sum L_h + alpha * sum_k L_k, which the paper reports as unstable.
    """

    def __init__(self, parts, alpha=1.0, normalised=True, decay=0.99):
        super().__init__()
        self.alpha = alpha
        self.normalised = normalised
        self.decay = decay
        self.register_buffer("sums", torch.zeros(parts, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))  # 1 after many steps

    @property
    def average(self):
        """Mean losses (1 + K,), corrected for how few steps there have been."""
        return self.sums / self.weight.clamp(min=1e-12)

    @property
    def ratio(self):
        """avg L_h / avg L_k (K,)."""
        average = self.average
        return torch.where(self.weight > 0, average[0] / average[1:].clamp(min=1e-6), 1.0)

    def forward(self, losses):
        """losses (1 + K,): the human one first."""
        K = len(losses) - 1
        if K == 0:
            return losses[0]
        if not self.normalised:
            return losses[0] + self.alpha * losses[1:].sum()
        others = (self.alpha * self.ratio * losses[1:]).sum()
        return (losses[0] + others) / (1 + self.alpha * K)

    def update(self, losses):
        """losses (1 + K,) of a whole step, over all processes."""
        if not losses.all():  # a part without a single label says nothing about its usual loss
            return
        new = losses.detach().double()
        self.sums.copy_(self.decay * self.sums + (1 - self.decay) * new)
        self.weight.copy_(self.decay * self.weight + (1 - self.decay))


# ---- decoding ------------------------------------------------------------------------------------


def detect(
    logits, deltas, anchors, windows, min_score=0.05, nms_iou=0.5, candidates=5000, limit=100
):
    """Boxes of a batch: the best `candidates` of each image above min_score, decoded, clipped, NMS
    within each class, the best `limit`.

    logits (B, A, K); deltas (B, A, 4); windows (B, 2): height and width of the unpadded part, to
    clip to -> B dicts: boxes (n, 4), scores (n,), labels (n,), best first. The original keeps 5000
    candidates a class, torchvision 1000 a level; we keep 5000 an image.
    """
    B, A, K = logits.shape
    scores = logits.float().sigmoid().reshape(B, A * K)
    score, entry = scores.topk(min(candidates, A * K), dim=1)  # (B, n)
    image, rank = (score > min_score).nonzero(as_tuple=True)  # (C,) of all images, image-major
    score = score[image, rank]
    entry = entry[image, rank]
    label = entry % K
    box = decode(deltas[image, entry // K].float(), anchors[entry // K])
    limits = windows[image].to(box.dtype)[:, [1, 0, 1, 0]]  # (C, 4) w, h, w, h
    box = torch.minimum(box.clamp(min=0), limits)
    solid = ((box[:, 2:] - box[:, :2]) > 1e-2).all(1)  # clipping can leave nothing of a box
    box, score, label, image = box[solid], score[solid], label[solid], image[solid]
    # One call for all images and classes; best first. It keeps them apart by shifting boxes, up to
    # B*K image widths: float32 would round them there, and results depend on who shares the batch.
    keep = batched_nms(box.double(), score.double(), image * K + label, nms_iou)
    answers = []
    for i in range(B):
        rows = keep[image[keep] == i][:limit]
        answers.append({"boxes": box[rows], "scores": score[rows], "labels": label[rows]})
    return answers


# ---- masks of objects, for Mask R-CNN ------------------------------------------------------------
# From COCO's files, through the augmentation as one map of objects, back to COCO's RLE. A map holds
# FIRST_OBJECT + k where object k of the image is seen, 0 where none is, 255 outside of the image:
# one picture for all objects moves like any segmentation mask.


def is_outline(segmentation, size):
    """Whether a segmentation can be drawn: polygons of three points or more, or RLE of an image of
    that size (h, w)."""
    if isinstance(segmentation, dict):
        same = list(segmentation.get("size", ())) == list(size)
        return "counts" in segmentation and same
    if not isinstance(segmentation, list) or not segmentation:
        return False
    polygons = all(isinstance(p, list) for p in segmentation)
    return polygons and all(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)


def pack_outlines(segmentations, sizes):
    """COCO's segmentations (None, [] or [[]] where there is none) of images of those sizes (n, 2),
    as json texts one after another, (bytes,) uint8, and where each is, (n, 2): flat arrays, which
    workers share. ValueError for one that cannot be drawn."""
    texts = []
    for segmentation, size in zip(segmentations, sizes):
        if not segmentation or segmentation == [[]]:
            texts.append(b"")
            continue
        text = json.dumps(segmentation)
        if not is_outline(segmentation, size):
            raise ValueError(
                f"segmentation {text[:60]} is neither polygons of three points or more nor RLE of "
                f"its image, {size[0]} high and {size[1]} wide"
            )
        texts.append(text.encode())
    ends = np.cumsum([0, *map(len, texts)])
    return np.frombuffer(b"".join(texts), np.uint8), np.stack([ends[:-1], ends[1:]], 1)


def draw_outlines(texts, places, crowd, size):
    """The map (h, w) int32 of an image's objects but those of a crowd or without a segmentation.
    What two objects claim goes to the smaller."""
    objects = []
    for k, (begin, end) in enumerate(places):
        if begin == end or crowd[k]:
            continue
        rle = json.loads(texts[begin:end].tobytes())
        if isinstance(rle, list) or isinstance(rle["counts"], list):  # not compressed yet
            rle = coco_mask.frPyObjects(rle, *size)
        if isinstance(rle, list):
            rle = coco_mask.merge(rle)
        objects.append((k, coco_mask.decode(rle).astype(bool)))
    numbers = np.zeros(size, np.int32)
    for k, seen in sorted(objects, key=lambda row: -row[1].sum()):
        numbers[seen] = FIRST_OBJECT + k
    return numbers


def collate_outlines(targets, size):
    """-> {"numbers" (B, S, S) int32: the maps; "number" (B, M): each box's number in its map, -1
    where padded or without a mask}."""
    M = max(len(t["boxes"]) for t in targets)
    number = np.full((len(targets), M), -1, np.int64)
    numbers = np.zeros((len(targets), *size), np.int32)
    for i, t in enumerate(targets):
        if "number" in t:
            numbers[i] = t["mask"]
            seen = np.isin(t["number"], t["mask"])
            number[i, : len(seen)] = np.where(seen, t["number"], -1)
    return {"number": torch.from_numpy(number), "numbers": torch.from_numpy(numbers)}


def encode_masks(masks, boxes, size):
    """Masks (n, m, m), probabilities inside their boxes (n, 4), as COCO's RLE in an image of that
    size (h, w)."""
    masks = torch.as_tensor(masks)
    boxes = torch.as_tensor(boxes)
    rles = []
    for i in range(len(masks)):  # all at once would be gigabytes
        mask = masks[i : i + 1, None]  # (1, 1, m, m)
        seen = paste_masks_in_image(mask, boxes[i : i + 1], size)[0, 0] > 0.5  # (h, w)
        rles.append(coco_mask.encode(np.asfortranarray(seen.numpy().astype(np.uint8))))
    return rles
