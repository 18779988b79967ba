"""rcnn.py: parity with a Faster R-CNN of torchvision's own parts, what trains, masks from COCO's
files and back."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import picture
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import roi_align

import augment
import backbones
import data
import ops
import rcnn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(masks=False, norm="bn", backbone_norm="bn"):
    torch.manual_seed(0)
    sizes = ((20, 36, 64), 64, 8, (1000, 300, 1000, 150))
    return rcnn.RCNN("resnet10", 3, *sizes, masks, norm, backbone_norm)


def labelled_boxes(size=64, counts=(2, 0, 1)):
    """Targets of a batch with so many boxes in each image."""
    g = torch.Generator().manual_seed(0)
    M = max(counts)
    low = torch.rand(len(counts), M, 2, generator=g) * size / 2
    side = size * (0.2 + 0.3 * torch.rand(len(counts), M, 2, generator=g))
    labels = torch.randint(0, 3, (len(counts), M), generator=g)
    labels[torch.arange(M) >= torch.tensor(counts)[:, None]] = -1
    return {"boxes": torch.cat([low, low + side], 2), "labels": labels}


def step_losses(net, images, batch):
    targets, count = rcnn.targets(batch, net)
    outputs = net(images, *[targets[name] for name in net.inputs])
    return rcnn.losses(outputs, targets, count.sum().expand(len(images)), net)


# ---- parity with torchvision ---------------------------------------------------------------------


class AlignedCrop(nn.Module):
    def forward(self, features, regions, _):
        return roi_align(features["0"], regions, 14, 1 / 16, 0, aligned=True)


@pytest.fixture(scope="module")
def pair():
    """torchvision's FasterRCNN around its resnet50 with C4 as backbone and res5 + norm as head;
    ours with its weights."""
    torch.manual_seed(0)
    body = torchvision.models.resnet50(weights=None)
    c4 = [body.layer1, body.layer2, body.layer3]
    stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, *c4)
    stem.out_channels = 1024
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    reference = FasterRCNN(
        stem,
        min_size=96,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=30,
        rpn_pre_nms_top_n_test=80,
        rpn_post_nms_top_n_test=20,
        box_head=nn.Sequential(body.layer4, nn.BatchNorm2d(2048), *mean),
        box_predictor=FastRCNNPredictor(2048, 4),
    )
    reference.roi_heads.box_roi_pool = AlignedCrop()
    for m in reference.modules():  # numbers that matter: signals neither vanish nor explode
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 0.6)
            nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    predictor = reference.roi_heads.box_predictor
    for layer, std in (
        (reference.rpn.head.cls_logits, 0.3),
        (reference.rpn.head.bbox_pred, 0.1),
        (predictor.cls_score, 0.2),
        (predictor.bbox_pred, 0.2),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(layer.bias, std=0.1)
    net = rcnn.RCNN("resnet50", 3, (16, 32, 64), 512, 14, (100, 30, 80, 20))
    del body.fc
    net.backbone.load_state_dict(body.state_dict())
    net.rpn.load_state_dict(reference.rpn.state_dict())
    net.norm.load_state_dict(reference.roi_heads.box_head[1].state_dict())
    net.roi.box_predictor.load_state_dict(predictor.state_dict())
    return reference.eval(), net.eval()


@torch.no_grad()
def test_regions_and_detections_equal_torchvisions(pair):
    reference, net = pair
    images = randn(2, 3, 96, 96, seed=1)
    regions = []
    hook = reference.rpn.register_forward_hook(lambda net, args, out: regions.extend(out[0]))
    want = reference(list(images))
    hook.remove()
    out = net(images)
    assert torch.allclose(out["regions"], torch.cat(regions), atol=1e-3)
    assert out["image"].tolist() == [0] * len(regions[0]) + [1] * len(regions[1])
    for got, rows in zip(net.answers(images, torch.full((2, 2), 96), 0.05), want):
        assert len(rows["scores"]) > 5 and len(rows["labels"].unique()) > 1
        assert torch.allclose(got["boxes"], rows["boxes"], atol=1e-2)
        assert torch.allclose(got["scores"], rows["scores"], atol=1e-4)
        assert torch.equal(got["labels"], rows["labels"] - 1)  # class 0 is the background


@torch.no_grad()
def test_the_loss_of_an_image_is_torchvisions_for_it_alone(pair):
    reference, net = pair
    for part in (reference.rpn, reference.roi_heads, net.rpn, net.roi):
        part.training = True  # norms stay in eval mode: images do not see each other
        part.fg_bg_sampler.batch_size_per_image = 10**6  # all are drawn, whatever is drawn
    reference.training = True
    images = randn(3, 3, 96, 96, seed=2)
    batch = labelled_boxes(96)
    got = 3 * step_losses(net, images, batch)
    for i, labels in enumerate(batch["labels"]):
        real = labels >= 0
        truth = {"boxes": batch["boxes"][i][real], "labels": labels[real] + 1}
        want = reference(images[i : i + 1], [truth])
        scores = want["loss_objectness"] + want["loss_classifier"]
        boxes = want["loss_rpn_box_reg"] + want["loss_box_reg"]
        assert got[i, 0].item() == pytest.approx(scores.item(), rel=1e-4)
        assert got[i, 1].item() == pytest.approx(boxes.item(), rel=1e-4, abs=1e-6)
    assert (got[:, 1] > 0).tolist() == [True, False, True]  # the second image has no box


# ---- what trains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)], ids=["boxes", "no boxes"])
def test_a_step_changes_every_parameter_and_its_loss_is_finite(counts):
    net = tiny().train()
    losses = step_losses(net, randn(3, 3, 64, 64), labelled_boxes(64, counts))
    assert losses.shape == (3, 2) and losses.isfinite().all() and (losses[:, 0] > 0).all()
    losses.sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all()
        untaught = not any(counts) and "bbox_pred" in name  # nothing says what a box should be
        assert p.grad.any() or untaught, name


def test_norms_are_those_asked_for_and_the_extra_one_stands_behind_res5():
    for norm, backbone_norm, kind in (
        ("bn", "bn", nn.BatchNorm2d),
        ("gn", "gn", nn.GroupNorm),
        ("bn", "frozen", backbones.FrozenBatchNorm2d),
    ):
        net = tiny(False, norm, backbone_norm).eval()
        assert {type(m) for m in net.backbone.modules() if "Norm" in type(m).__name__} == {kind}
        assert isinstance(net.norm, nn.GroupNorm if norm == "gn" else nn.BatchNorm2d)
        assert all(p.requires_grad for p in net.parameters())
    seen = {}

    def watch(name, module):
        def keep(_, args, out):
            seen[name] = args[0], out

        module.register_forward_hook(keep)

    watch("res5", net.backbone.layer4)
    watch("norm", net.norm)
    watch("score", net.roi.box_predictor)
    out = net(randn(1, 3, 64, 64))
    assert seen["res5"][0].shape == (len(out["regions"]), 128, 8, 8)
    assert seen["res5"][1].shape[1:] == (256, 4, 4)
    assert torch.equal(seen["norm"][0], seen["res5"][1])
    assert torch.equal(seen["score"][0], seen["norm"][1].mean((2, 3)))


def decoded(rles):
    return torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles])).bool()


def test_it_learns_the_boxes_and_masks_of_an_image():
    rng = np.random.default_rng(5)
    image, _, polygons = picture(rng, ["square", "disc"])
    w, h = image.size
    texts, places = ops.pack_outlines([[p.ravel().tolist()] for p in polygons], [(h, w)] * 2)
    canvas = np.zeros((64, 64), np.int32)
    canvas[:h, :w] = ops.draw_outlines(texts, places, [False, False], (h, w))
    target = {
        "boxes": np.array([[*p.min(0), *p.max(0)] for p in polygons], np.float32),
        "labels": np.array([0, 1]),
        "mask": canvas,
        "number": ops.FIRST_OBJECT + np.arange(2),
    }
    batch = ops.collate_outlines([target], (64, 64))
    for name in ("boxes", "labels"):
        batch[name] = torch.from_numpy(target[name])[None]
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pixels[:, :, :h, :w] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    images = backbones.normalise(pixels)
    net = tiny(True, "gn", "gn").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(70):
        optimizer.zero_grad()
        step_losses(net, images, batch).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
    with torch.no_grad():
        answer = net.eval().answers(images, torch.tensor([[h, w]]), 0.5)[0]
    assert answer["labels"].sort().values.tolist() == [0, 1]
    order = answer["labels"].argsort()
    iou = ops.box_iou(answer["boxes"][order], batch["boxes"][0]).diagonal()
    assert (iou > 0.6).all(), iou
    got = decoded(ops.encode_masks(answer["masks"][order], answer["boxes"][order].numpy(), (h, w)))
    want = torch.stack([batch["numbers"][0, :h, :w] == k for k in batch["number"][0]])
    iou = (got & want).sum((1, 2)) / (got | want).sum((1, 2))
    assert (iou > 0.6).all(), iou


@torch.no_grad()
def test_answers_are_clipped_to_the_image_limited_and_have_float32_masks():
    net = tiny(masks=True).eval()
    windows = torch.tensor([[64.0, 20.0], [30.0, 64.0]])
    with torch.autocast("cpu", torch.bfloat16):
        answers = net.answers(randn(2, 3, 64, 64), windows, 0.0, limit=20)
    for answer, (h, w) in zip(answers, windows.tolist()):
        boxes = answer["boxes"]
        assert len(boxes) == 20 and (boxes >= 0).all()
        assert boxes[:, 0::2].max() == w and boxes[:, 1::2].max() == h
        assert set(answer["labels"].tolist()) <= {0, 1, 2}
        assert answer["masks"].shape == (20, 8, 8) and answer["masks"].dtype == torch.float32


# ---- masks ---------------------------------------------------------------------------------------


def outline(seen):
    """A mask (h, w) as COCO's files have it."""
    rle = coco_mask.encode(np.asfortranarray(seen.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_masks_are_drawn_as_by_pycocotools_and_the_smaller_of_two_lies_on_top():
    square = [[2.0, 2, 12, 2, 12, 12, 2, 12]]
    small = np.zeros((20, 30), bool)
    small[4:8, 6:25] = True
    whole = {"size": [20, 30], "counts": [0, 600]}  # not compressed
    rows = [square, None, outline(small), whole, whole, [[]]]
    texts, places = ops.pack_outlines(rows, [(20, 30)] * 6)
    got = ops.draw_outlines(texts, places, [False, False, False, False, True, False], (20, 30))
    want = np.full((20, 30), 256 + 3, np.int32)
    want[coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(square, 20, 30))) > 0] = 256
    want[small] = 258
    assert np.array_equal(got, want) and got.dtype == np.int32 and (want == 256).sum() > 50
    assert [begin == end for begin, end in places] == [False, True, False, False, False, True]
    nothing, places = ops.pack_outlines([], [])
    assert not ops.draw_outlines(nothing, places, [], (20, 30)).any()


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.0, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        {"size": [30, 20], "counts": [0]},
        {"size": []},
        "x",
    ],
)
def test_segmentations_that_cannot_be_drawn_are_refused(segmentation):
    assert not ops.is_outline(segmentation, (20, 30)) and not ops.is_outline([[]], (20, 30))
    with pytest.raises(ValueError, match="neither polygons.*20 high and 30 wide"):
        ops.pack_outlines([segmentation], [(20, 30)])


def test_masks_pasted_into_an_image_and_encoded_are_those_of_their_boxes():
    boxes = np.array([[4.0, 2, 24, 12], [0, 0, 6, 20]], np.float32)
    halves = torch.ones(2, 14, 14)
    halves[0, :, 7:] = 0.1  # seen on the left only
    left, full = decoded(ops.encode_masks(halves, boxes, (20, 30)))
    assert full[1:18, 1:5].all() and not full[:, 8:].any()  # pasted bilinearly: edges are soft
    assert left[3:11, 5:13].all() and not left[:, 16:].any() and not left[14:].any()
    assert ops.encode_masks(torch.zeros(0, 14, 14), np.zeros((0, 4), np.float32), (20, 30)) == []


def test_masks_go_through_augmentation_with_their_boxes(coco_root):
    images = data.coco(coco_root, "train", instances=True)
    whole = 0
    for seed in range(6):
        targets = []
        for slot in range(4):
            rng = np.random.default_rng((seed, slot))
            image, target = images.read(4 * seed + slot)
            _, target = augment.augment(image, target, "s4", 64, rng)
            targets.append(target)
        batch = ops.collate_outlines(targets, (64, 64))
        rows = zip(targets, batch["number"], batch["numbers"])
        for target, number, numbers in rows:
            boxes = torch.from_numpy(target["boxes"])
            number = number[: len(boxes)]
            for (x0, y0, x1, y1), k in zip(boxes[number >= 0], number[number >= 0]):
                y, x = (numbers == k).nonzero(as_tuple=True)
                assert x0 - 2 <= x.min() and x.max() <= x1 + 2
                assert y0 - 2 <= y.min() and y.max() <= y1 + 2
                whole += int(len(x) > 0.6 * (x1 - x0) * (y1 - y0))
    assert whole > 5  # unless it is turned, sheared, or under another


@torch.no_grad()
def test_the_mask_loss_is_torchvisions_and_objects_without_a_mask_cost_nothing():
    regions = torch.tensor([[4.0, 4, 40, 40], [8, 8, 30, 50], [0, 0, 64, 64], [20, 2, 60, 33]])
    labels = torch.tensor([2, 1, 0, 3])
    positive = torch.tensor([0, 1, 3])  # which answer for the objects 0, 1, 2
    outputs = {"labels": labels, "match": torch.tensor([0, 1, 0, 2]), "regions": regions}
    outputs["masks"] = randn(3, 14, 14)
    numbers = torch.zeros(64, 64, dtype=torch.int32)
    numbers[5:35, 6:38] = 256
    numbers[10:48, 9:20] = 257
    numbers[3:30, 22:58] = 258
    truth = torch.stack([numbers == k for k in (256, 257, 258)])
    for number in ((256, 257, 258), (256, -1, 258)):
        number = torch.tensor(number)
        rows = torch.tensor([k for k in range(3) if number[k] >= 0])
        logits = torch.zeros(len(rows), 4, 14, 14)  # torchvision has one for every class
        logits[torch.arange(len(rows)), labels[positive[rows]]] = outputs["masks"][rows]
        boxes = regions[positive[rows]]
        want = maskrcnn_loss(logits, [boxes], [truth], [labels[positive]], [rows])
        got = rcnn.mask_loss(outputs, torch.tensor([True] * 4), number, numbers)
        assert torch.allclose(got, want)
    none = torch.full((3,), -1)
    assert rcnn.mask_loss(outputs, torch.tensor([True] * 4), none, numbers) == 0
    assert rcnn.mask_loss(outputs, torch.tensor([False] * 4), none[:0], numbers) == 0
