"""SAM and Stable-SAM on the same photograph and prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam

from stable_sam_cuda.cli.prompts import ObjectPrompt
from stable_sam_cuda.modules.attention import AttentionPath
from stable_sam_cuda.sam import StableSamPredictor, plugin_of, stabilize
from stable_sam_cuda.sam.stable_block import stable_block_of

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """Masks of one object, (M, H, W) bool, and the IoU that the model predicts for each, (M,)."""

    masks: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Predictions of both models, one an object, and milliseconds: ``encoder``, ``sam_decoder``, ``stable_decoder``.

    ``stable`` is None where no plugin was asked for. ``offsets`` are the plugin's raw offsets in the last block,
    (2, H, W) an object, and ``max_offset`` its s_p. ``attention`` is the path of the attention there, "fused" or
    "sampled".
    """

    sam: list[Prediction]
    stable: list[Prediction] | None
    milliseconds: dict[str, float]
    offsets: list[np.ndarray] = field(default_factory=list)
    max_offset: float = 0.0
    attention: str | None = None

    @property
    def best(self) -> list[Prediction]:
        """Stable-SAM's predictions where there are any, else SAM's."""
        return self.sam if self.stable is None else self.stable


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Result of the work and the milliseconds it took, queued work of the device included."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, round((time.perf_counter() - started) * 1e3, 3)


def compare_models(
    sam: Sam,
    plugin: str | None,
    picture: Image.Image,
    prompts: Sequence[ObjectPrompt],
    *,
    backend: str,
    multimask: bool,
) -> Comparison:
    """Encode the picture once, decode it with SAM and then, unless ``plugin`` is None, with Stable-SAM.

    The encoder is SAM's own and frozen, so one embedding serves both. Each stage runs once: on a first call its time
    includes what a first call costs. ``sam`` is left stabilised.
    """
    predictor = StableSamPredictor(sam)
    milliseconds = {}

    def decode() -> list[Prediction]:
        predictions = predictor.predict_batch([prompt.arguments() for prompt in prompts], multimask)
        return [Prediction(masks, scores) for masks, scores, _ in predictions]

    _, milliseconds["encoder"] = timed(lambda: predictor.set_image(np.array(picture)), predictor.device)
    plain, milliseconds["sam_decoder"] = timed(decode, predictor.device)
    if plugin is None:
        return Comparison(plain, None, milliseconds)
    stabilize(sam, plugin)
    sampler = plugin_of(sam)
    sampler.backend = backend
    # Prompts of one run are of one kind, so the predictor decodes them in their order.
    calls: list[np.ndarray] = []
    hook = sampler.offset_network.register_forward_hook(lambda _, __, out: calls.append(out[1].float().cpu().numpy()))
    stable, milliseconds["stable_decoder"] = timed(decode, predictor.device)
    hook.remove()
    offsets = [each for call in calls[sampler.blocks - 1 :: sampler.blocks] for each in call]
    return Comparison(plain, stable, milliseconds, offsets, sampler.max_offset, attention_path(sam, prompts[0]))


@torch.no_grad()
def attention_path(sam: Sam, prompt: ObjectPrompt) -> str:
    """The path by which a stabilised SAM's plugin attends for prompts of this kind."""
    decoder = sam.mask_decoder
    # A box is two tokens; points without one are followed by SAM's padding point.
    tokens = 1 + decoder.num_mask_tokens + len(prompt.points) + (1 if prompt.box is None else 2)
    queries = decoder.iou_token.weight.new_zeros((1, tokens, decoder.transformer_dim))
    fused = stable_block_of(sam).attends_fused(queries)
    return (AttentionPath.FUSED if fused else AttentionPath.SAMPLED).value
