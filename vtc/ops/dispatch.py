"""The operations of VTC: check the arguments, then run the Triton kernel or the PyTorch reference.

This is the only module that chooses between the two. `vtc.reference` specifies what each operation computes; here it
takes one more argument, `backend`:

- ``"auto"``: Triton on CUDA (and ROCm) tensors if triton can be imported, PyTorch otherwise. The environment variable
  ``VTC_BACKEND`` (same three values) replaces "auto", and nothing else.
- ``"triton"``: the kernel, or a `ValueError` that says why it cannot run.
- ``"torch"``: the reference.

Where an operation says that an image's result does not depend on the other images of the batch, it means every bit. A
compiled kernel has one condition: the image's tensors are 16-byte aligned in both calls, or in neither. Triton compiles
aligned tensors apart, with another order of sums. A slice of an aligned batch is aligned if one image's elements take a
multiple of 16 bytes, as those of all supported vision towers do.

The first choice of each kind is logged on the logger "vtc" at level INFO. No operation waits for the GPU. Each is also
an operator of `torch.library` (``torch.ops.vtc.*``) with a fake kernel, so that `torch.compile(fullgraph=True)` and
`torch.export` trace through it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from vtc import reference

OPS = ("cls_attention", "row_scores", "topk", "compact", "compact_kv", "merge")
BACKENDS = ("auto", "triton", "torch")
ENSEMBLES = ("sum", "mean", "max", "min")

_log = logging.getLogger("vtc")
_announced: set[tuple[str, str]] = set()


def cls_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of a vision tower, and in the same pass the probabilities of its first row, the [CLS] token's.

    See `vtc.reference.cls_attention` for the formula. No mask, not causal. Never an N x N matrix. An image's result
    does not depend on the other images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query, key, value : Tensor[B, H, N, D], float32, float16 or bfloat16
        One dtype, any strides; nothing is copied. D <= 256.
    scale : float, optional
        ``D ** -0.5`` when not given.
    rows : Tensor[B, H, N], float32, optional
        Where the probabilities go; any strides.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    out : Tensor[B, N, H, D], the dtype of `query`
        Contiguous.
    rows : Tensor[B, H, N], float32
        Softmax of the first query row over all N keys, head by head; `rows` if it was given.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, for a backend that cannot run, and where a gradient would be
        needed: the operation is not differentiable.
    """
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"cls_attention: query, key and value must be [B, H, N, D] of one shape, got {_shapes(query, key, value)}."
        )
    if query.dtype not in _FLOATS or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            "cls_attention: query, key and value must share one dtype of float32, float16 and bfloat16, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    if 0 in query.shape[1:] or query.shape[3] > 256:
        raise ValueError(f"cls_attention: needs a head, a token and 1 to 256 features, got {_shapes(query)}.")
    _check_scale("cls_attention", scale)
    _same_device("cls_attention", query=query, key=key, value=value, rows=rows)
    if rows is not None and (rows.dtype != torch.float32 or rows.shape != query.shape[:3]):
        raise ValueError(
            f"cls_attention: rows must be float32 [B, H, N] = {list(query.shape[:3])}, "
            f"got {rows.dtype} {_shapes(rows)}."
        )
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(
            "cls_attention: not differentiable, and an input requires a gradient. Call it under torch.no_grad(), or "
            "use torch.nn.functional.scaled_dot_product_attention and row_scores."
        )
    if rows is None:
        return torch.ops.vtc.cls_attention(query, key, value, scale, backend)
    return torch.ops.vtc.cls_attention_(query, key, value, scale, rows, backend), rows


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    mask: Tensor | None = None,
    position: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys in float32, averaged over the heads.

    See `vtc.reference.row_scores` for the formula. Not differentiable. An image's scores do not depend on the other
    images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
        The [CLS] row of a vision tower, or the last prompt token's of a language model.
    key : Tensor[B, Hkv, N, D], same dtype and device
        Any strides; nothing is copied. H is a multiple of Hkv (grouped-query attention).
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        0 <= skip < N leading columns are left out of the result, but stay in the denominator ([CLS]: 1).
    mask : Tensor[B, N], bool, optional
        False where a key gets no attention (padding). A row that sees nothing is NaN.
    position : Tensor[B], int64, optional
        The query's place among the keys. Later ones get no attention (causal): for right padding and static caches.
    out : Tensor[B, N - skip], float32, optional
        The scores are added to it in place.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, N - skip], float32
        `out` if it was given.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `skip` that do not fit, and for a backend that cannot run.
    """
    if query.ndim != 3 or key.ndim != 4 or (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[3]):
        raise ValueError(
            "row_scores: query must be [B, H, D] and key [B, Hkv, N, D] with the same B and D, "
            f"got {_shapes(query, key)}."
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(
            f"row_scores: query and key must share one floating-point dtype, got {query.dtype} and {key.dtype}."
        )
    num_images, num_key_heads, num_tokens, num_features = key.shape
    if 0 in (query.shape[1], num_key_heads, num_features) or query.shape[1] % num_key_heads:
        raise ValueError(
            "row_scores: needs a feature and a head at least, and a multiple of key heads as query heads, "
            f"got {_shapes(query, key)}."
        )
    if not _is_int(skip) or not 0 <= skip < num_tokens:
        raise ValueError(
            f"row_scores: skip must be an int with 0 <= skip < N = {num_tokens}, or no column is left; got {skip!r}."
        )
    _check_scale("row_scores", scale)
    _same_device("row_scores", query=query, key=key, mask=mask, position=position, out=out)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_images, num_tokens)):
        raise ValueError(
            f"row_scores: mask must be bool [B, N] = [{num_images}, {num_tokens}], got {mask.dtype} {_shapes(mask)}. "
            "Use mask.bool() for a mask of 0 and 1."
        )
    if position is not None and (position.dtype != torch.int64 or position.shape != (num_images,)):
        raise ValueError(
            f"row_scores: position must be int64 [B] = [{num_images}], got {position.dtype} {_shapes(position)}."
        )
    if out is not None and (out.dtype != torch.float32 or out.shape != (num_images, num_tokens - skip)):
        raise ValueError(
            f"row_scores: out must be float32 [B, N - skip] = [{num_images}, {num_tokens - skip}], "
            f"got {out.dtype} {_shapes(out)}."
        )
    query, key = query.detach(), key.detach()
    if out is None:
        return torch.ops.vtc.row_scores(query, key, scale, skip, mask, position, backend)
    torch.ops.vtc.row_scores_(query, key, scale, skip, mask, position, out, backend)
    return out


def topk(
    scores: Tensor, k: int, *, ensemble: str = "sum", total: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Indices of the `k` largest scores of each row, ascending; ties go to the lower index, NaN counts as -inf.

    The result is always `k` different indices in [0, N), whatever the scores are. Not differentiable.

    Parameters
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], floating point
        Any strides. Heads are averaged, then layers are combined.
    k : int
        1 <= k <= N.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined. A NaN in a layer makes the combination NaN.
    total : Tensor[B, N], float32 (float64 for float64 scores), optional
        The combined scores are written to it.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K], int64

    Raises
    ------
    ValueError
        If `scores` is of no accepted shape or dtype, if `k` is not an int in [1, N], for an unknown ensemble or a
        `total` that does not fit, or if the backend cannot run.
    """
    if scores.ndim not in (2, 3, 4) or not scores.is_floating_point():
        raise ValueError(
            "topk: scores must be a floating-point [B, N], [L, B, N] or [L, B, H, N], "
            f"got {scores.dtype} {_shapes(scores)}."
        )
    num_images, num_tokens = scores.shape[0 if scores.ndim == 2 else 1], scores.shape[-1]
    if not _is_int(k) or not 1 <= k <= num_tokens:
        raise ValueError(f"topk: k must be an int with 1 <= k <= N = {num_tokens} (one score per token), got {k!r}.")
    if ensemble not in ENSEMBLES:
        raise ValueError(f"topk: ensemble must be one of {', '.join(ENSEMBLES)}, got {ensemble!r}.")
    if scores.ndim > 2 and 0 in (scores.shape[0], *scores.shape[2:-1]):
        raise ValueError(f"topk: needs a layer and a head at least, got {_shapes(scores)}.")
    _same_device("topk", scores=scores, total=total)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if total is not None and (total.dtype != dtype or total.shape != (num_images, num_tokens)):
        raise ValueError(
            f"topk: total must be {dtype} [B, N] = [{num_images}, {num_tokens}], got {total.dtype} {_shapes(total)}."
        )
    return torch.ops.vtc.topk(scores.detach(), k, ensemble, total, backend)


@overload
def compact(x: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor: ...
@overload
def compact(x: Sequence[Tensor], indices: Tensor, *, backend: str = "auto") -> tuple[Tensor, ...]: ...
def compact(x: Tensor | Sequence[Tensor], indices: Tensor, *, backend: str = "auto") -> Tensor | tuple[Tensor, ...]:
    """Rows of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, ...] or a sequence of such tensors, any dtypes
        Any strides. Several tensors (hidden states, positions, masks) have one B and one N, and take one launch.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K, ...] or a tuple of them, the dtypes of `x`
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for an index
        outside [0, N). On a GPU that check would have to wait for the device, so it is not made: there the kernel
        reads nothing for such an index and gives a row of zeros, and PyTorch reports a device-side assertion.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    rows = tensors[0].shape[:2] if tensors else ()
    if len(rows) != 2 or any(tensor.shape[:2] != rows for tensor in tensors):
        raise ValueError(f"compact: x must be [B, N, ...], several with one B and N, got {_shapes(*tensors)}.")
    _check_indices("compact", indices, rows[0])
    _same_device("compact", indices=indices, **{f"x[{i}]": tensor for i, tensor in enumerate(tensors)})
    result = torch.ops.vtc.compact(tensors, indices, backend)
    return result[0] if isinstance(x, Tensor) else tuple(result)


def compact_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Tensor,
    *,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows of the keys and values of many layers: ``result[b, h, k] = x[b, h, indices[b, k]]``. Not differentiable.

    Parameters
    ----------
    keys, values : sequences of Tensor[B, H, N, D], any dtype of 1, 2, 4 or 8 bytes
        One per layer, on one device. Any strides; layers may differ in dtype, H and D. All tensors with one shape,
        dtype and strides take one launch.
    indices : Tensor[B, K], int64
        Each in [0, N). In place: ascending and unique in each row, as `topk` gives them.
    in_place : bool
        Move the kept rows to the front of the tensors themselves, for a preallocated (static) cache. Rows from K on
        are left as they are. No two tensors may share memory, nor two elements of one; slices of one storage may lie
        beside or between one another.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    keys, values : tuples of Tensor[B, H, K, D], the dtypes given
        New tensors, or views of the given ones.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, for a backend that cannot run and, in place, for tensors that
        share memory. On the CPU also for an index outside [0, N) and, in place, for a row that does not ascend; for a
        GPU see `compact`.
    """
    keys, values = tuple(keys), tuple(values)
    tensors = (*keys, *values)
    if not tensors or len(keys) != len(values) or any(tensor.ndim != 4 for tensor in tensors):
        raise ValueError(
            "compact_kv: keys and values must be sequences of [B, H, N, D], one of each per layer, got "
            f"{len(keys)} and {len(values)}: {_shapes(*tensors)}."
        )
    num_images, _, num_tokens, _ = tensors[0].shape
    if any((tensor.shape[0], tensor.shape[2]) != (num_images, num_tokens) for tensor in tensors):
        raise ValueError(f"compact_kv: keys and values must have one B and one N, got {_shapes(*tensors)}.")
    if any(tensor.element_size() > 8 for tensor in tensors):
        raise ValueError(f"compact_kv: elements have 1, 2, 4 or 8 bytes, got {tensors[0].dtype}.")
    _check_indices("compact_kv", indices, num_images)
    if in_place and indices.shape[1] > num_tokens:
        raise ValueError(f"compact_kv: in place at most N = {num_tokens} rows fit, got {indices.shape[1]} indices.")
    _same_device("compact_kv", indices=indices, **{f"tensor {i}": tensor for i, tensor in enumerate(tensors)})
    with torch.no_grad():
        if not in_place:
            moved = torch.ops.vtc.compact_kv(keys, values, indices, backend)
        else:
            torch.ops.vtc.compact_kv_(keys, values, indices, backend)
            moved = [tensor[:, :, : indices.shape[1]] for tensor in tensors]
    return tuple(moved[: len(keys)]), tuple(moved[len(keys) :])


def merge(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int | None = None,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rows of `x` that take up the tokens like them: their most similar ones, or those they are the nearest target of.

    See `vtc.reference.merge` for the two formulas. Differentiable in `x`. An image's result does not depend on the
    other images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    x : Tensor[B, N, D], float32, float16 or bfloat16
        The rows to merge; any strides, nothing is copied.
    key : Tensor[B, N, C], float32, float16 or bfloat16
        What is compared, by cosine similarity; any strides, nothing is copied. No gradient flows into it.
    targets : Tensor[B, K], int64
        The tokens that stay. Each in [0, N), unique in each row, in any order.
    weight : Tensor[B, N], float32
        How much of a token is taken up. No gradient flows into it.
    neighbors : int, optional
        A target takes up its `neighbors` most similar others, at least 1; all if they are fewer. There is one more row
        then: the weighted sum of the tokens that are no target. When not given, each token that is no target joins the
        most similar one, and a target takes up the weighted mean of those who joined it.
    counts : Tensor[B], int64, optional
        How many of an image's targets count, from the left, each in [0, K]; K when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    rows : Tensor[B, R, D], the dtype of `x`
        R = K + 1 with `neighbors`, otherwise R = K. Contiguous. With `counts`, an image's one more row comes right
        after its targets, and the rest is 0.
    mix : Tensor[B, R, N], float32
        The weights: rows = mix · x. Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, `neighbors` below 1, and for a backend that cannot run. On the
        CPU also for a target outside [0, N) and a count outside [0, K); for a GPU see `compact`: the kernel takes a
        row of zeros for such a target, and the nearest bound for such a count.
    """
    if x.ndim != 3 or key.ndim != 3 or x.shape[:2] != key.shape[:2] or 0 in (x.shape[1], x.shape[2], key.shape[2]):
        raise ValueError(
            "merge: x must be [B, N, D] and key [B, N, C] with one B and N, a token and a feature at least, "
            f"got {_shapes(x, key)}."
        )
    if x.dtype not in _FLOATS or key.dtype not in _FLOATS:
        raise ValueError(f"merge: x and key must be float32, float16 or bfloat16, got {x.dtype} and {key.dtype}.")
    if targets.ndim != 2 or len(targets) != len(x) or targets.dtype != torch.int64 or not targets.shape[1]:
        raise ValueError(
            f"merge: targets must be int64 [B, K] with B = {len(x)} and a target at least, "
            f"got {targets.dtype} {_shapes(targets)}."
        )
    if weight.dtype != torch.float32 or weight.shape != x.shape[:2]:
        raise ValueError(
            f"merge: weight must be float32 [B, N] = {list(x.shape[:2])}, got {weight.dtype} {_shapes(weight)}."
        )
    if neighbors is not None and (not _is_int(neighbors) or neighbors < 1):
        raise ValueError(
            f"merge: neighbors must be an int of at least 1, or None to join the nearest target; got {neighbors!r}."
        )
    if counts is not None and (counts.dtype != torch.int64 or counts.shape != x.shape[:1]):
        raise ValueError(f"merge: counts must be int64 [B] = [{len(x)}], got {counts.dtype} {_shapes(counts)}.")
    _same_device("merge", x=x, key=key, targets=targets, weight=weight, counts=counts)
    rows, mix = torch.ops.vtc.merge(x, key.detach(), targets, weight.detach(), neighbors, counts, backend)
    return rows, mix.detach()


# Where `cls_attention` was measured at least level with SDPA and `row_scores` together, by `python -m bench micro`
# (workload `cls_attention`, the records under bench/results/): compute capability, dtype, head dim. Nothing yet.
FUSED: frozenset[tuple[tuple[int, int], torch.dtype, int]] = frozenset()


def fused_is_faster(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str = "auto") -> bool:
    """Return whether `cls_attention` is known to be no slower than SDPA and `row_scores`: it is in `FUSED`.

    Raises
    ------
    ValueError
        As `backend_for`.
    """
    if not FUSED or backend_for("cls_attention", device, backend)[0] != "triton" or device.type != "cuda":
        return False
    return (torch.cuda.get_device_capability(device), dtype, head_dim) in FUSED


def backend_for(op: str, device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """Which backend an operation uses on a device, and why.

    Parameters
    ----------
    op : {"cls_attention", "row_scores", "topk", "compact", "compact_kv", "merge"}
    device : torch.device
        Where the tensors are.
    backend : {"auto", "triton", "torch"}
        The `backend` argument of the operation.

    Returns
    -------
    choice : {"triton", "torch"}
    reason : str
        A clause for people to read.

    Raises
    ------
    ValueError
        For an unknown operation or backend, a ``VTC_BACKEND`` that is neither, and for "triton" where it cannot run.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    asked = f"backend={backend!r}"
    if backend == "auto" and (override := os.environ.get("VTC_BACKEND")):
        if override not in BACKENDS:
            raise ValueError(
                f"environment variable VTC_BACKEND must be one of {', '.join(BACKENDS)}, or unset; got {override!r}."
            )
        backend, asked = override, f"VTC_BACKEND={override}"
    if backend == "torch":
        return "torch", asked
    on_gpu = device.type == "cuda"  # ROCm builds of torch call their devices cuda, too
    if backend == "auto" and not on_gpu:
        return "torch", f"tensors on {device.type}; the Triton kernels need a GPU"
    triton = _triton()
    if backend == "auto":
        return ("torch", triton.error) if triton.error else ("triton", f"tensors on {device.type}")
    if triton.error:
        raise ValueError(f"{op}: {asked} cannot run, {triton.error}. Install triton, or use backend='torch'.")
    if not on_gpu and not triton.interpreted:
        raise ValueError(
            f"{op}: {asked} needs CUDA tensors, got tensors on {device.type}. Move them to a GPU, use "
            "backend='auto' or 'torch', or set TRITON_INTERPRET=1 before Python starts for Triton's (slow) interpreter."
        )
    return "triton", asked + ("" if on_gpu else ", in Triton's interpreter")


class _Triton(NamedTuple):
    launchers: dict[str, Callable[..., Any]]
    interpreted: bool
    error: str


@functools.cache
def _triton() -> _Triton:
    """The kernels, imported on first need: triton is optional, and slow to import."""
    try:
        from vtc_kernels import cls_attention, compact, merge, row_scores, topk, tuning
    except ImportError as error:
        return _Triton({}, False, f"the Triton kernels cannot be imported ({error})")
    launchers = {
        "cls_attention": cls_attention.cls_attention,
        "row_scores": row_scores.row_scores,
        "topk": topk.topk,
        "compact": compact.compact,
        "compact_kv": compact.compact_kv,
        "merge": merge.merge,
    }
    return _Triton(launchers, tuning.INTERPRETED, "")


def _choose(op: str, device: torch.device, backend: str) -> Callable[..., Any]:
    choice, reason = backend_for(op, device, backend)
    if (op, choice) not in _announced:
        _announced.add((op, choice))
        _log.info("%s uses %s: %s", op, choice, reason)
    return _triton().launchers[op] if choice == "triton" else getattr(reference, op)


# --- operators of torch.library: what runs, and the shapes alone (fake kernels) --------------------------------------


def _register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the operator of `schema`; the decorated function is what it does on any device."""
    name = f"vtc::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.register_fake(name, fake)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        return function

    return register


def _fake_attention(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _fake_compact(tensors: Sequence[Tensor], indices: Tensor, *_: Any) -> list[Tensor]:
    return [tensor.new_empty((*indices.shape, *tensor.shape[2:])) for tensor in tensors]


def _fake_compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, *_: Any) -> list[Tensor]:
    count = indices.shape[1]
    return [tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])) for tensor in (*keys, *values)]


@_register(
    "cls_attention(Tensor query, Tensor key, Tensor value, float? scale, str backend) -> (Tensor, Tensor)",
    lambda query, *_: (_fake_attention(query), query.new_empty(query.shape[:3], dtype=torch.float32)),
)
def _cls_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Any:
    return _choose("cls_attention", query.device, backend)(query, key, value, scale=scale)


@_register(
    "cls_attention_(Tensor query, Tensor key, Tensor value, float? scale, Tensor(a!) rows, str backend) -> Tensor",
    _fake_attention,
)
def _cls_attention_(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, rows: Tensor, backend: str
) -> Tensor:
    return _choose("cls_attention", query.device, backend)(query, key, value, scale=scale, rows=rows)[0]


@_register(
    "row_scores(Tensor query, Tensor key, float? scale, SymInt skip, Tensor? mask, Tensor? position, str backend)"
    " -> Tensor",
    lambda _, key, scale, skip, *__: key.new_empty((key.shape[0], key.shape[2] - skip), dtype=torch.float32),
)
def _row_scores(
    query: Tensor, key: Tensor, scale: float | None, skip: int, mask: Any, position: Any, backend: str
) -> Tensor:
    function = _choose("row_scores", query.device, backend)
    return function(query, key, scale=scale, skip=skip, mask=mask, position=position)


@_register(
    "row_scores_(Tensor query, Tensor key, float? scale, SymInt skip, Tensor? mask, Tensor? position, Tensor(a!) out,"
    " str backend) -> ()",
    lambda *_: None,
)
def _row_scores_(
    query: Tensor, key: Tensor, scale: float | None, skip: int, mask: Any, position: Any, out: Tensor, backend: str
) -> None:
    function = _choose("row_scores", query.device, backend)
    function(query, key, scale=scale, skip=skip, mask=mask, position=position, out=out)


@_register(
    "topk(Tensor scores, SymInt k, str ensemble, Tensor(a!)? total, str backend) -> Tensor",
    lambda scores, k, *_: scores.new_empty((scores.shape[scores.ndim > 2], k), dtype=torch.int64),
)
def _topk(scores: Tensor, k: int, ensemble: str, total: Tensor | None, backend: str) -> Tensor:
    return _choose("topk", scores.device, backend)(scores, k, ensemble=ensemble, total=total)


@_register("compact(Tensor[] tensors, Tensor indices, str backend) -> Tensor[]", _fake_compact)
def _compact(tensors: Sequence[Tensor], indices: Tensor, backend: str) -> list[Tensor]:
    _check_range("compact", indices, tensors[0].shape[1])
    return list(_choose("compact", indices.device, backend)(tuple(tensors), indices))


@_register("compact_kv(Tensor[] keys, Tensor[] values, Tensor indices, str backend) -> Tensor[]", _fake_compact_kv)
def _compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, backend: str) -> list[Tensor]:
    _check_range("compact_kv", indices, keys[0].shape[2])
    new_keys, new_values = _choose("compact_kv", indices.device, backend)(keys, values, indices)
    return [*new_keys, *new_values]


@_register("compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor indices, str backend) -> ()", lambda *_: None)
def _compact_kv_(keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, backend: str) -> None:
    _check_apart("compact_kv", keys, values)  # here, not in `compact_kv`: a compiler that traces it has no addresses
    _check_range("compact_kv", indices, keys[0].shape[2])
    if indices.device.type == "cpu" and (indices[:, 1:] <= indices[:, :-1]).any():
        raise ValueError("compact_kv: in place, the indices of each row must ascend without repeats; sort them first.")
    _choose("compact_kv", indices.device, backend)(keys, values, indices, in_place=True)


def _fake_merge(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, neighbors: Any, *_: Any) -> Any:
    num_rows = targets.shape[1] + int(neighbors is not None)  # torch 2.11 cannot add a bool to a SymInt
    shape = (x.shape[0], num_rows)
    return x.new_empty((*shape, x.shape[2])), x.new_empty((*shape, x.shape[1]), dtype=torch.float32)


@_register(
    "merge(Tensor x, Tensor key, Tensor targets, Tensor weight, SymInt? neighbors, Tensor? counts, str backend)"
    " -> (Tensor, Tensor)",
    _fake_merge,
)
def _merge(
    x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, neighbors: int | None, counts: Any, backend: str
) -> Any:
    _check_range("merge", targets, x.shape[1], what="targets", size="N")
    if counts is not None:
        _check_range("merge", counts, targets.shape[1] + 1, what="counts", size="K + 1")
    function = _choose("merge", x.device, backend)
    return function(x, key, targets, weight, neighbors=neighbors, counts=counts)


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, mix = output
    ctx.save_for_backward(mix)


def _merge_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (mix,) = ctx.saved_tensors
    gradient = None if grad is None else (mix.mT @ grad.float()).to(grad.dtype)
    return gradient, None, None, None, None, None, None


torch.library.register_autograd("vtc::merge", _merge_backward, setup_context=_save_mix)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, indices, _ = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = [tensor.shape for tensor in tensors]


def _compact_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    (indices,) = ctx.saved_tensors
    images = torch.arange(len(indices), device=indices.device).unsqueeze(1)

    def scatter(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
        if grad is None:
            return None
        # accumulate: an index may occur twice. Unlike scatter_add, index_put is deterministic on CUDA.
        return grad.new_zeros(shape).index_put((images, indices), grad, accumulate=True)

    return [scatter(grad, shape) for grad, shape in zip(grads, ctx.shapes, strict=True)], None, None


torch.library.register_autograd("vtc::compact", _compact_backward, setup_context=_save_for_backward)


# --- what the checks share -------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number or None, got {scale}.")


def _check_indices(op: str, indices: Tensor, num_images: int) -> None:
    if indices.ndim != 2 or len(indices) != num_images:
        raise ValueError(f"{op}: indices must be [B, K] with B = {num_images}, got {_shapes(indices)}.")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices must be int64, got {indices.dtype}. Use indices.long().")


def _check_range(op: str, indices: Tensor, end: int, *, what: str = "indices", size: str = "N") -> None:
    """On the CPU alone: on a GPU it would have to wait for the device."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{op}: {what} must lie in [0, {size}) = [0, {end}), got values from {low} to {high}.")


# Strides in bytes and sizes of a tensor's axes, the largest stride first. Axes of size 1 go nowhere.
_Axes = tuple[tuple[int, int], ...]


def _check_apart(op: str, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Check that no two elements share memory. Takes addresses, strides and sizes, so it does not wait for a device."""
    tensors = (*keys, *values)

    def name(number: int) -> str:
        return f"keys[{number}]" if number < len(keys) else f"values[{number - len(keys)}]"

    numbers: dict[tuple[Any, ...], int] = {}  # usually all tensors have one layout
    layouts: list[tuple[_Axes, int]] = []
    placed = []
    for number, tensor in enumerate(tensors):
        size, stride, width = tensor.shape, tensor.stride(), tensor.element_size()
        layout = numbers.setdefault((size, stride, width), len(layouts))
        if layout == len(layouts):
            steps = ((step * width, count) for step, count in zip(stride, size, strict=True) if count > 1)
            axes = tuple(sorted(steps, reverse=True))
            if 0 not in size and any(step < _extent(axes[i + 1 :], width) for i, (step, _) in enumerate(axes)):
                raise ValueError(
                    f"{op}: in place, each element needs memory of its own, got {name(number)} of shape {list(size)} "
                    f"with strides {list(stride)}, an expanded or overlapping view. Pass {name(number)}.contiguous(), "
                    "or use in_place=False."
                )
            layouts.append((axes, width))
        placed.append((tensor.data_ptr(), number, layout))
    placed = sorted(place for place in placed if tensors[place[1]].numel())
    answers: dict[tuple[int, int, int], bool] = {}  # of a cache, the same few distances come again and again
    for i, (start, number, layout) in enumerate(placed):
        end = start + _extent(*layouts[layout])
        for j in range(i + 1, len(placed)):
            other_start, other, other_layout = placed[j]
            if other_start >= end:
                break  # and so do all that follow
            question = (other_start - start, layout, other_layout)
            if question not in answers:
                answers[question] = _share_memory(question[0], *layouts[layout], *layouts[other_layout])
            if answers[question]:
                raise ValueError(
                    f"{op}: in place, the rows of each tensor are moved once, got {name(number)} and {name(other)}, "
                    "which share memory. Pass each tensor once and clone() views that overlap, or use in_place=False."
                )


def _extent(axes: _Axes, width: int) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    return width + sum(step * (count - 1) for step, count in axes)


def _share_memory(distance: int, a: _Axes, a_width: int, b: _Axes, b_width: int) -> bool:
    """Whether elements of `a` and of `b`, which starts `distance` bytes behind `a`, are the same memory.

    Exact if the two have the same strides. Otherwise it may say yes where only the ranges of addresses overlap.
    """
    if not -_extent(b, b_width) < distance < _extent(a, a_width):
        return False
    if not a and not b:
        return True
    step = max(axes[0][0] for axes in (a, b) if axes)
    a_count = b_count = 1
    if a and a[0][0] == step:
        (_, a_count), *rest = a
        a = tuple(rest)
    if b and b[0][0] == step:
        (_, b_count), *rest = b
        b = tuple(rest)
    # Slices i of a and j of b can only meet where i - j is such that one begins before the other ends.
    first = max(1 - b_count, (distance - _extent(a, a_width)) // step + 1)
    last = min(a_count - 1, -(-(distance + _extent(b, b_width)) // step) - 1)
    if last - first > 3:
        return True
    return any(_share_memory(distance - n * step, a, a_width, b, b_width) for n in range(first, last + 1))


def _same_device(op: str, **tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {got}.")


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)
