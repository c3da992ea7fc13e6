"""Keeps what was computed from weights, for as long as the weights are unchanged, without waiting for a device."""

from collections.abc import Callable, Hashable
from enum import Enum
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Rule(Enum):
    """How it is seen that tensors are unchanged.

    VALUES compares them with copies: nothing goes unseen, but on a GPU the host would have to wait for the answer.
    IDENTITY asks for the same tensors, on the same memory, with the same version, which PyTorch counts up where
    tensors are written in place.
    """

    VALUES = "values"
    IDENTITY = "identity"


def rule_for(tensors: tuple[Tensor, ...]) -> Rule | None:
    """The rule for weights on these devices; None where what follows from them must be computed anew each time."""
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None  # fake, distributed or quantised tensors
    devices = {tensor.device.type for tensor in tensors}
    if devices == {"cpu"}:
        return Rule.VALUES
    return rule_on_a_gpu(tensors) if devices == {"cuda"} else None


def rule_on_a_gpu(tensors: tuple[Tensor, ...]) -> Rule | None:
    """By identity, but for three kinds of weights, which have no rule.

    Those that require gradients, since optimisers may write them uncounted (``fused=True`` does); inference tensors,
    which have no version; and all while a CUDA graph is captured, for it must read the weights at its replays, and own
    the memory that it reads.
    """
    if any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
        return None
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return None if capturing else Rule.IDENTITY


class Snapshot:
    """Tensors as they were.

    A write that PyTorch does not count goes unseen by `Rule.IDENTITY`: one in place through ``.data``, and one by a
    kernel or collective of another library.
    """

    def __init__(self, tensors: tuple[Tensor, ...], rule: Rule) -> None:
        self.rule = rule
        self.stream = _stream_of(tensors)
        if rule is Rule.VALUES:
            self.kept = tuple(tensor.detach().clone() for tensor in tensors)
            return
        self.tensors = tensors
        # Holding the memory, too, keeps it from being given to new weights, which would look like the old ones.
        self.kept = tuple(tensor.detach() for tensor in tensors)
        self.versions = tuple(tensor._version for tensor in tensors)

    def holds(self, tensors: tuple[Tensor, ...], rule: Rule) -> bool:
        """Whether ``tensors`` are still those, by the same rule and on the same CUDA stream."""
        if rule is not self.rule or len(tensors) != len(self.kept):
            return False
        if rule is Rule.VALUES:
            pairs = zip(self.kept, tensors, strict=True)
            return all(kept.dtype == now.dtype and torch.equal(kept, now) for kept, now in pairs)
        # Another stream would not wait for what this one computes.
        return self.stream == _stream_of(tensors) and all(
            now is before and now._version == version and now.is_set_to(kept)
            for now, before, version, kept in zip(tensors, self.tensors, self.versions, self.kept, strict=True)
        )


class _Entry(NamedTuple, Generic[Value]):
    key: Hashable
    snapshot: Snapshot
    value: Value


class Memo(Generic[Value]):
    """One value for each module, which lives no longer than the module does; ``len`` tells how many there are."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, _Entry[Value]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, owner: nn.Module, key: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], Value]) -> Value:
        """What ``compute`` gave for this owner, key and unchanged tensors, or gives now.

        It is kept without a graph of gradients, so tensors through which gradients are to flow must not be asked for.
        """
        rule = rule_for(tensors)
        if rule is None:
            self._entries.pop(owner, None)  # whatever writes the tensors uncounted may do so from now on
            return compute()
        entry = self._entries.get(owner)
        if entry is not None and entry.key == key and entry.snapshot.holds(tensors, rule):
            return entry.value
        # Outside of inference mode and autocast, so that training and evaluation may use it alike.
        device = tensors[0].device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            snapshot = Snapshot(tensors, rule)
            value = compute()
        self._entries[owner] = _Entry(key, snapshot, value)
        return value


def _stream_of(tensors: tuple[Tensor, ...]) -> int | None:
    device = tensors[0].device
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
