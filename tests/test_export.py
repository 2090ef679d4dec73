"""Exported files answer as the model does, at batch sizes that were not checked; what fails leaves nothing behind."""

import pytest
import torch
from cases import EVERY, VIT, build, given, images

import tokenzoo
from tokenzoo.apply import export as exporting
from tokenzoo.apply.export import export

onnxruntime = pytest.importorskip("onnxruntime")


def small(method, layers):
    """Two blocks, with static shapes."""
    torch.manual_seed(0)
    model = VIT(depth=2).eval()
    more = {} if tokenzoo.create_method(method).place == "embed" else {"layers": layers}
    return tokenzoo.patch_model(model, given(method, "static", **more))


def onnx_run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def program_run(path, x):
    return torch.export.load(path).module()(x)


RUN = {".onnx": onnx_run, ".pt2": program_run}


@torch.no_grad()
def check(model, path, batch=5):
    x = images(model, batch, seed=7)
    torch.testing.assert_close(RUN[path.suffix](path, x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_with_any_batch(tmp_path, monkeypatch, method):
    # sizes, validity or a fused token meet a second reduction
    again = method in ("algm", "ats", "evit", "mctf", "tome")
    model, trace, programs = small(method, (0, 1) if again else (1,)), torch.export.export, []

    def once(*args, **kwargs):  # both formats start from the same program, which takes most of the time
        if not programs:
            programs.append(trace(*args, **kwargs))
        return programs[0]

    monkeypatch.setattr(torch.export, "export", once)
    for suffix in RUN:
        path = tmp_path / f"model{suffix}"
        done = export(model, path, images(model, 2))
        assert done.path == path and done.difference <= 1e-4 and done.batch_sizes == (2, 1)
        assert done.num_bytes == path.stat().st_size
        check(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]


@pytest.mark.parametrize("backbone,method", [
    *((backbone, method) for backbone in ("t2t_vit", "lv_vit") for method in ("tome", "evit", "mctf", "ats")),
    ("dinov2_like", "sta"),
])  # fmt: skip
def test_backbones_of_the_papers(tmp_path, backbone, method):
    model = build(backbone)
    tokenzoo.patch_model(model, given(method, "static"))
    export(model, tmp_path / "model.pt2", images(model, 2))
    check(model, tmp_path / "model.pt2", batch=3)


def test_rotary_model_with_a_composition(tmp_path):
    model = build("dinov3")
    tokenzoo.patch_model(
        model, [{"method": "evit", "tokens": 9, "layers": [1]}, {"method": "tome", "r": 2, "layers": [2]}]
    )
    export(model, tmp_path / "model.onnx", images(model, 1))
    check(model, tmp_path / "model.onnx")


def test_fixed_batch(tmp_path):
    model = small("topk", (1,))
    done = export(model, tmp_path / "model.pt2", images(model, 3), dynamic_batch=False)
    assert done.batch_sizes == (3, 3)
    check(model, tmp_path / "model.pt2", batch=3)
    with pytest.raises(Exception, match="3"):
        program_run(tmp_path / "model.pt2", images(model, 4))


def test_unpatched_model_can_be_exported_too(tmp_path):
    model = VIT(depth=1).eval()
    export(model, tmp_path / "model.pt2", images(model, 1))
    check(model, tmp_path / "model.pt2")


@pytest.mark.parametrize("differences", [(0.5, 0.0), (0.0, 0.5), (0.0, float("nan")), (float("nan"), 0.0)])
def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch, differences):
    model, path = VIT(depth=1).eval(), tmp_path / "model.pt2"
    path.write_text("what was there before")
    found = iter(differences)
    monkeypatch.setattr(exporting, "_difference", lambda actual, expected: next(found))
    with pytest.raises(ValueError, match="model.pt2 was not kept.*by up to (0.5|nan), more than atol=0.0001"):
        export(model, path, images(model, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"] and path.read_text() == "what was there before"


def test_differences_are_found():
    one = torch.tensor([[1.0, float("nan")]])
    assert exporting._difference(one, one) == 0
    assert exporting._difference(one, one + 0.25) == 0.25
    assert exporting._difference(one, one[:, :1]) == float("inf")
    assert exporting._difference(one, torch.tensor([[1.0, 1.0]])) != exporting._difference(one, one)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = VIT(depth=1).eval()

    def broken(program, path):
        path.write_text("half a file")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        export(model, tmp_path / "model.pt2", images(model, 2))
    assert not list(tmp_path.iterdir())


def test_counts_that_depend_on_images_are_refused(tmp_path):
    model = tokenzoo.patch_model(build("deit"), "ats", layers=(1,))
    with pytest.raises(ValueError, match="ats keeps as many tokens as the images ask for.*max_tokens"):
        export(model, tmp_path / "model.onnx", images(model, 2))
    tokenzoo.update_method(model, max_tokens=(None,))
    with pytest.raises(ValueError, match="max_tokens"):
        export(model, tmp_path / "model.pt2", images(model, 2))
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused(tmp_path, monkeypatch):
    model = VIT(depth=1).eval()
    x = images(model, 2)
    with pytest.raises(ValueError, match="model.pb does not end in .pt2 or .onnx"):
        export(model, tmp_path / "model.pb", x)
    with pytest.raises(ValueError, match="the folder .*nowhere does not exist"):
        export(model, tmp_path / "nowhere" / "model.pt2", x)
    with pytest.raises(ValueError, match=r"example_input has shape \(3, 32, 32\)"):
        export(model, tmp_path / "model.pt2", x[0])
    with pytest.raises(ValueError, match="VisionTransformer is in training mode; call model.eval"):
        export(VIT(depth=1), tmp_path / "model.pt2", x)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_ONNX_LIMIT", 1000)
        with pytest.raises(ValueError, match="2 GiB of an ONNX file; export to .pt2"):
            export(model, tmp_path / "model.onnx", x)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r"needs onnxscript; pip install tokenzoo\[onnx\]"):
        export(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_models_with_several_outputs_are_refused(tmp_path):
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="Pair returns tuple"):
        export(Pair().eval(), tmp_path / "model.pt2", torch.zeros(2, 3, 4, 4))
