"""ConViT: attention by content and place on the tokens that are left, and a class token that joins in between."""

import copy

import pytest
import timm
import torch
from cases import CONVIT, METHODS, build, given, images, serves
from timm.models.convit import GPSA, ConVit

import tokenzoo
from tokenzoo.adapters.convit.attention import relative_places
from tokenzoo.adapters.inspect import describe
from tokenzoo.ops.attention import Heads, attend, attention_received, attention_rows
from tokenzoo.ops.map_reading import map_statistics
from tokenzoo.ops.placed import GatedPlaces

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SERVED = [method for method in METHODS if serves(method, build("convit"))]


def written_out(attn, z, coords, bias):
    """GPSA of tokens z [B, N, C] at coordinates, with a bias of the keys, as a whole map [B, H, N, N]."""
    q, k = attn.qk(z).unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    content = (q @ k.transpose(2, 3) * attn.scale + bias).softmax(-1)
    apart = coords[:, None] - coords[:, :, None]
    features = torch.stack([apart[..., 1], apart[..., 0], apart.square().sum(-1)], dim=-1)
    place = (attn.pos_proj(features).permute(0, 3, 1, 2) + bias).softmax(-1)
    gate = attn.gating_param.sigmoid().view(1, -1, 1, 1)
    return (1 - gate) * content + gate * place


def coordinates(index, wide=4):
    return torch.stack([index // wide, index % wide], dim=-1).double()


@pytest.mark.parametrize("where", ["destination", "mean"])
@pytest.mark.parametrize("recipe", [{"method": "tome", "r": 3}, {"method": "random", "keep_rate": 0.6},
                                    {"method": "topk", "keep_rate": 0.6}], ids=lambda r: r["method"])  # fmt: skip
@torch.no_grad()
def test_is_attention_written_out(recipe, where):
    model = build("convit_avg").double()
    x = images(model).double()
    plain = copy.deepcopy(model)
    tokenzoo.patch_model(model, recipe, merged_positions=where)
    walked = list(model.walk(x, trace=True))
    for index in range(3):
        tokens, block = walked[index], plain.blocks[index]
        at = tokens.original_positions()
        coords = coordinates(at) if where == "destination" or index == 0 else tokens.coords.double()
        size = tokens.size if tokens.size is not None and model.tokenzoo_recipe.proportional else tokens.sizes() * 0 + 1
        bias = size.double().log().transpose(1, 2).unsqueeze(1)
        z = block.norm1(tokens.x)
        maps = written_out(block.attn, z, coords, bias)
        v = block.attn.v(z).unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
        h = tokens.x + block.attn.proj((maps @ v).transpose(1, 2).flatten(2))
        for step in walked[-1].trace:
            if step.block == index:
                h = step.map.inner.matrix().double() @ h  # the trace speaks of the class token by now
        h = h + block.mlp(block.norm2(h))
        torch.testing.assert_close(walked[index + 1].x, h, atol=1e-6, rtol=1e-6)
    entered, left = walked[4], walked[3]
    assert entered.length == left.length + 1 and torch.equal(entered.x[:, 1:], left.x)
    assert torch.equal(entered.x[:, :1], model.cls_token.expand(3, -1, -1)) and entered.layout.has_class


def test_places_are_timms_own():
    attn = GPSA(32, 2)
    coords = coordinates(torch.arange(25), 5)[None]
    torch.testing.assert_close(relative_places(coords).float(), attn.get_rel_indices(25))


@torch.no_grad()
def test_signals_read_the_mixed_map():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 70, 8) for _ in range(3))
    placed = GatedPlaces(torch.randn(2, 3, 70, 70), torch.rand(1, 3, 1, 1))
    heads = Heads(q, k, v, 0.3, fused=False, placed=placed)
    content, place = (q @ k.transpose(2, 3) * 0.3).softmax(-1), placed.logits.softmax(-1)
    whole = (1 - placed.gate) * content + placed.gate * place
    torch.testing.assert_close(attention_rows(heads, 10, 20), whole[:, :, 10:20], **CLOSE)
    torch.testing.assert_close(attention_received(heads), whole.mean((1, 2)), **CLOSE)
    torch.testing.assert_close(map_statistics(heads).own, whole.diagonal(0, 2, 3), **CLOSE)
    torch.testing.assert_close(attend(heads), (whole @ v).transpose(1, 2).flatten(2), **CLOSE)
    assign = torch.randint(70, (2, 90))
    lifted = placed.lifted(assign).logits
    assert torch.equal(lifted[1, 2, 5, 80], placed.logits[1, 2, assign[1, 5], assign[1, 80]])


@torch.no_grad()
def test_counts_on_the_way():
    model = build("convit")
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=[2, 2, 2, 0])
    report = tokenzoo.report(model)
    rows = [(row.tokens_in, row.tokens_out) for row in report.rows]
    assert rows == [(16, 16), (16, 14), (14, 12), (13, 11), (11, 11), (11, 11)]
    assert [t.length for t in model.walk(x)] == [16, 14, 12, 13, 11, 11]
    info = describe(model)
    assert info.sequence(1)[0].num_prefix == 0 and info.sequence(2) == (info.restarts[2], 4)
    tokenzoo.unpatch_model(model)
    solved = tokenzoo.patch_model(model, "tome", flops=0.7)
    assert tokenzoo.report(solved).ratio == pytest.approx(0.7, abs=0.05)
    tokenzoo.unpatch_model(model)
    span = [{"method": "cluster", "layers": 0, "where": "before", "scale": 0.5}, {"method": "reconstruct", "layers": 2}]
    with tokenzoo.patched(model, span):
        assert tokenzoo.report(model).tokens_out == 17 == model.forward_tokens(x).length


@torch.no_grad()
def test_intermediates_and_pruning():
    model = build("convit")
    x = images(model)
    tokenzoo.patch_model(model, "topk", keep_rate=0.5, layers=(1, 2))
    every = model.forward_intermediates(x, intermediates_only=True)
    short = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    assert [s.shape[1] for s in short] == [16, 8, 4, 4] and len(every) == 4
    (alone,) = model.forward_intermediates(x, [2], intermediates_only=True, stop_early=True)
    assert torch.equal(alone, every[2])
    if not hasattr(ConVit, "prune_intermediate_layers"):
        pytest.skip("the installed timm cannot prune ConViT")
    model.prune_intermediate_layers([0, 1], prune_head=True)
    assert model.cls_token is None and len(tokenzoo.report(model).rows) == 4
    pruned = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, every))


@pytest.mark.parametrize("method", SERVED)
def test_gradients_and_copies(method):
    model = build("convit").train()
    tokenzoo.patch_model(model, given(method, "static"))
    model(images(model)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model = model.eval()
    with torch.no_grad():
        x = images(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("method", SERVED)
@torch.no_grad()
def test_half_precision(method):
    if "rel_indices" not in dict(GPSA(32, 2).named_buffers()):
        pytest.skip("the installed timm runs ConViT in float32 alone")
    half = build("convit").bfloat16()
    x = images(half).bfloat16()
    plain = half(x)
    with tokenzoo.patched(half, given(method, "zero")):
        torch.testing.assert_close(half(x), plain, atol=0.06, rtol=0.06)


@torch.no_grad()
def test_released_shapes_and_a_head_of_its_own():
    model = timm.create_model("convit_tiny", depth=3, local_up_to_layer=2, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    tokenzoo.patch_model(model, "tome", r=3)
    assert model(x).shape == plain.shape and tokenzoo.report(model).attn_impl == "unfused"
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), **CLOSE)
    assert model(x).shape == (2, 5)


def test_compiled_and_exported():
    model = build("convit")
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected, **CLOSE)
        torch._dynamo.reset()
        dims = {"x": {0: torch.export.Dim("batch", min=1, max=16)}}
        program = torch.export.export(model, (x,), dynamic_shapes=dims, strict=False).module()
        more = images(model, batch=5, seed=4)
        torch.testing.assert_close(program(more), model(more), atol=1e-4, rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="ats .* class token"):
        tokenzoo.patch_model(build("convit"), "ats")
    with pytest.raises(ValueError, match="class token never enters"):
        tokenzoo.patch_model(CONVIT(local_up_to_layer=4), "tome", r=1)
    with pytest.raises(ValueError, match="4 x 6 patches; use square images"):
        tokenzoo.patch_model(CONVIT(img_size=(32, 48)), "tome", r=1)
    model = tokenzoo.patch_model(build("convit"), "tome", r=1)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        model(images(model), attn_mask=torch.ones(16, 16))


@torch.no_grad()
def test_blocks_by_hand():
    model = build("convit")
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=[2, 2, 0, 0])
    walked = list(model.walk(x))
    y = model.embed(x)[0]
    y = model.blocks[1](model.blocks[0](y))
    torch.testing.assert_close(y, walked[2].x, **CLOSE)
