"""SAM's decoder over a batch of prompts that belong to different pictures (its own forward takes one)."""

from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.data.prompts import PromptBatch
from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, decode


def decode_prompts(
    sam: Sam, embeddings: Tensor, prompts: PromptBatch, masks: tuple[int, ...] = ALL_MASKS
) -> tuple[Tensor, Tensor]:
    """Embeddings (I, C, h, w) and K prompts -> logits (K, M, 4h, 4w) of the M wanted masks, their predicted IoU (K, M).

    Mask 0 is SAM's single-mask output, 1 to 3 its answers to an ambiguous prompt.
    """
    encoder = sam.prompt_encoder
    sparse, dense = encode_prompts(encoder, prompts.points, prompts.labels, prompts.boxes, prompts.masks)
    if len(embeddings) > 1:
        embeddings = embeddings[prompts.image_index]
    return decode(sam, embeddings, sparse, dense, masks)
