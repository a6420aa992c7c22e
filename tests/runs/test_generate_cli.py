"""`kimi-recursive generate` on a Llama with a byte-level tokenizer."""

import io
import json
import shutil

import pytest
import torch
from commands import call

from kimi_recursive import load_model_with_config
from kimi_recursive.cli.generate import agreement, side_by_side
from kimi_recursive.evaluation.samples import prompt_ids


@pytest.fixture(scope="module")
def generated(model_dir):
    """What the package itself makes of a prompt: ids of the continuation, by number of steps."""
    wrapper, tokenizer, _ = load_model_with_config(model_dir / "sidecar")
    ids = torch.tensor([prompt_ids(tokenizer, "abcd ab")])
    made = {
        steps: wrapper.generate_chunks(ids, max_new_tokens=12, num_steps=steps)[0, ids.shape[1] :]
        for steps in (0, 3)
    }
    assert made[0].tolist() != made[3].tolist()
    return tokenizer, {steps: tokens.tolist() for steps, tokens in made.items()}


def generate(monkeypatch, model, *options):
    options = ("--prompt", "abcd ab", "--max-new-tokens", 12, *options)
    return call(monkeypatch, "generate", "--model", model, *options)


def test_json_holds_the_refined_models_tokens(model_dir, generated, monkeypatch, capsys):
    tokenizer, made = generated
    for steps in (3, 0):
        code = generate(monkeypatch, model_dir / "sidecar", "--json", "--num-steps", steps)
        out, err = capsys.readouterr()
        assert code == 0 and json.loads(out) == {
            "prompt": "abcd ab",
            "completion": tokenizer.decode(made[steps], skip_special_tokens=True),
            "token_ids": made[steps],
        }
        assert "12 tokens, " in err and f"{steps:.2f} inner steps" in err


def test_prompts_of_unequal_length_are_one_batch(model_dir, generated, monkeypatch, capsys):
    generate(monkeypatch, model_dir / "sidecar", "--prompt", "ab", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["abcd ab", "ab"]
    assert rows[0]["token_ids"] == generated[1][3]


def test_sampling_options_and_stops_reach_the_model(model_dir, generated, monkeypatch, capsys):
    wrapper, tokenizer, _ = load_model_with_config(model_dir / "sidecar")
    ids = torch.tensor([prompt_ids(tokenizer, "abcd ab")])
    given = {"temperature": 1.7, "top_k": 40, "top_p": 0.95, "seed": 3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    expected = wrapper.generate_chunks(ids, max_new_tokens=12, do_sample=True, **given)
    generate(monkeypatch, model_dir / "sidecar", "--json", "--sample", *flags)
    found = json.loads(capsys.readouterr().out)["token_ids"]
    assert found == expected[0, ids.shape[1] :].tolist() != generated[1][3]
    stop = tokenizer.decode(generated[1][3][2:4])
    generate(monkeypatch, model_dir / "sidecar", "--json", "--stop", stop)
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) < 12


def test_the_base_is_compared_without_its_generation_config(
    model_dir, generated, monkeypatch, capsys, tmp_path
):
    """A repetition penalty would make it another model."""
    shutil.copytree(model_dir / "base", tmp_path / "base")
    config = {"do_sample": True, "repetition_penalty": 9.0, "eos_token_id": 1, "pad_token_id": 2}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(config))
    generate(monkeypatch, tmp_path / "base", "--json")
    assert json.loads(capsys.readouterr().out)["token_ids"] == generated[1][0]


def test_a_prompt_can_come_from_standard_input(model_dir, generated, monkeypatch, capsys):
    stdin = io.StringIO("abcd ab\n")
    monkeypatch.setattr("sys.stdin", stdin)
    arguments = ("generate", "--model", model_dir / "sidecar", "--max-new-tokens", 12, "--json")
    assert call(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == generated[1][3]
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    assert call(monkeypatch, *arguments) == 2
    assert "no prompt: use --prompt" in capsys.readouterr().err


def test_stream_prints_prompt_and_text(model_dir, generated, monkeypatch, capsys):
    tokenizer, made = generated
    assert generate(monkeypatch, model_dir / "sidecar", "--stream") == 0
    text = tokenizer.decode(tokenizer.encode("abcd ab") + made[3], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"


def test_compare_shows_each_and_says_how_far_they_agree(model_dir, generated, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code = generate(monkeypatch, model_dir / "sidecar", "--compare", "--commit", "learned")
    out, err = capsys.readouterr()
    same = agreement([generated[1][0]], [generated[1][3]])
    assert code == 0 and out.splitlines()[0] == "> abcd ab"
    assert [name.strip() for name in out.splitlines()[1].split("|")] == [
        "base", "verified", "learned",
    ]  # fmt: skip
    assert f"the first tokens equal those of base: {same}\n" in err
    assert "tokens equal those of verified: " in err
    assert generate(monkeypatch, model_dir / "sidecar", "--compare", "--sample", "--seed", 0) == 0
    assert "equal" not in capsys.readouterr().err, "two samples need not agree"


def test_columns_wrap_and_give_way_on_a_narrow_terminal():
    texts = {"base": "one two three four", "refined": "five\n\nsix"}
    assert side_by_side(texts, width=51).splitlines() == [
        "base                     | refined",
        "------------------------ | ------------------------",
        "one two three four       | five",
        "                         |",
        "                         | six",
    ]
    assert side_by_side(texts, width=50) == "[base]\none two three four\n[refined]\nfive\n\nsix"
    assert agreement([[1, 2, 3], [4]], [[1, 2, 4], [4, 5]]) == "2 of 3, 1 of 2"


def test_a_base_alone_generates_and_is_not_compared(model_dir, generated, monkeypatch, capsys):
    assert generate(monkeypatch, model_dir / "base", "--json") == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == generated[1][0]
    for option in (("--compare",), ("--num-steps", 1), ("--commit", "verified")):
        assert generate(monkeypatch, model_dir / "base", *option) == 2
        assert "is a base without cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--commit", "maybe"), "--commit: must be one of verified, learned, got 'maybe'"),
        (("--stream", "--prompt", "two"), "--stream: takes one prompt, got 2"),
        (("--top-k", 4), "--temperature, --top-k, --top-p and --seed need --sample"),
        (("--num-steps", 2, "--commit", "learned"), "num_steps needs commit='verified'"),
        (("--stream", "--json"), "--stream, --compare and --json exclude each other"),
        (("--sample", "--top-p", 3), "top_p must be above 0 and at most 1, got 3.0"),
        (("--sample", "--commit", "learned"), "do_sample needs commit='verified'"),
        (("--max-new-tokens", 10**6), "positions"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(model_dir, monkeypatch, capsys, options, message):
    assert generate(monkeypatch, model_dir / "sidecar", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1
