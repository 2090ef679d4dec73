"""The folders are the architecture: what stands where, who imports whom, and the public paths that are kept."""

from __future__ import annotations

import ast
import importlib
import statistics
import sys
from pathlib import Path

import pytest
from test_docs import imported, rooms

import tokenzoo

FIRST = {  # the methods that the schedules were drawn on
    "algm", "ats", "cluster", "cts", "evit", "evo", "famba", "mctf", "mtr", "pool", "random", "reconstruct", "rmeeto",
    "ssm_prune", "sta", "tome", "tomesd", "topk", "uniform",
}  # fmt: skip
PACKAGE = Path(__file__).parents[1] / "tokenzoo"
KEPT = sorted(p.relative_to(PACKAGE / "kept").with_suffix("").as_posix() for p in (PACKAGE / "kept").rglob("*.py"))
KEPT = [path.replace("/", ".") for path in KEPT if not path.endswith("__init__")]


def files() -> dict[str, Path]:
    """Files of the package by module path such as "adapters/block"; a folder stands for its `__init__`."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        if "kept" in path.parts:
            continue
        module = path.parent if path.name == "__init__.py" else path.with_suffix("")
        named[module.relative_to(PACKAGE).as_posix()] = path
    return named


def test_top_level():
    """Folders, and nothing beside them but what makes a typed package."""
    loose = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert loose == {"__init__.py", "__init__.pyi", "py.typed"}


def test_no_circle_between_files():
    """Imports inside of functions count too: they hide a circle, they do not undo it."""
    named = files()
    graph = {module: imported(path) & set(named) for module, path in named.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' -> '.join((*way[way.index(module):], module))}"
        if module not in done:
            for target in sorted(graph[module] - {module}):
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_rooms_stand_one_above_the_other():
    """Every row of the table imports from rows above it only: so methods and adapters do not know each other."""
    known = rooms()
    order = list(known)
    for room, allowed in known.items():
        assert all(order.index(other) < order.index(room) for other in allowed), room
    assert "adapters" not in known["methods"] and "methods" not in known["adapters"]
    for room in ("methods", "adapters"):
        assert not known[room] & {"cost", "apply", "dense", "view", "evaluation", "training", "cli"}


def test_no_method_imports_another():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert not any(target.startswith("methods") for target in imported(path)) or path.name == "__init__.py", path


def test_method_files_hold_what_decides():
    """Schedules, tensor work and counting stand in other rooms: the files stay short."""
    lines = {
        path.stem: len(path.read_text(encoding="utf-8").splitlines())
        for path in (PACKAGE / "methods").glob("*.py") if path.name != "__init__.py"
    }  # fmt: skip
    first = {name: length for name, length in lines.items() if name in FIRST}
    assert len(first) == 19 and statistics.median(first.values()) <= 85, sorted(first.items())
    assert statistics.median(lines.values()) <= 95, sorted(lines.values())
    assert max(lines.values()) <= 160, max(lines, key=lines.get)
    assert lines["tome"] <= 60


@pytest.mark.parametrize("path", KEPT)
def test_kept_paths_are_the_same_objects(path: str):
    """Code of version 0.1 goes on: the old path holds the classes and functions of the new one."""
    (line,) = [
        node for node in ast.parse((PACKAGE / "kept" / f"{path.replace('.', '/')}.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
    ]  # fmt: skip
    old, new = importlib.import_module(f"tokenzoo.{path}"), importlib.import_module(line.module)
    own = {name: value for name, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__}
    names = [name for name in own if not name.startswith("_")]
    assert names and all(getattr(old, name) is getattr(new, name) for name in names)


@pytest.mark.parametrize("path", ["tokens", "schedules", "lifting", "dense", "layers", "evaluation", "models"])
def test_documented_paths(path: str):
    assert importlib.import_module(f"tokenzoo.{path}")


def test_a_family_name_is_taken_once():
    from tokenzoo.adapters.registry import families, register_family

    first = families()[0]
    assert register_family(first) is first  # the same one again
    with pytest.raises(ValueError, match="taken"):
        register_family(type(first)(**{**vars(first), "summary": "another"}))
    with pytest.raises(ValueError, match="served by the family 'vision_transformer'"):
        register_family(type(first)(**{**vars(first), "name": "mine"}))
    assert tokenzoo.list_backbones()[first.name]


def test_a_family_of_another_package_is_registered_when_its_model_is_met(tmp_path: Path, monkeypatch):
    from tokenzoo.adapters import registry

    example = (PACKAGE.parent / "examples" / "own_backbone.py").read_text()
    model, rest = example.split("class ReducingAttention")
    (tmp_path / "strange_models.py").write_text(model)
    joined = model.split("class Attention")[0] + "from strange_models import Attention, Layer, MyViT\n"
    family = joined + "\n\nclass ReducingAttention" + rest.replace("my_vit", "strange")
    (tmp_path / "strange_family.py").write_text(family)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(registry, "_LATER", {})
    registry.register_later("not_installed_here", "nowhere")
    registry.register_later("strange_models", "strange_family")
    assert "strange" not in registry._FAMILIES and "strange_models" not in sys.modules
    model = importlib.import_module("strange_models").MyViT()
    assert "strange" not in registry._FAMILIES  # nobody asked about it yet
    assert registry.find_family(model).name == "strange"
    assert tokenzoo.list_backbones()["strange"] == ["MyViT"]  # and what is not installed is no error
