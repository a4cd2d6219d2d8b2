"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_python_block():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(first.splitlines()) <= 20
    printed = run("-c", first)
    assert "horse" in printed
    assert "tensor" in printed


def test_the_predict_command():
    (command,) = re.findall(r"python (-m tapt predict tapt/ui.*?)\n```", README, re.DOTALL)
    printed = run(*command.replace("\\\n", " ").split())
    assert "vanilla CLIP" in printed
    assert "measured L-inf 4/255" in printed


def test_every_named_file_exists():
    names = re.findall(r"\]\(([^)#:]+)\)", README)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_space_runs_the_gradio_that_requirements_ask_for():
    (version,) = re.findall(r"^sdk_version: (\d+)\.(\d+)", README, re.MULTILINE)
    major, minor = map(int, version)
    requirements = (ROOT / "requirements.txt").read_text()
    assert f"gradio>={major}.{minor},<{major + 1}" in requirements
