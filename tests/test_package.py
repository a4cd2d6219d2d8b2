"""The package from outside: public names, imports, and a wheel in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, _wait_for

import tapt

PICTURE = "tapt/examples/tuxpaint-gpl2/horse.png"
NEVER_IN_CORE = ["gradio", "huggingface_hub", "accelerate", "matplotlib"]
LATE = [*NEVER_IN_CORE, "numpy", "open_clip", "pydantic", "torch"]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    plain = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_public_names():
    assert {name for name in tapt.__all__ if getattr(tapt, name).__doc__} == set(tapt.__all__)
    assert set(tapt.__all__) <= set(dir(tapt))
    assert tapt.list_packs() == ["tiny/v", "tiny/vli", "tiny/vlj"]
    assert tapt.list_defenses()[:4] == ["clip", "static", "ensemble", "tapt"]
    assert "pgd" in tapt.list_attacks()
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        tapt.lod  # noqa: B018


def test_import_and_help_load_nothing_heavy():
    """Which is what keeps `tapt --help` under half a second."""
    loaded = f"print([name for name in {LATE} if name in sys.modules])"
    assert python(f"import sys, tapt; {loaded}") == "[]\n"
    helped = "import sys\nfrom tapt.__main__ import main\ntry: main(['--help'])\n"
    assert python(f"{helped}except SystemExit: {loaded}").endswith("[]\n")


def test_core_knows_no_page_hub_or_plot():
    modules = [f"tapt.core.{path.stem}" for path in (ROOT / "tapt/core").glob("[!_]*.py")]
    loaded = f"print([name for name in {NEVER_IN_CORE} if name in sys.modules])"
    assert python(f"import sys, {', '.join(modules)}; {loaded}") == "[]\n"


def test_only_our_own_processes_wait_passively():
    setting = [p for p in _relative("tapt/**/*.py") if "OMP_WAIT" in (ROOT / p).read_text()]
    assert setting == [Path("tapt/__main__.py")]
    code = "import os; from tapt.__main__ import main; before = os.environ.get('OMP_WAIT_POLICY')\n"
    code += "main([]); print(before, os.environ['OMP_WAIT_POLICY'])"
    assert python(code) == "None passive\n"
    assert python(code, OMP_WAIT_POLICY="active") == "active active\n"


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


def run_installed(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


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
    where = run_installed(installed, tmp_path, "-c", "import tapt; print(tapt.__file__)")
    assert Path(where.stdout.strip()) == installed / "tapt" / "__init__.py"
    script, picture = str(installed / "bin" / "tapt"), str(installed / PICTURE)
    command = [script, "predict", picture, "--classes", "horse,automobile,dog", "--views", "8"]
    done = run_installed(installed, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^TAPT +horse ", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_an_installed_wheel_serves_the_page(installed: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"PYTHONPATH": str(installed), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    log = tmp_path / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(installed / "bin" / "tapt"), "demo", "--port", str(port)],
            cwd=tmp_path,
            env={**os.environ, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/", process, log)
        finally:
            process.terminate()
            process.wait(20)
    assert "Traceback" not in log.read_text()


def test_the_page_without_gradio_names_the_extra():
    hide = "import sys; sys.modules['gradio'] = None"
    code = f"{hide}\nfrom tapt.__main__ import main\ntry: print(main(['demo']))\n"
    code += "except SystemExit as end: print(end.code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2\n"
    assert done.stderr == 'tapt demo: the page needs gradio: pip install "tapt[demo]"\n'
