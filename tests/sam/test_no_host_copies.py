"""The decoder hands nothing from the host to a GPU: no call waits for a copy, and a CUDA graph can hold it.

Without a GPU: on fake tensors, which have a device, shapes and no values. The kernels' own host code is not in it.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_sam_cuda.sam import stabilize
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, SINGLE_MASK, THREE_MASKS, decode


class HostTensors(TorchDispatchMode):
    """Collects every operation that takes or gives a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.operations.append(str(operation))
        return result


def on_a_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def move(module: nn.Module) -> None:
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = on_a_gpu(tensor)
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if tensors is child._parameters else moved


@pytest.mark.filterwarnings("ignore::stable_sam_cuda.MissingBackendWarning")
@pytest.mark.parametrize("masks", [SINGLE_MASK, THREE_MASKS, ALL_MASKS], ids=["single", "three", "all"])
@pytest.mark.parametrize("stable", [False, True], ids=["plain", "stabilised"])
def test_decoder(sam, stable, masks):
    if stable:
        stabilize(sam)
    boxes = torch.tensor([[10.0, 20.0, 90.0, 80.0]])
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    with FakeTensorMode(), torch.no_grad():
        move(sam)
        inputs = [on_a_gpu(tensor) for tensor in (dense, sparse, dense)]
        with HostTensors() as host:
            logits, scores = decode(sam, *inputs, masks)
    assert logits.shape[:2] == scores.shape == (1, len(masks))
    assert logits.device.type == "cuda"
    assert host.operations == []
