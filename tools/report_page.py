"""The page of tools/report: the verdict in words, tables, figures, what is missing. Plain HTML with everything inside."""
import base64
import html
import io
import math
from datetime import datetime, timezone

from sweep_compare import difference, interpolate, is_clear, reach
from sweep_data import Run

MOST_BYTES = 1_900_000  # of the page
STYLE = """
body { font: 15px/1.5 "Helvetica Neue", Arial, "Liberation Sans", sans-serif; color: #1a1a1a; max-width: 1120px;
       margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.75em; line-height: 1.2; margin: 0 0 .2em; }
h2 { font-size: 1.2em; margin: 2em 0 .5em; }
.sub { color: #555; margin: 0 0 1.5em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em 1.2em; margin: 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid #0072B2; background: #f3f7fb; padding: .7em 1.2em; margin: 1.5em 0; }
.verdict p { margin: .45em 0; }
.missing { border-left: 4px solid #D55E00; background: #fdf5ef; padding: .5em 1.2em; overflow-wrap: anywhere; }
.missing ul { margin: .3em 0; padding-left: 1.2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; width: 100%; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 1.5px solid #1a1a1a; border-top: 1.5px solid #1a1a1a; vertical-align: bottom; }
th, td { padding: .32em .55em; text-align: right; }
.left { text-align: left; }
tbody tr:last-child td { border-bottom: 1.5px solid #1a1a1a; }
tr.control td { background: #f0f0f0; }
.best { font-weight: 700; }
.note { color: #555; font-size: 13px; }
figure { margin: 1.5em 0; }
figure img { width: 100%; height: auto; }
figcaption { color: #333; font-size: 13.5px; }
code { font: 13px "DejaVu Sans Mono", Menlo, monospace; background: #f4f4f4; padding: .05em .3em; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { margin: 0; max-width: none; font-size: 11px; }
  figure, table, .verdict { break-inside: avoid; }
}
"""


def escape(value):
    return html.escape(str(value))


def number(value, places=4):
    return "–" if value is None else f"{value:.{places}f}"


def signed(value, places=4, kind="f"):
    return "–" if value is None else f"{value:+.{places}{kind}}".replace("-", "−")


def large(value):
    """1246592 -> "1.25 M"."""
    if value is None:
        return "–"
    power = min(5, int(math.log10(value) / 3)) if value >= 1000 else 0
    scaled = value / 1000**power
    if scaled >= 999.5 and power < 5:
        power, scaled = power + 1, scaled / 1000
    return f"{scaled:.3g}" + ["", " k", " M", " G", " T", " P"][power]


def scientific(value):
    """3044058071040 -> "3.04·10¹²"."""
    power = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value / 10**power:.2f}·10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def with_sd(mean, sd, n):
    return number(mean) + ("" if mean is None or n == 0 else f" ± {number(sd)} ({n})" if sd is not None else " (1)")


def duration(seconds):
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def sureness(mean, sd, n):
    """What the seeds say of a difference."""
    clear = is_clear(mean, sd, n)
    if clear is None:
        return "one seed: it may be chance"
    interval = f"95 % interval ± {number(reach(sd, n))} from {n} seeds"
    return interval if clear else f"within the seeds' spread, {interval}: no difference can be claimed"


def names(arms):
    words = [f"<b>{escape(arm.label)}</b>" for arm in arms]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def best_words(sweeps, rows, where, key, value):
    """The best arm at equal something, against the control and against the next."""
    loss = {arm: rows[arm.name][f"{key}_loss"] for arm in sweeps.arms if not arm.control and (arm.finished or key != "final")}
    ranked = sorted((arm for arm in loss if loss[arm] is not None), key=loss.get)
    if not ranked:
        return f"{where}: no arm has got that far yet."
    best, others = ranked[0], ranked[1:]
    row = rows[best.name]
    own = with_sd(row[f"{key}_loss"], row[f"{key}_sd"], row[f"{key}_n"])
    words = f"{where}: the best arm is {names([best])} with a validation loss of {own}"
    against, sd, n = row[f"{key}_difference"], row[f"{key}_difference_sd"], row[f"{key}_n"]
    if against is not None:
        bar = rows[sweeps.control.name][f"{key}_loss"]
        verb = "below" if against < 0 else "above"
        words += f", {number(abs(against))} {verb} the dense control ({number(bar)}; {sureness(against, sd, n)})."
        words += "" if against < 0 else " No arm beats the dense control."
        apart = {arm: [rows[arm.name][f"{key}_{what}"] for what in ("difference", "difference_sd", "n")] for arm in others}
        worse = [arm for arm in others if apart[arm][0] is not None and apart[arm][0] > 0 and is_clear(*apart[arm])]
        words += f" Worse than dense, beyond the spread: {names(worse)}." if worse else ""
    else:
        words += "."
    at = {"equal_tokens": sweeps.equal_tokens, "equal_flops": sweeps.equal_flops}.get(key)
    end = row["tokens"] * (row["flops_per_token"] if key == "equal_flops" else 1)
    if at is not None and at < 0.99 * end:
        words += f" The best arm is read at {at / end:.0%} of its run, before its learning-rate schedule ends."
    if others:
        gaps = [(arm, *difference(arm, best, value)) for arm in others]
        near = [arm for arm, mean, spread, n in gaps if is_clear(mean, spread, n) is False]
        arm, mean, spread, n = gaps[0]
        words += (f" Not to be told from it with these seeds: {names(near)}." if near else
                  f" Next is {names([arm])}, {number(mean)} behind ({sureness(mean, spread, n)}).")
    return words


def verdict(sweeps, rows):
    out = []
    if sweeps.facts["match"] == "time":
        out.append(best_words(sweeps, rows, "At equal training time, the end of every run", "final", Run.final))
    if sweeps.equal_tokens is not None:
        out.append(best_words(sweeps, rows, f"At equal tokens ({large(sweeps.equal_tokens)})", "equal_tokens",
                              lambda run: interpolate(run.points(), sweeps.equal_tokens)))
    if sweeps.equal_flops is not None:
        out.append(best_words(sweeps, rows, f"At equal training FLOPs ({scientific(sweeps.equal_flops)})", "equal_flops",
                              lambda run: interpolate(run.flops_points(), sweeps.equal_flops)))
    reached = [arm for arm in sweeps.arms if rows[arm.name]["tokens_to_beat_control"] is not None]
    if reached and rows[sweeps.control.name]["tokens"]:
        arm, control = min(reached, key=lambda arm: rows[arm.name]["tokens_to_beat_control"]), rows[sweeps.control.name]
        row = rows[arm.name]
        cost = row["tokens_to_beat_control"] / control["tokens"]
        words = (f"Soonest below the dense control's final loss: {names([arm])}, after {large(row['tokens_to_beat_control'])} "
                 f"tokens, {cost:.0%} of the control's")
        if row["flops_per_token"] and control["flops_per_token"]:
            words += f", which cost {cost * row['flops_per_token'] / control['flops_per_token']:.0%} of its training FLOPs"
        out.append(words + ".")
    starts = []
    for run in sweeps.control.runs if sweeps.control else ():
        start = run.log.validation.get(0, (0, None))[1]
        if start is not None and (str(run.sweep), number(start)) not in starts:
            starts.append((str(run.sweep), number(start)))
    if starts:
        same = len({loss for _, loss in starts}) == 1
        loss = starts[0][1] if same else ", ".join(f"{loss} in {escape(where)}" for where, loss in starts)
        out.append(f"The dense model that all arms grew from has a validation loss of {loss} before any step.")
    if sweeps.control and len(values := sweeps.control.values(Run.final)) > 1 and len(set(values)) == 1:
        out.append("The control's seeds agree to the last digit: a seed draws the routers only; the batches are the same for all.")
    most = max(rows[arm.name]["final_n"] for arm in sweeps.arms)
    if most == 1:
        out.append("Every arm has one seed: how far chance moves these numbers is not known.")
    elif most == 2:
        out.append("Two seeds make the intervals wide; a third would narrow them a lot.")
    return out


def table(columns, arms, rows, best=()):
    """columns: [(head, text of (row), left?)]; `best`: {(column's head, arm's name)} in bold."""
    body = ""
    for arm in arms:
        cells = ""
        for head, text, left in columns:
            classes = " ".join(word for word, on in (("left", left), ("best", (head, arm.name) in best)) if on)
            words = escape(text(rows[arm.name]))
            words = words if len(words) > 26 else words.replace(" ", "&nbsp;")
            cells += f'<td class="{classes}">{words}</td>'
        body += f'<tr class="{"control" if arm.control else "arm"}">{cells}</tr>\n'
    heads = "".join(f'<th class="{"left" if left else ""}">{escape(head)}</th>' for head, _, left in columns)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def column(head, key, form, left=False):
    return head, lambda row: form(row[key]), left


def results(sweeps, rows):
    tokens, flops = large(sweeps.equal_tokens), scientific(sweeps.equal_flops) if sweeps.equal_flops is not None else "–"
    final, at_tokens, at_flops = "final validation loss ± sd (n)", f"loss at {tokens} tokens", f"loss at {flops} FLOPs"
    columns = [column("arm", "label", str, left=True), column("total parameters", "parameters", large),
               column("active", "active_parameters", large), column("FLOPs / token", "flops_per_token", large),
               ("steps", steps, False), column("tokens", "tokens", large),
               (final, lambda row: with_sd(row["final_loss"], row["final_sd"], row["final_n"]), False)]
    if sweeps.control:
        columns.append(column("−\u00a0dense", "final_difference", signed))
    if sweeps.facts["match"] != "tokens":
        columns.append(column(at_tokens, "equal_tokens_loss", number))
    columns.append(column(at_flops, "equal_flops_loss", number))
    if sweeps.control:
        columns.append(column("−\u00a0dense at these FLOPs", "equal_flops_difference", signed))
        columns.append(("tokens to beat dense", beaten if sweeps.bar_is_known() else lambda row: "–", False))
    best = set()
    for head, key in ((final, "final_loss"), (at_tokens, "equal_tokens_loss"), (at_flops, "equal_flops_loss")):
        known = [arm for arm in sweeps.arms if rows[arm.name][key] is not None and (arm.finished or key != "final_loss")]
        best |= {(head, min(known, key=lambda arm: rows[arm.name][key]).name)} if known else set()
    return table(columns, sweeps.arms, rows, best)


def steps(row):
    return number(row["steps"], 0) + ("" if row["finished"] or row["steps"] is None else " so far")


def beaten(row):
    if row["control"] or row["final_n"] == 0:
        return "–"
    some = f" ({row['seeds_that_beat_control']} of {row['final_n']})" if row["seeds_that_beat_control"] < row["final_n"] else ""
    return "not reached" if row["tokens_to_beat_control"] is None else large(row["tokens_to_beat_control"]) + some


def behaviour(sweeps, rows):
    columns = [column("arm", "label", str, left=True), column("loss at step 0", "start_loss", number)]
    if sweeps.control:
        columns.append(column("−\u00a0dense at step 0", "start_difference",
                              lambda value: "0" if value == 0 else signed(value, 1, "e")))
    columns += [column("certificate", "certificate", lambda words: words or "–", left=True),
                column("fullest expert / mean", "fullest_over_mean", lambda value: number(value, 2)),
                column("dead experts", "dead_experts", lambda value: number(value, 0)), column("tokens/s", "tokens_per_second", large),
                column("training time", "seconds", duration), column("seeds", "seeds", lambda words: words or "–"),
                column("state", "state", str, left=True)]
    return table(columns, sweeps.arms, rows)


def facts(sweeps):
    known, others = sweeps.facts, [arm for arm in sweeps.arms if not arm.control]
    match = {"tokens": "tokens: as many steps for every arm", "flops": "training FLOPs: steps that cost as much for every arm",
             "time": "time: steps that take as long for every arm"}.get(known["match"], known["match"])
    letters = [words for key, words in (("moe.experts", "E experts"), ("moe.granularity", "G granularity: shards of a copy"),
                                        ("moe.top_k", "K experts a token")) if key in known["varying"]]
    compared = f"{len(others)} arm{'s' * (len(others) != 1)} that differ in {', '.join(known['varying']) or 'nothing'}"
    compared += " beside the dense model, continued" if sweeps.control else ""
    compared += f" ({'; '.join(letters)})" if letters else ""
    lines = [("Sweep", ", ".join(map(str, known["sweeps"]))), ("Read from", ", ".join(map(str, sweeps.directories))),
             ("Base run file", known["base"]),
             ("Compared", compared + "".join(f". {words}" for words in known["together"])),
             ("Matched by", match), ("Seeds", ", ".join(map(str, known["seeds"])) or "–"),
             ("Tokens per step", ", ".join(f"{tokens:.0f}" for tokens in known["tokens_per_step"]) or "–"),
             ("Ranks per arm", ", ".join(map(str, known["ranks"])))]
    lines += [("Ran on", "; ".join(known["machines"]))] if known["machines"] else []
    same = ", ".join(f"{key} = {value}" for key, value in known["constant"].items())
    lines += [("Same for all", same)] if same else []
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines) + "</dl>\n"


def image(figure, most):
    """As SVG, which prints sharp; as PNG where that is larger than `most` bytes."""
    for kind, mime, dpi in (("svg", "svg+xml", None), ("png", "png", 130), ("png", "png", 80)):
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=dpi or "figure", metadata={"Date": None} if kind == "svg" else None)
        if len(out.getvalue()) * 4 / 3 <= most:
            break
    return f"data:image/{mime};base64,{base64.b64encode(out.getvalue()).decode()}"


METHOD = """<p class="note">Losses are means over the seeds, ± the sample standard deviation, n seeds in brackets. “Final” is
the last validation of the runs that are done or, where none is, of the one that got furthest. A difference is taken run by run against
the control of the same seed, then averaged; it counts when zero is outside of its 95 % confidence interval (Student’s t over
the seeds). The best of many arms is flattered by chance. Equal tokens and equal FLOPs are the most that all finished runs have
reached; a loss between two validations is on the straight line between them, on each run's own points. An arm read before its
last step has not come to the end of its learning-rate schedule, which counts against it. FLOPs are of training, forward and
backward, without recomputation. “Tokens to beat dense”: where an arm's line first goes below the control's final loss. Fullest
expert / mean is the mean over layers and the last tenth of the steps; dead experts, the most in any of those steps. The
certificate says whether the grown model computes what the dense one does, before any training. Unrounded numbers:
<code>arms.csv</code>, <code>validation.csv</code>.</p>
"""


def page(sweeps, rows, figures):
    title = "Upcycling sweep: " + ", ".join(dict.fromkeys(directory.resolve().name for directory in sweeps.directories))
    out = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
           '<meta name="viewport" content="width=device-width, initial-scale=1">'
           f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
           f'<p class="sub">{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC</p>\n{facts(sweeps)}')
    out += '<div class="verdict">' + "".join(f"<p>{words}</p>" for words in verdict(sweeps, rows)) + "</div>\n"
    if sweeps.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in sweeps.notes)
        out += f'<div class="missing"><b>Missing or odd</b><ul>{notes}</ul></div>\n'
    out += "<h2>Results</h2>\n" + results(sweeps, rows)
    texts = list(figures.items())
    first = [name for name, _ in texts if name in ("validation", "difference", "size")]
    left = MOST_BYTES - len(out.encode()) - 40_000
    for i, (name, (figure, caption)) in enumerate(texts):
        if name not in first and (i == 0 or texts[i - 1][0] in first):
            out += "<h2>Start, balance and speed</h2>\n" + behaviour(sweeps, rows)
        data = image(figure, left / (len(texts) - i))
        left -= len(data)
        out += (f'<figure><img src="{data}" alt="{escape(caption)}"><figcaption><b>Figure {i + 1}.</b> {escape(caption)}'
                f' <span class="note">({name}.png)</span></figcaption></figure>\n')
    return out + "<h2>How to read this</h2>\n" + METHOD + "</body></html>\n"
