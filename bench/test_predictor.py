"""The predictor on a picture of 1024 x 768, `sam_lite` in float32, host work and copies included.

``predict``: one box, the picture is set. ``set_image + predict``: with the image encoder. "sam" is segment_anything's
predictor without a plugin, "sam, shared" this package's without one, "fused" stabilised.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from cases import Contestant, Group, Run, Work
from contestants import fused_backend
from decoder_contestants import QUICK_IMAGE, boxes, facts, make_picture, plain_sam, stable_sam, with_reference
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from timing import relative_error

from stable_sam_cuda.sam import StableSamPredictor

PICTURE = 1024  # pixels
LARGEST_ERROR = 3e-3  # of the norm of the truth: convolutions may take TF32


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
    box = boxes(1, len(picture), torch.device("cpu"))[0].numpy()
    sam = model(run, torch.float32)
    predictor, exact = kind(sam), SamPredictor(with_reference(sam))
    found, truth = (torch.from_numpy(set_image_and_predict(each, picture, box)) for each in (predictor, exact))
    errors = {"logits": relative_error(found, truth.double())}
    both = partial(set_image_and_predict, predictor, picture, box)
    call = both if with_encoder else partial(predict, predictor, box)
    return Work(call, errors).verified(lambda _: LARGEST_ERROR)


def predictor_groups(run: Run, operation: str, with_encoder: bool) -> Iterator[Group]:
    kinds = {
        "fused": (StableSamPredictor, stable_sam),
        "sam": (SamPredictor, plain_sam),
        "sam, shared": (StableSamPredictor, plain_sam),
    }
    backends = {"fused": fused_backend(run.device)}
    made = [
        Contestant(name, partial(prepare, *kind, run, with_encoder), backends.get(name)) for name, kind in kinds.items()
    ]
    picture = partial(make_picture, 4 * QUICK_IMAGE if run.quick else PICTURE)
    for cache in run.caches("step", 1):
        size = ("forward", torch.float32, 1, cache, run.device, facts(run))
        yield Group(operation, *size, picture, made, rounds=9, host_work=True)


@pytest.mark.groups(make=partial(predictor_groups, operation="predict", with_encoder=False))
def test_predict(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)


@pytest.mark.groups(make=partial(predictor_groups, operation="set_image + predict", with_encoder=True))
def test_set_image_and_predict(case, turns, benchmark) -> None:
    turns.report(*case, benchmark)
