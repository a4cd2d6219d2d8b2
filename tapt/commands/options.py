"""Command-line options that several commands share, made of the settings classes."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.fields import FieldInfo

from tapt.commands.bars import download_bar
from tapt.core.attacks import METHODS, Attack
from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.prompts import PromptConfig
from tapt.core.settings import Settings, plain_type, rule
from tapt.data import LabelledImages, load_data
from tapt.defenses import all_defenses
from tapt.defenses.adaptive import Adaptive
from tapt.files import check_output
from tapt.model import Model, load
from tapt.packs.backbones import load_backbone, usable_device
from tapt.processes import start_processes
from tapt.training.batches import TrainConfig

if TYPE_CHECKING:
    from accelerate import PartialState

DATA_HELP = (
    "folder or zip of class folders, NAME:FOLDER, torchvision:NAME[:ROOT], split_zhou_*.json"
)
ATTACKED_HELP = "what the attack sees: clip, static, or deployed, a whole defence"


def fraction(text: str) -> float:
    """`4/255` or `0.0157` as a float."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under) if under else float(over)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4/255") from error


def fractions(text: str) -> list[float]:
    """A list of fractions, by commas."""
    return [fraction(part) for part in text.split(",")]


def filled(text: str) -> str:
    """A text that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def names(text: str) -> list[str]:
    """A list of names, by commas."""
    return [part.strip() for part in filled(text.strip(", ")).split(",") if part.strip()]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")


def add_settings(
    parser: argparse.ArgumentParser, kind: type[Settings], only: Iterable[str] | None = None
) -> None:
    """An option for each field, or for some; `given` reads them back."""
    for name in kind.model_fields if only is None else only:
        field = kind.model_fields[name]
        _add_option(parser, option_name(name, field), field, dest=name)


def given(args: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The settings that were given on the command line."""
    values = {name: getattr(args, name, None) for name in kind.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def option_name(name: str, field: FieldInfo) -> str:
    """`--tune-steps` for the field `steps` that says so, else the field's own name."""
    extra = field.json_schema_extra
    return f"--{extra.get('option', name) if isinstance(extra, dict) else name}".replace("_", "-")


def _add_option(
    parser: argparse._ActionsContainer,
    option: str,
    field: FieldInfo,
    *,
    dest: str,
    show_default: bool = True,
) -> None:
    kind, text, options = plain_type(field), field.description or "", dict[str, Any]()
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        options["choices"] = typing.get_args(kind)
    else:
        options["type"] = lambda text: value_of(field, text)
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}.get(kind, "X,X")
    if kind in (int, float):
        text += f", {rule(field)}"
    if show_default and field.default is not None and kind is not bool:
        text += f" (default {_shown(field.default)})"
    parser.add_argument(option, dest=dest, default=None, help=text.replace("%", "%%"), **options)


def _shown(value: Any) -> str:
    fraction = isinstance(value, float) and 0 < value < 0.1 and (value * 255).is_integer()
    return f"{value * 255:.0f}/255" if fraction else str(value)


def value_of(field: FieldInfo, text: str) -> Any:
    """A value as its field wants it; what cannot be read stays text, which the class refuses."""
    kind = plain_type(field)
    with suppress(ValueError, KeyError, argparse.ArgumentTypeError):
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            return tuple(fractions(text))
        if kind in (int, float):
            return int(text) if kind is int else fraction(text)
    return text


def add_test_time(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of the registered defences, last; what is not given comes from
    the pack."""
    group = parser.add_argument_group(
        "test-time settings", "for every defence that has them; default: the pack's own"
    )
    for option, field in _test_time().values():
        with suppress(argparse.ArgumentError):  # there already; the command's own leaves `--set`
            _add_option(group, option, field, dest=f"setting{option}", show_default=False)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="DEFENCE.NAME=VALUE",
        help="a setting of one defence alone, such as ensemble.keep=0.2",
    )


def test_time(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the test-time settings: `DEFENCE.NAME` to value. `InputError` where `--set`
    names no setting, or a value is outside its range."""
    known = _test_time()
    values = {key: getattr(args, f"setting{option}", None) for key, (option, _) in known.items()}
    changes = {key: value for key, value in values.items() if value is not None}
    for text in args.set:
        key, _, value = text.partition("=")
        if key not in known or not value:
            raise InputError(f"--set takes DEFENCE.NAME=VALUE of {', '.join(known)}; got {text!r}.")
        changes[key] = value_of(known[key][1], value)
    for row in all_defenses():  # a value that is out of range ends here, before any work
        own = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{row.name}.")}
        row.settings(**own)
    return changes


def _test_time() -> dict[str, tuple[str, FieldInfo]]:
    """Every setting of the registered defences, `DEFENCE.NAME`, with its option."""
    return {
        f"{row.name}.{name}": (option_name(name, field), field)
        for row in all_defenses()
        for name, field in row.settings.model_fields.items()
    }


def add_attack_options(parser: argparse.ArgumentParser, *fields: str) -> None:
    """These fields of an attack, queries, and the budget on a deployed defence."""
    add_settings(parser, Attack, only=fields)
    parser.add_argument("--queries", type=int, metavar="N", help="of Square, instead of --steps")
    add_settings(parser, Adaptive)


def attack_of(args: argparse.Namespace, name: str, **changes: Any) -> Attack:
    """The attack of this name with the command's options; `InputError` for one out of range."""
    values = {**given(args, Attack), "name": name, **changes}
    if name in METHODS and not METHODS[name].gradients and args.queries is not None:
        values["steps"] = args.queries
    return Attack(**values)


def add_training_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Backbone, data, folder, and whether to go on; `out` is the folder's help."""
    add_backbone_options(parser, default="small")
    parser.add_argument("--data", required=True, type=filled, help=DATA_HELP)
    parser.add_argument("--out", required=True, type=filled, help=out)
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Layout and training of prompts."""
    add_settings(parser, PromptConfig, only=("design", "tokens", "visual_depth", "text_depth"))
    add_settings(parser, TrainConfig)


def add_backbone_options(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Which backbone, and where it runs."""
    parser.add_argument(
        "--backbone", type=filled, default=default, help="small, ViT-B-16, hf-hub:owner/repo, ..."
    )
    parser.add_argument("--revision", type=filled, help="branch, tag or commit of a Hub backbone")
    parser.add_argument(
        "--device", type=filled, help="default: cuda, mps or cpu, the first that is there"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A backbone, a pack, or both."""
    add_backbone_options(parser, default=None)
    parser.add_argument(
        "--pack",
        type=filled,
        help="small/vli, a folder or a Hub id owner/repo; default: the backbone's own",
    )


def model_of(args: argparse.Namespace) -> Model:
    """The model that was asked for; says on stderr what came from the Hub."""
    asked = {"backbone": args.backbone, "revision": args.revision, "device": args.device}
    model = load(**asked, pack=args.pack, token=None, progress=download_bar())
    for what, origin in zip(("Backbone", "Pack"), model.origins, strict=True):
        if origin:
            print(f"{what} {origin}", file=sys.stderr)
    return model


def backbone_of(args: argparse.Namespace) -> Backbone:
    """The backbone alone."""
    options = {"revision": args.revision, "device": args.device}
    return load_backbone(args.backbone, **options, token=None, progress=download_bar())[0]


def join_processes(args: argparse.Namespace) -> PartialState:
    """Joins the processes of `accelerate launch`; without `--device`, each takes its own."""
    state = start_processes(args.device and usable_device(args.device))
    args.device = args.device or str(state.device)
    return state


def training_inputs(args: argparse.Namespace) -> tuple[PartialState, Backbone, LabelledImages]:
    """The joined processes, the backbone, and the training part of the data."""
    state = join_processes(args)
    return state, backbone_of(args), load_data(args.data, "train")


def png_output(name: str, option: str) -> Path:
    """The path of a PNG file, its folder made where it is missing; `InputError` for another ending,
    or where it cannot be written."""
    path = Path(name)
    if path.suffix.lower() != ".png":
        raise InputError(f"{option} writes a PNG: end its name in .png, got {name!r}.")
    if not path.parent.exists():
        check_output(path.parent, folder=True).mkdir(parents=True, exist_ok=True)
    return check_output(path)
