"""Efficient AI inference across very different hardware."""

from quernstone._config import __version__, isa, isas, num_threads, set_isa

__all__ = ["__version__", "isa", "isas", "num_threads", "set_isa"]
