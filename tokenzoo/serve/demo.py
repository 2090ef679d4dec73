"""The demo's model, which needs no network: a small ViT that tells which of twelve photographs an image shows."""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

CHECKPOINT = Path(__file__).with_name("demo_vit.safetensors")  # its card: examples/photos_vit.md
SIDE = 96  # of the input that it was trained on, pixels
ARCHITECTURE = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 8, "num_heads": 2, "mlp_ratio": 4}
CLASSES = (
    "china", "flower", "astronaut", "chelsea", "coffee", "rocket", "camera", "hubble", "coins", "brick", "grass",
    "gravel",
)  # fmt: skip


def load_demo(side: int = SIDE, path: Path = CHECKPOINT) -> VisionTransformer:
    """The model in float32 and eval mode.

    Args:
        side: of its input, a multiple of 8 pixels; positions are resampled for another than 96.
        path: its weights.
    """
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    model = VisionTransformer(**{**ARCHITECTURE, "img_size": side}, num_classes=len(CLASSES))
    weights = {name: value.float() for name, value in load_file(path).items() if not name.startswith("decoder.")}
    state = {name.removeprefix("encoder."): value for name, value in weights.items()}
    if side != SIDE:
        patch = ARCHITECTURE["patch_size"]
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side // patch] * 2, [SIDE // patch] * 2)
    model.load_state_dict(state)
    return model.eval()
