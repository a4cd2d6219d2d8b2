"""What the classes are called: names, synonyms, everyday words, and sentences of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from tapt.data.images import LabelledImages

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

FIRST = [  # in the list of what a model knows: what a page begins with
    "cat",
    "dog",
    "horse",
    "bird",
    "deer",
    "frog",
    "airplane",
    "automobile",
    "truck",
    "ship",
    "banana",
    "orange",
    "pizza",
    "mushroom",
    "espresso",
    "teapot",
    "umbrella",
    "sunglasses",
    "backpack",
    "sandal",
]


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
