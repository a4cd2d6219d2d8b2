"""Progress on stderr."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class ProgressBar:
    """A bar that opens at the first report and closes at the last; called with (done, total)."""

    def __init__(self, **options: Any) -> None:
        self.bar: tqdm | None = None
        self.options = {"dynamic_ncols": True, **options}

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, **self.options)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None


def download_bar() -> ProgressBar:
    """For bytes from the Hub."""
    return ProgressBar(desc="Download", unit="B", unit_scale=True)
