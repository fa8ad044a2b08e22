"""The package needs no framework; and says, where mmdetection is not installed, that its tests are not run."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_mmdetection_is_here():
    pytest.importorskip("mmdet", reason="mmdetection is not installed here: `make test-mmdet` runs its tests")


def test_the_package_imports_no_framework():
    found = "{'mmdet', 'mmcv', 'mmengine', 'cv2'} & set(sys.modules)"
    code = f"import sys, frs_kernels; assert not {found}, {found}"
    subprocess.run([sys.executable, "-c", code], check=True)
