"""data.py: annotation files, splits, unlabelled images, the pseudo-label store, and batches that do not depend on who loads them."""
import dataclasses
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import data
import detect
import world
from util import UserError

ROOT = Path(data.__file__).parent
SIZE = 32
CATEGORIES = [dict(id=90, name="blue"), dict(id=3, name="red")]  # gaps, and not in order


def box(image, category=3, bbox=(2, 3, 10, 8), **more):
    return dict(image_id=image, category_id=category, bbox=list(bbox), **more)


def write_json(path, images, annotations, categories=CATEGORIES):
    """images: {id: file name} of 40x30 images; annotation ids are counted."""
    images = [dict(id=i, file_name=name, width=40, height=30) for i, name in images.items()]
    annotations = [dict(id=k + 1, **a) for k, a in enumerate(annotations)]
    Path(path).write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def noise(path, seed=0, size=(40, 30), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten images, ids 1, 8, 15, ..; image k has k % 3 boxes."""
    root = tmp_path_factory.mktemp("ten")
    ids = range(1, 71, 7)
    for i in ids:
        noise(root / "images" / f"{i}.png", seed=i)
    boxes = [box(i, (3, 90)[j], (5 * j, 4, 12 + k, 9)) for k, i in enumerate(ids) for j in range(k % 3)]
    return data.load_coco(write_json(root / "train.json", {i: f"{i}.png" for i in ids}, boxes), root / "images")


def numbered(root, count, name="unlabelled"):
    """`count` images and their paths as pseudo-label rows want them."""
    return [str(noise(root / name / f"{i}.png", seed=i)) for i in range(count)]


# ---- annotation files --------------------------------------------------------------------------------------------

def test_category_ids_with_gaps_become_contiguous_labels_in_order_of_id(tmp_path):
    path = write_json(tmp_path / "a.json", {5: "b.jpg"}, [box(5, 90), box(5, 3)])
    found = data.load_coco(path, tmp_path)
    assert found.class_ids == [3, 90] and found.class_names == ["red", "blue"]
    assert found.target(0)["labels"].tolist() == [1, 0]


def test_images_are_sorted_by_id_with_their_own_boxes_and_those_without_boxes_stay(tmp_path):
    path = write_json(tmp_path / "a.json", {9: "nine.jpg", 2: "two.jpg", 5: "five.jpg"},
                      [box(9, bbox=(1, 1, 9, 9)), box(2, bbox=(2, 2, 8, 8)), box(9, 90, (3, 3, 7, 7), iscrowd=1)])
    found = data.load_coco(path, "root")
    assert found.ids.tolist() == [2, 5, 9] and found.path(2) == os.path.join("root", "nine.jpg")
    assert [len(found.target(i)["boxes"]) for i in range(3)] == [1, 0, 2]
    target = found.target(2)
    assert target["boxes"].tolist() == [[1, 1, 10, 10], [3, 3, 10, 10]] and target["crowd"].tolist() == [False, True]
    assert target["image_id"] == 9 and target["size"] == (30, 40) and target["scores"].tolist() == [1, 1]
    empty = found.target(1)
    assert empty["boxes"].shape == (0, 4) and empty["boxes"].dtype == np.float32 and empty["labels"].dtype == np.int64


BAD_BOXES = {
    "no area": (box(1, bbox=(5, 5, 0, 4)), box(1, bbox=(5, 5, 4, -2))),
    "outside the image": (box(1, bbox=(41, 5, 4, 4)), box(1, bbox=(-9, 5, 9, 4))),
    "unknown category id": (box(1, 4),),
    "unknown image id": (box(2), box(0), box(10 ** 9)),
    "not four finite numbers": (box(1, bbox=(float("nan"), 1, 2, 3)), box(1, bbox=()), box(1, bbox=(1, 2, None, 4))),
}


def test_unusable_boxes_are_dropped_and_counted_by_reason(tmp_path):
    rows = [box(1)] + [b for some in BAD_BOXES.values() for b in some] + [box(1, 90)]
    found = data.load_coco(write_json(tmp_path / "a.json", {1: "a.jpg"}, rows), tmp_path)
    assert found.dropped == {reason: len(some) for reason, some in BAD_BOXES.items()}
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize("reason", BAD_BOXES)
def test_strict_refuses_what_is_otherwise_dropped(tmp_path, reason):
    path = write_json(tmp_path / "a.json", {1: "a.jpg"}, [box(1), BAD_BOXES[reason][0]])
    with pytest.raises(UserError, match=f"1 boxes with {reason}, first annotation 2"):
        data.load_coco(path, tmp_path, strict=True)


def test_boxes_over_the_border_are_clipped_to_the_image(tmp_path):
    path = write_json(tmp_path / "a.json", {1: "a.jpg"}, [box(1, bbox=(-3, -4, 10, 10)), box(1, bbox=(35, 25, 50, 50))])
    found = data.load_coco(path, tmp_path, strict=True)
    assert found.boxes.tolist() == [[0, 0, 7, 6], [35, 25, 40, 30]]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_file_names_that_leave_the_image_folder_are_refused(tmp_path, name):
    path = write_json(tmp_path / "a.json", {1: "fine.jpg", 2: name}, [])
    with pytest.raises(UserError, match="leaves the image folder"):
        data.load_coco(path, tmp_path)
    with pytest.raises(UserError, match="leaves the image folder"):
        data.list_images(path)


def test_repeated_image_or_category_ids_are_refused(tmp_path):
    content = json.loads(write_json(tmp_path / "a.json", {1: "a.jpg", 2: "b.jpg"}, []).read_text())
    for key in ("images", "categories"):
        twice = {**content, key: [dict(row, id=7) for row in content[key]]}
        (tmp_path / "b.json").write_text(json.dumps(twice))
        with pytest.raises(UserError, match="twice|same id"):
            data.load_coco(tmp_path / "b.json", tmp_path)


WHOLE = dict(images=[dict(id=1, file_name="a.jpg", width=4, height=4)], categories=[dict(id=1)],
             annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 2, 2])])


@pytest.mark.parametrize("broken", [
    {"images": []}, {"images": None}, {"images": [{"id": 1}]}, {"images": [3]}, {"images": [dict(WHOLE["images"][0], id="x")]},
    {"categories": []}, {"categories": [{"name": "red"}]}, {"annotations": {}}, {"annotations": [{"image_id": 1}]}])
def test_jsons_that_are_no_annotation_file_are_refused_naming_the_file(tmp_path, broken):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(WHOLE))
    assert len(data.load_coco(path, tmp_path).boxes) == 1
    path.write_text(json.dumps({**WHOLE, **broken}))
    with pytest.raises(UserError, match="a.json") as error:
        data.load_coco(path, tmp_path)
    assert "\n" not in str(error.value)


def test_another_set_of_categories_than_the_networks_is_refused(tmp_path):
    path = write_json(tmp_path / "a.json", {1: "a.jpg"}, [])
    assert data.load_coco(path, tmp_path, class_ids=[3, 90]).class_ids == [3, 90]
    with pytest.raises(UserError, match=r"other categories .*\[4, 90\]"):
        data.load_coco(path, tmp_path, class_ids=[3, 4])


def test_subset_has_the_targets_of_its_images_in_the_order_asked_for(ten):
    index = [7, 2, 0, 2, 9]
    part = ten.subset(index)
    assert len(part) == 5 and len(part.boxes) == sum(len(ten.target(i)["boxes"]) for i in index)
    for j, i in enumerate(index):
        assert part.path(j) == ten.path(i)
        for key, value in ten.target(i).items():
            assert np.array_equal(part.target(j)[key], value), key
    assert len(ten.subset([])) == 0 and ten.subset([]).boxes.shape == (0, 4)


def test_detections_hold_nothing_but_flat_arrays_that_grow_with_the_data(tmp_path):
    """Python objects per image or box would be copied into every worker, page by page, as they are touched."""
    few, many = (data.load_coco(write_json(tmp_path / f"{n}.json", {i: f"{i}.jpg" for i in range(n)},
                                           [box(i) for i in range(n) for _ in range(2)]), tmp_path) for n in (3, 300))
    for field in dataclasses.fields(data.Detections):
        value = getattr(many, field.name)
        if isinstance(value, np.ndarray):
            assert not value.dtype.hasobject and len(value) >= 300, field.name
        elif isinstance(value, (list, dict)):
            assert len(value) == len(getattr(few, field.name)), field.name
        else:
            assert isinstance(value, str) or field.name in ("texts", "places"), field.name  # of masks, flat too where there are any


# ---- images ------------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's advice; the colours are right
def test_image_modes_come_out_as_rgb(tmp_path):
    rgb = Image.new("RGB", (40, 30), (200, 60, 20))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    rgb.convert("L").save(tmp_path / "grey.png")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=b"\x80" * 4)
    rgb.convert("LA").save(tmp_path / "grey_alpha.png")
    grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 20)
    for name, mode, colour in (("cmyk.jpg", "CMYK", (200, 60, 20)), ("grey.png", "L", (grey,) * 3),
                               ("palette.png", "P", (200, 60, 20)), ("grey_alpha.png", "LA", (grey,) * 3)):
        assert Image.open(tmp_path / name).mode == mode
        image = data.read_image(tmp_path / name, (30, 40))
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.asarray(image, int) - colour).max() <= 5, name


def test_sixteen_bit_images_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    seen = np.asarray(data.read_image(tmp_path / "deep.png"))
    assert np.abs(seen[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_exif_rotation_is_applied_unless_the_annotations_are_of_the_unrotated_image(tmp_path):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:10, :10] = 255  # white in the top left corner of what is stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the corner is then top right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for size in (None, (40, 30)):
        image = np.asarray(data.read_image(tmp_path / "turned.jpg", size))
        assert image.shape == (40, 30, 3) and image[4, -4].min() > 200 and image[4, 4].max() < 50
    image = np.asarray(data.read_image(tmp_path / "turned.jpg", (30, 40)))
    assert image.shape == (30, 40, 3) and image[4, 4].min() > 200


def test_unusable_files_are_named_with_the_reason(tmp_path, monkeypatch):
    noise(tmp_path / "whole.jpg")
    raw = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(raw[:len(raw) // 2])
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("404 not found")
    assert data.read_image(tmp_path / "whole.jpg", (30, 40)).size == (40, 30)
    for name, size, reason in (("cut.jpg", None, "truncated"), ("zero.jpg", None, "identify"), ("text.png", None, "identify"),
                               ("none.jpg", None, "No such file"), ("whole.jpg", (30, 41), "is 40x30, .* say 41x30")):
        with pytest.raises(data.BadImage, match=f"{name}.*{reason}"):
            data.read_image(tmp_path / name, size)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2 - 1)  # Pillow refuses from twice that on
    with pytest.raises(data.BadImage, match="whole.jpg.*bomb"):
        data.read_image(tmp_path / "whole.jpg")


def test_folder_class_folders_glob_list_and_json_name_the_same_images(tmp_path):
    names = ["a/0.jpg", "a/1.PNG", "b/deep/2.jpeg", "3.webp"]
    expected = [os.fsencode(str(p)) for p in sorted(noise(tmp_path / "pool" / n, i) for i, n in enumerate(names))]
    (tmp_path / "pool" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "list.txt").write_text("\n".join(f"pool/{n}" for n in names[::-1]) + "\n\n" + "pool/3.webp\n")
    listed = [dict(id=i, file_name=n) for i, n in enumerate(names)]
    (tmp_path / "rooted.json").write_text(json.dumps(dict(info=dict(root=str(tmp_path / "pool")), images=listed)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "image_info_pool.json").write_text(json.dumps(dict(info=None, images=listed)))
    for source in ("pool", "pool/**/*", "list.txt", "rooted.json", "annotations/image_info_pool.json"):
        found = data.list_images(str(tmp_path / source))
        assert found.dtype.kind == "S" and found.tolist() == expected, source
    assert data.list_images(str(tmp_path / "pool/a/*.jpg")).tolist() == [p for p in expected if p.endswith(b"a/0.jpg")]


def test_an_unlabelled_source_without_any_image_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    (tmp_path / "a.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="gone.jpg")])))
    for source in ("empty", "nowhere", "*.jpg", "list.txt", "a.json"):
        with pytest.raises(UserError, match="no image found"):
            data.list_images(str(tmp_path / source))


def test_labelled_images_are_found_among_unlabelled_by_path_link_and_content(ten, tmp_path):
    fresh = noise(tmp_path / "fresh.png", seed=999)
    (tmp_path / "link.png").symlink_to(ten.path(0))
    (tmp_path / "copy.png").write_bytes(Path(ten.path(1)).read_bytes())
    near = bytearray(Path(ten.path(2)).read_bytes())
    near[-20] ^= 1  # of the same length and date, but not the same
    (tmp_path / "near.png").write_bytes(near)
    os.utime(tmp_path / "near.png", ns=(Path(ten.path(2)).stat().st_mtime_ns,) * 2)
    wanted = [str(fresh), str(tmp_path / "near.png")]
    leaks = [ten.path(5), str(tmp_path / "link.png"), str(tmp_path / "copy.png")]
    paths = np.array([os.fsencode(p) for p in leaks + wanted])
    for labelled in ([ten], [ten.subset([0, 1]), ten.subset([2, 5])]):
        kept, left_out = data.without_leaks(paths, *labelled)
        assert [os.fsdecode(p) for p in kept] == wanted and left_out == 3


# ---- label splits ------------------------------------------------------------------------------------------------

def split_of(ten, fraction, seed=0):
    return data.make_split(ten.annotation_file, ten.ids, fraction, seed)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    root = tmp_path_factory.mktemp("hundred")
    path = write_json(root / "train.json", {3 * i + 1: f"{i}.jpg" for i in range(100)}, [])
    return data.load_coco(path, root)


def test_a_split_depends_on_nothing_but_ids_fraction_and_seed(hundred):
    a, b = split_of(hundred, 0.3), data.make_split(hundred.annotation_file, hundred.ids[::-1], 0.3, 0)
    assert a == b and len(a["labeled"]) == 30
    assert sorted(a["labeled"] + a["rest"]) == hundred.ids.tolist()
    assert set(split_of(hundred, 0.3, seed=1)["labeled"]) != set(a["labeled"])
    assert a["labeled"] != sorted(a["labeled"])


def test_a_smaller_fraction_is_inside_a_larger_one_and_so_is_what_it_holds_out(hundred):
    before, held_before = set(), set()
    for fraction in (0.01, 0.1, 0.2, 0.5, 1.0):
        split = split_of(hundred, fraction)
        labelled = set(split["labeled"])
        assert before < labelled and not labelled & set(split["rest"])
        before = labelled
        if fraction > 0.01:
            held = set(data.apply_split(split, hundred, hold_out=True)[1].ids.tolist())
            assert held_before < held
            held_before = held
    assert before == set(hundred.ids.tolist())


def test_holding_out_parts_the_labelled_images_in_a_tenth_and_the_others(hundred):
    split = split_of(hundred, 0.5)
    human, held, rest = (part.ids.tolist() for part in data.apply_split(split, hundred, hold_out=True))
    assert len(held) == 5 and sorted(human + held) == sorted(split["labeled"]) and rest == split["rest"]
    human, held, rest = (part.ids.tolist() for part in data.apply_split(split, hundred, hold_out=False))
    assert human == split["labeled"] and held == [] and rest == split["rest"]


def test_a_single_labelled_image_cannot_be_held_out(hundred):
    split = split_of(hundred, 0.01)
    assert len(data.apply_split(split, hundred, hold_out=False)[0]) == 1
    with pytest.raises(UserError, match="none is left to train on"):
        data.apply_split(split, hundred, hold_out=True)


def test_a_split_of_another_annotation_file_is_refused(hundred, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(split_of(hundred, 0.2)))
    assert data.read_split(tmp_path / "split.json", hundred.annotation_file) == split_of(hundred, 0.2)
    other = write_json(tmp_path / "other.json", {1: "a.jpg"}, [])
    with pytest.raises(UserError, match="another version"):
        data.read_split(tmp_path / "split.json", other)
    with pytest.raises(UserError, match="does not have"):
        data.apply_split(dict(split_of(hundred, 0.2), rest=[2]), hundred, hold_out=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"labeled": [1]}', None])
def test_a_file_that_is_no_split_is_refused(hundred, tmp_path, text):
    if text is not None:
        (tmp_path / "split.json").write_text(text)
    with pytest.raises(UserError, match="is not a label split"):
        data.read_split(tmp_path / "split.json", hundred.annotation_file)


# ---- batches -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 13])
def test_every_pass_over_the_images_is_another_permutation(n):
    passes = [[data.shuffled_index(n * epoch + k, n, seed=4) for k in range(n)] for epoch in range(6)]
    assert all(sorted(p) == list(range(n)) for p in passes)
    assert n < 3 or len(set(map(tuple, passes))) == 6


def test_which_image_stands_where_is_a_pure_function():
    positions = [5, 40, 0, 399, 5, 123]
    first = [data.shuffled_index(p, 13, seed=1) for p in positions]
    for other in range(9):  # push it out of the cache
        data.shuffled_index(other, 20 + other, seed=other)
    assert [data.shuffled_index(p, 13, seed=1) for p in positions] == first
    assert [data.shuffled_index(p, 13, seed=2) for p in range(13)] != [data.shuffled_index(p, 13, seed=1) for p in range(13)]


def batches(parts, start=0, stop=4, chunks=1, rank=0, ranks=1, workers=0, seed=3, counts=None):
    counts = counts or [4] * len(parts)
    return list(data.train_loader(parts, counts, start, stop, chunks, rank, ranks, "s4", SIZE, seed, workers))


def rows(batch):
    """What is in a batch, whatever its order and padding: image, part, pixels, boxes and labels of each row."""
    return sorted((int(batch["image_id"][i]), int(batch["part"][i]), batch["images"][i].numpy().tobytes(),
                   batch["boxes"][i][batch["labels"][i] >= 0].tolist(), batch["labels"][i][batch["labels"][i] >= 0].tolist())
                  for i in range(len(batch["images"])))


def same(a, b):
    return all((a[k] == b[k]).all() and a[k].shape == b[k].shape for k in ("images", "boxes", "labels", "part", "image_id"))


@pytest.fixture(scope="module")
def parts(ten):
    return [ten.subset(range(5)), ten.subset(range(5, 10))]


def test_batches_do_not_depend_on_the_number_of_workers(parts):
    alone, helped = batches(parts), batches(parts, workers=2)
    assert len(alone) == len(helped) == 4 and all(map(same, alone, helped))
    assert not same(alone[0], alone[1])


def test_a_resumed_loader_gives_what_the_uninterrupted_one_would(parts):
    whole = batches(parts, 0, 6)
    assert all(map(same, batches(parts, 4, 6), whole[4:])) and not same(whole[4], whole[0])


def test_two_processes_load_together_what_one_does(parts):
    alone, first, second = batches(parts), batches(parts, rank=0, ranks=2), batches(parts, rank=1, ranks=2)
    for whole, a, b in zip(alone, first, second):
        assert len(a["images"]) == len(b["images"]) == 4
        assert sorted(rows(a) + rows(b)) == rows(whole)


def test_chunks_only_reorder_a_batch_and_each_holds_the_same_mixture(parts):
    for whole, cut in zip(batches(parts), batches(parts, chunks=2)):
        assert rows(whole) == rows(cut) and whole["part"].tolist() == [0] * 4 + [1] * 4
        assert cut["part"].tolist() == [0, 0, 1, 1] * 2


def test_a_pass_of_training_shows_every_image_once_per_part(parts):
    ids = np.stack([b["image_id"].numpy() for b in batches(parts, 0, 5, counts=[1, 1])])
    assert sorted(ids[:, 0]) == parts[0].ids.tolist() and sorted(ids[:, 1]) == parts[1].ids.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_no_two_slots_steps_or_parts_share_the_randomness_of_augmentation(ten, workers):
    one = ten.subset([4])  # always the same image, so that any difference is the augmentation's
    seen = [image.numpy().tobytes() for b in batches([one, one], 0, 3, workers=workers) for image in b["images"]]
    assert len(seen) == len(set(seen)) == 24
    again = [image.numpy().tobytes() for b in batches([one, one], 0, 1, seed=5) for image in b["images"]]
    assert not set(seen) & set(again)


def test_batches_have_their_shapes_also_without_any_box(ten):
    full, empty = ten.subset([2, 5]), ten.subset([0, 3])
    for images, some in ((full, True), (empty, False)):
        batch, = batches([images], 0, 1)
        B, M = batch["labels"].shape
        assert B == 4 and (M > 0) == some
        assert batch["images"].shape == (4, 3, SIZE, SIZE) and batch["images"].is_contiguous(memory_format=data.torch.channels_last)
        assert batch["boxes"].shape == (4, M, 4) and batch["boxes"].dtype == data.torch.float32
        assert batch["labels"].dtype == data.torch.int64
    batch, = batches([full, empty], 0, 1)
    assert (batch["labels"][4:] == -1).all() and (batch["boxes"][4:] == 0).all() and (batch["labels"][:4] >= 0).any()


def test_crowd_regions_are_not_trained_on(tmp_path):
    noise(tmp_path / "a.png")
    path = write_json(tmp_path / "a.json", {1: "a.png"}, [box(1, 3, (0, 0, 40, 30), iscrowd=1), box(1, 90, (0, 0, 40, 30))])
    labels = np.concatenate([b["labels"].flatten() for b in batches([data.load_coco(path, tmp_path)])])
    assert set(labels.tolist()) <= {1, -1} and 1 in labels


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_image_is_replaced_and_named_and_nothing_but_such_is_one_clear_line(ten, tmp_path, workers):
    good = ten.subset([1, 2, 4])
    broken = dataclasses.replace(good, files=np.array([b"gone.png", *good.files[1:]]))
    found = batches([broken], 0, 3, workers=workers)
    texts = {text for b in found for _, text in b["bad"]}
    assert len(texts) == 1 and "gone.png" in texts.pop()
    assert {int(i) for b in found for i in b["image_id"]} == set(good.ids[1:].tolist())
    with pytest.raises(UserError, match="20 images in a row are unusable.*nowhere") as error:
        batches([dataclasses.replace(good, root=str(tmp_path / "nowhere"))], 0, 1, workers=workers)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # left to the garbage collector, each worker takes five seconds to end


@pytest.mark.parametrize("count, batch", [(3, 2), (4, 2), (1, 4)])
def test_evaluation_batches_are_all_of_one_size_and_cover_each_image_in_order(ten, count, batch):
    found = list(data.eval_loader(ten, list(range(count)), SIZE, batch, 0))
    assert all(len(b["images"]) == batch for b in found)
    assert np.concatenate([b["image_id"].numpy() for b in found])[:count].tolist() == list(range(count))
    assert found[0]["original"][0].tolist() == [30, 40] and float(found[0]["scale"][0]) == pytest.approx(SIZE / 40)


# ---- pseudo-labels -----------------------------------------------------------------------------------------------

def row_of(i, files):
    """What st.py writes for image i: a bad image, an image without boxes, or boxes of scores 0.3, 0.5, 0.7."""
    rng = random.Random(i)
    if i % 7 == 3:
        return {"i": i, "file": files[i], "bad": "broken"}
    n = 0 if i % 7 == 5 else 3
    return {"i": i, "file": files[i], "size": [30, 40], "boxes": [[rng.randint(0, 9), 2.5, 20, 10] for _ in range(n)],
            "labels": [j % 2 for j in range(n)], "scores": [0.3, 0.5, 0.7][:n]}


def write_parts(folder, files, ranks):
    folder.mkdir(parents=True)
    for rank in range(ranks):
        with open(folder / f"part_{rank}_of_{ranks}.jsonl", "w") as f:
            f.writelines(json.dumps(row_of(i, files)) + "\n" for i in range(rank, len(files), ranks))
    return folder


def merge(folder, threshold=0.5):
    stats = detect.merge(folder, folder / "pseudo.json", threshold, [3, 90], ["red", "blue"], {"teacher": "t"})
    return stats, json.loads((folder / "pseudo.json").read_text())


@pytest.mark.parametrize("threshold, kept", [(0.0, 3), (0.5, 2), (0.51, 1), (0.7, 1), (0.71, 0)])
def test_merging_keeps_exactly_the_boxes_from_the_threshold_on(tmp_path, threshold, kept):
    files = numbered(tmp_path, 14)
    stats, found = merge(write_parts(tmp_path / "pseudo", files, 1), threshold)
    assert all(a["score"] >= threshold for a in found["annotations"])
    assert len(found["annotations"]) == stats["boxes"] == 10 * kept == sum(stats["per_class"].values())
    assert stats["images"] == 14 and stats["bad"] == 2 and found["info"]["threshold"] == threshold


def test_images_that_keep_no_box_or_are_unusable_stay_out_of_the_merged_file(tmp_path):
    files = numbered(tmp_path, 14)
    stats, found = merge(write_parts(tmp_path / "pseudo", files, 1))
    expected = [i for i in range(14) if i % 7 not in (3, 5)]
    assert [os.path.join(found["info"]["root"], im["file_name"]) for im in found["images"]] == [files[i] for i in expected]
    assert {a["image_id"] for a in found["annotations"]} == {im["id"] for im in found["images"]}
    assert stats["with_boxes"] == len(expected)


def test_one_process_and_two_merge_into_the_same_file(tmp_path):
    files = numbered(tmp_path, 15)
    folders = [write_parts(tmp_path / f"by{ranks}", files, ranks) for ranks in (1, 2)]
    stats = [merge(folder)[0] for folder in folders]
    assert stats[0] == stats[1]
    assert (folders[0] / "pseudo.json").read_bytes() == (folders[1] / "pseudo.json").read_bytes()


def test_the_merged_file_is_coco_with_the_original_category_ids_and_loads_back(tmp_path, capsys):
    files = numbered(tmp_path, 9)
    stats, _ = merge(write_parts(tmp_path / "pseudo", files, 1))
    coco = COCO(str(tmp_path / "pseudo" / "pseudo.json"))
    first = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [(a["category_id"], a["score"], a["bbox"][1:]) for a in first] == [(90, 0.5, [2.5, 20, 10]), (3, 0.7, [2.5, 20, 10])]
    found = data.load_coco(tmp_path / "pseudo" / "pseudo.json", stats["root"], [3, 90], strict=True)
    assert len(found.boxes) == stats["boxes"] and found.target(0)["scores"].tolist() == pytest.approx([0.5, 0.7])
    assert data.read_image(found.path(0), found.target(0)["size"]).size == (40, 30)


def test_a_line_cut_off_by_a_kill_is_removed_and_its_image_done_again(tmp_path):
    files = numbered(tmp_path, 6)
    folder = write_parts(tmp_path / "pseudo", files, 2)
    part = folder / "part_1_of_2.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    assert data.finished_images(folder, 6).tolist() == [True] * 5 + [False]
    assert part.read_bytes() == whole[:whole[:-1].rindex(b"\n") + 1]
    with open(part, "a") as f:
        f.write(json.dumps(row_of(5, files)) + "\n")
    assert data.finished_images(folder, 6).all() and part.read_bytes() == whole
    assert data.finished_images(tmp_path / "nothing", 3).tolist() == [False] * 3


def test_memory_of_merging_does_not_grow_with_the_number_of_images(tmp_path):
    def peak(n):
        folder = write_parts(tmp_path / str(n), [f"/pool/{i:08d}.jpg" for i in range(n)], 2)
        tracemalloc.start()
        try:
            detect.merge(folder, folder / "pseudo.json", 0.5, [3, 90], ["red", "blue"], {})
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    peak(50)  # whatever is imported or cached at the first call
    few, many = peak(500), peak(5000)
    assert many < 1.5 * few


# ---- command line ------------------------------------------------------------------------------------------------

def command(*args):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True, text=True)


def test_check_counts_what_is_wrong_and_fails(ten, tmp_path):
    for name in ("a.png", "b.png"):
        noise(tmp_path / "images" / name)
    path = write_json(tmp_path / "a.json", {1: "a.png", 2: "b.png", 3: "gone.png"},
                      [box(1), box(2, 90), box(1, bbox=(5, 5, 0, 4)), box(1, 4)])
    done = command("check", path)
    assert done.returncode == 2 and done.stderr.splitlines() == [f"error: 3 problems in {path}; training drops what is listed above"]
    for text in ("3 images (1 without objects), 2 boxes", "red 1, blue 1", "1 x no area", "1 x unknown category id",
                 "1 x unusable image", "gone.png"):
        assert text in done.stdout
    assert data.check(ten.annotation_file) == 0
    with pytest.raises(UserError, match="boxes with"):
        data.check(path, strict=True)
    with pytest.raises(UserError, match="no annotation file"):
        data.check(tmp_path / "nowhere" / "a.json")


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def test_split_command_writes_what_a_run_reads(ten, tmp_path, monkeypatch):
    out = tmp_path / "split.json"
    main(monkeypatch, "split", ten.annotation_file, "--fraction", 0.4, "--seed", 7, "--out", out)
    assert data.read_split(out, ten.annotation_file) == split_of(ten, 0.4, seed=7)
    for fraction in (0, 1.5, "nan"):
        with pytest.raises(UserError, match="not a fraction"):
            main(monkeypatch, "split", ten.annotation_file, "--fraction", fraction, "--out", out)


def test_export_writes_files_the_loaders_read(tmp_path, monkeypatch):
    for part, sizes in (("det", (4, 2)), ("single", (12, 12, 12)), ("unlabeled", (3,))):
        spec = world.PARTS[part]
        small = {name: (stream, n) for (name, (stream, _)), n in zip(spec["splits"].items(), sizes)}
        monkeypatch.setitem(world.PARTS, part, {**spec, "splits": small})
    main(monkeypatch, "export", tmp_path)
    train_json, train_dir, val_json, val_dir = data.coco_layout(tmp_path / "det")
    assert len(data.load_coco(train_json, train_dir, strict=True)) == 4 and data.check(val_json, val_dir) == 0
    assert len(data.list_images(tmp_path / "single" / "train")) == 12 and len(data.list_images(tmp_path / "unlabeled")) == 3


def test_official_and_simple_layouts_are_found_and_others_refused(tmp_path):
    with pytest.raises(UserError, match="no dataset at"):
        data.coco_layout(tmp_path)
    (tmp_path / "train.json").touch()
    assert data.coco_layout(tmp_path) == (tmp_path / "train.json", tmp_path / "images", tmp_path / "val.json", tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").touch()
    assert data.coco_layout(tmp_path)[1::2] == (tmp_path / "train2017", tmp_path / "val2017")
