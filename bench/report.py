"""out/report.html: one page that needs nothing beside itself."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median

from quernstone.bench import plots, targets, words
from quernstone.bench.rows import RivalResult, Row
from quernstone.bench.run import MACHINE, Results

STYLE = Path(__file__).with_name("report.css")


def write(results: Results, path: Path, command: str = "quernstone bench") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, command), encoding="utf-8")


def page(results: Results, command: str = "quernstone bench") -> str:
    """The whole page; `command` is what to run for the same figures."""
    names = dict.fromkeys(row.vertical for row in results.rows if row.vertical != MACHINE)
    machine_rows = [row for row in results.rows if row.vertical == MACHINE]
    body = "".join(_vertical(name, results, machine_rows) for name in names)
    if machine_rows:
        body += _machine(machine_rows)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>quernstone, measured</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
        f"</head><body>{_top(results, today)}<main>{body}{_environment(results, command)}</main>"
        f"<footer>Written by <code>{escape(command)}</code> on {today}.</footer></body></html>\n"
    )


def _top(results: Results, today: str) -> str:
    verdicts = [verdict for row in results.rows for verdict in row.target]
    met = sum(verdict["met"] for verdict in verdicts)
    measured = sum(row.ours is not None for row in results.rows)
    stats = [(str(measured), f"of {len(results.rows)} rows measured")]
    if verdicts:
        stats.append((f"{met} of {len(verdicts)}", "promises met in this run"))
    stats.append((str(results.machine.get("isa", "–")), "instruction set in use"))
    stats.append((str(results.machine.get("cores", "–")), "cores"))
    cpu = escape(str(results.machine.get("cpu", "this machine")))
    return (
        '<header class="top"><p class="kicker">quernstone</p>'
        f"<h1>Measured on {cpu}</h1>"
        '<p class="lede">Every result was compared with the reference before it was timed. '
        "Rivals ran on the same inputs in alternating rounds of the same run; a limit is what "
        "the machine itself reached in those rounds. Figures are medians.</p>"
        f"{_stats(stats)}</header>"
    )


def _stats(stats: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in stats)
    return f'<div class="stats">{cells}</div>'


def _vertical(name: str, results: Results, machine_rows: Sequence[Row]) -> str:
    rows = [row for row in results.rows if row.vertical == name]
    figures = [
        (
            plots.ratios(rows),
            "Beside the rivals",
            "One dot a row: the median over paired rounds, with p20 to p80.",
        ),
        (
            plots.roofline(rows, machine_rows),
            "Beside the machine's limits",
            "Circles are fp32, diamonds bf16; a solid line is arithmetic's limit, a dashed one "
            "memory's.",
        ),
    ]
    drawn = [
        _figure(plots.svg(figure, f"{name}{index}"), title, caption)
        for index, (figure, title, caption) in enumerate(figures)
        if figure is not None
    ]
    drawn += [
        _figure(svg, title, caption, "wide")
        for title, svg, caption in (p[1:] for p in results.panels if p[0] == name)
    ]
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.id.split(".")[1], []).append(row)
    tables = "".join(
        f"<h3>{escape(title.capitalize())}</h3>{''.join(map(_row, group))}"
        for title, group in sections.items()
    )
    return (
        f'<section id="{escape(name)}"><p class="kicker">{escape(name)}</p>'
        f"<h2>{escape(headline(rows))}</h2>{_stats(_ranges(rows))}"
        f'<div class="figures">{"".join(drawn)}</div>{tables}{_promises(rows)}</section>'
    )


def headline(rows: Sequence[Row]) -> str:
    """One sentence: how much faster than the fastest rival, and how many promises are open."""
    parts = []
    ratios = _ratios(rows)
    if ratios:
        name = min(ratios, key=lambda key: median(ratios[key]))
        parts.append(f"{_range(ratios[name], 1, '×')} the speed of {name}, the fastest rival")
    verdicts = [verdict for row in rows for verdict in row.target]
    missed = sum(not verdict["met"] for verdict in verdicts)
    if verdicts:
        count = len(verdicts)
        parts.append(f"{missed} of {count} promises open" if missed else "every promise met")
    if not parts:
        return f"{len(rows)} rows"
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _ratios(rows: Sequence[Row]) -> dict[str, list[float]]:
    """By rival, how many times faster ours is; rivals timed in a single call are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, rival in row.rivals.items():
            if rival.ratio is not None and rival.ratio_p20 is not None:
                found.setdefault(name, []).append(rival.ratio)
    return found


def _ranges(rows: Sequence[Row]) -> list[tuple[str, str]]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row.limit is not None and row.percent_of_limit is not None:
            shares.setdefault(row.limit.name, []).append(row.percent_of_limit)
    return [
        *((_range(x, 1, "×"), f"the speed of {name}") for name, x in _ratios(rows).items()),
        *((_range(x, 0, " %"), f"of {name}") for name, x in shares.items()),
    ]


def _range(values: Sequence[float], digits: int, unit: str) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{low}{unit}" if low == high else f"{low}–{high}{unit}"


def _figure(svg: str, title: str, caption: str, kind: str = "") -> str:
    return (
        f'<figure class="{kind}">{svg}<figcaption><b>{escape(title)}.</b> {escape(caption)}'
        "</figcaption></figure>"
    )


def _row(row: Row) -> str:
    spread = ""
    if row.ours is not None and row.p20 != row.p80:
        spread = f"<small>{words.number(row.p20)}–{words.number(row.p80)}</small>"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in row.notes)
    if row.error is not None:
        notes += f'<p class="note">error {words.number(row.error)}</p>'
    if row.kind != "measured":
        notes += f'<p class="note">{escape(row.kind)}, not timed</p>'
    return (
        f'<div class="row" data-row="{escape(row.id)}"><div>{escape(_what(row))}'
        f'<span class="id">{escape(row.id)}</span>{notes}</div>'
        f'<div class="value">{escape(words.figure(row.ours, row.unit))}{spread}'
        f"{_badge(row, 'ours')}{_badge(row, 'error')}</div>"
        f'<div class="bars">{_bars(row)}</div></div>'
    )


def _what(row: Row) -> str:
    words_of_row = row.what or row.id
    if row.id.endswith(f".t{row.threads}"):
        words_of_row += f", {row.threads} thread{'s' if row.threads > 1 else ''}"
    return words_of_row


def _bars(row: Row) -> str:
    shown = {name: rival for name, rival in row.rivals.items() if rival.median is not None}
    top = max([row.p80 or 0.0, *(r.p80 or r.median or 0.0 for r in shown.values())])
    parts = []
    if shown and row.ours is not None and top > 0:
        mine = RivalResult(median=row.ours, p20=row.p20, p80=row.p80)
        parts.append(_bar("ours", mine, row, top, "bar ours"))
        parts += [_bar(name, rival, row, top, "bar") for name, rival in shown.items()]
    if row.limit is not None and row.percent_of_limit is not None:
        share = min(100.0, row.percent_of_limit)
        rate = f"{words.number(row.limit.value)} {row.limit.unit}"
        parts.append(
            '<div class="bar limit">'
            f'<span class="name">{escape(row.limit.name)}</span><span class="track">'
            f'<span class="fill" style="width:{share:.1f}%"></span></span>'
            f'<span class="ratio"><b>{words.percent(row.percent_of_limit)}</b> of {rate}</span>'
            f"{_badge(row, 'percent_of_limit')}</div>"
        )
    for name, rival in row.rivals.items():
        if rival.absent:
            badge = _badges_of_rival(row, name)
            parts.append(f'<p class="note">{escape(name)}: {escape(rival.absent)} {badge}</p>')
    return "".join(parts)


def _bar(name: str, rival: RivalResult, row: Row, top: float, kind: str) -> str:
    assert rival.median is not None
    width = 100 * rival.median / top
    spread = ""
    if rival.p20 is not None and rival.p80 is not None:
        left, reach = 100 * rival.p20 / top, 100 * (rival.p80 - rival.p20) / top
        spread = f'<span class="spread" style="left:{left:.1f}%;width:{reach:.1f}%"></span>'
    tail = escape(words.figure(rival.median, row.unit))
    if rival.ratio is not None:
        tail += f" <b>{words.ratio(rival.ratio)}</b>"
    return (
        f'<div class="{kind}"><span class="name">{escape(name)}</span><span class="track">'
        f'<span class="fill" style="width:{width:.1f}%"></span>{spread}</span>'
        f'<span class="ratio">{tail}</span>{_badges_of_rival(row, name)}</div>'
    )


def _badges_of_rival(row: Row, name: str) -> str:
    return "".join(_badge(row, f"{ratio} to {name}") for ratio in targets.RATIOS)


def _badge(row: Row, measure: str) -> str:
    """What was promised of one figure of the row, and whether it holds."""
    badges = []
    for verdict in row.target:
        if verdict["measure"] != measure:
            continue
        kind = "met" if verdict["met"] else "open" if verdict["got"] is None else "missed"
        unit = " %" if measure == "percent_of_limit" else "×" if "ratio" in measure else ""
        sign = {"<=": "≤", ">=": "≥"}.get(verdict["comparison"], verdict["comparison"])
        value = f"{verdict['value']:g}".replace("e-0", "e-")
        text = {"met": "met", "open": "not measured", "missed": "missed"}[kind]
        badges.append(
            f'<span class="badge {kind}" title="{escape(verdict["words"])}">'
            f"{sign} {value}{unit} {text}</span>"
        )
    return "".join(badges)


def _promises(rows: Sequence[Row]) -> str:
    lines = [
        f'<tr><td class="id">{escape(row.id)}</td><td>{escape(verdict["words"])}</td>'
        f"<td>{escape(words.verdict(verdict))}</td></tr>"
        for row in rows
        for verdict in row.target
    ]
    if not lines:
        return ""
    return (
        f"<details><summary>Promises, word by word ({len(lines)})</summary>"
        f"<table><tbody>{''.join(lines)}</tbody></table></details>"
    )


def _machine(rows: Sequence[Row]) -> str:
    return (
        '<section id="machine"><p class="kicker">machine</p><h2>What this machine can do</h2>'
        f"<div style='margin-top:24px'>{''.join(map(_row, rows))}</div></section>"
    )


def _environment(results: Results, command: str) -> str:
    about = results.machine
    build = ", ".join(f"{key} {value}" for key, value in about.get("build", {}).items() if value)
    entries = {
        "CPU": f"{about.get('cpu', '–')}, {about.get('cores', '–')} cores",
        "Instruction set": f"{about.get('isa', '–')} of {', '.join(about.get('isas', [])) or '–'}",
        "Memory": f"{about.get('memory_gb', '–')} GB",
        "System": f"{about.get('system', '–')}, Python {about.get('python', '–')}",
        "Build": build or "–",
        "Versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()),
        "Command": command,
    }
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
    return f'<div class="environment"><p class="kicker">environment</p><dl>{pairs}</dl></div>'
