"""world.py: the drawn data is deterministic, its boxes fit what is visible, and a half-built part is never taken for a whole one."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import world

SMALL = {"train": 30, "val": 12}


def everything(*args, **kwargs):
    image, boxes, labels, mask = world.draw(*args, **kwargs)
    return np.asarray(image), boxes, labels, mask


@pytest.fixture(scope="module")
def det(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"), "det", SMALL)


@pytest.mark.parametrize("part", list(world.PARTS))
def test_same_seed_split_index_same_image(part):
    for a, b in zip(everything(7, "train", 3, part), everything(7, "train", 3, part)):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("other", [(8, "train", 3), (7, "val", 3), (7, "train", 4)])
def test_other_seed_split_or_index_other_image_and_scene(other):
    here, there = everything(7, "train", 3), everything(*other)
    assert not np.array_equal(here[0], there[0])
    assert not np.array_equal(here[3], there[3])


def test_the_same_index_of_two_parts_is_not_the_same_scene():
    masks = [everything(7, "train", 3, part)[3] for part in ("det", "unlabeled")]
    assert not np.array_equal(*masks)


def test_drawing_leaves_the_global_generator_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    world.draw(7, "train", 0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_types_and_shapes_are_the_promised_ones():
    image, boxes, labels, mask = world.draw(7, "train", 0)
    assert image.mode == "RGB" and image.size == (128, 128)
    assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4)
    assert labels.dtype == np.int64 and mask.dtype == np.uint8 and mask.shape == (128, 128)


def test_box_of_a_single_object_is_tight_around_its_mask():
    for index in range(36):
        _, boxes, labels, mask = world.draw(7, "val", index, "single")
        ys, xs = np.nonzero(mask == labels[0] + 1)
        assert boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
        assert set(np.unique(mask)) <= {0, labels[0] + 1}


def test_boxes_of_many_objects_cover_the_mask_and_touch_it_on_all_sides():
    for index in range(60):
        _, boxes, labels, mask = world.draw(7, "train", index)
        covered = np.zeros_like(mask)
        for (x0, y0, x1, y1), k in zip(boxes.astype(int), labels):
            assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
            assert min(x1 - x0, y1 - y0) >= world.SMALLEST
            inside = mask[y0:y1, x0:x1] == k + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            covered[y0:y1, x0:x1] = 1
        assert not mask[covered == 0].any()
        assert set(np.unique(mask)) - {0} == set((labels + 1).tolist())


def test_the_mask_is_where_the_picture_changes():
    """The same scene painted with and without its object: pixels change on the mask, and far from it they do not."""
    on, off = [], []
    for index in range(40):
        items, owner = world.scene(np.random.default_rng((7, 3, index)), "single", index)
        mask = owner > 0
        ys, xs = np.nonzero(mask)
        far = np.ones_like(mask)
        far[max(ys.min() - 6, 0):ys.max() + 7, max(xs.min() - 6, 0):xs.max() + 7] = False   # room for shadow and blur
        gone = [dict(item, cover=item["cover"] * (item["label"] < 0)) for item in items]
        with_it, without = (np.asarray(world.paint(np.random.default_rng(index), "single", i), int) for i in (items, gone))
        change = np.abs(with_it - without).max(-1)
        on.append((change[mask] > 8).mean())
        off.append((change[far] > 8).mean())
    assert np.median(on) > .95 and np.median(off) == 0   # medians: now and then the two random streams fall out of step


def test_every_part_shows_every_class_it_should_and_no_other():
    for part, count in (("det", 100), ("seg", 60), ("single", 12), ("unlabeled", 100)):
        seen = set(np.concatenate([world.draw(7, "train", i, part)[2] for i in range(count)]).tolist())
        assert seen == set(range({"det": 8, "seg": 4}.get(part, 12)))


def test_some_images_hold_no_object_but_few():
    empty = sum(len(world.draw(world.SEED, "train", i)[1]) == 0 for i in range(200))
    assert 1 <= empty <= 20


def test_colour_is_no_cue():
    """Mean colour of the pixels of each class: classes differ by less than images of one class do."""
    colours = [[] for _ in world.ALL_CLASSES]
    for index in range(240):
        image, _, labels, mask = everything(7, "train", index, "single")
        colours[labels[0]].append(image[mask > 0].mean(0))
    means = np.array([np.mean(c, 0) for c in colours])
    within = np.mean([np.std(c, 0) for c in colours])
    assert means.std(0).max() < .6 * within


def test_pycocotools_reads_the_json_and_finds_what_was_drawn(det):
    for split, count in SMALL.items():
        coco = COCO(str(det / f"{split}.json"))
        assert coco.getCatIds() == [1, 2, 3, 5, 8, 13, 21, 34]
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == world.CLASSES
        assert len(coco.getImgIds()) == count
        for index, image_id in enumerate(sorted(coco.getImgIds())):
            info, notes = coco.loadImgs(image_id)[0], coco.loadAnns(coco.getAnnIds(image_id))
            drawn, boxes, labels, mask = everything(world.SEED, split, index)
            assert [a["bbox"] for a in notes] == [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes.tolist()]
            assert [a["category_id"] for a in notes] == [world.CATEGORY_IDS[k] for k in labels]
            assert all(0 < a["area"] <= a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in notes)
            with Image.open(det / "images" / info["file_name"]) as stored:
                assert stored.format == "JPEG" and stored.size == (info["width"], info["height"])
                assert np.abs(np.asarray(stored, float) - drawn).mean() < 12   # the same picture, but for the compression


def test_image_and_annotation_ids_are_unique_across_splits(det):
    parts = [json.loads((det / f"{split}.json").read_text()) for split in SMALL]
    for key in ("images", "annotations"):
        ids = [row["id"] for part in parts for row in part[key]]
        assert len(ids) == len(set(ids)) > 0


def test_class_folders_exist_even_without_images(tmp_path):
    folder = world.build(tmp_path, "single", {"train": 13, "val": 2})
    for split, expected in (("train", [2] + [1] * 11), ("val", [1, 1] + [0] * 10)):
        assert [len(list((folder / split / name).glob("*.jpg"))) for name in world.ALL_CLASSES] == expected


def test_unlabeled_part_is_only_images(tmp_path):
    folder = world.build(tmp_path, "unlabeled", {"train": 5})
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:05d}.jpg" for i in range(5)] + ["world.json"]


def test_interrupted_build_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    real, calls = world.draw, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(world, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        world.build(tmp_path, "det", {"train": 6, "val": 2})
    assert list(tmp_path.iterdir()) == []
    folder = world.build(tmp_path, "det", {"train": 6, "val": 2})
    assert len(list((folder / "images").glob("*.jpg"))) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["det"]


def test_failed_rebuild_keeps_the_old_part(tmp_path, monkeypatch):
    world.build(tmp_path, "unlabeled", {"train": 2})
    monkeypatch.setattr(world, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.build(tmp_path, "unlabeled", {"train": 3})
    assert len(list((tmp_path / "unlabeled").glob("*.jpg"))) == 2


def test_unchanged_part_is_not_drawn_again_and_a_changed_one_is(tmp_path, monkeypatch):
    sizes = {"train": 3}
    folder = world.build(tmp_path, "unlabeled", sizes)
    first = (folder / "00000.jpg").read_bytes()
    (folder / "00000.jpg").write_bytes(b"touched")
    assert world.build(tmp_path, "unlabeled", sizes) == folder
    assert (folder / "00000.jpg").read_bytes() == b"touched"
    world.build(tmp_path, "unlabeled", {"train": 4})
    assert (folder / "00000.jpg").read_bytes() == first and len(list(folder.glob("*.jpg"))) == 4
    world.build(tmp_path, "unlabeled", {"train": 4}, seed=1)
    assert (folder / "00000.jpg").read_bytes() != first
    (folder / "00000.jpg").write_bytes(b"touched")
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    world.build(tmp_path, "unlabeled", {"train": 4}, seed=1)
    assert (folder / "00000.jpg").read_bytes() != b"touched"
    assert [p.name for p in tmp_path.iterdir()] == ["unlabeled"]


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "det").mkdir()
    (tmp_path / "det" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="world.json"):
        world.build(tmp_path, "det", {"train": 1, "val": 1})
    assert (tmp_path / "det" / "holiday.jpg").read_bytes() == b"mine"


def test_a_build_that_another_process_finished_meanwhile_is_kept(tmp_path, monkeypatch):
    """As with several ranks starting on an empty folder: the one that comes second uses what the first put there."""
    real = world.write

    def slow(folder, part, sizes, seed):
        real(folder, part, sizes, seed)
        monkeypatch.setattr(world, "write", real)
        (world.build(tmp_path, part, sizes, seed) / "mark").touch()

    monkeypatch.setattr(world, "write", slow)
    assert (world.build(tmp_path, "unlabeled", {"train": 2}) / "mark").exists()


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="no such split"):
        world.build(tmp_path, "unlabeled", {"valid": 2})
