"""Packs of the Hub on the page, in a real browser: typed, fetched, used, and used again without
the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import serving
from loopback import LoopbackHub
from playwright.sync_api import Browser, Page, expect
from test_pack import make_pack
from test_page import choose, finish, message, saved, unfold

from tapt.__main__ import main
from tapt.packs.backbones import load_backbone
from tapt.packs.card import write_pack
from tapt.packs.format import list_packs, load_pack, pack_folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A pack of every design for the embedded backbone: the embedded ones, else made-up ones."""
    backbone, _ = load_backbone("tiny", device="cpu")
    packs = {name: load_pack(name, backbone) for name in list_packs("tiny")}
    found = {pack.prompts.config.design: pack_folder(name) for name, pack in packs.items()}
    for design in {"V", "VLI", "VLJ"} - set(found):
        found[design] = tmp_path / design
        write_pack(make_pack(backbone, design), found[design])
    return found


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page with its packs unfolded, and no attack."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    expect(page.locator("#chips")).not_to_be_empty()
    unfold(page, "plan")
    choose(page, "attack", "none")
    unfold(page, "settings")
    yield page
    page.close()


def ask(page: Page, source: str) -> None:
    page.locator("#pack input").fill(source)
    page.locator("#pack input").press("Enter")


def use(page: Page, source: str, commit: str) -> None:
    """Runs with the pack that the page shows, and looks for it in the numbers."""
    finish(page)
    settings = json.loads(saved(page, "All numbers"))["settings"]
    assert (settings["pack"], settings["pack_commit"]) == (source, commit)


def test_push_pull_use_and_use_again_without_the_hub(
    hub: LoopbackHub,
    browser: Browser,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_owner")
        for design, folder in folders.items():
            repo = f"owner/{design.lower()}"
            assert main(["push", str(folder), repo, "--public", "--tag", "v1"]) == 0
    commits = {repo: state.tags["v1"] for repo, state in hub.repos.items()}
    first, second, third = (f"{repo}@v1" for repo in commits)
    on_hub = {repo: f"{repo} at commit {commit[:7]}" for repo, commit in commits.items()}
    hub.authorized.clear()
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    (tmp_path / "one").mkdir()
    with (
        serving(tmp_path / "one", "--pack", first, **settings) as address,
        opened(browser, address) as page,
    ):
        line = page.locator("#model-line")
        expect(line).to_contain_text(on_hub[first[:-3]])
        use(page, first, commits[first[:-3]])

        page.locator("#pack input").click()
        for repo in commits:
            expect(page.get_by_role("option", name=repo, exact=True)).to_be_visible()

        hub.fail("GET .*statistics", "drip", size=40_000, seconds=0.1)
        ask(page, second)
        expect(page.get_by_text("Fetching the model")).to_be_visible()
        expect(line).to_contain_text(on_hub[second[:-3]])
        use(page, second, commits[second[:-3]])

        hub.fail("GET /api/models/", "stall")
        ask(page, third)
        sentence = f"{third[:-3]} is not in the local cache, and the Hub does not answer"
        assert sentence in message(page)
        expect(page.locator("#pack input")).to_have_value(second)
        hub.faults.clear()
        for source in (second, third):
            ask(page, source)
            expect(line).to_contain_text(on_hub[source[:-3]])
            use(page, source, commits[source[:-3]])
    assert not any(hub.authorized)

    hub.stop()
    (tmp_path / "two").mkdir()
    with (
        serving(tmp_path / "two", "--pack", first, **settings) as address,
        opened(browser, address) as page,
    ):
        for source in (first, second, third):
            ask(page, source)
            line = page.locator("#model-line")
            expect(line).to_contain_text(on_hub[source[:-3]])
            expect(line).to_contain_text("from the local cache: the Hub cannot be reached")
            use(page, source, commits[source[:-3]])
