"""What tests share: the repository's root on sys.path, commands as a user starts them, processes
that are forked, halved or killed, and tiny data sets of squares and discs."""

import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Sums depend on the number of threads: scripts that tests start, and what they are held to, have 1.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import util  # noqa: E402

# ---- processes -----------------------------------------------------------------------------------


def free_port():
    """Not one of those that the kernel hands to any connection at any moment."""
    while True:
        port = random.SystemRandom().randint(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return str(port)


def start(*args, processes=1, script="st.py", **environment):
    """A script as a user starts it, on one thread a process; torchrun's for several."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", free_port()]
    command += [str(ROOT / script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def records(run, stage):
    """The log lines of a stage by step."""
    lines = [json.loads(line) for line in open(run / "log.jsonl")]
    return {line["step"]: line for line in lines if line["stage"] == stage}


def forked(*actions):
    """Calls each action in a forked process of its own, all at once -> their exit codes, negative
    for the signal that ended one. Much quicker than a script: everything is imported already."""
    children = []
    for action in actions:
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(100)  # rather killed than waiting for ever
                action()
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_at(count, module, *names):
    """From now on the count-th call of any of these functions of a module kills this process."""
    calls = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in names:
        setattr(module, name, counted(getattr(module, name)))


@dataclasses.dataclass
class Turn(util.Proc):
    """One of several processes that are run after each other in one: what they say is collected, so
    the last one's results are those of all."""

    said: list = dataclasses.field(default_factory=list)

    def gather(self, value):
        self.said.append(value)
        return list(self.said)

    def sum(self, tensor):
        return sum(self.gather(tensor.clone()))

    def first(self, action):
        return action()


def turns(world):
    said = []
    return [Turn(rank=rank, world=world, said=said) for rank in range(world)]


# ---- data sets -----------------------------------------------------------------------------------
# For all tests of the session: a test that changes files works on a copy, or draws its own.

KINDS = {"square": (4, 5), "disc": (16, 250)}  # corners, grey value


def picture(rng, kinds):
    """Noise of 64 x 64 or 64 x 48 pixels with a dark square or a bright disc for each of `kinds`
    -> image, mask of classes (from 1; outlines are 255), [(n, 2) polygon]."""
    size = (64, int(rng.choice([48, 64])))
    image = Image.fromarray(rng.integers(90, 160, (*size[::-1], 3), dtype=np.uint8))
    mask = Image.new("P", size)
    mask.putpalette([k * 89 % 256 for k in range(768)])
    polygons = []
    for kind in kinds:
        corners, grey = KINDS[kind]
        radius = rng.uniform(9, 14)
        turn = 2 * np.pi * (np.arange(corners) + 0.5) / corners
        circle = np.stack([np.cos(turn), np.sin(turn)], 1)
        polygon = (rng.uniform(radius, np.array(size) - radius) + radius * circle).round(1)
        points = list(map(tuple, polygon.tolist()))
        ImageDraw.Draw(image).polygon(points, fill=(grey,) * 3)
        ImageDraw.Draw(mask).polygon(points, fill=1 + list(KINDS).index(kind), outline=255)
        polygons.append(polygon)
    return image, mask, polygons


def draw_coco(root, train=24, val=8):
    """train.json, val.json, images/; category ids 3 and 7. An image has 0 to 3 objects, of which
    the first of each part is a crowd."""
    rng = np.random.default_rng(1)
    (root / "images").mkdir(parents=True)
    for part, first, count in (("train", 1, train), ("val", 101, val)):
        images = []
        rows = []
        for i in range(first, first + count):
            kinds = rng.choice(list(KINDS), i % 4).tolist()
            image, _, polygons = picture(rng, kinds)
            image.save(root / f"images/{i}.png")
            size = {"width": image.width, "height": image.height}
            images.append({"id": i, "file_name": f"{i}.png", **size})
            for kind, polygon in zip(kinds, polygons):
                low = polygon.min(0)
                w, h = (polygon.max(0) - low).tolist()
                row = {"id": len(rows) + 1, "image_id": i, "iscrowd": int(not rows), "area": w * h}
                row["category_id"] = {"square": 3, "disc": 7}[kind]
                row["bbox"] = [*low.tolist(), w, h]
                row["segmentation"] = [polygon.ravel().tolist()]
                rows.append(row)
        categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
        value = {"images": images, "annotations": rows, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(value))
    return root


def draw_voc(root, train=24, val=8, aug=8):
    """A PASCAL VOC folder of three classes; the images of the list aug have no masks."""
    rng = np.random.default_rng(2)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for part, count in (("train", train), ("val", val), ("aug", aug)):
        names = [f"{part}_{i:02d}" for i in range(count)]
        for name in names:
            image, mask, _ = picture(rng, rng.permutation(list(KINDS)))
            image.save(root / f"JPEGImages/{name}.png")
            if part != "aug":
                mask.save(root / f"SegmentationClass/{name}.png")
        (root / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("\n".join(["background", *KINDS]) + "\n")
    return root


def draw_classes(root, train=8, val=3):
    """train/CLASS and val/CLASS of so many images each: both, disc, square."""
    rng = np.random.default_rng(3)
    for part, count in (("train", train), ("val", val)):
        for name, kinds in {"both": KINDS, "disc": ["disc"], "square": ["square"]}.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture(rng, kinds)[0].save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory):
    return draw_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory):
    return draw_voc(tmp_path_factory.mktemp("data") / "voc")


@pytest.fixture(scope="session")
def class_root(tmp_path_factory):
    return draw_classes(tmp_path_factory.mktemp("data") / "classes")
