"""The wrapper for lmms-eval, on a stand-in of its base class, or on the real one where it is installed."""

import abc
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_vlm_commands import released  # noqa: F401

from tokenzoo.evaluation import lmms as wrapper


class Base(abc.ABC):
    """Stands in for `lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@pytest.fixture
def made(monkeypatch):
    """The class that lmms-eval would load."""
    monkeypatch.delitem(vars(wrapper), "TokenzooModel", raising=False)
    if importlib.util.find_spec("lmms_eval") is None:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base
    yield wrapper.TokenzooModel
    vars(wrapper).pop("TokenzooModel", None)


def requests(number=3):
    """Questions as lmms-eval hands them over: (context, doc_to_messages, settings, document, task, split)."""
    images = [Image.fromarray(np.full((40, 50, 3), 60 * i, dtype=np.uint8)) for i in range(number)]

    def messages(doc):
        return [{"role": "user", "content": [{"type": "image", "url": images[doc]}, {"type": "text", "text": "the"}]}]

    settings = [{"max_new_tokens": 2 + i % 2, "temperature": 0, "until": ["\n\n"]} for i in range(number)]
    return [SimpleNamespace(args=("", messages, settings[i], i, "t", "test")) for i in range(number)]


def test_answers_come_in_order_whatever_the_batch(made, released):  # noqa: F811
    found = []
    for size in ("1", 3):
        model = made(str(released), method="fastervlm", keep=4, batch_size=size, device="cpu", dtype="float32")
        model.task_dict = {"t": {"test": [0, 1, 2]}}
        assert model.model.tokenzoo_recipe.selector.keep == 4 and model.is_simple is False
        found.append(model.generate_until(requests()))
    assert found[0] == found[1] and len(found[0]) == 3
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            ask([])
    assert isinstance(model, made) and made.__mro__[2].__name__ in ("lmms", "Base")


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "nothing"}, "is unknown"),
    ({"keep": 4}, "are of no method"),
    ({"dtype": "float3"}, "dtype='float3'"),
    ({"batch_size": 0}, "positive"),
])  # fmt: skip
def test_bad_options_are_named(made, released, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        made(str(released), device="cpu", **options)


def test_several_processes_are_refused(made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        made("x")


def test_settings_and_messages():
    assert wrapper.sampling({"temperature": 0, "top_p": 0.9}) == {"max_new_tokens": 1024, "do_sample": False}
    assert wrapper.sampling({"temperature": 0.5, "max_new_tokens": 3})["do_sample"] is True
    assert wrapper.cut(" a\n\nb", ["\n\n"]) == "a"
    with pytest.raises(ValueError, match="audio"):
        wrapper.content({"type": "audio", "url": "x"})


def test_the_entry_point_leads_here_and_imports_nothing():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    entry = f'[project.entry-points."lmms_eval.models"]\ntokenzoo = "{wrapper.__name__}:{wrapper.manifests.__name__}"'
    assert entry in text
    code = "import sys, tokenzoo.evaluation.lmms; assert not {'lmms_eval', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
