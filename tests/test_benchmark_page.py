"""The page of a result, in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import page, stored

RESULT = next((Path(page.__file__).parent / "results").glob("*/results.json"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: install the system's package chromium to open the page"
)
# Opens every part, sorts and filters, and leaves what it found in the document.
PROBE = """
<script>
const found = {errors: window.seen, width: document.documentElement.scrollWidth, window: innerWidth};
const rows = () => [...document.querySelectorAll("#rows tbody tr")];
found.rows = rows().length;
const head = [...document.querySelectorAll("#rows th")].findIndex(h => h.textContent.includes("stock eager"));
const values = () => rows().map(r => r.cells[head].dataset.value).filter(v => v !== "").map(Number);
document.querySelectorAll("#rows th button")[head].click();
found.ascending = values();
document.querySelectorAll("#rows th button")[head].click();
found.descending = values();
const select = document.querySelector("select[data-column=family]");
select.value = "pool";
select.dispatchEvent(new Event("change"));
found.pool = rows().filter(r => !r.hidden).length;
found.headings = [...document.querySelectorAll("h2")].map(h => h.textContent);
found.bars = document.querySelectorAll(".bar i.faster").length + document.querySelectorAll(".bar i.slower").length;
found.barWidth = document.querySelector(".bar").getBoundingClientRect().width;
found.pictures = [...document.images].map(i => [i.alt, i.decode === undefined]);
found.count = document.getElementById("count").textContent;
const pre = document.createElement("pre");
pre.id = "found";
pre.textContent = JSON.stringify(found);
document.body.append(pre);
</script>
"""
CATCH = "<script>window.seen = []; window.addEventListener('error', e => window.seen.push(e.message), true);</script>"


def open_page(folder, text, width):
    path = folder / "probed.html"
    text = text.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{PROBE}</body>")
    path.write_text(text, encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    done = subprocess.run(
        [
            BROWSER,
            *options.split(),
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},900",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r'<pre id="found">(\{.*?)</pre>', done.stdout, re.S)
    assert match, console
    return json.loads(html.unescape(match[1])), console


@needs_browser
@pytest.mark.parametrize("width", [1300, 500])
def test_page_in_a_browser(tmp_path, width):
    record = stored.load(RESULT)
    pictures = sorted(RESULT.parent.glob("*.png"))
    found, console = open_page(tmp_path, page.render(record, pictures), width)
    assert found["errors"] == []
    assert console == []
    # Tables scroll in their own boxes: the page itself never does.
    assert found["width"] <= found["window"]
    assert found["rows"] == len(record["rows"])
    assert found["ascending"] == sorted(found["ascending"])
    assert found["descending"] == sorted(found["ascending"], reverse=True)
    assert len(found["ascending"]) == sum("eager" in r["speedup"] for r in record["rows"])
    assert found["pool"] == sum(r["family"] == "pool" for r in record["rows"])
    assert found["count"] == f"{found['pool']} cases"
    assert found["bars"] > 0
    assert found["barWidth"] > 100
    assert [alt for alt, _ in found["pictures"]] == [p.stem for p in pictures]
    for word in ("Summary", "Against each rival", "All cases", "Training", "Memory", "Machine"):
        assert any(word in h for h in found["headings"])


def test_page_needs_nothing_else():
    text = page.render(stored.load(RESULT), sorted(RESULT.parent.glob("*.png")))
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)
    assert "://" not in re.sub(r"<td[^>]*>.*?</td>", "", text, flags=re.S)


def test_page_shows_losses_and_failures(tmp_path):
    record = stored.load(RESULT)
    row = record["rows"][0]
    row.update(status="failed", note="<b>wrong</b>", speedup={}, seconds={}, share_of_limit=None, native=None)
    other = record["rows"][1]["speedup"]["eager"]
    other.update(median=0.4, q1=0.39, q3=0.41)
    text = page.render(record)
    assert "FAILED: &lt;b&gt;wrong&lt;/b&gt;" in text
    assert '<span class="slower">0.40x</span>' in text
    page.write(record, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == text
