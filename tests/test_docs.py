"""What the documents say is true: code runs, commands parse, tables are fresh, files exist, configurations load."""

from __future__ import annotations

import argparse
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
from tokenzoo.cli.vlm_common import recipes_of
from tokenzoo.core import handover, registry
from tokenzoo.core.mixins import OwnAttention
from tokenzoo.training.options import options_of, parse_options
from tokenzoo.vlm import registry as vlm_registry

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
NOTES = sorted([*ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("examples/*.md")])
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES, *NOTES]
CONFIGS = [path for path in sorted(ROOT.glob("configs/*/*.yaml")) if not path.stem.endswith("_train")]  # recipes
README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGEST_PICTURE = 300_000  # bytes
FOLDERS = "tokenzoo|tests|scripts|examples|configs|docs|results|benchmarks"
NEWEST = hasattr(timm.models.vision_transformer, "DiffParallelScalingBlock")

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
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


# ---- README and docs: code


@pytest.fixture
def namespace(monkeypatch) -> Iterator[dict]:
    """Names that code of a document defines; methods it registers are gone afterwards."""
    tables = (registry._METHODS, vlm_registry._SELECTORS, vlm_registry._DROPPERS, handover._BEYOND)
    before = [dict(table) for table in tables]
    monkeypatch.chdir(ROOT)
    yield {"__name__": "document"}
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def run_code(text: str, names: dict) -> None:
    code = "\n".join(blocks(text, "python"))
    assert code.count("pretrained=True") == text.count("pretrained=True)")
    torch.manual_seed(0)
    with torch.set_grad_enabled("backward()" in code):
        code = code.replace("pretrained=True", "pretrained=False")
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_readme_code_runs(namespace, capsys):
    run_code(README, namespace)
    printed = capsys.readouterr().out.strip()
    assert printed == blocks(README, "text")[0].strip(), "the report in the README is not what the code prints"
    assert namespace["logits"].shape == (2, 1000) and namespace["scores"].shape == (2, 1000)
    assert "loudest" in tokenzoo.list_methods()


# the sketches of docs/architecture.md are methods to come; docs/explain.md needs libraries of others and gradients, and
# is run by tests/interop/test_grad_cam.py; docs/learned.md by tests/test_learned.py
ELSEWHERE = {"architecture", "explain", "learned"}
CODE = [path for path in PAGES if blocks(path.read_text(encoding="utf-8"), "python") and path.stem not in ELSEWHERE]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.stem)
def test_code_of_the_pages_runs(path, namespace):
    """Every page stands alone, and its results are what its comments say."""
    run_code(path.read_text(encoding="utf-8"), namespace)
    RESULTS[path.stem](namespace)


def _usage(names: dict) -> None:
    assert [tuple(x.shape) for x in names["maps"]] == [(2, 384, 14, 14)] * 2
    assert tuple(names["where"].shape) == (2, 197)
    assert names["logits"].shape == (2, 1000)
    assert abs(names["share"] - 0.6) < 0.006 and abs(names["spent"] - 0.7) < 0.05
    assert [part["method"] for part in names["recipe"]["method"]] == ["evit", "tome"]


def _vlm(names: dict) -> None:
    assert names["answer"].shape[1] > names["ids"].shape[1] and not tokenzoo.is_patched(names["model"])
    assert names["Loud"](keep=4).count(9) == 4 and names["Half"]().count(9, 0) == 4


def _quickstart(names: dict) -> None:
    assert tuple(names["logits"].shape) == (2, 1000) and abs(names["share"] - 0.6) < 0.006
    assert tokenzoo.report(names["model"]).ratio <= 0.7


def _segmentation(names: dict) -> None:
    assert tuple(names["scores"].shape) == (1, 11, 240, 320)


def _backbones(names: dict) -> None:
    assert tuple(names["logits"].shape) == (2, 1000)


def _serve(names: dict) -> None:
    assert {route.path for route in names["app"].routes} >= {"/api/about", "/api/run"}


def _export(names: dict) -> None:
    assert tuple(names["logits"].shape) == (5, 1000)


def _measuring(names: dict) -> None:
    assert names["traced"] == pytest.approx(names["formula"], rel=0.01)


def _prompts(names: dict) -> None:
    assert tuple(names["z"].shape) == (2, 11 + 196 - 12 * 8, 192)


def _tune(names: dict) -> None:
    assert names["share"] <= 0.7 and names["found"].recipe["method"] in ("tome", "topk", "uniform")
    assert names["cost"] == names["rates"].share <= 0.7


def _training(names: dict) -> None:
    assert names["model"].num_reg_tokens == 4 and tokenzoo.is_patched(names["model"])


def _adapters(names: dict) -> None:
    assert names["learning"] and all("lora" in name or "modules_to_save" in name for name in names["learning"])
    torch.testing.assert_close(names["merged"], names["adapted"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(names["small"], names["full"]) and abs(names["share"] - 0.6) < 0.006
    assert (names["small"] - names["full"]).norm() < 0.25 * names["full"].norm()


RESULTS = {
    "adapters": _adapters, "backbones": _backbones, "export": _export, "measuring": _measuring, "prompts": _prompts,
    "quickstart": _quickstart, "segmentation": _segmentation, "serve": _serve, "training": _training, "tune": _tune,
    "usage": _usage, "vlm": _vlm,
}  # fmt: skip


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


def lines() -> list[str]:
    """Every line of every bash block, broken lines put together."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8"), "bash"):
            found += re.sub(r"\\\n\s*", "", block).splitlines()
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    """Under torchrun too."""
    found = [line.partition(" tokenzoo ")[2] for line in lines() if line.startswith("torchrun --no-python ")]
    return [*(line for line in lines() if line.startswith("tokenzoo ")), *(f"tokenzoo {words}" for words in found)]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words, _, _ = command.partition(" > ")  # what it prints may go into a file
    args = build_parser().parse_args(shlex.split(words, comments=True)[1:])
    if args.command == "train":
        check_training(options_of(vars(args)))
    elif args.command == "vlm":
        assert recipes_of(args)
    elif hasattr(args, "model"):
        assert timm.is_model(args.model)
        alone = ("tune", "rates", "serve")  # choose methods themselves
        assert hasattr(args, "method") or args.command in alone
        if args.command not in alone:
            args.method = [words for words in args.method if not words[0].startswith("runs/")]  # of a run in front
            runs_of(args)  # names, options and recipe files of the methods


def check_training(args: argparse.Namespace) -> None:
    assert timm.is_model(args.model)
    assert not (args.dataset.startswith("wds/") and args.aug_repeats)


def training_commands() -> list[str]:
    return [line for line in lines() if " train_imagenet.py " in line]


@pytest.mark.parametrize("command", training_commands())
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    launcher, arguments = words[: words.index("train_imagenet.py")], words[words.index("train_imagenet.py") + 1 :]
    check_training(parse_options(arguments))
    if launcher[0] == "torchrun":
        parsed = get_args_parser().parse_args([*launcher[1:], "train_imagenet.py"])
        assert parsed.nproc_per_node == "8" and parsed.training_script_args == []
    else:
        assert launcher == ["python"]


def test_training_commands_are_shown():
    """In all three forms: the command, its front, and the front under torchrun."""
    assert {line.split()[0] for line in training_commands()} == {"python", "torchrun"}
    assert any(line.startswith("tokenzoo train ") for line in commands())


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("python ")])
def test_scripts_named_exist_and_have_the_flags(line):
    """Scripts are not started: a flag is one that the file, a file beside it that it imports, or the command behind it,
    adds."""
    _, script, *words = shlex.split(line, comments=True)
    text = (ROOT / script).read_text(encoding="utf-8")
    for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
        beside = (ROOT / script).with_name(f"{name}.py")
        text += beside.read_text(encoding="utf-8") if beside.exists() else ""
    if script != "train_imagenet.py" and "--train" not in words:  # these hand their flags on
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == []


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


def check(tables: ModuleType, root: Path, monkeypatch) -> int:
    monkeypatch.setattr(tables, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    return tables.main()


@newest
def test_tables_are_fresh(tables, monkeypatch):
    assert check(tables, ROOT, monkeypatch) == 0, "run python scripts/readme_tables.py"


STALE = {  # something that stands in a table of the page
    "README.md": ("ICLR 2023", "ICLR 1923"),
    "docs/methods.md": ("ICLR 2023", "ICLR 1923"),
    "docs/backbones.md": ("`VimBlock`", "`VamBlock`"),
    "docs/vlm.md": ("ECCV 2024", "ECCV 1924"),
    "docs/measuring.md": ("| r=13 | 2.71 |", "| r=13 | 1.71 |"),
    "benchmarks/accuracy/accuracy.md": ("| `tome` | ", "| `tame` | "),
}


STUB = "tokenzoo/__init__.pyi"


@newest
@pytest.mark.parametrize("page", STALE)
def test_stale_tables_are_noticed_and_mended(tables, page, monkeypatch, tmp_path, capsys):
    assert set(STALE) == set(tables.PAGES)
    for folder in ("docs", "tokenzoo", "benchmarks/accuracy"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (*tables.PAGES, "tokenzoo/__init__.py", STUB):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert STALE[page][0] in text
    (tmp_path / page).write_text(text.replace(*STALE[page]), encoding="utf-8")
    assert check(tables, tmp_path, monkeypatch) == 1
    assert capsys.readouterr().err == f"the tables in {page} are stale; run python scripts/readme_tables.py\n"
    monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
    assert tables.main() == 0 and (tmp_path / page).read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match=f"{page} needs the lines '<!-- begin"):
        tables.render(page, "no markers")


def test_a_stale_stub_is_noticed_and_mended(tables, monkeypatch, tmp_path, capsys):
    """A method that the registry has and the stub lacks is one that type checkers do not know."""
    monkeypatch.setattr(tables, "PAGES", {})
    (tmp_path / "tokenzoo").mkdir()
    text = (ROOT / STUB).read_text(encoding="utf-8")
    line = "from .methods.tome import ToMe as ToMe\n"
    assert line in text
    (tmp_path / STUB).write_text(text.replace(line, ""), encoding="utf-8")
    (tmp_path / "tokenzoo" / "__init__.py").write_bytes((ROOT / "tokenzoo" / "__init__.py").read_bytes())
    assert check(tables, tmp_path, monkeypatch) == 1
    assert capsys.readouterr().err == f"{STUB} is stale; run python scripts/readme_tables.py\n"
    monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
    assert tables.main() == 0 and (tmp_path / STUB).read_text(encoding="utf-8") == text


def test_every_method_and_family_is_in_the_readme():
    assert all(f"`{name}` (" in README for name in tokenzoo.list_methods())
    assert all(f"`{name}` (" in README for name in tokenzoo.list_backbones())


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
        if re.fullmatch(rf"({FOLDERS})(/[\w.+-]+)+/?", word):
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
    with safe_open(ROOT / "tokenzoo" / "serve" / "demo_vit.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    text = " ".join((ROOT / "docs" / "demo.md").read_text(encoding="utf-8").split())
    assert f"{100 * about['test_accuracy']:.2f} % of 600 test crops" in text
    assert all(f"| {name} |" in text for name in about["classes"]), "a photograph without its licence"


def test_every_page_and_note_can_be_reached():
    """From the README by links, pages and notes alike; tables and curves of benchmarks/ too."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path in reached or not path.is_file():
            continue
        reached.add(path)
        if path.suffix == ".md":
            targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
            todo += [(path.parent / target).resolve() for target in targets if not target.startswith("http")]
    measured = [path for path in ROOT.glob("benchmarks/*/*") if path.suffix in (".csv", ".png")]
    for path in [*PAGES, *NOTES, *measured]:
        assert path in reached, f"{path.relative_to(ROOT)}: no link leads there"


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


def saves_nothing(name: str) -> bool:
    """Whether a method removes nothing, and computes every pair of attention, which it only masks."""
    pairs = getattr(registry._METHODS.get(name), "pairs", None)
    return name in KEEPS_LENGTH and pairs is OwnAttention.pairs


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
        assert report.ratio < 1 or saves_nothing(path.parent.name) and report.ratio > 1
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
