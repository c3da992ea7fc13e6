"""What all operations have alike: gradients, fakes, autocast, and no double backward."""

import pytest
import torch
from attention_cases import AttentionCase, make_attention_inputs
from head_cases import HeadCase, make_head_inputs
from sample_inputs import Case, make_inputs
from torch import Tensor

from stable_sam_cuda.ops import libraries, reference
from stable_sam_cuda.ops.register import empty_gradients, mask_of, wanted_gradients

OPERATIONS = torch.ops.stable_sam_cuda
VARIANTS = {"compiled": "", "triton": "_triton"}


def inputs_of(name: str) -> list[Tensor | float]:
    """Of a small call: the op's own, numbers included."""
    if name == "deformable_sample":
        case = Case("small", channels=2, height=2, width=2, amplitude="channel")
        return [*make_inputs(case, torch.float32).values(), case.max_offset]
    if name == "sampled_attention":
        attention = AttentionCase("small", rows=2, channels=2, height=2, width=2)
        return [*make_attention_inputs(attention, torch.float32)[0].values(), attention.max_offset]
    head = HeadCase("small", channels=2, height=2, width=2)
    return [*make_head_inputs(head, torch.float32, normalised=True)[0].values(), head.eps]


def leaves_of(name: str) -> list[Tensor | float]:
    return [value.requires_grad_() if isinstance(value, Tensor) else value for value in inputs_of(name)]


def first_of(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]


NAMES = ["deformable_sample", "sampled_attention", "offset_head"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_says_what_to_do(name: str, variant: str) -> None:
    if variant == "triton" and not libraries.triton_interprets():
        pytest.skip("Triton's kernels take no tensors of the CPU here")
    leaves = leaves_of(name)
    output = first_of(getattr(OPERATIONS, name + VARIANTS[variant])(*leaves))
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice; use backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_differentiable_twice(name: str) -> None:
    leaves = leaves_of(name)
    output = first_of(getattr(reference, name)(*leaves))
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
    gradient.square().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves if isinstance(leaf, Tensor))


@pytest.mark.parametrize("key", ["Autograd", "Meta", "AutocastCPU", "AutocastCUDA"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_fakes_and_autocast_are_registered(name: str, variant: str, key: str) -> None:
    op = f"stable_sam_cuda::{name}{VARIANTS[variant]}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    if not key.startswith("Autocast"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{op}_backward", key)


def test_gradients_of_what_prompts_share_are_summed() -> None:
    gradients = [torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)]
    shared, own, unwanted = wanted_gradients(gradients, [torch.ones(1, 2), *gradients[:2]], (True, True, False))
    assert torch.equal(shared, torch.full((1, 2), 3.0))
    assert own is gradients[1]
    assert unwanted is None


def test_the_mask_names_the_gradients_that_are_wanted() -> None:
    assert mask_of((True, False, True, True)) == 0b1101
    like = torch.ones(1)
    found = empty_gradients(0b101, like, [lambda: like, lambda: like, None])
    assert [tuple(gradient.shape) for gradient in found] == [(1,), (0,), (0,)]
