"""Phases B and C: what trains inside the base, how it is saved, and how it is undone."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import SMALL, make_base, make_wrapper, perturb, random_ids
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_training import PHASE, same

from kimi_recursive import load_model_with_config
from kimi_recursive.adapter import Adapter, every_nth_layer, lora_config
from kimi_recursive.kda import install_fast_kda
from kimi_recursive.loader import load_base, load_sidecar, save_sidecar, sidecar_facts
from kimi_recursive.losses import DraftRepair, chunk_losses, corrupt
from kimi_recursive.surgery import insert_cells
from kimi_recursive.train import _parameter_groups, train_phase

LORA = {"rank": 2, "alpha": 4, "targets": "all-linear"}
SETTINGS = {
    "a": PHASE,
    "b": {**PHASE, "lr_lora": 3e-3, "lora": LORA, "scheduled_sampling": 0.5},
    "c": {
        **PHASE, "lr_lora": 1e-3, "scheduled_sampling": 0.5, "lr_layers": 1e-3,
        "unfreeze_every": 4, "l2_pull": 0.1,
    },
}  # fmt: skip


def adapted(base, layers=(), std=0.3, **config):
    """A perturbed wrapper with LoRA that does something, and with changed whole layers."""
    wrapper = perturb(make_wrapper(base, **config))
    adapter = wrapper.adapter = Adapter(wrapper)
    adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
    if layers:
        adapter.unfreeze(layers)
    changed = [p for n, p in adapter.lora_parameters().items() if "lora_B" in n]
    changed += adapter.layer_parameters().values()
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(torch.randn_like(parameter) * std)
    return wrapper


@torch.no_grad()
def test_fresh_lora_changes_nothing_trained_lora_does_and_dropping_it_restores(base):
    ids = random_ids(2, 12)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    before, modules = base(ids).logits, [type(m) for m in base.modules()]
    wrapper = make_wrapper(base)
    adapter = wrapper.adapter = Adapter(wrapper)
    adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
    assert torch.equal(base(ids).logits, before)
    for name, parameter in adapter.lora_parameters().items():
        if "lora_B" in name:
            parameter.add_(torch.randn_like(parameter))
    with wrapper.disabled() as trained:
        assert not torch.allclose(trained(ids).logits, before, atol=1e-2)
    adapter.unfreeze(range(len(wrapper.layers)))
    for parameter in adapter.layer_parameters().values():
        parameter.mul_(1.5)
    pretrained = wrapper.drop_adapter()
    assert wrapper.adapter is None and torch.equal(pretrained(ids).logits, before)
    assert [type(m) for m in base.modules()] == modules
    state = base.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert not hasattr(base, "peft_config")


def test_lora_is_on_the_top_third_and_on_the_targets_alone(kind):
    base = make_base(kind)
    wrapper = make_wrapper(base)
    num_layers = len(wrapper.layers)
    first = {3: 2, 4: 2}[num_layers]
    wrapper.adapter = Adapter(wrapper)
    wrapper.adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
    for i, layer in enumerate(wrapper.layers):
        found = sum(isinstance(m, BaseTunerLayer) for m in layer.modules())
        assert (found > 0) == (i >= first)
    wrapper.drop_adapter()
    target = {"gpt2": "c_attn"}.get(kind, "o_proj")
    wrapper.adapter = Adapter(wrapper)
    wrapper.adapter.add_lora(lora_config(wrapper, 2, 4, [target]), seed=0)
    assert len(wrapper.adapter.lora_parameters()) == 2 * (num_layers - first)
    wrapper.drop_adapter()
    with pytest.raises(ValueError, match=rf"no linear module nope; there are .*{target}"):
        lora_config(wrapper, 2, 4, [target, "nope"])


def test_every_nth_layer():
    wrapper = make_wrapper(make_base("kimi"))
    assert every_nth_layer(wrapper, 4) == [3] and every_nth_layer(wrapper, 2) == [1, 3]
    with pytest.raises(ValueError, match="unfreeze_every: 5, and the base has 4 layers"):
        every_nth_layer(wrapper, 5)


@torch.no_grad()
def test_the_adapter_is_saved_beside_the_sidecar_and_loads_back(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    install_fast_kda(base)
    wrapper = adapted(base, layers=[1])
    save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
    ids = random_ids(2, 8)
    expected = wrapper.step_logits(ids)
    again, _, _ = load_model_with_config(tmp_path / "model")
    assert torch.equal(again.step_logits(ids), expected)
    facts = sidecar_facts(tmp_path / "model")
    assert facts["phase"] == "c" and facts["unfrozen_layers"] == [1]
    pretrained = load_base(tmp_path / "base")
    assert not torch.allclose(again.base(ids).logits, pretrained(ids).logits, atol=1e-2)
    assert torch.equal(again.drop_adapter()(ids).logits, pretrained(ids).logits)
    # Others than us can use the adapter: peft on the plain base.
    save_sidecar(adapted(load_base(tmp_path / "base")), tmp_path / "b", tmp_path / "base", "b")
    ours, _, _ = load_model_with_config(tmp_path / "b")
    theirs = PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "b/adapter"))
    with ours.disabled() as trained:
        torch.testing.assert_close(theirs(input_ids=ids).logits, trained(ids).logits)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    base = make_base("kimi")
    base.save_pretrained(tmp_path / "base")
    wrapper = adapted(base, layers=[1])
    for name in ("x", "y"):
        save_sidecar(wrapper, tmp_path / name, tmp_path / "base", "c")
    files = sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*.*"))
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    # The order of peft's set of targets changes from process to process.
    targets = json.loads((tmp_path / "x/adapter/adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 5 and targets == sorted(targets)


def test_a_damaged_adapter_is_named(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    wrapper = adapted(base, layers=[1])
    for name, damage, message in (
        ("adapter/adapter_model.safetensors", lambda p: p.write_bytes(b"x"), "truncated or not a"),
        ("adapter/adapter_model.safetensors", lambda p: p.unlink(), "no such file"),
        ("adapter/adapter_config.json", lambda p: p.write_text("{"), "is no LoRA adapter"),
        ("adapter", shutil.rmtree, "is no LoRA adapter"),
        ("layers.safetensors", lambda p: p.unlink(), "layers.safetensors: no such file"),
    ):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
        damage(tmp_path / "model" / name)
        with pytest.raises(ValueError, match=message):
            load_model_with_config(tmp_path / "model")


def test_lora_below_float32_stays_exact_and_in_float32():
    base = make_base("llama").to(torch.bfloat16)
    ids = random_ids(2, 12)
    with torch.no_grad():
        before = base(ids).logits
        wrapper = make_wrapper(base)
        wrapper.adapter = Adapter(wrapper)
        wrapper.adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
        assert torch.equal(base(ids).logits, before)
    assert {p.dtype for p in wrapper.adapter.lora_parameters().values()} == {torch.float32}


# ---- objective ----------------------------------------------------------------------------------


def test_scheduled_sampling_takes_the_models_own_draft():
    tokens, predicted = random_ids(400, 33), torch.full((400, 32), 96)

    def draft(rate, sampling):
        generator = torch.Generator().manual_seed(0)
        return corrupt(tokens, predicted, rate, 0.0, 96, generator, sampling)

    drafted = draft(0.0, 0.25)
    changed = drafted.inputs[:, 1:] != tokens[:, 1:-1]
    assert not (changed & ~drafted.editable[:, :-1]).any()
    assert (drafted.inputs[:, 1:][changed] == 96).all()
    assert 0.23 < changed.sum() / drafted.editable[:, :-1].sum() < 0.27
    both, alone = draft(0.3, 0.25), draft(0.3, 0.0)
    random_ones = alone.inputs != tokens[:, :-1]
    assert torch.equal(both.inputs[random_ones], alone.inputs[random_ones]), "what was corrupted is"
    assert (both.inputs[:, 1:] == 96).sum() > 0.2 * 0.5 * changed.numel() * 0.7


def test_the_share_of_own_tokens_grows_from_zero():
    wrapper = make_wrapper(make_base("llama"), corruption_rate=0.0, corruption_rate_final=0.0)
    objective = DraftRepair(wrapper, 5, 0.5, seed=0, scheduled_sampling=0.4)
    assert [objective.draw(16, s).sampling for s in range(5)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )
    assert objective.draw(16, 0).clean and not objective.draw(16, 1).clean


def gradients(wrapper, loss) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in wrapper.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def trainable(wrapper):
    wrapper.base.requires_grad_(False)
    for parameter in wrapper.adapter.lora_parameters().values():
        parameter.requires_grad_(True)
    for parameter in wrapper.adapter.layer_parameters().values():
        parameter.requires_grad_(True)
    return wrapper


def test_step_0_is_supervised_and_part_of_the_loop_where_the_base_trains():
    wrapper = trainable(adapted(make_base("llama"), std=0.05))
    wrapper.config.lambda_len = 0.0
    windows = random_ids(2, 17)
    objective = DraftRepair(wrapper, 4, 0.5, seed=0)
    seen = {}
    import kimi_recursive.losses as module

    real = module.chunk_losses
    try:
        module.chunk_losses = lambda w, c, d, s: seen.update(chunk=c, draft=d) or real(w, c, d, s)
        objective(windows, 2)
    finally:
        module.chunk_losses = real
    chunk, draft = seen["chunk"], seen["draft"]
    assert chunk.logits.requires_grad
    with_step_0 = chunk_losses(wrapper, chunk, draft, trains_step_0=True)["masked"]
    without = chunk_losses(wrapper, chunk, draft)["masked"]
    ce = torch.nn.functional.cross_entropy(
        chunk.logits.transpose(1, 2), draft.targets, reduction="none"
    )
    step_0 = (ce * draft.editable).sum() / draft.editable.sum()
    torch.testing.assert_close(with_step_0, (step_0 + 2 * without) / 3)  # K = 3: steps 1 and 2
    final = chunk_losses(wrapper, chunk, draft)["final"]
    through = gradients(wrapper, final)
    wrapper.config.backprop_steps = 3
    cut = gradients(wrapper, chunk_losses(wrapper, chunk, draft)["final"])
    name = next(n for n in through if "lora_B" in n)
    assert cut[name].abs().max() > 0 and not torch.allclose(cut[name], through[name])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_step_0_trains_on_clean_and_on_corrupted_drafts(rate):
    """With one inner step, `masked` is the loss of step 0 alone."""
    base = make_base("llama")
    wrapper = trainable(adapted(base, max_inner_steps=1))
    wrapper.config.corruption_rate = wrapper.config.corruption_rate_final = rate

    def loss():
        return DraftRepair(wrapper, 4, 0.5, seed=0)(random_ids(2, 17), 2)[0]

    with_it = loss()
    with torch.no_grad():
        torch.testing.assert_close(loss(), with_it.detach())  # the same with and without gradients
    name = next(n for n, p in wrapper.named_parameters() if p.requires_grad and "lora_B" in n)
    gradient = gradients(wrapper, with_it)[name]
    wrapper.config.lambda_masked = 0.0
    assert not torch.allclose(gradients(wrapper, loss())[name], gradient)


def test_the_pull_is_half_the_squared_distance():
    wrapper = trainable(adapted(make_base("kimi"), layers=[3], std=0.0))
    objective = DraftRepair(wrapper, 4, 0.5, seed=0, pull=0.3)
    windows = random_ids(2, 17)
    total, parts = objective(windows, 1)
    assert parts["loss_pull"] == 0
    weight = wrapper.adapter.layer_parameters()["model.layers.3.self_attn.q_proj.weight"]
    before = wrapper.adapter.pretrained["model.layers.3.self_attn.q_proj.weight"]
    with torch.no_grad():
        weight.add_(0.1)
    assert objective.distance().item() == pytest.approx(0.5 * 0.01 * weight.numel(), rel=1e-4)
    [gradient] = torch.autograd.grad(objective.distance(), [weight])
    torch.testing.assert_close(gradient, weight.detach() - before)
    total, parts = objective(windows, 1)
    names = {"final": 1, "masked": 0.5, "halt": 0.5, "len": 0.05, "ponder": 0.01,
             "stability": 0.01, "pull": 0.3}  # fmt: skip
    expected = sum(w * parts[f"loss_{k}"] for k, w in names.items())
    torch.testing.assert_close(total.detach(), expected)


# ---- the phases ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surgery_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_base("kimi").save_pretrained(folder / "base")
    insert_cells(folder / "base", {**SMALL, "max_inner_steps": 2}, 0, folder / "surgery")
    return folder / "surgery"


def train(folder, phase, parent, tokens, arm="recursive", overrides=None, changes=None, **options):
    return train_phase(
        phase, {**SETTINGS[phase], **(changes or {})}, 0, parent_dir=parent, tokens_dir=tokens,
        output_dir=folder / "sidecar", logs_path=folder / "train_logs.parquet",
        summary_path=folder / "train_summary.json", work_dir=folder / "work", arm=arm,
        overrides=overrides, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def phases(tmp_path_factory, surgery_dir, tokens_dir) -> Path:
    """Runs of the three phases, each from the one before."""
    root = tmp_path_factory.mktemp("phases")
    parent = surgery_dir
    for phase in "abc":
        train(root / phase, phase, parent, tokens_dir)
        parent = root / phase / "sidecar"
    return root


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
            after = model.sidecar_state_dict()
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


def same_run(one: Path, other: Path) -> None:
    """Every artefact of two runs is the same, but for times: outputs, checkpoints, metrics."""
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    of_logs = ("work/logs", "work/lock", "work/fingerprint", "work/experiment_metadata")
    names = [n for n in names if not str(n).startswith(of_logs)]
    assert [n for n in names if not (other / n).is_file()] == []
    for name in names:
        a, b = one / name, other / name
        if name.name == "train_logs.parquet":
            assert same(pl.read_parquet(a), pl.read_parquet(b)), name
        elif name.suffix == ".pt":
            assert_equal(*(torch.load(p, weights_only=True) for p in (a, b)))
        elif name.suffix == ".json":
            assert timeless(a) == timeless(b), name
        elif name.parent.name not in ("notes",) or name.suffix == ".jsonl":
            assert a.read_bytes() == b.read_bytes(), name
    best = [json.loads((r / "work/experiment_metadata.json").read_text()) for r in (one, other)]
    for key in ("status", "best_checkpoint_step", "best_metrics", "final_results"):
        assert best[0][key] == best[1][key]


def timeless(path: Path) -> dict:
    values = json.loads(path.read_text())
    values.pop("tokens_per_second", None)
    values.get("metrics", {}).pop("tokens_per_second", None)
    digests = values.get("sha256", {})
    for name in ("train_logs.parquet", "optimizer.pt", "scheduler.pt"):
        digests.pop(name, None)
    return values


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_phase_c_resumes_bit_for_bit(phases, tmp_path, tokens_dir):
    # In a folder as deep as the first, since a sidecar names its base by a relative path.
    again = phases.parent / "again"
    shutil.copytree(phases / "c/work", again / "c/work", symlinks=True)
    newest = again / "c/work/checkpoints/step_000006/model/layers.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    train(again / "c", "c", phases / "b/sidecar", tokens_dir)
    same_run(phases / "c", again / "c")


def test_what_a_phase_c_model_was_trained_in_is_not_rounded_away(tmp_path):
    base = make_base("llama")
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wrapper = adapted(load_base(tmp_path / "base", dtype="float32"), layers=[1], std=1e-4)
    save_sidecar(wrapper, tmp_path / "model", tmp_path / "base", "c")
    ids = random_ids(2, 8)
    again, _, _ = load_model_with_config(tmp_path / "model")
    assert again.base.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again.step_logits(ids), wrapper.step_logits(ids))
    asked, _, _ = load_model_with_config(tmp_path / "model", dtype="bfloat16")
    assert asked.base.dtype == torch.bfloat16


def test_an_adapter_goes_onto_a_wrapper_that_has_the_same_one_or_none(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    save_sidecar(adapted(base), tmp_path / "b", tmp_path / "base", "b")
    save_sidecar(adapted(make_base("llama"), [1]), tmp_path / "c", tmp_path / "base", "c")
    save_sidecar(make_wrapper(make_base("llama")), tmp_path / "a", tmp_path / "base", "a")
    model, _, _ = load_model_with_config(tmp_path / "b")
    for other, message in (("c", "has another adapter"), ("a", "has no adapter, and this wrapper")):
        with pytest.raises(ValueError, match=message):
            load_sidecar(model, tmp_path / other)
    adapter = model.adapter
    with pytest.raises(ValueError, match="trained with r 2, not 3"):
        adapter.set_lora(lora_config(model, 3, 4, "all-linear"), 0)
    adapter.set_layers([1])
    with pytest.raises(ValueError, match=r"trained with layers \[1\] unfrozen, not \[0\]"):
        adapter.set_layers([0])


def test_a_model_behind_a_link_finds_its_base(tmp_path, monkeypatch):
    make_base("llama").save_pretrained(tmp_path / "work/base")
    (tmp_path / "scratch/deep/er").mkdir(parents=True)
    (tmp_path / "work/link").symlink_to(tmp_path / "scratch/deep/er")
    wrapper = make_wrapper(load_base(tmp_path / "work/base"))
    save_sidecar(wrapper, tmp_path / "work/link/model", tmp_path / "work/base")
    monkeypatch.chdir(tmp_path / "work")
    for path in ("link/model", tmp_path / "scratch/deep/er/model"):
        load_model_with_config(path)


@pytest.mark.parametrize("change", ["parent", "load"])
def test_another_parent_or_way_to_load_starts_afresh(
    phases,
    tmp_path,
    tokens_dir,
    capfd,
    change,
):
    shutil.copytree(phases, tmp_path / "p", symlinks=True)
    shutil.copytree(phases.parent / "models0", tmp_path / "models0")
    parent, options = tmp_path / "p/a/sidecar", {}
    if change == "load":
        options["dtype"] = "float32"
    else:
        config = json.loads((parent / "recursive_config.json").read_text())
        (parent / "recursive_config.json").write_text(json.dumps(config | {"halt_margin": 0.1}))
    train(tmp_path / "p/b", "b", parent, tokens_dir, **options)
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
        train_phase("d", PHASE, 0, phases, tokens_dir, *[tmp_path] * 4)
    with pytest.raises(ValueError, match="is of the recursive arm and cannot go on as"):
        train(tmp_path, "b", phases / "a/sidecar", tokens_dir, arm="vanilla")
    for phase in "abc":  # more of the same phase is allowed
        again = train(tmp_path / f"more_{phase}", phase, phases / phase / "sidecar", tokens_dir)
        before = json.loads((phases / phase / "train_summary.json").read_text())
        assert again["validation"][0]["validation_loss_step_2"] == before["best_validation_loss"]
    with pytest.raises(ValueError, match="trained with r 2, not 3"):
        lora = {"lora": {**LORA, "rank": 3}}
        train(tmp_path / "other", "b", phases / "b/sidecar", tokens_dir, changes=lora)


def test_the_arms_of_phase_b_are_matched(phases, surgery_dir, tokens_dir, tmp_path):
    train(tmp_path / "va", "a", surgery_dir, tokens_dir, arm="vanilla")
    with pytest.raises(ValueError, match="does not say how many inner steps the recursive arm"):
        train(tmp_path / "f", "b", tmp_path / "va/sidecar", tokens_dir, arm="vanilla_flops")
    longer = {"num_steps": 24}  # so that half a step is little
    recursive = train(tmp_path / "r", "b", phases / "a/sidecar", tokens_dir, changes=longer)
    arms = {
        arm: train(
            tmp_path / arm,
            "b",
            tmp_path / "va/sidecar",
            tokens_dir,
            arm,
            {"max_inner_steps": 2},
            longer,
        )
        for arm in ("vanilla", "vanilla_flops")
    }
    vanilla, flops = arms["vanilla"], arms["vanilla_flops"]
    assert vanilla["num_trainable_parameters"] == recursive["num_trainable_parameters"]
    assert vanilla["training_tokens"] == recursive["training_tokens"]
    assert vanilla["training_flops"] < recursive["training_flops"]
    dearest_step = 1.2 * flops["training_flops"] / flops["num_steps"]  # prefixes differ in length
    assert abs(flops["training_flops"] - recursive["training_flops"]) <= dearest_step / 2


def test_phase_c_needs_a_base_in_float32():
    wrapper = make_wrapper(make_base("kimi").to(torch.bfloat16))
    wrapper.adapter = Adapter(wrapper)
    wrapper.adapter.add_lora(lora_config(wrapper, **LORA), seed=0)
    with pytest.raises(ValueError, match=r"this base is torch.bfloat16: set its dtype"):
        _parameter_groups(wrapper, "c", SETTINGS["c"], 0)
