"""mmengine hooks of `FRSDistiller`: the masks as pictures, the student as a plain checkpoint.

python -m frs_kernels.integrations.mmdet_hooks CHECKPOINT OUT     exports the student of one checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmdet.registry import HOOKS
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import _load_checkpoint, save_checkpoint
from torch import Tensor

PREFIX = "student."


def export_student(checkpoint: str | Path, out: str | Path) -> None:
    """Write the student of a `FRSDistiller` checkpoint as one of the student's own config, for `test.py` and inference.

    Raises:
        ValueError: the checkpoint holds no student.
    """
    content = _load_checkpoint(str(checkpoint), map_location="cpu")
    state = content.get("state_dict", content)
    student = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not student:
        raise ValueError(f"{checkpoint} holds no student: it has no key that starts with {PREFIX!r}")
    # The config kept in `meta` is the distiller's: inference would take it for the student's.
    meta = {key: value for key, value in content.get("meta", {}).items() if key != "cfg"}
    save_checkpoint({"state_dict": student, "meta": meta}, str(out))


@HOOKS.register_module()
class FRSExportHook(Hook):
    """Exports the student of the newest and of the best checkpoint when training ends.

    `<name>.pth` becomes `<name>_student.pth` beside it.
    """

    priority = "LOWEST"  # after CheckpointHook

    def before_train(self, runner: Any) -> None:
        _distiller_of(runner, type(self).__name__)

    def after_train(self, runner: Any) -> None:
        if runner.rank != 0:
            return
        hub = runner.message_hub
        keys = [key for key in hub.runtime_info if key == "last_ckpt" or key.startswith("best_ckpt")]
        for path in sorted({str(hub.get_info(key)) for key in keys}):
            if not Path(path).is_file():  # of a resumed run, whose old folder is gone
                runner.logger.warning(f"{path} is not there any more: its student is not exported")
                continue
            out = Path(path).with_name(f"{Path(path).stem}_student.pth")
            export_student(path, out)
            runner.logger.info(f"exported the student to {out}")


@HOOKS.register_module()
class FRSMaskHook(Hook):
    """Draws the richness mask of every distilled level over images in validation and test, as the paper's figure does.

    One picture an image goes to the runner's visualizer as `frs_mask_<file name>`: the image, then a panel a level with
    its stride and the image's share of the level's mass. Colours run from blue, score 0, to red, score 1, on all panels
    alike. It is the teacher's richness that is drawn, whatever the distiller's `mask` is.

    Args:
        num_images: how many of the first images of each validation or test are drawn.
        opacity: of the mask over the image, 0 to 1.
    """

    def __init__(self, num_images: int = 4, opacity: float = 0.5) -> None:
        self.num_images = num_images
        self.opacity = opacity
        self.drawn = 0

    def before_run(self, runner: Any) -> None:
        _distiller_of(runner, type(self).__name__)

    def before_val_epoch(self, runner: Any) -> None:
        self.drawn = 0

    def before_test_epoch(self, runner: Any) -> None:
        self.drawn = 0

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._draw(runner, data_batch)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._draw(runner, data_batch)

    def _draw(self, runner: Any, data_batch: Any) -> None:
        if self.drawn >= self.num_images:
            return
        model = _distiller_of(runner, type(self).__name__)
        data = model.data_preprocessor(data_batch, False)
        scores, _ = model.richness(data["inputs"])
        for number, sample in enumerate(data["data_samples"][: self.num_images - self.drawn]):
            image = mmcv.imfrombytes(get(sample.img_path), channel_order="rgb")
            levels = [level[number] for level in scores]
            shapes = sample.img_shape, data["inputs"].shape[-2:]
            picture = draw_masks(image, levels, model.strides, *shapes, self.opacity)
            runner.visualizer.add_image(f"frs_mask_{Path(sample.img_path).stem}", picture, step=runner.iter)
            self.drawn += 1


def _distiller_of(runner: Any, hook: str) -> Any:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not hasattr(type(model), "richness"):
        raise TypeError(f"{hook} is for a FRSDistiller; the model is a {type(model).__name__}")
    return model


def draw_masks(
    image: np.ndarray,
    scores: list[Tensor],
    strides: list[int],
    image_shape: tuple[int, int],
    input_shape: tuple[int, int],
    opacity: float = 0.5,
) -> np.ndarray:
    """`image` (H, W, 3), RGB uint8, and beside it one panel a level of `scores` (h, w): (H, (1 + L) W, 3).

    The scores belong to an image that was resized to `image_shape` and padded to `input_shape`, as (height, width).
    """
    height, width = image.shape[:2]
    panels = [image]
    for score, stride in zip(scores, strides, strict=True):
        # Cells of the real stride, cut to what is image and not padding. A fixed scale: mmengine's draw_featmap
        # stretches each level to its own range and shows a level that sees nothing as red as one that sees all.
        cells = score.float().cpu().repeat_interleave(stride, 0).repeat_interleave(stride, 1)
        cells = cells[: min(image_shape[0], input_shape[0]), : min(image_shape[1], input_shape[1])]
        full = F.interpolate(cells[None, None], (height, width), mode="nearest")[0, 0]
        colours = cv2.applyColorMap((full * 255).round().to(torch.uint8).numpy(), cv2.COLORMAP_JET)[..., ::-1]
        panel = cv2.addWeighted(image, 1 - opacity, np.ascontiguousarray(colours), opacity, 0)
        text = f"stride {stride}  mass {score.sum():.2f}"
        scale = max(0.3, height / 1000)
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(panel, text, (4, int(32 * scale) + 4), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness)
        panels.append(panel)
    return np.hstack(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the student of a FRSDistiller checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    export_student(arguments.checkpoint, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
