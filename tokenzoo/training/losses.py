"""The loss of a training step: cross-entropy, a teacher, what methods owe, and a second pass that reduces less."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..adapters.wrappers import backbone_of
from ..apply.patch import update_method
from ..core.learned import Teaching
from ..core.tokens import Layout, Tokens
from ..cost.prices import prices_of
from ..evaluation.runs import shared_copy
from ..ops.views import WHITE, draw_views
from .consistency import token_consistency
from .owed import asked, learned_methods, losses_owed, names_owed
from .seeds import STRENGTH, VIEWS, seed_of
from .token_distillation import (
    check_scores,
    check_tokens,
    full_layout,
    layer_tokens,
    patch_tokens,
    score_distillation,
    token_distillation,
)
from .viewing import viewed_tokens

# new parts come last: the sums in a checkpoint go by place
PARTS = ("task", "distillation", "second_task", "consistency", "token_distillation")

_NOBODY = Teaching()


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the student's answers from the teacher's, mean over images.

    Args:
        student: logits [B, K].
        teacher: logits [B, K], without gradient.
        temperature: logits are divided by it, the loss is multiplied by its square.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; at temperature 1 as in
    DynamicViT (Rao et al., NeurIPS 2021) and R-MeeTo (Shi et al., 2024).
    """
    student, teacher = (F.log_softmax(x.float() / temperature, dim=1) for x in (student, teacher.detach()))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def second_strength(r: int | float, limit: float, seed: int, update: int) -> int | float:
    """The weaker r of one update, uniform below a limit: a whole number, or whole percents of a share.

    Args:
        r: strength of the recipe, which says whether counts or shares are meant.
        limit: drawn values lie below it.
        seed: of the run.
        update: number of the update; all processes draw the same.

    Source: Lee, Choi, Kim, "Multi-criteria Token Fusion", CVPR 2024 (r below 8 beside r = 16).
    """
    share = isinstance(r, float)
    high = max(1, round(limit * 100) if share else int(limit))
    drawn = seed_of(seed, STRENGTH, update) % high
    return drawn / 100 if share else drawn


class _Answer(NamedTuple):
    """What one forward pass gives to the losses.

    Attributes:
        logits: [B, K].
        token: the normed class token [B, C], None where it is not asked for.
        apart: distance of the tokens from the teacher's, None without.
        owed: losses of methods by name.
    """

    logits: Tensor
    token: Tensor | None = None
    apart: Tensor | None = None
    owed: dict[str, Tensor] = {}


class TrainStep(nn.Module):
    """A model with its losses; one forward pass gives all of them, so that DDP wraps this.

    Args:
        model: the model to train, patched or not.
        teacher: frozen unpatched model that answers the same images, None for none.
        args: options of the run.
        white: a white pixel behind the normalisation of the images, which stands outside of shifted ones.

    Raises:
        ValueError: consistency for a recipe without one number r, or a model without class token; distillation of
            tokens without a teacher, or from or into a model without them.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        args: argparse.Namespace,
        white: tuple[float, ...] = WHITE,
    ) -> None:
        super().__init__()
        self.model = model
        self.smoothing, self.seed = args.smoothing, args.seed
        self.kd_weight, self.kd_temperature = args.kd_weight, args.kd_temperature
        self.token_weight = args.kd_token_weight
        self.asked = asked(model)
        if self.asked and teacher is None:
            raise ValueError(
                f"{', '.join(names_owed(model))}: losses of the method compare with a teacher "
                f"({', '.join(sorted(self.asked))}); give --kd-model-name unpatched, or set their weight to 0"
            )
        if self.token_weight and teacher is None:
            raise ValueError(f"--kd-token-weight {self.token_weight} needs a teacher; give --kd-model-name unpatched")
        if self.token_weight:
            check_tokens(model, "student")
            check_tokens(teacher, "teacher")
        self.token_scores = args.kd_token_scores
        if self.token_scores:
            check_scores(model, teacher, self.token_weight)
        self.cosine, self.task_weight = args.kd_token_loss == "cosine_squares", args.task_weight
        self.views, self.shift, self.white = args.kd_views, args.kd_shift, white
        if self.views > 1 and not (self.token_weight or "tokens" in self.asked):
            raise ValueError(
                f"--kd-views {self.views} averages the teacher's tokens, which nothing compares with; give "
                "--kd-token-weight and --kd-model-name, or --kd-views 1"
            )
        self.consistency, self.limit = args.consistency, args.consistency_r
        self.strength: int | float = 0
        self.owed = names_owed(model)
        priced = any(method.priced for method in learned_methods(model).values())
        self._prices = prices_of(model) if priced else None
        self.threshold, self.second_weight = args.consistency_threshold, args.consistency_task
        # lists hide modules: teacher and second pass are no parameters of their own
        self._teacher = [teacher]
        self._second = [self._weaker(model) if args.consistency else None]
        self._forward = torch.compile(_answer) if args.torchcompile else _answer
        if not self.task_weight and len(self.parts) == 1:
            raise ValueError("--task-weight 0 leaves no loss to learn from; give a teacher, or a weight")

    def _weaker(self, model: nn.Module) -> nn.Module:
        methods = backbone_of(model).tokenzoo_recipe.methods if is_patched(model) else ()
        if len(methods) != 1 or type(getattr(methods[0], "r", None)) not in (int, float):
            raise ValueError(
                "--consistency compares two strengths of one method with one number r (mctf, tome); this recipe is "
                f"{[m.to_dict() for m in methods]}"
            )
        if getattr(model, "cls_token", None) is None:
            raise ValueError(f"--consistency compares class tokens; {type(model).__name__} has none")
        self.strength = methods[0].r
        self.limit = self.strength / 2 if self.limit is None else self.limit
        if not 0 < self.limit <= self.strength:
            raise ValueError(
                f"--consistency-r {self.limit:g} has to lie above 0 and not above r={self.strength}: the second pass "
                "reduces less"
            )
        return shared_copy(model)

    def to_device(self, device: torch.device) -> None:
        """Moves the teacher, who is no part of this module."""
        if self._teacher[0] is not None:
            self._teacher[0].to(device)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of `PARTS` that this loss has, and what methods owe."""
        answers = self._teacher[0] is not None and self.kd_weight > 0
        has = (True, answers, *[self._second[0] is not None] * 2, self.token_weight > 0)
        return (*(part for part, there in zip(PARTS, has) if there), *self.owed)

    def train(self, mode: bool = True) -> TrainStep:
        super().train(mode)
        if self._second[0] is not None:
            self._second[0].train(mode)
        return self

    def answer(self, images: Tensor) -> Tensor:
        """The logits of the model alone, for evaluation; a sharded step brings the weights together for it."""
        return self.model(images)

    def forward(self, images: Tensor, target: Tensor, update: int = 0) -> dict[str, Tensor]:
        """The parts of the loss, unweighted, and their weighted sum "loss".

        Args:
            images: [B, C, H, W].
            target: class indices [B], or soft targets [B, K].
            update: number of the update since the start of the run.
        """
        second, (teaching, layout) = self._second[0], self._taught(images, update)
        owing = len(self.owed) > 0
        if owing:
            teaching = teaching._replace(target=target, prices=self._prices)
        logits, token, apart, owed = self._forward(
            self.model, images, second is not None, teaching, layout, owing, self.token_scores, self.cosine
        )
        parts = {"task": self._task(logits, target)}
        # without a weight nothing of it reaches the head, so that its weights do not decay either
        loss = self.task_weight * (parts["task"] if self.task_weight else parts["task"].detach())
        if teaching.logits is not None:
            parts["distillation"] = distillation(logits, teaching.logits, self.kd_temperature)
            loss = loss + self.kd_weight * parts["distillation"]
        if apart is not None:
            parts["token_distillation"] = apart
            loss = loss + self.token_weight * apart
        if second is not None:
            update_method(second, r=second_strength(self.strength, self.limit, self.seed, update))
            weaker = _answer(second, images, True)
            parts["second_task"] = self._task(weaker.logits, target)
            parts["consistency"] = token_consistency(
                token.float(), weaker.token.float(), logits, target, self.threshold
            ).loss
            loss = loss + self.second_weight * parts["second_task"] + self.consistency * parts["consistency"]
        for part in owed.values():  # weighted by the method
            loss = loss + part
        return {"loss": loss, **parts, **owed}

    @torch.no_grad()
    def _taught(self, images: Tensor, update: int = 0) -> tuple[Teaching, Layout | None]:
        """What the teacher says, and the sequence of a student that is not patched (patched ones say themselves)."""
        teacher = self._teacher[0]
        if teacher is None:
            return _NOBODY, None
        answers, layers = self.kd_weight > 0 or "logits" in self.asked, None
        if not self.token_weight and self.asked <= {"logits"}:
            return Teaching(teacher(images) if answers else None), None
        if "layers" in self.asked:
            features, layers = layer_tokens(teacher, images)
        else:
            features = teacher.forward_features(images)
        logits = teacher.forward_head(features) if answers else None
        if not self.token_weight and "tokens" not in self.asked:
            return Teaching(logits, None, layers), None
        layout = None if is_patched(self.model) else full_layout(self.model, images)
        full = full_layout(teacher, images)
        tokens = patch_tokens(features, full)
        if self.views > 1:
            drawn = torch.Generator().manual_seed(seed_of(self.seed, VIEWS, update))
            views = draw_views(len(images), tuple(full.grid), self.views, self.shift, drawn).to(images.device)
            tokens = viewed_tokens(teacher, images, views, self.white, tokens)
        return Teaching(logits, teacher.aux_head(tokens) if self.token_scores else tokens, layers), layout

    def _task(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing = self.smoothing if target.dim() == 1 else 0.0  # mixing smooths its targets itself
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def _answer(
    model: nn.Module,
    images: Tensor,
    with_token: bool,
    teaching: Teaching = _NOBODY,
    layout: Layout | None = None,
    owing: bool = False,
    scores: bool = False,
    cosine: bool = False,
) -> _Answer:
    """One forward pass; losses on tokens are part of it, so that a compiled one hands out tensors only.

    Args:
        model: patched or not.
        images: [B, C, H, W].
        with_token: also return the normed class token [B, C].
        teaching: what the teacher says; where it gives tokens, also return the distance from them.
        layout: sequence of a model that is not patched, needed with the teacher's tokens.
        owing: also return what methods owe.
        scores: what the teacher says of the tokens are class scores, and so is what the student says.
        cosine: the distance of tokens has a cosine part.
    """
    places = teaching.tokens
    if not with_token and places is None and not owing:
        return _Answer(model(images))
    if layout is None:
        x = tokens = model.forward_tokens(images, trace=places is not None)
    else:
        x = model.forward_features(images)
        tokens = Tokens(patch_tokens(x, layout), layout._replace(num_prefix=0, added=0))
    apart = None
    if places is not None and scores:
        apart = score_distillation(tokens._replace(x=model.aux_head(tokens.x)), places)
    elif places is not None:
        apart = token_distillation(tokens, places, cosine)
    logits = model.forward_head(x)
    owed = losses_owed(model, tokens, teaching._replace(answers=logits)) if owing else {}
    return _Answer(logits, tokens.x[:, 0] if with_token else None, apart, owed)


def unused_parameters(step: TrainStep, batch: tuple[Tensor, Tensor], context: Any) -> list[str]:
    """Names of the model's parameters that one forward and backward pass leaves without gradient.

    Args:
        step: a `TrainStep`; its gradients are gone afterwards.
        batch: images and target.
        context: precision to run in, a context manager.
    """
    compiled, step._forward = step._forward, _answer  # another batch size would cost another graph
    with context:
        loss = step(*batch)["loss"]
    step._forward = compiled
    loss.backward()
    names = [name for name, p in step.model.named_parameters() if p.requires_grad and p.grad is None]
    step.zero_grad(set_to_none=True)
    return names
