"""Driving a base's decoder layer by layer, so that sleep.py can loop over any part of it."""

from sleepify.hosts.conventions import find_decoder, is_recurrent, layer_kinds
from sleepify.hosts.driver import Frame, Host
from sleepify.hosts.families import FAMILIES, host_class
from sleepify.hosts.rotary import first_positions
from sleepify.hosts.verify import verify
from sleepify.hosts.window_cache import WindowCache

__all__ = [
    "FAMILIES",
    "Frame",
    "Host",
    "WindowCache",
    "find_decoder",
    "first_positions",
    "host_class",
    "is_recurrent",
    "layer_kinds",
    "verify",
]
