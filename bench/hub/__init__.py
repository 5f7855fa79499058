"""`python -m bench hub`: the operations as a package for the kernel loader of the Hugging Face Hub, without VTC.

The package has the files of `kernels/` as they are, and those of `vtc/ops/` and `vtc/reference.py` with relative
imports, because the loader imports it under a name that nobody knows beforehand. kernel-builder builds it from
`build.toml`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

from bench import readme
from bench.checkout import ROOT
from vtc import ops

NAME = "vtc-ops"
OWNER = r"[A-Za-z0-9][\w.-]*"  # a user or an organisation of the Hub
TEMPLATES = {"build.toml": "build.toml", "flake.nix": "flake.nix", "card.txt": "CARD.md"}
KNOWN = sys.stdlib_module_names | {"torch", "triton"}  # the loader installs nothing else

# What vtc/ops/ says with absolute names, and what it says in the package.
RELATIVE = {
    r"^( *)from vtc\.ops\.(\w+) import ": r"\1from .\2 import ",
    r"^( *)from vtc(?:\.ops)? import ": r"\1from . import ",
    r"^( *)from vtc_kernels import ": r"\1from .kernels import ",
    r'f"vtc_kernels\.': 'f"{__package__}.kernels.',
    r"\btorch\.ops\.vtc\.(?=\w+\()": "OPERATORS.",
    r'f?"vtc::': 'f"{NAMESPACE}::',
    r"`vtc\.reference\.": "`reference.",
    r"`vtc\.ops`": "the package",
}

START = '''"""The operations of VTC, which select visual tokens: each has a Triton kernel and a reference in PyTorch.

`backend="auto"` runs the kernel if the tensors are on a GPU, and the reference otherwise. Errors are ValueErrors.
"""
'''


def write(owner: str, out: Path) -> list[Path]:
    """Write the tree of the package to a new folder; returns its files.

    Raises
    ------
    ValueError
        If the owner cannot be one, if the folder is there and not empty, or if a file imports more than the standard
        library, torch and triton.
    """
    if not re.fullmatch(OWNER, owner):
        raise ValueError(f"--owner must be the name of a user or an organisation of the Hub, got {owner!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give --out a new folder, so that no old file stays in the package")
    files = {f"torch-ext/{NAME.replace('-', '_')}/{name}": text for name, text in package().items()}
    for name, text in files.items():
        require_known(name, text)
    here = Path(__file__).parent
    for template, name in TEMPLATES.items():
        text = (here / template).read_text(encoding="utf-8")
        files[name] = text.replace("{name}", NAME).replace("{owner}", owner).replace("{operations}", operations())
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    files |= {f"tests/{path.name}": path.read_text(encoding="utf-8") for path in sorted((here / "tests").glob("*.py"))}
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def package() -> dict[str, str]:
    """The modules of the package, by their path in it."""
    sources = {path.name: path for path in sorted((ROOT / "vtc/ops").glob("*.py"))}
    sources["reference.py"] = ROOT / "vtc/reference.py"
    files = {name: relative(path.read_text(encoding="utf-8")) for name, path in sources.items()}
    docstring = ast.parse(files["__init__.py"]).body[0].end_lineno
    files["__init__.py"] = START + "".join(files["__init__.py"].splitlines(keepends=True)[docstring:])
    files["namespace.py"] = Path(__file__).with_name("namespace.py").read_text(encoding="utf-8")
    files["kernels/__init__.py"] = '"""The Triton kernels, one operation a file."""\n'
    return files | {
        f"kernels/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "kernels").glob("*.py"))
    }


def relative(text: str) -> str:
    """A module of `vtc/ops/` as one of a package of any name."""
    for pattern, replacement in RELATIVE.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    if "OPERATORS" in text or "{NAMESPACE}" in text:
        text = re.sub(
            r"^import torch\n",
            "import torch\n\nfrom .namespace import NAMESPACE, OPERATORS\n",
            text,
            flags=re.MULTILINE,
        )
    return text


def require_known(name: str, text: str) -> None:
    """Raise a ValueError if a module imports what the loader does not have."""
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        if unknown := [module for module in modules if module.split(".")[0] not in KNOWN]:
            raise ValueError(f"{name} imports {', '.join(unknown)}; on the Hub there are torch and triton only")


def operations() -> str:
    """The operations, what they compute, and their shapes, as a table."""
    rows = []
    for op in ops.OPS:
        function = getattr(ops, op)
        shapes = f"{readme.shapes(function, 'Parameters')} → {readme.shapes(function, 'Returns')}"
        rows.append([f"`{op}`", readme.sentence(inspect.getdoc(function) or ""), shapes])
    return readme.plain(["operation", "what it computes", "shapes"], rows)
