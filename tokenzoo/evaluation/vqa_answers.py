"""Answers of a vision-language model in words, a batch of conversations at a time."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import free_memory, is_out_of_memory

_log = logging.getLogger(__name__)


class Answerer:
    """Asks a model through its processor's chat template; batches are halved for good when memory runs out.

    Args:
        model: with `generate`, on its device.
        processor: of the model; its tokenizer pads in front from here on.

    Raises:
        ValueError: a processor without a chat template or a tokenizer.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is None or getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(processor).__name__} has no chat template, by which questions become prompts; use a model that "
                "comes with one, or set processor.chat_template and save it"
            )
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.size: int | None = None

    def inputs(self, conversations: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """What the model is called with.

        Args:
            conversations: messages of transformers' chat templates, images among their content.
        """
        weight = next(self.model.parameters())
        template = self.processor.apply_chat_template
        known = "processor_kwargs" in inspect.signature(template).parameters  # their place in newer releases
        padded = {"processor_kwargs": {"padding": True}} if known else {"padding": True}
        found = template(
            list(conversations), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            **padded,
        )  # fmt: skip
        kinds = {name: weight.dtype if value.is_floating_point() else value.dtype for name, value in found.items()}
        return {name: value.to(weight.device, kinds[name]) for name, value in found.items()}

    def __call__(self, conversations: Sequence[list[dict[str, Any]]], **options: Any) -> list[str]:
        """The answers.

        Args:
            conversations: see `inputs`.
            **options: of `generate`; greedy by default.

        Raises:
            ValueError: not even one prompt fits into memory.
        """
        found: list[str] = []
        while len(found) < len(conversations):
            piece, reason = conversations[len(found) :][: self.size], None
            try:
                found += self._answers(piece, {"do_sample": False, **options})
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            if reason is not None:  # outside of the handler, whose traceback holds what did not fit
                if len(piece) == 1:
                    raise ValueError(f"not even one prompt fits into memory ({reason}); use smaller images or --dtype")
                self.size = (len(piece) + 1) // 2
                _log.warning("out of memory at batch %d, going on with %d", len(piece), self.size)
                free_memory(next(self.model.parameters()).device)
        return found

    @torch.inference_mode()
    def _answers(self, conversations: Sequence[list[dict[str, Any]]], options: dict[str, Any]) -> list[str]:
        inputs = self.inputs(conversations)
        out = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
