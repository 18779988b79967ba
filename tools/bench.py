"""How fast is a training step, next to what one would use instead?

    python -m tools.bench train [--size 320 --batch 4 --threads 2 --rounds 7]
    python -m tools.bench recipe --recipe coco-b7 --batch 8 [--size 640]

train: RetinaNet ResNet-50-FPN on the CPU, ours and torchvision's. The rivals take turns step by
step, each in a process of its own, so that a slow moment of the machine hits all of them.
recipe: images/s, and on a GPU the peak memory, of a recipe's step without the loader.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import backbones
import data
import ops
import recipes
import st
import util
from util import need

CLASSES = {"det": 80, "rcnn": 80, "seg": 21, "cls": 1000}
BOXES = 8  # an image


def fake_batch(task, size, batch, instances=False):
    """Random pixels and labels as data.collate makes them: the arithmetic of a step does not depend
    on what is in its images."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(batch):
        low = rng.random((BOXES, 2)) * size * 0.6
        sides = size * (0.1 + 0.3 * rng.random((BOXES, 2)))
        target = {**data.nothing(i), "part": 0}
        target["boxes"] = np.concatenate([low, low + sides], 1).astype(np.float32)
        target["labels"] = rng.integers(0, CLASSES["det"], BOXES)
        if task == "seg":
            target["mask"] = rng.integers(0, CLASSES["seg"], (size, size)).astype(np.uint8)
        elif task == "cls":
            target["image_class"] = int(rng.integers(CLASSES["cls"]))
        elif instances:
            target["number"] = ops.FIRST_OBJECT + np.arange(BOXES)
            target["mask"] = rng.choice(target["number"], (size, size)).astype(np.int32)
        samples.append((rng.integers(0, 256, (size, size, 3), np.uint8), target))
    return data.collate(samples)


def our_step(batch, c, proc):
    """The inside of st.fit's loop for one supervised step."""
    task = st.TASKS[c.task]
    net = st.build(c, CLASSES[c.task]).to(proc.device).train()
    optimizer = st.make_optimizer(net, c)
    if proc.gradient_checkpointing:
        backbones.recompute(net, (*backbones.BLOCKS, st.models.Tower))

    def step():
        here = data.on_device(batch, proc.device)
        targets, count = task.targets(here, net)
        count = ops.per_part(count, here["part"], 1)[here["part"]]
        with proc.autocast():
            pixels = backbones.normalise(here["images"])
            outputs = net(pixels, *[targets[name] for name in net.inputs])
        task.losses(outputs, targets, count, net).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchvision_step(batch, size, proc, channels_last):
    """torchvision's RetinaNet on the same boxes and classes, all of it trained, its own losses."""
    torch.manual_seed(0)
    net = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=80, min_size=size, max_size=size
    ).train()
    memory = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=memory)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    pairs = zip(batch["boxes"], batch["labels"])
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]

    def step():
        images = (batch["images"].float() / 255).to(memory_format=memory)
        with proc.autocast():
            losses = net(list(images), targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- train ---------------------------------------------------------------------------------------

# name: (ours, precision, channels_last)
RIVALS = {
    "ours, bf16 channels_last (default)": (True, torch.bfloat16, True),
    "torchvision, fp32 (its default)": (False, torch.float32, False),
    "torchvision, bf16 channels_last": (False, torch.bfloat16, True),
    "ours, fp32": (True, torch.float32, True),
}


def serve(name, size, batch, threads):
    """A rival's process: a step for every line on stdin, its seconds on stdout."""
    ours, dtype, channels_last = RIVALS[name]
    proc = util.Proc(dtype=dtype)
    images = fake_batch("det", size, batch)
    torch.set_num_threads(threads)
    if ours:
        util.keep_freed_memory()  # as st.py runs; torchvision runs as it would for its user
        step = our_step(images, recipes.method("coco-r50", image_size=size, batch=batch), proc)
    else:
        step = torchvision_step(images, size, proc, channels_last)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def train(size, batch, threads, rounds):
    flags = ["--size", str(size), "--batch", str(batch), "--threads", str(threads)]
    command = [sys.executable, "-m", "tools.bench", "train", *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[1]
    processes = {}
    for name in RIVALS:
        processes[name] = subprocess.Popen([*command, "--serve", name], cwd=root, **pipes)
    times = {name: [] for name in RIVALS}
    for r in range(rounds + 2):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            need(line, f"{name} stopped; its message is above. Lower --size or --batch")
            if r > 1:  # two rounds of warming up
                times[name].append(float(line))
    for process in processes.values():
        process.communicate()
    print(
        f"training step, RetinaNet ResNet-50-FPN, {size} px, batch {batch}, {threads} threads, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {rounds} rounds"
    )
    for name, seconds in times.items():
        print(f"  {name:36s} {spread(seconds)} s")
    default, plain, same, fp32 = times.values()
    rows = {"default to default": (default, plain), "both bf16": (default, same)}
    for title, (ours, rival) in {**rows, "both fp32": (fp32, plain)}.items():
        ratios = [a / b for a, b in zip(ours, rival)]
        print(f"  ours / torchvision, {title:18s} {spread(ratios)}")


def spread(values):
    return f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"


# ---- recipe --------------------------------------------------------------------------------------


def recipe(name, size, batch, rounds, machine):
    proc = util.start(machine)
    given = {"image_size": size} if size else {}
    c = recipes.method(name, batch=batch, **given)
    step = our_step(fake_batch(c.task, c.image_size, batch, c.instances), c, proc)
    speeds = []
    for r in range(rounds + 2):
        began = time.perf_counter()
        step()
        if proc.device.type == "cuda":
            torch.cuda.synchronize()
        if r > 1:
            speeds.append(batch / (time.perf_counter() - began))
    device = "CPU"
    peak = "not measured on a CPU"
    if proc.device.type == "cuda":
        device = torch.cuda.get_device_name()
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    print(
        f"{name}, {c.image_size} px, batch {batch}, {str(proc.dtype)[6:]} on {device}, "
        f"torch {torch.__version__}, {rounds} rounds"
    )
    print(f"  images/s    {spread(speeds)}")
    print(f"  peak memory {peak}")


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["train", "recipe"])
    parser.add_argument("--recipe", default="coco-r50", help="row of recipes.py [coco-r50]")
    parser.add_argument("--size", type=int, help="side of the images [320, or the recipe's]")
    for name, value in (("batch", 4), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"[{value}]")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as in st.py")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    least = min(args.batch, args.threads, args.rounds)
    need(least >= 1, "--batch, --threads and --rounds must be 1 or more")
    if args.what == "recipe":
        machine = util.Machine(workers=0, gradient_checkpointing=args.gradient_checkpointing)
        recipe(args.recipe, args.size, args.batch, args.rounds, machine)
        return
    size = args.size or 320
    need(size % 32 == 0 < size, f"--size {size} is no multiple of 32")
    if args.serve:
        serve(args.serve, size, args.batch, args.threads)
    else:
        train(size, args.batch, args.threads, args.rounds)


if __name__ == "__main__":
    util.run(main)
