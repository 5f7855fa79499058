"""Small data sets in the exact formats of the official files, with invented content and awkward cases."""

from __future__ import annotations

from pathlib import Path

from support.eval_data import gqa, mmbench, mmvet, pope, seed, sqa, textvqa

WRITERS = {
    "gqa": gqa.write,
    "sqa": sqa.write,
    "textvqa": textvqa.write,
    "pope": pope.write,
    "mmbench": mmbench.write,
    "mmbench_cn": mmbench.write_cn,
    "seed": seed.write,
    "mmvet": mmvet.write,
}


def write_all(folder: Path, layout: str = "llava") -> None:
    """Write all eight below `folder`, as LLaVA, the authors of VTC-CLS ("paper") or nobody ("flat") sort them."""
    for write in WRITERS.values():
        write(folder, layout)
