"""Imports point one way, and importing changes nothing of the program that imports."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import ROOT, python

ROWS = [  # what stands above may import what stands below, never its own row
    ["__main__"],
    ["ui", "commands"],
    ["evaluation", "training"],
    ["model"],
    ["comparison"],
    ["packs", "data", "defenses"],
    ["files", "processes", "running"],
    ["core"],
    ["progress"],
]
HEIGHT = {name: -row for row, names in enumerate(ROWS) for name in names}
HEAVY = ("gradio", "huggingface_hub", "accelerate", "matplotlib")


def part(module: str) -> str:
    """The part of the house that a module of the package belongs to."""
    return [*module.split("."), ""][1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            # `from tapt import core` imports a module
            names |= {f"{module}.{alias.name}" for alias in node.names if module == "tapt"}
            names.add(module)
    return {name for name in names if name.split(".")[0] == "tapt"}


def files() -> list[Path]:
    return sorted((ROOT / "tapt").rglob("*.py"))


def test_imports_point_down():
    wrong = []
    for path in files():
        own = part(module_of(path))
        for name in imported(path):
            other = part(name)
            if own in ("", other) or (name, other) == ("tapt", ""):
                continue  # the public names come from everywhere
            if other not in HEIGHT:
                continue  # a public name: `from tapt import load`, for app.py and examples
            if HEIGHT[other] >= HEIGHT[own]:
                wrong.append(f"{module_of(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_place():
    parts = {part(module_of(path)) for path in files()} - {""}
    assert parts <= set(HEIGHT), parts - set(HEIGHT)


def test_the_core_has_no_circles():
    graph = {module_of(p): imported(p) for p in files() if part(module_of(p)) == "core"}
    done: set[str] = set()
    while ready := {m for m in graph if m not in done and graph[m] & set(graph) <= done}:
        done |= ready
    assert set(graph) == done, set(graph) - done


def test_the_core_and_the_defences_load_nothing_heavy():
    modules = [module_of(p) for p in files() if part(module_of(p)) in ("core", "defenses")]
    assert len(modules) > 15
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    assert python("-c", code) == "[]\n"


def test_importing_changes_nothing_of_the_host():
    code = """
import inspect, logging, os, warnings
import huggingface_hub, torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

def state():
    simple = (str, int, float, bool, type(None), frozenset, tuple, list)
    client = {k: v for k, v in vars(_http).items() if inspect.isroutine(v) or "CLIENT" in k}
    return {
        "environment": dict(os.environ),
        "levels": {n: getattr(l, "level", None) for n, l in logging.root.manager.loggerDict.items()
                   if not n.startswith("tapt")},
        "root": (logging.root.level, list(logging.root.handlers)),
        "constants": {k: v for k, v in vars(constants).items() if isinstance(v, simple)},
        "client": client,
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
    }

before = state()
import tapt, tapt.model, tapt.packs.convert, tapt.packs.publish
after = state()
known = {name: after["levels"].get(name) for name in before["levels"]}
after["levels"] = known
print([key for key in before if before[key] != after[key]])
"""
    assert python("-c", code) == "[]\n"
