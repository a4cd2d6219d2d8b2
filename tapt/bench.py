"""`python -m tapt bench`: seconds and memory per image, beside the straightforward path.

The straightforward path is the same code with two switches off: gradients of every view instead
of the kept ones, and class sentences padded to the full context. Every measurement runs in a
process of its own, because a process never gives its peak memory back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import statistics as numbers
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tapt.backbone import Backbone, load_backbone
from tapt.errors import InputError, TaptError
from tapt.losses import Statistics, TokenStatistics
from tapt.options import names
from tapt.pack import statistics_shapes
from tapt.prompts import DESIGNS, ClassTexts, PromptConfig, Prompts, class_texts, init_prompts
from tapt.tuning import TuneConfig, Tuned, tune, views_per_pass
from tapt.views import make_views

PHASES = ("views", "text", "select", "gradient", "predict")
FAST_ALONE = 1000  # from this many classes on, the straightforward path needs about 47 GB
EQUAL = 2e-2  # a step is lr * sign(gradient); where that is about 0, rounding decides the sign
SPEED_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="random:ViT-B-16", help="default random:ViT-B-16")
    parser.add_argument("--classes", default="10,100", help="how many, by commas; up to 1000")
    parser.add_argument("--designs", default="V,VLI", help="of V, VLI and VLJ, by commas")
    parser.add_argument("--views", type=int, default=64, help="views per image, default 64")
    parser.add_argument("--repeats", type=int, default=1, help="both paths in turn, default 1")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the fast path's view selection, default float32",
    )
    parser.add_argument("--threads", type=int, help="processor threads, default torch's choice")
    parser.add_argument("--device", help="default: cuda, mps or cpu, the first that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True)
class Job:
    """One measurement: the fast path, or the straightforward one, on one image.

    coarse: the fast path selects its views with a bfloat16 copy of the weights.
    """

    backbone: str
    design: str
    classes: int
    views: int
    fast: bool = True
    coarse: bool = False
    threads: int | None = None
    device: str | None = None


def run(args: argparse.Namespace) -> int:
    jobs = _jobs(args)
    rows = []
    for job in jobs:
        runs = []
        for _ in range(args.repeats):
            fast = _in_process(job)
            slow = None if job.classes >= FAST_ALONE else _in_process(replace(job, fast=False))
            runs.append((fast, slow))
        rows.append(_row(job, runs))
        if not args.json:
            print(_header(rows[0]) if len(rows) == 1 else "", _lines(rows[-1]), sep="\n")
    if args.json:
        print(json.dumps({"rows": rows}))
    exact = [r for r in rows if r["ratios"] and r["precision"] == "float32"]
    wrong = [r for r in exact if not r["ratios"]["largest_difference"] <= EQUAL]
    for row in wrong:
        print(
            f"{row['design']}, {row['classes']} classes: the tuned logits of both paths differ by "
            f"{row['ratios']['largest_difference']:.3g}, more than {EQUAL}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    designs = names(args.designs)
    for design in designs:
        if design not in DESIGNS:
            raise InputError(f"--designs must be of {', '.join(DESIGNS)}, got {design!r}.")
    counts = []
    for text in names(args.classes):
        if not text.isdecimal() or not 2 <= int(text) <= len(IMAGENET_CLASSNAMES):
            raise InputError(f"--classes must be whole numbers from 2 to 1000, got {text!r}.")
        counts.append(int(text))
    if not designs or not counts:
        raise InputError("--designs and --classes need at least one value each.")
    for name in ("repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}.")
    TuneConfig(views=args.views)
    coarse = args.precision == "bfloat16"
    return [
        Job(args.backbone, design, count, args.views, True, coarse, args.threads, args.device)
        for design in designs
        for count in counts
    ]


def _in_process(job: Job) -> dict:
    path = "fast" if job.fast else "straightforward"
    # open_clip warns about weights that are random on purpose
    quiet = {"initializer": logging.disable, "initargs": (logging.WARNING,)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, **quiet) as pool:
        try:
            return pool.submit(measure, job).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            raise TaptError(
                f"The {path} path of {job.design} with {job.classes} classes was stopped: most "
                "likely there is not enough memory."
            ) from error


@dataclass(frozen=True, eq=False)
class _Case:
    """All that `tune` is given for one image."""

    backbone: Backbone
    prompts: Prompts
    views: Tensor
    texts: ClassTexts
    targets: Statistics
    config: TuneConfig
    coarse: Backbone | None = None

    def tune(self, fast: bool) -> Tuned:
        return tune(
            self.backbone,
            self.prompts,
            self.views,
            self.texts,
            statistics=self.targets,
            config=self.config,
            select_first=fast,
            coarse=self.coarse if fast else None,
        )


def measure(job: Job) -> dict:
    """Tunes one random image and reports seconds per phase, bytes, and the tuned logits."""
    if job.threads:
        torch.set_num_threads(job.threads)
    backbone = load_backbone(job.backbone, device=job.device, dtype=torch.float32)
    depth = min(9, backbone.visual_blocks, backbone.text_blocks)
    prompts = init_prompts(backbone, PromptConfig(job.design, 2, depth))
    classes = list(IMAGENET_CLASSNAMES[: job.classes])
    began = time.perf_counter()
    texts = class_texts(backbone, classes, prompts.config, cut=job.fast)
    class_list = time.perf_counter() - began
    targets = _random_statistics(backbone, prompts)
    coarse = backbone.in_bfloat16() if job.coarse and job.fast else None
    speed = matrix_speed(backbone)

    memory = _Memory(backbone.device)
    began = time.perf_counter()
    views = _random_views(backbone, job.views)
    seconds = {"views": time.perf_counter() - began}
    config = TuneConfig(views=job.views)
    case = _Case(backbone, prompts, views, texts, targets, config, coarse)
    tuned = case.tune(job.fast)
    total, peak = time.perf_counter() - began, memory.peak()

    result = {
        "seconds": {**seconds, **tuned.trace.seconds},
        "total": total,
        "class_list": class_list,
        "peak": peak,
        "above_model": max(0, peak - memory.start),
        "flop_per_second": numbers.mean((speed, matrix_speed(backbone))),
        "logits": tuned.logits[0].tolist(),
        "depth": depth,
        "threads": torch.get_num_threads(),
        "device": str(backbone.device),
    }
    return {**result, "flop": method_flop(case) if job.fast else None}


def _random_views(backbone: Backbone, count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    size = backbone.image_size
    image = torch.rand(3, size, size, generator=generator, device="cpu")
    return make_views(image.to(backbone.device), count, generator=generator)[None]


def _random_statistics(backbone: Backbone, prompts: Prompts) -> Statistics:
    generator = torch.Generator("cpu").manual_seed(1)
    values = [
        torch.rand(shape, generator=generator, device="cpu")
        for shape in statistics_shapes(backbone, prompts.config).values()
    ]
    return Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))


def matrix_speed(backbone: Backbone, seconds: float | None = None) -> float:
    """FLOP/s of float32 matrix products in the shapes of the model's own image blocks."""
    width, device = backbone.visual_width, backbone.device
    rows = views_per_pass(backbone) * backbone.image_tokens
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    pairs = [
        (torch.rand(rows, i, device=device), torch.rand(i, o, device=device)) for i, o in shapes
    ]
    per_round = sum(2 * rows * i * o for i, o in shapes)
    limit = SPEED_SECONDS if seconds is None else seconds
    rounds, elapsed, began = -1, 0.0, 0.0
    while elapsed < limit:  # the first round warms up
        for left, right in pairs:
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds += 1
        if rounds == 0:
            began = time.perf_counter()
        elapsed = time.perf_counter() - began if rounds else 0.0
    return per_round * rounds / elapsed


def method_flop(case: _Case) -> int:
    """FLOP of the fast path's matrix products, counted on tensors without values.

    The backbone of `case` is moved to the meta device and cannot be used afterwards.
    """
    texts = replace(
        case.texts,
        tokens=case.texts.tokens.to("meta"),
        fixed=None if case.texts.fixed is None else case.texts.fixed.to("meta"),
    )
    without_values = replace(
        case,
        backbone=replace(case.backbone, model=case.backbone.model.to("meta")),
        coarse=None,
        prompts=case.prompts.map(lambda t: t.to("meta")),
        views=case.views.to("meta"),
        texts=texts,
    )
    with FlopCounterMode(display=False) as counter:
        without_values.tune(True)
    return counter.get_total_flops()


class _Memory:
    """Bytes of this process, or of the CUDA device, when made (`start`) and at most since."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.start = torch.cuda.memory_allocated(self._cuda)
            return
        with contextlib.suppress(OSError):  # Linux forgets an earlier peak when asked so
            Path("/proc/self/clear_refs").write_text("5")
        self.start = _process_bytes("VmRSS")

    def peak(self) -> int:
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        return _process_bytes("VmHWM")


def _process_bytes(key: str) -> int:
    # not ru_maxrss on Linux: a new process inherits its parent's there
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _row(job: Job, runs: list[tuple[dict, dict | None]]) -> dict:
    """Medians over the repeats; ratios are taken within one repeat."""
    fast = [f for f, _ in runs]
    slow = [s for _, s in runs if s is not None]
    floor = [f["total"] * f["flop_per_second"] / f["flop"] for f in fast]
    return {
        "backbone": job.backbone,
        "device": fast[0]["device"],
        "threads": fast[0]["threads"],
        "precision": "bfloat16" if job.coarse else "float32",
        "depth": fast[0]["depth"],
        "design": job.design,
        "classes": job.classes,
        "views": job.views,
        "repeats": len(runs),
        "fast": _medians(fast),
        "straightforward": _medians(slow) if slow else None,
        "ratios": _ratios(runs) if slow else None,
        "flop": fast[0]["flop"],
        "flop_per_second": numbers.median(r["flop_per_second"] for r in fast + slow),
        "times_floor": numbers.median(floor),
    }


def _medians(runs: list[dict]) -> dict:
    middle = {
        key: numbers.median(r[key] for r in runs)
        for key in ("total", "class_list", "peak", "above_model")
    }
    return {
        "seconds": {p: numbers.median(r["seconds"].get(p, 0.0) for r in runs) for p in PHASES},
        **middle,
    }


def _ratios(runs: list[tuple[dict, dict]]) -> dict:
    def ratio(key: str) -> float | None:
        pairs = [s[key] / f[key] for f, s in runs if f[key]]
        return numbers.median(pairs) if pairs else None

    differences = [
        abs(a - b) for f, s in runs for a, b in zip(f["logits"], s["logits"], strict=True)
    ]
    nan = any(math.isnan(d) for d in differences)
    return {
        "time": ratio("total"),
        "memory": ratio("peak"),
        "memory_above_model": ratio("above_model"),
        "largest_difference": math.nan if nan else max(differences),
    }


def _header(row: dict) -> str:
    kind = "GPU memory" if row["device"].startswith("cuda") else "memory of the process"
    repeats = "" if row["repeats"] == 1 else f", medians of {row['repeats']} runs"
    titles = "".join(f"{p:>10}" for p in (*PHASES, "total", "peak", "above"))
    return (
        f"{row['backbone']} on {row['device']}, {row['threads']} threads, float32"
        f"{', views selected in bfloat16' if row['precision'] == 'bfloat16' else ''}, "
        f"{row['views']} views, n = 2, depth {row['depth']}{repeats}\n"
        f"seconds per image; {kind} in GB: peak, and above the loaded model\n\n"
        f"{'design':<8}{'classes':<9}{'path':<16}{titles}"
    )


def _lines(row: dict) -> str:
    lines = [_path_line(row, "fast")]
    if row["straightforward"] is None:
        lines.append(f"  the straightforward path is left out from {FAST_ALONE} classes on")
    else:
        ratios = row["ratios"]
        above = ratios["memory_above_model"]
        lines += [
            _path_line(row, "straightforward"),
            f"  straightforward / fast: time {ratios['time']:.2f}, memory {ratios['memory']:.2f}"
            + ("" if above is None else f", memory above the model {above:.2f}")
            + f"; tuned logits differ by at most {ratios['largest_difference']:.1e}",
        ]
    lines.append(
        f"  {row['flop'] / 1e12:.3g} TFLOP at {row['flop_per_second'] / 1e9:.3g} GFLOP/s of matrix "
        f"products here: the fast path takes {row['times_floor']:.2f} times that floor"
    )
    return "\n".join(lines)


def _path_line(row: dict, path: str) -> str:
    result = row[path]
    seconds = "".join(f"{result['seconds'][p]:>10.2f}" for p in PHASES)
    memory = "".join(f"{result[key] / 1e9:>10.2f}" for key in ("peak", "above_model"))
    return (
        f"{row['design']:<8}{row['classes']:<9}{path:<16}{seconds}{result['total']:>10.2f}{memory}"
    )
