"""The package from outside: public names, imports, and a wheel in an empty folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, python, serving

import tapt

PICTURE = "tapt/examples/tuxpaint-gpl2/horse.png"
LATE = ["accelerate", "gradio", "huggingface_hub", "matplotlib"]
LATE += ["numpy", "open_clip", "pydantic", "torch"]


def test_public_names():
    assert {name for name in tapt.__all__ if getattr(tapt, name).__doc__} == set(tapt.__all__)
    assert set(tapt.__all__) <= set(dir(tapt))
    assert tapt.list_packs() == ["small/vli", "tiny/v", "tiny/vli", "tiny/vlj"]
    assert tapt.list_defenses()[:4] == ["clip", "static", "ensemble", "tapt"]
    assert "pgd" in tapt.list_attacks()
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        tapt.lod  # noqa: B018


def test_import_and_help_load_nothing_heavy():
    """Which is what keeps `tapt --help` under half a second."""
    loaded = f"print([name for name in {LATE} if name in sys.modules])"
    assert python("-c", f"import sys, tapt; {loaded}") == "[]\n"
    helped = "import sys\nfrom tapt.__main__ import main\ntry: main(['--help'])\n"
    assert python("-c", f"{helped}except SystemExit: {loaded}").endswith("[]\n")


def test_only_our_own_processes_wait_passively(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    setting = [p for p in _relative("tapt/**/*.py") if "OMP_WAIT" in (ROOT / p).read_text()]
    assert setting == [Path("tapt/__main__.py")]
    code = "import os; from tapt.__main__ import main; before = os.environ.get('OMP_WAIT_POLICY')\n"
    code += "main([]); print(before, os.environ['OMP_WAIT_POLICY'])"
    assert python("-c", code) == "None passive\n"
    assert python("-c", code, OMP_WAIT_POLICY="active") == "active active\n"


def test_the_project_lists_what_there_is():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {".".join(p.parent.parts) for p in _relative("tapt/**/*.py")} - {"tapt.examples"}
    assert packages | {"tapt._prompts"} == set(project["tool"]["setuptools"]["packages"])
    test = project["project"]["optional-dependencies"]["test"]
    assert test == (ROOT / "tests/requirements.txt").read_text().split()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {tapt.__version__}\n" in citation


def _relative(pattern: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in ROOT.glob(pattern)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves its work beside the sources
    for name in ("tapt", "prompts"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyi")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, cwd=folder)
    return target


def test_a_wheel_holds_the_packs_and_no_scripts(installed: Path):
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    prompts = [name for name in names if name.startswith("tapt/_prompts/")]
    assert "tapt/_prompts/tiny/backbone/open_clip_model.safetensors" in prompts
    assert {Path(name).suffix for name in prompts} == {".json", ".safetensors", ".md"}
    for name in ("tapt/py.typed", "tapt/data/classnames.json", "tapt/ui/style.css", PICTURE):
        assert name in names
    assert not [name for name in names if name.startswith("tests/")]


def test_an_installed_wheel_predicts_in_an_empty_folder(installed: Path, tmp_path: Path):
    own = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    where = python("-c", "import tapt; print(tapt.__file__)", folder=tmp_path, **own)
    assert Path(where.strip()) == installed / "tapt" / "__init__.py"
    script, picture = str(installed / "bin" / "tapt"), str(installed / PICTURE)
    command = [script, "predict", picture, "--classes", "horse,automobile,dog", "--views", "8"]
    printed = python(*command, folder=tmp_path, **own)
    assert re.search(r"^TAPT +horse ", printed, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_an_installed_wheel_serves_the_page(installed: Path, tmp_path: Path):
    program = (installed / "bin" / "tapt", "demo")
    with serving(tmp_path, program=program, PYTHONPATH=str(installed)):
        pass


def test_the_page_without_gradio_names_the_extra():
    code = "import sys; sys.modules['gradio'], sys.stderr = None, sys.stdout\n"
    code += "from tapt.__main__ import main\ntry: print(main(['demo']))\n"
    printed = python("-c", code + "except SystemExit as end: print(end.code)")
    assert printed == 'tapt demo: the page needs gradio: pip install "tapt[demo]"\n2\n'
