"""What the command prints when torchrun has started it several times: everything once."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import warnings
from datetime import timedelta

_PATIENCE = timedelta(seconds=2)


def quiet_but_for_the_first() -> None:
    """Leave warnings and progress bars, which are the same in all processes, to the first one."""
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def first_to_say(line: str) -> bool:
    """Whether no other process of the job has claimed this last line before it leaves.

    All processes meet most errors; some, one alone, and the first process may be the one that is
    gone. torchrun's own store, which outlives them, tells who comes first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    # torchrun ends the others once the first has left; they leave by themselves, with their code
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        return os.environ.get("RANK") == "0"
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {line}"
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=_PATIENCE)
        return store.add(f"bridge-peft/{hashlib.sha256(key.encode()).hexdigest()}", 1) == 1
    except (DistError, RuntimeError):
        return True  # better twice than not at all
