"""The batched views: each operation against Pillow's, whole views against augment.view's, runs with --device-views."""
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

import augment
import hpt
import views
from conftest import killed
from test_hpt import TINY, backbone, folders

HOW = dict(size=32, crop=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2, blur=(0.1, 2), flip=0.5)


def picture(w=120, h=90, coarse=1):
    """All hues, bright and dark; coarse: the larger, the smoother."""
    small = np.random.default_rng(0).integers(0, 256, (h // coarse, w // coarse, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)


PICTURES = [picture(), picture(coarse=15), Image.new("RGB", (50, 50), (90, 90, 90)), picture(5, 3)]


def tensor(*images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def difference(operation, image, value, reference):
    """Largest over the pixels, and mean."""
    found = operation(tensor(image).float(), torch.tensor(value, dtype=torch.float32).view(1, 1, 1, 1)).to(torch.uint8)
    apart = (found.int() - tensor(reference).int()).abs()
    return apart.max().item(), apart.float().mean().item()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("images") / "colours", {"train": 6, "val": 3, "test": 4})


# ---- operations --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("operation, theirs", [*zip(views.JITTER, augment.ENHANCE)])
def test_brightness_contrast_and_saturation_are_pillows(operation, theirs):
    """To one grey level: a compiler may join a product and a sum into one rounding, and the fraction is dropped."""
    for image in PICTURES:
        for factor in np.float32([0, 0.2, 0.6, 1, 1.4, 1.8, *np.random.default_rng(1).uniform(0.2, 1.8, 10)]).tolist():
            most, mean = difference(operation, image, factor, theirs(image).enhance(factor))
            assert most <= 1 and mean < 0.01, (factor, most, mean)


def test_grey_is_saturation_zero():
    assert difference(views.saturation, PICTURES[0], 0, PICTURES[0].convert("L").convert("RGB")) == (0, 0)


def test_a_turn_of_the_hue_is_pillows():
    """To one grey level: single precision where Pillow has double, on the way back."""
    steps = np.array([0, 1, 2, 50, 85, 86, 127, 128, 170, 200, 254, 255], np.uint8)
    cube = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), 3).reshape(36, 48, 3))
    for image in [cube, *PICTURES]:
        for turn in (-102, -1, 0, 1, 60, 128):
            h, s, v = image.convert("HSV").split()
            theirs = Image.merge("HSV", (h.point([(i + turn) % 256 for i in range(256)]), s, v)).convert("RGB")
            most, mean = difference(views.hue, image, turn, theirs)
            assert most <= 1 and mean < 0.01, (turn, most, mean)


def test_a_blur_is_pillows():
    """Each of six passes rounds. Where weights are simple fractions (deviation 1: 2/3, 1/6; 0.5: 11/12, 1/24) many sums end on
    a half, which is rounded up here and which Pillow, whose weights are 2^24ths, rounds down as often."""
    for image in PICTURES:
        for deviation, limit in [(1.0, 1.2), (0.5, 0.2), *((d, 0.1) for d in (0.1, 0.23, 0.77, 1.31, 1.9, 2.6))]:
            most, mean = difference(views.blur, image, deviation, image.filter(ImageFilter.GaussianBlur(deviation)))
            assert most <= 4 and mean < limit, (deviation, most, mean)


# ---- views -------------------------------------------------------------------------------------------------------

def drawn(image, seeds, how):
    """The same views by Pillow and as a batch, (n, S, S, 3) each."""
    one = [np.asarray(augment.view(image, rng=np.random.default_rng(seed), **how)) for seed in seeds]
    crops, todo = zip(*(augment.draw_view(image, rng=np.random.default_rng(seed), **how) for seed in seeds))
    batch = views.finish(tensor(*crops), torch.from_numpy(np.stack(todo)))
    return np.stack(one), batch.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("less", hpt.VIEWS.values(), ids=hpt.VIEWS)
def test_a_view_is_the_one_that_pillow_makes_of_the_same_numbers(less):
    """Up to the roundings of single operations, which a turn of the hue may carry further in a few pixels."""
    for image in PICTURES[:2]:
        one, batch = drawn(image, [(3, k) for k in range(150)], {**HOW, **dict.fromkeys(less, 0)})
        apart = np.abs(one.astype(int) - batch)
        assert apart.mean() < 0.02 and (apart > 2).mean() < 1e-3 and apart.mean((1, 2, 3)).max() < 0.8
    assert len(np.unique(batch.reshape(150, -1), axis=0)) == 150


def test_views_of_other_numbers_are_distributed_alike():
    """Brightness, contrast, saturation, sharpness, greys and mirror images over 2 x 900 draws a picture: means and deviations
    within four standard errors."""
    left = np.asarray(picture(coarse=15)) * np.linspace(1, 0.2, 120)[:, None]
    for image in (Image.fromarray(left.astype(np.uint8)), PICTURES[0]):
        (one, _), (_, other) = (drawn(image, [(s, k) for k in range(900)], {**HOW, "size": 24}) for s in (1, 2))
        found = []
        for x in (one.astype(float), other.astype(float)):
            grey = x.mean(3)
            found.append(np.stack([x.mean((1, 2, 3)), grey.std((1, 2)), np.ptp(x, 3).mean((1, 2)),
                                   np.abs(np.diff(grey, axis=2)).mean((1, 2)), np.ptp(x, 3).max((1, 2)) == 0,
                                   grey[:, :, :8].mean((1, 2)) < grey[:, :, -8:].mean((1, 2))]))  # (6, n) each
        for a, b in zip(*found):
            away = lambda x: (x - x.mean()) ** 2
            for u, v in ((a, b), (away(a), away(b))):
                assert abs(u.mean() - v.mean()) < 4 * np.sqrt((u.var() + v.var()) / 900)
        assert 0.15 < found[1][4].mean() < 0.25


def test_crops_are_left_as_they_are_and_channels_last():
    crops, mirrored = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8), torch.tensor([-1.0] * 4 + [0] * 6 + [1])
    before = crops.clone()
    found = views.finish(crops, mirrored.expand(2, 4, 11))
    assert torch.equal(found, crops.flip(4)) and torch.equal(crops, before) and found.dtype == torch.uint8
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in found)


# ---- runs --------------------------------------------------------------------------------------------------------

def test_batches_on_the_device_do_not_depend_on_workers_processes_or_the_first_step(images):
    paths, c = hpt.image_paths(str(images), ""), {**hpt.RECIPES["hpt"], "image_size": 32, "batch": 6}

    def batches(start, rank=0, ranks=1, workers=0, views=2, device=torch.device("cpu")):
        return [v for v, _ in hpt.view_loader(paths, start, 6, c, 0, rank, ranks, workers, views, device)]
    whole, pillow = batches(0), batches(0, device=None)
    assert all((a.int() - b.int()).abs().float().mean() < 0.05 for a, b in zip(whole, pillow))
    assert all(map(torch.equal, whole[4:], batches(4, workers=2)))
    assert torch.equal(torch.cat([batches(5, r, 3)[0] for r in range(3)], 1), whole[5])  # three processes see what one does
    assert torch.equal(batches(5, views=1)[0], whole[5][:1])


def test_killed_and_run_again_with_views_on_the_device_it_ends_with_the_same_bits(images, tmp_path):
    args = [*TINY, "--device-views", "--save-every", "2", "--stage", f"{images}:5", "--stage", f"{images}:stats"]
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    hpt.main([*args, "--out", str(tmp_path / "whole")])
    assert killed(tmp_path / "again", ["torch.optim.SGD.step"], 4, *args, "--out", str(tmp_path / "again"), script="hpt")
    hpt.main([*args, "--out", str(tmp_path / "again")])
    for folder in ("1_all_colours", "2_stats_colours"):
        a, b = (backbone(tmp_path / name, folder)["model"] for name in ("whole", "again"))
        assert all(torch.equal(a[k], b[k]) for k in a), folder
    sheet = tmp_path / "whole/1_all_colours/first_batch.png"
    assert sheet.exists() and "device_views" in json.loads(sheet.with_name("stage.json").read_text())["deps"]
