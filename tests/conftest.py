"""Set before anything imports the kernels or the hub: without a GPU the kernels run in Triton's interpreter."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VTC_BACKEND", None)
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processor, and so do their subprocesses
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
