"""What is measured: the regimes, their sizes, their inputs, and the bytes that the loss cannot do without.

The byte model of one training step of the loss. F: bytes of the student's features, L: of its class logits.

    score reads L; imitate reads 2 L + 2 F and writes L + F                          4 L + 3 F
    fp16, whose gradient is formed in the backward pass: imitate reads all again     6 L + 5 F
    an upstream factor other than 1, fp32 and bf16: scale_ reads and writes L + F    6 L + 5 F

The model knows no caches: levels that fit into one are read from it, and the time may be below the floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from frs_kernels import PRESETS

STRIDES = {"retinanet": (8, 16, 32, 64, 128), "gfl": (8, 16, 32, 64, 128), "faster_rcnn": (4, 8, 16, 32, 64)}
LOGITS = {"retinanet": 720, "gfl": 80, "faster_rcnn": 3}
TITLES = {"retinanet": "RetinaNet", "gfl": "GFL, FCOS", "faster_rcnn": "Faster R-CNN"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CHANNELS = 256


@dataclass(frozen=True)
class Case:
    """One set of inputs, and where the memory for what is computed comes from.

    `scale` is the factor that arrives from upstream: a loss scale, or 1. `memory`: "kept" by the process for the next
    step, or "returned" to the system by the C library as it sees fit (`measure.keep_memory`).
    """

    regime: str
    height: int
    width: int
    batch: int
    dtype: str = "fp32"
    layout: str = "contiguous"
    scale: float = 1.0
    channels: int = CHANNELS
    logits: int | None = None  # the regime's, if None
    levels: int = 5
    memory: str = "kept"

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(N, H, W) a level."""
        strides = STRIDES[self.regime][: self.levels]
        return [(self.batch, math.ceil(self.height / s), math.ceil(self.width / s)) for s in strides]

    @property
    def positions(self) -> int:
        return sum(n * h * w for n, h, w in self.shapes)

    @property
    def k(self) -> int:
        return LOGITS[self.regime] if self.logits is None else self.logits

    @property
    def bytes(self) -> int:
        """That one step must move, by the model above."""
        item = DTYPES[self.dtype].itemsize
        feats, logits = (self.positions * c * item for c in (self.channels, self.k))
        again = self.dtype in ("fp16", "fp64") or self.scale != 1
        return 6 * logits + 5 * feats if again else 4 * logits + 3 * feats

    @property
    def weights(self) -> dict[str, Any]:
        return dict(PRESETS[self.regime])

    @property
    def title(self) -> str:
        parts = [TITLES[self.regime], f"{self.height}×{self.width}", f"batch {self.batch}", self.dtype]
        parts += [] if self.layout == "contiguous" else [self.layout]
        parts += [] if self.scale == 1 else [f"× {self.scale:g}"]
        parts += [] if self.memory == "kept" else [f"memory {self.memory}"]
        return ", ".join(parts)

    def key(self) -> dict[str, Any]:
        return asdict(self)

    def inputs(self, device: str) -> list[list[Tensor]]:
        """Student's and teacher's features, student's and teacher's logits; the student's require a gradient.

        Logits are normal around -5 with a deviation of 2: a trained head's, mostly background.
        """
        return [
            self._levels(self.channels, 1.0, 0.0, device, grad=True),
            self._levels(self.channels, 1.0, 0.0, device, grad=False),
            self._levels(self.k, 2.0, -5.0, device, grad=True),
            self._levels(self.k, 2.0, -5.0, device, grad=False),
        ]

    def _levels(self, channels: int, deviation: float, mean: float, device: str, grad: bool) -> list[Tensor]:
        memory = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        made = []
        for n, h, w in self.shapes:
            x = torch.randn(n, channels, h, w, device=device).mul_(deviation).add_(mean)
            made.append(x.to(DTYPES[self.dtype]).contiguous(memory_format=memory).requires_grad_(grad))
        return made


def loss_cases(device: str, quick: bool) -> Iterator[Case]:
    """The grid: every regime at every size in fp32, and at one size every dtype, layout and an upstream scale.

    On a GPU every dtype at every size, the sizes that matter most first: time may run out. On the CPU two sizes also
    with memory returned.
    """
    sizes = [(400, 672, 1), (400, 672, 16), (800, 1344, 2), (1344, 2016, 1)]
    if device == "cuda":
        sizes = [(800, 1344, 2), (800, 1344, 8), (512, 512, 1), (800, 1344, 16), (1344, 2016, 2)]
    if quick:
        sizes = [(256, 320, 1)]
    elif device == "cpu":
        for size in ((400, 672, 1), (800, 1344, 2)):
            yield from (Case(regime, *size, memory="returned") for regime in STRIDES)
    main = sizes[0]
    for size in sizes:
        for dtype in ("fp32", "bf16", "fp16") if size == main or device == "cuda" else ("fp32",):
            yield from (Case(regime, *size, dtype) for regime in STRIDES)
    for regime in STRIDES:
        base = Case(regime, *main)
        yield replace(base, layout="channels_last")
        yield replace(base, scale=3.0)
        yield replace(base, dtype="fp16", scale=1024.0)
