"""The test-time step: one AdamW step on the prompts of every single image (TAPT, section 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from tapt.backbone import Backbone
from tapt.errors import InputError
from tapt.losses import (
    Statistics,
    TokenStatistics,
    entropy,
    kept_views_count,
    select_views,
)
from tapt.prompts import ClassTexts, Prompts, image_logits
from tapt.step import Losses, Step, adamw, assign, descended, kept_graph
from tapt.towers import encode_image


@dataclass(frozen=True)
class TuneConfig:
    """Test-time settings; the defaults are the published ones.

    views: views per image, the image itself included.
    keep: share of the most confident views that is kept.
    steps: AdamW steps per image; the selection of the first step is kept.
    lr, weight_decay, betas, eps: AdamW.
    alignment_weight: weight of the alignment term before it is divided by the visual depth.
    alpha: share of the adversarial statistics in the alignment term; the clean ones get the rest.
    align_from, align_to: first aligned block and the one behind the last; None is D - 1.
    """

    views: int = 64
    keep: float = 0.1
    steps: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    alignment_weight: float = 100.0
    alpha: float = 0.5
    align_from: int = 0
    align_to: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, low, high in (
            ("views", 1, 1024),
            ("steps", 0, 100),
            ("keep", 0.0, 1.0),
            ("lr", 0.0, 10.0),
            ("weight_decay", 0.0, 10.0),
            ("alignment_weight", 0.0, 1e6),
            ("alpha", 0.0, 1.0),
            ("eps", 1e-12, 1.0),
            ("align_from", 0, 1000),
            ("align_to", 0, 1000),
        ):
            value = getattr(self, name)
            whole = isinstance(low, int)
            if name == "align_to" and value is None:
                continue
            if not _within(value, low, high, whole):
                kind = "a whole number" if whole else "a number"
                raise InputError(f"{name} must be {kind} from {low} to {high}, got {value!r}.")
        if (
            not isinstance(self.betas, tuple)
            or len(self.betas) != 2
            or not all(_within(beta, 0.0, 1.0) and beta < 1 for beta in self.betas)
        ):
            raise InputError(f"betas must be two numbers from 0 to below 1, got {self.betas!r}.")

    def to_dict(self) -> dict:
        return {**asdict(self), "betas": list(self.betas)}

    def updated(self, **changes: object) -> TuneConfig:
        """A copy in which every change that is not None replaces a setting."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def _within(value: object, low: float, high: float, whole: bool = False) -> bool:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened during a step.

    logits: of every view under the starting prompts, (M, V, C).
    entropies: of every view, (M, V), in nats.
    kept: indices of the kept views, most confident first, (M, K).
    observed: statistics of the kept views before the step, (blocks, M, tokens, width).
    before, after: loss terms around the step(s); `after` is None unless asked for.
    seconds: per phase, for the whole batch.
    """

    logits: Tensor
    entropies: Tensor
    kept: Tensor
    observed: TokenStatistics
    before: Losses
    after: Losses | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tuned:
    """prompts: one set per image, as a leading dimension M.
    logits: of view 0 under them, (M, C).
    """

    prompts: Prompts
    logits: Tensor
    trace: Trace


def aligned_blocks(config: TuneConfig, visual_depth: int) -> range:
    """The blocks whose input statistics are aligned."""
    return range(
        config.align_from, visual_depth - 1 if config.align_to is None else config.align_to
    )


def tune(
    backbone: Backbone,
    prompts: Prompts,
    views: Tensor,
    texts: ClassTexts,
    *,
    statistics: Statistics | None = None,
    config: TuneConfig | None = None,
    after: bool = False,
    select_first: bool = True,
    smooth: bool = False,
    coarse: Backbone | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Tunes prompts for each image and predicts its view 0 with them.

    Where `views` require gradients, the logits carry them: to view 0 under the tuned prompts held
    constant (BPDA), or, when `smooth`, to all kept views through the step.

    prompts: the start, the same for every image; they are not changed.
    views: (M, V, 3, S, S) in [0, 1]; view 0 is the image itself.
    texts: from `class_texts` for the design of `prompts`.
    statistics: None leaves the entropy term alone.
    after: also compute the loss terms after the step (one more pass over the kept views).
    select_first: select without gradients, then pass the kept views once more with them. False
        keeps the gradients of all views: same results, several times the time and memory.
    smooth: for attackers, a surrogate of the step that gradients pass through: plain gradient
        descent, as long as AdamW's step, with its graph kept.
    coarse: the same backbone in bfloat16, for the selection.
    on_progress: called with (views or passes done, total); may raise to stop.
    """
    config = config or TuneConfig()
    images, count = views.shape[:2]
    kept_count = kept_views_count(count, config.keep)
    step = Step(
        backbone,
        texts,
        None if statistics is None else _checked(statistics, backbone, prompts),
        config,
        _checked_blocks(config, prompts, backbone),
        smooth,
        apart=select_first and not smooth,
    )
    clock = _Clock(backbone.device)
    total = images * (count + kept_count * (config.steps + after) + 1)
    done = 0

    def advance(by: int) -> None:
        nonlocal done
        done += by
        on_progress(done, total)

    on_progress(0, total)
    tuned = prompts.batch(images).map(lambda t: t.detach().requires_grad_())
    with clock("text"):
        text_features = step.text_features(tuned)
    graph = None
    with clock("select"):
        if select_first:
            all_logits = view_logits(
                backbone, prompts, views, text_features, coarse=coarse, advance=advance
            )
        else:
            with torch.enable_grad():
                graph = step.forward(tuned, views, text_features)
            all_logits = graph[0].detach()
            advance(images * count)
        entropies = entropy(all_logits)
        kept = select_views(entropies, config.keep)
        kept_views = views[torch.arange(images, device=views.device)[:, None], kept]
        if not smooth:
            kept_views = kept_views.detach()
        if graph is not None:
            graph = kept_graph(graph, kept, count)

    optimizer = adamw(tuned, config)
    before = observed = None
    for number in range(max(1, config.steps)):
        with clock("gradient"):
            if number > 0:
                text_features = step.text_features(tuned)
            losses, seen, gradients = step.gradients(tuned, kept_views, text_features, graph)
            graph = None
            if number == 0:
                before, observed = losses, seen
            if config.steps == 0:
                continue
            if smooth:
                tuned = descended(tuned, gradients, config)
            else:
                assign(tuned, gradients)
                with torch.device("cpu"):  # AdamW makes its counter on the default device
                    optimizer.step()
        advance(images * kept_count)

    if not smooth:
        tuned = tuned.map(lambda t: t.detach())
    with torch.set_grad_enabled(views.requires_grad), clock("predict"):
        text_features = texts.features(backbone, tuned)
        first, _ = step.forward(tuned, views[:, :1], text_features, tap=())
    final = None
    if after:
        with torch.no_grad(), clock("after"):
            logits, taps = step.forward(tuned, kept_views, text_features)
            final, _ = step.losses(prompts, logits, taps)
    on_progress(total, total)
    trace = Trace(all_logits, entropies, kept, observed, before, final, dict(clock.seconds))
    return Tuned(tuned, first[:, 0], trace)


@torch.no_grad()
def view_logits(
    backbone: Backbone,
    prompts: Prompts,
    views: Tensor,
    text_features: Tensor,
    *,
    coarse: Backbone | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Logits of all views under shared prompts, (M, V, C), in passes of bounded memory.

    coarse: the same backbone in bfloat16; it encodes the views.
    """
    images, count = views.shape[:2]
    tower = coarse or backbone
    text_features = text_features.detach()
    if text_features.ndim == 3:  # every image starts from the same prompts
        text_features = text_features[0]
    visual = prompts.visual().detach().to(tower.dtype)
    rows = []
    for chunk in views.flatten(0, 1).split(views_per_pass(backbone)):
        features, _ = encode_image(tower, chunk, visual)
        rows.append(image_logits(backbone, features.to(text_features.dtype), text_features))
        advance(len(chunk))
    return torch.cat(rows).view(images, count, -1)


def tokens_per_image(backbone: Backbone, config: TuneConfig, texts: ClassTexts) -> int:
    """Tokens that one image passes with gradients, in units of the image tower's; the class
    sentences count where every image has text prompts of its own."""
    tokens = kept_views_count(config.views, config.keep) * backbone.image_tokens
    if texts.fixed is None:
        share = backbone.text_width * backbone.text_blocks
        share /= backbone.visual_width * backbone.visual_blocks
        tokens += math.ceil(texts.tokens.numel() * share)
    return tokens


def images_per_pass(backbone: Backbone, config: TuneConfig, texts: ClassTexts) -> int:
    """Images that are tuned at once: about 8,000 tokens with gradients."""
    return max(1, 8192 // tokens_per_image(backbone, config, texts))


def views_per_pass(backbone: Backbone) -> int:
    """Views in one pass without gradients.

    On a CPU about 1,600 tokens: with more, the activations outgrow what the allocator keeps, and
    their pages are mapped anew at every layer.
    """
    tokens = 1600 if backbone.device.type == "cpu" else 16_000
    return max(1, tokens // backbone.image_tokens)


def _checked_blocks(config: TuneConfig, prompts: Prompts, backbone: Backbone) -> range:
    blocks = aligned_blocks(config, prompts.config.visual_depth)
    if blocks and blocks[-1] >= backbone.visual_blocks:
        raise InputError(
            f"align_to must be at most {backbone.visual_blocks} on this backbone, "
            f"got {config.align_to}."
        )
    return blocks


def _checked(statistics: Statistics, backbone: Backbone, prompts: Prompts) -> Statistics:
    tokens = backbone.image_tokens + prompts.config.tokens
    expected = (backbone.visual_blocks, tokens, backbone.visual_width)
    for name, part in (("adversarial", statistics.adversarial), ("clean", statistics.clean)):
        for key, tensor in (("mean", part.mean), ("var", part.var)):
            if tuple(tensor.shape) != expected:
                raise InputError(
                    f"statistics {name}.{key} must have shape {expected}, "
                    f"got {tuple(tensor.shape)}."
                )
    place = backbone.device, backbone.dtype
    return Statistics(statistics.adversarial.to(*place), statistics.clean.to(*place))


class _Clock:
    """Seconds per phase; waits for a GPU so that its work is counted where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._phase = ""
        self._start = 0.0

    def __call__(self, phase: str) -> _Clock:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed = time.perf_counter() - self._start
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + elapsed
