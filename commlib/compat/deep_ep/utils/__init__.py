"""`deep_ep.utils`: EventHandle and EventOverlap, both, as clients of either major version import them from here."""

from commlib.compat.deep_ep.utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
