"""Models with recipes for lmms-eval, under the name "tokenzoo": `lmms_eval --model tokenzoo --model_args ...`.

lmms-eval finds `manifests` through the entry point group "lmms_eval.models", and the class by its path; it is made when
it is first asked for, so that nothing here needs lmms-eval before.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..apply.patch import patch_model
from ..core.safe_files import parse_yaml
from .vqa_answers import Answerer

NAME = "tokenzoo"
_GREEDY = {"max_new_tokens": 1024}  # what lmms-eval's own models take where a task says nothing


class Answering:
    """What lmms-eval asks a model for, its base class aside.

    Args:
        pretrained: name on the hub, or a folder of `save_pretrained`.
        method: a selector, dropper, method of the tower, or a recipe.yaml; none leaves the model as it is.
        batch_size: prompts at a time; halved when memory runs out.
        device: where the model runs.
        dtype: of the weights.
        attn: attention implementation of transformers.
        **options: of the method, and `positions` and `prefill`; text is read as YAML.

    Raises:
        ValueError: unknown method or option, several processes, or a processor without a chat template.
    """

    is_simple = False  # chat messages, not a context with images beside it

    def __init__(
        self, pretrained: str, method: str | None = None, batch_size: int | str = 1, device: str | None = None,
        dtype: str = "auto", attn: str = "sdpa", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        import transformers

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("tokenzoo runs in one process; start lmms_eval without accelerate launch or torchrun")
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; give a positive number")
        options.pop("max_batch_size", None)  # of lmms-eval's command line
        number = dtype if dtype == "auto" else getattr(torch, dtype, None)
        if number != "auto" and not isinstance(number, torch.dtype):
            raise ValueError(f"dtype={dtype!r}; give auto, float32, bfloat16 or float16")
        if method is None and options:
            raise ValueError(f"options {sorted(options)} are of no method; give method=NAME")
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            pretrained, attn_implementation=attn, dtype=number
        )
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if method is not None:
            given = {k: parse_yaml(v, f"{k}={v!r}") if isinstance(v, str) else v for k, v in options.items()}
            patch_model(model, method, **given)
        self.answerer = Answerer(model, transformers.AutoProcessor.from_pretrained(pretrained))

    @property
    def model(self) -> Any:
        """The model, patched."""
        return self.answerer.model

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, in the order of the requests; those with the same settings go together."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(index)
        for members in groups.values():
            settings = dict(requests[members[0]].args[2])
            stops = settings.pop("until", None) or []
            stops = [stops] if isinstance(stops, str) else stops
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                asked = [self._conversation(requests[i].args) for i in batch]
                for i, answer in zip(batch, self.answerer(asked, **sampling(settings))):
                    found[i] = cut(answer, stops)
        return found

    def _conversation(self, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        _, messages_of, _, number, task, split = args
        return [
            {"role": message["role"], "content": [content(part) for part in message["content"]]}
            for message in messages_of(self.task_dict[task][split][number])  # type: ignore[attr-defined]
        ]

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not served: rows that leave have no logits of their own to sum up by lmms-eval's rule."""
        raise NotImplementedError("tokenzoo answers in words alone; choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        """Not served."""
        raise NotImplementedError("tokenzoo answers single rounds; choose tasks with output_type generate_until")


def content(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message as transformers' chat templates take it; lmms-eval has images and videos under "url".

    Raises:
        ValueError: audio.
    """
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "video"):
        raise ValueError(f"messages hold {kind}, tokenzoo serves text, images and videos; choose another task")
    return {"type": kind, kind: part["url"]}


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate`: greedy unless a temperature above zero is asked for."""
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k")
    found = {**_GREEDY, **{k: settings[k] for k in names if settings.get(k) is not None}}
    found["do_sample"] = bool(found.get("do_sample", True)) and (found.get("temperature") or 0) > 0
    if not found["do_sample"]:
        found = {k: v for k, v in found.items() if k not in ("temperature", "top_p", "top_k")}
    return found


def cut(answer: str, stops: list[str]) -> str:
    """An answer up to the first text that ends it."""
    for stop in stops:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def manifests() -> Any:
    """What lmms-eval's registry takes from the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.TokenzooModel")


def __getattr__(name: str) -> Any:
    """`TokenzooModel`, made of lmms-eval's base class when it is first asked for."""
    if name != "TokenzooModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    made = type(name, (Answering, lmms), {"__module__": __name__, "__doc__": Answering.__doc__})
    globals()[name] = made
    return made
