"""What is shipped, what an import costs, and which part may know which."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import reparamc
from reparamc_passes import PASSES

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "reparamc").rglob("*.py"))
REWRITES = sorted((ROOT / "passes" / "reparamc_passes").glob("*.py"))
ZOO = sorted((ROOT / "fastvit_zoo").glob("*.py"))

ALGEBRA = {"cost", "evaluate", "expr", "kernel", "probe", "rewrite", "route", "shape", "text"}
DRIVERS = {"duplicates", "graph", "host", "impulse", "lift", "outcome", "pieces", "plan", "region", "verify"}
PROOF = {"agreement", "certify", "normal_form", "normal_kernels", "normal_layouts", "views"}
PLAIN = ALGEBRA | DRIVERS | PROOF | {"_version", "compare", "dtypes", "errors", "record", "report", "verification"}
"""Modules that any other may use."""


def run_python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_these_top_level_names_and_no_others(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"reparamc", "reparamc_passes", "fastvit_zoo", f"reparamc-{reparamc.__version__}.dist-info"}


def test_the_wheel_has_every_module_and_its_types(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, files in (("reparamc", LIBRARY), ("reparamc_passes", REWRITES), ("fastvit_zoo", ZOO)):
        inner = {f.relative_to(f.parents[[p.name for p in f.parents].index(folder)]) for f in files}
        assert {f"{folder}/{f}" for f in inner} | {f"{folder}/py.typed"} <= names


def test_the_wheel_runs(wheel: zipfile.ZipFile) -> None:
    """All that ``reparamc passes`` needs is in it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reparamc, reparamc_passes; "
        "from reparamc.cli import main; assert main(['passes']) == 0; print(reparamc_passes.__file__)"
    )
    assert str(wheel.filename) in run_python(code, wheel.filename).splitlines()[-1]


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
    assert f"Version: {reparamc.__version__}" in lines
    assert "Requires-Python: >=3.10" in lines
    needed = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not any("torch" in line for line in needed)
    assert any("torch" in line and "extra == 'torch'" in line for line in lines)


# The version


def test_one_version() -> None:
    assert importlib.metadata.version("reparamc") == reparamc.__version__
    assert f"## [{reparamc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# What is imported when


@pytest.mark.parametrize(
    "code",
    [
        "import reparamc",
        "import reparamc, reparamc_passes",
        "import reparamc.testing",
        "import reparamc.testing.pytest_plugin",
        "from reparamc.testing import assert_equivalent, fuse_guard, inputs_for, randomize_batchnorm",
        "from reparamc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from reparamc.cli import main\nmain(['passes'])",
    ],
)
def test_light_imports(code: str) -> None:
    names = "{'torch', 'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'hypothesis'}"
    heavy = f"import sys; print(sorted({names} & sys.modules.keys()))"
    assert run_python(f"{code}\n{heavy}").splitlines()[-1] == "[]"


def test_a_file_is_fused_and_audited_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    norm = {name: np.full(2, 1.5, np.float32) for name in ("gamma", "beta", "mean", "var")}
    constants = {"w": np.ones((2, 2, 1, 1), np.float32), **norm}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("BatchNormalization", ["c", *norm], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), source)
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "fastvit_zoo"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, NoTorch())
from reparamc.cli import main
assert main(["fuse", sys.argv[1], "-o", sys.argv[2]]) == 0
assert main(["audit", sys.argv[2], "--against", sys.argv[1]]) == 0
assert not any(name.split(".")[0] == "torch" for name in sys.modules)
"""
    run_python(code, source, target)
    assert [n.op_type for n in onnx.load(target).graph.node] == ["Conv"]


# Which part may know which


def imports(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, anywhere in it but under ``if TYPE_CHECKING``."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                stack.extend(node.orelse)
                continue
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.ImportFrom():
                raise AssertionError(f"{path.name}: relative import")
        stack.extend(ast.iter_child_nodes(node))


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport a.b as c\nif TYPE_CHECKING:\n    import d\nelse:\n    import e\n"
        "def f():\n    from g import h\n"
    )
    assert set(imports(path)) == {"typing", "a.b", "e", "g"}


def outside(path: Path) -> set[str]:
    """Top-level packages that ``path`` imports beyond Python's own."""
    return {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names


def ours(path: Path) -> set[str]:
    """Modules of reparamc that ``path`` imports."""
    return {name.partition(".")[2] for name in imports(path) if name.split(".")[0] == "reparamc"}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_the_algebra_knows_no_host_graph_and_no_rewrite(name: str) -> None:
    path = ROOT / "reparamc" / f"{name}.py"
    assert outside(path) <= {"numpy", "ml_dtypes", "reparamc"}
    assert ours(path) <= PLAIN


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem in PROOF or "_certify" in p.stem], ids=lambda p: p.name)
def test_the_certificate_shares_no_code_with_the_rewriter(path: Path) -> None:
    """What it proves must not rest on what it is to prove; the types of an ONNX model are ONNX's own inference."""
    others = {name for name in ours(path) if "_certify" not in name}
    assert others <= PROOF | {"errors", "onnx_values"}
    names = {alias.name for n in ast.walk(ast.parse(path.read_text())) for alias in getattr(n, "names", [])
             if isinstance(n, ast.ImportFrom) and n.module == "reparamc.onnx_values"}  # fmt: skip
    assert names <= {"Types", "attribute", "skeleton"}


@pytest.mark.parametrize("path", REWRITES, ids=lambda p: p.name)
def test_rewrites_know_only_the_algebra(path: Path) -> None:
    assert outside(path) <= {"numpy", "reparamc", "reparamc_passes"}
    assert ours(path) <= ALGEBRA


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_only_adapters_import_a_framework(path: Path) -> None:
    found = outside(path)
    if not path.name.startswith("onnx_"):
        assert not found & {"onnx", "onnxruntime", "google"}
    if not path.name.startswith("fx_"):
        assert "torch" not in found
    other = "fx_" if path.name.startswith("onnx_") else "onnx_"
    if path.name.startswith(("fx_", "onnx_")):
        assert not any(name.split(".")[-1].startswith(other) for name in ours(path))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_does_not_know_the_zoo(path: Path) -> None:
    assert "fastvit_zoo" not in outside(path)


@pytest.mark.parametrize("path", [p for p in ZOO if p.name != "__main__.py"], ids=lambda p: p.name)
def test_the_models_do_not_need_the_compiler(path: Path) -> None:
    assert not outside(path) & {"reparamc", "reparamc_passes", "onnx"}


# Words


@pytest.mark.parametrize("name", [p.name for p in PASSES])
def test_every_pass_is_documented(name: str) -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"| `{name}` |" in readme
    assert re.search(rf"^    {name} +\d+$", readme, re.MULTILINE), "the output of make demo lists it"
    assert f"\n## {name}\n" in (ROOT / "docs" / "rewrites.md").read_text()


def test_the_table_of_the_readme_has_every_module_and_no_other() -> None:
    rows = [
        line.split("|")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `reparamc/")
    ]
    named = {name for row in rows for name in re.findall(r"`(?:reparamc/)?([\w*]+)`", row)}
    modules = {path.stem for path in (ROOT / "reparamc").glob("*.py") if not path.stem.startswith("_")} | {"testing"}
    assert {m for m in modules if not any(fnmatch(m, name) for name in named)} == set()
    assert {name for name in named if not any(fnmatch(m, name) for m in modules)} == set()


@pytest.mark.parametrize("path", [*LIBRARY, *REWRITES, *ZOO], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
