"""Processes: several on one training, signals to stop, logs."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    distributed="launch",
    signals="stop_signals Interrupted",
    logs="quiet_libraries logging_to logged_error",
)
