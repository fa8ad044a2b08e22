"""What the processes of test_distributed.py run; a module of its own, so that they can import it by name."""

from __future__ import annotations

from typing import Any

import torch
from detectors import FRS, distiller, student_of
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from torch import Tensor
from workers import RANKS

from frs_kernels.integrations.mmdet import TERMS


def model_of(name: str, checkpoint: str, **options: Any) -> Any:
    """With running statistics in its BatchNorms: a process sees half of the images."""
    init_default_scope("mmdet")
    return distiller(name, checkpoint, student=student_of(name, backbone__norm_eval=True), **options)


def mine(rank: int, inputs: Tensor, samples: list[Any]) -> tuple[Tensor, list[Any]]:
    """This process's images."""
    size = len(samples) // RANKS
    share = slice(rank * size, (rank + 1) * size)
    return inputs[share], samples[share]


def averaged_gradients(
    rank: int, name: str, checkpoint: str, inputs: Tensor, samples: list[Any]
) -> dict[bool, dict[str, Tensor]]:
    """What DDP leaves in the parameters after a backward pass from the distillation losses, by `average_mass`."""
    found = {}
    for average_mass in (True, False):
        model = model_of(name, checkpoint, average_mass=average_mass)
        ddp = MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        losses = ddp(*mine(rank, inputs, samples), mode="loss")
        sum(losses[key] for key in FRS).backward()
        found[average_mass] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return found


def whole_steps(rank: int, name: str, checkpoint: str, inputs: Tensor, samples: list[Any]) -> dict[str, list[Tensor]]:
    """Two steps from all losses by a DDP that looks for no unused parameter: the second raises if there was one."""
    found = {}
    for terms in TERMS:
        model = model_of(name, checkpoint, terms=terms)
        ddp = MMDistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            loss, _ = model.parse_losses(ddp(*mine(rank, inputs, samples), mode="loss"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[terms] = [p.detach() for p in model.parameters()]
    return found
