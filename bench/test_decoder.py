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
from decoder_contestants import (
    Prompts,
    SampledPlugin,
    decoded_by_sam,
    decoded_by_us,
    errors_of,
    facts,
    in_float64,
    make_prompts,
    plain_sam,
    stable_sam,
)
from segment_anything.modeling import Sam
from timing import poisoned
from torch import Tensor

# Of the norm of the truth. Convolutions may take TF32 in float32.
LARGEST_ERROR = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Decoder = Callable[[Prompts], tuple[Tensor, Tensor]]


@torch.no_grad()
def prepare(sam: Callable[[], Sam], decoder: Callable[[Sam], Decoder], prompts: Prompts) -> Work:
    """The call, after its first and last two prompts were compared with SAM's own forward in float64."""
    model, count = sam(), len(prompts.sparse)
    ends = sorted({*range(min(2, count)), *range(max(0, count - 2), count)})  # in float64 16 prompts take a GB
    few = prompts._replace(sparse=prompts.sparse[ends], dense=prompts.dense[ends])
    truths = decoded_by_sam(in_float64(model).mask_decoder, Prompts(*[tensor.double() for tensor in few]))
    call = torch.no_grad()(partial(decoder(model), prompts))
    with poisoned([prompts.dense.contiguous()] * 4):
        logits, scores = call()
    found = {"logits": logits[ends], "scores": scores[ends]}
    errors = errors_of(found, dict(zip(("logits", "scores"), truths, strict=True)))
    return Work(call, errors).verified(lambda _: LARGEST_ERROR[logits.dtype])


def ours(sam: Sam) -> Decoder:
    return partial(decoded_by_us, sam)


def sams(sam: Sam) -> Decoder:
    return partial(decoded_by_sam, sam.mask_decoder)


def sams_compiled(sam: Sam) -> Decoder:
    return partial(decoded_by_sam, torch.compile(sam.mask_decoder))


def decoders(run: Run, dtype: torch.dtype) -> list[Contestant]:
    plain, stable = partial(plain_sam, run, dtype), partial(stable_sam, run, dtype)
    backend = fused_backend(run.device)
    made = [
        Contestant("fused", partial(prepare, stable, ours), backend),
        Contestant("sampled", partial(prepare, partial(stable, SampledPlugin), ours), backend),
        Contestant("fused, both blocks", partial(prepare, partial(stable, blocks=2), ours), backend),
        Contestant("sam", partial(prepare, plain, sams)),
        Contestant("sam, shared", partial(prepare, plain, ours)),
    ]
    return [*made, Contestant("compile", partial(prepare, plain, sams_compiled))] if run.compiled else made


def decoder_groups(run: Run) -> Iterator[Group]:
    for dtype, batch in run.dtypes_and_batches(on_cpu=(1, 16, 64)):
        problem, made = partial(make_prompts, run, dtype, batch), decoders(run, dtype)
        for cache in run.caches("forward", batch):
            size = ("forward", dtype, batch, cache, run.device, facts(run))
            yield Group("decoder", *size, problem, made, rounds=5, host_work=run.on_cuda and batch == 1)


@pytest.mark.groups(make=decoder_groups)
def test_decoder(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
