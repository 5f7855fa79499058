"""Lets torchvision be imported beside a torch for CPUs; for the environment of these tests only.

PyPI's torchvision for Linux is built for CUDA. Beside a torch for CPUs its operators are missing, and its Python code
fails where it refers to two of them. vLLM needs the package for a class that nothing here uses. So the two are declared
just before torchvision is imported, in every process: vLLM starts several.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            _BeforeTorchvision.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
