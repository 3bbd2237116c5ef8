"""Recipes of other tools as recipes of ours: read (`foreign.py`), translated (`tools.py`), and
described (`draft.py`).
"""
