"""SAM's prompt encoder in float32 whatever its dtype, and without making the host wait for a GPU."""

from copy import deepcopy
from typing import TypeVar

import torch
from segment_anything.modeling import PromptEncoder
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn
from torch.nn import functional as F

from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.sam.memo import Memo


def encode_prompts(
    encoder: PromptEncoder,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    masks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sparse (B, T, C) and dense (B, C, h, w) embeddings in float32, bit for bit those of ``encoder``'s own forward.

    SAM's forward picks points by their label, for which the host waits; here nothing does. NaN and infinity in a
    prompt, and a label that is none of SAM's, make that prompt's embeddings NaN.

    Args:
        encoder: one of another class, or with hooks, runs its own forward.
        points: (B, N, 2) with labels (B, N): 1 foreground, 0 background, -1 padding, whose place is not looked at.
        boxes: (B, 4). masks: (B, 1, 4h, 4w). All of one device, coordinates in SAM's input frame.
    """
    encoder = in_float32(encoder)
    if labels is not None and labels.dtype in (torch.bool, torch.uint8):
        labels = labels.to(torch.int)  # as SAM does: in 8 bits -1 cannot be told from 255
    if not _is_sams_own(encoder):
        return encoder(
            points=None if points is None or labels is None else _marked(points, labels), boxes=boxes, masks=masks
        )
    count = next(len(tensor) for tensor in (points, boxes, masks) if tensor is not None)
    sparse = []
    if points is not None and labels is not None:
        sparse.append(_embed_points(encoder, points, labels, pad=boxes is None))
    if boxes is not None:
        sparse.append(encoder._embed_boxes(boxes))
    if masks is not None:
        dense = encoder._embed_masks(masks)
    else:
        nothing = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = nothing.expand(count, -1, *encoder.image_embedding_size)
    if not sparse:
        return dense.new_empty((count, 0, encoder.embed_dim), dtype=torch.float32), dense
    return (sparse[0] if len(sparse) == 1 else torch.cat(sparse, dim=1)).float(), dense


def dense_pe(encoder: PromptEncoder, dtype: torch.dtype) -> Tensor:
    """The positional encoding of all locations (1, C, H, W), computed in float32 and rounded to ``dtype``."""
    if not (is_plain(encoder, PromptEncoder) and is_plain(encoder.pe_layer, PositionEmbeddingRandom)):
        return in_float32(encoder).get_dense_pe().to(dtype)
    layer, size = encoder.pe_layer, tuple(encoder.image_embedding_size)

    def compute() -> Tensor:
        full = layer if matrix.dtype == torch.float32 else _float32_copy(layer)
        return full(size)[None].to(dtype)

    matrix = layer.positional_encoding_gaussian_matrix
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and matrix.requires_grad):
        return compute()
    return _encodings.get(encoder, (size, dtype), (matrix,), compute)


def in_float32(encoder: PromptEncoder) -> PromptEncoder:
    """``encoder`` itself where it is in float32, else a copy: half types cannot hold a coordinate of 1024 px."""
    if next(encoder.parameters()).dtype == torch.float32:
        return encoder
    modules = tuple(encoder.modules())
    if torch.compiler.is_compiling() or not all(is_plain(module, type(module)) for module in modules):
        return _float32_copy(encoder)
    sizes = encoder.embed_dim, tuple(encoder.input_image_size), tuple(encoder.image_embedding_size)
    parts = modules[1:]  # with itself among the kept the encoder would live for ever
    tensors = (*encoder.parameters(), *encoder.buffers())
    return _copies.get(encoder, (sizes, parts), tensors, lambda: _float32_copy(encoder))


_encodings: Memo[Tensor] = Memo()
_copies: Memo[PromptEncoder] = Memo()


Copied = TypeVar("Copied", bound=nn.Module)


def _float32_copy(module: Copied) -> Copied:
    """A copy whose tensors are converted right away, not copied first."""
    parameters = {id(p): nn.Parameter(p.detach().float(), p.requires_grad) for p in module.parameters()}
    return deepcopy(module, parameters | {id(buffer): buffer.float() for buffer in module.buffers()})


def _is_sams_own(encoder: PromptEncoder) -> bool:
    return is_plain(encoder, PromptEncoder) and "_embed_points" not in vars(encoder)


def _embed_points(encoder: PromptEncoder, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
    """`PromptEncoder._embed_points` with choices in place of masks as indices: (B, N or N + 1, C)."""
    points = points + 0.5  # the middle of the pixel
    if pad:
        points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    location = encoder.pe_layer.forward_with_coords(points, encoder.input_image_size)
    negative, positive = (layer.weight for layer in encoder.point_embeddings[:2])
    labels = labels[..., None]
    padding = labels == -1
    kind = torch.where(labels == 0, negative, torch.full_like(negative, torch.nan))
    kind = torch.where(labels == 1, positive, kind)
    kind = torch.where(padding, encoder.not_a_point_embed.weight, kind)
    return (location.masked_fill(padding, 0) + kind).to(location.dtype)  # autocast's, where SAM adds in place


def _marked(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Points and integer labels as SAM's own forward takes them, points of an unknown label NaN."""
    unknown = (labels != 1) & (labels != 0) & (labels != -1)
    return points.masked_fill(unknown[..., None], torch.nan), labels.to(torch.int)
