"""`kimi-recursive lm-eval`: lm-evaluation-harness with the model `kimi_recursive` registered."""

from __future__ import annotations

import sys

import typer

from kimi_recursive.processes.logs import quiet_libraries


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a model of this package.

    All arguments are passed on to `lm_eval run`, whose --help lists them. Without --model, the
    model is `kimi_recursive`. Needs: pip install 'kimi-recursive[eval]'.

    \b
    kimi-recursive lm-eval --include_path examples/lm_eval --tasks sotu --batch_size 8
        --model_args path=results/runs/recursive_a_s0/sidecar,num_steps=2,max_length=256

    \b
    --model_args, as key=value,key=value:
      path       a base, or a sidecar, which names its base: a folder or a Hub id
      num_steps  the inner step that scores and generates. Default: K. 0: the base in one
                 plain pass; scores are those of `--model hf --model_args pretrained=BASE`
      commit     verified (default) or learned: how generation commits a draft
      revision   revision of a Hub id; pin it
      device_map auto or sequential: spreads the base over several devices
      max_length, dtype, tokenizer, add_bos_token, ...: as for the harness's model hf

    With a base in bfloat16, log-probabilities are summed in bfloat16, as in hf;
    softmax_dtype=float32 sums them in float32.
    """
    quiet_libraries()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    arguments = list(context.args)
    if arguments[0] not in ("ls", "validate"):
        arguments = arguments[arguments[0] == "run" :]
        naming = ("--model", "-M", "--config", "-C")
        if not any(word.split("=")[0] in naming for word in arguments):
            arguments = ["--model", "kimi_recursive", *arguments]
        arguments = ["run", *arguments]
        import kimi_recursive.evaluation.harness  # noqa: F401  (registers the model)
    setup_logging()
    sys.argv = ["lm_eval", *arguments]
    parser = HarnessCLI()
    parser.execute(parser.parse_args())
