"""Every kernel compiles to machine code for NVIDIA and AMD GPUs, without one: no spills, little shared memory."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# kernel: pointer types (P is the dtype under test, INT the integer of its size), then constexprs and warps as the
# launchers choose them for real models: ViT-L at 336 px, head dims up to 128, LLaVA-NeXT's tiles, a row of 16,384.
KERNELS = {
    "scores._logits_kernel": (
        {"query_ptr": "P", "key_ptr": "P", "logits_ptr": "fp32", "block_max_ptr": "fp32", "block_sum_ptr": "fp32"},
        [({"BLOCK_N": 32, "BLOCK_D": 64}, 4), ({"BLOCK_N": 32, "BLOCK_D": 128}, 4)],
    ),
    "scores._head_mean_kernel": (
        {"logits_ptr": "fp32", "block_max_ptr": "fp32", "block_sum_ptr": "fp32", "out_ptr": "fp32"},
        [({"ACCUMULATE": True, "BLOCK_H": 16, "BLOCK_N": 128, "BLOCK_S": 32}, 4)],
    ),
    "topk._topk_kernel": (
        {"scores_ptr": "P", "indices_ptr": "i64"},
        [({"BITS": 32, "BLOCK_N": 1024, "NUM_BLOCKS": 1}, 4), ({"BITS": 32, "BLOCK_N": 4096, "NUM_BLOCKS": 4}, 8)],
    ),
    "compact._compact_kernel": (
        {"x_ptr": "INT", "indices_ptr": "i64", "out_ptr": "INT"},
        [({"BLOCK_K": 1, "BLOCK_D": 1024}, 4)],
    ),
}
DTYPES = {"fp32": "i32", "fp16": "i16", "bf16": "i16"}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = 64 * 1024  # gfx942 has the least


def compile_all(target_name: str) -> list[dict]:
    """Compile everything for one target; runs in a process of its own, where the kernels are not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget(*TARGETS[target_name])
    results = []
    for (name, (pointers, variants)), (dtype, integer), dense in itertools.product(
        KERNELS.items(), DTYPES.items(), (True, False)
    ):
        module, function = name.split(".")
        kernel = getattr(importlib.import_module(f"vtc_kernels.{module}"), function)
        types = {"P": dtype, "INT": integer}
        signature = {argument: "i64" if "stride" in argument else "i32" for argument in kernel.arg_names}
        signature |= {argument: "*" + types.get(kind, kind) for argument, kind in pointers.items()}
        signature |= {"scale": "fp32"} if "scale" in signature else {}
        for constexprs, num_warps in variants:
            constants, attributes = dict(constexprs), {}
            if dense:  # as the launch specializes for most tensors: last axis contiguous, everything 16-byte aligned
                strides = [argument for argument in kernel.arg_names if "stride" in argument]
                ends = [a for a, b in itertools.pairwise([*strides, ""]) if a.split("_")[0] != b.split("_")[0]]
                constants |= dict.fromkeys(ends, 1)
                aligned = [*pointers, *(set(strides) - set(ends))]
                attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
            source = ASTSource(
                kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=attributes
            )
            compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
            results.append(
                {
                    "kernel": f"{name} {dtype} {constants}",
                    "shared": compiled.metadata.shared,
                    "spilled": spilled(compiled),
                }
            )
    return results


def spilled(compiled) -> int:
    """Bytes (NVIDIA) or registers (AMD) that went to memory. AMD's scalar registers spill into vector registers."""
    if "amdgcn" in compiled.asm:
        (count,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return int(count)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    return int(stack) + int(local)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), target], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(DTYPES) * sum(len(variants) for _, variants in KERNELS.values())
    for result in results:
        assert result["spilled"] == 0, f"{result['kernel']} spills on {target}"
        assert result["shared"] <= SHARED_LIMIT, f"{result['kernel']} needs {result['shared']} bytes on {target}"


def test_every_kernel_is_compiled_here():
    sources = sorted((Path(__file__).resolve().parent.parent / "kernels").glob("*.py"))
    found = {
        f"{path.stem}.{name}"
        for path in sources
        for name in re.findall(r"@triton\.jit\s+def (_\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }
    assert found == set(KERNELS)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
