"""Faster and Mask R-CNN on C4 (Ren et al. 2015, He et al. 2017): the detectors to which HPT (Reed et al., section 4) and MoCo
transfer their backbones. st.py trains them like RetinaNet: teacher, pseudo-labels, student.

    python st.py --model rcnn-c4                                                        the embedded world, recipe tiny-c4
    torchrun --nproc_per_node 8 st.py --recipe voc-c4 --mode train --labeled 1 --init FILE --data coco --root VOC07+12
    torchrun --nproc_per_node 8 st.py --recipe coco-c4 --mode train --labeled 1 --init FILE --data coco --root COCO   with masks

A ResNet up to C4 feeds the region proposals (RPN); each region's 14x14 crop of C4 goes through the network's own last stage
(res5, halving it), one more batch norm, and a mean, to a class and a box; without the mean to a mask. Proposals, matching,
sampling, losses and decoding are torchvision's detection modules, put together here. Settings: recipes.py's *-c4 rows.

Facts      [d2] detectron2's defaults, Base-RCNN-C4.yaml, Res5ROIHeads, FastRCNNOutputLayers, MaskRCNNConvUpsampleHead; [moco] its
           detection folder: Res5ROIHeadsExtraNorm, Base-RCNN-C4-BN.yaml (all layers train). Read, not recalled.
Differs    from [d2]: images are fitted to a fixed square canvas, as everywhere in this project, not to a shortest edge: with the
           rows' sizes one of 4:3 is as large as there, one of 3:2 a tenth smaller; the padding is on top. Smooth L1 with
           torchvision's beta 1/9 instead of L1. Regions are clipped to the canvas (boxes to the image, when decoding). No
           PreciseBN: running averages score. No weight decay on biases; images without boxes are trained on; --dry-run's memory
           leaves the mask branch out.
Per image  an image's loss is what torchvision's modules say of it alone, and a step's loss their mean over the images of the
           whole step: so it does not depend on how the step is spread, but for which anchors and regions are drawn (as with the
           draws of stochastic depth) and what batch norm sees. A resumed run draws the same ones.
Masks      are learnt from objects that have one: human-labelled ones, as pseudo-labels are boxes only. Scored next to the boxes.
Left out   joint training, --compile (shapes vary from image to image), backbones without a res5 of their own.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import roi_align

import backbones
import data
import util

STRIDE = 16
RATIOS = (0.5, 1.0, 2.0)  # height / width [d2]


def region_proposals(anchors, proposals, head=None):
    """torchvision's RPN. anchors: sides in pixels; proposals: (before, after NMS) in training, (before, after) in use. Matching
    at IoU 0.7 and 0.3, 256 anchors an image of which half are positive, NMS at 0.7 [d2]."""
    before, after = ({"training": proposals[k], "testing": proposals[k + 2]} for k in (0, 1))
    return RegionProposalNetwork(AnchorGenerator((tuple(anchors),), (RATIOS,)), head, 0.7, 0.3, 256, 0.5, before, after, 0.7)


class RCNN(nn.Module):
    """images (B, 3, H, W), normalised, and for training boxes (B, M, 4), labels (B, M), -1 where padded -> a dict of

    anchors (A, 4), objectness (B, A), deltas (B, A, 4)    what the RPN says of every anchor
    regions (R, 4), image (R,)                             of all images, image by image; in training the sampled ones
    logits (R, K + 1), boxes (R, 4 (K + 1))                class 0 is the background: class k of the data is k + 1 here
    labels (R,), targets (R, 4), match (R,)                in training: what the regions should answer, and for which box
    masks (P, m, m)                                        in training with masks: logits of the regions with a class, for that
    feats (B, C, H/16, W/16)                               in use with masks: C4, from which decode makes those of what is found

    All float32, boxes xyxy in pixels. regions: how many are sampled in training, at most a quarter of them positive; crop: side
    of a region's crop; norm: the extra one. res5 stays where it is, backbone.layer4: so one file fills both.
    """
    inputs = ("boxes", "labels")  # of a batch, besides the images: st.train hands them over

    def __init__(self, backbone, classes, anchors, regions, crop, proposals, masks=False, norm="bn", backbone_norm="bn"):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        c4, c5 = self.backbone.channels[4], self.backbone.channels[5]
        self.rpn = region_proposals(anchors, proposals, RPNHead(c4, len(anchors) * len(RATIOS)))
        self.norm, self.crop, self.regions = backbones.make_norm(norm, c5), crop, regions
        # positive from IoU 0.5, box weights (10, 10, 5, 5), NMS at 0.5, 100 detections [d2]; crop and res5 are done in forward
        self.roi = RoIHeads(None, None, FastRCNNPredictor(c5, classes + 1), 0.5, 0.5, regions, 0.25, None, 0.05, 0.5, 100)
        for layer, std in ((self.roi.box_predictor.cls_score, 0.01), (self.roi.box_predictor.bbox_pred, 0.001)):  # [d2]
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.masks = None
        if masks:  # [d2]
            self.masks = nn.Sequential(nn.ConvTranspose2d(c5, 256, 2, 2), nn.ReLU(), nn.Conv2d(256, classes, 1))
            nn.init.kaiming_normal_(self.masks[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(self.masks[2].weight, std=0.001)
            nn.init.zeros_(self.masks[0].bias), nn.init.zeros_(self.masks[2].bias)

    def head(self, feats, image, regions):
        """Crops of C4 at the regions (R, 4) of the images (R,), through res5 and its norm -> (R, C5, crop/2, crop/2)."""
        x = roi_align(feats, torch.cat([image[:, None].to(regions.dtype), regions], 1), self.crop, 1 / STRIDE, 0, aligned=True)
        return self.norm(self.backbone.layer4(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, images, boxes=None, labels=None):
        (B, _, H, W), rpn = images.shape, self.rpn
        feats = self.backbone(images, levels=(2, 3, 4))[4]  # (B, C, H/16, W/16)
        objectness, deltas = concat_box_prediction_layers(*rpn.head([feats]))
        objectness, deltas = objectness.float().view(B, -1), deltas.float().view(B, -1, 4)  # (B, A), (B, A, 4)
        rpn.anchor_generator.set_cell_anchors(torch.float32, images.device)  # whatever precision the network runs in
        anchors, = rpn.anchor_generator.grid_anchors([feats.shape[-2:]], [[STRIDE, STRIDE]])  # (A, 4)
        out = {"anchors": anchors, "objectness": objectness, "deltas": deltas}
        if images.is_meta:  # --dry-run counts memory by shapes, and which regions there are is no matter of shape
            regions = [images.new_zeros(self.regions, 4)] * B
        else:
            found = rpn.box_coder.decode(deltas.detach().flatten(0, 1), [anchors] * B).view(B, -1, 4)
            regions, _ = rpn.filter_proposals(found, objectness, [(H, W)] * B, [len(anchors)])
        if boxes is not None:
            truth = [{"boxes": b[k >= 0], "labels": k[k >= 0] + 1} for b, k in zip(boxes, labels)]
            regions, match, labels, targets = self.roi.select_training_samples(regions, truth)
            out.update(labels=torch.cat(labels), targets=torch.cat(targets), match=torch.cat(match))
        image = torch.cat([torch.full((len(r),), i, device=r.device) for i, r in enumerate(regions)])
        regions = torch.cat(regions)
        x = self.head(feats, image, regions)
        if self.masks and "labels" in out:
            some = out["labels"] > 0
            out["masks"] = self.masks(x[some])[torch.arange(some.sum(), device=x.device), out["labels"][some] - 1].float()
        elif self.masks:
            out["feats"] = feats
        logits, boxes = self.roi.box_predictor(x.mean((2, 3)))
        return {**out, "regions": regions, "image": image, "logits": logits.float(), "boxes": boxes.float()}

    def decode(self, out, windows, min_score=0.05):
        """What is found, from forward's outputs -> a list of dicts as from ops.detect. windows (B, 2): height and width of each
        image on its canvas, to which boxes are clipped."""
        self.roi.score_thresh = min_score
        counts = torch.bincount(out["image"], minlength=len(windows)).tolist()
        found = self.roi.postprocess_detections(out["logits"], out["boxes"], list(out["regions"].split(counts)), windows.tolist())
        found = [{"boxes": b, "scores": s, "labels": k - 1} for b, s, k in zip(*found)]
        feats = out["feats"].float() if self.masks else None  # whatever precision it came in
        for i, d in enumerate(found if self.masks else ()):
            x = self.head(feats, torch.full_like(d["labels"], i), d["boxes"])
            d["masks"] = self.masks(x)[torch.arange(len(x), device=x.device), d["labels"]].sigmoid()  # (n, m, m)
        return found


def network(c, classes, norm, backbone_norm):
    sizes = [c[k] for k in ("anchors", "regions", "crop", "proposals", "instances")]
    return RCNN(c["backbone"], classes, *sizes, norm, backbone_norm)


def criterion(c, device):
    """As detect.criterion -> prepare, losses; normalised by the number of images."""
    rpn = region_proposals(c["anchors"], c["proposals"])

    def prepare(batch):
        images = (batch["part"][:, None] == torch.arange(len(data.PARTS), device=device)).sum(0)  # (3,)
        return {k: batch[k] for k in ("boxes", "labels", "number", "numbers") if k in batch}, util.all_sum(images)
    return prepare, lambda *args: losses_of(*args, rpn)


def losses_of(out, targets, part, images, rpn):
    """Class and box loss of each image (B, 2): the RPN's plus the regions', in the second also the masks'; divided by the images
    of its part in the whole step. out: RCNN's; targets: {"boxes" (B, M, 4), "labels" (B, M)}, masks.collate's; images (3,)."""
    rows = []
    for i, (boxes, labels) in enumerate(zip(targets["boxes"], targets["labels"])):
        positive, matched = rpn.assign_targets_to_anchors([out["anchors"]], [{"boxes": boxes[labels >= 0]}])
        wanted, mine = rpn.box_coder.encode(matched, [out["anchors"]]), out["image"] == i
        first = rpn.compute_loss(out["objectness"][i], out["deltas"][i], positive, wanted)
        second = fastrcnn_loss(*(out[k][mine] for k in ("logits", "boxes")), *([out[k][mine]] for k in ("labels", "targets")))
        rows.append(torch.stack(first) + torch.stack(second))
        if "masks" in out:
            third = mask_loss(out, mine, targets["number"][i][labels >= 0], targets["numbers"][i])
            rows[-1] = rows[-1] + torch.stack([torch.zeros_like(third), third])
    return torch.stack(rows) / images[part][:, None]


def mask_loss(out, mine, number, numbers):
    """Mean cross-entropy over the masks of an image's regions, 0 if none has one. mine (R,): which regions are its; number (M,),
    numbers (H, W): masks.collate's."""
    some = mine & (out["labels"] > 0)
    match, logits = out["match"][some], out["masks"][mine[out["labels"] > 0]]  # (P,), (P, m, m)
    if not len(match):
        return logits.sum()
    known = (number >= 0)[match]
    wanted = project_masks_on_boxes(numbers == number[:, None, None], out["regions"][some], match, logits.shape[-1])  # (P, m, m)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2))  # (P,)
    return (each * known).sum() / known.sum().clamp(min=1)
