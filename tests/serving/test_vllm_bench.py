"""`python -m bench serve` with vLLM, in miniature. No time decides a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import record, serve, stages
from bench.serve import Serving

ROOT = Path(__file__).parent.parent.parent
CODE = """
import sys
from bench import __main__ as command, serve, served_models, stages
serve.NEW_TOKENS = 4
{change}
arguments = ["--concurrency", "1", "3", "--keep", "64", "--requests", "6", "--rounds", "1"]
sys.exit(command.main(["serve", "--model", sys.argv[1], *arguments, "--out", sys.argv[2]]))
"""


def run(folder: Path, model: str, change: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own: engines of other tests change classes of transformers."""
    command = [sys.executable, "-c", CODE.format(change=change), model, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def read(folder: Path, done: subprocess.CompletedProcess) -> list[Serving]:
    assert done.returncode == 0, done.stderr[-3000:]
    return record.read(folder / serve.FILE, Serving)


def require_right(records: list[Serving], text: int) -> None:
    """The tokens of prompts and of the KV cache, which follow from `keep`, and engines that sleep."""
    assert [(r.concurrency, r.backend) for r in records] == [(c, name) for c in (1, 3) for name in ("vllm", "vtc 64")]
    for each in records:
        assert each.prompt_tokens == text + (each.keep or 576)
        own = -(-(each.prompt_tokens + 4) // 32) * 32  # whole blocks
        assert own <= each.kv_tokens <= own * each.concurrency
        assert each.kv_tokens < each.kv_capacity
        assert each.preempted == 0
        assert each.others_busy >= 0
        assert each.vllm
    assert all((r.ttft_ratio_50 is None) == (r.keep is None) for r in records)


def test_the_bundled_model(tmp_path) -> None:
    done = run(tmp_path, "bundled")
    records = read(tmp_path, done)
    require_right(records, text=11)
    assert {each.checked for each in records} == {"plain PyTorch"}
    assert serve.tables(records) in done.stdout


def test_a_narrow_7b_with_weights_that_vllm_makes_up(tmp_path) -> None:
    narrow = "narrow = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=2)\n"
    change = narrow + 'stages.MODELS["LLaVA-1.5-7B"] = (narrow, narrow | {"vocab_size": 32064})'
    records = read(tmp_path, run(tmp_path, "7b", change))
    require_right(records, text=stages.TEXT_TOKENS)
    assert {(each.checked, each.dtype) for each in records} == {("their lengths only", "bfloat16")}
