"""Programs that failed once, as short as they then still failed, each under the name of its cause."""

from __future__ import annotations

from model_generator import Program

KEPT: dict[str, Program] = {}
