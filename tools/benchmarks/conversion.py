"""Conversion beside the disk: `upcycle convert`, dense and growing a mixture, and `upcycle train` with no steps, which certifies it. The bound is what
as many processes take to read the source's files and then to write as many bytes as ours wrote, fsync included, with or without the page cache,
whichever is faster. The source is dropped from the page cache before each. Where mergekit-moe is installed, it makes a mixture of as many experts
from the same directory."""
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import common, plain_files

EXPERTS, TOP_K = 8, 2
MIXTURE = f"[moe]\nexperts = {EXPERTS}\ntop_k = {TOP_K}\n"
JOBS = {   # name: what the table calls it, command, further lines of the run file
    "dense": ("convert", "convert", ""),
    "experts": (f"convert to {EXPERTS} experts", "convert", f"{MIXTURE}[upcycle]\ncertify = false\n"),
    "certified": ("the same, weights certified", "convert", MIXTURE),
    "train": ("train without steps, certified", "train", MIXTURE),
    "mergekit": (f"mergekit-moe, {EXPERTS} experts", "", ""),
}


def make_source(folder, model, layers):
    tool = common.ROOT / "tools/make-dense"
    if not tool.exists():
        raise common.Failed(f"{tool} is not there; it makes the dense model")
    source = folder / "dense"
    common.run([sys.executable, tool, model, source, *(["--layers", str(layers)] if layers else [])], common.environment(common.cores()))
    return source


def files_of(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def bytes_of(directory):
    return sum(path.stat().st_size for path in files_of(directory))


def plain(folder, source, size, processes):
    """Seconds of the disk for reading the source and writing `size` bytes."""
    return {"read": plain_files.read(files_of(source), processes), "write": plain_files.write(folder / "plain", size, processes, direct=False),
            "direct write": plain_files.write(folder / "plain", size, processes, direct=True)}


def bound(plains):
    """Seconds: the medians of reading, and of the faster way to write."""
    median = lambda way: statistics.median(one[way] for one in plains)   # noqa: E731
    return median("read") + min(median("write"), median("direct write"))


def grow(folder, source, command, more, ranks, threads, upcycle):
    run_file, directory = folder / "run.toml", folder / "run"
    run_file.write_text(f'[run]\nname = "bench"\ndirectory = "{directory}"\ndevice = "cpu"\n[source]\nmodel = "{source}"\n{more}'
                        f'[train]\nsteps = 0\nsequence = 64\nglobal_batch = {ranks}\nprecision = "bf16"\n'
                        f'[data]\ntrain = "mock"\n[parallel]\nexpert = {ranks if more else 1}\n')
    plain_files.forget(files_of(source))
    done = common.run(common.on_ranks(ranks, upcycle, command, run_file), common.environment(max(1, threads // ranks)), cwd=folder, watch="upcycle")
    return done, directory / "checkpoints/step-00000000"


def compare(folder, model, layers, jobs, repeats, threads, upcycle):
    source = make_source(folder, model, layers)
    rows = []
    for job in jobs:
        try:
            rows.append(mergekit(folder, source, repeats, threads) if job == "mergekit" else beside_disk(job, folder, source, repeats, threads, upcycle))
        except common.Failed as why:   # `train` holds masters and gradients, too: not every machine has the memory
            common.say(str(why))
            shutil.rmtree(folder / "run", ignore_errors=True)
            rows.append({"job": JOBS[job][0], "skipped": "fails: " + str(why).strip().splitlines()[1]})
    return rows


def beside_disk(job, folder, source, repeats, threads, upcycle):
    """One of our jobs, on one rank and on as many as there are threads, each beside as many processes that read and write plainly."""
    name, command, more = JOBS[job]
    results = {ranks: {"seconds": [], "memory_bytes": [], "plain": []} for ranks in dict.fromkeys((1, threads))}
    for repeat in range(repeats):
        for ranks, result in results.items():
            done, written = grow(folder, source, command, more, ranks, threads, upcycle)
            size = bytes_of(written)
            shutil.rmtree(folder / "run")
            result["seconds"].append(done.seconds)
            result["memory_bytes"].append(done.memory_bytes)
            result["plain"].append(plain(folder, source, size, ranks))
            common.say(f"  {name}, {repeat + 1} of {repeats}, {ranks} rank(s): {done.seconds:.1f} s, {done.memory_bytes / 1e9:.2f} GB; the disk: " +
                       ", ".join(f"{way} {seconds:.1f} s" for way, seconds in result["plain"][-1].items()))
    return {"job": name, "source_bytes": bytes_of(source), "written_bytes": size, "ranks": {str(ranks): result for ranks, result in results.items()}}


def mergekit(folder, source, repeats, threads):
    """mergekit-moe on the same source. A row that says why not, where it is missing or does not do this model."""
    job = JOBS["mergekit"][0]
    program = shutil.which("mergekit-moe", path=f"{Path(sys.executable).parent}:{common.os.environ.get('PATH', '')}")
    if not program:
        return {"job": job, "skipped": "mergekit is not installed"}
    config, out = folder / "mergekit.yaml", folder / "merged"
    config.write_text(f"base_model: {source}\ngate_mode: random\ndtype: bfloat16\nexperts_per_token: {TOP_K}\nexperts:\n" +
                      f"  - source_model: {source}\n    positive_prompts: [\"\"]\n" * EXPERTS)
    result = {"seconds": [], "memory_bytes": [], "plain": []}
    for _ in range(repeats):
        plain_files.forget(files_of(source))
        try:
            done = common.run([program, config, out], common.environment(threads), watch=("mergekit", "python"))
            subprocess.run(["sync", *files_of(out)], check=True)
        except common.Failed as why:
            shutil.rmtree(out, ignore_errors=True)
            return {"job": job, "skipped": "mergekit-moe fails: " + str(why).strip().splitlines()[-1]}
        size = bytes_of(out)
        shutil.rmtree(out)
        result["seconds"].append(done.seconds)
        result["memory_bytes"].append(done.memory_bytes)
        result["plain"].append(plain(folder, source, size, 1))
        common.say(f"  {job}: {done.seconds:.1f} s, {done.memory_bytes / 1e9:.2f} GB")
    return {"job": job, "source_bytes": bytes_of(source), "written_bytes": size, "ranks": {"1": result}}


def print_table(rows):
    lines = []
    for row in rows:
        if "skipped" in row:
            continue
        for ranks, result in row["ranks"].items():
            seconds, disk = statistics.median(result["seconds"]), bound(result["plain"])
            noise = max(common.spread(result["seconds"]), *(common.spread([one[way] for one in result["plain"]]) for way in ("read", "direct write")))
            lines.append([row["job"], ranks, f"{row['source_bytes'] / 1e9:.2f}", f"{row['written_bytes'] / 1e9:.2f}", f"{seconds:.1f}",
                          f"{row['written_bytes'] / seconds / 1e9:.2f}", f"{disk:.1f}", f"{disk / seconds:.2f}",
                          f"{max(result['memory_bytes']) / 1e9:.2f}", f"{100 * noise:.0f} %"])
    print("\nConversion, start-up and fsync included; of the disk: seconds that plain reading of the source and plain writing of as many bytes take, over"
          "\nours; memory: anonymous and shared, the most of all ranks together\n")
    print(common.table(["job", "ranks", "read GB", "written GB", "s", "GB/s", "disk s", "of the disk", "memory GB", "+-"], lines))
    for row in rows:
        if "skipped" in row:
            print(f"{row['job']}: {row['skipped']}")
