"""What the documents say is true: code runs, commands parse, tables are fresh, files exist, configurations load."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import timm.models.vision_transformer
import torch
import yaml
from cases import COMPANION, KEEPS_LENGTH
from safetensors import safe_open
from torch import nn
from torch.distributed.run import get_args_parser

import tokenzoo
from tokenzoo.cli import build_parser
from tokenzoo.cli.common import runs_of
from tokenzoo.core import registry
from tokenzoo.training.options import parse_options

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "docs" / name for name in ("architecture.md", "explain.md", "prompts.md", "scaling.md")),
]
CONFIGS = [path for path in sorted(ROOT.glob("configs/*/*.yaml")) if not path.stem.endswith("_train")]  # recipes
README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGEST_PICTURE = 300_000  # bytes
NEWEST = hasattr(timm.models.vision_transformer, "DiffParallelScalingBlock")

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
configs = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def words(path: Path) -> set[str]:
    """Everything between single backticks, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


def skeleton(name: str) -> nn.Module:
    """A timm model without memory for its weights, where timm can make one: reports need shapes only."""
    with warnings.catch_warnings(), torch.device("meta" if NEWEST else "cpu"):
        warnings.simplefilter("ignore")
        return timm.create_model(name)


# ---- README: code


@pytest.fixture
def namespace(monkeypatch) -> Iterator[dict]:
    """Names that code of a document defines; methods it registers are gone afterwards."""
    before = dict(registry._METHODS)
    monkeypatch.chdir(ROOT)
    yield {"__name__": "document"}
    registry._METHODS.clear()
    registry._METHODS.update(before)


def run_code(text: str, names: dict) -> None:
    code = "\n".join(blocks(text, "python"))
    assert code.count("pretrained=True") == text.count("pretrained=True)")
    torch.manual_seed(0)
    with torch.no_grad():
        code = code.replace("pretrained=True", "pretrained=False")
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)


def test_readme_code_runs(namespace, capsys):
    run_code(README, namespace)
    printed = capsys.readouterr().out.strip()
    assert printed == blocks(README, "text")[0].strip(), "the report in the README is not what the code prints"
    assert [tuple(x.shape) for x in namespace["maps"]] == [(2, 384, 14, 14)] * 2
    assert tuple(namespace["where"].shape) == (2, 197)
    assert namespace["logits"].shape == (2, 1000)
    assert abs(namespace["share"] - 0.6) < 0.006
    assert "loudest" in tokenzoo.list_methods()


def test_the_example_method_is_complete(namespace):
    """What the README promises about a new method: composition, budgets by hand, padding, dense maps, reports."""
    run_code("\n".join(["```python\nimport tokenzoo, timm\n```", *_example()]), namespace)
    from cases import build, images

    loudest = namespace["Loudest"]
    assert issubclass(loudest, tokenzoo.Method)
    for name in ("deit", "registers", "gap", "dinov3", "parallel_scaling"):
        model = build(name)
        x, prefix = images(model), model.num_prefix_tokens
        with torch.no_grad():
            plain = model(x)
            with tokenzoo.patched(model, loudest(keep=16)):
                torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
            with tokenzoo.patched(model, "loudest", keep=5, layers=(1,)):
                tokens = model.forward_tokens(x, trace=True)
                assert tokens.length == prefix + 5 == tokenzoo.report(model).tokens_out
                assert [(step.block, step.map.n_out) for step in tokens.trace] == [(1, prefix + 5)]
                assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[2:] == (4, 4)
    padded = build("deit")
    tokenzoo.patch_model(padded, [tokenzoo.ATS(layers=(0,)), loudest(keep=8, layers=(2,))])
    x = images(padded)
    with torch.no_grad():
        alone = torch.cat([padded(image[None]) for image in x])
        torch.testing.assert_close(padded(x), alone, atol=2e-5, rtol=1e-4)


def _example() -> list[str]:
    return [f"```python\n{code}```" for code in blocks(README, "python") if "tokenzoo.register" in code]


def test_the_example_method_is_short():
    (example,) = _example()
    tree = ast.parse(blocks(example, "python")[0])
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    lines = ast.unparse(cls).splitlines()
    assert len([line for line in lines if line.strip()]) <= 15


# ---- commands


def commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8"), "bash"):
            found += [line for line in block.splitlines() if line.startswith("tokenzoo ")]
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = build_parser().parse_args(shlex.split(command, comments=True)[1:])
    if hasattr(args, "model"):
        assert timm.is_model(args.model)
        runs_of(args)  # names, options and recipe files of the methods


def training_commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8"), "bash"):
            found += [line for line in block.splitlines() if " train_imagenet.py " in line]
    return found


@pytest.mark.parametrize("command", training_commands())
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    launcher, arguments = words[: words.index("train_imagenet.py")], words[words.index("train_imagenet.py") + 1 :]
    args = parse_options(arguments)
    assert timm.is_model(args.model)
    assert not (args.dataset.startswith("wds/") and args.aug_repeats)
    if launcher[0] == "torchrun":
        parsed = get_args_parser().parse_args([*launcher[1:], "train_imagenet.py"])
        assert parsed.nproc_per_node == "8" and parsed.training_script_args == []
    else:
        assert launcher == ["python"]


def test_every_command_is_shown():
    from tokenzoo.cli import COMMANDS

    assert {command.split()[1] for command in commands()} == set(COMMANDS)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for path in DOCUMENTS for target in re.findall(r"\bmake ([a-z]+)", "\n".join(
        [*blocks(path.read_text(encoding="utf-8"), "bash"), *words(path)]))}  # fmt: skip
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


# ---- tables


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


newest = pytest.mark.skipif(not NEWEST, reason="the table names blocks that the installed timm lacks")


def check(tables: ModuleType, path: Path, monkeypatch) -> int:
    monkeypatch.setattr(tables, "README", path)
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    return tables.main()


@newest
def test_tables_are_fresh(tables, monkeypatch):
    assert check(tables, ROOT / "README.md", monkeypatch) == 0, "run python scripts/readme_tables.py"


@newest
def test_stale_tables_are_noticed_and_mended(tables, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "README.md"
    copy.write_text(README.replace("ICLR 2023", "ICLR 1923"), encoding="utf-8")
    assert check(tables, copy, monkeypatch) == 1
    assert "stale" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
    assert tables.main() == 0 and copy.read_text(encoding="utf-8") == README
    with pytest.raises(ValueError, match="begin methods"):
        tables.render("no markers")


def test_speed_is_copied_from_the_results_file(tables, tmp_path):
    from tokenzoo.evaluation.results import BENCH_COLUMNS, write_results

    row = dict.fromkeys(BENCH_COLUMNS, "x") | dict(
        method="tome", method_kwargs={"r": 13}, infer_gmacs=2.5, infer_samples_per_sec=31.25, speedup=1.5, compiled="",
        speedup_q1=1.4, speedup_q3=1.6, gmac_ratio=1.7, speedup_per_gmac_ratio=0.882, clock="process time",
    )  # fmt: skip
    file = tmp_path / "bench.csv"
    environment = {"device": "some CPU", "threads": 1, "torch": "2", "timm": "1", "command": "tokenzoo bench -m y"}
    write_results(file, [row], BENCH_COLUMNS, environment)
    section = tables.speed_section(file)
    assert "| `tome` | r=13 | 2.50 | 31.2 | 1.50 | 1.40 to 1.60 | 1.70 | 0.88 |" in section
    assert "some CPU, threads: 1" in section and "tokenzoo bench -m y" in section
    assert tables.speed_section(tmp_path / "missing.csv") == ""


# ---- files, names, versions


@documents
def test_links_and_pictures_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            file = path.parent / target
            assert file.is_file(), f"{path.name} links to {target}"
            if file.suffix == ".png":
                assert file.stat().st_size < LARGEST_PICTURE, f"{target} has {file.stat().st_size} bytes"


@documents
def test_named_files_exist(path):
    for word in words(path):
        if re.fullmatch(r"(tokenzoo|tests|scripts|examples|configs|docs|results)(/[\w.+-]+)+/?", word):
            assert (ROOT / word).exists(), f"{path.name} names {word}"


@documents
def test_named_objects_exist(path):
    for word in words(path):
        found = re.fullmatch(r"(tokenzoo(?:\.\w+)+)(\(.*\))?", word)
        if found is None:
            continue
        parts = found.group(1).split(".")
        value = tokenzoo
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:i]))
            value = getattr(value, part)


def test_the_accuracy_named_is_that_of_the_checkpoint():
    with safe_open(ROOT / "examples" / "digits_vit.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert f"{100 * about['test_accuracy']:.2f} % of the {about['split']['test_images']} test digits" in _unwrapped()
    assert about["recipe"]["patch_drop_rate"] == 0.5 and "random half of the patches" in _unwrapped()


def _unwrapped() -> str:
    return " ".join(README.split())


def test_versions_agree():
    version = tokenzoo.__version__
    assert re.search(rf'^version = "{re.escape(version)}"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# ---- the direction of imports, as the table in docs/architecture.md states it


def rooms() -> dict[str, set[str]]:
    """Which modules each may import, from the table."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\| (.*?) \|$", section, re.MULTILINE)
    return {room: set(re.findall(r"`([\w/]+)`", allowed)) for room, allowed in rows}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, as paths such as "adapters/block"."""
    package = ROOT / "tokenzoo"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1]
        for part in (node.module or "").split("."):
            base = base / part if part else base
        for name in [base / alias.name for alias in node.names]:
            target = name if name.with_suffix(".py").is_file() or name.is_dir() else base
            found.add(target.relative_to(package).as_posix())
    return found - {"."}


def room_of(module: str, known: dict[str, set[str]]) -> str | None:
    """The row of the table that a module stands in: its own, else that of its folder."""
    return next((name for name in (module, module.split("/")[0]) if name in known), None)


def test_imports_point_the_way_the_table_says():
    known = rooms()
    files = [p for p in (ROOT / "tokenzoo").rglob("*.py") if p.name != "__init__.py" and "kept" not in p.parts]
    seen = set()
    for path in files:
        module = path.relative_to(ROOT / "tokenzoo").with_suffix("").as_posix()
        room = room_of(module, known)
        assert room is not None, f"docs/architecture.md has no row for tokenzoo/{module}.py"
        seen.add(room)
        for target in imported(path):
            other = room_of(target, known)
            assert other == room or other in known[room], f"tokenzoo/{module}.py imports {target}: not in its row"
    assert seen == set(known), f"rows without a file: {set(known) - seen}"


# ---- configurations


def test_every_method_has_a_configuration():
    assert {path.parent.name for path in CONFIGS if "+" not in path.parent.name} == set(tokenzoo.list_methods())
    for method in tokenzoo.list_methods():
        backbones = {path.stem for path in CONFIGS if path.parent.name == method}
        assert len(backbones) > 1 and backbones & {"deit_small_patch16_224", "vim_small_patch16_224"}, method
        trained = [path.stem.removesuffix("_train") for path in ROOT.glob(f"configs/{method}/*_train.yaml")]
        assert trained and set(trained) <= backbones, f"{method} has no training configuration"


@configs
def test_configuration_patches_its_backbone(path):
    if not timm.is_model(path.stem):
        pytest.skip(f"the installed timm lacks {path.stem}")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    # rebuilt rotary tables are compared with timm's own, which takes numbers
    real = settings.get("merged_positions") == "mean"
    model = timm.create_model(path.stem) if real else skeleton(path.stem)
    depth, before = len(model.blocks), tokenzoo.report(model)
    tokenzoo.patch_model(model, path)
    report = tokenzoo.report(model)
    names = [part["method"] for part in settings["method"]] if isinstance(settings["method"], list) else None
    # a method that cannot stand alone brings another one along, which has a folder of its own
    assert "+".join(names or [settings["method"]]) == path.parent.name or COMPANION.get(path.parent.name) in names
    assert len(model.blocks) == depth == len(report.rows) - 2
    acting = {name for row in report.rows for name in row.methods.split(", ") if name}
    assert acting == set(names or [settings["method"]])
    assert report.unpatched == before.total
    if report.data_dependent:
        assert report.tokens_out <= before.tokens_out
    else:
        dense = path.parent.name in KEEPS_LENGTH
        assert report.tokens_out <= before.tokens_out if dense else report.tokens_out < before.tokens_out
        assert report.ratio < 1
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_configurations_run():
    """The settings for DeiT-S leave as many tokens as their reports say."""
    model = timm.create_model("deit_small_patch16_224").eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for path in sorted(ROOT.glob("configs/*/deit_small_patch16_224.yaml")):
        with torch.no_grad(), tokenzoo.patched(model, path):
            tokens, report = model.forward_tokens(image), tokenzoo.report(model)
        assert tokens.x.isfinite().all()
        assert tokens.length == report.tokens_out or report.data_dependent and tokens.length < report.tokens_out
