"""A published model needs torch, transformers, safetensors and numpy, and no other dependency."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
from models import adapted, make_base, make_wrapper, perturb, random_ids

from kimi_recursive.model.sidecar import save_sidecar

ROOT = Path(__file__).parents[2]
MODULES = {"pyyaml": "yaml", "jsonschema-rs": "jsonschema_rs"}
# torch and transformers bring these, and import them themselves; our code must not.
BROUGHT = {"fsspec", "jinja2", "tokenizers", "tqdm", "yaml"}

BLOCKED = """
import builtins, json, sys
from importlib.machinery import PathFinder

refused, brought, folder, ids = json.loads(sys.argv[1])
given, found = builtins.__import__, PathFinder.find_spec

def find(name, *rest):
    return None if name in refused else found(name, *rest)

def refuse(name, scope=None, *rest, **named):
    ours = str((scope or {}).get("__name__")).startswith("kimi_recursive")
    if ours and name.partition(".")[0] in brought:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return given(name, scope, *rest, **named)

PathFinder.find_spec = find
builtins.__import__ = refuse
import torch
from kimi_recursive.model import load_model_with_config

wrapper, _, _ = load_model_with_config(folder)
print(wrapper.generate_chunks(torch.tensor(ids), max_new_tokens=12).tolist())
"""


def dependencies() -> set[str]:
    """The modules that the extras of pyproject bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {re.match(r"[\w-]+", name)[0] for name in named} - {"kimi-recursive"}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def generate_alone(folder: Path, ids: torch.Tensor) -> subprocess.CompletedProcess:
    extras = dependencies()
    assert extras >= {"polars", "accelerate", "peft", "snakemake", "yaml"}
    given = [sorted(extras - BROUGHT), sorted(BROUGHT)]
    command = [sys.executable, "-c", BLOCKED, json.dumps([*given, str(folder), ids.tolist()])]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_sidecar_generates_without_the_other_dependencies(tmp_path):
    base, ids = make_base("kimi"), random_ids(2, 5)
    base.save_pretrained(tmp_path / "base")
    wrapper = perturb(make_wrapper(base))
    save_sidecar(wrapper, tmp_path / "sidecar", tmp_path / "base")
    done = generate_alone(tmp_path / "sidecar", ids)
    assert done.returncode == 0, done.stderr
    expected = wrapper.generate_chunks(ids, max_new_tokens=12).tolist()
    assert json.loads(done.stdout) == expected


def test_lora_without_peft_names_the_extra(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    save_sidecar(adapted(base), tmp_path / "sidecar", tmp_path / "base", "b")
    done = generate_alone(tmp_path / "sidecar", random_ids(1, 3))
    assert done.returncode == 1
    [last] = done.stderr.splitlines()[-1:]
    assert last.startswith("ValueError: A model of phase b or c needs pip install")
    assert "'kimi-recursive[lora]' (No module named 'peft')" in last
