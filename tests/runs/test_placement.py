"""A base spread over devices: the numbers of one device, and nothing left behind."""

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import polars as pl
import pytest
import torch
from accelerate import dispatch_model, hooks
from accelerate.utils import OffloadedWeightsLoader
from commands import call, error_of
from models import make_base, make_wrapper, perturb, random_ids
from project import TINY
from runs import PHASE, same_run, train_into
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe

from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.evaluation.stage import evaluate_stage
from kimi_recursive.evaluation.zero_init import prove_zero_init
from kimi_recursive.kimi import kda
from kimi_recursive.kimi.switch import install_fast_kda, uninstall_fast_kda
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.model import placement
from kimi_recursive.model.loading import load_base
from kimi_recursive.model.placement import execution_device, is_offloaded
from kimi_recursive.model.sidecar import base_identity
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.draft import Draw
from kimi_recursive.training.groups import parameter_groups
from kimi_recursive.training.objective import build_objective
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.spec import LoadOptions
from kimi_recursive.training.surgery import insert_cells

DISK = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk",
        "lm_head": "disk"}  # fmt: skip
ALL_DISK = {"": "disk"}


def module_names(base) -> list[str]:
    """Names that together hold every weight: each decoder layer, and what is around them."""
    names = []
    for name, module in base.named_children():
        for below, child in module.named_children():
            layers = range(len(child)) if isinstance(child, nn.ModuleList) else [None]
            names += [f"{name}.{below}" + ("" if i is None else f".{i}") for i in layers]
    return [*names, "lm_head"]


def spread(base) -> dict[str, str]:
    """Every second module on disk, the embeddings among them, and what may be tied to them."""
    devices = {name: "cpu" if i % 2 else "disk" for i, name in enumerate(module_names(base))}
    return {**devices, "lm_head": "disk"}


@pytest.fixture
def bases(kind, tmp_path):
    """The same base on the CPU and, in part, on disk."""
    make_base(kind).save_pretrained(tmp_path)
    plain = load_base(tmp_path)
    return plain, load_base(tmp_path, device_map=spread(plain))


def gradients(wrapper, logits):
    wrapper.base.requires_grad_(False)
    logits.square().mean().backward()
    return {n: p.grad for n, p in wrapper.named_parameters() if not n.startswith("base.")}


def test_an_offloaded_base_gives_the_same_numbers(bases):
    plain, offloaded = (perturb(make_wrapper(b, use_token_feedback=True)) for b in bases)
    assert is_offloaded(offloaded.base) and not is_offloaded(plain.base)
    ids = random_ids(2, 14)
    expected, logits = (w.step_logits(ids, chunk_start=8) for w in (plain, offloaded))
    assert not torch.equal(expected[0], expected[1]), "the cells do something"
    assert torch.equal(logits, expected)
    found, wanted = gradients(offloaded, logits), gradients(plain, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        same = gradient is found[name] is None or torch.equal(gradient, found[name])
        assert same, name
    new = [w.generate_chunks(ids, max_new_tokens=10) for w in (plain, offloaded)]
    assert torch.equal(*new)
    with plain.disabled(), offloaded.disabled():
        assert torch.equal(*(w.generate(ids, max_new_tokens=5) for w in (plain, offloaded)))
    assert base_identity(plain.base) == base_identity(offloaded.base)


def test_cells_of_offloaded_layers_are_where_the_layers_compute(bases):
    wrapper = make_wrapper(bases[1])
    assert wrapper.device == torch.device("cpu")
    layers = [p.is_meta for layer in wrapper.layers for p in layer.parameters()]
    assert any(layers) and not all(layers)
    sidecar = [p for module in wrapper.cells() for p in module.parameters()]
    assert {p.device.type for p in sidecar} == {"cpu"}


def test_the_fast_kda_goes_under_accelerate_s_hooks_and_out_again(tmp_path):
    make_base("kimi").save_pretrained(tmp_path)
    ids, plain = random_ids(2, 20), load_base(tmp_path)
    offloaded = load_base(tmp_path, device_map=ALL_DISK)
    assert install_fast_kda(offloaded) == 3, "and twice is once"
    fast = [base(ids).logits for base in (plain, offloaded)]
    assert torch.equal(*fast)
    assert [uninstall_fast_kda(base) for base in (plain, offloaded)] == [3, 3]
    slow = [base(ids).logits for base in (plain, offloaded)]
    assert torch.equal(*slow) and not torch.equal(slow[0], fast[0])


@pytest.mark.parametrize("keep", [False, True])
def test_autograd_keeps_no_offloaded_weight(tmp_path, monkeypatch, keep):
    make_base("kimi").save_pretrained(tmp_path)
    wrapper = perturb(make_wrapper(load_base(tmp_path, device_map=ALL_DISK)))
    wrapper.base.requires_grad_(False)
    fetched, fetch = [], OffloadedWeightsLoader.__getitem__

    def noting(self, name):
        fetched.append((name, weakref.ref((weight := fetch(self, name)).untyped_storage())))
        return weight

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noting)
    if keep:  # what would happen otherwise
        monkeypatch.setattr(wrapper._refetching, "_pack", lambda tensor: tensor)
    logits = wrapper.step_logits(random_ids(2, 8))
    gc.collect()
    alive = {name for name, weight in fetched if weight() is not None}
    assert ("model.layers.1.self_attn.q_proj.weight" in alive) == keep
    assert bool(alive) == keep
    before = len(fetched)
    logits.square().mean().backward()
    assert (len(fetched) > before) != keep, "backward fetches them again"


def test_evaluation_surgery_proof_and_phase_a_run_spread(tmp_path, model_dir):
    """The stages of the matrix, on one device and with every layer on disk."""
    corpus = {"source": str(model_dir / "docs"), "validation": 0.2, "test": 0.2, "seed": 0}
    from kimi_recursive.data.corpus import prepare_corpus
    from kimi_recursive.data.tokens import tokenize_corpus

    prepare_corpus(corpus, tmp_path / "corpus")
    tokenize_corpus(tmp_path / "corpus", model_dir / "base", tmp_path / "tokens")
    settings = EvaluationSettings(**{**TINY["evaluation"], "context_length": 16})
    recursive = {"chunk_width": 8, "max_inner_steps": 2, "d_state": 8, "gate_hidden": 16,
                 "max_chunk_len": 8}  # fmt: skip
    results = {}
    for name, options in {"plain": {}, "spread": {"device_map": DISK}}.items():
        folder = tmp_path / name
        insert_cells(model_dir / "base", recursive, 0, folder / "surgery", **options)
        for stage, model in (("baseline", model_dir / "base"), ("surgery", folder / "surgery")):
            evaluate_stage(
                EvaluationSpec(stage, settings), model, tmp_path / "tokens",
                EvaluationFiles(folder, stage), overrides={"chunk_width": 8}, **options,
            )  # fmt: skip
        proof = prove_zero_init(
            model_dir / "base", folder / "surgery", tmp_path / "tokens", settings, {},
            folder / "proof.json", **options,
        )  # fmt: skip
        assert proof["passed"], proof
        run = folder / "run"
        train_into(run, "a", PHASE, folder / "surgery", tmp_path / "tokens", LoadOptions(**options))
        results[name] = pl.read_parquet(EvaluationFiles(folder, "surgery").documents)
    assert results["plain"].equals(results["spread"])
    sidecars = [(tmp_path / n / "surgery/sidecar.safetensors").read_bytes() for n in results]
    assert sidecars[0] == sidecars[1]
    same_run(tmp_path / "plain/run", tmp_path / "spread/run")
    prints = [(tmp_path / n / "run/work/fingerprint.json").read_text() for n in results]
    assert "device_map" not in prints[1]


def test_training_inside_an_offloaded_base_is_refused(tmp_path):
    make_base("kimi").save_pretrained(tmp_path)
    wrapper = make_wrapper(load_base(tmp_path, device_map=DISK))
    message = error_of(parameter_groups, wrapper, "b", PhaseSettings.from_mapping(PHASE), 0)
    assert "a model of phase b or c changes the weights" in message and "cpu 1, disk 3" in message


@pytest.mark.parametrize(
    "device_map, expected",
    [
        ("everywhere", "must be auto or sequential, or a device for each module"),
        ({}, "or a device for each module, got {}"),
        ({"model": "cuda:97", "lm_head": "cpu"}, "device_map {'model': 'cuda:97'"),
        ({"model": "gpu", "lm_head": "cpu"}, "device_map {'model': 'gpu'"),
        ({"model.norm": "cpu", "lm_head": "disk"}, "does not give any device"),
    ],
)
def test_a_wrong_device_map_is_one_line(tmp_path, device_map, expected):
    make_base("kimi").save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_base(tmp_path, device_map=device_map)
    assert expected in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_several_processes_share_no_spread_base(tmp_path, monkeypatch):

    monkeypatch.setattr(placement, "num_processes", lambda: 2)
    make_base("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="works in one process only, but 2 are running"):
        load_base(tmp_path, device_map="auto")


def test_the_command_takes_a_device_map(model_dir, tmp_path, monkeypatch, capsys):
    stage = "finetuned_recursive"
    arguments = ("evaluate", "--model-path", model_dir / "sidecar", "--stage", stage,
                 "--corpus", model_dir / "docs", "--context-length", "16")  # fmt: skip
    for name, extra in {"plain": (), "auto": ("--device-map", "auto")}.items():
        assert call(monkeypatch, *arguments, "--output-dir", tmp_path / name, *extra) == 0
    assert "modules on each device: cpu 1" in capsys.readouterr().err
    one, other = (
        json.loads(Path(tmp_path / n / f"{stage}_results.json").read_text())["perplexity"]
        for n in ("plain", "auto")
    )
    assert one == other
    assert call(monkeypatch, *arguments, "--device-map", "everywhere") == 2


@pytest.mark.workflow
def test_the_workflow_spreads_the_base_and_makes_nothing_again_for_it(copy):
    modules = ("embed_tokens", "layers", "norm")
    spread = {f"model.{name}": "disk" for name in modules} | {"lm_head": "cpu"}
    copy.write({**TINY, "resources": {"gpus_per_run": 3, "device_map": spread}})
    assert copy.planned("all") == ["report", "summarize"]  # which show the config
    name = "results/eval/finetuned_recursive_documents.parquet"
    before = pl.read_parquet(copy.path(name))
    done = copy.snakemake("--force", name)
    assert done.returncode == 0, done.stderr[-3000:]
    log = copy.path("results/logs/evaluate/finetuned_recursive.log").read_text()
    assert "modules on each device: cpu 1, disk 3" in log
    assert pl.read_parquet(copy.path(name)).equals(before)


def move(self: nn.Module, device=None, dtype=None, **_ignored) -> nn.Module:
    """`Module.to`, which fails on fake parameters."""
    for module in self.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = parameter.detach().to(device=device, dtype=dtype)
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return self


def tensor(data, *args, device=None, real=torch.tensor, **kwargs):
    """`torch.tensor`, which gives a fake tensor the first CPU whatever is asked for."""
    made = real(data, *args, **kwargs)
    return made if device is None else torch.zeros(made.shape, dtype=made.dtype, device=device)


def test_all_phases_run_over_two_devices(kind):
    """On fake tensors two CPUs are two devices: an operation on tensors of both is an error."""
    kda._plan.cache_clear()  # constants that are real
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False),  # not on fake float32
        mock.patch.object(nn.Module, "to", move),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(hooks, "set_module_tensor_to_device"),  # moved before
    ):
        base = make_base(kind)
        names = module_names(base)
        tied = base.lm_head.weight is base.get_input_embeddings().weight
        second = next(i for i, name in enumerate(names) if name.endswith(".2"))
        devices = {name: f"cpu:{1 + (i >= second)}" for i, name in enumerate(names)}
        devices["lm_head"] = "cpu:1" if tied else "cpu:2"
        for name, device in devices.items():
            base.get_submodule(name).to(device)
        with pytest.raises(RuntimeError, match="on the same device"):
            base(torch.zeros(2, 8, dtype=torch.long, device="cpu:1"))
        install_fast_kda(base)
        dispatch_model(base, devices)
        wrapper = make_wrapper(base, max_inner_steps=2)
        cells = {execution_device(cell) for cell in wrapper.refine_cells}
        assert cells == {torch.device("cpu:1"), torch.device("cpu:2")}
        windows = torch.zeros(2, 17, dtype=torch.long, device=wrapper.device)
        logits = wrapper.step_logits(windows[:, :14], chunk_start=8)
        assert logits.device == wrapper.device == torch.device("cpu:1")
        for phase in "abc":
            lora = {"rank": 2, "alpha": 4, "targets": "all-linear"}
            settings = PhaseSettings.from_mapping(
                {**PHASE, "lora": lora, "unfreeze_every": 1, "l2_pull": 0.1}
            )
            groups = parameter_groups(wrapper, phase, settings, 0)
            if phase == "b":  # c trains its LoRA, too
                continue
            trained = [p for members in groups.values() for p in members.values()]
            objective = build_objective(wrapper, 6, settings, 0)
            with _disable_current_modes():
                draw = Draw(8, 0.5, 0.1, torch.Generator())
            objective.draw = lambda *_, draw=draw: draw
            loss, parts = objective(Batch.of_windows(windows), 0)
            loss.backward()
            assert {str(p.grad.device) for p in trained if p.grad is not None} == {"cpu:1", "cpu:2"}
            losses = [loss, *(part for part in parts.values() if isinstance(part, torch.Tensor))]
            assert {part.device for part in losses} == {wrapper.device}
            nn.utils.clip_grad_norm_(trained, 1.0)
    kda._plan.cache_clear()


def test_a_model_goes_where_training_would_put_it(model_dir, monkeypatch, capsys):
    """Here a GPU that is not there. A device that is named, or a device_map, comes first."""
    state = SimpleNamespace(device=torch.device("cuda:9"))
    monkeypatch.setattr("accelerate.PartialState", lambda: state)
    missing = "error: device cuda:9: "
    evaluate = ["evaluate", "--stage", "finetuned_recursive", "--corpus", model_dir / "docs"]
    evaluate += ["--split", "train", "--context-length", 8, "--max-windows", 1]
    evaluate += ["--output-dir", model_dir / "eval", "--model-path"]
    for command in (["generate", "--prompt", "ab", "--model"], evaluate):
        command += [model_dir / "sidecar", "--max-new-tokens", 1]
        assert call(monkeypatch, *command) == 2
        assert missing in capsys.readouterr().err
        for option in (("--device", "cpu"), ("--device-map", "auto")):
            assert call(monkeypatch, *command, *option) == 0
            assert missing not in capsys.readouterr().err
    with pytest.raises(ValueError, match="device cuda:9"):
        settings, sidecar = EvaluationSettings(**TINY["evaluation"]), model_dir / "sidecar"
        prove_zero_init(model_dir / "base", sidecar, model_dir, settings, {}, model_dir / "out")
