"""The workloads: every operation has one, its providers pass the gate, and the gate catches wrong results."""

import pytest
import torch
from support.bench import CPU
from support.kernels import DEVICE

from bench import micro
from bench.accuracy import WrongResult
from bench.workloads import WORKLOADS, base
from vtc import ops

MODEL = base.SMALL_MODELS[1]


def inputs_of(op, dtype=torch.float32, device=CPU):
    shape = MODEL.shape(2, 8)
    return shape, WORKLOADS[op].make(shape, dtype, device)


def test_every_operation_has_a_workload():
    assert set(WORKLOADS) == {*ops.OPS, "scored_layers"}


@pytest.mark.parametrize("op", WORKLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_provider_passes_its_gate(op, dtype):
    """The Triton ones in the interpreter, those of torch.compile without compiling."""
    _, inputs = inputs_of(op, dtype, DEVICE)
    providers = WORKLOADS[op].providers()
    assert {"triton", "reference", "compiled"} <= set(providers)
    if op in ("cls_attention", "cls_probs", "row_scores", "scored_layers"):
        assert {"sdpa+row", "full-weights"} <= set(providers)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for provider in providers.values():
            WORKLOADS[op].check(inputs, provider(*inputs))


def altered(result, path, change):
    """`result` with the tensor at `path` replaced by what `change` makes of it."""
    if not path:
        return change(result.clone())
    return tuple(altered(part, path[1:], change) if i == path[0] else part for i, part in enumerate(result))


def first_row(value):
    def change(x):
        x[0] = value
        return x

    return change


WRONG = {
    "cls_attention": [((0,), first_row(0)), ((1,), lambda x: x * 1.001), ((0,), lambda x: x.transpose(1, 2))],
    "cls_probs": [((), lambda x: x * 1.001), ((), first_row(float("nan"))), ((), lambda x: x.flip(0))],
    "row_scores": [((), lambda x: x * 1.001), ((), first_row(float("nan"))), ((), lambda x: x[:, :-1])],
    "topk": [((), lambda x: x.flip(1)), ((), lambda x: x + 1), ((), lambda x: x.int())],
    "compact": [((), first_row(0)), ((), lambda x: x.flip(1)), ((), lambda x: x[:, :-1])],
    "compact_kv": [((0, 1), first_row(0)), ((1, 0), lambda x: x.flip(2)), ((1, 1), lambda x: x.half())],
    "merge_neighbors": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * (torch.arange(x.shape[2]) > 3)),
        ((1,), lambda x: x.roll(1, dims=2)),
    ],
    "merge_nearest": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * (torch.arange(x.shape[2]) > 3)),
        ((1,), lambda x: x.roll(1, dims=2)),
    ],
    "similarity": [((), lambda x: x * 1.001), ((), first_row(float("nan"))), ((), lambda x: x.flip(2))],
    "coverage": [((0,), lambda x: x.flip(1)), ((1,), lambda x: x.flip(1)), ((0,), lambda x: x.int())],
    "select": [
        ((0,), first_row(0)),
        ((0,), lambda x: x.flip(1)),
        ((1,), lambda x: x.flip(1)),
        ((1,), lambda x: x.int()),
        ((2,), lambda x: x * 1.001),
    ],
    "maxmin": [((0,), lambda x: x.flip(1)), ((1,), lambda x: x.sort(1).values), ((1,), lambda x: x.int())],
    "received": [((), lambda x: x * 1.001), ((), first_row(float("nan"))), ((), lambda x: x[:, :-1])],
    "scored_layers": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * 1.001),
        ((2,), lambda x: x.flip(1)),
        ((2,), lambda x: (x[:, :1] + torch.arange(x.shape[1])) % 30),
        ((3,), lambda x: x.flip(1)),
    ],
}


@pytest.mark.parametrize(("op", "number"), [(op, i) for op, wrong in WRONG.items() for i in range(len(wrong))])
def test_the_gate_refuses_a_wrong_result(op, number):
    _, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    WORKLOADS[op].check(inputs, result)
    with pytest.raises(WrongResult):
        WORKLOADS[op].check(inputs, altered(result, *WRONG[op][number]))


def test_the_gate_sees_layers_that_changed_places():
    """No two layers of a cache are alike, keys or values."""
    _, inputs = inputs_of("compact_kv")
    keys, values = WORKLOADS["compact_kv"].providers()["reference"](*inputs)
    for wrong in ((keys[::-1], values), (keys, values[::-1]), (values, keys)):
        with pytest.raises(WrongResult):
            WORKLOADS["compact_kv"].check(inputs, wrong)


def nbytes(x):
    return x.nbytes if isinstance(x, torch.Tensor) else sum(map(nbytes, x)) if isinstance(x, (tuple, list)) else 0


@pytest.mark.parametrize("op", ["cls_attention", "maxmin", "topk"])
def test_bytes_are_those_of_inputs_and_outputs(op):
    shape, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    assert WORKLOADS[op].bytes_moved(shape, 4) == nbytes(inputs) + nbytes(result)


@pytest.mark.parametrize("op", ["compact", "compact_kv"])
def test_bytes_of_a_gather_are_its_output_twice_and_the_indices(op):
    shape, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    assert WORKLOADS[op].bytes_moved(shape, 4) == 2 * nbytes(result) + inputs[-1].nbytes


def test_bytes_of_row_scores_are_one_query_row_all_keys_and_the_scores():
    shape, (query, key) = inputs_of("row_scores")
    result = WORKLOADS["row_scores"].providers()["reference"](query, key)
    assert WORKLOADS["row_scores"].bytes_moved(shape, 4) == query[:, :, 0].nbytes + key.nbytes + result.nbytes


def test_bytes_of_cls_probs_are_query_rows_all_keys_and_the_probabilities():
    shape, (queries, keys) = inputs_of("cls_probs")
    result = WORKLOADS["cls_probs"].providers()["reference"](queries, keys)
    rows = nbytes([query[:, :, 0] for query in queries])
    assert WORKLOADS["cls_probs"].bytes_moved(shape, 4) == rows + nbytes(keys) + result.nbytes


def test_bytes_of_select_are_scores_results_and_the_kept_features_twice():
    shape, (scores, x, keep) = inputs_of("select")
    features, indices, total = WORKLOADS["select"].providers()["reference"](scores, x, keep)
    moved = scores.nbytes + total.nbytes + indices.nbytes + 2 * features.nbytes
    assert WORKLOADS["select"].bytes_moved(shape, 4) == moved


def test_bytes_of_received_are_queries_keys_and_the_result():
    shape, inputs = inputs_of("received")
    result = WORKLOADS["received"].providers()["reference"](*inputs)
    assert WORKLOADS["received"].bytes_moved(shape, 4) == nbytes(inputs[:2]) + nbytes(inputs[2]) + nbytes(result)


def test_shapes_are_those_of_the_models():
    """LLaVA-1.5: 24 x 24 patches and [CLS], 16 heads of 64; Llama-2-7B: 32 layers, 32 heads of 128."""
    assert base.MODELS[0].shape(4, 64) == {
        "B": 4, "T": 1, "N": 577, "H": 16, "D": 64, "L": 32, "G": 32, "F": 128, "K": 64
    }  # fmt: skip
    work = WORKLOADS["scored_layers"]
    pairs = micro.sizes(work, micro.Options(), on_gpu=True)
    assert {b for b, _ in pairs} == {1, 4, 16, 64}
    assert {k for _, k in pairs} == {32, 64, 128, 192, 256}
    assert len(pairs) == 8
    assert len(micro.sizes(work, micro.Options(full=True), on_gpu=True)) == 20
