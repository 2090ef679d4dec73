"""Models that scan in one compiled graph, in exported files, and in two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scan_cases import CORE, SCAN_METHODS, SCANNERS, build, given, images, shaken
from test_distributed import free_ports
from torch.nn.parallel import DistributedDataParallel

import tokenzoo
from tokenzoo.apply.export import export

# what a method does to a graph does not depend on the family; what the family does, one that merges shows
PAIRS = [*(("vim", method) for method in SCAN_METHODS), ("plain_mamba_depthwise", "tome")]
every = pytest.mark.parametrize("scanner,method", PAIRS)
# an export takes long, and the baselines make no maps that the others do not make
BASELINES = {"pool", "random", "uniform"}
exported = pytest.mark.parametrize("scanner,method", [pair for pair in PAIRS if pair[1] not in BASELINES])
cores = pytest.mark.parametrize("scanner", CORE)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(scanner, method=None, depth=2):
    """Nine patches and two blocks, so that what the first leaves meets the second."""
    torch.manual_seed(0)
    late = {"depthwise_layers": (depth - 1,)} if scanner.startswith("plain") else {}
    model = shaken(SCANNERS[scanner](img_size=24, depth=depth, **late))
    return model if method is None else tokenzoo.patch_model(model, given(method, "static"))


@every
@torch.no_grad()
def test_one_graph(scanner, method):
    model = small(scanner, method)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@cores
def test_compiled_gradients(scanner):
    """Forward and backward through the graph that autograd would be compiled from."""
    model = small(scanner, "tome").train()
    x = images(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(state)
    torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().mean().backward()
    assert len(expected) > 10
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@exported
@torch.no_grad()
def test_exported_files_take_any_batch(scanner, method, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, trace, programs = small(scanner, method), torch.export.export, []

    def once(*args, **kwargs):  # both formats start from the same program, which takes most of the time
        if not programs:
            programs.append(trace(*args, **kwargs))
        return programs[0]

    monkeypatch.setattr(torch.export, "export", once)
    for suffix in (".pt2", ".onnx"):
        done = export(model, tmp_path / f"model{suffix}", images(model, 2))
        assert done.difference <= 1e-4 and done.batch_sizes == (2, 1)
    x = images(model, 5, seed=7)
    expected = model(x)
    torch.testing.assert_close(program(tmp_path, x), expected, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@cores
@pytest.mark.parametrize("method", [None, "uniform"])
@torch.no_grad()
def test_an_exported_program_takes_any_batch(scanner, method, tmp_path):
    """The quick form of the same, on one block, which the unpatched model passes too."""
    model = small(scanner, depth=1)
    if method is not None:
        tokenzoo.patch_model(model, method, layers=(0,), keep_rate=0.5)
    export(model, tmp_path / "model.pt2", images(model, 2))
    x = images(model, 3, seed=7)
    torch.testing.assert_close(program(tmp_path, x), model(x), atol=1e-4, rtol=1e-4)


def program(folder, x):
    return torch.export.load(folder / "model.pt2").module()(x)


def gradients(scanner, method, rank=None, port=None):
    model = build(scanner)  # running statistics are not updated, those of half a batch would differ
    x = images(model, batch=4)
    tokenzoo.patch_model(model, given(method))
    if rank is None:
        model(x).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        wrapped = DistributedDataParallel(model)
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()


def worker(rank, port, rows, folder):
    torch.set_num_threads(1)
    for i, (scanner, method) in enumerate(rows):
        torch.save(gradients(scanner, method, rank, port + i), f"{folder}/{scanner}_{method}_{rank}.pt")


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    rows = [(scanner, method) for scanner in CORE for method in SCAN_METHODS]
    mp.spawn(worker, (free_ports(len(rows)), rows, str(tmp_path)), nprocs=2)
    for scanner, method in rows:
        expected = gradients(scanner, method)
        assert len(expected) > 10
        for rank in range(2):
            found = torch.load(tmp_path / f"{scanner}_{method}_{rank}.pt")
            assert found.keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4, msg=f"{scanner} {method} {name}")
