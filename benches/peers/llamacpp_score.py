"""What llama.cpp does with the same prompts: prompt processing of TALLRec prompts, one answer token each, on the CPU.

It cannot splice vectors, so the prompts are those without slots (`--task text`). The GGUF is taken as it is (its quantised
weights are read faster than bf16), and with `--dtype` its tensors are dequantised and written anew in F32, F16 or BF16 first.
`--sort` puts rows that begin alike next to each other; llama.cpp then keeps the common part of the one before
(`cache_prompt`). One request warms up. Prints JSON with the keys of `collm-engine bench`.

    pip install xllamacpp gguf pyarrow tokenizers     # llama.cpp in a wheel
    python3 llamacpp_score.py --gguf FILE --model DIR --data DIR --rows 64 --threads 2 [--dtype BF16] [--sort] [--parallel 8]
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import pyarrow.parquet as pq
import xllamacpp
from tokenizers import Tokenizer

TALLREC = ('#Question: A user has given high ratings to the following movies: {titles}. Leverage the information to predict '
           'whether the user would enjoy the movie titled {target}? Answer with "Yes" or "No". \\n#Answer:')


def prompts(args, tokenizer):
    """Token ids of the first test rows."""
    table = pq.read_table(f"{args.data}/test.parquet").slice(0, args.rows).to_pylist()
    out = []
    for row in table:
        titles = row["his_title"][1:][-10:]
        text = "<s>" + TALLREC.format(
            titles=", ".join(f'"{t}"' for t in titles) if titles else "unkow", target=f'"{row["title"].strip()}"')
        out.append(tokenizer.encode(text, add_special_tokens=False).ids)
    return sorted(out) if args.sort else out


def rewritten(path, dtype, out):
    """The GGUF with its matrices in another type."""
    reader = gguf.GGUFReader(path)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = gguf.GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    target = gguf.GGMLQuantizationType[dtype]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = target if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf")
    parser.add_argument("--model", required=True, help="Hugging Face directory of the same model, for its tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16"], help="rewrite the weights first; default: as they are")
    parser.add_argument("--sort", action="store_true")
    parser.add_argument("--parallel", type=int, default=8, help="requests in flight, batched together by the server")
    parser.add_argument("--ids", help="write the prompts' token ids here as JSON and stop (for candle/)")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = prompts(args, Tokenizer.from_file(f"{args.model}/tokenizer.json"))
    if args.ids:
        with open(args.ids, "w") as f:
            json.dump(rows, f)
        return

    with tempfile.TemporaryDirectory() as scratch:
        path = args.gguf
        if args.dtype:
            path = os.path.join(scratch, f"{args.dtype}.gguf")
            rewritten(args.gguf, args.dtype, path)
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = args.threads
        params.cpuparams_batch.n_threads = args.threads
        params.n_parallel = args.parallel
        params.n_ctx = 512 * args.parallel
        params.n_batch = params.n_ubatch = 2048
        params.verbosity = 0
        server = xllamacpp.Server(params)

        def score(ids):
            answer = server.handle_completions(
                {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": args.sort, "n_probs": 1})
            return answer["timings"]["prompt_n"]

        score(rows[0])
        start = time.perf_counter()
        with ThreadPoolExecutor(args.parallel) as pool:
            computed = sum(pool.map(score, rows))
        seconds = time.perf_counter() - start
    with open("/proc/self/status") as f:
        peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    tokens = sum(map(len, rows))
    result = {"samples_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds, "computed_tokens": computed,
              "peak_rss_bytes": peak, "build": str(xllamacpp.BUILD_INFO), "batches": [
                  {"rows": len(rows), "tokens": tokens, "seconds": seconds}]}
    print(f"llama.cpp {args.dtype or 'as it is'}: {result['samples_per_s']:.2f} samples/s, {tokens / seconds:.0f} tokens/s "
          f"({computed} of {tokens} computed), peak {peak / 2**30:.2f} GiB")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f)


if __name__ == "__main__":
    main()
