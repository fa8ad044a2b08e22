"""A whole training step with mmdetection: the student alone, distilled by the authors' loop, and by `FRSDistiller`.

    python benchmarks/bench_mmdet.py [--size 192 256] [--batch 2] [--rounds 5] [--out FOLDER]

The paper's four pairs, R50 taught by R101, as examples/mmdet/configs/coco has them, with random weights. A step is the
forward pass of all, the backward pass, no optimiser. The authors' loop is what their code does: the student's head run
a second time for the distillation, sigmoids before the losses, a loop over the levels. Its losses are compared with
ours before anything is timed. Writes step.json to FOLDER/<device>/. Needs the environment of `make install-mmdet`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, peak_extra, spread, timed
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from report import show
from rich.console import Console
from rich.progress import track
from run import describe, folder_of
from torch import Tensor

from frs_kernels.integrations.mmdet_pair import dense_head, run

CONFIGS = Path(__file__).parents[1] / "examples" / "mmdet" / "configs" / "coco"
WHOLE = "frs_kernels, the whole teacher"
FASTEST = {"dtype": "auto", "channels_last": True, "free": True}
LADDER: dict[str, dict[str, Any]] = {
    WHOLE: {"fast_teacher": False},
    "its class branch alone": {"fast_teacher": False},
    "and batch norms folded (default)": {"fast_teacher": True},
    "and 16 bits where faster": {"fast_teacher": {"dtype": "auto"}},
    "and channels_last, the boxes freed": {"fast_teacher": FASTEST},
    "and compiled": {"fast_teacher": FASTEST | {"compile": True}},
    "and 1×1 adapters, not compiled": {"fast_teacher": FASTEST, "adapter_kernel": 1},
}
"""What `FRSDistiller` does with its teacher, one step after another, and with its adapters."""
PAIRS = ("retinanet_r50_r101_2x", "gfl_r50_r101_1x", "fcos_r50_r101_2x", "faster_rcnn_r50_r101_1x")


def authors_loop(model: Any, inputs: Tensor, samples: list[Any], twice: bool) -> dict[str, Any]:
    """`FRSDistiller.loss` as the authors' code computes it, or with the student's head run once."""
    head = dense_head(model.student)
    feats: list[Any] = []
    logits: list[Any] = []
    with _kept(model.student.neck, feats), _kept(head, logits):
        losses = model.student.loss(inputs, samples)
    x = head(feats[0])[0] if twice else logits[0][0]
    with torch.no_grad():
        teacher_feats = model.teacher.extract_feat(inputs)
        z = dense_head(model.teacher)(teacher_feats)[0]
    feat = cls = inputs.new_zeros(())
    for s, t, x_l, z_l in zip(model.adapter(feats[0]), teacher_feats, x, z, strict=True):
        target, prediction = z_l.sigmoid(), x_l.sigmoid()
        mask = target.max(1).values
        feat = feat + (((s - t) ** 2) * mask.unsqueeze(1)).sum() / mask.sum()
        bce = torch.nn.functional.binary_cross_entropy(prediction, target, reduction="none")
        cls = cls + (bce * mask.unsqueeze(1)).sum() / mask.sum()
    losses["loss_frs_feat"] = model.criterion.feat_weight * feat
    losses["loss_frs_cls"] = model.criterion.cls_weight * cls
    return losses


@contextmanager
def _kept(module: torch.nn.Module, outputs: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        yield
    finally:
        handle.remove()


def case(name: str, size: tuple[int, int], batch: int, rounds: int, device: str) -> dict[str, Any]:
    config = Config.fromfile(CONFIGS / f"{name}.py")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        teacher = MODELS.build(get_config(config.model.teacher).model)
        torch.save(teacher.state_dict(), f"{folder}/teacher.pth")
        own = {"teacher_checkpoint": f"{folder}/teacher.pth", "warmup": 0}
        models = {arm: MODELS.build(config.model | own | options).to(device).train() for arm, options in LADDER.items()}
    model = models[WHOLE]
    model._run = run
    for other in models.values():
        other.student.load_state_dict(model.student.state_dict())
    samples = demo_mm_inputs(batch, [(3, *size)] * batch, num_items=[6] * batch, num_classes=80)["data_samples"]
    for sample in samples:
        sample.to(device)
        sample.set_metainfo({"batch_input_shape": size, "pad_shape": size})
    inputs = torch.randn(batch, 3, *size, device=device)

    ours = model.loss(inputs, samples)
    for twice in (True, False):
        loop = authors_loop(model, inputs, samples, twice)
        for key in ("loss_frs_feat", "loss_frs_cls"):
            torch.testing.assert_close(ours[key], loop[key], rtol=1e-4, atol=0)
    del ours, loop

    parameters = [p for each in models.values() for p in each.parameters() if p.requires_grad]

    def step(losses: Any) -> Any:
        def call() -> None:
            total, _ = model.parse_losses(losses())
            torch.autograd.grad(total, parameters, allow_unused=True)

        return call

    steps = {
        "student alone": step(lambda: model.student.loss(inputs, samples)),
        "teacher, forward": lambda: model.observe_teacher(inputs),
        "authors' loop": step(lambda: authors_loop(model, inputs, samples, twice=True)),
        "authors' loop, head once": step(lambda: authors_loop(model, inputs, samples, twice=False)),
        **{arm: step(partial(each.loss, inputs, samples)) for arm, each in models.items()},
    }
    memory = {arm: peak_extra(call, device) for arm, call in steps.items()}
    weights = {arm: sum(t.nbytes for t in each.teacher.state_dict().values()) for arm, each in models.items()}
    times = interleaved({arm: timed(call, device) for arm, call in steps.items()}, 0.0, least=rounds)
    return {
        "name": name,
        "size": size,
        "batch": batch,
        "arms": {
            arm: {"step": spread(runs), "peak_extra": memory[arm], "teacher_bytes": weights.get(arm)}
            for arm, runs in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), help="of the images, height and width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    init_default_scope("mmdet")
    results = [
        case(name, tuple(options.size), options.batch, options.rounds, device)
        for name in track(PAIRS, description="timing")
    ]
    versions = {name: version(name) for name in ("onedl-mmdetection", "onedl-mmcv", "onedl-mmengine")}
    folder = folder_of(options.out, device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(
        json.dumps(describe(device) | versions | {"framework": "mmdetection", "cases": results}, indent=1) + "\n"
    )
    show(Console(width=None if sys.stdout.isatty() else 130), folder)


if __name__ == "__main__":
    main()
