"""Mixture-of-experts inference where the experts do not fit: caches, traces, slots per layer."""
