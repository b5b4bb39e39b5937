"""A run's report in a real browser, in light, in dark, narrow and on paper.

usage: report.py REPORT.html PICTURES   (needs chromium and websocket-client; PICTURES is a folder for screenshots)
"""

import pathlib
import sys
import time

from page import browser


def main():
    report, pictures = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
    pictures.mkdir(parents=True, exist_ok=True)
    with browser() as page:
        for name, width, scheme, media in [
            ("light", 860, "light", ""), ("dark", 860, "dark", ""), ("narrow", 390, "light", ""), ("paper", 860, "dark", "print"),
        ]:
            page.look(width, 1200, scheme)
            if media:
                page.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.call("Page.navigate", url=report.as_uri())
            page.until("document.readyState === 'complete' && document.querySelector('figure') !== null")
            time.sleep(0.2)
            height = page.run("document.documentElement.scrollHeight")
            page.look(width, min(height, 8000), scheme)
            if media:
                page.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
            # The page itself never scrolls sideways; tables do within their frame.
            assert page.run("document.documentElement.scrollWidth") <= width, name
            light = page.run("getComputedStyle(document.body).backgroundColor")
            assert (light == "rgb(255, 255, 255)") == (name != "dark"), (name, light)
            overlaps = page.run(OVERLAPS)
            assert overlaps == [], (name, overlaps)
            outside = page.run(OUTSIDE)
            assert outside == [], (name, outside)
            page.picture(pictures / f"report-{name}.png")
        assert page.complaints() == [], page.complaints()
        requests = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert all(url == report.as_uri() for url in requests), requests
    print("ok: the report in light, in dark, narrow and on paper")


# Texts of one picture that lie on each other, and texts that leave their picture.
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
    const all = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    return all.flatMap(([a, r], i) => all.slice(i + 1).filter(([b, s]) =>
        r.left + 1 < s.right && s.left + 1 < r.right && r.top + 3 < s.bottom && s.top + 3 < r.bottom).map(([b]) => [a, b]));
})"""
OUTSIDE = """[...document.querySelectorAll('svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(t => {
        const r = t.getBoundingClientRect();
        return r.left < frame.left - 1 || r.right > frame.right + 1 || r.bottom > frame.bottom + 2;
    }).map(t => t.textContent);
})"""


if __name__ == "__main__":
    main()
