"""A whole training step with torchvision: the student alone, distilled by the authors' loop, and by `Distiller`.

    python benchmarks/bench_torchvision.py [--size 192 256] [--batch 2] [--rounds 5] [--compile] [--out FOLDER]

RetinaNet R50 taught by RetinaNet R101, random weights, batch norms that have seen one batch. A step is the forward pass
of all, the backward pass, no optimiser; the convolutions run as PyTorch runs them by default (TF32 on a GPU that has
it), student and adapters in fp32. The authors' loop is what their code does: the student's class head run a second time
for the distillation, sigmoids before the losses, a loop over the levels. Its losses are compared with ours before
anything is timed. Writes step.json to FOLDER/<device>/. Needs torchvision beside this package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from forms import authors_form
from measure import interleaved, peak_extra, spread, timed
from report import show
from rich.console import Console
from run import describe, folder_of
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from frs_kernels import PRESETS, Distiller, Tap

HEAD = "head.classification_head.cls_logits"
WHOLE = "frs_kernels, the whole teacher"
FASTEST = {"dtype": "auto", "channels_last": True, "free": True}
ARMS: dict[str, Any] = {
    WHOLE: False,
    "batch norms folded (default)": True,
    "and 16 bits where faster, channels_last, the boxes freed": FASTEST,
}
ON_A_GPU: dict[str, Any] = {"and on a stream of its own": FASTEST | {"stream": True}}
COMPILED: dict[str, Any] = {"and compiled, not on a stream": FASTEST | {"compile": True}}


def retinanet(depth: int, size: tuple[int, int], device: str) -> Any:
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5,
        returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    model = RetinaNet(backbone, num_classes=80, min_size=min(size), max_size=max(size)).to(device)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():  # or the activations of 100 layers that normalise nothing leave every range
        model.backbone(torch.randn(2, 3, *size, device=device))
    for norm in norms:
        norm.momentum = 0.1
    return model


def authors_loop(
    student: Any, teacher: Any, adapter: Any, images: list[Tensor], targets: list[Any], twice: bool
) -> dict[str, Tensor]:
    """What `Distiller` adds to the student's losses, as the authors' code computes it, or with the head run once."""
    with Tap(student, feats="backbone", logits=HEAD, images="backbone") as tap:
        losses = student(images, targets)
    feats, x = tap.feats, tap.logits
    if twice:
        with Tap(student, logits=HEAD) as again:
            student.head.classification_head(feats)
        x = again.logits
    with torch.no_grad(), Tap(teacher, feats="backbone", logits=HEAD) as seen:
        teacher.head.classification_head(list(teacher.backbone(tap.images).values()))
    weights = PRESETS["retinanet"]
    for key, own in (("feat", weights | {"cls_weight": 0.0}), ("cls", weights | {"feat_weight": 0.0})):
        losses[f"loss_frs_{key}"] = authors_form(adapter(feats), seen.feats, x, seen.logits, **own)
    return losses


def measure(size: tuple[int, int], batch: int, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    student, teacher = (retinanet(depth, size, device) for depth in (50, 101))
    teacher.eval()
    images = [torch.rand(3, *size, device=device) for _ in range(batch)]
    box = torch.tensor([[10.0, 10.0, 120.0, 90.0]] * 6, device=device)
    targets = [{"boxes": box, "labels": torch.arange(6, device=device)} for _ in images]
    arms = ARMS | (ON_A_GPU if device == "cuda" else {}) | (COMPILED if compiled else {})
    models = {
        arm: Distiller(
            student, teacher, recipe="torchvision", preset="retinanet", warmup=0, fast_teacher=fast,
            example=(images[:1], targets[:1]),
        ).to(device)
        for arm, fast in arms.items()
    }  # fmt: skip
    whole = models[WHOLE]
    student.train()
    torch.manual_seed(0)
    ours = {key: value for key, value in whole(images, targets).items() if key.startswith("loss_frs")}
    for twice in (True, False):
        loop = authors_loop(student, teacher, whole.adapter, images, targets, twice)
        for key, value in ours.items():
            torch.testing.assert_close(value, loop[key], rtol=1e-3, atol=0)
    del ours, loop
    parameters = [p for each in models.values() for p in each.parameters() if p.requires_grad]

    def step(losses: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.grad(sum(losses().values(), torch.zeros((), device=device)), parameters, allow_unused=True)

        return call

    loop = partial(authors_loop, student, teacher, whole.adapter, images, targets)
    inside = torch.stack([student.transform.normalize(image) for image in images])
    steps: dict[str, Any] = {
        "student alone": step(partial(student, images, targets)),
        "teacher, forward": lambda: whole.observe(inside),
        "authors' loop": step(partial(loop, True)),
        "authors' loop, head once": step(partial(loop, False)),
        **{arm: step(partial(each, images, targets)) for arm, each in models.items()},
    }
    memory = {arm: peak_extra(call, device) for arm, call in steps.items()}
    times = interleaved({arm: timed(call, device) for arm, call in steps.items()}, 0.0, least=rounds)
    return {
        "name": "retinanet",
        "size": size,
        "batch": batch,
        "arms": {arm: {"step": spread(runs), "peak_extra": memory[arm]} for arm, runs in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), help="of the images, height and width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the compiled teacher, too: minutes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(tuple(options.size), options.batch, options.rounds, device, options.compile)
    folder = folder_of(options.out, device)
    folder.mkdir(parents=True, exist_ok=True)
    record = describe(device) | {"framework": "torchvision", "torchvision": version("torchvision"), "cases": [found]}
    (folder / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    show(Console(width=None if sys.stdout.isatty() else 130), folder)


if __name__ == "__main__":
    main()
