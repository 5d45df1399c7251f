"""Imports go one way, as docs and design draw it: read from the syntax of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Data flows down this list; a part imports only from those before it, or from its own.
ORDER = [
    ["atlasvi_kernels"],
    ["errors"],
    ["types", "files", "progress", "memory"],
    ["store"],
    ["stream"],
    ["likelihoods"],
    ["nn"],
    ["train"],
    ["infer"],
    ["de"],
    ["models"],
    ["metrics", "simulate", "plots", "imputation"],
    ["report", "serve"],
    ["demo", "scorecard"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

# Where an import goes up, and why. (module, enclosing functions, part it imports)
EXCEPTIONS = {
    # People look for streaming on the atlas itself.
    ("atlasvi/store/atlas.py", "Atlas.stream", "stream"),
    ("atlasvi/store/atlas.py", "Atlas.iter_blocks", "stream"),
}
# The package itself holds the version and the lazy names, no code of its own; it is at no rank.
PACKAGE = "atlasvi"


def modules():
    return sorted(
        p.relative_to(ROOT) for folder in ("atlasvi", "kernels") for p in (ROOT / folder).rglob("*.py")
    )


def part_of(module):
    """The part that a dotted module name belongs to; ``None`` if it is not ours."""
    head, *rest = module.split(".")
    if head == "atlasvi_kernels":
        return head
    if head != PACKAGE:
        return None
    return rest[0] if rest else PACKAGE


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path, tree=None):
    """``(line, dotted name, enclosing scope, only for types)`` of each import of a file."""
    found = []
    package = ["atlasvi_kernels" if path.parts[0] == "kernels" else "atlasvi", *path.parts[1:-1]]

    def visit(node, scope, typing):
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name, scope, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from atlasvi import stream` imports the part `stream`.
            names = [f"{stem}.{a.name}" for a in node.names] if stem in (PACKAGE,) else [stem]
            found.extend((node.lineno, name, scope, typing) for name in names)
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{scope}.{node.name}".lstrip(".")
            visit(child, inner, typing or (is_type_checking(node) and child in node.body))

    visit(tree or ast.parse((ROOT / path).read_text()), "", False)
    return found


def violations(path, tree=None):
    own = "atlasvi_kernels" if path.parts[0] == "kernels" else path.parts[1].removesuffix(".py")
    if path == Path("atlasvi/__init__.py"):
        return []
    wrong = []
    for line, name, scope, typing in imports(path, tree):
        part = part_of(name)
        # Names for annotations run nothing and hold up no import; the package holds only names.
        if part is None or part == own or typing or name.removeprefix("atlasvi.") in ("__version__", PACKAGE):
            continue
        if (path.as_posix(), scope, part) in EXCEPTIONS:
            continue
        if part not in RANK or RANK[part] > RANK[own] or (RANK[part] == RANK[own]):
            wrong.append(
                f"{path}:{line} ({scope or 'module'}) imports {name}, which does not come before {own}"
            )
    return wrong


def test_every_module_has_its_place():
    parts = {p.parts[1].removesuffix(".py") for p in modules() if p.parts[0] == "atlasvi"} - {"__init__"}
    assert parts <= RANK.keys(), f"give {parts - RANK.keys()} a place in ORDER"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_go_one_way(path):
    assert not violations(path)


def test_each_exception_is_still_needed():
    used = {
        (path.as_posix(), scope, part_of(name))
        for path in modules()
        for _, name, scope, typing in imports(path)
        if not typing
    }
    assert used >= EXCEPTIONS


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("atlasvi/store/x.py", "from atlasvi.stream import pack", True),
        ("atlasvi/store/x.py", "from atlasvi import stream", True),
        ("atlasvi/store/x.py", "import atlasvi.models.scvi", True),
        ("atlasvi/store/x.py", "def f():\n    from atlasvi.train import fit", True),
        ("atlasvi/store/x.py", "from ..models import base", True),
        ("atlasvi/train/x.py", "from atlasvi.models.base import CountModel", True),
        ("atlasvi/infer/x.py", "from atlasvi.models import base", True),
        ("kernels/x.py", "from atlasvi.types import Minibatch", True),
        ("atlasvi/store/x.py", "from atlasvi.types import FieldMap", False),
        ("atlasvi/store/x.py", "from atlasvi_kernels import CSR", False),
        (
            "atlasvi/store/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from atlasvi.models.scvi import SCVI",
            False,
        ),
    ],
)
def test_the_check_itself_sees_what_it_should(path, text, found):
    assert bool(violations(Path(path), ast.parse(text))) is found


def test_kernels_import_nothing_of_atlasvi():
    for path in modules():
        if path.parts[0] == "kernels":
            assert not [name for _, name, _, _ in imports(path) if name.split(".")[0] == "atlasvi"], path


def test_kernels_cannot_be_imported_by_the_folder_name():
    result = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "atlasvi_kernels" in last


def loaded_by(code):
    """Top-level packages in memory after some code, in a process of its own."""
    script = f"{code}\nimport sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_model_needs_neither_scanpy_nor_matplotlib_nor_triton():
    loaded = loaded_by("import atlasvi; atlasvi.SCVI")
    assert "torch" in loaded  # else it proves nothing
    assert not loaded & {"scanpy", "matplotlib", "triton"}


def test_the_package_alone_is_light():
    assert not loaded_by("import atlasvi") & {"torch", "numba", "anndata", "numpy", "pandas"}
