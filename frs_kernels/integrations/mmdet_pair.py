"""What a student and a teacher must be for `FRSDistiller`: configs, checkpoint, and whether the two fit each other.

All of it runs when the distiller is built; what does not fit is an error before training starts.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import (
    ATSSHead,
    DETRHead,
    FCOSHead,
    GFLHead,
    GuidedAnchorHead,
    RetinaHead,
    RPNHead,
    TOODHead,
)
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor, nn

from frs_kernels.distill import Input, Output

PROBE_SIDE = 512  # the largest stride that it can tell


class Emitted(NamedTuple):
    """What passed through a detector's dense head; one tensor per level."""

    feats: list[Tensor]  # (N, C, H, W), from the neck
    logits: list[Tensor]  # (N, K, H, W), class logits
    outputs: tuple[Any, ...]  # all that the head returned, the logits first
    boxes: Sequence[Tensor] = ()  # (N, 4 * bins, H, W) of a head of GFL's kind: distributions of a box's sides


def dense_head(detector: BaseDetector) -> Any:
    """The head whose class logits are distilled: the RPN's of a two-stage detector, as the paper's authors did."""
    head = getattr(detector, "rpn_head", None)
    return getattr(detector, "bbox_head", None) if head is None else head


def sources(detector: BaseDetector, boxes: bool = False) -> dict[str, Any]:
    """For `Tap`: what the dense head is given, and the class logits that it returns, and its boxes."""
    name = "bbox_head" if getattr(detector, "rpn_head", None) is None else "rpn_head"
    found: dict[str, Any] = {"feats": Input(name, _first), "logits": Output(name, _first)}
    return {**found, "boxes": Output(name, _second)} if boxes else found


def _first(found: Sequence[Any]) -> Any:
    return found[0]


def _second(found: Sequence[Any]) -> Any:
    return found[1]


def run(detector: BaseDetector, images: Tensor) -> Emitted:
    feats = detector.extract_feat(images)
    outputs = dense_head(detector)(feats)
    return Emitted(list(feats), list(outputs[0]), outputs, outputs[1] if len(outputs) > 1 else ())


CLASS_CONVS = {RetinaHead: "retina_cls", GFLHead: "gfl_cls", FCOSHead: "conv_cls", ATSSHead: "atss_cls"}
"""Heads with a class tower `cls_convs` of its own, and their last convolution. Of no subclass: it may do otherwise."""


def run_class_branch(detector: BaseDetector, images: Tensor) -> Emitted:
    """`run` without the boxes: the class logits are bit for bit those of the whole head. See `has_class_branch`."""
    head = dense_head(detector)
    feats = detector.extract_feat(images)
    if type(head) is RPNHead:
        return Emitted(list(feats), [head.rpn_cls(F.relu(head.rpn_conv(x))) for x in feats], ())
    last = getattr(head, CLASS_CONVS[type(head)])
    logits = []
    for x in feats:
        for conv in head.cls_convs:
            x = conv(x)
        logits.append(last(x))
    return Emitted(list(feats), logits, ())


def has_class_branch(detector: BaseDetector, whole: Emitted, images: Tensor) -> bool:
    """Whether `run_class_branch` gives for these images what `run` gave."""
    head = dense_head(detector)
    if type(head) is not RPNHead and type(head) not in CLASS_CONVS:
        return False
    with torch.no_grad():
        logits = run_class_branch(detector, images).logits
    return all(torch.equal(a, b) for a, b in zip(logits, whole.logits, strict=True))


def model_config(name: str, config: dict[str, Any] | str | Path) -> Any:
    """The `model` of a config file, "mmdet::" included, or a dict as it is; a copy, as building changes it."""
    if isinstance(config, Config):
        config = config._cfg_dict
    if isinstance(config, dict):
        return copy.deepcopy(Config({"model": config.get("model", config)}).model)
    if "::" in str(config):
        return get_config(str(config)).model
    if not Path(config).is_file():
        raise FileNotFoundError(f"{name}={str(config)!r} is no file; give a config file, 'mmdet::<config>' or a dict")
    found = Config.fromfile(config)
    if "model" not in found:
        raise ValueError(f"{name}={str(config)!r} has no model")
    return found.model


def _normalisation(model: Any) -> str:
    cfg = model.get("data_preprocessor") or {}
    mean, std = ([float(v) for v in cfg.get(key) or ()] for key in ("mean", "std"))
    swapped = cfg.get("bgr_to_rgb") or cfg.get("rgb_to_bgr")
    return f"mean {mean}, std {std}, channels {'swapped' if swapped else 'as they are'}"


def check_normalisation(student: Any, teacher: Any) -> None:
    s, t = map(_normalisation, (student, teacher))
    if s != t:
        raise ValueError(
            f"student and teacher see the same images, but are normalised otherwise: student {s}; teacher {t}; take a "
            "teacher that was trained with the student's data_preprocessor"
        )


_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray  # NumPy 2, 1
DTYPES = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]


def _method(owner: Any, name: str) -> Any:
    """In the place of `getattr`, with which a pickle may reach anything."""
    if owner is not HistoryBuffer or name.startswith("_"):
        of = getattr(owner, "__name__", type(owner).__name__)
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr({of}.{name})")
    return getattr(owner, name)


SAFE = [
    HistoryBuffer, np.ndarray, np.dtype, *DTYPES, (_method, "builtins.getattr"),
    # Under the names that both major versions of NumPy write.
    *((getattr(_multiarray, name), f"numpy.{core}.multiarray.{name}")
      for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
]  # fmt: skip
"""What mmengine's checkpoints hold beside tensors."""


def _read(checkpoint: str) -> Any:
    """A file's or URL's content, without running code that it holds."""
    with torch.serialization.safe_globals(SAFE):
        if checkpoint.startswith(("http://", "https://")):
            return torch.hub.load_state_dict_from_url(checkpoint, map_location="cpu", weights_only=True)
        return torch.load(Path(checkpoint).expanduser(), map_location="cpu", weights_only=True)


def load_teacher(teacher: BaseDetector, checkpoint: str | Path, trust: bool) -> None:
    """Load a file or URL, and with `trust` whatever mmengine knows, pickled code included."""
    named = f"teacher_checkpoint={str(checkpoint)!r}"
    scheme = re.match(r"(?!https?:)([\w-]+):/?/", str(checkpoint))
    if scheme and not trust:
        raise ValueError(
            f"{named} is read by mmengine, which runs code that a checkpoint may hold: download it and give the file, "
            "or set trust_checkpoint=True"
        )
    try:
        state = _load_checkpoint(str(checkpoint), map_location="cpu") if trust else _read(str(checkpoint))
    except OSError as error:
        raise FileNotFoundError(f"{named} cannot be read: {error}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        if found := re.search(r"GLOBAL (\S+)|<class '(\S+)'>", str(error)):
            raise ValueError(
                f"{named} holds more than weights: {found[1] or found[2]}, which would be called when it is read; if "
                "you know where the file is from, set trust_checkpoint=True"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{named} is no checkpoint, or not pickled as torch.save does it; if you know where the file is from, "
                "set trust_checkpoint=True"
            ) from error
        first = str(error).partition("\n")[0]
        raise ValueError(f"{named} is no checkpoint: {first}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{named} is no checkpoint but a {type(state).__name__}, not of names and weights")
    # What DDP puts before the names, and what early releases of mmdetection 3 kept of the preprocessor.
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("data_preprocessor.")}
    try:
        teacher.load_state_dict(state, strict=True)
    except RuntimeError as error:
        hint = "; export its student first" if any(key.startswith("student.") for key in state) else ""
        lines = [line.strip() for line in str(error).splitlines()]
        shown = " ".join(line if len(line) < 300 else line[:300] + " ..." for line in lines[:4])
        raise ValueError(f"{named} does not fit the teacher{hint}: {shown}") from error


def empty_image() -> Tensor:
    return torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE)


@torch.no_grad()
def probe(name: str, detector: BaseDetector) -> Emitted:
    """What a detector emits for an empty image: levels, channels and strides, measured and not read from configs."""
    kind = type(detector).__name__
    head = dense_head(detector)
    if not detector.with_neck:
        raise ValueError(f"{name} ({kind}) has no neck: the loss needs the levels of a feature pyramid (FPN)")
    # TOOD's head emits probabilities, guided anchors leave positions out, softmax heads have a background class.
    logits = hasattr(head, "cls_out_channels") and getattr(head, "use_sigmoid_cls", True)
    if not logits or isinstance(head, (DETRHead, GuidedAnchorHead, TOODHead)):
        raise ValueError(
            f"{name} ({kind}) has the head {type(head).__name__}, which emits no sigmoid class logits a level"
        )
    training = detector.training
    try:
        return run(detector.eval(), empty_image())
    except Exception as error:
        size = f"{PROBE_SIDE}x{PROBE_SIDE}"
        raise ValueError(f"{name} ({kind}) cannot be run on an empty {size} image on the CPU: {error}") from error
    finally:
        detector.train(training)


def check_pair(
    student: BaseDetector,
    teacher: BaseDetector,
    s: Emitted,
    t: Emitted,
    levels: list[int],
    head: bool,
    centerness: bool,
) -> None:
    """Student and teacher fit each other at the levels that are distilled; `s` and `t` are what they emit there."""
    if head:
        classes = [_classes(detector) for detector in (student, teacher)]
        channels = [[z.shape[1] for z in emitted.logits] for emitted in (s, t)]
        if classes[0] != classes[1] or channels[0] != channels[1]:
            raise ValueError(
                f"student has {classes[0]} classes and {channels[0]} class logits a level, teacher {classes[1]} and "
                f"{channels[1]}; both heads must have the same classes and anchors (not so with terms='features')"
            )
        anchors = [_anchors(detector, levels) for detector in (student, teacher)]
        if anchors[0] != anchors[1]:
            shown = [found and found[0] for found in anchors]
            raise ValueError(
                f"student's anchors are {shown[0]} on the first level, the teacher's {shown[1]}, or differ on another: "
                "a class logit would be of one box here and of another there (features alone may be: terms='features')"
            )
    emits = len(t.outputs) > 2 and all(t.outputs[2][i].shape[1] == 1 for i in levels)
    if centerness and not emits:
        kind = type(dense_head(teacher)).__name__
        raise ValueError(f"centerness=True, but the teacher's {kind} emits none")


def check_boxes(student: BaseDetector, teacher: BaseDetector, s: Emitted, t: Emitted, sides: int) -> None:
    """Both heads emit distributions of a box's sides, with the same bins."""
    for name, detector in (("student", student), ("teacher", teacher)):
        head = dense_head(detector)
        if not isinstance(head, GFLHead):
            raise ValueError(
                f"box_options, but the {name}'s {type(head).__name__} emits no distributions of a box's sides, as "
                "GFLHead does; leave box_options out"
            )
    if sides != 4:
        raise ValueError(f"box_options has sides={sides}, but a box of GFLHead's has 4; leave it out")
    ins, outs = ([b.shape[1] for b in emitted.boxes] for emitted in (s, t))
    if ins != outs:
        raise ValueError(
            f"student has {ins} channels of boxes a level, teacher {outs}: both heads must have the same reg_max"
        )


def _anchors(detector: BaseDetector, levels: list[int]) -> list[Any] | None:
    """Corners of a cell's anchors, a list a level, to a thousandth of a pixel; None where there are only points."""
    base = getattr(getattr(dense_head(detector), "prior_generator", None), "base_anchors", None)
    return None if base is None else [[[round(v, 3) for v in box] for box in base[i].tolist()] for i in levels]


def _classes(detector: BaseDetector) -> int:
    """Classes that a detector tells apart; of a two-stage detector its second stage's, the RPN's being always 1."""
    heads = getattr(getattr(detector, "roi_head", None), "bbox_head", None)
    if isinstance(heads, nn.ModuleList):  # a cascade's stages
        heads = heads[0]
    head: Any = dense_head(detector) if heads is None else heads
    return int(head.num_classes)
