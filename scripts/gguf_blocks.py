"""Writes tests/fixtures/gguf/blocks.json: random quantised blocks and their values as gguf-py decodes them.

Run with the PyPI packages `gguf` and `numpy`: python3 scripts/gguf_blocks.py > tests/fixtures/gguf/blocks.json
"""

import json
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

rng = np.random.default_rng(2023)
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# Where each block keeps its f16 scales: random bytes there could be NaN, so plausible scales are put in.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
cases = []
for name in TYPES:
    kind = GGMLQuantizationType[name]
    elements, size = GGML_QUANT_SIZES[kind]
    for _ in range(3):
        if name in ("F32", "F16"):
            raw = rng.standard_normal(4).astype(np.float32 if name == "F32" else np.float16).view(np.uint8)
        elif name == "BF16":
            raw = (rng.standard_normal(4).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            raw = rng.integers(0, 256, size, dtype=np.uint8)
            for at in SCALES[name]:
                raw[at : at + 2] = np.array([rng.standard_normal() * 0.05], np.float16).view(np.uint8)
        values = dequantize(raw.reshape(1, -1), kind).reshape(-1)
        cases.append([int(kind), raw.tobytes().hex(), [float(v) for v in values]])
json.dump(cases, sys.stdout)
