"""The published code's own numbers (tests/reference/README.md), met to their tolerances.

`TAPT_REFERENCE=/path/prefix` reads `prefix.json` and `prefix.safetensors` instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import reference_backbone
from safetensors.torch import load_file

from tapt.core.backbone import Backbone
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import PromptConfig, class_texts
from tapt.core.towers import encode_image
from tapt.core.tuning import TuneConfig, Tuned, tune
from tapt.packs.convert import from_research, research_names

PREFIX = os.environ.get("TAPT_REFERENCE") or str(Path(__file__).parent / "reference" / "reference")
SPEC = json.loads(Path(PREFIX + ".json").read_text())
ENTRIES = [key for key, value in SPEC.items() if isinstance(value, dict) and "design" in value]


def test_there_are_entries():
    assert ENTRIES, f"{PREFIX}.json has no entry with a design field"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return reference_backbone(tmp_path_factory.mktemp("reference"), SPEC)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(PREFIX + ".safetensors")


class Case:
    """One reference entry, ready to run."""

    def __init__(self, prefix: str, backbone: Backbone, tensors: dict[str, torch.Tensor]) -> None:
        spec = SPEC[prefix]
        self.expected = {
            k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
        }
        self.backbone, self.spec = backbone, spec
        self.config = PromptConfig(spec["design"], spec["n_ctx"], spec["depth"])
        start = {
            k.removeprefix("prompt."): v
            for k, v in self.expected.items()
            if k.startswith("prompt.")
        }
        self.prompts = from_research(start, self.config)
        self.texts = class_texts(backbone, spec["classes"], self.config)
        adversarial, clean = (
            TokenStatistics(self.expected[f"target.means{k}"], self.expected[f"target.vars{k}"])
            for k in ("", "_clean")
        )
        self.statistics = Statistics(adversarial, clean)
        self.settings = TuneConfig(
            views=spec["views"],
            keep=spec["keep"],
            steps=spec["steps"],
            lr=spec["lr"],
            alignment_weight=spec["align_weight"],
            alpha=spec["gamma"],
            align_from=spec["align_layers"][0],
            align_to=spec["align_layers"][1],
        )

    def tuned(self) -> Tuned:
        return tune(
            self.backbone,
            self.prompts,
            self.expected["views"][None],
            self.texts,
            statistics=self.statistics,
            config=self.settings,
        )


@pytest.fixture(scope="module", params=ENTRIES)
def case(request: pytest.FixtureRequest, backbone, tensors) -> Case:
    return Case(request.param, backbone, tensors)


@pytest.fixture(scope="module")
def result(case: Case) -> Tuned:
    return case.tuned()


def close(actual: torch.Tensor, expected: torch.Tensor, *, absolute=0.0, relative=0.0) -> None:
    torch.testing.assert_close(
        actual.reshape(expected.shape), expected, atol=absolute, rtol=relative
    )


def test_logits_and_selection(case: Case, result):
    close(result.view_logits[0], case.expected["logits"], absolute=2e-4)
    close(result.entropies[0], case.expected["entropy"], absolute=2e-4)
    assert set(result.kept[0].tolist()) == set(case.expected["selected"].long().tolist())


def test_token_statistics(case: Case):
    """Over all blocks, not only the aligned ones."""
    kept = case.expected["views"][case.expected["selected"].long()]
    _, hidden = encode_image(
        case.backbone, kept, case.prompts.visual(), hidden=range(case.backbone.visual_blocks)
    )
    stacked = torch.stack(hidden)  # (blocks, K, tokens, width)
    close(stacked.mean(1), case.expected["token_mean"], absolute=2e-4)
    close(stacked.var(1, unbiased=False), case.expected["token_var"], absolute=2e-4)


def test_losses(case: Case, result):
    before = result.before
    close(before.entropy, case.expected["multi_view_entropy"], relative=1e-4)
    close(before.adversarial, case.expected["align_adversarial"], relative=1e-4)
    close(before.clean, case.expected["align_clean"], relative=1e-4)
    close(before.total, case.expected["loss"], relative=1e-4)


def test_gradients(case: Case, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, torch.Tensor] = {}
    original = torch.optim.AdamW.step

    def spy(self, closure=None):
        if not seen:
            names = research_names(case.config)
            for (name, _), tensor in zip(
                names.items(), self.param_groups[0]["params"], strict=True
            ):
                seen[name] = tensor.grad[0].clone()
        return original(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    case.tuned()
    checked = 0
    for name, slices in research_names(case.config).items():
        for index, research in enumerate(slices):
            key = f"grad.{research}"
            if key not in case.expected:
                assert research in case.spec.get("unused", [])
                continue
            expected = case.expected[key]
            close(seen[name][index], expected, absolute=1e-3 * expected.abs().max().item())
            checked += 1
    assert checked


def test_tuned_prompts_and_prediction(case: Case, result):
    lr, steps = case.spec["lr"], case.spec["steps"]
    for name, slices in research_names(case.config).items():
        for index, research in enumerate(slices):
            actual, expected = (
                result.prompts.tensors[name][0, index],
                case.expected[f"tuned.{research}"],
            )
            # a step is lr * sign(gradient): where the gradient is about 0 the sign may flip
            assert (actual - expected).abs().max() <= 2.1 * lr * steps
            assert ((actual - expected).abs() < 0.05 * lr).float().mean() > 0.98, research
    close(result.logits, case.expected["tuned_logits"], absolute=2e-2)
