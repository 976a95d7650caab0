"""Pictures of tools/plots that every run has: its losses; gradient norm, learning rate and speed."""
import matplotlib.pyplot as plt
import numpy
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import offset_copy

from plots_runs import is_finite
from plots_style import COLOURS, MARKERS, bounds, curve, dress, key_of, legend, scale_of
from user_error import UserError


def plot_loss(runs):
    figure, axes = plt.subplots(figsize=(7.0, 4.3), layout="constrained")
    divisor, unit = scale_of(runs)
    keys, drawn, resumed = [], [], False
    for i, run in enumerate(runs):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        tokens, loss = run.column("loss")
        if len(loss):
            line = curve(axes, i, tokens / divisor, loss)
            drawn.append(line)
            above = offset_copy(axes.transData, figure, y=9, units="points")
            for at in run.resumes:
                axes.plot(at / divisor, numpy.interp(at, tokens, line), marker="v", markersize=8, color=colour,
                          markeredgecolor="white", linestyle="none", transform=above, zorder=5)
                resumed = True
        held_out = [(t, value) for _, (t, value) in sorted(run.validation.items()) if is_finite(value)]
        points = {"marker": marker, "markersize": 5.5, "markerfacecolor": "white", "markeredgewidth": 1.3}
        if held_out:
            t, value = numpy.array(held_out).T
            axes.plot(t / divisor, value, color=colour, linestyle="none", zorder=4, **points)
            drawn.append(value)
        keys.append(key_of(i, run, **(points if held_out else {}), linewidth=1.6 if len(loss) else 0))
    if not drawn:
        raise UserError("no finite loss in these runs")
    bounds(axes, drawn)
    sign = {"color": "0.35", "linestyle": "none"}
    if any(run.validation for run in runs):
        keys.append(Line2D([], [], marker="o", markerfacecolor="white", markeredgewidth=1.3, markersize=5.5, label="validation", **sign))
    if resumed:
        keys.append(Line2D([], [], marker="v", markersize=8, markeredgecolor="white", label="resumed", **sign))
    dress(axes, f"tokens{unit}", "cross entropy (nats per token)")
    legend(figure, keys)
    return figure


def plot_training(runs):
    figure, panels = plt.subplots(3, 1, figsize=(7.0, 7.2), sharex=True, layout="constrained")
    divisor, unit = scale_of(runs)
    norms, rates, skipped = [], [], False
    for i, run in enumerate(runs):
        tokens, norm = run.column("grad_norm")
        norms.append(curve(panels[0], i, tokens / divisor, norm))
        missed = [row["tokens"] / divisor for row in run.steps.values() if row.get("skipped")]
        if missed:
            panels[0].plot(missed, numpy.full(len(missed), 0.04), marker="x", color=COLOURS[i % len(COLOURS)], linestyle="none",
                           transform=panels[0].get_xaxis_transform())
            skipped = True
        tokens, rate = run.column("lr")
        curve(panels[1], i, tokens / divisor, rate, smoothed=False)
        tokens, speed = run.column("tokens_per_second")
        rates.append(curve(panels[2], i, tokens / divisor, speed))
    norms, rates = [line for line in norms if len(line)], [line for line in rates if len(line)]
    if norms:
        if min(line.min() for line in norms) > 0 and max(line.max() for line in norms) > 20 * min(line.min() for line in norms):
            panels[0].set_yscale("log")
        else:
            bounds(panels[0], norms, 0.12)
    if rates:
        panels[2].set_ylim(0, 1.12 * max(line.max() for line in rates))
    panels[2].yaxis.set_major_formatter(EngFormatter(sep=""))
    dress(panels[0], "", "gradient norm")
    dress(panels[1], "", "learning rate")
    dress(panels[2], f"tokens{unit}", "speed (tokens/s)")
    panels[1].set_ylim(bottom=0)
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    keys = [key_of(i, run) for i, run in enumerate(runs)]
    if skipped:
        keys.append(Line2D([], [], color="0.35", marker="x", linestyle="none", label="skipped step"))
    legend(figure, keys)
    return figure
