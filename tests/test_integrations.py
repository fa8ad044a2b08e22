"""The package needs no framework; and says, where one is not installed, that its tests are not run."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_mmdetection_is_here():
    pytest.importorskip("mmdet", reason="mmdetection is not installed here: `make test-mmdet` runs its tests")


@pytest.mark.parametrize("framework", ["torchvision", "transformers", "ultralytics"])
def test_other_frameworks_are_here(framework):
    reason = f"{framework} is not installed here: `make test-frameworks` runs its tests"
    pytest.importorskip(framework, reason=reason, exc_type=(ImportError, RuntimeError))


def test_the_package_imports_no_framework():
    frameworks = {"mmdet", "mmcv", "mmengine", "cv2", "torchvision", "transformers", "ultralytics"}
    found = f"{frameworks} & set(sys.modules)"
    code = f"import sys, frs_kernels; assert not {found}, {found}"
    subprocess.run([sys.executable, "-c", code], check=True)
