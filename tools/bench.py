"""How fast is it next to what one would use instead? Ratios measured in one run, the rivals taking
turns step by step, each in a process of its own, so that a slow moment of the machine hits all.

    python -m tools.bench train [--size 320 --batch 4 --threads 2 --rounds 7]
        a training step of RetinaNet ResNet-50-FPN, ours and torchvision's
    python -m tools.bench recipe --recipe coco-b7 --batch 8 [--size 640]
        images/s and peak memory of a recipe on this device, without the loader
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torchvision

import backbones
import recipes
import st
import util
from util import need

CLASSES = {"det": 80, "rcnn": 80, "seg": 21, "cls": 1000}  # of COCO, PASCAL and ImageNet


def fake_batch(size, batch, boxes=8, classes=80):
    """uint8 images (B, 3, S, S) and `boxes` random boxes each: the arithmetic of a step does not
    depend on content."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=g)
    low = torch.rand(batch, boxes, 2, generator=g) * size * 0.6
    sides = size * (0.1 + 0.3 * torch.rand(batch, boxes, 2, generator=g))
    labels = torch.randint(0, classes, (batch, boxes), generator=g)
    mask = torch.randint(0, 21, (batch, size, size), dtype=torch.uint8, generator=g)
    return {
        "images": images, "boxes": torch.cat([low, low + sides], 2), "labels": labels,
        "mask": mask, "image_class": labels[:, 0],
    }  # fmt: skip


def our_step(batch, c, proc, channels_last=True):
    """The inside of st.fit's loop for one supervised step -> net, step()."""
    net = st.build(c, CLASSES[c.task])
    if proc.gradient_checkpointing:
        backbones.recompute(net, (*backbones.BLOCKS, st.models.Tower))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(proc.device, memory_format=layout).train()
    task = st.TASKS[c.task]
    optimizer = st.make_optimizer(net, c)

    def step():
        on_device = {name: value.to(proc.device) for name, value in batch.items()}
        targets, count = task.targets(on_device, net)
        with proc.autocast():
            pixels = backbones.normalise(on_device["images"]).contiguous(memory_format=layout)
            outputs = net(pixels, *[targets[name] for name in net.inputs])
        task.losses(outputs, targets, count.sum().expand_as(count), net).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return net, step


def torchvision_step(batch, size, dtype, channels_last):
    """torchvision's RetinaNet on the same boxes and classes, everything trainable, its losses."""
    torch.manual_seed(0)
    net = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=80, min_size=size, max_size=size
    ).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    targets = [{"boxes": b, "labels": l} for b, l in zip(batch["boxes"], batch["labels"])]

    def step():
        images = (batch["images"].float() / 255).to(memory_format=layout)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = net(list(images), targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# fmt: off
RIVALS = {  # name: ours or torchvision's, precision, channels_last
    "ours, bf16 channels_last (default)": (True,  torch.bfloat16, True),
    "torchvision, fp32 (its default)":    (False, torch.float32,  False),
    "torchvision, bf16 channels_last":    (False, torch.bfloat16, True),
    "ours, fp32":                         (True,  torch.float32,  False),
}
# fmt: on


def serve(name, size, batch, threads):
    """A rival's own process: a step for every line on stdin, its seconds on stdout."""
    ours, dtype, channels_last = RIVALS[name]
    if ours:
        # the allocator settings that st.py runs with; torchvision runs as it would for a user
        proc = util.start(util.Machine(device="cpu", workers=0))
        proc.dtype = dtype
        c = recipes.method("coco-r50", image_size=size, batch=batch)
        _, step = our_step(fake_batch(size, batch), c, proc, channels_last)
    else:
        step = torchvision_step(fake_batch(size, batch), size, dtype, channels_last)
    torch.set_num_threads(threads)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def train(size, batch, threads, rounds):
    flags = [f"--size={size}", f"--batch={batch}", f"--threads={threads}"]
    processes = {}
    for name in RIVALS:
        words = [sys.executable, "-m", "tools.bench", "train", f"--serve={name}", *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes[name] = subprocess.Popen(words, text=True, **pipes)
    times = {name: [] for name in RIVALS}
    for r in range(rounds + 2):  # two rounds of warming up
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            need(line, f"{name} stopped; its message is above. Lower --size or --batch")
            if r > 1:
                times[name].append(float(line))
    for process in processes.values():
        process.communicate()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"training step, RetinaNet ResNet-50-FPN, {size} px, batch {batch}, {threads} threads")
    print(f"{versions}, {rounds} rounds")
    for name, t in times.items():
        middle = statistics.median(t)
        print(f"  {name:36s} median {middle:6.3f} s   min {min(t):6.3f}   max {max(t):6.3f}")
    ours, theirs, same, plain = RIVALS
    for what, a, b in (
        ("default to default", ours, theirs),
        ("both bf16 channels_last", ours, same),
        ("both fp32", plain, theirs),
    ):
        ratios = [x / y for x, y in zip(times[a], times[b])]
        middle = statistics.median(ratios)
        print(f"  {what:36s} {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def recipe(name, size, batch, rounds, gradient_checkpointing):
    """Training steps of a recipe on this device: images/s, and peak memory of a GPU."""
    machine = util.Machine(workers=0, gradient_checkpointing=gradient_checkpointing)
    proc = util.start(machine)
    cuda = proc.device.type == "cuda"
    given = {"image_size": size} if size else {}
    c = recipes.method(name, batch=batch, **given)
    _, step = our_step(fake_batch(c.image_size, batch), c, proc)
    times = []
    for _ in range(rounds + 2):  # two rounds of warming up
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    speed = [batch / t for t in times[2:]]
    where, peak = "CPU", "not measured on a CPU"
    if cuda:
        where = torch.cuda.get_device_name()
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    print(f"{name}, {c.image_size} px, batch {batch}, {str(proc.dtype)[6:]} on {where}")
    middle = statistics.median(speed)
    print(f"  images/s     median {middle:.1f} ({min(speed):.1f} to {max(speed):.1f})")
    print(f"  peak memory  {peak}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are one line
    )
    parser.add_argument("what", choices=["train", "recipe"])
    parser.add_argument("--recipe", default="coco-r50", help="row of recipes.py")
    parser.add_argument("--size", type=int, help="default: 320, or the recipe's")
    for name, value in (("batch", 4), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as in st.py")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    positive = min(args.size or 32, args.batch, args.threads, args.rounds) >= 1
    need(positive, "--size, --batch, --threads and --rounds must be 1 or more")
    size = args.size or 320
    if args.what == "recipe":
        recipe(args.recipe, args.size, args.batch, args.rounds, args.gradient_checkpointing)
    elif args.serve:
        serve(args.serve, size, args.batch, args.threads)
    else:
        need(size % 32 == 0, f"--size {size} is not a multiple of 32")
        train(size, args.batch, args.threads, args.rounds)


if __name__ == "__main__":
    util.run(main)
