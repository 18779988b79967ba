"""st.py on what users hand it: odd but legal data works, and whatever cannot work ends in one line that says why."""
import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import backbones
import ops
import recipes
import runs
import st
from util import UserError

ROOT = Path(st.__file__).parent
FLAGS = ("--data coco --recipe tiny --image-size 64 --batch 2 --steps 2 --student-steps 2 --threshold 0.0 --workers 0 "
         "--precision fp32 --labeled 0.5").split()
SCORING = "--data coco --workers 0 --precision fp32".split()  # all that --mode eval and pseudo want of them
COLOURS = [(220, 30, 30), (30, 30, 220)]


def dataset(root, train=12, val=4, objects=lambda split, i: 1 + i % 2, categories=(3, 90)):
    """64 px images; image i of a split has objects(split, i) coloured squares, the k-th of category k."""
    (root / "images").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for i in range(count):
            rng = np.random.default_rng((count, i))
            pixels = rng.integers(90, 110, (64, 64, 3)).astype(np.uint8)
            for k in range(objects(split, i)):
                k, (x, y) = k % len(categories), rng.integers(0, 40, 2).tolist()
                pixels[y:y + 20, x:x + 20] = COLOURS[k]
                annotations.append(dict(id=len(annotations) + 1, image_id=7 * i + 3, category_id=categories[k],
                                        bbox=[x, y, 20, 20]))
            Image.fromarray(pixels).save(root / "images" / f"{split}_{i}.jpg")
            images.append(dict(id=7 * i + 3, file_name=f"{split}_{i}.jpg", width=64, height=64))
        (root / f"{split}.json").write_text(json.dumps(dict(
            images=images, annotations=annotations, categories=[dict(id=c, name=f"class{c}") for c in categories])))
    return root


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def main(root, out, *flags):
    """Flags given later override those of FLAGS."""
    given = SCORING if {"eval", "pseudo"} & set(map(str, flags)) else FLAGS
    st.main([*given, "--root", str(root), "--out", str(out), *map(str, flags)])
    return out


def refused(root, out, *flags, match):
    with pytest.raises(UserError, match=match) as error:
        main(root, out, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """An untrained teacher finds boxes: their scores are far under detect.FLOOR."""
    detect = ops.detect
    monkeypatch.setattr(ops, "detect", lambda *args, **more: detect(*args, **{**more, "min_score": 0.0}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("plain") / "data")


@pytest.fixture(scope="module")
def teacher(plain, tmp_path_factory):
    """A run directory with a teacher of two steps, not to be changed."""
    return main(plain, tmp_path_factory.mktemp("teacher") / "run", "--mode", "train") / "teacher"


def results(out):
    return json.loads((out / "results.json").read_text())


def command(*args, **options):
    return subprocess.run([sys.executable, ROOT / "st.py", *FLAGS, *map(str, args)], capture_output=True, text=True, **options)


def fails_in_one_line(done, match):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and re.search(match, lines[0]), done.stderr


# ---- legal data --------------------------------------------------------------------------------------------------

def test_images_without_objects_are_trained_and_scored_like_any(tmp_path):
    root = dataset(tmp_path / "data", objects=lambda split, i: i % 2)
    scores = results(main(root, tmp_path / "run", "--batch", 4))
    assert 0 <= scores["student"]["AP"] <= 1 and 0 <= scores["teacher"]["AR100"] <= 1


@pytest.mark.parametrize("without", [("train",), ("val",), ("train", "val")], ids="+".join)
def test_sets_without_any_object_do_not_end_the_run(tmp_path, without):
    root = dataset(tmp_path / "data", objects=lambda split, i: 0 if split in without else 1)
    for stage in ("teacher", "student"):
        ap = results(main(root, tmp_path / "run"))[stage]["AP"]
        assert ap == -1 if "val" in without else 0 <= ap <= 1  # COCO's -1: undefined


def test_one_class_is_enough(tmp_path):
    root = dataset(tmp_path / "data", categories=(7,))
    out = main(root, tmp_path / "run", "--rounds", 2, "--control")
    assert {"teacher", "student", "control", "student2", "control2"} <= results(out).keys()
    assert {a["category_id"] for a in json.loads((out / "pseudo2" / "pseudo.json").read_text())["annotations"]} == {7}


def test_category_ids_with_gaps_reach_the_pseudo_labels_and_the_score_as_they_were(plain, tmp_path, monkeypatch):
    scored = []
    coco_ap = st.evaluation.coco_ap
    monkeypatch.setattr(st.evaluation, "coco_ap", lambda file, found, ids, class_ids: scored.append(class_ids) or
                        coco_ap(file, found, ids, class_ids))
    out = main(plain, tmp_path / "run")
    found = json.loads((out / "pseudo" / "pseudo.json").read_text())
    assert [c["id"] for c in found["categories"]] == [3, 90] and {a["category_id"] for a in found["annotations"]} == {3, 90}
    assert scored == [[3, 90]] * 2 and "student" in results(out) and (out / "report.html").exists()


@pytest.mark.parametrize("bbox", [
    [5, 5, 20, 20], [5, 5, 0, 9], [60, 60, 90, 90], [-90, 0, 9, 9],
    []], ids=str)
def test_annotations_with_the_barest_fields_or_bad_boxes_do_not_end_the_run(tmp_path, bbox):
    root = dataset(tmp_path / "data", train=4, val=2)
    for split in ("train", "val"):
        edit(root / f"{split}.json", lambda v: v["annotations"].append(dict(image_id=3, category_id=90, bbox=bbox)))
    assert 0 <= results(main(root, tmp_path / "run", "--mode", "train"))["teacher"]["AP"] <= 1


# ---- image files -------------------------------------------------------------------------------------------------

def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda p: p.write_bytes(b"")], ids=["truncated", "missing", "empty"])
def test_an_unusable_training_image_is_named_and_replaced(tmp_path, capsys, damage):
    root = dataset(tmp_path / "data", train=4, val=2)
    damage(root / "images" / "train_2.jpg")
    out = main(root, tmp_path / "run", "--mode", "train", "--labeled", 1, "--batch", 4)
    listed = (out / "teacher" / "quarantine.txt").read_text().splitlines()
    assert len(listed) == 1 and "train_2.jpg" in listed[0] and "teacher" in results(out)
    assert len([line for line in capsys.readouterr().err.splitlines() if "train_2.jpg" in line]) == 1


def test_cmyk_greyscale_and_sixteen_bit_images_are_used(tmp_path):
    root = dataset(tmp_path / "data", train=4, val=2)
    folder = root / "images"
    for i, mode in ((0, "CMYK"), (1, "L")):
        Image.open(folder / f"train_{i}.jpg").convert(mode).save(folder / f"train_{i}.jpg")
    Image.fromarray(np.full((64, 64), 30000, np.uint16)).save(folder / "train_2.png")
    edit(root / "train.json", lambda v: v["images"][2].update(file_name="train_2.png"))
    out = main(root, tmp_path / "run", "--mode", "train", "--labeled", 1, "--batch", 4)
    assert "teacher" in results(out) and not (out / "teacher" / "quarantine.txt").exists()


def test_labelling_a_folder_names_a_bad_image_and_labels_the_others(teacher, tmp_path, capsys):
    pool = dataset(tmp_path / "data", train=3, val=0) / "images"
    truncate(pool / "train_1.jpg")
    out = tmp_path / "labels"
    st.main(["--mode", "pseudo", "--ckpt", str(teacher), "--unlabeled", str(pool), "--out", str(out), "--threshold", "0.0",
             "--workers", "0", "--precision", "fp32"])
    found = json.loads((out / "pseudo.json").read_text())
    assert [im["file_name"] for im in found["images"]] == ["train_0.jpg", "train_2.jpg"]
    bad = [json.loads(line) for line in open(out / "part_0_of_1.jsonl") if "bad" in json.loads(line)]
    assert len(bad) == 1 and "train_1.jpg" in bad[0]["bad"] and "1 unusable images" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_unusable_images_is_one_clear_line(tmp_path, workers):
    root = dataset(tmp_path / "data", train=4, val=2)
    for path in (root / "images").glob("train_*"):
        path.unlink()
    refused(root, tmp_path / "run", "--workers", workers, match="20 images in a row are unusable.*train_.*data.py check")


def test_too_many_unusable_images_end_the_run_and_are_listed(tmp_path):
    root = dataset(tmp_path / "data", train=50, val=2)
    for i in range(0, 50, 2):
        truncate(root / "images" / f"train_{i}.jpg")
    refused(root, tmp_path / "run", "--labeled", 1, "--mode", "train", "--batch", 50, match="unusable images .*quarantine.txt")
    listed = (tmp_path / "run" / "teacher" / "quarantine.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) > 20


def test_unreadable_validation_images_are_named(tmp_path, capsys):
    root = dataset(tmp_path / "data", train=4, val=3)
    truncate(root / "images" / "val_1.jpg")
    main(root, tmp_path / "run", "--mode", "train")
    captured = capsys.readouterr()
    assert "val_1.jpg" in captured.out + captured.err


# ---- files that are not what they should be ----------------------------------------------------------------------

@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("text, match", [
    ("not json", "not readable as json"), ("[]", "no list 'images'"), ('{"images": [], "categories": []}', "no list 'annotations'"),
    ('{"images": [], "annotations": [], "categories": [{"id": 3}, {"id": 90}]}', "lists no image"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 3}, {"id": 90}]}', "lacks a field"),
    (None, "no annotation file|no dataset")])
def test_an_annotation_file_that_is_none_is_named(tmp_path, split, text, match):
    root = dataset(tmp_path / "data", train=2, val=2)
    (root / f"{split}.json").unlink() if text is None else (root / f"{split}.json").write_text(text)
    assert str(root) in refused(root, tmp_path / "run", match=match)


def test_train_and_validation_files_of_different_categories_are_refused(tmp_path):
    root = dataset(tmp_path / "data", train=2, val=2)
    edit(root / "val.json", lambda v: v["categories"].pop())
    refused(root, tmp_path / "run", match=r"val.json has other categories .*\[90\]")


def test_an_unlabelled_source_must_hold_images_that_are_not_labelled(plain, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(plain, tmp_path / "run", "--labeled", 1, match="--labeled 1 leaves no image .*give --unlabeled")
    refused(plain, tmp_path / "run", "--unlabeled", tmp_path / "empty", match="no image found at --unlabeled .*empty")
    refused(plain, tmp_path / "run", "--unlabeled", tmp_path / "nowhere", match="no image found at --unlabeled .*nowhere")
    refused(plain, tmp_path / "run", "--labeled", 1, "--unlabeled", plain / "images", match="labelled or a validation image")
    refused(plain, tmp_path / "run", "--split", plain / "train.json", match="is not a label split")


@pytest.mark.parametrize("flags, match", [
    ("--image-size 100", "100 is not a multiple of 32; use 96"), ("--image-size 0", "multiple of 32"),
    ("--batch 3 --accumulate 2", "3 does not divide"), ("--batch 0", "--batch 0 is too small"),
    ("--backbone resnet51", "resnet51 does not exist; there are .*resnet50"), ("--recipe big", "big does not exist; there are tiny"),
    ("--threshold 1.5", "1.5 is neither auto"), ("--threshold high", "high is neither auto"), ("--threshold nan", "nan is neither"),
    ("--norm frozen", "--init random has none"), ("--compile --gradient-checkpointing", "leave out"),
    ("--labeled 0", "0.0 is not a fraction"), ("--labeled 1.1", "1.1 is not a fraction"), ("--labeled nan", "not a fraction"),
    ("--mode eval", "needs --ckpt"), ("--mode pseudo", "needs --ckpt"), ("--ckpt file.pt", "--ckpt is for --mode pseudo and eval"),
    ("--mode eval --ckpt file.pt --image-size 96 --lr 1", "from --ckpt; leave out --image-size, --lr"),
    ("--mode pseudo --ckpt file.pt --dry-run", "from --ckpt; leave out --dry-run")])
def test_values_that_make_no_sense_are_refused_before_anything_is_written(plain, tmp_path, flags, match):
    refused(plain, tmp_path / "run", *flags.split(), match=match)
    assert not (tmp_path / "run").exists()


def test_a_training_split_that_shares_images_with_validation_is_warned_of(tmp_path, capsys):
    root = dataset(tmp_path / "data", train=6, val=2)
    train, val = (json.loads((root / f"{split}.json").read_text()) for split in ("train", "val"))
    (root / "images" / val["images"][0]["file_name"]).write_bytes((root / "images" / train["images"][0]["file_name"]).read_bytes())
    main(root, tmp_path / "run", "--labeled", 0.9)
    assert re.search("1 (labelled images are also validation|unlabelled images are labelled or validation)", capsys.readouterr().out)


def test_categories_of_other_names_are_refused(plain, tmp_path, teacher):
    other = dataset(tmp_path / "other", train=2, val=2)
    value = json.loads((other / "val.json").read_text())
    value["categories"] = [{**c, "name": "z" + c.get("name", "")} for c in value["categories"]]
    (other / "val.json").write_text(json.dumps(value))
    refused(other, tmp_path / "run", "--mode", "eval", "--ckpt", teacher, match="other category names")


def test_labelling_a_folder_asks_for_a_place_of_its_own_and_a_threshold_it_can_know(plain, tmp_path, teacher):
    label = ["--mode", "pseudo", "--ckpt", teacher, "--unlabeled", plain / "images"]
    refused(plain, teacher.parent, *label, match="--out of its own")
    refused(plain, tmp_path / "labels", *label, "--threshold", "auto", match="not a number")


@pytest.mark.parametrize("flags", ["--accumulate 0", "--steps 0", "--student-steps -1", "--seed -1", "--alpha -1"])
def test_counts_that_are_not_positive_are_refused(plain, tmp_path, flags):
    refused(plain, tmp_path / "run", *flags.split(), match=flags.split()[0])


# ---- run directories and checkpoints -----------------------------------------------------------------------------

def test_a_second_process_on_a_run_directory_is_refused(plain, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    code = f"import fcntl; f = open({str(out / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    refused(plain, out, match="run is in use by another process")
    assert sorted(p.name for p in out.iterdir()) == [".lock"]
    other.communicate("")  # its lock goes with it
    main(plain, out, "--mode", "train")


def test_a_second_round_learns_from_the_student_and_its_control_from_the_control(plain, tmp_path):
    out = main(plain, tmp_path / "run", "--rounds", 2, "--control")
    deps = {s: json.loads((out / s / "stage.json").read_text())["deps"] for s in ("pseudo2", "student2", "control2")}
    scored = results(out)
    assert deps["pseudo2"]["teacher"] == deps["student2"]["teacher"] == scored["student"]["weights"]
    assert deps["control2"]["teacher"] == scored["control"]["weights"] != scored["student"]["weights"]


def test_a_student_can_start_as_its_teacher_did(plain, tmp_path):
    flags = ["--lr", 1e-12, "--student-init", "same"]  # weights stay where they start
    out = main(plain, tmp_path / "run", *flags)
    a, b = (runs.load_latest(out / s)["model"]["fpn.lateral.0.weight"] for s in ("teacher", "student"))
    assert torch.allclose(a, b, atol=1e-9)


def test_a_finished_run_is_not_run_again(plain, tmp_path, capsys):
    out = main(plain, tmp_path / "run")
    before = results(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    main(plain, out, "--workers", 1, "--save-every", 1)  # neither matters
    assert (results(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}) == before
    assert capsys.readouterr().out.count("finished before") == 2


@pytest.mark.parametrize("flags, field", [(("--lr", 0.5), "lr: 0.002 -> 0.5"), (("--aug", "s1"), "aug: s4 -> s1"),
                                          (("--steps", 4), "steps: 2 -> 4"), (("--labeled", 0.25), "split: ")])
def test_other_settings_on_a_run_directory_are_refused_naming_what_changed(plain, tmp_path, flags, field):
    out = main(plain, tmp_path / "run", "--mode", "train")
    weights = {p: p.read_bytes() for p in out.rglob("*.pt")}
    refused(plain, out, "--mode", "train", *flags, match=re.escape(field))
    assert {p: p.read_bytes() for p in out.rglob("*.pt")} == weights


def test_a_refused_command_leaves_the_record_of_the_run_alone(plain, tmp_path):
    out = main(plain, tmp_path / "run", "--mode", "train")
    before = {name: (out / name).read_text() for name in ("config.json", "split.json")}
    refused(plain, out, "--mode", "train", "--seed", 1, match="other settings")
    assert {name: (out / name).read_text() for name in before} == before


def test_a_checkpoint_of_other_categories_is_refused(teacher, tmp_path, capsys):
    same = dataset(tmp_path / "same", train=2, val=2)
    main(same, tmp_path / "run", "--mode", "eval", "--ckpt", teacher)
    assert "teacher after 2 steps" in capsys.readouterr().out
    other = dataset(tmp_path / "other", train=2, val=2, categories=(3, 91))
    refused(other, tmp_path / "run", "--mode", "eval", "--ckpt", teacher, match=r"other categories .*\[90, 91\]")


def test_what_is_no_checkpoint_is_refused(plain, tmp_path):
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 99)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    for name in ("garbage.pt", "foreign.pt", "empty", "nowhere"):
        for mode in ("eval", "pseudo"):
            refused(plain, tmp_path / "run", "--mode", mode, "--ckpt", tmp_path / name, match=f"checkpoint .*{name}|--ckpt.*{name}")
    for name in ("garbage.pt", "foreign.pt", "nowhere"):
        refused(plain, tmp_path / name[:3], "--init", tmp_path / name, match=f"--init .*{name}")


@pytest.mark.parametrize("change", [
    lambda state: state["config"].pop("act"), lambda state: state["config"].update(width=32),
    lambda state: state["model"].pop("fpn.lateral.0.weight"), lambda state: state["class_ids"].append(91)],
    ids=["older", "width", "incomplete", "classes"])
def test_a_checkpoint_that_its_own_settings_do_not_describe_is_refused(plain, teacher, tmp_path, change):
    state = runs.load_checkpoint(teacher)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    for mode in ("eval", "pseudo"):
        refused(plain, tmp_path / "run", "--mode", mode, "--ckpt", tmp_path / "changed.pt", "--unlabeled", plain / "images",
                match="changed.pt .*damaged, or was written by another version")


def test_a_mistyped_init_can_be_corrected(plain, teacher, tmp_path):
    refused(plain, tmp_path / "run", "--mode", "train", "--init", tmp_path / "nowhere", match="--init")
    main(plain, tmp_path / "run", "--mode", "train", "--init", runs.checkpoints(teacher)[-1])


def test_an_almost_empty_pseudo_set_is_refused_with_advice(plain, tmp_path):
    text = refused(plain, tmp_path / "run", "--threshold", 0.9, match="almost. empty: 0 boxes on 6 images at threshold 0.90")
    assert "lower --threshold" in text and not (tmp_path / "run" / "student").exists()


def test_the_advice_to_lower_the_threshold_can_be_followed(plain, tmp_path):
    refused(plain, tmp_path / "run", "--threshold", 0.9, match="lower --threshold")
    main(plain, tmp_path / "run", "--threshold", 0.0)


@pytest.mark.parametrize("backbone", ["resnet10", "tf_efficientnet_b0", "spinenet49S"])
def test_a_backbone_of_each_kind_trains_and_its_checkpoint_is_read_again(plain, tmp_path, capsys, backbone):
    out = main(plain, tmp_path / "run", "--mode", "train", "--backbone", backbone)
    state = runs.load_checkpoint(out / "teacher")
    assert state["step"] == 2 and state["config"]["backbone"] == backbone and 0 <= results(out)["teacher"]["AP"] <= 1
    main(plain, tmp_path / "other", "--mode", "eval", "--ckpt", out / "teacher")
    scored = capsys.readouterr().out.partition("teacher after 2 steps")[2]
    again = json.loads(scored[scored.index("{"):])
    assert again == {k: results(out)["teacher"][k] for k in again}


# ---- the backbone's initial weights ------------------------------------------------------------------------------

def resnet10_weights(path, seed=5):
    """A backbone whose norms are neither 0 nor 1, as a bare state dict."""
    torch.manual_seed(seed)
    state = backbones.build("resnet10").state_dict()
    state = {k: v + 0.1 * torch.rand(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, path)
    return state


def test_frozen_norms_stay_as_given_to_the_last_bit_and_the_others_train(plain, tmp_path):
    given = resnet10_weights(tmp_path / "given.pth")
    out = main(plain, tmp_path / "run", "--init", tmp_path / "given.pth", "--norm", "frozen", "--student-steps", 1)
    for stage in ("teacher", "student"):
        model = runs.load_checkpoint(out / stage)["model"]
        kernels = {k for k in given if given[k].ndim > 1}
        for k, v in given.items():
            if not k.endswith("num_batches_tracked"):
                assert torch.equal(model[f"backbone.{k}"], v) == (k not in kernels), k
        assert model["fpn.norm.0.running_mean"].any() and (model["fpn.norm.0.weight"] != 1).any()
        assert (model["classes.norms.0.0.running_var"] != 1).any()


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_network_frozen_by_mistake_is_not_trained(norm):
    c = recipes.settings(recipes.Config(norm=norm, init="imagenet"), 1)
    st.check_trainable(st.build(c, 3), c)
    frozen = {**c, "norm": "frozen"}
    st.check_trainable(st.build(frozen, 3), frozen)
    for net, settings in ((st.build(frozen, 3), c), (st.build(c, 3), frozen), (st.build(frozen, 3), {**frozen, "init": "random"})):
        with pytest.raises(AssertionError):
            st.check_trainable(net, settings)
    net = st.build(c, 3)
    net.backbone.conv1.requires_grad_(False)
    with pytest.raises(AssertionError):
        st.check_trainable(net, c)


@pytest.mark.parametrize("given, match", [
    (lambda: torchvision.models.resnet18().state_dict(), "does not fit resnet10 with norm 'bn': .*missing|is .* in the file"),
    (lambda: {k: v for k, v in backbones.build("resnet10").state_dict().items() if not k.startswith("layer2")}, "missing"),
    (lambda: backbones.build("resnet10"), "unsafe unpickling is refused")], ids=["another net", "half", "module"])
def test_weights_that_do_not_fit_the_backbone_are_refused(plain, tmp_path, given, match):
    torch.save(given(), tmp_path / "given.pth")
    refused(plain, tmp_path / "run", "--mode", "train", "--init", tmp_path / "given.pth", match=f"--init .*given.pth.*({match})")
    assert not list((tmp_path / "run").rglob("*.pt"))


# ---- failures on the way -----------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_images(plain, tmp_path):
    out = tmp_path / "run"
    text = refused(plain, out, "--lr", 1e30, "--optimizer", "sgd", "--steps", 6, match="loss is not finite at step .*--lr")
    path, = (out / "teacher").glob("nonfinite_*.json")
    report = json.loads(path.read_text())
    known = {im["id"] for im in json.loads((plain / "train.json").read_text())["images"]}
    assert str(path) in text and report and {row["image_id"] for row in report} <= known
    assert all(set(row) >= {"part", "boxes", "losses"} for row in report)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"),
                                     RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")], ids=repr)
def test_a_full_disk_costs_nothing_but_the_checkpoint_being_written(plain, tmp_path, monkeypatch, failure):
    flags = ["--mode", "train", "--steps", 3, "--save-every", 1]
    whole = results(main(plain, tmp_path / "whole", *flags))["teacher"]["weights"]
    save = torch.save

    def full(state, path):
        save(state, path)
        if state["step"] == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise failure
    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "run"
    refused(plain, out, *flags, match="cannot write .*step_00000002.pt: .*free some space")
    assert [p.name for p in (out / "teacher").glob("step_*")] == ["step_00000001.pt"]
    assert runs.load_checkpoint(out / "teacher")["step"] == 1
    monkeypatch.setattr(torch, "save", save)
    assert results(main(plain, out, *flags))["teacher"]["weights"] == whole


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(plain, tmp_path, capsys):
    flags = ["--mode", "train", "--steps", 4, "--save-every", 1]
    out = main(plain, tmp_path / "run", *flags)
    whole = results(out)["teacher"]["weights"]
    edit(out / "teacher" / "stage.json", lambda record: record.pop("result"))  # as if killed before it was done
    newest = runs.checkpoints(out / "teacher")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    main(plain, out, *flags)
    captured = capsys.readouterr()
    assert newest.name in captured.err and "damaged" in captured.err
    assert results(out)["teacher"]["weights"] == whole and torch.load(newest, weights_only=True)["step"] == 4


# ---- as a command ------------------------------------------------------------------------------------------------

def test_a_refused_command_prints_one_line_and_exits_with_2(tmp_path):
    fails_in_one_line(command("--root", tmp_path / "nowhere", "--out", tmp_path / "run"), "^error: no dataset at .*nowhere")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_file_of_weights_never_runs_and_ends_in_one_line(plain, tmp_path):
    torch.save({"conv1.weight": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    done = command("--root", plain, "--out", tmp_path / "run", "--mode", "train", "--init", tmp_path / "evil.pth")
    fails_in_one_line(done, "^error: --init .*evil.pth.*unsafe unpickling is refused")
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_for_real_is_one_line(plain, tmp_path):
    """A limit on the size of files stands in for a full disk: the kernel refuses the write half way."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    done = command("--root", plain, "--out", tmp_path / "run", "--mode", "train", preexec_fn=limit)
    fails_in_one_line(done, r"^error: cannot write .*step_00000001.pt")
    assert not list((tmp_path / "run" / "teacher").glob("step_*"))


def test_a_run_directory_that_is_a_file_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "run").write_text("")
    refused(plain, tmp_path / "run", match="run")
