"""Pictures of tools/plots of the experts' load: each expert's share over time; each layer's experts, and its busiest one."""
import math

import matplotlib.pyplot as plt
import numpy
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from plots_style import COLOURS, curve, dress, scale_of, short, smooth, span

MOST_LINES = 16  # experts; more become a heat map
MOST_COLUMNS = 400  # of a heat map over time


def with_experts(runs):
    return [(i, run, *loads) for i, run in enumerate(runs) if (loads := run.loads())]


def plot_experts(runs):
    """A row for each run with experts: shares on the left, load of the busiest expert on the right."""
    rows = with_experts(runs)
    if not rows:
        return None
    figure, grid = plt.subplots(len(rows), 2, figsize=(9.6, 0.4 + 3.0 * len(rows)), squeeze=False, width_ratios=(1.25, 1), layout="constrained")
    divisor, unit = scale_of(runs)
    for (i, run, tokens, load), (left, right) in zip(rows, grid):
        of_expert = load.mean(axis=1)
        experts = of_expert.shape[1]
        if experts > MOST_LINES:
            over_time(figure, left, tokens / divisor, of_expert)
        else:
            lines(left, tokens / divisor, 100 / experts * of_expert)
        left.set_title(f"{short(run.label)}: {experts} experts, mean over layers", fontsize=10, loc="left")
        when, busiest = run.column("load_max_over_mean")
        right.axhline(1, color="0.35", linewidth=1, linestyle=(0, (4, 3)))
        line = curve(right, i, when / divisor, busiest)
        if len(line):
            right.set_ylim(1 - 0.05 * (line.max() - 1 + 0.1), max(1.1, 1 + 1.12 * (line.max() - 1)))
        right.set_title("busiest expert", fontsize=10, loc="left")
        dress(left, f"tokens{unit}", "expert" if experts > MOST_LINES else "share of tokens (%; dashed: even)", grid=experts <= MOST_LINES)
        dress(right, f"tokens{unit}", "load, max / mean (dashed: 1)")
        left.set_xlim(*span(tokens / divisor))
        right.set_xlim(left.get_xlim())
    return figure


def lines(axes, tokens, share):
    """A line for every expert, its number at its end, moved apart where they would overlap."""
    experts = share.shape[1]
    axes.axhline(100 / experts, color="0.35", linewidth=1, linestyle=(0, (4, 3)))
    smoothed = numpy.array([smooth(column) for column in share.T])
    for e in range(experts):
        style = "-" if e < len(COLOURS) else (0, (2, 1))
        axes.plot(tokens, smoothed[e], color=COLOURS[e % len(COLOURS)], linestyle=style, linewidth=1.3,
                  marker="o" if len(tokens) == 1 else None, markersize=4)
    low, high = min(smoothed.min(), 100 / experts), max(smoothed.max(), 100 / experts)
    margin = 0.06 * (high - low) or 1
    axes.set_ylim(low - margin, high + margin)
    gap = 0.058  # of the axes' height: one line of small text
    order = numpy.argsort(smoothed[:, -1], kind="stable")
    height = (smoothed[order, -1] - (low - margin)) / (high - low + 2 * margin)
    for _ in range(200):  # push neighbours apart until all have room
        for k in range(experts - 1):
            lack = gap - (height[k + 1] - height[k])
            if lack > 0:
                height[k] -= lack / 2
                height[k + 1] += lack / 2
        height = height.clip(0.02, 0.98)
    axes.text(1.065 if experts <= 10 else 1.085, 0.5, "expert", transform=axes.transAxes, fontsize=8, color="0.35", ha="center", va="center", rotation=90)
    for e, y in zip(order, height):
        axes.text(1.03, y, str(e), transform=axes.transAxes, fontsize=8, ha="center", va="center", color=COLOURS[e % len(COLOURS)])


def load_map(figure, axes, cells, extent, label):
    """Colour is load relative to an even one, white, in powers of two both ways; black is no token at all."""
    powers = abs(numpy.log2(cells[cells > 0]))
    reach = min(3.0, max(0.25, numpy.percentile(powers, 99.5))) if len(powers) else 1.0
    colours = plt.get_cmap("PuOr_r").with_extremes(bad="black")
    shown = numpy.where(cells > 0, cells, numpy.nan)
    image = axes.imshow(shown, aspect="auto", origin="lower", interpolation="nearest", cmap=colours, extent=extent,
                        norm=LogNorm(2**-reach, 2**reach))
    ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4, 2, 4, 8) if 2**-reach <= tick <= 2**reach]
    if reach > 1.5:
        ticks = [tick for tick in ticks if math.log2(tick).is_integer()]
    bar = figure.colorbar(image, ax=axes, label=label + ("; black: none" if (cells == 0).any() else ""), pad=0.02,
                          extend="both" if powers.size and powers.max() > reach else "neither")
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"1/{1 / tick:.0f}" if tick < 1 and (1 / tick).is_integer() else f"{tick:.3g}"))


def in_columns(values):
    """At most MOST_COLUMNS of time, each the mean of its steps: [steps, y] -> [y, columns]."""
    edges = numpy.linspace(0, len(values), min(len(values), MOST_COLUMNS) + 1).round().astype(int)
    return (numpy.add.reduceat(values, edges[:-1]) / numpy.diff(edges)[:, None]).T


def over_time(figure, axes, tokens, load):
    load_map(figure, axes, in_columns(load), (*span(tokens), -0.5, load.shape[1] - 0.5), "load (1 = even)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 4, 5, 8, 10]))


def plot_balance(runs):
    """A row for each run with experts: layers x experts at the end; layers over time, by the load of their busiest experts."""
    rows = with_experts(runs)
    if not rows:
        return None
    heights = [max(2.4, min(5.0, 1.2 + 0.16 * load.shape[1])) for _, _, _, load in rows]
    figure, grid = plt.subplots(len(rows), 2, figsize=(9.6, 0.3 + sum(heights)), squeeze=False, height_ratios=heights, layout="constrained")
    divisor, unit = scale_of(runs)
    for (_, run, tokens, load), (left, right) in zip(rows, grid):
        steps, layers, experts = load.shape
        last = max(1, steps // 10)
        load_map(figure, left, load[-last:].mean(axis=0), (-0.5, experts - 0.5, -0.5, layers - 0.5), "load (1 = even)")
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 4, 5, 8, 10]))
        left.set_title(f"{short(run.label)}: " + ("last step" if last == 1 else f"mean of the last {last} steps"), fontsize=10, loc="left")
        busiest = in_columns(load.max(axis=2))
        image = right.imshow(busiest, aspect="auto", origin="lower", interpolation="nearest", cmap="cividis", vmin=1, vmax=max(1.1, busiest.max()),
                             extent=(*span(tokens / divisor), -0.5, layers - 0.5))
        figure.colorbar(image, ax=right, label="load, max / mean", pad=0.02)
        right.set_title("busiest expert of each layer", fontsize=10, loc="left")
        numbers = run.layer_numbers(layers)
        for axes, x in ((left, "expert"), (right, f"tokens{unit}")):
            dress(axes, x, "layer" if numbers else "layer with experts", grid=False)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 4, 5, 8, 10]))
            if numbers:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, n=numbers: str(n[int(y)]) if y == int(y) and 0 <= y < len(n) else ""))
    return figure
