"""`fast_teacher`: what it folds, shares, frees and rounds, and that nothing else changes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_detectors import Detector, Normed, distiller, images

from frs_kernels import fsr_loss
from frs_kernels.distill import fast_teacher, masks, teacher


class FrozenBatchNorm2d(nn.Module):
    """torchvision's frozen batch norm, in short: buffers, and no functional call of batch_norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.3), ("bias", 0.2), ("running_mean", 0.1), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((channels,), value))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight * (self.running_var + self.eps).rsqrt()
        return x * w[:, None, None] + (self.bias - self.running_mean * w)[:, None, None]


class Net(nn.Module):
    """A convolution and a batch norm in every relation that they have in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.biased = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8, affine=True))
        self.frozen = nn.Sequential(nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8))
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shared, self.norms = nn.Conv2d(8, 8, 1), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.between = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.BatchNorm2d(8))
        self.out = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.unused = nn.Sequential(nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.frozen(self.biased(self.plain(x)))
        y = self.conv(x)
        x = self.norm(y) + y  # the convolution's output is used beside the norm
        levels = [norm(self.shared(x)) for norm in self.norms]
        return [*levels, self.between(x), self.out(x)]


def run(x: Tensor) -> Any:
    return lambda model: model(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def test_what_is_folded_and_what_is_not(net):
    x = images()
    right = net(x)
    before = copy.deepcopy(net.state_dict())
    fast = fast_teacher(net, run(x), tapped=["out.0"])
    found = [name for name, module in fast.named_modules() if isinstance(module, nn.Identity)]
    assert found == ["plain.1", "biased.1", "frozen.1"]
    for a, b in zip(fast(x), right, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert {name for name, m in fast_teacher(net, run(x)).named_modules() if isinstance(m, nn.Identity)} == {
        *found, "out.1",
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net(x), right, strict=True))
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_a_norm_in_training_mode_stays(net):
    made = copy.deepcopy(net)
    made.norm.train()
    assert teacher.fold_batch_norms(made, run(images())) == 4
    assert teacher.fold_batch_norms(copy.deepcopy(net).train(), run(images())) == 0


def test_what_stays_is_shared_and_a_change_of_dtype_is_not(net):
    fast = fast_teacher(net, run(images()))
    assert fast.shared.weight.data_ptr() == net.shared.weight.data_ptr()
    assert fast.plain[0].weight.data_ptr() != net.plain[0].weight.data_ptr()
    fast_teacher(net, run(images()), dtype=torch.bfloat16)
    fast.to(torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_what_is_not_called_is_freed(net):
    fast = fast_teacher(net, run(images()), free=True)
    assert sum(p.numel() for p in fast.unused.parameters()) == 0
    assert len(list(net.unused.parameters())) == 4
    assert all(
        torch.equal(a, b) for a, b in zip(fast(images()), fast_teacher(net, run(images()))(images()), strict=True)
    )
    with pytest.raises(RuntimeError, match=r"taken out: fast_teacher\(free=True\)"):
        fast.unused(images())
    with pytest.raises(ValueError, match="run called no module"):
        fast_teacher(net, lambda model: None, free=True)


def test_dtype_and_layout(net, monkeypatch):
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda capable=capable: capable)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        made = fast_teacher(net, run(images()), dtype="auto", channels_last=True)
        assert {p.dtype for p in made.parameters()} == {dtype}
        assert made.plain[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="dtype='fast' is unknown"):
        fast_teacher(net, run(images()), dtype="fast")


def test_a_distiller_takes_it_by_default():
    torch.manual_seed(5)
    plain, x = Normed(9), images()
    d = distiller(teacher=plain)
    assert d.teacher is not plain
    assert sum(isinstance(m, nn.Identity) for m in d.teacher.modules()) == 3
    with torch.no_grad():
        feats = plain.eval().neck(x)
        z = [plain.head.cls(v) for v in feats]
    right = fsr_loss(d.adapter(d.student.neck(x)), feats, None, z)
    assert torch.allclose(d(x)["loss_frs_feat"], right, rtol=1e-5)
    d = distiller(teacher=plain, fast_teacher=False)
    assert d.teacher is plain
    assert not plain.training


def test_a_distiller_with_a_teacher_of_16_bits():
    torch.manual_seed(5)
    plain, x = Normed(9), images()
    d = distiller(teacher=plain, fast_teacher={"dtype": torch.bfloat16, "channels_last": True, "free": True})
    t = d.observe(x)
    assert {v.dtype for v in (*t.feats, *t.logits)} == {torch.bfloat16}
    assert sum(p.numel() for p in d.teacher.head.box.parameters()) == 0
    losses = d(x)
    right = distiller(teacher=plain)(x)
    for name in ("loss_frs_feat", "loss_frs_cls"):
        assert losses[name].dtype == torch.float32
        assert torch.allclose(losses[name], right[name], rtol=0.05)
    sum(losses.values()).backward()


def test_a_teacher_that_overflows_is_an_error_that_names_the_level():
    plain = Normed(9)
    with torch.no_grad():
        plain.neck.convs[1][0].bias.fill_(7e4)
    d = distiller(teacher=plain, fast_teacher={"dtype": torch.float16})
    with pytest.raises(ValueError, match=r"the teacher's feats\[1\] are not finite in torch.float16"):
        d(images())


def test_16_bits_are_decided_where_the_first_step_is(monkeypatch):
    """mmengine, among others, moves a model to its device after it was built."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    d = distiller(teacher=Normed(9), fast_teacher={"dtype": "auto"})
    assert {p.dtype for p in d.teacher.parameters()} == {torch.float32}
    d(images())
    assert {p.dtype for p in d.teacher.parameters()} == {torch.bfloat16}


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def make(kind: str) -> nn.Module:
    conv, norm = nn.Conv2d(3, 4, 1), Activated(4) if kind == "a norm that does more" else nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if kind == "a hook on the convolution":
        conv.register_forward_hook(lambda module, given, out: out.relu())
    if kind == "a hook on the norm":
        norm.register_forward_hook(lambda module, given, out: out.relu())
    if kind == "two names":
        model.other = norm
        model.steps = [conv, norm]
        model.forward = lambda x: model.steps[1](model.steps[0](x))
    if kind == "a container that is tapped":
        model = nn.Sequential(nn.Sequential(conv), nn.Sequential(norm)).eval()
    return model


@pytest.mark.parametrize(
    ("kind", "folded"),
    [
        ("nothing special", 1),
        ("a norm that does more", 0),
        ("a hook on the convolution", 0),
        ("a hook on the norm", 0),
        ("two names", 1),
        ("a container that is tapped", 0),
    ],
)
def test_relations_that_do_not_show(kind, folded):
    torch.manual_seed(0)
    model = make(kind)
    right = model(images())
    tapped = ["0"] if kind == "a container that is tapped" else []
    with torch.no_grad():
        assert teacher.fold_batch_norms(model, run(images()), tapped) == folded
        assert torch.allclose(model(images()), right, rtol=1e-4, atol=1e-5)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Any:
        rows = x.flatten(2)[:, :, :8]
        return self.attention(rows, rows, rows)


def test_what_is_read_and_not_called_cannot_be_freed():
    with pytest.raises(ValueError, match="leave out free=True"):
        fast_teacher(Attends(), run(images()), free=True)


def test_a_teacher_that_cannot_be_copied():
    plain = Normed(9)
    plain.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"the teacher cannot be copied: .*fast_teacher=False"):
        distiller(teacher=plain)
    distiller(teacher=plain, fast_teacher=False)(images())


@pytest.fixture
def dynamo() -> Iterator[None]:
    """As a new process has it, before and after: it keeps what it once skipped."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_teacher():
    plain, x = Normed(9), images()
    right = distiller(teacher=plain)(x)
    plain.neck = torch.compile(plain.neck, backend="eager")
    losses = distiller(teacher=plain)(x)
    assert torch.allclose(losses["loss_frs_feat"], right["loss_frs_feat"], rtol=1e-4)


@pytest.mark.usefixtures("dynamo")
def test_parts_that_run_once_and_are_not_tapped_are_compiled():
    plain, x = Normed(9), images()
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    right = distiller(teacher=plain)(x)
    d = distiller(teacher=plain, fast_teacher={"compile": {"backend": backend}})
    parts = [name for name, module in d.teacher.named_modules() if module._compiled_call_impl is not None]
    assert parts == ["neck.convs.0", "neck.convs.1", "neck.convs.2"]
    assert all(module._compiled_call_impl is None for module in plain.modules())
    for _ in range(2):
        losses = d(x)
        for name in ("loss_frs_feat", "loss_frs_cls"):
            assert torch.allclose(losses[name], right[name], rtol=1e-5)
    assert len(compiled) >= 1
    other = copy.deepcopy(d)
    assert all(module._compiled_call_impl is None for module in other.teacher.modules())
    assert torch.equal(other(x)["loss_frs_feat"], d(x)["loss_frs_feat"])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("mode", "marks"), [("reduce-overhead", 1), ("default", 0)])
def test_a_pass_of_compiled_parts_is_one_step_of_their_cuda_graphs(monkeypatch, mode, marks):
    """Else each part would begin one, and overwrite what the parts before it gave out."""
    order: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: order.append("step"))
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *args: order.append("part") or call(*args))
    d, x = distiller(teacher=Normed(9), fast_teacher={"compile": {"mode": mode}}), images()
    order.clear()
    d(x)
    assert order == ["step"] * marks + ["part"] * 3


def test_which_parts_are_compiled(net):
    def parts(model: nn.Module, **options: Any) -> list[str]:
        fast = fast_teacher(model, run(images()), compile={"backend": "eager"}, **options)
        return [name for name, module in fast.named_modules() if module._compiled_call_impl is not None]

    assert parts(net) == [""]
    assert parts(net, tapped=["out.0"]) == ["plain", "biased", "frozen", "between"]
    with pytest.raises(ValueError, match="compile: the teacher has no part that runs once"):
        parts(Detector(), tapped=["neck", "head.cls"])


@pytest.mark.parametrize("mask", ["richness", masks.richness])
def test_a_teacher_of_smaller_images(mask):
    """Asked for, its levels come at the sizes of the student's; otherwise other sizes are refused."""
    d, x = distiller(fast_teacher={"image_scale": 0.5}, mask=mask), images(side=96)
    losses = d(x)
    with torch.no_grad():
        small = nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        t_feats = d.teacher.neck(small)
        z = [d.teacher.head.cls(v) for v in t_feats]
    feats = d.student.neck(x)
    assert [v.shape[2] for v in t_feats] == [8, 4, 2]
    t_feats, z = (
        [nn.functional.interpolate(v, s.shape[2:], mode="bilinear") for v, s in zip(levels, feats, strict=True)]
        for levels in (t_feats, z)
    )
    right = fsr_loss(d.adapter(feats), t_feats, [d.student.head.cls(v) for v in feats], z, return_terms=True)
    assert torch.allclose(losses["loss_frs_feat"], right.feat, rtol=1e-5)
    assert torch.allclose(losses["loss_frs_cls"], right.cls, rtol=1e-5)
    with pytest.raises(ValueError, match="image_scale must be positive"):
        distiller(fast_teacher={"image_scale": 0.0})


def test_smaller_images_are_whole_multiples_of_32():
    """What detectors pad to; and a 16-bit student's, which cannot be resized in 16 bits on a CPU."""
    d = distiller(fast_teacher={"image_scale": 0.5})
    for side, small in ((96, 64), (160, 64), (224, 128), (32, 32), (8, 32)):
        assert d._prepared(images(side=side)).shape[2:] == (small, small)
    half = distiller(fast_teacher={"image_scale": 0.5}).bfloat16()
    assert half(images(side=96).bfloat16())["loss_frs_feat"].isfinite()


@pytest.mark.parametrize(
    ("fast", "error", "words"),
    [
        ("auto", TypeError, "fast_teacher must be True, False or a dict"),
        (None, TypeError, "fast_teacher must be True, False or a dict"),
        (
            {"scale": 0.5},
            ValueError,
            "fast_teacher has scale; the valid ones are fold, free, dtype, .*image_scale, stream",
        ),
        ({"stream": "no"}, TypeError, "stream must be True or False"),
        ({"free": 1}, TypeError, "free must be True or False"),
        ({"compile": "max-autotune"}, TypeError, "compile must be True, False or a dict of torch.compile's keywords"),
        ({"dtype": "half"}, ValueError, "dtype='half' is unknown; the valid ones are 'auto', 'float32', 'bfloat16'"),
    ],
)
def test_options_that_are_none(fast, error, words):
    with pytest.raises(error, match=words):
        distiller(fast_teacher=fast)


def test_a_dtype_by_its_name():
    d = distiller(teacher=Normed(9), fast_teacher={"dtype": "bfloat16"})
    assert {p.dtype for p in d.teacher.parameters()} == {torch.bfloat16}


class Alias(nn.Module):
    """A module under two names, of which one is inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.neck = self.body[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_tapped_module_by_another_name_is_not_compiled():
    options = {"compile": {"backend": "eager"}, "fold": False}
    fast = fast_teacher(Alias(), run(images()), tapped=["neck"], **options)
    assert [name for name, m in fast.named_modules() if m._compiled_call_impl is not None] == ["body.0"]
    with pytest.raises(ValueError, match="tapped: Alias has no module 'nek'"):
        fast_teacher(Alias(), run(images()), tapped=["nek"], **options)


def test_a_copy_of_a_compiled_distiller_is_not_compiled():
    d = distiller()
    d.compile(backend="eager")
    assert copy.deepcopy(d)._compiled_call_impl is None
