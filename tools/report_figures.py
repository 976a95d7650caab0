"""The figures of tools/report. An arm looks alike in all of them; the dense control is dashed black."""
import math
import textwrap

import matplotlib.pyplot as plt
import numpy
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter, NullLocator

from plots_style import COLOURS, MARKERS, STYLES, dress, smooth
from sweep_compare import interpolate, mean_sd, partners
from sweep_data import Run

WIDTH = 11.0  # inches
MOST_POINTS = 400  # of a line
RAMPS = ("Blues", "Oranges", "Greens", "Purples")  # a family of arms each, more experts darker
CONTROL = {"color": "black", "linestyle": (0, (4, 2)), "marker": "X"}


def looks_of(sweeps):
    """(arm's name -> colour, line, marker; families). Arms that differ in one number only, such as experts, are a family: of one
    hue, from light to dark."""
    arms = sorted((arm for arm in sweeps.arms if not arm.control), key=lambda arm: [run.name for run in arm.runs])
    families, ramp = {}, ramp_key(sweeps, arms)
    for arm in arms:
        rest = tuple(repr(arm.settings.get(key)) for key in sweeps.facts["varying"] if key != ramp)
        families.setdefault(rest, []).append(arm)
    looks = {arm.name: CONTROL for arm in sweeps.arms if arm.control}
    if ramp and len(families) <= len(RAMPS) and 2 <= max(map(len, families.values())) <= 7:
        for f, members in enumerate(families.values()):
            members.sort(key=lambda arm: arm.settings[ramp])
            for shade, arm in zip(numpy.linspace(0.48, 1.0, len(members)) if len(members) > 1 else [0.75], members):
                looks[arm.name] = {"color": to_hex(plt.get_cmap(RAMPS[f])(shade)), "linestyle": "-", "marker": MARKERS[f]}
    else:
        families, markers = {}, [marker for marker in MARKERS if marker != CONTROL["marker"]]
        for i, arm in enumerate(arms):
            looks[arm.name] = {"color": COLOURS[i % 6], "linestyle": STYLES[i // 6 % len(STYLES)],
                               "marker": markers[i % len(markers)]}
    return looks, list(families.values())


def ramp_key(sweeps, arms):
    numbers = {key: {arm.settings[key] for arm in arms if key in arm.settings} for key in sweeps.facts["varying"]
               if all(type(arm.settings.get(key)) in (int, float) for arm in arms)}
    if "moe.experts" in numbers and len(numbers["moe.experts"]) > 1:
        return "moe.experts"
    return max(numbers, key=lambda key: len(numbers[key]), default=None)


def mean_curve(curves):
    """(x, mean, sd) of curves [(x, y)] where all have values, on the x of all of them; sd is None for a single one."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = sorted({x for curve in curves for x, _ in curve if low <= x <= high})
    if not grid:
        return None
    values = numpy.array([numpy.interp(grid, *zip(*curve)) for curve in curves])
    return numpy.array(grid), values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else None


def scale(most):
    """(divisor, "(10¹²)")"""
    power = 3 * int(math.log10(most) // 3) if most >= 1000 else 0
    return 10.0**power, f" (10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))})" if power else ""


def draw(axes, curves, looks, x_name, y_name, markers=True):
    """curves: {arm: (x, mean, sd)}"""
    divisor, unit = scale(max((x[-1] for x, _, _ in curves.values()), default=1))
    for arm, (x, y, sd) in reversed(curves.items()):  # the best on top
        look = looks[arm.name]
        shown = {"marker": look["marker"], "markersize": 4.2, "markerfacecolor": "white", "markeredgewidth": 1.1}
        axes.plot(x / divisor, y, color=look["color"], linestyle=look["linestyle"], linewidth=1.7, zorder=4 if arm.control else 3,
                  **(shown if (markers and len(x) <= 40) or len(x) == 1 else {}))
        if sd is not None:
            axes.fill_between(x / divisor, y - sd, y + sd, color=look["color"], alpha=0.16, linewidth=0)
    dress(axes, x_name + unit, y_name)
    axes.margins(x=0.02)


def legend(figure, arms, looks):
    def name_of(arm):
        return folded(arm.label) + ("" if arm.finished else f" (step {max(run.step for run in arm.runs)})")

    handles = [Line2D([], [], **looks[arm.name], markerfacecolor="white", markersize=5, linewidth=1.8, label=name_of(arm))
               for arm in arms]
    figure.legend(handles=handles, title="best first", frameon=False, loc="outside right upper", fontsize=9, title_fontsize=9,
                  alignment="left", ncols=1 + len(handles) // 27, labelspacing=0.55, handlelength=2.6)


def folded(label):
    """On several lines where it is long."""
    return textwrap.fill(label, 24)


def two(arms, looks):
    lines = sum(folded(arm.label).count("\n") + 1 for arm in arms)
    height = max(4.2, 0.5 + 0.155 * lines + 0.07 * len(arms))   # the legend's
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, wspace=0.03)
    legend(figure, arms, looks)
    return figure, panels


def leave_starts_out(axes, curves):
    """Where an arm's step 0 is so far up (dropped or random experts) that it would press all else together: it ends at the border, in words."""
    later = [loss for _, y, _ in curves.values() for loss in y[1:]]
    low, high = min(later, default=0), max(later, default=0)
    if low == high:   # no or one loss after the start
        return
    far = {arm: y[0] for arm, (_, y, _) in curves.items() if len(y) > 1 and y[0] > high + 2 * (high - low)}
    if not far:
        return
    shown = later + [y[0] for arm, (_, y, _) in curves.items() if arm not in far]
    margin = 0.06 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    words = "\n".join(f"{folded(arm.label)}\nstarts above, at {loss:.3f}" for arm, loss in far.items())
    axes.text(0.97, 0.97, words, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="#444444", zorder=6,
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})


def validation(sweeps, looks):
    arms = [arm for arm in sweeps.arms if any(run.points() for run in arm.counted)]
    figure, panels = two(arms, looks)
    for axes, points, name in zip(panels, (Run.points, Run.flops_points), ("tokens", "training FLOPs")):
        curves = {arm: curve for arm in arms if (curve := mean_curve([points(run) for run in arm.counted]))}
        draw(axes, curves, looks, name, "validation loss (nats per token)")
        leave_starts_out(axes, curves)
    return figure


def against_control(sweeps, looks):
    """Each run minus the control's run of its seed, at the same tokens and at the same FLOPs."""
    if not sweeps.control or not any(run.points() for run in sweeps.control.counted):
        return None
    arms = [arm for arm in sweeps.arms if not arm.control and any(run.points() for run in arm.counted)]
    if not arms:
        return None
    figure, panels = two([arm for arm in sweeps.arms if arm in arms or arm.control], looks)
    for axes, points, name in zip(panels, (Run.points, Run.flops_points), ("tokens", "training FLOPs")):
        curves = {}
        for arm in arms:
            lines = []
            for run in arm.counted:
                other = mean_curve([points(partner) for partner in partners(run, sweeps.control)])
                theirs = list(zip(other[0], other[1])) if other else []
                ours = points(run)
                # Where the arm was measured, and where the shorter of the two ends: in between the arm is not known well enough.
                grid = sorted({x for x, _ in ours} | {min(line[-1][0] for line in (ours, theirs) if line)})
                both = [(x, interpolate(ours, x), interpolate(theirs, x)) for x in grid]
                lines.append([(x, y - bar) for x, y, bar in both if y is not None and bar is not None])
            if curve := mean_curve(lines):
                curves[arm] = curve
        draw(axes, curves, looks, name, "difference to the dense control (nats)")
        leave_starts_out(axes, curves)
        axes.axhline(0, color=CONTROL["color"], linestyle=CONTROL["linestyle"], linewidth=1.5, zorder=2)
    return figure


def size_and_speed(sweeps, looks, families):
    """Left: what parameters buy. Right: what they cost in speed."""
    arms = [arm for arm in sweeps.arms if arm.finished and arm.values(Run.final)]
    fast = [arm for arm in sweeps.arms if any(run.log.steps for run in arm.counted)]
    if not fast:
        return None
    arms = arms or [arm for arm in sweeps.arms if arm.values(Run.final)]
    longest = max(len(arm.label) for arm in fast)
    height = max(3.6, 1.2 + (0.27 if longest < 25 else 0.36) * len(fast))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, wspace=0.04)
    final = {arm.name: mean_sd(arm.values(Run.final)) for arm in arms}
    for members in families:
        known = [arm for arm in members if arm.name in final and arm.runs[0].parameters]
        known.sort(key=lambda arm: arm.runs[0].parameters)
        left.plot([arm.runs[0].parameters for arm in known], [final[arm.name][0] for arm in known], color="0.7", linewidth=1.1,
                  zorder=1)
    for arm in arms:
        look, (mean, sd) = looks[arm.name], final[arm.name]
        if arm.control:
            left.axhline(mean, color=look["color"], linestyle=look["linestyle"], linewidth=1.5)
        if arm.runs[0].parameters:
            same = [other for other in arms if other.runs[0].parameters == arm.runs[0].parameters]  # side by side
            place = 1 + 0.03 * (same.index(arm) - (len(same) - 1) / 2)
            left.errorbar(arm.runs[0].parameters * place, mean, yerr=sd, color=look["color"], marker=look["marker"], markersize=6.5,
                          capsize=2.5, linestyle="none")
    sizes = [arm.runs[0].parameters for arm in arms if arm.runs[0].parameters]
    if sizes and max(sizes) > 1.5 * min(sizes):
        left.set_xscale("log")
        ticks = [m * 10.0**p for p in range(3, 13) for m in (1, 1.5, 2, 3, 5, 7)]
        ticks = [tick for tick in ticks if min(sizes) / 1.1 <= tick <= max(sizes) * 1.1]
        left.xaxis.set_major_locator(FixedLocator(ticks[::1 + len(ticks) // 9]))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlim(min(sizes) / 1.15, max(sizes) * (max(sizes) / min(sizes)) ** 0.22)  # room for the last name
    left.xaxis.set_major_formatter(EngFormatter(sep=" "))
    dress(left, "total parameters", "final validation loss (nats per token)")
    rates = [mean_sd(arm.values(Run.speed)) for arm in fast]
    places = range(len(fast))
    right.barh(places, [mean or 0 for mean, _ in rates], xerr=[sd or 0 for _, sd in rates], height=0.66,
               color=["0.55" if arm.control else looks[arm.name]["color"] for arm in fast], edgecolor="white", linewidth=0,
               hatch=["" if arm.control or looks[arm.name]["linestyle"] == "-" else "///" for arm in fast],
               error_kw={"elinewidth": 1, "capsize": 2})
    right.set_yticks(places, [folded(arm.label) for arm in fast], fontsize=9 if longest < 25 else 8)
    right.invert_yaxis()
    fastest = max((mean or 0) + (sd or 0) for mean, sd in rates) or 1
    for place, (mean, sd) in zip(places, rates):
        if mean:
            right.text(mean + (sd or 0) + 0.012 * fastest, place, EngFormatter(places=1, sep=" ")(mean), va="center", fontsize=8.5)
    right.set_xlim(0, 1.14 * fastest)
    # Long names have no room beside the points, whose marks the legends of the other figures tell.
    name_points(figure, left, [(arm.runs[0].parameters, final[arm.name][0], arm.label, -9 if arm.control else 4)
                               for arm in arms if arm.runs[0].parameters and (longest < 20 or arm.control)])
    right.xaxis.set_major_formatter(EngFormatter(sep=" "))
    dress(right, "tokens per second (median of the steps)", "")
    right.grid(axis="y", visible=False)
    return figure


def name_points(figure, axes, points):
    """A name right of every point, moved up or down where names would lie on one another."""
    figure.draw_without_rendering()  # places the axes
    placed = []
    for x, y, name, above in sorted(points, key=lambda point: -point[1]):
        at = axes.transData.transform((x, y)) * 72 / figure.dpi  # points of the page
        height = at[1] + above
        for other, theirs, length in placed:
            if abs(other - at[0]) < 5.2 * max(length, len(name)) + 6:
                height = min(height, theirs - 10.5)
        placed.append((at[0], height, len(name)))
        axes.annotate(name, (x, y), xytext=(8, height - at[1]), textcoords="offset points", fontsize=8.5, va="center", zorder=6,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})


def smooth_curves(arms, key):
    """Smoothed over the steps of each run, then the mean over seeds; without a band, which would be the seeds' noise smoothed."""
    out = {}
    for arm in arms:
        lines = []
        for run in arm.counted or [run for run in arm.runs if run.log.steps]:
            tokens, values = run.log.column(key)
            if len(values):
                lines.append(thin(tokens, smooth(values)))
        if curve := mean_curve(lines):
            out[arm] = (*curve[:2], None)
    return out


def thin(x, y):
    few = slice(None, None, 1 + len(x) // MOST_POINTS)
    return list(zip(x[few], y[few]))


def training(sweeps, looks):
    curves = smooth_curves(sweeps.arms, "loss")
    if not curves:
        return None
    apart = {}
    for arm in (arm for arm in curves if sweeps.control and not arm.control):
        lines = []
        for run in arm.counted or arm.runs:
            tokens, losses = run.log.column("loss")
            for bars in [partner.log.column("loss") for partner in partners(run, sweeps.control)][:1]:
                both, ours, theirs = numpy.intersect1d(tokens, bars[0], return_indices=True)
                lines.append(thin(both, smooth(losses[ours] - bars[1][theirs])) if len(both) else [])
        if curve := mean_curve(lines):
            apart[arm] = (*curve[:2], None)
    figure, panels = plt.subplots(1, 1 + bool(apart), figsize=(WIDTH, 4.2), squeeze=False, layout="constrained")
    legend(figure, list(curves), looks)
    draw(panels[0, 0], curves, looks, "tokens", "training loss, smoothed (nats per token)", markers=False)
    if apart:
        right = panels[0, 1]
        draw(right, apart, looks, "tokens", "difference to the dense control (nats)", markers=False)
        right.axhline(0, color=CONTROL["color"], linestyle=CONTROL["linestyle"], linewidth=1.5, zorder=2)
    return figure


def balance(sweeps, looks):
    load, dead = smooth_curves(sweeps.arms, "load_max_over_mean"), smooth_curves(sweeps.arms, "dead_experts")
    if not load:
        return None
    figure, (left, right) = two(list(load), looks)
    draw(left, load, looks, "tokens", "fullest expert / mean, smoothed", markers=False)
    left.axhline(1, color="0.35", linewidth=1, linestyle=(0, (4, 3)))
    draw(right, dead, looks, "tokens", "experts without a token, smoothed", markers=False)
    right.set_ylim(bottom=0, top=max(1.0, right.get_ylim()[1]))
    if dead and max(y.max() for _, y, _ in dead.values()) == 0:
        right.text(0.5, 0.5, "none, in no arm at any step", transform=right.transAxes, ha="center", color="0.35")
    return figure


def figures(sweeps):
    """{name: (figure, caption)} of those that there is something for."""
    looks, families = looks_of(sweeps)
    band = "Bands are ± one standard deviation over the seeds."
    band = band if any(len(arm.counted) > 1 for arm in sweeps.arms) else "One seed each: no spread is known."
    shades = " Arms of one hue differ in one number; darker is more." if families else ""
    drawn = {
        "validation": (validation(sweeps, looks),
                       f"Validation loss over the tokens seen (left) and the training FLOPs spent (right). {band}{shades}"),
        "difference": (against_control(sweeps, looks),
                       "The same, minus the dense control at equal tokens (left) and at equal training FLOPs (right); below zero is "
                       f"better than dense. Straight lines between validations. {band}"),
        "size": (size_and_speed(sweeps, looks, families),
                 "Final validation loss over all parameters (left; arms of one size side by side) and speed (right); error bars are "
                 "± one standard deviation over the seeds."),
        "training": (training(sweeps, looks),
                     "Training loss, smoothed over a thirtieth of the run" +
                     (" (left), and its difference to the dense control step by step (right)" if sweeps.control else "") +
                     "; means over seeds."),
        "balance": (balance(sweeps, looks),
                    "Load of the fullest expert over the mean, mean over layers (left; 1 is even), and experts that no token chose in "
                    "a step, all layers together (right)."),
    }
    drawn = {name: pair for name, pair in drawn.items() if pair[0] is not None}
    for figure, _ in drawn.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for every format again
    return drawn
