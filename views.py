"""What MoCo's and SimCLR's views need after their crop (augment.view), for a batch at once on the device it lies on.

    crop, todo = augment.draw_view(image, size, ..., rng)        # in a loader's worker: numpy and Pillow
    views = finish(crops, todo)                                  # on the device: (..., 3, S, S) uint8, (..., 11)

Nothing is drawn here, `todo` says all: a view is the one that augment.view makes of the same rng, and depends neither on its
batch nor on the number of processes. Every operation gives whole numbers, as Pillow's do, by Pillow's formulas [its C code,
recalled] and roundings, in each image's own order. On CPU, with Pillow 13, brightness, contrast, saturation, grey agree
to the last bit; a turn of hue on all but 1 in 200,000 colours, there to one grey level; a blur to one level in a few pixels,
to four where its weights are simple fractions (a deviation of exactly 1).

An operation runs on those images of the batch that have it, listed on the CPU: no loop over images. A blur is a sum of shifted
copies, not a convolution: the number of blurred images changes from step to step, and cuDNN's search for its fastest algorithm
would begin anew with each.

Milliseconds a view of 64 and 224 px, MoCo v2's settings, on one CPU thread: augment.view 0.36 and 2.79; instead a crop, 0.07 and
0.46, in the loader, and `finish`, 0.27 and 3.69. So a loader has a sixth of the work (besides decoding), and on a CPU nothing is
gained. No GPU has run this.

Imports nothing local: copy this file and augment.py into another project and they work.
"""
import torch
import torch.nn.functional as F


def finish(crops, todo):
    """crops (..., 3, S, S) uint8 on any device, todo (..., 11) on the CPU, see augment.draw_view -> views of the same shape and
    type, each in channels_last."""
    x = crops.reshape(-1, *crops.shape[-3:]).clone(memory_format=torch.contiguous_format)        # (n, 3, S, S): planes
    order, values, grey, deviation, mirrored = todo.reshape(-1, 11).split([4, 4, 1, 1, 1], 1)
    rounds = [(operation, order[:, k] == i, values[:, k]) for k in range(4) for i, operation in enumerate(JITTER)]
    rounds += [(saturation, grey[:, 0] > 0, 0 * grey), (blur, deviation[:, 0] > 0, deviation),
               (mirror, mirrored[:, 0] > 0, mirrored)]
    for operation, chosen, value in rounds:
        rows = chosen.nonzero()[:, 0].to(x.device)
        if len(rows):
            x[rows] = operation(x[rows].float(), value[chosen].view(-1, 1, 1, 1)).to(torch.uint8)
    return x.contiguous(memory_format=torch.channels_last).view(crops.shape)


# ---- the operations: images (n, 3, S, S) float32 of whole numbers, a value each (n, 1, 1, 1) on the CPU, lest anything waits
# for the device -> images within 0..255, of which the whole part is meant

def brightness(x, factor):
    return blend(torch.zeros_like(x), x, factor)


def contrast(x, factor):
    mean = luma(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64)  # the sum is exact: in float32 only up to 256 x 256
    return blend((mean + 0.5).floor().float(), x, factor)


def saturation(x, factor):
    return blend(luma(x), x, factor)


def blend(base, x, factor):
    return (base + factor.to(x.device) * (x - base)).clamp(0, 255)


def luma(x):
    """-> (n, 1, S, S), whole numbers. ITU-R 601 in 65536ths; every sum is below 2^24 and so exact in float32."""
    r, g, b = x.split(1, 1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor()


def hue(x, turn):
    """To HSV in whole numbers, around by turn / 256, and back. float64 where Pillow has double: the fraction is dropped."""
    top = x.amax(1, keepdim=True)                                                                # (n, 1, S, S)
    span = top - x.amin(1, keepdim=True)
    r, g, b = ((top - x) / span.clamp(min=1)).double().split(1, 1)                               # how far below the top, 0..1
    sixths = torch.where(r == 0, b - g, torch.where(g == 0, 2 + r - b, 4 + g - r)).float().double()
    h = (((sixths / 6 + 1).frac().float().double() * 255).floor() + turn.to(x.device)).remainder(256).float() * 6 / 255
    s = (span / top.clamp(min=1) * 255).floor() / 255
    k = (h + torch.tensor([5, 3, 1], device=x.device).view(3, 1, 1)).remainder(6)               # (n, 3, S, S)
    return (top * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1)) + 0.5).floor()


def blur(x, deviation):
    """Pillow's: three boxes on end with the Gaussian's variance, their outermost pixels counting for a part (Gwosdek et al. 2011,
    "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering" [recalled]). No weight is more than 0.04 from that
    of a Gaussian sampled at the pixels; 0.08 at a deviation of 0.3, where samples have lost nine tenths of the variance."""
    variance = deviation ** 2 / 3                                                                # of a box
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    weights = [((whole + part + 1 - j).clamp(0, 1) / (2 * (whole + part) + 1)).to(x.device) for j in range(reach + 1)]
    for axis, pads in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        for _ in range(3):
            size, padded = x.shape[axis], F.pad(x, pads, mode="replicate")
            shifted = lambda j: padded.narrow(axis, reach + j, size)
            x = (sum((w * (shifted(j) + shifted(-j)) for j, w in enumerate(weights[1:], 1)), weights[0] * x) + 0.5).floor()
    return x.clamp(0, 255)


def mirror(x, _):
    return x.flip(3)


JITTER = brightness, contrast, saturation, hue  # numbered as in augment.draw_view
