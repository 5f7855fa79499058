"""Block sizes and warp counts of every kernel, and whether the kernels are interpreted.

The sizes are functions of the shapes, never of the batch size or of timings: an image's result must not depend on its
batch mates or on the run. Nothing is autotuned.

In some kernels a thread reads or overwrites what another thread of the same program has stored, after
`tl.debug_barrier()`. NVIDIA GPUs order such accesses at a barrier. On AMD GPUs the compiled barrier waits for threads,
not for their stores: on gfx942 the accesses keep their order, as a program runs on one compute unit with one L1 cache;
on RDNA, where a program may run on two, this is untested.
"""

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether ``TRITON_INTERPRET=1`` was set when the kernels were imported: then they run on CPU tensors, slowly."""

# Elements of a two-dimensional fp32 tile that four warps hold without spilling, whatever the strides: 32 a thread.
_TILE = 4096


def score_blocks(num_features: int) -> tuple[int, int]:
    """BLOCK_N, BLOCK_D for the logits: a tile of whole key rows, with few keys so that even B = 1 fills a GPU."""
    block_d = triton.next_power_of_2(num_features)
    return max(1, min(32, _TILE // block_d)), block_d


def cls_probs_blocks(num_features: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_N, BLOCK_D, and the numbers of warps and of stages, for the [CLS] row: whole key rows, 16 KiB of 16 bit.

    As many rows of fp32 spill on sm_100.
    """
    block_d = triton.next_power_of_2(num_features)
    num_elements = 2 * _TILE if element_size <= 2 else _TILE // 2
    return max(1, min(128, num_elements // block_d)), block_d, 8, 3


def head_mean_blocks(num_heads: int, num_blocks: int) -> tuple[int, int, int]:
    """BLOCK_H, BLOCK_N, BLOCK_S for the mean over heads: tiles with all heads, of columns and of key blocks."""
    block_h = triton.next_power_of_2(num_heads)
    block_s = max(1, min(64, _TILE // (2 * block_h)))
    return block_h, max(1, min(128, _TILE // block_h)), min(block_s, triton.next_power_of_2(num_blocks))


def topk_block(num_tokens: int) -> tuple[int, int]:
    """BLOCK_N and the number of warps: a row of up to 4096 tokens in one block, a longer one in several.

    The loads of all heads are in flight together, so a thread has few tokens: 16 heads of 8 tokens each would spill.
    """
    block_n = min(4096, triton.next_power_of_2(num_tokens))
    return block_n, 4 if block_n <= 512 else 8


GREEDY_COLUMNS = 4096
"""The most columns that `coverage` and `maxmin` take: a program holds a number for each of them."""

SELECT_TOKENS = 1024
"""The longest row that `select` takes in one launch: each of its programs holds the whole row."""


def select_blocks(num_tokens: int, num_features: int) -> tuple[int, int, int, int]:
    """BLOCK_N, BLOCK_K, BLOCK_C, and the number of warps: the whole row, and 2048 elements of tokens at a time."""
    block_n, num_warps = topk_block(num_tokens)
    return block_n, 4, min(512, triton.next_power_of_2(max(1, num_features))), num_warps


def select_parts(num_images: int, num_blocks: int) -> int:
    """How many programs share an image's kept tokens: enough to fill a GPU, as each repeats the search.

    The batch size may count here: whatever the number, a program computes the same and copies bytes.
    """
    return max(1, min(num_blocks, 8, 256 // max(1, num_images)))


def compact_blocks(num_features: int) -> tuple[int, int]:
    """BLOCK_K, BLOCK_D: 1024 elements a program, which is one row of a CLIP ViT-L."""
    block_d = min(1024, triton.next_power_of_2(max(1, num_features)))
    return 1024 // block_d, block_d


def compact_kv_blocks(num_features: int) -> tuple[int, int, int]:
    """BLOCK_K, BLOCK_D, and the number of warps: whole key rows, 4096 elements at a time.

    A thread holds all elements that it moves at a time, and an address for each if strided. With four warps these would
    be 32 elements, which spill.
    """
    block_d = min(1024, triton.next_power_of_2(max(1, num_features)))
    return 4096 // block_d, block_d, 8


ATTENTION_CHOICES: tuple[tuple[int, int, int, int], ...] = (
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
)
"""BLOCK_M, BLOCK_N, warps and pipeline stages of attention in 16 bit that are worth measuring on a GPU."""

MEASURED: dict[tuple[tuple[int, int], int, int], tuple[int, int, int, int]] = {}
"""The fastest of them by compute capability, head dim and bytes of an element, as `python -m bench gpu` prints it."""


def attention_blocks(
    num_features: int, element_size: int, capability: tuple[int, int] | None = None, strided: bool = False
) -> tuple[int, int, int, int, int, bool]:
    """BLOCK_M, BLOCK_N, BLOCK_D, the numbers of warps and of pipeline stages, and whether to peel, for attention.

    In 16 bit they are those of `MEASURED`, or else four programs with at most 128 registers a thread share a Hopper
    SM. Strided inputs need an address for each element. fp32 stays off the tensor cores and keeps operands in
    registers: smaller tiles, and no loads ahead of their use.

    Peeling is to give the keys that do not fill a block a small one of their own, so that the others need no mask.
    Where products take their operands from registers, both kinds of blocks would keep the queries there, and wide ones
    would spill.
    """
    block_d = max(16, triton.next_power_of_2(num_features))  # the least that tensor cores take
    from_shared = capability is not None and capability[0] in (9, 10)  # wgmma and tcgen05
    peel = element_size == 2 and not strided and (block_d <= 64 or (block_d <= 128 and from_shared))
    if element_size == 4 and strided and block_d <= 128:
        chosen = 16, 32, 8, 1
    elif element_size == 4:
        chosen = (16 if 64 < block_d <= 128 else 32), 16, 4 if block_d <= 64 else 8, 1
    elif peel:
        shipped = (64, 64, 4, 3) if block_d <= 64 else (64, 32, 4, 2)
        chosen = MEASURED.get((capability, num_features, element_size), shipped) if capability else shipped
    else:
        chosen = 64, 32 if block_d <= 128 else 16, 4 if block_d <= 64 else 8, 2
    block_m, block_n, num_warps, num_stages = chosen
    return block_m, block_n, block_d, num_warps, num_stages, peel


def attention_split(num_tokens: int, block_m: int, block_n: int, peel: bool) -> dict[str, int | bool]:
    """NUM_BLOCKS, MASKED, REST and EVEN: how attention goes over N keys, and whether the patches fill their blocks."""
    rest = num_tokens % block_n
    return {
        "NUM_BLOCKS": num_tokens // block_n if peel else triton.cdiv(num_tokens, block_n),
        "MASKED": not peel and rest > 0,
        "REST": max(16, triton.next_power_of_2(rest)) if peel and rest else 0,
        "EVEN": (num_tokens - 1) % block_m == 0,
    }


def is_dense(x: Tensor) -> bool:
    """Whether 8 neighbouring elements of a [B, H, N, D] tensor are 16 aligned bytes, or more, wherever they start."""
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.stride(3) == 1 and all(step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, None for anything else."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def received_blocks(num_features: int, element_size: int, strided: bool = False) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D, and the numbers of warps and of stages, for the sums of attention's columns.

    Four programs share a Hopper SM: on it the exponentials take longer than everything else. With head dims above 64,
    loads ahead of their use would need more shared memory than a gfx942 has. fp32 stays off the tensor cores and keeps
    operands in registers: smaller tiles. Strided inputs need an address for each element.
    """
    if element_size == 4:
        return 32, 32, 16, 8, 1
    block_d = min(128, max(16, triton.next_power_of_2(num_features)))  # 16 is the least that tensor cores take
    if strided:
        return 32, 32, block_d, 4, 2
    return 64, 64, block_d, 4, 2 if block_d <= 64 else 1


def mean_blocks(num_heads: int) -> tuple[int, int]:
    """BLOCK_H, BLOCK_C for the mean over heads: few columns a program, so that one image has several."""
    return min(32, triton.next_power_of_2(num_heads)), 64


def similarity_blocks(element_size: int, targets: bool) -> tuple[int, int, int, int]:
    """BLOCK_K, BLOCK_N, BLOCK_C, and the number of warps, for similarities of targets or of two sets of tokens.

    fp32 stays off the tensor cores and keeps operands in registers: smaller tiles. Two sets have twice the strides,
    and fewer features at a time leave registers for them.
    """
    if element_size == 4:
        return 32, 32, 16, 4
    return (32, 64, 64, 8) if targets else (32, 64, 32, 4)


def maxmin_blocks(num_tokens: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, and the number of warps for max-min distance: the whole row, and 8192 similarities at a time.

    So many are in flight together, as one program reads all similarities of its image.
    """
    block_n = triton.next_power_of_2(num_tokens)
    return max(1, min(16, 8192 // block_n)), block_n, 4 if block_n <= 512 else 8


def softmax_blocks() -> tuple[int, int]:
    """BLOCK_N, BLOCK_R for the softmax of similarities: few rows a program, so that one image has several."""
    return 64, 32


def nearest_blocks() -> tuple[int, int]:
    """BLOCK_K, BLOCK_N for each token's nearest target: few tokens a program, so that one image has several."""
    return 16, 64


def mix_block(num_tokens: int) -> tuple[int, int]:
    """BLOCK_N and the number of warps for the weights of one sum: up to 2048 tokens in one block."""
    block_n = min(2048, triton.next_power_of_2(num_tokens))
    return block_n, 4 if block_n <= 1024 else 8


def weighted_sum_blocks() -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_N, BLOCK_D for weighted sums of tokens, in fp32."""
    return 32, 16, 32


def coverage_blocks(num_rows: int, num_columns: int) -> tuple[int, int, int, int, int]:
    """BLOCK_R, BLOCK_L, BLOCK_M, BLOCK_G, BLOCK_W for greedy coverage.

    BLOCK_R is 1024, as the order of the sums has it, or fewer where the other rows are 0. A warp has whole tiles of
    BLOCK_L rows and whole strata of BLOCK_M·BLOCK_W columns, so that sums and maxima need no other warp.

    More strata take fewer rounds, but evaluate more columns. For 64 of 576 columns of the bundled model's features
    (softmax): 8 take 395 rounds and 2,636 evaluations, 16 take 232 and 3,083, 32 take 152 and 4,010.
    """
    block_r, block_n = min(1024, triton.next_power_of_2(num_rows)), triton.next_power_of_2(num_columns)
    block_g = min(16, block_n)
    block_w = min(32, block_n // block_g)
    return block_r, min(128, block_r), block_n // (block_g * block_w), block_g, block_w
