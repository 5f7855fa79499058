"""The operators' namespace in `torch.library`: the name under which this package was imported.

Several versions of it may be loaded in one process, each under a name of its own.
"""

import torch

NAMESPACE = (__package__ or "").replace(".", "_")
OPERATORS = getattr(torch.ops, NAMESPACE)
