"""Publishing an experiment on the Hugging Face Hub."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    upload="read_experiment gather upload",
)
