"""The same weights in timm's and in transformers' classes give the same numbers under every method."""

import inspect
from functools import partial

import pytest
import torch
from cases import METHODS
from hf_cases import build, given, images, served
from timm.layers import QuickGELU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokenzoo

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
NORM = {"norm_layer": partial(nn.LayerNorm, eps=1e-5)}


def block(state, ours, theirs, names):
    """The weights of one layer under timm's names."""
    attention, out, norm1, norm2, scales = names
    found = {}
    for kind in ("weight", "bias"):
        found[f"{theirs}.attn.qkv.{kind}"] = torch.cat([state[f"{ours}.{attention}.{x}_proj.{kind}"] for x in "qkv"])
        pairs = {"attn.proj": f"{attention}.{out}", "norm1": norm1, "norm2": norm2}
        if f"{ours}.mlp.fc1.weight" in state:
            pairs |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        else:
            parts = [state[f"{ours}.mlp.{name}.{kind}"] for name in ("gate_proj", "up_proj")]
            found[f"{theirs}.mlp.fc1.{kind}"] = torch.cat(parts)
            pairs["mlp.fc2"] = "mlp.down_proj"
        for name, own in pairs.items():
            found[f"{theirs}.{name}.{kind}"] = state[f"{ours}.{own}.{kind}"]
    for index in (1, 2) if scales else ():
        found[f"{theirs}.ls{index}.gamma"] = state[f"{ours}.layer_scale{index}.lambda1"]
    return found


def loaded(model, state):
    model.load_state_dict(state, strict=True)
    return model.eval()


def plain(tower, classifier=None, scales=False, layers="layers", norms=("layernorm_before", "layernorm_after"), **more):
    """A ViT, or a DINOv2 tower."""
    state, kinds = tower.state_dict(), ("weight", "bias")
    new = {"pos_embed": state["embeddings.position_embeddings"], "cls_token": state["embeddings.cls_token"]}
    if "embeddings.register_tokens" in state:  # timm adds the position of the class token beforehand
        first, new["pos_embed"] = new["pos_embed"].split([1, 16], dim=1)
        new |= {"reg_token": state["embeddings.register_tokens"], "cls_token": new["cls_token"] + first}
        more |= {"reg_tokens": new["reg_token"].shape[1], "no_embed_class": True}
    new |= {f"patch_embed.proj.{k}": state[f"embeddings.patch_embeddings.projection.{k}"] for k in kinds}
    new |= {f"norm.{k}": state[f"layernorm.{k}"] for k in kinds}
    for index in range(4):
        new |= block(state, f"{layers}.{index}", f"blocks.{index}", ("attention", "o_proj", *norms, scales))
    if classifier is not None:
        new |= {f"head.{k}": classifier.state_dict()[k] for k in kinds}
    classes = 0 if classifier is None else classifier.out_features
    norm = {"norm_layer": partial(nn.LayerNorm, eps=tower.config.layer_norm_eps)}
    options = {**SHAPE, **norm, "num_classes": classes, "init_values": 1.0 if scales else None, **more}
    return loaded(VisionTransformer(**options), new)


def vit():
    ours = build("vit_classes")
    return ours, lambda x: ours(x).logits, plain(ours.vit, ours.classifier)


def dino(name, **more):
    ours = build(name)
    theirs = plain(ours, None, True, "encoder.layer", ("norm1", "norm2"), global_pool="token", **more)
    return ours, lambda x: ours(x).pooler_output, theirs


def clip():
    ours, kinds = build("clip"), ("weight", "bias")
    state = ours.state_dict()
    new = {
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
    }
    new |= {f"norm_pre.{k}": state[f"pre_layrnorm.{k}"] for k in kinds}
    new |= {f"norm.{k}": state[f"post_layernorm.{k}"] for k in kinds}
    names = ("self_attn", "out_proj", "layer_norm1", "layer_norm2", False)
    for index in range(4):
        new |= block(state, f"encoder.layers.{index}", f"blocks.{index}", names)
    theirs = VisionTransformer(**SHAPE, **NORM, pre_norm=True, act_layer=QuickGELU, num_classes=0)
    return ours, lambda x: ours(x).pooler_output, loaded(theirs, new)


def siglip():
    ours, kinds = build("siglip"), ("weight", "bias")
    state, width = ours.state_dict(), 32
    new = {"pos_embed": state["embeddings.position_embedding.weight"][None], "attn_pool.latent": state["head.probe"]}
    new |= {f"patch_embed.proj.{k}": state[f"embeddings.patch_embedding.{k}"] for k in kinds}
    new |= {f"norm.{k}": state[f"post_layernorm.{k}"] for k in kinds}
    names = ("self_attn", "out_proj", "layer_norm1", "layer_norm2", False)
    for index in range(4):
        new |= block(state, f"encoder.layers.{index}", f"blocks.{index}", names)
    for kind in kinds:
        packed = state[f"head.attention.in_proj_{kind}"]
        new |= {f"attn_pool.q.{kind}": packed[:width], f"attn_pool.kv.{kind}": packed[width:]}
        new[f"attn_pool.proj.{kind}"] = state[f"head.attention.out_proj.{kind}"]
        new[f"attn_pool.norm.{kind}"] = state[f"head.layernorm.{kind}"]
        new |= {f"attn_pool.mlp.{n}.{kind}": state[f"head.mlp.{n}.{kind}"] for n in ("fc1", "fc2")}
    options = {"class_token": False, "global_pool": "map", "num_classes": 0, "act_layer": partial(nn.GELU, "tanh")}
    theirs = VisionTransformer(**SHAPE, norm_layer=partial(nn.LayerNorm, eps=1e-6), **options)
    theirs.attn_pool.norm.eps = 1e-6
    theirs.attn_pool.mlp.act = nn.GELU("tanh")
    return ours, lambda x: ours(x).pooler_output, loaded(theirs, new)


def eva_like(state, ours, theirs, out, norms, scales):
    """The weights of one layer under the names of timm's eva.py and beit.py: biases of queries and values alone."""
    kinds = ("weight", "bias")
    found = {f"{theirs}.attn.qkv.weight": torch.cat([state[f"{ours}.{x}.weight"] for x in out[:3]])}
    found |= {f"{theirs}.attn.{x[0]}_bias": state[f"{ours}.{name}.bias"] for x, name in zip("q_v", out) if x != "_"}
    pairs = {"attn.proj": out[3], "norm1": norms[0], "norm2": norms[1], "mlp.fc1": out[4], "mlp.fc2": out[5]}
    found |= {f"{theirs}.{name}.{k}": state[f"{ours}.{own}.{k}"] for name, own in pairs.items() for k in kinds}
    return found | {f"{theirs}.gamma_{i}": state[f"{ours}.{name}"] for i, name in enumerate(scales, 1)}


def dinov3():
    ours = build("dinov3")
    state = ours.state_dict()
    new = {"cls_token": state["embeddings.cls_token"], "reg_token": state["embeddings.register_tokens"]}
    for kind in ("weight", "bias"):
        new |= {
            f"patch_embed.proj.{kind}": state[f"embeddings.patch_embeddings.{kind}"],
            f"norm.{kind}": state[f"norm.{kind}"],
        }
    names = [f"attention.{x}_proj" for x in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    scales = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    for index in range(4):
        new |= eva_like(state, f"model.layer.{index}", f"blocks.{index}", names, ("norm1", "norm2"), scales)
    options = {"num_reg_tokens": 3, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3"}
    options |= {
        "rope_rotate_half": True,
        "rope_temperature": 100,
        "no_embed_class": True,
        "num_classes": 0,
        "init_values": 1.0,
        "global_pool": "token",
    }
    theirs = Eva(**SHAPE, **NORM, **options, qkv_bias=True)
    missing = theirs.load_state_dict(new, strict=False)
    assert not missing.unexpected_keys and all("k_bias" in key or "rope" in key for key in missing.missing_keys)
    return ours, lambda x: ours(x).pooler_output, theirs.eval()


def beit(name="beit_classes", prefix="beit", layers="layers", names=None, bias="relative_position_bias", **more):
    ours, kinds = build(name), ("weight", "bias")
    state = {key.removeprefix(f"{prefix}."): value for key, value in ours.state_dict().items()}
    new = {"cls_token": state["embeddings.cls_token"]}
    new |= {f"patch_embed.proj.{k}": state[f"embeddings.patch_embeddings.projection.{k}"] for k in kinds}
    new |= {f"fc_norm.{k}": state[f"pooler.layernorm.{k}"] for k in kinds}
    new |= {f"head.{k}": state[f"classifier.{k}"] for k in kinds}
    names = names or [f"attention.{x}_proj" for x in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    norms, table = ("layernorm_before", "layernorm_after"), "relative_position_bias_table"
    for index in range(4):
        at = f"{layers}.{index}"
        new |= eva_like(state, at, f"blocks.{index}", names, norms, ("lambda_1", "lambda_2"))
        new[f"blocks.{index}.attn.{table}"] = state[f"{at}.{bias}.{table}"]
        if "encoder.relative_position_bias.relative_position_bias_table" in state:  # timm has one or the other
            new[f"blocks.{index}.attn.{table}"] = (
                new[f"blocks.{index}.attn.{table}"] + state[f"encoder.{bias[-22:]}.{table}"]
            )
    options = {"num_classes": 7, "init_values": 1.0, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    theirs = Beit(**SHAPE, norm_layer=partial(nn.LayerNorm, eps=1e-12), **options)
    missing = theirs.load_state_dict(new, strict=False)
    assert not missing.unexpected_keys and all("k_bias" in key or "index" in key for key in missing.missing_keys)
    return ours, lambda x: ours(x).logits, theirs.eval()


def data2vec():
    inner = [f"attention.attention.{x}" for x in ("query", "key", "value")]
    names = [*inner, "attention.output.dense", "intermediate.dense", "output.dense"]
    own = "attention.attention.relative_position_bias"
    return beit("data2vec_classes", "data2vec_vision", "encoder.layer", names, own)


PAIRS = {
    **({"dinov3": dinov3} if "rope_type" in inspect.signature(Eva).parameters else {}),  # from timm 1.0.20 on
    "beit": beit,
    "data2vec": data2vec,
    "vit": vit,
    "dinov2": partial(dino, "dinov2"),
    "dinov2_swiglu": partial(dino, "dinov2_swiglu", mlp_layer=SwiGLUPacked, mlp_ratio=3, act_layer=nn.SiLU),
    "registers": partial(dino, "registers"),
    "clip": clip,
    "siglip": siglip,
}


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_same_numbers(made, pair, method):
    if pair not in made:
        made[pair] = PAIRS[pair]()
    ours, call, theirs = made[pair]
    x = images(ours)
    if method is None:
        torch.testing.assert_close(call(x), theirs(x), atol=1e-5, rtol=1e-5)
        ratio = tokenzoo.report(ours).total / tokenzoo.report(theirs).total
        assert ratio == pytest.approx(1, rel=0.02)
    elif served(method, ours):
        with tokenzoo.patched(ours, given(method)), tokenzoo.patched(theirs, given(method)):
            torch.manual_seed(5)
            got = call(x)
            torch.manual_seed(5)
            torch.testing.assert_close(got, theirs(x), atol=1e-5, rtol=1e-5)
            rows = [
                [(row.methods, row.tokens_in, row.tokens_out, row.macs) for row in report.rows if row.block is not None]
                for report in map(tokenzoo.report, (ours, theirs))
            ]
            assert rows[0] == rows[1]


@pytest.mark.skipif("dinov3" not in PAIRS, reason="timm before 1.0.20")
@pytest.mark.parametrize("positions", ["destination", "mean"])
@torch.no_grad()
def test_rotary_positions_of_merged_tokens(positions):
    ours, call, theirs = dinov3()
    recipe = {"method": "tome", "r": 3, "merged_positions": positions}
    with tokenzoo.patched(ours, recipe), tokenzoo.patched(theirs, recipe):
        torch.testing.assert_close(call(images(ours)), theirs(images(ours)), atol=1e-5, rtol=1e-5)
        ours.train()
        ours.config.pos_embed_shift = 0.1
        if positions == "mean":
            with pytest.raises(ValueError, match="draws coordinates at random in training \\(pos_embed_shift"):
                ours(images(ours))
        else:
            ours(images(ours))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_towers_of_one_kind(method):
    """SigLIP without a head, Idefics3 and SmolVLM are the same tower; MAE's encoder and ViT are."""
    x = images(None)
    for names in (("siglip_headless", "idefics3", "smolvlm"), ("vit", "mae")):
        first, outs = build(names[0]), []
        for name in names:
            model = build(name)
            state = {key: value for key, value in first.state_dict().items() if key in model.state_dict()}
            model.load_state_dict(state)
            if not served(method, model):
                pytest.skip("needs a class token")
            tokenzoo.patch_model(model, given(method))
            torch.manual_seed(5)
            outs.append(model(x).last_hidden_state)
        for other in outs[1:]:
            torch.testing.assert_close(other, outs[0], atol=1e-5, rtol=1e-5)


def test_larger_images():
    """Positions follow the size of the image in both, whatever way each interpolates; counts do the same."""
    ours, _, theirs = dino("dinov2")
    theirs.set_input_size(img_size=(48, 64))
    for model in (ours, theirs):
        tokenzoo.patch_model(model, "tome", r=3)
    rows = [[row.tokens_out for row in tokenzoo.report(model, (48, 64)).rows] for model in (ours, theirs)]
    assert rows[0] == rows[1]
    assert ours.forward_tokens(images(ours, size=(48, 64))).length == rows[0][-2]
