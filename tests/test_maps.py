"""Attention maps on disk: those of the calls that compute them, as the attention itself gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minireuse
from minireuse.attention import Attention
from minireuse.cache import ReuseCache
from minireuse.policies import interval, select
from minireuse.sample import command as sample
from minireuse.sample.maps import MapRecorder, words_of

PROMPT = "a red house"


def test_words_join_their_tokens() -> None:
    assert words_of(["a</w>", "mini", "reuse</w>", "fox</w>"]) == [("a", [1]), ("minireuse", [2, 3]), ("fox", [4])]
    assert words_of([]) == []


def test_watching_changes_no_bit_and_sees_what_is_computed(pipeline: minireuse.Pipeline, tmp_path: Path) -> None:
    """The plan reuses self attention at one call of three; the other maps are written, and nothing more is kept."""
    maps = select(pipeline.sites)
    plan = interval(3, select(pipeline.sites, "self"), k=1).on(pipeline.sites)
    assert plan.grid == "..#"
    words = [words_of(pipeline.text.pieces(PROMPT))]
    recorder, cache = MapRecorder(tmp_path, maps, words), ReuseCache()
    seen = pipeline.generate(PROMPT, steps=3, plan=plan, cache=cache, watch=recorder)
    recorder.finish(seen.images, (8, 8))
    explicit = pipeline.generate(PROMPT, steps=3, plan=plan, attention="explicit")
    assert torch.equal(seen.latents, explicit.latents)
    assert len(cache) == 0
    for site in maps:
        folder = tmp_path / "00000" / ("cross" if site.is_cross else "self") / site.address
        calls = [path.stem for path in sorted(folder.iterdir())]
        assert calls == ["call-00", "call-01", *(["call-02"] if site.is_cross else [])], site
    assert len(recorder.words[0]) == 3
    side = 3 * 16  # words beside each other, 16-pixel images
    assert Image.open(tmp_path / "00000" / "words.png").size[0] == side


def test_a_map_on_disk_is_the_mean_over_heads(pipeline: minireuse.Pipeline, tmp_path: Path) -> None:
    site = select(pipeline.sites, "self")[0]
    attention = dict(pipeline.unet.named_modules())[site.address]
    assert isinstance(attention, Attention)
    inputs: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    pipeline.generate(PROMPT, steps=1, watch=MapRecorder(tmp_path, [site], [[]]))
    handle.remove()
    x = inputs[0][1:]  # the conditional half
    q, k = (torch.stack(f(x).chunk(attention.heads, dim=-1), dim=1) for f in (attention.to_q, attention.to_k))
    mean = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1).mean(dim=1)[0]
    written = np.array(Image.open(tmp_path / "00000" / "self" / site.address / "call-00.png"))
    np.testing.assert_allclose(written, 255 * mean / mean.max(), atol=0.51)


@pytest.mark.parametrize("policy", ["none", "hurry"])
def test_the_command_line_writes_maps(model_folder: Path, tmp_path: Path, policy: str) -> None:
    argv = ["--model", str(model_folder), "--device", "cpu", "--steps", "2", "--prompt", PROMPT, "a lake", "--quiet"]
    more = ["--save-maps", str(tmp_path / "maps"), "--batch-size", "1", "--sites", "cross", "--policy", policy]
    assert sample.main([*argv, *more, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["00000", "00001"]
    assert not (tmp_path / "maps" / "00000" / "self").exists()
    assert (tmp_path / "maps" / "00001" / "words.png").exists()
    calls = {path.name for path in (tmp_path / "maps" / "00001" / "cross").rglob("*.png")}
    assert calls == ({"call-00.png", "call-01.png"} if policy == "none" else {"call-00.png"})
    assert sample.main([*argv, *more, "--out", str(tmp_path / "again")]) == 2  # what lies there is not written over


def test_maps_are_written_of_the_plan_that_is_followed(model_folder: Path, tmp_path: Path) -> None:
    """Without guidance a line is drawn where guidance would have ended: one value more is kept than with it."""
    argv = ["--model", str(model_folder), "--device", "cpu", "--steps", "9", "--prompt", PROMPT, "--quiet"]
    argv += ["--guidance-scale", "1", "--save-maps", str(tmp_path / "maps"), "--out", str(tmp_path / "out.png")]
    policy = "tgate:order=1,gate=4,every=1|interval:order=1,k=3"
    assert sample.main([*argv, "--sites", "self", "--policy", policy]) == 0
    assert (tmp_path / "out.png").exists()
