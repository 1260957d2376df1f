"""The page to play with: its data is that of `generate`, and in a browser it shows what its data says."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minireuse
from minireuse.plan import ReusePlan
from minireuse.policies import select

import explorer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explorer")
    files = ["--work", str(folder / "journal.jsonl"), "--out", str(folder / "explorer.html")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the searched plans are for another model
        explorer.main(["--model", str(model_folder), "--quick", *files])
    return folder / "explorer.html"


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data".*?>(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def tab(page: Path) -> Iterator[Any]:
    """The page, open in a browser of a phone's width."""
    if BROWSER is None:
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
        tab.asked, tab.wrong = [], []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.goto(page.as_uri())
        yield tab
        browser.close()


def plan_of(data: dict[str, Any], kind: int, row: str) -> dict[str, Any]:
    return next(plan for plan in data["kinds"][kind]["plans"] if plan["row"] == row)


def expect(tab: Any, plan: dict[str, Any]) -> None:
    """The page shows this plan: its calls, its pictures, its point and its numbers."""
    pressed = tab.eval_on_selector_all("#calls button", "all => all.map(b => b.getAttribute('aria-pressed'))")
    assert pressed == ["true" if mark == "#" else "false" for mark in plan["row"]]
    for name in ("pictures", "differences"):
        source = tab.get_attribute({"pictures": "#picture", "differences": "#difference"}[name], "src")
        assert source == "data:image/webp;base64," + plan[name][0]
    assert float(tab.get_attribute("#point", "data-time")) == plan["time"]
    psnr = plan["psnr"][0]
    assert tab.get_attribute("#point", "data-psnr") == ("null" if psnr is None else f"{psnr:g}")
    assert tab.inner_text("#psnr") == ("identical" if psnr is None else f"{psnr:.1f} dB")


def test_changes_around_a_row() -> None:
    assert explorer.around("..##", (1, 3)) == ["..##", "..#.", ".###"]


def test_the_data_are_those_of_the_pipeline(data: dict[str, Any], model_folder: Path) -> None:
    pipe = minireuse.load(model_folder, device="cpu")
    full = pipe.generate(explorer.PROMPTS[0], seeds=0).images[0].astype(float)
    for kind in data["kinds"]:
        row = kind["named"]["Even"]
        sites, order = select(pipe.sites, kind=kind["kind"]), int(kind["kind"] == "deep")
        plan = ReusePlan.stepwise([mark == "#" for mark in row], sites, order)
        image = pipe.generate(explorer.PROMPTS[0], seeds=0, plan=plan).images[0]
        found = next(p for p in kind["plans"] if p["row"] == row)
        assert found["psnr"][0] == pytest.approx(10 * np.log10(255**2 / np.mean((image - full) ** 2)), abs=0.01)
        shown = Image.open(io.BytesIO(base64.b64decode(found["differences"][0])))
        expected = Image.fromarray(np.minimum(abs(image - full) * 8, 255).astype(np.uint8))
        assert shown.size == expected.size
        gray = [np.asarray(picture.convert("L"), dtype=float) for picture in (shown, expected)]
        assert abs(gray[0] - gray[1]).mean() < 8  # WebP loses some of it


def test_an_interrupted_run_goes_on(page: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.read_text(encoding="utf-8")
    monkeypatch.setattr(explorer, "compared", None)  # nothing may be rendered again
    again = ["--work", str(page.with_name("journal.jsonl")), "--out", str(page.with_name("again.html"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explorer.main(["--model", str(model_folder), "--quick", *again])
    assert page.with_name("again.html").read_text(encoding="utf-8") == before


def test_a_click_shows_the_plan_with_this_call_changed(tab: Any, data: dict[str, Any]) -> None:
    tab.click("#named button:has-text('Full sampler')")
    expect(tab, plan_of(data, 0, "." * 20))
    x = tab.get_attribute("#point", "cx")
    tab.tap("#calls button[data-call='3']")
    expect(tab, plan_of(data, 0, "...#" + "." * 16))
    assert tab.get_attribute("#point", "cx") != x
    assert "not rendered" not in tab.inner_text("#message")


def test_the_keyboard_walks_and_changes(tab: Any, data: dict[str, Any]) -> None:
    tab.click("#named button:has-text('Full sampler')")
    tab.focus("#calls button[data-call='1']")
    for _ in range(9):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Space")
    expect(tab, plan_of(data, 0, "." * 10 + "#" + "." * 9))


def test_a_click_on_a_point_shows_its_plan(tab: Any, data: dict[str, Any]) -> None:
    row = data["kinds"][0]["named"]["Even"]
    tab.click(f"#chart .own[data-row='{row}']", force=True)
    expect(tab, plan_of(data, 0, row))


def test_what_was_not_rendered_snaps_to_the_nearest_and_says_so(tab: Any, data: dict[str, Any]) -> None:
    tab.click("#named button:has-text('Full sampler')")
    tab.click("#calls button[data-call='3']")
    tab.click("#calls button[data-call='17']")
    expect(tab, plan_of(data, 0, "." * 17 + "#.."))  # call 17 was asked for, so call 3 went back
    assert "not rendered" in tab.inner_text("#message")
    assert "call 3" in tab.inner_text("#message")


def test_another_kind_has_its_own_pictures(tab: Any, data: dict[str, Any]) -> None:
    tab.click("#named button:has-text('HURRY')")
    for kind, title in enumerate(explorer.KINDS.values()):
        tab.click(f"#kinds label:has-text('{title[0]}')")
        expect(tab, plan_of(data, kind, "." * 10 + "#" * 10))
    tab.click(f"#kinds label:has-text('{explorer.KINDS['map'][0]}')")


def test_it_says_which_call_hurts_most(tab: Any, data: dict[str, Any]) -> None:
    tab.click("#named button:has-text('Full sampler')")
    alone = {
        plan["row"].index("#"): plan["psnr"][0] for plan in data["kinds"][0]["plans"] if plan["row"].count("#") == 1
    }
    worst = min(alone, key=lambda call: alone[call])
    assert f"most at call {worst} ({alone[worst]:.1f} dB)" in tab.inner_text("#worst")


def test_it_fits_a_phone_and_loads_nothing(tab: Any, page: Path) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert {url for url in tab.asked if not url.startswith("data:")} == {page.as_uri()}
    assert tab.wrong == []


def test_the_page_in_docs_is_small_enough() -> None:
    assert (Path(__file__).parents[1] / "docs" / "explorer.html").stat().st_size < 8e6
