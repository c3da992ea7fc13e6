"""Which base model a SAM is."""

from segment_anything.modeling import ImageEncoderViT, Sam

from stable_sam_cuda.sam.lite import LiteImageEncoder

# (width, depth) of the image encoder -> name.
VIT_NAMES = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
BASE_MODELS = (*VIT_NAMES.values(), "sam_lite")


def base_model_name(sam: Sam) -> str | None:
    """The name by which `load_sam` builds such a model, None where it is none of them."""
    encoder = sam.image_encoder
    if isinstance(encoder, LiteImageEncoder):
        return "sam_lite"
    if isinstance(encoder, ImageEncoderViT):
        return VIT_NAMES.get((encoder.patch_embed.proj.out_channels, len(encoder.blocks)))
    return None
