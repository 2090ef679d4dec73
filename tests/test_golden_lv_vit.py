"""LV-ViT and the token labelling loss against the published implementation."""

import pytest
import torch
from goldens import READ, case_names, check_settings, close, files, read, settings

from tokenzoo.models import LVViT
from tokenzoo.training.token_label import TokenLabelLoss

models = [
    pytest.param(name, id=name, marks=pytest.mark.golden)
    for name in files("lv_vit")
    if any(key.startswith("output/") for key in read(name)[0])
]
losses = [
    pytest.param(name, key, id=f"{name}/{key}", marks=pytest.mark.golden)
    for name in files("lv_vit")
    for key in read(name)[0]
    if key.startswith("loss/")
]
READ.update((param.values[0], name) for param in losses for name in case_names(param.values[0]))


@pytest.mark.parametrize("file", models)
def test_model(file: str):
    tensors, meta = read(file)
    s = settings(meta["config"])
    check_settings(
        s, "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "p_emb", "skip_lam",
        "return_dense", "mix_token", "num_classes", "qkv_bias",
    )  # fmt: skip
    model = LVViT(**s).eval()
    weights = {key[len("weights/") :]: value for key, value in tensors.items() if key.startswith("weights/")}
    model.load_state_dict(weights)
    assert set(model.state_dict()) - set(weights) == {k for k in model.state_dict() if "num_batches_tracked" in k}
    assert sum(p.numel() for p in model.parameters()) == int(meta["params"])
    x = tensors["input"]
    with torch.no_grad():
        train = model.forward_train(x)
        grid = model.patch_embed.grid_size
        found = {
            "patch_tokens": model.patch_embed(x).transpose(1, 2).unflatten(2, grid),
            "features": model.forward_features(x),
            "cls_logits": train.logits,
            "aux_logits": train.dense_logits,
            "logits": model(x),
        }
    expected = {key[len("output/") :]: value for key, value in tensors.items() if key.startswith("output/")}
    assert set(expected) == set(found)
    for name, value in expected.items():
        close(found[name], value, 1e-5)


@pytest.mark.parametrize("file,key", losses)
def test_loss(file: str, key: str):
    tensors, meta = read(file)
    s = settings(meta["case"])
    check_settings(s, "B", "N", "classes", "bbox", "dense_weight", "cls_weight")
    target, truth = tensors["target"], False
    if key == "loss/no_dense_labels":
        target = target[:, :, 1]
    else:
        assert key.startswith("loss/ground_truth_")
        truth = key.endswith("True")
    loss = TokenLabelLoss(s["dense_weight"], s["cls_weight"], ground_truth=truth)
    output = tensors["cls"], tensors["aux"], tuple(tensors["bbox"].tolist())
    assert output[2] == s["bbox"]
    close(loss(output, target).reshape(1), tensors[key], 1e-5)
