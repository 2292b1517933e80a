"""Dispatch of mixtures of experts by number of tokens: which kernels run, and their tiles.

The columns of `TABLE` are written so that they can stand next to those of `ops/dispatch.py`.
"""
