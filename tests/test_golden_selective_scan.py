"""Selective scan, causal convolution, RMS norm and gap-decaying steps against recorded numbers."""

import re

import pytest
import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close, files, read

from tokenzoo.layers import RMSNorm, causal_conv1d, gaps_of, selective_scan, stretch

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BACKENDS = ("blocked", "chunked", "loop")


def scan_settings(case: Case) -> dict[str, str]:
    """The settings of a recorded scan, checked against what is stored of it."""
    found = dict(re.findall(r"(\w+)=(\([^)]*\)|\S+)", case.words))
    check_settings(found, "delta_softplus", "has_D", "has_z", "has_delta_bias", "BC", "L", "D", "N", "delta_scale")
    for name in ("D", "z", "delta_bias"):
        assert case.has(name) == (found[f"has_{name}"] == "True")
    assert case["u"].shape[2] == int(found["L"]) and case["A"].shape[1] == int(found["N"])
    assert case["B"].dim() == {"(b,n,l)": 3, "(b,g,n,l)": 4, "(d,n)": 2}[found["BC"]]
    return found


def close_to_largest(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Asserts equality within a share of the largest expected number."""
    close(actual, expected, share * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
@cases("vision_mamba", lambda c: c.has("u"))
def test_scan(case: Case, backend: str):
    softplus = scan_settings(case)["delta_softplus"] == "True"
    given = {name: case[name].clone().requires_grad_() for name in ARGUMENTS if case.has(name)}
    out, last = selective_scan(**given, delta_softplus=softplus, return_last_state=True, backend=backend)
    assert out.isfinite().all()
    close_to_largest(out, case["output/out"], 1e-5)
    close_to_largest(last, case["output/last_state"], 1e-5)
    if case.has("grad_w"):
        grads = torch.autograd.grad((out * case["grad_w"]).sum(), list(given.values()))
        assert set(case.part("grad")) == set(given)
        for name, grad in zip(given, grads):
            close_to_largest(grad, case[f"grad/{name}"], 1e-5)


def test_gradients_are_recorded():
    recorded = [key for file in files("vision_mamba") for key in read(file)[0] if key.endswith("/u")]
    assert not recorded or any(key.replace("/u", "/grad_w") in read(file)[0]
                               for file in files("vision_mamba") for key in recorded)  # fmt: skip


@cases("vision_mamba", lambda c: c.has("output/silu"))
def test_causal_conv(case: Case):
    x, weight, bias = case["x"], case["weight"], case["bias"]
    for kernel in (weight, weight[:, None]):
        close(causal_conv1d(x, kernel, bias), case["output/silu"], 1e-6)
        close(causal_conv1d(x, kernel, bias, activation=False), case["output/linear"], 1e-6)


@cases("vision_mamba", lambda c: c.has("output/normed"))
def test_rms_norm(case: Case):
    norm = RMSNorm(case["weight"].shape[0])
    norm.load_state_dict({"weight": case["weight"]})
    residual = case["x"] + case["residual"]
    close(residual, case["output/residual"], 1e-6)
    close(norm(residual), case["output/normed"], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@cases("ssm_token_pruning", lambda c: c.has("kept"))
def test_pruned_scan(case: Case, backend: str):
    s, length = case.settings, int(case["length"])
    check_settings(s, "b", "D", "L", "N", "K")
    kept, bias = case["kept"], F.softplus(case["delta_bias"])
    assert length == s["L"] and case["u"].shape == (s["b"], s["D"], s["K"])
    seen = set()
    for key, expected in case.matching(r"(fwd|bwd)/\w+/out").items():
        direction, rule, _ = key.split("/")
        assert rule in ("hold", "bias", "given", "gather")
        reverse = direction == "bwd"

        def turn(x, reverse=reverse):
            return x.flip(-1) if reverse else x

        dt, full = (turn(F.softplus(case[name] + case["delta_bias"][:, None])) for name in ("delta", "delta_full"))
        positions = (length - 1 - kept).flip(1) if reverse else kept
        gaps = gaps_of(kept, length, reverse)
        decay_dt = None if rule == "gather" else stretch(dt, gaps, rule, bias, full, positions)
        streams = {name: turn(case[name]) for name in ("u", "z", "B", "C")}
        out = selective_scan(**streams, delta=dt, A=case["A"], D=case["D"], decay_dt=decay_dt, backend=backend)
        close(turn(out), expected, 1e-5)
        seen.add((direction, rule))
    assert len(seen) == 8
