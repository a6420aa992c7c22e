"""Estimates what a matrix will need before it starts."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    estimate="plan gpus_needed",
    measure="measure",
)
