"""Every operation of VTC in plain PyTorch: the specification that the Triton kernels are tested against.

Same names and signatures as in `vtc.ops`. Nothing is validated here; `vtc.ops` does that before it calls anything.
Shapes: B images, H heads, N tokens, K kept tokens (or targets), D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cls_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A vision layer's attention, and how much its [CLS] row attends to every key, head by head.

    ::

        p[b, h, m, n] = softmax_n(scale · query[b, h, m] · key[b, h, n])
        out[b, m, h]  = Σ_n p[b, h, m, n] · value[b, h, n]
        rows[b, h, n] = p[b, h, 0, n]

    No mask, not causal: every query sees all N keys. `rows` sums to 1 over n, the [CLS] key's own share included; its
    mean over the heads is `row_scores` of the first query.

    Parameters
    ----------
    query, key, value : Tensor[B, H, N, D], one floating-point dtype
        Any strides. The [CLS] token is token 0.
    scale : float, optional
        ``D ** -0.5`` when not given.
    rows : Tensor[B, H, N], float32, optional
        Any strides. The [CLS] row's probabilities are written to it, for example one layer of an [L, B, H, N].

    Returns
    -------
    out : Tensor[B, N, H, D], the same dtype
        Contiguous.
    rows : Tensor[B, H, N], float32
        `rows` if it was given. Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # A product and a sum, as in `row_scores`: an image's row must not depend on its batch mates.
    logits = (query[:, :, :1].float() * key.float()).sum(dim=3) * scale  # [B, H, N]
    row = logits.softmax(dim=2)
    # Not SDPA: some of its implementations give NaN for keys of -inf, and some refuse strides that are not aligned.
    # Some queries at a time, so that there is never an N x N matrix.
    wide_key, wide_value = key.float().mT, value.float()
    blocks = [(block.float() @ wide_key * scale).softmax(dim=3) @ wide_value for block in query.split(64, dim=2)]
    out = torch.cat(blocks, dim=2).to(value.dtype).transpose(1, 2).contiguous()
    return out, row if rows is None else rows.copy_(row)


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    mask: Tensor | None = None,
    position: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys, averaged over the heads.

    ::

        scores[b, n] = 1/H Σ_h softmax_j(scale · query[b, h] · key[b, h // G, j])[n + skip],   G = H / Hkv

    with j over the keys that are seen, all N without `mask` and `position`; a key that is not seen scores 0. The
    skipped keys stay in the softmax's denominator: with the [CLS] key at position 0 and ``skip=1`` these are the
    patches' shares of the [CLS] token's whole attention (VTC-CLS, arXiv 2412.05819). With the last prompt token's query
    in a language model, they are what FastV (arXiv 2403.06764) ranks by.

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
        The one row, for example the [CLS] token's.
    key : Tensor[B, Hkv, N, D], same dtype
        Any strides. H is a multiple of Hkv (grouped-query attention).
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        How many leading columns are left out of the result.
    mask : Tensor[B, N], bool, optional
        False where a key gets no attention (padding). A row that sees nothing is NaN, as in `torch.softmax`.
    position : Tensor[B], int64, optional
        The query's place among the keys. Later ones get no attention (causal).
    out : Tensor[B, N - skip], float32, optional
        The scores are added to it in place, which is how several layers are summed.

    Returns
    -------
    Tensor[B, N - skip], float32
        `out` if it was given. Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = query.float().unflatten(1, (key.shape[1], -1)).unsqueeze(3)  # [B, Hkv, G, 1, D]
    # A product and a sum, not a matmul: batched matmuls may round an image differently when its batch mates change.
    logits = (grouped * key.float().unsqueeze(2)).sum(dim=4).flatten(1, 2) * scale  # [B, H, N]
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    if position is not None:
        later = torch.arange(key.shape[2], device=key.device) > position.unsqueeze(1)  # [B, N]
        logits = logits.masked_fill(later.unsqueeze(1), float("-inf"))
    scores = logits.softmax(dim=2).mean(dim=1)[:, skip:]
    return scores.contiguous() if out is None else out.add_(scores)


def topk(scores: Tensor, k: int, *, ensemble: str = "sum", total: Tensor | None = None) -> Tensor:
    """Indices of the `k` largest scores of each row, in ascending order of the index.

    Ties go to the lower index (0.0 and -0.0 are a tie). NaN counts as -inf; such columns are taken when nothing better
    is left, so the result is always `k` different indices in [0, N).

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

    Returns
    -------
    Tensor[B, K], int64
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.ndim == 4:
        scores = scores.mean(dim=2)
    if scores.ndim == 3:
        scores = getattr(scores, {"max": "amax", "min": "amin"}.get(ensemble, ensemble))(dim=0)
    if total is not None:
        total.copy_(scores)
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def compact(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Rows of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, ...] or a sequence of such tensors, any dtypes
        Any strides. Several tensors (hidden states, positions, masks) have one B and one N.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.

    Returns
    -------
    Tensor[B, K, ...] or a tuple of them, the dtypes of `x`
        Contiguous.
    """
    images = torch.arange(len(indices), device=indices.device).unsqueeze(1)
    if isinstance(x, Tensor):
        return x[images, indices].contiguous()
    return tuple(tensor[images, indices].contiguous() for tensor in x)


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, *, in_place: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows of the keys and values of many layers: ``result[b, h, k] = x[b, h, indices[b, k]]``.

    Parameters
    ----------
    keys, values : sequences of Tensor[B, H, N, D], any dtype
        One per layer. Any strides; layers may differ in dtype, H and D.
    indices : Tensor[B, K], int64
        Each in [0, N). In place: ascending and unique in each row.
    in_place : bool
        Move the kept rows to the front of the tensors themselves, for a preallocated (static) cache. Rows from K on
        are left as they are. No two tensors may share memory, nor two elements of one.

    Returns
    -------
    keys, values : tuples of Tensor[B, H, K, D], the dtypes given
        New tensors, or views of the given ones.
    """

    images = torch.arange(len(indices), device=indices.device).unsqueeze(1)

    def gather(x: Tensor) -> Tensor:
        kept = x.transpose(1, 2)[images, indices].transpose(1, 2)  # [B, H, K, D]
        return x[:, :, : indices.shape[1]].copy_(kept) if in_place else kept.contiguous()

    return tuple(map(gather, keys)), tuple(map(gather, values))


def merge(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of `x` that take up the tokens like them. Every result is a weighted sum of the rows of x.

    ::

        rows[b] = mix[b] · x[b]
        similarity[k, n] = key[b, t] · key[b, n] / (|key[b, t]| · |key[b, n]|),   t = targets[b, k], all for one image b

    With `neighbors` = m, each target takes up its m most similar others, targets among them, and one more row holds the
    tokens that are no target (PruMerge, arXiv 2403.15388)::

        rows[k] = x[t] + Σ_n weight[n] · x[n],   n over the m most similar to t, n ≠ t; over all if they are fewer
        rows[K] = Σ_n weight[n] · x[n],          n over the tokens that are no target

    Without, each token that is no target joins the one target that is most similar, and a target takes up the weighted
    mean of those who joined it, if any; a token of weight 0 joins none (VisionZip, arXiv 2412.04467)::

        rows[k] = x[t] + Σ_n weight[n] · x[n] / Σ_n weight[n],   n over the tokens whose nearest target is t

    Ties go to the lower index, of the token or of the target; NaN among the similarities counts as -inf. A NaN or inf
    in `x` reaches all rows of its image. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, D], floating point
        Any strides.
    key : Tensor[B, N, C], floating point
        What is compared: by angle alone, in float32.
    targets : Tensor[B, K], int64
        Each in [0, N), unique in each row, in any order.
    weight : Tensor[B, N], float32
    neighbors : int, optional
        At least 1.
    counts : Tensor[B], int64, optional
        How many of an image's targets count, from the left; K when not given. The others may be anything in [0, N).

    Returns
    -------
    rows : Tensor[B, R, D], the dtype of `x`
        R = K + 1 with `neighbors`, otherwise R = K. Summed in float32. With `counts`, an image's one more row comes
        right after its targets, and the rest is 0.
    mix : Tensor[B, R, N], float32
    """
    count = torch.full_like(targets[:, 0], targets.shape[1]) if counts is None else counts
    images = torch.arange(len(x), device=x.device).unsqueeze(1)
    unit = torch.nn.functional.normalize(key.float(), dim=2)
    similarity = _products(unit[images, targets], unit.mT).nan_to_num(nan=-2.0)  # [B, K, N]; cosines are above -2
    valid = torch.arange(targets.shape[1], device=x.device) < count.unsqueeze(1)  # [B, K]
    itself = targets.unsqueeze(2) == torch.arange(x.shape[1], device=x.device)  # [B, K, N]
    is_target = (itself & valid.unsqueeze(2)).any(dim=1)  # [B, N]

    if neighbors is None:
        nearest = similarity.masked_fill(~valid.unsqueeze(2), -3.0).argmax(dim=1, keepdim=True)  # [B, 1, N]
        joins = ~is_target & (weight != 0)
        member = (nearest == torch.arange(targets.shape[1], device=x.device).unsqueeze(1)) & joins.unsqueeze(1)
        share = torch.where(member, weight.unsqueeze(1), 0.0)
        share = torch.where(member, share / share.sum(dim=2, keepdim=True), 0.0)
    else:
        order = similarity.masked_fill(itself, -3.0).sort(dim=2, descending=True, stable=True).indices
        order = order[:, :, : min(neighbors, x.shape[1] - 1)]
        member = torch.zeros_like(itself).scatter_(2, order, True)
        share = torch.where(member, weight.unsqueeze(1), 0.0)
    mix = torch.where(itself, 1.0, share).masked_fill(~valid.unsqueeze(2), 0.0)
    used = count
    if neighbors is not None:
        mix = torch.cat([mix, torch.zeros_like(mix[:, :1])], dim=1)
        mix[images[:, 0], count] = torch.where(is_target, 0.0, weight)
        used = count + 1
    padding = torch.arange(mix.shape[1], device=x.device) >= used.unsqueeze(1)  # [B, R]
    return _products(mix, x.float()).masked_fill(padding.unsqueeze(2), 0.0).to(x.dtype), mix


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products [B, ..., ...], image by image: one of a whole batch may round an image by its batch mates."""
    return torch.stack([a @ b for a, b in zip(left, right, strict=True)]) if len(left) else left @ right
