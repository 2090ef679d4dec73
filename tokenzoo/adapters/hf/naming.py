"""Reducing classes that go by the names of the classes they stand for.

transformers writes the name of a model's class into its files (`config.architectures` of `save_pretrained`), and
pipelines, PEFT and trainers look classes up by name. A patched model is still the published one to all of them:
`__name__` says so, while `__qualname__`, by which copies and pickles find the class, says where it really is.
"""

from __future__ import annotations

from typing import Any


class PlainName:
    """Mixin of reducing classes; those made directly from a class of transformers take its name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = cls.__bases__[-1]
        if plain.__module__.startswith("transformers."):
            cls.__name__ = plain.__name__
