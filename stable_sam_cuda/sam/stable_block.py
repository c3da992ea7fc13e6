"""SAM's two-way attention block with the plugin in its token-to-image attention."""

import math
from collections.abc import Iterator
from typing import Any

from segment_anything.modeling import Sam, TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.modules.attention import AttentionPath, attend_fused, path_of
from stable_sam_cuda.modules.plain_module import is_plain
from stable_sam_cuda.ops.deformable_attention import AttentionWeights
from stable_sam_cuda.sam.image_attention import can_fold

# SAM's queries are [IoU token, mask token 0 .. 3, prompt tokens]. The paper routes by "the output token" and leaves
# open which one where SAM returns three masks; the first mask token, that of single-mask output, is taken for all.
OUTPUT_TOKEN_INDEX = 1


class StableTwoWayAttentionBlock(TwoWayAttentionBlock):
    """A `TwoWayAttentionBlock` whose tokens attend to calibrated image features.

    Never built anew: `install` turns a block of a loaded SAM into one, in place, so that SAM's parameters stay the
    same tensors under the same names, and `uninstall` turns it back.
    """

    plugin: DeformableSampler
    borrows: bool  # whether the plugin is named and saved by another block, its owner

    @staticmethod
    def install(block: TwoWayAttentionBlock, plugin: DeformableSampler, *, owner: bool = True) -> None:
        """Blocks that share a plugin have one ``owner`` of it among them.

        The plugin is a child of each of these blocks, so that what moves, copies or replicates modules meets it. But
        the owner alone names and saves it: a SAM has its parameters once, under the same names however many share it.
        """
        block.__class__ = StableTwoWayAttentionBlock
        block.borrows = not owner
        block.plugin = plugin

    @staticmethod
    def uninstall(block: "StableTwoWayAttentionBlock") -> None:
        del block.plugin, block.borrows
        block.__class__ = TwoWayAttentionBlock

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in `nn.Module`, without a borrowed plugin."""
        if not self.borrows:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            for name, child in self.named_children():
                if child is not self.plugin:
                    yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As in `nn.Module`, without a borrowed plugin."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.borrows:
            for name in [name for name in state if name.startswith(f"{prefix}plugin.")]:
                del state[name]
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in `nn.Module`; a borrowed plugin keeps what it has, until its owner's turn comes."""
        if self.borrows:
            unexpected_keys += [name for name in state_dict if name.startswith(f"{prefix}plugin.")]
            own = self.plugin.state_dict(keep_vars=True)
            state_dict.update({f"{prefix}plugin.{name}": tensor for name, tensor in own.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """As in SAM, but for keys and values of the token-to-image attention.

        Shapes: queries and query_pe (B, T, C); keys and key_pe (B, H * W, C).
        """
        queries = attend_among_tokens(self, queries, query_pe)

        output_token, placed = queries[:, OUTPUT_TOKEN_INDEX], queries + query_pe
        if self.attends_fused(placed):
            attended = self.attend_fused(placed, keys, key_pe, output_token)
        else:
            calibrated = self.calibrate(keys, output_token)
            attended = self.cross_attn_token_to_image(q=placed, k=calibrated + key_pe, v=calibrated)
        queries = self.norm2(queries + attended)

        queries = self.norm3(queries + self.mlp(queries))

        attended = self.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
        return queries, self.norm4(keys + attended)

    def attends_fused(self, queries: Tensor) -> bool:
        """Whether `attend_fused` serves these queries (B, T, C), from plain modules and by a backend that can."""
        return can_fold(self.cross_attn_token_to_image) and path_of(self.plugin, queries) is AttentionPath.FUSED

    def attend_fused(self, queries: Tensor, keys: Tensor, key_pe: Tensor, output_token: Tensor) -> Tensor:
        """The token-to-image attention over calibrated keys, for queries (B, T, C) with their encoding: (B, T, C).

        keys and key_pe: (B or 1, H * W, C).
        """
        attention = self.cross_attn_token_to_image
        q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        weights = AttentionWeights(
            q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, out.weight, out.bias, attention.num_heads
        )
        return attend_fused(self.plugin, weights, queries, _as_map(keys), _as_map(key_pe), output_token)

    def can_share(self) -> bool:
        """Whether what is sampled may be computed apart from a call of the plugin: it has no hooks of its own."""
        return is_plain(self.plugin, DeformableSampler)

    def deformed(self, keys: Tensor) -> Tensor:
        """What the plugin samples from keys (B, H * W, C), before it is blended with them: (B, H * W, C)."""
        return self.plugin.deformed(_as_map(keys)).flatten(2).transpose(1, 2)

    def calibrate(self, keys: Tensor, output_token: Tensor) -> Tensor:
        """The plugin's features for keys (B, H * W, C): (B, H * W, C)."""
        return self.plugin(_as_map(keys), output_token).flatten(2).transpose(1, 2)


def _as_map(locations: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view in channels-last memory."""
    side = math.isqrt(locations.shape[1])
    if side * side != locations.shape[1]:
        raise ValueError(
            f"keys: expected a square image embedding, as SAM's square input gives, got {locations.shape[1]} locations"
        )
    return locations.transpose(1, 2).unflatten(2, (side, side))


def attend_among_tokens(block: TwoWayAttentionBlock, queries: Tensor, query_pe: Tensor) -> Tensor:
    """The first step of a two-way block, self-attention of the tokens (B, T, C)."""
    if block.skip_first_layer_pe:
        return block.norm1(block.self_attn(q=queries, k=queries, v=queries))
    q = queries + query_pe
    return block.norm1(queries + block.self_attn(q=q, k=q, v=queries))


def last_blocks(sam: Sam, count: int) -> list[TwoWayAttentionBlock]:
    """The last ``count`` two-way blocks of the mask decoder, in their order.

    Raises:
        TypeError: ``sam`` is no Segment Anything model, or one of these blocks is of another class.
        ValueError: the decoder has fewer blocks.
    """
    if not isinstance(sam, Sam):
        raise TypeError(f"sam: expected a segment_anything Sam model, got {type(sam).__module__}.{type(sam).__name__}")
    transformer = sam.mask_decoder.transformer
    if not isinstance(transformer, TwoWayTransformer):
        raise TypeError(f"sam: expected a TwoWayTransformer in the mask decoder, got {type(transformer).__name__}")
    layers = list(transformer.layers)
    if not 1 <= count <= len(layers):
        raise ValueError(
            f"plugin: expected one for 1 to {len(layers)} blocks, those of SAM's mask decoder, got one for {count}"
        )
    for block in layers[-count:]:
        if type(block) not in (TwoWayAttentionBlock, StableTwoWayAttentionBlock):
            raise TypeError(f"sam: expected a TwoWayAttentionBlock as the decoder's last, got {type(block).__name__}")
    return layers[-count:]


def stable_blocks_of(sam: Sam) -> list[StableTwoWayAttentionBlock]:
    """The blocks that the plugin joined, in their order, none in a plain SAM; TypeError as `last_blocks`."""
    last_blocks(sam, 1)
    return [block for block in sam.mask_decoder.transformer.layers if isinstance(block, StableTwoWayAttentionBlock)]


def stable_block_of(sam: Sam) -> StableTwoWayAttentionBlock:
    """The last block, which owns the plugin; ValueError where ``sam`` is not stabilised."""
    blocks = stable_blocks_of(sam)
    if not blocks:
        raise ValueError("sam: expected a stabilised SAM, got a plain one (call stabilize(sam) first)")
    return blocks[-1]
