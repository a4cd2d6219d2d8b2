"""Seconds and memory per image: TAPT's step beside a straightforward implementation of it, and
every defence beside vanilla CLIP.

The straightforward path (`tapt.evaluation.plain`) is a second implementation: equal logits also
check `tapt.core.tuning`. Every measurement runs in a process of its own, because a process never
gives its peak memory back.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import InputError, TaptError
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import PromptConfig, init_prompts
from tapt.core.settings import Settings
from tapt.core.tuning import TuneConfig, Views, views_per_pass
from tapt.core.views import generators
from tapt.defenses import ImageBatch, find_defenses
from tapt.defenses.context import TptSettings, marginal_entropy, tune_context
from tapt.defenses.tapt import Tapt, TaptSettings
from tapt.defenses.text_prompts import Tpt
from tapt.evaluation.plain import plain_tune
from tapt.model import Selection
from tapt.packs.backbones import load_backbone
from tapt.progress import Clock, quiet

FAST, SLOW = "fast", "straightforward"
FAST_ALONE = 1000  # from this many classes on, the straightforward path needs about 47 GB
EQUAL = 2e-2  # a step is lr * sign(gradient); where that is about 0, rounding decides the sign
DIFFERENCE = "largest difference of the tuned logits"
PHASES = ("views", "text", "select", "gradient", "predict")
SPEED_SECONDS = 1.0
TEXT_TUNING, PLAIN = ("tpt", "rtpt"), "plain views + text step"  # which is all that they need
SHARING, ENCODING = ("static", "ensemble", "tapt", "tapt-ensemble"), "one encoding of views"
TOGETHER = " + ".join(SHARING)  # the last three see the same views under the same prompts


class Job(Settings):
    """One measurement. `what`: a path of TAPT's step, a defence, or what those stand beside."""

    backbone: str = Field("random:ViT-B-16", description="whose size counts")
    design: Literal["V", "VLI", "VLJ"] = "VLI"
    classes: int = Field(100, ge=2, le=1000, description="how many")
    views: Views = 64
    selection: Selection = Field(
        "float32",
        description="in which views are selected, except on the straightforward path",
        json_schema_extra={"option": "precision"},
    )
    repeats: int = Field(1, ge=1, le=1000, description="runs of which the medians are shown")
    threads: int | None = Field(None, ge=1, le=1024, description="default torch's choice")
    device: str | None = Field(None, description="default: cuda, mps or cpu")
    what: str = FAST


def bench(
    *,
    defenses: Sequence[str] | None = None,
    designs: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Measures each design with each number of classes and yields a row of medians and ratios.

    defenses: names; None measures both paths of TAPT's step, and the floor that the machine's
        matrix products set.
    designs, classes: default V and VLI with 10 and 100; for defences VLI with 100.
    options: fields of a `Job`.

    Raises:
        InputError: an argument is outside what is allowed; before any work.
        TaptError: there is not enough memory.
    """
    names = None if defenses is None else [d.name for d in find_defenses(["clip", *defenses])]
    designs = (["VLI"] if names else ["V", "VLI"]) if designs is None else designs
    classes = ([100] if names else [10, 100]) if classes is None else classes
    if not designs or not classes:
        raise InputError("Give at least one design and one number of classes.")
    each = product(designs, classes)
    jobs = [Job(design=design, classes=count, **options) for design, count in each]
    return (_row(job, names) for job in jobs)


def _row(job: Job, defenses: Sequence[str] | None) -> dict[str, Any]:
    if defenses is None:
        wanted = [FAST, SLOW] if job.classes < FAST_ALONE else [FAST]
    else:
        wanted = [*defenses, PLAIN] if {*TEXT_TUNING} & {*defenses} else [*defenses]
        wanted += [ENCODING, TOGETHER] if {*SHARING} <= {*defenses} else []
    rounds = [  # in turn: the machine's speed may change
        {what: _in_process(job.updated(what=what)) for what in wanted} for _ in range(job.repeats)
    ]
    return {
        **job.model_dump(exclude={"what"}),
        **rounds[0][wanted[0]]["used"],
        "measured": _medians([{k: run["numbers"] for k, run in runs.items()} for runs in rounds]),
        "ratios": _medians([_ratios(runs) for runs in rounds]),
    }


def _medians(values: Sequence[Any]) -> Any:
    """Of numbers, or of those in dicts, by name."""
    if isinstance(values[0], dict):
        return {name: _medians([value[name] for value in values]) for name in values[0]}
    return median(values)


def _ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What is compared within one round."""
    numbers = {what: run["numbers"] for what, run in runs.items()}
    total, ratios = {what: each["total"] for what, each in numbers.items()}, {}
    if FAST in runs:
        floor = numbers[FAST]["flop"] / numbers[FAST]["flop_per_second"]
        ratios[f"{FAST} / the floor of its matrix products"] = total[FAST] / floor
    if SLOW in runs:
        for name, key in (("seconds", "total"), ("memory", "peak"), ("memory above", "above")):
            ratio = numbers[SLOW][key] / max(1e-9, numbers[FAST][key])
            ratios[f"{SLOW} / {FAST}, {name}"] = ratio
        one, other = (torch.tensor(runs[path]["logits"]) for path in (FAST, SLOW))
        ratios[DIFFERENCE] = float((one - other).abs().max())
    for name in (name for name in TEXT_TUNING if name in runs):
        ratios[f"{name} / {PLAIN}"] = total[name] / total[PLAIN]
    if TOGETHER in runs:
        once = sum(total[name] for name in SHARING) - 2 * total[ENCODING]  # instead of three
        ratios[f"{TOGETHER} / {ENCODING} + the rest of each"] = total[TOGETHER] / once
    return ratios


def _in_process(job: Job) -> dict[str, Any]:
    # open_clip warns about weights that are random on purpose
    quiet: dict[str, Any] = {"initializer": logging.disable, "initargs": (logging.WARNING,)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, **quiet) as pool:
        try:
            return pool.submit(measure, job).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            raise TaptError(
                f"{job.what} ({job.design}, {job.classes} classes) was stopped: most likely there "
                "is not enough memory."
            ) from error


def measure(job: Job) -> dict[str, Any]:
    """One random image in this process: numbers, what was used, and tuned logits of a path."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES as NAMES

    if job.threads:
        torch.set_num_threads(job.threads)
    backbone, _ = load_backbone(job.backbone, device=job.device, dtype=torch.float32)
    device, (generator,) = backbone.device, generators([0])
    depth = min(9, backbone.visual_blocks, backbone.text_blocks)
    prompts = init_prompts(backbone, PromptConfig(design=job.design, tokens=2, visual_depth=depth))
    shape = backbone.visual_blocks, backbone.image_tokens + 2, backbone.visual_width
    target = TokenStatistics(torch.zeros(shape, device=device), torch.ones(shape, device=device))
    parts = backbone, prompts, Statistics(target, target), tuple(NAMES[: job.classes])
    clip = PromptedClip(*parts)
    if job.selection == "bfloat16" and job.what != SLOW:
        clip = replace(clip, selection_model=backbone.in_bfloat16())
    side = backbone.image_size
    image = torch.rand(1, 3, side, side, generator=generator, device="cpu").to(device)
    clip.vanilla(image)  # warms up
    batch, work, fast = ImageBatch(image, [0]), _work(job, clip), job.what == FAST
    speed = matrix_speed(backbone) if fast else 0.0
    memory, clock = Memory(device), Clock(device)
    answers = [answer(batch) for answer in work]
    clock.lap("total")
    numbers: dict[str, Any] = {**clock.seconds, **memory.used()}
    used = {"device": str(device), "threads": torch.get_num_threads(), "depth": depth}
    run = {"numbers": numbers, "used": used}
    if job.what in (FAST, SLOW):
        ((logits, seconds),) = answers
        views = numbers["total"] - sum(seconds.values())
        numbers["seconds"] = {"views": views, **{phase: seconds[phase] for phase in PHASES[1:]}}
        run["logits"] = logits.tolist()
    if fast:
        numbers["flop_per_second"] = (speed + matrix_speed(backbone)) / 2
        numbers["flop"] = method_flop(clip, batch, TuneConfig(views=job.views))
    return run


def _work(job: Job, clip: PromptedClip) -> list[Callable[[ImageBatch], Any]]:
    """What is measured, ready to be called with the image."""
    config = TuneConfig(views=job.views)
    if job.what == FAST:
        return [partial(fast_tune, clip, config)]
    if job.what == SLOW:
        return [lambda batch: plain_tune(clip, batch.views(job.views), config)]
    _ = clip.text_features  # a class list is made ready once
    if job.what == ENCODING:
        return [lambda batch: batch.view_logits(clip, job.views, quiet)]
    if job.what == PLAIN:
        return [partial(plain_tpt, Tpt(clip, TptSettings(views=job.views)))]
    work: list[Callable[[ImageBatch], Any]] = []
    for row in find_defenses(SHARING if job.what == TOGETHER else [job.what]):
        own = {"views": job.views} if "views" in row.settings.model_fields else {}
        work.append(row.prepare(clip, row.settings(**own)).predict)
    return work


def fast_tune(
    clip: PromptedClip, config: TuneConfig, batch: ImageBatch
) -> tuple[Tensor, dict[str, float]]:
    """Tuned logits (C,) of the batch's image, and seconds per phase, as the defence has them."""
    batch.views(config.views)
    clock = Clock(clip.backbone.device)
    _ = clip.text_features  # made when first asked for
    clock.lap("text")
    batch.view_logits(clip, config.views, quiet)
    clock.lap("select")
    tuned = Tapt(clip, TaptSettings(**config.model_dump())).tune(batch, False, quiet)
    seconds = {k: v + clock.seconds.get(k, 0.0) for k, v in tuned.seconds.items()}
    return tuned.logits[0], seconds


def method_flop(clip: PromptedClip, batch: ImageBatch, config: TuneConfig) -> int:
    """FLOP of the fast path's matrix products, counted on tensors without values: the backbone
    is moved to the meta device and cannot be used afterwards."""
    backbone = replace(clip.backbone, model=clip.backbone.model.to("meta"))
    prompts = clip.prompts.map(lambda t: t.to("meta"))
    empty = replace(clip, backbone=backbone, prompts=prompts, selection_model=None)
    with FlopCounterMode(display=False) as counter:
        fast_tune(empty, config, ImageBatch(batch.images.to("meta"), batch.seeds))
    return int(counter.get_total_flops())


def matrix_speed(backbone: Backbone) -> float:
    """FLOP/s of float32 matrix products in the shape of the widest ones of the image tower."""
    rows, width = views_per_pass(backbone) * backbone.image_tokens, backbone.visual_width
    left = torch.rand(rows, width, device=backbone.device)
    right = torch.rand(width, 4 * width, device=backbone.device)
    clock, rounds = Clock(backbone.device), 0
    while clock.seconds.get("products", 0.0) < SPEED_SECONDS:
        left @ right
        clock.lap("products" if rounds else "warm-up")
        rounds += 1
    return 8 * rows * width**2 * (rounds - 1) / clock.seconds["products"]


def plain_tpt(tpt: Tpt, batch: ImageBatch) -> None:
    """What TPT and R-TPT cannot do without: open_clip's own pass over the views, and the step on
    the text."""
    backbone, (views,) = tpt.clip.backbone, batch.views(tpt.settings.views)
    with torch.no_grad():
        parts = backbone.normalize(views).split(views_per_pass(backbone))
        features = normalize(torch.cat([backbone.model.encode_image(part) for part in parts]))
    kept = features[None, : tpt.kept_count]
    tune_context(backbone, tpt.texts, kept, marginal_entropy, tpt.settings, start=tpt.start)


class Memory:
    """Bytes of this process, or of the CUDA device, from here on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(OSError):  # Linux forgets an earlier peak when asked so
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self._bytes("VmRSS")

    def used(self) -> dict[str, int]:
        """The peak, and how far it is above the start; 0 where the system does not say."""
        peak = self._bytes("VmHWM")
        return {"peak": peak, "above": max(0, peak - self.start)}

    def _bytes(self, key: str) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # not ru_maxrss: a new process inherits its parent's there
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        return 0


def mistakes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every row whose two paths differ by more than rounding explains."""
    return [
        f"{row['design']}, {row['classes']} classes: the tuned logits of both paths differ by "
        f"{row['ratios'][DIFFERENCE]:.3g}, more than {EQUAL}."
        for row in rows
        if row["selection"] == "float32" and not row["ratios"].get(DIFFERENCE, 0) <= EQUAL
    ]


def table(row: dict[str, Any]) -> str:
    """A row for people: seconds, memory in GB at its peak and above the loaded model, ratios."""
    measured, clip = row["measured"], row["measured"].get("clip")
    titles = [*(() if clip else PHASES), "total", *(["x clip"] if clip else []), "GB", "above"]
    width = max(map(len, measured)) + 2
    about = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("measured", "ratios"))
    lines = [about, " " * width + "".join(f"{title:>10}" for title in titles)]
    for what, numbers in measured.items():
        cells = [*numbers.get("seconds", {}).values(), numbers["total"]]
        cells += [numbers["total"] / clip["total"]] if clip else []
        cells += [numbers["peak"] / 1e9, numbers["above"] / 1e9]
        lines.append("".join([f"{what:<{width}}", *(f"{cell:>10.2f}" for cell in cells)]))
    if FAST in measured and SLOW not in measured:
        lines.append(f"  the straightforward path is left out from {FAST_ALONE} classes on")
    return "\n".join([*lines, *(f"  {k}: {value:.3g}" for k, value in row["ratios"].items())])
