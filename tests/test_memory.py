"""No N x N map is stored, and matching works in slices: the largest tensor at N = 4097 is watched."""

import weakref

import pytest
import torch
from cases import COMPANION, EVERY
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import tokenzoo


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operation makes, and the bytes of those that are held at once, at most."""

    def __init__(self):
        super().__init__()
        self.elements, self.held, self.most, self.holders = 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.elements = max(self.elements, storage.nbytes() // value.element_size())
                self._hold(value, storage.data_ptr(), storage.nbytes())
        return out

    def _hold(self, value, at, size):
        """A view holds all that it is a part of."""
        if at not in self.holders:
            self.holders[at] = 0
            self.held += size
            self.most = max(self.most, self.held)
        self.holders[at] += 1
        weakref.finalize(value, self._drop, at, size)

    def _drop(self, at, size):
        self.holders[at] -= 1
        if self.holders[at] == 0:
            del self.holders[at]
            self.held -= size


# defined by weights of all pairs, and they say so
PAIRS = {"dct", "dpcknn", "kmedoids", "patchmerger", "sinkhorn", "sit", "soft_transform", "sparsifiner"}
OWN_MAPS = {"sparsifiner": 2}  # in each of as many heads
SMALL = {
    "ats": {"layers": (0, 1)},
    "mctf": {"r": 1000, "layers": (0, 1)},
    "evo": {"layers": (1,)},
    "kmedoids": {"layers": (1,)},
    "pool": {"layers": (0,)},
    "cluster": {"layers": 0},
    "cts": {},
    "reconstruct": {"layers": "norm"},
    "tome": {"r": 1000},
}


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("method", [name for name in EVERY if name != "atc"])  # a round of merging per patch
@torch.no_grad()
def test_largest_tensor(method, class_token):
    torch.manual_seed(0)
    options = dict(img_size=128, patch_size=2, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=0)
    model = VisionTransformer(class_token=class_token, global_pool="token" if class_token else "avg", **options).eval()
    x = torch.randn(1, 3, 128, 128)
    n = 4096 + class_token
    if method == "ats" and not class_token:
        pytest.raises(ValueError, tokenzoo.patch_model, model, method)
        return
    options = {"method": method, **SMALL.get(method, {"layers": (0, 1)})}
    tokenzoo.patch_model(model, [{"method": "cluster", "layers": 0}, options] if method in COMPANION else options)
    with Largest() as seen:
        model(x)
    assert n * 32 <= seen.elements, "the watch saw nothing"
    # slices of scores hold at most a quarter of one N x N map; some methods are defined by one
    most = n * n * OWN_MAPS.get(method, 1) if method in PAIRS else n * n / 4
    assert seen.elements <= most, f"{method} stored {seen.elements} elements, N x N are {n * n}"
    # and so do all that live at once, in units of such a map: matrices of pairs have a few copies
    held = seen.most / 4 / n / n / OWN_MAPS.get(method, 1)
    assert held <= (3.5 if method in PAIRS else 1.5 if method == "reconstruct" else 0.3), f"{method} held {held:.2f}"
    assert method not in PAIRS or "all pairs" in " ".join(tokenzoo.method_class(method).__doc__.lower().split())
