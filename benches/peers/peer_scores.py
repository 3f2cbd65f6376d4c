"""Scores of a CoLLM run as Hugging Face PEFT computes them, to compare with `collm-engine score`.

    python3 peer_scores.py --model DIR --run RUN_DIR --data DIR --rows 20 --scores scores.csv

Loads the run's adapter with PEFT, the mapping (cie.safetensors) and MF (collab/mf.safetensors), builds the official prompts of
the first test rows, and prints the largest difference from the scores in the CSV (uid, iid, score).
"""

import argparse
import csv

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pytorch_collm import COLLM

parser = argparse.ArgumentParser()
for name in ["model", "run", "data", "scores"]:
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--rows", type=int, default=20)
args = parser.parse_args()

tokenizer = Tokenizer.from_file(f"{args.model}/tokenizer.json")
base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = PeftModel.from_pretrained(base, f"{args.run}/adapter").eval()
cie = load_file(f"{args.run}/cie.safetensors")
mf = load_file(f"{args.run}/collab/mf.safetensors")
yes = tokenizer.encode("Yes", add_special_tokens=False).ids[0]
ours = {(int(r["uid"]), int(r["iid"])): float(r["score"]) for r in csv.DictReader(open(args.scores))}
worst, largest = 0.0, 0.0
with torch.no_grad():
    for row in pq.read_table(f"{args.data}/test.parquet").slice(0, args.rows).to_pylist():
        titles = row["his_title"][1:][-10:]
        text = "<s>" + COLLM.format(
            titles=", ".join(f'"{t}"' for t in titles) if titles else "unkow", target=f'"{row["title"].strip()}"')
        ids, slots = [], []
        for i, piece in enumerate(text.split("<unk>")):
            if i:
                slots.append(len(ids))
                ids.append(0)
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        x = torch.stack([mf["user_embedding.weight"][row["uid"]], mf["item_embedding.weight"][row["iid"]]])
        h = torch.relu(x @ cie["llama_proj.0.weight"].T + cie["llama_proj.0.bias"])
        vectors = h @ cie["llama_proj.2.weight"].T + cie["llama_proj.2.bias"]
        embeds = base.get_input_embeddings()(torch.tensor([ids])).clone()
        embeds[0, slots] = vectors
        score = model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False).logits[0, -1, yes].item()
        worst = max(worst, abs(score - ours[row["uid"], row["iid"]]))
        largest = max(largest, abs(score))
print(f"{args.rows} rows: largest difference {worst:.2e}, scores up to {largest:.2f}")
