"""`results/README.md` names every path of the layout, and the layout every path of the README."""

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

from kimi_recursive.layout import EvaluationFiles, Layout, Part, WorkFolder

ROOT = Path(__file__).parents[2]


def paths_of(place) -> set[str]:
    """Every path below a part of the layout, with `<name>` for what a path depends on."""
    found = set()
    for name, member in vars(type(place)).items():
        if isinstance(member, property | Part):
            value = getattr(place, name)
        elif inspect.isfunction(member) and not name.startswith("_"):
            names = [p for p in inspect.signature(member).parameters if p != "self"]
            if not names or member.__annotations__["return"].startswith("list") or "quick" in names:
                continue  # what exists, or a choice between two places
            value = getattr(place, name)(*(f"<{n}>" for n in names))
        else:
            continue
        if isinstance(value, Path):
            found.add(str(value))
        elif isinstance(value, WorkFolder):
            found.add(str(value.folder))
        elif is_dataclass(value):
            found |= paths_of(value)
    return found


def paths_of_readme() -> dict[str, set[str]]:
    """By heading the paths in the first column of the tables of paths."""
    found, heading, paths = {}, "", False
    for line in (ROOT / "results/README.md").read_text().splitlines():
        heading = line if line.startswith("#") else heading
        if line.startswith("| ") and not line.startswith(("| `", "| -")):
            paths = line.startswith("| path |")  # the heading of a table
        if paths and line.startswith("| `"):
            names = re.findall(r"`([^`]+)`", line.split("|")[1])
            found.setdefault(heading, set()).update(name.rstrip("/") for name in names)
    return found


def test_the_readme_and_the_layout_name_the_same_paths():
    readme = paths_of_readme()
    work = readme.pop("## The experiment directory")
    assert work == paths_of(WorkFolder(Path()))
    layout = Layout(Path())
    expected = {*paths_of(layout), str(layout.log("<rule>"))} - {str(layout.track_b.students)}
    assert set().union(*readme.values()) == expected


def test_names_hold_wildcards():
    run = Layout().run("{key}")
    assert str(run.sidecar) == "results/runs/{key}/sidecar"
    assert str(run.work.checkpoint(7)) == "results/runs/{key}/work/checkpoints/step_000007"
    assert str(Layout().log("evaluate", "{name}")) == "results/logs/evaluate/{name}.log"
    assert str(Layout().log("report")) == "results/logs/report.log"


def test_what_exists_is_found(tmp_path):
    layout = Layout(tmp_path)
    for path in (
        layout.evaluation("baseline").results, layout.evaluation("baseline").documents,
        layout.run("recursive_a_s0").work.metadata, layout.log("evaluate", "baseline"),
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert layout.evaluations() == [EvaluationFiles(tmp_path / "eval", "baseline")]
    assert [w.metadata for w in layout.works()] == [layout.run("recursive_a_s0").work.metadata]
    assert layout.logs_of("evaluate") == [layout.log("evaluate", "baseline")]
    assert Layout.of_work(layout.run("recursive_a_s0").work.folder) == layout
    assert Layout.of_work(tmp_path / "experiments/mine") is None


def test_no_rule_or_script_spells_a_name_below_results():
    for path in [ROOT / "Snakefile", *ROOT.glob("rules/*.smk"), *ROOT.glob("workflow/scripts/*")]:
        code = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"results/|\.parquet|\.json\b|/sidecar", code), path
