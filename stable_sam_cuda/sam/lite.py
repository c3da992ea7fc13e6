"""``sam_lite``: SAM's prompt encoder and mask decoder behind an EfficientNet-Lite image encoder.

The encoder takes 512 px and works at stride 8, so the image embedding is SAM's own (256, 64, 64), and
``segment_anything``'s predictor, prompt encoder and mask decoder serve it unchanged.
"""

from os import PathLike
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from stable_sam_cuda.sam.state_check import first_not_finite, fit_problem
from stable_sam_cuda.sam.weight_files import read_safetensors

EMBED_DIM = 256
IMAGE_SIZE = 512
LARGEST_IMAGE_SIZE = 4096  # of a checkpoint; a damaged one shall not ask for all memory
STRIDE = 8
SHIPPED_CHECKPOINT = Path(__file__).parents[1] / "weights" / "sam_lite.safetensors"

# One row a stage: (kernel, stride, expansion, channels out); the variants differ in the repeats.
STAGES = ((3, 1, 1, 16), (3, 2, 6, 24), (5, 2, 6, 40), (3, 2, 6, 80), (5, 1, 6, 112), (5, 2, 6, 192), (3, 1, 6, 320))
REPEATS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1)}
STEM_CHANNELS = 32
PYRAMID_STAGES = {4: 1, 8: 2, 16: 4, 32: 6}  # stride -> the last stage working at it


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, with which EfficientNet-Lite was trained."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        pad_y, pad_x = ((-(-size // stride) - 1) * stride + kernel - size for size in x.shape[-2:])
        x = F.pad(x, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))
        return F.conv2d(x, self.weight, self.bias, stride=stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """MBConv of EfficientNet-Lite with its batch norms folded into the convolutions."""

    def __init__(self, channels: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = SameConv2d(channels, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv2d(hidden, channels_out, 1)
        self.residual = stride == 1 and channels == channels_out

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        output = self.project(F.relu6(self.depthwise(hidden)))
        return x + output if self.residual else output


class LiteBackbone(nn.Module):
    """EfficientNet-Lite up to its last stage; returns the features of strides 4, 8, 16 and 32."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, 2)
        channels, stages = STEM_CHANNELS, []
        for repeats, (kernel, stride, expansion, channels_out) in zip(REPEATS[variant], STAGES, strict=True):
            blocks = []
            for block in range(repeats):
                blocks.append(InvertedResidual(channels, channels_out, kernel, stride if block == 0 else 1, expansion))
                channels = channels_out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        x = F.relu6(self.stem(x))
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return {stride: outputs[index] for stride, index in PYRAMID_STAGES.items()}


class RefineBlock(nn.Module):
    """ConvNeXt-like residual block: depthwise 5x5, LayerNorm, pointwise expansion with GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))


class LiteImageEncoder(nn.Module):
    """EfficientNet-Lite with a feature pyramid merged at stride 8.

    forward: images (B, 3, S, S), normalised by ``Sam.preprocess``, S a multiple of 32
    -> image embedding (B, 256, S / 8, S / 8).
    """

    def __init__(self, variant: str = "lite0", img_size: int = IMAGE_SIZE, neck_channels: int = 128) -> None:
        super().__init__()
        self.variant = variant
        self.img_size = img_size
        self.backbone = LiteBackbone(variant)
        channels = {stride: STAGES[index][-1] for stride, index in PYRAMID_STAGES.items()}
        self.lateral4 = nn.Conv2d(channels[4], neck_channels, 3, 2, padding=1)
        self.lateral8 = nn.Conv2d(channels[8], neck_channels, 1)
        self.lateral16 = nn.Conv2d(channels[16], neck_channels, 1)
        self.lateral32 = nn.Conv2d(channels[32], neck_channels, 1)
        self.refine32 = RefineBlock(neck_channels)
        self.refine16 = RefineBlock(neck_channels)
        self.refine8 = nn.Sequential(RefineBlock(neck_channels), RefineBlock(neck_channels))
        self.embed = nn.Sequential(nn.Conv2d(neck_channels, EMBED_DIM, 1, bias=False), LayerNorm2d(EMBED_DIM))

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x.contiguous(memory_format=torch.channels_last))
        merged = self.refine32(self.lateral32(features[32]))
        merged = self.refine16(self.lateral16(features[16]) + _double(merged))
        merged = self.lateral8(features[8]) + self.lateral4(features[4]) + _double(merged)
        return self.embed(self.refine8(merged))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def set_image_size(sam: Sam, image_size: int) -> None:
    """Make every part of a ``sam_lite`` expect square inputs of ``image_size`` px (a multiple of 32)."""
    sam.image_encoder.img_size = image_size
    sam.prompt_encoder.input_image_size = (image_size, image_size)
    sam.prompt_encoder.image_embedding_size = (image_size // STRIDE, image_size // STRIDE)
    sam.prompt_encoder.mask_input_size = (4 * image_size // STRIDE, 4 * image_size // STRIDE)


def new_sam_lite(variant: str = "lite0", image_size: int = IMAGE_SIZE) -> Sam:
    """An untrained ``sam_lite``: SAM's own prompt encoder and mask decoder, a Lite image encoder."""
    grid = image_size // STRIDE
    return Sam(
        image_encoder=LiteImageEncoder(variant, image_size),
        prompt_encoder=PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=EMBED_DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, num_heads=8, mlp_dim=2048),
        ),
        pixel_mean=[127.0, 127.0, 127.0],
        pixel_std=[128.0, 128.0, 128.0],
    ).eval()


def build_sam_lite(checkpoint: str | PathLike[str] | None = None) -> Sam:
    """The trained ``sam_lite`` in float32, from the package's own weights or a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a ``sam_lite`` checkpoint, is damaged, changes while it is read, or its weights are
            missing, misshapen or not finite.
    """
    path = SHIPPED_CHECKPOINT if checkpoint is None else Path(checkpoint)
    state, metadata = read_safetensors(path, "checkpoint")
    variant, size = metadata.get("variant"), metadata.get("image_size", str(IMAGE_SIZE))
    if metadata.get("model") != "sam_lite" or variant not in REPEATS:
        raise ValueError(f"checkpoint: expected metadata model=sam_lite and a known variant, got {metadata} in {path}")
    if not (size.isdecimal() and 0 < int(size) <= LARGEST_IMAGE_SIZE and int(size) % 32 == 0):
        raise ValueError(f"checkpoint: expected image_size, a multiple of 32, in the metadata of {path}, got {size!r}")
    sam = new_sam_lite(variant, int(size))
    if problem := fit_problem(state, sam.state_dict()):
        raise ValueError(f"checkpoint: {path} does not fit sam_lite {variant}: {problem}")
    if bad := first_not_finite(state):
        raise ValueError(f"checkpoint: expected finite weights, got NaN or infinity in {bad} of {path}")
    sam.load_state_dict(state)  # which copies, and converts to float32
    return sam
