"""Scores a checkpoint on a validation set: that of its run, or another.

python -m tools.score runs/x/student [--root DIR]
"""

import dataclasses
import json
import sys
from pathlib import Path

import answers
import st
import util
from util import flag, need


@dataclasses.dataclass
class Plan:
    """what is scored"""

    root: str = flag("", "data set whose validation images are taken, as of st.py [the run's]")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    paths = argv[:1]
    if not paths or paths[0].startswith("-"):
        paths = []
    plan, machine = util.parse(__doc__, Plan, util.Machine, argv=argv[len(paths) :])
    need(paths, "give a stage's folder or a checkpoint, e.g. runs/x/student")
    proc = util.start(util.Machine(**machine))
    net, about = st.restore(paths[0], proc)
    c = about["config"]
    task = st.TASKS[c["task"]]
    root = Plan(**plan).root or root_of_run(paths[0]) or task.root
    val = task.load(root, "val")
    need(
        val.class_names == about["class_names"],
        f"{root} has other classes than {paths[0]} was trained on; give another --root",
    )
    found = task.answers(net, val, answers.share(val, proc), c["image_size"], proc)
    metrics = task.score(found, val, proc)
    proc.log.say(f"{paths[0]}, step {about['step']}, on {len(val)} images of {val.source}")
    proc.log.say(json.dumps(metrics, indent=1))


def root_of_run(stage):
    """--root of the run that a stage, or a checkpoint in it, belongs to; "" if unknown."""
    for folder in Path(stage).absolute().parents:
        config = folder / "config.json"
        if config.exists():
            return json.loads(config.read_text())["root"]
    return ""


if __name__ == "__main__":
    util.run(main)
