"""The error table: each mistake has its type, and words that name the argument, level, shapes and remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import unharmed
from environment import python_environment

from frs_kernels import (
    FeatureAdapter,
    FSRLoss,
    LocalizationDistillation,
    QualityFocalDistillation,
    backends,
    fsr_loss,
    localization_distillation,
    masked_imitation_loss,
    native,
    pkd_loss,
    quality_focal_distillation,
    richness_mask,
)

Call = dict[str, Any]


def fresh() -> Call:
    """The arguments of a call that is right."""
    return {
        name: [torch.zeros(2, channels, 3, 4), torch.zeros(2, channels, 1, 1)]
        for name, channels in (("student_feats", 5), ("teacher_feats", 5), ("student_logits", 7), ("teacher_logits", 7))
    }


def put(name: str, level: int, value: Any) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call[name][level] = value

    return change


def put_all(**values: Any) -> Callable[[Call], None]:
    return lambda call: call.update(values)


Z = torch.zeros
# name: (what is done to a right call, the error, what its message must say)
TABLE: dict[str, tuple[Callable[[Call], None], type[Exception], tuple[str, ...]]] = {
    "fewer levels": (
        put_all(teacher_feats=[Z(2, 5, 3, 4)]),
        ValueError,
        ("student_feats has 2 levels", "teacher_feats has 1"),
    ),
    "fewer levels of logits": (
        put_all(student_logits=[Z(2, 7, 3, 4)]),
        ValueError,
        ("student_logits has 1 levels", "teacher_logits has 2"),
    ),
    "logits of other levels": (
        put_all(student_logits=[Z(2, 7, 3, 4)], teacher_logits=[Z(2, 7, 3, 4)]),
        ValueError,
        ("teacher_feats has 2 levels", "teacher_logits has 1"),
    ),
    "no level": (put_all(student_feats=[]), ValueError, ("student_feats is empty", "(N, C, H, W)")),
    "no level of logits": (put_all(teacher_logits=[]), ValueError, ("teacher_logits is empty",)),
    "no logits, no mask": (put_all(student_logits=None, teacher_logits=[]), ValueError, ("teacher_logits is empty",)),
    "another height": (
        put("teacher_feats", 1, Z(2, 5, 2, 1)),
        ValueError,
        ("student_feats[1] (2, 5, 1, 1)", "teacher_feats[1] (2, 5, 2, 1)", "N, H or W", "same images"),
    ),
    "another batch": (
        put("student_logits", 0, Z(3, 7, 3, 4)),
        ValueError,
        ("student_logits[0] (3, 7, 3, 4)", "teacher_logits[0] (2, 7, 3, 4)", "N, H or W"),
    ),
    "logits at another stride": (
        lambda call: call.update({k: [Z(2, 7, 6, 8), Z(2, 7, 1, 1)] for k in ("student_logits", "teacher_logits")}),
        ValueError,
        ("teacher_feats[0] (2, 5, 3, 4)", "teacher_logits[0] (2, 7, 6, 8)"),
    ),
    "feature channels": (
        put("student_feats", 1, Z(2, 4, 1, 1)),
        ValueError,
        ("student_feats[1] (2, 4, 1, 1)", "teacher_feats[1] (2, 5, 1, 1)", "4 and 5 channels", "FeatureAdapter"),
    ),
    "class channels": (
        put("student_logits", 0, Z(2, 6, 3, 4)),
        ValueError,
        ("student_logits[0]", "teacher_logits[0]", "6 and 7 channels", "anchors and classes"),
    ),
    "no channels": (put("teacher_logits", 0, Z(2, 0, 3, 4)), ValueError, ("teacher_logits[0]", "(2, 0, 3, 4)")),
    "three axes": (
        put("student_feats", 0, Z(5, 3, 4)),
        ValueError,
        ("student_feats[0]", "(N, C, H, W)", "(5, 3, 4)"),
    ),
    "a tensor for a list": (put_all(student_feats=Z(2, 5, 3, 4)), TypeError, ("student_feats", "list", "Tensor")),
    "a generator for a list": (
        put_all(teacher_logits=(v for v in [Z(2, 7, 3, 4)])),
        TypeError,
        ("teacher_logits", "list", "generator"),
    ),
    "not a tensor": (put("teacher_logits", 1, 3.0), TypeError, ("teacher_logits[1]", "tensor", "float")),
    "integers": (
        put("student_logits", 0, Z(2, 7, 3, 4, dtype=torch.int64)),
        TypeError,
        ("student_logits[0]", "int64", "floating-point", "bfloat16"),
    ),
    "complex": (put("teacher_feats", 0, Z(2, 5, 3, 4).cfloat()), TypeError, ("teacher_feats[0]", "complex64")),
    "float8": (
        put("teacher_feats", 0, Z(2, 5, 3, 4).to(torch.float8_e4m3fn)),
        TypeError,
        ("teacher_feats[0]", "float8_e4m3fn", "float16"),
    ),
    "sparse": (put("teacher_feats", 0, Z(2, 5, 3, 4).to_sparse()), TypeError, ("teacher_feats[0]", ".to_dense()")),
    "another device": (
        put("teacher_feats", 1, Z(2, 5, 1, 1, device="meta")),
        ValueError,
        ("teacher_feats[1] is on meta", "cpu", "one device"),
    ),
    "the teacher on another device": (
        put_all(teacher_logits=[Z(2, 7, 3, 4, device="meta"), Z(2, 7, 1, 1, device="meta")]),
        ValueError,
        ("teacher_logits on meta", "cpu", "move them to one device"),
    ),
    "teacher_feats missing": (put_all(teacher_feats=None), ValueError, ("teacher_feats is missing", "both")),
    "student_feats missing": (put_all(student_feats=None), ValueError, ("student_feats is missing", "both")),
    "teacher_logits missing": (put_all(teacher_logits=None), ValueError, ("teacher_logits is missing", "mask=")),
    "no mask": (put_all(teacher_logits=None, student_logits=None), ValueError, ("teacher_logits is missing", "mask=")),
    "nothing": (
        put_all(student_feats=None, teacher_feats=None, student_logits=None),
        ValueError,
        ("nothing to imitate", "student_feats", "student_logits"),
    ),
    "cls_loss": (put_all(cls_loss="mse"), ValueError, ("cls_loss='mse'", "'bce'", "'kl'")),
    "feat_loss": (put_all(feat_loss="huber"), ValueError, ("feat_loss='huber'", "'mse', 'l1', 'smooth_l1'")),
    "feat_loss for logits": (put_all(feat_loss="bce"), ValueError, ("feat_loss='bce'", "'mse', 'l1', 'smooth_l1'")),
    "cls_loss for features": (put_all(cls_loss="l1"), ValueError, ("cls_loss='l1'", "'bce', 'kl'")),
    "an option without a hash": (put_all(cls_loss=["bce"]), ValueError, ("cls_loss=['bce']", "'bce', 'kl'")),
    "normalizer": (put_all(normalizer="mean"), ValueError, ("normalizer='mean'", "'mass'", "'mass_channels'")),
    "grad_mode": (put_all(grad_mode="later"), ValueError, ("grad_mode='later'", "'auto'", "'forward'", "'backward'")),
    "backend": (put_all(backend="gpu"), ValueError, ("backend='gpu'", "'auto', 'cuda', 'triton', 'cpu', 'torch'")),
    "an option of another type": (put_all(normalizer=1), ValueError, ("normalizer=1", "'mass'")),
    "temperature zero": (put_all(temperature=0.0), ValueError, ("temperature", "positive", "0.0")),
    "temperature nan": (put_all(temperature=float("nan")), ValueError, ("temperature", "finite")),
    "temperature text": (put_all(temperature="1"), TypeError, ("temperature", "number", "str")),
    "temperature tensor": (put_all(temperature=torch.ones(())), TypeError, ("temperature", "number", "Tensor")),
    "beta negative": (put_all(beta=-0.5), ValueError, ("beta", "zero or more", "-0.5")),
    "beta infinite": (put_all(beta=float("inf")), ValueError, ("beta", "finite", "inf")),
    "beta nan": (put_all(beta=float("nan")), ValueError, ("beta", "finite", "nan")),
    "beta text": (put_all(beta="1"), TypeError, ("beta", "number", "str")),
    "beta flag": (put_all(beta=True), TypeError, ("beta", "number", "bool")),
    "eps negative": (put_all(eps=-1e-3), ValueError, ("eps", "zero or more", "-0.001")),
    "eps flag": (put_all(eps=True), TypeError, ("eps", "number", "bool")),
    "level_weights length": (put_all(level_weights=[1.0]), ValueError, ("level_weights has 1", "2 levels")),
    "level_weights number": (put_all(level_weights=2.0), TypeError, ("level_weights", "list", "float")),
    "level_weights text": (put_all(level_weights=[1.0, "a"]), TypeError, ("level_weights[1]", "number", "str")),
    "level_weights negative": (put_all(level_weights=[-1, 1.0]), ValueError, ("level_weights[0]", "zero or more")),
    "weight text": (put_all(feat_weight="1"), TypeError, ("feat_weight", "number", "0-dim", "str")),
    "weight vector": (put_all(cls_weight=Z(2)), ValueError, ("cls_weight", "0-dim", "(2,)")),
    "weight integer": (put_all(cls_weight=Z((), dtype=torch.int32)), TypeError, ("cls_weight", "int32")),
    "weight elsewhere": (
        put_all(feat_weight=Z((), device="meta")),
        ValueError,
        ("feat_weight is on meta", "cpu", "move it"),
    ),
    "mask levels": (put_all(mask=[Z(2, 3, 4)]), ValueError, ("mask has 1 levels", "teacher_feats has 2")),
    "mask shape": (
        put_all(mask=[Z(2, 3, 4), Z(2, 1, 2)]),
        ValueError,
        ("mask[1] (2, 1, 2)", "teacher_feats[1] (2, 5, 1, 1)"),
    ),
    "mask axes": (put_all(mask=[Z(2, 5, 3, 4), Z(2, 5, 1, 1)]), ValueError, ("mask[0]", "(N, H, W)", "(2, 5, 3, 4)")),
    "mask of whole numbers": (
        put_all(mask=[Z(2, 3, 4, dtype=torch.uint8), Z(2, 1, 1, dtype=torch.uint8)]),
        TypeError,
        ("mask[0]", "uint8", "floating-point"),
    ),
    "not on the CPU": (
        put_all(backend="cuda"),
        RuntimeError,
        ("'cuda' is not available", native.WHY_NOT["cuda"] or "it takes 'cuda' tensors, not 'cpu' ones"),
    ),
    "on the CPU only": (
        lambda call: call.update({k: [v.to("meta") for v in levels] for k, levels in call.items()}, backend="cpu"),
        RuntimeError,
        ("'cpu' is not available", native.WHY_NOT["cpu"] or "it takes 'cpu' tensors, not 'meta' ones"),
    ),
}  # fmt: skip
each_row = pytest.mark.parametrize("row", TABLE)


def assert_says(error: BaseException, words: tuple[str, ...]) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{str(error)!r} does not say {missing}"


@each_row
def test_every_row_of_the_table(row):
    change, kind, words = TABLE[row]
    call = fresh()
    change(call)
    dense = [v for value in call.values() if isinstance(value, list) for v in value if readable(v)]
    with unharmed(*dense), pytest.raises(kind) as error:
        fsr_loss(**call)
    assert_says(error.value, words)
    assert type(error.value) is kind


def readable(v: Any) -> bool:
    return (
        isinstance(v, torch.Tensor)
        and v.device.type == "cpu"
        and v.layout == torch.strided
        and v.dtype == torch.float32
    )


@pytest.mark.parametrize("row", [row for row in TABLE if "generator" not in row])
def test_compiled_the_errors_are_the_same(compiler, row):
    change, kind, words = TABLE[row]
    call = fresh()
    change(call)
    with pytest.raises(kind) as error:
        torch.compile(lambda: fsr_loss(**call), backend="eager")()
    assert_says(error.value, words)


@pytest.mark.parametrize("row", ["feature channels", "not a tensor", "grad_mode", "not on the CPU"])
def test_compiled_as_one_graph_the_message_is_in_the_compilers(compiler, row):
    change, _, words = TABLE[row]
    call = fresh()
    change(call)
    with pytest.raises(Exception) as error:
        torch.compile(lambda: fsr_loss(**call), backend="eager", fullgraph=True)()
    assert_says(error.value, words)


X = [Z(1, 2, 3, 4)]
OTHER_CALLS: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    "richness of a tensor": (lambda: richness_mask(Z(1, 2, 3, 4)), TypeError, ("teacher_logits", "list")),
    "richness of nothing": (lambda: richness_mask([]), ValueError, ("teacher_logits is empty",)),
    "richness of integers": (lambda: richness_mask([Z(1, 2, 3, 4).int()]), TypeError, ("teacher_logits[0]", "int32")),
    "richness backend": (lambda: richness_mask([Z(1, 2, 3, 4)], backend="x"), ValueError, ("backend='x'", "'triton'")),
    "richness not here": (lambda: richness_mask([Z(1, 2, 3, 4)], backend="cuda"), RuntimeError, ("'cuda' is not av",)),
    "imitation loss": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], [Z(1, 3, 4)], loss="huber"),
        ValueError,
        ("loss='huber'", "'mse', 'l1', 'smooth_l1', 'bce', 'kl'"),
    ),
    "imitation beta": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], [Z(1, 3, 4)], loss="smooth_l1", beta=-1),
        ValueError,
        ("beta must be zero or more", "-1"),
    ),
    "imitation channels": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 5, 3, 4)], [Z(1, 3, 4)]),
        ValueError,
        ("student[0] (1, 2, 3, 4)", "teacher[0] (1, 5, 3, 4)", "FeatureAdapter"),
    ),
    "imitation classes": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 5, 3, 4)], [Z(1, 3, 4)], loss="kl"),
        ValueError,
        ("2 and 5 channels", "anchors and classes"),
    ),
    "imitation mask": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], [Z(1, 3, 5)]),
        ValueError,
        ("mask[0] (1, 3, 5)", "teacher[0] (1, 2, 3, 4)"),
    ),
    "imitation no mask": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], None),  # type: ignore[arg-type]
        TypeError,
        ("mask must be a list", "NoneType"),
    ),
    "imitation weight": (
        lambda: masked_imitation_loss([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], [Z(1, 3, 4)], weight=Z(3)),
        ValueError,
        ("weight must be a 0-dim tensor", "(3,)"),
    ),
    "focal detach": (
        lambda: quality_focal_distillation([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], detach=1),  # type: ignore[call-overload]
        TypeError,
        ("detach must be True or False", "1"),
    ),
    "focal beta": (
        lambda: quality_focal_distillation(X, X, beta=-0.5),
        ValueError,
        ("beta must be zero or more", "-0.5"),
    ),
    "focal teacher": (
        lambda: quality_focal_distillation([Z(1, 2, 3, 4)], Z(1, 2, 3, 4)),  # type: ignore[call-overload]
        TypeError,
        ("teacher_logits must be a list", "Tensor"),
    ),
    "focal classes": (
        lambda: quality_focal_distillation([Z(1, 2, 3, 4)], [Z(1, 5, 3, 4)]),
        ValueError,
        ("2 and 5 channels", "anchors and classes"),
    ),
    "focal mask": (
        lambda: quality_focal_distillation([Z(1, 2, 3, 4)], [Z(1, 2, 3, 4)], [Z(1, 3, 5)]),
        ValueError,
        ("mask[0] (1, 3, 5)", "teacher_logits[0] (1, 2, 3, 4)"),
    ),
    "boxes": (
        lambda: localization_distillation([Z(1, 8, 3, 4)], [Z(1, 8, 3, 5)]),
        ValueError,
        ("student_reg[0] (1, 8, 3, 4)", "teacher_reg[0] (1, 8, 3, 5)"),
    ),
    "imitation sparse mask": (
        lambda: masked_imitation_loss(X, X, [Z(1, 1, 3, 4).to_sparse()]),
        TypeError,
        ("mask[0] is torch.sparse_coo", "to_dense"),
    ),
    "imitation long weight": (
        lambda: masked_imitation_loss(X, X, [Z(1, 3, 4)], weight=10**400),
        ValueError,
        ("weight must be zero or more and finite",),
    ),
    "rows long eps": (lambda: pkd_loss(X, X, eps=10**400), ValueError, ("eps must be zero or more and finite",)),
    "rows short weight": (
        lambda: pkd_loss(X, X, weight=torch.zeros((), dtype=torch.float8_e4m3fn)),
        TypeError,
        ("weight must be a number or a tensor of one of the levels' dtypes", "float8"),
    ),
    "module unknown": (lambda: FSRLoss(foo=1), TypeError, ("unknown: foo", "feat_loss")),  # type: ignore[call-arg]
    "focal module": (
        lambda: QualityFocalDistillation(feat_loss="l1"),  # type: ignore[call-arg]
        TypeError,
        ("QualityFocalDistillation takes no feat_loss",),
    ),
    "boxes module": (
        lambda: LocalizationDistillation(beta=2.0),  # type: ignore[call-arg]
        TypeError,
        ("LocalizationDistillation takes no beta",),
    ),
    "module cls_loss": (lambda: FSRLoss(cls_loss="x"), ValueError, ("cls_loss='x'", "'kl'")),
    "module feat_loss": (lambda: FSRLoss(feat_loss="kl"), ValueError, ("feat_loss='kl'", "'smooth_l1'")),
    "module beta": (lambda: FSRLoss(beta=-1.0), ValueError, ("beta", "-1.0")),
    "module normalizer": (lambda: FSRLoss(normalizer="x"), ValueError, ("normalizer='x'",)),
    "module grad_mode": (lambda: FSRLoss(grad_mode="x"), ValueError, ("grad_mode='x'",)),
    "module backend": (lambda: FSRLoss(backend="x"), ValueError, ("backend='x'",)),
    "module temperature": (lambda: FSRLoss(temperature=-1.0), ValueError, ("temperature", "-1.0")),
    "module eps": (lambda: FSRLoss(eps=float("inf")), ValueError, ("eps", "finite")),
    "module weight": (lambda: FSRLoss(feat_weight=Z(2)), ValueError, ("feat_weight", "(2,)")),
    "module weight text": (lambda: FSRLoss(cls_weight="1"), TypeError, ("cls_weight", "str")),  # type: ignore[arg-type]
    "adapter levels": (lambda: FeatureAdapter(2, 3, 0), ValueError, ("num_levels", "0")),
    "adapter kernel": (lambda: FeatureAdapter(2, 3, 1, kernel_size=2), ValueError, ("kernel_size", "odd", "2")),
    "adapter in_channels": (lambda: FeatureAdapter([2, 2], 3, 1), ValueError, ("in_channels has 2", "num_levels is 1")),
    "adapter out_channels": (lambda: FeatureAdapter(2, [3], 2), ValueError, ("out_channels has 1", "num_levels is 2")),
    "adapter no channels": (lambda: FeatureAdapter(0, 3, 1), ValueError, ("in_channels", "1 or more", "0")),
    "adapter input": (lambda: FeatureAdapter(2, 3, 2)(X), ValueError, ("feats has 1 levels", "made for 2")),
}  # fmt: skip


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_the_other_functions_and_modules(call):
    function, kind, words = OTHER_CALLS[call]
    with pytest.raises(kind) as error:
        function()
    assert_says(error.value, words)


def test_a_backend_that_is_here_is_not_refused():
    for name, reason in backends.available().items():
        if reason is None:
            call = fresh()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            call = {key: [v.to(device) for v in levels] for key, levels in call.items()}
            assert fsr_loss(**call, backend=name).isfinite()


def test_without_the_interpreter_triton_refuses_cpu_tensors():
    code = (
        "import torch, frs_kernels as f\n"
        "x = [torch.zeros(1, 2, 3, 4)]\n"
        "try:\n    f.fsr_loss(x, x, x, x, backend='triton')\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(f.backends.choose('auto', 'cpu'), f.fsr_loss(x, x, x, x).item() > 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=python_environment(TRITON_INTERPRET=None), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    message, chosen = result.stdout.splitlines()
    assert "'triton' is not available" in message
    assert "'cpu'" in message
    assert "GPU" in message
    assert "TRITON_INTERPRET=1" in message
    assert chosen == ("torch True" if native.WHY_NOT["cpu"] else "cpu True")
