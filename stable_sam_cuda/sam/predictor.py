"""Masks from prompts on one picture: SamPredictor's interface, for plain and stabilised models of any dtype."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.data.picture import read_picture, to_rgb
from stable_sam_cuda.notes import note
from stable_sam_cuda.sam.prompt import Prompt, check_prompt, check_prompt_tensors
from stable_sam_cuda.sam.prompt_encoding import encode_prompts
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK, THREE_MASKS, decode

PROMPT_KEYS = ("point_coords", "point_labels", "box", "mask_input")
# Memory of a GPU for masks on their way to the host, which a batch of prompts shares: 20 prompts of a megapixel.
UPSCALING_BYTES = 512 << 20
Prediction = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


class StableSamPredictor(SamPredictor):
    """`segment_anything.SamPredictor` that checks its input, takes ragged batches and works in half precision.

    Prompts are encoded and masks upscaled in float32 whatever the model's dtype; scores and logits come back as
    float32. `get_image_embedding` and `reset_image` are SamPredictor's.

    Args:
        sam_model: a SAM, stabilised or not.
    """

    def __init__(self, sam_model: Sam) -> None:
        if not isinstance(sam_model, Sam):
            raise TypeError(f"sam_model: expected a segment_anything Sam model, got {type(sam_model).__name__}")
        super().__init__(sam_model)

    def set_image(
        self, image: NDArray[np.uint8] | Image.Image | str | PathLike[str], image_format: str = "RGB"
    ) -> None:
        """Encode a picture, for which `predict` then gives masks.

        Args:
            image: (H, W, 3), uint8; or a Pillow image of any mode, as its pixels lie; or a picture file, read by the
                rule of `stable_sam_cuda.data.picture`: prompts are then in pixels of the picture turned by its EXIF.
            image_format: order of an array's channels, ``"RGB"`` or ``"BGR"``.

        Raises:
            TypeError, ValueError: the picture is of another type or shape, or the file is damaged.
            OSError: there is no such file, or it cannot be read.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format: expected 'RGB' or 'BGR', got {image_format!r}")
        if image_format == "BGR" and not isinstance(image, np.ndarray):
            raise ValueError(f"image_format: expected 'BGR' with an array, got it with {type(image).__name__}")
        self.reset_image()  # a picture that is refused leaves none, and no masks of the one before
        super().set_image(self.pixels_of(image), image_format)

    def pixels_of(self, image: NDArray[np.uint8] | Image.Image | str | PathLike[str]) -> NDArray[np.uint8]:
        """The pixels (H, W, 3), uint8, of what `set_image` takes; it raises as that does."""
        if isinstance(image, (str, PathLike)):
            pixels = np.asarray(read_picture(Path(image)))
        elif isinstance(image, Image.Image):
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                note("a Pillow image is taken as its pixels lie; the turn that its EXIF asks for is not made", "image")
            pixels = np.asarray(to_rgb(Path("image"), image))
        else:
            pixels = image
        self._check_pixels(pixels)
        return pixels

    def _check_pixels(self, image: NDArray[np.uint8]) -> None:
        if not isinstance(image, np.ndarray):
            raise TypeError(
                "image: expected a numpy array (H, W, 3) of uint8, a Pillow image or a picture file, "
                f"got {type(image).__name__}"
            )
        if image.ndim != 3 or image.shape[2] != 3:
            advice = " (convert grey or RGBA pictures to RGB)" if image.ndim == 2 or image.shape[-1] in (1, 4) else ""
            raise ValueError(f"image: expected shape (H, W, 3), got {image.shape}{advice}")
        if image.dtype != np.uint8:
            raise TypeError(f"image: expected uint8 values from 0 to 255, got {image.dtype}")
        if min(image.shape[:2]) == 0 or min(self.transform.get_preprocess_shape(*image.shape[:2], self._side())) == 0:
            raise ValueError(f"image: expected a picture that keeps a pixel at {self._side()} px, got {image.shape}")

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Encode a picture (1, 3, H, W) of values 0 to 255, already resized by ``transform``.

        Args:
            original_image_size: (H, W) before that.
        """
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != self._side():
            raise ValueError(f"transformed_image: expected (1, 3, H, W) of longer side {self._side()}, got {shape}")
        self.reset_image()
        height, width = original_image_size
        self.original_size = (height, width)
        self.input_size = shape[2:]
        pixels = self.model.preprocess(transformed_image.to(self.device, torch.float32))
        self.features = self.model.image_encoder(pixels.to(_dtype(self.model.image_encoder)))
        self.is_image_set = True

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Masks for one prompt, in pixels of the original picture.

        Args:
            point_coords: (N, 2), x and y.
            point_labels: (N,), 1 foreground, 0 background.
            box: (4,), x0, y0, x1, y1; clipped to the picture, with which it must overlap.
            mask_input: (1, h, w), the logits of an earlier prediction.
            multimask_output: three masks of different extent, or one.
            return_logits: mask logits in place of booleans.

        Returns:
            masks (M, H, W), bool or float32; predicted IoU (M,), float32; low-resolution logits (M, h, w), float32.

        Raises:
            RuntimeError: no picture is set.
            TypeError, ValueError: as `check_prompt`.
        """
        prompt = dict(zip(PROMPT_KEYS, (point_coords, point_labels, box, mask_input), strict=True))
        return self._predict([self._check(prompt)], multimask_output, return_logits)[0]

    def predict_batch(
        self,
        prompts: Sequence[Mapping[str, ArrayLike | None]],
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        batch_size: int = 16,
    ) -> list[Prediction]:
        """Masks for many prompts of any kinds on the one picture, as `predict` would give them one by one.

        Prompts of one kind (as many points, box or not, mask or not) are decoded together: SAM has no padding that
        leaves the result unchanged.

        Args:
            prompts: each with some of the keys point_coords, point_labels, box and mask_input, as in `predict`.
            batch_size: most prompts decoded at a time, which bounds the memory. The results of such a batch share
                one array each for masks, scores and logits.

        Returns:
            One tuple a prompt, in the order of ``prompts``.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not isinstance(prompts, Iterable) or isinstance(prompts, (str, Mapping)):
            raise TypeError(f"prompts: expected a sequence of mappings, got {type(prompts).__name__}")
        checked: list[Prompt] = []
        for index, prompt in enumerate(prompts):
            try:
                checked.append(self._check(prompt))
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompts[{index}]: {error}") from error
        groups: dict[tuple[int, bool, bool], list[int]] = {}
        for index, one in enumerate(checked):
            groups.setdefault(one.kind, []).append(index)
        predictions: dict[int, Prediction] = {}
        for indices in groups.values():
            for start in range(0, len(indices), batch_size):
                chunk = indices[start : start + batch_size]
                results = self._predict([checked[index] for index in chunk], multimask_output, return_logits)
                predictions.update(zip(chunk, results, strict=True))
        return [predictions[index] for index in range(len(checked))]

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for a batch of prompts of one kind, already in the frame of the resized picture.

        On a CUDA device the host waits for nothing. So values are checked of tensors on the CPU alone: of a prompt on
        the device that has NaN, infinity or an unknown label, scores and logits are NaN and the masks empty.

        A CUDA graph can hold the call, once one before it has loaded what there is to load. It replays with what its
        input tensors hold then, on the picture's ``features`` of its capture: capture anew after `set_image`.

        Args:
            point_coords: (B, N, 2). point_labels: (B, N), 1, 0, or -1 for SAM's padding point.
            boxes: (B, 4). mask_input: (B, 1, h, w). B may be 0: no prompt gives no mask.

        Returns:
            masks (B, M, H, W), bool or float32; predicted IoU (B, M), float32; low-resolution logits (B, M, h, w),
            float32.

        Raises:
            RuntimeError: no picture is set.
            ValueError: no prompt, a wrong shape; in a tensor on the CPU NaN, infinity or an unknown label.
        """
        self._require_image()
        mask_size = self.model.prompt_encoder.mask_input_size
        check_prompt_tensors(point_coords, point_labels, boxes, mask_input, mask_size=mask_size)
        logits, scores = self._decode(point_coords, point_labels, boxes, mask_input, multimask_output)
        return self._upscale(logits, return_logits), scores, logits

    @torch.no_grad()
    def _predict(self, prompts: list[Prompt], multimask_output: bool, return_logits: bool) -> list[Prediction]:
        """Predictions for checked prompts of one kind."""
        points, boxes = _stacked([prompt.points for prompt in prompts]), _stacked([prompt.box for prompt in prompts])
        labels, masks = _stacked([prompt.labels for prompt in prompts]), _stacked([prompt.mask for prompt in prompts])
        logits, scores = self._decode(
            None if points is None else torch.as_tensor(self.transform.apply_coords(points, self.original_size)),
            None if labels is None else torch.as_tensor(labels),
            None if boxes is None else torch.as_tensor(self.transform.apply_boxes(boxes, self.original_size)),
            None if masks is None else torch.as_tensor(masks),
            multimask_output,
        )
        upscaled = self._upscale_to_host(logits, return_logits)
        return list(zip(upscaled.numpy(), scores.cpu().numpy(), logits.cpu().numpy(), strict=True))

    def _decode(
        self,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (B, M, h, w) and predicted IoU (B, M), both float32."""
        sparse, dense = encode_prompts(
            self.model.prompt_encoder,
            points=self._on_device(points, torch.float32),
            labels=self._on_device(labels),
            boxes=self._on_device(boxes, torch.float32),
            masks=self._on_device(masks, torch.float32),
        )
        logits, scores = decode(
            self.model, self.features, sparse, dense, THREE_MASKS if multimask_output else SINGLE_MASK
        )
        return logits.float(), scores.float()

    def _on_device(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if tensor is None:
            return None
        # The host need not wait for a copy of ordinary memory, which is read before the call returns. Pinned memory is
        # read later, when its owner may have written something else into it.
        to_gpu = tensor.device.type == "cpu" and self.device.type == "cuda"
        return tensor.to(self.device, dtype or tensor.dtype, non_blocking=to_gpu and not tensor.is_pinned())

    def _upscale_to_host(self, logits: Tensor, return_logits: bool) -> Tensor:
        """`_upscale` on the CPU, of as many prompts at a time as a GPU has memory for."""
        shape = (*logits.shape[:2], *self.original_size)
        masks = torch.empty(shape, dtype=torch.float32 if return_logits else torch.bool)
        at_a_time = self._prompts_at_a_time(logits.shape[1])
        for some, place in zip(logits.split(at_a_time), masks.split(at_a_time), strict=True):
            place.copy_(self._upscale(some, return_logits))
        return masks

    def _prompts_at_a_time(self, masks: int) -> int:
        """How many prompts of so many masks are upscaled together: on a CPU, which has no copies to save, one."""
        if self.device.type == "cpu":
            return 1
        height, width = self.original_size
        # Logits of SAM's input size and of the picture's, and what is above the threshold.
        return max(1, UPSCALING_BYTES // (masks * (4 * self._side() ** 2 + 5 * height * width)))

    def _upscale(self, logits: Tensor, return_logits: bool) -> Tensor:
        masks = self.model.postprocess_masks(logits, self.input_size, self.original_size)
        return masks if return_logits else masks > self.model.mask_threshold

    def _check(self, prompt: Mapping[str, ArrayLike | None]) -> Prompt:
        self._require_image()
        if not isinstance(prompt, Mapping):
            raise TypeError(f"prompt: expected a mapping of {', '.join(PROMPT_KEYS)}, got {type(prompt).__name__}")
        if unknown := sorted(map(str, set(prompt) - set(PROMPT_KEYS))):
            raise ValueError(f"prompt: expected the keys {', '.join(PROMPT_KEYS)}, got {', '.join(unknown)}")
        arguments = (prompt.get(key) for key in PROMPT_KEYS)
        mask_size = self.model.prompt_encoder.mask_input_size
        return check_prompt(*arguments, image_size=self.original_size, mask_size=mask_size)

    def _require_image(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("no picture is set: call set_image before asking for masks")

    def _side(self) -> int:
        return self.model.image_encoder.img_size


def _stacked(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Arrays of prompts of one kind, which all have this one or all have not."""
    given = [array for array in arrays if array is not None]
    return np.stack(given) if given else None


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
