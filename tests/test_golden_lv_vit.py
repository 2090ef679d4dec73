"""LV-ViT and the token labelling loss against the published implementation."""

import re

import pytest
import torch
from goldens import READ, Case, case_of, check_settings, close, files, models, read, settings

from tokenzoo.models import LVViT
from tokenzoo.training.token_label import TokenLabelLoss

LOSS_OF = ("cls", "aux", "target", "bbox")  # what a loss is recorded of


@models("lv_vit")
def test_model(file: str):
    tensors, meta = read(file)
    s = settings(meta["config"])
    check_settings(
        s, "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "p_emb", "skip_lam",
        "return_dense", "mix_token", "num_classes", "qkv_bias", "head_dim",
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
    assert set(expected) <= {name for name, value in found.items() if value is not None}
    for name, value in expected.items():
        close(found[name], value, 1e-5)


def _losses() -> list:
    """(file, prefix of the case or "", key of the loss) of every recorded loss, in files of models too."""
    found = []
    for file in files("lv_vit"):
        for key in read(file)[0]:
            match = re.fullmatch(r"(.*/)?loss/[\w.]+", key)
            if match:
                start = match.group(1) or ""
                READ.update((file, case_of(file, f"{start}{name}")) for name in (*LOSS_OF, "loss/"))
                found.append(pytest.param(file, start, key, id=f"{file}/{key}", marks=pytest.mark.golden))
    return found


@pytest.mark.parametrize("file,start,key", _losses())
def test_loss(file: str, start: str, key: str):
    tensors, meta = read(file)
    given = {name: tensors[f"{start}{name}"] for name in LOSS_OF}
    # a case may have settings of its own; those of a file stand under `case`
    s = Case(file, start[:-1]).settings if start and start[:-1] in meta else settings(meta["case"])
    check_settings(s, "B", "N", "classes", "bbox", "dense_weight", "cls_weight")
    target, truth, kind = given["target"], False, key.removeprefix(f"{start}loss/")
    if kind == "no_dense_labels":
        target = target[:, :, 1]
    else:
        assert kind.startswith("ground_truth_"), f"a loss that this test does not understand: {key}"
        truth = kind.endswith("True")
    loss = TokenLabelLoss(s["dense_weight"], s["cls_weight"], ground_truth=truth)
    output = given["cls"], given["aux"], tuple(given["bbox"].tolist())
    assert output[2] == tuple(s["bbox"])
    close(loss(output, target).reshape(1), tensors[key], 1e-5)
