"""The page in a real browser: what a person sees and does, and that it asks nobody but this server."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedcompose.serve import engine as engine_module
from fedcompose.serve.app import create_app
from fedcompose.serve.engine import Engine
from fedcompose.serve.limits import Door, read_api_keys
from tests.browser import CHROMIUM, Browser, browser
from tests.fedcompose.serve.serving import served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
KEY = "k" * 24


@pytest.fixture(scope="module")
def url(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(engine_module, "DEFAULT_MAX_TOKENS", 24)
        with served(create_app(engine)) as url:
            yield url


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as page:
        page.open(url)
        page.wait("document.querySelectorAll('.expert').length == 2")
        yield page


def ask(page: Browser, text: str, model: str = "auto", beside: str = "") -> None:
    page.js("afresh.click()")
    page.js(f"model.value = '{model}'; beside.value = '{beside}'; document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.wait("document.querySelectorAll('article').length && document.getElementById('stop').disabled")


def test_every_word_has_its_experts_colour_and_the_shares_stand_below(page: Browser) -> None:
    ask(page, "Hello you")
    shown = page.js("JSON.stringify([...document.querySelectorAll('.token')].map(each => each.dataset.row))")

    assert '"0"' in shown and '"1"' in shown
    assert page.js("new Set([...document.querySelectorAll('.token')].map(each => each.style.borderBottom)).size") == 2
    assert "site-a" in page.js("document.querySelector('.shares').textContent")


def test_whoever_does_not_know_what_to_ask_is_shown_what_it_was_measured_on(
    page: Browser, url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = [
        {"site": "site-b", "generator": "clock", "config": {}},
        {"site": "site-a", "generator": "chain_sum", "config": {"terms": 2}},
        {"site": "site-a", "generator": "chain_sum", "config": {"of another version": 1}},
        {"site": "site-a", "generator": "nobody knows this one", "config": {}},
    ]
    monkeypatch.setattr(engine, "release", dataclasses.replace(engine.release, evaluation={"domains": domains}))
    examples = httpx.get(f"{url}/release").json()["examples"]
    assert len(examples) == 2 and "+" in examples[0]
    page.open(url)
    page.wait("document.querySelectorAll('.try button').length == 2")
    page.js("document.querySelector('.try button').click()")
    assert page.js("document.querySelector('.try')") is None
    page.wait("document.querySelectorAll('.token').length && document.getElementById('stop').disabled")
    assert page.js("document.querySelector('.question').textContent") == examples[0]
    page.js("afresh.click()")
    assert page.js("document.querySelectorAll('.try button').length") == 2


def test_arrow_keys_walk_from_token_to_token_and_show_its_layers(page: Browser) -> None:
    ask(page, "Hello you")
    page.js("[...document.querySelectorAll('.said')].at(-1).focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")

    assert page.js("[...document.querySelectorAll('article')].at(-1).querySelectorAll('.strip .mark').length") == 2
    assert "of 2 layers" in page.js("document.getElementById('spoken').textContent")
    pixels = (
        "(() => { const map = [...document.querySelectorAll('canvas')].at(-1);"
        " const data = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;"
        " const cells = Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join());"
        " return new Set(cells).size })()"
    )
    assert page.js(pixels) >= 3  # two experts and the ground


def test_two_answers_stand_side_by_side_and_say_where_they_part(page: Browser) -> None:
    ask(page, "Hello you", beside="expert:site-b")

    assert page.js("[...document.querySelectorAll('.lanes')].at(-1).querySelectorAll('article').length") == 2
    assert "part after" in page.js("[...document.querySelectorAll('.lanes')].at(-1).textContent")
    assert page.js("[...document.querySelectorAll('.lanes')].at(-1).querySelectorAll('.parting').length") == 2


def test_pinned_layers_are_the_pinned_experts(page: Browser) -> None:
    page.js("pin.value = 'site-b'; first.value = 0; last.value = 1")
    ask(page, "Hello you")
    page.js("pin.value = ''")

    rows = page.js("[...[...document.querySelectorAll('.said')].at(-1).children].map(each => each.dataset.row).join()")
    assert rows and set(rows.split(",")) == {"1"}


def test_one_expert_can_be_looked_at_alone(page: Browser) -> None:
    ask(page, "Hello you")
    page.js("document.querySelector('.expert').click()")
    faded = page.js("[...document.querySelectorAll('.elsewhere')].map(each => each.dataset.row).join()")
    page.js("document.querySelector('.expert').click()")

    assert faded and set(faded.split(",")) == {"1"}
    assert page.js("document.querySelectorAll('.elsewhere').length") == 0


def test_the_drawer_names_every_site_its_key_and_what_was_checked(page: Browser, engine: Engine) -> None:
    page.js("document.getElementById('about').click()")
    text = page.js("document.getElementById('drawer').innerText")
    page.press("Escape")

    assert page.js("document.getElementById('drawer').open") is False
    for expert in engine.release.experts:
        assert expert.site in text and expert.keyid in text and expert.dir_hash in text
    assert "✓ each site signed its expert" in text and "terms" in text


def test_words_of_a_model_are_never_markup(page: Browser) -> None:
    page.js(
        "window.hit = 0; const lane = new Lane('auto'); document.getElementById('log').append(lane.node);"
        "lane.write({text: '<img src=x onerror=hit=1><b>x</b>', expert: '<b>', agreement: 1, layers: []})"
    )
    time.sleep(0.2)
    assert page.js("window.hit") == 0
    assert page.js("document.querySelectorAll('main b, main img').length") == 0


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_a_phone(page: Browser, width: int) -> None:
    ask(page, "Hello you", beside="expert:site-b")
    page.js("document.querySelectorAll('.token')[2].click()")  # opens the map, which is wide
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=780, deviceScaleFactor=1, mobile=False)
    page.js("document.querySelector('canvas').style.width = '3000px'")
    overflow = page.js("document.getElementById('log').scrollWidth - document.getElementById('log').clientWidth")
    wide = page.js("document.documentElement.scrollWidth")
    page.call("Emulation.clearDeviceMetricsOverride")

    assert overflow == 0
    assert wide <= width


def test_a_masked_sites_row_is_nobody_elses(engine: Engine, url: str) -> None:
    """Nor are rows in which all experts spoke anybody's."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as page:
        engine.mask({"site-a"})
        try:
            page.open(url)
            page.wait("document.querySelectorAll('.expert').length == 2")
            ask(page, "Hello you")
            page.js("document.querySelector('.token').click()")
            assert "site-b" in page.js("document.getElementById('spoken').textContent")
            assert page.js("[...document.getElementById('pin').options].map(each => each.value).join()") == ",site-b"
            page.js(
                "const lane = new Lane('auto'); document.getElementById('log').append(lane.node);"
                "lane.write({text: 'x', expert: 'merged', agreement: 1, layers: [-1, -1]}); lane.add_map();"
                "lane.choose(0)"
            )
            assert page.complaints == []
        finally:
            engine.mask(())


def test_it_asks_nobody_else_and_nothing_goes_wrong(page: Browser, url: str) -> None:
    assert all(address.startswith(url) for address in page.requested), page.requested
    assert page.complaints == []


def test_where_keys_are_wanted_it_asks_for_one(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me {KEY}\n")
    keys.chmod(0o600)
    monkeypatch.setattr(engine_module, "DEFAULT_MAX_TOKENS", 24)
    with (
        served(create_app(engine, door=Door(keys=read_api_keys(keys)))) as url,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser(Path(profile)) as page,
    ):
        page.open(url)
        page.wait("document.getElementById('asking').open")
        page.js("document.getElementById('key').focus()")
        page.type(KEY)
        page.press("Enter")
        page.wait("document.querySelectorAll('.expert').length == 2")
        ask(page, "Hello you")
        assert page.js("document.querySelectorAll('.token').length") > 10
