"""How much memory there is: what the user says, or what is free right now."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
UNITS |= {f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")}


@dataclass(frozen=True)
class Room:
    """Bytes for a cache on the device and on the host, and where each number comes from. shared: both were read off the
    same memory, so what the host part takes the device part cannot have."""

    device: int
    device_source: str
    host: int
    host_source: str
    shared: bool

    def holds(self, device: int, host: int) -> bool:
        if self.shared and device + host > self.device:
            return False
        return device <= self.device and host <= self.host


def room(device: torch.device | None, memory: int | str | None, host_memory: int | str | None) -> Room:
    """device: where the model is; None or meta (it has no weights): where `load` would put it."""
    if device is None or device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device, device_source = (parse_bytes("memory", memory), "given") if memory is not None else _free(device)
    on_host, host_source = (
        (parse_bytes("host memory", host_memory, least=0), "given") if host_memory is not None else available()
    )
    return Room(on_device, device_source, on_host, host_source, device_source == host_source != "given")


def parse_bytes(what: str, size: int | str, least: int = 1) -> int:
    """`2GiB`, `512 MB`, `1.5gb`, `1000` or an int -> bytes. Raises ValueError for anything else and below `least`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(size), re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or isinstance(size, bool | float):
        raise ValueError(f"{what} must be bytes (an int) or like '2GiB' or '512MB', got {size!r}")
    n = int(float(found[1]) * unit)
    if n < least:
        raise ValueError(f"{what} must be at least {least} bytes, got {size!r}")
    return n


def _free(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {device} now, as its driver says (torch.cuda.mem_get_info)"
    if device.type == "cpu":
        return available()
    raise ValueError(f"cannot read the free memory of {device}: say memory='2GiB'")


def available() -> tuple[int, str]:
    """Bytes of host memory, and where the number is from."""
    return psutil.virtual_memory().available, "available on this machine now, as its kernel says"


def megabytes(n: int) -> str:
    """10^6 bytes, for people."""
    return f"{n / 1e6:,.2f} MB" if n < 1e8 else f"{n / 1e6:,.0f} MB"
