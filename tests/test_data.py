"""data.py: data sets of four kinds, images of any kind, splits, and batches that do not depend on
who loads them."""

import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_classes, draw_voc
from PIL import Image

import data
from util import Proc, UserError

SIZE = 32
CATEGORIES = [{"id": 90, "name": "blue"}, {"id": 3, "name": "red"}]  # gaps, and not in order


def box(image, category=3, bbox=(2, 3, 10, 8), **more):
    return {"image_id": image, "category_id": category, "bbox": list(bbox), **more}


def write_json(path, files, annotations, categories=CATEGORIES):
    """files: {id: file name} of 40x30 images; annotations are numbered."""
    images = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in files.items()]
    rows = [{"id": k + 1, **a} for k, a in enumerate(annotations)]
    value = {"images": images, "annotations": rows, "categories": categories}
    Path(path).write_text(json.dumps(value))
    return path


def noise(path, seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def refuses(words, call, *args, **kwargs):
    """A call ends in one line for the user that these words are found in -> that line."""
    with pytest.raises(UserError, match=words) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten images, ids 1, 8, 15, ..; image k has k % 3 boxes."""
    root = tmp_path_factory.mktemp("ten")
    files = {7 * k + 1: noise(root / "images" / f"{k}.png", k).name for k in range(10)}
    rows = []
    for k, i in enumerate(files):
        rows += [box(i, (3, 90)[j], (5 * j, 4, 12 + k, 9)) for j in range(k % 3)]
    write_json(root / "train.json", files, rows)
    return data.coco(root, "train")


# ---- COCO ----------------------------------------------------------------------------------------


def test_ids_with_gaps_are_sorted_and_images_without_boxes_stay(tmp_path):
    rows = [box(9, bbox=(1, 1, 9, 9)), box(2), box(9, 90, (3, 3, 7, 7), iscrowd=1)]
    path = write_json(tmp_path / "a.json", {9: "nine.jpg", 2: "two.jpg", 5: "five.jpg"}, rows)
    images = data.read_coco(path, "root")
    assert images.class_ids == [3, 90] and images.class_names == ["red", "blue"]
    assert images.ids.tolist() == [2, 5, 9] and images.path(2) == os.path.join("root", "nine.jpg")
    target = images.target(2)
    assert target["labels"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[1, 1, 10, 10], [3, 3, 10, 10]]
    assert target["crowd"].tolist() == [False, True] and target["scores"].tolist() == [1, 1]
    assert target["image_id"] == 9 and target["size"] == (30, 40)
    empty = images.target(1)
    assert empty["boxes"].shape == (0, 4) and empty["boxes"].dtype == np.float32
    assert empty["labels"].dtype == np.int64 and empty["crowd"].dtype == bool


def test_unusable_boxes_are_dropped_and_counted_and_others_clipped_to_the_image(tmp_path):
    bad = {
        "no area": [box(1, bbox=(5, 5, 0, 4)), box(1, bbox=(5, 5, 4, -2))],
        "outside the image": [box(1, bbox=(41, 5, 4, 4)), box(1, bbox=(-9, 5, 9, 4))],
        "unknown category id": [box(1, 4)],
        "unknown image id": [box(2), box(0), box(10**9)],
        "not four finite numbers": [
            *(box(1, bbox=(1, 2, None, 4)), box(1, bbox=()), {**box(1), "bbox": None})
        ],
    }
    rows = [row for reason in bad.values() for row in reason]
    rows = [box(1, bbox=(-3, -4, 10, 10)), *rows, box(1, 90, (35, 25, 50, 50))]
    images = data.read_coco(write_json(tmp_path / "a.json", {1: "a.jpg"}, rows), tmp_path)
    assert images.dropped == {reason: len(rows) for reason, rows in bad.items()}
    assert images.boxes.tolist() == [[0, 0, 7, 6], [35, 25, 40, 30]]
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_file_names_that_leave_their_folder_are_refused(tmp_path, name):
    path = write_json(tmp_path / "a.json", {1: "fine.jpg", 2: name}, [])
    refuses("leaves its folder", data.read_coco, path, tmp_path)
    refuses("leaves its folder", data.listed, path)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text(name[:-4])
    refuses("leaves its folder", data.voc, tmp_path, "val")


# fmt: off
@pytest.mark.parametrize("change, words", [
    ("not json", "not readable as json"), ("[]", "no list 'images'"),
    ({"images": []}, "lists no image"), ({"images": [{"id": 1}]}, "lacks a field"),
    ({"images": [{"id": "x", "file_name": "a", "height": 4, "width": 4}]}, "wrong kind"),
    ({"categories": []}, "no category"), ({"categories": [{"id": 1}] * 2}, "two of the same id"),
    ({"annotations": {}}, "no list 'annotations'"),
    ({"annotations": [{"image_id": 1}]}, "lacks a field")])
# fmt: on
def test_a_json_that_is_no_annotation_file_is_refused_naming_it(tmp_path, change, words):
    path = write_json(tmp_path / "a.json", {1: "a.jpg"}, [box(1)])
    value = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps({**value, **change}))
    assert "a.json" in refuses(words, data.read_coco, path, tmp_path)
    path.write_text(json.dumps({**value, "images": value["images"] * 2}))
    refuses("image id twice", data.read_coco, path, tmp_path)


def test_files_that_do_not_fit_the_training_or_the_task_are_refused(tmp_path):
    path = write_json(tmp_path / "a.json", {1: "a.jpg"}, [box(1)])
    train = data.read_coco(path, tmp_path)
    refuses("a.json has no segmentation", data.read_coco, path, "", instances=True)
    assert data.read_coco(path, tmp_path, train).class_ids == [3, 90]
    for change in ({"id": 4}, {"name": "green"}):
        other = [CATEGORIES[0], {**CATEGORIES[1], **change}]
        path = write_json(tmp_path / "b.json", {1: "a.jpg"}, [], other)
        assert "a.json" in refuses("b.json has other categories", data.read_coco, path, "", train)


def test_the_official_and_the_simple_layout_are_read_and_others_refused(ten, tmp_path):
    refuses("no data set at .*instances_val2017.json.*or val.json", data.coco, tmp_path, "val")
    shutil.copytree(ten.root, tmp_path / "val2017")
    (tmp_path / "annotations").mkdir()
    shutil.copy(ten.source, tmp_path / "annotations/instances_val2017.json")
    official = data.coco(tmp_path, "val")
    assert official.read(4)[0].tobytes() == ten.read(4)[0].tobytes()
    assert official.digest() == ten.digest()


# ---- Images --------------------------------------------------------------------------------------


def test_a_subset_has_the_targets_of_its_images_in_the_order_asked_for(ten):
    index = [7, 2, 0, 2, 9]
    part = ten.subset(index)
    assert len(part) == 5 and len(part.boxes) == sum(k % 3 for k in index)
    for j, i in enumerate(index):
        assert part.path(j) == ten.path(i)
        for key, value in ten.target(i).items():
            assert np.array_equal(part.target(j)[key], value), key
    assert len(ten.subset([])) == 0 and ten.subset([]).boxes.shape == (0, 4)
    bare = ten.without_labels()
    assert bare.path(8) == ten.path(8) and not len(bare.target(8)["boxes"])


def test_images_hold_nothing_but_flat_arrays_that_grow_with_the_data(coco_root):
    """Objects of Python would be copied into every worker, page by page, as they are touched."""
    images = data.coco(coco_root, "train", instances=True)
    few = images.subset(range(2))
    for field in dataclasses.fields(data.Images):
        value = getattr(images, field.name)
        if isinstance(value, np.ndarray):
            assert not value.dtype.hasobject and len(value) >= len(images), field.name
        elif isinstance(value, list | dict):
            assert len(value) == len(getattr(few, field.name)) < 24, field.name


def test_a_digest_follows_labels_classes_and_masks_but_not_the_place(ten, voc_root, tmp_path):
    assert dataclasses.replace(ten, root="elsewhere").digest() == ten.digest()
    moved = dataclasses.replace(ten, boxes=ten.boxes + np.float32(1e-3))
    renamed = dataclasses.replace(ten, class_names=["blue", "red"])
    digests = {ten.digest(), moved.digest(), renamed.digest(), ten.subset(range(9)).digest()}
    assert len(digests) == 4
    root = shutil.copytree(voc_root, tmp_path / "copy")
    train = data.voc(root, "train")
    assert train.digest() == data.voc(voc_root, "train").digest()
    shutil.copy(train.mask_path(0), train.mask_path(1))
    assert train.digest() != data.voc(voc_root, "train").digest()


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # the colours are right
def test_image_modes_come_out_as_rgb(tmp_path):
    rgb = Image.new("RGB", (40, 30), (200, 60, 20))
    rgb.convert("CMYK").save(tmp_path / "CMYK.jpg", quality=95)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "P.png", transparency=b"\x80" * 4)
    rgb.convert("L").save(tmp_path / "L.png")
    rgb.convert("LA").save(tmp_path / "LA.png")
    grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 20)
    for name, colour in {"CMYK.jpg": (200, 60, 20), "P.png": (200, 60, 20), "L.png": grey}.items():
        assert Image.open(tmp_path / name).mode == name[:-4]
        image = data.read_image(tmp_path / name, (30, 40))
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.asarray(image, int) - colour).max() <= 5, name
    assert data.read_image(tmp_path / "LA.png").getpixel((0, 0)) == (grey,) * 3
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.asarray(data.read_image(tmp_path / "deep.png"))  # 16 bits keep their range
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_exif_rotation_is_applied_unless_the_annotations_are_of_the_unrotated_image(tmp_path):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:10, :10] = 255  # white in the top left corner of what is stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the corner is then top right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for size in (None, (40, 30)):
        image = np.asarray(data.read_image(tmp_path / "turned.jpg", size))
        assert image.shape == (40, 30, 3)
        assert image[4, -4].min() > 200 and image[4, 4].max() < 50
    image = np.asarray(data.read_image(tmp_path / "turned.jpg", (30, 40)))
    assert image.shape == (30, 40, 3) and image[4, 4].min() > 200


# fmt: off
@pytest.mark.parametrize("name, size, words", [
    ("cut.jpg", None, "truncated"), ("zero.jpg", None, "identify"), ("text.jpg", None, "identify"),
    ("none.jpg", None, "No such file"), ("whole.jpg", (30, 41), "is 40x30, .* say 41x30"),
    ("vast.png", None, "bomb")])
# fmt: on
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path, monkeypatch, name, size, words
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow refuses from twice that on
    noise(tmp_path / "vast.png", size=(100, 90))
    whole = noise(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("404 not found")
    with pytest.raises(data.BadImage, match=f"{name}.*{words}"):
        data.read_image(tmp_path / name, size)


def test_an_unusable_image_is_named_once_and_replaced_by_grey_without_labels(
    coco_root, voc_root, class_root, tmp_path, capsys
):
    classes = data.folder(class_root, "train")
    several = dataclasses.replace(classes, image_class=np.eye(24, 3, dtype=np.int64))
    objects = data.coco(coco_root, "train", instances=True)
    # fmt: off
    for images, key, value in (
        (objects, "mask", 0), (data.voc(voc_root, "train"), "mask", 255),
        (classes, "image_class", -1), (several, "image_class", [-1, -1, -1]),
    ):
        # fmt: on
        files = images.files.astype("S40")
        files[3] = b"gone.png"
        source = str(tmp_path / f"{key} {value}")
        images = dataclasses.replace(images, files=files, source=source)
        for _ in range(2):
            image, target = data.read(images, 3)
        assert image.getcolors() == [(32 * 32, (128, 128, 128))] and not target["usable"]
        assert target["image_id"] == images.ids[3] and not len(target["boxes"])
        assert np.all(np.asarray(target[key]) == value) and data.read(images, 2)[1]["usable"]
        (line,) = capsys.readouterr().err.splitlines()
        assert "gone.png" in line


def test_more_than_twenty_and_a_hundredth_of_unusable_images_end_the_run(ten, tmp_path, capsys):
    many = ten.subset(np.arange(30) % 10)
    files = np.array([b"%d.png" % i for i in range(30)])
    gone = dataclasses.replace(many, root=str(tmp_path), files=files, source="many")
    for i in [*range(20), *range(20)]:  # each counts once
        data.read(gone, i)
    refuses("21 of 30 images are unusable, the last .*20.png.*tools.check", data.read, gone, 20)
    data.read(gone.subset([21, 22, 23]), 0)  # of this part, say the labelled one, it is the first
    few = dataclasses.replace(gone.subset([0, 1]), source="few")
    data.read(few, 0)
    refuses("2 of 2 images are unusable", data.read, few, 1)


def test_folder_glob_list_and_json_name_the_same_images(tmp_path):
    names = ["a/0.jpg", "a/1.PNG", "b/deep/2.jpeg", "3.webp"]
    for name in (*names, ".cache/4.png"):
        noise(tmp_path / "pool" / name)
    (tmp_path / "pool/a/notes.txt").write_text("not an image")
    lines = [f"pool/{name}" for name in (*names[::-1], names[0])]
    (tmp_path / "list.txt").write_text("\n\n".join(lines))
    value = json.dumps({"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]})
    for path in ("annotations/image_info_pool.json", "beside/train.json", "pool/here.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(value)
    (tmp_path / "beside/images").symlink_to(tmp_path / "pool")
    jsons = ["pool/here.json", "annotations/image_info_pool.json", "beside/train.json"]
    for source in ("pool", "pool/**/*", "list.txt", *jsons):
        images = data.listed(str(tmp_path / source))
        place = tmp_path / ("beside/images" if "beside" in source else "pool")
        paths = [images.path(i) for i in range(len(images))]
        assert paths == sorted(str(place / name) for name in names), source
    (tmp_path / "empty.txt").write_text("gone.jpg\n")
    (tmp_path / "beside/images").unlink()
    for source in ("beside", "nowhere", "*.jpg", "empty.txt"):
        refuses("no image at --unlabeled", data.listed, str(tmp_path / source))


def test_the_embedded_world_is_drawn_when_its_folder_is_not_there(tmp_path, monkeypatch):
    shapes = pytest.importorskip("tools.shapes")
    built = []
    monkeypatch.setattr(shapes, "build", lambda root, part: built.append(part))
    (tmp_path / "shapes/seg").mkdir(parents=True)
    for root in ("shapes/det", "shapes/seg", "shapes/unknown", "other/det"):
        data.ensure(tmp_path / root)
    assert built == ["det"]


# ---- PASCAL VOC ----------------------------------------------------------------------------------


def test_a_list_names_images_with_a_mask_each(voc_root):
    train = data.voc(voc_root, "train")
    assert len(train) == 24 and train.ids[1] == "train_01"
    assert train.class_names == ["background", "square", "disc"]
    image, target = train.subset([5, 1]).read(1)
    assert target["mask"].shape == target["size"] == image.size[::-1]
    assert set(np.unique(target["mask"])) == {0, 1, 2, 255} and target["image_id"] == "train_01"
    pixels = np.asarray(image)
    for k, grey in ((1, 5), (2, 250)):
        assert (pixels[target["mask"] == k] == grey).all()


def test_lists_without_masks_masks_of_aug_and_vocs_classes_by_default(voc_root, tmp_path):
    assert len(data.voc_images(voc_root, "aug")) == 8  # unlabelled
    refuses("SegmentationClass/aug_00.png does not exist", data.voc, voc_root, "aug")
    root = shutil.copytree(voc_root, tmp_path / "copy")
    (root / "classes.txt").unlink()
    names = data.voc(root, "val").class_names
    assert len(names) == 21 and names[0] == "background" and names[15] == "person"
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert data.voc(root, "train").mask_path(0).endswith("SegmentationClassAug/train_00.png")
    refuses("val_00.png does not exist", data.voc, root, "val")  # SBD's masks are not scored on


# fmt: off
@pytest.mark.parametrize("change, words", [
    (lambda mask: Image.new("P", (30, 20)), "is 64x.*, its annotations say 30x20"),
    (lambda mask: Image.new("L", mask.size, 3), "holds class 3, but there are 3"),
    (lambda mask: mask.convert("RGB"), "is a RGB image"),
    (lambda mask: mask.convert("LA"), "is a LA image"),
    (lambda mask: None, "cannot identify")])
# fmt: on
def test_a_mask_that_cannot_be_used_is_a_bad_image_naming_it(tmp_path, change, words):
    val = data.voc(draw_voc(tmp_path / "copy", 1, 1, 1), "val")
    path = Path(val.mask_path(0))
    mask = change(Image.open(path))
    path.write_bytes(b"no image")
    if mask:
        mask.save(path)
    with pytest.raises(data.BadImage, match=f"val_00.png.*{words}"):
        val.read(0)


LISTS = "ImageSets/Segmentation"


# fmt: off
@pytest.mark.parametrize("change, words", [
    (lambda root: (root / LISTS / "val.txt").unlink(), "no list at .*val.txt"),
    (lambda root: (root / LISTS / "val.txt").write_text("\n"), "val.txt is empty"),
    (lambda root: (root / LISTS / "val.txt").write_text("val_00\nval_09"), "JPEGImages/val_09"),
    (lambda root: (root / LISTS / "val.txt").write_text("val_00.jpg"), "without its suffix"),
    (lambda root: (root / LISTS / "val.txt").write_text("/a.jpg /b.png"), "a name a line"),
    (lambda root: (root / "JPEGImages/val_00.png").unlink(), "JPEGImages/val_00.jpg does not"),
    (lambda root: (root / "classes.txt").write_text("a\nb\na"), "2 to 255 different"),
    (lambda root: (root / "classes.txt").write_text("\n".join(map(str, range(256)))), "2 to 255"),
    (lambda root: (root / "classes.txt").write_text("a\nb\nc"), "other classes than .*train.txt")])
# fmt: on
def test_an_incomplete_voc_folder_is_refused(tmp_path, change, words):
    root = draw_voc(tmp_path / "copy", 1, 2, 1)
    train = data.voc(root, "train")
    assert len(data.voc(root, "val", train)) == 2
    change(root)
    refuses(words, data.voc, root, "val", train)


# ---- class folders -------------------------------------------------------------------------------


def test_classes_are_the_folders_sorted_and_images_carry_theirs(class_root, tmp_path):
    root = shutil.copytree(class_root, tmp_path / "copy")
    (root / "train/square/notes.txt").write_text("no image")
    noise(root / "train/.cache/0.png")
    noise(root / "train/square/._0.png")
    noise(root / "train/square/deeper/1.png")
    train = data.folder(root, "train")
    assert train.class_names == ["both", "disc", "square"]
    assert train.image_class.tolist() == [0] * 8 + [1] * 8 + [2] * 9
    image, target = train.subset([11, 4]).read(1)
    assert target["image_class"] == 0 and target["image_id"] == 4 and not len(target["boxes"])
    assert target["size"] == image.size[::-1]
    assert train.path(24) == str(root / "train/square/deeper/1.png")
    shutil.rmtree(root / "val/disc")
    (root / "val/disc").mkdir()
    assert len(data.folder(root, "val", train)) == 6  # in val, a class may lack images


# fmt: off
@pytest.mark.parametrize("change, words", [
    (lambda root: shutil.rmtree(root / "train"), "no folder .*train; there must be"),
    (lambda root: shutil.rmtree(root / "val"), "no folder .*val; there must be"),
    (lambda root: [shutil.rmtree(root / "train" / k) for k in ("both", "disc")], "1 class folder"),
    (lambda root: (root / "train/disc/0.png").unlink(), "train/disc holds no image"),
    (lambda root: [path.unlink() for path in root.glob("val/*/*")], "val holds no image"),
    (lambda root: shutil.rmtree(root / "val/disc"), "val has other classes .*disc"),
    (lambda root: (root / "val/star").mkdir(), "val has other classes .*train .*star"),
    (lambda root: (root / "val/disc/0.png").rename(root / "val/0.png"), "val/0.png lies outside")])
# fmt: on
def test_incomplete_class_folders_are_refused(tmp_path, change, words):
    root = draw_classes(tmp_path / "copy", 1, 1)
    change(root)
    refuses(words, lambda: data.folder(root, "val", data.folder(root, "train")))


# ---- splits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    root = tmp_path_factory.mktemp("hundred")
    files = {3 * i + 1: f"{i}.jpg" for i in range(100)}
    return data.read_coco(write_json(root / "train.json", files, []), root)


def test_a_split_depends_on_nothing_but_ids_fraction_and_seed(hundred):
    split = data.make_split(hundred, 0.3, 0)
    assert split == data.make_split(hundred.subset(range(100)[::-1]), 0.3, 0)
    assert len(split["labeled"]) == 30
    assert sorted(split["labeled"] + split["rest"]) == hundred.ids.tolist()
    assert split["labeled"] != sorted(split["labeled"])
    assert set(data.make_split(hundred, 0.3, 1)["labeled"]) != set(split["labeled"])


def test_a_smaller_fraction_is_inside_a_larger_one_and_so_is_what_it_holds_out(hundred):
    before = set()
    held_before = set()
    for fraction in (0.02, 0.1, 0.2, 0.5, 1.0):
        split = data.make_split(hundred, fraction, 0)
        labelled = set(split["labeled"])
        held = set(data.apply_split(split, hundred, hold_out=True)[1].ids.tolist())
        assert before < labelled and not labelled & set(split["rest"])
        assert held_before <= held
        before, held_before = labelled, held
    assert before == set(hundred.ids.tolist()) and len(held) == 10


@pytest.mark.parametrize("hold_out, count", [(True, 5), (False, 0)])
def test_holding_out_parts_the_labelled_images_in_a_tenth_and_the_others(hundred, hold_out, count):
    split = data.make_split(hundred, 0.5, 0)
    parts = data.apply_split(split, hundred, hold_out)
    human, held, rest = (part.ids.tolist() for part in parts)
    assert len(held) == count and sorted(human + held) == sorted(split["labeled"])
    assert rest == split["rest"] and len(human) + len(held) == len(rest) == 50
    alone = data.make_split(hundred, 0.001, 0)
    assert len(alone["labeled"]) == 1
    if hold_out:
        refuses("no labelled image is left to train on", data.apply_split, alone, hundred, True)


def test_a_split_of_another_version_of_the_data_is_refused(hundred, class_root, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(data.make_split(hundred, 0.2, 0)))
    assert data.read_split(path, hundred) == data.make_split(hundred, 0.2, 0)
    other = data.read_coco(write_json(tmp_path / "other.json", {1: "a.jpg"}, []), tmp_path)
    refuses("made for another version of .*other.json", data.read_split, path, other)
    root = shutil.copytree(class_root, tmp_path / "copy")  # of a class folder: other file names
    path.write_text(json.dumps(data.make_split(data.folder(root, "train"), 0.2, 0)))
    data.read_split(path, data.folder(class_root, "train"))
    noise(root / "train/disc/more.png")
    refuses("made for another version", data.read_split, path, data.folder(root, "train"))


def test_a_file_that_is_no_split_is_refused(hundred, tmp_path):
    for text in ("{", "[]", '{"labeled": [1]}'):
        (tmp_path / "split.json").write_text(text)
        refuses("is no label split", data.read_split, tmp_path / "split.json", hundred)
    refuses("is no label split", data.read_split, tmp_path / "nowhere.json", hundred)


def test_labelled_images_among_unlabelled_ones_are_known_by_path_link_and_content(ten, tmp_path):
    noise(tmp_path / "fresh.png", seed=999)
    (tmp_path / "link.png").symlink_to(ten.path(0))
    shutil.copy(ten.path(1), tmp_path / "copy.png")
    shutil.copy2(ten.path(2), tmp_path / "near.png")
    content = bytearray(Path(ten.path(2)).read_bytes())
    content[-20] ^= 1  # of the same length and date, but not the same
    (tmp_path / "near.png").write_bytes(content)
    names = ["fresh.png", "near.png", "link.png", "copy.png", "gone.png", ten.path(5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    pool = data.listed(tmp_path / "list.txt")
    for labelled in ([ten], [ten.subset([0, 1]), ten.subset([2, 5])]):
        images, leaks = data.without_leaks(pool, *labelled)
        left = {Path(images.path(i)).name for i in range(len(images))}
        assert left == {"fresh.png", "near.png", "gone.png"} and leaks == 3


# ---- batches -------------------------------------------------------------------------------------


def test_every_pass_over_the_images_is_another_permutation_and_a_pure_function():
    for n in (1, 2, 13):
        positions = np.arange(6 * n)
        index = np.array([data.shuffled_index(p, n, seed=4) for p in positions]).reshape(6, n)
        assert (np.sort(index) == np.arange(n)).all()
        assert n < 13 or len(set(map(tuple, index))) == 6
        for p in positions[::-1]:
            data.shuffled_index(p, n + 1, seed=p)  # pushes it out of the cache
            assert data.shuffled_index(p, n, seed=4) == index.ravel()[p]
    assert [data.shuffled_index(p, 13, seed=5) for p in range(13)] != index[0].tolist()


def batches(parts, steps=range(4), count=4, seed=3, policy="s4", **proc):
    parts = {name: (images, count) for name, images in parts.items()}
    return list(data.batches(parts, steps, policy, SIZE, seed, Proc(**proc)))


def rows(batch):
    """What is in a batch, whatever its order and padding."""
    contents = []
    for i, labels in enumerate(batch["labels"]):
        boxes = batch["boxes"][i][labels >= 0].tolist()
        pixels = batch["images"][i].numpy().tobytes()
        about = (batch["image_id"][i], int(batch["part"][i]), labels[labels >= 0].tolist())
        contents.append((*about, boxes, pixels))
    return sorted(contents)


def same(batch, other):
    equal = [torch.equal(batch[name], other[name]) for name in ("images", "boxes", "labels")]
    return all(equal) and batch["image_id"] == other["image_id"]


@pytest.fixture(scope="module")
def parts(ten):
    return {"human": ten.subset(range(5)), "pseudo": ten.subset(range(5, 10))}


def test_batches_depend_neither_on_workers_nor_on_where_a_run_resumed(parts):
    whole = batches(parts, range(6))
    assert len(whole) == 6 and not same(whole[4], whole[0])
    assert all(map(same, batches(parts, range(6), workers=2), whole))
    assert all(map(same, batches(parts, range(4, 6)), whole[4:]))


def test_two_processes_load_together_what_one_does(parts):
    shares = [batches(parts, rank=rank, world=2) for rank in (0, 1)]
    for whole, first, second in zip(batches(parts), *shares):
        assert first["part"].tolist() == second["part"].tolist() == [0, 0, 1, 1]
        assert sorted(rows(first) + rows(second)) == rows(whole)


def test_pieces_hold_the_same_mixture_and_a_pass_shows_every_image_once(parts):
    (batch,) = batches(parts, range(1))
    for n in (2, 4):
        for k in range(n):
            assert batch["part"][k::n].bincount().tolist() == [4 // n] * 2
    ids = np.array([batch["image_id"] for batch in batches(parts, range(5), count=1)])  # (5, 2)
    assert sorted(ids[:, 0]) == parts["human"].ids.tolist()
    assert sorted(ids[:, 1]) == parts["pseudo"].ids.tolist()


def test_no_two_slots_steps_parts_or_seeds_share_the_randomness_of_augmentation(ten):
    one = ten.subset([4])  # always the same image: any difference is the augmentation's
    pixels = []
    both = batches({"human": one, "pseudo": one}, range(3))
    for batch in both + batches({"human": one}, seed=5):
        pixels += [image.numpy().tobytes() for image in batch["images"]]
    assert len(pixels) == len(set(pixels)) == 24 + 16
    (alone,) = batches({"pseudo": one}, range(1))  # nor does a stream depend on the parts beside it
    assert torch.equal(both[0]["images"][4:], alone["images"]) and not alone["part"].any()


def test_batches_have_their_shapes_with_and_without_boxes(ten):
    full = ten.subset([2, 5])
    empty = ten.subset([0, 3])
    (batch,) = batches({"human": empty}, range(1))
    assert batch["boxes"].shape == (4, 0, 4) and batch["labels"].shape == (4, 0)
    (batch,) = batches({"human": full, "pseudo": empty}, range(1))
    assert batch["images"].shape == (8, 3, SIZE, SIZE) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    M = batch["labels"].shape[1]
    assert batch["boxes"].shape == (8, M, 4) and batch["boxes"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64 and (batch["labels"][:4] >= 0).any()
    assert (batch["labels"][4:] == -1).all() and not batch["boxes"][4:].any()


def test_crowd_regions_are_not_trained_on(tmp_path):
    noise(tmp_path / "a.png")
    rows = [box(1, 3, (0, 0, 40, 30), iscrowd=1), box(1, 90, (0, 0, 40, 30))]
    images = data.read_coco(write_json(tmp_path / "a.json", {1: "a.png"}, rows), tmp_path)
    labels = torch.cat([batch["labels"].flatten() for batch in batches({"human": images})])
    assert set(labels.tolist()) - {-1} == {1}


@pytest.mark.parametrize("policy", ["s1", "s2", "s3", "s4"])
def test_masks_and_classes_follow_their_images_into_batches_under_every_policy(
    voc_root, class_root, policy
):
    train = data.voc(voc_root, "train")
    classified = data.folder(class_root, "train")
    parts = {"human": train, "classified": classified}
    (batch,) = batches(parts, range(1), count=8, policy=policy)
    assert batch["mask"].shape == (16, SIZE, SIZE) and batch["mask"].dtype == torch.uint8
    assert set(batch["mask"][:8].unique().tolist()) == {0, 1, 2, 255}
    assert (batch["mask"][8:] == 255).all()  # of images with a class and no mask
    labels = [int(classified.image_class[i]) for i in batch["image_id"][8:]]
    assert batch["image_class"].tolist() == [-1] * 8 + labels
    if policy == "s1":  # no colours are changed: dark is class 1 and bright class 2
        grey = batch["images"].float().mean(1)
        assert grey[batch["mask"] == 1].median() < 60 and grey[batch["mask"] == 2].median() > 190


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_replace_unusable_images_and_end_in_one_line(ten, tmp_path, workers, capfd):
    files = ten.files.astype("S9")
    files[:2] = b"gone.png"
    broken = dataclasses.replace(ten, files=files, source=f"broken {workers}")
    usable = {}
    for batch in batches({"human": broken}, range(5), workers=workers):
        usable.update(zip(batch["image_id"], batch["usable"].tolist()))
    assert usable == {i: i not in (1, 8) for i in ten.ids.tolist()}
    assert len(capfd.readouterr().err.splitlines()) == max(workers, 1)  # once a process
    nowhere = dataclasses.replace(ten, root=str(tmp_path), source=f"nowhere {workers}")
    steps = range(20)  # until one process has seen all ten
    refuses("10 of 10 images are unusable", batches, {"human": nowhere}, steps, workers=workers)
    # Left to the garbage collector, each worker would take five seconds to end.
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_batches_are_full_and_cover_the_images_in_the_order_asked_for(ten, workers):
    index = [7, 2, 9, 0, *range(10), *range(6)]
    loaded = list(data.eval_batches(ten, index, SIZE, Proc(workers=workers)))
    assert [i for positions, _ in loaded for i in positions] == index
    assert all(len(batch["images"]) == data.EVAL_BATCH == 16 for _, batch in loaded)
    assert loaded[1][1]["image_id"] == [2, 3, 4, 5] + [2] * 12  # filled up by repeating
    batch = loaded[0][1]
    assert batch["original"][0].tolist() == [30, 40] and batch["usable"].all()
    assert float(batch["scale"][0]) == pytest.approx(SIZE / 40)
    assert batch["window"][0].tolist() == [24, 32]
    assert list(data.eval_batches(ten, [], SIZE, Proc())) == []
