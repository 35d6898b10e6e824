"""The pages in a real browser: at two widths, by mouse and keyboard, with hostile answers.

SCREENSHOTS=folder keeps the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from opcd_nemo.report.command import write_page
from tests.browser.chromium import PROGRAM, Page, chromium
from tests.report_folders import HOSTILE, write_pipeline, write_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian's package)")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as browser:
        yield browser.new_page()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind, and each with hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder / "demo_brevity-dp2", config=CONFIG)
    other = write_run(folder / "demo_brevity-tp2", num_steps=300, config="optim:\n  lr: 0.0001\n")
    return {
        "run": run / "report.html",
        "hostile": write_run(folder / "hostile", hostile=True) / "report.html",
        "games": write_run(folder / "games", games=True) / "report.html",
        "comparison": write_page([str(run), str(other)]),
        "pipeline": write_page([str(write_pipeline(folder / "demo_games"))]),
        "hostile_pipeline": write_page([str(write_pipeline(folder / "evil", hostile=True))]),
    }


CONFIG = """\
student: {path: smollm2-135m-instruct}
teacher: {path: null, update: never}
task: {_target_: opcd_nemo.tasks.system_prompt.StyleTask}
optim: {lr: 5.0e-05}
"""
KINDS = ("run", "hostile", "games", "comparison", "pipeline", "hostile_pipeline")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_at_every_width_and_the_console_is_silent(
    page: Page, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    page.open(pages[kind], width=width, dark=dark)
    assert page.complaints() == []
    assert page.run("document.documentElement.scrollWidth") <= width, "scrolls sideways"
    assert page.run("document.title") != "taken"
    values = "[...document.querySelectorAll('dd')].map(value => value.clientWidth)"
    assert min(page.run(values) or [width]) > 80, "a letter a line"
    # whatever is a link leads to a place in the page, or to a page beside it
    links = page.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert links
    assert all(link.startswith("#") or link.endswith("/report.html") for link in links)
    assert pages[kind].stat().st_size < 2_000_000
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(Path(folder) / f"{kind}-{width}{'-dark' * dark}.png")


def test_the_mouse_shows_what_both_models_would_have_said(
    page: Page, pages: dict[str, Path]
) -> None:
    page.open(pages["run"], width=1280)
    page.hover(".heat .t", 9)  # the full stop
    shown = page.run("document.querySelector('.heat .detail').innerText")
    assert "costs 5.00 nats" in shown
    assert "student, without context" in shown
    assert "teacher, with the context" in shown
    assert (
        page.run("document.querySelectorAll('.heat .detail')[0].querySelectorAll('.likely').length")
        == 10
    )
    hot, cold = (
        page.run(f"getComputedStyle(document.querySelectorAll('.t')[{n}]).backgroundColor")
        for n in (9, 0)
    )
    assert hot != cold
    # the same token of the same words after training is cooler
    after = page.run(
        "getComputedStyle(document.querySelectorAll('.tokens')[1].querySelectorAll('.t')[9])"
        ".backgroundColor"
    )
    assert after not in (hot, cold)
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / "run-hover.png")


def test_the_keyboard_walks_along_the_tokens(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["run"], width=390)
    page.run("document.querySelector('.t').focus()")
    first = page.run("document.querySelector('.heat .detail').innerText")
    page.press("ArrowRight")
    second = page.run("document.querySelector('.heat .detail').innerText")
    page.press("End")
    assert first != second
    assert "costs" in first
    assert page.run("document.activeElement.textContent") == " shapes"
    # one stop of the Tab key a line, not one a token
    assert page.run("document.querySelectorAll('.t[tabindex=\"0\"]').length") == page.run(
        "document.querySelectorAll('.tokens').length"
    )


def test_hostile_text_stays_text(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["hostile"], width=1280)
    body = page.run("document.body.innerText")
    assert "<script>document.title='taken'</script>" in body
    assert r"\x1b[31mred\x1b]0;title\x07 \u202eevil {{ 7 * 7 }} {% raw %}" in body
    assert (
        page.run("document.querySelectorAll('img, iframe, object, a[href^=javascript]').length")
        == 0
    )
    assert page.run("document.querySelectorAll('script').length") == 2, "the page's own, its data"
    page.hover(".heat .t", 2)
    shown = page.run("document.querySelector('.heat .detail').innerText")
    assert "<img src=x" in shown
    assert page.run("document.title") != "taken"
    assert page.complaints() == []
    assert HOSTILE not in pages["hostile"].read_text(encoding="utf-8")


def test_the_policy_stops_a_script_that_got_in(
    page: Page, pages: dict[str, Path], tmp_path: Path
) -> None:
    spoiled = tmp_path / "spoiled.html"
    whole = pages["run"].read_text(encoding="utf-8")
    spoiled.write_text(
        whole.replace("</main>", "<script>document.title='taken'</script></main>"),
        encoding="utf-8",
    )
    page.open(spoiled, width=1280)
    assert page.run("document.title") != "taken"
    assert page.complaints(), "the browser says what it stopped"


def test_a_game_is_stepped_through(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["games"], width=390)
    visible = (
        "[...document.querySelectorAll('.game')[0].querySelectorAll('.frame')].map(f => f.hidden)"
    )
    assert page.run(visible) == [False, True, True]
    page.run("document.querySelectorAll('.game button')[1].click()")
    assert page.run(visible) == [True, False, True]
    caption = "document.querySelectorAll('.game .frame:not([hidden]) figcaption')[0].innerText"
    assert page.run(caption) == "Move: [right]"
    page.run("document.querySelectorAll('.game button')[1].click()")
    assert page.run(caption).startswith("Move: [down] That move cannot be made. The game is")
    assert page.run("document.querySelectorAll('.game button')[1].disabled") is True
