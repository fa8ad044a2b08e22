"""Ultralytics' YOLO11, trained by its own trainer: alone, by `DistillingTrainer`, and by its built-in distillation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import yaml_model_load

from examples.digits.coco import Detections, Split, evaluate
from examples.digits.digits import DIGIT_SIDES
from frs_kernels.integrations.ultralytics import DistillingTrainer, Wrapped

SIDE = 128
TEACHER = "yolo11n.yaml"
WIDTH = 0.125
"""Of the student: half of the teacher's."""
SETTINGS: dict[str, Any] = {
    "imgsz": SIDE, "optimizer": "AdamW", "lr0": 2e-3, "lrf": 0.01, "warmup_epochs": 0.5, "mosaic": 0.0, "fliplr": 0.0,
    "cache": "ram", "device": "cpu", "workers": 0, "val": False, "plots": False, "amp": False, "pretrained": False,
    "exist_ok": True, "verbose": False, "deterministic": False,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "alone": {},
    "distilled": {"normalizer": "total_mass", "feat_weight": 0.1, "cls_weight": 3.0, "warmup": 100},
    "preset": {"warmup": 100},
    "built-in": {},
}
"""What the distiller is given, over the preset "ultralytics"."""
LEAST = 0.01
"""Detections that score less are not judged."""


def write_labels(folder: Path) -> Path:
    """Ultralytics' labels beside the pictures of a COCO folder, and the yaml that names both."""
    for split in ("train", "val"):
        truth = json.loads((folder / "annotations" / f"{split}.json").read_text())
        lines: dict[int, list[str]] = {}
        for item in truth["annotations"]:
            x, y, w, h = (side / SIDE for side in item["bbox"])
            line = f"{item['category_id'] - 1} {x + w / 2:.6f} {y + h / 2:.6f} {w:.6f} {h:.6f}"
            lines.setdefault(item["image_id"], []).append(line)
        for image in truth["images"]:
            labels = (folder / split / image["file_name"]).with_suffix(".txt")
            labels.write_text("\n".join(lines.get(image["id"], [])))
    page = folder / "digits.yaml"
    names = {digit: str(digit) for digit in range(10)}
    page.write_text(json.dumps({"path": str(folder.resolve()), "train": "train", "val": "val", "names": names}))
    return page


def write_student(folder: Path) -> Path:
    """The yaml of Ultralytics' model at another width."""
    page = folder / "student.yaml"
    depth, _, most = yaml_model_load(TEACHER)["scales"]["n"]
    page.write_text(json.dumps({**yaml_model_load(TEACHER), "nc": 10, "scales": {"n": [depth, WIDTH, most]}}))
    return page


def judge(checkpoint: Path, split: Split) -> dict[str, float | None]:
    """The file as a plain model, on pictures as Ultralytics takes them: (H, W, 3), blue first."""
    model, found = YOLO(checkpoint), []
    for part in split.pictures.split(50):
        pictures = [picture.permute(1, 2, 0).flip(2).numpy() for picture in part]
        for result in model.predict(pictures, imgsz=SIDE, conf=LEAST, max_det=100, device="cpu", verbose=False):
            boxes = result.boxes.cpu()
            found.append(Detections(boxes.xyxy, boxes.conf, boxes.cls.long()))
    return evaluate(split, found, DIGIT_SIDES)


def train(
    data: Path, split: Split, arm: str, seed: int, epochs: int, batch: int, teacher: Path | None, folder: Path
) -> dict[str, Any]:
    """One training by Ultralytics' trainer; `arm` is "teacher" or one of `ARMS`. What it saved last is judged."""
    settings = {
        **SETTINGS, "data": str(data), "epochs": epochs, "batch": batch, "nbs": batch, "seed": seed,
        "project": str(folder.parent.resolve()), "name": folder.name,
    }  # fmt: skip
    trainer: type[DetectionTrainer] = DetectionTrainer
    if ARMS.get(arm):
        trainer = type("Taught", (DistillingTrainer, DetectionTrainer), {"teacher": teacher, "distiller": ARMS[arm]})
    elif arm == "built-in":
        settings["distill_model"] = str(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    model = YOLO(TEACHER if arm == "teacher" else write_student(folder), verbose=False)
    started = time.perf_counter()
    model.train(trainer=trainer, **settings)
    seconds = time.perf_counter() - started
    found = judge(folder / "weights" / "last.pt", split)
    parameters = sum(p.numel() for p in YOLO(folder / "weights" / "last.pt").model.parameters())
    return {"metrics": found, "seconds": seconds, "parameters": parameters}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    loss, _ = model(batch)
    optimizer.zero_grad()
    loss.sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()


def steps(split: Split, teacher: Path, size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """A whole training step of each arm on the same pictures, without the trainer around it."""
    here = split.labels[:size] >= 0
    corners = split.boxes[:size][here] / SIDE
    batch = {
        "img": split.pictures[:size].float() / 255, "cls": split.labels[:size][here].float()[:, None],
        "batch_idx": here.nonzero()[:, 0].float(),
        "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
    }  # fmt: skip
    made: dict[str, Callable[[], Any]] = {}
    for arm in ARMS:
        model: Any = YOLO(write_student(folder), verbose=False).model.train()
        model.args = get_cfg(overrides={"imgsz": SIDE})
        if ARMS[arm]:
            options = {"recipe": "ultralytics", "preset": "ultralytics", **ARMS[arm]}
            model = Wrapped(model, YOLO(teacher).model.float(), **options)
        elif arm == "built-in":
            model = DistillationModel(teacher_model=YOLO(teacher).model.float(), student_model=model).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        made[arm] = partial(step, model, optimizer, batch)
    return made
