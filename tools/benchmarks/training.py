"""Our training step beside transformers' on the same model, weights, tokens and cores. The data are one batch, so that every step of both
trains on the same sequences, and the losses tell whether both do the same work."""
import json
import statistics
import struct
import sys
from pathlib import Path

import numpy

from benchmarks import common

SIZES = {   # hidden, layers, heads, key/value heads, width of a head, of a feed-forward, vocabulary, sequences, their length
    "tiny": (64, 2, 2, 1, 32, 96, 512, 2, 32),   # for the test of this script
    "small": (256, 2, 4, 2, 64, 768, 4096, 4, 128),
    "medium": (512, 4, 8, 4, 64, 1536, 8192, 4, 256),
    "large": (1024, 8, 16, 8, 128, 3072, 32768, 4, 512),
}
EXPERTS, TOP_K, WARM_UP = 8, 2, 2
AGREE = {"fp32": 1e-4, "bf16": 2e-2}   # relative difference of the losses of the first step; bf16 rounds both in other places
PEER = Path(__file__).with_name("transformers_step.py")


def make_model(directory, size, moe):
    """A seeded random Hugging Face directory of that size, fp32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    hidden, layers, heads, kv_heads, head, ffn, vocab, _, length = SIZES[size]
    settings = dict(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                    head_dim=head, intermediate_size=ffn, max_position_embeddings=length, tie_word_embeddings=True,
                    rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="float32")
    torch.manual_seed(1)
    if moe:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=ffn,
                                                   norm_topk_prob=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokens(folder, size):
    """One batch: TOKENS.npy for transformers, and the same as Megatron's .bin/.idx: a document whose samples are just that batch."""
    *_, vocab, sequences, length = SIZES[size]
    stream = numpy.random.default_rng(2).integers(0, vocab, sequences * length + 1).astype(numpy.int32)
    numpy.save(folder / "tokens.npy", numpy.stack([stream[i * length:(i + 1) * length + 1] for i in range(sequences)]))
    (folder / "batch.bin").write_bytes(stream.tobytes())
    (folder / "batch.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 4, 1, 2, len(stream), 0, 0, 1))


def ours(folder, model, size, precision, moe, ranks, threads, steps, upcycle, number):
    """Seconds and losses of the steps of one `upcycle train` on that many ranks."""
    *_, sequences, length = SIZES[size]
    directory = folder / f"run-{number}"
    run_file = folder / f"run-{number}.toml"
    run_file.write_text(f"""[run]
name = "bench"
directory = "{directory}"
device = "cpu"
[source]
model = "{model}"
[train]
steps = {steps}
sequence = {length}
global_batch = {sequences}
micro_batch = {max(1, sequences // ranks)}
precision = "{precision}"
[optimizer]
lr = 1e-4
schedule = "constant"
[balance]
aux = 0.0
[data]
train = [[1.0, "{folder}/batch"]]
split = [1, 0, 0]
[parallel]
expert = {ranks if moe else 1}
[checkpoint]
every = 1000000
keep = 1
""")
    common.run(common.on_ranks(ranks, upcycle, "train", run_file), common.environment(max(1, threads // ranks)), cwd=folder)
    rows = [row for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]
    common.run(["rm", "-r", directory], common.environment(1))
    return [row["seconds"] for row in rows], [row["loss"] for row in rows]


def theirs(folder, model, ways, threads, steps):
    """For each way that runs here, the seconds and losses of its steps; why the others do not."""
    done = common.run([sys.executable, PEER, model, folder / "tokens.npy", steps, *("/".join(way) for way in ways)], common.environment(threads))
    rows = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    failed = {tuple(row["way"].split("/")): row["failed"] for row in rows if "failed" in row}
    steps_of = {way: [row for row in rows if row["way"] == "/".join(way)] for way in ways if way not in failed}
    return {way: ([row["seconds"] for row in rows], [row["loss"] for row in rows]) for way, rows in steps_of.items()}, failed


def steps_of_theirs(folder, model, way, threads, steps):
    done, failed = theirs(folder, model, [way], threads, steps)
    if failed:
        raise common.Failed(f"transformers, {' '.join(way)}: {failed[way]}")
    return done[way]


def best_of_theirs(folder, model, precision, moe, threads):
    """transformers' fastest way to do the step here, by two steps of each: which experts, and for bf16 all of it in bf16 or autocast."""
    ways = [(kind, experts) for kind in (("bf16", "autocast") if precision == "bf16" else ("fp32",))
            for experts in (("grouped_mm", "eager") if moe else ("",))]
    if len(ways) == 1:
        return ways[0], {}
    done, failed = theirs(folder, model, ways, threads, 3)
    for way, why in failed.items():
        common.say(f"  transformers, {' '.join(way)}: does not run here ({why})")
    if not done:
        raise common.Failed("transformers runs none of its ways here")
    tries = {way: min(seconds[1:]) for way, (seconds, _) in done.items()}
    return min(tries, key=tries.get), {" ".join(way).strip(): seconds for way, seconds in tries.items()}


def compare(folder, size, precisions, steps, repeats, threads, upcycle):
    """One row for each of dense and MoE in each precision. Runs alternate; a run's figure is the median of its steps after the warm-up."""
    *_, sequences, length = SIZES[size]
    make_tokens(folder, size)
    rows = []
    for kind in ("dense", "moe"):
        model = folder / kind
        parameters = make_model(model, size, kind == "moe")
        for precision in precisions:
            way, tries = best_of_theirs(folder, model, precision, kind == "moe", threads)
            sides = {"transformers": lambda: steps_of_theirs(folder, model, way, threads, steps + WARM_UP)}
            for ranks in dict.fromkeys((1, min(threads, sequences))):
                sides[f"ours, {ranks} rank{'s' if ranks > 1 else ''}"] = lambda ranks=ranks: ours(
                    folder, model, size, precision, kind == "moe", ranks, threads, steps + WARM_UP, upcycle, f"{kind}-{precision}-{ranks}")
            seconds, losses = {side: [] for side in sides}, {}
            for repeat in range(repeats):
                for side, measure in sides.items():
                    measured, losses[side] = measure()
                    seconds[side].append(statistics.median(measured[WARM_UP:]))
                    common.say(f"  {kind} {precision}, {repeat + 1} of {repeats}, {side}: {seconds[side][-1]:.3f} s a step, "
                               f"loss {losses[side][0]:.5f} -> {losses[side][-1]:.5f}")
            for side in sides:
                off = abs(losses[side][0] / losses["transformers"][0] - 1)
                if not off <= AGREE[precision]:
                    raise common.Failed(f"{kind}, {precision}: the first loss of {side} is {losses[side][0]}, transformers' is "
                                        f"{losses['transformers'][0]}: they do not do the same work")
            rows.append({"model": kind, "precision": precision, "parameters": parameters, "tokens_per_step": sequences * length,
                         "transformers": " ".join(way).strip(), "transformers_tries_seconds": tries, "losses": losses, "run_medians_seconds": seconds,
                         "tokens_per_second": {side: sequences * length / statistics.median(values) for side, values in seconds.items()}})
    return rows


def print_table(rows, threads):
    def text(row):
        rates = row["tokens_per_second"]
        mine = {side: rate for side, rate in rates.items() if side != "transformers"}
        best = max(mine, key=mine.get)
        noise = max(common.spread(row["run_medians_seconds"][side]) for side in ("transformers", best))
        return [row["model"], row["precision"], f"{row['parameters'] / 1e6:.1f} M", f"{rates['transformers']:.0f}", row["transformers"],
                f"{next(iter(mine.values())):.0f}", f"{mine[best]:.0f}", best.removeprefix("ours, "), f"{mine[best] / rates['transformers']:.2f}",
                f"{100 * noise:.0f} %"]

    print(f"\nTraining step, tokens/s ({rows[0]['tokens_per_step']} tokens a step, {threads} cores, AdamW, clipping; same weights and tokens, first losses agree)\n")
    print(common.table(["model", "precision", "parameters", "transformers", "its fastest way", "ours, 1 rank", "ours, best", "on", "ours/theirs", "+-"],
                       map(text, rows)))
