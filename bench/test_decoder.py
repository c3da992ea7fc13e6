"""The mask decoder: B boxes on one embedding of (256, 64, 64), three masks each.

"sam" is segment_anything's forward without a plugin, "sam, shared" the plain model by this package's decoder. "fused"
is the stabilised model with its attention fused, "sampled" without that, "fused, both blocks" with the plugin in both.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import Contestant, Group, Run, Work
from contestants import fused_backend
from models import boxes, embeddings, facts, image_size, in_float64, plain_sam, stable_sam
from segment_anything.modeling import Sam
from timing import poisoned, relative_error
from torch import Tensor

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam.shared_decoder import THREE_MASKS, decode

# Of the norm of the truth. Convolutions may take TF32 in float32.
LARGEST_ERROR = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Prompts = tuple[Tensor, Tensor, Tensor, Tensor]  # image and its encoding (1, C, h, w), sparse (B, 2, C), dense
Decoder = Callable[[Prompts], tuple[Tensor, Tensor]]


class SampledPlugin(DeformableSampler):
    """The same plugin, never fused into the attention, because it is of another class."""


@torch.no_grad()
def make_prompts(run: Run, dtype: torch.dtype, count: int) -> Prompts:
    encoder = plain_sam(run, dtype).prompt_encoder
    sparse, dense = encoder(points=None, boxes=boxes(count, image_size(run)).to(run.device), masks=None)
    of_image = embeddings(run, 1).to(dtype), encoder.get_dense_pe().to(dtype)
    return *of_image, sparse.to(dtype), dense[:1].to(dtype).expand_as(dense)  # repeated without memory, as SAM does


def by_sam(sam: Sam) -> Decoder:
    """segment_anything's own forward."""
    return lambda prompts: sam.mask_decoder(*prompts, multimask_output=True)


def by_sam_compiled(sam: Sam) -> Decoder:
    decoder = torch.compile(sam.mask_decoder)
    return lambda prompts: decoder(*prompts, multimask_output=True)


def by_us(sam: Sam) -> Decoder:
    return lambda prompts: decode(sam, prompts[0], *prompts[2:], THREE_MASKS)


@torch.no_grad()
def prepare(model: Callable[[], Sam], decoder: Callable[[Sam], Decoder], prompts: Prompts) -> Work:
    """The call, after its first and last two prompts were compared with SAM's own forward in float64."""
    sam, (image, image_pe, sparse, dense) = model(), prompts
    ends = sorted({place % len(sparse) for place in (0, 1, -2, -1)})  # in float64 16 prompts take a GB
    few = [tensor.double() for tensor in (image, image_pe, sparse[ends], dense[ends])]
    truths = by_sam(in_float64(sam))(few)
    call = torch.no_grad()(partial(decoder(sam), prompts))
    with poisoned([dense.contiguous()] * 4):
        found = call()
    names = ("logits", "scores")
    errors = {n: relative_error(f[ends], truth) for n, f, truth in zip(names, found, truths, strict=True)}
    return Work(call, errors).verified(lambda _: LARGEST_ERROR[image.dtype])


def decoder_groups(run: Run) -> Iterator[Group]:
    backend = fused_backend(run.device)
    for dtype, batch in run.dtypes_and_batches(on_cpu=(1, 16, 64)):
        plain, stable = partial(plain_sam, run, dtype), partial(stable_sam, run, dtype)
        made = [
            Contestant("fused", partial(prepare, stable, by_us), backend),
            Contestant("sampled", partial(prepare, partial(stable, SampledPlugin), by_us), backend),
            Contestant("fused, both blocks", partial(prepare, partial(stable, blocks=2), by_us), backend),
            Contestant("sam", partial(prepare, plain, by_sam)),
            Contestant("sam, shared", partial(prepare, plain, by_us)),
        ]
        if run.compiled:
            made.append(Contestant("compile", partial(prepare, plain, by_sam_compiled)))
        problem, host_work = partial(make_prompts, run, dtype, batch), run.on_cuda and batch == 1
        for cache in run.caches("forward", batch):
            size = ("forward", dtype, batch, cache, run.device, facts(run))
            yield Group("decoder", *size, problem, made, 5, host_work)


@pytest.mark.groups(make=decoder_groups)
def test_decoder(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
