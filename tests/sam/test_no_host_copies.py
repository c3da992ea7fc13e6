"""Nothing goes between the host and a GPU while prompts are decoded: no call waits, and a CUDA graph can hold it.

Without a GPU: on fake tensors, which have a device, shapes and no values. Whoever asks for a value of one, as
``.item()``, ``if tensor`` and masks as indices do, gets an error. The kernels' own host code is not in it.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.ops import backends
from stable_sam_cuda.ops.backends import Backend
from stable_sam_cuda.sam import StableSamPredictor, stabilize
from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, SINGLE_MASK, THREE_MASKS, decode

pytestmark = pytest.mark.filterwarnings("ignore::stable_sam_cuda.MissingBackendWarning")

MODELS = {
    "plain": None,
    "one-block": {},
    "both-blocks": {"blocks": 2},
    "no-router": {"router_hidden": 0},
    "amplitude": {"amplitude": "location"},
}
POINTS = {"point_coords": torch.full((3, 2, 2), 50.0), "point_labels": torch.ones(3, 2, dtype=torch.int64)}
BOXES = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 80.0]]).expand(3, -1)}
MASKS = {"mask_input": torch.zeros(3, 1, 32, 32)}
PROMPTS = {
    "points": POINTS,
    "boxes": BOXES,
    "one-box": {"boxes": BOXES["boxes"][:1]},
    "masks": MASKS,
    "everything": POINTS | BOXES | MASKS,
}


class HostTensors(TorchDispatchMode):
    """Collects every operation that takes or gives a tensor on the CPU, and counts copies that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        taken, given = devices_in((arguments, options)), devices_in(result)
        if "cpu" in taken | given:
            self.operations.append(str(operation))
            self.waits += len(taken | given) == 2 and not (options or {}).get("non_blocking", False)
        return result


def devices_in(tree) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def on_a_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def move(module: nn.Module) -> None:
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = on_a_gpu(tensor)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if tensors is child._parameters else moved


def built(sam, name):
    return sam if MODELS[name] is None else stabilize(sam, DeformableSampler(**MODELS[name]))


@pytest.fixture(params=MODELS)
def model(request, sam):
    return built(sam, request.param)


@pytest.fixture
def auto_finds(monkeypatch):
    """A function that makes ``auto`` find a backend, whose kernels then are called and not run."""

    def find(backend):
        monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice(backend, backend))

    return find


def predictor_on_a_gpu(sam):
    predictor = StableSamPredictor(sam)
    predictor.features = torch.empty(1, 256, 8, 8, dtype=sam.image_encoder.patch_embed.proj.weight.dtype, device="cuda")
    predictor.original_size, predictor.input_size, predictor.is_image_set = (90, 120), (96, 128), True
    return predictor


@pytest.mark.parametrize(
    ("name", "backend", "kind"),
    [
        *(("one-block", Backend.CUDA, kind) for kind in PROMPTS),
        *((name, Backend.CUDA, "everything") for name in MODELS if name != "one-block"),
        *(("one-block", backend, "one-box") for backend in (Backend.TRITON, Backend.REFERENCE)),
    ],
    ids=str,
)
def test_predict_torch(sam, auto_finds, name, backend, kind):
    auto_finds(backend)
    model, prompt = built(sam, name), PROMPTS[kind]
    with FakeTensorMode():
        move(model)
        predictor = predictor_on_a_gpu(model)
        given = {"point_coords": None, "point_labels": None} | {name: on_a_gpu(t) for name, t in prompt.items()}
        with HostTensors() as host:
            results = predictor.predict_torch(**given)
    count = len(next(iter(prompt.values())))
    assert [tuple(result.shape) for result in results] == [(count, 3, 90, 120), (count, 3), (count, 3, 32, 32)]
    assert {result.device.type for result in results} == {"cuda"}
    assert host.operations == []


@pytest.mark.parametrize(
    ("dtype", "return_logits", "multimask"), [(torch.float16, False, True), (torch.bfloat16, True, False)], ids=str
)
def test_predict_torch_of_half_models(sam, dtype, return_logits, multimask):
    stabilize(sam).to(dtype)
    with FakeTensorMode():
        move(sam)
        predictor = predictor_on_a_gpu(sam)
        given = {name: on_a_gpu(tensor) for name, tensor in PROMPTS["everything"].items()}
        with HostTensors() as host:
            masks, *rest = predictor.predict_torch(**given, multimask_output=multimask, return_logits=return_logits)
    assert masks.dtype == (torch.float32 if return_logits else torch.bool)
    assert {result.dtype for result in rest} == {torch.float32}
    assert host.operations == []


def test_a_batch_waits_for_three_copies(sam, monkeypatch):
    """Masks, scores and logits of eight prompts; their boxes go to the device without a wait."""
    monkeypatch.setattr(Tensor, "numpy", lambda tensor: np.zeros(tensor.shape))
    stabilize(sam)
    with FakeTensorMode():
        move(sam)
        predictor = predictor_on_a_gpu(sam)
        with HostTensors() as host:
            results = predictor.predict_batch([{"box": [10, 20, 30 + place, 80]} for place in range(8)])
    assert [masks.shape for masks, _, _ in results] == [(3, 90, 120)] * 8
    assert host.waits == 3


def test_predict_torch_with_a_prompt_encoder_that_is_not_sams(sam):
    """Its own forward runs, and waits as SAM's does where there are points; nothing else does."""
    sam.prompt_encoder.register_forward_hook(lambda module, arguments, output: None)
    with FakeTensorMode():
        move(sam)
        predictor = predictor_on_a_gpu(sam)
        with HostTensors() as host:
            predictor.predict_torch(None, None, on_a_gpu(BOXES["boxes"]))
    assert host.operations == []


@pytest.mark.parametrize("masks", [SINGLE_MASK, THREE_MASKS, ALL_MASKS], ids=["single", "three", "all"])
def test_decoder(model, masks):
    boxes = torch.tensor([[10.0, 20.0, 90.0, 80.0]])
    with torch.no_grad():
        sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
    with FakeTensorMode(), torch.no_grad():
        move(model)
        inputs = [on_a_gpu(tensor) for tensor in (dense, sparse, dense)]
        with HostTensors() as host:
            logits, scores = decode(model, *inputs, masks)
    assert logits.shape[:2] == scores.shape == (1, len(masks))
    assert logits.device.type == "cuda"
    assert host.operations == []


def test_decoding_with_gradients(model, auto_finds):
    """What a training step does between the image encoder and the losses, prompts of several pictures included."""
    auto_finds(Backend.CUDA)
    with FakeTensorMode():
        move(model)
        given = [on_a_gpu(tensor) for tensor in (*POINTS.values(), BOXES["boxes"])]
        images = torch.empty(2, 256, 8, 8, device="cuda")
        index = torch.empty(3, dtype=torch.int64, device="cuda")
        with HostTensors() as host:
            sparse, dense = encode_prompts(model.prompt_encoder, *given, None)
            logits, scores = decode(model, images[index], sparse, dense, ALL_MASKS)
    assert logits.requires_grad
    assert scores.requires_grad
    assert host.operations == []
