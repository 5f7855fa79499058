"""VTC: LLaVA with only the visual tokens that the vision encoder's [CLS] token attends to.

    import vtc
    model = LlavaForConditionalGeneration.from_pretrained(ID, attn_implementation="vtc")

`import vtc` makes "vtc" known to transformers without importing torch or transformers, so that `vtc --help` answers at
once. The names below are imported on first use. `vtc.hf.patch` is imported as soon as transformers has imported the
module of a LLaVA, or now if it has already done so.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

import wrapt

from vtc import distribution
from vtc.hf.families import FAMILIES
from vtc.overlay import heatmap, overlay

if TYPE_CHECKING:
    from vtc import ops, tiny
    from vtc.api import compress, configure, disable, enable, graphs, is_enabled, select, status
    from vtc.config import VTCConfig, kept_count
    from vtc.hf.encode import Selection
    from vtc.hf.settings import Run
    from vtc.hf.status import Status
    from vtc.images import load_image

__version__ = "0.1.0"
__all__ = [
    "Run",
    "Selection",
    "Status",
    "VTCConfig",
    "compress",
    "configure",
    "disable",
    "enable",
    "graphs",
    "heatmap",
    "is_enabled",
    "kept_count",
    "load_image",
    "ops",
    "overlay",
    "select",
    "status",
    "tiny",
]

_MODULES = {
    "api": ("compress", "configure", "disable", "enable", "graphs", "is_enabled", "select", "status"),
    "config": ("VTCConfig", "kept_count"),
    "hf.encode": ("Selection",),
    "hf.settings": ("Run",),
    "hf.status": ("Status",),
    "images": ("load_image",),
}


def __getattr__(name: str) -> Any:
    if name in ("ops", "tiny"):
        return importlib.import_module(f"vtc.{name}")
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"vtc.{module}"), name)
            return value
    raise AttributeError(f"module 'vtc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


distribution.warn_of_other(os.path.dirname(os.path.dirname(__file__)))
for _family in FAMILIES.values():
    wrapt.register_post_import_hook("vtc.hf.patch:install", _family.module)
