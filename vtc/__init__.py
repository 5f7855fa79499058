"""VTC: LLaVA with only the visual tokens that the vision encoder's [CLS] token attends to.

    import vtc
    model = LlavaForConditionalGeneration.from_pretrained(ID, attn_implementation="vtc")

`import vtc` alone makes "vtc" known to transformers, yet imports neither torch nor transformers: the `vtc` command
must answer `--help` at once. So the names below are imported on first use (PEP 562), and the hooks of
`vtc.hf.patch` are put in place when transformers' LLaVA module has been imported, or right now if it has been already.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vtc.hf.families import MODELS

if TYPE_CHECKING:
    from vtc import ops, tiny
    from vtc.api import Run, compress, configure, disable, enable, select
    from vtc.config import VTCConfig, kept_count
    from vtc.hf.patch import Selection
    from vtc.images import load_image
    from vtc.overlay import overlay

__version__ = "0.1.0"
__all__ = [
    "Run",
    "Selection",
    "VTCConfig",
    "compress",
    "configure",
    "disable",
    "enable",
    "kept_count",
    "load_image",
    "ops",
    "overlay",
    "select",
    "tiny",
]

_HOME = {
    "VTCConfig": "config",
    "kept_count": "config",
    "load_image": "images",
    "overlay": "overlay",
    "Selection": "hf.patch",
}
_MODULES = ("ops", "tiny")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vtc' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"vtc.{name}")
    value = getattr(importlib.import_module(f"vtc.{_HOME.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterLlava(importlib.abc.MetaPathFinder):
    """Imports `vtc.hf.patch` as soon as transformers has executed the module of a known model, and lets it put its
    hooks there; has no part in any other import."""

    TARGETS = frozenset(model.module for model in MODELS.values())

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.TARGETS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_install(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("vtc.hf.patch").install()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterLlava())
if _AfterLlava.TARGETS & sys.modules.keys():
    importlib.import_module("vtc.hf.patch")
