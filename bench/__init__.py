"""Measurements that back every figure of the project; run them with `quernstone bench`.

A vertical adds one file, `bench_<vertical>.py`, and its shapes in `cases/<vertical>.py`.
"""
