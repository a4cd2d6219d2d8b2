"""Trains the embedded CLIP models and writes them as open_clip folders.

    python train_backbone.py --model tiny --data cifar10-train.zip --out backbone --work run
    python train_backbone.py --model small --data tiny-imagenet-train.zip cifar10-train.zip \
        --words tiny-imagenet.json --teacher --out backbone --work run
    python train_backbone.py --score backbone --data tiny-imagenet-dev.zip

The work folder keeps the teacher's features and a checkpoint every few minutes; `--resume` goes on
exactly where it ends, and `--export` writes the weights of that checkpoint. Block matrices
are trained by Muon, everything else by AdamW. Each image is told apart from all names the model
knows, its own name drawn from the fine name, its synonyms and everyday words; other true names of
it do not count as wrong. The first of the data sets is seen whole in every epoch, of the others a
random part. An optional teacher, an ImageNet classifier, gives soft answers and features.
"""

from __future__ import annotations

import argparse
import sys
import time
from copy import deepcopy
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from backbone.images import at_size, augment, load_pool, normalize
from backbone.kept import log, save_aside
from backbone.model import PRESETS, Preset, Stage, encode_image, export, plain_attention
from backbone.muon import Muon
from backbone.teacher import NEVER, Teacher, teacher_loss
from backbone.words import MAIN_TEMPLATE, Vocabulary, load_kinds

from tapt.data import load_data
from tapt.data.images import Pixels
from tapt.evaluation.outcomes import wilson
from tapt.packs.backbones import load_backbone


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, preset: Preset, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.model = open_clip.CLIP(**preset.config["model_cfg"]).to(device)
        self.to_teacher = nn.Linear(preset.width, 1280).to(device)
        if args.init:
            self.model.load_state_dict(load_file(args.init / "open_clip_model.safetensors"))
        self.average = deepcopy(self.model).requires_grad_(False).eval()
        matrices, rest = [], [*self.to_teacher.parameters()]
        for name, parameter in self.model.named_parameters():
            inner = "resblocks" in name and parameter.ndim == 2
            (matrices if inner else rest).append(parameter)
        adamw = torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
        self.optimizers = [Muon(matrices, lr=args.muon_lr), adamw]
        self.rates = (args.muon_lr, args.lr)
        self.step = 0

    def weights(self, which: str) -> nn.Module:
        """The model with the `average` weights or the `last` ones."""
        return self.average if which == "average" else self.model

    @property
    def modules(self) -> list:
        return [self.model, self.average, self.to_teacher, *self.optimizers]

    def save(self, path: Path) -> None:
        states = [module.state_dict() for module in self.modules]
        save_aside({"states": states, "step": self.step}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for module, state in zip(self.modules, saved["states"], strict=True):
            module.load_state_dict(state)
        self.step = saved["step"]

    def update(self, loss: Tensor, factor: float) -> None:
        """A step of both optimizers and of the average."""
        loss.backward()
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            for mean, parameter in pairs:
                mean.lerp_(parameter, 1 - decay)


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over 2 %, then linear decay to zero."""
    warmup = max(1, total // 50)
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup), 1.0)


def caption_loss(scores: Tensor, labels: Tensor, words: Vocabulary, generator) -> Tensor:
    """Cross-entropy of one drawn name per image against every word that is not true of it, with
    label smoothing of 0.1."""
    drawn = torch.multinomial(words.chance[labels], 1, generator=generator).to(scores.device)
    skipped = words.true[labels.to(scores.device)].scatter(1, drawn, False)
    log_p = scores.masked_fill(skipped, NEVER).log_softmax(1)
    even = -log_p.masked_fill(skipped, 0).sum(1) / (~skipped).sum(1)
    return (0.9 * -log_p.gather(1, drawn)[:, 0] + 0.1 * even).mean()


class Trainer:
    """The pass from images to a loss, and the measurement in between."""

    def __init__(self, args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
        self.args, self.preset, self.device = args, preset, device
        self.pool = load_pool(args, preset.size)
        self.words = Vocabulary(self.pool.kinds, device)
        self.teacher = Teacher(self.pool, args.work) if args.teacher else None
        self.bfloat16 = args.precision == "bfloat16" or (
            args.precision == "auto" and fast_bfloat16(device)
        )

    def stage(self, progress: float) -> Stage:
        """The stage at this share of the schedule."""
        for stage in self.preset.stages:
            if progress < stage.share:
                return stage
            progress -= stage.share
        return self.preset.stages[-1]

    def loss(self, run: Run, index: Tensor, stage: Stage) -> Tensor:
        """Of one batch; all that is random in it follows from the step's number."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.args.seed + 7) + run.step)
        labels = self.pool.labels[index]
        images = self.pool.images[index].to(self.device).float() / 255
        images, mirrored = augment(images, self.preset.area, generator)
        images = normalize(at_size(images, stage.size))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            text = run.model.encode_text(self.words.draw(generator))
            image, patches = encode_image(run.model.visual, images, stage.keep, generator)
            features = run.to_teacher(patches)
        scale = run.model.logit_scale.clamp(max=4.6052).exp()
        scores = scale * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
        loss = caption_loss(scores, labels, self.words, generator)
        if self.teacher:
            answers = self.teacher.logits[index, mirrored].to(self.device).float()
            targets = self.teacher.features[index, mirrored].to(self.device).float()
            loss += teacher_loss(scores[:, self.words.main], features.float(), answers, targets)
        return loss

    @torch.no_grad()
    def measure(self, model: nn.Module, size: int) -> dict:
        """Accuracy on the held-out images of each data set among its own names."""
        texts = self.words.tokens[self.words.main, 0]
        text = F.normalize(model.encode_text(texts), dim=-1)
        row = {}
        for source, path in enumerate(self.args.data):
            index = (self.pool.held & (self.pool.sources == source)).nonzero()[:, 0]
            scores = []
            for part in index.split(250):
                images = at_size(self.pool.images[part].to(self.device).float() / 255, size)
                image = encode_image(model.visual, normalize(images))[0]
                scores.append((F.normalize(image, dim=-1) @ text.T).cpu())
            columns = (self.pool.kind_sources == source).nonzero()[:, 0]
            labels = self.pool.labels[index] - columns[0]
            row[Path(path).stem] = accuracies(torch.cat(scores)[:, columns], labels)
        return row


def accuracies(scores: Tensor, labels: Tensor) -> dict:
    """Top-1 over all names, and among the true name and nine others drawn at random."""
    n = len(labels)
    draw = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    asked = draw.scatter(1, labels[:, None], 2.0).topk(min(10, scores.shape[1])).indices
    among = scores.gather(1, asked).argmax(1) == 0  # the true name is drawn first
    top = scores.argmax(1) == labels
    row = {"n": n, "names": scores.shape[1]}
    for name, right in (("top1", int(top.sum())), ("among_ten", int(among.sum()))):
        row |= {name: round(right / n, 4), f"{name}_ci95": [round(x, 4) for x in wilson(right, n)]}
    return row


def train(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """All epochs, with a checkpoint every few minutes, then the export."""
    run, path = Run(preset, args, device), args.work / "checkpoint.pt"
    if path.exists() and not args.resume:
        sys.exit(f"{path} exists: give --resume to go on, or another --work.")
    trainer = Trainer(args, preset, device)
    if path.exists():
        run.load(path)
    per_epoch = len(trainer.pool.epoch(args.seed, 0, args.others_per_epoch)) // args.batch_size
    total, saved, seen, losses = args.epochs * per_epoch, time.time(), 0, []
    while run.step < total:
        epoch, position = divmod(run.step, per_epoch)
        order = trainer.pool.epoch(args.seed, epoch, args.others_per_epoch)
        for index in order.split(args.batch_size)[position:per_epoch]:
            stage = trainer.stage(run.step / total)
            loss = trainer.loss(run, index, stage)
            run.update(loss, learning_rate_factor(run.step, total))
            losses.append(loss.item())
            seen += len(index)
            if time.time() - saved > 60 * args.minutes or run.step == args.stop:
                run.save(path)
                rate, mean = seen / (time.time() - saved), sum(losses) / len(losses)
                log(step=run.step, of=total, size=stage.size, loss=mean, images_per_second=rate)
                saved, seen, losses = time.time(), 0, []
            if run.step == args.stop:
                return
        for which in ("average", "last"):
            held_out = trainer.measure(run.weights(which), stage.size)
            log(epoch=epoch + 1, of=args.epochs, weights=which, held_out=held_out)
    run.save(path)
    export(run.weights(args.weights), preset, trainer.pool.kinds, args.out)


def score(folder: Path, source: str) -> None:
    """Prints accuracy of a finished model on a data set, under its folder names."""
    (backbone, _), data = load_backbone(f"local-dir:{folder}"), load_data(source)
    sentences = [MAIN_TEMPLATE.format(name.replace("_", " ")) for name in data.classes]
    images, scores = Pixels(data, backbone.preprocess).batch(range(len(data))), []
    with torch.no_grad():
        text = backbone.model.encode_text(backbone.tokenize(sentences, cut=False), normalize=True)
        for batch in images.split(250):
            pixels = backbone.normalize(batch.to(backbone.device).float() / 255)
            image = backbone.model.encode_image(pixels, normalize=True)
            scores.append((image @ text.T).float().cpu())
    log(data=source, **accuracies(torch.cat(scores), torch.tensor(data.labels)))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself."""
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" or cpu


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=PRESETS, default="small")
    add("--data", nargs="+", required=True, help="folders or zips of classes, the main one first")
    add("--words", type=Path, help="JSON of names and everyday words by class")
    add("--out", type=Path, help="the open_clip folder to write")
    add("--work", type=Path, default=Path("backbone-run"), help="checkpoint, teacher's features")
    add("--teacher", action="store_true", help="learn from an ImageNet classifier too")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--export", action="store_true", help="write --out from the checkpoint; train nothing")
    add("--weights", choices=("average", "last"), default="average", help="that --out gets")
    add("--score", type=Path, metavar="FOLDER", help="measure this model on --data; train nothing")
    add("--init", type=Path, help="start from the weights in this folder")
    add("--epochs", type=int, help="of the whole schedule")
    add("--others", type=int, default=30_000, help="images used of each other data set")
    add("--others-per-epoch", type=int, default=20_000, help="images of them all in an epoch")
    add("--validation", type=int, default=2000, help="images of the main data set held out")
    add("--batch-size", type=int, default=256)
    add("--lr", type=float, default=1.5e-3)
    add("--muon-lr", type=float, default=0.012)
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=4, help="between checkpoints")
    add("--stop", type=int, help="save and stop after this step")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    preset, device = PRESETS[args.model], torch.device(args.device)
    args.epochs = args.epochs or preset.epochs
    if args.score:
        return score(args.score, args.data[0])
    if not args.out:
        sys.exit("--out: the folder to write is missing.")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        run = Run(preset, args, device)
        run.load(args.work / "checkpoint.pt")
        kinds = load_kinds([load_data(path, "train") for path in args.data], args.words)
        return export(run.weights(args.weights), preset, kinds, args.out)
    if device.type == "cpu":
        F.scaled_dot_product_attention = plain_attention
    train(args, preset, device)


if __name__ == "__main__":
    main()
