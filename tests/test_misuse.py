"""Calls that would train on without distilling, or distil something else: an error, one warning, or `check` tells."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each_backend
from torch import Tensor, nn
from truth import pyramid

from frs_kernels import (
    PRESETS,
    FeatureAdapter,
    FSRLoss,
    PKDLoss,
    QualityFocalDistillation,
    check,
    fsr_loss,
    masked_imitation_loss,
    richness_mask,
)

SIZES = ((2, 6, 5), (2, 3, 2))


@pytest.fixture
def levels(rng: Any) -> tuple[list[Tensor], ...]:
    """student_feats, teacher_feats, student_logits, teacher_logits."""
    return pyramid(rng, sizes=SIZES, channels=4, classes=3).inputs


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def swapped(s: Any, t: Any, x: Any, z: Any) -> Tensor:
    return fsr_loss(t, s, z, x)


@pytest.mark.parametrize(
    "call",
    [
        swapped,
        lambda s, t, x, z: fsr_loss(t, s, None, z),
        lambda s, t, x, z: fsr_loss(None, None, z, x),
        lambda s, t, x, z: masked_imitation_loss(t, s, richness_mask(z)),
        lambda s, t, x, z: torch.compile(swapped, backend="eager")(s, t, x, z),
    ],
    ids=["both", "features", "logits", "masked_imitation_loss", "compiled"],
)
def test_student_and_teacher_swapped(levels, call):
    with pytest.raises(ValueError, match=r"teacher's tensors require a gradient, the student's do not: are .* swapped"):
        call(*levels)
    with torch.no_grad():
        assert swapped(*levels).isfinite()


def test_nothing_of_the_student_learns(levels):
    detached = [[v.detach() for v in each] for each in levels]
    with pytest.warns(UserWarning, match="no tensor of the student's requires a gradient") as found:
        fsr_loss(*detached)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            fsr_loss(*levels)
        with torch.inference_mode():
            fsr_loss(*detached)
        fsr_loss(*levels)
        fsr_loss(detached[0], *levels[1:])  # the logits learn


def test_a_call_of_several_terms_says_it_once_where_none_learns(levels):
    detached = [[v.detach() for v in each] for each in levels]
    both = {"feat_loss": "pkd", "cls_loss": "cwd"}
    for options in ({"feat_loss": "pkd"}, both):
        with pytest.warns(UserWarning, match="no tensor of the student's requires a gradient") as found:
            fsr_loss(*detached, **options)
        assert [w.filename for w in found] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fsr_loss(detached[0], *levels[1:], **options)  # the logits learn
            fsr_loss(*levels[:2], detached[2], levels[3], **options)  # the features do
        s, t, x, z = levels
        assert fsr_loss(detached[0], [v + s[0].mean() for v in t], x, z, **options).requires_grad
    for loss in (PKDLoss(), QualityFocalDistillation()):
        with pytest.warns(UserWarning, match="trains nothing") as found:
            loss(detached[0], detached[1])
        assert [w.filename for w in found] == [__file__]


@pytest.mark.parametrize("name", ["feat_weight", "cls_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_out_of_range(levels, name, value):
    with pytest.raises(ValueError, match=f"{name} must be zero or more and finite, got {value}"):
        fsr_loss(*levels, **{name: value})
    with pytest.raises(ValueError, match=name):
        FSRLoss(**{name: value})
    with pytest.raises(ValueError, match="weight must be zero or more"):
        masked_imitation_loss(levels[0], levels[1], richness_mask(levels[3]), weight=value)


@pytest.mark.parametrize("make", [nn.Parameter, lambda w: w.requires_grad_()], ids=["Parameter", "tensor"])
def test_weights_are_not_trained(levels, make):
    weight = make(torch.tensor(0.5))
    for call in (lambda: fsr_loss(*levels, feat_weight=weight), lambda: FSRLoss(cls_weight=weight)):
        with pytest.raises(ValueError, match=r"requires a gradient, but weights are not trained; give \w+.detach\(\)"):
            call()
    assert fsr_loss(*levels, feat_weight=weight.detach()).isfinite()


@each_backend
def test_forms_of_a_mask(rng, backend, device):
    p = pyramid(rng, sizes=SIZES, device=device)
    richness = richness_mask(p.z, backend=backend)
    right = fsr_loss(*p.inputs, mask=richness.scores, backend=backend)
    unusual = richness._replace(scores=[m.unsqueeze(1) for m in richness.scores])
    for mask in (richness, unusual, [m.unsqueeze(1) for m in richness.scores], tuple(richness.scores)):
        assert torch.equal(fsr_loss(*p.inputs, mask=mask, backend=backend), right)
        masked_imitation_loss(p.s, p.t, mask, backend=backend)
    flags = [m > m.mean() for m in richness.scores]
    right = fsr_loss(*p.inputs, mask=[m.float() for m in flags], backend=backend)
    assert torch.equal(fsr_loss(*p.inputs, mask=flags, backend=backend), right)
    assert torch.equal(fsr_loss(*p.inputs, mask=[m.unsqueeze(1) for m in flags], backend=backend), right)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func(levels, backend, transform):
    s, t, _, z = levels

    def loss(x: Tensor) -> Tensor:
        return fsr_loss([x, s[1]], t, None, z, backend=backend)

    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(loss)(s[0]),
        "vmap": lambda: torch.func.vmap(loss)(s[0].detach()[None]),
        "jvp": lambda: torch.func.jvp(loss, (s[0],), (s[0],)),
    }
    with pytest.raises(RuntimeError, match=r"frs_kernels works with backward\(\) .*, not inside torch.func's"):
        calls[transform]()


def test_a_process_group_that_is_none(levels):
    for call in (lambda: fsr_loss(*levels, process_group="world"), lambda: FSRLoss(process_group="world")):
        with pytest.raises(
            TypeError, match=r"process_group must be a torch.distributed.ProcessGroup, got str; .*WORLD"
        ):
            call()


def test_copies_of_a_module_with_a_process_group(levels, group):
    module = FSRLoss(process_group=group)
    right = module(*levels)
    copied = copy.deepcopy(nn.ModuleDict({"criterion": module}))["criterion"]
    assert copied.process_group is group
    assert torch.equal(copied(*levels), right)
    with pytest.warns(UserWarning, match="pickled with a process group, which lives with its process"):
        loaded = pickle.loads(pickle.dumps(module))
    assert loaded.process_group is None
    loaded.process_group = group
    assert torch.equal(loaded(*levels), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(FSRLoss())).process_group is None


def test_presets_are_read_only():
    """A copy is a plain dict, which may be changed."""
    for change_it in (
        lambda: PRESETS["gfl"].update(feat_weight=1.0),
        lambda: PRESETS["gfl"].pop("feat_weight"),
        lambda: PRESETS["gfl"].__setitem__("feat_weight", 1.0),
        lambda: PRESETS.__setitem__("mine", {}),
    ):
        with pytest.raises(TypeError, match="presets are read-only; change a copy"):
            change_it()
    right = {"feat_weight": 0.1, "cls_weight": 0.05}
    more = PRESETS["gfl"]
    more |= {"eps": 1.0}
    assert more == right | {"eps": 1.0}
    for copied in (copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: p.copy(), dict):
        plain = copied(PRESETS["gfl"])
        assert type(plain) is dict
        assert plain == right
    assert json.loads(json.dumps(PRESETS["gfl"])) == PRESETS["gfl"] == right
    assert FSRLoss(**PRESETS["gfl"]).feat_weight == 0.1


def test_what_an_adapter_is_given():
    adapter, feats = FeatureAdapter(4, 6, 2), [torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 1, 1)]
    right = adapter(feats)
    found = adapter(OrderedDict(zip(("p3", "p4"), feats, strict=True)))
    assert all(map(torch.equal, found, right))
    with pytest.raises(ValueError, match=r"feats is one tensor \(2, 4, 3, 3\); give a list of 2"):
        adapter(feats[0])
    with pytest.raises(ValueError, match=r"feats\[1\] \(2, 5, 1, 1\) has 5 channels, the adapter was made for 4"):
        adapter([feats[0], torch.zeros(2, 5, 1, 1)])
    with pytest.raises(ValueError, match=r"feats\[0\] must be a tensor \(N, C, H, W\), got NoneType"):
        adapter([None, feats[1]])
    adapter.convs[0] = nn.Identity()  # a user's own
    assert torch.equal(adapter(feats)[0], feats[0])


def test_an_adapter_outside_ddp(group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for name in ("torch.distributed.fsdp", "deepspeed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    adapter, feats = FeatureAdapter(4, 6, 1), [torch.zeros(2, 4, 3, 3)]
    with pytest.warns(UserWarning, match="the FeatureAdapter runs outside DistributedDataParallel") as found:
        adapter(feats)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.parallel.DistributedDataParallel(nn.Sequential(adapter))(feats)
        with torch.no_grad():
            adapter(feats)
        adapter.eval()(feats)


def change(name: str, value: Callable[[Tensor], Tensor], level: int = 0) -> Callable[[dict[str, Any]], None]:
    def changed(call: dict[str, Any]) -> None:
        call[name] = [value(v) if i == level else v for i, v in enumerate(call[name])]

    return changed


def each(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def changed(call: dict[str, Any]) -> None:
        call[name] = [value(v) for v in call[name]]

    return changed


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda call: call.update(values)


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda call: [c(call) for c in changes] and None


def background(z: Tensor) -> Tensor:
    """A softmax head's logits, that of the background the largest nearly everywhere."""
    return torch.cat([z, z.amax(1, keepdim=True).abs() + 1], 1)


FINDINGS: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "right": (put(), []),
    "nan": (change("student_feats", lambda v: v.index_fill(0, torch.tensor([0]), torch.nan)),
            ["student_feats[0] has 120 numbers that are NaN or inf, of 240"]),
    "probabilities": (each("teacher_logits", torch.sigmoid),
                      ["teacher_logits are all within [0, 1] and look like probabilities",
                       "level 0: the teacher sees an object at 100%", "level 1: the teacher sees an object at 100%"]),
    "softmax": (each("student_logits", lambda z: z.softmax(1)), ["student_logits are all within [0, 1]"]),
    "log_softmax": (each("student_logits", lambda z: z.log_softmax(1)), ["student_logits are the logarithm of"]),
    "background": (both(each("teacher_logits", background), each("student_logits", background)),
                   ["level 0: the teacher sees an object at 100%", "level 1: the teacher sees an object at 100%"]),
    "no mass": (change("teacher_logits", lambda z: z * 0 - 200, 1), ["level 1 has no mass, so that it adds nothing"]),
    "negative mask": (lambda call: call.update(mask=[m - 0.5 for m in richness_mask(call["teacher_logits"]).scores]),
                      ["mask[0] has negative numbers, down to -0.", "mask[1] has negative numbers"]),
    "weights": (put(feat_weight=torch.tensor(torch.nan), cls_weight=torch.tensor(-1.0)),
                ["feat_weight is nan; it must be", "cls_weight is -1.0; it must be zero or more"]),
    "itself": (lambda call: call.update(student_feats=call["teacher_feats"]), ["student_feats are teacher_feats, num"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_check_finds(rng, name):
    p = pyramid(rng, sizes=SIZES, channels=4, classes=3)
    names = ("student_feats", "teacher_feats", "student_logits", "teacher_logits")
    call: dict[str, Any] = dict(zip(names, p.inputs, strict=True))
    call["teacher_logits"] = [z - 6 for z in call["teacher_logits"]]  # objects are rare
    make, expected = FINDINGS[name]
    make(call)
    found = check(**call)
    assert len(found.findings) == len(expected), found.findings
    for text, start in zip(found.findings, expected, strict=True):
        assert text.startswith(start)
    shown = str(found)
    assert all(text in shown for text in found.findings)
    assert ("nothing looks wrong" in shown) == (name == "right")


def test_check_measures(levels):
    _, _, _, z = levels
    found = check(*levels)
    richness = richness_mask(z)
    for level, (scores, mass) in enumerate(zip(*richness, strict=True)):
        report = found.levels[level]
        assert report.shape == tuple(z[level].shape)
        assert report.mass == pytest.approx(float(mass), rel=1e-5)
        assert report.above_half == pytest.approx(float((scores > 0.5).float().mean()))
        assert (report.low, report.high) == (float(z[level].min()), float(z[level].max()))
    alone = check(levels[0], levels[1], None, None, mask=richness)
    assert [level.mass for level in alone.levels] == pytest.approx(richness.mass.tolist())
    assert "nan" not in str(alone)
    empty = [v[:0] for v in levels[0]], [v[:0] for v in levels[1]], None, [v[:0] for v in z]
    assert check(*empty).findings == [f"level {i} has no mass, so that it adds nothing" for i in range(2)]
    with pytest.raises(ValueError, match="teacher_logits is missing"):
        check(levels[0], levels[1], None, None)


def test_check_takes_what_the_loss_takes(levels):
    rare = [*levels[:3], [z - 6 for z in levels[3]]]
    assert check(*rare, **PRESETS["ultralytics"]).findings == []
    for wrong in ({"feat_weight": "0.5"}, {"cls_weight": torch.ones(2)}, {"cls_weight": -1.0}, {"normalizer": "sum"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            check(*levels, **wrong)
    with pytest.raises(ValueError, match="meta device"):
        check(*([v.to("meta") for v in each] for each in levels))


def test_check_in_16_bits(levels):
    wide = [torch.ones(2, 200, 200, dtype=torch.float16)]
    feats = [torch.zeros(2, 1, 200, 200)], [torch.ones(2, 1, 200, 200)]
    assert check(*feats, None, None, mask=wide).levels[0].mass == 80_000
    for dtype in (torch.bfloat16, torch.float16):
        logs = [z.log_softmax(1).to(dtype) for z in levels[3]]
        assert check(*levels[:3], logs).findings[0].startswith("teacher_logits are the logarithm of a softmax")
        of_softmax = check(*levels[:3], logs, cls_loss="softmax_kl").findings
        assert not any("logarithm" in finding for finding in of_softmax)
        soft = [z.softmax(1).to(dtype) for z in levels[3]]
        assert "look like a softmax's" in check(*levels[:3], soft).findings[0]


def test_check_and_masked_classes(levels):
    s, t, x, _ = levels
    z = [v - 6 for v in levels[3]]
    masked = [v.index_fill(1, torch.tensor([1]), -torch.inf) for v in z]
    assert check(s, t, x, masked).findings == []
    assert check(s, t, [v.detach().clone() for v in z], z).findings[0].startswith("student_logits are teacher_logits")
