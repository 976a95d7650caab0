"""The picture of tools/plots of the looks at the experts: how alike they are, how far from the dense model, router entropy, dead ones."""
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from plots_style import COLOURS, MARKERS, dress, key_of, legend, scale_of, style_of

HEALTH = (("cosine_between", "same shard of different copies", "cosine similarity"),
          ("cosine_inside", "different shards of a copy", "cosine similarity"),
          ("cosine", "all pairs of experts", "cosine similarity"),
          ("distance", "distance to the dense model, mean over experts", "relative L2 distance"),
          ("entropy", "router entropy", "nats"),
          ("dead", "experts without a token since the last look", "experts of a layer"))


def plot_health(runs):
    def tells(run, key):
        return None if key == "cosine" and run.look_at("cosine_between") else run.look_at(key)

    told = [(key, title, y, [(i, tells(run, key)) for i, run in enumerate(runs) if tells(run, key)]) for key, title, y in HEALTH]
    told = [panel for panel in told if panel[3]]
    if not told:
        return None
    rows = (len(told) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(9.6, 0.6 + 2.6 * rows), squeeze=False, layout="constrained")
    divisor, unit = scale_of(runs)
    for axes in grid.flat[len(told):]:
        axes.set_axis_off()
    for axes, (key, title, y, of_runs) in zip(grid.flat, told):
        for i, (tokens, values) in of_runs:
            marker = MARKERS[i % len(MARKERS)] if len(tokens) <= 30 else None
            axes.fill_between(tokens / divisor, values.min(axis=1), values.max(axis=1), color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
            axes.plot(tokens / divisor, values.mean(axis=1), linewidth=1.6, marker=marker, markersize=3.5, **style_of(i))
        axes.set_title(title, fontsize=10, loc="left")
        dress(axes, f"tokens{unit}", y)
        low, high = axes.get_ylim()
        if high - low < 0.01:  # a flat line is flat, not a zigzag of rounding with an offset above the axis
            middle = (low + high) / 2
            axes.set_ylim(middle - 0.05, middle + 0.05)
        if key in ("distance", "dead"):
            axes.set_ylim(bottom=0)
        if key == "dead":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_ylim(top=max(1, axes.get_ylim()[1]))
    legend(figure, [key_of(i, run) for i, run in enumerate(runs) if run.looks])
    return figure
