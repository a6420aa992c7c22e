"""`kimi-recursive`: what a user types, and what a user gets wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from commands import call
from models import SMALL, make_base, make_wrapper
from peft import LoraConfig, get_peft_model

from kimi_recursive import RecursiveConfig
from kimi_recursive.model.loading import load_base
from kimi_recursive.model.sidecar import save_sidecar


def options(root: Path, **more) -> list:
    given = {
        "--model_path": root / "base",
        "--stage": "baseline",
        "--output_dir": root / "out",
        "--corpus": root / "docs",
        "--context-length": 32,
        "--max-new-tokens": 4,
        "--dtype": "float32",
        **more,
    }
    return ["evaluate", *(x for pair in given.items() for x in pair)]


def test_the_stages_of_the_seed_from_the_command_line(model_dir, monkeypatch, capsys):
    assert call(monkeypatch, *options(model_dir)) == 0
    assert "step 0: perplexity" in capsys.readouterr().out
    RecursiveConfig(**{**SMALL, "max_inner_steps": 2}).save(model_dir / "c.json")
    surgery = {"--stage": "after_surgery", "--recursive-config": model_dir / "c.json"}
    assert call(monkeypatch, *options(model_dir, **surgery)) == 0
    trained = {"--stage": "finetuned_recursive", "--model_path": model_dir / "sidecar"}
    assert call(monkeypatch, *options(model_dir, **trained)) == 0
    found = {
        stage: json.loads((model_dir / f"out/{stage}_results.json").read_text())
        for stage in ("baseline", "after_surgery", "finetuned_recursive")
    }
    base, after, tuned = (found[s]["perplexity"]["perplexity"] for s in found)
    assert after == pytest.approx(base, rel=1e-5) and abs(tuned / base - 1) > 1e-3
    assert found["after_surgery"]["inner_steps"] == 2
    assert found["finetuned_recursive"]["inner_steps"] == 3, "the sidecar's own config"
    disabled = {"--model_path": model_dir / "sidecar", "--output_dir": model_dir / "again"}
    assert call(monkeypatch, *options(model_dir, **disabled)) == 0
    again = json.loads((model_dir / "again/baseline_results.json").read_text())
    assert not again["config"]["recursive_enabled"]
    assert again["perplexity"]["perplexity"] == pytest.approx(base, rel=1e-5)
    documents = pl.read_parquet(model_dir / "out/finetuned_recursive_documents.parquet")
    assert set(documents["step"]) == {0, 1, 2, 3}


def test_a_stage_that_the_sidecar_is_not_of_is_refused(model_dir, tmp_path, monkeypatch, capsys):
    """A trained model once wrote its numbers into after_surgery_results.json."""
    adapters = make_wrapper(load_base(model_dir / "base"), single_pass=True, max_inner_steps=1)
    save_sidecar(adapters, tmp_path / "adapters", model_dir / "base", "a")
    save_sidecar(adapters, tmp_path / "fresh", model_dir / "base")
    recursive = "finetuned_recursive"
    single_pass = "finetuned_single_pass or finetuned_single_pass_flops"
    cases = [
        (model_dir / "sidecar", ["--stage", "after_surgery"], recursive),
        (model_dir / "sidecar", ["--stage", "finetuned_single_pass"], recursive),
        (model_dir / "sidecar", ["--stage", "finetuned_recursive_b"], recursive),
        (model_dir / "sidecar", ["--stage", "baseline", "--use_recursive"], recursive),
        (tmp_path / "adapters", ["--stage", "finetuned_recursive"], single_pass),
        (tmp_path / "fresh", ["--stage", "finetuned_single_pass"], "after_surgery or baseline"),
    ]
    for model, (_, stage, *more), message in cases:
        given = {"--stage": stage, "--model_path": model, "--output_dir": tmp_path / "out"}
        assert call(monkeypatch, *options(model_dir, **given), *more) == 2, stage
        error = f"error: --stage {stage}: {model} is of stage {message}\n"
        assert capsys.readouterr().err.endswith(error), (stage, error)
    assert not (tmp_path / "out").exists()
    for model, (_, stage, *more) in [
        (tmp_path / "adapters", ["--stage", "finetuned_single_pass_flops"]),
        (tmp_path / "fresh", ["--stage", "baseline", "--use_recursive"]),
    ]:
        given = {"--stage": stage, "--model_path": model, "--output_dir": tmp_path / "out"}
        assert call(monkeypatch, *options(model_dir, **given), *more) == 0, stage


def test_a_base_that_was_fine_tuned_without_cells(model_dir, tmp_path, monkeypatch):
    """The seed's `finetuned_vanilla`: a plain model, or a LoRA adapter beside it."""
    torch.manual_seed(0)
    base = get_peft_model(load_base(model_dir / "base"), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    base.peft_config["default"].base_model_name_or_path = str(model_dir / "base")
    base.save_pretrained(tmp_path / "lora")
    found = {}
    for model in (model_dir / "base", tmp_path / "lora"):
        given = {"--stage": "finetuned_vanilla", "--model_path": model, "--output_dir": tmp_path}
        assert call(monkeypatch, *options(model_dir, **given)) == 0
        results = json.loads((tmp_path / "finetuned_vanilla_results.json").read_text())
        assert results["inner_steps"] == 0
        found[model.name] = results
    assert found["lora"]["num_parameters"]["lora"] > 0 == found["base"]["num_parameters"]["lora"]
    assert found["lora"]["num_parameters"]["base"] == found["base"]["num_parameters"]["base"]
    loss = {name: results["perplexity"]["loss"] for name, results in found.items()}
    assert abs(loss["lora"] - loss["base"]) > 1e-6


def test_user_errors_are_one_line_with_exit_code_2_and_write_nothing(
    model_dir, monkeypatch, capsys, tmp_path
):
    (tmp_path / "bad.json").write_text('{"chunk_width": 8,')
    (tmp_path / "typo.json").write_text('{"chunk_widht": 8}')
    RecursiveConfig(recursive_enabled=True, d_state=0).save(tmp_path / "range.json")
    RecursiveConfig(**SMALL, layers_to_refine=[7]).save(tmp_path / "layers.json")
    (tmp_path / "empty.txt").write_text("")
    shutil.copytree(model_dir / "base", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"\x10")
    save_sidecar(make_wrapper(make_base("qwen")), tmp_path / "other", model_dir / "base")
    cases = [
        ({"--stage": "before"}, "--stage: must be one of baseline, after_surgery"),
        (
            {"--stage": "finetuned_recursive"},
            "holds no sidecar (sidecar.safetensors) and is of stage",
        ),
        ({"--device": "cuda:9"}, "device cuda:9: "),
        ({"--split": "dev"}, "--split: must be one of train, validation, test, got 'dev'"),
        ({"--model_path": tmp_path / "none"}, "no such model directory"),
        ({"--model_path": tmp_path / "cut"}, "truncated or not a safetensors file"),
        (
            {"--model_path": tmp_path / "other", "--stage": "after_surgery"},
            "does not fit this base",
        ),
        ({"--recursive-config": tmp_path / "none.json"}, "cannot be read"),
        ({"--recursive-config": tmp_path / "bad.json"}, "is not valid JSON"),
        ({"--recursive-config": tmp_path / "typo.json"}, "did you mean 'chunk_width'?"),
        ({"--recursive-config": tmp_path / "range.json"}, "d_state must be an integer of at"),
        ({"--recursive-config": tmp_path / "layers.json"}, "[7] out of range; the base has 3"),
        ({"--corpus": tmp_path / "none.txt"}, "no such file"),
        ({"--corpus": tmp_path / "empty.txt"}, "none with text"),
        ({"--tokens-dir": tmp_path / "none"}, "none"),
        ({"--dtype": "float33"}, "dtype must be 'auto' or a torch dtype"),
    ]
    for change, message in cases:
        out = {"--output_dir": tmp_path / "out"}
        assert call(monkeypatch, *options(model_dir, **out, **change)) == 2, change
        error = [x for x in capsys.readouterr().err.splitlines() if "it/s" not in x]
        assert len(error) == 1 and error[0].startswith("error: "), error
        assert message in error[0], error
        assert not (tmp_path / "out").exists()


def test_wrong_flags_and_help(monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", "--model_pth", "x") == 2
    assert "No such option" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--model_path", "--stage", "--recursive-config", "--output_dir"):
        assert flag in text


def test_help_does_not_load_torch():
    code = (
        "import sys; sys.argv = ['kimi-recursive', '--help']\n"
        "from kimi_recursive import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def test_the_package_exports_the_names_of_the_seed():
    import kimi_recursive

    for name in kimi_recursive.__all__:
        assert getattr(kimi_recursive, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kimi_recursive.nothing  # noqa: B018


@pytest.mark.parametrize("missing, command, extra", [
    ("jsonschema_rs", ["log", "query", "."], "records"),
    ("polars", ["evaluate", "--model_path", ".", "--stage", "baseline", "--tokens-dir", ".",
                "--output_dir", "."], "train"),
])  # fmt: skip
def test_a_plain_install_has_the_command_and_names_the_extra(missing, command, extra):
    code = """
import sys
for name in ("accelerate", "jsonschema", "jsonschema_rs", "matplotlib", "peft", "polars"):
    sys.modules[name] = None
sys.argv[0] = "kimi-recursive"
from kimi_recursive.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    wanted = f"error: `kimi-recursive {command[0]}` needs pip install 'kimi-recursive[{extra}]'"
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(wanted) and missing in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
