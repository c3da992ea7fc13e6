"""The one table of tolerances, and the comparison that uses it.

Every backend is compared with the reference in float64 on the same (already rounded) inputs, so a tolerance covers
the backend's own arithmetic only: for float32 its coordinates (an error of W * 2**-24 pixels at worst) and sums, for
the half types the final rounding (half a unit in the last place: 2**-11 and 2**-8).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    relative: float  # of the element's own truth
    absolute: float  # of the truth's root mean square


FORWARD = {
    torch.float64: Tolerance(1e-13, 1e-13),
    torch.float32: Tolerance(1e-6, 5e-5),
    torch.float16: Tolerance(2**-11, 5e-5),
    torch.bfloat16: Tolerance(2**-8, 5e-5),
}

BACKWARD = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.float16: Tolerance(2**-10, 5e-5),
    torch.bfloat16: Tolerance(2**-8, 5e-5),
}

# Gradients that autograd sums over prompts after each was rounded to its dtype: the roundings add up.
SUMMED_AFTER_ROUNDING = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.float16: Tolerance(2**-10, 4 * 2**-11),
    torch.bfloat16: Tolerance(2**-8, 4 * 2**-8),
}

# A whole mask decoder against segment_anything's own in the same dtype, which sum in another order over some thirty
# layers. Measured on sam_lite's 65,536 logits a mask, 1 to 18 tokens, plain and stabilised: segment_anything's float32
# is up to 4.4e-6 of the rms away from its float64, the shared decoder's up to 7.8e-6, largest where logits are largest;
# the limit is what two such results may differ. float64 has 29 bits more: the same errors are 1e-14.
DECODER = {
    torch.float64: Tolerance(0, 1e-12),
    torch.float32: Tolerance(2e-6, 1e-5),
}

# Gradients of the same, summed over prompts and locations: sums of some 10^4 roundings of either sign, 100 of one.
DECODER_GRADIENTS = {
    torch.float64: Tolerance(1e-12, 1e-11),
    torch.float32: Tolerance(1e-5, 1e-4),
}

# offset_head: as above, its norm's division by a standard deviation that may be small included.
HEAD_FORWARD = FORWARD | {torch.float64: Tolerance(1e-12, 1e-12)}
HEAD_BACKWARD = BACKWARD | {torch.float64: Tolerance(1e-12, 1e-11)}


# sampled_attention: kernels of the half types round u, the probabilities and their gradients to the dtype before they
# multiply. For logits of size s an error of one unit in the last place, 2**-11 or 2**-8, of u is one of s units in the
# probabilities. It adds up at random, to some 1.2 units of the norm for logits of size 2 (float16, 36 pixels, C = 256);
# large elements have large errors, so the worst of 10^4 elements are off by ten times that.
ATTENTION = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.float16: Tolerance(8 * 2**-11, 32 * 2**-11),
    torch.bfloat16: Tolerance(8 * 2**-8, 32 * 2**-8),
}
ATTENTION_IN_NORM = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4 * 2**-11,
    torch.bfloat16: 4 * 2**-8,
}

# Gradients of offset_head's features and taps: kernels of the half types round the gradient of the hidden channels to
# the dtype before they convolve it, and round the result. In the norm that is 0.6 units in the last place, 2**-11 and
# 2**-8 (measured, float16, C = 33 and 256); the worst of 10^4 elements, in channels of large weights, are off by ten.
HEAD_CONVOLVED = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.float16: Tolerance(2**-10, 16 * 2**-11),
    torch.bfloat16: Tolerance(2**-8, 16 * 2**-8),
}
HEAD_CONVOLVED_IN_NORM = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}


def assert_matches(name: str, actual: Tensor, truth: Tensor, tolerance: Tolerance) -> None:
    """Fail with the worst element unless |actual - truth| <= relative * |truth| + absolute * rms(truth) everywhere."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    truth = truth.double().cpu()
    difference = (actual.double().cpu() - truth).abs()
    limit = tolerance.relative * truth.abs() + tolerance.absolute * truth.square().mean().sqrt()
    excess = difference - limit
    if not bool((excess <= 0).all()):  # also where NaN
        worst = excess.nan_to_num(torch.inf).argmax().item()
        place = tuple(index.item() for index in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{name}{list(place)}: got {actual[place].item()}, expected {truth[place].item()}, "
            f"difference {difference[place].item():.3e} over the limit {limit[place].item():.3e}; "
            f"{int((~(excess <= 0)).sum())} of {truth.numel()} elements differ"
        )
