"""How fast is it next to what one would use instead? Ratios measured in one run, the rivals taking turns step by step, each
in a process of its own, so that a slow moment of the machine hits all.

    python bench.py train [--size 320 --batch 4 --threads 2 --rounds 7]      a training step, RetinaNet ResNet-50-FPN
    python bench.py recipe --recipe coco-b7 --batch 8 [--size 640]           images/s and peak memory of a recipe on this device
"""
import argparse
import statistics
import subprocess
import sys
import time

import torch
import torchvision

import eval as evaluation
import recipes
import st
import util
from util import UserError, run


def fake_batch(size, batch, boxes=8, classes=80):
    """uint8 images (B, 3, S, S) and `boxes` random boxes each: the arithmetic of a step does not depend on content."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=g)
    low = torch.rand(batch, boxes, 2, generator=g) * size * 0.6
    xyxy = torch.cat([low, low + size * (0.1 + 0.3 * torch.rand(batch, boxes, 2, generator=g))], 2)
    labels = torch.randint(0, classes, (batch, boxes), generator=g)
    masks = torch.randint(0, 21, (batch, size, size), dtype=torch.uint8, generator=g)
    return {"images": images, "boxes": xyxy, "labels": labels, "masks": masks, "image_class": labels[:, 0],
            "part": torch.zeros(batch, dtype=torch.int64)}


def our_step(batch, c, device, dtype, channels_last=True):
    """The inside of st.train's loop for one supervised step, the loader left out. c: settings as from recipes.settings."""
    net = st.build(c, recipes.CLASSES[c["task"]]).to(device).train()
    net = net if channels_last else net.to(memory_format=torch.contiguous_format)
    (prepare, losses), optimizer = st.TASKS[c["task"]].criterion(c, device), st.make_optimizer(net, c)
    forward = st.compiled(net, device) if c["compile"] else net

    def step():
        on_device = {k: v.to(device) for k, v in batch.items()}
        targets, normaliser = prepare(on_device)
        x = evaluation.normalise(on_device["images"], device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = forward(x if channels_last else x.contiguous(), *[on_device[k] for k in getattr(net, "inputs", ())])
        losses(outputs, targets, on_device["part"], normaliser).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net, step


def torchvision_step(batch, size, dtype, channels_last):
    """torchvision's RetinaNet on the same boxes and class count, everything trainable, its own losses."""
    torch.manual_seed(0)
    net = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=80, min_size=size, max_size=size).train()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    targets = [{"boxes": b, "labels": l} for b, l in zip(batch["boxes"], batch["labels"])]

    def step():
        images = batch["images"].float() / 255
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = net(list(images), targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


RIVALS = {  # name: (step, precision, channels_last)
    "ours, bf16 channels_last (default)": (our_step, torch.bfloat16, True),
    "torchvision, fp32 (its default)": (torchvision_step, torch.float32, False),
    "torchvision, bf16 channels_last": (torchvision_step, torch.bfloat16, True),
    "ours, fp32": (our_step, torch.float32, False),
}


def serve(name, size, batch, threads):
    """A rival's own process: a step for every line on stdin, its seconds on stdout."""
    step, dtype, channels_last = RIVALS[name]
    if step is our_step:
        util.setup("cpu", workers=0)  # the allocator settings that st.py runs with; torchvision runs as it would for a user
    torch.set_num_threads(threads)
    if step is our_step:
        c = recipes.settings(st.Config(recipe="coco-r50", image_size=size, batch=batch), 1)
        _, step = our_step(fake_batch(size, batch), c, torch.device("cpu"), dtype, channels_last)
    else:
        step = step(fake_batch(size, batch), size, dtype, channels_last)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def train(size, batch, threads, rounds):
    flags = [f"--size={size}", f"--batch={batch}", f"--threads={threads}"]
    processes = {name: subprocess.Popen([sys.executable, __file__, "train", f"--serve={name}", *flags], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in RIVALS}
    times = {name: [] for name in RIVALS}
    for r in range(rounds + 2):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise UserError(f"{name} stopped; its message is above. Lower --size or --batch")
            seconds = float(line)
            if r > 1:  # two rounds of warming up
                times[name].append(seconds)
    for process in processes.values():
        process.communicate()
    print(f"training step, RetinaNet ResNet-50-FPN, {size} px, batch {batch}, {threads} threads, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, {rounds} rounds")
    for name, t in times.items():
        print(f"  {name:36s} median {statistics.median(t):6.3f} s   min {min(t):6.3f}   max {max(t):6.3f}")

    def ratio(a, b):
        each = [x / y for x, y in zip(times[a], times[b])]
        return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"
    ours, theirs, same, plain = RIVALS
    print(f"  default to default                   {ratio(ours, theirs)}")
    print(f"  both bf16 channels_last              {ratio(ours, same)}")
    print(f"  both fp32                            {ratio(plain, theirs)}")


def recipe(name, size, batch, rounds, compile, gradient_checkpointing):
    """Training steps of a recipe on this device, without the loader: images/s, and peak memory where it can be read."""
    _, _, device, _ = util.setup(workers=0)
    dtype = util.precision("auto", device)
    if name not in recipes.RECIPES:
        raise UserError(f"--recipe {name} does not exist; there are {', '.join(recipes.RECIPES)}")
    c = recipes.settings(st.Config(task=recipes.RECIPES[name]["task"], recipe=name, image_size=size, batch=batch, compile=compile,
                                   gradient_checkpointing=gradient_checkpointing), 1)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    net, step = our_step(fake_batch(c["image_size"], batch), c, device, dtype)
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    each = [batch / t for t in times[2:]]  # two rounds of warming up
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else "not measured on a CPU"
    fixed, image = recipes.memory(net.to("meta"), c, 1, dtype)
    print(f"{name}, {c['image_size']} px, batch {batch}, {str(dtype)[6:]} on "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {rounds} rounds\n"
          f"  images/s     median {statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})\n"
          f"  peak memory  {peak} (estimated {(fixed + batch * image) / 1e9:.1f} GB)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that errors are one line
    parser.add_argument("what", choices=["train", "recipe"])
    parser.add_argument("--recipe", default="coco-r50", help="row of recipes.py, for 'recipe'")
    parser.add_argument("--size", type=int, help="default: 320, or the recipe's")
    for name, value in (("batch", 4), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--compile", action="store_true", help="for 'recipe', as in st.py")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for 'recipe', as in st.py")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError("--rounds must be 1 or more")
    if args.what == "recipe":
        return recipe(args.recipe, args.size, args.batch, args.rounds, args.compile, args.gradient_checkpointing)
    args.size = args.size or 320
    if min(args.size, args.batch, args.threads, args.rounds) < 1:
        raise UserError("--size, --batch, --threads and --rounds must be 1 or more")
    if args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of 32")
    if args.serve:
        serve(args.serve, args.size, args.batch, args.threads)
    else:
        train(args.size, args.batch, args.threads, args.rounds)


if __name__ == "__main__":
    run(main)
