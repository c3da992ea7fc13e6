"""Several processes (``torchrun``) that train by themselves and average their weights now and then."""

from collections.abc import Iterable

import torch
from torch import distributed
from torch.nn import Parameter

STEPS_APART = 16  # steps that processes take by themselves before their weights are averaged


@torch.no_grad()
def average_weights(parameters: Iterable[Parameter]) -> None:
    """Every process's weights become the mean over processes (local SGD)."""
    parameters = list(parameters)
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    distributed.all_reduce(flat)
    parts = (flat / distributed.get_world_size()).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def at_meeting(step: int) -> bool:
    """Whether the processes agree before this step: on the weights, and on whether to go on. Always, where one is
    alone."""
    return not distributed.is_initialized() or step % STEPS_APART == 0


def shared_minutes(minutes: float, step: int) -> float:
    """The minutes of process 0 where processes meet, so that all stop at the same step and none waits in between."""
    shared = torch.tensor(minutes, dtype=torch.float64)
    if distributed.is_initialized() and at_meeting(step):
        distributed.broadcast(shared, 0)
    return shared.item()
