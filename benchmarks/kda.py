"""Times chunk_kda against transformers' torch form of chunked KDA: python benchmarks/kda.py"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
import transformers
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from kimi_recursive.kimi.kda import chunk_kda

RATIO, ERROR = 20.0, 1e-5  # what the fast form must reach, forward + backward


def timed(function, inputs: list[torch.Tensor], weight: torch.Tensor):
    """Seconds of the forward pass, seconds with backward, output and gradients."""
    start = time.perf_counter()
    out, _ = function(*inputs, use_qk_l2norm_in_kernel=True)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, inputs, weight)
    return middle - start, time.perf_counter() - start, (out.detach(), *grads)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=16, help="chunk length of the fast form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9, help="rounds of one run each; the median")
    parser.add_argument("--check", action="store_true", help="exit 1 below the required ratio")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape = (args.batch, args.tokens, args.heads, args.head_dim)
    query, key, value = (torch.randn(shape) for _ in range(3))
    g = -F.softplus(2 * torch.randn(shape) - 2)
    inputs = [x.requires_grad_() for x in (query, key, value, g, torch.rand(shape[:3]))]
    weight = torch.randn(shape)

    def fast(*x, **kwargs):
        return chunk_kda(*x, chunk_size=args.chunk, **kwargs)

    forms = {"transformers": kimi.chunk_kimi_delta_attention, "kimi_recursive": fast}
    seconds, results = defaultdict(list), {}
    for round_ in range(args.repeat + 1):  # the first one warms up
        for name, form in forms.items():
            *times, results[name] = timed(form, inputs, weight)
            if round_:
                seconds[name].append(times)

    theirs, ours = ([statistics.median(t) for t in zip(*seconds[n], strict=True)] for n in forms)
    errors = [
        ((x - y).abs().max() / y.abs().max()).item()
        for x, y in zip(results["kimi_recursive"], results["transformers"], strict=True)
    ]
    print(f"{tuple(shape)}, threads: {args.threads}, median of {args.repeat} interleaved rounds")
    print(f"{'':18}{'transformers':>14}{'kimi_recursive':>16}{'ratio':>8}{'max rel. error':>16}")
    rows = {"forward": errors[0], "forward + backward": max(errors[1:])}
    for (name, error), slow, quick in zip(rows.items(), theirs, ours, strict=True):
        row = f"{slow * 1e3:>11.1f} ms{quick * 1e3:>13.1f} ms{slow / quick:>8.1f}{error:>16.1e}"
        print(f"{name:18}{row}")
    met = theirs[1] / ours[1] >= RATIO and max(errors) <= ERROR
    print(f"required: ratio >= {RATIO:.0f}, error <= {ERROR:.0e}: {'met' if met else 'NOT met'}")
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
