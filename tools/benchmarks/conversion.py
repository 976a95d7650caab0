"""Conversion beside plain file copy: `upcycle convert`, dense and growing a mixture, and `upcycle train` with no steps, which certifies it. For each, a
copy of the very files that it wrote, with fsync, on the same disk; files that are read come from the page cache in both. Where mergekit-moe is
installed, it makes a mixture of as many experts from the same directory."""
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import common

EXPERTS, TOP_K = 8, 2
JOBS = {   # name: command, further lines of the run file
    "convert": ("convert", ""),
    f"convert to {EXPERTS} experts": ("convert", f"[moe]\nexperts = {EXPERTS}\ntop_k = {TOP_K}\n[upcycle]\ncertify = false\n"),
    "the same, weights certified": ("convert", f"[moe]\nexperts = {EXPERTS}\ntop_k = {TOP_K}\n"),
    "train without steps, certified": ("train", f"[moe]\nexperts = {EXPERTS}\ntop_k = {TOP_K}\n"),
}


def make_source(folder, model, layers):
    tool = common.ROOT / "tools/make-dense"
    if not tool.exists():
        raise common.Failed(f"{tool} is not there; it makes the dense model")
    source = folder / "dense"
    common.run([sys.executable, tool, model, source, *(["--layers", str(layers)] if layers else [])], common.environment(common.cores()))
    return source


def bytes_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def copy(directory, to):
    """Seconds that cp takes for the files, with the fsync of each."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    to.mkdir()
    done = common.run(["bash", "-c", 'to=$1; shift; cp --reflink=never --sparse=never -- "$@" "$to" && sync -- "$to"/* "$to"', "-", to, *files],
                      common.environment(1))
    shutil.rmtree(to)
    return done.seconds


def grow(folder, source, command, more, ranks, threads, upcycle):
    run_file, directory = folder / "run.toml", folder / "run"
    run_file.write_text(f'[run]\nname = "bench"\ndirectory = "{directory}"\ndevice = "cpu"\n[source]\nmodel = "{source}"\n{more}'
                        f'[train]\nsteps = 0\nsequence = 64\nglobal_batch = {ranks}\nprecision = "bf16"\n'
                        f'[data]\ntrain = "mock"\n[parallel]\nexpert = {ranks if more else 1}\n')
    done = common.run(common.on_ranks(ranks, upcycle, command, run_file), common.environment(max(1, threads // ranks)), cwd=folder, watch="upcycle")
    return done, directory / "checkpoints/step-00000000"


def compare(folder, model, layers, repeats, threads, upcycle):
    source = make_source(folder, model, layers)
    rows = []
    for job in JOBS:
        try:
            rows.append(beside_copy(job, folder, source, repeats, threads, upcycle))
        except common.Failed as why:   # `train` holds masters and gradients, too: not every machine has the memory
            common.say(str(why))
            shutil.rmtree(folder / "run", ignore_errors=True)
            rows.append({"job": job, "skipped": "fails: " + str(why).strip().splitlines()[1]})
    rows.append(mergekit(folder, source, bytes_of(source), repeats, threads))
    return rows


def beside_copy(job, folder, source, repeats, threads, upcycle):
    """One of our jobs, on one rank and on as many as there are threads, and cp of what it wrote."""
    command, more = JOBS[job]
    results = {ranks: {"seconds": [], "anonymous_bytes": []} for ranks in dict.fromkeys((1, threads))}
    copies = []
    for repeat in range(repeats):
        for ranks, result in results.items():
            done, written = grow(folder, source, command, more, ranks, threads, upcycle)
            result["seconds"].append(done.seconds)
            result["anonymous_bytes"].append(done.anonymous_bytes)
            common.say(f"  {job}, {repeat + 1} of {repeats}, {ranks} rank(s): {done.seconds:.1f} s, {done.anonymous_bytes / 1e9:.2f} GB")
            size = bytes_of(written)
            if ranks == threads:
                copies.append(copy(written, folder / "copy"))
                common.say(f"  {job}, {repeat + 1} of {repeats}, cp of what it wrote: {copies[-1]:.1f} s")
            shutil.rmtree(folder / "run")
    return {"job": job, "source_bytes": bytes_of(source), "written_bytes": size, "copy_seconds": copies,
            "ranks": {str(ranks): result for ranks, result in results.items()}}


def mergekit(folder, source, source_bytes, repeats, threads):
    """mergekit-moe on the same source. A row that says why not, where it is missing or does not do this model."""
    job = f"mergekit-moe, {EXPERTS} experts"
    program = shutil.which("mergekit-moe", path=f"{Path(sys.executable).parent}:{common.os.environ.get('PATH', '')}")
    if not program:
        return {"job": job, "skipped": "mergekit is not installed"}
    config, out = folder / "mergekit.yaml", folder / "merged"
    config.write_text(f"base_model: {source}\ngate_mode: random\ndtype: bfloat16\nexperts_per_token: {TOP_K}\nexperts:\n" +
                      f"  - source_model: {source}\n    positive_prompts: [\"\"]\n" * EXPERTS)
    result, copies = {"seconds": [], "anonymous_bytes": []}, []
    for _ in range(repeats):
        try:
            done = common.run([program, config, out], common.environment(threads), watch=("mergekit", "python"))
            subprocess.run(["sync", *[path for path in out.rglob("*") if path.is_file()]], check=True)
        except common.Failed as why:
            shutil.rmtree(out, ignore_errors=True)
            return {"job": job, "skipped": "mergekit-moe fails: " + str(why).strip().splitlines()[-1]}
        result["seconds"].append(done.seconds)
        result["anonymous_bytes"].append(done.anonymous_bytes)
        size = bytes_of(out)
        copies.append(copy(out, folder / "copy"))
        shutil.rmtree(out)
        common.say(f"  {job}: {done.seconds:.1f} s, {done.anonymous_bytes / 1e9:.2f} GB; cp {copies[-1]:.1f} s")
    return {"job": job, "source_bytes": source_bytes, "written_bytes": size, "copy_seconds": copies, "ranks": {"1": result}}


def print_table(rows):
    lines = []
    for row in rows:
        if "skipped" in row:
            continue
        plain = statistics.median(row["copy_seconds"])
        for ranks, result in row["ranks"].items():
            seconds = statistics.median(result["seconds"])
            noise = max(common.spread(result["seconds"]), common.spread(row["copy_seconds"]))
            lines.append([row["job"], ranks, f"{row['source_bytes'] / 1e9:.2f}", f"{row['written_bytes'] / 1e9:.2f}", f"{seconds:.1f}",
                          f"{row['written_bytes'] / seconds / 1e9:.2f}", f"{plain:.1f}", f"{100 * plain / seconds:.0f} %",
                          f"{max(result['anonymous_bytes']) / 1e9:.2f}", f"{100 * noise:.0f} %"])
    print("\nConversion, start-up and fsync included; share of copy: time of cp with fsync for the same bytes, over ours\n")
    print(common.table(["job", "ranks", "read GB", "written GB", "s", "GB/s", "cp s", "share of copy", "anonymous GB, all ranks", "+-"], lines))
    for row in rows:
        if "skipped" in row:
            print(f"{row['job']}: {row['skipped']}")
