"""Reads recorded numbers: files, cases and settings are enumerated, never listed.

Folder: TOKENZOO_GOLDENS, default tests/golden. A test names the kind of case it reads; `cases` finds them and notes
that they are read, so that `test_goldens.py` can tell which are not.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(os.environ.get("TOKENZOO_GOLDENS", Path(__file__).parent / "golden"))
LANDED = (
    "tome", "evit", "ats", "mctf", "algm", "tomesd", "cts", "expedit", "expedit_sam", "dense_unmerge",
    "segmentation_eval", "super_token_attention", "t2t_vit", "lv_vit", "dtop",
    "plain_mamba", "vision_mamba", "uniformer_light", "r_meeto", "famba_v", "ssm_token_pruning",
)  # fmt: skip
LEFT_OUT = {"ats/tokenreduction_variant"}  # another method under the same name
READ: set[tuple[str, str]] = set()
_SHARED = ("weights", "input", "output", "distilled_extra_weights")


@cache
def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, given without suffix below the folder."""
    with safe_open(str(ROOT / f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def files(method: str) -> list[str]:
    """Files of a method's folder, without suffix."""
    found = sorted(f"{method}/{path.stem}" for path in (ROOT / method).glob("*.safetensors"))
    return [name for name in found if name not in LEFT_OUT]


def case_names(file: str) -> list[str]:
    """Cases of a file: first parts of the keys, or the keys themselves where they have one part."""
    return sorted({key.split("/")[0] for key in read(file)[0]} - set(_SHARED))


class Case(NamedTuple):
    """One recorded case."""

    file: str
    name: str

    def __getitem__(self, key: str) -> Tensor:  # type: ignore[override]
        return read(self.file)[0][f"{self.name}/{key}"]

    def has(self, key: str) -> bool:
        return any(k == f"{self.name}/{key}" or k.startswith(f"{self.name}/{key}/") for k in read(self.file)[0])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the case from the metadata: under its own name, or in the file's table of all cases."""
        meta = read(self.file)[1]
        if self.name in meta:
            return settings(meta[self.name])
        return settings(meta.get("settings", "{}")).get(self.name, {})

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of the case below a prefix, the prefix cut off."""
        start = f"{self.name}/{prefix}/"
        return {k[len(start) :]: v for k, v in read(self.file)[0].items() if k.startswith(start)}

    def matching(self, pattern: str) -> dict[str, Tensor]:
        """Tensors of the case whose name matches a regular expression."""
        start = f"{self.name}/"
        found = {k[len(start) :]: v for k, v in read(self.file)[0].items() if k.startswith(start)}
        return {k: v for k, v in found.items() if re.fullmatch(pattern, k)}

    def fixture(self) -> str:
        """The fixture that weights and input come from."""
        named = re.match(r"(\w+)", read(self.file)[1].get("weights", "vit_micro.safetensors"))
        return named.group(1)

    def input(self, batch: int) -> Tensor:
        """The images of the case."""
        own = read(self.file)[0]
        for key in (f"{self.name}/input", "input"):
            if key in own:
                return own[key][:batch]
        folder = self.file.split("/")[0]
        if (ROOT / folder / "input.safetensors").is_file():
            return read(f"{folder}/input")[0]["input"][:batch]
        return read(self.fixture())[0]["input"][:batch]


def settings(text: str) -> dict[str, Any]:
    """JSON, Python literals, or pairs like "B=2 cell=(4,4)"; "tuple(8, -1.0)" becomes a tuple."""

    def tuples(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("tuple("):
            return ast.literal_eval(value[5:])
        return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value

    if re.match(r"\w+=", text):
        return {key: ast.literal_eval(value) for key, value in re.findall(r"(\w+)=(\([^)]*\)|\S+)", text)}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = ast.literal_eval(text)
    return tuples(value)


def cases(method: str, stem: str, kind: Callable[[Case], bool] = lambda case: True) -> Any:
    """A parametrize mark over all cases of the files whose stem matches a pattern and that are of a kind."""
    found = []
    for file in files(method):
        if not re.fullmatch(stem, file.split("/")[1]):
            continue
        for name in case_names(file):
            case = Case(file, name)
            if kind(case):
                READ.add((file, name))
                found.append(pytest.param(case, id=f"{file}/{name}", marks=pytest.mark.golden))
    return pytest.mark.parametrize("case", found)


def check_settings(given: dict[str, Any], *known: str) -> None:
    """Fails on a setting that the test does not know."""
    extra = set(given) - set(known)
    assert not extra, f"the metadata holds settings that this test does not understand: {sorted(extra)}"


def fixture_model(fixture: str, **changes: Any) -> torch.nn.Module:
    """The timm model that a fixture's weights belong to, sizes read off the weights."""
    tensors, meta = read(fixture)
    weights = {k[len("weights/") :]: v for k, v in tensors.items() if k.startswith("weights/")}
    heads = int(re.search(r"heads (\d+)", meta["what"]).group(1))
    kernel = weights["patch_embed.proj.weight"]
    options = {
        "img_size": tensors["input"].shape[-1],
        "patch_size": kernel.shape[-1],
        "embed_dim": kernel.shape[0],
        "depth": 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
        "num_heads": heads,
        "num_classes": weights["head.weight"].shape[0],
        "class_token": "cls_token" in weights,
        "global_pool": "token" if "cls_token" in weights else "avg",
    }
    model = timm.models.vision_transformer.VisionTransformer(**{**options, **changes})
    renamed = weights
    if changes.get("global_pool") == "avg" and "norm.weight" in weights:  # the MAE variant: fc_norm takes these weights
        renamed = {re.sub(r"^norm\.", "fc_norm.", k): v for k, v in weights.items()}
    model.load_state_dict(renamed)
    return model.eval()


def micro_decoder(kind: str) -> torch.nn.Module:
    """The recorded decoder of the small segmenter, "mask" or "linear"."""
    from tokenzoo.dense import LinearHead, MaskTransformer

    start, tensors = f"{kind}/decoder.", read("segmentation_eval/segmenter_micro")[0]
    weights = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    if kind == "linear":
        decoder = LinearHead(weights["head.weight"].shape[1], weights["head.weight"].shape[0])
    else:
        _, classes, width = weights["cls_emb"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        decoder = MaskTransformer(width, classes, depth=depth, num_heads=1, mlp_dim=hidden)
    decoder.load_state_dict(weights)
    return decoder.eval()


def decode_reduced(model: torch.nn.Module, decoder: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class maps [B, K, h, w] and labels [B, H, W] of a decoder that runs on the reduced tokens of a model."""
    from tokenzoo.dense import encode

    with torch.no_grad():
        encoded = encode(model, x)
        scores = decoder(encoded.x[:, encoded.num_prefix :])
        prefix = scores.new_zeros(len(x), encoded.num_prefix, scores.shape[2])
        maps = encoded.restore(torch.cat([prefix, scores], dim=1)).transpose(1, 2).unflatten(2, encoded.grid)
        full = torch.nn.functional.interpolate(maps, x.shape[-2:], mode="bilinear", align_corners=False)
    return maps, full.argmax(1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    """Asserts equality within a tolerance, shapes included."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def small_block(weights: dict[str, Tensor], heads: int, method: Any, layout: Any, strength: Any) -> torch.nn.Module:
    """A reducing timm block with LayerNorm eps 1e-5 from recorded weights, with one step."""
    from functools import partial

    from timm.models.vision_transformer import Block

    from tokenzoo.adapters.block import BlockPlan
    from tokenzoo.adapters.vit import ReducingVitBlock
    from tokenzoo.adapters.vit_attention import ReducingAttention
    from tokenzoo.methods.base import Step

    dim = weights["norm1.weight"].shape[0]
    ratio = weights["mlp.fc1.weight"].shape[0] / dim
    block = Block(dim, heads, ratio, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    block.load_state_dict(weights)
    block.__class__ = ReducingVitBlock
    block.attn.__class__ = ReducingAttention
    steps = () if strength is None else (Step(method, 0, strength),)
    block.tokenzoo = BlockPlan(0, 1, steps, method.proportional, layout)
    return block.eval()
