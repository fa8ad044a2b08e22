"""The loss and the adapter as modules."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from frs_kernels import backends, checks
from frs_kernels.functional import fsr_loss
from frs_kernels.heads import localization_distillation, quality_focal_distillation
from frs_kernels.levels import Levels
from frs_kernels.options import Options, Weight
from frs_kernels.results import FSRTerms, ImitationTerms, Richness, RowTerms
from frs_kernels.rows import cwd_loss, pkd_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from frs_kernels.options import Backend, GroupOptions, LossOptions, TermOptions


class _OfGroup(nn.Module):
    """A loss whose mass is averaged over a process group."""

    _group: _Group

    @property
    def process_group(self) -> ProcessGroup | None:
        """A copy of the module has it, too; a pickle has not, and says so where it is read."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = _Group(group)


class FSRLoss(_OfGroup):
    """`fsr_loss` with its options kept. `FSRLoss(**PRESETS["gfl"])`.

    The arguments are those of `fsr_loss`. A weight given as a number stays one and may be set between steps, for a
    warm-up; a weight given as a 0-dim tensor becomes a buffer: it follows `.to(device)`, and `.fill_()` changes it
    without a recompile. Weights are not trained. An unknown option raises here, not at the first step.
    """

    def __init__(
        self,
        feat_weight: Weight = 1.0,
        cls_weight: Weight = 1.0,
        *,
        process_group: ProcessGroup | None = None,
        return_terms: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.feat_weight: Weight
        self.cls_weight: Weight
        for name, weight in (("feat_weight", feat_weight), ("cls_weight", cls_weight)):
            checks.check_weight(name, weight, getattr(weight, "device", None))
            if isinstance(weight, Tensor):
                self.register_buffer(name, weight.detach().clone(), persistent=False)
            else:
                setattr(self, name, weight)
        self.options = Options.of(**options)
        self._group = _Group(process_group)
        self.return_terms = return_terms

    def forward(
        self,
        student_feats: Levels | None,
        teacher_feats: Levels | None,
        student_logits: Levels | None,
        teacher_logits: Levels | None,
        *,
        mask: Levels | Richness | None = None,
    ) -> Tensor | FSRTerms:
        """The loss, or `FSRTerms` if the module was made with return_terms=True; arguments as `fsr_loss`."""
        return fsr_loss(
            student_feats,
            teacher_feats,
            student_logits,
            teacher_logits,
            feat_weight=self.feat_weight,
            cls_weight=self.cls_weight,
            mask=mask,
            process_group=self.process_group,
            return_terms=self.return_terms,
            **self.options._asdict(),
        )

    def extra_repr(self) -> str:
        """The weights, and every option that is not its default."""
        usual = Options()._asdict() | {"process_group": None, "return_terms": False}
        given = self.options._asdict() | {"process_group": self.process_group, "return_terms": self.return_terms}
        shown = {name: value for name, value in given.items() if value != usual[name]}
        weights = {"feat_weight": self.feat_weight, "cls_weight": self.cls_weight}
        return ", ".join(f"{name}={value!r}" for name, value in (weights | shown).items())


class _Weighed(nn.Module):
    """A loss with one weight, its options kept."""

    def __init__(self, weight: Weight, options: dict[str, Any]) -> None:
        super().__init__()
        checks.check_weight("weight", weight, getattr(weight, "device", None))
        self.weight: Weight
        if isinstance(weight, Tensor):
            self.register_buffer("weight", weight.detach().clone(), persistent=False)
        else:
            self.weight = weight
        self.options = options

    def extra_repr(self) -> str:
        """The weight, and the other options that are given."""
        given = {name: value for name, value in self.options.items() if value is not None and value is not False}
        shown = {name: value for name, value in given.items() if value != "auto"}
        return ", ".join(f"{name}={value!r}" for name, value in ({"weight": self.weight} | shown).items())


class _RowLoss(_Weighed):
    """A loss along rows."""

    def __init__(self, weight: Weight, own: dict[str, float], options: dict[str, Any], return_terms: bool) -> None:
        checks.check_level_weights(options["level_weights"], None)
        checks.check_option("backend", options["backend"], ("auto", *backends.BACKENDS))
        super().__init__(weight, {**own, **options, "return_terms": return_terms})


class PKDLoss(_RowLoss):
    """`pkd_loss` with its options kept: `PKDLoss(6.0)`. The arguments are those of `pkd_loss`.

    A weight given as a number may be set between steps; one given as a 0-dim tensor becomes a buffer.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        eps: float = 1e-6,
        level_weights: Sequence[float] | None = None,
        backend: Backend = "auto",
        return_terms: bool = False,
    ) -> None:
        checks.check_number("eps", eps, positive=False)
        super().__init__(weight, {"eps": eps}, {"level_weights": level_weights, "backend": backend}, return_terms)

    def forward(self, student_feats: Levels, teacher_feats: Levels) -> Tensor | RowTerms:
        found: Tensor | RowTerms = pkd_loss(student_feats, teacher_feats, weight=self.weight, **self.options)
        return found


class CWDLoss(_RowLoss):
    """`cwd_loss` with its options kept: `CWDLoss(10.0)`. Its arguments; weight as in `PKDLoss`."""

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        temperature: float = 1.0,
        level_weights: Sequence[float] | None = None,
        backend: Backend = "auto",
        return_terms: bool = False,
    ) -> None:
        checks.check_number("temperature", temperature, positive=True)
        own = {"temperature": temperature}
        super().__init__(weight, own, {"level_weights": level_weights, "backend": backend}, return_terms)

    def forward(self, student: Levels, teacher: Levels) -> Tensor | RowTerms:
        found: Tensor | RowTerms = cwd_loss(student, teacher, weight=self.weight, **self.options)
        return found


class _HeadLoss(_Weighed, _OfGroup):
    """A loss of what a head emits, under a mask."""

    of: Callable[..., Any]

    def __init__(self, weight: Weight, own: dict[str, Any], options: Any) -> None:
        group = options.pop("process_group", None)
        if unknown := options.keys() - inspect.signature(type(self).of).parameters.keys():
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")
        Options.of(**options)
        super().__init__(weight, {**own, **options})
        self._group = _Group(group)

    def forward(
        self, student: Levels, teacher: Levels, mask: Levels | Richness | None = None
    ) -> Tensor | ImitationTerms:
        found: Tensor | ImitationTerms = type(self).of(
            student, teacher, mask, weight=self.weight, process_group=self.process_group, **self.options
        )
        return found


class QualityFocalDistillation(_HeadLoss):
    """`quality_focal_distillation` with its options kept: `QualityFocalDistillation(beta=2.0)`. Its arguments.

    A weight given as a number may be set between steps; one given as a 0-dim tensor becomes a buffer.
    """

    of = quality_focal_distillation

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        detach: bool = False,
        return_terms: bool = False,
        **options: Unpack[TermOptions],
    ) -> None:
        checks.check_flag("detach", detach)
        super().__init__(weight, {"detach": detach, "return_terms": return_terms}, options)


class LocalizationDistillation(_HeadLoss):
    """`localization_distillation` with its options kept: `LocalizationDistillation(0.25)`. Its arguments; weight as
    in `QualityFocalDistillation`."""

    of = localization_distillation

    def __init__(
        self, weight: Weight = 1.0, *, sides: int = 4, return_terms: bool = False, **options: Unpack[GroupOptions]
    ) -> None:
        checks.check_count("sides", sides)
        super().__init__(weight, {"sides": sides, "return_terms": return_terms}, options)


class _Group:
    """A process group, which can be neither copied nor pickled."""

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None:
            checks.check_group(group)
        self.group = group

    def __deepcopy__(self, memo: object) -> _Group:
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (_Group, (None,)) if self.group is None else (_without_group, ())


def _without_group() -> _Group:
    warnings.warn(
        "this loss was pickled with a process group, which lives with its process: set its process_group anew, or "
        "the mass is averaged over no ranks",
        stacklevel=2,
    )
    return _Group(None)


class FeatureAdapter(nn.Module):
    """The student's features in the teacher's channels: one convolution a level, not shared, with bias.

    The paper's phi (arXiv 2111.00674, eq. 4): no norm, no activation, used even where the channels agree already.

    Args:
        in_channels, out_channels: the student's and the teacher's channels, one number for all levels or one a level.
        num_levels: L.
        kernel_size: odd, so that H and W stay; 3 in the paper's code.

    Raises:
        ValueError: a list of channels whose length is not num_levels, an even kernel_size, a number below 1.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        num_levels: int,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be 1 or more, got {num_levels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that H and W stay, got {kernel_size}")
        ins = _per_level("in_channels", in_channels, num_levels)
        outs = _per_level("out_channels", out_channels, num_levels)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel_size, padding=kernel_size // 2) for i, o in zip(ins, outs, strict=True)
        )

    def forward(self, feats: Levels | Mapping[str, Tensor]) -> list[Tensor]:
        """One (N, C_in, H, W) tensor a level to one (N, C_out, H, W) a level; those of a dict are taken in order.

        Raises:
            ValueError: one tensor in place of a list of them; the number of levels is not num_levels; another number
                of channels than the adapter was made for.
        """
        _warn_if_alone(self)
        if isinstance(feats, Mapping):
            feats = list(feats.values())
        if isinstance(feats, Tensor):
            raise ValueError(
                f"feats is one tensor {tuple(feats.shape)}; give a list of {len(self.convs)}, (N, C, H, W) a level"
            )
        if len(feats) != len(self.convs):
            raise ValueError(f"feats has {len(feats)} levels, the adapter was made for {len(self.convs)}")
        for level, (conv, x) in enumerate(zip(self.convs, feats, strict=True)):
            if not isinstance(x, Tensor):
                raise ValueError(f"feats[{level}] must be a tensor (N, C, H, W), got {type(x).__name__}")
            if isinstance(conv, nn.Conv2d) and x.dim() == 4 and x.shape[1] != conv.in_channels:
                raise ValueError(
                    f"feats[{level}] {tuple(x.shape)} has {x.shape[1]} channels, the adapter was made for "
                    f"{conv.in_channels} there"
                )
        return [conv(x) for conv, x in zip(self.convs, feats, strict=True)]


def _warn_if_alone(adapter: nn.Module) -> None:
    """Where several processes train an adapter outside DDP, its copies drift apart.

    DDP says while it runs which module it wraps. FSDP and DeepSpeed do not: where they are loaded nothing is said.
    """
    distributed = torch.distributed
    if is_compiling() or not distributed.is_available() or not distributed.is_initialized():
        return
    if not adapter.training or not torch.is_grad_enabled() or distributed.get_world_size() < 2:
        return
    others = {"torch.distributed.fsdp", "deepspeed"} & sys.modules.keys()
    if DistributedDataParallel._active_ddp_module is None and not others:
        warnings.warn(
            "the FeatureAdapter runs outside DistributedDataParallel, so that each process trains another one: wrap "
            "student and adapter as one module, or take frs_kernels.Distiller",
            stacklevel=5,
        )


def _per_level(name: str, channels: int | Sequence[int], levels: int) -> list[int]:
    channels = [channels] * levels if isinstance(channels, int) else list(channels)
    if len(channels) != levels:
        raise ValueError(f"{name} has {len(channels)} entries, num_levels is {levels}")
    if any(c < 1 for c in channels):
        raise ValueError(f"{name} must be 1 or more, got {channels}")
    return channels
