"""Super token attention and its backbone against the published implementation."""

import torch
from cases import released_numbers
from goldens import Case, cases, check_settings, close, models, read, settings

from tokenzoo.layers import SuperTokenAttention
from tokenzoo.models import SViT


@cases("super_token_attention", lambda c: c.has("y"))
def test_layer(case: Case):
    s = case.settings
    check_settings(s, "B", "C", "H", "W", "stoken_size", "heads", "n_iter", "qkv_bias", "refine")
    layer = SuperTokenAttention(s["C"], s["stoken_size"], s["heads"], s["n_iter"], s["qkv_bias"], s["refine"])
    layer.load_state_dict(case.part("weights"))
    x = case["x"].requires_grad_()
    assert x.shape == (s["B"], s["C"], s["H"], s["W"])
    out = layer(x)
    close(out, case["y"], 1e-5)
    close(torch.autograd.grad((out * case["grad_out"]).sum(), x)[0], case["grad_x"], 1e-5)
    with torch.no_grad():
        if case.has("assoc"):
            close(layer.associate(x).picture(layer.stoken_size), case["assoc"], 1e-5)
        if case.has("stokens_in"):
            supers = layer.super_tokens(x)
            close(supers, case["stokens_in"], 1e-5)
            close(layer.stoken_refine(supers), case["stokens_out"], 1e-5)


@models("super_token_attention")
def test_backbone(file: str):
    tensors, meta = read(file)
    s = settings(meta["config"])
    check_settings(
        s, "embed_dim", "depths", "num_heads", "stoken_size", "projection", "layerscale", "num_classes", "n_iter",
        "mlp_ratio", "qkv_bias", "drop_path_rate", "init_values",
    )  # fmt: skip
    model = SViT(**s).eval()
    weights = {key[len("weights/") :]: value for key, value in tensors.items() if key.startswith("weights/")}
    model.load_state_dict(weights)
    assert set(model.state_dict()) - set(weights) == {k for k in model.state_dict() if "num_batches_tracked" in k}
    assert released_numbers(model) == int(meta["params"])
    seen = {}
    for name, module in [("stem", model.patch_embed), *((f"layer{i}", m) for i, m in enumerate(model.layers))]:
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        features = model.forward_features(tensors["input"])
        seen["pre_logits"] = model.forward_head(features, pre_logits=True)
        seen["logits"] = model(tensors["input"])
    expected = {key[len("output/") :]: value for key, value in tensors.items() if key.startswith("output/")}
    assert set(expected) <= set(seen)
    for name, value in expected.items():
        close(seen[name], value)
