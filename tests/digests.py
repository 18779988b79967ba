"""Does a change leave every number alone? Short fp32 runs on the CPU at two commits, compared.

    python tests/digests.py OLD [NEW] [--keep DIR] [--only NAME,...]

OLD and NEW are git revisions; without NEW it is the working tree. Nothing is stored in the
repository: a commit runs from a temporary worktree, on data sets drawn for it. --keep DIR keeps
them and the outputs there, and repeats no run of a commit that it holds. Floating-point sums
depend on the machine, so both sides run on this one, on one thread.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "st.py": "--steps 12 --student-steps 12 --labeled 0.5 --control --image-size 64 --batch 4",
    "hpt.py": "--recipe tiny --image-size 16 --batch 8 --groups 2 --queue 64",
}
MACHINE = "--precision fp32 --device cpu --workers 0"
# What commits without tools/ must be told besides; in later ones the recipe says it.
OLD_FLAGS = {
    "det": "--task det --data coco",
    "seg": "--task seg --data voc",
    "cls": "--task cls --data folder",
}
# fmt: off
RUNS = {  # name: script, kind of old flags, flags that are laid over the common ones
    "det-gn": ("st.py", "det", "--recipe tiny --root objects --norm gn --threshold 0.0 "
               "--eval-every 6"),
    "det-bn": ("st.py", "det", "--recipe tiny --root objects --steps 150 --labeled 0.75 --batch 8 "
               "--lr 4e-3 --aug s1 --threshold auto"),
    "det-pieces": ("st.py", "det", "--recipe tiny --root objects --norm gn --threshold 0.0 "
                   "--accumulate 2"),
    "seg": ("st.py", "seg", "--recipe seg-tiny --root objects --unlabeled objects/JPEGImages/aug "
            "--batch 8 --threshold 0.6 --scales 0.5,1 --flip --alpha 0.5"),
    "cls": ("st.py", "cls", "--recipe cls-tiny --root classes --batch 8 --steps 40 "
            "--threshold 0.8 --student-init same"),
    "joint": ("st.py", "seg", "--recipe seg-tiny --root objects --unlabeled "
              "objects/JPEGImages/aug --joint classes --batch 8 --threshold 0.0 --scales 1"),
    "rcnn": ("st.py", "det", "--recipe tiny-c4 --root objects --steps 6 --student-steps 6 "
             "--threshold 0.0"),
    "mask-rcnn": ("st.py", "det", "--recipe coco-c4 --backbone resnet10 --root objects --batch 2 "
                  "--student-steps 3 --lr 0.05 --threshold 0.0"),
    "hpt": ("hpt.py", "", "--stage classes:12 --stage classes:12:bn --stage classes:stats "
            "--eval linear,finetune,knn --data classes --labels 12"),
    "simclr": ("hpt.py", "", "--image-size 32 --method simclr --stage domain:12"),
    "auroc": ("hpt.py", "", "--eval linear --data objects"),
    "mme": ("hpt.py", "", "--eval mme --source domain --data classes --budgets 1"),
}
EXPECTED = {  # run: stages that may differ, why
    "det-pieces": (("teacher", "pseudo", "student", "control"), "other images share a piece"),
    "joint": (("student",), "the loss of three parts has another formula"),
}
# fmt: on

# ---- data sets -----------------------------------------------------------------------------------

GREY = {"dark": 5, "bright": 250}


def picture(rng, kinds, tint=(1, 1, 1)):
    """Noise with a square or a disc of each kind -> image, mask (outlines are 255), polygons."""
    width, height = 64, int(rng.choice([48, 64]))
    noise = rng.integers(90, 160, (height, width, 3)) * np.array(tint)
    image = Image.fromarray(noise.astype(np.uint8))
    mask = Image.new("L", image.size)
    polygons = []
    for kind in kinds:
        corners = int(rng.choice([4, 16]))
        radius = rng.uniform(10, 16)
        x, y = rng.uniform(radius, np.array(image.size) - radius)
        turns = 2 * math.pi * (np.arange(corners) + 0.5) / corners
        polygon = np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], 1).round(1)
        points = [tuple(point) for point in polygon.tolist()]
        ImageDraw.Draw(image).polygon(points, fill=(GREY[kind],) * 3)
        ImageDraw.Draw(mask).polygon(points, fill=1 + list(GREY).index(kind), outline=255)
        polygons.append(polygon)
    return image, mask, polygons


def draw_objects(root):
    """One set of images as COCO (with polygons, one crowd), as VOC and as a csv of classes."""
    rng = np.random.default_rng(1)
    for folder in ("images", "JPEGImages/aug", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(["background", *GREY]) + "\n")
    for part, count in {"train": 24, "val": 8, "aug/aug": 12}.items():  # aug has no labels
        coco = {"images": [], "annotations": []}
        coco["categories"] = [{"id": 3, "name": "dark"}, {"id": 7, "name": "bright"}]
        names = [f"{part}_{i}" for i in range(count)]
        lines = ["path,dark,bright"]
        for i, name in enumerate(names, 1):
            kinds = rng.choice(list(GREY), rng.integers(0, 4)).tolist()
            image, mask, polygons = picture(rng, kinds)
            image.save(root / f"JPEGImages/{name}.png")
            if part == "aug/aug":
                continue
            image.save(root / f"images/{name}.png")
            mask.save(root / f"SegmentationClass/{name}.png")
            size = {"width": image.width, "height": image.height}
            coco["images"].append({"id": i, "file_name": f"{name}.png", **size})
            lines.append(f"images/{name}.png,{int('dark' in kinds)},{int('bright' in kinds)}")
            for kind, polygon in zip(kinds, polygons):
                low = polygon.min(0)
                size = polygon.max(0) - low
                number = len(coco["annotations"])
                row = {"id": number + 1, "image_id": i, "iscrowd": int(number == 0)}
                row["category_id"] = 3 if kind == "dark" else 7
                row["bbox"] = [*low.tolist(), *size.tolist()]
                row["area"] = float(size.prod())
                row["segmentation"] = [polygon.ravel().tolist()]
                coco["annotations"].append(row)
        list_file = root / f"ImageSets/Segmentation/{part.partition('/')[0]}.txt"
        list_file.write_text("\n".join(names) + "\n")
        if part != "aug/aug":
            (root / f"{part}.json").write_text(json.dumps(coco))
            (root / f"{part}.csv").write_text("\n".join(lines) + "\n")


def draw_classes(root, seed, tint):
    rng = np.random.default_rng(seed)
    for part, count in {"train": 8, "val": 3, "test": 3}.items():
        for name, kinds in {"dark": ["dark"], "bright": ["bright"], "both": list(GREY)}.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image, _, _ = picture(rng, kinds, tint)
                image.save(root / part / name / f"{part}_{name}_{i}.png")


def draw(root):
    if not root.exists():
        draw_objects(root / "objects")
        draw_classes(root / "classes", 2, (1, 1, 1))
        draw_classes(root / "domain", 3, (1.4, 1, 0.6))


# ---- runs ----------------------------------------------------------------------------------------


def git(*words):
    done = subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(revision):
    """The folder of a revision's files while they are needed; of None the working tree."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def command(tree, name, data, out):
    script, kind, flags = RUNS[name]
    told = "" if (tree / "tools").is_dir() else OLD_FLAGS.get(kind, "")
    words = shlex.split(f"{told} {COMMON[script]} {flags} {MACHINE}")
    for i, word in enumerate(words):
        if word.startswith(("objects", "classes", "domain")):
            words[i] = f"{data}/{word}"
    return [sys.executable, str(tree / script), *words, "--out", str(out)]


def run_all(revision, names, work):
    """Runs what is not there yet -> folder of the outputs, in it one of each run."""
    outputs = work / (git("rev-parse", "--short=12", revision) if revision else "working-tree")
    todo = [k for k in names if not revision or not (outputs / k / "results.json").exists()]
    if not todo:
        return outputs
    with checkout(revision) as tree:
        for name in todo:
            shutil.rmtree(outputs / name, ignore_errors=True)
            words = command(tree, name, work / "data", outputs / name)
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            began = time.time()
            done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True)
            print(f"{time.time() - began:5.1f} s  {shlex.join(words[1:])}", flush=True)
            if done.returncode:
                print(f"FAILED: {done.stderr.strip()[-1000:]}", flush=True)
    return outputs


# ---- what a run leaves ---------------------------------------------------------------------------


def read_run(out):
    """{(stage, what): {name: array}} of a run's folder, {} of one that did not finish."""
    if not (out / "results.json").exists():
        return {}
    contents = {}
    for path in sorted(out.rglob("*.pt")):  # a folder's last checkpoint comes last
        what = "backbone" if path.name == "backbone.pt" else "weights"
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        key = str(path.parent.relative_to(out)), what
        contents[key] = {k: v.numpy() for k, v in state.items()}
    results = json.loads((out / "results.json").read_text())
    for stage, result in results.items():
        if isinstance(result, dict) and not stage.startswith("pseudo"):
            contents[stage, "scores"] = dict(numbers(result))
    for path in out.glob("pseudo*/stage.json"):
        folder = path.parent
        if (folder / "pseudo.json").exists():
            labels = read_old_labels(folder)
        else:
            labels = read_new_labels(folder, results[folder.name]["threshold"])
        contents[folder.name, "pseudo-labels"] = {k: np.array(v) for k, v in labels.items()}
    return contents


def numbers(value, name=""):
    """(name, array) of every number in nested lists and dicts, but of times."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, part in value.items():
            if key != "seconds":
                yield from numbers(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (int, float)):
        yield name, np.array(float(value))


def read_old_labels(folder):
    """Of commits without tools/: pseudo.json, which holds what reaches the threshold."""
    value = json.loads((folder / "pseudo.json").read_text())
    labels = {"threshold": value["info"]["threshold"]}
    position = {c["id"]: k for k, c in enumerate(value.get("categories", ()))}
    for image in value["images"]:
        name = Path(image.get("file_name") or image["file"]).name
        if "mask" in image:
            labels[f"{name} mask"] = Image.open(folder / image["mask"])
        elif "label" in image:
            labels[f"{name} label"] = value["info"]["classes"].index(image["label"])
            labels[f"{name} score"] = image["score"]
        else:
            rows = [a for a in value["annotations"] if a["image_id"] == image["id"]]
            labels[f"{name} boxes"] = [a["bbox"] for a in rows]
            labels[f"{name} labels"] = [position[a["category_id"]] for a in rows]
            labels[f"{name} scores"] = [a["score"] for a in rows]
    return labels


def read_new_labels(folder, threshold):
    """Of later commits: json lines of all answers over a low floor; masks are PNG with the class
    and 200 times its probability."""
    labels = {"threshold": threshold}
    for part in sorted(folder.glob("part_*.jsonl")):
        for row in map(json.loads, part.read_text().splitlines()):
            name = Path(row["file"]).name
            if "mask" in row:
                classes, sure = np.array(Image.open(folder / "masks" / row["mask"])).transpose(
                    2, 0, 1
                )
                classes[sure < round(200 * threshold)] = 255
                if (classes < 255).any():
                    labels[f"{name} mask"] = classes
            elif "boxes" in row:
                kept = np.array(row["scores"]) >= threshold
                for key in ("boxes", "labels", "scores") if kept.any() else ():
                    labels[f"{name} {key}"] = np.array(row[key])[kept]
            elif row.get("score", -1) >= threshold:
                labels[f"{name} label"] = row["label"]
                labels[f"{name} score"] = row["score"]
    return labels


# ---- the table -----------------------------------------------------------------------------------


def digest(arrays, names):
    content = hashlib.sha256()
    for name in names:
        content.update(name.encode() + arrays[name].astype(float).tobytes())
    return content.hexdigest()[:10]


def compare(old, new):
    """Two {name: array} -> digests of the names both have, whether these are equal, a sentence."""
    names = sorted(old.keys() & new.keys())
    if not names:
        return "-", "-", False, "no name in common" if old and new else "missing"
    largest = {}
    for name in names:
        a, b = old[name], new[name]
        if a.shape != b.shape:
            largest[name] = math.inf
        elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            largest[name] = np.abs(a.astype(float) - b.astype(float)).max()
    sentence = f"equal ({len(names)})"
    if largest:
        worst = max(largest, key=largest.get)
        sentence = f"{len(largest)} of {len(names)} differ, most {worst}: {largest[worst]:.2g}"
    for side, lone in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if lone:
            sentence += f"; {len(lone)} only {side}: {', '.join(sorted(lone)[:3])}"
    return digest(old, names), digest(new, names), not largest, sentence


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", default=",".join(RUNS))
    args = parser.parse_args()
    names = args.only.split(",")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        work = (args.keep or Path(folder)).resolve()
        draw(work / "data")
        sides = [run_all(revision, names, work) for revision in (args.old, args.new)]
        row = "{:11}{:26}{:14}{:11}{:11}{}"
        print(row.format("run", "stage", "what", "old", "new", ""))
        for name in names:
            old, new = (read_run(side / name) for side in sides)
            stages, reason = EXPECTED.get(name, ((), ""))
            for stage, what in sorted({**old, **new}) or [("-", "-")]:
                key = stage, what
                *digests, equal, sentence = compare(old.get(key, {}), new.get(key, {}))
                if not equal and stage in stages:
                    sentence += f" (expected: {reason})"
                elif not equal:
                    failures += 1
                print(row.format(name, stage, what, *digests, sentence))
    sys.exit(f"{failures} rows differ unexpectedly" if failures else 0)


if __name__ == "__main__":
    main()
