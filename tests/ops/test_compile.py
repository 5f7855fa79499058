"""Every kernel compiles to machine code for NVIDIA and AMD GPUs, without one, and stays within its budget.

`compile_budgets.csv` holds each kernel's budget for each minor version of Triton and each GPU: registers a thread, and
bytes of shared memory. No kernel may spill, whatever the version. After a change that is worth more registers:
`python tests/ops/test_compile.py --write`, with each version of Triton.
"""

import ast
import csv
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = 64 * 1024  # gfx942 has the least
LOOP = "--attention-loop"
WRITE = "python tests/ops/test_compile.py --write"
BUDGETS = Path(__file__).resolve().parent / "compile_budgets.csv"
INTEGERS = {"fp32": "i32", "fp16": "i16", "bf16": "i16"}


FLOATS = ("fp32", "fp16", "bf16")
COPIED = ("fp32", "fp16")  # by bytes: bf16 is no different from fp16
ATTENTION = "cls_attention._cls_attention_kernel"


class Variant(NamedTuple):
    kernel: str
    name: str
    dtypes: tuple[str, ...]
    types: dict  # of pointers and tuples; P is the dtype under test, INT the integer of its size
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 3
    layouts: tuple[bool, ...] = (True, False)  # dense: as most tensors are; and not


def variants(target_name: str):
    """Each kernel as its launcher starts it for real models.

    ViT-L at 336 px and SigLIP, head dims up to 128, three scored layers, a row of 16,384, a cache of 32 layers.
    """
    from vtc_kernels import tuning

    four = {"query_ptr": "*P", "key_ptr": "*P", "value_ptr": "*P", "out_ptr": "*P", "cls_probs_ptr": "*fp32"}
    for num_features in (64, 80, 128):
        for size, dtypes in ((2, ("fp16", "bf16")), (4, ("fp32",))):
            for dense in (True, False):
                kind, arch, _ = TARGETS[target_name]
                capability = divmod(arch, 10) if kind == "cuda" else None
                m, n, d, warps, stages, peel = tuning.attention_blocks(num_features, size, capability, not dense)
                blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, "NUM_FEATURES": num_features, "DENSE": dense}
                blocks |= {"WIDEN": False, "NEGATIVE": False, "FAR": False}
                blocks |= tuning.attention_split(577, m, n, peel)
                step = 16 * num_features if dense else 2 * 16 * num_features + 1
                blocks |= {"key_stride_n": step, "value_stride_n": step}
                name = f"D={num_features} {8 * size} bit{'' if dense else ' strided'}"
                yield Variant(ATTENTION, name, dtypes, four, blocks, warps, stages, (dense,))

    row = {"query_ptrs": ("*P",) * 3, "key_ptrs": ("*P",) * 3, "probs_ptr": "*fp32"}
    for num_features in (64, 80, 128):
        for size, dtypes in ((2, ("fp16", "bf16")), (4, ("fp32",))):
            n, d, warps, stages = tuning.cls_probs_blocks(num_features, size)
            blocks = {"WIDE": False, "NUM_FEATURES": num_features, "NUM_BLOCKS": -(-577 // n), "NUM_STAGES": stages}
            name = f"D={num_features} {8 * size} bit"
            yield Variant(
                "cls_probs._cls_probs_kernel", name, dtypes, row, blocks | {"BLOCK_N": n, "BLOCK_D": d}, warps
            )

    stats = {"logits_ptr": "*fp32", "block_max_ptr": "*fp32", "block_sum_ptr": "*fp32"}
    row = {"query_ptr": "*P", "key_ptr": "*P", **stats}  # 1024: heads that are not split
    hidden = {"mask_ptr": "*u8"}
    for num_features, group, extra in ((64, 1, {}), (128, 1, {}), (1024, 1, {}), (128, 4, hidden)):
        n, d = tuning.score_blocks(num_features)
        constexprs = {"GROUP": group, "BLOCK_N": n, "BLOCK_D": d} | dict.fromkeys(set(hidden) - set(extra))
        yield Variant("row_scores._logits_kernel", f"D={num_features} G={group}", FLOATS, row | extra, constexprs)
    for num_tokens in (577, 16384, 131072):
        h, n, s = tuning.head_mean_blocks(32, -(-num_tokens // tuning.score_blocks(128)[0]))
        blocks = {"BLOCK_H": h, "BLOCK_N": n, "BLOCK_S": s}
        yield Variant(
            "row_scores._head_mean_kernel", f"H=32 N={num_tokens}", ("fp32",), stats | {"scores_ptr": "*fp32"}, blocks
        )

    for num_tokens, num_layers, num_heads in ((576, 1, 1), (576, 3, 16), (16384, 1, 1)):
        n, warps = tuning.topk_block(num_tokens)
        blocks = {"NUM_LAYERS": num_layers, "NUM_HEADS": num_heads, "ENSEMBLE": "sum", "BITS": 32}
        blocks |= {"BLOCK_N": n, "NUM_BLOCKS": -(-num_tokens // n)}
        pointers = {"scores_ptr": "*P", "indices_ptr": "*i64"}
        if num_tokens > n or num_layers > 1:
            pointers["total_ptr"] = "*fp32"
        else:
            blocks["total_ptr"] = None
        yield Variant(
            "topk._topk_kernel", f"N={num_tokens} L={num_layers} H={num_heads}", FLOATS, pointers, blocks, warps
        )

    for num_layers, num_heads in ((1, 1), (3, 16)):
        n, k, c, warps = tuning.select_blocks(576, 1024)
        blocks = {"NUM_LAYERS": num_layers, "NUM_HEADS": num_heads, "ENSEMBLE": "sum", "BITS": 32}
        blocks |= {"BLOCK_N": n, "BLOCK_K": k, "BLOCK_C": c}
        pointers = {"scores_ptr": "*fp32", "x_ptr": "*INT", "features_ptr": "*INT"}
        pointers |= {"indices_ptr": "*i64", "total_ptr": "*fp32"}
        yield Variant("select._select_kernel", f"N=576 L={num_layers} H={num_heads}", COPIED, pointers, blocks, warps)

    for types in (("*INT",), ("*INT", "*i64", "*u8")):  # hidden states, positions, a mask
        k, d = tuning.compact_blocks(1024)
        pointers = {"x_ptrs": types, "indices_ptr": "*i64", "out_ptrs": types}
        pointers |= {"x_strides": (("i64",) * 3,) * len(types), "num_features": ("i32",) * len(types)}
        yield Variant(
            "compact._compact_kernel", f"{len(types)} tensors", COPIED, pointers, {"BLOCK_K": k, "BLOCK_D": d}
        )
    k, d, warps = tuning.compact_kv_blocks(128)
    pointers = {"addresses_ptr": "*i64", "indices_ptr": "*i64", "out_ptr": "*INT"}
    for aligned in (False, True):
        blocks, name = {"ALIGNED": aligned, "BLOCK_K": k, "BLOCK_D": d}, "aligned" if aligned else "unaligned"
        yield Variant("compact_kv._compact_kv_kernel", name, COPIED, pointers, blocks, warps)
    pointers = {"x_ptrs": ("*P",) * 64, "addresses_ptr": "*i64"}
    yield Variant("compact_kv._table_kernel", "64 tensors", ("bf16",), pointers, {}, 1)

    # PruMerge has counts, VisionZip has none.
    counted = {"targets_ptr": "*i64", "counts_ptr": "*i64"}
    for size, dtypes in ((2, ("fp16", "bf16")), (4, ("fp32",))):
        all_left = {"left_ptr": "*P"}, dict.fromkeys(counted)
        for name, extra, constant in (("", counted, {"left_ptr": None}), (" all", *all_left)):
            k, n, c, warps = tuning.similarity_blocks(size, extra is counted)
            blocks = {"WIDEN": False, "BLOCK_K": k, "BLOCK_N": n, "BLOCK_C": c, "NUM_FEATURES": 1024}
            pointers = {"right_ptr": "*P", "similarity_ptr": "*fp32"} | extra
            yield Variant(
                "similarity._similarity_kernel",
                f"{8 * size} bit{name}",
                dtypes,
                pointers,
                blocks | constant,
                warps,
                num_stages=2,
            )
    n, r = tuning.softmax_blocks()
    pointers = {"similarity_ptr": "*fp32"}
    yield Variant("similarity._softmax_kernel", "", ("fp32",), pointers, {"BLOCK_N": n, "BLOCK_R": r})
    row = {"targets_ptr": "*i64", "weight_ptr": "*fp32"}
    for num_tokens in (576, 16384):
        n, warps = tuning.mix_block(num_tokens)
        blocks = {"NUM_BLOCKS": -(-num_tokens // n), "BLOCK_N": n}
        pointers = row | {"similarity_ptr": "*fp32", "counts_ptr": "*i64", "mix_ptr": "*fp32"}
        yield Variant("merge_neighbors._neighbors_kernel", f"N={num_tokens}", ("fp32",), pointers, blocks, warps)
        pointers = row | {"nearest_ptr": "*i32", "mix_ptr": "*fp32"}
        yield Variant("merge_nearest._members_kernel", f"N={num_tokens}", ("fp32",), pointers, blocks, warps)
    k, n = tuning.nearest_blocks()
    pointers = row | {"similarity_ptr": "*fp32", "nearest_ptr": "*i32"}
    yield Variant("merge_nearest._nearest_kernel", "", ("fp32",), pointers, {"BLOCK_K": k, "BLOCK_N": n})
    r, n, d = tuning.weighted_sum_blocks()
    blocks = {"ROUND": False, "BLOCK_R": r, "BLOCK_N": n, "BLOCK_D": d}
    pointers = {"mix_ptr": "*fp32", "x_ptr": "*P", "features_ptr": "*P"}
    for name, counts, constant in (("counts", {"counts_ptr": "*i64"}, {}), ("no counts", {}, {"counts_ptr": None})):
        yield Variant(
            "similarity._weighted_sum_kernel", name, FLOATS, pointers | counts, blocks | constant, num_stages=1
        )

    pointers = {"similarity_ptr": "*fp32", "indices_ptr": "*i64", "order_ptr": "*i64"}
    for num_tokens, extra in ((576, {}), (576, {"allowed_ptr": "*u8", "counts_ptr": "*i64"}), (4096, {})):
        m, n, warps = tuning.maxmin_blocks(num_tokens)
        blocks = {"BLOCK_M": m, "BLOCK_N": n} | dict.fromkeys({"allowed_ptr", "counts_ptr"} - set(extra))
        name = f"N={num_tokens}{' allowed, counts' if extra else ''}"
        yield Variant("maxmin._maxmin_kernel", name, ("fp32",), pointers | extra, blocks, warps)

    row = {"query_ptr": "*P", "key_ptr": "*P", "shift_ptr": "*fp32"}
    own, sums = {"inverse_ptr": "*fp32"}, {"sums_ptr": "*fp32"}
    for num_features, packed in ((64, False), (80, False), (128, False), (80, True)):
        for size, dtypes in ((2, ("fp16", "bf16")), (4, ("fp32",))):
            for dense in (True, False):
                m, n, d, warps, stages = tuning.received_blocks(num_features, size, not dense)
                blocks = {"WIDEN": False, "DENSE": dense, "FAR": False, "NUM_FEATURES": num_features}
                blocks |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, **({} if packed else {"spans_ptr": None})}
                step = 16 * num_features if dense else 2 * 16 * num_features + 1
                blocks |= {"query_stride_n": step, "key_stride_n": step}
                name = f"D={num_features} {8 * size} bit{' packed' if packed else ''}{'' if dense else ' strided'}"
                spans = {"spans_ptr": "*i32"} if packed else {}
                for kernel, given, more, block in (
                    ("_normalizers_kernel", "", own, n),
                    ("_sums_kernel", "", own | sums, m),
                    ("_sums_kernel", " lse", sums, m),
                ):
                    constants = {"NUM_BLOCKS": 0 if packed else -(-577 // block)} | blocks
                    constants |= {} if "inverse_ptr" in more else {"inverse_ptr": None}
                    pointers = row | more | spans
                    kernel = f"received.{kernel}"
                    yield Variant(kernel, name + given, dtypes, pointers, constants, warps, stages, (dense,))
    h, c = tuning.mean_blocks(16)
    pointers = {"sums_ptr": "*fp32", "result_ptr": "*fp32"}
    for name, spans, constant in (("packed", {"spans_ptr": "*i32"}, {}), ("H=16", {}, {"spans_ptr": None})):
        blocks = {"BLOCK_H": h, "BLOCK_C": c} | constant
        yield Variant("received._mean_kernel", name, ("fp32",), pointers | spans, blocks)

    # MMTok has neither weights nor counts. Beyond 1024 rows the terms of a lane are added one after the other.
    pointers = {
        "cover_ptr": "*fp32",
        "cover_stride_n": "i64",
        "covered_ptr": "*fp32",
        "indices_ptr": "*i64",
        "order_ptr": "*i64",
    }
    given = {"weight_ptr": "*fp32", "allowed_ptr": "*u8", "counts_ptr": "*i64"}
    for num_rows, num_columns, extra in ((576, 576, {}), (576, 576, given), (1024, 4096, given), (4096, 4096, given)):
        r, lanes, m, g, w = tuning.coverage_blocks(num_rows, num_columns)
        blocks = {"BLOCK_R": r, "BLOCK_L": lanes, "BLOCK_M": m, "BLOCK_G": g, "BLOCK_W": w}
        blocks |= {"NUM_BLOCKS": -(-num_rows // r)} | dict.fromkeys(set(given) - set(extra))
        name = f"R={num_rows} N={num_columns}{' weight allowed counts' if extra else ''}"
        yield Variant("coverage._coverage_kernel", name, ("fp32",), pointers | extra, blocks, 8)


def compile_variant(variant: Variant, dtype: str, dense: bool, target_name: str):
    """Compile as for tensors whose last axis is contiguous and that are 16-byte aligned; or, not dense, for any."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"vtc_kernels.{module}"), function)
    types = variant.types
    signature = {a: "i64" if "stride" in a else "i32" for a in kernel.arg_names}
    signature |= dict.fromkeys({"scale", "lse_scale"} & {*signature}, "fp32")
    signature |= {argument: concrete(kind, dtype) for argument, kind in types.items()}
    constants, attributes = dict(variant.constexprs), {}
    if dense:
        strides = [a for a in kernel.arg_names if "_stride_" in a]
        following = [*strides, ""][1:]
        ends = [a for a, b in zip(strides, following, strict=True) if a.split("_")[0] != b.split("_")[0]]
        ends = [end for end in ends if end not in types]
        constants |= dict.fromkeys(ends, 1)
        aligned = [*types, *(set(strides) - set(ends))]
        for argument in set(aligned) - set(constants) - {"x_strides", "num_features"}:
            at = kernel.arg_names.index(argument)
            width = len(types[argument]) if isinstance(types.get(argument), tuple) else 0
            for path in [(at, i) for i in range(width)] or [(at,)]:
                attributes[path] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=attributes),
        target=GPUTarget(*TARGETS[target_name]),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )


def compile_all(target_name: str) -> list[dict]:
    """Compile everything for one target; runs in a process of its own, where the kernels are not interpreted."""
    results = []
    for variant in variants(target_name):
        cases = [(dtype, True) for dtype in variant.dtypes] + [(variant.dtypes[-1], False)]
        for dtype, dense in cases:
            if dense not in variant.layouts:
                continue
            compiled = compile_variant(variant, dtype, dense, target_name)
            registers, spilled = usage(compiled)
            results.append(
                {
                    "kernel": variant.kernel,
                    "variant": variant.name,
                    "what": f"{dtype}, {'dense' if dense else 'strided'}",
                    "registers": registers,
                    "spilled": spilled,
                    "shared": compiled.metadata.shared,
                }
            )
    return results


def attention_loop() -> dict:
    """The machine instructions of the loop over keys, for LLaVA-1.5 in bf16 on Hopper, and its block sizes."""
    (variant,) = (v for v in variants("sm_90") if (v.kernel, v.name) == (ATTENTION, "D=64 16 bit"))
    compiled = compile_variant(variant, "bf16", True, "sm_90")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = importlib.import_module("triton").knobs.nvidia.nvdisasm.path
        text = subprocess.check_output([tool, "-c", file.name], text=True)
    code, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append(instruction[1])
            back = re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loops.append(code[labels[back[1]] :])
    (loop,) = (loop for loop in loops if any("GMMA" in instruction for instruction in loop))
    return {"loop": loop, "warps": variant.num_warps, **variant.constexprs}


def concrete(kind, dtype: str):
    """A type, or a tuple of types, with P and INT replaced."""
    if isinstance(kind, tuple):
        return tuple(concrete(one, dtype) for one in kind)
    return {"*P": f"*{dtype}", "*INT": f"*{INTEGERS[dtype]}"}.get(kind, kind)


def usage(compiled) -> tuple[int, int]:
    """Registers a thread, and bytes (NVIDIA) or registers (AMD) that went to memory.

    AMD's are vector registers; its scalar ones spill into those.
    """
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
        (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        return int(registers), int(spilled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    (registers,), (stack,), (local,) = (re.findall(rf"{word}:(\d+)", text) for word in ("REG", "STACK", "LOCAL"))
    return int(registers), int(stack) + int(local)


def compile_apart(target: str, cache: str):
    """`compile_all`, or `attention_loop`, in a fresh process without Triton's environment variables."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), target], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout)


COLUMNS = ("triton", "kernel", "variant", "target", "registers", "shared")


def installed() -> str:
    """The minor version of Triton, such as "3.6"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def read_budgets() -> dict[tuple[str, str, str], dict[str, int]]:
    """The budgets of the installed version."""
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], row["variant"], row["target"]): {
                "registers": int(row["registers"]),
                "shared": int(row["shared"]),
            }
            for row in csv.DictReader(file)
            if row["triton"] == installed()
        }


def write_budgets() -> None:
    """What every kernel needs with the installed Triton, and an eighth more. Rows of other versions are kept."""
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        rows = [[row[column] for column in COLUMNS] for row in csv.DictReader(file) if row["triton"] != installed()]
    for target in TARGETS:
        most: dict[tuple[str, str], dict[str, int]] = {}
        with tempfile.TemporaryDirectory() as cache:
            for result in compile_apart(target, cache):
                row = most.setdefault((result["kernel"], result["variant"]), {"registers": 0, "shared": 0})
                for what in row:
                    row[what] = max(row[what], result[what])
        for (kernel, variant), row in most.items():
            registers = min(255 if target != "gfx942" else 512, -(-row["registers"] * 9 // 8) // 8 * 8 + 8)
            rows.append([installed(), kernel, variant, target, str(registers), str(row["shared"] * 9 // 8)])
    with BUDGETS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(rows))


def complaints(target: str, results: list[dict], budgets: dict) -> list[str]:
    """Every variant that spills, does not fit, or needs more than its budget, if there are budgets."""
    found = []
    for result in results:
        limits = {"spilled": 0, "shared": SHARED_LIMIT}
        if budgets:
            budget = budgets[result["kernel"], result["variant"], target]
            limits |= budget | {"shared": min(budget["shared"], SHARED_LIMIT)}
        found += [
            f"{result['kernel']} {result['variant']} ({result['what']}) on {target}: {what} {result[what]} > {limit}"
            for what, limit in limits.items()
            if result[what] > limit
        ]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes of a processor; runs on machines without a GPU")
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_stay_within_their_budgets(target, tmp_path):
    budgets = read_budgets()
    results = compile_apart(target, str(tmp_path))
    assert not complaints(target, results, {})
    if not budgets:
        pytest.skip(
            f"no kernel spills, but {BUDGETS.name} has no budgets of Triton {installed()}; to write them: {WRITE}"
        )
    compiled = {(r["kernel"], r["variant"], target) for r in results}
    assert compiled == {key for key in budgets if key[2] == target}, f"{BUDGETS.name} has other rows; {WRITE}"
    assert not complaints(target, results, budgets)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a minute; runs on machines without a GPU")
def test_the_loop_of_attention_has_nothing_to_spare(tmp_path):
    """On Hopper, 64 query rows take the tensor cores 4 clocks a key, and the exponentials as many.

    The instructions must not take much longer to issue: one a clock in each quarter of an SM, which has one warp of the
    program's four.
    """
    found = compile_apart(LOOP, str(tmp_path))
    count = Counter(instruction.split()[0] for instruction in found["loop"])

    def of(*starts: str) -> int:
        return sum(count[name] for name in count if name.startswith(starts))

    clocks = len(found["loop"]) * found["warps"] / 4 / found["BLOCK_N"] / (found["BLOCK_M"] / 64)
    assert clocks <= 4.6, count
    exponentials = found["BLOCK_M"] * found["BLOCK_N"] // (32 * found["warps"])
    assert of("HGMMA") == 8
    assert of("MUFU") == of("MUFU.EX2") == exponentials + 2  # one of each row to rescale
    assert of("FFMA") == exponentials + 2, "the scale is not folded into the subtraction"
    assert of("BAR") == 2  # before a buffer is read, and before it is filled again
    copies = of("LDGSTS")
    assert copies == 2 * found["BLOCK_N"] * 64 * 2 // 16 // (32 * found["warps"])
    # An address is one addition to what was known before the loop; so are the three descriptors of a wgmma operand.
    assert not of("IMAD.WIDE", "UIMAD.WIDE", "IMAD.HI", "LEA.HI", "SHF.L.U64", "SHF.R.S64")
    carries = sum(amount for name, amount in count.items() if ".X" in name and not name.startswith("U"))
    assert carries <= copies + 1, count
    assert not of("LDL", "STL", "LDG.", "STG", "ISETP.GE.U64")


def test_a_spill_or_an_excess_is_a_complaint():
    result = {
        "kernel": "a._b_kernel",
        "variant": "D=1",
        "what": "fp16, dense",
        "registers": 64,
        "spilled": 0,
        "shared": 9,
    }
    budgets = {("a._b_kernel", "D=1", "sm_90"): {"registers": 64, "shared": 9}}
    assert not complaints("sm_90", [result], budgets)
    assert not complaints("sm_90", [result | {"registers": 65}], {})
    for what, amount in (("registers", 65), ("spilled", 1), ("shared", 10)):
        (complaint,) = complaints("sm_90", [result | {what: amount}], budgets)
        assert complaint == f"a._b_kernel D=1 (fp16, dense) on sm_90: {what} {amount} > {amount - 1}"
    assert complaints("sm_90", [result | {"spilled": 1}], {})
    assert complaints("sm_90", [result | {"shared": SHARED_LIMIT + 1}], {})


def test_writing_budgets_keeps_those_of_other_versions(tmp_path, monkeypatch):
    module = sys.modules[__name__]
    result = {"kernel": "k", "variant": "v", "what": "w", "registers": 64, "spilled": 0, "shared": 80}
    monkeypatch.setattr(module, "BUDGETS", tmp_path / "budgets.csv")
    monkeypatch.setattr(module, "TARGETS", {"sm_90": ("cuda", 90, 32)})
    monkeypatch.setattr(module, "compile_apart", lambda target, cache: [result])
    old = f"{','.join(COLUMNS)}\n0.1,k,v,sm_90,8,0\n{installed()},gone,v,sm_90,8,0\n"
    BUDGETS.write_text(old, encoding="utf-8")
    write_budgets()
    _, kept, written = BUDGETS.read_text(encoding="utf-8").splitlines()
    assert kept == "0.1,k,v,sm_90,8,0"
    assert written == f"{installed()},k,v,sm_90,80,90"
    assert read_budgets() == {("k", "v", "sm_90"): {"registers": 80, "shared": 90}}


def test_every_loop_runs_in_the_interpreter_of_every_version():
    """Triton 3.6's cannot take a tensor as a bound of `range` with NumPy 2.4 or newer; `while` takes one.

    A `while` is not pipelined, so a loop whose loads feed `tl.dot` has a bound that is known at compile time.
    """
    for path in sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]:
            for node in ast.walk(function):
                if isinstance(node, ast.For):
                    names = {name.id for name in ast.walk(node.iter) if isinstance(name, ast.Name)}
                    changing = {
                        name for name in names - {"range", "tl", "len", "x_ptrs", "key_ptrs"} if name != name.upper()
                    }
                    assert not changing, f"{path.name}:{node.lineno} {ast.unparse(node.iter)}"


def test_every_kernel_is_compiled_here():
    sources = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))
    found = {
        f"{path.stem}.{name}"
        for path in sources
        for name in re.findall(r"@triton\.jit\s+def (_\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }
    assert found == {variant.kernel for variant in variants("sm_90")}


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write_budgets()
    else:
        print(json.dumps(attention_loop() if sys.argv[1] == LOOP else compile_all(sys.argv[1])))
