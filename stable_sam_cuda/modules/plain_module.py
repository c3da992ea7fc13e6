"""Which modules may be taken apart: those whose call runs their class's own forward and nothing besides."""

from collections.abc import Iterable
from typing import TypeGuard, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: object, *classes: type[Module]) -> TypeGuard[Module]:
    """Whether ``module`` is of one of ``classes`` itself, without hooks and without a forward of its own.

    LoRA layers, adapters, parametrisations and quantised layers are of another class; so whoever computes with the
    parameters of a plain module computes what a call of it would.
    """
    if not isinstance(module, nn.Module) or type(module) not in classes or "forward" in vars(module):
        return False
    return not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def all_plain(modules: Iterable[object], *classes: type[nn.Module]) -> bool:
    """Whether every one of ``modules`` is plain."""
    return all(is_plain(module, *classes) for module in modules)
