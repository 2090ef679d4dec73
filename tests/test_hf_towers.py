"""What is special about single towers of transformers: padding, masking at random, position biases."""

import pytest
import torch
from cases import METHODS
from hf_cases import PATCHES, ask, build, given, images, transformers

import tokenzoo
from tokenzoo.adapters.wrappers import backbone_of


def padded():
    """Two images of a batch, the second one with padding on the right and below, and the mask that says so."""
    x, real = images(None, 2), torch.ones(2, 4, 4, dtype=torch.bool)
    real[1, 3:], real[1, :, 3:] = False, False
    return x, real, real[1].repeat_interleave(8, 0).repeat_interleave(8, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_padding_has_no_influence(tower, method):
    model = build(tower)
    x, real, seen = padded()
    plain = model(x, patch_attention_mask=real).last_hidden_state
    if method in ("ats", "pool"):
        pytest.skip("needs a class token; cells of the grid hold visible and hidden patches")
    if tokenzoo.method_class(method).kind == "attention":
        with tokenzoo.patched(model, given(method)), pytest.raises(ValueError, match="no attn_mask covers"):
            model(x, patch_attention_mask=real)
        return
    with tokenzoo.patched(model, given(method, "zero")):
        got = model(x, patch_attention_mask=real).last_hidden_state
        torch.testing.assert_close(got[real.flatten(1)], plain[real.flatten(1)], atol=1e-5, rtol=1e-5)
    tokenzoo.patch_model(model, given(method))
    other = x.clone()
    other[1] = torch.where(seen, x[1], torch.randn(3, 32, 32))
    visible, outs = None, []
    for pixels in (x, other):
        torch.manual_seed(5)
        embedded, mask = model._embedded(pixels, real), real.flatten(1)[:, None, None]
        for tokens in model.follow(model.begin(pixels, embedded, None, mask), None, mask):
            visible = tokens.visible
        outs.append(model._finish(tokens).x[visible])
        torch.manual_seed(5)
        last = model(pixels, patch_attention_mask=real).last_hidden_state
        assert torch.equal(last[visible], outs[-1])
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mae():
    """Without masking only; in the order of the grid, whatever upstream's shuffle would be."""
    model, x = build("mae"), images(None)
    shuffled = model(x)
    order = shuffled.ids_restore[..., None].expand(-1, -1, 32)
    plain = shuffled.last_hidden_state[:, 1:].gather(1, order)
    with tokenzoo.patched(model, "tome", r=0):
        out = model(x, noise=torch.rand(3, 16))
        torch.testing.assert_close(out.last_hidden_state[:, 1:], plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.ids_restore, torch.arange(16).expand(3, -1)) and not out.mask.any()
        larger = model(images(None, size=(48, 32)), interpolate_pos_encoding=True)
        assert larger.last_hidden_state.shape[1] == 25
    with pytest.raises(ValueError, match="doesn't match model"), tokenzoo.patched(model, "tome", r=0):
        model(images(None, size=(48, 32)))
    model.config.mask_ratio = 0.75
    with pytest.raises(ValueError, match=r"drops 75% of the patches at random .* model.config.mask_ratio = 0"):
        tokenzoo.patch_model(model, "tome", r=1)
    whole = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**PATCHES, decoder_hidden_size=32, decoder_num_attention_heads=2)
    )
    with pytest.raises(TypeError, match=r"ViTMAEForPreTraining is not a backbone .* give model\.vit instead"):
        tokenzoo.patch_model(whole, "tome", r=1)


@pytest.mark.parametrize("tower", ["beit", "beit_classes", "data2vec"])
def test_a_table_of_biases_has_no_other_places(tower):
    model = build(tower)
    for options in ({"protect": 2}, {"merged_positions": "mean"}):
        with pytest.raises(ValueError, match="adds a bias by the places of query and key"):
            tokenzoo.patch_model(model, "tome", r=1, **options)
    # the report says that something is added in front of any reduction, too
    model.config._attn_implementation = backbone_of(model).config._attn_implementation = "flash_attention_2"
    assert tokenzoo.report(model).rows[1].attention == "fused (sdpa)"


@pytest.mark.parametrize("tower", ["dinov3", "beit", "internvl", "beit_shared"])
@torch.no_grad()
def test_larger_images(tower):
    """Positions of every kind follow the size of the images."""
    model, x = build(tower), images(None, size=(48, 32))
    plain = ask(model, x, output_hidden_states=True)
    with tokenzoo.patched(model, "tome", r=0):
        for a, b in zip(ask(model, x, output_hidden_states=True).hidden_states, plain.hidden_states):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, "tome", r=3):
        report = tokenzoo.report(model, (48, 32))
        assert ask(model, x).last_hidden_state.shape[1] == report.tokens_out


@pytest.mark.parametrize("tower", ["dinov3", "internvl", "beit_plain"])
@torch.no_grad()
def test_added_tokens(tower):
    """Prompts behind the prefix stay, where a hook in front of layer 0 puts them."""
    model, x = build(tower), images(None)
    prompts = torch.randn(1, 2, 32)
    prefix = 4 if tower == "dinov3" else 1

    def add(module, args, out):
        return torch.cat([out[:, :prefix], prompts.expand(len(out), -1, -1), out[:, prefix:]], dim=1)

    if tower == "beit_plain":
        with pytest.raises(ValueError, match="no rows for added tokens"):
            tokenzoo.patch_model(model, "tome", r=2, protect=2)
        return
    model.embeddings.register_forward_hook(add)
    tokenzoo.patch_model(model, "tome", r=2, protect=2)
    out = model(x, output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [prefix + 18 - 2 * i for i in range(5)]


@torch.no_grad()
def test_maps_of_beit_for_decoders():
    """Segmentation heads lay hidden states out on the grid: these are complete, whatever is left inside."""
    config = transformers.BeitConfig(
        **PATCHES, num_labels=5, out_indices=[1, 2, 3, 4], pool_scales=[1], use_relative_position_bias=True
    )
    torch.manual_seed(0)
    model, x = transformers.BeitForSemanticSegmentation(config).eval(), images(None)
    plain = model(x).logits
    with tokenzoo.patched(model, "tome", r=0):
        torch.testing.assert_close(model(x).logits, plain, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, "tome", r=3):
        got = model(x, output_hidden_states=True)
        assert got.logits.shape == plain.shape and not torch.allclose(got.logits, plain)
    assert torch.equal(model(x).logits, plain)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_images_of_any_size_in_one_batch(method):
    """SigLIP 2: an image beside a larger one gives what it gives alone; methods that need one grid say so."""
    model, classes = build("siglip2"), build("siglip2_classes")
    shapes = torch.tensor([[4, 4], [2, 3]])
    patches, mask = torch.randn(2, 16, 192), torch.ones(2, 16, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    alone = {"pixel_values": patches[1:, :6], "pixel_attention_mask": mask[1:, :6], "spatial_shapes": shapes[1:]}
    plain, logits = model(**batch), classes(**batch).logits
    if method == "ats":
        with pytest.raises(ValueError, match="class token"):
            tokenzoo.patch_model(model, method)
        return
    uses = tokenzoo.create_method(method).uses_positions or method in ("cts", "sta", "flowcut", "reconstruct")
    with tokenzoo.patched(model, given(method)), tokenzoo.patched(classes, given(method)):
        if uses:
            with pytest.raises(ValueError, match="grids of their own|given patches"):
                model(**batch)
        else:
            got, scores = model(**batch), classes(**batch).logits
            assert got.pooler_output.isfinite().all() and not torch.allclose(
                got.pooler_output[0], plain.pooler_output[0]
            )
            if method in ("topk", "evit", "gtp", "dpcknn", "evo"):  # counts follow each image's own tokens
                torch.testing.assert_close(got.pooler_output[1:], model(**alone).pooler_output, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(scores[1:], classes(**alone).logits, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, "tome", r=0), tokenzoo.patched(classes, "tome", r=0):
        got = model(**batch)
        torch.testing.assert_close(got.pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(classes(**batch).logits, logits, atol=1e-5, rtol=1e-5)
        real = mask.bool()
        torch.testing.assert_close(got.last_hidden_state[real], plain.last_hidden_state[real], atol=1e-5, rtol=1e-5)
