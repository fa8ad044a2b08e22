"""What is refused is refused when the model is built, before any training, in words that say what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from detectors import CONFIGS, NAMES, config_of, distiller, student_of, teacher_of
from mmdet.models.detectors import GFL
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer

each_detector = pytest.mark.parametrize("name", NAMES)
HEADS = {"retinanet": "bbox_head", "gfl": "bbox_head", "fcos": "bbox_head", "faster_rcnn": "roi_head.bbox_head"}
STRIDES = {"anchor_generator": {"strides": [4, 8, 16, 32, 64]}}


def refused(error: type[Exception], *words: str):
    """All the words in the message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


@each_detector
def test_a_teacher_config_that_is_not_there(teacher_file, name):
    with refused(FileNotFoundError, "teacher='nowhere.py'", "mmdet::"):
        distiller(name, teacher_file(name), teacher="nowhere.py")


@each_detector
def test_a_teacher_checkpoint_that_is_not_there(name):
    with refused(FileNotFoundError, "teacher_checkpoint='nowhere.pth'"):
        distiller(name, "nowhere.pth")


def spoil(path: str, change) -> str:
    content = torch.load(path)
    change(content["state_dict"])
    torch.save(content, path)
    return path


CHANGES = {
    "missing": (lambda state: state.pop(next(iter(state))), "Missing key"),
    "unexpected": (lambda state: state.update(more=torch.zeros(1)), "Unexpected key"),
    "other shape": (lambda state: state.update({k: v[:1] for k, v in list(state.items())[:1]}), "size mismatch"),
}


@pytest.mark.parametrize("change", CHANGES)
@each_detector
def test_a_checkpoint_that_fits_in_part(teacher_file, name, change):
    spoilt, words = CHANGES[change]
    with refused(ValueError, "teacher_checkpoint=", "does not fit the teacher", words):
        distiller(name, spoil(teacher_file(name), spoilt))


def test_a_distillers_checkpoint_as_a_teachers(teacher_file, tmp_path):
    file = teacher_file("gfl")
    torch.save({"state_dict": distiller("gfl", file).state_dict()}, tmp_path / "distilled.pth")
    with refused(ValueError, "does not fit", "export its student first"):
        distiller("gfl", str(tmp_path / "distilled.pth"))


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.pth").write_text("no weights")
    with refused(ValueError, "teacher_checkpoint=", "notes.pth"):
        distiller("gfl", str(tmp_path / "notes.pth"))


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code(teacher_file, tmp_path):
    file = teacher_file("gfl")
    content = torch.load(file) | {"more": Harmful(str(tmp_path / "harm"))}
    torch.save(content, file)
    with refused(ValueError, "holds more than weights: ", "open", "trust_checkpoint=True"):
        distiller("gfl", file)
    assert not (tmp_path / "harm").exists()
    distiller("gfl", file, trust_checkpoint=True)
    assert (tmp_path / "harm").exists()


class Reaching:
    """mmengine's log buffers are pickled with getattr, which reaches further."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_a_checkpoint_that_reaches_for_more_by_getattr(teacher_file):
    file = teacher_file("gfl")
    torch.save(torch.load(file) | {"more": Reaching(), "log": HistoryBuffer([1.0], [1])}, file)
    with refused(ValueError, "holds more than weights: getattr", "__init__"):
        distiller("gfl", file)


def test_harmless_checkpoints_of_other_kinds(teacher_file, tmp_path):
    file = teacher_file("gfl")
    content = torch.load(file)
    numbers = {code: np.zeros(2, code) for code in ("float16", "int8", "uint64", "U3")}
    harmless = content | {"meta": {"numbers": numbers, "seed": np.int64(3), "log": HistoryBuffer([1.0], [1])}}
    torch.save(harmless, tmp_path / "numpy.pth")
    torch.save(harmless, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "legacy.pth").read_bytes()
    (tmp_path / "older.pth").write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (tmp_path / "older.pth").read_bytes()
    for name in ("numpy", "legacy", "older"):
        distiller("gfl", str(tmp_path / f"{name}.pth"))
    torch.save(content, tmp_path / "protocol.pth", pickle_protocol=4)
    (tmp_path / "abc.pth").write_bytes(b"abc")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    for name, words in (
        ("protocol", "trust_checkpoint=True"),
        ("abc", "is no checkpoint"),
        ("numbers", "of names and"),
    ):
        with refused(ValueError, f"{name}.pth", words):
            distiller("gfl", str(tmp_path / f"{name}.pth"))
    distiller("gfl", str(tmp_path / "protocol.pth"), trust_checkpoint=True)


def test_a_checkpoint_that_mmengine_alone_finds():
    with refused(ValueError, "open-mmlab://", "is read by mmengine", "trust_checkpoint=True"):
        distiller("gfl", "open-mmlab://detectron2/resnet50_caffe")


@each_detector
def test_a_teacher_of_other_classes(teacher_file, name):
    other = {f"{HEADS[name].replace('.', '__')}__num_classes": 7}
    file = teacher_file(name, **other)
    with refused(ValueError, "student has 10 classes", "teacher 7", "same classes"):
        distiller(name, file, teacher=teacher_of(name, **other))
    assert distiller(name, file, teacher=teacher_of(name, **other), terms="features")


def test_other_anchors(teacher_file):
    other = {"bbox_head__anchor_generator__ratios": [1.0]}
    file = teacher_file("retinanet", **other)
    with refused(ValueError, "[90, 90, 90, 90, 90] class logits", "[30, 30, 30, 30, 30]"):
        distiller("retinanet", file, teacher=teacher_of("retinanet", **other))


@each_detector
def test_a_student_without_a_pyramid(teacher_file, name):
    student = student_of(name)
    student.neck = None
    with refused(ValueError, "student", "has no neck", "FPN"):
        distiller(name, teacher_file(name), student=student)


@each_detector
def test_an_unknown_mask_source(teacher_file, name):
    with refused(ValueError, "mask='gaussian' is unknown", "'richness', 'threshold', 'ones', 'boxes'"):
        distiller(name, teacher_file(name), mask="gaussian")


@pytest.mark.parametrize(("name", "scale"), [("retinanet", 4), ("gfl", 8)])
def test_as_many_anchors_of_another_size(teacher_file, name, scale):
    other = {"bbox_head__anchor_generator__octave_base_scale": scale}
    file = teacher_file(name, **other)
    with refused(ValueError, "student's anchors are", "the teacher's", "of one box here"):
        distiller(name, file, teacher=teacher_of(name, **other))
    assert distiller(name, file, teacher=teacher_of(name, **other), terms="features")


@pytest.mark.parametrize(
    ("name", "teacher", "options", "error", "words"),
    [
        ("fcos", {}, {}, ValueError, "box_options, but the student's FCOSHead emits no distributions"),
        (
            "gfl",
            {"bbox_head__reg_max": 7},
            {},
            ValueError,
            "student has [36, 36, 36, 36, 36] channels of boxes a level, teacher [32, 32",
        ),
        ("gfl", {}, {"sides": 3}, ValueError, "box_options has sides=3"),
        ("gfl", {}, {"temprature": 3.0}, TypeError, "temprature"),
        ("gfl", {}, {"process_group": None}, TypeError, "box_options has process_group"),
    ],
)
def test_boxes_that_do_not_fit(teacher_file, name, teacher, options, error, words):
    other = teacher_of(name, **teacher)
    with refused(error, words):
        distiller(name, teacher_file(name, **teacher), teacher=other, box_options=options)


def test_other_strides(teacher_file):
    """The same number of levels, one octave finer."""
    other = {"neck__start_level": 0, "bbox_head__anchor_generator__strides": [4, 8, 16, 32, 64]}
    file = teacher_file("gfl", **other)
    with refused(ValueError, "[8, 16, 32, 64, 128]", "[4, 8, 16, 32, 64]", "same strides"):
        distiller("gfl", file, teacher=teacher_of("gfl", **other))


def test_other_numbers_of_levels(teacher_file):
    other = {"neck__num_outs": 4, "bbox_head__anchor_generator__strides": [8, 16, 32, 64]}
    file = teacher_file("gfl", **other)
    with refused(ValueError, "5 levels of strides [8, 16, 32, 64, 128]", "4 levels of strides [8, 16, 32, 64]"):
        distiller("gfl", file, teacher=teacher_of("gfl", **other))
    assert distiller("gfl", file, teacher=teacher_of("gfl", **other), levels=[0, 1, 2, 3])


@pytest.mark.parametrize("levels", [[], [5], [-1], [0, 0], [1.0]])
def test_levels_that_are_none(teacher_file, levels):
    with refused(ValueError, "levels=", "from 0 to 4"):
        distiller("gfl", teacher_file("gfl"), levels=levels)


def test_other_channels_without_an_adapter(teacher_file):
    with refused(ValueError, "[32, 32, 32, 32, 32] channels", "[64, 64, 64, 64, 64]", "adapter_kernel=3"):
        distiller("gfl", teacher_file("gfl"), adapter_kernel=None)


def test_another_normalisation(teacher_file):
    other = {"data_preprocessor__std": [1.0, 1.0, 1.0]}
    with refused(ValueError, "normalised otherwise", "58.395", "1.0", "data_preprocessor"):
        distiller("gfl", teacher_file("gfl"), teacher=teacher_of("gfl", **other))


def test_centerness_that_no_head_emits(teacher_file):
    with refused(ValueError, "centerness=True", "RetinaHead emits none"):
        distiller("retinanet", teacher_file("retinanet"), centerness=True)


@pytest.mark.parametrize("mask", ["ones", "boxes"])
def test_centerness_of_a_mask_without_richness(teacher_file, mask):
    with refused(ValueError, "centerness=True", mask):
        distiller("fcos", teacher_file("fcos"), centerness=True, mask=mask)


def test_a_softmax_head(teacher_file):
    student = student_of("faster_rcnn", rpn_head__loss_cls__use_sigmoid=False)
    with refused(ValueError, "student", "RPNHead", "no sigmoid class logits"):
        distiller("faster_rcnn", teacher_file("faster_rcnn"), student=student)


def test_a_head_that_emits_probabilities(teacher_file):
    head = {
        "type": "TOODHead", "num_classes": 10, "in_channels": 32, "feat_channels": 32, "num_dcn": 0,
        "norm_cfg": {"type": "GN", "num_groups": 4},
        "anchor_generator": {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8,
                             "scales_per_octave": 1, "strides": [8, 16, 32, 64, 128]},
    }  # fmt: skip
    student = student_of("gfl")
    student.type, student.bbox_head, student.train_cfg = "TOOD", head, None
    with refused(ValueError, "student (TOOD)", "TOODHead", "no sigmoid class logits"):
        distiller("gfl", teacher_file("gfl"), student=student)


OPTIONS = [
    ({"preset": "yolo"}, ValueError, ("preset='yolo'", "'retinanet'")),
    ({"terms": "all"}, ValueError, ("terms='all'", "'both', 'features', 'head'")),
    ({"mask": "threshold"}, ValueError, ("threshold=None",)),
    ({"threshold": 0.1}, ValueError, ("mask='richness'", "threshold=0.1")),
    ({"mask": "threshold", "threshold": 1.5}, ValueError, ("threshold", "1.5")),
    ({"mask": "threshold", "threshold": "0.1"}, TypeError, ("threshold", "str")),
    ({"warmup": -1}, ValueError, ("warmup", "-1")),
    ({"adapter_kernel": 2}, ValueError, ("kernel_size", "2")),
    ({"loss": {"cls_loss": "mae"}}, ValueError, ("cls_loss='mae'", "'bce', 'kl'")),
    ({"loss": {"level_weights": [1.0, 2.0]}}, ValueError, ("level_weights has 2", "5 levels")),
    ({"loss": {"gamma": 2}}, TypeError, ("gamma",)),
    ({"loss": {"return_terms": False}}, ValueError, ("return_terms",)),
    ({"loss": {"process_group": None}}, ValueError, ("process_group", "average_mass")),
    ({"loss": 0.1}, TypeError, ("loss", "dict")),
]


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS)
def test_a_wrong_option(teacher_file, options, error, words):
    with refused(error, *words):
        distiller("gfl", teacher_file("gfl"), **options)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with refused(ValueError, "no checkpoint but a"):
        distiller("gfl", tmp_path / "other.pth")


def test_names_that_older_tools_left_in_a_checkpoint(teacher_file):
    """DDP's prefix, and the preprocessor's buffers of early releases."""
    file = teacher_file("gfl")
    content = torch.load(file)
    state = {f"module.{key}": value for key, value in content["state_dict"].items()}
    torch.save({"state_dict": state | {"data_preprocessor.mean": torch.zeros(3, 1, 1)}}, file)
    teacher = distiller("gfl", file, fast_teacher=False).teacher.state_dict()
    assert all(torch.equal(teacher[key], value) for key, value in content["state_dict"].items())


@pytest.mark.parametrize("change", [{"mean": (123.675, 116.28, 103.53)}, {"rgb_to_bgr": False}])
def test_a_normalisation_said_otherwise(teacher_file, change):
    other = {f"data_preprocessor__{key}": value for key, value in change.items()}
    assert distiller("gfl", teacher_file("gfl"), teacher=teacher_of("gfl", **other))


def test_a_preprocessor_of_the_distillers_own(teacher_file):
    own = {"type": "DetDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3}
    with refused(ValueError, "normalised otherwise"):
        distiller("gfl", teacher_file("gfl"), data_preprocessor=own)


@pytest.mark.parametrize("config", ["detr/detr_r50_8xb2-150e_coco", "guided_anchoring/ga-retinanet_r50_fpn_1x_coco"])
def test_other_heads_of_mmdets(teacher_file, config):
    student = get_config(f"mmdet::{config}.py").model
    student.backbone.init_cfg = None
    with refused(ValueError, "student", "no sigmoid class logits a level"):
        distiller("gfl", teacher_file("gfl"), student=student)


def test_a_detector_that_cannot_be_run(teacher_file, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(GFL, "extract_feat", fail)
    with refused(ValueError, "student (GFL) cannot be run on an empty 512x512 image", "no such operator"):
        distiller("gfl", teacher_file("gfl"))


def test_configs_may_be_files(teacher_file):
    folder = CONFIGS / "digits"
    assert distiller("gfl", teacher_file("gfl"), student=str(folder / "gfl.py"), teacher=folder / "gfl_teacher.py")


def test_configs_may_be_config_objects(teacher_file, tmp_path):
    assert distiller("gfl", teacher_file("gfl"), student=config_of("gfl"), teacher=config_of("gfl_teacher"))
    (tmp_path / "empty.py").write_text("optimizer = None\n")
    with refused(ValueError, "empty.py", "has no model"):
        distiller("gfl", teacher_file("gfl"), teacher=tmp_path / "empty.py")
