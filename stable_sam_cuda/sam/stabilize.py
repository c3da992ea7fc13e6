"""Installs Stable-SAM's plugin in a Segment Anything model, and takes it out again."""

from os import PathLike, fspath
from pathlib import Path

from segment_anything.modeling import Sam

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.plugin_io import PLUGIN_SUFFIX, read_plugin, shipped_plugins
from stable_sam_cuda.sam.stable_block import StableTwoWayAttentionBlock, last_blocks, stable_block_of, stable_blocks_of


def stabilize(sam: Sam, plugin: DeformableSampler | str | PathLike[str] | None = None) -> Sam:
    """Turn a SAM into a Stable-SAM, in place: the plugin joins the last two-way block of the mask decoder.

    A plugin made or trained with ``blocks=2`` (`DeformableSampler`) joins both blocks.

    SAM's parameters keep their values and names and are frozen (``requires_grad`` False, restored by `unstabilize`);
    the plugin's parameters are trainable and appear in ``state_dict`` beside them. The plugin takes SAM's device and
    the mask decoder's dtype.

    Args:
        sam: a ``segment_anything`` model: ViT-B, L, H, or `load_sam`'s ``sam_lite``.
        plugin: None for an untrained plugin, which leaves SAM's results as they are; ``"auto"`` for the plugin
            shipped for this base model, or the name of a shipped one; the path of a ``.safetensors`` file written
            by `save_plugin`; or a `DeformableSampler`, which is installed itself, whatever base model it was
            trained on.

    Returns:
        ``sam`` itself.

    Raises:
        TypeError: ``sam`` is no Segment Anything model, or ``plugin`` is of none of these types.
        ValueError: ``sam`` is stabilised already; the plugin is unknown, damaged, of other channel counts, for more
            blocks than the decoder has, or of another base model.
        FileNotFoundError: there is no such plugin file.
    """
    if stable_blocks_of(sam):
        raise ValueError("sam: expected a plain SAM, got one that is stabilised already (call unstabilize(sam) first)")
    sampler = _resolve_plugin(sam, plugin)
    _check_channels(sam, sampler)
    *earlier, last = last_blocks(sam, sampler.blocks)

    last.trainable_before = tuple(name for name, parameter in sam.named_parameters() if parameter.requires_grad)
    sam.requires_grad_(False)
    reference = last.norm1.weight
    sampler.to(device=reference.device, dtype=reference.dtype).requires_grad_(True).train(sam.training)
    StableTwoWayAttentionBlock.install(last, sampler)
    for block in earlier:
        StableTwoWayAttentionBlock.install(block, sampler, owner=False)
    return sam


def unstabilize(sam: Sam) -> Sam:
    """Take the plugin out and restore every ``requires_grad`` flag; returns ``sam``, a plain SAM again.

    Raises:
        TypeError: ``sam`` is no Segment Anything model.
        ValueError: ``sam`` is not stabilised.
    """
    last = stable_block_of(sam)
    trainable = set(last.trainable_before)
    del last.trainable_before
    for block in stable_blocks_of(sam):
        StableTwoWayAttentionBlock.uninstall(block)
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(name in trainable)
    return sam


def plugin_of(sam: Sam) -> DeformableSampler:
    """The plugin installed in a stabilised SAM; TypeError or ValueError where there is none."""
    return stable_block_of(sam).plugin


def _check_channels(sam: Sam, sampler: DeformableSampler) -> None:
    channels = sam.mask_decoder.transformer_dim
    for name in ("channels", "token_channels"):
        if getattr(sampler, name) != channels:
            raise ValueError(
                f"plugin: expected {name}={channels}, that of SAM's mask decoder, got {getattr(sampler, name)}"
            )


def _resolve_plugin(sam: Sam, plugin: DeformableSampler | str | PathLike[str] | None) -> DeformableSampler:
    if plugin is None:
        channels = sam.mask_decoder.transformer_dim
        return DeformableSampler(channels, token_channels=channels)
    if isinstance(plugin, DeformableSampler):
        return plugin
    if not isinstance(plugin, (str, PathLike)):
        raise TypeError(
            "plugin: expected None, a name, the path of a .safetensors file or a DeformableSampler, "
            f"got {type(plugin).__name__}"
        )
    base_model = base_model_name(sam)
    path = _find_plugin_file(fspath(plugin), base_model)
    sampler, record = read_plugin(path)
    if record.base_model not in (None, base_model):
        raise ValueError(
            f"plugin: expected one trained on {base_model or 'this model'}, got {path}, trained on "
            f"{record.base_model} (pass load_plugin(path) to install it all the same)"
        )
    return sampler


def _find_plugin_file(plugin: str, base_model: str | None) -> Path:
    if plugin.endswith(PLUGIN_SUFFIX):
        return Path(plugin)
    shipped = shipped_plugins()
    name = f"stable_{base_model}" if plugin == "auto" else plugin
    if name not in shipped:
        wanted = f"'auto' for {base_model or 'a base model of its own'}" if plugin == "auto" else repr(plugin)
        raise ValueError(
            f"plugin: expected the path of a {PLUGIN_SUFFIX} file or a shipped plugin "
            f"({', '.join(sorted(shipped)) or 'none is shipped'}), got {wanted}"
        )
    return shipped[name]
