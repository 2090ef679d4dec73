"""Recorded numbers of vision-language methods on a tower and a language model of other sizes are read as they stand.

A folder of its own holds `clip_micro` and `llama_micro` of other widths, depths, heads and numbers of patches, grouped
queries among them, and what is worked out here by hand. The golden tests then run on it, unchanged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

transformers = pytest.importorskip("transformers")

from test_vlm_droppers import attention_map  # noqa: E402

TESTS = Path(__file__).parent
CLIP = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 70,
    "patch_size": 14, "hidden_act": "quick_gelu",
}  # fmt: skip
LLAMA = {
    "hidden_size": 56, "intermediate_size": 80, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 5000.0,
}  # fmt: skip


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    """With weights large enough for attention to be uneven."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"weights/{key}": value.clone() for key, value in model.state_dict().items()}


def towers(root: Path) -> None:
    """A tower, and what the class token attends to most in its last layer but one; summed over layers too."""
    tower = uneven(transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**CLIP, layer_norm_eps=1e-4, attn_implementation="eager")
    ))  # fmt: skip
    x = torch.randn(3, 3, 70, 70)
    meta = {"config": str(CLIP), "layer_norm_eps": "1e-4"}
    save_file({**weights(tower), "input": x}, root / "clip_micro.safetensors", meta)
    with torch.no_grad():
        out = tower(x, output_attentions=True, output_hidden_states=True)
    features, rows = out.hidden_states[-2][:, 1:], [each[:, :, 0, 1:].mean(1) for each in out.attentions]
    tensors, names = {}, {"weights": "vlm/clip_micro.safetensors"}
    for keep in (3, 11, 24):
        index = rows[-2].topk(keep, dim=1).indices.sort(1).values
        tensors[f"model/keep{keep}/out/mask"] = torch.zeros(3, 25, dtype=torch.bool).scatter(1, index, True)
        tensors[f"model/keep{keep}/out/kept"] = features.gather(1, index[..., None].expand(-1, -1, 40))
        names[f"model/keep{keep}"] = str({"keep": keep})
    save_file(tensors, root / "fastervlm.safetensors", {**names, "method": "FasterVLM"})
    index = sum(rows[1:-1]).topk(7, dim=1).indices.sort(1).values
    tensors = {"model/s1/out/kept": features.gather(1, index[..., None].expand(-1, -1, 40))}
    meta = {"weights": "vlm/clip_micro.safetensors", "method": "VTC-CLS"}
    meta["model/s1"] = str({"start_layer": 1, "keep": 7})
    save_file(tensors, root / "vtc_cls.safetensors", meta)


def language_models(root: Path) -> None:
    """A language model with grouped queries, and FastV from its equations: layers whose columns are closed."""
    lm = uneven(transformers.LlamaModel(transformers.LlamaConfig(
        **{k: v for k, v in LLAMA.items() if k != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA["rope_theta"]},
    )))  # fmt: skip
    prompts = [torch.randn(1, n, 56) for n in (21, 33)]
    tensors = weights(lm) | {f"inputs_embeds/{i}": x for i, x in enumerate(prompts)}
    save_file(tensors, root / "llama_micro.safetensors", {"config": json.dumps(LLAMA)})
    tensors, names = {}, {"weights": "llama_micro", "method": "FastV"}
    cases = [(0, 4, 12, 5, 0.25), (1, 2, 25, 1, 0.8)]
    for number, (prompt, start, count, layer, removed) in enumerate(cases):
        case, x = f"model/{number}", prompts[prompt]
        n = x.shape[1]
        with torch.no_grad():
            entering = lm(inputs_embeds=x, output_hidden_states=True).hidden_states[layer - 1][0]
            score = attention_map(lm, layer - 1, entering)[-1, start : start + count]
            stay = torch.ones(n + 3, dtype=torch.bool)
            stay[start : start + count] = False
            stay[start + score.topk(round(count * (1 - removed))).indices] = True
            x = torch.cat([x, lm.embed_tokens(torch.tensor([[3, 4, 5]]))], 1)
            rope = lm.rotary_emb(x, torch.arange(n + 3)[None])
            for i, each in enumerate(lm.layers):
                seen = torch.ones(n + 3, n + 3, dtype=torch.bool).tril()
                seen = (seen & (stay | (i < layer))) | torch.eye(n + 3, dtype=torch.bool)
                mask = torch.zeros(n + 3, n + 3).masked_fill(~seen, -1e30)[None, None]
                x = each(x, attention_mask=mask, position_embeddings=rope)
            x = lm.norm(x)
        left = int(stay[:n].sum())
        tensors |= {
            f"{case}/out/last_hidden_state": x[:, :n][:, stay[:n]], f"{case}/out/decode_hidden": x[0, n:],
            f"{case}/out/rows": stay[:n].nonzero().flatten(),
            f"{case}/out/cache_lengths": torch.tensor([n] * layer + [left] * (len(lm.layers) - layer)),
        }  # fmt: skip
        names[case] = str({
            "prompt": prompt, "image_start": start, "image_tokens": count, "layer": layer, "share_removed": removed,
        })  # fmt: skip
    save_file({k: v.contiguous() for k, v in tensors.items()}, root / "fastv.safetensors", names)


@pytest.mark.golden
def test_other_sizes_are_understood(tmp_path: Path):
    root = tmp_path / "vlm"
    root.mkdir()
    towers(root)
    language_models(root)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-v", "-n0"]
    command += [str(TESTS / f"test_golden_vlm{part}.py") for part in ("", "_selectors", "_droppers")]
    env = {**os.environ, "TOKENZOO_GOLDENS": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=TESTS.parent, check=False).stdout
    found = dict(re.findall(r"::(\S+) (PASSED|FAILED|ERROR)", out))
    read = [test for test in found if "[" in test]
    assert len(read) == 6 and all(found[test] == "PASSED" for test in read), out[-6000:]
