"""Selectors and droppers against the published implementations, on the recorded tower and language model."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import Case, below, cases, check_settings, close, read

import tokenzoo
from tokenzoo.vlm.rows import VisualRows

transformers = pytest.importorskip("transformers")

from tokenzoo.vlm.families.language_models import LAYERS, LMS  # noqa: E402
from tokenzoo.vlm.lm import LmPlan  # noqa: E402
from tokenzoo.vlm.passing import KWARG, Note  # noqa: E402
from tokenzoo.vlm.plans import plans_of  # noqa: E402


class Recorded:
    """Signals of a tower that hold what was recorded."""

    def __init__(self, importance: torch.Tensor) -> None:
        self._importance = importance

    def importance(self, layer: int = -2) -> torch.Tensor:
        return self._importance


def clip(file: str) -> transformers.CLIPVisionModel:
    """The recorded tower."""
    meta, weights = read(file)[1], below(file, "weights/")
    config = json.loads(meta["config"].replace("'", '"'))
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**config, layer_norm_eps=float(meta["layer_norm_eps"]))
    )
    kept = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    own = tower.state_dict()
    names = {key: key if key in own else f"vision_model.{key}" for key in kept}
    left = tower.load_state_dict({names[key]: value for key, value in kept.items() if names[key] in own}, strict=False)
    assert all("position_ids" in key for key in left.missing_keys)
    return tower.eval()


def llava(file: str) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA around the recorded tower whose projector changes nothing."""
    tower = clip(file)
    dim = tower.config.hidden_size
    text = transformers.LlamaConfig(
        vocab_size=20, hidden_size=dim, intermediate_size=dim, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=tower.config, text_config=text, image_token_id=19)
    ).eval()
    model.model.vision_tower = tower
    model.model.multi_modal_projector = torch.nn.Identity()
    return model


def kept_of(rows: torch.Tensor) -> torch.Tensor:
    return ~torch.isinf(rows).all(-1)


@cases("vlm", lambda c: c.has("in/cls_attention") and c.has("out/score") and c.has("out/mask"))
def test_fastervlm_rows(case: Case):
    s = case.settings
    check_settings(s, "B", "heads", "N", "C", "keep")
    score, x = case["in/cls_attention"].mean(1), case["in/features"]
    close(score, case["out/score"], 1e-6)
    found = tokenzoo.FasterVLM(keep=s["keep"]).map(VisualRows(x), Recorded(score), s["keep"])
    assert torch.equal(found.membership().sum(1).bool(), case["out/mask"].bool())
    close(found.apply(x), case["out/kept"], 1e-6)


@cases("vlm", lambda c: c.asks == {"keep"} and c.has("out/mask") and c.has("out/kept"))
def test_fastervlm_on_a_tower(case: Case):
    s = case.settings
    check_settings(s, "keep")
    model, file = llava(case.fixture()), case.fixture()
    tokenzoo.patch_model(model, "fastervlm", keep=s["keep"])
    with torch.no_grad():
        found = torch.stack(model.model.get_image_features(read(file)[0]["input"]).pooler_output)
    kept = kept_of(found)
    assert torch.equal(kept, case["out/mask"].bool())
    close(found[kept].view_as(case["out/kept"]), case["out/kept"], 1e-4)


def llama(file: str) -> transformers.LlamaModel:
    """The recorded language model."""
    config = json.loads(read(file)[1]["config"])
    theta = config.pop("rope_theta")
    made = transformers.LlamaModel(
        transformers.LlamaConfig(**config, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    made.load_state_dict(below(file, "weights/"))
    return made.eval()


def dropping(lm: transformers.LlamaModel, dropper: object, positions: str) -> transformers.LlamaModel:
    """A language model alone with a dropper in it."""
    plans = plans_of((dropper,), len(lm.layers))
    lm.__class__, lm.tokenzoo_plan = LMS[type(lm)], LmPlan(True, positions)
    for layer, plan in zip(lm.layers, plans):
        layer.__class__, layer.tokenzoo_plan = LAYERS[type(layer)], plan
    return lm


def run(lm: transformers.LlamaModel, case: Case, file: str) -> tuple[object, torch.Tensor]:
    """Prefill of a recorded prompt, and three steps on its cache."""
    s = case.settings
    x = read(file)[0][f"inputs_embeds/{s['prompt']}"]
    visual = torch.zeros(x.shape[:2], dtype=torch.bool)
    visual[:, s["image_start"] : s["image_start"] + s["image_tokens"]] = True
    with torch.no_grad():
        out = lm(inputs_embeds=x, use_cache=True, **{KWARG: Note(visual)})
        lengths = torch.tensor([layer.keys.shape[2] for layer in out.past_key_values.layers])
        steps = []
        for token in (3, 4, 5):
            step = lm(inputs_embeds=lm.embed_tokens(torch.tensor([[token]])), past_key_values=out.past_key_values)
            steps.append(step.last_hidden_state[:, 0])
    close(out.last_hidden_state, case["out/last_hidden_state"], 1e-4)
    assert torch.equal(lengths, case["out/cache_lengths"])
    close(torch.cat(steps), case["out/decode_hidden"], 1e-4)
    return out, lengths


@cases("vlm", lambda c: "share_removed" in c.asks and c.has("out/decode_hidden") and not c.has("out/merged"))
def test_fastv(case: Case):
    s = case.settings
    check_settings(s, "prompt", "image_start", "image_tokens", "layer", "share_removed")
    file = case.fixture()
    lm = dropping(llama(file), tokenzoo.FastV(removed=s["share_removed"], layers=s["layer"]), "original")
    out, lengths = run(lm, case, file)
    held = out.past_key_values.kept.layers[s["layer"]].cols[0]
    assert torch.equal(held[: lengths[s["layer"]]], case["out/rows"])
