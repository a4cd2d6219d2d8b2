"""Adversarial prompt tuning: makes the static prompts that every image starts from.

The backbone stays frozen. Each batch holds a share of clean images and a share attacked by PGD on
the current prompts (APT, Li et al. 2024; TAPT, section 4.1).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tapt.core.attacks import Attack, attack_images
from tapt.core.backbone import Backbone
from tapt.core.clip import FixedClassifier
from tapt.core.images import to_float
from tapt.core.prompts import PromptConfig, Prompts, class_texts, image_logits, init_prompts
from tapt.core.towers import encode_image
from tapt.data import LabelledImages
from tapt.files import check_output, json_lines, write_file
from tapt.packs.format import Pack, base_model, save_pack
from tapt.processes import start_processes, total
from tapt.training.batches import (
    Batch,
    TrainConfig,
    TrainingData,
    draw_batch,
    split_data,
    steps_per_epoch,
)
from tapt.training.checkpoints import Checkpoint

CHECKPOINT, LOG = "prompts.ckpt", "train.jsonl"
VALIDATED, CHUNK = 500, 100  # held-out images that an epoch is judged by, and per pass


def train(
    backbone: Backbone,
    data: LabelledImages,
    prompt_config: PromptConfig,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Pack:
    """Trains prompts and writes them into a folder, with a log of one row per epoch.

    data: the training part; the validation share is taken from it.
    out: the folder; with several processes, all of them see it.
    resume: go on from the folder's checkpoint, where there is one.
    on_epoch: called with every row of the log, on the main process.

    Raises `InputError` for settings that do not fit the backbone or the checkpoint and an output
    that cannot be written, `DataError` for an image that cannot be read.
    """
    out = check_output(out, folder=True)
    start_processes(backbone.device)
    prompt_config.shapes(backbone.architecture)
    trainer = Trainer(backbone, prompt_config, split_data(data, backbone, config), config)
    checkpoint = Checkpoint(out / CHECKPOINT, resume)
    if state := checkpoint.load(trainer.inputs(), backbone.device):
        trainer.restore(state)
    out.mkdir(parents=True, exist_ok=True)
    main = trainer.state.is_main_process
    if main:
        _trim_log(out / LOG, trainer.step)
    for row in training_rows(trainer, checkpoint):
        if main:
            with open(out / LOG, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            on_epoch(row)
    pack = trainer.pack(out.name)
    if main:
        save_pack(pack, out)
    trainer.state.wait_for_everyone()
    return pack


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
        self.state = start_processes(backbone.device)
        start = init_prompts(backbone, prompt_config, seed=config.seed)
        self.prompts = start.map(lambda t: t.requires_grad_())
        self.texts = class_texts(backbone, data.classes, prompt_config)
        self.steps_per_epoch = steps_per_epoch(data, config)
        self.total = self.steps_per_epoch * config.epochs
        parameters = list(self.prompts.tensors.values())
        sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
        adamw = partial(torch.optim.AdamW, weight_decay=0.01)
        optimizer = sgd if config.optimizer == "sgd" else adamw
        self.optimizer: torch.optim.Optimizer = optimizer(parameters, lr=config.lr)
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_score = -1.0

    def train_step(self) -> float:
        """One step on the joint batch of all processes; returns its loss."""
        config, state, device = self.config, self.state, self.backbone.device
        place = state.process_index, state.num_processes
        batch = draw_batch(self.data, config, self.backbone.image_size, self.step, *place)
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        labels, images = batch.labels.to(device), batch.images.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            text = self.texts.features(self.backbone, self.prompts)
            images = self._attacked(batch, images, labels, text.detach())
            features, _ = encode_image(self.backbone, images, self.prompts.visual())
        logits = image_logits(self.backbone, features.float(), text.float())
        loss = F.cross_entropy(logits, labels, reduction="sum") / batch.joint
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for tensor in self.prompts.tensors.values():
            if tensor.grad is not None:
                tensor.grad = total(tensor.grad)
        self.optimizer.step()
        self.step += 1
        return float(total(loss.detach()))

    def _attacked(self, batch: Batch, images: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        """The images, the attacked share after PGD on the current prompts."""
        chosen = batch.attacked.to(images.device)
        if not chosen.any():
            return images
        clean, labels = images[chosen], labels[chosen]
        visual, epsilon = self.prompts.visual().detach(), self.config.epsilon
        start = batch.start.to(images.device)[chosen]
        moved = (clean + epsilon * start).clamp(0, 1)
        for _ in range(self.config.attack_steps):
            moved.requires_grad_()
            features, _ = encode_image(self.backbone, moved, visual)
            logits = image_logits(self.backbone, features.float(), text.float())
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + epsilon * gradient.sign()
            moved = clean + (moved - clean).clamp(-epsilon, epsilon)
            moved = moved.clamp(0, 1)
        result = images.clone()
        result[chosen] = moved
        return result

    def validate(self) -> dict[str, float]:
        """Clean accuracy and accuracy under PGD-5 at the training epsilon, on held-out images."""
        count = min(VALIDATED, len(self.data.held_out))
        own = range(self.state.process_index, count, self.state.num_processes)
        prompts = self.prompts.map(Tensor.detach)
        with torch.no_grad():
            text = self.texts.features(self.backbone, prompts)
        classifier = FixedClassifier(self.backbone, text, prompts)
        attack = Attack("pgd", self.config.epsilon, steps=5, seed=self.config.seed)
        counts = torch.zeros(2, device=self.backbone.device)
        for chunk in (own[i : i + CHUNK] for i in range(0, len(own), CHUNK)):
            pixels = self.data.held_out.batch(chunk).to(self.backbone.device)
            labels = self.data.held_out_labels[list(chunk)].to(self.backbone.device)
            attacked = attack_images(classifier, pixels, labels, attack, images=chunk)
            with torch.no_grad():
                answers = [classifier(to_float(x)).argmax(-1) for x in (pixels, attacked)]
            counts += torch.stack([(answer == labels).sum() for answer in answers])
        right, robust = total(counts).tolist()
        return {"clean_accuracy": right / count, "robust_accuracy": robust / count}

    def keep_best(self, scores: dict[str, float]) -> None:
        """Remembers the prompts with the best score: clean accuracy for clean-tuned prompts,
        otherwise the mean of clean and robust accuracy."""
        score = scores["clean_accuracy"]
        if self.config.clean_share != 1.0:
            score = (score + scores["robust_accuracy"]) / 2
        if score >= self.best_score:
            self.best_score = score
            self.best = {k: v.detach().clone() for k, v in self.prompts.tensors.items()}

    def pack(self, name: str) -> Pack:
        """The best prompts, or the last ones where nothing was held out."""
        tensors = self.best or self.prompts.map(Tensor.detach).tensors
        prompts = Prompts(self.prompts.config, tensors)
        training = {
            **self.config.model_dump(),
            "images": len(self.data.images),
            "classes": len(self.data.classes),
            "validation_images": len(self.data.held_out),
        }
        return Pack(prompts, None, {}, name, base_model(self.backbone), training)

    def snapshot(self) -> dict[str, Any]:
        """What a run goes on from."""
        return {
            "prompts": {k: v.detach() for k, v in self.prompts.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_score": self.best_score,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `snapshot` of the same inputs."""
        with torch.no_grad():
            for key, tensor in self.prompts.tensors.items():
                tensor.copy_(state["prompts"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_score = state["step"], state["best_score"]
        self.best = state["best"]

    def inputs(self) -> str:
        """What runs must have in common to go on from each other's snapshots."""
        configs = self.config.model_dump(), self.prompts.config.model_dump()
        return json.dumps([*configs, self.backbone.sha256, self.data.classes])


def training_rows(trainer: Trainer, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Trains to the end, yields one log row per epoch, and keeps the checkpoint fresh."""
    spent = 0.0
    losses: list[float] = []
    scores: dict[str, float] = {}
    first, main = trainer.step, trainer.state.is_main_process
    bar = tqdm(
        total=trainer.total, initial=first, unit="step", dynamic_ncols=True, disable=not main
    )
    while trainer.step < trainer.total:
        began = time.perf_counter()
        losses.append(trainer.train_step())
        spent += time.perf_counter() - began
        bar.update()
        shown = {"loss": sum(losses[-50:]) / len(losses[-50:]), **scores}
        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        complete = trainer.step % trainer.steps_per_epoch == 0
        if complete:
            scores = trainer.validate() if len(trainer.data.held_out) else {}
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
        if main and (complete or checkpoint.is_due()):
            checkpoint.save(trainer.inputs(), trainer.snapshot())
    bar.close()


def _trim_log(log: Path, step: int) -> None:
    """Drops rows that a resumed run will write again, and one that was cut short."""
    kept = [row for row in json_lines(log) if row.get("step", step + 1) <= step]
    write_file(log, "".join(json.dumps(row) + "\n" for row in kept).encode())
