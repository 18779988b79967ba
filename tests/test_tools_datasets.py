"""tools/datasets.py: every data set's real layout in miniature gives the right lists, labels and
parts; no test image is pre-trained on; what is malformed is named with file and line."""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

import data
from tools import datasets
from util import UserError, run


def pictures(root, names, size=(8, 6)):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 30)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def chosen(key, share=10):
    """Whether the hash of the key picks it out of `share`."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0


def names(pattern, val, train, share=10):
    """So many names of a pattern that the hash sends to val, and so many to train."""
    candidates = [pattern.format(i) for i in range(1, 400)]
    apart = [[k for k in candidates if chosen(k, share) == wanted] for wanted in (True, False)]
    return apart[0][:val] + apart[1][:train]


def convert(name, root, **options):
    """The csv files as {part: {path relative to root: label, or names of the labels that are 1}}
    and the names in pretrain.txt; what holds for every data set is checked."""
    out = root.parent / "out"
    base = out if name == "xview" else root
    count = datasets.convert(name, root, out, **options)
    parts = {}
    for part in datasets.PARTS:
        with open(out / f"{part}.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        paths = [row.pop("path") for row in rows]
        assert len(rows) == count[part] and all(map(os.path.isabs, paths))
        labels = [row.get("label") or {k for k, v in row.items() if int(v)} for row in rows]
        parts[part] = {os.path.relpath(path, base): label for path, label in zip(paths, labels)}
    listed = data.listed(out / "pretrain.txt")  # as hpt.py --stage reads it
    pretrain = {os.path.relpath(listed.path(i), base) for i in range(len(listed))}
    assert all((base / name).exists() for name in pretrain | set(parts["test"]))
    assert parts["train"].keys() | parts["val"].keys() <= pretrain
    assert not pretrain & parts["test"].keys()
    return parts, pretrain


def refused(message, name, root, **options):
    with pytest.raises(UserError, match=message) as error:
        datasets.convert(name, root, root.parent / "out", **options)
    assert "\n" not in str(error.value)


# ---- the table and the command line --------------------------------------------------------------


def test_the_table_has_the_papers_sixteen():
    rows = datasets.SOURCES
    assert len(rows) == 16 and rows.keys() == datasets.PIXELS.keys()
    several = {name: row.classes for name, row in rows.items() if row.metric == "AUROC"}
    assert several == dict(xview=36, viper=23, chexpert=5, coco_2014=80, pascal=20)
    assert sum(name.startswith("domain_net_") and r.classes == 345 for name, r in rows.items()) == 6
    images = {name: row.images for name, row in rows.items()}
    assert images["resisc"] == 45 * 700 and images["ucmerced"] == 1260 + 420 + 420
    assert images["pascal"] == 5011 + 11540 + 4952 and images["flowers"] == 2 * 1020 + 6149
    assert images["domain_net_clipart"] == 33525 + 14604
    assert images["domain_net_sketch"] == 48212 + 20916
    assert datasets.PIXELS["bdd"][0] == (0.2789, 0.2929, 0.2902)
    assert datasets.PIXELS["resisc"] == datasets.PIXELS["xview"]
    pixels = np.array(list(datasets.PIXELS.values()))
    assert pixels.shape == (16, 2, 3) and 0 < pixels.min() < pixels.max() < 1
    assert len(datasets.XVIEW) == 60 and datasets.XVIEW[86] == "Storage Tank"
    assert len(datasets.VIPER) == 23 and datasets.VIPER[27] == "truck"


def test_the_table_is_printed_and_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    datasets.main([])
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in datasets.SOURCES)
    assert "train.csv, valid.csv" in shown and "None" not in shown
    for args in [
        ["flowers", tmp_path, "out"],
        ["flowers", tmp_path],
        ["flowers", tmp_path / "gone", "out"],
        ["xview", tmp_path, "out", "--chip", "0"],
        ["coco_2014", tmp_path, "out", "--boxes"],
        ["imagenet", tmp_path, "out"],
    ]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["datasets", *map(str, args)])
        with pytest.raises(SystemExit, match="2"):
            run(datasets.main)
        assert capsys.readouterr().err.count("\n") == 1, args


# ---- one class an image --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, pattern",
    [("resisc", "NWPU/{0}/{0}_{1:03}.jpg"), ("ucmerced", "Images/{0}/{0}{1:02}.tif")],
)
def test_scene_lists(tmp_path, name, pattern):
    root = tmp_path / "d"
    expected = {part: {} for part in datasets.PARTS}
    for k, part in enumerate(datasets.PARTS):
        for label in ("airplane", "tennis_court"):
            expected[part].update({pattern.format(label, 3 * i + k): label for i in range(2)})
        pictures(root, expected[part])
        write(root / f"{part}.txt", "".join(f"{os.path.basename(f)}\n" for f in expected[part]))
    parts, pretrain = convert(name, root)
    assert parts == expected and len(pretrain) == 8


def test_domain_net(tmp_path):
    root = tmp_path / "d"
    carriers = names("clipart/aircraft_carrier/clipart_001_{:06}.jpg", 1, 2)
    zebras = names("clipart/zebra/clipart_344_{:06}.jpg", 0, 2)
    pictures(root, carriers + zebras)
    write(root / "clipart_train.txt", "".join(f"{f} 0\n" for f in carriers) + f"{zebras[0]} 344\n")
    write(root / "clipart_test.txt", f"{zebras[1]} 344\n")
    parts, _ = convert("domain_net_clipart", root)
    assert parts["val"] == {carriers[0]: "aircraft_carrier"} and parts["test"] == {
        zebras[1]: "zebra"
    }
    expected = dict.fromkeys(carriers[1:], "aircraft_carrier") | {zebras[0]: "zebra"}
    assert parts["train"] == expected


def test_chest_xray_kids_keeps_patients_together_and_joins_val_to_train(tmp_path):
    root = tmp_path / "d"
    one, other = names("person{}", 1, 1)
    val = [f"train/PNEUMONIA/{one}_{kind}.jpeg" for kind in ("bacteria_1", "virus_2")]
    train = [f"val/PNEUMONIA/{other}_virus_7.jpeg", "train/NORMAL/IM-0115-0001.jpeg"]
    test = ["test/NORMAL/NORMAL2-IM-0001-0001.jpeg", f"test/PNEUMONIA/{one}_virus_9.jpeg"]
    pictures(root, val + train + test)
    parts, _ = convert("chest_xray_kids", root)
    assert parts["val"] == dict.fromkeys(val, "PNEUMONIA")
    assert parts["train"] == dict(zip(train, ("PNEUMONIA", "NORMAL")))
    assert parts["test"] == dict(zip(test, ("NORMAL", "PNEUMONIA")))
    pictures(root, ["train/COVID/a.jpeg"])
    refused("COVID/a.jpeg: expected images in NORMAL/ and PNEUMONIA/", "chest_xray_kids", root)


def frame(name, weather, *labels):
    """As in bdd100k_labels_images_train.json."""
    about = {"weather": weather, "scene": "city street", "timeofday": "night"}
    return {"name": name, "attributes": about, "timestamp": 10000, "labels": list(labels)}


def boxed(category, box, **attributes):
    corners = dict(zip(("x1", "y1", "x2", "y2"), box))
    about = {"occluded": False, **attributes}
    return {"category": category, "attributes": about, "id": 1, "box2d": corners}


LANE = {"category": "lane", "poly2d": [{"vertices": [[1, 2], [3, 4]]}], "id": 9}


def make_bdd(root):
    files = names("{:08x}-0a1b2c3d.jpg", 1, 3, 7)
    vehicle = boxed("other vehicle", (0, 0, 8, 8))
    crowd = boxed("person", (1, 1, 2, 2), crowd=True)
    train = [
        frame(files[0], "snowy", LANE, boxed("bike", (1, 2, 5, 7.5))),
        frame(files[1], "clear"),
        frame(files[2], "partly cloudy", vehicle, crowd),
        frame(files[3], "undefined"),
    ]
    sign = boxed("traffic sign", (1125.9, 133.1, 1156.9, 210.8))
    for part, frames in (("train", train), ("val", [frame("b1c66a42.jpg", "rainy", sign)])):
        content = json.dumps(frames, indent=4)
        write(root / f"labels/bdd100k_labels_images_{part}.json", content)
        pictures(root / f"images/100k/{part}", [row["name"] for row in frames])
    return files


def test_bdd(tmp_path):
    root = tmp_path / "d"
    files = [f"images/100k/train/{name}" for name in make_bdd(root)]
    parts, pretrain = convert("bdd", root)
    assert parts["val"] == {files[0]: "snowy"}
    assert parts["train"] == {files[1]: "clear", files[2]: "partly cloudy"}
    assert parts["test"] == {"images/100k/val/b1c66a42.jpg": "rainy"}
    assert files[3] in pretrain  # of undefined weather


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float64])
def test_flowers_are_read_as_scipy_writes_matlabs_format(tmp_path, compressed, kind):
    root = tmp_path / "d"
    image = "jpg/image_{:05}.jpg".format
    pictures(root, map(image, range(1, 6)))
    labels = {"labels": np.array([[77, 1, 102, 1, 77]], kind)}
    sets = {"trnid": [[5, 2]], "valid": [[4]], "tstid": [[1, 3]]}
    sets = {key: np.array(value, kind) for key, value in sets.items()}
    scipy.io.savemat(root / "imagelabels.mat", labels, do_compression=compressed)
    scipy.io.savemat(root / "setid.mat", sets, do_compression=compressed)
    parts, _ = convert("flowers", root)
    assert parts["train"] == {image(5): "077", image(2): "001"} and parts["val"] == {
        image(4): "001"
    }
    assert parts["test"] == {image(1): "077", image(3): "102"}
    (root / "setid.mat").write_bytes(b"MATLAB 4")
    refused("setid.mat: expected MATLAB 5", "flowers", root)


# ---- several labels an image ---------------------------------------------------------------------


def xray(path, **values):
    """A line of CheXpert's csv files."""
    columns = ["Path", "Sex", "No Finding", *datasets.FINDINGS, "Support Devices"]
    values = {"Path": f"CheXpert-v1.0-small/{path}", "Sex": "Female", **values}
    return columns, [values.get(name, "") for name in columns]


def write_xrays(path, *rows):
    lines = [rows[0][0], *(values for _, values in rows)]
    write(path, "".join(",".join(line) + "\n" for line in lines))


def test_chexpert(tmp_path):
    root = tmp_path / "d"
    one, other = names("patient{:05}", 1, 1)
    train = [f"train/{p}/view1_frontal.jpg" for p in (f"{one}/study1", f"{other}/study1")]
    train.append(f"train/{other}/study2/view1_frontal.jpg")
    test = "valid/patient64541/study1/view1_frontal.jpg"
    pictures(root, [*train, test])
    ones = dict.fromkeys(datasets.FINDINGS, "1.0")
    mixed = {"Edema": "-1.0", "Cardiomegaly": "0.0", "Pleural Effusion": "1.0"}
    rows = [xray(train[0], **ones), xray(train[1], **ones), xray(train[2], **mixed)]
    write_xrays(root / "train.csv", *rows)
    write_xrays(root / "valid.csv", xray(test, **ones))
    parts, _ = convert("chexpert", root)
    assert parts["val"] == {train[0]: set(ones)} and parts["test"] == {test: set(ones)}
    assert parts["train"] == {train[1]: set(ones), train[2]: {"Pleural Effusion"}}
    with pytest.raises(UserError, match="is the data set itself"):
        datasets.convert("chexpert", root, root)  # would overwrite train.csv
    write_xrays(root / "valid.csv", xray(test, **ones), xray("a/b/c.jpg", Edema="maybe"))
    refused("valid.csv, line 3: expected .*maybe", "chexpert", root)


def test_coco(tmp_path):
    root = tmp_path / "d"
    files = names("COCO_train2014_{:012}.jpg", 1, 2)
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    content = {
        "train2014": (files, [(1, 1), (1, 90), (2, 90), (2, 1), (2, 1)]),
        "val2014": (["COCO_val2014_42.jpg"], [(1, 1), (1, 90)]),
    }
    for part, (images, labels) in content.items():
        value = {"info": {"description": 'not "images": here'}}
        value["images"] = [{"id": i, "file_name": name} for i, name in enumerate(images, 1)]
        value["annotations"] = [{"image_id": i, "category_id": k} for i, k in labels]
        value["categories"] = categories
        write(root / f"annotations/instances_{part}.json", value)
        pictures(root / part, images)
    parts, _ = convert("coco_2014", root)
    both = {"person", "toothbrush"}
    train = [f"train2014/{name}" for name in files]
    assert parts["val"] == {train[0]: both} and parts["train"] == {train[1]: both, train[2]: set()}
    assert parts["test"] == {"val2014/COCO_val2014_42.jpg": both}
    os.remove(root / "val2014/COCO_val2014_42.jpg")
    refused("instances_val2014.json, images item 1: there is no .*42.jpg", "coco_2014", root)


def voc_xml(*objects):
    text = "<annotation><size><width>8</width><height>6</height></size>"
    for name, difficult, box in objects:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
        inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        text += f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        text += f"<bndbox>{inside}</bndbox><part><name>head</name></part></object>"
    return text + "</annotation>"


def make_pascal(root):
    dog = ("dog", 0, (1, 1, 8, 6))
    cat = ("cat", 0, (2, 3, 4.5, 5))
    files = [Path(f).stem for f in names("VOC2012/JPEGImages/2008_{:06}.jpg", 1, 1)]
    lists = {
        "VOC2007 trainval": {"000005": [dog, ("cat", 1, (1, 1, 3, 3))]},
        "VOC2007 test": {"000001": [cat, ("dog", 1, (1, 2, 3, 4)), dog]},
        "VOC2012 trainval": {files[0]: [dog, cat], files[1]: [cat]},
    }
    for place, images in lists.items():
        year, part = place.split()
        write(root / year / f"ImageSets/Main/{part}.txt", "\n".join(images) + "\n")
        for name, objects in images.items():
            write(root / year / f"Annotations/{name}.xml", voc_xml(*objects))
            pictures(root / year / "JPEGImages", [f"{name}.jpg"])
    return files


def test_pascal(tmp_path):
    root = tmp_path / "d"
    files = make_pascal(root)
    images = [f"VOC2012/JPEGImages/{name}.jpg" for name in files]
    parts, _ = convert("pascal", root)
    assert parts["val"] == {images[0]: {"cat", "dog"}}
    difficult = {"VOC2007/JPEGImages/000005.jpg": {"dog"}}  # the cat
    assert parts["train"] == {**difficult, images[1]: {"cat"}}
    assert parts["test"] == {"VOC2007/JPEGImages/000001.jpg": {"cat", "dog"}}
    write(root / f"VOC2012/Annotations/{files[0]}.xml", voc_xml(("unicorn", 0, (1, 1, 2, 2))))
    refused(f"{files[0]}.xml: expected xml with size and objects", "pascal", root)


@pytest.mark.parametrize("labels", ["cls", "bb"])
def test_viper(tmp_path, labels):
    """Sequences stay together; frames without labels are only pre-trained on."""
    root = tmp_path / "d"
    kinds = {0: (24, 20), 10: (24,), 20: (0, 5)}  # car and person, car, neither
    expected = {0: {"car", "person"}, 10: {"car"}, 20: set()}
    one, other = names("{:03}", 1, 1)
    wanted = {}
    for to, place, sequence in (
        ("val", "train", one),
        ("train", "train", other),
        ("test", "val", "1"),
    ):
        frames = f"{place}/img/{sequence}/{sequence}_{{:05}}.jpg"
        pictures(root, [frames.format(n) for n in (0, 1, 10, 20)])
        wanted[to] = {frames.format(n): names_of for n, names_of in expected.items()}
        for n, numbers in kinds.items():
            file = root / place / labels / sequence / f"{sequence}_{n:05}.csv"
            write(file, "".join(f"{k},7,1.5,2,3,4\n" for k in numbers))
            if labels == "cls":
                file.unlink()
                Image.fromarray(np.array([numbers], np.uint8)).save(file.with_suffix(".png"))
    parts, pretrain = convert("viper", root)
    assert parts == wanted and len(pretrain) == 8


def test_xview(tmp_path):
    """Chips are cut where they should be, labelled by the centres of boxes, kept together."""
    root = tmp_path / "d"
    tiles = {}
    for i in range(200):
        val = "val" if chosen(f"{i}.tif") else "train"
        tiles.setdefault("test" if chosen(f"test/{i}.tif", 5) else val, f"{i}.tif")
    features = []
    for tile in [*tiles.values(), "gone.tif"]:
        for kind, box in ((73, "1,5,5,13"), (18, "6,1,13,3"), (75, "0,0,1,1")):
            about = {"bounds_imcoords": box, "type_id": kind, "image_id": tile, "feature_id": 3}
            features.append({"type": "Feature", "geometry": {"x": [[1]]}, "properties": about})
    tower = {**features[0]["properties"], "image_id": tiles["train"], "type_id": 94}
    content = {"type": "FeatureCollection", "features": [*features, {"properties": tower}]}
    write(root / "xView_train.geojson", content)
    pictures(root / "train_images", tiles.values(), (17, 17))
    for tile in tiles.values():
        with Image.open(root / "train_images" / tile) as image:
            image.paste((250, 250, 250), (8, 0, 16, 8))
            image.save(root / "train_images" / tile)
    parts, _ = convert("xview", root, chip=8)
    for part, tile in tiles.items():  # the tower is in one part only
        chip = f"chips_8/{tile[:-4]}_{{}}.jpg".format
        labels = {"0_0": set(), "0_1": {"Small Car"}, "1_0": {"Building"}, "1_1": set()}
        assert parts[part] == {chip(place): kinds for place, kinds in labels.items()}
        cut = [np.asarray(Image.open(tmp_path / "out" / chip(place))) for place in labels]
        assert [c.shape for c in cut] == [(8, 8, 3)] * 4
        assert [c.mean() > 200 for c in cut] == [False, True, False, False]
    tower["type_id"] = 14
    write(root / "xView_train.geojson", {"features": [features[0], {"properties": tower}]})
    refused(
        "xView_train.geojson, features item 2: expected image_id, type_id", "xview", root, chip=8
    )


# ---- what is malformed ---------------------------------------------------------------------------


def test_json_lists_are_read_piece_by_piece(tmp_path):
    """Objects across the borders of what is read at a time, and files that end too early."""
    rows = [{"n": i, "text": ']} \\" [' * (i * 37 % 100)} for i in range(200)]
    write(tmp_path / "a.json", rows)
    write(tmp_path / "b.json", {"meta": {"rows": 3}, "rows": rows, "other": [1]})
    for file, key in (("a.json", ""), ("b.json", "rows")):
        for chunk in (1000, 4099, 2**20):
            items = datasets.json_items(tmp_path / file, key, chunk)
            assert [value for _, value in items] == rows
    for content, message in (
        (json.dumps(rows)[:-100], "item 200: broken or cut off"),
        ('[{"n": 1}, {"n": 2,}]', "item 2: broken"),
        ('{"a": 1}', "holds no json list"),
    ):
        write(tmp_path / "c.json", content)
        with pytest.raises(UserError, match=message):
            list(datasets.json_items(tmp_path / "c.json"))


def test_malformed_lists_are_named_with_their_line(tmp_path):
    root = tmp_path / "d"
    pictures(root, ["sketch/cat/a.jpg", "sketch/cat/b.jpg"])
    write(root / "sketch_test.txt", "sketch/cat/a.jpg 0\n")
    for content, message in (
        (
            "sketch/cat/a.jpg 0\n\nsketch/cat/b.jpg\n",
            "train.txt, line 3: expected sketch/CLASS/FILE",
        ),
        ("sketch/cat/b.jpg 0\nsketch/cat/c.jpg 0\n", "train.txt, line 2: there is no .*c.jpg"),
        ("sketch/cat/a.jpg 0\n", "a.jpg is in train and in test; mend the lists"),
        ("\n", "leaves no labelled image for train and val"),
    ):
        write(root / "sketch_train.txt", content)
        refused(message, "domain_net_sketch", root)
    assert not list((tmp_path / "out").iterdir())  # nothing half done
    refused("there is no .*painting_train.txt", "domain_net_painting", root)


# ---- detection -----------------------------------------------------------------------------------


def test_voc_boxes_are_cocos(tmp_path):
    root, out = tmp_path / "d", tmp_path / "out"
    make_pascal(root)
    datasets.boxes("pascal", root, out)
    train, val = data.coco(out, "train"), data.coco(out, "val")
    assert (len(train), len(val)) == (3, 1) and train.class_names == data.VOC_CLASSES[1:]
    image, target = train.read(0)
    assert image.size == (8, 6)
    assert target["boxes"].tolist() == [[0, 0, 8, 6], [0, 0, 3, 3]]  # from 1, inclusive -> edges
    assert [train.class_names[k] for k in target["labels"]] == ["dog", "cat"]
    assert not target["crowd"].any()  # difficult ones are trained on too
    target = val.read(0)[1]
    assert target["boxes"].tolist() == [[1, 2, 4.5, 5], [0, 1, 3, 4], [0, 0, 8, 6]]
    assert target["crowd"].tolist() == [False, True, False]  # difficult: not scored
    (tmp_path / "other/images").mkdir(parents=True)
    with pytest.raises(UserError, match="images is there"):
        datasets.boxes("pascal", root, tmp_path / "other")


def test_bdd_boxes_are_cocos(tmp_path):
    root, out = tmp_path / "d", tmp_path / "out"
    files = make_bdd(root)
    datasets.boxes("bdd", root, out)
    train, val = data.coco(out, "train"), data.coco(out, "val")
    assert all(os.path.exists(train.path(i)) for i in range(len(train)))
    targets = {os.path.basename(train.path(i)): train.target(i) for i in range(len(train))}
    assert targets.keys() == set(files)
    labels = [[train.class_names[k] for k in targets[name]["labels"]] for name in files]
    assert labels == [["bicycle"], [], ["car", "pedestrian"], []]  # no lane
    assert targets[files[0]]["boxes"].tolist() == [[1, 2, 5, 7.5]]
    assert not targets[files[0]]["crowd"].any() and targets[files[2]]["crowd"].all()
    assert np.allclose(val.target(0)["boxes"], [[1125.9, 133.1, 1156.9, 210.8]])
