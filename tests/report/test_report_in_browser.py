"""The report and the comparison in Chromium: drawn, read by mouse, finger and keys, and quiet.

`make test-browser` installs the browser first and sets DPO_BROWSER_REQUIRED: there, a browser that
is absent is a failure. Everywhere else these tests are then skipped, and say so.
"""

import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise

import pytest

from dpo.report.page import write_comparison, write_report
from tests.report.fake_run import BETA, STEPS, fake_run, training_line
from tests.report.test_report import HOSTILE

pytestmark = pytest.mark.browser
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

# Text whose contrast to what lies behind it is below 4.5: WCAG 2.2, 1.4.3. Half-transparent
# backgrounds are laid over each other, from the page upwards.
LOW_CONTRAST = """() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return colour.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (node) => {
    const below = node.parentElement ? behind(node.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(node).backgroundColor), below);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map(
      (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const node of document.querySelectorAll("body, body *")) {
    const words = [...node.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words.length || !node.checkVisibility() || node.closest("script")) continue;
    const style = getComputedStyle(node), below = behind(node);
    const colour = over(parse(node.closest("svg") ? style.fill : style.color), below);
    const [dark, light] = [luminance(colour), luminance(below)].sort((a, b) => a - b);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)}: ${words[0].textContent.slice(0, 40)}`);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        absent = pytest.fail if os.environ.get("DPO_BROWSER_REQUIRED") else pytest.skip
        absent("no chromium on the path, or no playwright: make test-browser installs both")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of a run with hostile text, and a comparison, as URLs."""
    folder = tmp_path_factory.mktemp("runs")
    margins = [0.05 * (i - 10) for i in range(40)]
    write_report(fake_run(folder / "a", text=f"Rome \u0645\u0631\u062d\u0628\u0627 {HOSTILE}"))
    fake_run(folder / "b", beta=2 * BETA, margins=margins)
    write_comparison([folder / "a", folder / "b"], folder / "comparison.html")
    return {
        "report": (folder / "a" / "report.html").as_uri(),
        "comparison": (folder / "comparison.html").as_uri(),
    }


@contextmanager
def opened(browser, url, **options):
    """The page in a window of its own; `said` and `requests` are what it said and asked for."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    page = context.new_page()
    page.said, page.requests = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    yield page
    context.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_says_nothing_on_the_console_and_asks_for_nothing(browser, pages, name):
    with opened(browser, pages[name]) as page:
        page.mouse.wheel(0, 20_000)
        for plot in page.locator("[data-chart]").all():
            plot.hover()
        assert page.said == []
        assert page.requests == [pages[name]]
        # The check can fail; and the page's policy holds back what a script would fetch.
        page.evaluate("fetch('https://example.org/').catch(() => 0)")
        page.evaluate("console.error('seen')")
        assert "seen" in page.said
        assert any("Content Security Policy" in text for text in page.said)
        assert page.requests == [pages[name]]


def test_a_page_that_fetches_would_be_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text("<img src='absent.png'>")
    with opened(browser, (tmp_path / "page.html").as_uri()) as page:
        assert len(page.requests) == 2


@pytest.mark.parametrize(("name", "at_least"), [("report", 17), ("comparison", 8)])
def test_every_chart_is_drawn(browser, pages, name, at_least):
    """Each has a path in a colour of the data, wider or higher than nothing."""
    with opened(browser, pages[name]) as page:
        sizes = page.evaluate(
            """() => [...document.querySelectorAll("[data-chart]")].map((plot) => {
              const own = [...plot.querySelectorAll("path, use")].filter(
                (path) => /--(train|held|chosen|rejected|ink|run)/.test(path.style.cssText));
              return Math.max(0, ...own.map((path) => path.getBoundingClientRect())
                .map((box) => box.width + box.height));
            })"""
        )
        assert len(sizes) >= at_least
        assert min(sizes) > 4


def tip(plot):
    return plot.locator(".tip").inner_text().splitlines()


def plot_of(page, title):
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).locator(
        "[data-chart]"
    )


@pytest.mark.parametrize("step", [1, 7, 20])
def test_the_pointer_shows_the_values_of_the_nearest_step(browser, pages, step):
    """Steps 0 to 20 and 5 % of them on either side span the axes: 56 to 408 of 420 px."""
    with opened(browser, pages["report"]) as page:
        plot = plot_of(page, "Loss")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        share = (56 + 352 * (0.05 + step / STEPS) / 1.1) / 420
        assert plot.locator(".tip").count() == 0
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        lines = tip(plot)
        assert lines[0] == f"step {step}"
        assert lines[1] == f"training: {training_line(step)['train/loss']:.4g}"
        assert plot.locator(".cross").count() == 1
        page.mouse.move(0, 0)
        assert plot.locator(".tip").count() == 0


def test_a_finger_shows_the_values_too(browser, pages):
    options = {"has_touch": True, "is_mobile": True, "viewport": {"width": 390, "height": 800}}
    with opened(browser, pages["report"], **options) as page:
        plot = plot_of(page, "Loss")
        plot.scroll_into_view_if_needed()
        plot.tap()
        assert tip(plot)[0].startswith("step ")
        box = plot.locator(".tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_the_arrow_keys_move_along_the_steps_and_the_value_is_read_out(browser, pages):
    with opened(browser, pages["report"]) as page:
        plot = plot_of(page, "Gradient norm")
        plot.focus()
        page.keyboard.press("End")
        assert tip(plot) == ["step 20", "training: 3.5"]  # 1 + 0.125 x 20
        page.keyboard.press("ArrowLeft")
        assert tip(plot) == ["step 19", "training: 3.375"]
        page.keyboard.press("PageDown")
        assert tip(plot)[0] == "step 9"
        page.keyboard.press("Home")
        page.keyboard.press("ArrowLeft")
        assert tip(plot) == ["step 1", "training: 1.125"]
        assert plot.get_attribute("aria-valuetext") == "step 1; training: 1.125"
        assert plot.get_attribute("aria-valuenow") == "1"
        page.keyboard.press("Escape")
        assert plot.locator(".tip").count() == 0
        page.keyboard.press("Tab")
        assert not plot.evaluate("node => node === document.activeElement")


def test_a_point_of_the_frontier_names_its_run_and_step(browser, pages):
    with opened(browser, pages["comparison"]) as page:
        plot = plot_of(page, "Right answers against KL")
        plot.focus()
        page.keyboard.press("End")
        assert tip(plot)[0] in ("a, step 20", "b, step 20")
        assert tip(plot)[1].endswith("75.0% right, KL 1.25")
        assert plot.locator(".dot").count() == 1


def test_tokens_read_out_their_reward_by_mouse_and_keys(browser, pages):
    with opened(browser, pages["report"]) as page:
        chosen = page.locator(".tokens").first
        readout = page.locator(".readout").first
        chosen.locator("span").nth(1).hover()
        assert readout.inner_text() == '" cap": +0.2500'
        chosen.focus()
        page.keyboard.press("ArrowRight")
        assert readout.inner_text() == '"ital": -0.5000'
        page.keyboard.press("End")
        assert readout.inner_text() == '"<|im_end|>": not scored'
        assert readout.get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [360, 390, 768])
def test_no_width_needs_sideways_scrolling(browser, pages, name, width):
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    with opened(browser, pages[name], viewport={"width": width, "height": 800}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate(overflow) == 0
        page.evaluate("document.querySelector('h1').style.width = '2000px'")  # it can fail
        assert page.evaluate(overflow) > 0


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast_in_both_modes(browser, pages, name, scheme):
    with opened(browser, pages[name], color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        for plot in page.locator("[data-chart]").all()[:2]:
            plot.hover()
            assert page.evaluate(LOW_CONTRAST) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background.strip("rgb()").split(", "))) / 3
        assert (brightness < 60) == (scheme == "dark")
        page.add_style_tag(content="h1 { color: rgb(128 128 128 / .8); }")  # it can fail
        assert len(page.evaluate(LOW_CONTRAST)) == 1


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_whatever_takes_the_focus_has_a_name_and_a_visible_outline(browser, pages, name):
    with opened(browser, pages[name]) as page:
        wanted = page.evaluate(
            """() => [...document.querySelectorAll("a, summary, [tabindex='0']")].filter(
              (node) => node.checkVisibility()).length"""
        )
        for _ in range(wanted):
            page.keyboard.press("Tab")
            focus = page.evaluate(
                """() => {
                  const node = document.activeElement;
                  const ids = (node.getAttribute("aria-labelledby") || "").split(" ");
                  const label = ids.map((id) => document.getElementById(id)?.textContent).join("");
                  return [node.tagName, node.getAttribute("aria-label") || label
                    || node.textContent.trim(), getComputedStyle(node).outlineStyle];
                }"""
            )
            assert focus[0] != "BODY"
            assert focus[1]
            assert focus[2] == "solid"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "BODY"  # that was all of them


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_headings_descend_one_by_one_and_landmarks_are_there(browser, pages, name):
    with opened(browser, pages[name]) as page:
        levels = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => +h.tagName[1])"
        )
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        for landmark in ("banner", "main", "contentinfo"):
            assert page.get_by_role(landmark).count() == 1
        assert page.evaluate("[...document.querySelectorAll('th')].every((th) => th.scope)")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the skip link
        assert page.evaluate("document.activeElement.id") == "main"


def test_hostile_text_runs_no_script(browser, pages):
    with opened(browser, pages["report"]) as page:
        alerts = []
        page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        page.reload()
        assert HOSTILE in page.locator(".tokens").first.inner_text()
        assert page.locator("img").count() == 0
        assert alerts == []


def test_on_paper_charts_keep_their_lines_and_links_go(browser, pages):
    with opened(browser, pages["report"]) as page:
        page.emulate_media(media="print")
        assert not page.get_by_role("navigation").is_visible()
        assert plot_of(page, "Loss").locator("svg").bounding_box()["height"] > 50
