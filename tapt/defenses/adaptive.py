"""The adaptive attack: gradients through a defence as it is deployed.

What has no gradient is held constant (BPDA, Athalye et al. 2018). It moves slowly from step to
step, so the last few states of each image's defence are kept in a pool, from different draws and
recent iterates: a step costs one cheap pass through each of them (EOT), and every few steps a run
of the whole defence replaces the oldest. The search starts at the best of cheaper attacks: replayed
from vanilla CLIP and from the static prompts, through random crops without any defence, through
the defence's differentiable surrogate. Draws of their own judge which image resists least.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tapt.core.algorithms import margin
from tapt.core.attacks import Attack, attack_images
from tapt.core.images import to_float
from tapt.core.settings import Settings
from tapt.core.views import generators, image_seeds, make_views
from tapt.defenses.base import ImageBatch, PreparedDefense, State, images_per_pass
from tapt.progress import Progress

MOMENTUM, FIRST_STEP = 0.75, 0.5  # the first step's size is a share of epsilon
CROPS = 4
SURROGATE_SHARE = 5  # its second derivatives are dear: one step of it for five others
Passes = Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]]
"""Of images and the number of a step: logits (R, C), and which image each row is of, (R,)."""
Loss = Callable[[Tensor, Tensor], Tensor]
Ask = Callable[[PreparedDefense, Tensor, Sequence[int], str, int], Tensor]


class Adaptive(Settings):
    """What an attack on a defence as deployed spends, beside its steps."""

    pool: int = Field(4, ge=1, le=64, description="states of the defence that a gradient passes")
    refresh: int = Field(4, ge=1, le=1000, description="steps from one new state to the next")
    judging: int = Field(8, ge=1, le=1000, description="draws that choose the attacked image")
    draws: int = Field(4, ge=1, le=1000, description="draws per query of Square, step of CW")
    starts: bool = Field(True, description="start the attack on a deployed one from cheaper ones")

    def budget(self, prepared: PreparedDefense, attack: Attack) -> str:
        """What the attack may spend, in words."""
        if not is_adaptive(attack):
            return f"{attack.budget}, EOT {self.draws}" if prepared.randomised else attack.budget
        starts = ["replays"] if self.starts else []
        if not prepared.randomised:
            return " from ".join([attack.budget, *starts])
        if self.starts:
            starts += ["crops", *filter(None, [prepared.surrogate])]
        pool = f"pool of {self.pool}, one new every {self.refresh} steps"
        best = f"best of {', '.join([*starts, 'BPDA'])} by {self.judging} draws"
        return f"{attack.budget}, {pool}, {best}"


def is_adaptive(attack: Attack) -> bool:
    """Whether it goes by gradients inside a ball; of the others each pass asks the defence."""
    return attack.method.gradients and attack.method.norm == "Linf"


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the labels, (N,)."""
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


class Search:
    """The adaptive attack on 8-bit images (N, 3, S, S); an image that fails on all judging draws
    is left as it is. Each image's randomness, and so its result, is its own.

    labels, images, targets, on_progress: as for `attack_images`.
    ask: gives answers to pixels for a purpose, as `tapt.defenses.deployed.ask`.
    """

    def __init__(
        self,
        prepared: PreparedDefense,
        pixels: Tensor,
        labels: Tensor,
        attack: Attack,
        adaptive: Adaptive,
        *,
        ask: Ask,
        images: Sequence[int],
        targets: Tensor | None,
        on_progress: Progress,
    ) -> None:
        self.prepared, self.attack, self.adaptive, self.ask = prepared, attack, adaptive, ask
        self.pixels, self.labels, self.targets = pixels, labels, targets
        self.numbers, self.seeds = list(images), image_seeds(attack.seed, images)
        self.device = prepared.clip.backbone.device
        self.clean = to_float(pixels.to(self.device))
        self.aims = (labels if targets is None else targets).to(self.device)
        self.generators = generators(self.seeds, "deployed")
        self.best, self.lowest = pixels.clone(), torch.full((len(pixels),), torch.inf)
        self.left = torch.arange(len(pixels))
        self.judges = adaptive.judging if prepared.randomised else 1
        self.pool: deque[tuple[list[int], State | None]] = deque(maxlen=adaptive.pool)
        self.on_progress, self.done = on_progress, 0
        self.total = self._planned()

    def run(self) -> Tensor:
        """The attacked images, uint8, (N, 3, S, S)."""
        steps, prepared = self.attack.budget_steps, self.prepared
        if self.adaptive.starts:
            for model in (prepared.clip.vanilla, prepared.clip.static):
                self._replay(model)
            if prepared.randomised:
                self._climb(steps, log_probability, self._crops)
            if prepared.surrogate:
                self._climb(self._surrogate_steps, log_probability, self._surrogate)
        self._climb(steps - steps // 2, log_probability, self._pool)
        self._climb(steps // 2, margin, self._pool)
        self.on_progress(self.total, self.total)
        return self.best

    @property
    def _surrogate_steps(self) -> int:
        return math.ceil(self.attack.budget_steps / SURROGATE_SHARE)

    def _planned(self) -> int:
        """Passes if no image fails before the end; a replay is counted by its own."""
        steps, judged = self.attack.budget_steps, 2
        total = steps
        if self.adaptive.starts:
            total += 2 * self.attack.method.passes(steps, len(self.prepared.clip.classes))
            total += steps if self.prepared.randomised else 0
            total += self._surrogate_steps if self.prepared.surrogate else 0
            judged += 2 + self.prepared.randomised + bool(self.prepared.surrogate)
        return total + judged * self.judges

    def _tick(self, passes: int = 0) -> None:
        self.done += passes
        self.on_progress(self.done, self.total)

    def _replay(self, model: Any) -> None:
        """Attacks a fixed model; what it gives is a transfer attack on the defence."""
        if not len(self.left):
            return
        rows, before = self.left.tolist(), self.done

        def report(done: int, total: int) -> None:
            self.done = before + done
            self._tick()

        found = attack_images(
            model,
            self.pixels[rows],
            self.labels[rows],
            self.attack,
            images=[self.numbers[row] for row in rows],
            targets=None if self.targets is None else self.targets[rows],
            on_progress=report,
        )
        self._judge(found)

    def _climb(self, steps: int, loss: Loss, passes: Passes) -> None:
        """Steps of decreasing size along the sign of the gradient's momentum, from the best image
        so far."""
        if not len(self.left) or not steps:
            return
        clean, aims = self.clean[self.left], self.aims[self.left]
        sign = 1 if self.targets is None else -1
        radius = (self.attack.epsilon_255 or 0) / 255
        low, high = (clean - radius).clamp(min=0), (clean + radius).clamp(max=1)
        images = to_float(self.best[self.left].to(self.device))
        velocity = torch.zeros_like(images)
        for step in range(steps):
            leaf, gradient = images.clone().requires_grad_(), torch.zeros_like(images)
            for logits, rows in passes(leaf, step):
                if logits.requires_grad:
                    lost = sign * loss(logits, aims[rows]).sum()
                    gradient += torch.autograd.grad(lost, leaf)[0].nan_to_num()
            size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            velocity = MOMENTUM * velocity + gradient / size
            length = FIRST_STEP * radius * (1 + math.cos(math.pi * step / steps)) / 2
            images = (images - length * velocity.sign()).clamp(low, high)
            self._tick(1)
        self._judge((images * 255).round().to(torch.uint8).to(self.pixels.device))

    def _judge(self, found: Tensor) -> None:
        """Keeps what resists less than before; what always fails needs no further attack."""
        rows = self.left.tolist()
        seeds = [self.seeds[row] for row in rows]
        probabilities = self.ask(self.prepared, found, seeds, "judging", self.judges)
        aims = self.aims[self.left].to(probabilities.device)
        right = (probabilities.argmax(-1) == aims).float().mean(0)
        sure = probabilities.mean(0).gather(1, aims[:, None])[:, 0]
        if self.targets is not None:
            right, sure = 1 - right, 1 - sure
        resistance = right + 1e-3 * sure
        better = resistance < self.lowest[self.left]
        self.best[self.left[better]] = found[better]
        self.lowest[self.left[better]] = resistance[better]
        self._tick(self.judges)
        self._drop(self.lowest[self.left] > 1e-3)

    def _drop(self, resists: Tensor) -> None:
        """Goes on with a part of the images."""
        if bool(resists.all()):
            return
        index = resists.nonzero()[:, 0]
        rows, self.left = index.tolist(), self.left[index]
        self.generators = [self.generators[row] for row in rows]
        pool = (
            ([seeds[row] for row in rows], state and {k: v[index] for k, v in state.items()})
            for seeds, state in self.pool
        )
        self.pool = deque(pool, maxlen=self.pool.maxlen)

    def _seeds(self) -> list[int]:
        """Of a draw that no pass has had."""
        return [int(torch.randint(2**62, (), generator=g, device="cpu")) for g in self.generators]

    def _parts(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Images of one pass, and their numbers."""
        numbers = torch.arange(len(self.left), device=self.device)
        for start in range(0, len(numbers), size):
            yield slice(start, start + size), numbers[start : start + size]

    def _crops(self, images: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The image and random crops of it, without the defence."""
        every = generators(self._seeds())
        for part, rows in self._parts(images_per_pass(self.prepared.clip.backbone, 1 + CROPS)):
            pairs = zip(images[part], every[part], strict=True)
            views = torch.cat([make_views(x, 1 + CROPS, generator=g) for x, g in pairs])
            yield self.prepared.undefended(views), rows.repeat_interleave(1 + CROPS)

    def _surrogate(self, images: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        seeds = self._seeds()
        for part, rows in self._parts(self.prepared.images_per_pass):
            self._tick()
            yield self.prepared.surrogate_logits(ImageBatch(images[part], seeds[part])), rows

    def _pool(self, images: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The defence in every state of the pool; one that holds nothing constant, in new draws."""
        if step % self.adaptive.refresh == 0:
            seeds = self._seeds()
            self.pool.append((seeds, self._freeze(images.detach(), seeds)))
        slots = list(self.pool)
        if slots[-1][1] is None:
            draws = self.adaptive.pool if self.prepared.randomised else 1
            slots = [(self._seeds(), None) for _ in range(draws)]
        for seeds, state in slots:
            for part, rows in self._parts(self.prepared.images_per_pass):
                batch = ImageBatch(images[part], seeds[part])
                if state is None:
                    yield self.prepared.logits(batch, on_progress=self._within), rows
                else:
                    own = {name: value[part] for name, value in state.items()}
                    yield self.prepared.frozen_logits(batch, own), rows

    def _freeze(self, images: Tensor, seeds: list[int]) -> State | None:
        states = [
            self.prepared.freeze(ImageBatch(images[part], seeds[part]), on_progress=self._within)
            for part, _ in self._parts(self.prepared.images_per_pass)
        ]
        found = [state for state in states if state is not None]
        return {k: torch.cat([state[k] for state in found]) for k in found[0]} if found else None

    def _within(self, done: int, total: int) -> None:
        """A defence reports while it runs."""
        self._tick()
