"""What the READMEs show runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, python

from tapt.__main__ import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = ["README.md", "prompts/README.md", "tapt/evaluation/README.md", "tapt/ui/README.md"]


def test_it_is_short():
    assert len(README.encode()) <= 9000


def test_the_python_block():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    *table, top = python("-c", code).splitlines()
    assert table[0].split() == ["clean", "attacked"]
    assert re.match(r"\('frog', 0\.9\d+\)$", top)


def test_the_predict_command():
    (command,) = re.findall(r"python (-m tapt predict .*?)\n```", README, re.DOTALL)
    printed = python(*shlex.split(command.replace("\\\n", " ")))
    assert "Vanilla CLIP" in printed
    assert "measured L-inf 2/255" in printed


@pytest.mark.parametrize("place", PLACES)
def test_every_shown_command_is_understood(place: str, monkeypatch: pytest.MonkeyPatch):
    """By its parser alone: the work is left out."""
    text = (ROOT / place).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    called: list[str] = []
    for line in lines:
        found = re.match(r"(?:\S*python -m )?tapt ([\w-]+) (.*)", line)
        if found is None or found[1] == "demo":
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        module = f"tapt.commands.{found[1].replace('-', '_')}"
        monkeypatch.setattr(f"{module}.run", lambda args: called.append("run") or 0)
        assert main(shlex.split(line.partition("tapt ")[2], comments=True)) == 0, line
        assert called.pop() == "run"


@pytest.mark.parametrize("place", PLACES)
def test_every_named_file_exists(place: str):
    names = re.findall(r"\]\(([^)#:]+)\)", (ROOT / place).read_text(encoding="utf-8"))
    for name in names:
        assert (Path(ROOT / place).parent / name).exists(), name


def test_the_space_runs_the_gradio_that_requirements_ask_for():
    (version,) = re.findall(r"^sdk_version: (\d+)\.(\d+)", README, re.MULTILINE)
    major, minor = map(int, version)
    requirements = (ROOT / "requirements.txt").read_text()
    assert f"gradio>={major}.{minor},<{major + 1}" in requirements
