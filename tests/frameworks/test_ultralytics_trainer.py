"""Ultralytics' trainer with `DistillingTrainer`: what it trains, saves and resumes; its built-in loss beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from readme import ROOT, code_after
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

from frs_kernels import Distiller
from frs_kernels.integrations.ultralytics import DistillingTrainer, Wrapped

SETTINGS: dict[str, Any] = {
    "imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "plots": False, "amp": False, "verbose": False,
    "optimizer": "AdamW", "mosaic": 0.0, "nbs": 4, "warmup_epochs": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of a box in each split, a yaml of two narrow models, and the larger one as the teacher."""
    root: Path = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val"):
        (root / split).mkdir()
        for i in range(8):
            picture = Image.new("RGB", (64, 64))
            picture.paste((200, 30 * i, 90), (16, 16, 48, 40))
            picture.save(root / split / f"{i}.jpg")
            (root / split / f"{i}.txt").write_text(f"{i % 2} 0.5 0.4375 0.5 0.375")
    data = {"path": str(root), "train": "train", "val": "val", "names": {0: "a", 1: "b"}}
    (root / "boxes.yaml").write_text(json.dumps(data))
    for name, width in (("student", 0.125), ("teacher", 0.25)):
        cfg = dict(DetectionModel("yolo11n.yaml", verbose=False).yaml)
        cfg = {**cfg, "nc": 2, "scale": "n", "scales": {"n": [0.5, width, 1024]}}
        (root / f"{name}.yaml").write_text(json.dumps(cfg))
    YOLO(root / "teacher.yaml", verbose=False).save(root / "teacher.pt")
    return root


def trainer(folder: Path, base: type = DetectionTrainer, **distiller: Any) -> Any:
    return type("Trainer", (DistillingTrainer, base), {"teacher": folder / "teacher.pt", "distiller": distiller})


def run(folder: Path, out: Path, made: Any, model: str | Path = "student.yaml", **settings: Any) -> YOLO:
    yolo = YOLO(folder / model, verbose=False)
    given = {**SETTINGS, "data": str(folder / "boxes.yaml"), "project": str(out), "name": "run", "epochs": 1}
    yolo.train(trainer=made, **{**given, **settings})
    return yolo


def test_it_trains_validates_saves_and_reloads_as_a_plain_model(folder, tmp_path):
    yolo = run(folder, tmp_path, trainer(folder, warmup=0))
    assert "metrics/mAP50-95(B)" in yolo.trainer.metrics
    header, row = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), map(float, row.split(",")), strict=True))["train/frs_loss"] > 0
    for name in ("last.pt", "best.pt"):
        path = tmp_path / "run" / "weights" / name
        assert not [each for each in torch.serialization.get_unsafe_globals_in_checkpoint(path) if "frs" in each]
        model = YOLO(path).model
        assert type(model) is DetectionModel
        assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        plain = DetectionModel(json.loads((folder / "student.yaml").read_text()), verbose=False)
        assert list(model.state_dict()) == list(plain.state_dict())
    picture = folder / "val" / "0.jpg"
    assert len(YOLO(path).predict(picture, imgsz=64, verbose=False)) == 1


class Watching(DetectionTrainer):
    """Keeps the weights that it began with."""

    def _setup_train(self) -> None:
        super()._setup_train()
        adapter = self.model.adapter.parameters()
        self.began = [p.detach().clone() for p in (*self.model.module.parameters(), *adapter)]


def test_student_and_adapter_are_trained_and_the_teacher_is_not(folder, tmp_path):
    before = YOLO(folder / "teacher.pt").model.float().state_dict()
    made = run(folder, tmp_path, trainer(folder, Watching, warmup=0, fast_teacher=False), epochs=2).trainer
    assert isinstance(made.model, Wrapped)
    adapter = list(made.model.adapter.parameters())
    groups = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(set(groups))
    assert set(groups) == {*made.model.student.parameters(), *adapter}
    now = [*made.model.module.parameters(), *adapter]
    moved = [not torch.equal(a, b) for a, b in zip(made.began, now, strict=True) if b.requires_grad]
    assert all(moved[-len(adapter) :])
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(v, before[name]) for name, v in made.model.teacher.state_dict().items())


class Stopping(DetectionTrainer):
    """Ends as a process does that is killed after its first epoch."""

    def save_model(self) -> Any:
        saved = super().save_model()
        if self.epoch == 0:
            self.add_callback("on_train_epoch_start", _stop)
        return saved


def _stop(trainer: Any) -> None:
    raise KeyboardInterrupt


def test_it_resumes_with_the_adapter_and_the_place_in_the_warmup(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, trainer(folder, Stopping, warmup=6), epochs=3)
    weights = tmp_path / "run" / "weights"
    kept = torch.load(weights / "distiller.pt")
    assert {name.partition(".")[0] for name in kept} == {"adapter", "_extra_state"}
    began: list[Any] = []

    class Resuming(Watching):
        def _setup_train(self) -> None:
            super()._setup_train()
            began.append((self.start_epoch, self.model.iteration, self.model.adapter.state_dict()))
            began[0][2].update({name: v.clone() for name, v in began[0][2].items()})

    yolo = YOLO(weights / "last.pt")
    yolo.train(trainer=trainer(folder, Resuming, warmup=6), resume=True)
    epoch, iteration, adapter = began[0]
    assert (epoch, iteration) == (1, 2)
    assert all(torch.equal(v, kept[f"adapter.{name}"]) for name, v in adapter.items())
    assert yolo.trainer.model.iteration == 6
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["compile", "distill_model"])
def test_what_does_not_go_together_is_refused(folder, tmp_path, name):
    setting = {"compile": True, "distill_model": str(folder / "teacher.pt")}[name]
    with pytest.raises(ValueError, match=f"{name}=.* does not go together with distilling"):
        run(folder, tmp_path, trainer(folder), **{name: setting})


@pytest.mark.parametrize("page", ["README.md", "examples/frameworks/README.md"])
def test_the_few_lines_of_a_page_run(folder, tmp_path, monkeypatch, page):
    """Word for word, but for the size of the training."""
    block = code_after("**Ultralytics**")
    if page != "README.md":
        block = code_after("## Ultralytics' trainer", (ROOT / page).read_text())
    assert len([line for line in block.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    YOLO("yolo11s.yaml", verbose=False).save("yolo11s.pt")
    Path("coco8.yaml").write_text((folder / "boxes.yaml").read_text())
    settings = {**SETTINGS, "project": str(tmp_path), "name": "run", "epochs": 1}
    assert block.count("epochs=100") == 1
    names = {"DistillingTrainer": DistillingTrainer, "DetectionTrainer": DetectionTrainer, "YOLO": YOLO}
    exec(block.replace("epochs=100", "**settings"), {**names, "settings": settings})
    assert "train/frs_loss" in (tmp_path / "run" / "results.csv").read_text()
    assert type(YOLO(tmp_path / "run" / "weights" / "best.pt").model) is DetectionModel


class Projected(nn.Module):
    """Their projector where our adapter is."""

    def __init__(self, projector: nn.ModuleList) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        return [project(x) for project, x in zip(self.projector, feats, strict=True)]


def close(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["yolo11", "yolov10", "yolo26"])
def test_the_preset_times_the_batch_is_their_loss(name):
    """The later two have a one-to-one branch beside the one-to-many: both take the mean of the two."""
    models = [DetectionModel(f"{name}{size}.yaml", nc=5, verbose=False) for size in "ns"]
    for model in models:
        model.args = get_cfg(overrides={"imgsz": 128})
    student, teacher = models
    theirs = DistillationModel(teacher_model=teacher, student_model=student).train()
    batch = {
        "img": torch.rand(3, 3, 128, 160), "cls": torch.tensor([[1.0], [2.0]]), "batch_idx": torch.tensor([0.0, 1.0]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.4, 0.4, 0.2, 0.2]]),
    }  # fmt: skip
    right = theirs(batch)[0][-1]
    trained = [*student.model[0].parameters(), *theirs.projector.parameters()]
    grads = torch.autograd.grad(right, trained)
    theirs._remove_feature_hooks()
    ours = Distiller(student, teacher, recipe="ultralytics", preset="ultralytics", warmup=0)
    ours.adapter = Projected(theirs.projector)
    ours(batch)
    loss = len(batch["img"]) * ours.loss()
    assert abs(loss - right) <= 1e-6 * right
    found = torch.autograd.grad(loss, trained)
    assert all(close(a, b) <= 1e-4 for a, b in zip(found, grads, strict=True))
