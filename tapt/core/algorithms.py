"""Attack algorithms that torchattacks lacks, or whose randomness or result it gets wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchattacks
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode
from torchattacks.attack import Attack as LibraryAttack

from tapt.core.clip import Classifier

CW_WEIGHTS, CW_LR = (1, 10, 100, 1000), 0.005
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

Algorithm = Callable[[Tensor, Tensor], Tensor]
"""Images and labels to attacked images."""


class Draws(TorchFunctionMode):
    """Randomness of an attack from a generator for each image, and one for what all share; the
    global random state, which threads share, is neither read nor moved."""

    def __init__(self, images: Sequence[Generator], shared: Generator) -> None:
        super().__init__()
        self.images, self.shared = images, shared

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) for every image, (N, *shape)."""
        return torch.stack([torch.rand(shape, generator=g, device="cpu") for g in self.images])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.uniform_, torch.rand, torch.randint) and "generator" not in kwargs:
            if func is Tensor.uniform_:
                values, low, high = args
                return values.copy_(self.uniform(*values.shape[1:]) * (high - low) + low)
            if func is torch.rand and isinstance(args[0], torch.Size):  # a batch of images
                return self.uniform(*args[0][1:])
            kwargs |= {"generator": self.shared, "device": "cpu"}
        return func(*args, **kwargs)


class AttackedModel(nn.Module):
    """A classifier that counts its passes and hands out randomness by image."""

    def __init__(self, model: Classifier, on_pass: Callable[[], None], draws: Draws) -> None:
        super().__init__()
        self.model, self.on_pass, self.draws = model, on_pass, draws
        self.classes, self.image_size = model.classes, model.backbone.image_size
        self.randomised = model.randomised
        self.eval()  # torchattacks switches a model back to the mode that it finds here

    def forward(self, images: Tensor) -> Tensor:
        self.on_pass()
        with torch._C.DisableTorchFunction():  # watched for draws, every operation takes longer
            logits: Tensor = self.model(images)
        return logits

    def rows(self, index: Tensor) -> AttackedModel:
        """The same model for a part of the images."""
        draws = Draws([self.draws.images[i] for i in index.tolist()], self.draws.shared)
        return AttackedModel(self.model.rows(index), self.on_pass, draws)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, (N,); negative where the label lost."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def rounded(images: Tensor) -> Tensor:
    """The nearest 8-bit images, in [0, 1]."""
    return (images * 255).round() / 255


def apgd(model: AttackedModel, target: int | None = None, **options: Any) -> Algorithm:
    """APGD, towards the clean image's class of rank `target` where one is given. It returns its
    best point for every image; the library's leaves an image that resists as it was."""
    attack: Any = (torchattacks.APGD if target is None else torchattacks.APGDT)(model, **options)
    attack.target_class = target

    def run(images: Tensor, labels: Tensor) -> Tensor:
        best, resisted, _, fooling = attack.attack_single_run(images, labels)
        return torch.where(resisted[:, None, None, None], best, fooling)

    return run


def targeted_fab(model: AttackedModel, target: int, eps: float, steps: int) -> Algorithm:
    """FAB towards one class, kept inside the ball."""
    attack = torchattacks.FAB(model, eps=eps, steps=steps, multi_targeted=True)
    attack.target_class = target
    run = attack.attack_single_run_targeted
    return lambda images, labels: images + (run(images, labels) - images).clamp(-eps, eps)


class OwnAttack(LibraryAttack):
    """An attack that can also aim at a class."""

    def __init__(self, model: AttackedModel, steps: int, eps: float = torch.inf) -> None:
        super().__init__(type(self).__name__, model)
        self.supported_mode = ["default", "targeted"]
        self.steps, self.eps = steps, eps

    def loss(self, model: AttackedModel, images: Tensor, labels: Tensor) -> Tensor:
        """What the attack lowers, (N,); negative where it has what it wants."""
        return margin(model(images), labels) * (-1 if self.targeted else 1)


class Square(OwnAttack):
    """Square (Andriushchenko et al. 2020, arXiv 1912.00049) with squares of each image's own. A
    randomised model is asked to the last query: one lucky answer is no success."""

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        size = images.shape[-1]
        best = (images + self._signs(self.model, images, 3, 1, size)).clamp(0, 1)  # stripes
        lowest = self.loss(self.model, best, labels)
        for query in range(self.steps):
            left = torch.arange(len(images), device=images.device)
            if not self.model.randomised:
                left = left[lowest > 0]
            if not len(left):
                break
            model, tried = self.model.rows(left), best[left]
            at = 10_000 * query / self.steps  # the published schedule, over all queries
            covered = 0.8 / 2.0 ** sum(at > end for end in SQUARE_HALVINGS)
            side = max(1, round(math.sqrt(covered) * size))
            corners = (model.draws.uniform(2) * (size - side + 1)).long()  # (N, 2)
            changes = 2 * self._signs(model, images, 3, 1, 1)
            for i, (top, start) in enumerate(corners.tolist()):
                tried[i, :, top : top + side, start : start + side] += changes[i]
            tried = tried.clamp(images[left] - self.eps, images[left] + self.eps).clamp(0, 1)
            losses = self.loss(model, tried, labels[left])
            better = losses < lowest[left]
            lowest[left[better]], best[left[better]] = losses[better], tried[better]
        return best

    def _signs(self, model: AttackedModel, images: Tensor, *shape: int) -> Tensor:
        return self.eps * (model.draws.uniform(*shape) - 0.5).sign().to(images)


class CW(OwnAttack):
    """Carlini and Wagner's L2 attack (arXiv 1608.04644), by projected Adam steps, with the
    smallest of four weights c that succeeds. The library's ends when the batch's sum rises, takes
    logits for positive, never moves black or white, and often loses its success in rounding."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best = images.clone()
        size = torch.full_like(images[:, 0, 0, 0], torch.inf)
        for weight in CW_WEIGHTS:
            left = size.isinf().nonzero()[:, 0]
            if not len(left):
                break
            model, moved = self.model.rows(left), images[left].requires_grad_()
            optimizer = torch.optim.Adam([moved], lr=CW_LR)
            for _ in range(self.steps):
                squared = (moved - images[left]).square().flatten(1).sum(1)
                shown = moved + (rounded(moved) - moved).detach()
                excess = self.loss(model, shown, labels[left])
                optimizer.zero_grad()
                (squared + weight * excess.clamp(min=0)).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    moved.clamp_(0, 1)
                better = (excess < 0) & (squared < size[left])
                size[left[better]] = squared.detach()[better]
                best[left[better]] = shown.detach()[better]
        return best


class AutoAttack(OwnAttack):
    """The standard version: APGD-CE, APGD-T, FAB-T and Square, with 9 targets at most, each on the
    images that are left; of a randomised model APGD-CE and APGD-DLR (Croce and Hein 2020). An
    image that resists all of them comes back as the candidate of the lowest margin: to another
    model it may be an attack all the same. The loss of APGD-T needs four classes, DLR three."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best = images.clone()
        for index, build in enumerate(self.stages()):
            left = torch.arange(len(images), device=images.device)
            if index and not self.model.randomised:
                with torch.no_grad():
                    left = left[self.model(best).argmax(1) == labels]
            if not len(left):
                break
            model, clean, before = self.model.rows(left), images[left], best[left]
            with model.draws:
                after = rounded(build(model)(clean, labels[left]))
            if index:
                with torch.no_grad():
                    gain = self.loss(model, before, labels[left])
                    gain -= self.loss(model, after, labels[left])
                # FAB gives the clean image where it fails
                better = (gain > 0) & (after != clean).flatten(1).any(1)
                after = torch.where(better[:, None, None, None], after, before)
            best[left] = after
        return best

    def stages(self) -> list[Callable[[AttackedModel], Algorithm]]:
        """The attacks in their order, each on a model for the images that are left."""
        ball: dict[str, Any] = {"eps": self.eps, "steps": self.steps}
        classes = self.model.classes
        targets = range(2, min(10, classes) + 1)
        stages: list[Any] = [partial(apgd, **ball)]
        if classes == 3 or (classes > 3 and self.model.randomised):
            stages.append(partial(apgd, **ball, loss="dlr"))
        if self.model.randomised:
            return stages
        if classes > 3:
            stages += [partial(apgd, **ball, target=t) for t in targets]
        stages += [partial(targeted_fab, **ball, target=t) for t in targets]
        return [*stages, partial(Square, eps=self.eps, steps=50 * self.steps)]

    @staticmethod
    def passes(steps: int, classes: int) -> int:
        """Passes through the model that it takes at most (about)."""
        targets = min(9, classes - 1)
        return (50 + 1 + (targets if classes > 3 else 1) + 2 * targets) * steps
