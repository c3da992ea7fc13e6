"""SAM's two-way attention block with the plugin in its token-to-image attention."""

import math

from segment_anything.modeling import Sam, TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor

from stable_sam_cuda.modules import DeformableSampler

# SAM's queries are [IoU token, mask token 0 .. 3, prompt tokens]. The paper routes by "the output token" and leaves
# open which one where SAM returns three masks; the first mask token, that of single-mask output, is taken for all.
OUTPUT_TOKEN_INDEX = 1


class StableTwoWayAttentionBlock(TwoWayAttentionBlock):
    """A `TwoWayAttentionBlock` whose tokens attend to calibrated image features.

    Never built anew: `install` turns a block of a loaded SAM into one, in place, so that SAM's parameters stay the
    same tensors under the same names, and `uninstall` turns it back.
    """

    plugin: DeformableSampler

    @staticmethod
    def install(block: TwoWayAttentionBlock, plugin: DeformableSampler) -> None:
        block.__class__ = StableTwoWayAttentionBlock
        block.plugin = plugin

    @staticmethod
    def uninstall(block: "StableTwoWayAttentionBlock") -> None:
        del block.plugin
        block.__class__ = TwoWayAttentionBlock

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """As in SAM, but for keys and values of the token-to-image attention.

        Shapes: queries and query_pe (B, T, C); keys and key_pe (B, H * W, C).
        """
        queries = attend_among_tokens(self, queries, query_pe)

        calibrated = self.calibrate(keys, output_token=queries[:, OUTPUT_TOKEN_INDEX])
        attended = self.cross_attn_token_to_image(q=queries + query_pe, k=calibrated + key_pe, v=calibrated)
        queries = self.norm2(queries + attended)

        queries = self.norm3(queries + self.mlp(queries))

        attended = self.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
        return queries, self.norm4(keys + attended)

    def calibrate(self, keys: Tensor, output_token: Tensor) -> Tensor:
        """The plugin's features for keys (B, H * W, C): (B, H * W, C). Both changes of shape are views."""
        side = math.isqrt(keys.shape[1])
        if side * side != keys.shape[1]:
            raise ValueError(
                f"keys: expected a square image embedding, as SAM's square input gives, got {keys.shape[1]} locations"
            )
        features = keys.transpose(1, 2).unflatten(2, (side, side))
        return self.plugin(features, output_token).flatten(2).transpose(1, 2)


def attend_among_tokens(block: TwoWayAttentionBlock, queries: Tensor, query_pe: Tensor) -> Tensor:
    """The first step of a two-way block, self-attention of the tokens (B, T, C)."""
    if block.skip_first_layer_pe:
        return block.norm1(block.self_attn(q=queries, k=queries, v=queries))
    q = queries + query_pe
    return block.norm1(queries + block.self_attn(q=q, k=q, v=queries))


def last_block(sam: Sam) -> TwoWayAttentionBlock:
    """The last two-way block of the mask decoder; TypeError where ``sam`` has no such thing."""
    if not isinstance(sam, Sam):
        raise TypeError(f"sam: expected a segment_anything Sam model, got {type(sam).__module__}.{type(sam).__name__}")
    transformer = sam.mask_decoder.transformer
    if not isinstance(transformer, TwoWayTransformer):
        raise TypeError(f"sam: expected a TwoWayTransformer in the mask decoder, got {type(transformer).__name__}")
    block = transformer.layers[-1]
    if type(block) not in (TwoWayAttentionBlock, StableTwoWayAttentionBlock):
        raise TypeError(f"sam: expected a TwoWayAttentionBlock as the decoder's last, got {type(block).__name__}")
    return block


def stable_block_of(sam: Sam) -> StableTwoWayAttentionBlock:
    """The block that holds the plugin; ValueError where ``sam`` is not stabilised."""
    block = last_block(sam)
    if not isinstance(block, StableTwoWayAttentionBlock):
        raise ValueError("sam: expected a stabilised SAM, got a plain one (call stabilize(sam) first)")
    return block
