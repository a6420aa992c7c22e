"""What there is to run, where it lies, and what it must have been made with."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    runs="trainings evaluations",
    settings="read_config validate_settings",
    job="job",
)
