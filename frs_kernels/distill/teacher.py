"""`fast_teacher`: a frozen detector made ready to be run for its features and class logits alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from frs_kernels import checks
from frs_kernels.distill.tap import tensors_in

Run = Callable[[nn.Module], Any]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def fast_teacher(
    model: nn.Module,
    run: Run,
    *,
    tapped: Collection[str] = (),
    fold: bool = True,
    free: bool = False,
    dtype: torch.dtype | str | None = None,
    channels_last: bool = False,
    compile: bool | Mapping[str, Any] = False,
) -> nn.Module:
    """A copy of a detector, frozen, in eval mode, that gives what `run` needs of it for less.

    The copy shares all weights that stay as they are; the model itself is left alone.

        teacher = fast_teacher(model, lambda m: m(images), tapped=["neck", "head.cls"], dtype="auto")

    Args:
        model: the detector.
        run: runs it on images of its dtype, as far as is needed. It is called some times, without gradient.
        tapped: names of modules whose output is looked at.
        fold: batch norms that follow a convolution become part of it. fp32 outputs change in their last bits.
        free: modules with weights that `run` does not call are taken out, their memory is freed with the model's.
        dtype: of weights and activations, a torch.dtype or "bfloat16" and the like; "auto": what `fast_dtype` says.
            Outputs are then rounded to it.
        channels_last: weights in channels_last, for images that are.
        compile: torch.compile for the largest parts that run once in a pass and in which nothing is tapped; a dict has
            its keywords. dict(mode="reduce-overhead", dynamic=False) makes a CUDA graph of each size of images, up to
            `torch._dynamo.config.recompile_limit` (8); others run as they are. A copy of the teacher is not compiled.

    Raises:
        ValueError: an unknown dtype; no such module; `run` calls nothing; the model cannot be copied; there is nothing
            to compile.
        TypeError: an option of a wrong type.
    """
    if isinstance(dtype, str):
        checks.check_option("dtype", dtype, DTYPES)
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    for name, value in (("fold", fold), ("free", free), ("channels_last", channels_last)):
        checks.check_flag(name, value)
    if not isinstance(compile, (bool, Mapping)):
        raise TypeError(f"compile must be True, False or a dict of torch.compile's keywords, got {compile!r}")
    for name in tapped:
        if not any(name == known for known, _ in model.named_modules(remove_duplicate=False)):
            raise ValueError(f"tapped: {type(model).__name__} has no module {name!r}")
    made = _sharing_copy(model).eval().requires_grad_(False)
    with torch.no_grad():
        if fold:
            fold_batch_norms(made, run, tapped)
        # Before anything is converted: `run` has images of the model's own dtype.
        calls = _calls(made, run) if free or compile is not False else Counter()
        if free:
            _free(made, run, calls)
        parts = [] if compile is False else _parts_to_compile(made, calls, tapped)
    if dtype is not None:
        device = next(made.parameters(), torch.empty(0)).device
        made.to(dtype=fast_dtype(device) if isinstance(dtype, str) else dtype)
    if channels_last:
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in parts:
        _compile(part, compile if isinstance(compile, Mapping) else {}, first=part is parts[0])
    return made


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 or fp16 where the device has instructions for it, else fp32.

    CUDA: bf16 from sm_80 on, fp16 on sm_70 and sm_75. CPU: bf16 with avx512_bf16 or amx.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def _sharing_copy(model: nn.Module) -> nn.Module:
    """New modules and parameters over the same memory: setting one anew in the copy leaves the original."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the teacher cannot be copied: {error}; a distiller takes it as it is with fast_teacher=False"
        ) from error


class _Consumers(TorchFunctionMode):
    """Which convolutions' outputs are used by something else than the batch norm that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.producer: dict[int, nn.Module] = {}  # of the tensor with this id, which `kept` keeps alive
        self.kept: list[Tensor] = []
        self.norm: nn.Module | None = None
        self.used: set[nn.Module] = set()

    def see(self, nested: Any) -> None:
        self.used |= {self.producer[id(t)] for t in tensors_in(nested) if id(t) in self.producer}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if self.norm is None:
            self.see((args, kwargs))
        return func(*args, **(kwargs or {}))


def fold_batch_norms(model: nn.Module, run: Run, tapped: Collection[str] = ()) -> int:
    """Make batch norms in eval mode part of the convolution before them, in place; how many.

    Those are folded whose input is the output of one nn.Conv2d, both called once, that nothing else uses and nobody
    taps, and that have no hooks. Batch norms are torch's own and those called FrozenBatchNorm2d (torchvision's,
    detectron2's) with an eps to be read, which transformers' have not; a subclass may do more than a batch norm.
    """
    calls: dict[nn.Module, int] = {}
    before: dict[nn.Module, nn.Module] = {}
    consumers = _Consumers()

    def conv_ran(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        consumers.producer[id(output)] = module
        consumers.kept.append(output)

    def norm_runs(module: nn.Module, args: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if args and id(args[0]) in consumers.producer:
            before[module] = consumers.producer[id(args[0])]
        consumers.norm = module

    def norm_ran(*_: Any) -> None:
        consumers.norm = None

    def is_seen(_: Any, args: Any, output: Any) -> None:
        consumers.see((args, output))

    handles: list[Any] = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(conv_ran))
        elif _is_norm(module):
            handles += [module.register_forward_pre_hook(norm_runs), module.register_forward_hook(norm_ran)]
    handles += [model.get_submodule(name).register_forward_hook(is_seen) for name in tapped]
    try:
        with consumers:
            consumers.see(run(model))
    finally:
        for handle in handles:
            handle.remove()

    claimed = list(before.values())
    folded = 0
    for norm, conv in before.items():
        alone = calls[norm] == calls[conv] == claimed.count(conv) == 1
        if alone and conv not in consumers.used:
            _fold(conv, norm)
            folded += 1
    return folded


def _is_norm(module: nn.Module) -> bool:
    known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or type(module).__name__.endswith("FrozenBatchNorm2d")
    written = isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "eps")
    return known and written and not module.training


def _fold(conv: Any, norm: Any) -> None:
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))
    # The object itself becomes an identity: it may be held under several names, or in a list that is no module.
    norm._parameters.clear()
    norm._buffers.clear()
    norm.__class__ = nn.Identity


class _Freed(nn.Module):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this part of the teacher was taken out: fast_teacher(free=True) keeps what is tapped")


def _calls(model: nn.Module, run: Run) -> Counter[nn.Module]:
    """How often each module is called."""
    calls: Counter[nn.Module] = Counter()
    handles = [m.register_forward_pre_hook(lambda module, _: calls.update([module])) for m in model.modules()]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError("run called no module of the teacher")
    return calls


def _parts_to_compile(model: nn.Module, calls: Counter[nn.Module], tapped: Collection[str]) -> list[nn.Module]:
    """The largest modules that are called once, in the order of their calls.

    A head that is called once a level would be compiled for each size.
    """
    seen = {model.get_submodule(name) for name in tapped}
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer ones first
        large = any(True for _ in module.children()) and any(True for _ in module.parameters())
        if calls[module] == 1 and large and module not in inside and not seen & set(module.modules()):
            found.append(module)
            inside |= set(module.modules())
    if not found:
        raise ValueError("compile: the teacher has no part that runs once in a pass and in which nothing is tapped")
    return sorted(found, key=list(calls).index)


def _compile(module: Any, options: Mapping[str, Any], first: bool) -> None:
    """nn.Module.compile, which for torch's own containers does nothing (2.13): Dynamo skips frames of torch's files."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    compiled = torch.compile(call, **options)

    def begin(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    # Else each part's call would begin a step of its own, in which the outputs of the parts before are overwritten.
    graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
    module._compiled_call_impl = begin if first and graphs else compiled


def _free(model: nn.Module, run: Run, calls: Counter[nn.Module]) -> None:
    """Take out the largest modules with parameters none of which is called."""
    called = calls.keys()
    gone: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in gone) or not any(True for _ in module.parameters()):
            continue
        if not called & set(module.modules()):
            gone.append(name)
    for name in gone:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _Freed())
    try:
        run(model)
    except Exception as error:
        raise ValueError(
            f"a part whose weights are read without calling it was taken out ({error}); leave out free=True"
        ) from error
