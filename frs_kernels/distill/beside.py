"""The teacher on a CUDA stream of its own, beside the student's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from frs_kernels.distill.tap import tensors_in

Found = TypeVar("Found")


class Beside:
    """Where the student leaves parts of a GPU idle, small batches above all, the teacher fills them.

        beside.mark(device)                     once the images are there; what is queued later is not waited for
        found = beside.run(teacher, images)     its stream waits for the mark
        beside.join(found)                      before the loss: the current stream waits for the teacher

    Where it is not wanted, on a CPU, and while a graph is captured, all runs in order on the current stream. Both
    streams take memory of their own from PyTorch's allocator.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._streams: dict[torch.device, Any] = {}
        self._ready: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes streams of its own."""
        return {"wanted": self.wanted, "_streams": {}, "_ready": None}

    def mark(self, device: torch.device) -> None:
        self._ready = None
        if self.wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._ready = torch.cuda.current_stream(device).record_event()

    def run(self, teacher: Callable[[Tensor], Found], images: Tensor) -> Found:
        if self._ready is None:
            return teacher(images)
        if images.device not in self._streams:
            self._streams[images.device] = torch.cuda.Stream(images.device)
        stream = self._streams[images.device]
        stream.wait_event(self._ready)
        # Freed, their memory may be used again on the stream that they were made on alone.
        images.record_stream(stream)
        with torch.cuda.stream(stream):
            return teacher(images)

    def join(self, found: Any) -> None:
        if self._ready is None:
            return
        self._ready = None
        for tensor in tensors_in(found):
            current = torch.cuda.current_stream(tensor.device)
            current.wait_stream(self._streams[tensor.device])
            tensor.record_stream(current)
