"""Whole runs: mmengine's Runner from pictures to COCO's mAP, interrupted, resumed and exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import mmdet
import numpy as np
import pytest
import torch
from detectors import CONFIGS, FRS, NAMES, ROOT, batch, config_of, distiller, forget_runners, gradients, student_of
from mmdet.registry import MODELS
from mmengine.hub import get_config
from mmengine.runner import Runner
from readme import code_after

from examples.digits.digits import make_digits
from frs_kernels.integrations.mmdet_hooks import draw_masks, export_student


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, counts={"train": 12, "val": 4}, image_size=128)
    return folder


def shortened(name: str, data: Path, work_dir: Path, teacher: str, iterations: int = 2, **changes: Any) -> Any:
    """A distillation's config on the small data, with every iteration in the log as it is."""
    config = config_of(f"{name}_distil")
    config.work_dir = str(work_dir)
    loader = {"batch_size": 2, "num_workers": 0, "dataset.data_root": str(data)}
    settings = {f"{split}_dataloader.{key}": v for split in ("train", "val", "test") for key, v in loader.items()}
    settings |= {f"{split}_evaluator.ann_file": f"{data}/annotations/val.json" for split in ("val", "test")}
    settings |= {
        "model.teacher_checkpoint": teacher,
        "model.warmup": 6,
        "train_cfg.max_iters": iterations,
        "train_cfg.val_interval": iterations,
        "param_scheduler": [],
        "default_hooks.logger.interval": 1,
        "default_hooks.checkpoint.interval": 4,
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        "log_processor.window_size": 1,
        "log_level": "ERROR",
        "randomness": {"seed": 0, "deterministic": True},
    }
    config.merge_from_dict(settings | {key.replace("__", "."): value for key, value in changes.items()})
    return config


def read(path: Path) -> Any:
    """Checkpoints of mmengine hold objects of its own beside the tensors."""
    return torch.load(path, weights_only=False)


def train(config: Any) -> tuple[Runner, list[dict[str, Any]]]:
    """The runner, and its log an iteration."""
    forget_runners()
    runner = Runner.from_cfg(config)
    runner.train()
    lines = [json.loads(line) for line in (Path(runner.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()]
    return runner, [line for line in lines if "loss" in line]


@pytest.mark.parametrize("name", NAMES)
def test_from_pictures_to_map(data, tmp_path, teacher_file, name):
    runner, log = train(shortened(name, data, tmp_path, teacher_file(name)))
    assert [line["step"] for line in log] == [1, 2]
    for key in (*FRS, *(f"frs_mass_{level}" for level in range(5))):
        assert np.isfinite(log[1][key])
    assert [log[0][key] for key in FRS] == [0, 0]  # the first iteration of the warm-up
    assert all(log[1][key] > 0 for key in FRS)
    assert not any(key.startswith("teacher") for key in read(tmp_path / "iter_2.pth")["state_dict"])
    in_optimizer = sum(p.numel() for group in runner.optim_wrapper.param_groups for p in group["params"])
    assert in_optimizer == sum(p.numel() for p in runner.model.parameters())
    pictures = sorted((Path(runner.log_dir) / "vis_data" / "vis_image").glob("frs_mask_*.png"))
    assert len(pictures) == 4
    assert cv2.imread(str(pictures[0])).shape == (128, 6 * 128, 3)
    assert (tmp_path / "iter_2_student.pth").is_file()


def test_the_exported_student_is_a_plain_one(data, tmp_path, teacher_file):
    """mmdet's own test.py gives the student's config and the exported file the mAP that the distiller has."""
    config = shortened(
        "gfl", data, tmp_path, teacher_file("gfl"), iterations=40, **{"optim_wrapper.optimizer.lr": 2e-3}
    )
    runner, _ = train(config)
    exported = tmp_path / "iter_40_student.pth"
    student = MODELS.build(student_of("gfl"))
    assert read(exported)["state_dict"].keys() == student.state_dict().keys()
    student.load_state_dict(read(exported)["state_dict"])
    for key, value in student.state_dict().items():
        assert torch.equal(value, runner.model.student.state_dict()[key])
    assert "cfg" not in read(exported)["meta"]
    assert read(exported)["meta"]["dataset_meta"]["classes"] == tuple("0123456789")

    again = tmp_path / "again.pth"
    command = [sys.executable, "-m", "frs_kernels.integrations.mmdet_hooks", str(tmp_path / "iter_40.pth"), str(again)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert read(again)["state_dict"].keys() == student.state_dict().keys()

    options = [f"test_dataloader.dataset.data_root={data}", f"test_evaluator.ann_file={data}/annotations/val.json"]
    output = tool("test.py", str(CONFIGS / "digits" / "gfl.py"), str(again), cwd=tmp_path, options=options)
    theirs = re.search(r"bbox_mAP_copypaste: ([-\d. ]+)", output)[1].split()
    metrics = runner.val_loop.run()
    assert metrics["coco/bbox_mAP"] > 0
    assert [f"{metrics[f'coco/{k}']:.3f}" for k in ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75")] == theirs[:3]


def tool(script: str, *arguments: str, cwd: Path, options: list[str], launch: tuple[str, ...] = ()) -> str:
    """Run one of the scripts that come with mmdetection, and return what it said."""
    path = Path(mmdet.__file__).parent / ".mim" / "tools" / script
    if launch:
        # mmengine's launcher names the GPU that a process takes, even where there is none. The group is ended: a thread
        # of gloo's that outlives the interpreter aborts the process.
        code = (
            f"import runpy, torch\ntorch.cuda.set_device = print\nrunpy.run_path({str(path)!r}, run_name='__main__')\n"
            "torch.distributed.destroy_process_group()\n"
        )
        path = cwd / script
        path.write_text(code)
    command = [sys.executable, *launch, str(path), *arguments, "--cfg-options", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_an_export_of_no_distiller_is_refused(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="holds no student"):
        export_student(teacher_file("gfl"), tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_run_begins_from_a_plain_students_weights(data, tmp_path, teacher_file):
    plain = MODELS.build(student_of("gfl"))
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    config = shortened("gfl", data, tmp_path, teacher_file("gfl"), load_from=str(tmp_path / "plain.pth"))
    runner = Runner.from_cfg(config)
    runner.load_or_resume()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, runner.model.student.state_dict()[key])


def test_an_export_goes_on_where_a_checkpoint_is_gone(data, tmp_path, teacher_file):
    config = shortened("gfl", data, tmp_path, teacher_file("gfl"))
    runner = Runner.from_cfg(config)
    runner.message_hub.update_info("best_ckpt", str(tmp_path / "best.pth"))
    runner.train()
    assert (tmp_path / "iter_2_student.pth").is_file()
    assert not (tmp_path / "best_student.pth").exists()


@pytest.mark.parametrize("hook", ["FRSMaskHook", "FRSExportHook"])
def test_a_hook_without_a_distiller_says_so_before_training(data, tmp_path, teacher_file, hook):
    config = shortened("gfl", data, tmp_path, teacher_file("gfl"))
    config.model = student_of("gfl")
    config.custom_hooks = [{"type": hook}]
    runner = Runner.from_cfg(config)
    with pytest.raises(TypeError, match=f"{hook} is for a FRSDistiller; the model is a GFL"):
        runner.train()
    assert runner.iter == 0


def test_resuming_in_the_middle_of_the_warmup(data, tmp_path, teacher_file):
    teacher = teacher_file("gfl")
    runner, unbroken = train(shortened("gfl", data, tmp_path / "unbroken", teacher, iterations=8))
    resume = {"resume": True, "load_from": str(tmp_path / "unbroken" / "iter_4.pth")}
    second, resumed = train(shortened("gfl", data, tmp_path / "resumed", teacher, iterations=8, **resume))
    assert [line["step"] for line in resumed] == [5, 6, 7, 8]
    assert unbroken[5]["loss_frs_feat"] != unbroken[6]["loss_frs_feat"]
    for old, new in zip(unbroken[4:], resumed, strict=True):
        losses = [key for key in old if "loss" in key or key.startswith("frs_mass")]
        assert {key: old[key] for key in losses} == {key: new[key] for key in losses}
    for a, b in zip(runner.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_gradients(data, tmp_path, teacher_file):
    """Two iterations of two images: one step, of the mean of the two gradients."""
    config = shortened("gfl", data, tmp_path, teacher_file("gfl"), model__warmup=0)
    config.model.loss = {"grad_mode": "backward"}  # two gradients of one graph
    optimizer = {"type": "SGD", "lr": 1.0, "weight_decay": 0}
    config.optim_wrapper.update(accumulative_counts=2, clip_grad=None, optimizer=optimizer)
    runner = Runner.from_cfg(config)
    runner.model.init_weights()
    before = [p.detach().clone() for p in runner.model.parameters()]
    steps: list[tuple[torch.Tensor, ...]] = []
    parse_losses = runner.model.parse_losses

    def parse(losses: Any) -> Any:
        loss, logged = parse_losses(losses)
        steps.append(torch.autograd.grad(loss, list(runner.model.parameters()), retain_graph=True, allow_unused=True))
        return loss, logged

    runner.model.parse_losses = parse
    runner.train()
    assert len(steps) == 2
    for p, old, *grads in zip(runner.model.parameters(), before, *steps, strict=True):
        mean = sum(torch.zeros_like(p) if g is None else g for g in grads) / 2
        torch.testing.assert_close(old - p.detach(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["dynamic", 1024.0])
def test_amp_optim_wrapper(data, tmp_path, teacher_file, monkeypatch, scale):
    """bf16 autocast, as on a GPU; there is no fp16 gradient scaler for the CPU: it is switched off."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper

    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    config = shortened("gfl", data, tmp_path, teacher_file("gfl"), iterations=3)
    config.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=scale)
    _, log = train(config)
    assert all(np.isfinite(line["loss"]) for line in log)
    assert all(log[2][key] > 0 for key in FRS)


def test_a_loss_scale_scales_the_gradients(data, tmp_path, teacher_file, rng):
    model = distiller("gfl", teacher_file("gfl"))
    inputs, samples = batch(rng)
    plain, scaled = (
        gradients(factor * sum(model.loss(inputs, samples)[key] for key in FRS), model) for factor in (1.0, 65536.0)
    )
    assert torch.equal(65536 * plain, scaled)


def test_two_processes_with_mmdets_launcher(data, tmp_path, teacher_file):
    """`train.py --launcher pytorch`, as in the README: DDP finds no parameter unused."""
    options = [
        f"train_dataloader.dataset.data_root={data}", f"val_dataloader.dataset.data_root={data}",
        f"val_evaluator.ann_file={data}/annotations/val.json", f"model.teacher_checkpoint={teacher_file('gfl')}",
        "train_cfg.max_iters=3", "train_cfg.val_interval=3", "train_dataloader.batch_size=2", "model.average_mass=True",
        "default_hooks.logger.interval=1", "param_scheduler.1.end=60", "model.warmup=2",
        "model_wrapper_cfg.device_ids=None",
    ]  # fmt: skip
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")  # a free port
    output = tool(
        "train.py", str(CONFIGS / "digits" / "gfl_distil.py"), "--launcher", "pytorch", "--work-dir", str(tmp_path),
        cwd=tmp_path, options=options, launch=launch,
    )  # fmt: skip
    assert "loss_frs_feat" in output
    assert "Iter(val)" in output
    assert (tmp_path / "iter_3_student.pth").is_file()


def test_masks_are_drawn_where_the_scores_are():
    """A score of 1 in one cell: red in that cell, blue elsewhere, black where the picture's padding would be."""
    image = np.full((60, 100, 3), 128, np.uint8)
    scores = torch.zeros(4, 4)
    scores[1, 2] = 1
    picture = draw_masks(image, [scores], [32], (77, 128), (96, 128), opacity=1.0)
    assert picture.shape == (60, 200, 3)
    assert (picture[:, :100] == image).all()
    panel = picture[:, 100:].astype(int)
    # Cell (1, 2) covers rows 32 to 64 of 77 and columns 64 to 96 of 128: 25 to 50 of 60, 50 to 75 of 100.
    assert panel[37, 62, 0] > panel[37, 62, 2] + 100
    for y, x in ((37, 45), (37, 80), (22, 62), (55, 62)):
        assert panel[y, x, 2] > panel[y, x, 0] + 100


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "coco").glob("*_r50_r101_*.py")))
def test_the_papers_configs_build(tmp_path, name):
    """Each of the main table's, as it will train on COCO; the teacher's weights are random here, nothing is fetched."""
    from mmengine.config import Config

    config = Config.fromfile(CONFIGS / "coco" / f"{name}.py")
    preset = name.partition("_r50")[0]
    assert config.model.preset == preset
    base = {"retinanet": "retinanet", "gfl": "gfl", "fcos": "fcos", "faster_rcnn": "faster_rcnn"}[preset]
    assert f"/{base}/" in config.model.teacher_checkpoint
    assert config.train_cfg.max_epochs == (24 if name.endswith("2x") else 12)
    teacher = MODELS.build(get_config(config.model.teacher).model)
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.pth")
    model = MODELS.build(config.model | {"teacher_checkpoint": str(tmp_path / "teacher.pth")})
    assert (model.student.backbone.depth, model.teacher.backbone.depth) == (50, 101)
    assert model.strides == ([4, 8, 16, 32, 64] if preset == "faster_rcnn" else [8, 16, 32, 64, 128])
    assert [conv.weight.shape for conv in model.adapter.convs] == [(256, 256, 3, 3)] * 5
    assert model.warmup == 500


def test_the_config_of_the_readme_is_the_papers(tmp_path):
    """That of examples/mmdet/configs/coco, but for where the teacher's weights lie."""
    from mmengine.config import Config

    (tmp_path / "readme.py").write_text(code_after("**mmdetection**"))
    shown = Config.fromfile(tmp_path / "readme.py").model
    papers = Config.fromfile(CONFIGS / "coco" / "retinanet_r50_r101_2x.py").model
    assert papers.teacher_checkpoint.endswith(f"/{shown.teacher_checkpoint}")
    assert shown == papers | {"teacher_checkpoint": shown.teacher_checkpoint}
