"""These tests need mmdetection: `make test-mmdet` makes an environment that has it, elsewhere they are left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

try:
    import mmdet
except ImportError:
    mmdet = None


# tests/test_integrations.py is the skip that is seen.
collect_ignore_glob = ["*"] if mmdet is None else []


@pytest.fixture(autouse=True)
def no_runner() -> None:
    """Outside a runner there is no iteration: what an earlier test's runner left behind is forgotten."""
    from detectors import forget_runners
    from mmengine.registry import init_default_scope

    forget_runners()
    init_default_scope("mmdet")


@pytest.fixture
def teacher_file(tmp_path: Path):
    """Saves the random weights of a detector's teacher, and says where."""
    from detectors import teacher_of
    from mmdet.registry import MODELS

    def save(name: str, **changes: object) -> str:
        torch.manual_seed(1)
        teacher = MODELS.build(teacher_of(name, **changes))
        teacher.init_weights()
        path = tmp_path / f"{name}_teacher.pth"
        torch.save({"state_dict": teacher.state_dict(), "meta": {}}, path)
        return str(path)

    return save
