"""The CPU kernels of each instruction set, against the reference; all other tests run the best this processor has."""

import os
import subprocess
import sys

import pytest

# The first use decides on the instruction set, so each has a process of its own, which all operations share.
# Every bit pattern of a half type must go through the sampler unchanged where the weight of its pixel is 1, and sums
# must round to nearest.
ON_ONE_INSTRUCTION_SET = """
import sys
sys.path[:0] = ["tests", "tests/ops"]
import torch
import test_cpu_attention as attention
import test_cpu_attention_limits as attention_limits
import test_cpu_offset_head as offset_head
from sample_inputs import by_name, make_grad_output, make_inputs, output_and_gradients, truth
from tolerances import BACKWARD, FORWARD, assert_matches
from stable_sam_cuda import deformable_sample
from stable_sam_cuda.ops import libraries

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
torch.manual_seed(0)

for dtype in (torch.float16, torch.bfloat16):
    still = torch.zeros(1, 2, 1, 1, dtype=dtype)
    features = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 2**16, 1, 1)
    output = deformable_sample(features, still, max_offset=0.0)
    finite = features.isfinite()
    assert torch.equal(output[finite], features[finite]), dtype
    assert output[~finite].isnan().all(), dtype  # infinity times the weight 0 of the other taps
    values = (torch.rand(1, 4099, 1, 1) * torch.logspace(-9, 4, 4099).view(1, -1, 1, 1)).to(dtype)
    alpha = torch.tensor([[0.3, 0.7]], dtype=dtype)
    output = deformable_sample(values, still, max_offset=0.0, identity=values, alpha=alpha)
    expected = (values.float() * alpha[0, 0].float() + values.float() * alpha[0, 1].float()).to(dtype)
    places = (output.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max().item()
    assert places <= 1, (dtype, places)
for case in by_name("channel_amplitude", "33_channels", "max_offset_2.7", "no_prompts_one_image"):
    for dtype in DTYPES:
        inputs, grad_output = make_inputs(case, dtype), make_grad_output(case, dtype)
        expected, expected_gradients = truth(inputs, case.max_offset, grad_output)
        output, gradients = output_and_gradients(
            torch.ops.stable_sam_cuda.deformable_sample, inputs, case.max_offset, grad_output)
        assert_matches("output", output, expected, FORWARD[dtype])
        for name in ("features", "identity"):
            assert_matches(name, gradients[name], expected_gradients[name], BACKWARD[dtype])

for case in attention.by_name("several_tiles", "136_rows", "sam_channels", "one_channel", "17_channels", "one_image"):
    for dtype in DTYPES:
        attention.check(case, dtype)
attention_limits.test_saturated_heads_are_finite(torch.float32, 1e37)
attention_limits.test_a_nan_offset_poisons_its_prompt_alone(torch.float32)

for case in offset_head.CASES:
    if case.name in ("plain", "17_channels", "one_channel", "several_bands", "sam_channels"):
        for dtype in DTYPES:
            offset_head.check(case, dtype)
offset_head.test_gelu_is_exact_to_the_last_places(torch.float32)
print(libraries.cpu_instruction_set())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "allowed"), [("default", {"baseline"}), ("avx2", {"baseline", "avx2"})])
def test_every_instruction_set_is_exact(capability: str, allowed: set[str]) -> None:
    """PyTorch's own variable limits the kernels too."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_INSTRUCTION_SET], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in allowed
