"""Linear layers over all locations of an image: on a CPU by the library that is fastest at them."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROW = 64


def pointwise_linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of image features (B, N, C) with weight (C', C): (B, N, C').

    On a CPU as a 1x1 convolution of channels-last memory, of which all changes of shape are views: PyTorch gives
    convolutions to oneDNN, but float32 matrix products to MKL, which on AMD processors leaves AVX-512 unused and takes
    twice as long. One thread's convolutions of a small batch go to MKL too; so rows of locations stand for the batch.
    """
    batch, locations, channels = features.shape
    if features.device.type != "cpu" or features.dtype != torch.float32 or locations % ROW != 0:
        return F.linear(features, weight, bias)
    rows = features.reshape(-1, 1, ROW, channels).permute(0, 3, 1, 2)
    output = F.conv2d(rows, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(batch, locations, -1)
