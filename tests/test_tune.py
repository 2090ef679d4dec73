"""`tokenzoo.tune`: what it finds, that it reports from images it did not search with, that it can be killed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from cases import build
from test_evaluation import draw
from timm.models.vision_transformer import VisionTransformer

import tokenzoo
from tokenzoo.adapters.inspect import describe
from tokenzoo.cli import main
from tokenzoo.core import registry
from tokenzoo.core.keep_rate import KeepRate
from tokenzoo.core.schedule import kept_of
from tokenzoo.core.selection import keep_best
from tokenzoo.core.traits import BEFORE, Traits
from tokenzoo.evaluation import Precision
from tokenzoo.tuning import budget, judge
from tokenzoo.tuning.candidates import Candidate, Part, pairs, seeds
from tokenzoo.tuning.halving import halve, halvings, planned, rungs
from tokenzoo.tuning.images import split
from tokenzoo.tuning.profile import Profiled, takes_profile
from tokenzoo.tuning.state import State

FEW = ["tome", "topk", "uniform", "pool"]


@pytest.fixture(autouse=True)
def _same_methods():
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def noise(count: int = 32, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def flagged_model() -> VisionTransformer:
    """A model to whose class token dark patches do not exist: their keys get weights of exp(-40) and less."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, mlp_ratio=1, num_classes=7, qkv_bias=True
    ).eval()
    model.pos_embed.zero_()
    model.cls_token.zero_()
    proj = model.patch_embed.proj
    proj.weight.mul_(2)
    proj.weight[0].fill_(12 / proj.weight[0].numel())  # channel 0 is the brightness
    for block in model.blocks:
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        weight[:32].zero_()  # every query asks for the same thing
        bias[:32].fill_(0)
        bias[[0, 16]] = 6
        weight[[32, 48]] = 0
        weight[[32, 48], 0] = 4  # keys answer with the brightness
    model.head.weight.mul_(20)
    return model


def flagged_images(count: int = 32) -> torch.Tensor:
    """Eight bright patches in every image, elsewhere in each."""
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(count, 64, generator=generator).argsort(1)
    bright = (order < 8).float().view(count, 1, 8, 8)
    values = torch.randn(count, 3, 32, 32, generator=generator)
    return values + (6 * bright - 3).repeat_interleave(4, 2).repeat_interleave(4, 3)


def register_flagged() -> None:
    @tokenzoo.register
    @dataclass(frozen=True, kw_only=True)
    class Flagged(KeepRate):
        """Keeps the brightest patches: exactly those that matter to the model of the test."""

        name = "flagged"
        kind = "prune"
        source = "a test"
        traits = Traits(place=BEFORE)

        def map(self, tokens, signals, step):
            return keep_best(tokens.x[..., 0], tokens, kept_of(step, tokens.layout))


# ---- what it finds


def test_finds_what_was_planted():
    """A registered method that removes exactly the tokens that do not matter, among some that do not know them."""
    register_flagged()
    model, images = flagged_model(), flagged_images()
    with torch.no_grad():
        plain = model(images)
        bright = tokenzoo.Recipe.parse("flagged", tokens=8, layers=(0,))
        with tokenzoo.patched(model, bright):
            torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)
    names = ["random", "flagged", "uniform", "radial"]
    found = tokenzoo.tune(model, images, flops=0.5, methods=names, refine=4, progress=False)
    (winner,) = found.winners
    assert winner.recipe["method"] == "flagged" and found.recipe == winner.recipe
    best_other = max(row.value.mean for row in found.rows if row.recipe and row.recipe["method"] != "flagged")
    assert winner.value.mean > -1e-3 > 10 * winner.value.mean + best_other
    labels = plain.argmax(1)
    found = tokenzoo.tune(model, images, flops=0.5, labels=labels, methods=names, refine=0, progress=False)
    assert found.recipe["method"] == "flagged" and found.winners[0].value.mean == 100.0
    assert found.score == "accuracy" and found.rows[0].value.mean == 100.0


def test_moves_strength_to_the_blocks_where_it_costs_nothing():
    """Behind block 2 nothing reads the patches any more: a method that is blind to them can still be free."""
    model = build("deit")
    with torch.no_grad():
        for block in model.blocks[3:]:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    found = tokenzoo.tune(model, noise(), flops=0.8, methods=["random"], refine=24, progress=False)
    winner = found.winners[0]
    (default,) = [row for row in found.rows if row.role == "default"]
    assert winner.value.mean > -1e-5 > default.value.mean
    assert winner.against_default.mean > winner.against_default.se > 0


def test_twice_the_same(tmp_path):
    """And once more from a state that was cut off in the middle of a line, and from one that is whole."""
    options = dict(flops=0.7, methods=FEW, pairs=True, refine=3, progress=False)
    first = tokenzoo.tune(build("deit"), noise(), state=tmp_path / "state.jsonl", **options)
    again = tokenzoo.tune(build("deit"), noise(), **options)
    assert again.rows == first.rows and again.refused == first.refused
    data = (tmp_path / "state.jsonl").read_bytes()
    for cut in (40, len(data) // 2 + 3):
        (tmp_path / "state.jsonl").write_bytes(data[:cut])
        resumed = tokenzoo.tune(build("deit"), noise(), state=tmp_path / "state.jsonl", **options)
        assert resumed.rows == first.rows
        lines = (tmp_path / "state.jsonl").read_text().splitlines()
        assert [json.loads(line).get("value") for line in lines] == [
            json.loads(line).get("value") for line in data.decode().splitlines()
        ]


def test_killed_and_resumed(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_tune, tokenzoo
        calls = []
        def forward(model, images):
            calls.append(1)
            if len(calls) == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return model(images)
        tokenzoo.tune(test_tune.build("deit"), test_tune.noise(), flops=0.7, methods=test_tune.FEW, refine=3,
                      state={str(tmp_path / "state.jsonl")!r}, forward=forward, progress=False)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenzoo.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    begun = len((tmp_path / "state.jsonl").read_text().splitlines())
    options = dict(flops=0.7, methods=FEW, refine=3, progress=False)
    resumed = tokenzoo.tune(build("deit"), noise(), state=tmp_path / "state.jsonl", **options)
    assert 5 < begun < len((tmp_path / "state.jsonl").read_text().splitlines())
    assert resumed.rows == tokenzoo.tune(build("deit"), noise(), **options).rows


# ---- which images do what


def test_the_table_comes_from_images_that_no_search_saw(monkeypatch):
    """What the report runs on and what the search runs on have no image in common; the table is what a hand finds."""
    seen: dict[str, set[int]] = {"search": set(), "final": set()}
    for name in seen:
        function = getattr(judge.scores, name)

        def noted(score, answer, reference, labels, name=name, function=function):
            seen[name] |= set(answer.mul(1e4).round().long()[:, 0].tolist())
            return function(score, answer, reference, labels)

        monkeypatch.setattr(judge.scores, name, noted)
    images, model = noise(40), build("deit")
    images = images.view(40, -1)
    images[:, 0] = torch.arange(40.0)
    images = images.view(40, 3, 32, 32)

    def forward(model, images):
        logits = model(images)
        return torch.cat([images[:, 0, 0, :1] / 1e4, logits[:, 1:]], dim=1)  # the first score is the image's number

    labels = torch.arange(40) % 6 + 1
    options = dict(flops=0.7, methods=FEW, labels=labels, held_out=0.25, seed=3, refine=4, progress=False)
    found = tokenzoo.tune(model, images, forward=forward, **options)
    assert set(found.split.held_out) == seen["final"] and set(found.split.search) == seen["search"]
    assert len(seen["final"]) == 10 and not seen["final"] & seen["search"]
    held = list(found.split.held_out)
    for row in found.rows:
        with torch.no_grad():
            if row.recipe is not None:
                tokenzoo.patch_model(model, row.recipe)
            right = (forward(model, images[held]).argmax(1) == labels[held]).double()
            if row.recipe is not None:
                tokenzoo.unpatch_model(model)
            else:
                plain = right
        assert row.value.mean == pytest.approx(100 * right.mean().item())
        if row.recipe is not None:
            assert row.difference.mean == pytest.approx(100 * (right - plain).mean().item())
            assert row.difference.se == pytest.approx(100 * (right - plain).std().item() / 10**0.5)
    assert f"{len(held)} held-out images, none of the 30 that the search went by" in str(found)


def test_split_is_a_partition_and_follows_the_seed():
    parts = split(101, 0.3, 0)
    assert sorted(parts.search + parts.held_out) == list(range(101)) and len(parts.held_out) == 30
    assert split(101, 0.3, 0) == parts != split(101, 0.3, 1)


# ---- budgets


def test_nothing_costs_more_than_was_asked():
    model = build("deit")
    found = tokenzoo.tune(model, noise(), flops=(0.55, 0.8), methods=[*FEW, "evit", "ats"], refine=2, progress=False)
    assert [row.budget for row in found.winners] == ["flops=0.8", "flops=0.55"]
    for row in found.rows[1:]:
        with tokenzoo.patched(model, row.recipe):
            costs = tokenzoo.report(model)
            assert costs.data_dependent or costs.ratio == pytest.approx(row.share)
        assert row.share <= float(row.budget.removeprefix("flops="))
    assert all(a.cost >= b.cost for a, b in zip(found.rows, found.rows[1:]))


def test_solve_stays_below():
    model = build("deit")
    for share in (0.5, 0.6, 0.7):
        recipe = tokenzoo.apply.patch.solve(model, tokenzoo.Recipe.parse("pool"), share)
        with tokenzoo.patched(model, recipe):
            assert tokenzoo.report(model).ratio <= share
    assert not tokenzoo.is_patched(model)


def test_time_is_what_counts_under_latency(monkeypatch):
    """A method that costs more time than its multiply-adds say is made stronger, or named."""

    def measured(self, recipe):
        with tokenzoo.patched(self.own, recipe):
            extra = {"tome": 0.07, "topk": 0.0}.get(recipe["method"], 0.6)
            return round(tokenzoo.report(self.own).ratio + extra, 4)

    monkeypatch.setattr(budget.Timer, "_measure", measured)
    found = tokenzoo.tune(build("deit"), noise(), latency=0.7, methods=FEW, refine=2, progress=False)
    assert all(row.time <= 0.7 for row in found.rows if row.budget == "latency=0.7")
    assert all(row.share <= 0.63 for row in found.rows if row.label == "tome" and row.budget == "latency=0.7")
    assert "latency=0.7 was not reached by pool, which takes" in found.refused["pool"]
    assert "time %" in str(found)


def test_real_time_is_measured(tmp_path):
    model, state = build("deit"), State(tmp_path / "state.jsonl", {})
    timer = budget.Timer(model, copy.deepcopy(model), noise(4), Precision(torch.float32), 3, state, lambda m, x: m(x))
    ratio = timer.ratio({"method": "topk", "keep_rate": 0.5})
    assert 0.05 < ratio < 20 and timer.ratio({"method": "topk", "keep_rate": 0.5}) == ratio
    state.close()
    assert json.loads((tmp_path / "state.jsonl").read_text().splitlines()[1])["value"] == ratio
    assert not tokenzoo.is_patched(timer.own)


def test_stops_when_the_time_is_up(tmp_path):
    options = dict(flops=0.7, refine=50, progress=False, state=tmp_path / "state.jsonl")
    found = tokenzoo.tune(build("deit"), noise(), budget_minutes=1e-6, **options)
    assert found.stopped and found.tried <= 4 and len(found.winners) == 1
    assert "the time was up" in str(found)


# ---- what takes part


def test_every_method_takes_part_or_is_named():
    class Learns(tokenzoo.core.learned.Learned, KeepRate):
        """Learns."""

        name = "learns"

    tokenzoo.register(Learns)
    found = tokenzoo.tune(build("gap"), noise(8), flops=0.7, refine=0, progress=False)
    started = {name for name in tokenzoo.list_methods() if name not in found.refused}
    assert {"tome", "topk", "evit", "uniform"} <= started and found.tried >= len(started)
    assert "looks into the scan" in found.refused["famba"] and "class token" in found.refused["ats"]
    assert "not trained" in found.refused["learns"] and "cannot be reached" in found.refused["vggt"]


def test_schedules():
    info = describe(build("deit"))
    tome = {c.schedule: c.parts[0] for c in seeds("tome", info)}
    assert set(tome) == {"default", "early", "late"}
    assert tome["early"].weights == tome["late"].weights[::-1] and tome["early"].weights[0] == 1
    topk = {c.schedule: c.parts[0] for c in seeds("topk", info)}
    # every block but the first is its default in a model of four
    assert set(topk) == {"default", "by image", "early", "late"}
    assert (topk["early"].layers, topk["late"].layers) == ((0, 1, 2), (2, 3))
    pool = {c.schedule for c in seeds("pool", info)}
    assert pool == {"default", "late"} or pool == {"default", "early", "late"}
    both = pairs([Candidate((Part("tome"),)), Candidate((Part("topk"),))], info)
    assert [c.label for c in both] == ["tome+topk, halves", "topk+tome, halves"]
    assert [c.parts[1].method().name for c in seeds("reconstruct", info)] == ["reconstruct"]


@pytest.mark.parametrize("method", ["tome", "topk", "evit", "ats", "diffrate", "mctf"])
def test_profiles_say_how_strong_each_block_is(method):
    info = describe(build("deit"))
    layers = (1, 2, 3)
    made = registry.create_method(method, layers=layers)
    assert takes_profile(made, 4, info.layout)
    recipe = Profiled(methods=(made,), profiles=((0.0, 1.0, 0.2),))
    counts = [step_row for step_row in recipe.dial(0.4, 4, info.layout).token_counts(4, info.layout)]
    removed = [sum(before - after for _, before, after in row) for row in counts]
    assert removed[0] == removed[1] == 0 and removed[2] > removed[3] >= 0
    strongest = recipe.dial(1.0, 4, info.layout).token_counts(4, info.layout)  # what blocks can follow, and no more
    assert [row for row in strongest if row][-1][-1][2] >= 2


def test_every_block_in_deeper_models():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=8, num_heads=2, num_classes=3)
    found = {c.schedule: c.parts[0] for c in seeds("evit", describe(model))}
    assert set(found) == {"default", "by image", "every block", "early", "late"}
    assert found["every block"].layers == tuple(range(1, 8)) and found["early"].layers == (1, 3, 5)
    assert [c.parts[0].layers for c in seeds("cluster", describe(model))] == [None, (2,), (4,)]


@pytest.mark.parametrize("method", ["tome", "topk", "diffrate"])
def test_rising_weights_remove_a_rising_share(method):
    """Of the tokens that are left at each block, whatever form the options of the method have."""
    info = describe(VisionTransformer(img_size=64, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=3))
    made = registry.create_method(method, layers=tuple(range(6)))
    recipe = Profiled(methods=(made,), profiles=((0.1, 0.2, 0.4, 0.6, 0.8, 1.0),)).dial(0.3, 6, info.layout)
    shares = [1 - after / before for ((_, before, after),) in recipe.token_counts(6, info.layout)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] > 4 * shares[0]


def test_methods_of_one_strength_take_no_profile():
    info = describe(build("deit"))
    for method in ("tomesd", "pool"):
        assert not takes_profile(registry.create_method(method, layers=(1, 2)), 4, info.layout)


def test_rounds():
    assert planned(100, (16, 32, 64), 6) == 16 * 100 + 16 * 50 + 32 * 25 and planned(3, (64,), 6) == 192
    assert halvings(256) == (32, 64, 128, 256) and halvings(20) == (20,)
    assert rungs(100, 256, 6) == (32, 64, 128, 256) and rungs(12, 256, 6) == (128, 256) and rungs(3, 64, 6) == (64,)


@pytest.mark.parametrize("looks", [None, 5, 20, 45])
def test_halving_ends_with_the_best(looks):
    """Candidates i of value i and noise: the better half is looked at further, and what time does not allow is left."""
    draws, calls = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)), []

    def look(candidate, count):
        calls.append((candidate, count))
        return candidate / 8 + draws[candidate, :count]

    def up():
        return looks is not None and len(calls) >= looks

    found = halve(range(40), look, rungs(40, 128, 4), 4, up)
    numbers = [r.fitted for r in found]
    lengths = [len(r.values) for r in found]
    if looks is None:
        assert [sum(count == c for _, count in calls) for c in (32, 64, 128)] == [40, 20, 10]
        assert numbers[0] >= 37 and sorted(numbers) == list(range(40)) and lengths == sorted(lengths, reverse=True)
        assert set(lengths) == {32, 64, 128} and len(calls) == 70
    else:
        assert len(calls) == looks and set(lengths) == {32}  # the first round stands, a second one is not through
        assert sorted(numbers) == list(range(min(looks, 40)))


# ---- models without classes


@pytest.mark.parametrize("name", ["no_head", "pooled", "segmenter"])
def test_models_without_classes_are_held_against_themselves(name):
    if name == "segmenter":
        model = tokenzoo.dense.Segmenter(build("deit"), tokenzoo.dense.LinearHead(32, 5), 5).eval()
    else:
        model = build("no_head" if name == "no_head" else "gap")
        if name == "pooled":
            model.reset_classifier(0)
    found = tokenzoo.tune(model, noise(16), flops=0.7, methods=["tome", "topk"], refine=0, progress=False)
    assert found.score == "cosine" and 0.1 < found.winners[0].value.mean < 1
    assert found.rows[0].value.mean == pytest.approx(1)
    assert ("dense" in found.recipe) == (name != "pooled")
    with pytest.raises(ValueError, match="and no classes; leave labels out"):
        tokenzoo.tune(model, noise(16), flops=0.7, labels=[0] * 16)


def test_outputs_of_several_fields():
    class Output(dict):
        pass

    def forward(model, images):
        return Output(hidden=images, logits=model(images))

    options = dict(flops=0.7, methods=["topk"], refine=0, progress=False)
    found = tokenzoo.tune(build("deit"), noise(16), forward=forward, **options)
    assert found.rows == tokenzoo.tune(build("deit"), noise(16), **options).rows
    with pytest.raises(TypeError, match="returns str, in which no logits or features were found; give forward="):
        tokenzoo.tune(build("deit"), noise(16), forward=lambda model, images: "no", **options)


def test_the_model_is_left_alone():
    model = build("deit")
    before, state = model(noise(4)), {k: v.clone() for k, v in model.state_dict().items()}
    tokenzoo.tune(model.train(), noise(16), flops=0.7, methods=FEW, refine=1, progress=False)
    assert model.training and not tokenzoo.is_patched(model)
    assert torch.equal(model.eval()(noise(4)), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_another_number_format_is_that_of_a_copy():
    model = build("deit")
    options = dict(flops=0.7, methods=["topk"], refine=0, progress=False)
    found = tokenzoo.tune(model, noise(16), precision=Precision(torch.bfloat16), **options)
    assert next(model.parameters()).dtype == torch.float32
    assert found.winners[0].value.mean != tokenzoo.tune(model, noise(16), **options).winners[0].value.mean


# ---- bad input, in one sentence


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "tune needs either flops=... or latency=..., such as flops=0.6; neither was given"),
        ({"flops": 0.6, "latency": 0.6}, "both were given"),
        ({"flops": 1.2}, r"flops=1.2; give a share of the unpatched multiply-adds in \(0, 1\]"),
        ({"flops": 0}, "flops=0; give a share"),
        ({"latency": "fast"}, "latency='fast'; give a share of the unpatched time"),
        ({"flops": []}, "flops=None; give a share"),
        ({"flops": 0.6, "images": []}, "there are no images to search with"),
        ({"flops": 0.6, "images": noise(7)}, "7 images are too few to split into"),
        ({"flops": 0.6, "images": noise(8)[0]}, r"images have shape \(3, 32, 32\); give \[N, C, H, W\]"),
        ({"flops": 0.6, "images": [noise(1)[0]] * 9 + [noise(1, 16)[0]]}, r"image 9 is \(3, 16, 16\); give tensors"),
        ({"flops": 0.6, "images": 3}, "images=int; give a tensor"),
        ({"flops": 0.6, "labels": [1, 2]}, r"labels have shape \(2,\), but there are 16 images; give one class"),
        ({"flops": 0.6, "labels": [9] * 16}, "labels hold class 9, but the model answers with classes 0 to 6"),
        ({"flops": 0.6, "methods": ["tone"]}, "method 'tone' is unknown; did you mean 'tome'"),
        ({"flops": 0.6, "methods": []}, r"methods=\[\]; give a list with at least one name"),
        ({"flops": 0.6, "methods": "tome"}, "methods='tome'; give a list"),
        ({"flops": 0.6, "held_out": 1.0}, "held_out=1.0; give the share"),
        ({"flops": 0.6, "refine": -1}, "refine=-1; give a whole number of at least 0"),
        ({"flops": 0.6, "batch_size": 0}, "batch_size=0; give a whole number of at least 1"),
        ({"flops": 0.6, "budget_minutes": 0}, "budget_minutes=0 has to be positive"),
        ({"flops": 0.6, "agreement": "l2"}, "agreement='l2'; give one of kl, cosine"),
        ({"flops": 0.6, "agreement": "kl", "labels": [1] * 16}, "is for images without labels"),
        ({"flops": 0.05, "methods": ["tome"]}, "no method reaches flops=0.05 on this model .tome: flops=0.05"),
        ({"flops": 0.05}, "no method reaches flops=0.05 on this model .* cannot be reached: .*; and [0-9]+ more"),
        ({"flops": 0.6, "state": "none/state.jsonl"}, "the folder none does not exist"),
    ],
)  # fmt: skip
def test_refuses(given, message):
    given = {"images": noise(16), "progress": False, **given}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        tokenzoo.tune(build("deit"), **given)
    assert "\n" not in str(error.value)


def test_refuses_a_patched_model_and_strange_states(tmp_path):
    model, state = build("deit"), tmp_path / "state.jsonl"
    with tokenzoo.patched(model, "tome", r=1), pytest.raises(ValueError, match="is patched already"):
        tokenzoo.tune(model, noise(16), flops=0.7)
    options = dict(flops=0.9, methods=["topk"], refine=0, progress=False, state=state)
    tokenzoo.tune(model, noise(16), **options)
    with pytest.raises(ValueError, match=r"belongs to another search \(its weights differ\); name another file"):
        tokenzoo.tune(build("deit", seed=1), noise(16), **options)
    with pytest.raises(ValueError, match=r"its images, split differ"):
        tokenzoo.tune(model, noise(20), **options)
    state.write_text("no JSON\n")
    with pytest.raises(ValueError, match="is not a state of `tune`; name another file"):
        tokenzoo.tune(model, noise(16), **options)


# ---- the command

TINY = (
    "--model vit_tiny_patch16_224 --device cpu --img-size 32 --model-kwargs patch_size=8 depth=3 embed_dim=32".split()
)
TINY += ["num_heads=2", "--workers", "0", "--no-progress"]


def test_command(tmp_path, capsys, monkeypatch):
    folder, output = draw(tmp_path / "images", count=8), tmp_path / "tuned"
    plugin = tmp_path / "my_tune_methods.py"
    plugin.write_text("import tokenzoo\n\nclass Mine(tokenzoo.ToMe):\n    name = 'mine'\n\ntokenzoo.register(Mine)\n")
    words = ["tune", *TINY, "--num-classes", "4", "--data-dir", str(folder), "--flops", "0.7", "--refine", "2"]
    words += ["--import", str(plugin), "--methods", "mine", "topk", "--output", str(output), "--max-images", "24"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "12 held-out images, none of the 12" in said and "top-1 %" in said and "mine" in said
    names = {p.name for p in output.iterdir()}
    assert names == {"best.yaml", "recipes", "state.jsonl", "tune.json", "tune.png"}
    text = (output / "best.yaml").read_text()
    assert text.startswith("# ") and "12 images that the search did not look at" in text
    record = json.loads((output / "tune.json").read_text())
    (winner,) = [row for row in record["rows"] if row["role"] == "winner"]
    assert winner["recipe"] == yaml.safe_load(text) and winner["share"] <= 0.7
    assert record["environment"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(judge.Judge, "answer", None)  # everything is in the state
    assert main(words) == 0
    assert capsys.readouterr().out == said
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))
    import tune_against_defaults

    tune_against_defaults.main(words[1:])
    rows = capsys.readouterr().out.splitlines()[3:]
    assert sorted(row.split()[0].strip(",") for row in rows) in (["mine", "mine", "topk"], ["mine", "topk", "topk"])
    assert sum("(found)" in row for row in rows) == 1
    words = ["eval", *TINY, "--num-classes", "4", "--data-dir", str(folder), "--method", str(output / "best.yaml")]
    assert main(words) == 0


def test_command_without_labels(tmp_path, capsys):
    folder = draw(tmp_path / "images", classes=1, count=9)
    words = ["tune", *TINY, "--data-dir", str(folder / "class_0"), "--flops", "0.8", "0.7", "--no-labels"]
    assert main([*words, "--methods", "topk", "--output", str(tmp_path / "tuned"), "--refine", "0"]) == 0
    assert "-KL" in capsys.readouterr().out
    assert {"best_flops=0.8.yaml", "best_flops=0.7.yaml"} <= {p.name for p in (tmp_path / "tuned").iterdir()}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--flops", "0.7"], "no images named; give --data-dir"),
        (["--flops", "0.7", "--data-dir", "none"], "--data-dir none does not exist"),
        (["--flops", "0.7", "--data-dir", "none", "--no-labels"], "--data-dir none is not a folder"),
        (["--flops", "0.7", "--data-dir", "images", "--no-labels", "--class-map", "x"], "leave --dataset and"),
        (["--flops", "0.7", "--data-dir", "images", "--max-images", "0"], "--max-images 0 is not positive"),
        (["--flops", "0.7", "--data-dir", "images", "--methods", "tone"], "did you mean 'tome'"),
        (["--flops", "1.7", "--data-dir", "images"], "flops=1.7; give a share"),
    ],
)
def test_command_refuses(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "images", classes=2, count=4)
    assert main(["tune", *TINY, "--num-classes", "2", "--output", "tuned", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenzoo tune: ") and message in error and error.count("\n") == 1
