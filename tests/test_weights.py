"""Weights of files on the command line: other sizes of image are fitted, anything else that differs is refused."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenzoo.apply.weights import load_weights
from tokenzoo.cli import main

TINY = {"patch_size": 8, "depth": 2, "num_classes": 4}


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "img_size": 32, **options}).eval()


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(vit().state_dict(), path)
    return str(path)


def test_position_embeddings_are_resampled(file, caplog):
    """As timm does with its released weights; everything else is taken as it is."""
    same, larger = vit(), vit(img_size=48)
    load_weights(same, file, "--checkpoint")
    assert not caplog.records
    load_weights(larger, file, "--checkpoint")
    assert "pos_embed was resized from [1, 17, 192] to [1, 37, 192]" in caplog.text
    for (name, one), other in zip(same.state_dict().items(), larger.state_dict().values()):
        assert name == "pos_embed" or torch.equal(one, other)
    expected = timm.layers.resample_abs_pos_embed(same.pos_embed.data, [6, 6], num_prefix_tokens=1)
    assert torch.equal(larger.pos_embed, expected)


@pytest.mark.parametrize(
    "options, what",
    [({"num_classes": 5}, "of another shape head.bias"), ({"depth": 3}, "missing blocks.2"), ({"depth": 1}, "unknown")],
)
def test_what_does_not_fit_is_refused(file, options, what):
    model = vit(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"--checkpoint .* does not fit VisionTransformer.*{what}.*--num-classes"):
        load_weights(model, file, "--checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_new_head_is_told(file, caplog):
    model = vit(num_classes=5)
    load_weights(model, file, "--initial-checkpoint", new_head=True)
    assert "have another number of classes and start anew" in caplog.text


def test_commands_take_weights_of_another_size(file, capsys):
    words = "bench --model vit_tiny_patch16_224 --num-classes 4 --model-kwargs patch_size=8 depth=2 --img-size 48"
    options = "--batch-size 1 --num-bench-iter 1 --num-warm-iter 1 --no-latency --no-progress"
    assert main([*words.split(), *options.split(), "--checkpoint", file]) == 0
    assert main([*words.split(), *options.split(), "--checkpoint", file + ".gone"]) == 2
    assert "does not exist" in capsys.readouterr().err
