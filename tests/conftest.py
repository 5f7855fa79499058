"""Set before anything imports the kernels or the hub: without a GPU the kernels run in Triton's interpreter."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VTC_BACKEND", None)
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
