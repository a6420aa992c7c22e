"""What `plan` predicts without weights is what real runs need, within 10 %."""

import json
import os
import shutil
from dataclasses import replace

import polars as pl
import pytest
import torch
import yaml
from commands import call
from models import CONFIGS, make_base
from project import ROOT, TINY

from kimi_recursive.cli.plan import plan_text
from kimi_recursive.evaluation.flops import forward_flops_per_token
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.matrix.runs import all_trainings, settings_of
from kimi_recursive.matrix.settings import MODEL_KEYS, Config, read_config
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.loading import build_wrapper
from kimi_recursive.plan import estimate as plan_module
from kimi_recursive.plan import measure as measure_module
from kimi_recursive.plan.estimate import PeakMemory, base_shape, gpus_needed, plan
from kimi_recursive.plan.measure import predict
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.budget import cumulative_training_flops
from kimi_recursive.training.groups import parameter_groups
from kimi_recursive.training.objective import build_objective
from kimi_recursive.training.settings import PhaseSettings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    (path.parent / "docs").mkdir()
    recursive = {**TINY["recursive"], "use_token_feedback": True}
    path.write_text(yaml.safe_dump({**TINY, "recursive": recursive, "phases": ["a", "b", "c"]}))
    return read_config([ROOT / "config/config.yaml", path])


@pytest.fixture(scope="module")
def planned(config):
    return plan(config)


def real_wrapper(config, phase="a"):
    """The same model with weights."""
    base_config, _ = base_shape(config)
    torch.manual_seed(0)
    base = type(make_base("kimi"))(base_config).eval()
    install_fast_kda(base)
    settings = Config.from_mapping(config)
    changed = {**settings.recursive_part(MODEL_KEYS), **settings.phase_overrides(phase)}
    changed |= {"recursive_enabled": True}
    return build_wrapper(base, RecursiveConfig.from_dict(changed))


def near(value, expected):
    return expected == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("phase", ["a", "b", "c"])
def test_a_step_needs_what_was_planned(config, planned, phase):
    run, settings = planned["runs"][phase], PhaseSettings.from_mapping(config["training"][phase])
    wrapper = real_wrapper(config, phase)
    for before in "abc"[: "abc".index(phase)]:
        of_before = PhaseSettings.from_mapping(config["training"][before])
        parameter_groups(wrapper, before, of_before, 0)
    groups = parameter_groups(wrapper, phase, settings, 0)
    trained = [p for members in groups.values() for p in members.values()]
    assert run["num_trainable"] == sum(p.numel() for p in trained)
    objective = build_objective(wrapper, settings.num_steps, settings, 0)
    windows = torch.randint(3, 300, (settings.batch_size, settings.context_length + 1))
    cumulative = cumulative_training_flops(objective, Batch.of_windows(windows), settings.num_steps)
    assert near(run["flops"], cumulative[-1] / settings.num_steps)
    peaks = []
    for step in range(settings.num_steps):
        with PeakMemory(wrapper.parameters()) as memory:
            objective(Batch.of_windows(windows), step)[0].backward()
        objective.zero_grad(set_to_none=True)
        peaks.append(memory.peak)
    assert near(run["peak_bytes"], max(peaks))
    assert run["weight_bytes"] == sum(p.numel() * 4 for p in wrapper.parameters())


def test_variants_are_planned_and_all_trainings_are_counted(config, monkeypatch):
    """One variant differs from phase a on, the other from b on. A run costs its inner steps."""

    def cost(wrapper, *_):
        steps = wrapper.config.max_inner_steps
        return {"flops": 10**steps, "weight_bytes": 0, "peak_bytes": 0}

    for name in ("_training", "_evaluation"):
        monkeypatch.setattr(plan_module, name, cost)
    deep, longer = {"recursive": {"max_inner_steps": 4}}, {"training": {"b": {"num_steps": 9}}}
    config = {**config, "phases": ["a", "b"], "seeds": [0, 1], "repeat": True}
    config |= {"variants": {"deep": deep, "longer": longer}}
    found = plan(config)
    flops = {name: run["flops"] for name, run in found["runs"].items()}
    usual = 10 ** config["recursive"]["max_inner_steps"]
    assert flops == {
        "evaluation": usual, "a": usual, "b": usual,
        "evaluation-deep": 10**4, "a-deep": 10**4, "b-deep": 10**4,
        "evaluation-longer": usual, "b-longer": usual,
    }  # fmt: skip
    typed = Config.from_mapping(config)
    costs = [
        settings_of(typed, run).num_steps * (10**4 if run.variant == "deep" else usual)
        for run in all_trainings(typed).values()
    ]
    assert found["trainings"] == {"num_trainings": len(costs), "flops": sum(costs)}


@pytest.mark.parametrize(
    ("key", "value", "more_flops"),
    [("gradient_accumulation_steps", 2, 1.0), ("gradient_checkpointing", True, 1.2)],
)
def test_the_plan_knows_what_saves_memory(config, planned, key, value, more_flops):
    base_config, dtype = base_shape(config)
    settings = Config.from_mapping(config)
    changed = replace(settings.training["a"], **{key: value})
    recursive = {**settings.recursive_part(MODEL_KEYS), **settings.phase_overrides("a")}
    with plan_module._without_storage(dtype):
        wrapper = plan_module._wrapper(base_config, dtype, {**recursive, "recursive_enabled": True})
        found = plan_module._training(wrapper, "a", changed)
    usual = planned["runs"]["a"]
    assert found["peak_bytes"] < 0.8 * usual["peak_bytes"]
    assert found["tokens"] == usual["tokens"]
    assert found["flops"] >= (more_flops - 1e-6) * usual["flops"]
    assert found["flops"] < 1.6 * usual["flops"]


def test_an_evaluation_needs_what_was_planned(config, planned):
    run, settings = planned["runs"]["evaluation"], config["evaluation"]
    wrapper = real_wrapper(config)
    shape = (settings["batch_size"], settings["context_length"])
    ids = torch.randint(3, 300, shape)
    assert run["flops"] / run["tokens"] == forward_flops_per_token(wrapper, ids)
    with torch.no_grad(), PeakMemory(wrapper.parameters()) as memory:
        wrapper(ids)
    assert near(run["peak_bytes"], memory.peak)
    assert planned["num_parameters"]["base"] == sum(p.numel() for p in wrapper.base.parameters())


@pytest.mark.workflow
def test_a_checkpoint_of_the_workflow_is_as_large_as_planned(project, config):
    recursive = {**config["recursive"], "use_token_feedback": False}  # as in the project
    planned = plan({**config, "recursive": recursive, "phases": ["a", "b"]})
    for phase in "ab":
        work = project.folder / f"results/runs/recursive_{phase}_s0/work/checkpoints"
        step = sorted(work.glob("step_*"))[-1]
        weights = sum(
            f.stat().st_size for f in step.rglob("*") if f.suffix in (".pt", ".safetensors")
        )
        summary = json.loads((work.parents[1] / "train_summary.json").read_text())
        assert planned["runs"][phase]["num_trainable"] == summary["num_trainable_parameters"]
        assert weights == pytest.approx(planned["runs"][phase]["checkpoint_bytes"], rel=0.2)


def test_the_plan_of_a_base_in_few_bits(config, tmp_path):
    """Without the libraries. What they save is measured in `tests/quantized`."""
    CONFIGS["llama"]().save_pretrained(tmp_path)
    base = {**config["base"], "kind": "pretrained", "path": str(tmp_path)}
    training = {"a": {**config["training"]["a"], "optimizer": "adamw_8bit"}}
    usual = plan({**config, "base": base, "phases": ["a"]})["runs"]
    base |= {"quantization": "4bit"}
    found = plan({**config, "base": base, "phases": ["a"], "training": training})["runs"]
    sizes = [p.numel() for n, p in make_base("llama").named_parameters() if "_proj" in n]
    for name, run in found.items():
        saved = usual[name]["weight_bytes"] - run["weight_bytes"]
        assert saved == pytest.approx((4 - 0.516) * sum(sizes), rel=1e-3)
        assert run["peak_bytes"] - usual[name]["peak_bytes"] == 4 * max(sizes), "one is opened"
    assert found["a"]["optimizer_bytes"] < usual["a"]["optimizer_bytes"]


def test_memory_that_is_freed_is_not_counted():
    with PeakMemory([]) as memory:
        for _ in range(5):
            torch.zeros(1000).exp_()
        kept = torch.zeros(500)
        view = kept.view(5, 100).t()
    assert memory.peak == 4000 + 2000 or memory.peak == 4000
    assert memory.now == 2000 and view is not None


def test_a_run_is_spread_over_as_many_gpus_as_it_needs():
    run = {"weight_bytes": 80, "optimizer_bytes": 5, "peak_bytes": 5}
    assert gpus_needed(run, 100) == 1 and gpus_needed(run, 99) == 2


def test_a_whole_run_is_predicted_from_steps_and_a_validation():
    """16 steps of 2 s, the last 7 behind a validation of 10 s, 100 tokens each."""
    seconds = [2.0 * step + 10.0 * (step > 8) for step in range(1, 17)]
    rate = [100 * step / clock for step, clock in enumerate(seconds, 1)]
    logs = {"step": range(17), "tokens": range(0, 1700, 100), "tokens_per_second": [None, *rate]}
    found = predict(pl.DataFrame(logs), {"num_steps": 50, "eval_interval": 25})
    assert found["minutes"] == pytest.approx((50 * 2 + 2 * 10) / 60)
    assert found["tokens_per_second"] == pytest.approx(50 * 100 / 120)


def test_measuring_runs_everything_once(config, planned, monkeypatch):
    assert measure_module._alone(os.getpid) != os.getpid(), "a process of its own"
    monkeypatch.setattr(measure_module, "_alone", lambda function, *args: function(*args))
    config = {**config, "phases": ["a", "b"]}
    runs = {name: planned["runs"][name] for name in ("evaluation", "a", "b")}
    found = measure_module.measure(config, runs)
    assert found.keys() == runs.keys()
    for name, run in found.items():
        assert run["tokens_per_second"] > 0
        assert run["resident_bytes"] > planned["runs"][name]["peak_bytes"]
        assert (name == "evaluation") or run["minutes"] > 0
    text = plan_text({**planned, "measured": found}, 2**30, 1e12)
    assert "measured here:" in text and text.count("phase b") == 2
    too_much = {"a": {**runs["a"], "peak_bytes": 2**50}}
    with pytest.raises(ValueError, match=r"--measure: a needs 1048576\.0 GiB, .* are free"):
        measure_module.measure(config, too_much)


def test_the_command_shows_the_plan(tmp_path, monkeypatch, capsys, planned):
    monkeypatch.setattr(plan_module, "plan", lambda _config: planned)
    monkeypatch.chdir(tmp_path)
    for name in ("config", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name)
    small = {**TINY, "phases": ["a"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small))
    assert call(monkeypatch, "plan", "--configfile", "mine.yaml", "--gpu-memory", "24") == 0
    out = capsys.readouterr().out
    assert "phase a" in out and "GPUs of 24 GiB" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--config", "no.yaml"), "no.yaml: no such file"),
        (("--mfu", "0"), "--mfu: must be above 0"),
        (("--config", "hub.yaml"), "set base.config_json to its config.json"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("config", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name)
    hub = {"base": {"kind": "pretrained", "hub_id": "no/where", "revision": "abc"}}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump({**hub, "phases": ["a"]}))
    assert call(monkeypatch, "plan", *arguments) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1


def test_a_base_of_too_few_positions_is_refused_as_in_the_workflow(config, tmp_path):
    CONFIGS["gpt2"]().save_pretrained(tmp_path)  # 128 positions
    config = {**config, "base": {**config["base"], "kind": "pretrained", "path": str(tmp_path)}}
    longer = {"context_length": 160}
    evaluation = {**config["evaluation"], **longer}
    with pytest.raises(ValueError, match=r"evaluation.context_length: 160 tokens are more than"):
        plan({**config, "evaluation": evaluation})
    training = {**config["training"], "b": {**config["training"]["b"], **longer}}
    with pytest.raises(ValueError, match=r"training.b.context_length: 160 tokens are more than"):
        plan({**config, "training": training})


def test_the_columns_of_a_plan_stand_apart():
    run = {
        "num_trainable": 48_000_000_000, "weight_bytes": 2**40, "optimizer_bytes": 2**42,
        "peak_bytes": 2**41, "checkpoint_bytes": 2**43, "flops": 1e18, "tokens": 1e4,
    }  # fmt: skip
    found = {
        "num_parameters": {"base": 1, "sidecar": 1}, "dtype": "float32", "runs": {"a": run},
        "trainings": {"num_trainings": 3, "flops": 7.2e21},
    }  # fmt: skip
    text = plan_text(found, 2**30, 1e18)
    assert "3 trainings" in text and "at most 7.2e+21 FLOPs, 2 hours" in text
    row = next(x for x in text.splitlines() if "phase a" in x)
    assert row.split()[2:] == [
        "48.00B", "1024.00", "4096.00", "2048.00", "7168.00", "7965", "1e+05", "10000", "8192.000",
    ]  # fmt: skip


def test_the_released_config_is_read_as_it_is():
    """1-indexed lists of layers, `auto_map` to code that is not run: transformers' own class."""
    settings = read_config([ROOT / "config/config.yaml", ROOT / "config/kimi48b.yaml"])
    base = {**settings["base"], "config_json": str(ROOT / settings["base"]["config_json"])}
    found, dtype = base_shape({**settings, "base": base})
    assert type(found) is type(CONFIGS["kimi"]()) and dtype == torch.bfloat16
    full = [i + 1 for i, kind in enumerate(found.layer_types) if kind == "full_attention"]
    assert full == [4, 8, 12, 16, 20, 24, 27] and found.mlp_layer_types[:2] == ["dense", "sparse"]
    with torch.device("meta"):
        base = type(make_base("kimi"))(found)
    assert sum(p.numel() for p in base.parameters()) == 49_122_675_072
