"""transformers around a patched model: files, pipelines, Trainer, PEFT, accelerate, compilers."""

import copy
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from hf_cases import DINO, FEW, PATCHES, answers, build, images, transformers
from PIL import Image
from torch import nn

import tokenzoo
from tokenzoo.adapters.wrappers import backbone_of

few = pytest.mark.parametrize("tower", FEW)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@few
@torch.no_grad()
def test_files_are_those_of_the_plain_model(tower, tmp_path):
    """save_pretrained of a patched model: names, architectures and weights as published; AutoModel reads them."""
    model, x = build(tower), images(None)
    model.save_pretrained(tmp_path / "plain")
    tokenzoo.patch_model(model, "tome", r=2)
    model.save_pretrained(tmp_path / "patched")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "patched")]
    assert configs[0] == configs[1] and configs[1]["architectures"] == [type(model).__name__]
    fresh = type(build(tower)).from_pretrained(tmp_path / "patched")
    assert not tokenzoo.is_patched(fresh)
    tokenzoo.patch_model(fresh, tokenzoo.recipe(model))
    assert all(map(torch.equal, answers(fresh(x)), answers(model(x))))
    auto = transformers.AutoModel.from_pretrained(tmp_path / "patched")
    assert tokenzoo.is_patched(tokenzoo.patch_model(auto, "tome", r=2))


def processor():
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


@torch.no_grad()
def test_pipelines():
    model, picture = build("dinov2_classes"), Image.new("RGB", (40, 50), (200, 10, 90))
    tokenzoo.patch_model(model, "evit", keep_rate=0.6)
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor())
    scores = {row["label"]: row["score"] for row in classify(picture, top_k=7)}
    logits = model(**processor()(picture, return_tensors="pt")).logits.softmax(-1)[0]
    for label, index in model.config.label2id.items():
        assert scores[label] == pytest.approx(float(logits[index]), abs=1e-5)
    tower = tokenzoo.patch_model(build("vit"), "tome", r=3)
    features = transformers.pipeline("image-feature-extraction", model=tower, image_processor=processor())
    assert len(features(picture)[0]) == 5


@pytest.mark.parametrize("tower,method", [("vit_classes", "tome"), ("dinov2_classes", "evit")])
def test_trainer(tower, method, tmp_path):
    """Two steps, with checkpointed activations; the weights that it writes are those of the plain class."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"pixel_values": images(None, 1, index)[0], "labels": index % 7, "name": "dropped"}

    results = []
    for checkpointing in (False, True):
        model = tokenzoo.patch_model(build(tower), method, **({"r": 2} if method == "tome" else {}))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
            gradient_checkpointing=checkpointing, use_cpu=True, learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
        before = copy.deepcopy(model.state_dict())
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert trainer.evaluate()["eval_loss"] > 0
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in results[0].items():
        close(results[1][name], value, msg=name)
    trainer.save_model(str(tmp_path / "last"))
    assert json.loads((tmp_path / "last" / "config.json").read_text())["architectures"] == [type(model).__name__]
    fresh = type(build(tower)).from_pretrained(tmp_path / "last")
    tokenzoo.unpatch_model(model.eval())
    with torch.no_grad():
        close(fresh(images(None)).logits, model(images(None)).logits)


@few
def test_peft(tower):
    """LoRA before and after patching; the adapters learn, and switching them off gives the model without them."""
    peft = pytest.importorskip("peft")
    model, x = build(tower), images(None)
    expected = answers(tokenzoo.patch_model(copy.deepcopy(model), "tome", r=2)(x))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    first = copy.deepcopy(model)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(first, config)
    tokenzoo.patch_model(wrapped, "tome", r=2)
    torch.manual_seed(0)
    second = peft.get_peft_model(tokenzoo.patch_model(model, "tome", r=2), config)
    for made in (wrapped, second):
        assert tokenzoo.is_patched(made) and "layer" in tokenzoo.report(made).rows[1].name
        out = answers(made(x))
        assert not torch.allclose(out[0], expected[0], atol=1e-3)
        sum(y.square().mean() for y in out).backward()
        grads = [p.grad for name, p in made.named_parameters() if "lora" in name]
        assert len(grads) == 16 and all(grad is not None for grad in grads)
        with torch.no_grad(), made.disable_adapter():
            close(answers(made(x))[0], expected[0])
    with torch.no_grad():
        close(answers(wrapped(x))[0], answers(second(x))[0])


def spread(model):
    """A device map: the last layers on disk, everything else in memory."""
    where = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{above}.") for above in where) and not isinstance(module, nn.ModuleList):
            layer = name.rpartition(".")[2].isdigit()
            if layer or not any("layer" in inner for inner, _ in module.named_modules()) or name.endswith("head"):
                where[name] = "disk" if layer and name[-1] in "23" else "cpu"
    return where


@few
@torch.no_grad()
def test_device_maps(tower, tmp_path):
    """Offloaded layers give the same numbers: accelerate's hooks in front of them follow their classes."""
    pytest.importorskip("accelerate")
    model, x = build(tower), images(None)
    plain = answers(model(x))
    model.save_pretrained(tmp_path)
    options = {"device_map": spread(model), "offload_folder": tmp_path / "disk"}
    offloaded = type(model).from_pretrained(tmp_path, **options)
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    tokenzoo.patch_model(model, "tome", r=2)
    tokenzoo.patch_model(offloaded, "tome", r=2)
    assert all(map(torch.equal, answers(offloaded(x)), answers(model(x))))
    tokenzoo.unpatch_model(offloaded)
    assert all(map(torch.equal, answers(offloaded(x)), plain))
    block = backbone_of(offloaded).get_submodule(backbone_of(model).layers_path)[1]
    block._old_forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"1\.forward was set on the instance \(by accelerate's AlignDevicesHook"):
        tokenzoo.patch_model(offloaded, "tome", r=2)


@pytest.mark.parametrize("tower,method", [("vit_classes", "tome"), ("siglip", "tome"), ("dinov2_classes", "evit")])
@torch.no_grad()
def test_one_graph(tower, method):
    model, x = build(tower), images(None)
    tokenzoo.patch_model(model, "topk" if method == "evit" else method, **({} if method == "evit" else {"r": 2}))
    expected = answers(model(x))

    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return answers(self.model(x))

    compiled = torch.compile(Answers(), fullgraph=True, backend="eager")
    for got, want in zip(compiled(x), expected):
        close(got, want)
    exported = torch.export.export(Answers(), (x,)).module()
    for got, want in zip(exported(x), expected):
        close(got, want)


@torch.no_grad()
def test_comparisons():
    """`bench` and `evaluate` take classifiers of transformers as they take timm's."""
    from tokenzoo.evaluation import Run, bench, evaluate

    model, x = build("dinov2_classes"), images(None, 4)
    runs = [Run("tome", {"r": 2}), Run("ats", {"layers": [1]})]
    rows = bench(model, runs, batch_size=2, rounds=1, warmup=1, latency=False)
    assert [row.tokens_out for row in rows[:2]] == [17, 9] and rows[2].tokens_out < 17
    assert rows[0].input_size == (3, 32, 32) and rows[1].gmacs < rows[0].gmacs
    labels = model(x).logits.argmax(1)
    scores = evaluate(model, runs, [(x, labels)])
    assert scores[0].top1.mean == 100 and [score.n_images for score in scores] == [4] * 3
    assert not tokenzoo.is_patched(model)


@torch.no_grad()
def test_pictures_and_relevance():
    """Token maps and explanations read towers as they read timm's models."""
    from tokenzoo.view.maps import token_maps

    model, x = build("dinov2"), images(None, 1)
    tokenzoo.patch_model(model, "tome", r=2)
    maps = token_maps(model, x)
    assert maps.grid == (4, 4) and len(maps.blocks) == 4


def test_older_versions_are_left_alone():
    """A version that the families were not written for is told of, and is no reason to refuse other models."""
    code = """
import importlib.metadata, transformers, tokenzoo
importlib.metadata.version = lambda name: "4.57.1"
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
try:
    tokenzoo.patch_model(transformers.ViTModel(transformers.ViTConfig(**sizes)), "tome", r=1)
except TypeError as error:
    assert "ViTModel is not a backbone" in str(error)
assert "transformers" not in tokenzoo.list_backbones() and "eva" in tokenzoo.list_backbones()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "models of transformers are not served: transformers 4.57.1 is older than 5.18" in done.stderr


@torch.no_grad()
def test_towers_that_others_hold():
    """Feature maps for depth, all tokens in their places for a language model: what follows sees nothing missing."""
    torch.manual_seed(0)
    vision = {**DINO, "out_features": ["stage2", "stage4"], "reshape_hidden_states": False, "apply_layernorm": True}
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**vision), reassemble_hidden_size=32, patch_size=8,
        reassemble_factors=[4, 2], neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    model, x = transformers.DepthAnythingForDepthEstimation(config).eval(), images(None)
    plain = model(x).predicted_depth
    with pytest.raises(TypeError, match=r"give model\.backbone instead"):
        tokenzoo.patch_model(model, "tome", r=2)
    with tokenzoo.patched(model.backbone, "tome", r=0):
        close(model(x).predicted_depth, plain)
    with tokenzoo.patched(model.backbone, "tome", r=3):
        assert model(x).predicted_depth.shape == plain.shape

    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        num_key_value_heads=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**PATCHES), text_config=text, image_token_index=39
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[39] * 16, 5, 6]])
    plain = model(input_ids=ids, pixel_values=x[:1]).logits
    with tokenzoo.patched(model.model.vision_tower, "tome", r=0, dense=True):
        close(model(input_ids=ids, pixel_values=x[:1]).logits, plain)
    with tokenzoo.patched(model.model.vision_tower, "tome", r=3, dense=True):
        got = model(input_ids=ids, pixel_values=x[:1]).logits
        assert got.shape == plain.shape and not torch.allclose(got, plain)


@torch.no_grad()
def test_the_tower_may_be_undone_by_itself():
    model, x = build("dinov2_classes"), images(None)
    plain, cls = model(x).logits, type(model)
    tokenzoo.patch_model(model, "tome", r=2)
    tokenzoo.unpatch_model(model.dinov2)
    assert torch.equal(model(x).logits, plain) and not tokenzoo.is_patched(model)
    tokenzoo.unpatch_model(tokenzoo.patch_model(model, "tome", r=2))
    assert type(model) is cls and torch.equal(model(x).logits, plain)
