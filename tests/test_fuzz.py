"""Random calls of every public function on every backend that is here, against fp64 truth. `make fuzz` makes many.

FUZZ_CASES is how many each of the four shares of a backend gets, FUZZ_KEEP a folder in which what fails is kept, to be
tried first the next time. What fails is printed as a test; it joins FOUND once it is mended.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import BACKENDS
from fuzzing import look

from frs_kernels import backends

COUNT = int(os.environ.get("FUZZ_CASES", "40"))
HERE = [case for case in BACKENDS if (case[1] == "cpu" or torch.cuda.is_available()) and not backends.why_not(*case)]


@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize(("backend", "device"), HERE)
def test_any_call_is_right(backend, device, share):
    interpreted = backend == "triton" and device == "cpu"  # takes twenty times as long
    look(backend, device, max(1, COUNT // 20) if interpreted else COUNT, os.environ.get("FUZZ_KEEP"))
