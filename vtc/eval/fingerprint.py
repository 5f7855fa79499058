"""The fingerprint of a run: everything that can change one of its answers, as JSON."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from vtc.eval.engine import Job
from vtc.eval.result import versions
from vtc.eval.task import Task

SAMPLE = 1 << 20  # bytes


def fingerprint(task: Task, job: Job, batch_size: int, limit: int | None) -> dict[str, Any]:
    """What the answers of a run depend on. The number of processes and of workers is not among it."""
    spec = job.spec
    return {
        "task": task.name,
        "files": task.fingerprint(),
        "limit": limit,
        "model": spec.model,
        "weights": weights(spec.source, getattr(spec.config(), "_commit_hash", None)),
        "dtype": spec.dtype,
        "device": spec.device.partition(":")[0],
        "attn_implementation": spec.attn_implementation,
        "VTC_BACKEND": os.environ.get("VTC_BACKEND"),  # overrides the backend of the setting
        **job.prompting().fingerprint(),
        **job.setting.fingerprint(),
        "max_new_tokens": job.max_new_tokens,
        "batch_size": batch_size,
        "versions": versions(),
    }


def weights(source: str, commit: str | None) -> str | None:
    """The commit of a hub model; of a folder a digest of names, sizes, and the first, middle and last MiB of its files.

    All bytes of a 7B model take half a minute; weights that differ do so nearly everywhere.
    """
    folder = Path(source)
    if not folder.is_dir():
        return commit
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin", ".model", ".jinja"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                content.seek(start)
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:16]
