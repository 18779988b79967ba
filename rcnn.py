"""Faster and Mask R-CNN on C4 (Ren et al. 2015, He et al. 2017): the detectors to which HPT (Reed
et al., section 4) and MoCo transfer their backbones. st.py trains them like RetinaNet.

    python st.py --recipe tiny-c4                                          the embedded world
    torchrun --nproc_per_node 8 st.py --recipe voc-c4 --root VOC --init FILE ...
    torchrun --nproc_per_node 8 st.py --recipe coco-c4 --root COCO --init FILE ...   with masks

A ResNet up to C4 feeds the region proposals (RPN). Each region's 14x14 crop of C4 goes through the
network's own last stage (res5, halving it), one more batch norm, and a mean, to a class and a box;
without the mean to a mask. Proposals, matching, sampling, losses and decoding are torchvision's.

Facts      [d2] detectron2's defaults, Base-RCNN-C4.yaml, Res5ROIHeads, FastRCNNOutputLayers,
           MaskRCNNConvUpsampleHead; [moco] its detection folder: Res5ROIHeadsExtraNorm,
           Base-RCNN-C4-BN.yaml (all layers train). Read, not recalled.
Differs    from [d2]: images are fitted to a square canvas, as everywhere here, not to a shortest
           edge: with the recipes' sizes one of 4:3 is as large as there, one of 3:2 a tenth
           smaller; the padding is on top. Smooth L1 with torchvision's beta 1/9 instead of L1.
           Regions are clipped to the canvas (boxes to the image, when decoding). No PreciseBN:
           running averages score. No weight decay on biases; images without boxes are trained on.
Per image  an image's loss is what torchvision says of it alone, and a step's their mean over the
           images of the whole step: so it does not depend on how the step is spread, but for which
           anchors and regions are drawn (as with stochastic depth) and what batch norm sees. A
           resumed run draws the same ones.
Masks      are learnt from objects that have one: human labels, as pseudo-labels are boxes only.
Left out   joint training, backbones without a res5 of their own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import anchor_utils, faster_rcnn, roi_heads, rpn
from torchvision.ops import roi_align

import backbones

STRIDE = 16
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors [d2]
# fmt: off
PROPOSALS = dict(  # of the RPN [d2]
    fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5,
    nms_thresh=0.7)
REGIONS = dict(  # of the head [d2]; its box weights are torchvision's (10, 10, 5, 5)
    fg_iou_thresh=0.5, bg_iou_thresh=0.5, positive_fraction=0.25, bbox_reg_weights=None,
    score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)
# fmt: on

# ---- the network ---------------------------------------------------------------------------------


class RCNN(nn.Module):
    """images (B, 3, H, W), and for training boxes (B, M, 4), labels (B, M), -1 where padded -> dict

    anchors (A, 4), objectness (B, A), deltas (B, A, 4)  what the RPN says of every anchor
    regions (R, 4), image (R,)                 of all images, image by image; in training sampled
    logits (R, K + 1), boxes (R, 4 (K + 1))    class 0 is the background: class k is k + 1 here
    labels (R,), targets (R, 4), match (R,)    in training: the truth, and of which box it is
    masks (P, m, m)       in training with masks: logits of the P regions with a class, for that
    feats (B, C, H/16, W/16)                   in use with masks: C4, which decode() needs

    All float32, boxes xyxy in pixels. anchors: sides in pixels; regions: how many are sampled in
    training, at most a quarter of them positive; crop: side of a region's crop; proposals: (before,
    after NMS) in training, (before, after) in use; norm: of the extra one. res5 stays where it is,
    backbone.layer4: so one file fills both.
    """

    inputs = ("boxes", "labels")

    def __init__(
        self,
        backbone,
        classes,
        anchors,
        regions,
        crop,
        proposals,
        masks=False,
        norm="bn",
        backbone_norm="bn",
    ):
        super().__init__()
        self.backbone = backbones.build(backbone, backbone_norm)
        c4 = self.backbone.channels[4]
        c5 = self.backbone.channels[5]
        self.rpn = rpn.RegionProposalNetwork(
            anchor_utils.AnchorGenerator((tuple(anchors),), (RATIOS,)),
            rpn.RPNHead(c4, len(anchors) * len(RATIOS)),
            pre_nms_top_n={"training": proposals[0], "testing": proposals[2]},
            post_nms_top_n={"training": proposals[1], "testing": proposals[3]},
            **PROPOSALS,
        )
        self.crop = crop
        self.norm = backbones.make_norm(norm, c5)
        predictor = faster_rcnn.FastRCNNPredictor(c5, classes + 1)
        # without torchvision's crop and head, which crops() has
        self.roi = roi_heads.RoIHeads(
            None, None, predictor, batch_size_per_image=regions, **REGIONS
        )
        nn.init.normal_(predictor.cls_score.weight, std=0.01)  # [d2]
        nn.init.zeros_(predictor.cls_score.bias)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(predictor.bbox_pred.bias)
        self.masks = mask_head(c5, classes) if masks else None

    def forward(self, images, boxes=None, labels=None):
        feats = self.backbone(images, levels=(2, 3, 4))[4]  # (B, C, H/16, W/16)
        out, regions = self.propose(feats, images)
        if boxes is not None:
            regions, truth = self.sample(regions, boxes, labels)
            out.update(truth)
        numbers = [torch.full((len(r),), i, device=r.device) for i, r in enumerate(regions)]
        out["image"] = torch.cat(numbers)
        out["regions"] = torch.cat(regions)
        x = self.crops(feats, out["image"], out["regions"])  # (R, C5, m, m)
        if self.masks and boxes is not None:
            positive = out["labels"] > 0
            out["masks"] = self.masks_of(x[positive], out["labels"][positive] - 1).float()
        elif self.masks:
            out["feats"] = feats
        logits, deltas = self.roi.box_predictor(x.mean((2, 3)))
        out["logits"] = logits.float()
        out["boxes"] = deltas.float()
        return out

    def propose(self, feats, images):
        """-> {anchors, objectness, deltas}, the regions of each image."""
        B, _, H, W = images.shape
        levels = self.rpn.head([feats])  # of which there is one
        objectness, deltas = rpn.concat_box_prediction_layers(*levels)
        objectness = objectness.float().view(B, -1)  # (B, A)
        deltas = deltas.float().view(B, -1, 4)  # (B, A, 4)
        generator = self.rpn.anchor_generator
        generator.set_cell_anchors(torch.float32, images.device)  # whatever the network runs in
        (anchors,) = generator.grid_anchors([feats.shape[-2:]], [[STRIDE, STRIDE]])  # (A, 4)
        boxes = self.rpn.box_coder.decode(deltas.detach().flatten(0, 1), [anchors] * B)
        boxes = boxes.view(B, -1, 4)  # (B, A, 4)
        regions, _ = self.rpn.filter_proposals(boxes, objectness, [(H, W)] * B, [len(anchors)])
        return {"anchors": anchors, "objectness": objectness, "deltas": deltas}, regions

    def sample(self, regions, boxes, labels):
        """-> the regions that are trained on, of each image; {labels, targets, match} of them."""
        truth = []
        for b, k in zip(boxes, labels):
            truth.append({"boxes": b[k >= 0], "labels": k[k >= 0] + 1})
        regions, match, labels, targets = self.roi.select_training_samples(regions, truth)
        rows = {"labels": labels, "targets": targets, "match": match}
        return regions, {name: torch.cat(value) for name, value in rows.items()}

    def crops(self, feats, image, regions):
        """C4 at the regions (R, 4) of the images (R,), through res5 and its norm -> (R, C5, m, m),
        m = crop / 2."""
        places = torch.cat([image[:, None].to(regions.dtype), regions], 1)  # (R, 5)
        x = roi_align(feats, places, self.crop, 1 / STRIDE, 0, aligned=True)
        return self.norm(self.backbone.layer4(x.contiguous(memory_format=torch.channels_last)))

    def masks_of(self, x, labels):
        """Logits of the masks of crops (R, C5, m, m) for their classes (R,) -> (R, 2m, 2m)."""
        return self.masks(x)[torch.arange(len(x), device=x.device), labels]

    def answers(self, images, windows, floor, limit=100):
        """Boxes that score above `floor`, the best `limit`, as of ops.detect; with masks also
        "masks" (n, m, m), probabilities inside each box. windows (B, 2): height and width of the
        unpadded part."""
        out = self(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.decode(out, windows, floor, limit)

    def decode(self, out, windows, floor, limit=100):
        self.roi.score_thresh = floor
        self.roi.detections_per_img = limit
        counts = torch.bincount(out["image"], minlength=len(windows)).tolist()
        regions = list(out["regions"].split(counts))
        sizes = windows.tolist()
        rows = self.roi.postprocess_detections(out["logits"], out["boxes"], regions, sizes)
        answers = []
        for i, (boxes, scores, labels) in enumerate(zip(*rows)):
            answer = {"boxes": boxes, "scores": scores, "labels": labels - 1}
            if self.masks:
                image = torch.full_like(labels, i)
                x = self.crops(out["feats"].float(), image, boxes)  # whatever precision it came in
                answer["masks"] = self.masks_of(x, answer["labels"]).sigmoid()
            answers.append(answer)
        return answers


def mask_head(channels, classes):  # [d2]
    head = nn.Sequential(
        nn.ConvTranspose2d(channels, 256, 2, 2), nn.ReLU(), nn.Conv2d(256, classes, 1)
    )
    nn.init.kaiming_normal_(head[0].weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head[2].weight, std=0.001)
    nn.init.zeros_(head[0].bias)
    nn.init.zeros_(head[2].bias)
    return head


# ---- losses --------------------------------------------------------------------------------------


def targets(batch, net):
    """Targets {"boxes" (B, M, 4), "labels" (B, M)}, and collate()'s where there are masks; count:
    1 for each image."""
    names = [name for name in ("boxes", "labels", "number", "numbers") if name in batch]
    count = torch.ones(len(batch["labels"]), device=batch["labels"].device)
    return {name: batch[name] for name in names}, count


def losses(outputs, targets, count, net):
    """Class and box loss (B, 2): the RPN's plus the regions', in the second also the masks'."""
    rows = []
    for i, labels in enumerate(targets["labels"]):
        boxes = targets["boxes"][i][labels >= 0]
        of_image = outputs["image"] == i  # (R,)
        terms = anchor_loss(outputs, i, boxes, net.rpn) + region_loss(outputs, of_image)
        if "masks" in outputs:
            number = targets["number"][i][labels >= 0]
            loss = mask_loss(outputs, of_image, number, targets["numbers"][i])
            terms = terms + torch.stack([torch.zeros_like(loss), loss])
        rows.append(terms)
    return torch.stack(rows) / count[:, None]


def anchor_loss(outputs, i, boxes, net):
    """Of image i: is there an object, and where (2,)."""
    anchors = [outputs["anchors"]]
    positive, matched = net.assign_targets_to_anchors(anchors, [{"boxes": boxes}])
    deltas = net.box_coder.encode(matched, anchors)
    terms = net.compute_loss(outputs["objectness"][i], outputs["deltas"][i], positive, deltas)
    return torch.stack(terms)


def region_loss(outputs, of_image):
    """Of an image's regions, those of_image (R,): which class, and where (2,)."""
    labels = [outputs["labels"][of_image]]
    targets = [outputs["targets"][of_image]]
    logits = outputs["logits"][of_image]
    deltas = outputs["boxes"][of_image]
    return torch.stack(roi_heads.fastrcnn_loss(logits, deltas, labels, targets))


def mask_loss(outputs, of_image, number, numbers):
    """Mean cross-entropy over the masks of an image's regions, those of_image (R,); 0 if none has
    one. number (M,), numbers (H, W): of collate()."""
    positive = outputs["labels"] > 0
    logits = outputs["masks"][of_image[positive]]  # (P, m, m)
    regions = outputs["regions"][of_image & positive]
    match = outputs["match"][of_image & positive]  # (P,)
    if not len(match):
        return logits.sum()
    known = (number >= 0)[match]
    seen = numbers == number[:, None, None]  # (M, H, W)
    truth = roi_heads.project_masks_on_boxes(seen, regions, match, logits.shape[-1])
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    return (loss * known).sum() / known.sum().clamp(min=1)
