"""Attacks by torchattacks on any of our classifiers, in [0, 1] pixels and float32.

The attacked image is rounded to 8 bits and held to epsilon in integers, so that a PNG keeps the
attack and its L-inf is exact. CW has no epsilon: it looks for the smallest L2 change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attack import Attack as TorchAttack

from tapt.backbone import Backbone
from tapt.errors import InputError
from tapt.images import to_float
from tapt.prompts import Prompts, image_logits
from tapt.towers import encode_image

# torchattacks draws from the global random state, which threads share
_RANDOM_STATE = threading.Lock()


@dataclass(frozen=True)
class AttackConfig:
    """name: a row of `ATTACKS`.
    epsilon: L-inf radius in [0, 1]; whole multiples of 1/255 are used exactly, others are
        rounded down to one, since the attacked image is 8-bit. CW has none.
    steps: iterations, or queries of Square; None is the attack's own default. AutoAttack spends
        `steps` on each of its gradient attacks and 50 times as many queries on Square.
    step_size: in [0, 1]; None is 2.5 * epsilon / steps. Only PGD, DI and TI have one.
    random_start: start PGD, DI and TI at a random point of the ball.
    seed: of everything random in the attack.
    """

    name: str = "pgd"
    epsilon: float = 4 / 255
    steps: int | None = None
    step_size: float | None = None
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise InputError(f"attack must be one of {', '.join(ATTACKS)}, got {self.name!r}.")
        if self.steps is None:
            object.__setattr__(self, "steps", self.attack.steps)
        _check("epsilon", self.epsilon, 1 / 255, 1.0, "from 1/255 to 1")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise InputError(f"steps must be a whole number, got {self.steps!r}.")
        _check("steps", self.steps, 1, 10_000, "from 1 to 10000")
        if self.step_size is not None:
            _check("step_size", self.step_size, 1e-6, 1.0, "above 0 and at most 1")

    @property
    def attack(self) -> Attack:
        """The row of the table."""
        return ATTACKS[self.name]

    @property
    def epsilon_255(self) -> int | None:
        """Epsilon in whole 1/255 steps; None for an attack without epsilon."""
        return int(self.epsilon * 255 + 1e-6) if self.attack.norm == "Linf" else None

    @property
    def step(self) -> float | None:
        """Step size in [0, 1]; None where the attack finds its own."""
        if not self.attack.step_size:
            return None
        return self.step_size or 2.5 * self.epsilon_255 / 255 / self.steps

    @property
    def budget(self) -> str:
        """What the attack may spend, in words."""
        if self.name == "autoattack":
            return f"{self.steps} steps each, {50 * self.steps} queries"
        if self.name == "cw":
            return f"{self.steps} steps for each of {len(_CW.weights)} weights"
        return f"{self.steps} {self.attack.unit}"

    def to_dict(self) -> dict:
        none = {} if self.attack.norm == "Linf" else {"epsilon": None}
        return {**asdict(self), "step_size": self.step, **none}


def _check(name: str, value: float, low: float, high: float, rule: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low - 1e-9 <= value <= high:
        raise InputError(f"{name} must be a number {rule}, got {value!r}.")


class _APGD(torchattacks.APGD):
    """Returns its best point for every image; the library gives up on one that resists."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best, resisted, _, fooling = self.attack_single_run(images, labels)
        return torch.where(resisted[:, None, None, None], best, fooling)


class _Square(torchattacks.Square):
    """As `_APGD`: the best point, fooling or not."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        self.init_hyperparam(images)
        return self.attack_single_run(images, labels)[1]


class _CW(TorchAttack):
    """Carlini and Wagner's L2 attack (arXiv 1608.04644), by projected Adam steps, with the
    smallest of four weights c that succeeds. The library's ends when the batch's sum rises, takes
    logits for positive, never moves black or white, and often loses its success in rounding."""

    weights = (1, 10, 100, 1000)

    def __init__(self, model: nn.Module, steps: int, lr: float = 0.005) -> None:
        super().__init__("CW", model)
        self.steps, self.lr = steps, lr
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best = images.clone()
        size = torch.full_like(images[:, 0, 0, 0], torch.inf)
        for weight in self.weights:
            left = size.isinf().nonzero()[:, 0]
            if not len(left):
                break
            moved = images[left].requires_grad_()
            optimizer = torch.optim.Adam([moved], lr=self.lr)
            for _ in range(self.steps):
                squared = (moved - images[left]).square().flatten(1).sum(1)
                seen = moved + (_rounded(moved) - moved).detach()
                excess = self._excess(self.get_logits(seen), labels[left])
                optimizer.zero_grad()
                (squared + weight * excess.clamp(min=0)).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    moved.clamp_(0, 1)
                better = (excess < 0) & (squared < size[left])
                size[left[better]] = squared.detach()[better]
                best[left[better]] = seen.detach()[better]
        return best

    def _excess(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Negative where the attack has what it wants."""
        named = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return others - named if self.targeted else named - others


class _Rounded(TorchAttack):
    """Rounds to 8 bits, so that MultiAttack goes on with an image that rounding saved."""

    def __init__(self, attack: TorchAttack) -> None:
        super().__init__(attack.attack, attack.model)
        self.inner = attack

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return _rounded(self.inner(images, labels))


def _rounded(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def _ball(config: AttackConfig) -> dict:
    return {"eps": config.epsilon_255 / 255, "steps": config.steps}


def _stepped(config: AttackConfig) -> dict:
    return {**_ball(config), "alpha": config.step, "random_start": config.random_start}


def _apgd(model: _Watched, config: AttackConfig, loss: str = "ce") -> TorchAttack:
    return _APGD(model, **_ball(config), loss=loss, seed=config.seed)


def _ti(model: _Watched, config: AttackConfig) -> TorchAttack:
    # 15 pixels are the published kernel for 299; a small image needs a smaller one
    kernel = min(15, max(5, model.image_size // 15 | 1))
    return torchattacks.TIFGSM(model, **_stepped(config), len_kernel=kernel)


def _square(model: _Watched, config: AttackConfig, queries: int | None = None) -> TorchAttack:
    queries = config.steps if queries is None else queries
    return _Square(model, eps=config.epsilon_255 / 255, n_queries=queries, seed=config.seed)


def _autoattack(model: _Watched, config: AttackConfig) -> TorchAttack:
    """The standard version: APGD-CE, APGD-T, FAB-T and Square, with 9 targets at most. The loss
    of APGD-T needs four classes: three take APGD-DLR in its place, two go without."""
    several = {**_ball(config), "n_classes": min(10, model.classes), "seed": config.seed}
    attacks = [_apgd(model, config)]
    if model.classes == 3:
        attacks.append(_apgd(model, config, "dlr"))
    elif model.classes > 3:
        attacks.append(torchattacks.APGDT(model, **several))
    attacks.append(torchattacks.FAB(model, **several, multi_targeted=True))
    attacks.append(_square(model, config, 50 * config.steps))
    return torchattacks.MultiAttack([_Rounded(attack) for attack in attacks])


def _autoattack_passes(config: AttackConfig, classes: int) -> int:
    targets = min(9, classes - 1)
    return (50 + 1 + (targets if classes > 3 else 1) + 2 * targets) * config.steps


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    title: display name.
    norm: `Linf`, or `L2` for an attack without epsilon.
    about: one line for the person who chooses.
    steps: default iterations; unit: what they are.
    targeted: can move towards a class.
    step_size: has one that can be chosen.
    build: the attack on a model.
    passes: passes through the model that it takes at most (about), for progress.
    """

    title: str
    norm: str
    about: str
    steps: int
    build: Callable[[_Watched, AttackConfig], TorchAttack]
    unit: str = "steps"
    targeted: bool = True
    step_size: bool = False
    passes: Callable[[AttackConfig, int], int] = lambda config, classes: config.steps


ATTACKS: dict[str, Attack] = {
    "pgd": Attack(
        "PGD",
        "Linf",
        "Steps along the sign of the gradient, kept inside the epsilon ball.",
        10,
        lambda model, config: torchattacks.PGD(model, **_stepped(config)),
        step_size=True,
    ),
    "apgd": Attack(
        "APGD",
        "Linf",
        "PGD with momentum that halves its own step size when it stops gaining.",
        50,
        _apgd,
        targeted=False,
        passes=lambda config, classes: config.steps + 1,
    ),
    "cw": Attack(
        "CW",
        "L2",
        "Carlini-Wagner: looks for the smallest L2 change that fools; it knows no epsilon.",
        50,
        lambda model, config: _CW(model, config.steps),
        passes=lambda config, classes: len(_CW.weights) * config.steps,
    ),
    "di": Attack(
        "DI",
        "Linf",
        "DI2-FGSM: PGD through random resizing and padding, made to transfer between models.",
        10,
        lambda model, config: torchattacks.DIFGSM(model, **_stepped(config)),
        step_size=True,
    ),
    "ti": Attack(
        "TI",
        "Linf",
        "TI-FGSM: DI with a smoothed gradient, made to transfer between models.",
        10,
        _ti,
        step_size=True,
    ),
    "square": Attack(
        "Square",
        "Linf",
        "Random squares, without gradients: it only asks the model for its answers.",
        500,
        _square,
        unit="queries",
        passes=lambda config, classes: config.steps + 1,
    ),
    "autoattack": Attack(
        "AutoAttack",
        "Linf",
        "APGD, targeted APGD, FAB and Square one after the other; thorough and slow.",
        100,
        _autoattack,
        targeted=False,
        passes=_autoattack_passes,
    ),
}


class Classifier(nn.Module):
    """CLIP as an image classifier with fixed text features and fixed visual prompts."""

    def __init__(
        self, backbone: Backbone, text_features: Tensor, prompts: Prompts | None = None
    ) -> None:
        super().__init__()
        self.model = backbone.model  # torchattacks asks its parameters for the device
        self.backbone = backbone
        self.text_features = text_features.detach()
        self.visual = None if prompts is None else prompts.visual().detach()
        self.classes = len(text_features)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images in [0, 1], (N, 3, S, S)."""
        features, _ = encode_image(self.backbone, images, self.visual)
        return image_logits(self.backbone, features, self.text_features)


class _Watched(nn.Module):
    """Reports every forward pass of an attack; the callback may raise to stop it."""

    def __init__(self, classifier: Classifier, on_pass: Callable[[int], None]) -> None:
        super().__init__()
        self.classifier, self.on_pass, self.passes = classifier, on_pass, 0
        self.classes, self.image_size = classifier.classes, classifier.backbone.image_size
        self.eval()  # torchattacks switches a model back to the mode that it finds here

    def forward(self, images: Tensor) -> Tensor:
        self.on_pass(self.passes)
        self.passes += 1
        return self.classifier(images)


def attack_images(
    classifier: Classifier,
    pixels: Tensor,
    labels: Tensor,
    config: AttackConfig,
    *,
    targets: Tensor | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Attacks 8-bit images.

    pixels: uint8, (N, 3, S, S).
    labels: the classes to move away from, (N,).
    targets: the classes to move towards instead, (N,).
    on_progress: called with (steps done, steps) before every step; may raise to stop.

    Returns:
        uint8, (N, 3, S, S), with L-inf <= `config.epsilon_255` in integers where there is one.

    Raises:
        InputError: a target for an attack without a targeted mode, or a model that is not float32.
    """
    if classifier.backbone.dtype != torch.float32:
        raise InputError("Attacks run in float32: load the backbone with dtype=torch.float32.")
    if targets is not None and not config.attack.targeted:
        raise InputError(f"{config.attack.title} cannot aim at a class: leave the target out.")
    device = classifier.backbone.device
    images = to_float(pixels.to(device))
    devices = [device.index or 0] if device.type == "cuda" else []
    total = config.attack.passes(config, classifier.classes)
    watched = _Watched(classifier, lambda done: on_progress(min(done, total), total))
    with (
        _RANDOM_STATE,
        torch.random.fork_rng(devices=devices),
        torch.enable_grad(),
        torch.device("cpu"),  # the library draws on the default device
    ):
        torch.manual_seed(config.seed)
        attack = config.attack.build(watched, config)
        if targets is not None:
            attack.set_mode_targeted_by_label(quiet=True)
        aims = labels if targets is None else targets
        attacked = attack(images, aims.to(device))
    on_progress(total, total)
    # DI and TI divide by the gradient's size: where it is 0, the image stays
    attacked = torch.where(attacked.isfinite(), attacked, images)
    return _to_8_bit(attacked, pixels.to(device), config.epsilon_255).to(pixels.device)


def _to_8_bit(attacked: Tensor, pixels: Tensor, epsilon_255: int | None) -> Tensor:
    # rounded, not floored: floor weakens the attack and can leave the ball
    delta = (attacked.detach() * 255).round().int() - pixels.int()
    if epsilon_255 is not None:
        delta = delta.clamp(-epsilon_255, epsilon_255)
    return (pixels.int() + delta).clamp(0, 255).to(torch.uint8)


def l2_norm(attacked: Tensor, pixels: Tensor) -> Tensor:
    """L2 size of each image's change in [0, 1] pixels, (N,), from uint8 images (N, 3, S, S)."""
    return ((attacked.float() - pixels.float()) / 255).flatten(1).norm(dim=1)


def linf_255(attacked: Tensor, pixels: Tensor) -> Tensor:
    """Largest pixel change of each image in 1/255, (N,), from uint8 images (N, 3, S, S)."""
    return (attacked.int() - pixels.int()).abs().flatten(1).amax(1)
