"""tools/bench moe-layer: the mixture layer (router, sorting, experts, sum), forward and backward, beside its own matrix products alone, on the
same rows of the same experts in the same process: the faster of our grouped products (which add into fp32) and ATen's (in bf16). 4, 8 and 64
experts, random routing. Medians of device time."""
import json
import subprocess
import sys

from benchmarks import common, ops


def main(words):
    chosen = ops.options("moe-layer", words, __doc__)
    try:
        ceilings, lines, facts, seen = ops.measure("moe-layer", chosen)
        print(ops.heading(ceilings, facts, seen) + "\n")
        print(common.table(["layer", "experts", "top-k", "tokens", "layer ms", "+-", "its products, ours, ms", "ATen's, ms", "products/layer", "TFLOP/s", "fullest/mean"],
                           [[line["shape"], line["experts"], line["top_k"], line["tokens"], f"{1e3 * line['layer_seconds']:.3f}", f"{100 * line['spread']:.1f} %",
                             f"{1e3 * line['own_products_seconds']:.3f}", f"{1e3 * line['aten_products_seconds']:.3f}", f"{line['products_over_layer']:.3f}",
                             f"{line['flops'] / line['layer_seconds'] / 1e12:.0f}", f"{line['fullest_over_mean']:.2f}"] for line in lines]))
        if chosen.json:
            chosen.json.write_text(json.dumps({"gpu": facts, "clocks": seen, "ceilings": ceilings, "layers": lines}, indent=1) + "\n")
    except (common.Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    return 0
