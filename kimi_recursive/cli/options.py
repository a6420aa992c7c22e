"""Options that every command which loads a model has."""

from __future__ import annotations

from typing import Annotated

import typer

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ... Default: a GPU where there is one.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto or sequential: spread the layers over devices (config/README.md)."),
]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id; pin it.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
