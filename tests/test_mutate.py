"""The mutants of `python -m tests.support.mutate` still fit the code that they break."""

import ast

import pytest
from support import mutate


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_apply(mutant):
    text = mutate.mutated(mutant)
    ast.parse(text)
    assert text != (mutate.ROOT / mutant.file).read_text(encoding="utf-8")


def test_names_are_unique():
    names = [mutant.name for mutant in mutate.MUTANTS]
    assert len(set(names)) == len(names)


def test_a_broken_kernel_is_caught_and_a_whole_one_is_not(monkeypatch):
    broken = next(mutant for mutant in mutate.MUTANTS if mutant.name == "topk: one index short")
    quick = broken._replace(tests=("tests/ops/test_topk.py::test_strides",))
    assert mutate.run(quick).startswith("tests/ops/test_topk.py::test_strides")
    monkeypatch.setattr(mutate, "mutated", lambda mutant: (mutate.ROOT / mutant.file).read_text(encoding="utf-8"))
    assert mutate.run(quick) is None
