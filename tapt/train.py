"""Adversarial prompt tuning: makes the static prompts that every image starts from.

The backbone stays frozen. Each batch holds a share of clean images and a share attacked by PGD on
the current prompts (APT, Li et al. 2024; TAPT, section 4.1).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

from tapt.attacks import AttackConfig, Classifier, attack_images
from tapt.backbone import Backbone, load_backbone
from tapt.data import LabelledImages, in_memory, load_data
from tapt.errors import InputError
from tapt.files import write_file
from tapt.images import to_float
from tapt.options import (
    DATA_HELP,
    DownloadBar,
    add_backbone_options,
    add_checkpoint_options,
    fraction,
)
from tapt.pack import Pack, base_model, save_pack
from tapt.processes import save_checkpoint, start_processes
from tapt.prompts import (
    ClassTexts,
    PromptConfig,
    Prompts,
    class_texts,
    image_logits,
    init_prompts,
)
from tapt.towers import encode_image
from tapt.tuning import TuneConfig
from tapt.views import random_view

CHECKPOINT, LOG = "prompts.ckpt", "train.jsonl"
MOST_HELD = 1000  # images that a few-shot run keeps for validation


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the published ones for full-size CLIP.

    epsilon, attack_steps: of the training attack, PGD with step size epsilon.
    clean_share: share of unattacked images in each batch; 1.0 makes clean-tuned prompts.
    shots: images per class, None for all.
    min_crop: smallest area of the random resized crops.
    validation: share held out of the training data to pick the best epoch.
    precision: `float32` or `bfloat16` (autocast; validation is float32 in any case).
    """

    epsilon: float = 1 / 255
    attack_steps: int = 2
    clean_share: float = 0.5
    shots: int | None = 16
    epochs: int = 100
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.0035
    min_crop: float = 0.08
    validation: float = 0.1
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("clean_share", 0.0, 1.0),
            ("min_crop", 0.01, 1.0),
            ("validation", 0.0, 0.5),
            ("lr", 0.0, 10.0),
        ):
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise InputError(f"{name} must be from {low} to {high}, got {value}.")
        if not 1 / 255 - 1e-9 <= self.epsilon <= 1:
            raise InputError(f"epsilon must be from 1/255 to 1, got {self.epsilon}.")
        for name in ("shots", "epochs", "batch_size", "attack_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.optimizer not in ("sgd", "adamw"):
            raise InputError(f"optimizer must be sgd or adamw, got {self.optimizer!r}.")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {self.precision!r}.")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Preprocessed images in memory: uint8 (N, 3, S, S) and their labels (N,)."""

    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def load_training_data(
    data: LabelledImages, backbone: Backbone, config: TrainConfig
) -> TrainingData:
    """Splits off the validation share and takes `shots` images per class, all by the seed."""
    held_count = round(len(data) * config.validation)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    held = data.subset(order[:held_count].tolist())
    rest = data.subset(order[held_count:].tolist())
    if config.shots is not None:
        rest = rest.balanced(config.shots * len(data.classes), config.seed)
        most = min(len(held), 4 * config.shots * len(data.classes), MOST_HELD)
        held = held.balanced(most, config.seed)
    empty = torch.empty(0, 3, backbone.image_size, backbone.image_size, dtype=torch.uint8)
    return TrainingData(
        data.classes,
        in_memory(rest, backbone.preprocess),
        torch.tensor(rest.labels),
        in_memory(held, backbone.preprocess) if len(held) else empty,
        torch.tensor(held.labels),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """images: augmented, (B, 3, S, S) in [0, 1]. labels: (B,).
    attacked: which images are attacked, (B,). start: of the attack, in [-1, 1] times epsilon.
    joint: images in the joint batch of all processes.
    """

    images: Tensor
    labels: Tensor
    attacked: Tensor
    start: Tensor
    joint: int


class Trainer:
    """Prompts, optimiser and position; every random draw depends on (seed, step) alone, so a
    resumed run continues as if it had not stopped."""

    def __init__(
        self,
        backbone: Backbone,
        prompt_config: PromptConfig,
        data: TrainingData,
        config: TrainConfig,
    ) -> None:
        self.backbone, self.data, self.config = backbone, data, config
        self.state = PartialState()
        start = init_prompts(backbone, prompt_config, seed=config.seed)
        self.prompts = start.map(lambda t: t.requires_grad_())
        self.texts: ClassTexts = class_texts(backbone, list(data.classes), prompt_config)
        self.steps_per_epoch = max(1, len(data.images) // config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        parameters = list(self.prompts.tensors.values())
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, lr=config.lr, momentum=0.9, weight_decay=5e-4
            )
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_score = -1.0

    def batch(self, step: int) -> Batch:
        """This process's part of a step's batch; the parts of all processes make up the batch
        that one process alone would draw."""
        epoch, position = divmod(step, self.steps_per_epoch)
        seed, size = self.config.seed * 1_000_003, self.config.batch_size
        shuffle = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(self.data.images), generator=shuffle)
        index = order[position * size : (position + 1) * size]
        draws = torch.Generator().manual_seed(seed + 7_919 * (step + 1))
        views = [
            random_view(to_float(image), draws, min_scale=self.config.min_crop)
            for image in self.data.images[index]
        ]
        images = torch.stack(views)
        start = torch.rand(images.shape, generator=draws) * 2 - 1
        attacked = torch.arange(len(index)) >= round(len(index) * self.config.clean_share)
        mine = slice(self.state.process_index, None, self.state.num_processes)
        parts = (images, self.data.labels[index], attacked, start)
        return Batch(*(part[mine].to(self.backbone.device) for part in parts), joint=len(index))

    def train_step(self) -> float:
        """One step on the joint batch of all processes; returns its loss."""
        config, batch = self.config, self.batch(self.step)
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        device = self.backbone.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            text = self.texts.features(self.backbone, self.prompts)
            images = self._attacked(batch, text.detach())
            features, _ = encode_image(self.backbone, images, self.prompts.visual())
        logits = image_logits(self.backbone, features.float(), text.float())
        loss = F.cross_entropy(logits, batch.labels, reduction="sum") / batch.joint
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for tensor in self.prompts.tensors.values():
            tensor.grad = reduce(tensor.grad, "sum")
        self.optimizer.step()
        self.step += 1
        return float(reduce(loss.detach(), "sum"))

    def _attacked(self, batch: Batch, text: Tensor) -> Tensor:
        """The images, the attacked share after PGD on the current prompts."""
        chosen = batch.attacked
        if not chosen.any():
            return batch.images
        clean, labels = batch.images[chosen], batch.labels[chosen]
        visual, epsilon = self.prompts.visual().detach(), self.config.epsilon
        images = (clean + epsilon * batch.start[chosen]).clamp(0, 1)
        for _ in range(self.config.attack_steps):
            images.requires_grad_()
            features, _ = encode_image(self.backbone, images, visual)
            logits = image_logits(self.backbone, features.float(), text.float())
            (gradient,) = torch.autograd.grad(
                F.cross_entropy(logits, labels, reduction="sum"), images
            )
            images = images.detach() + epsilon * gradient.sign()
            images = clean + (images - clean).clamp(-epsilon, epsilon)
            images = images.clamp(0, 1)
        result = batch.images.clone()
        result[chosen] = images
        return result

    def validate(self, limit: int = 500, epsilon: float | None = None) -> dict[str, float]:
        """Clean accuracy and accuracy under PGD-5 on held-out images.

        epsilon: default the training epsilon.
        """
        mine = slice(self.state.process_index, limit, self.state.num_processes)
        images, labels = self.data.held_images[mine], self.data.held_labels[mine]
        prompts = self.prompts.map(Tensor.detach)
        with torch.no_grad():
            text = self.texts.features(self.backbone, prompts)
        classifier = Classifier(self.backbone, text, prompts)
        attack = AttackConfig("pgd", epsilon or self.config.epsilon, 5)
        counts = torch.zeros(3, device=self.backbone.device)
        for pixels, label in zip(images.split(100), labels.split(100), strict=True):
            label = label.to(self.backbone.device)
            attacked = attack_images(classifier, pixels, label, attack)
            with torch.no_grad():
                right, robust = (
                    (_answers(classifier, x) == label).sum() for x in (pixels, attacked)
                )
            counts += torch.stack([right, robust, torch.tensor(len(label), device=right.device)])
        right, robust, count = reduce(counts, "sum").tolist()
        return {"clean_accuracy": right / count, "robust_accuracy": robust / count}

    def keep_best(self, scores: dict[str, float]) -> None:
        """Remembers the prompts with the best score: clean accuracy for clean-tuned prompts,
        otherwise the mean of clean and robust accuracy."""
        clean_only = self.config.clean_share == 1.0
        score = scores["clean_accuracy"]
        if not clean_only:
            score = (score + scores["robust_accuracy"]) / 2
        if score >= self.best_score:
            self.best_score = score
            self.best = {k: v.detach().clone() for k, v in self.prompts.tensors.items()}

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""
        state = {
            "prompts": {k: v.detach() for k, v in self.prompts.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_score": self.best_score,
            "settings": self._settings(),
        }
        save_checkpoint(state, path)

    def _settings(self) -> str:
        made = asdict(self.config), self.prompts.config.to_dict(), self.backbone.sha256
        return json.dumps([*made, self.data.classes])

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same settings."""
        state = torch.load(path, weights_only=True, map_location=self.backbone.device)
        if state["settings"] != self._settings():
            raise InputError(
                f"{path.name} was written with other settings; use them or start anew."
            )
        with torch.no_grad():
            for key, tensor in self.prompts.tensors.items():
                tensor.copy_(state["prompts"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_score = state["step"], state["best_score"]
        self.best = state["best"]


def _answers(classifier: Classifier, pixels: Tensor) -> Tensor:
    return classifier(to_float(pixels.to(classifier.backbone.device))).argmax(-1)


def training_rows(trainer: Trainer, checkpoint: Path, minutes: float) -> Iterator[dict]:
    """Trains to the end, yields one log row per epoch, and keeps the checkpoint fresh."""
    saved, spent = time.monotonic(), 0.0
    losses: list[float] = []
    scores: dict[str, float] = {}
    first = trainer.step
    main = trainer.state.is_main_process
    bar = tqdm(
        total=trainer.total, initial=first, unit="step", dynamic_ncols=True, disable=not main
    )
    while trainer.step < trainer.total:
        began = time.perf_counter()
        losses.append(trainer.train_step())
        spent += time.perf_counter() - began
        bar.update()
        told = {"loss": sum(losses[-50:]) / len(losses[-50:]), **scores}
        bar.set_postfix({name: f"{value:.3f}" for name, value in told.items()})
        if trainer.step % trainer.steps_per_epoch == 0:
            scores = trainer.validate() if len(trainer.data.held_images) else {}
            if scores:
                trainer.keep_best(scores)
            images = (trainer.step - first) * trainer.config.batch_size
            yield {
                "epoch": trainer.step // trainer.steps_per_epoch,
                "step": trainer.step,
                "loss": round(sum(losses) / len(losses), 4),
                **scores,
                "images_per_second": round(images / spent, 1),
            }
            losses = []
        if main and (
            trainer.step % trainer.steps_per_epoch == 0 or time.monotonic() - saved > 60 * minutes
        ):
            trainer.save(checkpoint)
            saved = time.monotonic()
    bar.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = TrainConfig()
    add_backbone_options(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts and log")
    parser.add_argument("--design", default="VLI", choices=("V", "VLI", "VLJ"))
    parser.add_argument("--tokens", type=int, default=2, help="prompt tokens per block")
    parser.add_argument("--depth", type=int, default=9, help="blocks with prompts, both towers")
    parser.add_argument("--text-depth", type=int, help="blocks with prompts in the text tower")
    parser.add_argument("--epsilon", type=fraction, default=default.epsilon)
    parser.add_argument("--attack-steps", type=int, default=default.attack_steps)
    parser.add_argument("--clean-share", type=float, default=default.clean_share)
    parser.add_argument("--shots", type=int, default=default.shots, help="per class; 0 for all")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--optimizer", default=default.optimizer, choices=("sgd", "adamw"))
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--min-crop", type=float, default=default.min_crop)
    parser.add_argument("--validation", type=float, default=default.validation)
    parser.add_argument("--precision", default=default.precision, choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=default.seed)
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    names = TrainConfig.__dataclass_fields__
    given = {k: v for k, v in vars(args).items() if k in names}
    config = TrainConfig(**{**given, "shots": args.shots or None})
    state = start_processes(args.device)
    backbone = load_backbone(
        args.backbone,
        revision=args.revision,
        device=args.device or state.device,
        token=None,
        progress=DownloadBar(),
    )
    prompt_config = PromptConfig(args.design, args.tokens, args.depth, args.text_depth)
    prompt_config.shapes(backbone)  # a wrong depth ends here, before the data is read
    data = load_training_data(load_data(args.data, "train"), backbone, config)
    trainer = Trainer(backbone, prompt_config, data, config)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / CHECKPOINT
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
    if state.is_main_process:
        _trim_log(args.out / LOG, trainer.step)
    for row in training_rows(trainer, checkpoint, args.checkpoint_minutes):
        if state.is_main_process:
            with open(args.out / LOG, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))
    if state.is_main_process:
        _write_prompts(trainer, args.out)
    return 0


def _trim_log(log: Path, step: int) -> None:
    """Drops rows that a resumed run will write again, and one that was cut short."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_file(log, "".join(line + "\n" for line in kept).encode())


def _write_prompts(trainer: Trainer, out: Path) -> None:
    prompts, data = trainer.prompts.map(Tensor.detach), trainer.data
    tensors = trainer.best or prompts.tensors
    training = {
        **asdict(trainer.config),
        "images": len(data.images),
        "classes": len(data.classes),
        "validation_images": len(data.held_images),
    }
    made = base_model(trainer.backbone)
    pack = Pack(Prompts(prompts.config, tensors), None, TuneConfig(), out.name, made, training)
    save_pack(pack, out)
    print(f"Prompts written to {out}.")
