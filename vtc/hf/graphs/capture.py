"""Functions that are recorded once and then replayed without Python: CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vtc.hf.graphs.strict import Strict

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


_ONE_AT_A_TIME = threading.Lock()  # to begin a capture, PyTorch waits for the device, which breaks any other


class CudaRecorder:
    """Records CUDA graphs on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Captures need a stream that is not the default. Nothing else runs there: cuBLAS keeps memory for each stream,
        # and that of this one has to be in the pool of the graphs, which outlives whatever clears it.
        self._stream, self._first = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._failed: list[torch.cuda.CUDAGraph] = []
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
        with _ONE_AT_A_TIME, torch.cuda.device(self.device):
            self._first.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._first):
                with Strict():
                    function()
                # Libraries initialise, and kernels compile, at their first call. A capture allows neither.
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer block puts the stream back: torch.cuda.graph does not if the capture fails.
                with (
                    torch.cuda.stream(self._stream),
                    # Launches of other threads go on meanwhile; only those of this one are captured.
                    torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    function()
            except BaseException:
                self._leave(graph)
                raise
        return graph.replay

    def _leave(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that failed: the allocator may still record to its pool, and ask `graph` for its stream."""
        self._failed.append(graph)
        with contextlib.suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
