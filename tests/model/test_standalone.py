"""A published model needs torch, transformers, safetensors and numpy, and no other dependency."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from models import adapted, make_base, make_wrapper, perturb, random_ids

from kimi_recursive.model.sidecar import save_sidecar

ROOT = Path(__file__).parents[2]
MODULES = {"pyyaml": "yaml", "jsonschema-rs": "jsonschema_rs"}
# torch and transformers bring these, and import them themselves; our code must not.
BROUGHT = {"fsspec", "jinja2", "tokenizers", "tqdm", "yaml"}

BLOCKED = """
import builtins, json, sys
from importlib.machinery import PathFinder

refused, brought, ids, plain, with_lora = json.loads(sys.argv[1])
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

wrapper, _, _ = load_model_with_config(plain)
print(wrapper.generate_chunks(torch.tensor(ids), max_new_tokens=12).tolist())
load_model_with_config(with_lora)
"""


def dependencies() -> set[str]:
    """The modules that the extras of pyproject bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {re.match(r"[\w-]+", name)[0] for name in named} - {"kimi-recursive"}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.long
def test_a_sidecar_generates_without_the_other_dependencies_and_lora_names_its_extra(tmp_path):
    """A model of phase a, then one of phase b, in a Python without what the extras bring."""
    bases, ids = [make_base("kimi"), make_base("llama")], random_ids(2, 5)
    folders = [tmp_path / "plain", tmp_path / "with_lora"]
    for folder, base in zip(folders, bases, strict=True):
        base.save_pretrained(folder / "base")
    wrapper = perturb(make_wrapper(bases[0]))
    for folder, model, phase in zip(folders, (wrapper, adapted(bases[1])), "ab", strict=True):
        save_sidecar(model, folder / "sidecar", folder / "base", phase)
    extras = dependencies()
    assert extras >= {"polars", "accelerate", "peft", "snakemake", "yaml"}
    given = [sorted(extras - BROUGHT), sorted(BROUGHT), ids.tolist()]
    given += [str(folder / "sidecar") for folder in folders]
    command = [sys.executable, "-c", BLOCKED, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, "of the second model"
    assert json.loads(done.stdout) == wrapper.generate_chunks(ids, max_new_tokens=12).tolist()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: A model of phase b or c needs pip install"), done.stderr
    assert "'kimi-recursive[lora]' (No module named 'peft')" in last
