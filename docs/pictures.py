"""Takes the pictures of these pages: charts of a real run's report, as a browser draws them.

python docs/pictures.py REPORT.html IMAGE.png "Title of a chart" ["Title of another" ...]

Needs Playwright (extra `dev`) and Chromium (`make test-browser` installs it).
"""

import argparse
from pathlib import Path

KEEP = """titles => {
    const figures = [...document.querySelectorAll("figure.chart")];
    const wanted = titles.map(
        title => figures.find(figure => figure.querySelector("h3").textContent.trim() === title));
    const missing = titles.filter((_, i) => !wanted[i]);
    if (missing.length) throw new Error("no chart is called " + missing.join(", "));
    const row = document.createElement("div");
    row.className = "charts";
    row.id = "picture";
    row.style.padding = "16px";
    row.append(...wanted);
    document.body.replaceChildren(row);
}"""


def take_picture(report: Path, image: Path, titles: list[str]) -> None:
    """The charts with these titles, beside each other."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
        width = max(640, 420 * len(titles))
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(report.resolve().as_uri())
        page.evaluate(KEEP, titles)
        page.locator("#picture").screenshot(path=image)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("titles", nargs="+")
    take_picture(**vars(parser.parse_args()))
