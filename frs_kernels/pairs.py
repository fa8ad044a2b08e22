"""What the public functions do: terms, each a student and its teacher, become a call of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels import backends, checks, native
from frs_kernels.autograd import Call, imitation
from frs_kernels.levels import Levels, accumulate_dtype, split_levels
from frs_kernels.losses import LOSSES
from frs_kernels.ops import VERBS
from frs_kernels.options import Options, Table, Weight, make_table, make_table_once
from frs_kernels.results import Richness

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Found(NamedTuple):
    """The loss, each term's value and its values a level by the name of the term's weight, the mask and the mass."""

    loss: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]
    mask: list[Tensor]
    mass: Tensor

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """A term's value and its values a level; of one that was not asked for zeros, which take a launch each."""
        if name in self.parts:
            return self.parts[name]
        return self.mass.new_zeros(()), torch.zeros_like(self.mass)


class Pair(NamedTuple):
    """A term: a student and the teacher it imitates."""

    weight_name: str
    loss: str
    weight: Weight
    student: Levels
    teacher: Levels
    group_size: int = 0  # of a loss of groups: their channels, 0 for all


def distill(
    pairs: Sequence[Pair],
    options: Options,
    check: Callable[[], None],
    mask: Levels | None,
    teacher_logits: Levels | None,
    process_group: ProcessGroup | None,
    return_terms: bool,
    learns: bool = False,
) -> Tensor | Found:
    """Imitate each pair.

    `check` says in the user's words what is wrong with the arguments. On small levels it takes as long as all the rest,
    so where a native operator checks all of it as well, it runs only if something was refused. `learns`: the caller has
    looked at which tensors require a gradient.
    """
    checks.check_transforms()
    if process_group is not None:
        checks.check_group(process_group)
    levels = len(pairs[0].teacher) if type(pairs[0].teacher) in (list, tuple) else -1
    plain = type(teacher_logits) in (list, tuple) and len(teacher_logits) == levels  # type: ignore[arg-type]
    for pair in pairs:
        for given in (pair.student, pair.teacher):
            plain = plain and type(given) in (list, tuple) and len(given) == levels
    rare = mask is not None or process_group is not None or options.level_weights is not None
    if rare or not plain or is_compiling():
        check()
        return _imitate_pairs(pairs, options, None, mask, teacher_logits, process_group, return_terms, learns)
    try:
        return _imitate_pairs(pairs, options, check, mask, teacher_logits, process_group, return_terms, learns)
    except Exception:
        check()
        raise


def _imitate_pairs(
    pairs: Sequence[Pair],
    options: Options,
    check: Callable[[], None] | None,
    mask: Levels | None,
    teacher_logits: Levels | None,
    process_group: ProcessGroup | None,
    return_terms: bool,
    learns: bool,
) -> Tensor | Found:
    """`check` is None where it has run."""
    like = pairs[0].teacher
    device = like[0].device
    backend = backends.choose(options.backend, device.type)
    if check is not None and backend not in native.LIBRARIES:
        check()
    student: list[Tensor] = []
    teacher: list[Tensor] = []
    weight: list[float] = []
    factor: list[Tensor | None] = []
    modes: list[str] = []
    for pair in pairs:
        checks.check_weight(pair.weight_name, pair.weight, device)
        if isinstance(pair.weight, Tensor):
            weight.append(1.0)
            factor.append(pair.weight.detach())
        else:
            weight.append(float(pair.weight))
            factor.append(None)
        modes.append(_grad_mode(pair, options.grad_mode, return_terms))
        student += pair.student
        teacher += pair.teacher
    if not learns and all(mode == "none" for mode in modes):
        checks.check_learns([(pair.student, pair.teacher) for pair in pairs])
    unit = options.normalizer == "none"
    scores = norm = None
    if mask is not None:
        scores, norm = _given_scores(mask)
    elif (process_group is not None or unit) and teacher_logits is not None:
        with torch.no_grad():
            scores, norm = VERBS[backend].score(teacher_logits)
    mass = norm
    if norm is not None and unit:
        norm = torch.ones_like(norm)
    elif norm is not None and process_group is not None:
        norm = mass = _average(norm, process_group)
    logits: Levels = ()  # the first term's teachers, where that is the class term
    if scores is None and teacher_logits is not None and not LOSSES[pairs[0].loss].takes_logits:
        logits = teacher_logits
    table = _table_of(pairs, options)
    call = Call(backend, table, teacher, logits, scores, norm, weight, factor, modes, return_terms)
    loss, *found = imitation(call, student)
    if not return_terms:
        return loss
    terms, (values, *made) = found[: len(pairs)], found[len(pairs) :]
    scores, mass = made or (scores, mass)
    assert scores is not None
    assert mass is not None
    names = (pair.weight_name for pair in pairs)
    parts = dict(zip(names, zip(terms, values.split(len(like)), strict=True), strict=True))
    return Found(loss, parts, split_levels(scores, like), mass)


def _table_of(pairs: Sequence[Pair], options: Options) -> Table:
    losses = tuple(pair.loss for pair in pairs)
    channels: tuple[int, ...] = ()
    if options.normalizer == "mass_channels":
        channels = tuple(z.shape[1] for pair in pairs for z in pair.teacher)
    make = make_table if is_compiling() else make_table_once  # Dynamo knows no cache
    groups = tuple(pair.group_size for pair in pairs)
    return make(options, losses, groups, len(pairs[0].teacher), channels)


def _grad_mode(pair: Pair, grad_mode: str, return_terms: bool) -> str:
    wanted = late = False
    for x in pair.student:
        wanted = wanted or x.requires_grad
        # 2 w S (s - t) / M is far below the range of fp16 until the loss scale multiplies it.
        late = late or x.dtype == torch.float16
    if not wanted or not torch.is_grad_enabled():
        return "none"
    if return_terms and (isinstance(pair.weight, Tensor) or abs(pair.weight) < 1e-30):
        return "backward"  # dividing the stored gradient by this weight would not give that of the term alone
    if grad_mode == "auto":
        return "backward" if late else "forward"
    return grad_mode


def plain_mask(mask: Any) -> Any:
    """A list of (N, H, W) floating-point tensors, where it is one of the other forms; else what it is."""
    if isinstance(mask, Richness):
        mask = mask.scores
    if mask is None or isinstance(mask, Tensor) or not isinstance(mask, Sequence):
        return mask
    return [_plain_level(m) if isinstance(m, Tensor) else m for m in mask]


def _plain_level(mask: Tensor) -> Tensor:
    if mask.layout != torch.strided:
        return mask
    mask = mask.squeeze(1) if mask.dim() == 4 else mask
    return mask.float() if mask.dtype == torch.bool else mask


def _given_scores(mask: Levels) -> tuple[Tensor, Tensor]:
    """Scores and mass, as `score` returns them, of a mask that the caller made."""
    dtype = accumulate_dtype(*mask)
    levels = [m.detach().to(dtype).flatten() for m in mask]
    return torch.cat(levels), torch.stack([m.sum() for m in levels])


def _average(mass: Tensor, group: ProcessGroup) -> Tensor:
    mass = mass.clone()
    torch.distributed.all_reduce(mass, group=group)
    return mass / torch.distributed.get_world_size(group)
