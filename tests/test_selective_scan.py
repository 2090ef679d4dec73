"""Selective scan, causal convolution and gap-decaying steps: properties, gradients, refusals, compilation."""

import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenzoo.layers import RMSNorm, causal_conv1d, choose_backend, gaps_of, scan_backend, selective_scan, stretch
from tokenzoo.layers.scan.backends import BACKENDS
from tokenzoo.layers.scan.tiles import PANEL

CPU = ("blocked", "chunked", "loop")
LENGTHS = (1, 2, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5)


def arguments(batch=2, dim=6, length=9, states=3, groups=1, seed=0, dtype=torch.float64, options=True, constant=False):
    """Random arguments of a scan whose states stay small."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    shape = (batch, groups, states, length) if groups > 1 else (batch, states, length)
    shape = (dim, states) if constant else shape
    found = {
        "u": normal(batch, dim, length), "delta": normal(batch, dim, length), "A": -normal(dim, states).exp(),
        "B": normal(*shape), "C": normal(*shape), "delta_softplus": True,
    }  # fmt: skip
    if options:
        found |= {
            "D": normal(dim), "z": normal(batch, dim, length), "delta_bias": normal(dim),
            "initial_state": normal(batch, dim, states), "decay_dt": normal(batch, dim, length).exp(),
        }  # fmt: skip
    return found


def reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
              decay_dt=None):  # fmt: skip
    """The card's equations with one Python loop over every axis but the batch, in float64."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    (batch, dim, length), states = u.shape, A.shape[1]
    out, last = [], []
    for d in range(dim):

        def parameter(x, d=d):
            if x.dim() == 2:
                return x[d][None, :, None].expand(batch, -1, length)
            return x if x.dim() == 3 else x[:, d // (dim // x.shape[1])]

        rows, b, c = [], parameter(B), parameter(C)
        h = u.new_zeros(batch, states) if initial_state is None else initial_state[:, d].double()
        for t in range(length):
            dt = delta[:, d, t]
            if delta_bias is not None:
                dt = dt + delta_bias[d].double()
            if delta_softplus:
                dt = F.softplus(dt)
            decay = dt if decay_dt is None else decay_dt[:, d, t].double()
            h = torch.exp(decay[:, None] * A[d]) * h + (dt * u[:, d, t])[:, None] * b[:, :, t]
            y = (c[:, :, t] * h).sum(1)
            if D is not None:
                y = y + D[d].double() * u[:, d, t]
            rows.append(y if z is None else y * F.silu(z[:, d, t].double()))
        out.append(torch.stack(rows, 1))
        last.append(h)
    return torch.stack(out, 1), torch.stack(last, 1)


def run(values, backend, **changes):
    return selective_scan(**{**values, **changes}, return_last_state=True, backend=backend)


@pytest.mark.parametrize("backend", CPU)
@given(
    batch=st.integers(1, 3), per_group=st.integers(1, 3), groups=st.sampled_from([1, 2, 3]),
    length=st.sampled_from(LENGTHS), states=st.integers(1, 5), options=st.booleans(), softplus=st.booleans(),
    constant=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_equals_the_equations(backend, batch, per_group, groups, length, states, options, softplus, constant, seed):
    values = arguments(batch, per_group * groups, length, states, groups, seed, options=options, constant=constant)
    if not softplus:
        values |= {"delta": values["delta"].abs(), "delta_softplus": False}
        values.pop("delta_bias", None)
    out, last = run(values, backend)
    expected, expected_last = reference(**values)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(last, expected_last, atol=1e-9, rtol=1e-9)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    out, last = run(single, backend)
    assert out.dtype == last.dtype == torch.float32
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out.double() / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 5, PANEL + 2])
def test_gradients_of_every_argument(backend, groups, length):
    values = arguments(2, 4, length, 3, groups)
    tensors = {k: v.requires_grad_() for k, v in values.items() if isinstance(v, torch.Tensor)}

    def gradients(result):
        out, last = result
        total = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + last.square().sum()
        return torch.autograd.grad(total, list(tensors.values()))

    for name, found, expected in zip(tensors, gradients(run(values, backend)), gradients(reference(**values))):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [True, False])
def test_gradcheck(options):
    values = arguments(1, 4, 5, 2, 2, options=options)
    names = [k for k, v in values.items() if isinstance(v, torch.Tensor)]
    tensors = [values[name].requires_grad_() for name in names]

    def scan(*given):
        return run({**dict(zip(names, given)), "delta_softplus": True}, "blocked")

    assert torch.autograd.gradcheck(scan, tensors)


def test_gradient_of_the_last_state_alone():
    values = arguments(options=False)
    found, expected = [], []
    for grads, result in ((found, lambda: run(values, "blocked")), (expected, lambda: reference(**values))):
        values["u"].requires_grad_()
        grads += torch.autograd.grad(result()[1].sum(), values["u"])
    torch.testing.assert_close(found, expected)


def test_gradients_across_tiles(monkeypatch):
    values = arguments(3, 12, PANEL + 3, 3, 2)
    tensors = [v.requires_grad_() for v in values.values() if isinstance(v, torch.Tensor)]
    expected = run(values, "loop")
    wanted = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), tensors)
    for states in (48, 3 * 8 * 6, 3 * 16 * 12):  # part of a group, one group, several rows
        monkeypatch.setattr("tokenzoo.layers.scan.tiles._STATES", states)
        out = run(values, "blocked")
        found = torch.autograd.grad(out[0].square().sum() + out[1].sum(), tensors)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8)


def test_keeps_inputs_and_few_states():
    batch, dim, length, states = 2, 8, 8 * PANEL, 4
    values = arguments(batch, dim, length, states, options=False)
    values["u"].requires_grad_()
    sizes = {}

    def note(x):
        sizes[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run(values, "blocked")
    inputs = sum(v.numel() for v in values.values() if isinstance(v, torch.Tensor))
    assert sum(sizes.values()) <= inputs + batch * dim * length * states // PANEL


@pytest.mark.parametrize("backend", CPU)
@given(cut=st.integers(1, 2 * PANEL + 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_a_split_goes_on_from_the_last_state(backend, cut, seed):
    values = arguments(length=2 * PANEL + 5, seed=seed)
    whole, last = run(values, backend)
    streams = ("u", "delta", "B", "C", "z", "decay_dt")
    first = {k: values[k][..., :cut] for k in streams}
    second = {k: values[k][..., cut:] for k in streams}
    out, state = run(values, backend, **first)
    rest, end = run(values, backend, **second, initial_state=state)
    torch.testing.assert_close(torch.cat([out, rest], -1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("backend", CPU)
def test_is_causal_and_linear_in_u(backend):
    values = arguments(length=PANEL + 7, options=False)
    out = selective_scan(**values, backend=backend)
    changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][..., PANEL:] += 1
    later = selective_scan(**changed, backend=backend)
    assert torch.equal(out[..., :PANEL], later[..., :PANEL]) and not torch.equal(out, later)
    twice = selective_scan(**{**values, "u": 2 * values["u"] + 1}, backend=backend)
    ones = selective_scan(**{**values, "u": torch.ones_like(values["u"])}, backend=backend)
    torch.testing.assert_close(twice, 2 * out + ones)


@pytest.mark.parametrize("backend", CPU)
def test_steps_of_zero_keep_and_large_steps_forget(backend):
    values = arguments(options=False, length=40)
    values |= {"delta_softplus": False, "initial_state": torch.randn(2, 6, 3, dtype=torch.float64)}
    _, last = run(values, backend, delta=torch.zeros_like(values["delta"]))
    torch.testing.assert_close(last, values["initial_state"])
    large = torch.full_like(values["delta"], 1e4)
    out, last = run(values, backend, delta=large)
    assert out.isfinite().all()
    torch.testing.assert_close(last, 1e4 * values["u"][..., -1, None] * values["B"][:, None, :, -1])


@pytest.mark.parametrize("backend", CPU)
def test_groups_are_scans_of_their_own(backend):
    values = arguments(dim=6, groups=2, length=20)
    out, last = run(values, backend)
    for group, part in enumerate((slice(0, 3), slice(3, 6))):
        cut = {k: values[k][:, part] for k in ("u", "delta", "z", "initial_state", "decay_dt")}
        cut |= {k: values[k][part] for k in ("A", "D", "delta_bias")} | {k: values[k][:, group] for k in "BC"}
        alone, state = run({"delta_softplus": True, **cut}, backend)
        torch.testing.assert_close(alone, out[:, part])
        torch.testing.assert_close(state, last[:, part])


def test_one_of_b_and_c_may_have_more_groups():
    values = arguments(dim=8, groups=4)
    values["C"] = values["C"][:, 0]
    torch.testing.assert_close(run(values, "blocked"), reference(**values), atol=1e-9, rtol=1e-9)
    values["B"] = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(run(values, "blocked"), reference(**values), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_comes_in(backend, dtype):
    values = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments(length=PANEL + 3).items()}
    exact = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    values["u"].requires_grad_()
    out, last = run(values, backend)
    expected, expected_last = run(exact, "loop")
    assert out.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(last, expected_last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, expected.to(dtype), atol=1e-2, rtol=1e-2)
    out.float().sum().backward()
    assert values["u"].grad.dtype == dtype
    with torch.autocast("cpu", dtype):
        mixed, state = run({**exact, "u": exact["u"].requires_grad_()}, backend)
        mixed.sum().backward()
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, expected_last, atol=1e-4, rtol=1e-4)


def test_layouts_of_memory_do_not_matter():
    values = arguments(length=40, groups=2)
    strided = {
        k: v.transpose(1, -1).contiguous().transpose(1, -1) if isinstance(v, torch.Tensor) and v.dim() > 2 else v
        for k, v in values.items()
    }
    torch.testing.assert_close(run(values, "blocked"), run(strided, "blocked"), atol=1e-12, rtol=1e-12)
    assert run(values, "blocked")[0].transpose(1, 2).is_contiguous()


def test_an_empty_batch_passes():
    values, whole = arguments(groups=2), ("A", "D", "delta_bias", "delta_softplus")
    values = {k: v if k in whole else v[:0] for k, v in values.items()}
    for backend in CPU:
        out, last = run(values, backend)
        assert out.shape == (0, 6, 9) and last.shape == (0, 6, 3)


def test_shapes_alone_can_be_computed():
    values = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments(groups=2).items()}
    out, last = run(values, None)
    assert out.shape == (2, 6, 9) and last.shape == (2, 6, 3) and out.is_meta


def test_traces_at_another_batch():
    mixer, x = Mixer().eval(), torch.randn(2, 11, 8)
    with torch.no_grad():
        traced = torch.jit.trace(mixer, (x,))
        many = torch.randn(5, 11, 8)
        torch.testing.assert_close(traced(many), mixer(many))


@pytest.mark.parametrize("constant", [False, True])
def test_the_kernel_of_mamba_ssm_gets_what_it_takes(monkeypatch, constant):
    from tokenzoo.layers.scan.mamba_ssm import mamba_ssm_scan

    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert u.dtype == delta.dtype == z.dtype == torch.bfloat16 and return_last_state
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert B.dtype == C.dtype == (torch.float32 if constant else torch.bfloat16)
        out, last = reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return out.to(u.dtype), last

    values = arguments(groups=2, constant=constant)
    del values["initial_state"], values["decay_dt"]
    values["u"] = values["u"].bfloat16()
    interface = "mamba_ssm.ops.selective_scan_interface"
    for name in ("mamba_ssm", "mamba_ssm.ops", interface):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[interface].selective_scan_fn = kernel
    out, last = mamba_ssm_scan(**values)
    expected, state = reference(**values)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(last.double(), state, atol=3e-2, rtol=3e-2)


def test_threads_get_their_own_results():
    values, results = [arguments(seed=seed, length=70) for seed in range(4)], {}
    expected = [run(v, "loop")[0] for v in values]

    def work(index):
        results[index] = [run(values[index], "blocked")[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, out in results.items():
        for found in out:
            torch.testing.assert_close(found, expected[index])


def test_checkpointing_gives_equal_gradients():
    values = arguments(length=40, options=False)
    values["u"].requires_grad_()
    plain = torch.autograd.grad(selective_scan(**values).square().sum(), values["u"])
    again = checkpoint(lambda u: selective_scan(**{**values, "u": u}), values["u"], use_reentrant=False)
    assert torch.equal(plain[0], torch.autograd.grad(again.square().sum(), values["u"])[0])


def test_the_backend_is_visible_and_can_be_forced():
    values = arguments()
    u = values["u"]
    assert choose_backend(u) == "blocked" and choose_backend(u.to("meta")) == "chunked"
    exact = selective_scan(**values, backend="loop")
    for name in CPU:
        with scan_backend(name):
            assert choose_backend(u) == name
            with scan_backend("loop"):
                assert choose_backend(u) == "loop"
            assert choose_backend(u) == name
            torch.testing.assert_close(selective_scan(**values), exact)
    assert choose_backend(u) == "blocked"
    with pytest.raises(RuntimeError, match="stop"), scan_backend("chunked"):
        raise RuntimeError("stop")
    assert choose_backend(u) == "blocked"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"u": torch.zeros(6, 9)}, r"u is \(6, 9\); give \[B, D, L\]"),
        ({"u": torch.zeros(2, 6, 0)}, "at least one channel and step"),
        ({"delta": torch.zeros(2, 6, 8)}, r"delta is \(2, 6, 8\); give \[2, 6, 9\]"),
        ({"z": torch.zeros(2, 5, 9)}, r"z is \(2, 5, 9\)"),
        ({"decay_dt": torch.zeros(1, 6, 9)}, r"decay_dt is \(1, 6, 9\)"),
        ({"A": torch.zeros(5, 3)}, r"A is \(5, 3\); give \[6, N\]"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A is complex .* give a real A"),
        ({"B": torch.zeros(2, 3, 9, dtype=torch.complex64)}, "B is complex"),
        ({"B": torch.zeros(2, 3, 8)}, r"B is \(2, 3, 8\); give \[2, 3, 9\]"),
        ({"C": torch.zeros(2, 4, 3, 9)}, "its 4 groups do not divide the 6 channels"),
        ({"B": torch.zeros(2, 2, 3, 9), "C": torch.zeros(2, 3, 3, 9)}, "B has 2 groups and C 3"),
        ({"C": torch.zeros(3)}, r"C is \(3,\)"),
        ({"D": torch.zeros(5)}, r"D is \(5,\); give \[6\]"),
        ({"delta_bias": torch.zeros(6, 1)}, r"delta_bias is \(6, 1\)"),
        ({"initial_state": torch.zeros(2, 3, 6)}, r"initial_state is \(2, 3, 6\); give \[2, 6, 3\]"),
        ({"u": torch.zeros(2, 6, 9, dtype=torch.int64)}, "u is torch.int64; convert"),
        ({"A": torch.zeros(6, 3, device="meta")}, "A is on meta, u on cpu; move A to cpu"),
        ({"backend": "fast"}, "backend 'fast' is unknown; choose one of blocked"),
        ({"backend": "triton"}, "'triton' needs (CUDA tensors|the package)"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' needs"),
    ],
)
def test_refusals_name_argument_shape_and_remedy(changes, words):
    with pytest.raises(ValueError, match=words):
        selective_scan(**{**arguments(dtype=torch.float32), **changes})


def test_refusal_of_an_unknown_forced_backend():
    with pytest.raises(ValueError, match="unknown"), scan_backend("cuda"):
        raise AssertionError("entered")
    assert set(CPU) < set(BACKENDS)


class Mixer(nn.Module):
    """A small user of the scan: two groups, gate, skip, bias."""

    def __init__(self, dim=8, states=4, groups=2):
        super().__init__()
        self.streams, self.parts = nn.Linear(dim, 3 * dim), nn.Linear(dim, 2 * states * groups)
        self.log, self.skip, self.bias = (nn.Parameter(torch.rand(*s)) for s in ((dim, states), (dim,), (dim,)))
        self.shape = (2, groups, states)

    def forward(self, x):
        u, delta, z = self.streams(x).transpose(1, 2).chunk(3, 1)
        B, C = self.parts(x).transpose(1, 2).unflatten(1, self.shape).unbind(1)
        return selective_scan(u, delta, -self.log.exp(), B, C, self.skip, z, self.bias, True).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    mixer, x = Mixer(), torch.randn(2, PANEL + 5, 8)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=dynamic)
    wanted = torch.autograd.grad(mixer(x).square().sum(), list(mixer.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for images in (x, torch.cat([x, x, x])):
            torch.testing.assert_close(compiled(images), mixer(images), atol=1e-5, rtol=1e-5)


def test_the_operator_is_registered_as_torch_wants_it():
    from tokenzoo.layers.scan.call import ScanCall
    from tokenzoo.layers.scan.grad import scan

    values = arguments(groups=2, length=5, dtype=torch.float32)
    values["delta_bias"].requires_grad_(), values["u"].requires_grad_()
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "decay_dt", "initial_state", "delta_softplus")
    assert len(names) == len(ScanCall._fields)
    torch.library.opcheck(scan, (*(values[name] for name in names), True, "blocked"))


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(tmp_path):
    torch.manual_seed(0)
    mixer, x = Mixer().eval(), torch.randn(2, 37, 8)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(mixer, (x,), dynamic_shapes=sizes)
    many = torch.randn(5, 37, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(many), mixer(many), atol=1e-5, rtol=1e-5)
    targets = {str(n.target) for m in program.graph_module.modules() for n in getattr(m, "graph", program.graph).nodes}
    if hasattr(torch.compiler, "is_exporting"):  # torch 2.6 cannot tell strict export from compilation
        assert not any("tokenzoo" in name for name in targets)

    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "mixer.onnx")
    torch.onnx.export(mixer, (x,), path, dynamo=True, dynamic_shapes=sizes)
    session = onnxruntime.InferenceSession(path)
    out = session.run(None, {session.get_inputs()[0].name: many.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), mixer(many).detach(), atol=1e-5, rtol=1e-5)


INTERPRETED = """
import torch
from test_selective_scan import arguments, run
for settings in (dict(length=1), dict(length=35, groups=2), dict(dim=40, length=3), dict(options=False, length=33)):
    values = arguments(**settings)
    tensors = [v.requires_grad_() for v in values.values() if isinstance(v, torch.Tensor)]
    results = []
    for backend in ("triton", "loop"):
        out = run(values, backend)
        results.append([*out, *torch.autograd.grad(out[0].square().sum() + out[1].square().sum(), tensors)])
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)
print("equal")
"""


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    import os
    from pathlib import Path

    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("groups", [1, 2])
def test_triton_kernels_on_cuda(groups):
    values = arguments(3, 40, 2 * PANEL + 3, 16, groups)
    values = {k: v.cuda().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    results = []
    for backend in ("triton", "chunked"):
        out = run(values, backend)
        results.append([*out, *torch.autograd.grad(out[0].square().sum() + out[1].square().sum(), tensors)])
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)
    assert choose_backend(values["u"]) == "triton"


@given(
    data=st.data(), length=st.integers(2, 20), rule=st.sampled_from(["hold", "bias", "given"]), reverse=st.booleans()
)
@settings(deadline=None, max_examples=40)
def test_gaps_decay_as_the_full_sequence_does(data, length, rule, reverse):
    picks = st.lists(st.integers(0, length - 1), min_size=1, max_size=length, unique=True)
    count = len(first := data.draw(picks))
    second = data.draw(st.lists(st.integers(0, length - 1), min_size=count, max_size=count, unique=True))
    kept = torch.tensor([sorted(first), sorted(second)])
    values = arguments(length=length, options=False)
    bias = torch.rand(6, dtype=torch.float64)
    full = F.softplus(values["delta"])  # in raster order, as u, B, C
    filled, dropped = full.clone(), torch.ones(2, length, dtype=torch.bool).scatter(1, kept, False)
    for b in range(2):
        order = range(length - 1, -1, -1) if reverse else range(length)
        held = torch.zeros(6, dtype=torch.float64)
        for t in order:
            if dropped[b, t]:
                filled[b, :, t] = {"hold": held, "bias": bias, "given": full[b, :, t]}[rule]
            else:
                held = full[b, :, t]

    def turn(x):
        return x.flip(-1) if reverse else x

    zeroed = values["u"].masked_fill(dropped[:, None], 0)
    streams = {"u": zeroed, "delta": filled, "B": values["B"], "C": values["C"]}
    simulated = turn(selective_scan(**{k: turn(v) for k, v in streams.items()}, A=values["A"]))

    def gather(x):
        return x.gather(2, kept[:, None].expand(-1, x.shape[1], -1))

    small = {k: turn(gather(v)) for k, v in {**streams, "delta": full}.items()}
    positions = (length - 1 - kept).flip(1) if reverse else kept
    decay_dt = stretch(small["delta"], gaps_of(kept, length, reverse), rule, bias, turn(full), positions)
    out = turn(selective_scan(**small, A=values["A"], decay_dt=decay_dt))
    torch.testing.assert_close(out, gather(simulated), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaps_of(torch.arange(3), 5), r"positions are \(3,\); give \[B, K\]"),
        (lambda: gaps_of(torch.arange(3)[None], 2), "3 positions are kept of a sequence of length 2"),
        (lambda: stretch(torch.ones(1, 2, 3), torch.zeros(1, 3), "skip"), "'skip' is unknown; choose one of hold"),
        (lambda: stretch(torch.ones(2, 3), torch.zeros(2, 3)), r"dt is \(2, 3\)"),
        (lambda: stretch(torch.ones(1, 2, 3), torch.zeros(1, 4)), r"gaps is \(1, 4\)"),
        (lambda: stretch(torch.ones(1, 2, 3), torch.zeros(1, 3), "bias"), "rule 'bias' needs bias_dt"),
        (lambda: stretch(torch.ones(1, 2, 3), torch.zeros(1, 3), "given"), "rule 'given' needs positions"),
        (lambda: causal_conv1d(torch.ones(2, 3), torch.ones(3, 1, 4)), r"not \(2, 3\)"),
        (lambda: causal_conv1d(torch.ones(1, 3, 5), torch.ones(4, 1, 4)), r"give \[3, 1, K\]"),
        (lambda: causal_conv1d(torch.ones(1, 3, 5), torch.ones(3, 1, 4), torch.ones(4)), r"bias \(4,\)"),
        (lambda: RMSNorm(4)(torch.ones(2, 5)), "built for dim=4"),
    ],
)
def test_small_layers_refuse_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_causal_conv_sees_only_the_past(length, transposed):
    x = torch.randn(2, 5, length, dtype=torch.float64)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = torch.randn(5, 1, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = bias[:, None].expand(2, -1, length).clone()
    for t in range(length):
        for back in range(min(4, t + 1)):
            expected[..., t] += weight[:, 0, 3 - back] * x[..., t - back]
    torch.testing.assert_close(causal_conv1d(x, weight, bias, activation=False), expected)
    torch.testing.assert_close(causal_conv1d(x, weight, bias), F.silu(expected))
    torch.testing.assert_close(causal_conv1d(x, weight, activation=False), expected - bias[:, None])
    inputs = [v.requires_grad_() for v in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *given: causal_conv1d(*given), inputs)


def test_rms_norm_computes_in_float32():
    norm, x = RMSNorm(8), 300 * torch.randn(3, 8)
    half = norm.half()(x.half())
    assert half.dtype == torch.float16 and half.isfinite().all()  # squares overflow float16
    torch.testing.assert_close(half.float(), F.rms_norm(x, (8,), eps=1e-5), atol=1e-2, rtol=1e-2)
