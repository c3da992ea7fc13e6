"""Times the stabilised decoder, the predictor and the plugin's training against plain SAM and eager PyTorch.

    python bench/gpu_decoder.py [--device cuda] [--seconds 60] [--output FILE.json] [--tiny]

Operations, all on sam_lite, whose prompt encoder and mask decoder are SAM's own, verified before they are timed:
    decoder              B boxes on one embedding of (256, 64, 64), three masks; mask decoder converted to the dtype.
                         "sam" is segment_anything's forward without a plugin, "fused" the stabilised model by this
                         package's decoder, "fused, both blocks" with the plugin in both, "sam, shared" the plain model
    predict              one box on a picture of 1024 x 768 that is set, host work and copies included; float32
    set_image + predict  the same with the image encoder
    training_step        32 objects of 8 pictures from cached embeddings; half types by autocast. "fused" is what a user
                         gets, "reference" backend="reference", "eager" grid_sample and two blends; decoder and loss are
                         the same for all three
Needs segment_anything; without it nothing of this can be measured. The most telling sizes come first; what the time
does not allow is listed as skipped.
"""

from collections.abc import Callable, Iterator

import torch
from gpu_session import Job, Record, Session, dtype_name, poison, relative_error, run_benchmark

try:
    import segment_anything  # noqa: F401 (what follows imports it)
except ImportError as error:
    raise SystemExit(f"left out: decoder, predictor and training step need segment_anything: {error}") from None

from decoder_contestants import (
    EAGER,
    OWN,
    REFERENCE,
    SAM,
    TrainingStep,
    both_blocks_in,
    decoders,
    exact_gradients,
    in_float64,
    models_in,
    predict,
    predictors,
    set_image_and_predict,
)
from decoder_prompts import TOKENS, boxes, make_picture, make_prompts, make_training_batch
from segment_anything.modeling import Sam

from stable_sam_cuda.sam import StableSamPredictor, plugin_of
from stable_sam_cuda.sam.lite import IMAGE_SIZE

TINY_IMAGE = 64  # pixels: an embedding of 8 x 8
PICTURE = 1024  # pixels
VERIFIED = 4  # prompts: in float64 SAM's own forward takes a GB for every 16
# Of the norm of the truth. Convolutions may take TF32 in float32.
LARGEST_ERROR = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LARGEST_ERROR_OF_GRADIENTS = {torch.float32: 0.1, torch.float16: 0.1, torch.bfloat16: 0.2}

Size = tuple[torch.dtype, int]
FIRST_SIZES: list[Size] = [(torch.bfloat16, batch) for batch in (64, 1, 16, 256)]
MORE_SIZES: list[Size] = [(dtype, batch) for dtype in (torch.float32, torch.float16) for batch in (64, 1, 16, 256)]
TINY_SIZES: list[Size] = [(torch.float32, 2), (torch.bfloat16, 2)]


def image_size(session: Session) -> int:
    return TINY_IMAGE if session.tiny else IMAGE_SIZE


def facts_of(operation: str, provider: str, dtype: torch.dtype, batch: int, session: Session) -> Record:
    stable = models_in(torch.float32, session.clock.device, image_size(session))[1]
    facts = {"operation": operation, "provider": provider, "dtype": dtype_name(dtype), "B": batch, "T": TOKENS}
    height, width = stable.prompt_encoder.image_embedding_size
    facts |= {"C": stable.mask_decoder.transformer_dim, "H": height, "W": width}
    return facts | {"max_offset": plugin_of(stable).max_offset}


def is_judged(name: str, dtype: torch.dtype) -> bool:
    """Gradients by offsets jump where rounding moves a location past an integer; in half types it moves many."""
    return name != "grad_offset_network" or dtype == torch.float32


def wrong(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Also where NaN."""
    limits = {
        name: (LARGEST_ERROR_OF_GRADIENTS if name.startswith("grad") else LARGEST_ERROR)[dtype] for name in errors
    }
    return not all(errors[name] <= limit for name, limit in limits.items())


def judged(
    session: Session,
    facts: Record,
    dtype: torch.dtype,
    errors: dict[str, float],
    call: Callable[[], object],
    *,
    graph: bool = False,
) -> Iterator[Record]:
    """The call's records, or that its results are wrong."""
    if wrong(errors, dtype):
        yield facts | {"failed": f"wrong results, not timed: relative errors {errors}"}
    else:
        yield from session.records_of(facts, call, errors, graph=graph)


@torch.no_grad()
def measure_decoder(facts: Record, provider: str, size: Size, session: Session) -> Iterator[Record]:
    dtype, batch = size
    models = decoder_models(dtype, session)
    prompts = make_prompts(models[0], batch, dtype)
    model, step = decoders(*models)[provider]
    few = prompts._replace(sparse=prompts.sparse[:VERIFIED], dense=prompts.dense[:VERIFIED])
    truths = in_float64(model).mask_decoder(*[tensor.double() for tensor in few], multimask_output=True)
    poison([prompts.dense.contiguous()] * 4)
    found = step(prompts)
    errors = {
        name: relative_error(tensor[:VERIFIED], truth)
        for name, tensor, truth in zip(("logits", "scores"), found, truths, strict=True)
    }
    del found
    yield from judged(session, facts, dtype, errors, lambda: step(prompts), graph=batch == 1)


def measure_predictor(facts: Record, provider: str, session: Session) -> Iterator[Record]:
    models = models_in(torch.float32, session.clock.device, image_size(session))
    predictor = predictors(*models)[provider]
    exact = StableSamPredictor(in_float64(predictor.model))
    picture = make_picture(4 * TINY_IMAGE if session.tiny else PICTURE)
    box = boxes(1, picture.shape[0], torch.device("cpu"))[0].numpy()
    truth = torch.from_numpy(set_image_and_predict(exact, picture, box)).double()
    found = torch.from_numpy(set_image_and_predict(predictor, picture, box))
    errors = {"logits": relative_error(found, truth)}
    calls: dict[str, Callable[[], object]] = {
        "predict": lambda: predict(predictor, box),
        "set_image + predict": lambda: set_image_and_predict(predictor, picture, box),
    }
    for operation, call in calls.items():
        yield from judged(session, facts | {"operation": operation}, torch.float32, errors, call)


def measure_training(facts: Record, provider: str, dtype: torch.dtype, session: Session) -> Iterator[Record]:
    stable = models_in(torch.float32, session.clock.device, image_size(session))[1]
    batch = make_training_batch(stable, *objects(session))
    truths = exact_gradients(stable, batch)
    step = TrainingStep(provider, stable, dtype)
    poison([batch.embeddings] * 8)
    found = step.gradients(batch)
    errors = {name: relative_error(found[name], truth) for name, truth in truths.items() if is_judged(name, dtype)}
    del found
    yield from judged(session, facts, dtype, errors, lambda: step(batch))


def decoder_models(dtype: torch.dtype, session: Session) -> tuple[Sam, Sam, Sam]:
    """Plain, stabilised, and stabilised in both blocks."""
    arguments = dtype, session.clock.device, image_size(session)
    return *models_in(*arguments), both_blocks_in(*arguments)


def objects(session: Session) -> tuple[int, int]:
    """Pictures, and objects of each."""
    return (2, 2) if session.tiny else (8, 4)


def decoder_jobs(sizes: list[Size], session: Session) -> Iterator[Job]:
    for dtype, batch in sizes:
        for provider in decoders(*decoder_models(dtype, session)):
            facts = facts_of("decoder", provider, dtype, batch, session)
            facts |= {"mode": "forward", "host_work": batch == 1}
            yield (
                facts,
                lambda facts=facts, provider=provider, size=(dtype, batch): measure_decoder(
                    facts, provider, size, session
                ),
            )


def training_jobs(dtypes: list[torch.dtype], session: Session) -> Iterator[Job]:
    pictures, each = objects(session)
    for dtype in dtypes:
        for provider in (OWN, EAGER, REFERENCE):
            facts = facts_of("training_step", provider, dtype, pictures * each, session) | {"mode": "step"}
            yield (
                facts,
                lambda facts=facts, provider=provider, dtype=dtype: measure_training(facts, provider, dtype, session),
            )


def predictor_jobs(session: Session) -> Iterator[Job]:
    for provider in (OWN, SAM):
        facts = facts_of("set_image + predict", provider, torch.float32, 1, session)
        facts |= {"mode": "forward", "host_work": True}
        yield facts, lambda facts=facts, provider=provider: measure_predictor(facts, provider, session)


def jobs(session: Session) -> Iterator[Job]:
    yield from decoder_jobs(TINY_SIZES if session.tiny else FIRST_SIZES, session)
    yield from training_jobs([torch.bfloat16, torch.float32], session)
    yield from predictor_jobs(session)
    if not session.tiny:
        yield from decoder_jobs(MORE_SIZES, session)
        yield from training_jobs([torch.float16], session)


if __name__ == "__main__":
    run_benchmark(__doc__, 60.0, jobs, (OWN,))
