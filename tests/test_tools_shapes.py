"""The embedded world: it is deterministic, its boxes fit what is visible, and a half-built part is
never taken for a whole one."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import util
from tools import shapes

SMALL = {"train": 30, "val": 12}


def everything(*args, **kwargs):
    image, boxes, labels, mask = shapes.draw(*args, **kwargs)
    return np.asarray(image), boxes, labels, mask


@pytest.fixture(scope="module")
def det(tmp_path_factory):
    return shapes.build(tmp_path_factory.mktemp("world"), "det", SMALL)


@pytest.mark.parametrize("part", list(shapes.PARTS))
def test_same_seed_split_index_same_image(part):
    for a, b in zip(everything(7, "train", 3, part), everything(7, "train", 3, part)):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("other", [(8, "train", 3), (7, "val", 3), (7, "train", 4)])
def test_other_seed_split_or_index_other_image_and_scene(other):
    here, there = everything(7, "train", 3), everything(*other)
    assert not np.array_equal(here[0], there[0])
    assert not np.array_equal(here[3], there[3])


def test_drawing_leaves_the_global_generator_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    shapes.draw(7, "train", 0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_box_of_a_single_object_is_tight_around_its_mask():
    for index in range(36):
        _, boxes, labels, mask = shapes.draw(7, "val", index, "single")
        ys, xs = np.nonzero(mask == labels[0] + 1)
        assert boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
        assert set(np.unique(mask)) <= {0, labels[0] + 1}


def test_boxes_of_many_objects_cover_the_mask_and_touch_it_on_all_sides():
    for index in range(60):
        _, boxes, labels, mask = shapes.draw(7, "train", index)
        covered = np.zeros_like(mask)
        for (x0, y0, x1, y1), k in zip(boxes.astype(int), labels):
            assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
            assert min(x1 - x0, y1 - y0) >= shapes.SMALLEST
            inside = mask[y0:y1, x0:x1] == k + 1
            sides = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(side.any() for side in sides)
            covered[y0:y1, x0:x1] = 1
        assert not mask[covered == 0].any()
        assert set(np.unique(mask)) - {0} == set((labels + 1).tolist())


def test_the_mask_is_where_the_picture_changes():
    """The same scene painted with and without its object: pixels change on the mask, and not far
    from it."""
    on, off = [], []
    for index in range(40):
        items, owner = shapes.scene(np.random.default_rng((7, 3, index)), "single", index)
        mask = owner > 0
        ys, xs = np.nonzero(mask)
        far = np.ones_like(mask)
        # room for shadow and blur
        far[max(ys.min() - 6, 0) : ys.max() + 7, max(xs.min() - 6, 0) : xs.max() + 7] = False
        gone = [dict(item, cover=item["cover"] * (item["label"] < 0)) for item in items]
        painted = []
        for scene in (items, gone):
            rng = np.random.default_rng(index)
            painted.append(np.asarray(shapes.paint(rng, "single", scene), int))
        change = np.abs(painted[0] - painted[1]).max(-1)
        on.append((change[mask] > 8).mean())
        off.append((change[far] > 8).mean())
    assert np.median(on) > 0.95 and np.median(off) == 0  # now and then the streams part


def test_every_part_shows_every_class_it_should_and_no_other():
    for part, count in (("det", 100), ("seg", 60), ("single", 12), ("unlabeled", 100)):
        seen = set(
            np.concatenate([shapes.draw(7, "train", i, part)[2] for i in range(count)]).tolist()
        )
        assert seen == set(range({"det": 8, "seg": 4}.get(part, 12)))


def test_some_images_hold_no_object_but_few():
    empty = sum(len(shapes.draw(shapes.SEED, "train", i)[1]) == 0 for i in range(200))
    assert 1 <= empty <= 20


def test_colour_is_no_cue():
    """Mean colour of each class's pixels: classes differ by less than images of one class do."""
    colours = [[] for _ in shapes.ALL_CLASSES]
    for index in range(240):
        image, _, labels, mask = everything(7, "train", index, "single")
        colours[labels[0]].append(image[mask > 0].mean(0))
    means = np.array([np.mean(c, 0) for c in colours])
    within = np.mean([np.std(c, 0) for c in colours])
    assert means.std(0).max() < 0.6 * within


def test_pycocotools_reads_the_json_and_finds_what_was_drawn(det):
    for split, count in SMALL.items():
        coco = COCO(str(det / f"{split}.json"))
        assert coco.getCatIds() == [1, 2, 3, 5, 8, 13, 21, 34]
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == shapes.CLASSES
        assert len(coco.getImgIds()) == count
        for index, image_id in enumerate(sorted(coco.getImgIds())):
            info, notes = coco.loadImgs(image_id)[0], coco.loadAnns(coco.getAnnIds(image_id))
            drawn, boxes, labels, mask = everything(shapes.SEED, split, index)
            xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            assert [a["bbox"] for a in notes] == xywh.tolist()
            assert [a["category_id"] for a in notes] == [shapes.CATEGORY_IDS[k] for k in labels]
            areas = [a["bbox"][2] * a["bbox"][3] for a in notes]
            assert all(0 < a["area"] <= area for a, area in zip(notes, areas))
            with Image.open(det / "images" / info["file_name"]) as stored:
                assert stored.format == "JPEG" and stored.size == (info["width"], info["height"])
                # the same picture, but for the compression
                assert np.abs(np.asarray(stored, float) - drawn).mean() < 12


def test_image_and_annotation_ids_are_unique_across_splits(det):
    parts = [json.loads((det / f"{split}.json").read_text()) for split in SMALL]
    for key in ("images", "annotations"):
        ids = [row["id"] for part in parts for row in part[key]]
        assert len(ids) == len(set(ids)) > 0


def test_class_folders_exist_even_without_images(tmp_path):
    folder = shapes.build(tmp_path, "single", {"train": 13, "val": 2})
    for split, expected in (("train", [2] + [1] * 11), ("val", [1, 1] + [0] * 10)):
        assert [
            len(list((folder / split / name).glob("*.jpg"))) for name in shapes.ALL_CLASSES
        ] == expected


def test_interrupted_build_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    real, calls = shapes.draw, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(shapes, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        shapes.build(tmp_path, "det", {"train": 6, "val": 2})
    assert list(tmp_path.iterdir()) == []
    folder = shapes.build(tmp_path, "det", {"train": 6, "val": 2})
    assert len(list((folder / "images").glob("*.jpg"))) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["det"]


def test_failed_rebuild_keeps_the_old_part(tmp_path, monkeypatch):
    shapes.build(tmp_path, "unlabeled", {"train": 2})
    monkeypatch.setattr(shapes, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shapes.build(tmp_path, "unlabeled", {"train": 3})
    assert len(list((tmp_path / "unlabeled").glob("*.jpg"))) == 2


def test_unchanged_part_is_not_drawn_again_and_a_changed_one_is(tmp_path, monkeypatch):
    sizes = {"train": 3}
    folder = shapes.build(tmp_path, "unlabeled", sizes)
    first = (folder / "00000.jpg").read_bytes()
    (folder / "00000.jpg").write_bytes(b"touched")
    assert shapes.build(tmp_path, "unlabeled", sizes) == folder
    assert (folder / "00000.jpg").read_bytes() == b"touched"
    shapes.build(tmp_path, "unlabeled", {"train": 4})
    assert (folder / "00000.jpg").read_bytes() == first and len(list(folder.glob("*.jpg"))) == 4
    shapes.build(tmp_path, "unlabeled", {"train": 4}, seed=1)
    assert (folder / "00000.jpg").read_bytes() != first
    (folder / "00000.jpg").write_bytes(b"touched")
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    shapes.build(tmp_path, "unlabeled", {"train": 4}, seed=1)
    assert (folder / "00000.jpg").read_bytes() != b"touched"
    assert [p.name for p in tmp_path.iterdir()] == ["unlabeled"]


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "det").mkdir()
    (tmp_path / "det" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="world.json"):
        shapes.build(tmp_path, "det", {"train": 1, "val": 1})
    with pytest.raises(util.UserError, match="cannot draw .*world.json"):
        shapes.main([str(tmp_path)])
    assert (tmp_path / "det" / "holiday.jpg").read_bytes() == b"mine"


def test_a_build_that_another_process_finished_meanwhile_is_kept(tmp_path, monkeypatch):
    """As with several ranks starting on an empty folder: the second uses what the first put."""
    real = shapes.write_split

    def slow(folder, part, split, count, seed):
        real(folder, part, split, count, seed)
        monkeypatch.setattr(shapes, "write_split", real)
        (shapes.build(tmp_path, part, {split: count}, seed) / "mark").touch()

    monkeypatch.setattr(shapes, "write_split", slow)
    assert (shapes.build(tmp_path, "unlabeled", {"train": 2}) / "mark").exists()


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="no such split"):
        shapes.build(tmp_path, "unlabeled", {"valid": 2})


# ---- domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", list(shapes.DOMAINS))
def test_a_domain_has_all_classes_in_turn_and_splits_of_its_own(domain, tmp_path):
    folder = shapes.build(tmp_path, domain, {"train": 24, "val": 12, "test": 12})
    for split, n in (("train", 2), ("val", 1), ("test", 1)):
        assert [len(list((folder / split / name).iterdir())) for name in shapes.ALL_CLASSES] == [
            n
        ] * 12
    images = [np.asarray(Image.open(f)) for f in sorted(folder.rglob("*.[jp][pn]g"))]
    assert len({image.tobytes() for image in images}) == 48
    assert all(image.shape == (64, 64, 3) for image in images)


def test_streams_of_random_numbers_are_used_once():
    streams = [stream for spec in shapes.PARTS.values() for stream, _ in spec["splits"].values()]
    assert len(set(streams)) == len(streams)


def test_domains_look_as_they_are_called():
    def many(domain):
        return np.stack([everything(7, "train", i, domain)[0] for i in range(24)]).astype(float)

    strokes, sketch, photo = many("strokes"), many("sketch"), many("photo")
    assert set(np.unique(strokes)) == {0, 255} and 0.03 < (strokes == 0).mean() < 0.35
    assert np.median(sketch) > 180 and np.ptp(sketch, 3).mean() < 25 < np.ptp(photo, 3).mean()
    boxes = [everything(7, "train", i, "aerial")[1:3] for i in range(48)]
    sides = [box[2:] - box[:2] for found, _ in boxes for box in found]
    assert np.max(sides) <= 26 and {len(found) for found, _ in boxes} == {1, 2, 3}
    assert all(len(set(labels.tolist())) == 1 for _, labels in boxes)


def test_a_drawn_outline_follows_its_object():
    """No ink far from the object's mask: a crescent's hole reaches out of it, its outline not."""
    for i in range(5, 120, 12):
        image, _, labels, mask = everything(7, "train", i, "strokes")
        y, x = np.nonzero(image[..., 0] == 0)
        around = [np.s_[max(0, b - 5) : b + 6, max(0, a - 5) : a + 6] for a, b in zip(x, y)]
        near = np.array([mask[place].any() for place in around])
        assert labels[0] == shapes.ALL_CLASSES.index("crescent") and near.all()
