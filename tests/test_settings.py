"""Settings: one declaration, and one sentence for every value outside it."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError
from tapt.core.settings import STRICT, limits, plain_type, rule, sentence
from tapt.core.tuning import TuneConfig
from tapt.training.batches import TrainConfig

NAN, INF = float("nan"), float("inf")
WHOLE, NUMBER, BETAS = "a whole number from", "a number from", "two numbers from 0 to below 1"


@pytest.mark.parametrize(
    ("kind", "name", "value", "allowed"),
    [
        (TuneConfig, "views", 0, f"{WHOLE} 1 to 1024"),
        (TuneConfig, "views", True, f"{WHOLE} 1 to 1024"),
        (TuneConfig, "steps", "1", f"{WHOLE} 0 to 100"),
        (TuneConfig, "steps", 10**30, f"{WHOLE} 0 to 100"),
        (TuneConfig, "keep", NAN, f"{NUMBER} 0 to 1"),
        (TuneConfig, "lr", INF, f"{NUMBER} 0 to 10"),
        (TuneConfig, "lr", None, f"{NUMBER} 0 to 10"),
        (TuneConfig, "align_to", 1.5, f"{WHOLE} 0 to 1000"),
        (TuneConfig, "betas", 5, BETAS),
        (TuneConfig, "betas", (0.9,), BETAS),
        (Attack, "epsilon", 0.0039, f"{NUMBER} 1/255 to 1"),
        (Attack, "epsilon", "4", f"{NUMBER} 1/255 to 1"),
        (Attack, "step_size", 0.0, "a number above 0 and at most 1"),
        (Attack, "seed", 2**70, f"{WHOLE} 0 to 2147483647"),
        (Attack, "random_start", 1, "true or false"),
        (TrainConfig, "epsilon", 0.0, f"{NUMBER} 1/255 to 1"),
        (TrainConfig, "shots", -1, f"{WHOLE} 1 to 1,000,000, or 0 for all"),
        (TrainConfig, "clean_share", 2.0, f"{NUMBER} 0 to 1"),
    ],
)
def test_a_value_outside_its_range_is_one_sentence(kind, name: str, value: object, allowed: str):
    with pytest.raises(InputError) as error:
        kind(**{name: value})
    assert str(error.value) == f"{name} must be {allowed}, got {value!r}."


@pytest.mark.parametrize("pair", [(0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), ("a", "b")])
def test_a_fault_inside_a_value_is_one_of_the_value(pair: tuple):
    with pytest.raises(InputError, match=f"betas must be {BETAS}, got"):
        TuneConfig(betas=pair)


def test_long_values_are_cut():
    with pytest.raises(InputError) as error:
        TuneConfig(alignment_weight=10**400)
    assert len(str(error.value)) < 150


def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(InputError, match="vews is unknown; there are views, keep, steps, lr"):
        TuneConfig(vews=3)
    with pytest.raises(InputError, match="vews is unknown"):
        TuneConfig().updated(vews=3)
    with pytest.raises(InputError, match=r"attack must be one of pgd, apgd.*, got 'no-such'\.$"):
        Attack("no-such")


def test_values_come_by_name_or_in_their_order():
    assert Attack("cw", 1 / 255, 7) == Attack(name="cw", epsilon=1 / 255, steps=7)
    with pytest.raises(TypeError, match="given a value twice, or too many"):
        TuneConfig(8, views=9)
    with pytest.raises(TypeError, match="given a value twice, or too many"):
        Attack(*["pgd", *[None] * 6])


def test_settings_are_frozen_and_survive_json_and_updates():
    config = TuneConfig(steps=2, betas=[0.8, 0.9])
    assert config.betas == (0.8, 0.9)
    assert TuneConfig(**config.model_dump(mode="json")) == config
    assert config.updated(lr=None, steps=3) == TuneConfig(steps=3, betas=(0.8, 0.9))
    assert hash(config.updated()) == hash(config)
    with pytest.raises(InputError, match="steps must be"):
        config.updated(steps=-1)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    published = TuneConfig()
    assert (published.views, published.keep, published.steps, published.lr) == (64, 0.1, 1, 5e-4)
    assert (published.weight_decay, published.alignment_weight) == (0.01, 100.0)


class Inner(BaseModel):
    model_config = STRICT
    size: int = Field(ge=1)
    kind: Literal["a", "b"] = "a"
    share: float | None = Field(None, ge=0, lt=1)
    name: str = ""


class Outer(BaseModel):
    model_config = STRICT
    one: Inner
    rows: list[Inner] = []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "one is missing"),
        ({"one": {}}, "one.size is missing"),
        ({"one": {"size": 0}}, "one.size must be a whole number of at least 1, got 0"),
        ({"one": {"size": 1, "kind": "c"}}, "one.kind must be one of a, b, got 'c'"),
        ({"one": {"size": 1, "share": 1}}, "one.share must be a number from 0 to below 1, got 1"),
        ({"one": {"size": 1, "name": 5}}, "one.name must be text, got 5"),
        (
            {"one": {"size": 1}, "rows": [{"size": 1}, {"size": 1, "sise": 2}]},
            "rows[1].sise is unknown; there are size, kind, share, name",
        ),
        ({"one": {"size": 1}, "rows": [{"size": "2"}]}, "rows[0].size must be a whole number of"),
    ],
)
def test_places_in_nested_values_are_named(values: dict, expected: str):
    with pytest.raises(ValidationError) as error:
        Outer(**values)
    assert sentence(error.value, Outer).startswith(expected)


def test_options_and_fields_read_the_declaration():
    fields = TuneConfig.model_fields
    assert rule(fields["views"]) == "a whole number from 1 to 1024"
    assert limits(fields["views"]) == (1, 1024)
    assert limits(fields["betas"]) == (None, None)
    assert plain_type(fields["align_to"]) is int
    described = [*fields.values(), *Attack.model_fields.values()]
    assert all(field.description for field in described)
    assert {name: Attack(name).method for name in METHODS} == METHODS
