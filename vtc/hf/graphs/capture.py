"""Functions that are recorded once and then replayed without Python: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]


class Recorder(Protocol):
    """What records functions. All that one recorder has recorded share their memory, so none may run beside another."""

    def begin(self) -> None:
        """Let what is launched from now on wait for the replays before, which another stream may have launched."""

    def record(self, function: Callable[[], Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Replay:
        """Run `function` and return its replay.

        Parameters
        ----------
        function : callable
            It may read `inputs`, parameters and buffers. It may write `outputs` and memory of its own. It reads no
            value back to the host, and its shapes do not depend on values.
        inputs : sequence of Tensor
            Tensors whose values change from replay to replay.
        outputs : sequence of Tensor
            What is read after a replay. All other memory of the function holds anything then.

        Raises
        ------
        RuntimeError
            If the function does something that cannot be replayed.
        """


class CudaRecorder:
    """Records CUDA graphs on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # captures need one that is not the default
        self._pool = torch.cuda.graph_pool_handle()
        self._last = torch.cuda.current_stream(device)

    def begin(self) -> None:
        """As `Recorder.begin`."""
        stream = torch.cuda.current_stream(self.device)
        if stream != self._last:
            stream.wait_stream(self._last)
            self._last = stream

    def record(self, function: Callable[[], Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Replay:
        """As `Recorder.record`."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            # Libraries initialise, and kernels compile, at their first call on a stream. A capture allows neither.
            with torch.cuda.stream(self._stream):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Calls of other threads go on meanwhile; only those of this one are captured.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        return graph.replay
