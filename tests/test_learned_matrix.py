"""Every method that learns, by its row: nothing removed changes nothing, gradients, processes, files, graphs.

A method that inherits `Learned` needs a row. `LearnedKeep` methods get their hard decisions for free; another method
with gates says how, see `Row.hard`.
"""

from __future__ import annotations

import copy
import csv
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import build, images
from test_distributed import free_ports
from test_train_imagenet import ENVIRONMENT, SCRIPT, data, killed, main, same  # noqa: F401 (two are fixtures)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_data import words

import tokenzoo
from tokenzoo.apply.export import export
from tokenzoo.core.learned import Learned, Teaching
from tokenzoo.core.learned_keep import LearnedKeep
from tokenzoo.core.schedule import kept_of
from tokenzoo.training.owed import asked, losses_owed
from tokenzoo.training.token_distillation import full_layout, layer_tokens, patch_tokens


def best_gates(method: Any, scores: Tensor, tokens: Any, step: Any) -> Tensor:
    """What eval mode keeps, as gates with a soft gradient; the same for any `LearnedKeep`."""
    left = tokens.left[:, tokens.layout.num_prefix :]
    better = (scores if scores.dim() == 2 else scores[..., 0] - scores[..., 1]).masked_fill(left < 0.5, float("-inf"))
    count = kept_of(step, tokens.layout)(int(left[0].round().sum()))
    hard = torch.zeros_like(better).scatter(1, better.topk(count, dim=1).indices, 1.0)
    soft = better.sigmoid()
    return hard - soft.detach() + soft


def keep_the_best(patch: Callable[[Any, str, Any], None]) -> None:
    """Gates of the scores' best patches in place of draws, for methods that inherit `LearnedKeep`."""
    patch(LearnedKeep, "draw", best_gates)


def as_it_is(patch: Callable[[Any, str, Any], None]) -> None:
    """Decisions in training are those of inference already."""


def without_chance(patch: Callable[[Any, str, Any], None]) -> None:
    """What an interpreter scores above the threshold, in place of a draw."""
    patch(tokenzoo.IARED2, "draw", lambda self, scores: (scores >= self.threshold).float())


class Row(NamedTuple):
    """How a method is tried.

    Attributes:
        options: that reduce, of a static shape.
        zero: that remove nothing; None for methods that always change something.
        method: its name, the row's by default.
        stays: `zero` may be set while the modules of `options` are in place (a rate that changes).
        hard: makes decisions in training those of inference, through a function like `setattr`: for methods whose
            training form keeps all tokens; None for those without such a form.
        silent: endings of parameters that cannot change anything (added to all logits of a softmax alike).
        fixed: two processes give the gradients of one; not where draws of training cannot be taken out, nor where a
            module normalises over the batch, which is each process's own.
    """

    options: dict[str, Any]
    zero: dict[str, Any] | None = {"keep_rate": 1.0}
    method: str = ""
    stays: bool = True
    hard: Callable[[Callable[[Any, str, Any], None]], None] | None = None
    silent: tuple[str, ...] = ()
    fixed: bool = True


ROWS: dict[str, Row] = {
    "dynamicvit": Row({"keep_rate": 0.6}, hard=keep_the_best),
    "dpcknn": Row({"keep_rate": 0.6, "learned": True, "neighbours": 3}, silent=("score.bias",)),
    # slots are rows of its weights, so that another rate needs another module
    "patchmerger": Row({"keep_rate": 0.6}, stays=False),
    "sinkhorn": Row({"keep_rate": 0.6}, stays=False),
    "sit": Row({"keep_rate": 0.6}, stays=False, silent=("tsm.weight.3.bias",)),
    "sit_alone": Row(
        {"keep_rate": 0.6, "feature_weight": 0.0}, method="sit", stays=False, silent=("tsm.weight.3.bias",)
    ),
    "catanet": Row({"group_size": 3, "centres": 4}, zero={"group_size": 16}),
    "ia_red2": Row(
        {"threshold": 0.6, "layers": (0, 2), "max_tokens": 24}, zero={"threshold": 0.0}, hard=without_chance,
        fixed=False,
    ),
    "mod": Row({"keep_rate": 0.5, "layers": (0, 2)}),
    "tap": Row({"num_scales": 3}, zero={"num_scales": 1, "adl_weight": 0.0}, stays=False, fixed=False),
    "sparsifiner": Row({"keep_rate": 0.4, "coefficients": 2}),
    "thresholds": Row(
        {"alike": 0.6, "least": 0.2, "layers": (1, 2), "max_tokens": 24}, zero={"alike": 1.0, "least": 0.0},
        stays=False, hard=as_it_is,
    ),
}  # fmt: skip
NEW = ".tokenzoo_0_"
rows = pytest.mark.parametrize("name", ROWS)
gated = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.hard is not None])


def recipe(name: str, zero: bool = False) -> dict[str, Any]:
    row = ROWS[name]
    return {"method": row.method or name, **row.options, **(row.zero if zero else {})}


def patched(name: str, backbone: str = "deit", seed: int = 3) -> nn.Module:
    """A small model with a method whose modules have left their start, where scores are all alike."""
    model = build(backbone)
    torch.manual_seed(seed)
    return moved(tokenzoo.patch_model(model, recipe(name)))


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if NEW in name and parameter.dim() > 1:
            parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return model


def new(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if NEW in name}


def loss_of(model: nn.Module, teacher: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy and what the method owes, the teacher asked for what that needs."""
    wanted = asked(model)
    with torch.no_grad():
        features, layers = layer_tokens(teacher, x)
        tokens = patch_tokens(features, full_layout(teacher, x))
        said = {"logits": teacher.forward_head(features), "tokens": tokens, "layers": layers}
    taught = Teaching(**{field: value for field, value in said.items() if field in wanted})
    left, target = model.forward_tokens(x), torch.arange(len(x)) % 7 if target is None else target
    answers = model.forward_head(left)
    task, taught = F.cross_entropy(answers.float(), target), taught._replace(answers=answers, target=target)
    return task + sum(losses_owed(model, left, taught).values())


def test_every_learned_method_has_a_row():
    learned = {name for name in tokenzoo.list_methods() if issubclass(tokenzoo.method_class(name), Learned)}
    assert learned == {row.method or name for name, row in ROWS.items()}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.zero is not None])
@pytest.mark.parametrize("backbone", ["deit", "gap"])
@torch.no_grad()
def test_a_new_module_that_removes_nothing_changes_nothing(name, backbone):
    model, row = build(backbone), ROWS[name]
    x = images(model)
    plain = model(x)
    if row.stays:
        tokenzoo.patch_model(model, recipe(name))
        tokenzoo.update_method(model, **row.zero)
        assert new(model)
    else:
        tokenzoo.patch_model(model, recipe(name, zero=True))
    torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.train()(x), plain, atol=1e-5, rtol=1e-5)


@rows
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_every_new_parameter_learns_within_two_steps(name, amp):
    model, teacher = build("deit"), build("deit")
    torch.manual_seed(3)
    tokenzoo.patch_model(model, recipe(name)).train()
    x, optimizer = images(model, 4), torch.optim.SGD(model.parameters(), lr=0.05)
    reached: set[str] = set()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = loss_of(model, teacher, x)
        optimizer.zero_grad()
        loss.backward()
        gradients = {key: p.grad for key, p in new(model).items()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        reached |= {key for key, g in gradients.items() if g.abs().max() > 0}
        optimizer.step()
    assert reached and {key for key in gradients if not key.endswith(ROWS[name].silent or ("?",))} <= reached


@gated
@pytest.mark.parametrize("backbone", ["deit", "gap", "dinov3"])
@torch.no_grad()
def test_training_is_inference_where_decisions_are_hard(name, backbone, monkeypatch):
    ROWS[name].hard(monkeypatch.setattr)
    model = patched(name, backbone)
    x = images(model)
    short, plain = model.eval()(x), build(backbone)(x)
    tokens = model.train().forward_tokens(x)
    assert tokens.length == model.num_prefix_tokens + 16 and tokens.records
    torch.testing.assert_close(model.forward_head(tokens), short, atol=1e-5, rtol=1e-5)
    assert (short - plain).abs().max() > 1e-3


@rows
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = patched(name)
    x = images(model)
    expected = model(x)
    folder = tokenzoo.save(model, tmp_path / "model")
    other = build("deit", seed=9)
    state = torch.get_rng_state()
    assert tokenzoo.load(folder, other) is other and torch.equal(torch.get_rng_state(), state)
    assert tokenzoo.recipe(other) == tokenzoo.recipe(model)
    assert torch.equal(other(x), expected)


@rows
def test_leaves_with_its_parameters(name):
    model = build("deit")
    x, before = images(model), copy.deepcopy(build("deit").state_dict())
    with torch.no_grad():
        plain = model(x)
    moved(tokenzoo.patch_model(model, recipe(name))).train()
    loss_of(model, build("deit"), x).backward()  # gradients do not stay in its way
    tokenzoo.unpatch_model(model.eval())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@rows
@torch.no_grad()
def test_one_graph(name):
    torch._dynamo.reset()
    model = patched(name)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@rows
def test_exported(name, tmp_path):
    model = patched(name)
    assert export(model, tmp_path / "model.pt2", images(model, 2)).difference <= 1e-4


# ---- several processes, a process that is killed


def gradients(name: str, rank: int | None = None, port: int = 0) -> dict[str, Tensor]:
    """Of a batch, or of its half in one of two processes."""
    if ROWS[name].hard is not None:
        ROWS[name].hard(setattr)
    model, teacher = patched(name).train(), build("deit")
    x = images(model, batch=4)
    if rank is None:
        step = Step(model, teacher)
        step(x, torch.arange(4)).backward()
    else:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        try:
            step = DistributedDataParallel(Step(model, teacher))
            step(x[2 * rank : 2 * rank + 2], torch.arange(4)[2 * rank : 2 * rank + 2]).backward()
        finally:
            dist.destroy_process_group()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


class Step(nn.Module):
    """Model and losses, as DDP wraps them."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.model, self._teacher = model, [teacher]

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return loss_of(self.model, self._teacher[0], x, target)


def worker(rank: int, port: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    for i, name in enumerate(names):
        torch.save(gradients(name, rank, port + i), f"{folder}/{name}_{rank}.pt")


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    names = [name for name, row in ROWS.items() if row.fixed]
    mp.spawn(worker, (free_ports(len(names)), names, str(tmp_path)), nprocs=2)
    draw = LearnedKeep.draw
    try:
        for name in names:
            expected = gradients(name)
            for rank in range(2):
                found = torch.load(tmp_path / f"{name}_{rank}.pt")
                assert found.keys() == expected.keys() and any(NEW in key for key in found)
                for key, grad in expected.items():
                    torch.testing.assert_close(found[key], grad, atol=1e-6, rtol=1e-4, msg=f"{name} {key}")
    finally:
        LearnedKeep.draw = draw


@pytest.mark.slow
@rows
def test_goes_on_bit_equal_after_sigkill(name, main, data, tmp_path):  # noqa: F811
    options = {key: value for key, value in recipe(name).items() if key != "method"}
    pairs = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    more = ["--method", recipe(name)["method"], "--method-kwargs", *pairs]
    more += ["--epochs", "4", "--recovery-interval", "1", "--deterministic", "--model-ema"]
    more += ["--kd-model-name", "unpatched", "--kd-token-weight", "0.5", "--new-lr-scale", "5", "--freeze-epochs", "1"]
    assert main(words(data, tmp_path / "whole", *more)) == 0
    folder = tmp_path / "part"
    command = [sys.executable, str(SCRIPT), *words(data, folder, *more)]
    killed(command, lambda: any(folder.glob("checkpoint-00001-*.pt")))
    assert not any(folder.glob("checkpoint-00004-*.pt"))
    assert main([*command[2:], "--resume"]) == 0
    same(tmp_path / "whole" / "model.safetensors", folder / "model.safetensors")
    losses = [list(csv.DictReader((p / "summary.csv").open())) for p in (tmp_path / "whole", folder)]
    assert [row["train_loss"] for row in losses[0]] == [row["train_loss"] for row in losses[1]]
    assert ENVIRONMENT is not None


@pytest.fixture(autouse=True)
def ordinary_kernels():
    yield
    torch.use_deterministic_algorithms(False)
