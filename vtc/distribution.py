"""The distribution `vtc` on PyPI is another project's. It has a package of this name, and overwrites files of this one.

This project's distribution is `vtc-cls`. Imports nothing heavy; works where `vtc/__init__.py` is the other one's.
"""

from __future__ import annotations

import os
import sys

ADVICE = "run `pip uninstall vtc vtc-cls`, then install vtc-cls again"


def other(folder: str) -> str | None:
    """The other distribution's name and version, as of its metadata in the `folder` that holds the package, or None."""
    try:
        names = os.listdir(folder)
    except OSError:  # the package was imported from an archive
        return None
    found = (name for name in names if name.startswith("vtc-") and name.endswith((".dist-info", ".egg-info")))
    return next((name.rpartition(".")[0] for name in found), None)


def warn_of_other(folder: str) -> None:
    """Log a warning if the other distribution is installed into the same `folder`."""
    if name := other(folder):
        import logging

        logging.getLogger("vtc").warning(
            "%s, a distribution of another project, is installed into %s beside vtc-cls; both have a package named vtc "
            "and overwrite each other's files: %s",
            name,
            folder,
            ADVICE,
        )


def require_own() -> None:
    """Raise ValueError if `vtc/__init__.py` is not this project's: another one overwrote it, or took it with itself."""
    package = sys.modules["vtc"]
    if "compress" not in getattr(package, "__all__", ()):
        file = getattr(package, "__file__", None)
        what = (
            f"{file} is of another project, whose distribution is named vtc" if file else "vtc/__init__.py is missing"
        )
        raise ValueError(f"{what}; this project's is named vtc-cls: {ADVICE}")
