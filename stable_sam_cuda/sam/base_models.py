"""Which base model a SAM is, and what is known of it by its name."""

from segment_anything.modeling import ImageEncoderViT, Sam

from stable_sam_cuda.sam.lite import LiteImageEncoder

# (width, depth) of the image encoder -> name.
VIT_NAMES = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
BASE_MODELS = (*VIT_NAMES.values(), "sam_lite")

# Least predicted IoU and stability of a mask that was not asked for: SAM's own, chosen for ViT-H. sam_lite, a small
# model, is less sure of its masks.
SAM_THRESHOLDS = (0.88, 0.95)
MASK_THRESHOLDS = {"sam_lite": (0.5, 0.6)}


def base_model_name(sam: Sam) -> str | None:
    """The name by which `load_sam` builds such a model, None where it is none of them."""
    encoder = sam.image_encoder
    if isinstance(encoder, LiteImageEncoder):
        return "sam_lite"
    if isinstance(encoder, ImageEncoderViT):
        return VIT_NAMES.get((encoder.patch_embed.proj.out_channels, len(encoder.blocks)))
    return None


def mask_thresholds(sam: Sam) -> tuple[float, float]:
    """Least predicted IoU and least stability, 0 to 1, of the masks that a generator of all masks keeps."""
    return MASK_THRESHOLDS.get(base_model_name(sam) or "", SAM_THRESHOLDS)
