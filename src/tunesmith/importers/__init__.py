"""Recipes of other tools as recipes of ours: read (`foreign.py`), translated (`tools.py`), and told
(`draft.py`).
"""
