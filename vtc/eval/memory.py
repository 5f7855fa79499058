"""Which exceptions say that the memory is full."""

import torch

_SAYS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU or of the machine is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _SAYS)
