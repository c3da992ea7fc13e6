"""Plain PyTorch truth of every op: short, differentiable by autograd (twice, too), trusted by all tests.

Axes: B prompts, C channels, H rows, W columns of the feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_location(undisplaced: Tensor, raw_offset: Tensor, max_offset: float, size: int) -> tuple[Tensor, Tensor]:
    """Integer cell and fraction of ``clamp(p + max_offset * tanh(raw), 0, size - 1)`` along one axis.

    The cell is the floor, so at an integer location the derivative is the right-hand one. The clamp is written out
    because versions of torch differ in the gradient of ``clamp`` at the bounds themselves: here it passes there.
    A NaN offset keeps the undisplaced cell and gets a NaN fraction: its pixel's output is NaN.
    """
    wanted = undisplaced + torch.tanh(raw_offset) * max_offset
    location = torch.where(wanted < 0, 0.0, torch.where(wanted > size - 1, float(size - 1), wanted))
    cell = torch.where(location.isnan(), undisplaced, location.detach()).floor()
    return cell.long(), location - cell


def gather_pixels(features: Tensor, cell_y: Tensor, cell_x: Tensor) -> Tensor:
    """``features[b, :, cell_y[b], cell_x[b]]``: (B, C, H, W) at (B, H, W) cells -> (B, C, H, W)."""
    linear = (cell_y * features.shape[-1] + cell_x).flatten(1).unsqueeze(1).expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, linear).view(features.shape)


def deformable_sample(
    features: Tensor,
    offsets: Tensor,
    identity: Tensor | None,
    alpha: Tensor | None,
    amplitude: Tensor | None,
    max_offset: float,
) -> Tensor:
    """Equation of DSP and DRP: ``alpha_1 * amplitude * features[p + s_p tanh(raw)] + alpha_2 * identity[p]``.

    Coordinates, weights and sums are taken in float32 (float64 for float64 inputs); the result has
    the dtype of ``features``.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    inputs = [t for t in (features, offsets, identity, alpha, amplitude) if t is not None]
    batch = torch.broadcast_shapes(*[t.shape[:1] for t in inputs])[0]
    height, width = features.shape[2:]

    offset_x, offset_y = offsets.to(dtype).expand(batch, -1, -1, -1).unbind(1)
    rows = torch.arange(height, device=offsets.device, dtype=dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=offsets.device, dtype=dtype)[None, :].expand(height, width)
    cell_x, fraction_x = sample_location(columns, offset_x, max_offset, width)
    cell_y, fraction_y = sample_location(rows, offset_y, max_offset, height)
    next_x, next_y = (cell_x + 1).clamp(max=width - 1), (cell_y + 1).clamp(max=height - 1)

    source = features.to(dtype).expand(batch, -1, -1, -1)
    fraction_x, fraction_y = fraction_x.unsqueeze(1), fraction_y.unsqueeze(1)
    top = torch.lerp(gather_pixels(source, cell_y, cell_x), gather_pixels(source, cell_y, next_x), fraction_x)
    bottom = torch.lerp(gather_pixels(source, next_y, cell_x), gather_pixels(source, next_y, next_x), fraction_x)
    output = torch.lerp(top, bottom, fraction_y)

    if amplitude is not None:
        output = output * amplitude.to(dtype)
    if alpha is not None:
        weights = alpha.to(dtype)[:, :, None, None]
        output = output * weights[:, :1]
        if identity is not None:
            output = output + identity.to(dtype) * weights[:, 1:]
    return output.to(features.dtype)


def sampled_attention(
    query_rows: Tensor,
    features: Tensor,
    identity: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    key_pe: Tensor,
    max_offset: float,
) -> tuple[Tensor, Tensor]:
    """Attention of rows (B, R, C) over all pixels of u, `deformable_sample`'s output, with keys ``u + key_pe``.

    Returns ``softmax(query_rows (u + key_pe)) u``, (B, R, C) with the dtype of ``query_rows``, and the logsumexp of the
    logits, (B, R). All arithmetic, u included, is float32 (float64 for float64 inputs). A pixel whose offset is NaN
    makes its prompt NaN.
    """
    dtype = torch.promote_types(query_rows.dtype, torch.float32)
    calibrated = deformable_sample(
        features.to(dtype), offsets.to(dtype), identity.to(dtype), alpha.to(dtype), None, max_offset
    )
    values = calibrated.flatten(2).transpose(1, 2)
    keys = values + key_pe.to(dtype).flatten(2).transpose(1, 2)
    logits = query_rows.to(dtype) @ keys.transpose(1, 2)
    pooled = torch.softmax(logits, dim=-1) @ values
    return pooled.to(query_rows.dtype), logits.logsumexp(-1)


def offset_head(
    features: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor,
    eps: float,
) -> Tensor:
    """Depthwise convolution, LayerNorm over the channels of each pixel, GELU by the error function, 1x1 convolution.

    Everything is taken in float32 (float64 for float64 inputs); the result has the dtype of ``features``.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    channels, _, _, kernel_size = depthwise_weight.shape
    hidden = F.conv2d(
        features.to(dtype),
        depthwise_weight.to(dtype),
        depthwise_bias.to(dtype),
        padding=kernel_size // 2,
        groups=channels,
    )
    hidden = F.layer_norm(hidden.permute(0, 2, 3, 1), (channels,), norm_weight.to(dtype), norm_bias.to(dtype), eps)
    raw = F.linear(F.gelu(hidden), pointwise_weight.to(dtype).flatten(1), pointwise_bias.to(dtype))
    return raw.permute(0, 3, 1, 2).contiguous().to(features.dtype)
