"""The predictor on a picture of 1024 x 768, `sam_lite` in float32, host work and copies included.

``predict``: one box, the picture is set. ``set_image + predict``: with the image encoder. "sam" is segment_anything's
predictor without a plugin, "sam, shared" this package's without one, "fused" this package's stabilised.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from cases import Contestant, Group, Run, Work
from contestants import fused_backend
from models import boxes, facts, plain_sam, stable_sam, with_reference
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from timing import relative_error

from stable_sam_cuda.sam import StableSamPredictor

LARGEST_ERROR = 3e-3  # of the norm of the truth: convolutions may take TF32


def make_picture(side: int) -> np.ndarray:
    """(3/4 side, side, 3) of uint8: noise, which resizing blurs."""
    return np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)


def predict(predictor: SamPredictor, box: np.ndarray) -> np.ndarray:
    """Logits of low resolution (1, h, w)."""
    return predictor.predict(box=box, multimask_output=False)[2]


def set_image_and_predict(predictor: SamPredictor, picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    predictor.set_image(picture)
    return predict(predictor, box)


def prepare(
    kind: type[SamPredictor], model: Callable[..., Sam], run: Run, with_encoder: bool, picture: np.ndarray
) -> Work:
    """The call, compared with segment_anything's predictor and the plugin in plain PyTorch.

    In float32: float64 takes the image encoder ten seconds on a CPU.
    """
    sam, box = model(run, torch.float32), boxes(1, len(picture))[0].numpy()
    predictor, exact = kind(sam), SamPredictor(with_reference(sam))
    found, truth = (torch.from_numpy(set_image_and_predict(each, picture, box)) for each in (predictor, exact))
    whole = partial(set_image_and_predict, predictor, picture, box)
    work = Work(whole if with_encoder else partial(predict, predictor, box), {"logits": relative_error(found, truth)})
    return work.verified(lambda _: LARGEST_ERROR)


def predictor_groups(run: Run, operation: str, with_encoder: bool) -> Iterator[Group]:
    made = [
        Contestant(name, partial(prepare, kind, model, run, with_encoder), backend)
        for name, kind, model, backend in (
            ("fused", StableSamPredictor, stable_sam, fused_backend(run.device)),
            ("sam", SamPredictor, plain_sam, None),
            ("sam, shared", StableSamPredictor, plain_sam, None),
        )
    ]
    picture = partial(make_picture, 256 if run.quick else 1024)
    for cache in run.caches("step", 1):
        size = ("forward", torch.float32, 1, cache, run.device, facts(run))
        yield Group(operation, *size, picture, made, rounds=9, host_work=True)


@pytest.mark.groups(make=partial(predictor_groups, operation="predict", with_encoder=False))
def test_predict(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)


@pytest.mark.groups(make=partial(predictor_groups, operation="set_image + predict", with_encoder=True))
def test_set_image_and_predict(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
