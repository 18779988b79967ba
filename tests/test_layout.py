"""What can be said of the source without running it: it stays flat, shallow and readable."""

import ast
import sys

import pytest
from conftest import ROOT

CORE = sorted(ROOT.glob("*.py"))
SOURCE = CORE + sorted(ROOT.glob("tools/*.py")) + sorted(ROOT.glob("studies/*.py"))
LOCAL = {path.stem for path in CORE} | {"tools", "studies"}
PACKAGES = {"torch", "torchvision", "numpy", "pycocotools", "PIL"}


def imports(tree):
    """Names of the modules that are imported anywhere in a tree, also inside of functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: scripts have none"
            names.add(node.module.split(".")[0])
    return names


def parsed(path):
    return ast.parse(path.read_text())


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def lines_of(node):
    return node.end_lineno - node.lineno + 1


def test_the_top_level_is_a_handful_of_files():
    assert len(CORE) <= 13


def test_the_core_imports_neither_tools_nor_studies():
    exceptions = []
    for path in CORE:
        tree = parsed(path)
        for function in functions(tree):
            if imports(function) & {"tools", "studies"}:
                exceptions.append((path.name, function.name))
                function.body.clear()
        assert not imports(tree) & {"tools", "studies"}, path.name
    assert exceptions == [("data.py", "ensure")]  # draws the embedded world, if it is not there


def test_imports_are_shallow_and_have_no_circle():
    below = {path.stem: imports(parsed(path)) & {p.stem for p in CORE} for path in CORE}

    def depth(name, above=()):
        assert name not in above, f"a circle: {above}"
        return 1 + max((depth(other, (*above, name)) for other in below[name]), default=0)

    assert max(map(depth, below)) <= 5
    for name in ("ops", "augment", "backbones"):  # to be copied alone
        assert not below[name]


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: path.name)
def test_only_the_packages_of_the_project_are_imported(path):
    names = imports(parsed(path)) - LOCAL - set(sys.stdlib_module_names)
    assert names <= PACKAGES


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: path.name)
def test_lines_and_functions_fit_on_a_screen(path):
    assert all(len(line) <= 100 for line in path.read_text().splitlines())
    for function in functions(parsed(path)):
        assert lines_of(function) <= 60, function.name


def test_the_training_loop_of_st_fits_on_a_screen():
    fit = next(f for f in functions(parsed(ROOT / "st.py")) if f.name == "fit")
    loop = next(node for node in fit.body if isinstance(node, ast.For))
    assert lines_of(loop) <= 45


def test_files_are_never_unpickled_unsafely():
    for path in SOURCE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", f"{path.name}, line {node.lineno}"
