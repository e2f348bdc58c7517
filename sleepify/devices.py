"""Where a command runs: the device that its user names, or an accelerator if there is one."""

from __future__ import annotations

import torch


def device_of(name: str | None = None) -> torch.device:
    """A device that is there.

    Args:
        name: as PyTorch writes it (``cpu``, ``cuda``, ``cuda:1``); None for an accelerator if there is one.

    Raises:
        ValueError: if PyTorch has no such device here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # A name that there is not, a driver that is not there, a PyTorch that was built without it.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        has = f"cpu and {found.type}" if found else "cpu alone"
        raise ValueError(f"expected a device that PyTorch has here ({has}), got {name!r}: {reason}") from error
    return device
