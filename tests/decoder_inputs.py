"""What a mask decoder is given, for prompts of any kind, and what SAM's own answers to it."""

import torch
from tolerances import DECODER, assert_matches

from stable_sam_cuda.sam.shared_decoder import ALL_MASKS


def encoded(sam, kind, count=3, seed=0):
    """Image embedding (1, C, H, W), and the prompt encoder's sparse and dense embeddings of ``count`` prompts.

    ``kind`` is a name, or a number of points.
    """
    generator = torch.Generator().manual_seed(seed)
    side = sam.prompt_encoder.input_image_size[0]
    named = {"one-point": 1, "five-points": 5, "twelve-points": 12, "box-and-points": 3, "everything": 2}
    points = kind if isinstance(kind, int) else named.get(kind)
    corners = torch.rand(count, 2, generator=generator) * side / 2
    masks = torch.randn(count, 1, *sam.prompt_encoder.mask_input_size, generator=generator)
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(
            points=points and (torch.rand(count, points, 2, generator=generator) * side, torch.ones(count, points)),
            boxes=torch.cat([corners, corners + side / 3], 1)
            if kind in ("box", "box-and-points", "everything")
            else None,
            masks=masks if kind in ("mask", "everything") else None,
        )
    image = torch.randn(1, 256, *sam.prompt_encoder.image_embedding_size, generator=generator)
    return image, sparse, dense


def sams_own(sam, image, sparse, dense, masks=ALL_MASKS):
    """Logits and scores by ``segment_anything``'s forward, which calls the blocks, for prompts of one image."""
    dtype = next(sam.mask_decoder.parameters()).dtype
    image, pe, sparse, dense = (t.to(dtype) for t in (image, sam.prompt_encoder.get_dense_pe(), sparse, dense))
    logits, scores = sam.mask_decoder.predict_masks(image, pe, sparse, dense)
    return logits[:, list(masks)], scores[:, list(masks)]


def assert_same_answers(found, expected, dtype):
    """Logits and scores of ``dtype`` that agree."""
    for name, one, other in zip(("logits", "scores"), found, expected, strict=True):
        assert one.dtype == dtype
        assert_matches(name, one.detach(), other.detach(), DECODER[dtype])
