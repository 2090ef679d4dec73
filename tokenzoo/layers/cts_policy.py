"""CTS's policy network: which groups of 2 x 2 patches hold one class only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NETWORK = "efficientnet_lite0"
_STRIDE = 32


class PolicyNetwork(nn.Module):
    """Small convolutional network that scores every group; names of weights are the published ones (`policy_net.*`).

    Its features have stride 32, the size of a group at patch size 16. At other patch sizes it looks at the image
    resized so that one feature is one group.

    Source: Lu, de Geus, Dubbelman, CVPR 2023.
    """

    def __init__(self) -> None:
        super().__init__()
        backbone = timm.create_model(_NETWORK, features_only=True, out_indices=(4,))
        head = nn.Conv2d(backbone.feature_info.channels()[-1], 2, 1)
        self.policy_net = nn.ModuleDict({"backbone": backbone, "head": head})

    def forward(self, images: Tensor, groups: tuple[int, int]) -> Tensor:
        """Logits of "several classes" and "one class" for each group [B, 2, down, right].

        Args:
            images: [B, 3, H, W] in [-1, 1].
            groups: groups (down, right).
        """
        size = (groups[0] * _STRIDE, groups[1] * _STRIDE)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return self.policy_net["head"](self.policy_net["backbone"](images)[-1])


def load_policy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads published weights into the policy network of a model patched with cts.

    Args:
        model: a model patched with `cts`, score="policy".
        state: weights under `policy_net.`; others (a whole segmenter's) are left out.

    Raises:
        ValueError: no policy network in the model, or weights that are missing, unknown or of another shape.
    """
    found = [module for module in model.modules() if isinstance(module, PolicyNetwork)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} policy networks; patch it with one cts, score='policy', first"
        )
    own = {key: value for key, value in state.items() if key.startswith("policy_net.")}
    wanted = found[0].state_dict()
    missing, unknown = sorted(set(wanted) - set(own)), sorted(set(own) - set(wanted))
    wrong = sorted(key for key in set(own) & set(wanted) if own[key].shape != wanted[key].shape)
    for what, keys in (("are missing", missing), ("are unknown", unknown), ("have another shape", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"policy weights {', '.join(keys[:3])}{more} {what}; expected {_NETWORK} and a 1x1 head")
    found[0].load_state_dict(own)


@lru_cache(maxsize=1)
def macs_per_group() -> int:
    """Multiply-adds of the network for one group, counted from its layers' shapes."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * out[0, 0].numel()

    with torch.device("meta"), torch.no_grad():
        network = PolicyNetwork().eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        network(torch.zeros(1, 3, _STRIDE, _STRIDE), (1, 1))
    return total
