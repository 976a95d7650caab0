"""The tables of tools/bench scaling."""
from benchmarks import common

START_GOAL = 1.5   # seconds of MPI and NCCL, on two GPUs
MIB = 2**20


def show(told):
    heading(told)
    if "start_up" in told:
        start_up(told)
    if "collectives" in told:
        collectives(told)
    if told.get("one_gpu") or told.get("layouts"):
        steps(told)
    print("\nTook, seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in told["took_seconds"].items())
          + f"; together {sum(told['took_seconds'].values()):.0f}", flush=True)


def heading(told):
    gpu, n = told["gpu"], told["ranks"]
    if told["device"] == "cuda":
        print(f"{n} x {gpu['name']}, driver {gpu['driver']}, NVLink multicast off" if not told["shares_gpu"] else f"{n} ranks on one {gpu['name']}, driver {gpu['driver']}")
    if told["shares_gpu"] or told["device"] == "cpu":
        print("NOT FOR QUOTING: ranks " + ("share a GPU" if told["shares_gpu"] else "are on a CPU") + "; this tries the script")


def start_up(told):
    one = told["start_up"]
    print("\nStart-up, from mpirun's start until every rank has used all communicators of a data-parallel run; each part the slowest rank's\n")
    if "failed" in one:
        print(one["failed"])
        return
    parts = one["start_up"]
    names = {"process": "process, libraries", "mpi": "MPI", "device": "the GPU", "communicators": "communicators", "first_use": "their first use"}
    goal = f" (goal on 2 GPUs: at most {START_GOAL} s)" if told["device"] == "cuda" else ""
    print(common.table(["ranks", *names.values(), "all, s"], [[one["ranks"], *(f"{parts[key]:.2f}" for key in names), f"{parts['all']:.2f}"]]))
    print(f"\nMPI, communicators and their first use ({one['transport']}): {one['mpi_and_nccl']:.2f} s{goal}; the median of {len(one['tries'])} starts: "
          + ", ".join(f"{each['start_up']['all']:.2f}" for each in one["tries"]))


def collectives(told):
    found = told["collectives"]
    if "failed" in found:
        print(f"\nCollectives: {found['failed']}")
        return
    lines = found["lines"]
    by = next((line["peer"]["by"] for line in lines if line["peer"]), "what it is over")
    print(f"\nBus bandwidth (as NCCL's tests count it), GB/s: Communicator over {lines[0]['by']}, beside {by} itself (torch.distributed)\n")
    sizes = list(dict.fromkeys(round(line["bytes"] / MIB, 4) for line in lines))
    rows = []
    for operation, dtype in dict.fromkeys((line["operation"], line["dtype"]) for line in lines):
        cells = []
        for line in [line for line in lines if (line["operation"], line["dtype"]) == (operation, dtype)]:
            mine, theirs = line["bus_bytes_per_second"], line["peer"].get("bus_bytes_per_second")
            cells += [f"{mine / 1e9:.2f}" if mine < 1e10 else f"{mine / 1e9:.0f}",
                      "-" if not theirs else f"{theirs / 1e9:.2f}" if theirs < 1e10 else f"{theirs / 1e9:.0f}", f"{mine / theirs:.2f}" if theirs else "-"]
        rows.append([operation, dtype, *cells])
    heads = [head for size in sizes for head in (f"{size:g} MiB", "its own", "of it")]
    print(common.table(["what", "of", *heads], rows))
    if "peer_failed" in found:
        print(f"\nBy itself: {found['peer_failed']}")
    print("\nA size is what a rank puts in. Communicator sums bf16 in fp32 and rounds once: parts travel to their owner, who adds them.")


def percent(value):
    return f"{100 * value:.1f} %"


def steps(told):
    of, n = told.get("shape"), told["ranks"]
    layers = f"{of['layers']} of its {told['of_layers']} layers" + (" (what one GPU holds, by `upcycle plan`)" if of["layers"] < told["of_layers"] else "")
    print(f"\nTraining steps, {told['model']}, {layers}: {of['experts']} experts, top-{of['top_k']}; ZeRO-1 unless said"
          + ("" if told["long_recompute"] == "none" else f"; long sequences with train.recompute = \"{told['long_recompute']}\" on one GPU and on all, as one GPU holds no more")
          + "\n")
    rows, notes = [], []
    for row in [*told.get("one_gpu", []), *told["layouts"]]:
        if "failed" in row:
            notes.append(f"{row['name']}, {row['step']}: {row['failed']}")
            rows.append([row["name"], row["step"], row.get("scaling", "-"), *["-"] * 12])
            continue
        if row.get("measured") is False:
            continue   # only for its losses
        trace = row.get("trace") or {}
        if "trace_failed" in row:
            notes.append(f"{row['name']}, trace: {row['trace_failed']}")
        if trace and trace["window"] < 0.9 * row["step_seconds"]:
            notes.append(f"{row['name']}: its trace covers {1e3 * trace['window']:.0f} ms of a step of {1e3 * row['step_seconds']:.0f}: it is not complete")
        if row.get("at_best", 1) < 1:
            notes.append(f"{row['name']}: with {row['parallel']['layout']} layers a chunk (the head with the loss is in the last) its bubble and its cut allow at most "
                         f"{percent(row['at_best'])}")
        if "fullest_rank" in row:
            notes.append(f"{row['name']}: natural routing gives the fullest rank {row['fullest_rank']:.3f} of the mean rows of a layer")
        if row.get("same") is False:
            notes.append(f"{row['name']}: ITS LOSSES ARE NOT ONE GPU'S: {row['losses']}, gradient norms {row['gradient_norms']}")
        rows.append([row["name"], row["step"], row.get("scaling", "-"), f"{row['tokens_per_second']:.0f}", percent(common.spread(row["seconds"])),
                     percent(row["of_perfect"]) if "of_perfect" in row else "-", f"{100 * row['goal']:.0f} %" if "goal" in row else "-",
                     f"{row['loss_difference']:.0e}" if "loss_difference" in row else "-", f"{row['norm_difference']:.0e}" if "norm_difference" in row else "-",
                     *([f"{1e3 * trace[key]:.1f}" for key in ("exposed", "hidden", "idle")] if trace else ["-"] * 3),
                     f"{row['gpu']['sm_mhz']:.0f} / {row['gpu']['watts']:.0f}" if row["gpu"] else "-",
                     f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-", f"{row['start_seconds']:.1f}"])
    print(common.table(["layout", "sequences of a step", "scaling", "tokens/s", "+-", f"of {n} x one GPU", "goal", "loss off by", "norm off by", "exposed ms", "hidden ms",
                        "idle ms", "SM MHz / W", "peak GiB", "start s"], rows))
    print("".join(f"\n{note}" for note in notes), end="\n" if notes else "")
    print("""
weak: each GPU has the sequences that one GPU had; strong: all GPUs share one GPU's. Off by: the largest relative difference of the first 3 steps to
one GPU's with the same sequences. Of a traced run (3 steps, which take longer), a step, the mean over ranks: exposed: a GPU is in NCCL's kernels,
moving or waiting for the others (a pipeline's bubble is in it), and no other kernel runs; hidden: beside others; idle: it does nothing.
SM MHz / W, peak GiB: of the first GPU. start: from a cold process, resuming the stored step 0, to the report of its first step.""")
