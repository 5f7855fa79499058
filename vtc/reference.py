"""Every operation of VTC in plain PyTorch: the specification that the Triton kernels are tested against.

Same names and signatures as in `vtc.ops`. Nothing is validated here; `vtc.ops` does that before it calls anything.
Shapes: B images, H heads, N tokens, K kept tokens (or targets), D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cls_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """A vision layer's attention, and the attention probabilities of its [CLS] row, head by head.

    ::

        p[b, h, m, n]      = softmax_n(scale · query[b, h, m] · key[b, h, n])
        out[b, m, h]       = Σ_n p[b, h, m, n] · value[b, h, n]
        cls_probs[b, h, n] = p[b, h, 0, n]

    No mask, not causal: every query sees all N keys. `cls_probs` sums to 1 over n, which includes the [CLS] key;
    its mean over the heads is `row_scores` of the first query.

    Parameters
    ----------
    query, key, value : Tensor[B, H, N, D], one floating-point dtype
        Any strides. The [CLS] token is token 0.
    scale : float, optional
        ``D ** -0.5`` when not given.

    Returns
    -------
    out : Tensor[B, N, H, D], the same dtype
        Contiguous.
    cls_probs : Tensor[B, H, N], float32
        Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # A product and a sum, as in `row_scores`: an image's probabilities must not depend on its batch mates.
    logits = (query[:, :, :1].float() * key.float()).sum(dim=3) * scale  # [B, H, N]
    cls_probs = logits.softmax(dim=2)
    # Not SDPA: some of its implementations give NaN for keys of -inf, and some refuse strides that are not aligned.
    # One block of queries at a time, so that there is never an N x N matrix.
    wide_key, wide_value = key.float().mT, value.float()
    blocks = [(block.float() @ wide_key * scale).softmax(dim=3) @ wide_value for block in query.split(64, dim=2)]
    out = torch.cat(blocks, dim=2).to(value.dtype).transpose(1, 2).contiguous()
    return out, cls_probs


def cls_probs(
    queries: Sequence[Tensor], keys: Sequence[Tensor], *, scale: float | None = None, skip: int = 0
) -> Tensor:
    """Attention probabilities of one query row, the [CLS] token's, over all keys, in several layers at once.

    ::

        probs[l, b, h, n] = softmax_j(scale · queries[l][b, h] · keys[l][b, h, j])[n + skip]

    The skipped keys stay in the softmax's denominator: with the [CLS] key at position 0 and ``skip=1`` these are the
    patches' shares of the [CLS] token's whole attention (VTC-CLS, arXiv 2412.05819). The mean over the heads of one
    layer is its `row_scores`.

    Parameters
    ----------
    queries : sequence of Tensor[B, H, D], floating point
        One row per layer, the [CLS] token's. All layers have one shape and one dtype.
    keys : sequence of Tensor[B, H, N, D], same dtype
        Of each layer. Any strides.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        How many leading columns are left out of the result.

    Returns
    -------
    Tensor[L, B, H, N - skip], float32
        Computed in float32 whatever the inputs' dtype. As in `torch.softmax`, a row with a NaN or inf logit, or with
        logits of -inf only, is NaN.
    """
    scale = keys[0].shape[-1] ** -0.5 if scale is None else scale
    # A product and a sum, as in `row_scores`: an image's probabilities must not depend on its batch mates.
    logits = [(q.float().unsqueeze(2) * key.float()).sum(dim=3) * scale for q, key in zip(queries, keys, strict=True)]
    return torch.stack([layer.softmax(dim=2)[:, :, skip:] for layer in logits])


def row_scores(
    query: Tensor, key: Tensor, *, scale: float | None = None, skip: int = 0, mask: Tensor | None = None
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys, averaged over the heads.

    ::

        scores[b, n] = 1/H Σ_h softmax_j(scale · query[b, h] · key[b, h // G, j])[n + skip],   G = H / Hkv

    with j over the keys that are not masked; a masked key scores 0. The skipped keys stay in the softmax's denominator:
    with the [CLS] key at position 0 and ``skip=1`` these are the patches' shares of the [CLS] token's whole attention
    (VTC-CLS, arXiv 2412.05819). With the last prompt token's query in a language model, they are what FastV (arXiv
    2403.06764) ranks by.

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
        One row, for example the [CLS] token's.
    key : Tensor[B, Hkv, N, D], same dtype
        Any strides. H is a multiple of Hkv (grouped-query attention).
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        How many leading columns are left out of the result.
    mask : Tensor[B, N], bool, optional
        False where a key gets no attention (padding). A row whose keys are all masked is NaN, as in `torch.softmax`.

    Returns
    -------
    Tensor[B, N - skip], float32
        Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = query.float().unflatten(1, (key.shape[1], -1)).unsqueeze(3)  # [B, Hkv, G, 1, D]
    # A product and a sum, not a matmul: batched matmuls may round an image differently when its batch mates change.
    logits = (grouped * key.float().unsqueeze(2)).sum(dim=4).flatten(1, 2) * scale  # [B, H, N]
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return logits.softmax(dim=2).mean(dim=1)[:, skip:].contiguous()


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
    """Tokens of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

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


def select(scores: Tensor, x: Tensor, k: int, *, ensemble: str = "sum") -> tuple[Tensor, Tensor, Tensor]:
    """The `k` tokens of `x` with the largest scores, in their order: `topk` and `compact`. Differentiable in `x`.

    Parameters
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], floating point
        Any strides. Combined and ranked as in `topk`.
    x : Tensor[B, N, ...], any dtype
        Any strides.
    k : int
        1 <= k <= N.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined. A NaN in a layer makes the combination NaN.

    Returns
    -------
    features : Tensor[B, K, ...], the dtype of `x`
        ``features[b, i] = x[b, indices[b, i]]``. Contiguous.
    indices : Tensor[B, K], int64
        Ascending.
    total : Tensor[B, N], float32 (float64 for float64 scores)
        The combined scores.
    """
    total = scores.new_empty(x.shape[:2], dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    indices = topk(scores, k, ensemble=ensemble, total=total)
    kept = compact(x, indices)
    return kept, indices, total  # type: ignore[return-value]


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tokens of the keys and values of many layers: ``result[b, h, k] = x[b, h, indices[b, k]]``.

    Parameters
    ----------
    keys, values : sequences of Tensor[B, H, N, D], any dtype
        One per layer. Any strides; layers may differ in dtype, H and D.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.

    Returns
    -------
    keys, values : tuples of Tensor[B, H, K, D], the dtypes given
        Contiguous.
    """
    images = torch.arange(len(indices), device=indices.device).unsqueeze(1)

    def gather(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[images, indices].transpose(1, 2).contiguous()  # [B, H, K, D]

    return tuple(map(gather, keys)), tuple(map(gather, values))


def merge_neighbors(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each target absorbs its most similar tokens; the extra token absorbs all non-targets.

    PruMerge (arXiv 2403.15388)::

        features[k] = x[t] + Σ_n weight[n] · x[n],   n over the `neighbors` tokens most similar to t, n ≠ t
        features[K] = Σ_n weight[n] · x[n],          n over the tokens that are not targets: the extra token
        t = targets[k],   similarity of t and n = key[t] · key[n] / (|key[t]| · |key[n]|),   all for one image

    Other targets can be neighbors. Ties go to the lower index; a similarity of NaN counts as -inf. A NaN
    or inf in `x` reaches all tokens of its image. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, D], floating point
        Any strides.
    key : Tensor[B, N, C], floating point
        Compared by cosine similarity, in float32.
    targets : Tensor[B, K], int64
        Each in [0, N), unique in each image, in any order.
    weight : Tensor[B, N], float32
    neighbors : int
        At least 1; all other tokens if there are fewer.
    counts : Tensor[B], int64, optional
        How many of an image's targets are valid, from the left; K when not given. The others may be any tokens.

    Returns
    -------
    features : Tensor[B, K + 1, D], the dtype of `x`
        Summed in float32. With `counts`, an image's extra token comes right after its targets, and the rest is 0.
    mix : Tensor[B, K + 1, N], float32
        The weights: features = mix · x.
    """
    images = torch.arange(len(x), device=x.device)
    count = torch.full_like(images, targets.shape[1]) if counts is None else counts
    counted = torch.arange(targets.shape[1], device=x.device) < count.unsqueeze(1)  # [B, K]
    itself = _is_target(targets, x.shape[1])  # [B, K, N]
    is_target = (itself & counted.unsqueeze(2)).any(dim=1)  # [B, N]

    order = _similarity(key, targets).masked_fill(itself, -3.0).sort(dim=2, descending=True, stable=True).indices
    order = order[:, :, : min(neighbors, x.shape[1] - 1)]
    is_neighbor = torch.zeros_like(itself).scatter_(2, order, True)
    mix = torch.where(itself, 1.0, torch.where(is_neighbor, weight.unsqueeze(1), 0.0))
    mix = mix.masked_fill(~counted.unsqueeze(2), 0.0)
    mix = torch.cat([mix, torch.zeros_like(mix[:, :1])], dim=1)
    mix[images, count] = torch.where(is_target, 0.0, weight)
    padding = torch.arange(mix.shape[1], device=x.device) > count.unsqueeze(1)  # [B, K + 1]
    return _products(mix, x.float()).masked_fill(padding.unsqueeze(2), 0.0).to(x.dtype), mix


def merge_nearest(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each token joins its nearest target, and a target absorbs the weighted mean of the tokens that join it.

    VisionZip (arXiv 2412.04467)::

        features[k] = x[t] + Σ_n weight[n] · x[n] / Σ_n weight[n],   n over the tokens whose most similar target is t
        t = targets[k],   similarity of t and n = key[t] · key[n] / (|key[t]| · |key[n]|),   all for one image

    Targets and tokens of weight 0 join no target; a target that no token joins stays as it is. Ties go to the lower k;
    a similarity of NaN counts as -inf. A NaN or inf in `x` reaches all tokens of its image. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, D], floating point
        Any strides.
    key : Tensor[B, N, C], floating point
        Compared by cosine similarity, in float32.
    targets : Tensor[B, K], int64
        Each in [0, N), unique in each image, in any order.
    weight : Tensor[B, N], float32

    Returns
    -------
    features : Tensor[B, K, D], the dtype of `x`
        Summed in float32.
    mix : Tensor[B, K, N], float32
        The weights: features = mix · x.
    """
    itself = _is_target(targets, x.shape[1])  # [B, K, N]
    joins = ~itself.any(dim=1) & (weight != 0)  # [B, N]
    nearest = _similarity(key, targets).argmax(dim=1, keepdim=True)  # [B, 1, N]
    member = (nearest == torch.arange(targets.shape[1], device=x.device).unsqueeze(1)) & joins.unsqueeze(1)
    share = torch.where(member, weight.unsqueeze(1), 0.0)
    share = torch.where(member, share / share.sum(dim=2, keepdim=True), 0.0)
    mix = torch.where(itself, 1.0, share).contiguous()
    return _products(mix, x.float()).to(x.dtype), mix


def similarity(x: Tensor, y: Tensor, *, temperature: float | None = None) -> Tensor:
    """Cosine similarity of every token of `x` to every token of `y`, or its softmax over the tokens of `y`.

    ::

        s[b, r, n] = x[b, r] · y[b, n] / (max(|x[b, r]|, ε) · max(|y[b, n]|, ε)),   ε = 1e-12
        result     = s without a temperature, else softmax_n(s / temperature)

    A token of zeros has similarity 0 to every other. The softmax is the coverage of MMTok (arXiv 2508.18264).

    Parameters
    ----------
    x : Tensor[B, R, D], floating point
        Any strides.
    y : Tensor[B, N, D], the dtype of `x`
        Any strides.
    temperature : float, optional
        Positive.

    Returns
    -------
    Tensor[B, R, N], float32
        Computed in float32 whatever the inputs' dtype. The columns are contiguous, as `coverage` reads them.
    """
    left, right = (torch.nn.functional.normalize(each.float(), dim=2) for each in (x, y))
    columns = _columns_alone(left, right)
    if temperature is not None:
        columns = (columns / temperature).softmax(dim=1)
    return columns.mT


def coverage(
    cover: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy maximum coverage: `k` columns, one after the other, each the one that adds most to what is covered.

    SCOPE (arXiv 2510.24214) and MMTok (arXiv 2508.18264)::

        covered[r] = 0
        k times:  gain[n]    = weight[n] · Σ_r max(0, cover[r, n] - covered[r])     all rows r, all for one image
                  choose     n with the largest gain; a tie goes to the lower index
                  covered[r] = max(covered[r], cover[r, n])

    The sum has a fixed order, so that every backend chooses the same columns: the terms r, r + 1024, r + 2048, ... are
    added one after the other, then the upper half of these 1024 sums to the lower half, until one is left. All of it
    is IEEE float32.

    A term whose entry is NaN, or not above what is covered, is 0. A weight that is NaN or not above 0 makes the gain 0.
    Columns that are not allowed are chosen when no other is left, the lowest first.

    Parameters
    ----------
    cover : Tensor[B, R, N], float32
        How much column n covers of row r. Any strides.
    k : int
        1 <= k <= N.
    weight : Tensor[B, N], float32, optional
        1 when not given.
    allowed : Tensor[B, N], bool, optional
        False at columns that may not be chosen.
    counts : Tensor[B], int64, optional
        How many columns an image chooses, 1 to k; k when not given.

    Returns
    -------
    indices : Tensor[B, k], int64
        The chosen columns, ascending. Entries from an image's count on are 0.
    order : Tensor[B, k], int64
        The same in the order in which they are chosen.
    """
    num_images, num_rows, num_columns = cover.shape
    covered = torch.zeros((num_images, num_rows, 1), dtype=torch.float32, device=cover.device)
    rest = torch.ones((num_images, num_columns), dtype=torch.bool, device=cover.device)  # not chosen
    order = []
    for _ in range(k):
        gain = _sum_of_rows(torch.where(cover > covered, cover - covered, 0.0))
        if weight is not None:
            gain = torch.where((weight > 0) & (gain > 0), weight * gain, 0.0)  # inf times 0 is NaN
        order.append(_first_largest(gain, rest, allowed))
        rest = rest.scatter(1, order[-1], False)
        chosen = cover.gather(2, order[-1].unsqueeze(1).expand(-1, num_rows, 1))
        covered = torch.where(chosen > covered, chosen, covered)
    return sorted_choices(torch.cat(order, dim=1), num_columns, counts)


def maxmin(
    similarity: Tensor, k: int, *, allowed: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy max-min distance: `k` tokens, one after the other, each the one that is least like those chosen.

    The rule of DivPrune (arXiv 2503.02175) and of farthest-point sampling, with the distance 1 - similarity::

        first:      n with the smallest max_{m ≠ n} similarity[m, n]     m among the allowed, all for one image
        k-1 times:  n with the smallest max_m similarity[m, n]           m among the chosen

    A tie goes to the lower index. A similarity of NaN counts as -inf. Tokens that are not allowed are chosen when no
    other is left, the lowest first.

    Parameters
    ----------
    similarity : Tensor[B, N, N], float32
        Symmetric; row m is read for token m. Any strides.
    k : int
        1 <= k <= N.
    allowed : Tensor[B, N], bool, optional
        False at tokens that may not be chosen.
    counts : Tensor[B], int64, optional
        How many tokens an image chooses, 1 to k; k when not given.

    Returns
    -------
    indices : Tensor[B, k], int64
        The chosen tokens, ascending. Entries from an image's count on are 0.
    order : Tensor[B, k], int64
        The same in the order in which they are chosen.
    """
    num_tokens = similarity.shape[1]
    lowest = float("-inf")
    similarity = similarity.masked_fill(similarity.isnan(), lowest)
    others = similarity.masked_fill(torch.eye(num_tokens, dtype=torch.bool, device=similarity.device), lowest)
    if allowed is not None:
        others = others.masked_fill(~allowed.unsqueeze(2), lowest)
    nearest, rest = others.amax(dim=1), torch.ones_like(others[:, 0], dtype=torch.bool)
    order = []
    for number in range(k):
        order.append(_first_largest(-nearest, rest, allowed))
        rest = rest.scatter(1, order[-1], False)
        row = similarity.gather(1, order[-1].unsqueeze(2).expand(-1, 1, num_tokens)).squeeze(1)
        nearest = torch.maximum(nearest, row) if number else row
    return sorted_choices(torch.cat(order, dim=1), num_tokens, counts)


def received(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The attention that each token receives: the mean over the heads and over all queries.

    HiPrune (arXiv 2508.00553)::

        p[b, h, m, n]  = softmax_n(scale · query[b, h, m] · key[b, h, n])
        received[b, n] = 1/H Σ_h 1/N Σ_m p[b, h, m, n + skip]

    Parameters
    ----------
    query, key : Tensor[B, H, N, D], one floating-point dtype
        Any strides.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        How many leading keys are left out of the result. They stay in the softmax's denominator, and their queries
        count ([CLS]: 1).
    lse : Tensor[B, H, N], float32, optional
        The logarithm of each query's sum of exponentials, natural, as the forward pass of an attention has it. The
        probabilities are then ``exp(logits - lse)``, and the rounding of `lse` is in all of its query's.
    cu_seqlens : Tensor[S + 1], int64 or int32, optional
        For B = 1: where each of S segments begins, and N. A query attends to the keys of its own segment, and the mean
        is over its segment's queries. `skip` has to be 0.

    Returns
    -------
    Tensor[B, N - skip], float32
        Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_tokens = query.shape[2]
    share = torch.full((num_tokens,), 1 / max(num_tokens, 1), dtype=torch.float32, device=query.device)
    mask = None
    if cu_seqlens is not None:
        tokens = torch.arange(num_tokens, device=query.device)
        segment = torch.searchsorted(cu_seqlens.to(query.device, torch.int64), tokens, right=True)
        mask = segment.unsqueeze(1) == segment
        share = 1 / mask.sum(dim=1).float()
    total = torch.zeros((query.shape[0], num_tokens), dtype=torch.float32, device=query.device)
    for head in range(query.shape[1]):  # never all heads' N x N matrices at once
        logits = _products(query[:, head].float(), key[:, head].float().mT) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        probs = logits.softmax(dim=2) if lse is None else (logits - lse[:, head].unsqueeze(2)).exp()
        probs *= share.unsqueeze(1)
        if mask is not None:  # again: the NaN of one segment must not reach another
            probs = probs.masked_fill(~mask, 0.0)
        total += probs.sum(dim=1)
    return (total / query.shape[1])[:, skip:].contiguous()


def _is_target(targets: Tensor, num_tokens: int) -> Tensor:
    """Which token each target is: bool [B, K, N]."""
    return targets.unsqueeze(2) == torch.arange(num_tokens, device=targets.device)


def _similarity(key: Tensor, targets: Tensor) -> Tensor:
    """Cosine similarity of the targets to all tokens [B, K, N]. NaN becomes -2, which is below every cosine."""
    images = torch.arange(len(key), device=key.device).unsqueeze(1)
    unit = torch.nn.functional.normalize(key.float(), dim=2)
    return _products(unit[images, targets], unit.mT).nan_to_num(nan=-2.0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products [B, ..., ...], image by image: a batched one may round an image according to its batch mates."""
    return torch.stack([a @ b for a, b in zip(left, right, strict=True)]) if len(left) else left @ right


def _columns_alone(left: Tensor, right: Tensor) -> Tensor:
    """The products `right · leftᵀ` `[B, N, R]`, each column the same to the bit however many others there are.

    Libraries choose the order of a product's sums by its shape. So all products have one shape: 64 columns, the last of
    them filled up with zeros. Of 576 columns this costs about as much as one product.
    """
    columns = left.new_empty(left.shape[0], right.shape[1], left.shape[1])
    for image, row, out in zip(left, right, columns, strict=True):
        for block, part in zip(image.split(64), out.split(64, dim=1), strict=True):
            block = torch.nn.functional.pad(block, (0, 0, 0, 64 - len(block)))
            part.copy_((row @ block.mT)[:, : part.shape[1]])
    return columns


def _sum_of_rows(terms: Tensor) -> Tensor:
    """Sums over the rows of `[B, R, N]`, in the order that `coverage` specifies: [B, N]."""
    total = torch.nn.functional.pad(terms[:, :1024], (0, 0, 0, 1024 - min(terms.shape[1], 1024)))
    for start in range(1024, terms.shape[1], 1024):
        block = terms[:, start : start + 1024]
        total[:, : block.shape[1]] += block
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    return total[:, 0]


def _first_largest(gain: Tensor, rest: Tensor, allowed: Tensor | None) -> Tensor:
    """The lowest index of the largest gain among the `rest`, allowed ones first: [B, 1]."""
    competes = rest
    if allowed is not None:
        first = rest & allowed
        gain = torch.where(allowed, gain, 0.0)  # of those that are not allowed the lowest index is first
        competes = torch.where(first.any(dim=1, keepdim=True), first, rest)
    best = gain.masked_fill(~competes, float("-inf")).amax(dim=1, keepdim=True)
    return (competes & (gain == best)).int().argmax(dim=1, keepdim=True)


def sorted_choices(order: Tensor, num_columns: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `coverage` and `maxmin` return: the first `counts` choices of each image, ascending, and in their order.

    Parameters
    ----------
    order : Tensor[B, k], int64
        The chosen columns, in their order.
    num_columns : int
        N.
    counts : Tensor[B], int64, optional
        As in `coverage`.

    Returns
    -------
    indices, order : Tensor[B, k], int64
        Entries from an image's count on are 0.
    """
    if counts is None:
        return order.sort(dim=1).values, order
    left = torch.arange(order.shape[1], device=order.device) >= counts.unsqueeze(1)
    indices = order.masked_fill(left, num_columns).sort(dim=1).values
    return indices.masked_fill(indices == num_columns, 0), order.masked_fill(left, 0)
