"""The phases, each from the one before: what trains, how runs resume, what may follow what."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from models import SMALL, make_base, make_wrapper, random_ids
from runs import LORA, PHASE, SETTINGS, same_run, train_into
from safetensors.torch import load_file

from kimi_recursive import load_model_with_config
from kimi_recursive.layout import SIDECAR_NAME
from kimi_recursive.model.adapter import Adapter, lora_config
from kimi_recursive.model.loading import load_base
from kimi_recursive.training.groups import parameter_groups
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.spec import LoadOptions
from kimi_recursive.training.surgery import insert_cells


def train(folder, phase, parent, tokens, changes=None, **options):
    return train_into(
        folder, phase, {**SETTINGS[phase], **(changes or {})}, parent, tokens, **options
    )


@pytest.fixture(scope="module")
def phases(tmp_path_factory, surgery_dir, tokens_dir) -> Path:
    """Runs of the three phases, each from the one before."""
    root = tmp_path_factory.mktemp("phases")
    parent = surgery_dir
    for phase in "abc":
        train(root / phase, phase, parent, tokens_dir)
        parent = root / phase / "sidecar"
    return root


@pytest.fixture(scope="module")
def longer(phases, tokens_dir) -> dict:
    """Phase b of the recursive arm over 12 steps, so that half a step of an arm is little."""
    folder, parent = phases.parent / "longer", phases / "a/sidecar"
    return train(folder, "b", parent, tokens_dir, {"num_steps": 12})


@torch.no_grad()
def test_each_phase_trains_what_it_should_and_the_base_can_be_had_back(phases, surgery_dir):
    ids = random_ids(2, 12)
    pretrained = load_base(surgery_dir.parent / "base")
    names = ["sidecar", "heads"]
    for phase, group in (("a", None), ("b", "lora"), ("c", "layers")):
        names += [group] if group else []
        logs = pl.read_parquet(phases / phase / "train_logs.parquet")
        assert [c for c in logs.columns if c.startswith("lr_")] == [f"lr_{n}" for n in names]
        peaks = {f"lr_{n}": SETTINGS[phase]["lr" if n == "sidecar" else f"lr_{n}"] for n in names}
        first, second = (logs.row(i, named=True) for i in (1, 2))
        for name, peak in peaks.items():
            assert first[name] == peak / 2 and second[name] == peak, "two steps of warm-up"
        summary = json.loads((phases / phase / "train_summary.json").read_text())
        assert list(summary["num_trainable_by_group"]) == names
        assert (
            sum(summary["num_trainable_by_group"].values()) == summary["num_trainable_parameters"]
        )
        model, _, _ = load_model_with_config(phases / phase / "work/checkpoints/step_000006/model")
        base_logits = model.base(ids).logits
        with model.disabled() as trained:
            assert torch.equal(trained(ids).logits, base_logits)
        assert torch.equal(base_logits, pretrained(ids).logits) == (phase == "a")
        if phase != "a":
            before = load_file(phases / chr(ord(phase) - 1) / "sidecar/sidecar.safetensors")
            after = model.cells_state_dict()
            changed = [k for k, v in after.items() if not torch.equal(v, before[k])]
            assert set(changed) == set(after), "the sidecar goes on training"
        changed = {
            name
            for name, p in model.base.named_parameters()
            if ".lora_" not in name
            and not torch.equal(p, pretrained.get_parameter(name.replace(".base_layer.", ".")))
        }
        assert all(name.startswith("model.layers.3.") for name in changed)
        assert bool(changed) == (phase == "c")
        assert torch.equal(model.drop_adapter()(ids).logits, pretrained(ids).logits)
    logs = pl.read_parquet(phases / "c/train_logs.parquet")
    assert logs["loss_pull"][1] == 0 and logs["loss_pull"][6] > 0
    assert logs["sampling_rate"].to_list()[1:] == pytest.approx([0.1 * i for i in range(6)])


def test_the_first_validation_of_a_phase_is_the_best_of_the_one_before(phases):
    for phase, before in (("b", "a"), ("c", "b")):
        logs = pl.read_parquet(phases / phase / "train_logs.parquet")
        best = json.loads((phases / before / "train_summary.json").read_text())
        assert logs["validation_loss_step_2"][0] == best["best_validation_loss"]


def test_phase_c_resumes_bit_for_bit(phases, tmp_path, tokens_dir):
    # In a folder as deep as the first, since a sidecar names its base by a relative path.
    again = phases.parent / "again"
    shutil.copytree(phases / "c/work", again / "c/work", symlinks=True)
    newest = again / "c/work/checkpoints/step_000006/model/layers.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    train(again / "c", "c", phases / "b/sidecar", tokens_dir)
    same_run(phases / "c", again / "c")


@pytest.mark.parametrize("change", ["parent", "load"])
def test_another_parent_or_way_to_load_starts_afresh(
    phases,
    surgery_dir,
    tmp_path,
    tokens_dir,
    capfd,
    change,
):
    shutil.copytree(phases, tmp_path / "p", symlinks=True)
    models = surgery_dir.parent  # a sidecar names its base by a relative path
    shutil.copytree(models, tmp_path / models.name)
    parent, load = tmp_path / "p/a/sidecar", LoadOptions()
    if change == "load":
        load = LoadOptions(dtype="float32")
    else:
        config = json.loads((parent / "recursive_config.json").read_text())
        (parent / "recursive_config.json").write_text(json.dumps(config | {"halt_margin": 0.1}))
    train(tmp_path / "p/b", "b", parent, tokens_dir, load=load)
    said = capfd.readouterr().err.split("starting afresh, ")[1].splitlines()[0]
    assert change in said


def test_a_phase_starts_from_the_one_before(phases, surgery_dir, tokens_dir, tmp_path):
    for phase, parent, message in (
        ("b", surgery_dir, r"phase b starts from a model of phase a; .* is not trained"),
        ("b", surgery_dir.parent / "base", "is not trained"),
        ("c", phases / "a/sidecar", "phase c starts from a model of phase b; .* is of phase a"),
        ("a", phases / "b/sidecar", "phase a starts from a base or untrained cells; .* phase b"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, phase, parent, tokens_dir)
    with pytest.raises(ValueError, match="phase must be one of a, b, c, got 'd'"):
        train_into(tmp_path, "d", PHASE, phases, tokens_dir)
    with pytest.raises(ValueError, match=r"arm must be one of recursive, .+, got 'x'"):
        train_into(tmp_path, "a", PHASE, phases, tokens_dir, arm="x")
    with pytest.raises(
        ValueError, match="was trained as an arm of kind recursive and cannot continue as"
    ):
        train(tmp_path, "b", phases / "a/sidecar", tokens_dir, arm="single_pass")
    for phase in "abc":  # more of the same phase is allowed
        again = train(tmp_path / f"more_{phase}", phase, phases / phase / "sidecar", tokens_dir)
        before = json.loads((phases / phase / "train_summary.json").read_text())
        assert again["validation"][0]["validation_loss_step_2"] == before["best_validation_loss"]
    with pytest.raises(ValueError, match="trained with r 2, not 3"):
        lora = {"lora": {**LORA, "rank": 3}}
        train(tmp_path / "other", "b", phases / "b/sidecar", tokens_dir, changes=lora)


def test_the_arms_of_phase_b_are_matched(longer, surgery_dir, tokens_dir, tmp_path):
    train(tmp_path / "va", "a", surgery_dir, tokens_dir, arm="single_pass")
    with pytest.raises(
        ValueError, match="does not name the number of inner steps of the recursive arm"
    ):
        train(tmp_path / "f", "b", tmp_path / "va/sidecar", tokens_dir, arm="single_pass_flops")
    arms = {
        arm: train(
            tmp_path / arm,
            "b",
            tmp_path / "va/sidecar",
            tokens_dir,
            {"num_steps": 12},
            arm=arm,
            overrides={"max_inner_steps": 2},
        )
        for arm in ("single_pass", "single_pass_flops")
    }
    single_pass, flops = arms["single_pass"], arms["single_pass_flops"]
    assert single_pass["num_trainable_parameters"] == longer["num_trainable_parameters"]
    assert single_pass["training_tokens"] == longer["training_tokens"]
    assert single_pass["training_flops"] < longer["training_flops"]
    dearest_step = 1.2 * flops["training_flops"] / flops["num_steps"]  # prefixes differ in length
    assert abs(flops["training_flops"] - longer["training_flops"]) <= dearest_step / 2


def test_the_base_trains_without_cells(phases, longer, surgery_dir, tokens_dir, tmp_path):
    """The arms `vanilla` and `vanilla_flops`: plain fine-tuning of what phases b and c train."""
    with pytest.raises(ValueError, match="arm 'vanilla' trains in the phases b, c alone"):
        train(tmp_path / "a", "a", surgery_dir, tokens_dir, arm="vanilla")
    with pytest.raises(ValueError, match="phase b of the arm 'vanilla' starts from a base or untr"):
        train(tmp_path / "b", "b", phases / "a/sidecar", tokens_dir, arm="vanilla")
    parent, summaries = surgery_dir, {}
    for phase in "bc":
        folder = tmp_path / f"vanilla_{phase}"
        summaries[phase] = train(folder, phase, parent, tokens_dir, arm="vanilla")
        parent = folder / "sidecar"
    assert list(summaries["b"]["num_trainable_by_group"]) == ["lora"]
    assert list(summaries["c"]["num_trainable_by_group"]) == ["lora", "layers"]
    recursive = json.loads((phases / "b/train_summary.json").read_text())
    assert summaries["b"]["training_tokens"] == recursive["training_tokens"]
    flops = summaries["b"]["training_flops"]
    assert flops < recursive["training_flops"] / 2
    logs = pl.read_parquet(tmp_path / "vanilla_b/train_logs.parquet")
    assert set(logs["sampling_rate"].drop_nulls()) == {0.0}, "the base reads the text as it is"
    assert set(logs["loss_masked"].drop_nulls()) == {0.0} and logs["loss_final"][1] > 1
    last = tmp_path / "vanilla_c/work/checkpoints/step_000006/model"
    model, _, config = load_model_with_config(last)
    assert config.max_inner_steps == 0 and not model.active
    untrained = load_file(surgery_dir / SIDECAR_NAME)
    assert all(torch.equal(v, untrained[k]) for k, v in model.cells_state_dict().items())
    ids = random_ids(2, 12)
    assert torch.equal(model(ids).logits, model.base(ids).logits)
    pretrained = load_base(surgery_dir.parent / "base")
    assert not torch.equal(model.base(ids).logits, pretrained(ids).logits)
    steps, depth = {"num_steps": 12}, {"max_inner_steps": 2}
    equal = train(
        tmp_path / "f", "b", surgery_dir, tokens_dir, steps, arm="vanilla_flops", overrides=depth
    )
    dearest_step = 1.2 * equal["training_flops"] / equal["num_steps"]
    assert abs(equal["training_flops"] - longer["training_flops"]) <= dearest_step / 2


def test_phase_c_needs_a_base_in_float32():
    wrapper = make_wrapper(make_base("kimi").to(torch.bfloat16))
    wrapper.adapter = Adapter(wrapper.base, wrapper.layers)
    wrapper.adapter.add_lora(lora_config(wrapper.base, wrapper.layers, **LORA), seed=0)
    with pytest.raises(ValueError, match=r"this base is torch.bfloat16: set its dtype"):
        parameter_groups(wrapper, "c", PhaseSettings.from_mapping(SETTINGS["c"]), 0)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_gate_of_the_feedback_may_start_before_the_cells(tokens_dir, tmp_path, feedback):
    """The cells of an arm without feedback do not wait for it."""
    make_base("kimi").save_pretrained(tmp_path / "base")
    sizes = {**SMALL, "max_inner_steps": 1, "use_token_feedback": feedback}
    insert_cells(tmp_path / "base", sizes, 0, tmp_path / "surgery")
    changes = {"num_steps": 2, "warmup_steps": 0, "feedback_only_steps": 2}
    train(tmp_path / "run", "a", tmp_path / "surgery", tokens_dir, changes)
    logs = pl.read_parquet(tmp_path / "run/train_logs.parquet")
    assert (logs["lr_sidecar"].drop_nulls().max() == 0) == feedback
    assert ("lr_feedback" in logs.columns) == feedback
    if feedback:
        assert logs["lr_feedback"].drop_nulls().min() > 0
    model = "run/work/checkpoints/step_000002/model"
    before, after = (load_file(tmp_path / folder / SIDECAR_NAME) for folder in ("surgery", model))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert ("refine_cells" in moved) != feedback and ("feedback" in moved) == feedback


def test_tokens_that_stop_on_their_own_are_trained_in_every_phase(tokens_dir, tmp_path):
    make_base("kimi").save_pretrained(tmp_path / "base")
    insert_cells(tmp_path / "base", {**SMALL, "halting": "expected"}, 0, tmp_path / "surgery")
    changes, parent = {"num_steps": 2, "warmup_steps": 0}, tmp_path / "surgery"
    for phase in "ab":
        train(tmp_path / phase, phase, parent, tokens_dir, changes)
        logs = pl.read_parquet(tmp_path / phase / "train_logs.parquet").drop_nulls("loss_final")
        assert set(logs["loss_halt"]) == set(logs["loss_len"]) == {0.0}
        assert (logs["loss_masked"].max() > 0) == (phase == "b"), "of step 0, which trains"
        assert 1 < logs["loss_ponder"].min() < logs["loss_ponder"].max() < 3
        model = tmp_path / phase / "work/checkpoints/step_000002/model"
        before, after = (load_file(folder / SIDECAR_NAME) for folder in (parent, model))
        assert not any(name.startswith("boundary") for name in after)
        moved = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
        assert {"refine_cells", "halting"} <= moved
        parent = tmp_path / phase / "sidecar"
