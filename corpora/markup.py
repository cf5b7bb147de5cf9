"""Marked-up documents, generated: HTML pages, XML catalogues, Markdown with tables, JSON records
and LaTeX articles about things with names and numbers, which are told more than once in a document.

    print(documents()[0])
"""

from __future__ import annotations

import json

from corpora.grammar import Draw, documents_of, fill, sentence, words

RULES = {
    "name": [
        *words("""Aldo, Berta, Cem, Dora, Eskil, Fina, Goran, Hanne, Ivo, Jana, Kofi, Lena, Milo,
        Nora, Otis, Petra, Radu, Sanna, Timo, Uma, Vito, Wilma, Yann, Zora, Asta, Bruno, Clea"""),
    ],
    "family": words("""Abel, Brandt, Castillo, Dubois, Eriksen, Fontana, Grieg, Haddad, Ito, Jensen,
        Kowalski, Lindgren, Moreau, Novak, Okafor, Pereira, Quist, Rossi, Silva, Takeda, Ueda,
        Varga, Weber, Yilmaz, Zhang, Adeyemi, Bianchi, Cohen, Diaz, Evans"""),
    "person": ["{name} {family}", "{family}", "Dr. {family}", "{letter}. {family}"],
    "letter": list("ABCDEFGHIJKLMNOPRSTUVW"),
    "town": words("""Arden, Brook, Calder, Dunmore, Elswick, Fairhaven, Glenrock, Hollin, Islay,
        Kelso, Lorne, Marsden, Newbury, Oakham, Penrith, Ripley, Selby, Thirsk, Wells, Yarrow"""),
    "adjective": words("""annual, compact, coastal, digital, early, fixed, global, hybrid, inner,
        joint, large, linear, local, modular, narrow, open, parallel, portable, random, remote,
        seasonal, silent, stable, thermal, upper, variable, weekly, western"""),
    "noun": words("""archive, beacon, buffer, channel, cluster, column, corridor, dataset, engine,
        estuary, filter, forecast, gateway, glacier, harvest, index, journal, kernel, lattice,
        ledger, matrix, meadow, network, orbit, pipeline, pump, quarry, reactor, registry, relay,
        reservoir, sampler, sensor, signal, storage, survey, terminal, turbine, valve, vessel"""),
    "action": words("""measures, replaces, feeds, limits, describes, precedes, supports, delays,
        extends, protects, reduces, splits, follows, contains, balances, repeats, predicts"""),
    "how": words("""slowly, by half, in most cases, without loss, at night, under load, since
        {1950-2024}, in {town}, for {2-48} hours, every {2-30} days, at {3-95} percent, within
        {2-90} metres, on average, as expected, only once, from the north"""),
    "thing": ["the {noun}", "the {adjective} {noun}", "each {noun}", "a second {noun}", "{title}"],
    "clause": [
        "{thing} {action} {thing}",
        "{thing} {action} {thing} {how}",
        "{person} reports that {thing} {action} {thing}",
        "{how}, {thing} {action} {thing}",
        "{thing} and {thing} were compared in {town}",
        "the value of {label} rose from {10-49} to {50-99}",
        "{label} was set to {1-900} by {person}",
        "nothing in {town} {action} {thing} {how}",
    ],
    "join": ["; ", ", and ", ", but ", ", while ", ", because "],
}
UNITS = words("kg, m, km, s, ms, MB, kWh, mm, litres, EUR, percent, degrees, items")
FIELDS = words("""height, weight, price, stock, depth, speed, load, count, age, score, width, power,
    volume, delay, yield, range""")
STATES = words("open, closed, pending, active, retired, draft, final, unknown")


class Subject:
    """What a document is about: a title, columns of numbers with their units, and entries whose
    names and numbers may be told again."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.title = self.text("{adjective} {noun}")
        self.columns = draw.several(FIELDS, draw.number(2, 4))
        self.units = draw.several(UNITS, len(self.columns))
        self.entries = [self.entry() for _ in range(draw.number(3, 9))]

    def text(self, template: str) -> str:
        """Fill a template."""
        own = {"title": getattr(self, "title", "it"), "label": getattr(self, "columns", ["it"])}
        return fill(self.draw, RULES | own, template)

    def entry(self) -> dict:
        """Draw an entry: its name, and a number for each column."""
        name = self.draw.pick(["{town}", "{person}", "{noun} {1-60}", "{letter}{letter}-{100-999}"])
        values = [self.draw.number(1, 10 ** self.draw.number(1, 4)) for _ in self.columns]
        return {"name": self.text(name), **dict(zip(self.columns, values, strict=True))}

    def prose(self, most: int = 4) -> str:
        """Write a few sentences, some about entries' numbers."""
        out = []
        for _ in range(self.draw.number(1, most)):
            if self.draw.chance(0.4):
                out.append(self.statement())
            else:
                out.append(
                    sentence(self.text(self.draw.pick(["{clause}", "{clause}{join}{clause}"])))
                )
        return ". ".join(out) + "."

    def statement(self) -> str:
        """Say one number of an entry, or which of all entries has most."""
        column = self.draw.pick(self.columns)
        unit = self.units[self.columns.index(column)]
        entry = self.draw.pick(self.entries)
        most = max(self.entries, key=lambda e: e[column])
        if self.draw.chance(0.5):
            return f"The {column} of {entry['name']} is {entry[column]} {unit}"
        return f"{most['name']} has the largest {column}, {most[column]} {unit}"


def html(s: Subject) -> str:
    """Write a page with links, lists, a table and now and then a form."""
    heads = [sentence(s.text("{noun} {action} {noun}")) for _ in range(s.draw.number(2, 4))]
    anchors = [head.lower().replace(" ", "-") for head in heads]
    out = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '  <meta charset="utf-8">']
    out += [f"  <title>{sentence(s.title)}</title>", "</head>", "<body>"]
    out += [f"<h1>{sentence(s.title)}</h1>", '<ul class="contents">']
    for head, anchor in zip(heads, anchors, strict=True):
        out.append(f'  <li><a href="#{anchor}">{head}</a></li>')
    out.append("</ul>")
    for head, anchor in zip(heads, anchors, strict=True):
        out += [f'<h2 id="{anchor}">{head}</h2>', f"<p>{s.prose()}</p>"]
        part = s.draw.pick([html_table, html_list, html_figure, html_form])
        out += part(s)
    return "\n".join([*out, "</body>", "</html>"]) + "\n"


def html_table(s: Subject) -> list[str]:
    """Write a table of some entries."""
    cells = "".join(f"<th>{column}</th>" for column in s.columns)
    out = [f'<table class="{s.text("{adjective}")}">', f"  <tr><th>name</th>{cells}</tr>"]
    for entry in s.draw.several(s.entries, s.draw.number(2, len(s.entries))):
        cells = "".join(f"<td>{value}</td>" for value in entry.values())
        out.append(f"  <tr>{cells}</tr>")
    return [*out, "</table>"]


def html_list(s: Subject) -> list[str]:
    """Write a list with emphasis."""
    items = [f"  <li><b>{e['name']}</b>: {s.prose(1)}</li>" for e in s.draw.several(s.entries, 3)]
    return ["<ol>", *items, "</ol>"]


def html_figure(s: Subject) -> list[str]:
    """Write a figure and its caption."""
    name = s.text("{noun}-{1-99}")
    source = f'<img src="img/{name}.png" alt="{name}" width="{s.draw.number(10, 90)}0">'
    return ["<figure>", f"  {source}", f"  <figcaption>{s.prose(1)}</figcaption>", "</figure>"]


def html_form(s: Subject) -> list[str]:
    """Write a form with a field for each column."""
    out = [f'<form action="/{s.text("{noun}")}/{s.draw.number(1, 999)}" method="post">']
    for column in s.columns:
        value = s.draw.pick(s.entries)[column]
        out.append(f'  <label>{column} <input name="{column}" value="{value}"></label>')
    return [*out, "  <button>Send</button>", "</form>"]


def xml(s: Subject) -> str:
    """Write a catalogue of entries with attributes, elements and references to one another."""
    kind = s.text("{noun}")
    ids = {e["name"]: f"{kind[:2]}{i + 1}" for i, e in enumerate(s.entries)}
    out = ['<?xml version="1.0" encoding="UTF-8"?>', f"<!-- {s.prose(1)} -->"]
    out.append(f'<{kind}s title="{s.title}" year="{s.draw.number(1990, 2025)}">')
    for entry in s.entries:
        state = s.draw.pick(STATES)
        out.append(f'  <{kind} id="{ids[entry["name"]]}" state="{state}">')
        out.append(f"    <name>{entry['name']}</name>")
        for column, unit in zip(s.columns, s.units, strict=True):
            out.append(f'    <{column} unit="{unit}">{entry[column]}</{column}>')
        if s.draw.chance(0.5):
            out.append(f"    <note>{s.prose(2)}</note>")
        if s.draw.chance(0.4):
            other = s.draw.pick(s.entries)["name"]
            out.append(f'    <see ref="{ids[other]}">{other}</see>')
        out.append(f"  </{kind}>")
    return "\n".join([*out, f"</{kind}s>"]) + "\n"


def markdown(s: Subject) -> str:
    """Write headings, prose, a table, a list and a code block."""
    out = [f"# {sentence(s.title)}", "", s.prose(), ""]
    out += [f"| name | {' | '.join(s.columns)} |", "|---" * (len(s.columns) + 1) + "|"]
    out += [f"| {' | '.join(str(value) for value in entry.values())} |" for entry in s.entries]
    for _ in range(s.draw.number(1, 3)):
        out += ["", f"## {sentence(s.text('{adjective} {noun}'))}", "", s.prose(), ""]
        if s.draw.chance(0.5):
            out += [f"* **{e['name']}**: {s.prose(2)}" for e in s.draw.several(s.entries, 3)]
        elif s.draw.chance(0.5):
            out += [
                "> " + s.prose(3),
                "",
                f"See [{s.title}]({s.text('{noun}')}.md#{s.columns[0]}).",
            ]
        else:
            command = s.text("{noun} --{adjective}={1-64} ")
            out += ["```sh", command + f"--{s.columns[0]} '{s.entries[0]['name']}'", "```"]
    return "\n".join(out) + "\n"


def json_records(s: Subject) -> str:
    """Write one object with settings, units and nested records."""
    records = []
    for i, entry in enumerate(s.entries):
        record: dict = {"id": i + 1, "state": s.draw.pick(STATES), **entry}
        if s.draw.chance(0.4):
            record["notes"] = [s.prose(1) for _ in range(s.draw.number(1, 2))]
        if s.draw.chance(0.4):
            record["owner"] = {"name": s.text("{name} {family}"), "town": s.text("{town}")}
        if s.draw.chance(0.3):
            record["after"] = s.draw.pick(s.entries)["name"]
        records.append(record)
    whole = {
        "title": s.title,
        "version": s.text("{0-9}.{0-20}.{0-9}"),
        "units": dict(zip(s.columns, s.units, strict=True)),
        "valid": s.draw.chance(0.5),
        "parent": None,
        s.text("{noun}s"): records,
        "total": {column: sum(e[column] for e in s.entries) for column in s.columns},
    }
    return json.dumps(whole, indent=s.draw.pick([1, 2, 2, 4])) + "\n"


def latex(s: Subject) -> str:
    """Write an article with equations, a table, labels and references to them."""
    out = [r"\documentclass{article}", rf"\title{{{sentence(s.title)}}}"]
    out += [rf"\author{{{s.text('{name} {family}')} \and {s.text('{name} {family}')}}}"]
    out += [r"\begin{document}", r"\maketitle", "", s.prose(), ""]
    for _ in range(s.draw.number(1, 3)):
        label = s.text("{noun}{1-9}")
        a, b, c = s.draw.several("abcfghkmnpqrtuvwxyz", 3)
        right = s.draw.pick(
            [
                rf"\frac{{{b}_{{{s.draw.number(0, 9)}}}}}{{{c} + {s.draw.number(2, 99)}}}",
                rf"\sum_{{{c}=1}}^{{{s.draw.number(4, 200)}}} {b}_{c}^2",
                rf"{s.draw.number(2, 50)}{b} - \sqrt{{{c}}}",
                rf"\int_0^{{{s.draw.number(1, 12)}}} {b}({c})\,d{c}",
            ]
        )
        out += [rf"\section{{{sentence(s.text('{adjective} {noun}'))}}}", s.prose(3)]
        out += [r"\begin{equation}", rf"  {a} = {right} \label{{eq:{label}}}", r"\end{equation}"]
        out += [
            rf"In \eqref{{eq:{label}}}, ${b}$ is the {s.draw.pick(s.columns)}. {s.prose(2)}",
            "",
        ]
    out += [rf"\begin{{tabular}}{{l{'r' * len(s.columns)}}}", r"  \hline"]
    out += [f"  {' & '.join(map(str, entry.values()))} \\\\" for entry in s.entries]
    return "\n".join([*out, r"  \hline", r"\end{tabular}", r"\end{document}"]) + "\n"


KINDS = [html, xml, markdown, json_records, latex]


def write(draw: Draw) -> str:
    """Return one document."""
    kind = draw.pick(KINDS)
    return kind(Subject(draw))


def documents() -> list[str]:
    """Return the corpus: about a megabyte of documents."""
    return documents_of("markup", write)
