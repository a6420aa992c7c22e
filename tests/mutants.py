"""`make mutants`: break the code on purpose, one line at a time, and see whether the tests notice.

A break is an operator, a comparison, a constant or a condition turned into another, or a dropped
statement. Which ones are tried is drawn from the name of the module, so that two runs of the same
code try the same. Each break runs in a fork of a process that has imported torch and none of this
package; the fork imports the broken module from memory, so the checkout is never changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tests by module, those first that notice most in the least time.
TESTS = {
    "model/cells": ["model/test_cells.py", "model/test_invariants.py"],
    "model/loop": ["model/test_invariants.py", "model/test_losses.py", "model/test_generate.py"],
    "model/wrapper": ["model/test_invariants.py", "model/test_generate.py"],
    "model/cache": ["model/test_decode.py", "model/test_invariants.py", "model/test_verified.py"],
    "model/guesses": ["model/test_verified.py"],
    "model/passes": ["model/test_decode.py"],
    "model/verified": ["model/test_generate.py", "model/test_verified.py"],
    "model/learned": ["model/test_generate.py"],
    "model/generation": ["model/test_generate.py", "model/test_invariants.py"],
    "model/sidecar": ["model/test_loader.py", "model/test_adapter.py"],
    "model/loading": ["model/test_loader.py", "model/test_adapter.py"],
    "model/adapter": ["model/test_adapter.py", "model/test_loader.py"],
    "model/config": ["unit/test_config.py", "model/test_loader.py"],
    "model/halting": ["model/test_halting.py"],
    "model/adaptive": ["model/test_halting.py"],
    "model/native": ["model/test_native.py"],
    "model/output": ["model/test_verified.py", "model/test_generate.py"],
    "training/objective": ["model/test_losses.py"],
    "training/checkpoint": ["runs/test_loop.py"],
    "evaluation/bootstrap": ["unit/test_bootstrap.py"],
}
# Lines whose breaks change nothing that anyone could see: module, line, and why.
EQUIVALENT = {
    ("evaluation/bootstrap", "if num_documents * resamples <= MAX_KEPT:"): "memory alone",
    ("evaluation/bootstrap", "coalesce=True,"): "names differ only where a document is missing",
}
WANTED = 0.9
MARKS = "not slow and not slurm and not workflow and not gpu and not other_bases"
PRELOADED = (
    "numpy", "torch", "transformers", "transformers.models.kimi_linear.modeling_kimi_linear",
    "transformers.models.llama.modeling_llama", "peft", "safetensors.torch", "accelerate",
    "scipy.stats", "pytest",
)  # fmt: skip
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# Messages, types and defaults are no behaviour that these tests are about.
LEFT_ALONE = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arguments)


@dataclass(frozen=True)
class Break:
    """A module with one node replaced.

    Attributes:
        line: Where, from 1.
        before, after: That line, stripped.
        source: The whole broken module.
    """

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}\n    - {self.before}\n    + {self.after}"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source in memory."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name, _path=None, _target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_filename(self, _name: str) -> str:
        return str(self.path)

    def get_data(self, _path: str) -> bytes:
        return self.source.encode()


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What a node can be broken into."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        operator = COMPARISONS[type(node.ops[0])]()
        yield ast.Compare(node.left, [operator, *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what is in it, but for what is left alone."""
    if isinstance(node, LEFT_ALONE):
        return
    if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "msg"):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # an assertion, in effect
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from nodes_of(child)


def breaks_of(module: str, number: int) -> list[Break]:
    """Breaks of a module, on `number` lines at most."""
    source = (ROOT / f"kimi_recursive/{module}.py").read_bytes()
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:n])) for n in range(len(lines))]
    by_line: dict[int, list[Break]] = {}
    for node in nodes_of(ast.parse(source)):
        for new in replacements(node):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            text = ast.unparse(ast.fix_missing_locations(new))
            text = text if isinstance(new, ast.stmt) else f"({text})"
            broken = (source[:start] + text.encode() + source[end:]).decode()
            after = broken.splitlines()[node.lineno - 1].strip()
            before = lines[node.lineno - 1].decode().strip()
            if (module, before) not in EQUIVALENT:
                found = Break(module, node.lineno, before, after, broken)
                by_line.setdefault(node.lineno, []).append(found)
    draw = random.Random(module)
    chosen = draw.sample(sorted(by_line), min(number, len(by_line)))
    return [draw.choice(by_line[line]) for line in sorted(chosen)]


def run_tests(module: str, source: str | None, limit: float) -> tuple[str, float]:
    """Run a module's tests in a fork, with a broken source or as they are.

    Returns: `passed`, `failed` or `too long`, and the seconds.
    """
    began = time.monotonic()
    if not (child := os.fork()):
        _run_in_child(module, source)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            passed = os.waitstatus_to_exitcode(status) == 0
            return "passed" if passed else "failed", time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return "too long", limit


def _run_in_child(module: str, source: str | None) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        if source is not None:
            name = f"kimi_recursive.{module.replace('/', '.')}"
            path = ROOT / f"kimi_recursive/{module}.py"
            sys.meta_path.insert(0, Finder(name, path, source))
        files = [f"tests/{name}" for name in TESTS[module]]
        import pytest

        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
            code = int(pytest.main([*options, "-m", MARKS, "--basetemp", f"{folder}/t", *files]))
    finally:
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--each", type=int, default=7, help="breaks of each module (7)")
    parser.add_argument("--jobs", type=int, default=2, help="at once (2)")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - TESTS.keys():
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        importlib.import_module(name)
    modules = arguments.modules or list(TESTS)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        limits = {}
        whole = pool.map(lambda module: run_tests(module, None, 600), modules)
        for module, (outcome, seconds) in zip(modules, whole, strict=True):
            print(f"{module}: its tests take {seconds:.0f} s", flush=True)
            if outcome != "passed":
                print(f"error: {module}: its tests fail without a break", file=sys.stderr)
                return 2
            limits[module] = 60 + 5 * seconds
        breaks = [one for module in modules for one in breaks_of(module, arguments.each)]
        found = pool.map(lambda one: run_tests(one.module, one.source, limits[one.module]), breaks)
        survivors = []
        for number, (one, (outcome, seconds)) in enumerate(zip(breaks, found, strict=True), 1):
            where = f"{one.module}.py:{one.line}"
            word = "SURVIVED" if outcome == "passed" else "caught"
            print(f"{number}/{len(breaks)} {word:8} {seconds:4.0f} s  {where}", flush=True)
            survivors += [one] if outcome == "passed" else []
    print("\nmodule                  caught     of")
    for module in modules:
        tried = sum(one.module == module for one in breaks)
        missed = sum(one.module == module for one in survivors)
        print(f"{module:22} {tried - missed:7} {tried:6}")
    share = 1 - len(survivors) / len(breaks)
    print(f"\n{share:.0%} of {len(breaks)} breaks were caught ({WANTED:.0%} are wanted).")
    for one in survivors:
        print(f"survived: {one}")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
