"""Checkpoints of the method's research code become packs; nothing in them is executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reference import ENTRIES, PREFIX, SPEC, backbone, tensors  # noqa: F401

from tapt.core.backbone import Backbone
from tapt.core.errors import PackError
from tapt.packs.card import write_pack
from tapt.packs.convert import Foreign, convert_files, from_research, read_checkpoint
from tapt.packs.format import Pack, load_pack

STATISTICS = ("means", "vars", "means_clean", "vars_clean")


def prompt_tensors(prefix: str) -> dict[str, torch.Tensor]:
    start = f"{prefix}prompt."
    values = load_file(PREFIX + ".safetensors")
    return {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}


def research_state(prefix: str, clip: Backbone) -> dict[str, torch.Tensor]:
    """A whole `state_dict` as the research code saves it: prompts, CLIP and buffers."""
    own = dict(clip.model.state_dict())
    image = {f"image_encoder.{k[7:]}": v for k, v in own.items() if k.startswith("visual.")}
    parts = ("transformer.", "positional", "ln_final", "text_projection")
    text = {f"text_encoder.{k}": v for k, v in own.items() if k.startswith(parts)}
    buffers = {
        "prompt_learner.token_prefix": torch.zeros(3, 1, clip.text_width),
        "prompt_learner.token_suffix": torch.zeros(3, 74, clip.text_width),
        "logit_scale": own["logit_scale"],
    }
    return {**image, **text, **buffers, **prompt_tensors(prefix)}


def save_checkpoint(path: Path, state: dict) -> None:
    """With the optimiser and the pickled scheduler that training leaves beside the weights."""
    weights = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    weights[0].sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    content = {"epoch": 50, "optimizer": optimizer.state_dict(), "scheduler": scheduler}
    torch.save({"state_dict": state, **content}, path)


@pytest.fixture
def research(tmp_path: Path, backbone: Backbone):  # noqa: F811
    """Makes the files of one reference entry, and what reads them."""

    def make(prefix: str, change=lambda state: None):
        state = research_state(prefix, backbone)
        change(state)
        save_checkpoint(tmp_path / "model.pth.tar-50", state)
        expected = load_file(PREFIX + ".safetensors")
        for name in STATISTICS:
            torch.save(expected[f"{prefix}target.{name}"], tmp_path / f"{name}.pt")

        def convert(design: str = SPEC[prefix]["design"]) -> Pack:
            files = [tmp_path / f"{name}.pt" for name in STATISTICS]
            return convert_files(tmp_path / "model.pth.tar-50", design, files, backbone)

        return convert

    return make


def refused(convert, *design: str) -> str:
    with pytest.raises(PackError) as error:
        convert(*design)
    return str(error.value)


def entry(design: str) -> str:
    return next(key for key in ENTRIES if SPEC[key]["design"] == design)


@pytest.mark.parametrize("prefix", ENTRIES)
def test_a_checkpoint_becomes_a_pack(prefix: str, research, backbone, tensors, tmp_path: Path):  # noqa: F811
    write_pack(research(prefix)(), tmp_path / "pack")
    pack = load_pack(tmp_path / "pack", backbone)
    config, spec = pack.prompts.config, SPEC[prefix]
    own = config.design, config.tokens, config.visual_depth
    assert own == (spec["design"], spec["n_ctx"], spec["depth"])
    expected = from_research(prompt_tensors(prefix), config).tensors
    assert list(pack.prompts.tensors) == list(expected)
    assert all(torch.equal(pack.prompts.tensors[name], expected[name]) for name in expected)
    for part, suffix in (("adversarial", ""), ("clean", "_clean")):
        statistics = getattr(pack.statistics, part)
        assert torch.equal(statistics.mean, tensors[f"{prefix}target.means{suffix}"])
        assert torch.equal(statistics.var, tensors[f"{prefix}target.vars{suffix}"])


def half(state: dict) -> None:
    for key in list(state):
        state[f"module.{key}"] = torch.nn.Parameter(state.pop(key).half())


def test_half_precision_and_data_parallel_names(research):
    prefix = entry("VLI")
    pack = research(prefix, half)()
    original = prompt_tensors(prefix)["prompt_learner.ctx"]
    assert torch.equal(pack.prompts.tensors["text"][0], original.half().float())


def scaled(state: dict, factor: float) -> None:
    state["image_encoder.VPT"] = state["image_encoder.VPT"] * factor


CHANGES = {
    "missing": (
        "VLJ",
        lambda s: [
            s.pop(f"prompt_learner.{k}") for k in ("proj.weight", "compound_prompts_text.0")
        ],
        "lacks prompt_learner.compound_prompts_text.0, prompt_learner.proj.weight for",
    ),
    "no-context": ("VLI", lambda s: s.pop("prompt_learner.ctx"), "lacks prompt_learner.ctx"),
    "first-missing": ("V", lambda s: s.pop("image_encoder.VPT"), "lacks image_encoder.VPT"),
    "gap": (
        "V",
        lambda s: s.pop("image_encoder.transformer.resblocks.1.VPT_shallow"),
        "unknown parameters for design V: image_encoder.transformer.resblocks.2.VPT_shallow",
    ),
    "unknown": (
        "VLJ",
        lambda s: s.update({"prompt_learner.extra": torch.zeros(1), "zebra": torch.zeros(1)}),
        "unknown parameters for design VLJ: prompt_learner.extra, zebra.",
    ),
    "shape": (
        "V",
        lambda s: s.update({k: v[:, :5] for k, v in s.items() if "VPT" in k}),
        "got (3, 2, 5)",
    ),
    "uneven": (
        "V",
        lambda s: s.update({"image_encoder.VPT": s["image_encoder.VPT"][:1]}),
        "do not fit together",
    ),
    "nan": ("V", lambda s: scaled(s, float("nan")), "visual has values that are not finite"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_wrong_with_a_checkpoint_is_listed(research, case: str):
    design, change, sentence = CHANGES[case]
    assert sentence in refused(research(entry(design), change))


def test_a_checkpoint_of_another_design(research):
    assert "unknown parameters for design VLJ" in refused(research(entry("VLI")), "VLJ")


def test_wrong_files(research, tmp_path: Path):
    convert = research(entry("V"))
    right = torch.load(tmp_path / "vars.pt")
    for content, sentence in (
        (torch.zeros(4, 17, 128), "adversarial.var must have shape"),
        (right - 9, "adversarial.var has negative values"),
        ({"vars": right}, "'vars.pt' is not a file of one tensor"),
    ):
        torch.save(content, tmp_path / "vars.pt")
        assert sentence in refused(convert)
    torch.save([1, 2], tmp_path / "model.pth.tar-50")
    assert "'model.pth.tar-50' has no state_dict" in refused(convert)


class Malice:
    """Writes a file when unpickled, by any of the ways that a pickle has."""

    def __init__(self, function, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path):
    target = tmp_path / "executed"
    malice = [
        Malice(os.system, f"touch {target}"),
        Malice(eval, f"open({str(target)!r}, 'w')"),
        Malice(exec, f"open({str(target)!r}, 'w')"),
        Malice(getattr, Malice(__import__, "os"), "system"),
        Malice(torch.load, str(target)),
        Malice(Path.touch, target),
    ]
    read = []
    for number, item in enumerate(malice):
        path = tmp_path / f"{number}.pth"
        torch.save({"state_dict": {"a": torch.ones(2)}, "other": item}, path)
        with suppress(PackError):
            read.append(read_checkpoint(path))
        assert not target.exists()
    assert all(torch.equal(content["state_dict"]["a"], torch.ones(2)) for content in read)
    assert [type(content["other"]) for content in read] == 4 * [Foreign]
    pickle.loads(pickle.dumps(malice[1]))
    assert target.exists()  # what the standard reader makes of it


def raw(path: Path, pickled: bytes, data: bytes = b"\x00" * 16, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in (("data/0", data), ("version", b"3"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", content)
    return path


def test_pickles_that_reach_for_more(tmp_path: Path):
    target = tmp_path / "executed"
    for pickled in (
        f"cos\nsystem\n(S'touch {target}'\ntR.".encode(),
        f"(S'touch {target}'\nios\nsystem\n.".encode(),
        f"(cos\nsystem\nS'touch {target}'\no.".encode(),
        b"\x80\x04\x8c\x05torch\x8c\x13_utils.os.system.xx\x93.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",
        b"ccollections\nOrderedDict\n}X\x06\x00\x00\x00updateK\x01sb.",
    ):
        with suppress(PackError):
            read_checkpoint(raw(tmp_path / "x.pth", pickled))
        assert not target.exists()
    assert OrderedDict(a=1) == {"a": 1}
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def stored(size: tuple, stride: tuple, offset: int = 0) -> bytes:
    class Named:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (self, offset, size, stride, False, {})

    out = io.BytesIO()

    class Writer(pickle.Pickler):
        seen = False

        def persistent_id(self, item):
            if isinstance(item, Named) and self.seen:
                return ("storage", torch.FloatStorage, "0", "cpu", 4)
            self.seen |= isinstance(item, Named)
            return None

    Writer(out, protocol=2).dump(Named())
    return out.getvalue()


def test_tensors_stay_inside_their_storage(research, tmp_path: Path):
    path = tmp_path / "x.pth"
    whole = read_checkpoint(raw(path, stored((2, 2), (2, 1))))
    assert torch.equal(whole, torch.zeros(2, 2))
    for wrong in (((5,), (1,)), ((2,), (9,)), ((2,), (1,), 3), ((10**13,), (1,)), ((-1,), (1,))):
        with pytest.raises(PackError, match="is not a whole checkpoint"):
            read_checkpoint(raw(path, stored(*wrong)))
    convert = research(entry("V"))
    raw(tmp_path / "vars.pt", stored((10**6, 10**6), (0, 0)))
    assert "'vars.pt' has a tensor that is larger than its storage" in refused(convert)


def test_files_that_are_no_checkpoints(tmp_path: Path):
    path = tmp_path / "x.pth"
    with pytest.raises(PackError, match=r"There is no file 'x\.pth'"):
        read_checkpoint(path)
    torch.save({"a": torch.ones(2)}, path)
    whole = path.read_bytes()
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    packed = raw(path, pickle.dumps(1), compression=zipfile.ZIP_DEFLATED).read_bytes()
    for content in (b"", b"hello", whole[:-30], old, packed, raw(path, b"").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(PackError, match=r"'x\.pth' is not a whole checkpoint in the zip"):
            read_checkpoint(path)
