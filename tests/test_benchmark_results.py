"""Results: stored, compared, and as the README shows them."""

import json
from pathlib import Path

import jsonschema
import pytest
from benchmark_runs import RESULTS

from benchmarks import __main__ as cli
from benchmarks import (
    choices,
    compare,
    markdown,
    stored,
)


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_readme_is_what_was_measured(result):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    folder = result.parent.relative_to(RESULTS.parents[1]).as_posix()
    assert markdown.section(json.loads(result.read_text()), folder) in readme
    assert (result.parent / "speedup.png").exists()


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/gpu.json")), ids=lambda path: path.parent.name)
def test_readme_is_what_was_measured_on_gpus(result):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    assert markdown.gpu_part(json.loads(result.read_text())) in readme


def stored_run(tmp_path, name, **rows):
    """A record with rows of the given ratios: ``(q1, median, q3)`` or a status."""
    record = cli.Record({}, cli.environment(), {"fastnn": "fastnn", "eager": "stock"}).as_json()
    record["complete"] = True
    for key, value in rows.items():
        row = {
            "id": key,
            **dict.fromkeys(("op", "shape", "origin", "layout", "note"), ""),
            **dict.fromkeys(("native", "torch_reason", "flops", "bytes", "limit", "share_of_limit")),
            "family": "conv",
            "dtype": "fp32",
            "direction": "forward",
            "runs": 1,
            "status": value if isinstance(value, str) else "ok",
            **{k: {} for k in ("seconds", "speedup", "cold_seconds", "cold_speedup", "overhead_seconds")},
            "peer_notes": {},
        }
        if not isinstance(value, str):
            q1, median, q3 = value
            row["speedup"] = {"eager": {"q1": q1, "median": median, "q3": q3}}
        record["rows"].append(row)
    stored.validate(record)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_compare_finds_what_became_slower(tmp_path, capsys):
    steady = (1.99, 2.0, 2.01)
    before = stored_run(
        tmp_path, "a", one=steady, two=steady, noisy=(1.5, 2.0, 2.5), gone=steady, bad="failed"
    )
    same = stored_run(
        tmp_path, "b", one=(1.9, 1.92, 1.94), two=(2.05, 2.1, 2.11), noisy=(1.3, 1.7, 2.1), bad="failed"
    )
    slower = stored_run(tmp_path, "c", one=(1.65, 1.667, 1.68), two=steady, noisy=steady, fresh=steady)
    wrong = stored_run(tmp_path, "d", one=steady, two="failed", noisy=steady)
    assert cli.main(["compare", str(before), str(same / "results.json")]) == 0
    assert "only in the first: gone" in capsys.readouterr().out
    assert cli.main(["compare", str(before), str(slower)]) == 1
    out = capsys.readouterr().out
    assert "-16.6%" in out
    assert "1 slower, 0 faster, 0 broken" in out
    assert "only in the second: fresh" in out
    assert cli.main(["compare", str(slower), str(before)]) == 1, "what failed only now is broken"
    capsys.readouterr()
    assert cli.main(["compare", str(before), str(wrong)]) == 1
    assert "BROKEN two: FAILED" in capsys.readouterr().out
    assert cli.main(["compare", str(before), str(slower), "--tolerance", "0.3"]) == 0


def test_compare_finds_a_family_that_became_slower(tmp_path):
    before, after = (
        stored_run(tmp_path, name, **{f"case{i}": (m - 0.01, m, m + 0.01) for i in range(6)})
        for name, m in (("a", 1.0), ("b", 0.93))
    )
    found = compare.compare(stored.load(before), stored.load(after))
    assert all(c.verdict == "same" for c in found.changes)
    assert found.regressions == ["all of conv fp32 forward"]


def test_compare_tells_runs_that_differ(tmp_path):
    before, after = (stored.load(stored_run(tmp_path, n, one=(1.0, 1.0, 1.0))) for n in "ab")
    after["environment"]["threads"] += 1
    after["complete"], after["note"] = False, "Stopped by ^C"
    warnings = compare.compare(before, after).warnings
    assert any("differ in threads" in w for w in warnings)
    assert any("second result is partial: Stopped" in w for w in warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(version=1), "older schema version 1"),
        (lambda r: r.update(version=99), "newer schema version 99"),
        (lambda r: r.pop("version"), "names no version"),
        (lambda r: r.update(schema="other"), "not a result of this suite"),
        (lambda r: r.pop("rows"), "does not fit the schema"),
        (lambda r: r["rows"][0].update(status="fine"), "does not fit the schema at rows/0/status"),
    ],
)
def test_result_that_cannot_be_read(tmp_path, capsys, change, words):
    folder = stored_run(tmp_path, "a", one=(1.0, 1.0, 1.0))
    record = json.loads((folder / "results.json").read_text())
    change(record)
    (folder / "results.json").write_text(json.dumps(record))
    assert cli.main(["compare", str(folder), str(folder)]) == 2
    assert words in capsys.readouterr().out
    assert cli.main(["page", str(folder)]) == 2


def test_result_that_is_no_result(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert cli.main(["page", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().out
    assert cli.main(["page", str(tmp_path / "nothing.json")]) == 2
    assert "cannot read" in capsys.readouterr().out


def test_failed_row_has_no_speedup_by_the_schema(tmp_path):
    record = stored.load(stored_run(tmp_path, "a", one="failed"))
    record["rows"][0]["speedup"] = {"eager": {"q1": 1.0, "median": 1.0, "q3": 1.0}}
    with pytest.raises(jsonschema.ValidationError):
        stored.validate(record)


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_committed_result_fits_the_schema(result):
    record = stored.load(result)
    assert record["complete"]
    assert all(t["status"] == "ok" for t in record["training"])


@pytest.mark.parametrize("whole", [False, True], ids=["results.json", "gpu.json"])
def test_markdown_of_a_gpu(tmp_path, whole):
    """A result of this machine, as if a GPU had made it: it goes between lines of its own."""
    record = json.loads(next(Path("benchmarks/results").glob("*/results.json")).read_text())
    record["settings"]["device"] = "cuda"
    record["environment"]["gpu"] = {"name": "a GPU", "driver": "1.2"}
    result, readme = tmp_path / "r.json", tmp_path / "README.md"
    result.write_text(json.dumps({"schema": "fastnn-gpu", "suite": record} if whole else record))
    frame = f"before\n{markdown.BEGIN_GPU}\nnothing yet\n{markdown.END_GPU}\nafter {markdown.BEGIN} x {markdown.END}\n"
    readme.write_text(frame)
    markdown.main(result, readme)
    made = markdown.gpu_section(record)
    assert readme.read_text() == frame.replace("nothing yet", made)
    assert "on a GPU (driver 1.2)" in made
    assert "| conv | fp32 | forward |" in made
    result.write_text(json.dumps({"schema": "fastnn-gpu", "suite": None}))
    with pytest.raises(SystemExit, match="left a result"):
        markdown.main(result, readme)


ROWS = [
    {
        "ceilings": {"copy": 4e12, "bf16": 7e14, "fp16": 7e14, "fp32": 5e13},
        "gpu": "a GPU",
        "capability": "9.0",
        "multiprocessors": 132,
    }
    | {"torch": "2.11.0"},
    {"row": "a call", "stock": {"torch": 3e-6, "cudnn": 2e-6}, "stock_backward": {"torch": 8e-6}},
    {
        "row": "a call",
        "op": "conv2d",
        "calls": "some",
        "seconds": {"torch": 3e-6, "kernel": 1e-6},
        "dropped": {},
    },
    {
        "row": "a call",
        "op": "conv2d_backward",
        "calls": "back",
        "seconds": {"torch": 4e-6, "kernel": 9e-6},
        "dropped": {},
    },
    {"row": "another", "stock": {"torch": 3e-6}, "stock_backward": {}},
    {
        "row": "another",
        "op": "conv2d",
        "calls": "other",
        "seconds": {"torch": 3e-6},
        "dropped": {"kernel": "wrong"},
    },
]


def test_rows_of_a_gpu(tmp_path):
    """A table of what was measured, and the choices that follow from it."""
    text = markdown.gpu_part({"rows": ROWS, "suite": None})
    assert "| a call | 2 (cudnn) | 1 (kernel) | 2.00 | 8 (torch) | 9 (kernel) | 0.89 |" in text
    assert "| another | 3 (torch) | left out: kernel |  |  |  |  |" in text
    result = tmp_path / "gpu.json"
    result.write_text(json.dumps({"schema": "fastnn-gpu", "suite": None, "rows": ROWS}))
    record = choices._record(result)
    assert record["environment"]["gpu"] == {"name": "a GPU", "capability": "9.0"}
    assert choices.choices([record]) == {
        "9.0": {
            "conv2d": {
                "some": "kernel",
                # 3 us and 8 in all by torch, 1 and 4 where the kernel is forward and torch's op backward.
                "some with gradients": "kernel",
                "other": "torch",
            },
            "conv2d_backward": {"back": "torch"},
        }
    }


def test_markdown_goes_between_its_lines(tmp_path):
    result = tmp_path / "one" / "results.json"
    result.parent.mkdir()
    result.write_text(next(RESULTS.glob("*/results.json")).read_text())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    markdown.main(result, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "(one/speedup.png)" in text
    assert "| linear_relu | 64x784 128x784 |" in text
