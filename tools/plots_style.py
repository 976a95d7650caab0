"""What the pictures of tools/plots and tools/report have in common: colours, smoothed curves, scales, legends."""
import numpy
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart with any colour vision; grey instead of their yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
MARKERS = ("o", "s", "^", "D", "P", "X", "h", "*")
STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))  # for more runs than colours


def smooth(values):
    """Mean over a window of a thirtieth of the run, 5 steps at least. It shrinks to the first value at the start, where a fresh model's loss means
    something; at the end only its right half shrinks, or the last point would be one noisy step."""
    reach = max(2, len(values) // 60)
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    at = numpy.arange(len(values))
    left = numpy.minimum(reach, at)
    right = numpy.minimum(left, at[::-1])
    return (sums[at + right + 1] - sums[at - left]) / (left + right + 1)


def scale_of(runs):
    """(divisor, unit) for the axis of tokens."""
    most = max([row["tokens"] for run in runs for row in run.steps.values()] +
               [tokens for run in runs for tokens, _ in run.validation.values()])
    for divisor, unit in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= divisor:
            return divisor, f" ({unit})"
    return 1, ""


def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def short(label, most=44):
    return label if len(label) <= most else label[:most - 1] + "…"


def key_of(i, run, **more):
    return Line2D([], [], **style_of(i), label=short(run.label), **({"linewidth": 1.6} | more))


def legend(figure, keys):
    """Above the axes, where it can't lie on a line; as many columns as fit. The figure grows for more than two rows."""
    width, height = figure.get_size_inches()
    columns = max(1, min(len(keys), int((width - 0.3) / (max(len(key.get_label()) for key in keys) * 0.085 + 0.55))))
    rows = (len(keys) + columns - 1) // columns
    figure.set_size_inches(width, height + 0.19 * max(0, rows - 2))
    figure.legend(handles=keys, frameon=False, loc="outside upper left", ncols=columns, fontsize=9)


def curve(axes, i, x, values, smoothed=True):
    """Raw pale, smooth strong; a single point as a dot. Returns what is to be in the picture."""
    if len(values) == 0:
        return values
    line = smooth(values) if smoothed else values
    style = style_of(i)
    if len(values) == 1:
        axes.plot(x, values, color=style["color"], marker=MARKERS[i % len(MARKERS)], markersize=5)
    elif smoothed:
        axes.plot(x, values, color=style["color"], alpha=0.22, linewidth=0.7)
    axes.plot(x, line, linewidth=1.6, **style)
    return line


def bounds(axes, curves, room=0.06):
    """The smooth curves and the validation points fill the picture; single raw spikes may leave it."""
    low, high = min(curve.min() for curve in curves), max(curve.max() for curve in curves)
    margin = room * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - margin, high + margin)


def span(tokens):
    """Of an axis from the first to the last step: it has a length even for one step."""
    return (tokens[0], tokens[-1]) if len(tokens) > 1 else (0.9 * tokens[0], 1.1 * tokens[0])


def dress(axes, x, y, grid=True):
    axes.set_xlabel(x)
    if x.startswith("tokens"):
        axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
