"""Detection arithmetic as pure functions on tensors: anchors, box coding, matching, losses, decoding.

Follows the RetinaNet that Zoph et al. 2020 trained (the configuration is that of the TensorFlow TPU detection code
which the authors released checkpoints for) and App. B of the paper for the joint loss of self-training.
Nothing here imports another file of this project: copy it alone.

Conventions: boxes are float32 xyxy in absolute pixels; B images, A anchors, M (padded) ground-truth boxes, K classes.
Not here: Soft-NMS (the paper uses it for SpineNet only), anchors clipped to the image, per-class candidate limits.
"""
import math

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms

NEGATIVE, IGNORE = -1, -2  # values of match() besides ground-truth indices
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clip for log width/height ratios, so exp() cannot overflow


# ---- anchors -----------------------------------------------------------------------------------------------------

def make_anchors(height, width, levels=(3, 7), base=4.0, scales=3, ratios=(1.0, 2.0, 0.5), device="cpu"):
    """Anchors of every level, finest first, row-major, `scales * len(ratios)` at each location -> (A, 4).

    base: side of the smallest anchor in strides (4 for ResNet and EfficientNet; 3 for SpineNet-49S/49/96).
    ratios are width / height. Centres lie at stride/2 + k*stride.
    """
    out = []
    for level in range(levels[0], levels[1] + 1):
        stride = 2 ** level
        sizes = [base * stride * 2 ** (i / scales) for i in range(scales)]
        half = torch.tensor([[s * math.sqrt(r) / 2, s / math.sqrt(r) / 2] for s in sizes for r in ratios])  # (a, 2) w, h
        rows, cols = _cells(height, width, stride)
        out.append(_tile(torch.cat([-half, half], 1), rows, cols, stride, stride, stride / 2))
    return torch.cat(out).to(device)


def torchvision_anchors(height, width, levels=(3, 7), device="cpu"):
    """The anchors torchvision's RetinaNet weights were trained with -> (A, 4). Differences from make_anchors: sides
    rounded to pixels, ratio-major order, centres at k*stride without the half-stride offset, and as stride the whole
    pixels of image per cell: 61, not 64, where 13 rows of P6 cover 800 pixels."""
    out = []
    for level in range(levels[0], levels[1] + 1):
        stride, side = 2 ** level, 4 * 2 ** level
        sizes = [float(int(side * 2 ** (i / 3))) for i in range(3)]
        half = torch.tensor([[s / math.sqrt(r) / 2, s * math.sqrt(r) / 2] for r in (0.5, 1.0, 2.0) for s in sizes])
        rows, cols = _cells(height, width, stride)
        out.append(_tile(torch.cat([-half, half], 1).round(), rows, cols, height // rows, width // cols, 0.0))
    return torch.cat(out).to(device)


def _cells(height, width, stride):
    return -(-height // stride), -(-width // stride)  # strided convolutions with padding round up


def _tile(cell, rows, cols, dy, dx, offset):
    """Copies the anchors `cell` (a, 4) of one location to every location of a level, dy and dx apart -> (H*W*a, 4)."""
    y, x = torch.meshgrid(torch.arange(rows) * dy + offset, torch.arange(cols) * dx + offset, indexing="ij")
    centre = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)  # (H*W, 1, 4)
    return (centre + cell).reshape(-1, 4).float()  # (H*W*a, 4)


# ---- boxes -------------------------------------------------------------------------------------------------------

def box_iou(a, b):
    """Pairwise intersection over union of a (..., N, 4) and b (..., M, 4) -> (..., N, M). Empty boxes give 0."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)[..., :, None]
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)[..., None, :]
    return inter / (area_a + area_b - inter).clamp(min=1e-9)


def encode(boxes, anchors):
    """Boxes (..., 4) relative to anchors (..., 4) -> (..., 4): centre offset / anchor size, log size ratio.
    No variance scaling. The original orders the four as (y, x, h, w); ours is (x, y, w, h), torchvision's order."""
    size_a, size_b = anchors[..., 2:] - anchors[..., :2], (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    centre_a, centre_b = (anchors[..., :2] + anchors[..., 2:]) / 2, (boxes[..., :2] + boxes[..., 2:]) / 2
    return torch.cat([(centre_b - centre_a) / size_a, torch.log(size_b / size_a)], -1)


def decode(deltas, anchors):
    """Inverse of encode; log ratios are clipped at ln(1000/16) -> boxes (..., 4)."""
    size, centre = anchors[..., 2:] - anchors[..., :2], (anchors[..., :2] + anchors[..., 2:]) / 2
    centre = centre + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SIZE)) * size / 2
    return torch.cat([centre - half, centre + half], -1)


def match(anchors, boxes, valid, positive=0.5, negative=0.5):
    """Which ground-truth box each anchor answers for, for a whole batch at once.

    anchors (A, 4); boxes (B, M, 4) padded; valid (B, M) bool marks the real ones. M may be 0.
    Returns (B, A) int64: index of a box, NEGATIVE (IoU < negative) or IGNORE (between). Each valid box also takes the
    anchor it overlaps most, whatever that IoU (first such anchor on ties; boxes it overlaps not at all take none).
    torchvision's Matcher differs there: it keeps all ties, and gives the anchor to the box the *anchor* prefers; the TPU
    code lets the first, not the last, of two boxes that want the same anchor have it.
    """
    B, M = valid.shape
    A = len(anchors)
    if M == 0:
        return torch.full((B, A), NEGATIVE, dtype=torch.int64, device=anchors.device)
    iou = box_iou(boxes, anchors.expand(B, A, 4)) * valid[..., None]  # (B, M, A)
    best, index = iou.max(1)  # (B, A) over the boxes
    index = torch.where(best >= positive, index, torch.where(best < negative, NEGATIVE, IGNORE))
    top, anchor = iou.max(2)  # (B, M) over the anchors
    # two boxes may want one anchor: write through an extra column so that padding and empty overlaps land nowhere,
    # and let the later box win on every device alike (amax over box indices is order-free, a plain scatter is not)
    forced = torch.full((B, A + 1), -1, dtype=torch.int64, device=anchors.device)
    slot = torch.where(valid & (top > 0), anchor, A)
    forced.scatter_reduce_(1, slot, torch.arange(M, device=slot.device).expand(B, M), "amax")
    forced = forced[:, :A]
    return torch.where(forced >= 0, forced, index)


# ---- losses ------------------------------------------------------------------------------------------------------

class _FocalLoss(torch.autograd.Function):
    """Focal loss with its derivative written out: one pass in float32 instead of a dozen saved intermediates.
    With s = softplus(x), p = sigmoid(x) = exp(x - s), a background entry costs (1-alpha) p^gamma s, derivative
    (1-alpha) p^gamma (gamma (1-p) s + p). All entries are first taken as background; the few foreground ones
    (one per positive anchor) are the same formula at -x with weight alpha and opposite sign, and are patched in."""

    @staticmethod
    def forward(ctx, logits, classes, alpha, gamma):
        x = logits.float()  # (B, A, K)
        soft = F.softplus(x)
        log_p = x - soft if logits.dtype == torch.float32 else x.sub_(soft)  # never write into the caller's tensor
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
        background = (1 - alpha) * torch.exp(-gamma * soft) * F.softplus(-x)  # what the entry was charged above
        loss[b, a] += weight * soft - background
        grad[b, a, k] = -weight * (gamma * (1 - p) * soft + p)
        ignored = classes == IGNORE
        loss = loss.masked_fill_(ignored, 0).sum(1)  # (B,)
        ctx.save_for_backward(grad.masked_fill_(ignored[..., None], 0).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx, scale):  # (B,)
        grad, = ctx.saved_tensors
        return grad * scale[:, None, None].to(grad.dtype), None, None, None


def focal_loss(logits, classes, alpha=0.25, gamma=1.5):
    """Sigmoid focal loss (Lin et al. 2017; gamma 1.5 is the TPU detection code's default), summed over anchors.

    logits (B, A, K) of any float type; classes (B, A) int64: 0..K-1, NEGATIVE, or IGNORE (costs nothing).
    Returns (B,) float32, one sum per image, not yet divided by the number of positives.
    """
    return _FocalLoss.apply(logits, classes, alpha, gamma)


def box_loss(deltas, boxes, anchors, matched, delta=0.1):
    """Huber loss of the positive anchors' deltas against their boxes, summed over anchors and the 4 components.

    deltas (B, A, 4); boxes (B, M, 4); anchors (A, 4); matched (B, A) from match(). Returns (B,) float32.
    """
    b, a = (matched >= 0).nonzero(as_tuple=True)  # (P,)
    target = encode(boxes[b, matched[b, a]], anchors[a])  # (P, 4)
    error = (deltas[b, a].float() - target).abs()
    loss = torch.where(error <= delta, 0.5 * error ** 2, delta * error - 0.5 * delta ** 2).sum(1)  # (P,)
    return torch.zeros(len(deltas), device=loss.device).index_add(0, b, loss)


def joint_loss(losses, averages, alpha, normalise=True):
    """Loss on human and other labels together: (L_h + alpha * sum_k (avg L_h / avg L_k) * L_k) / (1 + alpha * how many k).

    App. B of the paper (formula recalled, not checked against its text), where there is one other, L_p on pseudo-labels; joint
    training has the classification loss in its place or beside it. losses: scalars, L_h first. averages: what update_averages
    returned for the steps before this one (ratios of 1 while there are none), so the coefficients are constants with no
    gradient and do not depend on how a step is cut into micro-batches.
    normalise=False is the plain sum L_h + alpha * L_p that the paper reports as unstable.
    """
    means = average_losses(averages)  # (P,)
    ratios = means[0] / means[1:].clamp(min=1e-6) if averages[-1] > 0 else [1.0] * len(means)
    if not normalise:
        return losses[0] + alpha * sum(losses[1:])
    return (losses[0] + sum(alpha * ratio * loss for ratio, loss in zip(ratios, losses[1:]))) / (1 + alpha * (len(losses) - 1))


def update_averages(averages, losses, decay=0.99):
    """Moving averages of the losses (P,), as a float64 tensor [sum_h, sum_p, ..., weight] that starts as zeros(P + 1).
    The decay is our choice: the paper gives none (recalled)."""
    new = torch.cat([losses.detach().double(), averages.new_ones(1)])
    return decay * averages + (1 - decay) * new


def average_losses(averages):
    """Mean losses (P,), bias-corrected: divided by the total weight seen so far rather than by 1."""
    return averages[:-1] / averages[-1].clamp(min=1e-12)


# ---- decoding ----------------------------------------------------------------------------------------------------

def detect(logits, deltas, anchors, windows, min_score=0.05, nms_iou=0.5, candidates=5000, limit=100):
    """Boxes of a batch: sigmoid, best `candidates` above min_score per image, decode, clip, per-class NMS, best `limit`.

    logits (B, A, K); deltas (B, A, 4); anchors (A, 4); windows (B, 2) height, width to clip to (the unpadded part).
    Returns a list of B dicts: boxes (n, 4), scores (n,), labels (n,), best first.
    The original keeps 5000 candidates per class and torchvision 1000 per level; we keep 5000 per image.
    """
    B, A, K = logits.shape
    scores = logits.float().sigmoid().reshape(B, A * K)
    top, entry = scores.topk(min(candidates, A * K), dim=1)  # (B, n)
    image, rank = (top > min_score).nonzero(as_tuple=True)  # (C,) candidates of all images, image-major
    top, entry = top[image, rank], entry[image, rank]
    label = entry % K
    box = decode(deltas[image, entry // K].float(), anchors[entry // K])
    limits = windows[image].to(box.dtype)[:, [1, 0, 1, 0]]  # (C, 4) w, h, w, h
    box = torch.minimum(box.clamp(min=0), limits)
    solid = ((box[:, 2:] - box[:, :2]) > 1e-2).all(1)  # clipping can leave nothing of a box
    box, top, label, image = box[solid], top[solid], label[solid], image[solid]
    # One call for all images and classes; best first. It keeps them apart by shifting each to its own place, up to
    # B*K image widths away: float32 would round the boxes there, and results would depend on who shares the batch.
    keep = batched_nms(box.double(), top.double(), image * K + label, nms_iou)
    out = []
    for i in range(B):
        mine = keep[image[keep] == i][:limit]
        out.append({"boxes": box[mine], "scores": top[mine], "labels": label[mine]})
    return out
