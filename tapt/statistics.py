"""Token statistics of a data set under given prompts, in one streaming pass.

The residual stream is read at every block's input, prompt tokens in place, on unattacked random
resized crops like the views' (`tapt.views`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from tapt.backbone import Backbone, load_backbone
from tapt.data import in_memory, load_data
from tapt.errors import InputError, PackError
from tapt.images import to_float
from tapt.losses import Statistics, TokenStatistics
from tapt.options import (
    DATA_HELP,
    DownloadBar,
    add_backbone_options,
    add_checkpoint_options,
    add_tuning_options,
    tuning_config,
)
from tapt.pack import Pack, load_pack, save_pack
from tapt.processes import save_checkpoint, start_processes
from tapt.prompts import Prompts
from tapt.towers import encode_image
from tapt.views import random_view


@dataclass(eq=False)
class Moments:
    """Sums in float64, so that parts merge by addition and their order does not matter.

    total, squares: (blocks, tokens, width).
    """

    count: int
    total: Tensor
    squares: Tensor

    def add(self, taps: list[Tensor]) -> None:
        """Adds a batch: per block (N, tokens, width)."""
        self.count += len(taps[0])
        # float64 does not exist on MPS
        values = [tap.detach().cpu().double() for tap in taps]
        self.total += torch.stack([v.sum(0) for v in values])
        self.squares += torch.stack([v.square().sum(0) for v in values])

    def merge(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    def statistics(self) -> TokenStatistics:
        """Mean and variance / (n - 1), float32."""
        if self.count < 2:
            raise InputError(f"Statistics need at least 2 images, got {self.count}.")
        mean = self.total / self.count
        var = (self.squares - self.count * mean.square()).clamp(min=0) / (self.count - 1)
        return TokenStatistics(mean.float(), var.float())


def empty_moments(backbone: Backbone, prompts: Prompts) -> Moments:
    tokens = backbone.image_tokens + prompts.config.tokens
    shape = (backbone.visual_blocks, tokens, backbone.visual_width)
    zeros = torch.zeros(shape, dtype=torch.float64, device="cpu")
    return Moments(0, zeros, zeros.clone())


@dataclass(frozen=True)
class Checkpoint:
    """Where the sums so far are kept, and how often they are written.

    resume: go on from the file where it is there and belongs to the same prompts and images.
    """

    path: Path
    minutes: float = 3.0
    resume: bool = False

    def load(self, fingerprint: str) -> Moments | None:
        if not (self.resume and self.path.exists()):
            return None
        state = torch.load(self.path, weights_only=True)
        if state.pop("fingerprint") != fingerprint:
            raise InputError(
                f"{self.path.name} belongs to other prompts, other images or another number of "
                "processes; use the same again, or start anew without --resume."
            )
        return Moments(**state)

    def save(self, moments: Moments, fingerprint: str) -> None:
        save_checkpoint({**vars(moments), "fingerprint": fingerprint}, self.path)


@torch.no_grad()
def token_moments(
    backbone: Backbone,
    prompts: Prompts,
    images: Tensor,
    *,
    indices: range | None = None,
    seed: int = 0,
    batch_size: int = 128,
    checkpoint: Checkpoint | None = None,
) -> Moments:
    """Moments over one random view of each image.

    images: uint8, (N, 3, S, S). Image i's view is drawn by (seed, i).
    indices: of the images to use, default all.
    """
    visual, blocks = prompts.visual(), range(backbone.visual_blocks)
    indices = range(len(images)) if indices is None else indices
    fingerprint = _fingerprint(backbone, prompts, images, indices, seed)
    moments = checkpoint and checkpoint.load(fingerprint)
    moments = moments or empty_moments(backbone, prompts)
    saved = time.monotonic()
    starts = range(moments.count, len(indices), batch_size)
    for start in tqdm(starts, unit="batch", dynamic_ncols=True):
        views = torch.stack(
            [
                random_view(
                    to_float(images[i]), torch.Generator().manual_seed(seed * 1_000_003 + i)
                )
                for i in indices[start : start + batch_size]
            ]
        )
        _, taps = encode_image(backbone, views.to(backbone.device), visual, tap=blocks)
        moments.add(taps)
        if checkpoint and time.monotonic() - saved > 60 * checkpoint.minutes:
            checkpoint.save(moments, fingerprint)
            saved = time.monotonic()
    if checkpoint:
        checkpoint.save(moments, fingerprint)
    return moments


def _fingerprint(
    backbone: Backbone, prompts: Prompts, images: Tensor, indices: range, seed: int
) -> str:
    digest = hashlib.sha256()
    for tensor in (*prompts.tensors.values(), images[::50]):
        digest.update(tensor.cpu().numpy().tobytes())
    return json.dumps([backbone.sha256, digest.hexdigest(), len(images), repr(indices), seed])


def gather(moments: Moments) -> Moments:
    """The sum over all processes."""
    parts = gather_object([moments])
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument(
        "--adversarial", type=Path, required=True, help="folder with adversarially tuned prompts"
    )
    parser.add_argument("--clean", type=Path, required=True, help="folder with clean-tuned prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pack")
    parser.add_argument("--limit", type=int, help="use a class-balanced subset of this many images")
    parser.add_argument("--seed", type=int, default=0)
    add_checkpoint_options(parser)
    add_tuning_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit must be at least 2, got {args.limit}.")
    state = start_processes(args.device)
    backbone = load_backbone(
        args.backbone,
        revision=args.revision,
        device=args.device or state.device,
        token=None,
        progress=DownloadBar(),
    )
    adversarial = load_pack(args.adversarial, backbone, statistics=False)
    clean = load_pack(args.clean, backbone, statistics=False)
    if clean.prompts.config != adversarial.prompts.config:
        raise PackError("The adversarial and the clean prompts have different designs or shapes.")
    data = load_data(args.data, "train")
    if args.limit is not None:
        data = data.balanced(args.limit, args.seed)
    images = in_memory(data, backbone.preprocess)
    mine = range(state.process_index, len(images), state.num_processes)
    args.out.mkdir(parents=True, exist_ok=True)
    parts, checkpoints = [], []
    for part, pack in (("adversarial", adversarial), ("clean", clean)):
        path = args.out / f"{part}-{state.process_index}.ckpt"
        checkpoint = Checkpoint(path, args.checkpoint_minutes, args.resume)
        moments = token_moments(
            backbone,
            pack.prompts,
            images,
            indices=mine,
            seed=args.seed,
            checkpoint=checkpoint,
        )
        parts.append(gather(moments))
        checkpoints.append(path)
    if state.is_main_process:
        _write_pack(args, adversarial, clean, parts, len(images))
    state.wait_for_everyone()
    for path in checkpoints:
        path.unlink()
    return 0


def _write_pack(
    args: argparse.Namespace, adversarial: Pack, clean: Pack, parts: list[Moments], images: int
) -> None:
    training = {
        "adversarial": adversarial.training,
        "clean": clean.training,
        "statistics": {
            "images": images,
            "views": "one random resized crop (scale 0.08-1) with flip per image, unattacked",
            "variance": "n - 1",
            "seed": args.seed,
        },
    }
    pack = Pack(
        adversarial.prompts,
        Statistics(*(moments.statistics() for moments in parts)),
        tuning_config(args, adversarial.test_time),
        args.out.name,
        adversarial.base_model,
        training,
    )
    save_pack(pack, args.out)
    print(f"Pack written to {args.out}.")
