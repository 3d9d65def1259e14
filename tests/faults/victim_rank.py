"""What ``test_torchrun.py`` starts in place of ``plait``: process 1 cannot build its model, process 0 is slow at it."""

from __future__ import annotations

import os
import time
from typing import NoReturn

from plait.cli.main import entry
from plait.core.errors import CheckpointError
from plait.stages.tuning import phases


def fail(*_: object, **__: object) -> NoReturn:
    """As reading a damaged file does; the first process is at something that takes long."""
    if os.environ["RANK"] == "0":
        time.sleep(60)
    raise CheckpointError("weights of the decoder are damaged", place="model.safetensors", remedy="copy it again")


if __name__ == "__main__":
    phases.build_multimodal = fail
    entry()
