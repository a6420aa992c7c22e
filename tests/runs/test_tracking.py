"""Metrics in trackers of others. What wandb and trackio are told is recorded by a stand-in."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from runs import PHASE

from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.phases import train_phase
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.spec import PhaseSpec, Record, RunFiles


class Run:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def other(request, monkeypatch) -> ModuleType:
    module = ModuleType(request.param)
    module.__spec__ = ModuleSpec(request.param, None)
    module.runs, module.config = [], {}
    module.init = lambda **options: module.runs.append(Run(**options)) or module.runs[-1]
    module.config = type("Config", (dict,), {"update": lambda s, v, **_: dict.update(s, v)})()
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_a_resumed_run_goes_on_in_the_same_run_and_a_new_one_does_not(other, tmp_path):
    def attempt(step, afresh=False):
        names = ["tensorboard", other.__name__]
        with ExperimentTracker(tmp_path, "mine", training_params={"lr": 1}, tracking=names) as run:
            run.start_afresh() if afresh else run.rewind(step - 1)
            run.save_metrics(step, {"loss": 0.5, "note": "text"})

    attempt(1, afresh=True)
    attempt(2)
    attempt(1, afresh=True)
    first, second, third = other.runs
    assert [run.logged for run in other.runs] == [[(s, {"loss": 0.5})] for s in (1, 2, 1)]
    assert first.options == second.options and first.options["name"].startswith("mine_")
    assert third.options["name"] != first.options["name"] and third.finished
    assert first.options["resume"] == "allow" and first.options["project"] == "kimi-recursive"
    assert other.config["training_params"] == {"lr": 1} and other.config["name"] == "mine"
    if other.__name__ == "wandb":
        assert first.options["mode"] == "offline" and first.options["id"] == first.options["name"]
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_a_phase_shows_its_metrics_where_it_was_asked_to(other, surgery_dir, tokens_dir, tmp_path):
    names = ("sidecar", "logs", "summary", "work")
    files = RunFiles(surgery_dir, tokens_dir, **{name: tmp_path / name for name in names})
    spec = PhaseSpec("a", PhaseSettings.from_mapping(PHASE | {"num_steps": 3}), 0)
    train_phase(spec, files, record=Record(name="x", tracking=[other.__name__]))
    [run] = other.runs
    assert [step for step, _ in run.logged] == [0, 2, 3] and run.finished
    assert {"loss", "lr_sidecar", "validation_loss_step_2"} <= run.logged[-1][1].keys()
    assert other.config["recursive"]["chunk_width"] == 8
    assert not list((tmp_path / "work/logs").iterdir()), "no TensorBoard that was not asked for"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlflow", "tracking: must be of tensorboard, trackio, wandb, got 'mlflow'"),
        ("wandb", r"tracking: wandb needs pip install 'kimi-recursive\[tracking\]'"),
    ],
)
def test_what_cannot_be_tracked_is_said_at_once(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_recursive.training.tracking.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=message):
        ExperimentTracker(tmp_path / "x", tracking=[name])
    assert not (tmp_path / "x").exists()
