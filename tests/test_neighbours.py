"""The neighbours through the registry's rows, on the toy backbone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import local_backbone, toy_clip
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from tapt.core.clip import PromptedClip
from tapt.core.images import to_float, to_picture, to_uint8
from tapt.defenses import changes, context, dbd, features, find_defense, tapt
from tapt.defenses.base import ImageBatch, PreparedDefense

NAMES = ["tpt", "rtpt", "sstpt", "ttc", "dbd", "tapt-ensemble"]
FAMILY = ["tpt", "rtpt", "sstpt"]
SMALL = {
    "tpt": {"views": 8, "keep": 0.4},
    "rtpt": {"views": 8, "keep": 0.4, "neighbours": 3, "temperature": 0.5},
    "sstpt": {"views": 6, "select": 3},
    "tapt-ensemble": {"views": 8, "keep": 0.4, "lr": 0.02},
}


def prepare(clip: PromptedClip, name: str, **settings: object) -> PreparedDefense:
    row = find_defense(name)
    return row.prepare(clip, row.settings(**{**SMALL.get(name, {}), **settings}))


@pytest.fixture(scope="module")
def exact(toy_folder) -> PromptedClip:
    """In float64, for differences."""
    return toy_clip(local_backbone(toy_folder, torch.float64))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (smooth * 255).round() / 255


def gradient(prepared: PreparedDefense, images: Tensor, surrogate: bool = False) -> Tensor:
    images = images.clone().requires_grad_()
    batch = ImageBatch(images, range(len(images)))
    answers = (prepared.surrogate_logits if surrogate else prepared.logits)(batch).log_softmax(-1)
    return torch.autograd.grad(answers[:, 0].sum(), images)[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_without_colour_and_at_the_ends_of_the_range(clip, name):
    levels = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    prepared = prepare(clip, name)
    for surrogate in (False, True)[: 1 + bool(prepared.surrogate)]:
        assert gradient(prepared, levels, surrogate).isfinite().all(), surrogate


@pytest.mark.parametrize("name", [*FAMILY, "ttc", "tapt-ensemble"])
def test_the_surrogates_gradient_is_the_slope_of_its_answers(exact, images, name):
    options = {"answer": "similar"} if name == "tapt-ensemble" else {}
    prepared = prepare(exact, name, **options)
    image = images[:1].double() * 0.8 + 0.1  # away from the edges of the range
    towards = torch.randn(image.shape, generator=torch.Generator().manual_seed(3)).double()

    def answer(shift: float) -> float:
        with torch.no_grad():
            batch = ImageBatch(image + shift * towards, [0])
            return prepared.surrogate_logits(batch).log_softmax(-1)[0, 0].item()

    slope = (answer(1e-6) - answer(-1e-6)) / 2e-6
    through = (gradient(prepared, image, True) * towards).sum().item()
    held = (gradient(prepared, image) * towards).sum().item()
    assert through == pytest.approx(slope, rel=1e-3)
    assert held != pytest.approx(slope, rel=1e-3)  # the step matters


@pytest.mark.parametrize("name", [*FAMILY, "tapt-ensemble"])
@pytest.mark.parametrize("count", [1, 2])
def test_few_views_are_enough(clip, images, name, count):
    options = {"answer": "similar", "neighbours": 20} if name == "tapt-ensemble" else {}
    prepared = prepare(clip, name, views=count, **options)
    prediction = prepared.predict(ImageBatch(images, [1, 2, 3]))
    assert prediction.probabilities.isfinite().all()
    assert prediction.trace["kept"].shape[1] >= 1


@pytest.mark.parametrize("name", [*FAMILY, "ttc", "tapt-ensemble"])
def test_without_a_step(clip, images, name):
    actual = prepare(clip, name, steps=0).predict(ImageBatch(images, [1, 2, 3])).probabilities
    assert actual.isfinite().all()
    if name == "tpt":
        torch.testing.assert_close(actual, clip.vanilla(images).softmax(-1))


@pytest.mark.parametrize("order", [FAMILY, FAMILY[::-1]])
def test_views_are_encoded_once_for_all_that_use_them(clip, images, monkeypatch, order):
    views = {"tpt": 24, "rtpt": 40, "sstpt": 16}
    alone = {}
    for name in order:
        prepared = prepare(clip, name, views=views[name])
        alone[name] = prepared.predict(ImageBatch(images, [1, 2, 3])).probabilities
    calls, inner, batch = [], features.encode_image, ImageBatch(images, [1, 2, 3])
    monkeypatch.setattr(
        features, "encode_image", lambda b, x, *a: calls.append(len(x)) or inner(b, x, *a)
    )
    for name in order:
        prepared = prepare(clip, name, views=views[name])
        torch.testing.assert_close(prepared.predict(batch).probabilities, alone[name])
    # 40 views, 8 of them again as TPT's last part, and SS-TPT's changed ones
    assert sum(calls) == 3 * (40 + 8 + 16)
    assert batch.reused > 0


def test_tapt_and_its_ensemble_share_one_step(clip, images, monkeypatch):
    calls, inner = [], tapt.tune
    monkeypatch.setattr(tapt, "tune", lambda *a, **k: calls.append(1) or inner(*a, **k))
    batch = ImageBatch(images, [1, 2, 3])
    prepare(clip, "tapt", **SMALL["tapt-ensemble"]).predict(batch)
    prepare(clip, "tapt-ensemble").predict(batch)
    prepare(clip, "tapt-ensemble", answer="similar").predict(batch)
    assert len(calls) == 1
    prepare(clip, "tapt-ensemble", lr=0.01).predict(batch)
    assert len(calls) == 2


def test_tapt_ensemble_without_a_step_is_the_ensemble(clip, images):
    expected, actual = (
        prepared.predict(ImageBatch(images, [1, 2, 3]))
        for prepared in (
            prepare(clip, "ensemble", views=8, keep=0.4),
            prepare(clip, "tapt-ensemble", steps=0),
        )
    )
    torch.testing.assert_close(actual.probabilities, expected.probabilities)
    similar = prepare(clip, "tapt-ensemble", answer="similar", neighbours=3, temperature=0.1)
    trace = similar.predict(ImageBatch(images, [1, 2, 3])).trace
    torch.testing.assert_close(trace["weights"].sum(1), torch.ones(3))
    assert trace["weights"].shape == (3, 8)


def test_augmix_changes_all_views_but_the_image(clip, images):
    prepared = prepare(clip, "rtpt", augmix=True)
    batch = ImageBatch(images, [1, 2, 3])
    mixed, plain = prepared.views(batch), batch.views(8)
    assert torch.equal(mixed[:, 0], plain[:, 0])
    moved = (mixed - plain).abs().flatten(2).amax(2)[:, 1:]
    assert (moved > 0).float().mean() > 0.8
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    fewer = prepare(clip, "sstpt", augmix=True).views(ImageBatch(images, [1, 2, 3]))
    assert torch.equal(fewer, mixed[:, :6])
    both = ImageBatch(images, [1, 2, 3])  # mixed views are not taken for plain ones
    first = prepare(clip, "rtpt").predict(both).probabilities
    assert not torch.equal(first, prepared.predict(both).probabilities)


@pytest.mark.parametrize("name", changes.OPERATIONS)
def test_augmix_operations_are_slight(images, name):
    picture = to_picture(to_uint8(to_picture((images[0] * 255).to(torch.uint8))))
    for sign in (-1, 1):
        moved = changes.operation(picture, name, 0.95, sign)
        assert moved.size == picture.size
        assert moved.mode == "RGB"
    if name.startswith("translate"):
        assert changes.operation(picture, name, 1.0, 1).tobytes() != picture.tobytes()


def test_the_slight_change_is_one_draw_for_all_views(images):
    view = images[0]
    same, seen = 0, set()
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        changed = changes.slight_change(torch.stack([view, view]), generator)
        assert changed.min() >= -1e-6
        assert changed.max() <= 1 + 1e-6
        close = (changed[0] - changed[1]).abs().max()
        assert close < 0.2  # noise alone tells them apart
        same += bool(close == 0)
        seen.add(round(changed[0].mean().item(), 6))
    assert 4 <= same <= 20
    assert len(seen) == 24


def test_divergence_is_not_negative(clip):
    """Its inverse would be a huge negative where rounding brings it below 0."""
    logits = 100 * torch.randn(4, 50, 30, generator=torch.Generator().manual_seed(0))
    assert (context.divergence(logits, logits) >= 0).all()
    assert (context.divergence(logits, logits + 1e-6) >= 0).all()


@pytest.fixture(scope="module")
def noisy() -> Tensor:
    """A noisy 8-bit picture with near-white parts, in levels, (3, 40, 40)."""
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 256, (3, 40, 40))
    levels[:, :10] = generator.integers(236, 256, (3, 10, 40))
    return torch.from_numpy(levels.astype(np.uint8))


def test_dbd_changes_are_in_the_order_of_the_paper(noisy):
    image, picture = to_float(noisy), to_picture(noisy)
    views = dbd.changed_views(image, torch.Generator().manual_seed(0))
    assert views.shape == (31, 3, 40, 40)
    levels = views * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    levels = levels.round().to(torch.uint8)

    assert torch.equal(levels[16], to_uint8(ImageOps.posterize(picture, 3)))
    exact = noisy.double().numpy()
    for index, cut in ((17, np.rint), (18, np.ceil)):  # near-white does not wrap to black
        expected = torch.from_numpy(np.minimum(cut(exact / 32) * 32, 255))
        assert torch.equal(levels[index].double(), expected)
    for index, quality in ((19, 50), (20, 60), (21, 75)):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality)
        assert torch.equal(levels[index], to_uint8(Image.open(data)))
    noise = (views[22:28] - image)[:, (image > 0.35) & (image < 0.65)]
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert len({view.sum().item() for view in views[22:28]}) == 6
    assert torch.equal(levels[28], to_uint8(picture.filter(ImageFilter.MedianFilter(5))))


def test_dbd_blurs_in_whole_levels(noisy):
    """OpenCV's mean and Gaussian over 5 x 5, written out."""
    mean, gauss = dbd.blurred(noisy.float())
    padded = np.pad(noisy.numpy().astype(int), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])
    assert np.array_equal(mean.numpy(), np.rint(windows.sum((-1, -2)) / 25))
    assert np.array_equal(gauss.numpy(), ((windows * kernel).sum((-1, -2)) + 128) >> 8)
