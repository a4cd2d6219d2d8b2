"""Views against torchvision's own RandomResizedCrop."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F1

from tapt.core.views import (
    RATIO,
    SCALE,
    crop_box,
    generators,
    image_seeds,
    make_views,
    random_view,
)

DRAWS = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=generator(7))


def test_the_first_view_is_the_image_and_the_rest_are_not(image: torch.Tensor):
    views = make_views(image, 16, generator=generator())
    assert views.shape == (16, 3, 32, 32)
    assert views.dtype == image.dtype
    assert torch.equal(views[0], image)
    assert all(not torch.equal(view, image) for view in views[1:])
    assert len({view.numpy().tobytes() for view in views}) == 16
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_randomness_belongs_to_the_seed_and_the_number_of_the_image(image: torch.Tensor):
    seeds = [s for seed in range(4) for s in image_seeds(seed, range(50))]
    assert len(set(seeds)) == 200
    assert image_seeds(3, [7, 2]) == [image_seeds(3, [7])[0], image_seeds(3, [2])[0]]
    drawn = {
        purpose: [torch.rand((), generator=g).item() for g in generators(seeds[:9], purpose)]
        for purpose in ("", "attack", "judging")
    }
    assert len({value for values in drawn.values() for value in values}) == 27
    plain = torch.rand((), generator=generator(seeds[4])).item()
    assert drawn[""][4] == plain  # without a purpose the seed itself


def test_one_view_is_the_image_alone(image: torch.Tensor):
    assert torch.equal(make_views(image, 1, generator=generator()), image[None])


def test_a_seed_decides_the_views_and_the_global_state_does_not(image: torch.Tensor):
    one = make_views(image, 8, generator=generator(1))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(make_views(image, 8, generator=generator(1)), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(make_views(image, 8, generator=generator(2))[1:], one[1:])


def test_fewer_views_are_the_beginning_of_more(image: torch.Tensor):
    more = make_views(image, 8, generator=generator(3))
    assert torch.equal(make_views(image, 4, generator=generator(3)), more[:4])


def test_a_view_is_torchvisions_crop_of_the_same_box(image: torch.Tensor):
    draws = generator(5)
    flips = 0
    for _ in range(40):
        start = draws.get_state()
        view = random_view(image, draws)
        box = crop_box(32, 32, generator().set_state(start))
        crop = F1.resized_crop(image, *box, [32, 32], InterpolationMode.BILINEAR, antialias=True)
        flipped = bool((view - crop.flip(-1)).abs().max() < 1e-6)
        assert flipped or torch.allclose(view, crop, atol=1e-6, rtol=0)
        flips += flipped
    assert 10 <= flips <= 30  # p = 0.5: outside this once in 500 seeds, and the seed is fixed


@pytest.mark.parametrize(("height", "width"), [(224, 224), (32, 32)])
def test_boxes_follow_torchvisions_distribution(height: int, width: int):
    draws = generator(11)
    ours = torch.tensor([crop_box(height, width, draws) for _ in range(DRAWS)]).double()
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        params = [
            RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(DRAWS)
        ]
    theirs = torch.tensor(params).double()
    for boxes in (ours, theirs):
        top, left, h, w = boxes.T
        assert bool(((top >= 0) & (top + h <= height) & (left >= 0) & (left + w <= width)).all())
        area, ratio = h * w / (height * width), w / h
        rounding = 2 / (height * SCALE[0] ** 0.5)  # sides are whole pixels
        assert bool((area >= SCALE[0] * (1 - rounding)).all())
        assert bool((ratio >= RATIO[0] * (1 - rounding)).all())
        assert bool((ratio <= RATIO[1] * (1 + rounding)).all())
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        one, other = quantity(ours), quantity(theirs)
        error = ((one.var() + other.var()) / DRAWS).sqrt()  # of the difference of the means
        assert abs(one.mean() - other.mean()) < 4 * error
        assert 0.93 < one.std() / other.std() < 1.07
        for share in (0.05, 0.25, 0.75, 0.95):
            at = other.quantile(share)
            assert abs((one <= at).double().mean() - (other <= at).double().mean()) < 0.04


def test_a_picture_too_narrow_for_any_box_gives_its_central_square():
    boxes = {crop_box(400, 10, generator(seed)) for seed in range(20)}
    assert (195, 0, 10, 10) in boxes
    assert all(
        h <= 400 and w <= 10 and top + h <= 400 and left + w <= 10 for top, left, h, w in boxes
    )


def test_views_do_not_depend_on_the_default_device(image: torch.Tensor):
    expected = make_views(image, 4, generator=generator(8))
    with torch.device("meta"):
        assert torch.equal(make_views(image, 4, generator=generator(8)), expected)
