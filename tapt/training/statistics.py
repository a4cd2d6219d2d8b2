"""Token statistics of a data set under given prompts, in one streaming pass.

The residual stream is read at every block's input, prompt tokens in place, on unattacked random
resized crops like the views' (`tapt.core.views`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, PackError
from tapt.core.images import to_float
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import Prompts
from tapt.core.towers import encode_image
from tapt.core.views import generators, image_seeds, random_view
from tapt.data import LabelledImages, Pixels, digest
from tapt.files import check_output
from tapt.packs.card import write_pack
from tapt.packs.format import Pack, statistics_shapes
from tapt.processes import gather, start_processes
from tapt.training.checkpoints import Checkpoint


def statistics(
    backbone: Backbone,
    data: LabelledImages,
    adversarial: Pack,
    clean: Pack,
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    test_time: dict[str, dict[str, Any]] | None = None,
    resume: bool = False,
) -> Pack:
    """Makes a whole pack: the adversarial prompts with the statistics under both.

    data: the training part. limit: a class-balanced subset of this many images.
    adversarial, clean: prompts as `train` makes them; statistics of their own are not used.
    out: the folder; with several processes, all of them see it.
    test_time: settings by defence, default those of `adversarial`.
    resume: go on from the folder's checkpoints, where there are any.

    Raises `InputError` for a limit below 2, checkpoints of other inputs and an output that cannot
    be written, `PackError` for packs of different shapes, `DataError` for unreadable images.
    """
    if limit is not None and limit < 2:
        raise InputError(f"limit must be a whole number of at least 2, got {limit}.")
    if clean.prompts.config != adversarial.prompts.config:
        raise PackError("The adversarial and the clean prompts have different designs or shapes.")
    out = check_output(out, folder=True)
    state = start_processes(backbone.device)
    data = data if limit is None else data.balanced(limit, seed)
    images = Pixels(data, backbone.preprocess)
    own = range(state.process_index, len(images), state.num_processes)
    out.mkdir(parents=True, exist_ok=True)
    measured, checkpoints = [], []
    options: dict[str, Any] = {"seed": seed, "progress": state.is_main_process}
    for part, source in (("adversarial", adversarial), ("clean", clean)):
        checkpoint = Checkpoint(out / f"{part}-{state.process_index}.ckpt", resume)
        moments = token_moments(backbone, source.prompts, images, own, checkpoint, **options)
        measured.append(merged(gather(moments)).statistics())
        checkpoints.append(checkpoint)
    made = {
        "images": len(images),
        "views": "one random resized crop (scale 0.08-1) with flip per image, unattacked",
        "variance": "n - 1",
        "seed": seed,
    }
    pack = Pack(
        adversarial.prompts,
        Statistics(*measured),
        adversarial.test_time if test_time is None else test_time,
        out.name,
        adversarial.base_model,
        {"adversarial": adversarial.training, "clean": clean.training, "statistics": made},
    )
    if state.is_main_process:
        write_pack(pack, out)
    state.wait_for_everyone()
    for checkpoint in checkpoints:
        checkpoint.path.unlink(missing_ok=True)
    return pack


@dataclass(eq=False)
class Moments:
    """Sums in float64, so that parts merge by addition and their order does not matter.

    total, squares: (blocks, tokens, width).
    """

    count: int
    total: Tensor
    squares: Tensor

    def add(self, hidden: Sequence[Tensor]) -> None:
        """Adds a batch: per block (N, tokens, width)."""
        self.count += len(hidden[0])
        # float64 does not exist on MPS
        values = [states.detach().cpu().double() for states in hidden]
        self.total += torch.stack([v.sum(0) for v in values])
        self.squares += torch.stack([v.square().sum(0) for v in values])

    def statistics(self) -> TokenStatistics:
        """Mean and variance / (n - 1), float32; `InputError` for fewer than two images."""
        if self.count < 2:
            raise InputError(f"Statistics need at least 2 images, got {self.count}.")
        mean = self.total / self.count
        var = (self.squares - self.count * mean.square()).clamp(min=0) / (self.count - 1)
        return TokenStatistics(mean.float(), var.float())


def merged(parts: Sequence[Moments]) -> Moments:
    """The sums over all parts."""
    return Moments(
        sum(part.count for part in parts),
        torch.stack([part.total for part in parts]).sum(0),
        torch.stack([part.squares for part in parts]).sum(0),
    )


@torch.no_grad()
def token_moments(
    backbone: Backbone,
    prompts: Prompts,
    images: Pixels,
    indices: range,
    checkpoint: Checkpoint,
    *,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> Moments:
    """Moments over one random view of each image; image i's view is drawn by (seed, i).

    indices: of the images to use; no other is read.
    progress: show a bar.
    """
    visual, blocks = prompts.visual(), range(backbone.visual_blocks)
    inputs = fingerprint(backbone, prompts.tensors.values(), images, indices, seed)
    shape, *_ = statistics_shapes(backbone.architecture, prompts.config).values()
    moments = Moments(0, *torch.zeros((2, *shape), dtype=torch.float64, device="cpu"))
    if state := checkpoint.load(inputs):
        moments = Moments(**state)
    starts = range(moments.count, len(indices), batch_size)
    for start in tqdm(starts, unit="batch", dynamic_ncols=True, disable=not progress):
        chunk = indices[start : start + batch_size]
        draws = generators(image_seeds(seed, chunk))
        views = torch.stack(
            [random_view(to_float(images[i]), g) for i, g in zip(chunk, draws, strict=True)]
        )
        _, hidden = encode_image(backbone, views.to(backbone.device), visual, hidden=blocks)
        moments.add(hidden)
        if checkpoint.is_due():
            checkpoint.save(inputs, vars(moments))
    checkpoint.save(inputs, vars(moments))
    return moments


def fingerprint(
    backbone: Backbone, tensors: Iterable[Tensor], images: Pixels, indices: range, seed: int
) -> str:
    """What interrupted work must have in common to go on; a sample of the images is read."""
    values = hashlib.sha256()
    for tensor in tensors:
        values.update(tensor.detach().cpu().numpy().tobytes())
    sample = digest(images.data.subset(range(0, len(images), 50)))
    inputs = [backbone.sha256, values.hexdigest(), sample, len(images), repr(indices), seed]
    return json.dumps(inputs)
