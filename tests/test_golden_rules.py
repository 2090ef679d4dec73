"""Recorded numbers of the same naming in other files are understood: what the rules allow is tried, one by one.

A folder of its own is made of the public files, renamed, cut, moved and put together, and of numbers that the library
gives where a rule has no public example. The golden tests then run on it as they stand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import read, settings
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenzoo
from tokenzoo.models import LVViT

TESTS = Path(__file__).parent
TRIED = ("tome", "mctf", "lv_vit", "plain_mamba", "uniformer_light", "vision_mamba", "ssm_token_pruning", "expedit")
Files = dict[str, tuple[dict[str, Tensor], dict[str, str]]]


def renamed(file: str, start: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file with a first part in front of all names of cases."""
    tensors, meta = read(file)
    names = goldens.case_names(file)
    moved = {f"{start}/{key}" if key.split("/")[0] in names else key: value for key, value in tensors.items()}
    return moved, {f"{start}/{key}" if key in names else key: text for key, text in meta.items() if key != "weights"}


def tome_outputs(model: torch.nn.Module, x: Tensor, r: int = 8) -> dict[str, Tensor]:
    """What a file of ToMe records of a model."""
    with torch.no_grad(), tokenzoo.patched(model, "tome", r=r, clip=True):
        counts = [row.tokens_out for row in tokenzoo.report(model, tuple(x.shape[-2:])).rows if "blocks" in row.name]
        return {
            "out_logits": model(x), "out_features": model.forward_tokens(x).x, "out_tokens_per_block": Tensor(counts)
        }  # fmt: skip


def named(case: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{case}/{key}": value.long() if "tokens_per" in key else value for key, value in values.items()}


R8 = json.dumps({"r": 8, "prop_attn": True, "what": "timm patch"})


def two_part_names() -> Files:
    """`<fixture>/<case>` of two fixtures in one file, `op/<case>` in another."""
    first, second = renamed("tome/model", "vit_micro"), renamed("tome/model_gap", "vit_micro_gap")
    ops, schedule = renamed("tome/ops", "op"), renamed("tome/r_schedule", "op")
    return {
        "tome/models": ({**first[0], **second[0]}, {**first[1], **second[1]}),
        "tome/all_ops": ({**ops[0], **schedule[0]}, {**ops[1], **schedule[1]}),
    }


def slices() -> Files:
    """Images that are a slice of those of the fixture, named for a file or for a case."""
    tensors, meta = read("tome/model")
    cut = {k: v if "per_block" in k else v[2:4] for k, v in tensors.items() if k.startswith(("r8_prop/", "r0/"))}
    own = {"r": 8, "prop_attn": False, "what": "timm patch", "input": "vit_micro input[1:3]"}
    rows = {k: v if "per_block" in k else v[1:3] for k, v in tensors.items() if k.startswith("r8_noprop/")}
    entries = {"weights": "vit_micro.safetensors (input[2:4] of that file)", "r8_prop": meta["r8_prop"]}
    return {"tome/sliced": ({**cut, **rows}, {**entries, "r0": meta["r0"], "r8_noprop": json.dumps(own)})}


def own_models() -> Files:
    """A fixture named by a path, a model kept in the file, and images and positions of another size."""
    tensors, meta = read("vit_micro")
    generator = torch.Generator().manual_seed(0)
    twin = {k: v + 0.05 * torch.randn(v.shape, generator=generator) if "head" in k else v for k, v in tensors.items()}
    model = goldens.fixture_model("vit_micro")
    model.load_state_dict({k[len("weights/") :]: v for k, v in twin.items() if k.startswith("weights/")})
    by_path = named("twin_r8", tome_outputs(model, twin["input"]))
    large, size = goldens.fixture_model("vit_micro"), (48, 80)
    large.set_input_size(size)
    x = torch.randn(2, 3, *size, generator=generator)
    own_size = named("wide_r8", {**tome_outputs(large, x), "input": x, "pos_embed": large.pos_embed.detach()})
    torch.manual_seed(1)
    tiny = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2, num_classes=5)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    kept = {f"tiny/weights/{key}": value for key, value in tiny.state_dict().items()}
    inside = named("tiny/r2", tome_outputs(tiny.eval(), pixels, 2))
    sizes = json.dumps({"dim": 24, "depth": 3, "heads": 3, "img": 32, "patch": 8, "classes": 5})
    return {
        "twins/vit_twin": (twin, meta),
        "tome/by_path": (by_path, {"weights": "twins/vit_twin.safetensors (input: that file)", "twin_r8": R8}),
        "tome/own_size": (own_size, {"weights": "vit_micro.safetensors", "wide_r8": R8}),
        "tome/own_model": (
            {**kept, "tiny/input": pixels, **inside}, {"tiny": sizes, "tiny/r2": R8.replace("8", "2", 1)}
        ),
    }  # fmt: skip


def losses_beside_models() -> Files:
    """Losses in files of models: told by their keys."""
    mctf = [read("mctf/model"), read("mctf/consistency")]
    model, loss = read("lv_vit/lvvit_stem"), read("lv_vit/loss")
    hard = {f"hard/{key}": value for key, value in loss[0].items()}
    return {
        "mctf/all": ({**mctf[0][0], **mctf[1][0]}, {**mctf[0][1], **mctf[1][1]}),
        "lv_vit/both": (model[0] | loss[0], {**loss[1], **model[1]}),
        "lv_vit/named": (model[0] | hard, {**model[1], "hard": loss[1]["case"]}),
    }


def heads_of_their_own_width() -> Files:
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, "head_dim": 6,
        "p_emb": "naive", "skip_lam": 2.0, "return_dense": False, "mix_token": False, "num_classes": 5,
    }  # fmt: skip
    torch.manual_seed(2)
    model, x = LVViT(**options).eval(), torch.randn(2, 3, 32, 32)
    tensors = {f"weights/{key}": value for key, value in model.state_dict().items()}
    with torch.no_grad():
        tensors |= {"input": x, "output/logits": model(x), "output/features": model.forward_features(x)}
    params = sum(p.numel() for p in model.parameters())
    return {"lv_vit/head_dim": (tensors, {"config": repr(options), "params": str(params)})}


def taps_and_grids() -> Files:
    """PlainMamba without a default grid, with other taps, one of them a block that is recorded raw."""
    from test_golden_plain_mamba import model

    tensors, meta = read("plain_mamba/plain_mamba_micro")
    kept = {k: v for k, v in tensors.items() if not re.search(r"out_index|norm_layer\d", k)}
    norm = {k.split("norm_layer1.")[1]: v for k, v in tensors.items() if "norm_layer1." in k}
    for index in (0, 2):
        kept |= {f"weights/backbone.norm_layer{index}.{name}": value + 0.1 * index for name, value in norm.items()}
    built, first = model("plain_mamba/plain_mamba_micro"), tensors["input"][:1]
    with torch.no_grad():
        raw = [each.detach() for each in built.forward_intermediates(first, [0, 2])[1]]
    for index, tap in zip((0, 2), raw):
        weight, bias = (kept[f"weights/backbone.norm_layer{index}.{name}"] for name in ("weight", "bias"))
        normed = torch.nn.functional.layer_norm(tap.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6)
        kept[f"output/out_index{index}_row0"] = normed.permute(0, 3, 1, 2).contiguous()
    changed = {**settings(meta["mamba_cfg"]), "default_hw_shape": None}
    return {"plain_mamba/taps": (kept, {**meta, "mamba_cfg": repr(changed), "out_indices": "(0, 2, 3)"})}


def other_stem() -> Files:
    """A light UniFormer whose first embedding is one convolution; its attention blocks are the public ones."""
    from test_golden_uniformer_light import logits_of

    (file,) = goldens.files("uniformer_light")[:1]
    tensors, meta = read(file)
    found = {**settings(meta["config"]), "conv_stem": False}
    torch.manual_seed(3)
    kept = {k: v for k, v in tensors.items() if not k.startswith("weights/patch_embed1.")}
    dim = found["embed_dim"][0]
    kept |= {"weights/patch_embed1.proj.weight": 0.1 * torch.randn(dim, 3, 4, 4), "weights/patch_embed1.proj.bias":
             torch.randn(dim), "weights/patch_embed1.norm.weight": torch.rand(dim) + 0.5,
             "weights/patch_embed1.norm.bias": torch.randn(dim)}  # fmt: skip
    weights = {k[len("weights/") :]: v for k, v in kept.items() if k.startswith("weights/")}
    kept["output/logits"] = logits_of(found, weights, tensors["input"])
    return {"uniformer_light/patches": (kept, {**meta, "config": repr(found)})}


def variants_of_vim() -> Files:
    """Variants without a word on the class token, with images and positions of their own."""
    from test_golden_vision_mamba import build

    file = "vision_mamba/vim_micro"
    tensors, meta = read(file)
    model, generator = build(file), torch.Generator().manual_seed(4)
    small, own = (torch.randn(2, 3, *size, generator=generator) for size in ((64, 64), (48, 80)))
    kept = {key: value for key, value in tensors.items() if not key.startswith(("variant", "intermediate"))}
    plain = build(file, if_divide_out=False)
    with torch.no_grad():
        kept |= {"variant_sum/logits": plain(tensors["input"]), "variant_images/input": small}
        kept["variant_images/logits"] = model(small)
        model.set_input_size((48, 80))
        kept |= {"variant_wide/input": own, "variant_wide/logits": model(own)}
        model.pos_embed.add_(0.1)
        kept |= {"variant_table/input": own, "variant_table/logits": model(own)}
        kept["variant_table/pos_embed"] = model.pos_embed.detach().clone()
    words = {
        "variant_sum": "if_divide_out=False, same weights", "variant_images": "other images",
        "variant_wide": "final_pool_type=mean, pos_embed resized", "variant_table": "own pos_embed",
    }  # fmt: skip
    entries = {key: text for key, text in meta.items() if not key.startswith("variant")}
    return {"vision_mamba/vim_more": (kept, entries | words)}


def scans_by_path() -> Files:
    """Pruning recorded on a model that lies elsewhere."""
    tensors, meta = read("ssm_token_pruning/top_vim_micro")
    vim = read("vision_mamba/vim_micro")
    own = {key: value for key, value in vim[0].items() if not key.startswith(("variant", "intermediate", "output"))}
    described = {k: text for k, text in meta.items() if k != "what"}
    return {
        "elsewhere/vim_copy": (own, vim[1]),
        "ssm_token_pruning/top": (tensors, {**described, "weights": "elsewhere/vim_copy.safetensors (private)"}),
    }


def settings_of_a_file() -> Files:
    """One case, its settings file-wide."""
    tensors, meta = read("expedit/vit_micro_classify")
    case, given = next(iter(settings(meta["settings"]).items()))
    wide = {key: repr(value) for key, value in given.items()}
    kept = {key: value for key, value in tensors.items() if key.startswith(f"{case}/")}
    return {"expedit/alone": (kept, {"weights": "vit_micro", **wide})}


def not_understood() -> Files:
    """A case of no known kind, an unknown setting, another method under the folder's name."""
    tensors, meta = read("tome/model")
    kept = {key: value for key, value in tensors.items() if key.startswith("r0/")}
    surprise = json.dumps({**settings(meta["r0"]), "surprise": 1})
    return {
        "tome/strange": ({"strange/thing": torch.zeros(1)}, {"strange": "{}"}),
        "tome/surprising": (kept, {"weights": meta["weights"], "r0": surprise}),
        "tome/another": (kept, {"method": "tome (another one's variant)"}),
        "tomorrow/model": (kept, {"weights": meta["weights"], "r0": meta["r0"]}),
        "tome/deeper/model": (kept, {"weights": meta["weights"], "r0": meta["r0"]}),
        "alone": (kept, {"weights": meta["weights"], "r0": meta["r0"]}),
    }


UNDERSTOOD = (
    two_part_names, slices, own_models, losses_beside_models, heads_of_their_own_width, taps_and_grids, other_stem,
    variants_of_vim, scans_by_path, settings_of_a_file,
)  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str, set[str]]:
    """Results of the golden tests on the folder by test, all that they printed, and the cases that are there."""
    root = tmp_path_factory.mktemp("golden")
    made: Files = {f: read(f) for f in ("vit_micro", "vit_micro_gap", goldens.DECODERS)}
    for make in (*UNDERSTOOD, not_understood):
        made |= make()
    for name, (tensors, meta) in made.items():
        path = root / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True, parents=True)
        # files share no memory
        save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, str(path), meta)
    files = [str(TESTS / f"test_golden_{method}.py") for method in TRIED]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "TOKENZOO_GOLDENS": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command += [str(TESTS / "test_goldens.py")]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*?::(\w+(?:\[.*?\](?= - |$))?)", out.stdout, re.M)
    return {test: word for word, test in found}, out.stdout + out.stderr, set(made)


@pytest.mark.golden
@pytest.mark.parametrize("make", UNDERSTOOD, ids=lambda make: make.__name__)
def test_understood(make: Any, outcome: tuple[dict[str, str], str, set[str]]):
    """Every file is read by some test, and every test of it passes."""
    results, printed, _ = outcome
    for file in make():
        if file.split("/")[0] not in goldens.LANDED:
            continue
        own = {test: word for test, word in results.items() if re.search(rf"\[(.*-)?{re.escape(file)}(/|\]|-)", test)}
        assert own, f"{file} is read by no test:\n{printed[-3000:]}"
        assert set(own.values()) == {"PASSED"}, f"{own}\n{printed[-6000:]}"


@pytest.mark.golden
def test_what_is_not_understood_is_named(outcome: tuple[dict[str, str], str, set[str]]):
    results, printed, _ = outcome
    failed = {test for test, word in results.items() if word != "PASSED"}
    assert failed == {"test_every_case_is_read_by_some_test", "test_model[tome/surprising/r0]"}, printed[-6000:]
    assert "read by no test: [('tome/strange', 'strange')]" in printed
    assert "does not understand: ['surprise']" in printed
    for file, reason in {
        "tome/another": "it records \"tome (another one's variant)\"",
        "tomorrow/model": "there is no method 'tomorrow' in the library",
        "tome/deeper/model": "files of a method stand in its folder, 'tome', not below",
        "alone": "cases stand in a folder with the name of their method",
    }.items():
        named = [line for line in printed.splitlines() if line.startswith(f"{file} is not understood: {reason}")]
        assert len(named) == 1 and named[0].endswith("(cases: r0)"), printed[-6000:]
