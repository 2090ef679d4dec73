"""Adapters, quantised and offloaded layers of the libraries that users put around a model."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tables of the other tests
import scan_cases
from cases import build, given, images

import tokenzoo


@pytest.mark.parametrize("backbone", ["deit", "parallel_scaling", "eva02"])
def test_peft_adapters_are_their_merged_weights(backbone):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "in_proj", "q_proj", "v_proj"], init_lora_weights=False)
    plain = build(backbone)
    x, rows = images(plain, batch=2), {}
    for method in ("tome", "evit", "mctf"):
        torch.manual_seed(0)
        model = peft.get_peft_model(build(backbone), config).eval()
        inner = model.base_model.model
        tokenzoo.patch_model(inner, given(method))
        out, rows[method] = model(x), tokenzoo.report(inner).rows
        tokenzoo.unpatch_model(inner)
        merged = tokenzoo.patch_model(model.merge_and_unload(), given(method))
        torch.testing.assert_close(out, merged(x), atol=1e-4, rtol=1e-4)
        assert tokenzoo.report(merged).rows == rows[method]


def test_peft_adapters_that_timm_skips_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(build("eva_giant"), config).eval()
    inner = model.base_model.model
    x = images(inner, batch=2)
    tokenzoo.patch_model(inner, "tome", r=2)
    with pytest.raises(ValueError, match="peft.*qkv_bias_separate = True"):
        model(x)
    for block in inner.blocks:
        block.attn.qkv_bias_separate = True
    out = model(x)
    tokenzoo.unpatch_model(inner)
    merged = tokenzoo.patch_model(model.merge_and_unload(), "tome", r=2)
    torch.testing.assert_close(out, merged(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scanner", ["vim", "plain_mamba"])
def test_peft_adapters_of_models_that_scan(scanner):
    peft = pytest.importorskip("peft")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for target in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        model = peft.get_peft_model(scan_cases.build(scanner), config).eval()
        out = model(x)
        torch.testing.assert_close(out, model.merge_and_unload()(x), atol=1e-4, rtol=1e-4)


def test_torchao_weights():
    quantization = pytest.importorskip("torchao.quantization")
    model = tokenzoo.patch_model(build("deit"), given("mctf"))
    x = images(model, batch=2)
    with torch.no_grad():
        plain, rows = model(x), tokenzoo.report(model).rows
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert (model(x) - plain).norm() < 0.25 * plain.norm()
    assert tokenzoo.report(model).rows == rows


@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_offloaded_weights(method):
    accelerate = pytest.importorskip("accelerate")
    model = tokenzoo.patch_model(build("deit"), given(method))
    x = images(model, batch=2)
    with torch.no_grad():
        plain, rows = model(x), tokenzoo.report(model).rows
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(x), plain)
    assert tokenzoo.report(model).rows == rows


@pytest.mark.parametrize("scanner", ["vim", "plain_mamba"])
def test_offloaded_models_that_scan(scanner):
    accelerate = pytest.importorskip("accelerate")
    model = scan_cases.build(scanner)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
