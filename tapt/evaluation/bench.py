"""Seconds and memory per image of the test-time step, beside a straightforward implementation.

The straightforward path (`tapt.evaluation.plain`) is a second implementation: equal logits also
check `tapt.core.tuning`. Every measurement runs in a process of its own, because a process never
gives its peak memory back.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import statistics as numbers
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, TaptError
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import ClassTexts, PromptConfig, Prompts, class_texts, init_prompts
from tapt.core.tuning import Clock, TuneConfig, encode_views, tune, views_per_pass
from tapt.core.views import generators, make_views
from tapt.evaluation.plain import plain_tune
from tapt.model import Selection
from tapt.packs.backbones import load_backbone
from tapt.packs.format import statistics_shapes

PHASES = ("views", "text", "select", "gradient", "predict")
FAST_ALONE = 1000  # from this many classes on, the straightforward path needs about 47 GB
EQUAL = 2e-2  # a step is lr * sign(gradient); where that is about 0, rounding decides the sign
SPEED_SECONDS = 1.0
RATIOS = {"time": "total", "memory": "peak", "memory_above_model": "above_model"}
MEASURED = ("total", "class_list", "peak", "above_model")


@dataclass(frozen=True)
class Job:
    """One measurement: the fast path, or the straightforward one, on one image.

    selection: precision in which the fast path selects its views.
    """

    backbone: str
    design: str
    classes: int
    views: int
    fast: bool = True
    selection: Selection = "float32"
    threads: int | None = None
    device: str | None = None


def bench(
    backbone: str = "random:ViT-B-16",
    *,
    classes: Sequence[int] = (10, 100),
    designs: Sequence[str] = ("V", "VLI"),
    views: int = 64,
    repeats: int = 1,
    selection: Selection = "float32",
    threads: int | None = None,
    device: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures each design with each number of classes and yields a row: medians over the
    repeats, ratios of both paths, and the floor that the machine's matrix products set.

    Raises:
        InputError: an argument is outside what is allowed; before any work.
        TaptError: there is not enough memory.
    """
    TuneConfig(views=views)
    if not designs or not classes:
        raise InputError("Give at least one design and one number of classes.")
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    for design in designs:
        PromptConfig(design=design)
    for count in classes:
        if not 2 <= count <= 1000:
            raise InputError(f"classes must be whole numbers from 2 to 1000, got {count}.")
    jobs = [
        Job(backbone, design, count, views, True, selection, threads, device)
        for design, count in product(designs, classes)
    ]
    return (_row(job, repeats) for job in jobs)


def _in_process(job: Job) -> dict[str, Any]:
    # open_clip warns about weights that are random on purpose
    quiet: dict[str, Any] = {"initializer": logging.disable, "initargs": (logging.WARNING,)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, **quiet) as pool:
        try:
            return pool.submit(measure, job).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            path = "fast" if job.fast else "straightforward"
            raise TaptError(
                f"The {path} path of {job.design} with {job.classes} classes was stopped: most "
                "likely there is not enough memory."
            ) from error


@dataclass(frozen=True, eq=False)
class Case:
    """One image with all that its tuning needs; `views` are (1, V, 3, S, S)."""

    backbone: Backbone
    prompts: Prompts
    views: Tensor
    texts: ClassTexts
    statistics: Statistics
    config: TuneConfig
    selection_model: Backbone | None = None

    def fast(self) -> tuple[Tensor, dict[str, float]]:
        """Tuned logits (C,) and seconds per phase of the core's own path."""
        view_logits, clock = None, Clock(self.backbone.device)
        if self.selection_model is not None:
            text = self.texts.features(self.backbone, self.prompts)
            view_logits = encode_views(self.selection_model, self.prompts, self.views, text)
            clock.lap("select")
        parts = self.backbone, self.prompts, self.views, self.texts
        tuned = tune(
            *parts, statistics=self.statistics, config=self.config, view_logits=view_logits
        )
        tuned.seconds["select"] += clock.seconds.get("select", 0.0)
        return tuned.logits[0], tuned.seconds


def measure(job: Job) -> dict[str, Any]:
    """Tunes one random image and reports seconds per phase, bytes, and the tuned logits."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES as NAMES

    if job.threads:
        torch.set_num_threads(job.threads)
    backbone, _ = load_backbone(job.backbone, device=job.device, dtype=torch.float32)
    depth = min(9, backbone.visual_blocks, backbone.text_blocks)
    prompts = init_prompts(backbone, PromptConfig(design=job.design, tokens=2, visual_depth=depth))
    began = time.perf_counter()
    texts = class_texts(backbone, NAMES[: job.classes], prompts.config, cut=job.fast)
    class_list = time.perf_counter() - began
    statistics = random_statistics(backbone, prompts)
    selection = backbone.in_bfloat16() if job.fast and job.selection == "bfloat16" else None
    speed = matrix_speed(backbone, SPEED_SECONDS)

    memory = Memory(backbone.device)
    began = time.perf_counter()
    (generator,) = generators([0])
    image = torch.rand(3, *[backbone.image_size] * 2, generator=generator, device="cpu")
    views = make_views(image.to(backbone.device), job.views, generator=generator)[None]
    making = time.perf_counter() - began
    config = TuneConfig(views=job.views)
    case = Case(backbone, prompts, views, texts, statistics, config, selection)
    parts = backbone, prompts, views[0], texts.tokens, statistics, config
    logits, seconds = case.fast() if job.fast else plain_tune(*parts)
    total, peak = time.perf_counter() - began, memory.peak()
    return {
        "seconds": {"views": making, **seconds},
        "total": total,
        "class_list": class_list,
        "peak": peak,
        "above_model": max(0, peak - memory.start),
        "flop_per_second": numbers.mean((speed, matrix_speed(backbone, SPEED_SECONDS))),
        "logits": logits.tolist(),
        "depth": depth,
        "threads": torch.get_num_threads(),
        "device": str(backbone.device),
        "flop": method_flop(case) if job.fast else None,
    }


def random_statistics(backbone: Backbone, prompts: Prompts) -> Statistics:
    """Numbers in [0, 1) instead of statistics, on the backbone's device."""
    (generator,) = generators([1])
    shapes = statistics_shapes(backbone.architecture, prompts.config).values()
    values = [torch.rand(s, generator=generator, device="cpu").to(backbone.device) for s in shapes]
    return Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))


def matrix_speed(backbone: Backbone, seconds: float) -> float:
    """FLOP/s of float32 matrix products in the shapes of the model's own image blocks."""
    width, device = backbone.visual_width, backbone.device
    rows = views_per_pass(backbone) * backbone.image_tokens
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    pairs = [
        (torch.rand(rows, i, device=device), torch.rand(i, o, device=device)) for i, o in shapes
    ]
    clock, rounds = Clock(device), 0
    while clock.seconds.get("products", 0.0) < seconds:
        for left, right in pairs:
            left @ right
        clock.lap("products" if rounds else "warm-up")
        rounds += 1
    return sum(2 * rows * i * o for i, o in shapes) * (rounds - 1) / clock.seconds["products"]


def method_flop(case: Case) -> int:
    """FLOP of the fast path's matrix products, counted on tensors without values.

    The backbone of `case` is moved to the meta device and cannot be used afterwards.
    """
    tokens, fixed = case.texts.tokens.to("meta"), case.texts.fixed
    empty = replace(
        case,
        backbone=replace(case.backbone, model=case.backbone.model.to("meta")),
        prompts=case.prompts.map(lambda t: t.to("meta")),
        views=case.views.to("meta"),
        texts=replace(case.texts, tokens=tokens, fixed=None if fixed is None else fixed.to("meta")),
        selection_model=None,
    )
    with FlopCounterMode(display=False) as counter:
        empty.fast()
    return int(counter.get_total_flops())


class Memory:
    """Bytes of this process, or of the CUDA device, when made (`start`) and at most since."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        with contextlib.suppress(OSError):  # Linux forgets an earlier peak when asked so
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self.peak("VmRSS")

    def peak(self, key: str = "VmHWM") -> int:
        """The most since then; 0 where the system does not say."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        # not ru_maxrss: a new process inherits its parent's there
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        return 0


def _row(job: Job, repeats: int) -> dict[str, Any]:
    """Medians over the repeats; ratios are taken within one repeat."""
    fast, slow = [], []
    for _ in range(repeats):
        fast.append(_in_process(job))
        if job.classes < FAST_ALONE:
            slow.append(_in_process(replace(job, fast=False)))
    return {
        **{k: getattr(job, k) for k in ("backbone", "design", "classes", "views", "selection")},
        **{k: fast[0][k] for k in ("device", "threads", "depth", "flop")},
        "repeats": repeats,
        "fast": _medians(fast),
        "straightforward": _medians(slow) if slow else None,
        "ratios": _ratios(fast, slow) if slow else None,
        "flop_per_second": numbers.median(r["flop_per_second"] for r in fast + slow),
        "times_floor": numbers.median(f["total"] * f["flop_per_second"] / f["flop"] for f in fast),
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = {p: numbers.median(r["seconds"].get(p, 0.0) for r in runs) for p in PHASES}
    return {"seconds": seconds, **{k: numbers.median(r[k] for r in runs) for k in MEASURED}}


def _ratios(fast: Sequence[dict[str, Any]], slow: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ratios = dict[str, Any]()
    for name, key in RATIOS.items():
        values = [s[key] / f[key] for f, s in zip(fast, slow, strict=True) if f[key]]
        ratios[name] = numbers.median(values) if values else None
    one, other = (torch.tensor([run["logits"] for run in runs]) for runs in (fast, slow))
    return {**ratios, "largest_difference": float((one - other).abs().max())}  # NaN stays NaN


def mistakes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every row whose two paths differ by more than rounding explains."""
    return [
        f"{row['design']}, {row['classes']} classes: the tuned logits of both paths differ by "
        f"{row['ratios']['largest_difference']:.3g}, more than {EQUAL}."
        for row in rows
        if row["ratios"]
        and row["selection"] == "float32"
        and not row["ratios"]["largest_difference"] <= EQUAL
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people: seconds per phase, memory in GB, ratios of both paths."""
    first = rows[0]
    kind = "GPU memory" if first["device"].startswith("cuda") else "memory of the process"
    selected = "" if first["selection"] == "float32" else ", views selected in bfloat16"
    repeats = "" if first["repeats"] == 1 else f", medians of {first['repeats']} runs"
    text = [
        f"{first['backbone']} on {first['device']}, {first['threads']} threads, float32{selected}, "
        f"{first['views']} views, n = 2, depth {first['depth']}{repeats}",
        f"seconds per image; {kind} in GB: peak, and above the loaded model",
        "",
        f"{'design':<8}{'classes':<9}{'path':<16}"
        + "".join(f"{title:>10}" for title in (*PHASES, "total", "peak", "above")),
    ]
    return "\n".join([*text, *(line for row in rows for line in _lines(row))])


def _lines(row: dict[str, Any]) -> Iterator[str]:
    for path in ("fast", "straightforward"):
        if result := row[path]:
            cells = [*(result["seconds"][phase] for phase in PHASES), result["total"]]
            cells += [result[key] / 1e9 for key in ("peak", "above_model")]
            start = f"{row['design']:<8}{row['classes']:<9}{path:<16}"
            yield start + "".join(f"{cell:>10.2f}" for cell in cells)
    if ratios := row["ratios"]:
        known = [f"{k.replace('_', ' ')} {ratios[k]:.2f}" for k in RATIOS if ratios[k] is not None]
        difference = f"tuned logits differ by at most {ratios['largest_difference']:.1e}"
        yield f"  straightforward / fast: {', '.join(known)}; {difference}"
    else:
        yield f"  the straightforward path is left out from {FAST_ALONE} classes on"
    yield (
        f"  {row['flop'] / 1e12:.3g} TFLOP at {row['flop_per_second'] / 1e9:.3g} GFLOP/s of matrix "
        f"products here: the fast path takes {row['times_floor']:.2f} times that floor"
    )
