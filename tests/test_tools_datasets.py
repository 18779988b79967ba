# ruff: noqa: E501
"""Every dataset's real layout, in miniature: exact lists, labels and parts; no test image is pre-trained on; what is malformed is
named with file and line. Fixtures are written here, in the formats as published."""

import csv
import hashlib
import json
import os

import numpy as np
import pytest
import scipy.io
from PIL import Image

import data
from tools import datasets as sources
from util import UserError, run


def picture(path, size=(8, 8), colour=(90, 120, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def in_val(key, share=10):
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0


def keys(pattern, val, train, share=10):
    """Names of that pattern, as many as asked for that the hash sends to val and to train."""
    found = [pattern.format(i) for i in range(1, 400)]
    return (
        [k for k in found if in_val(k, share)][:val],
        [k for k in found if not in_val(k, share)][:train],
    )


def converted(name, root, out, **more):
    """The three csv files as {part: {path relative to root: label or {name: 0 or 1}}}, and the names in pretrain.txt; what holds
    for all of them is checked."""
    count, found, base = (
        sources.convert(name, root, out, **more),
        {},
        out if name == "xview" else root,
    )
    for part in sources.PARTS:
        with open(out / f"{part}.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert len(rows) == count[part] and all(
            os.path.isabs(row["path"]) and os.path.exists(row["path"]) for row in rows
        )
        found[part] = {
            os.path.relpath(row.pop("path"), base): row.get("label")
            or {k: int(v) for k, v in row.items()}
            for row in rows
        }
    images = data.listed(out / "pretrain.txt")
    pretrain = [images.path(i) for i in range(len(images))]
    assert sorted(pretrain) == sorted(
        (out / "pretrain.txt").read_text().split("\n")[:-1]
    )  # as hpt.py --stage reads it
    names = {os.path.relpath(p, base) for p in pretrain}
    assert not names & set(found["test"]) and {*found["train"], *found["val"]} <= names
    return found, names


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_has_the_papers_sixteen():
    assert len(sources.SOURCES) == 16 and {s.metric for s in sources.SOURCES.values()} == {
        "top-1",
        "AUROC",
    }
    rows = sources.SOURCES
    assert {k: s.classes for k, s in rows.items() if s.metric == "AUROC"} == {
        "xview": 36,
        "viper": 23,
        "chexpert": 5,
        "coco_2014": 80,
        "pascal": 20,
    }
    assert sum(k.startswith("domain_net_") and s.classes == 345 for k, s in rows.items()) == 6
    assert rows["resisc"].images == 45 * 700 and rows["ucmerced"].images == 1260 + 420 + 420
    assert (
        rows["domain_net_clipart"].images == 33525 + 14604
        and rows["domain_net_sketch"].images == 48212 + 20916
    )
    assert (
        rows["pascal"].images == 5011 + 11540 + 4952 and rows["flowers"].images == 2 * 1020 + 6149
    )


def test_without_arguments_the_table_is_printed_and_failures_are_one_line(
    tmp_path, capsys, monkeypatch
):
    sources.main([])
    shown = capsys.readouterr().out
    assert (
        all(f"\n{name} " in shown for name in sources.SOURCES)
        and "train.csv, valid.csv" in shown
        and "None" not in shown
    )
    for args in (
        ["flowers", tmp_path, tmp_path / "out"],
        ["flowers", tmp_path],
        ["flowers", tmp_path / "gone", tmp_path / "out"],
        ["xview", tmp_path, tmp_path / "out", "--chip", "0"],
        ["coco_2014", tmp_path, tmp_path / "out", "--boxes"],
    ):
        monkeypatch.setattr("sys.argv", ["sources.py", *map(str, args)])
        with pytest.raises(SystemExit, match="2"):
            run(sources.main)
        assert capsys.readouterr().err.count("\n") == 1, args


# ---- one class an image ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, folder, file",
    [("resisc", "NWPU-RESISC45", "{}_{:03}.jpg"), ("ucmerced", "Images", "{}{:02}.tif")],
)
def test_scene_lists(tmp_path, name, folder, file):
    classes = ("airplane", "tennis_court" if name == "resisc" else "tenniscourt")
    files = {
        part: [(c, file.format(c, 3 * i + k)) for c in classes for i in range(2)]
        for k, part in enumerate(sources.PARTS)
    }
    for some in files.values():
        for c, f in some:
            picture(tmp_path / "d" / folder / c / f)
    for part, some in files.items():
        text(tmp_path / "d" / f"{part}.txt", "".join(f"{f}\n" for _, f in some))
    found, pretrain = converted(name, tmp_path / "d", tmp_path / "out")
    assert found == {
        part: {f"{folder}/{c}/{f}": c for c, f in some} for part, some in files.items()
    }
    assert len(pretrain) == 8


def test_domain_net(tmp_path):
    root = tmp_path / "d"
    (val,), train = keys("clipart/aircraft_carrier/clipart_001_{:06}.jpg", 1, 2)
    _, (zebra, other) = keys("clipart/zebra/clipart_344_{:06}.jpg", 0, 2)
    rows = {"train": [val, *train, zebra], "test": [other]}
    for part, some in rows.items():
        text(
            root / f"clipart_{part}.txt",
            "".join(f"{f} {0 if 'carrier' in f else 344}\n" for f in some),
        )
        for f in some:
            picture(root / f)
    found, _ = converted("domain_net_clipart", root, tmp_path / "out")
    assert found["val"] == {val: "aircraft_carrier"} and found["test"] == {other: "zebra"}
    assert found["train"] == {
        train[0]: "aircraft_carrier",
        train[1]: "aircraft_carrier",
        zebra: "zebra",
    }


def test_chest_xray_kids(tmp_path):
    """Patients stay together, the official val folder joins train."""
    root = tmp_path / "d"
    (one,), (other,) = keys("person{}", 1, 1)
    two = [f"train/PNEUMONIA/{one}_bacteria_1.jpeg", f"train/PNEUMONIA/{one}_virus_2.jpeg"]
    for f in (
        *two,
        f"val/PNEUMONIA/{other}_virus_7.jpeg",
        "train/NORMAL/IM-0115-0001.jpeg",
        "test/NORMAL/NORMAL2-IM-0001-0001.jpeg",
        f"test/PNEUMONIA/{one}_virus_9.jpeg",
    ):
        picture(root / f)
    found, _ = converted("chest_xray_kids", root, tmp_path / "out")
    assert found["val"] == dict.fromkeys(two, "PNEUMONIA")
    assert found["train"] == {
        f"val/PNEUMONIA/{other}_virus_7.jpeg": "PNEUMONIA",
        "train/NORMAL/IM-0115-0001.jpeg": "NORMAL",
    }
    assert len(found["test"]) == 2
    picture(root / "train/COVID/a.jpeg")
    with pytest.raises(UserError, match="COVID/a.jpeg: expected images in NORMAL/ and PNEUMONIA/"):
        sources.convert("chest_xray_kids", root, tmp_path / "out")


def frame(name, weather, labels=()):
    """As in bdd100k_labels_images_train.json."""
    return {
        "name": name,
        "attributes": {"weather": weather, "scene": "city street", "timeofday": "night"},
        "timestamp": 10000,
        "labels": list(labels),
    }


LANE = {
    "category": "lane",
    "attributes": {"laneTypes": "crosswalk"},
    "poly2d": [{"vertices": [[1, 2], [3, 4]]}],
    "id": 9,
}


def thing(category, box, **attributes):
    return {
        "category": category,
        "attributes": {"occluded": False, **attributes},
        "id": 1,
        "box2d": dict(zip(("x1", "y1", "x2", "y2"), box)),
    }


def bdd(root):
    val, train = keys("{:08x}-0a1b2c3d.jpg", 1, 3, 7)
    rows = {
        "train": [
            frame(val[0], "snowy", [LANE, thing("bike", (1, 2, 5, 7.5))]),
            frame(train[0], "clear"),
            frame(
                train[1],
                "partly cloudy",
                [thing("other vehicle", (0, 0, 8, 8)), thing("person", (1, 1, 2, 2), crowd=True)],
            ),
            frame(train[2], "undefined"),
        ],
        "val": [
            frame(
                "b1c66a42-6f7d68ca.jpg",
                "rainy",
                [thing("traffic sign", (1125.9, 133.1, 1156.9, 210.8))],
            )
        ],
    }
    for part, frames in rows.items():
        text(root / f"labels/bdd100k_labels_images_{part}.json", json.dumps(frames, indent=4))
        for f in frames:
            picture(root / "images/100k" / part / f["name"])
    return val, train


def test_bdd(tmp_path):
    root = tmp_path / "d"
    val, train = bdd(root)
    found, pretrain = converted("bdd", root, tmp_path / "out")
    base = "images/100k/"
    assert found == {
        "train": {f"{base}train/{train[0]}": "clear", f"{base}train/{train[1]}": "partly cloudy"},
        "val": {f"{base}train/{val[0]}": "snowy"},
        "test": {f"{base}val/b1c66a42-6f7d68ca.jpg": "rainy"},
    }
    assert f"{base}train/{train[2]}" in pretrain  # of undefined weather


def test_flowers(tmp_path):
    """Read as SciPy writes MATLAB's format, compressed or not, of any integer type."""
    root, labels = tmp_path / "d", np.array([[77, 1, 102, 1, 77]])
    for i in range(1, 6):
        picture(root / f"jpg/image_{i:05}.jpg")
    for compressed, kind in ((True, np.uint8), (False, np.uint16), (True, np.float64)):
        scipy.io.savemat(
            root / "imagelabels.mat", {"labels": labels.astype(kind)}, do_compression=compressed
        )
        scipy.io.savemat(
            root / "setid.mat",
            {
                "trnid": np.array([[5, 2]], kind),
                "valid": np.array([[4]], kind),
                "tstid": np.array([[1, 3]], kind),
            },
            do_compression=compressed,
        )
        found, _ = converted("flowers", root, tmp_path / "out")
        assert found == {
            "train": {"jpg/image_00005.jpg": "077", "jpg/image_00002.jpg": "001"},
            "val": {"jpg/image_00004.jpg": "001"},
            "test": {"jpg/image_00001.jpg": "077", "jpg/image_00003.jpg": "102"},
        }
    (root / "setid.mat").write_bytes(b"MATLAB 4")
    with pytest.raises(UserError, match="setid.mat: expected MATLAB 5"):
        sources.convert("flowers", root, tmp_path / "out")


# ---- several labels an image -------------------------------------------------------------------------------------

COLUMNS = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def xray(path, **values):
    """A line of CheXpert's train.csv."""
    given = {
        "Path": path,
        "Sex": "Female",
        "Age": "68",
        "Frontal/Lateral": "Frontal",
        "AP/PA": "AP",
        **values,
    }
    return ",".join(given.get(c, "") for c in COLUMNS.split(","))


def test_chexpert(tmp_path):
    root, every = tmp_path / "CheXpert-v1.0-small", dict.fromkeys(sources.FINDINGS, "1.0")
    (one,), (other,) = keys("patient{:05}", 1, 1)
    rows = {
        "train": [
            xray(f"CheXpert-v1.0-small/train/{one}/study1/view1_frontal.jpg", **every),
            xray(f"CheXpert-v1.0-small/train/{other}/study1/view1_frontal.jpg", **every),
            xray(
                f"CheXpert-v1.0-small/train/{other}/study2/view1_frontal.jpg",
                Edema="-1.0",
                Cardiomegaly="0.0",
                **{"Pleural Effusion": "1.0", "Pneumothorax": "1.0"},
            ),
        ],
        "valid": [xray("CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg", **every)],
    }
    for part, some in rows.items():
        text(root / f"{part}.csv", "\n".join([COLUMNS, *some]) + "\n")
        for row in some:
            picture(tmp_path / row.split(",")[0])
    found, _ = converted("chexpert", root, tmp_path / "out")
    ones = dict.fromkeys(sources.FINDINGS, 1)
    assert found["val"] == {f"train/{one}/study1/view1_frontal.jpg": ones}
    assert found["test"] == {"valid/patient64541/study1/view1_frontal.jpg": ones}
    assert found["train"][
        f"train/{other}/study2/view1_frontal.jpg"
    ] == {  # uncertain, 0 and empty are 0
        "Atelectasis": 0,
        "Cardiomegaly": 0,
        "Consolidation": 0,
        "Edema": 0,
        "Pleural Effusion": 1,
    }
    with pytest.raises(UserError, match="is the data set itself"):
        sources.convert("chexpert", root, root)  # would overwrite train.csv
    text(
        root / "valid.csv", "\n".join([COLUMNS, *rows["valid"], xray("a/b/c/d.jpg", Edema="maybe")])
    )
    with pytest.raises(UserError, match=r"valid.csv, line 3: expected .*maybe"):
        sources.convert("chexpert", root, tmp_path / "out")


def test_coco(tmp_path):
    root, categories = (
        tmp_path / "d",
        [{"supercategory": "x", "id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    )
    (one,), (other, more) = keys("COCO_train2014_{:012}.jpg", 1, 2)
    names = {"train": [one, other, more], "val": ["COCO_val2014_000000000042.jpg"]}
    labels = {"train": [(1, 1), (1, 90), (2, 90), (2, 1), (2, 1)], "val": [(1, 1), (1, 90)]}
    for part, some in names.items():
        text(
            root / f"annotations/instances_{part}2014.json",
            {
                "info": {"description": 'not "images": here'},
                "images": [{"id": i, "file_name": f, "height": 8} for i, f in enumerate(some, 1)],
                "annotations": [
                    {"image_id": i, "category_id": c, "iscrowd": 0, "segmentation": [[1.5, 2]]}
                    for i, c in labels[part]
                ],
                "categories": categories,
            },
        )
        for f in some:
            picture(root / f"{part}2014" / f)
    found, _ = converted("coco_2014", root, tmp_path / "out")
    both = {"person": 1, "toothbrush": 1}
    assert found == {
        "val": {f"train2014/{one}": both},
        "test": {f"val2014/{names['val'][0]}": both},
        "train": {f"train2014/{other}": both, f"train2014/{more}": {"person": 0, "toothbrush": 0}},
    }
    os.remove(root / "val2014" / names["val"][0])
    with pytest.raises(
        UserError, match="instances_val2014.json, images item 1: there is no .*000042.jpg"
    ):
        sources.convert("coco_2014", root, tmp_path / "out")


def xml(*objects):
    things = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult><bndbox><xmin>{b[0]}</xmin>"
        f"<ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox><part><name>head</name></part></object>"
        for name, difficult, b in objects
    )
    return f"<annotation><size><width>8</width><height>6</height><depth>3</depth></size>{things}</annotation>"


def pascal(root):
    dog, cat = ("dog", 0, (1, 1, 8, 6)), ("cat", 0, (2, 3, 4.5, 5))
    (one,), (other,) = keys("VOC2012/JPEGImages/2008_{:06}.jpg", 1, 1)
    one, other = os.path.basename(one)[:-4], os.path.basename(other)[:-4]
    for year, part, images in (
        (2007, "trainval", {"000005": [dog, ("cat", 1, (1, 1, 3, 3))]}),
        (2007, "test", {"000001": [cat, ("dog", 1, (1, 2, 3, 4)), dog]}),
        (2012, "trainval", {one: [dog, cat], other: [cat]}),
    ):
        text(root / f"VOC{year}/ImageSets/Main/{part}.txt", "\n".join(images) + "\n")
        for name, objects in images.items():
            text(root / f"VOC{year}/Annotations/{name}.xml", xml(*objects))
            picture(root / f"VOC{year}/JPEGImages/{name}.jpg", (8, 6))
    return one, other


def test_pascal(tmp_path):
    root = tmp_path / "d"
    one, other = pascal(root)
    found, _ = converted("pascal", root, tmp_path / "out")
    assert found == {
        "val": {f"VOC2012/JPEGImages/{one}.jpg": {"cat": 1, "dog": 1}},
        "train": {
            "VOC2007/JPEGImages/000005.jpg": {"cat": 0, "dog": 1},  # the cat is difficult
            f"VOC2012/JPEGImages/{other}.jpg": {"cat": 1, "dog": 0},
        },
        "test": {"VOC2007/JPEGImages/000001.jpg": {"cat": 1, "dog": 1}},
    }
    text(root / f"VOC2012/Annotations/{one}.xml", xml(("unicorn", 0, (1, 1, 2, 2))))
    with pytest.raises(UserError, match=f"{one}.xml: expected xml with size and objects"):
        sources.convert("pascal", root, tmp_path / "out")


@pytest.mark.parametrize("labels", ["cls", "bb"])
def test_viper(tmp_path, labels):
    """Sequences stay together; frames without labels are only pre-trained on."""
    root, things = (
        tmp_path / "d",
        {0: (24, 20), 10: (24,), 20: (0, 5)},
    )  # car and person, car, neither
    (one,), (other,) = keys("{:03}", 1, 1)
    for part, sequence in (("train", one), ("train", other), ("val", "001")):
        for n in (0, 1, 10, 20):
            picture(root / f"{part}/img/{sequence}/{sequence}_{n:05}.jpg")
        for n, ids in things.items():
            file = root / f"{part}/{labels}/{sequence}/{sequence}_{n:05}"
            text(file.with_suffix(".csv"), "".join(f"{k},7,1.5,2,3,4\n" for k in ids))
            if labels == "cls":
                file.with_suffix(".csv").unlink()
                Image.fromarray(np.array([ids, ids], np.uint8)).save(file.with_suffix(".png"))
    found, pretrain = converted("viper", root, tmp_path / "out")
    expected = {
        0: {"car": 1, "person": 1},
        10: {"car": 1, "person": 0},
        20: {"car": 0, "person": 0},
    }
    for part, folder in (
        ("val", f"train/img/{one}"),
        ("train", f"train/img/{other}"),
        ("test", "val/img/001"),
    ):
        assert found[part] == {f"{folder}/{folder[-3:]}_{n:05}.jpg": v for n, v in expected.items()}
    assert len(pretrain) == 8


def test_xview(tmp_path):
    """Chips are cut where they should be, labelled by the centres of boxes, and stay together by image."""
    root, parts = tmp_path / "d", {}
    for i in range(200):
        parts.setdefault(
            "test" if in_val(f"test/{i}.tif", 5) else "val" if in_val(f"{i}.tif") else "train",
            f"{i}.tif",
        )
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[0.1, 2]]]},
            "properties": {
                "bounds_imcoords": box,
                "type_id": kind,
                "image_id": tile,
                "cat_id": "1040",
                "feature_id": 3,
            },
        }
        for tile in [*parts.values(), "gone.tif"]
        for kind, box in ((73, "1,5,5,13"), (18, "6,1,13,3"), (75, "0,0,1,1"))
    ]
    features.append(
        {
            **features[0],
            "properties": {**features[0]["properties"], "image_id": parts["train"], "type_id": 94},
        }
    )
    text(
        root / "xView_train.geojson",
        {"type": "FeatureCollection", "crs": {"type": "name"}, "features": features},
    )
    for tile in parts.values():
        picture(root / "train_images" / tile, (17, 17), (10, 10, 10))
        with Image.open(root / "train_images" / tile) as image:
            image.paste((200, 200, 200), (8, 0, 16, 8))
            image.save(root / "train_images" / tile)
    found, _ = converted("xview", root, tmp_path / "out", chip=8)
    for part, tile in parts.items():  # Tower, 94, is in one part only
        labels = {"0_0": (0, 0), "0_1": (0, 1), "1_0": (1, 0), "1_1": (0, 0)}
        assert found[part] == {
            f"chips_8/{tile[:-4]}_{k}.jpg": dict(zip(("Building", "Small Car"), v))
            for k, v in labels.items()
        }
        cut = [np.asarray(Image.open(tmp_path / "out" / path)) for path in sorted(found[part])]
        assert [(c.shape, c.mean() > 100) for c in cut] == [
            ((8, 8, 3), light) for light in (False, True, False, False)
        ]
    text(
        root / "xView_train.geojson",
        {"features": [features[0], {"properties": {**features[0]["properties"], "type_id": 14}}]},
    )
    with pytest.raises(
        UserError, match="xView_train.geojson, features item 2: expected image_id, type_id"
    ):
        sources.convert("xview", root, tmp_path / "out", chip=8)


# ---- what is malformed -------------------------------------------------------------------------------------------


def test_json_lists_are_read_piece_by_piece(tmp_path):
    """Objects that lie across the borders of what is read at a time, and files that end too early."""
    rows = [{"n": i, "text": ']} \\" [' * (i * 37 % 1000)} for i in range(2000)]
    text(tmp_path / "a.json", rows)
    text(tmp_path / "b.json", {"meta": {"rows": 3}, "rows": rows, "other": [1]})
    assert (tmp_path / "a.json").stat().st_size > 3 * 2**20
    assert (
        [v for _, v in sources.json_items(tmp_path / "a.json")]
        == [v for _, v in sources.json_items(tmp_path / "b.json", "rows")]
        == rows
    )
    for content, message in (
        (json.dumps(rows)[:-1000], "item 2000: broken or cut off"),
        ('[{"n": 1}, {"n": 2,}]', "item 2: broken"),
        ('{"a": 1}', "holds no json list"),
    ):
        text(tmp_path / "c.json", content)
        with pytest.raises(UserError, match=message):
            list(sources.json_items(tmp_path / "c.json"))


def test_malformed_lists_are_named_with_their_line(tmp_path):
    root, out = tmp_path / "d", tmp_path / "out"
    for f in ("sketch/cat/a.jpg", "sketch/cat/b.jpg"):
        picture(root / f)
    for content, message in (
        (
            "sketch/cat/a.jpg 0\n\nsketch/cat/b.jpg\n",
            "sketch_train.txt, line 3: expected sketch/CLASS/FILE",
        ),
        (
            "sketch/cat/a.jpg 0\nsketch/cat/gone.jpg 0\n",
            "sketch_train.txt, line 2: there is no .*gone.jpg",
        ),
        ("sketch/cat/a.jpg 0\n", "a.jpg is in train and in test; mend the lists"),
    ):
        text(root / "sketch_train.txt", content)
        text(root / "sketch_test.txt", "sketch/cat/a.jpg 0\n")
        with pytest.raises(UserError, match=message):
            sources.convert("domain_net_sketch", root, out)
    text(root / "sketch_train.txt", "\n")
    with pytest.raises(UserError, match="leaves no labelled image for train and val"):
        sources.convert("domain_net_sketch", root, out)
    assert not list(out.iterdir())  # nothing half done
    with pytest.raises(UserError, match="there is no .*painting_train.txt"):
        sources.convert("domain_net_painting", root, out)


# ---- detection ---------------------------------------------------------------------------------------------------


def test_voc_boxes_are_cocos(tmp_path):
    root, out = tmp_path / "d", tmp_path / "out"
    pascal(root)
    sources.boxes("pascal", root, out)
    train, val = data.coco(out, "train"), data.coco(out, "val")
    assert not train.dropped and not val.dropped
    assert (len(train), len(val), len(train.class_names)) == (3, 1, 20) and train.class_names[
        :2
    ] == ["aeroplane", "bicycle"]
    image, target = train.read(0)
    assert image.size == (8, 6) and target["boxes"].tolist() == [
        [0, 0, 8, 6],
        [0, 0, 3, 3],
    ]  # from 1 and inclusive, to edges
    assert [train.class_names[k] for k in target["labels"]] == ["dog", "cat"] and not target[
        "crowd"
    ].any()  # difficult too
    target = val.read(0)[1]
    assert target["boxes"].tolist() == [[1, 2, 4.5, 5], [0, 1, 3, 4], [0, 0, 8, 6]]
    assert target["crowd"].tolist() == [False, True, False]  # difficult: not scored
    with pytest.raises(UserError, match="images is there"):
        (tmp_path / "other/images").mkdir(parents=True)
        sources.boxes("pascal", root, tmp_path / "other")


def test_bdd_boxes_are_cocos(tmp_path):
    root, out = tmp_path / "d", tmp_path / "out"
    val, train = bdd(root)
    sources.boxes("bdd", root, out)
    found = data.coco(out, "train")
    assert not found.dropped
    targets = {os.path.basename(found.path(i)): found.target(i) for i in range(len(found))}
    assert set(targets) == {*val, *train} and all(
        os.path.exists(found.path(i)) for i in range(len(found))
    )
    assert targets[val[0]]["boxes"].tolist() == [[1, 2, 5, 7.5]] and targets[val[0]][
        "crowd"
    ].tolist() == [False]  # no lane
    assert [found.class_names[k] for k in targets[val[0]]["labels"]] == ["bicycle"]
    assert [found.class_names[k] for k in targets[train[1]]["labels"]] == ["car", "pedestrian"]
    assert targets[train[1]]["crowd"].tolist() == [True, True] and not len(
        targets[train[0]]["labels"]
    )
    assert np.allclose(data.coco(out, "val").target(0)["boxes"], [[1125.9, 133.1, 1156.9, 210.8]])
