"""What users of transformers ask of a model: outputs, masks, attention implementations, copies, gradients."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import METHODS
from hf_cases import FEW, TOWERS, answers, build, given, images, served, transformers, whole
from test_memory import Largest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenzoo
from tokenzoo.adapters.wrappers import backbone_of

few = pytest.mark.parametrize("tower", FEW)
methods = pytest.mark.parametrize("method", METHODS)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "tower,name",
    [
        ("vit", "layers.1"),
        ("vit_classes", "vit.layers.1"),
        ("dinov2", "encoder.layer.1"),
        ("clip_projected", "vision_model.encoder.layers.1"),
    ],
)
def test_names_are_those_of_the_model(tower, name):
    model = build(tower)
    model.get_submodule(name).attention = torch.nn.Identity()
    model.get_submodule(name).self_attn = torch.nn.Identity()
    with pytest.raises(TypeError, match=f"^{name} attends with torch.nn.modules.linear.Identity"):
        tokenzoo.patch_model(model, "tome", r=1)
    model = tokenzoo.patch_model(build(tower), "tome", r=1)
    assert tokenzoo.report(model).rows[2].name == name in str(tokenzoo.report(model))
    assert [row[0] for row in tokenzoo.count_macs(model, (3, 32, 32)).rows[1:3]] == [name, name.replace("1", "2")]
    with pytest.raises(ValueError, match=rf"^{name[:-1]}0 got a sequence of 5 tokens"):
        model.get_submodule(name[:-1] + "0")(torch.zeros(1, 5, 32))
    model = build(tower)
    model.get_submodule(name).forward = model.get_submodule(name).forward
    with pytest.raises(ValueError, match=rf"{type(model).__name__}\.{name}\.forward was set on the instance"):
        tokenzoo.patch_model(model, "tome", r=1)


def lengths(states):
    """Tokens of every hidden state, None for those that were not asked for."""
    return [None if state is None else state.shape[1] for state in states]


@torch.no_grad()
def test_outputs():
    """All forms of hidden states and of the answer, reduced and, with dense=True, in original places."""
    model, x = build("vit"), images(None)
    with tokenzoo.patched(model, "tome", r=3):
        out = model(x, output_hidden_states=True)
        assert lengths(out.hidden_states) == [17, 14, 11, 8, 5] and out.last_hidden_state.shape[1] == 5
        some = model(x, output_hidden_states=[0, -1]).hidden_states
        assert lengths(some) == [17, None, None, None, 5] and torch.equal(some[0], out.hidden_states[0])
        assert lengths(model(x, output_hidden_states=2).hidden_states) == [None, None, 11, None, None]
        assert lengths(model(x, output_hidden_states=[7, -9]).hidden_states) == [None] * 5
        model.config.output_hidden_states = True
        assert len(model(x).hidden_states) == 5
        model.config.output_hidden_states = False
        assert model(x).hidden_states is None and len(model(x, return_dict=False)) == 2
        pickle.dumps(model)  # nobody left hooks
        with pytest.raises(ValueError, match="ViTModel: output_attentions=True asks for the maps"):
            model(x, output_attentions=True)
        with pytest.raises(ValueError, match="bool_masked_pos is for training by masked patches"):
            model(x, bool_masked_pos=torch.zeros(3, 16, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"\(48\*48\) doesn't match model \(32\*32\); pass interpolate"):
            model(images(None, size=(48, 48)))
        with pytest.raises(ValueError, match="give pixel_values"):
            model()
    with tokenzoo.patched(model, "tome", r=3, dense=True):
        dense = model(x, output_hidden_states=True)
        assert [state.shape[1] for state in dense.hidden_states] == [17] * 5 and dense.last_hidden_state.shape[1] == 17
        close(dense.pooler_output, out.pooler_output)
        assign = torch.cat([s.map.assign for s in model.forward_tokens(x, trace=True).trace[:1]])
        close(dense.hidden_states[1], torch.gather(out.hidden_states[1], 1, assign[..., None].expand(-1, -1, 32)))


@pytest.mark.parametrize("tower", ["vit", "deit_classes", "dinov2", "clip", "siglip"])
@torch.no_grad()
def test_other_image_sizes(tower):
    model, x = build(tower), images(None, size=(48, 64))
    options = {} if tower == "dinov2" else {"interpolate_pos_encoding": True}
    plain = model(x, **options)
    with tokenzoo.patched(model, "tome", r=0):
        assert all(map(torch.equal, answers(model(x, **options)), answers(plain)))
    with tokenzoo.patched(model, "tome", r=2):
        got = model(x, output_hidden_states=True, **options)
        rows = [row.tokens_out for row in tokenzoo.report(model, (48, 64)).rows if row.block is not None]
        assert [state.shape[1] for state in got.hidden_states[1:]] == rows


@pytest.mark.parametrize("tower", ["dinov2_maps", "registers_maps"])
@torch.no_grad()
def test_feature_maps(tower):
    """On the full grid, each patch with the token that it went into; hidden states only if asked for."""
    model, x = build(tower), images(None)
    plain = model(x)
    tokenzoo.patch_model(model, "tome", r=2)
    out, tokens = model(x), model.forward_tokens(x, dense=True)
    assert [y.shape for y in out.feature_maps] == [y.shape for y in plain.feature_maps] and out.hidden_states is None
    last = model.lift_features(tokens)
    if tower == "dinov2_maps":
        last = last[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    close(out.feature_maps[-1], last)
    assert len(model(x, output_hidden_states=True).hidden_states) == 5


@few
@methods
@torch.no_grad()
def test_hidden_patches_have_no_influence(tower, method):
    """Through attention_mask, where the tower has one: pixels that it hides change nothing."""
    model, x = build(tower), images(None)
    tower = backbone_of(model)
    if not served(method, model) or tower.config.model_type not in ("vit", "dinov2"):
        pytest.skip("needs a class token")
    tokenzoo.patch_model(model, given(method))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[:, 13:] = 0  # the lowest row of patches
    other = x.clone()
    other[..., 24:, :] = torch.randn(3, 3, 8, 32)
    if tokenzoo.method_class(method).kind == "attention":
        with pytest.raises(ValueError, match="no attn_mask covers"):
            tower(x, attention_mask=mask)
        return
    if method == "pool":
        pytest.skip("cells of visible and hidden patches, see test_masks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = tower(x, attention_mask=mask).last_hidden_state
        torch.manual_seed(0)
        second = tower(other, attention_mask=mask).last_hidden_state
    close(first[:, 0], second[:, 0])


@torch.no_grad()
def test_attention_implementations():
    """sdpa, eager and a user's own; where log sizes cannot be handed over, sdpa runs, and the report says so."""
    calls = []

    def mine(module, q, k, v, mask, scaling=None, dropout=0.0, **kwargs):
        calls.append(mask)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("mine_for_a_test", mine)
    model, x = build("vit_classes"), images(None)
    expected, paths = None, {}
    try:
        for name in ("sdpa", "eager", "mine_for_a_test"):
            model.config._attn_implementation = model.vit.config._attn_implementation = name
            plain, calls[:] = model(x).logits, []
            with tokenzoo.patched(model, "tome", r=0):
                close(model(x).logits, plain, atol=1e-6)
            with tokenzoo.patched(model, "tome", r=3):
                got, calls[:] = model(x).logits, []
                expected = got if expected is None else expected
                close(got, expected)
                model(x)
                report = tokenzoo.report(model)
                paths[name] = [row.attention for row in report.rows if row.block is not None][:2], report.attn_impl
        assert calls == [None]  # layer 0, where all sizes are one
        assert paths == {
            "sdpa": (["fused (sdpa)", "fused (sdpa), log-size bias"], "fused"),
            "eager": (["unfused (eager)", "unfused (eager), log-size bias"], "unfused"),
            "mine_for_a_test": (["fused (mine_for_a_test)", "fused (sdpa), log-size bias"], "fused"),
        }
        model.vit.config._attn_implementation = "paged|sdpa"
        with pytest.raises(ValueError, match="ViTModel attends by 'paged|sdpa', .* set_attn_implementation"):
            tokenzoo.patch_model(model, "tome", r=3)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("mine_for_a_test")


@methods
@pytest.mark.parametrize("tower", ["registers_classes", "siglip_classes"])
def test_survives_copies_after_a_training_step(method, tower):
    model = build(tower).train()
    if not served(method, model):
        pytest.skip("needs a class token")
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x, labels=torch.tensor([1, 2, 3])).loss.backward()
    optimizer.step()
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(x).logits, model(x).logits)
            assert tokenzoo.recipe(other) == tokenzoo.recipe(model)
        fresh = build(tower)
        fresh.load_state_dict(model.state_dict())
        tokenzoo.unpatch_model(model)
        assert torch.equal(fresh(x).logits, model(x).logits)


@methods
@few
def test_checkpointed_gradients_are_equal(method, tower):
    grads = []
    for reentrant in (None, False, True):
        model = build(tower).train()
        if not served(method, model):
            pytest.skip("needs a class token")
        tokenzoo.patch_model(model, given(method))
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert all(backbone_of(model).checkpoints(index) for index in range(4))
        torch.manual_seed(3)
        sum(y.square().mean() for y in answers(model(images(model)))).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert grads[0].keys() == other.keys() and len(other) > 10
        for name, grad in grads[0].items():
            close(other[name], grad, msg=name)


@methods
def test_threads_share_one_model(method):
    model = tokenzoo.patch_model(build("dinov2_classes"), given(method))
    batches = [images(model, batch=b, seed=s) for s, b in enumerate((1, 2, 3, 4))]

    @torch.no_grad()
    def run(x):
        return [model(x, output_hidden_states=True).logits for _ in range(3)]

    alone = [run(x)[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for expected, outs in zip(alone, pool.map(run, batches)):
            assert all(torch.equal(out, expected) for out in outs)


@methods
@few
@torch.no_grad()
def test_lower_precision(method, tower):
    model = build(tower)
    if not served(method, model):
        pytest.skip("needs a class token")
    x = images(model)
    plain = model.bfloat16()(x.bfloat16())
    with tokenzoo.patched(model, given(method, "zero")):
        if method not in ("ats", "reconstruct"):
            for a, b in zip(answers(model(x.bfloat16())), answers(plain)):
                torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
    with tokenzoo.patched(model, given(method)):
        assert {y.dtype for y in answers(model(x.bfloat16()))} == {torch.bfloat16}
    model = build(tower)
    tokenzoo.patch_model(model, given(method, "static"))
    exact = answers(model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(answers(model(x)), exact):
            assert a.shape == b.shape and a.isfinite().all()


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
@torch.no_grad()
def test_whole_models(name):
    """The vision tower is reduced, with its pooled output right; the text tower is what it was."""
    model, x, text = whole(name), images(None), torch.tensor([[3, 4, 1, 0], [5, 6, 7, 1]])
    alone = copy.deepcopy(model.vision_model)
    plain, words = model(input_ids=text, pixel_values=x), model.get_text_features(text).pooler_output
    keys, text_classes = list(model.state_dict()), [type(m) for m in model.text_model.modules()]
    tokenzoo.patch_model(model, "tome", r=3)
    tokenzoo.patch_model(alone, "tome", r=3)
    assert [type(m) for m in model.text_model.modules()] == text_classes
    assert torch.equal(model.get_text_features(text).pooler_output, words)
    features = alone(x).pooler_output
    features = model.visual_projection(features) if name == "CLIP" else features
    assert torch.equal(model.get_image_features(x).pooler_output, features)
    out = model(input_ids=text, pixel_values=x)
    assert not torch.allclose(out.image_embeds, plain.image_embeds) and torch.equal(out.text_embeds, plain.text_embeds)
    assert tokenzoo.report(model).rows[1].name == "vision_model.encoder.layers.0" and list(model.state_dict()) == keys
    tokenzoo.unpatch_model(model)
    assert torch.equal(model(input_ids=text, pixel_values=x).logits_per_image, plain.logits_per_image)


@few
def test_hooks_see_what_they_saw(tower):
    """Layers hand out values, attention layers a tuple without a map, as unpatched ones do."""
    seen = {}
    for patched in (False, True):
        model = build(tower)
        if patched:
            tokenzoo.patch_model(model, "tome", r=0)
        layer = backbone_of(model).get_submodule("layers" if tower == "vit_classes" else "encoder")
        layer = next(m for m in layer.modules() if "Layer" in type(m).__name__ and hasattr(m, "mlp"))
        attn = next(m for name, m in layer.named_children() if name.endswith(("attention", "attn")))
        layer.register_forward_hook(lambda m, args, out, p=patched: seen.setdefault((p, "layer"), out))
        attn.register_forward_hook(lambda m, args, out, p=patched: seen.setdefault((p, "attn"), out))
        with torch.no_grad():
            model(images(model))
    assert torch.equal(seen[False, "layer"], seen[True, "layer"])
    assert len(seen[False, "attn"]) == len(seen[True, "attn"]) == 2
    assert torch.equal(seen[False, "attn"][0], seen[True, "attn"][0]) and seen[True, "attn"][1] is None


@torch.no_grad()
def test_no_map_is_stored():
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=128,
            patch_size=2,
        )
    ).eval()
    tokenzoo.patch_model(model, [{"method": "tome", "r": 500}, {"method": "topk", "keep_rate": 0.5, "layers": (1,)}])
    with Largest() as seen:
        model(torch.randn(1, 3, 128, 128))
    assert seen.elements < 4097 * 4097


@pytest.mark.parametrize("tower", TOWERS)
def test_classes_go_by_their_own_names(tower):
    """So that configurations, pipelines and PEFT take a patched model for what it is."""
    model = build(tower)
    names = [type(m).__name__ for m in model.modules()]
    tokenzoo.patch_model(model, "tome", r=1)
    assert [type(m).__name__ for m in model.modules()] == names
    assert "Reducing" in str(type(backbone_of(model)))
