"""Which part may import which, and that every kernel has its namesakes."""

import ast
import graphlib
import importlib.machinery
import inspect
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.workloads import WORKLOADS
from vtc import ops, reference

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
VTC = sorted((ROOT / "vtc").rglob("*.py"))
FLOORS = (  # from the ground up: what lies on a floor imports from its own and from those below
    ("vtc.reference", "vtc.files", "vtc.images", "vtc.overlay"),
    ("vtc.ops",),
    ("vtc.methods",),
    ("vtc.config",),
    ("vtc.plan",),
    ("vtc.scores", "vtc.tiles"),
    ("vtc.hf",),
    ("vtc.vllm",),
    ("vtc.api",),
    ("vtc.tiny",),
    ("vtc",),  # vtc/__init__.py: the names
    ("vtc.eval",),
    ("vtc.ui",),
    ("vtc.cli", "vtc.__main__", "bench"),
)
SERVING = (".engine", ".llava", ".llava_next", ".model", ".processing", ".ray", ".transformers_backend")
SHARED = {"tuning", "search"}  # of kernels/: what several operations use


def imports(path):
    """Top-level packages, and dotted modules of this project, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if path.parent == ROOT / "kernels" and node.level == 1:
                module = f"vtc_kernels.{node.module}" if node.module else "vtc_kernels"
            else:
                assert node.level == 0, f"{path}: relative imports hide the direction of a dependency"
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def public_functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in VTC + sorted((ROOT / "bench").rglob("*.py"))}


def imported_modules(module):
    """The modules of this project that a module imports, wherever the import stands. `from vtc import x` is of `vtc`
    unless x is a module; `vtc.x` after `import vtc` is not seen.
    """
    found = set()
    for name in imports(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {"", module}
    return found


def floor_of(module):
    """The floor with the longest name that the module's begins with."""
    names = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    return names[max((name for name in names if f"{module}.".startswith(f"{name}.")), key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module):
    up = [name for name in imported_modules(module) if floor_of(name) > floor_of(module)]
    assert not up


def test_no_import_goes_round_in_a_circle():
    graph = {module: imported_modules(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_alone(path):
    assert packages(path) <= {"collections", "torch", "triton", "vtc_kernels"}


def test_kernels_name_one_another_relatively():
    """The Hub's loader imports them under a name that nobody knows beforehand."""
    assert not [
        path.name for path in KERNELS if "import vtc_kernels" in (text := path.read_text()) or "from vtc" in text
    ]


def test_the_reference_knows_torch_alone():
    assert packages(ROOT / "vtc" / "reference.py") <= {"collections", "torch"}


def test_only_ops_knows_the_kernels():
    known = [path for path in VTC if {"vtc_kernels", "triton"} & packages(path)]
    assert [str(path.relative_to(ROOT)) for path in known] == ["vtc/ops/dispatch.py"]


def test_ops_knows_nothing_of_models():
    for path in sorted((ROOT / "vtc" / "ops").glob("*.py")):
        names = imports(path)
        assert not any(name.startswith("transformers") for name in names), path.name
        assert all(name.startswith(("vtc.reference", "vtc.ops.")) for name in names if name[:4] == "vtc."), path.name


def test_methods_know_operations_and_no_models():
    known = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "torch", "vtc"}
    for path in sorted((ROOT / "vtc" / "methods").glob("*.py")):
        assert packages(path) <= known, path.name
        assert all(name.startswith(("vtc.ops", "vtc.methods.")) for name in imports(path) if name[:4] == "vtc."), path


def test_only_what_is_served_knows_vllm():
    known = {module for module, path in MODULES.items() if "vllm" in packages(path) and module.startswith("vtc")}
    assert known == {f"vtc.vllm{name}" for name in ("", *SERVING)}
    data = {"vtc.hf.compatibility", "vtc.hf.families", "vtc.hf.towers"}
    uses = {module: {name for name in imported_modules(module) if name.startswith("vtc.hf")} for module in MODULES}
    assert {m for m, names in uses.items() if m.startswith("vtc.vllm") and names - data} == {
        "vtc.vllm.transformers_backend"
    }


def test_no_folder_of_the_tests_passes_for_a_package():
    """pytest puts `tests` on Python's path, where a folder counts as an empty package. Libraries look whether others
    are installed, and failed: trl took a folder `vllm` for vLLM.
    """
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir()}
    others = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests")]
    assert not [name for name in folders if importlib.machinery.PathFinder.find_spec(name, others)]
    optional = {Requirement(text).name for text in metadata.requires("vtc-cls")}
    assert {"vllm", "ray"} < optional
    assert not folders & optional


def test_kernels_is_no_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_kernel_has_its_namesakes():
    files = {path.stem for path in KERNELS} - SHARED
    assert (
        files
        == set(ops.OPS)
        == public_functions(ROOT / "vtc" / "reference.py") - {"sorted_choices"}
        == set(WORKLOADS) - {"scored_layers"}
    )
    for op in ops.OPS:
        assert op in public_functions(ROOT / f"vtc/ops/{op}.py")
        assert (ROOT / f"bench/workloads/{op}.py").exists()
        assert (ROOT / f"tests/ops/test_{op}.py").exists()


@pytest.mark.parametrize("op", ops.OPS)
def test_namesakes_have_the_same_signature(op):
    parameters = inspect.signature(getattr(reference, op)).parameters
    launcher = getattr(importlib.import_module(f"vtc_kernels.{op}"), op)
    assert inspect.signature(launcher).parameters == parameters
    checked = dict(inspect.signature(getattr(ops, op), eval_str=True).parameters)
    assert checked.pop("backend").default == "auto"
    assert checked == parameters


@pytest.mark.parametrize("path", KERNELS + VTC, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_where_an_error_should_explain(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
