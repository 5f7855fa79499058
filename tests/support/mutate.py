"""Break every kernel in many ways, and see at least one test go red for each: `python -m tests.support.mutate [NAME ...]`.

A mutant is a small edit of one file. It is made in a copy of the packages, so the tree is not touched, and the tests of
that file run against the copy. A mutant that no test notices is a survivor: the command names it and exits with 1.
Names select mutants by substring. A mutant takes about ten seconds on one core; two run at a time.
"""

# ruff: noqa: E501  (an edit beside what it replaces, on one line, is a table)
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Mutant(NamedTuple):
    """One edit: `old`, which occurs exactly once in `file`, becomes `new`; `tests` are the files that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, tests: str, edits: dict[str, tuple[str, str]]) -> list[Mutant]:
    files = tuple(f"tests/{name}.py" for name in tests.split())
    return [Mutant(f"{Path(file).stem}: {name}", file, *edit, files) for name, edit in edits.items()]


MUTANTS = [
    *_of(
        "kernels/cls_attention.py",
        "ops/test_cls_attention",
        {
            "scale dropped": ("num_features**-0.5 if scale is None else float(scale)", "1.0"),
            "given scale ignored": ("if scale is None else float(scale)", "if True else float(scale)"),
            "scale not folded": ("logits * scale - shift[:, None]", "logits - shift[:, None]"),
            "maximum without the scale": ("tl.max(in_block, axis=1) * scale", "tl.max(in_block, axis=1)"),
            "base of the exponential": ("abs(scale) * _LOG2_E", "abs(scale)"),
            "negative scale taken as positive": ("            query = -query", "            query = query"),
            "negative scale of [CLS] taken as positive": ("-scale if NEGATIVE else scale", "scale"),
            "padded keys have weight": ("weights = tl.where(in_row[None, :], weights, 0.0)", "pass"),
            "padded keys have weight in fp32": ("in_row = i * BLOCK_N + tl.arange(0, BLOCK_N) < num_tokens if MASKED", "in_row = tl.arange(0, BLOCK_N) < num_tokens if MASKED"),
            "rest left out": ("if REST > 0:", "if REST > BLOCK_N:"),
            "rest is the first keys": ("r = NUM_BLOCKS * BLOCK_N + tl.arange(0, REST)", "r = tl.arange(0, REST)"),
            "[CLS] key counted twice": ("in_row = r < num_tokens", "r = tl.where(r < num_tokens, r, 0); in_row = r < num_tokens"),
            "[CLS] key not counted": ("n = tl.arange(0, BLOCK_N)\n    d =", "n = 1 + tl.arange(0, BLOCK_N)\n    d ="),
            "accumulator not rescaled": ("summed * rescale[:, None], input_precision", "summed, input_precision"),
            "sum not rescaled": ("row_sum * rescale +", "row_sum +"),
            "[CLS] sum not rescaled": ("lane_sum * tl.exp2(lane_max - shift)", "lane_sum"),
            "[CLS] lanes have one maximum": ("lane_sum * tl.exp2(lane_max - row_max)", "lane_sum"),
            "a first block of -inf is NaN": ('shift = tl.where(highest == float("-inf"), 0.0, highest)\n    weights', "shift = highest\n    weights"),
            "a first [CLS] block of -inf is NaN": ('shift = tl.where(highest == float("-inf"), 0.0, highest)\n        lane_sum', "shift = highest\n        lane_sum"),
            "NaN row is finite": ("weights = tl.exp2(logits * scale - shift[:, None])", "weights = tl.exp2(tl.where(logits == logits, logits, 0.0) * scale - shift[:, None])"),
            "NaN [CLS] row is finite": ("tl.exp2(logits - row_max) / row_sum", "tl.exp2(logits - row_max) / tl.where(row_sum == row_sum, row_sum, 1.0)"),
            "row of the second query": ("tl.load(query_ptr + d * query_stride_d", "tl.load(query_ptr + key_stride_n + d * query_stride_d"),
            "row left as logits": ("cls_probs_ptr + start + lane, cls_probs, mask", "cls_probs_ptr + start + lane, logits, mask"),
            "row not divided": ("tl.exp2(logits - row_max) / row_sum", "tl.exp2(logits - row_max)"),
            "row without its maximum": ("tl.exp2(logits - row_max) / row_sum", "tl.exp2(logits) / row_sum"),
            "output not divided": ("summed / row_sum[:, None]", "summed"),
            "[CLS] output of the last block alone": ("summed += cls_probs[:, None] * value", "summed = cls_probs[:, None] * value"),
            "no block loaded ahead": ("ahead = _load_rows(value_ptr, value_stride_n, value_stride_d, start + BLOCK_N + n,", "ahead = _load_rows(value_ptr, value_stride_n, value_stride_d, start + n,"),
            "patches begin with [CLS]": ("m = (block - 1) * BLOCK_M + 1 + tl.arange", "m = (block - 1) * BLOCK_M + tl.arange"),
            "no offset is far": (">= 2**31,", ">= 2**63,"),
            "value's head stride is the key's": ("h * value_stride_h", "h * key_stride_h"),
            "query's token stride is the key's": ("m[:, None] * query_stride_n", "m[:, None] * key_stride_n"),
            "output of the next head": ("* num_heads + h) * NUM_FEATURES", "* num_heads + (h + 1) % num_heads) * NUM_FEATURES"),
            "probabilities of the first head alone": ("cls_probs_ptr += head.to(tl.int64) * num_tokens", "cls_probs_ptr += b * num_heads * num_tokens"),
        },
    ),
    *_of(
        "kernels/tuning.py",
        "ops/test_cls_attention",
        {
            "last queries unmasked": ('"EVEN": (num_tokens - 1) % block_m == 0', '"EVEN": True'),
            "the rest is whole": ("num_tokens // block_n if peel else", "num_tokens // block_n if True else"),
            "fp32 is not masked": ("not peel and rest > 0", "False"),
        },
    ),
    *_of(
        "kernels/cls_probs.py",
        "ops/test_cls_probs",
        {
            "scale dropped": ("num_features**-0.5 if scale is None else float(scale)", "1.0"),
            "logarithms of another base": ("scale * _LOG2_E,", "scale,"),
            "keys of the first layer": ("tl.where(layer == t, key_ptrs[t], key_ptr)", "key_ptr"),
            "query of the first layer": ("tl.where(layer == t, query_ptrs[t], query_ptr)", "query_ptr"),
            "strides of the first layer": ("strides_of[last] == strides:", "True:"),
            "padded keys have weight": ('tl.where(in_row, tl.sum(query[None, :] * key, axis=1) * scale, float("-inf"))', "tl.sum(query[None, :] * key, axis=1) * scale"),
            "[CLS] key out of the denominator": ("in_row = j < num_tokens - i * BLOCK_N", "in_row = (j < num_tokens - i * BLOCK_N) & (j + i > 0)"),
            "column's sum not rescaled": ("column_sum * tl.exp2(column_max - shift) +", "column_sum +"),
            "columns summed as they are": ('tl.sum(column_sum * tl.exp2(column_max - tl.where(row_max == float("-inf"), 0.0, row_max)), axis=0)', "tl.sum(column_sum, axis=0)"),
            "column that starts with -inf is NaN": ('shift = tl.where(highest == float("-inf"), 0.0, highest)', "shift = highest"),
            "skip ignored": ("column = i * BLOCK_N - skip + j", "column = i * BLOCK_N + j"),
            "skipped keys written before the row": ("mask=in_row & (column >= 0)", "mask=in_row"),
            "left as logits": ("tl.exp2(logits - row_max) / row_sum", "logits"),
            "maximum not subtracted": ("tl.exp2(logits - row_max) / row_sum", "tl.exp2(logits) / row_sum"),
            "first block of probabilities alone": ("while start < num_columns:", "while start < tl.minimum(num_columns, BLOCK_N):"),
            "offsets of 32 bits": ("WIDE=block_n * strides[5] + block_d * strides[6] >= 2**31", "WIDE=False"),
            "key's head stride is the query's": ("h * key_stride_h", "h * query_stride_h"),
            "last block left out": ("NUM_BLOCKS=triton.cdiv(num_tokens, block_n)", "NUM_BLOCKS=max(1, num_tokens // block_n)"),
            "probabilities of the next layer": ("(layer.to(tl.int64) * tl.num_programs(0) + head)", "(((layer + 1) % len(key_ptrs)).to(tl.int64) * tl.num_programs(0) + head)"),
        },
    ),
    *_of(
        "kernels/select.py",
        "ops/test_select",
        {
            "every program starts at 0": ("start = tl.program_id(1) * BLOCK_K", "start = 0 * BLOCK_K"),
            "tokens between the kept ones count": ("slot = tl.where(kept, slot, -1)", "slot = slot"),
            "token stride is the features'": ("n[:, None] * x_stride_n", "n[:, None] * x_stride_c"),
            "first block of features alone": ("while first < num_features:", "while first < tl.minimum(num_features, BLOCK_C):"),
            "tokens of the first image": ("x_ptr += b * x_stride_b", "x_ptr += 0 * x_stride_b"),
            "scores of the first image": ("scores_ptr += b * scores_stride_b", "scores_ptr += 0 * scores_stride_b"),
            "features of the first image alone": ("features_ptr += b * k * num_features", "features_ptr += 0 * k * num_features"),
            "float64 narrowed": ("FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32", "FLOAT: tl.constexpr = tl.float32"),
            "token stride of the scores ignored": ("column.to(tl.int64) * scores_stride_n", "column.to(tl.int64)"),
            "padding competes": ("search.ordered(total, in_row, BITS)", "search.ordered(total, in_row | True, BITS)"),
            "long rows in one launch": ("if num_tokens > tuning.SELECT_TOKENS:", "if False:"),
            "ensemble ignored": ("ENSEMBLE=ensemble", 'ENSEMBLE="sum"'),
            "int32 offsets of tokens": ("column[None, :], 0), axis=1).to(tl.int64)", "column[None, :], 0), axis=1)"),
        },
    ),
    *_of(
        "vtc/ops/select.py",
        "ops/test_select",
        {"no gradient": ("if torch.is_grad_enabled() and x.requires_grad:", "if False:")},
    ),
    *_of(
        "vtc/ops/select.py",
        "ops/test_operators",
        {"fake kernel of the wrong type": ("x.new_empty((x.shape[0], k), dtype=torch.int64)", "x.new_empty((x.shape[0], k))")},
    ),
    *_of(
        "vtc/ops/cls_probs.py",
        "ops/test_operators",
        {"fake kernel too long": ("num_tokens - skip), dtype", "num_tokens), dtype")},
    ),
    *_of(
        "vtc/reference.py",
        "ops/test_cls_probs",
        {"skipped keys leave the [CLS] row's denominator": ("layer.softmax(dim=2)[:, :, skip:]", "layer[:, :, skip:].softmax(dim=2)")},
    ),
    *_of(
        "vtc/methods/base.py",
        "hf/test_own_method",
        {
            "select of a ranking method is not asked": ("cls.reduce is Method.reduce and cls.select is Method.select and cls.ranking", "cls.reduce is Method.reduce and cls.ranking"),
            "operations are inherited": ("< distance(\"operations\")", "< 0"),
            "operations of a method that reduces": ("if cls.reduce is Method.reduce and min(", "if min("),
            "scores of a ranking are not checked": ("if isinstance(found, Ranking) and isinstance(found.scores, Tensor)", "if isinstance(found, Ranking)"),
        },
    ),
    *_of(
        "vtc/methods/vtc_cls.py",
        "methods/test_methods",
        {"ensemble ignored": ('Ranking(self.require(outputs, "cls_probs"), self.ensemble)', 'Ranking(self.require(outputs, "cls_probs"))')},
    ),
    *_of(
        "vtc/scores.py",
        "hf/test_attention",
        {
            "noted layers stay alive": ("self._layers = []  # the views", "pass  # the views"),
            "noted layers last": ("found[number] = own", "found.append(own)"),
            "one scale for all": ("if layer[2] == scale]", "]"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_status",
        {"tokens in the language model are gathered by select": ("if plan.method.only_ranks() and (", "if False and (")},
    ),
    *_of(
        "kernels/row_scores.py",
        "ops/test_row_scores",
        {
            "scale dropped": ("tl.sum(query[None, :] * key, axis=1) * scale", "tl.sum(query[None, :] * key, axis=1)"),
            "[CLS] key out of the denominator": ("seen = in_row\n", "seen = in_row & (n > 0)\n"),
            "skip ignored": ("head[:, None] * num_tokens + skip + column", "head[:, None] * num_tokens + column"),
            "last block unmasked": ("seen = in_row\n", "seen = n >= 0\n"),
            "heads summed, not averaged": ("axis=0) / num_heads", "axis=0)"),
            "padded heads counted": ("tl.where(in_heads, probabilities, 0.0)", "probabilities"),
            "maximum of the first block for all": ("tl.max(block_max, axis=1))", "tl.sum(tl.where(s[None, :] == 0, block_max, 0.0), axis=1))"),
            "sums not rescaled": ("block_sum * tl.exp(block_max - shift[:, None])", "block_sum"),
            "running sum not rescaled": ("row_sum * tl.exp(row_max - shift)", "row_sum"),
            "statistics of the first blocks alone": ("while start < num_blocks:", "while start < tl.minimum(num_blocks, BLOCK_S):"),
            "the first blocks' statistics again": ("block_sum_ptr += BLOCK_S", "block_sum_ptr += 0"),
            "maximum not subtracted": ("probabilities = tl.exp(logits - row_max[:, None])", "probabilities = tl.exp(logits)"),
            "token stride of the wrong axis": ("n[:, None] * key_stride_n", "n[:, None] * key_stride_d"),
            "feature stride of the query": ("d * query_stride_d", "d"),
            "scores of the first image alone": ("scores_ptr + b * (num_tokens - skip) + column", "scores_ptr + column"),
            "group reads the first query": ("(h * GROUP + member) * query_stride_h", "(h * GROUP) * query_stride_h"),
            "groups interleaved": ("(h * GROUP + member) * query_stride_h", "(h + member * num_key_heads) * query_stride_h"),
            "mask inverted": ("mask=in_row, other=0) != 0", "mask=in_row, other=0) == 0"),
            "mask of the first image": ("mask_ptr + b * mask_stride_b", "mask_ptr"),
            "32-bit offsets": ("tl.arange(0, BLOCK_N).to(tl.int64)\n    d = tl.arange(0, BLOCK_D).to(tl.int64)\n    key_offsets", "tl.arange(0, BLOCK_N)\n    d = tl.arange(0, BLOCK_D)\n    key_offsets"),
        },
    ),
    *_of(
        "vtc/ops/checks.py",
        "ops/test_common",
        {
            "strings are numbers": ("not isinstance(value, (int, float, torch.SymInt, torch.SymFloat))", "isinstance(value, list)"),
            "no remedy": ('f" Use {name}.{call}()."', '""'),
            "always a remedy": ('"" if tensor.dtype == dtype else ', ""),
        },
    ),
    *_of(
        "vtc/reference.py",
        "methods/test_methods",
        {"similarity: one product of all rows": ("columns = _columns_alone(left, right)", "columns = _products(right, left.mT)")},
    ),
    *_of(
        "vtc/reference.py",
        "ops/test_similarity",
        {
            "similarity: the first block alone": ("image.split(64), out.split(64, dim=1), strict=True", "image.split(64), [out[:, :64]] * 99"),
            "similarity: blocks of other images": ("zip(left, right, columns, strict=True)", "zip(left, right.flip(0), columns, strict=True)"),
        },
    ),
    *_of(
        "kernels/maxmin.py",
        "ops/test_maxmin",
        {
            "any number of columns": ("if num_tokens > tuning.GREEDY_COLUMNS:", "if False:"),
            "first from the token itself": (" & (m[:, None] != n[None, :])", ""),
            "first from all tokens": ("competes = tl.load(allowed_ptrs, mask=competes, other=0) != 0", "pass"),
            "first rows alone": ("while start < num_tokens:", "while start < BLOCK_M:"),
            "first of the last rows": ("to_others = tl.maximum(to_others, tl.max", "to_others = tl.maximum(float('-inf'), tl.max"),
            "first is the farthest from its farthest": ('tl.where(counted, similarity, float("-inf")), axis=0)', 'tl.where(counted, -similarity, float("-inf")), axis=0)'),
            "padded rows count": ("competes = m < num_tokens", "competes = m >= 0"),
            "distance to the last choice alone": ("nearest = tl.maximum(nearest, search.ordered(similarity, in_row, 32))", "nearest = tl.where(nearest < LAST, search.ordered(similarity, in_row, 32), nearest)"),
            "distance to the first choice alone": ("nearest = tl.maximum(nearest, search.ordered(similarity, in_row, 32))", "nearest = tl.where(step == 0, tl.maximum(nearest, search.ordered(similarity, in_row, 32)), nearest)"),
            "chosen again": ("nearest = tl.where(n == chosen, TAKEN, nearest)", "pass"),
            "the most alike": ("nearest = tl.maximum(nearest, search.ordered(similarity", "nearest = tl.maximum(nearest, search.ordered(-similarity"),
            "ties go to the higher token": ("(key.to(tl.int64) << 32) | n, axis=0) & 0xFFFFFFFF", "(key.to(tl.int64) << 32) | (0xFFFFFFFF - n), axis=0) & 0xFFFFFFFF ^ 0xFFFFFFFF"),
            "forbidden ones are chosen": ("nearest = tl.where(allowed == 0, LAST, nearest)", "pass"),
            "forbidden ones never": ("nearest = tl.where(allowed == 0, LAST, nearest)", "nearest = tl.where(allowed == 0, TAKEN, nearest)"),
            "inf is last": ("LAST: tl.constexpr = 2**31 - 2", "LAST: tl.constexpr = 2**31 - 2**23 - 1"),
            "counts ignored": ("count = load_count(counts_ptr, counts_stride_b, b, k)", "count = k"),
            "count of the first image": ("count = load_count(counts_ptr, counts_stride_b, b, k)", "count = load_count(counts_ptr, counts_stride_b, 0, k)"),
            "nothing after the counts": ("left = (n >= count) & (n < k)", "left = n < 0"),
            "zeros over the last choice": ("left = (n >= count) & (n < k)", "left = (n >= count - 1) & (n < k)"),
            "zeros after the row": ("left = (n >= count) & (n < k)", "left = n >= count"),
            "rows of the first image": ("similarity_ptr += b * similarity_stride_b", "pass"),
            "columns for rows": ("row_ptrs + chosen * similarity_stride_m", "similarity_ptr + chosen * similarity_stride_n + n.to(tl.int64) * similarity_stride_m"),
            "column stride ignored": ("n.to(tl.int64) * similarity_stride_n", "n.to(tl.int64)"),
            "offsets of 32 bits": ("offsets = m.to(tl.int64)[:, None]", "offsets = m[:, None]"),
            "allowed of the first image": ("tl.load(allowed_ptr + b * allowed_stride_b + n.to", "tl.load(allowed_ptr + n.to"),
        },
    ),
    *_of(
        "kernels/received.py",
        "ops/test_received",
        {
            "scale dropped": ("num_features**-0.5 if scale is None else float(scale)", "1.0"),
            "given scale ignored": ("if scale is None else float(scale)", "if True else float(scale)"),
            "base of the exponential": ("        scale * _LOG2_E,", "        scale,"),
            "given logarithm of base 2": ("shift_scale, inverse = lse, _LOG2_E, None", "shift_scale, inverse = lse, 1.0, None"),
            "own maximum is natural": ("shift_scale = 1.0  #", "shift_scale = _LOG2_E  #"),
            "sum not inverted": ("inverse_ptr + m, 1 / row_sum", "inverse_ptr + m, row_sum"),
            "not divided by the sum": ("    if inverse_ptr is not None:\n        weights *=", "    if False:\n        weights *="),
            "given logarithm ignored": ("        if lse is None:", "        if True:"),
            "skip ignored": ("num_tokens + skip + c[None, :]", "num_tokens + c[None, :]"),
            "skipped keys leave the mean": ("end = _load_spans(spans_ptr, skip + c, num_tokens)", "end = _load_spans(spans_ptr, skip + c, num_tokens - skip)"),
            "heads summed": ("total / (num_heads * (end - begin)", "total / ((end - begin)"),
            "32 heads alone": ("while start < num_heads:", "while start < BLOCK_H:"),
            "queries summed": ("(num_heads * (end - begin).to(tl.float32))", "num_heads"),
            "a segment's mean over all tokens": ("(end - begin).to(tl.float32)", "num_tokens"),
            "padded keys have weight": ("_add_exponentials(logits, (n < num_tokens)[None, :], row_max, row_sum)", "_add_exponentials(logits, (n >= 0)[None, :], row_max, row_sum)"),
            "padded queries have weight": ("summed += tl.where((m < num_tokens)[:, None], weights", "summed += tl.where((m >= 0)[:, None], weights"),
            "keys of the next segment": ("seen = (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])", "seen = (n[None, :] >= begin[:, None]) & (n[None, :] < num_tokens)"),
            "keys of the segment before": ("seen = (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])", "seen = n[None, :] < end[:, None]"),
            "queries of the next segment": ("seen = (m[:, None] >= begin[None, :]) & (m[:, None] < end[None, :])", "seen = (m[:, None] >= begin[None, :]) & (m < num_tokens)[:, None]"),
            "queries of the segment before": ("seen = (m[:, None] >= begin[None, :]) & (m[:, None] < end[None, :])", "seen = m[:, None] < end[None, :]"),
            "a block's first segment alone": ("last = tl.max(end, axis=0)\n        while start < last:\n            m =", "last = tl.min(tl.where(n < num_tokens, end, num_tokens), axis=0)\n        while start < last:\n            m ="),
            "segments end one later": ("torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True)", "torch.searchsorted(cu_seqlens.contiguous(), tokens, right=False)"),
            "maximum not subtracted": ("tl.sum(tl.exp2(logits - shift[:, None]), axis=1)", "tl.sum(tl.exp2(logits), axis=1)"),
            "sum not rescaled": ("row_sum * tl.exp2(row_max - shift) +", "row_sum +"),
            "infinite maximum subtracted": ('shift = tl.where(highest == float("-inf"), 0.0, highest)', "shift = highest"),
            "last block of queries alone": ("summed += tl.where((m < num_tokens)[:, None]", "summed = tl.where((m < num_tokens)[:, None]"),
            "first block of features alone": ("for block in range(tl.cdiv(NUM_FEATURES, BLOCK_D)):", "for block in range(1):"),
            "key's token stride is the query's": ("n[None, :] * key_stride_n", "n[None, :] * query_stride_n"),
            "no offset is far": (">= 2**31,", ">= 2**63,"),
            "head of the first image": ("start = (head // num_heads).to(tl.int64) * stride_b + (head", "start = (head // num_heads).to(tl.int64) * 0 + (head"),
            "logarithms of another stride": ("offsets = m.to(tl.int64) * stride\n    shift", "offsets = m.to(tl.int64)\n    shift"),
        },
    ),
    *_of(
        "kernels/topk.py",
        "ops/test_topk",
        {
            "float64 narrowed": ("FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32\n    b =", "FLOAT: tl.constexpr = tl.float32\n    b ="),
            "one index short": ("tl.store(indices_ptr + b * k + slot, n, mask=kept)", "tl.store(indices_ptr + b * k + slot, n, mask=kept & (slot < k - 1))"),
            "block offset forgotten": ("        n = block * BLOCK_N + column\n        keys = key", "        n = column\n        keys = key"),
            "token stride ignored": ("offsets = column * scores_stride_n", "offsets = column"),
            "heads summed": ("heads /= NUM_HEADS", "heads *= 1.0"),
            "first layer for all": ("layer * stride_l + h * stride_h", "h * stride_h"),
            "first head for all": ("layer * stride_l + h * stride_h", "layer * stride_l"),
            "mean is a sum": ('combined / NUM_LAYERS if ENSEMBLE == "mean"', 'combined if ENSEMBLE == "mean"'),
            "maximum starts at 0": ('both = tl.maximum(combined, heads, propagate_nan=tl.PropagateNan.ALL)\n            combined = tl.where(layer == 0, heads, both)', 'combined = tl.maximum(combined, heads, propagate_nan=tl.PropagateNan.ALL)'),
            "minimum loses NaN": ("both = tl.minimum(combined, heads, propagate_nan=tl.PropagateNan.ALL)", "both = tl.minimum(combined, heads)"),
            "total not written": ("            tl.store(total_ptr + column * total_stride_n, total, mask=mask)", "            pass"),
            "total's stride ignored": ("tl.store(total_ptr + column * total_stride_n", "tl.store(total_ptr + column"),
        },
    ),
    *_of(
        "kernels/search.py",
        "ops/test_topk",
        {
            "ties go to the higher column": ("seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties", "tl.cumsum(tie, axis=0) > tl.sum(tie, axis=0) - wanted_ties"),
            "ties of earlier blocks forgotten": ("return kept, seen_ties + tl.sum(tie, axis=0)", "return kept, seen_ties"),
            "NaN wins": ('tl.where(value != value, float("-inf"), value)', 'tl.where(value != value, float("inf"), value)'),
            "-0.0 below 0.0": ("value = tl.where(value == 0.0, 0.0, value)", "value = value"),
            "negative values in reverse": ("tl.where(bits < 0, bits ^ -(LOWEST + 1), bits)", "bits"),
            "padding competes": ("tl.where(in_row, tl.where(bits < 0, bits ^ -(LOWEST + 1), bits), LOWEST)", "tl.where(bits < 0, bits ^ -(LOWEST + 1), bits)"),
            "last pass left out": ("for i in range(BITS // 2)", "for i in range(BITS // 2 - 1)"),
            "third candidate forgotten": ("(steps + ((counts >> 42) >= k).to(INT)) * quarter", "steps * quarter"),
            "stride of a stored row ignored": ("row_ptr + n * stride_n", "row_ptr + n"),
        },
    ),
    *_of(
        "kernels/search.py",
        "ops/test_merge_neighbors",
        {
            "neighbors' ties go to the higher column": ("seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties", "tl.cumsum(tie, axis=0) > tl.sum(tie, axis=0) - wanted_ties"),
            "neighbors' ties of earlier blocks forgotten": ("return kept, seen_ties + tl.sum(tie, axis=0)", "return kept, seen_ties"),
            "neighbors' last pass left out": ("for i in range(BITS // 2)", "for i in range(BITS // 2 - 1)"),
            "neighbors' third candidate forgotten": ("(steps + ((counts >> 42) >= k).to(INT)) * quarter", "steps * quarter"),
            "a target is its own neighbor": ("competes = competes & (n != excluded)", "competes = competes"),
        },
    ),
    *_of(
        "kernels/compact.py",
        "ops/test_compact",
        {
            "image 0 for all": ("x_offsets = b * x_strides[t][0]", "x_offsets = 0 * x_strides[t][0]"),
            "token stride of the wrong axis": ("n[:, None] * x_strides[t][1]", "n[:, None] * x_strides[t][2]"),
            "feature stride ignored": ("d[None, :] * x_strides[t][2]", "d[None, :]"),
            "indices' stride ignored": ("num_kept, BLOCK_K)\n    program", "num_kept, BLOCK_K)\n    indices_stride_k = 1\n    program"),
            "last row left out": ("in_kept = k < num_kept\n\n    # loads and store\n    n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)\n    for", "in_kept = k < num_kept - 1\n\n    # loads and store\n    n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)\n    for"),
            "last feature left out": ("(d < num_features[t])", "(d < num_features[t] - 1)"),
            "writes one feature too many": ("(d < num_features[t])", "(d <= num_features[t])"),
            "reads outside": ("read = write & ((n >= 0) & (n < num_tokens))[:, None]\n            x_offsets", "read = write & (n < num_tokens + 1)[:, None]\n            x_offsets"),
            "values, not bytes": ("return x.view(_INTEGER[x.element_size()])", "return x.to(_INTEGER[x.element_size()])"),
            "conjugate bit dropped": ("x = x.resolve_conj().resolve_neg()", "pass"),
            "first tensor for all": ("tl.load(x_ptrs[t] + x_offsets", "tl.load(x_ptrs[0] + x_offsets"),
            "blocks of the first tensor's width": ("triton.cdiv(max(num_features), block_d), len(tensors)", "triton.cdiv(num_features[-1], block_d), len(tensors)"),
        },
    ),
    *_of(
        "kernels/compact_kv.py",
        "ops/test_compact_kv",
        {
            "table of the first tensor alone": ("tl.store(addresses_ptr + t, x_ptrs[t].to(tl.int64))", "tl.store(addresses_ptr + t, x_ptrs[0].to(tl.int64))"),
            "only the first block": ("while start < num_kept:", "while start < tl.minimum(num_kept, 1):"),
            "first tensor for all": ("tl.load(addresses_ptr + t)", "tl.load(addresses_ptr)"),
            "written to the first tensor": ("out_ptr += t * out_stride_t + b", "out_ptr += b"),
            "strides of the first tensor": ("len(set(map(Tensor.stride, tensors))) == 1\n", "True\n"),
            "conjugated views copied as they are": ("first.dtype.is_complex or any(map", "any(map"),
            "negated views copied as they are": ("any(map(Tensor.is_neg, tensors))", "False"),
            "head stride ignored": ("x_ptr += b * x_stride_b + h * x_stride_h", "x_ptr += b * x_stride_b"),
            "images of one index row": ("n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)\n        read", "n = tl.load(indices_ptr + k * indices_stride_k, mask=in_kept, other=-1)\n        read"),
            "one layout for all": ("alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype), [])", "alike.setdefault(tensor.shape[0], [])"),
            "keys and values swapped": ("return kept[: len(keys)], kept[len(keys) :]", "return kept[len(keys) :], kept[: len(keys)]"),
            "out's token stride is the cache's": ("k[:, None] * out_stride_k", "k[:, None] * x_stride_n"),
            "last row left out": ("in_kept = k < num_kept\n        k =", "in_kept = k < num_kept - 1\n        k ="),
            "reads outside": ("read = write & ((n >= 0) & (n < num_tokens))[:, None]\n        x = tl", "read = write\n        x = tl"),
        },
    ),
    *_of(
        "kernels/similarity.py",
        "ops/test_merge_neighbors ops/test_merge_nearest",
        {
            "keys not normalised": ("product / norms", "product"),
            "targets' norms left out": ("tl.maximum(tl.sqrt(target_square), 1e-12)[:, None] * ", ""),
            "last features left out": ("for block in range(tl.cdiv(NUM_FEATURES, BLOCK_C)):", "for block in range(NUM_FEATURES // BLOCK_C):"),
            "padded features unmasked": ("in_key = c < NUM_FEATURES", "in_key = c >= 0"),
            "key's token stride of the wrong axis": ("t[:, None] * left_stride_n", "t[:, None] * left_stride_c"),
            "targets' stride ignored": ("b * targets_stride_b + k.to(tl.int64) * targets_stride_k", "b * targets_stride_b + k"),
            "targets read outside": ("is_target = ((t >= 0) & (t < num_tokens))[:, None]", "is_target = (t < num_tokens + 1)[:, None]"),
            "counts of the first image": ("counts_ptr + b * counts_stride_b", "counts_ptr"),
            "counts ignored": ("    count = num_targets\n    if counts_ptr is not None:", "    count = num_targets\n    if False:"),
            "counts beyond the targets": ("tl.minimum(tl.load(counts_ptr + b * counts_stride_b), num_targets)", "tl.load(counts_ptr + b * counts_stride_b)"),
            "extra token left out of the sums": ("b, num_outputs - 1) + 1", "b, num_outputs - 1)"),
            "last tokens left out of the sum": ("tl.where(first < used, num_tokens, 0)", "tl.where(first < used, num_tokens // BLOCK_N * BLOCK_N, 0)"),
            "tokens of the first image": ("x_ptr += b * x_stride_b", "x_ptr += 0 * x_stride_b"),
            "32-bit step from block to block": ("BLOCK_N * tl.cast(x_stride_n, tl.int64)", "BLOCK_N * x_stride_n"),
            "32-bit offset of an image": ("b = (target_block // target_blocks).to(tl.int64)", "b = target_block // target_blocks"),
            "tokens' feature stride ignored": ("d[None, :] * x_stride_d", "d[None, :]"),
            "sums after the count unmasked": ("mixed = tl.where((r < used)[:, None], mixed, 0.0)", "mixed = mixed + 0.0"),
        },
    ),
    *_of(
        "kernels/similarity.py",
        "ops/test_similarity",
        {
            "x and y exchanged": ("_cosines(x, left=y)", "_cosines(y, left=x)"),
            "32-bit offset of a token": ("t = k.to(tl.int64)", "t = k"),
            "left features' stride is the right ones'": ("c[None, :] * left_stride_c", "c[None, :] * right_stride_c"),
            "left tokens of the first image": ("left_ptr += b * left_stride_b", "left_ptr += 0 * left_stride_b"),
            "temperature multiplies": ("1 / temperature,", "temperature,"),
            "temperature ignored": ("    if temperature is not None:\n        block_n, block_r", "    if False:\n        block_n, block_r"),
            "column's sum not rescaled": ("lane_sum * tl.exp2((lane_max - shift) * LOG2_E) +", "lane_sum +"),
            "lanes summed as they are": ("tl.sum(lane_sum * tl.exp2((lane_max - row_max[None, :]) * LOG2_E), axis=0)", "tl.sum(lane_sum, axis=0)"),
            "padded columns have weight": ('mask=mask, other=float("-inf")) * scale', "mask=mask, other=0.0) * scale"),
            "base of the exponential": ("LOG2_E: tl.constexpr = 1.4426950408889634", "LOG2_E: tl.constexpr = 1.0"),
            "softmax of the first image": ("similarity_ptr + b * num_columns * num_rows", "similarity_ptr + 0 * b"),
        },
    ),
    *_of(
        "kernels/coverage.py",
        "ops/test_coverage",
        {
            "any number of columns": ("if num_columns > tuning.GREEDY_COLUMNS:", "if False:"),
            "ties to the higher column": ("_decode(tl.max(top, axis=0))", "_decode(tl.max(top ^ 0x1FFE, axis=0) ^ 0x1FFE)"),
            "stale bound accepted": ("tl.where(n == best_n, _encode(tl.full(n.shape, _CHOSEN, tl.int32), n, 0), key & -2)", "tl.where(n == best_n, _encode(tl.full(n.shape, _CHOSEN, tl.int32), n, 0), key)"),
            "others evaluated only when stale before": ("stale = (top_bound > 0) & (top_n != best_n)", "stale = top_bound > 0"),
            "what is covered is the last column": ("tl.where(best > covered, best, covered)", "best"),
            "covered is not read": ("mask=r < num_covered, other=0.0)", "mask=r < 0, other=0.0)"),
            "scratch read before it is written": ("num_covered = tl.where(step > 0, num_rows, 0)", "num_covered = num_rows"),
            "a half added twice": ("FIRST + STEP, 2 * STEP", "FIRST, 2 * STEP"),
            "rows beyond 1024 left out": ("        if NUM_BLOCKS > 1:\n            start", "        if NUM_BLOCKS > 9:\n            start"),
            "covered beyond 1024 left out": ("for block in range(NUM_BLOCKS):", "for block in range(1):"),
            "neighbours added": ("tl.reshape(total, [2, total.shape[0] // 2, BLOCK_G]), axis=0)", "tl.reshape(total, [total.shape[0] // 2, 2, BLOCK_G]), axis=1)"),
            "weight outside the bound": ("gain = tl.where((weight > 0) & (gain > 0), weight * gain, 0.0)", "gain = tl.where((weight > 0) & (gain > 0), gain, 0.0)"),
            "inf times 0": ("(weight > 0) & (gain > 0)", "weight > 0"),
            "negative weights count": ("(weight > 0) & (gain > 0)", "weight * gain != 0"),
            "not allowed are chosen": ("bound = tl.where(allowed != 0, bound, _NOT_ALLOWED)", "bound = bound"),
            "not allowed are 0": ("_NOT_ALLOWED = tl.constexpr(-1)", "_NOT_ALLOWED = tl.constexpr(0)"),
            "weights of the first image": ("weight_ptr += b * weight_stride_b", "weight_ptr += 0 * weight_stride_b"),
            "allowed of the first image": ("allowed_ptr += b * allowed_stride_b", "allowed_ptr += 0 * allowed_stride_b"),
            "counts ignored": ("count = load_count(counts_ptr, counts_stride_b, b, k)", "count = k"),
            "unused entries left": ("unused = (column >= count) & (column < k)", "unused = column < 0"),
            "strides taken as they are": ("cover.mT if cover.stride(1) == 1 else cover.mT.contiguous()", "cover.mT"),
            "indices as chosen": ("tl.cumsum(flag, axis=0) - 1", "tl.sum(flag, axis=0) - tl.cumsum(flag, axis=0)"),
            "32-bit offset of the chosen": ("offsets = best_n.to(tl.int64) * cover_stride_n", "offsets = best_n * cover_stride_n.to(tl.int32)"),
        },
    ),
    *_of(
        "vtc/ops/lazy.py",
        "ops/test_coverage",
        {
            "ties to the higher column": ("heapq.heappush(heap, (-gain, n))", "heapq.heappush(heap, (-gain, -n % len(columns)))"),
            "stale bound accepted": ("evaluated[heap[0][1]] < len(chosen)", "evaluated[heap[0][1]] < len(chosen) - 1"),
            "what is covered is the last column": ("torch.maximum(self.covered, self.columns[n])", "self.columns[n]"),
            "inf minus inf": ("if whole.any():", "if False:"),
            "NaN covers": ("columns.nan_to_num(nan=0.0", "columns.nan_to_num(nan=1.0"),
            "the caller's columns changed": ("columns.nan_to_num(nan=0.0, posinf=infinity, neginf=-infinity)", "columns.nan_to_num_(nan=0.0, posinf=infinity, neginf=-infinity)"),
            "another order of the sum": ("        while size > 1:\n            size //= 2\n            upper = self.terms[:, size : 2 * size]", "        for step in range(1, min(size, columns.shape[1])):\n            upper = self.terms[:, step : step + 1]"),
            "rows beyond 1024 left out": ("for start in range(_LANES, columns.shape[1], _LANES):", "for start in ():"),
            "weight outside the bound": ("torch.where((weight > 0) & (gain > 0), weight * gain, 0.0)", "torch.where((weight > 0) & (gain > 0), gain, 0.0)"),
            "inf times 0": ("(weight > 0) & (gain > 0)", "weight > 0"),
            "the last of those not allowed first": ("(chosen + last)[:count]", "(chosen + last[::-1])[:count]"),
        },
    ),
    *_of(
        "kernels/merge_neighbors.py",
        "ops/test_merge_neighbors",
        {
            "one neighbor too few": ("min(neighbors, num_tokens - 1)", "min(neighbors, num_tokens - 1) - 1"),
            "target not kept": ("tl.where(n == t, 1.0, tl.where(member, weight, 0.0))", "tl.where(member, weight, 0.0)"),
            "weight's stride ignored": ("wanted_ties, seen_ties)\n            weight = tl.load(weight_ptr + n * weight_stride_n", "wanted_ties, seen_ties)\n            weight = tl.load(weight_ptr + n"),
            "extra token holds the targets": ("mask=(t >= 0) & (t < num_tokens))", "mask=t < 0)"),
            "extra token in the last place": ("tl.where(k == count, weight, 0.0)", "tl.where(k == num_targets, weight, 0.0)"),
        },
    ),
    *_of(
        "kernels/merge_nearest.py",
        "ops/test_merge_nearest",
        {
            "NaN wins": ('similarity = tl.where(similarity != similarity, float("-inf"), similarity)', 'similarity = tl.where(similarity != similarity, float("inf"), similarity)'),
            "ties to the later target": ("better = (highest > best) | (nearest < 0)", "better = (highest >= best) | (nearest < 0)"),
            "last of the best": ("tl.where((similarity == highest[None, :]) & is_target, k[:, None], num_targets)\n        better = (highest > best) | (nearest < 0)\n        nearest = tl.where(better, tl.min(found, axis=0), nearest)", "tl.where((similarity == highest[None, :]) & is_target, k[:, None], -1)\n        better = (highest > best) | (nearest < 0)\n        nearest = tl.where(better, tl.max(found, axis=0), nearest)"),
            "targets join targets": ("excluded = excluded | (tl.max(", "excluded = excluded | (0 * tl.max("),
            "weight 0 joins": ("mask=in_row, other=0.0) == 0.0", "mask=in_row, other=0.0) == -1.0"),
            "first block of targets alone": ("while start < num_targets:\n        k =", "while start < tl.minimum(num_targets, BLOCK_K):\n        k ="),
            "target not kept": ("tl.where(n == t, 1.0, tl.where(member, share, 0.0))", "tl.where(member, share, 0.0)"),
            "members summed": ("mask=member, other=0.0) / total", "mask=member, other=0.0) / 1.0"),
            "members of the first block divide": ("sums += tl.load(weight_ptr + n * weight_stride_n, mask=member, other=0.0)", "sums += tl.load(weight_ptr + n * weight_stride_n, mask=member & (block == 0), other=0.0)"),
        },
    ),
    *_of(
        "vtc/reference.py",
        "ops/test_cls_attention ops/test_row_scores ops/test_topk ops/test_compact ops/test_compact_kv ops/test_merge_neighbors ops/test_merge_nearest",
        {
            "skipped keys leave the denominator": ("logits.softmax(dim=2).mean(dim=1)[:, skip:]", "logits[:, :, skip:].softmax(dim=2).mean(dim=1)"),
            "half precision softmax": ("(grouped * key.float().unsqueeze(2))", "(grouped * key.float().unsqueeze(2)).to(key.dtype)"),
            "unstable sort": ("scores.sort(dim=1, descending=True, stable=True)", "scores.sort(dim=1, descending=True, stable=False)"),
            "order of scores, not of indices": ("indices[:, :k].sort(dim=1).values", "indices[:, :k]"),
            "NaN not masked": ('scores.masked_fill(scores.isnan(), float("-inf"))', "scores"),
            "compact takes image 0": ("return x[images, indices].contiguous()", "return x[images * 0, indices].contiguous()"),
            "probabilities of the last query": ("query[:, :, :1].float()", "query[:, :, -1:].float()"),
            "unstable neighbors": ("sort(dim=2, descending=True, stable=True)", "sort(dim=2, descending=True, stable=False)"),
            "a target is its own neighbor": ("_similarity(key, targets).masked_fill(itself, -3.0)", "_similarity(key, targets)"),
            "extra token in the last place": ("mix[images, count] =", "mix[:, -1] ="),
            "members summed": ("share / share.sum(dim=2, keepdim=True)", "share"),
        },
    ),
    *_of(
        "vtc/methods/vtc_cls.py",
        "methods/test_methods",
        {"the last layer is scored": ("end = min(end, depth - 1)", "end = min(end, depth)")},
    ),
    *_of(
        "vtc/methods/visionzip.py",
        "methods/test_methods",
        {
            "weights of the default dtype": ("dtype=torch.float32, device=keys.device", "device=keys.device"),
            "[CLS] not kept": ("torch.nn.functional.pad(patches + 1, (1, 0))", "torch.nn.functional.pad(patches, (1, 0))"),
            "targets of the last rows": ("[:, :contextual]", "[:, -contextual:]"),
            "metric of the first head": ("keys.mean(dim=1, dtype=torch.float32)", "keys[:, 0].float()"),
            "dominant rows join": (".scatter(1, kept, 0.0)", ".scatter(1, kept[:, :1], 0.0)"),
        },
    ),
    *_of(
        "vtc/methods/prumerge.py",
        "methods/test_methods",
        {
            "ascending patches": ("kept.gather(1, values.sort(dim=1, descending=True, stable=True).indices)", "kept"),
            "third quartile as the bound": ("third + 1.5 * (third - first)", "third"),
            "quartiles without interpolation": ("below + (above - below) * (position - int(position))", "below"),
            "one count for the batch": ("(_fraction(outliers, num_tokens) * num_tokens).long()", "(_fraction(outliers, num_tokens) * num_tokens).long().amax().expand_as(outliers)"),
            "keys of half the heads": ("key[:, 1:],", "key[:, 1:, : key.shape[2] // 2],"),
            "[CLS] among the scores": ("skip=1, backend=self.backend)", "skip=0, backend=self.backend)[:, :-1]"),
            "stride not divided": ("step = (stride // 3).unsqueeze(1)", "step = stride.unsqueeze(1)"),
            "sample to the very end": ("(n < num_tokens - 1)", "(n < num_tokens)"),
            "sample before the best": ("num_tokens + n, 3 * num_tokens)", "n - num_tokens, 3 * num_tokens)"),
            "one more row not counted": ("None if counts is None else counts + 1", "counts"),
            "waits for the device": ("return targets, _fraction_count(", "return targets[:, : int(scores.shape[1] * (scores.max().item() > -1))], _fraction_count("),
        },
    ),
    *_of(
        "vtc/methods/fastv.py",
        "methods/test_methods",
        {
            "text competes": ("order.gather(1, candidates.gather(1, order)", "order.gather(1, (candidates | True).gather(1, order)"),
            "text is dropped": ("return ~is_image | (rank", "return is_image & (rank"),
        },
    ),
    *_of(
        "vtc/methods/base.py",
        "methods/test_methods",
        {
            "patches of the first image": ("masked_scatter(is_image, kept.flatten())", "masked_scatter(is_image, kept[:1].expand_as(kept).flatten())"),
        },
    ),
    *_of(
        "vtc/methods/pool.py",
        "methods/test_methods",
        {
            "columns before rows": ("unflatten(2, outputs.grid)", "unflatten(2, outputs.grid[::-1])"),
            "sums depend on the batch": ("grid.float().contiguous()", "grid.float()"),
        },
    ),
    *_of(
        "vtc/reference.py",
        "ops/test_maxmin",
        {
            "maxmin: chosen again": ("rest = rest.scatter(1, order[-1], False)\n        row =", "row ="),
            "maxmin: the first distances stay": ("torch.maximum(nearest, row) if number else row", "torch.maximum(nearest, row)"),
            "maxmin: NaN wins": ("similarity = similarity.masked_fill(similarity.isnan(), lowest)", "pass"),
            "maxmin: first from all tokens": ("others = others.masked_fill(~allowed.unsqueeze(2), lowest)", "pass"),
            "maxmin: first from the token itself": ("others = similarity.masked_fill(torch.eye", "others = similarity.masked_fill(0 * torch.eye"),
        },
    ),
    *_of(
        "vtc/reference.py",
        "ops/test_received",
        {
            "received: NaN of another segment": ("probs = probs.masked_fill(~mask, 0.0)", "pass"),
            "received: given logarithm ignored": ("logits.softmax(dim=2) if lse is None else", "logits.softmax(dim=2) if True else"),
            "received: a segment's mean over all tokens": ("share = 1 / mask.sum(dim=1).float()", "pass"),
            "received: shares of the default dtype": ("1 / max(num_tokens, 1), dtype=torch.float32, device", "1 / max(num_tokens, 1), device"),
            "received: segments' shares of the default dtype": ("1 / mask.sum(dim=1).float()", "1 / mask.sum(dim=1)"),
            "received: skipped keys leave the denominator": ("logits = _products(query[:, head].float(), key[:, head].float().mT) * scale", "logits = _products(query[:, head].float(), key[:, head].float().mT) * scale; logits[:, :, :skip] = -1e4"),
        },
    ),
    *_of(
        "vtc/ops/received.py",
        "ops/test_operators",
        {"fake kernel with the skipped keys": ("query.shape[2] - skip), dtype", "query.shape[2]), dtype")},
    ),
    *_of(
        "vtc/ops/greedy.py",
        "ops/test_operators ops/test_common",
        {
            "fake kernel of all tokens": ("size = matrix.shape[0], k", "size = matrix.shape[0], matrix.shape[2]"),
            "counts not checked": ("if low < 1 or high > k:", "if low < 1:"),
        },
    ),
    *_of(
        "vtc/ops/topk.py",
        "ops/test_operators",
        {
            "fake kernel of the wrong type": ("scores.new_empty((scores.shape[scores.ndim > 2], k), dtype=torch.int64)", "scores.new_empty((scores.shape[scores.ndim > 2], k))"),
            "total not declared as changed": ("Tensor(a!)? total", "Tensor? total"),
        },
    ),
    *_of(
        "vtc/ops/compact_kv.py",
        "ops/test_operators",
        {"fake kernel too long": ("*first.shape[:2], count, first.shape[3]", "*first.shape[:2], count + 1, first.shape[3]")},
    ),
    *_of(
        "vtc/ops/compact_kv.py",
        "ops/test_compact_kv ops/test_common",
        {
            "only the first tensor checked": ("checked = tensors[:1] if _are_alike(tensors) else tensors", "checked = tensors[:1]"),
            "one dtype for all": ("return tensor.shape, tensor.stride(), tensor.dtype", "return tensor.shape, tensor.stride()"),
            "groups out of order": ("kept[number] = tensor", "kept[group[0]] = tensor"),
        },
    ),
    *_of(
        "vtc/ops/merge_neighbors.py",
        "ops/test_operators",
        {"fake kernel without the extra token": ("merging.fake(x, targets.shape[1] + 1)", "merging.fake(x, targets.shape[1])")},
    ),
    *_of(
        "vtc/ops/merging.py",
        "ops/test_merge_neighbors",
        {"gradient of other tokens": ("(mix.mT @ grad.float())", "(mix.mT @ grad.float()).flip(1)")},
    ),
    *_of(
        "vtc/ops/merge_nearest.py",
        "ops/test_merge_nearest",
        {"no gradient": ('merging.register_gradient("merge_nearest")', "pass")},
    ),
    *_of(
        "vtc/ops/compact.py",
        "ops/test_compact",
        {"gradients do not add up": ("grad, accumulate=True)", "grad)")},
    ),
    *_of(
        "vtc/ops/cls_attention.py",
        "ops/test_common",
        {"gradient not refused": ("if torch.is_grad_enabled() and (", "if False and (")},
    ),
    *_of(
        "vtc/ops/dispatch.py",
        "ops/test_dispatch",
        {"environment ignored": ('backend == "auto" and (override := os.environ.get("VTC_BACKEND"))', 'False and (override := os.environ.get("VTC_BACKEND"))')},
    ),
    *_of(
        "vtc/ops/checks.py",
        "ops/test_common",
        {"range not checked": ("if low < 0 or high >= end:", "if low < 0:")},
    ),
    *_of(
        "vtc/hf/prompt.py",
        "hf/test_prompt",
        {
            "part of a merged image hidden": ("if own.any() and not own.all():", "if False:"),
            "left-aligned": ("- self.longest + self._ends[:, -1:]", "+ 0 * self._ends[:, -1:]"),
            "positions not closed up": ("shortening.take(given + shift, 0)", "shortening.take(given, 0)"),
            "one position for two tokens": ("- 1 - places\n", "* 0\n"),
            "no place for one token more": ("stays[-1:] += max(count - tokens, 0)", "pass"),
            "samples share their dropped tokens": ("        if packed:\n            starts", "        if False:\n            starts"),
            "packed rows get a mask": ("elif not packed and (original or not shortening.is_even):", "elif original or not shortening.is_even:"),
            "unequal rows get no mask": ("elif not packed and (original or not shortening.is_even):", "elif False:"),
            "the first K of every image": ("if flat is None or flat.is_meta:", "if True:"),
            "text in the middle is padding": ("outside = (real.cumsum(1) == 0) | (real.flip(1).cumsum(1).flip(1) == 0)", "outside = ~real"),
            "a column is that of the next one": ("(self._ends - 1).clamp(min=0)", "self._ends.clamp(max=int(self._ends[:, -1].max()) - 1)"),
            "lengths count the first image's drop": ("lengths[row] -= sum(dropped[:count])", "lengths[row] -= count * (dropped or [0])[0]"),
            "copies of a prompt are not neighbours": ("self.full.repeat_interleave(copies, 0)", "self.full.repeat(copies, 1)"),
            "columns not checked": ("if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != self.input_ids.shape[1]):", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/prompt.py",
        "hf/test_positions",
        {
            "original: places rounded otherwise": ("(2 * numbers + 1) * tokens // (2 * count)", "numbers * tokens // count"),
            "original: the first K": ("if spread and count < tokens:", "if False:"),
            "original: hidden tokens are counted": ("seen = ~self.padding if counted else self.real", "seen = ~self.padding"),
            "original: given positions ignored": ("full = self.full_positions(counted) if position_ids is None else position_ids.expand(self.shape)", "full = self.full_positions(counted)"),
            "original: even rows get no mask": ("elif not packed and (original or not shortening.is_even):", "elif not packed and not shortening.is_even:"),
            "original: positions of padding": ("(seen.cumsum(1) - 1).masked_fill(~seen, 0)", "torch.arange(seen.shape[1]).expand(seen.shape)"),
            "original: the positions are packed": ("        if original:\n            full", "        if False:\n            full"),
        },
    ),
    *_of(
        "vtc/hf/positions.py",
        "hf/test_positions",
        {
            "without a cache gaps are ends": ('if call.get("attention_mask") is None and cache is None:', "if False:"),
            "flash attention forgets the cache": ("if held and is_flash:", "if False:"),
            "flash attention takes queries for keys": ("for end in (new, held + new))", "for end in (new, new))"),
            "copies end as the first row": ("last.to(positions).repeat_interleave(rows // len(last), 0)", "last.to(positions)[:1].expand(rows, 1)"),
            "the last column of every chunk": ("settings.ending.column - held)", "new - 1)"),
            "the last token at the end of the full prompt": ("if settings.ending and", "if False and"),
            "flash attention finds samples itself": ("if is_flash_attention_requested(text):  # it", "if False:  # it"),
            "samples see each other": ("torch.ones_like(positions) if mask is None else mask", "torch.ones_like(positions)"),
            "a long prompt is not mentioned": ("    _log.warning(", "    _log.debug("),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_positions",
        {
            "original: gaps of generate()": ('if is_short and settings.config.positions == "original":', "if False:"),
            "original: samples by gaps": ("        if packed:\n            short |=", "        if False:\n            short |="),
            "original: packed in a further turn": ('{"position_ids": note.positions(mask)} if original else {}', "{}"),
            "original: goes on after the last that stays": ("    if last is not None:  # transformers", "    if False:  # transformers"),
            "original: by hand after the last that stays": ("shortening, settings.config, last)", "shortening, settings.config)"),
            "original: a further turn's end": ("last = None if last is None else note.position - 1", "pass"),
            "original: any prompt is long": ("if ids.shape[1] > (limit :=", "if ids.shape[1] >= (limit :="),
            "original: the method's places": ("for visual, token in tokens.items()}, original)", "for visual, token in tokens.items()}, False)"),
        },
    ),
    *_of(
        "vtc/hf/conversation.py",
        "hf/test_positions",
        {
            "original: a further turn ends packed": ('(mask if new.config.positions == "original" else full_mask)', "full_mask"),
            "original: hidden columns have positions": ("full.masked_fill(self._mask().to(mask.device) == 0, 0)", "full"),
            "original: columns of the cache": (".gather(1, self.columns.to(mask.device))", "[:, -self.short_length :]"),
        },
    ),
    *_of(
        "vtc/config.py",
        "hf/test_positions",
        {
            "positions not checked": ('        check_one_of("positions", self.positions, POSITIONS)\n', ""),
            "positions count inside": ('"positions": "tokens that', '"nothing": "tokens that'),
        },
    ),
    *_of(
        "vtc/hf/lone_image.py",
        "hf/test_lone_image",
        {
            "placeholders in two places": ("if ids[first : first + count].count(token) != count:", "if False:"),
            "more placeholders than the image has": ("ids.count(token) != count or", "ids.count(token) < count or"),
            "a hidden token": (" or seen.count(1) != len(seen)", ""),
            "two rows": ("len(input_ids) != 1 or", ""),
            "ids rounded to the mask's dtype": (" and not mask.is_floating_point()", ""),
            "a traced prompt": (" or torch.compiler.is_compiling()", ""),
            "the caller's mask": ("(ids if mask is None else mask).new_ones((1, length))", "(ids if mask is None else mask)[:, :1].expand(1, length)"),
            "the first K": ("if flat is None or flat.is_meta:", "if True:"),
            "the text after the image begins later": ("ids[:, ids.shape[1] - after :]", "ids[:, ids.shape[1] - after + 1 :]"),
            "positions of another dtype": ("torch.arange(length, device=ids.device)[None]", "torch.arange(length, device=ids.device, dtype=torch.int32)[None]"),
            "given positions ignored": ("shortening is None or position_ids is not None or packed", "shortening is None"),
            "more reads": ("(row,) = (input_ids if mask is None", "input_ids.tolist()\n        (row,) = (input_ids if mask is None"),
            "what stays is made at once": ("shortening = Shortening(stays, length", "shortening = Shortening(stays(), length"),
            "original positions are packed": ("if original:  # without", "if False:  # without"),
            "original columns before the image's own": ("own.indices[0] + self.first", "own.indices[0]"),
            "original columns from what stays": ("if original and isinstance(own, Patches)", "if False and isinstance(own, Patches)"),
            "tokens that are no patches are not spread": ("placed_tokens(tokens, count, original)", "placed_tokens(tokens, count, False)"),
        },
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_settings_cache",
        {
            "True is 1": ("typed=True", "typed=False"),
            "values that change are remembered": ("and all(map(_is_key, others)):", ":"),
            "a name is always the same class": ('METHODS.get(values.get("method", "vtc-cls"))', "None"),
            "settings are checked each time": ("@functools.lru_cache(maxsize=64, typed=True)", "@functools.lru_cache(maxsize=0, typed=True)"),
        },
    ),
    *_of(
        "vtc/hf/patch.py",
        "hf/test_cost",
        {
            "a signature is made for each question": ("    unguarded.__signature__ =", "    unguarded._signature ="),
            "whoever wraps a bound guard sees self": ("    unguarded.__signature__ =", "    guarded.__signature__ ="),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_families hf/test_generate",
        {
            "placeholders are counted on the device": ("if not given or not all(", "if True or not all("),
            "features of another prompt are not counted": ("outputs.is_counted, each = False, outputs", "each = outputs"),
            "the outputs do not name the images": ("        names.note_images(", "        (lambda *_: None)("),
        },
    ),
    *_of(
        "vtc/hf/patch.py",
        "hf/test_settings_cache hf/test_conversation hf/test_versions",
        {
            "images are not looked for": ("if call.get(image) is not None:", "if False:"),
            "a noted cache is stock's": ("if images and not has_note and not has_two_caches:", "if images and not has_two_caches:"),
            "two caches are stock's": ("if images and not has_note and not has_two_caches:", "if images and not has_note:"),
            "a decoding step asks more": ("if images and not has_note and not has_two_caches:", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/conversation.py",
        "hf/test_lone_image hf/test_conversation",
        {
            "columns are counted through": ("if self.kept is not None:", "if False:"),
            "rows keep the columns of all": ("kept=columns[rows.to(columns.device)]", "kept=columns"),
        },
    ),
    *_of(
        "vtc/hf/names.py",
        "hf/test_versions",
        {
            "the new word ignored": ("for word in CACHE_WORDS if call.get(word) is not None", 'for word in CACHE_WORDS[1:] if call.get(word) is not None'),
            "both words accepted": ("if len(given) > 1:", "if False:"),
            "a tuple has no cache": ("if isinstance(outputs, tuple):", "if False:"),
            "an old transformers accepted": ("release[:2] >= Version(OLDEST).release", "release[:2] >= (5, 0)"),
            "a new transformers not mentioned": ("release[:2] > Version(NEWEST).release", "release[:2] > (6, 0)"),
        },
    ),
    *_of(
        "vtc/hf/conversation.py",
        "hf/test_conversation",
        {
            "a reset cache remembered": ("    if not held:\n        delattr", "    if False:\n        delattr"),
            "a note outgrows its cache": ("noted.bits, noted.note = noted.bits[:, :held], noted.note.up_to(held)", "pass"),
            "rows are not looked at": ("    if not unchanged:\n", "    if False:\n"),
            "unknown rows accepted": ("if not matches.any(1).all():", "if False:"),
            "a failed call leaves nothing": ("noted = _Noted(None, None, None)", "noted = None"),
            "an error costs the note": ("        if noted is not None:\n            setattr(cache, NOTE, noted)\n        raise", "        raise"),
            "cropped into an image": ("if (ends != ends[0]).any() or any((cut == placeholder).any() for placeholder in placeholders):", "if False:"),
            "a cropped prompt keeps its length": ("            length=length,\n            kept=self.columns[:, :held]", "            length=self.length,\n            kept=self.columns[:, :held]"),
            "part of a conversation accepted": ("if len(ids) != self.num_rows or not self.length <= held < ids.shape[1]:", "if False:"),
            "another conversation accepted": ("if not torch.equal(ids[:, :known], self.full[:, :known].to(ids.device)):", "if False:"),
            "what was generated is forgotten": ("ids[:, between], new.input_ids", "ids[:, start:start], new.input_ids"),
            "samples have the first one's note": ("        if copies > 1:\n            note", "        if False:\n            note"),
        },
    ),
    *_of(
        "vtc/hf/prune.py",
        "hf/test_prune",
        {
            "a layer too late": ("if number == drop.layer:", "if number == drop.layer + 1:"),
            "the first row's indices for every beam": ("order += [*range(first, first + count)] * copies", "order += [*range(count)] * copies"),
            "early layers stay long": ('if self.config.kept_kv == "compact":\n            self._compact_cache()', "if False:\n            self._compact_cache()"),
        },
    ),
    *_of(
        "vtc/methods/dart.py",
        "methods/test_dart",
        {
            "the most alike are kept": ("unlike = -(unit *", "unlike = (unit *"),
            "cosines by a batched matmul": ("(unit * unit.gather(1, at)).sum(2)", "(unit @ unit.gather(1, at).transpose(1, 2)).squeeze(2)"),
            "hidden tokens are chosen": (".masked_fill(unlike.isnan(), -2.0).masked_fill(~real, float(\"-inf\"))", ".masked_fill(unlike.isnan(), -2.0)"),
            "hidden tokens are pivots": ("norms = norms.masked_fill(~real, float(\"-inf\"))", "pass"),
            "NaN is chosen first": ("unlike.masked_fill(unlike.isnan(), -2.0)", "unlike"),
            "NaN is a pivot": ("norms = norms.masked_fill(norms.isnan() | unit.isnan().any(2), -1.0)", "pass"),
            "NaN states are pivots": ("norms.isnan() | unit.isnan().any(2)", "norms.isnan()"),
            "scores of the default dtype": ("place.float() / keep", "place / keep"),
            "a pivot takes all": ("torch.minimum(quota, keep - count)", "(keep - count)"),
            "the Euclidean norm": (".float().abs().sum((1, 3))", ".float().square().sum((1, 3))"),
            "text pivots without padding's mask": ("follows = real & ~is_image &", "follows = ~is_image &"),
            "text before the image": (" & (is_image.flip(1).cumsum(1).flip(1) == 0)", ""),
            "the keys are compared": ("normalize(hidden.detach().float(), dim=-1)", "normalize(keys.detach().float().transpose(1, 2).flatten(2), dim=-1)"),
            "the quota rounds down": ("(left + exist.sum(0).clamp(min=1) - 1) //", "left //"),
        },
    ),
    *_of(
        "vtc/hf/prune.py",
        "hf/test_prune",
        {
            "padding may be a pivot": ("(states, is_image, self.real, keep)", "(states, is_image, torch.ones_like(self.real), keep)"),
            "states without the norm": ("states = self.norm(on_device_of(self.norm, hidden))", "states = hidden"),
        },
    ),
    *_of(
        "vtc/hf/prune_layers.py",
        "hf/test_prune",
        {"the first token's query": ("last = hidden.shape[1] - 1 - self.real", "last = 0 * self.real")},
    ),
    *_of(
        "vtc/hf/prune_mask.py",
        "hf/test_prune",
        {
            "the mask a layer too late": ("if number >= self.layer:", "if number > self.layer:"),
            "padding is selected": ("stays & self.real.to(device), cache", "stays, cache"),
        },
    ),
    *_of(
        "vtc/hf/prune_decode.py",
        "hf/test_prune",
        {
            "selected once": ("note.is_image is None or note.keep is None", "True"),
            "positions of the short prompt": ("note.position.to(tokens.device) + seen", "0 * note.position.to(tokens.device) + last.kept + seen"),
        },
    ),
    *_of(
        "vtc/hf/prune.py",
        "hf/test_schedule",
        {
            "a later stage keeps the columns of the full prompt": ("else shortening.columns.gather(1, columns)", "else columns"),
            "a later stage looks for the tokens of the full prompt": ("self.is_image = shortening.take(self.is_image.to(hidden.device), False)", "pass"),
            "new tokens go on at the later stage's position": ("if self.position is None:", "if True:"),
            "a later stage forgets the padding": ("self.padding = ~shortening.filled.expand(batch, -1)", "self.padding = self.padding[:, : drop.longest]"),
            "all layers count as short": ("held[sum(start <= number for start in starts)]", "held[-1]"),
            "stages of a full cache count as compact": ('return kept[-1:] * num_layers', "return kept[:1] * num_layers"),
            "outputs are spread in the wrong order": ("in reversed(pruning.done):", "in pruning.done:"),
        },
    ),
    *_of(
        "vtc/hf/views.py",
        "hf/test_methods_model",
        {"K = N of tiles is reduced view by view": ("each = self.plan.method.per_view and not self._keeps_all", "each = self.plan.method.per_view")},
    ),
    *_of(
        "vtc/tiles.py",
        "hf/test_methods_model",
        {
            "K = N of tiles has no newlines": ("if not method.per_view or (kept == tokens and is_whole(plan)):", "if not method.per_view:"),
            "K = N of one image beside another has no newlines": ("layout = (tiling.layout if _stays(plan, tiling, kept) else", "layout = (tiling.layout.abs() if _stays(plan, tiling, kept) else"),
            "K = N of tiles for methods that merge": ("return method.keeps_patches() or (resizes and", "return True or (resizes and"),
            "a view without tokens": ("    if not outputs:\n", "    if False:\n"),
            "the smallest keep is that of one view": ("keep=\"\n            f\"{views * least} or", "keep=\"\n            f\"{least} or"),
        },
    ),
    *_of(
        "vtc/hf/views.py",
        "hf/test_families",
        {
            "the last image counts for all": ("round(sum(each) / len(self.counts)) for each", "each[-1] for each"),
            "several images count as one": ("self.plan, used, len(self.counts), before, after)", "self.plan, used, 1, before, after)"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_prune",
        {"masked tokens count as removed": ("layers if plan.config.reselects else plan.config.prune_after", "plan.config.prune_after")},
    ),
    *_of(
        "vtc/hf/views.py",
        "hf/test_schedule",
        {"later stages rank anew": ("            scores = scores.gather(1, indices)\n", "")},
    ),
    *_of(
        "vtc/hf/prune_decode.py",
        "hf/test_schedule",
        {
            "the first stage's mask for all": ("if stage := self.stages.get(number):", "if (stage := self.stages.get(number)) and self.mask is None:"),
            "the caller's positions": ("if positions is None or note.short is not None:", "if positions is None:"),
            "the caller's columns in the first layers": ("else note.length != note.entered:", "else False:"),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_masks",
        {"packed samples are pruned inside": ("if images and settings.config.prunes_inside and _is_packed(settings, call):", "if False:")},
    ),
    *_of(
        "vtc/hf/prune_limits.py",
        "hf/test_masks",
        {"any positions are packed samples": ("if (positions.diff(dim=1) != 1).any():", "if True:")},
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_schedule",
        {
            "a further turn in the caller's columns": ("length=pruned.entered, short=None", "short=None"),
            "gaps before a later stage are samples": ('if is_short and settings.config.positions == "original":', 'if is_short and settings.config.positions == "original" and not settings.config.prunes_inside:'),
            "by hand after the last that enters": ("short=note, position=note.position)", "short=note)"),
            "by hand after generate() after the last that enters": (', "position": short.position}', "}"),
            "by hand after all of an image padding is not counted": ("if in_forward and shortening is None and given is None:", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/conversation.py",
        "hf/test_schedule",
        {"stages stay when rows move": ("each._replace(valid=each.valid[rows.to(each.valid.device)])", "each")},
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_schedule",
        {"floats that equal integers": ("else type(each) is int for each in value)", "else True for each in value)")},
    ),
    *_of(
        "vtc/config.py",
        "test_config",
        {
            "a layer too many": ("total += (end - start) * tokens", "total += (end - start + 1) * tokens"),
            "layers in any order": ("layers[0] < 0 or list(layers) != sorted(set(layers))", "layers[0] < 0"),
            "tokens in any order": ("counts[-1] < 1 or list(counts) != sorted(set(counts), reverse=True)", "counts[-1] < 1"),
            "a schedule beside keep": ("        if beside:\n", "        if False:\n"),
            "a new schedule keeps the old budget": ("shared = dict.fromkeys(IN_SCHEDULE) | shared", "pass"),
            "a layer alone replaces a schedule": ('if self.schedule is not None and "schedule" not in shared', "if False"),
            "a new budget keeps the old schedule": ('shared["schedule"] = None', "pass"),
            "any method in stages": ("if len(self.schedule or ()) > 1 and not", "if False and not"),
        },
    ),
    *_of(
        "vtc/methods/checks.py",
        "test_config",
        {
            "numbers stay NumPy's": ("else value.item()", "else value"),
            "a meta tensor is read": ('return value if getattr(value, "is_meta", False) else value.item()', "return value.item()"),
            "any seed": ("least <= value <= most", "least <= value"),
        },
    ),
    *_of(
        "vtc/config.py",
        "test_config",
        {
            "options stay NumPy's": ("{name: plain(value) for name, value in self.options.items()}", "dict(self.options)"),
            "128 of any image": ("(DEFAULT_KEEP, None) if num_tokens > DEFAULT_KEEP else", "(DEFAULT_KEEP, None) if True else"),
            "the default keep of few tokens is silent": ("if ratio and config.compresses and", "if False and"),
        },
    ),
    *_of(
        "vtc/api.py",
        "test_api",
        {
            "configure is silent": ("    if not settings.is_on(base):\n        _log", "    if False:\n        _log"),
            "a mapping without pixels is not named": ("if isinstance(inputs, Mapping) and name not in inputs:", "if False:"),
        },
    ),
    *_of(
        "vtc/eval/tasks/scenes.py",
        "eval/test_scenes_task",
        {
            "a wrong answer is right": ("text == self.asked[line][1].answer", "text != self.asked[line][1].answer"),
            "one family for all": ("found[self.asked[line][1].family].append(ok)", "found[FAMILIES[0]].append(ok)"),
        },
    ),
    *_of(
        "vtc/eval/ask.py",
        "cli/test_cli_errors",
        {"any model is run": ('!= "llava":', '== "":')},
    ),
    *_of(
        "vtc/eval/ask.py",
        "cli/test_cli_run",
        {
            "as many threads as torch takes": ("min(torch.get_num_threads(), cores)", "torch.get_num_threads()"),
            "a prompt of any length": ("if length > positions:", "if False:"),
            "a prompt of one token less": ("if length > positions:", "if length >= positions:"),
            "always several": ("{'' if count == 1 else 's'}", "s"),
        },
    ),
    *_of(
        "vtc/cli/errors.py",
        "cli/test_cli_errors",
        {
            "a path that is no good is not the user's": ("2 if error.errno in INPUT_ERRORS else 1", "1"),
            "debug without a traceback": ("            if debug:", "            if False:"),
            "no traceback in the log": ("        if record.exc_info:", "        if False:"),
            "warnings in the words of the API": ("{in_words_of_the_command(_line(record.getMessage()))}", "{_line(record.getMessage())}"),
        },
    ),
    *_of(
        "vtc/cli/run.py",
        "cli/test_cli_errors",
        {
            "the photograph is overwritten": ("files[kind] = image_file(name, inputs)", "files[kind] = image_file(name)"),
            "no answer without the picture": ("    if not request.as_json:\n        _print(request, result)\n    try:", "    try:"),
            "the picture is written in its place": ("with replacing(file) as temporary:\n            sheet.save(temporary)", "file.write_text('')\n        sheet.save(file)"),
        },
    ),
    *_of(
        "vtc/eval/measure.py",
        "eval/test_measure",
        {"the quietest is named": ("max(times, key", "min(times, key"), "times without their range": ("max(self.seconds) / max(", "1 / max(")},
    ),
    *_of(
        "vtc/eval/protocol.py",
        "cli/test_cli_run",
        {"the template's first token is doubled": ("first is None or not texts[0].startswith(first)", "True")},
    ),
    *_of(
        "vtc/hf/families.py",
        "test_api",
        {"an id is searched for modules": ('if isinstance(model, type) or not callable(getattr(model, "modules", None)):', "if False:")},
    ),
    *_of(
        "vtc/hf/tiles.py",
        "hf/test_arguments",
        {
            "image_sizes is a tensor": ("sizes = torch.stack([torch.as_tensor(size, device=\"cpu\") for size in each])", "sizes = each.clone()"),
            "sizes of any shape": ("sizes.ndim != 2 or sizes.shape[1] != 2 or not (sizes > 0).all()", "False"),
        },
    ),
    *_of(
        "vtc/methods/base.py",
        "hf/test_methods_model",
        {"scores of the first views": ("part(self.cls_probs, True)", "None if self.cls_probs is None else self.cls_probs[:, : len(self.hidden[views])]")},
    ),
    *_of(
        "vtc/config.py",
        "hf/test_methods_model",
        {"views of more tokens than there are": ("min(kept_count(config, num_tokens) // views, view_tokens)", "kept_count(config, num_tokens) // views")},
    ),
    *_of(
        "vtc/hf/views.py",
        "hf/test_arguments",
        {
            "positions are not interpolated": ("{name: call[name] for name in TOWER_ARGUMENTS if call.get(name) is not None}", "{}"),
            "sizes are left to the tower": ("if option in inspect.signature(base.vision_tower.forward).parameters:", "if False:"),
            "larger tiles accepted": ("if plan.grid != patch_grid(vision):", "if False:"),
            "frames of any shape": ("if rows != columns:", "if False:"),
            "no image is an image": ("if 0 in pixels.shape:", "if False:"),
            "channels anywhere": ("or pixels.shape[-3] != channels:", "or False:"),
            "a video's features are a list": ('(self.settings.family.stacked or self.layout == "frames")', "self.settings.family.stacked"),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_conversation",
        {
            "a new image is pruned inside": ("if (past and not inside) or settings.ending:", "if settings.ending:"),
            "a note of the caller's tensors": ("if shortening is None:\n        short =", "if False:\n        short ="),
            "a note of the caller's full prompt": ("if in_forward:\n        full =", "if False:\n        full ="),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_conversation",
        {
            "new images with other settings": ("return settings._replace(config=note.config)", "return settings"),
            "the change of settings is silent": ("if images and is_on(settings.base) and began != now:", "if False:"),
            "an uncompressed image accepted": ("if any((ids == placeholder).any() for placeholder in placeholders):", "if False:"),
            "beams go on": ("None if has_beams else", "None if False else"),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_forward_columns",
        {
            "short columns": ("        shortening.spread_outputs(outputs)\n", "        pass\n"),
            "padding predicts a label": ("labels.masked_fill((mask != 0) & (mask.cumsum(1) == 1), -100)", "labels"),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_generate",
        {
            "the model's own generation config is left out": ('for config in (call.get("generation_config"), model.generation_config):', 'for config in (call.get("generation_config") or model.generation_config,):'),
            "images of others accepted": ("if not is_own and (note or settings.config.compresses):", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_prune",
        {"a pruned search goes on": ("if has_beams and used is not None:", "if False:")},
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_training",
        {"labels of every call": ("(_with_alone_labels(call) if shortens else call)", "_with_alone_labels(call)")},
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_masks",
        {"a cache hides the samples": ("return is_unmasked and call.get(\"cache\") is None and not makes_cache", "return False")},
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_arguments",
        {"max_length of the short prompt": ("if limit and limit <= full.shape[1] and", "if False and")},
    ),
    *_of(
        "vtc/plan.py",
        "hf/test_arguments",
        {"the layer is Python's": ("given = plain(own if given is None else given)", "given = own if given is None else given")},
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_blocks",
        {
            "a block for every model": ("if block.opening.base is base:", "if block.opening.base is not None:"),
            "a closed block still holds": ("        opening.base = None\n", ""),
            "the outermost block counts": ("for block in reversed(CONTEXT.blocks)", "for block in CONTEXT.blocks"),
            "a call loses its block": ("own = block._replace(opening=Opening(base))", "own = block"),
            "a replica is not compressed": ('if getattr(base, "_is_replica", False):', "if False:"),
            "no warning outside": ("if opening.model() is not base or base in _WARNED:", "if True:"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_towers",
        {
            "hooks act on every pass": ("if _PASS.get() is not scores:", "if False:"),
            "a compiled tower accepted": ("if any(module._compiled_call_impl is not None or", "if False and any(module._compiled_call_impl is not None or"),
        },
    ),
    *_of(
        "vtc/hf/compatibility.py",
        "hf/test_towers",
        {
            "bypassed methods accepted": ("        require_stock_methods(base, family)\n", ""),
        },
    ),
    *_of(
        "vtc/plan.py",
        "hf/test_towers",
        {
            "sizes of another tower": ("model_config.vision_config if vision is None else vision", "model_config.vision_config"),
        },
    ),
    *_of(
        "vtc/tiles.py",
        "hf/test_families hf/test_encode",
        {
            "shares not proportional": ('if how == "mass":', "if False:"),
        },
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_stateful",
        {
            "a block leaks into another thread": ('_BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("vtc_blocks")', '_BLOCKS: Any = type("Shared", (), {"now": (), "get": lambda self, *_: self.now, "set": lambda self, now: setattr(self, "now", now)})()'),
        },
    ),
    *_of(
        "vtc/hf/conversation.py",
        "hf/test_stateful",
        {
            "reordered rows ignored": ("    if not unchanged:\n        rows = _rows_of", "    if False:\n        rows = _rows_of"),
            "padding moves positions": ("real = mask[:, self.length :].to(tokens.device).cumsum(1)[:, -new:]", "real = torch.ones_like(mask[:, self.length :]).cumsum(1)[:, -new:]"),
        },
    ),
    *_of(
        "vtc/hf/prompt.py",
        "hf/test_stateful",
        {"columns spread by one too few": ("places = (self._ends - 1)", "places = (self._ends - 2)")},
    ),
    *_of(
        "vtc/hf/generate.py",
        "hf/test_stateful",
        {
            "a forgotten image accepted": ("if found > 1:", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/prune_decode.py",
        "hf/test_stateful",
        {"a cropped prompt accepted": ("if not static and seen < 0:", "if False:")},
    ),
    *_of(
        "vtc/eval/join.py",
        "eval/test_gqa eval/test_textvqa",
        {
            "questions without an answer accepted": ("    if without:\n", "    if False:\n"),
            "cut question files accepted": ("if len(gold) > len(asked):", "if False:"),
            "repeated ids accepted": ("if count > 1]", "if count > 2]"),
            "prompts without their last line accepted": ('if not entry["text"].endswith("\\n" + SHORT_ANSWER):', "if False:"),
            "types not checked": ("if type(entry[field]) is not expected:", "if False:"),
            "official count noted": ("() if count == official else", "() if False else"),
        },
    ),
    *_of(
        "vtc/eval/tasks/gqa.py",
        "eval/test_gqa",
        {
            "one dot removed": ('.rstrip(".")', '.removesuffix(".")'),
            "case kept": ('.rstrip(".").lower()', '.rstrip(".")'),
            "open and binary swapped": ('"open" if structural == "query" else "binary"', '"binary" if structural == "query" else "open"'),
            "unbalanced questions accepted": ('if entry["isBalanced"] is not True:', "if False:"),
            "predictions not normalised": ('"prediction": normalised(answers[question.line])', '"prediction": answers[question.line]'),
        },
    ),
    *_of(
        "vtc/eval/tasks/sqa.py",
        "eval/test_sqa",
        {
            "a dot is enough": ('text[1:3] == ". "', 'text[1:2] == "."'),
            "the first of two named letters": ("named[0] if len(named) == 1 else None", "named[0] if named else None"),
            "no character after the named letter": ("([A-Z]).", "([A-Z])"),
            "two letters are one": ("if len(text) == 1 and text in LETTERS:", "if text in LETTERS:"),
            "image and text swapped": ("names[2 if question.image is None else 1]", "names[1 if question.image is None else 2]"),
            "prompt without the image token": ('line | {"prompt": IMAGE + question.text}', "line"),
            "other forms accepted": ("if not (choices and known):", "if False:"),
            "other answers accepted": ('if LETTERS.index(told) != problem["answer"]:', "if False:"),
        },
    ),
    *_of(
        "vtc/eval/tasks/textvqa.py",
        "eval/test_textvqa",
        {
            "commas kept": ('.replace(",", "")', ""),
            "possessives joined": ('.replace("\'s", " \'s")', ""),
            "signs always deleted": ('if f"{sign} " in text or f" {sign}" in text else " "', 'if True else " "'),
            "signs always become spaces": ('if f"{sign} " in text or f" {sign}" in text else " "', 'if False else " "'),
            "dots before digits deleted": (r"\.(?!\d)", r"\."),
            "all dots deleted": (", count=32)", ")"),
            "articles kept": ("if word not in ARTICLES)", "if True)"),
            "none is a word": ('{"none": "0"} | {word', "{word"),
            "only the first apostrophe missing": ("for place in (0, 1)}", "for place in (0,)}"),
            "three of ten are enough": ("min(10, 3 * agreeing)", "min(10, 4 * agreeing)"),
            "answers by image": ('self.gold = [people[key] for key in wanted]', 'self.gold = [{key[0]: of for key, of in people.items()}[key[0]] for key in wanted]'),
            "nine answers accepted": ('if len(entry["answers"]) != PEOPLE:', "if False:"),
        },
    ),
    *_of(
        "vtc/eval/tasks/pope.py",
        "eval/test_pope",
        {
            "all sentences read": ('text.split(".")[0].replace', "text.replace"),
            "split at any space": ('.split(" ")', ".split()"),
            "commas part words": ('.replace(",", "").split', '.replace(",", " ").split'),
            "capital not says no": ('{"No", "no", "not"}', '{"No", "no", "not", "Not"}'),
            "labels by position": ("zip(ids, questions, strict=True)", "zip(gold, questions, strict=True)"),
            "other questions accepted": ("if not same or question.image", "if question.image"),
            "other images accepted": ('if not same or question.image != ImageFile(self.found["images"] / str(entry["image"])):', "if not same:"),
            "precision is recall": ('"precision": (both, said)', '"precision": (both, true)'),
            "mean of two splits": ("if len(f1) == len(SPLITS) else None", "if f1 else None"),
            "splits in another order": ('{"adversarial": 3000, "random": 2910, "popular": 3000}', '{"adversarial": 3000, "popular": 3000, "random": 2910}'),
        },
    ),
    *_of(
        "vtc/eval/tasks/mmbench.py",
        "eval/test_mmbench",
        {
            "only what is empty is missing": ('return text in MISSING or text.lower() in ("nan", "none")', 'return text == ""'),
            "options after a missing one": ("            break\n", "            continue\n"),
            "hint after the question": ('"\\n".join([*lines, row["question"], *options])', '"\\n".join([row["question"], *lines, *options])'),
            "no last line": ('f"{self._asked(line)}\\n{self.last_line}"', "self._asked(line)"),
            "passes apart": ("unit=index % ROUND", "unit=index"),
            "one right pass is enough": ("circular = {lines[0]: all(", "circular = {lines[0]: any("),
            "a question counts without a pass": ("if all(line in answers for line in lines)]", "if lines[0] in answers]"),
            "several letters are a letter": ("list(LETTERS[: len(self.options[line])])", "LETTERS[: len(self.options[line])]"),
            "letter beyond the options": ("list(LETTERS[: len(self.options[line])])", "list(LETTERS)"),
            "a reference to a reference": ("if len(image) <= REFERENCE:\n                    raise", "if not image:\n                    raise"),
            "missing passes accepted": ("if rounds != list(range(len(rounds))) or len(rounds) < fewest:", "if False:"),
            "fixed questions refused": ("3 if options == len(LETTERS) else options", "options"),
            "answer that is no option accepted": (' or not row[row["answer"]]:', ":"),
            "formulas": ('cell.data_type = "s"', "pass"),
            "control characters kept": ('NOT_IN_XML.sub("", value)', "value"),
            "an answer None is a missing one": ("table.append([cells.get(column) for column in UPLOADED])", "table.append([None if cells.get(column) in MISSING else cells.get(column) for column in UPLOADED])"),
            "prompt with the last line": ('"prompt": self._asked(question.line)', '"prompt": question.text'),
        },
    ),
    *_of(
        "vtc/eval/tasks/seed.py",
        "eval/test_seed",
        {
            "videos asked": ('if not str(entry["image"]).startswith(FOLDER):', "if False:"),
            "doubled id reversed": ("entries.pop(0)", "entries.pop()"),
            "surplus answers accepted": ("if left := sum(map(len, gold.values())):", "if left := 0:"),
            "first character is enough": ('last[str(entry["question_id"])] == entry["answer"]', 'last[str(entry["question_id"])][:1] == entry["answer"]'),
            "a doubled id is scored apart": ("for line in sorted(answers)}", "for line in sorted(answers, reverse=True)}"),
            "over all questions": ("len(answers))}", "len(self.gold))}"),
        },
    ),
    *_of(
        "vtc/eval/tasks/mmvet.py",
        "eval/test_mmvet",
        {
            "doubled ids accepted": (" or identifier in seen:", ":"),
            "judge's ids without their prefix": ('f"v1_{question.id}"', 'f"{question.id}"'),
            "characters not escaped": ("json.dumps(content, indent=2)", "json.dumps(content, indent=2, ensure_ascii=False)"),
            "whole model path": ("{Path(model).name or self.name}", "{model or self.name}"),
        },
    ),
    *_of(
        "vtc/eval/files.py",
        "eval/test_files",
        {
            "field limit stays raised": ("        csv.field_size_limit(before)", "        pass"),
            "csv's own field limit": ("csv.field_size_limit(sys.maxsize)", "csv.field_size_limit()"),
            "cut rows accepted": ("if None in row or None in row.values():", "if False:"),
            "a cell cut in its quotes accepted": (", strict=True)\n        try:", ")\n        try:"),
            "last place first": ("for path in self.paths:\n", "for path in reversed(self.paths):\n"),
            "line numbers from 0": ("enumerate(file, start=1)", "enumerate(file)"),
        },
    ),
    *_of(
        "vtc/eval/question.py",
        "eval/test_files",
        {
            "base64 with other characters": ("validate=True", "validate=False"),
            "image not decoded when opened": ("            image.load()\n", ""),
            "images converted": ("            return image\n", '            return image.convert("RGB")\n'),
        },
    ),
    *_of(
        "vtc/eval/rows.py",
        "eval/test_report",
        {
            "a partial run unmarked": ("if not result.complete:", "if False:"),
            "a sample unmarked": ("if result.limit is not None:", "if False:"),
            "skipped questions unmarked": ("if result.skipped:", "if False:"),
            "conditions mixed in a row": (", *conditions(result).items())", ")"),
            "a second result hidden": ("== identity(r) and r.task not in row.results", "== identity(r)"),
        },
    ),
    *_of(
        "vtc/eval/tables.py",
        "eval/test_report",
        {
            "average of the tasks there are": ("or len(values) < len(tasks)", "or not values"),
            "average unmarked": (' + marks([note for task in tasks for note in caveats(row.results[task])])', ""),
            "another figure in the column": ("if p.same and p.source == source", "if p.source == source"),
            "published average of fewer tasks": ("average is None or len(tasks) < len(COLUMNS)", "average is None"),
        },
    ),
    *_of(
        "vtc/eval/times.py",
        "eval/test_report",
        {
            "compared with incomplete runs": ("r.complete and result.complete and", "result.complete and"),
            "compared across devices": ("r.limit, time_conditions(r))", "r.limit)"),
            "ratio upside down": ("{baseline / seconds:.2f}", "{seconds / baseline:.2f}"),
            "one of the processes counted": ("timing.whole_seconds * timing.processes / timing.answers", "timing.whole_seconds / timing.answers"),
        },
    ),
    *_of(
        "vtc/eval/published.py",
        "eval/test_report",
        {
            "another LLaVA has published figures": (r"llava-v?1\.5-(7b|13b)", r"llava.*?(7b|13b)"),
            "other sizes have them": ("== (task, method, keep, size)]", "[:3] == (task, method, keep)]"),
        },
    ),
    *_of(
        "vtc/eval/report.py",
        "eval/test_report",
        {"published beside every figure": ("best if name == result.main_name else None", "best")},
    ),
    *_of(
        "vtc/eval/plots.py",
        "eval/test_report",
        {
            "incomplete points unmarked": ("if incomplete(p.result) and x(p)", "if False"),
            "other figures as published": ("== (r.task, size, True)", "[:2] == (r.task, size)"),
        },
    ),
    *_of(
        "vtc/eval/answerer.py",
        "eval/test_likelihoods",
        {
            "mean of the log-probabilities": ("log_probs.sum().item()", "log_probs.mean().item()"),
            "one greedy token is enough": ("== target).all())", "== target).any())"),
            "the first continuation for all": ("[continuations[row][min(len(ids) - prompt_length, len(continuations[row]) - 1)]", "[continuations[0][min(len(ids) - prompt_length, len(continuations[0]) - 1)]"),
        },
    ),
    *_of(
        "vtc/eval/protocol.py",
        "eval/test_likelihoods",
        {
            "a continuation tokenised alone": ("return both[len(before) :] if both[: len(before)] == before else self._tokens(text)", "return self._tokens(text)"),
            "a continuation that merges is cut": ("if both[: len(before)] == before else self._tokens(text)", "if True else []"),
            "the number of placed images unchecked": ("if len(texts) != len(prompt.images) + 1:", "if False:"),
            "placed images come first": ('texts = prompt.text.split(self.processor.image_token)', 'texts = [*("" for _ in prompt.images), prompt.text.replace(self.processor.image_token, "")]'),
        },
    ),
    *_of(
        "vtc/eval/journal.py",
        "eval/test_journal",
        {
            "cut line kept": ("if whole < len(content):", "if False:"),
            "conflict accepted": ("elif before.text != answer.text and not answer.skipped:", "elif False:"),
            "a full disk leaves a cut line": ("self._file.truncate(size)", "pass"),
            "an orphan writes along": ("if self.writer == 0:", "if False:"),
            "two runs begin at once": ('with FileLock(self.folder / "run.lock"):', "with contextlib.nullcontext():"),
            "an answer given again": ("if not self.is_done(a.line) and self", "if self"),
            "lines of another run": ("if (task, digest) != (self.task, self.digest):", "if task != self.task:"),
        },
    ),
    *_of(
        "vtc/eval/local.py",
        "eval/test_local",
        {
            "smaller batches for ever": ("self.largest = None  # another", "pass  # another"),
            "half of a batch lost": ("for i in range(0, size, self.largest)]", "for i in range(0, size - 1, self.largest)]"),
        },
    ),
    *_of("vtc/eval/progress.py", "eval/test_progress", {"a line an answer": (">= INTERVAL", ">= 0")}),
    *_of("vtc/eval/processes.py", "eval/test_distributed", {"no group on a CPU": ("PartialState(cpu=True, ", "PartialState(")}),
    *_of(
        "vtc/ui/compare.py",
        "ui/test_ui_compare",
        {
            "a choice out of range": ("low <= value <= high and", ""),
            "the method's own number": ("if ignores_keep(choice.method, {}):", "if False:"),
            "the folder of an upload is told": ("str(error).replace(str(path), Path(path).name)", "str(error)"),
            "questions of any length": ("len(question) > MAX_QUESTION", "False"),
            "the image that was given is drawn on as it is": ("replace(column, image=vtc.overlay(seen, selection), ", "replace(column, "),
        },
    ),
    *_of(
        "vtc/ui/server.py",
        "ui/test_ui_server",
        {
            "any name": ("if self.local and not is_local(", "if False and not is_local("),
            "any route": ("if not NEEDED.fullmatch(scope[\"path\"])", "if not NEEDED.match(scope[\"path\"])"),
            "URLs are fetched": ("if _has_url(body) else None", "if False else None"),
            "uploads of any size": ("if int(length) > (MAX_UPLOAD", "if int(length) > 99 * (MAX_UPLOAD"),
            "ports in use": ("trial.bind(address)", "pass"),
        },
    ),
    *_of(
        "vtc/ui/cards.py",
        "ui/test_ui_cards",
        {
            "answers are HTML": ("answer = escape(column.answer)", "answer = column.answer"),
            "any difference is a gain": ("if low <= max(full.seconds) and min(full.seconds) <= high:", "if False:"),
        },
    ),
    *_of("vtc/ui/compare.py", "ui/test_ui_process", {"times after the end": ("                self._check()\n                costs", "                costs")}),
    *_of("vtc/ui/compare.py", "ui/test_ui_compare", {"any file of the machine is opened": (".is_relative_to(folder.resolve())", ".exists()")}),
    *_of("vtc/ui/server.py", "ui/test_ui_server", {"any page may ask": ("and not self._is_own(origin, headers)", "and False")}),
    *_of("vtc/ui/server.py", "ui/test_ui_process", {"any signal cuts off the end": ("if len(came) == 1:", "if came:")}),
    *_of("vtc/ui/examples.py", "ui/test_ui_compare", {"what is not known is wrong": ("None if right is None else", "False if right is None else")}),
    *_of(
        "vtc/eval/ray_engine.py",
        "eval/test_ray",
        {
            "answers at the end only": ("override_num_blocks=len(batches)", "override_num_blocks=1"),
            "an actor waits for ever": ("if there < self.models:", "if False:"),
        },
    ),
    *_of(
        "vtc/eval/checkpoint.py",
        "eval/test_loading",
        {
            "missing weights accepted": ('set(info.get("missing_keys", ()))', "set()"),
            "unexpected weights accepted": ('set(info.get("unexpected_keys", ()))', "set()"),
            "weights of another shape accepted": ('for name, found, wanted in info.get("mismatched_keys", ())', "for name, found, wanted in ()"),
            "weights that are no numbers accepted": ("if all(bool(each) for each in ok.values()):", "if True:"),
            "pickled weights named as missing": ("if pickled and not any", "if False and not any"),
            "attention of the hub accepted": ('if "/" in str(part.get(name)):', "if False:"),
            "errors of transformers reach the user": ("except _ERRORS as error:", "except OSError as error:"),
            "a full memory is a bad checkpoint": ("if is_out_of_memory(error):", "if False:"),
            "any model_type": ("if refusal := refusal or type_refusal(kind):", "if False:"),
        },
    ),
    *_of(
        "vtc/eval/model.py",
        "eval/test_loading",
        {
            "code of a processor is run": ('backend="pil", trust_remote_code=False', 'backend="pil"'),
            "tensors without numbers": ("device=device).item()", "device=device)"),
        },
    ),
    *_of(
        "vtc/hf/unsupported.py",
        "eval/test_loading",
        {"told by the class alone": ('if "mm_vision_tower" not in config and not any', "if not any")},
    ),
    *_of(
        "vtc/config.py",
        "hf/test_own_method",
        {
            "options beside an object are lost": ("method = method.changed(**self.options)", "pass"),
            "an object of a built-in class stays one": ("if METHODS.get(method.name) is type(method):", "if False:"),
            "the object's backend is lost": ('object.__setattr__(self, "backend", method.backend)', "pass"),
            "the backend cannot be set back": ('method = shared["method"] = _with_backend(method, shared["backend"])', "pass"),
            "a new object's backend is the old one": ('elif "method" in shared and method.backend != "auto":', "elif False:"),
            "an object never reselects": ('getattr(self.method, "reselect", self.options.get("reselect"))', 'self.options.get("reselect")'),
        },
    ),
    *_of(
        "vtc/methods/__init__.py",
        "hf/test_own_method",
        {"the name of another": ('if METHODS.get(getattr(cls, "name", ""), cls) is not cls or', "if")},
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_own_method",
        {
            "an object is not stored": ("base.__dict__[OBJECT] = method", "pass"),
            "an object outlives disable": ('base.config.__dict__.pop("vtc", None)\n    base.__dict__.pop(OBJECT, None)', 'base.config.__dict__.pop("vtc", None)'),
        },
    ),
    *_of(
        "vtc/eval/setting.py",
        "hf/test_own_method",
        {"an earlier version's answers": ('found | {"code": _code(type(self.method))}', "found")},
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_status",
        {
            "each value is named": ("_NAMED.add((name, method, why))", "pass"),
            "images since ever": ("IMAGES.pop(base, None)\n        base", "base"),
            "tiles everywhere": ("if all(visual.layout != TILES.layout for visual in family.inputs):", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_status",
        {"a call counts as one image": ("IMAGES.get(settings.base, 0) + images", "IMAGES.get(settings.base, 0) + 1")},
    ),
    *_of(
        "vtc/hf/status.py",
        "hf/test_status",
        {
            "fused is not seen": ('["cls_attention" if fuses else "cls_probs"]', '["cls_probs"]'),
            "tiles have a fixed number": ("if current.family.inputs[0].layout != TILES.layout:", "if True:"),
        },
    ),
    *_of(
        "vtc/distribution.py",
        "test_distribution",
        {
            "our own metadata is the other's": ('name.startswith("vtc-")', 'name.startswith("vtc")'),
            "an overwritten package is ours": ('if "compress" not in getattr(package, "__all__", ()):', "if False:"),
        },
    ),
    *_of(
        "vtc/api.py",
        "test_api",
        {
            "pixels that are no numbers": ("if not given.isfinite().all():", "if False:"),
            "scores that are no numbers": ("if selection.scores.isnan().all(-1).any():", "if False:"),
        },
    ),
    *_of("vtc/hf/generate.py", "hf/test_arguments", {"no prompt is a prompt": ("value.shape[:1] == (0,)", "False")}),
    *_of(
        "vtc/overlay.py",
        "test_overlay",
        {
            "heat of the values": ("np.cbrt((scores", "((scores"),
            "heat of another image": ("selection.scores[index].tolist()", "selection.scores[0].tolist()"),
            "heat of registers": (".tolist())[_count_registers(selection) :]", ".tolist())[: rows * columns]"),
            "NaN is drawn": ("int(np.isnan(scores).sum())", "int(0 * np.isnan(scores).sum())"),
            "infinity sets the scale": ("scores[np.isfinite(scores)]", "scores[~np.isnan(scores)]"),
        },
    ),
    *_of(
        "vtc/images.py",
        "test_images",
        {
            "drawings are opened": ("if begin in DRAWINGS:", "if False:"),
            "all of Pillow's formats": ("formats=[each for each in FORMATS if each in Image.OPEN]", "formats=None"),
            "Pillow's limit stays changed": ("Image.MAX_IMAGE_PIXELS = limit\n", "pass\n"),
            "halved images lie on their side": ("ImageOps.exif_transpose(image)", "image"),
            "a transparent colour is mixed": ('image.mode in ("L", "RGB"):', "False:"),
            "a stream without end": ("if len(data) > MAX_BYTES:", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/prune.py",
        "hf/test_selection",
        {
            "selects nothing of K = N": ("stages[0][1] == sizes[0] and not isinstance(settings.run, _Selecting)", "stages[0][1] == sizes[0]"),
            "counts left out": ("None if is_even else counts", "None"),
            "beams are counted as images": ("max_new_tokens=1, num_beams=1, num_return_sequences=1", "max_new_tokens=1"),
            "indices out of order": (".sort(1).values[:, : int(counts.max())]", "[:, : int(counts.max())]"),
        },
    ),
    *_of(
        "vtc/eval/report.py",
        "eval/test_killed_writers",
        {
            "results in place": ("with replacing(lines) as made:  # the next command reads it\n", "if made := lines:\n"),
            "inputs are not asked for": ("require_writable(existing / name, inputs)", "require_writable(existing / name)"),
        },
    ),
    *_of(
        "vtc/hf/prune.py",
        "hf/test_selection",
        {
            "hidden image tokens are as good": ("(states, is_image, self.real, keep)", "(states, is_image, self.real | is_image, keep)"),
        },
    ),
    *_of(
        "vtc/methods/question.py",
        "methods/test_methods",
        {
            "weights of the default dtype": ("words.float() / words", "words / words"),
            "ignored words count": ("    if ignore:\n", "    if False:\n"),
            "the last ignored id alone": ("ignored[places] != question.ids", "ignored[-1] != question.ids"),
            "ignored ids in their order": ("return torch.tensor(sorted(ids), dtype=torch.int64, device=device)", "return torch.tensor(ids, dtype=torch.int64, device=device)"),
            "ids are copied at every call": ("        return _kept(ids, like.device)\n", "        pass\n"),
            "a tracer's tensor is kept": ("type(like) is Tensor and not torch.compiler.is_compiling()", "True"),
            "a lookup that waits": ("ignored[places] != question.ids", "~torch.isin(question.ids, ignored)"),
            "nothing left means nothing": ("words = torch.where(words.any(dim=1, keepdim=True), words, question.is_text)", "pass"),
            "what is no text counts": ("words & (ignored", "(ignored"),
            "halves of a sum by length": ("half = 1 << (length - 1).bit_length() - 1", "half = (length + 1) // 2"),
            "lower case alone": ("(word, word.capitalize(), word.upper())", "(word,)"),
            "no beginning of a line": ('("a\\n", "a\\n")]', "]"),
            "parts of words are words": ("and len(ids) == len(first) + 1", "and len(ids) > len(first)"),
        },
    ),
    *_of(
        "vtc/methods/coverage.py",
        "methods/test_methods",
        {"no temperature": ("temperature=self.temperature, backend", "temperature=0.2, backend")},
    ),
    *_of(
        "vtc/methods/scope.py",
        "methods/test_methods",
        {
            "gains are not weighted": ("keep, weight=weight.to(torch.float32), backend", "keep, backend"),
            "one layer is the saliency": ('self.require(outputs, "cls_probs").mean(2).sum(0)', 'self.require(outputs, "cls_probs").mean(2)[-1]'),
            "one received layer is the saliency": ('self.require(outputs, "received").sum(0)', 'self.require(outputs, "received")[-1]'),
            "[CLS] is the saliency everywhere": ('saliency="cls" if cls else "received"', 'saliency="cls"'),
            "layers after the feature layer": ("range(end - self.ensemble_layers, end)", "range(end - self.ensemble_layers + 1, end + 1)"),
        },
    ),
    *_of(
        "vtc/methods/divprune.py",
        "methods/test_methods",
        {
            "tokens before the projector": ('tokens = self.require(outputs, "projected")', 'tokens = (self.require(outputs, "projected"), outputs.patches)[1]'),
            "rounding decides": ("similarity = torch.maximum(similarity.mT, similarity)", "similarity = similarity.contiguous()"),
            "columns are contiguous": ("torch.maximum(similarity.mT, similarity)", "torch.maximum(similarity, similarity.mT)"),
        },
    ),
    *_of(
        "vtc/methods/divprune.py",
        "test_config",
        {"ratio rounds up": ("rounds_up: ClassVar[bool] = False", "rounds_up: ClassVar[bool] = True")},
    ),
    *_of(
        "vtc/methods/vispruner.py",
        "methods/test_methods",
        {
            "the least similar are dropped": ("nearest.sort(dim=1, descending=True, stable=True)", "nearest.sort(dim=1, stable=True)"),
            "NaN is the most important": ('probs = probs.masked_fill(probs.isnan(), float("-inf"))', "pass"),
            "a keeps its order": ("            if b.shape[1]:\n", "            if b.shape[1] and rest.shape[1] - wanted <= 8:\n"),
            "b before a": ("torch.cat([a[:, drop:], b], dim=1)", "torch.cat([b, a[:, drop:]], dim=1)"),
            "one in a round": ("min(8, rest", "min(1, rest"),
            "one important patch more": ("important = int(keep * self.important)", "important = min(keep, int(keep * self.important) + 1)"),
            "scores in the order of rounds": ("gather(1, kept).sort(dim=1).values\n", "gather(1, kept)\n"),
        },
    ),
    *_of(
        "vtc/methods/hiprune.py",
        "methods/test_methods",
        {
            "anchors of the feature layer": ("ops.topk(middle, anchors", "ops.topk(deep, anchors"),
            "no row above": ("found - width", "found + width"),
            "a copy to the device": ("near = torch.cat", "_ = torch.tensor([width], device=found.device); near = torch.cat"),
            "the grid's height": ("outputs.grid[1]", "outputs.grid[0]"),
            "neighbours in a ring": (".clamp(0, num_tokens - 1)", " % num_tokens"),
            "buffers before anchors": ("level.scatter(1, near, 1.0).scatter(1, found, 2.0)", "level.scatter(1, found, 2.0).scatter(1, near, 1.0)"),
            "after the feature layer": ("min(max(round(OBJECT_LAYER * depth / DEPTH), 1), end)", "max(round(OBJECT_LAYER * depth / DEPTH), 1)"),
        },
    ),
    *_of(
        "vtc/methods/base.py",
        "methods/test_methods",
        {"the last choice scores most": ("(1 - steps / order.shape[1])", "((1 + steps) / order.shape[1])")},
    ),
    *_of(
        "vtc/methods/base.py",
        "hf/test_methods_model",
        {
            "received by the first views": ("part(self.received, True)", "None if self.received is None else self.received[:, : len(self.hidden[views])]"),
            "projected of the first views": ("part(self.projected), question", "None if self.projected is None else self.projected[: len(self.hidden[views])], question"),
        },
    ),
    *_of(
        "vtc/scores.py",
        "hf/test_methods_model",
        {
            "[CLS] receives": ("skip=skip, backend", "skip=0, backend"),
            "a layer counts once": ("backend=backend)] * times", "backend=backend)]"),
            "what frames receive is not averaged": ("self.received = _pooled(self.received, side, size)", "self.received = self.received[:, :, : (side // size) ** 2]"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_towers",
        {"SigLIP passes arguments on": ("elif enabled and tower_of(tower.config).passes_on:", "elif enabled:")},
    ),
    *_of(
        "vtc/tiles.py",
        "hf/test_methods_model",
        {
            "padding is chosen": ("layout[places]", "torch.arange(len(places))"),
            "newlines are the best": ("scores.new_full(layout.shape, -1.0)", "scores.new_full(layout.shape, 2.0)"),
        },
    ),
    *_of(
        "vtc/methods/mmtok.py",
        "methods/test_methods",
        {
            "image rows are not divided": ("self.alpha / patches.shape[1]", "self.alpha"),
            "words are not divided": ("text.mT * weights", "text.mT * (weights > 0)"),
            "one temperature": ("temperature=self.text_temperature", "temperature=self.temperature"),
            "words first": ("[image.mT * (self.alpha / patches.shape[1]), text.mT * weights]", "[text.mT * weights, image.mT * (self.alpha / patches.shape[1])]"),
        },
    ),
    *_of(
        "vtc/methods/cdpruner.py",
        "methods/test_methods",
        {
            "relevance scaled over the batch": ("mean.aminmax(dim=1, keepdim=True)", "mean.aminmax()"),
            "relevance the wrong way round": ("(mean - low + 1e-6)", "(high - mean + 1e-6)"),
            "gain without relevance": ("gain = relevance * relevance * likeness", "gain = relevance * likeness"),
            "earlier choices are not projected out": ("        if step:\n", "        if step == 1:\n"),
            "a patch is taken twice": ("rest = rest.scatter(1, chosen, False)", "pass"),
            "rounding is a gain": ("gain = gain.masked_fill(gain <= rounding, 0.0)", "pass"),
            "small gains are rounding": ("num_tokens * torch.finfo", "1000 * num_tokens * torch.finfo"),
            "noise is divided by": ("torch.where(square > 0, row / square.sqrt(), 0.0)", "row / square.sqrt()"),
        },
    ),
    *_of(
        "vtc/methods/downsample.py",
        "methods/test_methods",
        {
            "views of any shape": ("if rows != columns:", "if False:"),
            "a larger view": ("if keep >= rows * columns:", "if keep == rows * columns:"),
            "all tokens of an oblong view are a square": ("num_tokens if keep >= num_tokens else ", ""),
        },
    ),
    *_of(
        "vtc/methods/downsample.py",
        "hf/test_question",
        {"one patch less in a row": ("return math.isqrt(keep), math.isqrt(keep)", "return math.isqrt(keep), math.isqrt(keep) + 1")},
    ),
    *_of(
        "vtc/hf/question.py",
        "hf/test_question",
        {
            "padding is embedded": ("ids = ids.masked_fill(~is_text, 0)", "pass"),
            "the first row asks for all": ("row.expand(count", "tensor[:1].expand(count"),
        },
    ),
    *_of(
        "vtc/hf/prompt.py",
        "hf/test_question",
        {
            "hidden text is text": ("(is_text & self.real).gather(1, columns)", "is_text.gather(1, columns)"),
            "text out of order": ("is_text.int().sort(dim=1, descending=True, stable=True)", "is_text.int().flip(1).sort(dim=1, descending=True, stable=True)"),
            "padding is text": ("is_text = ~self.padding\n", "is_text = torch.ones_like(self.padding)\n"),
        },
    ),
    *_of(
        "vtc/hf/views.py",
        "hf/test_question",
        {
            "frames are as many as videos": ("return [len(self.views) // len(self.counts)] * len(self.counts)", "return [1] * len(self.counts)"),
            "tiles of one size": ("alone = plan._replace(num_kept=kept_of_view(plan, tiling, kept))", "alone = plan._replace(num_kept=self.counts[0][1] // self.tiles[0].num_tiles)"),
        },
    ),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_question",
        {
            "not antialiased": (', mode="bicubic", antialias=True', ', mode="bicubic"'),
            "pooled views are too small": ("tokens * plan.pool * patch", "tokens * patch"),
        },
    ),
    *_of(
        "vtc/hf/settings.py",
        "hf/test_question",
        {
            "lists are no keys": ("tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value", "value"),
        },
    ),
    *_of(
        "vtc/cli/sheet.py",
        "cli/test_sheet",
        {
            "one line of shares": ("<= width:\n            lines[-1] = longer", "<= 9999:\n            lines[-1] = longer"),
            "one line of answers": ("CHIPS = 6", "CHIPS = 12"),
            "always the same reason": ("if disagreed else 'one more'", "if True else 'one more'"),
            "the question decides for all": ("if method.prunes_only_language():", "if True:"),
        },
    ),
    *_of(
        "bench/hub/__init__.py",
        "bench/test_hub",
        {
            "operators of VTC's namespace": ("""r'f?"vtc::': 'f"{NAMESPACE}::',""", ""),
            "VTC's kernels": ("""r"^( *)from vtc_kernels import ": r"\\1from .kernels import ",""", ""),
            "old files stay": ("if out.exists() and (not", "if False and (not"),
            "any owner": ("if not re.fullmatch(OWNER, owner):", "if False:"),
            "any import": ("require_known(name, text)\n    here", "pass\n    here"),
            "relative imports are unknown": ("and not node.level:", "and True:"),
        },
    ),
    *_of("bench/hub/namespace.py", "bench/test_hub", {"one namespace for all versions": ('(__package__ or "").replace(".", "_")', '"vtc_ops"')}),
    *_of(
        "bench/quality.py",
        "bench/test_quality",
        {
            "more token-layers than the baseline": ("if group_of(setting.name, options) == INSIDE else keep", "if False else keep"),
            "all text is the question": ('{"ignore": ignore} if "ignore" in METHODS[name].options() else {}', "{}"),
            "other settings go": ("merged(read(out) if out.exists() else [], records)", "merged([], records)"),
            "settings of other questions stay": ("if asked(r) == asked(now[0])]", "]"),
            "odd schedules": ("if keep <= 192 and keep % 2 == 0", "if keep <= 192"),
        },
    ),
    *_of(
        "vtc/eval/intervals.py",
        "bench/test_quality",
        {
            "no correlation": ("2 * correlation * a * b", "0 * correlation * a * b"),
            "no correction": ("max(product - total / 2, 0.0)", "product"),
            "sides exchanged": ("width(mine - low, other_high - other)", "width(high - mine, other - other_low)"),
        },
    ),
    *_of(
        "bench/cpu.py",
        "bench/test_cpu",
        {
            "any logits will do": ("if not torch.equal(made.logits, expected.logits) or", "if"),
            "any tokens will do": ("if not torch.equal(made.tokens, self.few_tokens(inputs, keep)):", "if False:"),
            "any scores will do": ('require_close("scores", tokens.scores, scores)', "pass"),
            "rounds are not checked": ("            require_same(name, made[0], expected[name])\n", ""),
            "stock against stock": ("model = self.stock if keep is None else self.compressed", "model = self.stock"),
            "always the same order": ("names[number % len(names) :] + names[: number % len(names)]", "names"),
            "ratios of other rounds": ("zip(samples[STOCK], taken, strict=True)", "zip(sorted(samples[STOCK]), sorted(taken), strict=True)"),
            "operations within operations count twice": ("if not self._depth:", "if True:"),
            "records of the last run stay": ("out.unlink(missing_ok=True)", "pass"),
            "shares upside down": ("low, middle, high = 1 / high, 1 / middle, 1 / low", "pass"),
        },
    ),
    *_of(
        "vtc/hf/graphs/language.py",
        "hf/test_graphs",
        {
            "the tail of a prompt is not emptied": ("self.embeds[:, length:].zero_()", "pass"),
            "positions behind a prompt": ("        self.positions[:, length:].zero_()\n", ""),
            "hidden columns stay in front": ("columns = torch.empty_like(place)", "place = torch.arange(self.columns, device=place.device).expand_as(place).contiguous(); columns = torch.empty_like(place)"),
            "positions are not moved": ("positions = self.positions.gather(1, columns)", "positions = self.positions"),
            "keys and values stay moved": ("keys, values = ops.compact_kv(cache.keys, cache.values, place)", "keys, values = cache.keys, cache.values"),
            "hidden states are the graph's": ("return self.hidden[:, :length].clone(), self.kv[:, :, :, :length].clone()", "return self.hidden[:, :length], self.kv[:, :, :, :length].clone()"),
            "keys and values are the graph's": ("self.kv[:, :, :, :length].clone()", "self.kv[:, :, :, :length]"),
            "a step sees the columns behind it": ("self.mask[:, column + 1 :].fill_(False)", "self.mask[:, column + 1 :].fill_(True)"),
            "a step is always in one column": ("self.column.fill_(column)", "self.column.fill_(20)"),
            "a step's position": ("self.positions.copy_(positions)\n        self.column", "self.positions.fill_(3)\n        self.column"),
        },
    ),
    *_of(
        "vtc/hf/graphs/language_calls.py",
        "hf/test_graphs",
        {
            "buckets of one": ("BUCKET = 32", "BUCKET = 1"),
            "one window": ("while columns <= _power_of_two(most):", "while columns <= _power_of_two(column + 1):"),
            "batch sizes without end": ("if len(self._windows) > WINDOWS:", "if False:"),
            "steps outside of generate()": ("if now.new_tokens is None:", "if False:"),
            "masks of callers": ("mask.ndim == 4 and self._generation.own_masks", "mask.ndim == 4"),
            "packed samples": ("if mask is None and cache is None and positions is not None:", "if False:"),
            "a recording writes into a cache": ("            window.release()  # the recording", "            pass  # the recording"),
            "several tokens on a cache": ("if _length(cache):\n            raise", "if False:\n            raise"),
            "arguments that are not known": ("if extra:", "if False:"),
            "caches that do not fit": ("if not window.fits(cache, column):", "if False:"),
            "the window of the attention": ("if window is not None and columns > window:", "if False:"),
            "offloaded caches": ('if getattr(cache, "offloading", False):', "if False:"),
            "caches keep what the next call takes": ("window.release(cache)", "pass"),
            "windows of models that changed": ("if place is not self._place:  # all was dropped", "if self._place is None:"),
            "any attention": ("if attention not in ATTENTIONS:", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/graphs/window.py",
        "hf/test_graphs",
        {
            "never copied": ("torch._foreach_copy_(self._views(columns), tensors)", "pass"),
            "copied once": ("if owner is cache and all(map(operator.is_, tensors, self._given)):", "if owner is cache:"),
            "the owner before loses its columns": ("        else:\n            self.release()\n", ""),
            "the NaN of another": ("self.kv[:, :, :, columns : self._written].zero_()", "pass"),
            "columns that move are not copied first": ("each.clone() if each.untyped_storage().data_ptr() == here else each for", "each for"),
            "emptied caches": ("if layer.keys is not None:  # as", "if True:  # as"),
            "caches without layers": ("if len(tensors) == len(self._given) and all(", "if all("),
            "what was written is forgotten": ("self._written = max(self._written, columns)", "pass"),
            "copied at every step": ("if owner is cache and all(map(operator.is_, tensors, self._given)):", "if False:"),
        },
    ),
    *_of(
        "vtc/hf/graphs/state.py",
        "hf/test_graphs",
        {
            "weights that moved": ("list(map(Tensor.data_ptr, self._dense)),", ""),
            "modules and parameters that were replaced": ("list(map(id, _values(self._dicts))) != self._ids or ", ""),
            "settings of other libraries": ("list(map(_settings, self._foreign)),", ""),
            "forwards of the parts themselves": ("if not (replaced and own in self._roots)]", "if own not in self._roots]"),
            "other parts": ("return len(modules) == len(self._roots) and all(map(operator.is_, modules, self._roots))", "return True"),
            "tensors inside of weights": ("[_place(getattr(tensor, name)) for name in names]", "[]"),
            "weights without memory": ("if type(each) in _DENSE and each.layout == torch.strided]", "if type(each) in _DENSE]"),
            "the older words for TF32": ("cuda.matmul.fp32_precision,", "torch.get_float32_matmul_precision(),"),
            "fewer layers": ("            list(map(_depth, self._roots)),\n", ""),
            "compiled modules": ("list(map(_compiled, self._modules)),", ""),
            "training": ("if any(map(_training, self._roots)):", "if False:"),
            "hooks of all modules": ("if nn_module._has_any_global_hook():", "if False:"),
            "hooks": ("if any(map(_is_hook, _values(filter(None, self._hooks)))):", "if False:"),
            "hooks before": ("(own._forward_hooks, own._forward_pre_hooks)", "(own._forward_hooks,)"),
            "replaced forwards": ('if any(map(operator.contains, self._own, repeat("forward"))):', "if False:"),
            "hooks of transformers hinder": ('return not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")', "return True"),
            "flags of PyTorch": ("torch.are_deterministic_algorithms_enabled(),", ""),
        },
    ),
    *_of(
        "vtc/hf/graphs/recorded.py",
        "hf/test_graphs",
        {
            "graphs without end": ("while len(self._functions) > self.limit:", "while False:"),
            "the newest leaves": ("self._functions.popitem(last=False)", "self._functions.popitem()"),
            "the oldest leaves, used or not": ("        self._functions.move_to_end(key)\n", ""),
            "gradients": ("if torch.is_grad_enabled():", "if False:"),
            "autocast": ("if torch.is_autocast_enabled(device.type):", "if False:"),
            "a reason is logged each time": ("if why not in self._said:", "if True:"),
            "tensors of inference_mode": ("torch.inference_mode(False), torch.no_grad()", "torch.no_grad()"),
            "all threads record": ("return self._recording == threading.get_ident()", "return self._recording is not None"),
            "other parts are not seen": ("not state.is_of(modules) or ", ""),
            "too little memory for ever": ("except torch.OutOfMemoryError as error:", "except ZeroDivisionError as error:"),
            "blocks count nothing": ("run.replays[kind] = run.replays.get(kind, 0) + 1", "pass"),
            "what failed is tried again": ("self._failed[key] = f\"it cannot", "why = f\"it cannot"),
        },
    ),
    *_of(
        "vtc/hf/graphs/model.py",
        "hf/test_graphs",
        {
            "a copy has the graphs of the model": ('return getattr, (self._model(), "forward")  # of', "return Forward, (self._model(), self._graphs())  # of"),
            "dropped while others run": ("        with self._recorded.lock:\n            self._language.release_all()\n            self._recorded.drop()\n", "        self._language.release_all()\n        self._recorded.drop()\n"),
            "interrupted answers keep the memory": ("        finally:  # also if a streamer raised an error\n            self._language", "        finally:\n            output is not None and self._language"),
            "a replaced language model is not named": ("        self._is_ours(self._base().language_model)\n", ""),
            "a wrapped forward is replayed": ("if not self._is_ours(model):", "if False:"),
            "disabling leaves graphs": ("            del base.__dict__[_ATTRIBUTE]\n", "            pass\n"),
            "closing leaves the forward": ('del language.__dict__["forward"]', "pass"),
            "old graphs close the new ones": ("if base is not None and of(base) is self:", "if base is not None:"),
            "the attention of the tower": ("key = (key, base.vision_tower.config._attn_implementation)", "pass"),
            "forwards of others": ('if own is not None and getattr(own, "__func__", None) is not type(language).forward:', "if False:"),
            "the model is kept": ("self._model, self._graphs = weakref.ref(model), weakref.ref(graphs)", "self._model, self._graphs = (lambda: model), (lambda: graphs)"),
            "recompiled eight times": ("with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):", "if True:"),
        },
    ),
    *_of(
        "vtc/hf/graphs/tower.py",
        "hf/test_graphs",
        {
            "the first views": ("        self.views.copy_(views)\n        self._replay()", "        self._replay()"),
            "results are the graph's": ("leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves", "leaf for leaf in self._leaves"),
        },
    ),
    *_of("vtc/hf/generate.py", "hf/test_graphs", {"what stock reads of the config": ("repr((sorted(others.items()), read))", "repr(sorted(others.items()))")}),
    *_of("vtc/api.py", "hf/test_graphs", {
        "an answer of one token": ("least = min(2, new_tokens)", "least = 0"),
        "warmed up for nothing": ("if not made.is_useful():", "if made.is_useful() is None:"),
        "a model that does not compress is warmed up": ("        if settings.way(base) is None:\n            raise", "        if False:\n            raise"),
    }),
    *_of(
        "vtc/hf/graphs/capture.py",
        "hf/test_capture",
        {
            "warmed up on the stream of captures": ("with torch.cuda.stream(self._first):", "with torch.cuda.stream(self._stream):"),
            "the stream of a failed capture stays": ("                    torch.cuda.stream(self._stream),\n", ""),
            "the pool of a failed capture stays": ("torch._C._cuda_endAllocateToPool(self.device.index, self._pool)", "pass"),
            "not strict": ("with Strict():", "if True:"),
            "streams do not wait": ("stream.wait_stream(self._last)", "pass"),
        },
    ),
    *_of(
        "vtc/hf/graphs/strict.py",
        "hf/test_capture",
        {
            "copies": ('if name in ("_to_copy", "copy_"):', "if False:"),
            "reads": ("if name in WAITS or _is_masked(name, args):", "if _is_masked(name, args):"),
        },
    ),
    *_of("vtc/hf/graphs/warm_up.py", "hf/test_graphs", {
        "tiles": ('if family_of(base).inputs[0].layout != "whole":', "if False:"),
        "prompts without text": ("if length <= num_tokens:", "if False:"),
        "any sizes": ("if not kinds or len(size) not in (2, 3):", "if False:"),
        "the smallest first": ("made.sort(key=lambda size: -size[0] * size[1])", "made.sort(key=lambda size: size[0] * size[1])"),
    }),
    *_of(
        "vtc/hf/encode.py",
        "hf/test_graphs",
        {
            "a graph for all settings": ("return name, type(plan.method), repr(given)", "return name, type(plan.method), \"\""),
            "classes are known by name": ("return name, type(plan.method), repr(given)", "return name, Method, repr(given)"),
            "questions are recorded": ("if question is None and is_replayable(method):", "if is_replayable(method):"),
            "methods of others are recorded": ('return type(method).__module__.startswith("vtc.methods.")', "return True"),
            "tensors among the arguments are recorded": ("if any(isinstance(value, Tensor) for value in tower_arguments.values()):", "if False:"),
        },
    ),
    *_of(
        "vtc/vllm/settings.py",
        "serving/test_settings_in_vllm",
        {
            "none is compressed": ("return config if config.compresses else None", "return config"),
            "settings that are ignored": ("    if not served:\n", "    if False:\n"),
            "settings of a model are not applied before": ("    plan_of(hf_config)\n    if not served", "    if not served"),
            "other code for videos": ("if family.has_frames:", "if False:"),
            "the tower refuses nothing": ("_refusal(config) or compatibility.tower_refusal(tower, config.method)", "_refusal(config)"),
            "the family refuses nothing": ("if why := compatibility.family_refusal(family, config.method):", "if False:"),
            "inside the language model": ("if method.prunes_only_language() or config.prunes_inside:", "if False:"),
            "later stages": ("or config.prunes_inside:", "or config.prune_after:"),
            "counts follow from features": ("if method.adaptive:", "if False:"),
            "the question": ("if method.needs.question:", "if False:"),
            "the image is made smaller": ("if method.view_grid((24, 24), 64) != (24, 24):", "if False:"),
            "original positions": ('if config.positions != "packed":', "if False:"),
            "fused attention": ("if config.fused:", "if False:"),
            "a request sets all": ("set(given) - set(FOR_REQUESTS)", "False"),
            "a request starts anew": ("return _config(given, engine)", "return _config(given)"),
            "a request keeps more": ("if kept > most:", "if False:"),
            "settings of one budget are the same": ("json.dumps(config.to_dict(), sort_keys=True)", "json.dumps({'keep': config.keep})"),
            "settings are no mapping": ("if not isinstance(given, Mapping):", "if False:"),
            "no tiles": ("shares_keep=family.inputs[0].layout == TILES.layout", "shares_keep=False"),
        },
    ),
    *_of(
        "vtc/vllm/versions.py",
        "serving/test_settings_in_vllm",
        {
            "VLLM_PLUGINS is not read": ("if chosen is not None and NAME not in chosen.split(\",\"):", "if False:"),
            "without an entry point": ("if not any(point.name == NAME", "if False and not any(point.name == NAME"),
            "old versions are tested": ("Version(OLDEST).release <= Version(version)", "Version(version).release[:1] <= Version(version)"),
            "new versions are tested": ("<= Version(NEWEST).release:", "<= (9, 9):"),
        },
    ),
    *_of(
        "vtc/vllm/encoder.py",
        "serving/test_encoder",
        {
            "passes without a bound": ("for some in images.split(self.batch):", "for some in (images,):"),
            "images in another order": ("found[numbers.pop(0)] = own", "found[numbers.pop()] = own"),
            "one budget for all": ("for number, own in enumerate(keeps) if own == keep]", "for number, own in enumerate(keeps)]"),
            "any number of tokens": ("if tokens.features.shape[1] != expected:", "if False:"),
            "tiles without a bound": ("if numbers and views + tiling.num_tiles > self.batch:", "if False:"),
            "padding is a tile": ("images[number][: tiles[number].num_tiles]", "images[number]"),
            "newlines are patches": ("visual = torch.where(is_newline[:, None], self.newline.to(visual), visual)", "pass"),
            "the first image's tiles": ("first += tiling.num_tiles\n        features, is_newline", "first += 0\n        features, is_newline"),
        },
    ),
    *_of(
        "vtc/scores.py",
        "serving/test_scores_over_ranks",
        {
            "keys of one rank": ("self.over_ranks(key.mean(1, keepdim=True, dtype=torch.float32))", "key.mean(1, keepdim=True, dtype=torch.float32)"),
            "received by one rank": ("self.received = self.over_ranks(self.received)", "pass"),
            "probabilities of one rank": ("self.over_ranks(self.cls_probs.mean(2, keepdim=True))", "self.cls_probs.mean(2, keepdim=True)"),
        },
    ),
]  # fmt: skip


def mutated(mutant: Mutant) -> str:
    """The text of the mutant's file; ValueError if the edit no longer fits it."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        count = text.count(mutant.old)
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, not once")
    return text.replace(mutant.old, mutant.new)


def run(mutant: Mutant) -> str | None:
    """The first test that notices the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "vtc", Path(folder) / "vtc", ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
        shutil.copytree(ROOT / "kernels", Path(folder) / "vtc_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "vtc/tiny/checkpoint").symlink_to(ROOT / "vtc/tiny/checkpoint")
        shutil.copytree(ROOT / "bench", Path(folder) / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name, target in {"kernels": "vtc_kernels", "LICENSE": ROOT / "LICENSE"}.items():
            (Path(folder) / name).symlink_to(target)
        copy = Path(folder) / mutant.file
        copy.write_text(mutated(mutant), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["VTC_STATEFUL_NO_SHRINK"] = "1"  # the first example that fails is enough
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *mutant.tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"the test process ended with status {done.returncode}"


def main(names: list[str]) -> int:
    """Run the mutants whose name contains one of `names`, or all; return the exit status."""
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    survivors = []
    with ThreadPoolExecutor(2) as pool:
        for mutant, caught in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{mutant.name:<55} {caught or 'SURVIVED'}", flush=True)
            survivors += [mutant.name] * (caught is None)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
