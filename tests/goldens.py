"""Reads recorded numbers: files, cases and settings are enumerated, never listed.

Folder: TOKENZOO_GOLDENS, default tests/golden. A test names the kind of case it reads, by the keys and settings of the
case and not by its file; `cases` finds them and notes that they are read, so that `test_goldens.py` can tell which are
not.

What a case needs is found by rules, first match wins (m is the first part of a name `m/case`):

- names: everything in front of the last named piece; of two parts where the metadata says so, or where the first is a
  fixture, "op" or "model"; of more where the metadata says so.
- input: `<case>/input`, `<m>/input`, `input` of the file, of the folder's `input.safetensors`, of the fixture; as many
  images as were recorded from the front, or the slice that the metadata name (`input[2:4]`).
- weights: `<m>/weights/*`, `weights/*` of the file, the fixture that the metadata name (a path below the folder;
  `vit_micro` without one); `<case>/weights/*` and a position embedding of the case come on top.
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
    "plain_mamba", "vision_mamba", "uniformer_light", "r_meeto", "famba_v", "ssm_token_pruning", "pitome", "ppt",
    "gtp", "diffrate", "dynamicvit", "sit",
    "sparsifiner", "catanet_aggregation", "stvit_semantic", "ph_reg", "tap_adl",
)  # fmt: skip
# folders with cases of several methods, not all of which are in the library
PARTLY = ("tokenreduction_zoo", "vlm")
READ: set[tuple[str, str]] = set()
MODEL = "output"  # the case of a file that records a model of its own: `weights/*`, `input`, `output/*`
_SHARED = ("weights", "input", "distilled_extra_weights")
_DESCRIBES = ("what", "note", "source", "repo", "method", "keys", "layout", "timm", "settings", "params")
_SLICE = r"input\s*\[\s*(\d*)\s*:\s*(\d*)\s*\]"
_PATH = r"([\w.-]+(?:/[\w.-]+)*)\.safetensors"


@cache
def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, given without suffix below the folder."""
    with safe_open(str(ROOT / f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def below(file: str, start: str) -> dict[str, Tensor]:
    """Tensors of a file whose keys begin so, the beginning cut off."""
    return {key[len(start) :]: value for key, value in read(file)[0].items() if key.startswith(start)}


def is_fixture(name: str) -> bool:
    """Whether there is such a file below the folder."""
    return (ROOT / f"{name}.safetensors").is_file()


def all_files(method: str) -> list[str]:
    """Files of a method's folder, without suffix; inputs that several share are no recorded numbers."""
    return sorted(f"{method}/{p.stem}" for p in (ROOT / method).glob("*.safetensors") if p.stem != "input")


def is_other(file: str) -> bool:
    """Whether the metadata give a file to another method than that of its folder ("ats (another one's variant)")."""
    return read(file)[1].get("method", file.split("/")[0]).strip() != file.split("/")[0]


def files(method: str) -> list[str]:
    """Files that record a method: of its folder, or of a folder of many under its name; all of such a folder."""
    if method in PARTLY:
        return all_files(method)
    own = [file for file in all_files(method) if not is_other(file)]
    return own + [file for folder in PARTLY if is_fixture(file := f"{folder}/{method}")]


def left_alone() -> dict[str, str]:
    """Files below the folder that no test of a landed method reads, without suffix, each with the reason.

    Fixtures and inputs that several files share record no case.
    """
    read_by_tests = {file for method in LANDED for file in files(method)}
    found = {}
    for path in sorted(ROOT.rglob("*.safetensors")):
        file = path.relative_to(ROOT).with_suffix("").as_posix()
        folder, _, rest = file.rpartition("/")
        names = case_names(file)
        if file in read_by_tests or (rest == "input" and names in ([], ["input"])):
            continue
        if not folder:
            if names in ([], [MODEL]):  # a fixture
                continue
            reason = "cases stand in a folder with the name of their method"
        elif folder in PARTLY:
            continue
        elif folder.split("/")[0] not in LANDED:
            reason = f"there is no method {folder.split('/')[0]!r} in the library"
        elif "/" in folder:
            reason = f"files of a method stand in its folder, {folder.split('/')[0]!r}, not below"
        elif is_other(file):
            reason = f"it records {read(file)[1]['method']!r}, which is another method than that of its folder"
        else:
            reason = "an input that several files share records no cases"
        found[file] = f"{file} is not understood: {reason} (cases: {', '.join(names) or 'none'})"
    return found


def unread(folder: str) -> dict[str, list[str]]:
    """Cases that no test has asked for by now, by file of a folder; inputs that several files share are none."""
    found = {}
    for file in all_files(folder):
        names = [name for name in case_names(file) if (file, name) not in READ]
        if names:
            found[file] = names
    return found


@cache
def _named(file: str) -> frozenset[str]:
    """Names that the metadata have entries for, in the table of all cases too."""
    meta = read(file)[1]
    table = _literal(meta.get("settings", ""))
    return frozenset(meta) | (frozenset(table) if isinstance(table, dict) else frozenset())


@cache
def _two_part(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of two parts that the metadata give, and first parts of such names."""
    named = frozenset(name for name in _named(file) if re.fullmatch(r"[^/ ]+/[^/ ]+", name))
    return named, frozenset(name.split("/")[0] for name in named)


def case_of(file: str, key: str) -> str | None:
    """The case that a key belongs to; None for what cases share."""
    named, firsts = _two_part(file)
    first, *rest = key.split("/")
    if first in _SHARED or not rest:
        return None if first in _SHARED else first
    longer = [n for n in _named(file) if n.count("/") > 1 and key.startswith(f"{n}/")]
    if longer:  # names of more parts are cases where the metadata have an entry for them
        return max(longer, key=len)
    name = f"{first}/{rest[0]}"
    if name in named:
        return name
    kind = first in ("op", "model") and first not in _named(file)  # else it is a case of that name
    if not (kind or first in firsts or is_fixture(first)):
        return first
    if rest[0] in _SHARED:
        return None  # of a model kept in the file
    return name if kind or len(rest) > 1 else first


@cache
def case_names(file: str) -> list[str]:
    """Cases of a file."""
    return sorted({name for key in read(file)[0] if (name := case_of(file, key)) is not None})


class Case(NamedTuple):
    """One recorded case."""

    file: str
    name: str

    def __getitem__(self, key: str) -> Tensor:  # type: ignore[override]
        return read(self.file)[0][f"{self.name}/{key}"]

    def has(self, key: str) -> bool:
        return any(k == f"{self.name}/{key}" or k.startswith(f"{self.name}/{key}/") for k in read(self.file)[0])

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.split("/")[-1]

    @property
    def first(self) -> str | None:
        """The first part of a name of two: a fixture, or a model of the same file."""
        return self.name.split("/")[0] if "/" in self.name else None

    @property
    def words(self) -> str:
        """What the metadata say about this case alone, as it stands there."""
        meta = read(self.file)[1]
        for name in (self.name, self.short):
            if name in meta:
                return meta[name]
        table = _literal(meta.get("settings", ""))
        return str(next((table[n] for n in (self.name, self.short) if n in table), "")) if table else ""

    @property
    def _wide_entries(self) -> dict[str, str]:
        """Entries of the metadata that are no case's own."""
        named = {n for c in case_names(self.file) for n in (c, *c.split("/"))}
        return {key: text for key, text in read(self.file)[1].items() if key not in named}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the case: under its name, in the file's table of all cases, or those of the whole file."""
        meta = read(self.file)[1]
        found: Any = None
        for name in (self.name, self.short):
            if found is None and name in meta:
                found = settings(meta[name])
        table = settings(meta["settings"]) if "settings" in meta else {}
        for name in (self.name, self.short):
            if found is None and name in table:
                found = table[name]
        if found is None:
            values = {k: _literal(text) for k, text in self._wide_entries.items() if k not in _DESCRIBES}
            found = {key: value for key, value in values.items() if value is not None}
        return {key: value for key, value in found.items() if not self._places(key, value)}

    def _places(self, key: str, value: Any) -> bool:
        """Whether an entry says where weights or images come from, which is read here, not by the test."""
        if not isinstance(value, str):
            return False
        if key == "input":
            return re.search(_SLICE, value) is not None
        return key == "weights" and _stands(re.sub(r"\.safetensors.*", "", value), self.file) is not None

    @property
    def asks(self) -> frozenset[str]:
        """Names of its settings; none where the metadata describe it in words."""
        try:
            found = self.settings
        except (ValueError, SyntaxError):
            return frozenset()
        return frozenset(found)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of the case below a prefix, the prefix cut off."""
        return below(self.file, f"{self.name}/{prefix}/")

    def matching(self, pattern: str) -> dict[str, Tensor]:
        """Tensors of the case whose name matches a regular expression."""
        return {k: v for k, v in below(self.file, f"{self.name}/").items() if re.fullmatch(pattern, k)}

    def fixture(self, default: str = "vit_micro") -> str:
        """The file that weights and input come from, a path below the folder."""
        if self.first is not None and is_fixture(self.first):
            return self.first
        wide = self._wide_entries
        for text in (self.words, wide.get("weights", ""), wide.get("what", "")):
            for named in re.findall(_PATH, text):
                if is_fixture(named):
                    return named
        named = re.match(r"[\w/.-]*", wide.get("weights", "")).group()  # without its suffix
        found = _stands(named, self.file)
        assert not named or found, f"{self.file}: there are no weights {wide['weights']!r}"
        return found or default

    def _slice(self) -> slice | None:
        for text in (self.words, *self._wide_entries.values()):
            found = re.search(_SLICE, text)
            if found:
                return slice(*(int(bound) if bound else None for bound in found.groups()))
        return None

    def input(self, batch: int, default: str = "vit_micro") -> Tensor:
        """The images of the case: the slice that the metadata name, else as many as were recorded, from the front."""
        own = read(self.file)[0]
        if f"{self.name}/input" in own:
            found = own[f"{self.name}/input"]
        else:
            shared = f"{self.file.split('/')[0]}/input"
            found = next((own[key] for key in (f"{self.first}/input", "input") if key in own), None)
            if found is None:
                found = read(shared if is_fixture(shared) else self.fixture(default))[0]["input"]
            found = found[self._slice() or slice(None)]
        found = found[:batch]
        assert len(found) == batch, f"{self.file}/{self.name}: {len(found)} images for {batch} recorded outputs"
        return found

    def model(self, **changes: Any) -> torch.nn.Module:
        """The timm ViT of the case, in the size of its images where it has a position embedding of its own."""
        kept = (below(self.file, start) for start in (f"{self.first}/weights/", "weights/"))
        own = next((weights for weights in kept if "patch_embed.proj.weight" in weights), None)
        if own is None:
            built = fixture_model(self.fixture(), **changes)
        else:
            described = " ".join([read(self.file)[1].get(self.first or "", ""), *self._wide_entries.values()])
            heads = re.search(r"heads\W+(\d+)", described)
            assert heads, f"{self.file}: the metadata do not say how many heads the model has"
            built = vit_of(own, int(heads.group(1)), **changes)
        on_top = {k: v for k, v in self.part("weights").items() if k in built.state_dict() and k != "pos_embed"}
        built.load_state_dict(on_top, strict=False)
        tables = [self[key] for key in ("pos_embed", "weights/pos_embed") if f"{self.name}/{key}" in read(self.file)[0]]
        if tables:
            if self.has("input"):
                built.patch_embed.set_input_size(tuple(self["input"].shape[-2:]))
            built.pos_embed = torch.nn.Parameter(tables[0])
        return built


def _stands(named: str, file: str) -> str | None:
    """The path of weights that a file names, below the folder of all or its own; None where there are none."""
    beside = f"{file.rpartition('/')[0]}/{named}"
    return next((path for path in (named, beside) if named and is_fixture(path)), None)


def _literal(text: str) -> Any:
    """The value of JSON or of a Python literal; None for any other text."""
    try:
        return settings(text)
    except (ValueError, SyntaxError):
        return None


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


def cases(method: str, kind: Callable[[Case], bool] = lambda case: True) -> Any:
    """A parametrize mark over all cases of a method that are of a kind, whatever file they stand in."""
    found = []
    for file in files(method):
        for name in case_names(file):
            case = Case(file, name)
            if kind(case):
                READ.add((file, name))
                found.append(pytest.param(case, id=f"{file}/{name}", marks=pytest.mark.golden))
    return pytest.mark.parametrize("case", found)


def models(method: str, *outputs: str) -> Any:
    """A parametrize mark over the files of a method that record a model of their own with these outputs."""
    found = []
    for file in files(method):
        if MODEL in case_names(file) and all(f"{MODEL}/{name}" in read(file)[0] for name in outputs):
            READ.add((file, MODEL))
            found.append(pytest.param(file, id=file, marks=pytest.mark.golden))
    return pytest.mark.parametrize("file", found)


def check_settings(given: dict[str, Any], *known: str) -> None:
    """Fails on a setting that the test does not know."""
    extra = set(given) - set(known) - {"fp64_diff"}  # how far float32 was from float64 when it was recorded
    assert not extra, f"the metadata holds settings that this test does not understand: {sorted(extra)}"


def fixture_model(fixture: str, **changes: Any) -> torch.nn.Module:
    """The timm model that a fixture's weights belong to, sizes read off the weights."""
    tensors, meta = read(fixture)
    heads = int(re.search(r"heads (\d+)", meta["what"]).group(1))
    options = {"img_size": tuple(tensors["input"].shape[-2:]), **changes}
    return vit_of(below(fixture, "weights/"), heads, **options)


def vit_of(weights: dict[str, Tensor], heads: int, **changes: Any) -> torch.nn.Module:
    """The timm ViT of some weights, sizes read off them; square where `img_size` is not given."""
    kernel, prefix = weights["patch_embed.proj.weight"], int("cls_token" in weights)
    side = round((weights["pos_embed"].shape[1] - prefix) ** 0.5) * kernel.shape[-1]
    options = {
        "img_size": side,
        "patch_size": tuple(kernel.shape[-2:]),
        "embed_dim": kernel.shape[0],
        "depth": 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
        "num_heads": heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / kernel.shape[0],
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


DECODERS = "segmentation_eval/segmenter_micro"


def micro_decoder(kind: str, file: str = DECODERS) -> torch.nn.Module:
    """The recorded decoder of the small segmenter, "mask" or "linear"."""
    from tokenzoo.dense import LinearHead, MaskTransformer

    weights = below(file, f"{kind}/decoder.")
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
    from tokenzoo.adapters.vit.attention import ReducingAttention
    from tokenzoo.adapters.vit.model import ReducingVitBlock
    from tokenzoo.core.method import Step

    dim = weights["norm1.weight"].shape[0]
    ratio = weights["mlp.fc1.weight"].shape[0] / dim
    block = Block(dim, heads, ratio, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    block.load_state_dict(weights)
    block.__class__ = ReducingVitBlock
    block.attn.__class__ = ReducingAttention
    steps = () if strength is None else (Step(method, 0, strength),)
    block.tokenzoo = BlockPlan(0, 1, steps, method.proportional, layout)
    return block.eval()
