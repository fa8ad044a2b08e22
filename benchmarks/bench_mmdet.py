"""A whole training step with mmdetection: the student alone, distilled by the authors' loop, and by `FRSDistiller`.

    python benchmarks/bench_mmdet.py [--size 256 320] [--batch 2] [--rounds 5] [--out FILE.json]

The paper's four pairs, R50 taught by R101, as examples/mmdet/configs/coco has them, with random weights. A step is the
forward pass of all, the backward pass, no optimiser. The authors' loop is what their code does: the student's head run
a second time for the distillation, sigmoids before the losses, a loop over the levels. Its losses are compared with
ours before anything is timed. Needs the environment of `make install-mmdet`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_loss import measure
from memory import peak_extra
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import frs_kernels
from frs_kernels.integrations.mmdet import dense_head

CONFIGS = Path(__file__).parents[1] / "examples" / "mmdet" / "configs" / "coco"
PAIRS = ("retinanet_r50_r101_2x", "gfl_r50_r101_1x", "fcos_r50_r101_2x", "faster_rcnn_r50_r101_1x")


def authors_loop(model: Any, inputs: Tensor, samples: list[Any]) -> dict[str, Any]:
    """`FRSDistiller.loss` as the authors' code computes it."""
    feats = model.student.extract_feat(inputs)
    extract, model.student.extract_feat = model.student.extract_feat, lambda _: feats
    losses = model.student.loss(inputs, samples)
    model.student.extract_feat = extract
    logits = dense_head(model.student)(feats)[0]
    with torch.no_grad():
        teacher_feats = model.teacher.extract_feat(inputs)
        teacher_logits = dense_head(model.teacher)(teacher_feats)[0]
    feat = cls = inputs.new_zeros(())
    adapted = model.adapter(feats)
    for s, t, x, z in zip(adapted, teacher_feats, logits, teacher_logits, strict=True):
        target, prediction = z.sigmoid(), x.sigmoid()
        mask = target.max(1).values.detach()
        feat = feat + (((s - t) ** 2) * mask.unsqueeze(1)).sum() / mask.sum()
        bce = torch.nn.functional.binary_cross_entropy(prediction, target, reduction="none")
        cls = cls + (bce * mask.unsqueeze(1)).sum() / mask.sum()
    losses["loss_frs_feat"] = model.options["feat_weight"] * feat
    losses["loss_frs_cls"] = model.options["cls_weight"] * cls
    return losses


def case(name: str, size: tuple[int, int], batch: int, rounds: int, device: str) -> dict[str, Any]:
    config = Config.fromfile(CONFIGS / f"{name}.py")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        teacher = MODELS.build(get_config(config.model.teacher).model)
        torch.save(teacher.state_dict(), f"{folder}/teacher.pth")
        model = MODELS.build(config.model | {"teacher_checkpoint": f"{folder}/teacher.pth", "warmup": 0})
    model = model.to(device).train()
    samples = demo_mm_inputs(batch, [(3, *size)] * batch, num_items=[6] * batch, num_classes=80)["data_samples"]
    for sample in samples:
        sample.to(device)
        sample.set_metainfo({"batch_input_shape": size, "pad_shape": size})
    inputs = torch.randn(batch, 3, *size, device=device)

    ours, loop = model.loss(inputs, samples), authors_loop(model, inputs, samples)
    for key in ("loss_frs_feat", "loss_frs_cls"):
        torch.testing.assert_close(ours[key], loop[key], rtol=1e-4, atol=0)
    del ours, loop

    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(losses: Any) -> Any:
        def run() -> None:
            total, _ = model.parse_losses(losses())
            torch.autograd.grad(total, parameters, allow_unused=True)

        return run

    steps = {
        "student alone": step(lambda: model.student.loss(inputs, samples)),
        "authors' loop": step(lambda: authors_loop(model, inputs, samples)),
        "frs_kernels": step(lambda: model.loss(inputs, samples)),
    }
    memory = {arm: peak_extra(run, device) for arm, run in steps.items()}
    times = measure(steps, rounds, device)
    return {
        "name": name, "size": size, "batch": batch, "peak_bytes": memory,
        "seconds": {arm: statistics.median(runs) for arm, runs in times.items()},
        "spread": {arm: [min(runs), max(runs)] for arm, runs in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="of the images, height and width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_mmdet.json"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    init_default_scope("mmdet")
    results = [
        case(name, tuple(options.size), options.batch, options.rounds, device)
        for name in track(PAIRS, description="timing")
    ]
    height, width = options.size
    title = f"a training step, {height} x {width}, batch {options.batch}, fp32, {torch.get_num_threads()} threads"
    table = Table("", "", "ms", "of the student alone", "peak MB", title=title)
    for result in results:
        alone = result["seconds"]["student alone"]
        for arm, seconds in result["seconds"].items():
            peak = result["peak_bytes"][arm]
            low, high = result["spread"][arm]
            table.add_row(
                result["name"], arm, f"{1e3 * seconds:.0f} [{1e3 * low:.0f}-{1e3 * high:.0f}]",
                f"{seconds / alone:.2f}", "" if peak is None else f"{peak / 1e6:.0f}",
            )  # fmt: skip
    Console().print(table)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": name, "torch": torch.__version__, "frs_kernels": frs_kernels.__version__, "results": results}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
