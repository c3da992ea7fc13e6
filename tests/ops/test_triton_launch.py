"""Block sizes fit the device they run on, what a GPU refuses is taken smaller, and counts compile nothing anew."""

import inspect
import itertools
import warnings

import pytest
import torch
from attention_cases import (
    AttentionCase,
    assert_attention_matches,
    attend_and_differentiate,
    attention_truth,
    make_attention_inputs,
)
from stable_sam_cuda.kernels import launch
from stable_sam_cuda.kernels.attention import backward_kernels
from stable_sam_cuda.kernels.attention import forward as attention_forward
from stable_sam_cuda.kernels.attention import plan as attention_plan
from stable_sam_cuda.kernels.offset_head import backward as offset_head_backward
from stable_sam_cuda.kernels.offset_head import forward as offset_head_forward
from stable_sam_cuda.kernels.sample import backward as sample_backward
from stable_sam_cuda.kernels.sample import forward as sample_forward
from stable_sam_cuda.kernels.sample import gather
from triton.runtime.errors import OutOfResources

import stable_sam_cuda
from stable_sam_cuda import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Multiprocessors, shared bytes of a block: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090; and half of the least.
DEVICES = {
    "sm_80": launch.Device(108, 166_912, 80),
    "sm_86": launch.Device(82, 101_376, 86),
    "sm_89": launch.Device(128, 101_376, 89),
    "sm_90": launch.Device(132, 232_448, 90),
    "sm_100": launch.Device(148, 232_448, 100),
    "sm_120": launch.Device(170, 101_376, 120),
}
PLANS = [attention_plan.forward_plans, attention_plan.tiles_plans, attention_plan.rows_plans]


@pytest.fixture
def nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "refused", set())


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("plans_of", PLANS, ids=lambda function: function.__name__)
def test_every_device_has_a_plan_for_sizes_up_to_512_channels(plans_of, device: launch.Device) -> None:
    tensor = torch.empty(0)
    for dtype, channels, rows in itertools.product(DTYPES, (1, 33, 256, 300, 512), (1, 56, 72, 512)):
        with launch.assuming(device):
            fitting = launch.fitting_plans("it", plans_of(dtype, channels, rows, device), tensor)
        assert fitting[0].shared_bytes <= device.shared_bytes


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("plans_of", PLANS, ids=lambda function: function.__name__)
def test_products_have_16_columns_at_least(plans_of, device: launch.Device) -> None:
    """As Triton before 3.8 demands: chunks of channels and pixels of a tile are what products sum over."""
    for dtype, channels, rows in itertools.product(DTYPES, (1, 33, 256, 512, 2048), (1, 72)):
        for plan in plans_of(dtype, channels, rows, device):
            assert min(plan.rows, plan.chunk, plan.tile[0] * plan.tile[1]) >= 16, plan


def test_plans_become_smaller() -> None:
    for plans_of, device, dtype in itertools.product(PLANS, DEVICES.values(), DTYPES):
        rows = [plan.rows for plan in plans_of(dtype, 256, 160, device)]
        assert rows == sorted(set(rows), reverse=True)


def test_a_device_of_little_shared_memory_gets_a_smaller_plan() -> None:
    largest = {
        name: launch_plan.rows
        for name, device in DEVICES.items()
        for launch_plan in [
            next(
                plan
                for plan in attention_plan.tiles_plans(torch.bfloat16, 256, 72, device)
                if plan.shared_bytes <= device.shared_bytes
            )
        ]
    }
    assert largest == {"sm_80": 64, "sm_86": 32, "sm_89": 32, "sm_90": 64, "sm_100": 64, "sm_120": 32}


def refuse(monkeypatch: pytest.MonkeyPatch, at_least: int) -> list[int]:
    """Launches of the attention with so many rows a program are refused, as a GPU would; the rows asked for."""
    asked: list[int] = []
    real = attention_forward.launch

    def launch_or_refuse(kernel, *arguments, **constants) -> None:
        if "ROWS" in constants:
            asked.append(constants["ROWS"])
            if constants["ROWS"] >= at_least:
                raise OutOfResources(139_264, 101_376, "shared memory")
        real(kernel, *arguments, **constants)

    monkeypatch.setattr(attention_forward, "launch", launch_or_refuse)
    return asked


@pytest.mark.usefixtures("nothing_refused")
def test_a_refused_launch_takes_the_next_smaller_plan_remembers_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, _ = make_attention_inputs(AttentionCase("refused", batch=1, height=2, width=3), torch.float16)
    expected = kernels.sampled_attention(*inputs.values(), 1.5)
    asked = refuse(monkeypatch, at_least=64)
    with pytest.warns(kernels.SmallerPlanWarning, match=r"takes smaller blocks on cpu.* memory, Required: 139264"):
        pooled, logsumexp = kernels.sampled_attention(*inputs.values(), 1.5)
    assert asked == [64, 32]
    assert torch.allclose(pooled, expected[0], atol=1e-2) and torch.allclose(logsumexp, expected[1], atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.sampled_attention(*inputs.values(), 1.5)
    assert asked == [64, 32, 32]


@pytest.mark.usefixtures("nothing_refused")
def test_where_every_plan_is_refused_that_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_attention_inputs(AttentionCase("refused", batch=1, height=2, width=3), torch.float16)
    asked = refuse(monkeypatch, at_least=1)
    with pytest.warns(kernels.SmallerPlanWarning), pytest.raises(kernels.NoPlanFitsError, match="does not refuse"):
        kernels.sampled_attention(*inputs.values(), 1.5)
    assert asked == [64, 32, 16]


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.filterwarnings("ignore:.* takes smaller blocks")
@pytest.mark.parametrize("refused", ["attention_tiles_kernel", "attention_rows_kernel"])
def test_a_backward_that_is_refused_is_done_by_the_reference_and_the_next_forward_knows(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase("refused", height=2, width=3, broadcast=frozenset({"features"}))
    inputs, grad_pooled = make_attention_inputs(case, torch.float32)
    _, _, expected = attention_truth(inputs, case.max_offset, grad_pooled)
    real = backward_kernels.launch

    def launch_or_refuse(kernel, *arguments, **constants) -> None:
        if kernel.__name__ == refused:
            raise OutOfResources(139_264, 101_376, "shared memory")
        real(kernel, *arguments, **constants)

    monkeypatch.setattr(backward_kernels, "launch", launch_or_refuse)
    operation = torch.ops.stable_sam_cuda.sampled_attention_triton
    with pytest.warns(kernels.SmallerPlanWarning, match="of 8 channels in float32 has no smaller blocks on cpu"):
        _, _, gradients = attend_and_differentiate(operation, inputs, case.max_offset, grad_pooled)
    for name, gradient in gradients.items():
        assert_attention_matches(name, gradient, expected[name], torch.float32)
    with pytest.raises(kernels.NoPlanFitsError, match="no block sizes for cpu"):
        kernels.sampled_attention(*inputs.values(), case.max_offset)


@pytest.mark.usefixtures("nothing_refused")
def test_where_none_fits_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_attention_inputs(AttentionCase("large", batch=1, height=2, width=3), torch.float16)
    asked = refuse(monkeypatch, at_least=1)
    with (
        launch.assuming(launch.Device(20, 1024, 80)),
        pytest.raises(
            kernels.NoPlanFitsError, match="no block sizes for cpu, where a block may have 1024 shared bytes"
        ),
    ):
        kernels.sampled_attention(*inputs.values(), 1.5)
    assert asked == []


@pytest.mark.usefixtures("nothing_refused")
def test_where_none_fits_the_public_function_samples_first_and_says_so() -> None:
    inputs, _ = make_attention_inputs(AttentionCase("large", channels=16), torch.float32)
    inputs = {name: tensor for name, tensor in inputs.items() if name != "query_rows"}
    inner = 8
    weights = {f"{name}_weight": torch.randn(inner, 16) for name in "qkv"} | {"out_weight": torch.randn(16, inner)}
    weights |= {f"{name}_bias": torch.randn(inner) for name in "qkv"} | {"out_bias": torch.randn(16)}
    queries = torch.randn(2, 3, 16)

    def attend(backend: str) -> torch.Tensor:
        options = {"num_heads": 2, "max_offset": 1.5, "backend": backend}
        return stable_sam_cuda.deformable_attention(queries, **inputs, **weights, **options)

    with (
        launch.assuming(launch.Device(20, 1024, 80)),
        pytest.warns(stable_sam_cuda.UnfusedAttentionWarning, match="a block may have 1024 shared bytes"),
    ):
        unfused = attend("triton")
    assert torch.allclose(unfused, attend("reference"), rtol=1e-4, atol=1e-4)


def test_few_prompts_share_their_map_and_many_do_not() -> None:
    """On 132 multiprocessors that hold two programs each."""
    device = launch.HOPPER
    assert launch.split_evenly(1, 128, 2, device) == (128, 1)
    assert launch.split_evenly(64, 128, 2, device) == (4, 32)
    assert launch.split_evenly(256, 128, 2, device) == (1, 128)
    for programs in range(1, 600, 7):
        splits, of_each = launch.split_evenly(programs, 128, 2, device)
        assert (splits - 1) * of_each < 128 <= splits * of_each


def test_prompts_of_one_image_are_shared_among_programs_of_the_gather() -> None:
    """1,024 tiles of 2 x 2 targets alone would leave most of a Hopper GPU idle."""
    assert launch.split_evenly(1024, 256, 16, launch.HOPPER)[0] == 2
    assert launch.split_evenly(64, 256, 16, launch.HOPPER)[0] >= 32


def test_what_is_not_specialised_is_a_parameter_of_some_kernel() -> None:
    """Triton says nothing of a name in these lists that no kernel has."""
    kernel_files = [sample_forward, gather, sample_backward, attention_forward, backward_kernels]
    kernel_files += [offset_head_forward, offset_head_backward]
    parameters = {
        parameter
        for module in kernel_files
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
        for parameter in inspect.signature(kernel.fn).parameters
    }
    assert parameters >= {*launch.NUMBERS, *launch.SMALL}
