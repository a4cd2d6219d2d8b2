"""What a defence is, and the registry that commands, page and evaluation loop over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from tapt.core.backbone import Backbone
from tapt.core.clip import Classifier, PromptedClip
from tapt.core.errors import InputError
from tapt.core.prompts import ClassTexts
from tapt.core.settings import Settings
from tapt.core.tuning import encode_views
from tapt.core.views import generators, make_views
from tapt.progress import Progress, counted, quiet

T = TypeVar("T")
Trace = Mapping[str, Any]
"""What happened: names to tensors with a leading dimension M, to None, or to such mappings."""
State = Mapping[str, Tensor]
"""What a defence found out about each image, by name, with a leading dimension M."""


class ImageBatch:
    """Preprocessed images, their randomness, and what several defences need of them, made once.

    images: (M, 3, S, S) in [0, 1]; may require gradients.
    seeds: of each image's randomness, (M,).
    """

    def __init__(self, images: Tensor, seeds: Sequence[int]) -> None:
        self.images, self.seeds = images, list(seeds)
        self.reused = 0.0  # seconds that values found here took when they were made
        self._shared: dict[Hashable, tuple[Any, float]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def detached(self) -> ImageBatch:
        """The same images, of which nothing is known yet, without gradients."""
        return ImageBatch(self.images.detach(), self.seeds)

    def generators(self, purpose: str) -> list[Generator]:
        """A CPU generator for each image; each purpose has numbers of its own."""
        return generators(self.seeds, purpose)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `make`, made once for all that ask with the same key."""
        if key in self._shared:
            value, seconds = self._shared[key]
            self.reused += seconds
            return value
        began, inner = time.perf_counter(), self.reused
        value = make()
        self._shared[key] = value, time.perf_counter() - began + self.reused - inner
        return value

    def views(self, count: int) -> Tensor:
        """The image itself and random crops of it, (M, count, 3, S, S)."""

        def make() -> Tensor:
            pairs = zip(self.images, generators(self.seeds), strict=True)
            return torch.stack([make_views(x, count, generator=g) for x, g in pairs])

        return self.shared(("views", count), make)

    def view_logits(self, clip: PromptedClip, count: int, on_progress: Progress) -> Tensor:
        """Logits (M, count, C) of the views under the static prompts, without gradients; by the
        selection model where there is one."""

        def make() -> Tensor:
            advance = counted(on_progress, len(self) * count)
            model = clip.selection_model or clip.backbone
            views, text = self.views(count), clip.text_features
            return encode_views(model, clip.prompts, views, text, advance=advance)

        return self.shared(("view logits", count, clip), make)


def crops(batch: ImageBatch, settings: Any) -> Tensor:
    """The views of a defence that changes none of them, (M, V, 3, S, S)."""
    return batch.views(settings.views)


def images_per_pass(backbone: Backbone, views: int, texts: ClassTexts | None = None) -> int:
    """How many images pass with gradients at once: about 8,000 tokens of the image tower.

    views: of each image.
    texts: class sentences; they count where every image has text prompts of its own.
    """
    tokens = views * backbone.image_tokens
    if texts is not None and texts.fixed is None:
        width, blocks = backbone.visual_width, backbone.visual_blocks
        share = backbone.text_width * backbone.text_blocks / (width * blocks)
        tokens += math.ceil(texts.tokens.numel() * share)
    return max(1, 8192 // tokens)


@dataclass(frozen=True, eq=False)
class Prediction:
    """probabilities: (M, C), on the CPU.
    trace: how the answer came about.
    """

    probabilities: Tensor
    trace: Trace = field(default_factory=dict)


class PreparedDefense:
    """A defence for one `PromptedClip` and one choice of settings.

    It defines `logits`, or, where an attacker must hold something constant (BPDA, Athalye et al.
    2018), `freeze` and `frozen_logits`: selections, rounding, steps are of the one, what has a
    gradient is of the other.

    uses_prompts: its answer depends on the pack's prompts.
    randomised: draws at test time; it is scored over draws and attacked with EOT.
    surrogate: name of the differentiable stand-in that an attacker may try, where there is one.
    images_per_pass: how many images `logits` takes at once, at most.
    """

    uses_prompts: bool = True
    randomised: bool = False
    surrogate: str | None = None
    images_per_pass: int = 64

    def __init__(self, clip: PromptedClip, settings: Any) -> None:
        self.clip, self.settings = clip, settings

    @property
    def undefended(self) -> Classifier:
        """What answers where nothing is done at test time; cheap attacks see it."""
        return self.clip.static if self.uses_prompts else self.clip.vanilla

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        """Log-probabilities or logits (M, C) that an attacker differentiates."""
        state = self.freeze(batch.detached(), on_progress=on_progress)
        assert state is not None, "a defence defines logits, or freeze and frozen_logits"
        return self.frozen_logits(batch, state)

    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State | None:
        """Runs the defence on images without gradients, for what is then held constant."""
        return None

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        """What `logits` gives, for images that may have moved since.

        state: from `freeze` with the same seeds.
        """
        raise NotImplementedError

    def surrogate_logits(self, batch: ImageBatch) -> Tensor:
        """Answers (M, C) of the surrogate, with gradients through all of it."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        """Answers to the images."""
        logits = self.logits(batch, on_progress=on_progress)
        return Prediction(logits.softmax(-1).cpu())


class NoSettings(Settings):
    """A defence without settings."""


@dataclass(frozen=True)
class Defense:
    """A row of the registry.

    name: in commands, files and the API.
    title, about: for people.
    prepare: makes it ready; sees things of the core alone.
    views: of a batch and the settings, the views (M, V, 3, S, S) that it looks at, to be shown.
    by_default: answers where nobody chose.
    search: values of its decisive settings, all combinations of which are tried where a pack is
        made.
    """

    name: str
    title: str
    about: str
    prepare: type[PreparedDefense]
    settings: type[Settings] = NoSettings
    views: Callable[[ImageBatch, Any], Tensor] | None = None
    by_default: bool = True
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict, hash=False)

    @property
    def uses_prompts(self) -> bool:
        """Whether its answer depends on the pack's prompts."""
        return self.prepare.uses_prompts


_REGISTRY: dict[str, Defense] = {}


def register(defense: Defense) -> Defense:
    """Adds a defence, or replaces the one of the same name; it then is everywhere."""
    _REGISTRY[defense.name] = defense
    return defense


def list_defenses() -> list[str]:
    """Names of the registered defences, in the order in which they are shown."""
    return list(_REGISTRY)


def all_defenses() -> list[Defense]:
    """Every registered defence, in the order in which they are shown."""
    return list(_REGISTRY.values())


def find_defense(name: str) -> Defense:
    """The defence of this name; `InputError` as of `find_defenses`."""
    return find_defenses([name])[0]


def find_defenses(names: Sequence[str] | None = None) -> list[Defense]:
    """The defences of these names; without names those that answer by default.

    Raises:
        InputError: no name, or one that is not registered; the message lists them.
    """
    known = ", ".join(_REGISTRY)
    if names is not None and not names:
        raise InputError(f"Choose at least one defence of {known}.")
    for name in names or ():
        if name not in _REGISTRY:
            raise InputError(f"Defence {name!r} is unknown; choose from {known}.")
    chosen = names or [name for name, row in _REGISTRY.items() if row.by_default]
    return [_REGISTRY[name] for name in dict.fromkeys(chosen)]
