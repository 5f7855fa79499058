"""The operations of VTC: check the arguments, then run the Triton kernel or the PyTorch reference.

This is the only package that chooses between the two. `vtc.reference` specifies what each operation computes; here it
takes one more argument, `backend`:

- ``"auto"``: Triton on CUDA (and ROCm) tensors if triton can be imported, PyTorch otherwise. The environment variable
  ``VTC_BACKEND`` (same three values) replaces "auto" only.
- ``"triton"``: the kernel, or a `ValueError` that says why it cannot run.
- ``"torch"``: the reference.

If an operation says that an image's result does not depend on the other images of the batch, then every bit of it is
the same. A compiled kernel has one condition: the image's tensors are 16-byte aligned in both calls, or in neither.
Triton compiles another kernel for aligned tensors, with another order of sums. A slice of an aligned batch is aligned
if one image's elements take a multiple of 16 bytes, as those of all supported vision towers do.

The first choice of each operation is logged on the logger "vtc" at level INFO. No operation synchronises with the GPU.
Each is also an operator of `torch.library` (``torch.ops.vtc.*``) with a fake kernel, so that
`torch.compile(fullgraph=True)` and `torch.export` trace through it.
"""

from vtc.ops.cls_attention import cls_attention, fused_is_faster
from vtc.ops.cls_probs import cls_probs
from vtc.ops.compact import compact
from vtc.ops.compact_kv import compact_kv
from vtc.ops.coverage import coverage
from vtc.ops.dispatch import BACKENDS, OPS, backend_for
from vtc.ops.maxmin import maxmin
from vtc.ops.merge_nearest import merge_nearest
from vtc.ops.merge_neighbors import merge_neighbors
from vtc.ops.received import received
from vtc.ops.row_scores import row_scores
from vtc.ops.select import select
from vtc.ops.similarity import similarity
from vtc.ops.topk import ENSEMBLES, topk

__all__ = [
    "BACKENDS",
    "ENSEMBLES",
    "OPS",
    "backend_for",
    "cls_attention",
    "cls_probs",
    "compact",
    "compact_kv",
    "coverage",
    "fused_is_faster",
    "maxmin",
    "merge_nearest",
    "merge_neighbors",
    "received",
    "row_scores",
    "select",
    "similarity",
    "topk",
]
