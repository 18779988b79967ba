"""The 16 data sets of HPT (Reed et al. 2022) as they lie on disk, turned into plain files: only
this file knows 16 formats.

    python -m tools.datasets                          the table: sizes, metric, pixels, layouts
    python -m tools.datasets resisc DIR OUT           OUT/train.csv, val.csv, test.csv, pretrain.txt
    python -m tools.datasets xview DIR OUT --chip 512 also cuts satellite images: OUT/chips_512/
    python -m tools.datasets pascal DIR OUT --boxes   detection, for st.py --root OUT; also bdd

The csv files have the header path,label (a class name), or path,NAME1,NAME2,... with 0 or 1 for
data with several labels an image. pretrain.txt lists the images of train and val, labelled or not,
and never one of test (HPT's template); --stage and --unlabeled read it. Paths are absolute.

[code] is HPT's released repository, [recalled] from memory. Lists are released for resisc and
ucmerced alone. Other parts that are not official are ours: drawn by a hash of the name, which
depends on no other file, and by patient, video or satellite image where one has several images.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import struct
import xml.etree.ElementTree
import zlib
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np

import data
from util import UserError, need, run, write_atomic

PARTS = ("train", "val", "test")
VAL_IS_TEST = (("train", "train"), ("val", "test"))  # official parts without labelled test images
CHIP = 512  # pixels a side. HPT's are unknown; its detection code names xView at 512 [code]

# fmt: off
FINDINGS = (  # 5 [code]; which [recalled]: those of CheXpert's task
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion",
)
WEATHER = (  # 6 [code]; "undefined" is no class
    "clear", "foggy", "overcast", "partly cloudy", "rainy", "snowy",
)
VIPER = {  # the rows of its classes.csv that its benchmark evaluates, 23 as in HPT's head
    2: "sky", 3: "road", 4: "sidewalk", 6: "terrain", 7: "tree", 8: "vegetation", 9: "building",
    10: "infrastructure", 11: "fence", 12: "billboard", 13: "trafficlight", 14: "trafficsign",
    15: "mobilebarrier", 16: "firehydrant", 17: "chair", 18: "trash", 19: "trashcan",
    20: "person", 23: "motorcycle", 24: "car", 25: "van", 26: "bus", 27: "truck",
}
XVIEW = {
    11: "Fixed-wing Aircraft", 12: "Small Aircraft", 13: "Cargo Plane", 15: "Helicopter",
    17: "Passenger Vehicle", 18: "Small Car", 19: "Bus", 20: "Pickup Truck", 21: "Utility Truck",
    23: "Truck", 24: "Cargo Truck", 25: "Truck w/Box", 26: "Truck Tractor", 27: "Trailer",
    28: "Truck w/Flatbed", 29: "Truck w/Liquid", 32: "Crane Truck", 33: "Railway Vehicle",
    34: "Passenger Car", 35: "Cargo Car", 36: "Flat Car", 37: "Tank Car", 38: "Locomotive",
    40: "Maritime Vessel", 41: "Motorboat", 42: "Sailboat", 44: "Tugboat", 45: "Barge",
    47: "Fishing Vessel", 49: "Ferry", 50: "Yacht", 51: "Container Ship", 52: "Oil Tanker",
    53: "Engineering Vehicle", 54: "Tower Crane", 55: "Container Crane", 56: "Reach Stacker",
    57: "Straddle Carrier", 59: "Mobile Crane", 60: "Dump Truck", 61: "Haul Truck",
    62: "Scraper/Tractor", 63: "Front Loader/Bulldozer", 64: "Excavator", 65: "Cement Mixer",
    66: "Ground Grader", 71: "Hut/Tent", 72: "Shed", 73: "Building", 74: "Aircraft Hangar",
    76: "Damaged Building", 77: "Facility", 79: "Construction Site", 83: "Vehicle Lot",
    84: "Helipad", 86: "Storage Tank", 89: "Shipping Container Lot", 91: "Shipping Container",
    93: "Pylon", 94: "Tower",
}
XVIEW_UNKNOWN = (75, 82)  # of no class, in the published file
BDD_BOXED = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    "traffic light", "traffic sign",
)
BDD_OLD = {  # as BDD's toolkit maps older names
    "bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian",
    "van": "car",
}
BDD_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
VOC_LISTS = {"train": ((2007, "trainval"), (2012, "trainval")), "test": ((2007, "test"),)}  # 07+12
MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 9: "<f8"}
# fmt: on

# ---- reading -------------------------------------------------------------------------------------


def present(path, where="incomplete data set"):
    """The path, which must exist. where: what names it."""
    sentence = f"{where}: there is no {path}; python -m tools.datasets says what must be there"
    need(os.path.exists(path), sentence)
    return path


def opened(path):
    return open(present(path), newline="", encoding="utf-8-sig", errors="replace")


MALFORMED = (LookupError, TypeError, ValueError, AttributeError, SyntaxError)
MALFORMED += (struct.error, zlib.error)


@contextlib.contextmanager
def expect(what, where, content):
    """Whatever goes wrong in this block is a malformed file: one line with the place, what was
    expected and what stands there."""
    try:
        yield
    except MALFORMED:
        sentence = f"{where}: expected {what}, found {str(content)[:80]!r}"
        raise UserError(f"{sentence}; mend or re-download the file") from None


def lines(path):
    """(where, line) of the lines of a text file that are not empty."""
    with opened(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def json_items(path, key="", chunk=2**20, longest=2**26):
    """(where, object) of a list of objects in a json file: the file's own, or that under `key`. One
    at a time, since BDD's gigabyte of labels would fill the memory. chunk: characters read at once;
    longest: those of an object, so that a broken file is not read to its end."""
    begin = re.compile(rf'"{key}"\s*:\s*\[' if key else r"^\s*\[")
    between = re.compile(r"[\s,]*")
    decode = json.JSONDecoder().raw_decode
    with opened(path) as f:
        text = f.read(chunk)
        start = begin.search(text)
        while not start:
            more = f.read(chunk) if key else ""
            need(more, f"{path}: holds no json list {key}; python -m tools.datasets says more")
            text = text[-100:] + more
            start = begin.search(text)
        at = start.end()
        number = 1
        while True:
            where = f"{path}, {key} item {number}" if key else f"{path}, item {number}"
            at = between.match(text, at).end()
            if text[at : at + 1] == "]":
                return
            try:
                value, at = decode(text, at)
            except ValueError:  # cut off by the end of what has been read, or broken
                more = f.read(chunk) if len(text) - at <= longest else ""
                need(more, f"{where}: broken or cut off, {text[at : at + 60]!r}; re-download it")
                text = text[at:] + more
                at = 0
                continue
            yield where, value
            number += 1


def part_of(part, key, share=10, to="val"):
    """The part that an image goes to: of train, one in `share` keys is val."""
    if part == "train" and int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0:
        return to
    return part


def matlab(path):
    """{name: flat array} of a MATLAB 5 file with real arrays, compressed or not: enough for
    flowers, without SciPy."""
    raw = Path(present(path)).read_bytes()
    arrays = {}
    with expect("MATLAB 5 arrays", path, raw[:20]):
        if raw[126:128] != b"IM":  # little-endian
            raise ValueError
        for kind, body in matlab_elements(raw, 128):
            if kind == 15:  # compressed
                kind, body = next(matlab_elements(zlib.decompress(body), 0), (0, b""))
            if kind == 14:  # a matrix: flags, shape, name, values
                _, _, (_, name), (kind, values) = list(matlab_elements(body, 0))[:4]
                arrays[name.decode()] = np.frombuffer(values, MAT_TYPES[kind]).astype(int)
    return arrays


def matlab_elements(raw, at):
    """(type, content) of the elements from byte `at` on."""
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from("<II", raw, at)
        if kind >> 16:  # small: up to four bytes beside their own size
            yield kind & 0xFFFF, raw[at + 4 : at + 4 + (kind >> 16)]
            at += 8
        else:
            yield kind, raw[at + 8 : at + 8 + size]
            padding = 0 if kind == 15 else -size % 8
            at += 8 + size + padding


# ---- the data sets -------------------------------------------------------------------------------
# A reader takes root and, where it asks for them, name, out and chip by keyword. It yields (part,
# path, label). A label is the name of a class, a set of them (AUROC), or None: such an image is
# only pre-trained on. Its docstring is what the table prints.


def scene_lists(root, **_):
    """CLASS/CLASS_001.jpg (UC-Merced: CLASS00.tif) anywhere below; train.txt, val.txt, test.txt
    with such a file name a line, which are VTAB's splits: copy them from
    utils/raw-tf-splits/{resisc45,uc_merced} of HPT's repository [code]."""
    place = {os.path.basename(file): file for file in data.images_below(root)}
    for part in PARTS:
        for where, line in lines(f"{root}/{part}.txt"):
            with expect("CLASS_NUMBER.jpg or CLASSNUMBER.tif", where, line):
                file = os.path.basename(line.split()[0])
                label = re.fullmatch(r"(.+?)_?\d+\.\w+", file)[1]
            yield part, present(f"{root}/{place.get(file, file)}", where), label


def xview(root, out, chip, **_):
    """train_images/*.tif, xView_train.geojson. Chips of --chip pixels; what remains at the right
    and lower border is left out. A chip's labels are the classes of the boxes whose centre it
    holds. By satellite image, 1/5 is test, 1/10 of the others val. Which 36 of the 60 classes HPT
    has is unknown; here those that occur in all parts."""
    tiles = sorted(Path(present(f"{root}/train_images")).glob("*.tif"))
    labels, lost = xview_labels(root, {tile.name for tile in tiles}, chip)
    folder = Path(out, f"chips_{chip}")
    folder.mkdir(parents=True, exist_ok=True)
    for tile in tiles:
        part = part_of("train", f"test/{tile.name}", 5, "test")
        part = part_of(part, tile.name)
        image = data.read_image(tile)
        for r, c in np.ndindex(image.height // chip, image.width // chip):
            path = folder / f"{tile.stem}_{r}_{c}.jpg"
            if not path.exists():
                cut = image.crop((c * chip, r * chip, (c + 1) * chip, (r + 1) * chip))
                write_atomic(path, functools.partial(cut.save, format="JPEG", quality=95))
            yield part, str(path), labels[tile.name, r, c]
    print(f"xview: {len(tiles)} images; {lost} boxes are of others, not in train_images/")


def xview_labels(root, tiles, chip):
    """{(tile, row, column of a chip): set of classes}, number of boxes of other tiles."""
    labels = defaultdict(set)
    lost = 0
    what = "image_id, type_id and bounds_imcoords 'x0,y0,x1,y1'"
    for where, feature in json_items(f"{root}/xView_train.geojson", "features"):
        with expect(what, where, feature):
            about = feature["properties"]
            tile = about["image_id"]
            kind = int(about["type_id"])
            if kind in XVIEW_UNKNOWN or not about["bounds_imcoords"]:
                continue
            x0, y0, x1, y1 = map(float, about["bounds_imcoords"].split(","))
            label = XVIEW[kind]
        if tile in tiles:
            labels[tile, (y0 + y1) / 2 // chip, (x0 + x1) / 2 // chip].add(label)
        else:
            lost += 1
    return labels, lost


def bdd_frames(root, part):
    """(where, frame) of BDD's labels for train or val."""
    names = (f"bdd100k_labels_images_{part}", f"det_20/det_{part}", f"det_v2_{part}_release")
    files = [f"{root}/labels/{name}.json" for name in names]
    return json_items(next(filter(os.path.exists, files), files[0]))


def bdd(root, **_):
    """images/100k/{train,val}/*.jpg, labels/bdd100k_labels_images_{train,val}.json (or
    det_20/det_*.json, det_v2_*_release.json). The weather; where it is undefined, an image is only
    pre-trained on. Official val is test, 1/7 of train is val: 10k of 70k [recalled]."""
    for part, to in VAL_IS_TEST:
        for where, frame in bdd_frames(root, part):
            with expect(f"name and attributes with weather, one of {WEATHER}", where, frame):
                name = frame["name"]
                label = frame["attributes"]["weather"]
                if label not in (*WEATHER, "undefined"):
                    raise ValueError
            if label == "undefined":
                label = None
            yield part_of(to, name, 7), present(f"{root}/images/100k/{part}/{name}", where), label


def viper(root, **_):
    """{train,val}/img/SEQUENCE/*.jpg, {train,val}/cls/SEQUENCE/*.png with a class index per pixel,
    whose classes are the labels; without train/cls, the first column of
    {train,val}/bb/SEQUENCE/*.csv (fewer classes). Frames without a file there (cls may hold every
    tenth) are only pre-trained on. Official val is test, 1/10 of train's sequences are val. From
    how many pixels on HPT counts a class is unknown; here from one."""
    masks = os.path.isdir(f"{root}/train/cls")
    for part, to in VAL_IS_TEST:
        for image in data.images_below(present(f"{root}/{part}/img")):
            stem = os.path.splitext(image)[0]
            if masks:
                kinds = mask_kinds(f"{root}/{part}/cls/{stem}.png")
            else:
                kinds = box_kinds(f"{root}/{part}/bb/{stem}.csv")
            label = None
            if kinds is not None:
                label = {VIPER[k] for k in kinds if k in VIPER}
            yield part_of(to, os.path.dirname(image)), f"{root}/{part}/img/{image}", label


def mask_kinds(file):
    """The class numbers in a mask of VIPER, None if there is no such file."""
    if os.path.exists(file):
        return np.unique(data.read_mask(file, 32)).tolist()
    return None


def box_kinds(file):
    """The same of a list of boxes."""
    if not os.path.exists(file):
        return None
    kinds = set()
    for where, line in lines(file):
        with expect("CLASS,INSTANCE,...", where, line):
            kinds.add(int(line.split(",")[0]))
    return kinds


def chexpert(root, **_):
    """train.csv, valid.csv, and the images they name (.../train/patient00001/study1/
    view1_frontal.jpg) without the first folder. 5 findings; empty, 0 and uncertain (-1) are 0
    [code]. Official valid is test, 1/10 of train's patients are val."""
    value = {"": False, "0": False, "-1": False, "1": True}
    what = f"Path and {', '.join(FINDINGS)}, each 1, 0, -1 or empty"
    for part, to in (("train", "train"), ("valid", "test")):
        with opened(f"{root}/{part}.csv") as f:
            reader = csv.DictReader(f)
            for row in reader:
                where = f"{root}/{part}.csv, line {reader.line_num}"
                with expect(what, where, [row.get(k) for k in ("Path", *FINDINGS)]):
                    path = row["Path"].split("/", 1)[1]
                    patient = path.split("/")[1]
                    label = {k for k in FINDINGS if value[row[k].strip().removesuffix(".0")]}
                yield part_of(to, patient), present(f"{root}/{path}", where), label


def kids(root, **_):
    """{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg (Kermany's chest_xray; val/ may be missing). The
    16 images of val/ are too few to choose by: they join train, of whose patients, by the numbers
    in the names, 1/10 are val."""
    for part, to in (("train", "train"), ("val", "train"), ("test", "test")):
        folder = f"{root}/{part}"
        if part != "val":
            present(folder)
        for image in data.images_below(folder):
            label, name = os.path.split(image)
            sentence = f"{folder}/{image}: expected images in NORMAL/ and PNEUMONIA/; move it away"
            need(label in ("NORMAL", "PNEUMONIA"), sentence)
            patient = re.match(r"person\d+|NORMAL2-IM-\d+|[A-Z]+-\d+|.*", name)[0]
            yield part_of(to, patient), f"{folder}/{image}", label


def coco(root, **_):
    """annotations/instances_{train,val}2014.json, train2014/, val2014/. The categories of all
    objects, crowds too. Official val is test, 1/10 of train is val."""
    for part, to in (("train2014", "train"), ("val2014", "test")):
        file = f"{root}/annotations/instances_{part}.json"
        names = {}
        for where, category in json_items(file, "categories"):
            with expect("id and name", where, category):
                names[category["id"]] = category["name"]
        labels = defaultdict(set)
        for where, row in json_items(file, "annotations"):
            with expect("image_id and a known category_id", where, row):
                labels[row["image_id"]].add(names[row["category_id"]])
        for where, image in json_items(file, "images"):
            with expect("id and file_name", where, image):
                name = image["file_name"]
                label = labels[image["id"]]
            yield part_of(to, name), present(f"{root}/{part}/{name}", where), label


def voc_objects(root, part):
    """(image, relative to root; (w, h); [(class, difficult, x0, y0, x1, y1)]) of VOC's images, in
    pixels: VOC counts them from 1 and its boxes include the last."""
    for year, name in VOC_LISTS[part]:
        for where, line in lines(f"{root}/VOC{year}/ImageSets/Main/{name}.txt"):
            file = present(f"{root}/VOC{year}/Annotations/{line}.xml", where)
            text = Path(file).read_text(errors="replace")
            with expect("xml with size and objects with name, difficult and bndbox", file, text):
                tree = xml.etree.ElementTree.fromstring(text)
                objects = [voc_object(node) for node in tree.findall("object")]
                size = tuple(int(tree.find("size").findtext(k)) for k in ("width", "height"))
            yield f"VOC{year}/JPEGImages/{line}.jpg", size, objects


def voc_object(node):
    name = node.findtext("name")
    if name not in data.VOC_CLASSES[1:]:
        raise ValueError(name)
    difficult = bool(int(node.findtext("difficult") or 0))
    box = node.find("bndbox")
    x0, y0, x1, y1 = (float(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
    return name, difficult, x0 - 1, y0 - 1, x1, y1


def pascal(root, **_):
    """VOC2007/ and VOC2012/ with JPEGImages/, Annotations/, ImageSets/Main/{trainval,test}.txt. A
    class counts where it has an object that is not difficult [code]. test2007 is test, 1/10 of the
    two trainval is val."""
    for to in VOC_LISTS:
        for file, _, objects in voc_objects(root, to):
            label = {name for name, difficult, *_ in objects if not difficult}
            yield part_of(to, file), present(f"{root}/{file}"), label


def domain_net(root, name, **_):
    """DOMAIN/CLASS/*.jpg, DOMAIN_train.txt, DOMAIN_test.txt with `DOMAIN/CLASS/FILE NUMBER` a line.
    1/10 of train is val."""
    domain = name.removeprefix("domain_net_")
    for part in ("train", "test"):
        for where, line in lines(f"{root}/{domain}_{part}.txt"):
            with expect(f"{domain}/CLASS/FILE NUMBER", where, line):
                path, number = line.rsplit(" ", 1)
                _, label, _ = path.split("/")
                int(number)
            yield part_of(part, path), present(f"{root}/{path}", where), label


def flowers(root, **_):
    """jpg/image_00001.jpg, ..., imagelabels.mat, setid.mat (Oxford 102). The official parts;
    classes are numbers."""
    labels = matlab(f"{root}/imagelabels.mat")
    parts = matlab(f"{root}/setid.mat")
    for part, key in zip(PARTS, ("trnid", "valid", "tstid")):
        what = f"'labels' in imagelabels.mat, numbers of images in '{key}' of setid.mat"
        with expect(what, root, [*labels, *parts]):
            classes = [(i, f"{labels['labels'][i - 1]:03d}") for i in parts[key]]
        for i, label in classes:
            yield part, present(f"{root}/jpg/image_{i:05d}.jpg", f"{root}/setid.mat"), label


# fmt: off
Source = namedtuple("Source", "read images classes metric")
SOURCES = {  # images: of all official parts, [recalled] but for resisc and ucmerced; classes and
    # metric as in [code], but kids' classes; viper's images are about so many
    "resisc":               Source(scene_lists, 31_500,  45,  "top-1"),
    "ucmerced":             Source(scene_lists, 2_100,   21,  "top-1"),
    "xview":                Source(xview,       846,     36,  "AUROC"),
    "bdd":                  Source(bdd,         100_000, 6,   "top-1"),
    "viper":                Source(viper,       254_000, 23,  "AUROC"),
    "chexpert":             Source(chexpert,    224_316, 5,   "AUROC"),
    "chest_xray_kids":      Source(kids,        5_856,   2,   "top-1"),
    "coco_2014":            Source(coco,        123_287, 80,  "AUROC"),
    "pascal":               Source(pascal,      21_503,  20,  "AUROC"),
    "domain_net_clipart":   Source(domain_net,  48_129,  345, "top-1"),
    "domain_net_infograph": Source(domain_net,  51_605,  345, "top-1"),
    "domain_net_painting":  Source(domain_net,  72_266,  345, "top-1"),
    "domain_net_quickdraw": Source(domain_net,  172_500, 345, "top-1"),
    "domain_net_real":      Source(domain_net,  172_947, 345, "top-1"),
    "domain_net_sketch":    Source(domain_net,  69_128,  345, "top-1"),
    "flowers":              Source(flowers,     8_189,   102, "top-1"),
}
PIXELS = {  # mean and deviation of RGB in 0..1 [code]
    "resisc":               ((0.3680, 0.3810, 0.3436), (0.2035, 0.1854, 0.1849)),
    "ucmerced":             ((0.4842, 0.4901, 0.4505), (0.2180, 0.2021, 0.1958)),
    "xview":                ((0.3680, 0.3810, 0.3436), (0.2035, 0.1854, 0.1849)),  # as resisc
    "bdd":                  ((0.2789, 0.2929, 0.2902), (0.2474, 0.2653, 0.2761)),
    "viper":                ((0.3485, 0.3422, 0.3395), (0.2449, 0.2408, 0.2390)),
    "chexpert":             ((0.5028, 0.5028, 0.5028), (0.2919, 0.2919, 0.2919)),
    "chest_xray_kids":      ((0.4815, 0.4815, 0.4815), (0.2377, 0.2377, 0.2377)),
    "coco_2014":            ((0.4702, 0.4470, 0.4076), (0.2785, 0.2740, 0.2889)),
    "pascal":               ((0.4511, 0.4292, 0.3967), (0.2764, 0.2729, 0.2849)),
    "domain_net_clipart":   ((0.7362, 0.7167, 0.6834), (0.3642, 0.3654, 0.3887)),
    "domain_net_infograph": ((0.6888, 0.6970, 0.6648), (0.3331, 0.3094, 0.3281)),
    "domain_net_painting":  ((0.5743, 0.5466, 0.5083), (0.3088, 0.3007, 0.3168)),
    "domain_net_quickdraw": ((0.9525, 0.9525, 0.9525), (0.2128, 0.2128, 0.2128)),
    "domain_net_real":      ((0.6059, 0.5890, 0.5558), (0.3344, 0.3279, 0.3493)),
    "domain_net_sketch":    ((0.8327, 0.8270, 0.8179), (0.2727, 0.2753, 0.2810)),
    "flowers":              ((0.4355, 0.3777, 0.2880), (0.2970, 0.2459, 0.2705)),
}
# fmt: on


# ---- writing -------------------------------------------------------------------------------------


def convert(name, root, out, chip=CHIP):
    """Reads the data set `name` at root and writes OUT's three csv files and pretrain.txt ->
    {part: labelled images}. Of several labels an image, those that occur in all parts are kept:
    AUROC needs both kinds of images. UserError naming file and line where the data set is not as
    expected."""
    out = out_folder(out, root)
    root = os.path.abspath(root)
    source = SOURCES[name]
    rows = list(source.read(root, name=name, out=out, chip=chip))
    check_apart(rows, root)
    parts = {part: [] for part in PARTS}  # (path, label) of the labelled images
    for part, path, label in rows:
        if label is not None:
            parts[part].append((path, label))
    empty = [part for part in PARTS if not parts[part]]
    need(not empty, f"{root} leaves no labelled image for {' and '.join(empty)}; is it complete?")
    several = source.metric == "AUROC"
    names = class_names(parts, several)
    need(names, f"{root} has no class that occurs in all of {', '.join(PARTS)}; is it complete?")

    for part in PARTS:
        content = csv_rows(parts[part], names, several)
        write_atomic(out / f"{part}.csv", functools.partial(write_csv, rows=content))
    pretrain = [path for part, path, _ in rows if part != "test"]
    listing = "".join(f"{path}\n" for path in pretrain)
    write_atomic(out / "pretrain.txt", lambda p: p.write_text(listing))
    count = {part: len(parts[part]) for part in PARTS}
    counts = ", ".join(f"{part} {n}" for part, n in count.items())
    print(
        f"{out}: {counts} images, {len(pretrain)} for pre-training, {len(names)} classes "
        f"(HPT: {source.classes}; the whole data set: {source.images:,} images)"
    )
    return count


def out_folder(out, root):
    Path(out).mkdir(parents=True, exist_ok=True)
    sentence = f"{out} is the data set itself, whose files would be overwritten; give another OUT"
    need(not os.path.samefile(out, root), sentence)
    return Path(os.path.abspath(out))


def check_apart(rows, root):
    first = {}
    for part, path, _ in rows:
        before = first.setdefault(path, part)
        need(before == part, f"{path} is in {before} and in {part}; mend the lists in {root}")


def class_names(parts, several):
    """Sorted: all classes, or of several labels an image those that occur in all parts."""
    if not several:
        return sorted({label for rows in parts.values() for _, label in rows})
    occurring = [set().union(*(label for _, label in rows)) for rows in parts.values()]
    return sorted(set.intersection(*occurring))


def csv_rows(labelled, names, several):
    if not several:
        return [("path", "label"), *labelled]
    rows = [("path", *names)]
    for path, label in labelled:
        rows.append((path, *(int(name in label) for name in names)))
    return rows


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


# ---- detection -----------------------------------------------------------------------------------


def pascal_boxes(root, part):
    """(file, (w, h), [(class, ignored, x0, y0, x1, y1)]). Difficult objects are trained on like any
    other, as in detectron2; in val.json they are iscrowd: whether they are found does not count,
    nearly as in VOC's evaluation (a crowd, for COCO, may hold several detections, and what counts
    is the share of each inside it)."""
    official = {"train": "train", "val": "test"}[part]
    for file, size, objects in voc_objects(root, official):
        if part == "train":
            objects = [(name, False, *box) for name, _, *box in objects]
        yield file, size, objects


def bdd_boxes(root, part):
    """The same of BDD's labels with a box2d; iscrowd is what its toolkit ignores: people, vehicles
    and trailers of no class, and crowds [recalled]."""
    for where, frame in bdd_frames(root, part):
        with expect("name and labels", where, frame):
            name = frame["name"]
            labels = [v for v in frame.get("labels") or () if v.get("box2d")]  # lanes have none
        objects = []
        for label in labels:
            with expect("category and box2d with x1, y1, x2, y2", where, label):
                kind = BDD_OLD.get(label["category"], label["category"])
                crowd = (label.get("attributes") or {}).get("crowd", False)
                ignored = kind in BDD_IGNORED or crowd
                box = [float(label["box2d"][k]) for k in ("x1", "y1", "x2", "y2")]
                kind = BDD_IGNORED.get(kind, kind)
                if kind not in BDD_BOXED:
                    raise ValueError
                objects.append((kind, ignored, *box))
        present(f"{root}/images/100k/{part}/{name}", where)
        yield f"{part}/{name}", (1280, 720), objects  # all images have this size


# name: reader, classes, the folder of the images
BOXES = {
    "pascal": (pascal_boxes, data.VOC_CLASSES[1:], ""),
    "bdd": (bdd_boxes, BDD_BOXED, "images/100k"),
}


def boxes(name, root, out):
    """Writes OUT/train.json and OUT/val.json in COCO's format, and OUT/images as a link to the data
    set's. VOC 07+12: trainval and test2007; BDD: official train and val [code]."""
    read, classes, folder = BOXES[name]
    out = out_folder(out, root)
    root = os.path.abspath(root)
    images = present(os.path.join(root, folder))
    link = out / "images"
    if not link.exists():
        link.symlink_to(images)
    same = os.path.samefile(link, images)
    need(same, f"{link} is there and not the images of {root}; give another OUT")
    for part in ("train", "val"):
        write_coco(out / f"{part}.json", read(root, part), classes)


def write_coco(path, frames, classes):
    """Annotation by annotation: BDD has more than a million."""
    images = []
    count = 0

    def write(temporary):
        nonlocal count
        with open(temporary, "w") as f:
            f.write('{"annotations": [')
            for file, (w, h), objects in frames:
                images.append({"id": len(images) + 1, "file_name": file, "width": w, "height": h})
                for kind, ignored, *box in objects:
                    f.write(",\n" if count else "\n")
                    count += 1
                    label = classes.index(kind) + 1
                    f.write(json.dumps(coco_row(count, len(images), label, ignored, *box)))
            named = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
            f.write(f'],\n"images": {json.dumps(images)},\n"categories": {json.dumps(named)}}}\n')

    write_atomic(path, write)
    print(f"{path}: {len(images)} images, {count} boxes of {len(classes)} classes")


def coco_row(number, image_id, category, ignored, x0, y0, x1, y1):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": int(ignored),
    }


# ---- command line --------------------------------------------------------------------------------


def table():
    """The 16 rows as text, and what every reader expects."""
    text = [f"{'name':22}{'images':>8}{'classes':>9}  metric  {'mean':22}deviation"]
    for name, source in SOURCES.items():
        mean, std = (" ".join(f"{value:.4f}" for value in row) for row in PIXELS[name])
        numbers = f"{source.images:8,}{source.classes:9}"
        text.append(f"{name:22}{numbers}  {source.metric:8}{mean}  {std}")
    for read in dict.fromkeys(source.read for source in SOURCES.values()):
        names = [name for name, source in SOURCES.items() if source.read is read]
        text.append(f"\n{', '.join(names)}\n    {read.__doc__}")
    return "\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    parser.add_argument("name", nargs="?", choices=SOURCES)
    parser.add_argument("dir", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--chip", type=int, default=CHIP, help="side of xview's chips in pixels")
    parser.add_argument(
        "--boxes", action="store_true", help="pascal, bdd: detection, COCO's format"
    )
    args = parser.parse_args(argv)
    if not args.name:
        print(table())
        return
    there = args.out and os.path.isdir(args.dir)
    command = f"python -m tools.datasets {args.name} DIR OUT"
    need(there, f"{args.dir} is no folder, or OUT is missing; {command}")
    need(args.chip > 0, f"--chip {args.chip} is no size in pixels; give one above 0")
    known = args.name in BOXES or not args.boxes
    need(known, f"--boxes is for {' and '.join(BOXES)}, not {args.name}")
    try:
        if args.boxes:
            boxes(args.name, args.dir, args.out)
        else:
            convert(args.name, args.dir, args.out, args.chip)
    except (data.BadImage, OSError) as error:  # OSError: no rights, a folder where a file should be
        raise UserError(f"{error}; check DIR and OUT") from None


if __name__ == "__main__":
    run(main)
