"""What people would use instead: PyTorch + transformers + PEFT, on the official CoLLM prompts.

float32, SDPA attention, left padding, logits of the last position only. Stage 1 trains LoRA (r 8, alpha 16, q and v, dropout
0.05) on the TALLRec prompts; stage 2 freezes it and trains the mapping whose vectors are spliced into the CoLLM prompts; score
is inference on the CoLLM prompts. One batch warms up and is not counted. Prints JSON with the keys of `collm-engine bench`.

    python3 pytorch_collm.py --model DIR --data DIR --task stage1 --batch 16 --rows 64 --threads 2
"""

import argparse
import json
import statistics
import time

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

TALLREC = ('#Question: A user has given high ratings to the following movies: {titles}. Leverage the information to predict '
           'whether the user would enjoy the movie titled {target}? Answer with "Yes" or "No". \\n#Answer:')
COLLM = ("#Question: A user has given high ratings to the following movies: {titles}. Additionally, we have information about "
         "the user's preferences encoded in the feature <unk>. Using all available information, make a prediction about whether "
         'the user would enjoy the movie titled {target} with the feature <unk>? Answer with "Yes" or "No". \\n#Answer:')
DIM = 256


def prompts(args, tokenizer, unk):
    """Token ids and labels of the first rows; `unk` stands at the slots."""
    split = "test" if args.task == "score" else "train"
    table = pq.read_table(f"{args.data}/{split}.parquet").slice(0, args.rows).to_pylist()
    template = TALLREC if args.task == "stage1" else COLLM
    out = []
    for row in table:
        titles = row["his_title"][1:][-10:]
        text = "<s>" + template.format(
            titles=", ".join(f'"{t}"' for t in titles) if titles else "unkow", target=f'"{row["title"].strip()}"')
        ids = []
        for i, piece in enumerate(text.split("<unk>")):
            ids += ([unk] if i else []) + tokenizer.encode(piece, add_special_tokens=False).ids
        out.append((ids, float(row["label"])))
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", choices=["stage1", "stage2", "score"], required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sort-by-length", action="store_true", help="batches of like lengths: less padding")
    parser.add_argument("--merge-lora", action="store_true", help="stage 2 and score: the frozen adapter merged into the weights")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)

    tokenizer = Tokenizer.from_file(f"{args.model}/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    hidden = model.config.hidden_size
    yes = tokenizer.encode("Yes", add_special_tokens=False).ids[0]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    if args.task != "stage1":
        for p in model.parameters():
            p.requires_grad_(False)
        model.eval()
        if args.merge_lora:
            model = model.merge_and_unload()
    mapping = torch.nn.Sequential(torch.nn.Linear(DIM, 10 * DIM), torch.nn.ReLU(), torch.nn.Linear(10 * DIM, hidden))
    trained = [p for p in model.parameters() if p.requires_grad] if args.task == "stage1" else list(mapping.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    unk = 0  # any row of the table: it is overwritten
    slot = -1
    rows = prompts(args, tokenizer, slot)
    if args.sort_by_length:
        rows.sort(key=lambda r: len(r[0]))
    batches = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)]

    def step(batch):
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[unk] * (longest - len(i)) + i for i, _ in batch])
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in batch])
        labels = torch.tensor([label for _, label in batch])
        slots = ids == slot
        embeds = model.get_input_embeddings()(ids.clamp(min=0))
        if args.task != "stage1":
            vectors = mapping(torch.randn(len(batch), 2, DIM))
            embeds = embeds.clone()
            embeds[slots] = vectors.reshape(-1, hidden)
        logits = model(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=1, use_cache=False).logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, -1, yes], labels)
        if args.task != "score":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return longest

    costs = []
    context = torch.no_grad() if args.task == "score" else torch.enable_grad()
    with context:
        step(batches[0])
        for batch in batches:
            start = time.perf_counter()
            longest = step(batch)
            seconds = time.perf_counter() - start
            costs.append({"rows": len(batch), "tokens": sum(len(i) for i, _ in batch), "padded": longest * len(batch),
                          "seconds": seconds})
    with open("/proc/self/status") as f:
        peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    median = lambda f: statistics.median(f(c) for c in costs)
    result = {
        "samples_per_s": median(lambda c: c["rows"] / c["seconds"]),
        "tokens_per_s": median(lambda c: c["tokens"] / c["seconds"]),
        "padded_tokens_per_s": median(lambda c: c["padded"] / c["seconds"]),
        "peak_rss_bytes": peak,
        "torch": torch.__version__,
        "batches": costs,
    }
    print(f"{args.task}: {result['samples_per_s']:.2f} samples/s, {result['tokens_per_s']:.0f} tokens/s "
          f"({result['padded_tokens_per_s']:.0f} with padding), peak {peak / 2**30:.2f} GiB")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f)


if __name__ == "__main__":
    main()
