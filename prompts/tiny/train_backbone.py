"""Trains the embedded CLIP on CIFAR-10 and writes it as an open_clip folder.

    python prompts/tiny/train_backbone.py --data cifar10-train.zip --out prompts/tiny/backbone
    python prompts/tiny/train_backbone.py --data cifar10-test.zip --score prompts/tiny/backbone

Images go in by patch dropout (Li et al., "Scaling Language-Image Pre-training via Masking", 2023)
and random crops; captions are drawn at every step from templates and everyday synonyms. Block
matrices are trained by Muon, everything else by AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from safetensors.torch import load_file, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.backbone import load_backbone
from tapt.data import LabelledImages, in_memory, load_data
from tapt.files import write_file
from tapt.images import to_float, to_uint8
from tapt.prompts import class_texts, logits
from tapt.report import wilson

CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 4,
            "width": 192,
            "layers": 6,
            "head_width": 64,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 3,
        },
    },
    "preprocess_cfg": {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
NAMES = {
    "airplane": ["airplane", "plane", "aeroplane", "jet", "aircraft", "airliner", "jumbo jet"],
    "automobile": ["automobile", "car", "sports car", "sedan", "motor car", "racing car"],
    "bird": ["bird", "songbird", "sparrow", "little bird", "ostrich"],
    "cat": ["cat", "kitten", "kitty", "tabby cat", "house cat"],
    "deer": ["deer", "doe", "stag", "fawn", "elk", "reindeer"],
    "dog": ["dog", "puppy", "doggy", "hound", "pup"],
    "frog": ["frog", "toad", "tree frog", "bullfrog"],
    "horse": ["horse", "pony", "stallion", "mare", "foal"],
    "ship": ["ship", "boat", "vessel", "ferry", "ocean liner", "yacht", "cargo ship"],
    "truck": ["truck", "lorry", "fire truck", "fire engine", "pickup truck", "dump truck"],
}
EVERYDAY = {
    "airplane": "plane",
    "automobile": "car",
    "cat": "kitten",
    "dog": "puppy",
    "frog": "toad",
    "horse": "pony",
    "ship": "boat",
    "truck": "lorry",
}
MAIN_TEMPLATE = "a photo of a {}."
TEMPLATES = [
    "{}",
    "a {}.",
    "an image of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a blurry photo of a {}.",
    "a small photo of a {}.",
    "a close-up photo of a {}.",
]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask=None, *_, **__) -> Tensor:
    """Attention in steps: on a processor, the fused kernel's backward pass through bfloat16 takes
    five times as long for so few tokens."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


F.scaled_dot_product_attention = plain_attention


def caption_tokens(tokenizer) -> list[dict[str, Tensor]]:
    """Per class, tokens of every caption: `main` for MAIN_TEMPLATE, `other` for the rest."""
    rows = []
    for names in NAMES.values():
        main = tokenizer([MAIN_TEMPLATE.format(n) for n in names])
        other = tokenizer([t.format(n) for t in TEMPLATES for n in names])
        rows.append({"main": main, "other": other, "plain": main[:1]})
    return rows


def draw_captions(rows: list[dict[str, Tensor]], generator: torch.Generator) -> Tensor:
    """One caption per class, half of them in the main template, (classes, context)."""
    picks = []
    for row in rows:
        kind = "main" if torch.rand((), generator=generator) < 0.5 else "other"
        pick = torch.randint(len(row[kind]), (), generator=generator)
        picks.append(row[kind][pick])
    return torch.stack(picks)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts, crops, flips and relights a batch, (B, 3, 32, 32) in [0, 1].

    Half of the batch moves by whole pixels and stays sharp; the other half is zoomed.
    """
    n, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    zoomed = uniform(0, 1) < 0.5
    scale = torch.where(zoomed, uniform(0.2, 1.0).sqrt(), torch.ones(n))
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1)  # (B, 2)
    whole = (shift * 4).round() * 2 / size
    shift = torch.where(zoomed[:, None], shift * (1 - scale + 0.1)[:, None], whole)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, bias = uniform(0.8, 1.2), uniform(-0.1, 0.1)
    return (images * gain[:, None, None, None] + bias[:, None, None, None]).clamp(0, 1)


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        block_matrix = "resblocks" in name and parameter.ndim == 2
        (matrices if block_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup), 1.0)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, texts: Tensor, normalize) -> float:
    model.eval()
    text = model.encode_text(texts, normalize=True)
    right = 0
    for batch, label in zip(images.split(500), labels.split(500), strict=True):
        features = model.encode_image(normalize(batch.float() / 255), normalize=True)
        right += int(((features @ text.T).argmax(1) == label).sum())
    model.train()
    return right / len(images)


def score(folder: Path, data: LabelledImages) -> None:
    """Prints clean accuracy in the main template, under the plain names and under one everyday
    synonym of each."""
    backbone = load_backbone(f"local-dir:{folder}")
    labels = torch.tensor(data.labels)
    images = in_memory(data, backbone.preprocess)
    for names in (list(NAMES), [EVERYDAY.get(name, name) for name in NAMES]):
        text = class_texts(backbone, names, template=MAIN_TEMPLATE).fixed
        right = 0
        for batch, label in zip(images.split(250), labels.split(250), strict=True):
            with torch.no_grad():
                told = logits(backbone, to_float(batch), text).argmax(-1)
            right += int((told == label).sum())
        row = {"names": names, "n": len(data), "accuracy": right / len(data)}
        print(json.dumps({**row, "ci95": wilson(right, len(data))}))


def export(model: nn.Module, out: Path) -> None:
    """Config and float16 weights; each file is written aside, then renamed."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    write_file(out / "open_clip_model.safetensors", save(weights))
    write_file(out / "open_clip_config.json", (json.dumps(CONFIG, indent=2) + "\n").encode())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder or zip of classes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "backbone")
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny-backbone.ckpt"))
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--init", type=Path, help="start from the weights in this folder")
    parser.add_argument(
        "--score", type=Path, help="measure the backbone in this folder on --data; trains nothing"
    )
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--full-epochs", type=int, default=2, help="last epochs without dropout")
    parser.add_argument("--patch-dropout", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--validation", type=int, default=1000, help="images held out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    data = load_data(args.data, "train")
    if list(data.classes) != list(NAMES):
        sys.exit(f"--data: the class folders must be {', '.join(NAMES)}.")
    if args.score:
        return score(args.score, data)
    images, labels = in_memory(data, to_uint8), torch.tensor(data.labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    held, kept = order[: args.validation], order[args.validation :]

    model = open_clip.CLIP(**CONFIG["model_cfg"])
    if args.init:
        model.load_state_dict(load_file(args.init / "open_clip_model.safetensors"))
    tokenizer = open_clip.SimpleTokenizer(
        context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )
    captions = caption_tokens(tokenizer)
    plain = torch.cat([row["plain"] for row in captions])
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]

    def normalize(x: Tensor) -> Tensor:
        return (x - mean) / std

    opts = optimizers(model, args)
    base_lrs = [group["lr"] for opt in opts for group in opt.param_groups]
    generator = torch.Generator().manual_seed(args.seed + 1)
    start = 0
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, opt_state in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        start = state["epoch"]

    steps = len(kept) // args.batch_size
    model.train()
    for epoch in range(start, args.epochs):
        full = epoch >= args.epochs - args.full_epochs
        model.visual.patch_dropout = nn.Identity() if full else PatchDropout(args.patch_dropout)
        began, total_loss = time.time(), 0.0
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        for step in range(steps):
            factor = learning_rate_factor(
                epoch * steps + step, args.epochs * steps, warmup=steps // 2
            )
            for lr, group in zip(
                base_lrs, (g for opt in opts for g in opt.param_groups), strict=True
            ):
                group["lr"] = lr * factor
            index = shuffled[step * args.batch_size : (step + 1) * args.batch_size]
            batch = normalize(augment(images[index].float() / 255, generator))
            with torch.autocast("cpu", torch.bfloat16):
                text = model.encode_text(draw_captions(captions, generator))
                image = model.encode_image(batch)
            scale = model.logit_scale.clamp(max=4.6052).exp()
            scores = scale * F.normalize(image.float(), dim=-1) @ F.normalize(text.float()).T
            loss = F.cross_entropy(scores, labels[index], label_smoothing=0.1)
            loss.backward()
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            total_loss += loss.item()
        row = {
            "epoch": epoch + 1,
            "loss": round(total_loss / steps, 4),
            "validation_accuracy": accuracy(model, images[held], labels[held], plain, normalize),
            "images_per_second": round(steps * args.batch_size / (time.time() - began), 1),
        }
        print(json.dumps(row), flush=True)
        state = {
            "model": model.state_dict(),
            "optimizers": [opt.state_dict() for opt in opts],
            "generator": generator.get_state(),
            "rng": torch.get_rng_state(),
            "epoch": epoch + 1,
        }
        temporary = args.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, args.checkpoint)
    export(model, args.out)


if __name__ == "__main__":
    main()
