"""The 16 datasets of HPT (Reed et al. 2022) as they lie on disk, turned into plain files: only this file knows 16 formats.

    python sources.py                            the table: sizes, metric, pixels, the layout expected at DIR, the split
    python sources.py resisc DIR OUT             writes OUT/train.csv, val.csv, test.csv and pretrain.txt
    python sources.py xview DIR OUT --chip 512   also cuts the satellite images into OUT/chips_512/
    python sources.py pascal DIR OUT --boxes     detection, for st.py --data coco --root OUT; also bdd

The csv files have the header path,label (a class name), or path,NAME1,NAME2,... with 0 or 1 for data with several labels an
image. pretrain.txt lists the images of train and val, labelled or not, and never one of test (HPT's template); --stage and
--unlabeled read it. Paths are absolute.

[code] is HPT's released repository, [recalled] from memory. Lists are released for resisc and ucmerced alone: other parts that
are not official are ours, drawn by a hash of the name, which depends on no other file, and by patient, video or satellite image
where there are several images of one.
"""
import argparse
import contextlib
import csv
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
import runs
import voc
from util import UserError, run

PARTS = ("train", "val", "test")
CHIP = 512  # pixels a side. HPT's are unknown; a comment in its detection code names annotations of xView at 512 [code]
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # 5 [code], which [recalled]: its task's
WEATHER = ("clear", "foggy", "overcast", "partly cloudy", "rainy", "snowy")  # and "undefined", which is no class: 6 [code]
# The rows of VIPER's classes.csv that its benchmark evaluates, 23 as in HPT's head.
VIPER = dict(zip((2, 3, 4, *range(6, 21), *range(23, 28)), (
    "sky road sidewalk terrain tree vegetation building infrastructure fence billboard trafficlight trafficsign mobilebarrier "
    "firehydrant chair trash trashcan person motorcycle car van bus truck").split()))
XVIEW = dict(re.findall(r"(\d+) ([^,]+)", """11 Fixed-wing Aircraft,12 Small Aircraft,13 Cargo Plane,15 Helicopter,
    17 Passenger Vehicle,18 Small Car,19 Bus,20 Pickup Truck,21 Utility Truck,23 Truck,24 Cargo Truck,25 Truck w/Box,
    26 Truck Tractor,27 Trailer,28 Truck w/Flatbed,29 Truck w/Liquid,32 Crane Truck,33 Railway Vehicle,34 Passenger Car,
    35 Cargo Car,36 Flat Car,37 Tank Car,38 Locomotive,40 Maritime Vessel,41 Motorboat,42 Sailboat,44 Tugboat,45 Barge,
    47 Fishing Vessel,49 Ferry,50 Yacht,51 Container Ship,52 Oil Tanker,53 Engineering Vehicle,54 Tower Crane,
    55 Container Crane,56 Reach Stacker,57 Straddle Carrier,59 Mobile Crane,60 Dump Truck,61 Haul Truck,62 Scraper/Tractor,
    63 Front Loader/Bulldozer,64 Excavator,65 Cement Mixer,66 Ground Grader,71 Hut/Tent,72 Shed,73 Building,74 Aircraft Hangar,
    76 Damaged Building,77 Facility,79 Construction Site,83 Vehicle Lot,84 Helipad,86 Storage Tank,89 Shipping Container Lot,
    91 Shipping Container,93 Pylon,94 Tower"""))
BDD_BOXED = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign")
BDD_OLD = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}  # as BDD's toolkit
BDD_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}                      # maps them


# ---- reading -----------------------------------------------------------------------------------------------------

def present(path, where="incomplete dataset"):
    if not os.path.exists(path):
        raise UserError(f"{where}: there is no {path}; python sources.py says what the folder must hold")
    return path


def opened(path):
    return open(present(path), newline="", encoding="utf-8-sig", errors="replace")


@contextlib.contextmanager
def expect(what, where, found):
    """Whatever goes wrong in this block is a malformed file: one line with the place, what was expected and what found."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, struct.error, zlib.error):
        raise UserError(f"{where}: expected {what}, found {str(found)[:80]!r}; mend or re-download the file") from None


def lines(path):
    """(where, line) of the lines of a text file that are not empty."""
    with opened(path) as f:
        yield from ((f"{path}, line {n}", line.strip()) for n, line in enumerate(f, 1) if line.strip())


def each(path, key=""):
    """(where, object) of a list of objects in a json file: the file's own, or that under `key`. One at a time, since BDD's
    gigabyte of labels would fill the memory."""
    begin, decode, number = re.compile(rf'"{key}"\s*:\s*\[' if key else r"^\s*\["), json.JSONDecoder().raw_decode, 1
    with opened(path) as f:
        text = f.read(2 ** 20)
        while not (found := begin.search(text)):
            if not key or not (more := f.read(2 ** 20)):
                raise UserError(f"{path}: holds no json list {key}; python sources.py says what is expected")
            text = text[-100:] + more
        at, where = found.end(), f"{path}, {key} item" if key else f"{path}, item"
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()
            if text[at:at + 1] == "]":
                return
            try:
                value, at = decode(text, at)
            except ValueError:  # cut off by the end of what has been read, or broken
                if len(text) - at > 2 ** 26 or not (more := f.read(2 ** 20)):
                    raise UserError(f"{where} {number}: broken or cut off, {text[at:at + 60]!r}; re-download it")
                text, at = text[at:] + more, 0
                continue
            yield f"{where} {number}", value
            number += 1


def part_of(part, key, share=10, to="val"):
    """The part that an image goes to: of train, one in `share` keys is val."""
    return to if part == "train" and int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0 else part


def mat(path):
    """{name: flat array} of a MATLAB 5 file with real arrays, compressed or not: enough for flowers, without SciPy."""
    def elements(raw, at):
        while at + 8 <= len(raw):
            kind, size = struct.unpack_from("<II", raw, at)
            if kind >> 16:  # small: up to four bytes beside their own size
                yield kind & 0xffff, raw[at + 4:at + 4 + (kind >> 16)]
                at += 8
            else:
                yield kind, raw[at + 8:at + 8 + size]
                at += 8 + size + (-size % 8 if kind != 15 else 0)

    raw, arrays = Path(present(path)).read_bytes(), {}
    with expect("MATLAB 5 arrays", path, raw[:20]):
        if raw[126:128] != b"IM":  # little-endian
            raise ValueError
        for kind, body in elements(raw, 128):
            if kind == 15:
                kind, body = next(elements(zlib.decompress(body), 0), (0, b""))
            if kind == 14:  # a matrix: flags, shape, name, values
                _, _, (_, name), (kind, values) = list(elements(body, 0))[:4]
                arrays[name.decode()] = np.frombuffer(values, {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4",
                                                               9: "<f8"}[kind]).astype(int)
    return arrays


# ---- the datasets ------------------------------------------------------------------------------------------------
# A reader gets (root, name, OUT, chip) and yields (part, path, label). A label is the name of a class, a set of them (AUROC), or
# None: such an image is only pre-trained on. Its docstring is what the table prints.

def scene_lists(root, *_):
    """CLASS/CLASS_001.jpg (UC-Merced: CLASS00.tif) anywhere below; train.txt, val.txt, test.txt with such a file name a line,
    which are VTAB's splits: copy them from utils/raw-tf-splits/{resisc45,uc_merced} of HPT's repository [code]."""
    place = {os.path.basename(f): f for f in data.images_below(root)}
    for part in PARTS:
        for where, line in lines(f"{root}/{part}.txt"):
            with expect("CLASS_NUMBER.jpg or CLASSNUMBER.tif", where, line):
                name = os.path.basename(line.split()[0])
                label = re.fullmatch(r"(.+?)_?\d+\.\w+", name)[1]
            yield part, present(f"{root}/{place.get(name, name)}", where), label


def xview(root, _, out, chip):
    """train_images/*.tif, xView_train.geojson. Chips of --chip pixels; rests at the right and lower border are left out. A chip's
    labels are the classes of the boxes whose centre it holds. By satellite image, 1/5 is test, 1/10 of the rest val. Which
    36 of the 60 classes HPT has is unknown; here those that occur in all parts."""
    tiles, chips = sorted(Path(present(f"{root}/train_images")).glob("*.tif")), Path(out, f"chips_{chip}")
    found, lost = {tile.name: defaultdict(set) for tile in tiles}, 0
    for where, feature in each(f"{root}/xView_train.geojson", "features"):
        with expect("image_id, type_id and bounds_imcoords 'x0,y0,x1,y1'", where, feature):
            about = feature["properties"]
            kind, tile = str(int(about["type_id"])), about["image_id"]
            if kind in ("75", "82") or not about["bounds_imcoords"]:  # of no class, in the published file
                continue
            x0, y0, x1, y1 = map(float, about["bounds_imcoords"].split(","))
            label = XVIEW[kind]
        lost += tile not in found
        if tile in found:
            found[tile][int((y0 + y1) / 2 // chip), int((x0 + x1) / 2 // chip)].add(label)
    chips.mkdir(parents=True, exist_ok=True)
    for tile in tiles:
        part = part_of(part_of("train", f"test/{tile.name}", 5, "test"), tile.name)
        image = data.read_image(tile)
        for r, c in np.ndindex(image.height // chip, image.width // chip):
            path = chips / f"{tile.stem}_{r}_{c}.jpg"
            if not path.exists():
                cut = image.crop((c * chip, r * chip, (c + 1) * chip, (r + 1) * chip))
                runs.write_atomic(path, lambda p: cut.save(p, "JPEG", quality=95))
            yield part, str(path), found[tile.name].get((r, c), set())
    print(f"xview: {len(tiles)} images; {lost} boxes are of others, which are not in train_images/")


def bdd_frames(root, part):
    """(where, frame) of BDD's labels for train or val."""
    files = [f"{root}/labels/{f}.json" for f in (f"bdd100k_labels_images_{part}", f"det_20/det_{part}", f"det_v2_{part}_release")]
    return each(next(filter(os.path.exists, files), files[0]))


def bdd(root, *_):
    """images/100k/{train,val}/*.jpg, labels/bdd100k_labels_images_{train,val}.json (or det_20/det_*.json, det_v2_*_release.json).
    The weather; where it is undefined, an image is only pre-trained on. Official val is test, 1/7 of train is val: 10k of 70k
    [recalled]."""
    for part, to in (("train", "train"), ("val", "test")):
        for where, frame in bdd_frames(root, part):
            with expect(f"name and attributes with weather, one of {WEATHER}", where, frame):
                weather, name = frame["attributes"]["weather"], frame["name"]
                label = None if weather == "undefined" else WEATHER[WEATHER.index(weather)]
            yield part_of(to, name, 7), present(f"{root}/images/100k/{part}/{name}", where), label


def viper(root, *_):
    """{train,val}/img/SEQUENCE/*.jpg, {train,val}/cls/SEQUENCE/*.png with a class index per pixel, whose classes are the labels;
    without train/cls, the first column of {train,val}/bb/SEQUENCE/*.csv (fewer classes). Frames without a file there (cls may
    hold every tenth) are only pre-trained on. Official val is test, 1/10 of train's sequences are val. From how many pixels on
    HPT counts a class is unknown; here from one."""
    masks = os.path.isdir(f"{root}/train/cls")
    for part, to in (("train", "train"), ("val", "test")):
        for image in data.images_below(present(f"{root}/{part}/img")):
            stem, label = os.path.splitext(image)[0], None
            file = f"{root}/{part}/cls/{stem}.png" if masks else f"{root}/{part}/bb/{stem}.csv"
            if os.path.exists(file):
                kinds = np.unique(voc.read_mask(file, 32)).tolist() if masks else set()
                for where, line in () if masks else lines(file):
                    with expect("CLASS,INSTANCE,...", where, line):
                        kinds.add(int(line.split(",")[0]))
                label = {VIPER[k] for k in kinds if k in VIPER}
            yield part_of(to, os.path.dirname(image)), f"{root}/{part}/img/{image}", label


def chexpert(root, *_):
    """train.csv, valid.csv, and the images they name (.../train/patient00001/study1/view1_frontal.jpg) without the first folder.
    5 findings; empty, 0 and uncertain (-1) are 0 [code]. Official valid is test, 1/10 of train's patients are val."""
    for part, to in (("train", "train"), ("valid", "test")):
        with opened(f"{root}/{part}.csv") as f:
            for row in (reader := csv.DictReader(f)):
                where = f"{root}/{part}.csv, line {reader.line_num}"
                found = [*map(row.get, ("Path", *FINDINGS))]
                with expect(f"Path and {', '.join(FINDINGS)}, each 1, 0, -1 or empty", where, found):
                    path = row["Path"].split("/", 1)[1]
                    label = {k for k in FINDINGS if {"": 0, "0": 0, "-1": 0, "1": 1}[row[k].strip().removesuffix(".0")]}
                    patient = path.split("/")[1]
                yield part_of(to, patient), present(f"{root}/{path}", where), label


def kids(root, *_):
    """{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg (Kermany's chest_xray; val/ may be missing). The 16 images of val/ are too few
    to choose by: they join train, of whose patients, by the numbers in the names, 1/10 are val."""
    for part in PARTS:
        folder = f"{root}/{part}"
        for image in data.images_below(folder if part == "val" else present(folder)):
            label, name = os.path.split(image)
            if label not in ("NORMAL", "PNEUMONIA"):
                raise UserError(f"{folder}/{image}: expected images in NORMAL/ and PNEUMONIA/; move it away")
            patient = re.match(r"person\d+|NORMAL2-IM-\d+|[A-Z]+-\d+|.*", name)[0]
            yield part_of(part.replace("val", "train"), patient), f"{folder}/{image}", label


def coco(root, *_):
    """annotations/instances_{train,val}2014.json, train2014/, val2014/. The categories of all objects, crowds too. Official val
    is test, 1/10 of train is val."""
    for part, to in (("train2014", "train"), ("val2014", "test")):
        file, found, names = f"{root}/annotations/instances_{part}.json", defaultdict(set), {}
        for where, category in each(file, "categories"):
            with expect("id and name", where, category):
                names[category["id"]] = category["name"]
        for where, thing in each(file, "annotations"):
            with expect("image_id and a known category_id", where, thing):
                found[thing["image_id"]].add(names[thing["category_id"]])
        for where, image in each(file, "images"):
            with expect("id and file_name", where, image):
                name, label = image["file_name"], found.get(image["id"], set())
            yield part_of(to, name), present(f"{root}/{part}/{name}", where), label


VOC_LISTS = {"train": ((2007, "trainval"), (2012, "trainval")), "test": ((2007, "test"),)}  # VOC 07+12


def voc_objects(root, part):
    """(image, relative to root; (w, h); [(class number, difficult, x0, y0, x1, y1)]) of VOC's images, in pixels: VOC counts them
    from 1 and its boxes include the last."""
    for year, name in VOC_LISTS[part]:
        for where, line in lines(f"{root}/VOC{year}/ImageSets/Main/{name}.txt"):
            text = Path(file := present(f"{root}/VOC{year}/Annotations/{line}.xml", where)).read_text(errors="replace")
            with expect("xml with size and objects with name, difficult and bndbox", file, text):
                tree, objects = xml.etree.ElementTree.fromstring(text), []
                for thing in tree.findall("object"):
                    x0, y0, x1, y1 = (float(thing.find("bndbox").findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
                    objects.append((voc.VOC_CLASSES.index(thing.findtext("name")), bool(int(thing.findtext("difficult") or 0)),
                                    x0 - 1, y0 - 1, x1, y1))
                size = tuple(int(tree.find("size").findtext(k)) for k in ("width", "height"))
            yield f"VOC{year}/JPEGImages/{line}.jpg", size, objects


def pascal(root, *_):
    """VOC2007/ and VOC2012/ with JPEGImages/, Annotations/, ImageSets/Main/{trainval,test}.txt. A class counts where it has an
    object that is not difficult [code]. test2007 is test, 1/10 of the two trainval is val."""
    for to in VOC_LISTS:
        for file, _, objects in voc_objects(root, to):
            label = {voc.VOC_CLASSES[k] for k, difficult, *_ in objects if not difficult}
            yield part_of(to, file), present(f"{root}/{file}"), label


def domain_net(root, name, *_):
    """DOMAIN/CLASS/*.jpg, DOMAIN_train.txt, DOMAIN_test.txt with `DOMAIN/CLASS/FILE NUMBER` a line. 1/10 of train is val."""
    domain = name.removeprefix("domain_net_")
    for part in ("train", "test"):
        for where, line in lines(f"{root}/{domain}_{part}.txt"):
            with expect(f"{domain}/CLASS/FILE NUMBER", where, line):
                path, number = line.rsplit(" ", 1)
                (_, label, _), _ = path.split("/"), int(number)
            yield part_of(part, path), present(f"{root}/{path}", where), label


def flowers(root, *_):
    """jpg/image_00001.jpg, ..., imagelabels.mat, setid.mat (Oxford 102). The official parts; classes are numbers."""
    labels, parts = mat(f"{root}/imagelabels.mat"), mat(f"{root}/setid.mat")
    for part, key in zip(PARTS, ("trnid", "valid", "tstid")):
        with expect(f"'labels' in imagelabels.mat, numbers of images in '{key}' of setid.mat", root, [*labels, *parts]):
            some = [(f"{root}/jpg/image_{i:05d}.jpg", f"{labels['labels'][i - 1]:03d}") for i in parts[key]]
        for path, label in some:
            yield part, present(path, f"{root}/setid.mat"), label


Source = namedtuple("Source", "read images classes metric mean std")  # mean and deviation of RGB in 0..1
SOURCES = {  # images: of all official parts, [recalled] but for resisc and ucmerced; else as in [code], but kids' classes
    "resisc":               Source(scene_lists, 31_500,  45,  "top-1", (.3680, .3810, .3436), (.2035, .1854, .1849)),
    "ucmerced":             Source(scene_lists, 2_100,   21,  "top-1", (.4842, .4901, .4505), (.2180, .2021, .1958)),
    "xview":                Source(xview,       846,     36,  "AUROC", (.3680, .3810, .3436), (.2035, .1854, .1849)),  # as resisc
    "bdd":                  Source(bdd,         100_000, 6,   "top-1", (.2789, .2929, .2902), (.2474, .2653, .2761)),
    "viper":                Source(viper,       254_000, 23,  "AUROC", (.3485, .3422, .3395), (.2449, .2408, .2390)),  # about
    "chexpert":             Source(chexpert,    224_316, 5,   "AUROC", (.5028,) * 3,          (.2919,) * 3),
    "chest_xray_kids":      Source(kids,        5_856,   2,   "top-1", (.4815,) * 3,          (.2377,) * 3),
    "coco_2014":            Source(coco,        123_287, 80,  "AUROC", (.4702, .4470, .4076), (.2785, .2740, .2889)),
    "pascal":               Source(pascal,      21_503,  20,  "AUROC", (.4511, .4292, .3967), (.2764, .2729, .2849)),
    "domain_net_clipart":   Source(domain_net,  48_129,  345, "top-1", (.7362, .7167, .6834), (.3642, .3654, .3887)),
    "domain_net_infograph": Source(domain_net,  51_605,  345, "top-1", (.6888, .6970, .6648), (.3331, .3094, .3281)),
    "domain_net_painting":  Source(domain_net,  72_266,  345, "top-1", (.5743, .5466, .5083), (.3088, .3007, .3168)),
    "domain_net_quickdraw": Source(domain_net,  172_500, 345, "top-1", (.9525,) * 3,          (.2128,) * 3),
    "domain_net_real":      Source(domain_net,  172_947, 345, "top-1", (.6059, .5890, .5558), (.3344, .3279, .3493)),
    "domain_net_sketch":    Source(domain_net,  69_128,  345, "top-1", (.8327, .8270, .8179), (.2727, .2753, .2810)),
    "flowers":              Source(flowers,     8_189,   102, "top-1", (.4355, .3777, .2880), (.2970, .2459, .2705)),
}


# ---- writing -----------------------------------------------------------------------------------------------------

def convert(name, root, out, chip=CHIP):
    """Reads the dataset `name` at root and writes OUT's three csv files and pretrain.txt -> {part: labelled images}. Of several
    labels an image, those that occur in all parts are kept: AUROC needs both kinds of images. UserError naming file and line
    where the dataset is not as expected."""
    out, root = folder(out, root), os.path.abspath(root)
    s, multi = SOURCES[name], SOURCES[name].metric == "AUROC"
    rows = list(s.read(root, name, str(out), chip))
    parts = {part: [(path, label) for to, path, label in rows if to == part and label is not None] for part in PARTS}
    pretrain = [path for part, path, _ in rows if part != "test"]
    seen = {}
    for part, path, _ in rows:
        if seen.setdefault(path, part) != part:
            raise UserError(f"{path} is in {seen[path]} and in {part}; mend the lists in {root}")
    classes = [set().union(*(label if multi else {label} for _, label in some)) for some in parts.values()]
    names = sorted(set.intersection(*classes) if multi else set.union(*classes))
    if empty := [part for part, some in parts.items() if not some] or (not names and PARTS):
        raise UserError(f"{root} leaves no labelled image for {' and '.join(empty)}, or no class in common; is it complete?")

    def write(path, some):
        with open(path, "w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["path", *(names if multi else ["label"])])
            writer.writerows([path, *((int(k in label) for k in names) if multi else [label])] for path, label in some)
    for part, some in parts.items():
        runs.write_atomic(out / f"{part}.csv", lambda p: write(p, some))
    runs.write_atomic(out / "pretrain.txt", lambda p: p.write_text("".join(f"{path}\n" for path in pretrain)))
    count = {part: len(some) for part, some in parts.items()}
    print(f"{out}: {', '.join(f'{part} {n}' for part, n in count.items())} images, {len(pretrain)} for pre-training, "
          f"{len(names)} classes (HPT: {s.classes}; the whole dataset: {s.images:,} images)")
    return count


def folder(out, root):
    Path(out).mkdir(parents=True, exist_ok=True)
    if os.path.samefile(out, root):
        raise UserError(f"{out} is the dataset itself, whose files would be overwritten; give another OUT")
    return Path(os.path.abspath(out))


def pascal_boxes(root, part):
    """(file, (w, h), [(class number from 0, ignored, x0, y0, x1, y1)]). Difficult objects are trained on like any other, as in
    detectron2; in val.json they are iscrowd: whether they are found does not count, nearly as in VOC's evaluation (a crowd, for
    COCO, may hold several detections, and what counts is the share of each inside it)."""
    for file, size, objects in voc_objects(root, {"train": "train", "val": "test"}[part]):
        yield file, size, [(k - 1, difficult and part == "val", *box) for k, difficult, *box in objects]


def bdd_boxes(root, part):
    """The same of BDD's labels with a box2d; iscrowd is what its toolkit ignores: people, vehicles and trailers of no class, and
    crowds [recalled]."""
    for where, frame in bdd_frames(root, part):
        with expect("name and labels", where, frame):
            name, labels, found = frame["name"], [v for v in frame.get("labels") or () if v.get("box2d")], []  # lanes have none
        for label in labels:
            with expect("category and box2d with x1, y1, x2, y2", where, label):
                kind = BDD_OLD.get(label["category"], label["category"])
                ignored = kind in BDD_IGNORED or (label.get("attributes") or {}).get("crowd", False)
                box = (float(label["box2d"][k]) for k in ("x1", "y1", "x2", "y2"))
                found.append((BDD_BOXED.index(BDD_IGNORED.get(kind, kind)), ignored, *box))
        present(f"{root}/images/100k/{part}/{name}", where)
        yield f"{part}/{name}", (1280, 720), found  # all images have this size


BOXES = {"pascal": (pascal_boxes, voc.VOC_CLASSES[1:], ""), "bdd": (bdd_boxes, BDD_BOXED, "images/100k")}


def boxes(name, root, out):
    """Writes OUT/train.json and OUT/val.json in COCO's format, and OUT/images as a link to the dataset's. VOC 07+12: trainval and
    test2007; BDD: official train and val [code]."""
    (read, classes, below), out = BOXES[name], folder(out, root)
    images = present(os.path.join(os.path.abspath(root), below))
    if not (out / "images").exists():
        (out / "images").symlink_to(images)
    elif not os.path.samefile(out / "images", images):
        raise UserError(f"{out}/images is there and not the images of {root}; give another OUT")

    def write(path, part):
        listed, n = [], 0
        with open(path, "w") as f:
            f.write('{"annotations": [')
            for file, (w, h), found in read(os.path.abspath(root), part):
                listed.append({"id": len(listed) + 1, "file_name": file, "width": w, "height": h})
                for k, ignored, x0, y0, x1, y1 in found:
                    row = {"id": n + 1, "image_id": len(listed), "category_id": k + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                           "area": (x1 - x0) * (y1 - y0), "iscrowd": int(ignored)}
                    f.write(("," if n else "") + "\n" + json.dumps(row))
                    n += 1
            f.write(f'],\n"images": {json.dumps(listed)},\n"categories": '
                    f'{json.dumps([{"id": k, "name": v} for k, v in enumerate(classes, 1)])}}}\n')
        print(f"{out}/{part}.json: {len(listed)} images, {n} boxes of {len(classes)} classes")
    for part in ("train", "val"):
        runs.write_atomic(out / f"{part}.json", lambda p: write(p, part))


def table():
    """The 16 rows as text, and what every reader expects."""
    text = [f"{'name':22}{'images':>8}{'classes':>9}  metric  {'mean':22}deviation"]
    for name, s in SOURCES.items():
        pixels = (" ".join(f"{v:.4f}" for v in values) for values in (s.mean, s.std))
        text.append(f"{name:22}{s.images:8,}{s.classes:9}  {s.metric:8}{'  '.join(pixels)}")
    for read in dict.fromkeys(s.read for s in SOURCES.values()):
        names = ", ".join(k for k, s in SOURCES.items() if s.read is read)
        text.append(f"\n{names}\n    {read.__doc__}")
    return "\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    parser.add_argument("name", nargs="?", choices=SOURCES)
    parser.add_argument("dir", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--chip", type=int, default=CHIP, help="side of xview's chips in pixels")
    parser.add_argument("--boxes", action="store_true", help="pascal, bdd: detection in COCO's format")
    args = parser.parse_args(argv)
    if not args.name:
        return print(table())
    if not args.out or not os.path.isdir(args.dir) or args.chip < 1:
        raise UserError(f"{args.dir or 'no folder'} is not the folder of {args.name}, or OUT or a --chip above 0 is missing: "
                        f"python sources.py {args.name} DIR OUT; without arguments it says what DIR must hold")
    if args.boxes and args.name not in BOXES:
        raise UserError(f"--boxes is for {' and '.join(BOXES)}, not {args.name}")
    try:
        boxes(args.name, args.dir, args.out) if args.boxes else convert(args.name, args.dir, args.out, args.chip)
    except (data.BadImage, OSError) as error:  # OSError: no rights, a folder where a file should be or the other way round
        raise UserError(f"{error}; check DIR and OUT")


if __name__ == "__main__":
    run(main)
