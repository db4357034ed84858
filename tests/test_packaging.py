"""What is shipped, what an import costs, and which part may know which."""

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import reparamc

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "reparamc").rglob("*.py"))
REWRITES = sorted((ROOT / "passes" / "reparamc_passes").glob("*.py"))
ZOO = sorted((ROOT / "fastvit_zoo").rglob("*.py"))

EDGES = {
    "errors": set(),
    "algebra": {"errors"},
    "report": {"errors", "algebra"},
    "certificate": {"errors"},
    "equivalence": {"errors", "algebra", "report"},
    "compiler": {"errors", "algebra", "report", "equivalence", "certificate"},
    "passes": {"algebra", "compiler"},
    "onnx": {"errors", "algebra", "report", "equivalence", "certificate", "compiler", "passes"},
    "fx": {"errors", "algebra", "report", "equivalence", "certificate", "compiler", "passes"},
    "verify": {"errors", "algebra", "report", "equivalence", "certificate", "onnx"},
    "training": {"errors", "algebra", "report", "equivalence", "onnx", "fx"},
    "testing": {"errors", "algebra", "report", "equivalence", "onnx", "fx"},
    "__main__": {"errors", "algebra", "report", "compiler", "onnx", "verify", "training", "passes"},
}
"""What each part may import of the others; nobody but `reparamc` itself may import what is not listed."""

FRAMEWORKS = {
    "onnx": {"onnx", "verify", "testing", "certificate/onnx"},
    "torch": {"fx", "training", "testing", "certificate/fx"},
}
"""Where a framework may be imported: a part, or files of it by the start of their names."""


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
        "from reparamc.__main__ import main; assert main(['passes']) == 0; print(reparamc_passes.__file__)"
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
        "from reparamc.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from reparamc.__main__ import main\nmain(['passes'])",
    ],
)
def test_light_imports(code: str) -> None:
    names = "{'torch', 'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'hypothesis'}"
    heavy = f"import sys; print(sorted({names} & sys.modules.keys()))"
    assert run_python(f"{code}\n{heavy}").splitlines()[-1] == "[]"


def test_fuse_fx_does_without_torch_compile() -> None:
    """Its import takes as long as that of torch."""
    code = (
        "import sys, torch, reparamc; net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).eval(); "
        "reparamc.fuse_fx(net, torch.ones(1, 2)); print('torch._dynamo' in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "False"


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
from reparamc.__main__ import main
assert main(["fuse", sys.argv[1], "-o", sys.argv[2]]) == 0
assert main(["audit", sys.argv[2], "--against", sys.argv[1]]) == 0
assert not any(name.split(".")[0] == "torch" for name in sys.modules)
"""
    run_python(code, source, target)
    assert [n.op_type for n in onnx.load(target).graph.node] == ["Conv"]


# Which part may know which


def imports(path: Path, types: bool = False) -> Iterator[str]:
    """Every module that ``path`` imports, anywhere in it; under ``if TYPE_CHECKING`` only with ``types``."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not types:
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


def part(path: Path) -> str:
    """The row of `EDGES` that ``path`` belongs to."""
    inner = path.relative_to(ROOT)
    return "passes" if inner.parts[0] == "passes" else inner.parts[1].removesuffix(".py")


def edges(path: Path) -> set[str]:
    """The other parts that ``path`` imports."""
    found = set()
    for name in imports(path, types=True):
        top, _, rest = name.partition(".")
        if top == "reparamc_passes":
            found.add("passes")
        elif top == "reparamc" and rest:
            found.add(rest.split(".")[0])
    return found - {part(path)}


OURS = [p for p in (*LIBRARY, *REWRITES) if p.parent.name != "reparamc" or p.name in ("__main__.py", "errors.py")]


@pytest.mark.parametrize("name", EDGES)
def test_imports_point_one_way(name: str) -> None:
    files = [p for p in OURS if part(p) == name]
    assert files, "a part without files"
    found = {(p.name, other) for p in files for other in edges(p) if other not in EDGES[name]}
    assert found == set()


def test_the_table_of_edges_has_no_circle() -> None:
    assert {part(p) for p in OURS} == set(EDGES)
    for at, name in enumerate(EDGES):
        assert EDGES[name] <= set(list(EDGES)[:at]), f"{name} imports something below it in the table"


def test_no_circle_of_files() -> None:
    """Imports for types included."""
    by_name = {_module(p): p for p in OURS}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " > ".join((*path, name))
        if name in done:
            return
        for other in imports(by_name[name], types=True):
            if other in by_name:
                visit(other, (*path, name))
        done.add(name)

    for name in by_name:
        visit(name, ())


def _module(path: Path) -> str:
    inner = path.relative_to(ROOT / "passes" if "passes" in path.relative_to(ROOT).parts[0] else ROOT)
    return ".".join(inner.with_suffix("").parts).removesuffix(".__init__")


def test_only_adapters_import_a_framework() -> None:
    for path in OURS:
        found = outside(path)
        for framework, places in FRAMEWORKS.items():
            where = path.relative_to(ROOT / "reparamc").as_posix() if "reparamc" in path.parts[-3:-1] else ""
            if not any(part(path) == place or where.startswith(place) for place in places):
                assert not found & {framework, f"{framework}runtime"}, path
    plain = {"numpy", "ml_dtypes", "reparamc"}
    assert all(outside(p) <= plain for p in OURS if part(p) == "compiler")
    assert all(outside(p) <= plain | {"array_api_compat"} for p in OURS if part(p) == "algebra")
    assert all(outside(p) <= {"numpy", "reparamc", "reparamc_passes"} for p in REWRITES)


def test_few_things_at_the_top() -> None:
    entries = [p for p in (ROOT / "reparamc").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 14


def test_the_library_does_not_know_the_zoo_nor_the_models_the_compiler() -> None:
    assert not any("fastvit_zoo" in outside(path) for path in LIBRARY)
    models = [p for p in ZOO if p.parent.name == "fastvit_zoo" and p.name != "__main__.py"]
    assert not any(outside(path) & {"reparamc", "reparamc_passes", "onnx"} for path in models)


# Words


def test_every_module_says_what_it_is_for() -> None:
    assert not [p for p in (*LIBRARY, *REWRITES, *ZOO) if not ast.get_docstring(ast.parse(p.read_text()))]
