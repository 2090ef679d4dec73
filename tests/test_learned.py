"""Methods that learn: the complete example of docs/learned.md, and what gates, records and the trainer make of it."""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import VIT, build, images
from test_docs import blocks
from test_train_imagenet import same
from torch import Tensor, nn
from training_data import ROOT, draw, words

import tokenzoo
from tokenzoo.apply.export import export
from tokenzoo.cli import main
from tokenzoo.core import registry
from tokenzoo.core.gate import Gate
from tokenzoo.core.learned import Teaching
from tokenzoo.core.plugins import import_plugins
from tokenzoo.core.schedule import kept_patches
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import ChainMap, GateMap, KeepMap, MergeMap
from tokenzoo.ops.attention import key_bias
from tokenzoo.training import parse_options, train
from tokenzoo.training.owed import losses_owed, names_owed
from tokenzoo.training.segmentation.step import SegmentStep
from tokenzoo.training.token_distillation import token_distillation

EXAMPLE, LOOP, RELEASED, _, SAVED = blocks((ROOT / "docs" / "learned.md").read_text(encoding="utf-8"), "python")
NAME = "toy_of_the_docs"
OURS = "tokenzoo_0_toy"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / f"{NAME}.py"
    path.write_text(EXAMPLE)
    return path


@pytest.fixture(autouse=True)
def toy(file) -> Iterator[type]:
    """The method of the page, and `Sure`, which draws nothing: in training it keeps what it keeps in eval mode."""
    before = dict(registry._METHODS)
    import_plugins([str(file)])

    @dataclass(frozen=True, kw_only=True)
    class Sure(sys.modules[NAME].Toy):
        """As the toy, but with the best patches behind open gates."""

        sees_itself: bool = False
        at: str = "before"

        name = "sure"
        traits = sys.modules[NAME].Toy.traits._replace(place=lambda m: tokenzoo.core.traits.Place(m.at))

        def map(self, tokens: Tokens, signals: Any, step: Any) -> Any:
            if not signals.training:
                return super().map(tokens, signals, step)
            prefix = tokens.layout.num_prefix
            left = tokens.left[:, prefix:]
            scores = signals.module(tokens.x[:, prefix:], left.unsqueeze(2).to(tokens.x.dtype)).float()
            better = scores[..., 0] - scores[..., 1]
            count = kept_patches(prefix + int(left[0].round().sum()), step, tokens.layout)
            best = better.masked_fill(left < 0.5, float("-inf")).topk(count, dim=1).indices
            hard = torch.zeros_like(better).scatter(1, best, 1.0)
            soft = better.sigmoid()
            gate = hard - soft.detach() + soft
            return self.gated(gate, tokens, step, step.strength[0], scores, self.sees_itself)

    tokenzoo.register(Sure)
    yield sys.modules[NAME].Toy
    registry._METHODS.clear()
    registry._METHODS.update(before)
    del sys.modules[NAME]


def patched(name: str = "deit", method: Any = "sure", **options: Any) -> nn.Module:
    model = build(name)
    torch.manual_seed(3)
    given = {"layers": (1, 2), "keep_rate": 0.6} | options if isinstance(method, str) else {}
    return tokenzoo.patch_model(model, method, **given)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if OURS[:9] in name}


# ---- the example


def test_the_example_is_short():
    assert len(EXAMPLE.rstrip().splitlines()) <= 40


def test_the_loop_of_the_page_trains():
    model, teacher = patched(method="toy").train(), build("deit")
    x = images(model)
    names = {"model": model, "teacher": teacher, "images": x, "target": torch.arange(len(x)) % 7, "F": F}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        exec(LOOP, names)
        assert set(names["owed"]) == {"toy_ratio", "toy_sure"} and names["loss"].isfinite()
        names["loss"].backward()
        optimizer.step()
    assert all(g is not None and g.abs().max() > 0 for g in gradients(model).values())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if OURS in name)


def test_trains_and_resumes_from_the_command_line(file, tmp_path, toy):
    """By its registered name, with a keep rate that falls; a run that stops goes on to the same bits."""
    data = draw(tmp_path / "data", count=2, val=1)
    more = [
        "--import",
        str(file),
        "--method",
        "toy",
        "--method-kwargs",
        "keep_rate=0.5",
        "layers=[1,2]",
        "--epochs",
        "2",
    ]
    more += ["--shrink-epochs", "1", "--kd-model-name", "unpatched", "--kd-token-weight", "0.5", "--deterministic"]
    try:
        assert main(["train", *words(data, tmp_path / "whole", *more)]) == 0

        def stop(row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(parse_options(words(data, tmp_path / "part", *more)), stop)
        assert not (tmp_path / "part" / "checkpoint-00002-0000000.pt").exists()
        assert main(["train", *words(data, tmp_path / "part", *more, "--resume")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    same(tmp_path / "whole" / "model.safetensors", tmp_path / "part" / "model.safetensors")
    rows = [list(csv.DictReader((tmp_path / run / "summary.csv").open())) for run in ("whole", "part")]
    columns = ("train_loss", "train_toy_ratio", "train_toy_sure", "eval_top1", "keep_rate")
    assert [[row[c] for c in columns] for row in rows[0]] == [[row[c] for c in columns] for row in rows[1]]
    assert float(rows[0][1]["train_toy_ratio"]) > 0


@pytest.mark.parametrize("name", ["deit", "gap", "dinov3"])
def test_eval_mode_removes_tokens_for_good(name, toy):
    model = patched(name, "toy")
    prefix, rows = model.num_prefix_tokens, tokenzoo.report(model)
    tokens = model.forward_tokens(images(model))
    assert tokens.length == rows.tokens_out == prefix + 6 and tokens.gate is None and tokens.records == ()
    model.train()
    assert model.forward_tokens(images(model)).length == prefix + 16


def test_the_command_exports_it_by_name(file, tmp_path):
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "patch_size=8", "depth=1"]
    model += ["embed_dim=32", "num_heads=2", "--num-classes", "7", "--device", "cpu", "--method", "toy", "layers=[0]"]
    assert main(["export", *model, "--import", str(file), "--output", str(tmp_path / "model.pt2")]) == 0
    assert (tmp_path / "model.pt2").exists()


def test_the_form_that_removes_tokens_becomes_an_onnx_file(tmp_path):
    model = tokenzoo.patch_model(VIT(depth=1).eval(), "toy", layers=(0,))
    assert export(model, tmp_path / "model.onnx", images(model, 2)).difference < 1e-4


def test_the_predictor_is_counted():
    model = patched(method="toy", layers=(2,))
    counted = tokenzoo.report(model)
    predictor = 16 * (32 * 32 + 2 * 32 * 2)
    row = counted.rows[3]
    assert (row.name, row.reduction_macs) == ("blocks.2", predictor)
    assert counted.total == pytest.approx(tokenzoo.count_macs(model, (3, 32, 32)).total, rel=0.01)


def test_parameters_leave_with_the_method_and_come_back_from_weights():
    model = build("deit")
    x, keys = images(model), list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        tokenzoo.patch_model(model, "toy", layers=(1, 2))
    model.train()(x).square().mean().backward()
    torch.optim.SGD([p for name, p in model.named_parameters() if OURS in name], 0.1).step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert torch.equal(copy.deepcopy(model)(x), trained)
        other = tokenzoo.patch_model(build("deit"), tokenzoo.recipe(model))
        assert not torch.equal(other(x), trained)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), trained)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(x), before) and list(model.state_dict()) == keys


# ---- gates


def policy_softmax(logits: Tensor, policy: Tensor, sees_itself: bool) -> Tensor:
    """Softmax with policy as the equations have it, entry by entry, in float64."""
    rows = []
    for i in range(len(logits)):
        top = logits[i].max()
        parts = [
            torch.exp(logits[i, j] - top) * (1.0 if i == j and sees_itself else policy[j]) for j in range(len(logits))
        ]
        rows.append(torch.stack(parts) / sum(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("sees_itself", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_the_bias_is_softmax_with_policy(hard, sees_itself):
    """Values, and the gradient of every gate, those of closed ones too."""
    torch.manual_seed(0)
    logits, weight = torch.randn(7, 7, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    policy = torch.rand(7, dtype=torch.float64)
    policy = (policy > 0.4).double() if hard else policy
    policy[0] = 1.0
    found = []
    for way in ("bias", "equations"):
        gate = policy.clone().requires_grad_()
        if way == "bias":
            out = (logits + Gate(gate[None], sees_itself).bias(itself=True)[0, 0]).softmax(1)
        else:
            out = policy_softmax(logits, gate, sees_itself)
        (out * weight).sum().backward()
        found.append((out.detach(), gate.grad))
    assert not hard or (policy == 0).any()
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    assert (found[0][1].abs() > 1e-3).all()


def test_the_bias_joins_sizes_padding_and_masks():
    gate = Gate(torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    size, valid = torch.tensor([[1.0, 3.0, 2.0, 1.0]]).unsqueeze(-1), torch.tensor([[True, True, True, False]])
    bias = gate.bias(key_bias(size, valid))
    expected = torch.tensor([0.0, 3.0, 2.0, 1.0]).log()
    expected = torch.tensor([0.0, expected[1], expected[2] - 16, float("-inf")])
    torch.testing.assert_close(bias[0, 0, 0], expected)
    square = Gate(gate.open, True).bias(key_bias(size, valid), itself=True)
    torch.testing.assert_close(square[0, 0, 2], torch.tensor([0.0, expected[1], expected[2] + 16, float("-inf")]))
    assert Gate(torch.ones(1, 4)).bias(key_bias(size, None)).equal(key_bias(size, None))  # open ones change no bit


@pytest.mark.parametrize(
    "options", [{}, {"sees_itself": True}, {"at": "between"}, {"at": "ahead"}, {"at": "after"}], ids=str
)
@pytest.mark.parametrize(
    "name",
    [
        "deit", "registers", "gap", "avgmax", "map", "prr", "differential", "dinov3", "pe_like", "cait", "cait_avg",
        "convit",
    ],
)  # fmt: skip
def test_training_with_gates_of_0_and_1_gives_the_logits_of_removal(name, options):
    model = patched(name, **options)
    x = images(model)
    with torch.no_grad():
        hard, full = model.eval()(x), build(name)(x)
        soft = model.train()(x)
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)
    assert (hard - full).abs().max() > 1e-2
    model(x).square().mean().backward()
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients(model).values())


@pytest.mark.parametrize("sees_itself", [False, True])
def test_gradients_under_autocast_point_the_same_way(sees_itself):
    found = []
    for amp in (False, True):
        model = patched(sees_itself=sees_itself, layers=(1,)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(images(model)).float().square().mean()
        loss.backward()
        found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert F.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.parametrize("fill", ["stash", "nearest", "zero"])
def test_features_on_the_grid_are_those_of_removal(fill):
    model = build("deit")
    torch.manual_seed(3)
    tokenzoo.patch_model(model, "sure", layers=(1, 2), keep_rate=0.6, fill=fill, dense=True)
    with torch.no_grad():
        hard = model.eval().forward_features(images(model))
    soft = model.train().forward_features(images(model))
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)
    # closed places alone, as far as they come back from what they were
    soft[:, 1:].square().sum().backward()
    assert all(g.abs().max() > 0 for g in gradients(model).values())


@pytest.mark.parametrize("name", ["gap", "max", "avgmax", "gap_with_class", "deit"])
def test_features_feed_the_head_as_tokens_do(name):
    model = patched(name).train()
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_head(model.forward_features(images(model))), model(images(model)), atol=1e-5, rtol=1e-5
        )


def test_features_for_attention_pooling_are_refused_in_training():
    model = patched("map").train()
    with pytest.raises(ValueError, match="attention pool sees the gates.*call model\\(images\\)"):
        model.forward_features(images(model))
    assert model.eval().forward_features(images(model)).shape[1] == 6


@pytest.mark.parametrize("follower", [
    {"method": "tome", "r": 3, "layers": [2]}, {"method": "evit", "keep_rate": 0.5, "layers": [2]},
    {"method": "ats", "layers": [2]}, {"method": "uniform", "keep_rate": 0.5, "layers": [2]},
], ids=lambda f: f["method"])  # fmt: skip
def test_closed_tokens_are_in_no_later_token(follower):
    """Whatever closed patches hold, open ones and what is made of them do not notice."""
    model = patched(method=[{"method": "sure", "layers": [0], "keep_rate": 0.6}, follower]).train()
    seen: list[Tensor] = []

    def change(block: nn.Module, args: Any, values: Tensor) -> Tensor:
        closed = seen[0][0].map.gate < 0.5
        return torch.where(closed.unsqueeze(-1), values + 5.0, values)

    with torch.no_grad():
        plain = model.forward_tokens(images(model), trace=True)
        seen.append(plain.trace)
        before = model(images(model))
        # gates are at the input of block 0; between the two blocks every closed token is another one
        handle = model.blocks[1].register_forward_hook(change)
        after = model(images(model))
        handle.remove()
    assert plain.records[0].kept.max() < 0.7 and plain.trace[1].method == follower["method"]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "first", [{"method": "ats", "layers": [0]}, {"method": "tome", "r": 4, "layers": [0]}], ids=str
)
def test_behind_padding_and_sizes(first):
    model = patched(method=[first, {"method": "toy", "layers": [2]}]).train()
    x = images(model)
    tokens = model.forward_tokens(x)
    (record,) = tokens.records
    assert record.order == 1 and record.block == 2
    if first["method"] == "ats":
        assert torch.equal(record.before, tokens.valid[:, 1:].float()) and not tokens.valid.all()
    else:
        assert tokens.size.max() > 1
    assert ((record.kept >= 0) & (record.kept <= 1)).all()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), atol=2e-5, rtol=1e-4)


def test_under_a_mask():
    model = patched(keep_rate=0.5, layers=(1,)).train()
    shown = torch.ones(17, dtype=torch.bool)
    shown[9:] = False
    mask = shown.expand(17, 17)
    x = images(model)
    with torch.no_grad():
        tokens = model.forward_tokens(x, mask)
        other = x.clone()
        other[:, :, 16:] += 1.0  # the patches that are hidden
        again = model.forward_tokens(other, mask)
    assert not tokens.visible[:, 9:].any() and (tokens.records[0].before[:, 8:] == 0).all()
    torch.testing.assert_close(tokens.x[:, 0], again.x[:, 0], atol=1e-4, rtol=1e-4)
    assert tokens.records[0].before[:, :8].all()


def test_what_the_map_says_of_itself():
    gate = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]], requires_grad=True)
    token_map, x = GateMap(gate), torch.randn(1, 5, 3)
    assert torch.equal(token_map.apply(x), x) and torch.equal(token_map.matrix() @ x, x)
    assert token_map.assign.tolist() == [[0, 1, -1, 3, -1]]
    torch.testing.assert_close(token_map.pool(x), token_map.membership() @ x)
    kept = KeepMap(torch.tensor([[0, 1, 3]]), 5)
    dropped = torch.randn(1, 5, 3)
    torch.testing.assert_close(token_map.lift(x, dropped), kept.lift(kept.apply(x), dropped))
    token_map.lift(x, dropped).sum().backward()
    torch.testing.assert_close(gate.grad, (x - dropped).sum(2))
    with pytest.raises(ValueError, match="GateMap cannot be part of a chain"):
        ChainMap(token_map, kept)


def test_gates_go_along_with_later_maps():
    layout = Layout(1, True, (2, 2))
    opened = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]], requires_grad=True)
    tokens = Tokens(torch.randn(1, 5, 3), layout, trace=()).reduce(GateMap(opened), 0, "a")
    assert tokens.visible.tolist() == [[True, False, True, True, False]] and tokens.left.equal(opened)
    again = tokens.reduce(GateMap(torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]), sees_itself=True), 1, "a")
    assert again.gate.open.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]] and again.gate.sees_itself
    kept = tokens.reduce(KeepMap(torch.tensor([[0, 3, 1]]), 5), 1, "b")
    assert kept.gate.open.tolist() == [[1.0, 1.0, 0.0]]
    merge = MergeMap(torch.tensor([[0, 1, 4]]), torch.tensor([[2, 3]]), torch.tensor([[1, 1]]), 5)
    merged = tokens.reduce(merge.masked(tokens.visible), 1, "b")
    torch.testing.assert_close(merged.gate.open, torch.tensor([[1.0, 1.0, 0.0]]))  # visible members alone say
    torch.testing.assert_close(merged.x[:, 1], tokens.x[:, 2:4].mean(1))
    merged.gate.open[0, 1].backward()
    assert opened.grad.tolist() == [[0.0, 0.0, 0.5, 0.5, 0.0]]


# ---- records and losses


def test_records_say_what_was_decided():
    model = patched(keep_rate=(0.5, 0.25)).train()
    tokens = model.forward_tokens(images(model))
    first, second = tokens.records
    assert [(r.order, r.block, r.share) for r in tokens.records] == [(0, 1, 0.5), (0, 2, 0.25)]
    assert first.gate.shape == (len(tokens.x), 16) and first.scores.shape == (len(tokens.x), 16, 2)
    assert torch.equal(first.before, torch.ones_like(first.gate)) and torch.equal(second.before, first.after)
    torch.testing.assert_close(first.kept, torch.full_like(first.kept, 0.5))
    torch.testing.assert_close(second.kept, torch.full_like(second.kept, 0.25))
    torch.testing.assert_close(tokens.gate.open[:, 1:], second.after)


def test_checkpointing_gives_the_same_gradients_and_losses():
    found = []
    for checkpointing in (False, True):
        model = patched(method="toy").train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)  # a block that runs again draws the same gates
        tokens = model.forward_tokens(images(model))
        owed = sum(losses_owed(model, tokens, Teaching()).values())
        (model.forward_head(tokens).square().mean() + owed).backward()
        found.append((owed, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert all(gradient.abs().max() > 0 for name, gradient in found[0][1].items() if OURS in name)


def test_methods_of_one_recipe_get_their_own_records(toy):
    model = patched(method=[toy(layers=(1,), keep_rate=0.5), toy(layers=(2,), keep_rate=0.9, ratio_weight=0.0)]).train()
    assert names_owed(model) == ("toy_ratio", "toy_sure")
    tokens = model.forward_tokens(images(model))
    assert [r.order for r in tokens.records] == [0, 1]
    first = tokens.records[0]
    owed = losses_owed(model, tokens, Teaching())
    torch.testing.assert_close(owed["toy_ratio"], 2.0 * (first.kept - 0.5).square().mean())


def test_other_losses_than_declared_are_refused(toy):
    class Silent(toy):
        """Forgets what it owes."""

        name = "silent"

        def losses(self, records: Any, teaching: Teaching) -> dict[str, Tensor]:
            return {}

    model = patched(method=Silent(layers=(1,))).train()
    declares = r"the class declares owes=\('ratio', 'sure'\)"
    with pytest.raises(ValueError, match=rf"silent: losses\(\) returned \[\], but {declares}"):
        losses_owed(model, model.forward_tokens(images(model)), Teaching())


def test_distillation_leaves_closed_tokens_out():
    layout = Layout(1, True, (2, 2))
    x, teacher = torch.randn(1, 5, 3), torch.randn(1, 4, 3)
    tokens = Tokens(x, layout, trace=()).reduce(GateMap(torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])), 0, "a")
    expected = (x[:, [2, 3]] - teacher[:, [1, 2]]).square().mean()
    torch.testing.assert_close(token_distillation(tokens, teacher), expected)


# ---- rates that change


def test_modules_stay_while_a_rate_changes():
    model = patched(method="toy")
    x, held = images(model), model.blocks[1].tokenzoo_0_toy
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokenzoo.update_method(model, keep_rate=0.25)
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn from the generator of the run
    assert model.blocks[1].tokenzoo_0_toy is held and model.forward_tokens(x).length == 1 + 1
    tokenzoo.update_method(model, keep_rate=1.0)
    assert model.forward_tokens(x).length == 17 and model.blocks[1].tokenzoo_0_toy is held
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    tokenzoo.update_method(model, keep_rate=0.5)
    assert model.forward_tokens(x).length == 1 + 4
    with pytest.raises(ValueError, match="toy keeps learned modules in its blocks.*tokenzoo_0_toy of block 3"):
        tokenzoo.update_method(model, layers=(1, 2, 3))
    tokenzoo.update_method(model, keep_rate=1.0)
    tokenzoo.unpatch_model(model)
    assert not any("tokenzoo" in name for name in model.state_dict())


# ---- refusals


@pytest.mark.parametrize("wrong", [lambda gate: gate[:, 1:], lambda gate: F.pad(gate, (1, 0))])
def test_gates_of_another_shape(wrong, toy):
    class Wrong(toy):
        """Gives gates of another shape."""

        name = "wrong"

        def map(self, tokens: Tokens, signals: Any, step: Any) -> Any:
            return self.gated(wrong(tokens.left[:, 1:]), tokens, step)

    model = patched(method=Wrong(layers=(1,))).train()
    with pytest.raises(
        ValueError, match=r"wrong at block 1: gates have shape .* give one per image and patch, \(2, 16\)"
    ):
        model(images(model, 2))


def test_around_a_branch(toy):
    class Around(toy):
        """Acts where nothing stays."""

        name = "around_toy"
        traits = toy.traits._replace(place=tokenzoo.core.traits.around("mlp"))

    model = patched(method=Around(layers=(1,))).train()
    with pytest.raises(ValueError, match="around_toy at block 1: decided gates.*act 'before'"):
        model(images(model, 2))


def test_models_that_carry_no_gates(toy):
    import scan_cases
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sam = VisionTransformerSAM(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, window_size=2)

    @dataclass(frozen=True, kw_only=True)
    class Scanning(toy):
        """Works on scans, were it not for its gates."""

        name = "scanning_toy"
        traits = toy.traits._replace(scans=tokenzoo.core.traits.Scans())

    svit = timm.create_model("svit_small", img_size=64)
    for model in (sam, svit, *map(scan_cases.build, scan_cases.CORE)):
        with pytest.raises(ValueError, match=f"learns through gates.*{type(model).__name__}"):
            tokenzoo.patch_model(model, Scanning(layers=(0,)))


def test_segmentation_does_not_forget_losses():
    with pytest.raises(ValueError, match="toy_ratio, toy_sure would be left out"):
        SegmentStep(patched(method="toy"), None, False, False, 1)


def test_imports_that_fail(tmp_path, capsys, file):
    broken = tmp_path / "broken_toy.py"
    broken.write_text("import no_such_module_of_ours\n")
    taken = tmp_path / "csv.py"
    taken.write_text("")
    for given, message in (
        (tmp_path / "nowhere.py", "the file does not exist"), ("no_such_module_of_ours", "there is no such module"),
        (broken, "No module named"), (taken, "a module csv is there already"),
    ):  # fmt: skip
        assert main(["list", "--import", str(given)]) == 2
        assert message in capsys.readouterr().err
    assert "broken_toy" not in sys.modules
    assert main(["list", "--import", str(file)]) == 0 and "toy" in capsys.readouterr().out
