"""A family of vision-language models: where its parts are, and how rows get from the tower to the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.registry import meet

_FAMILIES: dict[str, VLMFamily] = {}


class VLMFamily:
    """One family; a subclass says what differs, and is registered as an object by `register_vlm_family`.

    Attributes:
        name: short name.
        summary: what it covers, for tables.
        tried: versions of the package that it was tried on.
        heads: exact class of the outermost model -> reducing class.
        models: exact class of the multimodal model inside it (`model.model`) -> reducing class.
        tower: path of the vision tower inside the multimodal model.
        projector: path of the module that turns what the tower gives into rows, None where the tower does so itself.
        one_to_one: whether the projector makes one row of each patch.
        modalities: of "image", "video".
        tiles: whether each crop counts as an image of its own, since nothing says which make one.
        builds_masks: whether the multimodal model makes masks of four dimensions for its language model.
        position_axes: 1, or 3 for rotary positions by frame, row and column, which cannot be renumbered.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    tried: ClassVar[str] = "transformers 5.18, 5.24"
    heads: Mapping[type, type] = {}
    models: Mapping[type, type] = {}
    tower: ClassVar[str] = "vision_tower"
    projector: ClassVar[str | None] = "multi_modal_projector"
    one_to_one: ClassVar[bool] = True
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    tiles: ClassVar[bool] = False
    builds_masks: ClassVar[bool] = False
    position_axes: ClassVar[int] = 1

    # ---- where the parts are

    def inner(self, model: nn.Module) -> nn.Module:
        """The multimodal model without its head."""
        return model.model

    def language_model(self, inner: nn.Module) -> nn.Module:
        """The language model inside the multimodal one."""
        return inner.language_model

    def vision_tower(self, inner: nn.Module) -> nn.Module:
        """The tower inside the multimodal model."""
        return inner.get_submodule(self.tower)

    def tower_layers(self, inner: nn.Module) -> Sequence[nn.Module]:
        """The layers of the tower."""
        return self.vision_tower(inner).encoder.layers

    def has_class(self, inner: nn.Module) -> bool:
        """Whether the tower has a class token."""
        return True

    def feature_layer(self, inner: nn.Module) -> int:
        """The layer of the tower whose output is handed on (layer -2 of papers on towers whose last one is unused)."""
        depth, wanted = len(self.tower_layers(inner)), getattr(inner.config, "vision_feature_layer", -1)
        layers = [wanted] if isinstance(wanted, int) else list(wanted)
        return max(depth + layer if layer < 0 else layer - 1 for layer in layers)

    def placeholders(self, config: Any) -> list[int]:
        """Ids of the tokens that stand for rows of images and videos."""
        names = ("image_token_id", "video_token_id")
        return [i for i in (getattr(config, name, None) for name in names) if i is not None]

    def token_of(self, config: Any, modality: str) -> int:
        """Id of the placeholder of "image" or "video"."""
        return getattr(config, f"{modality}_token_id")

    def deep_layers(self, inner: nn.Module) -> int:
        """First layers of the language model behind which features of images are added once more (deepstack)."""
        return 0

    # ---- how rows come about

    def features(self, out: Any) -> Any:
        """The rows of the images in what `get_image_features` gives: a list of [n, D], or a tensor [B, n, D]."""
        return out.pooler_output

    def put(self, out: Any, rows: list[Tensor], tensor: bool) -> None:
        """Puts rows back where `features` found them.

        Args:
            out: what `get_image_features` gives.
            rows: of each image [n, D].
            tensor: whether they stood in one tensor.
        """
        out.pooler_output = torch.stack(rows) if tensor else rows

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        """Values of the tower's tokens at the rows that the language model would see, by the family's own packing.

        Args:
            inner: the multimodal model.
            modality: "image" or "video".
            values: [crops, tokens, C] float32, without prefix tokens; packed towers [1, all tokens, C].
            given: what `get_image_features` was given.

        Returns:
            Of every image or video [n, C]; plus infinity in rows that always stay (new lines).
        """
        return list(values)

    def places(
        self, inner: nn.Module, modality: str, seen: dict[Any, Any], given: dict[str, Any]
    ) -> list[Tensor]:
        """(crop, row, column) of every row of every image [n, 3] float32 on the host, infinity for rows that stay.

        Args:
            inner: the multimodal model.
            modality: "image" or "video".
            seen: inputs of layers of the tower, the first one among them.
            given: what `get_image_features` was given.
        """
        _, args, options = seen[0]
        x = self.tower_tokens(inner, args[0] if args else options["hidden_states"])
        crops, n = x.shape[:2]
        high, wide = self.tower_grid(inner, n, given)
        index = torch.arange(n)
        own = torch.stack([index.div(wide, rounding_mode="floor"), index % wide], 1).float()
        crop = torch.arange(crops).float().view(-1, 1, 1).expand(-1, n, -1)
        values = torch.cat([crop, own.expand(crops, -1, -1)], 2)
        return [each.cpu() for each in self.carry(inner, modality, values.to(x.device), given)]

    def tower_grid(self, inner: nn.Module, n: int, given: dict[str, Any]) -> tuple[int, int]:
        """Patches (high, wide) of a crop with n of them."""
        side = round(n**0.5)
        return (side, side) if side * side == n else (1, n)

    def row_features(
        self, inner: nn.Module, modality: str, seen: dict[Any, Any], given: dict[str, Any]
    ) -> list[Tensor] | None:
        """What the projector was given, at the rows of each image [n, C]; None where that is not known."""
        if "projector" not in seen:
            return None
        x = seen["projector"][1][0]
        return self.carry(inner, modality, x if x.dim() == 3 else x.unsqueeze(0), given)

    def class_tokens(self, inner: nn.Module, seen: dict[Any, Any]) -> Tensor | None:
        """What the tower hands on for the class token [crops, 1, C]; None where it has none, or runs no further."""
        after = self.feature_layer(inner) + 1
        several = not isinstance(getattr(inner.config, "vision_feature_layer", -1), int)
        if not self.has_class(inner) or after not in seen or several:
            return None
        _, args, options = seen[after]
        return (args[0] if args else options["hidden_states"])[:, :1]

    def tower_tokens(self, inner: nn.Module, x: Tensor) -> Tensor:
        """Tokens of a tower's layer without the class token and registers: [crops, N, C] -> [crops, n, C]."""
        return x[:, 1:] if self.has_class(inner) else x

    def project(self, inner: nn.Module, x: Tensor) -> Tensor:
        """Rows that the language model sees, of what the tower gives, one each: [B, K, C] -> [B, K, D]."""
        return inner.get_submodule(self.projector)(x)

    # ---- what is counted and refused

    def image_rows(self, inner: nn.Module) -> int | None:
        """Rows of one image at the tower's own size, for reports; None where towers take images of any size."""
        raise NotImplementedError(f"{type(self).__name__} counts no rows: define image_rows(inner)")

    def fixed_rows(self, inner: nn.Module) -> int | None:
        """Rows of every image, where all have the same number; None where they differ."""
        return self.image_rows(inner)

    def crops(self, inner: nn.Module, rows: Sequence[int]) -> int:
        """Passes of the tower that images with so many rows take, for reports."""
        return len(rows)

    def tower_width(self, inner: nn.Module) -> int:
        """Heads times their width of the tower's attention, for reports."""
        return inner.config.vision_config.hidden_size

    def check(self, model: nn.Module) -> None:
        """Refuses settings of a model that cannot be served."""


def register_vlm_family(family: VLMFamily) -> VLMFamily:
    """Adds a family of vision-language models.

    Raises:
        ValueError: its name is taken, or another family serves one of its classes.
    """
    taken = _FAMILIES.get(family.name)
    if taken is not None and taken is not family:
        raise ValueError(f"family name {family.name!r} is taken; give another one")
    for other in _FAMILIES.values():
        both = set(other.heads) & set(family.heads)
        if other is not family and both:
            raise ValueError(f"{', '.join(c.__name__ for c in both)} is served by the family {other.name!r} already")
    _FAMILIES[family.name] = family
    return family


def vlm_families() -> tuple[VLMFamily, ...]:
    """All families in the order in which they were registered."""
    return tuple(_FAMILIES.values())


def vlm_family_of(model: nn.Module) -> VLMFamily | None:
    """The family that serves a model's exact class, patched or not; None where none does."""
    cls = type(model)
    meet(cls)  # families of a package are registered when a model of it is met
    return next((f for f in vlm_families() if cls in f.heads or cls in f.heads.values()), None)
