"""What tests call in every process of a launch: a module that imports little, for each of them."""

import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import Interrupted, stop_signals


def fail(message: str, kind: type[Exception] = ValueError) -> None:
    raise kind(message)


def meet(path: str) -> None:
    Accelerator()
    distributed.wait_for_all()
    with pytest.raises(ValueError) as refused:
        distributed.share(3)
    said = f"{distributed.num_processes()} {distributed.share(4)} {refused.value}"
    Path(f"{path}.{distributed.is_main()}").write_text(said)


def wait_for_signal(path: str) -> None:
    Accelerator()
    with stop_signals() as arrived:
        Path(f"{path}.{distributed.is_main()}").touch()
        for _ in range(1200):
            if distributed.anywhere(bool(arrived)):
                raise Interrupted(7)
            time.sleep(0.05)
    raise ValueError("no signal came")
