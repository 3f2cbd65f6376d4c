"""Writes a small pickled DataFrame with the official columns: a seed for fuzzing the pickle reader.

    python3 scripts/pickle_seed.py fuzz/corpus/pickle/seed      (pandas and numpy from PyPI)
"""

import sys

import numpy as np
import pandas as pd

frame = pd.DataFrame({
    "uid": np.array([1, 2]), "iid": np.array([3, 4]), "label": np.array([0, 1]), "timestamp": np.array([5, 6]),
    "his": [[0], [0, np.int64(3)]], "his_title": [[""], ["", np.str_("A (1999)")]], "title": ["B", "C"],
    "flag": [1.0, 1.0], "not_cold": np.array([1, 0]),
}, index=[7, 9])
frame["title"] = frame["title"].astype(object)
frame.to_pickle(sys.argv[1])
