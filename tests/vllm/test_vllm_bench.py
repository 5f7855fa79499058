"""`python -m bench serve` with vLLM, in miniature. No time decides a test."""

from __future__ import annotations

import pytest

from bench import __main__ as command
from bench import record, serve, served_models, stages
from bench.serve import Serving


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEW_TOKENS", 4)


def run(tmp_path, model: str, *more: str) -> list[Serving]:
    arguments = ["--model", model, "--concurrency", "1", "3", "--keep", "64", "--requests", "6", "--rounds", "1", *more]
    assert command.main(["serve", *arguments, "--out", str(tmp_path)]) == 0
    return record.read(tmp_path / serve.FILE, Serving)


def require_right(records: list[Serving], text: int) -> None:
    """The tokens of prompts and of the KV cache, which follow from `keep`, and engines that sleep."""
    assert [(r.concurrency, r.backend) for r in records] == [(c, name) for c in (1, 3) for name in ("vllm", "vtc 64")]
    for each in records:
        assert each.prompt_tokens == text + (each.keep or 576)
        own = -(-(each.prompt_tokens + 4) // 32) * 32  # whole blocks
        assert own <= each.kv_tokens <= own * each.concurrency
        assert each.kv_tokens > own * (each.concurrency - 1)  # all were in flight together
        assert each.kv_tokens < each.kv_capacity
        assert each.preempted == 0
        assert each.others_busy < 0.25
        assert each.vllm
    assert all((r.ttft_ratio_50 is None) == (r.keep is None) for r in records)


def test_the_bundled_model(tmp_path, capsys) -> None:
    records = run(tmp_path, "bundled")
    require_right(records, text=11)
    assert {each.checked for each in records} == {"plain PyTorch"}
    assert serve.tables(records) in capsys.readouterr().out


def test_a_narrow_7b_with_weights_that_vllm_makes_up(tmp_path, monkeypatch) -> None:
    narrow = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=2)
    monkeypatch.setitem(stages.MODELS, "LLaVA-1.5-7B", (narrow, narrow | {"vocab_size": 32064}))
    records = run(tmp_path, "7b")
    require_right(records, text=stages.TEXT_TOKENS)
    assert {(each.checked, each.dtype) for each in records} == {("their lengths only", "bfloat16")}


def test_wrong_tokens_get_no_number(tmp_path, monkeypatch) -> None:
    answer = served_models.Transcription.answer

    def other_image(self, request, keep, new_tokens):
        return answer(self, request._replace(scene=request.scene + 1), keep, new_tokens)

    monkeypatch.setattr(served_models.Transcription, "answer", other_image)
    options = serve.Options.of(["bundled"], [64], [1], 1, 1)
    assert serve.run(options, tmp_path, lambda line: None) == 1
    (why,) = record.failures(tmp_path / serve.FILE).values()
    assert why == "WrongResult: vllm: other tokens than those of the transcription in plain PyTorch"
