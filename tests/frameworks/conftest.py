"""These tests need torchvision, transformers and Ultralytics, which `make test-frameworks` puts into an environment.

A file is left out where its framework is missing; tests/test_integrations.py is the skip that is seen.
"""

from __future__ import annotations

import importlib

import pytest
import torch


def _missing(name: str) -> bool:
    try:  # beside another build of torch, torchvision is found and cannot be imported
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        return True
    return False


collect_ignore_glob = [f"test_{name}*.py" for name in ("torchvision", "transformers", "ultralytics") if _missing(name)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
