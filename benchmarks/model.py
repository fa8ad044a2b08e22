"""How long a step of the loss should take on a GPU: from bytes, instructions, special functions and launches.

    python benchmarks/model.py [--copy TB/s]     what it predicts for the main grid, on every GPU that it knows

    a part of a launch    the longest of  bytes / copy bandwidth,  instructions / issue rate,  specials / special rate
    a launch              LATENCY and its parts, one after another: imitate goes through all logits, then all features
    a step                its launches, one after another

Set beside the measured time it says at once which of its numbers is wrong. It knows no caches: a step that fits into L2
may be faster. There is no such model of a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grid import DTYPES, STRIDES, Case

ISSUE = 0.775
"""Of the slots in which a scheduler may issue an instruction, those in which one does: assumed, 75 to 80 %."""
LATENCY = 3.5e-6
"""Seconds from the end of a launch to the next one's first block, with its last block's sum: fitted to an H200's
small steps, whose five launches take 17 µs more than their bytes. imitate's early begin is not in it."""


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    clock: float  # Hz, boost
    peak: float  # bytes a second
    schedulers: int = 4  # a multiprocessor; each issues an instruction of a warp a clock
    specials: int = 16  # results of special functions a clock and multiprocessor

    @property
    def issue_rate(self) -> float:
        """Instructions of threads a second."""
        return ISSUE * 32 * self.schedulers * self.multiprocessors * self.clock

    @property
    def special_rate(self) -> float:
        return self.specials * self.multiprocessors * self.clock


DEVICES = {  # by a part of the name that the driver gives
    "H100 80GB HBM3": Device(132, 1.755e9, 3.35e12),
    "H200": Device(132, 1.755e9, 4.8e12),
}


@dataclass(frozen=True)
class Kernel:
    """What a value of the student's tensors costs."""

    tensors: int  # of a value each that are read or written
    instructions: dict[str, tuple[float, float]]  # of a thread, by dtype: contiguous, channels_last
    specials: float = 0  # ex2 and rcp: the exponentials of both logits, and one reciprocal
    around: float = 0  # instructions before and after the loop


# Counted in the machine code for sm_90 by tools/sass.py (docs/codegen-cuda.md): the walks `lines` and `positions`, of
# `score` the loop of five packets. scale_ is a guess: its bytes bound it.
KERNELS = {
    "score": Kernel(1, {"fp32": (2.0, 2.0), "bf16": (0.8, 0.8), "fp16": (0.8, 0.8)}),
    "bce": Kernel(3, {"fp32": (34.6, 43.5), "bf16": (33.7, 38.2)}, 3),
    "bce, loss": Kernel(2, {"fp16": (27.8, 31.6)}, 3),
    "bce, gradient": Kernel(3, {"fp16": (20.4, 26.1)}, 3),
    "mse": Kernel(3, {"fp32": (11.2, 20.2), "bf16": (11.2, 15.1)}),
    "mse, loss": Kernel(2, {"fp16": (8.4, 11.5)}),
    "mse, gradient": Kernel(3, {"fp16": (7.7, 12.9)}),
    "scale_": Kernel(2, {"fp32": (2.0, 2.0), "bf16": (2.0, 2.0)}),
    # The walks `planar` and `interleaved`. Around them a thread takes some 430 instructions for its 64 values where it
    # adds up, 280 where it makes gradients.
    "pkd": Kernel(2, {"fp32": (11.3, 11.8), "bf16": (11.2, 11.5), "fp16": (11.2, 11.2)}, around=6.7),
    "pkd, gradient": Kernel(3, {"fp32": (9.9, 10.4), "bf16": (9.4, 9.7), "fp16": (9.4, 9.7)}, around=4.4),
    "cwd": Kernel(2, {"fp32": (17.8, 20.3), "bf16": (17.1, 20.0), "fp16": (16.8, 19.7)}, 2.5, around=6.7),
    "cwd, gradient": Kernel(3, {"fp32": (16.1, 16.4), "bf16": (15.5, 15.7), "fp16": (15.5, 15.7)}, 2, around=4.4),
}
ROW_LOSSES = ("pkd", "cwd")  # along rows of the features


@dataclass(frozen=True)
class Part:
    kernel: str
    values: int


def launches(case: Case, row_loss: str = "") -> Iterator[tuple[str, list[Part]]]:
    """What a step launches, in order: a name, and the parts that a launch goes through."""
    logits, feats = (case.positions * c for c in (case.k, case.channels))
    if row_loss:
        yield "fill", []  # of the counters with 0
        yield "moments", [Part(row_loss, feats)]
        yield "fill", []  # of the upstream gradient with 1, by autograd
        yield "moments_backward", [Part(f"{row_loss}, gradient", feats)]
        return

    def both(wanted: str) -> list[Part]:
        return [Part(f"bce{wanted}", logits), Part(f"mse{wanted}", feats)]

    yield "fill", []  # of the counter with 0
    yield "score", [Part("score", logits)]
    late = case.dtype in ("fp16", "fp64")
    yield "imitate", both(", loss" if late else "")
    yield "fill", []  # of the upstream gradient with 1, by autograd
    if case.scale != 1:
        yield from (("scale the loss", []), ("scale its gradient", []))
    if late:
        yield "imitate again", both(", gradient")
    else:  # where the factor is 1, scale_ returns on the device
        yield "scale_", [Part("scale_", logits + feats)] if case.scale != 1 else []


def predict(case: Case, device: str, bandwidth: float, row_loss: str = "") -> dict[str, Any] | None:
    """Seconds of a step, and of each part by each limit; None for a device or a dtype that the model does not know.

    Args:
        device: the name that the driver gives.
        bandwidth: of a copy, bytes read and written a second.
        row_loss: of ROW_LOSSES, over the features alone, instead of the richness losses.
    """
    known = next((found for name, found in DEVICES.items() if name in device), None)
    if known is None:
        return None
    seconds, parts = 0.0, []
    for name, inside in launches(case, row_loss):
        seconds += LATENCY
        for part in inside:
            kernel = KERNELS[part.kernel]
            if case.dtype not in kernel.instructions:
                return None
            instructions = kernel.instructions[case.dtype][case.layout == "channels_last"] + kernel.around
            limits = {
                "bytes": part.values * kernel.tensors * DTYPES[case.dtype].itemsize / bandwidth,
                "instructions": part.values * instructions / known.issue_rate,
                "specials": part.values * kernel.specials / known.special_rate,
            }
            limit = max(limits, key=limits.__getitem__)
            seconds += limits[limit]
            parts.append({"launch": name, "kernel": part.kernel, "limit": limit, **limits})
    return {"seconds": seconds, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", type=float, help="TB/s that a copy moves; 90 %% of the peak if not given")
    copy = parser.parse_args().copy
    for name, device in DEVICES.items():
        bandwidth = copy * 1e12 if copy else 0.9 * device.peak
        print(f"{name}, copy {bandwidth / 1e12:.2f} TB/s")
        for size in ((512, 512, 1), (800, 1344, 2), (800, 1344, 16)):
            for dtype in ("fp32", "bf16", "fp16"):
                for regime in STRIDES:
                    case = Case(regime, *size, dtype)
                    print(line(case, name, bandwidth, case.bytes))
                case = Case(next(iter(STRIDES)), *size, dtype)
                for loss in ROW_LOSSES:
                    read = 5 * case.positions * case.channels * DTYPES[dtype].itemsize  # and written: 2F, then 3F
                    print(line(case, name, bandwidth, read, loss))


def line(case: Case, device: str, bandwidth: float, moved: int, row_loss: str = "") -> str:
    found = predict(case, device, bandwidth, row_loss)
    assert found is not None
    roof = 100 * moved / bandwidth / found["seconds"]
    limits = ", ".join(f"{p['kernel']}: {p['limit']} {1e6 * p[p['limit']]:.1f}" for p in found["parts"])
    title = f"{case.title} {row_loss}"
    return f"  {title:46} {1e6 * found['seconds']:8.1f} µs, {roof:3.0f} % of copy   ({limits})"


if __name__ == "__main__":
    main()
