"""Which modules may be taken apart: those whose call runs their class's own forward and nothing besides."""

from torch import nn


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether ``module`` is of one of ``classes`` itself, without hooks and without a forward of its own.

    LoRA layers, adapters, parametrisations and quantised layers are of another class; so whoever computes with the
    parameters of a plain module computes what a call of it would.
    """
    if type(module) not in classes or "forward" in vars(module):
        return False
    return not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def all_plain(modules: tuple[nn.Module, ...], *classes: type[nn.Module]) -> bool:
    """Whether every one of ``modules`` is plain."""
    return all(is_plain(module, *classes) for module in modules)
