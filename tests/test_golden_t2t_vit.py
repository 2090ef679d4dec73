"""T2T-ViT against the published implementation."""

import torch
from cases import released_numbers
from goldens import Case, cases, check_settings, close, models, read, settings

from tokenzoo.models import T2TViT
from tokenzoo.models.t2t_tokens import TokenPerformer, TokenTransformer
from tokenzoo.models.t2t_vit import sinusoid_positions


@cases("t2t_vit", lambda c: c.has("x"))
def test_layer(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "dim", "in_dim", "heads", "kernel_ratio")
    assert s["heads"] == 1 and case["x"].shape == (s["B"], s["N"], s["dim"])
    if "kqv.weight" in case.part("weights"):
        layer = TokenPerformer(s["dim"], s["in_dim"], s["kernel_ratio"])
    else:
        layer = TokenTransformer(s["dim"], s["in_dim"])
    layer.load_state_dict(case.part("weights"))
    with torch.no_grad():
        close(layer.eval()(case["x"]), case["y"], 1e-5)
        if case.has("attn_out"):
            close(layer.attend(case["x"]), case["attn_out"], 1e-5)


@cases("t2t_vit", lambda c: "n_position" in c.asks)
def test_positions(case: Case):
    s = case.settings
    check_settings(s, "n_position", "d_hid")
    close(sinusoid_positions(s["n_position"], s["d_hid"]), read(case.file)[0][case.name], 1e-6)


@models("t2t_vit")
def test_model(file: str):
    tensors, meta = read(file)
    s = settings(meta["config"])
    check_settings(
        s, "tokens_type", "img_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "token_dim",
        "qkv_bias",
    )  # fmt: skip
    model = T2TViT(**s).eval()
    weights = {key[len("weights/") :]: value for key, value in tensors.items() if key.startswith("weights/")}
    close(model.pos_embed, weights["pos_embed"], 1e-6)
    model.load_state_dict(weights)
    assert set(model.state_dict()) == set(weights)
    assert released_numbers(model) == int(meta["params"])
    found = {}
    with torch.no_grad():
        found["tokens"] = model.tokens_to_token(tensors["input"])
        found["features"] = model.forward_features(tensors["input"])[:, 0]
        found["logits"] = model(tensors["input"])
    expected = {key[len("output/") :]: value for key, value in tensors.items() if key.startswith("output/")}
    assert set(expected) == set(found)
    for name, value in expected.items():
        close(found[name], value, 1e-5)
